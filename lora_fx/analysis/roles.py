"""Roles: what each use of a weight does, read off the dataflow alone; no model, module or parameter name is looked at.

    query, key, value  reach an operand of softmax(q·kᵀ)·v or a fused attention; attention.output is fed by its result
    gate, up           reach  f(gate) * up  or  f(up), with f a nonlinearity; mlp.down is fed by that
    router             reaches a top-k; lm_head reaches the model's output, with no use and no product after it

`dataflow` walks over the graph; where a fused weight has several roles, `feature_split` tells which of its output
features have which. What cannot be told for certain is `other`, with the reason.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from typing import Any

from torch import fx

from lora_fx.analysis.dataflow import CORE, FIRST_USE, MIX, Fact, Flow, multiplies_plainly, union
from lora_fx.analysis.feature_split import Target, Undecided
from lora_fx.graph.forms import FORMS
from lora_fx.graph.layout import place
from lora_fx.graph.program import Program, Use

QUERY, KEY, VALUE, OUTPUT = "attention.query", "attention.key", "attention.value", "attention.output"
UP, GATE, DOWN = "mlp.up", "mlp.gate", "mlp.down"
ROUTER, EMBEDDING, LM_HEAD, CONV, OTHER = "router", "embedding", "lm_head", "conv", "other"
ROLES: tuple[str, ...] = (QUERY, KEY, VALUE, OUTPUT, UP, GATE, DOWN, ROUTER, EMBEDDING, LM_HEAD, CONV, OTHER)


@dataclass(frozen=True)
class Label:
    """The role of a use, or of a part of its weight's output features."""

    role: str
    rows: tuple[int, ...] | None
    """None: all output features of the weight; else the indices along its layout's out side, ascending."""
    reason: str = ""
    """For `other`: why no role was given."""


def label_uses(program: Program) -> dict[Use, tuple[Label, ...]]:
    """The role of every use that multiplies. The rows of a fused weight's labels partition its output features."""
    return {} if program.capture is None else _Labeller(program).labels()


_DENSE_ROLES = {"conv_tbc": CONV, "convolution": CONV, "embedding": EMBEDDING, "embedding_bag": EMBEDDING}
_ATTENTION = (QUERY, KEY, VALUE)


class _Labeller:
    """From the flow to labels: attention before MLP before router before lm_head."""

    def __init__(self, program: Program) -> None:
        self.flow = Flow(program)
        self.targets: dict[fx.Node, dict[str, list[Target]]] = {}
        self.downs: set[fx.Node] = set()
        self.unclear: set[fx.Node] = set()
        self.gates = 0  # bits of the uses that gate an attention's result
        self.layouts = {use.weight: use.weight.layout for uses in self.flow.uses.values() for use in uses}
        self.rows: dict[Any, list[int] | None] = {}
        for core in self.flow.cores:
            for role, targets in zip(_ATTENTION, (core.query, core.key, core.value), strict=True):
                for target in targets:
                    self._aim(role, target)
        for node, fact in self.flow.inputs.items():
            self._mlp(node, fact)

    def labels(self) -> dict[Use, tuple[Label, ...]]:
        uses = [(node, use) for node, uses in self.flow.uses.items() for use in uses if not use.weight.problem]
        found = {use: self._use_labels(node, use) for node, use in uses}
        self._share_with_positions(found)
        return found

    def _aim(self, role: str, target: Target, but: int = 0) -> None:
        fact = self.flow.fact(target.node)
        if fact.stream:  # the residual stream itself is read: it is nobody's projection
            return
        for node in self.flow.uses_in(fact.frontier & ~but):
            if multiplies_plainly(node):
                self.targets.setdefault(node, {}).setdefault(role, []).append(target)

    def _mlp(self, node: fx.Node, fact: Fact) -> None:
        flow, bit, origins = self.flow, self.flow.bit[node], union(act.origins for act in fact.acts)
        if fact.stream or not fact.acts or not multiplies_plainly(node) or bit & flow.mixed:
            return
        if fact.frontier & (CORE | MIX):
            self.gates |= origins
            return
        other = [n for n in flow.uses_in(origins) if not multiplies_plainly(n)]
        if bit & flow.added:
            fits = all(flow.is_depthwise(n) for n in other)
        else:  # a block on its own, as between two towers: heads, poolers and scalar gates look much like it
            own = {use.weight for use in flow.uses[node]}
            repeats = any(use.weight in own for n in flow.uses_in(origins) for use in flow.uses[n])
            fits = bool(bit & flow.used) and not bit & (flow.bending | flow.chosen) and not other and not repeats
        if not fits:
            return
        if not all(act.clear for act in fact.acts):
            self.unclear |= {node, *flow.uses_in(origins)}
            return
        self.downs.add(node)
        for act in fact.acts:
            self._aim(GATE if act.up else UP, act.gate)
            if act.up:  # in `up * x * sigmoid(x)` the factor beside the sigmoid holds the gate too
                gate, up = flow.fact(act.gate.node).frontier, flow.fact(act.up.node).frontier
                self._aim(UP, act.up, but=gate if up & ~gate & -FIRST_USE else 0)

    def _use_labels(self, node: fx.Node, use: Use) -> tuple[Label, ...]:
        role = FORMS[use.form].role if use.form in FORMS else _DENSE_ROLES.get(use.form, "")
        role = use.call.form.role if use.call else role
        role = role or ("" if multiplies_plainly(node) else OTHER)
        aims = self.targets.get(node, {})
        inner = self._by_input(node)
        others = [u.weight.name for u in self.flow.uses[node] if u.call is not None and u.weight is not use.weight]
        if others and use.call is not None and not role:
            return self._whole(use, OTHER, f"it multiplies {others[0]}, and either could be the projection")
        if role or not aims or (inner == OUTPUT and not set(aims) & set(_ATTENTION)):
            return self._whole(use, role or inner or self._by_end(node))
        if inner and (inner == OUTPUT or not set(aims) & set(_ATTENTION)):
            return self._whole(use, OTHER, f"it looks like {inner} by what feeds it, like {min(aims)} by what it feeds")
        flow, bit = self.flow, self.flow.bit[node]
        alone = set(aims) <= set(_ATTENTION) and not bit & (flow.used | flow.out)
        if len(aims) == 1 and (alone or not bit & flow.cut):  # no slice of it is read by something beside its target
            return self._whole(use, *aims)
        return self._split(use, aims)

    def _by_input(self, node: fx.Node) -> str:
        fact = self.flow.inputs[node]
        if fact.frontier & CORE and not fact.stream:
            return OUTPUT
        return DOWN if node in self.downs else ""

    def _by_end(self, node: fx.Node) -> str:
        flow, bit = self.flow, self.flow.bit[node]
        if bit & flow.chosen:
            return ROUTER
        return LM_HEAD if bit & flow.unmixed and not bit & (flow.used | flow.added) else OTHER

    def _whole(self, use: Use, role: str, reason: str = "") -> tuple[Label, ...]:
        sides = use.call.sides if use.call else ""
        seen = math.prod(n for n, side in zip(use.view.shape, sides, strict=False) if side == "o")
        rows = self._rows_of(use) if sides and seen < self.layouts[use.weight].size("o") else None
        reason = reason or (self._why_other(use) if role == OTHER else "")
        return (Label(role, tuple(sorted(set(rows))) if rows else None, reason),)

    def _rows_of(self, use: Use) -> list[int] | None:
        """The weight's row of each output feature of the use."""
        if use.call is None:
            return None
        layout = self.layouts[use.weight]
        key = layout, use.view, use.call.sides
        if key not in self.rows:
            placement = place(*key)
            self.rows[key] = None if placement is None or placement.swapped else placement.rows()
        return self.rows[key]

    def _split(self, use: Use, aims: dict[str, list[Target]]) -> tuple[Label, ...]:
        rows = self._rows_of(use)
        if rows is None:
            return self._whole(use, OTHER, f"it has parts ({', '.join(aims)}), and they are no rows of the weight")
        try:
            reached = {
                role: frozenset().union(*(self.flow.splitter.features(use, t) for t in targets))
                for role, targets in aims.items()
            }
        except Undecided as problem:
            return self._whole(use, OTHER, f"its parts ({', '.join(aims)}) cannot be told apart: {problem}")
        parts, contested = _disjoint(reached)
        rest = frozenset(range(len(rows))) - contested.union(*parts.values())
        everything = [
            *((role, features, "") for role, features in parts.items()),
            (OTHER, contested, f"the same features feed {' and '.join(aims)}"),
            (OTHER, rest, f"these features do not feed {' or '.join(aims)}"),
        ]
        there = [part for part in everything if part[1]]
        if len(there) == 1:
            return self._whole(use, there[0][0], there[0][2])
        labels: dict[str, Label] = {}
        for role, features, reason in there:
            own = {rows[k] for k in features}
            if role in labels:
                own |= set(labels[role].rows or ())
                reason = f"{labels[role].reason}; {reason}"
            labels[role] = Label(role, tuple(sorted(own)), reason)
        return tuple(labels.values())

    def _why_other(self, use: Use) -> str:
        flow, node = self.flow, use.node
        bit, fact = flow.bit[node], flow.inputs[node]
        mix = "a product of activations that is no softmax attention"
        reasons = (
            (not multiplies_plainly(node), f"{use.form} multiplies inside one op, where no role can be seen"),
            (node in self.unclear, "it belongs to a gated block of which either factor could be the gate"),
            (bit & flow.positions, "it multiplies a table of positions, no activations"),
            (bit & flow.mixed, f"it feeds {mix} (a linear attention, a state space, an autocorrelation)"),
            (bit & self.gates, "it gates the result of an attention, or of another product of activations"),
            (fact.frontier & MIX and not fact.stream, f"it multiplies what comes out of {mix}"),
            (not bit & (flow.used | flow.out), "its result reaches neither another weight nor the output"),
            (bit & flow.added, "it is added to the residual stream, and is part of no attention or MLP"),
            (True, "it feeds no attention, MLP, router or output of its own"),
        )
        return next(reason for holds, reason in reasons if holds)

    def _share_with_positions(self, found: dict[Use, tuple[Label, ...]]) -> None:
        """A query weight that also multiplies a table of positions (DeBERTa's shared keys) is the query there too."""
        for use, labels in found.items():
            if labels[0].role != OTHER or not self.flow.bit[use.node] & self.flow.positions:
                continue
            others = [found[u] for u in use.weight.uses if u in found and u.view == use.view]
            same = {labels for labels in others if labels[0].role != OTHER}
            if len(same) == 1:
                found[use] = same.pop()


def _disjoint(reached: dict[str, frozenset[int]]) -> tuple[dict[str, frozenset[int]], frozenset[int]]:
    """Attention before MLP; what several roles claim after that is contested."""
    reached = dict(reached)
    if GATE in reached and reached[GATE] == reached.get(UP):  # x * f(x) on the same features gates with nothing else
        del reached[GATE]
    elif GATE in reached and reached[GATE] < reached.get(UP, frozenset()):  # up * x * f(x)
        reached[UP] -= reached[GATE]
    attention = frozenset().union(*(features for role, features in reached.items() if role in _ATTENTION))
    reached = {r: f if r in _ATTENTION else f - attention for r, f in reached.items()}
    claims = Counter(k for features in reached.values() for k in features)
    contested = frozenset(k for k, times in claims.items() if times > 1)
    return {r: f - contested for r, f in reached.items()}, contested
