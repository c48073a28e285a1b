"""What an adapter adds to one tensor of a checkpoint, and whether another use may read that tensor.

An embedding and a head may be one weight. Which, only the model knows; that they are, its config says, and then the
checkpoint holds one of them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lora_fx.deltas.adapter import Adapter
from lora_fx.errors import few
from lora_fx.export.adapters.beside import TOKENS
from lora_fx.export.adapters.peft import ITS_BASE
from lora_fx.export.checkpoints.checkpoint import Checkpoint, Stored
from lora_fx.graph.layout import Layout
from lora_fx.reading import refuse

IN_THE_MODEL = "load it into its model (lora_fx.load_adapter), fold there, and save the model"


@dataclass(frozen=True)
class Share:
    """What one adapter adds to one tensor of a checkpoint: strength · δ."""

    tensor: str
    adapter: Adapter


def adapter_of(
    layout: Layout,
    kind: str,
    theta: Mapping[str, torch.Tensor],
    name: str,
    settings: Mapping[str, Any],
    rows: tuple[int, ...] | None = None,
    role: str = "",
) -> Adapter:
    first = next(iter(theta.values()))
    adapter = Adapter(layout, kind=kind, rows=rows, name=name, role=role, dtype=first.dtype, **settings)
    for tensor, value in theta.items():
        was = adapter.get_parameter(tensor)
        assert was.shape == value.shape, f"{tensor} has the shape {tuple(value.shape)}, and not {tuple(was.shape)}"
        adapter._parameters[tensor] = nn.Parameter(value, requires_grad=False)
    return adapter


def plain_name(key: str) -> str:
    """Of a base tensor in an adapter's file, as PEFT writes it; of an embedding, rows of which it has."""
    key = f"{key.removesuffix(TOKENS)}weight" if key.endswith(f".{TOKENS}") else key
    return re.sub(
        r"\.(token_adapter\.base_layer|base_layer|original_module|modules_to_save(\.default)?)(?=\.)", "", key
    )


# ── ties ─


def refuse_tied(stored: Stored, names: Sequence[str], checkpoint: Checkpoint, embedding: bool, place: str) -> None:
    """An embedding and a head may be one weight, of which PEFT adapts one use: the file has to know both."""
    tied = config_said(checkpoint, "tie_word_embeddings")
    vocabulary = is_vocabulary(stored, checkpoint, embedding)
    every = [stored.name, *(alias for alias, kept in checkpoint.aliases.items() if kept == stored.name)]
    twice = [name for name in every if name not in names] if len(every) > 1 else []
    if twice or (vocabulary and tied is not False and len(names) < 2):
        said = f"it also stands as {few(twice, 3)}" if twice else "its config does not say tie_word_embeddings: false"
        reason = f"{stored.name} may be read by two modules, and the adapter is for one: {said}"
        refuse(place, reason, IN_THE_MODEL)
    if apart := [name for name in names if name in checkpoint.tensors and name != stored.name]:
        reason = f"the adapter is for one weight, which is stored as {stored.name} and as {few(apart, 3)}"
        refuse(place, reason, ITS_BASE)


def is_vocabulary(stored: Stored, checkpoint: Checkpoint, embedding: bool) -> bool:
    rows = config_said(checkpoint, "vocab_size")
    return stored.shape[0] == rows if isinstance(rows, int) else embedding


def config_said(checkpoint: Checkpoint, option: str) -> Any:
    """What config.json says of the whole model, or of its text model."""
    text = checkpoint.config.get("text_config")
    return checkpoint.config.get(option, text.get(option) if isinstance(text, dict) else None)


def refuse_two(stored: Stored, checkpoint: Checkpoint, place: str) -> None:
    """What is trained of an embedding, and of a head that is tied to it: there has to be one tensor for the two."""
    alike = [t.name for t in checkpoint.tensors.values() if t.name != stored.name and t.shape == stored.shape]
    tied = config_said(checkpoint, "tie_word_embeddings")
    if tied is None:
        reason = f"{stored.name} may be tied to a head, and its config does not say tie_word_embeddings"
        refuse(place, reason, "say so in the checkpoint's config.json: true or false")
    if tied and alike:
        reason = f"{stored.name} and {few(alike, 3)} are stored as two, and the config says that they are one"
        refuse(place, reason, "save the base once more with transformers, which stores one of them")
