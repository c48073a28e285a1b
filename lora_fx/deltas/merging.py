"""How several deltas of one weight become one.

    sum     Σ wᵢ·δᵢ
    TIES    of each δᵢ its largest elements; the sign that their sum has; the mean of wᵢ·δᵢ over those of that sign
    DARE    Σ wᵢ·mᵢ ⊙ δᵢ / p,   mᵢ from a Bernoulli(p): Σ wᵢ·δᵢ in expectation

TIES is of Yadav et al. (NeurIPS 2023), DARE of Yu et al. (ICML 2024). Both speak of deltas, and so do these: what the
factors of a delta are is arbitrary, B·A = (B·M)·(M⁻¹·A), and to trim these would make the result so too.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch


def summed(deltas: Sequence[torch.Tensor], strengths: Sequence[float]) -> torch.Tensor:
    """Σ wᵢ·δᵢ."""
    return sum((w * d for w, d in zip(strengths[1:], deltas[1:], strict=True)), start=strengths[0] * deltas[0])


def trimmed(delta: torch.Tensor, density: float) -> torch.Tensor:
    """Its ⌊density·n⌋ elements of the largest size, and 0 in the place of the others."""
    flat = delta.reshape(-1)
    kept = flat.abs().topk(int(density * flat.numel())).indices
    return torch.zeros_like(flat).index_copy_(0, kept, flat[kept]).view_as(delta)


def ties(deltas: Sequence[torch.Tensor], strengths: Sequence[float], density: float) -> torch.Tensor:
    """Trim, elect a sign, and merge what has it. The strengths have no say in the election: a negative one would turn
    round what its adapter stands for."""
    kept = torch.stack([trimmed(delta, density) for delta in deltas])
    elected = torch.where(kept.sum(0) >= 0, 1.0, -1.0)
    agree = kept.sign() == elected
    weighed = kept.mul_(agree).mul_(kept.new_tensor(strengths).view(-1, *[1] * deltas[0].ndim))
    return weighed.sum(0).div_(agree.sum(0).clamp_(min=1))


def dare(
    deltas: Sequence[torch.Tensor], strengths: Sequence[float], density: float, generator: torch.Generator
) -> torch.Tensor:
    """Drop at random, and rescale what is left."""
    masks = [torch.empty(delta.shape).bernoulli_(density, generator=generator).to(delta.device) for delta in deltas]
    dropped = [delta.mul(mask).div_(density) for delta, mask in zip(deltas, masks, strict=True)]
    return summed(dropped, strengths)
