"""Modules whose weights are listed, tied, borrowed, computed, or in the hands of torch's own layers."""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import nn

from tests.stateful.table import Linear, Stateful


class Listed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.ParameterList([nn.Parameter(torch.randn(5, 6)), nn.Parameter(torch.randn(4, 5))])
        self.slope = 0.1

    def forward(self, x):
        for weight in self.weights:
            x = F.leaky_relu(F.linear(x, weight), self.slope)
        return x


class NamedWeights(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        weights = {"a": nn.Parameter(torch.randn(4, 6)), "b": nn.Parameter(torch.randn(4, 6))}
        self.weights, self.route = nn.ParameterDict(weights), "a"

    def forward(self, x):
        return F.linear(x, self.weights[self.route])


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.head, self.scale = nn.Embedding(7, 5), nn.Linear(5, 7, bias=False), 1.0
        self.head.weight = self.table.weight

    def forward(self, ids):
        return self.head(self.table(ids).tanh()) * self.scale


def token_ids() -> tuple[Any, ...]:
    return torch.tensor([[1, 2, 3], [4, 5, 6]]), torch.tensor([[0, 6]]), torch.tensor([[3], [3], [1]])


class Borrowed(nn.Module):
    """A weight that another module multiplies with, and a penalty on its size."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.penalty = nn.Linear(6, 4), torch.zeros(())

    def forward(self, x):
        y = self.inner(x)
        self.penalty = self.inner.weight.square().sum().detach()
        return F.linear(y, self.inner.weight.mT) + self.penalty


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention, self.scale = nn.MultiheadAttention(6, 2, batch_first=True), 1.0
        self.maps: list[torch.Tensor] = []

    def forward(self, x):
        y, attention = self.attention(x, x, x)
        self.maps.append(attention.detach())
        del self.maps[:-2]
        return y * self.scale


class Lstm(nn.Module):
    """It goes on from where the last sequence ended."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.hidden = nn.LSTM(6, 4, batch_first=True), cast(Any, None)

    def forward(self, x):
        if self.hidden is not None and self.hidden[0].shape[1] != x.shape[0]:
            self.hidden = None
        y, hidden = self.rnn(x, self.hidden)
        self.hidden = tuple(h.detach() for h in hidden)
        return y


class Gru(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.GRU(6, 4, batch_first=True, bidirectional=True)

    def forward(self, x):
        return self.rnn(x)[0]


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.norm, self.outer = nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 4)

    def forward(self, x):
        return self.outer(self.norm(self.inner(x).flatten(0, 1)).relu())


class Dropped(Linear):
    def __init__(self) -> None:
        super().__init__()
        self.drop, self.rate = nn.Dropout(0.3), 0.2

    def forward(self, x):
        y = F.linear(self.drop(x), self.weight, self.bias)
        return F.dropout(y, self.rate, self.training)


class Convolution(nn.Conv1d):
    """Weights standardised before each use, beside a gain."""

    def __init__(self) -> None:
        super().__init__(6, 4, 2, padding=1)
        self.gain = nn.Buffer(torch.ones(4, 1))

    def forward(self, x):
        return F.conv1d(x.mT, self.weight, self.bias, padding=self.padding) * self.gain.exp()


class Standardised(Linear):
    def forward(self, x):
        mean, std = self.weight.mean(1, keepdim=True), self.weight.std(1, keepdim=True)
        return F.linear(x, (self.weight - mean) / std, self.bias)


class SpectralNorm(nn.Module):
    """A computed weight: refused."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.utils.parametrizations.spectral_norm(nn.Linear(6, 4))

    def forward(self, x):
        return self.inner(x)


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.Parameter(torch.randn(3, 4, 6))
        self.load = nn.Buffer(torch.zeros(3))
        self.chosen = 0

    def forward(self, x):
        y = torch.einsum("bti,eoi->ebto", x, self.experts)
        self.load[self.chosen] += x.shape[0] * x.shape[1]
        return y[self.chosen] + y.mean(0) / (1.0 + self.load.sum())


# fmt: off
ROWS = (
    Stateful(Listed, ("model.slope = 0.5",)),
    Stateful(NamedWeights, ("model.route = 'b'", "model.route = 'a'")),
    Stateful(Tied, ("model.scale = 2.0",), inputs=token_ids),
    Stateful(Borrowed, ("model.penalty = torch.ones(())",)),
    Stateful(Attention, ("model.scale = 2.0", "model.maps.clear()", "model.attention.dropout = 0.3")),
    Stateful(Lstm, ("model.hidden = None",)),
    Stateful(Gru),
    Stateful(Normed, ("model.norm.momentum = 0.5", "model.norm.running_mean.zero_()", "model.norm.eps = 0.1")),
    Stateful(Dropped, ("model.drop.p = 0.6", "model.rate = 0.5")),
    Stateful(Convolution, ("model.gain.fill_(-1)",)),
    Stateful(Standardised),
    Stateful(SpectralNorm, refused="computed before it multiplies"),
    Stateful(Experts, ("model.chosen = 2", "model.load.zero_()")),
)
# fmt: on
