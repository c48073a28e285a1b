"""The coverage certificate: every use of every adapted weight, and how it was seen to be realised.

    out(use)  =  use(x, W + δ)          measured at each use, on the x that reached it in the adapted model

The adapted model is captured with random factors (B ≠ 0), and the recorded program is run once more. At every node that
consumes an adapted weight two things are computed apart in float64, whatever the model's dtype: the use with the dense
sum in the weight's place, and the recorded nodes from there to the end of the branches, the casts among them left out.
Rounding hides nothing there. A use that reads the plain weight, a branch that another node bypasses, a lost scale or a
wrong slice shows at the use where it happens, and nothing further down can hide it. The uses themselves are counted in
the base model: one that is gone from the adapted program is missed.

`lora_fx.checks.flow` finds the uses, `lora_fx.checks.uses` measures them; here it is decided what they say of a model.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import nn

from lora_fx.changes import Undo
from lora_fx.checks.flow import Flow
from lora_fx.checks.gradients import Reach, reach
from lora_fx.checks.rewritten import Checked, check_rewritten, deltas_of, rewrites_of
from lora_fx.checks.uses import Coverage, measured, names_of, not_as_often
from lora_fx.checks.verification import (
    NotRun,
    NotServed,
    Report,
    as_real,
    check_once,
    compare_all,
    culprit,
    filled,
    in_mode,
    nested,
    refuse_unmeasurable,
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
    Inputs,
    capture_graph,
    normalize_inputs,
)
from lora_fx.graph.places import is_away, without_numbers
from lora_fx.graph.program import Program, capture
from lora_fx.model.classes import unwired
from lora_fx.model.inventory import Inventory, Storage, inventory
from lora_fx.tables import table


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
    labels = {a: f"{names_of(storage)} ({a.name})" for storage in storages for a in storage.adapters}
    free, lost = (tuple(labels[a] for a in found) for found in (reached.free, reached.lost))
    measured = tuple(report for report in reports if isinstance(report, Report))
    if seen.lowered and measured and all(measured):
        why = "inside of a transform of torch.func it cannot be measured by itself"
        rows = tuple(replace(row, problem=why) if row.problem else row for row in rows)
    idle = {place.adapter.name for place in found.places if not place.adapter.active}
    return Certificate(rows, measured, free, lost, tuple(sorted(idle)), notes=notes)


def _by_use_and_sums(model: nn.Module, inputs: Inputs, here: Inventory, whole: bool, undo: list[Undo]) -> _Seen:
    """Each use on the x that reaches it, and the whole model against itself with the sums in its weights."""
    deltas, modes = deltas_of(here.storages()), (False, True) if whole else ()
    rows, rounding, lowered = _by_each_use(model, inputs, here, deltas, undo) if deltas else ((), {}, False)
    if rewrites_of(here.storages()):
        checked = [check_rewritten(model, inputs, training, undo) for training in modes or (False,)]
        seen = [own.rows for own in checked if isinstance(own, Checked)]
        around = next((own for own in seen if any(row.problem for row in own)), seen[0])
        return _Seen((*rows, *around), tuple(map(_report, checked)) if whole else (), lowered)
    reports = [check_once(model, inputs, training, rounding, undo) for training in modes]
    return _Seen(rows, tuple(reports), lowered)


def _by_each_use(
    model: nn.Module, inputs: Inputs, here: Inventory, storages: Sequence[Storage], undo: list[Undo]
) -> tuple[tuple[Coverage, ...], Mapping[int, float], bool]:
    """A row for each use of what deltas adapt, the rounding step of each storage, and whether it was lowered."""
    # The base model takes the adapted one's path with the adapted one's numbers.
    with unwired(model), with_dense_weights(model, undo):
        program = capture(model, inputs)
        assert program.capture is not None
        # What ran inside of a vmap cannot be run again outside of it; what is left below it can.
        lowered = program.capture.transformed
        recorded = capture_graph(model, inputs, lowered) if lowered else program.capture
        base = Flow(recorded, storages, here.modules).counts()
    flow = Flow(capture_graph(model, inputs, lowered), storages, here.modules)
    rows = (*measured(model, flow)[0], *not_as_often(storages, base, flow.counts()))
    return rows, program.rounding(), lowered


def _report(checked: Checked | NotRun) -> Report | NotRun:
    return checked.report if isinstance(checked, Checked) else checked


def _checked_once(
    model: nn.Module, inputs: Inputs, training: bool, rounding: Mapping[int, float], undo: list[Undo]
) -> Report | NotRun:
    """`check_once`, of whichever adapters act; of rewrites each use and block by itself, too."""
    if rewrites_of(inventory(model).storages()):
        checked = check_rewritten(model, inputs, training, undo)
        if isinstance(checked, Checked) and checked.apart:
            _refuse_wrong(checked.rows, "what its kind makes of it")
        return _report(checked)
    return check_once(model, inputs, training, rounding, undo)


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
            found = [_checked_once(model, inputs, training, rounding, undo) for training in (False, True)]
            reports = [report for report in found if isinstance(report, Report)]
            if all(reports):
                return found
    raise EquivalenceError(
        f"the adapted model is not the model with W + δ: {worst(reports)}",
        place=_suspect(model, inputs, adapters, rounding, undo),
        remedy=f"{nested(model)}exclude that weight with a rule without a rank; its forward reads the weight in an "
        "unseen way",
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
    if small or away or not all(adapter.kind.low_rank for adapter in acting):
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
                with silent(storages, undo):
                    started = run_adapted(model, inputs)
                if not training and not _same(started, plain):  # it may take another kernel while it is recorded
                    plain = itself(training)
                if not _same(started, plain):
                    return None
                found = _measure_uses(model, inputs, storages, here, base, rounding, undo)
                if found is None or not (report := compare_all(moved, *found[1:])):
                    return None
                if wrong := [row for row in found[0] if row.error > row.bound]:
                    return _Seen(tuple(wrong), ())
                rows, whole = rows or found[0], [*whole, report]
    return _Seen((*rows, *not_as_often(storages, base, base)), tuple(whole))


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
        rows, moved = measured(model, flow)
    outputs = [as_real(t) for t in captured.outputs]
    return None if any(reading.bypass for reading in flow.readings) else (rows, outputs, moved)


def _refuse_wrong_uses(model: nn.Module, inputs: Inputs, adapters: Sequence[Adapter], undo: list[Undo]) -> None:
    """Look at each use by itself, in float64: what rounding does to the outputs of the whole could hide one of them."""
    if not deltas_of(inventory(model).storages()):
        return
    with filled(model, adapters, 0, undo, whole=True):
        captured, here = capture_graph(model, inputs), inventory(model)
        if not captured.transformed:
            _refuse_wrong(measured(model, Flow(captured, deltas_of(here.storages()), here.modules))[0])


def _refuse_wrong(rows: Sequence[Coverage], wanted: str = "the use of W + δ") -> None:
    for row in rows:
        if row.error > row.bound:
            raise EquivalenceError(
                f"a use of the weight ({row.form} in {row.module or 'the model'}) is not {wanted}: error "
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
                place=(reached.error and culprit(model, reached.error)) or names_of(storage),
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
            if not _checked_once(model, inputs, True, rounding, undo):
                return next(names_of(storage) for storage in storages if adapter in storage.adapters)
    return "several weights together"
