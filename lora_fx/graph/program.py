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
from torch.nn.utils import parametrize

from lora_fx.changes import in_turn
from lora_fx.graph import layout
from lora_fx.graph.capture import MODULE, Capture, capture_graph
from lora_fx.graph.forms import DENSE_OPS, FORMS, Call, find, op_name
from lora_fx.graph.layout import Layout
from lora_fx.graph.nodes import base_name, first_operand, looked_into, operands, shape_of, written_by
from lora_fx.graph.places import Stays, in_memory, is_parted, is_plain, storage_of
from lora_fx.graph.views import COPIES, MOVES, View, move


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
    sides: str = ""
    """One of ``b``, ``i``, ``o`` for each axis of the view; empty where nothing tells them."""

    @staticmethod
    def unseen(weight: Weight, module: str, call: Call) -> Use:
        """One that no example input has shown: what a module's type or a file says of the weight."""
        node = fx.Graph().placeholder("unseen")
        return Use(weight, node, View.of(weight.shape), module, call, sides=call.sides)

    @property
    def seen(self) -> bool:
        """A node of the captured graph is this use."""
        return self.node.op != "placeholder"

    @property
    def form(self) -> str:
        return self.call.form.name if self.call else op_name(self.node.target)

    @property
    def rounding(self) -> float:
        """One rounding step, relative, of the weight as this use reads it: models cast weights, up and down, and under
        autocast the op itself casts them, to what it puts out."""
        operand = self.call.weight if self.call and self.call.weight is not None else None
        dtype = operand.meta["val"].dtype if operand is not None else self.weight.parameter.dtype
        made = [value.dtype for value in (self.node.meta.get("val"),) if isinstance(value, torch.Tensor)]
        return max(torch.finfo(d).eps / 2 if d.is_floating_point else 0.0 for d in (dtype, *made))

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
    remedy: str = ""
    """What to do about that, beside leaving it out."""

    @property
    def name(self) -> str:
        return self.names[0]

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.parameter.shape)

    @property
    def layout(self) -> Layout:
        for use in self.uses:
            if use.sides and (found := layout.infer(self.shape, use.view, use.sides)):
                return found
        return layout.default(self.shape)

    @property
    def multiplied(self) -> bool:
        return any(use.multiplies for use in self.uses)

    def refuse(self, problem: str, remedy: str) -> None:
        """It cannot be adapted; the first reason stays."""
        if not self.problem:
            self.problem, self.remedy = problem, remedy

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
            made = Weight((), parameter)
            made.problem, made.remedy = _unadaptable(parameter)
            if getattr(owner, "max_norm", None) is not None and isinstance(owner, nn.Embedding | nn.EmbeddingBag):
                made.refuse("is written to by each lookup, which scales its rows down to max_norm", _LIMITED)
            if is_parted(owner, attribute) and not made.problem:
                made.problem = "is tied to another one, and accelerate has parted the two on disk"
            found[key] = made if own is None else kept.setdefault(storage_key(own), made)
        found[key].names += (name,)
    _mark_overlaps(found)
    return found


#: what to do about a table whose rows are scaled down
_LIMITED = "scale its rows down now, and set max_norm=None"


class Beside(Stays):
    """Parameters that stand beside a weight of the model, and are none of its own: an adapter's."""


def _unadaptable(parameter: nn.Parameter) -> tuple[str, str]:
    """Problem and remedy."""
    if parameter.layout is not torch.strided:
        return f"is stored as {parameter.layout}: only strided weights can be adapted", "make it dense: to_dense()"
    if not is_plain(parameter):
        kind = type(parameter)
        own = f"{kind.__module__}.{kind.__qualname__}"
        return f"is a {own}, which is more than its numbers: no sum with a delta is one", ""
    if parameter.is_complex():
        return f"is complex ({parameter.dtype}): deltas are real", ""
    if not parameter.is_floating_point() or parameter.dtype.itemsize < 2:
        problem = f"is quantised ({parameter.dtype}): a delta cannot be folded into it without loss"
        return problem, "load the model in a floating-point dtype"
    if not parameter.numel():
        return f"has no elements: its shape is {tuple(parameter.shape)}", ""
    if any(size > 1 and stride == 0 for size, stride in zip(parameter.shape, parameter.stride(), strict=True)):
        return "is expanded: several of its elements are one number in memory", "clone it"
    return "", ""


def _mark_overlaps(found: dict[tuple, Weight]) -> None:
    by_storage: dict[int, list[Weight]] = {}
    for key, weight in found.items():
        by_storage.setdefault(key[0], []).append(weight)
    for group in by_storage.values():
        for weight in group:
            others = [w.name for w in group if w is not weight and _overlap(w.parameter, weight.parameter)]
            if others:
                weight.refuse(
                    f"shares a part of its storage with {', '.join(others)}",
                    "give it a storage of its own: a clone of the parameter",
                )


def _overlap(a: torch.Tensor, b: torch.Tensor) -> bool:
    spans = []
    for t in (a, b):
        last = sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True))
        spans.append((t.storage_offset(), t.storage_offset() + last))
    return spans[0][0] <= spans[1][1] and spans[1][0] <= spans[0][1]


def _made_by_torch(model: nn.Module, weight: Weight) -> bool:
    """It is what torch's own tools (weight_norm, spectral_norm, pruning) make the weight of in each forward."""
    for owner in (model.get_submodule(name.rpartition(".")[0]) for name in weight.names):
        hooks = (type(hook).__module__ for hook in owner._forward_pre_hooks.values())
        if isinstance(owner, parametrize.ParametrizationList) or any(h.startswith("torch.nn.utils.") for h in hooks):
            return True
    return False


@dataclass(frozen=True)
class _Seen:
    """What a node gives of a weight."""

    weight: Weight
    view: View | None
    """How the weight's axes lie in it; None where that cannot be told, of what is computed from it."""


class _Reader:
    """One walk over the captured graph: views of weights are followed, matmuls become uses.

    What depends on no input, the result of another use too, is *fixed*. What is computed from weights and fixed values
    alone (a cat, a mask, a standardised weight) and then multiplies is a use of each of them, dense; so is a weight
    that an activation scales along some of its axes, as a style scales the inputs of a convolution. Of a product whose
    operands are both fixed the op says which is the weight, as `linear` does; of a plain matmul each may be one.
    """

    def __init__(self, model: nn.Module, captured: Capture) -> None:
        self.graph, self.tensors, self.replaced = captured.graph, captured.tensors, captured.replaced
        self.found = find_weights(model)
        self.made = {weight for weight in self.found.values() if _made_by_torch(model, weight)}
        self.views: dict[fx.Node, _Seen] = {}
        self.tuples: dict[fx.Node, tuple[_Seen, ...]] = {}
        self.computed: dict[fx.Node, tuple[_Seen, ...]] = {}  # arithmetic of weights alone, or of weights and a scale
        self.assembled: dict[fx.Node, list[Weight]] = {}  # a constant, and the weights that are written into it
        self.fixed: set[fx.Node] = set(captured.tensors)
        for node, tensor in captured.tensors.items():
            weight = self.found.get(storage_key(tensor))
            if weight is not None:
                self.views[node] = _Seen(weight, View.of(weight.shape))

    def weights(self) -> tuple[Weight, ...]:
        self._refuse_written()
        for node in self.graph.nodes:
            if node.op == "call_function":
                if all(n in self.fixed for n in node.all_input_nodes):
                    self.fixed.add(node)
                self._read(node, op_name(node.target))
        return tuple(dict.fromkeys(self.found.values()))

    def _refuse_written(self) -> None:
        """Of what the model changes while it runs, W + δ is another function than W with a branch."""
        by_storage: dict[int, list[Weight]] = {}
        for weight in self.found.values():
            by_storage.setdefault(storage_of(weight.parameter), []).append(weight)
        for node in self.graph.nodes:
            for target in written_by(node):
                root = target
                while (below := looked_into(root)) is not None:
                    root = below
                tensor = self.tensors.get(root)
                for weight in () if tensor is None else by_storage.get(storage_of(tensor), ()):
                    how = f"by {node.target} in {node.meta.get(MODULE, '') or 'the model'}"
                    weight.refuse(f"is written to by the model itself while it runs ({how})", WRITE_ELSEWHERE)
        for parameter in self.replaced:
            for weight in by_storage.get(storage_of(parameter), ()):
                how = "as by weight.data = …"
                weight.refuse(f"is given other numbers by the model itself while it runs ({how})", WRITE_ELSEWHERE)

    def _read(self, node: fx.Node, name: str) -> None:
        self._read_assembled(node, name)
        first = first_operand(node)
        if first in self.tuples and name == "getitem":
            index: Any = node.args[1]
            self.views[node] = self.tuples[first][index]
        elif first not in self.views or not self._move(node, name, self.views[first]):
            self._multiply_or_read(node, name)

    def _move(self, node: fx.Node, name: str, seen: _Seen) -> bool:
        assert seen.view is not None
        moved = move(name, seen.view, node.args[1:], dict(node.kwargs)) or self._gather(
            node, name, seen.weight, seen.view
        )
        if isinstance(moved, tuple):
            self.tuples[node] = tuple(_Seen(seen.weight, view) for view in moved)
        elif moved is not None:
            self.views[node] = _Seen(seen.weight, moved)
        return moved is not None

    def _gather(self, node: fx.Node, name: str, weight: Weight, view: View) -> View | None:
        """`W[indices]` of a weight with three or more axes picks experts; of a 2-D table it makes an activation."""
        args: Any = node.args  # fx types each as all that it could ever be
        if view != View.of(weight.shape) or view.ndim < 3:
            return None
        if name == "index" and len(args[1]) == 1:
            picked = shape_of(args[1][0])
        elif name == "index_select" and args[1] == 0:
            picked = shape_of(args[2])
        else:
            return None
        return View((*picked, *view.shape[1:]), (*[0] * len(picked), *view.strides[1:]))

    def _seen(self, node: fx.Node) -> tuple[_Seen, ...]:
        return (self.views[node],) if node in self.views else self.computed.get(node, ())

    def _multiply_or_read(self, node: fx.Node, name: str) -> None:
        made_of = [n for n in node.all_input_nodes if self._seen(n)]
        if not made_of:
            return
        if _multiplies(name) and not self._times_itself(node, made_of):
            self._multiply(node, made_of)
            return
        for n in made_of:
            if n in self.views:
                self._add(node, self.views[n], None, multiplies=False)
            if name in _BRANCHING:
                for seen in self._seen(n):
                    seen.weight.refuse(
                        f"is read inside of torch's {name}, by a graph of its own, which no adapter reaches",
                        "choose by torch.where, which computes both sides, or by a Python if",
                    )
        if node in self.fixed or self._modulates(node, made_of):
            self.computed[node] = self._sources(node, name, made_of)
        for target in written_by(node):
            if node in self.fixed:
                self._assemble(target, {s.weight for n in made_of if n is not target for s in self._seen(n)})

    def _modulates(self, node: fx.Node, made_of: list[fx.Node]) -> bool:
        """A weight times an activation that is one number along some axis of the weight: what a style does to the
        weight of a convolution. One that has a number for each element is what the weight scales, as a gate does."""
        scales = [n for n in node.all_input_nodes if n not in self.fixed and n not in made_of]
        if len(made_of) != 1 or base_name(node) not in ("mul", "div", *MOVES, *COPIES):
            return False
        if not scales:  # it moves what has been scaled
            return made_of[0] not in self.fixed
        shape = shape_of(made_of[0])
        return any(
            size > 1 and all(_size(n, axis) == 1 for n in scales)
            for axis, size in zip(range(-len(shape), 0), shape, strict=True)
        )

    def _read_assembled(self, node: fx.Node, name: str) -> None:
        made_of = [n for n in node.all_input_nodes if n in self.assembled]
        if made_of and node in self.fixed:
            self.assembled[node] = [weight for n in made_of for weight in self.assembled[n]]
        for n in made_of:
            for weight in self.assembled[n] if self._call(node, n) else ():
                weight.refuse(
                    f"is written into a tensor that multiplies then (by {name})",
                    "make that tensor of it: torch.cat, torch.stack, torch.where, F.pad",
                )

    def _assemble(self, target: fx.Node, weights: set[Weight]) -> None:
        """Weights that are written into a constant: no op gives the whole, so that no branch can stand beside it."""
        below: fx.Node | None = target
        while below is not None:
            self.assembled.setdefault(below, []).extend(weights)
            below = looked_into(below)

    def _times_itself(self, node: fx.Node, made_of: list[fx.Node]) -> bool:
        """One weight alone, W·Wᵀ: it is computed from it, as a norm is."""
        return len({s.weight for n in made_of for s in self._seen(n)}) == 1 < len(made_of) == len(set(operands(node)))

    def _multiply(self, node: fx.Node, made_of: list[fx.Node]) -> None:
        calls = {n: found for n in made_of if (found := self._call(node, n)) is not None}
        if node.kwargs.get("out") is not None:
            for weight in {seen.weight for n in made_of for seen in self._seen(n)}:
                weight.refuse("multiplies into out=…, which torch does not differentiate", "assign the result instead")
        for n in made_of:
            multiplies = n in calls or (not calls and base_name(node) in DENSE_OPS)
            for seen in self._seen(n):
                if n in self.views:
                    self._add(node, seen, calls.get(n), multiplies)
                elif multiplies:
                    self._add_computed(node, n, seen, calls.get(n))

    def _call(self, node: fx.Node, weight: fx.Node) -> Call | None:
        """How the node multiplies where this operand is the weight."""
        found = find(node.target, node.args, dict(node.kwargs), lambda n: len(shape_of(n)) if n is weight else None)
        return found if found is not None and found.weight is weight else None

    def _sources(self, node: fx.Node, name: str, made_of: list[fx.Node]) -> tuple[_Seen, ...]:
        """Of what it is computed; not of what only scales that, as the g of a weight norm does."""
        shape = shape_of(node)
        whole = any(shape_of(n) == shape for n in made_of)
        matrices = [n for n in made_of if not whole or shape_of(n) == shape or sum(k > 1 for k in shape_of(n)) > 1]
        found: dict[Weight, _Seen] = {}
        for n in matrices:
            for seen in self._seen(n):
                found.setdefault(seen.weight, _Seen(seen.weight, _axes(node, name, n, seen.view)))
        return tuple(found.values())

    def _add(self, node: fx.Node, seen: _Seen, call: Call | None, multiplies: bool) -> None:
        weight, view = seen.weight, seen.view
        assert view is not None
        sides = call.sides if call is not None else ""
        weight.uses.append(Use(weight, node, view, node.meta.get(MODULE, ""), call, multiplies, sides))

    def _add_computed(self, node: fx.Node, operand: fx.Node, seen: _Seen, call: Call | None) -> None:
        weight, view = seen.weight, seen.view
        if weight in self.made:
            weight.refuse(
                f"is computed before it multiplies (by {op_name(operand.target)}, as weight_norm does)",
                "make it a plain parameter first: torch.nn.utils.parametrize.remove_parametrizations, "
                "remove_weight_norm, remove_spectral_norm or prune.remove",
            )
        sides = call.sides if call is not None and view is not None else ""
        place = node.meta.get(MODULE, "")
        weight.uses.append(Use(weight, node, view or View.of(weight.shape), place, None, True, sides))


#: what to do about a weight that a forward changes
WRITE_ELSEWHERE = "write to it between forwards, or multiply with what is computed from it: weight.clamp(-1, 1)"

_BRANCHING = frozenset({"cond", "while_loop", "map_impl", "scan"})


def _multiplies(name: str) -> bool:
    """Whether an op may multiply with a weight; an in-place op is called as it calls itself."""
    return name in FORMS or name.removesuffix("_") in DENSE_OPS or name.startswith("conv")


def _axes(node: fx.Node, name: str, operand: fx.Node, view: View | None) -> View | None:
    """How the weight's axes lie in what an op computes from `operand`, where they lie in that as `view` says."""
    if view is None:
        return None
    shape = shape_of(node)
    if name in MOVES or name in COPIES:
        moved = move(name, view, node.args[1:], dict(node.kwargs)) if view.shape == shape_of(operand) else None
        return moved if isinstance(moved, View) else None
    if name == "stack":
        dim: Any = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
        return view.unsqueeze(dim)
    ahead = len(shape) - view.ndim  # axes of what scales it
    kept = ahead >= 0 and shape[ahead:] == shape_of(operand)
    return View((*shape[:ahead], *view.shape), (*[0] * ahead, *view.strides)) if kept or name == "cat" else None


def _size(node: fx.Node, axis: int) -> int:
    """Of an axis counted from the last; 1 where it is broadcast along it."""
    shape = shape_of(node)
    return shape[axis] if -axis <= len(shape) else 1
