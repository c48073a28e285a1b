"""In which order the branch of a plain matmul is computed: what is passed over, and what backward keeps.

* ``branch``: matmuls and an add, as one would write it. Every pass of autograd is an op of its own.
* ``in_place``: the branch is accumulated onto y, and backward is autograd's own. Two ops less, and no Python in
  backward: the cheapest where calls are small.
* ``fused``: the matmuls accumulate the branch onto y, and its gradient onto that of x. Backward keeps x and x·Aᵀ,
  and no x that autograd can make again from what it keeps anyway (`rematerialization`).
* ``dense``: y = x·(W + s·B·A)ᵀ + bias, the sum made anew in each forward and backward, never kept. Two passes over W in
  place of two over x and y each: cheaper where the tokens are many. Only in dtypes that lose nothing by it, and without
  dropout on the branch.
* ``auto`` takes in each call the one that is expected to take the least time on its device (`costs`); up to `TINY`,
  where to find that out costs more than it saves, ``in_place``.

All are the same function of x, A and B, with the same first and second derivatives. Wherever more than a call is at
stake, when a program is compiled, captured, exported or transformed, they are the plain `branch`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import fx
from torch.autograd import forward_ad

from lora_fx.deltas import costs, kernels, one_pass, rematerialization
from lora_fx.deltas.compiled_schedules import ORDINARY, compiled, may_compile
from lora_fx.deltas.kernels import Terms, loses_nothing
from lora_fx.graph.capture import recording
from lora_fx.graph.written import only_looked_at

AUTO, BRANCH, IN_PLACE, FUSED, DENSE = "auto", "branch", "in_place", "fused", "dense"
SCHEDULES = (AUTO, BRANCH, IN_PLACE, FUSED, DENSE)

_transforms, _traces = torch._C._are_functorch_transforms_active, torch._C._is_tracing
_autocasts, _modes = torch._C._is_any_autocast_enabled, torch._C._len_torch_dispatch_stack

TINY = 2**11
"""Elements of x up to which to choose takes as long as there is to gain by it: a matrix takes `in_place`."""

_LARGE = 2**16
"""Elements of x from which on memory is worth the time to find out what autograd keeps anyway."""


def matmul(op: str, x: Any, weight: Any, bias: Any, terms: Terms, schedule: str) -> Any:
    """x·Wᵀ + bias + Σ s·(x·Aᵀ)·Bᵀ.

    Args:
        op: one of `kernels.OPS`.
        schedule: one of `SCHEDULES`.
    """
    if torch.compiler.is_compiling():
        terms = kernels.cast(terms, weight.dtype)
        if schedule in (AUTO, FUSED) and may_compile(x, weight, bias, terms):
            return compiled(op, x, weight, bias, terms)
        return kernels.branch(op, x, weight, bias, terms)
    if type(weight) is fx.Proxy:  # a module is rewritten, or a rewritten one is unpickled: one node
        terms = tuple(map(tuple, terms))
        return weight.tracer.create_proxy("call_function", matmul, (op, x, weight, bias, terms, schedule), {})
    if schedule == BRANCH or not may_schedule(x, weight, bias, terms):
        return kernels.branch(op, x, weight, bias, terms)
    if weight.is_cuda:
        if schedule in (AUTO, FUSED) and one_pass.takes(x, weight, terms):
            return one_pass.matmul(op, x, weight, bias, terms)
        terms = one_pass.made(terms)
    if schedule == AUTO and x.numel() <= TINY and weight.dim() == 2:
        return kernels.in_place(op, x, weight, bias, terms)
    needed = False
    if torch.is_grad_enabled():
        tensors: list[Any] = []
        needed = x.requires_grad
        for A, B, _, _, dropped in terms:
            tensors += A, B, None if dropped is x else dropped
            needed = needed or A.requires_grad or B.requires_grad
    if schedule in (AUTO, DENSE):
        schedule = _taken(op, schedule, x, weight, terms)
    if schedule == IN_PLACE and weight.dim() == 2:
        return kernels.in_place(op, x, weight, bias, terms)
    dense = schedule == DENSE
    if needed:
        return _apply(op, dense, terms, x, weight, bias, *tensors)
    return kernels.forward(op, dense, x, weight, bias, kernels.cast(terms, weight.dtype), [])


def _taken(op: str, schedule: str, x: Any, weight: Any, terms: Terms) -> str:
    """Which of the schedules that this call can have."""
    shape, (A, *_) = weight.shape, terms[0]
    in_place = len(shape) == 2
    dense = loses_nothing(weight.dtype) and weight.is_contiguous()  # as the sum will be; the model may have been cast
    for _, B, _, _, dropped in terms:
        in_place = in_place and B.shape[0] == shape[0 if op == "linear" else 1]  # autograd copies around a part
        dense = dense and (dropped is None or dropped is x)
    if schedule == DENSE:
        return DENSE if dense else FUSED
    tokens = x.shape[1] if len(shape) == 3 else x.numel() // max(x.shape[-1], 1)
    cast = A.dtype is not weight.dtype
    return _cheapest(shape, A.shape[-2], weight.itemsize, cast, in_place, dense, tokens, x.device)


@lru_cache(maxsize=2**14)
def _cheapest(
    shape: torch.Size, rank: int, size: int, cast: bool, in_place: bool, dense: bool, tokens: int, device: torch.device
) -> str:
    case = costs.Matmul(shape[-2], shape[-1], rank, size, cast)  # in and out cost the same
    able = [name for name, can in ((IN_PLACE, in_place), (FUSED, True), (DENSE, dense)) if can]
    return costs.cheapest(able, case, tokens, costs.device_class(device))


def add(total: Any, own: Any) -> Any:
    """total + own, laid out as `total` is where a call is all that is at stake.

    An axis of one element has a stride too. It says nothing of where things lie, so an addition does not keep it; but
    torch's convolutions choose their kernels by it, and round accordingly.
    """
    if type(total) is fx.Proxy:
        return total.tracer.create_proxy("call_function", add, (total, own), {})
    result = total + own
    if type(total) not in ORDINARY or total.is_nested or torch.compiler.is_compiling() or recording.on or _traces():
        return result
    strides = total.stride()
    if result.stride() == strides or not _lies_alike(result, strides):
        return result
    return result.as_strided(result.shape, strides)


def _lies_alike(tensor: torch.Tensor, strides: Sequence[int]) -> bool:
    """Whether these strides say the same of where the elements lie."""
    each = zip(tensor.shape, tensor.stride(), strides, strict=True)
    return all(size == 1 or own == other for size, own, other in each)


def may_schedule(x: Any, weight: Any, bias: Any, terms: Terms) -> bool:
    """Whether all are ordinary tensors of one dtype, with W frozen, and nothing transforms or records the call."""
    if (
        recording.on
        or _transforms()
        or _traces()
        or forward_ad._current_level >= 0
        or _autocasts()
        # what records or counts ops, or keeps what they give, as selective checkpointing does
        or (_modes() and not only_looked_at())
        or weight.requires_grad
        or x.is_nested
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
    for A, B, _, _, _ in terms:  # noqa: SIM110  # a generator takes longer than what it would say
        if type(A) not in ORDINARY or type(B) not in ORDINARY:
            return False
    return True


class _Scheduled(torch.autograd.Function):
    """`kernels.forward` and `kernels.gradients`. Each line of it is a part of what a call costs."""

    @staticmethod
    def forward(ctx: Any, op: str, dense: bool, own: Any, x: Any, weight: Any, bias: Any, *tensors: Any) -> Any:
        """`tensors` are those of the terms, flat: autograd sees none inside of other things."""
        kept: list[torch.Tensor] = []
        terms = kernels.cast(own, weight.dtype)
        y = kernels.forward(op, dense, x, weight, bias, terms, kept)
        # x is kept unless only what dropout made of it is multiplied with a gradient.
        inputs: list[Any] = [None]
        spec: list[tuple[float, int]] = []
        used: list[Any] = []
        given: list[Any] = []
        for k, (A, B, scale, first, _) in enumerate(terms):
            dropped = tensors[3 * k + 2]
            inputs.append(dropped)
            if dropped is None:
                inputs[0] = x
            spec.append((scale, first))
            used += A, B
            if terms is not own:
                given += tensors[3 * k : 3 * k + 2]
        ctx.recipes = None
        if x.numel() >= _LARGE:
            inputs, ctx.recipes = rematerialization.pack(inputs, x, tensors[0])
        ctx.op, ctx.dense, ctx.spec, ctx.shape, ctx.is_cast = op, dense, spec, x.shape, terms is not own
        ctx.save_for_backward(weight, *used, *given, *kept, *inputs)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:  # type: ignore[override]  # torch declares it for one tensor or several
        if _autocasts():  # it did not in the forward, or this would be an ordinary branch
            with torch.autocast(grad.device.type, enabled=False):
                return _Scheduled.backward(ctx, grad)
        if torch.is_grad_enabled():
            return _differentiable_gradients(ctx, grad)
        x, weight, terms, kept, given = _saved(ctx)
        op, dense, shape, needs = ctx.op, ctx.dense, ctx.shape, ctx.needs_input_grad
        grad_x, grads = kernels.gradients(op, dense, terms, x, weight, kept, grad, shape, needs[3], needs[6:])
        for k, factor in enumerate(given):  # in order, or autograd would copy it once more
            at = 3 * (k // 2) + k % 2
            if (own := grads[at]) is not None:
                grads[at] = own.to(factor.dtype, memory_format=torch.contiguous_format)
        return None, None, None, grad_x, None, None, *grads


#: without torch's look for wrappers that a transform has left behind: inside of one, no schedule is taken
_apply = super(torch.autograd.Function, _Scheduled).apply


def _saved(ctx: Any) -> tuple[Any, Any, Terms, Sequence[Any], Sequence[Any]]:
    """x or None, W, the terms, A·xᵀ of each, and the factors as they were given, if those of the terms are cast."""
    saved, n = ctx.saved_tensors, len(ctx.spec)
    first_given = 1 + 2 * n
    first_kept = first_given + (2 * n if ctx.is_cast else 0)
    first_input = first_kept + (0 if ctx.dense else n)
    inputs = saved[first_input:]
    if ctx.recipes is not None:
        inputs = rematerialization.unpack(iter(inputs), ctx.recipes)
    terms = [(saved[2 * k + 1], saved[2 * k + 2], *ctx.spec[k], inputs[k + 1]) for k in range(n)]
    return inputs[0], saved[0], terms, saved[first_kept:first_input], saved[first_given:first_kept]


def _differentiable_gradients(ctx: Any, grad: Any) -> Any:
    """With create_graph=True: the gradients of `branch`, which autograd can differentiate once more."""
    x, weight, terms, _, given = _saved(ctx)
    if x is None:  # a stand-in, whose gradient takes no part of x
        x = grad.new_zeros(ctx.shape, requires_grad=True)
    tensors = [x]
    for k, (A, B, _, _, dropped) in enumerate(terms):
        tensors += *(given[2 * k : 2 * k + 2] or (A, B)), dropped
    needs = [ctx.needs_input_grad[3], *ctx.needs_input_grad[6:]]
    ours: list[Any] = [None if t is None else t.view_as(t) for t in tensors]  # one may depend on another
    op = "linear" if ctx.op == "linear" else "matmul"
    each = zip(ours[1::3], ours[2::3], ctx.spec, ours[3::3], strict=True)
    y = kernels.branch(op, ours[0], weight, None, [(A, B, *spec, dropped) for A, B, spec, dropped in each])
    wanted = [t for t, needed in zip(ours, needs, strict=True) if needed]
    found = iter(torch.autograd.grad(y, wanted, grad, create_graph=True))
    grads = [next(found) if needed else None for needed in needs]
    return None, None, None, grads[0], None, None, *grads[1:]
