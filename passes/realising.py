"""What decides how a use of an adapted weight reads W + δ: by graph where that is sound, else by dispatch.

* before anything is changed, row by row (`Decider`), from a trace of every forward that reads the weight;
* whenever modules get their classes (`agree`): all adapters of one weight are read in one way;
* when a trace or a check fails after all (`demote`): then by dispatch, and where that fails, as the sum W + δ.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import fx, nn

from lora_fx.deltas.adapter import Adapter
from lora_fx.deltas.kinds import Kind
from lora_fx.deltas.realisation import Realisation
from lora_fx.graph import layout
from lora_fx.graph.places import storage_of
from lora_fx.graph.program import Program, Use, Weight
from lora_fx.model.inventory import Inventory
from lora_fx.passes.purity import Untraceable
from lora_fx.passes.rewriting import trace_forward

#: torch's modules whose fused fast path reads their children's weights, in eval, without calling the children
_FUSED = (nn.TransformerEncoderLayer, nn.TransformerEncoder, nn.MultiheadAttention)


def is_dense(use: Use) -> bool:
    """The op takes W + δ whole: no branch can stand beside it."""
    return use.call is None or layout.place(use.weight.layout, use.view, use.call.sides) is None


class Decider:
    """Why a weight that a program uses has to dispatch; each forward is traced once."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self._traces: dict[str, _Trace] = {}
        self._alike: dict[type[nn.Module], frozenset[str]] = {}  # what their instances read, who all do the same

    def why_dispatch(self, weight: Weight, owners: Iterable[str], kind: Kind) -> str:
        """Empty where every use sits in a forward that can be traced soundly.

        Args:
            owners: the paths of the modules that read the weight with its branch.
        """
        program = self.program
        if kind.by_graph:
            return kind.by_graph
        if program.capture is None:
            return "no example inputs: whoever reads it is served"
        if not any(use.seen for use in weight.uses):
            return "unseen by the example inputs: whoever reads it is served"
        for path in owners:
            if any(isinstance(program.model.get_submodule(above), _FUSED) for above in _ancestors(path)):
                return "torch's fused encoder reads it"
        for use in weight.uses:
            if is_dense(use):
                return f"{use.form} takes it whole"
            if why := _why_not_here(weight, use, self._trace(use.module)):
                return why
        return ""

    def _trace(self, path: str) -> _Trace:
        if path not in self._traces:
            self._traces[path] = self._traced(self.program.model.get_submodule(path))
        return self._traces[path]

    def _traced(self, module: nn.Module) -> _Trace:
        if isinstance(module, fx.GraphModule):
            return _Trace("", frozenset(name for name, _ in module.named_parameters(remove_duplicate=False)))
        kind: type[nn.Module] = type(module)
        baked: frozenset[str] = frozenset()
        reads = self._alike.get(kind) if "forward" not in module.__dict__ else None
        if reads is None:
            try:
                traced = trace_forward(module)
            except Untraceable as why:
                return _Trace(str(why))
            reads = frozenset(str(n.target) for n in traced.graph.nodes if n.op == "get_attr")
            baked = traced.baked
            if not baked:
                self._alike[kind] = reads
        named = list(module.named_parameters(remove_duplicate=False))
        read = {id(p) for name, p in named if name in reads}
        return _Trace("", frozenset(name for name, p in named if id(p) in read), baked)


def agree(here: Inventory) -> None:
    """All adapters of one weight are read in the same way, under whichever of its names."""
    by_storage: dict[int, list[Adapter]] = {}
    for place in here.places:
        by_storage.setdefault(storage_of(place.parameter), []).append(place.adapter)
    for group in by_storage.values():
        least = max((adapter.realised for adapter in group), key=_WAYS.index)
        demote(group, least)


_WAYS = (Realisation.GRAPH, Realisation.DISPATCH, Realisation.DENSE)


def demote(adapters: Iterable[Adapter], to: Realisation = Realisation.DISPATCH) -> None:
    """A rewritten forward is not the path that runs, or cannot be made: whoever reads the weight is served."""
    for adapter in adapters:
        if _WAYS.index(adapter.realised) < _WAYS.index(to):
            adapter.change(realised=to)


def reads_by_dispatch(adapters: Mapping[str, Adapter]) -> dict[str, Adapter]:
    """Those whose weight reads as an `AdaptedWeight` when the module runs."""
    return {child: a for child, a in adapters.items() if a.realised != Realisation.GRAPH}


@dataclass(frozen=True)
class _Trace:
    """What tracing a module's forward came to."""

    why: str
    reads: frozenset[str] = frozenset()
    """Names, relative to the module, of the parameters that its forward reads."""
    baked: frozenset[str] = frozenset()


def _ancestors(path: str) -> list[str]:
    parts = path.split(".") if path else []
    return [".".join(parts[:n]) for n in range(len(parts) + 1)]


def _why_not_here(weight: Weight, use: Use, trace: _Trace) -> str:
    if trace.why:
        return trace.why
    prefix = f"{use.module}." if use.module else ""
    inside = [name.removeprefix(prefix) for name in weight.names if name.startswith(prefix)]
    read = [name for name in inside if name in trace.reads]
    if not read:
        return f"{use.module or 'the model'} is handed it as an argument"
    if trace.baked and all("." in name for name in read):
        return f"{use.module or 'the model'} may change {', '.join(sorted(trace.baked)[:3])}"
    return ""
