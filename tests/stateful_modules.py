"""Modules with a state of their own, and what may happen to each: the table that law L15 draws from.

    y  =  f(x, W; state),   state  →  state'     whatever a forward reads beside x and W, and whatever it writes

Each row is small (6 features in, 4 out), owns or reads weights that can be adapted, and names the changes that its own
code would notice. People write all of these; none of them is a library's model.
"""

from __future__ import annotations

import collections
import os
import random
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from lora_fx.testing import Shared


def sequences() -> tuple[Any, ...]:
    """Inputs of several lengths and batch sizes, with 6 features."""
    generator = torch.Generator().manual_seed(7)
    shapes = (2, 3, 6), (1, 5, 6), (4, 1, 6)
    return tuple(torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)


@dataclass(frozen=True)
class Stateful:
    """A row: a module with a state of its own, and what may happen to that."""

    make: Callable[[], nn.Module]
    """Of float32; the law casts it to float64."""
    changes: tuple[str | Callable[[nn.Module], Any], ...] = ()
    """Statements about ``model``, in the names of this file, or functions of it."""
    inputs: Callable[[], Sequence[Any]] = sequences
    shared: tuple[Shared, ...] = ()
    refused: str = ""
    """A regular expression for what `lora_fx.apply` says of it, where it refuses; else empty."""
    checked: bool = False
    """It is the self-check that finds how it can be served."""

    @property
    def name(self) -> str:
        return self.make.__name__


# ── buffers ──────────────────────────────────────────────────────────────────────────────────────────────────────────


class Linear(nn.Linear):
    """What most rows are made from: 6 features in, 4 out."""

    def __init__(self, inputs: int = 6, outputs: int = 4, bias: bool = True) -> None:
        super().__init__(inputs, outputs, bias)


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


# ── attributes ───────────────────────────────────────────────────────────────────────────────────────────────────────


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


# ── containers and settings ──────────────────────────────────────────────────────────────────────────────────────────


class ConfigDict(Linear):
    def __init__(self) -> None:
        super().__init__()
        self.cfg: dict[str, Any] = {"scale": 0.5, "act": "gelu"}

    def forward(self, x):
        return getattr(F, self.cfg["act"])(F.linear(x, self.weight, self.bias)) * self.cfg["scale"]


class ListOfFloats(Linear):
    def __init__(self) -> None:
        super().__init__()
        self.scales = [0.5, 2.0]

    def forward(self, x):
        y = F.linear(x, self.weight, self.bias)
        for scale in self.scales:
            y = torch.tanh(y * scale)
        return y


class DictOfTensors(Linear):
    def __init__(self) -> None:
        super().__init__()
        self.gates = {"in": torch.ones(6, dtype=torch.float64), "out": torch.full((4,), 2.0, dtype=torch.float64)}

    def forward(self, x):
        inner, outer = self.gates["in"].to(x.dtype), self.gates["out"].to(x.dtype)
        return F.linear(x * inner, self.weight, self.bias) * outer


class Namespace(Linear):
    def __init__(self) -> None:
        super().__init__()
        self.ns = types.SimpleNamespace(scale=0.7, residual=False)

    def forward(self, x):
        y = F.linear(x, self.weight, self.bias)
        return y * self.ns.scale + (x[..., :4] if self.ns.residual else 0)


@dataclass
class Settings:
    scale: float = 0.7
    clip: float | None = None


class DataclassConfig(Linear):
    def __init__(self) -> None:
        super().__init__()
        self.config = Settings()

    def forward(self, x):
        y = F.linear(x, self.weight, self.bias) * self.config.scale
        return y if self.config.clip is None else y.clamp(-self.config.clip, self.config.clip)


class Losses(Linear):
    def __init__(self) -> None:
        super().__init__()
        self.losses: list[torch.Tensor] = []

    def forward(self, x):
        y = F.linear(x, self.weight, self.bias)
        self.losses.append(y.square().mean())
        return y


class LogDict(Linear):
    def __init__(self) -> None:
        super().__init__()
        self.log: dict[str, Any] = {}

    def forward(self, x):
        y = F.linear(x, self.weight, self.bias)
        self.log["norm"] = float(y.detach().norm())
        self.log["calls"] = self.log.get("calls", 0) + 1
        return y


class Meter:
    """An object with a state, which is no module."""

    def __init__(self) -> None:
        self.total, self.count = 0.0, 0

    def update(self, value: torch.Tensor) -> None:
        self.total, self.count = self.total + float(value.detach().abs().sum()), self.count + value.numel()


class Metered(Linear):
    def __init__(self) -> None:
        super().__init__()
        self.meter = Meter()

    def forward(self, x):
        y = F.linear(x, self.weight, self.bias)
        self.meter.update(y)
        return y / (1.0 + self.meter.count)


class StoredAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Parameter(torch.randn(6, 4)), nn.Parameter(torch.randn(6, 4)), nn.Linear(6, 4)
        self.attention: torch.Tensor | None = None

    def forward(self, x):
        attention = ((x @ self.q) @ (x @ self.k).mT / 2.0).softmax(-1)
        self.attention = attention
        return attention @ self.v(x)


class KeyValueDict(nn.Module):
    """A cache that grows with each call, up to nine tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.kv, self.cache = nn.Linear(6, 4), nn.Parameter(torch.randn(8, 6)), dict[str, torch.Tensor]()

    def forward(self, x):
        k, v = F.linear(x, self.kv).chunk(2, -1)
        k, v = k.mean(0, keepdim=True), v.mean(0, keepdim=True)
        if "k" in self.cache:
            k, v = torch.cat([self.cache["k"], k], 1)[:, -9:], torch.cat([self.cache["v"], v], 1)[:, -9:]
        self.cache["k"], self.cache["v"] = k.detach(), v.detach()
        q = self.q(x)
        return (q @ k.mT).softmax(-1) @ v


class KeyValueList(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.kv = nn.Parameter(torch.randn(6, 4))
        self.cache: list[tuple[torch.Tensor, int]] = []

    def forward(self, x):
        y = x @ self.kv
        self.cache.append((y.detach().mean((0, 1)), len(self.cache)))
        del self.cache[:-4]
        return y + sum(past for past, _ in self.cache)


class RingBuffer(Linear):
    def __init__(self) -> None:
        super().__init__()
        self.past: collections.deque[torch.Tensor] = collections.deque(maxlen=3)

    def forward(self, x):
        y = F.linear(x, self.weight, self.bias)
        before = sum(self.past, start=torch.zeros((), dtype=y.dtype))
        self.past.append(y.detach().mean())
        return y + before


class LazyCache(Linear):
    """Made at the first call, and made again for another length."""

    def __init__(self) -> None:
        super().__init__()
        self._mask: torch.Tensor | None = None

    def forward(self, x):
        if self._mask is None or self._mask.shape[0] != x.shape[1]:
            self._mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.float64).tril()
        return self._mask.to(x.dtype) @ F.linear(x, self.weight, self.bias)


class CachedProduct(Linear):
    """What depends on the weight is kept while it is in eval mode, and made anew after training."""

    def __init__(self) -> None:
        super().__init__()
        self._gram: torch.Tensor | None = None

    def forward(self, x):
        if self.training or self._gram is None:
            self._gram = (self.weight.mT @ self.weight).detach()
        return F.linear(x @ self._gram.to(x.dtype), self.weight, self.bias)


# ── outside of the model ─────────────────────────────────────────────────────────────────────────────────────────────

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


# ── tensors that a forward makes, and writes to ──────────────────────────────────────────────────────────────────────


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


# ── modes ────────────────────────────────────────────────────────────────────────────────────────────────────────────


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


# ── arguments and outputs ────────────────────────────────────────────────────────────────────────────────────────────


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


# ── hooks, checkpoints, functions of one's own ───────────────────────────────────────────────────────────────────────


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


# ── weights in many hands ────────────────────────────────────────────────────────────────────────────────────────────


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


# ── models whose parts change ────────────────────────────────────────────────────────────────────────────────────────


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


def _number_of_the_file(value: float) -> Callable[[nn.Module], None]:
    def change(model: nn.Module) -> None:
        globals()["SCALE"] = value

    change.__name__ = f"SCALE = {value}"
    return change


def _here(*names: str) -> Shared:
    return Shared(globals(), names)


_DOUBLE = "dtype=torch.float64"

#: the table
# fmt: off
STATEFUL = (
    Stateful(Linear),
    Stateful(Temperature,
        ("model.t.fill_(1)", "model.t = torch.tensor(-0.5, dtype=model.t.dtype)", "model.t.mul_(0.5)")),
    Stateful(TwoBuffers,
        ("model.low.sub_(0.5)", "model.high = model.high * 2", "model._buffers['low'] = model.low + 1")),
    Stateful(RotaryTable, ("model.frequencies.mul_(0.5)",)),
    Stateful(CounterBuffer, ("model.steps.zero_()",)),
    Stateful(Ema, ("model.mean.fill_(1)", "model.mean = torch.zeros_like(model.mean)")),
    Stateful(EmaReplaced, ("model.mean.fill_(1)", "model.mean = torch.zeros_like(model.mean)")),
    Stateful(MomentumQueue, ("model.queue.neg_()", "model.place.zero_()")),
    Stateful(LaterMask, (f"model.mask = torch.tensor([1, 0, 2, 1], {_DOUBLE})", "model.mask = None")),
    Stateful(Calls, ("model.calls = 0", "model.calls += 3")),
    Stateful(Scale,
        ("model.scale = 2.0", "model.scale = 3", "model.scale = True", f"model.scale = torch.ones(4, {_DOUBLE})")),
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
    Stateful(ConfigDict,
        ("model.cfg['scale'] = 2.0", "model.cfg['act'] = 'relu'", "model.cfg = {'scale': 0.1, 'act': 'silu'}")),
    Stateful(ListOfFloats,
        ("model.scales[0] = 1.5", "model.scales.append(0.7)", "model.scales.pop(0) if model.scales else None")),
    Stateful(DictOfTensors, ("model.gates['in'].mul_(0.5)", f"model.gates['out'] = torch.ones(4, {_DOUBLE})")),
    Stateful(Namespace, ("model.ns.scale = 2.0", "model.ns.residual = True", "model.ns.residual = False")),
    Stateful(DataclassConfig, ("model.config.scale = 2.0", "model.config.clip = 0.2", "model.config = Settings(0.3)")),
    Stateful(Losses, ("model.losses.clear()", "model.losses = []")),
    Stateful(LogDict, ("model.log.clear()",)),
    Stateful(Metered, ("model.meter.count = 0", "model.meter = Meter()")),
    Stateful(StoredAttention, ("model.attention = None",)),
    Stateful(KeyValueDict, ("model.cache.clear()", "model.cache = {}")),
    Stateful(KeyValueList, ("model.cache.clear()", "model.cache.reverse()")),
    Stateful(RingBuffer, ("model.past.clear()",)),
    Stateful(LazyCache, ("model._mask = None",)),
    Stateful(CachedProduct),
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
    Stateful(LiteralMask, inputs=of_one_shape),
    Stateful(Factories),
    Stateful(NewTensor),
    Stateful(InPlaceChain),
    Stateful(ReluInPlace, ("model[1].inplace = False", "model[1] = nn.Tanh()")),
    Stateful(InPlaceOnView),
    Stateful(IndexPut),
    Stateful(Scatter),
    Stateful(TrainingTest),
    Stateful(GradModeTest),
    Stateful(AutocastTest),
    Stateful(AutocastInside, ("model.mixed = False", "model.mixed = True")),
    Stateful(NoGradInside),
    Stateful(Detached),
    Stateful(NeedsGradient),
    Stateful(ValueTest),
    Stateful(OptionalMask, inputs=with_options),
    Stateful(Structured, ("model.as_tuple = True", "model.as_tuple = False")),
    Stateful(ShapeTest),
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
    Stateful(Growing,
        ("model.layers.append(nn.Linear(6, 6).double().requires_grad_(False))",
         "model.layers.append(nn.Identity())")),
    Stateful(Routed, ("model.route = 'right'", "model.route = 'left'", "model.paths['left'] = nn.Identity()")),
    Stateful(Replaceable,
        ("model.act = nn.ReLU()", "model.head = nn.Linear(5, 3).double().requires_grad_(False)", _replace_weight)),
    Stateful(OtherForward,
        ("model.inner.__dict__.pop('forward', None)",
         "model.outer.forward = types.MethodType(_halved_forward, model.outer)")),
    Stateful(LaterBias, (f"model.bias = nn.Parameter(torch.ones(4, {_DOUBLE}), False)", "model.bias = None")),
    Stateful(LaterBiasInside,
        (f"model.inner.bias = nn.Parameter(torch.ones(5, {_DOUBLE}), False)", "model.inner.bias = None",
         _replace_weight)),
)
# fmt: on
