"""The coverage certificate: every use of every adapted weight, and how it was seen to be realised.

    out(use)  =  use(x, W + δ)          measured at each use, on the x that reached it in the adapted model

The adapted model is captured with random factors (B ≠ 0), and the recorded program is run once more. At every node that
consumes an adapted weight two things are computed apart in float64, whatever the model's dtype: the use with the dense
sum in the weight's place, and the recorded nodes from there to the end of the branches, the casts among them left out.
Rounding hides nothing there. A use that reads the plain weight, a branch that another node bypasses, a lost scale or a
wrong slice shows at the use where it happens, and nothing further down can hide it. The uses themselves are counted in
the base model: one that is gone from the adapted program is missed.
"""

from __future__ import annotations

import json
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from lora_fx.changes import Undo, safe_point
from lora_fx.checks.gradients import Reach, reach
from lora_fx.checks.oracles import delta, delta_in_parts, grouped_mm
from lora_fx.checks.verification import (
    Draws,
    NotRun,
    NotServed,
    Report,
    as_real,
    check_once,
    compare_all,
    culprit,
    dither,
    filled,
    in_mode,
    refuse_unmeasurable,
    relative_error,
    rounded_once_more,
    run_adapted,
    run_itself,
    silent,
    with_dense_weights,
    worst,
)
from lora_fx.deltas.adapter import Adapter
from lora_fx.deltas.realisation import Realisation
from lora_fx.errors import CaptureError, EquivalenceError, PlanError, essence
from lora_fx.graph.capture import (
    MODULE,
    Capture,
    Inputs,
    capture_graph,
    normalize_inputs,
)
from lora_fx.graph.forms import DENSE_OPS, FORMS, op_name
from lora_fx.graph.nodes import base_name, call, first_operand, is_float, looked_into, shape_of, written_by
from lora_fx.graph.own_state import undisturbed
from lora_fx.graph.places import is_away, without_numbers
from lora_fx.graph.program import Program, capture, storage_key
from lora_fx.graph.views import COPIES, MOVES
from lora_fx.model.classes import unwired
from lora_fx.model.inventory import Inventory, Storage, inventory
from lora_fx.tables import table


@dataclass(frozen=True)
class Coverage:
    """One use of one adapted weight."""

    weight: str
    """Its names where it is read with the branch, joined by ``=``."""
    adapters: tuple[str, ...]
    """The adapters that act on this use; none where it was split off and must stay as it was."""
    module: str
    """Path of the module whose forward executes the use; empty for the model itself."""
    form: str
    realised: Realisation
    effect: float = 0.0
    """How far the adapters move this use's output, relative to its root mean square."""
    error: float = 0.0
    """How far the output is from the use of the dense W + δ, relative likewise."""
    bound: float = 0.0
    """What rounding explains: see `lora_fx.verify`."""
    dtype: str = ""
    """In which it was measured: float64, or its own where an op of it takes no float64."""
    problem: str = ""
    """Why this use is not covered; empty where it is."""

    @property
    def covered(self) -> bool:
        return not self.problem


@dataclass(frozen=True)
class Certificate:
    """What was measured. True where every use of every adapted weight was seen and is W + δ."""

    rows: tuple[Coverage, ...]
    whole: tuple[Report, ...] = ()
    """The whole model against the model with the dense sums in its weights, in eval and in train mode."""
    gradient_free: tuple[str, ...] = ()
    """Adapters, as ``weight (name)``, that no gradient reaches on the example inputs: training would not move them."""
    gradient_lost: tuple[str, ...] = ()
    """Those of them whose weight gets one in the base model: training should move them."""
    inactive: tuple[str, ...] = ()
    """Names of adapters that are in the model and do not act."""
    folded: Mapping[str, int] = field(default_factory=dict)
    """Of a folded model: weight → how many of its elements are not W + δ rounded once. All must be 0."""
    notes: tuple[str, ...] = ()
    """What could not be measured, and why: a mode in which the model does not run on the inputs."""

    @property
    def unseen(self) -> tuple[Coverage, ...]:
        return tuple(row for row in self.rows if row.realised == Realisation.UNSEEN)

    @property
    def problems(self) -> tuple[Coverage, ...]:
        return tuple(row for row in self.rows if row.problem and row.realised != Realisation.UNSEEN)

    def __bool__(self) -> bool:
        right = all(row.covered for row in self.rows) and all(self.whole) and not any(self.folded.values())
        return right and not self.gradient_lost

    def to_json(self) -> str:
        """Everything in it, and the verdict, as one JSON object."""
        return json.dumps({"certified": bool(self), **asdict(self)}, indent=1)

    def __str__(self) -> str:
        header = ("weight", "adapters", "use", "in", "realised", "effect", "error", "bound", "")
        lines = [table(header, [_cells(row) for row in self.rows], right=(5, 6, 7))]
        lines += [f"whole model, {mode}: {report}" for mode, report in zip(("eval", "train"), self.whole, strict=False)]
        lines += [f"folded {name}: {wrong} elements not rounded once" for name, wrong in self.folded.items() if wrong]
        if self.folded and not any(self.folded.values()):
            lines.append(f"folded: every element of {len(self.folded)} weights is W + δ rounded once")
        if self.gradient_free:
            lines.append(f"no gradient reaches {', '.join(self.gradient_free)}")
        if self.gradient_lost:
            lines.append(f"in the base model one reaches the weight of {', '.join(self.gradient_lost)}")
        if self.inactive:
            lines.append(f"inactive: {', '.join(self.inactive)}")
        lines += self.notes
        right = sum(row.covered for row in self.rows)
        verdict = "certified" if self else "NOT certified"
        return "\n".join([*lines, f"{verdict}: {right} of {len(self.rows)} uses are covered"])


def _cells(row: Coverage) -> tuple[str, ...]:
    seen = row.realised != Realisation.UNSEEN
    numbers = [f"{value:.1e}" if seen else "" for value in (row.effect, row.error, row.bound)]
    names = ", ".join(row.adapters) or "–"
    return row.weight, names, row.form, row.module or "the model", row.realised, *numbers, row.problem or "ok"


def certify_adapted(
    model: nn.Module, example_inputs: Any, undo: list[Undo], *, whole: bool = True, gradients: bool = True
) -> Certificate:
    """The certificate of a model with branches; see `lora_fx.certify`, which takes folded models too.

    Args:
        undo: the list of the change that this is a part of; see `check_once`.
    """
    inputs, found = normalize_inputs(model, example_inputs), inventory(model)
    storages = found.storages()
    if not storages:
        raise PlanError(
            "the model has no active adapter", place=type(model).__name__, remedy="apply or activate one first"
        )
    refuse_unmeasurable(model)
    active = [adapter for storage in storages for adapter in storage.adapters]
    seen = None
    if whole and not _is_small(storages):
        with unwired(model):
            program = capture(model, inputs)
        seen = _by_use(model, program, active, undo)
    with filled(model, active, 0, undo):
        if seen is None or any(row.error > row.bound for row in seen.rows):
            seen = _by_use_and_sums(model, inputs, found, whole, undo)
        reached = reach(model, inputs, storages, undo) if gradients else Reach()
    rows, reports = seen.rows, seen.whole
    notes = tuple(str(report) for report in reports if isinstance(report, NotRun))
    if reached.error is not None and not reached.lost:
        why = essence(reached.error).partition("\n")[0]
        notes += (f"Backward does not run on the example inputs ({why}): which adapters it reaches is not known.",)
    labels = {a: f"{_name(storage)} ({a.name})" for storage in storages for a in storage.adapters}
    free, lost = (tuple(labels[a] for a in found) for found in (reached.free, reached.lost))
    measured = tuple(report for report in reports if isinstance(report, Report))
    if seen.lowered and measured and all(measured):
        why = "inside of a transform of torch.func it cannot be measured by itself"
        rows = tuple(replace(row, problem=why) if row.problem else row for row in rows)
    idle = {place.adapter.name for place in found.places if not place.adapter.active}
    return Certificate(rows, measured, free, lost, tuple(sorted(idle)), notes=notes)


def _by_use_and_sums(model: nn.Module, inputs: Inputs, here: Inventory, whole: bool, undo: list[Undo]) -> _Seen:
    """Each use on the x that reaches it, and the whole model against itself with the sums in its weights."""
    storages = here.storages()
    # The base model takes the adapted one's path with the adapted one's numbers.
    with unwired(model), with_dense_weights(model, undo):
        program = capture(model, inputs)
        assert program.capture is not None
        # What ran inside of a vmap cannot be run again outside of it; what is left below it can.
        lowered = program.capture.transformed
        recorded = capture_graph(model, inputs, lowered) if lowered else program.capture
        base = Flow(recorded, storages, here.modules).counts()
    flow = Flow(capture_graph(model, inputs, lowered), storages, here.modules)
    rows = (*_measured(model, flow)[0], *_not_as_often(storages, base, flow.counts()))
    modes = (False, True) if whole else ()
    reports = [check_once(model, inputs, training, program.rounding(), undo) for training in modes]
    return _Seen(rows, tuple(reports), lowered)


def check_adapted(
    model: nn.Module, program: Program, adapters: Sequence[Adapter], undo: list[Undo]
) -> tuple[NotRun, ...]:
    """The self-check of `apply`: the adapted model must be the model with W + δ in its weights. What comes back says in
    which mode the model itself does not run.

    B is nonzero while this runs. Afterwards A and B are what they were, and every weight.

    Args:
        program: of the model before, on the example inputs.

    Raises:
        EquivalenceError: it is not, in train or in eval mode; the error names the first use that is not covered.
        NotServed: it does not run or train where the model itself does.
    """
    assert program.capture is not None
    if without_numbers(model):
        return ()
    inputs, rounding = program.capture.inputs, program.rounding()
    if (seen := _by_use(model, program, adapters, undo)) is not None:
        _refuse_wrong(seen.rows)
        whole = seen.whole
    else:
        whole = tuple(_by_sums(model, inputs, adapters, rounding, undo))
        if _is_coarse(rounding):
            _refuse_wrong_uses(model, inputs, adapters, undo)
    with filled(model, adapters, 0, undo):
        _refuse_lost(model, inputs, adapters, undo)
    return tuple(report for report in whole if isinstance(report, NotRun))


#: elements of adapted weights: up to these, writing the sums W + δ takes less time than recording the model
_SMALL = 2**22


def _is_small(storages: Sequence[Storage]) -> bool:
    return sum(storage.parameter.numel() for storage in storages) <= _SMALL


def _is_coarse(rounding: Mapping[int, float]) -> bool:
    return any(step > torch.finfo(torch.float32).eps for step in rounding.values())


def _by_sums(
    model: nn.Module, inputs: Inputs, adapters: Sequence[Adapter], rounding: Mapping[int, float], undo: list[Undo]
) -> list[Report | NotRun]:
    """The whole model against itself with the sums in its weights. What is kept to undo that is bounded: of large
    weights only some output features are adapted."""
    reports: list[Report] = []
    for seed in range(3):  # rounding can flip a router's choice: such an error goes away with other numbers
        with filled(model, adapters, seed, undo):
            found = [check_once(model, inputs, training, rounding, undo) for training in (False, True)]
            reports = [report for report in found if isinstance(report, Report)]
            if all(reports):
                return found
    raise EquivalenceError(
        f"the adapted model is not the model with W + δ: {worst(reports)}",
        place=_suspect(model, inputs, adapters, rounding, undo),
        remedy="exclude that weight with a rule without a rank; its forward reads the weight in an unseen way",
    )


@dataclass(frozen=True)
class _Seen:
    """What was measured."""

    rows: tuple[Coverage, ...]
    whole: tuple[Report | NotRun, ...]
    """The model as it runs, in eval and in train mode, against its recorded program, or against the model itself with
    the sums in its weights."""
    lowered: bool = False
    """The program was recorded below transforms of torch.func, inside of which no use can be measured."""


def _by_use(model: nn.Module, program: Program, adapters: Sequence[Adapter], undo: list[Undo]) -> _Seen | None:
    """No weight is written to. In each mode the model with B = 0 is the model itself, bit for bit; what it does with
    B ≠ 0 is the recorded program, up to what rounding A and B once more would do; and in that every use is the use of
    W + δ, in float64. None where one of the three cannot be said so, or where a whole copy is measured sooner.

    Args:
        program: of the model without its adapters.
    """
    before, rounding, here = program.capture, program.rounding(), inventory(model)
    assert before is not None
    inputs, storages = before.inputs, here.storages()
    acting = [adapter for storage in storages for adapter in storage.adapters]
    small = _is_small(storages) and not _is_coarse(rounding)
    away = any(is_away(*owner) for storage in storages for owner in storage.owners)
    if small or away or not all(adapter.kind.name == "lora" for adapter in acting):  # whose θ that makes no δ is known
        return None
    base = Flow(before, storages, here.modules).counts()

    def itself(training: bool) -> list[torch.Tensor] | NotRun:
        with unwired(model):
            return run_itself(model, inputs, training)

    rows, whole = list[Coverage](), list[Report | NotRun]()
    with filled(model, adapters, 0, undo, whole=True):
        plain: list[torch.Tensor] | NotRun = [as_real(t) for t in before.outputs]
        moved: list[torch.Tensor] = []
        for training in (False, True):
            with in_mode(model, training):
                was, changed = plain, moved
                if training:
                    plain = itself(training)
                if isinstance(plain, NotRun):
                    whole.append(plain)
                    break
                moved = run_adapted(model, inputs)
                if training and _same(plain, was) and _same(moved, changed):
                    whole += whole  # both modes are one
                    break
                with silent(acting, undo):
                    started = run_adapted(model, inputs)
                # While it is recorded a model may take another kernel.
                if not _same(started, plain) and (training or not _same(started, itself(training))):
                    return None
                found = _measure_uses(model, inputs, storages, here, base, rounding, undo)
                if found is None or not (report := compare_all(moved, *found[1:])):
                    return None
                if wrong := [row for row in found[0] if row.error > row.bound]:
                    return _Seen(tuple(wrong), ())
                rows, whole = rows or found[0], [*whole, report]
    return _Seen((*rows, *_not_as_often(storages, base, base)), tuple(whole))


def _same(a: Sequence[torch.Tensor] | NotRun, b: Sequence[torch.Tensor] | NotRun) -> bool:
    """The same numbers, bit for bit but for the sign of 0."""
    if isinstance(a, NotRun) or isinstance(b, NotRun):
        return False
    return len(a) == len(b) and all(
        x.shape == y.shape and x.dtype == y.dtype and bool(((x == y) | (x.isnan() & y.isnan())).all())
        for x, y in zip(a, b, strict=True)
    )


def _measure_uses(
    model: nn.Module,
    inputs: Inputs,
    storages: Sequence[Storage],
    here: Inventory,
    base: Counter[Storage],
    rounding: Mapping[int, float],
    undo: list[Undo],
) -> tuple[list[Coverage], list[torch.Tensor], list[torch.Tensor]] | None:
    """A row for each use, what the recorded program gives, and what it gives with A and B rounded once more. None where
    it reads weights in a way that no use shows, or not as often as the model itself."""
    try:
        captured = capture_graph(model, inputs, as_is=True)
    except CaptureError:
        return None
    flow = Flow(captured, storages, here.modules)
    if captured.transformed or flow.unmeasured or flow.counts() != base:
        return None
    with rounded_once_more(storages, rounding, undo):
        rows, moved = _measured(model, flow)
    outputs = [as_real(t) for t in captured.outputs]
    return None if any(reading.bypass for reading in flow.readings) else (rows, outputs, moved)


def _refuse_wrong_uses(model: nn.Module, inputs: Inputs, adapters: Sequence[Adapter], undo: list[Undo]) -> None:
    """Look at each use by itself, in float64: what rounding does to the outputs of the whole could hide one of them."""
    with filled(model, adapters, 0, undo, whole=True):
        captured, here = capture_graph(model, inputs), inventory(model)
        if not captured.transformed:
            _refuse_wrong(_measured(model, Flow(captured, here.storages(), here.modules))[0])


def _refuse_wrong(rows: Sequence[Coverage]) -> None:
    for row in rows:
        if row.error > row.bound:
            raise EquivalenceError(
                f"a use of the weight ({row.form} in {row.module or 'the model'}) is not the use of W + δ: error "
                f"{row.error:.3g} against a bound of {row.bound:.3g}, in {row.dtype}",
                place=row.weight,
                remedy="exclude that weight with a rule without a rank; its forward reads the weight in an unseen way",
            )


def _refuse_lost(model: nn.Module, inputs: Inputs, adapters: Sequence[Adapter], undo: list[Undo]) -> None:
    storages = [own for own in inventory(model).storages() if any(a in adapters for a in own.adapters)]
    reached = reach(model, inputs, storages, undo)
    for storage in storages:
        if reached.lost and reached.lost[0] in storage.adapters:
            why = "backward does not run" if reached.error is not None else "no gradient reaches θ"
            where = "" if reached.error is None else f" ({essence(reached.error)})"
            raise NotServed(
                f"the adapted model does not train as the model with W + δ: {why}{where}",
                place=(reached.error and culprit(model, reached.error)) or _name(storage),
                remedy="exclude that weight with a rule without a rank; its forward reads the weight in an unseen way",
            )


def _suspect(
    model: nn.Module, inputs: Inputs, adapters: Sequence[Adapter], rounding: Mapping[int, float], undo: list[Undo]
) -> str:
    """The weight of the first use that is not covered; the first one that is wrong in train mode, where all are."""
    try:
        problems = certify_adapted(model, inputs, undo, whole=False, gradients=False).problems
    except CaptureError:
        problems = ()
    if problems:
        return problems[0].weight
    storages = inventory(model).storages()
    for adapter in dict.fromkeys(adapters):
        with filled(model, [adapter], 0, undo):
            if not check_once(model, inputs, True, rounding, undo):
                return next(_name(storage) for storage in storages if adapter in storage.adapters)
    return "several weights together"


# ── where adapted weights are read ───────────────────────────────────────────────────────────────────────────────────


@dataclass(eq=False)
class Reading:
    """A node that consumes weights, and the node at which its branches have been added."""

    node: fx.Node
    acting: dict[fx.Node, Storage | None]
    """The placeholder of each weight that it consumes → the storage as it is read here; None where it was split off."""
    end: fx.Node
    dense: bool
    """It is handed the sum W + δ."""
    bypass: str
    """Who reads the node's output before the branch is added."""
    between: tuple[fx.Node, ...] = ()
    """What a lowered program does to the node's output before it adds the branch: views, and a plain bias."""

    @property
    def module(self) -> str:
        return self.node.meta.get(MODULE, "")

    @property
    def form(self) -> str:
        name = op_name(self.node.target)
        return FORMS[name].name if name in FORMS else name


class Flow:
    """One walk over a captured graph: which nodes carry an adapted weight, or factors, and who consumes the weights."""

    def __init__(
        self, captured: Capture, storages: Sequence[Storage], paths: Mapping[nn.Module, tuple[str, ...]]
    ) -> None:
        self.captured, self.paths = captured, paths
        self.storages: dict[fx.Node, list[Storage]] = {}
        self.carriers: dict[fx.Node, tuple[fx.Node, ...]] = {}
        """node → the placeholders of the weights that it is a view or a function of."""
        self.sums: dict[fx.Node, frozenset[int]] = {}
        """W + Σ δ → the ids of the adapters."""
        self.factors: dict[fx.Node, frozenset[int]] = {}
        """node made of θ alone → the ids of their adapters."""
        self.mixed: dict[fx.Node, frozenset[int]] = {}
        """node made of weights and θ alone, as δ(W, θ) is → the ids of the adapters."""
        self._pure: set[fx.Node] = set(captured.tensors)
        self._inside: dict[Reading, frozenset[fx.Node]] = {}
        self._find_roots(storages)
        consumers = [n for n in captured.graph.nodes if n.op == "call_function" and self._consumes(n)]
        self.readings = [self._reading(node) for node in consumers]

    @property
    def unmeasured(self) -> bool:
        """A weight decides something, or is an output, without a use: `if W.norm() > 1`, `return y, W.norm()`."""
        users = (user for node in self.carriers for user in node.users)
        return any(user.op == "output" or not _is_tensors(user.meta.get("val")) for user in users)

    def counts(self) -> Counter[Storage]:
        """weight → how many nodes consume it."""
        acting = (storage for reading in self.readings for storage in reading.acting.values())
        return Counter(storage for storage in acting if storage is not None)

    def arguments(self) -> list[torch.Tensor]:
        """What the captured graph takes: the model's tensors as they are now, and the inputs."""
        captured = self.captured
        leaves = pytree.tree_leaves((captured.inputs.args, captured.inputs.kwargs))
        state = [captured.tensors[n] for n in captured.graph.nodes if n.op == "placeholder" and n in captured.tensors]
        return [*state, *(leaf for leaf in leaves if isinstance(leaf, torch.Tensor))]

    def inside(self, reading: Reading) -> frozenset[fx.Node]:
        """The nodes from a use to the end of its branches: what is made of it or of weights and factors, and not of
        what made its other operands."""
        if reading not in self._inside:
            self._inside[reading] = self._found_inside(reading)
        return self._inside[reading]

    def _found_inside(self, reading: Reading) -> frozenset[fx.Node]:
        before = self._ancestors(n for n in reading.node.all_input_nodes if n not in self.carriers)
        found: dict[fx.Node, bool] = {reading.node: True}

        def is_inside(node: fx.Node) -> bool:
            if node not in found:
                found[node] = False
                alone = node in self.factors or node in self.carriers or node in self.mixed
                if alone or node not in before:
                    inputs = list(map(is_inside, node.all_input_nodes))  # all of them: each is noted
                    found[node] = alone or any(inputs)
            return found[node]

        for node in (reading.end, *(n for n in reading.node.all_input_nodes if n in self.carriers)):
            is_inside(node)
        return frozenset(node for node, within in found.items() if within)

    def is_linear(self, reading: Reading) -> bool:
        """x·Wᵀ of one weight, as it is, whose branches of low rank stand beside it: they are the same for every W."""
        root, *others = reading.acting
        storage = reading.acting[root]
        beside = all(n in (root, reading.node) or n not in self.carriers for n in self.inside(reading))
        alone = not others and not reading.between and beside and base_name(reading.node) == "linear"
        return alone and storage is not None and all(adapter.kind.low_rank for adapter in storage.adapters)

    def around(self, reading: Reading) -> frozenset[fx.Node]:
        """What those nodes are computed from."""
        inside = self.inside(reading)
        return frozenset(n for node in inside for n in node.all_input_nodes if n not in inside)

    def _ancestors(self, nodes: Iterable[fx.Node]) -> set[fx.Node]:
        """They, and whatever they are made of."""
        found, waiting = set[fx.Node](), list(nodes)
        while waiting:
            if (node := waiting.pop()) not in found:
                found.add(node)
                waiting += node.all_input_nodes
        return found

    def _find_roots(self, storages: Sequence[Storage]) -> None:
        weights: dict[tuple, list[Storage]] = {}
        factors: dict[tuple, int] = {}
        for storage in storages:
            weights.setdefault(storage_key(storage.parameter), []).append(storage)
            for adapter in storage.adapters:
                factors.update((storage_key(t), id(adapter)) for t in adapter.parameters())
        for node, tensor in self.captured.tensors.items():
            key = storage_key(tensor)
            if key in weights:
                self.storages[node], self.carriers[node] = weights[key], (node,)
            elif key in factors:
                self.factors[node] = frozenset([factors[key]])

    def _consumes(self, node: fx.Node) -> bool:
        """Whether the node makes an activation from a weight; notes what it carries where it does not."""
        inputs = node.all_input_nodes
        pure = all(n in self._pure for n in inputs)
        carried = [n for n in inputs if n in self.carriers]
        made_of = [own for n in inputs if (own := self.factors.get(n) or self.mixed.get(n))]
        used = pure and bool(carried) and self._multiplies(node)
        if pure and not used:
            self._pure.add(node)
        else:
            self._write(node)
        if used:
            return True
        if not carried:
            if made_of and (pure or _moves(node, self.factors)):
                self.factors[node] = frozenset().union(*made_of)
            return False
        if pure and (branches := self._branches_of_others(node)):
            self.factors[node] = branches
            return False
        if pure and made_of:
            self.mixed[node] = frozenset().union(*made_of)
            plain = any(n not in self.mixed for n in carried)  # W + δ; where neither is W, two sums are added
            if plain and _is_add(node) and any(shape_of(node) == shape_of(root) for root in self._roots(node)):
                self.sums[node] = self.mixed[node]
        elif not (pure or _moves(node, self.carriers)):
            return True
        self.carriers[node] = self._roots(node)
        return False

    def _branches_of_others(self, node: fx.Node) -> frozenset[int]:
        """The adapters whose factors it multiplies with a weight, where those adapt another: the branch of that one."""
        made = (self.factors[n] for n in node.all_input_nodes if n in self.factors and n not in self.carriers)
        own = {id(a) for root in self._roots(node) for storage in self.storages[root] for a in storage.adapters}
        found = frozenset[int]().union(*made)
        return found if own.isdisjoint(found) else frozenset()

    def _multiplies(self, node: fx.Node) -> bool:
        """A product of a weight, or of W + Σ δ, with a constant or with another one: a use that no input reaches."""
        name = base_name(node)
        if not (name in FORMS or name in DENSE_OPS or name.startswith("conv")):
            return False  # else a part of δ(W, θ) may multiply with factors
        inside = [n for n in node.all_input_nodes if n in self.factors or (n in self.mixed and not self._summed(n))]
        return not inside

    def _write(self, node: fx.Node) -> None:
        """What an activation is written into began as a constant, and is one no longer."""
        for target in written_by(node):
            below: fx.Node | None = target
            while below is not None:
                self._pure.discard(below)
                below = looked_into(below)

    def _roots(self, node: fx.Node) -> tuple[fx.Node, ...]:
        return tuple(dict.fromkeys(root for n in node.all_input_nodes for root in self.carriers.get(n, ())))

    def _reading(self, node: fx.Node) -> Reading:
        roots = self._roots(node)
        carried = [n for n in node.all_input_nodes if n in self.carriers]
        summed = [self._summed(n) for n in carried]
        end, added, bypass, between = self._end(node, roots)
        acting = {root: self._acting(node, root, added.union(*summed)) for root in roots}
        return Reading(node, acting, end, all(summed), bypass, between)

    def _acting(self, node: fx.Node, root: fx.Node, adapters: frozenset[int]) -> Storage | None:
        """Adapters: the ids of those whose branches, or sums, were found here."""
        storages, module = self.storages[root], node.meta.get(MODULE, "")
        if not storages[0].split:
            return storages[0]
        for storage in storages:
            inside = any(module in self.paths[owner] for owner, _ in storage.owners)
            if inside or adapters & {id(a) for a in storage.adapters}:
                return storage
        return None

    def _summed(self, node: fx.Node) -> frozenset[int]:
        """The adapters whose delta has been added to this weight."""
        return self.sums.get(node, frozenset()).union(
            *(self._summed(n) for n in node.all_input_nodes if n in self.carriers)
        )

    def _end(
        self, node: fx.Node, roots: tuple[fx.Node, ...]
    ) -> tuple[fx.Node, frozenset[int], str, tuple[fx.Node, ...]]:
        """The last of the adds that put branches of these weights onto the node's output, whose branches, who reads it
        before that, and what stands between."""
        own = frozenset(id(a) for root in roots for storage in self.storages[root] for a in storage.adapters)
        added: frozenset[int] = frozenset()
        end, between, passed = node, list[fx.Node](), list[fx.Node]()
        while True:
            adds = [(u, made) for u in node.users if _is_add(u) and (made := self._branch(u, node) & own)]
            if adds:
                (end, made), added = adds[0], added | adds[0][1]
                between, passed = between + passed, []
                if others := [u for u in node.users if u is not end]:
                    bypass = f"{others[0].name} in {others[0].meta.get(MODULE, '') or 'the model'}"
                    return end, added, bypass, tuple(between)
                node = end
            elif self.captured.lowered and (step := self._step(node)) is not None:
                passed.append(step)
                node = step
            else:
                return end, added, "", tuple(between)

    def _step(self, node: fx.Node) -> fx.Node | None:
        """The one user of a node, where it moves what the node gives, or adds a plain tensor of the model."""
        if len(node.users) != 1:
            return None
        (user,) = node.users
        moves = first_operand(user) is node and (base_name(user) in MOVES or base_name(user) in COPIES)
        others = [n for n in user.all_input_nodes if n is not node]
        plain = all(n in self.captured.tensors and n not in self.carriers and n not in self.factors for n in others)
        return user if (moves and not others) or (_is_add(user) and plain) else None

    def _branch(self, add: fx.Node, node: fx.Node) -> frozenset[int]:
        """The adapters of the branch that is added to `node`."""
        return frozenset().union(*(self._made_by(n) for n in add.all_input_nodes if n is not node))

    def _made_by(self, node: fx.Node) -> frozenset[int]:
        """The adapters with whose factors it multiplies, or whose product it moves or scales."""
        if _is_add(node) and node not in self.factors:
            return frozenset()  # a use with its branch, on a constant
        inputs = node.all_input_nodes
        made = frozenset().union(*(self.factors.get(n, frozenset()) for n in inputs))
        return self._made_by(inputs[0]) if not made and len(inputs) == 1 else made


def _is_tensors(value: Any) -> bool:
    return all(isinstance(leaf, torch.Tensor) for leaf in pytree.tree_leaves(value))


def _is_add(node: fx.Node) -> bool:
    return op_name(node.target) in ("add", "add_", "__add__", "__iadd__")


def _moves(node: fx.Node, carriers: Mapping[fx.Node, Any]) -> bool:
    """A movement op, or a gather of whole experts, of a carrier."""
    first, name = node.args[0] if node.args else None, op_name(node.target)
    if not isinstance(first, fx.Node) or first not in carriers:
        return False
    if name in ("index", "index_select"):
        return first.meta["val"].ndim >= 3
    return name in MOVES or name in COPIES


# ── measuring ────────────────────────────────────────────────────────────────────────────────────────────────────────


def _not_as_often(storages: Sequence[Storage], base: Counter[Storage], adapted: Counter[Storage]) -> Iterator[Coverage]:
    """A row for each adapted weight that the base model does not read, or the adapted one another number of times."""
    for storage in storages:
        if not base[storage]:
            yield _row(storage, "", "", Realisation.UNSEEN, problem="the example inputs do not reach it")
        elif adapted[storage] != base[storage]:
            reason = f"the base model reads it {base[storage]} times, the adapted one {adapted[storage]} times"
            yield _row(storage, "", "", Realisation.MISSED, problem=reason)


def _measured(model: nn.Module, flow: Flow) -> tuple[list[Coverage], list[torch.Tensor]]:
    """A row for each use, and what the recorded program gives, with the random draws of `run`."""
    with undisturbed(model), torch.no_grad():
        torch.manual_seed(0)
        replay = _Replay(flow)
        outputs = replay.run(*flow.arguments())
    return replay.rows, [as_real(t) for t in outputs]


def _name(storage: Storage) -> str:
    return " = ".join(storage.names)


def _row(storage: Storage, *rest: Any, **more: Any) -> Coverage:
    return Coverage(_name(storage), tuple(a.name for a in storage.adapters), *rest, **more)


class _Replay(fx.Interpreter):
    """Runs a captured graph on its own inputs, and holds each use of an adapted weight against the dense sum."""

    def __init__(self, flow: Flow) -> None:
        super().__init__(flow.captured.module)
        self.flow = flow
        self.rows: list[Coverage] = []
        self._judges: dict[fx.Node, list[Callable[[list[torch.Tensor]], None]]] = defaultdict(list)
        self._readings = {reading.node: reading for reading in flow.readings}
        kept = {n for node in flow.carriers for n in node.all_input_nodes if n not in flow.carriers}
        kept.update(n for reading in flow.readings for n in flow.around(reading))
        for last, freed in self.user_to_last_uses.items():  # what a use or its branch is computed from once more
            self.user_to_last_uses[last] = [n for n in freed if n not in kept]

    def run_node(self, node: fx.Node) -> Any:
        safe_point()
        reading = self._readings.get(node)
        beside = reading is not None and self.flow.is_linear(reading)
        if reading is not None and not beside:
            self._compute_apart(reading)
        result = super().run_node(node)
        if reading is not None and beside:
            self._compute_apart(reading, result)
        for judge in self._judges.pop(node, ()):
            judge(_floats(result))
        return result

    def _compute_apart(self, reading: Reading, plain: torch.Tensor | None = None) -> None:
        """The use with the dense sums, before the model runs it: it may write into its operands. In float64, and what
        was recorded in float64 too; where an op of it takes none, in its own dtype, which rounding blurs.

        Args:
            plain: what the model has made of W alone, where the branches stand beside that.
        """
        try:
            known = self._computed(reading, wide=True) if plain is None else self._without_weight(reading, plain)
            rows = self._judged(reading, *known)
            if any(row.problem == _NOTHING for row in rows):  # it multiplies zeros: an empty cache, a first state
                drawn = self._judged(reading, *self._computed(reading, wide=True, drawn=True))  # with W, which is rare
                pairs = zip(rows, drawn, strict=True)
                rows = [own if row.problem == _NOTHING and not own.problem else row for row, own in pairs]
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except Exception:  # of any kernel
            whole, moved, without, _ = self._computed(reading, wide=False)
            self._judges[reading.end].append(
                lambda actual: self.rows.extend(self._judged(reading, whole, moved, without, actual))
            )
        else:
            self.rows += rows

    def _computed(
        self, reading: Reading, wide: bool, drawn: bool = False
    ) -> tuple[list[torch.Tensor], list[torch.Tensor], dict[fx.Node, list[torch.Tensor]], list[torch.Tensor]]:
        """The outputs with W + Σ δ, with that moved by as much as rounding may, and with the plain W for one of them;
        and, in float64, what the recorded nodes from the use to the end of its branches give.

        Args:
            drawn: with random numbers for the use's other operands, instead of those that have reached it.
        """
        plain = {root: self.flow.captured.tensors[root].detach() for root in reading.acting}
        if wide:
            plain = {root: weight.to(torch.float64) for root, weight in plain.items()}
        whole, moved = dict(plain), dict(plain)
        adapted = {root: storage for root, storage in reading.acting.items() if storage is not None}
        draws, shake = Draws(0), 0.0
        for root, storage in adapted.items():
            weight = plain[root]
            total = weight + delta(weight, *storage.adapters).to(weight.device)
            if wide:  # the sum of n products, each rounded, in any order
                terms = max(storage.adapters[0].layout.size(side) for side in "io")
                shake = max(shake, torch.finfo(torch.float64).eps / 2 * math.sqrt(terms))
            else:
                moved[root] = (total * dither(weight, torch.finfo(weight.dtype).eps / 2, draws)).to(weight.dtype)
            whole[root] = total.to(weight.dtype)
        use = _Use(self.flow, reading, self.env, wide)
        if drawn:
            use.draw(draws)
        without = {root: use.dense(whole | {root: plain[root]}) for root in adapted}
        shaken = use.dense(whole, shake, draws) if wide else use.dense(moved)
        return use.dense(whole), shaken, without, use.recorded(plain) if wide else []

    def _without_weight(
        self, reading: Reading, plain: torch.Tensor
    ) -> tuple[list[torch.Tensor], list[torch.Tensor], dict[fx.Node, list[torch.Tensor]], list[torch.Tensor]]:
        """As `_computed`, where branches stand beside x·Wᵀ, on some rows of x: neither W nor δ has to be there in
        float64 as a whole."""
        ((root, storage),) = reading.acting.items()
        assert storage is not None
        use, x_node = _Use(self.flow, reading, self.env, True), first_operand(reading.node)
        assert x_node is not None
        outputs, inputs = storage.weight.shape
        x = use.given(x_node).reshape(-1, inputs)
        chosen = torch.linspace(0, len(x) - 1, min(len(x), _ROWS), device=x.device).long()
        shake = torch.finfo(torch.float64).eps / 2 * math.sqrt(max(outputs, inputs))
        both = torch.cat([x[chosen], x[chosen] * dither(x[chosen], shake, Draws(0))])
        parts = [both @ part.to(both.device).mT for part in delta_in_parts(storage.weight, *storage.adapters)]
        own, shaken = torch.cat(parts, -1).chunk(2)
        zero = torch.zeros_like(plain, dtype=torch.float64)
        (branches,) = (t.reshape(-1, outputs)[chosen] for t in use.recorded({reading.node: zero}))
        without = plain.reshape(-1, outputs)[chosen].to(torch.float64)
        return [without + own], [without + shaken], {root: [without]}, [without + branches]

    def _judged(
        self,
        reading: Reading,
        whole: list[torch.Tensor],
        moved: list[torch.Tensor],
        without: dict[fx.Node, list[torch.Tensor]],
        actual: list[torch.Tensor],
    ) -> list[Coverage]:
        """A row for each weight of a use: `without` is what it gives with the plain W for one of them."""
        rows = list[Coverage]()
        report = compare_all(actual, whole, moved)
        place = reading.module, reading.form
        for root, storage in reading.acting.items():
            if storage is None:
                name, numbers = _name(self.flow.storages[root][0]), (0.0, report.error, report.bound)
                problem = "" if report else "it must read the plain weight, and does not"
                rows.append(
                    Coverage(name, (), *place, Realisation.SPLIT_OFF, *numbers, dtype=report.dtype, problem=problem)
                )
                continue
            pairs = zip(without[root], whole, strict=True)
            effect = max((relative_error(w, e, e) for w, e in pairs), default=0.0)
            realised = Realisation.DENSE if reading.dense else storage.adapters[0].realised
            numbers, problem = (effect, report.error, report.bound), _problem(reading, effect, report)
            rows.append(_row(storage, *place, realised, *numbers, dtype=report.dtype, problem=problem))
        return rows


@dataclass
class _Use:
    """One use of adapted weights, computed apart from the model, on the operands that have reached it there."""

    flow: Flow
    reading: Reading
    env: Mapping[fx.Node, Any]
    wide: bool
    """Computes in float64, and leaves out what casts to a narrower dtype."""
    drawn: dict[fx.Node, Any] = field(default_factory=dict)
    """Operands to compute on, in the place of those that have reached it."""

    def draw(self, draws: Draws) -> None:
        """Random numbers for all operands that are no weights of ours, no factors and no integers."""

        def normal(t: torch.Tensor) -> torch.Tensor:
            return (
                torch.randn(t.shape, generator=draws.on(t.device), dtype=t.dtype, device=t.device) if is_float(t) else t
            )

        for n in self.reading.node.all_input_nodes:
            if n not in self.flow.carriers and n not in self.flow.factors and is_float(value := self.given(n)):
                self.drawn[n] = pytree.tree_map_only(torch.Tensor, normal, value)

    def dense(
        self, weights: Mapping[fx.Node, torch.Tensor], shake: float = 0.0, draws: Draws | None = None
    ) -> list[torch.Tensor]:
        """The floating-point outputs with these weights in the place of the node's own, and without its branches.

        Args:
            shake: move each number of the other operands by this share of it.
        """
        made = dict[fx.Node, Any](weights)
        if draws is not None:
            for n in self.reading.node.all_input_nodes:
                if n not in self.flow.carriers and is_float(value := self.given(n)):
                    made[n] = pytree.tree_map(lambda t: t * dither(t, shake, draws), value)
        value = self._run(self.reading.node, partial(self._plain, made))
        for step in self.reading.between:
            value = self._run(step, partial(self._after, value))
        return [t.clone() for t in _floats(value)]

    def recorded(self, weights: Mapping[fx.Node, torch.Tensor]) -> list[torch.Tensor]:
        """The floating-point outputs of the nodes from the use to the end of its branches."""
        inside, made = self.flow.inside(self.reading), dict[fx.Node, Any](weights)

        def value(node: fx.Node) -> Any:
            if node not in made:
                known = node.op != "call_function" or (node in self.env and node not in inside)
                made[node] = self.given(node) if known else self._run(node, value)
            return made[node]

        return _floats(value(self.reading.end))

    def _plain(self, made: dict[fx.Node, Any], node: fx.Node) -> Any:
        """An operand with the weights of `made` in it; of a sum W + δ, W alone: they hold the sum."""
        if node in made:
            return made[node]
        if node not in self.flow.carriers:
            return self.given(node)
        if node in self.flow.sums:
            carried = [n for n in node.all_input_nodes if n in self.flow.carriers]
            return self._plain(made, next((n for n in carried if n not in self.flow.mixed), carried[0]))
        return self._run(node, partial(self._plain, made))

    def _after(self, value: Any, node: fx.Node) -> Any:
        """An operand of what stands between the use and its branch: `value`, or what the model has."""
        return self.given(node) if node in self.env or node in self.flow.captured.tensors else value

    def given(self, node: fx.Node) -> Any:
        """An operand, as it has reached the use."""
        if node in self.drawn:
            return self.drawn[node]
        value = tensor if (tensor := self.flow.captured.tensors.get(node)) is not None else self.env[node]
        return pytree.tree_map_only(torch.Tensor, _widened, value) if self.wide else value

    def _run(self, node: fx.Node, value: Callable[[fx.Node], Any]) -> Any:
        """One op; what it writes is a copy, since the model itself has yet to write there."""
        if self.wide and base_name(node) == "view" and any(isinstance(a, torch.dtype) for a in node.args):
            raise TypeError("the bits of a float64 are not those of the narrower number")
        written = written_by(node)

        def given(argument: Any) -> Any:
            if isinstance(argument, fx.Node):
                own = value(argument)
                return own.clone() if argument in written else own
            return _widened(argument) if self.wide else argument

        args, kwargs = fx.node.map_aggregate((node.args, node.kwargs), given)  # type: ignore[misc]
        if self.wide and base_name(node) == "_grouped_mm":
            return grouped_mm(*args, **kwargs)  # type: ignore[arg-type]  # as the schema has them
        return call(node, args, kwargs)


def _widened(value: Any) -> Any:
    """A tensor, or a dtype that is asked for: in float64, or complex128, where it is no integer."""
    if isinstance(value, torch.dtype):
        return torch.float64 if value.is_floating_point else torch.complex128 if value.is_complex else value
    if isinstance(value, torch.Tensor) and is_float(value):
        return value.to(torch.complex128 if value.is_complex() else torch.float64)
    return value


#: Of so many rows of x a product is measured: each goes the same way.
_ROWS = 8

_NOTHING = "nothing to measure: on these inputs its output does not depend on the adapters"


def _problem(reading: Reading, effect: float, report: Report) -> str:
    if reading.bypass:
        return f"{reading.bypass} reads its output without the branch"
    if not report:
        without = abs(report.error - effect) <= report.bound
        return "the adapters have no effect here" if without else "it is not the use of W + δ"
    if effect > report.bound:
        return ""
    if effect > report.noise:
        return f"rounding in {report.dtype} could hide its effect: certify a copy in float32 or float64"
    return _NOTHING


def _floats(value: Any) -> list[torch.Tensor]:
    found = (as_real(t) for t in pytree.tree_leaves(value) if isinstance(t, torch.Tensor))
    return [t for t in found if t.is_floating_point()]
