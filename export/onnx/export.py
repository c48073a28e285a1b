"""Write a model as an ONNX file that is proven to be the model.

    torch(adapted)  ≡  ONNX Runtime(file)          up to rounding, on the example inputs and on other shapes
    graph(folded)   ≅  graph(base)                 node for node

The base model's structure is translated, and the folded weights are put in by name while the file is written. The file
is written beside its target, checked, run, compared, proven, and only then moved into place.
"""

from __future__ import annotations

import json
import logging
import math
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lora_fx.changes import borrowed, changing
from lora_fx.checks.certification import Certificate, certify_adapted
from lora_fx.checks.oracles import active_adapters
from lora_fx.deltas.adapter import Adapter
from lora_fx.errors import ExportError
from lora_fx.export.onnx.calls import Call, flat_caches
from lora_fx.export.onnx.files import INLINE, check_file, folder_beside, move_files, save_model, writable
from lora_fx.export.onnx.graphs import describe, graph_digest, name_interface, operators, translate
from lora_fx.export.onnx.optimization import Contents
from lora_fx.export.onnx.optimization import optimize as optimize_graph
from lora_fx.export.onnx.proof import Proof, fused_operators
from lora_fx.export.onnx.proof import prove as prove_file
from lora_fx.export.onnx.runs import Comparison, compare_runs, open_session, run_torch
from lora_fx.export.onnx.runtimes import require
from lora_fx.export.onnx.switchable import (
    MANIFEST,
    SWITCHABLE,
    factors_as_inputs,
    factors_of,
    manifest,
    open_slots,
    owners_of,
    slots_in,
)
from lora_fx.export.onnx.tasks import GRAPH
from lora_fx.export.onnx.weights import Checkpoint, Weights, adapter_digest, structure
from lora_fx.graph.capture import inputs_on_meta, normalize_inputs, refuse_unready, undisturbed
from lora_fx.model import wiring
from lora_fx.model.inventory import inventory
from lora_fx.passes.fold import fold, unfold

OPSETS = range(18, 25)
FORMS = ("folded", "unfolded", SWITCHABLE)

_PACKAGES = ("onnx", "onnxscript", "onnxruntime")


# ── what comes back ──────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class TensorInfo:
    """An input or output of the file; a dynamic axis has a name in the place of a size."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]

    def __str__(self) -> str:
        return f"{self.name}: {self.dtype}[{', '.join(map(str, self.shape))}]"


@dataclass(frozen=True)
class ExportReport:
    """What was written, and how it was checked."""

    path: Path
    data: Path | None
    """The file with the weights, where the model is too large for one file."""
    bytes: int
    """Of both files."""
    opset: int
    nodes: int
    operators: Mapping[str, int]
    """How many nodes of each operator."""
    initializers: int
    form: str
    """"folded", "unfolded" or "switchable" for a model with adapters, else "base"."""
    adapters: tuple[str, ...]
    """The names of the adapters in it."""
    graph: str
    """sha256 of the graph without the numbers of its initializers."""
    inputs: tuple[TensorInfo, ...]
    """Those of the model; a switchable graph has A and B of every slot beside them."""
    outputs: tuple[TensorInfo, ...]
    comparisons: tuple[Comparison, ...]
    """ONNX Runtime against torch: the example inputs, then two other shapes where axes are dynamic."""
    not_run: str = ""
    """Why ONNX Runtime did not run the file: then only `onnx.checker` has seen it."""
    certificate: Certificate | None = None
    """Where a model with branches was exported: that every use of every adapted weight was W + s·B·A; see `certify`."""
    proof: Proof | None = None
    """Where it was asked for: the file is the base graph, and its weights are the folded ones."""

    @property
    def largest(self) -> float:
        """The largest absolute difference of one element; NaN where nothing was run."""
        return max((r.largest for c in self.comparisons for r in c.reports), default=math.nan)

    def __str__(self) -> str:
        names = f" ({', '.join(self.adapters)})" if self.adapters else ""
        lines = [
            f"{self.path}: {self.bytes:,} bytes, opset {self.opset}, {self.form}{names}",
            f"  {self.nodes} nodes, {self.initializers} initializers",
            f"  inputs   {'; '.join(map(str, self.inputs))}",
            f"  outputs  {'; '.join(map(str, self.outputs))}",
        ]
        lines += [f"  ONNX Runtime on {comparison}" for comparison in self.comparisons]
        if self.certificate is not None:
            lines.append(f"  {str(self.certificate).splitlines()[-1]}")
        lines += [f"  {self.proof}"] if self.proof else []
        lines += [f"  NOT RUN, only checked by onnx.checker: {self.not_run}"] if self.not_run else []
        return "\n".join(lines)


# ── the verb ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def export_onnx(
    model: nn.Module,
    example_inputs: Any,
    path: str | os.PathLike[str],
    *,
    dynamic_shapes: Any = None,
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
    opset: int = 20,
    optimize: bool = True,
    adapters: str = "folded",
    prove: bool = False,
    check: bool = True,
    weights: str | os.PathLike[str] | None = None,
    external_data: bool | None = None,
) -> ExportReport:
    """Write `model`, in eval mode, as an ONNX file, and compare ONNX Runtime's outputs with torch's.

    The model stays bitwise what it is. Active adapters are folded while the file is written, one weight at a time.

    Args:
        example_inputs: a tensor, a tuple of positional or a dict of keyword inputs. A transformers `DynamicCache` in it
            becomes flat inputs ``past_key_values.0.key`` …, and the cache that comes back outputs ``present.0.key`` ….
        path: the file. It is replaced in one step, after all checks; any error leaves what was there.
        dynamic_shapes: which axes may have other sizes, in the terms of `torch.export`, keyed like the call:
            ``{"input_ids": {0: "batch", 1: Dim("tokens", max=512)}}``. Inputs left out are static. The axes of a cache,
            ``{"past_key_values": {0: "batch", 2: "past"}}``, are those of each key and value. An axis that must be as
            long as others together is named so: ``{"attention_mask": {0: "batch", 1: "past + tokens"}}``.
        input_names, output_names: one name for each tensor; None for the arguments' names and the keys of a returned
            dict.
        opset: 18 to 24.
        optimize: simplify the graph, as torch does, but without a look at the weights' numbers.
        adapters: "folded"; "unfolded" to keep the branches as nodes of the graph; "switchable" for a graph with a slot
            at every adapted weight, which a `lora_fx.export.Session` fills anew for each call, or leaves empty: see
            `save_onnx_adapter`. Then every adapter of the model is compared, active or not, and the base.
        prove: translate the base model too, read the file back, and hold the one against the other: the same graph,
            node for node, and every folded element the sum rounded once. Takes twice the time.
        check: run the file, and the model in float64 beside it: that takes the memory of two more models.
        weights: where the numbers of a model on meta are: a ``.safetensors`` file, an index of some, or their folder.
            They go from there into the file one tensor at a time, are folded in the precision that they have there, and
            rounded once to the model's dtype; torch runs nothing.
        external_data: weights in a file of their own, ``<path>.data``; None where they need it, above 2 GB. A kill at
            any moment leaves the old graph with the old weights or the new one with the new (they may then have the
            name ``<path>.<8 digits>.data``, which the next export clears away).

    Returns:
        What was written, and by how much ONNX Runtime differs from torch.

    Raises:
        ExportError: ONNX Runtime differs from torch by more than rounding explains, the file cannot be proven, the
            exporter refuses the model, a package is missing, the path cannot be written, or an argument is wrong.
        CaptureError: the model does not run on the inputs.
        FoldError: the adapters cannot be folded.
        LoraFxError: a thread is inside a forward of the model.
    """
    _check_arguments(model, opset, adapters, prove, weights)
    target = writable(path)
    checkpoint = None if weights is None else Checkpoint(weights)
    with changing(model, "export_onnx"), undisturbed(model), _quiet(), _unfolded(model, prove):
        model.eval()
        with flat_caches(model, normalize_inputs(model, example_inputs)) as inputs:
            form, acting = _form(model, adapters)
            call = Call.of(model, inputs_on_meta(inputs) if checkpoint else inputs, dynamic_shapes)
            job = _Job(model, call, opset, optimize, checkpoint, (input_names, output_names))
            expected = [] if checkpoint else run_torch(model, inputs)
            branches = wiring.adapted_storages(model) and not checkpoint
            certificate = certify_adapted(model, inputs, gradients=False) if branches else None
            made = job.program(form)
            describe(made.graph, _notes(made.graph, form, acting) | made.notes)
            with folder_beside(target) as folder:
                files = save_model(made.graph, folder / target.name, external_data)
                check_file(files[0])
                session, not_run = _opened(files[0], check, checkpoint)
                comparisons = _compared(job, made, session, expected) if session else ()
                del session
                proof = _proof(job, made, files, folder, not not_run) if prove else None
                report = _report(made.graph, target, files, opset, form, acting, comparisons, not_run)
                move_files(files, target)
    return replace(report, certificate=certificate, proof=proof)


# ── arguments ────────────────────────────────────────────────────────────────────────────────────────────────────────


def _check_arguments(model: nn.Module, opset: int, adapters: str, prove: bool, weights: Any) -> None:
    if not isinstance(model, nn.Module):
        raise ExportError(
            f"{type(model).__name__} is no torch.nn.Module", place="model", remedy="pass the module itself"
        )
    if adapters not in FORMS:
        raise ExportError(
            f"adapters={adapters!r} is unknown", place="adapters", remedy=f"choose {' or '.join(map(repr, FORMS))}"
        )
    if prove and adapters != "folded":
        raise ExportError(
            f"adapters={adapters!r}: with its branches a graph is not the base graph",
            place="prove",
            remedy='leave prove out, or export with adapters="folded"',
        )
    if isinstance(opset, bool) or not isinstance(opset, int) or opset not in OPSETS:
        raise ExportError(
            f"opset {opset!r} is not supported: torch's translations start at opset {OPSETS[0]} (files below it were "
            f"invalid), and nothing above {OPSETS[-1]} has been checked",
            place="opset",
            remedy=f"choose {OPSETS[0]} to {OPSETS[-1]}; 20 is the default",
        )
    refuse_unready(model)
    meta = [name for name, t in (*model.named_parameters(), *model.named_buffers()) if t.is_meta]
    if meta and weights is None:
        raise ExportError(
            "the tensor is on meta: it has no numbers",
            place=meta[0],
            remedy="materialise the model first, or pass weights= with the files of its checkpoint",
        )
    if weights is not None and not meta:
        raise ExportError(
            "no tensor of the model is on meta: it has its numbers already",
            place="weights",
            remedy='leave weights out, or build the model inside `with torch.device("meta")`',
        )
    for package in _PACKAGES:
        require(package)


@contextmanager
def _unfolded(model: nn.Module, prove: bool) -> Iterator[None]:
    """A proof needs the base weights of a folded model: inside, its branches are back."""
    if not (prove and inventory(model).folded):
        yield
        return
    unfold(model)
    yield
    fold(model)


# ── what is exported ─────────────────────────────────────────────────────────────────────────────────────────────────


def _form(model: nn.Module, adapters: str) -> tuple[str, dict[str, tuple[Adapter, ...]]]:
    """The form of the file, and the adapters in it by the names of their weights."""
    if adapters == SWITCHABLE:
        return adapters, {name: tuple(own) for name, (_, _, own) in owners_of(model).items()}
    acting = {name: tuple(own) for name, own in active_adapters(model).items()}
    if acting:
        return adapters, acting
    here = inventory(model)
    acting = {name: tuple(own) for name, own in here.by_weight(here.put_away, active=True).items()}
    return "folded" if acting else "base", acting


@dataclass(frozen=True)
class _Made:
    """A translated and optimized program, and what its initializers hold."""

    program: Any
    weights: Weights
    contents: Contents
    notes: dict[str, str] = field(default_factory=dict)

    @property
    def graph(self) -> Any:
        return self.program.model


@dataclass(frozen=True)
class _Job:
    """What is translated, and how."""

    model: nn.Module
    call: Call
    opset: int
    optimize: bool
    checkpoint: Checkpoint | None
    names: tuple[Sequence[str] | None, Sequence[str] | None]

    def program(self, form: str) -> _Made:
        call, slots = self.call, []
        with ExitStack() as stack:
            if form == SWITCHABLE:
                slots = stack.enter_context(slots_in(self.model))
                call = stack.enter_context(factors_as_inputs(self.model, slots, call))
                call = replace(call, inputs=inputs_on_meta(call.inputs)) if self.checkpoint else call
            weights = stack.enter_context(structure(self.model, form == "folded", self.checkpoint))
            program = translate(self.model, call, self.opset)
        contents = optimize_graph(program.model, weights, self.optimize)
        name_interface(program, self.call, *self.names)
        if not slots:
            return _Made(program, weights, contents)
        slots = open_slots(program.model.graph, slots, len(self.call.names))
        listed = manifest(self.model, slots, graph_digest(program.model), weights)
        return _Made(program, weights, contents, {MANIFEST: json.dumps(listed)})


def _compared(job: _Job, made: _Made, session: Any, expected: list[torch.Tensor]) -> tuple[Comparison, ...]:
    model = job.model
    if not made.notes:
        return compare_runs(model, session, made.program, job.call, expected)
    every = [adapter for _, _, own in owners_of(model).values() for adapter in own]
    found: list[Comparison] = []
    for name in ("", *sorted({adapter.name for adapter in every})):
        with borrowed(model):
            for adapter in every:
                adapter.active = adapter.name == name
            wiring.wire_or_dispatch(model)
            fed = factors_of(model, name) if name else {}
            expected = run_torch(model, job.call.inputs)
            own = compare_runs(model, session, made.program, job.call, expected, fed)
        found += [replace(comparison, adapter=name or "no adapter") for comparison in own]
    return tuple(found)


def _opened(path: Path, check: bool, checkpoint: Checkpoint | None) -> tuple[Any, str]:
    if checkpoint is not None:
        return None, "the model is on meta, and has nothing to compare it with"
    return open_session(path) if check else (None, "check=False")


def _proof(job: _Job, made: _Made, files: list[Path], folder: Path, runs: bool) -> Proof:
    with wiring.unwired(job.model):
        base = job.program("base")
    proof = prove_file(files[0], made.weights, made.contents, base.graph, base.weights)
    if not runs or sum(file.stat().st_size for file in files) > INLINE:
        return proof
    inside = folder / "base"
    inside.mkdir()
    (plain, *_) = save_model(base.graph, inside / "base.onnx", None)
    return replace(proof, fused=fused_operators(files[0], inside), base_fused=fused_operators(plain, inside))


def _notes(graph: Any, form: str, acting: dict[str, tuple[Adapter, ...]]) -> dict[str, str]:
    """What the file says about itself."""
    names = sorted({adapter.name for own in acting.values() for adapter in own})
    notes = {"lora_fx.form": form, "lora_fx.adapters": json.dumps(names), GRAPH: graph_digest(graph)}
    if acting:
        notes["lora_fx.weights"] = json.dumps({name: [_said(a) for a in own] for name, own in sorted(acting.items())})
        notes["lora_fx.adapter_sha256"] = adapter_digest(acting)
    return notes


def _said(adapter: Adapter) -> dict[str, Any]:
    said = {"adapter": adapter.name, "rank": adapter.rank, "alpha": adapter.alpha, "scale": adapter.scale}
    return said | ({"role": adapter.role} if adapter.role else {})


def _report(
    graph: Any,
    target: Path,
    files: list[Path],
    opset: int,
    form: str,
    acting: dict[str, tuple[Adapter, ...]],
    comparisons: tuple[Comparison, ...],
    not_run: str,
) -> ExportReport:
    counts = operators(graph)
    return ExportReport(
        path=target,
        data=target.with_name(files[1].name) if len(files) > 1 else None,
        bytes=sum(file.stat().st_size for file in files),
        opset=opset,
        nodes=counts.total(),
        operators=dict(sorted(counts.items())),
        initializers=len(graph.graph.initializers),
        form=form,
        adapters=tuple(sorted({adapter.name for own in acting.values() for adapter in own})),
        graph=graph_digest(graph),
        inputs=tuple(_info(value) for value in graph.graph.inputs if value.name not in graph.graph.initializers),
        outputs=tuple(map(_info, graph.graph.outputs)),
        comparisons=comparisons,
        not_run=not_run,
    )


def _info(value: Any) -> TensorInfo:
    shape = tuple(size if isinstance(size, int) else str(size.value) for size in value.shape or ())
    return TensorInfo(value.name, value.dtype.name.lower(), shape)


# ── a clean console ──────────────────────────────────────────────────────────────────────────────────────────────────

#: What the exporter says where nothing is wrong: logger → how its messages start.
_NOISE: dict[str, tuple[str, ...]] = {
    "torch.onnx._internal.exporter._registration": ("torchvision is not installed",),
    "onnx_ir.passes.common.initializer_deduplication": ("Skipped deduplication of initializer",),
    "onnxscript.optimizer._constant_folding": ("Skipping constant folding for op Split", "Evaluation failed"),
}
_WARNINGS = (
    r"`isinstance\(treespec, LeafSpec\)` is deprecated",
    r"The tensor attributes? self\.[\w.]*_flat_weights\[0\]",  # nn.RNNBase lists its own parameters there
)


@contextmanager
def _quiet() -> Iterator[None]:
    """Inside, these messages are not shown; every other one is."""

    def known(record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith(_NOISE[record.name])

    loggers = [logging.getLogger(name) for name in _NOISE]
    for logger in loggers:
        logger.addFilter(known)
    try:
        with warnings.catch_warnings():
            for message in _WARNINGS:
                warnings.filterwarnings("ignore", message)
            yield
    finally:
        for logger in loggers:
            logger.removeFilter(known)
