"""Kinds: W' = W + Σ δ(W, θ), whatever δ is. Their laws over random models and the zoo are in the files of the laws."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import math
import os
import pickle

import pytest
import torch
import torch.nn.functional as F
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import nn

import lora_fx
from lora_fx import Adapter, Kind, LoraFxError, Rule, register_kind
from lora_fx.checks import oracles
from lora_fx.checks.verification import compare, run, scatter, verify
from lora_fx.deltas import kinds
from lora_fx.deltas.dropping import BranchDropout
from lora_fx.deltas.kinds import KINDS, REQUIRED
from lora_fx.errors import EquivalenceError, FileError, FoldError, KindError, PlanError, RuleError
from lora_fx.graph.capture import normalize_inputs
from lora_fx.graph.layout import Layout
from lora_fx.model.inventory import inventory
from lora_fx.testing import adapters, assert_kind, models, rules_for
from tests import reference

SETTINGS = {
    **{low_rank: {"rank": 2, "alpha": 3} for low_rank in ("lora", "dora", "adalora")},
    "bias": {},
    "full": {},
}


class Model(nn.Module):
    """A linear, a transposed matmul, a convolution without a bias, an embedding, a fused linear used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.up = nn.Linear(6, 10)
        self.raw = nn.Parameter(torch.randn(10, 7) / 3)
        self.conv = nn.Conv1d(7, 8, 2, bias=False)
        self.twice = nn.Linear(8, 8)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = F.gelu(self.up(self.embed(ids))) @ self.raw
        x = self.conv(x.transpose(1, 2)).transpose(1, 2)
        return self.twice(self.twice(x).tanh())


IDS = torch.tensor([[1, 2, 3, 10], [4, 0, 5, 6]])


def model() -> Model:
    """Frozen: some kernels choose another path for trainable weights."""
    torch.manual_seed(0)
    return Model().requires_grad_(False)


def out(model: nn.Module) -> torch.Tensor:
    """Without gradients: kernels may choose another path for a weight that has one."""
    with torch.no_grad():
        return model(IDS)


def assert_same(found: torch.Tensor, wanted: torch.Tensor, terms: int = 64) -> None:
    """In float64: two orders of so many operations differ by less than one rounding for each."""
    found, wanted = found.detach(), wanted.detach()
    assert found.shape == wanted.shape
    assert compare(found, wanted, wanted, terms * torch.finfo(torch.float64).eps / 2, torch.float64)


def rule(kind: str, where: str = "*", **more) -> list[Rule]:
    """Everything that can take it."""
    if kind == "bias":
        return [Rule(where="embed | raw | conv*"), Rule(where=where, kind="bias", **more)]
    return [Rule(where=where, kind=kind, **SETTINGS.get(kind, {}), **more)]


def fill(model: nn.Module, seed: int = 0, share: float = 0.5) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    for place in inventory(model).places:
        if place.child in place.owner._modules:
            scatter(place.adapter, place.parameter, generator, share)
    return model


@pytest.fixture(params=list(SETTINGS))
def kind(request) -> str:
    return request.param


# ── what they mean, written down once more, by hand ──────────────────────────────────────────────────────────────────


def by_hand(kind: str, weight: torch.Tensor, adapter) -> torch.Tensor:
    """W' of an (out, in) weight or an (out,) bias, in float64."""
    W, t = weight.double(), {name: p.detach().double() for name, p in adapter.named_parameters()}
    if kind == "bias":
        return W + t["shift"][:, 0]
    if kind == "full":
        return t["weight"]
    if kind == "adalora":
        return W + 3 / 2 * t["P"] @ t["singular"].squeeze().diag() @ t["Q"]
    V = W + 3 / 2 * t["B"] @ t["A"]
    return V if kind == "lora" else t["magnitude"] * V / V.square().sum(1, keepdim=True).sqrt()


def test_a_linear_of_each_kind_is_what_its_paper_says(kind):
    torch.manual_seed(0)
    layer, x = nn.Linear(6, 8), torch.randn(5, 6)
    plain = copy.deepcopy(layer)
    fill(lora_fx.apply(layer, Rule(where="*", kind=kind, **SETTINGS[kind]), x))
    (place,) = inventory(layer).places
    adapted = by_hand(kind, getattr(plain, place.attribute), place.adapter)
    W, b = (adapted, plain.bias.double()) if kind != "bias" else (plain.weight.double(), adapted)
    exact = (x.double() @ W.T + b).detach()
    assert compare(layer(x).detach(), exact, exact, 0.0, torch.float32)
    assert not compare(plain(x).detach(), exact, exact, 0.0, torch.float32)
    lora_fx.fold(layer)
    folded = getattr(layer, place.attribute).detach().double()
    assert bool(((folded - adapted).abs() <= adapted.abs() * 2**-24 + 2**-50).all())


def test_the_norm_of_dora_has_no_gradient():
    """In training as PEFT has it (section 4.3 of the paper): the norm is a constant."""
    torch.manual_seed(0)
    layer, x = nn.Linear(6, 8, bias=False), torch.randn(5, 6, dtype=torch.float64)
    layer.double()
    fill(lora_fx.apply(layer, Rule(where="*", kind="dora", rank=2), x))
    (place,) = inventory(layer).places
    A, B, m = (place.adapter.get_parameter(n) for n in ("A", "B", "magnitude"))
    V = layer._parameters["weight"] + B @ A
    y = x @ (m * V / V.detach().norm(dim=1, keepdim=True)).T
    cotangent = torch.randn_like(y)
    wanted = torch.autograd.grad(y, (A, B, m), cotangent)
    found = torch.autograd.grad(layer(x), (A, B, m), cotangent)
    for a, b in zip(found, wanted, strict=True):
        assert compare(a, b.detach(), b.detach(), 0.0, torch.float64)


# ── the verbs ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_every_verb_takes_every_kind(kind):
    base = model()
    adapted = lora_fx.apply(copy.deepcopy(base), rule(kind), IDS)
    assert torch.equal(out(adapted), out(base)), "θ₀ is the base, bit for bit"
    fill(adapted)
    before, state, classes = out(adapted), reference.bits(adapted), reference.classes(adapted)
    assert not verify(base, adapted, IDS)
    assert lora_fx.certify(adapted, IDS)
    for copied in (copy.deepcopy(adapted), pickle.loads(pickle.dumps(adapted))):
        assert torch.equal(out(copied), before)
    lora_fx.deactivate(adapted)
    assert torch.equal(out(adapted), out(base))
    lora_fx.activate(adapted, "default")
    assert torch.equal(out(adapted), before)
    lora_fx.fold(adapted)
    assert verify(copy.deepcopy(adapted), lora_fx.unfold(copy.deepcopy(adapted)), IDS)
    assert reference.classes(adapted) == reference.classes(base) and list(adapted.state_dict()) == [*base.state_dict()]
    assert lora_fx.certify(adapted, IDS), "of a folded model every element is seen"
    lora_fx.unfold(adapted)
    assert reference.same_bits(reference.bits(adapted), state) and reference.classes(adapted) == classes
    assert torch.equal(out(adapted), before)
    lora_fx.remove(adapted, "default")
    assert reference.same_bits(reference.bits(adapted), reference.bits(base))


def test_a_fold_cut_short_is_undone(kind, monkeypatch):
    adapted = fill(lora_fx.apply(model(), rule(kind), IDS))
    state = reference.bits(adapted)
    monkeypatch.setattr("lora_fx.passes.fold.keep_keys", lambda model: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        lora_fx.fold(adapted)
    assert reference.same_bits(reference.bits(adapted), state)


def test_nan_in_theta_is_refused_before_anything_is_written(kind):
    adapted = fill(lora_fx.apply(model(), rule(kind), IDS))
    with torch.no_grad():
        next(inventory(adapted).places[-1].adapter.parameters()).view(-1)[0] = torch.nan
    state = {name: t.nan_to_num() for name, t in reference.bits(adapted).items()}
    with pytest.raises(FoldError):
        lora_fx.fold(adapted)
    assert reference.same_bits({name: t.nan_to_num() for name, t in reference.bits(adapted).items()}, state)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_every_kind_in_every_dtype(kind, dtype):
    base = model().to(dtype)
    adapted = lora_fx.apply(copy.deepcopy(base), rule(kind), IDS)
    assert torch.equal(out(adapted), out(base))
    assert {p.dtype for p in inventory(adapted).adapters[0].parameters()} == {
        torch.float64 if dtype == torch.float64 else torch.float32
    }
    fill(adapted)
    folded = lora_fx.fold(copy.deepcopy(adapted))
    assert verify(folded, adapted, IDS)
    assert reference.same_bits(reference.bits(lora_fx.unfold(folded)), reference.bits(adapted))


def test_training_moves_exactly_theta(kind):
    adapted = lora_fx.apply(model(), rule(kind), IDS)
    before = reference.bits(adapted)
    optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):  # B is 0 in the first step, so A moves in the second
        optimizer.zero_grad()
        adapted(IDS).square().sum().backward()
        optimizer.step()
    moved = {name for name, t in reference.bits(adapted).items() if not torch.equal(t, before[name])}
    assert moved == {name for name in before if "_lora_default" in name}


@pytest.mark.onnx
def test_a_folded_file_of_every_kind_is_proven(kind, tmp_path):
    adapted = fill(lora_fx.apply(model(), rule(kind), IDS))
    report = lora_fx.export_onnx(adapted, IDS, tmp_path / "m.onnx", prove=True)
    assert report.proof.folded and all(comparison.equivalent for comparison in report.comparisons)
    adapted = lora_fx.fold(adapted)
    assert lora_fx.export_onnx(adapted, IDS, tmp_path / "m.onnx", prove=True).proof.folded


@pytest.mark.onnx
def test_an_unfolded_file_of_every_kind_is_the_adapted_model(kind, tmp_path):
    adapted = fill(lora_fx.apply(model(), rule(kind), IDS))
    report = lora_fx.export_onnx(adapted, IDS, tmp_path / "m.onnx", adapters="unfolded")
    assert report.certificate and all(comparison.equivalent for comparison in report.comparisons)


@pytest.mark.onnx
def test_a_switchable_file_wants_factors(kind, tmp_path):
    adapted = fill(lora_fx.apply(model(), rule(kind), IDS))
    if KINDS[kind].low_rank:
        assert lora_fx.export_onnx(adapted, IDS, tmp_path / "m.onnx", adapters="switchable")
        return
    with pytest.raises(LoraFxError, match="no factors to feed"):
        lora_fx.export_onnx(adapted, IDS, tmp_path / "m.onnx", adapters="switchable")
    assert not (tmp_path / "m.onnx").exists()


# ── several ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_two_kinds_on_one_weight_add_up_in_any_order_and_each_acts_alone():
    base, outputs = model(), {}
    names = ["lora", "dora", "full"]
    for order in (names, names[::-1]):
        adapted = copy.deepcopy(base)
        for n in order:
            lora_fx.apply(adapted, rule(n, "up | twice"), IDS, name=n)
        fill(adapted, share=0.3)
        adapted.load_state_dict(outputs.setdefault("θ", adapted.state_dict()))
        for active in (["lora"], ["dora"], ["full"], ["lora", "dora"], names):
            lora_fx.activate(adapted, *active)
            dense = reference.dense_weights(adapted)
            wanted = reference.run_dense(base, dense, normalize_inputs(base, IDS))
            assert compare(adapted(IDS).detach(), wanted[0], wanted[0], 2**-22, torch.float32), active
            assert lora_fx.certify(adapted, IDS), active
            first = outputs.setdefault(tuple(active), adapted(IDS).detach())
            assert compare(adapted(IDS).detach(), first, first, 2**-24, torch.float32), active
            folded = lora_fx.fold(copy.deepcopy(adapted))
            assert compare(folded(IDS).detach(), wanted[0], wanted[0], 2**-22, torch.float32), active


def test_several_kinds_in_one_model():
    rules = [
        Rule(where="embed", kind="dora", rank=2),
        Rule(where="up", rank=2),
        Rule(where="twice", kind="bias"),
        Rule(where="conv*", kind="full"),
    ]
    adapted = fill(lora_fx.apply(model(), rules, IDS))
    lora_fx.apply(adapted, Rule(where="twice", kind="dora", rank=1), IDS, name="default")
    fill(adapted)
    assert lora_fx.certify(adapted, IDS)
    assert {place.adapter.kind.name for place in inventory(adapted).places} == {"dora", "lora", "bias", "full"}
    before, state = adapted(IDS), reference.bits(adapted)
    lora_fx.unfold(lora_fx.fold(adapted))
    assert torch.equal(adapted(IDS), before) and reference.same_bits(reference.bits(adapted), state)


def test_dropout_of_a_low_rank_branch_acts_beside_a_kind_that_is_dense():
    adapted = lora_fx.apply(model(), Rule(where="up", rank=2, dropout=0.5), IDS, name="a")
    lora_fx.apply(adapted, Rule(where="up", kind="full"), IDS, name="b")
    lora_fx.activate(adapted, "a", "b")
    fill(adapted)
    adapted.train()
    torch.manual_seed(0)
    dropped = adapted(IDS)
    adapted.eval()
    assert not torch.equal(dropped, adapted(IDS))


def test_a_part_of_a_fused_weight_takes_every_kind():
    class Fused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 8)

        def forward(self, x):
            q, k, v = (t.unflatten(-1, (2, 4)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
            return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    torch.manual_seed(0)
    for name, own in SETTINGS.items():
        fused, x = Fused(), torch.randn(2, 5, 8)
        base = copy.deepcopy(fused)
        lora_fx.apply(fused, Rule(role="attention.query | attention.value", kind=name, **own), x)
        assert torch.equal(fused(x), base(x))
        fill(fused)
        assert lora_fx.certify(fused, x), name
        lora_fx.fold(fused)
        attribute = "bias" if name == "bias" else "weight"
        after, before = getattr(fused.qkv, attribute), getattr(base.qkv, attribute)
        assert torch.equal(after[8:16], before[8:16]), "the keys are no part"
        assert not torch.equal(after[:8], before[:8]) and not torch.equal(after[16:], before[16:])


# ── from outside ─────────────────────────────────────────────────────────────────────────────────────────────────────

LOHA = Kind(  # δ = s·(B₁A₁)⊙(B₂A₂)
    "loha",
    shapes=lambda space: {
        "A1": (*space.batch, space.rank, space.inner),
        "B1": (*space.batch, space.out, space.rank),
        "A2": (*space.batch, space.rank, space.inner),
        "B2": (*space.batch, space.out, space.rank),
    },
    start=lambda theta, weight: (
        theta.A1.normal_(),
        theta.B1.normal_(std=0.1),
        theta.A2.normal_(),
        theta.B2.zero_(),
    ),
    delta=lambda weight, theta: theta.scale * (theta.B1 @ theta.A1) * (theta.B2 @ theta.A2),
    settings={"rank": REQUIRED, "alpha": None},
)


@pytest.mark.onnx
def test_loha_from_outside(tmp_path):
    with register_kind(LOHA):
        adapted = lora_fx.apply(model(), Rule(where="*", kind="loha", rank=2, alpha=4), IDS)
        fill(adapted)
        assert lora_fx.certify(adapted, IDS)
        assert "loha" in str(lora_fx.plan(model(), Rule(where="*", kind="loha", rank=2), IDS))
        report = lora_fx.export_onnx(adapted, IDS, tmp_path / "m.onnx", prove=True)
        assert report.proof.folded
        assert verify(lora_fx.fold(copy.deepcopy(adapted)), adapted, IDS)
    assert "loha" not in KINDS
    assert lora_fx.certify(adapted, IDS), "what has it keeps it"


VERA = Kind(  # Kopiczko et al. 2024, with trained factors: δ = s·diag(b)·B·diag(d)·A
    "scaled",
    shapes=lambda space: {**kinds.factor_shapes(space), "d": (*space.batch, space.rank, 1)},
    start=lambda theta, weight: (theta.A.normal_(), theta.B.zero_(), theta.d.fill_(0.1)),
    factors=lambda theta: (theta.d * theta.A, theta.B),
    settings={"rank": REQUIRED, "alpha": None, "dropout": 0.0, "schedule": "auto"},
)


@pytest.mark.onnx
def test_a_low_rank_kind_from_outside_has_branches_schedules_and_the_exact_fold(tmp_path):
    with register_kind(VERA):
        base = model()
        plan = lora_fx.plan(base, Rule(where="*", kind="scaled", rank=2), IDS)
        assert {row.realised for row in plan.rows} == {"graph"} and "exactly" in str(plan)
        adapted = lora_fx.apply(copy.deepcopy(base), Rule(where="*", kind="scaled", rank=2, dropout=0.0), IDS)
        assert torch.equal(out(adapted), out(base))
        fill(adapted)
        assert lora_fx.certify(adapted, IDS)
        assert pickle.loads(pickle.dumps(adapted))(IDS).equal(adapted(IDS))
        lora_fx.fold(adapted)
        assert lora_fx.certify(adapted, IDS)
        lora_fx.unfold(adapted)
        assert lora_fx.export_onnx(adapted, IDS, tmp_path / "m.onnx", adapters="switchable")


# ── bad input ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_an_unknown_kind():
    with pytest.raises(RuleError, match=r"(?s)there is no kind 'lore'.*lora, dora, adalora, pissa, olora, bias, full"):
        Rule(where="*", kind="lore", rank=2)


@pytest.mark.parametrize(
    ("kind", "settings", "said"),
    [
        ("bias", {"rank": 4}, "rank=4 is no setting of the kind 'bias'\n.*it has none"),
        ("full", {"dropout": 0.1}, "dropout=0.1 is no setting of the kind 'full'"),
        ("dora", {"rank": 4, "schedule": "dense"}, "schedule='dense' is no setting of the kind 'dora'\n.*rank, alpha"),
        ("dora", {}, "the kind 'dora' needs rank"),
        ("lora", {}, "the kind 'lora' needs rank"),
        ("dora", {"rank": 4, "settings": {"size": 3}}, "size=3 is no setting of the kind 'dora'"),
    ],
)
def test_settings_that_a_kind_does_not_have(kind, settings, said):
    with pytest.raises(RuleError, match=f"(?s){said}"):
        Rule(where="*", kind=kind, **settings)


def refused(rules, error, said: str) -> None:
    base = model()
    state, classes = reference.bits(base), reference.classes(base)
    with pytest.raises(error, match=said):
        lora_fx.apply(base, rules, IDS)
    assert reference.same_bits(reference.bits(base), state) and reference.classes(base) == classes


def test_a_site_without_a_bias_is_refused_by_name():
    refused(Rule(where="raw", kind="bias"), PlanError, "raw: the kind 'bias' adapts a bias, and the weight has none")
    refused(Rule(where="conv* | up", kind="bias"), PlanError, "conv.weight: .*has none")


def test_a_bias_that_others_read_too_is_refused():
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
            self.b.bias = self.a.bias

        def forward(self, x):
            return self.b(self.a(x))

    shared, x = Shared(), torch.randn(2, 4)
    with pytest.raises(PlanError, match="linear in b reads it too"):
        lora_fx.apply(shared, Rule(where="a", kind="bias"), x)
    fill(lora_fx.apply(shared, Rule(where="a | b", kind="bias"), x))
    assert lora_fx.certify(shared, x)


def test_a_bias_is_found_where_it_is_added():
    class Added(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w, self.shift = nn.Parameter(torch.randn(4, 6)), nn.Parameter(torch.randn(6))

        def forward(self, x):
            return (x @ self.w + self.shift).relu()

    added, x = Added(), torch.randn(2, 4)
    fill(lora_fx.apply(added, Rule(where="w", kind="bias"), x))
    assert [place.weight for place in inventory(added).places] == ["shift"]
    assert lora_fx.certify(added, x)


def test_the_biases_of_torchs_own_recurrent_modules():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.LSTM(4, 3, batch_first=True)

        def forward(self, x):
            return self.net(x)[0]

    net, x = Net(), torch.randn(2, 5, 4)
    base = copy.deepcopy(net)
    lora_fx.apply(net, Rule(where="*", kind="bias"), x)
    assert {place.attribute for place in inventory(net).places} == {"bias_ih_l0", "bias_hh_l0"}
    assert torch.equal(net(x), base(x))
    fill(net)
    assert lora_fx.certify(net, x) and not torch.equal(net(x), base(x))


def test_dropout_needs_a_branch_input():
    lstm = nn.LSTM(4, 3, batch_first=True)
    with pytest.raises(PlanError, match="reads whole: there is no branch input to drop"):
        lora_fx.apply(lstm, Rule(where="*", kind="dora", rank=1, dropout=0.1), torch.randn(2, 5, 4))


def _row(**changes) -> Kind:
    return dataclasses.replace(LOHA, name="trial", **changes)


def _product(theta) -> torch.Tensor:
    return theta.B1 @ theta.A1 * (theta.B2 @ theta.A2)


WRONG = {
    "no identifier": (lambda: dataclasses.replace(LOHA, name="lo ha"), "no identifier"),
    "taken": (lambda: dataclasses.replace(LOHA, name="dora"), "of that name is registered"),
    "no delta": (lambda: _row(delta=None), "both delta and factors, or neither"),
    "both": (lambda: _row(factors=lambda theta: (theta.A1, theta.B1)), "both delta and factors, or neither"),
    "nowhere": (lambda: _row(adapts="norm"), "say 'weight' or 'bias'"),
    "factors of a bias": (
        lambda: _row(delta=None, factors=lambda theta: (theta.A1, theta.B1), adapts="bias"), "a bias has no factors",
    ),
    "no rank": (
        lambda: _row(delta=None, factors=lambda theta: (theta.A1, theta.B1), settings={}), "no required setting rank",
    ),
    "starts elsewhere": (
        lambda: _row(start=lambda theta, weight: [p.fill_(1) for p in (theta.A1, theta.B1, theta.A2, theta.B2)]),
        r"δ\(W, θ₀\) is not 0",
    ),
    "another shape": (lambda: _row(delta=lambda weight, theta: _product(theta).mT), "W comes as"),
    "a constant": (lambda: _row(delta=lambda weight, theta: weight * 0), "δ is 0 whatever θ is"),
    "no gradient": (
        lambda: _row(delta=lambda weight, theta: (theta.B1 @ theta.A1) * (theta.B2 @ theta.A2).detach()),
        "no gradient reaches A2, B2",
    ),
    "one dtype": (
        lambda: _row(delta=lambda weight, theta: _product(theta).float().to(weight.dtype)),
        "rounds to a narrower dtype",
    ),
    "random": (
        lambda: _row(delta=lambda weight, theta: _product(theta) * torch.rand(())),
        "another one each time",
    ),
    "writes": (
        lambda: _row(delta=lambda weight, theta: weight.mul_(1) and None), "it raises|δ is",
    ),
    "writes into W": (
        lambda: _row(delta=lambda weight, theta: _product(theta) + 0 * weight.mul_(1.25)), "δ writes into W or θ",
    ),
    "writes into θ": (
        lambda: _row(delta=lambda weight, theta: _product(theta) + 0 * theta.A1.detach().mul_(1.25).sum()),
        "δ writes into W or θ",
    ),
    "another in float32": (
        lambda: _row(delta=lambda weight, theta: _product(theta) * (1 + (weight.dtype == torch.float32) / 8)),
        "δ in float32 is off by",
    ),
    "two words": (
        lambda: _row(shapes=lambda space: {**LOHA.shapes(space), "C 1": (1,)}), "a tensor of θ cannot be called C 1",
    ),
    "raises": (lambda: _row(delta=lambda weight, theta: theta.C), "it raises AttributeError"),
    "reserved": (lambda: _row(shapes=lambda space: {"layout": (1,)}), "raises|cannot be called"),
    "no tensors": (lambda: _row(shapes=lambda space: {}), "names no tensor"),
    "a branch that doubles": (
        lambda: dataclasses.replace(kinds.DORA, name="trial", branch=lambda *use: 2 * kinds.DORA.branch(*use)),
        "its branch, or a gradient of it, is off by",
    ),
}  # fmt: skip


@pytest.mark.parametrize("wrong", list(WRONG))
def test_a_wrong_row_is_refused_and_the_table_is_what_it_was(wrong):
    make, said = WRONG[wrong]
    before = dict(KINDS)
    with pytest.raises(KindError, match=said), register_kind(make()):
        pass
    assert before == KINDS


def test_what_is_no_kind():
    with pytest.raises(KindError, match="is no Kind"):
        register_kind("loha")


def test_an_adapter_says_what_its_kind_has():
    with pytest.raises(KindError, match="rank=2 is no setting of the kind 'full'"):
        lora_fx.Adapter(Layout("oi", (3, 4)), kind="full", rank=2)
    with pytest.raises(KindError, match="needs rank"):
        lora_fx.Adapter(Layout("oi", (3, 4)), kind="dora")


def test_a_model_that_was_cast_still_runs_every_kind(kind):
    adapted = fill(lora_fx.apply(model(), rule(kind), IDS)).to(torch.bfloat16)
    (y,) = run(adapted, normalize_inputs(adapted, IDS))
    folded = lora_fx.fold(copy.deepcopy(adapted))
    assert y.dtype == torch.bfloat16 and verify(folded, adapted, IDS)


def test_a_feature_without_a_direction_is_refused_by_dora_on_apply_and_on_load(tmp_path):
    net, x = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)), torch.randn(2, 4)
    base = copy.deepcopy(net)
    lora_fx.save_adapter(lora_fx.apply(net, Rule(where="0", kind="dora", rank=1), x), tmp_path)
    with torch.no_grad():
        base[0].weight[1] = 0
    with pytest.raises(PlanError, match=r"0\.weight: an output feature of the weight is 0 throughout"):
        lora_fx.apply(base, Rule(where="0", kind="dora", rank=1), x)
    with pytest.raises(PlanError, match=r"0\.weight: with this θ of the kind 'dora' δ is not finite"):
        lora_fx.load_adapter(base, tmp_path, x)


# ── the laws, as whoever writes a kind tests them ────────────────────────────────────────────────────────────────────


@pytest.mark.laws
@pytest.mark.parametrize("name", ["lora", "dora", "adalora", "bias", "full", "loha"])
@settings(max_examples=80 if os.environ.get("LORA_FX_PROFILE") == "deep" else 3)
@given(data=st.data())
def test_the_laws_of_a_kind_over_random_models(name, data):
    with register_kind(LOHA):
        assert_kind(name, data)


@settings(max_examples=2, phases=[Phase.generate])
@given(data=st.data())
def test_the_laws_find_a_kind_that_is_wrong(data):
    calls = itertools.count()
    drifting = dataclasses.replace(
        LOHA, name="drifting", delta=lambda weight, theta: _product(theta) * (1 + next(calls))
    )
    KINDS["drifting"] = drifting  # past the trial, which finds it too
    try:
        with pytest.raises((AssertionError, LoraFxError)):
            assert_kind("drifting", data)
    finally:
        del KINDS["drifting"]


# ── what only a mutant would have noticed (`tests.mutants`) ──────────────────────────────────────────────────────────


class Uses(nn.Module):
    """A weight and a bias as a function reads them."""

    def __init__(self, function, *shapes: tuple[int, ...]) -> None:
        super().__init__()
        self.function = function
        self.w, self.b = (nn.Parameter(torch.randn(shape, dtype=torch.float64)) for shape in shapes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(x, self.w, self.b)


TOKENS = torch.tensor([[0, 3, 6], [6, 1, 3]])
READ = {
    "linear": (lambda x, w, b: F.linear(x, w, b), (3, 4), (5, 4), (5,)),
    "linear with a size of 0": (lambda x, w, b: F.linear(x, w, b), (3, 4), (5, 4), (5,)),
    "linear without a bias": (lambda x, w, b: F.linear(x, w).mul_(2) + b, (3, 4), (5, 4), (5,)),
    "square": (lambda x, w, b: x @ w + b, (3, 4), (4, 4), (4,)),
    "addmm": (lambda x, w, b: torch.addmm(b, x, w, beta=2), (3, 4), (4, 5), (5,)),
    "addmm times 3": (lambda x, w, b: torch.addmm(b, x, w, alpha=3), (3, 4), (4, 5), (5,)),
    "a slice": (lambda x, w, b: F.linear(x, w[1:4], b[1:4]), (3, 4), (5, 4), (5,)),
    "a slice of the inputs": (
        lambda x, w, b: F.linear(x, w[:, 2:], b) + F.linear(x, w[:, :4], b),
        (3, 4),
        (5, 6),
        (5,),
    ),
    "einsum": (lambda x, w, b: torch.einsum("bi,ihd->bhd", x, w) + b, (3, 4), (4, 2, 3), (3,)),
    "convolution": (lambda x, w, b: F.conv1d(x, w, b), (2, 4, 5), (6, 4, 3), (6,)),
    "groups": (lambda x, w, b: F.conv1d(x, w, b, groups=2), (2, 4, 5), (6, 2, 3), (6,)),
    "embedding": (lambda x, w, b: F.embedding(x, w) * b, None, (7, 4), (4,)),
    "tied": (lambda x, w, b: F.linear(F.embedding(x, w).tanh(), w, b), None, (7, 4), (7,)),
    "whole": (lambda x, w, b: F.bilinear(x, x, w, b), (3, 4), (5, 4, 4), (5,)),
    "experts": (lambda x, w, b: torch.bmm(x, w) + b, (2, 3, 4), (2, 4, 5), (5,)),
    "detached": (lambda x, w, b: F.linear(x, w, b) * F.linear(x, w.detach()), (3, 4), (5, 4), (5,)),
}


def canonical(sides: str, tensor: torch.Tensor) -> torch.Tensor:
    """(batch…, out, in), one axis at a time."""
    order = [k for side in "boi" for k, own in enumerate(sides) if own == side]
    size = [math.prod(n for n, own in zip(tensor.shape, sides, strict=True) if own == side) for side in "oi"]
    return tensor.permute(order).reshape(*(n for n, own in zip(tensor.shape, sides, strict=True) if own == "b"), *size)


def as_it_lay(sides: str, matrix: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    order = [k for side in "boi" for k, own in enumerate(sides) if own == side]
    return matrix.reshape([shape[k] for k in order]).permute([order.index(k) for k in range(len(order))])


def turned_by_hand(adapter, weight: torch.Tensor, scale: float) -> torch.Tensor:
    """W' with the paper's gradients: the norm is a constant."""
    theta, sides, W = dict(adapter.named_parameters()), adapter.layout.sides, canonical(adapter.layout.sides, weight)
    own = list(adapter.rows or range(W.shape[-2]))
    if adapter.kind.name == "full":
        turned = theta["weight"]
    else:
        V = W[..., own, :] + scale * theta["B"] @ theta["A"]
        turned = theta["magnitude"] * V / V.detach().square().sum(-1, keepdim=True).sqrt()
    return as_it_lay(sides, W.detach().index_copy(-2, torch.tensor(own), turned), weight.shape)


def read_with(use: str, kind: str) -> tuple[Uses, Adapter, torch.Tensor]:
    """Adapted without the check, which mends or refuses what the algebra got wrong."""
    torch.manual_seed(0)
    function, size, *shapes = READ[use]
    x = TOKENS if size is None else torch.randn(size, dtype=torch.float64, requires_grad=True)
    layer = Uses(function, *shapes)
    lora_fx.apply(layer, Rule(where="w", kind=kind, **SETTINGS[kind]), x.detach(), check=False)
    return fill(layer), inventory(layer).places[0].adapter, x


@pytest.mark.parametrize("kind", ["dora", "full"])
@pytest.mark.parametrize("use", list(READ))
def test_every_use_and_its_gradients_are_those_of_the_adapted_weight(use, kind):
    layer, adapter, x = read_with(use, kind)
    if kind == "dora" and "size of 0" in use:
        with torch.no_grad():
            adapter.magnitude[0] = 0
    inputs = [*adapter.parameters(), *([x] if x.requires_grad else [])]
    cotangent, pairs = torch.randn_like(layer(x)), []
    for again in (False, True):
        own = turned_by_hand(adapter, layer._parameters["w"], 3 / 2)
        outputs = layer(x), layer.function(x, own, layer._parameters["b"])
        first, second = (torch.autograd.grad(y, inputs, cotangent, create_graph=again) for y in outputs)
        pairs += [outputs, *zip(first, second, strict=True)]
    curved = [sum(g.square().sum() for g in own) for own in (first, second)]
    if curved[1].requires_grad:
        more = [torch.autograd.grad(c, inputs, allow_unused=True, materialize_grads=True) for c in curved]
        pairs += zip(*more, strict=True)
    for a, b in pairs:
        assert_same(a, b)


@pytest.mark.parametrize("use", list(READ))
def test_two_kinds_add_up_in_every_use(use):
    layer, dora, x = read_with(use, "dora")
    lora_fx.apply(layer, Rule(where="w", kind="full"), x.detach(), name="full", check=False)
    lora_fx.activate(fill(layer, share=0.3), "default", "full")
    W, full = layer._parameters["w"], next(a for a in inventory(layer).adapters if a is not dora)
    total = turned_by_hand(dora, W, 3 / 2) + turned_by_hand(full, W, 1.0) - W
    assert_same(layer(x), layer.function(x, total, layer._parameters["b"]))


@pytest.mark.parametrize("rows", [None, (1, 2), (0, 3), (1, 3)])
@pytest.mark.parametrize(("sides", "shape"), [("oi", (4, 4)), ("io", (3, 5)), ("boi", (2, 5, 3)), ("oii", (4, 3, 2))])
def test_dora_of_a_part_is_that_of_its_own_rows(sides, shape, rows):
    adapter = Adapter(Layout(sides, shape), kind="dora", rank=2, alpha=3, rows=rows, dtype=torch.float64)
    weight = torch.randn(shape, dtype=torch.float64)
    adapter.start(weight)
    assert not bool(adapter.delta(weight).any())
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.normal_()
        W = canonical(sides, weight)
        own = list(rows or range(W.shape[-2]))
        V = W[..., own, :] + 3 / 2 * adapter.B @ adapter.A
        wanted = torch.zeros_like(W)
        wanted[..., own, :] = adapter.magnitude * V / V.square().sum(-1, keepdim=True).sqrt() - W[..., own, :]
        assert_same(canonical(sides, adapter.delta(weight)), wanted)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(8, 24)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (t.unflatten(-1, (2, 4)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        return F.scaled_dot_product_attention(q, k, v)


@pytest.mark.parametrize("role", ["attention.key", "attention.key | attention.value"])
def test_dora_of_one_part_beside_its_matmul(role):
    torch.manual_seed(0)
    fused, x = Attention().double(), torch.randn(2, 5, 8, dtype=torch.float64)
    lora_fx.apply(fused, Rule(role=role, kind="dora", rank=2), x, check=False)
    fill(fused)
    total, base = reference.dense_weights(fused)["qkv.weight"], fused.qkv._parameters["weight"]
    assert torch.equal(total[:8], base[:8]) and not torch.equal(total[8:16], base[8:16])
    assert_same(fused.qkv(x), F.linear(x, total, fused.qkv.bias))


@pytest.mark.parametrize("use", ["linear", "convolution", "addmm"])
def test_dropout_of_dora_acts_on_its_branch_input_in_train_mode(use):
    """y = x·Wᵀ + (c − 1) ⊙ x̃·Wᵀ + c ⊙ s·x̃·Aᵀ·Bᵀ, x̃ after dropout, as PEFT has it."""
    torch.manual_seed(0)
    function, size, *shapes = READ[use]
    layer, x = Uses(function, *shapes), torch.randn(size, dtype=torch.float64)
    lora_fx.apply(layer, Rule(where="w", kind="dora", dropout=0.5, **SETTINGS["dora"]), x, check=False)
    W, b, adapter = layer._parameters["w"], layer._parameters["b"], inventory(fill(layer)).places[0].adapter
    whole = turned_by_hand(adapter, W, 3 / 2)
    assert_same(layer.eval()(x), function(x, whole, b))
    torch.manual_seed(3)
    found = layer.train()(x)
    torch.manual_seed(3)
    dropped = BranchDropout(0.5)(x)
    assert bool((dropped == 0).any())
    branch = function(dropped, whole, b) - function(dropped, W, b)
    assert_same(found, function(x, W, b) + branch)


def test_dropout_of_dora_on_an_embedding_takes_whole_tokens():
    ids = torch.arange(40)
    table = nn.Embedding(40, 6).double()
    fill(lora_fx.apply(table, Rule(where="*", kind="dora", rank=2, dropout=0.5), ids))
    base = table._parameters["weight"].detach()
    branch = table.eval()(ids) - base
    found = table.train()(ids)
    kept = (found != base).any(1)
    assert 0 < int(kept.sum()) < 40
    assert_same(found[kept], base[kept] + 2 * branch[kept])


def test_dropout_needs_a_branch_of_the_kind():
    layer, x = nn.Conv1d(4, 6, 3, groups=2), torch.randn(2, 4, 5)
    with pytest.raises(PlanError, match="conv reads whole: there is no branch input to drop"):
        lora_fx.apply(layer, Rule(where="*", kind="dora", rank=2, dropout=0.1), x)
    assert lora_fx.apply(layer, Rule(where="*", kind="dora", rank=2), x)


def test_the_plan_says_what_each_kind_trains_and_costs_and_how_it_folds():
    rules = [Rule(where="raw", kind="full"), Rule(where="twice", kind="bias"), Rule(where="up", kind="dora", rank=2)]
    plan = lora_fx.plan(model(), [*rules, Rule(where="embed", rank=2)], IDS)
    found = {row.name: (row.kind.name, row.parameters, row.schedule) for row in plan.rows}
    assert found == {
        "raw": ("full", 10 * 7, "weight + δ"),
        "twice.bias": ("bias", 8, "bias + δ"),
        "up.weight": ("dora", 2 * 6 + 10 * 2 + 10, "its own branch"),
        "embed.weight": ("lora", 2 * 11 + 6 * 2, "branch"),
    }
    lines = {line.split()[0]: line for line in str(plan).splitlines() if line}
    assert all(("exactly" in lines[name]) == (kind == "lora") for name, (kind, _, _) in found.items())
    assert all(("rounded once" in lines[name]) == (kind != "lora") for name, (kind, _, _) in found.items())


def test_a_feature_without_a_direction_is_refused():
    layer = nn.Linear(4, 3)
    with torch.no_grad():
        layer.weight[1] = 0
    state = reference.bits(layer)
    with pytest.raises(PlanError, match="it has no direction"):
        lora_fx.apply(layer, Rule(where="*", kind="dora", rank=2), torch.randn(2, 4))
    assert reference.same_bits(reference.bits(layer), state) and type(layer) is nn.Linear


def test_the_self_check_moves_theta_of_every_kind(monkeypatch):
    """A branch that is right at θ₀ alone."""
    twice = dataclasses.replace(kinds.DORA, branch=lambda *use: 2 * kinds.DORA.branch(*use), matmul=None)
    monkeypatch.setitem(KINDS, "dora", twice)
    refused(Rule(where="up", kind="dora", rank=2), EquivalenceError, "up")


@pytest.mark.parametrize("chosen", [*SETTINGS, "lora bias", "full bias", "dora bias", "lora full"])
def test_what_an_adapted_weight_makes_of_a_buffer_is_certified(chosen):
    """No input of the model is in it: nothing but the adapters tells a branch from what the model adds."""

    class Positions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w, self.b = nn.Parameter(torch.randn(4, 5)), nn.Parameter(torch.randn(5))
            self.register_buffer("table", torch.randn(7, 4))

        def forward(self, x):
            return x * (self.table @ self.w + self.b).tanh()

    torch.manual_seed(0)
    positions, x = Positions(), torch.randn(7, 5)
    names = chosen.split()
    for name in names:
        lora_fx.apply(positions, Rule(where="w", kind=name, **SETTINGS[name]), x, name=name)
    assert lora_fx.certify(fill(lora_fx.activate(positions, *names)), x)


# ── folds and the checks of them ─────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_sum_is_rounded_once(dtype):
    """1 + half a step and a hair: by way of float32 the hair is gone, and half a step goes to the even number, 1."""
    step = torch.finfo(dtype).eps
    layer = nn.Linear(2, 1).to(dtype)
    lora_fx.apply(layer, Rule(where="*", kind="bias"), torch.randn(1, 2, dtype=dtype))
    with torch.no_grad():
        layer._parameters["bias"].fill_(1)
        inventory(layer).places[0].adapter.shift.fill_(step / 2 * (1 + 2**-20))
    lora_fx.fold(layer)
    assert layer.bias.item() == 1 + step


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", ["dora", "full"])
def test_the_checks_find_every_element_that_is_one_step_off(kind, dtype):
    torch.manual_seed(0)
    layer = nn.Linear(6, 40).to(dtype)
    fill(lora_fx.apply(layer, Rule(where="*", kind=kind, **SETTINGS[kind]), torch.randn(2, 6, dtype=dtype)))
    ((name, adapters),) = inventory(layer).by_weight().items()
    before = layer._parameters[name].detach().clone()
    folded = getattr(lora_fx.fold(layer), name).detach()
    assert not len(oracles.misrounded(before, folded, adapters))
    for by in (-1, 1):
        off = oracles._step(folded, by)
        if dtype == torch.float64:  # which has no wider type: there a share of the largest element is left to rounding
            off = folded + by * 2.0**-38 * folded.abs().max()
        total = before.double() + oracles.delta(before, *adapters)
        lost = oracles.SHARE * (before.double().abs().max() + (total - before.double()).abs().max())
        seen = ((folded.double() + off.double()) / 2 - total).abs() > lost  # else it is a tie, as far as float64 knows
        assert int(seen.sum()) >= 0.95 * folded.numel()
        assert oracles.misrounded(before, off, adapters).tolist() == seen.reshape(-1).nonzero().squeeze(1).tolist()


def test_a_folded_weight_that_was_written_to_is_not_unfolded(kind):
    adapted = lora_fx.fold(fill(lora_fx.apply(model(), rule(kind), IDS)))
    with torch.no_grad():
        adapted.twice.bias.add_(1)
        adapted.twice.weight.add_(1)
    state = reference.bits(adapted)
    with pytest.raises(FoldError, match="has been written to"):
        lora_fx.unfold(adapted)
    assert reference.same_bits(reference.bits(adapted), state)


def test_an_unfold_cut_short_is_undone(kind, monkeypatch):
    adapted = fill(lora_fx.apply(model(), rule(kind), IDS))
    state = reference.bits(adapted)
    folded = reference.bits(lora_fx.fold(adapted))
    with monkeypatch.context() as patched:
        patched.setattr("lora_fx.passes.fold.marks.attach", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            lora_fx.unfold(adapted)
    assert reference.same_bits(reference.bits(adapted), folded)
    assert reference.same_bits(reference.bits(lora_fx.unfold(adapted)), state)


# ── the bias of a site ───────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "read", [lambda b: b.view(-1), lambda b: b.to(torch.float32), lambda b: b.to(torch.float32)[0]]
)
def test_a_bias_is_found_behind_views_and_casts(read):
    torch.manual_seed(0)
    layer, x = Uses(lambda x, w, b: F.linear(x, w, read(b)), (5, 4), (1, 5)).float(), torch.randn(3, 4)
    layer.b = nn.Parameter(layer.b.double())
    if read(layer.b).dtype == torch.float64:
        layer.float()
    base = copy.deepcopy(layer)
    fill(lora_fx.apply(layer, Rule(where="w", kind="bias"), x))
    assert [place.weight for place in inventory(layer).places] == ["b"]
    assert lora_fx.certify(layer, x) and not torch.equal(layer(x), base(x))


def test_a_part_of_a_weight_whose_bias_is_one_number_has_none_of_its_own():
    class Fused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w, self.b = nn.Parameter(torch.randn(8, 24)), nn.Parameter(torch.randn(1))

        def forward(self, x):
            q, k, v = (t.unflatten(-1, (2, 4)).transpose(1, 2) for t in (x @ self.w + self.b).chunk(3, -1))
            return F.scaled_dot_product_attention(q, k, v)

    fused, x = Fused(), torch.randn(2, 5, 8)
    with pytest.raises(PlanError, match=r"its bias has 1 elements for 24 features: no part of it is attention\.query"):
        lora_fx.apply(fused, Rule(role="attention.query", kind="bias"), x)
    fill(lora_fx.apply(fused, Rule(where="w", kind="bias"), x))
    assert lora_fx.certify(fused, x)


# ── files ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_saved_and_loaded_it_is_the_same_adapter(kind, tmp_path):
    adapted = fill(lora_fx.apply(model(), rule(kind), IDS))
    lora_fx.save_adapter(adapted, tmp_path, peft=False)
    loaded = lora_fx.load_adapter(model(), tmp_path, IDS)
    assert reference.same_bits(reference.bits(loaded), reference.bits(adapted)) and torch.equal(
        out(loaded), out(adapted)
    )
    ours, theirs = (inventory(m).places for m in (adapted, loaded))
    assert [(p.weight, p.adapter.kind, p.adapter.settings, p.adapter.rows) for p in ours] == [
        (p.weight, p.adapter.kind, p.adapter.settings, p.adapter.rows) for p in theirs
    ]


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning")
def test_dora_for_peft_and_back(tmp_path):
    peft = pytest.importorskip("peft")
    layers = [Rule(where="raw"), Rule(where="*", kind="dora", rank=2, alpha=3)]
    adapted = fill(lora_fx.apply(model(), layers, IDS))
    lora_fx.save_adapter(adapted, tmp_path)
    assert verify(peft.PeftModel.from_pretrained(model(), tmp_path).eval(), adapted, IDS)
    assert torch.equal(out(lora_fx.load_adapter(model(), tmp_path, IDS)), out(adapted))
    config = peft.LoraConfig(r=2, lora_alpha=3, use_dora=True, target_modules=["up", "embed", "conv", "twice"])
    theirs = peft.get_peft_model(model(), config).eval()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_" in name:
                parameter.add_(torch.randn_like(parameter) / 4)
    theirs.save_pretrained(tmp_path / "theirs")
    assert verify(theirs, lora_fx.load_adapter(model(), tmp_path / "theirs", IDS), IDS)


@pytest.mark.parametrize(
    ("rules", "said"),
    [
        (Rule(where="twice", kind="full"), "the kind 'full' is none of a LoRA file of PEFT's"),
        ([Rule(where="up", kind="dora", rank=2), Rule(where="twice", rank=2)], "kinds dora, lora, and PEFT keeps one"),
    ],
)
def test_what_peft_has_no_kind_for_is_refused(rules, said, tmp_path):
    adapted = lora_fx.apply(model(), rules, IDS)
    with pytest.raises(FileError, match=said):
        lora_fx.save_adapter(adapted, tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_dora_of_attention_is_refused_for_peft(tmp_path):
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, x):
            return self.attention(x, x, x, need_weights=False)[0]

    adapted = lora_fx.apply(Net(), Rule(where="*in_proj*", kind="dora", rank=2), torch.randn(2, 5, 8))
    with pytest.raises(FileError, match="PEFT has no DoRA for attention, which it adapts as attention"):
        lora_fx.save_adapter(adapted, tmp_path / "a")


def test_a_part_of_dora_is_refused_for_peft(tmp_path):
    adapted = lora_fx.apply(Attention(), Rule(role="attention.key", kind="dora", rank=2), torch.randn(2, 5, 8))
    with pytest.raises(FileError, match="it is a part of the weight, and PEFT's DoRA trains all sizes of it"):
        lora_fx.save_adapter(adapted, tmp_path / "a")


def test_dora_of_a_weight_that_another_module_reads_is_refused_for_peft(tmp_path):
    class Reader(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(6, 5)

        def forward(self, x):
            return F.linear(x, self.inner.weight, self.inner.bias)

    adapted = lora_fx.apply(Reader(), Rule(where="*", kind="dora", rank=2), torch.randn(2, 6))
    with pytest.raises(
        FileError, match="the model reads the weight of a module inside it, and PEFT adapts only calls of that module"
    ):
        lora_fx.save_adapter(adapted, tmp_path / "a")


@pytest.mark.onnx
def test_a_file_knows_the_settings_of_a_dense_kind():
    from lora_fx.export.onnx.weights import adapter_digest

    one, same, other = (Adapter(Layout("oi", (3, 4)), kind="dora", rank=2, alpha=alpha) for alpha in (1, 1, 2))
    assert adapter_digest({"w": [one]}) == adapter_digest({"w": [same]}) != adapter_digest({"w": [other]})


# ── the strategies ───────────────────────────────────────────────────────────────────────────────────────────────────


@settings(max_examples=2, database=None)
@given(st.data())
@pytest.mark.parametrize("kind", ["dora", "adalora", "full", "bias"])
def test_rules_and_theta_are_drawn_for_the_kind(kind, data):
    drawn, inputs = data.draw(models(dtypes=(torch.float64,), training=(False,)))
    rules = data.draw(rules_for(drawn, inputs, kinds=(kind,)))
    assert {r.kind for r in rules if not r.excludes} == {kind}
    lora_fx.apply(drawn, rules, inputs)
    before = {name: p.detach().clone() for name, p in drawn.named_parameters() if "_lora_" in name}
    data.draw(adapters())(drawn)
    assert all(not torch.equal(drawn.get_parameter(name), p) for name, p in before.items())
