"""Rows of padding: where a query may attend to no key at all, a file and torch may both be right and differ.

    softmax(−∞, …, −∞)  =  0 in torch   =  1/n in a file of opset ≤ 22, whose −∞ is the least number of the type

So it is with the first tokens of a prompt that is padded on the left: they look back, on padding alone. Nothing is left
unread for that. If a file is not torch's model, it is held once more against torch with 1/n in the place of 0, and that
counts if all that moves by it are rows which a mask among the inputs says are padding.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from lora_fx.export.onnx.calls import graph_inputs
from lora_fx.graph.capture import Inputs
from lora_fx.graph.own_state import uncompiled


@dataclass(frozen=True)
class Padded:
    """Rows of an output that were held against torch with the mean of all values for attention to nothing."""

    output: str
    rows: int
    of: int
    mask: str
    """The input that says they are padding."""

    def __str__(self) -> str:
        return f"{self.rows} of {self.of} rows of {self.output}"


class Attention(TorchDispatchMode):
    """Inside of `attention_to_nothing`: what softmax is where nothing may be attended to."""

    supports_higher_order_operators = True  # `torch.cond` is one

    def __init__(self, mean: bool) -> None:
        super().__init__()
        self.mean, self.met = mean, False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is not torch.ops.aten._safe_softmax.default or not out.numel():
            return out
        scores, axis = args[:2]
        nothing = (scores == -math.inf).all(axis, keepdim=True)
        self.met = self.met or bool(nothing.any())
        return torch.where(nothing, 1 / scores.shape[axis], out) if self.mean else out


@contextmanager
def attention_to_nothing(mean: bool) -> Iterator[Attention]:
    """Inside, attention is computed step by step; attention to nothing is the mean of all values, or 0 as in torch."""
    with sdpa_kernel(SDPBackend.MATH), uncompiled(), Attention(mean) as attention:
        yield attention


def padded_rows(
    program: Any,
    inputs: Inputs,
    zeros: Sequence[torch.Tensor],
    means: Sequence[torch.Tensor],
    run: Callable[[Inputs], Any],
) -> tuple[Padded, ...]:
    """Of each output the rows that attention to nothing reaches: none if it reaches a row that is no padding.

    Args:
        zeros, means: torch's outputs with either of `attention_to_nothing`.
        run: the model, from which a mask shows itself: without the padding, nothing attends to nothing.
    """
    moved = [(a != b) & ~(a.isnan() & b.isnan()) for a, b in zip(zeros, means, strict=True)]
    names = [value.name for value in program.model.graph.outputs]
    for value, tensor in graph_inputs(program, inputs):
        for padding, without in _readings(tensor):
            rows = [_rows(own, padding) for own in moved]
            if any(own is None for own in rows):
                continue
            with attention_to_nothing(mean=False) as attention:
                run(_exchanged(inputs, tensor, without))
            if not attention.met:
                found = [(name, own) for name, own in zip(names, rows, strict=True) if own is not None and own.any()]
                return tuple(Padded(name, int(own.sum()), own.numel(), value.name) for name, own in found)
    return ()


def _readings(tensor: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """An input (batch, tokens) of zeros and ones, read as a mask: where it pads, and the same without any padding."""
    if tensor.ndim != 2 or tensor.is_complex():
        return
    for keeps in (1, 0):
        pads = tensor == 1 - keeps
        if bool(((tensor == keeps) | pads).all()) and bool(pads.any()) and not bool(pads.all()):
            yield pads, torch.full_like(tensor, keeps)


def _rows(moved: torch.Tensor, padding: torch.Tensor) -> torch.Tensor | None:
    """The rows (batch, tokens) of an output that have moved; None where something has that is no padding.

    The tokens of an output are the last ones of the mask: a cache's are in the mask too.
    """
    if not moved.any():
        return torch.zeros(0, dtype=torch.bool)
    batch, tokens = padding.shape
    if moved.ndim < 2 or moved.shape[0] != batch:
        return None
    for axis in sorted(range(1, moved.ndim), key=lambda axis: -moved.shape[axis]):
        size = moved.shape[axis]
        if size <= tokens:
            rows = moved.movedim(axis, 1).reshape(batch, size, -1).any(-1)
            if not bool((rows & ~padding[:, tokens - size :].to(rows.device)).any()):
                return rows
    return None


def _exchanged(inputs: Inputs, old: torch.Tensor, new: torch.Tensor) -> Inputs:
    args, kwargs = pytree.tree_map(lambda leaf: new if leaf is old else leaf, (inputs.args, inputs.kwargs))
    return Inputs(args, kwargs)
