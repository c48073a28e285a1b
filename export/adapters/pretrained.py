"""Adapted models of transformers on disk: what its `save_pretrained` and its Trainer write, without the base.

    model.save_pretrained(folder)      →  the adapters, in PEFT's format: one in the folder, more in subfolders
    … of a folder checkpoint-17        →  model.safetensors: the state dict without what is frozen of the base

The second is what the Trainer makes, and puts back with `load_state_dict`: every θ under its own key, whatever of the
base trains, and buffers, which a forward may write. It has our header too, so that `load_adapter` reads it.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import _IncompatibleKeys

from lora_fx.changes import in_turn
from lora_fx.deltas.adapter import Adapter
from lora_fx.errors import FileError, few
from lora_fx.export.adapters.files import about, held_of, refuse_absent, save_adapter, trained_of
from lora_fx.export.adapters.folder import MODEL, OWN, VERSION, write_checkpoint
from lora_fx.export.adapters.values import Held
from lora_fx.graph.program import storage_key
from lora_fx.model.inventory import base_parameters, inventory, plain_path, weight_name
from lora_fx.model.marks import CHECKPOINTS
from lora_fx.model.training import IGNORE, SAVE, trained_beside
from lora_fx.reading import refuse, regular

_CHECKPOINT = re.compile(r"checkpoint-\d+")  # as the Trainer knows them again
MARK = "lora_fx.checkpoint"
"""A key in the Trainer's checkpoints: by it `load_state_dict` tells them from a part of a state dict."""

_OTHERWISE = ("push_to_hub", "distributed_checkpoint", "variant")


def save_pretrained(
    model: Any,
    save_directory: Any,
    is_main_process: bool = True,
    state_dict: Mapping[str, torch.Tensor] | None = None,
    **options: Any,
) -> None:
    """What `save_pretrained` of an adapted transformers model does; ``type(model).save_pretrained(model, …)`` writes
    the base too.

    Raises:
        FileError: an option asks for another way of saving, or as in `save_adapter`.
    """
    for name in _OTHERWISE:
        if options.get(name):
            reason = f"{name}={options[name]!r}, of an adapted model"
            refuse("save_pretrained", reason, "leave it out, and do that with the folder then")
    if not is_main_process:
        return
    folder = Path(save_directory)
    with in_turn():
        if _CHECKPOINT.fullmatch(folder.name):
            write_checkpoint(folder / MODEL, *_checkpoint(model, state_dict))
            return
        if not about(model)["base"]:
            reason = f"{type(model).__name__} is saved without its base, and its name_or_path is empty"
            warnings.warn(f"{reason}: from_pretrained will not find it", stacklevel=2)
        names = inventory(model).names
        root = names[0] if len(names) == 1 else "default"
        for n, name in enumerate(sorted(names, key=lambda name: name != root)):
            _save(model, folder if name == root else folder / name, name, SAVE if n == 0 else IGNORE)


def _save(model: nn.Module, folder: Path, name: str, beside: str) -> None:
    try:
        save_adapter(model, folder, name=name, beside=beside)
    except FileError as why:
        save_adapter(model, folder, name=name, beside=beside, peft=False)
        warnings.warn(f"{folder} is in lora_fx's own format, which PEFT refuses: {why.reason}", stacklevel=4)


# ── the Trainer's checkpoints ────────────────────────────────────────────────────────────────────────────────────────


def _checkpoint(
    model: nn.Module, state_dict: Mapping[str, torch.Tensor] | None
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The tensors, and our header: the first adapter, with what was trained besides; the rest under `others`."""
    tensors = _kept(model, model.state_dict() if state_dict is None else state_dict)
    for key, tensor in tensors.items():
        refuse_absent(key, tensor)
    names, keys = inventory(model).names, _keys(model)
    entries = {name: list(_entries(held_of(model, name, finite=False), keys)) for name in names}
    mine = {plain_path(key): key for key in tensors}
    for h in trained_of(model, names[0], finite=False):
        key = next(mine[name] for name in h.weights if name in mine)
        entries[names[0]].append({**h.entry(), "keys": {"weight": key}, "sides": "o" * len(h.adapter.layout.shape)})
    said = {"version": VERSION, "config": {"peft_type": OWN}, **about(model)}
    others = {name: own for name, own in entries.items() if name != names[0]}
    tensors[MARK] = torch.tensor(VERSION)
    return tensors, {**said, "name": names[0], "adapters": entries[names[0]], "others": others}


def _kept(model: nn.Module, state: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """What of a state dict is not frozen of the base; of tied tensors one."""
    frozen = _frozen(model)
    tensors = {k: t for k, t in state.items() if plain_path(k) not in frozen and isinstance(t, torch.Tensor)}
    once: dict[Any, str] = {}
    for key, tensor in tensors.items():
        once.setdefault((storage_key(tensor), tensor.shape, tensor.stride()) if tensor.numel() else key, key)
    return {key: tensors[key] for key in once.values()}


def _frozen(model: nn.Module) -> set[str]:
    """The names of the base's own parameters that do not train."""
    trained = {plain_path(name) for names in trained_beside(model) for name in names}
    return {plain_path(name) for name in base_parameters(model)} - trained


def _keys(model: nn.Module) -> dict[tuple[Adapter, str], str]:
    """(adapter, tensor of θ) → its key in the state dict."""
    found = {}
    for path, module in model.named_modules():
        if isinstance(module, Adapter):
            for tensor in module._parameters:
                found[module, tensor] = weight_name(plain_path(path), tensor)
    return found


def _entries(held: list[Held], keys: Mapping[tuple[Adapter, str], str]) -> Iterator[dict[str, Any]]:
    for h in held:
        own = {tensor: keys[h.adapter.owner(tensor), tensor] for tensor in h.adapter.tensors}
        yield {**h.entry(), "keys": (own["A"], own["B"]) if h.adapter.kind.name == "lora" else own}


def load_state_dict(model: Any, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
    """What `load_state_dict` of an adapted transformers model does: a checkpoint of the Trainer is put in whole.

    Raises:
        FileError: it is of a model with other adapters, or where something else trained. Nothing has been loaded then.
    """
    plain = type(model).load_state_dict
    if MARK not in state_dict:
        return plain(model, state_dict, strict, assign)
    given = {key: value for key, value in state_dict.items() if key != MARK}
    _refuse_other(model, {plain_path(key): value for key, value in given.items()}, "the checkpoint")
    plain(model, given, False, assign)
    return _IncompatibleKeys([], [])


def _refuse_other(model: nn.Module, given: Mapping[str, torch.Tensor], place: str) -> None:
    """A checkpoint that is not what the model would write now."""
    now = model.state_dict()
    wanted, known = ({plain_path(key): value for key, value in own.items()} for own in (_kept(model, now), now))
    remedy = "adapt the model by the rules that it was trained with, and unfreeze the same"
    for found, there, what in ((given, known, "holds {}, which the model has not"), (wanted, given, "holds no {}")):
        if lacking := [key for key in found if key not in there]:
            refuse(place, f"it {what.format(few(lacking, 3))}", remedy)
    for key, value in given.items():
        if tuple(value.shape) != tuple(known[key].shape):
            refuse(place, f"{key} has the shape {tuple(value.shape)} there, and {tuple(known[key].shape)} here", remedy)


# ── accelerate's ─────────────────────────────────────────────────────────────────────────────────────────────────────


def adapter_checkpoints(accelerator: Any) -> None:
    """From now on `accelerator.save_state` leaves out what is frozen of the base of adapted models.

        accelerator = Accelerator()
        lora_fx.adapter_checkpoints(accelerator)

    Without it whole models are saved, and come back to the bit as well. `load_state` puts back adapters, what else was
    trained, and buffers, bit for bit, and refuses a checkpoint of other adapters; the base is the model's.

    Args:
        accelerator: an `accelerate.Accelerator`; two hooks are registered with it.
    """
    accelerator.register_save_state_pre_hook(_save_states)
    accelerator.register_load_state_pre_hook(_load_states)


def _save_states(models: list[nn.Module], weights: list[Any], folder: str) -> None:
    """Its hook, before state dicts are written: those of adapted models, without the base."""
    for n, model in enumerate(models[: len(weights)]):
        if inventory(model).adapters:
            weights[n] = _kept(model, weights[n])


def _load_states(models: list[nn.Module], folder: str) -> None:
    """Its hook, before state dicts are read: all of them here, if one is of an adapted model."""
    from safetensors.torch import load_file, load_model

    if not any(inventory(model).adapters for model in models):
        return
    files = [Path(folder) / (MODEL if n == 0 else f"model_{n}.safetensors") for n in range(len(models))]
    for file in files:
        regular(file, "pass the folder that accelerator.save_state has written")
    for model, file in zip(models, files, strict=True):
        given = load_file(file) if inventory(model).adapters else {}
        plain = {plain_path(key) for key in given}
        if given and not _frozen(model) & plain:
            _refuse_other(model, {plain_path(key): value for key, value in given.items()}, str(file))
            model.load_state_dict(given, strict=False)
        else:
            load_model(model, file)
    models.clear()


CHECKPOINTS.update(save_pretrained=save_pretrained, load_state_dict=load_state_dict)
