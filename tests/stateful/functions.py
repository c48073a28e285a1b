"""Modules with hooks, checkpoints, functions of their own and gradients inside the forward."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from tests.stateful.table import Linear, Stateful


def _doubled(module: Any, args: Any, output: Any) -> Any:
    module.seen = getattr(module, "seen", 0) + 1
    return output * 2


def _shifted(module: nn.Module, args: Any) -> Any:
    return tuple(arg + 0.5 for arg in args)


def _louder(module: nn.Module, grad_input: Any, grad_output: Any) -> Any:
    return tuple(None if g is None else g * 3 for g in grad_input)


class Hooked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(6, 5), nn.Linear(5, 4)
        self.inner.register_forward_hook(_doubled)
        self.outer.register_forward_pre_hook(_shifted)

    def forward(self, x):
        return self.outer(self.inner(x).tanh())


class BackwardHooked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(6, 5), nn.Linear(5, 4)
        self.outer.register_full_backward_hook(_louder)

    def forward(self, x):
        return self.outer(self.inner(x).tanh())


class TensorHooked(Linear):
    def __init__(self) -> None:
        super().__init__()
        self.factor = 2.0

    def forward(self, x):
        y = F.linear(x, self.weight, self.bias)
        if y.requires_grad:
            y.register_hook(lambda g: g * self.factor)
        return y.tanh()


class Checkpointed(nn.Module):
    reentrant: ClassVar[bool] = False

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.w, self.runs = nn.Linear(6, 5), nn.Parameter(torch.randn(4, 5)), 0

    def block(self, x):
        self.runs += 1
        return F.linear(self.inner(x).tanh(), self.w)

    def forward(self, x):
        return checkpoint(self.block, x, use_reentrant=self.reentrant)


class CheckpointedReentrant(Checkpointed):
    reentrant = True


class Multiply(torch.autograd.Function):
    """x·Wᵀ with a gradient of its own: twice that of W, half that of x."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return x @ weight.mT

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        return grad @ weight / 2, 2 * torch.einsum("...o,...i->oi", grad, x)


class CustomFunction(Linear):
    def forward(self, x):
        return Multiply.apply(x, self.weight) + self.bias


class _Reverse(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, strength):
        ctx.strength = strength
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return -ctx.strength * grad, None


class GradientReversal(Linear):
    def __init__(self) -> None:
        super().__init__()
        self.strength = 1.0

    def forward(self, x):
        return _Reverse.apply(F.linear(x, self.weight, self.bias), self.strength).tanh()


class Vmapped(Linear):
    def __init__(self) -> None:
        super().__init__()
        self.scale = 2.0

    def forward(self, x):
        return torch.func.vmap(lambda row: F.linear(row, self.weight, self.bias) * self.scale)(x)


class Force(nn.Module):
    """The gradient of an energy, as force fields have it."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(6, 5), nn.Linear(5, 1)

    def energy(self, x):
        return self.outer(self.inner(x).tanh()).sum()

    def forward(self, x):
        return -torch.func.grad(self.energy)(x)


class AutogradForce(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w, self.outer = nn.Parameter(torch.randn(6, 5)), nn.Linear(5, 1)

    def forward(self, x):
        with torch.enable_grad():
            x = x if x.requires_grad else x.clone().requires_grad_()
            energy = self.outer((x @ self.w).tanh()).sum()
            return -torch.autograd.grad(energy, x, create_graph=self.training)[0]


class FunctionalCall(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.scale = nn.Linear(6, 4), 1.5

    def forward(self, x):
        weights = {name: p * self.scale for name, p in self.inner.named_parameters()}
        return torch.func.functional_call(self.inner, weights, (x,))


# fmt: off
ROWS = (
    Stateful(Hooked, ("model.inner.register_forward_hook(_doubled)", "model.inner._forward_hooks.clear()")),
    Stateful(BackwardHooked, ("model.inner.register_full_backward_hook(_louder)",)),
    Stateful(TensorHooked, ("model.factor = 5.0",)),
    Stateful(Checkpointed, ("model.runs = 0",)),
    Stateful(CheckpointedReentrant, ("model.runs = 0",)),
    Stateful(CustomFunction, checked=True),
    Stateful(GradientReversal, ("model.strength = 0.25",)),
    Stateful(Vmapped, ("model.scale = 3.0",)),
    Stateful(Force),
    Stateful(AutogradForce),
    Stateful(FunctionalCall, refused="inner.weight: the adapted model is not the model with W"),
)
# fmt: on
