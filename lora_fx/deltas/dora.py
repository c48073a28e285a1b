"""DoRA's arithmetic (Liu et al., ICML 2024):   W' = c ⊙ V,   V = W + s·B·A,   c = m / ‖V‖ for each output feature.

The norm is a constant to autograd (section 4.3 of the paper). W is (batch…, out, in), m (batch…, out, 1).

A linear is computed with W' itself, made anew in each forward and backward. Its gradients need no product of the size
of W, which autograd would make of it:

    ∂A = s·(g·(c ⊙ B))ᵀ·x        ∂B = s·c ⊙ (gᵀ·(x·Aᵀ))        ∂m = Σ g ⊙ (y − bias) / m        ∂x = g·W'
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from lora_fx.deltas import kernels, rematerialization, schedules


def turned(weight: Any, theta: Any) -> Any:
    """V = W + s·B·A."""
    if theta.A.ndim == 2:
        return torch.addmm(weight, theta.B, theta.A, alpha=theta.scale)
    return weight + theta.scale * (theta.B @ theta.A)


def size(weight: Any, theta: Any) -> Any:
    """‖V‖ over the inputs of each feature, (batch…, out, 1), without a gradient."""
    return torch.linalg.vector_norm(turned(weight, theta).detach(), dim=-1, keepdim=True)


def branch(product: Any, weight: Any, theta: Any) -> Any:
    """x·δᵀ = (c − 1) ⊙ x·Wᵀ + c ⊙ s·(x·Aᵀ)·Bᵀ."""
    c = theta.magnitude / size(weight, theta)
    return product.features(c - 1) * product.base + product.features(c) * product.low_rank(theta.A, theta.B)


def matmul(op: str, x: Any, weight: Any, bias: Any, theta: Any) -> Any:
    """The op on W', where a call of ours can stand for it; None elsewhere.

    Args:
        op: one of `kernels.OPS`. Only a linear's W lies as it does in here, so that c is 1 to the bit at the start.
    """
    terms = ((theta.A, theta.B, theta.scale, 0, None),)
    if op != "linear" or torch.compiler.is_compiling() or not kernels.loses_nothing(x.dtype):
        return None
    if not schedules.may_schedule(x, weight, bias, terms) or any(
        t.dtype != x.dtype for t in (theta.A, theta.B, theta.magnitude)
    ):
        return None
    return _Linear.apply(theta.scale, x, weight, bias, theta.A, theta.B, theta.magnitude)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, scale: float, x: Any, weight: Any, bias: Any, A: Any, B: Any, magnitude: Any) -> Any:
        own = torch.addmm(weight, B, A, alpha=scale)
        c = magnitude / torch.linalg.vector_norm(own, dim=-1, keepdim=True)
        y = kernels.no_view(F.linear(x, own.mul_(c), bias))
        if any(ctx.needs_input_grad):
            plain = y.clone() if bias is None else y - bias  # what comes after may write into y
            saved, ctx.recipes = rematerialization.pack([x], x, A)
            ctx.scale, ctx.shape = scale, x.shape
            ctx.save_for_backward(weight, bias, A, B, magnitude, c, plain, *saved)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:  # type: ignore[override]  # torch declares it for one tensor or several
        weight, bias, A, B, magnitude, c, plain, *saved = ctx.saved_tensors
        (x,) = rematerialization.unpack(iter(saved), ctx.recipes)
        _, needs_x, _, _, needs_a, needs_b, needs_m = needs = ctx.needs_input_grad
        if torch.is_grad_enabled():
            return None, *_differentiable(ctx.scale, grad, needs[1:], x, weight, bias, A, B, magnitude)
        g, rows = grad.reshape(-1, grad.shape[-1]), x.reshape(-1, x.shape[-1])
        grad_x = grad_a = grad_b = grad_m = None
        if needs_x:
            grad_x = torch.mm(g, torch.addmm(weight, B, A, alpha=ctx.scale).mul_(c)).view(ctx.shape)
        if needs_a:
            grad_a = torch.mm((c * B).t(), g.t()).mm(rows).mul_(ctx.scale)
        if needs_b:
            grad_b = torch.mm(A, rows.t()).mm(g).mul_(ctx.scale).t() * c
        if needs_m:
            own, size = plain.reshape(g.shape), magnitude
            if not bool((magnitude != 0).all()):  # then y says nothing of V
                whole = torch.addmm(weight, B, A, alpha=ctx.scale)
                own, size = torch.mm(rows, whole.t()), torch.linalg.vector_norm(whole, dim=-1, keepdim=True)
            grad_m = (g * own).sum(0).unsqueeze(-1) / size
        return None, grad_x, None, None, grad_a, grad_b, grad_m


def _differentiable(scale: float, grad: Any, needs: Any, *inputs: Any) -> list[Any]:
    """With create_graph=True: the gradients of the same in plain ops, which autograd can differentiate once more."""
    ours: list[Any] = [None if t is None else t.view_as(t) for t in inputs]  # one may depend on another
    x, weight, bias, A, B, magnitude = ours
    own = torch.addmm(weight, B, A, alpha=scale)
    y = F.linear(x, magnitude / torch.linalg.vector_norm(own.detach(), dim=-1, keepdim=True) * own, bias)
    wanted = [t for t, needed in zip(ours, needs, strict=True) if needed]
    found = iter(torch.autograd.grad(y, wanted, grad, create_graph=True))
    return [next(found) if needed else None for needed in needs]
