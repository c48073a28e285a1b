"""PiSSA and OLoRA: starts in what the weight is made of, W left as it is, held against the papers' own arithmetic."""

from __future__ import annotations

import copy
import os

import peft
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import lora_fx
from lora_fx import LoraFxError, Rule
from lora_fx.checks.verification import compare, noise_floor
from lora_fx.deltas.kind_registration import _BIASES, _WEIGHTS, _Trial
from lora_fx.deltas.kinds import KINDS, kind_named
from lora_fx.model.inventory import inventory
from lora_fx.testing import assert_folds_exactly, assert_kind
from tests import reference

ROUND = 2.0**-53
DEEP = os.environ.get("LORA_FX_PROFILE") == "deep"
NAMES = ("pissa", "olora")


def net(dtype: torch.dtype = torch.float64) -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 5)).to(dtype), torch.randn(4, 6, dtype=dtype)


def trained(model: nn.Module, x: torch.Tensor, steps: int = 3) -> nn.Module:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()
    return model


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=20 if DEEP else 2)
@given(data=st.data())
def test_the_laws_of_a_kind_hold_over_random_models(name, data):
    assert_kind(name, data)


@pytest.mark.parametrize("name", NAMES)
def test_they_stand_the_trial_of_a_kind(name):
    trial = _Trial(kind_named(name), {"rank": 2, "alpha": 3})
    for layout in _WEIGHTS:
        for rows in (None, (1, 2), (0, 3)):
            trial.judge(layout, rows)
    assert _BIASES and name in KINDS


@pytest.mark.parametrize("alpha", [3, -5])
@pytest.mark.parametrize("scaling", ["standard", "rslora"])
def test_pissa_starts_at_the_nearest_of_its_rank(alpha, scaling):
    model, x = net()
    lora_fx.apply(model, Rule(where="*", kind="pissa", rank=2, alpha=alpha, scaling=scaling), x)
    for place in inventory(model).places:
        a, W = place.adapter, place.parameter.detach()
        sizes = torch.linalg.svdvals(W)
        rest = (W - a.scale * a.B0 @ a.A0).detach().norm()
        assert abs(float(rest - sizes[2:].norm())) <= 8 * sum(W.shape) * ROUND * float(sizes.sum())
        assert torch.equal(a.A, a.A0) and torch.equal(a.B, a.B0)
        assert [n for n, p in a.named_parameters() if p.requires_grad] == ["A", "B"]


def test_olora_starts_at_the_first_of_q_and_r():
    model, x = net()
    lora_fx.apply(model, Rule(where="*", kind="olora", rank=3, alpha=2), x)
    for place in inventory(model).places:
        a, W = place.adapter, place.parameter.detach()
        noise = 8 * sum(W.shape) * ROUND * float(W.norm())
        assert float((a.B0.mT @ a.B0 - torch.eye(3)).detach().norm()) <= noise + 24 * ROUND
        assert float((a.B0.mT @ W - a.A0).detach().norm()) <= 2 * noise and not bool(a.A0.tril(-1).any())


@pytest.mark.parametrize("name", NAMES)
def test_training_is_that_of_the_papers_with_their_changed_base(name):
    """W_res + s·B·A with W_res = W − s·B₀·A₀, in plain torch: the same parameters after the same steps."""
    model, x = net()
    ours = lora_fx.apply(copy.deepcopy(model), Rule(where="*", kind=name, rank=2, alpha=3), x)
    start = {p.weight: (p.adapter.A0.detach(), p.adapter.B0.detach()) for p in inventory(ours).places}
    plain = {n: p.detach() for n, p in model.named_parameters()}

    def by_hand(dtype: torch.dtype) -> dict[str, list[torch.Tensor]]:
        own = {w: [t.to(dtype).clone().requires_grad_() for t in pair] for w, pair in start.items()}
        optimizer = torch.optim.SGD([t for pair in own.values() for t in pair], lr=0.1)
        for _ in range(5):
            optimizer.zero_grad()
            y = x.to(dtype)
            for n in ("0", "2"):
                (A0, B0), (A, B), W = start[f"{n}.weight"], own[f"{n}.weight"], plain[f"{n}.weight"]
                y = F.linear(y, (W - 1.5 * B0 @ A0).to(dtype), plain[f"{n}.bias"].to(dtype)) + 1.5 * y @ A.T @ B.T
                y = y.tanh() if n == "0" else y
            y.square().sum().backward()
            optimizer.step()
        return own

    exact, rounded = by_hand(torch.float64), by_hand(torch.float32)
    trained(ours, x, 5)
    for place in inventory(ours).places:
        for t, wanted, moved, first in zip(
            (place.adapter.A, place.adapter.B),
            exact[place.weight],
            rounded[place.weight],
            start[place.weight],
            strict=True,
        ):
            t, wanted = t.detach(), wanted.detach()
            # what float32 makes of it says how much a rounding grows in these steps; here it is float64's
            noise = noise_floor(wanted, moved.detach()) * 2.0**-29
            assert compare(t, wanted, wanted, noise, torch.float64)
            assert not compare(t, first, wanted, noise, torch.float64), "nothing has moved"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", NAMES)
def test_the_base_is_never_written_and_comes_back(name, dtype):
    model, x = net(dtype)
    base = copy.deepcopy(model)
    lora_fx.apply(model, Rule(where="*", kind=name, rank=2, alpha=3), x)
    assert torch.equal(model(x), base(x))
    trained(model, x)
    assert not torch.equal(model(x), base(x))
    own = {n: t for n, t in reference.bits(model).items() if "_lora_" not in n}
    assert reference.same_bits(own, reference.bits(base))
    assert_folds_exactly(model, x)
    lora_fx.remove(model, "default")
    assert reference.same_bits(reference.bits(model), reference.bits(base))


@pytest.mark.parametrize("name", NAMES)
def test_a_state_dict_resumes_to_the_bit(name):
    model, x = net(torch.float32)
    rule = Rule(where="*", kind=name, rank=2, alpha=3)
    again = lora_fx.apply(copy.deepcopy(model), rule, x)
    lora_fx.apply(model, rule, x)
    trained(model, x)
    again.load_state_dict(copy.deepcopy(model.state_dict()))
    for one in (model, again):
        trained(one, x)
    assert reference.same_bits(reference.bits(model), reference.bits(again))


@pytest.mark.parametrize("name", NAMES)
def test_files_are_plain_lora_of_twice_the_rank_on_the_base_that_was(name, tmp_path):
    base, x = net(torch.float32)
    rules = Rule(where="*", kind=name, rank=2, alpha=3, scaling="rslora")
    model = trained(lora_fx.apply(copy.deepcopy(base), rules, x), x)
    lora_fx.save_adapter(model, tmp_path / "peft")
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "peft")
    assert theirs.peft_config["default"].r == 4 and theirs.peft_config["default"].init_lora_weights is True
    assert lora_fx.verify(model, theirs, x)
    ours = lora_fx.load_adapter(copy.deepcopy(base), tmp_path / "peft", x)
    assert torch.equal(ours(x), model(x)) and {a.kind.name for a in inventory(ours).adapters} == {"lora"}
    lora_fx.save_adapter(model, tmp_path / "own", peft=False)
    same = lora_fx.load_adapter(copy.deepcopy(base), tmp_path / "own", x)
    assert reference.same_bits(reference.bits(same), reference.bits(model))
    for one in (model, same):
        trained(one, x)
    assert reference.same_bits(reference.bits(same), reference.bits(model))


def test_it_starts_where_peft_starts():
    base, x = net(torch.float32)
    model = lora_fx.apply(copy.deepcopy(base), Rule(where="*", kind="pissa", rank=2, alpha=3), x)
    config = peft.LoraConfig(r=2, lora_alpha=3, target_modules=["0", "2"], init_lora_weights="pissa")
    theirs = peft.get_peft_model(copy.deepcopy(base), config).base_model.model
    for place in inventory(model).places:
        a, layer = place.adapter, theirs[int(place.weight[0])]
        wanted, S = layer.get_delta_weight("default"), torch.linalg.svdvals(place.parameter)
        # two decompositions in float32, cut where the gap is (Wedin 1972)
        noise = 8 * sum(wanted.shape) * 2.0**-24 * float(S.norm()) * float(S[0] / (S[1] - S[2]))
        assert float((a.scale * a.B0 @ a.A0 - wanted).detach().norm()) <= noise


def test_rounds_of_subspace_iteration_come_near():
    torch.manual_seed(0)
    model, x = nn.Linear(40, 30).double(), torch.randn(3, 40, dtype=torch.float64)
    U, _, V = torch.linalg.svd(model.weight.detach(), full_matrices=False)
    S = 0.5 ** torch.arange(30, dtype=torch.float64)
    model.weight.data = U * S @ V
    found = []
    for niter in (0, 8):
        own = lora_fx.apply(copy.deepcopy(model), Rule(where="*", kind="pissa", rank=4, settings={"niter": niter}), x)
        (a,) = inventory(own).adapters
        found.append(float((model.weight - a.scale * a.B0 @ a.A0).detach().norm() / S[4:].norm()))
    # what is lost of a direction falls by (σ₅ / σ₄)² = 1 / 4 in each round (Halko, Martinsson and Tropp 2011)
    assert 1 - 2.0**-40 <= found[1] <= 1 + 2.0**-14 and found[1] < found[0]


@pytest.mark.parametrize(
    "options, reason",
    [
        ({"kind": "pissa", "alpha": 0}, "its scale is 0"),
        ({"kind": "pissa", "settings": {"niter": -1}}, "niter=-1 is no number of rounds"),
        ({"kind": "pissa", "settings": {"rounds": 1}}, "rounds=1 is no setting"),
        ({"kind": "pissa", "init": "gaussian"}, "init='gaussian' is no setting"),
        ({"init": "pissa_niter_4"}, "say kind='pissa'; for pissa_niter_4 also"),
        ({"init": "olora"}, "say kind='olora'"),
    ],
)
def test_what_is_no_such_start_is_refused(options, reason):
    model, x = net()
    before = reference.bits(model)
    with pytest.raises(LoraFxError, match=reason):
        lora_fx.apply(model, Rule(where="*", rank=2, **options), x)
    assert reference.same_bits(reference.bits(model), before)
