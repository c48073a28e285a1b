"""Modules that ask for modes or for numbers: training, gradients, autocast, the sign of a sum."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from tests.stateful.table import Linear, Stateful


class TrainingTest(Linear):
    def forward(self, x):
        y = F.linear(x, self.weight, self.bias)
        return y + 0.1 * torch.randn_like(y) if self.training else y.round(decimals=3)


class GradModeTest(Linear):
    def __init__(self) -> None:
        super().__init__()
        self.kept: torch.Tensor | None = None

    def forward(self, x):
        y = F.linear(x, self.weight, self.bias)
        if torch.is_grad_enabled():
            self.kept = y.detach()
            return y * 2
        return y


class AutocastTest(Linear):
    def forward(self, x):
        y = F.linear(x, self.weight, self.bias)
        return y.float().to(x.dtype) if torch.is_autocast_enabled("cpu") else y


class AutocastInside(Linear):
    """Autocast leaves float64 as it is; it is seen where a copy is called in float32."""

    def __init__(self) -> None:
        super().__init__()
        self.mixed = True

    def forward(self, x):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.mixed):
            return F.linear(x, self.weight, self.bias)


class NoGradInside(Linear):
    def forward(self, x):
        with torch.no_grad():
            target = F.linear(x, self.weight, self.bias).tanh()
        y = F.linear(x, self.weight, self.bias)
        return (y - target).square() + y


class Detached(Linear):
    """A straight-through estimate."""

    def forward(self, x):
        y = F.linear(x, self.weight, self.bias)
        return y + (y.round() - y).detach()


class NeedsGradient(Linear):
    def forward(self, x):
        y = F.linear(x, self.weight, self.bias)
        return y * 2 if y.requires_grad else y


class ValueTest(Linear):
    def forward(self, x):
        y = F.linear(x, self.weight, self.bias)
        return y * 2 if float(y.detach().sum()) > 0 else y / 2


# fmt: off
ROWS = (
    Stateful(TrainingTest),
    Stateful(GradModeTest),
    Stateful(AutocastTest),
    Stateful(AutocastInside, ("model.mixed = False", "model.mixed = True")),
    Stateful(NoGradInside),
    Stateful(Detached),
    Stateful(NeedsGradient),
    Stateful(ValueTest),
)
# fmt: on
