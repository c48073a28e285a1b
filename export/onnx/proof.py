"""The proof that a folded file is the base graph with other numbers in it.

    graph(folded) = graph(base)          line for line: nodes, attributes, topology, names, shapes, types
    W'            = round(W + Σ δ)   element for element, for the folded weights; all others to the bit

The file is read back: nothing of what filled and wrote it is trusted. What a folded weight must be is computed without
the fold's own algebra (`lora_fx.checks.oracles`). The base's graph is one of two. Where what torch traced for the file
was the base model itself, as the modules and tensors say that a trace meets (`lora_fx.export.onnx.weights.seen`), and
no adapted weight had numbers while the graph was optimized, it is that graph with the base's numbers let in by
themselves. Else the base is translated and optimized once more. That torch translates one model twice to one graph is
taken for granted in the first case.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Any

from lora_fx.checks.oracles import misrounded
from lora_fx.export.onnx.graphs import as_torch, graph_lines, operators
from lora_fx.export.onnx.optimization import Filled
from lora_fx.export.onnx.processes import optimized
from lora_fx.export.onnx.runtimes import refuse, refusing
from lora_fx.export.onnx.weights import Weights

_REMEDY = "nothing was written; export without prove=True, and report it to lora_fx"


@dataclass(frozen=True)
class Proof:
    """What was compared, and found equal: a proof that fails is an `ExportError`, and no file."""

    nodes: int
    """All of them, with subgraphs: the same in both graphs."""
    graph: str
    """sha256 of the graph without the numbers of its initializers."""
    folded: Mapping[str, int]
    """Initializers that hold folded weights → how many elements: each is W + Σ δ rounded once."""
    untouched: int
    """Initializers that are the base's, bit for bit."""
    evaluated: tuple[str, ...]
    """Initializers that the optimizer computed from folded weights, as with a batch norm: no weight's own numbers any
    more. What speaks for them is the comparison of outputs."""
    split: Mapping[str, str]
    """Where a fold has given one use of a tied weight a copy: the initializer more → the one that the base has."""
    unread: tuple[str, ...]
    """Adapted weights that the model does not read on the example inputs: neither graph has a use of them."""
    fused: Mapping[str, int] = field(default_factory=dict)
    """What ONNX Runtime fuses the folded graph to: operators of its own → how many."""
    base_fused: Mapping[str, int] = field(default_factory=dict)
    """The same of the base graph."""

    def __str__(self) -> str:
        total = sum(self.folded.values())
        parts = [
            f"{self.nodes} nodes are the base graph's",
            f"{total:,} elements of {len(self.folded)} folded weights are W + δ rounded once",
            f"{self.untouched} initializers are the base's to the bit",
        ]
        parts += [f"{len(self.evaluated)} evaluated from folded weights"] if self.evaluated else []
        parts += [f"untied: {', '.join(f'{new} from {old}' for new, old in self.split.items())}"] if self.split else []
        parts += [f"adapted, but not read by the model here: {', '.join(self.unread)}"] if self.unread else []
        lines = [f"proven: {'; '.join(parts)}"]
        if self.fused or self.base_fused:
            shown = [", ".join(f"{n} {op}" for op, n in f.items()) or "none" for f in (self.base_fused, self.fused)]
            lines.append(f"fused by ONNX Runtime: base {shown[0]}; folded {shown[1]}")
        return "\n  ".join(lines)


def prove(path: Path, weights: Weights, contents: Filled, base: Any, base_weights: Weights) -> Proof:
    """Hold the file against the base model's program.

    Args:
        weights, contents: what the file's initializers stand for.
        base: the base model's graph, with the base's numbers.
    """
    import onnx_ir

    file = onnx_ir.load(path)
    known = {base_weights[name].storage: name for name in base.graph.initializers if name in base_weights}
    extra = [name for name in file.graph.initializers if name not in base.graph.initializers and name in weights]
    split = {name: known[weights[name].storage] for name in extra if weights[name].storage in known}
    lines = graph_lines(file, split)
    for mine, theirs in zip_longest(lines, graph_lines(base), fillvalue="nothing"):
        if mine != theirs:
            reason = f"the graph is not the base's: it has\n  {mine}\nwhere the base has\n  {theirs}"
            refuse(path.name, reason, _REMEDY)
    folded: dict[str, int] = {}
    untouched, evaluated = 0, []
    for name, value in file.graph.initializers.items():
        actual = value.const_value
        held, axes = contents.held.get(name, ("", ()))
        if held and weights[held].adapters:
            weight, numbers = weights[held], as_torch(actual).permute([axes.index(axis) for axis in range(len(axes))])
            wrong, folded[name] = misrounded(weight.load().cpu(), numbers, weight.adapters).numel(), numbers.numel()
            if wrong:
                refuse(name, f"{wrong} of {folded[name]} elements are not W + δ rounded once", _REMEDY)
        elif actual.tobytes() == base.graph.initializers[split.get(name, name)].const_value.tobytes():  # type: ignore[union-attr]
            untouched += 1
        elif held:
            refuse(name, "no adapter is folded into it, and its numbers are not the base's", _REMEDY)
        else:
            evaluated.append(name)
        if isinstance(actual, onnx_ir.ExternalTensor):  # it is mapped: every file page that was read is resident
            actual.release()
    adapted: dict[tuple[Any, ...], list[str]] = {}
    for name, weight in weights.items():
        if weight.adapters:
            adapted.setdefault((weight.storage, weight.adapters), []).append(name)
    unread = tuple(" = ".join(names) for names in adapted.values() if not contents.read & {*names})
    digest = hashlib.sha256("\n".join(lines).encode()).hexdigest()
    return Proof(operators(file).total(), digest, folded, untouched, tuple(evaluated), split, unread)


def fused_operators(path: Path, folder: Path) -> dict[str, int]:
    """What ONNX Runtime's optimizer makes of a file for a CPU: its own operators, and how many."""
    import onnx

    target = folder / f"{path.stem}.fused"
    if os.name == "posix":  # of the numbers, which nobody reads, nothing has to be written
        with suppress(FileExistsError):
            (folder / f"{target.name}.data").symlink_to(os.devnull)
    with refusing("ONNX Runtime does not load the file", path.name, "try another opset"):
        optimized(path, target)
    file = onnx.load(target, load_external_data=False)
    found = Counter(node.op_type for node in file.graph.node if node.domain not in ("", "ai.onnx"))
    return dict(sorted(found.items()))
