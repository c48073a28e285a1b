"""What the tests of DoRA's files share: every layer for which PEFT has it, rules, configs, what a refusal leaves."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

from lora_fx import Rule
from lora_fx.export.adapters.folder import read_folder, write_folder
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


def llama() -> nn.Module:
    """With biases, and with norms that have none: there PEFT's bias="all" means those of the linears."""
    size = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=4, vocab_size=17)
    size |= dict(num_key_value_heads=2, initializer_range=0.2)
    model = LlamaForCausalLM(LlamaConfig(**size, attention_bias=True, mlp_bias=True))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter, std=0.3)
    return model


move = reference.scattered


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


def rewrite(path: Path, change: Callable[[Any], Any]) -> None:
    """With our header, changed by somebody who knows how its digest is made."""
    folder = read_folder(path)
    change(folder)
    write_folder(path, folder.config, folder.tensors, folder.header)
