"""Two models side by side: their bits, classes and graphs, and the first use of a weight at which they differ.

value of a use in one model  ≈  value of the same use in the other
"""

from __future__ import annotations

import copy
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from lora_fx.checks.flow import Flow, Reading
from lora_fx.checks.verification import Report, compare, in_float64, move_weights, noise_floor, rounding_step
from lora_fx.graph.capture import Inputs, capture_graph, no_fast_paths, normalize_inputs
from lora_fx.graph.own_state import undisturbed
from lora_fx.graph.program import find_weights, storage_key
from lora_fx.model.classes import unwire
from lora_fx.model.inventory import Storage, base_parameters, inventory
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
        setattr(base.get_submodule(path), attribute, twins[id(wanted[name])])
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


#: the path of the module, the form of the use, and which one of those in there
_Key = tuple[str, str, int]


def first_difference(before: nn.Module, after: nn.Module, example_inputs: Any = None) -> Difference | None:
    """The first use of a weight, in the order of execution, at which two models differ; None where no use does.

    Both are captured (in eval mode) and run node by node. A use counts with its branches; uses are matched by the
    module that executes them, their form, and their number in there. The bound is that of `lora_fx.verify`, for each
    use.
    """
    inputs = normalize_inputs(before, example_inputs)
    tape, (wide, wide_inputs, _) = _Tape(before, inputs), in_float64(before, inputs)
    wide_tape = _Tape(wide, wide_inputs)
    runs = [tape.play(), _Tape(after, inputs).play(), wide_tape.play()]
    move_weights(wide, rounding_step(before, inputs))
    runs.append(wide_tape.play())
    for key, reading in tape.uses.items():
        if not all(key in values for values in runs) or runs[0][key].shape != runs[1][key].shape:
            continue
        mine, theirs, exact, moved = (values[key] for values in runs)
        noise = noise_floor(exact, mine, moved)
        report = compare(mine, theirs, exact, noise, mine.dtype)
        if not report:
            keys = dict.fromkeys(storage_key(tape.flow.captured.tensors[root]) for root in reading.acting)
            names = tuple(" = ".join(tape.weights[key].names) for key in keys)
            return Difference(names, reading.module, reading.form, report)
    return None


class _Tape(fx.Interpreter):
    """A captured model, to be run node by node."""

    def __init__(self, model: nn.Module, inputs: Inputs) -> None:
        captured, found = capture_graph(model, inputs), inventory(model)
        super().__init__(captured.module)
        self.model, self.weights = model, find_weights(model)
        adapted = found.storages()
        known = {storage_key(storage.parameter) for storage in adapted}
        plain = [_plain_storage(model, w.names) for key, w in self.weights.items() if key not in known]
        self.flow = Flow(captured, [*adapted, *plain], found.modules)
        self.uses: dict[_Key, Reading] = {}
        counts: Counter[tuple[str, str]] = Counter()
        for reading in self.flow.readings:
            place = reading.module, reading.form
            self.uses[(*place, counts[place])] = reading
            counts[place] += 1
        self._ends = {reading.end: key for key, reading in self.uses.items()}
        self._values: dict[_Key, torch.Tensor] = {}

    def play(self) -> dict[_Key, torch.Tensor]:
        """What every use gives, its branches added: floating-point numbers only."""
        self._values = {}
        with undisturbed(self.model), no_fast_paths(), torch.no_grad():
            torch.manual_seed(0)
            self.run(*self.flow.arguments())
        return self._values

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        first = value[0] if isinstance(value, tuple | list) and value else value
        if n in self._ends and isinstance(first, torch.Tensor) and first.is_floating_point():
            self._values[self._ends[n]] = first.clone()
        return value


def _plain_storage(model: nn.Module, names: tuple[str, ...]) -> Storage:
    path, _, attribute = names[0].rpartition(".")
    return Storage(((model.get_submodule(path), attribute),), (), False, names)
