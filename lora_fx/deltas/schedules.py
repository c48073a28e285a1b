"""In which order the branch of a plain matmul is computed: what is passed over, and what backward keeps.

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
from torch import fx
from torch.autograd import forward_ad

from lora_fx.deltas import kernels, rematerialization
from lora_fx.deltas.compiled_schedules import ORDINARY, compiled, may_compile
from lora_fx.deltas.kernels import Terms, flat, loses_nothing, unflat
from lora_fx.graph.capture import recording

AUTO, BRANCH, FUSED, DENSE = "auto", "branch", "fused", "dense"
SCHEDULES = (AUTO, BRANCH, FUSED, DENSE)

_transforms, _traces = torch._C._are_functorch_transforms_active, torch._C._is_tracing
_autocasts, _modes = torch._C._is_any_autocast_enabled, torch._C._len_torch_dispatch_stack

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


def matmul(op: str, x: Any, weight: Any, bias: Any, terms: Terms, schedule: str) -> Any:
    """x·Wᵀ + bias + Σ s·(x·Aᵀ)·Bᵀ.

    Args:
        op: one of `kernels.OPS`.
        schedule: one of `SCHEDULES`.
    """
    if torch.compiler.is_compiling():
        if schedule in (AUTO, FUSED) and may_compile(x, weight, bias, terms):
            return compiled(op, x, weight, bias, terms)
        return kernels.branch(op, x, weight, bias, terms)
    if type(weight) is fx.Proxy:  # a module is rewritten, or a rewritten one is unpickled: one node
        terms = tuple(map(tuple, terms))
        return weight.tracer.create_proxy("call_function", matmul, (op, x, weight, bias, terms, schedule), {})
    if schedule == BRANCH or not may_schedule(x, weight, bias, terms):
        return kernels.branch(op, x, weight, bias, terms)
    if schedule == AUTO and weight.dim() == 2 and x.numel() < _CACHED:
        return kernels.in_place(op, x, weight, bias, terms)
    dense = schedule != FUSED and _takes_dense(x, weight, terms, schedule)
    if schedule == AUTO and not dense and weight.dim() == 2 and x.numel() < kernels.LARGE:
        return kernels.in_place(op, x, weight, bias, terms)
    if not torch.is_grad_enabled():
        return kernels.forward(op, dense, x, weight, bias, terms, [])
    tensors: list[Any] = []
    for A, B, _, _, dropped in terms:
        tensors += A, B, None if dropped is x else dropped
    if not x.requires_grad and not any(t is not None and t.requires_grad for t in tensors):
        return kernels.forward(op, dense, x, weight, bias, terms, [])
    return _Scheduled.apply(op, dense, [(scale, first) for _, _, scale, first, _ in terms], x, weight, bias, *tensors)


def add(total: Any, own: Any) -> Any:
    """total + own, laid out as `total` is where a call is all that is at stake.

    An axis of one element has a stride too. It says nothing of where things lie, so an addition does not keep it; but
    torch's convolutions choose their kernels by it, and round accordingly.
    """
    if type(total) is fx.Proxy:
        return total.tracer.create_proxy("call_function", add, (total, own), {})
    result = total + own
    if type(total) not in ORDINARY or torch.compiler.is_compiling() or recording.on or _traces():
        return result
    strides = total.stride()
    if result.stride() == strides or not _lies_alike(result, strides):
        return result
    return result.as_strided(result.shape, strides)


def _lies_alike(tensor: torch.Tensor, strides: Sequence[int]) -> bool:
    """Whether these strides say the same of where the elements lie."""
    each = zip(tensor.shape, tensor.stride(), strides, strict=True)
    return all(size == 1 or own == other for size, own, other in each)


def _takes_dense(x: Any, weight: Any, terms: Terms, schedule: str) -> bool:
    if schedule == AUTO:
        if x.numel() < _CACHED:  # and fewer tokens still
            return False
        tokens = x.size(1) if weight.dim() == 3 else x.numel() // max(x.size(-1), 1)
        if tokens < dense_from(*weight.shape[-2:]):
            return False
    if not loses_nothing(weight.dtype):  # the model may have been cast since
        return False
    return all(dropped is None or dropped is x for *_, dropped in terms)


def may_schedule(x: Any, weight: Any, bias: Any, terms: Terms) -> bool:
    """Whether all are ordinary tensors of one dtype, with W frozen, and nothing transforms or records the call."""
    if (
        recording.on
        or _transforms()
        or _traces()
        or forward_ad._current_level >= 0
        or _autocasts()
        or _modes()  # what records or counts ops, or keeps what they give, as selective checkpointing does
        or weight.requires_grad
        or (bias is not None and bias.requires_grad)
    ):
        return False
    if weight.dim() == 3:
        A, B, *_ = terms[0]
        if x.dim() != 3 or any(t.shape[:-2] != x.shape[:1] for t in (weight, A, B)):
            return False  # one of them is broadcast
    dtype = x.dtype
    if type(x) not in ORDINARY or type(weight) not in ORDINARY or weight.dtype is not dtype:
        return False
    if bias is not None and (type(bias) not in ORDINARY or bias.dtype is not dtype):
        return False
    for A, B, _, _, _ in terms:
        if type(A) not in ORDINARY or type(B) not in ORDINARY or A.dtype is not dtype or B.dtype is not dtype:
            return False
    return True


class _Scheduled(torch.autograd.Function):
    """`kernels.forward` and `kernels.gradients`."""

    @staticmethod
    def forward(ctx: Any, op: str, dense: bool, spec: Any, x: Any, weight: Any, bias: Any, *tensors: Any) -> Any:
        kept: list[torch.Tensor] = []
        terms = unflat(spec, tensors)
        y = kernels.forward(op, dense, x, weight, bias, terms, kept)
        ctx.op, ctx.dense, ctx.spec, ctx.shape = op, dense, spec, x.shape
        factors: list[torch.Tensor] = []
        # x is kept unless only what dropout made of it is multiplied with a gradient.
        inputs: list[torch.Tensor | None] = [None]
        for A, B, _, _, dropped in terms:
            factors += A, B
            inputs.append(dropped)
            if dropped is None:
                inputs[0] = x
        packed, ctx.recipes = rematerialization.pack(inputs, x)
        ctx.save_for_backward(weight, *factors, *packed, *kept)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:  # type: ignore[override]  # torch declares it for one tensor or several
        if _autocasts():  # it did not in the forward, or this would be an ordinary branch
            with torch.autocast(grad.device.type, enabled=False):
                return _Scheduled.backward(ctx, grad)
        if torch.is_grad_enabled():
            return _differentiable_gradients(ctx, grad)
        x, weight, terms, kept = _saved(ctx)
        op, dense, shape, needs = ctx.op, ctx.dense, ctx.shape, ctx.needs_input_grad
        grad_x, grads = kernels.gradients(op, dense, terms, x, weight, kept, grad, shape, needs[3], needs[6:])
        return None, None, None, grad_x, None, None, *grads


def _saved(ctx: Any) -> tuple[Any, Any, Terms, list[Any]]:
    """x or None, W, the terms, and x·Aᵀ of each."""
    saved = iter(ctx.saved_tensors)
    weight = next(saved)
    factors = [(next(saved), next(saved)) for _ in ctx.spec]
    x, *dropped = rematerialization.unpack(saved, ctx.recipes)
    each = zip(factors, ctx.spec, dropped, strict=True)
    return x, weight, [(A, B, scale, first, d) for (A, B), (scale, first), d in each], list(saved)


def _differentiable_gradients(ctx: Any, grad: Any) -> Any:
    """With create_graph=True: the gradients of `branch`, which autograd can differentiate once more."""
    x, weight, terms, _ = _saved(ctx)
    if x is None:  # a stand-in, whose gradient takes no part of x
        x = grad.new_zeros(ctx.shape, requires_grad=True)
    needs = [ctx.needs_input_grad[3], *ctx.needs_input_grad[6:]]
    tensors = [x, *flat(terms)]
    ours: list[Any] = [None if t is None else t.view_as(t) for t in tensors]  # one may depend on another
    op = "linear" if ctx.op == "linear" else "matmul"
    y = kernels.branch(op, ours[0], weight, None, unflat(ctx.spec, ours[1:]))
    wanted = [t for t, needed in zip(ours, needs, strict=True) if needed]
    found = iter(torch.autograd.grad(y, wanted, grad, create_graph=True))
    grads = [next(found) if needed else None for needed in needs]
    return None, None, None, grads[0], None, None, *grads[1:]
