"""The ONNX graph of a model: translated by torch, optimized without a look at the weights, described.

torch's optimizer depends on numbers: it drops zero biases and merges equal initializers. A folded model has other
numbers than its base model and must have the same graph, so the graph is optimized *blind*, while parameters have no
values; then the values enter by name, and only what is computed from weights alone (a transposed weight, a batch norm
behind a convolution) is evaluated.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import io
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from lora_fx.errors import ExportError, essence
from lora_fx.export.onnx_calls import Call, axis_names, cache_names, is_flat_cache
from lora_fx.export.onnx_weights import Weights
from lora_fx.frontend import no_fast_paths

_FOLDABLE = 8192  # elements: from here on onnxscript evaluates nothing but the Transpose of a weight with no other use
_KIND = "pkg.torch.export.graph_signature.InputSpec.kind"


def translate(model: nn.Module, call: Call, opset: int) -> Any:
    """torch.onnx's program, not optimized yet."""
    inputs = call.traced()
    shown = io.StringIO()  # where it fails, torch prints the graph so far; the exception says more
    try:
        with torch.no_grad(), no_fast_paths(), redirect_stderr(shown):
            program = torch.onnx.export(
                model.eval(),
                inputs.args,
                kwargs=inputs.kwargs,
                dynamic_shapes=call.shapes,
                opset_version=opset,
                custom_translation_table=_translations(),
                dynamo=True,
                optimize=False,
                verbose=False,
            )
    except Exception as error:
        raise ExportError(
            f"torch.onnx.export refuses the model: {essence(error)}",
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
        program.rename_axes(axis_names(program, call))
    return program


def _translations() -> dict[Any, Callable[..., Any]]:
    """Our own, for convolutions: torch's give one without a bias a bias of zeros, which for conv3d has two axes, and
    which nothing takes out again where the weight's channels are dynamic, as the rank of a slot is."""
    from onnxscript.function_libs.torch_lib.ops.core import aten_convolution

    def conv(x, weight, bias=None, stride=(1,), padding=(0,), dilation=(1,), groups=1):  # type: ignore[no-untyped-def]
        return aten_convolution(x, weight, bias, stride, padding, dilation, groups=groups)

    aten = torch.ops.aten
    return dict.fromkeys((aten.conv1d.default, aten.conv2d.default, aten.conv3d.default), conv)


def name_interface(
    program: Any, call: Call, input_names: Sequence[str] | None, output_names: Sequence[str] | None
) -> None:
    """Names of inputs and outputs: the given ones, else those of the call's arguments and of the keys of a dict that
    the model returns; caches are ``past_key_values.0.key`` and ``present.0.key``, as in Optimum's files."""
    graph = program.model.graph
    for values, given, own, place in (
        (graph.inputs[: len(call.names)], input_names, call.names, "input_names"),
        (graph.outputs, output_names, _output_names(program), "output_names"),
    ):
        if given is not None and (len(given) != len(values) or len({*given}) != len(given)):
            raise ExportError(
                f"{place} is {[*given]}: {len({*given})} names for {len(values)} tensors",
                place=place,
                remedy=f"give one name for each of {', '.join(value.name for value in values)}",
            )
        for value, name in zip(values, given or own, strict=True):
            if name and name != value.name:
                _take_name(graph, value, name)


def _take_name(graph: Any, value: Any, name: str) -> None:
    """Whoever else has the name gets another one."""
    everything = [*graph.inputs, *graph.initializers.values(), *(v for node in graph for v in node.outputs)]
    taken = {other.name: other for other in everything}
    if name in taken:
        other, number = taken[name], 1
        while f"{name}_{number}" in taken:
            number += 1
        other.name = f"{name}_{number}"
    value.name = name


def _output_names(program: Any) -> list[str]:
    """A name for each output; empty where the model says none."""
    spec = program.exported_program.call_spec.out_spec
    count = len(program.model.graph.outputs)
    if spec.num_leaves != count:
        return [""] * count
    structure = pytree.tree_unflatten(list(range(count)), spec)
    keyed = structure.items() if isinstance(structure, Mapping) else enumerate(structure if count > 1 else [structure])
    names: list[str] = []
    for key, part in keyed:
        if is_flat_cache(part):
            names += [f"present.{name}" for name in cache_names(part)]
        else:
            inside = len(pytree.tree_leaves(part))
            named = isinstance(key, str)
            names += [(key if inside == 1 else f"{key}.{n}") if named else "" for n in range(inside)]
    return names


def _remedy(model: nn.Module) -> str:
    if hasattr(model, "set_experts_implementation"):
        return 'if the model is a mixture of experts, call model.set_experts_implementation("batched_mm") before'
    return "the exception this one was raised from says more; torch.export.export(model, ...) shows it alone"


# ── optimization that cannot see the weights ─────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Contents:
    """What the initializers of an optimized graph hold."""

    read: frozenset[str]
    """Parameters and buffers that the program reads."""
    held: Mapping[str, tuple[str, tuple[int, ...]]]
    """Initializer → the parameter or buffer whose numbers it holds, and its axes in the order that they have there."""


def optimize(model: Any, weights: Weights, wanted: bool = True) -> Contents:
    """Optimize blind, then let the values in and evaluate what depends on weights alone; where that is not wanted, let
    the values in."""
    import numpy
    from onnx_ir.passes import common

    values = _blind(model, weights)
    read = frozenset(model.graph.initializers) & weights.keys()
    axes = {name: (name, tuple(range(len(weights[name].shape)))) for name in read}
    kept = {name: model.graph.initializers[name].const_value or values[name] for name in read}
    if not wanted:
        with _hidden(model, values, set()):
            pass
    else:
        with numpy.errstate(all="ignore"):  # a constant log(0) is evaluated whatever the user's warning filters are
            _optimize_blind(model)
            shared = _shared(model, weights) & values.keys()  # buffers are the same in the base
            axes |= _transpose_weights(model, values, shared)
            large = {name for name, value in values.items() if value.size > _FOLDABLE}
            with _hidden(model, values, large):
                _evaluate_weights(model)
            with _hidden(model, values, shared):
                _fuse_batch_norms(model)
    common.RemoveUnusedNodesPass()(model)
    missing = [name for name, value in model.graph.initializers.items() if value.const_value is None]
    assert not missing, f"initializers without a value: {missing}"
    kept |= values
    held = {name for name, value in model.graph.initializers.items() if value.const_value is kept.get(name)}
    return Contents(read, {name: axes[name] for name in held})


def _blind(model: Any, weights: Weights) -> dict[str, Any]:
    """Take the values of all parameters out of the graph. Buffers (masks, positions) are what they are in the base."""
    from onnx_ir.tensor_adapters import TorchTensor

    values = {}
    for name, value in model.graph.initializers.items():
        kind = value.metadata_props.get(_KIND)
        weight = weights.get(name)
        if weight is not None:
            made = weight.stored or weight.adapters
            value.const_value = _lazy(weight.numbers, value) if made else TorchTensor(weight.load(), name=name)
        if kind == "PARAMETER":
            values[name], value.const_value = value.const_value, None
    return values


def _lazy(numbers: Callable[[], torch.Tensor], value: Any, perm: Sequence[int] | None = None) -> Any:
    """A tensor of the file that is made when it is asked for, each time anew: nothing keeps it."""
    import onnx_ir
    from onnx_ir.tensor_adapters import TorchTensor

    def make() -> Any:
        tensor = numbers()
        tensor = tensor if perm is None else tensor.permute(*perm)
        return TorchTensor(tensor.contiguous(), name=value.name)

    return onnx_ir.LazyTensor(make, dtype=value.dtype, shape=onnx_ir.Shape(value.shape), name=value.name)


def _optimize_blind(model: Any) -> None:
    """What torch does with a program. One rule is left out: it takes a batch of matrices that is as large as their
    heads for a broadcast, and makes a wrong MatMul of it."""
    from onnx_ir import passes
    from onnx_ir.passes import common
    from onnxscript import rewriter
    from onnxscript.optimizer import _constant_folding as constants
    from onnxscript.rewriter.rules.common import _broadcast_to_matmul

    wrong = {id(rule) for rule in _broadcast_to_matmul.rules}
    rules = [rule for rule in rewriter._DEFAULT_REWRITE_RULES if id(rule) not in wrong]
    passes.Sequential(
        common.InlinePass(),
        passes.PassManager(
            [
                constants.FoldConstantsPass(
                    shape_inference=True,
                    input_size_limit=constants.DEFAULT_CONSTANT_FOLD_INPUT_SIZE_LIMIT,
                    output_size_limit=constants.DEFAULT_CONSTANT_FOLD_OUTPUT_SIZE_LIMIT,
                ),
                rewriter.RewritePass(rules),
                common.RemoveUnusedNodesPass(),
                common.RemoveUnusedFunctionsPass(),
                common.RemoveUnusedOpsetsPass(),
            ],
            steps=2,
            early_stop=True,
        ),
        common.RemoveUnusedNodesPass(),
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        common.LiftSubgraphInitializersToMainGraphPass(),
        common.DeduplicateInitializersPass(),
        common.CommonSubexpressionEliminationPass(),
        common.OutputFixPass(),
        common.NameFixPass(),
    )(model)


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


def _shared(model: Any, own: Weights) -> set[str]:
    """Weights that do several things in the base model. What the optimizer does to a weight with a single use, it must
    not do to the copy that a fold has split off."""
    weights = model.graph.initializers
    groups: dict[int, list[str]] = {}
    for name in weights:
        if name in own:
            groups.setdefault(own[name].storage, []).append(name)
    jobs = {key: {_job(node) for name in names for node in weights[name].consumers()} for key, names in groups.items()}
    return {name for key, names in groups.items() if len(jobs[key]) > 1 for name in names}


def _job(node: Any) -> Any:
    """What a node does with a weight: two transpositions of one weight are one."""
    if node.op_type == "Transpose":
        return "Transpose", *(node.attributes["perm"].as_ints() if "perm" in node.attributes else ())
    return node


def _transpose_weights(model: Any, values: dict[str, Any], shared: set[str]) -> dict[str, Any]:
    """A weight that is only ever transposed goes into the file transposed, as ``….transposed``."""
    import onnx_ir

    weights, found = model.graph.initializers, {}
    for node in list(model.graph):
        source = node.inputs[0] if node.op_type == "Transpose" and not node.domain else None
        if source is None or source.name not in values or source.name in shared or len(source.uses()) > 1:
            continue
        (old,) = node.outputs
        if old.is_graph_output():
            continue
        given = node.attributes["perm"].as_ints() if "perm" in node.attributes else reversed(range(len(source.shape)))
        perm = tuple(given)
        shape = onnx_ir.Shape([source.shape[axis] for axis in perm])
        new = onnx_ir.Value(name=f"{source.name}.transposed", shape=shape, type=source.type)
        values[new.name] = _lazy(partial(_torch, values[source.name]), new, perm)
        found[new.name] = source.name, perm
        old.replace_all_uses_with(new)
        model.graph.remove(node, safe=True)
        weights[new.name] = new
    return found


def _torch(tensor: Any) -> torch.Tensor:
    """The numbers of a parameter's tensor, in torch's own where they are there."""
    raw = tensor.raw
    return raw if isinstance(raw, torch.Tensor) else raw().raw


# ── what the file says about itself ──────────────────────────────────────────────────────────────────────────────────


def describe(model: Any, notes: Mapping[str, str]) -> None:
    """Say who made it and what it is; take out the traces and source paths of the machine it was made on."""
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
    # ONNX Runtime's tools look for torch's name to know what they have before them.
    model.producer_name, model.producer_version, model.doc_string = "pytorch", str(torch.__version__), None
    model.metadata_props.clear()
    model.metadata_props.update({"lora_fx.version": _version(), **notes})


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


def operators(model: Any) -> Counter[str]:
    """How many nodes of each operator, subgraphs and functions included."""
    import onnx_ir

    graphs = (model.graph, *model.functions.values())
    return Counter(node.op_type for graph in graphs for node in onnx_ir.traversal.RecursiveGraphIterator(graph))


# ── the graph as text ────────────────────────────────────────────────────────────────────────────────────────────────


def graph_lines(model: Any, renamed: Mapping[str, str] | None = None) -> list[str]:
    """All of a file but the numbers in its initializers, one line for each thing: equal texts are equal graphs.

    Args:
        renamed: initializers that stand for others.
    """
    names = dict(renamed or {})

    def lines(graph: Any) -> Iterator[str]:
        for kind, values in (("input", graph.inputs), ("output", graph.outputs)):
            yield from (f"{kind} {_typed(value, names)}" for value in values)
        yield from sorted({f"initializer {_typed(value, names)}" for value in graph.initializers.values()})
        for node in graph:
            inputs = ", ".join("–" if value is None else names.get(value.name, value.name) for value in node.inputs)
            outputs = ", ".join(_typed(value, names) for value in node.outputs)
            yield f"{outputs} = {node.domain}.{node.op_type}.{node.overload}({inputs}) as {node.name}"
            for attribute in sorted(node.attributes.values(), key=lambda a: a.name):
                yield from _attribute_lines(attribute, lines)

    opsets = [f"opset {domain or 'ai.onnx'} {version}" for domain, version in sorted(model.opset_imports.items())]
    return [*opsets, *lines(model.graph), *(line for f in model.functions.values() for line in lines(f))]


def _typed(value: Any, names: Mapping[str, str]) -> str:
    shape = "?" if value.shape is None else ", ".join(str(getattr(size, "value", size)) for size in value.shape)
    return f"{names.get(value.name, value.name)}: {value.dtype}[{shape}]"


def _attribute_lines(attribute: Any, lines: Callable[[Any], Iterator[str]]) -> Iterator[str]:
    import onnx_ir

    kind = attribute.type
    if kind in (onnx_ir.AttributeType.GRAPH, onnx_ir.AttributeType.GRAPHS):
        graphs = [attribute.value] if kind == onnx_ir.AttributeType.GRAPH else attribute.value
        yield from (f"  {attribute.name}: {line}" for graph in graphs for line in lines(graph))
        return
    text = onnx_ir.to_proto(attribute).SerializeToString(deterministic=True)
    yield f"  {attribute.name}: {hashlib.sha256(text).hexdigest()}"


def graph_digest(model: Any) -> str:
    return hashlib.sha256("\n".join(graph_lines(model)).encode()).hexdigest()
