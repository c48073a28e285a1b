"""Hypothesis strategies: random models, rules that are valid on a model, and numbers for its adapters."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import assume
from hypothesis import strategies as st
from torch import nn

from lora_fx.analysis.rules import Rule
from lora_fx.analysis.sites import Site, find_sites
from lora_fx.application import plan
from lora_fx.checks.verification import scatter
from lora_fx.deltas.kinds import kind_named
from lora_fx.deltas.schedules import AUTO, BRANCH, SCHEDULES
from lora_fx.errors import LoraFxError
from lora_fx.model.classes import unwired
from lora_fx.model.inventory import inventory
from lora_fx.passes.planning import read_program
from lora_fx.testing.random_models import BLOCKS, DTYPES, GLUE, HEADS, Again, Block, Embedding, RandomModel, Tied


@st.composite
def models(
    draw: st.DrawFn,
    *,
    blocks: Sequence[type[Block]] = BLOCKS,
    dtypes: Sequence[torch.dtype] = DTYPES,
    training: Sequence[bool] = (False, True),
    heads: Sequence[str] = HEADS,
    max_blocks: int = 3,
) -> tuple[RandomModel, tuple[torch.Tensor]]:
    """(model, example inputs): random programs over every way a model multiplies with a weight.

    Chains and residuals, fused, sliced and tied weights, modules called again, odd sizes; the model's `repr` is the
    program, and can be pasted. Shrinks to one `Linear`.

    Args:
        blocks: the rows to draw from; all of them are in `BLOCKS`.
        dtypes: of parameters and inputs.
        training: train mode or not.
        heads: how the models end; see `lora_fx.testing.random_models.HEADS`.
        max_blocks: the longest chain.
    """
    dtype = draw(st.sampled_from(list(dtypes)))
    served = [block for block in blocks if dtype in block.dtypes]
    steps: list[Block | Again] = []
    real: list[int] = []  # the steps that can be shared
    for count in range(draw(st.integers(1, max_blocks))):
        shares = draw(st.sampled_from([None, None, None, Again, Tied])) if real else None
        if shares is not None:
            steps.append(shares(draw(st.sampled_from(real))))
            continue
        kind = draw(st.sampled_from(_row_choices(served, first=count == 0)))
        if not kind.reads_ids:
            real.append(count)
        steps.append(kind(**draw(_options(kind))))
    tables = isinstance(steps[0], Embedding)
    model = RandomModel(
        *steps,
        head=draw(st.sampled_from([h for h in heads if tables or h not in ("tied", "borrowed")] or ["none"])),
        outputs=draw(st.sampled_from((2, 3, 5, 1))),
        dtype=dtype,
        seed=draw(st.integers(0, 2**16)),
        training=draw(st.sampled_from(list(training))),
    )
    return model, model.example(draw(st.sampled_from((2, 1, 3))), draw(st.sampled_from((3, 1, 2, 5))))


def _row_choices(blocks: Sequence[type[Block]], first: bool) -> list[type[Block]]:
    """Only a first block can look up; it does so often, because heads can be tied to it."""
    lookups, others = [b for b in blocks if b.reads_ids], [b for b in blocks if not b.reads_ids]
    if not first:
        return others or lookups
    return [*others[:1], *lookups * (1 + len(others) // 6), *others[1:]]


def _options(kind: type[Block]) -> st.SearchStrategy[dict[str, Any]]:
    every = {**kind.choices, **GLUE}
    return st.fixed_dictionaries({name: st.sampled_from(values) for name, values in every.items()})


@st.composite
def rules_for(
    draw: st.DrawFn,
    model: nn.Module,
    example_inputs: Any = None,
    *,
    dropout: bool = False,
    kinds: Sequence[str] = ("lora",),
) -> list[Rule]:
    """Rules that are valid on this model and make at least one adapter; no example where nothing can take the kinds.

    Some sites by name, by role, by op or by a predicate, with a rank up to what fits; the rest is excluded or left.

    Args:
        dropout: also draw a dropout of the branches, where every use can have one.
        kinds: of the adapters; each rule has one of them.
    """
    with unwired(model):
        sites = [s for s in find_sites(read_program(model, example_inputs)) if min(s.in_features, s.out_features)]
    refused = dict.fromkeys(s.weight.name for s in sites if s.weight.problem)
    rules, left = [Rule(where=name) for name in refused], [s for s in sites if not s.weight.problem]
    if not left:
        raise LoraFxError("the model has no weight that can be adapted", place="rules_for", remedy="draw another model")
    kinds = [kind for kind in kinds if any(_takes(model, example_inputs, site, kind) for site in left)]
    assume(kinds)
    others = list(dict.fromkeys(s.weight for s in left))[1:] if kinds == ["lora"] else []
    if others and draw(st.sampled_from((False, False, True))):
        out = draw(st.sampled_from(others))
        rules, left = [*rules, Rule(where=out.name)], [s for s in left if s.weight is not out]
    made = 0
    for _ in range(draw(st.integers(1, 3))):
        kind = draw(st.sampled_from(kinds))
        fitting = left if kind == "lora" else [s for s in left if _takes(model, example_inputs, s, kind, rules)]
        if fitting:
            rule, decided = draw(_rule(model, example_inputs, rules, fitting, dropout, kind))
            rules, left, made = [*rules, rule], [s for s in left if s not in decided], made + 1
    assume(made)
    return rules


def _takes(model: nn.Module, inputs: Any, site: Site, kind: str, before: Sequence[Rule] = ()) -> bool:
    """Whether a rule for this weight alone can have an adapter of the kind."""
    if kind == "lora":
        return True
    settings: dict[str, Any] = {"rank": 1} if "rank" in kind_named(kind).settings else {}
    try:
        plan(model, [*before, Rule(where=site.weight.name, kind=kind, **settings)], inputs)
    except LoraFxError:
        return False
    return True


@st.composite
def _rule(
    draw: st.DrawFn, model: nn.Module, inputs: Any, before: list[Rule], left: list[Site], dropout: bool, kind: str
) -> tuple[Rule, list[Site]]:
    """A rule, and which of the sites that are left it decides."""
    chosen = draw(st.sampled_from(left))
    by_role = {"role": chosen.role or "*"}
    keys: list[dict[str, Any]] = [
        *({"where": "*"}, by_role, {"form": chosen.uses[0].form}, {"where": chosen.weight.name}),
        by_role,  # twice: only a role asks for a part of a weight, or for one use of a tied one
        {"when": Narrower(chosen.in_features + 1)},
    ]
    key = draw(st.sampled_from(keys))
    settings: dict[str, Any] = dict(
        rank=draw(st.integers(1, 4)),
        alpha=draw(st.sampled_from((None, 1, 3, 0.5, 16, -2))),
        scaling=draw(st.sampled_from(("standard", "rslora"))),
        schedule=draw(st.sampled_from(SCHEDULES)),
        dropout=draw(st.sampled_from((0.0, 0.5))) if dropout else 0.0,
    )
    settings = {name: value for name, value in settings.items() if name in kind_named(kind).settings}
    rule, decided = _fitting(key, kind, settings, left)
    partly = any(s.weight in {d.weight for d in decided} and s not in decided for s in left)
    if kind != "lora" or partly or settings["dropout"] or settings["schedule"] not in (AUTO, BRANCH):
        try:
            plan(model, [*before, rule], inputs)
        except LoraFxError:  # one use of a weight that the same attribute gives to others; a use that has no branch
            plain = {k: v for k, v in settings.items() if k not in ("dropout", "schedule")}
            return _fitting({"where": chosen.weight.name}, kind, plain, left)
    return rule, decided


def _fitting(key: dict[str, Any], kind: str, settings: dict[str, Any], left: Sequence[Site]) -> tuple[Rule, list[Site]]:
    """The rule, with a rank that every site it decides can have, and those sites."""
    decided = [site for site in left if Rule(**key).matches(site)]
    if "rank" in settings:
        rank = min(settings["rank"], *(min(s.in_features, s.out_features) for s in decided))
        settings = {**settings, "rank": rank}
    return Rule(**key, **settings, kind=None if kind == "lora" else kind), decided


@dataclass(frozen=True)
class Narrower:
    """A predicate on a site: fewer input features than this."""

    than: int

    def __call__(self, site: Site) -> bool:
        return site.in_features < self.than


@dataclass(frozen=True)
class Filling:
    """Gives every adapter in a model random θ ≠ θ₀ (for `lora` B ≠ 0), in place; equal fillings give equal bits."""

    seed: int
    size: float
    """Of the delta, relative to a usual weight of the adapter's width, for a scale up to 1 in size; of other kinds than
    `lora` relative to the weight."""
    kinds: tuple[str, ...] | None = None
    """Those that are filled; None for all."""

    @torch.no_grad()
    def __call__(self, model: nn.Module) -> nn.Module:
        generator = torch.Generator().manual_seed(self.seed)
        places = {place.adapter: place for place in reversed(inventory(model).places)}
        for adapter, place in reversed(places.items()):
            if self.kinds is not None and adapter.kind.name not in self.kinds:
                continue
            if adapter.kind.name != "lora":
                with torch.random.fork_rng(devices=[]):
                    torch.manual_seed(self.seed)
                    adapter.start(place.parameter)
                scatter(adapter, place.parameter, generator, self.size)
                continue
            smaller = max(1.0, abs(adapter.multiplier))
            for factor, std in ((adapter.A, adapter.A.shape[-1] ** -0.5), (adapter.B, adapter.rank**-0.5 / smaller)):
                values = torch.randn(factor.shape, generator=generator, dtype=torch.float64)
                factor.copy_(values * std * math.sqrt(self.size))
        return model


def adapters(
    *, sizes: Sequence[float] = (1.0, 0.25, 1e-3), kinds: Sequence[str] | None = None
) -> st.SearchStrategy[Filling]:
    """Fillings: call one on a model, and every adapter in it has random θ ≠ θ₀ (for `lora` B ≠ 0).

    Args:
        sizes: of the delta, relative to a usual weight.
        kinds: of the adapters that are filled; None for all.
    """
    names = None if kinds is None else tuple(kinds)
    return st.builds(Filling, seed=st.integers(0, 2**16), size=st.sampled_from(list(sizes)), kinds=st.just(names))
