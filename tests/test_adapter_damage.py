"""Damaged and foreign adapter files: each is refused by place and reason, and model and files stay as they were."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn

from lora_fx import Rule
from lora_fx.errors import LoraFxError
from lora_fx.export.adapters.files import load_adapter, save_adapter
from lora_fx.export.adapters.folder import CONFIG, TENSORS
from tests.adapters import (
    IDS,
    TWO,
    Attention,
    Linears,
    Odd,
    Tied,
    adapted,
    assert_untouched,
    edit,
    files,
    fresh,
    refused,
    retensor,
    saved_by_peft,
    whole,
)

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning")  # PEFT's


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return saved_by_peft(tmp_path / "a")


HEAD = "base_model.model.head.lora_A.weight"
OPTIONS = {
    "use_dora": (1, "true or false"), "lora_bias": (1, "true or false"), "bias": ("some", "'all' or 'lora_only'"),
    "modules_to_save": ("head", "list of names"), "layer_replication": ([[0, 1]], "how many layers"),
    "trainable_token_indices": ([3], "which of its modules"), "alora_invocation_tokens": ([1], "after certain tokens"),
    "use_qalora": (True, "pooled"), "init_lora_weights": ("pissa_niter_4", "base weights"),
    "kasa_config": ({"beta": 1}, "does not know"), "from_the_future": (3, "does not know"),
    "ensure_weight_tying": (1, "true or false"), "peft_type": ("LOHA", "no LoRA"),
    "r": ("8", "positive integer"), "lora_alpha": (float("inf"), "finite number"),
    "lora_dropout": (1.5, "probability"), "use_rslora": (1, "true or false"),
    "target_modules": (["nowhere"], "'nowhere'"), "target_parameters": ("lin", "list of names"),
    "rank_pattern": ({"(": 2}, "no pattern"), "alpha_pattern": ({"lin": "x"}, "finite numbers"),
    "layers_to_transform": ([True], "integer"),
}  # fmt: skip


@pytest.mark.parametrize("option", OPTIONS)
def test_options_that_are_refused(option: str, saved: Path) -> None:
    value, why = OPTIONS[option]
    edit(saved, **{option: value})
    model = fresh(Linears)
    before, written = whole(model), files(saved)
    refused(lambda: load_adapter(model, saved), why, f"{CONFIG}, {option}")
    assert_untouched(model, before)
    assert files(saved) == written


def drop(key: str) -> Callable[[Path], None]:
    return lambda folder: retensor(folder, lambda t: t.pop(key))


def put(key: str, value: torch.Tensor) -> Callable[[Path], None]:
    return lambda folder: retensor(folder, lambda t: t.update({key: value}))


def cut(name: str, size: int) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:size])


def pickled(folder: Path) -> None:
    (folder / TENSORS).rename(folder / "adapter_model.bin")


DAMAGE = {
    "no folder": (lambda f: os.rename(f, f.parent / "b"), "no such folder", "a"),
    "no config": (lambda f: (f / CONFIG).unlink(), f"no {CONFIG}", "a"),
    "no tensors": (lambda f: (f / TENSORS).unlink(), "cannot be read", TENSORS),
    "no pickle": (pickled, "torch.save", "adapter_model.bin"),
    "half a config": (cut(CONFIG, 50), "cannot be read", CONFIG),
    "a list": (lambda f: (f / CONFIG).write_text("[]"), "a list", CONFIG),
    "bytes": (lambda f: (f / CONFIG).write_bytes(b"\xff\xfe"), "cannot be read", CONFIG),
    "deep": (lambda f: (f / CONFIG).write_text("[" * 100_000), "cannot be read", CONFIG),
    "empty": (cut(TENSORS, 0), "cannot be read", TENSORS),
    "half a header": (cut(TENSORS, 60), "cannot be read", TENSORS),
    "half of it": (cut(TENSORS, 500), "cannot be read", TENSORS),
    "a missing key": (drop(HEAD), "missing", HEAD),
    "an extra key": (put("base_model.model.extra.lora_A.weight", torch.ones(2, 3)), "no layer", "extra"),
    "another place": (put("../../etc/passwd", torch.ones(2)), "no layer", "../../etc/passwd"),
    "another layer": (put("base_model.model.tower.lora_A.weight", torch.ones(2, 3)), "no layer", "tower"),
    "no magnitudes": (lambda f: edit(f, use_dora=True), "missing", "lora_magnitude_vector"),
    "magnitudes": (put("base_model.model.head.lora_magnitude_vector", torch.ones(3)), "DoRA", "magnitude"),
    "a bias": (put("base_model.model.head.lora_B.bias", torch.ones(3)), "bias of the branch", "lora_B.bias"),
    "another base": (put("base_model.model.head.base_layer.weight", torch.ones(3, 7)), "base weight", "base_layer"),
    "another shape": (put(HEAD, torch.ones(2, 8)), "(2, 8)", HEAD),
    "another rank": (put(HEAD, torch.ones(3, 7)), "(3, 7)", HEAD),
    "NaN": (put(HEAD, torch.full((2, 7), torch.nan)), "NaN", HEAD),
    "Inf": (put(HEAD, torch.full((2, 7), torch.inf)), "Inf", HEAD),
    "integers": (put(HEAD, torch.ones(2, 7, dtype=torch.int32)), "int32", HEAD),
    "float8": (put(HEAD, torch.ones(2, 7).to(torch.float8_e4m3fn)), "float8", HEAD),
}


@pytest.mark.parametrize("damage, reason, place", DAMAGE.values(), ids=DAMAGE)
def test_damaged_folders(damage: Callable[[Path], Any], reason: str, place: str, saved: Path) -> None:
    damage(saved)
    model = fresh(Linears)
    before, written = whole(model), files(saved.parent)
    refused(lambda: load_adapter(model, saved), reason, place)
    assert_untouched(model, before)
    assert files(saved.parent) == written


def test_another_base_model(saved: Path, tmp_path: Path) -> None:
    wider = fresh(lambda: nn.ModuleDict({"lin": nn.Linear(6, 9), "head": nn.Linear(8, 3)}))
    refused(lambda: load_adapter(wider, saved), "(2, 7)", HEAD, remedy="base model")
    attention = fresh(Attention)
    refused(lambda: load_adapter(attention, saved), "matches no module", "target_modules", remedy="base model")
    save_adapter(adapted(Linears, [Rule(where="head", **TWO)]), tmp_path / "ours")
    refused(lambda: load_adapter(attention, tmp_path / "ours"), "'head.weight'", TENSORS, remedy="base model")
    refused(lambda: load_adapter(wider, tmp_path / "ours"), "(2, 7)", HEAD, remedy="base model")
    untied = fresh(Tied)
    untied.head.weight = nn.Parameter(untied.table.weight.detach().clone())
    save_adapter(adapted(Tied, [Rule(where="table", **TWO)], IDS), tmp_path / "tied")
    refused(lambda: load_adapter(untied, tmp_path / "tied"), "does not tie", TENSORS, remedy="tied")


def test_peft_targets_that_do_nothing(tmp_path: Path) -> None:
    """A Linear that MultiheadAttention never calls, and a module under two names: PEFT adapts neither."""
    theirs = peft.get_peft_model(fresh(Attention), peft.LoraConfig(r=2, target_modules=["out_proj"]))
    theirs.save_pretrained(tmp_path / "a")
    refused(lambda: load_adapter(fresh(Attention), tmp_path / "a"), "never calls", "target_modules", remedy="attention")
    theirs = peft.get_peft_model(fresh(Odd), peft.LoraConfig(r=2, target_modules=["named"]))
    theirs.save_pretrained(tmp_path / "b")
    refused(lambda: load_adapter(fresh(Odd), tmp_path / "b"), "only the first", "named", remedy="lora_fx.apply")


def test_settings_that_were_edited(tmp_path: Path) -> None:
    save_adapter(adapted(Linears, [Rule(where="head", **TWO)]), tmp_path / "a")
    edit(tmp_path / "a", lora_alpha=6)
    refused(lambda: load_adapter(fresh(Linears), tmp_path / "a"), "6", f"{CONFIG}, lora_alpha", remedy="both files")


@pytest.mark.parametrize("own", [False, True])
def test_flipped_bits_and_cut_files(own: bool, tmp_path: Path) -> None:
    """One flipped bit is refused, or is none that matters: the header of safetensors has padding and names of ours."""
    ours = adapted(Linears, [Rule(where="head", **TWO)])
    save_adapter(ours, tmp_path / "a", peft=not own)
    file = tmp_path / "a" / TENSORS
    good = file.read_bytes()
    data = 8 + int.from_bytes(good[:8], "little")
    for at in [*range(0, data, 11), *range(data, len(good), 7)]:
        file.write_bytes(good[:at] + bytes([good[at] ^ 1 << at % 8]) + good[at + 1 :])
        model = fresh(Linears)
        before = whole(model)
        try:
            load_adapter(model, tmp_path / "a")
            assert at < data
        except LoraFxError:
            assert_untouched(model, before)
            continue
        head = [p for n, p in model.named_parameters() if "_lora_" in n]
        assert all(map(torch.equal, head, [p for n, p in ours.named_parameters() if "_lora_" in n]))
    for size in range(0, len(good), 29):
        file.write_bytes(good[:size])
        refused(lambda: load_adapter(fresh(Linears), tmp_path / "a"), "cannot be read", TENSORS, remedy="restore")
