"""`extract`: the adapter nearest to what one model became of another, held against plain float64."""

from __future__ import annotations

import copy
import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import lora_fx
from lora_fx import LoraFxError, Rule
from lora_fx.model.inventory import inventory
from lora_fx.passes import extract
from lora_fx.testing import Filling, models, rules_for
from tests import reference

ROUND = 2.0**-53
DEEP = os.environ.get("LORA_FX_PROFILE") == "deep"


class Net(nn.Module):
    """A tied head, a fused weight that lies (in, out), a norm with buffers, a weight that no input reaches."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.up = nn.Embedding(11, 6), nn.Parameter(torch.randn(6, 9))
        self.norm, self.down = nn.BatchNorm1d(9), nn.Linear(9, 6)
        self.head, self.spare = nn.Linear(6, 11, bias=False), nn.Linear(3, 4)
        self.head.weight = self.table.weight
        self.double().eval()

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.down(torch.tanh(self.norm(self.table(ids) @ self.up))))


IDS = torch.arange(5)


def pair() -> tuple[Net, Net]:
    torch.manual_seed(0)
    base = Net()
    return base, copy.deepcopy(base)


def moved(model: nn.Module, *names: str, rank: int | None = None) -> nn.Module:
    """Other numbers for these parameters, of a change of this rank."""
    draw = torch.Generator().manual_seed(1)
    for name in names:
        p = dict([*model.named_parameters(), *model.named_buffers()])[name]
        rows, columns = p.shape[0], p.numel() // p.shape[0]
        full = min(rows, columns) if rank is None else rank
        change = torch.randn(rows, full, generator=draw).double() @ torch.randn(full, columns, generator=draw).double()
        p.data += change.view_as(p) / 4
    return model


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("block", [2**21, 12])
def test_it_is_the_nearest_of_the_rank_and_says_what_it_keeps(dtype, block, monkeypatch):
    monkeypatch.setattr(extract, "_BLOCK", block)
    base, tuned = pair()
    moved(tuned, "table.weight", "up", "down.weight")
    base, tuned = base.to(dtype), tuned.to(dtype)
    before = reference.bits(tuned)
    kept = lora_fx.extract(base, tuned, 2, IDS, check=dtype == torch.float64)
    assert [row.weight for row in kept.rows] == ["up", "table.weight", "down.weight"] and not kept.ignored
    was, became = (dict(m.requires_grad_(False).named_parameters(remove_duplicate=False)) for m in (base, tuned))
    total = rest = 0.0
    for place in (p for p in inventory(base).places if p.path != "head"):
        D = became[place.weight].double() - was[place.weight].double()
        (row,) = (row for row in kept.rows if row.weight == place.weight)
        sizes = torch.linalg.svdvals(D)
        off = float((D - reference.delta(place.parameter, place.adapter)).norm())
        # a decomposition in float64, and two factors that are rounded once each
        unit = torch.finfo(place.adapter.dtype).eps / 2
        noise = (8 * sum(D.shape) * ROUND + 3 * unit) * float(sizes.sum())
        assert abs(off - float(sizes[2:].norm())) <= noise and abs(row.change - float(D.norm())) <= noise
        assert abs(row.energy - (1 - (off / row.change) ** 2)) <= 4 * noise / row.change
        assert row.rank == place.adapter.rank == 2 and place.adapter.scale == 1 and row.energy < 1 - 2.0**-10
        total, rest = total + row.change**2, rest + off**2
    assert abs(kept.energy - (1 - rest / total)) <= 2.0**-40 and "energy kept" in str(kept)
    assert reference.same_bits(reference.bits(tuned), before)
    if dtype == torch.float64:
        assert lora_fx.certify(base, IDS)


def test_at_the_rank_of_the_change_it_is_the_tuned_model():
    base, tuned = pair()
    moved(tuned, "table.weight", "up", rank=2)
    moved(tuned, "norm.weight", "down.bias", "spare.weight")
    kept = lora_fx.extract(base, tuned, 2, IDS, name="task", beside="full")
    assert lora_fx.verify(tuned, base, IDS) and kept.energy > 1 - 2.0**-40
    kinds = {p.weight: p.adapter.kind.name for p in inventory(base).places if p.path != "head"}
    full = ("norm.weight", "down.bias", "spare.weight")
    assert kinds == {"up": "lora", "table.weight": "lora", **dict.fromkeys(full, "full")}
    lora_fx.fold(base, final=True)
    for name in full:
        assert torch.equal(base.get_parameter(name), tuned.get_parameter(name))
    for name in ("table.weight", "up"):
        off = (base.get_parameter(name) - tuned.get_parameter(name)).detach().norm()
        assert float(off) <= 8 * 17 * ROUND * float(tuned.get_parameter(name).detach().norm())


@settings(max_examples=30 if DEEP else 4)
@given(st.data())
def test_what_an_adapter_became_is_found_again_over_random_models(data):
    base, example = data.draw(models())
    tuned = copy.deepcopy(base)
    lora_fx.apply(tuned, data.draw(rules_for(tuned, example)), example, check=False)
    Filling(seed=0, size=1.0)(tuned)
    names = {w for place in inventory(tuned).places for w in place.weights}
    split = any(storage.split for storage in inventory(tuned).storages())
    lora_fx.fold(tuned, final=True)
    before = {n: p.detach().clone() for n, p in base.named_parameters(remove_duplicate=False)}
    changed = {n: p.detach() for n, p in tuned.named_parameters(remove_duplicate=False)}
    differ = [n for n in names if not torch.equal(before[n], changed[n])]
    if split or not differ:
        with pytest.raises(LoraFxError, match="ties it to" if split else "no weight differs"):
            lora_fx.extract(base, tuned, 999, example)
        return
    kept = lora_fx.extract(base, tuned, 999, example, check=DEEP)
    assert kept.energy > 1 - 2.0**-40
    lora_fx.fold(base, final=True)
    for name in differ:
        own, wanted = base.get_parameter(name).detach().double(), changed[name].double()
        dtype, D = before[name].dtype, wanted - before[name].double()
        unit, theta = (torch.finfo(d).eps / 2 for d in (dtype, torch.promote_types(dtype, torch.float32)))
        # the sum is rounded once; two factors are, each element once; and a decomposition in float64
        noise = (3 * theta + 8 * own.numel() * ROUND) * own.numel() ** 0.5 * float(D.norm())
        assert float((own - wanted).norm()) <= unit * float(own.norm()) + noise


def of_another_shape(tuned: Net) -> None:
    tuned.down = nn.Linear(9, 7).double()


def untied(tuned: Net) -> None:
    tuned.head.weight = nn.Parameter(tuned.head.weight.detach() + 1)


def not_finite(tuned: Net) -> None:
    tuned.up.data[0, 0] = float("nan")


@pytest.mark.parametrize(
    "change, options, reason",
    [
        (lambda t: None, {}, "no weight differs"),
        (of_another_shape, {}, r"down.weight: its shape is \(6, 9\), and \(7, 9\) in the other"),
        (lambda t: t.register_parameter("more", nn.Parameter(torch.ones(2))), {}, "more: the base has none"),
        (lambda t: t.register_module("spare", None), {}, "spare.weight: the tuned model has none"),
        (untied, {}, "head.weight: the base ties it to table.weight"),
        (not_finite, {}, "up: it holds NaN"),
        (lambda t: moved(t, "up", "down.bias", "norm.weight"), {}, "norm.weight, down.bias differ, and no matmul"),
        (lambda t: moved(t, "up", "norm.running_mean"), {"beside": "full"}, "norm.running_mean differ, which are buff"),
        (lambda t: moved(t, "up"), {"rank": 0}, "0 is no positive integer"),
        (lambda t: moved(t, "up"), {"beside": "save"}, "'save' is unknown"),
        (lambda t: moved(t, "up"), {"name": "old"}, "it has an adapter named 'old'"),
        (lambda t: moved(t, "up"), {"name": "a b"}, "no identifier"),
        (lambda t: moved(t, "up"), {"ignore": ["u*"]}, "no weight differs from the base's, but for what is left out"),
        (lambda t: lora_fx.apply(t, Rule(where="up", rank=1), IDS), {}, "the tuned model has adapters"),
        (lambda t: moved(t, "up").to("meta"), {}, "it is on meta"),
    ],
)
def test_what_cannot_be_extracted_is_refused(change, options, reason):
    base, tuned = pair()
    lora_fx.apply(base, Rule(where="down.weight", rank=1), IDS, name="old")
    change(tuned)
    before = reference.bits(base), reference.classes(base)
    with pytest.raises(LoraFxError, match=reason):
        lora_fx.extract(base, tuned, **{"rank": 2, "example_inputs": IDS, **options})
    assert reference.same_bits(reference.bits(base), before[0]) and reference.classes(base) == before[1]


def test_what_is_left_out_is_named():
    base, tuned = pair()
    moved(tuned, "up", "norm.weight", "norm.running_mean", "down.bias")
    kept = lora_fx.extract(copy.deepcopy(base), tuned, 2, IDS, beside="ignore")
    assert kept.ignored == ("norm.weight", "down.bias", "norm.running_mean") and len(kept.rows) == 1
    assert "left out, though they differ: norm.weight" in str(kept)
    kept = lora_fx.extract(base, tuned, 2, IDS, beside="full", ignore=["norm.*"])
    assert {*kept.ignored} == {"norm.weight", "norm.running_mean"}
    assert [row.weight for row in kept.rows] == ["up", "down.bias"]
    assert kept.to_json()["weights"][1]["rank"] is None
