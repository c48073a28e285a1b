"""Adapter files: PEFT reads what we save, we read what PEFT saves, and what is loaded is what was saved."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from transformers.pytorch_utils import Conv1D

import lora_fx
from lora_fx import Rule
from lora_fx.errors import AdapterError
from lora_fx.export.adapters.files import load_adapter, save_adapter
from lora_fx.export.adapters.folder import TENSORS
from lora_fx.model.inventory import inventory
from tests.adapters import (
    IDS,
    TWO,
    Attention,
    Convs,
    Experts,
    Linears,
    OwnForwards,
    Text,
    Tied,
    adapted,
    assert_same,
    assert_untouched,
    edit,
    falcon,
    fill,
    fresh,
    gemma,
    gpt2,
    mixtral,
    numbers,
    refused,
    retensor,
    saved_by_peft,
    whole,
)

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning")  # PEFT's


# ── both directions ──────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass
class Case:
    make: Callable[[], nn.Module]
    x: Any
    rules: list[Rule]
    config: dict[str, Any] = field(default_factory=dict)


CASES = {
    "linear": Case(
        Linears, numbers(4, 6), [Rule(where="*", dropout=0.25, **TWO)], dict(target_modules=["lin", "head"])
    ),
    "patterns": Case(
        Linears,
        numbers(4, 6),
        [Rule(where="lin", rank=3, alpha=1.7), Rule(where="*", rank=1, alpha=2)],
        dict(target_modules=r".*lin|head", rank_pattern={"^lin": 3, r"tower\.lin": 1}, alpha_pattern={"lin": 5}),
    ),
    "one of two": Case(Linears, numbers(4, 6), [Rule(where="lin", **TWO)], dict(target_modules="tower.lin")),
    "rslora": Case(
        Linears, numbers(4, 6), [Rule(where="*", scaling="rslora", **TWO)],
        dict(target_modules="all-linear", use_rslora=True),
    ),
    "two scalings": Case(
        Linears, numbers(4, 6), [Rule(where="head", scaling="rslora", **TWO), Rule(where="*", rank=3)],
        dict(target_modules=["lin"], exclude_modules=["tower.lin"]),
    ),
    "text": Case(
        Text, IDS, [Rule(where="table", rank=3), Rule(where="*", **TWO)], dict(target_modules=["table", "mix", "out"])
    ),
    "conv": Case(
        Convs, numbers(2, 3, 8), [Rule(where="*", **TWO)],
        dict(target_modules=["one", "two", "three"], lora_dropout=0.1),
    ),
    "attention": Case(
        Attention, numbers(2, 4, 12), [Rule(where="attention.in_proj*", rank=4, alpha=12), Rule(where="*", **TWO)],
        dict(target_modules=["attention", "out"]),
    ),
    "attention in": Case(Attention, numbers(2, 4, 12), [Rule(where="attention.in_proj*", **TWO)]),
    "experts": Case(
        Experts, numbers(4, 7), [Rule(where="raw*", rank=3), Rule(where="*", **TWO)],
        dict(target_modules=[], target_parameters=["experts.up", "down", "raw.w"], rank_pattern={"up": 3}),
    ),
    "experts turned": Case(
        lambda: Experts(True), numbers(4, 7), [Rule(where="*", **TWO)],
        dict(target_modules=[], target_parameters=["experts.down"]),
    ),
    "tied": Case(Tied, IDS, [Rule(where="*", **TWO)], dict(target_modules=["table", "mix", "head"])),
    "one of tied": Case(
        Tied, IDS, [Rule(where="mix", **TWO), Rule(form="embedding", **TWO)], dict(target_modules=["head"])
    ),
    "gpt2": Case(
        gpt2, {"input_ids": IDS}, [Rule(where="*c_attn", rank=3, alpha=4, layers="1"), Rule(where="*", **TWO)],
        dict(target_modules=["c_attn", "c_fc", "wte"], layers_to_transform=[1], layers_pattern="h"),
    ),
    "query and value": Case(
        gpt2, {"input_ids": IDS}, [Rule(role="attention.query | attention.value", rank=3, alpha=4)]
    ),
    "two scales": Case(
        gpt2, {"input_ids": IDS},
        [Rule(role="attention.query", rank=1, alpha=3), Rule(role="attention.value", rank=2, alpha=3)],
    ),
    "own forwards": Case(
        OwnForwards, IDS, [Rule(where="plain", rank=3), Rule(where="*", **TWO)],
        dict(target_modules=["plain"], target_parameters=["warm.weight", "table.weight"]),
    ),
    "falcon": Case(
        falcon, {"input_ids": IDS}, [Rule(where="*query_key_value", dropout=0.1, **TWO)],
        dict(target_modules=["query_key_value", "dense"], lora_dropout=0.1),
    ),
    "gemma": Case(
        gemma, {"input_ids": IDS}, [Rule(where="*embed_tokens", rank=3), Rule(where="*q_proj", **TWO)],
        dict(target_modules=["embed_tokens", "v_proj"]),
    ),
    "mixtral": Case(
        mixtral, {"input_ids": IDS}, [Rule(where="*experts*", **TWO), Rule(where="*_proj", rank=3)],
        dict(target_modules=["q_proj"], target_parameters=["experts.gate_up_proj", "experts.down_proj"]),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_peft_reads_what_we_save(case: Case, tmp_path: Path) -> None:
    ours = adapted(case.make, case.rules, case.x)
    save_adapter(ours, tmp_path / "a")
    theirs = peft.PeftModel.from_pretrained(fresh(case.make), tmp_path / "a").eval()
    assert lora_fx.verify(ours, theirs, case.x)
    assert not lora_fx.verify(fresh(case.make), theirs, case.x)
    written, read = load_file(tmp_path / "a" / TENSORS), peft.get_peft_model_state_dict(theirs)
    assert set(written) == {key for key in read if "lora_" in key}
    assert all(torch.equal(value, read[key]) for key, value in written.items())
    for inputs in (case.x, None):  # without, nothing is captured: the file says how each weight is read
        again = load_adapter(fresh(case.make), tmp_path / "a", inputs)
        assert_same(ours, again)
        assert lora_fx.verify(ours, again, case.x).error == 0
    retensor(tmp_path / "a")
    assert lora_fx.verify(ours, load_adapter(fresh(case.make), tmp_path / "a"), case.x)


@pytest.mark.parametrize("case", [c for c in CASES.values() if c.config], ids=[n for n, c in CASES.items() if c.config])
def test_we_read_what_peft_saves(case: Case, tmp_path: Path) -> None:
    theirs = peft.get_peft_model(fresh(case.make), peft.LoraConfig(**{"r": 2, "lora_alpha": 3, **case.config})).eval()
    fill(p for name, p in theirs.named_parameters() if "lora_" in name)
    theirs.save_pretrained(tmp_path / "a")
    ours = load_adapter(fresh(case.make), tmp_path / "a", case.x)
    assert lora_fx.verify(theirs, ours, case.x)
    assert not lora_fx.verify(theirs, fresh(case.make), case.x)


@pytest.mark.parametrize("name", ["text", "attention"])
def test_dropout_that_peft_ignores(name: str, tmp_path: Path) -> None:
    """PEFT drops nothing on embeddings and attention, whatever the config says."""
    case = CASES[name]
    config = peft.LoraConfig(r=2, lora_dropout=0.25, **case.config)
    peft.get_peft_model(fresh(case.make), config).save_pretrained(tmp_path)
    model = load_adapter(fresh(case.make), tmp_path)
    named = {f"{p.path}.{p.child}": p.adapter for p in inventory(model).places}
    dropped = {name for name, adapter in named.items() if adapter.dropout.p == 0.25}
    assert dropped == {n for n in named if not n.startswith(("table", "attention"))}


def test_equal_adapters_on_a_tied_weight_are_one(tmp_path: Path) -> None:
    ours = adapted(Tied, CASES["tied"].rules, IDS)
    save_adapter(ours, tmp_path)
    retensor(tmp_path)  # as PEFT would write it
    again = load_adapter(fresh(Tied), tmp_path, IDS)
    assert list(again.state_dict()) == list(ours.state_dict())
    assert again.table.weight_lora_default is again.head.weight_lora_default


@pytest.mark.parametrize("version, trained", [("0.22.0", True), ("0.22.0", False), ("0.18.1", True), (None, True)])
def test_attention_of_a_newer_peft(version: str | None, trained: bool, tmp_path: Path) -> None:
    """Up to 0.21 PEFT adds the delta of out_proj twice; what a later one does is not known."""
    theirs = peft.get_peft_model(
        fresh(Attention), peft.LoraConfig(r=2, lora_alpha=3, target_modules=["attention"])
    ).eval()
    fill(p for n, p in theirs.named_parameters() if "lora_" in n and (trained or "out_proj" not in n))
    theirs.save_pretrained(tmp_path)
    edit(tmp_path, peft_version=version)
    if version == "0.22.0" and trained:
        refused(lambda: load_adapter(fresh(Attention), tmp_path), "0.22.0", "peft_version", "twice", "merge_and_unload")
    else:
        assert lora_fx.verify(theirs, load_adapter(fresh(Attention), tmp_path), numbers(2, 4, 12))


# ── loading ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_weights_that_the_inputs_do_not_reach(tmp_path: Path) -> None:
    class Either(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 4), Conv1D(4, 6)

        def forward(self, x: torch.Tensor, other: bool = False) -> torch.Tensor:
            return self.b(x) if other else self.a(x)

    ours = adapted(Either, [Rule(where="a | b", rank=2)])
    save_adapter(ours, tmp_path / "a")
    again = load_adapter(fresh(Either), tmp_path / "a", numbers(3, 6))
    for inputs in (numbers(3, 6),), (numbers(3, 6), True):
        assert lora_fx.verify(ours, again, inputs)


@pytest.mark.parametrize("dtype, kept", [(torch.float64, torch.float64), (torch.bfloat16, torch.float32)])
def test_dtypes(dtype: torch.dtype, kept: torch.dtype, tmp_path: Path) -> None:
    ours = lora_fx.apply(fresh(Linears, dtype), [Rule(where="*", **TWO)], numbers(4, 6).to(dtype))
    fill(p for p in ours.parameters() if p.requires_grad)
    save_adapter(ours, tmp_path / "a")
    assert {t.dtype for t in load_file(tmp_path / "a" / TENSORS).values()} == {kept}
    assert_same(ours, load_adapter(fresh(Linears, dtype), tmp_path / "a", numbers(4, 6).to(dtype)))


def test_names(tmp_path: Path) -> None:
    """PEFT puts named adapters into subfolders; several adapters live in one model."""
    theirs = peft.get_peft_model(
        fresh(Linears), peft.LoraConfig(r=2, target_modules=["head"]), adapter_name="mine"
    ).eval()
    fill(p for n, p in theirs.named_parameters() if "lora_" in n)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = adapted(Linears, [Rule(where="head", rank=1)], numbers(4, 6), name="second")
    save_adapter(ours, tmp_path / "ours", name="second")

    model = load_adapter(fresh(Linears), tmp_path / "theirs", numbers(4, 6))
    assert lora_fx.verify(theirs, model, numbers(4, 6))
    load_adapter(model, tmp_path / "ours", numbers(4, 6))
    load_adapter(model, tmp_path / "ours", numbers(4, 6), name="third")
    assert list(lora_fx.adapters(model)) == ["default", "second", "third"]
    before = whole(model)
    refused(lambda: load_adapter(model, tmp_path / "ours"), "'second'", "Linears", "already has", "any other name")
    refused(lambda: load_adapter(model, tmp_path / "ours", name="4th"), "'4th'", "name", "identifier", "letters")
    save_adapter(model, tmp_path / "more", name="third")
    refused(lambda: load_adapter(model, tmp_path), "it holds more, ours", str(tmp_path), remedy="one adapter")
    with pytest.raises(AdapterError, match="there is no adapter named 'fourth'") as caught:
        save_adapter(model, tmp_path / "b", name="fourth")
    assert "default, second, third" in caught.value.remedy
    assert_untouched(model, before)
    folded = lora_fx.fold(model)
    refused(lambda: load_adapter(folded, tmp_path / "ours", name="fourth"), "folded", "Linears", remedy="unfold")
    refused(lambda: save_adapter(folded, tmp_path / "b"), "'default' is folded", "Linears", remedy="unfold")


def test_the_spelling_of_before_still_works(tmp_path: Path) -> None:
    """The name without its keyword, with a warning that shows the caller's line."""
    ours = adapted(Linears, [Rule(where="head", rank=1)], numbers(4, 6), name="task")
    save_adapter(ours, tmp_path / "new", name="task")
    with pytest.warns(DeprecationWarning, match="save_adapter\\(model, path, name=…\\)") as seen:
        save_adapter(ours, tmp_path / "old", "task")
    assert seen[0].filename == __file__
    old, new = (load_file(tmp_path / folder / TENSORS) for folder in ("old", "new"))
    assert old.keys() == new.keys() and all(torch.equal(old[key], new[key]) for key in old)
    with pytest.raises(TypeError):
        save_adapter(ours, tmp_path / "old", "task", "other")  # two names


def test_training_goes_on(tmp_path: Path) -> None:
    """A loaded adapter trains as a fresh one does: it, and nothing else."""
    save_adapter(adapted(Linears, [Rule(where="*", **TWO)], numbers(4, 6)), tmp_path / "a")
    model = load_adapter(fresh(Linears), tmp_path / "a", numbers(4, 6))
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        n for n in model.state_dict() if "_lora_" in n
    }


@pytest.mark.parametrize("as_peft", [True, False])
def test_a_wrapped_model_is_saved_under_the_names_of_its_own(tmp_path, as_peft):
    """As after training: `torch.compile` around the model, a checkpoint wrapper around a part of it."""

    def make():
        return nn.Sequential(nn.Linear(4, 6), nn.Sequential(nn.Tanh(), nn.Linear(6, 3)))

    x = torch.randn(2, 4)
    model = adapted(make, Rule(where="*.weight", rank=2), x)
    save_adapter(model, tmp_path / "plain", peft=as_peft)
    expected = load_adapter(fresh(make), tmp_path / "plain", x)(x)
    assert torch.equal(expected, model(x)) and not torch.equal(expected, fresh(make)(x))
    model[1] = checkpoint_wrapper(model[1])
    for way, wrapped in (("compiled", torch.compile(model)), ("parallel", nn.DataParallel(model))):
        save_adapter(wrapped, tmp_path / way, peft=as_peft)
        assert load_file(tmp_path / way / TENSORS).keys() == load_file(tmp_path / "plain" / TENSORS).keys()
        assert torch.equal(load_adapter(fresh(make), tmp_path / way, x)(x), expected)


def test_a_model_on_meta_takes_the_numbers_on_the_cpu(tmp_path: Path) -> None:
    saved = saved_by_peft(tmp_path / "a")
    with torch.device("meta"):
        empty = Linears()
    real = load_adapter(fresh(Linears), saved)
    load_adapter(empty, saved)
    mine, theirs = (dict(m.named_parameters()) for m in (empty, real))
    factors = [name for name in theirs if "_lora_" in name]
    assert factors and all(torch.equal(mine[name], theirs[name]) for name in factors)
    assert all(mine[name].is_meta for name in theirs if name not in factors)


def test_peft_writes_over_ours(tmp_path: Path) -> None:
    """PEFT replaces our header together with the tensors: what it trained is what is loaded."""
    ours = adapted(gpt2, CASES["query and value"].rules, {"input_ids": IDS})
    save_adapter(ours, tmp_path / "a")
    theirs = peft.PeftModel.from_pretrained(fresh(gpt2), tmp_path / "a", is_trainable=True).eval()
    fill(p for n, p in theirs.named_parameters() if "lora_" in n)
    theirs.save_pretrained(tmp_path / "a")
    assert lora_fx.verify(theirs, load_adapter(fresh(gpt2), tmp_path / "a", {"input_ids": IDS}), {"input_ids": IDS})
