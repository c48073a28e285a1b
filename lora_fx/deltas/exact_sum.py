"""The arithmetic of a fold: one weight, and the low-rank deltas that are added to it.

    W' = round(W + Σ s·B·A)

In row blocks of bounded memory; every element is the real sum rounded once to W's own dtype (`deltas.rounding`). The
way back is exact, bit for bit: it keeps what rounding took away, some tenths of a byte for each element, at most one
where the deltas are no larger than the weight.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import partial

import torch

from lora_fx.changes import Undo, safe_point
from lora_fx.deltas.low_rank import LowRank
from lora_fx.deltas.rounding import Remainder, Scratch, between, checksum, nearest, remember, round_once, same
from lora_fx.errors import FoldError
from lora_fx.graph.layout import Layout

_CHUNK = 2**15  # doubtful elements that are looked at together
_BLOCK = 2**19  # elements of a weight that are folded at a time: fewer calls of torch, and the caches still help


def folded_weight(weight: torch.Tensor, deltas: Sequence[LowRank], dtype: torch.dtype, name: str) -> torch.Tensor:
    """W + Σ s·B·A as a new tensor, rounded once to `dtype`, which may be narrower than W's own.

    Raises:
        FoldError: a number is not finite, or does not fit into the dtype.
    """
    whole = ExactSum.of(weight, deltas)
    folded = torch.empty(weight.shape, dtype=dtype, device=weight.device)
    if math.isfinite(whole.magnitude):
        scratch = _scratch(folded)
        for (start, stop), part in zip(_blocks(weight), whole.blocks(), strict=True):
            folded[start:stop] = part.rounded(part.total(scratch), scratch)
    if not math.isfinite(whole.magnitude) or not math.isfinite(_largest(folded)):
        raise FoldError(
            f"W + s·B·A is not finite in {dtype}",
            place=name,
            remedy="look for NaN and Inf in the weight and the factors; lower the scale, or take a wider dtype",
        )
    return folded


def check_foldable(weight: torch.Tensor, deltas: Sequence[LowRank], name: str, adapters: Sequence[str]) -> ExactSum:
    """The sum that is to be folded, refused before anything is written.

    Args:
        name: of the weight.
        adapters: the names of those that the deltas are of.

    Raises:
        FoldError: the weight is on meta, a number is not finite, or a sum does not fit into the dtype.
    """
    weight = weight.detach()
    if weight.is_meta:
        raise FoldError("the weight is on meta: it has no numbers", place=name, remedy="materialise the model first")
    whole = ExactSum.of(weight, deltas)
    if whole.magnitude <= torch.finfo(weight.dtype).max:
        return whole
    factors = [(f"{f} of adapter {a!r}", getattr(d, f)) for a, d in zip(adapters, deltas, strict=True) for f in "AB"]
    for what, numbers in (("the weight", weight), *factors):
        if not math.isfinite(_largest(numbers)):
            remedy = f"repair {what}, or load an earlier checkpoint"
            raise FoldError(f"{what} holds NaN or Inf", place=name, remedy=remedy)
    scratch = _scratch(weight)
    for part in whole.blocks():  # only the sums themselves can tell
        if not math.isfinite(_largest(round_once(part.total(scratch), weight.dtype))):
            remedy = "lower the scale, or fold the model in a wider dtype"
            raise FoldError(f"W + s·B·A does not fit into {weight.dtype}", place=name, remedy=remedy)
    return whole


@dataclass(frozen=True)
class Way:
    """The way from the folded weight back to the original one, block by block."""

    deltas: tuple[LowRank, ...]
    """As they were when they were folded."""
    magnitude: float
    remainders: tuple[Remainder, ...]
    folded: torch.Tensor
    """Checksum of the folded weight: it must still be what it was."""
    original: torch.Tensor
    """Checksum of the original weight: it must be what comes out."""

    @property
    def bytes(self) -> int:
        return sum(r.bytes for r in self.remainders)

    def starts_at(self, weight: torch.Tensor) -> torch.Tensor:
        """The folded weight is bitwise what the fold has made it; the answer is on its device."""
        return same(_checksum(weight), self.folded)

    def take_back(self, weight: torch.Tensor, undo: list[Undo]) -> torch.Tensor:
        """Write the weight that was; `undo` gets what folds each block again, for an unfold that is cut short.

        Returns:
            Whether it is the one that was, on its device.
        """
        whole, scratch = ExactSum(weight, tuple(map(_wide, self.deltas)), self.magnitude), _scratch(weight)
        for part, remainder in zip(whole.blocks(), self.remainders, strict=True):
            old = remainder.restore(part.guess(scratch))
            _write(part.weight, old, undo, partial(_fold_block, part), scratch)
        return same(_checksum(weight), self.original)


def kept(delta: LowRank) -> LowRank:
    """The delta as it is now, whatever becomes of its factors: of all output features."""
    delta = delta.detached()
    return replace(delta, A=delta.A.clone(), B=delta.whole.clone(), rows=None, index=None)


def scratches(weights: Sequence[torch.Tensor]) -> dict[tuple[torch.dtype, torch.device], Scratch]:
    """One for the weights of each dtype on each device."""
    sizes: dict[tuple[torch.dtype, torch.device], int] = {}
    for weight in weights:
        key, first = (weight.dtype, weight.device), slice(*next(_blocks(weight), (0, 0)))
        sizes[key] = max(sizes.get(key, 0), weight[first].numel())
    return {key: Scratch(elements, *key) for key, elements in sizes.items()}


def _scratch(weight: torch.Tensor) -> Scratch:
    return scratches([weight])[weight.dtype, weight.device]


def _write(block: torch.Tensor, new: torch.Tensor, undo: list[Undo], way_back: Undo, scratch: Scratch) -> None:
    """Into the weight. Cut short at whichever line, what stands on the list gives back the block that was."""
    undo.append(partial(block.copy_, scratch.narrow(scratch.BEFORE, block.shape).copy_(block)))
    block.copy_(new)
    undo[-1] = way_back


def _unfold_block(part: ExactSum, remainder: Remainder) -> None:
    """The way back of a fold that is cut short, maybe for want of memory: then in halves."""
    block = part.weight
    try:
        block.copy_(remainder.restore(part.guess(Scratch.of(block))))
        return
    except Exception:
        if len(block) < 4:
            raise
    middle, width = len(block) // 4 * 2, block[0].numel()
    for start, stop in (0, middle), (middle, len(block)):
        _unfold_block(part.rows(start, stop), remainder.part(start * width, stop * width))


def _fold_block(part: ExactSum, scratch: Scratch | None = None) -> None:
    """Keeping nothing. Where memory is short, in halves: some of the weight may have been folded before."""
    block = part.weight
    try:
        scratch = scratch or Scratch.of(block)
        block.copy_(part.rounded(part.total(scratch), scratch))
        return
    except Exception:
        if len(block) == 1:
            raise
    middle = len(block) // 2
    for start, stop in (0, middle), (middle, len(block)):
        _fold_block(part.rows(start, stop), scratch)


# ── the sum ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class ExactSum:
    """W + Σ s·B·A of a weight, or of some of its rows. What it computes is in the scratch that it is given."""

    weight: torch.Tensor
    deltas: tuple[LowRank, ...]
    """With float64 factors, of all output features."""
    magnitude: float
    """No element is larger, and no part of its sum."""
    kept: tuple[LowRank, ...] = ()
    """The deltas in their own dtype, for the way back."""

    @staticmethod
    def of(weight: torch.Tensor, deltas: Sequence[LowRank]) -> ExactSum:
        bounds = (abs(d.scale) * d.rank * _largest(d.A) * _largest(d.B) for d in deltas)
        return ExactSum(weight, tuple(map(_wide, deltas)), _largest(weight) + sum(bounds), tuple(deltas))

    def fold(self, scratch: Scratch, undo: list[Undo]) -> Way:
        """Write the folded weight; what comes is the way back.

        Args:
            undo: gets what undoes each block, for a fold that is cut short.
        """
        before, remainders = _checksum(self.weight), []
        for part in self.blocks():
            block = part.weight
            delta = part.delta(scratch)
            total = scratch.wide(scratch.TOTAL, block.shape).copy_(block).add_(delta)
            new = part.rounded(total, scratch)
            difference = total.copy_(new).sub_(delta)
            remainders.append(remember(block, difference, 2 * part.magnitude, 4 * part.steps, scratch))
            _write(block, new, undo, partial(_unfold_block, part, remainders[-1]), scratch)
        return Way(self.kept, self.magnitude, tuple(remainders), _checksum(self.weight), before)

    def fold_for_good(self, scratch: Scratch) -> None:
        """Write the folded weight, and keep nothing."""
        for part in self.blocks():
            _fold_block(part, scratch)

    @property
    def steps(self) -> float:
        """How far the sum, taken in float64 in any order, may be from the real number, as a share of its magnitude:
        each operation rounds by at most 2⁻⁵³ of what is there at most."""
        return sum(2 * delta.rank + 2 for delta in self.deltas) * 2.0**-53

    def rows(self, start: int, stop: int) -> ExactSum:
        """The indices start:stop of the weight's first axis."""
        deltas = tuple(_rows(delta, start, stop) for delta in self.deltas)
        return ExactSum(self.weight[start:stop], deltas, self.magnitude)

    def blocks(self) -> Iterator[ExactSum]:
        """Rows that are few enough to compute with, from the first to the last."""
        for start, stop in _blocks(self.weight):
            safe_point()
            yield self.rows(start, stop)

    def delta(self, scratch: Scratch) -> torch.Tensor:
        """Σ s·B·A in float64."""
        total = scratch.wide(scratch.DELTA, self.weight.shape).zero_()
        for delta in self.deltas:
            _add(delta, total, self.weight.dtype)
        return total

    def total(self, scratch: Scratch) -> torch.Tensor:
        """W + Σ s·B·A in float64."""
        total = scratch.wide(scratch.TOTAL, self.weight.shape).copy_(self.weight)
        if self.weight.dtype == torch.float64:  # as it is summed where the delta is needed, too
            return total.add_(self.delta(scratch))
        for delta in self.deltas:
            _add(delta, total, self.weight.dtype)
        return total

    def guess(self, scratch: Scratch) -> torch.Tensor:
        """Where the weight is W': W' − Σ s·B·A, the original one, give or take a few steps."""
        delta = self.delta(scratch)
        difference = scratch.wide(scratch.TOTAL, self.weight.shape).copy_(self.weight).sub_(delta)
        return scratch.narrow(scratch.ROUNDED, self.weight.shape).copy_(difference)

    def rounded(self, total: torch.Tensor, scratch: Scratch) -> torch.Tensor:
        """The real sums rounded to nearest-even in the dtype of `scratch`, in its `ROUNDED`.

        Beyond doubt is a sum of which both ends, `total` ± error, round to one number. The few others are looked at
        again with an error of their own; what is still open then is summed as fractions.

        Args:
            total: the sums in float64, contiguous.
        """
        rounded = scratch.narrow(scratch.ROUNDED, total.shape)
        if rounded.dtype == torch.float64:
            return rounded.copy_(total)
        flat, values = rounded.view(-1), total.view(-1)
        end = scratch.spare(total.shape)
        for places in between(total, self.magnitude, self.steps, end, rounded, scratch).split(_CHUNK):
            if len(places):  # an empty tensor is split into one chunk, too
                flat[places] = self._round_doubtful(values[places], places, rounded.dtype)
        return rounded

    def _round_doubtful(self, values: torch.Tensor, places: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        error = self.steps * self.magnitude
        low, high = round_once(torch.stack([values - error, values + error]), dtype)
        if torch.equal(low, high):
            return low
        own = self._errors(places)
        low, high = round_once(torch.stack([values - own, values + own]), dtype)
        open_ = low != high
        if bool(open_.any()):
            sums = self._exact(places[open_])
            low[open_] = torch.stack([nearest(x, a, b) for x, a, b in zip(sums, low[open_], high[open_], strict=True)])
        return low

    def _errors(self, places: torch.Tensor) -> torch.Tensor:
        """How far the float64 sums of single elements may be off."""
        sizes = self.weight.reshape(-1)[places].to(torch.float64).abs()
        for delta in self.deltas:
            A, B = _at(delta, places)
            sizes = sizes + (A.abs() * B.abs()).sum(-1) * abs(delta.scale)
        return self.steps * sizes

    def _exact(self, places: torch.Tensor) -> list[Fraction]:
        """The sums of single elements, as fractions."""
        sums = [Fraction(w) for w in self.weight.reshape(-1)[places].double().tolist()]
        for delta in self.deltas:
            scale = Fraction(delta.scale)
            for k, (a, b) in enumerate(zip(*(factor.tolist() for factor in _at(delta, places)), strict=True)):
                sums[k] += scale * sum(Fraction(x) * Fraction(y) for x, y in zip(a, b, strict=True))
        return sums


def _wide(delta: LowRank) -> LowRank:
    """With float64 factors of all output features, to compute with."""
    delta = delta.detached()
    return replace(delta, A=delta.A.to(torch.float64), B=delta.whole.to(torch.float64), rows=None, index=None)


def _rows(delta: LowRank, start: int, stop: int) -> LowRank:
    """The delta of the indices start:stop of the weight's first axis."""
    layout, A, B = delta.layout, delta.A, delta.B
    side = layout.sides[0]
    per_row = (layout.axes[0].size if side == "b" else layout.size(side)) // layout.shape[0]
    rows = slice(start * per_row, stop * per_row)
    if side == "o":
        B = B[..., rows, :]
    elif side == "i":
        A = A[..., :, rows]
    else:
        A, B = A[rows], B[rows]
    return replace(delta, layout=Layout(layout.sides, (stop - start, *layout.shape[1:])), A=A, B=B)


def _add(delta: LowRank, total: torch.Tensor, dtype: torch.dtype) -> None:
    """Add s·B·A to `total`, contiguous and float64, for a weight of this dtype.

    A float64 weight has no bits to spare: its sums are taken in one order, the same on every device and with any
    number of threads. For narrower ones a matmul may take them in any order, which `ExactSum.steps` bounds.
    """
    A, B, axes = delta.A, delta.B * delta.scale, delta.layout.axes
    if dtype == torch.float64:
        total += delta.layout.to_weight(_in_order(A, B))
        return
    sides = "".join(axis.side for axis in axes)
    if sides in ("oi", "io", "boi", "bio"):
        left, right = (B, A) if sides.endswith("oi") else (A.mT, B.mT)
        matrix = total.view([axis.size for axis in axes])
        matrix.baddbmm_(left, right) if matrix.ndim == 3 else matrix.addmm_(left, right)
    else:
        total += delta.layout.delta(A, B)


def _in_order(A: torch.Tensor, B: torch.Tensor) -> torch.Tensor:
    """B·A, each element summed from the first component to the last."""
    total = B[..., :, 0:1] * A[..., 0:1, :]
    product = torch.empty_like(total)
    for k in range(1, A.shape[-2]):
        total += torch.mul(B[..., :, k : k + 1], A[..., k : k + 1, :], out=product)
    return total


def _at(delta: LowRank, flat: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The column of A and the row of B that make each of these elements."""
    batch, out, inner = delta.layout.locate(flat)
    A = delta.A.reshape(-1, *delta.A.shape[-2:])[batch, :, inner]
    B = delta.B.reshape(-1, *delta.B.shape[-2:])[batch, out, :]
    return A, B


def _blocks(weight: torch.Tensor) -> Iterator[tuple[int, int]]:
    rows = weight.shape[0]
    step = max(1, _BLOCK // max(math.prod(weight.shape[1:]), 1))
    for start in range(0, rows, step):
        yield start, min(start + step, rows)


def _checksum(weight: torch.Tensor) -> torch.Tensor:
    found = torch.zeros((), dtype=torch.int64, device=weight.device)
    for start, stop in _blocks(weight):
        found += checksum(weight[start:stop])
    return found


def _largest(values: torch.Tensor) -> float:
    """The largest magnitude; NaN or Inf if one is there."""
    if not values.numel():
        return 0.0
    low, high = torch.stack(values.detach().aminmax()).tolist()
    return max(-low, high) if low == low else low
