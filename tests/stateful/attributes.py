"""Modules whose forward reads attributes: numbers, functions, flags, of the instance and of the class."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from lora_fx.testing import Shared
from tests.stateful.table import DOUBLE, Linear, Stateful


class Calls(Linear):
    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return F.linear(x, self.weight, self.bias) / self.calls


class Scale(Linear):
    def __init__(self) -> None:
        super().__init__()
        self.scale = 2

    def forward(self, x):
        return F.linear(x, self.weight, self.bias) * self.scale


class PlainTensor(Linear):
    """A tensor that nobody registered."""

    def __init__(self) -> None:
        super().__init__()
        self.offset = torch.ones(4, dtype=torch.float64)

    def forward(self, x):
        return F.linear(x, self.weight, self.bias) + self.offset.to(x.dtype) * 0.5


class Activation(Linear):
    def __init__(self) -> None:
        super().__init__()
        self.activation = "gelu"

    def forward(self, x):
        return getattr(F, self.activation)(F.linear(x, self.weight, self.bias))


class Function(Linear):
    def __init__(self) -> None:
        super().__init__()
        self.act: Callable[[torch.Tensor], torch.Tensor] = torch.tanh

    def forward(self, x):
        return self.act(F.linear(x, self.weight, self.bias))


class EarlyReturn(Linear):
    def __init__(self) -> None:
        super().__init__()
        self.plain = False

    def forward(self, x):
        y = F.linear(x, self.weight, self.bias)
        if self.plain:
            return y
        return y.sigmoid() * y


class Depth(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer, self.depth = nn.Linear(6, 6), nn.Linear(6, 4), 2

    def forward(self, x):
        for _ in range(self.depth):
            x = x + F.linear(x, self.inner.weight, self.inner.bias).tanh()
        return self.outer(x)


class LaterScale(Linear):
    def forward(self, x):
        return F.linear(x, self.weight, self.bias) * getattr(self, "scale", 1.0)


class LaterExtra(Linear):
    extra: Any

    def forward(self, x):
        try:
            return F.linear(x, self.weight, self.bias) + self.extra
        except AttributeError:
            return F.linear(x, self.weight, self.bias)


class Property(Linear):
    def __init__(self) -> None:
        super().__init__()
        self._scales = [2.0, 0.5]

    @property
    def scale(self) -> float:
        return self._scales[0] * self._scales[-1] + len(self._scales)

    def forward(self, x):
        return F.linear(x, self.weight, self.bias) * self.scale


class Delegating(nn.Module):
    """What it does not have itself is asked of the module inside."""

    def __init__(self) -> None:
        super().__init__()
        self.inside = Scale()

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("inside"), name)

    def forward(self, x):
        return F.linear(x, self.weight, self.bias) * self.scale + self.inside(x)


class CallCounting(Linear):
    """`__call__` is its own."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.seen += 1
        return super().__call__(*args, **kwargs) + self.seen

    def forward(self, x):
        return F.linear(x, self.weight, self.bias)


class ClassAttribute(Linear):
    scale = 1.5

    def forward(self, x):
        return F.linear(x, self.weight, self.bias) * self.scale


class ClassCounter(Linear):
    calls = 0

    def forward(self, x):
        ClassCounter.calls += 1
        return F.linear(x, self.weight, self.bias) / ClassCounter.calls


class TypeCounter(Linear):
    calls = 0

    def forward(self, x):
        type(self).calls += 1
        return F.linear(x, self.weight, self.bias) / self.calls


# fmt: off
ROWS = (
    Stateful(Calls, ("model.calls = 0", "model.calls += 3")),
    Stateful(Scale,
        ("model.scale = 2.0", "model.scale = 3", "model.scale = True", f"model.scale = torch.ones(4, {DOUBLE})")),
    Stateful(PlainTensor, ("model.offset.fill_(2)", "model.offset = model.offset + 1")),
    Stateful(Activation, ("model.activation = 'relu'", "model.activation = 'silu'")),
    Stateful(Function, ("model.act = torch.sin", "model.act = F.silu", "model.act = nn.Hardtanh()")),
    Stateful(EarlyReturn, ("model.plain = True", "model.plain = False")),
    Stateful(Depth, ("model.depth = 1", "model.depth = 3", "model.depth = 0")),
    Stateful(LaterScale, ("model.scale = 2.0", "model.scale = 0.5", "model.__dict__.pop('scale', None)")),
    Stateful(LaterExtra, ("model.extra = 1.0", "model.extra = torch.ones(4)", "model.__dict__.pop('extra', None)")),
    Stateful(Property, ("model._scales[0] = 3.0", "model._scales.append(1.5)", "model._scales = [1.0]")),
    Stateful(Delegating, ("model.inside.scale = 3.0", "model.scale = 4.0")),
    Stateful(CallCounting, ("model.seen = 0",)),
    Stateful(ClassAttribute,
        ("ClassAttribute.scale = 2.5", "model.scale = 0.5", "ClassAttribute.scale = 1.0"),
        shared=(Shared(ClassAttribute, ("scale",)),)),
    Stateful(ClassCounter, ("ClassCounter.calls = 0",), shared=(Shared(ClassCounter, ("calls",)),)),
    Stateful(TypeCounter, ("TypeCounter.calls = 0",), shared=(Shared(TypeCounter, ("calls",)),)),
)
# fmt: on
