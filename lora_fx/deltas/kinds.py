"""Kinds: what an adapter is, one row each.

    W' = W + Σ δ(W, θ)        each δ relative to the base W, so that the order does not matter

A row is written over canonical axes, W: (batch…, out, in), whichever way the weight lies in the model: transposed, as a
table, as a kernel, as experts. A bias is the weight of an input that is always 1: (out, 1). A row says which tensors θ
has, how they start (δ = 0, to the bit), and what δ is: two factors where it is of low rank, a function of W and θ
elsewhere. Branches, the dense sum, folds, checks, files and ONNX follow from that.

The table is open: `lora_fx.register_kind` checks a row and puts it in. Beside it stands a small table of what is no
delta of a parameter, and rewrites what a use gives (`lora_fx.deltas.rewrites`): such a row has no branch and no fold.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch

from lora_fx.deltas import dora, principal, rewrites
from lora_fx.errors import KindError

REQUIRED: Any = ...
"""In the place of a setting's default: a rule has to give it."""


class Theta:
    """θ and the settings of its rule, as attributes: ``theta.A``, ``theta.rank``; and what follows from them."""

    def __init__(self, **values: Any) -> None:
        for name, value in values.items():  # one by one, which Dynamo can trace
            setattr(self, name, value)

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"θ has no {name}: it has {', '.join(vars(self))}")

    @property
    def scale(self) -> float:
        """alpha / rank, alpha = rank by default; or alpha / sqrt(rank), ``scaling="rslora"`` (Kalajdzievski 2023)."""
        alpha = self.rank if self.alpha is None else self.alpha
        return alpha / (math.sqrt(self.rank) if getattr(self, "scaling", "standard") == "rslora" else self.rank)


@dataclass(frozen=True)
class Space:
    """The canonical axes of what is adapted, with the settings of its rule: a kind takes the shapes of θ from it."""

    batch: tuple[int, ...]
    """Experts, or whatever the weight has one matrix for."""
    out: int
    """Output features: those of a part, where a part of a weight is adapted."""
    inner: int
    """Input features; of a convolution times the kernel's size, of a bias 1."""
    settings: Theta
    room: int | None = None
    """Ranks that there is room for, where they are more than the settings say."""

    @property
    def rank(self) -> int:
        return self.settings.rank if self.room is None else self.room


@dataclass(frozen=True)
class Kind:
    """A row of the table. Of `delta` and `factors` it has one."""

    name: str
    """What rules, plans and files call it."""
    shapes: Callable[[Space], Mapping[str, Sequence[int]]]
    """The tensors of θ: name → shape."""
    start: Callable[[Theta, torch.Tensor], Any]
    """(θ, W) → None: fill θ in place, so that δ(W, θ) = 0. W has θ's dtype; of a kind with factors its own, for most of
    them do not look at it."""
    delta: Callable[[Any, Theta], Any] | None = None
    """(W, θ) → δ, of W's shape, by torch's differentiable functions alone, in any floating dtype."""
    factors: Callable[[Theta], tuple[Any, Any]] | None = None
    """θ → A (batch…, rank, in) and B (batch…, out, rank): δ = scale · B·A; of `width` times the rank."""
    branch: Callable[[Any, Any, Theta], Any] | None = None
    """(product, W, θ) → x·δᵀ, without making δ: see `lora_fx.deltas.adapted_weight.Product`."""
    matmul: Callable[[str, Any, Any, Any, Theta], Any] | None = None
    """(op of `kernels.OPS`, x, W, bias, θ) → the op on W + δ, where that is faster than to add a branch; or None."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """What a rule may give it: name → default, or `REQUIRED`."""
    by_feature: bool = False
    """δ of an output feature follows from what W and θ have for that feature alone, and from θ that is for all: then a
    few rows of a weight can be folded at a time."""
    frozen: tuple[str, ...] = ()
    """Tensors of θ that stay where they start."""
    width: int = 1
    """How many ranks its factors have for each of its rule's."""
    pads: bool = False
    """Further ranks of zeros, in each tensor that has an axis of ranks, add nothing: so there may be room for more."""
    adapts: Literal["weight", "bias"] = "weight"
    """The weight of a matched site, or its bias."""
    shared: tuple[str, ...] = field(kw_only=True, default=())
    """Tensors of θ that all adapters of one name have in common."""
    asks: Callable[[str, Space], str] = field(kw_only=True, default=lambda form, space: "")
    """(form, space) → why it cannot stand at such a use; empty where it can."""
    why: str = field(kw_only=True, default="")
    """Why it cannot be folded; empty where it can."""
    behind: Callable[[Any, Any, Any, int], Any] | None = field(kw_only=True, default=None)
    """(h, ids, a tensor of θ, n) → h': what it makes of what a block gives, where the table of n words, whose adapter
    it is, was read with these ids. θ then has a tensor for each block, and ``blocks`` among its settings names them."""
    new_ids: Callable[[Mapping[str, Any]], int] = field(kw_only=True, default=lambda settings: 0)
    """settings → how many ids it takes behind the last one of the table."""

    @property
    def is_delta(self) -> bool:
        """W' = W + δ(W, θ)."""
        return not self.why

    @property
    def folds(self) -> str:
        """How, in a word: for a plan."""
        return "never" if self.why else "exactly" if self.low_rank else "rounded once"

    @property
    def by_graph(self) -> str:
        """Why no generated forward can have it in it, and whoever reads the weight is served; empty where one can."""
        if self.low_rank:
            return ""
        return f"{self.name} is no product of factors: whoever reads the {self.adapts} is served"

    def order(self, beside: bool) -> str:
        """In which order a use is computed with it, in words; empty where there is a choice of schedules.

        Args:
            beside: its own branch can stand beside each use.
        """
        if self.low_rank:
            return ""
        return "its own branch" if beside else f"{self.adapts} + δ"

    def widest(self, space: Space) -> tuple[int, str]:
        """The largest rank that a weight has room for, and what that is."""
        most = min(space.inner, space.out)
        return most, f"min(in, out) = min({space.inner}, {space.out}) = {most}"

    @property
    def low_rank(self) -> bool:
        """δ = s·B·A: it has the parallel branch with its schedules, and its fold is the real sum, rounded once."""
        return self.factors is not None

    def complete(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """The settings of an adapter: those that are given, and the defaults of the others.

        Raises:
            KindError: one of them is none of the kind's, or one that it needs is not given.
        """
        for name, value in given.items():
            if name not in self.settings:
                reason = f"{name}={value!r} is no setting of the kind {self.name!r}"
                raise KindError(reason, place=self.name, remedy=f"it has {', '.join(self.settings) or 'none'}")
        settings = {**self.settings, **given}
        if missing := [name for name, value in settings.items() if value is REQUIRED]:
            reason = f"the kind {self.name!r} needs {', '.join(missing)}"
            raise KindError(reason, place=self.name, remedy=f"give {missing[0]}=…")
        return settings

    def __deepcopy__(self, memo: dict[int, Any]) -> Kind:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return kind_named, (self.name,)


@dataclass(frozen=True)
class ActivationRewrite(Kind):
    """A row of the table of activation rewrites: y = use(x) = x·W'ᵀ + b  ⇒  y' = around(use, θ)."""

    around: Callable[[rewrites.Using, Any], Any] = field(kw_only=True)
    """(use, θ) → y', over tensors or proxies; at the start y' = y, to the bit."""
    why: str = field(kw_only=True)
    """Why it cannot be folded: the paper's reason."""
    check: Callable[[Mapping[str, Any]], str] = field(kw_only=True, default=lambda settings: "")
    """settings → why they are none; empty where they are."""

    @property
    def by_graph(self) -> str:
        return "" if self.behind is None else "blocks are told which ids it is read with: whoever reads it is served"

    def order(self, beside: bool) -> str:
        return "around the use" if self.behind is None else "behind blocks"

    def widest(self, space: Space) -> tuple[int, str]:
        """Of what is behind the use, where the weight's inputs are no bound."""
        return space.out, f"the {space.out} features that it narrows"

    def complete(self, given: Mapping[str, Any]) -> dict[str, Any]:
        settings = super().complete(given)
        if why := self.check(settings):
            raise KindError(why, place=f"kind={self.name!r}", remedy="change that setting in the rule")
        return settings


def kind_named(name: str) -> Kind:
    """The row of this name, in either table.

    Raises:
        KindError: there is none.
    """
    row = KINDS.get(name) or REWRITES.get(name)
    if row is None:
        raise KindError(
            f"there is no kind {name!r}",
            place="kind",
            remedy=f"choose one of {', '.join((*KINDS, *REWRITES))}; register_kind adds another",
        )
    return row


# ── rows ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def factor_shapes(space: Space) -> dict[str, tuple[int, ...]]:
    """A and B."""
    return {"A": (*space.batch, space.rank, space.inner), "B": (*space.batch, space.out, space.rank)}


def start_factors(theta: Theta, weight: torch.Tensor) -> None:
    """B = 0, and A as the setting `init` says."""
    theta.B.zero_()
    if callable(theta.init):
        theta.init(theta.A, theta.B)
    elif theta.init == "kaiming":  # as nn.Linear: uniform in ±1/sqrt(in)
        bound = 1 / math.sqrt(theta.A.shape[-1])
        theta.A.uniform_(-bound, bound)
    elif theta.init == "gaussian":
        theta.A.normal_(std=1 / theta.rank)
    else:
        theta.A.zero_()


def own_factors(theta: Theta) -> tuple[Any, Any]:
    """A and B, which are tensors of θ."""
    return theta.A, theta.B


_FACTORED = {"rank": REQUIRED, "alpha": None, "scaling": "standard", "dropout": 0.0, "init": "kaiming"}

#: Hu et al., ICLR 2022
LORA = Kind(
    "lora",
    shapes=factor_shapes,
    start=start_factors,
    factors=own_factors,
    settings={**_FACTORED, "schedule": "auto"},
    pads=True,
)
_UNDRAWN = {key: value for key, value in LORA.settings.items() if key != "init"}


def _dora_start(theta: Theta, weight: torch.Tensor) -> None:
    start_factors(theta, weight)
    theta.magnitude.copy_(dora.size(weight, theta))
    if not bool(theta.magnitude.all()):
        raise KindError(
            "an output feature of the weight is 0 throughout: it has no direction, and DoRA divides by its norm",
            place="kind='dora'",
            remedy="adapt this weight with another kind",
        )


#: Liu et al., ICML 2024: a size and a direction for each output feature; δ = m·(W + s·B·A) / ‖W + s·B·A‖ − W
DORA = Kind(
    "dora",
    shapes=lambda space: {**factor_shapes(space), "magnitude": (*space.batch, space.out, 1)},
    start=_dora_start,
    delta=lambda weight, theta: theta.magnitude / dora.size(weight, theta) * dora.turned(weight, theta) - weight,
    branch=dora.branch,
    matmul=dora.matmul,
    settings=_FACTORED,
    by_feature=True,
    pads=True,
)


def _adalora_start(theta: Theta, weight: torch.Tensor) -> None:
    """Λ = 0; P and Q are Gaussian, as wide as PEFT's."""
    theta.P.normal_(std=0.02)
    theta.Q.normal_(std=0.02)
    theta.singular.zero_()


#: Zhang et al., ICLR 2023: δ = s·P·Λ·Q, Λ a diagonal, P and Q pressed to be orthogonal (`lora_fx.Budget`)
ADALORA = Kind(
    "adalora",
    shapes=lambda space: {
        "P": (*space.batch, space.out, space.rank),
        "singular": (*space.batch, space.rank, 1),
        "Q": (*space.batch, space.rank, space.inner),
    },
    start=_adalora_start,
    factors=lambda theta: (theta.singular * theta.Q, theta.P),
    settings=_UNDRAWN,
    pads=True,
)

#: Meng, Wang and Zhang, NeurIPS 2024: δ = s·(B·A − B₀·A₀), where s·B₀·A₀ is the nearest of its rank to W
PISSA = Kind(
    "pissa",
    shapes=lambda space: {**factor_shapes(space), **principal.starts(factor_shapes(space))},
    start=principal.pissa,
    factors=principal.factors,
    settings={**_UNDRAWN, "niter": None},
    frozen=("A0", "B0"),
    width=2,
)

#: Büyükakyüz 2024: the same, B₀ and A₀ the first columns and rows of W = Q·R
OLORA = replace(PISSA, name="olora", start=principal.olora, settings=_UNDRAWN)

#: Zaken et al., ACL 2022 (BitFit)
BIAS = Kind(
    "bias",
    shapes=lambda space: {"shift": (*space.batch, space.out, 1)},
    start=lambda theta, weight: theta.shift.zero_(),
    delta=lambda weight, theta: theta.shift,
    adapts="bias",
)

#: the weight itself is trained, beside the one that was
FULL = Kind(
    "full",
    shapes=lambda space: {"weight": (*space.batch, space.out, space.inner)},
    start=lambda theta, weight: theta.weight.copy_(weight),
    delta=lambda weight, theta: theta.weight - weight,
    by_feature=True,
)

#: name → row; read whenever a kind is asked for, since rows come and go (`lora_fx.deltas.kind_registration`)
KINDS = {kind.name: kind for kind in (LORA, DORA, ADALORA, PISSA, OLORA, BIAS, FULL)}

_DEPTH = (
    "it adds layers that are computed one after the other, behind each use (Hu et al., section 3), and is no delta of W"
)
_NARROW = {"rank": REQUIRED, "norm": False, "activation": "gelu"}

#: Houlsby et al. 2019, Lin et al. 2020 (``norm=True``), Pfeiffer et al. 2021: where it stands is what tells them apart
BOTTLENECK = ActivationRewrite(
    "bottleneck",
    shapes=rewrites.bottleneck_shapes,
    start=rewrites.bottleneck_start,
    settings=_NARROW,
    around=rewrites.bottleneck,
    check=rewrites.bottleneck_check,
    why=_DEPTH,
)

#: Mahabadi et al., NeurIPS 2021
COMPACTER = ActivationRewrite(
    "compacter",
    shapes=rewrites.compacter_shapes,
    start=rewrites.compacter_start,
    settings={**_NARROW, "n": 4, "factors": 1},
    around=rewrites.compacter,
    asks=rewrites.compacter_asks,
    check=rewrites.compacter_check,
    shared=("shared",),
    why=_DEPTH,
)

_LENGTH = "its tokens take a part of the sequence length (Hu et al., section 3), and "
_COUNTED = {"prefix": 0, "infix": 0}


def _new_ids(settings: Mapping[str, Any]) -> int:
    return settings["prefix"] + settings["infix"]


#: PreEmbed (Hu et al., section 5.1): trainable tokens behind the last one of the vocabulary
TOKENS = ActivationRewrite(
    "tokens",
    shapes=rewrites.tokens_shapes,
    start=rewrites.tokens_start,
    settings=_COUNTED,
    around=rewrites.tokens,
    asks=rewrites.tokens_asks,
    check=rewrites.tokens_check,
    new_ids=_new_ids,
    why=f"{_LENGTH}the table of W has no rows for them",
)

#: PreLayer (the same): what blocks give at the positions of such tokens is trained
PREFIX_LAYER = ActivationRewrite(
    "prefix_layer",
    shapes=rewrites.prefix_layer_shapes,
    start=rewrites.prefix_layer_start,
    settings={**_COUNTED, "blocks": None},
    around=rewrites.prefix_layer_words,
    behind=rewrites.prefix_layer,
    asks=rewrites.tokens_asks,
    check=rewrites.prefix_layer_check,
    new_ids=_new_ids,
    why=f"{_LENGTH}what blocks give there is no sum with a delta of W",
)

#: name → row, of those that are no delta of a parameter
REWRITES = {row.name: row for row in (BOTTLENECK, COMPACTER, TOKENS, PREFIX_LAYER)}
