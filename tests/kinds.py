"""What the tests of kinds share: a model with every sort of use, a rule for all of it, θ that is not θ₀."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lora_fx
from lora_fx import Rule
from lora_fx.checks.verification import compare
from tests import reference

SETTINGS = {
    **{low_rank: {"rank": 2, "alpha": 3} for low_rank in ("lora", "dora", "adalora")},
    "bias": {},
    "full": {},
}


class Model(nn.Module):
    """A linear, a transposed matmul, a convolution without a bias, an embedding, a fused linear used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.up = nn.Linear(6, 10)
        self.raw = nn.Parameter(torch.randn(10, 7) / 3)
        self.conv = nn.Conv1d(7, 8, 2, bias=False)
        self.twice = nn.Linear(8, 8)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = F.gelu(self.up(self.embed(ids))) @ self.raw
        x = self.conv(x.transpose(1, 2)).transpose(1, 2)
        return self.twice(self.twice(x).tanh())


IDS = torch.tensor([[1, 2, 3, 10], [4, 0, 5, 6]])


def model() -> Model:
    """Frozen: some kernels choose another path for trainable weights."""
    torch.manual_seed(0)
    return Model().requires_grad_(False)


def out(model: nn.Module) -> torch.Tensor:
    """Without gradients: kernels may choose another path for a weight that has one."""
    with torch.no_grad():
        return model(IDS)


def assert_same(found: torch.Tensor, wanted: torch.Tensor, terms: int = 64) -> None:
    """In float64: two orders of so many operations differ by less than one rounding for each."""
    found, wanted = found.detach(), wanted.detach()
    assert found.shape == wanted.shape
    assert compare(found, wanted, wanted, terms * torch.finfo(torch.float64).eps / 2, torch.float64)


def rule(kind: str, where: str = "*", **more) -> list[Rule]:
    """Everything that can take it."""
    if kind == "bias":
        return [Rule(where="embed | raw | conv*"), Rule(where=where, kind="bias", **more)]
    return [Rule(where=where, kind=kind, **SETTINGS.get(kind, {}), **more)]


fill = reference.scattered


def refused(rules, error, said: str) -> None:
    base = model()
    state, classes = reference.bits(base), reference.classes(base)
    with pytest.raises(error, match=said):
        lora_fx.apply(base, rules, IDS)
    assert reference.same_bits(reference.bits(base), state) and reference.classes(base) == classes


class Uses(nn.Module):
    """A weight and a bias as a function reads them."""

    def __init__(self, function, *shapes: tuple[int, ...]) -> None:
        super().__init__()
        self.function = function
        self.w, self.b = (nn.Parameter(torch.randn(shape, dtype=torch.float64)) for shape in shapes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(x, self.w, self.b)
