"""What rules select, and what the plan says of it."""

from __future__ import annotations

import copy
import dataclasses
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lora_fx
from lora_fx import Rule
from lora_fx.errors import RuleError
from tests import reference
from tests.zoo import case


def decided(model: nn.Module, rules, inputs) -> dict[str, tuple]:
    """weight → (rank, rows) of the plan."""
    return {row.weight.name: (row.rank, row.rows and len(row.rows)) for row in lora_fx.plan(model, rules, inputs).rows}


@pytest.fixture(scope="module")
def llama():
    return case("llama").build()


@pytest.fixture(scope="module")
def gpt2():
    return case("gpt2").build()


def layer(n: int, *names: str) -> set[str]:
    return {f"model.layers.{n}.{name}.weight" for name in names}


def test_where_is_a_glob_over_names_of_weights_and_modules(llama):
    model, inputs = llama
    q = layer(0, "self_attn.q_proj") | layer(1, "self_attn.q_proj")
    assert set(decided(model, Rule(where="*.q_proj", rank=2), inputs)) == q
    assert set(decided(model, Rule(where="*.q_proj.weight", rank=2), inputs)) == q
    assert set(decided(model, Rule(where="*.q_proj | lm_head", rank=2), inputs)) == q | {"lm_head.weight"}


def test_roles_forms_layers_and_when_all_have_to_match(llama):
    model, inputs = llama
    rule = Rule(role="attention.* | mlp.down", layers="1", form="linear", when=lambda s: s.in_features != 56, rank=2)
    names = ("q_proj", "k_proj", "v_proj", "o_proj")
    assert set(decided(model, rule, inputs)) == layer(1, *(f"self_attn.{n}" for n in names))


@pytest.mark.parametrize("layers", ["0-1", "0, 1", range(2), [0, 1], (1, 0)])
def test_layers_are_ranges_or_integers(llama, layers):
    model, inputs = llama
    assert set(decided(model, Rule(layers=layers, role="mlp.up", rank=2), inputs)) == layer(0, "mlp.up_proj") | layer(
        1, "mlp.up_proj"
    )


def test_the_first_rule_that_matches_decides_and_one_without_a_rank_excludes(llama):
    model, inputs = llama
    rules = [Rule(where="lm_head"), Rule(where="*.1.*", role="mlp.*", rank=3), Rule(role="mlp.* | lm_head", rank=2)]
    found = decided(model, rules, inputs)
    assert set(found) == {n for k in (0, 1) for n in layer(k, "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")}
    assert {rank for name, (rank, _) in found.items() if ".1." in name} == {3}
    assert {rank for name, (rank, _) in found.items() if ".0." in name} == {2}


def test_expect_counts_sites(llama):
    model, inputs = llama
    assert len(decided(model, Rule(role="attention.query", rank=2, expect=2), inputs)) == 2
    with pytest.raises(RuleError, match="matches 2 sites, and expect=3"):
        lora_fx.plan(model, Rule(role="attention.query", rank=2, expect=3), inputs)


def test_a_role_picks_the_rows_of_a_fused_weight_and_a_name_the_whole(gpt2):
    model, inputs = gpt2
    parts = lora_fx.plan(model, Rule(role="attention.query | attention.value", layers=0, rank=2), inputs).rows
    assert [(row.part, row.rows[0], row.rows[-1]) for row in parts] == [("query", 0, 31), ("value", 64, 95)]
    (whole,) = lora_fx.plan(model, Rule(where="*.0.attn.c_attn", rank=2), inputs).rows
    assert whole.rows is None and whole.role == "attention.query, attention.key, attention.value"
    (rest,) = lora_fx.plan(model, [Rule(role="attention.query"), Rule(where="*.0.attn.c_attn", rank=2)], inputs).rows
    assert rest.rows == tuple(range(32, 96))


def test_a_part_leaves_the_other_rows_bitwise_alone(gpt2):
    model, inputs = case("gpt2").build()
    before = model.transformer.h[0].attn.c_attn.weight.detach().clone()
    lora_fx.apply(model, Rule(role="attention.value", rank=2), inputs)
    reference.fill(model)
    lora_fx.fold(model)
    after = model.transformer.h[0].attn.c_attn.weight.detach()
    assert torch.equal(after[:, :64], before[:, :64]) and not torch.equal(after[:, 64:], before[:, 64:])


def test_a_name_adapts_every_use_of_a_tied_weight_and_a_role_only_its_own(gpt2):
    model, inputs = gpt2
    (both,) = lora_fx.plan(model, Rule(where="lm_head", rank=2), inputs).rows
    assert not both.split and both.owners == (("transformer.wte", "weight"), ("lm_head", "weight"))
    (head,) = lora_fx.plan(model, Rule(role="lm_head", rank=2), inputs).rows
    assert head.split and head.owners == (("lm_head", "weight"),)
    assert head.copied_bytes == model.lm_head.weight.numel() * 4


def test_a_split_use_folds_into_a_copy_of_its_own_and_unfolds_to_one_storage():
    model, inputs = case("gpt2").build()
    embedding = model.transformer.wte.weight.detach().clone()
    lora_fx.apply(model, Rule(role="lm_head", rank=2), inputs)
    reference.fill(model)
    adapted = lora_fx.checks.verification.run(model, lora_fx.graph.capture.normalize_inputs(model, inputs))
    lora_fx.fold(model)
    assert torch.equal(model.transformer.wte.weight, embedding)
    assert not torch.equal(model.lm_head.weight, embedding)
    folded = lora_fx.checks.verification.run(model, lora_fx.graph.capture.normalize_inputs(model, inputs))
    lora_fx.unfold(model)
    assert model.lm_head._parameters["weight"] is model.transformer.wte._parameters["weight"]
    again = lora_fx.checks.verification.run(model, lora_fx.graph.capture.normalize_inputs(model, inputs))
    assert all(torch.equal(a, b) for a, b in zip(adapted, again, strict=True))
    assert not torch.equal(folded[0], adapted[0])  # rounded once more, and no more than that:
    assert lora_fx.verify(model, lora_fx.fold(model, copy=True), inputs)


def gated_mlp(x, gate, up, down):
    return F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)


def test_a_pattern_is_a_plain_function_and_adapt_names_its_weights(llama):
    model, inputs = llama
    names = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
    assert set(decided(model, Rule(pattern=gated_mlp, rank=2, expect=6), inputs)) == layer(0, *names) | layer(1, *names)
    only = decided(model, Rule(pattern=gated_mlp, adapt="gate | down", layers=1, rank=2), inputs)
    assert set(only) == layer(1, "mlp.gate_proj", "mlp.down_proj")


def test_a_pattern_matches_other_forms_of_the_same_call(gpt2):
    model, inputs = gpt2  # Conv1D: addmm with an (in, out) weight and a bias

    def output_after_core(q, k, v, w):
        return F.linear(F.scaled_dot_product_attention(q, k, v), w)

    found = decided(model, Rule(pattern=output_after_core, rank=2), inputs)
    assert set(found) == {f"transformer.h.{n}.attn.c_proj.weight" for n in (0, 1)}


@pytest.mark.parametrize(
    ("pattern", "part"),
    [
        (lambda x, w: F.linear(x, w) if x.sum() > 0 else x, "cannot be traced"),
        (lambda x: F.relu(x), "is the weight of a matmul"),
        (lambda x, w: F.relu(F.relu(F.linear(x, w))), "matches nothing"),
    ],
)
def test_a_pattern_that_cannot_match_says_why(llama, pattern, part):
    model, inputs = llama
    with pytest.raises(RuleError, match=re.escape(part)):
        lora_fx.plan(model, Rule(pattern=pattern, rank=2), inputs)
    with pytest.raises(RuleError, match="its weights are down, gate, up"):
        lora_fx.plan(model, Rule(pattern=gated_mlp, adapt="gaet", rank=2), inputs)


def test_rules_come_from_dicts_and_toml(llama, tmp_path):
    model, inputs = llama
    file = tmp_path / "rules.toml"
    file.write_text(
        '[[rule]]\nwhere = "lm_head"\n[[rule]]\nrole = "mlp.up | lm_head"\nrank = 2\nalpha = 5.0\nexpect = 2\n'
    )
    same = [{"where": "lm_head"}, {"role": "mlp.up | lm_head", "rank": 2, "alpha": 5.0, "expect": 2}]
    plans = [lora_fx.plan(model, rules, inputs) for rules in (file, str(file), same, {"rule": same})]
    assert len({tuple((r.weight.name, r.rank, r.rule.alpha) for r in p.rows) for p in plans}) == 1


def test_op_is_the_old_word_for_form(llama, tmp_path):
    model, inputs = llama
    file = tmp_path / "rules.toml"
    file.write_text('[[rule]]\nop = "embedding"\nrank = 2\n')
    for old in (lambda: Rule(op="embedding", rank=2), lambda: {"op": "embedding", "rank": 2}, lambda: file):
        with pytest.warns(DeprecationWarning, match=r"Rule\(op=…\) is the old word for Rule\(form=…\)"):
            rows = lora_fx.plan(model, old(), inputs).rows
        assert [(row.weight.name, row.rule.form) for row in rows] == [("model.embed_tokens.weight", "embedding")]
        assert dataclasses.replace(rows[0].rule, rank=3).label == "Rule(form='embedding', rank=3)"
    for both in (dict(form="linear", op="linear", rank=2), dict(form="linear", op="conv", rank=2)):
        with pytest.raises(RuleError, match="are both given"):
            lora_fx.plan(model, both, inputs)
    with pytest.raises(RuleError, match="did you mean 'form'"):
        lora_fx.plan(model, {"from": "linear"}, inputs)


def test_settings_reach_the_adapter(llama):
    model, inputs = case("llama").build()

    def ones(A, B):
        A.fill_(1.0)
        B.fill_(0.5)

    rule = Rule(where="*.0.*.q_proj", rank=4, alpha=6, dropout=0.25, scaling="rslora", init=ones)
    lora_fx.apply(model, rule, inputs)
    adapter = model.model.layers[0].self_attn.q_proj.weight_lora_default
    assert (adapter.scale, adapter.dropout.p, adapter.role) == (3.0, 0.25, "attention.query")
    assert bool((adapter.A == 1).all()) and bool((adapter.B == 0.5).all())


@pytest.mark.parametrize("init", ["kaiming", "gaussian", "zero"])
def test_every_init_starts_with_b_zero(llama, init):
    model, inputs = case("llama").build()
    lora_fx.apply(model, Rule(where="*.q_proj", rank=4, init=init), inputs)
    for adapter in reference.distinct_adapters(model):
        assert not adapter.B.any() and bool(adapter.A.any()) == (init != "zero")


def test_the_plan_is_a_table_and_changes_nothing(gpt2):
    model, inputs = case("gpt2").build()
    before, classes = reference.bits(model), reference.classes(model)
    rules = [Rule(role="attention.query | lm_head", rank=4), Rule(where="*.mlp.c_fc", layers=0, rank=2)]
    plan = lora_fx.plan(model, rules, inputs)
    text = str(plan)
    assert reference.same_bits(reference.bits(model), before) and reference.classes(model) == classes
    lines = text.splitlines()
    assert lines[0].split() == [
        "weight",
        "role",
        "form",
        "shape",
        "kind",
        "rank",
        "trainable",
        "realised",
        "schedule",
        "expected",
        "folds",
        "shared",
        "storage",
    ]
    row = next(line for line in lines if "h.0.attn.c_attn" in line)
    for part in ("[32 rows]", "attention.query", "addmm", "32×96", "lora", "4", "256", "graph", "exactly"):
        assert part in row
    assert "split off, 0.01 MiB when folded" in text and "transformer.wte.weight = lm_head.weight" in text
    trainable = 2 * 4 * (32 + 32) + 4 * (101 + 32) + 2 * (32 + 56)
    assert plan.parameters == trainable and f"{trainable:,} trainable parameters" in lines[-1]


def test_without_example_inputs_names_and_forms_work():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.lin, self.embed = nn.Conv1d(4, 6, 3), nn.Linear(6, 7), nn.Embedding(9, 4)

        def forward(self, i):
            return self.lin(self.conv(self.embed(i).transpose(1, 2)).mean(-1))

    model, ids = Net(), torch.arange(8).reshape(2, 4)
    plan = lora_fx.plan(model, [Rule(form="conv*", rank=2), Rule(where="lin | embed", rank=2)])
    assert {row.weight.name for row in plan.rows} == {"conv.weight", "lin.weight", "embed.weight"}
    assert "nothing was captured" in str(plan)
    lora_fx.apply(model, [Rule(form="conv*", rank=2), Rule(where="lin | embed", rank=2)])
    reference.fill(model)
    assert lora_fx.verify(model, lora_fx.fold(model, copy=True), ids)
    base = copy.deepcopy(model)
    lora_fx.remove(base, "default")
    assert not lora_fx.verify(model, base, ids)
