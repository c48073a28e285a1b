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
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lora_fx.changes import borrowed
from lora_fx.checks.certification import Certificate, certify_adapted
from lora_fx.deltas.adapter import Adapter
from lora_fx.errors import ExportError
from lora_fx.export.onnx import switchable
from lora_fx.export.onnx.calls import Call, flat_caches, in_its_words
from lora_fx.export.onnx.files import (
    INLINE,
    check_file,
    folder_beside,
    move_files,
    move_folder,
    save_model,
    writable,
)
from lora_fx.export.onnx.graphs import describe, graph_digest, name_interface, operators, translate
from lora_fx.export.onnx.optimization import Blind, Filled, blind, fill
from lora_fx.export.onnx.proof import Proof, fused_operators, prove
from lora_fx.export.onnx.quantization import (
    Loss,
    Quantized,
    left_float,
    losses,
    products,
    quantise,
    refuse_dtypes,
    refuse_kind,
)
from lora_fx.export.onnx.runs import Comparison, compare_runs, open_session, run_session, run_torch
from lora_fx.export.onnx.runtimes import refuse, require
from lora_fx.export.onnx.targets import OPTIONAL, REQUIRED, SLOTS, TARGETS, Step, Target, step_of
from lora_fx.export.onnx.tasks import GRAPH
from lora_fx.export.onnx.weights import Checkpoint, Weights, adapter_digest, seen, structure
from lora_fx.graph.capture import inputs_on_meta, normalize_inputs, refuse_unready
from lora_fx.graph.own_state import undisturbed
from lora_fx.graph.places import refuse_any_away
from lora_fx.model.classes import unwired
from lora_fx.model.inventory import inventory
from lora_fx.passes.base import Facts, Pass, Result, given
from lora_fx.passes.pipeline import Pipeline
from lora_fx.passes.pipelines import FOLD, UNFOLD
from lora_fx.passes.wiring import wire

OPSETS = range(18, 25)
FORMS = ("folded", "unfolded", switchable.SWITCHABLE)


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
    target: str
    """The runtime that it was written for."""
    configs: tuple[Path, ...]
    """What that runtime reads beside it."""
    inputs: tuple[TensorInfo, ...]
    """Those of the model; a switchable graph has A and B of every slot beside them."""
    outputs: tuple[TensorInfo, ...]
    comparisons: tuple[Comparison, ...]
    """ONNX Runtime against torch: the example inputs, then two other shapes where axes are dynamic."""
    not_run: str = ""
    """Why ONNX Runtime did not run the file: unless that is `check=False`, only `onnx.checker` has seen it then."""
    certificate: Certificate | None = None
    """Where a model with branches was exported: that every use of every adapted weight was W + δ; see `certify`."""
    proof: Proof | None = None
    """Where it was asked for: the file is the base graph, and its weights are the folded ones."""
    quantized: Quantized | None = None
    """Where it was asked for: `comparisons`, `certificate` and `proof` are then of the file before, in float."""

    @property
    def largest(self) -> float:
        """The largest absolute difference of one element; NaN where nothing was run. Of a quantised file, that of the
        float one: see `quantized`."""
        return max((r.largest for c in self.comparisons for r in c.reports), default=math.nan)

    def __str__(self) -> str:
        names = f" ({', '.join(self.adapters)})" if self.adapters else ""
        lines = [
            f"{self.path}: {self.bytes:,} bytes, opset {self.opset}, {self.form}{names}",
            f"  {self.nodes} nodes, {self.initializers} initializers",
            *([f"  for {self.target}, with {', '.join(path.name for path in self.configs)}"] if self.configs else []),
            f"  inputs   {'; '.join(map(str, self.inputs))}",
            f"  outputs  {'; '.join(map(str, self.outputs))}",
        ]
        lines += [f"  ONNX Runtime on {comparison}" for comparison in self.comparisons]
        if self.certificate is not None:
            lines.append(f"  {str(self.certificate).splitlines()[-1]}")
        lines += [f"  {self.proof}"] if self.proof else []
        lines += [f"  then {self.quantized}"] if self.quantized else []
        lines += [f"  NOT RUN: {self.not_run}"] if self.not_run else []
        return "\n".join(lines)


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
    slots: str = OPTIONAL,
    target: str = "ort",
    prove: bool = False,
    check: bool = True,
    weights: str | os.PathLike[str] | None = None,
    external_data: bool | None = None,
    quantize: str | None = None,
) -> ExportReport:
    """Write `model`, in eval mode, as an ONNX file, and compare ONNX Runtime's outputs with torch's.

    The model stays bitwise what it is. Active adapters are folded while the file is written, one weight at a time.

    Args:
        example_inputs: a tensor, a tuple of positional or a dict of keyword inputs. A transformers `DynamicCache` in it
            becomes flat inputs ``past_key_values.0.key`` …, and the cache that comes back outputs ``present.0.key`` ….
        path: the file. It is replaced in one step, after all checks; any error leaves what was there. A folder that
            was there keeps what else is in it, and has its files replaced one by one, the graph last.
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
        slots: "optional": A and B have defaults, as ONNX Runtime's own adapters want it; "required": they are plain
            inputs, which every call gives, for runtimes in JavaScript: these never give an input that has a default.
        target: "ort" for the file alone. "genai", "optimum" and "transformers.js" load a folder, which is then what
            `path` names: the graph, and the configurations that the runtime reads. They run decoders of transformers
            with a cache: pass ``{"input_ids": tokens}``; other inputs, names and axes follow from the target.
        prove: read the file back, and hold it against the base model's: the same graph, node for node, and every folded
            element the sum rounded once.
        check: certify the model, have onnx check the file, run it, and the model in float64 beside it: that takes the
            memory of two more models. Without it nothing is checked but what `prove` does.
        weights: where the numbers of a model on meta are: a ``.safetensors`` file, an index of some, or their folder.
            They go from there into the file one tensor at a time, are folded in the precision that they have there, and
            rounded once to the model's dtype; torch runs nothing.
        external_data: weights in a file of their own, ``<path>.data``; None where they need it, above 2 GB. A kill at
            any moment leaves the old graph with the old weights or the new one with the new (they may then have the
            name ``<path>.<8 digits>.data``, which the next export clears away).
        quantize: "int8" or "int4" to have ONNX Runtime's tools quantise the weights of MatMul and Gemm, after the fold.
            What `check` and `prove` say is of the float file; the quantised one is run on the example inputs, and the
            report has by how much it is off from torch. A switchable file keeps its slots in float. The tools take the
            memory of four (int4) to seven (int8) models.

    Returns:
        What was written, and by how much ONNX Runtime differs from torch.

    Raises:
        ExportError: ONNX Runtime differs from torch by more than rounding explains, the file cannot be proven, the
            exporter refuses the model, a package is missing, the path cannot be written, or an argument is wrong.
        CaptureError: the model does not run on the inputs.
        FoldError: the adapters cannot be folded.
        LoraFxError: a thread is inside a forward of the model.
    """
    if not isinstance(model, nn.Module):
        refuse("model", f"{type(model).__name__} is no torch.nn.Module", "pass the module itself")
    passes = exporting(
        example_inputs, path, dynamic_shapes=dynamic_shapes, input_names=input_names, output_names=output_names,
        opset=opset, optimize=optimize, adapters=adapters, slots=slots, target=target, prove=prove, check=check,
        weights=weights, external_data=external_data, quantize=quantize,
    )  # fmt: skip
    return Pipeline("export_onnx", passes)(model).facts[ExportReport]


def exporting(
    example_inputs: Any, path: str | os.PathLike[str], *, check: bool = True, prove: bool = False, **options: Any
) -> tuple[Pass, ...]:
    """The passes of `export_onnx`: its options are their fields."""
    measured, checks = ([Certify], [Run]) if check else ([], [])
    proofs = [Prove] if prove else []
    integers = [] if options.get("quantize") is None else [Quantise]
    kinds: tuple[Any, ...] = (Prepare, *measured, Translate, Optimise, Write, *checks, *proofs, *integers, Publish)
    _refuse_names(options)
    if unknown := options.keys() - {f.name for kind in kinds for f in fields(kind)}:
        raise TypeError(f"export_onnx takes no {', '.join(sorted(unknown))}")
    options |= {"example_inputs": example_inputs, "path": path, "prove": prove, "check": check}
    return tuple(kind(**{f.name: options[f.name] for f in fields(kind) if f.name in options}) for kind in kinds)


def _refuse_names(options: Mapping[str, Any]) -> None:
    target = options.get("target", "ort")
    if target not in TARGETS:
        refuse("target", f"target={target!r} is unknown", f"choose {' or '.join(map(repr, TARGETS))}")
    given = [n for n in ("dynamic_shapes", "input_names", "output_names") if options.get(n) is not None]
    if TARGETS[target].graph and given:
        reason = f"target={target!r} knows inputs, outputs and axes by names of its own"
        refuse(given[0], reason, f'leave {" and ".join(given)} out, or export with target="ort"')


@dataclass(frozen=True)
class Job:
    """What is to be exported."""

    path: Path
    """What is to be written: a file, or a folder."""
    target: str
    step: Step | None
    """What a runtime that loads folders will run."""
    form: str
    slots: str
    acting: Mapping[str, Sequence[Adapter]]
    """Name of each weight → its adapters that are in the file."""
    call: Call
    checkpoint: Checkpoint | None
    expected: list[torch.Tensor]
    """What torch returns for the example inputs; empty for a model on meta."""

    @property
    def layout(self) -> Target:
        return TARGETS[self.target]

    @property
    def adapters(self) -> tuple[str, ...]:
        return tuple(sorted({adapter.name for own in self.acting.values() for adapter in own}))


@dataclass(frozen=True)
class Translated:
    """torch.onnx's program of the model, and what its tensors hold."""

    program: Any
    weights: Weights
    slots: switchable.Slots
    seen: tuple[object, ...]
    """What was traced: if it was the base model itself, a proof need not have that translated again."""
    how: Translate
    """A proof has the base model translated in the same way."""


@dataclass(frozen=True)
class Optimised:
    """The graph as it is written."""

    filled: Filled
    blind: Blind
    """The same before any number was in it."""
    how: Optimise

    @property
    def graph(self) -> Any:
        return self.filled.graph


@dataclass(frozen=True)
class Written:
    """The files beside their target."""

    files: list[Path]
    """The graph's, and its data."""
    configs: list[Path]
    scratch: Path
    """The folder that they are in, with room for more."""
    place: Path
    """What takes the place of the job's path."""

    @property
    def bytes(self) -> int:
        return sum(file.stat().st_size for file in self.files)


@dataclass(frozen=True)
class Compared:
    """How the file has run."""

    comparisons: tuple[Comparison, ...] = ()
    not_run: str = ""
    """Why it has not."""


@dataclass(frozen=True)
class Prepare(Pass):
    """From here to the end of the pipeline the model rests, in eval mode, and takes and gives flat tensors.

    Args: those of `export_onnx`.
    """

    example_inputs: Any
    path: str | os.PathLike[str]
    dynamic_shapes: Any = None
    adapters: str = "folded"
    slots: str = OPTIONAL
    target: str = "ort"
    prove: bool = False
    weights: str | os.PathLike[str] | None = None
    quantize: str | None = None

    name = "prepare"
    ensures = (given(Job),)

    def __post_init__(self) -> None:
        if self.adapters not in FORMS:
            refuse("adapters", f"adapters={self.adapters!r} is unknown", f"choose {' or '.join(map(repr, FORMS))}")
        if self.prove and self.adapters != "folded":
            reason = f"adapters={self.adapters!r}: with its branches a graph is not the base graph"
            refuse("prove", reason, 'leave prove out, or export with adapters="folded"')
        if self.slots not in SLOTS:
            refuse("slots", f"slots={self.slots!r} is unknown", f"choose {' or '.join(map(repr, SLOTS))}")
        if self.adapters != switchable.SWITCHABLE and self.slots == REQUIRED:
            reason = f"adapters={self.adapters!r}: the graph has no slots"
            refuse("slots", reason, 'leave slots out, or export with adapters="switchable"')
        if self.adapters == switchable.SWITCHABLE and self.slots not in TARGETS[self.target].slots:
            reason = f"{self.target} gives a graph nothing for {self.slots} slots: it would fail, or be the base model"
            can = [f'target="{name}", slots="{own}"' for name, row in TARGETS.items() for own in row.slots]
            refuse("adapters", reason, f'export with adapters="folded", or with {"; ".join(can)}')
        if self.quantize is not None:
            self._refuse_quantize()

    def _refuse_quantize(self) -> None:
        refuse_kind(str(self.quantize))
        if self.weights is not None:
            reason = "the tools hold all weights in memory, and weights= is there so that nothing does"
            refuse("quantize", reason, "build the model with its weights, or quantise the float file with another tool")
        if self.adapters == "unfolded":
            reason = 'adapters="unfolded": A and B are weights of the graph, and would be integers too'
            refuse("quantize", reason, 'export with adapters="folded" or "switchable"')

    def call(self, model: nn.Module, facts: Facts) -> Result:
        target = TARGETS[self.target]
        path = writable(self.path, folder=bool(target.graph))
        refuse_unready(model)
        if self.quantize is not None:
            refuse_dtypes(model, self.quantize)
        checkpoint = self._checkpoint(model)
        for package in ("onnx", "onnxscript", "onnxruntime"):
            require(package)
        for context in (undisturbed(model), _quiet(), _unfolded(model, self.prove)):
            facts.enter(context)
        model.eval()
        inputs, shapes = in_its_words(model, normalize_inputs(model, self.example_inputs), self.dynamic_shapes)
        step = None
        if target.graph:
            inputs = inputs_on_meta(inputs) if checkpoint else inputs
            step = step_of(model, inputs, self.target)
            target.check(step)
            inputs, shapes = step.inputs, step.axes
        inputs = facts.enter(flat_caches(model, inputs))
        here = inventory(model)
        form, acting = self.adapters, here.by_weight(active=True)
        if form == switchable.SWITCHABLE:
            acting = {name: [place.adapter for place in places] for name, places in switchable.adapted(model).items()}
        elif not acting:
            acting = here.by_weight(here.put_away, active=True)
            form = "folded" if acting else "base"
        call = Call.of(model, inputs_on_meta(inputs) if checkpoint else inputs, shapes)
        expected = [] if checkpoint else run_torch(model, inputs)
        job = Job(path, self.target, step, form, self.slots, acting, call, checkpoint, expected)
        return Result(model, False, (job,))

    def _checkpoint(self, model: nn.Module) -> Checkpoint | None:
        refuse_any_away(model, "an exported file holds its numbers", ExportError)
        meta = [name for name, t in (*model.named_parameters(), *model.named_buffers()) if t.is_meta]
        if meta and self.weights is None:
            reason = "the tensor is on meta: it has no numbers"
            refuse(meta[0], reason, "materialise the model first, or pass weights= with the files of its checkpoint")
        if self.weights is not None and not meta:
            reason = "no tensor of the model is on meta: it has its numbers already"
            refuse("weights", reason, 'leave weights out, or build the model inside `with torch.device("meta")`')
        return None if self.weights is None else Checkpoint(self.weights)


@contextmanager
def _unfolded(model: nn.Module, prove: bool) -> Iterator[None]:
    """A proof needs the base weights of a folded model: inside, its branches are back."""
    if not (prove and inventory(model).folded):
        yield
        return
    UNFOLD(model)
    yield
    FOLD(model)


@dataclass(frozen=True)
class Certify(Pass):
    """Measure of every use of every adapted weight whether it is W + δ; see `lora_fx.certify`."""

    name = "certify"
    requires = (given(Job),)

    def call(self, model: nn.Module, facts: Facts) -> Result:
        if facts[Job].checkpoint or not inventory(model).storages():
            return Result(model, False)
        return Result(model, False, (certify_adapted(model, facts[Job].call.inputs, facts.undo, gradients=False),))


@dataclass(frozen=True)
class Translate(Pass):
    """Have torch translate the model: for a folded file its base, for a switchable one with slots."""

    opset: int = 20

    name = "translate"
    requires = (given(Job),)
    ensures = (given(Translated),)

    def __post_init__(self) -> None:
        opset = self.opset
        if isinstance(opset, bool) or not isinstance(opset, int) or opset not in OPSETS:
            reason = f"opset {opset!r} is not supported: torch's translations start at opset {OPSETS[0]} "
            reason += f"(files below it were invalid), and nothing above {OPSETS[-1]} has been checked"
            refuse("opset", reason, f"choose {OPSETS[0]} to {OPSETS[-1]}; 20 is the default")

    def call(self, model: nn.Module, facts: Facts) -> Result:
        return Result(model, False, (self.of(model, facts[Job]),))

    def of(self, model: nn.Module, job: Job) -> Translated:
        call, slots = job.call, {}
        with ExitStack() as stack:
            if job.form == switchable.SWITCHABLE:
                slots = stack.enter_context(switchable.slots_in(model))
                call = stack.enter_context(switchable.factors_as_inputs(model, slots, call))
                call = replace(call, inputs=inputs_on_meta(call.inputs)) if job.checkpoint else call
            weights = stack.enter_context(structure(model, job.form == "folded", job.checkpoint))
            return Translated(translate(model, call, self.opset), weights, slots, seen(model, weights), self)


@dataclass(frozen=True)
class Optimise(Pass):
    """Simplify the graph without a look at the weights' numbers, let these in, and name inputs and outputs."""

    optimize: bool = True
    input_names: Sequence[str] | None = None
    output_names: Sequence[str] | None = None

    name = "optimise"
    requires = (given(Job), given(Translated))
    ensures = (given(Optimised),)

    def call(self, model: nn.Module, facts: Facts) -> Result:
        job, translated = facts[Job], facts[Translated]
        made, slots = self.of(job, translated), {}
        if translated.slots:
            slots = switchable.open_slots(made.graph.graph, translated.slots, len(job.call.names), job.slots)
        notes = {
            "lora_fx.form": job.form,
            "lora_fx.adapters": json.dumps(job.adapters),
            GRAPH: graph_digest(made.graph),
        }
        if job.acting:
            notes["lora_fx.weights"] = json.dumps({n: [*map(_said, own)] for n, own in sorted(job.acting.items())})
            notes["lora_fx.adapter_sha256"] = adapter_digest(job.acting)
        if slots:
            manifest = switchable.manifest(model, slots, notes[GRAPH], translated.weights)
            notes[switchable.MANIFEST] = json.dumps(manifest)
        describe(made.graph, notes)
        return Result(model, False, (made,))

    def of(self, job: Job, translated: Translated) -> Optimised:
        unfilled = blind(translated.program.model, translated.weights, self.optimize)
        made = self.filled(job, translated, unfilled, translated.weights)
        translated.program.model = made.graph  # whose inputs and outputs have the names that the file gives them
        return Optimised(made, unfilled, self)

    def filled(self, job: Job, translated: Translated, unfilled: Blind, weights: Weights) -> Filled:
        """With these numbers, and names of inputs and outputs."""
        made = fill(unfilled, weights)
        name_interface(made.graph.graph, translated.program, job.call, self.input_names, self.output_names)
        return made


@dataclass(frozen=True)
class Write(Pass):
    """Write the file beside its target.

    Args:
        external_data: as in `export_onnx`.
    """

    external_data: bool | None = None

    name = "write"
    requires = (given(Job), given(Optimised))
    ensures = (given(Written),)

    def call(self, model: nn.Module, facts: Facts) -> Result:
        job = facts[Job]
        folder = facts.enter(folder_beside(job.path))
        place = folder / job.path.name
        graph = place / job.layout.graph
        graph.parent.mkdir(parents=True, exist_ok=True)
        files = save_model(facts[Optimised].graph, graph, self.external_data, job.layout.data)
        configs = [place / name for name in job.layout.configs]
        for file, said in zip(configs, job.layout.configs.values(), strict=True):
            assert job.step is not None
            file.write_text(json.dumps(said(job.step, len(files) > 1), indent=2) + "\n", encoding="utf-8")
        return Result(model, False, (Written(files, configs, folder, place),))


@dataclass(frozen=True)
class Run(Pass):
    """Have onnx check the file, run it in ONNX Runtime and hold it against torch: a switchable one with each adapter,
    and with none."""

    name = "run"
    requires = (given(Job), given(Translated), given(Optimised), given(Written))
    ensures = (given(Compared),)

    def call(self, model: nn.Module, facts: Facts) -> Result:
        job = facts[Job]
        check_file(facts[Written].files[0])
        session, missing = None, "the model is on meta, and has nothing to compare it with"
        if not job.checkpoint:
            session, missing = open_session(facts[Written].files[0])
        if session is None:
            return Result(model, False, (Compared((), missing),))
        found: list[Comparison] = []
        with session, closing(_in_slots(model, job, facts[Optimised].graph)) as states:
            for name, expected, fed in states:
                own = compare_runs(model, session, facts[Translated].program, job.call, expected, fed)
                found += [replace(comparison, adapter=name) for comparison in own]
        return Result(model, False, (Compared(tuple(found)),))


def _in_slots(model: nn.Module, job: Job, graph: Any) -> Generator[tuple[str, list[torch.Tensor], dict[str, Any]]]:
    """What may be in the slots of a file: its name, what torch returns with it, and the factors. While one is looked
    at, the model has that adapter alone. A file without slots has one such state, without a name."""
    if job.form != switchable.SWITCHABLE:
        yield "", job.expected, {}
        return
    every, slots = inventory(model).adapters, switchable.read_manifest(graph.metadata_props, "")
    empty = switchable.empty_slots(slots) if job.slots == REQUIRED else {}
    for name in ("", *job.adapters):
        with borrowed(model):
            for adapter in every:
                adapter.change(active=adapter.name == name)
            wire(model)
            fed = switchable.factors_of(model, name) if name else {}
            yield name or "no adapter", run_torch(model, job.call.inputs), empty | fed


@dataclass(frozen=True)
class Prove(Pass):
    """Hold the file, as it is read back, against the base model's graph and numbers."""

    name = "prove"
    requires = (given(Job), given(Translated), given(Optimised), given(Written))
    ensures = (given(Proof),)

    def call(self, model: nn.Module, facts: Facts) -> Result:
        translated, made, written = facts[Translated], facts[Optimised], facts[Written]
        base, weights = self._base(model, replace(facts[Job], form="base"), translated, made)
        proof = prove(written.files[0], translated.weights, made.filled, base, weights)
        if not facts.get(Compared) or facts[Compared].not_run or written.bytes > INLINE:
            return Result(model, False, (proof,))
        inside = written.scratch / "base"
        inside.mkdir()
        (file, *_) = save_model(base, inside / "base.onnx", True)
        fused = [fused_operators(path, inside) for path in (written.files[0], file)]
        return Result(model, False, (replace(proof, fused=fused[0], base_fused=fused[1]),))

    def _base(self, model: nn.Module, job: Job, translated: Translated, made: Optimised) -> tuple[Any, Weights]:
        """The base model's graph, and its weights. Where what was traced for the file was the base model itself, and no
        adapted weight had numbers while it was optimized, it is the file's graph from before any came in, with the
        base's; else the base is translated by itself."""
        adapted = {name for name, weight in translated.weights.items() if weight.adapters}
        with unwired(model):
            with structure(model, False, job.checkpoint) as weights:
                same = seen(model, weights) == translated.seen
            if same and adapted & made.blind.read <= made.blind.empty:
                return made.how.filled(job, translated, made.blind, weights).graph, weights
            plain = translated.how.of(model, job)
            return made.how.of(job, plain).graph, plain.weights


@dataclass(frozen=True)
class Quantise(Pass):
    """Put integers in the place of float weights, and measure what that costs. What was found out before is of the file
    in float, which is gone then."""

    quantize: str
    check: bool = True
    external_data: bool | None = None

    name = "quantise"
    requires = (given(Job), given(Translated), given(Optimised), given(Written))
    ensures = (given(Quantized),)

    def call(self, model: nn.Module, facts: Facts) -> Result:
        job, written, target = facts[Job], facts[Written], facts[Job].layout
        file, before, external = written.files[0], written.bytes, len(written.files) > 1
        inside = written.scratch / "quantised"
        inside.mkdir()
        graph = quantise(file, inside, self.quantize, external)
        # The configurations beside it say already whether there is a data file.
        files = save_model(graph, file, external or self.external_data, target.data)
        written = replace(written, files=files)
        found: list[Loss] = []
        if self.check:
            check_file(files[0])
            session, missing = open_session(files[0])
            if session is None:
                refuse("quantize", missing, "leave quantize out")
            with session, closing(_in_slots(model, job, graph)) as states:
                for name, expected, fed in states:
                    actual = run_session(session, facts[Translated].program, job.call.inputs, fed)
                    found += losses([value.name for value in graph.graph.outputs], expected, actual, name)
        said = Quantized(self.quantize, products(graph), left_float(graph), (before, written.bytes), tuple(found))
        return Result(
            model,
            False,
            (replace(facts[Optimised], filled=replace(facts[Optimised].filled, graph=graph)), written, said),
        )


@dataclass(frozen=True)
class Publish(Pass):
    """Move the files into their place, and report."""

    name = "publish"
    requires = (given(Job), given(Translated), given(Optimised), given(Written))
    ensures = (given(ExportReport),)

    def call(self, model: nn.Module, facts: Facts) -> Result:
        job, written, graph = facts[Job], facts[Written], facts[Optimised].graph
        path = job.path / job.layout.graph
        compared, counts = facts.get(Compared) or Compared((), "check=False"), operators(graph)
        report = ExportReport(
            path=path,
            data=path.with_name(written.files[1].name) if len(written.files) > 1 else None,
            bytes=written.bytes,
            opset=facts[Translated].how.opset,
            nodes=counts.total(),
            operators=dict(sorted(counts.items())),
            initializers=len(graph.graph.initializers),
            form=job.form,
            adapters=job.adapters,
            graph=graph.metadata_props[GRAPH],
            target=job.target,
            configs=tuple(job.path / file.name for file in written.configs),
            inputs=tuple(map(_info, graph.graph.inputs[: len(job.call.names)])),
            outputs=tuple(map(_info, graph.graph.outputs)),
            comparisons=compared.comparisons,
            not_run=compared.not_run,
            certificate=facts.get(Certificate),
            proof=facts.get(Proof),
            quantized=facts.get(Quantized),
        )
        if job.layout.graph:
            move_folder(written.place, written.files, written.configs, job.path)
        else:
            move_files(written.files, path)
        return Result(model, False, (report,))


def _said(adapter: Adapter) -> dict[str, Any]:
    said: dict[str, Any] = {"adapter": adapter.name}
    if adapter.kind.low_rank:
        said |= {"rank": adapter.width, "alpha": adapter.alpha, "scale": adapter.scale}
    else:
        said |= {"kind": adapter.kind.name, **adapter.settings}
    said |= {} if adapter.strength == 1 else {"strength": adapter.strength}
    return said | ({"role": adapter.role} if adapter.role else {})


def _info(value: Any) -> TensorInfo:
    shape = tuple(size if isinstance(size, int) else str(size.value) for size in value.shape or ())
    return TensorInfo(value.name, value.dtype.name.lower(), shape)


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

    with warnings.catch_warnings(), ExitStack() as stack:
        for message in _WARNINGS:
            warnings.filterwarnings("ignore", message)
        for logger in map(logging.getLogger, _NOISE):
            logger.addFilter(known)
            stack.callback(logger.removeFilter, known)
        yield
