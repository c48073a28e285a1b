"""Modules that make tensors in their forward, and write to them in place."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from tests.stateful.table import Linear, Stateful


class LiteralMask(nn.Module):
    """Its inputs are all of one shape, as in the table of issue 14."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(6, 4))

    def forward(self, x):
        mask = x[..., 0] > 0
        y = torch.zeros(2, 3, 4, dtype=torch.float64)
        y[mask] = (x @ self.w)[mask]
        return y


def of_one_shape() -> tuple[Any, ...]:
    generator = torch.Generator().manual_seed(8)
    return tuple(torch.randn(2, 3, 6, generator=generator, dtype=torch.float64) for _ in range(3))


class Factories(Linear):
    def forward(self, x):
        places = torch.arange(4, dtype=torch.float64) / 4
        frame = torch.ones(3, 4, dtype=torch.float64).triu()
        return (F.linear(x, self.weight, self.bias) + places.to(x.dtype)) @ frame.mT.to(x.dtype)


class NewTensor(Linear):
    """A buffer of zeros that is filled row by row."""

    def forward(self, x):
        y = F.linear(x, self.weight, self.bias)
        out = y.new_zeros(4, 4)
        out[torch.arange(4), torch.arange(4)] = y.mean((0, 1))
        return out + torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=y.dtype)


class InPlaceChain(Linear):
    def forward(self, x):
        y = F.linear(x, self.weight, self.bias)
        y.add_(0.5).mul_(2.0)
        y += 1
        return y.relu_()


class ReluInPlace(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Linear(6, 5), nn.ReLU(inplace=True), nn.Linear(5, 4), nn.Hardtanh(-0.9, 0.9, inplace=True))


class InPlaceOnView(Linear):
    def forward(self, x):
        y = F.linear(x, self.weight, self.bias)
        y[..., :2].mul_(3.0)
        y[..., 2] = 0.0
        return y


class IndexPut(Linear):
    def forward(self, x):
        y = F.linear(x, self.weight, self.bias)
        rows = torch.zeros(x.shape[1], dtype=torch.long)
        return torch.zeros(1, 4, dtype=y.dtype).index_put_((rows,), y.mean(0), accumulate=True)


class Scatter(Linear):
    def forward(self, x):
        y = F.linear(x, self.weight, self.bias)
        index = torch.tensor([0, 1, 1, 0]).expand_as(y)
        return torch.zeros(*y.shape[:-1], 2, dtype=y.dtype).scatter_add_(-1, index, y)


# fmt: off
ROWS = (
    Stateful(LiteralMask, inputs=of_one_shape),
    Stateful(Factories),
    Stateful(NewTensor),
    Stateful(InPlaceChain),
    Stateful(ReluInPlace, ("model[1].inplace = False", "model[1] = nn.Tanh()")),
    Stateful(InPlaceOnView),
    Stateful(IndexPut),
    Stateful(Scatter),
)
# fmt: on
