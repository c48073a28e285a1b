"""Are two files one function? ONNX Runtime on both, on random inputs of two shapes.

    |new(x) − old(x)|  ≤  SLACK · |moved(x) − old(x)|          of each output, in root mean square

`moved` is the old file with every weight moved by one rounding step, of the coarsest type that the graph computes in:
that far rounding alone takes its outputs. Nothing is known of a file's inputs but their types and shapes: sizes are
tried until the old file runs, and indices stay inside of the tables that they are looked up in.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import torch

from lora_fx.checks.verification import Draws, Report, compare, dither, noise_floor
from lora_fx.errors import ExportError
from lora_fx.export.onnx.files import save_model
from lora_fx.export.onnx.graphs import as_torch, attribute, infer_shapes
from lora_fx.export.onnx.loading import load_model
from lora_fx.export.onnx.processes import Apart
from lora_fx.export.onnx.runs import Comparison
from lora_fx.export.onnx.runtimes import refuse, refusing, require

UNCHECKED = "pass check=False, and compare the two files on inputs of your own"

_RUNS = 2
_FLOATS = {"float16": torch.float16, "float": torch.float32, "double": torch.float64}
_WHOLE = {f"{sign}int{bits}": f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)}
_SIZES = (2, 1, 4, 8, 32, 64, 224)


@dataclass(frozen=True)
class Input:
    """What a file takes."""

    name: str
    type: str
    shape: tuple[int | str, ...]
    rows: int | None = None
    """Of the smallest table that it is looked up in."""

    def draw(self, sizes: Mapping[str, int], generator: torch.Generator, careful: bool) -> numpy.ndarray:
        shape = [sizes[size] if isinstance(size, str) else size for size in self.shape]
        if self.type in _FLOATS:
            return torch.randn(shape, generator=generator).to(_FLOATS[self.type]).numpy()
        if careful and self.rows is None:  # a mask that hides nothing, a step
            return numpy.ones(shape, self.type)
        return torch.randint(0, self.rows or 2, shape, generator=generator).numpy().astype(self.type)


def compare_files(old: Path, new: Path, folder: Path) -> tuple[Comparison, ...]:
    """Run both; the second may be in the folder, where a third one is made.

    Raises:
        ExportError: their outputs differ by more than rounding explains, or the old file cannot be run on random
            inputs.
    """
    require("onnxruntime")
    model = load_model(old, UNCHECKED)
    with ExitStack() as stack:
        return _compared(stack, model, old, new, folder)


def _compared(stack: ExitStack, model: Any, old: Path, new: Path, folder: Path) -> tuple[Comparison, ...]:
    before = stack.enter_context(_open(old, old))
    inputs = _inputs(before, model, str(old))
    after = stack.enter_context(_open(new, old))
    moved = stack.enter_context(_open(_move(model, folder / "moved.onnx"), old))
    names, found = before.outputs, []
    for feeds, expected in _draws(before, inputs, str(old)):
        runs = [expected, *(_run(session, feeds, old) for session in (before, after, moved))]
        shapes = tuple(feed.shape for feed in feeds.values())
        judged = [_judge(name, old, *four) for name, *four in zip(names, *runs, strict=True)]
        found.append(comparison := Comparison(shapes, tuple(judged)))
        if not comparison.equivalent:
            name = names[judged.index(comparison.worst)]
            reason = f"the folded file is not the file that was given, on random inputs of shapes {comparison}"
            refuse(f"{old}, output {name!r}", reason, "nothing was written; report the graph to lora_fx")
    return tuple(found)


def _open(path: Path, place: Path) -> Apart:
    with refusing("ONNX Runtime does not load it on a CPU, to compare it", str(place), UNCHECKED):
        return Apart(path)


def _run(session: Apart, feeds: Mapping[str, numpy.ndarray], place: Path) -> list[torch.Tensor]:
    with refusing("the folded file does not run where the file that was given does", str(place), UNCHECKED):
        return _outputs(session, feeds)


def _outputs(session: Apart, feeds: Mapping[str, numpy.ndarray]) -> list[torch.Tensor]:
    return [torch.from_numpy(numpy.asarray(array)) for array in session.run(feeds)]


def _inputs(session: Apart, model: Any, place: str) -> list[Input]:
    rows, found = _tables(model), []
    for name, type_, shape in session.inputs:
        kind = type_.removeprefix("tensor(").removesuffix(")")
        if kind not in (*_FLOATS, *_WHOLE, "bool"):
            refuse(place, f"input {name!r} is {type_}, of which none can be drawn at random", UNCHECKED)
        named = (s if isinstance(s, int) or s else f"{name} {n}" for n, s in enumerate(shape))
        found.append(Input(name, kind, tuple(named), rows.get(name)))
    return found


def _tables(model: Any) -> dict[str, int]:
    """Input → the rows of the smallest table that it is looked up in."""
    found: dict[str, int] = {}
    for node in model.graph.all_nodes():
        if node.op_type != "Gather" or node.inputs[0].shape is None:
            continue
        shape, axis, value = node.inputs[0].shape, attribute(node, "axis") or 0, node.inputs[1]
        while value.producer() is not None and value.producer().inputs and value.producer().inputs[0] is not None:
            value = value.producer().inputs[0]
        if len(shape) > axis >= -len(shape) and isinstance(shape[axis], int) and shape[axis]:
            found[value.name] = min(shape[axis], found.get(value.name, shape[axis]))
    return found


def _draws(
    session: Apart, inputs: Sequence[Input], place: str
) -> Iterator[tuple[dict[str, numpy.ndarray], list[torch.Tensor]]]:
    """Inputs of two shapes that the file runs on, and what it gives; of one shape, twice, where it has but one."""
    generator, failure, seen = torch.Generator().manual_seed(0), "", list[tuple[Any, Any]]()
    for careful in (False, True):
        for sizes in _sizes(inputs):
            if any(sizes == other for other, _ in seen):
                continue
            feeds = {value.name: value.draw(sizes, generator, careful) for value in inputs}
            try:
                expected = _outputs(session, feeds)
            except ExportError:  # it has ended ONNX Runtime
                raise
            except Exception as error:
                failure = failure or str(error)
                continue
            seen.append((sizes, careful))
            yield feeds, expected
            if len(seen) == _RUNS:
                return
    if not seen:
        reason = f"ONNX Runtime runs it on no random inputs: {failure[:400]}"
        refuse(place, reason, UNCHECKED)
    for sizes, careful in seen:
        feeds = {value.name: value.draw(sizes, generator, careful) for value in inputs}
        yield feeds, _outputs(session, feeds)


def _sizes(inputs: Sequence[Input]) -> Iterator[dict[str, int]]:
    """Sizes of the axes that have none: each another one, one of them 1, then all alike."""
    names = list(dict.fromkeys(size for value in inputs for size in value.shape if isinstance(size, str)))
    free = [name for name in names if " + " not in name or not {*name.split(" + ")} <= {*names}]
    plans = [[2 + n for n in range(len(free))], [1 if n == 0 else 6 - n % 4 for n in range(len(free))]]
    for plan in [*plans, *([size] * len(free) for size in _SIZES)]:
        sizes = dict(zip(free, plan, strict=True))
        yield sizes | {name: sum(sizes[part] for part in name.split(" + ")) for name in names if name not in sizes}


def _move(model: Any, target: Path) -> Path:
    """The file with each weight, an initializer of two axes or more, moved by one rounding step."""
    from onnx_ir.passes import common
    from onnx_ir.tensor_adapters import TorchTensor

    common.InlinePass()(model)
    infer_shapes(model)
    common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    held = [value for graph in model.graphs() for value in graph.initializers.values()]
    given = [v for graph in model.graphs() for v in graph.inputs]
    made = [value for node in model.graph.all_nodes() for value in node.outputs]
    names = {value.dtype.name.lower() for value in (*held, *given, *made) if value.dtype is not None}
    types = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float": torch.float32, "double": torch.float64}
    step = max((torch.finfo(types[name]).eps for name in names if name in types), default=0.0)
    draws = Draws(0)
    for value in held:
        tensor = value.const_value
        if tensor is not None and tensor.dtype.name.lower() in types and len(tensor.shape) > 1:
            weight = as_torch(tensor)
            own = max(step, torch.finfo(weight.dtype).eps)
            moved = (weight.to(torch.float64) * dither(weight, own, draws)).to(weight.dtype)
            value.const_value = TorchTensor(moved, name=value.name)
    return save_model(model, target, None)[0]


def _judge(
    name: str, old: Path, expected: torch.Tensor, again: torch.Tensor, got: torch.Tensor, moved: torch.Tensor
) -> Report:
    if expected.shape != got.shape or expected.dtype != got.dtype:
        theirs, ours = (f"{t.dtype} {tuple(t.shape)}" for t in (expected, got))
        reason = f"it is {theirs} in the file that was given and {ours} in the folded file"
        refuse(f"{old}, output {name!r}", reason, "nothing was written; report the graph to lora_fx")
    if not expected.is_floating_point():
        differs, undecided = expected != got, expected != moved
        wrong, noise = (float(m.double().mean()) if m.numel() else 0.0 for m in (differs & ~undecided, undecided))
        return Report(wrong, float(differs.any()), noise, 0.0, str(expected.dtype).removeprefix("torch."), 1)
    if not compare(expected, again, expected, 0.0, expected.dtype):
        reason = "the graph draws random numbers: it gives others on each run"
        refuse(f"{old}, output {name!r}", reason, f"export it in eval mode, or {UNCHECKED}")
    return compare(expected, got, expected, noise_floor(expected, moved), expected.dtype)
