"""An adapter of one weight: the module that holds its θ, beside the weight.

W  →  W + δ(W, θ)        for the kind `lora`  δ = scale · B·A,  A: (…, rank, in), B: (…, out, rank)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from numbers import Real
from types import MappingProxyType
from typing import Any

import torch
from torch import fx, nn
from torch.compiler import is_dynamo_compiling, is_exporting
from torch.fx._symbolic_trace import is_fx_symbolic_tracing

from lora_fx.deltas import schedules
from lora_fx.deltas.calls import Calls, new_calls
from lora_fx.deltas.dropping import BranchDropout
from lora_fx.deltas.kernels import times
from lora_fx.deltas.kinds import ActivationRewrite, Kind, Space, Theta, kind_named, own_factors
from lora_fx.deltas.low_rank import LowRank
from lora_fx.deltas.realisation import Realisation
from lora_fx.errors import AdapterError
from lora_fx.graph.layout import Layout
from lora_fx.graph.places import is_shard
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


@dataclass(frozen=True)
class Around:
    """What rewrites the result of a use, in the place of a delta."""

    kind: ActivationRewrite
    layout: Layout
    space: Space
    theta: Theta

    def cast(self, dtype: Any) -> Around:
        """With θ in this dtype."""
        tensors = {name: getattr(self.theta, name).to(dtype) for name in self.kind.shapes(self.space)}
        return replace(self, theta=Theta(**{**vars(self.theta), **tensors}))

    def detached(self) -> Around:
        return self


_AGAIN = "remove it and apply again, with that in the rule"

#: what generated code, plans and files have taken from an adapter: field → how to come to another one
_FIXED = {
    "active": "lora_fx.activate(model, …) says which adapters act, lora_fx.deactivate(model) that none does",
    "realised": "lora_fx decides it, so that no use of the weight is left out",
    "read_outside": "lora_fx finds it in the model",
    "dropout": "set dropout.p",
    "strength": "lora_fx.activate(model, {name: strength}) gives it",
    "name": "lora_fx.rename(model, old, new)",
    "layout": "it follows from how the model reads the weight",
    **dict.fromkeys(("kind", "rows", "role", "rank", "scaling", "schedule", "settings"), _AGAIN),
}


class NoDropout(nn.Identity):
    """In the place of a dropout that the rule did not ask for: forwards have no call of it."""

    @property
    def p(self) -> float:
        return 0.0

    @p.setter
    def p(self, value: float) -> None:
        if value != 0:
            raise AdapterError(
                f"p={value!r} would not act: the rule had dropout=0, so forwards were made without one",
                place="adapter.dropout",
                remedy="give the rule a dropout above 0; then p can be set to any other, and to 0 and back",
            )


class Adapter(Beside):
    """θ of one adapter on one weight, or on a part of one.

    `alpha`, `scale` and ``dropout.p`` can be set at any time: the next forward has them, and so have folds, files,
    exports and certificates. Everything else is fixed.

    Args:
        layout: which axes of the weight are in, out and batch.
        kind: a row of `lora_fx.deltas.kinds`, or its name.
        rows: the output features that are adapted (a part of a fused weight); None for all.
        name: the adapter's name; one name may be on many weights.
        role: what the site does, for reading.
        dtype: of θ: float32 for weights of lower precision.
        room: the ranks that there is room for, of a kind that `pads`: those behind its own are zeros.
        settings: those of the kind; ``rank``, ``alpha``, ``scaling``, ``dropout`` (probability on the branch input, in
            training only) and ``schedule`` (see `lora_fx.deltas.schedules`) for `lora`.

    The tensors of θ are its parameters: for `lora` A (batch…, rank, in) and B (batch…, len(rows) or out, rank).

    Raises:
        KindError: there is no such kind, or it has no such setting, or needs one.
        AdapterError: a field is set that is fixed; the message says what to do.
    """

    A: nn.Parameter  # of `lora`, and of what has factors of these names
    B: nn.Parameter
    dropout: BranchDropout | NoDropout
    kind: Kind
    layout: Layout
    rows: tuple[int, ...] | None
    name: str
    role: str
    active: bool
    realised: Realisation
    """How the weight is read: `GRAPH` (generated forwards), `DISPATCH` (an `AdaptedWeight`) or `DENSE` (W + δ)."""
    read_outside: str
    """The module, if there is one, that multiplies with the weight though another holds it."""
    schedule: str
    _settings: Mapping[str, Any]
    _room: int | None
    _scale: float
    _strength: float
    _multiplier: float
    _live: torch.Tensor
    """The multiplier, as a tensor of one element: of one without an axis Dynamo makes a number, and compiles twice."""
    _trained: tuple[str, ...]
    """What of θ trained when it was last deactivated."""
    _owners: Mapping[str, Adapter]
    """Tensors of θ that another adapter of the same name has, for both → that one."""
    calls: Calls
    """Of the model, for what stands behind its blocks."""

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
        room: int | None = None,
        **settings: Any,
    ) -> None:
        super().__init__()
        kind = kind_named(kind) if isinstance(kind, str) else kind
        settings = kind.complete(settings)
        settings.pop("init", None)  # for `start` alone
        dropout = settings.get("dropout", 0.0)
        self.add_module("dropout", BranchDropout(dropout) if dropout else NoDropout())
        self.change(kind=kind, layout=layout, rows=rows, name=name, role=role, _settings={})
        self.change(active=True, realised=Realisation.DISPATCH, read_outside="", _trained=(), _owners={})
        self.change(calls=new_calls())
        self.change(schedule=settings.get("schedule", schedules.BRANCH), _room=room)
        self.adjust(1.0, **settings)
        for tensor, shape in self.kind.shapes(self.space).items():
            numbers = torch.zeros(*shape, dtype=dtype, device=device)
            self.register_parameter(tensor, nn.Parameter(numbers, requires_grad=tensor not in self.kind.frozen))
        if rows is not None and rows[-1] - rows[0] + 1 != len(rows):
            self.register_buffer("index", torch.tensor(rows, dtype=torch.long, device=device), persistent=False)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _FIXED:
            if name in self._modules and self._modules[name] is value:
                return  # a walk over a model puts back what it does not wrap: FSDP's, activation checkpointing's
            place = f"{name} of adapter {self.name!r}"
            raise AdapterError(f"{value!r}: it cannot be set", place=place, remedy=_FIXED[name])
        super().__setattr__(name, value)

    def change(self, **fields: Any) -> None:
        """Set what is fixed to others: for the passes, which see to it that everything follows."""
        self.__dict__.update(fields)

    def adjust(self, strength: float | None = None, **settings: Any) -> None:
        """Another strength, or other settings; what its forward multiplies with follows.

        Raises:
            AdapterError: that is not finite, or the kind has no δ that a strength could be of; nothing has changed.
        """
        own, place = {**self._settings, **settings}, f"strength of adapter {self.name!r}"
        strength = self._strength if strength is None else strength
        if strength != 1 and not self.kind.is_delta:
            reason = f"{strength!r}: the kind {self.kind.name!r} has no δ that it could be of: {self.kind.why}"
            raise AdapterError(reason, place=place, remedy="activate it by its name alone, or leave it out")
        multiplier = strength
        if "rank" in own and "alpha" in own:
            scale = Theta(**own).scale
            multiplier *= scale if self.kind.low_rank else 1.0
            if not math.isfinite(multiplier):
                reason = f"{strength!r} times its scale, {scale!r}, is no finite number"
                raise AdapterError(reason, place=place, remedy="give a smaller one")
            self.change(_scale=scale)
        with torch.inference_mode(False):  # a new one: what runs just now, and its backward, has the old one still
            live = torch.tensor([multiplier], dtype=torch.float64, device="cpu")
        self.change(_settings=own, _strength=strength, _multiplier=multiplier, _live=live)

    @property
    def told(self) -> dict[str, Any]:
        """What `adjust` changes, as `change` gives it back."""
        names = ("_settings", "_scale", "_strength", "_multiplier", "_live")
        return {name: self.__dict__[name] for name in names if name in self.__dict__}

    def share(self, tensor: str, owner: Adapter) -> None:
        """Have this tensor of θ in common with another adapter, whose parameter it is from now on: copies of both go
        on sharing it, and a `state_dict` has it once."""
        del self._parameters[tensor]
        self.change(_owners={**self._owners, tensor: owner})
        self.__class__ = SharingAdapter

    def owner(self, tensor: str) -> Adapter:
        """Whose parameter this tensor of θ is: mostly its own."""
        return self._owners.get(tensor, self)

    @property
    def tensors(self) -> tuple[str, ...]:
        """The names of θ's tensors, those too that it has in common with others."""
        return (*self._parameters, *self._owners)

    def act(self, whether: bool, strength: float = 1.0) -> None:
        """Become active, or cease to be: then θ does not train. `requires_grad` comes back as it was."""
        if strength != self._strength:
            self.adjust(strength)
        if whether == self.active:
            return
        own: Any = self._parameters
        names = self._trained if whether else tuple(name for name, p in own.items() if p.requires_grad)
        for name in names:
            own[name].requires_grad_(whether)
        self.change(active=whether, _trained=names)

    @property
    def settings(self) -> Mapping[str, Any]:
        """Those of its kind, as they are now; read-only."""
        now = {"dropout": self.dropout.p} if "dropout" in self._settings else {}
        return MappingProxyType({**self._settings, **now})

    @property
    def space(self) -> Space:
        """What θ is for."""
        out = self.layout.size("o") if self.rows is None else len(self.rows)
        return Space(self.layout.batch, out, self.layout.size("i"), self.theta_of({}), self._room)

    @property
    def theta(self) -> Theta:
        """θ as it is now, and the settings."""
        return self.theta_of({name: getattr(self, name) for name in self.tensors})

    def theta_of(self, tensors: dict[str, Any]) -> Theta:
        """These in the place of its own tensors."""
        return Theta(**self._settings, **tensors)

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
        return A, B, self._multiplier, self.rows[0] if self.rows else 0, drop if drop.p else None

    @property
    def rank(self) -> int:
        """Of its factors; KeyError for a kind that has none."""
        return self._settings["rank"]

    @property
    def width(self) -> int:
        """The rank of its factors: more than its own for a kind that computes wider ones."""
        return self.kind.width * self.room

    @property
    def room(self) -> int:
        """The ranks that there is room for: those behind its own are zeros."""
        return self.rank if self._room is None else self._room

    def shapes(self, rank: int) -> dict[str, tuple[int, ...]]:
        """Of the tensors of θ, for a rank that there is room for; for 0 of a kind that has none."""
        space = replace(self.space, room=rank or None)
        return {name: tuple(shape) for name, shape in self.kind.shapes(space).items()}

    @torch.no_grad()
    def put(self, theta: Mapping[str, torch.Tensor]) -> None:
        """Write numbers into the parameters: zeros behind their ranks."""
        for name, numbers in theta.items():
            parameter = self.owner(name).get_parameter(name)
            if parameter.shape != numbers.shape:
                parameter.zero_()
            parameter[tuple(map(slice, numbers.shape))].copy_(numbers)

    def fitting(self) -> Adapter:
        """Itself, or the same without the room behind its ranks, for files.

        Raises:
            AdapterError: there are numbers in that room.
        """
        if self._room is None or self._room == self.rank:
            return self
        dtype, device = self.dtype, self.device
        settings = {key: value for key, value in self.settings.items() if key in self.kind.settings}
        own = Adapter(
            self.layout, kind=self.kind, rows=self.rows, name=self.name, role=self.role, dtype=dtype, device=device,
            **settings,
        )  # fmt: skip
        for name, parameter in self.named_parameters():
            rest, mine = parameter.detach().clone(), own.get_parameter(name)
            corner = tuple(map(slice, mine.shape))
            own.put({name: rest[corner]})
            rest[corner] = 0
            if bool(rest.any()):
                reason = f"{name} has numbers behind its rank of {self.rank}, in the room for {self._room}"
                raise AdapterError(reason, place=f"adapter {self.name!r}", remedy="write zeros there, or load it again")
        own.change(realised=self.realised, read_outside=self.read_outside)
        return own

    @property
    def alpha(self) -> float:
        """The scale times rank (times its root, for rsLoRA)."""
        alpha = self._settings["alpha"]
        return float(self.rank if alpha is None else alpha)

    @alpha.setter
    def alpha(self, value: float) -> None:
        self._set("alpha", value, 1)

    @property
    def drops(self) -> bool:
        """Its rule had a dropout: branches call it, whatever p is now."""
        return not isinstance(self.dropout, NoDropout)

    @property
    def scaling(self) -> str:
        return self._settings.get("scaling", "standard")

    @property
    def scale(self) -> float:
        """The s of s·B·A, by which it was trained. Setting it sets `alpha`, which is what is kept and saved."""
        return self._scale

    @scale.setter
    def scale(self, value: float) -> None:
        self._set("scale", value, math.sqrt(self.rank) if self.scaling == "rslora" else self._settings.get("rank", 0))

    @property
    def strength(self) -> float:
        """What δ is multiplied with, whatever the kind: W + strength·δ. `lora_fx.activate` gives it; 1 otherwise."""
        return self._strength

    @property
    def multiplier(self) -> Any:
        """What the forward multiplies with now: B·A with strength · scale, a δ that has no factors with the strength.

        Where Dynamo compiles it is a tensor, so that another number is no other program.
        """
        if is_dynamo_compiling() and not is_exporting():
            return self._live[0]
        if is_fx_symbolic_tracing():  # as when a GraphModule is unpickled: its graph goes on reading it
            first = getattr(self, next(iter(self._parameters)))
            if type(first) is fx.Proxy:
                path = str(first.node.target).rpartition(".")[0]
                return first.tracer.create_proxy("get_attr", f"{path}.multiplier", (), {})
        return self._multiplier

    def _set(self, what: str, value: float, by: float) -> None:
        place = f"{what} of adapter {self.name!r}"
        if "alpha" not in self._settings or "rank" not in self._settings:
            raise AdapterError(f"the kind {self.kind.name!r} has none", place=place, remedy="change its θ")
        if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value * by):
            raise AdapterError(f"{value!r} is no finite number", place=place, remedy="set one")
        self.adjust(alpha=float(value * by))

    @property
    def dtype(self) -> torch.dtype:
        return self._first.dtype

    @property
    def device(self) -> torch.device:
        return self._first.device

    @property
    def _first(self) -> nn.Parameter:
        # Not through the attribute: while a module is traced, reading a parameter gives a proxy.
        first = next(iter(self._parameters.values()))
        assert first is not None
        return first

    def low_rank(self, tensors: dict[str, Any] | None = None, index: Any = None, scale: Any = None) -> LowRank:
        """Its delta as a value, of a kind that has factors: of θ as it is now, or of these in its place.

        Args:
            scale: what is to be multiplied with; None for what it is now, the strength in it.
        """
        assert self.kind.factors is not None, self.kind.name
        if self.kind.factors is own_factors:  # without the settings, which Dynamo would take for a part of the program
            A, B = (self.A, self.B) if tensors is None else (tensors["A"], tensors["B"])
        else:
            A, B = self.kind.factors(self.theta if tensors is None else self.theta_of(tensors))
        index = self._buffers.get("index") if tensors is None else index
        return LowRank(self.layout, A, B, self.multiplier if scale is None else scale, self.width, self.rows, index)

    def exact(self) -> LowRank:
        """The same for a fold: factors that are computed, and are no tensors of θ themselves, in float64."""
        plain = self.low_rank()
        if all(any(factor is p for p in self._parameters.values()) for factor in (plain.A, plain.B)):
            return plain
        wide = {name: p.detach().to(torch.float64) for name, p in self.named_parameters()}
        return self.low_rank(wide, self._buffers.get("index"))

    def value(self) -> LowRank | Dense | Around:
        """Its delta as a value; of what is none, what it does to the result of a use."""
        if self.kind.low_rank:
            return self.low_rank()
        theta = self.theta
        if not self.kind.is_delta:
            return self.around(theta)
        return Dense(self.layout, partial(self.delta, theta=theta), theta)

    def around(self, theta: Theta) -> Around:
        """What a kind that is no delta does with this θ."""
        assert isinstance(self.kind, ActivationRewrite), self.kind.name
        return Around(self.kind, self.layout, self.space, theta)

    @torch.no_grad()
    def start(self, weight: torch.Tensor, init: Any = "kaiming") -> None:
        """Fill θ so that the adapted weight is W, bit for bit."""
        weight = weight.detach()
        matrix = self._part(weight) if self.kind.low_rank else self.matrix(weight)
        theta = Theta(**vars(self.theta), init=init)
        for name in self._owners:  # it has started
            setattr(theta, name, getattr(theta, name).clone())
        self.kind.start(theta, matrix)

    def delta(self, weight: Any = None, theta: Theta | None = None) -> Any:
        """strength · δ(W, θ) in the weight's own shape and θ's dtype; a low-rank one asks for no W."""
        if self.kind.low_rank:
            return self.low_rank(
                None if theta is None else {name: getattr(theta, name) for name in self._parameters}
            ).delta()
        if not self.kind.is_delta:
            reason = f"the kind {self.kind.name!r} has no δ: {self.kind.why}"
            raise AdapterError(
                reason, place=f"adapter {self.name!r}", remedy="call the model: it acts on its activations"
            )
        assert self.kind.delta is not None
        own = self.kind.delta(self.matrix(weight), self.theta if theta is None else theta)
        return self.layout.to_weight(times(self.multiplier, self.embedded(own)))

    forward = delta

    def matrix(self, weight: Any) -> Any:
        """What it adapts of the weight, as its kind sees it: (batch…, out, in), in θ's dtype."""
        return self._part(weight).to(self.dtype if weight.dtype != torch.float64 else weight.dtype)

    def _part(self, weight: Any) -> Any:
        """The same in the weight's own dtype."""
        matrix = self.layout.to_matrix(weight)
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
        own = f"rank={self.rank}, scale={self.scale:g}" if {"rank", "alpha"} <= self._settings.keys() else ""
        kind = "" if self.kind.name == "lora" else f"{self.kind.name}{', ' if own else ''}"
        own += "" if self._room is None else f", room for {self._room}"
        strength = "" if self.strength == 1 else f", strength={self.strength:g}"
        return f"{kind}{own}{strength}{part}"


class SharingAdapter(Adapter):
    """One that has some of its θ in common with others, and finds it there: apart, since a look costs each call."""

    def __getattr__(self, name: str) -> Any:
        owners = self.__dict__.get("_owners", {})
        if name not in owners:
            return super().__getattr__(name)
        shared = getattr(owners[name], name)
        if not is_dynamo_compiling() and is_shard(shared) and not any(map(is_shard, self._parameters.values())):
            raise AdapterError(
                f"{name} is sharded: it belongs to another site's adapter, whose own block gathers it",
                place=f"adapter {self.name!r} of the kind {self.kind.name!r}",
                remedy="shard the model as a whole, fully_shard(model) alone; or give each block's sites a name of "
                "their own",
            )
        return shared
