"""Weights of a file as integers, by ONNX Runtime's own tools.

    int8    y = x·W   →   y ≈ s·(x̂ − z)·(Ŵ − ẑ)     x̂: 8 bits, by the range of x in each run; Ŵ: 8 bits a column
    int4    y = x·W   →   y ≈ x·s(Ŵ − ẑ)             x as it is; Ŵ: 4 bits, s and ẑ for each 32 weights of a column

The weights of MatMul and Gemm are quantised: those of other operators (Gather, Conv, LSTM …) stay as they are. So do A
and B of a switchable graph. Their defaults are constants of rank 0, which a tool would take for weights: they are put
aside while it works.
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lora_fx.checks.verification import relative_error
from lora_fx.export.onnx.graphs import as_torch, attribute, graph_digest
from lora_fx.export.onnx.runtimes import refuse, refusing, require
from lora_fx.export.onnx.tasks import GRAPH

QUANTIZE = "lora_fx.quantize"
_BLOCK = 32  # weights that share a scale at 4 bits: the fewest that the tool takes below 64, and the least error
_REMEDY = "export without quantize, and quantise the file with another tool; a Session takes its digest"


@dataclass(frozen=True)
class Loss:
    """By how much one output of the quantised file differs from torch's, on the example inputs."""

    output: str
    largest: float
    """The largest absolute difference of one element."""
    relative: float
    """The root mean square of the difference, over that of torch's output."""
    adapter: str = ""
    """Which one was in the slots of a switchable graph."""

    def __str__(self) -> str:
        place = f"{self.output}{f' with {self.adapter}' if self.adapter else ''}"
        return f"{place}: {self.relative:.2%} of its size, {self.largest:.3g} at most"


@dataclass(frozen=True)
class Quantized:
    """What a quantised file has in the place of float weights, and what that costs."""

    kind: str
    """"int8" or "int4"."""
    products: int
    """How many nodes multiply by integers."""
    left: Mapping[str, int]
    """Operators that still read float weights of two axes or more → how many nodes."""
    bytes: tuple[int, int]
    """Of the files, before and after."""
    losses: tuple[Loss, ...] = ()
    """One for each output, and each adapter; none where nothing was run."""

    @property
    def largest(self) -> float:
        """The largest absolute difference of one element from torch's; NaN where nothing was run."""
        return max((loss.largest for loss in self.losses), default=math.nan)

    @property
    def relative(self) -> float:
        """The largest relative one of an output; NaN where nothing was run."""
        return max((loss.relative for loss in self.losses), default=math.nan)

    def __str__(self) -> str:
        left = ", ".join(f"{count} {name}" for name, count in sorted(self.left.items())) or "none"
        line = f"quantised to {self.kind}: {self.products} products, {self.bytes[0]:,} → {self.bytes[1]:,} bytes"
        lines = [f"{line}; float weights are left in {left}", *(f"off from torch by: {loss}" for loss in self.losses)]
        return "\n  ".join(lines)


def quantise(file: Path, folder: Path, kind: str, external: bool) -> Any:
    """The quantised model of a float file.

    Args:
        folder: with room for two files as large.
        external: whether the weights are in files of their own.

    Raises:
        ExportError: the tool does not take the file, or finds nothing to quantise in it.
    """
    import onnx_ir
    from onnx_ir.tensor_adapters import TorchTensor

    model = onnx_ir.load(file)
    given = {str(value.name): value for value in model.graph.inputs}
    slots = {
        name: TorchTensor(as_torch(value.const_value), name=name)
        for name, value in given.items() if name in model.graph.initializers
    }  # fmt: skip
    bare, made = folder / "bare.onnx", folder / "quantised.onnx"
    for name in slots:
        model.graph.initializers.pop(name).const_value = None
    _gemms_apart(model)
    onnx_ir.save(model, bare, external_data=f"{bare.name}.data" if external else None)
    with refusing(f"ONNX Runtime's tool for {kind} does not take the file", file.name, _REMEDY), _root_logger_kept():
        KINDS[kind].run(bare, made, external)
    model = onnx_ir.load(made)
    given = {str(value.name): value for value in model.graph.inputs}
    for name, empty in slots.items():
        given[name].const_value = empty
        model.graph.initializers[name] = given[name]
    if not products(model):
        reason = f"no node multiplies by a weight that {kind} is for: a MatMul or a Gemm, of a constant"
        refuse("quantize", reason, "leave quantize out")
    model.metadata_props.pop("onnx.infer", None)
    model.metadata_props.update({QUANTIZE: kind, GRAPH: graph_digest(model)})
    return model


def _gemms_apart(model: Any) -> None:
    """y = x·Wᵀ + b as a MatMul and an Add, with Wᵀ as the constant: the tools quantise no Gemm, and the one of
    onnxruntime 1.26 that takes them apart turns a weight that two of them share twice."""
    import onnx_ir
    from onnx_ir.passes import common
    from onnx_ir.tensor_adapters import TorchTensor

    held, plain = model.graph.initializers, {"alpha": 1.0, "beta": 1.0, "transA": 0}
    for node in [node for node in model.graph.all_nodes() if node.op_type == "Gemm" and not node.domain]:
        x, weight, *bias = node.inputs
        given = {name: attribute(node, name) for name in plain}
        if held.get(weight.name) is not weight or any(given[n] not in (None, plain[n]) for n in plain):
            continue
        if attribute(node, "transB"):
            name = f"{weight.name}.turned"
            if name not in held:
                turned = as_torch(weight.const_value).t().contiguous()
                held[name] = onnx_ir.val(name, shape=turned.shape, type=weight.type)
                held[name].const_value = TorchTensor(turned, name=name)
            weight = held[name]
        new = [onnx_ir.node("MatMul", [x, weight], name=f"{node.name}_MatMul")]
        if bias and bias[0] is not None:
            new.append(onnx_ir.node("Add", [new[0].outputs[0], bias[0]], name=f"{node.name}_Add"))
        (old,), (made,) = node.outputs, new[-1].outputs
        new[0].outputs[0].name = f"{old.name}_MatMul"
        onnx_ir.convenience.replace_nodes_and_values(node.graph, node, [node], new, [old], [made])
    common.RemoveUnusedNodesPass()(model)


def _int8(file: Path, made: Path, external: bool) -> None:
    """Unsigned weights: products of signed ones overflow on processors without VNNI."""
    tool = require("onnxruntime.quantization")
    tool.quantize_dynamic(
        str(file), str(made), op_types_to_quantize=["MatMul"], per_channel=True,
        weight_type=tool.QuantType.QUInt8, use_external_data_format=external,
    )  # fmt: skip


def _int4(file: Path, made: Path, external: bool) -> None:
    onnx, tool = require("onnx"), require("onnxruntime.quantization.matmul_nbits_quantizer")
    quantizer = tool.MatMulNBitsQuantizer(onnx.load(file), bits=4, block_size=_BLOCK)
    quantizer.process()
    quantizer.model.save_model_to_file(str(made), external)


@dataclass(frozen=True)
class Tool:
    """What quantises a float file."""

    run: Callable[[Path, Path, bool], None]
    """(file, file that it makes, whether weights are in files of their own)"""
    dtypes: tuple[torch.dtype, ...]
    """Of weights and x, that the nodes it makes take."""


KINDS: Mapping[str, Tool] = {
    "int8": Tool(_int8, (torch.float32,)),
    "int4": Tool(_int4, (torch.float32, torch.float16)),
}
"""What `quantize` may be."""


def refuse_kind(kind: str) -> None:
    if kind not in KINDS:
        refuse("quantize", f"quantize={kind!r} is unknown", f"choose {' or '.join(map(repr, KINDS))}")


def refuse_dtypes(model: nn.Module, kind: str) -> None:
    """Refuse a model with floats that the tool's nodes do not take."""
    takes = KINDS[kind].dtypes
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and parameter.dtype not in takes:
            said = [str(dtype).removeprefix("torch.") for dtype in (parameter.dtype, *takes)]
            reason = f"it is {said[0]}, and what ONNX Runtime makes for {kind} computes with {' or '.join(said[1:])}"
            refuse(name, reason, "export model.float()")


_PRODUCTS = frozenset({"MatMulInteger", "MatMulNBits"})


def products(model: Any) -> int:
    return sum(node.op_type in _PRODUCTS for node in model.graph.all_nodes())


def left_float(model: Any) -> dict[str, int]:
    """Operators that read a float weight → how many nodes; slots are none."""
    slots = {value.name for value in model.graph.inputs}
    floats = {
        name for name, value in model.graph.initializers.items()
        if name not in slots and len(value.shape) > 1 and value.dtype.is_floating_point()
    }  # fmt: skip
    nodes = (node for node in model.graph.all_nodes() if node.op_type not in _PRODUCTS)
    return dict(Counter(n.op_type for n in nodes if any(v is not None and v.name in floats for v in n.inputs)))


def losses(
    names: Sequence[str], expected: Sequence[torch.Tensor], found: Sequence[torch.Tensor], adapter: str = ""
) -> Iterator[Loss]:
    """Of each output.

    Raises:
        ExportError: it is of another shape or type, or not finite where torch's is.
    """
    for name, wanted, own in zip(names, expected, found, strict=True):
        if (wanted.shape, wanted.dtype) != (own.shape, own.dtype):
            theirs, ours = (f"{t.dtype} {tuple(t.shape)}" for t in (own, wanted))
            refuse(f"output {name!r}", f"the quantised file returns {theirs} where torch returns {ours}", _REMEDY)
        relative = relative_error(own, wanted, wanted)
        if not math.isfinite(relative) and not bool(own[wanted.isfinite()].isfinite().all()):
            refuse(f"output {name!r}", "the quantised file returns NaN or Inf where torch does not", _REMEDY)
        difference = (own.double() - wanted.double())[wanted.isfinite()].abs()
        yield Loss(name, float(difference.max()) if difference.numel() else 0.0, relative, adapter)


@contextlib.contextmanager
def _root_logger_kept() -> Iterator[None]:
    """The tools set up the root logger of the process, as they are imported and as they run: not where it has a
    handler."""
    root, own = logging.getLogger(), logging.NullHandler()
    root.addHandler(own)
    try:
        yield
    finally:
        root.removeHandler(own)
