"""Give every module the class that its active adapters ask for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from torch import fx, nn

from lora_fx.changes import safe_point
from lora_fx.deltas.adapter import Adapter
from lora_fx.errors import LoraFxError
from lora_fx.model.behind import blocks_of, callers, is_wrapped
from lora_fx.model.classes import READER, Reader, Reads, give_class, give_forward, own_class, reads_of, unwire, wrap
from lora_fx.model.inventory import Inventory, inventory
from lora_fx.model.marks import (
    give_back_conversions,
    hold_checkpoints,
    hold_head,
    hold_size,
    is_reader,
    keep_conversions,
    release_checkpoints,
    release_head,
    release_size,
    unmark,
)
from lora_fx.passes.keeping import Keeper, Key
from lora_fx.passes.purity import Untraceable
from lora_fx.passes.realising import agree, demote, reads_by_dispatch
from lora_fx.passes.rewriting import Traced, rewrite_graph, trace_forward
from lora_fx.walking import modules_of

Active = Mapping[nn.Module, dict[str, Adapter]]
"""Module → its active adapters by child name."""


def wire(model: nn.Module) -> None:
    """Rewrite every marked module as a graph. One that cannot be after all gives up its mark: what it reads dispatches.

    Raises:
        LoraFxError: another tool has built on a class that would go.
    """
    while failed := _wire(model):
        here = inventory(model)
        for reader in failed:
            for module in reader.modules() if isinstance(reader, fx.GraphModule) else [reader]:
                unmark(module)
            below = {id(p) for p in reader.parameters()}
            demote(place.adapter for place in here.places if id(place.parameter) in below)


def _wire(model: nn.Module) -> list[nn.Module]:
    """Marked modules that could not be rewritten as a graph come back; then the model is half done."""
    here = inventory(model)
    unwire(model, here)
    agree(here)
    _refuse_lost_blocks(here)
    for adapter in here.adapters:
        adapter.inlined = False
    active = {module: own for module in here.modules if (own := here.of(module, active=True))}
    reads = {module: reads_of(own) for module, own in active.items()}
    by_dispatch = {module: _by_dispatch(module, own) for module, own in active.items()}
    rewritten = [module for module in here.modules if _is_rewritten(module, active)]
    keys = {m: Key(own_class(m), by_dispatch.get(m, ()), reads.get(m, ())) for m in rewritten}
    keeper = Keeper(active, reads)
    kept = {module: cls for module, key in keys.items() if (cls := keeper.find(module, key)) is not None}
    again = [m for m in here.modules if m not in kept and (m in keys or _calls_rewritten(m, active))]
    traced, failed = _traced(again, active, reads)
    for module in active:
        if module not in kept:
            give_class(module, by_dispatch[module])
    if failed:
        return failed
    for module, cls in kept.items():
        module.__class__ = cls
    for module, new in traced.items():
        give_forward(module, new.graph, new.baked, reads.get(module, ()))
        if new.relied is not None:
            keeper.keep(module, keys[module], new.relied)
    for module in here.modules:
        if is_wrapped(module):
            wrap(module)
    keep_keys(here)
    return []


def _refuse_lost_blocks(here: Inventory) -> None:
    """Raise where an adapter acts behind a block that is not here: it would act on the others alone."""
    for place in here.places:
        adapter = place.adapter
        if adapter.active and adapter.kind.behind is not None:
            missing = set(adapter.tensors) - set(blocks_of(adapter, here.modules))
            if missing or not any(adapter in callers(module) for module in here.modules):
                raise LoraFxError(
                    f"{len(missing)} of the {len(adapter.tensors)} blocks that it stands behind are no part of this "
                    "model",
                    place=f"adapter {adapter.name!r} of {place.weight}",
                    remedy=f"pass the whole model; or lora_fx.remove(model, {adapter.name!r}), and apply again",
                )


def _by_dispatch(module: nn.Module, own: Mapping[str, Adapter]) -> Reads:
    """A GraphModule reads its own weights in its graph, however others read theirs."""
    return () if isinstance(module, fx.GraphModule) else reads_of(reads_by_dispatch(own))


def _traced(
    modules: list[nn.Module], active: Active, reads: Mapping[nn.Module, Reads]
) -> tuple[dict[nn.Module, Traced], list[nn.Module]]:
    """These as graphs, and those of them that cannot be."""
    if not modules:
        return {}, []
    reader = Reader()
    traced: dict[nn.Module, Traced] = {}
    failed: list[nn.Module] = []
    for module in active:
        give_class(module, reads[module])
        module.__dict__[READER] = reader
    for module in modules:
        safe_point()
        try:
            traced[module] = _graph_of(module, active, reader)
        except Untraceable:
            failed.append(module)
    for module in active:
        del module.__dict__[READER]
    return traced, failed


def _graph_of(module: nn.Module, active: Active, reader: Reader) -> Traced:
    if isinstance(module, fx.GraphModule):
        return Traced(rewrite_graph(module, lambda child: _is_inlined(child, active), reader), frozenset())
    return trace_forward(module, reader=reader)


def _is_rewritten(module: nn.Module, active: Active) -> bool:
    """A reader with something to add: where no adapter is active the original forward stays."""
    return is_reader(module) and (module in active or any(below in active for below in modules_of(module)))


def _calls_rewritten(module: nn.Module, active: Active) -> bool:
    """A GraphModule whose graph calls a module that is rewritten: its branches belong into that graph."""
    if not isinstance(module, fx.GraphModule):
        return False
    called = (module.get_submodule(str(n.target)) for n in module.graph.nodes if n.op == "call_module")
    return any(_is_inlined(child, active) for child in called)


def _is_inlined(child: nn.Module, active: Active) -> bool:
    """Hooks would be lost, and what is around it: such a child stays a call, and is rewritten where it is."""
    hooked = child._forward_hooks or child._forward_pre_hooks or is_wrapped(child)
    return _is_rewritten(child, active) and not hooked


def keep_keys(here: Inventory) -> None:
    """A transformers model is saved under its own keys for as long as it has adapters, and without the base.

    Its class's `save_pretrained` renames, splits and merges by patterns over the keys. The factors' keys match them
    too, but factors cannot be split like their weight (rank 1 raises). `from_pretrained` reads a model's own keys.
    """
    for module in here.modules:
        if not hasattr(type(module), "save_pretrained"):
            continue
        below = set(map(id, modules_of(module)))
        owners = {place.owner for place in here.places if id(place.owner) in below}
        if owners:
            keep_conversions(module)
            hold_checkpoints(module)
        else:
            give_back_conversions(module)
            release_checkpoints(module)
        if owners & _told(module, _EMBEDDINGS):
            hold_size(module)
        else:
            release_size(module)
        if owners & _told(module, _EMBEDDINGS[1:]):
            hold_head(module)
        else:
            release_head(module)


_EMBEDDINGS = ("get_input_embeddings", "get_output_embeddings")
"""How a transformers model is asked for what its `resize_token_embeddings` changes or replaces; the second, for its
head."""


def _told(module: Any, asked: Sequence[str]) -> set[nn.Module]:
    found = set()
    for ask in asked:
        with suppress(Exception):  # many a model has none, and says so in its own way
            found.add(getattr(module, ask)())
    return {own for own in found if isinstance(own, nn.Module)}
