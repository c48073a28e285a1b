"""Adapted models of transformers, out of the folders that their `save_pretrained` and their Trainer have written."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from torch import nn

from lora_fx.export.adapters import pretrained  # noqa: F401  (models that are adapted save by it)
from lora_fx.export.adapters.files import about, loading
from lora_fx.export.adapters.folder import CONFIG, by_name, read_folder
from lora_fx.model.inventory import inventory
from lora_fx.passes.activate import Activate
from lora_fx.passes.insert import Rewrite
from lora_fx.passes.pipeline import Pipeline
from lora_fx.reading import boundary, refuse


def from_pretrained(
    model_class: Any, folder: str | os.PathLike, example_inputs: Any = None, *, check: bool = True, **options: Any
) -> nn.Module:
    """An adapted model of transformers as its `save_pretrained` saved it, or its Trainer: the base, and all adapters.

        model = lora_fx.from_pretrained(AutoModelForCausalLM, "out/checkpoint-500")

    The base comes from where the adapter's files say that it came from. Those adapters act that acted.

    Args:
        model_class: whose `from_pretrained` loads the base: a class of transformers, or one of its Auto classes.
        folder: with adapters in PEFT's format, PEFT's own too, in the folder or in subfolders; or a checkpoint of the
            Trainer.
        example_inputs, check: as in `load_adapter`.
        options: for `model_class.from_pretrained`.

    Raises:
        FileError: there is no adapter, it does not say what its base is, or as in `load_adapter`.
    """
    with boundary("it cannot be read", str(folder), "save the model again"):
        found = [own for path in _paths(Path(folder)) for own in by_name(read_folder(path))]
        bases = [own.config.get("base_model_name_or_path") or (own.header or {}).get("base") for own in found]
        acting = [set[str]((own.header or {})["active"]) for own in found if "active" in (own.header or {})]
    base = next((base for base in bases if isinstance(base, str) and base), None)
    if base is None:
        reason = "it does not say from where its base has come (base_model_name_or_path)"
        refuse(str(folder), reason, "load the base yourself, and lora_fx.load_adapter into it")
    model = model_class.from_pretrained(base, **options)
    for own in found:
        Pipeline("load_adapter", loading(own, example_inputs, check=check))(model)
    wanted = acting[0] & {*inventory(model).names} if acting else None
    if wanted is not None and wanted != {*about(model)["active"]}:
        Pipeline("activate", (Activate(tuple(wanted)), Rewrite()))(model)
    return model


def _paths(folder: Path) -> list[Path]:
    """It, or its subfolders that hold one each; or both."""
    inside = sorted(file.parent for file in folder.glob(f"[!.]*/{CONFIG}"))
    return [folder, *inside] if (folder / CONFIG).is_file() or not inside else inside
