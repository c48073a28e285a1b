"""Take the ranks of `adalora` whose singular value is 0 out of their adapters:   s·P·Λ·Q is the same without them.

A rank that is kept keeps its numbers. The scale stays what it was, so alpha goes down with the rank; a site of which
no rank is left loses its adapter.
"""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass

import torch
from torch import nn

from lora_fx.deltas.adapter import Adapter
from lora_fx.errors import AdapterError
from lora_fx.graph.places import is_shard
from lora_fx.model.inventory import Place, inventory
from lora_fx.model.marks import detach
from lora_fx.passes.base import UNFOLDED, Facts, Pass, Result

KIND = "adalora"


@dataclass(frozen=True)
class Prune(Pass):
    """Leave the adapters of this name with the ranks that act."""

    adapter: str = "default"

    name = "prune"
    requires = (UNFOLDED,)

    def call(self, model: nn.Module, facts: Facts) -> Result:
        found = of_kind(model, self.adapter)
        alive = {adapter: _alive(adapter, places[0].weight) for adapter, places in found.items()}
        if not any(len(kept) for kept in alive.values()):
            raise AdapterError(
                f"every singular value of the adapter {self.adapter!r} is 0: nothing would be left of it",
                place="prune",
                remedy=f"train it first, or take it out: lora_fx.remove(model, {self.adapter!r})",
            )
        changed = False
        for adapter, places in found.items():
            kept = alive[adapter]
            if len(kept) == adapter.rank:
                continue
            changed = True
            if len(kept):
                _shorten(adapter, kept)
                continue
            for place in places:
                detach(place.owner, place.child)
        return Result(model, changed)


def of_kind(model: nn.Module, name: str) -> dict[Adapter, list[Place]]:
    """The adapters of this name and kind, each with the places where it is read.

    Raises:
        AdapterError: there is none, or one is of another kind, is on meta or in parts.
    """
    here, found = inventory(model), defaultdict[Adapter, list[Place]](list)
    here.require([name])
    for place in here.places:
        if place.adapter.name == name:
            found[place.adapter].append(place)
    for adapter, (place, *_) in found.items():
        where, retrain = f"{place.weight}, adapter {name!r}", f"apply it with kind={KIND!r}"
        if adapter.kind.name != KIND:
            raise AdapterError(f"it is of the kind {adapter.kind.name!r}", place=where, remedy=retrain)
        if adapter.room != adapter.rank:
            reason = f"it has room for {adapter.room} ranks, and takes {adapter.rank}"
            raise AdapterError(reason, place=where, remedy="load it without max_rank, and go on with that")
        if any(p.is_meta or is_shard(p) for p in adapter.parameters()):
            reason = "its singular values are not here as a whole: they are on meta, or in parts"
            raise AdapterError(reason, place=where, remedy="materialise or unshard the model first")
    return dict(found)


def _alive(adapter: Adapter, weight: str) -> list[int]:
    """The ranks with a singular value, in any expert."""
    singular = adapter.get_parameter("singular").detach()
    if not bool(singular.isfinite().all()):
        raise AdapterError("a singular value is not finite", place=weight, remedy="go back to an earlier checkpoint")
    return (singular != 0).reshape(-1, adapter.rank).any(0).nonzero().view(-1).tolist()


def _shorten(adapter: Adapter, kept: list[int]) -> None:
    index = torch.tensor(kept, device=adapter.get_parameter("singular").device)
    for name, axis in (("P", -1), ("singular", -2), ("Q", -2)):
        whole = adapter.get_parameter(name)
        adapter.register_parameter(name, nn.Parameter(whole.detach().index_select(axis, index), whole.requires_grad))
    divisor = math.sqrt(len(kept)) if adapter.scaling == "rslora" else len(kept)
    adapter.adjust(rank=len(kept), alpha=adapter.scale * divisor)
