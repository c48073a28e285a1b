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
RANKS = 16
"""So many components are multiplied together: the fewest that `tl.dot` takes."""

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
    """The bits, int32, of float64 numbers rounded once to nearest-even; of 16 bits Inf for NaN, too.

    By the upper half of the number, of which the last bit is set where the lower half has some (rounding to odd). Below
    the smallest normal number the step is fixed: added to 1.5·2⁵² steps, a number is rounded to one, and the lower half
    counts them.
    """
    if KIND == "float32":
        found = value.to(tl.float32).to(tl.int32, bitcast=True)
    else:
        DROPPED: tl.constexpr = 13 if KIND == "bfloat16" else 10  # bits of the upper half's fraction
        BIAS: tl.constexpr = 1023 - (127 if KIND == "bfloat16" else 15)
        NORMAL: tl.constexpr = (BIAS + 1) << 20  # the upper half of the smallest one
        WHOLE: tl.constexpr = 1.5 * (2.0**-81 if KIND == "bfloat16" else 2.0**28)
        INFINITE: tl.constexpr = 0x7F80 if KIND == "bfloat16" else 0x7C00
        bits = value.to(tl.int64, bitcast=True)
        high = (bits >> 32).to(tl.int32)
        size = (high & 0x7FFFFFFF) | (bits.to(tl.int32) != 0).to(tl.int32)
        half: tl.constexpr = (1 << (DROPPED - 1)) - 1
        found = ((size + half + ((size >> DROPPED) & 1)) >> DROPPED) - (BIAS << (20 - DROPPED))
        steps = (tl.abs(value) + WHOLE).to(tl.int64, bitcast=True).to(tl.int32)
        found = tl.where(size < NORMAL, steps, tl.minimum(found, INFINITE)) | (high >> 31 << 15)
    return found


@triton.jit
def _infinite(raw, KIND: tl.constexpr):
    exponent: tl.constexpr = 0x7F80 if KIND == "bfloat16" else (0x7C00 if KIND == "float16" else 0x7F800000)
    return (raw & exponent) == exponent


@triton.jit
def _append(which, flat, raw, answers, column, places, numbers, room, with_numbers):
    """The elements that `which` says to a list that all programs fill, as far as there is room, in no order."""
    count = tl.sum(which)
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
    lefts = left + batch.to(tl.int64) * left_batch + row[:, None] * left_row
    rights = right + batch.to(tl.int64) * right_batch + column[None, :] * right_column
    delta, size = tl.zeros((ROWS, COLUMNS), tl.float64), tl.abs(value)
    # As products of matrices: tensor cores have them in float64, and a factor is read and widened once in a program,
    # where with multiply-adds each thread would do so for itself.
    for first in range(0, rank, RANKS):
        r = first + tl.arange(0, RANKS)
        l_ = tl.load(lefts + r[None, :] * left_rank, mask=row_in[:, None] & (r < rank)[None, :], other=0)
        r_ = tl.load(rights + r[:, None] * right_rank, mask=column_in[None, :] & (r < rank)[:, None], other=0)
        wide_l, wide_r = _number(l_, FACTORS) * scale, _number(r_, FACTORS)
        delta = tl.dot(wide_l, wide_r, delta, out_dtype=tl.float64)
        size = tl.dot(tl.abs(wide_l), tl.abs(wide_r), size, out_dtype=tl.float64)

    if mode == 2:  # BACK
        old = _rounded(value - delta, KIND)
        if keeps == 2:
            byte = tl.load(nibbles + (flat >> 1), mask=inside, other=0).to(tl.int32)
            old += ((byte >> ((flat & 1) * 4)) & 15) - 8
        tl.store(weight + flat, old.to(raw.dtype), mask=inside)
    else:
        total = value + delta
        slot = answers + (program % SLOTS) * ANSWERS
        if mode == 0:  # LOOK
            error = size * (steps.to(tl.float64) * 2.0**-53 * TIMES)
            new, other = _rounded(total - error, KIND), _rounded(total + error, KIND)
            upper = (size.to(tl.int64, bitcast=True) >> 32).to(tl.int32)  # in the order of the numbers, NaN the largest
            tl.atomic_max(slot + 1, (tl.max(upper) + 1).to(tl.int64) << 32)
            infinite = _infinite(new, KIND) & _infinite(other, KIND)
            if tl.sum(((new != other) | infinite).to(tl.int32)) > 0:  # which is rare
                tl.atomic_add(slot + 2, tl.sum(infinite.to(tl.int32)).to(tl.int64))
                _append((new != other).to(tl.int32), flat, raw, answers, 0, places, numbers, room, False)
        else:
            new = _rounded(total, KIND)
        if UNDOABLE:
            error = size * (steps.to(tl.float64) * 2.0**-53)
            back = _number(new.to(raw.dtype), KIND) - delta
            apart = error * tl.where(mode == 0, 2 * APART, APART)
            if KIND != "float32":  # whether the guess is rounded once, or by way of float32
                apart = tl.where(size > 0, tl.fma(tl.abs(back), 2.0**-23, apart) + 2.0**-149, apart)
            guess = _rounded(back - apart, KIND)
            step = raw.to(tl.int32) - guess + 8
            far = ((guess != _rounded(back + apart, KIND)) | (step < 0) | (step > 15)).to(tl.int32)
            moved = ((step != 8) | (far != 0)).to(tl.int32)
            if mode == 0:
                tl.atomic_add(slot + 3, tl.sum(moved).to(tl.int64))
                tl.atomic_add(slot + 4, tl.sum(far).to(tl.int64))
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
