"""Modules with options among their arguments, structured outputs, and a test of the shape."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from tests.stateful.table import Linear, Stateful, sequences


class OptionalMask(Linear):
    def forward(self, x, mask=None, *, scale=1.0, **extra):  # type: ignore[override]
        y = F.linear(x, self.weight, self.bias) * scale
        if mask is not None:
            y = y.masked_fill(mask, 0.0)
        for value in extra.values():
            y = y + value
        return y


def with_options() -> tuple[Any, ...]:
    x, other, _ = sequences()
    mask = torch.tensor([True, False, False, True])
    return (
        {"x": x},
        {"x": x, "mask": mask},
        {"x": other, "scale": 3.0},
        {"x": other, "mask": mask, "shift": 2.0},
    )


class Pair(NamedTuple):
    y: torch.Tensor
    length: int


class Structured(Linear):
    def __init__(self) -> None:
        super().__init__()
        self.as_tuple = False

    def forward(self, x):
        y = F.linear(x, self.weight, self.bias)
        return Pair(y, x.shape[1]) if self.as_tuple else {"y": y, "norms": [y.norm(dim=-1), y.shape]}


class ShapeTest(Linear):
    def forward(self, x):
        y = F.linear(x, self.weight, self.bias)
        return y.mean(1) if x.shape[1] > 2 else y.sum(1)


# fmt: off
ROWS = (
    Stateful(OptionalMask, inputs=with_options),
    Stateful(Structured, ("model.as_tuple = True", "model.as_tuple = False")),
    Stateful(ShapeTest),
)
# fmt: on
