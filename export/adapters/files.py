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
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lora_fx.analysis.rules import Rule
from lora_fx.changes import changing
from lora_fx.deltas.adapter import Adapter
from lora_fx.deltas.schedules import AUTO
from lora_fx.export.adapters.folder import (
    CONFIG,
    HEADER,
    OWN,
    PEFT,
    TENSORS,
    VERSION,
    find_folder,
    pack,
    read_config,
    refuse,
    to_json,
    unpack,
    write_folder,
)  # fmt: skip
from lora_fx.export.adapters.peft import (
    SPOKEN,
    Factors,
    Layer,
    Modules,
    alpha_of,
    check_options,
    check_rest,
    check_shapes,
    meaning,
    rank_of,
    release,
    targeted_layers,
    turned,
    why_not_together,
)  # fmt: skip
from lora_fx.graph.forms import FORMS, Call
from lora_fx.graph.layout import Layout
from lora_fx.graph.program import Program, Use, Weight
from lora_fx.graph.views import View
from lora_fx.model import wiring
from lora_fx.model.inventory import inventory
from lora_fx.passes.insert import Insert
from lora_fx.passes.planning import Plan, Row, plan_rows, read_program

OWN_FORMAT = "save_adapter(..., peft=False) writes a folder that lora_fx can load and PEFT refuses"


# ── save ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class _Held:
    """An adapter in the model, and every name of its weight that reads with it."""

    adapter: Adapter
    weights: tuple[str, ...]
    part: str

    @property
    def whole(self) -> Factors:
        A, B = self.adapter.A.detach().cpu(), self.adapter.B.detach()
        return A, self.adapter.whole(B).cpu()

    def entry(self) -> dict[str, Any]:
        a = self.adapter
        return {
            "weights": list(self.weights), "part": self.part, "role": a.role, "sides": a.layout.sides, "rank": a.rank,
            "alpha": a.alpha, "scaling": a.scaling, "dropout": a.dropout.p, "rows": _ranges(a.rows),
            "schedule": a.schedule,
        }  # fmt: skip


def save_adapter(model: nn.Module, path: str | os.PathLike, name: str = "default", *, peft: bool = True) -> None:
    """Write the adapter of this name into a folder that PEFT and `load_adapter` read.

    The folder is new or old in one step; files of other names in it stay. Only safetensors is written, never pickle.
    Weights have the names of the model that `torch.compile`, DDP, FSDP or a checkpoint wrapper was put around.

    Args:
        path: the folder; made if it is not there.
        name: the adapter's name in the model.
        peft: write PEFT's format, and refuse what it cannot say. ``False`` writes any adapter in lora_fx's own, which
            PEFT refuses to read.

    Raises:
        FileError: there is no such adapter, a factor is not finite, or PEFT would compute something else; nothing has
            been written then.
    """
    if isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
        model = model.module
    held = _held(model, name)
    config, tensors, entries = _as_peft(model, held, name) if peft else _as_own(held)
    header = {"version": VERSION, "name": name, "config": meaning(config), "adapters": entries}
    write_folder(Path(path), to_json(config, indent=2), pack(tensors, header))


def _held(model: nn.Module, name: str) -> list[_Held]:
    found: dict[Adapter, list[str]] = {}
    parts: dict[Adapter, str] = {}
    names = []
    for path, _, child, adapter in wiring.find_adapters(model):
        names.append(adapter.name)
        if adapter.name != name:
            continue
        attribute = wiring.attribute_of(child)
        found.setdefault(adapter, []).append(f"{wiring.plain_path(path)}.{attribute}".lstrip("."))
        parts[adapter] = child.removeprefix(wiring.child_name(attribute, name)).lstrip("_")
    if not found:
        refuse(
            type(model).__name__,
            f"there is no adapter named {name!r}",
            f"it has {', '.join(sorted(set(names))) or 'none'}; unfold a folded model first",
        )
    held = [_Held(adapter, tuple(weights), parts[adapter]) for adapter, weights in found.items()]
    for h in held:
        for label, factor in (("A", h.adapter.A), ("B", h.adapter.B)):
            _check_saveable(factor, f"{h.weights[0]}, {label} of adapter {name!r}")
    return held


def _check_saveable(factor: torch.Tensor, place: str) -> None:
    if factor.is_meta:
        refuse(place, "it is on meta and has no numbers", "materialise the model first")
    if wiring.is_shard(factor):
        how = "in all processes unshard() every FSDPModule, or enter FullyShardedDataParallel.summon_full_params(model)"
        refuse(place, "it is sharded", f"{how}; then save in one of them")
    if not bool(factor.isfinite().all()):
        refuse(place, "it holds NaN or Inf", "save an earlier checkpoint of the adapter")


def _as_own(held: list[_Held]) -> tuple[dict, dict[str, torch.Tensor], list[dict]]:
    """The factors as they are."""
    tensors, entries = {}, []
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


def _as_peft(model: nn.Module, held: list[_Held], name: str) -> tuple[dict, dict[str, torch.Tensor], list[dict]]:
    """PEFT's config and tensors. Adapters with one target share its rank and its scale."""
    modules = Modules(model)
    _refuse_outside_reads(model, name)
    names = [weight for h in held for weight in h.weights]
    for weight in names:
        if why := modules.why_not(weight, modules.is_raw(weight)):
            refuse(weight, why, OWN_FORMAT)
    raw = [weight for weight in names if modules.is_raw(weight)]
    targets: dict[str, dict[Layer, list[_Held]]] = {}
    for h in held:
        for weight in h.weights:
            layer = modules.layer(weight, raw)
            targets.setdefault(layer.target, _attention_layers(modules, layer)).setdefault(layer, []).append(h)
    tensors: dict[str, torch.Tensor] = {}
    slots: dict[tuple[_Held, Layer], tuple[int, int]] = {}
    scales: dict[str, tuple[int, float]] = {}
    rslora = all(h.adapter.scaling == "rslora" for h in held)
    for target, layers in targets.items():
        rank, alpha = scales[target] = _shared_scale(layers, rslora)
        scale = alpha / (math.sqrt(rank) if rslora else rank)
        for layer, members in layers.items():
            tensors.update(_joined(layer, members, rank, scale, slots))
    entries = []
    for h in held:
        start, shift = slots[h, modules.layer(h.weights[0], raw)]
        entries.append({**h.entry(), "start": start, "shift": shift})
    return _config(modules, targets, scales, rslora), tensors, entries


def _attention_layers(modules: Modules, layer: Layer) -> dict[Layer, list[_Held]]:
    """PEFT always adapts both projections of a MultiheadAttention: one that has no adapter gets zeros."""
    if layer.kind != "attention":
        return {}
    return {modules.layer(f"{layer.target}.{w}", ()): [] for w in ("in_proj_weight", "out_proj.weight")}


def _refuse_outside_reads(model: nn.Module, name: str) -> None:
    """PEFT adapts calls of a module; a module around it that reads the weight itself goes past that."""
    for path, module in model.named_modules():
        if not wiring.is_reader(module):
            continue
        found = re.search(rf"(?<!self)\.(\w+){wiring.child_name('', name)}\w*\.[AB]\b", wiring.show(module))
        if found:
            refuse(
                path or type(model).__name__,
                f"its forward reads the {found[1]} of a module inside it, and PEFT adapts only calls of that module",
                OWN_FORMAT,
            )


def _shared_scale(layers: Mapping[Layer, list[_Held]], rslora: bool) -> tuple[int, float]:
    """One rank and one alpha for all adapters of a target."""
    members = [h.adapter for group in layers.values() for h in group]
    rank = max(sum(h.adapter.rank for h in group) for group in layers.values())
    first = members[0]
    if rank == first.rank and (first.scaling == "rslora") == rslora:
        return rank, first.alpha
    return rank, first.scale * (math.sqrt(rank) if rslora else rank)


def _joined(
    layer: Layer, members: list[_Held], rank: int, scale: float, slots: dict[tuple[_Held, Layer], tuple[int, int]]
) -> dict[str, torch.Tensor]:
    """PEFT's two tensors for a layer: its adapters side by side along the rank, zeros up to `rank`."""
    dtype = members[0].adapter.dtype if members else torch.float32
    A = torch.zeros(layer.layout.shape_of("A", rank), dtype=dtype)
    B = torch.zeros(layer.layout.shape_of("B", rank), dtype=dtype)
    start = 0
    for h in members:
        factors = turned(*h.whole, h.adapter.layout.sides, layer.sides)
        if factors is None:
            refuse(
                h.weights[0],
                f"the model reads it as {h.adapter.layout.sides!r} (o: out, i: in, b: batch), PEFT as {layer.sides!r}",
                OWN_FORMAT,
            )
        a, b = factors
        shift = _power_of_two(h, scale * layer.times, b)
        stop = start + h.adapter.rank
        A[..., start:stop, :], B[..., start:stop] = a, torch.ldexp(b, torch.tensor(shift))
        slots[h, layer] = start, shift
        start = stop
    return dict(zip(layer.keys, layer.encode(A, B), strict=True))


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
            f"give the parts of one weight the same alpha / rank, or {OWN_FORMAT}",
        )
    return near


def _config(
    modules: Modules,
    targets: Mapping[str, Mapping[Layer, list[_Held]]],
    scales: Mapping[str, tuple[int, float]],
    rslora: bool,
) -> dict[str, Any]:
    layers = [layer for group in targets.values() for layer in group]
    kinds = {layer.kind for layer in layers}
    parameters = [layer.target for layer in layers if layer.kind == "parameter"]
    if why := why_not_together(layers, False):
        refuse(next(layer.target for layer in layers if layer.kind == "conv1d"), why, OWN_FORMAT)
    (rank, alpha), _ = Counter(scales.values()).most_common(1)[0]
    return {
        "peft_type": PEFT,
        "peft_version": ".".join(map(str, SPOKEN)),
        "task_type": None,
        "base_model_name_or_path": getattr(modules.model, "name_or_path", None) or None,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": _number(alpha),
        "lora_dropout": _shared_dropout(targets),
        "use_rslora": rslora,
        "bias": "none",
        "fan_in_fan_out": "conv1d" in kinds and "linear" not in kinds,
        "target_modules": _target_modules(modules, [t for t in targets if t not in parameters]),
        "target_parameters": _target_parameters(modules, parameters) or None,
        "rank_pattern": {_exactly(t): r for t, (r, _) in scales.items() if r != rank},
        "alpha_pattern": {_exactly(t): _number(a) for t, (_, a) in scales.items() if a != alpha},
        "init_lora_weights": True,
    }


def _exactly(path: str) -> str:
    """A pattern key for this path alone: PEFT allows any prefix before a key, and ``lin`` would match ``block.lin``."""
    return "^" + re.escape(path)


def _target_modules(modules: Modules, targets: list[str]) -> list[str] | str:
    """Full paths; where one of them is also the end of another module's path, a pattern of full paths."""
    others = [path for path in modules.by_path if path not in targets]
    if any(path.endswith(f".{target}") for path in others for target in targets):
        return "|".join(re.escape(target) for target in targets)
    return targets


def _target_parameters(modules: Modules, parameters: list[str]) -> list[str]:
    others = [name for name in modules.parameters if name not in parameters]
    for parameter in parameters:
        clash = next((name for name in others if name.endswith(f".{parameter}")), None)
        if clash:
            refuse(parameter, f"PEFT's target_parameters would take {clash} too: it ends in the same words", OWN_FORMAT)
    return parameters


def _shared_dropout(targets: Mapping[str, Mapping[Layer, list[_Held]]]) -> float:
    """PEFT has one dropout for all layers, drops nothing on embeddings and attention, and refuses it on parameters."""
    pairs = [(layer, h) for group in targets.values() for layer, members in group.items() for h in members]
    seen = {h.adapter.dropout.p: layer for layer, h in pairs if layer.kind not in ("embedding", "attention")}
    if len(seen) > 1:
        refuse(
            seen[max(seen)].target,
            f"PEFT keeps one dropout for all layers, and these have {', '.join(f'{p:g}' for p in sorted(seen))}",
            f"give all rules the same dropout, or {OWN_FORMAT}",
        )
    dropout = next(iter(seen), 0.0)
    parameter = next((layer.target for layer, _ in pairs if layer.kind == "parameter"), None)
    if dropout and parameter:
        refuse(
            parameter,
            f"dropout={dropout:g} on a raw parameter, which PEFT cannot drop",
            f"set dropout=0, or {OWN_FORMAT}",
        )
    return dropout


def _number(value: float) -> int | float:
    """Whole numbers as integers, as PEFT types them."""
    return int(value) if float(value).is_integer() else value


# ── load ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class _Saved:
    """An adapter out of a file."""

    weights: tuple[str, ...]
    A: torch.Tensor
    B: torch.Tensor
    sides: str
    alpha: float
    scaling: str
    place: str
    """The file and the key, for errors."""
    dropout: float = 0.0
    ranges: tuple[tuple[int, int], ...] | None = None
    role: str = ""
    part: str = ""
    schedule: str = AUTO

    @property
    def rank(self) -> int:
        return self.B.shape[-1]


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
    folder = find_folder(Path(path))
    config = read_config(folder / CONFIG)
    tensors, header = unpack(folder)
    read = _read_own if header else _read_peft
    with changing(model, "load_adapter"):
        with wiring.unwired(model):
            saved = read(model, folder, config, tensors, header)
            name = name or (header["name"] if header else "default")
            _refuse_name(model, name)
            plan = _plan(model, saved, example_inputs, name)
        return Insert(plan, check)()


def _refuse_name(model: nn.Module, name: str) -> None:
    if not isinstance(name, str) or not name.isidentifier():
        refuse("name", f"{name!r} is no identifier", "name the adapter with letters, digits and _")
    if inventory(model).folded:
        refuse(type(model).__name__, "it is folded", "lora_fx.unfold(model) first, or load into a fresh model")
    if any(adapter.name == name for *_, adapter in wiring.find_adapters(model)):
        refuse(
            type(model).__name__,
            f"it already has an adapter named {name!r}",
            f"pass another name to load_adapter, or lora_fx.remove(model, {name!r}) first",
        )


def _plan(model: nn.Module, saved: list[_Saved], example_inputs: Any, name: str) -> Plan:
    program = read_program(model, example_inputs)
    weights = {n: w for w in program.weights for n in w.names}
    for s in saved:
        _check_target(s, weights)
    rows = [_row(program, s, weights[s.weights[0]]) for s in _shared(saved, weights)]
    return plan_rows(program, tuple(row.rule for row in rows), name, rows)


def _check_target(s: _Saved, weights: Mapping[str, Weight]) -> None:
    weight = weights[s.weights[0]]
    if any(weights[n] is not weight for n in s.weights):
        refuse(
            s.place,
            f"it adapts one weight under the names {', '.join(s.weights)}, which this model does not tie",
            "load the base model it was made for, with its weights tied",
        )
    if not weight.uses:  # unseen by the inputs: then the file says how it is read
        call = Call(FORMS["matmul"], None, None, s.sides)
        path = s.weights[0].rpartition(".")[0]
        weight.uses.append(Use(weight, None, View.of(weight.shape), path, call))  # type: ignore[arg-type]


def _shared(saved: list[_Saved], weights: Mapping[str, Weight]) -> list[_Saved]:
    """PEFT keeps an adapter for each module; equal ones on modules that share the weight are one."""
    kept: list[_Saved] = []
    for s in saved:
        for k, other in enumerate(kept):
            if weights[other.weights[0]] is weights[s.weights[0]] and _same(other, s):
                kept[k] = replace(other, weights=(*other.weights, *s.weights))
                break
        else:
            kept.append(s)
    return kept


def _same(a: _Saved, b: _Saved) -> bool:
    settings = [(s.alpha, s.scaling, s.rank, s.ranges) for s in (a, b)]
    other = turned(b.A, b.B, b.sides, a.sides)
    return settings[0] == settings[1] and other is not None and all(map(torch.equal, (a.A, a.B), other))


def _row(program: Program, s: _Saved, weight: Weight) -> Row:
    layout = weight.layout
    rows = _rows_of(s, layout)
    A, B = _oriented(s, layout, rows)
    modules = dict(program.model.named_modules(remove_duplicate=False))
    owners = tuple((n.rpartition(".")[0], n.rpartition(".")[2]) for n in s.weights)
    mine = {(id(modules[path]), attribute) for path, attribute in owners}
    others = [n.rpartition(".") for n in weight.names]
    outside = {path for path, _, attribute in others if (id(modules[path]), attribute) not in mine}
    uses = tuple(u for u in weight.uses if u.module not in outside)
    settings = {"rank": s.rank, "alpha": s.alpha, "dropout": s.dropout, "scaling": s.scaling}
    rule = Rule(where=weight.name, init=_copier(A, B), schedule=s.schedule, **settings)  # type: ignore[arg-type]
    row = Row(weight, rule, s.role, s.part, rows, uses, owners, bool(outside), stored=True)
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
            refuse(s.place, reason, "load the base model it was made for")
        last = stop
    return tuple(row for start, stop in s.ranges for row in range(start, stop))


def _oriented(s: _Saved, layout: Layout, rows: tuple[int, ...] | None) -> Factors:
    """The factors in the axes in which this model reads the weight."""
    factors = turned(s.A, s.B, s.sides, layout.sides)
    if factors is None or (rows is not None and s.sides != layout.sides):
        refuse(
            s.place,
            f"it reads the weight's axes as {s.sides!r} (o: out, i: in, b: batch), the model as {layout.sides!r}",
            "load the base model it was made for, with example inputs that run as they did there",
        )
    A, B = factors
    shape_b = layout.shape_of("B", s.rank) if rows is None else (*layout.batch, len(rows), s.rank)
    for label, factor, want in (("A", A, layout.shape_of("A", s.rank)), ("B", B, shape_b)):
        if tuple(factor.shape) != want:
            refuse(
                s.place,
                f"{label} has the shape {tuple(factor.shape)}, and {s.weights[0]} wants {want}",
                "load the base model it was made for",
            )
    return A, B


def _copier(A: torch.Tensor, B: torch.Tensor) -> Callable[[torch.Tensor, torch.Tensor], None]:
    def from_file(a: torch.Tensor, b: torch.Tensor) -> None:
        a.copy_(A)
        b.copy_(B)

    return from_file


# ── what save_adapter wrote ──────────────────────────────────────────────────────────────────────────────────────────


def _read_own(
    model: nn.Module, folder: Path, config: dict, tensors: dict[str, torch.Tensor], header: dict
) -> list[_Saved]:
    """The adapters, by the header of the tensor file."""
    for key, value in header["config"].items():
        if config.get(key) != value:
            refuse(
                f"{folder / CONFIG}, {key}",
                f"it says {config.get(key)!r}, and {TENSORS} was written with {value!r}",
                "restore both files of one save; a change of settings is saved from the model",
            )
    own = config["peft_type"] == OWN
    if not own:
        check_options(config, folder / CONFIG)
    modules = Modules(model)
    place = f"{folder / TENSORS}, {HEADER}"
    names = [name for entry in header["adapters"] for name in entry["weights"]]
    for name in names:
        path, _, attribute = name.rpartition(".")
        parameter = modules.by_path[path]._parameters.get(attribute) if path in modules.by_path else None
        if parameter is None or parameter.ndim < 2:
            near = difflib.get_close_matches(name, modules.parameters, 3)
            refuse(
                place,
                f"the model has no weight {name!r}",
                f"load the base model it was made for; near: {', '.join(near) or 'none'}",
            )
    raw = [name for name in names if not own and modules.is_raw(name)]
    try:
        return [_entry(modules, entry, tensors, raw, config, folder) for entry in header["adapters"]]
    except (ArithmeticError, AssertionError, LookupError, RuntimeError, TypeError, ValueError) as error:
        refuse(place, f"its header does not describe its tensors: {error!r}", "save the adapter again", error)


def _entry(
    modules: Modules, entry: dict, tensors: dict[str, torch.Tensor], raw: list[str], config: dict, folder: Path
) -> _Saved:
    name, rank = entry["weights"][0], int(entry["rank"])
    ranges = None if entry["rows"] is None else tuple((int(a), int(b)) for a, b in entry["rows"])
    sides = str(entry["sides"])
    if "keys" in entry:
        key = entry["keys"][0]
        A, B = (tensors[k] for k in entry["keys"])
    else:
        layer = modules.layer(name, raw)
        key = layer.keys[0]
        start, stop = int(entry["start"]), int(entry["start"]) + rank
        total = rank_of(config, layer.target)
        check_shapes(layer, total, tensors, folder)
        A, B = layer.decode(*(tensors[k] for k in layer.keys), total)
        A, B = A[..., start:stop, :], torch.ldexp(B[..., start:stop], torch.tensor(-int(entry["shift"])))
        factors = turned(A, B, layer.sides, sides)
        assert factors is not None, f"{sides!r} are no axes of {name}"
        A, B = factors
        if ranges is not None:
            B = torch.cat([B[..., a:b, :] for a, b in ranges], dim=-2)
    parameter = modules.by_path[name.rpartition(".")[0]]._parameters[name.rpartition(".")[2]]
    assert set(sides) <= set("boi") and Layout(sides, tuple(parameter.shape)), f"{sides!r} are no axes of {name}"
    assert B.shape[-1] == rank, f"{name} has rank {B.shape[-1]}, not {rank}"
    assert re.fullmatch(r"\w*", entry["part"]), f"{entry['part']!r} is no part"
    return _Saved(
        tuple(entry["weights"]), A, B, sides, float(entry["alpha"]), entry["scaling"], f"{folder / TENSORS}, {key}",
        float(entry["dropout"]), ranges, str(entry["role"]), str(entry["part"]), str(entry.get("schedule", AUTO)),
    )  # fmt: skip


# ── what PEFT wrote ──────────────────────────────────────────────────────────────────────────────────────────────────


def _read_peft(
    model: nn.Module, folder: Path, config: dict, tensors: dict[str, torch.Tensor], header: None
) -> list[_Saved]:
    """The adapters that PEFT's config puts into this model, with their tensors."""
    if config["peft_type"] == OWN:
        refuse(f"{folder / TENSORS}, {HEADER}", "the header is missing", "save the adapter again")
    check_options(config, folder / CONFIG)
    modules = Modules(model)
    saved, rest = [], dict(tensors)
    targeted = list(targeted_layers(modules, config, folder / CONFIG))
    if not targeted:
        refuse(
            f"{folder / CONFIG}, target_modules",
            f"{config.get('target_modules')!r} matches no module of this {type(model).__name__}",
            "load the base model it was made for",
        )
    if why := why_not_together([layer for _, layer in targeted], bool(config.get("fan_in_fan_out"))):
        refuse(f"{folder / CONFIG}, fan_in_fan_out", why, "train it with lora_fx.apply, which computes W + s·B·A there")
    for name, layer in targeted:
        rank = rank_of(config, layer.target)
        check_shapes(layer, rank, tensors, folder)
        A, B = layer.decode(*(rest.pop(key) for key in layer.keys), rank)
        if layer.times > 1 and release(config) > SPOKEN and bool(B.any()):
            refuse(
                f"{folder / CONFIG}, peft_version",
                f"PEFT {config['peft_version']} wrote it; up to 0.21 PEFT adds the delta of {name} twice, and now?",
                "merge it into its base with PEFT (merge_and_unload)",
            )
        alpha = alpha_of(config, layer.target) * layer.times
        scaling = "rslora" if config.get("use_rslora") else "standard"
        # PEFT drops nothing on embeddings and attention
        dropout = 0.0 if layer.kind in ("embedding", "attention") else float(config.get("lora_dropout") or 0.0)
        place = f"{folder / TENSORS}, {layer.keys[0]}"
        saved.append(_Saved((name,), A, B, layer.sides, alpha, scaling, place, dropout))
    check_rest(model, rest, folder)
    return saved
