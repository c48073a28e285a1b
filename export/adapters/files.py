"""Adapters as files, in PEFT's own format:   W + s·B·A   ⇄   adapter_config.json + adapter_model.safetensors

PEFT adapts calls of modules, lora_fx adapts weights. So a weight is written once for each module that reads it, and
what PEFT has no word for (rows of a fused weight, roles, the dropout of each weight, who shares a tied one) stands in
the header of the tensor file, under ``lora_fx``. PEFT skips that, and replaces it together with the tensors when it
saves, so it never goes stale. Parts of a fused weight lie one after the other along the rank, with zero rows in B for
the features that are no part:

    s·B₁·A₁ + s·B₂·A₂   =   s·[B₁ B₂]·[A₁; A₂]

PEFT computes the same function, and our header says where to cut. A weight for which PEFT would compute anything else
is refused by name. With ``peft=False`` the folder holds the factors as they are, under a `peft_type` PEFT refuses.
"""

from __future__ import annotations

import difflib
import itertools
import json
import math
import os
import re
import sys
import warnings
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lora_fx.analysis.biases import Biases
from lora_fx.analysis.rules import SETTINGS, Rule
from lora_fx.changes import in_turn
from lora_fx.deltas.adapter import Adapter
from lora_fx.deltas.kinds import Kind, Space, Theta, kind_named
from lora_fx.deltas.low_rank import LowRank
from lora_fx.deltas.schedules import AUTO
from lora_fx.errors import KindError, RuleError
from lora_fx.export.adapters import peft as peft_format
from lora_fx.export.adapters.folder import (
    ADALORA,
    HEADER,
    OWN,
    PEFT,
    TENSORS,
    VERSION,
    Folder,
    read_folder,
    write_folder,
)
from lora_fx.export.adapters.peft import ITS_BASE, Layer, Modules, turned
from lora_fx.graph.forms import FORMS, Call
from lora_fx.graph.layout import Layout
from lora_fx.graph.places import is_shard
from lora_fx.graph.program import Program, Use, Weight
from lora_fx.model.classes import unwired
from lora_fx.model.inventory import Place, inventory, plain_path, weight_name
from lora_fx.model.training import REFUSE, why_not_alone
from lora_fx.passes.base import Facts, Pass, Result, given
from lora_fx.passes.insert import Check, Insert, Rewrite
from lora_fx.passes.pipeline import Pipeline
from lora_fx.passes.planning import Plan, Row, Schedule, plan_rows, read_program
from lora_fx.reading import boundary, refuse

_BOTH = "restore both files of one save; a change of settings is saved from the model"
_OWN_FORMAT = "save_adapter(..., peft=False) writes a folder that lora_fx can load and PEFT refuses"


# ── save ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class _Held:
    """An adapter in the model, and every name of its weight that reads with it."""

    adapter: Adapter
    weights: tuple[str, ...]
    part: str

    def turned(self, layer: Layer) -> LowRank:
        """The factors for all rows, in the layer's axes."""
        a, wanted = self.adapter, layer.layout.sides
        own = LowRank(a.layout, a.A.detach().cpu(), a.B.detach().cpu(), a.scale, a.rank, a.rows)
        found = turned(replace(own, B=own.whole, rows=None), wanted)
        if found is None or (found.A is not own.A and a.kind.name != "lora"):
            reason = f"the model reads it as {own.layout.sides!r} (o: out, i: in, b: batch), PEFT as {wanted!r}"
            refuse(self.weights[0], reason, _OWN_FORMAT)
        return found

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
            return {**said, "kind": a.kind.name, "settings": dict(a.settings)}
        own = {"rank": a.rank, "alpha": a.alpha, "scaling": a.scaling, "dropout": a.dropout.p, "schedule": a.schedule}
        return {**said, **own}


def _is_sayable(value: Any) -> bool:
    try:
        return json.loads(json.dumps(value, allow_nan=False)) == value
    except (TypeError, ValueError, RecursionError):
        return False


@dataclass(frozen=True)
class _Target:
    """What PEFT is told to adapt, with the adapters in each of its layers: they share one rank and one alpha."""

    layers: Mapping[Layer, list[_Held]]
    rank: int
    alpha: float
    """Whole numbers as integers, as PEFT types them."""
    scale: float

    @classmethod
    def of(cls, layers: Mapping[Layer, list[_Held]], rslora: bool) -> _Target:
        groups = layers.values()
        rank = max(sum(h.adapter.rank for h in group) for group in groups)
        first = next(h.adapter for group in groups for h in group)
        divisor = math.sqrt(rank) if rslora else rank
        own = rank == first.rank and (first.scaling == "rslora") == rslora
        alpha = first.alpha if own else first.scale * divisor
        return cls(layers, rank, int(alpha) if float(alpha).is_integer() else alpha, alpha / divisor)


_Files = tuple[dict[str, Any], dict[str, torch.Tensor], list[dict[str, Any]]]
"""The config, the tensors, and for each adapter its entry in our header."""


def save_adapter(
    model: nn.Module,
    path: str | os.PathLike,
    old: str | None = None,
    *,
    name: str = "default",
    peft: bool = True,
    beside: str = REFUSE,
) -> None:
    """Write the adapter of this name into a folder that PEFT and `load_adapter` read.

    The folder is new or old in one step; files of other names in it stay. Only safetensors is written, never pickle.
    Weights have the names of the model that `torch.compile`, DDP, FSDP or a checkpoint wrapper was put around.

    Args:
        path: the folder; made if it is not there.
        old: the name, where it is given without a keyword; deprecated.
        name: the adapter's name in the model.
        peft: write PEFT's format, and refuse what it cannot say. ``False`` writes any adapter in lora_fx's own, which
            PEFT refuses to read.
        beside: what to do about parameters of the model that have ``requires_grad``, which the file does not hold:
            ``"refuse"`` to save, naming them, or ``"ignore"`` them.

    Raises:
        AdapterError: there is no such adapter.
        FileError: it is folded, a factor is not finite, PEFT would compute something else, or more than adapters
            trains; nothing has been written then.
    """
    if old is not None:
        warnings.warn("write save_adapter(model, path, name=…)", DeprecationWarning, stacklevel=2)
        name = old
    if isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
        model = model.module
    with in_turn():
        held = _held(model, name)
        if any(why := why_not_alone(model, beside)):
            refuse(*why)
        config, tensors, entries = _as_peft(model, held, name) if peft else _as_own(held)
        header = {"version": VERSION, "name": name, "config": peft_format.meaning(config), "adapters": entries}
        write_folder(Path(path), config, tensors, header)


def _held(model: nn.Module, name: str) -> list[_Held]:
    here = inventory(model)
    here.require([name])
    found: dict[Adapter, list[Place]] = {}
    for place in here.places:
        if place.adapter.name == name:
            found.setdefault(place.adapter, []).append(place)
    if not found:
        refuse(type(model).__name__, f"the adapter {name!r} is folded into its weights", "lora_fx.unfold(model) first")
    held = []
    for adapter, places in found.items():
        names = tuple(weight_name(plain_path(place.path), place.attribute) for place in places)
        held.append(_Held(adapter, names, places[0].part))
        for label, factor in adapter.named_parameters():
            where = f"{names[0]}, {label} of adapter {name!r}"
            if factor.is_meta:
                refuse(where, "it is on meta and has no numbers", "materialise the model first")
            if is_shard(factor):
                how = "unshard() every FSDPModule, or enter FullyShardedDataParallel.summon_full_params(model)"
                refuse(where, "it is sharded", f"in all processes {how}; then save in one of them")
            if not bool(factor.isfinite().all()):
                refuse(where, "it holds NaN or Inf", "save an earlier checkpoint of the adapter")
    return held


def _as_own(held: list[_Held]) -> _Files:
    """θ as it is; what adapters have in common once."""
    tensors: dict[str, torch.Tensor] = {}
    entries: list[dict[str, Any]] = []
    bases = {h.adapter: ".".join(filter(None, (h.weights[0], h.part))) for h in held}
    for h in held:
        keys = {tensor: f"{bases[h.adapter.owner(tensor)]}.{tensor}" for tensor in h.adapter.tensors}
        tensors |= {keys[tensor]: p for tensor, p in h.adapter.named_parameters()}
        entries.append({**h.entry(), "keys": (keys["A"], keys["B"]) if h.adapter.kind.name == "lora" else keys})
    return {"peft_type": OWN, "lora_fx_version": VERSION}, tensors, entries


def _ranges(rows: tuple[int, ...]) -> list[list[int]]:
    """Rows as half-open ranges."""
    runs = itertools.groupby(enumerate(rows), key=lambda at: at[1] - at[0])
    found = [[row for _, row in run] for _, run in runs]
    return [[run[0], run[-1] + 1] for run in found]


def _as_peft(model: nn.Module, held: list[_Held], name: str) -> _Files:
    """PEFT's config and tensors. Adapters with one target share its rank and its scale."""
    modules = Modules(model)
    _refuse_kinds(held)
    names = [weight for h in held for weight in h.weights]
    for weight in names:
        if why := modules.why_not(weight, modules.is_raw(weight)):
            refuse(weight, why, _OWN_FORMAT)
    raw = [weight for weight in names if modules.is_raw(weight)]
    rslora = all(h.adapter.scaling == "rslora" for h in held)
    layers: dict[str, dict[Layer, list[_Held]]] = {}
    for h in held:
        for weight in h.weights:
            layer = modules.layer(weight, raw)
            _refuse_outside_reads(h, layer)
            own = layers.setdefault(layer.target, {})
            if layer.kind == "attention" and not own:  # PEFT adapts both projections: without an adapter one gets zeros
                own.update({modules.layer(f"{layer.target}.{w}", ()): [] for w in peft_format.ATTENTION})
            own.setdefault(layer, []).append(h)
    targets = {name: _Target.of(own, rslora) for name, own in layers.items()}
    tensors: dict[str, torch.Tensor] = {}
    slots: dict[tuple[_Held, Layer], dict[str, int]] = {}
    for target in targets.values():
        for layer in target.layers:
            tensors.update(_joined(layer, target, slots))
    entries = [{**h.entry(), **slots[h, modules.layer(h.weights[0], raw)]} for h in held]
    return _config(modules, targets, rslora), tensors, entries


def _refuse_kinds(held: list[_Held]) -> None:
    """A LoRA file of PEFT's holds `lora` or `dora`, one of them for all that it adapts."""
    kinds = list(dict.fromkeys(h.adapter.kind.name for h in held))
    for h in held:
        kind = h.adapter.kind.name
        if kind not in peft_format.KINDS:
            refuse(h.weights[0], f"the kind {kind!r} is none of a LoRA file of PEFT's", _OWN_FORMAT)
        if len(kinds) > 1:
            refuse(h.weights[0], f"the adapters are of the kinds {', '.join(kinds)}, and PEFT keeps one", _OWN_FORMAT)
        if kind == "dora" and h.adapter.rows is not None:
            refuse(h.weights[0], "it is a part of the weight, and PEFT's DoRA trains all sizes of it", _OWN_FORMAT)


def _refuse_outside_reads(h: _Held, layer: Layer) -> None:
    """PEFT adapts calls of a module, and torch's attention whole: who reads another's weight goes past that."""
    if h.adapter.read_outside and layer.kind != "attention":
        reads = f"{h.adapter.read_outside} reads the weight of a module inside it"
        refuse(h.weights[0], f"{reads}, and PEFT adapts only calls of that module", _OWN_FORMAT)


def _joined(layer: Layer, target: _Target, slots: dict[tuple[_Held, Layer], dict[str, int]]) -> dict[str, torch.Tensor]:
    """A layer's adapters side by side along the rank, with the target's scale, and zeros up to the target's rank.

    Args:
        slots: is told where each adapter lies: from `start` on along the rank, its B 2^shift times as large.
    """
    members, start = target.layers[layer], 0
    dora = bool(members) and members[0].adapter.kind.name == "dora"
    if dora and (why := layer.why_not_dora):
        refuse(members[0].weights[0], why, _OWN_FORMAT)
    dtype = next((h.adapter.dtype for h in members), torch.float32)
    A, B = (torch.zeros(layer.layout.shape_of(factor, target.rank), dtype=dtype) for factor in "AB")
    for h in members:
        delta, stop = h.turned(layer), start + h.adapter.rank
        shift = _power_of_two(h, target.scale * layer.times, delta.B)
        A[..., start:stop, :] = delta.A
        B[..., start:stop] = torch.ldexp(delta.B, torch.tensor(shift))
        slots[h, layer] = {"start": start, "shift": shift}
        start = stop
    tensors = layer.encode(A, B)
    if dora:
        magnitude = members[0].adapter.get_parameter("magnitude").detach().cpu().clone()  # two layers may share it
        tensors[layer.magnitude] = magnitude.reshape(layer.magnitude_shape)
    return tensors


def _power_of_two(h: _Held, scale: float, B: torch.Tensor) -> int:
    """The n with scale of the adapter = 2ⁿ · scale of the target: only 2ⁿ goes into B, and out of it, without loss."""
    own = h.adapter.scale
    ratio = own / scale if scale else (1.0 if own == 0 else math.nan)
    near = round(math.log2(ratio)) if ratio > 0 else 0
    exact = abs(ratio - 2.0**near) <= 4 * sys.float_info.epsilon * 2.0**near
    there = torch.ldexp(B, torch.tensor(near))
    if not (exact and torch.equal(torch.ldexp(there, torch.tensor(-near)), B)):
        reason = f"alpha={h.adapter.alpha:g} at rank={h.adapter.rank} is a scale of {own:g}, and PEFT keeps one for all"
        reason += f" of it: {scale:g}, times no power of two"
        refuse(h.weights[0], reason, f"give the parts of one weight the same alpha / rank, or {_OWN_FORMAT}")
    return near


def _config(modules: Modules, targets: Mapping[str, _Target], rslora: bool) -> dict[str, Any]:
    layers = [layer for target in targets.values() for layer in target.layers]
    kinds = {layer.kind for layer in layers}
    parameters = [layer.target for layer in layers if layer.kind == "parameter"]
    if why := peft_format.why_not_together(layers, False):
        refuse(next(layer.target for layer in layers if layer.kind == "conv1d"), why, _OWN_FORMAT)
    for parameter in parameters:
        clashes = [n for n in modules.parameters if n.endswith(f".{parameter}") and n not in parameters]
        if clashes:
            reason = f"PEFT's target_parameters would take {clashes[0]} too: it ends in the same words"
            refuse(parameter, reason, _OWN_FORMAT)
    paths = [target for target in targets if target not in parameters]
    others = [path for path in modules.by_path if path not in paths]
    clash = any(other.endswith(f".{path}") for other in others for path in paths)  # a pattern takes only whole paths
    members = (h for target in targets.values() for own in target.layers.values() for h in own)
    dora = any(h.adapter.kind.name == "dora" for h in members)
    exactly = {"^" + re.escape(name): t for name, t in targets.items()}  # PEFT allows any prefix before a key
    ((rank, alpha), _), *_ = Counter((t.rank, t.alpha) for t in targets.values()).most_common(1)
    return {
        "peft_type": PEFT,
        "peft_version": ".".join(map(str, peft_format.SPOKEN)),
        "task_type": None,
        "base_model_name_or_path": getattr(modules.model, "name_or_path", None) or None,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": _shared_dropout(targets),
        "use_rslora": rslora,
        "use_dora": dora,
        "bias": "none",
        "fan_in_fan_out": "conv1d" in kinds and "linear" not in kinds,
        "target_modules": "|".join(map(re.escape, paths)) if clash else paths,
        "target_parameters": parameters or None,
        "rank_pattern": {key: t.rank for key, t in exactly.items() if t.rank != rank},
        "alpha_pattern": {key: t.alpha for key, t in exactly.items() if t.alpha != alpha},
        "init_lora_weights": True,
    }


def _shared_dropout(targets: Mapping[str, _Target]) -> float:
    """PEFT has one dropout for all layers, drops nothing on embeddings and attention, and refuses it on parameters."""
    pairs = [(layer, h) for t in targets.values() for layer, members in t.layers.items() for h in members]
    seen = {h.adapter.dropout.p: layer for layer, h in pairs if layer.kind not in ("embedding", "attention")}
    if len(seen) > 1:
        found = ", ".join(f"{p:g}" for p in sorted(seen))
        reason = f"PEFT keeps one dropout for all layers, and these have {found}"
        refuse(seen[max(seen)].target, reason, f"give all rules the same dropout, or {_OWN_FORMAT}")
    dropout = next(iter(seen), 0.0)
    parameter = next((layer.target for layer, _ in pairs if layer.kind == "parameter"), None)
    if dropout and parameter:
        reason = f"dropout={dropout:g} on a raw parameter, which PEFT cannot drop"
        refuse(parameter, reason, f"set dropout=0, or {_OWN_FORMAT}")
    return dropout


# ── load ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class _Saved:
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

    def turned(self, sides: str) -> Mapping[str, torch.Tensor] | None:
        """θ for a weight that is read with other sides: A and B in each other's place; None where it has another."""
        if self.layout.sides == sides:
            return self.theta
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

    def equals(self, other: _Saved) -> bool:
        """It adds the same numbers."""
        theirs = other.turned(self.layout.sides)
        same = (self.kind, self.settings, self.rows) == (other.kind, other.settings, other.rows)
        return same and theirs is not None and all(torch.equal(t, theirs[name]) for name, t in self.theta.items())


def load_adapter(
    model: nn.Module,
    path: str | os.PathLike,
    example_inputs: Any = None,
    *,
    name: str | None = None,
    check: bool = True,
) -> nn.Module:
    """Insert an adapter that `save_adapter` or PEFT has written, in place.

    What `save_adapter` wrote comes back bit for bit: factors, scale, rows, roles, dropout. What PEFT wrote means here
    what it means there: an adapter on a module acts where that module reads its weight, and nowhere else. Factors are
    kept in float32 (float64 for float64 weights), beside weights on meta on the CPU: `export_onnx` can fold them.

    Args:
        path: the folder, or one that holds exactly one adapter in a subfolder (where PEFT puts named adapters).
        example_inputs: as in `apply`.
        name: the adapter's name in the model; None for the name it was saved under (PEFT's: "default").
        check: compare the adapted model with the dense W + s·B·A, as in `apply`.

    Returns:
        The same model.

    Raises:
        FileError: a file is missing, damaged, made for another model, or uses what lora_fx does not compute.
        LoraFxError: the model cannot be adapted there. The model is bitwise what it was, each time.
    """
    return Pipeline("load_adapter", loading(path, example_inputs, name=name, check=check))(model).model


def loading(
    path: str | os.PathLike, example_inputs: Any = None, *, name: str | None = None, check: bool = True
) -> tuple[Pass, ...]:
    """The passes of `load_adapter`."""
    return Read(path, example_inputs, name), Schedule(), Insert(), Rewrite(), *([Check()] if check else [])


@dataclass(frozen=True)
class Read(Pass):
    """Read an adapter's files, and plan where it goes in this model; arguments as in `load_adapter`."""

    path: str | os.PathLike
    example_inputs: Any = None
    adapter: str | None = None

    name = "read"
    ensures = (given(Program), given(Plan))

    def call(self, model: nn.Module, facts: Facts) -> Result:
        folder = read_folder(Path(self.path))
        with unwired(model):
            with boundary("it cannot be put into this model", str(folder.path), ITS_BASE):
                saved = _read_own(model, folder, folder.header) if folder.header else _read_peft(model, folder)
            name = self.adapter or (folder.header["name"] if folder.header else "default")
            _refuse_name(model, name)
            program = read_program(model, self.example_inputs)
            weights = {n: w for w in program.weights for n in w.names}
            if any(s.kind.adapts == "bias" for s in saved):
                weights |= Biases(program).named
            for s in saved:
                _check_target(s, weights)
            rows = [_row(program, s, weights[s.weights[0]]) for s in _shared(saved, weights)]
            plan = plan_rows(program, tuple(row.rule for row in rows), name, rows)
        return Result(model, False, (program, plan))


def _refuse_name(model: nn.Module, name: str) -> None:
    if not isinstance(name, str) or not name.isidentifier():
        refuse("name", f"{name!r} is no identifier", "name the adapter with letters, digits and _")
    here = inventory(model)
    if here.folded:
        refuse(type(model).__name__, "it is folded", "lora_fx.unfold(model) first, or load into a fresh model")
    if name in here.names:
        remedy = f"pass another name to load_adapter, or lora_fx.remove(model, {name!r}) first"
        refuse(type(model).__name__, f"it already has an adapter named {name!r}", remedy)


def _check_target(s: _Saved, weights: Mapping[str, Weight]) -> None:
    weight = weights[s.weights[0]]
    if any(weights[n] is not weight for n in s.weights):
        reason = f"it adapts one weight under the names {', '.join(s.weights)}, which this model does not tie"
        refuse(s.place, reason, f"{ITS_BASE}, with its weights tied")
    if not weight.uses and s.kind.adapts == "weight":  # unseen by the inputs: then the file says how it is read
        call = Call(FORMS["matmul"], None, None, s.layout.sides)
        path = s.weights[0].rpartition(".")[0]
        weight.uses.append(Use.unseen(weight, path, call))


def _shared(saved: list[_Saved], weights: Mapping[str, Weight]) -> list[_Saved]:
    """PEFT keeps an adapter for each module; equal ones on modules that share the weight are one."""
    kept: list[_Saved] = []
    for s in saved:
        weight = weights[s.weights[0]]
        equal = (k for k, other in enumerate(kept) if weights[other.weights[0]] is weight and other.equals(s))
        if (k := next(equal, None)) is None:
            kept.append(s)
        else:
            kept[k] = replace(kept[k], weights=(*kept[k].weights, *s.weights))
    return kept


def _row(program: Program, s: _Saved, weight: Weight) -> Row:
    here = "o" * len(weight.shape) if s.kind.adapts == "bias" else weight.layout.sides
    theta = s.turned(here)
    if theta is None:
        reason = f"it reads the weight's axes as {s.layout.sides!r} (o: out, i: in, b: batch), the model as {here!r}"
        refuse(s.place, reason, f"{ITS_BASE}, with example inputs that run as they did there")
    owners = {n: (n.rpartition(".")[0], n.rpartition(".")[2]) for n in weight.names}
    holders = {n: (program.model.get_submodule(path), attribute) for n, (path, attribute) in owners.items()}
    mine = {holders[n] for n in s.weights}
    outside = {path for n, (path, _) in owners.items() if holders[n] not in mine}
    uses = tuple(u for u in weight.uses if u.module not in outside)
    rule = s.rule(weight.name)
    own = tuple(owners[n] for n in s.weights)
    row = Row(weight, rule, s.role, s.part, s.rows, uses, own, bool(outside), stored=theta)
    schedule = s.settings.get("schedule", AUTO)
    if not row.why_not(schedule):  # as it may in a model of another dtype
        row.rule = replace(rule, schedule=schedule)
    return row


def _read_own(model: nn.Module, folder: Folder, header: dict[str, Any]) -> list[_Saved]:
    """The adapters, by the header of the tensor file."""
    config = folder.config
    for key, value in header["config"].items():
        if config.get(key) != value:
            reason = f"it says {config.get(key)!r}, and {TENSORS} was written with {value!r}"
            refuse(folder.option(key), reason, _BOTH)
    own = config["peft_type"] == OWN
    if not own:
        peft_format.check_options(folder)
    modules, place = Modules(model), folder.tensor(HEADER)
    names = [name for entry in header["adapters"] for name in entry["weights"]]
    for name in names:
        if modules.parameter(name) is None:
            near = difflib.get_close_matches(name, modules.parameters, 3)
            refuse(place, f"the model has no weight {name!r}", f"{ITS_BASE}; near: {', '.join(near) or 'none'}")
    raw = [] if own else list(config.get("target_parameters") or ())
    with boundary("its header does not describe its tensors", place, "save the adapter again"):
        whole = [entry["weights"][0] for entry in header["adapters"] if entry.get("keys") is None]
        layers = {name: modules.layer(name, raw) for name in whole}
        ranks = peft_format.ranks(folder, [layer.target for layer in layers.values()])
        try:
            return [_entry(modules, entry, layers, ranks, folder) for entry in header["adapters"]]
        except KindError as error:
            refuse(place, f"{error.place}: {error.reason}", error.remedy, error)


def _entry(
    modules: Modules, entry: dict[str, Any], layers: Mapping[str, Layer], ranks: Mapping[str, int], folder: Folder
) -> _Saved:
    name, sides, kind = entry["weights"][0], str(entry["sides"]), kind_named(str(entry.get("kind", "lora")))
    parameter, keys = modules.parameter(name), entry.get("keys")
    assert parameter is not None and set(sides) <= set("boi"), f"{sides!r} are no axes of {name}"
    assert ("i" in sides) == (kind.adapts == "weight"), f"{kind.name} on {sides!r}"
    layout, settings = Layout(sides, tuple(parameter.shape)), kind.complete(_settings(entry))
    rows: tuple[int, ...] | None = None
    if keys is None:
        layer = layers[name]
        place, start, stop = folder.tensor(layer.keys[0]), int(entry["start"]), int(entry["start"]) + settings["rank"]
        if (kind.name == "dora") != bool(folder.config.get("use_dora")):  # as in a file from before there was DoRA
            reason = f"it says {folder.config.get('use_dora')!r}, and {TENSORS} was written with the kind {kind.name!r}"
            refuse(folder.option("use_dora"), reason, _BOTH)
        whole = layer.decode(folder, ranks[layer.target])
        B = torch.ldexp(whole.B[..., start:stop], torch.tensor(-int(entry["shift"])))
        delta = turned(replace(whole, A=whole.A[..., start:stop, :], B=B, rank=settings["rank"]), sides)
        assert delta is not None, f"{sides!r} are no axes of {name}"
        theta = {"A": delta.A, "B": delta.B, **({} if kind.name == "lora" else layer.sizes(folder))}
    else:
        keys = dict(zip("AB", keys, strict=True)) if kind.name == "lora" else keys
        theta = {tensor: folder.tensors[key] for tensor, key in keys.items()}
        place = folder.tensor(next(iter(keys.values())))
    if entry["rows"] is not None:
        rows = tuple(_rows(entry["rows"], layout.size("o"), place))
        theta = {**theta, "B": theta["B"][..., list(rows), :]} if keys is None else theta
    space = Space(layout.batch, layout.size("o") if rows is None else len(rows), layout.size("i"), Theta(**settings))
    shapes = kind.shapes(space)
    assert theta.keys() == shapes.keys(), f"θ of the kind {kind.name!r} is {', '.join(shapes)}, not {', '.join(theta)}"
    for tensor, shape in shapes.items():
        if tuple(theta[tensor].shape) != tuple(shape):
            found = tuple(theta[tensor].shape)
            refuse(place, f"{tensor} has the shape {found}, and {name} wants {tuple(shape)}", ITS_BASE)
    assert re.fullmatch(r"\w*", entry["part"]), f"{entry['part']!r} is no part"
    settings.pop("init", None)
    said = str(entry["role"]), str(entry["part"])
    return _Saved(tuple(entry["weights"]), kind, theta, layout, rows, settings, place, *said)


def _settings(entry: dict[str, Any]) -> dict[str, Any]:
    if "kind" in entry:
        return dict(entry["settings"])
    return {
        "rank": int(entry["rank"]), "alpha": float(entry["alpha"]), "scaling": entry["scaling"],
        "dropout": float(entry["dropout"]), "schedule": str(entry.get("schedule", AUTO)),
    }  # fmt: skip


def _rows(ranges: list[list[int]], out: int, place: str) -> list[int]:
    rows: list[int] = []
    for start, stop in ((int(a), int(b)) for a, b in ranges):
        if not (rows[-1] + 1 if rows else 0) <= start < stop <= out:
            reason = f"its rows {start}:{stop} are no rows of {out} features"
            refuse(place, reason, ITS_BASE)
        rows += range(start, stop)
    assert rows, "it has a part of no rows"
    return rows


def _read_peft(model: nn.Module, folder: Folder) -> list[_Saved]:
    """The adapters that PEFT's config puts into this model, with their tensors."""
    config, rest, saved = folder.config, dict(folder.tensors), []
    if config["peft_type"] == OWN:
        refuse(folder.tensor(HEADER), "the header is missing", "save the adapter again")
    peft_format.check_options(folder)
    targeted = list(peft_format.targeted_layers(Modules(model), folder))
    if not targeted:
        reason = f"{config.get('target_modules')!r} matches no module of this {type(model).__name__}"
        refuse(folder.option("target_modules"), reason, ITS_BASE)
    if why := peft_format.why_not_together([layer for _, layer in targeted], bool(config.get("fan_in_fan_out"))):
        refuse(folder.option("fan_in_fan_out"), why, peft_format.TRAIN)
    if config["peft_type"] == ADALORA:
        for name, layer in targeted:
            own = _read_adalora(name, layer, folder)
            saved += [own] if own.settings["rank"] else []  # its training may have left nothing of a layer
            for key in layer.adalora_keys.values():
                del rest[key]
        peft_format.check_rest(model, rest, folder)
        return saved
    kind, targets = kind_named("dora" if config.get("use_dora") else "lora"), [layer.target for _, layer in targeted]
    ranks, alphas = peft_format.ranks(folder, targets), peft_format.alphas(folder, targets)
    for name, layer in targeted:
        if kind.name == "dora" and (why := layer.why_not_dora):
            refuse(f"{folder.option('use_dora')}: {name}", why, peft_format.TRAIN)
        delta = layer.decode(folder, ranks[layer.target])
        theta = {"A": delta.A, "B": delta.B, **(layer.sizes(folder) if kind.name == "dora" else {})}
        for key in (*layer.keys, *([layer.magnitude] if kind.name == "dora" else [])):
            del rest[key]
        if layer.times > 1 and peft_format.release(config) > peft_format.SPOKEN and bool(delta.B.any()):
            reason = f"PEFT {config['peft_version']} wrote it; up to 0.21 PEFT adds the delta of {name} twice, and now?"
            refuse(folder.option("peft_version"), reason, "merge it into its base with PEFT (merge_and_unload)")
        settings = {
            "rank": delta.rank,
            "alpha": float(alphas[layer.target]) * layer.times,
            "scaling": "rslora" if config.get("use_rslora") else "standard",
            # PEFT drops nothing on embeddings and attention
            "dropout": 0.0 if layer.kind in ("embedding", "attention") else float(config.get("lora_dropout") or 0.0),
        }
        saved.append(_Saved((name,), kind, theta, layer.layout, None, settings, folder.tensor(layer.keys[0])))
    peft_format.check_rest(model, rest, folder)
    return saved


def _read_adalora(name: str, layer: Layer, folder: Folder) -> _Saved:
    """One weight's, with the scale that it has in PEFT."""
    theta, config = layer.adalora(folder), folder.config
    rank = len(theta["singular"])
    settings = {
        "rank": rank,
        "alpha": peft_format.adalora_scale(config) * rank,
        "dropout": float(config.get("lora_dropout") or 0.0),
    }
    place = folder.tensor(layer.adalora_keys["singular"])
    return _Saved((name,), kind_named("adalora"), theta, layer.layout, None, settings, place)
