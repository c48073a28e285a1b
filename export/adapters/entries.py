"""A file without a config, key by key, as PEFT's two files:   (module, factor, key)…   →   a config and PEFT's keys"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from lora_fx.export.adapters.folder import PEFT, Folder
from lora_fx.export.adapters.names import Names
from lora_fx.export.adapters.peft import PREFIX
from lora_fx.reading import refuse

SAY_ALPHA = 'say it: config={"lora_alpha": …} of load_adapter and fold_checkpoint, --alpha of lora-fx fold'

Single = tuple[dict[str, torch.Tensor], dict[str, str]]
"""The tensors of one file, and what its header says."""


@dataclass(frozen=True)
class Entry:
    """A tensor of a file: what it is, and of which module."""

    path: str
    factor: str
    """``A``, ``B``, ``alpha``, ``m`` (DoRA's sizes) or ``b`` (the bias of B)."""
    key: str


def of_a_part(names: Names, folder: Folder, parts: Iterable[str], wanted: str | None) -> tuple[str, str]:
    """Which part of a pipeline the model is, and what the names of its modules begin with in it.

    Args:
        parts: for which the file has entries.
        wanted: what the caller says that the model is.
    """
    known = sorted(set(parts))
    if wanted is None and len(known) > 1:
        reason = f"it is for several models: {', '.join(known)}"
        refuse(str(folder.path), reason, f"say which this one is: load_adapter(..., part={known[0]!r})")
    part = known[0] if wanted is None else wanted
    if part not in known:
        refuse(str(folder.path), f"it has nothing for the part {part!r}", f"it is for {', '.join(known)}")
    return part, f"{part}." if part in names.by_path else ""


def in_pefts_words(
    names: Names,
    folder: Folder,
    entries: Sequence[Entry],
    alpha: Any,
    config: Mapping[str, Any] | None = None,
    root: str = "",
    rest: Mapping[str, torch.Tensor] | None = None,
) -> Folder:
    """The folder that PEFT would have written.

    Args:
        alpha: where no entry says one: a number, ``"rank"`` for the rank of each, or None to refuse.
        config: options of PEFT's that are said besides; their names are those of the modules below `root`.
        rest: tensors that are none of these, by PEFT's keys.
    """
    found: dict[str, dict[str, str]] = {}
    for entry in entries:
        own = found.setdefault(entry.path, {})
        if entry.factor in own:
            reason = f"it and {own[entry.factor]} are two entries for one weight"
            refuse(folder.tensor(entry.key), reason, "leave one of them out of the file")
        own[entry.factor] = entry.key
    tensors, spelled = dict[str, torch.Tensor](), dict[str, str]()
    ranks, alphas = dict[str, int](), dict[str, float]()
    for path, keys in found.items():
        for missing in sorted({"A", "B"} - keys.keys()):
            there = next(iter(keys.values()))
            refuse(folder.tensor(there), f"its factor {missing} is missing", "restore the file")
        table = names.is_table(path) or any(".lora_embedding_" in key for key in keys.values())
        words = {"A": "lora_A.weight", "B": "lora_B.weight", "m": "lora_magnitude_vector", "b": "lora_B.bias"}
        words |= {"A": "lora_embedding_A", "B": "lora_embedding_B"} if table else {}
        for factor, key in keys.items():
            if factor != "alpha":
                place = f"{PREFIX}{path}.{words[factor]}"
                tensors[place] = folder.tensors[key]
                spelled[place] = folder.spelled.get(key, key)
        B = folder.tensors[keys["B"]]
        ranks[path] = B.shape[1] if B.ndim > 1 else 0
        alphas[path] = _alpha(folder, keys, alpha, ranks[path], config)
    said = {**_config(ranks, alphas), **_under(config or {}, root)}
    if config and "lora_alpha" in config and "alpha_pattern" not in config:
        said["alpha_pattern"] = {}
    has = {factor for keys in found.values() for factor in keys}
    said |= {"use_dora": True} if "m" in has else {}
    said |= {"lora_bias": True} if "b" in has else {}
    return replace(folder, config=said, tensors={**tensors, **(rest or {})}, spelled={**folder.spelled, **spelled})


def _alpha(folder: Folder, keys: Mapping[str, str], alpha: Any, rank: int, config: Mapping[str, Any] | None) -> float:
    key = keys.get("alpha")
    if key is not None:
        value = folder.tensors[key]
        if value.numel() != 1 or not math.isfinite(own := float(value)):
            reason = f"its shape is {tuple(value.shape)}, and alpha is one number"
            refuse(folder.tensor(key), reason, "restore the file")
        if config and "lora_alpha" in config:
            refuse(folder.tensor(key), "alpha is said here, and in the config too", "leave one of them out")
        return own
    if config and "lora_alpha" in config:
        return float(config["lora_alpha"])
    if alpha is None:
        reason = "the file does not say its alpha, and without one there is no scale"
        refuse(folder.tensor(keys["A"]), reason, SAY_ALPHA)
    return rank if alpha == "rank" else float(alpha)


def _config(ranks: Mapping[str, int], alphas: Mapping[str, float]) -> dict[str, Any]:
    exactly = {"^" + re.escape(path): path for path in ranks}
    rank, alpha = (Counter(values.values()).most_common(1)[0][0] if values else 1 for values in (ranks, alphas))
    return {
        "peft_type": PEFT, "r": rank, "lora_alpha": alpha, "target_modules": "|".join(map(re.escape, ranks)),
        "rank_pattern": {key: ranks[path] for key, path in exactly.items() if ranks[path] != rank},
        "alpha_pattern": {key: alphas[path] for key, path in exactly.items() if alphas[path] != alpha},
    }  # fmt: skip


def _under(config: Mapping[str, Any], root: str) -> dict[str, Any]:
    """The config with names below a part of the model."""
    if root and any(isinstance(config.get(key), str) for key in ("target_modules", "exclude_modules")):
        refuse("target_modules", "a pattern of it says which modules of the part are meant", f"pass model.{root[:-1]}")
    return dict(config)
