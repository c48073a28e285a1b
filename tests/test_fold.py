"""Folding rounds once, in bounded memory, and unfolding gives every bit back."""

from __future__ import annotations

import copy
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import lora_fx
from lora_fx import Rule
from lora_fx.passes import fold as folding
from tests import reference

HALF = [torch.bfloat16, torch.float16]


def neighbours(value: torch.Tensor) -> list[torch.Tensor]:
    """The numbers of its dtype next to it, and itself."""
    bits = value.view(torch.int16)
    return [(bits + step).view(value.dtype) for step in (-1, 0, 1)]


@pytest.mark.parametrize("dtype", HALF)
@given(st.lists(st.floats(-60000, 60000, width=64), min_size=1, max_size=20), st.floats(0, 1, exclude_max=True))
def test_float64_is_rounded_to_the_nearest_even_once(dtype, values, between):
    exact = torch.tensor(values, dtype=torch.float64)
    grid = exact.to(dtype).double()  # and points a hair beside the midpoint of two grid numbers, where rounding twice fails
    step = (neighbours(exact.to(dtype))[2].double() - grid) * (0.5 + (between - 0.5) * 2**-30)
    exact = torch.cat([exact, grid + step])
    exact = exact[exact.abs() < torch.finfo(dtype).max]
    rounded = folding.round_once(exact, dtype)
    for x, r in zip(exact.tolist(), rounded, strict=True):
        distances = [abs(Fraction(float(n)) - Fraction(x)) for n in neighbours(r[None]) if bool(n.isfinite())]
        mine = abs(Fraction(float(r)) - Fraction(x))
        assert mine == min(distances)
        if distances.count(mine) > 1:
            assert int(r[None].view(torch.int16)) % 2 == 0


def test_torch_itself_rounds_twice():
    """Why `round_once` exists; when this fails, it can go."""
    just_above_a_midpoint = torch.tensor([1 + 2**-8 + 2**-40], dtype=torch.float64)
    assert float(just_above_a_midpoint.to(torch.bfloat16)) == 1.0
    assert float(folding.round_once(just_above_a_midpoint, torch.bfloat16)) == 1 + 2**-7


class Forms(nn.Module):
    """A weight in each kind of layout."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(23, 12)
        self.conv = nn.Conv1d(12, 18, 3, padding=1, groups=2)
        self.back = nn.ConvTranspose1d(18, 10, 3, padding=1)
        self.heads = nn.Parameter(torch.randn(10, 3, 4))
        self.experts = nn.Parameter(torch.randn(3, 5, 4))
        self.head = nn.Linear(5, 7)

    def forward(self, i):
        x = self.back(self.conv(self.embed(i).transpose(1, 2))).transpose(1, 2)
        x = torch.einsum("bti,ihd->bhtd", x, self.heads)
        return self.head(torch.tanh(x @ self.experts.transpose(1, 2)).sum(1))


IDS = torch.arange(10).reshape(2, 5)


def adapted(dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    model = Forms().to(dtype)
    lora_fx.apply(model, Rule(where="*", rank=3, alpha=5), IDS)
    reference.fill(model)
    return model


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALF], ids=str)
def test_folded_weights_are_the_rounded_sum_and_unfolded_ones_the_old_bits(dtype):
    model = adapted(dtype)
    state, sums = reference.bits(model), reference.dense_weights(model)
    lora_fx.fold(model)
    for name, total in sums.items():
        folded = model.get_parameter(name).detach()
        if dtype == torch.float64:  # the reference is no wider: its sum of rank + 1 terms is rounded in another order
            assert float((folded - total).abs().max()) <= 4 * torch.finfo(dtype).eps * float(total.abs().max())
        else:
            assert torch.equal(folded, folding.round_once(total, dtype)), name
    for _ in range(3):
        lora_fx.unfold(model)
        assert reference.same_bits(reference.bits(model), state)
        lora_fx.fold(model)
    lora_fx.unfold(model)
    assert reference.same_bits(reference.bits(model), state)


@pytest.mark.parametrize("rows", [1, 2, 7])
def test_blocks_make_no_difference(monkeypatch, rows):
    whole, blocks = adapted(torch.float64), adapted(torch.float64)
    lora_fx.fold(whole)
    monkeypatch.setattr(folding, "_BLOCK", rows)
    lora_fx.fold(blocks)
    for name, a in whole.named_parameters():
        b = blocks.get_parameter(name)
        # a matmul of other rows may sum in another order: one rounding of the product
        assert float((a - b).abs().max()) <= 4 * torch.finfo(a.dtype).eps * float(a.abs().max())


def test_fold_of_a_copy_leaves_the_model_alone():
    model = adapted(torch.float32)
    state, classes = reference.bits(model), reference.classes(model)
    folded = lora_fx.fold(model, copy=True)
    assert folded is not model and type(folded) is Forms and type(folded.head) is nn.Linear
    assert reference.same_bits(reference.bits(model), state) and reference.classes(model) == classes
    assert lora_fx.verify(model, folded, IDS)


def test_several_adapters_fold_into_one_sum_and_inactive_ones_stay_out():
    model = adapted(torch.float64)
    lora_fx.apply(model, Rule(where="head", rank=2, alpha=7), IDS, name="second")
    lora_fx.apply(model, Rule(where="head", rank=1), IDS, name="idle")
    reference.fill(model)
    lora_fx.activate(model, "default", "second")
    sums = reference.dense_weights(model)
    before = lora_fx.verification.run(model, lora_fx.frontend.normalize_inputs(model, IDS))
    lora_fx.fold(model)
    assert torch.equal(model.head.weight.detach(), sums["head.weight"])
    lora_fx.unfold(model)
    assert set(lora_fx.adapters(model)) == {"default", "second", "idle"}
    after = lora_fx.verification.run(model, lora_fx.frontend.normalize_inputs(model, IDS))
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_final_fold_keeps_nothing():
    model = lora_fx.fold(adapted(torch.float32), final=True)
    plain = Forms()
    assert [sorted(m.__dict__) for m in model.modules()] == [sorted(m.__dict__) for m in plain.modules()]
    assert list(model.state_dict()) == list(plain.state_dict())
    lora_fx.apply(model, Rule(where="head", rank=2), IDS)  # the folded model is a base like any other


def test_a_folded_model_can_be_copied_and_still_unfolded():
    model = adapted(torch.bfloat16)
    state = reference.bits(model)
    twin = copy.deepcopy(lora_fx.fold(model))
    lora_fx.unfold(twin)
    assert reference.same_bits(reference.bits(twin), state)
    assert not reference.same_bits(reference.bits(model), state)  # the copy shares nothing
