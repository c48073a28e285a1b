"""Activation rewrites: what a use of a weight gives becomes something else, which is no delta of any parameter.

    y = use(x) = x·W'ᵀ + b      ⇒      y' = around(use, x, θ)

    bottleneck     y' = y + up·σ(down·y + b₁) + b₂        Houlsby 2019, Lin 2020, Pfeiffer 2021
    compacter      the same, with down and up = Σᵢ Aᵢ ⊗ (sᵢ·tᵢ), the Aᵢ shared by all sites (Mahabadi 2021)
    tokens         y' = θ[x − n] where x ≥ n, the size of the table, and y elsewhere (PreEmbed)
    prefix_layer   h' = θₖ[x − n] where x ≥ n, and h elsewhere, of what block k gives (PreLayer)

Each is written once, over tensors or `torch.fx` proxies. `lora_fx.deltas.kinds` has the rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

ACTIVATIONS: Mapping[str, Callable[[Any], Any]] = {
    "gelu": F.gelu, "relu": F.relu, "silu": F.silu, "tanh": torch.tanh, "sigmoid": torch.sigmoid,
}  # fmt: skip


@dataclass(frozen=True)
class Using:
    """One use of a weight, as a rewrite sees it."""

    x: Any
    """The operand that is no weight."""
    of: Callable[[Any], Any]
    """x → y, with everything that the op does: its bias, and the deltas of W."""
    space: Any
    """The `Space` of the weight."""


# ── bottlenecks ──────────────────────────────────────────────────────────────────────────────────────────────────────


def bottleneck_shapes(space: Any) -> dict[str, Sequence[int]]:
    """2·d·r + r + d numbers (section 5.1 of the LoRA paper), and 2·d of a LayerNorm."""
    return {"down": (space.rank, space.out), "up": (space.out, space.rank), **_rest(space)}


def _rest(space: Any) -> dict[str, Sequence[int]]:
    d = space.out
    norm = {"norm_weight": (d,), "norm_bias": (d,)} if space.settings.norm else {}
    return {"down_bias": (space.rank,), "up_bias": (d,), **norm}


def bottleneck_start(theta: Any, weight: torch.Tensor) -> None:
    """up = 0, down as `nn.Linear` starts."""
    bound = 1 / math.sqrt(theta.down.shape[-1])
    theta.down.uniform_(-bound, bound)
    theta.up.zero_()
    _start_rest(theta)


def _start_rest(theta: Any) -> None:
    theta.down_bias.zero_()
    theta.up_bias.zero_()
    if theta.norm:
        theta.norm_weight.fill_(1)
        theta.norm_bias.zero_()


def bottleneck(use: Using, theta: Any) -> Any:
    """y' = y + up·σ(down·norm(y) + b₁) + b₂."""
    return _narrowed(use, theta, theta.down, theta.up)


def _narrowed(use: Using, theta: Any, down: Any, up: Any) -> Any:
    y = z = use.of(use.x)
    if theta.norm:
        z = F.layer_norm(z, (use.space.out,), theta.norm_weight, theta.norm_bias)
    z = ACTIVATIONS[theta.activation](F.linear(z, down, theta.down_bias))
    return y + F.linear(z, up, theta.up_bias)


def bottleneck_check(settings: Mapping[str, Any]) -> str:
    """Why these settings are none; empty where they are."""
    rank, norm, activation = settings["rank"], settings["norm"], settings["activation"]
    if not _is_count(rank, 1):
        return f"rank={rank!r} is no width of a bottleneck: give a positive integer"
    if not isinstance(norm, bool):
        return f"norm={norm!r}: say whether there is a LayerNorm, True or False"
    known = isinstance(activation, str) and activation in ACTIVATIONS
    return "" if known else f"activation={activation!r} is none of {', '.join(ACTIVATIONS)}"


def compacter_shapes(space: Any) -> dict[str, Sequence[int]]:
    """n³ numbers that all sites share, and f·2·(d + r) + r + d of each."""
    n, f, r, d = space.settings.n, space.settings.factors, space.rank, space.out
    return {
        "shared": (n, n, n),
        "down_s": (n, r // n, f),
        "down_t": (n, f, d // n),
        "up_s": (n, d // n, f),
        "up_t": (n, f, r // n),
        **_rest(space),
    }


def compacter_start(theta: Any, weight: torch.Tensor) -> None:
    """up = 0, by its s; an element of down has the variance 1/d, and of up 1/r as soon as that s is of size 1."""
    n, f = theta.n, theta.factors
    theta.shared.normal_(std=n**-0.5)
    theta.down_s.normal_(std=f**-0.5)
    theta.down_t.normal_(std=(n * theta.down_t.shape[-1]) ** -0.5)
    theta.up_t.normal_(std=(n * theta.up_t.shape[-1]) ** -0.5)
    theta.up_s.zero_()
    _start_rest(theta)


def compacter(use: Using, theta: Any) -> Any:
    """The bottleneck of two sums of Kronecker products."""
    d, r = use.space.out, use.space.rank
    down = _kronecker(theta.shared, theta.down_s, theta.down_t, (r, d))
    return _narrowed(use, theta, down, _kronecker(theta.shared, theta.up_s, theta.up_t, (d, r)))


def _kronecker(shared: Any, s: Any, t: Any, shape: tuple[int, int]) -> Any:
    """Σᵢ Aᵢ ⊗ (sᵢ·tᵢ)."""
    return torch.einsum("iab,ipf,ifq->apbq", shared, s, t).reshape(shape)


def compacter_check(settings: Mapping[str, Any]) -> str:
    for name in ("n", "factors"):
        if not _is_count(settings[name], 1):
            return f"{name}={settings[name]!r} is no positive integer"
    if why := bottleneck_check(settings):
        return why
    n, rank = settings["n"], settings["rank"]
    return f"n={n} does not divide rank={rank}: give a rank that is a multiple of it" if rank % n else ""


def compacter_asks(form: str, space: Any) -> str:
    n, d = space.settings.n, space.out
    return f"n={n} does not divide its {d} output features" if d % n else ""


# ── tokens ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def tokens_shapes(space: Any) -> dict[str, Sequence[int]]:
    """d·(l_p + l_i) numbers: the prefix, and behind it the infix."""
    return {"tokens": (space.settings.prefix + space.settings.infix, space.out)}


def tokens_start(theta: Any, weight: torch.Tensor) -> None:
    """Rows of the table, at random: words that the model knows (Lester 2021)."""
    _words(theta.tokens, weight)


def _words(rows: torch.Tensor, weight: torch.Tensor) -> None:
    drawn = torch.randint(weight.shape[-1], rows.shape[:1], device=weight.device)
    rows.copy_(weight.index_select(-1, drawn).mT)


def tokens(use: Using, theta: Any) -> Any:
    """θ's rows behind the last one of the table, which itself is read for all other indices, to the bit."""
    n = use.space.inner
    y = use.of(use.x.clamp(max=n - 1))
    own = F.embedding((use.x - n).clamp(min=0), theta.tokens)
    return torch.where((use.x >= n).unsqueeze(-1), own, y)


def tokens_check(settings: Mapping[str, Any]) -> str:
    for name in ("prefix", "infix"):
        if not _is_count(settings[name], 0):
            return f"{name}={settings[name]!r} is no number of tokens"
    return "" if settings["prefix"] + settings["infix"] else "prefix=0 and infix=0: there is no token to train"


def tokens_asks(form: str, space: Any) -> str:
    if form == "embedding":
        return ""
    return f"it has rows for indices, and {form} looks nothing up (of a tied table, role='embedding' takes the look-up)"


# ── activations behind blocks ────────────────────────────────────────────────────────────────────────────────────────

SEPARATOR = " | "
"""Between the paths of the blocks, in the setting that says which they are."""


def prefix_layer_shapes(space: Any) -> dict[str, Sequence[int]]:
    """L·d·(l_p + l_i) numbers (section 5.1): of each block the prefix, and behind it the infix."""
    count = space.settings.prefix + space.settings.infix
    return {f"block_{k}": (count, space.out) for k in range(len(space.settings.blocks.split(SEPARATOR)))}


def prefix_layer_start(theta: Any, weight: torch.Tensor) -> None:
    """Rows of the table, at random, others behind each block: as `tokens` starts."""
    for k in range(len(theta.blocks.split(SEPARATOR))):
        _words(getattr(theta, f"block_{k}"), weight)


def prefix_layer_words(use: Using, theta: Any) -> Any:
    """At the table the new tokens are its first words: what they are is said behind the first block."""
    n = use.space.inner
    return use.of(torch.where(use.x >= n, use.x % n, use.x))


def prefix_layer(h: Any, ids: Any, theta: Any, n: int) -> Any:
    """θ's rows at the positions of new tokens, and h elsewhere, to the bit."""
    ids = ids.to(h.device)
    own = F.embedding((ids - n).clamp(min=0), theta.to(h.device)).to(h.dtype)
    out = torch.where((ids >= n).unsqueeze(-1), own, h)
    return out if out.stride() == h.stride() else torch.empty_like(h).copy_(out)  # strides choose kernels


def prefix_layer_check(settings: Mapping[str, Any]) -> str:
    """Why these settings are none; empty where they are."""
    blocks = settings["blocks"]
    if blocks is not None and not (isinstance(blocks, str) and all(map(str.strip, blocks.split("|")))):
        return f"blocks={blocks!r} names no modules: give a glob over their paths, such as 'h.*'"
    return tokens_check(settings)


def _is_count(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least
