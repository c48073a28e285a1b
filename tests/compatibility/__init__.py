"""Models of packages that are not in the zoo, adapted whole and held against plain torch: see `__main__`.

A row of the tables beside this file is a function that makes a tiny model with random weights, and inputs for it.
Nothing is ever downloaded.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree


@dataclass(frozen=True, eq=False)
class Model:
    """One architecture."""

    package: str
    name: str
    make: Callable[[], tuple[nn.Module, Any]]
    """A fresh model and its example inputs: a tensor, a tuple or a dict."""

    def build(self, seed: int = 0) -> tuple[nn.Module, Any]:
        """The model in eval mode and float32, with every weight drawn anew where it runs with such, and inputs.

        A package's own initialisation has zeros in it, behind which a wrong result could hide.
        """
        torch.manual_seed(seed)
        model, inputs = self.make()
        model = model.float().eval()
        drawn = copy.deepcopy(model)
        redraw(drawn)
        return (drawn if _gives_numbers(drawn, inputs) else model), inputs


@torch.no_grad()
def redraw(model: nn.Module) -> None:
    """Matrices of std 1/sqrt(fan_in), vectors moved a little."""
    convs = {id(m.weight) for m in model.modules() if isinstance(m, nn.modules.conv._ConvNd)}
    for weight in model.parameters():
        if not weight.is_floating_point() or not weight.numel():
            continue
        if weight.ndim < 2:
            weight.add_(torch.randn_like(weight), alpha=0.1)
        else:
            weight.normal_(std=(weight[0].numel() if id(weight) in convs else weight.shape[-1]) ** -0.5)


def call(model: nn.Module, inputs: Any) -> Any:
    """The model on inputs that are a tensor, a tuple or a dict."""
    if isinstance(inputs, dict):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, tuple) else model(inputs)


def _gives_numbers(model: nn.Module, inputs: Any) -> bool:
    """Whether it runs, and all that it gives is finite."""
    try:
        with torch.no_grad():
            leaves = pytree.tree_leaves(call(copy.deepcopy(model), copy.deepcopy(inputs)))
    except Exception:
        return False
    return all(bool(t.isfinite().all()) for t in leaves if isinstance(t, torch.Tensor) and t.is_floating_point())
