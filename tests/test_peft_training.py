"""DoRA and biases train as PEFT trains them: the same losses and the same θ, in float64 and in float32."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

import lora_fx
from lora_fx import Rule, load_adapter, save_adapter
from lora_fx.checks.verification import compare, move_weights, relative_error
from lora_fx.deltas import dora, kernels
from lora_fx.deltas.dropping import BranchDropout
from lora_fx.export.adapters.folder import TENSORS
from lora_fx.model.inventory import inventory
from tests.adapters import fresh, gpt2
from tests.dora import CONFIGS, IDS, NAMES, PREFIX, RULES, TWO, Layers, llama

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning")  # PEFT's


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
        lambda: gpt2(1),
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
