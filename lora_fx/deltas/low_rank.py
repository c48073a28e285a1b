"""A delta of low rank as a value:   δ = scale · B·A,   the one type that torch, ONNX, files and checks share.

It holds tensors; or `torch.fx` proxies, while a module is rewritten. `Adapter` is the module that has them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F

from lora_fx.deltas.kernels import times
from lora_fx.graph.layout import Layout


@dataclass(frozen=True)
class LowRank:
    """A (b…, rank, in), B (b…, rows or out, rank), their scale, and which output features they are for."""

    layout: Layout
    """Which axes of the weight are in, out and batch."""
    A: Any
    B: Any
    scale: Any
    """A number, or a proxy of one; a tensor of no axes where a program is compiled."""
    rank: int
    rows: tuple[int, ...] | None = None
    """The output features that B makes, in order; None for all."""
    index: Any = None
    """The rows as a tensor, where they are no range."""

    @property
    def is_range(self) -> bool:
        """The rows lie side by side."""
        return self.rows is None or self.rows[-1] - self.rows[0] + 1 == len(self.rows)

    @property
    def whole(self) -> Any:
        """B of every output feature: zero rows for the features that are no part of the site."""
        if self.rows is None:
            return self.B
        out = self.layout.size("o")
        if self.is_range:
            return F.pad(self.B, (0, 0, self.rows[0], out - self.rows[-1] - 1))
        zeros = self.B.new_zeros((*self.layout.batch, out, self.rank))
        index = torch.tensor(self.rows, device=self.B.device) if self.index is None else self.index
        return zeros.index_copy(len(self.layout.batch), index, self.B)

    def scaled(self, z: Any) -> Any:
        """scale · z."""
        return times(self.scale, z)

    def delta(self) -> Any:
        """scale · B·A in the weight's own shape and the factors' dtype."""
        return self.layout.delta(self.A, self.whole) * self.scale

    def of(self, weight: Any) -> Any:
        """The delta of this weight: it is the same for each."""
        return self.delta()

    def detached(self) -> LowRank:
        return replace(self, A=self.A.detach(), B=self.B.detach())

    def picked(self, experts: torch.Tensor) -> LowRank:
        """The delta of `W[experts]`, with one index or one axis of them in the place of the first axis."""
        layout = self.layout.picked(len(experts) if experts.ndim else None)
        return LowRank(layout, self.A[experts], self.whole[experts], self.scale, self.rank)
