"""Is the file the model? ONNX Runtime against torch, on the example inputs and on another shape."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from lora_fx.changes import safe_point
from lora_fx.checks.verification import (
    Report,
    as_real,
    cast_inputs,
    compare,
    copied,
    move_weights,
    noise_floor,
    overflows,
    rounding_step,
    widened,
)
from lora_fx.errors import CaptureError, essence
from lora_fx.export.onnx.calls import Call, graph_inputs, resized, tensors_in
from lora_fx.export.onnx.padding import Padded, attention_to_nothing, padded_rows
from lora_fx.export.onnx.processes import Apart, Said
from lora_fx.export.onnx.runtimes import CPU, refuse, refusing
from lora_fx.graph.capture import Inputs, does_not_run, no_fast_paths
from lora_fx.graph.own_state import undisturbed

_OTHER_SHAPES = 2


@dataclass(frozen=True)
class Comparison:
    """torch and ONNX Runtime on the same inputs."""

    shapes: tuple[tuple[int, ...], ...]
    """The shape of each input."""
    reports: tuple[Report, ...]
    """One for each output. Integers must be equal wherever rounding alone does not change them in torch: `error` is the
    share of the elements that differ, `noise` the share that rounding changes."""
    adapter: str = ""
    """Which one was in the slots of a switchable graph."""
    padded: tuple[Padded, ...] = ()
    """Rows of padding, in which a query attends to nothing: where torch has 0, they were held against the mean."""

    @property
    def equivalent(self) -> bool:
        return all(self.reports)

    @property
    def worst(self) -> Report:
        return max(self.reports, key=_excess)

    def __str__(self) -> str:
        shapes = " ".join("×".join(map(str, s)) or "scalar" for s in self.shapes)
        text = f"{shapes}{f' with {self.adapter}' if self.adapter else ''}: {self.worst}"
        if not self.padded:
            return text
        rows = ", ".join(map(str, self.padded))
        why = f"padding by {self.padded[0].mask}, where attention to nothing is 0 in torch and the mean in the file"
        return f"{text}; {rows} are {why}"


def _excess(report: Report) -> float:
    """How many times its bound an error is."""
    if not math.isfinite(report.error):
        return math.inf
    return report.error / report.bound if report.bound else (math.inf if report.error else 0.0)


def open_session(path: Path) -> tuple[Apart | None, str]:
    """A session on the CPU provider, in a process of its own; or None, and what that provider lacks."""
    with refusing("ONNX Runtime does not load the file", path.name, "try another opset"):
        try:
            return Apart(path), ""
        except Said as error:
            if type(error).__name__ != "NotImplemented":
                raise
            return None, f"{CPU} has no kernel for it: {essence(error)}"


def compare_runs(
    model: nn.Module,
    session: Apart,
    program: Any,
    call: Call,
    expected: list[torch.Tensor],
    factors: Mapping[str, torch.Tensor] | None = None,
) -> tuple[Comparison, ...]:
    """The example inputs, and other shapes where axes are dynamic, against the model as the user has it.

    Args:
        factors: what goes into the slots of a switchable graph.
    """
    runs = [(call.inputs, expected), *_other_shapes(model, program, call)]
    actual = [run_session(session, program, inputs, factors or {}) for inputs, _ in runs]
    reference, given, wide = _in_float64(model, runs)
    move_weights(reference, step := _step(model, call.inputs))
    moved = [run_torch(reference, inputs) for inputs in given]
    comparisons = []
    for (inputs, outputs), got, exact, shifted in zip(runs, actual, wide, moved, strict=True):
        shapes = tuple(tuple(tensor.shape) for _, tensor in graph_inputs(program, inputs))
        reports = tuple(_judge(*four) for four in zip(outputs, got, exact, shifted, strict=True))
        comparison, nothing = Comparison(shapes, reports), False
        if not all(reports):
            nothing, padded = _with_means(model, program, inputs, got, step)
            comparison = replace(comparison, **padded)
        if not comparison.equivalent:
            number = comparison.reports.index(comparison.worst)
            reason = f"ONNX Runtime is not the model, on inputs of shapes {comparison}"
            remedy = "nothing was written; try another opset, and report it to lora_fx if no opset helps"
            if nothing:
                reason += (
                    "; a query attends to nothing, as every key is masked: that is 0 in torch, the mean in the file"
                )
                remedy = "nothing was written; pass example inputs without padding, or export with opset=23"
            refuse(f"output {program.model.graph.outputs[number].name!r}", reason, remedy)
        comparisons.append(comparison)
    return tuple(comparisons)


def _in_float64(
    model: nn.Module, runs: Sequence[tuple[Inputs, list[torch.Tensor]]]
) -> tuple[nn.Module, list[Inputs], list[list[torch.Tensor]]]:
    """A copy, its inputs and its outputs; in the own dtype where it does not run in float64 (XGLM: the least number of
    that, in float32), or overflows."""
    reference, given = widened(model), [cast_inputs(inputs, torch.float64) for inputs, _ in runs]
    with suppress(CaptureError):
        wide = [run_torch(reference, inputs) for inputs in given]
        if not any(any(map(overflows, exact, outputs)) for exact, (_, outputs) in zip(wide, runs, strict=True)):
            return reference, given, wide
    reference, given = copied(model), [inputs for inputs, _ in runs]
    return reference, given, [run_torch(reference, inputs) for inputs in given]


def _with_means(
    model: nn.Module, program: Any, inputs: Inputs, got: list[torch.Tensor], step: float
) -> tuple[bool, dict[str, Any]]:
    """Whether a query attends to nothing; and if only rows of padding show it, what else a comparison has to say."""
    reference, wide = widened(model), cast_inputs(inputs, torch.float64)
    try:
        with attention_to_nothing(mean=False) as attention:
            zeros = run_torch(reference, wide)
        if not attention.met:
            return False, {}
        with attention_to_nothing(mean=True):
            exact = run_torch(reference, wide)
        padded = padded_rows(program, wide, zeros, exact, partial(run_torch, reference))
        if not padded:
            return True, {}
        move_weights(reference, step)
        with attention_to_nothing(mean=True):
            moved, expected = run_torch(reference, wide), run_torch(model, inputs)
    except CaptureError:  # it does not run below a dispatch mode, or step by step
        return False, {}
    reports = tuple(_judge(*four) for four in zip(expected, got, exact, moved, strict=True))
    return True, {"reports": reports, "padded": padded} if all(reports) else {}


def _judge(expected: torch.Tensor, got: torch.Tensor, exact: torch.Tensor, moved: torch.Tensor) -> Report:
    """One output: of torch in its own dtype, ONNX Runtime, torch in float64, and float64 with weights rounded once."""
    if expected.shape != got.shape or expected.dtype != got.dtype:
        theirs, ours = (f"{t.dtype} {tuple(t.shape)}" for t in (got, expected))
        reason = f"ONNX Runtime returns {theirs} where torch returns {ours}"
        refuse("output", reason, "nothing was written; an axis that changes may be missing in dynamic_shapes")
    if expected.is_floating_point():
        return compare(expected, got, exact, noise_floor(exact, moved, expected), expected.dtype)
    dtype = str(expected.dtype).removeprefix("torch.")
    if not expected.numel():
        return Report(0.0, 0.0, 0.0, 0.0, dtype, 1)
    undecided = (expected != exact) | (exact != moved)
    wrong, noise = (float(mask.double().mean()) for mask in ((expected != got) & ~undecided, undecided))
    return Report(wrong, float((expected.double() - got.double()).abs().max()), noise, 0.0, dtype, 1)


def _step(model: nn.Module, inputs: Inputs) -> float:
    """The coarsest rounding step of a weight, casts inside the model included where it can be captured."""
    try:
        return rounding_step(model, inputs)
    except CaptureError:  # it returns integers only
        return max((torch.finfo(p.dtype).eps / 2 for p in model.parameters() if p.is_floating_point()), default=0.0)


def run_torch(model: nn.Module, inputs: Inputs) -> list[torch.Tensor]:
    """Every tensor the model returns, in order, integers too; complex ones as pairs of reals, as ONNX has them."""
    safe_point()
    with undisturbed(model), torch.no_grad(), no_fast_paths():
        model.eval()
        with undisturbed(model, partial(inputs.call, model)):
            torch.manual_seed(0)
            try:
                output = inputs.call(model)
            except Exception as error:
                raise does_not_run(model, error) from error
            return [as_real(tensor.detach()).cpu().clone() for tensor in tensors_in(output)]


def run_session(
    session: Apart, program: Any, inputs: Inputs, factors: Mapping[str, torch.Tensor]
) -> list[torch.Tensor]:
    feeds = {value.name: as_real(t.detach()).cpu().numpy() for value, t in graph_inputs(program, inputs)}
    feeds |= {name: factor.numpy() for name, factor in factors.items()}
    shapes = {name: array.shape for name, array in feeds.items()}
    reason = f"ONNX Runtime does not run the file on inputs of shapes {shapes}"
    with refusing(reason, "the file", "nothing was written; make fewer axes dynamic, or try another opset"):
        return [torch.from_numpy(array) for array in session.run(feeds)]


def _other_shapes(model: nn.Module, program: Any, call: Call) -> list[tuple[Inputs, list[torch.Tensor]]]:
    """Inputs of other sizes on every dynamic axis, and what torch returns for them: two where it runs on two."""
    shapes = _symbolic_shapes(program)[: len(call.names)]
    sizes = _symbol_sizes(shapes, call.inputs)
    if not sizes:
        return []
    ranges = program.exported_program.range_constraints
    failure: Exception | None = None
    seen: dict[tuple[int, ...], tuple[Inputs, list[torch.Tensor]]] = {}
    named = {(n, axis): size for n, shape in enumerate(shapes) for axis, size in enumerate(shape)}
    labels = {named[at]: label for at, label in call.labels.items() if label and getattr(named[at], "is_symbol", False)}
    for drawn in _draws(sizes, ranges, any(p.is_cuda for p in model.parameters())):
        _agree(drawn, labels)
        inputs = _resized(call.inputs, shapes, drawn)
        try:
            seen.setdefault(tuple(drawn.values()), (inputs, run_torch(model, inputs)))
        except CaptureError as error:
            failure = error
        if len(seen) == _OTHER_SHAPES:
            break
    if not seen:
        reason = f"axes are dynamic, but the model ran on no other size than {sorted(sizes.values())}: {failure}"
        refuse("dynamic_shapes", reason, "make those axes static, or give their range: Dim(name, min=…, max=…)")
    return [*seen.values()]


def _symbolic_shapes(program: Any) -> list[tuple[Any, ...]]:
    """For each input tensor its sizes: numbers, or sympy expressions."""
    exported = program.exported_program
    values = {node.name: node.meta.get("val") for node in exported.graph.nodes if node.op == "placeholder"}
    return [
        tuple(size.node.expr if isinstance(size, torch.SymInt) else size for size in tensor.shape)
        for tensor in map(values.get, exported.graph_signature.user_inputs)
        if isinstance(tensor, torch.Tensor)
    ]


def _symbol_sizes(shapes: list[tuple[Any, ...]], inputs: Inputs) -> dict[Any, int]:
    """symbol → its value in the example inputs."""
    import sympy

    sizes: dict[Any, int] = {}
    for shape, tensor in zip(shapes, tensors_in(inputs), strict=True):
        for expression, size in zip(shape, tensor.shape, strict=True):
            free = list(getattr(expression, "free_symbols", ()))
            solutions = sympy.solve(expression - size, free[0]) if len(free) == 1 else ()
            for solution in (s for s in solutions if s.is_integer):
                sizes.setdefault(free[0], int(solution))
    return sizes


def _agree(drawn: dict[Any, int], labels: Mapping[Any, str]) -> None:
    """Axes of one name have one size, and one that is named as a sum has that sum, where torch saw no need of it."""
    sizes = {label: drawn[symbol] for symbol, label in reversed([*labels.items()]) if symbol in drawn}
    for symbol, label in labels.items():
        parts = label.split(" + ")
        if symbol in drawn and all(part in sizes for part in parts):
            drawn[symbol] = sum(sizes[part] for part in parts)


def _draws(sizes: dict[Any, int], ranges: Mapping[Any, Any], careful: bool) -> Iterator[dict[Any, int]]:
    """Sizes to try, each axis by its own step. Growing can leave a table of positions, which a GPU never forgives."""
    grow = [lambda size, n: size + 1 + n, lambda size, n: size * 2, lambda size, n: size + 8 * (n + 1)]
    shrink = [lambda size, n: size - 1 - n, lambda size, n: size // 2, lambda size, n: size - 1]
    for step in shrink + grow if careful else grow + shrink:
        drawn = {}
        for n, (symbol, size) in enumerate(sizes.items()):
            new, bounds = step(size, n), ranges.get(symbol)
            drawn[symbol] = int(max(1, bounds.lower, min(new, bounds.upper)) if bounds else max(1, new))
        if any(drawn[symbol] != size for symbol, size in sizes.items()):
            yield drawn


def _resized(inputs: Inputs, shapes: Sequence[tuple[Any, ...]], sizes: dict[Any, int]) -> Inputs:
    given = iter(shapes)

    def resize(leaf: Any) -> Any:
        for axis, expression in enumerate(next(given) if isinstance(leaf, torch.Tensor) else ()):
            if getattr(expression, "free_symbols", ()):
                leaf = resized(leaf, axis, int(expression.subs(sizes)))
        return leaf

    args, kwargs = pytree.tree_map(resize, (inputs.args, inputs.kwargs))
    return Inputs(args, kwargs)
