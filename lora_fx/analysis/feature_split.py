"""The exact split of a fused weight, with no knowledge of its layout.

The nodes between a use and a target run on random float64 tensors, and the output features of the use with a nonzero
gradient are the ones that reach the target. Equal places in a graph are run once.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import fx
from torch.utils import _pytree as pytree

from lora_fx.graph.capture import Capture
from lora_fx.graph.nodes import ALIASES, PRODUCTS, base_name, call, dim_of, is_float, shape_of, written_by
from lora_fx.graph.program import Use

_FEW_ELEMENTS = 1 << 20  # above it, a run on shorter sequences is tried first
_MOST_ELEMENTS = 1 << 24  # float64 elements that one run may hold: 128 MiB, and as much again for the gradients
_FRESH = frozenset({"empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided"})
_SAME = frozenset({  # what says nothing of which feature depends on which: seen as the identity
    "dropout", "alpha_dropout", "feature_dropout", "masked_fill", "clamp", "clamp_min", "clamp_max", "hardtanh", "relu",
    "layer_norm", "rms_norm", "group_norm", "to", "_to_copy", "type_as", "float", "double", "half", "bfloat16",
})  # fmt: skip


@dataclass(frozen=True)
class Target:
    """The value of `node` as `reader` reads it, after whatever was written into it; or a part (dim, start, length)."""

    reader: fx.Node
    node: fx.Node
    part: tuple[int, int, int] | None = None


class Undecided(Exception):
    """Why a fused weight could not be split, in words."""


class Flow(Protocol):
    """What the splitter asks of the walk over the graph: `lora_fx.analysis.dataflow` answers."""

    capture: Capture
    order: dict[fx.Node, int]
    bit: dict[fx.Node, int]
    root: dict[fx.Node, fx.Node]
    writes: dict[fx.Node, list[fx.Node]]
    visits: int

    def fact(self, node: fx.Node) -> Any: ...

    def writes_between(self, target: fx.Node, reader: fx.Node) -> list[fx.Node]: ...


class Splitter:
    """Runs a few nodes of the graph on small random tensors, and asks gradients what depends on what."""

    def __init__(self, flow: Flow) -> None:
        self.flow = flow
        self.values: dict[fx.Node, Any] = {}  # integers and masks of the real run, as far as they can be recomputed
        self.known: dict[Any, Any] = {}  # structure → result: equal layers are run once
        self.runs = 0

    def features(self, use: Use, target: Target) -> frozenset[int]:
        """The output features of a use (row-major over its out dims) that reach the target.

        Raises:
            Undecided: the nodes between them cannot be run.
        """
        start, region = use.node, self._region(use.node, target)
        assert use.call is not None
        dims = tuple(d % len(shape_of(start)) for d in use.call.out_dims)
        key = ("features", dims, self._structure([start], region, target))
        if key not in self.known:
            self.known[key] = self._features(start, region, target, dims)
        if isinstance(self.known[key], str):
            raise Undecided(self.known[key])
        return self.known[key]

    def key_side(self, product: fx.Node, factors: list[fx.Node], softmax: fx.Node, between: set[fx.Node]) -> int | None:
        """0 or 1: the factor that owns the softmaxed axis, so that a whole row of scores sees more of it than one."""
        mine = {n for n in between if base_name(n) not in PRODUCTS} | {product}
        region = sorted(mine, key=self.flow.order.__getitem__)
        target = Target(softmax, softmax.all_input_nodes[0])
        key = ("side", self._structure(factors, region, target), repr(softmax.args[1:]), repr(softmax.kwargs))
        if key not in self.known:
            self.known[key] = self._key_side(factors, region, target)
        return self.known[key]

    def _region(self, start: fx.Node, target: Target) -> list[fx.Node]:
        """The nodes from the use (not with it) to the target, in order."""
        flow, bit = self.flow, self.flow.bit[start]
        region: set[fx.Node] = set()
        stack = [(target.reader, target.node)]
        while stack:
            reader, read = stack.pop()
            for node in (read, *flow.writes_between(read, reader)):
                if node is start or node in region or not flow.fact(node).frontier & bit:
                    continue
                flow.visits += 1
                region.add(node)
                stack += [(node, n) for n in node.all_input_nodes]
        return sorted(region, key=flow.order.__getitem__)

    def _structure(self, starts: list[fx.Node], region: list[fx.Node], target: Target) -> tuple:
        """Equal for two places in the graph that do the same with tensors of the same shapes."""
        slots: dict[fx.Node, str] = {node: f"%{k}" for k, node in enumerate([*starts, *region])}

        def name(node: fx.Node) -> str:
            value: Any = node.meta.get("val")
            same = isinstance(value, torch.Tensor) and is_float(value)
            return slots.setdefault(node, f"{tuple(value.shape)} {value.dtype}" if same else node.name)

        shapes = tuple(shape_of(node) for node in starts)
        steps = tuple((node.target, repr(fx.node.map_arg((node.args, node.kwargs), name))) for node in region)
        return shapes, steps, name(target.node), target.part

    def _features(self, start: fx.Node, region: list[fx.Node], target: Target, dims: tuple[int, ...]) -> Any:
        if target.node is start:
            region = []
        elif target.node not in region:
            return frozenset()
        problem = ""
        for smaller in self._sizes(start, region, dims):
            try:
                run = _Run(self, [start], region, smaller)
                (gradient,) = run.gradients(target)
            except Undecided as why:
                problem = str(why)
            except Exception as why:  # any op of any model may be in there
                problem = f"the nodes behind it cannot be run alone: {type(why).__name__}: {why}".partition("\n")[0]
            else:
                rest = [d for d in range(gradient.ndim) if d not in dims]
                width = math.prod(gradient.shape[d] for d in dims)
                reached = (gradient != 0).permute(*rest, *dims).reshape(-1, width).any(0)
                return frozenset(reached.nonzero().flatten().tolist())
        return problem or f"that takes {self._elements(start, region) * 8 / 2**30:.1f} GiB: pass shorter example inputs"

    def _elements(self, start: fx.Node, region: list[fx.Node]) -> int:
        made = [node for node in region if base_name(node) not in ALIASES]
        return sum(math.prod(shape_of(node)) for node in (start, *made))

    def _sizes(self, start: fx.Node, region: list[fx.Node], dims: tuple[int, ...]) -> Iterator[dict[int, int]]:
        """What to make smaller: nothing, or the batch and sequence sizes, if no feature axis has the same size."""
        total = self._elements(start, region)
        shape = shape_of(start)
        rest = [n for d, n in enumerate(shape) if d not in dims]
        smaller = {n: 2 for n in rest if n > 2}
        if total > _FEW_ELEMENTS and smaller and not any(shape[d] in smaller for d in dims):
            yield smaller
            flat = math.prod(rest), math.prod(min(n, 2) for n in rest)
            if flat[0] not in shape:
                yield {**smaller, flat[0]: flat[1]}
        if total <= _MOST_ELEMENTS:
            yield {}

    def _key_side(self, factors: list[fx.Node], region: list[fx.Node], target: Target) -> int | None:
        if sum(math.prod(shape_of(node)) for node in region) > _MOST_ELEMENTS:
            return None
        dim = dim_of(target.reader)
        try:
            run = _Run(self, factors, region, {})
            shape = run.values[target.node].shape
            for k in range(4):  # one of these elements may be its row's maximum, which is subtracted from itself
                element = tuple((n // 2 + k) % n for n in shape)
                single, whole = run.count(target, element), run.count(target, element, dim)
                if all(single):
                    # In banded attention the chunks overlap: a query may be there twice, its keys many times.
                    grown = [w / s for w, s in zip(whole, single, strict=True)]
                    return next((k for k in (0, 1) if grown[k] >= 2 * grown[1 - k]), None)
        except Exception:  # any op of any model may be in there
            return None
        return None

    # Values that are not random: integers and masks.

    def value(self, node: fx.Node, depth: int = 0) -> Any:
        """What the node was in the captured run, where parameters, inputs and cheap ops say it; else `Undecided`."""
        if node not in self.values:
            self.values[node] = self._recompute(node, depth)
        if self.values[node] is None:
            raise Undecided("an index that decides it has no value here (a model on the meta device)")
        return self.values[node]

    def _recompute(self, node: fx.Node, depth: int) -> Any:
        """None where it is unknown."""
        tensor = self.flow.capture.tensors.get(node)
        if tensor is not None:
            return None if tensor.is_meta or tensor.numel() > _FEW_ELEMENTS else tensor.detach().cpu().clone()
        written = written_by(node) or self.flow.root.get(node) in self.flow.writes
        if node.op != "call_function" or depth > 50 or written or self.flow.fact(node).frontier:
            return None
        try:
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: self.value(n, depth + 1))
            return call(node, args, {**kwargs, "device": "cpu"} if "device" in kwargs else kwargs)
        except Exception:  # an operand is unknown; and any op of any model may be in there
            return None


class _Run:
    """`region` run once on random float64 tensors, with gradients for the values of `starts`."""

    def __init__(
        self, splitter: Splitter, starts: list[fx.Node], region: list[fx.Node], smaller: dict[int, int]
    ) -> None:
        splitter.runs += 1
        self.splitter, self.smaller = splitter, smaller
        self.random = torch.Generator().manual_seed(0)
        with torch.inference_mode(False), torch.enable_grad():
            self.starts = [self._draw(shape_of(node), torch.float64).requires_grad_() for node in starts]
            # A leaf cannot be written in place, a copy of it can.
            self.values: dict[fx.Node, Any] = {n: leaf * 1 for n, leaf in zip(starts, self.starts, strict=True)}
            for node in region:
                self.values[node] = self._step(node)

    def gradients(self, target: Target, cotangent: torch.Tensor | None = None) -> list[torch.Tensor]:
        """Of the starts, for this cotangent of the target or a random one."""
        out = self.values[target.node]
        if cotangent is None:
            cotangent = torch.randn(out.shape, dtype=out.dtype, device="cpu", generator=self.random)
        if target.part is not None:
            out, cotangent = out.narrow(*target.part), cotangent.narrow(*target.part)
        found = torch.autograd.grad(out, self.starts, cotangent, retain_graph=True, allow_unused=True)
        return [torch.zeros_like(s) if g is None else g for g, s in zip(found, self.starts, strict=True)]

    def count(self, target: Target, place: tuple[int, ...], dim: int | None = None) -> list[int]:
        """How many elements of each start one element of the target depends on, or its whole row along `dim`."""
        cotangent = torch.zeros_like(self.values[target.node])
        row = None if dim is None else dim % cotangent.ndim
        cotangent[tuple(slice(None) if d == row else k for d, k in enumerate(place))] = 1
        return [int((g != 0).sum()) for g in self.gradients(target, cotangent)]

    def _draw(self, shape: Iterable[int], dtype: torch.dtype) -> torch.Tensor:
        dtype = torch.complex128 if dtype.is_complex else torch.float64
        sizes = [self.smaller.get(n, n) for n in shape]
        return torch.randn(sizes, dtype=dtype, device="cpu", generator=self.random)

    def _step(self, node: fx.Node) -> Any:
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), self._input)
        args, kwargs = self._localise(args), self._localise(kwargs)
        name, wanted = base_name(node), [self.smaller.get(n, n) for n in shape_of(node)]
        if name in _FRESH:
            return self._draw(shape_of(node), torch.float64) * 0
        if name in _SAME and isinstance(args[0], torch.Tensor) and is_float(args[0]):
            return args[0] if list(args[0].shape) == wanted else args[0].expand(wanted)
        if name == "where" and len(args) == 3:
            return args[1] + args[2]
        result = pytree.tree_map_only(torch.Tensor, _wide, call(node, args, kwargs))
        if self.smaller and isinstance(result, torch.Tensor) and list(result.shape) != wanted:
            raise Undecided("its parts can only be told apart at full size: pass shorter example inputs")
        return result

    def _localise(self, arg: Any) -> Any:
        """Devices become the CPU, floating dtypes float64, and sizes the smaller ones."""
        if isinstance(arg, torch.device):
            return torch.device("cpu")
        if isinstance(arg, torch.dtype):
            return torch.float64 if arg.is_floating_point else torch.complex128 if arg.is_complex else arg
        if isinstance(arg, dict):
            return {k: self._localise(v) for k, v in arg.items()}
        if isinstance(arg, list):  # sizes come in lists; a single integer may be a dim or an index
            return [self._localise(self.smaller.get(a, a) if type(a) is int else a) for a in arg]
        if isinstance(arg, tuple):
            return tuple(self._localise(a) for a in arg)
        return arg

    def _input(self, node: fx.Node) -> Any:
        if node not in self.values:
            self.values[node] = self._outside(node)
        return self.values[node]

    def _outside(self, node: fx.Node) -> Any:
        value: Any = node.meta.get("val")
        if is_float(value):
            many = isinstance(value, list | tuple)
            drawn = [self._draw(v.shape, v.dtype) if is_float(v) else v for v in (value if many else [value])]
            return drawn if many else drawn[0]
        try:
            return self.splitter.value(node)
        except Undecided:
            if not isinstance(value, torch.Tensor) or not self.splitter.flow.fact(node).live:
                raise
        # Which token goes where is up to the data; which feature goes where never is.
        return torch.zeros([self.smaller.get(n, n) for n in value.shape], dtype=value.dtype, device="cpu")


def _wide(value: torch.Tensor) -> torch.Tensor:
    """In double precision, where it is no integer."""
    return value.to(torch.complex128 if value.dtype.is_complex else torch.float64) if is_float(value) else value
