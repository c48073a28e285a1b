"""Kinds: W' = W + Σ δ(W, θ), whatever δ is. Their laws over random models and the zoo are in the files of the laws."""

from __future__ import annotations

import copy
import dataclasses
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lora_fx
from lora_fx import Adapter, LoraFxError, Rule
from lora_fx.checks import oracles
from lora_fx.checks.verification import compare, run, verify
from lora_fx.deltas import kinds
from lora_fx.deltas.kinds import KINDS
from lora_fx.errors import EquivalenceError, FoldError, KindError, PlanError, RuleError
from lora_fx.graph.capture import normalize_inputs
from lora_fx.graph.layout import Layout
from lora_fx.model.inventory import inventory
from tests import reference
from tests.kinds import IDS, SETTINGS, fill, model, out, refused, rule


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


# ── what only a mutant would have noticed (`tests.mutants`) ──────────────────────────────────────────────────────────


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


# ── files ────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.onnx
def test_a_file_knows_the_settings_of_a_dense_kind():
    from lora_fx.export.onnx.weights import adapter_digest

    one, same, other = (Adapter(Layout("oi", (3, 4)), kind="dora", rank=2, alpha=alpha) for alpha in (1, 1, 2))
    assert adapter_digest({"w": [one]}) == adapter_digest({"w": [same]}) != adapter_digest({"w": [other]})
