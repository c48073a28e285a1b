"""Rounding a sum once, for certain, and remembering in few bits what rounding took away.

    fold      W' = round(W + D)                      D = Σ s·B·A in float64, within `error` of the real number
    unfold    W  = round(W' − D) moved by a few steps of its dtype; the steps are what `remember` keeps

Only elements whose float64 sum lies within `error` of the border between two numbers can come out wrong; those few are
summed again as fractions. On the way back D may be summed in another order (by another number of threads, say): the
numbers of which that could move the guess are kept in full.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import torch

_NARROW = (torch.bfloat16, torch.float16)
_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


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


class Scratch:
    """Where blocks are computed, one after the other: asking the system for the memory takes longer than computing.

    Args:
        elements: of the largest block.
        dtype: of the weight.
    """

    DELTA, TOTAL, SPARE = range(3)  # wide
    ROUNDED, BEFORE, GUESS, HIGH = range(4)  # narrow

    def __init__(self, elements: int, dtype: torch.dtype, device: torch.device) -> None:
        room = -(-elements // 8) * 8  # each buffer begins at a whole word, and steps are packed in pairs
        self._wide = torch.empty(3, room, dtype=torch.float64, device=device)
        self._ends_in = torch.float32 if dtype in _NARROW else torch.float64
        self._narrow = torch.empty(4, room, dtype=dtype, device=device)
        self._codes = torch.empty(room, dtype=torch.uint8, device=device)

    @staticmethod
    def of(block: torch.Tensor) -> Scratch:
        return Scratch(block.numel(), block.dtype, block.device)

    def wide(self, which: int, shape: torch.Size) -> torch.Tensor:
        """Sums, deltas and what is spare between: float64."""
        return self._wide[which, : math.prod(shape)].view(shape)

    def narrow(self, which: int, shape: torch.Size) -> torch.Tensor:
        """Rounded numbers, what stood in the weight before, and two ends of an interval: in the weight's dtype."""
        return self._narrow[which, : math.prod(shape)].view(shape)

    def spare(self, shape: torch.Size) -> torch.Tensor:
        """Wider than the weight's dtype: float32, which is faster, where that does."""
        return self._wide[self.SPARE].view(self._ends_in)[: math.prod(shape)].view(shape)

    def codes(self, elements: int) -> torch.Tensor:
        """uint8, an even number of them."""
        return self._codes[: elements + elements % 2]


def between(
    total: torch.Tensor, magnitude: float, steps: float, end: torch.Tensor, rounded: torch.Tensor, scratch: Scratch
) -> torch.Tensor:
    """Write `total` − error, rounded, and say where `total` + error is rounded to another number. Everywhere else all
    that lies between the two is rounded to the same."""
    error = steps * magnitude
    if end.dtype == torch.float32:  # into which each of three operations rounds
        error += 3 * 2.0**-24 * magnitude + 2.0**-147
    elif rounded.dtype in _NARROW:  # to which torch goes by way of float32
        error += 2.0**-24 * magnitude + 2.0**-150
    rounded.copy_(end.copy_(total).sub_(error))
    return _differing(rounded, scratch.narrow(scratch.HIGH, total.shape).copy_(end.add_(2 * error)))


def _differing(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """The flat indices at which two tensors differ in a bit; `other` is written to."""
    a, b = (t.view(-1).view(_INTEGERS[t.element_size()]) for t in (one, other))
    return _nonzero(torch.bitwise_xor(a, b, out=b))


def _nonzero(bits: torch.Tensor) -> torch.Tensor:
    """The indices of the integers that are not zero: few, so that whole words are looked at first."""
    per_word = 8 // bits.element_size()
    if len(bits) % per_word:
        return bits.nonzero().view(-1)
    words = bits.view(torch.int64).nonzero()
    places = (words * per_word + torch.arange(per_word, device=bits.device)).view(-1)
    return places[bits[places] != 0] if len(places) else places


def nearest(x: Fraction, low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
    """The number of the dtype from `low` to `high` that is nearest to x; the even one of two as near."""
    first, last = int(ordinal(low)), int(ordinal(high))
    while last - first > 1:  # where W and δ cancel, around 0, half of all floats lie between
        middle = (first + last) // 2
        below = Fraction(float(from_ordinal(torch.tensor(middle), low.dtype))) <= x
        first, last = (middle, last) if below else (first, middle)
    candidates = [from_ordinal(torch.tensor(n), low.dtype) for n in (first, last)]

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


def checksum(values: torch.Tensor) -> torch.Tensor:
    """A sum over the bits, modulo 2⁶⁴: different for any one changed element. It stays on the device."""
    flat = values.detach().contiguous().view(-1)
    aligned = flat.numel() * flat.element_size() % 8 == 0 and flat.storage_offset() * flat.element_size() % 8 == 0
    return flat.view(torch.int64 if aligned else _INTEGERS[flat.element_size()]).sum(dtype=torch.int64)


def same(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Whether two checksums are; a model may have moved since one was taken."""
    return one == other.to(one.device)


def read(answers: Sequence[torch.Tensor]) -> list[bool]:
    """What devices have found out, all at once: they are waited for once, and not for each."""
    return torch.stack([one.to(answers[0].device) for one in answers]).tolist() if answers else []


# ── what rounding took away ──────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Remainder:
    """How to get from a guess to the numbers that were: up to 8 steps down or 7 up in four bits, the rest in full.

    A step leads from one bit pattern to the next, so it never changes a sign.
    """

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
        """The numbers that were, written over the guess, which is contiguous."""
        if self.places is None:
            return guess.copy_(self.numbers.view(guess.shape))
        flat = guess.view(-1)
        if self.nibbles is not None:
            pairs = self.nibbles.to(torch.int16)
            pairs.bitwise_or_(pairs << 4).bitwise_and_(0x0F0F)
            bits = flat.view(_INTEGERS[flat.element_size()])
            bits.add_(pairs.view(torch.uint8)[: flat.numel()]).sub_(_BIAS)
        flat[self.places.to(torch.int64)] = self.numbers
        return guess

    def part(self, start: int, stop: int) -> Remainder:
        """That of the flat elements start:stop; start is even, for two steps lie in a byte."""
        if self.places is None:
            return Remainder(None, None, self.numbers[start:stop])
        inside = (self.places >= start) & (self.places < stop)
        nibbles = None if self.nibbles is None else self.nibbles[start // 2 : (stop + 1) // 2]
        return Remainder(nibbles, self.places[inside] - start, self.numbers[inside])


_BIAS = 8


def remember(
    numbers: torch.Tensor, difference: torch.Tensor, magnitude: float, steps: float, scratch: Scratch
) -> Remainder:
    """The fewest bytes that give `numbers` back from a guess: only exceptions, four bits each, or all of them.

    Args:
        difference: W' − D in float64, contiguous, whose rounded value is the guess, none larger than `magnitude`.
        steps: by how much of `magnitude` the difference may be another one the next time.
    """
    flat = numbers.detach().reshape(-1)
    integers, count = _INTEGERS[flat.element_size()], flat.numel()
    if flat.dtype == torch.float64:  # summed in one order, so the guess is the same each time
        guess, shaky = difference.view(-1), torch.empty(0, dtype=torch.int64, device=flat.device)
    else:
        guess = scratch.narrow(scratch.GUESS, flat.shape)
        end = scratch.wide(scratch.SPARE, flat.shape)  # not float32: each number in doubt is kept in full
        shaky = between(difference.view(-1), magnitude, steps, end, guess, scratch)
    step = scratch.narrow(scratch.HIGH, flat.shape).view(integers)
    torch.sub(flat.view(integers), guess.view(integers), out=step)
    step.add_(_BIAS)
    other = scratch.narrow(scratch.GUESS, flat.shape).view(integers)
    moved = int(torch.bitwise_xor(step, _BIAS, out=other).count_nonzero())
    full = torch.cat([shaky, _nonzero(torch.bitwise_and(step, ~15, out=other))])
    each = 4 + flat.element_size()
    sparse, packed = each * (moved + len(shaky)), (count + 1) // 2 + each * len(full)
    if min(sparse, packed) >= count * flat.element_size():
        return Remainder(None, None, flat.clone())
    nibbles = None
    if packed < sparse:
        codes = scratch.codes(count)
        codes[:count] = step
        codes[full] = codes[count:] = _BIAS
        pairs = codes.view(torch.int16)
        nibbles = (pairs | (pairs >> 4)).to(torch.uint8)
    else:
        full = torch.cat([shaky, (step != _BIAS).nonzero().view(-1)])
    places = full.unique()
    return Remainder(nibbles, places.to(torch.int32), flat[places].clone())
