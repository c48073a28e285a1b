"""A low-rank adapter of one weight, and the weight as adapted code reads it.

    W  →  W + scale · B·A        A: (…, rank, in), B: (…, out, rank)

`Adapter` holds the factors. `AdaptedWeight` is what a rewritten module reads in place of the parameter: movement ops
move it, matmuls of `graph.forms` take the parallel branch, any other op gets the dense W + scale · B·A. It holds
tensors when a module runs and `torch.fx` proxies when a module is rewritten: the algebra is written once, here.
"""

from __future__ import annotations

import math
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from lora_fx.deltas import schedules
from lora_fx.deltas.low_rank import LowRank
from lora_fx.deltas.realisation import Realisation
from lora_fx.errors import LoraFxError
from lora_fx.graph.forms import FORMS, Call, find, op_name
from lora_fx.graph.layout import Layout, Placement, place
from lora_fx.graph.program import Beside
from lora_fx.graph.views import CASTS, View, move


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
        if rows is not None and not _is_range(rows):
            index = torch.tensor(rows, dtype=torch.long, device=device)
            self.register_buffer("index", index, persistent=False)

    @property
    def scale(self) -> float:
        return self.alpha / (math.sqrt(self.rank) if self.scaling == "rslora" else self.rank)

    @property
    def dtype(self) -> torch.dtype:
        # Not through `self.A`: while a module is traced, reading a parameter gives a proxy.
        return self._parameters["A"].dtype  # type: ignore[union-attr]

    def low_rank(self) -> LowRank:
        """Its delta as a value, of the factors as they are now."""
        index = self._buffers.get("index")
        return LowRank(self.layout, self.A, self.B, self.scale, self.rank, self.rows, index)

    def whole(self, B: Any, index: Any = None) -> Any:
        """B for every output feature: zero rows for the features that are no part of the site."""
        if self.rows is None:
            return B
        out = self.layout.size("o")
        if _is_range(self.rows):
            return F.pad(B, (0, 0, self.rows[0], out - self.rows[-1] - 1))
        zeros = B.new_zeros((*self.layout.batch, out, self.rank))
        return zeros.index_copy(len(self.layout.batch), self.index if index is None else index, B)

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
        return self.layout.delta(self.A, self.whole(self.B)) * self.scale

    def extra_repr(self) -> str:
        part = f", {self.role}: {len(self.rows)} of {self.layout.size('o')} features" if self.rows else ""
        return f"rank={self.rank}, scale={self.scale:g}{part}"


def _is_range(rows: tuple[int, ...]) -> bool:
    return rows[-1] - rows[0] + 1 == len(rows)


@dataclass(frozen=True)
class Factors:
    """One adapter as a use sees it: tensors or proxies."""

    adapter: Adapter
    A: Any
    own: Any
    """B as the adapter holds it, of its own rows."""
    dropout: Callable[[Any], Any] | None
    """None where nothing is dropped."""
    index: Any = None
    """The rows, where they are no range."""

    @property
    def B(self) -> Any:
        """B of all rows."""
        return self.adapter.whole(self.own, self.index)


class AdaptedWeight:
    """A weight with branches, or a view of one. Any torch function on it means the same on W + Σ scale · B·A.

    Not a `Tensor`: code that would silently take it for the plain weight fails instead.
    """

    def __init__(
        self,
        base: Any,
        view: View,
        factors: Sequence[Factors],
        root: Any,
        chain: tuple[Callable[[Any], Any], ...] = (),
        cast: bool = False,
    ) -> None:
        self.base, self.window, self.factors, self.root, self.chain = base, view, tuple(factors), root, chain
        self.cast = cast
        """The factors are kept in another dtype than the weight: each use casts them."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return dispatch(func, args, kwargs or {})

    def dense(self) -> Any:
        """W + Σ scale · B·A as a plain tensor, differentiable in A and B."""
        delta = None
        for f in self.factors:
            _refuse_dropout(f)
            own = f.adapter.layout.delta(f.A, f.B) * f.adapter.scale
            delta = own if delta is None else delta + own
        if self.cast:
            delta = delta.to(self.root.dtype)
        weight = self.root + delta
        for step in self.chain:
            weight = step(weight)
        return weight

    def moved(self, base: Any, view: View, step: Callable[[Any], Any], detach: bool, cast: bool) -> AdaptedWeight:
        """A view or a copy of it: the same factors, seen through `view`."""
        factors = self.factors
        if detach:
            factors = tuple(replace(f, A=f.A.detach(), own=f.own.detach()) for f in factors)
        return AdaptedWeight(base, view, factors, self.root, (*self.chain, step), self.cast or cast)

    def placements(self, call: Call) -> list[Placement] | None:
        """Where this use reads each adapter's factors; None where it can only be dense."""
        placed = place.__wrapped__ if torch.compiler.is_compiling() else place  # Dynamo warns of caches
        found = [placed(f.adapter.layout, self.window, call.sides) for f in self.factors]
        return None if any(p is None for p in found) else found  # type: ignore[return-value]

    def branch(self, call: Call, factors: Factors, placement: Placement) -> Any:
        """scale · (x·Aᵀ)·Bᵀ."""
        call.options["rank"] = factors.adapter.rank
        B = factors.B
        A, B = self._cast(placement.down(factors.A, B), placement.up(factors.A, B))
        x, drop = call.x, factors.dropout
        if drop is not None and not call.form.looks_up:
            x = drop(x)
        z = call.form.down(call, x, A)
        if drop is not None and call.form.looks_up:
            z = z * drop(torch.ones_like(z[..., :1]))
        if factors.adapter.scale != 1:
            z = z * factors.adapter.scale
        return call.form.up(call, z, B)

    def _cast(self, *factors: Any) -> tuple[Any, ...]:
        return tuple(f.to(self.base.dtype) for f in factors) if self.cast else factors

    @property
    def schedule(self) -> str:
        """Of all its branches."""
        found = {f.adapter.schedule for f in self.factors}
        return found.pop() if len(found) == 1 else schedules.AUTO

    def scheduled(self, call: Call, placements: Sequence[Placement]) -> Any:
        """The whole matmul with its branches, where it is one that can be scheduled; None elsewhere."""
        op, bias = schedulable(call)
        traced = isinstance(self.base, fx.Proxy)
        plain = (schedules.AUTO, schedules.BRANCH) if traced and self.base.tracer.plain else (schedules.BRANCH,)
        if not op or self.schedule in plain:
            return None
        terms = []
        for f, placement in zip(self.factors, placements, strict=True):
            rows = f.adapter.rows
            if placement.is_whole and rows is not None and _is_range(rows):
                (A, B), first = self._cast(f.A, f.own), rows[0]
            else:
                whole, first = f.B, 0
                A, B = self._cast(placement.down(f.A, whole), placement.up(f.A, whole))
            terms.append((A, B, f.adapter.scale, first, None if f.dropout is None else f.dropout(call.x)))
        arguments = (op, call.x, self.base, bias, tuple(terms), self.schedule)
        if traced:
            return self.base.tracer.create_proxy("call_function", schedules.matmul, arguments, {})
        return schedules.matmul(*arguments)

    # What code asks of a weight without reading its elements.
    @property
    def shape(self) -> torch.Size:
        return torch.Size(self.window.shape)

    def size(self, dim: int | None = None) -> Any:
        return self.shape if dim is None else self.window.shape[dim]

    def dim(self) -> int:
        return self.window.ndim

    def ndimension(self) -> int:
        return self.window.ndim

    @property
    def ndim(self) -> int:
        return self.window.ndim

    def numel(self) -> int:
        return math.prod(self.window.shape)

    nelement = numel

    def __len__(self) -> int:
        return self.window.shape[0]

    def is_floating_point(self) -> bool:
        return True

    def __repr__(self) -> str:
        return f"AdaptedWeight({tuple(self.window.shape)}, {len(self.factors)} adapters)"


_PLAIN = (  # read off the base weight, which has the same
    "dtype", "device", "requires_grad", "is_cuda", "is_cpu", "is_meta", "is_leaf", "is_quantized", "is_sparse",
    "layout", "is_nested", "is_mkldnn", "names", "itemsize",
)  # fmt: skip


def _plain(name: str) -> property:
    return property(lambda self: getattr(self.base, name))


def _method(name: str) -> Callable[..., Any]:
    func = getattr(torch.Tensor, name)

    def method(self: AdaptedWeight, *args: Any, **kwargs: Any) -> Any:
        return dispatch(func, (self, *args), kwargs)

    method.__name__ = name
    return method


def _getter(name: str) -> property:
    getter = getattr(torch.Tensor, name).__get__
    return property(lambda self: dispatch(getter, (self,), {}))


def _fill() -> None:
    """Everything else a tensor can do goes through `dispatch`. (A `__getattr__` would send Dynamo in circles.)"""
    for name in _PLAIN:
        setattr(AdaptedWeight, name, _plain(name))
    skipped = set(dir(object)) | {"__torch_dispatch__", "__deepcopy__", "__reduce_ex__", "__setstate__", "__hash__"}
    for name in dir(torch.Tensor):
        if name in AdaptedWeight.__dict__ or name in skipped:
            continue
        kind = getattr(torch.Tensor, name)
        if callable(kind):
            setattr(AdaptedWeight, name, _method(name))
        elif isinstance(kind, types.GetSetDescriptorType | property):
            setattr(AdaptedWeight, name, _getter(name))


_fill()


def dispatch(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """`func` with each adapted weight among its arguments meaning W + Σ scale · B·A."""
    name = op_name(func)
    if args and isinstance(args[0], AdaptedWeight) and not any(isinstance(a, AdaptedWeight) for a in args[1:]):
        moved = _moved(func, name, args[0], args[1:], kwargs)
        if moved is not None:
            return moved
    if name in COMPOSITE:
        return COMPOSITE[name](*args, **kwargs)
    if name in FORMS:
        out = _multiplied(func, args, kwargs)
        if out is not None:
            return out
    return _call(func, _dense(tuple(args)), {k: _dense(v) for k, v in kwargs.items()})


def _call(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """`func(*args, **kwargs)`, where a proxy may stand in for the tensor that a method of `Tensor` wants."""
    if not isinstance(args[0], fx.Proxy):
        return func(*args, **kwargs)
    if func.__name__ == "__get__":
        return getattr(args[0], func.__self__.__name__)
    if isinstance(func, types.MethodDescriptorType | types.WrapperDescriptorType):
        return getattr(args[0], func.__name__)(*args[1:], **kwargs)
    return func(*args, **kwargs)


def _moved(func: Any, name: str, weight: AdaptedWeight, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    def step(tensor: Any) -> Any:
        return _call(func, (tensor, *args), kwargs)

    view = move(name, weight.window, args, kwargs)
    if view is None:
        return _gathered(func, name, weight, args)
    detach = name in ("detach", "detach_", "data")
    base = step(weight.base)
    if isinstance(view, tuple):
        return tuple(
            weight.moved(base[k], v, lambda t, k=k: step(t)[k], detach, False)  # type: ignore[misc]
            for k, v in enumerate(view)
        )
    return weight.moved(base, view, step, detach, cast=name in CASTS)


def _gathered(func: Any, name: str, weight: AdaptedWeight, args: Sequence[Any]) -> AdaptedWeight | None:
    """`W[indices]` of expert weights picks the experts' own A and B."""
    layouts = [f.adapter.layout for f in weight.factors]
    experts = all(x.sides[0] == "b" and x.sides.count("b") == 1 for x in layouts)
    if name not in ("getitem", "index") or weight.chain or not experts:
        return None
    picked = args[0][0] if isinstance(args[0], list | tuple) and len(args[0]) == 1 else args[0]
    if not isinstance(picked, torch.Tensor) or picked.dtype not in (torch.int64, torch.int32) or picked.ndim > 1:
        return None
    base = _call(func, (weight.base, *args), {})
    shape = tuple(base.shape)
    factors = []
    for f in weight.factors:
        adapter = _Picked(f.adapter, _layout_of(f.adapter.layout, picked))
        factors.append(Factors(adapter, f.A[picked], f.B[picked], f.dropout))  # type: ignore[arg-type]
    return AdaptedWeight(base, View.of(shape), factors, base, (), weight.cast)


def _layout_of(layout: Layout, picked: torch.Tensor) -> Layout:
    """The layout of the picked experts: one expert, or as many as there are indices."""
    first, *rest = layout.axes
    if picked.ndim:
        few, axes = Layout(layout.sides, (len(picked), *layout.shape[1:])), (replace(first, size=len(picked)), *rest)
    else:
        few, axes = Layout(layout.sides[1:], layout.shape[1:]), tuple(rest)
    object.__setattr__(few, "axes", axes)  # a cached_property, whose lock Dynamo cannot enter
    return few


@dataclass(frozen=True)
class _Picked:
    """The adapter of the experts that were picked."""

    source: Adapter
    layout: Layout

    @property
    def rank(self) -> int:
        return self.source.rank

    @property
    def rows(self) -> None:
        return None

    @property
    def schedule(self) -> str:
        return self.source.schedule

    def whole(self, B: Any, index: Any = None) -> Any:
        return B

    @property
    def scale(self) -> float:
        return self.source.scale

    @property
    def training(self) -> bool:
        return self.source.training

    @property
    def name(self) -> str:
        return self.source.name


def _multiplied(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    weights = [a for a in (*args, *kwargs.values()) if isinstance(a, AdaptedWeight)]
    weights += [a for seq in args if isinstance(seq, list | tuple) for a in seq if isinstance(a, AdaptedWeight)]
    if len(weights) != 1:
        return None
    (weight,) = weights
    call = find(func, args, kwargs, lambda operand: weight.window.ndim if operand is weight else None)
    if call is None:
        return None
    placements = weight.placements(call)
    if placements is None:
        return None
    scheduled = weight.scheduled(call, placements)
    if scheduled is not None:
        return scheduled

    def plain(value: Any) -> Any:
        if isinstance(value, list | tuple):
            return type(value)(plain(v) for v in value)
        return weight.base if value is weight else value

    out = _call(func, [plain(a) for a in args], {k: plain(v) for k, v in kwargs.items()})
    for factors, placement in zip(weight.factors, placements, strict=True):
        out = out + weight.branch(call, factors, placement)
    return out


def schedulable(call: Call) -> tuple[str, Any]:
    """The op of `schedules.OPS` that this call is, and its bias."""
    options = call.options
    if call.form.name == "linear":
        return "linear", options.get("bias")
    if call.form.name not in ("matmul", "addmm") or call.sides not in ("io", "bio") or not options.get("right"):
        return "", None
    if any(not isinstance(k, int) or k != 1 for k in (options.get("alpha", 1), options.get("beta", 1))):
        return "", None
    return options["op"], options.get("bias")


def _dense(value: Any) -> Any:
    if isinstance(value, AdaptedWeight):
        return value.dense()
    if isinstance(value, list | tuple):
        items = [_dense(v) for v in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    return value


def _refuse_dropout(factors: Factors) -> None:
    if factors.dropout is not None and factors.adapter.training:
        raise LoraFxError(
            "this use of the weight is no matmul with a branch input, so dropout on the branch has no meaning there",
            place=f"adapter {factors.adapter.name!r}",
            remedy="set dropout=0 in the rule that matches this weight, or exclude the weight",
        )


def _without_override_check(function: Callable[..., Any]) -> Callable[..., Any]:
    """A Python-level torch function as its own body, so that the ops inside it are dispatched one by one."""
    checks = ("has_torch_function", "has_torch_function_unary", "has_torch_function_variadic")
    scope = {**function.__globals__, **{name: (lambda *_: False) for name in checks}}
    copy = types.FunctionType(function.__code__, scope, function.__name__, function.__defaults__, function.__closure__)
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


#: Functions made of others in Python: run their body, rather than hand them a dense weight.
COMPOSITE = {"multi_head_attention_forward": _without_override_check(F.multi_head_attention_forward)}
