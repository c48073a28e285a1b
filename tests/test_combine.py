"""`combine`: a new adapter out of others, held against the dense sums in float64, and against PEFT's."""

from __future__ import annotations

import copy
import os

import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import lora_fx
from lora_fx import LoraFxError, Rule
from lora_fx.deltas import merging
from lora_fx.graph.capture import normalize_inputs
from lora_fx.model import marks
from lora_fx.model.inventory import Place, inventory
from lora_fx.passes import combine as passes
from lora_fx.testing import Filling, assert_folds_exactly, models, rules_for
from tests import reference

ROUND = 2.0**-53
DEEP = os.environ.get("LORA_FX_PROFILE") == "deep"


def model_with(*rules: tuple[str, Rule], build=None) -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    model = build() if build else nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 5)).double()
    x = torch.randn(4, 6, dtype=torch.float64)
    for name, rule in rules:
        lora_fx.apply(model, rule, x, name=name, check=False)
    Filling(seed=0, size=0.5)(model)
    return model, x


def two() -> tuple[nn.Module, torch.Tensor]:
    """Mixed ranks, alphas and scalings; the second layer has one of them alone."""
    return model_with(
        ("a", Rule(where="*", rank=3, alpha=5)), ("b", Rule(where="0.weight", rank=2, alpha=7, scaling="rslora"))
    )


def size(place: Place, w: float) -> torch.Tensor:
    """|w|·(|s|·|B|·|A|), or of what is no product |w|·(|θ| + |W|): what roundings are relative to."""
    adapter, weight = place.adapter, place.parameter.detach().double()
    if adapter.kind.low_rank:
        theta = {name: p.detach().double() for name, p in adapter.named_parameters()}
        low = adapter.low_rank(theta, adapter._buffers.get("index"))
        whole = low.layout.delta(low.A.abs(), low.whole.abs())
        return abs(w * adapter.scale) * whole
    (own,) = (adapter.layout.to_weight(adapter.embedded(p.detach().double().abs())) for p in adapter.parameters())
    return abs(w) * (own + weight.abs())


def combined_right(model: nn.Module, strengths: dict[str, float], name: str) -> int:
    """Each weight has what the sum is of its own adapters, up to one rounding of each factor and those of float64."""
    found: dict[str, list[Place]] = {}
    for place in inventory(model).places:
        for weight in place.weights:
            found.setdefault(weight, []).append(place)
    for weight, places in found.items():
        ours = [place for place in places if place.adapter.name == name]
        theirs = [place for place in places if strengths.get(place.adapter.name)]
        assert bool(ours) == bool(theirs), weight
        if not ours:
            continue
        parameter = places[0].parameter
        wanted = sum(strengths[p.adapter.name] * reference.delta(parameter, p.adapter) for p in theirs)
        got = sum(reference.delta(parameter, p.adapter) for p in ours)
        rounded = torch.finfo(ours[0].adapter.dtype).eps / 2
        terms = 8 + sum(getattr(p.adapter.theta, "rank", 1) for p in theirs)
        bound = sum(size(p, strengths[p.adapter.name]) for p in theirs) + sum(size(p, 1.0) for p in ours)
        assert bool(((got - wanted).abs() <= (2 * rounded + rounded**2 + 2 * terms * ROUND) * bound).all()), weight
        assert all(p.adapter.scale == 1.0 for p in ours if p.adapter.kind.low_rank)
    return len(found)


@settings(max_examples=40 if DEEP else 3)
@given(st.data())
def test_an_exact_sum_is_the_dense_sum_over_random_models(data):
    model, example = data.draw(models())
    for name, kinds in (("a", ("lora", "lora", "adalora", "full", "bias")), ("b", ("lora", "lora", "full", "bias"))):
        lora_fx.apply(model, data.draw(rules_for(model, example, kinds=kinds)), example, name=name, check=False)
    Filling(seed=data.draw(st.integers(0, 99)), size=0.5)(model)
    strengths = {name: data.draw(st.sampled_from([1.0, -0.5, 0.7, 0.3])) for name in "ab"}
    before, inputs = reference.bits(model), normalize_inputs(model, example)
    report = lora_fx.combine(model, strengths, "c")
    assert report.energy == 1.0 and all(row.energy == 1.0 for row in report.rows)
    assert combined_right(model, strengths, "c")
    after = reference.bits(model)
    assert reference.same_bits(before, {name: after[name] for name in before}), "something else has changed"
    assert not any(a.active for a in inventory(model).adapters if a.name == "c")
    lora_fx.activate(model, "c")
    assert not DEEP or lora_fx.certify(model, inputs, gradients=False)  # models of this file are certified always
    assert {a.name for a in inventory(model).adapters if any(p.requires_grad for p in a.parameters())} == {"c"}
    lora_fx.remove(model, "a", "b", "c")


def test_it_is_there_and_does_nothing_until_it_is_asked():
    model, x = two()
    before, y = copy.deepcopy(model), model(x)
    lora_fx.combine(model, {"a": 0.7, "b": 0.3}, name="c")
    assert torch.equal(model(x), y)
    own = [p for a in inventory(model).adapters if a.name == "c" for p in a.parameters()]
    assert len(own) == 4 and not any(p.requires_grad for p in own)
    lora_fx.activate(model, "c")
    assert all(p.requires_grad for p in own)
    model(x).sum().backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in own)
    assert_folds_exactly(model, x)
    lora_fx.activate(model, "a", "b")
    lora_fx.remove(model, "c")
    assert reference.same_bits(reference.bits(model), reference.bits(before)) and torch.equal(model(x), y)


def test_ranks_add_up_and_a_weight_of_none_takes_nothing():
    model, _ = two()
    report = lora_fx.combine(model, {"a": 0.7, "b": -2}, name="c")
    assert [(row.weight, row.rank) for row in report.rows] == [("0.weight", 5), ("2.weight", 3)]
    assert combined_right(model, {"a": 0.7, "b": -2.0}, "c") == 2
    lora_fx.combine(model, {"a": 0.0, "b": 1.0}, name="d")
    assert lora_fx.adapters(model)["d"] == ["0.weight"] and combined_right(model, {"b": 1.0}, "d")


class Fused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(6, 12), nn.Linear(4, 5)
        self.double()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).view(2, 2, 12).split(4, -1)
        return self.out(nn.functional.scaled_dot_product_attention(q, k, v))


def test_parts_stay_apart_and_meet_where_they_overlap():
    query, value = Rule(role="attention.query", rank=1), Rule(role="attention.value", rank=2, alpha=3)
    model, x = model_with(("a", [query, value]), ("b", query), ("w", Rule(where="qkv*", rank=2)), build=Fused)
    lora_fx.combine(model, {"a": 0.5, "b": 2.0}, name="c")
    parts = {place.child: (place.adapter.rows, place.adapter.rank) for place in inventory(model).places}
    assert parts["weight_lora_c_query"] == (tuple(range(4)), 2)
    assert parts["weight_lora_c_value"] == (tuple(range(8, 12)), 2)
    lora_fx.combine(model, {"a": 0.5, "w": 1.0}, name="d")
    (whole,) = (place.adapter for place in inventory(model).places if place.adapter.name == "d")
    assert whole.rows is None and whole.rank == 5
    assert combined_right(model, {"a": 0.5, "b": 2.0}, "c") and combined_right(model, {"a": 0.5, "w": 1.0}, "d")
    lora_fx.activate(model, "d")
    assert lora_fx.certify(model, x)


def dense(model: nn.Module, name: str) -> dict[str, torch.Tensor]:
    return {
        p.weight: reference.delta(p.parameter, p.adapter) for p in inventory(model).places if p.adapter.name == name
    }


@pytest.mark.parametrize("rank", [1, 2, 5, None])
def test_svd_is_the_nearest_of_a_rank_and_says_what_it_keeps(rank):
    model, _ = two()
    lora_fx.combine(model, {"a": 0.7, "b": 0.3}, name="sum")
    report = lora_fx.combine(model, {"a": 0.7, "b": 0.3}, name="c", method="svd", rank=rank)
    whole, found = dense(model, "sum"), dense(model, "c")
    for row in report.rows:
        D, C = whole[row.weight], found[row.weight]
        sizes = torch.linalg.svdvals(D)
        assert row.rank == (rank if rank is not None and row.weight == "0.weight" else min(rank or 3, 3))
        # a QR, an SVD and their products in float64 are off by a small multiple of the sizes of what they are of
        noise = 8 * sum(D.shape) * ROUND * float(sizes.sum())
        rest, best = float((D - C).norm()), float(sizes[row.rank :].norm())
        assert abs(rest - best) <= noise and abs(row.change - float(D.norm())) <= noise
        assert abs(row.energy - (1 - (rest / row.change) ** 2)) <= 4 * noise / row.change
    assert (report.energy < 1 - 2.0**-40) == (rank != 5)
    assert "energy kept" in str(report) and report.to_json()["weights"][0]["shape"] == [10, 6]


def test_experts_are_decomposed_one_by_one():
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.Parameter(torch.randn(3, 6, 7, dtype=torch.float64))

        def forward(self, x):
            return x.expand(3, 4, 6) @ self.up

    model, x = model_with(("a", Rule(where="up", rank=2)), ("b", Rule(where="up", rank=3, alpha=2)), build=Experts)
    for method in ("svd", "dare"):
        more = {"density": 1.0} if method == "dare" else {}
        lora_fx.combine(model, {"a": 0.5, "b": 1.0}, name=method, method=method, rank=5, **more)
        bound = 8 * 13 * ROUND * sum(float(t.norm()) for name in "ab" for t in dense(model, name).values())
        wanted = 0.5 * dense(model, "a")["up"] + dense(model, "b")["up"]
        assert float((dense(model, method)["up"] - wanted).norm()) <= bound
    lora_fx.activate(model, "svd")
    assert lora_fx.certify(model, x)


def test_ties_trims_elects_and_takes_the_mean_of_what_agrees():
    draw = torch.Generator().manual_seed(0)
    deltas = [torch.randn(4, 5, dtype=torch.float64, generator=draw) for _ in range(3)]
    strengths, found = (0.5, 2.0, -1.0), merging.ties(deltas, (0.5, 2.0, -1.0), 0.5)
    flat = [d.flatten().tolist() for d in deltas]
    kept = [sorted(range(20), key=lambda n, own=own: -abs(own[n]))[:10] for own in flat]
    for n in range(20):
        values = [own[n] if n in k else 0.0 for own, k in zip(flat, kept, strict=True)]
        sign = 1 if sum(values) >= 0 else -1
        agree = [w * v for w, v in zip(strengths, values, strict=True) if v * sign > 0]
        wanted = sum(agree) / max(len(agree), 1)
        assert abs(float(found.flatten()[n]) - wanted) <= 4 * ROUND * sum(map(abs, agree))


def test_dare_drops_at_random_and_rescales():
    one, other = torch.full((100, 90), 3.0), torch.full((100, 90), 5.0)
    found = merging.dare([one, other], (1.0, -2.0), 0.25, torch.Generator().manual_seed(0))
    values, counts = found.unique(return_counts=True)
    assert values.tolist() == [-40.0, -28.0, 0.0, 12.0]  # 3/p and −10/p, each there or not, by itself
    for count, p in zip(counts.tolist(), (0.75 * 0.25, 0.25**2, 0.75**2, 0.25 * 0.75), strict=True):
        assert abs(count - 9000 * p) <= 6 * (9000 * p * (1 - p)) ** 0.5


def test_the_same_seed_makes_the_same_adapter():
    model, _ = two()
    for name, seed in (("c", 1), ("d", 1), ("e", 2)):
        lora_fx.combine(model, {"a": 1.0, "b": 1.0}, name, method="dare", density=0.5, seed=seed, rank=5)
    found = [dense(model, name) for name in "cde"]
    assert all(torch.equal(found[0][w], found[1][w]) and not torch.equal(found[0][w], found[2][w]) for w in found[0])


@pytest.mark.parametrize("ours, theirs, rank", [("exact", "cat", None), ("svd", "svd", 2), ("ties", "ties_svd", 5)])
def test_it_is_what_peft_computes(ours, theirs, rank, tmp_path):
    plain = nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 5)).double()
    base, model, x = copy.deepcopy(plain), copy.deepcopy(plain), torch.randn(4, 6, dtype=torch.float64)
    options = {"lora_alpha": 5, "init_lora_weights": False}
    wrapped = peft.get_peft_model(base, peft.LoraConfig(r=3, target_modules=["0", "2"], **options), adapter_name="x")
    wrapped.add_adapter("y", peft.LoraConfig(r=2, target_modules=["0"], use_rslora=True, **options))
    wrapped.save_pretrained(tmp_path)
    for name in "xy":
        lora_fx.load_adapter(model, tmp_path / name, x, name=name)
    strengths, more = {"x": 0.75, "y": -0.5}, {"density": 0.5} if ours == "ties" else {}
    lora_fx.combine(model, strengths, name="c", method=ours, rank=rank, **more)
    wrapped.add_weighted_adapter(
        [*strengths], [*strengths.values()], "c", combination_type=theirs, svd_rank=rank, **more
    )
    for weight, found in dense(model, "c").items():
        own = {name: dense(model, name)[weight] for name in "xy" if weight in dense(model, name)}
        values = torch.linalg.svdvals(sum(strengths[name] * delta for name, delta in own.items()))
        # two decompositions in float64 are off by a multiple of the sizes of what they are of, and where they are cut
        # off, by that over the gap (Wedin 1972)
        gap = max(1.0, float(values[0] / (values[1] - values[2]))) if ours == "svd" else 1.0
        noise = 8 * sum(found.shape) * ROUND * float(sum(delta.norm() for delta in own.values()))
        assert float((found - base[int(weight[0])].get_delta_weight("c")).norm()) <= noise * gap
    lora_fx.save_adapter(model, tmp_path / "c", name="c")
    again = peft.PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path / "c")
    lora_fx.activate(model, "c")
    assert lora_fx.verify(model, again, x)


def test_kinds_that_are_no_products_are_summed_whole():
    rules = [Rule(where="0.weight", kind="full"), Rule(where="2.weight", kind="bias")]
    model, x = model_with(("a", rules), ("b", [Rule(where="0.weight", rank=2), rules[1]]))
    for name, more in (("c", {}), ("d", {"method": "svd", "rank": 1})):
        lora_fx.combine(model, {"a": 0.5, "b": -0.25}, name=name, **more)
        assert combined_right(model, {"a": 0.5, "b": -0.25}, name)
        assert [a.kind.name for a in inventory(model).adapters if a.name == name] == ["full", "bias"]
    lora_fx.activate(model, "c")
    assert lora_fx.certify(model, x)
    assert_folds_exactly(model, x)
    report = lora_fx.combine(model, {"a": 1.0, "b": 1.0}, "t", method="ties", density=0.5)
    own = dense(model, "a")["2.bias"], dense(model, "b")["2.bias"]
    assert torch.equal(dense(model, "t")["2.bias"], merging.ties(own, (1.0, 1.0), 0.5)) and report.energy == 1.0


def test_neither_room_nor_strength_has_a_part_in_it(tmp_path):
    model, x = two()
    lora_fx.combine(model, {"a": 0.5, "b": 2.0}, name="c")
    wanted = dense(model, "c")
    lora_fx.save_adapter(model, tmp_path, name="a")
    lora_fx.remove(model, "a")
    lora_fx.load_adapter(model, tmp_path, x, name="a", max_rank=5)
    lora_fx.activate(model, {"a": 0.25, "b": -1.0})
    for name, more in (("d", {}), ("e", {"method": "svd", "rank": 5})):
        lora_fx.combine(model, {"a": 0.5, "b": 2.0}, name=name, **more)
    assert all(torch.equal(found, wanted[weight]) for weight, found in dense(model, "d").items())
    assert [p.adapter.rank for p in inventory(model).places if p.adapter.name == "d"] == [5, 3]
    noise = {weight: 8 * sum(D.shape) * ROUND * float(D.norm()) for weight, D in wanted.items()}
    assert all(
        float((found - wanted[weight]).norm()) <= 4 * noise[weight] for weight, found in dense(model, "e").items()
    )


def test_what_fails_on_the_way_leaves_the_model_as_it_was(monkeypatch):
    model, x = two()
    before, calls = (reference.bits(model), reference.classes(model), model(x)), []

    def once(*arguments, **options):
        calls.append(arguments)
        if len(calls) == 2:
            raise MemoryError
        marks.attach(*arguments, **options)

    monkeypatch.setattr(passes, "attach", once)
    with pytest.raises(MemoryError):
        lora_fx.combine(model, {"a": 1.0}, name="c")
    assert len(calls) == 2 and "c" not in lora_fx.adapters(model)
    assert reference.same_bits(reference.bits(model), before[0]) and reference.classes(model) == before[1]
    assert torch.equal(model(x), before[2])


def nan(model: nn.Module) -> None:
    next(a for a in inventory(model).adapters if a.name == "b").B.data[0, 0] = float("nan")


def huge(model: nn.Module) -> None:
    next(a for a in inventory(model).adapters if a.name == "a").B.data.fill_(1e300)


@pytest.mark.parametrize(
    "options, before, reason",
    [
        ({"adapters": {}}, None, "names none"),
        ({"adapters": ["a"]}, None, "names none"),
        ({"adapters": {"a": 1.0, "z": 1.0}}, None, "no adapter named 'z'"),
        ({"adapters": {"a": float("inf")}}, None, "no finite number"),
        ({"adapters": {"a": True}}, None, "no finite number"),
        ({"adapters": {"a": 0.0}}, None, "every weight is 0"),
        ({"name": "a"}, None, "has an adapter named 'a'"),
        ({"name": "x y"}, None, "no identifier"),
        ({"method": "linear"}, None, "'linear' is unknown"),
        ({"rank": 4}, None, "an exact sum has the ranks of all"),
        ({"rank": 0, "method": "svd"}, None, "no positive integer"),
        ({"density": 0.5}, None, "drops nothing"),
        ({"method": "ties"}, None, "no share of the elements"),
        ({"method": "dare", "density": 1.5}, None, "no share of the elements"),
        ({"method": "dare", "density": 0.5, "seed": None}, None, "no integer"),
        ({}, nan, "0.weight, B of adapter 'b': it holds NaN"),
        ({"adapters": {"a": 1e300}}, huge, "0.weight: the sum does not fit"),
        ({"adapters": {"a": 1.0, "dora": 1.0}}, None, "'dora' is a kind whose δ is no product of factors"),
        ({"adapters": {"h": 1.0}}, None, "'bottleneck' is a kind whose δ"),
        ({}, lora_fx.fold, "the model is folded"),
    ],
)
def test_what_cannot_be_combined_is_refused(options, before, reason):
    model, x = two()
    lora_fx.apply(model, Rule(where="0.weight", kind="dora", rank=2), x, name="dora", check=False)
    lora_fx.apply(model, Rule(where="0.weight", kind="bottleneck", rank=2), x, name="h", check=False)
    lora_fx.activate(model, "a", "b")
    if before is not None:
        before(model)
    was = reference.bits(model), reference.classes(model)
    with pytest.raises(LoraFxError, match=reason):
        lora_fx.combine(model, **{"adapters": {"a": 0.5, "b": 0.5}, "name": "c", **options})
    assert reference.same_bits(reference.bits(model), was[0]) and reference.classes(model) == was[1]
