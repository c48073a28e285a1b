"""Weights that the forward itself writes to: W + δ would be another function than W with a branch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import lora_fx
from lora_fx import Rule
from lora_fx.errors import PlanError

IDS = torch.arange(8).reshape(2, 4)


class Model(nn.Module):
    """`first` is called at the head of each forward."""

    def __init__(self, first: Callable[[Any], Any] = lambda model: None, max_norm: float | None = None) -> None:
        super().__init__()
        self.first = first
        self.table = nn.Embedding(8, 6, max_norm=max_norm)
        self.up, self.down = nn.Linear(6, 10), nn.Linear(10, 4)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        self.first(self)
        return self.down(torch.relu(self.up(self.table(ids))))


def _multiplied(m: Any) -> None:
    with torch.no_grad():
        m.up.weight.mul_(0.9)


def _multiplied_unseen(m: Any) -> None:
    m.up.weight.data[2:4].mul_(0.9)


def _clamped(m: Any) -> None:
    with torch.no_grad():
        torch._foreach_clamp_max_([m.down.bias, m.up.weight], 0.2)


@pytest.mark.parametrize("write", [_multiplied, _multiplied_unseen, _clamped])
def test_a_weight_that_the_forward_writes_to_is_refused(write):
    model = Model(write)
    with pytest.raises(PlanError, match=r"written to by the model itself while it runs \(by aten\.") as caught:
        lora_fx.apply(model, Rule(where="up.weight", rank=2), IDS)
    assert caught.value.place == "up.weight" and "leave it out" in caught.value.remedy
    plan = lora_fx.plan(model, Rule(where="*.weight", rank=2, otherwise="skip"), IDS)
    assert {row.name for row in plan.rows} == {"table.weight", "down.weight"}


@pytest.mark.parametrize("inputs", [IDS, None])
def test_a_table_with_max_norm_is_refused(inputs):
    with pytest.raises(PlanError, match="scales its rows down to max_norm"):
        lora_fx.apply(Model(max_norm=0.5), Rule(where="table.weight", rank=2), inputs)
