"""Which adapters are here: the one place to ask.

for place in inventory(model).places: place.weight, place.adapter.name, place.adapter.active
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import nn

from lora_fx.deltas.adapter import Adapter
from lora_fx.errors import AdapterError, LoraFxError
from lora_fx.graph.places import is_shard, loaded, storage_of
from lora_fx.model.marks import SEPARATOR, FoldRecord, attribute_of, child_name, fold_record
from lora_fx.walking import modules_of, paths_of

_WRAPPERS = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})


@dataclass(frozen=True)
class Place:
    """An adapter beside a weight, as one module holds the two."""

    paths: tuple[str, ...]
    """Of the module, under each of its names."""
    owner: nn.Module
    child: str
    adapter: Adapter
    folded: bool = False
    """A fold has put the adapter away."""

    @property
    def path(self) -> str:
        return self.paths[0]

    @property
    def attribute(self) -> str:
        """What the module calls the weight."""
        return attribute_of(self.child)

    @property
    def weight(self) -> str:
        """The first name of the weight here."""
        return weight_name(self.path, self.attribute)

    @property
    def weights(self) -> tuple[str, ...]:
        return tuple(weight_name(path, self.attribute) for path in self.paths)

    @property
    def part(self) -> str:
        """Of a fused weight, in the child's name; empty where the whole weight is adapted."""
        return self.child.removeprefix(child_name(self.attribute, self.adapter.name)).lstrip("_")

    @property
    def parameter(self) -> nn.Parameter:
        parameter = self.owner._parameters[self.attribute]
        assert parameter is not None, self.weight
        return parameter


@dataclass(frozen=True)
class Storage:
    """One weight storage as some of its owners read it: with these adapters."""

    owners: tuple[tuple[nn.Module, str], ...]
    adapters: tuple[Adapter, ...]
    split: bool
    """Other owners of the same storage read it with other adapters, or with none."""
    names: tuple[str, ...]
    """Of the weight, under each name of these owners."""

    @property
    def parameter(self) -> nn.Parameter:
        owner, attribute = self.owners[0]
        parameter = owner._parameters[attribute]
        assert parameter is not None, self.names
        return parameter

    @property
    def weight(self) -> torch.Tensor:
        """Its numbers, on the device on which the owners read them."""
        return loaded(*self.owners[0])

    def replace(self, parameter: nn.Parameter) -> None:
        """Give these owners another parameter."""
        for owner, attribute in self.owners:
            owner._parameters[attribute] = parameter


@dataclass(frozen=True)
class Inventory:
    """The adapters of a model, in the order of its modules."""

    modules: Mapping[nn.Module, tuple[str, ...]]
    """Each module that is no part of an adapter → its paths."""
    places: tuple[Place, ...]
    """Beside their weights."""
    put_away: tuple[Place, ...]
    """By a fold, for unfold."""
    records: Mapping[nn.Module, FoldRecord]

    @cached_property
    def adapters(self) -> tuple[Adapter, ...]:
        """Each once, those that are put away too."""
        return tuple(dict.fromkeys(place.adapter for place in (*self.places, *self.put_away)))

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(adapter.name for adapter in self.adapters))

    @property
    def folded(self) -> bool:
        """The model carries what `unfold` needs."""
        return bool(self.records)

    def require(self, names: Iterable[str]) -> None:
        """Raise for a name that no adapter has.

        Raises:
            AdapterError: there is one.
        """
        for name in names:
            if name not in self.names:
                raise AdapterError(
                    f"there is no adapter named {name!r}",
                    place="the model",
                    remedy=f"it has {', '.join(sorted(self.names)) or 'no adapters'}",
                )

    def of(self, owner: nn.Module, active: bool = False) -> dict[str, Adapter]:
        """Child name → adapter, of one module's own weights."""
        return {c: a for c, a in self._by_owner.get(owner, {}).items() if a.active or not active}

    def by_weight(self, places: Sequence[Place] | None = None, active: bool = False) -> dict[str, list[Adapter]]:
        """Every name of each adapted weight → its adapters."""
        found: dict[str, list[Adapter]] = {}
        for place in self.places if places is None else places:
            if place.adapter.active or not active:
                for name in place.weights:
                    found.setdefault(name, []).append(place.adapter)
        return found

    def storages(self) -> list[Storage]:
        """Every storage that an active adapter acts on, once for each set of adapters it is read with.

        Raises:
            LoraFxError: an adapted weight is sharded, or has another shape than when it was adapted.
        """
        storages: dict[int, dict[tuple[Adapter, ...], list[tuple[nn.Module, str]]]] = {}
        for module in self.modules:
            active = self.of(module, active=True)
            for attribute, parameter in module._parameters.items():
                own = tuple(a for child, a in active.items() if attribute_of(child) == attribute)
                if own and is_shard(parameter):
                    raise _sharded(self.modules[module][0], attribute, parameter)
                if own and parameter is not None:
                    _refuse_resized(weight_name(self.modules[module][0], attribute), parameter, own)
                if parameter is not None:
                    readers = storages.setdefault(storage_of(parameter), {})
                    readers.setdefault(own, []).append((module, attribute))
        return [
            Storage(tuple(owners), own, len(readers) > 1, tuple(self._names(owners)))
            for readers in storages.values()
            for own, owners in readers.items()
            if own
        ]

    @cached_property
    def _by_owner(self) -> dict[nn.Module, dict[str, Adapter]]:
        found: dict[nn.Module, dict[str, Adapter]] = {}
        for place in self.places:
            found.setdefault(place.owner, {})[place.child] = place.adapter
        return found

    def _names(self, owners: Sequence[tuple[nn.Module, str]]) -> list[str]:
        return [weight_name(path, attribute) for owner, attribute in owners for path in self.modules[owner]]


def inventory(model: nn.Module) -> Inventory:
    """The adapters in this model: beside their weights, and put away by a fold.

    Raises:
        LoraFxError: an adapted or folded weight is no parameter any more, so that its branch would be left out.
    """
    modules: dict[nn.Module, tuple[str, ...]] = {}
    for path, module in paths_of(model, leaves=Adapter):
        if not isinstance(module, Adapter):
            modules[module] = (*modules[module], path) if module in modules else (path,)
    places: list[Place] = []
    put_away: list[Place] = []
    records: dict[nn.Module, FoldRecord] = {}
    for module, paths in modules.items():
        record = fold_record(module)
        own = [Place(paths, module, name, child) for name, child in _adapters_of(module)]
        if record is not None:
            records[module] = record
            put_away += [Place(paths, module, child, away.adapter, True) for child, away in record.children.items()]
        if own or record is not None:
            _refuse_displaced(module, paths[0], [place.attribute for place in own], record)
        places += own
    return Inventory(modules, tuple(places), tuple(put_away), records)


def is_folded(model: nn.Module) -> bool:
    """The model carries what `unfold` needs."""
    return any(fold_record(module) is not None for module in modules_of(model))


def _adapters_of(module: nn.Module) -> list[tuple[str, Adapter]]:
    """Beside its weights, by the child's name: a module under two names may have its adapter in both tables."""
    tables: tuple[dict[str, Any], ...] = (module._modules, module.__dict__)
    named = {name: own for table in tables for name, own in table.items() if SEPARATOR in name}
    return [(name, own) for name, own in named.items() if isinstance(own, Adapter)]


def _refuse_displaced(module: nn.Module, path: str, adapted: list[str], record: FoldRecord | None) -> None:
    for attribute in (*adapted, *(record.attributes if record is not None else ())):
        if attribute not in module._parameters:
            raise LoraFxError(
                "since it was adapted the weight has ceased to be a parameter: something computes it now",
                place=weight_name(path, attribute),
                remedy="undo that (torch.nn.utils.parametrize.remove_parametrizations, prune.remove), or do it "
                "after a final fold",
            )


def base_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Every parameter of the model's own under each of its names: without those of adapters."""
    owned = [(path, m) for path, m in model.named_modules(remove_duplicate=False) if not isinstance(m, Adapter)]
    return {weight_name(path, n): p for path, m in owned for n, p in m._parameters.items() if p is not None}


def weight_name(path: str, attribute: str) -> str:
    """``layers.0.proj`` and ``weight`` → ``layers.0.proj.weight``; the model's own path is empty."""
    return f"{path}.{attribute}" if path else attribute


def plain_path(path: str) -> str:
    """A module's path in the model that `torch.compile`, FSDP1 or `checkpoint_wrapper` have wrapped parts of."""
    return ".".join(part for part in path.split(".") if part not in _WRAPPERS)


def _refuse_resized(name: str, parameter: torch.Tensor, adapters: Sequence[Adapter]) -> None:
    for adapter in adapters:
        shape, planned = tuple(parameter.shape), tuple(adapter.layout.shape)
        if shape != planned:
            raise LoraFxError(
                f"its shape is {shape}, and was {planned} when it got its adapter {adapter.name!r}",
                place=name,
                remedy=f"lora_fx.remove(model, {adapter.name!r}), and apply again",
            )


def _sharded(path: str, attribute: str, parameter: torch.Tensor | None) -> LoraFxError:
    return LoraFxError(
        f"the weight is sharded: this process has {0 if parameter is None else parameter.numel()} of its elements",
        place=weight_name(path, attribute),
        remedy="save the adapter, and do this with a model in one process that has loaded it",
    )
