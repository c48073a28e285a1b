"""`with active(model, …)` and `with disabled(model)`: inside exactly these adapters act; then all is as it was."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import lora_fx
from lora_fx import Rule
from lora_fx.checks.verification import compare
from lora_fx.errors import AdapterError, PlanError
from lora_fx.model.inventory import inventory
from lora_fx.testing import Filling
from tests import reference


class Configured(nn.Linear):
    """It reads a dict, so that it dispatches."""

    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)
        self.options = {"gain": 2.0}

    def forward(self, x):
        return nn.functional.linear(x, self.weight, self.bias) * self.options["gain"]


def adapted() -> tuple[nn.Module, torch.Tensor, dict[str, torch.Tensor]]:
    """The outputs with each set of adapters."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(6, 10), nn.Tanh(), Configured(10, 5)), torch.randn(4, 6)
    outputs = {"": model(x).detach()}
    for name in "ab":
        lora_fx.apply(model, Rule(where="*", rank=2), x, name=name)
    Filling(seed=0, size=0.5)(model)
    for name in ("a", "b", "ab"):
        lora_fx.activate(model, *name)
        outputs[name] = model(x).detach()
    return model, x, outputs


def state(model: nn.Module) -> tuple:
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    acting = [(a.name, a.active, a._trained) for a in inventory(model).adapters]
    return flags, acting, reference.classes(model), reference.bits(model)


def same(one: tuple, other: tuple) -> bool:
    return one[:3] == other[:3] and reference.same_bits(one[3], other[3])


def test_inside_these_act_and_then_all_is_as_it_was():
    model, x, outputs = adapted()
    frozen = next(a for a in inventory(model).adapters if a.name == "b")
    frozen.A.requires_grad_(False)
    before = state(model)
    with lora_fx.disabled(model) as inside:
        assert inside is model and torch.equal(model(x), outputs[""])
        assert not any(p.requires_grad for p in model.parameters())
        with lora_fx.active(model, "b"):
            assert torch.equal(model(x), outputs["b"])
            assert not frozen.A.requires_grad and frozen.B.requires_grad
            with lora_fx.active(model, "a", "b"):
                assert torch.equal(model(x), outputs["ab"])
            assert torch.equal(model(x), outputs["b"])
        assert torch.equal(model(x), outputs[""])
    assert same(state(model), before)
    assert torch.equal(model(x), outputs["ab"])


def test_what_was_frozen_or_thawed_inside_is_as_it_was():
    model, x, _ = adapted()
    lora_fx.activate(model, "a")
    before = state(model)
    with lora_fx.active(model, "b"):
        for adapter in inventory(model).adapters:
            adapter.requires_grad_(adapter.name == "b")
        lora_fx.activate(model, "a", "b")
    assert same(state(model), before)
    model(x).sum().backward()
    assert all(p.grad is not None for n, p in model.named_parameters() if "lora_a" in n)


def test_an_error_inside_leaves_it_as_it_was():
    model, _, _ = adapted()
    before = state(model)
    with pytest.raises(ZeroDivisionError), lora_fx.disabled(model):
        raise ZeroDivisionError
    assert same(state(model), before)


def test_what_cannot_be_is_refused_before_anything_changes():
    model, x, outputs = adapted()
    before = state(model)
    with pytest.raises(AdapterError, match="no adapter named 'c'"), lora_fx.active(model, "c"):
        raise AssertionError
    assert same(state(model), before)
    with pytest.raises(PlanError, match="the model is folded"), lora_fx.disabled(model):
        lora_fx.activate(model, "a")
        lora_fx.fold(model)
    lora_fx.unfold(model)
    assert torch.equal(model(x), outputs["a"])


def test_adapters_that_come_and_go_inside():
    model, x, outputs = adapted()
    with lora_fx.disabled(model):
        lora_fx.remove(model, "a")
        lora_fx.apply(model, Rule(where="0", rank=1), x, name="c")
    assert {a.name: a.active for a in inventory(model).adapters} == {"b": True, "c": True}
    assert torch.equal(model(x), outputs["b"])  # c is fresh


def test_the_base_is_the_reference_of_a_preference_loss():
    """Gradients of the policy alone, with the same numbers as from a second model."""
    model, x, outputs = adapted()
    with torch.no_grad(), lora_fx.disabled(model):
        reference_output = model(x)
    assert torch.equal(reference_output, outputs[""])
    (model(x) - reference_output).square().sum().backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    assert grads and all(g is not None and bool(g.any()) for g in grads.values())


def test_blocks_compile_nothing_anew():
    model, x, outputs = adapted()
    compiled = 0

    def backend(graph, _):
        nonlocal compiled
        compiled += 1
        return graph.forward

    torch._dynamo.reset()
    run, made = torch.compile(model, backend=backend), []
    for _ in range(3):
        found = run(x).detach()
        assert compare(found, outputs["ab"], outputs["ab"], 0.0, torch.float32)
        with lora_fx.disabled(model):
            assert torch.equal(run(x), outputs[""])
        made.append(compiled)
    assert made[0] > 0 and made[1:] == made[:1] * 2
