"""DoRA's files against PEFT: read, written and merged, and refused where they are damaged.

    W' = m·V / ‖V‖,   V = W + s·B·A        over the inputs of each output feature, in float64, out of PEFT's own tensors

Both libraries are held against that. The bound of a comparison is 16 times what one rounding of every weight, in the
dtype of the model, does to the same float64 numbers (`checks.verification`).
"""

from __future__ import annotations

import copy
import json
import math
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

import lora_fx
from lora_fx import Rule, load_adapter, save_adapter
from lora_fx.checks.verification import compare_all, move_weights
from lora_fx.errors import FileError
from lora_fx.export.adapters.folder import CONFIG, TENSORS
from lora_fx.model.inventory import inventory
from tests import reference
from tests.adapters import (
    Attention,
    RawParameters,
    Tied,
    assert_same,
    assert_untouched,
    edit,
    files,
    fresh,
    inner,
    refused,
    retensor,
    whole,
)
from tests.dora import CONFIGS, IDS, NAMES, PREFIX, RULES, TWO, Layers, by_peft, move, out

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning")  # PEFT's


# ── the two against float64 ──────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Exact:
    """W' of one weight, in float64 and the weight's own axes."""

    weight: torch.Tensor
    rounding: torch.Tensor
    """What float32 may lose of each element, in whichever order it is computed."""


def option(config: dict[str, Any], key: str, default: str, name: str) -> float:
    """PEFT's: the first pattern that matches the module's name."""
    found = (value for key, value in (config.get(key) or {}).items() if re.match(rf"(.*\.)?({key})$", name))
    return next(found, config[default])


def turned(name: str, module: nn.Module, folder: Path) -> Exact | None:
    """W' of a module, read off PEFT's two files; None where they have no DoRA for it.

    float32, with u = 2⁻²⁴ and n inputs: r + 1 roundings in s·B·A, one in V, n + 1 in the norm, of terms as large as
    |W| + |s|·|B|·|A|, then a division and a product.
    """
    config, tensors = json.loads((folder / CONFIG).read_text()), load_file(folder / TENSORS)
    base = f"{PREFIX}{name}.lora_"
    if not config["use_dora"] or f"{base}magnitude_vector" not in tensors:
        return None
    one, two = ("embedding_A", "embedding_B") if isinstance(module, nn.Embedding) else ("A.weight", "B.weight")
    A, B, m = (tensors[base + key].double() for key in (one, two, "magnitude_vector"))
    rank = A.shape[0]
    assert rank == option(config, "rank_pattern", "r", name)
    s = option(config, "alpha_pattern", "lora_alpha", name) / (math.sqrt(rank) if config["use_rslora"] else rank)
    table = isinstance(module, nn.Embedding | Conv1D)  # (in, out)
    W = module.weight.detach().double()
    matrix = W.T if table else W.flatten(1)
    A, B, m = A.flatten(1), B.flatten(1), m.reshape(-1, 1)
    V, terms = matrix + s * B @ A, matrix.abs() + abs(s) * B.abs() @ A.abs()
    norm, largest = V.norm(dim=1, keepdim=True), terms.norm(dim=1, keepdim=True)
    n = matrix.shape[1]
    lost = 2.0**-24 * (n + 2 * rank + 8) * (m / norm).abs() * terms * largest / norm
    shaped = (lambda t: t.T) if table else (lambda t: t.reshape(W.shape))
    return Exact(shaped(m / norm * V), shaped(lost))


def with_turned_weights(base: nn.Module, folder: Path) -> tuple[nn.Module, dict[str, Exact]]:
    """The base in float64 with W' in the place of each weight."""
    wide, found = copy.deepcopy(base).double(), {}
    for name, module in wide.named_modules():
        if (exact := turned(name, module, folder)) is not None:
            found[f"{name}.weight"] = exact
    assert found
    for name, exact in found.items():
        wide.get_parameter(name).data = exact.weight.clone()
    return wide, found


def assert_is(base: nn.Module, folder: Path, *models: nn.Module) -> None:
    """Each of them is the base with W' in its weights, in its own dtype and cast to float64; and W + s·B·A alone,
    without magnitudes, is another model."""
    wide, _ = with_turned_weights(base, folder)
    (x, *_), exact = base.parameters(), out(wide)
    for dtype in (x.dtype, torch.float64):
        moved = copy.deepcopy(wide)
        move_weights(moved, torch.finfo(dtype).eps / 2)
        floor = out(moved)
        for model in models:
            y = out(copy.deepcopy(model).to(dtype) if dtype == torch.float64 else model)
            assert y.dtype == dtype
            report = compare_all([y], [exact], [floor])
            assert report, (type(model).__name__, str(report))
    for other in (copy.deepcopy(base), without_magnitudes(base, folder)):
        assert not compare_all([out(other.double())], [exact], [floor])


def without_magnitudes(base: nn.Module, folder: Path) -> nn.Module:
    """The same file, read as plain LoRA."""
    plain = folder.parent / "plain"
    plain.mkdir(exist_ok=True)
    tensors, config = load_file(folder / TENSORS), json.loads((folder / CONFIG).read_text())
    save_file({k: t for k, t in tensors.items() if "magnitude" not in k}, plain / TENSORS)
    (plain / CONFIG).write_text(json.dumps({**config, "use_dora": False}))
    return peft.PeftModel.from_pretrained(copy.deepcopy(base), plain).eval()


DTYPES = (torch.float32, torch.bfloat16)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rules", RULES.values(), ids=RULES)
def test_peft_reads_the_dora_that_we_save(rules, dtype, tmp_path):
    base = fresh(Layers, dtype)
    ours = move(lora_fx.apply(copy.deepcopy(base), rules, IDS))
    save_adapter(ours, tmp_path / "a")
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "a").eval()
    assert_is(base, tmp_path / "a", ours, theirs)
    written, read = load_file(tmp_path / "a" / TENSORS), peft.get_peft_model_state_dict(theirs)
    assert reference.same_bits(written, {key: read[key] for key in read if "lora_" in key})
    again = load_adapter(copy.deepcopy(base), tmp_path / "a", IDS)
    assert_same(ours, again)
    retensor(tmp_path / "a")  # as PEFT would have written it
    assert torch.equal(out(load_adapter(copy.deepcopy(base), tmp_path / "a", IDS)), out(ours))
    assert_merges(base, tmp_path / "a", ours)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_we_read_the_dora_that_peft_saves(config, dtype, tmp_path):
    base = fresh(Layers, dtype)
    theirs = by_peft(base, tmp_path / "a", **config)
    ours = load_adapter(copy.deepcopy(base), tmp_path / "a", IDS)
    assert {place.adapter.kind.name for place in inventory(ours).places} == {"dora"}
    assert_is(base, tmp_path / "a", ours, theirs)
    save_adapter(ours, tmp_path / "b")
    mine, read = load_file(tmp_path / "b" / TENSORS), load_file(tmp_path / "a" / TENSORS)
    assert reference.same_bits(mine, {key: t for key, t in read.items() if "lora_" in key}), "and write it again"
    assert_same(ours, load_adapter(copy.deepcopy(base), tmp_path / "b", IDS))
    assert_merges(base, tmp_path / "a", ours)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_a_file_of_other_dtypes_means_the_same(dtype, by_them, tmp_path):
    """PEFT saves what it trained; both keep θ in float32 beside float32 weights."""
    shutil.copytree(by_them, tmp_path / "a")
    retensor(tmp_path / "a", lambda tensors: tensors.update({key: t.to(dtype) for key, t in tensors.items()}))
    base = fresh(Layers)
    ours = load_adapter(copy.deepcopy(base), tmp_path / "a", IDS)
    assert_is(base, tmp_path / "a", ours, peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "a").eval())


def test_one_dora_of_two_layers_that_share_a_weight(tmp_path):
    """PEFT keeps it twice; equal ones are one again."""

    class Twins(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.one, self.two = nn.Embedding(11, 6), nn.Linear(6, 6), nn.Linear(6, 6)
            self.two.weight = self.one.weight

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.two(self.one(self.embed(ids)).tanh())

    base = fresh(Twins)
    ours = move(lora_fx.apply(copy.deepcopy(base), Rule(where="one", **TWO), IDS))
    save_adapter(ours, tmp_path / "a")
    assert_is(base, tmp_path / "a", ours, peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "a").eval())
    assert len([key for key in load_file(tmp_path / "a" / TENSORS) if "magnitude" in key]) == 2
    assert_same(ours, load_adapter(copy.deepcopy(base), tmp_path / "a", IDS))
    retensor(tmp_path / "a")
    again = load_adapter(copy.deepcopy(base), tmp_path / "a", IDS)
    assert len(inventory(again).adapters) == 1 and torch.equal(out(again), out(ours))


def assert_merges(base: nn.Module, folder: Path, ours: nn.Module) -> None:
    """Our fold is PEFT's merge in float64, rounded once; and PEFT's in the model's dtype, up to what float32 loses in
    it and one rounding more."""
    folded = dict(lora_fx.fold(copy.deepcopy(ours)).named_parameters())
    _, exact = with_turned_weights(base, folder)
    wide, short = (
        dict(merge(copy.deepcopy(model), folder).named_parameters()) for model in (copy.deepcopy(base).double(), base)
    )
    for name, weight in folded.items():
        value, total, merged = weight.detach(), wide[name].detach(), short[name].detach()
        if name not in exact:
            assert torch.equal(value, merged)
            continue
        lost = exact[name].rounding
        assert bool(((total - exact[name].weight).abs() <= 2.0**-29 * lost).all()), "PEFT's float64"
        low, high = (torch.nextafter(value, torch.full_like(value, end)).double() for end in (-math.inf, math.inf))
        below, above = (low + value) / 2 - 2.0**-29 * lost, (value + high) / 2 + 2.0**-29 * lost
        assert bool(((below <= total) & (total <= above)).all()), f"{name}: one rounding"
        step = torch.finfo(value.dtype).eps * total.abs()
        assert bool(((value.double() - merged.double()).abs() <= lost + step).all()), f"{name}: PEFT's own"


def merge(base: nn.Module, folder: Path) -> nn.Module:
    return peft.PeftModel.from_pretrained(base, folder).merge_and_unload()


# ── bad input ────────────────────────────────────────────────────────────────────────────────────────────────────────


def put(layer: str, value: torch.Tensor | None) -> Callable[[Path], None]:
    """Another magnitude of a layer, or none."""
    key = f"{PREFIX}{layer}.lora_magnitude_vector"

    def change(tensors: dict[str, torch.Tensor]) -> None:
        assert key in tensors
        del tensors[key]
        tensors |= {} if value is None else {key: value}

    return lambda folder: retensor(folder, change)


def target(**options: Any) -> Callable[[Path], None]:
    return lambda folder: edit(folder, **options)


DAMAGE = {
    "no magnitude": (put("plain", None), "is missing", "plain.lora_magnitude_vector", "its config says use_dora"),
    "none of an embedding": (put("embed", None), "is missing", "embed.lora_magnitude_vector", "use_dora"),
    "of another width": (put("plain", torch.ones(9)), "(9,); plain (10, 6) wants (10,)", "plain.lora_", "base model"),
    "of the inputs": (put("mix", torch.ones(9)), "(9,); mix (9, 8) wants (8,)", "mix.lora_magnitude", "base model"),
    "of the rows": (put("embed", torch.ones(11)), "(11,); embed (11, 6) wants (6,)", "embed.lora_mag", "base model"),
    "flat": (put("conv2", torch.ones(5)), "(5,); conv2 (5, 1, 3, 2) wants (1, 5, 1, 1)", "conv2.lora", "same save"),
    "a column": (put("bare", torch.ones(9, 1)), "(9, 1); bare (9, 10) wants (9,)", "bare.lora_mag", "base model"),
    "NaN": (put("plain", torch.full((10,), math.nan)), "NaN", "plain.lora_magnitude_vector", "earlier checkpoint"),
    "Inf": (put("conv1", torch.full((1, 7, 1), math.inf)), "Inf", "conv1.lora_magnitude_vector", "earlier checkpoint"),
    "integers": (put("plain", torch.ones(10, dtype=torch.int64)), "int64", "plain.lora_magnitude", "save them so"),
    "plain LoRA, it says": (target(use_dora=False), "the sizes of DoRA", "lora_magnitude_vector", "merge it"),
    "nothing said": (target(use_dora=None), "the sizes of DoRA", "lora_magnitude_vector", "merge it"),
    "a word": (target(use_dora="yes"), "'yes' is not true or false", "use_dora", "restore"),
    "a layer less": (
        target(target_modules=[name for name in NAMES if name != "conv3"]), "the sizes of DoRA|no layer", "conv3", "",
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def by_them(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "a"
    by_peft(fresh(Layers), folder, target_modules=list(NAMES))
    return folder


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_files_of_dora(damage, by_them, tmp_path):
    spoil, reason, place, remedy = DAMAGE[damage]
    shutil.copytree(by_them, tmp_path / "a")
    spoil(tmp_path / "a")
    model, written = fresh(Layers), files(tmp_path)
    before = whole(model)
    with pytest.raises(FileError) as caught:
        load_adapter(model, tmp_path / "a", IDS)
    error = caught.value
    assert any(part in error.reason for part in reason.split("|")) and place in error.place and remedy in error.remedy
    assert_untouched(model, before)
    assert files(tmp_path) == written


@pytest.mark.parametrize(
    "make, modules", [(Attention, ["attention"]), (inner(RawParameters), None)], ids=["attention", "raw"]
)
def test_dora_where_peft_has_none_is_no_file_of_its(make, modules, tmp_path):
    """PEFT would not have written it: a LoRA file whose config was changed."""
    more = dict(target_modules=modules) if modules else dict(target_modules=[], target_parameters=["0.w"])
    peft.get_peft_model(fresh(make), peft.LoraConfig(r=2, **more)).save_pretrained(tmp_path)
    edit(tmp_path, use_dora=True)
    model, written = fresh(make), files(tmp_path)
    before = whole(model)
    refused(
        lambda: load_adapter(model, tmp_path), "PEFT has no DoRA for", "use_dora", remedy="train it with lora_fx.apply"
    )
    assert_untouched(model, before)
    assert files(tmp_path) == written


def test_dora_on_both_names_of_a_tied_weight_is_refused(tmp_path):
    """PEFT normalises it over the inputs of each use: two W' of one weight."""
    by_peft(fresh(Tied), tmp_path, target_modules=["table", "head"])
    model = fresh(Tied)
    before = whole(model)
    with pytest.raises(FileError, match="reads the weight's axes as"):
        load_adapter(model, tmp_path, IDS)
    assert_untouched(model, before)
