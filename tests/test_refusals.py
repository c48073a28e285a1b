"""Bad input: one error family, each message with value, place, reason and remedy; the model bitwise as it was."""

from __future__ import annotations

import copy
import math
import pickle
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

import lora_fx
from lora_fx import LoraFxError, Rule
from lora_fx.errors import AdapterError, CaptureError, EquivalenceError, FileError, FoldError, PlanError, RuleError
from lora_fx.passes.wiring import wire
from lora_fx.testing import assert_equivalent, assert_folds_exactly
from tests import reference


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(12, 20), nn.Linear(12, 20), nn.Linear(20, 12)
        self.head = nn.Linear(12, 7)

    def forward(self, x):
        return self.head(x + self.down(F.silu(self.gate(x)) * self.up(x)))


X = torch.randn(3, 12, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def model() -> nn.Module:
    return Gated()


def snapshot(model: nn.Module) -> tuple:
    flags = [(m.training, dict(m._forward_hooks), dict(m._forward_pre_hooks)) for m in model.modules()]
    marks = [sorted(m.__dict__) for m in model.modules()]
    return reference.classes(model), flags, marks, [p.requires_grad for p in model.parameters()]


def refused(call, model: nn.Module, kind: type[LoraFxError], *parts: str) -> LoraFxError:
    """The call refuses with these texts in its message, and leaves the model bitwise as it was."""
    before, state = snapshot(model), reference.bits(model)
    with pytest.raises(kind) as caught:
        call()
    message = str(caught.value)
    for part in parts:
        assert part in message, f"{part!r} is not in: {message}"
    assert caught.value.reason and caught.value.place and caught.value.remedy, "value, place, reason and remedy"
    assert snapshot(model) == before and reference.same_bits(reference.bits(model), state)
    return caught.value


@pytest.mark.parametrize(
    ("rule", "parts"),
    [
        (dict(where="*.gaet", rank=2), ("matches nothing", "gate.weight (mlp.gate)")),
        (dict(role="mlp.gaet", rank=2), ("matches nothing", "gate.weight (mlp.gate)")),
        (dict(where="*", rank=2, expect=3), ("matches 4 sites", "expect=3", "down.weight")),
        (dict(where="gate", rank=13), ("rank=13", "gate.weight", "at most 12")),
    ],
)
def test_a_rule_that_does_not_fit_the_model(model, rule, parts):
    refused(lambda: lora_fx.apply(model, Rule(**rule), X), model, LoraFxError, *parts)


@pytest.mark.parametrize(
    ("settings", "part"),
    [
        (dict(where="*", rank=0), "rank=0"),
        (dict(where="*", rank=-3), "rank=-3"),
        (dict(where="*", rank=2.5), "rank=2.5"),
        (dict(where="*", rank=True), "rank=True"),
        (dict(where="*", rank=2, alpha=math.inf), "alpha=inf"),
        (dict(where="*", rank=2, alpha=math.nan), "alpha=nan"),
        (dict(where="*", rank=2, dropout=1.0), "dropout=1.0"),
        (dict(where="*", rank=2, dropout=-0.1), "dropout=-0.1"),
        (dict(where="*", rank=2, scaling="none"), "scaling='none'"),
        (dict(where="*", rank=2, init="ones"), "init='ones'"),
        (dict(where="*", rank=2, otherwise="ignore"), "otherwise='ignore'"),
        (dict(where="*", otherwise=None), "otherwise=None"),
        (dict(where=" ", rank=2), "where=' '"),
        (dict(where=3, rank=2), "where=3"),
        (dict(layers="1-x", rank=2), "layers='1-x'"),
        (dict(rank=2), "no key"),
        (dict(where="*", adapt="gate", rank=2), "adapt='gate'"),
    ],
)
def test_a_rule_that_is_malformed(settings, part):
    with pytest.raises(RuleError, match=re.escape(part)) as caught:
        Rule(**settings)
    assert caught.value.place.startswith("Rule(") and caught.value.remedy


@pytest.mark.parametrize(
    ("rules", "part"),
    [
        ([], "no rule"),
        (17, "17 is no rule"),
        ({"were": "*", "rank": 2}, "did you mean 'where'"),
        ([{"where": "*", "rank": 2, "colour": 1}], "there is no argument colour=1"),
        ("missing.toml", "it cannot be read: No such file"),
    ],
)
def test_rules_that_are_no_rules(model, rules, part):
    refused(lambda: lora_fx.apply(model, rules, X), model, RuleError, part)


def test_a_toml_file_that_is_no_rules(model, tmp_path):
    for text, part in (("rule = [", "is no TOML"), ("[lora]\nrank = 2", "['lora']"), ("[[rule]]\nrnk = 2", "'rank'")):
        file = tmp_path / "rules.toml"
        file.write_text(text)
        refused(lambda file=file: lora_fx.apply(model, file, X), model, RuleError, part)


def test_a_later_rule_says_that_earlier_ones_took_its_sites(model):
    rules = [Rule(where="*", rank=2), Rule(where="gate", rank=4)]
    refused(lambda: lora_fx.apply(model, rules, X), model, RuleError, "1 more are decided by earlier rules")


def test_a_role_rule_without_example_inputs(model):
    refused(
        lambda: lora_fx.apply(model, Rule(role="mlp.*", rank=2)), model, RuleError, "role='mlp.*'", "example_inputs"
    )
    lora_fx.apply(model, Rule(where="gate", rank=2))  # a name needs no graph


def test_example_inputs_that_the_model_rejects(model):
    rule = Rule(where="*", rank=2)
    for inputs in (torch.randn(3, 11), (X, X), {"y": X}, "text"):
        refused(
            lambda inputs=inputs: lora_fx.apply(model, rule, inputs), model, CaptureError, "example_inputs", "Gated"
        )


def test_a_model_that_returns_no_tensor():
    class Count(Gated):
        def forward(self, x):
            return int(super().forward(x).argmax())

    model = Count()
    refused(lambda: lora_fx.apply(model, Rule(where="*", rank=2), X), model, CaptureError, "returns int", "output")


def test_a_scripted_module():
    with (
        pytest.warns((DeprecationWarning, FutureWarning), match="jit.script")
        if torch.__version__ >= "2.10"
        else pytest.MonkeyPatch.context()
    ):
        scripted = torch.jit.script(nn.Linear(12, 7))
    model = nn.Sequential(scripted)
    for call in (lambda: lora_fx.apply(model, Rule(where="*", rank=2), X), lambda: lora_fx.capture(model, X)):
        with pytest.raises(CaptureError, match="ScriptModule") as caught:
            call()
        assert caught.value.place == "0" and caught.value.remedy


@pytest.mark.parametrize("count", [1, 2])
def test_a_rule_that_skips_all_it_asks_for_is_not_told_to_skip(count):
    model = nn.Sequential(*(parametrizations.weight_norm(nn.Linear(12, 12)) for _ in range(count)))
    rule = Rule(where="*", rank=2, otherwise="skip")
    error = refused(
        lambda: lora_fx.apply(model, rule, X), model, PlanError, "remove_parametrizations", "nothing else is"
    )
    assert "otherwise=" not in str(error) and "a rule without" not in str(error)


def test_a_weight_for_which_nothing_can_be_done_has_a_remedy_all_the_same():
    model = nn.Linear(12, 7, dtype=torch.complex64)
    x = X.to(torch.complex64)
    error = refused(lambda: lora_fx.apply(model, Rule(where="*", rank=2), x), model, PlanError, "complex")
    assert error.remedy.startswith("leave it out")


def test_a_model_without_weights_is_not_told_what_is_nearest():
    model = nn.ReLU()
    error = refused(lambda: lora_fx.apply(model, Rule(where="*", rank=2), X), model, RuleError, "there is no weight")
    assert "nearest" not in str(error)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.parametrize("where", ["*linear1", "layers.1.*"])
def test_an_encoder_that_leaves_out_what_is_padded(where):
    """Torch's fast path reads weights past their adapters; without it the padded positions are computed, too."""
    layer = nn.TransformerEncoderLayer(12, 2, 16, dropout=0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, 2).eval()
    inputs = dict(
        src=torch.randn(2, 5, 12), src_key_padding_mask=torch.arange(5).expand(2, 5) > torch.tensor([[4], [2]])
    )

    def call():
        return lora_fx.apply(model, Rule(where=where, rank=2), inputs)

    refused(call, model, EquivalenceError, "use_nested_tensor = False on the model, if padding is masked")
    model.use_nested_tensor = False
    call()
    reference.fill(model)
    assert lora_fx.verify(model, lora_fx.fold(model, copy=True), inputs)


@pytest.mark.parametrize("verb", ["summary", "memory", "verify", "suggest"])
def test_a_lazy_module_in_verbs_that_record_nothing(verb):
    model, x = nn.Sequential(nn.LazyLinear(3), nn.Linear(3, 2)), torch.randn(2, 4)
    call = {
        "summary": lambda: lora_fx.summary(model),
        "memory": lambda: lora_fx.memory(model, Rule("*", rank=2), "adamw", torch.float32, x),
        "verify": lambda: lora_fx.verify(model, model, x),
        "suggest": lambda: lora_fx.suggest(model, 100, [x], lambda m, batch: m(batch).sum()),
    }[verb]
    with pytest.raises(CaptureError, match=r"^0\.weight: the parameter is lazy"):
        call()
    assert isinstance(model[0].weight, nn.UninitializedParameter)


def test_a_lazy_module():
    model = nn.Sequential(nn.LazyLinear(7))
    with pytest.raises(CaptureError, match="lazy") as caught:
        lora_fx.apply(model, Rule(where="*", rank=2), X)
    assert caught.value.place == "0.weight" and caught.value.remedy
    assert isinstance(model[0].weight, nn.parameter.UninitializedParameter)


def test_a_computed_weight():
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(12, 20)), nn.Linear(20, 7))
    error = refused(
        lambda: lora_fx.apply(model, Rule(where="0", rank=2), X),
        model,
        PlanError,
        "_weight_norm",
        "remove_parametrizations",
    )
    assert error.place.startswith("0.parametrizations.weight")
    lora_fx.apply(model, [Rule(where="0"), Rule(where="*", rank=2)], X)  # the cure it names


_TAKEN = {
    "parametrized": (
        lambda m: parametrize.register_parametrization(m, "weight", nn.Identity()),
        lambda m: parametrize.remove_parametrizations(m, "weight"),
        ("gate.weight", "ceased to be a parameter", "remove_parametrizations"),
    ),
    "a bias parametrized": (
        lambda m: parametrize.register_parametrization(m, "bias", nn.Identity()),
        lambda m: parametrize.remove_parametrizations(m, "bias"),
        ("gate: since", "it has been given the class ParametrizedLinear", "remove_parametrizations"),
    ),
    "pruned": (
        lambda m: prune.identity(m, "weight"),
        lambda m: prune.remove(m, "weight"),
        ("gate.weight", "ceased to be a parameter", "prune.remove"),
    ),
}


@pytest.mark.parametrize("how", _TAKEN)
def test_a_weight_that_another_tool_has_taken_over(model, how, tmp_path):
    """The forward is right, for the branch stands beside whatever makes the weight. Verbs would leave one out."""
    take, give_back, parts = _TAKEN[how]
    lora_fx.apply(model, Rule(where="*", rank=2), X)
    reference.fill(model)
    before = model(X)
    take(model.gate)
    assert torch.equal(model(X), before)
    assert torch.equal(copy.deepcopy(model)(X), before)
    reading = [lora_fx.adapters, lambda m: lora_fx.save_adapter(m, tmp_path / "adapter")]
    for verb in (
        lora_fx.fold,
        lambda m: lora_fx.fold(m, final=True),
        lambda m: lora_fx.switch(m, "default"),
        lambda m: lora_fx.remove(m, "default"),
        lambda m: lora_fx.apply(m, Rule(where="head", rank=1), X, name="more"),
        *(reading if how != "a bias parametrized" else []),
    ):
        refused(lambda verb=verb: verb(model), model, LoraFxError, *parts)
    give_back(model.gate)
    assert_folds_exactly(model, X)


@pytest.mark.parametrize("how", ["parametrized", "pruned"])
def test_a_folded_weight_that_another_tool_has_taken_over(model, how):
    take, give_back, _ = _TAKEN[how]
    lora_fx.apply(model, Rule(where="*", rank=2), X)
    reference.fill(model)
    before = model(X)
    lora_fx.fold(model)
    take(model.gate)
    refused(lambda: lora_fx.unfold(model), model, LoraFxError, "gate.weight", "ceased to be a parameter")
    give_back(model.gate)
    assert torch.equal(lora_fx.unfold(model)(X), before)


def test_an_attribute_of_a_forward_under_a_derived_class():
    class Scaled(nn.Linear):
        scale = None

        def __init__(self) -> None:
            super().__init__(12, 7)
            self.scale = 2

        def forward(self, x):
            return super().forward(x) * self.scale

    model = nn.Sequential(Scaled())
    lora_fx.apply(model, Rule(where="*", rank=2), X)
    reference.fill(model)
    twice = model(X)
    parametrize.register_parametrization(model[0], "bias", nn.Identity())
    model[0].note = "another attribute"
    with pytest.raises(LoraFxError, match="scale=2 in it") as caught:
        model[0].scale = 3
    assert caught.value.place == "ParametrizedScaled.scale" and torch.equal(model(X), twice)
    parametrize.remove_parametrizations(model[0], "bias")
    assert "self.scale" not in lora_fx.show(model[0])
    model[0].scale = 2.0  # equal to 2, and another number to a forward: it makes floats of integers
    assert "self.scale" in lora_fx.show(model[0])
    model[0].scale = 4
    assert torch.equal(model(X), 2 * twice)


def test_an_attribute_that_becomes_a_tensor():
    """Pruning computes the bias anew in each forward, as a plain attribute of the module."""
    model = nn.Sequential(nn.Linear(12, 7))
    prune.identity(model[0], "bias")
    lora_fx.apply(model, Rule(where="*", rank=2), X)
    reference.fill(model)
    model(X)
    lora_fx.unfold(lora_fx.fold(model))  # the forward that is written now has seen a tensor there
    with torch.no_grad():
        model[0].bias_orig += 1
    assert_equivalent(lora_fx.fold(model, copy=True), model, X)


def test_a_quantised_weight():
    class Int8(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randint(-9, 9, (7, 12), dtype=torch.int8), requires_grad=False)

        def forward(self, x):
            return F.linear(x, self.weight.to(x.dtype) * 0.1)

    model = Int8()
    refused(lambda: lora_fx.apply(model, Rule(where="*", rank=2), X), model, PlanError, "quantised", "int8", "weight")


class Many(nn.Module):
    """Six layers whose weight is normed, one that is too small for the rank, and one that is as it should be."""

    def __init__(self) -> None:
        super().__init__()
        self.normed = nn.Sequential(*(parametrizations.weight_norm(nn.Linear(12, 12)) for _ in range(6)))
        self.small, self.plain = nn.Linear(12, 3), nn.Linear(3, 12)
        self.head = nn.Linear(12, 9)

    def forward(self, x):
        return self.head(self.plain(self.small(self.normed(x))))


def test_all_that_cannot_be_adapted_is_in_one_message():
    model = Many()
    error = refused(
        lambda: lora_fx.apply(model, Rule(where="*", rank=4), X),
        model,
        PlanError,
        "the plan: 8 sites cannot be adapted",
        "normed.0.parametrizations.weight.original1, normed.1.",
        "… 1 more: the weight is computed before it multiplies",
        "remove_parametrizations",
        "small.weight: rank=4 is more than min(in, out) = min(12, 3) = 3",
        "plain.weight: rank=4",
        "choose a rank of at most 3",
        "otherwise='skip'",
    )
    assert [own.place for own in error.refusals] == [
        "small.weight", "plain.weight", *(f"normed.{n}.parametrizations.weight.original1" for n in range(6))
    ]  # fmt: skip
    assert len(str(error).splitlines()) <= 12 and str(error).count("remove_parametrizations") == 1
    again = pickle.loads(pickle.dumps(error))
    assert str(again) == str(error) and list(map(str, again.refusals)) == list(map(str, error.refusals))
    (one,) = error.refusals[0].refusals
    assert one is error.refusals[0]


def test_a_message_of_many_reasons_ends():
    model = nn.Sequential(*(nn.Linear(n, n + 1) for n in range(2, 12)))
    error = refused(
        lambda: lora_fx.apply(model, Rule(where="*", rank=64), torch.ones(3, 2)), model, PlanError, "… 5 more reasons"
    )
    assert len(error.refusals) == 10 and len(str(error).splitlines()) <= 13


def test_what_cannot_be_adapted_may_be_left_out():
    model = Many()
    plan = lora_fx.plan(model, Rule(where="*", rank=4, otherwise="skip"), X)
    assert [row.name for row in plan.rows] == ["head.weight"]
    assert len(plan.left_out) == 8 and "computed before it multiplies" in plan.left_out[-1].reason
    assert "Left out: small.weight: rank=4 is more than" in str(plan) and "… 1 more: the weight is computed" in str(
        plan
    )
    lora_fx.apply(model, Rule(where="*", rank=4, otherwise="skip"), X)
    assert list(lora_fx.adapters(model).values()) and lora_fx.certify(model, X)
    assert [name for name, p in model.named_parameters() if p.requires_grad] == [
        "head.weight_lora_default.A", "head.weight_lora_default.B"
    ]  # fmt: skip


def test_leaving_out_holds_for_the_rule_that_says_so():
    model, skip = Many(), dict(rank=4, otherwise="skip")
    rules = [Rule(where="normed* | head", **skip), Rule(where="*", rank=4)]
    error = refused(lambda: lora_fx.apply(model, rules, X), model, PlanError, "small.weight", "plain.weight")
    assert len(error.refusals) == 2, "what the first rule leaves out is no reason to refuse"
    whole = Rule(where="*", rank=4)
    error = refused(lambda: lora_fx.apply(model, whole, X), model, PlanError, "small.weight", "plain.weight")
    assert len(error.refusals) > 2, "much of it could be adapted, and it does not say that the rest may be left out"
    only = Rule(where="normed*", **skip)
    refused(
        lambda: lora_fx.apply(model, only, X), model, PlanError, "the plan: 6 sites", "computed before it multiplies"
    )
    biases = Rule(where="*", kind="bias", otherwise="skip")
    assert {row.name for row in lora_fx.plan(model, biases, X).rows} >= {"head.bias", "small.bias", "plain.bias"}


def test_a_schedule_that_does_not_fit_may_be_left_out():
    model = nn.Sequential(nn.Linear(12, 9), nn.Conv1d(3, 5, 1)).to(torch.bfloat16)
    rule = Rule(where="*", rank=1, schedule="fused", otherwise="skip")
    plan = lora_fx.plan(model, rule, X.to(torch.bfloat16)[None])
    assert [row.name for row in plan.rows] == ["0.weight"] and "parallel branch" in plan.left_out[0].reason


def test_a_weight_that_is_not_finite(model):
    with torch.no_grad():
        model.up.weight[3, 4] = math.nan
    refused(lambda: lora_fx.apply(model, Rule(where="up", rank=2), X), model, PlanError, "NaN", "up.weight")


def test_an_adapter_applied_twice_under_one_name(model):
    lora_fx.apply(model, Rule(where="gate", rank=2), X)
    refused(
        lambda: lora_fx.apply(model, Rule(where="gate", rank=3), X),
        model,
        PlanError,
        "already",
        "'default'",
        "gate.weight",
    )
    lora_fx.apply(model, Rule(where="up", rank=2), X)  # further sites under the same name
    lora_fx.apply(model, Rule(where="gate", rank=3), X, name="second")  # another name on the same site
    assert lora_fx.adapters(model) == {"default": ["gate.weight", "up.weight"], "second": ["gate.weight"]}
    refused(lambda: lora_fx.apply(model, Rule(where="up", rank=2), X, name="two words"), model, PlanError, "two words")


def test_names_of_adapters_that_are_not_there(model):
    refused(lambda: lora_fx.activate(model, "task"), model, AdapterError, "'task'", "no adapters")
    lora_fx.apply(model, Rule(where="gate", rank=2), X)
    refused(lambda: lora_fx.remove(model, "task"), model, AdapterError, "'task'", "it has default")
    refused(lambda: lora_fx.remove(model), model, AdapterError, "no name is given", "'default'")


def test_fold_and_unfold_of_what_is_not_there(model):
    refused(lambda: lora_fx.fold(model), model, FoldError, "no active adapter", "Gated")
    refused(lambda: lora_fx.unfold(model), model, FoldError, "not folded", "Gated")
    lora_fx.apply(model, Rule(where="gate", rank=2), X)
    lora_fx.fold(model, final=True)
    refused(lambda: lora_fx.unfold(model), model, FoldError, "final")


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("factor", ["A", "B"])
def test_fold_of_factors_that_are_not_finite(model, value, factor):
    lora_fx.apply(model, Rule(where="*", rank=2), X)
    reference.fill(model)
    with torch.no_grad():
        getattr(model.down.weight_lora_default, factor)[0, 0] = value
    refused(lambda: lora_fx.fold(model), model, FoldError, factor, "'default'", "down.weight")


def test_fold_that_overflows_the_dtype():
    model = Gated().to(torch.float16)
    lora_fx.apply(model, Rule(where="up", rank=1), X.half())
    reference.fill(model)
    with torch.no_grad():
        model.up.weight_lora_default.A.fill_(300.0)
        model.up.weight_lora_default.B.fill_(300.0)
    refused(lambda: lora_fx.fold(model), model, FoldError, "torch.float16", "up.weight")


def test_apply_to_a_folded_model(model):
    lora_fx.apply(model, Rule(where="gate", rank=2), X)
    reference.fill(model)
    lora_fx.fold(model)
    refused(lambda: lora_fx.apply(model, Rule(where="up", rank=2), X), model, PlanError, "folded", "unfold")


def test_one_use_of_a_weight_whose_other_use_reads_the_same_attribute():
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(23, 12)

        def forward(self, i):
            return F.linear(torch.tanh(self.embed(i)), self.embed.weight)

    model = Shared()
    ids = torch.arange(5)
    refused(
        lambda: lora_fx.apply(model, Rule(form="linear", rank=2), ids), model, PlanError, "embed.weight", "embedding"
    )
    lora_fx.apply(model, Rule(where="embed", rank=2), ids)


def test_dropout_where_there_is_no_branch_input():
    model = nn.LSTM(5, 7)
    x = torch.randn(4, 2, 5)
    refused(
        lambda: lora_fx.apply(model, Rule(where="*ih*", rank=2, dropout=0.1), x),
        model,
        PlanError,
        "dropout=0.1",
        "lstm",
    )


def test_a_weight_that_is_read_behind_every_back():
    """The parameter is taken out of the dictionary by hand: no graph, property or name serves that; the check tells."""

    class Sneaky(Gated):
        def forward(self, x):
            if x.sum() > 1e9:  # control flow on values: no graph can stand for this forward
                return self.head(x)
            return self.head(x + self.down(F.silu(F.linear(x, self.gate._parameters["weight"])) * self.up(x)))

    model = Sneaky()
    error = refused(
        lambda: lora_fx.apply(model, Rule(where="*", rank=2), X), model, EquivalenceError, "is not the model with W + δ"
    )
    assert error.place == "gate.weight"


def test_structures_that_cannot_be_compared(model):
    other = copy.deepcopy(model)
    other.head = nn.Linear(12, 9)
    with pytest.raises(EquivalenceError, match=re.escape("(3, 7)")) as caught:
        lora_fx.verify(model, other, X)
    assert caught.value.remedy


# ── refusals that no other test meets ────────────────────────────────────────────────────────────────────────────────


def test_a_weight_that_became_nan_is_not_folded(model):
    lora_fx.apply(model, Rule(where="up", rank=2), X)
    with torch.no_grad():
        model.up.weight[1, 2] = math.nan
    error = refused(lambda: lora_fx.fold(model), model, FoldError, "the weight holds NaN or Inf")
    assert error.place == "up.weight" and "repair the weight" in error.remedy


def test_weights_on_meta_are_neither_folded_nor_saved(tmp_path):
    with torch.device("meta"):
        model = Gated()
    lora_fx.apply(model, Rule(where="up", rank=2), X.to("meta"))
    with pytest.raises(FoldError, match="on meta") as caught:
        lora_fx.fold(model)
    assert caught.value.place == "up.weight" and "materialise the model" in caught.value.remedy
    with pytest.raises(FileError, match="on meta") as caught:
        lora_fx.save_adapter(model, tmp_path / "adapter")
    assert "up.weight, A of adapter 'default'" in caught.value.place and "materialise" in caught.value.remedy
    assert not list(tmp_path.iterdir())


def test_a_model_without_inputs_of_its_own_is_not_captured(model):
    error = refused(lambda: lora_fx.capture(model), model, CaptureError, "Gated has no example inputs")
    assert error.place == "example_inputs" and "pass example_inputs" in error.remedy


def test_a_pattern_that_returns_several_values_is_refused(model):
    def both(x, gate, up):
        return F.linear(x, gate), F.linear(x, up)

    rule = Rule(pattern=both, rank=2)
    error = refused(lambda: lora_fx.plan(model, rule, X), model, RuleError, "returns no single value")
    assert "both" in error.place and "return the last call" in error.remedy


def test_a_weight_with_dropout_cannot_be_read_whole():
    model = lora_fx.apply(nn.Linear(5, 4), Rule(where="*", rank=2, dropout=0.5), torch.randn(2, 5))
    (adapter,) = reference.distinct_adapters(model)
    adapter.change(realised="dispatch")
    wire(model)
    with pytest.raises(LoraFxError, match="dropout on the branch has no meaning") as caught:
        model.train().weight.square()
    assert caught.value.place == "adapter 'default'" and "dropout=0" in caught.value.remedy
    assert model.eval().weight.square().shape == (4, 5)


def test_an_adapter_for_other_modules_is_refused(model, tmp_path):
    peft = pytest.importorskip("peft")
    other = peft.get_peft_model(nn.Sequential(nn.Linear(5, 4)), peft.LoraConfig(target_modules=["0"]))
    other.save_pretrained(tmp_path)
    error = refused(
        lambda: lora_fx.load_adapter(model, tmp_path, X), model, FileError, "matches no module of this Gated"
    )
    assert "target_modules" in error.place and "load the base model it was made for" in error.remedy
