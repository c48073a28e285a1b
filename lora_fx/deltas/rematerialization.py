"""What autograd keeps anyway is not kept a second time.

The input of an adapted matmul is often a product: of a norm's weight and what it normalised, of a gate and what it lets
through; or dropout made it, of its mask and of what the branch reads beside. The multiplication keeps its operands for
a backward of its own. So the branch keeps those, which takes no memory, and multiplies them again in its backward: to
the same bits, because it is the same operation on them. (Of torch's own dropout on a GPU but for the last bit of the
number that it scales with, which it takes once from the probability in float32, once in float64.)
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from operator import itemgetter
from typing import Any

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from lora_fx.deltas.triton_route import BRANCHES

_DEPTH = 4  # operations: deeper ones cost more time than they are worth memory
_SHARED = "lora_fx: the product, made again"
_Make = Callable[[Sequence[torch.Tensor]], torch.Tensor]


@dataclass
class _Shared:
    """One product that several branches read: made once in a backward, dropped by the last of them."""

    users: int = 0
    left: int = 0
    value: torch.Tensor | None = None


@dataclass(frozen=True)
class Recipe:
    """How to make a tensor again from others that autograd keeps."""

    operands: tuple[torch.Tensor, ...]
    make: _Make = field(repr=False)
    shape: torch.Size
    shared: _Shared

    def again(self, operands: Sequence[torch.Tensor]) -> torch.Tensor:
        """The tensor, from the operands as autograd gives them back."""
        if torch.is_grad_enabled():  # create_graph=True: each user's own, a part of its graph
            return self.make(operands).reshape(self.shape)
        shared = self.shared
        if shared.value is None:
            value = _in_one_pass(self.make, operands)
            shared.value, shared.left = self.make(operands) if value is None else value, shared.users
        value = shared.value.reshape(self.shape)
        shared.left -= 1
        if shared.left == 0:
            shared.value = None
        return value


def recipe(tensor: torch.Tensor, reader: torch.Tensor, source: torch.Tensor | None = None) -> Recipe | None:
    """How autograd can make this tensor again from what it keeps; None where it is no product, or packs what it keeps.

    A node that was freed, or whose operands or result were written to since, gives None, too: see `_is_still`.

    Args:
        reader: a factor of the branch that reads it.
        source: what dropout may have made it of: a tensor that is kept besides, unless it can be made again itself.
    """
    node = tensor.grad_fn
    if node is None or torch._C._autograd._top_saved_tensors_default_hooks(True) is not None:
        return None
    if tensor._version:  # written to without gradients, as its node is that of a product still
        return None
    while node is not None and node.name() in ("ViewBackward0", "UnsafeViewBackward0"):
        node = node.next_functions[0][0]  # type: ignore[assignment]
    operands: list[torch.Tensor] = []
    try:
        make = _masked(node, operands, reader, source)
        is_drop = make is not None  # by our own dropout, whose result nobody else has seen
        make = make or _product(node, operands, _DEPTH)
    except RuntimeError:
        return None
    if make is None or any(t.device != tensor.device for t in operands):
        return None
    shared = node.metadata.setdefault(_SHARED, _Shared())  # type: ignore[union-attr]
    if not (shared.users or is_drop or _is_still(tensor, make, operands, reader)):
        return None
    shared.users += 1
    return Recipe(tuple(operands), make, tensor.shape, shared)


@torch.no_grad()
def _is_still(tensor: torch.Tensor, make: _Make, operands: Sequence[torch.Tensor], reader: torch.Tensor) -> bool:
    """Whether the tensor is what its operands make, to the bit. A write to its ``.data``, or one without gradients to a
    product before it, moves no version counter that could be asked.

    By the first branch that reads it: a later write breaks the gradients of this one in torch, too. On a GPU, which has
    to be waited for, that is found out once for each reader: what a forward does to its products it does each time.
    """
    if tensor.is_meta:
        return True
    if _is_at_hand(tensor.device):
        return torch.equal(make(operands).reshape(tensor.shape), tensor)
    if reader not in _found_out:
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            return False
        _found_out[reader] = torch.equal(make(operands).reshape(tensor.shape), tensor)
    return _found_out[reader]


def _is_at_hand(device: torch.device) -> bool:
    return device.type == "cpu"


#: factor → what `_is_still` has found out for its branch
_found_out: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def pack(tensors: Sequence[Any], source: torch.Tensor, reader: torch.Tensor) -> tuple[list[Any], list[Recipe | None]]:
    """What to save in the place of these tensors (or None), and how `unpack` makes them again from that.

    Args:
        reader: a factor of the branches that read them.
        source: what dropout made all of them of but the first.
    """
    recipes = [None if t is None else recipe(t, reader, source if k else None) for k, t in enumerate(tensors)]
    saved: list[Any] = []
    for tensor, found in zip(tensors, recipes, strict=True):
        saved += [tensor] if found is None else found.operands
    return saved, recipes


def unpack(saved: Iterator[Any], recipes: Sequence[Recipe | None]) -> list[Any]:
    """The tensors that were packed, from the next ones of `saved`."""
    return [next(saved) if r is None else r.again([next(saved) for _ in r.operands]) for r in recipes]


def _masked(node: Any, operands: list[torch.Tensor], reader: torch.Tensor, source: torch.Tensor | None) -> _Make | None:
    """`source` times a tensor without a gradient, as dropout multiplies; or with the mask of torch's own on a GPU."""
    if source is None or source.grad_fn is None or node is None or not node.next_functions:
        return None
    if node.next_functions[0][0] is not source.grad_fn:
        return None
    drop: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    if node.name() == "NativeDropoutBackward0":
        mask, scale = node._saved_result1, 1 / (1 - node._saved_p) if node._saved_p < 1 else 0.0
        drop = partial(torch.ops.aten.native_dropout_backward, scale=scale)
    elif node.name() == "MulBackward0" and node._saved_self is None:
        mask, drop = node._saved_other, operator.mul
    else:
        return None
    before = recipe(source, reader)
    operands += [source, mask] if before is None else [*before.operands, mask]
    again = itemgetter(0) if before is None else before.again
    return lambda kept: drop(again(kept[:-1]), kept[-1])


@dataclass(frozen=True)
class _Kept:
    """An operand that autograd keeps."""

    at: int

    def __call__(self, kept: Sequence[torch.Tensor]) -> torch.Tensor:
        return kept[self.at]


@dataclass(frozen=True)
class _Times:
    left: _Make
    right: _Make

    def __call__(self, kept: Sequence[torch.Tensor]) -> torch.Tensor:
        return self.left(kept) * self.right(kept)


@dataclass(frozen=True)
class _Cast:
    value: _Make
    dtype: torch.dtype

    def __call__(self, kept: Sequence[torch.Tensor]) -> torch.Tensor:
        return self.value(kept).to(self.dtype)


def _product(node: Any, operands: list[torch.Tensor], depth: int) -> _Make | None:
    """The multiplication or cast that `node` is the backward of, and those before it whose results nobody keeps."""
    if node is None or depth == 0:
        return None
    if node.name() == "ToCopyBackward0":
        cast, dtype = _product(node.next_functions[0][0], operands, depth - 1), node._input_metadata[0].dtype
        return None if cast is None else _Cast(cast, dtype)
    if node.name() != "MulBackward0":
        return None
    sides: list[_Make] = []
    for kept, (before, _) in zip((node._saved_self, node._saved_other), node.next_functions, strict=True):
        side = _Kept(len(operands)) if kept is not None else _product(before, operands, depth - 1)
        if side is None:
            return None
        operands += [] if kept is None else [kept]
        sides.append(side)
    return _Times(*sides)


def _in_one_pass(make: _Make, kept: Sequence[torch.Tensor]) -> torch.Tensor | None:
    """What a norm's weight and a cast make of what it normalised, on a GPU where a kernel takes one pass for the three
    of torch's ops; None for anything else."""
    match make:
        case _Times(_Kept() as weight, _Cast(_Times(_Kept() as left, _Kept() as right), dtype)):
            pass
        case _Times(_Cast(_Times(_Kept() as left, _Kept() as right), dtype), _Kept() as weight):
            pass
        case _:
            return None
    w, a, b = weight(kept), left(kept), right(kept)
    if w.dtype is not dtype or not a.dtype is b.dtype is torch.float32:
        return None
    shape = torch.broadcast_shapes(w.shape, a.shape, b.shape)
    if not BRANCHES.knows(dtype, math.prod(shape)) or len(shape) < 2 or not BRANCHES.runs_on(w.device):
        return None
    try:
        flat = [t.detach().expand(shape).view(-1, shape[-1]) for t in (w, a, b)]
    except RuntimeError:  # its rows do not lie evenly
        return None
    from lora_fx.deltas import gpu_kernels

    return gpu_kernels.multiplied(*flat).view(shape)
