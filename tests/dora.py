"""What the tests of DoRA's files share: every layer for which PEFT has it, rules, configs, what a refusal leaves."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

import lora_fx
from lora_fx import Rule
from lora_fx.checks.verification import scatter
from lora_fx.errors import FileError
from lora_fx.export.adapters.folder import CONFIG, TENSORS, read_folder, write_folder
from lora_fx.model.inventory import inventory
from tests import reference

IDS = torch.tensor([[1, 2, 3, 10], [4, 0, 5, 6]])
PREFIX = "base_model.model."


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

CONFIGS = {name: dict(target_modules=[name]) for name in NAMES} | {
    "together": dict(target_modules=list(NAMES)),
    "all linears": dict(target_modules="all-linear", use_rslora=True),
    "patterns": dict(
        target_modules=list(NAMES), rank_pattern={"^plain": 3, "conv.": 1}, alpha_pattern={"conv1": 5, "embed": 0.5},
        use_rslora=True,
    ),
    "dropped": dict(target_modules=list(NAMES), lora_dropout=0.25),
}  # fmt: skip


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


def strip(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any] = lambda tensors: None) -> None:
    """Change the tensors as PEFT would write them, without our header."""
    tensors = load_file(folder / TENSORS)
    change(tensors)
    save_file(tensors, folder / TENSORS)


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


def rewrite(path: Path, change: Callable[[Any], Any]) -> None:
    """With our header, changed by somebody who knows how its digest is made."""
    folder = read_folder(path)
    change(folder)
    write_folder(path, folder.config, folder.tensors, folder.header)
