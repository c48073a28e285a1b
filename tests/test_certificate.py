"""The coverage certificate sees every use, and does not certify what is wrong, missed or unmeasurable."""

from __future__ import annotations

import itertools
import json
import os
import pickle
import random
from typing import ClassVar

import pytest
import torch
from torch import fx, nn

import lora_fx
from lora_fx import Rule
from lora_fx.checks import certification, flow, uses
from lora_fx.deltas import adapted_weight
from lora_fx.deltas.adapted_weight import AdaptedWeight
from lora_fx.deltas.exact_sum import Tile
from lora_fx.errors import CaptureError, EquivalenceError, PlanError
from lora_fx.graph.capture import Inputs, capture_graph
from lora_fx.model.inventory import inventory
from lora_fx.passes.wiring import wire
from tests import reference
from tests.reference import EVERYTHING
from tests.zoo import case

#: each kind of realisation, tied and split weights, gathered experts, a module called three times
CERTIFIED = (
    "llama", "gpt2", "native-einsum-attention", "native-sliced-attention", "native-mha", "native-encoder",
    "native-lstm", "native-called-thrice", "native-two-names", "native-shared-parameter", "native-tied",
    "native-bypassed-linear", "native-deconv", "native-conv2d", "native-experts", "native-bmm", "native-addmm",
    "native-bilinear", "mixtral-eager", "olmoe-batched", "gpt-oss-grouped",
)  # fmt: skip


class Chain(nn.Module):
    """Two matmuls in a row, a tied table, and a layer that only some inputs reach."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.first, self.second = nn.Linear(6, 9), nn.Linear(9, 6)
        self.rare = nn.Linear(6, 6)
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, i):
        x = self.second(self.first(self.embed(i)))
        return self.head(self.rare(x) if i.sum() > 40 else x)


IDS = torch.arange(8)


def adapted(rules=EVERYTHING, **options) -> nn.Module:
    torch.manual_seed(0)
    return lora_fx.apply(Chain(), rules, IDS, **options)


@pytest.mark.parametrize("name", CERTIFIED)
def test_every_use_of_the_zoo_is_certified(name):
    model, inputs = case(name).build()
    base = sum(len(w.uses) for w in lora_fx.capture(model, inputs).weights if w.multiplied and not w.problem)
    lora_fx.apply(model, EVERYTHING, inputs)
    reference.fill(model)
    state, flags = reference.bits(model), [m.training for m in model.modules()]
    certificate = lora_fx.certify(model, inputs)
    assert certificate, str(certificate)
    assert len(certificate.rows) == base
    assert not certificate.gradient_free and all(certificate.whole) and len(certificate.whole) == 2
    assert all(row.effect > row.bound >= row.error for row in certificate.rows)
    assert {row.dtype for row in certificate.rows} == {"float64"}
    assert reference.same_bits(reference.bits(model), state) and [m.training for m in model.modules()] == flags


def test_how_each_use_is_realised():
    def realised(name, rule=EVERYTHING):
        model, inputs = case(name).build()
        certificate = lora_fx.certify(lora_fx.apply(model, rule, inputs), inputs)
        return {(row.form, row.realised) for row in certificate.rows}

    assert realised("native-tied") == {("embedding", "graph"), ("linear", "graph")}
    assert realised("native-lstm") == {("lstm", "dense"), ("linear", "graph")}
    assert realised("native-mha") == {("linear", "dispatch")}
    assert realised("native-tied", Rule(role="lm_head", rank=2)) == {("embedding", "split off"), ("linear", "graph")}


def test_a_weight_that_the_inputs_do_not_reach_is_unseen_and_not_certified():
    model = adapted(Rule(where="first", rank=2))
    lora_fx.apply(model, Rule(where="rare", rank=2), torch.arange(10), name="default")
    certificate = lora_fx.certify(model, IDS)
    assert [(row.weight, row.realised) for row in certificate.rows] == [
        ("first.weight", "graph"), ("rare.weight", "unseen")]  # fmt: skip
    assert not certificate and [row.weight for row in certificate.unseen] == ["rare.weight"]
    assert certificate.problems == () and "do not reach it" in str(certificate)
    assert certificate.gradient_free == ("rare.weight (default)",)


class Masked(nn.Module):
    """A use that multiplies zeros, as of a first state or an empty cache."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(5, 3)

    def forward(self, x):
        return self.lin(x * 0) + x.sum()


def test_a_use_of_zeros_is_measured_on_random_numbers():
    model = lora_fx.apply(Masked(), Rule(where="lin", rank=2), torch.randn(4, 5))
    certificate = lora_fx.certify(model, torch.randn(4, 5))
    (row,) = certificate.rows
    assert certificate and row.effect > row.bound


def test_a_use_of_zeros_whose_branch_is_lost_is_not_certified(monkeypatch):
    model = lora_fx.apply(Masked(), Rule(where="lin", rank=2, schedule="branch"), torch.randn(4, 5))
    for adapter in reference.distinct_adapters(model):
        adapter.change(realised="dispatch")
    wire(model)
    honest = AdaptedWeight.branch
    monkeypatch.setattr(AdaptedWeight, "branch", lambda self, *args: 2 * honest(self, *args))
    monkeypatch.setattr(adapted_weight, "_at_once", lambda *_: None)  # the short way to the same
    certificate = lora_fx.certify(model, torch.randn(4, 5))
    assert not certificate and "nothing to measure" in certificate.rows[0].problem


def test_a_use_whose_output_does_not_depend_on_the_adapter_is_not_certified():
    class NoRows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin = nn.Linear(5, 3)

        def forward(self, x):
            return self.lin(x[:0]).sum() + x.sum()

    model = lora_fx.apply(NoRows(), Rule(where="lin", rank=2), torch.randn(4, 5))
    certificate = lora_fx.certify(model, torch.randn(4, 5))
    assert not certificate and "nothing to measure" in certificate.rows[0].problem


class OnAWeight(nn.Module):
    """A product of two adapted weights: the branch of one reads the other."""

    def __init__(self) -> None:
        super().__init__()
        self.queries, self.value = nn.Embedding(4, 6), nn.Linear(6, 5)

    def forward(self, x):
        return self.value(self.queries.weight) @ x + self.queries.weight @ torch.cat([x, x[:1]])


def test_the_branch_of_another_weight_is_no_use_of_this_one():
    model, x = OnAWeight(), torch.randn(5, 3)
    certificate = lora_fx.certify(lora_fx.apply(model, Rule(where="*", rank=2), x), x)
    assert certificate and {row.weight for row in certificate.rows} == {"queries.weight", "value.weight"}


def broken(monkeypatch, change) -> lora_fx.Certificate:
    """The certificate of a model whose branches are computed otherwise; every use dispatches, so that it counts."""
    model = adapted()
    for adapter in reference.distinct_adapters(model):
        adapter.change(realised="dispatch", schedule="branch")
    wire(model)
    assert lora_fx.certify(model, torch.arange(10)), "right before it is broken"
    honest = AdaptedWeight.branch
    monkeypatch.setattr(AdaptedWeight, "branch", lambda self, *args: change(honest, self, *args))
    monkeypatch.setattr(adapted_weight, "_at_once", lambda *_: None)  # the short way to the same
    return lora_fx.certify(model, torch.arange(10))


def wrong_uses(certificate: lora_fx.Certificate) -> list[tuple[str, str]]:
    assert not certificate
    return [(row.module, row.problem) for row in certificate.problems]


def test_one_lost_use_is_named_and_the_others_are_not(monkeypatch):
    def lost(branch, weight, call, *use):
        out = branch(weight, call, *use)
        return out * 0 if call.form.name == "linear" and weight.window.shape == (11, 6) else out

    certificate = broken(monkeypatch, lost)
    assert wrong_uses(certificate) == [("head", "the adapters have no effect here")]


def test_a_wrong_scale_is_named_at_the_use_where_it_happens(monkeypatch):
    def scaled(branch, weight, call, *use):
        return branch(weight, call, *use) * (1.01 if weight.window.shape == (9, 6) else 1.0)

    assert wrong_uses(broken(monkeypatch, scaled)) == [("first", "it is not the use of W + δ")]


def small_effect() -> tuple[nn.Linear, torch.Tensor]:
    """The bias makes the output: the effect is about 1/32 of it. Rounding moves it by 1/128 at most, however the sum
    is added up, so that the noise floor is 1/256 to 1/128, and the bound 1/16 or more."""
    torch.manual_seed(0)
    model, x = nn.Linear(64, 64).bfloat16(), torch.randn(8, 64).sign().bfloat16()
    with torch.no_grad():
        model.weight.copy_(torch.randn(64, 64).sign() / 128)
        model.bias.fill_(1)
    return model, x


def test_what_rounding_in_its_dtype_would_hide_is_measured_in_float64():
    model, x = small_effect()
    lora_fx.apply(model, Rule(where="*", rank=8), x)
    certificate = lora_fx.certify(model, x)
    assert certificate and 2 / 128 < certificate.rows[0].effect < 3 / 64
    assert certificate.rows[0].dtype == "float64" and certificate.rows[0].bound < 2**-40


def test_an_effect_that_rounding_could_hide_is_not_certified(monkeypatch):
    """As where some op between a use and the end of its branches takes no float64."""
    model, x = small_effect()
    lora_fx.apply(model, Rule(where="*", rank=8), x)

    def narrow(value):
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            raise NotImplementedError("no kernel takes float64")
        return value

    monkeypatch.setattr(uses, "widened", narrow)
    certificate = lora_fx.certify(model, x)
    assert 2 / 128 < certificate.rows[0].effect < 3 / 64 and certificate.rows[0].dtype == "bfloat16"
    assert not certificate and all(certificate.whole)
    assert [row.problem for row in certificate.problems] == [
        "rounding in bfloat16 could hide its effect: certify a copy in float32 or float64"]  # fmt: skip
    monkeypatch.undo()
    assert lora_fx.certify(model.float(), x.float())


class Configured(nn.Linear):
    """Its forward reads a dict, so that it dispatches."""

    settings: ClassVar = {"gain": 1.0}

    def forward(self, x):
        return nn.functional.linear(x, self.weight, self.bias) * self.settings["gain"]


#: what happens to a branch: its output, how often one was made before, whether the model trains → another
SMALL_FAULTS = {
    "one row": lambda y, n, training: y.roll(1, -1).where(torch.arange(y.shape[-1]) == 5, y),
    "one use": lambda y, n, training: y * float(n % 12 != 7),
    "one per cent": lambda y, n, training: y * 1.01,
    "one per cent of one use": lambda y, n, training: y * (1.01 if n % 12 == 7 else 1.0),
    "no scale": lambda y, n, training: y * 0.5,
    "the other sign": lambda y, n, training: -y,
    "one row left out": lambda y, n, training: y.masked_fill(torch.arange(y.shape[-1]) == 5, 0.0),
    "rows that are shifted": lambda y, n, training: y.roll(1, -1),
    "tokens that are shifted": lambda y, n, training: y.roll(1, 0),
    "one element of one token": lambda y, n, training: y.roll(1, 0).triu(2 - len(y)).roll(-1, 0),
    "a constant": lambda y, n, training: y + 2**-6,
    "in train mode": lambda y, n, training: y * (1.01 if training else 1.0),
}


@pytest.mark.parametrize("fault", SMALL_FAULTS)
@pytest.mark.parametrize("width", [128, 4096] if os.environ.get("LORA_FX_PROFILE") == "deep" else [128])
def test_apply_sees_a_small_fault_in_bfloat16(monkeypatch, fault, width):
    """The whole model in bfloat16 would not tell: the noise of its outputs is larger than each of them."""
    torch.manual_seed(0)
    x = torch.randn(32, width).bfloat16()
    model = nn.Sequential(*(Configured(width, width) for _ in range(12)), nn.Dropout(0.5)).bfloat16()
    state, honest, calls = reference.bits(model), AdaptedWeight.branch, itertools.count()

    def changed(self, *args):
        return SMALL_FAULTS[fault](honest(self, *args), next(calls), model.training)

    monkeypatch.setattr(AdaptedWeight, "branch", changed)
    monkeypatch.setattr(adapted_weight, "_at_once", lambda *_: None)
    with pytest.raises(EquivalenceError, match=r"is not the (use of|model with) W \+ δ"):
        lora_fx.apply(model, Rule(where="*", rank=4, schedule="branch"), x)
    assert reference.same_bits(reference.bits(model), state)


@pytest.mark.parametrize("kind", ["lora", "adalora"])
def test_the_check_of_a_model_in_bfloat16_writes_to_no_weight(kind):
    """It measures the uses, of which none needs W + δ as a whole, in train and in eval mode."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(128, 96), nn.Dropout(0.5), nn.Linear(96, 64)).bfloat16()
    versions = [p._version for p in model.parameters()]
    lora_fx.apply(model, Rule(where="*", kind=kind, rank=4), torch.randn(4, 128).bfloat16())
    assert [p._version for n, p in model.named_parameters() if "lora" not in n] == versions


class Products(nn.Module):
    """The ways in which a matrix multiplies the rows of x; one is scaled, one holds NaN in the rows of padding."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(24, 16)
        self.b, self.c, self.d = (nn.Parameter(torch.randn(16, 16) / 4) for _ in range(3))
        self.bias = nn.Parameter(torch.randn(16))

    def forward(self, x):
        y = self.a(x) @ self.b
        y = torch.addmm(self.bias, y, self.c, alpha=3, beta=2)
        return (y.where(torch.arange(len(y)).unsqueeze(-1) < 4, float("nan")) @ self.d).nan_to_num()


def test_products_of_rows_are_measured_without_their_weights(monkeypatch):
    torch.manual_seed(0)
    model, x = Products(), torch.randn(6, 24)
    lora_fx.apply(model, Rule(where="*", rank=4), x)
    measured = []
    honest = uses.moved_by
    monkeypatch.setattr(uses, "moved_by", lambda x, *own: measured.append(own) or honest(x, *own))
    monkeypatch.setattr(uses, "delta", lambda *_: pytest.fail("a whole δ was made"))
    certificate = lora_fx.certify(model, x)
    assert certificate, certificate
    assert len(measured) == len(certificate.rows) == 4
    assert all(row.bound < 2**-40 < row.effect for row in certificate.rows)


class Normed(nn.Module):
    """What its weight is decides what it does, and is an output beside it."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.a, self.how = nn.Linear(64, 64), how

    def forward(self, x):
        y = self.a(x)
        if self.how == "returned":
            return y, self.a.weight.float().norm()
        return y * 2 if float(self.a.weight.float().norm()) > 5 else y


@pytest.mark.parametrize("how", ["returned", "decides"])
def test_what_no_use_shows_is_checked_with_the_sums(how, monkeypatch):
    torch.manual_seed(0)
    asked, honest = [], certification._by_sums
    monkeypatch.setattr(certification, "_by_sums", lambda *args: asked.append(args) or honest(*args))
    model, x = Normed(how).bfloat16(), torch.randn(4, 64).bfloat16()
    lora_fx.apply(model, Rule(where="*", rank=4), x)
    assert asked
    assert lora_fx.certify(model, x)


class Positions(nn.Module):
    """A table is added in place: running the use again must not add it again."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(11, 6), nn.Embedding(8, 6)

    def forward(self, i):
        x = self.words(i)
        x += self.places(torch.arange(8))
        return x


class Buffered(nn.Module):
    """Experts in a loop: what each gives is written into a buffer, from which the next layer reads."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Parameter(torch.randn(2, 5, 6)), nn.Parameter(torch.randn(2, 6, 4))

    def layer(self, x, weight):
        out = torch.zeros(4, weight.shape[-1])
        for k in range(2):
            out[2 * k : 2 * k + 2] = x[2 * k : 2 * k + 2] @ weight[k]
        return out

    def forward(self, x):
        return self.layer(self.layer(x, self.first).relu(), self.second)


class Accumulated(nn.Module):
    """A product is added to another one, in place and in float64: nothing is cast, and so nothing copied."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.randn(6, 5, dtype=torch.float64))
        self.second = nn.Parameter(torch.randn(5, 6, dtype=torch.float64))

    def forward(self, x):
        return nn.functional.linear(x, self.first).addmm_(x, self.second)


@pytest.mark.parametrize(
    ("make", "inputs", "uses"),
    [
        (Positions, IDS, 2),
        (Buffered, torch.randn(4, 5), 4),
        (Accumulated, torch.randn(4, 5, dtype=torch.float64), 2),
    ],
)
def test_what_writes_in_place_is_measured_as_it_is(make, inputs, uses):
    torch.manual_seed(0)
    certificate = lora_fx.certify(lora_fx.apply(make(), EVERYTHING, inputs), inputs)
    assert certificate and len(certificate.rows) == uses, str(certificate)


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 9), nn.Linear(9, 4)

    def forward(self, x):
        return self.second(self.first(x) + self.first(x + 1))


def rewritten() -> tuple[fx.GraphModule, list[fx.Node]]:
    """An adapted graph, to be damaged by hand, and the nodes that add its branches."""
    torch.manual_seed(0)
    model = fx.symbolic_trace(Twice())
    lora_fx.apply(model, Rule(where="first | second", rank=2), torch.randn(5, 6))
    assert lora_fx.certify(model, torch.randn(5, 6))
    return model, [n for n in model.graph.nodes if str(n.args).count("linear") == 2]


def test_a_value_that_is_read_before_its_branch_is_added():
    model, (first, again, _) = rewritten()
    with model.graph.inserting_after(again):
        stale = model.graph.call_function(torch.sub, (again, first.args[0]))
    again.replace_all_uses_with(stale, delete_user_cb=lambda user: user is not stale)
    model.recompile()
    rows = lora_fx.certify(model, torch.randn(5, 6)).problems
    assert [row.problem for row in rows] == ["sub in the model reads its output without the branch"]


def test_a_use_that_is_gone_is_missed():
    model, (first, again, _) = rewritten()
    again.replace_all_uses_with(first)
    model.graph.eliminate_dead_code()
    model.recompile()
    certificate = lora_fx.certify(model, torch.randn(5, 6))
    assert [(row.weight, row.realised) for row in certificate.problems] == [("first.weight", "missed")]
    assert "reads it 2 times, the adapted one 1 times" in str(certificate)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_a_folded_model_is_certified_through_its_exact_weights(dtype):
    torch.manual_seed(0)
    model = Chain().to(dtype)
    lora_fx.apply(model, [Rule(role="lm_head", rank=2), Rule(where="first", rank=3)], IDS)
    reference.fill(model)
    lora_fx.fold(model)
    state = reference.bits(model)
    certificate = lora_fx.certify(model, IDS)
    assert certificate and certificate.folded == {"first.weight": 0, "head.weight": 0}
    assert reference.same_bits(reference.bits(model), state)
    assert "every element of 2 weights is W + δ rounded once" in str(certificate)
    assert inventory(model).folded


def test_a_folded_element_that_is_off_by_one_step_is_counted(monkeypatch):
    def off_by_one(*args):
        total, delta = honest(*args)
        if len(total) > 2 and total.shape[1] > 3:
            total[2, 3] = torch.nextafter(total[2, 3].float(), torch.tensor(torch.inf))
        return total, delta

    honest = Tile.sums
    model = adapted(Rule(where="first", rank=2))
    reference.fill(model)
    monkeypatch.setattr(Tile, "sums", off_by_one)
    certificate = lora_fx.certify(lora_fx.fold(model), IDS)
    assert not certificate and certificate.folded == {"first.weight": 1}
    assert "folded first.weight: 1 elements not rounded once" in str(certificate)


def test_several_adapters_act_together_and_inactive_ones_are_named():
    model = adapted(Rule(where="first", rank=2))
    lora_fx.apply(model, Rule(where="first | second", rank=1), IDS, name="task")
    lora_fx.apply(model, Rule(where="first", rank=1), IDS, name="idle")
    lora_fx.activate(model, "default", "task")
    certificate = lora_fx.certify(model, IDS)
    assert certificate, str(certificate)
    assert {row.weight: row.adapters for row in certificate.rows} == {
        "first.weight": ("default", "task"), "second.weight": ("task",)}  # fmt: skip
    assert certificate.inactive == ("idle",) and "inactive: idle" in str(certificate)


def test_it_is_read_as_a_table_and_as_json():
    certificate = lora_fx.certify(adapted(), torch.arange(10))
    content = json.loads(certificate.to_json())
    assert content["certified"] is True and content["gradient_free"] == []
    assert [row["weight"] for row in content["rows"]] == [row.weight for row in certificate.rows]
    assert all(isinstance(row["effect"], float) for row in content["rows"])
    assert pickle.loads(pickle.dumps(certificate)) == certificate
    assert str(certificate).endswith(f"certified: {len(certificate.rows)} of {len(certificate.rows)} uses are covered")


def test_models_that_cannot_be_certified():
    with pytest.raises(PlanError, match="no active adapter") as caught:
        lora_fx.certify(Chain(), IDS)
    assert caught.value.place and caught.value.remedy
    model = adapted(Rule(where="first", rank=2))
    with pytest.raises(PlanError, match="no active adapter"):
        lora_fx.certify(lora_fx.fold(model, copy=True, final=True), IDS)
    with pytest.raises(CaptureError, match="does not run on the example inputs"):
        lora_fx.certify(model, torch.randn(3))
    with pytest.raises(CaptureError, match="on meta"):
        lora_fx.certify(model.to("meta"), IDS)


def test_a_refused_certificate_leaves_a_folded_model_folded():
    model = adapted(Rule(where="first", rank=2))
    reference.fill(model)
    state = reference.bits(lora_fx.fold(model))
    with pytest.raises(CaptureError):
        lora_fx.certify(model, torch.randn(3))
    assert reference.same_bits(reference.bits(model), state)


@pytest.mark.parametrize("seed", range(20))
def test_what_is_made_of_what_is_known_in_any_order_of_asking(seed):
    """Against all ancestors, of random programs."""
    draw, graph = random.Random(seed), fx.Graph()
    nodes = [graph.placeholder(f"x{k}") for k in range(3)]
    for _ in range(25):
        nodes.append(graph.call_function(torch.add, (draw.choice(nodes), draw.choice(nodes[-4:]))))
    firsts = draw.sample(nodes[8:], 2)
    truth, waiting = set(), list(firsts)
    while waiting:
        truth.add(node := waiting.pop())
        waiting += node.all_input_nodes
    made = flow._Made({node: k for k, node in enumerate(nodes)}, firsts)
    for node in draw.sample(nodes, len(nodes)):
        assert (node in made) == (node in truth)


def test_the_nodes_of_a_use_are_found_beside_it():
    """However much of the program comes before it."""
    model, x = nn.Sequential(*(nn.Linear(6, 6) for _ in range(12))), torch.randn(2, 6)
    lora_fx.apply(model, Rule(where="*", rank=2), x, check=False)
    reference.fill(model)
    here = inventory(model)
    found = flow.Flow(capture_graph(model, Inputs((x,), {}), as_is=True), here.storages(), here.modules)
    noted: list[fx.Node] = []

    class Watched(flow._Made):
        def _note(self, nodes):
            nodes = list(nodes)
            noted.extend(nodes)
            super()._note(nodes)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flow, "_Made", Watched)
        sizes = [(len(found.inside(reading)), len(noted)) for reading in found.readings]
    each = {(inside, after - before) for (inside, after), (_, before) in itertools.pairwise(reversed(sizes))}
    assert len(each) == 1, "the last of them as the first"
