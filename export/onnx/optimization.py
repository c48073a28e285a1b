"""Optimization that cannot see the weights.

torch's optimizer depends on numbers: it drops zero biases and merges equal initializers. A folded model has other
numbers than its base model and must have the same graph, so the graph is optimized *blind*, while parameters have no
values; then the values enter by name, and only what is computed from weights alone (a transposed weight, a batch norm
behind a convolution) is evaluated.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from lora_fx.checks.verification import as_real
from lora_fx.export.onnx.graphs import order
from lora_fx.export.onnx.weights import Weight, Weights

_FOLDABLE = 8192  # elements: from here on onnxscript evaluates nothing but the Transpose of a weight with no other use
_KIND = "pkg.torch.export.graph_signature.InputSpec.kind"


@dataclass(frozen=True)
class Blind:
    """A graph that was optimized without the numbers of its parameters, and into which none has come yet: what it
    becomes depends on their shapes alone, so that it is one graph for the base's numbers and for folded ones."""

    graph: Any
    read: frozenset[str]
    """Parameters and buffers that the program reads."""
    empty: frozenset[str]
    """Those of them that had no numbers while it was optimized."""
    axes: Mapping[str, tuple[str, tuple[int, ...]]]
    """Initializer → the parameter or buffer whose numbers are meant for it, and its axes in the order that they have
    there."""
    buffers: Mapping[str, Any]
    """What these hold, in the file and in the base alike."""
    wanted: bool
    """Whether it is to be optimized."""


@dataclass(frozen=True)
class Filled:
    """A graph with its numbers."""

    graph: Any
    read: frozenset[str]
    """Parameters and buffers that the program reads."""
    held: Mapping[str, tuple[str, tuple[int, ...]]]
    """Initializer → the parameter or buffer whose numbers it holds, and its axes in the order that they have there."""


def blind(model: Any, weights: Weights, wanted: bool = True) -> Blind:
    """Take the numbers of all parameters out, and optimize what is left, if that is wanted."""
    import numpy

    buffers = _blind(model, weights)
    initializers = model.graph.initializers
    read = frozenset(initializers) & weights.keys()
    empty = frozenset(name for name in read if initializers[name].const_value is None)
    axes = {name: (name, tuple(range(len(initializers[name].shape)))) for name in read}
    if wanted:
        with numpy.errstate(all="ignore"):  # a constant log(0) is evaluated whatever the user's warning filters are
            _optimize_blind(model)
            axes |= _transpose_weights(model, weights)
    return Blind(model, read, empty, axes, buffers, wanted)


def fill(blind: Blind, weights: Weights) -> Filled:
    """Let the numbers into a copy, and evaluate what depends on weights alone, if the graph is to be optimized."""
    import numpy
    from onnx_ir.passes import common
    from onnxscript.optimizer import fold_constants
    from onnxscript.rewriter import RewritePass
    from onnxscript.rewriter.rules import common as rules

    model = blind.graph.clone()
    initializers = model.graph.initializers
    empty = {name: initializers[name] for name in blind.axes if name in initializers and name not in blind.buffers}
    values = {name: _numbers(weights[blind.axes[name][0]], blind.axes[name][1], value) for name, value in empty.items()}
    if blind.wanted:
        with numpy.errstate(all="ignore"):
            _let_in(model, {name: value for name, value in values.items() if value.size <= _FOLDABLE})
            fold_constants(model, onnx_shape_inference=True, input_size_limit=_FOLDABLE)
            _let_in(model, values)
            convolutions = [rules.fuse_batchnorm_into_conv_rule, rules.fuse_batchnorm_into_conv_transpose_rule]
            RewritePass([*convolutions, rules.fuse_batchnorm_into_gemm_rule])(model)
    _let_in(model, values)
    common.RemoveUnusedNodesPass()(model)
    missing = [name for name, value in initializers.items() if value.const_value is None]
    assert not missing, f"initializers without a value: {missing}"
    kept = {**blind.buffers, **values}
    held = {name for name, value in initializers.items() if value.const_value is kept.get(name)}
    return Filled(model, blind.read, {name: blind.axes[name] for name in held})


def _blind(model: Any, weights: Weights) -> dict[str, Any]:
    """Take the values of all parameters out of the graph. What comes back are those of buffers (masks, positions),
    which are what they are in the base."""
    buffers = {}
    for name, value in model.graph.initializers.items():
        weight = weights.get(name)
        if weight is None:
            continue
        value.const_value = None
        if value.metadata_props.get(_KIND) != "PARAMETER":
            value.const_value = buffers[name] = _numbers(weight, tuple(range(len(value.shape))), value)
    return buffers


def _numbers(weight: Weight, order: Sequence[int], value: Any) -> Any:
    """A tensor of the file: the model's own, or one that is made when it is asked for."""
    from onnx_ir.tensor_adapters import TorchTensor

    if weight.stored or weight.adapters or [*order] != sorted(order):
        return _lazy(partial(_ordered, weight, order), value)
    return TorchTensor(as_real(weight.load()), name=value.name)


def _ordered(weight: Weight, order: Sequence[int]) -> torch.Tensor:
    return as_real(weight.numbers()).permute(*order)


def _lazy(numbers: Callable[[], torch.Tensor], value: Any) -> Any:
    """A tensor of the file that is made when it is asked for, each time anew: nothing keeps it."""
    import onnx_ir
    from onnx_ir.tensor_adapters import TorchTensor

    def make() -> Any:
        return TorchTensor(numbers().contiguous(), name=value.name)

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


def _let_in(model: Any, values: Mapping[str, Any]) -> None:
    """Give weights their values."""
    for name, weight in model.graph.initializers.items():
        if weight.const_value is None and name in values:
            weight.const_value = values[name]


def _shared(model: Any, own: Weights) -> set[str]:
    """Weights that do several things in the base model. What the optimizer does to a weight with a single use, it must
    not do to the copy that a fold has split off."""

    def job(node: Any) -> Any:  # two transpositions of one weight are one
        return order(node, len(node.inputs[0].shape)) if node.op_type == "Transpose" else node

    weights = {name: value for name, value in model.graph.initializers.items() if name in own}
    jobs: dict[int, set[Any]] = {}
    for name, value in weights.items():
        jobs.setdefault(own[name].storage, set()).update(map(job, value.consumers()))
    return {name for name in weights if len(jobs[own[name].storage]) > 1}


def _transpose_weights(model: Any, own: Weights) -> dict[str, tuple[str, tuple[int, ...]]]:
    """A weight that is only ever transposed goes into the file transposed, as ``….transposed``: that one → the weight,
    and the order of its axes."""
    import onnx_ir

    weights, found, shared = model.graph.initializers, {}, _shared(model, own)
    for node in list(model.graph):
        source = node.inputs[0] if node.op_type == "Transpose" and not node.domain else None
        if source is None or weights.get(source.name) is not source or source.const_value is not None:
            continue
        if source.name in shared or len(source.uses()) > 1:
            continue
        (old,) = node.outputs
        if old.is_graph_output():
            continue
        perm, name = order(node, len(source.shape)), f"{source.name}.transposed"
        new = weights[name] = onnx_ir.val(name, shape=[source.shape[axis] for axis in perm], type=source.type)
        found[name] = source.name, perm
        old.replace_all_uses_with(new)
        model.graph.remove(node, safe=True)
    return found
