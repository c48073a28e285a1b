"""What a fold has to know before it writes, found out by the devices, and asked for all at once.

Reading a number makes Python wait until a GPU has done all that it was asked for before, and a fold of many blocks that
reads in each of them waits in each. So weights on such a device are looked at first, block by block, and nothing is
written. Then there are two reads, whatever the number of blocks and weights (two for each device, on several):

1. how many elements are in doubt and how many numbers have to be kept; and whether everything is finite and fits;
2. where float64 cannot decide, what those few sums are made of, to sum them as fractions.

When the blocks are folded they are computed once more, and a sum may then come out another one, by twice its error at
most. Whatever is in doubt at that time has been in doubt here, where `_TIMES` as much is allowed for. A block that has
more in doubt than there was room for asks for itself, when its turn comes. So does every block on a CPU, where asking
costs nothing, and computing a second time would.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from lora_fx.deltas.exact_sum import _CHUNK, ExactSum, Found, Place, block_sizes, scratches
from lora_fx.deltas.remainder import Steps
from lora_fx.deltas.rounded_sum import RoundedSum
from lora_fx.deltas.rounding import Scratch, between, first_places, read
from lora_fx.errors import FoldError

_TIMES = 4  # the error
_ALWAYS = 64  # elements in doubt for which there is room in each block


@dataclass(frozen=True)
class Foreseen:
    """What is to be folded, checked, and what has been found out about it."""

    sums: tuple[ExactSum | RoundedSum, ...]
    founds: tuple[tuple[Found | None, ...], ...]
    """Of each sum's blocks; none where nothing has been found out."""
    scratches: dict[Place, Scratch]

    def scratch(self, k: int) -> Scratch:
        """That of sum k."""
        return self.scratches[_place(self.sums[k])]


def waits(device: torch.device) -> bool:
    """Reading a number from this device makes Python wait for all that it computes."""
    return device.type != "cpu"


def foresee(sums: Sequence[ExactSum | RoundedSum], undoable: Sequence[bool]) -> Foreseen:
    """In blocks as large as there is room for, down to a row.

    Raises:
        FoldError: a number is not finite, a sum does not fit into its dtype, or there is no room for a row.
    """
    weights = [one.weight for one in sums]
    sizes = block_sizes(weights)
    while True:
        try:
            return _foresee(sums, undoable, sizes)
        except Exception as error:
            if not _is_full(error):
                raise
            smaller = block_sizes(weights, max(1, max(sizes.values()) // 2))
            if smaller == sizes:
                widest = max(sums, key=lambda one: one.weight[:1].numel())
                raise FoldError(
                    f"there is no room on {widest.weight.device} to fold one row: {error}",
                    place=widest.name,
                    remedy="free memory there, or move the model to another device to fold it",
                ) from error
        sizes = smaller


def _is_full(error: Exception) -> bool:
    """A CPU has no error of its own for that."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)


def _place(one: ExactSum | RoundedSum) -> Place:
    return one.weight.dtype, one.weight.device


def _foresee(sums: Sequence[ExactSum | RoundedSum], undoable: Sequence[bool], sizes: dict[Place, int]) -> Foreseen:
    rooms = scratches([one.weight for one in sums], sizes)
    looks: list[list[Look]] = []
    for one, back in zip(sums, undoable, strict=True):
        room = rooms[_place(one)]
        blocks = one.blocks(room.elements) if isinstance(one, ExactSum) and waits(one.weight.device) else ()
        looks.append([look(part, room, back) for part in blocks])
    asked = [one.unread for one in sums if one.unread is not None]
    answers = iter(read([*asked, *(one.numbers for several in looks for one in several)]))
    firsts = [next(answers) for _ in sums]
    numbers = [[next(answers) for _ in several] for several in looks]
    checked = []
    for one, first, own in zip(sums, firsts, numbers, strict=True):
        ends = [end for block in own for end in block[2:4]]
        checked.append(one.checked(first, ends if own else None))
    known = [look for several in looks for look in several]
    founds = iter(_settle(known, [block for own in numbers for block in own]))
    return Foreseen(tuple(checked), tuple(tuple(next(founds) for _ in own) for own in numbers), rooms)


# ── one block ────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Look:
    """What a device has found out about a block, and nobody has read."""

    part: ExactSum
    numbers: torch.Tensor
    """How many elements are in doubt; how many of them float64 cannot decide; the least and the largest sum; and for a
    fold that can be undone how many numbers are moved, and far (`Steps`)."""
    room: int
    """For so many elements in doubt."""
    places: torch.Tensor
    """Flat indices of those that float64 cannot decide, as many as there is room for."""

    def known(self, numbers: Sequence[float]) -> Found | None:
        """With its numbers read, but nothing settled; None where there was not room enough."""
        doubtful, open_, *steps = (int(n) for n in (*numbers[:2], *numbers[4:]))
        if doubtful > self.room or open_ > len(self.places):
            return None
        counts = (steps[0] + doubtful, steps[1] + doubtful) if steps else None  # what is in doubt is kept in full
        return Found(doubtful, self.places[:open_], self.places.new_empty(0), counts)


def look(part: ExactSum, scratch: Scratch, undoable: bool) -> Look:
    ((rows, tile),) = part.tiles(part.weight.numel())
    total, delta = tile.sums(scratch, undoable)
    rounded = scratch.narrow(scratch.ROUNDED, total.shape)
    room = min(total.numel(), _ALWAYS + total.numel() // 256)
    places, counts = _in_doubt(part, total, rounded, room, scratch)
    numbers = [*counts, *rounded.aminmax()]
    if undoable:
        assert delta is not None
        steps = Steps.room(part.weight, scratch)
        steps.take(rows, total.copy_(rounded).sub_(delta), 2 * part.apart, scratch)
        numbers += steps.count()
    return Look(part, torch.stack([n.to(torch.float64) for n in numbers]), room, places)


def _in_doubt(
    part: ExactSum, total: torch.Tensor, rounded: torch.Tensor, room: int, scratch: Scratch
) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
    """Write `rounded`, but for what float64 cannot decide: where that is; and how many are in doubt, and open still."""
    if rounded.dtype == torch.float64:
        rounded.copy_(total)
        none = torch.zeros((), device=total.device)
        return torch.zeros(0, dtype=torch.int64, device=total.device), (none, none)
    flat, high = rounded.view(-1), scratch.narrow(scratch.HIGH, total.shape)
    places, count = first_places(between(total, _TIMES * part.error, rounded, high, scratch), room)
    opens = []
    for some in places.split(_CHUNK):
        flat[some], open_ = part.decided(some, rounded.dtype, _TIMES)
        opens.append(open_)
    inside = torch.arange(room, device=total.device) < count
    which, opened = first_places(torch.cat(opens) & inside, min(room, _ALWAYS + total.numel() // 2**13))
    return places[which], (count, opened)


def _settle(looks: Sequence[Look], numbers: Sequence[Sequence[float]]) -> list[Found | None]:
    """What each block has to know; None where it had more in doubt than there was room for."""
    known = [one.known(own) for one, own in zip(looks, numbers, strict=True)]
    rows = iter(
        read([one.part.terms(own.places) for one, own in zip(looks, known, strict=True) if own and len(own.places)])
    )
    decided = [
        _decide(one.part, next(rows)) if own and len(own.places) else [] for one, own in zip(looks, known, strict=True)
    ]
    values = _to_devices(decided, [one.part.weight.device for one in looks])
    return [replace(own, settled=each) if own else None for own, each in zip(known, values, strict=True)]


def _decide(part: ExactSum, terms: Sequence[float]) -> list[float]:
    """The numbers to which real sums are rounded, from their terms, one sum after the other."""
    width = 1 + 2 * sum(delta.rank for delta in part.deltas)
    return part.nearest([terms[k : k + width] for k in range(0, len(terms), width)], part.weight.dtype)


def _to_devices(lists: Sequence[list[float]], devices: Sequence[torch.device]) -> list[torch.Tensor]:
    """Numbers to their devices, in one go to each: it has nothing to do at that time, and nobody waits for it."""
    found: dict[int, torch.Tensor] = {}
    for device in set(devices):
        here = [k for k, own in enumerate(devices) if own == device]
        flat = torch.tensor([x for k in here for x in lists[k]], dtype=torch.float64).to(device, non_blocking=True)
        found |= zip(here, flat.split([len(lists[k]) for k in here]), strict=True)
    return [found[k] for k in range(len(lists))]
