"""Insert the branches of a plan:   y = x·Wᵀ   ⇒   y = x·Wᵀ + s·(x·Aᵀ)·Bᵀ,   W frozen.

Insert  the adapters beside their weights  →  Rewrite  the forwards that read them  →  Check  every use
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from lora_fx.checks.certification import check_adapted
from lora_fx.checks.verification import NotServed
from lora_fx.deltas.adapter import Adapter
from lora_fx.deltas.realisation import Realisation
from lora_fx.errors import EquivalenceError, KindError, PlanError
from lora_fx.graph.places import loaded
from lora_fx.graph.program import Program
from lora_fx.model.behind import stand
from lora_fx.model.classes import is_wired, own_class
from lora_fx.model.inventory import inventory
from lora_fx.model.marks import attach, child_name, mark_reader
from lora_fx.model.training import freeze
from lora_fx.passes.base import Condition, Facts, Pass, Result, given
from lora_fx.passes.blocks import Standing
from lora_fx.passes.planning import Plan, Row
from lora_fx.passes.realising import demote
from lora_fx.passes.wiring import wire
from lora_fx.walking import modules_of


@dataclass(frozen=True)
class Inserted:
    """The adapters that a run has put into the model, each once."""

    adapters: tuple[Adapter, ...]

    def __str__(self) -> str:
        return "\n".join(f"{a.name}: {a.role or '?'}, {a.extra_repr()}" for a in self.adapters)


def _why_other(model: nn.Module, facts: Facts) -> str:
    plan = facts.get(Plan)
    other = plan is not None and plan.program.model is not model
    return "the plan is of another model object, whose parameters it names" if other else ""


OF_THIS_MODEL = Condition("a plan of this model", _why_other, "make the plan of the model that the pass is given")


@dataclass(frozen=True)
class Insert(Pass):
    """Put the adapters of a plan beside their weights; the first ones freeze the model. Nothing reads them yet."""

    name = "insert"
    requires = (given(Program), given(Plan), OF_THIS_MODEL)
    ensures = (given(Inserted),)

    def call(self, model: nn.Module, facts: Facts) -> Result:
        plan = facts[Plan]
        freeze(model)
        owners = _owners(model, plan.name)
        adapters = tuple(_insert(model, row, plan.name, owners) for row in plan.rows)
        for row in plan.rows:
            if row.realised == Realisation.GRAPH:
                for use in row.weight.uses:
                    if not row.split or use in row.uses:
                        mark_reader(model.get_submodule(use.module))
        return Result(model, True, (Inserted(adapters),))


def _why_unwired(model: nn.Module, facts: Facts) -> str:
    acts = any(isinstance(module, Adapter) and module.active for module in modules_of(model))
    return "no module has a class that reads them" if acts and not is_wired(model) else ""


WIRED = Condition("active adapters are read", _why_unwired, "put a Rewrite behind what changes the adapters")


@dataclass(frozen=True)
class Rewrite(Pass):
    """Give every module the class that its active adapters ask for, with branches in its forward or its weights."""

    name = "rewrite"
    ensures = (WIRED,)

    def call(self, model: nn.Module, facts: Facts) -> Result:
        wire(model)
        return Result(model, True)


@dataclass(frozen=True)
class Check(Pass):
    """Hold every use of what was inserted against the use of W + δ, in train and in eval mode.

    A large model, or one that multiplies in a narrower dtype than float32, is recorded, and each use is measured by
    itself in float64; of others, and where a use does not show what a weight does, the whole is held against the model
    with the sums in its weights.

    A rewritten forward that is not the path that ran is given up first: then whoever reads the weight is served. Where
    one of those wants a plain tensor, and no dropout acts on the branch, the weight reads as W + δ. Where the model
    itself does not run in train mode on these inputs, the plan gets a note of it, and eval mode decides.
    """

    name = "check"
    requires = (given(Inserted), given(Program), WIRED)

    def call(self, model: nn.Module, facts: Facts) -> Result:
        adapters, program = facts[Inserted].adapters, facts[Program]
        if program.capture is None:
            return Result(model, False)
        rewired = False
        while True:
            try:
                missing = check_adapted(model, program, adapters, facts.undo)
                break
            except EquivalenceError as error:
                if not _give_way(model, adapters, error):
                    raise
            wire(model)
            rewired = True
        plan = facts.get(Plan)
        noted = () if plan is None or not missing else (replace(plan, notes=(*plan.notes, *map(str, missing))),)
        return Result(model, rewired, noted)


@dataclass(frozen=True)
class Rest(Pass):
    """Whether the adapters that were put in act; all others stay as they are.

    Args:
        active: None for where there are no others.
    """

    active: bool | None = None

    name = "rest"
    requires = (given(Inserted),)

    def call(self, model: nn.Module, facts: Facts) -> Result:
        new = facts[Inserted].adapters
        alone = {*inventory(model).adapters} == {*new}
        if alone if self.active is None else self.active:
            return Result(model, False)
        for adapter in new:
            adapter.act(False)
        wire(model)
        return Result(model, True)


def _give_way(model: nn.Module, adapters: tuple[Adapter, ...], error: EquivalenceError) -> bool:
    """Have less asked of those who read the weights; False where there is nothing less.

    Args:
        error: of the check. Its place is the weight at which that failed: those that modules of its class hold are read
            alike.
    """
    storages = inventory(model).storages()
    kinds = {_held(owner) for s in storages if " = ".join(s.names) == error.place for owner in s.owners}
    alike = [a for s in storages if kinds & set(map(_held, s.owners)) for a in s.adapters if a in adapters]
    traced = [a for a in alike or adapters if a.realised == Realisation.GRAPH]
    plain = isinstance(error, NotServed) and alike and not traced
    if plain and all(a.realised == Realisation.DISPATCH and not a.drops and a.kind.is_delta for a in alike):
        demote(alike, Realisation.DENSE)
        return True
    traced = traced or [a for a in adapters if a.realised == Realisation.GRAPH]
    demote(traced)
    return bool(traced)


def _held(owner: tuple[nn.Module, str]) -> tuple[type[nn.Module], str]:
    module, attribute = owner
    return own_class(module), attribute


_Owners = dict[tuple[Any, ...], Adapter]
"""(kind, tensor, shape) → the adapter whose parameter all others of its name have in common with it: the first one."""


def _owners(model: nn.Module, name: str) -> _Owners:
    """Among the adapters of this name that are there already."""
    found: _Owners = {}
    for adapter in inventory(model).adapters:
        if adapter.name == name:
            for tensor in adapter.kind.shared:
                owner = adapter.owner(tensor)
                found[adapter.kind.name, tensor, *owner.get_parameter(tensor).shape] = owner
    return found


def _share(adapter: Adapter, owners: _Owners, row: Row) -> None:
    """Have in common what there is, and give what there is not yet.

    Raises:
        PlanError: the numbers of a file are others than those of another adapter, or lie on another device.
    """
    for tensor in adapter.kind.shared:
        own = adapter.get_parameter(tensor)
        owner = owners.setdefault((adapter.kind.name, tensor, *own.shape), adapter)
        there = owner.get_parameter(tensor)
        alike = there.device == own.device and there.dtype == own.dtype
        if not alike or (row.stored is not None and not torch.equal(there, own)):
            here = "it has other numbers here" if alike else f"it is {own.dtype} on {own.device} here"
            raise PlanError(
                f"the adapters {adapter.name!r} of the kind {adapter.kind.name!r} have {tensor!r} in common: {here}",
                place=row.name,
                remedy="give these sites an adapter of another name",
            )
        if owner is not adapter:
            adapter.share(tensor, owner)


def _insert(model: nn.Module, row: Row, name: str, owners: _Owners) -> Adapter:
    path, attribute = row.owners[0]
    adapter = make_adapter(row, name, model.get_submodule(path))
    _share(adapter, owners, row)
    for n, (path, attribute) in enumerate(row.owners):
        owner = model.get_submodule(path)
        adapter.train(owner.training)
        attach(owner, child_name(attribute, name, row.part), adapter, register=n == 0)
    if row.standing is not None:
        _stand(model, adapter, row, row.standing)
    return adapter


def _stand(model: nn.Module, adapter: Adapter, row: Row, standing: Standing) -> None:
    if not standing.calls:
        raise PlanError(
            f"the kind {row.kind.name!r} stands behind blocks, and none has run: in whose call they are is not known",
            place=row.name,
            remedy="pass example_inputs",
        )
    blocks = {f"block_{k}": model.get_submodule(path) for k, path in enumerate(standing.blocks)}
    stand(adapter, [model.get_submodule(path) for path in standing.calls], blocks)


def make_adapter(row: Row, name: str, owner: nn.Module) -> Adapter:
    """A fresh adapter for a row of the plan, on the device on which `owner`, which holds the weight, reads it."""
    parameter, stored = loaded(owner, row.owners[0][1]), row.stored
    adapter = Adapter(
        row.layout,
        kind=row.kind,
        rows=row.rows,
        name=name,
        role=row.role,
        dtype=parameter.dtype if parameter.dtype.itemsize >= 4 else torch.float32,
        device="cpu" if stored and parameter.is_meta else parameter.device,
        room=row.room,
        **row.chosen,
    )
    holders = {path for path, _ in row.owners}
    outside = next((use.module or "the model" for use in row.uses if use.module not in holders), "")
    adapter.change(realised=row.realised, read_outside=outside)
    if stored is None:
        try:
            adapter.start(parameter, row.rule.init)
        except KindError as error:
            raise PlanError(error.reason, place=row.name, remedy=error.remedy) from error
        return adapter
    adapter.put(stored)
    refuse_infinite(adapter, parameter, row.name)
    return adapter


@torch.no_grad()
def refuse_infinite(adapter: Adapter, parameter: torch.Tensor, name: str) -> None:
    """Raise where numbers out of a file make no δ of this weight."""
    kind = adapter.kind
    if kind.delta is None or parameter.is_meta:
        return
    if not bool(adapter.delta(parameter).isfinite().all()):
        reason = f"with this θ of the kind {kind.name!r} δ is not finite"
        raise PlanError(reason, place=name, remedy="load the base model it was made for")
