"""The plan: what the rules come to on this model, one row for each adapter. Making it changes nothing.

plan  =  Capture → Analyse → Select → Schedule
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx, nn

from lora_fx.analysis.biases import Biases
from lora_fx.analysis.patterns import find_pattern
from lora_fx.analysis.rules import SKIP, Rule, read_rules, select
from lora_fx.analysis.sites import Site, find_sites
from lora_fx.deltas import costs, schedules
from lora_fx.deltas.adapted_weight import has_product, schedulable, why_not_around
from lora_fx.deltas.kinds import Kind, Space, Theta, kind_named
from lora_fx.deltas.realisation import Realisation
from lora_fx.errors import PlanError, by_reason, few
from lora_fx.graph import layout
from lora_fx.graph.capture import refuse_unready
from lora_fx.graph.layout import Layout
from lora_fx.graph.nodes import shape_of
from lora_fx.graph.places import without_numbers
from lora_fx.graph.program import Program, Use, Weight, capture, find_weights
from lora_fx.model.classes import unwired
from lora_fx.model.inventory import Inventory, inventory
from lora_fx.model.marks import attribute_of
from lora_fx.passes.base import UNFOLDED, Facts, Pass, Result, given
from lora_fx.passes.blocks import Standing, find_standing
from lora_fx.passes.realising import Decider, is_dense
from lora_fx.tables import table


@dataclass(eq=False)
class Row:
    """One adapter to be."""

    weight: Weight
    rule: Rule
    role: str
    part: str
    """The role of the part, in the adapter's name; empty where the whole weight is adapted."""
    rows: tuple[int, ...] | None
    uses: tuple[Use, ...]
    owners: tuple[tuple[str, str], ...]
    """(path of the module, attribute): where the weight is read with the branch."""
    split: bool
    """Other uses of the same storage stay as they are; folding gives these uses a copy of their own."""
    reason: str = ""
    """Why a role is `other`."""
    realised: Realisation = Realisation.DISPATCH
    why: str = ""
    """Why it dispatches instead of being rewritten as a graph."""
    stored: Mapping[str, torch.Tensor] | None = None
    """θ, where it has numbers already, from a file: beside a weight on meta it lies on the CPU."""
    room: int | None = None
    """The ranks that there is to be room for, where they are more than its own."""
    schedule: str = ""
    """How its branches are computed on these inputs, in words: `lora_fx.deltas.schedules`."""
    axes: Layout | None = None
    """Of θ, where they are not those in which the weight multiplies: of its rows, of what multiplies nothing."""
    standing: Standing | None = None
    """Of a kind that stands behind blocks: which these are."""
    expected: float | None = None
    """What a training step of its uses is expected to take by that, of what the frozen weight's takes; None where it is
    not known: see `lora_fx.deltas.costs`."""

    @property
    def name(self) -> str:
        """The weight's name where it is read with the branch."""
        return ".".join(filter(None, self.owners[0]))

    @property
    def kind(self) -> Kind:
        return kind_named(self.rule.kind or "lora")

    @property
    def layout(self) -> Layout:
        """Every axis of a bias is one of features."""
        shape = self.weight.shape
        if self.axes is not None:
            return self.axes
        return Layout("o" * len(shape), shape) if self.kind.adapts == "bias" else self.weight.layout

    @property
    def rank(self) -> int | None:
        return self.rule.rank

    @property
    def chosen(self) -> dict[str, Any]:
        """The settings that are not the default: those of its rule, and what was found in the model."""
        return self.rule.chosen | ({} if self.standing is None else {"blocks": self.standing.setting})

    @property
    def space(self) -> Space:
        """What θ is for."""
        settings = Theta(**self.kind.complete(self.chosen))
        return Space(self.layout.batch, self.out, self.layout.size("i"), settings, self.room)

    @property
    def parameters(self) -> int:
        """Trainable parameters of this adapter, those too that it has in common with others."""
        shapes = self.kind.shapes(self.space).items()
        return sum(math.prod(shape) for tensor, shape in shapes if tensor not in self.kind.frozen)

    @property
    def in_common(self) -> Mapping[tuple[Any, ...], int]:
        """Tensors that all adapters of its name have in common (`Kind.shared`) → their parameters."""
        shapes = self.kind.shapes(self.space) if self.kind.shared else {}
        return {(self.kind.name, name, *shapes[name]): math.prod(shapes[name]) for name in self.kind.shared}

    @property
    def out(self) -> int:
        """How many output features it has: those of a part, or all."""
        return self.layout.size("o") if self.rows is None else len(self.rows)

    @property
    def why_branch(self) -> str:
        """Why its matmuls can only have the parallel branch; empty where they can be scheduled."""
        if not self.kind.low_rank:
            return f"{self.kind.name} is computed in one way only"
        forms = dict.fromkeys(u.form for u in self.uses if u.call is None or not schedulable(u.call)[0])
        return f"{', '.join(forms)} has no other form than the parallel branch" if forms else ""

    def why_not(self, schedule: str) -> str:
        """Why it cannot have this schedule; empty where it can."""
        if schedule == schedules.DENSE:
            return self.why_branch or self.why_not_dense
        if schedule == schedules.IN_PLACE and self.layout.batch:
            return self.why_branch or "it is for one matrix, and each expert has one"
        return self.why_branch if schedule in (schedules.FUSED, schedules.IN_PLACE) else ""

    @property
    def why_not_dense(self) -> str:
        dtype = self.weight.parameter.dtype
        if not schedules.loses_nothing(dtype):
            return f"W + s·B·A would be rounded to {dtype} in every forward"
        return f"dropout={self.rule.dropout} acts on the branch alone" if self.rule.dropout else ""

    @property
    def copied_bytes(self) -> int:
        """What splitting a tied storage costs when it is folded."""
        return self.weight.parameter.numel() * self.weight.parameter.element_size() if self.split else 0


@dataclass(eq=False)
class Plan:
    """Rows, totals and remarks. `print(plan)` shows them as a table."""

    program: Program
    rules: tuple[Rule, ...]
    name: str
    rows: tuple[Row, ...]
    sites: tuple[Site, ...]
    notes: tuple[str, ...] = field(default=())
    left_out: tuple[PlanError, ...] = field(default=())
    """Why each site is left out that a rule with ``otherwise="skip"`` decides and that cannot be adapted."""

    @property
    def parameters(self) -> int:
        """Trainable parameters: those that adapters have in common, once."""
        common = [row.in_common for row in self.rows]
        once = {tensor: count for own in common for tensor, count in own.items()}
        return sum(row.parameters for row in self.rows) - sum(sum(own.values()) for own in common) + sum(once.values())

    @property
    def model_parameters(self) -> int:
        return sum(p.numel() for p in self.program.model.parameters())

    @property
    def share(self) -> float:
        """Trainable parameters as a share of the base model's."""
        return self.parameters / max(self.model_parameters, 1)

    def __str__(self) -> str:
        header = (
            "weight", "role", "form", "shape", "kind", "rank", "trainable", "realised", "schedule", "expected", "folds",
            "shared storage",
        )  # fmt: skip
        reasons = list(dict.fromkeys(why for row in self.rows for why in (row.reason, row.why) if why))
        body = [self._cells(row, reasons) for row in self.rows]
        total = f"{len(self.rows)} adapters, {self.parameters:,} trainable parameters: "
        total += f"{self.share:.3%} of {self.model_parameters:,}"
        footnotes = [f"({n}) {why}" for n, why in enumerate(reasons, 1)]
        left_out = [f"Left out: {names}: {error.reason}" for names, error in by_reason(self.left_out)]
        return "\n".join([table(header, body, right=(5, 6)), *footnotes, total, *left_out, *self.notes])

    def _cells(self, row: Row, reasons: list[str]) -> tuple[str, ...]:
        part = f"[{len(row.rows)} rows]" if row.rows is not None else ""
        shared = " = ".join(row.weight.names) if len(row.weight.names) > 1 else ""
        if row.split:
            shared += "; split off"
        if row.split and row.kind.is_delta:
            shared += f", {row.copied_bytes / 2**20:.2f} MiB when folded"
        realised = f"{row.realised} ({reasons.index(row.why) + 1})" if row.why else row.realised
        role = f"{row.role} ({reasons.index(row.reason) + 1})" if row.reason else row.role
        forms = ", ".join(dict.fromkeys(use.form for use in row.uses))
        return (
            row.name + part, role or "?", forms, "×".join(map(str, row.weight.shape)), row.kind.name,
            str(row.rank or "–"), f"{row.parameters:,}", realised, row.schedule,
            f"{row.expected:.2f} ×" if row.expected else "", row.kind.folds, shared,
        )  # fmt: skip


# ── the passes ───────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Capture(Pass):
    """Run the model once on example inputs, and read its program.

    Args:
        example_inputs: a tensor, a tuple of positional or a dict of keyword inputs. Without them the model is asked for
            its own (`dummy_inputs`); of one that has none only module types and parameters are known.
    """

    example_inputs: Any = None

    name = "capture"
    requires = (UNFOLDED,)
    ensures = (given(Program),)

    def call(self, model: nn.Module, facts: Facts) -> Result:
        with unwired(model):
            return Result(model, False, (read_program(model, self.example_inputs),))


@dataclass(frozen=True)
class Sites:
    """What a rule can adapt, in the order of the model's parameters."""

    found: tuple[Site, ...]

    def __str__(self) -> str:
        return "\n".join(f"{site.weight.name}  {site.form}  {site.role or 'role unknown'}" for site in self.found)


@dataclass(frozen=True)
class Analyse(Pass):
    """Read off the program what each weight does: its sites, with their roles."""

    name = "analyse"
    requires = (given(Program),)
    ensures = (given(Sites),)

    def call(self, model: nn.Module, facts: Facts) -> Result:
        with unwired(model):
            return Result(model, False, (Sites(find_sites(facts[Program])),))


@dataclass(frozen=True)
class Select(Pass):
    """Decide by the rules which sites get what, and how each is realised.

    Args:
        rules: see `lora_fx.Rule`; also dicts, a sequence of those, or the path of a TOML file.
        adapter: the adapter's name.
    """

    rules: Any
    adapter: str = "default"

    name = "select"
    requires = (given(Program), given(Sites))
    ensures = (given(Plan),)

    def call(self, model: nn.Module, facts: Facts) -> Result:
        if not self.adapter.isidentifier():
            raise PlanError(
                f"{self.adapter!r} is no identifier",
                place="name",
                remedy="name the adapter with letters, digits and _",
            )
        program, sites, rules = facts[Program], facts[Sites].found, read_rules(self.rules)
        with unwired(model):
            patterns = {
                rule: frozenset(_pattern_weights(program, rule)) for rule in rules if rule.pattern and program.capture
            }
            chosen = select(rules, sites, patterns, seen=program.capture is not None)
            refused = Refused()
            rows = [row for row in _rows(program, sites, chosen, refused) if refused.allows(row.rule, _check_rank, row)]
            found = plan_rows(program, rules, self.adapter, rows, sites, refused)
        return Result(model, False, (found,))


@dataclass(frozen=True)
class Schedule(Pass):
    """Decide in which order the branches of each row are computed; see `lora_fx.deltas.schedules`."""

    name = "schedule"
    requires = (given(Plan),)
    ensures = (given(Plan),)

    def call(self, model: nn.Module, facts: Facts) -> Result:
        plan, refused = facts[Plan], Refused()
        plan.rows = tuple(row for row in plan.rows if refused.allows(row.rule, _check_schedule, row))
        plan.left_out += refused.left_out(plan.rows)
        for row in plan.rows:
            row.schedule = _schedule(row)
            row.expected = _expected(row)
        return Result(model, False, (plan,))


def _check_schedule(row: Row) -> None:
    if why := row.why_not(row.rule.schedule):
        raise PlanError(
            f"schedule={row.rule.schedule!r}: {why}",
            place=row.weight.name,
            remedy="leave the schedule out: auto takes what fits",
        )


def _schedule(row: Row) -> str:
    beside = row.kind.branch is not None and all(_has_product(use, row.kind) for use in row.uses)
    if order := row.kind.order(beside):
        return order
    if row.why_branch:
        return schedules.BRANCH
    if row.rule.schedule != schedules.AUTO or not _tokens(row):
        return row.rule.schedule
    able = [name for name in (schedules.IN_PLACE, schedules.FUSED, schedules.DENSE) if not row.why_not(name)]
    tokens = _tokens(row)[0]
    if schedules.IN_PLACE in able and tokens * row.layout.size("i") <= schedules.TINY:
        return schedules.IN_PLACE
    if row.rows is not None:  # autograd copies around a part
        able = [name for name in able if name != schedules.IN_PLACE]
    return costs.cheapest(able, _matmul(row), tokens, costs.device_class(row.weight.parameter.device))


def _expected(row: Row) -> float | None:
    known = row.schedule in schedules.SCHEDULES and row.schedule != schedules.AUTO and not row.why_branch
    device = costs.device_class(row.weight.parameter.device)
    own, plain = (
        sum(costs.expected(name, _matmul(row), tokens, device) for tokens in _tokens(row) if known)
        for name in (row.schedule, "plain")
    )
    return own / plain if plain else None


def _matmul(row: Row) -> costs.Matmul:
    dtype = row.weight.parameter.dtype
    inputs, outputs = row.weight.shape[-2:]  # which is which does not matter
    return costs.Matmul(
        inputs, outputs, row.kind.width * (row.rank or 0), dtype.itemsize, cast=not schedules.loses_nothing(dtype)
    )


def _tokens(row: Row) -> list[int]:
    """Of each use that the example inputs have shown."""
    shapes = [shape_of(use.call.x) for use in row.uses if use.call is not None and isinstance(use.call.x, fx.Node)]
    return [math.prod(shape[1 if row.layout.batch else 0 : -1]) for shape in shapes if shape]


# ── rows ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


NOTHING_LEFT = "leave the rule out: it skips what cannot be adapted, and nothing else is left of it"


class Refused:
    """What turned out to be impossible on the way to a plan, and whose rules leave it out.

    All of it is looked at before the plan is refused, so that one message names everything.
    """

    def __init__(self) -> None:
        self._errors: dict[PlanError, Rule] = {}

    @contextmanager
    def under(self, rule: Rule) -> Iterator[None]:
        """A refusal of what is done inside is noted."""
        try:
            yield
        except PlanError as error:
            self._errors[error] = rule

    def allows(self, rule: Rule, check: Callable[..., None], *arguments: Any) -> bool:
        """Whether the check, called with these arguments, raises nothing."""
        before = len(self._errors)
        with self.under(rule):
            check(*arguments)
        return len(self._errors) == before

    def left_out(self, rows: Sequence[Row]) -> tuple[PlanError, ...]:
        """Why each of them is left out, where these rows are what is left.

        Raises:
            PlanError: not everything may be left out, or nothing is left of a rule.
        """
        left = {row.rule for row in rows}
        refusals = [error for error, rule in self._errors.items() if rule.otherwise != SKIP or rule not in left]
        if refusals:
            skipped = all(self._errors[error].otherwise == SKIP for error in refusals)
            raise PlanError.of(refusals, *[f"mend one of them; or {NOTHING_LEFT}"] * skipped)
        return tuple(self._errors)


def plan_rows(
    program: Program,
    rules: tuple[Rule, ...],
    name: str,
    rows: Sequence[Row],
    sites: tuple[Site, ...] = (),
    refused: Refused | None = None,
) -> Plan:
    """The plan of these rows: each is checked, and it is decided how each is realised.

    Args:
        refused: what was refused before; everything that cannot be adapted is refused together.

    Raises:
        PlanError: rows cannot be adapted, and their rules do not leave them out.
    """
    here, refused = inventory(program.model), refused or Refused()
    rows = [row for row in rows if refused.allows(row.rule, _check, row, program.model, name, here)]
    if not all(row.kind.is_delta for row in rows):
        biases = Biases(program)
        rows = [row for row in rows if refused.allows(row.rule, _check_around, row, biases)]
        rows = [row for row in rows if refused.allows(row.rule, _stand, row, program)]
    left_out = refused.left_out(rows)
    _realise(rows, program)
    return Plan(program, rules, name, tuple(rows), sites, _notes(program, rows), left_out)


def read_program(model: nn.Module, example_inputs: Any) -> Program:
    """The program on these inputs; of a model that has none, its weights alone."""
    if example_inputs is None and getattr(model, "dummy_inputs", None) is None:
        refuse_unready(model)
        return Program(model, None, tuple(dict.fromkeys(find_weights(model).values())))
    return capture(model, example_inputs)


def _realise(rows: Sequence[Row], program: Program) -> None:
    """All adapters of one weight are read in one way: by graph, where that is sound for each of them."""
    decider = Decider(program)
    reasons: dict[Weight, str] = {}
    for row in rows:
        row.why = decider.why_dispatch(row.weight, (path for path, _ in row.owners), row.kind)
        reasons[row.weight] = reasons.get(row.weight) or row.why
    for row in rows:
        row.why = row.why or reasons[row.weight]
        row.realised = Realisation.DISPATCH if row.why else Realisation.GRAPH


def _pattern_weights(program: Program, rule: Rule) -> list[int]:
    assert rule.pattern is not None
    found = find_pattern(program, rule.pattern, rule.label)
    wanted = None if rule.adapt is None else {name.strip() for name in rule.adapt.split("|")}
    named = {name for bound in found for name in bound}
    if wanted is not None and found and not wanted <= named:
        raise rule._error(
            f"adapt={rule.adapt!r} names no weight of the pattern", f"its weights are {', '.join(sorted(named))}"
        )
    return [id(w) for bound in found for name, w in bound.items() if wanted is None or name in wanted]


def _rows(program: Program, sites: Sequence[Site], chosen: dict[Site, Rule], refused: Refused) -> list[Row]:
    """Sites of one weight under one rule become one row, unless the rule asks for parts by their role."""
    groups: dict[tuple[Weight, Rule, Any], list[Site]] = {}
    for site in sites:
        rule = chosen.get(site)
        if rule is None or rule.excludes:
            continue
        own = (site.rows, site.role) if rule.role is not None and site.rows is not None else None
        groups.setdefault((site.weight, rule, own), []).append(site)
    rows = []
    for (_, rule, _), group in groups.items():
        weight = group[0].weight
        uses = tuple(dict.fromkeys(use for site in group for use in site.uses))
        covered = (
            None if any(s.rows is None for s in group) else tuple(sorted({r for s in group for r in s.rows or ()}))
        )
        if covered is not None and len(covered) == weight.layout.size("o"):
            covered = None
        role = ", ".join(dict.fromkeys(site.role for site in group))
        part = "_".join(dict.fromkeys(s.role.rpartition(".")[2] for s in group)) if covered is not None else ""
        reason = "; ".join(dict.fromkeys(site.reason for site in group if site.reason))
        with refused.under(rule):
            owners, split = _owners(weight, covered, uses, rule)
            rows.append(Row(weight, rule, role, part, covered, uses, owners, split, reason))
    return _on_biases(rows, program, refused) if any(row.kind.adapts == "bias" for row in rows) else rows


def _on_biases(rows: Sequence[Row], program: Program, refused: Refused) -> list[Row]:
    """Those of a kind that adapts biases become rows for these: one for each, whichever weights it belongs to."""
    biases, found = Biases(program), dict[Any, Row]()
    for row in rows:
        if row.kind.adapts != "bias":
            found[row] = row
            continue
        with refused.under(row.rule):
            bias = _bias_of(row, biases)
            owners = tuple((path, attribute) for path, _, attribute in (name.rpartition(".") for name in bias.names))
            key = bias, row.rule, row.rows
            uses = (*found[key].uses, *row.uses) if key in found else row.uses
            found[key] = replace(row, weight=bias, uses=uses, owners=owners, split=False)
    return [row for row in found.values() if refused.allows(row.rule, _check_readers, row)]


def _check_readers(row: Row) -> None:
    others = [use for use in row.weight.uses if use not in row.uses] if row.kind.adapts == "bias" else []
    if others:
        raise PlanError(
            f"{row.rule.label} adapts {len(row.uses)} of the uses of this bias, and {others[0].form} in "
            f"{others[0].module or 'the model'} reads it too",
            place=row.weight.name,
            remedy="match that one as well, or give the use a bias of its own",
        )


def _bias_of(row: Row, biases: Biases) -> Weight:
    """The bias of what the row was planned for."""
    bias, *rest = dict.fromkeys(biases.of(use) for use in row.uses)
    if bias is None or rest:
        raise PlanError(
            f"the kind {row.kind.name!r} adapts a bias, and the weight has {'several' if rest else 'none'}",
            place=row.weight.name,
            remedy="leave it out with a rule before, without a rank, or adapt the weight: kind='full'",
        )
    features = row.weight.layout.size("o")
    if row.rows is not None and bias.parameter.numel() != features:
        raise PlanError(
            f"its bias has {bias.parameter.numel()} elements for {features} features: no part of it is {row.role}",
            place=bias.name,
            remedy="adapt all of it: select by `where`",
        )
    return bias


def _owners(weight: Weight, rows: Any, uses: tuple[Use, ...], rule: Rule) -> tuple[tuple[tuple[str, str], ...], bool]:
    """Where the weight must be read with the branch: everywhere, or only where the chosen uses read it."""
    owners = tuple((name.rpartition(".")[0], name.rpartition(".")[2]) for name in weight.names)
    others = [u for u in weight.uses if u not in uses and _reads_rows(u, rows)]
    if not any(u.multiplies for u in others):  # whoever else reads the weight, a penalty on it say, reads the sum
        return owners, False
    inside = tuple(o for o in owners if o[0] in {u.module for u in uses})
    reads_inside = {o[0] for o in inside}
    clean = all(u.module in reads_inside for u in uses) and not any(u.module in reads_inside for u in others)
    if not clean or not inside or any(u.module not in {o[0] for o in owners} for u in others):
        raise PlanError(
            f"{rule.label} adapts {len(uses)} of its {len(weight.uses)} uses, and the others "
            f"({', '.join(sorted({u.form for u in others}))}) read the same attribute",
            place=weight.name,
            remedy="adapt all its uses (select by `where`), or give the use a parameter of its own",
        )
    return inside, True


def _has_product(use: Use, kind: Kind) -> bool:
    placed = None if use.call is None else layout.place(use.weight.layout, use.view, use.call.sides)
    return use.call is not None and placed is not None and has_product(kind, use.call, placed)


def _reads_rows(use: Use, rows: tuple[int, ...] | None) -> bool:
    if rows is None or use.call is None:
        return True
    placement = layout.place(use.weight.layout, use.view, use.call.sides)
    return placement is None or placement.swapped or bool(set(placement.rows()) & set(rows))


def _check_rank(row: Row) -> None:
    if row.rank is None or row.weight.problem:
        return
    most, what = row.kind.widest(row.space)
    if row.rank > most:
        raise PlanError(
            f"rank={row.rank} is more than {what}",
            place=row.weight.name,
            remedy=f"choose a rank of at most {most}",
        )


def _check_around(row: Row, biases: Biases) -> None:
    """A kind that rewrites the result of a use wants all of that: every feature, with its bias, wherever it is used."""
    if not row.kind.is_delta and (why := _why_not_around(row, row.kind, biases)):
        raise PlanError(
            f"the kind {row.kind.name!r} rewrites what a use of the weight gives, and {why}",
            place=row.weight.name,
            remedy="leave the weight out, or adapt it by a kind that is a delta of it: lora, dora, full",
        )


def _stand(row: Row, program: Program) -> None:
    """Find the blocks, for a kind that stands behind them."""
    if row.kind.behind is not None:
        wanted = row.rule.chosen.get("blocks")
        row.standing = find_standing(program, row.weight, row.owners, wanted, row.out)


def _why_not_around(row: Row, kind: Kind, biases: Biases) -> str:
    if row.rows is not None:
        return f"the rule, or the model, asks for {len(row.rows)} of its {row.layout.size('o')} features alone"
    here = {path for path, _ in row.owners}
    for use in row.weight.uses:
        if use not in row.uses and not (row.split and use.module not in here):
            return f"{use.form} in {use.module or 'the model'} reads it besides"
    for use in row.uses:
        if use.call is None:
            return f"{use.form} takes it whole: what it multiplies inside nobody sees"
        if why := kind.asks(use.form, row.space):
            return why
        if why := why_not_around(use.call, layout.place(row.layout, use.view, use.call.sides)):
            return f"{use.form} in {use.module or 'the model'} {why}"
        bias = biases.of(use) if use.seen else None
        if bias is not None and use.call.options.get("bias") is None:
            return f"its bias {bias.name} is added by an op of its own, behind what would be rewritten"
    return ""


def _is_finite(weight: torch.Tensor) -> bool:
    """Its extremes tell, NaN being both: found in one pass, without a tensor of truths as large as the weight."""
    return all(bool(extreme.isfinite()) for extreme in torch.aminmax(weight))


def _check(row: Row, model: nn.Module, name: str, here: Inventory) -> None:
    weight, rule = row.weight, row.rule
    if weight.problem:
        leave = "leave it out: a rule without a rank before, or otherwise='skip' in this one"
        if rule.otherwise == SKIP:  # which comes out only where nothing else is left
            leave = NOTHING_LEFT
        raise PlanError(
            f"the weight {weight.problem}",
            place=weight.name,
            remedy="; or ".join(filter(None, (weight.remedy, leave))),
        )
    whole = [u.form for u in row.uses if is_dense(u) or not (row.kind.low_rank or _has_product(u, row.kind))]
    if rule.dropout and whole:
        raise PlanError(
            f"dropout={rule.dropout} on a weight that {', '.join(whole)} reads whole: there is no branch input to drop",
            place=weight.name,
            remedy="set dropout=0 in the rule for this weight",
        )
    if not bool(weight.parameter.is_meta) and not _is_finite(weight.parameter.detach()):
        raise PlanError(
            "the weight holds NaN or Inf", place=weight.name, remedy="repair the checkpoint, or exclude the weight"
        )
    for path, attribute in row.owners:
        for child, adapter in here.of(model.get_submodule(path)).items():
            same = attribute_of(child) == attribute and adapter.name == name
            if same and (adapter.rows is None or row.rows is None or set(adapter.rows) & set(row.rows)):
                raise PlanError(
                    f"it already has an adapter named {name!r}",
                    place=weight.name,
                    remedy=f"pass another name to apply, or lora_fx.remove(model, {name!r}) first",
                )


def _notes(program: Program, rows: Sequence[Row]) -> tuple[str, ...]:
    if program.capture is None:
        return (
            "Without example inputs nothing was captured: roles are unknown, and the adapted model is not checked.",
        )
    notes = []
    if any(row.weight.parameter.is_meta for row in rows) and without_numbers(program.model):
        notes.append("On meta tensors the adapted model is not checked: lora_fx.verify it once it is materialised.")
    if program.unseen:
        notes.append(f"Unseen by the example inputs: {few([w.name for w in program.unseen], 5)}")
    return tuple(notes)
