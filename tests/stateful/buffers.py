"""Modules that read and write buffers: registered, replaced, counted in, and None until later."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from tests.stateful.table import DOUBLE, Linear, Stateful


class Temperature(Linear):
    def __init__(self) -> None:
        super().__init__()
        self.t = nn.Buffer(torch.tensor(0.3))

    def forward(self, x):
        return F.linear(x, self.weight, self.bias) * self.t.exp()


class TwoBuffers(Linear):
    def __init__(self) -> None:
        super().__init__()
        self.low, self.high = nn.Buffer(torch.full((4,), -1.0)), nn.Buffer(torch.full((4,), 1.5))

    def forward(self, x):
        middle, width = (self.low + self.high) / 2, (self.high - self.low).clamp(min=0.1)
        return torch.tanh((F.linear(x, self.weight) - middle) / width)


class RotaryTable(Linear):
    def __init__(self) -> None:
        super().__init__()
        self.frequencies = nn.Buffer(torch.tensor([1.0, 0.3, 0.1, 0.03]), persistent=False)

    def forward(self, x):
        angles = torch.arange(x.shape[1], dtype=x.dtype)[:, None] * self.frequencies
        return F.linear(x, self.weight, self.bias) * angles.cos()


class CounterBuffer(Linear):
    def __init__(self) -> None:
        super().__init__()
        self.steps: torch.Tensor = nn.Buffer(torch.tensor(0))

    def forward(self, x):
        self.steps += 1
        return F.linear(x, self.weight, self.bias) * (self.steps / (self.steps + 5.0))


class Ema(Linear):
    def __init__(self) -> None:
        super().__init__()
        self.mean = nn.Buffer(torch.zeros(4))

    def forward(self, x):
        y = F.linear(x, self.weight, self.bias)
        if self.training:
            self.mean.mul_(0.9).add_(y.detach().mean((0, 1)), alpha=0.1)
        return y - self.mean


class EmaReplaced(Linear):
    """The buffer is another tensor after each call."""

    def __init__(self) -> None:
        super().__init__()
        self.mean: torch.Tensor = nn.Buffer(torch.zeros(4))

    def forward(self, x):
        y = F.linear(x, self.weight, self.bias)
        self.mean = 0.9 * self.mean + 0.1 * y.detach().mean((0, 1))
        return y - self.mean


class MomentumQueue(Linear):
    """Keys of earlier batches, as MoCo has them."""

    def __init__(self) -> None:
        super().__init__()
        self.queue = nn.Buffer(torch.linspace(-1, 1, 28).reshape(4, 7))
        self.place = nn.Buffer(torch.zeros(1, dtype=torch.long))

    def forward(self, x):
        key = F.normalize(F.linear(x, self.weight, self.bias).mean((0, 1)), dim=0)
        logits = F.linear(x, self.weight, self.bias) @ self.queue.clone()
        with torch.no_grad():
            place = int(self.place)
            self.queue[:, place] = key
            self.place[0] = (place + 1) % self.queue.shape[1]
        return logits


class LaterMask(Linear):
    """A buffer that is None until somebody gives one."""

    mask: torch.Tensor | None

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mask", None)

    def forward(self, x):
        y = F.linear(x, self.weight, self.bias)
        return y if self.mask is None else y * self.mask


# fmt: off
ROWS = (
    Stateful(Temperature,
        ("model.t.fill_(1)", "model.t = torch.tensor(-0.5, dtype=model.t.dtype)", "model.t.mul_(0.5)")),
    Stateful(TwoBuffers,
        ("model.low.sub_(0.5)", "model.high = model.high * 2", "model._buffers['low'] = model.low + 1")),
    Stateful(RotaryTable, ("model.frequencies.mul_(0.5)",)),
    Stateful(CounterBuffer, ("model.steps.zero_()",)),
    Stateful(Ema, ("model.mean.fill_(1)", "model.mean = torch.zeros_like(model.mean)")),
    Stateful(EmaReplaced, ("model.mean.fill_(1)", "model.mean = torch.zeros_like(model.mean)")),
    Stateful(MomentumQueue, ("model.queue.neg_()", "model.place.zero_()")),
    Stateful(LaterMask, (f"model.mask = torch.tensor([1, 0, 2, 1], {DOUBLE})", "model.mask = None")),
)
# fmt: on
