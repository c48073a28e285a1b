"""Insert the branches of a plan:   y = x·Wᵀ   ⇒   y = x·Wᵀ + s·(x·Aᵀ)·Bᵀ,   W frozen.

Requires a plan of this very model. Ensures that every use of every planned weight reads W + s·B·A: `check=True` runs
the adapted model against the dense sum, and where they differ the model is bitwise what it was.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from lora_fx.changes import Undo, changing
from lora_fx.checks.certification import check_adapted
from lora_fx.deltas.adapter import Adapter
from lora_fx.errors import EquivalenceError
from lora_fx.model import wiring
from lora_fx.passes.planning import DISPATCH, GRAPH, Plan, Row


@dataclass(frozen=True)
class Insert:
    """Rewrite `plan.program.model` in place.

    Args:
        plan: what to insert.
        check: compare the adapted model with the dense W + s·B·A on the example inputs, in train and in eval mode.
    """

    plan: Plan
    check: bool = True

    def __call__(self) -> nn.Module:
        model = self.plan.program.model
        new: list[tuple[nn.Module, str]] = []
        with changing(model, "apply") as undo:
            for row in self.plan.rows:
                new += _attach(model, row, self.plan.name)
            _freeze(model)
            _mark(model, self.plan)
            wiring.wire_or_dispatch(model)
            self._check([getattr(owner, child) for owner, child in new], undo)
        return model

    def _check(self, adapters: list[Adapter], undo: list[Undo]) -> None:
        model, capture = self.plan.program.model, self.plan.program.capture
        if not self.check or capture is None:
            return
        rounding = self.plan.program.rounding()
        try:
            check_adapted(model, capture.inputs, adapters, rounding, undo)
        except EquivalenceError:
            if all(adapter.realised != GRAPH for adapter in adapters):
                raise
            for adapter in adapters:  # a rewritten forward is not the path that ran: serve whoever reads the weight
                adapter.realised = DISPATCH
            wiring.wire_or_dispatch(model)
            check_adapted(model, capture.inputs, adapters, rounding, undo)


def _attach(model: nn.Module, row: Row, name: str) -> list[tuple[nn.Module, str]]:
    adapter = make_adapter(row, name)
    done = []
    for n, (path, attribute) in enumerate(row.owners):
        owner = model.get_submodule(path)
        child = wiring.child_name(attribute, name, row.part)
        adapter.train(owner.training)
        wiring.attach(owner, child, adapter, register=n == 0)
        done.append((owner, child))
    return done


def make_adapter(row: Row, name: str) -> Adapter:
    """A fresh adapter for a row of the plan, on the weight's own device."""
    rule, parameter = row.rule, row.weight.parameter
    dtype = parameter.dtype if parameter.dtype.itemsize >= 4 else torch.float32
    adapter = Adapter(
        row.layout,
        rank=row.rank,
        alpha=rule.scale_numerator,
        dropout=rule.dropout,
        scaling=rule.scaling,
        rows=row.rows,
        name=name,
        role=row.role,
        schedule=rule.schedule,
        dtype=dtype,
        device="cpu" if row.stored and parameter.is_meta else parameter.device,
    )
    adapter.realised = row.realised
    adapter.reset(rule.init)
    return adapter


def _freeze(model: nn.Module) -> None:
    """Exactly the active adapters are trainable."""
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for module in model.modules():
        if isinstance(module, Adapter) and module.active:
            module.requires_grad_(True)


def _mark(model: nn.Module, plan: Plan) -> None:
    for row in plan.rows:
        if row.realised == GRAPH:
            for use in row.weight.uses:
                if not row.split or use in row.uses:
                    wiring.mark_reader(model.get_submodule(use.module))
