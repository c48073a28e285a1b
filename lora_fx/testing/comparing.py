"""Two models side by side: their bits, classes and graphs, and the first use of a weight at which they differ.

value of a use in one model  ≈  value of the same use in the other
"""

from __future__ import annotations

import copy
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from lora_fx.checks.verification import Report, compare, in_float64, move_weights, relative_error
from lora_fx.deltas.adapter import Adapter
from lora_fx.graph.capture import MODULE, Inputs, capture_graph, no_fast_paths, normalize_inputs, undisturbed
from lora_fx.graph.forms import op_name
from lora_fx.graph.program import Use, capture
from lora_fx.model.classes import unwire, unwired
from lora_fx.model.inventory import base_parameters, inventory
from lora_fx.model.marks import detach, unmark


def bits(model: nn.Module) -> dict[str, torch.Tensor]:
    """Copies of everything in the state_dict."""
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors are the same numbers to the bit: zeros of both signs, NaN and all."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    flat = [t.detach().contiguous().reshape(-1).view(torch.uint8) for t in (a, b)]
    return torch.equal(*flat)


def first_changed(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> str | None:
    """The first name that is missing, new, or not the same bits."""
    for name in dict.fromkeys((*before, *after)):
        if name not in before or name not in after or not same_bits(before[name], after[name]):
            return name
    return None


def classes(model: nn.Module) -> dict[str, type]:
    """path → class. Each copy of a GraphModule has a class of its own: they count as one."""
    return {n: fx.GraphModule if isinstance(m, fx.GraphModule) else type(m) for n, m in model.named_modules()}


def base_of(model: nn.Module) -> nn.Module:
    """A copy without its adapters: the model that they were applied to."""
    base = copy.deepcopy(model)
    unwire(base)
    for place in inventory(base).places:
        detach(place.owner, place.child)
    for module in base.modules():
        unmark(module)
    return base


def as_folded(base: nn.Module, folded: nn.Module) -> nn.Module:
    """The base with the folded model's numbers in it, and a copy for each use that the fold gave one.

    Where data choose the path (routers), other numbers take another one: this is the base on the folded model's path.
    """
    twins: dict[int, nn.Parameter] = {}
    wanted = base_parameters(folded)
    for name, parameter in base_parameters(base).items():
        path, _, attribute = name.rpartition(".")
        if id(wanted[name]) not in twins:
            twins[id(wanted[name])] = nn.Parameter(wanted[name].detach().clone(), parameter.requires_grad)
        base.get_submodule(path)._parameters[attribute] = twins[id(wanted[name])]
    for module in base.modules():
        if isinstance(module, nn.RNNBase):
            module._init_flat_weights()
    return base


def graph_lines(graph: fx.Graph) -> list[str]:
    """A graph as text, one line a node: equal texts are equal graphs."""
    index = {node: f"%{n}" for n, node in enumerate(graph.nodes)}

    def shown(value: Any) -> str:
        return str(fx.node.map_arg(value, index.__getitem__))

    return [
        f"{index[n]} {n.op} {'' if n.op == 'placeholder' else n.target} {shown(n.args)} {shown(n.kwargs)}"
        for n in graph.nodes
    ]


# ── where two models differ first ────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Difference:
    """The first use of a weight at which two models differ by more than rounding explains."""

    weights: tuple[str, ...]
    """The weights that are used there; the names of a tied one joined by ``=``."""
    module: str
    """Path of the module whose forward executes the use; empty for the model itself."""
    form: str
    report: Report

    def __str__(self) -> str:
        r = self.report
        return (
            f"{', '.join(self.weights)}, used by {self.form} in {self.module or 'the model itself'}: "
            f"error {r.error:.3g} against a bound of {r.bound:.3g} (noise floor {r.noise:.3g})"
        )


#: the path of the module, the op, and which one of those in there
_Key = tuple[str, str, int]


def first_difference(before: nn.Module, after: nn.Module, example_inputs: Any = None) -> Difference | None:
    """The first use of a weight, in the order of execution, at which two models differ; None where no use does.

    Both are captured (in eval mode) and run node by node. A use counts with its branches; uses are matched by the
    module that executes them, their op, and their number in there. The bound is that of `lora_fx.verify`, for each use.
    """
    inputs = normalize_inputs(before, example_inputs)
    with unwired(before):
        uses = _uses(before, inputs)
    mine, theirs = _Tape(before, inputs).play(), _Tape(after, inputs).play()
    wide, wide_inputs, _ = in_float64(before, inputs)
    tape = _Tape(wide, wide_inputs)
    exact = tape.play()
    move_weights(wide, max((use.rounding for own in uses.values() for use in own), default=0.0))
    moved = tape.play()
    for key, own in uses.items():
        if not all(key in values for values in (mine, theirs, exact)) or mine[key].shape != theirs[key].shape:
            continue
        a, w = mine[key], exact[key]
        noise = max(relative_error(a, w, w), relative_error(moved[key], w, w))
        report = compare(a, theirs[key], w, noise, a.dtype)
        if not report:
            names = tuple(dict.fromkeys(" = ".join(use.weight.names) for use in own))
            return Difference(names, own[0].module, own[0].form, report)
    return None


def _uses(model: nn.Module, inputs: Inputs) -> dict[_Key, list[Use]]:
    """Each node that uses weights, with its uses: an LSTM reads several in one."""
    program = capture(model, inputs)
    uses: dict[fx.Node, list[Use]] = defaultdict(list)
    for use in program.uses:
        uses[use.node].append(use)
    return {key: uses[node] for key, node in _numbered(program.graph, frozenset()) if node in uses}


def _numbered(graph: fx.Graph, left_out: frozenset[fx.Node]) -> Iterator[tuple[_Key, fx.Node]]:
    counts: Counter[tuple[str, str]] = Counter()
    for node in graph.nodes:
        if node.op == "call_function" and node not in left_out:
            place = node.meta.get(MODULE, ""), op_name(node.target)
            yield (*place, counts[place]), node
            counts[place] += 1


class _Recorder(fx.Interpreter):
    """Runs a graph and keeps the value of every node."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module, garbage_collect_values=False)
        self.values: dict[fx.Node, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        self.values[n] = super().run_node(n)
        return self.values[n]


class _Tape:
    """A captured model, to be run node by node."""

    def __init__(self, model: nn.Module, inputs: Inputs) -> None:
        self.model, self.captured = model, capture_graph(model, inputs)
        self.leaves = [t for t in pytree.tree_leaves((inputs.args, inputs.kwargs)) if isinstance(t, torch.Tensor)]
        own = {id(t) for m in model.modules() if isinstance(m, Adapter) for t in (*m.parameters(), *m.buffers())}
        factors = {node for node, tensor in self.captured.tensors.items() if id(tensor) in own}
        branches, self.last = _branches(self.captured.graph, factors)
        self.numbered = list(_numbered(self.captured.graph, branches))

    def play(self) -> dict[_Key, torch.Tensor]:
        """What every node that is no part of a branch gives, its branches added: floating-point numbers only."""
        state = [*dict(self.model.named_parameters()).values(), *dict(self.model.named_buffers()).values()]
        recorder = _Recorder(self.captured.module)
        with undisturbed(self.model), no_fast_paths(), torch.no_grad():
            torch.manual_seed(0)
            recorder.run(state, self.leaves)
        found = {key: recorder.values[self.last.get(node, node)] for key, node in self.numbered}
        found = {key: v[0] if isinstance(v, tuple | list) and v else v for key, v in found.items()}
        return {key: v for key, v in found.items() if isinstance(v, torch.Tensor) and v.is_floating_point()}


def _branches(graph: fx.Graph, factors: set[fx.Node]) -> tuple[frozenset[fx.Node], dict[fx.Node, fx.Node]]:
    """The nodes that belong to branches, and for each node that has branches the one that adds the last of them."""
    made = set(factors)  # of factors alone: B·A, padded, cast or transposed factors
    tainted = set(factors)
    up: set[fx.Node] = set()
    origin: dict[fx.Node, fx.Node] = {}
    last: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        read = node.all_input_nodes
        if node.op != "call_function" or not any(n in tainted for n in read):
            continue
        tainted.add(node)
        if all(n in made for n in read):
            made.add(node)
            continue
        left, right = (*node.args[:2], None, None)[:2]
        if op_name(node.target) == "add" and right in made | up:
            origin[node] = origin.get(left, left)
            last[origin[node]] = node
        elif any(n in made for n in read):
            up.add(node)
    inside = made | up | set(origin)
    for node in reversed(graph.nodes):  # what lies between a factor and the end of its branch: the scale
        if node in tainted and node.users and all(user in inside for user in node.users) and node not in last:
            inside.add(node)
    return frozenset(inside), last
