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

Where there are kernels a weight is one block (`deltas.fused_sum`), and what they have found out is read with the rest.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from lora_fx.deltas import fused_sum
from lora_fx.deltas.exact_sum import _CHUNK, ExactSum, Found, Place, block_sizes, scratches, too_large
from lora_fx.deltas.fused_sum import FOLDS, FusedSum, Looked, NoKernel
from lora_fx.deltas.remainder import Steps
from lora_fx.deltas.rounded_sum import RoundedSum
from lora_fx.deltas.rounding import Scratch, between, first_places, read
from lora_fx.deltas.triton_route import is_full
from lora_fx.errors import FoldError

_TIMES = 4  # the error
_ALWAYS = 64  # elements in doubt for which there is room in each block


Sum = ExactSum | FusedSum | RoundedSum


@dataclass(frozen=True)
class Foreseen:
    """What is to be folded, checked, and what has been found out about it."""

    sums: tuple[Sum, ...]
    founds: tuple[tuple[Found | None, ...], ...]
    """Of each sum's blocks; none where nothing has been found out."""
    scratches: dict[Place, Scratch]

    def scratch(self, k: int) -> Scratch:
        """That of sum k."""
        return self.scratches[_place(self.sums[k])]


def waits(device: torch.device) -> bool:
    """Reading a number from this device makes Python wait for all that it computes."""
    return device.type != "cpu"


def foresee(sums: Sequence[Sum], undoable: Sequence[bool]) -> Foreseen:
    """In blocks as large as there is room for, down to a row.

    Raises:
        FoldError: a number is not finite, a sum does not fit into its dtype, or there is no room for a row.
    """
    weights = _in_blocks(sums)
    sizes = block_sizes(weights)
    while True:
        try:
            return _foresee(sums, undoable, sizes)
        except NoKernel as error:
            FOLDS.refuse(error.device, error)
            sums = [
                one.plain() if isinstance(one, FusedSum) and one.weight.device == error.device else one for one in sums
            ]
            weights = _in_blocks(sums)
            smaller = block_sizes(weights)
        except Exception as error:
            if not is_full(error):
                raise
            smaller = block_sizes(weights, max(1, max(sizes.values(), default=1) // 2))
            if smaller == sizes:
                widest = max(sums, key=lambda one: one.weight[:1].numel())
                raise FoldError(
                    f"there is no room on {widest.weight.device} to fold one row: {error}",
                    place=widest.name,
                    remedy="free memory there, or move the model to another device to fold it",
                ) from error
        sizes = smaller


def _in_blocks(sums: Sequence[Sum]) -> list[torch.Tensor]:
    """The weights that are computed in a scratch."""
    return [one.weight for one in sums if not isinstance(one, FusedSum)]


def _place(one: Sum) -> Place:
    return one.weight.dtype, one.weight.device


def _foresee(sums: Sequence[Sum], undoable: Sequence[bool], sizes: dict[Place, int]) -> Foreseen:
    rooms = {place: Scratch(0, *place) for place in {_place(one) for one in sums}}
    rooms |= scratches(_in_blocks(sums), sizes)
    sweeps = _sweep(sums)
    looks: list[list[Look]] = []
    for one, back in zip(sums, undoable, strict=True):
        room = rooms[_place(one)]
        blocks = one.blocks(room.elements) if isinstance(one, ExactSum) and waits(one.weight.device) else ()
        looks.append([look(part, room, back) for part in blocks])
    asked = [one.unread for one in sums if one.unread is not None]
    blocks_know = [one.numbers for several in looks for one in several]
    answers = iter(read([*(sweep.unread for _, sweep in sweeps), *asked, *blocks_know]))
    known = {k: found for places, sweep in sweeps for k, found in zip(places, sweep.read(next(answers)), strict=True)}
    firsts = [next(answers) if one.unread is not None else [] for one in sums]
    numbers = [[next(answers) for _ in several] for several in looks]
    checked: list[Sum] = []
    parts: list[list[Part]] = []
    for k, (one, first, several, own) in enumerate(zip(sums, firsts, looks, numbers, strict=True)):
        if isinstance(one, FusedSum):
            whole, found = known[k]
            checked.append(whole)
            parts.append([Part(whole.name, whole, found)] if isinstance(whole, FusedSum) else [])
        else:
            ends = [end for block in own for end in block[2:4]]
            checked.append(one.checked(first, ends if own else None))
            parts.append([Part(one.name, a.part, a.known(b)) for a, b in zip(several, own, strict=True)])
    for place in {_place(one) for one, asked in zip(checked, sums, strict=True) if type(one) is not type(asked)}:
        weights = [one.weight for one in checked if _place(one) == place]
        rooms |= scratches(weights, block_sizes(weights, sizes.get(place)))
    founds = iter(_settle([part for several in parts for part in several]))
    return Foreseen(tuple(checked), tuple(tuple(next(founds) for _ in own) for own in parts), rooms)


def _sweep(sums: Sequence[Sum]) -> list[tuple[list[int], Looked]]:
    """The kernels of each device, with the indices of what they look at."""
    fused = {k: one for k, one in enumerate(sums) if isinstance(one, FusedSum)}
    devices = dict.fromkeys(one.weight.device for one in fused.values())
    places = [[k for k, one in fused.items() if one.weight.device == device] for device in devices]
    return [(here, fused_sum.look([fused[k] for k in here])) for here in places]


@dataclass(frozen=True)
class Part:
    """What is folded at once, and what has been found out about it; None where it asks for itself."""

    name: str
    """Of the weight."""
    sum: ExactSum | FusedSum
    found: Found | None

    @property
    def exact(self) -> ExactSum:
        return self.sum if isinstance(self.sum, ExactSum) else self.sum.exact()

    def decided(self, terms: Sequence[float]) -> list[float]:
        """The numbers to which real sums are rounded, from their terms, one sum after the other.

        Raises:
            FoldError: one does not fit into the dtype.
        """
        width, dtype = 1 + 2 * sum(delta.rank for delta in self.sum.deltas), self.sum.weight.dtype
        found = self.exact.nearest([terms[k : k + width] for k in range(0, len(terms), width)], dtype)
        if not all(map(math.isfinite, found)):
            raise too_large(self.name, dtype)
        return found


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


def _settle(parts: Sequence[Part]) -> list[Found | None]:
    """What each has to know; None where it had more in doubt than there was room for."""
    opens = [one for one in parts if one.found and len(one.found.places)]
    terms = read([one.exact.terms(one.found.places.to(torch.int64)) for one in opens if one.found])
    decided = {id(one): one.decided(own) for one, own in zip(opens, terms, strict=True)}
    values = _to_devices([decided.get(id(one), []) for one in parts], [one.sum.weight.device for one in parts])
    values = [own.to(one.sum.weight.dtype) for one, own in zip(parts, values, strict=True)]
    return [one.found and replace(one.found, settled=own) for one, own in zip(parts, values, strict=True)]


def _to_devices(lists: Sequence[list[float]], devices: Sequence[torch.device]) -> list[torch.Tensor]:
    """Numbers to their devices, in one go to each: it has nothing to do at that time, and nobody waits for it."""
    found: dict[int, torch.Tensor] = {}
    for device in set(devices):
        here = [k for k, own in enumerate(devices) if own == device]
        flat = torch.tensor([x for k in here for x in lists[k]], dtype=torch.float64).to(device, non_blocking=True)
        found |= zip(here, flat.split([len(lists[k]) for k in here]), strict=True)
    return [found[k] for k in range(len(lists))]
