"""A matmul with branches, and its gradients: what every schedule is made of.

    y = x·Wᵀ + bias + Σ s·(x·Aᵀ)·Bᵀ        x: (…, in), W: (out, in), A: (rank, in), B: (out, rank)

or one for each expert, all of them with an axis before: x: (experts, tokens, in).

Between large matmuls, every further op starts with cold caches, which costs a CPU more than the few numbers in it: so
the small products come before the large one, scale while they multiply, and are written the way round in which the
rank is the first axis (on a CPU up to five times as fast as the other).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
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
    scale: float
    first: int
    """The first output feature that B makes."""
    dropped: Any
    """x with dropout; x itself or None where nothing is dropped."""


Terms = Sequence[tuple[Any, Any, float, int, Any]]


def flat(terms: Terms) -> list[Any]:
    """The tensors of all terms in one list: autograd sees none inside of other things."""
    return [t for A, B, _, _, dropped in terms for t in (A, B, dropped)]


def unflat(spec: Iterable[tuple[float, int]], tensors: Iterable[Any]) -> Terms:
    """The way back, from (scale, first) of each, for the tensors or what there is one of for each."""
    rest = iter(tensors)
    each = zip(spec, rest, rest, rest, strict=True)
    return [(A, B, scale, first, dropped) for (scale, first), A, B, dropped in each]


def loses_nothing(dtype: torch.dtype) -> bool:
    """Whether W + s·B·A in this dtype is as good as the branch: bfloat16 would round most of a small delta away."""
    return dtype in (torch.float32, torch.float64)


def branch(op: str, x: Any, weight: Any, bias: Any, terms: Terms) -> Any:
    """y as one would write it: every pass of autograd is an op of its own."""
    y = OPS[op](x, weight, bias)
    for A, B, scale, first, dropped in terms:
        z = _linear(x if dropped is None else dropped, A)
        after = y.shape[-1] - first - B.shape[-2]
        y = y + _linear(z if scale == 1 else z * scale, F.pad(B, (0, 0, first, after)) if first or after else B)
    return y


def _linear(x: Any, weight: Any) -> Any:
    return F.linear(x, weight) if weight.dim() == 2 else torch.matmul(x, weight.mT)


_unsafe_view: Any = torch.ops.aten._unsafe_view.default
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
    for A, B, scale, first, dropped in terms:
        z = F.linear(x if dropped is None else dropped.view(x.shape), A)
        part = y if B.size(0) == y.size(1) else y.narrow(1, first, B.size(0))
        part.addmm_(z, B.t(), alpha=scale)
    return y if len(shape) == 2 else _unsafe_view(y, (*shape[:-1], y.size(1)))


LARGE = 2**16
"""From so many elements of x on, a pass over y takes longer than what a call of torch costs."""


def forward(op: str, dense: bool, x: Any, weight: Any, bias: Any, terms: Terms, kept: list[torch.Tensor]) -> Any:
    """y, with the branches accumulated in place or, if `dense`, in the weight. It is no view.

    Args:
        kept: x·Aᵀ of each term is appended, where backward needs it.
    """
    if dense:
        return no_view(OPS[op](x, weight_sum(op, weight, terms), bias))
    experts = weight.dim() == 3
    for A, _, _, _, dropped in terms:
        own = x if dropped is None else dropped
        z = torch.bmm(own, A.mT) if experts else F.linear(own, A)
        kept.append(z if experts or z.dim() == 2 else z.reshape(-1, z.size(-1)))
    if x.numel() >= LARGE and _starts_with_the_branch(op, x, weight, bias, terms):
        # A large product that adds to what is there costs what one that overwrites it does.
        (_, B, scale, _, _), *others = terms
        y = x.new_empty(*x.shape[:-1], B.size(0))
        rows = y.view(-1, B.size(0))
        if bias is None:
            rows.addmm_(kept[0], B.t(), beta=0, alpha=scale)
        else:
            torch.addmm(bias, kept[0], B.t(), alpha=scale, out=rows)
        rows.addmm_(x.reshape(-1, x.size(-1)), weight.t() if op == "linear" else weight)
        left = zip(others, kept[1:], strict=True)
    else:
        y = rows = OPS[op](x, weight, bias)
        if y.dim() != 2 and not experts:
            y = no_view(y.contiguous())
            rows = y.view(-1, y.size(-1))
        left = zip(terms, kept, strict=True)
    for (_, B, scale, first, _), z in left:
        _add(_part(rows, first, B), z, B.mT, scale)
    return y


def _starts_with_the_branch(op: str, x: Any, weight: Any, bias: Any, terms: Terms) -> bool:
    if x.dim() != 2 and bias is not None and not x.is_contiguous():
        return False  # torch's own linear adds the bias last there: in other places it rounds
    _, B, *_ = terms[0]
    whole = weight.dim() == 2 and B.size(0) == weight.size(0 if op == "linear" else -1)
    return whole and x.is_cpu and x.dim() > 1 and loses_nothing(x.dtype)


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
    needed = iter(needs)
    factors: list[tuple[torch.Tensor, torch.Tensor, float]] = []  # whose products belong to the gradient of x
    for k, (A, B, scale, first, dropped) in enumerate(terms):
        needs_a, needs_b, needs_own = next(needed), next(needed), next(needed)
        own, mine = _rows(x if dropped is None else dropped, weight), _part(g, first, B)
        z = _linear(mine, B.mT.contiguous())
        grad_a = grad_b = grad_own = None
        if needs_a:
            grad_a = tall(z, own, scale)
        if needs_b:
            grad_b = tall(_linear(own, A) if dense else kept[k], mine, scale).mT
        if needs_own:
            grad_own = _product(z, A, scale).view(dropped.shape)
        elif dropped is None and not dense:
            factors.append((z, A, scale))
        grads += grad_a, grad_b, grad_own
    if not needs_x:
        return None, grads
    total = weight_sum(op, weight, terms) if dense else weight
    grad_x = g.new_empty(*g.shape[:-1], shape[-1])
    for n, (z, A, scale) in enumerate(factors):
        _add(grad_x, z, A, scale, beta=1 if n else 0)
    _add(grad_x, g, total if op == "linear" else total.mT, beta=1 if factors else 0)
    return grad_x.view(shape), grads


def weight_sum(op: str, weight: torch.Tensor, terms: Terms) -> torch.Tensor:
    """W + Σ s·B·A, differentiable in A and B."""
    total = weight if op == "linear" else weight.mT
    add = torch.addmm if total.dim() == 2 else torch.baddbmm
    for A, B, scale, first, _ in terms:
        if B.shape[-2] == total.shape[-2]:
            total = add(total, B, A, alpha=scale)
        else:
            before, part, after = total.tensor_split((first, first + B.shape[-2]), dim=-2)
            total = torch.cat([before, add(part, B, A, alpha=scale), after], dim=-2)
    return total if op == "linear" else total.mT


def _add(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor, scale: float = 1, beta: int = 1) -> torch.Tensor:
    """beta·total + scale·left·right, in place; what `total` holds does not matter where beta is 0."""
    if total.dim() == 2:
        return total.addmm_(left, right, beta=beta, alpha=scale)
    return total.baddbmm_(left, right, beta=beta, alpha=scale)


def _part(rows: torch.Tensor, first: int, B: torch.Tensor) -> torch.Tensor:
    """The features that B makes."""
    return rows if B.size(-2) == rows.size(-1) else rows.narrow(-1, first, B.size(-2))


def _rows(t: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """All tokens in one axis; those of each expert in one."""
    return t if weight.dim() == 3 else t.reshape(-1, t.shape[-1])


def _product(left: torch.Tensor, right: torch.Tensor, scale: float) -> torch.Tensor:
    return _add(left.new_empty(*left.shape[:-1], right.shape[-1]), left, right, scale, beta=0)


_PARTS = 4


def tall(left: torch.Tensor, right: torch.Tensor, scale: float) -> torch.Tensor:
    """scale · leftᵀ·right, over many rows: (rows, rank), (rows, features) → (rank, features)."""
    rows = left.shape[0]
    if left.dim() == 3 or left.device.type != "cpu" or rows % _PARTS or rows < 128:
        return _product(left.mT, right, scale)
    # A CPU's matmul does not share out the long axis of such a product among its threads; a batch it does.
    parts = torch.bmm(left.view(_PARTS, -1, left.shape[1]).mT, right.view(_PARTS, -1, right.shape[1]))
    return parts.sum(0).mul_(scale)
