"""A weight that reads as an adapted one: how a call is computed is decided once, and is right after every change."""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

import lora_fx
from lora_fx import Rule
from lora_fx.deltas import adapted_weight, schedules
from tests import reference

IN, OUT, RANK = 6, 4, 2


def in_parts(m: Any, x: torch.Tensor) -> torch.Tensor:
    first, second = m.weight.split([1, OUT - 1])
    return torch.cat([F.linear(x, first, m.bias[:1]), F.linear(x, weight=second, bias=m.bias[1:])], -1)


#: way → (what it computes, sides of the weight)
WAYS: dict[str, tuple[Callable[[Any, torch.Tensor], torch.Tensor], str]] = {
    "linear": (lambda m, x: F.linear(x, m.weight, m.bias), "oi"),
    "by name": (lambda m, x: F.linear(x, bias=m.bias, weight=m.weight), "oi"),
    "no bias": (lambda m, x: F.linear(x, m.weight), "oi"),
    "a bias, and none": (lambda m, x: F.linear(x, m.weight, None) + F.linear(x, m.weight, m.bias), "oi"),
    "transposed": (lambda m, x: x @ m.weight.t(), "oi"),
    "matmul": (lambda m, x: torch.matmul(x, m.weight), "io"),
    "on either side": (lambda m, x: torch.matmul(m.weight, x.mT).mT + torch.matmul(x, m.weight.mT), "oi"),
    "addmm": (lambda m, x: torch.addmm(m.bias, x[0], m.weight), "io"),
    "addmm with alpha": (lambda m, x: torch.addmm(m.bias, x[0], m.weight, alpha=2), "io"),
    "experts": (lambda m, x: torch.bmm(x, m.weight), "bio"),
    "in parts": (in_parts, "oi"),
}
SHAPES = {"oi": (OUT, IN), "io": (IN, OUT), "bio": (3, IN, OUT)}


class Uses(nn.Module):
    """One weight, multiplied with in one of these ways: code that keeps its ways in a table is not shown as a graph."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(SHAPES[WAYS[way][1]])), nn.Parameter(torch.randn(OUT))
        self.way = way

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return WAYS[self.way][0](self, x)


X = torch.randn(3, 5, IN, generator=torch.Generator().manual_seed(0))


def adapted(way: str = "linear", *names: str, **settings: Any) -> nn.Module:
    torch.manual_seed(0)
    model = Uses(way)
    for name in names or ("one",):
        rule = Rule(where="*", form="matmul | linear | addmm", rank=RANK, alpha=3, **settings)
        lora_fx.apply(model, rule, X, check=False, name=name)
    lora_fx.activate(model, *(names or ("one",)))
    assert all(adapter.realised == "dispatch" for adapter in reference.distinct_adapters(model))
    reference.fill(model)
    return model


def dense(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """The same way with W + Σ s·B·A, in float64."""
    weight = reference.dense_weights(model).get("weight", model._parameters["weight"].double())
    return WAYS[model.way][0](SimpleNamespace(weight=weight, bias=model.bias.double()), x.double())


def assert_dense(model: nn.Module, found: torch.Tensor, x: torch.Tensor = X) -> None:
    """A sum of n products is off by at most n·eps of its magnitudes, and so is each number that was cast."""
    with torch.no_grad():
        sizes = copy.deepcopy(model)
        for p in sizes.parameters():
            p.abs_()
        bound = 4 * (IN + RANK + 4) * torch.finfo(found.dtype).eps * dense(sizes, x.abs())
        assert bool(((found - dense(model, x)).abs() <= bound).all())


@pytest.fixture
def decisions(monkeypatch) -> list[Any]:
    """The calls that were taken apart: each is a decision."""
    made: list[Any] = []
    honest = adapted_weight.find
    monkeypatch.setattr(adapted_weight, "_readings", {})
    monkeypatch.setattr(adapted_weight, "find", lambda func, *rest: made.append(func) or honest(func, *rest))
    return made


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("names", [("one",), ("one", "two")], ids=len)
def test_a_use_is_decided_once(way, names, decisions):
    model = adapted(way, *names)
    assert_dense(model, model(X))
    decisions.clear()
    for x in (X, X.transpose(0, 1).contiguous().transpose(0, 1), X[:, :2], X.clone().requires_grad_()):
        assert_dense(model, model(x), x)
    again = {"on either side": 4, "addmm with alpha": 4}  # what has no schedule is taken apart in each call
    assert len(decisions) == again.get(way, 0)


def whole_numbers(model: nn.Module) -> nn.Module:
    """In which every sum here is exact, in whichever order."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randint(-4, 5, p.shape, generator=generator))
    return model


def test_gradients_are_those_of_the_dense_weight():
    model = whole_numbers(adapted())
    x = X.round().requires_grad_()
    adapter = model.weight_lora_one
    inputs = [x, adapter.A, adapter.B]
    weight = model._parameters["weight"] + adapter.scale * adapter.B @ adapter.A
    expected = torch.autograd.grad(F.linear(x, weight, model.bias).square().sum(), inputs)
    assert all(map(torch.equal, torch.autograd.grad(model(x).square().sum(), inputs), expected))


CHANGES: dict[str, Callable[[nn.Module], Any]] = {
    "another parameter": lambda m: setattr(m, "weight", nn.Parameter(torch.randn(OUT, IN))),
    "a plain tensor in its place": lambda m: m._parameters.update(weight=torch.randn(OUT, IN)),
    "other numbers": lambda m: m._parameters["weight"].data.normal_(),
    "assigned": lambda m: m.load_state_dict({k: v.clone() * 2 for k, v in m.state_dict().items()}, assign=True),
    "another θ": lambda m: setattr(m.weight_lora_one, "A", nn.Parameter(torch.randn(RANK, IN))),
    "bfloat16": lambda m: m.bfloat16(),
    "the weight alone in bfloat16": lambda m: setattr(m._parameters["weight"], "data", m.weight.base.bfloat16()),
    "float64": lambda m: m.double(),
    "another scale": lambda m: setattr(m.weight_lora_one, "scale", 0.7),
    "no adapter": lambda m: lora_fx.deactivate(m),
    "removed": lambda m: lora_fx.remove(m, "one"),
    "a second one": lambda m: lora_fx.activate(second(m), "one", "two"),
    "only the second": lambda m: lora_fx.activate(second(m), "two"),
    "folded": lambda m: lora_fx.fold(m),
    "folded and unfolded": lambda m: lora_fx.unfold(lora_fx.fold(m)),
    "train mode": lambda m: m.train(),
}


def second(model: nn.Module) -> nn.Module:
    lora_fx.apply(model, Rule(where="*", rank=1), X, check=False, name="two")
    with torch.no_grad():
        model.weight_lora_two.B.normal_()
    return model


@pytest.mark.parametrize("change", CHANGES)
def test_every_change_acts_on_the_next_call(change):
    model = adapted()
    model(X)
    CHANGES[change](model)
    dtype = model._parameters["weight"].dtype
    model.bias.data = model.bias.data.to(dtype)
    x = X.to(dtype)
    assert_dense(model, model(x), x)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"])
def test_a_copy_shares_nothing(copied):
    model = adapted()
    before = model(X)
    other = copied(model)
    assert vars(other).keys() == vars(model).keys() and torch.equal(other(X), before)
    with torch.no_grad():
        other._parameters["weight"].zero_()
        other.weight_lora_one.B.zero_()
    assert torch.equal(other(X), other.bias.expand(3, 5, OUT)) and torch.equal(model(X), before)


def test_parameters_that_are_given_to_a_call_are_taken():
    model = adapted()
    before = model(X)
    given = {name: torch.randn_like(p) for name, p in model.named_parameters()}
    other = copy.deepcopy(model)
    other.load_state_dict(given)
    assert torch.equal(functional_call(model, given, (X,)), other(X)) and torch.equal(model(X), before)
    A = given["weight_lora_one.A"]
    mapped = torch.vmap(lambda a: functional_call(model, {**given, "weight_lora_one.A": a}, (X,)))(A[None])
    assert_dense(other, mapped[0])


def test_dropout_acts_in_train_mode_alone_and_its_probability_is_read():
    model, x = whole_numbers(adapted(dropout=0.5)), X.round()
    plain, adapter = F.linear(x, model._parameters["weight"], model.bias), model.weight_lora_one
    for train, p in ((False, 0.5), (True, 0.5), (True, 0.0), (True, 0.75)):
        model.train(train)
        adapter.dropout.p = p
        torch.manual_seed(0)
        found = model(x)
        torch.manual_seed(0)
        own = adapter.dropout(x) @ adapter.A.T * adapter.scale @ adapter.B.T
        assert torch.equal(found, plain + own)


def test_autocast_is_on_and_off_again():
    model = adapted()
    full = model(X)
    with torch.autocast("cpu", torch.bfloat16):
        half = model(X)
    assert half.dtype == torch.bfloat16 and torch.equal(model(X), full)
    assert_dense(model, half)


def test_a_thread_gets_its_own_numbers():
    models = [adapted(), adapted()]
    with torch.no_grad():
        models[1].weight_lora_one.B.mul_(-1)
        expected = [m(X) for m in models]
    wrong: list[int] = []

    def run(k: int) -> None:
        with torch.no_grad():
            wrong.extend(k for _ in range(200) if not torch.equal(models[k](X), expected[k]))

    threads = [threading.Thread(target=run, args=(k % 2,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    assert not wrong


class Odd(torch.Tensor):
    pass


def test_an_odd_call_before_the_first_plain_one_decides_nothing_for_it(decisions):
    model = adapted()
    assert_dense(model, model(X.as_subclass(Odd)))
    assert_dense(model, model(X))
    decisions.clear()
    model(X)
    assert not decisions


def test_a_row_of_the_table_that_changes_decides_anew(monkeypatch):
    model = adapted()
    model(X)
    monkeypatch.delitem(adapted_weight.FORMS, "linear")
    taken = []
    honest = adapted_weight.AdaptedWeight.dense
    monkeypatch.setattr(adapted_weight.AdaptedWeight, "dense", lambda own: taken.append(own) or honest(own))
    assert_dense(model, model(X))
    assert taken, "an op that is no form takes the weight whole"


def test_compiled_without_a_break():
    model = adapted()
    torch._dynamo.reset()
    expected = model(X)
    run = torch.compile(model, backend="eager", fullgraph=True)
    assert_dense(model, run(X))
    model.weight = nn.Parameter(torch.randn(OUT, IN))
    assert_dense(model, run(X))
    assert not torch.equal(run(X), expected)


@pytest.mark.parametrize("train", [True, False])
def test_torchs_attention_is_read_at_once(train, decisions, monkeypatch):
    """It reads its weights many times in a call, and multiplies with each once."""
    x = torch.randn(2, 5, 8)
    model = nn.MultiheadAttention(8, 2).train(train)
    model = lora_fx.apply(model, Rule(where="*", rank=2), (x, x, x))  # with its check against the dense sum
    placed: list[int] = []
    honest = schedules.matmul
    monkeypatch.setattr(schedules, "matmul", lambda *args: placed.append(1) or honest(*args))
    model(x, x, x)
    decisions.clear()
    placed.clear()
    model(x, x, x)
    assert len(placed) == 2 and not decisions


class Metered(nn.Linear):
    calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        type(self).calls += 1
        self.__class__.last = self.calls
        return super().forward(x) / self.calls

    def forget(self) -> None:
        del type(self).last


def test_what_code_sets_on_type_self_lands_on_the_models_own_class() -> None:
    Metered.calls = 0
    model = lora_fx.apply(Metered(IN, OUT), Rule(where="*", rank=2), X)
    assert type(model) is not Metered and Metered.calls == 0, "the checks leave it as it was"
    model(X), model(X)
    assert Metered.calls == Metered.last == model.calls == 2 and "calls" not in vars(type(model))  # type: ignore[attr-defined]
    model.forget()
    assert not hasattr(Metered, "last")
    type(model).__doc__ = "its own"
    assert Metered.__doc__ != "its own"
    lora_fx.remove(model, "default")
    model(X)
    assert type(model) is Metered and Metered.calls == 3


class Wrapping(nn.Module):
    """Its subclasses have a forward inside of another, as layers of transformers have one inside of a checkpoint."""

    def __init_subclass__(cls, **words: Any) -> None:
        super().__init_subclass__(**words)
        forward = cls.forward

        def outer(self: nn.Module, x: torch.Tensor) -> torch.Tensor:
            return 2 * forward(self, x) if type(self).forward is outer else forward(self, x)

        cls.forward = outer


class Wrapped(Wrapping):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(OUT, IN))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight)


def test_what_init_subclass_sets_of_a_class_of_ours_is_set_of_that_class() -> None:
    theirs, x = Wrapped.forward, X.double()
    model = lora_fx.apply(Wrapped().double(), Rule(where="*", rank=2), x)
    reference.fill(model)
    assert Wrapped.forward is theirs and type(model).forward is not theirs
    weight = model._parameters["weight"]
    expected = 2 * F.linear(x, weight + model.weight_lora_default.delta(weight))
    assert (model(x) - expected).norm() <= 16 * torch.finfo(torch.float64).eps * expected.norm()
    lora_fx.remove(model, "default")
    assert type(model) is Wrapped and Wrapped.forward is theirs
