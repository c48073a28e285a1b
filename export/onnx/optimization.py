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
from lora_fx.export.onnx.weights import Weights

_FOLDABLE = 8192  # elements: from here on onnxscript evaluates nothing but the Transpose of a weight with no other use
_KIND = "pkg.torch.export.graph_signature.InputSpec.kind"


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
    from onnxscript.optimizer import fold_constants
    from onnxscript.rewriter import RewritePass
    from onnxscript.rewriter.rules import common as rules

    values = _blind(model, weights)
    read = frozenset(model.graph.initializers) & weights.keys()
    axes = {name: (name, tuple(range(len(model.graph.initializers[name].shape)))) for name in read}
    kept = {name: model.graph.initializers[name].const_value or values[name] for name in read}
    if not wanted:
        _let_in(model, values)
    else:
        with numpy.errstate(all="ignore"):  # a constant log(0) is evaluated whatever the user's warning filters are
            _optimize_blind(model)
            axes |= _transpose_weights(model, values, _shared(model, weights))
            _let_in(model, {name: value for name, value in values.items() if value.size <= _FOLDABLE})
            fold_constants(model, onnx_shape_inference=True, input_size_limit=_FOLDABLE)
            _let_in(model, values)
            convolutions = [rules.fuse_batchnorm_into_conv_rule, rules.fuse_batchnorm_into_conv_transpose_rule]
            RewritePass([*convolutions, rules.fuse_batchnorm_into_gemm_rule])(model)
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
        weight = weights.get(name)
        if weight is not None:
            made = weight.stored or weight.adapters
            value.const_value = _lazy(weight.numbers, value) if made else TorchTensor(as_real(weight.load()), name=name)
        if value.metadata_props.get(_KIND) == "PARAMETER":
            values[name], value.const_value = value.const_value, None
    return values


def _lazy(numbers: Callable[[], torch.Tensor], value: Any) -> Any:
    """A tensor of the file that is made when it is asked for, each time anew: nothing keeps it."""
    import onnx_ir
    from onnx_ir.tensor_adapters import TorchTensor

    def make() -> Any:
        return TorchTensor(as_real(numbers()).contiguous(), name=value.name)

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
        perm, name = order(node, len(source.shape)), f"{source.name}.transposed"
        new = weights[name] = onnx_ir.val(name, shape=[source.shape[axis] for axis in perm], type=source.type)
        values[name] = _lazy(partial(_transposed, values[source.name], perm), new)
        found[name] = source.name, perm
        old.replace_all_uses_with(new)
        model.graph.remove(node, safe=True)
    return found


def _transposed(tensor: Any, perm: Sequence[int]) -> torch.Tensor:
    """The numbers of a parameter's tensor, which is torch's own or a lazy one."""
    raw = tensor.raw
    return (raw if isinstance(raw, torch.Tensor) else raw().raw).permute(*perm)
