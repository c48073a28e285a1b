"""What a row of the table of stateful modules is, and what most rows are made from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lora_fx.testing import Shared

DOUBLE = "dtype=torch.float64"


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
    """Statements about ``model``, in the names of the file in which it stands, or functions of it."""
    inputs: Callable[[], Sequence[Any]] = sequences
    shared: tuple[Shared, ...] = ()
    refused: str = ""
    """A regular expression for what `lora_fx.apply` says of it, where it refuses; else empty."""
    checked: bool = False
    """It is the self-check that finds how it can be served."""

    @property
    def name(self) -> str:
        return self.make.__name__


class Linear(nn.Linear):
    """What most rows are made from: 6 features in, 4 out."""

    def __init__(self, inputs: int = 6, outputs: int = 4, bias: bool = True) -> None:
        super().__init__(inputs, outputs, bias)
