"""Folding rounds once, in bounded memory, and unfolding gives every bit back."""

from __future__ import annotations

import copy
import itertools
import math
import pickle
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import lora_fx
from lora_fx import Rule
from lora_fx.deltas import ahead as looking_ahead
from lora_fx.deltas import exact_sum
from lora_fx.deltas.exact_sum import ExactSum, Tile, folded_weight
from lora_fx.deltas.low_rank import LowRank
from lora_fx.deltas.rounding import INTEGERS, Scratch, round_once
from lora_fx.graph.layout import Layout
from lora_fx.model import marks
from lora_fx.passes import fold as folding
from lora_fx.passes.fold import kept_bytes
from tests import reference
from tests.waits import Waits

HALF = [torch.bfloat16, torch.float16]


def neighbours(value: torch.Tensor) -> list[torch.Tensor]:
    """The numbers of its dtype next to it, and itself."""
    bits = value.view(torch.int16)
    return [(bits + step).view(value.dtype) for step in (-1, 0, 1)]


@pytest.mark.parametrize("dtype", HALF)
@given(st.lists(st.floats(-60000, 60000, width=64), min_size=1, max_size=20), st.floats(0, 1, exclude_max=True))
def test_float64_is_rounded_to_the_nearest_even_once(dtype, values, between):
    exact = torch.tensor(values, dtype=torch.float64)
    grid = exact.to(
        dtype
    ).double()  # and points a hair beside the midpoint of two grid numbers, where rounding twice fails
    step = (neighbours(exact.to(dtype))[2].double() - grid) * (0.5 + (between - 0.5) * 2**-30)
    exact = torch.cat([exact, grid + step])
    exact = exact[exact.abs() < torch.finfo(dtype).max]
    rounded = round_once(exact, dtype)
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
    assert float(round_once(just_above_a_midpoint, torch.bfloat16)) == 1 + 2**-7


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
def test_folded_weights_are_the_rounded_sum_and_unfolded_ones_the_old_bits(dtype, either_way):
    model = adapted(dtype)
    state, sums = reference.bits(model), reference.dense_weights(model)
    lora_fx.fold(model)
    for name, total in sums.items():
        folded = model.get_parameter(name).detach()
        if dtype == torch.float64:  # the reference is no wider: its sum of rank + 1 terms is rounded in another order
            assert float((folded - total).abs().max()) <= 4 * torch.finfo(dtype).eps * float(total.abs().max())
        else:
            assert torch.equal(folded, round_once(total, dtype)), name
    for _ in range(3):
        lora_fx.unfold(model)
        assert reference.same_bits(reference.bits(model), state)
        lora_fx.fold(model)
    lora_fx.unfold(model)
    assert reference.same_bits(reference.bits(model), state)


def grid(value: float, dtype: torch.dtype) -> list[float]:
    """The numbers of `dtype` around a value, by stepping through its bits."""
    near = torch.tensor([value], dtype=torch.float64).to(dtype)
    integers = {2: torch.int16, 4: torch.int32}[dtype.itemsize]
    around = [float((near.view(integers) + step).view(dtype)) for step in (-2, -1, 0, 1, 2)]
    return [x for x in around if math.isfinite(x)]


@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
@pytest.mark.parametrize("kind", ["ordinary", "near ties", "cancelling"])
def test_every_folded_element_is_the_real_sum_rounded_once(dtype, either_way, kind):
    """Against fractions: an oracle with no rounding in it at all."""
    torch.manual_seed(0)
    layer = nn.Linear(40, 24, bias=False).to(dtype)
    lora_fx.apply(layer, Rule(where="*", rank=3, alpha=2), torch.randn(2, 40).to(dtype))
    adapter = layer.weight_lora_default
    reference.fill(layer)
    if kind == "near ties":  # W + half a step, give or take what only many bits can see
        with torch.no_grad():
            half_step = torch.finfo(dtype).eps / 2
            layer.weight.copy_((1 + torch.rand(24, 40)).to(dtype))
            adapter.A[0], adapter.B[:, 0] = half_step, 1.5  # the scale is 2/3
            adapter.A[1:] *= 2.0**-45
    elif kind == "cancelling":
        with torch.no_grad():
            layer.weight.copy_(-(adapter.delta(layer._parameters["weight"]) * (1 + 1e-3 * torch.rand(24, 40))))
    W, A, B = ([[Fraction(x) for x in row] for row in t.tolist()] for t in (layer.weight, adapter.A, adapter.B))
    lora_fx.fold(layer)
    for o, row in enumerate(layer.weight.tolist()):
        for i, folded in enumerate(row):
            exact = W[o][i] + Fraction(adapter.scale) * sum(B[o][k] * A[k][i] for k in range(3))
            assert abs(Fraction(folded) - exact) == min(abs(Fraction(g) - exact) for g in grid(folded, dtype))


@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
@pytest.mark.parametrize(("size", "most"), [(0.01, 0.2), (0.1, 0.7), (1.0, 1.0)])
def test_the_way_back_costs_less_than_a_byte_an_element(dtype, either_way, size, most):
    """`size`: the delta relative to the weights, in root mean square."""
    torch.manual_seed(0)
    layer = nn.Linear(300, 200, bias=False).to(dtype)
    lora_fx.apply(layer, Rule(where="*", rank=4), torch.randn(2, 300).to(dtype))
    reference.fill(layer)
    adapter = layer.weight_lora_default
    with torch.no_grad():
        adapter.B.mul_(size * layer.weight.float().norm() / adapter.delta(layer._parameters["weight"]).norm())
    before = reference.bits(layer)
    lora_fx.fold(layer)
    assert kept_bytes(layer) <= most * layer.weight.numel()
    lora_fx.unfold(layer)
    assert reference.same_bits(reference.bits(layer), before)


def test_zeros_of_both_signs_and_subnormals_come_back(either_way):
    layer = nn.Linear(8, 6, bias=False)
    with torch.no_grad():
        layer.weight[:, ::2] = torch.tensor([0.0, -0.0, 1e-45, -1e-40]).repeat(6, 1)
    lora_fx.apply(layer, Rule(where="*", rank=2), torch.randn(2, 8))
    reference.fill(layer)
    before = reference.bits(layer)
    lora_fx.unfold(lora_fx.fold(layer))
    assert reference.same_bits(reference.bits(layer), before)


@pytest.mark.parametrize("change", [lambda w: w.add_(1.0), lambda w: w[0, 0].mul_(1.0001)])
def test_unfolding_refuses_a_weight_that_was_written_to(change):
    model = adapted(torch.float32)
    lora_fx.fold(model)
    with torch.no_grad():
        change(model.head.weight)
    state = reference.bits(model)
    with pytest.raises(lora_fx.LoraFxError, match=r"head\.weight: the folded weight has been written to"):
        lora_fx.unfold(model)
    assert reference.same_bits(reference.bits(model), state)


@pytest.mark.parametrize("change", [lambda w: w.add_(1.0), lambda w: setattr(w, "data", w.data.double())])
def test_unfolding_refuses_a_copy_of_a_tied_weight_that_was_written_to(change):
    model = nn.Sequential(nn.Embedding(9, 6), nn.Linear(6, 9))
    model[1].weight = model[0].weight
    lora_fx.apply(model, Rule(role="lm_head", rank=2), torch.arange(5)[None])
    reference.fill(model)
    lora_fx.fold(model)
    assert model[1].weight is not model[0].weight
    with torch.no_grad():
        change(model[1].weight)
    state = reference.bits(model)
    with pytest.raises(lora_fx.LoraFxError, match=r"1\.weight: the folded weight has been written to"):
        lora_fx.unfold(model)
    assert reference.same_bits(reference.bits(model), state)


def test_training_an_adapter_that_is_put_away_changes_nothing():
    model = adapted(torch.float32)
    factor = model.head.weight_lora_default.B
    state = reference.bits(model)
    lora_fx.fold(model)
    with torch.no_grad():
        factor.add_(1.0)
    lora_fx.unfold(model)
    after = reference.bits(model)
    assert torch.equal(after.pop("head.weight_lora_default.B"), state.pop("head.weight_lora_default.B") + 1)
    assert reference.same_bits(after, state)


@pytest.mark.parametrize(("dtype", "exponent"), [(torch.float32, -25), (torch.bfloat16, -9), (torch.float16, -12)])
@pytest.mark.parametrize("towards", [-1, 1])
def test_unfolding_is_exact_in_whatever_order_the_sums_are_taken(monkeypatch, either_way, dtype, exponent, towards):
    """W = 1, D = 2^exponent: W' − D lies between two numbers, and the last bit of D decides."""
    model = lora_fx.apply(nn.Linear(5, 3, bias=False, dtype=dtype), Rule(where="*", rank=1), torch.ones(1, 5).to(dtype))
    with torch.no_grad():
        model.weight.fill_(1)
        model.weight_lora_default.A.fill_(2.0**exponent)
        model.weight_lora_default.B.fill_(1)
    state = reference.bits(model)
    lora_fx.fold(model)
    real, last_bit = Tile.delta, 2.0**-53 * (1 + 2.0**exponent)
    monkeypatch.setattr(Tile, "delta", lambda *args: real(*args) + towards * last_bit)
    assert reference.same_bits(reference.bits(lora_fx.unfold(model)), state)


@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
def test_zeros_are_folded_without_fractions(monkeypatch, either_way, dtype):
    """Pruned weights and unused rows lie on a border, yet there is nothing to doubt."""
    model = lora_fx.apply(nn.Linear(9, 7, bias=False, dtype=dtype), Rule(where="*", rank=2), torch.ones(1, 9).to(dtype))
    reference.fill(model)
    with torch.no_grad():
        model.weight[:4] = 0
        model.weight_lora_default.B[2:6] = 0
    sums = reference.dense_weights(model)
    monkeypatch.setattr(ExactSum, "nearest", lambda *_: pytest.fail("summed as fractions"))
    assert torch.equal(lora_fx.fold(model).weight, round_once(sums["weight"], dtype))
    assert not bool(model.weight[2:4].signbit().any())


@pytest.mark.parametrize("rows", [1, 2, 7])
def test_blocks_make_no_difference(monkeypatch, either_way, rows):
    whole, blocks = adapted(torch.float64), adapted(torch.float64)
    lora_fx.fold(whole)
    monkeypatch.setattr(exact_sum, "_BLOCK", rows)
    lora_fx.fold(blocks)
    assert reference.same_bits(reference.bits(whole), reference.bits(blocks))


@pytest.mark.parametrize("final", [False, True], ids=["undoable", "final"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALF], ids=str)
def test_tiles_make_no_difference(monkeypatch, dtype, final):
    """Blocks of several tiles, the last ones shorter, with sums in some of them that float64 cannot decide."""
    model = of_many_blocks(dtype, 3)
    with torch.no_grad():  # in other rows, too
        for layer in model:
            layer.weight[5], layer.weight_lora_default.B[5] = layer.weight[0], layer.weight_lora_default.B[0]
    state, whole = reference.bits(model), reference.bits(lora_fx.fold(model, copy=True, final=final))
    monkeypatch.setattr(folding, "_UNDOABLE", 0)
    monkeypatch.setattr(exact_sum, "_BLOCK", 400)
    monkeypatch.setattr(exact_sum, "_TILE", 96)
    lora_fx.fold(model, final=final)
    assert reference.same_bits(reference.bits(model), whole)
    if not final:
        assert reference.same_bits(reference.bits(lora_fx.unfold(model)), state)


@pytest.mark.parametrize("sides", ["oi", "io", "ooi"])
@pytest.mark.parametrize("rank", [1, 2, 256])
@pytest.mark.parametrize("numbers", ["normal", "subnormal"])
@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
def test_sums_in_the_middle_of_two_numbers_or_a_hair_beside(monkeypatch, dtype, numbers, rank, sides):
    """Half a step more than W, and 2⁻⁷⁰ of a step more or less, with a strength of 2⁴⁰; of rank 256 most components
    are large, and cancel."""
    monkeypatch.setattr(exact_sum, "_BLOCK", 100)
    monkeypatch.setattr(exact_sum, "_TILE", 40)
    torch.manual_seed(0)
    rows, width, info = 15, 12, torch.finfo(dtype)
    step = info.eps if numbers == "normal" else info.smallest_normal * info.eps
    weight = (torch.randint(0, 100, (rows, width)).double() * step + (numbers == "normal")).to(dtype)
    size = (rows, width) if sides == "io" else (width, rows)
    shape = (5, 3, width) if sides == "ooi" else (rows, width)
    A, B = torch.zeros(rank, size[0]).double(), torch.zeros(size[1], rank).double()
    A[0], B[:, 0] = step / 2, torch.randint(-2, 3, (size[1],)) * 2.0**-40
    if rank > 1:
        A[1], B[:, 1] = step * 2.0**-70, torch.randint(-1, 2, (size[1],)) * 2.0**-40
    A[2:], B[:, 2:] = step * torch.randn(rank - 2, size[0]) if rank > 2 else 0, 2.0**-40
    A[3::2] = -A[2::2]
    delta = LowRank(Layout(sides, shape), A, B, 2.0**40, rank)
    folded = folded_weight(weight.view(shape), [delta], dtype, "w").view(rows, width)
    small = [[Fraction(float(a)) for a in A[:2, i]] for i in range(size[0])]  # the others cancel
    for n, m in itertools.product(range(rows), range(width)):
        o, i = (m, n) if sides == "io" else (n, m)
        added = sum(a * Fraction(float(b)) for a, b in zip(small[i], B[o, :2], strict=False)) * 2**40
        exact, got = Fraction(float(weight[n, m])) + added, folded[n, m]
        around = [Fraction(x) for x in grid(float(got), dtype)]
        best = min(abs(x - exact) for x in around)
        assert abs(Fraction(float(got)) - exact) == best
        if sum(abs(x - exact) == best for x in around) == 2:
            assert int(got.view(INTEGERS[dtype.itemsize])) % 2 == 0, "a tie goes to the even one"


def test_fold_of_a_copy_leaves_the_model_alone():
    model = adapted(torch.float32)
    state, classes = reference.bits(model), reference.classes(model)
    folded = lora_fx.fold(model, copy=True)
    assert folded is not model and type(folded) is Forms and type(folded.head) is nn.Linear
    assert reference.same_bits(reference.bits(model), state) and reference.classes(model) == classes
    assert lora_fx.verify(model, folded, IDS)


def test_several_adapters_fold_into_one_sum_and_inactive_ones_stay_out(either_way):
    model = adapted(torch.float32)
    lora_fx.apply(model, Rule(where="head", rank=2, alpha=7), IDS, name="second")
    lora_fx.apply(model, Rule(where="head", rank=1), IDS, name="idle")
    reference.fill(model)
    lora_fx.activate(model, "default", "second")
    sums = reference.dense_weights(model)
    before = lora_fx.checks.verification.run(model, lora_fx.graph.capture.normalize_inputs(model, IDS))
    lora_fx.fold(model)
    assert torch.equal(model.head.weight.detach(), sums["head.weight"].float())
    lora_fx.unfold(model)
    assert set(lora_fx.adapters(model)) == {"default", "second", "idle"}
    after = lora_fx.checks.verification.run(model, lora_fx.graph.capture.normalize_inputs(model, IDS))
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_a_thousand_switches_lose_nothing(dtype=torch.bfloat16):
    layer = nn.Linear(12, 9, bias=False).to(dtype)
    x = torch.randn(2, 12).to(dtype)
    for name in ("one", "two"):
        lora_fx.apply(layer, Rule(where="*", rank=2), x, name=name)
    reference.fill(layer)
    lora_fx.activate(layer, "one")
    before = reference.bits(layer)
    first = lora_fx.switch(layer, "one").weight.detach().clone()
    for n in range(1000):
        lora_fx.switch(layer, "two" if n % 2 == 0 else "one")
    assert torch.equal(layer.weight.detach(), first)
    lora_fx.unfold(layer)
    assert reference.same_bits(reference.bits(layer), before)
    with pytest.raises(lora_fx.LoraFxError, match="'three'"):
        lora_fx.switch(layer, "three")


def test_final_fold_keeps_nothing(either_way):
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


def test_a_model_that_was_folded_and_pickled_before_copies_had_checksums_is_unfolded():
    model = adapted(torch.bfloat16)
    state = reference.bits(model)
    for module in lora_fx.fold(model).modules():
        if (record := marks.fold_record(module)) is not None:
            del vars(record)["copies"]
    lora_fx.unfold(twin := pickle.loads(pickle.dumps(model)))
    assert reference.same_bits(reference.bits(twin), state)


def test_a_sum_that_cancels_is_found_among_all_floats():
    """Around 0 half of all floats lie within the error of a sum: they are not looked at one by one."""
    delta = LowRank(Layout("oi", (4, 5)), torch.ones(3, 5), torch.ones(4, 3), 1.0, 3)
    assert torch.equal(folded_weight(torch.full((4, 5), -3.0), [delta], torch.float32, "w"), torch.zeros(4, 5))


# ── a device that is waited for ──────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(params=[False, True], ids=["asking", "ahead"])
def either_way(request, monkeypatch):
    """Each block asks for what it has to know, as on a CPU; or all is found out before, as on a GPU."""
    monkeypatch.setattr(looking_ahead, "waits", lambda device: request.param)


@pytest.fixture
def ahead(monkeypatch):
    monkeypatch.setattr(looking_ahead, "waits", lambda device: True)


x = torch.arange(4.0)


@pytest.mark.parametrize(
    ("call", "times"),
    [
        (lambda: x.tolist(), 1), (lambda: x[1].item(), 1), (lambda: float(x[1]), 1), (lambda: bool((x > 1).any()), 1),
        (lambda: x.nonzero(), 1), (lambda: x[x > 1], 1), (lambda: x.clone().index_put_((x > 1,), x[0]), 1),
        (lambda: torch.equal(x, x), 1), (lambda: x.unique(), 1), (lambda: x.masked_select(x > 1), 1),
        (lambda: x.cpu(), 1), (lambda: torch.tensor([1.0], device="cpu"), 1), (lambda: x[0] if x[0] else x, 1),
        (lambda: torch.where(x > 1, x, -x), 0), (lambda: x[torch.arange(2)], 0), (lambda: x.aminmax(), 0),
        (lambda: torch.searchsorted(x, x), 0), (lambda: x.cumsum(0).count_nonzero(), 0),
    ],
)  # fmt: skip
def test_what_is_waited_for_is_seen(call, times):
    with Waits() as waits:
        call()
    assert len(waits.seen) == times


def of_many_blocks(dtype: torch.dtype, hard: int) -> nn.Module:
    """Three weights, of which `hard` elements each lie so near the middle of two numbers that float64 cannot tell."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 48, bias=False), nn.Linear(48, 24, bias=False), nn.Linear(24, 40)).to(dtype)
    lora_fx.apply(model, Rule(where="*", rank=3, alpha=2), torch.randn(2, 40).to(dtype), check=False)
    reference.fill(model)
    half_step = torch.finfo(dtype).eps / 2
    with torch.no_grad():
        for layer in model if hard else ():
            adapter = layer.weight_lora_default
            adapter.A[0] = 0.0
            adapter.A[:, :hard] = torch.tensor([[half_step], [2.0**-60], [0.0]])
            adapter.B[0] = torch.tensor([1.5, 1.0, 0.7])  # the scale is 2/3
            layer.weight[0, :hard] = 1.0
    return model


@pytest.mark.parametrize("hard", [0, 3], ids=["plain", "hard"])
@pytest.mark.parametrize("final", [False, True], ids=["undoable", "final"])
@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
def test_a_fold_waits_for_the_device_twice_at_most_however_many_blocks_and_weights(
    monkeypatch, ahead, dtype, final, hard
):
    monkeypatch.setattr(exact_sum, "_BLOCK", 96)
    monkeypatch.setattr(folding, "_UNDOABLE", 0)
    model, parts = of_many_blocks(dtype, hard), []
    state, sums, blocks = reference.bits(model), reference.dense_weights(model), exact_sum.ExactSum.rounded
    monkeypatch.setattr(ExactSum, "rounded", lambda part, *rest: parts.append(part) or blocks(part, *rest))
    with Waits() as waits:
        lora_fx.fold(model, final=final)
    assert len(parts) == 24 + 12 + 10 and waits.seen == ["tolist"] * (2 if hard else 1)
    for name, total in sums.items():
        right = round_once(total, dtype)
        if hard and "weight" in name:  # the sum is a hair above the middle, and float64 does not see it
            right[0, :hard] = 1 + torch.finfo(dtype).eps
        assert torch.equal(model.get_parameter(name).detach(), right), name
    if not final:
        assert reference.same_bits(reference.bits(lora_fx.unfold(model)), state)


def test_a_fold_of_other_kinds_waits_no_more_often(monkeypatch, ahead):
    model, x = nn.Sequential(*(nn.Linear(8, 8) for _ in range(3))), torch.randn(2, 8)
    lora_fx.apply(
        model, [Rule(where="0", kind="dora", rank=2), Rule(where="1", kind="full"), Rule(where="2", rank=2)], x
    )
    lora_fx.apply(model, Rule(where="*", kind="bias"), x, name="bias")
    lora_fx.activate(model, "default", "bias")
    reference.fill(model)
    with Waits() as waits:
        lora_fx.fold(model)
    assert len(waits.seen) <= 2


def test_a_block_with_much_in_doubt_asks_for_itself(monkeypatch, ahead):
    model = lora_fx.apply(nn.Linear(60, 40, bias=False), Rule(where="*", rank=2), torch.randn(1, 60), check=False)
    with torch.no_grad():
        model.weight.fill_(1)
        model.weight_lora_default.A.fill_(2.0**-25)  # 1 + 2⁻²⁴ and a hair
        model.weight_lora_default.B[:] = torch.tensor([2.0, 2.0**-40])
    state = reference.bits(model)
    folded = lora_fx.fold(model, copy=True)
    assert bool((folded.weight == 1 + 2.0**-23).all())
    assert reference.same_bits(reference.bits(lora_fx.unfold(folded)), state)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("first", [-1, 1])
def test_a_sum_may_come_out_another_one_when_it_is_computed_again(monkeypatch, ahead, dtype, first):
    """Three quarters of its error off when it is looked at, and as much the other way when it is folded."""
    model, rule = nn.Linear(20, 3, bias=False, dtype=dtype), Rule(where="*", rank=3, alpha=3)
    lora_fx.apply(model, rule, torch.randn(1, 20, dtype=dtype), check=False)
    adapter = model.weight_lora_default
    with torch.no_grad():
        model.weight.fill_(1.0)
        adapter.A.zero_()
        adapter.A[0], adapter.B[:] = torch.finfo(dtype).eps / 2, 1.0
        adapter.A[1] = 2.0**-52 * torch.arange(20)  # above the middle of two numbers, by up to five times the error
    state, above = reference.bits(model), 1 + torch.finfo(dtype).eps
    real, calls = Tile.sums, []

    def off(part, *args, **kwargs):
        calls.append(part)
        total, delta = real(part, *args, **kwargs)
        return total.add_(first * (1 if len(calls) == 1 else -1) * 6 * 2.0**-53), delta

    with monkeypatch.context() as patch:
        patch.setattr(Tile, "sums", off)
        lora_fx.fold(model)
    assert len(calls) == 2
    assert bool((model.weight[:, 1:] == above).all())
    assert reference.same_bits(reference.bits(lora_fx.unfold(model)), state)


# ── no room for a block ──────────────────────────────────────────────────────────────────────────────────────────────


def no_room_for(elements: int, monkeypatch, where: str) -> list[int]:
    """From now on, blocks of more elements than that find no memory; what comes gets the sizes of those that do."""
    fits: list[int] = []

    def check(size: int) -> None:
        if size > elements:
            raise torch.OutOfMemoryError("no memory, says the test")
        fits.append(size)

    if where == "for what is kept":
        real = Scratch.__init__
        monkeypatch.setattr(Scratch, "__init__", lambda self, n, *rest: check(n) or real(self, n, *rest))
    else:
        sums = Tile.sums
        monkeypatch.setattr(Tile, "sums", lambda part, *a, **k: check(part.weight.numel()) or sums(part, *a, **k))
    return fits


@pytest.mark.parametrize("final", [False, True], ids=["undoable", "final"])
@pytest.mark.parametrize("where", ["for what is kept", "for what comes and goes"])
def test_a_block_that_finds_no_room_is_halved(monkeypatch, ahead, where, final):
    monkeypatch.setattr(folding, "_UNDOABLE", 0)
    model = of_many_blocks(torch.bfloat16, 3)
    state, whole = reference.bits(model), reference.bits(lora_fx.fold(model, copy=True, final=True))
    with monkeypatch.context() as patch:
        fits = no_room_for(300, patch, where)
        lora_fx.fold(model, final=final)
    assert max(fits) == 240, "of 1,920: 960, 480, 240"
    if final:
        assert reference.same_bits(reference.bits(model), whole)
    else:  # and unfolds in the same blocks, although there is room now
        assert reference.same_bits(reference.bits(lora_fx.unfold(model)), state)


@pytest.mark.parametrize("final", [False, True], ids=["undoable", "final"])
@pytest.mark.parametrize("where", ["for what is kept", "for what comes and goes"])
def test_a_fold_that_finds_no_room_for_a_row_is_refused_whole(monkeypatch, ahead, where, final):
    model = of_many_blocks(torch.float32, 0)
    state, classes = reference.bits(model), reference.classes(model)
    with monkeypatch.context() as patch, pytest.raises(lora_fx.LoraFxError) as caught:
        no_room_for(47, patch, where)
        lora_fx.fold(model, final=final)
    assert str(caught.value).startswith("1.weight: there is no room on cpu to fold one row: no memory, says the test")
    assert "free memory there" in caught.value.remedy
    assert reference.same_bits(reference.bits(model), state) and reference.classes(model) == classes
    lora_fx.fold(model)


def test_on_a_gpu_a_block_takes_half_of_the_memory_that_is_free(monkeypatch):
    gpu, bytes_ = torch.device("cuda", 0), Scratch.bytes(torch.bfloat16)
    assert looking_ahead.waits(gpu) and not looking_ahead.waits(torch.device("cpu"))
    for free, unused, scratches, elements in (
        (2 * 1000 * bytes_, 0, 1, 1000),
        (2 * 1000 * bytes_, 2 * 500 * bytes_, 1, 1500),
        (2 * 1000 * bytes_, 0, 4, 250),
        (1, 0, 1, 1),
        (2**40, 0, 1, exact_sum._LARGE),
    ):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, free=free: (free, 2**40))
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device, unused=unused: 70 + unused)
        monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 70)
        assert exact_sum._worth(torch.bfloat16, gpu, scratches) == elements


@pytest.mark.parametrize("elements", [64, 16])
def test_an_unfold_waits_for_the_device_twice_however_many_blocks_there_are(monkeypatch, elements):
    monkeypatch.setattr(exact_sum, "_BLOCK", elements)
    model = nn.Sequential(*(nn.Linear(8, 8, bias=False) for _ in range(3))).bfloat16()
    before = copy.deepcopy(model.state_dict())
    lora_fx.apply(model, Rule(where="*", rank=2), torch.randn(2, 8).bfloat16())
    reference.fill(model)
    lora_fx.fold(model)
    with Waits() as waits:
        lora_fx.unfold(model)
    assert waits.seen == ["tolist", "tolist"]
    assert all(torch.equal(model.state_dict()[name], numbers) for name, numbers in before.items())
