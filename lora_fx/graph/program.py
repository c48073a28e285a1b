"""The program: every weight storage of a captured model, its names, its uses, and what could not be seen.

A weight is what one reaches from a matmul operand by walking back over movement ops to a parameter. Everything is keyed
by storage, never by name: tied and aliased parameters are one weight with several names.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn

from lora_fx.changes import in_turn
from lora_fx.graph import layout
from lora_fx.graph.capture import MODULE, Capture, capture_graph
from lora_fx.graph.forms import DENSE_OPS, FORMS, Call, find, op_name
from lora_fx.graph.layout import Layout
from lora_fx.graph.nodes import first_operand, shape_of
from lora_fx.graph.places import Stays, in_memory, is_parted, is_plain
from lora_fx.graph.views import View, move


@dataclass(eq=False)
class Use:
    """One node of the captured graph that reads a weight."""

    weight: Weight
    node: fx.Node
    view: View
    module: str
    """Path of the module whose forward executes it."""
    call: Call | None = None
    """How it multiplies; None where only the dense W + s·B·A serves, or where it does not multiply."""
    multiplies: bool = True

    @staticmethod
    def unseen(weight: Weight, module: str, call: Call) -> Use:
        """One that no example input has shown: what a module's type or a file says of the weight."""
        return Use(weight, fx.Graph().placeholder("unseen"), View.of(weight.shape), module, call)

    @property
    def seen(self) -> bool:
        """A node of the captured graph is this use."""
        return self.node.op != "placeholder"

    @property
    def form(self) -> str:
        return self.call.form.name if self.call else op_name(self.node.target)

    @property
    def rounding(self) -> float:
        """One rounding step, relative, of the weight as this use reads it: models cast weights, up and down."""
        operand = self.call.weight if self.call and self.call.weight is not None else None
        dtype = operand.meta["val"].dtype if operand is not None else self.weight.parameter.dtype
        return torch.finfo(dtype).eps / 2 if dtype.is_floating_point else 0.0

    @property
    def x(self) -> fx.Node | None:
        """The node of the activation operand."""
        return self.call.x if self.call else None


@dataclass(eq=False)
class Weight:
    """One parameter storage with two or more dimensions, under all its names."""

    names: tuple[str, ...]
    parameter: nn.Parameter
    uses: list[Use] = field(default_factory=list)
    problem: str = ""
    """Why it cannot be adapted; empty where it can."""

    @property
    def name(self) -> str:
        return self.names[0]

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.parameter.shape)

    @property
    def layout(self) -> Layout:
        for use in self.uses:
            if use.call and (found := layout.infer(self.shape, use.view, use.call.sides)):
                return found
        return layout.default(self.shape)

    @property
    def multiplied(self) -> bool:
        return any(use.multiplies for use in self.uses)

    def __repr__(self) -> str:
        return f"Weight({' = '.join(self.names)}, {self.shape}, {len(self.uses)} uses)"


@dataclass(eq=False)
class Program:
    """What a model does with its weights on the example inputs: for reading only, never run for training."""

    model: nn.Module
    capture: Capture | None
    """None without example inputs: then only module types and parameters are known."""
    weights: tuple[Weight, ...]

    @property
    def graph(self) -> fx.Graph:
        """The concrete ATen-level graph of the whole model."""
        assert self.capture is not None
        return self.capture.graph

    @property
    def uses(self) -> Iterator[Use]:
        for weight in self.weights:
            yield from weight.uses

    @property
    def unseen(self) -> tuple[Weight, ...]:
        """Weights of two or more dimensions that the example inputs did not reach."""
        return tuple(w for w in self.weights if not w.uses)

    def rounding(self) -> dict[int, float]:
        """Storage → the coarsest rounding step of its uses."""
        seen = (w for w in self.weights if w.uses)
        return {storage_of(w.parameter): max(use.rounding for use in w.uses) for w in seen}

    def weight(self, name: str) -> Weight:
        return next(w for w in self.weights if name in w.names)

    def __str__(self) -> str:
        lines = []
        for w in self.weights:
            uses = ", ".join(f"{u.form} in {u.module or 'the model'}" for u in w.uses) or "unseen"
            lines.append(f"{' = '.join(w.names)}  {tuple(w.shape)}  {w.problem or uses}")
        return "\n".join(lines)


@in_turn()
def capture(model: nn.Module, example_inputs: Any = None) -> Program:
    """The program of `model` on these inputs: its `torch.fx` graph (`.graph`) and every weight with its uses.

    Args:
        example_inputs: a tensor, a tuple of positional or a dict of keyword inputs; None asks the model for its own.

    Raises:
        CaptureError: the model rejects the inputs, is scripted, or returns no tensor.
    """
    captured = capture_graph(model, example_inputs)
    return Program(model, captured, _Reader(model, captured).weights())


def storage_of(tensor: torch.Tensor) -> int:
    """Equal for tensors of one storage, on every device, `meta` too. What has none (sparse, or inside of a `vmap`) is
    one with itself alone."""
    try:
        return tensor.untyped_storage()._cdata
    except RuntimeError:
        return id(tensor)


def storage_key(tensor: torch.Tensor) -> tuple:
    """Equal for tensors that are the same elements of the same storage."""
    storage = storage_of(tensor)
    if storage == id(tensor):
        return (storage,)
    return storage, tensor.storage_offset(), tuple(tensor.shape), tensor.stride(), tensor.dtype


def find_weights(model: nn.Module) -> dict[tuple, Weight]:
    """Every parameter of two or more dimensions by storage, with all names, before anything is known of its uses. One
    that accelerate has put away under several names may have several storages."""
    found: dict[tuple, Weight] = {}
    kept: dict[tuple, Weight] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        path, _, attribute = name.rpartition(".")
        owner = model.get_submodule(path)
        if parameter.ndim < 2 or isinstance(owner, Beside):
            continue
        key = storage_key(parameter)
        if key not in found:
            own = in_memory(owner, attribute)
            made = Weight((), parameter, problem=_unadaptable(parameter))
            if is_parted(owner, attribute):
                made.problem = made.problem or "is tied to another one, and accelerate has parted the two on disk"
            found[key] = made if own is None else kept.setdefault(storage_key(own), made)
        found[key].names += (name,)
    _mark_overlaps(found)
    return found


class Beside(Stays):
    """Parameters that stand beside a weight of the model, and are none of its own: an adapter's."""


def _unadaptable(parameter: nn.Parameter) -> str:
    if parameter.layout is not torch.strided:
        return f"is stored as {parameter.layout}: only strided weights can be adapted"
    if not is_plain(parameter):
        kind = type(parameter)
        return f"is a {kind.__module__}.{kind.__qualname__}, which is more than its numbers: no sum with a delta is one"
    if parameter.is_complex():
        return f"is complex ({parameter.dtype}): deltas are real"
    if not parameter.is_floating_point() or parameter.dtype.itemsize < 2:
        return f"is quantised ({parameter.dtype}): a delta cannot be folded into it without loss"
    if not parameter.numel():
        return f"has no elements: its shape is {tuple(parameter.shape)}"
    if any(size > 1 and stride == 0 for size, stride in zip(parameter.shape, parameter.stride(), strict=True)):
        return "is expanded: several of its elements are one number in memory"
    return ""


def _mark_overlaps(found: dict[tuple, Weight]) -> None:
    by_storage: dict[int, list[Weight]] = {}
    for key, weight in found.items():
        by_storage.setdefault(key[0], []).append(weight)
    for group in by_storage.values():
        for weight in group:
            others = [w.name for w in group if w is not weight and _overlap(w.parameter, weight.parameter)]
            if others:
                weight.problem = weight.problem or f"shares a part of its storage with {', '.join(others)}"


def _overlap(a: torch.Tensor, b: torch.Tensor) -> bool:
    spans = []
    for t in (a, b):
        last = sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True))
        spans.append((t.storage_offset(), t.storage_offset() + last))
    return spans[0][0] <= spans[1][1] and spans[1][0] <= spans[0][1]


@dataclass(frozen=True)
class _Seen:
    """What a node gives of a weight."""

    weight: Weight
    view: View


class _Reader:
    """One walk over the captured graph: views of weights are followed, matmuls become uses."""

    def __init__(self, model: nn.Module, captured: Capture) -> None:
        self.graph = captured.graph
        self.found = find_weights(model)
        self.views: dict[fx.Node, _Seen] = {}
        self.tuples: dict[fx.Node, tuple[_Seen, ...]] = {}
        self.computed: dict[fx.Node, frozenset[Weight]] = {}  # arithmetic of parameters alone → those
        self.constant: set[fx.Node] = set(captured.tensors)
        for node, tensor in captured.tensors.items():
            weight = self.found.get(storage_key(tensor))
            if weight is not None:
                self.views[node] = _Seen(weight, View.of(weight.shape))

    def weights(self) -> tuple[Weight, ...]:
        for node in self.graph.nodes:
            if node.op == "call_function":
                self._read(node, op_name(node.target))
        return tuple(dict.fromkeys(self.found.values()))

    def _ndim(self, operand: Any) -> int | None:
        return self.views[operand].view.ndim if isinstance(operand, fx.Node) and operand in self.views else None

    def _read(self, node: fx.Node, name: str) -> None:
        first = first_operand(node)
        if first in self.tuples and name == "getitem":
            index: Any = node.args[1]
            self.views[node] = self.tuples[first][index]
        elif first not in self.views or not self._move(node, name, self.views[first]):
            self._multiply_or_read(node, name)

    def _move(self, node: fx.Node, name: str, seen: _Seen) -> bool:
        moved = move(name, seen.view, node.args[1:], dict(node.kwargs)) or self._gather(node, name, seen)
        if isinstance(moved, tuple):
            self.tuples[node] = tuple(_Seen(seen.weight, view) for view in moved)
        elif moved is not None:
            self.views[node] = _Seen(seen.weight, moved)
        return moved is not None

    def _gather(self, node: fx.Node, name: str, seen: _Seen) -> View | None:
        """`W[indices]` of a weight with three or more axes picks experts; of a 2-D table it makes an activation."""
        args: Any = node.args  # fx types each as all that it could ever be
        view = seen.view
        if view != View.of(seen.weight.shape) or view.ndim < 3:
            return None
        if name == "index" and len(args[1]) == 1:
            picked = shape_of(args[1][0])
        elif name == "index_select" and args[1] == 0:
            picked = shape_of(args[2])
        else:
            return None
        return View((*picked, *view.shape[1:]), (*[0] * len(picked), *view.strides[1:]))

    def _multiply_or_read(self, node: fx.Node, name: str) -> None:
        read = node.all_input_nodes
        seen = [n for n in read if n in self.views]
        computed = [n for n in read if n in self.computed]
        constant = all(n in self.constant or n in self.computed or n in self.views for n in read)
        if not seen and not computed:
            if read and constant:
                self.constant.add(node)
            return
        multiplies = name in DENSE_OPS or name in FORMS or name.startswith("conv")
        if computed and not constant and multiplies:
            for weight, op in ((w, op_name(n.target)) for n in computed for w in self.computed[n]):
                weight.problem = weight.problem or f"is computed before it multiplies (by {op}, as weight_norm does)"
        call = find(node.target, node.args, dict(node.kwargs), self._ndim)
        if not constant or call is not None:
            self._add(node, seen, call, multiplies=name in DENSE_OPS)
            return
        sources = frozenset(self.views[n].weight for n in seen).union(*(self.computed[n] for n in computed))
        self.computed[node] = sources
        if not any(u.node is node for w in sources for u in w.uses):
            self._add(node, seen, None, multiplies=False)

    def _add(self, node: fx.Node, seen: list[fx.Node], call: Call | None, multiplies: bool) -> None:
        for n in seen:
            weight, view = self.views[n].weight, self.views[n].view
            own = call if call is not None and call.weight is n else None  # it may be an addmm's other summand too
            does = own is not None or (multiplies and call is None)
            weight.uses.append(Use(weight, node, view, node.meta.get(MODULE, ""), own, does))
