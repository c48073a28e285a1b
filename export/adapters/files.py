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

import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lora_fx.analysis.biases import Biases
from lora_fx.changes import in_turn
from lora_fx.deltas.adapter import Adapter
from lora_fx.deltas.rewrites import SEPARATOR
from lora_fx.deltas.schedules import AUTO
from lora_fx.export.adapters import dialects
from lora_fx.export.adapters import peft as peft_format
from lora_fx.export.adapters.folder import (
    DIFFUSERS,
    VERSION,
    Folder,
    chosen,
    read_folder,
    write_folder,
    write_single,
)
from lora_fx.export.adapters.own import as_own
from lora_fx.export.adapters.peft import ITS_BASE
from lora_fx.export.adapters.peft_files import as_peft
from lora_fx.export.adapters.replace import Replace
from lora_fx.export.adapters.values import Held, Saved, baked
from lora_fx.graph.forms import FORMS, Call
from lora_fx.graph.layout import Layout
from lora_fx.graph.places import is_shard
from lora_fx.graph.program import Program, Use, Weight, storage_key
from lora_fx.model.behind import blocks_of
from lora_fx.model.classes import unwired
from lora_fx.model.inventory import Inventory, Place, base_parameters, inventory, plain_path, weight_name
from lora_fx.model.training import IGNORE, REFUSE, SAVE, trained_beside, why_not_alone
from lora_fx.passes.base import Facts, Pass, Result, given
from lora_fx.passes.insert import Check, Insert, Rest, Rewrite
from lora_fx.passes.pipeline import Pipeline
from lora_fx.passes.planning import Plan, Row, Schedule, plan_rows, read_program
from lora_fx.reading import boundary, refuse

# ── save ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def save_adapter(
    model: nn.Module,
    path: str | os.PathLike,
    old: str | None = None,
    *,
    name: str = "default",
    peft: bool = True,
    beside: str = SAVE,
    dialect: str | None = None,
    part: str | None = None,
    task_type: str | None = None,
    bake_scales: bool = False,
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
        dialect: ``"kohya"`` or ``"diffusers"``: one safetensors file of theirs, at `path` (for diffusers also the
            folder that it is put into under its usual name).
        part: of a pipeline, which the model is, where the dialect is one of these: ``"unet"``, ``"text_encoder"``, ….
        task_type: PEFT's word for the task, as ``"CAUSAL_LM"``, which its Auto classes want; None for what the class of
            a transformers model says.
        bake_scales: for readers that ignore `rank_pattern` and `alpha_pattern`, as vLLM, or alphas, as diffusers in
            kohya's files: one rank for all, with zeros behind the factors, and one scale, 1; the scale of each goes
            into its B. What is loaded again is that. A scale that is a power of two costs no bit; another rounds each
            element of B once.
        beside: what to do about parameters of the model's own that have ``requires_grad``: ``"save"`` them too, as
            adapters of the kind `full`; ``"refuse"`` to save, naming them; or ``"ignore"`` them.

    Warns:
        UserWarning: PEFT would read the file, and merge it wrongly: an adapter on a weight that modules share; or
            diffusers would read kohya's file wrongly: several alphas.

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
    if dialect is not None and (dialect not in dialects.WRITTEN or not peft):
        refuse("dialect", f"{dialect!r} is none that is written", f"say one of {', '.join(dialects.WRITTEN)}")
    if part is not None and dialect is None:
        refuse("part", f"{part!r}, and a folder of an adapter is for one model", "leave it out, or say a dialect")
    with in_turn():
        held = held_of(model, name)
        if any(why := why_not_alone(model, beside, (SAVE, REFUSE, IGNORE))):
            refuse(*why)
        held += trained_of(model, name) if beside == SAVE else []
        if bake_scales and not peft:
            refuse("bake_scales", "it is for readers of PEFT's format", "leave it out, or peft=False")
        held = [baked(h.plain()) for h in held] if bake_scales else held
        if dialect is not None:
            files = as_peft(model, held, name, one_rank=bake_scales)
            file, single = _single(path, dialect), dialects.written(dialect, model, files, part)
            if dialect == "kohya":
                _say_alphas(single[0])
            write_single(file, *single)
            return
        config, tensors, entries = as_peft(model, held, name, task_type, bake_scales) if peft else as_own(held)
        if peft:
            _say_ties(model, held)
        said = {"version": VERSION, "name": name, "config": peft_format.meaning(config), **about(model)}
        header = {**said, "adapters": entries}
        write_folder(Path(path), config, tensors, header)


def about(model: nn.Module) -> dict[str, Any]:
    """What our header says of the model: where its base has come from, None where it does not say, and who acts."""
    here = inventory(model)
    acting = [name for name in here.names if any(a.active for a in here.adapters if a.name == name)]
    return {"base": getattr(model, "name_or_path", None) or None, "active": acting}


def held_of(model: nn.Module, name: str, finite: bool = True) -> list[Held]:
    """The adapters of this name, each with its weights.

    Args:
        finite: refuse numbers that are not, or not here.
    """
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
        held.append(Held(adapter.fitting(), names, places[0].part, _standing(adapter, here, names[0])))
        for label, factor in adapter.named_parameters() if finite else ():
            _refuse_numbers(f"{names[0]}, {label} of adapter {name!r}", factor)
    return held


def _say_ties(model: nn.Module, held: list[Held]) -> None:
    """PEFT merges the delta of each module into the storage that others read too, or once for each of them."""
    names: dict[Any, list[str]] = {}
    for name, parameter in base_parameters(model).items():
        names.setdefault(storage_key(parameter), []).append(name)
    tied = {name: own for own in names.values() if len(own) > 1 for name in own}
    for h in held:
        if h.adapter.kind.name in peft_format.KINDS and (own := tied.get(h.weights[0])):
            reason = f"{' = '.join(own)} is one weight, with an adapter on {', '.join(h.weights)}"
            remedy = "fold it with lora_fx.fold or lora-fx fold"
            warnings.warn(f"{reason}: PEFT reads the file, and its merge would be wrong; {remedy}", stacklevel=3)


def _say_alphas(tensors: Mapping[str, torch.Tensor]) -> None:
    """diffusers 0.42 looks for the alphas of attention's projections under names that it gives no module, and takes the
    most frequent alpha of the file for them."""
    alphas = {float(tensor) for key, tensor in tensors.items() if key.endswith(".alpha")}
    if len(alphas) > 1:
        reason = f"it has {len(alphas)} alphas, and diffusers reads the projections of attention with one of them"
        warnings.warn(f'{reason}: for diffusers, save with dialect="diffusers" or bake_scales=True', stacklevel=3)


def _standing(adapter: Adapter, here: Inventory, place: str) -> dict[str, str]:
    """The blocks that it stands behind, as this model calls them."""
    if adapter.kind.behind is None:
        return {}
    blocks = blocks_of(adapter, here.modules)
    if gone := [tensor for tensor in adapter.tensors if tensor not in blocks]:
        refuse(place, f"the block that {gone[0]} stands behind is no part of this model", "pass the whole model")
    return {"blocks": SEPARATOR.join(plain_path(here.modules[blocks[tensor]][0]) for tensor in adapter.tensors)}


def _single(path: str | os.PathLike, dialect: str) -> Path:
    """The file that a dialect of one file is written into."""
    file = Path(path)
    if file.suffix != ".safetensors" and dialect == "diffusers":
        return file / DIFFUSERS[0]
    if file.suffix != ".safetensors":
        refuse(str(file), "it does not end in .safetensors", "pass the path of the file")
    return file


def _refuse_numbers(where: str, tensor: torch.Tensor) -> None:
    refuse_absent(where, tensor)
    if not bool(tensor.isfinite().all()):
        refuse(where, "it holds NaN or Inf", "save an earlier checkpoint of the adapter")


def refuse_absent(where: str, tensor: torch.Tensor) -> None:
    """Raise where the numbers are not in this process."""
    if tensor.is_meta:
        refuse(where, "it is on meta and has no numbers", "materialise the model first")
    if is_shard(tensor):
        how = "unshard() every FSDPModule, or enter FullyShardedDataParallel.summon_full_params(model)"
        refuse(where, "it is sharded", f"in all processes {how}; then save in one of them")


def trained_of(model: nn.Module, name: str, finite: bool = True) -> list[Held]:
    """What of the model's own trains, each as the adapter that it will be in the model that loads it."""
    adapted, base, held = inventory(model).by_weight(), base_parameters(model), []
    for names in trained_beside(model):
        parameter = base[names[0]]
        if finite:
            _refuse_numbers(names[0], parameter)
        if own := next((adapted[n] for n in names if n in adapted), None):
            reason = f"it has requires_grad, and the adapter {own[0].name!r} is relative to what it was"
            refuse(names[0], reason, 'freeze it, or say beside="ignore", and save it yourself')
        if not parameter.is_floating_point() or not parameter.ndim:
            reason = f"it has requires_grad, and is {parameter.dtype} {tuple(parameter.shape)}: no kind adapts that"
            refuse(names[0], reason, 'freeze it, or say beside="ignore", and save it yourself')
        layout = Layout("o" * parameter.ndim, tuple(parameter.shape))
        dtype = parameter.dtype if parameter.dtype.itemsize >= 4 else torch.float32
        adapter = Adapter(layout, kind="full", name=name, dtype=dtype)
        adapter.start(parameter.cpu())
        plain = (weight_name(plain_path(path), last) for path, _, last in (n.rpartition(".") for n in names))
        held.append(Held(adapter, tuple(plain), ""))
    return held


# ── load ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def load_adapter(
    model: nn.Module,
    path: str | os.PathLike,
    example_inputs: Any = None,
    *,
    name: str | None = None,
    check: bool = True,
    part: str | None = None,
    config: Mapping[str, Any] | None = None,
    active: bool | None = None,
    max_rank: int | None = None,
) -> nn.Module:
    """Insert an adapter that `save_adapter`, PEFT, kohya, diffusers or loralib has written, in place.

    The first one acts; one that comes to others does not, until `activate` names it, or with ``active=True``.

    Where `name` is that of an adapter in the model, its numbers are replaced: in the same parameters, so that nothing
    is traced or compiled anew. Of a lower rank the rest is zeros; alpha follows the file, strength and schedule stay,
    and so does what an optimizer remembers of the old numbers. On weights that the file has nothing for the adapter
    begins anew, δ = 0; for a further weight it is refused.

    What `save_adapter` wrote comes back bit for bit: factors, scale, rows, roles, dropout. What PEFT wrote means here
    what it means there: an adapter on a module acts where that module reads its weight, and nowhere else. Factors are
    kept in float32 (float64 for float64 weights), beside weights on meta on the CPU: `export_onnx` can fold them.

    Args:
        path: the folder, or one that holds exactly one adapter in a subfolder (where PEFT puts named adapters); or one
            file, in a dialect of `lora_fx.export.adapters.dialects`: safetensors, or what `torch.save` has written.
        example_inputs: as in `apply`.
        name: the adapter's name in the model; None for the name it was saved under (PEFT's: "default").
        check: compare the adapted model with the dense W + s·B·A, as in `apply`; replaced numbers need none.
        part: of a file for several models (a pipeline's), which of them this one is, as ``"unet"``.
        config: what a file that comes without a config does not say, in the words of the library that wrote it: PEFT's
            options, as ``{"lora_alpha": 16}``; for loralib also ``enable_lora``.
        active: whether it acts; None for where it is the only one, or, of one that is replaced, as it did.
        max_rank: make room for adapters of ranks up to this one, which may replace it.

    Returns:
        The same model.

    Raises:
        FileError: a file is missing, damaged, made for another model, or uses what lora_fx does not compute; or it
            cannot replace the adapter: further weights, another kind, a rank for which there is no room.
        LoraFxError: the model cannot be adapted there. The model is bitwise what it was, each time.
    """
    if name is not None and name in inventory(model).names:
        if max_rank is not None:
            refuse(
                "max_rank", f"{max_rank!r}: the adapter {name!r} has the room it has", "leave it out, or remove that"
            )
        replaced = Replace(path, name, part, config, active), Rewrite()
        return Pipeline("load_adapter", replaced)(model).model
    passes = loading(
        path, example_inputs, name=name, check=check, part=part, config=config, active=active, max_rank=max_rank
    )
    return Pipeline("load_adapter", passes)(model).model


def loading(
    path: str | os.PathLike | Folder,
    example_inputs: Any = None,
    *,
    name: str | None = None,
    check: bool = True,
    part: str | None = None,
    config: Mapping[str, Any] | None = None,
    active: bool | None = None,
    max_rank: int | None = None,
) -> tuple[Pass, ...]:
    """The passes of `load_adapter`, of an adapter that is not there yet."""
    return (
        Read(path, example_inputs, name, part, config, max_rank),
        Schedule(),
        Insert(),
        Rewrite(),
        *([Check()] if check else []),
        Rest(active),
    )


@dataclass(frozen=True)
class Read(Pass):
    """Read an adapter's files, and plan where it goes in this model; arguments as in `load_adapter`."""

    path: str | os.PathLike | Folder
    """Or what has been read."""
    example_inputs: Any = None
    adapter: str | None = None
    part: str | None = None
    config: Mapping[str, Any] | None = None
    max_rank: int | None = None

    name = "read"
    ensures = (given(Program), given(Plan))

    def call(self, model: nn.Module, facts: Facts) -> Result:
        if self.max_rank is not None and (type(self.max_rank) is not int or self.max_rank < 1):
            refuse("max_rank", f"{self.max_rank!r} is no rank", "give a positive integer")
        folder = chosen(self.path if isinstance(self.path, Folder) else read_folder(Path(self.path)), self.adapter)
        with unwired(model), boundary("it cannot be put into this model", str(folder.path), ITS_BASE):
            saved = dialects.read(model, folder, self.part, self.config or {})
        name = self.adapter or (folder.header["name"] if folder.header else "default")
        _refuse_name(model, name)
        return planned(model, saved, name, self.example_inputs, self.max_rank)


def planned(
    model: nn.Module, saved: list[Saved], name: str, example_inputs: Any, max_rank: int | None = None
) -> Result:
    """Where in this model adapters go, with their numbers.

    Args:
        max_rank: there is to be room for such ranks; None for their own.
    """
    with unwired(model):
        program = read_program(model, example_inputs)
        weights = _Weights(program)
        for s in saved:
            _check_target(s, weights)
        rows = [_row(program, s, weights.of(s), max_rank) for s in _shared(saved, weights)]
        plan = plan_rows(program, tuple(row.rule for row in rows), name, rows)
    return Result(model, False, (program, plan))


def _refuse_name(model: nn.Module, name: str) -> None:
    if not isinstance(name, str) or not name.isidentifier():
        refuse("name", f"{name!r} is no identifier", "name the adapter with letters, digits and _")
    here = inventory(model)
    if here.folded:
        refuse(type(model).__name__, "it is folded", "lora_fx.unfold(model) first, or load into a fresh model")
    if name in here.names:
        remedy = f"load_adapter(…, name={name!r}) replaces its numbers; any other name adds one beside it"
        refuse(type(model).__name__, f"it already has an adapter named {name!r}", remedy)


class _Weights:
    """Of a program, as adapters out of a file name them."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self._multiplied = {n: w for w in program.weights for n in w.names}

    @cached_property
    def _others(self) -> dict[str, Weight]:
        """Biases, with the uses whose biases they are, and what else multiplies nothing."""
        return Biases(self.program).named

    def of(self, s: Saved, name: str = "") -> Weight:
        """Of the adapter's first name, or of another."""
        name = name or s.weights[0]
        known = s.kind.adapts == "weight" and name in self._multiplied
        return self._multiplied[name] if known else self._others[name]


def _check_target(s: Saved, weights: _Weights) -> None:
    weight = weights.of(s)
    if any(weights.of(s, n) is not weight for n in s.weights):
        reason = f"it adapts one weight under the names {', '.join(s.weights)}, which this model does not tie"
        refuse(s.place, reason, f"{ITS_BASE}, with its weights tied")
    if not weight.uses and "i" in s.layout.sides:  # unseen by the inputs: then the file says how it is read
        call = Call(FORMS["matmul"], None, None, s.layout.sides)
        path = s.weights[0].rpartition(".")[0]
        weight.uses.append(Use.unseen(weight, path, call))


def _shared(saved: list[Saved], weights: _Weights) -> list[Saved]:
    """PEFT keeps an adapter for each module; equal ones on modules that share the weight are one."""
    kept: list[Saved] = []
    for s in saved:
        if s.alone:
            kept.append(s)
            continue
        weight = weights.of(s)
        equal = (k for k, other in enumerate(kept) if weights.of(other) is weight and other.equals(s))
        if (k := next(equal, None)) is None:
            kept.append(s)
        else:
            kept[k] = replace(kept[k], weights=tuple(dict.fromkeys((*kept[k].weights, *s.weights))))
    return kept


def _room(s: Saved, most: int | None) -> int | None:
    """The ranks that there is to be room for; None for its own."""
    if most is None or not s.kind.pads:
        return None
    if s.settings["rank"] > most:
        refuse(s.place, f"its rank is {s.settings['rank']}, and max_rank={most}", "make room for it")
    return most


def _row(program: Program, s: Saved, weight: Weight, most: int | None) -> Row:
    plain = s.kind.adapts == "bias" or len(weight.shape) < 2
    here, axes = "o" * len(weight.shape) if plain else weight.layout.sides, None
    if s.kind.name == "full" and s.rows is not None and s.layout.sides != here:
        here, axes = s.layout.sides, s.layout  # rows of a table, which multiplies the other way round
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
    stored, room = theta if s.started else None, _room(s, most)
    row = Row(weight, rule, s.role, s.part, s.rows, uses, own, bool(outside), stored=stored, axes=axes, room=room)
    schedule = s.settings.get("schedule", AUTO)
    if not row.why_not(schedule):  # as it may in a model of another dtype
        row.rule = replace(rule, schedule=schedule)
    return row
