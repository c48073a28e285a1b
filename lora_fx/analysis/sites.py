"""Sites: what a rule can adapt. A weight with one role is one site; a fused weight has one for each of its parts."""

from __future__ import annotations

import re
from dataclasses import dataclass

from torch import nn

from lora_fx.analysis import roles
from lora_fx.graph.forms import FORMS, Call
from lora_fx.graph.program import Program, Use, Weight

UNKNOWN = ""  # the role of a site that was never seen in a graph


@dataclass(eq=False)
class Site:
    """A weight, or the part of one with one role."""

    weight: Weight
    role: str
    rows: tuple[int, ...] | None
    """The output features of this part; None for all."""
    uses: tuple[Use, ...]
    reason: str = ""
    """Why the role is `other`."""

    @property
    def names(self) -> tuple[str, ...]:
        """Every name of the weight and of the modules that hold it."""
        modules = tuple(re.sub(r"\.parametrizations\..*", "", name.rpartition(".")[0]) for name in self.weight.names)
        return tuple(dict.fromkeys(n for n in (*self.weight.names, *modules) if n))

    @property
    def form(self) -> str:
        return ", ".join(dict.fromkeys(use.form for use in self.uses)) or "unseen"

    @property
    def shape(self) -> tuple[int, ...]:
        return self.weight.shape

    @property
    def in_features(self) -> int:
        return self.weight.layout.size("i")

    @property
    def out_features(self) -> int:
        return self.weight.layout.size("o") if self.rows is None else len(self.rows)

    @property
    def layer(self) -> int | None:
        """The first integer in the weight's name: ``h.3.attn.c_attn.weight`` → 3."""
        for name in self.weight.names:
            if found := re.search(r"(?:^|\.)(\d+)(?:\.|$)", name):
                return int(found[1])
        return None

    def __repr__(self) -> str:
        return f"Site({self.weight.name}, {self.role or 'role unknown'})"


def find_sites(program: Program) -> tuple[Site, ...]:
    """Every site of the program, in the order of the model's parameters."""
    if program.capture is None:
        return tuple(site for weight in program.weights for site in _unseen_site(program.model, weight))
    labels = roles.label_uses(program)
    found = []
    for weight in program.weights:
        if weight.problem:  # a rule that asks for it is told why not
            found.append(Site(weight, roles.OTHER, None, tuple(weight.uses), weight.problem))
        elif weight.multiplied:
            found += _sites_of(weight, labels)
    return tuple(found)


def _sites_of(weight: Weight, labels: dict[Use, tuple[roles.Label, ...]]) -> list[Site]:
    found: dict[str, Site] = {}
    everything = weight.layout.size("o")
    for use in (u for u in weight.uses if u.multiplies):
        for label in labels[use]:
            site = found.setdefault(label.role, Site(weight, label.role, label.rows, (), label.reason))
            site.rows = None if site.rows is None or label.rows is None else tuple(sorted({*site.rows, *label.rows}))
            site.uses = tuple(dict.fromkeys((*site.uses, use)))
    for site in found.values():
        if site.rows is not None and len(site.rows) == everything:
            site.rows = None
    return list(found.values())


def _unseen_site(model: nn.Module, weight: Weight) -> list[Site]:
    """Without example inputs the type of the owning module alone speaks: enough for rules by name and form."""
    for name in weight.names:
        path = name.rpartition(".")[0]
        call = _known_call(model.get_submodule(path), len(weight.shape))
        if call is None:
            continue
        use = Use.unseen(weight, path, call)
        weight.uses.append(use)
        return [Site(weight, call.form.role or UNKNOWN, None, (use,))]
    return []


def _known_call(module: nn.Module, ndim: int) -> Call | None:
    """The form and the sides that a module multiplies its weight with."""
    if isinstance(module, nn.modules.conv._ConvTransposeNd):
        return Call(FORMS[f"conv_transpose{ndim - 2}d"], None, None, "i" + "o" * (ndim - 1))
    if isinstance(module, nn.modules.conv._ConvNd):
        return Call(FORMS[f"conv{ndim - 2}d"], None, None, "o" + "i" * (ndim - 1))
    if isinstance(module, nn.Embedding):
        return Call(FORMS["embedding"], None, None, "io")
    if isinstance(module, nn.Linear | nn.MultiheadAttention | nn.RNNBase | nn.RNNCellBase) and ndim == 2:
        return Call(FORMS["linear"], None, None, "oi")
    if type(module).__name__ == "Conv1D" and hasattr(module, "nf") and ndim == 2:  # transformers' (in, out) linear
        return Call(FORMS["addmm"], None, None, "io")
    return None
