"""Forms from outside: what one registration gives everywhere, and what registering refuses."""

from __future__ import annotations

import doctest
import threading
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lora_fx
from lora_fx import Rule
from lora_fx.deltas import registration
from lora_fx.deltas.registration import register_form
from lora_fx.errors import FormError
from lora_fx.graph.forms import FORMS, Call, Form
from lora_fx.model.inventory import inventory
from tests import reference

# ── two forms, as somebody would write them ──────────────────────────────────────────────────────────────────────────


def parse_inner(form, op, args, kwargs, ndim):
    x, W = args
    return Call(form, x, W, "oi") if ndim(W) == 2 and ndim(x) is None else None


INNER = Form(
    "inner", frozenset({"inner"}), parse_inner, down=lambda call, x, A: x @ A.mT, up=lambda call, z, B: z @ B.mT
)
X = torch.randn(5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
EXAMPLES = dict(shape=(6, 8), fires=lambda W: torch.inner(X, W), leaves=lambda W: torch.inner(W, X))


@torch.library.custom_op("mylib::scaled_linear", mutates_args=())
def scaled_linear(weight: torch.Tensor, x: torch.Tensor, scale: float) -> torch.Tensor:
    """scale · x·W, with the weight (in, out) in front."""
    return x @ weight * scale


scaled_linear.register_fake(lambda weight, x, scale: x.new_empty((*x.shape[:-1], weight.shape[1])))
scaled_linear.register_autograd(
    lambda ctx, grad: (None, grad @ ctx.weight.mT * ctx.scale, None),
    setup_context=lambda ctx, inputs, output: ctx.__dict__.update(weight=inputs[0], scale=inputs[2]),
)


def parse_scaled(form, op, args, kwargs, ndim):
    weight, x, scale = args
    if ndim(weight) != 2 or ndim(x) is not None:
        return None
    return Call(form, x, weight, "io", options={"scale": scale})


SCALED = Form(
    "scaled_linear",
    frozenset({"mylib::scaled_linear"}),
    parse_scaled,
    down=lambda call, x, A: F.linear(x, A) * call.options["scale"],
    up=lambda call, z, B: F.linear(z, B),
)
SCALED_EXAMPLES = dict(
    shape=(8, 6),
    fires=lambda W: scaled_linear(W, X, 0.7),
    leaves=lambda W: scaled_linear(X.mT[:6], W, 0.7),  # the weight is what is multiplied
)


@pytest.fixture
def inner():
    with register_form(INNER, **EXAMPLES) as registered:
        yield registered


@pytest.fixture
def scaled():
    with register_form(SCALED, **SCALED_EXAMPLES) as registered:
        yield registered


@pytest.fixture(autouse=True)
def table_is_left_as_it_was():
    before = dict(FORMS)
    yield
    assert before == FORMS


# ── what they give ───────────────────────────────────────────────────────────────────────────────────────────────────


class Block(nn.Module):
    """A block whose up projection is an inner product and whose down projection is the library's op."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.up, self.down = nn.Linear(8, 8), nn.Linear(8, 12, bias=False), nn.Linear(12, 8, bias=False)
        self.down.weight = nn.Parameter(torch.randn(12, 8) / 3)

    def forward(self, x):
        x = self.first(x)
        h = F.gelu(torch.inner(x, self.up.weight))
        return x + scaled_linear(self.down.weight, h, 0.5)


class Decides(nn.Module):
    """Python looks at the numbers here: no graph can stand for it."""

    def __init__(self) -> None:
        super().__init__()
        self.W = nn.Parameter(torch.randn(6, 8))

    def forward(self, x):
        y = torch.inner(x, self.W)
        return y if float(x.sum()) > 0 else -y


def inputs() -> torch.Tensor:
    return torch.randn(3, 8, generator=torch.Generator().manual_seed(1))


def test_the_docstring_runs():
    assert doctest.testmod(registration) == (0, 7)


def test_without_it_the_op_gets_the_dense_sum():
    plan = lora_fx.plan(Block(), Rule(where="up", rank=2), inputs())
    assert "takes it whole" in str(plan)
    with pytest.raises(lora_fx.LoraFxError, match="matches nothing"):
        lora_fx.plan(Block(), Rule(where="down", rank=2), inputs())


def test_the_plan_names_the_form_and_rules_select_by_it_and_by_role(inner, scaled):
    rows = lora_fx.plan(Block(), Rule(form="inner | scaled*", rank=2, expect=2), inputs()).rows
    assert [(row.weight.name, row.role, row.uses[0].form) for row in rows] == [
        ("up.weight", "mlp.up", "inner"),
        ("down.weight", "mlp.down", "scaled_linear"),
    ]
    layouts = {row.weight.name: row.weight.layout.sides for row in rows}
    assert layouts == {"up.weight": "oi", "down.weight": "io"}


def test_patterns_match_it_and_are_written_with_it(inner, scaled):
    def as_linears(x, up, down):
        return F.linear(F.gelu(F.linear(x, up)), down)

    def as_written(x, up, down):
        return scaled_linear(down, F.gelu(torch.inner(x, up)), 1.0)

    for pattern in (as_linears, as_written):
        rows = lora_fx.plan(Block(), Rule(pattern=pattern, rank=2, expect=2), inputs()).rows
        assert [row.weight.name for row in rows] == ["up.weight", "down.weight"]
        only = lora_fx.plan(Block(), Rule(pattern=pattern, adapt="down", rank=2), inputs()).rows
        assert [row.weight.name for row in only] == ["down.weight"]


def test_a_rewritten_forward_has_the_branch_and_folds_and_unfolds(inner, scaled):
    model, x = Block(), inputs()
    lora_fx.apply(model, Rule(form="inner | scaled_linear", rank=2, alpha=3), x)
    reference.fill(model)
    text = lora_fx.show(model)
    assert "torch.inner" in text and "mylib.scaled_linear" in text and "lora_default" in text, text
    certificate = lora_fx.certify(model, x)
    assert certificate and {(row.form, row.realised) for row in certificate.rows} == {
        ("inner", "graph"),
        ("scaled_linear", "graph"),
    }
    before = {name: p.detach().clone() for name, p in model.named_parameters() if "lora" not in name}
    folded = lora_fx.fold(model, copy=True)
    assert lora_fx.verify(model, folded, x)
    lora_fx.fold(model)
    lora_fx.unfold(model)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters() if name in before)
    model(x).sum().backward()
    assert all(bool((t.grad != 0).any()) for a in inventory(model).adapters for t in (a.A, a.B))


def test_a_module_that_decides_in_python_is_dispatched(inner):
    model, x = Decides(), inputs()
    lora_fx.apply(model, Rule(form="inner", rank=2), x)
    reference.fill(model)
    (row,) = lora_fx.certify(model, x).rows
    assert (row.form, row.realised) == ("inner", "dispatch") and row.covered
    assert lora_fx.verify(model, lora_fx.fold(model, copy=True), -x.abs())


def test_adapters_are_saved_and_loaded(inner, tmp_path):
    model, x = Decides(), inputs()
    lora_fx.apply(model, Rule(form="inner", rank=2), x)
    reference.fill(model)
    lora_fx.save_adapter(model, tmp_path, peft=False)
    other = Decides()
    other.load_state_dict({"W": model._parameters["W"]})
    lora_fx.load_adapter(other, tmp_path, example_inputs=x)
    assert lora_fx.verify(model, other, x)


class Product(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.W = nn.Parameter(torch.randn(6, 8))

    def forward(self, x):
        return torch.inner(x, self.W)


def test_onnx_takes_it_folded_and_unfolded(inner, tmp_path):
    model, x = Product(), inputs()
    lora_fx.apply(model, Rule(form="inner", rank=2), x)
    reference.fill(model)
    for adapters in ("unfolded", "folded"):
        report = lora_fx.export_onnx(model, x, tmp_path / f"{adapters}.onnx", adapters=adapters)
        assert report.comparisons and all(report.comparisons)


def test_taken_out_again_it_is_dense_and_what_was_adapted_stays_right():
    model, x = Product(), inputs()
    with register_form(INNER, **EXAMPLES):
        lora_fx.apply(model, Rule(form="inner", rank=2), x)
        reference.fill(model)
    assert "inner" not in FORMS and lora_fx.certify(model, x)
    assert "takes it whole" in str(lora_fx.plan(Product(), Rule(where="W", rank=2), x))


def test_an_op_of_another_library_is_not_taken_for_torchs_own():
    @torch.library.custom_op("otherlib::linear", mutates_args=())
    def linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return x @ weight.mT * 3

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.W = nn.Parameter(torch.randn(6, 8))

        def forward(self, x):
            return linear(x, self.W)

    (use,) = lora_fx.capture(Model(), inputs()).weight("W").uses
    assert use.call is None and use.form == "otherlib::linear"


# ── what is refused ──────────────────────────────────────────────────────────────────────────────────────────────────


def no_weight(form, op, args, kwargs, ndim):
    return None


def always(form, op, args, kwargs, ndim):
    x, W = args if ndim(args[1]) else args[::-1]
    return Call(form, x, W, "oi")


def wrong_way(form, op, args, kwargs, ndim):
    call = parse_inner(form, op, args, kwargs, ndim)
    return call and replace(call, sides="io")


def three_sides(form, op, args, kwargs, ndim):
    call = parse_inner(form, op, args, kwargs, ndim)
    return call and replace(call, sides="ooi")


def swapped_operands(form, op, args, kwargs, ndim):
    call = parse_inner(form, op, args, kwargs, ndim)
    return call and replace(call, x=call.weight, weight=call.x)


def detached(call, x, A):
    return x @ A.detach().mT


class Halved(torch.autograd.Function):
    @staticmethod
    def forward(ctx, z):
        return z * 1

    @staticmethod
    def backward(ctx, grad):
        return grad / 2


#: what is wrong: (fields of the form, arguments of the registration, what the error says)
WRONG = {
    "the name is taken": (dict(name="linear"), {}, "a form of that name is registered"),
    "the name is none": (dict(name="my | linear"), {}, "its name is no identifier"),
    "an op is taken": (dict(ops=frozenset({"inner", "mm"})), {}, "the op 'mm' belongs to the form 'matmul'"),
    "an op moves": (dict(ops=frozenset({"inner", "t"})), {}, "looks through the op 't'"),
    "ops are a string": (dict(ops="inner"), {}, "are no names of ops"),
    "an op has no example": (dict(ops=frozenset({"inner", "mylib::f"})), {}, "no example calls mylib::f"),
    "the shape is square": ({}, dict(shape=(8, 8)), "hides a transposed branch"),
    "the example never fires": (dict(parse=no_weight), {}, "does not fire: it calls inner, and parse gives no Call"),
    "the example calls another op": ({}, dict(fires=lambda W: X @ W.mT), "does not fire: it calls none of"),
    "the example ignores W": ({}, dict(fires=lambda W: torch.inner(X, W) * 0), "the same for another weight"),
    "the example is float32": ({}, dict(fires=lambda W: torch.inner(X, W).float()), "returns torch.float32"),
    "the example raises": ({}, dict(fires=lambda W: torch.inner(X[:, :3], W)), "an example raises RuntimeError"),
    "the counter-example fires": (dict(parse=always), {}, "the counter-example fires"),
    "the counter-example is none": ({}, dict(leaves=lambda W: W.mT @ W), "shows nothing"),
    "the scale is lost": (dict(up=lambda call, z, B: z @ B.mT / 1.5), {}, "it is 0.667 times that, off by"),
    "the branch is doubled": (dict(down=lambda call, x, A: 2 * (x @ A.mT)), {}, "it is 2 times that, off by"),
    "the branch is transposed": (dict(up=lambda call, z, B: (z @ B.mT).T), {}, "RuntimeError"),
    "the branch broadcasts": (dict(up=lambda call, z, B: (z @ B.mT)[None]), {}, "the branch makes (1, 5, 6) of (5, 6)"),
    "the branch forgets A": (dict(down=lambda call, x, A: x[:, :2]), {}, "explains"),
    "sides are swapped": (dict(parse=wrong_way), {}, "an example raises"),
    "sides do not fit": (dict(parse=three_sides), {}, "do not fit an operand of shape (6, 8)"),
    "operands are swapped": (dict(parse=swapped_operands), {}, "takes x for the weight"),
    "A has no gradient": (dict(down=detached), {}, "no gradient reaches A or B"),
    "a gradient is wrong": (dict(down=lambda call, x, A: Halved.apply(x @ A.mT)), {}, "gradients of A and B"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_row_is_refused_and_the_table_unchanged(wrong):
    row, arguments, part = WRONG[wrong]
    before = dict(FORMS)
    with pytest.raises(FormError) as error:
        register_form(replace(INNER, **row), **{**EXAMPLES, **arguments})
    assert part in str(error.value), error.value
    assert error.value.remedy and before == FORMS


def test_a_form_is_registered_once(inner):
    with pytest.raises(FormError, match="a form of that name is registered"):
        register_form(INNER, **EXAMPLES)
    with pytest.raises(FormError, match="the op 'inner' belongs to the form 'inner'"):
        register_form(replace(INNER, name="mine"), **EXAMPLES)
    inner.remove()
    with register_form(replace(INNER, name="mine"), **EXAMPLES):
        inner.remove()  # takes out its own row alone
        assert FORMS["inner"].name == "mine"
    with pytest.raises(FormError, match="is no Form"):
        register_form("inner", **EXAMPLES)


def test_while_a_row_is_on_trial_other_threads_do_not_see_it():
    seen = []

    def ask() -> None:
        seen.append(FORMS["inner"].parse(INNER, "inner", (X, 0), {}, {0: 2}.get))

    def asks_elsewhere(W):
        thread = threading.Thread(target=ask)
        thread.start()
        thread.join()
        return torch.inner(X, W)

    register_form(INNER, **{**EXAMPLES, "fires": asks_elsewhere}).remove()
    assert seen and not any(seen)
