"""What no other test would have noticed: each of these was written for a mutant that survived (`tests.mutants`)."""

from __future__ import annotations

import copy
import math
from fractions import Fraction
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

import lora_fx
from lora_fx import Rule
from lora_fx.checks.verification import compare, rounding_step, run, worst
from lora_fx.deltas import exact_sum
from lora_fx.deltas.dropping import BranchDropout
from lora_fx.errors import EquivalenceError
from lora_fx.graph.capture import normalize_inputs
from lora_fx.graph.views import View, move
from lora_fx.model.inventory import inventory
from tests import reference

EPS = torch.finfo(torch.float64).eps


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(shape)))


def assert_same_sum(a: torch.Tensor, b: torch.Tensor) -> None:
    """Two orders of one float64 sum of a few terms: the floor of `compare` is one rounding."""
    report = compare(a.detach(), b.detach(), b.detach(), 0.0, b.dtype)
    assert report, str(report)


def assert_dense(base: nn.Module, model: nn.Module, inputs) -> None:
    """The adapted model is the base with W + s·B·A: the tests' own sum, for every weight under every name."""
    inputs = normalize_inputs(base, inputs)
    got, dense = run(model, inputs), reference.run_dense(base, reference.dense_weights(model), inputs)
    moved = {k: w * (1 + EPS) for k, w in reference.dense_weights(model).items()}
    noise = [
        float((x - y).norm() / y.norm()) for x, y in zip(reference.run_dense(base, moved, inputs), dense, strict=True)
    ]
    reports = [compare(x, y, y, n, y.dtype) for x, y, n in zip(got, dense, noise, strict=True)]
    assert worst(reports), str(worst(reports))
    assert not all(torch.equal(x, y) for x, y in zip(run(base, inputs), dense, strict=True)), "nothing is adapted"


# ── dropout: nothing in eval mode can tell ───────────────────────────────────────────────────────────────────────────


def dropping(model: nn.Module, x: torch.Tensor, p: float, schedule: str = "auto") -> nn.Module:
    lora_fx.apply(model, Rule(where="*", rank=3, alpha=2, dropout=p, schedule=schedule), x)
    reference.fill(model)
    return model


@pytest.mark.parametrize("dispatched", [False, True], ids=["graph", "dispatch"])
@pytest.mark.parametrize("schedule", ["auto", "branch"])
def test_dropout_takes_single_features_out_of_the_branch_input_in_train_mode(dispatched, schedule):
    x = draw(5, 12)
    model = dropping(nn.Linear(12, 9).double(), None if dispatched else x, 0.5, schedule).train()
    adapter = model.weight_lora_default
    assert adapter.realised == ("dispatch" if dispatched else "graph")
    torch.manual_seed(3)
    got = model(x)
    torch.manual_seed(3)
    dropped = BranchDropout(0.5)(x)
    assert 0 < int((dropped == 0).sum()) < x.numel()
    base = F.linear(x, model._parameters["weight"], model.bias)
    assert_same_sum(got, base + 2 / 3 * dropped @ adapter.A.T @ adapter.B.T)
    assert not torch.equal(model(x), model(x))


def test_dropout_of_an_embedding_takes_whole_tokens_out_of_the_branch():
    model = dropping(nn.Embedding(40, 6).double(), torch.arange(40), 0.5)
    ids = torch.arange(40)
    base = model._parameters["weight"].detach()
    branch = model.eval()(ids) - base
    torch.manual_seed(0)
    got = model.train()(ids)
    kept = (got != base).any(1)
    assert 0 < int(kept.sum()) < 40
    assert_same_sum(got[kept], base[kept] + 2 * branch[kept])


@pytest.mark.parametrize("schedule", ["fused", "branch"])
def test_in_eval_mode_dropout_changes_no_bit(schedule):
    x = draw(5, 12)
    layer = nn.Linear(12, 9).double()
    plain, model = (dropping(copy.deepcopy(layer), x, p, schedule) for p in (0.0, 0.5))
    assert torch.equal(plain.eval()(x), model.eval()(x))


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_a_fresh_adapter_is_in_the_mode_of_its_module(training):
    model = nn.Sequential(nn.Linear(6, 7), nn.Linear(7, 5)).train(training)
    lora_fx.apply(model, Rule(where="*", rank=2, dropout=0.5), torch.randn(3, 6))
    modes = {m.training for adapter in reference.distinct_adapters(model) for m in adapter.modules()}
    assert modes == {training}


# ── settings ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("settings", "scale"),
    [
        (dict(rank=4), 1.0),
        (dict(rank=4, alpha=6), 1.5),
        (dict(rank=4, scaling="rslora"), 2.0),
        (dict(rank=4, alpha=6, scaling="rslora"), 3.0),
    ],
)
def test_the_scale_is_alpha_over_the_rank_or_its_root_and_one_by_default(settings, scale):
    base, x = nn.Linear(12, 9, bias=False).double(), draw(5, 12)
    model = lora_fx.apply(copy.deepcopy(base), Rule(where="*", **settings), x)
    reference.fill(model)
    a = model.weight_lora_default
    assert_same_sum(model(x), base(x) + scale * x @ a.A.T @ a.B.T)


@pytest.mark.parametrize("check", [True, False])
def test_equal_modules_with_other_settings_keep_their_own(check):
    """Their generated forwards differ in a number alone."""
    base, x = (
        nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6)).double(),
        draw(4, 6),
    )
    rules = [Rule(where="0", rank=2, alpha=6), Rule(where="2", rank=2, alpha=1), Rule(where="4", rank=1)]
    model = lora_fx.apply(copy.deepcopy(base), rules, x, check=check)
    reference.fill(model)
    assert_dense(base, model, x)
    assert {a.realised for a in reference.distinct_adapters(model)} == {"graph"}


# ── without the self-check, which mends or refuses what the rewriting got wrong ──────────────────────────────────────


class Shared(nn.Module):
    """One parameter under two names, read by two modules and by the model around them."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(6, 6, bias=False), nn.Linear(6, 6, bias=False)
        self.two.weight = self.one.weight

    def forward(self, x):
        return F.linear(self.two(self.one(x).tanh()).tanh(), self.one.weight)


class Chained(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(draw(9, 6)), nn.Parameter(draw(7, 9))

    def forward(self, x):
        return F.linear(F.linear(x, self.a), self.b)


@pytest.mark.parametrize(
    "make", [Shared, Chained, lambda: fx.symbolic_trace(Chained())], ids=["shared", "chained", "fx"]
)
def test_every_use_is_rewritten_at_once_and_needs_no_fallback(make):
    base, x = make().double(), draw(4, 6)
    model = lora_fx.apply(copy.deepcopy(base), Rule(where="*", rank=2, alpha=3), x, check=False)
    reference.fill(model)
    assert {a.realised for a in reference.distinct_adapters(model)} == {"graph"}
    assert_dense(base, model, x)


def test_a_graph_modules_call_by_keyword_keeps_its_arguments():
    class Calls(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(6, 9)

        def forward(self, x):
            return self.inner(input=x)

    base, x = fx.symbolic_trace(Calls().double()), draw(4, 6)
    model = lora_fx.apply(copy.deepcopy(base), Rule(where="*", rank=2), x)
    reference.fill(model)
    assert_dense(base, model, x)


class Doubling(nn.Module):
    """Tests in Python whether an argument is given: a graph shows one answer."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(draw(7, 6))

    def forward(self, x, double=None):
        y = F.linear(x, self.w)
        return y if double is None else y * 2


@pytest.mark.parametrize("given", [False, True], ids=["seen without", "seen with"])
def test_a_forward_that_decides_in_python_goes_on_deciding(given):
    base, x = Doubling(), draw(4, 6)
    model = lora_fx.apply(copy.deepcopy(base), Rule(where="*", rank=2), (x, x) if given else (x,))
    reference.fill(model)
    for inputs in ((x,), (x, x)):
        assert_dense(base, model, inputs)
    assert torch.equal(model(x, x), 2 * model(x))


def test_nothing_draws_from_the_users_random_state_but_the_first_factors():
    base, x = nn.Sequential(nn.Linear(6, 7), nn.Dropout(0.5), nn.Linear(7, 5)), torch.randn(4, 6)
    rule = Rule(where="*", rank=2, init="zero")
    torch.manual_seed(7)
    state = torch.get_rng_state()
    for look in (lora_fx.capture, lambda m, x: lora_fx.plan(m, rule, x), lambda m, x: lora_fx.apply(m, rule, x)):
        look(base, x)
        assert torch.equal(torch.get_rng_state(), state)
    lora_fx.verify(base, copy.deepcopy(base), x)
    lora_fx.unfold(lora_fx.fold(base))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("schedule", ["auto", "branch"])
def test_two_active_adapters_on_one_weight_add_up(schedule):
    base, x = nn.Linear(12, 9).double(), draw(5, 12)
    model = lora_fx.apply(copy.deepcopy(base), Rule(where="*", rank=2, alpha=3, schedule=schedule), x)
    lora_fx.apply(model, Rule(where="*", rank=3, alpha=5, schedule=schedule), x, name="second")
    reference.fill(model)
    a, b = model.weight_lora_default, model.weight_lora_second
    assert a.realised == b.realised == "graph", "where a forward is wrong the check has it dispatch"
    assert_same_sum(model(x), base(x) + 3 / 2 * x @ a.A.T @ a.B.T + 5 / 3 * x @ b.A.T @ b.B.T)
    lora_fx.activate(model, "second")
    assert_same_sum(model(x), base(x) + 5 / 3 * x @ b.A.T @ b.B.T)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        "weight_lora_second.A", "weight_lora_second.B"
    }  # fmt: skip


class Interleaved(nn.Module):
    """Attention whose query, key and value rows alternate from head to head, or lie one after the other."""

    def __init__(self, interleaved: bool) -> None:
        super().__init__()
        self.interleaved, self.qkv, self.out = interleaved, nn.Linear(10, 24), nn.Linear(8, 10)

    def forward(self, x):
        qkv = self.qkv(x)
        heads = qkv.unflatten(-1, (2, 3, 4)).transpose(-2, -3) if self.interleaved else qkv.unflatten(-1, (3, 2, 4))
        q, k, v = (t.transpose(1, 2) for t in heads.unbind(2))
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


@pytest.mark.parametrize("check", [True, False])
@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("part", ["query", "key", "value"])
def test_a_part_of_a_fused_weight_is_its_own_rows_wherever_they_lie(part, interleaved, check):
    base, x = Interleaved(interleaved).double(), draw(2, 5, 10)
    model = lora_fx.apply(copy.deepcopy(base), Rule(role=f"attention.{part}", rank=2, alpha=3), x, check=check)
    reference.fill(model)
    n = ["query", "key", "value"].index(part)
    blocks = [12 * head + 4 * n for head in (0, 1)] if interleaved else [8 * n, 8 * n + 4]
    rows = tuple(row for start in blocks for row in range(start, start + 4))
    (adapter,) = reference.distinct_adapters(model)
    assert adapter.rows == rows
    assert_dense(base, model, x)
    before = base.qkv.weight.detach()
    after = lora_fx.fold(model).qkv.weight.detach()
    assert [r for r in range(24) if not torch.equal(after[r], before[r])] == list(rows)


# ── views ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def moves(t: torch.Tensor):
    """Movement ops on a tensor, with arguments: every axis, sizes that do not divide evenly, steps, offsets."""
    for d, n in enumerate(t.shape):
        yield from (("select", (d, n - 1)), ("narrow", (d, n - 1, 1)), ("unbind", (d,)), ("unsqueeze", (d,)))
        yield from (("chunk", (k, d)) for k in (2, 3))
        yield from (("split", (k, d)) for k in (1, 2, 4))
        yield from (("transpose", (d, e)) for e in range(-t.ndim, d))
        yield from (("movedim", (d, e)) for e in range(t.ndim))
        if n > 1:
            yield from (("narrow", (d, 1, n - 1)), ("split", ([1, n - 1], d)), ("unflatten", (d, (n, 1))))
    keys = (
        -1,
        slice(1, None),
        slice(None, None, 2),
        slice(1, None, 2),
        (..., 1),
        (..., slice(1, None, 2)),
        (None, ...),
    )
    yield from (("__getitem__", (key,)) for key in keys if t.shape[0] > 1 and t.shape[-1] > 1)
    yield from (("flatten", ()), ("flatten", (0, -2)), ("squeeze", ()), ("expand", ((2, *t.shape),)))
    yield from (("permute", (tuple(range(t.ndim))[::-1],)), ("reshape", ((-1,),)), ("reshape", ((*t.shape[::-1],),)))


def moved(op: str, args: tuple, tensor: torch.Tensor, view: View):
    """(what torch makes of it, what `View` does) for each result; nothing where torch has to copy or refuses."""
    try:
        wanted = getattr(tensor, op)(*args)
    except (RuntimeError, IndexError):
        return []
    wanted = wanted if isinstance(wanted, tuple) else (wanted,)
    if any(t.untyped_storage()._cdata != tensor.untyped_storage()._cdata for t in wanted):
        return []
    found = move(op, view, args, {})
    found = found if isinstance(found, tuple) else (found,)
    assert len(found) == len(wanted), (op, args, tuple(tensor.shape))
    return list(zip(wanted, found, strict=True))


@pytest.mark.parametrize("shape", [(5, 6, 4), (7, 5)])
def test_any_two_movement_ops_in_a_row_are_what_torch_makes_of_them(shape):
    start, seen = torch.empty(shape, device="meta"), 0
    for first in moves(start):
        for tensor, view in moved(*first, start, View.of(shape))[-2:]:
            for second in moves(tensor):
                for t, v in moved(*second, tensor, view):
                    assert tuple(t.shape) == v.shape and t.storage_offset() == v.offset, (first, second)
                    steps = zip(t.stride(), v.strides, t.shape, strict=True)
                    assert all(a == b or n == 1 for a, b, n in steps), (first, second)
                    seen += 1
    assert seen > 1000


# ── what is selected, and what is told ───────────────────────────────────────────────────────────────────────────────


class Deep(nn.Module):
    """layers.<n>.experts.<m>, and names that differ in their case alone."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.ModuleDict({"experts": nn.ModuleList(nn.Linear(6, 6) for _ in range(2))}) for _ in range(3)
        )
        self.w, self.W, self.idle = nn.Linear(6, 5), nn.Linear(5, 4), nn.Linear(6, 3)

    def forward(self, x):
        for layer in self.layers:
            x = sum(expert(x) for expert in layer["experts"])
        return self.W(self.w(x))


def names(rule: Rule) -> set[str]:
    return {row.weight.name for row in lora_fx.plan(Deep(), rule, torch.randn(2, 6)).rows}


def test_the_first_integer_of_a_name_is_its_layer():
    experts = {f"layers.1.experts.{m}.weight" for m in (0, 1)}
    assert names(Rule(layers=1, rank=2)) == experts
    assert names(Rule(layers="1-2", where="*.0", rank=2)) == {f"layers.{n}.experts.0.weight" for n in (1, 2)}


def test_upper_and_lower_case_are_different_names():
    assert names(Rule(where="w", rank=2)) == {"w.weight"}
    assert names(Rule(where="W", rank=2)) == {"W.weight"}


def test_the_plan_names_the_weights_that_the_inputs_did_not_reach():
    plan = lora_fx.plan(Deep(), Rule(where="w", rank=2), torch.randn(2, 6))
    assert [w.name for w in plan.program.unseen] == ["idle.weight"]
    assert "Unseen by the example inputs: idle.weight" in str(plan)


# ── rounding ─────────────────────────────────────────────────────────────────────────────────────────────────────────


class Narrow(nn.Module):
    """Weights of float32, which it multiplies with in bfloat16; or it rounds only x so."""

    def __init__(self, weights: bool) -> None:
        super().__init__()
        self.up, self.weights = nn.Linear(6, 5), weights

    def forward(self, x):
        x, weight = x.bfloat16(), self.up.weight
        return (F.linear(x, weight.bfloat16()) if self.weights else F.linear(x.float(), weight)).float()


@pytest.mark.parametrize(("weights", "dtype"), [(True, torch.bfloat16), (False, torch.float32)])
def test_a_weight_is_rounded_as_it_is_multiplied_with(weights, dtype):
    model, inputs = Narrow(weights), normalize_inputs(nn.Identity(), torch.randn(3, 6))
    assert rounding_step(model, inputs) == torch.finfo(dtype).eps / 2


class Heads(nn.Module):
    """A weight with two axes on one side, beside each other or around the other side's."""

    def __init__(self, sides: str) -> None:
        super().__init__()
        self.sides = sides
        self.w = nn.Parameter(torch.zeros(5, 3, 4))

    def forward(self, x):
        equation = {"ioo": "bi,ihd->bhd", "iio": "bhd,hdo->bo", "oio": "bi,hid->bhd", "ioi": "bhd,hod->bo"}[self.sides]
        return torch.einsum(equation, x, self.w)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("sides", ["ioo", "iio", "oio", "ioi", "oi"])
def test_a_sum_between_two_numbers_goes_where_it_belongs_and_exactly_between_them_to_the_even_one(sides, dtype):
    """W + half a step, and on some elements a hair more or less, that float64 cannot see."""
    x = {"ioo": (2, 5), "iio": (2, 5, 3), "oio": (2, 3), "ioi": (2, 5, 4), "oi": (2, 7)}[sides]
    model = (nn.Linear(7, 6, bias=False) if sides == "oi" else Heads(sides)).to(dtype)
    lora_fx.apply(model, Rule(where="*", rank=2, alpha=2), torch.randn(x).to(dtype))
    (adapter,) = inventory(model).adapters
    (weight,) = (p for p in model.parameters() if not p.requires_grad)
    steps = torch.arange(weight.numel(), dtype=torch.float64).reshape(weight.shape) % 5
    with torch.no_grad():
        weight.copy_(1 + steps * torch.finfo(dtype).eps)  # even and odd numbers of the dtype
        adapter.A.zero_()
        adapter.A[0], adapter.B[:, 0] = torch.finfo(dtype).eps / 2, 1.0
        adapter.A[1] = 2.0**-85 * (torch.arange(adapter.A.shape[1]) % 5 < 2)
        adapter.B[:, 1] = torch.arange(adapter.B.shape[0]) % 5 - 1.0
    hair = (reference.delta(weight, adapter) - torch.finfo(dtype).eps / 2).abs().max()
    assert float(hair) == 0.0, "float64 itself does not see it"
    exact = Fraction(torch.finfo(dtype).eps) / 2
    small = reference.delta(weight, _second_component_alone(adapter))
    old = weight.detach().clone()
    lora_fx.fold(model)
    up = (old.double() + torch.finfo(dtype).eps).to(dtype)
    seen = set()
    for w, above, d, folded in zip(*(t.flatten().tolist() for t in (old, up, small, weight.detach())), strict=True):
        total = Fraction(w) + exact + Fraction(d)
        middle = Fraction(w) + exact
        even = w if round((w - 1) / torch.finfo(dtype).eps) % 2 == 0 else above
        wanted = above if total > middle else w if total < middle else even
        assert folded == wanted
        seen.add("above" if total > middle else "below" if total < middle else even == w)
    assert seen == {"above", "below", True, False}, "each kind of sum occurs"


def _second_component_alone(adapter):
    alone = copy.deepcopy(adapter)
    with torch.no_grad():
        alone.A[0] = 0
    return alone


@pytest.mark.parametrize("elements", [1, 24, 40, 60])
def test_a_last_block_with_fewer_rows_is_folded_and_unfolded_too(monkeypatch, elements):
    """12 elements a row: blocks of 1, 2, 3 and 5 rows out of 7."""
    base, x = nn.Linear(12, 7, bias=False), torch.randn(3, 12)
    model = lora_fx.apply(base, Rule(where="*", rank=3, alpha=2), x)
    reference.fill(model)
    state, whole = reference.bits(model), lora_fx.fold(model, copy=True).weight.detach()
    monkeypatch.setattr(exact_sum, "_BLOCK", elements)
    assert torch.equal(lora_fx.fold(model).weight.detach(), whole)
    assert reference.same_bits(reference.bits(lora_fx.unfold(model)), state)


# ── verification ─────────────────────────────────────────────────────────────────────────────────────────────────────


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 5), nn.Linear(6, 4)

    def forward(self, x):
        return self.first(x), self.second(x)


def test_verify_looks_at_every_output_and_takes_nan_for_no_number():
    model, x = Pair(), torch.randn(3, 6)
    for part in ("first", "second"):
        for value in (math.nan, math.inf, 1.0):
            other = copy.deepcopy(model)
            with torch.no_grad():
                getattr(other, part).weight[0, 0] += value
            for report in (lora_fx.verify(model, other, x), lora_fx.verify(other, model, x)):
                assert not report and "DIFFERENT" in str(report), (part, value)
    assert lora_fx.verify(model, copy.deepcopy(model), x)


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_a_weight_read_behind_every_back_is_found_in_either_mode(mode):
    class Sneaky(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin = nn.Linear(6, 6)

        def forward(self, x):
            if self.training == (mode == "train"):
                return F.linear(x, self.lin._parameters["weight"])
            return self.lin(x)

    model = Sneaky()
    state, classes = reference.bits(model), reference.classes(model)
    with pytest.raises(EquivalenceError, match="is not the model with W \\+ δ") as caught:
        lora_fx.apply(model, Rule(where="*", rank=2), torch.randn(3, 6))
    assert caught.value.place == "lin.weight" and caught.value.remedy
    assert reference.same_bits(reference.bits(model), state) and reference.classes(model) == classes
    assert all(p.requires_grad for p in model.parameters())


# ── adapter files ────────────────────────────────────────────────────────────────────────────────────────────────────


class Berlin(nn.Module):
    """`lin` ends `berlin`, and is no module of it."""

    def __init__(self) -> None:
        super().__init__()
        self.lin, self.berlin, self.tower = nn.Linear(6, 9), nn.Linear(9, 7), nn.ModuleDict({"lin": nn.Linear(7, 5)})

    def forward(self, x):
        return self.tower["lin"](self.berlin(self.lin(x).tanh()).tanh())


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning")
@pytest.mark.parametrize(
    "config",
    [
        dict(target_modules=["lin"]),
        dict(target_modules=["lin"], rank_pattern={"lin": 3, "tower.lin": 1}, alpha_pattern={"lin": 5, "tower.lin": 7}),
        dict(target_modules=["lin"], rank_pattern={".*r.lin": 1, "lin": 3}, alpha_pattern={".*r.lin": 7, "lin": 5}),
    ],
    ids=["an ending is a whole name", "the wide pattern first", "the narrow pattern first"],
)
def test_what_peft_targets_and_which_pattern_decides(config, tmp_path: Path):
    """PEFT sorts the patterns when it saves them: these are in that order."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    model, x = Berlin(), torch.randn(3, 6)
    theirs = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(r=2, lora_alpha=3, **config)).eval()
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            if "lora_" in name:
                p.normal_(std=0.4)
    theirs.save_pretrained(tmp_path)
    ours = lora_fx.load_adapter(model, tmp_path, x)
    assert lora_fx.adapters(ours) == {"default": ["lin.weight", "tower.lin.weight"]}
    assert lora_fx.verify(theirs, ours, x)
