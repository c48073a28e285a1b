"""The schedule `fused` in a program that Dynamo compiles: one op, which it does not look into."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from lora_fx.deltas import kernels
from lora_fx.deltas.kernels import Term, Terms

ORDINARY = (torch.Tensor, torch.nn.Parameter)


_LARGE = 2**16
"""Elements of W from which on a pass over y takes longer than what an op of ours costs."""


def may_compile(x: Any, weight: Any, bias: Any, terms: Terms) -> bool:
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
        or (bias is not None and (type(bias) not in ORDINARY or bias.requires_grad or bias.dtype != x.dtype))
    ):
        return False
    if len({dropped is not None for *_, dropped in terms}) != 1:
        return False
    tensors = [x, weight, *(t for A, B, *_ in terms for t in (A, B))]  # a DTensor has no rule for an op of ours
    return all(type(t) in ORDINARY and t.dtype == x.dtype for t in tensors)


def compiled(op: str, x: Any, weight: Any, bias: Any, terms: Terms) -> Any:
    """y, by the op."""
    A, B, scales, firsts, each = map(list, zip(*terms, strict=True))
    dropped = [t for t in each if t is not None]
    scales = [torch.as_tensor(scale, dtype=torch.float64) for scale in scales]
    return torch.ops.lora_fx.fused_matmul(op, x, weight, bias, A, B, scales, firsts, dropped)[0]


def _terms(A: Any, B: Any, scales: Any, firsts: Any, dropped: Any) -> list[Term]:
    return list(map(Term, A, B, map(float, scales), firsts, dropped or [None] * len(scales)))


@torch.library.custom_op("lora_fx::fused_matmul", mutates_args=())
def _fused_matmul(
    op: str,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    A: Sequence[torch.Tensor],
    B: Sequence[torch.Tensor],
    scales: Sequence[torch.Tensor],
    firsts: Sequence[int],
    dropped: Sequence[torch.Tensor],
) -> list[torch.Tensor]:
    """y, and A·xᵀ of each term. Scales are tensors of no axes on the CPU."""
    kept: list[torch.Tensor] = []
    y = kernels.forward(op, False, x, weight, bias, _terms(A, B, scales, firsts, dropped), kept)
    return [y, *kept]


@_fused_matmul.register_fake
def _(op: Any, x: Any, weight: Any, bias: Any, A: Any, *rest: Any) -> Any:
    tokens = x.numel() // x.shape[-1]
    y = x.new_empty(*x.shape[:-1], weight.shape[0 if op == "linear" else 1])
    return [y, *(x.new_empty(a.shape[0], tokens) for a in A)]


@torch.library.custom_op("lora_fx::fused_matmul_backward", mutates_args=())
def _fused_matmul_backward(
    op: str,
    x: torch.Tensor,
    weight: torch.Tensor,
    A: Sequence[torch.Tensor],
    B: Sequence[torch.Tensor],
    scales: Sequence[torch.Tensor],
    firsts: Sequence[int],
    dropped: Sequence[torch.Tensor],
    kept: Sequence[torch.Tensor],
    grad: torch.Tensor,
    needs_x: bool,
) -> list[torch.Tensor]:
    """The gradients of every A, of every B, of each x with dropout, and of x, if that is needed."""
    terms = _terms(A, B, scales, firsts, dropped)
    needs = [True, True, bool(dropped)] * len(terms)
    grad_x, flat = kernels.gradients(op, False, terms, x, weight, kept, grad, x.shape, needs_x, needs)
    factors = [g.contiguous() for g in (*flat[::3], *flat[1::3]) if g is not None]
    return [*factors, *(g for g in (*flat[2::3], grad_x) if g is not None)]


@_fused_matmul_backward.register_fake
def _(op: Any, x: Any, weight: Any, A: Any, B: Any, scales: Any, firsts: Any, dropped: Any, kept: Any, grad: Any,
      needs_x: Any) -> Any:  # fmt: skip
    return [t.new_empty(t.shape) for t in (*A, *B, *dropped, *([x] if needs_x else []))]


def _keep(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.op, x, weight, _, A, B, scales, ctx.firsts, dropped = inputs
    ctx.dropped = len(dropped)
    ctx.save_for_backward(x, weight, *A, *B, *scales, *dropped, *output[1:])


def _backward(ctx: Any, grads: Any) -> Any:
    saved = iter(ctx.saved_tensors)
    x, weight = next(saved), next(saved)
    n = len(ctx.firsts)
    A, B, scales, dropped = ([next(saved) for _ in range(k)] for k in (n, n, n, ctx.dropped))
    needs_x = ctx.needs_input_grad[1]
    backward = torch.ops.lora_fx.fused_matmul_backward
    found = iter(backward(ctx.op, x, weight, A, B, scales, ctx.firsts, dropped, list(saved), grads[0], needs_x))
    grad_a, grad_b, grad_dropped = ([next(found) for _ in tensors] for tensors in (A, B, dropped))
    return None, next(found, None), None, None, grad_a, grad_b, [None] * n, None, grad_dropped


torch.library.register_autograd("lora_fx::fused_matmul", _backward, setup_context=_keep)
