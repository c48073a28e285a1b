"""Rounding a sum once, for certain.

    W' = round(W + D)                                D = Σ s·B·A in float64, within `error` of the real number

Only elements whose float64 sum lies within `error` of the border between two numbers can come out wrong: both ends of
the interval are rounded, and where that gives two numbers the element is looked at again. Asking a GPU for a number
makes Python wait until all that it was asked for before is done. So nothing in here asks, but for what says so.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from itertools import islice

import torch

_NARROW = (torch.bfloat16, torch.float16)
INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


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
        tile: elements of it that are summed at a time, at most: what is wide is for so many. None for all of them.
    """

    DELTA, TOTAL, SPARE = range(3)  # wide
    ROUNDED, BEFORE, GUESS, FAR, HIGH = range(5)  # narrow

    def __init__(self, elements: int, dtype: torch.dtype, device: torch.device, tile: int | None = None) -> None:
        self.elements, self.place, self.tile = elements, (dtype, device), min(tile or elements, elements)
        room, wide = (-(-n // 8) * 8 for n in (elements, self.tile))  # whole words, and steps are packed in pairs
        self._wide = torch.empty(3, wide, dtype=torch.float64, device=device)
        self._narrow = torch.empty(5, room, dtype=dtype, device=device)
        self._halves = self._wide[self.SPARE].view(torch.float32).view(2, -1)
        self._views: dict[tuple[torch.dtype, int, torch.Size], torch.Tensor] = {}
        self._codes = torch.empty(room, dtype=torch.uint8, device=device)

    @staticmethod
    def bytes(dtype: torch.dtype) -> int:
        """For each element of a block that is one tile."""
        return 3 * 8 + 5 * dtype.itemsize + 1

    def wide(self, which: int, shape: torch.Size) -> torch.Tensor:
        """Sums, deltas and what is spare between: float64."""
        return self._view(self._wide, which, shape)

    def narrow(self, which: int, shape: torch.Size) -> torch.Tensor:
        """Rounded numbers, what stood in the weight before, and two ends of an interval: in the weight's dtype."""
        return self._view(self._narrow, which, shape)

    def singles(self, shape: torch.Size) -> tuple[torch.Tensor, torch.Tensor]:
        """Two in float32, in the place of what is spare."""
        return self._view(self._halves, 0, shape), self._view(self._halves, 1, shape)

    def _view(self, of: torch.Tensor, which: int, shape: torch.Size) -> torch.Tensor:
        """Each is made once: there are tiles whose sums take no longer than making one."""
        found = self._views.get((of.dtype, which, shape))
        if found is None:
            found = self._views[of.dtype, which, shape] = of[which, : math.prod(shape)].view(shape)
        return found

    def codes(self, elements: int) -> torch.Tensor:
        """uint8, an even number of them."""
        return self._codes[: elements + elements % 2]


def between(
    total: torch.Tensor, error: float | torch.Tensor, low: torch.Tensor, high: torch.Tensor, scratch: Scratch
) -> torch.Tensor:
    """Write `total` − error, rounded, into `low`, and `total` + error into `high`. What comes are integers in the place
    of `high`, not zero where the two are rounded to different numbers. Everywhere else all that lies between them is
    rounded to the same, also by way of float32, which rounds in the same direction.

    float32 is faster where it does: three operations round by at most 2⁻²⁴ of what is there, and 2⁻²² are allowed.
    """
    if low.dtype in _NARROW:
        near, margin = scratch.singles(total.shape)
        near.copy_(total)
        torch.abs(near, out=margin).mul_(2.0**-22).add_(error * (1 + 2.0**-20) + 2.0**-147)
        low.copy_(near.sub_(margin))
        high.copy_(near.add_(margin, alpha=2))
    else:
        end = scratch.wide(scratch.SPARE, total.shape)
        low.copy_(torch.sub(total, error, out=end))
        high.copy_(end.add_(2 * error))
    integers = INTEGERS[low.element_size()]
    a, b = (t.view(-1).view(integers) for t in (low, high))
    return torch.bitwise_xor(a, b, out=b)


def places_of(bits: torch.Tensor) -> torch.Tensor:
    """The indices of the integers that are not zero: few, so that whole words are looked at first. It asks for their
    number."""
    per_word = 8 // bits.element_size()
    if len(bits) % per_word or bits.storage_offset() % per_word:
        return bits.nonzero().view(-1)
    words = bits.view(torch.int64).nonzero()
    places = (words * per_word + torch.arange(per_word, device=bits.device)).view(-1)
    return places[bits[places] != 0] if len(places) else places


def first_places(bits: torch.Tensor, room: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The same without asking: the first `room` of them, and how many there are. Where they are fewer, the last index
    of all stands for the rest."""
    upto = (bits != 0).cumsum(0, dtype=torch.int32)
    wanted = torch.arange(1, room + 1, dtype=torch.int32, device=bits.device)
    return torch.searchsorted(upto, wanted).clamp_(max=len(bits) - 1), upto[-1]


def nearest(x: Fraction, dtype: torch.dtype) -> float:
    """The number of the dtype that is nearest to x, the even one of two as near; Inf beyond the largest."""
    info, size = torch.finfo(dtype), abs(x)
    power = Fraction(2) ** (size.numerator.bit_length() - size.denominator.bit_length())
    power = power if power <= size else power / 2  # the largest that is no larger than x
    step = Fraction(info.eps) * max(power, Fraction(info.tiny))
    near = round(x / step) * step
    return float(near) if abs(near) <= info.max else math.copysign(math.inf, near)


def checksum(values: torch.Tensor) -> torch.Tensor:
    """A sum over the bits, modulo 2⁶⁴: different for any one changed element. It stays on the device."""
    flat = values.detach().contiguous().view(-1)
    aligned = flat.numel() * flat.element_size() % 8 == 0 and flat.storage_offset() * flat.element_size() % 8 == 0
    return flat.view(torch.int64 if aligned else INTEGERS[flat.element_size()]).sum(dtype=torch.int64)


def same(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Whether two checksums are; a model may have moved since one was taken."""
    return one == other.to(one.device)


def read(answers: Sequence[torch.Tensor]) -> list[list[float]]:
    """What devices have found out, each answer a list: every device is waited for once, and not for each."""
    found: dict[int, list[float]] = {}
    for device in {answer.device for answer in answers}:
        here = [k for k, answer in enumerate(answers) if answer.device == device]
        numbers = iter(torch.cat([answers[k].reshape(-1).to(torch.float64) for k in here]).tolist())
        found |= {k: list(islice(numbers, answers[k].numel())) for k in here}
    return [found[k] for k in range(len(answers))]
