"""What was trained beside the factors, in PEFT's files: each of its words both ways, without a warning on either side.

A bound is 16 times what one rounding of every weight does to the same outputs (`checks.verification`).
"""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
)

import lora_fx
from lora_fx import Rule, load_adapter, save_adapter
from lora_fx.checks.verification import compare, noise_floors
from lora_fx.errors import FileError
from lora_fx.export.adapters.folder import CONFIG, TENSORS
from lora_fx.graph.capture import Inputs
from lora_fx.model.inventory import inventory
from tests import reference

#: the one that saving gives of factors on tied weights, and PEFT when it merges them (tests/test_pretrained.py)
pytestmark = pytest.mark.filterwarnings("ignore:.*its merge would be wrong:UserWarning")

IDS = torch.tensor([[1, 2, 3, 10, 7], [4, 7, 5, 6, 3]])
SIZE = dict(vocab_size=20, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2)
P = "base_model.model."


def classifier() -> nn.Module:
    return LlamaForSequenceClassification(LlamaConfig(**SIZE, num_labels=3, pad_token_id=0))


def bert() -> nn.Module:
    return BertForSequenceClassification(BertConfig(**SIZE, num_labels=3))


def roberta() -> nn.Module:
    return RobertaForSequenceClassification(RobertaConfig(**SIZE, num_labels=3, pad_token_id=0))


def lm(tied: bool = True) -> nn.Module:
    return LlamaForCausalLM(LlamaConfig(**SIZE, tie_word_embeddings=tied, attention_bias=True, initializer_range=0.2))


def untied() -> nn.Module:
    return lm(False)


class Normed(nn.Module):
    """A head with buffers, one of them a count."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.lin, self.norm = nn.Embedding(20, 6), nn.Linear(6, 9), nn.BatchNorm1d(9)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.norm(self.lin(self.table(ids)).flatten(0, 1))


def fresh(make: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        return make().eval().requires_grad_(False)


@torch.no_grad()
def fill(model: nn.Module) -> None:
    draw = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.copy_(torch.randn(parameter.shape, generator=draw) * 0.4)


def out(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        found = model(IDS)
    return found if isinstance(found, torch.Tensor) else found.logits


def same(model: nn.Module, wanted: torch.Tensor) -> Any:
    """Within the noise of a model of ours."""
    found = out(model)
    floors = noise_floors(model, Inputs((IDS,), {}), [found])
    return compare(found, wanted, wanted, floors[0][1], torch.float32)


@dataclass(frozen=True)
class Case:
    make: Callable[[], nn.Module]
    config: dict[str, Any]
    kinds: dict[str, int]
    """Of the adapters that it comes to, how many there are."""
    written: dict[str, Any] = field(default_factory=dict)
    """What we say of it in PEFT's config, where that is not what PEFT said."""
    warns: bool = False
    """PEFT does, while it saves."""


Q = ["q_proj"]
QUERY = ["query", "value"]
CASES = {
    "task of a decoder": Case(
        classifier, dict(task_type="SEQ_CLS"), {"lora": 2, "full": 1}, dict(modules_to_save=["score"])
    ),
    "task of an encoder": Case(
        bert, dict(task_type="SEQ_CLS", target_modules=QUERY), {"lora": 2, "full": 2},
        dict(modules_to_save=["classifier"]),
    ),
    "a head of modules": Case(
        roberta, dict(task_type="SEQ_CLS", target_modules=QUERY), {"lora": 2, "full": 4},
        dict(modules_to_save=["classifier.dense", "classifier.out_proj"]),
    ),
    "norms": Case(
        lm, dict(target_modules=Q, modules_to_save=["norm"]), {"lora": 1, "full": 3},  # PEFT takes every …norm
        dict(modules_to_save=[f"model.{n}norm" for n in ("layers.0.input_layer", "layers.0.post_attention_layer", "")]),
    ),
    "buffers": Case(Normed, dict(target_modules=["lin"], modules_to_save=["norm"]), {"lora": 1, "full": 2}),
    "a head": Case(untied, dict(target_modules=Q, modules_to_save=["lm_head"]), {"lora": 1, "full": 1}),
    "an embedding": Case(
        untied, dict(target_modules=Q, modules_to_save=["embed_tokens"]), {"lora": 1, "full": 1},
        dict(modules_to_save=["model.embed_tokens"]),
    ),
    "tied": Case(
        lm, dict(target_modules=Q, modules_to_save=["embed_tokens"], ensure_weight_tying=True), {"lora": 1, "full": 1},
        dict(modules_to_save=["model.embed_tokens"]),
    ),
    "tied factors": Case(
        lm, dict(target_modules=["embed_tokens", "q_proj"], ensure_weight_tying=True), {"lora": 2},
        dict(target_modules=["lm_head", "model.embed_tokens", "model.layers.0.self_attn.q_proj"]), warns=True,
    ),
    "all biases": Case(bert, dict(target_modules=QUERY, bias="all"), {"lora": 2, "full": 11}),
    "biases of layers": Case(bert, dict(target_modules=QUERY, bias="lora_only"), {"lora": 2, "full": 2}),
    "biases and a task": Case(
        bert, dict(task_type="SEQ_CLS", target_modules=QUERY, bias="all"), {"lora": 2, "full": 12},
        dict(modules_to_save=["classifier"]),
    ),
    "biases of branches": Case(
        bert, dict(target_modules=QUERY, lora_bias=True), {"lora": 2, "bias": 2}, warns=True
    ),
    "both biases of a layer": Case(
        bert, dict(target_modules=QUERY, lora_bias=True, bias="lora_only"), {"lora": 2, "bias": 2, "full": 2},
        warns=True,
    ),
    "tokens": Case(
        untied, dict(target_modules=Q, trainable_token_indices=[7, 3, 4]), {"lora": 1, "full": 1},
        dict(trainable_token_indices={"model.embed_tokens": [3, 4, 7]}),
    ),
    "tokens of a tied head": Case(
        lm, dict(target_modules=Q, trainable_token_indices={"embed_tokens": [10, 3]}), {"lora": 1, "full": 1},
        dict(trainable_token_indices={"model.embed_tokens": [3, 10]}),
    ),
}  # fmt: skip


def by_peft(case: Case, folder: Path) -> torch.Tensor:
    """What PEFT has trained, and saved here, computes."""
    model = peft.get_peft_model(fresh(case.make), peft.LoraConfig(**{"r": 2, "lora_alpha": 3, **case.config})).eval()
    fill(model)
    wanted = out(model)
    with warnings.catch_warnings() if case.warns else nullcontext():
        if case.warns:
            warnings.simplefilter("ignore")
        model.save_pretrained(folder)
    return wanted


def kinds(model: nn.Module) -> dict[str, int]:
    found: dict[str, int] = {}
    for adapter in inventory(model).adapters:
        found[adapter.kind.name] = found.get(adapter.kind.name, 0) + 1
    return found


def strip(folder: Path) -> None:
    """Without our header: as PEFT would have written it."""
    save_file(
        {key: t for key, t in load_file(folder / TENSORS).items() if not key.startswith("lora_fx")}, folder / TENSORS
    )


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_each_word_of_pefts_goes_both_ways(case, tmp_path):
    wanted = by_peft(case, tmp_path / "theirs")
    ours = load_adapter(fresh(case.make), tmp_path / "theirs", IDS)
    assert kinds(ours) == case.kinds
    assert same(ours, wanted) and not same(fresh(case.make), wanted)
    save_adapter(ours, tmp_path / "ours")
    said = json.loads((tmp_path / "ours" / CONFIG).read_text())
    options = {"modules_to_save", "bias", "lora_bias", "trainable_token_indices", "ensure_weight_tying"}
    for option, value in {**{key: case.config[key] for key in options & case.config.keys()}, **case.written}.items():
        found = said[option]
        assert (sorted(found) if isinstance(found, list) else found) == value, option
    again = load_adapter(fresh(case.make), tmp_path / "ours", IDS, check=False)
    assert reference.same_bits(reference.bits(again), reference.bits(ours)) and torch.equal(out(again), out(ours))
    save_adapter(ours, tmp_path / "own", peft=False)
    own = load_adapter(fresh(case.make), tmp_path / "own", IDS, check=False)
    assert reference.same_bits(reference.bits(own), reference.bits(ours))
    strip(tmp_path / "ours")
    bare = load_adapter(fresh(case.make), tmp_path / "ours", IDS, check=False)
    assert kinds(bare) == case.kinds and same(bare, wanted)
    theirs = peft.PeftModel.from_pretrained(fresh(case.make), tmp_path / "ours").eval()
    assert same(ours, out(theirs))
    assert same(lora_fx.fold(ours), wanted)


def test_a_classifier_of_pefts_exports(tmp_path):
    """Untouched: as PEFT has made it for the task."""
    pytest.importorskip("onnxruntime")
    wanted = by_peft(CASES["task of an encoder"], tmp_path / "a")
    ours = load_adapter(fresh(bert), tmp_path / "a", IDS)
    assert lora_fx.certify(ours, IDS)
    report = lora_fx.export_onnx(ours, {"input_ids": IDS}, tmp_path / "model.onnx", prove=True)
    assert report.certificate and report.proof and report.comparisons
    assert same(ours, wanted)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize(
    ("targets", "tokens"),
    [(Q, None), (["embed_tokens", "lm_head", *Q], None), (Q, [21, 3]), (Q, [20, 21, 22, 23])],
    ids=["beside", "beneath", "some rows trained", "its rows trained"],
)
def test_a_resized_vocabulary(tied, targets, tokens, tmp_path):
    """The last rows of the base's embedding stand in the file: here they are an adapter."""

    def make(blank: bool = True) -> nn.Module:
        model = lm(tied)
        model.resize_token_embeddings(24, mean_resizing=False)
        for table in {model.get_input_embeddings(), model.get_output_embeddings()} if blank else ():
            table.weight.data[20:] = 0
        return model

    config = dict(target_modules=targets, ensure_weight_tying=tied and len(targets) > 1, trainable_token_indices=tokens)
    theirs = peft.get_peft_model(fresh(lambda: make(False)), peft.LoraConfig(r=2, lora_alpha=3, **config)).eval()
    fill(theirs)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore" if len(targets) > 1 else "error")
        theirs.save_pretrained(tmp_path / "a", save_embedding_layers=True)
    ids = IDS + 12

    def result(model: nn.Module) -> torch.Tensor:
        return model(ids).logits.detach()

    ours = load_adapter(fresh(make), tmp_path / "a", ids)
    save_adapter(ours, tmp_path / "b")
    again = load_adapter(fresh(make), tmp_path / "b", ids)
    assert reference.same_bits(reference.bits(again), reference.bits(ours))
    by_them = peft.PeftModel.from_pretrained(fresh(make), tmp_path / "b").eval()
    wanted, base = result(theirs), fresh(make)
    floors = noise_floors(ours, Inputs((ids,), {}), [result(ours)])
    for model, holds in ((ours, True), (by_them, True), (lora_fx.fold(ours), True), (base, False)):
        assert bool(compare(result(model), wanted, wanted, floors[0][1], torch.float32)) == holds
    small = fresh(lambda: lm(tied))
    what = "are no rows of a table of 20" if tokens else "the file has 24 rows.*and the model 20"
    reason = rf"{what}[\s\S]*resize_token_embeddings" if targets is Q else "base model"
    with pytest.raises(FileError, match=reason):
        load_adapter(small, tmp_path / "a", IDS)


# ── what the user trains ─────────────────────────────────────────────────────────────────────────────────────────────


def test_what_has_requires_grad_is_saved(tmp_path):
    model = lora_fx.apply(fresh(bert), Rule(where="*query", rank=2), IDS)
    for part in (model.classifier, model.bert.embeddings.LayerNorm, model.bert.pooler.dense.bias):
        part.requires_grad_(True)
    fill(model)
    wanted = out(model)
    save_adapter(model, tmp_path / "a")
    said = json.loads((tmp_path / "a" / CONFIG).read_text())
    assert said["modules_to_save"] == ["bert.embeddings.LayerNorm", "classifier"] and said["bias"] == "all"
    again = load_adapter(fresh(bert), tmp_path / "a", IDS)
    assert kinds(again) == {"lora": 1, "full": 5} and same(again, wanted) and not same(fresh(bert), wanted)
    assert same(again, out(peft.PeftModel.from_pretrained(fresh(bert), tmp_path / "a").eval()))
    save_adapter(model, tmp_path / "b", peft=False)
    assert same(load_adapter(fresh(bert), tmp_path / "b", IDS), wanted)


class Odd(nn.Module):
    """Parameters for which PEFT has no word beside an adapter."""

    def __init__(self) -> None:
        super().__init__()
        self.lin, self.norm, self.scale = nn.Linear(6, 6), nn.LayerNorm(6), nn.Parameter(torch.ones(()))
        self.again, self.top = self.norm, nn.Parameter(torch.ones(6))
        self.rows, self.x_lin = nn.ParameterDict({"w": torch.ones(6)}), nn.LayerNorm(6)
        self.ends = nn.ModuleDict({"lin": nn.LayerNorm(6), "x": nn.ModuleDict({"ends": nn.LayerNorm(6)})})
        self.ordered = nn.ModuleDict({"head": nn.LayerNorm(6), "ahead": nn.LayerNorm(6)})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.again(self.norm(self.lin(x)) * self.scale + self.top) + self.rows["w"]
        return self.ordered["ahead"](self.ordered["head"](x))


ODD = {
    "scale": "no kind adapts that", "norm.weight": "norm.weight = again.weight", "top": "the model itself holds it",
    "rows.w": "saves no ParameterDict whole", "lin.weight": "is relative to what it was",
    "ordered.head.weight": None,
}  # fmt: skip


@pytest.mark.parametrize(("name", "reason"), ODD.items())
def test_what_peft_cannot_say_is_refused_by_name(name, reason, tmp_path):
    x = torch.ones(2, 6)
    model = lora_fx.apply(fresh(Odd), Rule(where="lin", rank=2), x)
    model.get_parameter(name).requires_grad_(True)
    if reason is None:
        save_adapter(model, tmp_path / "a")
        return
    with pytest.raises(FileError) as caught:
        save_adapter(model, tmp_path / "a")
    assert reason in caught.value.reason and name.partition(".")[0] in caught.value.place, caught.value
    assert not list(tmp_path.iterdir())
    save_adapter(model, tmp_path / "a", beside="ignore")
    if name in ("norm.weight", "top", "rows.w"):
        save_adapter(model, tmp_path / "b", peft=False)
        again = load_adapter(fresh(Odd), tmp_path / "b", x)
        assert torch.equal(again(x), model(x))


class Endings(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin, self.head, self.ahead = nn.Linear(6, 6), nn.LayerNorm(6), nn.LayerNorm(6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.ahead(self.head(self.lin(x)))


def test_peft_would_take_another_module_too(tmp_path):
    model = lora_fx.apply(fresh(Endings), Rule(where="lin", rank=2), torch.ones(2, 6))
    model.head.requires_grad_(True)
    with pytest.raises(FileError, match="PEFT would take ahead too"):
        save_adapter(model, tmp_path / "a")
    model.ahead.requires_grad_(True)
    with pytest.raises(FileError, match="PEFT would take ahead too"):
        save_adapter(model, tmp_path / "a")


# ── bad input ────────────────────────────────────────────────────────────────────────────────────────────────────────


def edit(folder: Path, config: dict[str, Any] | None = None, drop: str = "", **tensors: torch.Tensor) -> None:
    known = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**known, **(config or {})}))
    own = load_file(folder / TENSORS) | tensors
    save_file({key: t for key, t in own.items() if key != drop}, folder / TENSORS)


BAD = {
    "a missing head": ("task of an encoder", dict(drop=f"{P}classifier.bias"), "key is missing", "classifier.bias"),
    "more labels": (
        "task of an encoder", {f"{P}classifier.weight": torch.ones(4, 16)}, "wants (3, 16)", "classifier.weight",
    ),
    "integers": (
        "task of an encoder", {f"{P}classifier.bias": torch.ones(3, dtype=torch.int64)}, "int64", "classifier.bias",
    ),
    "an adapter inside": (
        "task of a decoder", dict(config=dict(modules_to_save=["self_attn"], target_modules="score")), "missing", "",
    ),
    "one inside the other": (
        "task of an encoder", dict(config=dict(modules_to_save=["pooler", "pooler.dense"])), "around it", "to_save",
    ),
    "other buffers": ("buffers", {f"{P}norm.running_mean": torch.ones(9)}, "the model's is another", "running_mean"),
    "no token": ("tokens", dict(config=dict(trainable_token_indices=[3, 4, 20])), "no rows of a table of 20", ""),
    "a token twice": ("tokens", dict(config=dict(trainable_token_indices=[3, 4, 4])), "each once", ""),
    "another count": ("tokens", dict(config=dict(trainable_token_indices=[3, 4])), "wants (2, 16)", ""),
    "no such table": (
        "tokens", dict(config=dict(trainable_token_indices={"nowhere": [3, 4, 7]})), "names no module", "",
    ),
    "tokens that are no list": ("tokens", dict(config=dict(trainable_token_indices=["3"])), "is not a list", ""),
    "a bias of another size": (
        "biases of branches", {f"{P}bert.encoder.layer.0.attention.self.query.lora_B.bias": torch.ones(4)},
        "wants (16,)", "lora_B.bias",
    ),
    "no bias of a branch": (
        "biases of branches", dict(drop=f"{P}bert.encoder.layer.0.attention.self.query.lora_B.bias"),
        "key is missing", "lora_B.bias",
    ),
    "another embedding": (
        "tied factors", {f"{P}model.embed_tokens.base_layer.weight": torch.ones(20, 16)}, "the model's is another", "",
    ),
    "biases that are not said": ("all biases", dict(config=dict(bias="none")), "the model's is another", ".bias"),
    "NaN": ("task of an encoder", {f"{P}classifier.bias": torch.full((3,), torch.nan)}, "NaN", "classifier.bias"),
}  # fmt: skip


@pytest.mark.parametrize(("case", "change", "reason", "place"), BAD.values(), ids=BAD)
def test_bad_files_are_refused(case, change, reason, place, tmp_path):
    by_peft(CASES[case], tmp_path / "a")
    edit(tmp_path / "a", **change)
    model = fresh(CASES[case].make)
    before = reference.bits(model)
    with pytest.raises(FileError) as caught:
        load_adapter(model, tmp_path / "a", IDS)
    assert any(part in caught.value.reason for part in reason.split("|")), caught.value
    assert place in caught.value.place, caught.value
    assert reference.same_bits(reference.bits(model), before)


def test_a_branch_with_a_bias_on_a_layer_without_one(tmp_path):
    with pytest.warns(UserWarning, match="has no bias"):
        by_peft(Case(lambda: nn.Sequential(nn.Embedding(20, 4), nn.Linear(4, 3, bias=False)),
                     dict(target_modules=["1"], lora_bias=True), {}, warns=True), tmp_path)  # fmt: skip
    model = fresh(lambda: nn.Sequential(nn.Embedding(20, 4), nn.Linear(4, 3, bias=False)))
    with pytest.raises(FileError, match="1 has none for it to be added to"):
        load_adapter(model, tmp_path, IDS)


def test_copies_of_one_model_can_hold_two_of_them(tmp_path):
    """Each relative to the base: the sum of what both have changed."""
    by_peft(CASES["norms"], tmp_path / "a")
    model = load_adapter(fresh(lm), tmp_path / "a", IDS)
    alone = out(model)
    load_adapter(model, tmp_path / "a", IDS, name="b")
    lora_fx.activate(model, "default")
    assert torch.equal(out(model), alone)
    again = copy.deepcopy(model)
    lora_fx.remove(again, "b")
    assert torch.equal(out(again), alone)


def gpt2() -> nn.Module:
    torch.manual_seed(0)
    shape = dict(n_embd=24, n_layer=1, n_head=2, vocab_size=32, n_positions=16, bos_token_id=0, eos_token_id=0)
    return GPT2LMHeadModel(GPT2Config(**shape)).eval()


@pytest.mark.parametrize("option", ["modules_to_save", "target_modules"])
def test_peft_ties_what_it_knows_by_name(option, tmp_path):
    """`ensure_weight_tying` does nothing for GPT-2's `wte`: its head stays the base's, in memory; on disk it is one
    tensor, and refused."""
    gpt2().save_pretrained(tmp_path / "base")
    settings = {"target_modules": ["c_attn"], option: ["wte"]}
    with warnings.catch_warnings(action="ignore"):
        theirs = peft.get_peft_model(gpt2(), peft.LoraConfig(r=2, ensure_weight_tying=True, **settings)).eval()
        with torch.no_grad():
            for parameter in theirs.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter) * 0.3)
        theirs.save_pretrained(tmp_path / "a", save_embedding_layers=False)
    inputs = {"input_ids": torch.arange(6)[None]}
    model = lora_fx.load_adapter(gpt2(), tmp_path / "a", inputs)
    assert lora_fx.verify(model, theirs, inputs) and not lora_fx.verify(model, gpt2(), inputs)
    with pytest.raises(FileError, match="may be read by two modules"):
        lora_fx.fold_checkpoint(tmp_path / "base", tmp_path / "a", tmp_path / "out")


def test_a_tie_that_peft_would_not_make_is_not_written(tmp_path):
    inputs = {"input_ids": torch.arange(6)[None]}
    rules = [Rule(where="*.wte*", kind="full"), Rule(where="*.c_attn*", rank=2)]
    model = lora_fx.apply(gpt2(), rules, inputs)
    with pytest.raises(FileError, match="PEFT ties what trains whole where it is called embed_tokens or lm_head"):
        lora_fx.save_adapter(model, tmp_path / "a")
    lora_fx.save_adapter(model, tmp_path / "own", peft=False)
