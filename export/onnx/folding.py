"""Fold the branches of an ONNX graph into its weights: of our own unfolded files, and of PEFT's, however exported.

    Add(op(x, W), Mul(up(down(x, A), B), s))     ⇒     op(x, W + s·B·A)

Names are no help (the TorchScript exporter drops them), so a branch is found by what it does: an Add of one linear op
of x and of a chain of two, of a smaller inner size, of the same x. All branches of a weight are summed before they are
rounded once, by the fold of torch models. A branch that is there and cannot be folded is an error, never left in.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from lora_fx.deltas.adapter import Adapter
from lora_fx.deltas.exact_sum import folded_weight
from lora_fx.errors import ExportError, essence
from lora_fx.export.onnx.files import check_file, folder_beside, move_files, save_model, writable
from lora_fx.export.onnx.graphs import operators
from lora_fx.export.onnx.runtimes import require
from lora_fx.graph.layout import Layout

_FACTOR = re.compile(r"lora_(embedding_)?[AB]\b|_lora_\w+\.[AB]\b")
_REMEDY = "fold the torch model before it is exported; report the graph to lora_fx if it is a plain LoRA"

#: ops that give their first input on; a Reshape does so for matmuls, where it keeps the last axis
_THROUGH = frozenset({"Identity", "Cast", "Dropout", "Reshape"})


@dataclass(frozen=True)
class OnnxFold:
    """What `fold_onnx` did."""

    path: Path
    sites: int
    """Branches that were folded: one for each use of a weight and each adapter on it."""
    weights: dict[str, int]
    """Initializer of the new file → how many branches were folded into it, equal ones of several uses counted once."""
    nodes: tuple[int, int]
    """Before and after."""

    def __str__(self) -> str:
        return (
            f"{self.path}: {self.sites} branches folded into {len(self.weights)} weights, "
            f"{self.nodes[0]} nodes before, {self.nodes[1]} after"
        )


def fold_onnx(
    path: str | os.PathLike[str], out: str | os.PathLike[str], *, external_data: bool | None = None
) -> OnnxFold:
    """Fold every LoRA branch of an ONNX file into the weight beside it, and write another file.

    Takes `export_onnx(adapters="unfolded")`'s files, and PEFT's from either of torch's exporters: linear layers,
    `Conv1D`, convolutions, embeddings, batched experts. Every folded element is W + Σ s·B·A rounded once.

    Args:
        path: the file with branches; its weights may lie in a file beside it.
        out: the new file, which may be the same. It is replaced in one step.
        external_data: as in `export_onnx`.

    Raises:
        ExportError: the file cannot be read, has no branch, or has one that cannot be folded; nothing is written.
        FoldError: a sum is not finite.
    """
    for package in ("onnx", "onnxscript"):
        require(package)
    target = writable(out)
    model = _load(Path(path))
    before = operators(model).total()
    folding = _Folding(model, str(path))
    weights = folding.fold()
    _clean(model)
    folding.refuse_leftovers()
    if "lora_fx.form" in model.metadata_props:
        model.metadata_props["lora_fx.form"] = "folded"
    with folder_beside(target) as folder:
        files = save_model(model, folder / target.name, external_data)
        check_file(files[0])
        move_files(files, target)
    return OnnxFold(target, folding.sites, weights, (before, operators(model).total()))


def _load(path: Path) -> Any:
    import onnx_ir
    from onnx_ir.passes import common

    try:
        model = onnx_ir.load(path)
        common.InlinePass()(model)
        common.ShapeInferencePass()(model)
    except Exception as error:
        raise ExportError(
            f"it cannot be read: {essence(error)}", place=str(path), remedy="pass the path of an ONNX file"
        ) from error
    return model


def _clean(model: Any) -> None:
    from onnx_ir.passes import common

    common.RemoveUnusedNodesPass()(model)


# ── what a graph computes ────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class _Op:
    """One linear op of an activation, with a constant."""

    node: Any
    x: Any
    """The activation."""
    place: int
    """Which input of the node is the constant."""
    kind: str
    """matmul, left (a matmul from the left), gather, conv or conv_transpose."""
    settings: tuple[Any, ...] = ()
    """What two ops of one kind must share to be parallel: strides, pads and such."""
    scale: float = 1.0
    reshaped: bool = False
    """A Reshape lies between it and where it was looked for."""

    @property
    def constant(self) -> Any:
        return self.node.inputs[self.place]


@dataclass(frozen=True)
class _Branch:
    """up(down(x, A), B) · scale"""

    down: _Op
    up: _Op
    scale: float


@dataclass
class _Site:
    """A use of a weight, and the branches that are added to it."""

    base: _Op
    branches: list[_Branch] = field(default_factory=list)
    last: Any = None
    """The value with all of them added."""
    start: Any = None
    """The value without."""


class _Folding:
    def __init__(self, model: Any, place: str) -> None:
        self.model, self.place, self.sites = model, place, 0
        self._constants: dict[str, Any] = {}
        self.inputs = {id(value) for value in model.graph.inputs}

    # constants

    def constant(self, value: Any) -> torch.Tensor | None:
        """The numbers of a value that no input of the graph can change."""
        if value is None or id(value) in self.inputs:
            return None
        if value.const_value is not None:
            return _tensor(value.const_value)
        if value.name not in self._constants:
            self._constants[value.name] = self._evaluate(value)
        return self._constants[value.name]

    def _evaluate(self, value: Any) -> torch.Tensor | None:
        import onnx_ir
        from onnx.reference import ReferenceEvaluator

        node = value.producer()
        if node is None or any(a.type in (onnx_ir.AttributeType.GRAPH,) for a in node.attributes.values()):
            return None
        if node.op_type in ("RandomNormal", "RandomUniform", "RandomNormalLike", "RandomUniformLike", "Bernoulli"):
            return None
        if node.op_type == "Constant":
            (attribute,) = node.attributes.values()
            return _tensor(attribute.value) if isinstance(attribute.value, onnx_ir.TensorProtocol) else torch.tensor(
                attribute.value
            )  # fmt: skip
        given = {v.name: self.constant(v) for v in node.inputs if v is not None}
        if not given or any(tensor is None for tensor in given.values()):
            return None
        if node.op_type == "Transpose":  # numpy has no bfloat16
            return next(iter(given.values())).permute(_perm(node))  # type: ignore[union-attr]
        if node.op_type == "Identity":
            return next(iter(given.values()))
        try:
            outputs = ReferenceEvaluator(_as_function(node, self.model)).run(
                None, {name: tensor.numpy() for name, tensor in given.items()}  # type: ignore[union-attr]
            )  # fmt: skip
        except Exception:
            return None
        return torch.from_numpy(outputs[list(node.outputs).index(value)])

    def scalar(self, value: Any) -> float | None:
        tensor = self.constant(value)
        return float(tensor) if tensor is not None and tensor.numel() == 1 else None

    # linear ops

    def op(self, value: Any) -> _Op | None:
        """The linear op that gives this value, looked at through scalar factors, casts and reshapes."""
        scale, reshaped = 1.0, False
        while (node := value.producer()) is not None:
            passed = self._passed(node)
            if passed is None:
                found = self._linear(node)
                return None if found is None else replace(found, scale=found.scale * scale, reshaped=reshaped)
            value, factor = passed
            scale, reshaped = scale * factor, reshaped or node.op_type == "Reshape"
        return None

    def _passed(self, node: Any) -> tuple[Any, float] | None:
        """What the node gives on, and by what it multiplies that."""
        if _goes_through(node):
            return node.inputs[0], 1.0
        if node.op_type in ("Mul", "Div"):
            left, right = node.inputs
            by = self.scalar(right)
            if by is not None:
                return left, by if node.op_type == "Mul" else 1 / by
            by = self.scalar(left) if node.op_type == "Mul" else None
            return None if by is None else (right, by)
        return None

    def _linear(self, node: Any) -> _Op | None:
        kind = node.op_type
        if kind == "MatMul" and self._is_matrix(node.inputs[1]):
            return _Op(node, node.inputs[0], 1, "matmul")
        if kind == "MatMul" and self._is_matrix(node.inputs[0]):
            return _Op(node, node.inputs[1], 0, "left")
        if kind == "Gemm":
            alpha = _number(node, "alpha", 1.0)
            if self._is_matrix(node.inputs[1]) and not _integer(node, "transA"):
                return _Op(node, node.inputs[0], 1, "matmul", scale=alpha)
            if self._is_matrix(node.inputs[0]) and not _integer(node, "transB"):
                return _Op(node, node.inputs[1], 0, "left", scale=alpha)
        if kind == "Gather" and self._is_matrix(node.inputs[0]) and not _integer(node, "axis"):
            return _Op(node, node.inputs[1], 0, "gather")
        if kind in ("Conv", "ConvTranspose") and self._is_matrix(node.inputs[1]):
            names = ("strides", "pads", "dilations", "group", "auto_pad", "output_padding", "output_shape")
            settings = tuple(_attribute(node, name) for name in names)
            return _Op(node, node.inputs[0], 1, "conv" if kind == "Conv" else "conv_transpose", settings)
        return None

    def _is_matrix(self, value: Any) -> bool:
        return value is not None and len(self.shape(value)) >= 2

    def shape(self, value: Any) -> tuple[int, ...]:
        """Of a constant of floating-point numbers; empty for anything else. An initializer is not read for that."""
        if value.const_value is not None and id(value) not in self.inputs:
            floating = value.const_value.dtype.is_floating_point()
            return tuple(value.const_value.shape) if floating else ()
        tensor = self.constant(value)
        return tuple(tensor.shape) if tensor is not None and tensor.is_floating_point() else ()

    def source(self, value: Any) -> Any:
        """The activation behind casts and reshapes."""
        while (node := value.producer()) is not None and _goes_through(node):
            value = node.inputs[0]
        return value

    # branches

    def branch(self, value: Any) -> _Branch | None:
        """Two linear ops without a bias, one after the other."""
        up = self.op(value)
        if up is None or up.kind == "gather" or _biased(up.node):
            return None
        down = self.op(up.x)
        if down is None or _biased(down.node):
            return None
        return _Branch(down, up, down.scale * up.scale)

    def _is_narrow(self, branch: _Branch) -> bool:
        """It goes through fewer features than it takes and gives."""
        down, up = (self.shape(op.constant) for op in (branch.down, branch.up))
        inner = _out_size(branch.down, down)
        return inner * inner < min(math.prod(down), math.prod(up))

    def find(self) -> Iterator[_Site]:
        """Every use of a weight with branches, from the last Add on."""
        inside: set[int] = set()
        for node in reversed(list(self.model.graph)):
            if node.op_type != "Add" or id(node) in inside:
                continue
            site = self._site(node, inside)
            if site is not None:
                yield site

    def _site(self, node: Any, inside: set[int]) -> _Site | None:
        """The sum that ends in this Add. A base op, constants and branches may be added in any order."""
        branches, value = [], node.outputs[0]
        adds = []
        while True:
            producer = value.producer()
            if producer is None or producer.op_type != "Add":
                break
            left, right = producer.inputs
            first, second = self.branch(left), self.branch(right)
            if second is not None and self.constant(left) is None:
                branches.append((producer, second, 0))
                value = left
            elif first is not None and self.constant(right) is None:
                branches.append((producer, first, 1))
                value = right
            elif branches and self.constant(right) is not None:
                value = left
            elif branches and self.constant(left) is not None:
                value = right
            else:
                break
            adds.append(producer)
        if not branches:
            return None
        base = self.op(value)
        if base is None or not base.scale:
            return self._not_lora(branches)
        parallel = [(add, b, keep) for add, b, keep in branches if self._parallel(base, b)]
        if len(parallel) != len(branches):
            return self._not_lora(branches)
        inside.update(map(id, adds))
        site = _Site(base, [b for _, b, _ in branches])
        for add, _, keep in parallel:  # the branch is left out of the sum
            add.outputs[0].replace_all_uses_with(add.inputs[keep], replace_graph_outputs=True)
        return site

    def _not_lora(self, branches: Sequence[tuple[Any, _Branch, int]]) -> None:
        """Two linear ops that are added to something else than a linear op of their input."""
        for add, branch, _ in branches:
            if not self._is_narrow(branch):
                continue
            names = [op.constant.name for op in (branch.down, branch.up)]
            raise ExportError(
                f"{' and '.join(names)} are two narrow linear ops, added to no single linear op of the same input",
                place=f"{self.place}, node {add.name or add.outputs[0].name}",
                remedy=_REMEDY,
            )

    def _parallel(self, base: _Op, branch: _Branch) -> bool:
        if self.source(base.x) is not self.source(branch.down.x):
            return False
        kinds = (base.kind, branch.down.kind, branch.up.kind)
        if base.kind.startswith("conv") and (base.reshaped or branch.up.reshaped or branch.down.reshaped):
            return False
        if kinds == ("conv", "conv", "conv"):
            return base.settings == branch.down.settings and _is_pointwise(branch.up)
        if kinds == ("conv_transpose", "conv", "conv_transpose"):
            return base.settings == branch.up.settings and _is_pointwise(branch.down)
        return kinds in (("matmul",) * 3, ("left",) * 3, ("gather", "gather", "matmul"))

    # folding

    def fold(self) -> dict[str, int]:
        sites = list(self.find())
        if not sites:
            raise ExportError(
                "the graph has no LoRA branch: no Add of a linear op and of two narrow ones of the same input",
                place=self.place,
                remedy='export with adapters="unfolded", or the model of PEFT before it is merged; the slots of a '
                "switchable graph have no numbers",
            )
        self.sites = sum(len(site.branches) for site in sites)
        wanted: dict[int, list[_Site]] = {}
        for site in sites:
            wanted.setdefault(id(site.base.constant), []).append(site)
        counts: dict[str, int] = {}
        for group in wanted.values():
            constant = group[0].base.constant
            alike: dict[tuple[Any, ...], list[_Site]] = {}
            for site in group:
                alike.setdefault(tuple((b.down.constant.name, b.up.constant.name, b.scale) for b in site.branches), []
                                 ).append(site)  # fmt: skip
            alone = len(alike) == 1 and len(group) == len(constant.uses())
            for same in alike.values():
                name = self._fold(same, alone)
                counts[name] = counts.get(name, 0) + len(same[0].branches)
        return counts

    def _fold(self, sites: Sequence[_Site], alone: bool) -> str:
        """Put the sum where the weight is: into its initializer, where no one else reads that."""
        import onnx_ir
        from onnx_ir.tensor_adapters import TorchTensor

        site = sites[0]
        operand, perm = site.base.constant, None
        origin = operand
        while alone and origin.producer() is not None and origin.producer().op_type in ("Transpose", "Identity"):
            node = origin.producer()
            step = _perm(node) if node.op_type == "Transpose" else tuple(range(len(node.inputs[0].shape)))
            perm = step if perm is None else tuple(step[axis] for axis in perm)
            origin = node.inputs[0]
            alone = len(origin.uses()) == 1
        weight = self.constant(operand)
        assert weight is not None
        adapters = [self._adapter(site.base, branch, weight) for branch in site.branches]
        folded = folded_weight(weight.contiguous(), [a.low_rank() for a in adapters], weight.dtype, operand.name)
        if alone and origin.is_initializer():
            if perm is not None:
                folded = folded.permute([perm.index(axis) for axis in range(len(perm))]).contiguous()
            origin.const_value = TorchTensor(folded, name=origin.name)
            return origin.name
        name, number = f"{operand.name}.folded", 1
        while name in self.model.graph.initializers:
            name, number = f"{operand.name}.folded_{number}", number + 1
        new = onnx_ir.Value(name=name, shape=onnx_ir.Shape(folded.shape), type=operand.type)
        new.const_value = TorchTensor(folded, name=name)
        if new.type is None:
            new.dtype = new.const_value.dtype
        self.model.graph.register_initializer(new)
        for one in sites:
            one.base.node.replace_input_with(one.base.place, new)
        return name

    def _adapter(self, base: _Op, branch: _Branch, weight: torch.Tensor) -> Adapter:
        down, up = self._matrix(branch.down), self._matrix(branch.up)
        sides = self._sides(base, weight)
        groups = (base.settings[3] or 1) if base.kind.startswith("conv") else 1
        if base.kind == "conv":  # A carries the kernel, (groups·r, in / groups, k…), B is pointwise
            A, B = self._of_one_group(branch.down, down.flatten(1), groups), up.flatten(1)
        elif base.kind == "conv_transpose":  # A is pointwise, (groups·r, in / groups), B (groups·r, out / groups, k…)
            A = down.flatten(1).unflatten(0, (groups, -1)).transpose(0, 1).flatten(1)
            B = self._of_one_group(branch.up, up.flatten(1), groups).mT
        elif base.kind == "left":
            A, B = down, up
        else:  # x·A'·B' with A' (…, in, r), B' (…, r, out)
            A, B = down.mT, up.mT
        adapter = _Given(Layout(sides, tuple(weight.shape)), rank=A.shape[-2], alpha=1.0, dtype=A.dtype)
        adapter.scale = branch.scale / base.scale
        with torch.no_grad():
            adapter.A.copy_(A)
            adapter.B.copy_(B)
        return adapter

    def _of_one_group(self, op: _Op, factor: torch.Tensor, groups: int) -> torch.Tensor:
        """A factor that all groups of a convolution share."""
        blocks = factor.unflatten(0, (groups, -1))
        if bool((blocks != blocks[:1]).any()):
            raise ExportError(
                f"{op.constant.name} is another factor for each group of the convolution",
                place=self.place,
                remedy=_REMEDY,
            )
        return blocks[0]

    def _sides(self, base: _Op, weight: torch.Tensor) -> str:
        if base.kind == "conv":
            return "o" + "i" * (weight.ndim - 1)
        if base.kind == "conv_transpose":
            return "i" + "o" * (weight.ndim - 1)
        return "b" * (weight.ndim - 2) + ("oi" if _out_first(base) else "io")

    def _matrix(self, op: _Op) -> torch.Tensor:
        """The constant as x is multiplied with it, from its side."""
        tensor = self.constant(op.constant)
        assert tensor is not None
        return tensor.mT if op.kind in ("matmul", "left") and _out_first(op) == (op.kind == "matmul") else tensor

    def refuse_leftovers(self) -> None:
        """No initializer that is named as a factor of LoRA may be in use after the fold."""
        left = [name for name, value in self.model.graph.initializers.items() if _FACTOR.search(name) and value.uses()]
        if left:
            raise ExportError(
                f"{self.sites} branches were found, and more are there: {', '.join(left[:4])} are still in use",
                place=self.place,
                remedy=_REMEDY,
            )


class _Given(Adapter):
    """An adapter of a scale that is given, not computed from alpha."""

    scale = 1.0  # type: ignore[assignment]


def _biased(node: Any) -> bool:
    return node.op_type in ("Gemm", "Conv", "ConvTranspose") and len(node.inputs) > 2 and node.inputs[2] is not None


def _out_size(op: _Op, shape: Sequence[int]) -> int:
    """How many features a first op of two gives."""
    if op.kind == "conv":
        return shape[0] // (op.settings[3] or 1)
    return shape[-2] if _out_first(op) else shape[-1]


def _out_first(op: _Op) -> bool:
    """Its constant is (…, out, in), not (…, in, out)."""
    turned = op.node.op_type == "Gemm" and bool(_integer(op.node, "transA" if op.kind == "left" else "transB"))
    return turned != (op.kind == "left")


def _goes_through(node: Any) -> bool:
    if node.op_type != "Reshape":
        return node.op_type in _THROUGH
    last = [value.shape[-1] if value.shape else None for value in (node.inputs[0], node.outputs[0])]
    return isinstance(last[0], int) and last[0] == last[1]


def _is_pointwise(op: _Op) -> bool:
    strides, pads, dilations, _, auto_pad, *_ = op.settings
    plain = all(not v or {*v} == {1} for v in (strides, dilations)) and not any(pads or ())
    kernel = op.constant.shape[2:] if op.constant.shape is not None else ()
    return plain and auto_pad in (None, "NOTSET", "VALID") and all(size == 1 for size in kernel)


def _attribute(node: Any, name: str) -> Any:
    found = node.attributes.get(name)
    value = None if found is None else found.value
    return tuple(value) if isinstance(value, list | tuple) else value


def _integer(node: Any, name: str) -> int:
    return int(_attribute(node, name) or 0)


def _number(node: Any, name: str, default: float) -> float:
    value = _attribute(node, name)
    return default if value is None else float(value)


def _perm(node: Any) -> tuple[int, ...]:
    given = _attribute(node, "perm")
    return given if given is not None else tuple(reversed(range(len(node.inputs[0].shape))))


def _tensor(tensor: Any) -> torch.Tensor:
    """An ONNX tensor as torch's, by its bytes: numpy has no bfloat16."""
    import onnx_ir

    raw = getattr(tensor, "raw", None)
    if isinstance(raw, torch.Tensor):
        return raw.detach().cpu()
    if tensor.dtype == onnx_ir.DataType.BFLOAT16:
        return torch.frombuffer(bytearray(tensor.tobytes()), dtype=torch.bfloat16).reshape(tuple(tensor.shape))
    return torch.from_numpy(tensor.numpy().copy())


def _as_function(node: Any, model: Any) -> Any:
    """A model of this one node, for the reference evaluator."""
    import onnx
    import onnx_ir

    proto = onnx_ir.to_proto(node)
    empty = onnx.TypeProto()
    inputs = [onnx.ValueInfoProto(name=name, type=empty) for name in dict.fromkeys(proto.input) if name]
    outputs = [onnx.ValueInfoProto(name=name, type=empty) for name in proto.output]
    graph = onnx.helper.make_graph([proto], "node", inputs, outputs)
    opsets = [onnx.helper.make_opsetid(domain, version) for domain, version in model.opset_imports.items()]
    return onnx.helper.make_model(graph, opset_imports=opsets)
