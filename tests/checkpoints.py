"""Checkpoints on disk, small ones, and adapters of them, as files."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import lora_fx
from lora_fx.errors import FileError, LoraFxError
from lora_fx.export.adapters.folder import CONFIG, TENSORS

IDS = {"input_ids": torch.arange(6)[None]}


def llama() -> nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        vocab_size=32, tie_word_embeddings=False,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def trained(model: nn.Module, seed: int = 1) -> None:
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)


def saved(model: nn.Module, folder: Path) -> Path:
    """In several shards, with an index and other files."""
    model.save_pretrained(folder, max_shard_size="12KB")
    (folder / "tokenizer.json").write_text('{"version": "1.0"}')
    (folder / "extra").mkdir()
    (folder / "extra" / "vocab.txt").write_text("a\nb\n")
    (folder / "extra" / "empty").touch()
    return folder


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for file in folder.glob("*.safetensors"):
        found |= load_file(file)
    return found


def contents(folder: Path) -> dict[str, bytes]:
    return {f.relative_to(folder).as_posix(): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}


def same(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> list[str]:
    """The names of tensors that differ."""
    return [name for name, tensor in found.items() if not torch.equal(tensor, wanted[name])]


def folder(at: Path, factors: dict[str, torch.Tensor], **config) -> Path:
    """An adapter's folder, written by hand; alpha / r is 4."""
    place = at / "adapter"
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    save_file({f"base_model.model.{key}": t.contiguous() for key, t in factors.items()}, place / TENSORS)
    said = {"peft_type": "LORA", "r": 2, "target_modules": None, **config}
    (place / CONFIG).write_text(json.dumps({"lora_alpha": 4 * said["r"], **said}))
    return place


def pair(path: str, out: int, inner: int, rank: int = 2) -> dict[str, torch.Tensor]:
    return {f"{path}.lora_A.weight": torch.randn(rank, inner), f"{path}.lora_B.weight": torch.randn(out, rank)}


def plain(at: Path, numbers: dict[str, torch.Tensor], **config) -> Path:
    """A base of one file."""
    place = at / "base"
    place.mkdir(parents=True)
    save_file(numbers, place / "model.safetensors")
    (place / "config.json").write_text(json.dumps({"tie_word_embeddings": False, **config}))
    return place


def refused(match: str, base: Path, adapter, out: Path, kind: type[LoraFxError] = FileError, **options) -> None:
    with pytest.raises(kind, match=match):
        lora_fx.fold_checkpoint(base, adapter, out, **options)
    assert not out.exists() or out.is_file() or [*out.iterdir()]
