"""Modules whose layers, forwards and biases are exchanged while they live."""

from __future__ import annotations

import types
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from tests.stateful.table import DOUBLE, Linear, Stateful


class Growing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers, self.head = nn.ModuleList([nn.Linear(6, 6), nn.Linear(6, 6)]), nn.Linear(6, 4)

    def forward(self, x):
        for layer in self.layers:
            x = x + layer(x).tanh()
        return F.linear(x, self.head.weight, self.head.bias)


class Routed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.paths = nn.ModuleDict({"left": nn.Linear(6, 4), "right": Linear()})
        self.route = "left"

    def forward(self, x):
        return self.paths[self.route](x)


class Replaceable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.act, self.head = nn.Linear(6, 5), nn.GELU(), nn.Linear(5, 4)

    def forward(self, x):
        return self.head(self.act(self.inner(x)))


def _halved_forward(self: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    return F.linear(x, self.weight, self.bias) / 2


class OtherForward(nn.Module):
    """A forward that was replaced on the instance, and may be again."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(6, 5), nn.Linear(5, 4)
        self.inner.forward = types.MethodType(_halved_forward, self.inner)  # type: ignore[method-assign]

    def forward(self, x):
        return self.outer(self.inner(x))


class LaterBias(Linear):
    def __init__(self) -> None:
        super().__init__(bias=False)

    def forward(self, x):
        return F.linear(x, self.weight, self.bias)


class LaterBiasInside(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(6, 5, bias=False), nn.Linear(5, 4)

    def forward(self, x):
        return self.outer(self.inner(x).tanh())


def _replace_weight(model: Any) -> None:
    new = torch.linspace(-1, 1, 30, dtype=torch.float64).reshape(5, 6).sin()
    model.inner.weight = nn.Parameter(new, requires_grad=False)


# fmt: off
ROWS = (
    Stateful(Growing,
        ("model.layers.append(nn.Linear(6, 6).double().requires_grad_(False))",
         "model.layers.append(nn.Identity())")),
    Stateful(Routed, ("model.route = 'right'", "model.route = 'left'", "model.paths['left'] = nn.Identity()")),
    Stateful(Replaceable,
        ("model.act = nn.ReLU()", "model.head = nn.Linear(5, 3).double().requires_grad_(False)", _replace_weight)),
    Stateful(OtherForward,
        ("model.inner.__dict__.pop('forward', None)",
         "model.outer.forward = types.MethodType(_halved_forward, model.outer)")),
    Stateful(LaterBias, (f"model.bias = nn.Parameter(torch.ones(4, {DOUBLE}), False)", "model.bias = None")),
    Stateful(LaterBiasInside,
        (f"model.inner.bias = nn.Parameter(torch.ones(5, {DOUBLE}), False)", "model.inner.bias = None",
         _replace_weight)),
)
# fmt: on
