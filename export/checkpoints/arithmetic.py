"""What a fold does to one tensor of a checkpoint, in pieces that are few enough rows to hold.

    W' = round(W + Σ δ)        and back, from W' and what rounding took away

This is the seam to the fold of models: `ExactSum` and `Way` for what is of low rank, `rounded_sum` for every other
kind. A piece gives the same bits as the whole weight would: each element is the real sum, rounded once.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from lora_fx.deltas.adapter import Adapter
from lora_fx.deltas.exact_sum import ExactSum, Way, fits, scratch_of
from lora_fx.deltas.low_rank import LowRank
from lora_fx.deltas.remainder import Remainder
from lora_fx.deltas.rounded_sum import rounded_sum
from lora_fx.deltas.rounding import Scratch
from lora_fx.export.checkpoints.checkpoint import FLOATS, Stored
from lora_fx.export.checkpoints.entries import Share
from lora_fx.graph.layout import Layout

BLOCK = 16 * 2**20
"""Bytes of a checkpoint that are read, folded and written at a time; a single row may be larger."""


class Arithmetic(threading.local):
    """Folds and unfolds pieces one after the other, in one scratch for each thread."""

    def __init__(self) -> None:
        self._scratch: Scratch | None = None

    def _room(self, block: torch.Tensor) -> Scratch:
        """The scratch of the block before, where it is for blocks of this size: what is kept depends on that alone."""
        if self._scratch is None or not fits(self._scratch, block):
            self._scratch = None  # it goes before the next one comes
            self._scratch = scratch_of(block)
        return self._scratch

    def fold(self, piece: Piece, data: torch.Tensor, keep: bool) -> bytes | None:
        """Write the sum into the bytes of the piece; with `keep`, what comes is the way back.

        Raises:
            FoldError: a number is not finite, or does not fit into the dtype.
        """
        block = piece.block(data)
        if piece.deltas is None:
            before = block.clone() if keep else None
            block.copy_(piece.summed(block))
            return None if before is None else _packed({"original": before}, {})
        names = [share.adapter.name for share in piece.shares]
        plain = ExactSum.of(block, piece.sliced(), piece.stored.name, names)
        assert plain.unread is not None
        whole = plain.checked(plain.unread.tolist(), None)
        if not keep:
            whole.fold_for_good(self._room(block), ())
            return None
        return _written(whole.fold(self._room(block), [], ()))

    def unfold(self, piece: Piece, data: torch.Tensor, record: bytes) -> None:
        """Write what was there before."""
        from safetensors.torch import load

        block, tensors = piece.block(data), load(record)
        if piece.deltas is None:
            block.copy_(tensors["original"])
            return
        way = _read(tensors, tuple(piece.sliced()))
        way.take_back(block, [])


@dataclass(frozen=True)
class Piece:
    """Some of a tensor's rows, which lie side by side in its file, with what is added to them."""

    stored: Stored
    shares: tuple[Share, ...]
    start: int
    """Its first byte in the file."""
    stop: int
    shape: tuple[int, ...]
    deltas: tuple[LowRank, ...] | None
    """Of the matrix that the rows are of, in float64; None for other kinds."""
    rows: tuple[int, int]
    """Of that matrix, or of the whole tensor."""

    def block(self, data: torch.Tensor) -> torch.Tensor:
        """Its bytes as numbers."""
        return data.view(FLOATS[self.stored.dtype]).view(self.shape)

    def sliced(self) -> list[LowRank]:
        """The deltas of its rows."""
        assert self.deltas is not None
        found: list[LowRank] = []
        for delta in self.deltas:
            whole = ExactSum(torch.empty(delta.layout.shape, device="meta"), (delta,), 0.0)
            found += whole.rows(*self.rows).deltas
        return found

    def summed(self, block: torch.Tensor) -> torch.Tensor:
        """W + Σ δ, rounded once."""
        adapters = [_rows_of(share.adapter, *self.rows) for share in self.shares]
        return rounded_sum(block, [own for own in adapters if own is not None], block.dtype, self.stored.name)


def pieces(stored: Stored, shares: Sequence[Share]) -> Iterator[Piece]:
    """A tensor from its first byte to its last. Of experts each is a matrix of its own."""
    own = tuple(shares)
    if all(share.adapter.kind.low_rank for share in own):
        yield from _low_rank(stored, own)
        return
    apart = all(s.adapter.kind.by_feature and s.adapter.layout.sides[0] == "o" for s in own)
    apart = apart and stored.dtype != "F64"  # which is not rounded: sums of other sizes have other last bits
    apart = apart and all(s.adapter.layout.sides.count("o") == 1 for s in own)
    if not apart:
        yield _piece(stored, own, None, (0, stored.shape[0]), stored.start, stored.shape)
        return
    for first, last in _runs(stored, own):
        for start, stop in _ranges(last - first, max(1, BLOCK // _width(stored))):
            yield _piece(stored, own, None, (first + start, first + stop), stored.start, stored.shape)


def _runs(stored: Stored, shares: Sequence[Share]) -> Iterator[tuple[int, int]]:
    """The rows that become others: all, or those that lie side by side of the few that adapters are of."""
    if any(share.adapter.rows is None for share in shares):
        yield 0, stored.shape[0]
        return
    rows = sorted({row for share in shares for row in share.adapter.rows or ()})
    for _, run in itertools.groupby(enumerate(rows), key=lambda at: at[1] - at[0]):
        inside = [row for _, row in run]
        yield inside[0], inside[-1] + 1


def _low_rank(stored: Stored, shares: tuple[Share, ...]) -> Iterator[Piece]:
    deltas = tuple(_delta(share) for share in shares)
    if deltas[0].layout.sides[0] != "b" or len(stored.shape) < 3:
        for rows in _ranges(stored.shape[0], max(1, BLOCK // _width(stored))):
            yield _piece(stored, shares, deltas, rows, stored.start, stored.shape)
        return
    size = (stored.stop - stored.start) // stored.shape[0]
    for n in range(stored.shape[0]):
        expert = replace(
            stored, start=stored.start + n * size, stop=stored.start + (n + 1) * size, shape=stored.shape[1:]
        )
        own = tuple(delta.picked(torch.tensor(n)) for delta in deltas)
        for rows in _ranges(expert.shape[0], max(1, BLOCK // _width(expert))):
            yield _piece(expert, shares, own, rows, expert.start, expert.shape)


def _delta(share: Share) -> LowRank:
    """In float64, of all output features."""
    plain = share.adapter.exact().detached()
    A, B = plain.A.to(torch.float64), plain.whole.to(torch.float64)
    return replace(plain, A=A, B=B, rows=None, index=None)


def _piece(
    stored: Stored,
    shares: tuple[Share, ...],
    deltas: tuple[LowRank, ...] | None,
    rows: tuple[int, int],
    first: int,
    shape: tuple[int, ...],
) -> Piece:
    start, stop = rows
    width = (stored.stop - stored.start) // shape[0]
    at = first + start * width
    return Piece(stored, shares, at, first + stop * width, (stop - start, *shape[1:]), deltas, rows)


def _width(stored: Stored) -> int:
    """Bytes of a row."""
    return max(1, (stored.stop - stored.start) // max(stored.shape[0], 1))


def _ranges(count: int, step: int) -> Iterator[tuple[int, int]]:
    for start in range(0, count, step):
        yield start, min(start + step, count)


def _rows_of(adapter: Adapter, start: int, stop: int) -> Adapter | None:
    """The adapter of some output features, of a kind that is `by_feature`; the adapter itself for all of them, and None
    where it is of others."""
    layout = adapter.layout
    if (start, stop) == (0, layout.shape[0]):
        return adapter
    own = range(layout.shape[0]) if adapter.rows is None else adapter.rows
    inside = [k for k, row in enumerate(own) if start <= row < stop]
    if not inside:
        return None
    few = Layout(layout.sides, (stop - start, *layout.shape[1:]))
    rows = None if adapter.rows is None else tuple(adapter.rows[k] - start for k in inside)
    settings = {key: value for key, value in adapter.settings.items() if key in adapter.kind.settings}
    part = Adapter(few, kind=adapter.kind, rows=rows, name=adapter.name, dtype=adapter.dtype, **settings)
    part.adjust(adapter.strength)
    for name, value in adapter.named_parameters():
        wanted = part.get_parameter(name).shape
        for axis, size in enumerate(wanted):
            if size != value.shape[axis]:
                value = nn.Parameter(value.narrow(axis, inside[0], size), requires_grad=False)
        part._parameters[name] = nn.Parameter(value.detach(), requires_grad=False)
    return part


# ── the way back, as bytes ───────────────────────────────────────────────────────────────────────────────────────────


def _written(way: Way) -> bytes:
    tensors: dict[str, torch.Tensor] = {}
    for k, remainder in enumerate(way.remainders):
        parts = {"nibbles": remainder.nibbles, "places": remainder.places, "numbers": remainder.numbers}
        tensors |= {f"{k}.{name}": part for name, part in parts.items() if part is not None}
    tensors |= {"folded": way.folded.reshape(1), "original": way.original.reshape(1)}
    tensors["magnitude"] = torch.tensor([way.magnitude], dtype=torch.float64)
    tensors["elements"] = torch.tensor([way.elements])
    return _packed(tensors, {})


def _packed(tensors: Mapping[str, torch.Tensor], said: Mapping[str, str]) -> bytes:
    from safetensors.torch import save

    return save({name: t.contiguous() for name, t in tensors.items()}, dict(said) or None)


def _read(tensors: Mapping[str, torch.Tensor], deltas: tuple[LowRank, ...]) -> Way:
    count = len({name.partition(".")[0] for name in tensors if "." in name})
    remainders = tuple(
        Remainder(tensors.get(f"{k}.nibbles"), tensors.get(f"{k}.places"), tensors[f"{k}.numbers"])
        for k in range(count)
    )
    magnitude, elements = float(tensors["magnitude"]), int(tensors["elements"])
    return Way(deltas, magnitude, elements, remainders, tensors["folded"].reshape(()), tensors["original"].reshape(()))
