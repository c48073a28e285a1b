"""A new adapter out of others:   δ_c = Σ wᵢ·δᵢ,   of factors   B_c = [… wᵢ·sᵢ·Bᵢ …],   A_c = [… Aᵢ …],   scale 1

or the nearest of a rank to that sum, or to what TIES and DARE make of the deltas: see `lora_fx.deltas.merging`. One
weight at a time, in float64, and rounded to the dtype of θ at the end. The new adapter stands where the others stand,
and does not act yet.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, reduce
from numbers import Real

import torch
from torch import nn

from lora_fx.deltas import merging
from lora_fx.deltas.adapter import Adapter
from lora_fx.deltas.nearest import Approximation, Factors, Kept, Rows, nearest, squared_norm, truncated
from lora_fx.errors import AdapterError
from lora_fx.graph.places import is_shard
from lora_fx.graph.program import storage_key
from lora_fx.model.inventory import Inventory, Place, inventory
from lora_fx.model.marks import attach, child_name
from lora_fx.passes.base import UNFOLDED, Facts, Pass, Result, given

EXACT, SVD, TIES, DARE = "exact", "svd", "ties", "dare"
METHODS = (EXACT, SVD, TIES, DARE)


@dataclass(frozen=True)
class Combine(Pass):
    """Put an adapter beside each weight that one of these adapts; arguments as in `lora_fx.combine`."""

    strengths: Mapping[str, float]
    adapter: str
    method: str = EXACT
    rank: int | None = None
    density: float | None = None
    seed: int = 0

    name = "combine"
    requires = (UNFOLDED,)
    ensures = (given(Approximation),)

    def call(self, model: nn.Module, facts: Facts) -> Result:
        here = inventory(model)
        self._refuse_options(here)
        spots = _spots(here, {name: float(w) for name, w in self.strengths.items() if w})
        generator = torch.Generator().manual_seed(self.seed)
        with torch.no_grad():
            made = [(spot, *spot.combined(self, generator)) for spot in spots]
        for spot, adapter, _ in made:
            for n, place in enumerate(spot.places):
                attach(place.owner, child_name(place.attribute, self.adapter, spot.part), adapter, register=n == 0)
        return Result(model, True, (Approximation(self.adapter, tuple(kept for *_, kept in made)),))

    def _refuse_options(self, here: Inventory) -> None:
        if not isinstance(self.strengths, Mapping) or not self.strengths:
            _refuse("adapters", f"{self.strengths!r} names none", 'give each its weight: {"a": 0.7, "b": 0.3}')
        here.require(self.strengths)
        for name, w in self.strengths.items():
            if isinstance(w, bool) or not isinstance(w, Real) or not math.isfinite(w):
                _refuse(f"the weight of {name!r}", f"{w!r} is no finite number", "give one, such as 0.5")
        if not any(self.strengths.values()):
            _refuse("adapters", "every weight is 0", "give one of them another")
        if not isinstance(self.adapter, str) or not self.adapter.isidentifier():
            _refuse("name", f"{self.adapter!r} is no identifier", "name it with letters, digits and _")
        if self.adapter in here.names:
            _refuse("name", f"the model has an adapter named {self.adapter!r}", "give another name, or remove that one")
        if self.method not in METHODS:
            _refuse("method", f"{self.method!r} is unknown", f"say one of {', '.join(map(repr, METHODS))}")
        if self.rank is not None and self.method == EXACT:
            _refuse("rank", f"{self.rank!r}, and an exact sum has the ranks of all together", 'say method="svd"')
        whole = isinstance(self.rank, int) and not isinstance(self.rank, bool)
        if self.rank is not None and not (whole and self.rank > 0):
            _refuse("rank", f"{self.rank!r} is no positive integer", "give one, such as 16")
        if self.density is not None and self.method not in (TIES, DARE):
            _refuse("density", f"{self.density!r}, and {self.method!r} drops nothing", "leave it out")
        if self.method in (TIES, DARE) and not (isinstance(self.density, Real) and 0 < self.density <= 1):
            reason = f"{self.density!r} is no share of the elements that {self.method!r} keeps"
            _refuse("density", reason, "give a number above 0, up to 1, such as 0.5")
        if isinstance(self.seed, bool) or not isinstance(self.seed, int):
            _refuse("seed", f"{self.seed!r} is no integer", "give one")

    def merged(
        self, deltas: Sequence[torch.Tensor], strengths: Sequence[float], generator: torch.Generator
    ) -> torch.Tensor:
        """What the method makes of the deltas."""
        if self.method == TIES:
            return merging.ties(deltas, strengths, self.density or 1.0)
        if self.method == DARE:
            return merging.dare(deltas, strengths, self.density or 1.0, generator)
        return merging.summed(deltas, strengths)


def _refuse(place: str, reason: str, remedy: str) -> None:
    raise AdapterError(reason, place=place, remedy=remedy)


@dataclass(frozen=True)
class _Spot:
    """A weight, or a part of one, as the same owners read it with the same of these adapters."""

    places: tuple[Place, ...]
    """One for each owner."""
    terms: Mapping[Adapter, float]
    rows: tuple[int, ...] | None
    """The output features that some of the adapters adapt; None for all."""
    part: str

    @property
    def weight(self) -> str:
        return self.places[0].weight

    @cached_property
    def first(self) -> Adapter:
        return next(iter(self.terms))

    @property
    def kind(self) -> str:
        """What can say the sum: factors where all have some, a shift of biases, else the weight as a whole."""
        kinds = [adapter.kind for adapter in self.terms]
        if all(kind.low_rank for kind in kinds):
            return "lora"
        if odd := sorted(kind.name for kind in kinds if not kind.low_rank and kind.name not in ("full", "bias")):
            reason = f"{odd[0]!r} is a kind whose δ is no product of factors, and not of `full` or `bias`"
            _refuse(self.weight, reason, "fold it into a copy of the model, and lora_fx.extract an adapter from that")
        return "bias" if {kind.name for kind in kinds} == {"bias"} else "full"

    def combined(self, how: Combine, generator: torch.Generator) -> tuple[Adapter, Kept]:
        """The adapter, and what it holds of what it stands for."""
        self._refuse_numbers()
        dtype = reduce(torch.promote_types, (adapter.dtype for adapter in self.terms))
        if self.kind != "lora":
            return self._dense(how, generator, dtype)
        if how.method in (EXACT, SVD):
            A, B = self._concatenated()
            given = squared_norm(A, B)
            if how.method == EXACT:
                adapter = self._low_rank(how.adapter, A.to(dtype), B.to(dtype))
                return adapter, self._kept(adapter, given, 0.0)
            adapter = self._low_rank(how.adapter, *(f.to(dtype) for f in truncated(A, B, self._rank(how))))
            rest = squared_norm(torch.cat([A, adapter.A.to(A)], -2), torch.cat([B, -adapter.B.to(B)], -1))
            return adapter, self._kept(adapter, given, rest)
        whole = how.merged([self._delta(a) for a in self.terms], [*self.terms.values()], generator)
        matrices = [Rows.of(matrix) for matrix in whole.reshape(-1, *whole.shape[-2:])]
        factors = [nearest(matrix, self._rank(how)) for matrix in matrices]
        A, B = (torch.stack(own).to(dtype).view(*whole.shape[:-2], *own[0].shape) for own in zip(*factors, strict=True))
        adapter = self._low_rank(how.adapter, A, B)
        own = [factor.reshape(-1, *factor.shape[-2:]) for factor in (A, B)]
        sizes = [m.measured(a, b) for m, a, b in zip(matrices, *own, strict=True)]
        total, rest = map(sum, zip(*sizes, strict=True))
        return adapter, self._kept(adapter, total, rest)

    def _rank(self, how: Combine) -> int:
        """Within what there is: PEFT's default is the largest too."""
        rank = max(adapter.kind.width * adapter.rank for adapter in self.terms) if how.rank is None else how.rank
        out = self.first.layout.size("o") if self.rows is None else len(self.rows)
        return min(rank, out, self.first.layout.size("i"))

    def _kept(self, adapter: Adapter, total: float, rest: float) -> Kept:
        rank = adapter.rank if adapter.kind.low_rank else None
        return Kept.of(self.weight, adapter.layout.shape, rank, total, rest)

    def _adapter(self, name: str, **settings: object) -> Adapter:
        first = self.first
        adapter = Adapter(
            first.layout, rows=self.rows, name=name, role=first.role, device=first.device, **settings  # type: ignore[arg-type]
        )  # fmt: skip
        adapter.change(realised=first.realised, read_outside=first.read_outside)
        adapter.train(self.places[0].owner.training)
        return adapter

    def _low_rank(self, name: str, A: torch.Tensor, B: torch.Tensor) -> Adapter:
        return self._filled(self._adapter(name, dtype=A.dtype, rank=A.shape[-2]), A=A, B=B)

    def _filled(self, adapter: Adapter, **theta: torch.Tensor) -> Adapter:
        for tensor, numbers in theta.items():
            adapter.get_parameter(tensor).copy_(numbers)
            if not bool(adapter.get_parameter(tensor).isfinite().all()):
                _refuse(self.weight, f"the sum does not fit into {adapter.dtype}", "give the adapters smaller weights")
        adapter.act(False)
        return adapter

    def _dense(self, how: Combine, generator: torch.Generator, dtype: torch.dtype) -> tuple[Adapter, Kept]:
        """Of what is no product of factors: θ is the weight with the change in it, or the change of a bias."""
        kind = self.kind
        adapter = self._adapter(how.adapter, dtype=dtype, kind=kind)
        own = how.merged([self._delta(a) for a in self.terms], [*self.terms.values()], generator)
        total = float(own.square().sum())
        if kind == "bias":
            return self._filled(adapter, shift=own.to(dtype)), self._kept(adapter, total, 0.0)
        theta = (adapter._part(self._weight) + own).to(dtype)
        return self._filled(adapter, weight=theta), self._kept(adapter, total, 0.0)

    @cached_property
    def _weight(self) -> torch.Tensor:
        """What a delta that depends on W is taken from, in float64."""
        return self.places[0].parameter.detach().to(self.first.device, torch.float64)

    def _concatenated(self) -> Factors:
        """A and B of the sum, its scales in B, in float64."""
        own = [(w * a.scale, a.fitting().exact()) for a, w in self.terms.items()]
        device = self.first.device
        A = [low.A.detach().to(device, torch.float64) for _, low in own]
        B = [
            w * self._placed(a, low.B.detach().to(device, torch.float64))
            for (w, low), a in zip(own, self.terms, strict=True)
        ]
        return torch.cat(A, -2), torch.cat(B, -1)

    def _delta(self, adapter: Adapter) -> torch.Tensor:
        """δ over the rows of the spot, (batch…, rows, in), in float64."""
        if adapter.kind.low_rank:
            low, device = adapter.fitting().exact(), self.first.device
            A, B = (factor.detach().to(device, torch.float64) for factor in (low.A, low.B))
            return adapter.scale * self._placed(adapter, B @ A)
        assert adapter.kind.delta is not None
        wide = {n: p.detach().to(self.first.device, torch.float64) for n, p in adapter.named_parameters()}
        return self._placed(adapter, adapter.kind.delta(adapter._part(self._weight), adapter.theta_of(wide)))

    def _placed(self, adapter: Adapter, own: torch.Tensor) -> torch.Tensor:
        """(batch…, rows of the adapter, n) with zeros for the other rows of the spot."""
        if adapter.rows == self.rows:
            return own
        rows = range(adapter.layout.size("o")) if self.rows is None else self.rows
        at = {row: n for n, row in enumerate(rows)}
        index = torch.tensor([at[row] for row in adapter.rows or ()], device=own.device)
        return own.new_zeros(*own.shape[:-2], len(at), own.shape[-1]).index_copy(-2, index, own)

    def _refuse_numbers(self) -> None:
        for adapter in self.terms:
            if adapter.layout != self.first.layout:
                here, there = self.first.layout.sides, adapter.layout.sides
                reason = f"the adapter {adapter.name!r} reads its axes as {there!r}, {self.first.name!r} as {here!r}"
                _refuse(self.weight, f"{reason} (o: out, i: in, b: batch)", "combine them without one of these")
            for label, tensor in adapter.named_parameters():
                where = f"{self.weight}, {label} of adapter {adapter.name!r}"
                if tensor.is_meta or is_shard(tensor):
                    _refuse(where, "it is on meta, or sharded, and its numbers are not here", "load them first")
                if not bool(tensor.isfinite().all()):
                    _refuse(where, "it holds NaN or Inf", "load an earlier checkpoint of the adapter")
        parameter = self.places[0].parameter
        if self.kind == "full" and (parameter.is_meta or is_shard(parameter)):
            _refuse(self.weight, "the weight is on meta, or sharded, and a sum is taken from it", "load it first")


def _spots(here: Inventory, strengths: Mapping[str, float]) -> list[_Spot]:
    """Where these adapters stand, each place once."""
    by_storage: dict[tuple, dict[tuple[nn.Module, str], list[Place]]] = {}
    for place in here.places:
        if place.adapter.name in strengths:
            owners = by_storage.setdefault(storage_key(place.parameter), {})
            owners.setdefault((place.owner, place.attribute), []).append(place)
    spots = []
    for owners in by_storage.values():
        alike: dict[tuple[Adapter, ...], list[list[Place]]] = {}
        for places in owners.values():
            alike.setdefault(tuple(place.adapter for place in places), []).append(places)
        for group in alike.values():
            spots += _by_rows(group, strengths)
    return spots


def _by_rows(owners: Sequence[Sequence[Place]], strengths: Mapping[str, float]) -> list[_Spot]:
    """Parts of a weight apart, where they are; together where they overlap, or one name would stand for two."""
    parts: dict[tuple[int, ...] | None, list[int]] = {}
    for n, place in enumerate(owners[0]):
        parts.setdefault(place.adapter.rows, []).append(n)
    spots = [_spot([[own[n] for n in found] for own in owners], rows, strengths) for rows, found in parts.items()]
    sets = [set(rows or ()) for rows in parts]
    overlap = None in parts or any(one & two for one, two in itertools.combinations(sets, 2))
    if len(parts) == 1 or not (overlap or len({spot.part for spot in spots}) < len(spots)):
        return spots
    every = None if None in parts else tuple(sorted(set().union(*sets)))
    whole = _spot(owners, every, strengths)
    return [replace(whole, part="" if every is None else "_".join(filter(None, (spot.part for spot in spots))))]


def _spot(
    owners: Sequence[Sequence[Place]], rows: tuple[int, ...] | None, strengths: Mapping[str, float]
) -> _Spot:  # fmt: skip
    order = [*strengths]
    places = sorted(owners[0], key=lambda place: order.index(place.adapter.name))
    terms = {place.adapter: strengths[place.adapter.name] for place in places}
    return _Spot(tuple(own[0] for own in owners), terms, rows, owners[0][0].part)
