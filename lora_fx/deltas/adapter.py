"""An adapter of one weight: the module that holds its θ, beside the weight.

W  →  W + δ(W, θ)        for the kind `lora`  δ = scale · B·A,  A: (…, rank, in), B: (…, out, rank)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from lora_fx.deltas import schedules
from lora_fx.deltas.kinds import Kind, Space, Theta, kind_named, own_factors
from lora_fx.deltas.low_rank import LowRank
from lora_fx.deltas.realisation import Realisation
from lora_fx.graph.layout import Layout
from lora_fx.graph.program import Beside


@dataclass(frozen=True)
class Dense:
    """A delta as a function of the weight: what a kind without factors gives."""

    layout: Layout
    of: Callable[[Any], Any]
    """W → δ(W, θ), both in the weight's own shape; δ in θ's dtype."""
    theta: Theta | None = None
    """What a branch of the kind's own takes; None in a graph, which has none."""

    def detached(self) -> Dense:
        return Dense(self.layout, lambda weight: self.of(weight).detach(), None)


class Adapter(Beside):
    """θ of one adapter on one weight, or on a part of one.

    Args:
        layout: which axes of the weight are in, out and batch.
        kind: a row of `lora_fx.deltas.kinds`, or its name.
        rows: the output features that are adapted (a part of a fused weight); None for all.
        name: the adapter's name; one name may be on many weights.
        role: what the site does, for reading.
        dtype: of θ: float32 for weights of lower precision.
        settings: those of the kind; ``rank``, ``alpha``, ``scaling``, ``dropout`` (probability on the branch input, in
            training only) and ``schedule`` (see `lora_fx.deltas.schedules`) for `lora`.

    The tensors of θ are its parameters: for `lora` A (batch…, rank, in) and B (batch…, len(rows) or out, rank).

    Raises:
        KindError: there is no such kind, or it has no such setting, or needs one.
    """

    A: nn.Parameter  # of `lora`, and of what has factors of these names
    B: nn.Parameter

    def __init__(
        self,
        layout: Layout,
        *,
        kind: Kind | str = "lora",
        rows: tuple[int, ...] | None = None,
        name: str = "default",
        role: str = "",
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
        **settings: Any,
    ) -> None:
        super().__init__()
        self.kind = kind_named(kind) if isinstance(kind, str) else kind
        self.layout, self.rows, self.name, self.role = layout, rows, name, role
        self.settings = self.kind.complete(settings)
        self.settings.pop("init", None)  # for `start` alone
        self.active = True
        self.read_outside = ""
        """The module, if there is one, that multiplies with the weight though another holds it."""
        self.realised = Realisation.DISPATCH
        """How the weight is read: `GRAPH` (generated forwards) or `DISPATCH` (an `AdaptedWeight` property)."""
        self.dropout = nn.Dropout(self.settings.get("dropout", 0.0))
        self.schedule: str = self.settings.get("schedule", schedules.BRANCH)
        for tensor, shape in self.kind.shapes(self.space).items():
            self.register_parameter(tensor, nn.Parameter(torch.zeros(*shape, dtype=dtype, device=device)))
        if rows is not None and rows[-1] - rows[0] + 1 != len(rows):
            self.register_buffer("index", torch.tensor(rows, dtype=torch.long, device=device), persistent=False)

    @property
    def space(self) -> Space:
        """What θ is for."""
        out = self.layout.size("o") if self.rows is None else len(self.rows)
        return Space(self.layout.batch, out, self.layout.size("i"), Theta(**self.settings))

    @property
    def theta(self) -> Theta:
        """θ as it is now, and the settings."""
        return self.theta_of({name: getattr(self, name) for name in self._parameters})

    def theta_of(self, tensors: dict[str, Any]) -> Theta:
        """These in the place of its own tensors."""
        return Theta(**self.settings, **tensors)

    @property
    def term(self) -> tuple[Any, Any, float, int, nn.Module | None] | None:
        """A, B, their scale, the first output feature of those that B makes, and the dropout or None: as they are now.

        None where there are no factors, or where B makes features that do not lie side by side.
        """
        if self.kind.factors is None or "index" in self._buffers:
            return None
        own: Any = self._parameters
        A, B = (own["A"], own["B"]) if self.kind.factors is own_factors else self.kind.factors(self.theta)
        drop: Any = self._modules["dropout"]
        return A, B, self.scale, self.rows[0] if self.rows else 0, drop if drop.p else None

    @property
    def rank(self) -> int:
        """Of its factors; KeyError for a kind that has none."""
        return self.settings["rank"]

    @property
    def alpha(self) -> float:
        alpha = self.settings["alpha"]
        return float(self.rank if alpha is None else alpha)

    @property
    def scaling(self) -> str:
        return self.settings.get("scaling", "standard")

    @property
    def scale(self) -> float:
        return Theta(**self.settings).scale

    @property
    def dtype(self) -> torch.dtype:
        # Not through the attribute: while a module is traced, reading a parameter gives a proxy.
        first = next(iter(self._parameters.values()))
        assert first is not None
        return first.dtype

    def low_rank(self, tensors: dict[str, Any] | None = None, index: Any = None) -> LowRank:
        """Its delta as a value, of a kind that has factors: of θ as it is now, or of these in its place."""
        assert self.kind.factors is not None, self.kind.name
        A, B = self.kind.factors(self.theta if tensors is None else self.theta_of(tensors))
        index = self._buffers.get("index") if tensors is None else index
        return LowRank(self.layout, A, B, self.scale, self.rank, self.rows, index)

    def exact(self) -> LowRank:
        """The same for a fold: factors that are computed, and are no tensors of θ themselves, in float64."""
        plain = self.low_rank()
        if all(any(factor is p for p in self._parameters.values()) for factor in (plain.A, plain.B)):
            return plain
        wide = {name: p.detach().to(torch.float64) for name, p in self.named_parameters()}
        return self.low_rank(wide, self._buffers.get("index"))

    def value(self) -> LowRank | Dense:
        """Its delta as a value."""
        if self.kind.low_rank:
            return self.low_rank()
        theta = self.theta
        return Dense(self.layout, partial(self.delta, theta=theta), theta)

    @torch.no_grad()
    def start(self, weight: torch.Tensor, init: Any = "kaiming") -> None:
        """Fill θ so that the adapted weight is W, bit for bit."""
        self.kind.start(Theta(**vars(self.theta), init=init), self.matrix(weight.detach()))

    def delta(self, weight: Any = None, theta: Theta | None = None) -> Any:
        """δ(W, θ) in the weight's own shape and θ's dtype; a low-rank one asks for no W."""
        if self.kind.low_rank:
            return self.low_rank().delta()
        assert self.kind.delta is not None
        own = self.kind.delta(self.matrix(weight), self.theta if theta is None else theta)
        return self.layout.to_weight(self.embedded(own))

    forward = delta

    def matrix(self, weight: Any) -> Any:
        """What it adapts of the weight, as its kind sees it: (batch…, out, in), in θ's dtype."""
        matrix = self.layout.to_matrix(weight).to(self.dtype if weight.dtype != torch.float64 else weight.dtype)
        if self.rows is None:
            return matrix
        index = self._buffers.get("index")
        first = self.rows[0]
        return matrix.narrow(-2, first, len(self.rows)) if index is None else matrix.index_select(-2, index)

    def embedded(self, own: Any) -> Any:
        """(batch…, rows, n) with zeros for the features that are no part."""
        if self.rows is None:
            return own
        return LowRank(self.layout, None, own, 1.0, own.shape[-1], self.rows, self._buffers.get("index")).whole

    def extra_repr(self) -> str:
        part = f", {self.role}: {len(self.rows)} of {self.layout.size('o')} features" if self.rows else ""
        own = f"rank={self.rank}, scale={self.scale:g}" if "rank" in self.settings else ""
        kind = "" if self.kind.name == "lora" else f"{self.kind.name}{', ' if own else ''}"
        return f"{kind}{own}{part}"
