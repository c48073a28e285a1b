"""Give every module the class that its active adapters ask for."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

from torch import fx, nn

from lora_fx.changes import safe_point
from lora_fx.model.classes import READER, Reader, give_class, give_forward, reads_of, unwire
from lora_fx.model.inventory import Inventory, inventory
from lora_fx.model.marks import give_back_conversions, hold_size, is_reader, keep_conversions, release_size, unmark
from lora_fx.passes.purity import Untraceable
from lora_fx.passes.realising import agree, demote, reads_by_dispatch
from lora_fx.passes.rewriting import Traced, rewrite_graph, trace_forward


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
    unwire(model)
    here = inventory(model)
    agree(here)
    for adapter in here.adapters:
        adapter.inlined = False
    active = {module: own for module in here.modules if (own := here.of(module, active=True))}
    reader = Reader()
    failed: list[nn.Module] = []
    graphs: list[tuple[nn.Module, Traced]] = []
    for module, own in active.items():
        give_class(module, reads_of(own))
        module.__dict__[READER] = reader
    for module in here.modules:
        safe_point()
        if _is_rewritten(module, here) or _calls_rewritten(module, here):
            try:
                graphs.append((module, _graph_of(module, here, reader)))
            except Untraceable:
                failed.append(module)
    for module, own in active.items():
        del module.__dict__[READER]
        graph = isinstance(module, fx.GraphModule)  # reads its own weights in its graph, however others read theirs
        give_class(module, reads_of({} if graph else reads_by_dispatch(own)))
    if not failed:
        for module, new in graphs:
            give_forward(module, new.graph, new.baked, reads_of(active.get(module, {})))
        keep_keys(model)
    return failed


def _graph_of(module: nn.Module, here: Inventory, reader: Reader) -> Traced:
    if isinstance(module, fx.GraphModule):
        return Traced(rewrite_graph(module, lambda child: _is_inlined(child, here), reader), frozenset())
    return trace_forward(module, reader=reader)


def _is_rewritten(module: nn.Module, here: Inventory) -> bool:
    """A reader with something to add: where no adapter is active the original forward stays."""
    return is_reader(module) and any(here.of(below, active=True) for below in module.modules())


def _calls_rewritten(module: nn.Module, here: Inventory) -> bool:
    """A GraphModule whose graph calls a module that is rewritten: its branches belong into that graph."""
    if not isinstance(module, fx.GraphModule):
        return False
    called = (module.get_submodule(str(n.target)) for n in module.graph.nodes if n.op == "call_module")
    return any(_is_inlined(child, here) for child in called)


def _is_inlined(child: nn.Module, here: Inventory) -> bool:
    """Hooks would be lost: a child with hooks stays a call, and is rewritten where it is."""
    return _is_rewritten(child, here) and not child._forward_hooks and not child._forward_pre_hooks


def keep_keys(model: nn.Module) -> None:
    """A transformers model is saved under its own keys for as long as it has adapters.

    Otherwise `save_pretrained` renames, splits and merges by patterns over the keys. The factors' keys match them too,
    but factors cannot be split like their weight (rank 1 raises), and the Trainer, which does not convert them back,
    would resume with fresh factors. `from_pretrained` reads a model's own keys as well.
    """
    for module in model.modules():
        if not hasattr(module, "save_pretrained"):
            continue
        places = inventory(module).places
        if places:
            keep_conversions(module)
        else:
            give_back_conversions(module)
        if {place.owner for place in places} & _embeddings(module):
            hold_size(module)
        else:
            release_size(module)


def _embeddings(module: Any) -> set[nn.Module]:
    """The modules that `resize_token_embeddings` of a transformers model changes or replaces."""
    found = set()
    for ask in ("get_input_embeddings", "get_output_embeddings"):
        with suppress(Exception):  # many a model has none, and says so in its own way
            found.add(getattr(module, ask)())
    return {own for own in found if isinstance(own, nn.Module)}
