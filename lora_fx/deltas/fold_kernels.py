"""The fold of one weight as Triton kernels: it is read once, and everything is computed in registers.

    W' = round(w + d),  d = Σ s·B·A in float64;  on the way back  w = round(W' − d) moved by a few steps

`fold` does three things with the same sums, in one program, so that they are the same sums: it looks at a weight and
writes nothing; it writes W' and what rounding took away; it writes W again. A weight is a matrix (batch, rows,
columns), contiguous, as integers of its width; the product is `left` (batch, rows, rank) times `right` (batch, rank,
columns). How far a sum may be off is known for each element: `steps` · 2⁻⁵³ of |w| + Σ |s·b·a|. What is asked and
answered is `lora_fx.deltas.fused_sum`'s, the only one who imports this: it needs Triton.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOOK, WRITE, BACK = 0, 1, 2
"""What `fold` does."""
ALL, MOVED, FAR = 0, 1, 2
"""What is kept for the way back, elsewhere or not at all for ALL: the numbers that are moved; or steps, and numbers
that are far."""
OPEN, SIZE, INFINITE, MOVES, FARS, FILLED, WRITTEN = range(7)
"""The columns of the answers."""
ANSWERS, SLOTS = 8, 32
"""Each answer has 32 places that are added up afterwards (of `SIZE` the largest counts): programs wait less for each
other. Of `OPEN`, `FILLED` and `WRITTEN` only the first is used."""
ROWS, COLUMNS, WARPS = 16, 64, 4
"""Of a weight that one program reads: 8 elements a thread, whose sums and bounds fit into its registers."""
RANKS = 4
"""So many components are loaded together."""

TIMES = 2.25  # the error of a sum: in another order it may be off by as much the other way
APART = 8.0  # the same of W' − d, as `ExactSum.apart`


@triton.jit
def _number(raw, KIND: tl.constexpr):
    """Bits as float64."""
    if KIND == "bfloat16":
        found = (raw.to(tl.int32) << 16).to(tl.float32, bitcast=True).to(tl.float64)
    elif KIND == "float16":
        found = raw.to(tl.float16, bitcast=True).to(tl.float32).to(tl.float64)
    elif KIND == "float32":
        found = raw.to(tl.float32, bitcast=True).to(tl.float64)
    else:
        found = raw.to(tl.float64, bitcast=True)
    return found


@triton.jit
def _rounded(value, KIND: tl.constexpr):
    """The bits, int32, of float64 numbers rounded once to nearest-even.

    Twenty bits of the fraction are kept, of which the last is set where more was lost (rounding to odd): that fits into
    float32, and the rounding to 16 bits sees it. Below 2⁻¹²⁶ bfloat16 has a fixed step, 2⁻¹³³: adding 1.5·2⁵² steps
    rounds to one.
    """
    if KIND == "float32":
        found = value.to(tl.float32).to(tl.int32, bitcast=True)
    else:
        bits = value.to(tl.int64, bitcast=True)
        lost = ((bits & 0xFFFFFFFF) != 0).to(tl.int64)
        odd = (((bits >> 32) | lost) << 32).to(tl.float64, bitcast=True)
        if KIND == "bfloat16":
            whole = 1.5 * 2.0**-81
            small = tl.abs(value) < 2.0**-126
            single = tl.where(small, (value + whole) - whole, odd).to(tl.float32).to(tl.int32, bitcast=True)
            single = single | ((bits >> 63).to(tl.int32) << 31)
            found = (single + 0x7FFF + ((single >> 16) & 1)) >> 16
        else:
            found = odd.to(tl.float32).to(tl.float16).to(tl.int16, bitcast=True).to(tl.int32)
    return found


@triton.jit
def _infinite(raw, KIND: tl.constexpr):
    exponent: tl.constexpr = 0x7F80 if KIND == "bfloat16" else (0x7C00 if KIND == "float16" else 0x7F800000)
    return (raw & exponent) == exponent


@triton.jit
def _append(which, flat, raw, answers, column, places, numbers, room, with_numbers):
    """The elements that `which` says to a list that all programs fill, as far as there is room, in no order."""
    count = tl.sum(tl.sum(which, 1), 0)
    if count > 0:
        first = tl.atomic_add(answers + column, count.to(tl.int64)).to(tl.int32)
        in_row = tl.sum(which, 1)
        before = tl.cumsum(in_row, 0) - in_row
        at = first + before[:, None] + tl.cumsum(which, 1) - which
        inside = (which != 0) & (at < room)
        tl.store(places + at, flat, mask=inside)
        if with_numbers:
            tl.store(numbers + at, raw, mask=inside)


@triton.jit(
    do_not_specialize=[
        "answers", "places", "numbers", "nibbles", "mode", "keeps", "room", "rows", "rank", "left_batch", "left_row",
        "left_rank", "scale_high", "scale_low", "steps",
    ]
)  # fmt: skip
def fold(
    weight, left, right, answers, places, numbers, nibbles,
    mode, keeps, room, rows, columns, rank,
    left_batch, left_row, left_rank, right_batch, right_rank, right_column,
    scale_high, scale_low, steps,
    KIND: tl.constexpr, FACTORS: tl.constexpr, UNDOABLE: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, RANKS: tl.constexpr, SLOTS: tl.constexpr, ANSWERS: tl.constexpr,
    TIMES: tl.constexpr, APART: tl.constexpr,
):  # fmt: skip
    """
    Args:
        weight: its bits.
        answers: (SLOTS, ANSWERS), int64, zeros.
        places: for LOOK where float64 cannot decide, for WRITE what is kept in full; `room` of them, int32.
        numbers: those that were at these places.
        nibbles: the steps back.
        scale_high, scale_low: the two halves of a float64.
    """
    program = tl.program_id(0)
    across, down = tl.cdiv(columns, COLUMNS), tl.cdiv(rows, ROWS)
    batch = program // (across * down)
    row = (program // across) % down * ROWS + tl.arange(0, ROWS)
    column = program % across * COLUMNS + tl.arange(0, COLUMNS)
    row_in, column_in = row < rows, column < columns
    inside = row_in[:, None] & column_in[None, :]
    line = batch * rows + row
    flat = line[:, None] * columns + column[None, :]
    raw = tl.load(weight + flat, mask=inside, other=0)
    value = _number(raw, KIND)

    scale = ((scale_high.to(tl.int64) << 32) | (scale_low.to(tl.int64) & 0xFFFFFFFF)).to(tl.float64, bitcast=True)
    delta = tl.zeros((ROWS, COLUMNS), tl.float64)
    size = tl.abs(value)
    lefts = left + batch.to(tl.int64) * left_batch + row * left_row
    rights = right + batch.to(tl.int64) * right_batch + column * right_column
    for first in range(0, rank, RANKS):
        for k in tl.static_range(RANKS):
            r = first + k
            l_ = _number(tl.load(lefts + r * left_rank, mask=row_in & (row * 0 + r < rank), other=0), FACTORS) * scale
            r_ = _number(tl.load(rights + r * right_rank, mask=column_in & (column * 0 + r < rank), other=0), FACTORS)
            l2, r2 = tl.broadcast(l_[:, None], r_[None, :])
            delta = tl.fma(l2, r2, delta)
            size = tl.fma(tl.abs(l2), tl.abs(r2), size)
    error = size * (steps.to(tl.float64) * 2.0**-53)

    if mode == 2:  # BACK
        old = _rounded(value - delta, KIND)
        if keeps == 2:
            byte = tl.load(nibbles + (flat >> 1), mask=inside, other=0).to(tl.int32)
            old += ((byte >> ((flat & 1) * 4)) & 15) - 8
        tl.store(weight + flat, old.to(raw.dtype), mask=inside)
    else:
        total = value + delta
        new = _rounded(total, KIND)
        slot = answers + (program % SLOTS) * ANSWERS
        if mode == 0:  # LOOK
            low, high = _rounded(total - error * TIMES, KIND), _rounded(total + error * TIMES, KIND)
            infinite = (_infinite(low, KIND) & _infinite(high, KIND)).to(tl.int32)
            tl.atomic_add(slot + 2, tl.sum(tl.sum(infinite, 1), 0).to(tl.int64))
            bits = size.to(tl.int64, bitcast=True) & 0x7FFFFFFFFFFFFFFF  # in the order of the numbers, NaN the largest
            tl.atomic_max(slot + 1, tl.max(tl.max(bits, 1), 0))
            _append((low != high).to(tl.int32), flat, raw, answers, 0, places, numbers, room, False)
        if UNDOABLE:
            back = _number(new.to(raw.dtype), KIND) - delta
            apart = error * tl.where(mode == 0, 2 * APART, APART)
            if KIND != "float32":  # whether the guess is rounded once, or by way of float32
                apart = tl.where(size > 0, tl.fma(tl.abs(back), 2.0**-23, apart) + 2.0**-149, apart)
            guess = _rounded(back - apart, KIND)
            step = raw.to(tl.int32) - guess + 8
            far = ((guess != _rounded(back + apart, KIND)) | (step < 0) | (step > 15)).to(tl.int32)
            moved = ((step != 8) | (far != 0)).to(tl.int32)
            if mode == 0:
                tl.atomic_add(slot + 3, tl.sum(tl.sum(moved, 1), 0).to(tl.int64))
                tl.atomic_add(slot + 4, tl.sum(tl.sum(far, 1), 0).to(tl.int64))
            else:
                if keeps == 1:
                    _append(moved, flat, raw, answers, 5, places, numbers, room, True)
                if keeps == 2:
                    _append(far, flat, raw, answers, 5, places, numbers, room, True)
                    code = tl.where(far != 0, 8, step)
                    even, odd = tl.split(tl.reshape(code, (ROWS, COLUMNS // 2, 2)))
                    pair = program % across * (COLUMNS // 2) + tl.arange(0, COLUMNS // 2)
                    half = columns // 2
                    at = line[:, None] * half + pair[None, :]
                    tl.store(
                        nibbles + at, (even | (odd << 4)).to(tl.uint8), mask=row_in[:, None] & (pair < half)[None, :]
                    )
        if mode == 1:  # WRITE
            tl.store(weight + flat, new.to(raw.dtype), mask=inside)
    if mode != 0:
        tl.store(answers + 6, tl.full((), 1, tl.int64), mask=program == 0)


@triton.jit(do_not_specialize=["flat", "places", "numbers", "count"])
def put(flat, places, numbers, count, BLOCK: tl.constexpr):
    """Write numbers to their places; those below 0 are none."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    place = tl.load(places + at, mask=at < count, other=-1)
    tl.store(flat + place, tl.load(numbers + at, mask=at < count, other=0), mask=place >= 0)
