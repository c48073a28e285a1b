"""Kinds from outside: what `register_kind` takes and refuses, and the laws as whoever writes a kind tests them."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import os
import pickle

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

import lora_fx
from lora_fx import Kind, LoraFxError, Rule, register_kind
from lora_fx.checks.verification import verify
from lora_fx.deltas import kinds
from lora_fx.deltas.kinds import KINDS, REQUIRED
from lora_fx.errors import KindError
from lora_fx.testing import adapters, assert_kind, models, rules_for
from tests.kinds import IDS, fill, model, out

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
