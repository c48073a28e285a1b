"""What trains: counted once each, and in LoRA+'s groups."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import lora_fx
from lora_fx import LoraFxError, Rule


class Model(nn.Module):
    """A tied head, a norm, and a layer to leave alone."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.norm, self.up = nn.Embedding(11, 6), nn.LayerNorm(6), nn.Linear(6, 6)
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.up(self.norm(self.embedding(ids))))


IDS = torch.arange(5)[None]
BASE = 11 * 6 + 2 * 6 + 6 * 6 + 6


def adapted(*rules: Rule) -> Model:
    torch.manual_seed(0)
    return lora_fx.apply(Model(), rules or [Rule(where="up", rank=2)], IDS)


def test_a_summary_counts_each_parameter_once():
    found = lora_fx.summary(Model())
    assert (found.trainable, found.total, found.adapters) == (BASE, BASE, {})
    model = adapted()
    lora_fx.apply(model, Rule(where="embedding", rank=1), IDS)
    lora_fx.apply(model, Rule(where="up", rank=1), IDS, name="task")
    own = 2 * 12 + 17 + 12
    found = lora_fx.summary(model)
    assert (found.trainable, found.total, found.adapters) == (own, BASE + own, {"default": 2, "task": 1})
    share = f"{own / (BASE + own):.4%}"
    names = "default on 2 weights, task on 1 weight"
    assert str(found) == f"{own} of {BASE + own} parameters train, {share}; adapters: {names}"
    lora_fx.activate(model, "task")
    assert lora_fx.summary(model).trainable == 12 and lora_fx.summary(model).to_json()["trainable"] == 12


def test_b_alone_goes_faster():
    model = adapted(Rule(where="up", kind="dora", rank=2))
    model.norm.weight.requires_grad_(True)
    slow, fast = lora_fx.parameter_groups(model, 0.25, 8)
    names = {id(p): name.rpartition(".")[2] for name, p in model.named_parameters()}
    assert [names[id(p)] for p in fast["params"]] == ["B"] and fast["lr"] == 2.0
    assert sorted(names[id(p)] for p in slow["params"]) == ["A", "magnitude", "weight"] and slow["lr"] == 0.25
    optimizer = torch.optim.SGD([slow, fast])
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    model(IDS).sum().backward()
    optimizer.step()
    (b,) = fast["params"]
    assert torch.equal(b.detach(), before["up.weight_lora_default.B"] - 2.0 * b.grad)


def test_what_does_not_train_is_in_no_group():
    model = adapted()
    model.up.weight_lora_default.A.requires_grad_(False)
    (fast,) = lora_fx.parameter_groups(model, 0.25)
    assert fast["lr"] == 4.0 and len(fast["params"]) == 1


@pytest.mark.parametrize("given", [{"lr": 0}, {"lr": True}, {"lr": 0.25, "ratio": float("inf")}, {"lr": "0.25"}])
def test_rates_that_are_none_are_refused(given):
    with pytest.raises(LoraFxError, match="give a number above 0"):
        lora_fx.parameter_groups(adapted(), **given)


def test_nothing_that_trains_is_refused():
    model = adapted()
    lora_fx.deactivate(model)
    with pytest.raises(LoraFxError, match="no parameter has requires_grad"):
        lora_fx.parameter_groups(model, 0.25)
