"""Movement ops as stride arithmetic: where each element of a view of a weight sits in the weight.

    W.t()[:, 8:16]   =   View(shape=(in, 8), strides=(1, in), offset=8 * in)     of W: (out, in)

Pure Python integers, so that it means the same under eager, `torch.fx`, Dynamo and on `meta`.
A movement op that needs a copy to express (a reshape across permuted axes) is not a view: None.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True)
class View:
    """`shape`, `strides` and `offset` in elements of the contiguous weight it looks into."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int = 0

    @staticmethod
    def of(shape: Sequence[int]) -> View:
        shape = tuple(int(n) for n in shape)
        return View(shape, contiguous_strides(shape))

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def dim(self, d: int) -> int:
        return d % self.ndim if self.ndim else 0

    def permute(self, dims: Sequence[int]) -> View:
        dims = [self.dim(d) for d in dims]
        return View(tuple(self.shape[d] for d in dims), tuple(self.strides[d] for d in dims), self.offset)

    def transpose(self, dim0: int, dim1: int) -> View:
        dims = list(range(self.ndim))
        dims[dim0], dims[dim1] = dims[dim1], dims[dim0]
        return self.permute(dims)

    def slice(self, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1) -> View:
        d = self.dim(dim)
        start, stop, step = slice(start, end, step).indices(self.shape[d])
        shape, strides = list(self.shape), list(self.strides)
        shape[d], strides[d] = len(range(start, stop, step)), strides[d] * step
        return View(tuple(shape), tuple(strides), self.offset + start * self.strides[d])

    def select(self, dim: int, index: int) -> View:
        d = self.dim(dim)
        offset = self.offset + (index % self.shape[d]) * self.strides[d]
        return replace(self, offset=offset).permute([k for k in range(self.ndim) if k != d])

    def movedim(self, source: Any, destination: Any) -> View:
        source, destination = _sizes(source), _sizes(destination)
        order = [d for d in range(self.ndim) if d not in [self.dim(s) for s in source]]
        for d, s in sorted((self.dim(d), self.dim(s)) for s, d in zip(source, destination, strict=True)):
            order.insert(d, s)
        return self.permute(order)

    def unsqueeze(self, dim: int) -> View:
        d = dim % (self.ndim + 1)
        return View((*self.shape[:d], 1, *self.shape[d:]), (*self.strides[:d], 0, *self.strides[d:]), self.offset)

    def squeeze(self, dims: Sequence[int] | None = None) -> View:
        gone = range(self.ndim) if dims is None else [self.dim(d) for d in dims]
        kept = [d for d in range(self.ndim) if not (d in gone and self.shape[d] == 1)]
        return self.permute(kept)

    def expand(self, sizes: Sequence[int]) -> View:
        new = len(sizes) - self.ndim
        shape = [1] * new + list(self.shape)
        strides = [0] * new + list(self.strides)
        for d, size in enumerate(sizes):
            if size not in (-1, shape[d]):
                shape[d], strides[d] = size, 0
        return View(tuple(shape), tuple(strides), self.offset)

    def split(self, size: int | Sequence[int], dim: int = 0) -> tuple[View, ...]:
        total = self.shape[self.dim(dim)]
        sizes = [size] * -(-total // size) if isinstance(size, int) else list(size)
        return tuple(self.slice(dim, sum(sizes[:k]), sum(sizes[: k + 1])) for k in range(len(sizes)))

    def unbind(self, dim: int = 0) -> tuple[View, ...]:
        return tuple(self.select(dim, k) for k in range(self.shape[self.dim(dim)]))

    def reshape(self, shape: Sequence[int]) -> View | None:
        """The same elements under another shape, or None where that needs a copy."""
        shape = list(shape)
        if -1 in shape:
            known = math.prod(n for n in shape if n != -1)
            shape[shape.index(-1)] = math.prod(self.shape) // max(known, 1)
        if 0 in shape:  # no element, and no place in memory
            return View(tuple(shape), (0,) * len(shape), self.offset) if 0 in self.shape else None
        old = [(n, s) for n, s in zip(self.shape, self.strides, strict=True) if n != 1]
        strides: list[int] = []
        i, left, step = 0, 1, 0  # walk the old axes from the right, splitting and merging them
        old.reverse()
        for size in reversed(shape):
            if size == 1:
                strides.append(0)
                continue
            if left == 1:
                if i == len(old):
                    return None
                left, step = old[i]
                i += 1
            while left % size and i < len(old) and old[i][1] == step * left:
                left *= old[i][0]
                i += 1
            if left % size:
                return None
            strides.append(step)
            left, step = left // size, step * size
        return View(tuple(shape), tuple(reversed(strides)), self.offset) if left == 1 and i == len(old) else None

    def flatten(self, start_dim: int = 0, end_dim: int = -1) -> View | None:
        a, b = self.dim(start_dim), self.dim(end_dim)
        return self.reshape([*self.shape[:a], math.prod(self.shape[a : b + 1]), *self.shape[b + 1 :]])

    def unflatten(self, dim: int, sizes: Sequence[int]) -> View | None:
        d = self.dim(dim)
        return self.reshape([*self.shape[:d], *sizes, *self.shape[d + 1 :]])  # a -1 among them is what the others leave

    def index(self, key: Any) -> View | None:
        """`view[key]` for integers, slices, None and Ellipsis; None for anything that gathers."""
        keys = list(key) if isinstance(key, tuple) else [key]
        if not all(k is None or k is Ellipsis or isinstance(k, int | slice) for k in keys):
            return None
        if any(isinstance(k, bool) for k in keys):
            return None
        taken = sum(k is not None and k is not Ellipsis for k in keys)
        if Ellipsis in keys:
            at = keys.index(Ellipsis)
            keys[at : at + 1] = [slice(None)] * (self.ndim - taken)
        view, d = self, 0
        for k in keys:
            if isinstance(k, int):
                view = view.select(d, k)
                continue
            view = view.unsqueeze(d) if k is None else view.slice(d, k.start, k.stop, k.step or 1)
            d += 1
        return view


def contiguous_strides(shape: Sequence[int]) -> tuple[int, ...]:
    return tuple(math.prod(shape[d + 1 :]) for d in range(len(shape)))


def _sizes(*args: Any) -> list[int]:
    flat = args[0] if len(args) == 1 and isinstance(args[0], list | tuple) else args
    return [int(n) for n in flat]


def _of_sizes(rule: Callable[[View, list[int]], Any]) -> Callable[..., Any]:
    """`f(x, 2, 3)`, `f(x, (2, 3))` and `f(x, size=(2, 3))` mean the same."""
    return lambda v, *sizes, **named: rule(v, _sizes(*(sizes or named.values())))


#: movement op → the view it gives. The names are torch's own, the same for functions, methods, properties and ATen.
MOVES: dict[str, Callable[..., View | tuple[View, ...] | None]] = {
    **dict.fromkeys(("t", "T", "numpy_T", "H"), lambda v: v.permute(range(v.ndim)[::-1])),
    **dict.fromkeys(("mT", "mH", "adjoint"), lambda v: v.transpose(-2, -1)),
    **dict.fromkeys(("view", "reshape", "_unsafe_view"), _of_sizes(View.reshape)),
    **dict.fromkeys(("unbind", "__iter__"), View.unbind),
    "transpose": View.transpose, "swapaxes": View.transpose, "swapdims": View.transpose,
    "permute": _of_sizes(View.permute), "movedim": View.movedim, "moveaxis": View.movedim,
    "select": View.select, "slice": View.slice, "getitem": View.index, "__getitem__": View.index,
    "narrow": lambda v, dim, start, length: v.slice(dim, start, start + length),
    "unsqueeze": View.unsqueeze, "squeeze": lambda v, dim=None: v.squeeze(None if dim is None else _sizes(dim)),
    "expand": _of_sizes(View.expand), "chunk": lambda v, chunks, dim=0: v.split(-(-v.shape[v.dim(dim)] // chunks), dim),
    "split": View.split, "split_with_sizes": View.split, "flatten": View.flatten, "unflatten": View.unflatten,
}  # fmt: skip

#: ops that may give the same elements in another dtype or place
CASTS = frozenset({"to", "_to_copy", "float", "double", "half", "bfloat16", "type", "type_as", "cpu", "cuda"})

#: ops that give the same elements
COPIES = CASTS | frozenset({
    "contiguous", "clone", "alias", "lift_fresh", "lift_fresh_copy", "detach", "detach_", "data", "requires_grad_",
})  # fmt: skip


def move(name: str, view: View, args: Sequence[Any], kwargs: dict[str, Any]) -> View | tuple[View, ...] | None:
    """What the op called `name` makes of `view`; None if it is no view of the same weight."""
    if name in COPIES:
        return view
    rule = MOVES.get(name)
    if rule is None:
        return None
    try:
        return rule(view, *args, **kwargs)
    except (TypeError, ValueError, IndexError, AttributeError):  # arguments that are no plain integers: a gather
        return None
