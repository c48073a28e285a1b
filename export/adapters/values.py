"""An adapter on its way into a file (`Held`), and on its way out of one (`Saved`)."""

from __future__ import annotations

import copy
import itertools
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from lora_fx.analysis.rules import SETTINGS, Rule
from lora_fx.deltas.adapter import Adapter
from lora_fx.deltas.kinds import Kind
from lora_fx.deltas.low_rank import LowRank
from lora_fx.errors import RuleError
from lora_fx.export.adapters.peft import Layer, turned
from lora_fx.graph.layout import Layout
from lora_fx.reading import refuse

BOTH = "restore both files of one save; a change of settings is saved from the model"
OWN_FORMAT = "save_adapter(..., peft=False) writes a folder that lora_fx can load and PEFT refuses"

Files = tuple[dict[str, Any], dict[str, torch.Tensor], list[dict[str, Any]]]
"""The config, the tensors, and for each adapter its entry in our header."""


@dataclass(frozen=True)
class Held:
    """An adapter in the model, and every name of its weight that reads with it."""

    adapter: Adapter
    weights: tuple[str, ...]
    part: str
    here: Mapping[str, Any] = field(default_factory=dict, hash=False)
    """Settings that say where it stands in this model, in the place of those that said so when it was made."""

    def turned(self, layer: Layer) -> LowRank:
        """The factors for all rows, in the layer's axes."""
        a, wanted = self.adapter, layer.layout.sides
        own = LowRank(a.layout, a.A.detach().cpu(), a.B.detach().cpu(), a.scale, a.rank, a.rows)
        found = turned(replace(own, B=own.whole, rows=None), wanted)
        if found is None or (found.A is not own.A and a.kind.name != "lora"):
            reason = f"the model reads it as {own.layout.sides!r} (o: out, i: in, b: batch), PEFT as {wanted!r}"
            refuse(self.weights[0], reason, OWN_FORMAT)
        return found

    def plain(self) -> Held:
        """Of a kind whose factors are wider than its rank, as pissa's: the plain LoRA that adds the same numbers."""
        a = self.adapter
        if not a.kind.low_rank or a.kind.width == 1:
            return self
        low, rank = a.low_rank(), a.width
        alpha = a.scale * rank
        settings: dict[str, Any] = {"rank": rank, "alpha": alpha, "dropout": a.dropout.p, "schedule": a.schedule}
        plain = Adapter(a.layout, rows=a.rows, name=a.name, role=a.role, dtype=a.dtype, **settings)
        plain.change(realised=a.realised, read_outside=a.read_outside)
        with torch.no_grad():
            plain.A.copy_(low.A)
            plain.B.copy_(low.B)
        return replace(self, adapter=plain)

    @property
    def whole(self) -> torch.Tensor:
        """Of `full`: the weight as it was trained, in its own shape; of some rows, these."""
        theta = self.adapter.get_parameter("weight").detach().cpu()
        return theta.clone() if self.adapter.rows is not None else self.adapter.layout.to_weight(theta).clone()

    def entry(self) -> dict[str, Any]:
        a = self.adapter
        said = {
            "weights": list(self.weights), "part": self.part, "role": a.role, "sides": a.layout.sides,
            "rows": None if a.rows is None else _ranges(a.rows),
        }  # fmt: skip
        if not 0 <= a.dropout.p < 1:
            reason = f"its dropout has p={a.dropout.p!r}, which is no probability below 1"
            refuse(self.weights[0], reason, "set dropout.p of the adapter to one")
        for key, value in a.settings.items():
            if not _is_sayable(value):
                reason = f"{key}={value!r} of the kind {a.kind.name!r} does not come back out of JSON"
                refuse(self.weights[0], reason, "let the kind take finite numbers, texts, and lists and tables of them")
        if a.kind.name != "lora":
            return {**said, "kind": a.kind.name, "settings": {**a.settings, **self.here}}
        own = {"rank": a.rank, "alpha": a.alpha, "scaling": a.scaling, "dropout": a.dropout.p, "schedule": a.schedule}
        return {**said, **own}


def baked(h: Held) -> Held:
    """The same with its scale in B: rank and alpha are one number."""
    if h.adapter.kind.name not in ("lora", "dora"):
        return h
    adapter = copy.deepcopy(h.adapter)
    with torch.no_grad():
        adapter.B.copy_((h.adapter.B.double() * h.adapter.scale).to(adapter.B.dtype))
    adapter.change(_settings={**adapter._settings, "scaling": "standard"})
    adapter.alpha = adapter.rank
    return replace(h, adapter=adapter)


def _is_sayable(value: Any) -> bool:
    try:
        return json.loads(json.dumps(value, allow_nan=False)) == value
    except (TypeError, ValueError, RecursionError):
        return False


def _ranges(rows: tuple[int, ...]) -> list[list[int]]:
    """Rows as half-open ranges."""
    runs = itertools.groupby(enumerate(rows), key=lambda at: at[1] - at[0])
    found = [[row for _, row in run] for _, run in runs]
    return [[run[0], run[-1] + 1] for run in found]


@dataclass(frozen=True)
class Saved:
    """An adapter out of a file."""

    weights: tuple[str, ...]
    kind: Kind
    theta: Mapping[str, torch.Tensor]
    layout: Layout
    """In whose axes θ is."""
    rows: tuple[int, ...] | None
    settings: Mapping[str, Any]
    place: str
    """For errors."""
    role: str = ""
    part: str = ""
    started: bool = True
    """θ has numbers; otherwise only shapes, and the adapter begins as its kind does."""
    alone: bool = False
    """Another one on a module that shares the weight is another one, however alike."""

    def turned(self, sides: str) -> Mapping[str, torch.Tensor] | None:
        """θ for a weight that is read with other sides: A and B in each other's place; None where it has another."""
        if self.layout.sides == sides:
            return self.theta
        if self.kind.name == "full" and self.rows is None:
            whole = self.layout.to_weight(self.theta["weight"])
            return {"weight": Layout(sides, self.layout.shape).to_matrix(whole)}
        if self.kind.name != "lora":
            return None
        A, B = self.theta["A"], self.theta["B"]
        found = turned(LowRank(self.layout, A, B, 1.0, B.shape[-1], self.rows), sides)
        return None if found is None else {"A": found.A, "B": found.B}

    def rule(self, name: str) -> Rule:
        """What it was made with, but for the schedule."""
        plain = {key: value for key, value in self.settings.items() if key in SETTINGS and key != "schedule"}
        own = {key: value for key, value in self.settings.items() if key not in SETTINGS}
        kind = None if self.kind.name == "lora" else self.kind.name
        try:
            return Rule(where=name, kind=kind, settings=own or None, **plain)
        except RuleError as error:
            refuse(self.place, error.reason, "save the adapter again", error)
        except (TypeError, ValueError) as error:
            refuse(self.place, f"the settings {plain} are none: {error}", "save the adapter again", error)

    def equals(self, other: Saved) -> bool:
        """It adds the same numbers."""
        theirs = other.turned(self.layout.sides)
        same = (self.kind, self.settings, self.rows) == (other.kind, other.settings, other.rows)
        return same and theirs is not None and all(torch.equal(t, theirs[name]) for name, t in self.theta.items())
