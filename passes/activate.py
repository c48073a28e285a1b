"""Which adapters act, and which are there at all. A `Rewrite` behind these gives modules the classes for it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from numbers import Real
from typing import Any

from torch import nn

from lora_fx.deltas.adapter import Adapter
from lora_fx.errors import AdapterError
from lora_fx.model.behind import leave
from lora_fx.model.classes import unwire
from lora_fx.model.inventory import inventory
from lora_fx.model.marks import child_name, detach, unmark
from lora_fx.passes.base import UNFOLDED, Facts, Pass, Result
from lora_fx.passes.keeping import forget_classes


@dataclass(frozen=True)
class Require(Pass):
    """Refuse where a name is none of the model's adapters, before anything is changed."""

    names: tuple[str | Mapping[str, float], ...]
    """As in `Activate`."""

    name = "require"

    def call(self, model: nn.Module, facts: Facts) -> Result:
        inventory(model).require(strengths(self.names))
        return Result(model, False)


def strengths(names: Sequence[str | Mapping[str, float]]) -> dict[str, float]:
    """Name → strength of each adapter that is named. A name alone has 1.

    Raises:
        AdapterError: a strength is no finite number, or a name stands there twice, or is none.
    """
    found: dict[str, float] = {}
    for given in names:
        for name, strength in given.items() if isinstance(given, Mapping) else [(given, 1.0)]:
            if not isinstance(name, str) or name in found:
                reason = f"{name!r} {'stands there twice' if name in found else 'is no name'}"
                raise AdapterError(reason, place="adapters", remedy='say "a", or {"a": 0.7} with its strength, once')
            found[name] = _number(name, strength)
    return found


def _number(name: str, strength: Any) -> float:
    with suppress(OverflowError):  # of an integer
        if isinstance(strength, Real) and not isinstance(strength, bool) and math.isfinite(strength):
            return float(strength)
    remedy = "give a finite number: 1 is the adapter as it was trained, 0 leaves it out, −1 takes it away"
    raise AdapterError(f"{strength!r} is no strength", place=f"adapter {name!r}", remedy=remedy)


@dataclass(frozen=True)
class Acting:
    """How one adapter was: whether it acted, and what of its θ trained."""

    adapter: Adapter
    active: bool
    strength: float
    trained: tuple[str, ...]
    """When it last acted."""
    flags: tuple[bool, ...]
    """``requires_grad`` of each tensor of θ."""

    @classmethod
    def of(cls, adapter: Adapter) -> Acting:
        flags = tuple(p.requires_grad for p in adapter.parameters())
        return cls(adapter, adapter.active, adapter.strength, adapter._trained, flags)

    def restore(self) -> None:
        if self.adapter.strength != self.strength:
            self.adapter.adjust(self.strength)
        self.adapter.change(active=self.active, _trained=self.trained)
        for parameter, flag in zip(self.adapter.parameters(), self.flags, strict=True):
            parameter.requires_grad_(flag)


@dataclass(frozen=True)
class Activate(Pass):
    """Make exactly these adapters act, and train as they did; all others stay, and do nothing.

    Args:
        names: of adapters; or name → strength c, for W + c·δ. A name alone has 1, and 0 is as if it were not named.
    """

    names: tuple[str | Mapping[str, float], ...]

    name = "activate"
    requires = (UNFOLDED,)

    def call(self, model: nn.Module, facts: Facts) -> Result:
        here, wanted = inventory(model), strengths(self.names)
        here.require(wanted)
        for adapter in here.adapters:
            facts.undo += Acting.of(adapter).restore, partial(adapter.change, **adapter.told)  # it may be put away
            strength = wanted.get(adapter.name, 0.0)
            adapter.act(strength != 0, strength or 1.0)
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
                facts.undo += Acting.of(own.adapter).restore, partial(own.adapter.change, **own.adapter.told)
                own.restore()
        return Result(model, True)


@dataclass(frozen=True)
class Rename(Pass):
    """Call an adapter something else: its parameters stay what they are, under other names in the `state_dict`."""

    old: str
    new: str

    name = "rename"
    requires = (UNFOLDED,)

    def call(self, model: nn.Module, facts: Facts) -> Result:
        here = inventory(model)
        here.require([self.old])
        if not isinstance(self.new, str) or not self.new.isidentifier():
            reason, remedy = f"{self.new!r} is no identifier", "name the adapter with letters, digits and _"
            raise AdapterError(reason, place="rename", remedy=remedy)
        if self.new in here.names:
            remedy = f"take another name, or lora_fx.remove(model, {self.new!r}) first"
            raise AdapterError(f"there is an adapter {self.new!r} already", place="rename", remedy=remedy)
        mine = [place for place in here.places if place.adapter.name == self.old]
        names = {place: child_name(place.attribute, self.new, place.part) for place in mine}
        for place, child in names.items():
            if child in place.owner._modules or hasattr(place.owner, child):
                reason = f"{type(place.owner).__name__} has something called {child} already"
                raise AdapterError(reason, place=place.weight, remedy="take another name")
        unwire(model, here)
        for place, child in names.items():
            for table in (place.owner._modules, place.owner.__dict__):
                if table.get(place.child) is place.adapter:
                    order = [(child if key == place.child else key, value) for key, value in table.items()]
                    table.clear()
                    table.update(order)
        for adapter in {place.adapter for place in mine}:
            facts.undo.append(partial(adapter.change, name=self.old))
            adapter.change(name=self.new)
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
