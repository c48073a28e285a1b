"""Which forwards become graphs, and why the others do not: each clause of `passes.purity`, and what it is for.

All numbers are small integers, so that sums of products are exact in float64 and outputs can be held bit for bit
against a twin with W + δ in the place of W, before and after whatever the forward's own code notices.
"""

from __future__ import annotations

import copy
import functools
import math
import os
import random
import types
from collections import Counter, deque
from typing import ClassVar

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

import lora_fx
from lora_fx import Rule
from lora_fx.model.inventory import inventory
from tests import reference

SCALES, SCALE, NAMES = [2.0], 2.0, types.SimpleNamespace(scale=2.0)


class Base(nn.Module):
    """y = x·Wᵀ, and more in its children; with state to play with."""

    level = 2.0

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(3, 4))
        self.register_buffer("t", torch.tensor(2.0))
        self.plain, self.scale, self.flag, self.shape = torch.tensor(2.0), 2.0, True, (2, 3)
        self.table, self.settings, self.many = {"scale": 2.0}, types.SimpleNamespace(scale=2.0), [2.0]
        self.child, self.act, self.nothing, self.seen = nn.Linear(3, 3), torch.relu, None, []
        self.register_parameter("bias", None)

    def product(self, x):
        return F.linear(x, self.weight)

    def helped(self, x):
        return self.product(x) * self.scale

    @property
    def twice(self):
        return 2 * self.scale

    @classmethod
    def of_class(cls):
        return cls.level


def counted(x, counter=SCALES):
    return x * counter[0]


def doubled(x):
    return x * 2


def scaled(x):
    return x * SCALE


doubled_by = functools.partial(torch.mul, 2)


def of_a_closure(scale):
    return lambda self, x: self.product(x) * scale


def with_default(self, x, scales=SCALES):
    return self.product(x) * scales[0]


class Forward:
    """A case: a forward, what its code notices, and why it is no graph; empty where it is one."""

    def __init__(self, forward, why="", change=lambda m: None):
        self.forward, self.why, self.change = forward, why, change

    def make(self):
        own = self.forward
        return own() if isinstance(own, type) else type("Model", (Base,), {"forward": own})()


def in_place(self, x):
    y = torch.zeros(2, 3, dtype=x.dtype)
    y[x[:, 0] > 0] = self.product(x)[x[:, 0] > 0]
    return y


def augmented(self, x):
    x += 1
    return self.product(x)


def checks_none(self, x):
    return self.product(x) if self.nothing is None else x


def with_block(self, x):
    with torch.no_grad():
        scale = self.t * 2
    return self.product(x) * scale


def tries(self, x):
    try:
        return self.product(x) * self.scale
    except ValueError:
        return x


def imports(self, x):
    import math as m

    return self.product(x) * m.floor(2.5)


def sets_global(self, x):
    global SCALE
    SCALE = 2.0
    return self.product(x)


def sets_attribute(self, x):
    self.last = self.product(x)
    return self.last


def appends(self, x):
    y = self.product(x)
    self.seen.append(1)
    return y


def inner_function(self, x):
    y = self.product(x)
    return (lambda scale: y * scale)(self.t)


def counting():
    calls = 0

    def forward(self, x):
        nonlocal calls
        calls = 2
        return self.product(x) * calls

    return forward


class Level(Base):
    def forward(self, x):
        return self.product(x) * super().level


class Above(Base):
    def forward(self, x):
        return super().helped(x)


def globals_of_a_function(self, x):
    function = doubled
    return self.product(x) * function.__globals__["SCALE"]


def draws_for_nothing(self, x):
    torch.rand(3)
    return self.product(x)


def changes_unused(self, x):
    y = self.product(x)
    F.relu(y, inplace=True)
    return y


def set_(name, value):
    return lambda m: setattr(m, name, value)


CASES = {
    # graphs
    "a product": Forward(lambda self, x: self.product(x)),
    "arithmetic on buffers alone": Forward(lambda self, x: self.product(x) * self.t.exp(), "", lambda m: m.t.fill_(1)),
    "a buffer that is replaced": Forward(lambda self, x: self.product(x) * self.t.exp(), "", set_("t", torch.ones(()))),
    "a tensor that is no buffer": Forward(
        lambda self, x: self.product(x) * (self.plain + 1), "", set_("plain", torch.ones(()))
    ),
    "a factory": Forward(
        lambda self, x: self.product(x) + torch.arange(3, dtype=x.dtype) * torch.ones(3, dtype=x.dtype)
    ),
    "a random draw": Forward(lambda self, x: self.product(x) + torch.randint(5, (3,))),
    "a random draw for nothing": Forward(draws_for_nothing),
    "a change in place, for nothing": Forward(changes_unused),
    "a method of the class above": Forward(Above, "", set_("scale", 3.0)),
    "a literal tensor": Forward(lambda self, x: self.product(x) + torch.tensor([1.0, 2.0, 3.0], dtype=x.dtype)),
    "a number of its own": Forward(lambda self, x: self.product(x) * self.scale, "", set_("scale", 3.0)),
    "a branch by a flag of its own": Forward(
        lambda self, x: self.product(x) * 2 if self.flag else x, "", set_("flag", False)
    ),
    "a tuple of its own": Forward(lambda self, x: self.product(x).reshape(self.shape) * 2, "", set_("shape", (3, 2))),
    "a number that is deleted": Forward(
        lambda self, x: self.product(x) * self.scale,
        "",
        lambda m: (delattr(m, "scale"), setattr(type(m), "scale", 5.0)),
    ),
    "a method": Forward(lambda self, x: self.helped(x), "", lambda m: setattr(m, "helped", lambda x: m.product(x) * 7)),
    "a function of its own": Forward(lambda self, x: self.act(self.product(x)), "", set_("act", torch.neg)),
    "a function of the module": Forward(lambda self, x: doubled(self.product(x))),
    "math": Forward(lambda self, x: self.product(x) * math.floor(2.5) + math.pi),
    "a list that it makes": Forward(lambda self, x: sum([self.product(x) for _ in range(2)])),
    "a function that it makes": Forward(inner_function),
    "a child": Forward(lambda self, x: self.child(self.product(x)), "", set_("child", nn.Identity())),
    "a parameter that was None": Forward(
        lambda self, x: F.linear(x, self.weight, self.bias),
        "",
        set_("bias", nn.Parameter(torch.ones(3, dtype=torch.float64))),
    ),
    "the forward is replaced": Forward(
        lambda self, x: self.product(x), "", lambda m: setattr(m, "forward", lambda x: 3 * m.product(x))
    ),
    # containers, configs, globals, other libraries
    "a dict": Forward(
        lambda self, x: self.product(x) * self.table["scale"],
        "reads table of Model, a dict",
        lambda m: m.table.update(scale=3.0),
    ),
    "a namespace": Forward(
        lambda self, x: self.product(x) * self.settings.scale,
        "reads settings of Model, a SimpleNamespace",
        lambda m: setattr(m.settings, "scale", 3.0),
    ),
    "a list": Forward(
        lambda self, x: self.product(x) * self.many[0], "reads many of Model, a list", lambda m: m.many.insert(0, 3.0)
    ),
    "an attribute of the class": Forward(
        lambda self, x: self.product(x) * self.level,
        "reads level of Model, a float",
        lambda m: setattr(type(m), "level", 3.0),
    ),
    "a classmethod": Forward(
        lambda self, x: self.product(x) * self.of_class(),
        "reads of_class of Model, a classmethod",
        lambda m: setattr(type(m), "level", 3.0),
    ),
    "a property": Forward(
        lambda self, x: self.product(x) * self.twice, "reads twice of Model, a property", set_("scale", 3.0)
    ),
    "an attribute of a child": Forward(
        lambda self, x: self.product(x) * self.child.in_features,
        "reads in_features of Linear, a int",
        lambda m: setattr(m.child, "in_features", 5),
    ),
    "an attribute of a class": Forward(lambda self, x: self.product(x) * Base.level, "uses Base.level"),
    "a global list": Forward(lambda self, x: self.product(x) * SCALES[0], "uses SCALES"),
    "a global number": Forward(lambda self, x: self.product(x) * SCALE, "uses SCALE"),
    "a global number in a function": Forward(lambda self, x: scaled(self.product(x)), "scaled uses SCALE"),
    "a global object": Forward(lambda self, x: self.product(x) * NAMES.scale, "uses NAMES.scale"),
    "a function with a mutable default": Forward(lambda self, x: counted(self.product(x)), "uses counted"),
    "a mutable default of its own": Forward(with_default, "has a default that can change"),
    "a partial": Forward(lambda self, x: doubled_by(self.product(x)), "uses doubled_by"),
    "a closure": Forward(of_a_closure(2.0), "uses scale"),
    "a closure that is set": Forward(counting(), "sets calls of the function around it"),
    "an attribute of the class above": Forward(Level, "reads level of its class"),
    "the standard library": Forward(
        lambda self, x: self.product(x) * float(os.getenv("SCALE")),
        "it calls getenv",
        lambda m: os.environ.update(SCALE="3"),
    ),
    "the environment": Forward(
        lambda self, x: self.product(x) * float(os.environ["SCALE"]),
        "uses os.environ",
        lambda m: os.environ.update(SCALE="3"),
    ),
    "Python's random": Forward(lambda self, x: self.product(x) * random.random(), "uses random.random"),
    "numpy's random": Forward(lambda self, x: self.product(x) * np.random.rand(), "uses np.random.rand"),
    "its dict": Forward(lambda self, x: self.product(x) * self.__dict__["scale"], "reads __dict__", set_("scale", 3.0)),
    "the globals of a function": Forward(globals_of_a_function, "reads __globals__"),
    "vars": Forward(lambda self, x: self.product(x) * vars(self)["scale"], "uses vars", set_("scale", 3.0)),
    # decisions
    "train mode": Forward(
        lambda self, x: self.product(x) * (2 if self.training else 1), "tests training", nn.Module.eval
    ),
    "None": Forward(checks_none, "tests for None", set_("nothing", 1)),
    "a type": Forward(
        lambda self, x: self.product(x) * (2 if isinstance(self.act, nn.Module) else 1),
        "uses isinstance",
        set_("act", 1),
    ),
    "gradient mode": Forward(
        lambda self, x: self.product(x) * (2 if torch.is_grad_enabled() else 1), "uses torch.is_grad_enabled"
    ),
    "a value": Forward(
        lambda self, x: self.product(x) if x.sum() > 0 else x[:, :3],
        "symbolically traced variables cannot be used as inputs to control flow",
    ),
    # effects
    "an attribute is set": Forward(sets_attribute, "sets an attribute"),
    "a list grows": Forward(appends, "reads seen of Model, a list"),
    "a global is set": Forward(sets_global, "sets a global"),
    "elements are set": Forward(in_place, "does not support item assignment"),
    "its input is changed": Forward(augmented, "changes a value in place, by +="),
    "a with block": Forward(with_block, "opens a `with` block"),
    "an exception is handled": Forward(tries, "handles exceptions"),
    "an import": Forward(imports, "imports"),
    "it prints": Forward(lambda self, x: self.product(x) * (print() or 2), "uses print"),
}


def twin_of(model: nn.Module, base: nn.Module) -> nn.Module:
    """The base with W + δ in the place of W."""
    with torch.no_grad():
        for name, weight in reference.dense_weights(model).items():
            base.get_parameter(name).copy_(weight)
    return base


def inputs(seed: int = 0) -> torch.Tensor:
    return torch.randint(-4, 5, (2, 4), generator=torch.Generator().manual_seed(seed)).double()


def outcome(model: nn.Module, x: torch.Tensor):
    x = x.clone()
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(0)
    return model(x), x, torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()


def assert_same(model: nn.Module, twin: nn.Module, x: torch.Tensor) -> None:
    for one, other in zip(outcome(model, x), outcome(twin, x), strict=True):
        assert torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


@pytest.mark.parametrize("name", CASES)
def test_a_forward_is_a_graph_only_where_its_trace_is_it(name, monkeypatch, capsys):
    monkeypatch.setenv("SCALE", "2")
    case = CASES[name]
    base = case.make().double()
    with torch.no_grad():
        for p in base.parameters():
            p.copy_(torch.randint(-4, 5, p.shape))
    model, x = copy.deepcopy(base), inputs()
    plan = lora_fx.plan(model, Rule(where="weight", rank=2, alpha=4), x)
    (row,) = plan.rows
    assert case.why in row.why and bool(case.why) == bool(row.why), row.why
    lora_fx.apply(model, Rule(where="weight", rank=2, alpha=4), x)
    (place,) = inventory(model).places
    assert str(place.adapter.realised) == ("dispatch" if case.why else "graph")
    with torch.no_grad():
        for factor in (place.adapter.A, place.adapter.B):
            factor.copy_(torch.randint(-4, 5, factor.shape))
    twin = twin_of(model, base)
    assert not torch.equal(case.make().double()(x.clone()), outcome(twin, x)[0])
    level = Base.level
    assert_same(model, twin, x)
    assert_same(model, twin, inputs(1))
    case.change(model)
    case.change(twin)
    try:
        assert_same(model, twin, x)
    finally:
        Base.level = level


def test_a_child_of_a_graph_module_that_may_get_a_bias_stays_a_call():
    model = nn.Sequential(nn.Linear(4, 3, bias=False), nn.ReLU()).double()
    gm, x = fx.symbolic_trace(model), inputs()
    lora_fx.apply(gm, Rule(where="*", rank=2), x)
    assert "0" in [n.target for n in gm.graph.nodes if n.op == "call_module"]
    before = gm(x)
    gm.get_submodule("0").bias = nn.Parameter(torch.full((3,), 9.0, dtype=torch.float64))
    assert not torch.equal(gm(x), before)


class NoLength(tuple):
    """As e3nn's irreps are: it has items, and neither a length nor an iterator."""

    def __len__(self):
        raise NotImplementedError

    __iter__ = __len__


class Keeps(nn.Module):
    """Leaves a trace of each call wherever it can."""

    calls: ClassVar[list] = []
    total = 0

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.rng, self.generator = nn.Linear(4, 3), random.Random(0), torch.Generator()
        self.log, self.queue, self.table, self.last = [], deque(maxlen=2), Counter(), None
        self.plain, self.array, self.numpy_rng = torch.zeros(2), np.zeros(2), np.random.default_rng(0)
        self.inner = types.SimpleNamespace(seen={0}, nested=[[0]])
        self.pair = NoLength(([0], 1))
        self.pair.seen = [0]
        self.shown = torch.zeros(2, 1).expand(2, 3)
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x):
        global SCALE
        y = self.fc(x)
        self.log.append(y.mean())
        self.queue.append(y)
        self.table["calls"] += 1
        self.last = y
        self.plain.add_(1)
        self.array += 1
        self.pair[0][0] += 1
        self.pair.seen[0] += 1
        self.shown[:, :1].add_(1)
        self.inner.seen.add(len(self.inner.seen))
        self.inner.nested[0][0] += 1
        self.count += 1
        self.new = y
        type(self).calls.append(1)
        type(self).total += 1
        SCALES.append(1.0)
        SCALE = SCALE + 1
        draws = (random.random, np.random.rand, self.rng.random, self.numpy_rng.random)
        return y + sum(draw() for draw in draws) + torch.rand(1) + torch.rand(1, generator=self.generator)

    def state(self):
        lists = [list(map(id, v)) for v in (self.log, self.queue, type(self).calls, SCALES)]
        inner = (set(self.inner.seen), self.inner.nested[0][0])
        kept = (self.plain, self.shown, self.array, self.count, self.generator.get_state())
        numbers = [*(t.tolist() for t in kept), self.pair[0][0], self.pair.seen[0]]
        states = [random.getstate(), str(np.random.get_state()), torch.get_rng_state().tolist(), self.rng.getstate()]
        return (*lists, dict(self.table), self.last, inner, *numbers, *states, self.numpy_rng.bit_generator.state,
                "new" in vars(self), type(self).total, SCALE)  # fmt: skip


@pytest.mark.parametrize("look", ["capture", "plan", "apply", "certify", "verify"])
def test_looking_at_a_model_leaves_no_trace_in_what_its_code_keeps(look):
    model, x = Keeps(), torch.randn(2, 4)
    rule = Rule(where="*", rank=2, init="zero")
    lists = model.log, model.inner.nested, model.queue
    if look == "certify":
        lora_fx.apply(model, rule, x)
        reference.fill(model)
    before = model.state()
    verbs = {
        "capture": lambda: lora_fx.capture(model, x),
        "plan": lambda: lora_fx.plan(model, rule, x),
        "apply": lambda: lora_fx.apply(model, rule, x),
        "certify": lambda: lora_fx.certify(model, x),
        "verify": lambda: lora_fx.verify(model, model, x),
    }
    verbs[look]()
    assert model.state() == before
    assert all(a is b for a, b in zip(lists, (model.log, model.inner.nested, model.queue), strict=True))
    model(x)
    assert all(a != b for a, b in zip(model.state(), before, strict=True) if not isinstance(a, bool))
