"""How much of one adapter's directions is in another's (the LoRA paper, 7.2, appendix G, figures 3 and 4):

    φ(A₁, A₂, i, j) = ‖U₁[:, :i]ᵀ·U₂[:, :j]‖²_F / min(i, j)  ∈ [0, 1]

with the right-singular directions of A (of B: the left ones) in the columns of U. It is 1 where the span of the smaller
lies in that of the larger, 0 where the two are orthogonal.

For independent random subspaces of R^d it is max(i, j) / d in the mean: P = U·Uᵀ of a span that prefers none has the
mean (i / d)·1, so E tr(P₁·P₂) = i·j / d, and i·j / min(i, j) = max(i, j).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from lora_fx.errors import LoraFxError, few
from lora_fx.paper.factors import Factors
from lora_fx.tables import table


def phi(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """φ(i, j) for all i = 1 … n, j = 1 … m, as (n, m).

    Args:
        first, second: (d, n) and (d, m) with orthonormal columns, of `Factors.directions`.

    Raises:
        LoraFxError: they are directions of spaces of two sizes.
    """
    if first.shape[0] != second.shape[0]:
        raise LoraFxError(
            f"the directions of one have {first.shape[0]} components, those of the other {second.shape[0]}",
            place="phi",
            remedy="compare adapters of one weight, on one side of it",
        )
    overlap = (first.mT @ second).square().cumsum(0).cumsum(1)
    i, j = (torch.arange(1, n + 1, dtype=overlap.dtype) for n in overlap.shape)
    return overlap / torch.minimum(i[:, None], j[None, :])


def expected_phi(n: int, m: int, d: int) -> torch.Tensor:
    """(n, m): the mean of φ(i, j) over independent random subspaces of R^d, max(i, j) / d."""
    i, j = (torch.arange(1, k + 1, dtype=torch.float64) for k in (n, m))
    return torch.maximum(i[:, None], j[None, :]) / d


def random_directions(features: int, n: int, seed: int) -> torch.Tensor:
    """(features, n): the directions of a Gaussian matrix, whose span prefers none."""
    gaussian = torch.randn(features, n, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return torch.linalg.qr(gaussian).Q


@dataclass(frozen=True)
class Overlap:
    """φ of two adapters on one weight."""

    weight: str
    of: str
    """``A``, ``B``, ``in`` or ``out``: whose directions."""
    ranks: tuple[int, int]
    phi: torch.Tensor
    """(n, m)"""
    random: torch.Tensor
    """The same of random Gaussians of these shapes."""
    expected: torch.Tensor
    """The mean of that."""

    def to_json(self) -> dict:
        return {
            "weight": self.weight, "of": self.of, "ranks": list(self.ranks), "phi": self.phi.tolist(),
            "random": self.random.tolist(), "expected": self.expected.tolist(),
        }  # fmt: skip


def overlaps(
    first: Mapping[str, Factors], second: Mapping[str, Factors], of: Sequence[str] = ("A", "B"), seed: int = 0
) -> list[Overlap]:
    """φ for every weight, of each of these sets of directions.

    Raises:
        LoraFxError: the two adapt other weights, or weights of other shapes: they are adapters of different models.
    """
    matching(first, second)
    found = []
    for name, one in first.items():
        for which in of:
            U, V = one.directions(which), second[name].directions(which)
            d, n, m = len(U), U.shape[1], V.shape[1]
            gaussian = phi(random_directions(d, n, 2 * seed), random_directions(d, m, 2 * seed + 1))
            ranks = one.rank, second[name].rank
            found.append(Overlap(name, which, ranks, phi(U, V), gaussian, expected_phi(n, m, d)))
    return found


def matching(first: Mapping[str, Factors], second: Mapping[str, Factors]) -> None:
    """Raise where the two are no adapters of the same weights."""
    remedy = "compare adapters of one model, on the same weights"
    for one, other, which in ((first, second, "second"), (second, first, "first")):
        if missing := [name for name in one if name not in other]:
            reason = f"the {which} adapter does not adapt {few(missing, 3)}; it adapts {few(list(other), 3)}"
            raise LoraFxError(reason, place="the two adapters", remedy=remedy)
    for name, own in first.items():
        if own.shape != second[name].shape:
            sizes = [f"{a}×{b}" for a, b in (own.shape, second[name].shape)]
            raise LoraFxError(f"the weight is {sizes[0]} for one, {sizes[1]} for the other", place=name, remedy=remedy)


def table_of_overlaps(found: Sequence[Overlap]) -> str:
    """φ at the first direction, at the smaller rank, and of random directions there."""
    rows = []
    for o in found:
        k = min(o.phi.shape) - 1
        numbers = (o.phi[0, 0], o.phi[0, -1], o.phi[k, k], o.random[k, k], o.expected[k, k])
        rows.append((o.weight, o.of, f"{o.ranks[0]}, {o.ranks[1]}", *(f"{float(x):.3f}" for x in numbers)))
    header = ("weight", "of", "ranks", "φ(1, 1)", "φ(1, last)", "φ(k, k)", "random", "expected")
    shown = table(header, rows, right=(3, 4, 5, 6, 7))
    return f"{shown}\nk: the smaller number of directions; expected: k / features, of random subspaces"
