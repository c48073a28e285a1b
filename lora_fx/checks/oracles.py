"""What the assertions of `lora_fx.testing` hold a model against, written without the passes and the branch algebra.

folded[k]  =  round(W[k] + Σ s·B·A [k])         in float64 with an error bound, as fractions where that cannot tell
value of a use in one model  ≈  value of the same use in the other

"""

from __future__ import annotations

import copy
import math
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from lora_fx.checks.verification import Report, compare, in_float64, move_weights, relative_error
from lora_fx.deltas.adapter import Adapter
from lora_fx.graph.capture import MODULE, Inputs, capture_graph, no_fast_paths, normalize_inputs, undisturbed
from lora_fx.graph.forms import op_name
from lora_fx.graph.program import Use, capture
from lora_fx.model import wiring

_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
_LETTERS = "abcdefghijklmnopq"  # without r, the rank
_UNIT = 2.0**-53


# ── state ────────────────────────────────────────────────────────────────────────────────────────────────────────────


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


def parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Every parameter under each of its names, without those of adapters."""
    inside = [f"{path}." if path else "" for path, m in model.named_modules(remove_duplicate=False) if _ours(m)]
    named = model.named_parameters(remove_duplicate=False)
    return {name: p for name, p in named if not any(name.startswith(path) for path in inside)}


def _ours(module: nn.Module) -> bool:
    return isinstance(module, Adapter)


def base_of(model: nn.Module) -> nn.Module:
    """A copy without its adapters: the model that they were applied to."""
    base = copy.deepcopy(model)
    wiring.unwire(base)
    for _, owner, child, _ in list(wiring.find_adapters(base)):
        wiring.detach(owner, child)
    for module in base.modules():
        wiring.unmark(module)
    return base


def as_folded(base: nn.Module, folded: nn.Module) -> nn.Module:
    """The base with the folded model's numbers in it, and a copy for each use that the fold gave one.

    Where data choose the path (routers), other numbers take another one: this is the base on the folded model's path.
    """
    twins: dict[int, nn.Parameter] = {}
    wanted = parameters(folded)
    for name, parameter in parameters(base).items():
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


# ── W + Σ s·B·A, rounded once ────────────────────────────────────────────────────────────────────────────────────────


def active_adapters(model: nn.Module) -> dict[str, list[Adapter]]:
    """Name of each adapted parameter → the adapters that act on it."""
    found: dict[str, list[Adapter]] = defaultdict(list)
    for path, owner in model.named_modules(remove_duplicate=False):
        for child, adapter in ({} if _ours(owner) else wiring.adapters_of(owner)).items():
            if adapter.active:
                found[f"{path}.{wiring.attribute_of(child)}".lstrip(".")].append(adapter)
    return dict(found)


def misrounded(weight: torch.Tensor, folded: torch.Tensor, adapters: Sequence[Adapter]) -> torch.Tensor:
    """Flat indices of the elements of `folded` that are not W + Σ s·B·A, rounded once to W's dtype.

    float64 has no wider type beside it: there a sum of n terms may be off by n roundings of what is added up.
    """
    total, size = weight_sums(weight, adapters)
    terms = sum(2 * adapter.rank + 2 for adapter in adapters)
    error = terms * _UNIT * size
    value = folded.detach().to(torch.float64)
    if weight.dtype == torch.float64:
        return (~((value - total).abs() <= 2 * error)).reshape(-1).nonzero().squeeze(1)
    low, high = (_step(folded, by).to(torch.float64) for by in (-1, 1))
    sure = ((low + value) / 2 + error < total) & (total < (value + high) / 2 - error)  # midpoints are exact in float64
    doubtful = (~sure).reshape(-1).nonzero().squeeze(1)
    wrong = [k for k in doubtful.tolist() if not _is_nearest(k, weight, folded, adapters)]
    return torch.tensor(wrong, dtype=torch.long)


def weight_sums(weight: torch.Tensor, adapters: Sequence[Adapter]) -> tuple[torch.Tensor, torch.Tensor]:
    """W + Σ s·B·A in float64, and the same of absolute values: no partial sum is larger."""
    total = weight.detach().to(torch.float64)
    size = total.abs()
    for adapter in adapters:
        A, B = _factors(adapter)
        total = total + scale_of(adapter) * torch.einsum(_equation(adapter), B, A)
        size = size + abs(scale_of(adapter)) * torch.einsum(_equation(adapter), B.abs(), A.abs())
    return total, size


def scale_of(adapter: Adapter) -> float:
    return adapter.alpha / (math.sqrt(adapter.rank) if adapter.scaling == "rslora" else adapter.rank)


def _axes(adapter: Adapter, side: str) -> list[int]:
    return [k for k, s in enumerate(adapter.layout.sides) if s == side]


def _equation(adapter: Adapter) -> str:
    """B and A, split over the weight's own axes, summed over the rank."""
    b, o, i = ("".join(_LETTERS[k] for k in _axes(adapter, side)) for side in "boi")
    return f"{b}{o}r,{b}r{i}->{_LETTERS[: len(adapter.layout.shape)]}"


def _factors(adapter: Adapter) -> tuple[torch.Tensor, torch.Tensor]:
    """A (b…, rank, i…) and B (b…, o…, rank) in float64 over the weight's own axes; rows of no part are zero."""
    b, o, i = ([adapter.layout.shape[k] for k in _axes(adapter, side)] for side in "boi")
    A = adapter.A.detach().to(torch.float64).reshape(*b, adapter.rank, *i)
    given = adapter.B.detach().to(torch.float64).reshape(*b, -1, adapter.rank)
    B = given.new_zeros(*b, math.prod(o), adapter.rank)
    B[..., list(adapter.rows) if adapter.rows is not None else slice(None), :] = given
    return A, B.reshape(*b, *o, adapter.rank)


def _step(values: torch.Tensor, by: int) -> torch.Tensor:
    """The neighbours in the order of numbers: one float further from −∞, or towards it."""
    integers = _INTEGERS[values.dtype.itemsize]
    values = values.detach().contiguous()
    raw = values.view(integers).to(torch.int64)
    limit = torch.iinfo(integers).max
    ordered = torch.where(raw < 0, -(raw & limit), raw) + by  # −0 and +0 are one number
    raw = torch.where(ordered < 0, -ordered | torch.iinfo(integers).min, ordered)
    return raw.to(integers).view(values.dtype)


def _is_nearest(flat: int, weight: torch.Tensor, folded: torch.Tensor, adapters: Sequence[Adapter]) -> bool:
    """Nearest, the even one of two as near, in exact arithmetic."""
    value = folded.detach().reshape(-1)[flat]
    if not bool(value.isfinite()):
        return False
    index = tuple(int(n) for n in torch.unravel_index(torch.tensor(flat), weight.shape))
    exact = Fraction(float(weight.detach()[index]))
    for adapter in adapters:
        A, B = _factors(adapter)
        b, o, i = ([index[k] for k in _axes(adapter, side)] for side in "boi")
        column: tuple[Any, ...] = (*b, slice(None), *i)
        rows, columns = B[(*b, *o)].tolist(), A[column].tolist()
        products = (Fraction(x) * Fraction(y) for x, y in zip(rows, columns, strict=True))
        exact += Fraction(scale_of(adapter)) * sum(products)
    mine = abs(Fraction(float(value)) - exact)
    for by in (-1, 1):
        other = float(_step(value[None], by))
        if not math.isfinite(other):
            continue
        theirs = abs(Fraction(other) - exact)
        odd = int(value[None].view(_INTEGERS[value.itemsize])) & 1
        if theirs < mine or (theirs == mine and odd):
            return False
    return True


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
    with wiring.unwired(before):
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
        own = {id(t) for m in model.modules() if _ours(m) for t in (*m.parameters(), *m.buffers())}
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
