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
import math
import os
import re
import sys
import warnings
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lora_fx.analysis.rules import Rule
from lora_fx.deltas.adapter import Adapter
from lora_fx.deltas.schedules import AUTO
from lora_fx.export.adapters import peft as peft_format
from lora_fx.export.adapters.folder import (
    HEADER,
    OWN,
    PEFT,
    TENSORS,
    VERSION,
    Folder,
    read_folder,
    refuse,
    write_folder,
)
from lora_fx.export.adapters.peft import Factors, Layer, Modules
from lora_fx.graph.forms import FORMS, Call
from lora_fx.graph.layout import Layout
from lora_fx.graph.program import Program, Use, Weight
from lora_fx.model.classes import show, unwired
from lora_fx.model.inventory import Place, inventory, is_shard, plain_path, weight_name
from lora_fx.model.marks import child_name, is_reader
from lora_fx.passes.base import Facts, Pass, Result, given
from lora_fx.passes.insert import Check, Insert, Rewrite
from lora_fx.passes.pipeline import Pipeline
from lora_fx.passes.planning import Plan, Row, Schedule, plan_rows, read_program

_OWN_FORMAT = "save_adapter(..., peft=False) writes a folder that lora_fx can load and PEFT refuses"
_ITS_BASE = "load the base model it was made for"


# ── save ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class _Held:
    """An adapter in the model, and every name of its weight that reads with it."""

    adapter: Adapter
    weights: tuple[str, ...]
    part: str

    def turned(self, layer: Layer) -> Factors:
        """The factors of all rows, in the layer's axes."""
        delta = self.adapter.low_rank().detached()
        turned = Factors(delta.A.cpu(), delta.whole.cpu(), delta.layout.sides).turned(layer.sides)
        if turned is None:
            reason = f"the model reads it as {delta.layout.sides!r} (o: out, i: in, b: batch), PEFT as {layer.sides!r}"
            refuse(self.weights[0], reason, _OWN_FORMAT)
        return turned

    def entry(self) -> dict[str, Any]:
        a = self.adapter
        return {
            "weights": list(self.weights), "part": self.part, "role": a.role, "sides": a.layout.sides, "rank": a.rank,
            "alpha": a.alpha, "scaling": a.scaling, "dropout": a.dropout.p, "rows": _ranges(a.rows),
            "schedule": a.schedule,
        }  # fmt: skip


@dataclass(frozen=True)
class _Target:
    """What PEFT is told to adapt, with the adapters in each of its layers: they share one rank and one alpha."""

    layers: Mapping[Layer, list[_Held]]
    rslora: bool

    @property
    def rank(self) -> int:
        return max(sum(h.adapter.rank for h in group) for group in self.layers.values())

    @property
    def alpha(self) -> float:
        """Whole numbers as integers, as PEFT types them."""
        first = next(h.adapter for group in self.layers.values() for h in group)
        own = self.rank == first.rank and (first.scaling == "rslora") == self.rslora
        alpha = first.alpha if own else first.scale * self._divisor
        return int(alpha) if float(alpha).is_integer() else alpha

    @property
    def scale(self) -> float:
        return self.alpha / self._divisor

    @property
    def _divisor(self) -> float:
        return math.sqrt(self.rank) if self.rslora else self.rank


_Files = tuple[dict[str, Any], dict[str, torch.Tensor], list[dict[str, Any]]]
"""The config, the tensors, and for each adapter its entry in our header."""


@dataclass(frozen=True)
class _Slot:
    """Where in its layer's factors an adapter lies: from `start` on along the rank, its B 2^shift times as large."""

    start: int
    shift: int


def save_adapter(
    model: nn.Module, path: str | os.PathLike, old: str | None = None, *, name: str = "default", peft: bool = True
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

    Raises:
        AdapterError: there is no such adapter.
        FileError: it is folded, a factor is not finite, or PEFT would compute something else; nothing has been written
            then.
    """
    if old is not None:
        warnings.warn("write save_adapter(model, path, name=…)", DeprecationWarning, stacklevel=2)
        name = old
    if isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
        model = model.module
    held = _held(model, name)
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
    for h in held:
        for label, factor in (("A", h.adapter.A), ("B", h.adapter.B)):
            where = f"{h.weights[0]}, {label} of adapter {name!r}"
            if factor.is_meta:
                refuse(where, "it is on meta and has no numbers", "materialise the model first")
            if is_shard(factor):
                how = "unshard() every FSDPModule, or enter FullyShardedDataParallel.summon_full_params(model)"
                refuse(where, "it is sharded", f"in all processes {how}; then save in one of them")
            if not bool(factor.isfinite().all()):
                refuse(where, "it holds NaN or Inf", "save an earlier checkpoint of the adapter")
    return held


def _as_own(held: list[_Held]) -> _Files:
    """The factors as they are."""
    tensors: dict[str, torch.Tensor] = {}
    entries: list[dict[str, Any]] = []
    for h in held:
        base = ".".join(filter(None, (h.weights[0], h.part)))
        keys = f"{base}.A", f"{base}.B"
        tensors.update(zip(keys, (h.adapter.A.detach().cpu(), h.adapter.B.detach().cpu()), strict=True))
        entries.append({**h.entry(), "keys": keys})
    return {"peft_type": OWN, "lora_fx_version": VERSION}, tensors, entries


def _ranges(rows: tuple[int, ...] | None) -> list[list[int]] | None:
    """Rows as half-open ranges."""
    if rows is None:
        return None
    ranges: list[list[int]] = []
    for row in rows:
        if ranges and ranges[-1][1] == row:
            ranges[-1][1] = row + 1
        else:
            ranges.append([row, row + 1])
    return ranges


def _as_peft(model: nn.Module, held: list[_Held], name: str) -> _Files:
    """PEFT's config and tensors. Adapters with one target share its rank and its scale."""
    modules = Modules(model)
    _refuse_outside_reads(model, name)
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
            layers.setdefault(layer.target, _attention_layers(modules, layer)).setdefault(layer, []).append(h)
    targets = {name: _Target(own, rslora) for name, own in layers.items()}
    tensors: dict[str, torch.Tensor] = {}
    slots: dict[tuple[_Held, Layer], _Slot] = {}
    for target in targets.values():
        for layer in target.layers:
            factors, own = _joined(layer, target)
            tensors.update(layer.encode(factors))
            slots.update(((h, layer), slot) for h, slot in own.items())
    entries = [{**h.entry(), **asdict(slots[h, modules.layer(h.weights[0], raw)])} for h in held]
    return _config(modules, targets, rslora), tensors, entries


def _attention_layers(modules: Modules, layer: Layer) -> dict[Layer, list[_Held]]:
    """PEFT always adapts both projections of a MultiheadAttention: one that has no adapter gets zeros."""
    if layer.kind != "attention":
        return {}
    return {modules.layer(f"{layer.target}.{w}", ()): [] for w in peft_format.ATTENTION}


def _refuse_outside_reads(model: nn.Module, name: str) -> None:
    """PEFT adapts calls of a module; a module around it that reads the weight itself goes past that."""
    for path, module in model.named_modules():
        pattern = rf"(?<!self)\.(\w+){child_name('', name)}\w*\.[AB]\b"
        if is_reader(module) and (found := re.search(pattern, show(module))):
            reads = f"its forward reads the {found[1]} of a module inside it"
            reason = f"{reads}, and PEFT adapts only calls of that module"
            refuse(path or type(model).__name__, reason, _OWN_FORMAT)


def _joined(layer: Layer, target: _Target) -> tuple[Factors, dict[_Held, _Slot]]:
    """A layer's adapters side by side along the rank, with the target's scale, and zeros up to the target's rank."""
    members, slots, start = target.layers[layer], {}, 0
    dtype = next((h.adapter.dtype for h in members), torch.float32)
    A, B = (torch.zeros(layer.layout.shape_of(factor, target.rank), dtype=dtype) for factor in "AB")
    for h in members:
        factors, stop = h.turned(layer), start + h.adapter.rank
        slots[h] = _Slot(start, _power_of_two(h, target.scale * layer.times, factors.B))
        A[..., start:stop, :] = factors.A
        B[..., start:stop] = torch.ldexp(factors.B, torch.tensor(slots[h].shift))
        start = stop
    return Factors(A, B, layer.sides), slots


def _power_of_two(h: _Held, scale: float, B: torch.Tensor) -> int:
    """The n with scale of the adapter = 2ⁿ · scale of the target: only 2ⁿ goes into B, and out of it, without loss."""
    own = h.adapter.scale
    ratio = own / scale if scale else (1.0 if own == 0 else math.nan)
    near = round(math.log2(ratio)) if ratio > 0 else 0
    exact = abs(ratio - 2.0**near) <= 4 * sys.float_info.epsilon * 2.0**near
    there = torch.ldexp(B, torch.tensor(near))
    if not (exact and torch.equal(torch.ldexp(there, torch.tensor(-near)), B)):
        refuse(
            h.weights[0],
            f"alpha={h.adapter.alpha:g} at rank={h.adapter.rank} is a scale of {own:g}, and PEFT keeps one for all of "
            f"it: {scale:g}, times no power of two",
            f"give the parts of one weight the same alpha / rank, or {_OWN_FORMAT}",
        )
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
        "bias": "none",
        "fan_in_fan_out": "conv1d" in kinds and "linear" not in kinds,
        "target_modules": _target_modules(modules, [t for t in targets if t not in parameters]),
        "target_parameters": parameters or None,
        "rank_pattern": {key: t.rank for key, t in exactly.items() if t.rank != rank},
        "alpha_pattern": {key: t.alpha for key, t in exactly.items() if t.alpha != alpha},
        "init_lora_weights": True,
    }


def _target_modules(modules: Modules, targets: list[str]) -> list[str] | str:
    """Full paths; where one of them is also the end of another module's path, a pattern of full paths."""
    others = [path for path in modules.by_path if path not in targets]
    if any(path.endswith(f".{target}") for path in others for target in targets):
        return "|".join(re.escape(target) for target in targets)
    return targets


def _shared_dropout(targets: Mapping[str, _Target]) -> float:
    """PEFT has one dropout for all layers, drops nothing on embeddings and attention, and refuses it on parameters."""
    pairs = [(layer, h) for t in targets.values() for layer, members in t.layers.items() for h in members]
    seen = {h.adapter.dropout.p: layer for layer, h in pairs if layer.kind not in ("embedding", "attention")}
    if len(seen) > 1:
        refuse(
            seen[max(seen)].target,
            f"PEFT keeps one dropout for all layers, and these have {', '.join(f'{p:g}' for p in sorted(seen))}",
            f"give all rules the same dropout, or {_OWN_FORMAT}",
        )
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
    factors: Factors
    alpha: float
    scaling: str
    place: str
    """For errors."""
    dropout: float = 0.0
    ranges: tuple[tuple[int, int], ...] | None = None
    role: str = ""
    part: str = ""
    schedule: str = AUTO


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
            saved = _read_own(model, folder, folder.header) if folder.header else _read_peft(model, folder)
            name = self.adapter or (folder.header["name"] if folder.header else "default")
            _refuse_name(model, name)
            program = read_program(model, self.example_inputs)
            weights = {n: w for w in program.weights for n in w.names}
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
        refuse(s.place, reason, f"{_ITS_BASE}, with its weights tied")
    if not weight.uses:  # unseen by the inputs: then the file says how it is read
        call = Call(FORMS["matmul"], None, None, s.factors.sides)
        path = s.weights[0].rpartition(".")[0]
        weight.uses.append(Use.unseen(weight, path, call))


def _shared(saved: list[_Saved], weights: Mapping[str, Weight]) -> list[_Saved]:
    """PEFT keeps an adapter for each module; equal ones on modules that share the weight are one."""
    kept: list[_Saved] = []
    for s in saved:
        for k, other in enumerate(kept):
            first, second = ((x.alpha, x.scaling, x.factors.rank, x.ranges) for x in (other, s))
            one = weights[other.weights[0]] is weights[s.weights[0]] and first == second
            if one and other.factors.equals(s.factors):
                kept[k] = replace(other, weights=(*other.weights, *s.weights))
                break
        else:
            kept.append(s)
    return kept


def _row(program: Program, s: _Saved, weight: Weight) -> Row:
    layout = weight.layout
    rows = _rows_of(s, layout)
    factors = _oriented(s, layout, rows)
    modules = dict(program.model.named_modules(remove_duplicate=False))
    owners = tuple((n.rpartition(".")[0], n.rpartition(".")[2]) for n in s.weights)
    mine = {(id(modules[path]), attribute) for path, attribute in owners}
    others = [n.rpartition(".") for n in weight.names]
    outside = {path for path, _, attribute in others if (id(modules[path]), attribute) not in mine}
    uses = tuple(u for u in weight.uses if u.module not in outside)
    settings = {"rank": factors.rank, "alpha": s.alpha, "dropout": s.dropout, "scaling": s.scaling}
    rule = Rule(where=weight.name, schedule=s.schedule, **settings)  # type: ignore[arg-type]
    stored = {"A": factors.A, "B": factors.B}
    row = Row(weight, rule, s.role, s.part, rows, uses, owners, bool(outside), stored=stored)
    if row.why_not(s.schedule):  # in a model of another dtype, say
        row.rule = replace(rule, schedule=AUTO)
    return row


def _rows_of(s: _Saved, layout: Layout) -> tuple[int, ...] | None:
    if s.ranges is None:
        return None
    out, last = layout.size("o"), 0
    for start, stop in s.ranges:
        if not last <= start < stop <= out:
            reason = f"its rows {start}:{stop} are no rows of {out} features"
            refuse(s.place, reason, _ITS_BASE)
        last = stop
    return tuple(row for start, stop in s.ranges for row in range(start, stop))


def _oriented(s: _Saved, layout: Layout, rows: tuple[int, ...] | None) -> Factors:
    """The factors in the axes in which this model reads the weight."""
    sides, rank, factors = s.factors.sides, s.factors.rank, s.factors.turned(layout.sides)
    if factors is None or (rows is not None and sides != layout.sides):
        refuse(
            s.place,
            f"it reads the weight's axes as {sides!r} (o: out, i: in, b: batch), the model as {layout.sides!r}",
            f"{_ITS_BASE}, with example inputs that run as they did there",
        )
    shape_b = layout.shape_of("B", rank) if rows is None else (*layout.batch, len(rows), rank)
    for label, factor, want in (("A", factors.A, layout.shape_of("A", rank)), ("B", factors.B, shape_b)):
        if tuple(factor.shape) != want:
            reason = f"{label} has the shape {tuple(factor.shape)}, and {s.weights[0]} wants {want}"
            refuse(s.place, reason, _ITS_BASE)
    return factors


def _read_own(model: nn.Module, folder: Folder, header: dict[str, Any]) -> list[_Saved]:
    """The adapters, by the header of the tensor file."""
    config = folder.config
    for key, value in header["config"].items():
        if config.get(key) != value:
            reason = f"it says {config.get(key)!r}, and {TENSORS} was written with {value!r}"
            remedy = "restore both files of one save; a change of settings is saved from the model"
            refuse(folder.option(key), reason, remedy)
    own = config["peft_type"] == OWN
    if not own:
        peft_format.check_options(folder)
    modules, place = Modules(model), folder.tensor(HEADER)
    names = [name for entry in header["adapters"] for name in entry["weights"]]
    for name in names:
        parameter = modules.parameter(name)
        if parameter is None or parameter.ndim < 2:
            near = difflib.get_close_matches(name, modules.parameters, 3)
            refuse(place, f"the model has no weight {name!r}", f"{_ITS_BASE}; near: {', '.join(near) or 'none'}")
    raw = [name for name in names if not own and modules.is_raw(name)]
    try:
        return [_entry(modules, entry, raw, folder) for entry in header["adapters"]]
    except (ArithmeticError, AssertionError, LookupError, RuntimeError, TypeError, ValueError) as error:
        refuse(place, f"its header does not describe its tensors: {error!r}", "save the adapter again", error)


def _entry(modules: Modules, entry: dict[str, Any], raw: list[str], folder: Folder) -> _Saved:
    name, rank = entry["weights"][0], int(entry["rank"])
    ranges = None if entry["rows"] is None else tuple((int(a), int(b)) for a, b in entry["rows"])
    sides = str(entry["sides"])
    if "keys" in entry:
        key, second = entry["keys"]
        factors = Factors(folder.tensors[key], folder.tensors[second], sides)
    else:
        layer = modules.layer(name, raw)
        key = layer.keys[0]
        start, stop = int(entry["start"]), int(entry["start"]) + rank
        total = peft_format.rank_of(folder.config, layer.target)
        peft_format.check_shapes(layer, total, folder)
        whole = layer.decode(folder.tensors, total)
        B = torch.ldexp(whole.B[..., start:stop], torch.tensor(-int(entry["shift"])))
        turned = Factors(whole.A[..., start:stop, :], B, layer.sides).turned(sides)
        assert turned is not None, f"{sides!r} are no axes of {name}"
        B = turned.B if ranges is None else torch.cat([turned.B[..., a:b, :] for a, b in ranges], dim=-2)
        factors = replace(turned, B=B)
    parameter = modules.parameter(name)
    assert parameter is not None and set(sides) <= set("boi"), f"{sides!r} are no axes of {name}"
    assert Layout(sides, tuple(parameter.shape)), f"{sides!r} are no axes of {name}"
    assert factors.rank == rank, f"{name} has rank {factors.rank}, not {rank}"
    assert re.fullmatch(r"\w*", entry["part"]), f"{entry['part']!r} is no part"
    return _Saved(
        tuple(entry["weights"]), factors, float(entry["alpha"]), entry["scaling"], folder.tensor(key),
        float(entry["dropout"]), ranges, str(entry["role"]), str(entry["part"]), str(entry.get("schedule", AUTO)),
    )  # fmt: skip


def _read_peft(model: nn.Module, folder: Folder) -> list[_Saved]:
    """The adapters that PEFT's config puts into this model, with their tensors."""
    config, rest, saved = folder.config, dict(folder.tensors), []
    if config["peft_type"] == OWN:
        refuse(folder.tensor(HEADER), "the header is missing", "save the adapter again")
    peft_format.check_options(folder)
    targeted = list(peft_format.targeted_layers(Modules(model), folder))
    if not targeted:
        reason = f"{config.get('target_modules')!r} matches no module of this {type(model).__name__}"
        refuse(folder.option("target_modules"), reason, _ITS_BASE)
    if why := peft_format.why_not_together([layer for _, layer in targeted], bool(config.get("fan_in_fan_out"))):
        refuse(folder.option("fan_in_fan_out"), why, peft_format.TRAIN)
    for name, layer in targeted:
        rank = peft_format.rank_of(config, layer.target)
        peft_format.check_shapes(layer, rank, folder)
        factors = layer.decode({key: rest.pop(key) for key in layer.keys}, rank)
        if layer.times > 1 and peft_format.release(config) > peft_format.SPOKEN and bool(factors.B.any()):
            refuse(
                folder.option("peft_version"),
                f"PEFT {config['peft_version']} wrote it; up to 0.21 PEFT adds the delta of {name} twice, and now?",
                "merge it into its base with PEFT (merge_and_unload)",
            )
        alpha = peft_format.alpha_of(config, layer.target) * layer.times
        scaling = "rslora" if config.get("use_rslora") else "standard"
        # PEFT drops nothing on embeddings and attention
        dropout = 0.0 if layer.kind in ("embedding", "attention") else float(config.get("lora_dropout") or 0.0)
        saved.append(_Saved((name,), factors, alpha, scaling, folder.tensor(layer.keys[0]), dropout))
    peft_format.check_rest(model, rest, folder)
    return saved
