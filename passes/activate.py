"""Which adapters act, and which are there at all. A `Rewrite` behind these gives modules the classes for it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from lora_fx.deltas.adapter import Adapter
from lora_fx.errors import AdapterError
from lora_fx.model.behind import leave
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
class Acting:
    """How one adapter was: whether it acted, and what of its θ trained."""

    adapter: Adapter
    active: bool
    trained: tuple[str, ...]
    """When it last acted."""
    flags: tuple[bool, ...]
    """``requires_grad`` of each tensor of θ."""

    @classmethod
    def of(cls, adapter: Adapter) -> Acting:
        return cls(adapter, adapter.active, adapter._trained, tuple(p.requires_grad for p in adapter.parameters()))

    def restore(self) -> None:
        self.adapter.change(active=self.active, _trained=self.trained)
        for parameter, flag in zip(self.adapter.parameters(), self.flags, strict=True):
            parameter.requires_grad_(flag)


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
            facts.undo.append(Acting.of(adapter).restore)  # a fold may have put it away
            adapter.act(adapter.name in self.names)
        return Result(model, True)


def acting(model: nn.Module) -> tuple[Acting, ...]:
    """How each adapter of the model is."""
    return tuple(map(Acting.of, inventory(model).adapters))


@dataclass(frozen=True)
class Restore(Pass):
    """Make the adapters as they were, those of them that are still there."""

    before: tuple[Acting, ...]

    name = "restore"
    requires = (UNFOLDED,)

    def call(self, model: nn.Module, facts: Facts) -> Result:
        here = {*inventory(model).adapters}
        for own in self.before:
            if own.adapter in here:
                facts.undo.append(Acting.of(own.adapter).restore)
                own.restore()
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
        gone = [place for place in here.places if place.adapter.name in self.names]
        for place in gone:
            detach(place.owner, place.child)
        for module in here.modules:
            leave(module, (place.adapter for place in gone))
        if not inventory(model).places:
            for module in here.modules:
                unmark(module)
        return Result(model, True)
