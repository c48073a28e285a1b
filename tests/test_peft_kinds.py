"""Kinds in files: DoRA and biases against PEFT, read, written, trained and merged; every kind in our own format.

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
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

import lora_fx
from lora_fx import Kind, Rule, load_adapter, register_kind, save_adapter
from lora_fx.checks.verification import compare, compare_all, move_weights, relative_error, scatter
from lora_fx.deltas import dora, kernels
from lora_fx.deltas.dropping import BranchDropout
from lora_fx.deltas.kinds import REQUIRED
from lora_fx.errors import FileError
from lora_fx.export.adapters.folder import CONFIG, TENSORS, read_folder, write_folder
from lora_fx.model.inventory import inventory
from tests import reference

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning")  # PEFT's

IDS = torch.tensor([[1, 2, 3, 10], [4, 0, 5, 6]])
PREFIX = "base_model.model."


# ── models ───────────────────────────────────────────────────────────────────────────────────────────────────────────


class Layers(nn.Module):
    """Every layer for which PEFT has DoRA; none is square."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.plain, self.bare = nn.Embedding(11, 6), nn.Linear(6, 10), nn.Linear(10, 9, bias=False)
        self.mix, self.conv1 = Conv1D(8, 9), nn.Conv1d(8, 7, 2, padding=1)
        self.conv2, self.conv3 = nn.Conv2d(1, 5, (3, 2), stride=(2, 1)), nn.Conv3d(5, 4, (1, 2, 1), bias=False)
        nn.init.normal_(self.mix.bias)  # transformers starts it at 0
        nn.init.normal_(self.mix.weight, std=0.4)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.mix(self.bare(self.plain(self.embed(ids)).tanh()).tanh())
        x = self.conv2(self.conv1(x.transpose(1, 2)).tanh().unsqueeze(1))
        return self.conv3(x.tanh().unsqueeze(2))


NAMES = ("embed", "plain", "bare", "mix", "conv1", "conv2", "conv3")
BIASED = ("plain", "mix", "conv1", "conv2")


def gpt2() -> nn.Module:
    size = dict(n_embd=12, n_layer=1, n_head=2, vocab_size=17, n_positions=9)
    return GPT2LMHeadModel(GPT2Config(**size, attn_pdrop=0.0, resid_pdrop=0.0, embd_pdrop=0.0))


def llama() -> nn.Module:
    """With biases, and with norms that have none: there PEFT's bias="all" means those of the linears."""
    size = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=4, vocab_size=17)
    size |= dict(num_key_value_heads=2, initializer_range=0.2)
    model = LlamaForCausalLM(LlamaConfig(**size, attention_bias=True, mlp_bias=True))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter, std=0.3)
    return model


def fresh(make: Callable[[], nn.Module], dtype: torch.dtype = torch.float32) -> nn.Module:
    """Frozen: some kernels choose another path for trainable weights."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make().eval().requires_grad_(False).to(dtype)


def move(model: nn.Module) -> nn.Module:
    """θ of every adapter, the magnitudes away from the norms too."""
    generator = torch.Generator().manual_seed(0)
    for place in inventory(model).places:
        if place.child in place.owner._modules:
            scatter(place.adapter, place.parameter, generator, 0.4)
    return model


def out(model: nn.Module, x: Any = IDS) -> torch.Tensor:
    with torch.no_grad():
        return model(x)


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


TWO = dict(kind="dora", rank=2, alpha=3)
RULES = {name: [Rule(where=name, **TWO)] for name in NAMES} | {
    "together": [Rule(where="*", **TWO)],
    "rslora": [Rule(where="*", scaling="rslora", **TWO)],
    "patterns": [
        Rule(where="plain", kind="dora", rank=3, alpha=1.7), Rule(where="conv*", kind="dora", rank=1, alpha=2),
        Rule(where="embed", kind="dora", rank=4), Rule(where="*", **TWO),
    ],
    "two scalings": [Rule(where="mix | conv1", scaling="rslora", **TWO), Rule(where="*", kind="dora", rank=3)],
    "dropped": [Rule(where="*", dropout=0.25, **TWO)],
}  # fmt: skip
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
    strip(tmp_path / "a")  # as PEFT would have written it
    assert torch.equal(out(load_adapter(copy.deepcopy(base), tmp_path / "a", IDS)), out(ours))
    assert_merges(base, tmp_path / "a", ours)


CONFIGS = {name: dict(target_modules=[name]) for name in NAMES} | {
    "together": dict(target_modules=list(NAMES)),
    "all linears": dict(target_modules="all-linear", use_rslora=True),
    "patterns": dict(
        target_modules=list(NAMES), rank_pattern={"^plain": 3, "conv.": 1}, alpha_pattern={"conv1": 5, "embed": 0.5},
        use_rslora=True,
    ),
    "dropped": dict(target_modules=list(NAMES), lora_dropout=0.25),
}  # fmt: skip


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
    strip(tmp_path / "a", lambda tensors: tensors.update({key: t.to(dtype) for key, t in tensors.items()}))
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
    strip(tmp_path / "a")
    again = load_adapter(copy.deepcopy(base), tmp_path / "a", IDS)
    assert len(inventory(again).adapters) == 1 and torch.equal(out(again), out(ours))


def by_peft(base: nn.Module, folder: Path, **config: Any) -> nn.Module:
    """PEFT's DoRA with random factors and magnitudes that are no norms, and saved."""
    config = {"r": 2, "lora_alpha": 3, "use_dora": True, "init_lora_weights": False, **config}
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(1)
        model = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**config)).eval()
        for name, parameter in model.named_parameters():
            if "lora_" in name and "magnitude" not in name:
                parameter.normal_(std=0.4)
            elif "magnitude" in name:
                parameter.mul_(0.6 + torch.rand(parameter.shape))
    model.save_pretrained(folder)
    return model


def assert_same(a: nn.Module, b: nn.Module) -> None:
    """θ, settings and outputs, to the bit."""
    assert reference.same_bits(reference.bits(a), reference.bits(b))
    for one, two in zip(inventory(a).places, inventory(b).places, strict=True):
        assert (one.path, one.attribute, one.part) == (two.path, two.attribute, two.part)
        left, right = one.adapter, two.adapter
        assert (left.kind, settings(left), left.layout) == (right.kind, settings(right), right.layout)
        assert (left.name, left.rows, left.role, left.dropout.p) == (
            right.name,
            right.rows,
            right.role,
            right.dropout.p,
        )


def settings(adapter: lora_fx.Adapter) -> dict[str, Any]:
    """With the number for an alpha that is the rank by default."""
    return {**adapter.settings, **({"alpha": adapter.alpha} if "alpha" in adapter.settings else {})}


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


def strip(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any] = lambda tensors: None) -> None:
    """Change the tensors as PEFT would write them, without our header."""
    tensors = load_file(folder / TENSORS)
    change(tensors)
    save_file(tensors, folder / TENSORS)


# ── training ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Training:
    make: Callable[[], nn.Module]
    rules: list[Rule]
    """What the two start from is saved by us with these, and by PEFT with the config."""
    config: dict[str, Any]
    rate: float


LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TRAININGS = {
    "layers": Training(Layers, RULES["together"], CONFIGS["together"], 0.5),
    "gpt2": Training(
        gpt2,
        [Rule(where="*wte", form="embedding", **TWO), Rule(where="*c_*", **TWO)],
        dict(target_modules=["wte", "c_attn", "c_fc", "c_proj"]),
        0.5,
    ),
    "llama": Training(llama, [Rule(where="*_proj", **TWO)], dict(target_modules=LINEARS), 0.5),
}  # fmt: skip
STEPS = 20


def losses(model: nn.Module, rate: float, steps: int = STEPS) -> torch.Tensor:
    """Of plain SGD; whatever is dropped, the draws of a step start from its number."""
    model.train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=rate)
    found = []
    with torch.random.fork_rng():
        for step in range(steps):
            torch.manual_seed(step)
            optimizer.zero_grad()
            y = model(IDS)
            y = (y if isinstance(y, torch.Tensor) else y.logits).flatten(0, 1).flatten(1)
            loss = F.cross_entropy(y, torch.arange(len(y)) % y.shape[1])
            loss.backward()
            optimizer.step()
            found.append(loss.detach().double())
    model.eval()
    assert found[-1] < found[0]
    return torch.stack(found)


def start(training: Training, by: str, folder: Path, dropout: float = 0.0) -> None:
    """B = 0 and the magnitudes the norms, saved."""
    base = fresh(training.make)
    if by == "peft":
        config = {"r": 2, "lora_alpha": 3, "use_dora": True, "lora_dropout": dropout, **training.config}
        with torch.random.fork_rng():
            torch.manual_seed(2)
            peft.get_peft_model(base, peft.LoraConfig(**config)).save_pretrained(folder)
        return
    rules = [
        replace(rule, dropout=dropout) if rule.form is None and rule.where != "embed" else rule  # PEFT drops none there
        for rule in training.rules
    ]
    save_adapter(lora_fx.apply(base, rules, IDS, check=False), folder)


def ours_and_theirs(training: Training, dtype: torch.dtype, folder: Path) -> tuple[nn.Module, nn.Module]:
    ours = load_adapter(fresh(training.make, dtype), folder, IDS, check=False)
    theirs = peft.PeftModel.from_pretrained(fresh(training.make, dtype), folder, is_trainable=True)
    for module in theirs.modules():
        for name, drop in getattr(module, "lora_dropout", {}).items():
            module.lora_dropout[name] = BranchDropout(drop.p) if isinstance(drop, nn.Dropout) else drop  # our draws
    return ours, theirs


def theta(model: nn.Module, folder: Path) -> dict[str, torch.Tensor]:
    """As PEFT spells it."""
    if isinstance(model, peft.PeftModel):
        return {key: t for key, t in peft.get_peft_model_state_dict(model).items() if "lora_" in key}
    save_adapter(model, folder)
    return load_file(folder / TENSORS)


@pytest.mark.parametrize(
    "name, by, dropout", [("layers", "us", 0.0), ("layers", "peft", 0.25), ("llama", "us", 0.0), ("gpt2", "peft", 0.25)]
)
def test_dora_trains_as_peft_trains_it(name, by, dropout, tmp_path):
    """The same losses and the same θ after them, in float64 and in float32; dropped elements are the same draws."""
    training = TRAININGS[name]
    start(training, by, tmp_path / "a", dropout)
    exact: Any = None
    for dtype in (torch.float64, torch.float32):
        ours, theirs = ours_and_theirs(training, dtype, tmp_path / "a")
        moved = ours_and_theirs(training, torch.float64, tmp_path / "a")[1]
        move_weights(moved, torch.finfo(dtype).eps / 2)
        y, z, m = (trained(model, training.rate, tmp_path / "b") for model in (ours, theirs, moved))
        exact = exact or z
        assert y.keys() == z.keys()
        for key, e in exact.items():
            assert compare(y[key], z[key], e, floor(z[key], m[key], e), dtype), (key, dtype)
            assert compare(y[key], e, e, floor(z[key], m[key], e), dtype), (key, dtype)


def floor(theirs: torch.Tensor, moved: torch.Tensor, exact: torch.Tensor) -> float:
    """The noise, as `verify` takes it: how far PEFT is from float64 itself, or float64 from what it was before the
    weights moved."""
    return max(relative_error(theirs, exact, exact), relative_error(moved, exact, exact))


def trained(model: nn.Module, rate: float, folder: Path) -> dict[str, torch.Tensor]:
    """20 losses, and θ after them."""
    return {"losses": losses(model, rate), **theta(model, folder)}


@pytest.mark.parametrize("wrong", ["magnitudes that stay", "a norm with a gradient"])
def test_other_training_has_other_losses(wrong, tmp_path, monkeypatch):
    """The bound above sees it."""
    training = TRAININGS["layers"]
    start(training, "us", tmp_path / "a")
    ours, theirs = ours_and_theirs(training, torch.float64, tmp_path / "a")
    moved = ours_and_theirs(training, torch.float64, tmp_path / "a")[1]
    move_weights(moved, torch.finfo(torch.float64).eps / 2)
    e, m = losses(theirs, training.rate), losses(moved, training.rate)
    if wrong == "magnitudes that stay":
        for place in inventory(ours).places:
            place.adapter.magnitude.requires_grad_(False)
    else:
        monkeypatch.setattr(dora, "size", lambda weight, t: dora.turned(weight, t).norm(dim=-1, keepdim=True))
        monkeypatch.setattr(kernels, "loses_nothing", lambda dtype: False)  # no matmul with gradients of its own
    y = losses(ours, training.rate)
    assert compare(y[:1], e[:1], e[:1], 0.0, torch.float64)
    assert not compare(y, e, e, relative_error(m, e, e), torch.float64)


def test_both_start_at_the_norms(tmp_path):
    for by in ("us", "peft"):
        start(TRAININGS["layers"], by, tmp_path / by)
    mine, theirs = (load_file(tmp_path / by / TENSORS) for by in ("us", "peft"))
    keys = [key for key in mine if "magnitude" in key]
    assert len(keys) == len(NAMES)
    for key in keys:
        module = fresh(Layers).get_submodule(key.removeprefix(PREFIX).split(".")[0])
        rounding = module.weight.numel() // theirs[key].numel() * 2.0**-24  # a sum of as many squares, twice over
        assert bool(((mine[key] - theirs[key]).abs() <= 2 * rounding * theirs[key]).all()), key


# ── biases ───────────────────────────────────────────────────────────────────────────────────────────────────────────

BIASES = {
    "layers, all": (Layers, "all", ["plain", "conv1", "embed"], "plain | mix | conv1 | conv2"),
    "layers, adapted": (Layers, "lora_only", ["plain", "conv1", "embed"], "plain | conv1"),
    "llama": (llama, "all", LINEARS, "*_proj"),
}


@pytest.mark.parametrize("make, which, targets, where", BIASES.values(), ids=BIASES)
def test_biases_train_as_in_peft(make, which, targets, where, tmp_path):
    """PEFT trains the biases themselves beside its LoRA; here a shift of each does the same: b + shift."""
    rules = Rule(where=" | ".join(f"*{name}" for name in targets), rank=2, alpha=3)
    save_adapter(lora_fx.apply(fresh(make), rules, IDS), tmp_path / "a")
    config = peft.LoraConfig(r=2, lora_alpha=3, target_modules=targets, bias=which)

    def theirs(dtype: torch.dtype) -> nn.Module:
        model = peft.get_peft_model(fresh(make, dtype), config)
        peft.set_peft_model_state_dict(model, load_file(tmp_path / "a" / TENSORS))
        return model

    def shifted(dtype: torch.dtype) -> nn.Module:
        model = load_adapter(fresh(make, dtype), tmp_path / "a", IDS, check=False)
        return lora_fx.apply(model, Rule(where=where, kind="bias"), IDS, check=False)

    exact: Any = None
    for dtype in (torch.float64, torch.float32):
        one, two, moved = shifted(dtype), theirs(dtype), theirs(torch.float64)
        move_weights(moved, torch.finfo(dtype).eps / 2)
        y, z, m = ({"losses": losses(model, 0.3)} for model in (one, two, moved))
        base, folded = fresh(make, dtype), lora_fx.fold(copy.deepcopy(one))
        trains = {n for n, p in two.named_parameters() if p.requires_grad and n.endswith("bias")}
        shifts = {place.weight: place.adapter for place in inventory(one).places if place.adapter.kind.name == "bias"}
        assert {plain(name) for name in trains} == shifts.keys()
        for name in trains:
            y[plain(name)] = base.get_parameter(plain(name)).double() + shifts[plain(name)].shift.detach()[:, 0]
            z[plain(name)], m[plain(name)] = (model.get_parameter(name).detach() for model in (two, moved))
            assert torch.equal(folded.get_parameter(plain(name)), y[plain(name)].to(dtype))
        exact = exact or z
        for key, e in exact.items():
            assert compare(y[key], z[key], e, floor(z[key], m[key], e), dtype), (key, dtype)
    e = exact["losses"]
    still = losses(load_adapter(fresh(make), tmp_path / "a", check=False), 0.3)
    assert not compare(still, e, e, floor(z["losses"], m["losses"], e), torch.float32), "without biases it is another"


def plain(name: str) -> str:
    """PEFT's name of a base parameter without what PEFT puts around it."""
    return name.removeprefix(PREFIX).replace(".base_layer.", ".")


# ── bad input ────────────────────────────────────────────────────────────────────────────────────────────────────────


def refused(call: Callable[[], Any], reason: str, place: str, remedy: str) -> None:
    with pytest.raises(FileError) as caught:
        call()
    error = caught.value
    assert reason in error.reason, error
    assert place in error.place, error
    assert remedy in error.remedy, error


def whole(model: nn.Module) -> dict[str, Any]:
    """What a refused call must leave as it was."""
    trains = {name: p.requires_grad for name, p in model.named_parameters()}
    return {"bits": reference.bits(model), "classes": reference.classes(model), "trains": trains}


def assert_untouched(model: nn.Module, before: dict[str, Any]) -> None:
    after = whole(model)
    assert reference.same_bits(after["bits"], before["bits"])
    assert (after["classes"], after["trains"]) == (before["classes"], before["trains"])


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def edit(folder: Path, **options: Any) -> None:
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**config, **options}))


def put(layer: str, value: torch.Tensor | None) -> Callable[[Path], None]:
    """Another magnitude of a layer, or none."""
    key = f"{PREFIX}{layer}.lora_magnitude_vector"

    def change(tensors: dict[str, torch.Tensor]) -> None:
        assert key in tensors
        del tensors[key]
        tensors |= {} if value is None else {key: value}

    return lambda folder: strip(folder, change)


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


def test_our_header_and_the_config_must_agree(tmp_path):
    for name, rules, says in (("dora", RULES["plain"], True), ("lora", [Rule(where="plain", rank=2)], False)):
        folder = tmp_path / name
        save_adapter(move(lora_fx.apply(fresh(Layers), rules, IDS, check=False)), folder)
        edit(folder, use_dora=not says)
        refused(lambda f=folder: load_adapter(fresh(Layers), f), f"it says {not says}", "use_dora", "both files")
        edit(folder, use_dora=says)
        assert load_adapter(fresh(Layers), folder, check=False)


@pytest.mark.parametrize("kind", ["lora", "full", "bias"])
def test_another_kind_in_our_header_of_a_file_of_peft(kind, tmp_path):
    save_adapter(move(lora_fx.apply(fresh(Layers), RULES["plain"], IDS, check=False)), tmp_path)
    rewrite(tmp_path, lambda folder: folder.header["adapters"][0].update(kind=kind, settings={}))
    with pytest.raises(FileError, match="needs rank" if kind == "lora" else "does not describe"):
        load_adapter(fresh(Layers), tmp_path)
    rewrite(tmp_path, lambda folder: folder.header["adapters"][0].update(kind="lora", settings={"rank": 2}))
    refused(lambda: load_adapter(fresh(Layers), tmp_path), "was written with the kind 'lora'", "use_dora", "both files")


def test_a_file_of_ours_from_before_there_was_dora(tmp_path):
    """Neither its config nor its header says anything of it."""
    save_adapter(move(lora_fx.apply(fresh(Layers), Rule(where="plain", rank=2), IDS, check=False)), tmp_path)
    rewrite(tmp_path, lambda folder: (folder.config.pop("use_dora"), folder.header["config"].pop("use_dora")))
    assert load_adapter(fresh(Layers), tmp_path, check=False)
    edit(tmp_path, use_dora=True)
    refused(lambda: load_adapter(fresh(Layers), tmp_path), "it says True", "use_dora", "both files")


def rewrite(path: Path, change: Callable[[Any], Any]) -> None:
    """With our header, changed by somebody who knows how its digest is made."""
    folder = read_folder(path)
    change(folder)
    write_folder(path, folder.config, folder.tensors, folder.header)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention, self.out = nn.MultiheadAttention(12, 3, batch_first=True), nn.Linear(12, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.attention(x, x, x, need_weights=False)[0])


class Raw(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w, self.experts = nn.Parameter(torch.randn(7, 6) / 3), nn.Parameter(torch.randn(3, 6, 5) / 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.bmm((x @ self.w).expand(3, -1, -1), self.experts)


class Outside(nn.Module):
    """The weight of `read` is multiplied with here."""

    def __init__(self) -> None:
        super().__init__()
        self.read, self.called = nn.Linear(6, 7), nn.Linear(7, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.called(F.linear(x, self.read.weight, self.read.bias).tanh())


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.mix, self.head = nn.Embedding(11, 6), nn.Linear(6, 6), nn.Linear(6, 11, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.mix(self.table(ids)).tanh())


def numbers(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def inner(make: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(make())


FULL = dict(kind="full")
UNSAID = {
    "attention in": (Attention, numbers(2, 4, 12), [Rule(where="*in_proj*", **TWO)], "as attention", "in_proj_weight"),
    "attention out": (Attention, numbers(2, 4, 12), [Rule(where="*out_proj*", **TWO)], "as attention", "out_proj"),
    "a raw parameter": (inner(Raw), numbers(4, 7), [Rule(where="*w", **TWO)], "as parameter", "0.w"),
    "experts": (inner(Raw), numbers(4, 7), [Rule(where="*experts", **TWO)], "as parameter", "0.experts"),
    "read outside": (inner(Outside), numbers(3, 6), [Rule(where="*read", **TWO)], "reads the weight", "0.read.weight"),
    "read at the top": (Outside, numbers(3, 6), [Rule(where="read", **TWO)], "reads the weight", "read.weight"),
    "queries": (gpt2, IDS, [Rule(role="attention.query", **TWO)], "a part of the weight", "c_attn.weight"),
    "a tied table": (Tied, IDS, [Rule(where="table", **TWO)], "the model reads it as", "table.weight"),
    "two kinds": (Layers, IDS, [Rule(where="plain", **TWO), Rule(where="mix", rank=2)], "dora, lora", "plain.weight"),
    "full": (Layers, IDS, [Rule(where="plain", **FULL)], "'full' is none of a LoRA file", "plain.weight"),
    "biases": (Layers, IDS, [Rule(where="plain | conv*1", kind="bias")], "'bias' is none of", "plain.bias"),
}  # fmt: skip


@pytest.mark.parametrize("make, x, rules, reason, place", UNSAID.values(), ids=UNSAID)
def test_what_peft_cannot_say_goes_into_our_own_format(make, x, rules, reason, place, tmp_path):
    ours = move(lora_fx.apply(fresh(make), rules, x))
    before = whole(ours)
    with pytest.raises(FileError) as caught:
        save_adapter(ours, tmp_path / "a")
    error = caught.value
    assert any(part in error.reason for part in reason.split("|")), error
    assert place in error.place and "peft=False" in error.remedy, error
    assert not list(tmp_path.iterdir())
    assert_untouched(ours, before)
    save_adapter(ours, tmp_path / "a", peft=False)
    again = load_adapter(fresh(make), tmp_path / "a", x)
    assert_same(ours, again)
    assert torch.equal(out_of(again, x), out_of(ours, x)) and not torch.equal(out_of(again, x), out_of(fresh(make), x))
    with pytest.raises(KeyError, match="LORA_FX"):
        peft.PeftModel.from_pretrained(fresh(make), tmp_path / "a")


def out_of(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    y = out(model, x)
    return y if isinstance(y, torch.Tensor) else y.logits


@pytest.mark.parametrize("make, modules", [(Attention, ["attention"]), (inner(Raw), None)], ids=["attention", "raw"])
def test_dora_where_peft_has_none_is_no_file_of_its(make, modules, tmp_path):
    """PEFT would not have written it: a LoRA file whose config was changed."""
    more = dict(target_modules=modules) if modules else dict(target_modules=[], target_parameters=["0.w"])
    peft.get_peft_model(fresh(make), peft.LoraConfig(r=2, **more)).save_pretrained(tmp_path)
    edit(tmp_path, use_dora=True)
    model, written = fresh(make), files(tmp_path)
    before = whole(model)
    refused(lambda: load_adapter(model, tmp_path), "PEFT has no DoRA for", "use_dora", "train it with lora_fx.apply")
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


@pytest.mark.parametrize("kind, tensor", [("dora", "magnitude"), ("full", "weight"), ("bias", "shift")])
@pytest.mark.parametrize("as_peft", [True, False])
def test_a_tensor_that_is_not_finite_is_not_saved(kind, tensor, as_peft, tmp_path):
    ours = move(lora_fx.apply(fresh(Layers), {**OWN[kind][0], "where": "plain"}, IDS, check=False))
    (adapter,) = inventory(ours).adapters
    with torch.no_grad():
        adapter.get_parameter(tensor)[3] = math.inf
    refused(lambda: save_adapter(ours, tmp_path / "a", peft=as_peft), "NaN or Inf", f", {tensor} of", "checkpoint")
    assert not list(tmp_path.iterdir())


# ── our own format ───────────────────────────────────────────────────────────────────────────────────────────────────

POWER = Kind(  # δ = size·tanh(gain) ⊙ |W|^power
    "power",
    shapes=lambda space: {"gain": (*space.batch, space.out, 1), "pull": (*space.batch, 1, space.inner)},
    start=lambda theta, weight: (theta.gain.zero_(), theta.pull.fill_(1)),
    delta=lambda weight, theta: theta.size * theta.gain.tanh() * theta.pull * weight.abs().pow(theta.power),
    settings={"size": REQUIRED, "power": 2, "rank": None, "words": "none"},
)
OWN: dict[str, list[dict[str, Any]]] = {  # as rules are given; a rule knows the kinds that there are when it is made
    "lora": [dict(where="plain | embed", rank=2, alpha=3, scaling="rslora", dropout=0.25), dict(where="*", rank=3)],
    "dora": [dict(where="plain | conv*", dropout=0.5, **TWO), dict(where="*", kind="dora", rank=3)],
    "bias": [dict(where="plain | mix | conv1 | conv2", kind="bias")],
    "full": [dict(where="*", kind="full")],
    "power": [
        dict(where="plain", kind="power", rank=5, settings={"size": 0.5, "words": "ja, 'ö'"}),
        dict(where="*", kind="power", settings={"size": 2, "power": 3}),
    ],
    "mixed": [
        dict(where="embed", **TWO), dict(where="plain", rank=2, alpha=3), dict(where="bare | conv3", kind="full"),
        dict(where="mix | conv1", kind="bias"), dict(where="*", kind="power", settings={"size": 0.3}),
    ],
}  # fmt: skip


@pytest.fixture(scope="module")
def power():
    with register_kind(POWER, size=0.5):
        yield


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("rules", OWN.values(), ids=OWN)
def test_our_own_format_holds_every_kind(rules, dtype, tmp_path, power):
    base = fresh(Layers, dtype)
    ours = move(lora_fx.apply(copy.deepcopy(base), rules, IDS, check=False))
    save_adapter(ours, tmp_path, peft=False)
    theta = [t.numel() for name, t in reference.bits(ours).items() if "_lora_" in name]
    assert sum(t.numel() for t in load_file(tmp_path / TENSORS).values()) == sum(theta)
    for example in (IDS, None):  # without inputs nothing is captured: the file says how each weight is read
        again = load_adapter(copy.deepcopy(base), tmp_path, example)
        assert_same(ours, again)
        assert torch.equal(out(again), out(ours)) and not torch.equal(out(again), out(base))
    assert reference.same_bits(*(reference.bits(lora_fx.fold(model)) for model in (ours, again)))


def test_two_kinds_of_one_weight_under_one_name(tmp_path):
    ours = lora_fx.apply(fresh(Layers), Rule(where="plain", **TWO), IDS)
    lora_fx.apply(ours, Rule(where="plain", kind="bias"), IDS)
    save_adapter(move(ours), tmp_path, peft=False)
    assert_same(ours, load_adapter(fresh(Layers), tmp_path, IDS))


def header(change: Callable[[dict[str, Any]], Any]) -> Callable[[Any], Any]:
    """Of the first adapter."""
    return lambda folder: change(folder.header["adapters"][0])


def lack(tensor: str) -> Callable[[Any], Any]:
    return lambda folder: folder.tensors.pop(folder.header["adapters"][0]["keys"][tensor])


def reshape(tensor: str, *shape: int) -> Callable[[Any], Any]:
    def change(folder: Any) -> None:
        folder.tensors[folder.header["adapters"][0]["keys"][tensor]] = torch.ones(shape)

    return change


TAMPERED = {
    "an unknown kind": ("dora", header(lambda e: e.update(kind="dore")), "there is no kind 'dore'", "register_kind"),
    "a kind that is no text": ("dora", header(lambda e: e.update(kind=["dora"])), "there is no kind", "register_kind"),
    "another kind": ("dora", header(lambda e: e.update(kind="full")), "no setting", ""),
    "a kind of biases": ("dora", header(lambda e: e.update(kind="bias", settings={})), "does not describe", "again"),
    "a bias on axes": ("bias", header(lambda e: e.update(sides="i")), "does not describe", "again"),
    "no magnitude": ("dora", lack("magnitude"), "plain.weight.magnitude", "again"),
    "no weight": ("full", lack("weight"), "plain.weight.weight", ""),
    "no shift": ("bias", lack("shift"), "shift", ""),
    "a key less": ("dora", header(lambda e: e["keys"].pop("magnitude")), "magnitude", ""),
    "a key more": ("full", header(lambda e: e["keys"].update(other=e["keys"]["weight"])), "not other, weight", "again"),
    "a magnitude for rows": ("dora", reshape("magnitude", 9, 1), "magnitude has the shape (9, 1)", "base model"),
    "a flat magnitude": ("dora", reshape("magnitude", 10), "magnitude has the shape (10,)", "base model"),
    "another weight": ("full", reshape("weight", 6, 10), "weight has the shape (6, 10)", "base model"),
    "another shift": ("bias", reshape("shift", 9, 1), "shift has the shape (9, 1)", "base model"),
    "another rank": ("dora", header(lambda e: e["settings"].update(rank=5)), "A has the shape (2, 6)", "base model"),
    "another setting": ("dora", header(lambda e: e["settings"].update(size=1)), "size=1 is no setting", "it has rank"),
    "no rank": ("dora", header(lambda e: e["settings"].pop("rank")), "needs rank", ""),
    "a setting for none": ("full", header(lambda e: e["settings"].update(rank=1)), "rank=1 is no setting", "has none"),
    "no settings": ("dora", header(lambda e: e.pop("settings")), "does not describe", "again"),
    "a rank in words": ("dora", header(lambda e: e["settings"].update(rank="two")), "wants ('two', 6)", "base model"),
    "half a rank": ("dora", header(lambda e: e["settings"].update(rank=2.0)), "rank=2.0", ""),
    "an alpha in words": ("dora", header(lambda e: e["settings"].update(alpha="3")), "alpha", ""),
    "a dropout of 2": ("dora", header(lambda e: e["settings"].update(dropout=2)), "dropout", ""),
    "a scaling of none": ("dora", header(lambda e: e["settings"].update(scaling="none")), "scaling='none'", ""),
    "its own setting lost": ("power", header(lambda e: e["settings"].pop("size")), "needs size", ""),
    "a setting it has not": ("power", header(lambda e: e["settings"].update(alpha=2)), "alpha=2 is no setting", ""),
}  # fmt: skip


@pytest.mark.parametrize("kind, change, reason, remedy", TAMPERED.values(), ids=TAMPERED)
def test_a_header_that_says_something_else(kind, change, reason, remedy, tmp_path, power):
    ours = lora_fx.apply(fresh(Layers), {**OWN[kind][0], "where": "plain"}, IDS, check=False)
    save_adapter(move(ours), tmp_path / "a", peft=False)
    rewrite(tmp_path / "a", change)
    model, written = fresh(Layers), files(tmp_path)
    before = whole(model)
    refused(lambda: load_adapter(model, tmp_path / "a", IDS), reason, TENSORS, remedy)
    assert_untouched(model, before)
    assert files(tmp_path) == written


def test_a_kind_that_is_not_registered_here(tmp_path):
    with register_kind(replace(POWER, name="elsewhere"), size=0.5):
        rule = Rule(where="plain", kind="elsewhere", settings={"size": 1})
        save_adapter(move(lora_fx.apply(fresh(Layers), rule, IDS, check=False)), tmp_path, peft=False)
    model = fresh(Layers)
    before = whole(model)
    refused(lambda: load_adapter(model, tmp_path, IDS), "there is no kind 'elsewhere'", TENSORS, "register_kind")
    assert_untouched(model, before)


@pytest.mark.parametrize("value", [math.nan, {1, 2}, (1, 2), torch.ones(2), print], ids=str)
def test_a_setting_that_no_file_can_hold(value, tmp_path, power):
    rule = Rule(where="plain", kind="power", settings={"size": 0.5, "words": value})
    ours = lora_fx.apply(fresh(Layers), rule, IDS, check=False)
    refused(lambda: save_adapter(ours, tmp_path / "a", peft=False), "words=", "plain.weight", "")
    assert not list(tmp_path.iterdir())
