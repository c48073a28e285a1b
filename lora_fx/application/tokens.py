"""Batches with the trained tokens of the kind `tokens`:   [prefix] prompt [infix] rest   (Hu et al., section 5.1)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from lora_fx.errors import LoraFxError

_IGNORED = -100
"""What losses of torch and transformers leave out of a label."""


def with_tokens(
    inputs: Any,
    prefix: int = 0,
    infix: int = 0,
    *,
    vocabulary: int,
    at: int | Sequence[int] | None = None,
    longest: int | None = None,
) -> Any:
    """Put the tokens of ``Rule(kind="tokens", settings={"prefix": prefix, "infix": infix})`` into a batch.

    Their ids are those behind the last one of the table: the prefix has ``vocabulary``, ``vocabulary + 1``, … and
    stands before each row, the infix has the next ones and stands behind the prompt.

    Args:
        inputs: ids (batch, length), or a mapping with such ``input_ids`` and what goes with them: ``attention_mask``
            (gets ones), ``labels`` (-100, which no loss counts), ``position_ids`` (count on from the row's first one)
            and ``token_type_ids`` (as the neighbour's), each (batch, length). All else must not be of that shape.
        prefix, infix: how many of them.
        vocabulary: how many rows the table has: ``model.get_input_embeddings().num_embeddings``.
        at: how long the prompt is, one number or one a row, what is padded on the left counted. None: up to the first
            label that is not -100, or up to the last token that is not masked.
        longest: refuse what would be longer than the positions of the model.

    Returns:
        The same kind of thing, new: (batch, prefix + length + infix). The inputs stay what they are.

    Raises:
        LoraFxError: a tensor has another shape than the ids or is not known, an id is none of the table's, or the rows
            come out too long.
    """
    for name, count in (("prefix", prefix), ("infix", infix), ("vocabulary", vocabulary)):
        if isinstance(count, bool) or not isinstance(count, int) or count < 0:
            raise _error(f"{name}={count!r} is no number of tokens", name, "give an integer, 0 or more")
    given = dict(inputs) if isinstance(inputs, Mapping) else {"input_ids": inputs}
    ids = given.get("input_ids")
    known = isinstance(ids, torch.Tensor) and ids.dtype in (torch.int64, torch.int32)
    if not isinstance(ids, torch.Tensor) or not known or ids.ndim != 2 or not ids.numel():
        raise _error("there are no ids of shape (batch, length)", "input_ids", "pass token ids, not their embeddings")
    batch, length = ids.shape
    if not 0 <= int(ids.min()) <= int(ids.max()) < vocabulary:
        wrong = next(int(i) for i in ids.flatten().tolist() if not 0 <= i < vocabulary)
        remedy = "put tokens into a batch that has none yet"
        raise _error(f"the id {wrong} is none of {vocabulary}", "input_ids", remedy)
    if longest is not None and prefix + length + infix > longest:
        reason = f"{prefix} + {length} + {infix} tokens are more than the {longest} positions of the model"
        raise _error(reason, "input_ids", "take fewer tokens, or shorter rows")
    own = {name: tensor for name, tensor in given.items() if name in _NEW and tensor is not None}
    _refuse_others(given, own, ids)
    row = _Row(prefix, infix, vocabulary, _ends(own, at, batch, length))
    made = {name: row.with_new(row.old(name, tensor), _NEW[name](row, tensor)) for name, tensor in own.items()}
    return {**given, **made} if isinstance(inputs, Mapping) else made["input_ids"]


@dataclass(frozen=True)
class _Row:
    """Where the new tokens are: the prefix first, the infix behind `ends` tokens of the row's own."""

    prefix: int
    infix: int
    vocabulary: int
    ends: torch.Tensor

    def with_new(self, tensor: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        """(batch, prefix + length + infix): a row of (batch, length), with its (prefix + infix) new elements."""
        where = self.ends.to(tensor.device).unsqueeze(1)
        old = torch.arange(tensor.shape[1], device=tensor.device).expand_as(tensor)
        old = self.prefix + old + self.infix * (old >= where)
        fresh = torch.arange(self.prefix + self.infix, device=tensor.device).expand(len(tensor), -1)
        fresh = fresh + where * (fresh >= self.prefix)
        out = tensor.new_zeros(len(tensor), self.prefix + tensor.shape[1] + self.infix)
        return out.scatter_(1, old, tensor).scatter_(1, fresh, new.to(tensor))

    def all(self, value: int, tensor: torch.Tensor) -> torch.Tensor:
        return torch.full((len(tensor), self.prefix + self.infix), value)

    def ids(self, tensor: torch.Tensor) -> torch.Tensor:
        return torch.arange(self.vocabulary, self.vocabulary + self.prefix + self.infix).expand(len(tensor), -1)

    def old(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """What is there already; positions move up behind the new ones."""
        if name != "position_ids":
            return tensor
        behind = torch.arange(tensor.shape[1]) >= self.ends.unsqueeze(1)
        return tensor + (self.prefix + self.infix * behind).to(tensor)

    def positions(self, tensor: torch.Tensor) -> torch.Tensor:
        """The prefix's from the least of the row on, the infix's from that of the token before it."""
        least = tensor.cpu().amin(1, keepdim=True)
        before = torch.where(self.ends.unsqueeze(1) > 0, self._before(tensor), least - 1)
        infix = before + self.prefix + 1 + torch.arange(self.infix)
        return torch.cat([least + torch.arange(self.prefix), infix], 1)

    def types(self, tensor: torch.Tensor) -> torch.Tensor:
        """The first token's, and that of the token before the infix."""
        first, before = tensor.cpu()[:, :1], self._before(tensor)
        return torch.cat([first.expand(-1, self.prefix), before.expand(-1, self.infix)], 1)

    def _before(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.cpu().gather(1, (self.ends - 1).clamp(min=0).unsqueeze(1))


#: what a batch may have for each of its tokens → what the new ones get
_NEW: Mapping[str, Callable[[_Row, torch.Tensor], torch.Tensor]] = {
    "input_ids": _Row.ids,
    "attention_mask": lambda row, tensor: row.all(1, tensor),
    "labels": lambda row, tensor: row.all(_IGNORED, tensor),
    "position_ids": _Row.positions,
    "token_type_ids": _Row.types,
}


def _refuse_others(given: Mapping[str, Any], own: Mapping[str, Any], ids: torch.Tensor) -> None:
    for name, tensor in given.items():
        if not isinstance(tensor, torch.Tensor):
            continue
        if name in own and tensor.shape != ids.shape:
            reason = f"its shape is {tuple(tensor.shape)}, and that of input_ids {tuple(ids.shape)}"
            raise _error(reason, name, "leave it out, and add it to what comes back")
        if name not in own and tensor.shape[:2] == ids.shape:
            reason = f"it has something for each token, {tuple(tensor.shape)}, and nobody knows what for new ones"
            raise _error(reason, name, f"leave it out, and add it to what comes back; known are {', '.join(_NEW)}")


def _ends(own: Mapping[str, torch.Tensor], at: Any, batch: int, length: int) -> torch.Tensor:
    """How many of each row's tokens stand before the infix."""
    if at is not None:
        places = [at] * batch if isinstance(at, int) else list(at)
        if len(places) != batch or not all(isinstance(end, int) and 0 <= end <= length for end in places):
            reason = f"at={at!r} is no place in {batch} rows of {length} tokens"
            raise _error(reason, "at", "give one number for all rows, or one for each")
        return torch.tensor(places, dtype=torch.int64)
    counted = torch.arange(length)
    ends = torch.full((batch,), length)
    if "attention_mask" in own:
        ends = torch.where(own["attention_mask"].cpu() != 0, counted + 1, 0).amax(-1)
    if "labels" in own:
        first = torch.where(own["labels"].cpu() != _IGNORED, counted, length).amin(-1)
        ends = torch.where(first < length, first, ends)
    return ends


def _error(reason: str, place: str, remedy: str) -> LoraFxError:
    return LoraFxError(reason, place=place, remedy=remedy)
