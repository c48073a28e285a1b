"""What activation rewrites are, as their papers say it: for the checks, in float64.

    bottleneck     y + up·σ(down·norm(y) + b₁) + b₂            Houlsby 2019, section 2.1
    compacter      the same, down and up = Σᵢ kron(Aᵢ, sᵢ·tᵢ)      Mahabadi 2021, section 3
    tokens         row x of the table with θ below it              Hu 2022, section 5.1 (PreEmbed)
    prefix_layer   h, with rows of θ where new tokens stand         the same (PreLayer)

Nothing is shared with the rows of `lora_fx.deltas.rewrites`, which stand in forwards.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from lora_fx.checks.oracles import wide
from lora_fx.deltas.adapter import Adapter
from lora_fx.deltas.kinds import Theta

Use = Callable[[Any], torch.Tensor]
"""x → y, in float64."""
Shaken = Callable[[torch.Tensor], torch.Tensor]
"""Moves numbers by as much as rounding may."""


def as_it_is(numbers: torch.Tensor) -> torch.Tensor:
    return numbers


@torch.no_grad()
def rewritten(adapter: Adapter, use: Use, x: Any, shaken: Shaken = as_it_is) -> torch.Tensor:
    """What its kind makes of a use, in float64.

    Args:
        shaken: what to do to each tensor of θ.
    """
    return _REWRITTEN[adapter.kind.name](use, x, adapter, _theta(adapter, shaken))


@torch.no_grad()
def put_behind(
    adapter: Adapter, tensor: str, h: torch.Tensor, ids: torch.Tensor, shaken: Shaken = as_it_is
) -> torch.Tensor:
    """What becomes of the h that a block gives, in float64, where ``tensor`` of θ stands behind it."""
    rows, made, n = getattr(_theta(adapter, shaken), tensor), h.to(torch.float64, copy=True), _words(adapter)
    new = (ids >= n).to(h.device)
    made[new] = rows.to(h.device)[ids.to(h.device)[new] - n]
    return made


def _bottleneck(use: Use, x: Any, adapter: Adapter, theta: Theta) -> torch.Tensor:
    return _narrowed(use(x), theta.down, theta.up, theta)


def _compacter(use: Use, x: Any, adapter: Adapter, theta: Theta) -> torch.Tensor:
    factors = (theta.down_s, theta.down_t), (theta.up_s, theta.up_t)
    down, up = (sum(torch.kron(A, p @ q) for A, p, q in zip(theta.shared, s, t, strict=True)) for s, t in factors)
    return _narrowed(use(x), down, up, theta)


_EPSILON = 1e-5  # of torch's LayerNorm


def _narrowed(y: torch.Tensor, down: Any, up: Any, theta: Theta) -> torch.Tensor:
    z = y
    if theta.norm:
        apart = y - y.mean(-1, keepdim=True)
        z = apart / (apart.square().mean(-1, keepdim=True) + _EPSILON).sqrt() * theta.norm_weight + theta.norm_bias
    z = _ACTIVATIONS[theta.activation](z @ down.mT + theta.down_bias)
    return y + (z @ up.mT + theta.up_bias)


_ACTIVATIONS: Mapping[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "gelu": lambda z: z * torch.special.ndtr(z),
    "relu": lambda z: z.clamp(min=0),
    "silu": lambda z: z * torch.special.expit(z),
    "tanh": torch.tanh,
    "sigmoid": torch.special.expit,
}


def _tokens(use: Use, x: Any, adapter: Adapter, theta: Theta) -> torch.Tensor:
    new = x >= _words(adapter)
    made = theta.tokens.new_empty(*x.shape, adapter.layout.size("o"))
    made[~new], made[new] = use(x[~new]), theta.tokens[x[new] - _words(adapter)]
    return made


def _prefix_layer(use: Use, x: Any, adapter: Adapter, theta: Theta) -> torch.Tensor:
    """At the table new tokens are its words, from the first one on."""
    words, n = x.clone(), _words(adapter)
    words[x >= n] %= n
    return use(words)


_REWRITTEN = {"bottleneck": _bottleneck, "compacter": _compacter, "tokens": _tokens, "prefix_layer": _prefix_layer}


def _words(adapter: Adapter) -> int:
    return adapter.layout.size("i")


def _theta(adapter: Adapter, shaken: Shaken) -> Theta:
    own = vars(wide(adapter))
    return adapter.theta_of({name: shaken(own[name]) for name in adapter.tensors})
