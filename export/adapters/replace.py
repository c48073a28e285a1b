"""Other numbers for an adapter that is in a model:   θ ← θ of a file,   in the same parameters.

Forwards, classes and compiled programs stay: a rank is filled with zeros up to the room that the adapter has, and alpha
is a number that forwards read. How the file adapts a weight must be how the adapter does already. Where the file has
nothing for one of its weights θ begins anew, so that δ = 0 there: as in PEFT, what acts is what the file says, no more.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lora_fx.deltas.adapter import Adapter
from lora_fx.deltas.dropping import BranchDropout
from lora_fx.export.adapters import dialects
from lora_fx.export.adapters.folder import chosen, read_folder
from lora_fx.export.adapters.peft import ITS_BASE
from lora_fx.export.adapters.values import Saved
from lora_fx.graph.places import is_shard, loaded
from lora_fx.model.classes import unwired
from lora_fx.model.inventory import Place, inventory
from lora_fx.passes.base import UNFOLDED, Facts, Pass, Result
from lora_fx.passes.insert import refuse_infinite
from lora_fx.reading import boundary, refuse

_FREE = ("rank", "alpha", "scaling", "dropout", "schedule")  # settings that may be others; the schedule stays
_INSTEAD = "load it under another name, or lora_fx.remove that one first"


@dataclass(frozen=True)
class Replace(Pass):
    """Write an adapter's files over the numbers of the one that has this name; arguments as in `load_adapter`."""

    path: str | os.PathLike
    adapter: str
    part: str | None = None
    config: Mapping[str, Any] | None = None
    active: bool | None = None

    name = "replace"
    requires = (UNFOLDED,)

    def call(self, model: nn.Module, facts: Facts) -> Result:
        folder = chosen(read_folder(Path(self.path)), self.adapter)
        with unwired(model), boundary("it cannot be put into this model", str(folder.path), ITS_BASE):
            saved = dialects.read(model, folder, self.part, self.config or {})
        mine = [place for place in inventory(model).places if place.adapter.name == self.adapter]
        new = [*_fitted(mine, saved, str(folder.path))]
        for adapter in {place.adapter for place in mine}:
            for name, parameter in adapter.named_parameters():
                if parameter.is_meta or is_shard(parameter):
                    how = "materialise or unshard the model first"
                    refuse(f"{name} of adapter {adapter.name!r}", "it is not here as a whole", how)
                facts.undo.append(partial(parameter.detach().copy_, parameter.detach().clone()))
        for one in new:
            one.write()
        for place in _left_out(mine, new):
            _begin_anew(place)
        for place in mine:
            refuse_infinite(place.adapter, loaded(place.owner, place.attribute), place.weight)
            if self.active is not None:
                place.adapter.act(self.active, place.adapter.strength)
        return Result(model, True)


@dataclass(frozen=True)
class _New:
    """What one adapter gets."""

    adapter: Adapter
    saved: Saved
    theta: Mapping[str, torch.Tensor]

    def write(self) -> None:
        adapter, settings = self.adapter, self.saved.settings
        if "rank" in settings and settings["rank"] != adapter.room:
            adapter.change(_room=adapter.room)
        adapter.adjust(**{key: settings[key] for key in ("rank", "alpha", "scaling") if key in settings})
        adapter.put(self.theta)
        for name in self.theta:  # it may have been cast
            if not bool(adapter.owner(name).get_parameter(name).isfinite().all()):
                refuse(self.saved.place, f"{name} does not fit into {adapter.dtype}", "cast the adapter to float32")
        p = settings.get("dropout", 0.0)
        if adapter.drops:
            adapter.dropout.p = p
        elif p:
            adapter.add_module("dropout", BranchDropout(p).train(adapter.training))


def _fitted(mine: Sequence[Place], saved: Sequence[Saved], folder: str) -> Iterator[_New]:
    """Each adapter with what the file has for it.

    Raises:
        FileError: the file adapts further weights, other parts or owners of them, by another kind or with more ranks.
    """
    by_name = {(name, place.adapter.rows): place.adapter for place in mine for name in place.weights}
    found: dict[Adapter, list[Saved]] = {}
    for s in saved:
        adapters = {by_name.get((name, s.rows)) for name in s.weights}
        if None in adapters or len(adapters) > 1:
            refuse(s.place, f"the adapter {mine[0].adapter.name!r} is not on {', '.join(s.weights)}", _INSTEAD)
        found.setdefault(adapters.pop(), []).append(s)  # type: ignore[arg-type]
    for place in mine:
        there = {name for s in found.get(place.adapter, ()) for name in s.weights}
        if there and not there.intersection(place.weights):
            reason = f"it has nothing for {place.weight}, which is one weight with {', '.join(sorted(there))} here"
            refuse(folder, reason, _INSTEAD)
    for adapter, own in found.items():
        first, *others = own
        if not all(first.equals(s) for s in others):
            refuse(others[0].place, f"it is another one than that of {first.weights[0]}, which is tied", _INSTEAD)
        yield _New(adapter, first, _turned(adapter, first))


def _left_out(mine: Sequence[Place], new: Sequence[_New]) -> list[Place]:
    """One place of each adapter that the file has nothing for."""
    places = {place.adapter: place for place in mine}
    for one in new:
        places.pop(one.adapter)
    return [*places.values()]


def _begin_anew(place: Place) -> None:
    """θ as it starts, δ = 0, with zeros behind its ranks. The random numbers that come next are what they would be."""
    adapter, weight = place.adapter, loaded(place.owner, place.attribute)
    devices = [weight.device] if weight.is_cuda else []
    with torch.no_grad(), torch.random.fork_rng(devices):
        adapter.start(weight)
    shapes = adapter.shapes(adapter.settings.get("rank", 0))
    own = {name: adapter.owner(name).get_parameter(name).detach() for name in shapes}
    adapter.put({name: own[name][tuple(map(slice, shape))].clone() for name, shape in shapes.items()})


def _turned(adapter: Adapter, s: Saved) -> Mapping[str, torch.Tensor]:
    """θ in the adapter's axes."""
    if s.kind is not adapter.kind:
        refuse(s.place, f"it is of the kind {s.kind.name!r}, and the adapter of {adapter.kind.name!r}", _INSTEAD)
    now, theirs = adapter.settings, {"rank": 0, **s.settings}
    for key, value in s.settings.items():
        if key not in _FREE and now.get(key) != value:
            refuse(s.place, f"it has {key}={value!r}, and the adapter {key}={now.get(key)!r}", _INSTEAD)
    rank, room = theirs["rank"], adapter.room if "rank" in now else 0
    if rank > room or (rank != room and not adapter.kind.pads):
        remedy = f"load the first one with max_rank={rank}, or {_INSTEAD}"
        refuse(s.place, f"its rank is {rank}, and the adapter has room for {room}", remedy)
    theta, shapes = s.turned(adapter.layout.sides), adapter.shapes(rank)
    if theta is None or {name: tuple(t.shape) for name, t in theta.items()} != shapes:
        refuse(s.place, f"it reads the weight as {s.layout}, and the adapter as {adapter.layout}", _INSTEAD)
    return theta
