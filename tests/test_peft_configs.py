"""PEFT's configs as they are: the same weights, shapes, scales and dropouts as `peft.get_peft_model` with each."""

from __future__ import annotations

import copy
import dataclasses
import json
import pickle
from dataclasses import dataclass, field
from typing import Any

import peft
import pytest
import torch
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

import lora_fx
from lora_fx import Rule
from lora_fx.errors import LoraFxError, RuleError
from lora_fx.export.adapters.folder import CONFIG, TENSORS
from lora_fx.model.inventory import inventory
from tests import reference
from tests.zoo import call, case

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning")  # PEFT's

IDS = torch.tensor([[1, 2, 3, 10, 7], [4, 7, 5, 6, 3]])
SIZE = dict(vocab_size=20, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2)


def judge():
    return BertForSequenceClassification(BertConfig(**SIZE, num_labels=3)).eval(), {"input_ids": IDS}


def tied():
    config = LlamaConfig(**SIZE, tie_word_embeddings=True, attention_bias=True, use_cache=False)
    return LlamaForCausalLM(config).eval(), {"input_ids": IDS}


def convolutions():
    net = nn.Sequential(nn.Conv2d(1, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(24, 5), nn.LayerNorm(5))
    return net.eval(), torch.randn(3, 1, 4, 4)


@dataclass(frozen=True)
class Case:
    model: Any
    options: dict[str, Any] = field(default_factory=dict)

    def build(self) -> tuple[nn.Module, Any]:
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(0)
            return case(self.model).build() if isinstance(self.model, str) else self.model()


def test_starts_in_what_a_weight_is_made_of():
    """Each with the numbers that PEFT starts at: `tests/test_principal.py`."""
    base, inputs = tied()
    for init, kind, niter in (("pissa", "pissa", None), ("olora", "olora", None), ("pissa_niter_4", "pissa", 4)):
        config = peft.LoraConfig(target_modules=["q_proj"], r=3, lora_alpha=5, init_lora_weights=init)
        model = lora_fx.apply(copy.deepcopy(base), config, inputs)
        own = inventory(model).adapters
        assert {(a.kind.name, a.rank, a.alpha, a.settings.get("niter")) for a in own} == {(kind, 3, 5.0, niter)}
        assert len(own) == SIZE["num_hidden_layers"] and all(bool(a.B0.any()) for a in own)
        assert torch.equal(call(model, inputs).logits, call(base, inputs).logits)


PATTERNS = dict(rank_pattern={"q_proj": 2, "layers.1.mlp.up_proj": 3}, alpha_pattern={r".*layers\.1.*": 5})
CASES = {
    "all linear": Case("llama", dict(target_modules="all-linear", r=4, lora_alpha=9, lora_dropout=0.1, **PATTERNS)),
    "by default": Case("gpt2", dict(r=3, fan_in_fan_out=True)),
    "rslora": Case("t5", dict(r=3, use_rslora=True, exclude_modules=["EncDecAttention.v"])),
    "layers": Case("bert", dict(target_modules=["query", "dense"], exclude_modules=["pooler.dense"], r=2,
                                layers_to_transform=[1])),
    "regex": Case("vit", dict(target_modules=r"vit\.layers\.\d\.attention\.[qv]_proj", r=2, use_dora=True)),
    "experts": Case("mixtral-eager", dict(target_modules=["q_proj"], target_parameters=["experts.gate_up_proj"], r=2)),
    "head of a task": Case(judge, dict(task_type="SEQ_CLS", r=2)),
    "whole": Case(judge, dict(target_modules=["query"], modules_to_save=["pooler"], r=2, bias="lora_only")),
    "biases": Case(judge, dict(target_modules=["query"], r=2, bias="all")),
    "tokens": Case(tied, dict(target_modules=["q_proj"], r=2, trainable_token_indices=[3, 7])),
    "tied": Case(tied, dict(target_modules=["embed_tokens", "v_proj"], r=2, ensure_weight_tying=True,
                            init_lora_weights="gaussian")),
    "convolution": Case(convolutions, dict(target_modules=["0", "3"], modules_to_save=["4"], r=2)),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_a_config_means_what_it_means_in_peft(name, tmp_path):
    base, inputs = CASES[name].build()
    config = peft.LoraConfig(**CASES[name].options)
    given = copy.deepcopy(config)
    model = lora_fx.apply(copy.deepcopy(base), given, inputs)
    assert given == config  # which is not changed
    theirs = peft.get_peft_model(copy.deepcopy(base), config)
    layers = {n: m for n, m in theirs.named_modules() if isinstance(m, LoraLayer)}
    scales = sorted(m.scaling["default"] for m in layers.values() if type(m).__name__ != "ModulesToSaveWrapper")
    lora = [a for a in inventory(model).adapters if a.kind.name in ("lora", "dora")]
    tie = len(scales) - len(lora)  # PEFT has an adapter for each of two modules that share a weight
    assert tie == (name == "tied") and {*scales} == {a.scale for a in lora}
    assert {a.dropout.p for a in lora} == {config.lora_dropout}
    assert config.init_lora_weights is True or all(float(a.B.abs().sum()) == 0 for a in lora)

    lora_fx.save_adapter(model, tmp_path)
    ours = {key: tuple(t.shape) for key, t in load_file(tmp_path / TENSORS).items() if key.startswith("base_model")}
    plain = {"save_embedding_layers": False}
    wanted = {key: tuple(t.shape) for key, t in peft.get_peft_model_state_dict(theirs, **plain).items()}
    if name == "biases":  # of the layer that it wraps, PEFT writes the bias under the name that it has there
        wanted = {key.replace(".base_layer.", "."): shape for key, shape in wanted.items()}
        ours = {key.replace(".base_layer.", "."): shape for key, shape in ours.items()}
    assert ours == wanted
    assert _trainable(model) + tie * 2 * (20 + 16) == _trainable(theirs)
    for ran, plain in zip(_outputs(model, inputs), _outputs(base, inputs), strict=True):
        assert torch.equal(ran, plain)


def test_a_config_starts_as_adapters_do():
    base, inputs = CASES["all linear"].build()
    model = lora_fx.apply(base, peft.LoraConfig(target_modules=["q_proj"], init_lora_weights="gaussian"), inputs)
    assert all(float(a.A.abs().min()) > 0 and not a.B.any() for a in inventory(model).adapters)


def _trainable(model):
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


@torch.no_grad()
def _outputs(model, inputs):
    return [t for t in torch.utils._pytree.tree_leaves(call(model.eval(), inputs)) if isinstance(t, torch.Tensor)]


def test_a_config_is_given_as_an_object_a_mapping_or_its_file(tmp_path):
    base, inputs = CASES["all linear"].build()
    config = peft.LoraConfig(**CASES["all linear"].options)
    config.save_pretrained(tmp_path)
    said = json.loads((tmp_path / CONFIG).read_text())
    plans = [
        lora_fx.plan(base, given, inputs)
        for given in (config, said, *map(lora_fx.rules_from_peft, (config, said, tmp_path, tmp_path / CONFIG)))
    ]
    rules = [[rule.label for rule in plan.rules] for plan in plans]
    assert all(own == rules[0] for own in rules) and len(rules[0]) == 14
    spoken = lora_fx.rules_from_peft({key: said[key] for key in CASES["all linear"].options})
    assert [rule.label for rule in lora_fx.plan(base, spoken, inputs).rules] == rules[0]
    assert lora_fx.memory(base, config, inputs=inputs).parameters  # as rules are taken


REFUSED = {
    "pissa in rounds": (
        dict(target_modules=["q_proj"], init_lora_weights="pissa_niter_x"),
        "init_lora_weights='pissa_",
    ),
    "olora in DoRA": (dict(target_modules=["q_proj"], init_lora_weights="olora", use_dora=True), "one kind of adapter"),
    "B at random": (dict(target_modules=["q_proj"], init_lora_weights=False), "init_lora_weights=False"),
    "lora_bias": (dict(target_modules=["q_proj"], lora_bias=True), "lora_bias"),
    "layers again": (dict(target_modules=["q_proj"], layer_replication=[[0, 1]]), "layer_replication"),
    "no module": (dict(target_modules=["to_q"]), r"\['to_q'\].*matches nothing"),
    "no layer": (dict(target_modules=["self_attn"]), "it takes .*, a LlamaAttention"),
    "no pattern": (dict(target_modules="q_proj((("), "is no pattern"),
    "no type": (dict(target_modules=["q_proj"], r="8"), "is not a positive integer"),
    "no such row": (dict(target_modules=["q_proj"], trainable_token_indices=[99]), "trainable_token_indices"),
    "words in names": (dict(target_modules=["q"], bias="all"), "relative_attention_bias"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_meaning_here_is_refused_by_name(name):
    options, reason = REFUSED[name]
    base, inputs = Case("t5" if name == "words in names" else tied).build()
    before = reference.bits(base)
    with pytest.raises(RuleError, match=reason):
        lora_fx.apply(base, {"peft_type": "LORA", **options}, inputs)
    assert reference.same_bits(reference.bits(base), before)


@pytest.mark.parametrize(
    "config, reason",
    [
        (peft.IA3Config(target_modules=["q_proj"], feedforward_modules=[]), "'IA3' is not LoRA"),
        (peft.AdaLoraConfig(target_modules=["q_proj"], total_step=9), "'ADALORA' is not LoRA"),
        (3, "3 is no config"),
    ],
)
def test_what_is_no_config_of_lora_is_refused(config, reason):
    with pytest.raises(RuleError, match=reason):
        lora_fx.rules_from_peft(config)


def test_a_config_stands_alone():
    with pytest.raises(RuleError, match="LoraConfig among rules"):
        lora_fx.plan(nn.Linear(2, 3), [Rule(where="*", rank=1), peft.LoraConfig(target_modules=["0"])])


WORDS = {
    "r": (8, "rank=8"),
    "lora_alpha": (16, "alpha=16"),
    "lora_dropout": (0.1, "dropout=0.1"),
    "target_modules": (["q_proj", "v_proj"], r"where='\*\.q_proj \| \*\.v_proj'"),
    "use_dora": (True, "kind='dora'"),
    "modules_to_save": (None, "kind='full'"),
    "rnak": (3, "did you mean 'rank'"),
}


@pytest.mark.parametrize("word", WORDS)
def test_words_of_peft_are_answered_with_ours(word):
    value, answer = WORDS[word]
    with pytest.raises(TypeError, match=answer) as raised:
        Rule(**{"where": "*", word: value})
    assert isinstance(raised.value, LoraFxError) and f"{word}={value!r}" in str(raised.value)
    with pytest.raises(RuleError, match=answer):
        lora_fx.plan(nn.Linear(2, 3), [{"where": "*", word: value}])
    if word != "rnak":
        with pytest.raises(TypeError, match=answer):
            lora_fx.apply(nn.Linear(2, 3), **{word: value})


def test_a_rule_is_copied_as_before():
    rule = Rule(where="*.q", rank=2)
    copies = copy.deepcopy(rule), pickle.loads(pickle.dumps(rule)), dataclasses.replace(rule)
    assert {own.label for own in copies} == {rule.label}
