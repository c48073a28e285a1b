"""Are two models the same function? By how much do they differ, and is that noise?

No tolerance is set by hand. `verify` runs both models in their own dtype and one of them in float64: a model may be
as far from float64 as the other one is, give or take `SLACK`. What a float64 reference cannot say (a float64 model, a
model too large to copy) is measured by moving the weights by one rounding step and watching the output.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from lora_fx import wiring
from lora_fx.adapter import Adapter
from lora_fx.errors import EquivalenceError
from lora_fx.frontend import Inputs, normalize_inputs, output_tensors, undisturbed
from lora_fx.program import capture

#: How many times the noise floor an error may be. Two computations of one function differ by a sum of as many
#: rounding errors as there are terms. On every architecture of the zoo a lost branch is more than ten times the bound
#: (tests/test_laws.py measures that).
SLACK = 16.0


@dataclass(frozen=True)
class Report:
    """What `verify` measured, for the output tensor that is worst."""

    error: float
    """Root mean square difference of the two models, relative to the reference's root mean square."""
    largest: float
    """Largest absolute difference of one element."""
    noise: float
    """The noise floor: what rounding alone does to this output, relative like `error`."""
    bound: float
    """`SLACK` × noise."""
    dtype: str
    outputs: int
    """How many output tensors were compared."""

    @property
    def equivalent(self) -> bool:
        return self.error <= self.bound

    def __bool__(self) -> bool:
        return self.equivalent

    def __str__(self) -> str:
        verdict = "equivalent" if self.equivalent else "DIFFERENT"
        return (
            f"{verdict}: error {self.error:.3g} against a bound of {self.bound:.3g} (noise floor {self.noise:.3g}, "
            f"largest difference {self.largest:.3g}, {self.outputs} outputs in {self.dtype})"
        )


def verify(before: nn.Module, after: nn.Module, example_inputs: Any = None) -> Report:
    """Whether two models are the same function on these inputs, up to rounding.

    Both run as they are (their own train/eval mode, no gradients); a float64 copy of `before` is the reference.

    Raises:
        EquivalenceError: they return different numbers or shapes of tensors.
        CaptureError: a model does not run on the inputs.
    """
    inputs = normalize_inputs(before, example_inputs)
    a, b = run(before, inputs), run(after, inputs)
    _same_structure(a, b)
    reference = copy.deepcopy(before).to(torch.float64)
    wide = [t.to(torch.float64) for t in run(reference, cast_inputs(inputs, torch.float64))]
    floor = _sensitivity(reference, cast_inputs(inputs, torch.float64), wide, rounding_step(before, inputs))
    return worst(
        [
            compare(x, y, w, max(f, relative_error(x, w, w)), x.dtype)
            for x, y, w, f in zip(a, b, wide, floor, strict=True)
        ]
    )


def compare(a: torch.Tensor, b: torch.Tensor, reference: torch.Tensor, noise: float, dtype: torch.dtype) -> Report:
    """One output tensor of two models; `noise` is relative to the reference's root mean square."""
    noise = max(noise, torch.finfo(dtype).eps / 2)
    difference = (a.to(torch.float64) - b.to(torch.float64)).abs()
    largest = float(difference.max()) if difference.numel() else 0.0
    error = relative_error(a, b, reference)
    return Report(error, largest, noise, SLACK * noise, str(dtype).removeprefix("torch."), 1)


def worst(reports: Sequence[Report]) -> Report:
    top = max(reports, key=lambda r: r.error / r.bound if math.isfinite(r.error) else math.inf)
    return Report(top.error, top.largest, top.noise, top.bound, top.dtype, len(reports))


def run(model: nn.Module, inputs: Inputs, seed: int = 0) -> list[torch.Tensor]:
    """The floating-point outputs, without gradients and without a trace; random draws start from `seed`."""
    with undisturbed(model), torch.no_grad():
        torch.manual_seed(seed)
        return [t.detach().clone() for t in output_tensors(inputs.call(model))]


def relative_error(a: torch.Tensor, b: torch.Tensor, reference: torch.Tensor) -> float:
    a, b, reference = a.to(torch.float64), b.to(torch.float64), reference.to(torch.float64)
    same = (a == b) | (a.isnan() & b.isnan())  # infinities of a mask on both sides are no difference
    difference = torch.where(same, 0.0, a - b)
    if not bool(difference.isfinite().all()):
        return math.inf
    size = torch.where(reference.isfinite(), reference, 0.0).square().mean().sqrt()
    error = difference.square().mean().sqrt()
    return float(error / size) if float(size) > 0 else (0.0 if float(error) == 0 else math.inf)


def _same_structure(a: list[torch.Tensor], b: list[torch.Tensor]) -> None:
    shapes = [tuple(t.shape) for t in a], [tuple(t.shape) for t in b]
    if shapes[0] != shapes[1]:
        raise EquivalenceError(
            f"one model returns tensors of shapes {shapes[0]}, the other {shapes[1]}",
            place="output",
            remedy="compare models of the same interface",
        )


def cast_inputs(inputs: Inputs, dtype: torch.dtype) -> Inputs:
    def cast(leaf: Any) -> Any:
        return leaf.to(dtype) if isinstance(leaf, torch.Tensor) and leaf.is_floating_point() else leaf

    args, kwargs = pytree.tree_map(cast, (inputs.args, inputs.kwargs))
    return Inputs(args, kwargs)


def rounding_step(model: nn.Module, inputs: Inputs) -> float:
    """The coarsest rounding step at which the model multiplies with a weight."""
    steps = [torch.finfo(p.dtype).eps / 2 for p in model.parameters() if p.is_floating_point()]
    return max([*steps, *(use.rounding for use in capture(model, inputs).uses if use.multiplies)], default=0.0)


def _sensitivity(model: nn.Module, inputs: Inputs, outputs: list[torch.Tensor], step: float) -> list[float]:
    """How far the outputs move when each weight moves by one rounding step. Writes into `model`."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.mul_(dither(parameter, step, generator))
    return [relative_error(t, out, out) for t, out in zip(run(model, inputs), outputs, strict=True)]


def dither(weight: torch.Tensor, step: float, generator: torch.Generator) -> torch.Tensor:
    """1 ± step, a sign for each element: whole rows or columns could be scaled without effect before a norm."""
    signs = torch.randint(0, 2, weight.shape, generator=generator) * 2 - 1
    return 1 + step * signs.to(weight.device, torch.float64)


# ── the self-check of `apply` ────────────────────────────────────────────────────────────────────────────────────────


def check_adapted(model: nn.Module, inputs: Inputs, adapters: Sequence[Adapter], rounding: Mapping[int, float]) -> None:
    """The adapted model must equal the base model with the dense W + s·B·A in place of each weight.

    B is nonzero while this runs. The dense sums are written into the base weights, and taken out again bit for bit;
    what is kept for that is bounded: of large weights only some output features are adapted.

    Args:
        rounding: storage → one rounding step of the weight where the model multiplies with it (`Program.rounding`).

    Raises:
        EquivalenceError: it does not, in train or in eval mode. A is what it was, B too, and every weight.
    """
    if any(t.is_meta for t in model.parameters()):
        return
    failure: Report | None = None
    for seed in range(3):  # rounding can flip a router's choice: such an error goes away with other numbers
        with _filled(list(dict.fromkeys(adapters)), seed):
            reports = [_check_once(model, inputs, training, rounding) for training in (False, True)]
        failure = worst(reports)
        if all(reports):
            return
    raise EquivalenceError(
        f"the adapted model is not the model with W + s·B·A: {failure}",
        place=_suspect(model, inputs, adapters, rounding),
        remedy="exclude that weight with a rule without a rank; its forward reads the weight in an unseen way",
    )


def _check_once(model: nn.Module, inputs: Inputs, training: bool, rounding: Mapping[int, float]) -> Report:
    with _mode(model, training):
        adapted = run(model, inputs)
        with wiring.unwired(model):
            with _dense_weights(model):
                dense = run(model, inputs)
            with _dense_weights(model, rounding):
                moved = run(model, inputs)
    _same_structure(adapted, dense)
    return worst(
        [compare(a, d, d, relative_error(m, d, d), a.dtype) for a, d, m in zip(adapted, dense, moved, strict=True)]
    )


@contextmanager
def _mode(model: nn.Module, training: bool) -> Iterator[None]:
    """Every module in train or eval mode, with the dropout of branches off."""
    flags = [(m, m.training) for m in model.modules()]
    try:
        for module in model.modules():
            module.training = training
        for module in model.modules():
            if isinstance(module, Adapter):
                module.training = module.dropout.training = False
        yield
    finally:
        for module, was in flags:
            module.training = was


@contextmanager
def _filled(adapters: Sequence[Adapter], seed: int) -> Iterator[None]:
    """Random factors, with a delta about as large as a usual weight; then the old ones again."""
    saved = [(p, p.detach().clone()) for adapter in adapters for p in adapter.parameters()]
    generator = torch.Generator().manual_seed(seed)
    try:
        with torch.no_grad():
            for adapter in adapters:
                _fill(adapter, generator)
        yield
    finally:
        with torch.no_grad():
            for parameter, old in saved:
                parameter.copy_(old)


#: bytes of weight elements that the check keeps a copy of, for each weight
_KEPT = 2**22


def _fill(adapter: Adapter, generator: torch.Generator) -> None:
    for factor, fan in ((adapter.A, adapter.A.shape[-1]), (adapter.B, adapter.rank)):
        values = torch.randn(factor.shape, generator=generator, dtype=torch.float32)
        factor.copy_(values * (0.5 / math.sqrt(fan)))
    if adapter.scale:
        adapter.B.div_(adapter.scale)
    rows = adapter.B.shape[-2]
    kept = max(1, _KEPT // (4 * adapter.A[..., 0, :].numel()))
    if rows > kept:
        chosen = torch.randperm(rows, generator=generator)[:kept].to(adapter.B.device)
        mask = torch.ones(rows, dtype=torch.bool, device=adapter.B.device)
        mask[chosen] = False
        adapter.B.masked_fill_(mask.unsqueeze(-1), 0.0)


@contextmanager
def _dense_weights(model: nn.Module, rounding: Mapping[int, float] | None = None) -> Iterator[None]:
    """Inside, every adapted parameter holds W + Σ s·B·A, from A and B alone; moved by one `rounding` step."""
    generator = torch.Generator().manual_seed(1)
    undo: list[tuple] = []
    try:
        with torch.no_grad():
            for storage in wiring.adapted_storages(model):
                parameter = storage.parameter
                delta = sum(_delta(a) for a in storage.adapters).to(parameter.device)  # type: ignore[union-attr]
                changed = delta != 0
                if storage.split:
                    undo.append((storage, None, parameter, None))
                    parameter = nn.Parameter(parameter.detach().clone(), False)
                    storage.replace(parameter)
                else:
                    undo.append((None, changed, parameter, parameter.detach()[changed].clone()))
                new = parameter.detach().to(torch.float64) + delta
                if rounding is not None:
                    step = rounding.get(storage.parameter.untyped_storage()._cdata, 0.0)
                    new *= dither(parameter, max(step, torch.finfo(parameter.dtype).eps / 2), generator)
                parameter.detach()[changed] = new.to(parameter.dtype)[changed]
        yield
    finally:
        with torch.no_grad():
            for storage, changed, parameter, old in reversed(undo):
                if storage is not None:
                    storage.replace(parameter)
                else:
                    parameter.detach()[changed] = old


def _delta(adapter: Adapter) -> torch.Tensor:
    """s·B·A in float64 and the weight's axes. Written again on purpose: a check shares no algebra with its subject."""
    layout, rank = adapter.layout, adapter.rank
    A = adapter.A.detach().to(torch.float64)
    B = adapter.B.detach().to(torch.float64)
    scale = adapter.alpha / (math.sqrt(rank) if adapter.scaling == "rslora" else rank)
    out = torch.zeros(*layout.batch, layout.size("o"), layout.size("i"), dtype=torch.float64, device=A.device)
    rows = list(range(layout.size("o"))) if adapter.rows is None else list(adapter.rows)
    out[..., rows, :] = scale * torch.einsum("...or,...ri->...oi", B, A)
    order = [k for side in "boi" for k, s in enumerate(layout.sides) if s == side]
    return out.reshape([layout.shape[k] for k in order]).permute([order.index(k) for k in range(len(order))])


def _suspect(model: nn.Module, inputs: Inputs, adapters: Sequence[Adapter], rounding: Mapping[int, float]) -> str:
    """The first weight whose adapter alone makes the difference."""
    names = {a: f"{path}.{wiring.attribute_of(c)}".lstrip(".") for path, _, c, a in wiring.find_adapters(model)}
    distinct = list(dict.fromkeys(adapters))
    for adapter in distinct if len(distinct) <= 256 else ():
        with _filled([adapter], 0):
            if not all(_check_once(model, inputs, training, rounding) for training in (False, True)):
                return names[adapter]
    return "several weights together"
