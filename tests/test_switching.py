"""Switching among adapters: what a module was is given again without a trace, and never where a trace would differ."""

from __future__ import annotations

import copy
import gc
import types
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lora_fx
from lora_fx import Rule, register_form
from lora_fx.deltas.realisation import Realisation
from lora_fx.model import classes
from lora_fx.model.inventory import inventory
from lora_fx.passes import keeping, wiring
from tests.test_open_forms import EXAMPLES, INNER


def doubled(x):
    return x * 2.0


def tripled(x):
    return x * 3.0


class Layer(nn.Module):
    """Multiplies with a weight of its own; reads an attribute, a method, a global, a buffer and a child, by the second
    of its names. Another weight is for others."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(3, 4))
        self.register_buffer("t", torch.tensor(2.0))
        self.extra = nn.Parameter(torch.zeros(4, 4))
        self.scale, self.child = 2.0, nn.Linear(3, 4)
        self.again = self.child

    def helped(self, y):
        return doubled(y) * self.scale

    def forward(self, x):
        return self.again(self.helped(F.linear(x, self.weight)) * self.t)


class Other(Layer):
    def helped(self, y):
        return y - self.scale


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Layer(), Layer()])

    def forward(self, x):
        for layer in self.layers:
            x = F.linear(layer(x), layer.extra)
        return x


X = torch.tensor([[1.0, -2.0, 3.0, 1.0], [0.0, 1.0, -1.0, 2.0]], dtype=torch.float64)


def integers(module: nn.Module) -> None:
    """Small ones in all that it multiplies with, so that sums are exact."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randint(-2, 3, parameter.shape, generator=generator))


def adapted(*names: str) -> tuple[nn.Module, nn.Module]:
    """A model with its adapters, and the base model."""
    base, model = Model().double(), Model().double()
    for name in names or ("default",):
        where = "*.extra" if name == "extra" else "*"
        lora_fx.apply(model, Rule(where=where, rank=2, alpha=2), X, name=name)
    for place in inventory(model).places:
        assert place.adapter.realised == (Realisation.DISPATCH if "extra" in place.weight else Realisation.GRAPH)
    integers(model)
    base.load_state_dict({name: p for name, p in model.state_dict().items() if "_lora_" not in name})
    return model, base


def is_right(model: nn.Module, base: nn.Module) -> bool:
    """Bit for bit what the base gives with W + δ in the place of W."""
    acting = inventory(model).by_weight(active=True)
    dense = copy.deepcopy(base)
    with torch.no_grad():
        for name, weight in dense.named_parameters():  # each once
            for a in acting.get(name, ()):
                weight += a.scale * a.B @ a.A
    return torch.equal(model(X), dense(X))


@pytest.fixture
def made(monkeypatch) -> list[Any]:
    """The modules that are traced, and the forwards that are compiled, from now on."""
    seen: list[Any] = []

    def noting(function: Callable[..., Any]) -> Callable[..., Any]:
        def noted(first: Any, *rest: Any, **options: Any) -> Any:
            seen.append(first)
            return function(first, *rest, **options)

        return noted

    monkeypatch.setattr(wiring, "trace_forward", noting(wiring.trace_forward))
    monkeypatch.setattr(classes, "_forward", noting(classes._forward))
    return seen


def test_what_acted_before_acts_again_without_a_trace(made):
    model, base = adapted("a", "b", "extra")
    sets: list[tuple[str, ...]] = [("a", "b"), (), ("a",), ("a", "extra"), ("b",)]
    first = {}
    for names in sets:
        lora_fx.activate(model, *names)
        first[names] = [type(module) for module in model.modules()]
    before = len(made)
    for names in (*sets, *sets[::-1]):
        lora_fx.activate(model, *names)
        assert [type(module) for module in model.modules()] == first[names]
        assert is_right(model, base)
    lora_fx.activate(model, "a", "b")
    lora_fx.unfold(lora_fx.fold(model))
    assert before and len(made) == before and is_right(model, base)


def change_attribute(model):
    model.layers[0].scale = 3.0


def change_child(model):
    """Under both of its names, for one that nothing has adapted."""
    model.layers[0].child = model.layers[0].again = nn.Linear(3, 4).double()
    integers(model.layers[0].child)


def change_another_name(model):
    """The forward reads the child by the name that stays."""
    model.layers[0].child = nn.Linear(3, 4).double()


def change_class_of_one(model):
    model.layers[0].__class__ = Other


def change_forward_of_one(model):
    layer = model.layers[0]
    layer.forward = types.MethodType(lambda self, x: self.child(F.linear(x, self.weight)), layer)


def change_method(model):
    Layer.helped = lambda self, y: tripled(y) * self.scale


def change_code(model):
    Layer.helped.__code__ = (lambda self, y: y + self.scale).__code__


def change_global(model):
    globals()["doubled"] = tripled


def change_buffer(model):
    model.layers[0].t = torch.tensor(-1.0).double()


def change_scale_of_adapters(model):
    for place in inventory(model).places:
        place.adapter.scale = 3.0


CHANGES = (
    change_attribute, change_child, change_another_name, change_class_of_one, change_forward_of_one, change_method,
    change_code, change_global, change_buffer, change_scale_of_adapters,
)  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_what_has_changed_since_is_seen(made, monkeypatch, change):
    monkeypatch.setitem(globals(), "doubled", doubled)
    monkeypatch.setattr(Layer, "helped", types.FunctionType(Layer.helped.__code__, globals()))
    model, base = adapted()
    lora_fx.activate(model)
    before = len(made)
    change(model)
    change(base)
    lora_fx.activate(model, "default")
    assert is_right(model, base)
    assert (len(made) > before) == (change not in (change_buffer, change_scale_of_adapters))
    lora_fx.activate(model)
    lora_fx.activate(model, "default")
    assert is_right(model, base)


def test_a_row_of_the_table_of_forms_counts(made):
    model, base = adapted()
    lora_fx.activate(model)
    before = len(made)
    with register_form(INNER, **EXAMPLES):
        lora_fx.activate(model, "default")
        assert len(made) > before and is_right(model, base)


@pytest.mark.parametrize("whose", ["weights", "factors"])
def test_another_dtype_counts(whose, made):
    """Some forms' graphs cast the factors."""
    model, base = adapted()
    lora_fx.activate(model)
    before = len(made)
    for place in inventory(model).places:
        if whose == "factors":
            place.adapter.float()
        else:
            place.owner.weight = nn.Parameter(place.owner.weight.float())
    lora_fx.activate(model, "default")
    assert len(made) > before
    assert whose == "weights" or is_right(model, base)


def test_few_are_kept_and_none_of_what_is_gone():
    names = ("a", "b", "c", "d")
    model, _ = adapted(*names)
    for k in range(2 ** len(names)):
        lora_fx.activate(model, *(name for n, name in enumerate(names) if k >> n & 1))
    modules = [module for module in model.modules() if module in keeping._kept]
    assert len(modules) == 4 and all(len(keeping._kept[module]) == keeping._MOST for module in modules)
    old = weakref.ref(type(modules[0]))
    assert classes.is_generated(old())
    lora_fx.remove(model, "a", "b")
    assert all(len(keeping._kept.get(module, ())) == 1 for module in modules)
    lora_fx.fold(model, final=True)
    assert not any(module in keeping._kept for module in modules)
    gc.collect()
    assert old() is None
    lora_fx.apply(model, Rule(where="*", rank=2), X)
    assert all(module in keeping._kept for module in modules)
    gone = weakref.ref(model), weakref.ref(modules[0])
    del model, modules
    gc.collect()
    assert [one() for one in gone] == [None, None]


def test_a_copy_has_nothing_of_it(made):
    model, base = adapted()
    lora_fx.deactivate(model)
    copied, before = copy.deepcopy(model), len(made)
    lora_fx.activate(copied, "default")
    assert len(made) > before and is_right(copied, base)


def test_compiled_once_for_each_set_however_often_they_are_switched():
    model, base = adapted()
    graphs: list[torch.fx.GraphModule] = []

    def counting(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    run = torch.compile(model, backend=counting)
    counts = []
    for _ in range(3):
        for names in ((), ("default",)):
            lora_fx.activate(model, *names)
            assert torch.equal(run(X), model(X)) and is_right(model, base)
            counts.append(len(graphs))
    assert counts[1] > counts[0] > 0 and counts[1:] == [counts[1]] * 5
