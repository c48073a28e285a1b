"""A low-rank adapter of one weight: the module that holds its factors, beside the weight.

W  →  W + scale · B·A        A: (…, rank, in), B: (…, out, rank)
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import nn

from lora_fx.deltas import schedules
from lora_fx.deltas.low_rank import LowRank
from lora_fx.deltas.realisation import Realisation
from lora_fx.graph.layout import Layout
from lora_fx.graph.program import Beside


class Adapter(Beside):
    """The factors of one adapter on one weight, or on a part of one.

    Args:
        layout: which axes of the weight are in, out and batch.
        rank, alpha: scale is alpha / rank, or alpha / sqrt(rank) with `scaling="rslora"` (Kalajdzievski 2023).
        dropout: probability on the branch input, in training only.
        rows: the output features that are adapted (a part of a fused weight); None for all.
        name: the adapter's name; one name may be on many weights.
        role: what the site does, for reading.
        schedule: in which order its branches are computed; see `lora_fx.deltas.schedules`.

    A is (batch…, rank, in), B (batch…, len(rows) or out, rank), in float32 for weights of lower precision.
    """

    def __init__(
        self,
        layout: Layout,
        *,
        rank: int,
        alpha: float,
        dropout: float = 0.0,
        scaling: str = "standard",
        rows: tuple[int, ...] | None = None,
        name: str = "default",
        role: str = "",
        schedule: str = schedules.AUTO,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.layout, self.rank, self.alpha, self.scaling = layout, rank, float(alpha), scaling
        self.rows, self.name, self.role, self.schedule = rows, name, role, schedule
        self.active = True
        self.realised = Realisation.DISPATCH
        """How the weight is read: `GRAPH` (generated forwards) or `DISPATCH` (an `AdaptedWeight` property)."""
        self.dropout = nn.Dropout(dropout)
        shape_b = layout.shape_of("B", rank) if rows is None else (*layout.batch, len(rows), rank)
        self.A = nn.Parameter(torch.zeros(layout.shape_of("A", rank), dtype=dtype, device=device))
        self.B = nn.Parameter(torch.zeros(shape_b, dtype=dtype, device=device))
        if not self.low_rank().is_range:
            index = torch.tensor(rows, dtype=torch.long, device=device)
            self.register_buffer("index", index, persistent=False)

    @property
    def scale(self) -> float:
        return self.alpha / (math.sqrt(self.rank) if self.scaling == "rslora" else self.rank)

    @property
    def dtype(self) -> torch.dtype:
        # Not through `self.A`: while a module is traced, reading a parameter gives a proxy.
        A = self._parameters["A"]
        assert A is not None
        return A.dtype

    def low_rank(self) -> LowRank:
        """Its delta as a value, of the factors as they are now."""
        index = self._buffers.get("index")
        return LowRank(self.layout, self.A, self.B, self.scale, self.rank, self.rows, index)

    @torch.no_grad()
    def reset(self, init: str | Callable[[torch.Tensor, torch.Tensor], None] = "kaiming") -> None:
        """Fill A and B: B = 0, so that the adapted weight is W, bit for bit."""
        self.B.zero_()
        if callable(init):
            init(self.A, self.B)
        elif init == "kaiming":  # as nn.Linear: uniform in ±1/sqrt(in)
            bound = 1 / math.sqrt(self.A.shape[-1])
            self.A.uniform_(-bound, bound)
        elif init == "gaussian":
            self.A.normal_(std=1 / self.rank)
        else:
            self.A.zero_()

    def delta(self) -> torch.Tensor:
        """scale · B·A in the weight's own shape and the factors' dtype."""
        return self.low_rank().delta()

    def extra_repr(self) -> str:
        part = f", {self.role}: {len(self.rows)} of {self.layout.size('o')} features" if self.rows else ""
        return f"rank={self.rank}, scale={self.scale:g}{part}"
