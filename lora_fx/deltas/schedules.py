"""In which order the branch of a plain matmul is computed: what is passed over, and what backward keeps.

    y = x·Wᵀ + bias + Σ s·(x·Aᵀ)·Bᵀ        x: (…, in), W: (out, in), A: (rank, in), B: (out, rank)

or one for each expert, all of them with an axis before: x: (experts, tokens, in).

* ``branch``: matmuls and an add, as one would write it. Every pass of autograd is an op of its own.
* ``fused``: the matmuls accumulate the branch onto y, and its gradient onto that of x. Backward keeps x and x·Aᵀ.
* ``dense``: y = x·(W + s·B·A)ᵀ + bias, the sum made anew in each forward and backward, never kept. Two passes over W in
  place of two over x and y each: cheaper where the tokens are many. Only in dtypes that lose nothing by it, and without
  dropout on the branch.
* ``auto`` takes `dense` from a number of tokens on (`dense_from`), and `fused` below.

All are the same function of x, A and B, with the same first and second derivatives. Wherever more than a call is at
stake, when a program is compiled, captured, exported or transformed, they are the plain `branch`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from lora_fx.deltas import rematerialization
from lora_fx.graph.capture import recording

AUTO, BRANCH, FUSED, DENSE = "auto", "branch", "fused", "dense"
SCHEDULES = (AUTO, BRANCH, FUSED, DENSE)

#: the ops that can be scheduled; W is (out, in) for the first, (in, out) for the others, or (experts, in, out)
OPS = {
    "linear": F.linear,
    "matmul": lambda x, weight, bias: torch.matmul(x, weight),
    "mm": lambda x, weight, bias: torch.mm(x, weight),
    "bmm": lambda x, weight, bias: torch.bmm(x, weight),
    "addmm": lambda x, weight, bias: torch.addmm(bias, x, weight),
    "baddbmm": lambda x, weight, bias: torch.baddbmm(bias, x, weight),
}

_Term = tuple[Any, Any, float, int, Any]
"""A, B, s, the first output feature that B makes, and x with dropout (x itself or None where nothing is dropped)."""


def loses_nothing(dtype: torch.dtype) -> bool:
    """Whether W + s·B·A in this dtype is as good as the branch: bfloat16 would round most of a small delta away."""
    return dtype in _LOSES_NOTHING


_LOSES_NOTHING = (torch.float32, torch.float64)


_CACHED = 4096
"""Tokens up to which x and y of a site lie in a CPU's caches, so that passes over them are cheap: measured from 256 to
2048 features wide, where `dense` became the faster one at 4096 tokens."""


def dense_from(inputs: int, outputs: int) -> int:
    """The number of tokens from which on `auto` takes `dense`: by the elements that each moves.

    Per call, beyond what both do: `fused` reads and writes y, and the gradient of x: 2·tokens·(in + out) elements;
    `dense` reads W and writes the sum, in forward and in backward: 4·in·out, counted twice, because it also allocates
    the sum each time.
    """
    return max(_CACHED, 4 * inputs * outputs // max(inputs + outputs, 1))


def matmul(op: str, x: Any, weight: Any, bias: Any, terms: Sequence[_Term], schedule: str) -> Any:
    """x·Wᵀ + bias + Σ s·(x·Aᵀ)·Bᵀ.

    Args:
        op: one of `OPS`.
        schedule: one of `SCHEDULES`.
    """
    if torch.compiler.is_compiling():
        if schedule in (AUTO, FUSED) and _may_compile(x, weight, bias, terms):
            return _compiled(op, x, weight, bias, terms)
        return _branch(op, x, weight, bias, terms)
    if schedule == BRANCH or not _may_schedule(x, weight, bias, terms):
        return _branch(op, x, weight, bias, terms)
    dense = schedule != FUSED and _takes_dense(x, weight, terms, schedule)
    if not torch.is_grad_enabled():
        return _forward(op, dense, x, weight, bias, terms, [])
    tensors: list[Any] = []
    for A, B, _, _, dropped in terms:
        tensors += A, B, None if dropped is x else dropped
    if not x.requires_grad and not any(t is not None and t.requires_grad for t in tensors):
        return _forward(op, dense, x, weight, bias, terms, [])
    return _Scheduled.apply(op, dense, [term[2:4] for term in terms], x, weight, bias, *tensors)


def _takes_dense(x: Any, weight: Any, terms: Sequence[_Term], schedule: str) -> bool:
    if schedule == AUTO:
        if x.numel() < _CACHED:  # and fewer tokens still
            return False
        tokens = x.size(1) if weight.dim() == 3 else x.numel() // max(x.size(-1), 1)
        if tokens < dense_from(*weight.shape[-2:]):
            return False
    if weight.dtype not in _LOSES_NOTHING:  # the model may have been cast since
        return False
    return all(term[4] is None or term[4] is x for term in terms)


def _branch(op: str, x: Any, weight: Any, bias: Any, terms: Sequence[_Term]) -> Any:
    y = OPS[op](x, weight, bias)
    for A, B, scale, first, dropped in terms:
        z = _linear(x if dropped is None else dropped, A)
        after = y.shape[-1] - first - B.shape[-2]
        y = y + _linear(z if scale == 1 else z * scale, F.pad(B, (0, 0, first, after)) if first or after else B)
    return y


def _linear(x: Any, weight: Any) -> Any:
    return F.linear(x, weight) if weight.dim() == 2 else torch.matmul(x, weight.mT)


_ORDINARY = (torch.Tensor, torch.nn.Parameter)


def _may_schedule(x: Any, weight: Any, bias: Any, terms: Sequence[_Term]) -> bool:
    """Whether all are ordinary tensors of one dtype, with W frozen, and nothing transforms or records the call."""
    if (
        recording.on
        or torch._C._are_functorch_transforms_active()
        or torch._C._is_tracing()
        or torch.autograd.forward_ad._current_level >= 0
        or torch._C._is_any_autocast_enabled()
        or weight.requires_grad
        or (bias is not None and bias.requires_grad)
    ):
        return False
    if weight.dim() == 3 and (x.dim() != 3 or any(t.shape[:-2] != x.shape[:1] for t in (weight, *terms[0][:2]))):
        return False  # one of them is broadcast
    dtype = x.dtype
    for t in (x, weight) if bias is None else (x, weight, bias):
        if type(t) not in _ORDINARY or t.dtype != dtype:
            return False
    for A, B, _, _, _ in terms:
        if type(A) not in _ORDINARY or type(B) not in _ORDINARY or A.dtype != dtype or B.dtype != dtype:
            return False
    return True


_LARGE = 2**16
"""From so many elements of x on, a pass over y takes longer than what a call of torch costs."""


def _forward(
    op: str, dense: bool, x: Any, weight: Any, bias: Any, terms: Sequence[_Term], kept: list[torch.Tensor]
) -> Any:
    """y; x·Aᵀ of each term, where backward needs it, is appended to `kept`."""
    if dense:
        return OPS[op](x, _sum(op, weight, terms), bias)
    experts = weight.dim() == 3
    for A, _, _, _, dropped in terms:
        own = x if dropped is None else dropped
        z = torch.bmm(own, A.mT) if experts else F.linear(own, A)
        kept.append(z if experts or z.dim() == 2 else z.reshape(-1, z.size(-1)))
    if x.numel() >= _LARGE and _starts_with_the_branch(op, x, weight, terms):
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
            y = y.contiguous()
            rows = y.view(-1, y.size(-1))
        left = zip(terms, kept, strict=True)
    for (_, B, scale, first, _), z in left:
        _add(_part(rows, first, B), z, B.mT, scale)
    return y


def _starts_with_the_branch(op: str, x: Any, weight: Any, terms: Sequence[_Term]) -> bool:
    features = weight.size(0 if op == "linear" else -1)
    whole = weight.dim() == 2 and terms[0][1].size(0) == features
    return whole and x.is_cpu and x.dim() > 1 and loses_nothing(x.dtype)


def _add(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor, scale: float = 1, beta: int = 1) -> torch.Tensor:
    """beta·total + scale·left·right, in place; what `total` holds does not matter where beta is 0."""
    if total.dim() == 2:
        return total.addmm_(left, right, beta=beta, alpha=scale)
    return total.baddbmm_(left, right, beta=beta, alpha=scale)


def _terms(spec: Sequence[tuple[float, int]], tensors: Sequence[Any]) -> list[_Term]:
    """The terms, from (s, first) of each and from A, B and x with dropout of each."""
    return [(*tensors[3 * k : 3 * k + 2], *one, tensors[3 * k + 2]) for k, one in enumerate(spec)]  # type: ignore[misc]


def _part(rows: torch.Tensor, first: int, B: torch.Tensor) -> torch.Tensor:
    """The features that B makes."""
    return rows if B.size(-2) == rows.size(-1) else rows.narrow(-1, first, B.size(-2))


def _sum(op: str, weight: torch.Tensor, terms: Sequence[_Term]) -> torch.Tensor:
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


class _Scheduled(torch.autograd.Function):
    """`_forward`, and its gradients.

    Between large matmuls, every further op starts with cold caches, which costs a CPU more than the few numbers in it:
    so the small products come before the large one, scale while they multiply, and are written the way round in which
    the rank is the first axis (on a CPU up to five times as fast as the other).
    """

    @staticmethod
    def forward(ctx: Any, op: str, dense: bool, spec: Any, x: Any, weight: Any, bias: Any, *tensors: Any) -> Any:
        kept: list[torch.Tensor] = []
        y = _forward(op, dense, x, weight, bias, _terms(spec, tensors), kept)
        ctx.op, ctx.dense, ctx.spec, ctx.shape = op, dense, spec, x.shape
        source = x
        if all(dropped is not None for dropped in tensors[2::3]):
            x = None  # nothing but what dropout made of it is multiplied with a gradient
        saved = [x, weight, *tensors, *kept]
        ctx.recipes = []
        for place in (0, *range(4, 2 + len(tensors), 3)):
            if saved[place] is None:
                continue
            found = rematerialization.recipe(saved[place], source if place else None)
            if found is not None:
                ctx.recipes.append((place, len(saved), found))
                saved[place] = None
                saved += found.operands
        ctx.save_for_backward(*saved)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:  # type: ignore[override]
        if torch.is_grad_enabled():
            return _differentiable_gradients(ctx, grad)
        x, weight, tensors = _saved(ctx)
        terms, kept = _terms(ctx.spec, tensors), tensors[3 * len(ctx.spec) : 4 * len(ctx.spec)]
        needs = ctx.needs_input_grad
        own = x if x is not None else grad.new_empty(0)
        grad_x, grads = _gradients(ctx.op, ctx.dense, terms, own, weight, kept, grad, ctx.shape, needs[3], needs[6:])
        return None, None, None, grad_x, None, None, *grads


def _gradients(
    op: str,
    dense: bool,
    terms: Sequence[_Term],
    x: torch.Tensor,
    weight: torch.Tensor,
    kept: Sequence[torch.Tensor],
    grad: torch.Tensor,
    shape: Sequence[int],
    needs_x: bool,
    needs: Sequence[bool],
) -> tuple[torch.Tensor | None, list[torch.Tensor | None]]:
    """The gradient of x, of this shape, and those of A, B and x with dropout of each term, where they are needed."""
    width = shape[-1]
    g = _rows(grad, weight)
    grads: list[Any] = []
    factors: list[Any] = []  # whose products belong to the gradient of x
    for k, (A, B, scale, first, dropped) in enumerate(terms):
        own, mine = _rows(x if dropped is None else dropped, weight), _part(g, first, B)
        z = _linear(mine, B.mT.contiguous())
        grad_a = grad_b = grad_own = None
        if needs[3 * k]:
            grad_a = _tall(z, own, scale)
        if needs[3 * k + 1]:
            grad_b = _tall(_linear(own, A) if dense else kept[k], mine, scale).mT
        if needs[3 * k + 2]:
            grad_own = _product(z, A, scale).view(dropped.shape)
        elif dropped is None and not dense:
            factors.append((z, A, scale))
        grads += grad_a, grad_b, grad_own
    if not needs_x:
        return None, grads
    total = _sum(op, weight, terms) if dense else weight
    grad_x = g.new_empty(*g.shape[:-1], width)
    for n, (z, A, scale) in enumerate(factors):
        _add(grad_x, z, A, scale, beta=1 if n else 0)
    _add(grad_x, g, total if op == "linear" else total.mT, beta=1 if factors else 0)
    return grad_x.view(shape), grads


def _rows(t: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """All tokens in one axis; those of each expert in one."""
    return t if weight.dim() == 3 else t.reshape(-1, t.shape[-1])


def _saved(ctx: Any) -> tuple[Any, torch.Tensor, list[Any]]:
    """x or None, W, and the terms' tensors with x·Aᵀ after them."""
    saved = list(ctx.saved_tensors)
    for place, start, recipe in ctx.recipes:
        saved[place] = recipe.again(saved[start : start + len(recipe.operands)])
    x, weight, *tensors = saved
    return x, weight, tensors


def _product(left: torch.Tensor, right: torch.Tensor, scale: float) -> torch.Tensor:
    return _add(left.new_empty(*left.shape[:-1], right.shape[-1]), left, right, scale, beta=0)


_PARTS = 4


def _tall(left: torch.Tensor, right: torch.Tensor, scale: float) -> torch.Tensor:
    """scale · leftᵀ·right, over many rows: (rows, rank), (rows, features) → (rank, features)."""
    rows = left.shape[0]
    if left.dim() == 3 or left.device.type != "cpu" or rows % _PARTS or rows < 128:
        return _product(left.mT, right, scale)
    # A CPU's matmul does not share out the long axis of such a product among its threads; a batch it does.
    parts = torch.bmm(left.view(_PARTS, -1, left.shape[1]).mT, right.view(_PARTS, -1, right.shape[1]))
    return parts.sum(0).mul_(scale)


def _differentiable_gradients(ctx: Any, grad: Any) -> Any:
    """With create_graph=True: the gradients of `branch`, which autograd can differentiate once more."""
    x, weight, tensors = _saved(ctx)
    if x is None:  # a stand-in, whose gradient takes no part of x
        x = grad.new_zeros(ctx.shape, requires_grad=True)
    needs = [ctx.needs_input_grad[3], *ctx.needs_input_grad[6 : 6 + 3 * len(ctx.spec)]]
    ours = [None if t is None else t.view_as(t) for t in (x, *tensors[: len(needs) - 1])]  # one may depend on another
    terms = _terms(ctx.spec, ours[1:])
    y = _branch("linear" if ctx.op == "linear" else "matmul", ours[0], weight, None, terms)
    wanted = [t for t, needed in zip(ours, needs, strict=True) if needed]
    found = iter(torch.autograd.grad(y, wanted, grad, create_graph=True))
    grads = [next(found) if needed else None for needed in needs]
    return None, None, None, grads[0], None, None, *grads[1:]


# ── compiled ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def _may_compile(x: Any, weight: Any, bias: Any, terms: Sequence[_Term]) -> bool:
    """Whether Dynamo is to see one op. Inductor leaves matmuls to the same library as we do, but cannot accumulate in
    place around them; where it has kernels of its own (on a GPU), and where W is small, it is better left alone."""
    if (
        not torch.compiler.is_dynamo_compiling()
        or torch.compiler.is_exporting()
        or torch._C._are_functorch_transforms_active()
        or x.device.type != "cpu"
        or weight.dim() != 2
        or weight.numel() < _LARGE
        or weight.requires_grad
        or torch.is_autocast_enabled("cpu")
        or (bias is not None and (type(bias) not in _ORDINARY or bias.requires_grad or bias.dtype != x.dtype))
    ):
        return False
    if len({dropped is not None for *_, dropped in terms}) != 1:
        return False
    tensors = [x, weight, *(t for A, B, *_ in terms for t in (A, B))]  # a DTensor has no rule for an op of ours
    return all(type(t) in _ORDINARY and t.dtype == x.dtype for t in tensors)


def _compiled(op: str, x: Any, weight: Any, bias: Any, terms: Sequence[_Term]) -> Any:
    factors = [factor for A, B, *_ in terms for factor in (A, B)]
    dropped = [term[4] for term in terms if term[4] is not None]
    scales, firsts = [float(term[2]) for term in terms], [term[3] for term in terms]
    return torch.ops.lora_fx.fused_matmul(op, x, weight, bias, factors, dropped, scales, firsts)[0]


def _unpacked(
    factors: Sequence[torch.Tensor], dropped: Sequence[torch.Tensor], scales: Sequence[float], firsts: Sequence[int]
) -> list[_Term]:
    each = dropped or [None] * len(scales)
    return list(zip(factors[::2], factors[1::2], scales, firsts, each, strict=True))


@torch.library.custom_op("lora_fx::fused_matmul", mutates_args=())
def _fused_matmul(
    op: str,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    factors: Sequence[torch.Tensor],
    dropped: Sequence[torch.Tensor],
    scales: Sequence[float],
    firsts: Sequence[int],
) -> list[torch.Tensor]:
    """y, and x·Aᵀ of each term."""
    kept: list[torch.Tensor] = []
    y = _forward(op, False, x, weight, bias, _unpacked(factors, dropped, scales, firsts), kept)
    return [y, *kept]


@_fused_matmul.register_fake
def _(op: Any, x: Any, weight: Any, bias: Any, factors: Any, dropped: Any, scales: Any, firsts: Any) -> Any:
    tokens = x.numel() // x.shape[-1]
    y = x.new_empty(*x.shape[:-1], weight.shape[0 if op == "linear" else 1])
    return [y, *(x.new_empty(tokens, A.shape[0]) for A in factors[::2])]


@torch.library.custom_op("lora_fx::fused_matmul_backward", mutates_args=())
def _fused_matmul_backward(
    op: str,
    x: torch.Tensor,
    weight: torch.Tensor,
    factors: Sequence[torch.Tensor],
    dropped: Sequence[torch.Tensor],
    scales: Sequence[float],
    firsts: Sequence[int],
    kept: Sequence[torch.Tensor],
    grad: torch.Tensor,
    needs_x: bool,
) -> list[torch.Tensor]:
    """The gradients of A and B of each term, of each x with dropout, and of x, if that is needed."""
    terms = _unpacked(factors, dropped, scales, firsts)
    needs = [True, True, bool(dropped)] * len(terms)
    grad_x, grads = _gradients(op, False, terms, x, weight, kept, grad, x.shape, needs_x, needs)
    both = [g.contiguous() for pair in zip(grads[::3], grads[1::3], strict=True) for g in pair]  # type: ignore[union-attr]
    return [*both, *(g for g in grads[2::3] if g is not None), *([] if grad_x is None else [grad_x])]


@_fused_matmul_backward.register_fake
def _(op: Any, x: Any, weight: Any, factors: Any, dropped: Any, scales: Any, firsts: Any, kept: Any, grad: Any,
      needs_x: Any) -> Any:  # fmt: skip
    like = [*factors, *dropped, *([x] if needs_x else [])]
    return [t.new_empty(t.shape) for t in like]


def _keep(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.op, x, weight, _, factors, dropped, ctx.scales, ctx.firsts = inputs
    ctx.counts = len(factors), len(dropped)
    ctx.save_for_backward(x, weight, *factors, *dropped, *output[1:])


def _compiled_backward(ctx: Any, grads: Any) -> Any:
    x, weight, *tensors = ctx.saved_tensors
    factors, dropped = tensors[: ctx.counts[0]], tensors[ctx.counts[0] : sum(ctx.counts)]
    found = torch.ops.lora_fx.fused_matmul_backward(
        ctx.op, x, weight, factors, dropped, ctx.scales, ctx.firsts, tensors[sum(ctx.counts) :], grads[0],
        ctx.needs_input_grad[1],
    )  # fmt: skip
    grad_x = found[sum(ctx.counts)] if ctx.needs_input_grad[1] else None
    return None, grad_x, None, None, found[: ctx.counts[0]], found[ctx.counts[0] : sum(ctx.counts)], None, None


torch.library.register_autograd("lora_fx::fused_matmul", _compiled_backward, setup_context=_keep)
