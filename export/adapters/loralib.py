"""loralib's state dicts:   `q.lora_A` (r, in), `q.lora_B` (out, r), beside or among the keys of the base

Of a `MergedLinear` the k groups of outputs that are enabled, of n, have a product each: A is (k·r, in), B (k·out/n, r).
Neither alpha nor which groups are enabled stands in the file. Facts: loralib 0.1.2, `layers.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from lora_fx.deltas.kinds import kind_named
from lora_fx.export.adapters.entries import SAY_ALPHA, Entry, in_pefts_words
from lora_fx.export.adapters.folder import Folder
from lora_fx.export.adapters.names import Names
from lora_fx.export.adapters.peft import PREFIX, Modules
from lora_fx.export.adapters.peft_files import read_lora
from lora_fx.export.adapters.spelling import nearest, respelled
from lora_fx.export.adapters.values import Saved
from lora_fx.reading import refuse

_ENDS = {".lora_A": "A", ".lora_B": "B"}
_ENABLE = "enable_lora"


def is_loralib(names: Names, folder: Folder) -> bool:
    return not folder.config and any(key.endswith(tuple(_ENDS)) for key in folder.tensors)


def read(model: nn.Module, folder: Folder, part: str | None, config: Mapping[str, Any]) -> list[Saved]:
    """The adapters of a state dict, with what the caller says of it."""
    modules = Modules(model)
    folder, pairs, rest = _pairs(modules, folder, config)
    plain, grouped = dict[str, dict[str, str]](), list[Saved]()
    for path, keys in pairs.items():
        own = _grouped(modules, folder, path, keys, config)
        grouped += own
        plain |= {} if own else {path: keys}
    return [*read_lora(model, _words(modules, folder, plain, rest, config), needed=not grouped), *grouped]


def from_loralib(names: Names, folder: Folder, part: str | None, config: Mapping[str, Any]) -> Folder:
    """The same in PEFT's words, where no model is at hand; PEFT has none for groups of outputs."""
    folder, pairs, rest = _pairs(names, folder, config)
    for keys in pairs.values():
        A, B = (folder.tensors[keys[factor]] if factor in keys else None for factor in "AB")
        if A is not None and B is not None and A.ndim == B.ndim == 2 and A.shape[0] != B.shape[1]:
            reason = f"A is {tuple(A.shape)} and B {tuple(B.shape)}: those of a MergedLinear, or of none"
            refuse(folder.tensor(keys["A"]), reason, "load it into its model: lora_fx.load_adapter")
    return _words(names, folder, pairs, rest, config)


_Pairs = dict[str, dict[str, str]]
"""Path → factor → its key."""


def _pairs(names: Names, folder: Folder, config: Mapping[str, Any]) -> tuple[Folder, _Pairs, dict[str, torch.Tensor]]:
    """With keys as PEFT spells them; and whatever is no factor."""
    folder, pairs = respelled(names, folder), _Pairs()
    rest: dict[str, torch.Tensor] = {}
    for key, tensor in folder.tensors.items():
        end = next((end for end in _ENDS if key.endswith(end)), "")
        path = key.removeprefix(PREFIX).removesuffix(end)
        if not end:
            rest[key] = tensor
        elif path not in names.by_path:
            reason = f"{path!r} is no module of {names.base}"
            near = nearest(path, list(names.by_path))
            refuse(folder.tensor(key), reason, f"pass the model it was made for; near: {near}")
        else:
            pairs.setdefault(path, {})[_ENDS[end]] = key
    if "lora_alpha" not in config:
        place = folder.tensor(next(key for keys in pairs.values() for key in keys.values()))
        reason = "loralib's files do not say their alpha, and without one there is no scale"
        refuse(place, reason, SAY_ALPHA)
    return folder, pairs, rest


def _words(
    names: Names, folder: Folder, pairs: _Pairs, rest: Mapping[str, torch.Tensor], config: Mapping[str, Any]
) -> Folder:
    entries = [Entry(path, factor, key) for path, keys in pairs.items() for factor, key in keys.items()]
    said = {"bias": "all" if any(key.endswith(".bias") for key in rest) else "none", **config}
    said.pop(_ENABLE, None)
    return in_pefts_words(names, folder, entries, alpha=None, config=said, rest=rest)


def _grouped(
    modules: Modules, folder: Folder, path: str, keys: Mapping[str, str], config: Mapping[str, Any]
) -> list[Saved]:
    """An adapter for each enabled group of a `MergedLinear`; none where the factors are those of a plain layer."""
    name = f"{path}.weight"
    parameter = modules.parameter(name)
    if keys.keys() != {"A", "B"} or parameter is None or parameter.ndim != 2:
        return []
    A, B = (folder.tensors[keys[factor]] for factor in "AB")
    place = folder.tensor(keys["A"])
    if A.ndim != 2 or B.ndim != 2 or A.shape[0] == B.shape[1]:
        return []
    if why := modules.why_not(name, False):
        refuse(place, why, "load it with loralib")
    layer = modules.layer(name, ())
    out, (rank, count) = layer.layout.size("o"), (B.shape[1], A.shape[0] // max(B.shape[1], 1))
    width = B.shape[0] // max(count, 1)
    whole = count * rank == A.shape[0] and count * width == B.shape[0] and width and out % width == 0
    if not whole or A.shape[1] != layer.layout.size("i") or count > out // width:
        reason = f"A is {tuple(A.shape)} and B {tuple(B.shape)}: no groups of the {out} outputs of {path} have these"
        refuse(place, reason, "load the base model it was made for")
    enabled = config.get(_ENABLE, [True] * count if count == out // width else None)
    known = isinstance(enabled, list | tuple) and all(isinstance(on, bool) for on in enabled)
    if not known or len(enabled) != out // width or sum(enabled) != count:
        reason = f"{count} of {out // width} groups of outputs have factors, and the file does not say which"
        refuse(place, reason, f'say it: load_adapter(..., config={{"{_ENABLE}": [True, False, …], …}})')
    if others := [key for key in config if key not in ("lora_alpha", "lora_dropout", "bias", _ENABLE)]:
        reason = f"{others[0]}={config[others[0]]!r} is none of loralib's"
        refuse(place, reason, "say lora_alpha, lora_dropout, bias, enable_lora")
    settings = {
        "rank": rank, "alpha": float(config["lora_alpha"]), "dropout": float(config.get("lora_dropout", 0)),
    }  # fmt: skip
    found = []
    for k, group in enumerate(n for n, on in enumerate(enabled) if on):
        theta = {"A": A[k * rank : (k + 1) * rank], "B": B[k * width : (k + 1) * width]}
        rows = tuple(range(group * width, (group + 1) * width))
        found.append(
            Saved((name,), kind_named("lora"), theta, layer.layout, rows, settings, place, part=f"group{group}")
        )
    return found
