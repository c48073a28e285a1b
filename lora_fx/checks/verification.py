"""Are two models the same function? By how much do they differ, and is that noise?

No tolerance is set by hand. `verify` runs both models in their own dtype and one of them in float64: a model may be
as far from float64 as the other one is, give or take `SLACK`. What a float64 reference cannot say (a float64 model, a
model too large to copy) is measured by moving the weights by one rounding step and watching the output.
"""

from __future__ import annotations

import copy
import math
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from lora_fx.changes import Undo, in_turn, safe_point, undone
from lora_fx.checks.oracles import delta, delta_size
from lora_fx.deltas.adapter import Adapter
from lora_fx.errors import CaptureError, EquivalenceError, LoraFxError, PlanError, essence
from lora_fx.graph.capture import Inputs, does_not_run, normalize_inputs, output_tensors
from lora_fx.graph.nodes import is_float
from lora_fx.graph.own_state import uncompiled, undisturbed
from lora_fx.graph.places import (
    Instead,
    is_away,
    is_plain,
    loader,
    refuse_any_away,
    refuse_lazy,
    refuse_shards,
    storage_of,
    without_numbers,
)
from lora_fx.graph.program import WRITE_ELSEWHERE, capture
from lora_fx.graph.written import know_copy
from lora_fx.model.classes import unwired
from lora_fx.model.inventory import Storage, inventory

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


@in_turn()
def verify(before: nn.Module, after: nn.Module, example_inputs: Any = None) -> Report:
    """Whether two models are the same function on these inputs, up to rounding.

    Both run as they are (their own train/eval mode, no gradients); a float64 copy of `before` is the reference, or
    `before` itself where a kernel takes no float64.

    Raises:
        EquivalenceError: they return different numbers or shapes of tensors.
        CaptureError: a model does not run on the inputs, cannot be copied, or has weights that are not here as a whole.
    """
    inputs = normalize_inputs(before, example_inputs)
    for model in (before, after):
        refuse_unmeasurable(model)
    a, b = run(before, inputs), run(after, inputs)
    _same_structure(a, b)
    floors = noise_floors(before, inputs, a)
    return worst([compare(x, y, exact, noise, x.dtype) for x, y, (exact, noise) in zip(a, b, floors, strict=True)])


def noise_floors(model: nn.Module, inputs: Inputs, outputs: Sequence[torch.Tensor]) -> list[tuple[torch.Tensor, float]]:
    """For each output: its float64 value, and what rounding alone does to it, relative to its root mean square.

    That is how far the model's own output is from float64, or how far the output moves when each weight moves by one
    rounding step, whichever is more.
    """
    step = rounding_step(model, inputs)
    wide, wide_inputs, exact = in_float64(model, inputs)
    move_weights(wide, step)
    moved = run(wide, wide_inputs)
    return [(w, noise_floor(w, x, m)) for x, w, m in zip(outputs, exact, moved, strict=True)]


def in_float64(model: nn.Module, inputs: Inputs) -> tuple[nn.Module, Inputs, list[torch.Tensor]]:
    """A float64 copy, its inputs and its outputs; in the own dtype where a kernel takes no float64 (`grouped_mm`), or
    where numbers of the model's own overflow in it."""
    wide, wide_inputs = widened(model), cast_inputs(inputs, torch.float64)
    exact: list[torch.Tensor] | None = None
    with suppress(CaptureError):
        exact = run(wide, wide_inputs)
        if all(bool(t.isfinite().any()) for t in exact if t.numel()):
            return wide, wide_inputs, exact
    own = copied(model)
    outputs = run(own, inputs)
    if exact is not None and not any(map(overflows, exact, outputs)):
        return wide, wide_inputs, exact
    return own, inputs, outputs


def overflows(exact: torch.Tensor, own: torch.Tensor) -> bool:
    """In float64 no number is left of an output: a mask of the least number of a dtype, times 0 in another one."""
    return not bool(exact.isfinite().any()) and bool(own.isfinite().any())


def noise_floor(exact: torch.Tensor, *others: torch.Tensor) -> float:
    """How far the others are from float64, at most. What is not finite only in one of them, where a mask overflows in
    another dtype, says nothing of rounding: a bound that anything would keep."""
    return max(filter(math.isfinite, (relative_error(other, exact, exact) for other in others)), default=0.0)


def widened(model: nn.Module) -> nn.Module:
    """A copy in float64; what is complex stays so."""
    return copied(model)._apply(partial(_cast, torch.float64))


def copied(model: nn.Module) -> nn.Module:
    """A copy that shares nothing.

    Raises:
        CaptureError: some part of the model cannot be copied.
    """
    try:
        made = copy.deepcopy(model)
        know_copy(model, made)
        return made
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise CaptureError(
            f"{type(model).__name__} cannot be copied: {essence(error)}",
            place="copy.deepcopy(model)",
            remedy="do it in place, without a copy; verify needs one",
        ) from error


def refuse_unmeasurable(model: nn.Module) -> None:
    """Raise where some of a model's weights are not here as a whole.

    Raises:
        CaptureError: they are on meta, put away by accelerate, or in parts.
    """
    refuse_lazy(model)
    refuse_shards(model)
    refuse_any_away(model, "its uses cannot be measured", CaptureError)
    if without_numbers(model):
        raise CaptureError(
            "parameters are on meta: there is nothing to measure",
            place=type(model).__name__,
            remedy="materialise the model first",
        )


def _cast(dtype: torch.dtype, tensor: torch.Tensor) -> torch.Tensor:
    if tensor.is_complex():
        return tensor.to(dtype.to_complex())
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


@torch.no_grad()
def move_weights(model: nn.Module, step: float) -> None:
    """Every plain parameter by one rounding step, in place; below float64 by a whole one, which is not rounded away."""
    draws = Draws(0)
    for parameter in model.parameters():
        if parameter.is_floating_point() and is_plain(parameter):
            least = 0.0 if parameter.dtype == torch.float64 else torch.finfo(parameter.dtype).eps
            for part in _pieces(parameter.detach()):
                part.copy_(part.to(torch.float64) * dither(part, max(step, least), draws))


def _pieces(tensor: torch.Tensor) -> Sequence[torch.Tensor]:
    """What it consists of, in pieces that lie in a CPU's caches: fresh memory costs more than the numbers."""
    return tensor.view(-1).split(2**14) if tensor.is_cpu and tensor.is_contiguous() else (tensor,)


def compare(a: torch.Tensor, b: torch.Tensor, reference: torch.Tensor, noise: float, dtype: torch.dtype) -> Report:
    """One output tensor of two models; `noise` is relative to the reference's root mean square."""
    noise = max(noise, torch.finfo(dtype).eps / 2)
    difference = (a.to(torch.float64) - b.to(torch.float64)).abs()
    largest = float(difference.max()) if difference.numel() else 0.0
    error = relative_error(a, b, reference)
    return Report(error, largest, noise, SLACK * noise, str(dtype).removeprefix("torch."), 1)


def compare_all(
    outputs: Sequence[torch.Tensor], exact: Sequence[torch.Tensor], moved: Sequence[torch.Tensor]
) -> Report:
    """Each output against what it must be; the noise is how far that moves with weights that are rounded once more."""
    triples = zip(outputs, exact, moved, strict=True)
    return worst([compare(y, e, e, noise_floor(e, m), y.dtype) for y, e, m in triples])


def worst(reports: Sequence[Report]) -> Report:
    top = max(reports, key=lambda r: r.error / r.bound if math.isfinite(r.error) else math.inf)
    return Report(top.error, top.largest, top.noise, top.bound, top.dtype, len(reports))


def run(model: nn.Module, inputs: Inputs, seed: int = 0) -> list[torch.Tensor]:
    """The floating-point outputs, without gradients and without a trace; random draws start from `seed`.

    Raises:
        CaptureError: the model does not run on these inputs in its mode, or returns no such tensor.
    """
    return _run(model, inputs, seed)[0]


def _run(model: nn.Module, inputs: Inputs, seed: int = 0) -> tuple[list[torch.Tensor], frozenset[int]]:
    """As `run`, and the storages of the parameters that it is known to write to."""
    safe_point()
    with torch.no_grad(), undisturbed(model, partial(inputs.call, model)) as writes:
        torch.manual_seed(seed)
        outputs = [as_real(t.detach()).clone() for t in output_tensors(called(model, inputs))]
    return outputs, writes.written


def called(model: nn.Module, inputs: Inputs) -> Any:
    """What the model returns; what it raises, but for want of memory, as a `CaptureError`."""
    try:
        return inputs.call(model)
    except (MemoryError, torch.OutOfMemoryError, LoraFxError):
        raise
    except Exception as error:
        raise does_not_run(model, error) from error


def as_real(tensor: torch.Tensor) -> torch.Tensor:
    """Real and imaginary parts side by side, of a complex one."""
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


def relative_error(a: torch.Tensor, b: torch.Tensor, reference: torch.Tensor) -> float:
    a, b, reference = a.to(torch.float64), b.to(torch.float64), reference.to(torch.float64)
    same = (a == b) | (a.isnan() & b.isnan())  # infinities of a mask on both sides are no difference
    difference = torch.where(same, 0.0, a - b)
    if not difference.numel():
        return 0.0
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
    """Floating-point ones in this dtype, complex ones in the complex dtype of it."""
    args, kwargs = pytree.tree_map_only(torch.Tensor, partial(_cast, dtype), (inputs.args, inputs.kwargs))
    return Inputs(args, kwargs)


def rounding_step(model: nn.Module, inputs: Inputs) -> float:
    """The coarsest rounding step at which the model multiplies with a weight."""
    stored = max((torch.finfo(p.dtype).eps / 2 for p in model.parameters() if p.is_floating_point()), default=0.0)
    with suppress(CaptureError), uncompiled(), _Rounding() as rounding:
        run(model, inputs)
        if rounding.step <= stored:
            return stored
    # Some op puts out what is rounded more coarsely: whether that is a weight, or a product with one, a capture knows.
    return max([stored, *(use.rounding for use in capture(model, inputs).uses if use.multiplies)])


class _Rounding(TorchDispatchMode):
    """The coarsest rounding step of what any op puts out."""

    supports_higher_order_operators = True  # `torch.cond` is one
    step = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        made = [t.dtype for t in pytree.tree_leaves(out) if isinstance(t, torch.Tensor) and is_float(t)]
        self.step = max([self.step, *(torch.finfo(dtype).eps / 2 for dtype in made)])
        return out


class Draws:
    """Random numbers on the device on which they are wanted: to draw a large model's on the CPU takes minutes."""

    def __init__(self, seed: int) -> None:
        self._seed, self._generators = seed, dict[torch.device, torch.Generator]()

    def on(self, device: torch.device) -> torch.Generator:
        """The generator of a device, which goes on where its last draw has ended."""
        if device not in self._generators:
            self._generators[device] = torch.Generator(device).manual_seed(self._seed)
        return self._generators[device]


def dither(weight: torch.Tensor, step: float, draws: Draws) -> torch.Tensor:
    """1 ± step, a sign for each element: whole rows or columns could be scaled without effect before a norm."""
    device = weight.device
    signs = torch.randint(0, 2, weight.shape, generator=draws.on(device), device=device, dtype=torch.int8)
    return signs.mul_(2).sub_(1).to(torch.float64).mul_(step).add_(1)


# ── against the dense sums ───────────────────────────────────────────────────────────────────────────────────────────


class NotServed(EquivalenceError):
    """The model runs, or trains, with W + δ in its weights, and not with what its code reads in their place."""


@dataclass(frozen=True)
class NotRun:
    """The model itself does not run in train mode on these inputs: nothing was compared there."""

    why: str

    def __str__(self) -> str:
        return f"In train mode the model does not run on the example inputs ({self.why}): checked in eval mode alone."


def check_once(
    model: nn.Module, inputs: Inputs, training: bool, rounding: Mapping[int, float], undo: list[Undo]
) -> Report | NotRun:
    """The adapted model, with the factors it has, against the one with the dense W + δ in place of each weight.

    The sums are written into the base weights, and taken out again bit for bit.

    Args:
        training: train mode, or eval mode.
        rounding: storage → one rounding step of the weight where the model multiplies with it (`Program.rounding`).
        undo: the list of the change that this is a part of: a check that is interrupted is undone with it.

    Raises:
        EquivalenceError: the adapted model returns other tensors, or (`NotServed`) does not run where the other does.
    """
    with in_mode(model, training):
        with unwired(model):
            with with_dense_weights(model, undo):
                dense = run_itself(model, inputs, training)
            if isinstance(dense, NotRun):
                return dense
            with with_dense_weights(model, undo, rounding):
                moved = run(model, inputs)
        adapted = run_adapted(model, inputs)
    _same_structure(adapted, dense)
    return compare_all(adapted, dense, moved)


def run_itself(model: nn.Module, inputs: Inputs, training: bool) -> list[torch.Tensor] | NotRun:
    """The outputs of a model without adapters; in train mode not every one runs on every input."""
    try:
        return run(model, inputs)
    except CaptureError as error:
        if not training:
            raise
        return NotRun(essence(error).partition("\n")[0])


def run_adapted(model: nn.Module, inputs: Inputs) -> list[torch.Tensor]:
    """The outputs of an adapted model that runs without its adapters.

    Raises:
        NotServed: it does not run with them.
        PlanError: in its mode it writes to a weight that has some: after that, W + δ is another sum.
    """
    try:
        outputs, written = _run(model, inputs)
    except CaptureError as error:
        raise NotServed(
            f"the adapted model does not run where the model with W + δ does: {essence(error)}",
            place=culprit(model, error) or type(model).__name__,
            remedy=f"{nested(model)}leave out what its forward reads in another way, with a rule without a rank",
        ) from error
    for storage in inventory(model).storages() if written else ():
        if storage_of(storage.parameter) in written:
            raise PlanError(
                f"in {'train' if model.training else 'eval'} mode the model itself writes to the weight while it runs",
                place=" = ".join(storage.names),
                remedy=f"{WRITE_ELSEWHERE}; or leave it out",
            )
    return outputs


def nested(model: nn.Module) -> str:
    """What to do first where torch's encoder may have taken its fast path, in which positions that are padded are left
    out: it reads weights past their adapters, so that an adapted one does not take it. Empty where there is none."""
    found = [n for n, m in model.named_modules()
             if isinstance(m, nn.TransformerEncoder) and getattr(m, "use_nested_tensor", False)]  # fmt: skip
    return f"set use_nested_tensor = False on {found[0] or 'the model'}, if padding is masked; or " if found else ""


def culprit(model: nn.Module, error: BaseException) -> str:
    """A weight of the innermost adapted module whose code an error came out of; empty where there is none."""
    weights = {m: " = ".join(own.names) for own in reversed(inventory(model).storages()) for m, _ in own.owners}
    while error.__cause__ is not None:
        error = error.__cause__
    found = ""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        code = frame.f_code
        module = frame.f_locals.get(code.co_varnames[0]) if code.co_argcount else None
        if isinstance(module, nn.Module):
            found = weights.get(module, found)
    return found


@contextmanager
def in_mode(model: nn.Module, training: bool) -> Iterator[None]:
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
def filled(
    model: nn.Module, adapters: Sequence[Adapter], seed: int, undo: list[Undo], whole: bool = False
) -> Iterator[None]:
    """Random factors, with a delta half as large as its weight; then the old ones again.

    Args:
        whole: adapt every output feature of large weights, too, of which nobody then keeps what they were.
    """
    storages = {a: storage for storage in inventory(model).storages() for a in storage.adapters}
    generator = torch.Generator().manual_seed(seed)
    with undone(undo):
        for adapter in dict.fromkeys(adapters):
            _keep(adapter, undo)
            _fill(adapter, storages[adapter].weight if adapter in storages else None, generator, whole)
        yield


def _keep(adapter: Adapter, undo: list[Undo]) -> None:
    for parameter in adapter.parameters():
        undo.append(partial(parameter.detach().copy_, parameter.detach().clone()))


@contextmanager
def silent(storages: Sequence[Storage], undo: list[Undo]) -> Iterator[None]:
    """θ of all adapters as it starts, with δ = 0; then what it was."""
    adapters = [(adapter, storage.weight) for storage in storages for adapter in storage.adapters]
    devices = {adapter.device for adapter, _ in adapters if adapter.device.type == "cuda"}
    with undone(undo):
        with torch.random.fork_rng(devices):
            for adapter, weight in adapters:
                _keep(adapter, undo)
                adapter.start(weight)
        yield


#: of the way from where θ starts to what it is: much to what is measured in float64, and next to nothing in float32
_QUIET = 2.0**-30


@contextmanager
def quiet(storages: Sequence[Storage], undo: list[Undo]) -> Iterator[None]:
    """θ of what is no delta so near to where it starts that a model which looks at numbers, as a router does, decides
    as it does without adapters; then what it was."""
    adapters = [(a, storage.weight) for storage in storages for a in storage.adapters if not a.kind.is_delta]
    devices = {adapter.device for adapter, _ in adapters if adapter.device.type == "cuda"}
    filled = [(p, p.detach().clone()) for adapter, _ in adapters for p in adapter.parameters()]
    with undone(undo), torch.no_grad():
        with torch.random.fork_rng(devices):
            for adapter, weight in adapters:
                _keep(adapter, undo)
                adapter.start(weight)
        for parameter, was in filled:
            parameter.lerp_(was, _QUIET)
        yield


@contextmanager
def rounded_once_more(storages: Sequence[Storage], rounding: Mapping[int, float], undo: list[Undo]) -> Iterator[None]:
    """A and B of all adapters moved by as much as the model rounds them at the weight (`Program.rounding`)."""
    draws = Draws(2)
    with undone(undo), torch.no_grad():
        for storage in storages:
            step = rounding.get(storage_of(storage.parameter), torch.finfo(storage.parameter.dtype).eps / 2)
            for factor in (p.detach() for adapter in storage.adapters for p in adapter.parameters()):
                undo.append(partial(factor.copy_, factor.clone()))
                factor.mul_(dither(factor, step, draws))
        yield


#: bytes of weight elements that the check keeps a copy of, for each weight
_KEPT = 2**22


@torch.no_grad()
def _fill(adapter: Adapter, weight: torch.Tensor | None, generator: torch.Generator, whole: bool) -> None:
    """θ with a delta half as large as its weight: of `lora` A and B have variance 1 / in and 1 / rank, B times half the
    weight's root mean square."""
    if adapter.kind.name != "lora":
        if weight is not None:
            scatter(adapter, weight, generator, 0.5)
        return
    for factor, fan in ((adapter.A, adapter.A.shape[-1]), (adapter.B, adapter.width)):
        factor.copy_(torch.randn(factor.shape, generator=generator, dtype=torch.float32) / math.sqrt(fan))
    inputs = adapter.A.shape[-1]
    size = 0.0 if weight is None else _size(weight)
    adapter.B.mul_(0.5 * (size * math.sqrt(inputs) if size else 1.0) / (adapter.multiplier or 1.0))
    rows = adapter.B.shape[-2]
    kept = max(1, _KEPT // (4 * adapter.A[..., 0, :].numel()))
    if rows > kept and not whole:
        chosen = torch.randperm(rows, generator=generator)[:kept].to(adapter.B.device)
        mask = torch.ones(rows, dtype=torch.bool, device=adapter.B.device)
        mask[chosen] = False
        adapter.B.masked_fill_(mask.unsqueeze(-1), 0.0)


@torch.no_grad()
def scatter(adapter: Adapter, weight: torch.Tensor, generator: torch.Generator, share: float) -> None:
    """Move θ, of any kind, at random, as far as makes the delta about `share` as large as the weight (within twice).

    What is not 0 moves by up to half its own size, and by no more where something else can move: so a size stays away
    from 0, and W + δ from being a small difference of large numbers.
    """
    before = {name: p.detach().clone() for name, p in adapter.named_parameters()}
    free = [name for name, p in before.items() if not bool(p.any())]
    noise = {}
    for name, p in before.items():
        if name in free:
            noise[name] = torch.randn(p.shape, generator=generator, dtype=torch.float64) * p.shape[-1] ** -0.5
        else:
            noise[name] = (torch.rand(p.shape, generator=generator, dtype=torch.float64) - 0.5) * _size(p)
    if not adapter.kind.is_delta:  # it has no delta to be of a size
        for name, parameter in adapter.named_parameters():
            parameter.copy_(before[name] + noise[name].to(parameter.device))
        return
    wanted, step, last = share * (_size(weight) or 1.0), 1.0, 0.0
    for _ in range(64):
        for name, parameter in adapter.named_parameters():
            own = min(step, 1.0) if free and name not in free else step
            parameter.copy_(before[name] + own * noise[name].to(parameter.device))
        found = delta_size(weight, adapter)
        if wanted / 2 <= found <= wanted * 2 or (found < wanted and found < 1.25 * last):  # a delta may be bounded
            break
        step, last = (step * 2.0, found) if found < wanted else (step / 2.0, 0.0)


def _size(tensor: torch.Tensor) -> float:
    """Root mean square, of large ones that of a part: every so manyth index of the first axis."""
    some = tensor.detach()[:: max(1, tensor.numel() // _SOME)]
    return float(some.norm(dtype=torch.float64)) / math.sqrt(max(some.numel(), 1))


_SOME = 2**16


@contextmanager
def with_dense_weights(
    model: nn.Module, undo: list[Undo], rounding: Mapping[int, float] | None = None
) -> Iterator[None]:
    """Inside, every adapted parameter holds W + Σ δ, from A and B alone; moved by one `rounding` step."""
    draws = Draws(1)
    with undone(undo):
        for storage in inventory(model).storages():
            if not any(adapter.kind.is_delta for adapter in storage.adapters):  # the weight stays what it is
                continue
            parameter = storage.parameter
            least = torch.finfo(parameter.dtype).eps / 2
            step = None if rounding is None else max(rounding.get(storage_of(parameter), 0.0), least)
            if is_away(*storage.owners[0]):
                for owner, attribute in storage.owners:
                    hook = loader(owner)
                    undo.append(partial(setattr, hook, "weights_map", hook.weights_map))
                    hook.weights_map = Instead(hook.weights_map, attribute, partial(_dense, storage, step, draws))
                continue
            weight = parameter.detach()
            own = delta(weight, *storage.adapters).to(parameter.device)
            axis = storage.adapters[0].layout.sides.index("o")
            rows = own.movedim(axis, 0).unsqueeze(-1).flatten(1)
            changed = rows.any(1).nonzero().flatten()  # output features: a mask would be as large as the weight
            old = weight.index_select(axis, changed)
            if storage.split:
                undo.append(partial(storage.replace, parameter))
                weight = weight.clone()
                storage.replace(nn.Parameter(weight, False))
            else:
                undo.append(partial(weight.index_copy_, axis, changed, old))
            new = own.index_select(axis, changed).add_(old)
            if step is not None:
                new *= dither(new, step, draws)
            weight.index_copy_(axis, changed, new.to(weight.dtype))
        yield


def _dense(storage: Storage, step: float | None, draws: Draws, weight: torch.Tensor) -> torch.Tensor:
    """W + Σ δ of a weight that is loaded for a forward."""
    weight = weight.to(next(storage.adapters[0].parameters()).device)
    total = weight.to(torch.float64) + delta(weight, *storage.adapters)
    if step is not None:
        total *= dither(weight, step, draws)
    return total.to(weight.dtype)
