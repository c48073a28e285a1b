"""What an adapter is, and what it computes: W → W + δ."""
