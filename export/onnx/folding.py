"""Fold the branches of an ONNX graph into its weights: of our own unfolded files, and of PEFT's, however exported.

    Add(op(x, W), Mul(up(down(x, A), B), s))     ⇒     op(x, W + s·B·A)

Where something else reads the product, or a sum without all of its branches, as in a model that runs with its adapter
disabled beside itself, that stays, and the sum gets an op and a weight of its own. All branches of a weight are summed
before they are rounded once, by the fold of torch models. An adapter's branch that is there and cannot be folded is an
error, never left in; a sum of the model's own is left alone. Then both files run.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any, NoReturn

import torch

from lora_fx.deltas.exact_sum import folded_weight
from lora_fx.deltas.low_rank import LowRank
from lora_fx.errors import ExportError, few
from lora_fx.export.onnx.branches import ADAPTER, REMEDY, Branch, Kind, Op, Reader, Site, op_type
from lora_fx.export.onnx.equality import compare_files
from lora_fx.export.onnx.files import check_file, folder_beside, move_files, save_model, writable
from lora_fx.export.onnx.graphs import free_name, infer_shapes, names_in, operators, order
from lora_fx.export.onnx.loading import load_model
from lora_fx.export.onnx.obstacles import obstacles
from lora_fx.export.onnx.runs import Comparison
from lora_fx.export.onnx.runtimes import refuse, refusing, require
from lora_fx.export.onnx.sums import spell_out
from lora_fx.graph.layout import Layout

_SHOWN = 5


@dataclass(frozen=True)
class OnnxBranch:
    """Two narrow linear ops beside a weight."""

    weight: str
    """What they were beside: an initializer of the file that was given."""
    factors: tuple[str, str]
    """A and B, as they are called there."""
    why: str
    """What says that it is an adapter; empty for one that was left in."""

    def __str__(self) -> str:
        return f"{self.weight} + {' · '.join(self.factors)}{f', {self.why}' if self.why else ''}"


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
    branches: tuple[OnnxBranch, ...] = ()
    """What was folded, and why it was taken for an adapter."""
    left: tuple[OnnxBranch, ...] = ()
    """What has the shape of an adapter and not the names of one: it stays as it was. `unnamed=True` folds it."""
    comparisons: tuple[Comparison, ...] = ()
    """ONNX Runtime on the new file against the old one, on random inputs; none with `check=False`."""

    def __str__(self) -> str:
        lines = [
            f"{self.path}: {self.sites} branches folded into {len(self.weights)} weights, "
            f"{self.nodes[0]} nodes before, {self.nodes[1]} after"
        ]
        for what, found in (("folded", self.branches), ("LEFT IN, without an adapter's names", self.left)):
            lines += [f"{what}: {few([str(branch) for branch in found], _SHOWN)}"] if found else []
        lines += [f"ONNX Runtime on both, {comparison}" for comparison in self.comparisons]
        return "\n  ".join(lines if self.comparisons else [*lines, "NOT RUN: check=False"])


def fold_onnx(
    path: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    unnamed: bool = False,
    check: bool = True,
    external_data: bool | None = None,
) -> OnnxFold:
    """Fold every LoRA branch of an ONNX file into the weight beside it, and write another file that computes the same.

    Takes `export_onnx(adapters="unfolded")`'s files, and PEFT's from either of torch's exporters: linear layers,
    `Conv1D`, convolutions, embeddings, batched experts. Every folded element is W + Σ s·B·A rounded once.

    Args:
        path: the file with branches; its weights may lie in a file beside it.
        out: the new file, which may be the same. It is replaced in one step.
        unnamed: fold branches that no name tells to be an adapter's, too. A model's own ``x·W + x·down·up`` is one.
        check: have onnx check the new file, run both in ONNX Runtime on random inputs of two shapes, and compare them.
        external_data: as in `export_onnx`.

    Raises:
        ExportError: the file cannot be read, has no branch, has one that cannot be folded, or the new file computes
            something else; nothing is written.
        FoldError: a sum is not finite.
    """
    for package in ("onnx", "onnxscript"):
        require(package)
    from onnx_ir.passes import common

    target = writable(out)
    model = load_model(Path(path), "pass the path of an ONNX file")
    with refusing("its functions and shapes cannot be followed", str(path), REMEDY):
        common.InlinePass()(model)
        infer_shapes(model)
    before = operators(model).total()
    reader = Reader(model, str(path), unnamed)
    with refusing("its graph cannot be followed", str(path), REMEDY):
        if spell_out(reader):
            infer_shapes(model)
            reader = Reader(model, str(path), unnamed)
        try:
            sites = reader.sites()
        except ExportError:
            _refuse_met(reader, "a branch cannot be folded")
            raise
    left = tuple(_described(base, branch) for base, branch in reader.left.values())
    if not sites:
        _refuse_empty(reader, left)
    found = tuple(_described(site.base, branch) for site in sites for branch in site.branches)
    alike: dict[Hashable, list[Site]] = {}
    for site in sites:
        _shapes(site)
        site = _apart(model, site) if site.apart else site
        alike.setdefault(site.key, []).append(site)
    weights: Counter[str] = Counter()
    with refusing("its branches cannot be folded", str(path), REMEDY):
        for same in alike.values():
            weights[_fold(reader, same)] += len(same[0].branches)
        common.RemoveUnusedNodesPass()(model)
    _refuse_more(reader, len(found))
    if "lora_fx.form" in model.metadata_props:
        model.metadata_props["lora_fx.form"] = "folded"
    with folder_beside(target) as folder:
        files = save_model(model, folder / target.name, external_data)
        if check:
            check_file(files[0])
        comparisons = compare_files(Path(path), files[0], folder) if check else ()
        move_files(files, target)
    nodes = before, operators(model).total()
    return OnnxFold(target, len(found), dict(weights), nodes, found, left, comparisons)


def _described(base: Op, branch: Branch) -> OnnxBranch:
    return OnnxBranch(base.constant.name, (branch.down.constant.name, branch.up.constant.name), branch.why)


def _refuse_met(reader: Reader, reason: str) -> None:
    """With what an adapter's ops meet, where they meet something."""
    met = obstacles(reader)
    if met:
        refuse(reader.place, f"{reason}: {few([*map(str, met)], _SHOWN)}", met[0].remedy)


def _refuse_empty(reader: Reader, left: Sequence[OnnxBranch]) -> NoReturn:
    place = reader.place
    if left:
        reason = f"no branch has the names of an adapter; {len(left)} look like one: {few([*map(str, left)], _SHOWN)}"
        refuse(place, reason, "pass unnamed=True if they are LoRA and not a bottleneck that the model has itself")
    _refuse_met(reader, "the graph has no LoRA branch that can be folded")
    reason = "the graph has no LoRA branch: no Add of a linear op and of two narrow ones of the same input"
    remedy = 'export with adapters="unfolded", or the model of PEFT before it is merged'
    refuse(place, reason, f"{remedy}; the slots of a switchable graph have no numbers")


def _refuse_more(reader: Reader, branches: int) -> None:
    """What has an adapter's names must be gone."""
    graphs = [*reader.model.graphs()]
    used = [n for graph in graphs for n, v in graph.initializers.items() if v.uses() and ADAPTER.search(n)]
    ops = [op for node in reader.model.graph.all_nodes() if (op := reader.linear(node)) is not None]
    used += [op.constant.name for op in ops if ADAPTER.search(reader.names(op))]
    if used:
        names = few([*dict.fromkeys(used)], _SHOWN)
        reason = f"{branches} branches were found, and more are there: {names} are still in use"
        _refuse_met(reader, reason)
        refuse(reader.place, reason, REMEDY)


def _fold(reader: Reader, sites: Sequence[Site]) -> str:
    """Put the sum where the weight is, or beside it where someone else reads that, and leave the branches out.

    Returns:
        The name of the initializer that has it.
    """
    from onnx_ir.tensor_adapters import TorchTensor

    base, branches = sites[0].base, sites[0].branches
    origin, weight = base.constant, reader.constant(base.constant)
    assert weight is not None, origin.name
    deltas = [_low_rank(reader, base, branch, weight) for branch in branches]
    folded = folded_weight(weight.contiguous(), deltas, weight.dtype, origin.name)
    axes, readers = tuple(range(weight.ndim)), len(sites)
    while (alone := len(origin.uses()) == readers and not origin.is_graph_output()) and origin.producer() is not None:
        node = origin.producer()
        if op_type(node) not in ("Transpose", "Identity"):
            break
        step = order(node, weight.ndim)
        axes, origin, readers = tuple(step[axis] for axis in axes), node.inputs[0], 1
    if alone and origin.is_initializer():
        folded = folded.permute([axes.index(axis) for axis in range(weight.ndim)]).contiguous()
    else:
        origin = _new_initializer(reader.model.graph, base.constant, weight)
        for site in sites:
            site.base.node.replace_input_with(site.base.form.place, origin)
    origin.const_value = TorchTensor(folded, name=origin.name)
    for total, rest in (pair for site in sites for pair in _runs(site)):
        if total.is_graph_output():  # an output keeps its name
            total.name, rest.name = rest.name, total.name
        total.replace_all_uses_with(rest, replace_graph_outputs=True)
    return origin.name


def _runs(site: Site) -> Iterator[tuple[Any, Any]]:
    """Of branches that are added one after the other: the sum with all of them, and without."""
    for has, run in groupby(site.terms, lambda term: term.branch is not None):
        first, *more = run
        if has:
            yield first.add.outputs[0], [first, *more][-1].rest


def _new_initializer(graph: Any, like: Any, weight: torch.Tensor) -> Any:
    import onnx_ir
    from onnx_ir.tensor_adapters import TorchTensor

    name = free_name(like.name, names_in(graph))
    value = onnx_ir.val(name, const_value=TorchTensor(weight, name))
    graph.initializers.add(value)
    return value


def _shapes(site: Site) -> None:
    """A sum with a branch is as large as without: who asks for its shape keeps no branch alive."""
    for term in site.terms:
        for use in term.add.outputs[0].uses() if term.branch is not None else ():
            if op_type(use.node) == "Shape":
                use.node.replace_input_with(use.idx, term.rest)


def _apart(model: Any, site: Site) -> Site:
    """The site on nodes of its own, before its last Add: what reads a value on the way to its sum reads the old one."""
    import onnx_ir

    way = [value.producer() for value in reversed(site.base.path)] + [term.add for term in reversed(site.terms)]
    copies: dict[Any, Any] = {}
    taken = names_in(model.graph)
    for node in way:
        inputs = [copies.get(value, value) for value in node.inputs]
        outputs = [onnx_ir.Value(name=free_name(v.name, taken), shape=v.shape, type=v.type) for v in node.outputs]
        copy = onnx_ir.Node(
            node.domain, node.op_type, inputs, [*node.attributes.values()], outputs=outputs, version=node.version,
            name=free_name(node.name, taken), metadata_props={**node.metadata_props},
        )  # fmt: skip
        copies |= dict(zip(node.outputs, copy.outputs, strict=True)) | {node: copy}
    last = site.terms[0].add
    model.graph.insert_before(last, [copies[node] for node in way])
    total, copied = last.outputs[0], copies[last.outputs[0]]
    if total.is_graph_output():  # an output keeps its name
        total.name, copied.name = copied.name, total.name
    total.replace_all_uses_with(copied, replace_graph_outputs=True)
    base = replace(site.base, node=copies[site.base.node], path=tuple(copies[value] for value in site.base.path))
    terms = tuple(replace(term, add=copies[term.add], rest=copies[term.rest]) for term in site.terms)
    return replace(site, base=base, terms=terms, apart=False)


def _low_rank(reader: Reader, base: Op, branch: Branch, weight: torch.Tensor) -> LowRank:
    """The branch as a delta of the weight as it lies in the graph."""
    A, B, groups = reader.matrix(branch.down), reader.matrix(branch.up), base.groups
    if base.form.kind is Kind.CONV:  # A has the kernel, (groups·r, in / groups·k…), and B is (out, r)
        A = _of_one_group(reader, branch.down, A, groups)
    elif base.form.kind is Kind.DECONV:  # A: (groups·r, in / groups), B has the kernel: (out / groups·k…, groups·r)
        A = A.unflatten(0, (groups, -1)).transpose(0, 1).flatten(1)
        B = _of_one_group(reader, branch.up, B.mT, groups).mT
    batch = () if base.convolves else tuple(weight.shape[:-2])
    kernel = base.sides[1] * (weight.ndim - 2) if base.convolves else ""
    sides = "b" * len(batch) + base.sides + kernel
    layout, rank = Layout(sides, tuple(weight.shape)), A.shape[-2]
    try:  # one factor may serve all experts
        A = A.expand(*batch, *A.shape[-2:]).reshape(layout.shape_of("A", rank))
        B = B.expand(*batch, *B.shape[-2:]).reshape(layout.shape_of("B", rank))
    except RuntimeError as error:
        reason = f"the factors {[*A.shape]} and {[*B.shape]} are no delta of {base.constant.name} {[*weight.shape]}"
        refuse(f"{reader.place}, {branch.down.constant.name}", reason, REMEDY, error)
    return LowRank(layout, A, B, branch.scale / base.scale, rank)


def _of_one_group(reader: Reader, op: Op, factor: torch.Tensor, groups: int) -> torch.Tensor:
    """A factor that all groups of a convolution share."""
    blocks = factor.unflatten(0, (groups, -1))
    if bool((blocks != blocks[:1]).any()):
        reason = f"{op.constant.name} is another factor for each group of the convolution"
        refuse(reader.place, reason, REMEDY)
    return blocks[0]
