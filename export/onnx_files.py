"""Write a model as an ONNX file that is proven to be the model.

    torch(adapted)  ≡  ONNX Runtime(file)          up to rounding, on the example inputs and on another shape
    graph(folded)   ≅  graph(base)                 node for node

Adapters are folded into a copy first, so the file is the base graph with other numbers in it. For that the graph must
not depend on the numbers, and torch's optimizer drops zero biases and merges equal initializers. So the graph is
optimized *blind*, while parameters have no values; then the values enter by name, and only what is computed from
weights alone (a transposed weight, a batch norm behind a convolution) is evaluated.

The file is written beside its target, checked, run, compared, and only then moved into place.
"""

from __future__ import annotations

import copy
import importlib
import importlib.metadata
import inspect
import io
import json
import logging
import math
import os
import re
import secrets
import shutil
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from lora_fx import wiring
from lora_fx.certification import Certificate, certify_adapted
from lora_fx.changes import alone
from lora_fx.errors import CaptureError, ExportError
from lora_fx.frontend import Inputs, no_fast_paths, normalize_inputs, refuse_unready, undisturbed
from lora_fx.passes.fold import fold
from lora_fx.verification import Report, cast_inputs, compare, move_weights, relative_error, rounding_step

OPSETS = range(18, 25)
PROVIDER = "CPUExecutionProvider"

_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
_INLINE = 2**31 - 2**26  # bytes of weights that fit, with their graph, into a protobuf message of 2 GiB
_FOLDABLE = 8192  # elements: from here on onnxscript evaluates nothing but the Transpose of a weight with no other use


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
class Comparison:
    """torch and ONNX Runtime on the same inputs."""

    shapes: tuple[tuple[int, ...], ...]
    """The shape of each input."""
    reports: tuple[Report, ...]
    """One for each output. Integers must be equal wherever rounding alone does not change them in torch: `error` is the
    share of the elements that differ, `noise` the share that rounding changes."""

    @property
    def equivalent(self) -> bool:
        return all(self.reports)

    @property
    def worst(self) -> Report:
        return max(self.reports, key=_excess)

    def __str__(self) -> str:
        return f"{' '.join('×'.join(map(str, s)) or 'scalar' for s in self.shapes)}: {self.worst}"


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
    """"folded" or "unfolded" for a model with adapters, else "base"."""
    adapters: tuple[str, ...]
    """The names of the adapters in it."""
    inputs: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]
    comparisons: tuple[Comparison, ...]
    """ONNX Runtime against torch: the example inputs, then another shape where axes are dynamic."""
    not_run: str = ""
    """Why ONNX Runtime did not run the file, where its CPU provider cannot: then only `onnx.checker` has seen it."""
    certificate: Certificate | None = None
    """Where a model with branches was exported: that every use of every adapted weight was W + s·B·A; see `certify`."""

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
        lines += [f"  NOT RUN, only checked by onnx.checker: {self.not_run}"] if self.not_run else []
        return "\n".join(lines)


def _excess(report: Report) -> float:
    """How many times its bound an error is."""
    if not math.isfinite(report.error):
        return math.inf
    return report.error / report.bound if report.bound else (math.inf if report.error else 0.0)


# ── the verb ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def export_onnx(
    model: nn.Module,
    example_inputs: Any,
    path: str | os.PathLike[str],
    *,
    dynamic_shapes: Any = None,
    opset: int = 20,
    adapters: str = "folded",
    external_data: bool | None = None,
) -> ExportReport:
    """Write `model`, in eval mode, as an ONNX file, and compare ONNX Runtime's outputs with torch's.

    The model itself stays bitwise what it is. When it has active adapters, a copy is folded.

    Args:
        example_inputs: a tensor, a tuple of positional or a dict of keyword inputs.
        path: the file. It is replaced in one step, after all checks; any error leaves what was there.
        dynamic_shapes: which axes may have other sizes, in the terms of `torch.export`, keyed like the call:
            ``{"input_ids": {0: "batch", 1: Dim("tokens", max=512)}}``. Inputs left out are static.
        opset: 18 to 24.
        adapters: "folded", or "unfolded" to keep the branches as nodes of the graph.
        external_data: weights in a file of their own, ``<path>.data``; None where they need it, above 2 GB. A kill at
            any moment leaves the old graph with the old weights or the new one with the new (they may then have the
            name ``<path>.<8 digits>.data``, which the next export clears away).

    Returns:
        What was written, and by how much ONNX Runtime differs from torch.

    Raises:
        ExportError: ONNX Runtime differs from torch by more than rounding explains, the exporter refuses the model, a
            package is missing, the path cannot be written, or an argument is out of range.
        CaptureError: the model does not run on the inputs.
        FoldError: the adapters cannot be folded.
    """
    _check_arguments(model, opset, adapters)
    target = _writable(path)
    inputs = normalize_inputs(model, example_inputs)
    with alone(model, "export_onnx"), undisturbed(model), _quiet():
        model.eval()
        call = _Call.of(model, inputs, dynamic_shapes)
        expected = _run(model, inputs)
        certificate = certify_adapted(model, inputs, gradients=False) if wiring.adapted_storages(model) else None
        subject, form, names = _subject(model, adapters)
        program = _translate(subject, call, opset)
        _optimize(program.model, _storages(model))
        _describe(program.model, form, names)
        with _folder_beside(target) as folder:
            files = _save(program.model, folder / target.name, external_data)
            _check_file(files[0])
            session, not_run = _session(files[0])
            comparisons = _compare_runs(model, session, program, call, expected) if session else ()
            report = _report(program.model, target, files, opset, form, names, comparisons, not_run, certificate)
            del session
            _move(files, target)
    return report


# ── arguments ────────────────────────────────────────────────────────────────────────────────────────────────────────


def _check_arguments(model: nn.Module, opset: int, adapters: str) -> None:
    if not isinstance(model, nn.Module):
        raise ExportError(
            f"{type(model).__name__} is no torch.nn.Module", place="model", remedy="pass the module itself"
        )
    if adapters not in ("folded", "unfolded"):
        raise ExportError(f"adapters={adapters!r} is unknown", place="adapters", remedy='choose "folded" or "unfolded"')
    if isinstance(opset, bool) or not isinstance(opset, int) or opset not in OPSETS:
        raise ExportError(
            f"opset {opset!r} is not supported: torch's translations start at opset {OPSETS[0]} (files below it were "
            f"invalid), and nothing above {OPSETS[-1]} has been checked",
            place="opset",
            remedy=f"choose {OPSETS[0]} to {OPSETS[-1]}; 20 is the default",
        )
    refuse_unready(model)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.is_meta:
            raise ExportError(
                "the tensor is on meta: it has no numbers", place=name, remedy="materialise the model first"
            )
    for package in _PACKAGES:
        _require(package)


def _require(package: str) -> Any:
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ExportError(
            f"the package {package} cannot be imported: {error}",
            place="export_onnx",
            remedy="pip install 'lora-fx[onnx]' (or 'lora-fx[onnx-gpu]')",
        ) from error


def _writable(path: str | os.PathLike[str]) -> Path:
    """The path, of a file that can be written: known before minutes of work, not after them."""
    target = Path(path).absolute()
    reason = ""
    if target.is_dir():
        reason = "is a folder"
    elif not target.parent.is_dir():
        reason = f"lies in a folder that does not exist: {target.parent}"
    else:
        try:
            with tempfile.TemporaryFile(dir=target.parent, prefix=f".{target.name}.data"):
                pass
        except OSError as error:
            reason = f"cannot be written: {error.strerror}"
    if reason:
        raise ExportError(
            f"the path {reason}", place=str(path), remedy="pass the path of a file in a folder you may write"
        )
    return target


# ── inputs and dynamic axes ──────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class _Call:
    """A call of the model, and which of its axes are dynamic."""

    inputs: Inputs
    """With keyword inputs in the order of the signature, which torch.export wants."""
    shapes: dict[str, Any] | None
    """torch.export's dynamic_shapes for every argument, without names."""
    labels: dict[tuple[int, int], str]
    """(number of the input tensor, axis) → the name of an axis that must be dynamic; "" where it was given none."""

    @classmethod
    def of(cls, model: nn.Module, inputs: Inputs, dynamic_shapes: Any) -> _Call:
        bound = _bind(model, inputs)
        order = {name: n for n, name in enumerate(bound)}
        kwargs = dict(sorted(inputs.kwargs.items(), key=lambda item: order.get(item[0], len(order))))
        inputs = Inputs(inputs.args, kwargs)
        if dynamic_shapes is None:
            return cls(inputs, None, {})
        if hasattr(dynamic_shapes, "dynamic_shapes"):  # torch.export.ShapesCollection
            dynamic_shapes = dynamic_shapes.dynamic_shapes(model, inputs.args, inputs.kwargs)
        labels: list[dict[int, str]] = []
        shapes = _spread(_keyed(model, bound, dynamic_shapes), bound, "dynamic_shapes", labels)
        return cls(inputs, shapes, {(n, axis): label for n, own in enumerate(labels) for axis, label in own.items()})


def _bind(model: nn.Module, inputs: Inputs) -> dict[str, Any]:
    """argument name → value."""
    try:
        return inspect.signature(model.forward).bind(*inputs.args, **inputs.kwargs).arguments
    except TypeError as error:
        raise CaptureError(
            f"{type(model).__name__}.forward does not take {_described(inputs)}: {error}",
            place="example_inputs",
            remedy="pass inputs that model(*inputs) or model(**inputs) accepts",
        ) from error


def _described(inputs: Inputs) -> str:
    return f"{len(inputs.args)} positional inputs" + "".join(f", {name}=…" for name in inputs.kwargs)


def _keyed(model: nn.Module, bound: dict[str, Any], given: Any) -> dict[str, Any]:
    """Dynamic shapes by the name of the argument."""
    if isinstance(given, Mapping) and given and all(isinstance(key, int) for key in given):
        given = (given,)  # the axes of the one input
    if isinstance(given, tuple | list):
        if len(given) > len(bound):
            raise ExportError(
                f"dynamic_shapes has {len(given)} entries for {len(bound)} inputs",
                place="dynamic_shapes",
                remedy=f"give one entry for each of {', '.join(bound)}",
            )
        return dict(zip(bound, given, strict=False))
    if not isinstance(given, Mapping):
        raise ExportError(
            f"dynamic_shapes is {given!r}", place="dynamic_shapes", remedy='pass a dict: {"input": {0: "batch"}}'
        )
    keyed = dict(given)
    for name, parameter in inspect.signature(model.forward).parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD and name in bound and name not in keyed:
            keyed[name] = {key: keyed.pop(key) for key in list(keyed) if key in bound[name]}
    return keyed


def _spread(spec: Any, value: Any, place: str, labels: list[dict[int, str]]) -> Any:
    """The dynamic shapes of `value` with an entry for every part of it; names go to `labels`, one for each tensor."""
    if isinstance(value, torch.Tensor):
        labels.append({})
        return _axes(spec, value, place, labels[-1])
    if isinstance(value, Mapping):
        spec = {} if spec is None else spec
        if not isinstance(spec, Mapping) or not set(spec) <= set(value):
            raise _misfit(spec, place, f"a dict with keys among {', '.join(map(str, value))}")
        return {key: _spread(spec.get(key), part, f"{place}[{key!r}]", labels) for key, part in value.items()}
    if isinstance(value, tuple | list):
        spec = (None,) * len(value) if spec is None else spec
        if not isinstance(spec, tuple | list) or len(spec) != len(value):
            raise _misfit(spec, place, f"{len(value)} entries")
        parts = [_spread(s, part, f"{place}[{n}]", labels) for n, (s, part) in enumerate(zip(spec, value, strict=True))]
        return tuple(parts) if isinstance(value, tuple) else parts
    tensors = [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, torch.Tensor)]
    if spec is not None and not tensors:
        raise _misfit(spec, place, f"None: {value!r} is no tensor, and stays what it is")
    labels += [{} for _ in tensors]  # a container of another kind: torch.export knows how it wants its shapes
    return spec


def _axes(spec: Any, tensor: torch.Tensor, place: str, labels: dict[int, str]) -> Any:
    """The spec of one tensor, for torch.export, which knows no plain names."""
    if spec is None:
        return None
    if isinstance(spec, tuple | list):
        spec = dict(enumerate(spec))
    if not isinstance(spec, Mapping) or not all(isinstance(a, int) and 0 <= a < tensor.ndim for a in spec):
        raise _misfit(spec, place, f'axis numbers from 0 to {tensor.ndim - 1} as keys: {{0: "batch"}}')
    for axis, size in spec.items():
        hint = getattr(getattr(size, "type", None), "name", "")
        if size is None or isinstance(size, int) or hint in ("AUTO", "STATIC"):
            continue  # the exporter may decide
        name = size if isinstance(size, str) else getattr(size, "__name__", "")
        labels[axis] = name if name.isidentifier() else ""
    return {axis: torch.export.Dim.DYNAMIC if isinstance(size, str) else size for axis, size in spec.items()}


def _misfit(spec: Any, place: str, wanted: str) -> ExportError:
    return ExportError(f"{spec!r} does not fit the input", place=place, remedy=f"give {wanted}")


# ── what is exported ─────────────────────────────────────────────────────────────────────────────────────────────────


def _subject(model: nn.Module, adapters: str) -> tuple[nn.Module, str, tuple[str, ...]]:
    """The model to export, its form, and the names of its adapters."""
    active = wiring.adapted_storages(model)
    if not active:
        kept = [module.__dict__.get(wiring.FOLDED) for module in model.modules()]
        names = _names(adapter for entry in kept if entry for adapter, _ in entry.children.values())
        return model, "folded" if names else "base", names
    names = _names(adapter for storage in active for adapter in storage.adapters)
    if adapters == "unfolded":
        return model, "unfolded", names
    return fold(model, copy=True, final=True), "folded", names


def _names(adapters: Any) -> tuple[str, ...]:
    return tuple(sorted({adapter.name for adapter in adapters if adapter.active}))


def _storages(model: nn.Module) -> dict[str, int]:
    """Parameter name → the storage it has in the base model: a fold may give one use of a tied weight a copy."""
    found = {}
    for path, module in model.named_modules(remove_duplicate=False):
        kept = module.__dict__.get(wiring.FOLDED)
        for attribute, parameter in module._parameters.items():
            original = kept.originals.get(attribute) if kept else None
            owner = original if isinstance(original, nn.Parameter) else parameter
            if owner is not None:
                found[f"{path}.{attribute}".lstrip(".")] = owner.untyped_storage()._cdata
    return found


def _translate(model: nn.Module, call: _Call, opset: int) -> Any:
    """torch.onnx's program, not optimized yet."""
    inputs = call.inputs
    shown = io.StringIO()  # where it fails, torch prints the graph so far; the exception says more
    try:
        with torch.no_grad(), no_fast_paths(), redirect_stderr(shown):
            program = torch.onnx.export(
                model.eval(),
                inputs.args,
                kwargs=inputs.kwargs,
                dynamic_shapes=call.shapes,
                opset_version=opset,
                dynamo=True,
                optimize=False,
                verbose=False,
            )
    except Exception as error:
        raise ExportError(
            f"torch.onnx.export refuses the model: {_essence(error)}",
            place=type(model).__name__,
            remedy=_remedy(model),
        ) from error
    sys.stderr.write(shown.getvalue())
    assert program is not None
    version = program.model.opset_imports.get("", opset)
    if version != opset:
        raise ExportError(
            f"torch.onnx wrote opset {version} where {opset} was asked for",
            place=type(model).__name__,
            remedy=f"export with opset={version}",
        )
    if call.labels:
        program.rename_axes(_axis_names(program, call))
    return program


def _remedy(model: nn.Module) -> str:
    if hasattr(model, "set_experts_implementation"):
        return 'if the model is a mixture of experts, call model.set_experts_implementation("batched_mm") before'
    return "the exception this one was raised from says more; torch.export.export(model, ...) shows it alone"


def _essence(error: BaseException) -> str:
    """The first lines of what the exporter was told, without its advertising."""
    cause = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    text = f"{type(cause).__name__}: {cause}".strip()
    lines = [line for line in text.splitlines() if line.strip()][:4]
    return "\n  ".join(lines)[:1000]


def _axis_names(program: Any, call: _Call) -> dict[Any, str]:
    """torch's symbols → the names of the axes."""
    names: dict[Any, str] = {}
    for n, (value, _) in enumerate(_graph_inputs(program, call.inputs)):
        for axis, size in enumerate(value.shape):
            name = call.labels.get((n, axis))
            if isinstance(size, int) and name is not None:
                raise ExportError(
                    f"axis {axis} must be {size}: the model works with no other size, so the axis cannot be dynamic",
                    place=f"input {value.name!r}",
                    remedy="leave that axis out of dynamic_shapes",
                )
            if name:
                names.setdefault(str(size.value), name)
    return names


def _graph_inputs(program: Any, inputs: Inputs) -> list[tuple[Any, torch.Tensor]]:
    """(input of the graph, the tensor that is fed to it)."""
    tensors = [leaf for leaf in pytree.tree_leaves((inputs.args, inputs.kwargs)) if isinstance(leaf, torch.Tensor)]
    return list(zip(program.model.graph.inputs, tensors, strict=True))


# ── optimization that cannot see the weights ─────────────────────────────────────────────────────────────────────────


def _optimize(model: Any, storages: dict[str, int]) -> None:
    """Optimize blind, then let the values in and evaluate what depends on weights alone."""
    import numpy
    from onnx_ir.passes import common

    values = _blind(model)
    with numpy.errstate(all="ignore"):  # a constant log(0) is evaluated whatever the user's warning filters are
        _optimize_blind(model)
        shared = _shared(model, storages)
        transposed = _transposed_weights(model, values)
        large = {name for name in shared if values[name].size > _FOLDABLE}
        with _hidden(model, values, large):
            _evaluate_weights(model)
        with _hidden(model, values, shared):
            _fuse_batch_norms(model)
    common.RemoveUnusedNodesPass()(model)
    _rename(model, transposed)
    missing = [name for name, value in model.graph.initializers.items() if value.const_value is None]
    assert not missing, f"initializers without a value: {missing}"


def _blind(model: Any) -> dict[str, Any]:
    """Take the values of all parameters out of the graph. Buffers (masks, positions) are what they are in the base."""
    values = {}
    for name, value in model.graph.initializers.items():
        if value.metadata_props.get("pkg.torch.export.graph_signature.InputSpec.kind") == "PARAMETER":
            values[name], value.const_value = value.const_value, None
    return values


def _optimize_blind(model: Any) -> None:
    """What ONNXProgram.optimize does."""
    from torch.onnx._internal._lazy_import import onnxscript_apis

    optimized = onnxscript_apis.optimize(model)
    assert optimized is model


@contextmanager
def _hidden(model: Any, values: dict[str, Any], names: set[str]) -> Iterator[None]:
    """Inside, all weights have their values but these."""
    weights = model.graph.initializers
    for name, value in values.items():
        if name in weights and weights[name].const_value is None:
            weights[name].const_value = None if name in names else value
    yield
    for name in names & set(weights):
        weights[name].const_value = values[name]


def _evaluate_weights(model: Any) -> None:
    from onnxscript.optimizer import _constant_folding as constants

    constants.FoldConstantsPass(
        shape_inference=True,
        input_size_limit=_FOLDABLE,
        output_size_limit=constants.DEFAULT_CONSTANT_FOLD_OUTPUT_SIZE_LIMIT,
    )(model)


def _fuse_batch_norms(model: Any) -> None:
    from onnxscript.rewriter import RewritePass
    from onnxscript.rewriter.rules import common

    RewritePass(
        [
            common.fuse_batchnorm_into_conv_rule,
            common.fuse_batchnorm_into_conv_transpose_rule,
            common.fuse_batchnorm_into_gemm_rule,
        ]
    )(model)


def _shared(model: Any, storages: dict[str, int]) -> set[str]:
    """Weights that do several things in the base model. What the optimizer does to a weight with a single use, it must
    not do to the copy that a fold has split off."""
    weights = model.graph.initializers
    groups: dict[int, list[str]] = {}
    for name in weights:
        if name in storages:
            groups.setdefault(storages[name], []).append(name)
    jobs = {key: {_job(node) for name in names for node in weights[name].consumers()} for key, names in groups.items()}
    return {name for key, names in groups.items() if len(jobs[key]) > 1 for name in names}


def _job(node: Any) -> Any:
    """What a node does with a weight: two transpositions of one weight are one."""
    if node.op_type == "Transpose":
        return "Transpose", *(node.attributes["perm"].as_ints() if "perm" in node.attributes else ())
    return node


def _transposed_weights(model: Any, values: dict[str, Any]) -> dict[str, str]:
    """Name of the output → name for it, of every node that transposes a weight."""
    return {
        node.outputs[0].name: f"{node.inputs[0].name}.transposed"
        for node in model.graph
        if node.op_type == "Transpose" and node.inputs[0] is not None and node.inputs[0].name in values
    }


def _rename(model: Any, names: dict[str, str]) -> None:
    weights = model.graph.initializers
    for old, new in names.items():
        if old in weights and new not in weights:
            value = weights.pop(old)
            value.name = new
            weights[new] = value


# ── what the file says about itself ──────────────────────────────────────────────────────────────────────────────────


def _describe(model: Any, form: str, adapters: tuple[str, ...]) -> None:
    """Say who made it; take out the traces and source paths of the machine it was made on."""
    import onnx_ir

    graphs = [model.graph, *model.functions.values()]
    for graph in graphs:
        for node in onnx_ir.traversal.RecursiveGraphIterator(graph):
            _strip(node)
            for value in node.outputs:
                _strip(value)
    for graph in model.graphs():
        _strip(graph)
        for value in [*graph.inputs, *graph.outputs, *graph.initializers.values()]:
            _strip(value)
    for function in model.functions.values():
        function.metadata_props.clear()
    version = _version()
    model.producer_name, model.producer_version, model.doc_string = "lora_fx", version, None
    model.metadata_props.clear()
    model.metadata_props.update(
        {
            "lora_fx.version": version,
            "lora_fx.form": form,
            "lora_fx.adapters": json.dumps(list(adapters)),
            "torch.version": str(torch.__version__),
        }
    )


def _strip(thing: Any) -> None:
    """The module path of a node stays: viewers group by it."""
    namespace = thing.metadata_props.get("namespace")
    thing.metadata_props.clear()
    if namespace:
        thing.metadata_props["namespace"] = namespace
    thing.doc_string = None


def _version() -> str:
    try:
        return importlib.metadata.version("lora-fx")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


# ── files ────────────────────────────────────────────────────────────────────────────────────────────────────────────


@contextmanager
def _folder_beside(target: Path) -> Iterator[Path]:
    """A folder on the disk of the target, gone in the end with all that was not moved out of it."""
    try:
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as folder:
            yield Path(folder)
    except OSError as error:
        raise ExportError(
            f"the file cannot be written: {error}", place=str(target), remedy="make room, or pass another path"
        ) from error


def _save(model: Any, path: Path, external_data: bool | None) -> list[Path]:
    """The model's file, and its data file if it has one. The model names its data file without a folder."""
    import onnx_ir

    size = sum(value.const_value.nbytes for value in model.graph.initializers.values())
    if external_data is False and size > _INLINE:
        raise ExportError(
            f"{size:,} bytes of weights do not fit into one ONNX file, which ends at 2 GiB",
            place="external_data",
            remedy="leave external_data out",
        )
    if not (external_data or size > _INLINE):
        onnx_ir.save(model, path)
        return [path]
    data = path.with_name(f"{path.name}.data")
    onnx_ir.save(model, path, external_data=data.name)
    return [path, data] if data.exists() else [path]


def _check_file(path: Path) -> None:
    import onnx

    try:
        onnx.checker.check_model(str(path), full_check=True)
    except Exception as error:
        raise ExportError(
            f"onnx.checker refuses the file: {_essence(error)}",
            place=path.name,
            remedy="try another opset; report it to lora_fx with the model if no opset helps",
        ) from error


def _move(files: list[Path], target: Path) -> None:
    """Put the checked files in place, the graph last. At every moment the graph there has its own weights beside it."""
    places = [target.with_name(file.name) for file in files]
    taken = len(files) > 1 and places[1].exists()
    if taken:
        _pass(files[0], files[1], target)
    try:
        for file, place in reversed([*zip(files, places, strict=True)]):
            os.replace(file, place)
    except BaseException:
        if len(files) > 1 and not taken:
            places[1].unlink(missing_ok=True)
        raise
    for stale in target.parent.iterdir():
        if re.fullmatch(rf"{re.escape(target.name)}\.[0-9a-f]{{8}}\.data", stale.name):
            stale.unlink()


def _pass(graph: Path, data: Path, target: Path) -> None:
    """An old graph may have its weights under the data's name. Put one in its place that has a copy of the new ones
    under a name that was free: from then on nothing needs the old weights. (No hard link: onnx refuses those.)"""
    aside = target.with_name(f"{target.name}.{secrets.token_hex(4)}.data")
    passing = _reading_from(graph, aside.name)
    try:
        shutil.copyfile(data, aside)
        os.replace(passing, target)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise


def _reading_from(graph: Path, data: str) -> Path:
    """A copy of the graph that has its weights in the file of this name."""
    import onnx
    from onnx.external_data_helper import _get_all_tensors

    model = onnx.load(graph, load_external_data=False)
    for tensor in _get_all_tensors(model):
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = data
    path = graph.with_name("passing")
    path.write_bytes(model.SerializeToString())
    return path


# ── ONNX Runtime against torch ───────────────────────────────────────────────────────────────────────────────────────


def _session(path: Path) -> tuple[Any, str]:
    """A session on the CPU provider; or None, and what that provider lacks."""
    import onnxruntime
    from onnxruntime.capi.onnxruntime_pybind11_state import NotImplemented as Missing

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = torch.get_num_threads()
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=[PROVIDER]), ""
    except Missing as error:
        return None, f"{PROVIDER} has no kernel for it: {_essence(error)}"
    except Exception as error:
        raise ExportError(
            f"ONNX Runtime does not load the file: {_essence(error)}", place=path.name, remedy="try another opset"
        ) from error


def _compare_runs(
    model: nn.Module, session: Any, program: Any, call: _Call, expected: list[torch.Tensor]
) -> tuple[Comparison, ...]:
    """The example inputs, and one more shape where axes are dynamic, against the model as the user has it."""
    runs = [(call.inputs, expected), *_other_shape(model, program, call)]
    actual = [_run_session(session, program, inputs) for inputs, _ in runs]
    reference = copy.deepcopy(model).to(torch.float64)
    wide = [_run(reference, cast_inputs(inputs, torch.float64)) for inputs, _ in runs]
    move_weights(reference, _step(model, call.inputs))
    moved = [_run(reference, cast_inputs(inputs, torch.float64)) for inputs, _ in runs]
    comparisons = []
    for (inputs, outputs), got, exact, shifted in zip(runs, actual, wide, moved, strict=True):
        shapes = tuple(tuple(tensor.shape) for _, tensor in _graph_inputs(program, inputs))
        reports = tuple(_judge(*four) for four in zip(outputs, got, exact, shifted, strict=True))
        comparison = Comparison(shapes, reports)
        _refuse_difference(comparison, program)
        comparisons.append(comparison)
    return tuple(comparisons)


def _refuse_difference(comparison: Comparison, program: Any) -> None:
    if comparison.equivalent:
        return
    number = comparison.reports.index(comparison.worst)
    raise ExportError(
        f"ONNX Runtime is not the model, on inputs of shapes {comparison}",
        place=f"output {program.model.graph.outputs[number].name!r}",
        remedy="nothing was written; try another opset, and report it to lora_fx if no opset helps",
    )


def _judge(expected: torch.Tensor, got: torch.Tensor, exact: torch.Tensor, moved: torch.Tensor) -> Report:
    """One output: of torch in its own dtype, ONNX Runtime, torch in float64, and float64 with weights rounded once."""
    if expected.shape != got.shape or expected.dtype != got.dtype:
        raise ExportError(
            f"ONNX Runtime returns {got.dtype} {tuple(got.shape)} where torch returns {expected.dtype} "
            f"{tuple(expected.shape)}",
            place="output",
            remedy="nothing was written; an axis that changes may be missing in dynamic_shapes",
        )
    if expected.is_floating_point():
        noise = max(relative_error(moved, exact, exact), relative_error(expected, exact, exact))
        return compare(expected, got, exact, noise, expected.dtype)
    undecided = (expected != exact) | (exact != moved)
    wrong = (expected != got) & ~undecided
    share = _share(undecided)
    largest = float((expected.double() - got.double()).abs().max()) if expected.numel() else 0.0
    return Report(_share(wrong), largest, share, 0.0, str(expected.dtype).removeprefix("torch."), 1)


def _share(mask: torch.Tensor) -> float:
    return float(mask.double().mean()) if mask.numel() else 0.0


def _step(model: nn.Module, inputs: Inputs) -> float:
    """The coarsest rounding step of a weight, casts inside the model included where it can be captured."""
    try:
        return rounding_step(model, inputs)
    except CaptureError:  # it returns integers only
        return max((torch.finfo(p.dtype).eps / 2 for p in model.parameters() if p.is_floating_point()), default=0.0)


def _run(model: nn.Module, inputs: Inputs) -> list[torch.Tensor]:
    """Every tensor the model returns, in order, integers too; complex ones as pairs of reals, as ONNX has them."""
    with undisturbed(model), torch.no_grad(), no_fast_paths():
        torch.manual_seed(0)
        model.eval()
        try:
            output = inputs.call(model)
        except Exception as error:
            raise CaptureError(
                f"{type(model).__name__} does not run on the example inputs: {type(error).__name__}: {error}",
                place="example_inputs",
                remedy="pass inputs that model(*inputs) or model(**inputs) accepts, on the model's own device",
            ) from error
        return [_real(t.detach()).cpu().clone() for t in pytree.tree_leaves(output) if isinstance(t, torch.Tensor)]


def _real(tensor: torch.Tensor) -> torch.Tensor:
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


def _run_session(session: Any, program: Any, inputs: Inputs) -> list[torch.Tensor]:
    feeds = {value.name: _real(t.detach()).cpu().numpy() for value, t in _graph_inputs(program, inputs)}
    try:
        outputs = session.run(None, feeds)
    except Exception as error:
        shapes = {name: array.shape for name, array in feeds.items()}
        raise ExportError(
            f"ONNX Runtime does not run the file on inputs of shapes {shapes}: {_essence(error)}",
            place="the file",
            remedy="nothing was written; make fewer axes dynamic, or try another opset",
        ) from error
    return [torch.from_numpy(array) for array in outputs]


# ── another shape ────────────────────────────────────────────────────────────────────────────────────────────────────


def _other_shape(model: nn.Module, program: Any, call: _Call) -> list[tuple[Inputs, list[torch.Tensor]]]:
    """Inputs of other sizes on every dynamic axis, and what torch returns for them."""
    shapes = _symbolic_shapes(program)
    sizes = _symbol_sizes(shapes, call.inputs)
    if not sizes:
        return []
    ranges = {
        symbol: (bounds.lower, bounds.upper) for symbol, bounds in program.exported_program.range_constraints.items()
    }
    failure: Exception | None = None
    for drawn in _draws(sizes, ranges, any(p.is_cuda for p in model.parameters())):
        inputs = _resized(call.inputs, shapes, drawn)
        try:
            return [(inputs, _run(model, inputs))]
        except CaptureError as error:
            failure = error
    raise ExportError(
        f"axes are dynamic, but the model ran on no other size than {sorted(sizes.values())}: {failure}",
        place="dynamic_shapes",
        remedy="make those axes static, or give their range: Dim(name, min=…, max=…)",
    )


def _symbolic_shapes(program: Any) -> list[tuple[Any, ...]]:
    """For each input tensor its sizes: numbers, or sympy expressions."""
    exported = program.exported_program
    values = {node.name: node.meta.get("val") for node in exported.graph.nodes if node.op == "placeholder"}
    tensors = [
        values[name] for name in exported.graph_signature.user_inputs if isinstance(name, str) and name in values
    ]
    return [
        tuple(size.node.expr if isinstance(size, torch.SymInt) else size for size in tensor.shape)
        for tensor in tensors
        if isinstance(tensor, torch.Tensor)
    ]


def _symbol_sizes(shapes: list[tuple[Any, ...]], inputs: Inputs) -> dict[Any, int]:
    """symbol → its value in the example inputs."""
    import sympy

    sizes: dict[Any, int] = {}
    tensors = [leaf for leaf in pytree.tree_leaves((inputs.args, inputs.kwargs)) if isinstance(leaf, torch.Tensor)]
    for shape, tensor in zip(shapes, tensors, strict=True):
        for expression, size in zip(shape, tensor.shape, strict=True):
            free = list(getattr(expression, "free_symbols", ()))
            if len(free) == 1:
                symbol = free[0]
                solutions = [s for s in sympy.solve(expression - size, symbol) if s.is_integer]
                if solutions:
                    sizes.setdefault(symbol, int(solutions[0]))
    return sizes


def _draws(sizes: dict[Any, int], ranges: Mapping[Any, tuple[Any, Any]], careful: bool) -> Iterator[dict[Any, int]]:
    """Sizes to try, each axis by its own step. Growing can leave a table of positions, which a GPU never forgives."""
    grow = [lambda size, n: size + 1 + n, lambda size, n: size * 2, lambda size, n: size + 8 * (n + 1)]
    shrink = [lambda size, n: size - 1 - n, lambda size, n: size // 2, lambda size, n: size - 1]
    for step in shrink + grow if careful else grow + shrink:
        drawn = {}
        for n, (symbol, size) in enumerate(sizes.items()):
            lower, upper = ranges.get(symbol, (1, math.inf))
            drawn[symbol] = int(max(1, lower, min(step(size, n), upper)))
        if any(drawn[symbol] != size for symbol, size in sizes.items()):
            yield drawn


def _resized(inputs: Inputs, shapes: Sequence[tuple[Any, ...]], sizes: dict[Any, int]) -> Inputs:
    """The inputs in other sizes: entries repeated or left out evenly, so that masks and positions keep their order."""
    given = iter(shapes)

    def resize(leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor):
            return leaf
        for axis, expression in enumerate(next(given)):
            if getattr(expression, "free_symbols", ()):
                new, old = int(expression.subs(sizes)), leaf.shape[axis]
                leaf = leaf.index_select(axis, torch.arange(new, device=leaf.device) * old // new)
        return leaf

    args, kwargs = pytree.tree_map(resize, (inputs.args, inputs.kwargs))
    return Inputs(args, kwargs)


# ── the report ───────────────────────────────────────────────────────────────────────────────────────────────────────


def _report(
    model: Any,
    target: Path,
    files: list[Path],
    opset: int,
    form: str,
    adapters: tuple[str, ...],
    comparisons: tuple[Comparison, ...],
    not_run: str,
    certificate: Certificate | None,
) -> ExportReport:
    graphs = (model.graph, *model.functions.values())
    operators = Counter(node.op_type for graph in graphs for node in graph.all_nodes())
    return ExportReport(
        path=target,
        data=target.with_name(files[1].name) if len(files) > 1 else None,
        bytes=sum(file.stat().st_size for file in files),
        opset=opset,
        nodes=sum(operators.values()),
        operators=dict(sorted(operators.items())),
        initializers=len(model.graph.initializers),
        form=form,
        adapters=adapters,
        inputs=tuple(map(_info, model.graph.inputs)),
        outputs=tuple(map(_info, model.graph.outputs)),
        comparisons=comparisons,
        not_run=not_run,
        certificate=certificate,
    )


def _info(value: Any) -> TensorInfo:
    shape = tuple(size if isinstance(size, int) else str(size.value) for size in value.shape or ())
    return TensorInfo(value.name, value.dtype.name.lower(), shape)


# ── a clean console ──────────────────────────────────────────────────────────────────────────────────────────────────

#: What the exporter says where nothing is wrong: logger → how its message starts.
_NOISE = {
    "torch.onnx._internal.exporter._registration": "torchvision is not installed",
    "onnx_ir.passes.common.initializer_deduplication": "Skipped deduplication of initializer",
    "onnxscript.optimizer._constant_folding": "Skipping constant folding for op Split",
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
