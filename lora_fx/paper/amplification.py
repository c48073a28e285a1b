"""Which directions of W an adapter amplifies (the LoRA paper, 7.3 and table 7):   ‖Uᵀ·W·V‖_F   and   ‖δ‖_F / ‖Uᵀ·W·V‖_F

with r left- and right-singular directions U, V of δ, of W itself, and of random matrices. The last quotient, for those
of δ, is the amplification factor: how much larger δ is there than what W has in these directions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import torch

from lora_fx.errors import LoraFxError
from lora_fx.paper.factors import Factors
from lora_fx.paper.subspaces import random_directions
from lora_fx.tables import table


@dataclass(frozen=True)
class Amplified:
    """A row of table 7, and the spectrum of δ: all in δ's own scale s·B·A."""

    weight: str
    rank: int
    """How many directions of each."""
    norm_w: float
    """‖W‖_F"""
    norm_delta: float
    """‖δ‖_F"""
    along_delta: float
    """‖Uᵀ·W·V‖_F, U and V of δ."""
    along_w: float
    """… of W: the root of the sum of its r largest squared singular values, as much as r directions can have."""
    along_random: float
    """… of random matrices; r·‖W‖_F / √(out·in) in the root mean square."""
    factor: float
    """‖δ‖_F / ‖Uᵀ·W·V‖_F of δ's directions."""
    effective_rank: float
    """Of δ: exp of the entropy of its singular values as shares of their sum (Roy and Vetterli 2007)."""
    energy: tuple[float, ...]
    """Of δ: the share of ‖δ‖²_F in its first 1, 2, … directions."""

    def to_json(self) -> dict:
        return asdict(self)


def amplification(adapter: Factors, rank: int | None = None, seed: int = 0) -> Amplified:
    """Table 7 for one weight.

    W is decomposed by the eigenvalues of the smaller of W·Wᵀ and Wᵀ·W, δ by its factors.

    Args:
        rank: how many directions; None for all of δ's.
        seed: of the random directions.

    Raises:
        LoraFxError: W or s is not there, W is zero along δ, or δ has fewer directions than `rank`.
    """
    W, delta = adapter.weight, adapter.delta
    if W is None:
        remedy = "pass the adapted model, or the base model's weights (--base)"
        raise LoraFxError("its base weight is not there", place=adapter.name, remedy=remedy)
    if tuple(W.shape) != adapter.shape:
        sizes = "×".join(map(str, W.shape)), "×".join(map(str, adapter.shape))
        reason = f"the base weight is {sizes[0]}, the adapter for {sizes[1]}: it is another model's"
        raise LoraFxError(reason, place=adapter.name, remedy="pass the base model it was trained on")
    n = len(delta.S) if rank is None else rank
    if not 1 <= n <= len(delta.S):
        reason = f"rank {n}: δ has {len(delta.S)} directions"
        raise LoraFxError(reason, place=adapter.name, remedy="ask for as many or fewer")
    along = _along(W, delta.U[:, :n], delta.V[:, :n])
    if not along > 0:
        reason = "W is zero in all of δ's directions: there is nothing to amplify"
        raise LoraFxError(reason, place=adapter.name, remedy="leave this weight out")
    out, inner = adapter.shape
    squares = torch.linalg.eigvalsh(W @ W.mT if out <= inner else W.mT @ W)
    norm = float(delta.S.square().sum().sqrt())
    random = _along(W, random_directions(out, n, 2 * seed), random_directions(inner, n, 2 * seed + 1))
    return Amplified(
        weight=adapter.name,
        rank=n,
        norm_w=float(W.norm()),
        norm_delta=norm,
        along_delta=along,
        along_w=float(squares[-n:].clamp(min=0).sum().sqrt()),
        along_random=random,
        factor=norm / along,
        effective_rank=delta.effective_rank,
        energy=tuple(delta.energy.tolist()),
    )


def amplifications(adapters: Mapping[str, Factors], rank: int | None = None, seed: int = 0) -> list[Amplified]:
    """Table 7 over all weights of an adapter."""
    return [amplification(adapter, rank, seed) for adapter in adapters.values()]


def _along(W: torch.Tensor, U: torch.Tensor, V: torch.Tensor) -> float:
    return float((U.mT @ W @ V).norm())


def table_of_amplifications(found: Sequence[Amplified]) -> str:
    header = (
        "weight", "r", "‖W‖", "‖δ‖", "‖UᵀWV‖: of δ", "of W", "random", "factor", "effective rank", "directions of 90 %",
    )  # fmt: skip
    rows = []
    for a in found:
        numbers = (a.norm_w, a.norm_delta, a.along_delta, a.along_w, a.along_random, a.factor, a.effective_rank)
        ninety = 1 + sum(share < 0.9 for share in a.energy)
        rows.append((a.weight, str(a.rank), *(f"{x:.4g}" for x in numbers), str(min(ninety, len(a.energy)))))
    notes = "All norms are Frobenius norms. factor: ‖δ‖ / ‖UᵀWV‖ of δ's directions (table 7's amplification factor)."
    return f"{table(header, rows, right=tuple(range(1, 10)))}\n{notes}"
