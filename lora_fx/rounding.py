"""Rounding a sum once, for certain, and remembering in few bits what rounding took away.

    fold      W' = round(W + D)                      D = Σ s·B·A in float64, within `error` of the real number
    unfold    W  = round(W' − D) moved by a few steps of its dtype; the steps are what `remember` keeps

Only elements whose float64 sum lies within `error` of the border between two numbers can come out wrong; those few are
summed again as fractions. On the way back D may be summed in another order (by another number of threads, say): the
numbers of which that could move the guess are kept in full.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction

import torch

_NARROW = (torch.bfloat16, torch.float16)
_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
_CHUNK = 2**15  # doubtful elements that are looked at together


def round_once(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """float64 values rounded to nearest-even in `dtype`.

    torch converts float64 to bfloat16 and float16 by way of float32, which rounds twice. Rounding to odd in between
    (the last bit of float32 set whenever something was lost) lets the second rounding see that (Boldo and Melquiond
    2008).
    """
    if dtype not in _NARROW:
        return values.to(dtype)
    near = values.to(torch.float32)
    back = near.to(torch.float64)
    bits = near.view(torch.int32)
    away = back.abs() > values.abs()  # one step towards zero where float32 rounded away from it
    inexact = (back != values) & near.isfinite()
    odd = torch.where(inexact, (bits - away.to(torch.int32)) | 1, bits)
    return odd.view(torch.float32).to(dtype)


def round_sum(
    total: torch.Tensor,
    error: float,
    dtype: torch.dtype,
    errors: Callable[[torch.Tensor], torch.Tensor],
    exact: Callable[[torch.Tensor], list[Fraction]],
) -> torch.Tensor:
    """The real sums rounded to nearest-even in `dtype`.

    Beyond doubt is a sum of which both ends, `total` ± `error`, round to one number. The few others are looked at again
    with an error of their own; what is still open then is summed as fractions.

    Args:
        total: the sums in float64, each within `error` of the real number.
        errors: flat indices into `total` → an error for each of these elements.
        exact: flat indices into `total` → the real numbers.
    """
    if dtype == torch.float64:
        return total
    if dtype in _NARROW:  # torch goes by way of float32: so wide that no number rounds to a border in between
        error += 2.0**-22 * max(map(abs, torch.stack(total.aminmax()).tolist()), default=0.0) + 2.0**-147
    rounded, low, high = total.to(dtype), (total - error).to(dtype), (total + error).to(dtype)
    if not torch.equal(low, high):
        rounded = rounded.contiguous()
        flat, values = rounded.view(-1), total.reshape(-1)
        for places in (low != high).reshape(-1).nonzero().squeeze(1).split(_CHUNK):
            flat[places] = _round_doubtful(values[places], places, dtype, errors, exact)
    return rounded


def _round_doubtful(
    values: torch.Tensor, places: torch.Tensor, dtype: torch.dtype, errors: Callable, exact: Callable
) -> torch.Tensor:
    error = errors(places)
    low, high = round_once(values - error, dtype), round_once(values + error, dtype)
    open_ = low != high
    if bool(open_.any()):
        sums = exact(places[open_])
        low[open_] = torch.stack([_nearest(x, a, b) for x, a, b in zip(sums, low[open_], high[open_], strict=True)])
    return low


def _nearest(x: Fraction, low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
    """The number of the dtype from `low` to `high` that is nearest to x; the even one of two as near."""
    first, last = int(ordinal(low)), int(ordinal(high))
    candidates = [from_ordinal(torch.tensor(n), low.dtype) for n in range(first, last + 1)]

    def distance(value: torch.Tensor) -> tuple[Fraction, int]:
        return abs(Fraction(float(value)) - x), int(value[None].view(_INTEGERS[value.itemsize])) & 1

    return min(candidates, key=distance).to(low.device)


def ordinal(values: torch.Tensor) -> torch.Tensor:
    """Floats as integers in the same order, one step for each float; −0 is one below +0."""
    integers = _INTEGERS[values.dtype.itemsize]
    bits = values.contiguous().reshape(-1).view(integers).reshape(values.shape)
    return bits ^ ((bits >> (8 * values.dtype.itemsize - 1)) & torch.iinfo(integers).max)


def from_ordinal(steps: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The inverse of `ordinal`."""
    integers = _INTEGERS[dtype.itemsize]
    steps = steps.to(integers)
    bits = steps ^ ((steps >> (8 * dtype.itemsize - 1)) & torch.iinfo(integers).max)
    return bits.contiguous().reshape(-1).view(dtype).reshape(steps.shape)


def checksum(values: torch.Tensor) -> int:
    """A sum over the bits: different for any one changed element."""
    return int(ordinal(values.detach()).sum(dtype=torch.int64))


# ── what rounding took away ──────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Remainder:
    """How to get from a guess to the numbers that were: steps of up to ±7 in four bits, the rest in full."""

    nibbles: torch.Tensor | None
    """Two steps to a byte, biased by 8; None where no element takes a step that is not in `places`."""
    places: torch.Tensor | None
    """Flat indices, int32; None where all the numbers are kept."""
    numbers: torch.Tensor
    """The numbers at `places`."""

    @property
    def bytes(self) -> int:
        kept = (self.nibbles, self.places, self.numbers)
        return sum(t.numel() * t.element_size() for t in kept if t is not None)

    def restore(self, guess: torch.Tensor) -> torch.Tensor:
        """The numbers that were."""
        if self.places is None:
            return self.numbers.reshape(guess.shape)
        result = guess.contiguous().clone()
        flat = result.view(-1)
        if self.nibbles is not None:
            pairs = torch.stack([self.nibbles & 15, self.nibbles >> 4], dim=1).reshape(-1)[: flat.numel()]
            moved = ordinal(flat).to(torch.int64) + pairs.to(torch.int64) - 8
            flat.copy_(from_ordinal(moved, guess.dtype))
        flat[self.places.to(torch.int64)] = self.numbers
        return result


def remember(numbers: torch.Tensor, difference: torch.Tensor, error: float) -> Remainder:
    """The fewest bytes that give `numbers` back from a guess: only exceptions, four bits each, or all of them.

    Args:
        difference: W' − D in float64, whose rounded value is the guess; the next time it may differ by `error`.
    """
    flat, dtype = numbers.detach().reshape(-1), numbers.dtype
    guess = difference.to(dtype)
    steps = (ordinal(flat).to(torch.int64) - ordinal(guess.reshape(-1)).to(torch.int64)).contiguous()
    each = 4 + numbers.element_size()
    far = steps.abs() > 7
    if dtype != torch.float64:
        shaky = ((difference - error).to(dtype) != (difference + error).to(dtype)).reshape(-1)
        far |= shaky
    moved = far | (steps != 0)
    sparse, packed = each * int(moved.sum()), (flat.numel() + 1) // 2 + each * int(far.sum())
    if min(sparse, packed) >= flat.numel() * numbers.element_size():
        return Remainder(None, None, flat.clone())
    places = (moved if sparse <= packed else far).nonzero().squeeze(1)
    nibbles = None
    if packed < sparse:
        codes = torch.where(far, 0, steps) + 8
        codes = torch.nn.functional.pad(codes, (0, codes.numel() % 2)).to(torch.uint8).view(-1, 2)
        nibbles = codes[:, 0] | (codes[:, 1] << 4)
    return Remainder(nibbles, places.to(torch.int32), flat[places].clone())
