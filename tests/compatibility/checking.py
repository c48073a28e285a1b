"""One model's life with lora_fx, each step held against plain torch.

    W'  =  W + s·B·A        written into a copy of the base model, from the factors alone, in float64

That copy is the oracle of outputs, gradients, buffers and folds. It shares no algebra with the library: the factors and
where they act are read off the adapters' public description, everything else is written out here.
"""

from __future__ import annotations

import copy
import math
import random
import tempfile
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

import lora_fx
from lora_fx import Adapter, LoraFxError, Plan, Rule
from lora_fx.checks.verification import cast_inputs, compare, move_weights, relative_error, worst
from lora_fx.errors import FileError, PlanError, by_reason
from lora_fx.graph.capture import Inputs, no_fast_paths, normalize_inputs, output_tensors
from lora_fx.model.inventory import inventory
from lora_fx.testing.comparing import bits, classes, same_bits
from tests.compatibility import Model
from tests.compatibility.naming import contradictions

RANK, ALPHA = 2, 3.0
SCALE = ALPHA / RANK
SEEDS = 3
"""θ is drawn anew where rounding may have flipped a router's choice: an error that stays is one."""


@dataclass
class Row:
    """What came of one model."""

    package: str
    name: str
    adapters: int = 0
    agreeing: int = 0
    abstained: int = 0
    wrong: list[str] = field(default_factory=list)
    raw: list[str] = field(default_factory=list)
    uncertified: list[str] = field(default_factory=list)
    """What `certify` says against it."""
    refused: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    idle: str = ""
    """Why the model itself does not run; it is not counted then."""
    seconds: float = 0.0

    @property
    def verdict(self) -> str:
        """The worst thing that happened."""
        if self.idle:
            return "does not run"
        found = {"raw": self.raw, "wrong": self.wrong, "not certified": self.uncertified, "refused": self.refused}
        return next((word for word, lines in found.items() if lines), "right")

    @property
    def faults(self) -> list[str]:
        """What must not be."""
        return [*self.raw, *self.wrong, *self.uncertified]


class Wrong(AssertionError):
    """Something differs from plain torch."""


class Different(Wrong):
    """Numbers are further apart than rounding explains."""


def check(model: Model, row: Row | None = None, life: type[Life] | None = None) -> Row:
    """Build the model, adapt all of it, and compare every step.

    Args:
        row: to fill in; life: the steps; by default those of this module.
    """
    row = row or Row(model.package, model.name)
    try:
        base, inputs = model.build()
        others = model.build(seed=1)[1]
        inputs, others = (normalize_inputs(base, given) for given in (inputs, others))
        row.idle = _unfit(base, inputs)
    except Exception as error:
        row.idle = f"{type(error).__name__}: {error}"[:300]
    if not row.idle:
        (life or Life)(row, base, [inputs, others]).live()
    return row


def _unfit(base: nn.Module, inputs: Inputs) -> str:
    """Why nothing can be held against this model; empty where it can."""
    first, again = called(base, inputs), called(base, inputs)
    if not all(same_bits(a, b) for a, b in zip(first, again, strict=True)):
        return "two runs on one seed give different numbers"
    if any(t.isnan().any() for t in first):
        return "it gives NaN"
    return ""


class Life:
    """The steps, each of which adds to the row what it finds."""

    def __init__(self, row: Row, base: nn.Module, inputs: Sequence[Inputs]) -> None:
        self.row, self.inputs = row, inputs
        self.base = base.requires_grad_(False)  # as an adapted model is: some kernels choose by that
        self.model = copy.deepcopy(base)

    def live(self) -> None:
        with no_fast_paths():  # torch's fused encoder rounds differently from its own unfused path
            if not self._apply():
                return
            with self._step("roles"):
                self._roles()
            trained = (self._gradients, self._training) if self._trains() else ()
            for step in (self._outputs, *trained, self._certify, self._fold, self._save):
                with self._step(step.__name__.strip("_")):
                    step()

    @contextmanager
    def _step(self, name: str) -> Iterator[None]:
        try:
            yield
        except Wrong as error:
            self.row.wrong.append(f"{name}: {error}")
        except LoraFxError as error:
            self.row.refused.append(f"{name}: {type(error).__name__}: {error.place}: {error.reason}")
        except Exception as error:
            self.row.raw.append(f"{name}: {_told(error)}")

    # ── steps ────────────────────────────────────────────────────────────────────────────────────────────────────────

    def _apply(self) -> bool:
        """Adapters on everything that the plan offers; what apply then refuses is noted and left out."""
        state, plain = bits(self.model), classes(self.model)
        left_out: set[str] = set()
        rule = Rule(when=lambda site: _fits(site) and not left_out & {*site.weight.names}, rank=RANK, alpha=ALPHA)
        for _ in range(8):
            refused = len(self.row.refused)
            with self._step("apply"):
                self.plan: Plan = lora_fx.pipeline("apply", rule, self.inputs[0])(self.model).facts[Plan]
                break
            if {*map(id, state)} and not (_equal(state, bits(self.model)) and plain == classes(self.model)):
                self.row.wrong.append("apply: it raised, and the model is not what it was")
                return False
            if self.row.refused and self.row.refused[-1].endswith("matches nothing"):
                self.row.refused[-1] = "apply: " + self._why_nothing()
            place = self.row.refused[-1].split(": ")[2] if len(self.row.refused) > refused else ""
            named = {n for n, _ in self.base.named_parameters(remove_duplicate=False)} & {*place.split(" = ")}
            if not named:
                return False
            left_out |= named
        else:
            return False
        self.row.adapters = len({*_adapters(self.model)})
        self.row.notes += sorted({f"left out: {s.weight.problem}" for s in self.plan.sites if s.weight.problem})
        with self._step("run"):
            self._invisible()
        return not self.row.raw

    def _why_nothing(self) -> str:
        """What the plan says of a model in which it finds nothing to adapt."""
        try:
            lora_fx.plan(self.model, Rule("*", rank=1, alpha=ALPHA), self.inputs[0])
        except PlanError as error:
            return "; ".join(f"{names}: {one.reason}" for names, one in by_reason(error.refusals))
        return "no site"

    def _trains(self) -> bool:
        """Whether the base has a backward for these inputs: some kernels have none."""
        try:
            Oracle(self.base, self.model).dense_gradients(self.inputs[0])
        except NotImplementedError as error:
            self.row.notes.append(f"the base does not train: {error}")
            return False
        return True

    def _invisible(self) -> None:
        for inputs in self.inputs:
            if not _equal_all(called(self.model, inputs), called(self.base, inputs)):
                raise Wrong("with B = 0 the outputs are not the base's, bit for bit")

    def _roles(self) -> None:
        agreeing, abstained, wrong = contradictions(self.plan.rows)
        self.row.agreeing, self.row.abstained = agreeing, abstained
        if wrong:
            raise Wrong("; ".join(wrong[:6]))

    def _outputs(self) -> None:
        _until_right(self._compare_outputs)

    def _compare_outputs(self, seed: int) -> None:
        fill(self.model, seed)
        self.oracle = Oracle(self.base, self.model)
        for inputs in self.inputs:
            wanted, noise = self.oracle.outputs(inputs)
            _same(called(self.model, inputs), wanted, noise)
            plain = called(self.base, inputs)
            if all(torch.equal(a, b) for a, b in zip(plain, wanted, strict=True)):
                raise Wrong("the adapters have no effect on the oracle's outputs")

    def _gradients(self) -> None:
        _until_right(self._compare_gradients)

    def _compare_gradients(self, seed: int) -> None:
        fill(self.model, seed)
        oracle = Oracle(self.base, self.model)
        wanted, moved = oracle.gradients(self.inputs[0]), oracle.moved().gradients(self.inputs[0])
        found = _own_gradients(self.model, self.inputs[0])
        for label, gradient in wanted.items():
            own = found.get(label, torch.zeros_like(gradient))
            noise = relative_error(moved[label], gradient, gradient)
            if not (report := compare(own, gradient, gradient, noise, torch.float32)):
                raise Different(f"the gradient of {label}: {report}")

    def _training(self) -> None:
        """One step of θ in train mode, or in eval mode where the base has no train mode on these inputs."""
        inputs, training = self.inputs[0], True
        try:
            called(self.base, inputs, training=True)
        except Exception as error:
            training = False
            self.row.notes.append(f"the base does not run in train mode: {type(error).__name__}")
        if training:
            _until_right(self._compare_in_train_mode)
        theta = [p for p in self.model.parameters() if p.requires_grad]
        frozen = {n: p.detach().clone() for n, p in self.model.named_parameters() if not p.requires_grad}
        before, found = _loss(self.model, inputs, theta, training)
        with torch.no_grad():
            size = math.sqrt(sum(float(g.square().sum()) for g in found if g is not None))
            for p, gradient in zip(theta, found, strict=True):
                if gradient is not None:
                    p.sub_(gradient, alpha=0.1 / max(size, 1.0))
        after, _ = _loss(self.model, inputs, theta, training)
        if after == before:
            raise Wrong(f"a step has not moved the loss of {before}")
        if changed := [n for n, p in self.model.named_parameters() if n in frozen and not same_bits(p, frozen[n])]:
            raise Wrong(f"a step has moved {changed[0]}, which is frozen")

    def _compare_in_train_mode(self, seed: int) -> None:
        fill(self.model, seed)
        wanted, noise = Oracle(self.base, self.model).outputs(self.inputs[0], training=True)
        _same(called(self.model, self.inputs[0], training=True), wanted, noise)

    def _certify(self) -> None:
        """It must say yes, but of a weight that the oracle's outputs do not depend on either."""
        certificate = lora_fx.certify(self.model, self.inputs[0])
        if certificate:
            return
        idle = Oracle(self.base, self.model).without_effect(self.inputs[0])
        problems = [row for row in certificate.rows if row.problem]
        lines = [f"{r.weight} in {r.module}: {r.problem}" for r in problems if not idle & {*r.weight.split(" = ")}]
        lines += [f"whole model, {report}" for report in certificate.whole if not report]
        if lines or not problems:
            self.row.uncertified.append("; ".join(lines[:3])[:500])
        else:
            self.row.notes.append("certify: nothing to measure of a weight that the outputs do not depend on")

    def _fold(self) -> None:
        _until_right(self._compare_folded)

    def _compare_folded(self, seed: int) -> None:
        fill(self.model, seed)
        state, wired, oracle = bits(self.model), classes(self.model), Oracle(self.base, self.model)
        before = [called(self.model, inputs) for inputs in self.inputs]
        lora_fx.fold(self.model)
        try:
            oracle.check_folded(self.model)
            for inputs in self.inputs:
                wanted, noise = oracle.outputs(inputs)
                _same(called(self.model, inputs), wanted, noise)
        except Wrong:
            with suppress(LoraFxError):
                lora_fx.unfold(self.model)
            raise
        lora_fx.unfold(self.model)
        if not _equal(state, bits(self.model)) or wired != classes(self.model):
            raise Wrong("unfold does not give the model back, bit for bit")
        again = [called(self.model, inputs) for inputs in self.inputs]
        if not all(map(_equal_all, before, again)):
            raise Wrong("after unfold the outputs are others, in bits")

    def _save(self) -> None:
        fresh = copy.deepcopy(self.base)
        with tempfile.TemporaryDirectory() as folder:
            try:
                lora_fx.save_adapter(self.model, Path(folder) / "adapter")
            except FileError as error:
                self.row.notes.append(f"not in PEFT's format: {error.place}: {error.reason}")
                lora_fx.save_adapter(self.model, Path(folder) / "adapter", peft=False)
            lora_fx.load_adapter(fresh, Path(folder) / "adapter", self.inputs[0], check=False)  # as apply's, above
        if not _equal(bits(self.model), bits(fresh)):
            raise Wrong("a loaded adapter is not the saved one, bit for bit")
        for inputs in self.inputs:
            if not _equal_all(called(self.model, inputs), called(fresh, inputs)):
                raise Wrong("the model with the loaded adapter gives other bits")


def _fits(site: Any) -> bool:
    return not site.weight.problem and min(site.in_features, site.out_features) > 1


def _until_right(compared: Any) -> None:
    """Raise only where every seed's θ shows a difference."""
    for seed in range(SEEDS):
        try:
            return compared(seed)
        except Different:
            if seed == SEEDS - 1:
                raise


def _told(error: Exception) -> str:
    """The error, and where in the library it came through."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [f for f in frames if Path(f.filename).parent.name != "compatibility"]
    where = ", ".join(f"{Path(f.filename).name}:{f.lineno}" for f in ours[-3:])
    return f"{type(error).__name__}: {str(error)[:300]} ({where})"


# ── running ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def seeded() -> None:
    torch.manual_seed(0)
    random.seed(0)
    with suppress(ImportError):
        import numpy

        numpy.random.seed(0)


@contextmanager
def kept(model: nn.Module, training: bool) -> Iterator[None]:
    """Inside, every module is in that mode; afterwards modes, buffers and tensors that it keeps are what they were."""
    flags = [(m, m.training) for m in model.modules()]
    tensors = [(m, _tensors_of(m)) for m in model.modules()]
    buffers = [(m, name, b, b.clone()) for m in model.modules() for name, b in m._buffers.items() if b is not None]
    try:
        for module, _ in flags:
            module.training = training
        yield
    finally:
        for module, was in flags:
            module.training = was
        for module, own in tensors:
            vars(module).update(dict.fromkeys(_tensors_of(module)) | own)
        with torch.no_grad():
            for module, name, buffer, numbers in buffers:
                module._buffers[name] = buffer
                if not same_bits(buffer, numbers):
                    buffer.copy_(numbers)


def _tensors_of(module: nn.Module) -> dict[str, torch.Tensor]:
    """What it keeps as plain attributes."""
    return {name: value for name, value in vars(module).items() if isinstance(value, torch.Tensor)}


@torch.no_grad()
def called(model: nn.Module, inputs: Inputs, training: bool = False) -> list[torch.Tensor]:
    """The model's outputs on a fixed seed, and its buffers after that."""
    with kept(model, training):
        seeded()
        outputs = [t.clone() for t in output_tensors(fresh(inputs).call(model))]
        own = {name: b for name, b in model.named_buffers() if "_lora_" not in name}
        return [*outputs, *(b.clone() for b in own.values())]


def fresh(inputs: Inputs) -> Inputs:
    """A copy: a model may write into what it is given."""
    return copy.deepcopy(inputs)


def _loss(
    model: nn.Module, inputs: Inputs, parameters: Sequence[nn.Parameter], training: bool = False
) -> tuple[float, tuple[torch.Tensor | None, ...]]:
    """Outputs times random numbers, added up; and the gradient of that."""
    with kept(model, training), torch.enable_grad():
        seeded()
        outputs = [t for t in output_tensors(fresh(inputs).call(model)) if t.requires_grad]
        generator = torch.Generator().manual_seed(0)
        terms = [(t * torch.randn(t.shape, generator=generator).to(t.dtype))[t.isfinite()].sum() for t in outputs]
        if not terms:
            raise Wrong("no output has a gradient")
        loss = sum(term.real if term.is_complex() else term for term in terms)
        return float(loss.detach()), torch.autograd.grad(loss, parameters, allow_unused=True)


def _own_gradients(model: nn.Module, inputs: Inputs) -> dict[str, torch.Tensor]:
    theta = {f"{name} of {k}": p for k, a in enumerate(_adapters(model)) for name, p in a.named_parameters()}
    _, found = _loss(model, inputs, list(theta.values()))
    return {label: g for label, g in zip(theta, found, strict=True) if g is not None}


def _same(found: list[torch.Tensor], wanted: list[torch.Tensor], noise: list[float]) -> None:
    if [t.shape for t in found] != [t.shape for t in wanted]:
        raise Wrong(f"outputs of shapes {[*map(_shape, found)]}, and not {[*map(_shape, wanted)]}")
    reports = [compare(x, y, y, n, _floating(y)) for x, y, n in zip(found, wanted, noise, strict=True)]
    if not (report := worst(reports)):
        raise Different(str(report))


def _shape(tensor: torch.Tensor) -> tuple[int, ...]:
    return tuple(tensor.shape)


def _floating(tensor: torch.Tensor) -> torch.dtype:
    return tensor.dtype if tensor.is_floating_point() else torch.float32


def _equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(same_bits(a[k], b[k]) for k in a)


def _equal_all(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return len(a) == len(b) and all(map(same_bits, a, b))


# ── the oracle ───────────────────────────────────────────────────────────────────────────────────────────────────────


def _adapters(model: nn.Module) -> list[Adapter]:
    return list(dict.fromkeys(place.adapter for place in inventory(model).places))


@torch.no_grad()
def fill(model: nn.Module, seed: int) -> None:
    """Random factors whose product is about half as large as its weight."""
    generator = torch.Generator().manual_seed(seed)
    weights = {place.adapter: place.parameter for place in inventory(model).places}
    for adapter in _adapters(model):
        size = float(weights[adapter].detach().double().square().mean().sqrt()) or 1.0
        A, B = (torch.randn(f.shape, generator=generator, dtype=torch.float64) for f in (adapter.A, adapter.B))
        adapter.A.copy_(A)
        adapter.B.copy_(B * 0.5 * size / (SCALE * math.sqrt(RANK)))


def matrix_of(tensor: torch.Tensor, adapter: Adapter) -> torch.Tensor:
    """A weight's axes as (batch…, all out, all in), the batch as the factors have it."""
    sides, shape = adapter.layout.sides, adapter.layout.shape
    order = [k for side in "boi" for k, own in enumerate(sides) if own == side]
    out = math.prod(n for n, side in zip(shape, sides, strict=True) if side == "o")
    return tensor.reshape(shape).permute(order).reshape(*adapter.A.shape[:-2], out, -1)


def weight_of(matrix: torch.Tensor, adapter: Adapter) -> torch.Tensor:
    """The way back."""
    sides, shape = adapter.layout.sides, adapter.layout.shape
    order = [k for side in "boi" for k, own in enumerate(sides) if own == side]
    return matrix.reshape([shape[k] for k in order]).permute([order.index(k) for k in range(len(order))])


def factors(adapter: Adapter) -> tuple[torch.Tensor, torch.Tensor]:
    """A and B in float64, B with zero rows for the output features that are not adapted."""
    A, B = adapter.A.detach().double(), adapter.B.detach().double()
    if adapter.rows is not None:
        sides, shape = adapter.layout.sides, adapter.layout.shape
        out = math.prod(n for n, side in zip(shape, sides, strict=True) if side == "o")
        whole = B.new_zeros(*B.shape[:-2], out, B.shape[-1])
        whole[..., list(adapter.rows), :] = B
        B = whole
    return A, B


@dataclass
class _Sum:
    """A weight of the oracle that is W + Σ s·B·A, in float64."""

    parameter: nn.Parameter
    adapters: tuple[Adapter, ...]
    total: torch.Tensor
    size: torch.Tensor
    """Of what was added up: no partial sum is larger."""
    names: list[str]


class Oracle:
    """The base model with the dense sums in its weights."""

    def __init__(self, base: nn.Module, adapted: nn.Module) -> None:
        self.base, self.adapters = base, _adapters(adapted)
        self.model = copy.deepcopy(base)
        self.sums = list(self._written(adapted))

    def _written(self, adapted: nn.Module) -> Iterator[_Sum]:
        acting: dict[str, tuple[Adapter, ...]] = {}
        for place in inventory(adapted).places:
            for name in place.weights:
                acting[name] = (*acting.get(name, ()), place.adapter)
        owned: dict[int, dict[tuple[Adapter, ...], list[str]]] = {}
        parameters = dict(self.model.named_parameters(remove_duplicate=False))
        for name, parameter in parameters.items():
            owned.setdefault(id(parameter), {}).setdefault(acting.get(name, ()), []).append(name)
        for readers in owned.values():
            for adapters, names in readers.items():
                if adapters:
                    yield self._sum(parameters[names[0]], adapters, names, split=len(readers) > 1)

    def _sum(self, parameter: nn.Parameter, adapters: tuple[Adapter, ...], names: list[str], split: bool) -> _Sum:
        plain = parameter.detach().double()
        total, size = plain, plain.abs()
        for adapter in adapters:
            A, B = factors(adapter)
            total = total + weight_of(SCALE * (B @ A), adapter)
            size = size + weight_of(SCALE * (B.abs() @ A.abs()), adapter)
        if split:  # only some of its names read the sum
            parameter = nn.Parameter(parameter.detach().clone(), False)
            for name in names:
                path, _, attribute = name.rpartition(".")
                setattr(self.model.get_submodule(path), attribute, parameter)
        with torch.no_grad():
            parameter.copy_(total)
        return _Sum(parameter, adapters, total, size, names)

    def moved(self) -> Oracle:
        """The same with every weight moved by one rounding step, up or down."""
        other = copy.copy(self)
        memo: dict[int, Any] = {}
        other.model = copy.deepcopy(self.model, memo)
        other.sums = [_Sum(memo[id(s.parameter)], s.adapters, s.total, s.size, s.names) for s in self.sums]
        move_weights(other.model, torch.finfo(torch.float32).eps / 2)
        return other

    def outputs(self, inputs: Inputs, training: bool = False) -> tuple[list[torch.Tensor], list[float]]:
        """What the model must give, and how far rounding alone moves that."""
        wanted, moved = called(self.model, inputs, training), called(self.moved().model, inputs, training)
        noise = [relative_error(m, w, w) for m, w in zip(moved, wanted, strict=True)]
        with suppress(RuntimeError, NotImplementedError, TypeError):  # a kernel that takes no float64
            wide = called(copy.deepcopy(self.model).double(), cast_inputs(inputs, torch.float64), training)
            exact = [relative_error(w, x, x) for w, x in zip(wanted, wide, strict=True)]
            noise = [max(pair) for pair in zip(noise, exact, strict=True)] if all(map(math.isfinite, exact)) else noise
        return wanted, noise

    def dense_gradients(self, inputs: Inputs) -> list[torch.Tensor]:
        """Of each sum, in float64."""
        parameters = [one.parameter for one in self.sums]
        for parameter in parameters:
            parameter.requires_grad_(True)
        try:
            _, found = _loss(self.model, inputs, parameters)
        finally:
            self.model.requires_grad_(False)
        pairs = zip(self.sums, found, strict=True)
        return [torch.zeros_like(one.total) if g is None else g.double() for one, g in pairs]

    def without_effect(self, inputs: Inputs) -> set[str]:
        """The names of those weights that these outputs do not depend on."""
        pairs = zip(self.sums, self.dense_gradients(inputs), strict=True)
        return {name for one, gradient in pairs if not gradient.any() for name in one.names}

    def gradients(self, inputs: Inputs) -> dict[str, torch.Tensor]:
        """Of every factor, by the chain rule from the gradient of the dense sum:  s·Bᵀ·G  and  s·G·Aᵀ."""
        totals: dict[str, torch.Tensor] = {}
        number = {adapter: k for k, adapter in enumerate(self.adapters)}
        for one, gradient in zip(self.sums, self.dense_gradients(inputs), strict=True):
            for adapter in one.adapters:
                A, B = factors(adapter)
                G = matrix_of(gradient, adapter)
                rows = slice(None) if adapter.rows is None else list(adapter.rows)
                for label, own in (("A", SCALE * B.mT @ G), ("B", (SCALE * G @ A.mT)[..., rows, :])):
                    label = f"{label} of {number[adapter]}"
                    totals[label] = totals.get(label, torch.zeros_like(own)) + own
        return totals

    def check_folded(self, folded: nn.Module) -> None:
        """Each adapted weight is its sum, rounded once; everything else is the base's, bit for bit, in its classes.

        Raises:
            Wrong: something is not.
        """
        if classes(folded) != classes(self.base):
            raise Wrong("a folded module has not its original class")
        state, plain = bits(folded), bits(self.base)
        if list(state) != list(plain):
            raise Wrong("the folded model has other state_dict keys than the base")
        sums = {name: one for one in self.sums for name in one.names}
        parameters = dict(folded.named_parameters(remove_duplicate=False))
        for name, one in sums.items():
            if wrong := _misrounded(parameters[name].detach(), one):
                raise Wrong(f"{name}: {wrong} elements are not W + s·B·A, rounded once")
        for name, before in plain.items():
            if name not in sums and not same_bits(before, state[name]):
                raise Wrong(f"{name}: no adapter acts on it, and the fold has changed it")


def _misrounded(value: torch.Tensor, one: _Sum) -> int:
    """How many elements are further from the sum than half a step, and what float64 may have lost of the sum."""
    lost = sum(2 * RANK + 4 for _ in one.adapters) * torch.finfo(torch.float64).eps / 2 * one.size
    up, down = (torch.nextafter(value, torch.full_like(value, to)).double() for to in (math.inf, -math.inf))
    wide = value.double()
    right = ((down + wide) / 2 - lost <= one.total) & (one.total <= (up + wide) / 2 + lost)
    return int((~right).sum())
