"""Which weights to adapt, and with which rank each: the paper's open question (Hu et al. 2022, section 8, 3).

    L(W + δ)  =  L(W) + ⟨G, δ⟩ + …,                                   G = ∂L/∂W over the batches
    the best δ of rank r at a rate η   is  −η·Gᵣ   (Eckart and Young 1936), and decreases L by η·(σ₁² + … + σᵣ²)

σ are G's singular values. One more rank of a weight (out, in) decreases L by η·σᵣ₊₁² and costs out + in parameters.
Over all sites the ranks with most of it for a parameter are taken until the budget is spent: as every site's σ² fall,
no other choice of as many parameters decreases L more, to first order. Where that leaves much of the budget over, and
one rank for all sites decreases L more, it is that.

No full gradient of the model is ever there: each weight's is taken out of backward as soon as it has come. Of a weight
that is small on one side it is added up; of another one only its products with a few random directions are, and in a
second pass over the batches with the directions that these found (Halko, Martinsson and Tropp 2011, 4.1 and 5.1).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from lora_fx.analysis.rules import REFUSE, SKIP, Rule, read_rules
from lora_fx.application import apply, plan
from lora_fx.changes import borrowed, changing, safe_point
from lora_fx.checks.verification import refuse_unmeasurable
from lora_fx.deltas.adapter import Adapter
from lora_fx.errors import LoraFxError, PlanError
from lora_fx.graph.capture import Inputs
from lora_fx.graph.own_state import undisturbed
from lora_fx.model.inventory import inventory
from lora_fx.passes.planning import Row
from lora_fx.tables import table

Loss = Callable[[nn.Module, Any], torch.Tensor]

#: directions beyond the largest rank that is asked for: they make what is found of the largest ones sharp
_BEYOND = 8

#: of the loss: what the first step is predicted to take from it, where it is measured
_SHARE = 0.01

_NAME = "suggested"


@dataclass(frozen=True)
class SuggestedSite:
    """One site, and what the suggestion gives it."""

    weight: str
    role: str
    shape: tuple[int, ...]
    rank: int
    """0: it stays as it is."""
    parameters: int
    predicted: float
    """By how much the loss falls in one step at the report's rate, to first order, with this rank."""
    measured: float | None = None
    """… and by how much it fell, with this site's step alone; None where it was not measured, and for rank 0."""


@dataclass(frozen=True)
class Step:
    """One step of all sites together."""

    predicted: float
    measured: float | None


@dataclass(frozen=True)
class Suggestion:
    """Rules for `apply`, which takes the suggestion itself, too. `print` it, or keep its `to_json()`."""

    rules: tuple[Rule, ...]
    sites: tuple[SuggestedSite, ...]
    budget: int
    loss: float
    """Over the batches, before the step."""
    rate: float
    """η."""
    together: Step
    uniform_rank: int
    """The largest rank that the budget allows in every site; 0 where there is none."""
    uniform: Step | None

    def __iter__(self) -> Iterator[Rule]:
        return iter(self.rules)

    @property
    def parameters(self) -> int:
        """Those of the adapters, at most the budget."""
        return sum(site.parameters for site in self.sites)

    @property
    def correlation(self) -> float | None:
        """Of predicted and measured decreases over the sites that get a rank, by their order (Spearman 1904)."""
        pairs = [(site.predicted, site.measured) for site in self.sites if site.measured is not None]
        return _of_ranks(*zip(*pairs, strict=True)) if len(pairs) > 1 else None

    def to_json(self) -> dict[str, Any]:
        """Everything but the rules, which `label` writes."""
        numbers = {name: getattr(self, name) for name in ("budget", "loss", "rate", "uniform_rank", "correlation")}
        return {
            **numbers, "rules": [rule.label for rule in self.rules], "together": asdict(self.together),
            "uniform": None if self.uniform is None else asdict(self.uniform),
            "sites": [asdict(site) for site in self.sites],
        }  # fmt: skip

    def __str__(self) -> str:
        header = ("weight", "role", "shape", "rank", "parameters", "predicted", "measured")
        rows = [
            (s.weight, s.role, "×".join(map(str, s.shape)), str(s.rank or "–"), f"{s.parameters:,}",
             f"{s.predicted:.2e}" if s.rank else "", "" if s.measured is None else f"{s.measured:.2e}")
            for s in self.sites
        ]  # fmt: skip
        chosen = sum(site.rank > 0 for site in self.sites)
        lines = [
            table(header, rows, right=(3, 4, 5, 6)),
            f"{chosen} of {len(self.sites)} sites, {self.parameters:,} parameters of a budget of {self.budget:,}",
            f"one step at η = {self.rate:.2e} from a loss of {self.loss:.4f}: {_decrease(self.together)}",
        ]
        if self.uniform is None:
            lines.append("no rank fits into the budget in every site")
        else:
            lines.append(f"rank {self.uniform_rank} in every site: {_decrease(self.uniform)}")
        if self.correlation is not None:
            lines.append(f"rank correlation of predicted and measured over the sites: {self.correlation:.3f}")
        return "\n".join(lines)


def _decrease(step: Step) -> str:
    measured = "" if step.measured is None else f", measured {step.measured:.3e}"
    return f"predicted decrease {step.predicted:.3e}{measured}"


def suggest(
    model: nn.Module,
    budget: int,
    batches: Iterable[Any],
    loss: Loss,
    sites: Any = None,
    *,
    most: int = 64,
    measure: bool = True,
) -> Suggestion:
    """Which sites get which rank, so that a first step decreases the loss most at so many parameters.

    One or two backward passes over the batches, in the mode that the model is in. Nothing of the model is changed.

    Args:
        budget: parameters of the adapters, at most.
        batches: whatever `loss` takes; each is seen several times, all count the same.
        loss: ``loss(model, batch)`` runs the model, and returns a scalar to make small.
        sites: rules that say which sites are asked about, and the settings that they get; ranks in them count for
            nothing. Every site without them.
        most: the largest rank of a site.
        measure: take the step, too: each site alone, all together, and with one rank for all of them, which is a
            forward over the batches for each.

    Returns:
        A suggestion: rules, and what they are expected to do, site by site.

    Raises:
        PlanError: no rank fits into the budget, or the sites cannot have adapters of low rank.
        LoraFxError: the model has adapters, or the loss is no finite scalar that depends on it.
    """
    for name, value in (("budget", budget), ("most", most)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise LoraFxError(f"{name}={value!r}", place="suggest", remedy="give a whole number above 0")
    given = list(batches)
    if not given:
        raise LoraFxError(
            "there are no batches", place="batches", remedy="pass a list of what loss(model, batch) takes"
        )
    refuse_unmeasurable(model)
    with changing(model, "suggest"):
        if inventory(model).adapters or inventory(model).records:
            remedy = "pass the base model: lora_fx.remove its adapters first"
            raise LoraFxError("it has adapters already", place=type(model).__name__, remedy=remedy)
        rules = read_rules(Rule(role="*", rank=1, otherwise=SKIP) if sites is None else sites)
        inputs = _called_with(model, given[0], loss)
        rows = _candidates(model, rules, inputs)
        found, before = _spectra(model, rows, given, loss, min(most, budget))
        squares, costs = [s.squares for s in found], [s.cost for s in found]
        uniform = _uniform(found, budget)
        ranks = better(squares, allocate(squares, costs, budget), [min(uniform, len(own)) for own in squares])
        if not any(ranks):
            raise _nothing(found, budget)
        rate = _SHARE * abs(before or 1.0) / sum(s.decrease(rank) for s, rank in zip(found, ranks, strict=True))
        trial = _Trial(model, given, loss, inputs, found, rate, before, measure)
        together, each = trial.taken(ranks, alone=True)
        other = trial.taken([min(uniform, len(s.squares)) for s in found])[0] if uniform else None
    named = tuple(
        SuggestedSite(
            s.row.name, s.row.role, s.row.weight.shape, rank, rank * s.cost, rate * s.decrease(rank), own
        )
        for s, rank, own in zip(found, ranks, each, strict=True)
    )  # fmt: skip
    return Suggestion(_rules(found, ranks), named, budget, before, rate, together, uniform, other)


def allocate(squares: Sequence[Sequence[float]], costs: Sequence[int], budget: int) -> list[int]:
    """How many ranks each site gets: those of most decrease for a parameter first, while they fit.

    Args:
        squares: of each site, what each of its ranks decreases the loss by, the largest first.
        costs: of each site, the parameters of one rank.
    """
    ranks = [0] * len(costs)
    every = ((own / costs[n], n) for n, values in enumerate(squares) for own in values if own > 0)
    for _, n in sorted(every, key=lambda item: (-item[0], item[1])):  # of equals the first site's
        if costs[n] <= budget:
            budget, ranks[n] = budget - costs[n], ranks[n] + 1
    return ranks


def better(squares: Sequence[Sequence[float]], *choices: list[int]) -> list[int]:
    """The choice of most decrease, of equals the first: what a budget leaves over can make one rank for all that."""
    return max(choices, key=lambda ranks: sum(math.fsum(own[:r]) for own, r in zip(squares, ranks, strict=True)))


def _uniform(found: Sequence[_Spectrum], budget: int) -> int:
    """The largest rank that all sites can have; a site that has fewer has all of its own."""
    rank = 0
    while rank < max(len(s.squares) for s in found):
        if sum(min(rank + 1, len(s.squares)) * s.cost for s in found) > budget:
            break
        rank += 1
    return rank


def _nothing(found: Sequence[_Spectrum], budget: int) -> LoraFxError:
    if not any(value > 0 for s in found for value in s.squares):
        remedy = "give a loss that depends on them, or other sites"
        return LoraFxError("no gradient reaches any of the sites", place="loss", remedy=remedy)
    least = min(found, key=lambda s: s.cost)
    return PlanError(
        f"budget={budget} is less than one rank of any site has: the least, of {least.row.name}, has {least.cost:,}",
        place="budget",
        remedy=f"give at least {least.cost}",
    )


def _of_ranks(a: Sequence[float], b: Sequence[float]) -> float:
    ranks = torch.stack([torch.tensor(v, dtype=torch.float64).argsort().argsort().to(torch.float64) for v in (a, b)])
    return float(torch.corrcoef(ranks)[0, 1])


# ── the sites ────────────────────────────────────────────────────────────────────────────────────────────────────────


def _called_with(model: nn.Module, batch: Any, loss: Loss) -> Inputs:
    """What the loss calls the model with."""
    seen: list[Inputs] = []
    hook = model.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(Inputs(args, dict(kwargs))), with_kwargs=True
    )
    try:
        _evaluated(model, batch, loss, 0)
    finally:
        hook.remove()
    if not seen:
        raise LoraFxError("loss does not call the model", place="loss", remedy="call model(…) in it, not a part of it")
    return seen[0]


def _candidates(model: nn.Module, rules: Sequence[Rule], inputs: Inputs) -> list[Row]:
    """One row for each site, each with the least rank there is."""
    for rule in rules:
        if rule.kind not in (None, "lora"):
            remedy = "leave the kind out of `sites`, or the rule"
            raise PlanError(f"the kind {rule.kind!r} has no ranks to give", place=rule.label, remedy=remedy)
    asked = [rule if rule.excludes else replace(rule, rank=1, expect=None) for rule in rules]
    rows = plan(model, asked, inputs, name=_NAME).rows
    for row in rows:
        why = "its other uses have a share in the weight's gradient" if row.split else ""
        if row.rows is not None and row.rule.role is None:
            why = "it is several parts of a weight, which only a rule by role keeps apart"
        if why:
            raise PlanError(f"its first step cannot be said: {why}", place=row.name, remedy="ask for other `sites`")
    return list(rows)


def _rules(found: Sequence[_Spectrum], ranks: Sequence[int]) -> tuple[Rule, ...]:
    """One for each rank, and for each role of parts of weights; their other settings are those of the rules before."""
    groups: dict[tuple[Rule, int, str | None], list[str]] = {}
    for s, rank in zip(found, ranks, strict=True):
        if rank:
            role = s.row.role if s.row.rows is not None else None
            groups.setdefault((s.row.rule, rank, role), []).append(s.row.weight.name)
    keys: dict[str, Any] = dict.fromkeys(("form", "layers", "pattern", "adapt", "when"))
    return tuple(
        replace(rule, **keys, where=" | ".join(map(_literally, names)), role=role, rank=rank, otherwise=REFUSE)
        for (rule, rank, role), names in sorted(groups.items(), key=lambda item: -item[0][1])
    )


def _literally(name: str) -> str:
    """A glob that matches this name alone."""
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)


# ── the gradient ─────────────────────────────────────────────────────────────────────────────────────────────────────


class _Spectrum:
    """The largest singular values of the gradient of one site, and their directions, from gradients that come by.

    A gradient is (batch…, out, in), of experts one matrix each.
    """

    squares: list[float]
    """What each rank decreases the loss by at a rate of 1: σ², of experts the sum of theirs."""

    def __init__(self, row: Row, most: int) -> None:
        self.row = row
        self.out, self.inner = row.out, row.layout.size("i")
        self.most = min(most, self.out, self.inner)
        self.width = self.most + _BEYOND
        self.whole = min(self.out, self.inner) <= self.width
        """All of the gradient is kept: it is no larger than its products would be."""
        self.dtype = torch.float64 if row.weight.parameter.dtype == torch.float64 else torch.float32
        self._sum: torch.Tensor | None = None
        self._found: torch.Tensor | None = None

    @property
    def cost(self) -> int:
        """The parameters of one rank."""
        return math.prod(self.row.layout.batch) * (self.out + self.inner)

    def decrease(self, rank: int) -> float:
        return math.fsum(self.squares[:rank])

    def add(self, gradient: torch.Tensor) -> None:
        """Of the whole weight, in its own shape and dtype."""
        G = self.row.layout.to_matrix(gradient)
        if self.row.rows is not None:
            G = G.index_select(-2, torch.tensor(self.row.rows, device=G.device))
        G = G.to(self.dtype)
        if self._found is not None:
            G = self._found.mT @ G
        elif not self.whole:
            G = G @ self._directions(G)
        self._sum = G.clone() if self._sum is None else self._sum.add_(G)

    def _directions(self, G: torch.Tensor) -> torch.Tensor:
        """(in, width), the same each time."""
        draw = torch.Generator(G.device).manual_seed(0)
        return torch.randn(self.inner, self.width, generator=draw, dtype=self.dtype, device=G.device)

    def turn(self) -> bool:
        """After a pass over the batches; whether it needs another one, in the directions that it has found."""
        if self.whole or self._found is not None or self._sum is None:
            return False
        self._found, self._sum = torch.linalg.qr(self._sum)[0], None
        return True

    def close(self, batches: int) -> None:
        """After the last pass."""
        if self._sum is None:  # no gradient has come
            self.squares = []
            return
        if not bool(self._sum.isfinite().all()):
            remedy = "give a loss, and batches, whose gradients are finite"
            raise LoraFxError("its gradient holds NaN or Inf", place=self.row.name, remedy=remedy)
        left, values, right = torch.linalg.svd(self._sum / batches, full_matrices=False)
        left = left if self._found is None else self._found @ left
        self._left, self.values, self._right = (
            left[..., : self.most], values[..., : self.most].to(torch.float64), right[..., : self.most, :],
        )  # fmt: skip
        rounding = torch.finfo(self.dtype).eps * max(self.out, self.inner) * self.values.max()
        squares = torch.where(self.values > rounding, self.values, 0.0).square()
        self.squares = squares.reshape(-1, squares.shape[-1]).sum(0).tolist()
        self._sum = self._found = None

    @torch.no_grad()
    def step(self, adapter: Adapter, rate: float) -> None:
        """s·B·A = −η·Gᵣ."""
        rank = adapter.rank
        adapter.A.copy_(self._right[..., :rank, :])
        wide = self._left[..., :rank] * self.values[..., None, :rank].to(self.dtype)
        adapter.B.copy_(wide * (-rate / adapter.scale))


def _spectra(
    model: nn.Module, rows: Sequence[Row], batches: Sequence[Any], loss: Loss, most: int
) -> tuple[list[_Spectrum], float]:
    """Of each row, and the loss."""
    found = [_Spectrum(row, max(most, 1)) for row in rows]
    by_weight: dict[nn.Parameter, list[_Spectrum]] = {}
    for s in found:
        by_weight.setdefault(s.row.weight.parameter, []).append(s)
    before = _passed(model, by_weight, batches, loss)
    turned = [s.turn() for s in found]
    if any(turned):
        again = {p: [s for s in own if not s.whole] for p, own in by_weight.items()}
        _passed(model, {p: own for p, own in again.items() if own}, batches, loss)
    for s in found:
        s.close(len(batches))
    return found, before


def _passed(
    model: nn.Module, by_weight: Mapping[nn.Parameter, list[_Spectrum]], batches: Sequence[Any], loss: Loss
) -> float:
    """The mean of the loss, while each gradient is taken where it comes, and is gone before the next one."""
    total = 0.0
    with _taking(model, by_weight):
        for n, batch in enumerate(batches):
            total += _evaluated(model, batch, loss, n, backward=True)
    return total / len(batches)


@contextmanager
def _taking(model: nn.Module, by_weight: Mapping[nn.Parameter, list[_Spectrum]]) -> Iterator[None]:
    """Inside, these weights alone train, and their gradients go to their spectra and nowhere else."""

    def take(parameter: torch.Tensor) -> None:
        assert parameter.grad is not None
        for s in by_weight[parameter]:  # type: ignore[index]
            s.add(parameter.grad)
        parameter.grad = None

    before = [(p, p.requires_grad, p.grad) for p in model.parameters()]
    hooks = []
    try:
        for p, _, _ in before:
            p.requires_grad_(p in by_weight)
            p.grad = None
        hooks += [p.register_post_accumulate_grad_hook(take) for p in by_weight]
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for p, trained, gradient in before:
            p.requires_grad_(trained)
            p.grad = gradient


def _evaluated(model: nn.Module, batch: Any, loss: Loss, number: int, backward: bool = False) -> float:
    """The loss of one batch; with random draws that depend on its number alone, and without a trace.

    Raises:
        LoraFxError: it is no finite scalar, or does not depend on the weights.
    """
    safe_point()
    with torch.set_grad_enabled(backward), undisturbed(model, partial(loss, model, batch)):
        torch.manual_seed(number)
        value = loss(model, batch)
        place, remedy = f"the loss of batch {number}", "return a finite scalar tensor that the model's outputs make"
        if not isinstance(value, torch.Tensor) or value.numel() != 1 or not value.is_floating_point():
            shown = tuple(value.shape) if isinstance(value, torch.Tensor) else repr(value)
            raise LoraFxError(f"{shown} is no scalar tensor", place=place, remedy=remedy)
        if not bool(value.isfinite()):
            raise LoraFxError(f"{value.item()} is not finite", place=place, remedy=remedy)
        if backward:
            if not value.requires_grad:
                raise LoraFxError("it does not depend on any of the sites", place=place, remedy=remedy)
            value.reshape(()).backward()
    return value.item()


# ── the step ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class _Trial:
    """One step down the gradient, from the model as it is."""

    model: nn.Module
    batches: Sequence[Any]
    loss: Loss
    inputs: Inputs
    found: Sequence[_Spectrum]
    rate: float
    before: float
    measure: bool

    def taken(self, ranks: Sequence[int], alone: bool = False) -> tuple[Step, list[float | None]]:
        """The step with these ranks: of all sites together, and of each alone where that is asked for."""
        found, rate = self.found, self.rate
        predicted = rate * sum(s.decrease(rank) for s, rank in zip(found, ranks, strict=True))
        each: list[float | None] = [None] * len(found)
        if not self.measure:
            return Step(predicted, None), each
        rules = [replace(rule, dropout=0.0, init="zero") for rule in _rules(found, ranks)]
        with borrowed(self.model):
            apply(self.model, rules, self.inputs, name=_NAME, check=False)
            here = {(place.weight, place.adapter.rows): place.adapter for place in inventory(self.model).places}
            adapters = [here.get((s.row.name, s.row.rows)) for s in found]
            for n, adapter in enumerate(adapters):
                if alone and adapter is not None:
                    found[n].step(adapter, rate)
                    each[n] = self._decrease()
                    adapter.B.detach().zero_()
            for s, adapter in zip(found, adapters, strict=True):
                if adapter is not None:
                    s.step(adapter, rate)
            return Step(predicted, self._decrease()), each

    def _decrease(self) -> float:
        now = (_evaluated(self.model, batch, self.loss, n) for n, batch in enumerate(self.batches))
        return self.before - sum(now) / len(self.batches)
