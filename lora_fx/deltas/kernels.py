"""A matmul with branches, and its gradients: what every schedule is made of.

    y = x·Wᵀ + bias + Σ s·(x·Aᵀ)·Bᵀ        x: (…, in), W: (out, in), A: (rank, in), B: (out, rank)

or one for each expert, all of them with an axis before: x: (experts, tokens, in).

Each further op costs its launch and, between large matmuls, cold caches: so the small products scale while they
multiply, accumulate onto what is there, and are written the way round in which the rank is the first axis (on a CPU up
to five times as fast as the other).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

#: the ops that can be scheduled; W is (out, in) for the first, (in, out) for the others, or (experts, in, out)
OPS = {
    "linear": F.linear,
    "matmul": lambda x, weight, bias: torch.matmul(x, weight),
    "mm": lambda x, weight, bias: torch.mm(x, weight),
    "bmm": lambda x, weight, bias: torch.bmm(x, weight),
    "addmm": lambda x, weight, bias: torch.addmm(bias, x, weight),
    "baddbmm": lambda x, weight, bias: torch.baddbmm(bias, x, weight),
}


class Term(NamedTuple):
    """One branch of a matmul. A plain tuple of the same does as well: generated code has one, which costs nothing."""

    A: Any
    B: Any
    scale: Any
    """A number; a tensor of no axes where a program is compiled."""
    first: int
    """The first output feature that B makes."""
    dropped: Any
    """x with dropout; x itself or None where nothing is dropped."""


Terms = Sequence[tuple[Any, Any, Any, int, Any]]


def loses_nothing(dtype: torch.dtype) -> bool:
    """Whether W + s·B·A in this dtype is as good as the branch: bfloat16 would round most of a small delta away."""
    return dtype in (torch.float32, torch.float64)


def cast(terms: Terms, dtype: torch.dtype) -> Terms:
    """The same with factors in this dtype: those of a weight of lower precision are float32, and are rounded for each
    call. A copy that was kept would be stale where they are written to behind their version counters: `A.data.add_(…)`.
    """
    for A, B, *_ in terms:
        if A.dtype is not dtype or B.dtype is not dtype:
            return [(A.to(dtype), B.to(dtype), *rest) for A, B, *rest in terms]
    return terms


def times(number: Any, value: Any) -> Any:
    """number · value, and the value itself where the number is a 1 that stays one."""
    return value if isinstance(number, float | int) and number == 1 else value * number


def branch(op: str, x: Any, weight: Any, bias: Any, terms: Terms) -> Any:
    """y as one would write it: every pass of autograd is an op of its own."""
    y = OPS[op](x, weight, bias)
    for A, B, scale, first, dropped in cast(terms, weight.dtype):
        z = _linear(x if dropped is None else dropped, A)
        after = y.size(-1) - first - B.shape[-2]  # a nested tensor has no shape
        y = y + _linear(times(scale, z), F.pad(B, (0, 0, first, after)) if first or after else B)
    return y


def _linear(x: Any, weight: Any) -> Any:
    return F.linear(x, weight) if weight.dim() == 2 else torch.matmul(x, weight.mT)


_unsafe_view: Any = torch.ops.aten._unsafe_view.default._op
"""A view that autograd takes for a tensor of its own, as torch's matmul uses it where nobody else has the elements.

A view that an autograd function gives must not be written to, and the model may do so: `nn.ReLU(inplace=True)`."""


def no_view(y: torch.Tensor) -> torch.Tensor:
    """The same elements, which nobody else has, as a tensor that is no view."""
    return _unsafe_view(y, y.shape) if y._is_view() else y


def in_place(op: str, x: Any, weight: Any, bias: Any, terms: Terms) -> Any:
    """y, with the branches accumulated onto it as autograd follows it. W is a matrix."""
    shape = x.shape
    if len(shape) != 2:
        if not x.is_contiguous():  # torch's own linear goes another way, to other bits
            return branch(op, x, weight, bias, terms)
        x = x.view(math.prod(shape[:-1]), shape[-1])
    y = OPS[op](x, weight, bias)
    for A, B, scale, first, dropped in cast(terms, weight.dtype):
        z = F.linear(x if dropped is None else dropped.view(x.shape), A)
        _part(y, first, B).addmm_(z, B.t(), alpha=scale)
    return y if len(shape) == 2 else _unsafe_view(y, (*shape[:-1], y.size(1)))


def forward(op: str, dense: bool, x: Any, weight: Any, bias: Any, terms: Terms, kept: list[torch.Tensor]) -> Any:
    """y, with the branches accumulated in place or, if `dense`, in the weight. It is no view.

    Args:
        kept: A·xᵀ of each term is appended, where backward needs it.
    """
    if dense:
        return no_view(OPS[op](x, weight_sum(op, weight, terms), bias))
    y = rows = OPS[op](x, weight, bias)
    if y.dim() != weight.dim():
        y = no_view(y.contiguous())
        rows, x = y.view(-1, y.size(-1)), x.reshape(-1, x.size(-1))
    product, add = _PRODUCTS[weight.dim()]
    for A, B, scale, first, dropped in terms:
        own = x if dropped is None else dropped if dropped.dim() == x.dim() else dropped.reshape(x.shape)
        z = product(A, own.mT)
        kept.append(z)
        add(_part(rows, first, B), z.mT, B.mT, alpha=scale)
    return y


def gradients(
    op: str,
    dense: bool,
    terms: Terms,
    x: Any,
    weight: torch.Tensor,
    kept: Sequence[torch.Tensor],
    grad: torch.Tensor,
    shape: Sequence[int],
    needs_x: bool,
    needs: Sequence[bool],
) -> tuple[torch.Tensor | None, list[torch.Tensor | None]]:
    """The gradient of x, of this shape, and those of the terms' tensors, flat, where they are needed.

    Args:
        x: None will do where every term has one with dropout.
        kept: what `forward` appended.
        needs: whether the gradient of each of the terms' tensors is needed, flat.
    """
    g = _rows(grad, weight)
    grads: list[torch.Tensor | None] = []
    product, add = _PRODUCTS[weight.dim()]
    scaled = torch.addmm if weight.dim() == 2 else torch.baddbmm  # of something of that shape, taken 0 times
    grad_x = None
    if needs_x:
        total = weight_sum(op, weight, terms) if dense else weight
        grad_x = product(g, total if op == "linear" else total.mT)
    for k, (A, B, scale, first, dropped) in enumerate(terms):
        needs_a, needs_b, needs_own = needs[3 * k : 3 * k + 3]
        own, mine, up = _rows(x if dropped is None else dropped, weight), _part(g, first, B), B.mT
        z = product(up, mine.mT)
        grad_a = grad_b = grad_own = None
        if needs_a:
            grad_a = scaled(A, z, own, beta=0, alpha=scale)
        if needs_b:
            grad_b = scaled(up, product(A, own.mT) if dense else kept[k], mine, beta=0, alpha=scale).mT
        if needs_own:
            grad_own = scaled(own, z.mT, A, beta=0, alpha=scale).view(dropped.shape)
        elif needs_x and dropped is None and not dense:
            add(grad_x, z.mT, A, alpha=scale)
        grads += grad_a, grad_b, grad_own
    return None if grad_x is None else grad_x.view(shape), grads


def weight_sum(op: str, weight: torch.Tensor, terms: Terms) -> torch.Tensor:
    """W + Σ s·B·A, differentiable in A and B."""
    add = torch.addmm if weight.dim() == 2 else torch.baddbmm
    total = weight  # and lies as it does: a matmul rounds by how its operands lie
    for A, B, scale, first, _ in terms:
        left, right, axis = (B, A, -2) if op == "linear" else (A.mT, B.mT, -1)
        if B.shape[-2] == total.shape[axis]:
            total = add(total, left, right, alpha=scale)
        else:
            before, part, after = total.tensor_split((first, first + B.shape[-2]), dim=axis)
            total = torch.cat([before, add(part, left, right, alpha=scale), after], dim=axis)
    return total


#: by the axes of W: a product, and one that is added in place
_PRODUCTS: dict[int, tuple[Any, Any]] = {2: (torch.mm, torch.Tensor.addmm_), 3: (torch.bmm, torch.Tensor.baddbmm_)}


def _part(rows: torch.Tensor, first: int, B: torch.Tensor) -> torch.Tensor:
    """The features that B makes."""
    return rows if B.size(-2) == rows.size(-1) else rows.narrow(-1, first, B.size(-2))


def _rows(t: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """All tokens in one axis; those of each expert in one."""
    return t if t.dim() == weight.dim() else t.reshape(-1, t.shape[-1])
