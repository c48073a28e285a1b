"""Remembering in few bits what rounding took away.

    W' = round(W + D),    W = round(W' − D) moved by a few steps of its dtype; the steps are kept

On the way back D may be summed in another order (by another number of threads, say): the numbers of which that could
move the guess, round(W' − D), are kept in full.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lora_fx.deltas.rounding import INTEGERS, Scratch, between, first_places, places_of

_BIAS = 8


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
            bits = flat.view(INTEGERS[flat.element_size()])
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


@dataclass(frozen=True)
class Steps:
    """From each guess to the number that was, of one block: in a scratch, until the next one is computed there."""

    numbers: torch.Tensor
    """Those that were, flat."""
    steps: torch.Tensor
    """Biased."""
    moved: torch.Tensor
    """Integers, not zero where there is a step to be kept, or a number in full."""
    far: torch.Tensor
    """Not zero where the number is to be kept in full: it is more steps away than four bits hold, or in doubt."""

    @staticmethod
    def room(numbers: torch.Tensor, scratch: Scratch) -> Steps:
        """For those of a block, before any is taken."""
        flat = numbers.detach().reshape(-1)
        integers = INTEGERS[flat.element_size()]
        which = (scratch.BEFORE, scratch.GUESS, scratch.FAR)
        return Steps(flat, *(scratch.narrow(w, flat.shape).view(integers) for w in which))

    def take(self, rows: slice, difference: torch.Tensor, error: float | torch.Tensor, scratch: Scratch) -> None:
        """The steps of some of the block's rows.

        Args:
            difference: W' − D in float64, contiguous, whose rounded value is the guess.
            error: by how much the difference may be another one the next time.
        """
        width = difference[0].numel()
        some = slice(rows.start * width, rows.stop * width)
        numbers, steps, moved, far = (t[some] for t in (self.numbers, self.steps, self.moved, self.far))
        if numbers.dtype == torch.float64:  # summed in one order, so the guess is the same each time
            guess = difference.view(-1)
            far.zero_()
        else:
            guess = moved.view(numbers.dtype)
            between(difference.view(-1), error, guess, far.view(numbers.dtype), scratch)
        torch.sub(numbers.view(far.dtype), guess.view(far.dtype), out=steps)
        steps.add_(_BIAS)
        far.bitwise_or_(torch.bitwise_and(steps, ~15, out=moved))
        torch.bitwise_xor(steps, _BIAS, out=moved).bitwise_or_(far)

    def keep_in_full(self, places: torch.Tensor) -> None:
        """The numbers at these flat indices, whichever step leads to them."""
        for bits in (self.moved, self.far):
            bits.index_fill_(0, places, 1)

    def count(self) -> tuple[torch.Tensor, torch.Tensor]:
        """How many are moved, and how many far."""
        return self.moved.count_nonzero(), self.far.count_nonzero()

    def kept(self, counts: tuple[int, int] | None, scratch: Scratch) -> Remainder:
        """The fewest bytes that give the numbers back: only exceptions, four bits each, or all of them.

        Args:
            counts: of those that are moved and far, or more; None asks for them.
        """
        count, each = len(self.numbers), 4 + self.numbers.element_size()
        full = None
        if counts is None:
            full = places_of(self.far)
            counts = int(self.moved.count_nonzero()), len(full)
        moved, far = counts
        sparse, packed = each * moved, (count + 1) // 2 + each * far
        if min(sparse, packed) >= count * self.numbers.element_size():
            return Remainder(None, None, self.numbers.clone())
        if sparse <= packed:
            places, nibbles = first_places(self.moved, moved)[0] if full is None else places_of(self.moved), None
        else:
            places = first_places(self.far, far)[0] if full is None else full
            nibbles = self._packed(places, scratch)
        return Remainder(nibbles, places.to(torch.int32), self.numbers[places])

    def _packed(self, without: torch.Tensor, scratch: Scratch) -> torch.Tensor:
        """Two steps in a byte; none where the number is kept in full."""
        codes = scratch.codes(len(self.steps))
        codes[: len(self.steps)] = self.steps
        codes[len(self.steps) :] = _BIAS
        codes.index_fill_(0, without, _BIAS)
        pairs = codes.view(torch.int16)
        return (pairs | (pairs >> 4)).to(torch.uint8)
