"""Modules that read and write what is outside of them: globals, the environment, closures, random states."""

from __future__ import annotations

import os
import random
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from lora_fx.testing import Shared
from tests.stateful.table import Linear, Stateful

SCALES = [0.5, 2.0]
SWITCHES = {"residual": False, "scale": 1.5}
SCALE = 0.7
HISTORY: list[float] = []
VARIABLE = "LORA_FX_HISTORIES_SCALE"


class GlobalList(Linear):
    def forward(self, x):
        return F.linear(x, self.weight, self.bias) * SCALES[0]


class GlobalDict(Linear):
    def forward(self, x):
        y = F.linear(x, self.weight, self.bias) * SWITCHES["scale"]
        return y + x[..., :4] if SWITCHES["residual"] else y


class GlobalNumber(Linear):
    def forward(self, x):
        return F.linear(x, self.weight, self.bias) * SCALE


class GlobalLog(Linear):
    def forward(self, x):
        y = F.linear(x, self.weight, self.bias)
        HISTORY.append(float(y.detach().mean()))
        return y * len(HISTORY)


class Environment(Linear):
    def forward(self, x):
        return F.linear(x, self.weight, self.bias) * float(os.environ.get(VARIABLE, "1.0"))


def _halving(counts: list[float]) -> Callable[[torch.Tensor], torch.Tensor]:
    def halve(y: torch.Tensor) -> torch.Tensor:
        return y * counts[0]

    return halve


HALVES = [0.5]
_halve = _halving(HALVES)


class Closure(Linear):
    def forward(self, x):
        return _halve(F.linear(x, self.weight, self.bias))


DEFAULTS: list[float] = []


class DefaultArgument(Linear):
    """A default that is one list for all calls."""

    def forward(self, x, seen: list[float] = DEFAULTS):
        seen.append(1.0)
        return F.linear(x, self.weight, self.bias) * len(seen)


class PythonRandom(Linear):
    def forward(self, x):
        return F.linear(x, self.weight, self.bias) * (1.0 + random.random())


class NumpyRandom(Linear):
    def forward(self, x):
        return F.linear(x, self.weight, self.bias) * float(np.random.uniform(0.5, 1.5))


class TorchRandom(Linear):
    def forward(self, x):
        y = F.linear(x, self.weight, self.bias)
        noise = torch.randn(4, dtype=y.dtype) * 0.1
        return y * torch.bernoulli(torch.full((4,), 0.7, dtype=y.dtype)) + noise + torch.rand(1, dtype=y.dtype)


class RandomLike(Linear):
    def forward(self, x):
        y = F.linear(x, self.weight, self.bias)
        return y + torch.randn_like(y) * 0.1


class OwnGenerator(Linear):
    def __init__(self) -> None:
        super().__init__()
        self.generator = torch.Generator().manual_seed(3)

    def forward(self, x):
        return F.linear(x, self.weight, self.bias) + torch.rand(4, generator=self.generator, dtype=x.dtype)


class StochasticDepth(Linear):
    def __init__(self) -> None:
        super().__init__(6, 6)
        self.rate = 0.5

    def forward(self, x):
        if self.training and float(torch.rand(())) < self.rate:
            return x
        return x + F.linear(x, self.weight, self.bias)


def _number_of_the_file(value: float) -> Callable[[nn.Module], None]:
    def change(model: nn.Module) -> None:
        globals()["SCALE"] = value

    change.__name__ = f"SCALE = {value}"
    return change


def _here(*names: str) -> Shared:
    return Shared(globals(), names)


# fmt: off
ROWS = (
    Stateful(GlobalList, ("SCALES[0] = 3.0", "SCALES.insert(0, 0.1)"), shared=(Shared(SCALES),)),
    Stateful(GlobalDict,
        ("SWITCHES['residual'] = True", "SWITCHES['scale'] = 0.3"),
        shared=(Shared(SWITCHES, ("residual", "scale")),)),
    Stateful(GlobalNumber, (_number_of_the_file(2.0), _number_of_the_file(0.1)), shared=(_here("SCALE"),)),
    Stateful(GlobalLog, ("HISTORY.clear()",), shared=(Shared(HISTORY),)),
    Stateful(Environment,
        ("os.environ[VARIABLE] = '2.5'", "os.environ.pop(VARIABLE, None)"),
        shared=(Shared(os.environ, (VARIABLE,)),)),
    Stateful(Closure, ("HALVES[0] = 0.25",), shared=(Shared(HALVES),)),
    Stateful(DefaultArgument, ("DEFAULTS.clear()",), shared=(Shared(DEFAULTS),)),
    Stateful(PythonRandom, ("random.seed(4)",)),
    Stateful(NumpyRandom, ("np.random.seed(4)",)),
    Stateful(TorchRandom, ("torch.manual_seed(4)",)),
    Stateful(RandomLike),
    Stateful(OwnGenerator, ("model.generator.manual_seed(5)",)),
    Stateful(StochasticDepth, ("model.rate = 0.1", "model.rate = 0.9")),
)
# fmt: on
