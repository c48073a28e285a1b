"""How a weight's axes split into the two factors of its delta, and what a view of the weight sees of each factor.

    delta[b…, o…, i…] = scale · Σ_r B[b…, o…, r] · A[b…, r, i…]      permuted into the weight's own axes

A `Linear` weight (out, in) has the layout ``oi``; transformers' `Conv1D` (in, out) ``io``; experts (E, out, in)
``boi``; a convolution (out, in, kh, kw) ``oiii``; an einsum weight (in, heads, dim) ``ioo``.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Any

import torch

from lora_fx.graph.views import View, contiguous_strides


@dataclass(frozen=True)
class Axis:
    """Neighbouring weight axes of one side, seen as one."""

    side: str
    size: int
    stride: int


@dataclass(frozen=True)
class Layout:
    """The side (``b``, ``o`` or ``i``) of each axis of a weight of this shape."""

    sides: str
    shape: tuple[int, ...]

    def __post_init__(self) -> None:
        assert len(self.sides) == len(self.shape) and "o" in self.sides, (self.sides, self.shape)

    @cached_property
    def axes(self) -> tuple[Axis, ...]:
        axes, stride = [], 1
        pairs = list(zip(self.sides, self.shape, strict=True))
        for side, group in itertools.groupby(reversed(pairs), key=lambda pair: pair[0]):
            size = math.prod(n for _, n in group)
            axes.append(Axis(side, size, stride))
            stride *= size
        return tuple(reversed(axes))

    def of(self, sides: str) -> list[int]:
        """The axes of these sides."""
        return [k for k, axis in enumerate(self.axes) if axis.side in sides]

    def size(self, side: str) -> int:
        return math.prod([axis.size for axis in self.axes if axis.side == side])  # a list, which Dynamo can trace

    @property
    def batch(self) -> tuple[int, ...]:
        return tuple(axis.size for axis in self.axes if axis.side == "b")

    def shape_of(self, factor: str, rank: int) -> tuple[int, ...]:
        """The shape of A: (b…, rank, in) or of B: (b…, out, rank)."""
        last = (rank, self.size("i")) if factor == "A" else (self.size("o"), rank)
        return (*self.batch, *last)

    def delta(self, A: torch.Tensor, B: torch.Tensor) -> torch.Tensor:
        """B·A in the weight's own shape (not yet scaled), computed the way round in which the weight lies."""
        if next(side for side in self.sides if side != "b") == "i":
            return self.to_weight(A.transpose(-2, -1) @ B.transpose(-2, -1), "bio")
        return self.to_weight(B @ A)

    def to_weight(self, matrix: torch.Tensor, order: str = "boi") -> torch.Tensor:
        """A matrix (b…, out, in), or of another order, in the weight's own axes; a view where strides allow it."""
        axes = [k for side in order for k in self.of(side)]
        grouped = matrix.reshape([self.axes[k].size for k in axes])
        return grouped.permute([axes.index(k) for k in range(len(axes))]).reshape(self.shape)

    def to_matrix(self, weight: torch.Tensor) -> torch.Tensor:
        """The weight as (batch…, out, in), a bias as (out, 1); a view where strides allow it. `to_weight` undoes it."""
        grouped = weight.reshape([axis.size for axis in self.axes]).permute(self.of("b") + self.of("o") + self.of("i"))
        return grouped.reshape(*self.batch, self.size("o"), self.size("i"))

    def picked(self, count: int | None) -> Layout:
        """The layout of some of the experts along the first axis; of one of them, without that axis, for None."""
        first, *rest = self.axes
        if count is None:
            few, axes = Layout(self.sides[1:], self.shape[1:]), tuple(rest)
        else:
            few, axes = Layout(self.sides, (count, *self.shape[1:])), (replace(first, size=count), *rest)
        object.__setattr__(few, "axes", axes)  # a cached_property, whose lock Dynamo cannot enter
        return few

    def locate(self, flat: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(batch, out, in) index of elements of the weight, each flattened over its own axes."""
        found = []
        for side in "boi":
            index = None
            for axis in (self.axes[k] for k in self.of(side)):
                own = flat if axis.stride == 1 else flat // axis.stride
                if axis is not self.axes[0]:
                    own = own % axis.size
                index = own if index is None else index * axis.size + own
            found.append(torch.zeros_like(flat) if index is None else index)
        return found[0], found[1], found[2]


def infer(shape: Sequence[int], view: View, sides: str) -> Layout | None:
    """The layout of a weight of `shape` from one use that reads it through `view` with these operand sides."""
    shape = tuple(shape)
    found: list[str | None] = [None] * len(shape)
    strides = contiguous_strides(shape)
    for size, stride, side in zip(view.shape, view.strides, sides, strict=True):
        if size == 1 or stride == 0:
            continue
        extent = stride * (size - 1)
        for k, (n, s) in enumerate(zip(shape, strides, strict=True)):
            if n > 1 and stride < s * n and extent >= s:  # the axis moves within or across weight axis k
                if found[k] not in (None, side):
                    return None
                found[k] = side
    if view.shape == shape:
        found = [side if was is None else was for was, side in zip(found, sides, strict=True)]
    for k, n in enumerate(shape):  # an axis that the view fixed is a batch axis; one of size 1 is what is missing
        if found[k] is None:
            found[k] = "b" if n > 1 else next((s for s in "oi" if s not in found), "b")
    return Layout("".join(s or "b" for s in found), shape) if {"o", "i"} <= set(found) else None


def default(shape: Sequence[int]) -> Layout:
    """(out, in…): what dense-only ops such as an LSTM hold."""
    return Layout("o" + "i" * (len(shape) - 1), tuple(shape))


@dataclass(frozen=True)
class Piece:
    """One operand axis: `size` steps of `step` along layout axis `axis`."""

    axis: int
    size: int
    step: int
    position: int


@dataclass(frozen=True)
class Placement:
    """Which slice of A and of B a view of the weight sees, so that the branch can be computed without the delta."""

    layout: Layout
    starts: tuple[int, ...]
    pieces: tuple[Piece, ...]
    sides: str
    view: View
    swapped: bool
    """The use contracts the layout's ``o`` side (a tied head beside its embedding): A and B change places."""

    def down(self, A: Any, B: Any) -> Any:
        """The factor that is contracted with x: (b…, rank, i…)."""
        return self._factor(B.transpose(-2, -1), "o", "i") if self.swapped else self._factor(A, "i", "i")

    def up(self, A: Any, B: Any) -> Any:
        """The factor that makes the output: (b…, o…, rank)."""
        if not self.swapped and self._whole("o"):
            return B
        factor = self._factor(A, "i", "o") if self.swapped else self._factor(B.transpose(-2, -1), "o", "o")
        return factor.movedim(self.sides.count("b"), sum(side in "bo" for side in self.sides))  # the rank comes last

    @property
    def is_whole(self) -> bool:
        """The view reads both factors as they lie."""
        return not self.swapped and self._whole("i") and self._whole("o")

    def rows(self) -> list[int]:
        """For each feature the use puts out (row-major over its ``o`` axes): the index along the layout's out side."""
        axes = zip(self.sides, self.view.shape, self.view.strides, strict=True)
        steps = [range(0, n * stride, stride) if stride else [0] * n for side, n, stride in axes if side == "o"]
        firsts = [self.view.offset + sum(each) for each in itertools.product(*steps)]
        _, out, inner = self.layout.locate(torch.tensor(firsts, device="cpu"))
        return (inner if self.swapped else out).tolist()

    def _whole(self, side: str) -> bool:
        """The view reads this side as it lies: no slicing, no splitting, no batch to move."""
        axes = self.layout.of(side + "b")
        pieces = [p for p in self.pieces if p.axis in axes]
        return (
            [p.axis for p in pieces] == axes
            and [p.position for p in pieces] == [k for k, s in enumerate(self.sides) if s in (side, "b")]
            and all(p.size == self.layout.axes[p.axis].size and p.step == 1 for p in pieces)
            and len(self.layout.of(side)) == 1
        )

    def _factor(self, factor: Any, layout_side: str, form_side: str) -> Any:
        """`factor` is (b…, rank, n): its n axis split, sliced and ordered as the operand's `form_side` axes are."""
        if self._whole(layout_side) and not self.swapped:
            return factor
        own = self.layout.of(layout_side)
        if len(own) > 1:
            factor = factor.unflatten(-1, [self.layout.axes[k].size for k in own])
        where: list[int | None] = []  # operand position of each remaining dim of `factor`; the rank's is None
        for k in self.layout.of("b"):
            factor, positions = self._take(factor, len(where), k)
            where += positions
        where.append(None)
        for k in own:
            factor, positions = self._take(factor, len(where), k)
            where += positions
        batch, rest = ([p for p, s in enumerate(self.sides) if s == side] for side in ("b", form_side))
        wanted = [*batch, None, *rest]
        order = [where.index(p) for p in wanted if p in where]
        if order != sorted(order):
            factor = factor.permute(order)
        for at, p in enumerate(wanted):  # operand axes of size 1, and broadcast batch axes
            if p not in where:
                factor = factor.unsqueeze(at)
        return factor

    def _take(self, factor: Any, dim: int, k: int) -> tuple[Any, list[int]]:
        """Slice dim `dim` of `factor`, which is layout axis k, into the operand axes that read it."""
        pieces = sorted((p for p in self.pieces if p.axis == k), key=lambda p: -p.step)
        start, size = self.starts[k], self.layout.axes[k].size
        if not pieces:
            return (factor.select(dim, start), []) if size > 1 else (factor.squeeze(dim), [])
        at = dim
        *outer, last = pieces
        for piece in outer:
            factor = factor.unflatten(at, (size // piece.step, piece.step))
            first, start = divmod(start, piece.step)
            if (first, piece.size) != (0, size // piece.step):
                factor = factor.narrow(at, first, piece.size)
            size, at = piece.step, at + 1
        stop = start + last.step * (last.size - 1) + 1
        if (start, stop, last.step) != (0, size, 1):
            factor = factor[(slice(None),) * at + (slice(start, stop, last.step),)]
        return factor, [p.position for p in pieces]


@lru_cache(maxsize=4096)
def place(layout: Layout, view: View, sides: str) -> Placement | None:
    """How a use with these operand `sides` reads the factors through `view`; None where only the dense delta serves."""
    rest, starts = view.offset, []
    for axis in layout.axes:
        starts.append(rest // axis.stride)
        rest %= axis.stride
    pieces = []
    for position, (size, stride) in enumerate(zip(view.shape, view.strides, strict=True)):
        if size == 1:
            continue
        if stride == 0:
            if sides[position] != "b":
                return None
            continue
        k = next(k for k, axis in enumerate(layout.axes) if axis.stride <= stride)
        if stride % layout.axes[k].stride:
            return None
        pieces.append(Piece(k, size, stride // layout.axes[k].stride, position))
    if not all(_nests(layout.axes[k], starts[k], [p for p in pieces if p.axis == k]) for k in range(len(layout.axes))):
        return None
    pairs = {layout.axes[p.axis].side + sides[p.position] for p in pieces}
    if all(pair[0] == "b" for pair in pairs):  # in and out are of size 1: each stands for the operand's axis of size 1
        pairs |= {"oo", "ii"} if {"o", "i"} <= set(sides) else {"no axis"}
    for swapped, allowed in ((False, {"oo", "ii", "bb"}), (True, {"oi", "io", "bb"})):
        if pairs <= allowed:
            return Placement(layout, tuple(starts), tuple(pieces), sides, view, swapped)
    return None


def _nests(axis: Axis, start: int, pieces: list[Piece]) -> bool:
    """The operand axes that read one layout axis split it evenly, outer to inner, without crossing over."""
    if not pieces:
        return True
    size = axis.size
    *outer, last = sorted(pieces, key=lambda p: -p.step)
    for piece in outer:
        if size % piece.step or start // piece.step + piece.size > size // piece.step:
            return False
        size, start = piece.step, start % piece.step
    return start + last.step * (last.size - 1) < size
