"""Checkpoints on disk: folded, unfolded, compared and taken apart without the model, a block at a time."""
