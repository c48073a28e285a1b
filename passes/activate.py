"""Which adapters act, and which are there at all. A `Rewrite` behind these gives modules the classes for it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from torch import nn

from lora_fx.errors import AdapterError
from lora_fx.model.classes import unwire
from lora_fx.model.inventory import inventory
from lora_fx.model.marks import detach, unmark
from lora_fx.passes.base import UNFOLDED, Facts, Pass, Result
from lora_fx.passes.keeping import forget_classes


@dataclass(frozen=True)
class Require(Pass):
    """Refuse where a name is none of the model's adapters, before anything is changed."""

    names: tuple[str, ...]

    name = "require"

    def call(self, model: nn.Module, facts: Facts) -> Result:
        inventory(model).require(self.names)
        return Result(model, False)


@dataclass(frozen=True)
class Activate(Pass):
    """Make exactly these adapters act, and train as they did; all others stay, and do nothing."""

    names: tuple[str, ...]

    name = "activate"
    requires = (UNFOLDED,)

    def call(self, model: nn.Module, facts: Facts) -> Result:
        here = inventory(model)
        here.require(self.names)
        for adapter in here.adapters:
            facts.undo.append(partial(adapter.act, adapter.active))  # a fold may have put it away
            adapter.act(adapter.name in self.names)
        return Result(model, True)


@dataclass(frozen=True)
class Remove(Pass):
    """Take these adapters out for good; after the last one no module is marked any more."""

    names: tuple[str, ...]

    name = "remove"
    requires = (UNFOLDED,)

    def call(self, model: nn.Module, facts: Facts) -> Result:
        here = inventory(model)
        if not self.names:
            raise AdapterError(
                "no name is given: nothing would be removed",
                place="remove",
                remedy=f"name what is to go: {', '.join(map(repr, here.names)) or 'the model has no adapters'}",
            )
        here.require(self.names)
        unwire(model, here)
        forget_classes(here.modules)
        for place in here.places:
            if place.adapter.name in self.names:
                detach(place.owner, place.child)
        if not inventory(model).places:
            for module in here.modules:
                unmark(module)
        return Result(model, True)
