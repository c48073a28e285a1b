"""Modules that keep settings, logs and caches in containers and objects of their own."""

from __future__ import annotations

import collections
import types
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from tests.stateful.table import DOUBLE, Linear, Stateful


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


# fmt: off
ROWS = (
    Stateful(ConfigDict,
        ("model.cfg['scale'] = 2.0", "model.cfg['act'] = 'relu'", "model.cfg = {'scale': 0.1, 'act': 'silu'}")),
    Stateful(ListOfFloats,
        ("model.scales[0] = 1.5", "model.scales.append(0.7)", "model.scales.pop(0) if model.scales else None")),
    Stateful(DictOfTensors, ("model.gates['in'].mul_(0.5)", f"model.gates['out'] = torch.ones(4, {DOUBLE})")),
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
)
# fmt: on
