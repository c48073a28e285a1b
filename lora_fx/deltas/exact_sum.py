"""The arithmetic of a fold: one weight, and the low-rank deltas that are added to it.

    W' = round(W + Σ s·B·A)

In row blocks of bounded memory; every element is the real sum rounded once to W's own dtype (`deltas.rounding`). The
way back is exact, bit for bit: it keeps what rounding took away, some tenths of a byte for each element, at most one
where the deltas are no larger than the weight (`deltas.remainder`). What a block has to know that only its device knows
is asked for as it is needed; or else it has been found out before, for all blocks at once (`deltas.ahead`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import partial

import torch

from lora_fx.changes import Undo, safe_point
from lora_fx.deltas.low_rank import LowRank
from lora_fx.deltas.remainder import Remainder, Steps
from lora_fx.deltas.rounding import (
    INTEGERS,
    Scratch,
    between,
    checksum,
    first_places,
    nearest,
    places_of,
    round_once,
    same,
)
from lora_fx.errors import FoldError
from lora_fx.graph.layout import Layout

_CHUNK = 2**15  # doubtful elements that are looked at together
_BLOCK = 2**21  # elements of a weight that are folded at a time on a CPU: what is in doubt is settled once for each
_TILE = 2**18  # of them are summed at a time: caches hold what comes of it
_LARGE = 2**24  # at a time on other devices: by then starting the work takes a small share of the time


Place = tuple[torch.dtype, torch.device]  # what one scratch is for


def folded_weight(weight: torch.Tensor, deltas: Sequence[LowRank], dtype: torch.dtype, name: str) -> torch.Tensor:
    """W + Σ s·B·A as a new tensor, rounded once to `dtype`, which may be narrower than W's own.

    Raises:
        FoldError: a number is not finite, or does not fit into the dtype.
    """
    whole = ExactSum.of(weight, deltas, name)
    whole = replace(whole, magnitude=float(whole.magnitude))
    folded = torch.empty(weight.shape, dtype=dtype, device=weight.device)
    if math.isfinite(whole.magnitude):
        scratch = scratch_of(folded)
        blocks = _blocks(weight, scratch.elements)
        for (start, stop), part in zip(blocks, whole.blocks(scratch.elements), strict=True):
            folded[start:stop] = part.rounded(scratch)
    if not math.isfinite(whole.magnitude) or not math.isfinite(float(_largest(folded))):
        raise FoldError(
            f"W + s·B·A is not finite in {dtype}",
            place=name,
            remedy="look for NaN and Inf in the weight and the factors; lower the scale, or take a wider dtype",
        )
    return folded


@dataclass(frozen=True)
class Way:
    """The way from the folded weight back to the original one, block by block."""

    deltas: tuple[LowRank, ...]
    """As they were when they were folded."""
    magnitude: float
    elements: int
    """As many as a block had at most. The way back takes the same blocks."""
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
        return same(_checksum(weight, self.elements), self.folded)

    def take_back(self, weight: torch.Tensor, undo: list[Undo]) -> torch.Tensor:
        """Write the weight that was; `undo` gets what folds each block again, for an unfold that is cut short.

        Returns:
            Whether it is the one that was, on its device.
        """
        whole = ExactSum(weight, tuple(map(_wide, self.deltas)), self.magnitude)
        scratch = scratch_of(weight, self.elements)
        for part, remainder in zip(whole.blocks(self.elements), self.remainders, strict=True):
            old = remainder.restore(part.guess(scratch))
            _write(part.weight, old, undo, partial(_fold_block, part), scratch)
        return same(_checksum(weight, self.elements), self.original)


def kept(delta: LowRank) -> LowRank:
    """The delta as it is now, whatever becomes of its factors: of all output features."""
    delta = delta.detached()
    return replace(delta, A=delta.A.clone(), B=delta.whole.clone(), rows=None, index=None)


def block_sizes(weights: Sequence[torch.Tensor], at_most: int | None = None) -> dict[Place, int]:
    """How many elements a block has at most: of the weights of each dtype on each device.

    Args:
        at_most: so many, or a row where that has more; None for as many as are worth it, and find room.
    """
    places = {(weight.dtype, weight.device) for weight in weights}
    worth = {place: at_most or _worth(*place, len(places)) for place in places}
    sizes = dict.fromkeys(places, 0)
    for weight in weights:
        place = weight.dtype, weight.device
        first = slice(*next(_blocks(weight, worth[place]), (0, 0)))
        sizes[place] = max(sizes[place], weight[first].numel())
    return sizes


def _worth(dtype: torch.dtype, device: torch.device, scratches: int) -> int:
    if device.type == "cpu":
        return _BLOCK
    if device.type != "cuda":
        return _LARGE
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    free = torch.cuda.mem_get_info(device)[0] + cached
    return max(1, min(_LARGE, free // (2 * scratches * Scratch.bytes(dtype))))  # half of it for what comes and goes


def scratches(weights: Sequence[torch.Tensor], sizes: Mapping[Place, int]) -> dict[Place, Scratch]:
    """For blocks of these sizes, of the weights of each dtype on each device."""
    tiles = block_sizes(weights, _TILE)
    return {
        place: Scratch(elements, *place, tiles[place] if place[1].type == "cpu" else None)
        for place, elements in sizes.items()
    }


def scratch_of(weight: torch.Tensor, at_most: int | None = None) -> Scratch:
    (found,) = scratches([weight], block_sizes([weight], at_most)).values()
    return found


def fits(scratch: Scratch, weight: torch.Tensor) -> bool:
    """It is what `scratch_of` would make for this weight on a CPU."""
    ((place, elements),) = block_sizes([weight]).items()
    tile = min(block_sizes([weight], _TILE)[place], elements)
    return (scratch.place, scratch.elements, scratch.tile) == (place, elements, tile)


def _write(block: torch.Tensor, new: torch.Tensor, undo: list[Undo], way_back: Undo, scratch: Scratch) -> None:
    """Into the weight. Cut short at whichever line, what stands on the list gives back the block that was."""
    undo.append(partial(block.copy_, scratch.narrow(scratch.BEFORE, block.shape).copy_(block)))
    block.copy_(new)
    undo[-1] = way_back


def _unfold_block(part: ExactSum, remainder: Remainder) -> None:
    """The way back of a fold that is cut short, maybe for want of memory: then in halves."""
    block = part.weight
    try:
        block.copy_(remainder.restore(part.guess(scratch_of(block, block.numel()))))
        return
    except Exception:
        if len(block) < 4:
            raise
    middle, width = len(block) // 4 * 2, block[0].numel()
    for start, stop in (0, middle), (middle, len(block)):
        _unfold_block(part.rows(start, stop), remainder.part(start * width, stop * width))


def _fold_block(part: ExactSum, scratch: Scratch | None = None, found: Found | None = None) -> None:
    """Keeping nothing. Where memory is short, in halves: some of the weight may have been folded before."""
    block = part.weight
    try:
        scratch = scratch or scratch_of(block, block.numel())
        block.copy_(part.rounded(scratch, found))
        return
    except Exception:
        if len(block) == 1:
            raise
    middle = len(block) // 2
    for start, stop in (0, middle), (middle, len(block)):
        _fold_block(part.rows(start, stop), scratch)


# ── the sum ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Found:
    """What has been found out about a block before it is folded."""

    doubtful: int
    """How many sums lie near a border between two numbers, at most."""
    places: torch.Tensor
    """Flat indices of those that float64 cannot decide."""
    settled: torch.Tensor
    """What their real sums are rounded to, in the weight's dtype."""
    counts: tuple[int, int] | None
    """Of the steps back that are kept, for a fold that can be undone: `Steps.kept`."""


@dataclass(frozen=True)
class ExactSum:
    """W + Σ s·B·A of a weight, or of some of its rows. What it computes is in the scratch that it is given."""

    weight: torch.Tensor
    deltas: tuple[LowRank, ...]
    """With float64 factors, of all output features."""
    magnitude: float | torch.Tensor
    """No element is larger, and no part of its sum. On its device until it is `checked`."""
    kept: tuple[LowRank, ...] = ()
    """The deltas in their own dtype, for the way back."""
    name: str = ""
    """Of the weight."""
    adapters: tuple[str, ...] = ()
    """The names of those that the deltas are of."""
    unread: torch.Tensor | None = None
    """The largest magnitudes of the weight, and of A and B of each delta, for `checked`. Of some rows: None."""

    @staticmethod
    def of(weight: torch.Tensor, deltas: Sequence[LowRank], name: str = "", adapters: Sequence[str] = ()) -> ExactSum:
        factors = (factor for delta in deltas for factor in (delta.A, delta.B))
        sizes = torch.stack([_largest(numbers) for numbers in (weight, *factors)])
        wide = tuple(map(_wide, deltas))
        return ExactSum(weight, wide, _bound(sizes, deltas), tuple(deltas), name, tuple(adapters), sizes)

    def checked(self, sizes: Sequence[float], sums: Sequence[float] | None) -> ExactSum:
        """Itself with its magnitude known.

        Args:
            sizes: what is `unread`, read.
            sums: the least and the largest of each block; None to compute them where they are needed.

        Raises:
            FoldError: a number is not finite, or a sum does not fit into the dtype.
        """
        magnitude, dtype = float(_bound(sizes, self.deltas)), self.weight.dtype
        if magnitude <= torch.finfo(dtype).max:
            return replace(self, magnitude=magnitude)
        factors = [f"{f} of adapter {a!r}" for a in self.adapters for f in "AB"]
        for what, size in zip(("the weight", *factors), sizes, strict=True):
            if not math.isfinite(size):
                remedy = f"repair {what}, or load an earlier checkpoint"
                raise FoldError(f"{what} holds NaN or Inf", place=self.name, remedy=remedy)
        if sums is None:  # only the sums themselves can tell
            scratch = scratch_of(self.weight)
            sums = [float(_largest(round_once(tile.sums(scratch)[0], dtype))) for _, tile in self.tiles(scratch.tile)]
        if not all(map(math.isfinite, sums)):
            raise too_large(self.name, dtype)
        return replace(self, magnitude=magnitude)

    def fold(self, scratch: Scratch, undo: list[Undo], founds: Sequence[Found | None]) -> Way:
        """Write the folded weight; what comes is the way back.

        Args:
            undo: gets what undoes each block, for a fold that is cut short.
            founds: of each block; none at all where nothing has been found out before.
        """
        before, remainders = _checksum(self.weight, scratch.elements), []
        for part, found in self._with(founds, scratch):
            steps = Steps.room(part.weight, scratch)
            new = part.rounded(scratch, found, steps)
            remainders.append(steps.kept(found.counts if found else None, scratch))
            _write(part.weight, new, undo, partial(_unfold_block, part, remainders[-1]), scratch)
        after = _checksum(self.weight, scratch.elements)
        return Way(self.kept, float(self.magnitude), scratch.elements, tuple(remainders), after, before)

    def fold_for_good(self, scratch: Scratch, founds: Sequence[Found | None]) -> None:
        """Write the folded weight, and keep nothing."""
        for part, found in self._with(founds, scratch):
            _fold_block(part, scratch, found)

    def _with(self, founds: Sequence[Found | None], scratch: Scratch) -> Iterator[tuple[ExactSum, Found | None]]:
        parts = self.blocks(scratch.elements)
        return zip(parts, founds, strict=True) if founds else ((part, None) for part in parts)

    @property
    def steps(self) -> float:
        """How far the sum, taken in float64 in any order, may be from the real number, as a share of its magnitude:
        each operation rounds by at most 2⁻⁵³ of what is there at most."""
        return sum(2 * delta.rank + 2 for delta in self.deltas) * 2.0**-53

    @property
    def error(self) -> float | torch.Tensor:
        """The same in the weight's units."""
        return self.steps * self.magnitude

    @property
    def apart(self) -> float | torch.Tensor:
        """How far W' − Σ s·B·A may be from what it is the next time; it may be twice as large as the sum."""
        return 4 * 2 * self.error

    def rows(self, start: int, stop: int) -> ExactSum:
        """The indices start:stop of the weight's first axis."""
        deltas = tuple(_rows(delta, start, stop) for delta in self.deltas)
        return ExactSum(self.weight[start:stop], deltas, self.magnitude)

    def blocks(self, elements: int) -> Iterator[ExactSum]:
        """As many rows as have so many elements, or one, from the first to the last."""
        for start, stop in _blocks(self.weight, elements):
            safe_point()
            yield self.rows(start, stop)

    def tiles(self, elements: int) -> Iterator[tuple[slice, Tile]]:
        """The same of what is computed at once, where the deltas are taken apart once for all."""
        terms = [_term(delta, self.weight.dtype) for delta in self.deltas]
        for start, stop in _blocks(self.weight, elements):
            yield slice(start, stop), Tile(self.weight[start:stop], [term.rows(start, stop) for term in terms])

    def guess(self, scratch: Scratch) -> torch.Tensor:
        """Where the weight is W': W' − Σ s·B·A, the original one, give or take a few steps."""
        guess = scratch.narrow(scratch.ROUNDED, self.weight.shape)
        for rows, tile in self.tiles(scratch.tile):
            guess[rows] = scratch.wide(scratch.TOTAL, tile.weight.shape).copy_(tile.weight).sub_(tile.delta(scratch))
        return guess

    def rounded(self, scratch: Scratch, found: Found | None = None, steps: Steps | None = None) -> torch.Tensor:
        """The real sums rounded to nearest-even in the dtype of `scratch`, in its `ROUNDED`.

        Beyond doubt is a sum of which both ends, the sum in float64 ± error, round to one number. The few others are
        looked at again with an error of their own; what is still open then is summed as fractions.

        Args:
            found: what is known of the block, which is one tile then; None to ask.
            steps: gets those from each guess to the number that was, for a fold that can be undone. What was in doubt
                is kept in full.
        """
        rounded, high = (scratch.narrow(which, self.weight.shape) for which in (scratch.ROUNDED, scratch.HIGH))
        narrow = rounded.dtype != torch.float64
        for rows, tile in self.tiles(scratch.elements if found else scratch.tile):
            total, delta = tile.sums(scratch, steps is not None)
            low = rounded[rows]
            if narrow:
                between(total, self.error, low, high[rows], scratch)
            else:
                low.copy_(total)
            if steps is not None:
                assert delta is not None
                steps.take(rows, total.copy_(low).sub_(delta), self.apart, scratch)
        if narrow and rounded.numel():
            bits = high.view(-1).view(INTEGERS[high.element_size()])
            places = first_places(bits, found.doubtful)[0] if found else places_of(bits)
            self._settle(rounded.view(-1), places, found)
            if steps is not None:
                steps.keep_in_full(places)
        return rounded

    def _settle(self, rounded: torch.Tensor, places: torch.Tensor, found: Found | None) -> None:
        """Write into `rounded`, flat, the numbers that are in doubt: those at these indices."""
        for some in places.split(_CHUNK):
            if len(some):  # an empty tensor is split into one chunk, too
                low, open_ = self.decided(some, rounded.dtype)
                known = torch.where(open_, rounded[some], low) if found else self._settled(some, low, open_)
                rounded[some] = known
        if found:
            rounded[found.places] = found.settled.to(rounded.dtype)

    def decided(self, places: torch.Tensor, dtype: torch.dtype, times: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
        """Single sums rounded, by how far they may be off themselves, and which are open still: those are rounded down.

        Args:
            places: their flat indices.
            times: that error.
        """
        value = self.weight.reshape(-1)[places].to(torch.float64)
        size = value.abs()
        for delta in self.deltas:
            products = torch.mul(*_at(delta, places))
            value = value + products.sum(-1) * delta.scale
            size = size + products.abs_().sum(-1) * abs(delta.scale)
        error = times * self.steps * size
        low, high = round_once(torch.stack([value - error, value + error]), dtype)
        return low, low != high

    def _settled(self, places: torch.Tensor, low: torch.Tensor, open_: torch.Tensor) -> torch.Tensor:
        if bool(open_.any()):
            exact = self.nearest(self.terms(places[open_]).tolist(), low.dtype)
            low[open_] = torch.tensor(exact, dtype=low.dtype, device=low.device)
        return low

    def terms(self, places: torch.Tensor) -> torch.Tensor:
        """What single sums are made of: W, and of each delta a column of A and a row of B, (n, 1 + 2·Σr), float64."""
        factors = [factor for delta in self.deltas for factor in _at(delta, places)]
        return torch.cat([self.weight.reshape(-1)[places].double()[:, None], *factors], -1)

    def nearest(self, rows: Sequence[Sequence[float]], dtype: torch.dtype) -> list[float]:
        """The real sums of such `terms`, rounded."""
        return [nearest(self._fraction(row), dtype) for row in rows]

    def _fraction(self, row: Sequence[float]) -> Fraction:
        total, at = Fraction(row[0]), 1
        for delta in self.deltas:
            a, b = row[at : at + delta.rank], row[at + delta.rank : at + 2 * delta.rank]
            total += Fraction(delta.scale) * sum(Fraction(x) * Fraction(y) for x, y in zip(a, b, strict=True))
            at += 2 * delta.rank
        return total


def too_large(name: str, dtype: torch.dtype) -> FoldError:
    """Of a sum, when it is rounded."""
    remedy = "lower the scale, or fold the model in a wider dtype"
    return FoldError(f"W + s·B·A does not fit into {dtype}", place=name, remedy=remedy)


def _bound(sizes: Sequence[float] | torch.Tensor, deltas: Sequence[LowRank]) -> float | torch.Tensor:
    """Of W + Σ s·B·A, from the largest magnitudes of W, and of A and B of each delta."""
    pairs = zip(deltas, sizes[1::2], sizes[2::2], strict=True)
    return sizes[0] + sum(abs(delta.scale) * delta.rank * a * b for delta, a, b in pairs)


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


@dataclass(frozen=True)
class Tile:
    """Some rows of a weight, and what is added to them. What it computes is in the scratch that it is given."""

    weight: torch.Tensor
    terms: Sequence[_Product | _General]

    def delta(self, scratch: Scratch) -> torch.Tensor:
        """Σ s·B·A in float64."""
        return self._added(scratch.wide(scratch.DELTA, self.weight.shape).zero_())

    def sums(self, scratch: Scratch, undoable: bool = False) -> tuple[torch.Tensor, torch.Tensor | None]:
        """W + Σ s·B·A in float64, contiguous; and Σ s·B·A, for a fold that can be undone."""
        total = scratch.wide(scratch.TOTAL, self.weight.shape).copy_(self.weight)
        if undoable or self.weight.dtype == torch.float64:  # float64 in one order, whether it can be undone or not
            delta = self.delta(scratch)
            return total.add_(delta), delta
        return self._added(total), None

    def _added(self, total: torch.Tensor) -> torch.Tensor:
        for term in self.terms:
            term.add_to(total)
        return total


@dataclass(frozen=True)
class _Product:
    """s·B·A as a product of two matrices, or of a stack of them each, in the order in which the weight lies."""

    left: torch.Tensor
    right: torch.Tensor
    per_row: int
    """Rows of `left`, or matrices, for each index of the weight's first axis."""

    def rows(self, start: int, stop: int) -> _Product:
        some = slice(start * self.per_row, stop * self.per_row)
        return _Product(self.left[some], self.right if self.right.ndim == 2 else self.right[some], self.per_row)

    def add_to(self, total: torch.Tensor) -> None:
        if self.left.ndim == 3:
            total.view(*self.left.shape[:2], -1).baddbmm_(self.left, self.right)
        else:
            total.view(len(self.left), -1).addmm_(self.left, self.right)


@dataclass(frozen=True)
class _General:
    """s·B·A of a weight whose axes lie otherwise; or which is float64 and has no bits to spare: its sums are taken in
    one order, the same on every device and with any number of threads. For narrower ones a matmul may take them in any
    order, which `ExactSum.steps` bounds."""

    of: LowRank
    in_order: bool

    def rows(self, start: int, stop: int) -> _General:
        return _General(_rows(self.of, start, stop), self.in_order)

    def add_to(self, total: torch.Tensor) -> None:
        A, B, layout = self.of.A, self.of.B * self.of.scale, self.of.layout
        total += layout.to_weight(_in_order(A, B)) if self.in_order else layout.delta(A, B)


def _term(delta: LowRank, dtype: torch.dtype) -> _Product | _General:
    """What is added to a weight of this dtype."""
    axes = delta.layout.axes
    sides = "".join(axis.side for axis in axes)
    if dtype == torch.float64 or sides not in ("oi", "io", "boi", "bio"):
        return _General(delta, dtype == torch.float64)
    A, B = delta.A, delta.B * delta.scale
    left, right = (B, A) if sides.endswith("oi") else (A.mT, B.mT)
    return _Product(left, right, axes[0].size // delta.layout.shape[0])


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


def _blocks(weight: torch.Tensor, elements: int) -> Iterator[tuple[int, int]]:
    rows, width = weight.shape[0], math.prod(weight.shape[1:])
    step = max(1, elements // max(width, 1))
    for start in range(0, rows, step) if width else ():
        yield start, min(start + step, rows)


def _checksum(weight: torch.Tensor, elements: int) -> torch.Tensor:
    found = torch.zeros((), dtype=torch.int64, device=weight.device)
    for start, stop in _blocks(weight, elements):
        found += checksum(weight[start:stop])
    return found


def _largest(values: torch.Tensor) -> torch.Tensor:
    """The largest magnitude, float64; NaN or Inf if one is there. It stays on the device."""
    if not values.numel():
        return torch.zeros((), dtype=torch.float64, device=values.device)
    return torch.stack(values.detach().aminmax()).to(torch.float64).abs().amax()
