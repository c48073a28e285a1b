"""The schedule `fused` beside large matmuls of half precision on a GPU: kernels that pass over features once.

The same function of x, A and B as the others, and its gradients; the kernels, and what they save, are those of
`gpu_kernels`. The gradient of x begins as the branch's share, which the frozen matmul accumulates onto while it
computes. Dropout on the branch's input is a `Dropped`: what to drop, which the kernels do on the way, so that neither
what came of it nor a mask is ever there. Whatever else reads a `Dropped` gets the tensor.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import get_proxy_mode
from torch.utils import _pytree as pytree

from lora_fx.deltas import kernels, rematerialization
from lora_fx.deltas.compiled_schedules import ORDINARY
from lora_fx.deltas.kernels import Terms
from lora_fx.deltas.triton_route import BRANCHES
from lora_fx.errors import LoraFxError
from lora_fx.graph.capture import recording

_RANKS = 64
"""For more of them the blocks of the kernels have no room."""


def takes(x: Any, weight: Any, terms: Terms) -> bool:
    """Whether a call that may be scheduled is one for the kernels."""
    if weight.dim() != 2 or x.dim() < 2:
        return False
    tokens = x.numel() // max(x.shape[-1], 1)
    if not BRANCHES.knows(x.dtype, tokens * max(weight.shape)) or torch.cuda.is_current_stream_capturing():
        return False
    for A, B, scale, _, dropped in terms:
        if not (dropped is None or dropped is x or (type(dropped) is Dropped and dropped.is_of(x))):
            return False
        if A.dtype is not B.dtype or A.dtype is torch.float64 or not isinstance(scale, int | float):
            return False
        if A.dim() != 2 or not 0 < len(A) <= _RANKS:
            return False
    return BRANCHES.runs_on(x.device)


def matmul(op: str, x: Any, weight: Any, bias: Any, terms: Terms) -> Any:
    """As `schedules.matmul`."""
    spec = tuple((s, first, d.drop if type(d) is Dropped else None) for _, _, s, first, d in terms)
    factors = [factor for A, B, *_ in terms for factor in (A, B)]
    if torch.is_grad_enabled() and any(t.requires_grad for t in (x, *factors)):
        return _OnePass.apply(op, spec, x, weight, bias, *factors)
    return _forward(op, spec, x, weight, bias, factors)[0]


# ── dropout ──────────────────────────────────────────────────────────────────────────────────────────────────────────


class Dropped(torch.Tensor):
    """x with dropout, which is made where it is read; the kernels read x and drop on the way."""

    x: torch.Tensor
    drop: Any
    _version_of_x: int
    _made: torch.Tensor | None

    @staticmethod
    def of(x: torch.Tensor, p: float) -> Dropped:
        from lora_fx.deltas.gpu_kernels import Drop

        new: Any = torch.Tensor._make_wrapper_subclass  # type: ignore[attr-defined]
        own = new(Dropped, x.shape, strides=x.stride(), dtype=x.dtype, device=x.device)
        own.x, own.drop, own._version_of_x, own._made = x, Drop(_seed(x.device), p), x._version, None
        return own

    def is_of(self, x: Any) -> bool:
        """It is what dropout made of this tensor as it is now."""
        return self.x is x and self._version_of_x == x._version

    @property
    def made(self) -> torch.Tensor:
        """The tensor: its gradient drops what it dropped.

        Raises:
            LoraFxError: x was written to since.
        """
        if self._made is None:
            if not self.is_of(self.x):
                raise LoraFxError(
                    "the input of a branch was written to between its dropout and the use of that",
                    place="adapter.dropout",
                    remedy="write into a copy, as x = x + 1 does",
                )
            self._made = _Drop.apply(self.x, self.drop)
        return self._made

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = pytree.tree_map_only(Dropped, lambda one: one.made, (args, kwargs or {}))
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        raise TypeError(f"{func} was asked of an input with dropout behind torch's back: it has no numbers there")


def may_drop(x: Any) -> bool:
    """Whether dropout of x is left to the kernels. Nothing decides that could be another when a checkpoint computes it
    again."""
    if type(x) not in ORDINARY or not x.is_cuda or x.dim() < 2 or not BRANCHES.knows(x.dtype, x.numel()):
        return False
    if recording.on or torch._C._is_tracing() or get_proxy_mode() is not None or not x.is_contiguous():
        return False
    if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0 or x.is_inference():
        return False
    return not torch.cuda.is_current_stream_capturing() and BRANCHES.runs_on(x.device)


def made(terms: Terms) -> Terms:
    """The same with tensors alone."""
    if any(type(dropped) is Dropped for *_, dropped in terms):
        return [(*term[:4], term[4].made if type(term[4]) is Dropped else term[4]) for term in terms]
    return terms


def _seed(device: torch.device) -> int:
    """64 bits of torch's generator of this device, which goes on as after a draw; the device is not waited for."""
    generator: Any = torch.cuda.default_generators[device.index or 0]
    offset = generator.get_offset()
    generator.set_offset(offset + 4)
    bits = (generator.initial_seed() + (offset + 1) * 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
    for shift, by in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):  # so that the next seed is far from this one
        bits = ((bits ^ bits >> shift) * by) & 0xFFFFFFFFFFFFFFFF
    return bits ^ bits >> 31


class _Drop(torch.autograd.Function):
    """x with dropout; of which backward keeps the seed."""

    @staticmethod
    def forward(ctx: Any, x: Any, drop: Any) -> Any:  # type: ignore[override]
        from lora_fx.deltas import gpu_kernels

        ctx.drop = drop
        return gpu_kernels.dropped(_rows(x), drop).view(x.shape)

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:  # type: ignore[override]
        return _Drop.apply(grad, ctx.drop), None


# ── a matmul ─────────────────────────────────────────────────────────────────────────────────────────────────────────

_Spec = Sequence[tuple[float, int, Any]]
"""Of each term its scale, the first output feature that B makes, and what is dropped of x, or None."""


def _rows(t: torch.Tensor) -> torch.Tensor:
    """All tokens in one axis, each without gaps."""
    rows = t.reshape(-1, t.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


def _forward(op: str, spec: _Spec, x: Any, weight: Any, bias: Any, factors: Sequence[Any]) -> tuple[Any, list[Any]]:
    """y, which is no view, and A·xᵀ of each term."""
    from lora_fx.deltas import gpu_kernels

    y = kernels.no_view(kernels.OPS[op](x, weight, bias).contiguous())
    rows, own, kept = y.view(-1, y.shape[-1]), _rows(x), []
    for A, B, (scale, first, drop) in zip(factors[::2], factors[1::2], spec, strict=True):
        z, _ = gpu_kernels.passed(own, q=A.mT, drop=drop)
        gpu_kernels.written(rows.narrow(1, first, len(B)), z, B, scale, add=True)
        kept.append(z)
    return y, kept


class _OnePass(torch.autograd.Function):
    """`_forward`, and its gradients."""

    @staticmethod
    def forward(ctx: Any, op: str, spec: _Spec, x: Any, weight: Any, bias: Any, *factors: Any) -> Any:  # type: ignore[override]
        y, kept = _forward(op, spec, x, weight, bias, factors)
        saved, ctx.recipes = rematerialization.pack([x], x, factors[0])
        ctx.op, ctx.spec, ctx.shape = op, spec, x.shape
        ctx.save_for_backward(weight, *factors, *kept, *saved)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:  # type: ignore[override]
        n = len(ctx.spec)
        weight, *rest = ctx.saved_tensors
        factors, kept, packed = rest[: 2 * n], rest[2 * n : 3 * n], rest[3 * n :]
        (x,) = rematerialization.unpack(iter(packed), ctx.recipes)
        needs_x, needs = ctx.needs_input_grad[2], ctx.needs_input_grad[5:]
        with torch.autocast(grad.device.type, enabled=False):
            if torch.is_grad_enabled():
                grad_x, grads = _differentiable(ctx, x, weight, factors, grad, needs_x, needs)
            else:
                grad_x, grads = _gradients(ctx, x, weight, factors, kept, grad, needs_x, needs)
        return None, None, grad_x, None, None, *grads


def _gradients(
    ctx: Any, x: Any, weight: Any, factors: Any, kept: Any, grad: Any, needs_x: bool, needs: Sequence[bool]
) -> tuple[Any, list[Any]]:
    from lora_fx.deltas import gpu_kernels

    own, g = _rows(x), _rows(grad)
    dx, grads = torch.empty_like(own) if needs_x else None, list[Any]()
    for k, (scale, first, drop) in enumerate(ctx.spec):
        A, B = factors[2 * k : 2 * k + 2]
        needs_a, needs_b = needs[2 * k : 2 * k + 2]
        mine, flows, z = g.narrow(1, first, len(B)), needs_a or needs_x, kept[k] if needs_b else None
        h: Any = None
        grad_a = grad_b = None
        if flows or needs_b:
            h, grad_b = gpu_kernels.passed(mine, q=B if flows else None, z=z, scale=scale, tall=True)
        if needs_a:
            _, grad_a = gpu_kernels.passed(own, z=h, scale=scale, drop=drop)
        if dx is not None:
            gpu_kernels.written(dx, h, A.mT, scale, add=k > 0, drop=drop)
        grads += [None if t is None else t.to(A.dtype) for t in (grad_a, grad_b)]
    if dx is not None:
        dx = dx.addmm_(g, weight if ctx.op == "linear" else weight.mT).view(ctx.shape)
    return dx, grads


def _differentiable(
    ctx: Any, x: Any, weight: Any, factors: Any, grad: Any, needs_x: bool, needs: Sequence[bool]
) -> tuple[Any, list[Any]]:
    """With create_graph=True: those of the plain branch, which autograd can differentiate once more."""
    x, *ours = (t.view_as(t) for t in (x, *factors))  # one may depend on another
    terms = [
        (A, B, scale, first, None if drop is None else _Drop.apply(x, drop))
        for A, B, (scale, first, drop) in zip(ours[::2], ours[1::2], ctx.spec, strict=True)
    ]
    y = kernels.branch("linear" if ctx.op == "linear" else "matmul", x, weight, None, terms)
    wanted = [t for t, needed in zip((x, *ours), (needs_x, *needs), strict=True) if needed]
    found = iter(torch.autograd.grad(y, wanted, grad, create_graph=True))
    grad_x, *grads = [next(found) if needed else None for needed in (needs_x, *needs)]
    return grad_x, grads
