"""What stands beside the factors in a file of PEFT's, and means a tensor of the base.

| in the file | what it is |
|---|---|
| a tensor under `modules_to_save`, a bias under `bias` | `full`: the tensor as it was trained |
| `<path>.lora_B.bias` under `lora_bias` | `bias`: s·(the bias of B), added to the bias of the layer |
| `….trainable_tokens_delta` | `full` on rows of the embedding, which a tied head reads too |
| a base weight | nothing; where the vocabulary was resized, `full` on its last rows |

`lora_fx.export.adapters.beside` reads the same with the model at hand.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from lora_fx.deltas.adapter import Adapter
from lora_fx.export.adapters import peft as peft_format
from lora_fx.export.adapters.beside import RESIZED, TOKENS, more_rows, shift, shift_key
from lora_fx.export.adapters.folder import Folder
from lora_fx.export.adapters.peft import ITS_BASE, PREFIX, Layer
from lora_fx.export.checkpoints.checkpoint import FLOATS, Checkpoint, Stored
from lora_fx.export.checkpoints.shares import (
    Share,
    adapter_of,
    config_said,
    is_vocabulary,
    plain_name,
    refuse_tied,
    refuse_two,
)
from lora_fx.graph.layout import Layout
from lora_fx.reading import refuse

FACTOR = re.compile(r".+\.(lora_embedding_[AB]|lora_[AB](\.weight)?|lora_E|lora_magnitude_vector|ranknum)")


class Ties:
    """What a file holds twice for an embedding and a head that are tied, by the checkpoint's config."""

    def __init__(self, folder: Folder, checkpoint: Checkpoint, paths: Sequence[str]) -> None:
        self.folder = folder
        self.heads: dict[str, str] = {}
        """Path of an embedding → that of a head with the same factors, which the checkpoint does not hold."""
        self.again: set[str] = set()
        """Keys that say once more what another says."""
        if config_said(checkpoint, "tie_word_embeddings") is not True:
            return
        lost = [path for path in paths if not is_held(f"{path}.weight", checkpoint)]
        for head in lost:
            for path in paths:
                if path not in lost and self._same_factors(path, head):
                    self.heads[path] = head
                    self.again |= {f"{PREFIX}{head}.lora_{factor}.weight" for factor in "AB"}
        plain = {key: plain_name(key.removeprefix(PREFIX)) for key in folder.tensors if not FACTOR.fullmatch(key)}
        for key, own in plain.items():
            if not is_held(own, checkpoint):
                same = [other for other, name in plain.items() if is_held(name, checkpoint) and self._equal(key, other)]
                self.again |= {key} if same and (key.endswith(TOKENS) or self._is_tied(key)) else set()

    def names(self, path: str) -> list[str]:
        return [f"{self.heads[path]}.weight"] if path in self.heads else []

    def _is_tied(self, key: str) -> bool:
        """PEFT keeps the two one: it says so of what it saves whole, and a base weight is what it was."""
        return peft_format.ties_under(self.folder) == "modules_to_save" or not is_saved_whole(self.folder, key)

    def _equal(self, key: str, other: str) -> bool:
        one, two = self.folder.tensors[key], self.folder.tensors[other]
        return key.endswith(TOKENS) == other.endswith(TOKENS) and one.ndim == 2 and torch.equal(one, two)

    def _same_factors(self, path: str, head: str) -> bool:
        for one, two in (("lora_embedding_B", "lora_A.weight"), ("lora_embedding_A", "lora_B.weight")):
            table, matrix = (self.folder.tensors.get(f"{PREFIX}{at}") for at in (f"{path}.{one}", f"{head}.{two}"))
            if table is None or matrix is None or not torch.equal(table.T, matrix):
                return False
        alpha = peft_format.alphas(self.folder, [path, head])
        return bool(alpha[path] == alpha[head])


def is_held(name: str, checkpoint: Checkpoint) -> bool:
    """Under this name, or one with a prefix more or less."""
    have = checkpoint.tensors.keys() | checkpoint.aliases.keys()
    return name in have or any(own.endswith(f".{name}") or name.endswith(f".{own}") for own in have)


def shift_of(
    folder: Folder, layer: Layer, tensor: str, made: Sequence[Adapter], checkpoint: Checkpoint, name: str
) -> Iterator[Share]:
    """Of `lora_bias`: what the layer's branch adds to its bias."""
    own = f"{tensor.removesuffix('weight')}bias"
    if own not in checkpoint.tensors:
        reason = f"lora_bias: the branch has a bias, and the checkpoint has no {own} for it to be added to"
        remedy = "save the base with a bias of zeros there, if its class knows one (attention_bias), and fold into that"
        refuse(folder.tensor(shift_key(layer)), reason, remedy)
    saved = shift(folder, layer, checkpoint.tensors[own].shape, made[0].scale)
    yield Share(own, adapter_of(saved.layout, "bias", saved.theta, name, {}, role="branch"))


def is_saved_whole(folder: Folder, key: str) -> bool:
    words = key.removeprefix(PREFIX).split(".")[:-1]
    above = [".".join(words[: n + 1]) for n in range(len(words))]
    return any(path[n:] in folder.saved_whole for path in above for n in range(len(path)))


def base_tensor(
    folder: Folder, key: str, tensor: str, checkpoint: Checkpoint, name: str, rows: Rows
) -> Iterator[Share]:
    """A tensor of the base in the adapter's file: trained beside it, or the base's own."""
    stored, value, place = checkpoint.tensors[tensor], folder.tensors[key], folder.tensor(key)
    if stored.shape != tuple(value.shape):
        reason = f"its shape is {tuple(value.shape)}, and that of {tensor} is {stored.shape}"
        refuse(place, reason, f"{ITS_BASE}, with the vocabulary that it was trained with")
    if is_saved_whole(folder, key) or (folder.config.get("bias", "none") != "none" and key.endswith(".bias")):
        layout = Layout("o" + "i" * (len(stored.shape) - 1), stored.shape)
        if peft_format.ties_under(folder) == "modules_to_save" and is_vocabulary(stored, checkpoint, "embed" in tensor):
            refuse_two(stored, checkpoint, place)
        else:
            refuse_tied(stored, [tensor], checkpoint, "embed" in tensor, place)
        yield Share(tensor, adapter_of(layout, "full", {"weight": value.reshape(stored.shape[0], -1)}, name, {}))
    else:
        yield from rows.more(key, tensor)


@dataclass(frozen=True)
class Rows:
    """Rows of tables: those that were trained, and those that a resized vocabulary has more."""

    folder: Folder
    checkpoint: Checkpoint
    name: str
    resized: Mapping[str, Sequence[int]] | None

    def trained(self, key: str, tensor: str) -> Iterator[Share]:
        stored, value, place = self.checkpoint.tensors[tensor], self.folder.tensors[key], self.folder.tensor(key)
        rows = self._of(key)
        if len(set(rows)) != len(rows) or not all(isinstance(r, int) and 0 <= r < stored.shape[0] for r in rows):
            reason = f"its rows {rows[:20]} are no rows of {tensor}, which has {stored.shape[0]}, each once"
            remedy = f"{ITS_BASE}, with the vocabulary that it was trained with (resize_token_embeddings, then save it)"
            refuse(self.folder.option("trainable_token_indices"), reason, remedy)
        if tuple(value.shape) != (len(rows), *stored.shape[1:]) or len(stored.shape) != 2:
            reason = f"its shape is {tuple(value.shape)}, for {len(rows)} rows of {tensor} {stored.shape}"
            refuse(place, reason, ITS_BASE)
        order = sorted(range(len(rows)), key=rows.__getitem__)
        yield self._share(tensor, sorted(rows), value[order], place, "tokens")

    def more(self, key: str, tensor: str) -> Iterator[Share]:
        """A base weight in the file: the checkpoint's, but for the last rows where the vocabulary was resized."""
        stored, value, place = self.checkpoint.tensors[tensor], self.folder.tensors[key], self.folder.tensor(key)
        if self.resized is not None:
            rows = [*self.resized.get(tensor, ())]
        else:
            found = self._more(key, stored, value)
            if found is None or (found and self.folder.config.get("use_dora")):
                refuse(place, "the file carries a base weight, and the checkpoint's is another", ITS_BASE)
            rows = found
        if rows:
            yield self._share(tensor, rows, value[rows], place, RESIZED)

    def _more(self, key: str, stored: Stored, value: torch.Tensor) -> list[int] | None:
        if stored.dtype not in FLOATS:
            return None
        here = self.checkpoint.read(stored.name).to(value.dtype)
        if torch.equal(here, value):
            return []
        if len(stored.shape) != 2 or not is_vocabulary(stored, self.checkpoint, False):
            return None
        trained = f"{PREFIX}{plain_name(key.removeprefix(PREFIX)).removesuffix('weight')}{TOKENS}"
        own = self._of(trained) if trained in self.folder.tensors else []
        return more_rows((here != value).any(dim=1), {*own})

    def _of(self, key: str) -> list[int]:
        """The rows that the config names for a table."""
        said, place = self.folder.config.get("trainable_token_indices"), self.folder.option("trainable_token_indices")
        if isinstance(said, dict):
            path = key.removesuffix(f".{TOKENS}")
            said = next((rows for end, rows in said.items() if path.endswith(end)), None)
        if not isinstance(said, list):
            refuse(place, f"it names no rows for {key}", "restore both files of one save")
        return said

    def _share(self, tensor: str, rows: Sequence[int], value: torch.Tensor, place: str, part: str) -> Share:
        stored = self.checkpoint.tensors[tensor]
        if is_vocabulary(stored, self.checkpoint, True):
            refuse_two(stored, self.checkpoint, place)
        layout = Layout("oi", stored.shape)
        return Share(tensor, adapter_of(layout, "full", {"weight": value}, self.name, {}, tuple(rows), role=part))
