"""An adapter out of two models:   W_tuned − W = D   →   B·A, the nearest of its rank

The plan has a row for each weight that differs, with θ in it, as if it came out of a file; what follows is `apply`.
D is taken in blocks of rows, in float64: see `lora_fx.deltas.nearest`.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from lora_fx.analysis.biases import Biases
from lora_fx.analysis.rules import Rule
from lora_fx.analysis.sites import Site, find_sites
from lora_fx.deltas.adapter import Adapter
from lora_fx.deltas.nearest import Approximation, Kept, Rows, nearest
from lora_fx.errors import PlanError, few
from lora_fx.graph.layout import Layout
from lora_fx.graph.places import is_shard
from lora_fx.graph.program import Program, Weight
from lora_fx.model.classes import unwired
from lora_fx.model.inventory import base_parameters, inventory, weight_name
from lora_fx.model.training import IGNORE, REFUSE
from lora_fx.passes.base import UNFOLDED, Facts, Pass, Result, given
from lora_fx.passes.planning import Plan, Row, plan_rows, read_program

FULL = "full"
_BLOCK = 2**21  # elements of D that are there at a time; a single row may have more


@dataclass(frozen=True)
class Extract(Pass):
    """Find the adapter that leads from the model to the tuned one; arguments as in `lora_fx.extract`."""

    tuned: nn.Module
    rank: int
    example_inputs: object = None
    adapter: str = "default"
    beside: str = REFUSE
    ignore: tuple[str, ...] = ()

    name = "extract"
    requires = (UNFOLDED,)
    ensures = (given(Program), given(Plan), given(Approximation))

    def call(self, model: nn.Module, facts: Facts) -> Result:
        self._refuse_options(model)
        with unwired(model), torch.no_grad():
            tensors = _same_architecture(model, self.tuned)
            program = read_program(model, self.example_inputs)
            changed, others = self._changed(program, tensors)
            left_out = self._left_out(model, tensors, others)
            wide = [*changed, *(weight for weight in others if weight.name not in left_out)]
            if not wide:
                reason = "no weight differs from the base's, but for what is left out"
                raise PlanError(reason, place=type(self.tuned).__name__, remedy="pass the base, and what it became")
            for weight in wide:
                _refuse_infinite(weight.name, weight.parameter, tensors[weight.name])
            found = [self._low_rank(w, sites, tensors[w.name]) for w, sites in changed.items()]
            found += [self._full(w, tensors[w.name]) for w in wide[len(changed) :]]
            rows, kept = zip(*found, strict=True)
            plan = plan_rows(program, tuple(row.rule for row in rows), self.adapter, rows)
        return Result(model, False, (program, plan, Approximation(self.adapter, kept, left_out)))

    def _refuse_options(self, model: nn.Module) -> None:
        whole = isinstance(self.rank, int) and not isinstance(self.rank, bool) and self.rank > 0
        here, names = inventory(model), (REFUSE, FULL, IGNORE)
        refusals = (
            (not whole, "rank", f"{self.rank!r} is no positive integer", "give one, such as 16"),
            (not self.adapter.isidentifier(), "name", f"{self.adapter!r} is no identifier", "use letters, digits, _"),
            (self.adapter in here.names, "name", f"it has an adapter named {self.adapter!r}", "give another name"),
            (self.beside not in names, "beside", f"{self.beside!r} is unknown", f"say one of {', '.join(names)}"),
            (not isinstance(self.tuned, nn.Module), "tuned", f"{type(self.tuned)} is no module", "pass two models"),
        )
        for wrong, place, reason, remedy in refusals:
            if wrong:
                raise PlanError(reason, place=place, remedy=remedy)
        if inventory(self.tuned).adapters:
            reason = "the tuned model has adapters: its weights are not what it computes with"
            raise PlanError(reason, place="tuned", remedy="lora_fx.fold(tuned, final=True) first, or save the adapters")

    def _changed(
        self, program: Program, tensors: dict[str, torch.Tensor]
    ) -> tuple[dict[Weight, list[Site]], list[Weight]]:
        """The weights that differ and multiply, with their sites; and the others that differ."""
        sites: dict[Weight, list[Site]] = {}
        for site in find_sites(program):
            if not site.weight.problem and min(site.weight.layout.size("i"), site.weight.layout.size("o")):
                sites.setdefault(site.weight, []).append(site)
        known = {name: weight for weight in program.weights for name in weight.names}
        named = {name: known.get(name, other) for name, other in Biases(program).named.items() if name in tensors}
        differ = [w for w in dict.fromkeys(named.values()) if _differs(w.names, w.parameter, tensors)]
        differ = [w for w in differ if not any(self._ignored(name) for name in w.names)]
        return {w: sites[w] for w in differ if w in sites}, [w for w in differ if w not in sites]

    def _ignored(self, name: str) -> bool:
        return any(fnmatch.fnmatch(name, pattern) for pattern in self.ignore)

    def _left_out(
        self, model: nn.Module, tensors: dict[str, torch.Tensor], others: Sequence[Weight]
    ) -> tuple[str, ...]:
        """What differs and is not held.

        Raises:
            PlanError: nobody has said that it may be left out.
        """
        differ = [name for name, tensor in _tensors(model).items() if not _equal(tensor, tensors[name])]
        ignored = [name for name in differ if self._ignored(name)]
        parameters = base_parameters(model)
        buffers = [name for name in differ if name not in ignored and name not in parameters]
        weights = [weight.name for weight in others]
        if self.beside != IGNORE and buffers:
            reason = f"{few(buffers, 5)} differ, which are buffers, and no adapter has any"
            raise PlanError(reason, place="tuned", remedy='copy them yourself, and say ignore=["*running*", …]')
        if self.beside == REFUSE and weights:
            reason = f"{few(weights, 5)} differ, and no matmul is seen of them: a delta of a rank is for matrices"
            remedy = 'keep them whole, beside="full"; or leave them as they are, ignore=["*norm*", …]'
            raise PlanError(reason, place="tuned", remedy=remedy)
        return tuple(dict.fromkeys([*ignored, *(weights + buffers if self.beside == IGNORE else ())]))

    def _low_rank(self, weight: Weight, sites: Sequence[Site], tuned: torch.Tensor) -> tuple[Row, Kept]:
        parameter, layout = weight.parameter, weight.layout
        dtype = parameter.dtype if parameter.dtype.itemsize >= 4 else torch.float32
        matrices = [*_changes(layout, parameter, tuned)]
        factors = [tuple(f.to(dtype) for f in nearest(matrix, self.rank)) for matrix in matrices]
        sizes = [matrix.measured(*own) for matrix, own in zip(matrices, factors, strict=True)]
        A, B = (torch.stack(own).view(*layout.batch, *own[0].shape) for own in zip(*factors, strict=True))
        role = ", ".join(dict.fromkeys(site.role for site in sites))
        row = _row(weight, Rule(where=weight.name, rank=A.shape[-2]), role, {"A": A, "B": B})
        total, rest = map(sum, zip(*sizes, strict=True))
        return row, Kept.of(weight.name, weight.shape, A.shape[-2], total, rest)

    def _full(self, weight: Weight, tuned: torch.Tensor) -> tuple[Row, Kept]:
        layout, parameter = weight.layout, weight.parameter
        total = sum(matrix.squared_norm for matrix in _changes(layout, parameter, tuned))
        theta = {"weight": layout.to_matrix(tuned.to(parameter.device))}
        row = _row(weight, Rule(where=weight.name, kind=FULL), "", theta)
        return row, Kept.of(weight.name, weight.shape, None, total, 0.0)


def _row(weight: Weight, rule: Rule, role: str, theta: dict[str, torch.Tensor]) -> Row:
    owners = tuple((path, attribute) for path, _, attribute in (name.rpartition(".") for name in weight.names))
    return Row(weight, rule, role, "", None, tuple(weight.uses), owners, False, stored=theta)


def _changes(layout: Layout, base: torch.Tensor, tuned: torch.Tensor) -> Iterator[Rows]:
    """D, one matrix for each of a batch."""
    rows, columns = layout.size("o"), layout.size("i")
    before = layout.to_matrix(base.detach()).reshape(-1, rows, columns)
    after = layout.to_matrix(tuned.detach()).reshape(-1, rows, columns)
    step = max(1, _BLOCK // max(columns, 1))
    for one, other in zip(before, after, strict=True):

        def blocks(one: torch.Tensor = one, other: torch.Tensor = other) -> Iterator[tuple[int, int, torch.Tensor]]:
            for start in range(0, rows, step):
                stop = min(start + step, rows)
                wide = other[start:stop].to(one.device, torch.float64)
                yield start, stop, wide - one[start:stop].to(torch.float64)

        yield Rows(rows, columns, blocks)


def _same_architecture(model: nn.Module, tuned: nn.Module) -> dict[str, torch.Tensor]:
    """What the tuned model has under each name of the base's parameters and buffers.

    Raises:
        PlanError: it has others; the first of them is named.
    """
    base, other = _tensors(model), _tensors(tuned)
    for name in dict.fromkeys([*base, *other]):
        if name not in base or name not in other:
            who = "the base" if name not in base else "the tuned model"
            raise _other(name, f"{who} has none of that name")
        if base[name].shape != other[name].shape:
            raise _other(name, f"its shape is {tuple(base[name].shape)}, and {tuple(other[name].shape)} in the other")
        if base[name].is_floating_point() != other[name].is_floating_point():
            raise _other(name, f"it is {base[name].dtype}, and {other[name].dtype} in the other")
        if any(t.is_meta or is_shard(t) for t in (base[name], other[name])):
            raise PlanError("it is on meta, or sharded", place=name, remedy="load both models whole first")
    return other


def _other(name: str, reason: str) -> PlanError:
    return PlanError(reason, place=name, remedy="pass two models of one architecture: the base, and what it became")


def _tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and buffers of the model's own, under each of their names."""
    own = [(path, m) for path, m in model.named_modules(remove_duplicate=False) if not isinstance(m, Adapter)]
    buffers = {weight_name(path, n): b for path, module in own for n, b in module._buffers.items() if b is not None}
    return {**base_parameters(model), **buffers}


def _equal(base: torch.Tensor, tuned: torch.Tensor) -> bool:
    """As numbers; NaN is none."""
    dtype = torch.promote_types(base.dtype, tuned.dtype)
    return torch.equal(base.detach().to(dtype), tuned.detach().to(base.device, dtype))


def _differs(names: Sequence[str], base: torch.Tensor, tensors: dict[str, torch.Tensor]) -> bool:
    """Raises where the names are one weight in the base, and several in the tuned model."""
    first = tensors[names[0]]
    for name in names[1:]:
        if not _equal(first, tensors[name]):
            raise _other(name, f"the base ties it to {names[0]}, and in the tuned model it has other numbers")
    return not _equal(base, first)


def _refuse_infinite(name: str, *tensors: torch.Tensor) -> None:
    for tensor in tensors:
        if not bool(tensor.detach().isfinite().all()):
            raise PlanError("it holds NaN or Inf, here or there", place=name, remedy="take another checkpoint")
