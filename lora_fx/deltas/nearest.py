"""The nearest delta of a rank:   D ≈ B·A,   by the truncated singular value decomposition (Eckart and Young 1936).

* Of a matrix that comes in blocks of rows (`nearest`): small ones are decomposed whole; of the others the leading
  directions are found by subspace iteration (Halko, Martinsson and Tropp 2011, algorithm 4.4), which asks for the
  blocks a few times, so that D itself is never there.
* Of a sum of factors (`truncated`): D = B·A of a high rank, Q_b·(R_b·R_aᵀ)·Q_aᵀ by two QR decompositions, so that only
  a matrix of that rank is decomposed. D itself is never there either.

All of it in float64. How much of ‖D‖² a result keeps is measured on the factors that are kept, not estimated.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from lora_fx.errors import few
from lora_fx.tables import table

_WHOLE = 512  # rows or columns up to which a matrix is decomposed whole
_MORE = 8  # directions beside those that are wanted
_ROUNDS = 4  # of subspace iteration

Factors = tuple[torch.Tensor, torch.Tensor]
"""A (…, rank, in) and B (…, out, rank): D ≈ B·A, each with the roots of the singular values."""


@dataclass(frozen=True)
class Rows:
    """A matrix by blocks of its rows, in float64: small ones come whole."""

    rows: int
    columns: int
    blocks: Callable[[], Iterator[tuple[int, int, torch.Tensor]]]
    """() → (start, stop, rows start to stop) …; each is the caller's to write into."""

    @classmethod
    def of(cls, matrix: torch.Tensor) -> Rows:
        rows, columns = matrix.shape
        return cls(rows, columns, lambda: iter([(0, rows, matrix.clone())]))

    def onto(self, right: torch.Tensor) -> torch.Tensor:
        """D·right."""
        return torch.cat([block @ right.to(block.device) for *_, block in self.blocks()])

    def back(self, left: torch.Tensor) -> torch.Tensor:
        """leftᵀ·D."""
        total = left.new_zeros(left.shape[1], self.columns)
        for start, stop, block in self.blocks():
            total.addmm_(left[start:stop].T, block)
        return total

    @property
    def squared_norm(self) -> float:
        """‖D‖², Frobenius."""
        return sum(float(block.square().sum()) for *_, block in self.blocks())

    def measured(self, A: torch.Tensor, B: torch.Tensor) -> tuple[float, float]:
        """‖D‖² and ‖D − B·A‖²."""
        total, rest, wide = 0.0, 0.0, A.to(torch.float64)
        for start, stop, block in self.blocks():
            total += float(block.square().sum())
            rest += float(block.sub_(B[start:stop].to(torch.float64) @ wide).square().sum())
        return total, rest


def nearest(matrix: Rows, rank: int) -> Factors:
    """A (rank, columns) and B (rows, rank), the nearest of this rank; of a smaller one, where it has fewer rows."""
    rank = min(rank, matrix.rows, matrix.columns)
    if min(matrix.rows, matrix.columns) <= _WHOLE:
        U, S, V = torch.linalg.svd(torch.cat([block for *_, block in matrix.blocks()]), full_matrices=False)
        return _rooted(U, S, V, rank)
    wide = min(rank + _MORE, matrix.rows, matrix.columns)
    onto = torch.randn(matrix.columns, wide, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for _ in range(_ROUNDS):
        onto = torch.linalg.qr(matrix.back(torch.linalg.qr(matrix.onto(onto))[0]).T)[0]
    Q = torch.linalg.qr(matrix.onto(onto))[0]
    U, S, V = torch.linalg.svd(matrix.back(Q), full_matrices=False)
    return _rooted(Q @ U, S, V, rank)


def truncated(A: torch.Tensor, B: torch.Tensor, rank: int) -> Factors:
    """The nearest of this rank to B·A: (…, many, in) and (…, out, many); of fewer where there are fewer."""
    Qb, Rb = torch.linalg.qr(B)
    Qa, Ra = torch.linalg.qr(A.mT)
    U, S, V = torch.linalg.svd(Rb @ Ra.mT, full_matrices=False)
    return _rooted(Qb @ U, S, V @ Qa.mT, min(rank, S.shape[-1]))


def _rooted(U: torch.Tensor, S: torch.Tensor, V: torch.Tensor, rank: int) -> Factors:
    root = S[..., :rank].sqrt()
    return (root[..., None] * V[..., :rank, :]).contiguous(), (U[..., :rank] * root[..., None, :]).contiguous()


def squared_norm(A: torch.Tensor, B: torch.Tensor) -> float:
    """‖B·A‖², Frobenius, of all matrices together."""
    return float((torch.linalg.qr(B, mode="r")[1] @ torch.linalg.qr(A.mT, mode="r")[1].mT).square().sum())


@dataclass(frozen=True)
class Kept:
    """What an adapter holds of one weight's change D."""

    weight: str
    shape: tuple[int, ...]
    rank: int | None
    """None where it holds all of it: of a weight or a bias that is kept whole."""
    change: float
    """‖D‖, Frobenius."""
    energy: float
    """1 − ‖D − δ‖² / ‖D‖², δ what the adapter adds."""

    @classmethod
    def of(cls, weight: str, shape: Sequence[int], rank: int | None, total: float, rest: float) -> Kept:
        """Of ‖D‖² and ‖D − δ‖²."""
        return cls(weight, tuple(shape), rank, math.sqrt(total), 1 - rest / total if total else 1.0)


def energy(rows: Sequence[Kept]) -> float:
    """Of all weights together."""
    total = sum(row.change**2 for row in rows)
    return sum(row.energy * row.change**2 for row in rows) / total if total else 1.0


def as_table(rows: Sequence[Kept]) -> str:
    body = [
        (row.weight, "×".join(map(str, row.shape)), str(row.rank or "–"), f"{row.change:.3g}", f"{row.energy:.2%}")
        for row in rows
    ]
    return table(("weight", "shape", "rank", "‖D‖", "energy kept"), body, right=(2, 3, 4))


@dataclass(frozen=True)
class Approximation:
    """An adapter that stands for changes D of weights, and what it holds of each. `print` it as a table."""

    name: str
    rows: tuple[Kept, ...]
    ignored: tuple[str, ...] = ()
    """Tensors that differ, and that the adapter does not hold."""

    @property
    def energy(self) -> float:
        """Of all weights together."""
        return energy(self.rows)

    def to_json(self) -> dict[str, Any]:
        rows = [dict(vars(row), shape=list(row.shape)) for row in self.rows]
        return {"name": self.name, "energy": self.energy, "ignored": list(self.ignored), "weights": rows}

    def __str__(self) -> str:
        return summarised(self.rows, self.ignored, self.name)


def summarised(rows: Sequence[Kept], ignored: Sequence[str], name: object) -> str:
    """A table of them, what is left out, and the total."""
    left = [f"left out, though they differ: {few(ignored, 5)}"] if ignored else []
    return "\n".join([as_table(rows), *left, f"{name}: {len(rows)} weights, {energy(rows):.2%} of the energy kept"])
