"""A weight with branches, as adapted code reads it.

`AdaptedWeight` is what a rewritten module reads in place of the parameter: movement ops move it, matmuls of
`graph.forms` take the parallel branch, any other op gets the dense W + Σ δ. It holds tensors when a module runs
and `torch.fx` proxies when a module is rewritten: the algebra is written once, here.
"""

from __future__ import annotations

import math
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache, partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import fx

from lora_fx.deltas import schedules
from lora_fx.deltas.adapter import Adapter, Around, Dense
from lora_fx.deltas.compiled_schedules import ORDINARY
from lora_fx.deltas.kernels import Term, times
from lora_fx.deltas.kinds import Kind
from lora_fx.deltas.low_rank import LowRank
from lora_fx.deltas.rewrites import Using
from lora_fx.errors import LoraFxError
from lora_fx.graph.capture import recording
from lora_fx.graph.dynamo import inlined
from lora_fx.graph.forms import FORMS, Call, Form, find, op_name, without_gradient
from lora_fx.graph.layout import Placement, place
from lora_fx.graph.views import CASTS, View, move


@dataclass(frozen=True)
class Branch:
    """One adapter as a use of its weight sees it."""

    adapter: Adapter
    delta: LowRank | Dense | Around
    """Of tensors, or of proxies; of some experts alone, where those were picked."""
    dropout: Callable[[Any], Any] | None
    """None where the rule had no dropout."""


class AdaptedWeight:
    """A weight with branches, or a view of one. Any torch function on it means the same on W + Σ δ.

    Not a `Tensor`: code that would silently take it for the plain weight fails instead.
    """

    def __init__(
        self,
        base: Any,
        view: View,
        branches: Sequence[Branch],
        root: Any,
        chain: tuple[Callable[[Any], Any], ...] = (),
        cast: bool = False,
    ) -> None:
        self.base, self.window, self.branches, self.root, self.chain = base, view, tuple(branches), root, chain
        self.cast = cast

    adapters: tuple[Adapter, ...] = ()
    """Whose factors are read when it is used, if it is one that a module has read."""

    @classmethod
    def read(cls, parameter: torch.Tensor, adapters: tuple[Adapter, ...]) -> AdaptedWeight:
        """What a module reads in the place of a parameter.

        Made anew each time, so that nothing of it is kept that could be stale, or shared with a copy; and of a few
        references alone, since a call reads it often and asks it little.
        """
        weight = cls.__new__(cls)
        weight.base, weight.root, weight.chain, weight.adapters = parameter, parameter, (), adapters
        return weight

    @cached_property
    def window(self) -> View:
        """What it sees of the parameter."""
        return _whole(self.root.shape)

    @cached_property
    def branches(self) -> tuple[Branch, ...]:
        return tuple(Branch(a, a.value(), a.dropout if a.drops else None) for a in self.adapters)

    @cached_property
    def cast(self) -> bool:
        """The factors are kept in another dtype than the weight: each use casts them."""
        return any(a.dtype != self.root.dtype for a in self.adapters)

    @classmethod
    @inlined
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = _at_once(func, args, kwargs)
        return dispatch(func, args, kwargs) if out is None else out

    def dense(self) -> Any:
        """W + Σ δ as a plain tensor, differentiable in θ."""
        delta: Any = None
        for branch in self.branches:
            if isinstance(branch.delta, Around):
                raise _no_use(branch, "reads it in another way than a product does whose features come last")
            if branch.dropout is not None and branch.adapter.dropout.p and branch.adapter.training:
                raise LoraFxError(
                    "this use is no matmul with a branch input, so dropout on the branch has no meaning there",
                    place=f"adapter {branch.adapter.name!r}",
                    remedy="set dropout=0 in the rule that matches this weight, or exclude the weight",
                )
            own = branch.delta.of(self.root)
            delta = own if delta is None else delta + own
        if self.cast:
            delta = delta.to(self.root.dtype)
        weight = schedules.add(self.root, delta)
        for step in self.chain:
            weight = step(weight)
        return weight

    def moved(self, base: Any, view: View, step: Callable[[Any], Any], detach: bool, cast: bool) -> AdaptedWeight:
        """A view or a copy of it: the same branches, seen through `view`."""
        branches = self.branches
        if detach:
            branches = tuple(replace(branch, delta=branch.delta.detached()) for branch in branches)
        moved = AdaptedWeight(base, view, branches, self.root, (*self.chain, step), self.cast or cast)
        if not detach:
            moved.adapters = self.adapters
        return moved

    def parted(self, call: Call) -> tuple[list[tuple[Branch, Placement]], list[Branch]]:
        """What this use computes beside the matmul, with where it reads the factors; and what only W + δ serves."""
        placed = place.__wrapped__ if torch.compiler.is_compiling() else place  # Dynamo warns of caches
        beside: list[tuple[Branch, Placement]] = []
        inside: list[Branch] = []
        for branch in self.branches:
            assert not isinstance(branch.delta, Around), "those stand around the whole"
            placement = placed(branch.delta.layout, self.window, call.sides)
            if placement is not None and self._stands(branch, call, placement):
                beside.append((branch, placement))
            else:
                inside.append(branch)
        return beside, inside

    def _stands(self, branch: Branch, call: Call, placement: Placement) -> bool:
        """Whether its branch can stand beside this use. Where more than a call is at stake, when a program is captured
        or exported, only low-rank ones do."""
        if isinstance(branch.delta, LowRank):
            return True
        apart = branch.delta.theta is None or recording.on or torch.compiler.is_exporting()
        return not apart and has_product(branch.adapter.kind, call, placement)

    def only(self, branches: Sequence[Branch]) -> AdaptedWeight:
        """With these of its branches."""
        return AdaptedWeight(self.base, self.window, branches, self.root, self.chain, self.cast)

    def branch(self, call: Call, branch: Branch, placement: Placement) -> Any:
        """scale · (x·Aᵀ)·Bᵀ, of a delta that has factors."""
        assert isinstance(branch.delta, LowRank)
        return self.low_rank(call, branch.delta, placement, branch.dropout)

    def kinds_branch(self, call: Call, branch: Branch, placement: Placement, out: Any) -> Any:
        """x·δᵀ as its kind computes it.

        Args:
            out: what the op gives with W alone; None where it was computed with more.
        """
        delta, drop, adapter = branch.delta, branch.dropout, branch.adapter
        assert isinstance(delta, Dense) and adapter.kind.branch is not None and delta.theta is not None
        if drop is not None and not call.form.looks_up:
            call, out = replace(call, x=drop(call.x)), None
        product = Product(self, call, placement, adapter, out)
        own = times(adapter.multiplier, adapter.kind.branch(product, adapter.matrix(self.root), delta.theta))
        return own * drop(torch.ones_like(own[..., :1])) if drop is not None and call.form.looks_up else own

    def low_rank(self, call: Call, delta: LowRank, placement: Placement, drop: Callable[[Any], Any] | None) -> Any:
        """scale · (x·Aᵀ)·Bᵀ."""
        x = call.x
        call = replace(call, options={**call.options, "rank": delta.rank})
        A, B = self._factors(delta, placement)
        if drop is not None and not call.form.looks_up:
            x = drop(x)
        z = call.form.down(call, x, A)
        if drop is not None and call.form.looks_up:
            z = z * drop(torch.ones_like(z[..., :1]))
        return call.form.up(call, delta.scaled(z), B)

    def _factors(self, delta: LowRank, placement: Placement) -> tuple[Any, Any]:
        """A and B as this use multiplies with them."""
        A, B = self._placed(delta, placement)
        return (A.to(self.base.dtype), B.to(self.base.dtype)) if self.cast else (A, B)

    def _placed(self, delta: LowRank, placement: Placement) -> tuple[Any, Any]:
        """The same in the dtype that they are kept in."""
        B = delta.whole
        return placement.down(delta.A, B), placement.up(delta.A, B)

    @property
    def schedule(self) -> str:
        """Of all its branches."""
        found = {adapter.schedule for adapter in self.adapters or [branch.adapter for branch in self.branches]}
        return found.pop() if len(found) == 1 else schedules.AUTO

    def scheduled(self, call: Call, placed: Sequence[tuple[Branch, Placement]]) -> Any:
        """The whole matmul with its branches, where it is one that can be scheduled; None elsewhere."""
        op, bias = schedulable(call)
        (branch, placement), *more = placed
        if op and not more and branch.adapter.kind.matmul is not None:
            return self._alone(op, call.x, bias, branch, placement)
        traced = isinstance(self.base, fx.Proxy)
        plain = (schedules.AUTO, schedules.BRANCH) if traced and self.base.tracer.plain else (schedules.BRANCH,)
        if not op or self.schedule in plain or not all(isinstance(branch.delta, LowRank) for branch, _ in placed):
            return None
        terms = []
        for branch, placement in placed:
            delta, drop = branch.delta, branch.dropout
            assert isinstance(delta, LowRank)
            own = placement.is_whole and delta.is_range
            A, B = (delta.A, delta.B) if own else self._placed(delta, placement)
            first = delta.rows[0] if own and delta.rows else 0
            terms.append(Term(A, B, delta.scale, first, None if drop is None else drop(call.x)))
        return schedules.matmul(op, call.x, self.base, bias, tuple(terms), self.schedule)

    def _alone(self, op: str, x: Any, bias: Any, branch: Branch, placement: Placement) -> Any:
        """The matmul of the one kind that acts on this weight; None where it cannot have it whole."""
        matmul, delta = branch.adapter.kind.matmul, branch.delta
        whole = placement.is_whole and branch.adapter.rows is None and not self.cast
        dropped = branch.dropout is not None and branch.adapter.training
        if matmul is None or isinstance(delta, LowRank) or delta.theta is None or dropped or not whole:
            return None
        if torch.compiler.is_compiling() or branch.adapter.strength != 1:
            return None
        return matmul(op, x, self.base, bias, delta.theta)

    # What code asks of a weight without reading its elements.
    @property
    def shape(self) -> torch.Size:
        return torch.Size(self.window.shape)

    def size(self, dim: int | None = None) -> Any:
        return self.shape if dim is None else self.window.shape[dim]

    @property
    def ndim(self) -> int:
        return self.window.ndim

    def dim(self) -> int:
        return self.window.ndim

    def numel(self) -> int:
        return math.prod(self.window.shape)

    ndimension, nelement = dim, numel

    def __len__(self) -> int:
        return self.window.shape[0]

    def is_floating_point(self) -> bool:
        return True

    def __repr__(self) -> str:
        return f"AdaptedWeight({tuple(self.window.shape)}, {len(self.branches)} adapters)"


_PLAIN = (  # read off the base weight, which has the same
    "dtype", "device", "requires_grad", "is_cuda", "is_cpu", "is_meta", "is_leaf", "is_quantized", "is_sparse",
    "layout", "is_nested", "is_mkldnn", "names", "itemsize",
)  # fmt: skip


def _member(name: str) -> Any:
    if name in _PLAIN:
        return property(lambda self: getattr(self.base, name))
    kind = getattr(torch.Tensor, name)
    if not callable(kind):
        getter = kind.__get__
        return property(inlined(lambda self: dispatch(getter, (self,), {})))

    @inlined
    def method(self: AdaptedWeight, *args: Any, **kwargs: Any) -> Any:
        return dispatch(kind, (self, *args), kwargs)

    method.__name__ = name
    return method


def _fill() -> None:
    """Everything else a tensor can do goes through `dispatch`. (A `__getattr__` would send Dynamo in circles.)"""
    skipped = set(dir(object)) | {"__torch_dispatch__", "__deepcopy__", "__reduce_ex__", "__setstate__", "__hash__"}
    for name in set(dir(torch.Tensor)) - skipped - set(AdaptedWeight.__dict__):
        kind = getattr(torch.Tensor, name)
        if callable(kind) or isinstance(kind, types.GetSetDescriptorType | property):
            setattr(AdaptedWeight, name, _member(name))


_fill()


def dispatch(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """`func` with each adapted weight among its arguments meaning W + Σ δ."""
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
    return _call_with(func, args, kwargs, AdaptedWeight.dense)


class Reading(NamedTuple):
    """What a call that can be scheduled says, whichever tensors it is made with: operands by their positions among the
    values of its arguments."""

    name: str
    form: Form
    op: str
    """One of `kernels.OPS`."""
    sides: str
    x: int
    bias: int | None


#: by function and signature: number of arguments, position and axes of the weight, names of what is given by name
_readings: dict[tuple[Any, ...], Reading | None] = {}


def _at_once(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """A matmul with its branches, read as its like was before; None for what is not known, or out of the ordinary.

    Each line of it is a part of what a call costs.
    """
    values = (*args, *kwargs.values()) if kwargs else args
    at = 0
    for weight in values:
        if type(weight) is AdaptedWeight:
            break
        at += 1
    else:
        return None
    adapters, base = weight.adapters, weight.base
    if not adapters:
        return None
    key = (func, len(args), at, base.dim(), *kwargs) if kwargs else (func, len(args), at, base.dim())
    reading: Any = _readings.get(key, False)
    if reading is False:
        reading = _readings[key] = _read_once(func, args, kwargs, at)
    if reading is None:
        return None
    name, form, op, sides, x, bias = reading
    x = values[x]
    if FORMS.get(name) is not form or type(x) not in ORDINARY:
        return None
    terms = []
    for adapter in adapters:
        term = adapter.term
        if term is None:
            return None
        A, B, scale, first, drop = term
        if weight.chain or adapter.layout.sides != sides:
            placement = place(adapter.layout, weight.window, sides)
            if placement is None or not (placement.is_whole or adapter.rows is None):
                return None
            A, B = placement.down(A, B), placement.up(A, B)
        terms.append((A, B, scale, first, drop and drop(x)))
    schedule = adapters[0].schedule if len(adapters) == 1 else weight.schedule
    return schedules.matmul(op, x, base, None if bias is None else values[bias], terms, schedule)


def _read_once(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], at: int) -> Reading | None:
    """How calls of this signature are read, with the weight at this position; None where more than that decides."""
    name = op_name(func)
    if name not in FORMS or FORMS[name].name not in _SCHEDULED:
        return None
    values = (*args, *kwargs.values())
    stands = [object() for _ in values]  # for the operands of whichever call comes next
    named = dict(zip(kwargs, stands[len(args) :], strict=True))
    axes = values[at].base.dim()
    call = find(func, stands[: len(args)], named, lambda operand: axes if operand is stands[at] else None)
    op, bias = schedulable(call) if call is not None else ("", None)
    if call is None or not op or len(values) != (2 if bias is None else 3):
        return None
    where = None if bias is None else stands.index(bias)
    return Reading(name, call.form, op, call.sides, stands.index(call.x), where)


def _call_with(func: Any, args: Sequence[Any], kwargs: dict[str, Any], how: Callable[[AdaptedWeight], Any]) -> Any:
    return _call(func, [_read(a, how) for a in args], {k: _read(v, how) for k, v in kwargs.items()})


_whole = lru_cache(maxsize=4096)(View.of)


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

    def part(k: int) -> Callable[[Any], Any]:
        return lambda tensor: step(tensor)[k]

    view = move(name, weight.window, args, kwargs)
    if view is None:
        return _gathered(func, name, weight, args)
    detach = name in ("detach", "detach_", "data")
    base = step(weight.base)
    if isinstance(view, tuple):
        return tuple(weight.moved(base[k], v, part(k), detach, False) for k, v in enumerate(view))
    return weight.moved(base, view, step, detach, cast=name in CASTS)


def _gathered(func: Any, name: str, weight: AdaptedWeight, args: Sequence[Any]) -> AdaptedWeight | None:
    """`W[indices]` of expert weights picks the experts' own A and B."""
    layouts = [branch.delta.layout for branch in weight.branches]
    experts = all(x.sides[0] == "b" and x.sides.count("b") == 1 for x in layouts)
    experts = experts and all(isinstance(branch.delta, LowRank) for branch in weight.branches)
    if name not in ("getitem", "index") or weight.chain or not experts:
        return None
    picked = args[0][0] if isinstance(args[0], list | tuple) and len(args[0]) == 1 else args[0]
    if not isinstance(picked, torch.Tensor) or picked.dtype not in (torch.int64, torch.int32) or picked.ndim > 1:
        return None
    base = _call(func, (weight.base, *args), {})
    deltas = [branch.delta.picked(picked) for branch in weight.branches if isinstance(branch.delta, LowRank)]
    branches = [replace(b, delta=own) for b, own in zip(weight.branches, deltas, strict=True)]
    return AdaptedWeight(base, View.of(tuple(base.shape)), branches, base, (), weight.cast)


def _multiplied(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    weights = [a for a in (*args, *kwargs.values()) if isinstance(a, AdaptedWeight)]
    weights += [a for seq in args if isinstance(seq, list | tuple) for a in seq if isinstance(a, AdaptedWeight)]
    if len(weights) != 1:
        return None
    (weight,) = weights
    call = find(func, args, kwargs, lambda operand: weight.window.ndim if operand is weight else None)
    if call is None:
        return None
    around = [branch for branch in weight.branches if isinstance(branch.delta, Around)]
    if around:
        return _rewritten(func, args, kwargs, weight, call, around)
    beside, inside = weight.parted(call)
    if not beside:
        return None
    scheduled = None if inside else weight.scheduled(call, beside)
    if scheduled is not None:
        return scheduled
    plain = weight.only(inside).dense() if inside else weight.base
    out = alone = _call_with(func, args, kwargs, lambda own: plain)
    untrained = call.options.get("untrained")
    for branch, placement in beside:
        if isinstance(branch.delta, LowRank):
            own = weight.branch(call, branch, placement)
        else:
            own = weight.kinds_branch(call, branch, placement, None if inside else alone)
        own = own if untrained is None else without_gradient(own, call.x, untrained)
        out = schedules.add(out, own)
    return out


def _rewritten(
    func: Any, args: Sequence[Any], kwargs: dict[str, Any], weight: AdaptedWeight, call: Call, around: Sequence[Branch]
) -> Any:
    """What the rewrites make of a use, the later ones around the earlier ones: y is what W with its deltas gives."""
    placed = place.__wrapped__ if torch.compiler.is_compiling() else place  # Dynamo warns of caches
    deltas = [branch for branch in weight.branches if branch not in around]
    plain = weight.only(deltas) if deltas else weight.base

    def use(x: Any) -> Any:
        operands = {id(call.x): x, id(weight): plain}
        own = [_exchanged(a, operands) for a in args], {k: _exchanged(v, operands) for k, v in kwargs.items()}
        return dispatch(func, *own) if deltas else _call(func, *own)

    for branch in around:
        if branch.adapter.kind.behind is not None:
            branch.adapter.calls.give(call.x, branch.adapter.layout.size("i"))
    for branch in sorted(around, key=_is_outer):
        own = branch.delta
        assert isinstance(own, Around)
        if why := why_not_around(call, placed(own.layout, weight.window, call.sides)):
            raise _no_use(branch, why)
        theta = own.cast(weight.base.dtype).theta if weight.cast else own.theta
        use = partial(_around, own, use, theta)
    return use(call.x)


def _is_outer(branch: Branch) -> bool:
    """One that hides new ids from the table stands inside of all that want to see them."""
    return branch.adapter.kind.behind is None


def _around(own: Around, use: Callable[[Any], Any], theta: Any, x: Any) -> Any:
    return own.kind.around(Using(x, use, own.space), theta)


def why_not_around(call: Call, placement: Placement | None) -> str:
    """Why nothing can stand around this use; empty where its output is all features of W, in their order and last."""
    if "b" in call.sides:
        return "has a matrix for each expert"
    if call.out_dims != (-1,):
        return "gives an output whose features do not come last"
    if len(call.sides) != 2:
        return "reads it as more than one matrix"
    if placement is None or not placement.is_whole:
        return "reads a part of it, or another way round: its output is not all features of the weight"
    return ""


def _no_use(branch: Branch, why: str) -> LoraFxError:
    adapter = branch.adapter
    return LoraFxError(
        f"the kind {adapter.kind.name!r} rewrites what a use of the weight gives, and this one {why}",
        place=f"adapter {adapter.name!r}",
        remedy="exclude the weight, or adapt it by a kind that is a delta of it",
    )


def has_product(kind: Kind, call: Call, placement: Placement) -> bool:
    """Whether a kind's own branch can stand beside this use: it is one product with one axis of features."""
    known = call.form.name in ("linear", "matmul", "addmm", "conv", "embedding", "einsum")
    plain = call.sides.count("o") == 1 and "b" not in call.sides and len(call.out_dims) == 1
    usual = all(isinstance(v, int) and v == 1 for v in map(call.options.get, ("alpha", "groups")) if v is not None)
    return kind.branch is not None and known and plain and usual and not placement.swapped


@dataclass(frozen=True)
class Product:
    """One use of a weight, as the branch of a kind sees it."""

    weight: AdaptedWeight
    call: Call
    placement: Placement
    adapter: Adapter
    out: Any
    """What the op gives with W alone; None where that is not at hand."""

    @property
    def base(self) -> Any:
        """x·Wᵀ, without a bias: each look at it computes it."""
        call = self.call
        if self.out is None:
            order = [call.sides.index("o"), *(k for k, side in enumerate(call.sides) if side == "i")]
            return call.form.down(call, call.x, self.weight.base.permute(order))
        bias = call.options.get("bias")
        if bias is None:
            return self.out
        beta = call.options.get("beta", 1)
        return self.out - (self._shaped(bias) if call.form.name == "conv" else bias if beta == 1 else beta * bias)

    def low_rank(self, A: Any, B: Any) -> Any:
        """s·(x·Aᵀ)·Bᵀ for factors in canonical axes."""
        scale, rows, index = self.adapter.scale, self.adapter.rows, self.adapter._buffers.get("index")
        delta = LowRank(self.adapter.layout, A, B, scale, A.shape[-2], rows, index)
        return self.weight.low_rank(self.call, delta, self.placement, None)

    def features(self, values: Any) -> Any:
        """Values for each feature, (batch…, out, 1), laid along the op's output; zero for features that are no part."""
        own = self.placement.up(None, self.adapter.embedded(values)).squeeze(-1)
        return self._shaped(own).to(self.weight.base.dtype)

    def _shaped(self, values: Any) -> Any:
        return values.reshape(-1, *[1] * (-self.call.out_dims[0] - 1))


_SCHEDULED = ("linear", "matmul", "addmm")


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


def _exchanged(value: Any, operands: Mapping[int, Any]) -> Any:
    """`value` with these in the places of the operands of those ids."""
    if isinstance(value, list | tuple) and not hasattr(value, "_fields"):
        return type(value)(_exchanged(v, operands) for v in value)
    return operands.get(id(value), value)


def _read(value: Any, how: Callable[[AdaptedWeight], Any]) -> Any:
    """`value` with `how` of every adapted weight in it."""
    if isinstance(value, AdaptedWeight):
        return how(value)
    if isinstance(value, list | tuple):
        items = [_read(v, how) for v in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    return value


def _without_override_check(function: Callable[..., Any]) -> Callable[..., Any]:
    """A Python-level torch function as its own body, so that the ops inside it are dispatched one by one."""
    checks = ("has_torch_function", "has_torch_function_unary", "has_torch_function_variadic")
    scope = {**function.__globals__, **{name: (lambda *_: False) for name in checks}}
    copy = types.FunctionType(function.__code__, scope, function.__name__, function.__defaults__, function.__closure__)
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


#: Functions made of others in Python: run their body, rather than hand them a dense weight.
COMPOSITE = {"multi_head_attention_forward": _without_override_check(F.multi_head_attention_forward)}
