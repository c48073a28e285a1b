"""Activation rewrites: y' = around(use, θ), which is no delta of a parameter, and never folds. Their laws over random
models are those of `assert_kind`."""

from __future__ import annotations

import copy
import os
from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import lora_fx
from lora_fx import LoraFxError, Rule
from lora_fx.checks.verification import compare
from lora_fx.deltas import adapted_weight
from lora_fx.deltas.kinds import REWRITES
from lora_fx.errors import AdapterError, CaptureError, EquivalenceError, FoldError, PlanError, RuleError
from lora_fx.export.adapters.files import Read
from lora_fx.graph.program import Program
from lora_fx.model.inventory import inventory
from lora_fx.passes.base import Facts, Pass, Result
from lora_fx.passes.insert import Insert
from lora_fx.passes.pipeline import Pipeline
from lora_fx.passes.planning import Plan
from lora_fx.passes.realising import demote
from lora_fx.passes.wiring import wire
from lora_fx.testing import assert_kind
from lora_fx.testing.comparing import bits, same_bits
from tests import reference

WORDS, WIDTH = 11, 8
IDS = torch.tensor([[1, 2, 3, 10], [4, 0, 5, 6]])
WITH_TOKENS = torch.tensor([[11, 12, 13, 1, 2, 14, 3, 10], [11, 12, 13, 4, 0, 14, 5, 6]])


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.up, self.down = nn.Linear(WIDTH, 12), nn.Linear(12, WIDTH)

    def heads(self, x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(-1, (2, -1)).transpose(1, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.norm(x)
        h = F.scaled_dot_product_attention(*(self.heads(own(h)) for own in (self.q, self.k, self.v)), is_causal=True)
        x = x + self.o(h.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(x)))


class Model(nn.Module):
    """A causal language model, its head tied to the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(WORDS, WIDTH), nn.Embedding(16, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(WIDTH, WORDS, bias=False)
        self.head.weight = self.words.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.words(ids) + self.places(torch.arange(ids.shape[1]))
        for block in self.blocks:
            x = block(x)
        return self.head(x)


BOTH = "attention.output | mlp.down"
QV = Rule(role="attention.query | attention.value", rank=2)
TOKENS = Rule(where="words", role="embedding", kind="tokens", settings={"prefix": 3, "infix": 1})
LAYERS = replace(TOKENS, kind="prefix_layer")
SYSTEMS = {
    "adapter H": [Rule(role=BOTH, kind="bottleneck", rank=2)],
    "adapter L": [Rule(role="mlp.down", kind="bottleneck", rank=2, settings={"norm": True, "activation": "relu"})],
    "adapter P": [Rule(role="mlp.down", kind="bottleneck", rank=3)],
    "adapter D": [Rule(role=BOTH, layers="1", kind="bottleneck", rank=2)],
    "compacter": [Rule(role=BOTH, kind="compacter", rank=4, settings={"n": 2})],
    "PreEmbed": [TOKENS],
    "LoRA + PE": [TOKENS, QV],
    "PreLayer": [LAYERS],
    "LoRA + PL": [LAYERS, QV],
}
"""Each of the paper's by rules, and how many numbers it trains."""
SIZES = {
    "adapter H": 4 * (2 * WIDTH * 2 + 2 + WIDTH),
    "adapter L": 2 * (2 * WIDTH * 2 + 2 + WIDTH) + 2 * 2 * WIDTH,
    "adapter P": 2 * (2 * WIDTH * 3 + 3 + WIDTH),
    "adapter D": 2 * (2 * WIDTH * 2 + 2 + WIDTH),
    "compacter": 2**3 + 4 * (2 * (WIDTH + 4) + 4 + WIDTH),
    "PreEmbed": 4 * WIDTH,
    "LoRA + PE": 4 * WIDTH + 4 * 2 * 2 * WIDTH,
    "PreLayer": 2 * 4 * WIDTH,
    "LoRA + PL": 2 * 4 * WIDTH + 4 * 2 * 2 * WIDTH,
}
LONGER = ("PreEmbed", "LoRA + PE", "PreLayer", "LoRA + PL")
"""Those with tokens of their own."""


def model() -> nn.Module:
    torch.manual_seed(0)
    return Model()


def adapted(rules, filled: bool = True, check: bool = False, **more) -> nn.Module:
    made = lora_fx.apply(model(), rules, IDS, check=check, **more)
    return fill(made) if filled else made


def fill(made: nn.Module) -> nn.Module:
    return reference.scattered(made, seed=1)


def given_ids(system: str) -> torch.Tensor:
    return WITH_TOKENS if system in LONGER else IDS


def refusal(error: type[LoraFxError], call, *arguments, **options) -> str:
    with pytest.raises(error) as raised:
        call(*arguments, **options)
    return str(raised.value)


def assert_bits(found: nn.Module, wanted: dict) -> None:
    now = bits(found)
    assert now.keys() == wanted.keys()
    assert not [name for name, own in wanted.items() if not same_bits(own, now[name])]


@pytest.fixture(params=list(SYSTEMS))
def system(request) -> str:
    return request.param


@pytest.mark.laws
@pytest.mark.parametrize("kind", list(REWRITES))
@settings(max_examples=80 if os.environ.get("LORA_FX_PROFILE") == "deep" else 2)
@given(data=st.data())
def test_the_laws_over_random_models(kind, data):
    assert_kind(kind, data)


# ── what they mean ───────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_linear_of_each_is_what_its_paper_says():
    torch.manual_seed(0)
    x = torch.randn(5, 6, dtype=torch.float64)
    for options in ({"activation": "relu"}, {"activation": "tanh", "norm": True}):
        for kind, own in (("bottleneck", {}), ("compacter", {"n": 2, "factors": 2})):
            layer = nn.Linear(6, 8, dtype=torch.float64)
            lora_fx.apply(layer, Rule(where="*", kind=kind, rank=4, settings={**own, **options}), x)
            t = {name: p.detach() for name, p in fill(layer).weight_lora_default.named_parameters()}
            if kind == "compacter":
                for name in ("down", "up"):
                    s, part = t[f"{name}_s"], t[f"{name}_t"]
                    t[name] = sum(torch.kron(t["shared"][i], s[i] @ part[i]) for i in range(2))
            y = z = x @ layer._parameters["weight"].T + layer.bias
            if "norm" in options:
                z = (y - y.mean(1, keepdim=True)) / (y.var(1, correction=0, keepdim=True) + 1e-5).sqrt()
                z = z * t["norm_weight"] + t["norm_bias"]
            z = z @ t["down"].T + t["down_bias"]
            z = z.tanh() if options["activation"] == "tanh" else z.clamp(min=0)
            wanted = (y + z @ t["up"].T + t["up_bias"]).detach()
            assert compare(layer(x).detach(), wanted, wanted, 2.0**-50, torch.float64), (kind, options)


def test_tokens_stand_behind_the_last_one_of_the_table():
    found, plain = adapted([TOKENS]), model()
    theta = found.words.weight_lora_default.tokens
    assert theta.shape == (4, WIDTH)
    looked_up = found.words(torch.tensor([0, 10, 11, 14]))
    assert torch.equal(looked_up, torch.cat([plain.words.weight[[0, 10]], theta[[0, 3]]]))
    assert found(WITH_TOKENS).shape == (2, 8, WORDS) and torch.equal(found(IDS), plain(IDS))  # no logits of new ones
    for wrong in (15, -1):
        with pytest.raises(IndexError):
            found.words(torch.tensor([wrong]))


def test_tokens_start_as_words_of_the_table():
    found = adapted([TOKENS], filled=False)
    theta, table = found.words.weight_lora_default.tokens, found.words._parameters["weight"]
    assert all(bool((table == row).all(1).any()) for row in theta)


def test_by_dispatch_it_is_what_it_is_by_graph(system):
    found, ids = adapted(SYSTEMS[system]), given_ids(system)
    graph = found(ids)
    assert {a.realised for a in inventory(found).adapters if a.kind.behind is None} <= {"graph"}
    demote(inventory(found).adapters)
    wire(found)
    assert {a.realised for a in inventory(found).adapters} == {"dispatch"}
    assert torch.equal(found(ids), graph) and not torch.equal(found(ids), adapted(SYSTEMS[system], False)(ids))


def test_a_generated_forward_shows_what_is_added():
    forward = lora_fx.show(adapted(SYSTEMS["adapter H"], False).blocks[0].down)
    assert [line.strip() for line in forward.splitlines() if "linear" in line or "gelu" in line or "add" in line] == [
        "linear = torch._C._nn.linear(input_1, weight, bias)",
        "linear_1 = torch._C._nn.linear(linear, weight_lora_default_down, weight_lora_default_down_bias)",
        "gelu = torch._C._nn.gelu(linear_1)",
        "linear_2 = torch._C._nn.linear(gelu, weight_lora_default_up, weight_lora_default_up_bias)",
        "add = linear + linear_2",
        "return add",
    ]


def test_it_stands_around_the_deltas_and_a_later_one_around_an_earlier_one():
    torch.manual_seed(0)
    layer, x = nn.Linear(6, 8, dtype=torch.float64), torch.randn(5, 6, dtype=torch.float64)
    for name, rule in (
        ("first", Rule(where="*", kind="bottleneck", rank=2)),
        ("delta", Rule(where="*", rank=2)),
        ("last", Rule(where="*", kind="bottleneck", rank=3, settings={"activation": "relu"})),
    ):
        lora_fx.apply(layer, rule, x, name=name)
    fill(layer)
    A, B = layer.weight_lora_delta.A, layer.weight_lora_delta.B
    y = x @ (layer._parameters["weight"] + B @ A).T + layer.bias
    for name, act in (("first", F.gelu), ("last", F.relu)):
        t = getattr(layer, f"weight_lora_{name}")
        y = y + act(y @ t.down.T + t.down_bias) @ t.up.T + t.up_bias
    assert compare(layer(x).detach(), y.detach(), y.detach(), 2.0**-50, torch.float64)
    assert lora_fx.certify(layer, x)


def test_beside_a_weight_in_bfloat16_its_theta_is_float32_and_its_result_is_not():
    made = model().to(torch.bfloat16)
    plain = copy.deepcopy(made)
    lora_fx.apply(made, [*SYSTEMS["adapter L"], TOKENS], IDS)
    assert {p.dtype for p in made.parameters() if p.requires_grad} == {torch.float32}
    with torch.no_grad():
        assert torch.equal(made(IDS), plain(IDS)) and made(WITH_TOKENS).dtype == torch.bfloat16
    demote(inventory(made).adapters)
    wire(made)
    assert fill(made)(WITH_TOKENS).dtype == torch.bfloat16


# ── the verbs ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_each_system_trains_by_rules_alone_and_exactly_its_own(system):
    found, plain, ids = lora_fx.apply(model(), SYSTEMS[system], IDS), model(), given_ids(system)
    assert lora_fx.plan(plain, SYSTEMS[system], IDS).parameters == SIZES[system]
    trained = {name: p for name, p in found.named_parameters() if p.requires_grad}
    assert sum(p.numel() for p in trained.values()) == SIZES[system]
    with torch.no_grad():
        assert torch.equal(found(IDS), plain(IDS))
    before = {name: p.detach().clone() for name, p in found.named_parameters() if name not in trained}
    target = torch.randint(WORDS, ids.shape, generator=torch.Generator().manual_seed(2))
    optimizer, losses = torch.optim.Adam(trained.values(), 0.05), []
    for _ in range(25):
        loss = F.cross_entropy(found(ids).flatten(0, 1), target.flatten())
        optimizer.zero_grad()
        loss.backward()
        losses.append(float(loss.detach()))
        optimizer.step()
    assert losses[-1] < 0.8 * losses[0], losses
    reached = {name for name, p in found.named_parameters() if p.grad is not None and bool(p.grad.any())}
    assert reached == set(trained)
    now = dict(found.named_parameters())
    assert all(torch.equal(now[name], own) for name, own in before.items())


def test_saved_copied_and_put_away_it_is_the_same(system, tmp_path):
    found, ids = adapted(SYSTEMS[system]), given_ids(system)
    out = found(ids)
    lora_fx.save_adapter(found, tmp_path, peft=False)
    loaded = lora_fx.load_adapter(model(), tmp_path, IDS, check=False)
    assert_bits(loaded, bits(found))
    assert torch.equal(loaded(ids), out)
    own, wanted = (
        [dict(a.settings) for a in inventory(m).adapters if a.kind.name in REWRITES] for m in (loaded, found)
    )
    assert own == wanted
    assert torch.equal(copy.deepcopy(found)(ids), out)
    with lora_fx.disabled(found):
        assert torch.equal(found(IDS), model()(IDS))
    assert torch.equal(found(ids), out)
    lora_fx.remove(found, "default")
    assert_bits(found, bits(model()))
    assert type(found.words) is nn.Embedding and type(found.blocks[1].down) is nn.Linear


@pytest.mark.parametrize("system", ["adapter L", "compacter", "LoRA + PE", "LoRA + PL"])
def test_nothing_that_folds_takes_it(system, tmp_path):
    found = adapted(SYSTEMS[system])
    before, why = bits(found), "sequence length" if system in LONGER else "one after the other"
    for call, options in (
        (lora_fx.fold, {}),
        (lora_fx.fold, {"final": True}),
        (lambda m: lora_fx.switch(m, "default"), {}),
        (lambda m, **o: lora_fx.export_onnx(m, IDS, tmp_path / "m.onnx", **o), {}),
        (lambda m, **o: lora_fx.export_onnx(m, IDS, tmp_path / "m.onnx", **o), {"prove": True}),
    ):
        assert why in refusal(FoldError, call, found, **options)
    said = refusal(LoraFxError, lora_fx.export_onnx, found, IDS, tmp_path / "m.onnx", adapters="switchable")
    assert "no factors to feed" in said and 'adapters="unfolded"' in said
    assert "peft=False" in refusal(LoraFxError, lora_fx.save_adapter, found, tmp_path / "peft")
    assert not list(tmp_path.iterdir())
    assert_bits(found, before)
    assert all(a.active for a in inventory(found).adapters)


def test_deltas_beside_it_fold_alone():
    found = adapted([QV], name="lora")
    lora_fx.apply(found, SYSTEMS["adapter H"], IDS, name="beside", check=False)
    fill(found)
    both = found(IDS)
    lora_fx.activate(found, "lora")
    alone = found(IDS)
    lora_fx.fold(found)
    assert lora_fx.verify(lora_fx.unfold(copy.deepcopy(found)), found, IDS)
    lora_fx.activate(lora_fx.unfold(found), "lora", "beside")
    assert torch.equal(found(IDS), both) and not torch.equal(both, alone)


def test_it_has_no_delta():
    found = adapted(SYSTEMS["adapter P"])
    assert "has no δ" in refusal(AdapterError, found.blocks[0].down.weight_lora_default.delta)
    assert "bottleneck" in repr(found.blocks[0].down.weight_lora_default)


def test_what_has_no_such_use_is_refused_by_name():
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.raw, self.shift = nn.Parameter(torch.randn(6, 5)), nn.Parameter(torch.randn(5))
            self.lstm, self.conv = nn.LSTM(5, 5), nn.Conv1d(5, 4, 2)
            self.qkv, self.normed, self.cut = nn.Linear(5, 15), nn.Linear(5, 5), nn.Linear(5, 5)
            self.experts = nn.Parameter(torch.randn(3, 5, 5))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            h = self.lstm(x @ self.raw + self.shift)[0]
            h = F.scaled_dot_product_attention(*self.qkv(h).chunk(3, -1)) + F.linear(h[..., :4], self.cut.weight[:, :4])
            h = self.normed(h) + self.normed.weight.norm() + (h.expand(3, *h.shape).flatten(1, 2) @ self.experts).sum()
            return self.conv(h.transpose(1, 2))

    torch.manual_seed(0)
    odd, x = Odd(), torch.randn(2, 4, 6)
    narrow = {"kind": "bottleneck", "rank": 2}
    for rule, why in (
        (Rule(where="raw", **narrow), "its bias shift is added by an op of its own"),
        (Rule(where="lstm*", **narrow), "lstm takes it whole"),
        (Rule(where="conv*", **narrow), "features do not come last"),
        (Rule(where="cut*", **narrow), "reads a part of it"),
        (Rule(where="normed*", **narrow), "linalg_vector_norm in the model reads it besides"),
        (Rule(where="experts", **narrow), "a matrix for each expert"),
        (Rule(role="attention.query", **narrow), "asks for 5 of its 15 features alone"),
        (Rule(where="qkv*", kind="compacter", rank=4), "n=4 does not divide its 15 output features"),
        (Rule(where="qkv*", kind="tokens", settings={"prefix": 1}), "linear looks nothing up"),
        (Rule(where="qkv*", kind="bottleneck", rank=16), "more than the 15 features"),
    ):
        assert why in refusal(PlanError, lora_fx.plan, odd, rule, x), rule
    assert len(lora_fx.plan(odd, Rule(where="*", otherwise="skip", **narrow), x).rows) == 1
    said = refusal(PlanError, lora_fx.plan, model(), replace(TOKENS, role=None), IDS)
    assert "linear looks nothing up" in said and "role='embedding' takes the look-up" in said


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"kind": "bottleneck"}, "needs rank"),
        ({"kind": "bottleneck", "rank": 2, "settings": {"norm": 1}}, "norm=1"),
        ({"kind": "bottleneck", "rank": 2, "settings": {"activation": ["relu"]}}, "is none of gelu"),
        ({"kind": "bottleneck", "rank": 2, "dropout": 0.1}, "no setting of the kind"),
        ({"kind": "compacter", "rank": 3}, "n=4 does not divide rank=3"),
        ({"kind": "compacter", "rank": 4, "settings": {"factors": 0}}, "factors=0"),
        ({"kind": "tokens"}, "there is no token to train"),
        ({"kind": "tokens", "settings": {"prefix": True}}, "prefix=True"),
    ],
)
def test_a_rule_with_what_it_does_not_take_is_refused(settings, why):
    assert why in refusal(RuleError, Rule, where="*", **settings)


def test_a_use_that_no_plan_has_seen_is_refused_when_it_runs():
    class Either(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.whole = nn.Parameter(torch.randn(5, 5)), False

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (x * self.weight.sum()) if self.whole else F.linear(x, self.weight)

    found, x = Either(), torch.randn(2, 5)
    lora_fx.apply(found, Rule(where="*", kind="bottleneck", rank=2), x)
    found.whole = True
    assert "reads it in another way" in refusal(LoraFxError, found, x)


class Product(torch.autograd.Function):
    """A kernel of the model's own, which wants a plain tensor."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        return x @ weight.t()

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x, weight = ctx.saved_tensors
        return gradient @ weight, gradient.t() @ x


class Own(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(5, 5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return Product.apply(x, self.weight)


def test_code_that_wants_a_plain_tensor_is_told_that_no_product_was_seen():
    found = Own()
    said = refusal(
        EquivalenceError, lora_fx.apply, found, Rule(where="*", kind="bottleneck", rank=2), torch.randn(2, 5)
    )
    assert "does not train" in said and type(found) is Own and set(found.state_dict()) == {"weight"}


# ── checked ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("rules", [SYSTEMS["adapter L"], SYSTEMS["LoRA + PE"]])
def test_the_self_check_finds_a_rewrite_that_is_not_done(rules, monkeypatch):
    lora_fx.apply(model(), rules, IDS)
    monkeypatch.setattr(adapted_weight, "_around", lambda own, use, theta, x: use(x))
    lost = model()
    before = bits(lost)
    refusal(EquivalenceError, lora_fx.apply, lost, rules, IDS)
    assert_bits(lost, before)
    assert type(lost.words) is nn.Embedding


def test_memory_that_is_short_in_train_mode_is_no_mode_that_the_model_lacks():
    class Large(Model):
        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            if self.training:
                raise torch.OutOfMemoryError("no memory")
            return super().forward(ids)

    found = Large()
    assert "no memory" in refusal(CaptureError, lora_fx.apply, found, [TOKENS], IDS)
    assert set(found.state_dict()) == set(model().state_dict())


def test_a_certificate_has_a_row_for_each_use(system):
    certificate = lora_fx.certify(adapted(SYSTEMS[system]), IDS)
    rules = SYSTEMS[system]
    uses = {
        "adapter H": 4, "adapter L": 2, "adapter P": 2, "adapter D": 2, "compacter": 4,
        "PreEmbed": 1, "LoRA + PE": 5, "PreLayer": 3, "LoRA + PL": 7,
    }[system]  # fmt: skip
    assert certificate and len(certificate.rows) == uses and len(certificate.whole) == 2, (rules, str(certificate))
    assert all(row.effect > 100 * row.bound for row in certificate.rows)


def test_an_unseen_one_is_not_certified():
    class Seldom(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.both = nn.Linear(4, 4), nn.Linear(4, 4), True

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.b(self.a(x)) if self.both else self.a(x)

    found, x = Seldom(), torch.randn(2, 4)
    lora_fx.apply(found, Rule(where="*", kind="bottleneck", rank=2), x)
    found.both = False
    certificate = lora_fx.certify(found, x)
    assert not certificate and [row.weight for row in certificate.unseen] == ["b.weight"]


# ── what adapters have in common ─────────────────────────────────────────────────────────────────────────────────────


def test_what_a_compacter_shares_has_one_owner(tmp_path):
    found = adapted([replace(SYSTEMS["compacter"][0], layers="0")])
    owned = [a for a in inventory(found).adapters if "shared" in a._parameters]
    kept = owned[0].shared.detach().clone()
    lora_fx.apply(found, [replace(SYSTEMS["compacter"][0], layers="1")], IDS)  # later, under the same name
    assert len(owned) == 1 and all(a.owner("shared") is owned[0] for a in inventory(found).adapters)
    assert len(inventory(found).adapters) == 4 and torch.equal(owned[0].shared, kept)
    assert [name for name in found.state_dict() if name.endswith("shared")] == ["blocks.0.o.weight_lora_default.shared"]
    for copied in (copy.deepcopy(found), lora_fx.load_adapter(model(), _saved(found, tmp_path), IDS, check=False)):
        assert len({id(a.shared) for a in inventory(copied).adapters}) == 1
        assert copied.blocks[0].o.weight_lora_default.shared is not owned[0].shared
    later = found.blocks[1].down
    later.weight_lora_default.start(later._parameters["weight"])  # what others have trained stays
    assert torch.equal(owned[0].shared, kept)
    lora_fx.apply(found, [replace(SYSTEMS["compacter"][0], layers="1")], IDS, name="another")
    assert len({id(a.shared) for a in inventory(found).adapters}) == 2
    with pytest.raises(AttributeError):
        _ = owned[0].nothing


def _saved(found: nn.Module, folder) -> object:
    lora_fx.save_adapter(found, folder, peft=False)
    return folder


def test_other_numbers_for_what_is_shared_are_refused(tmp_path):
    @dataclass(frozen=True)
    class Part(Pass):
        name = "part"

        def call(self, model: nn.Module, facts: Facts) -> Result:
            plan = facts[Plan]
            plan.rows[2].stored = {**plan.rows[2].stored, "shared": plan.rows[2].stored["shared"] + 1}
            return Result(model, False, (plan, facts[Program]))

    folder, fresh = _saved(adapted(SYSTEMS["compacter"]), tmp_path), model()
    said = refusal(PlanError, Pipeline("load", (Read(folder, IDS), Part(), Insert())), fresh)
    assert "have 'shared' in common: it has other numbers here" in said and not inventory(fresh).adapters


# ── batches ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_tokens_are_put_into_a_batch():
    batch = {
        "input_ids": torch.tensor([[0, 0, 5, 6, 7, 8], [1, 2, 3, 4, 9, 0]]),
        "attention_mask": torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0]]),
        "labels": torch.tensor([[-100, -100, -100, -100, 7, 8], [-100, -100, -100, -100, -100, -100]]),
        "position_ids": torch.tensor([[0, 0, 0, 1, 2, 3], [0, 1, 2, 3, 4, 5]]),
        "token_type_ids": torch.tensor([[0, 0, 0, 1, 1, 1], [2, 2, 2, 2, 2, 2]]),
        "use_cache": False,
    }
    before = {name: own.clone() for name, own in batch.items() if name != "use_cache"}
    made = lora_fx.with_tokens(batch, prefix=2, infix=1, vocabulary=10)
    assert {name: own.tolist() for name, own in made.items() if name != "use_cache"} == {
        "input_ids": [[10, 11, 0, 0, 5, 6, 12, 7, 8], [10, 11, 1, 2, 3, 4, 9, 12, 0]],
        "attention_mask": [[1, 1, 0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1, 1, 0]],
        "labels": [[-100] * 7 + [7, 8], [-100] * 9],
        "position_ids": [[0, 1, 2, 2, 2, 3, 4, 5, 6], [0, 1, 2, 3, 4, 5, 6, 7, 8]],
        "token_type_ids": [[0, 0, 0, 0, 0, 1, 1, 1, 1], [2] * 9],
    }
    assert made["use_cache"] is False and all(torch.equal(batch[name], own) for name, own in before.items())
    alone = lora_fx.with_tokens(batch["input_ids"].int(), infix=2, vocabulary=10, at=[0, 6])
    assert alone.tolist() == [[10, 11, 0, 0, 5, 6, 7, 8], [1, 2, 3, 4, 9, 0, 10, 11]] and alone.dtype == torch.int32
    at = lora_fx.with_tokens({**batch, "token_type_ids": None}, 0, 1, vocabulary=10, at=0)
    assert at["position_ids"][1].tolist() == [0, 1, 2, 3, 4, 5, 6] and at["token_type_ids"] is None


@pytest.mark.parametrize(
    ("change", "options", "why"),
    [
        ({}, {"prefix": -1}, "prefix=-1"),
        ({}, {"prefix": 1, "vocabulary": 6}, "the id 6 is none of 6"),
        ({}, {"prefix": 9, "longest": 12}, "9 + 4 + 0 tokens are more than the 12 positions"),
        ({}, {"infix": 1, "at": 5}, "at=5 is no place"),
        ({}, {"infix": 1, "at": [1]}, "no place in 2 rows"),
        ({"input_ids": torch.zeros(2, 4)}, {"prefix": 1}, "no ids of shape"),
        ({"labels": torch.zeros(2, 3, dtype=torch.long)}, {"prefix": 1}, "its shape is (2, 3)"),
        ({"bbox": torch.zeros(2, 4, 4)}, {"prefix": 1}, "something for each token"),
    ],
)
def test_a_batch_that_cannot_have_them_is_refused(change, options, why):
    batch = {"input_ids": IDS, **change}
    batch["input_ids"] = batch["input_ids"].clamp(max=6)
    assert why in refusal(LoraFxError, lora_fx.with_tokens, batch, **{"vocabulary": WORDS, **options})


def test_with_tokens_and_the_kind_agree():
    found = adapted([TOKENS])
    assert torch.equal(lora_fx.with_tokens(IDS, 3, 1, vocabulary=WORDS, at=2), WITH_TOKENS)
    assert torch.equal(
        found.words(WITH_TOKENS)[:, [0, 1, 2, 5]], found.words.weight_lora_default.tokens.expand(2, -1, -1)
    )


# ── ONNX ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_unfolded_it_runs_in_onnx_runtime(tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    rules = [TOKENS, Rule(role="mlp.down", kind="bottleneck", rank=2, settings={"norm": True}), QV]
    found = adapted([*rules, Rule(role="attention.output", kind="compacter", rank=4, settings={"n": 2})]).eval()
    file = tmp_path / "m.onnx"
    report = lora_fx.export_onnx(found, IDS, file, adapters="unfolded")
    assert report.comparisons
    session = onnxruntime.InferenceSession(file)
    (out,) = session.run(None, {session.get_inputs()[0].name: WITH_TOKENS[:, :4].numpy()})
    wanted = found.double()(WITH_TOKENS[:, :4]).detach()
    noise = (found.float()(WITH_TOKENS[:, :4]).detach() - wanted).abs().max() / wanted.square().mean().sqrt()
    assert compare(torch.from_numpy(out), wanted, wanted, float(noise), torch.float32)


def test_ids_that_no_input_holds_are_left_alone():
    class Derived(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words = nn.Embedding(5, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.words((x > 0).long())

    found, x = Derived(), torch.randn(2, 3)
    lora_fx.apply(found, Rule(where="*", kind="tokens", settings={"prefix": 1}), x)
    assert lora_fx.certify(found, x)  # what has reached the table is another thing than what its use does
