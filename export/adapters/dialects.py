"""Dialects: the ways in which adapters are written down, a row each. The first that knows a file reads it.

    files   →   what the row's `recognised` asks   →   its `into`: PEFT's words, or ours   →   adapters of this model

A row that has PEFT's layout with other keys translates (`entries`, `spelling`), so that shapes, refusals and kinds are
those of one reader. It only asks for names, which a checkpoint has as well as a model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import fx, nn

from lora_fx.export.adapters import diffusion, loralib
from lora_fx.export.adapters.entries import Entry, Single, in_pefts_words
from lora_fx.export.adapters.folder import ADALORA, HEADER, OWN, PEFT, Folder, check_types
from lora_fx.export.adapters.names import Names
from lora_fx.export.adapters.own import read_own
from lora_fx.export.adapters.peft import PREFIX, Modules
from lora_fx.export.adapters.peft_files import layers_of, read_adalora, read_lora
from lora_fx.export.adapters.spelling import respelled
from lora_fx.export.adapters.values import Files, Saved
from lora_fx.reading import refuse


@dataclass(frozen=True)
class Dialect:
    """A row."""

    name: str
    keys: str
    """What it looks like, for reading."""
    recognised: Callable[[Names, Folder], bool]
    into: Callable[[Names, Folder, str | None, Mapping[str, Any]], Folder] | None = None
    """(names, files, which part of a pipeline they are for, what the caller says that the files do not) → PEFT's words;
    None of what is PEFT's, or ours."""
    read: Callable[[nn.Module, Folder, str | None, Mapping[str, Any]], list[Saved]] | None = None
    """The same for a model → adapters; None where they are those of PEFT's words."""
    write: Callable[..., Single] | None = None
    """(config and tensors of PEFT's, its layers, the part) → one file; None where a folder is written, or nothing."""
    whole: bool = False
    """It says all: nothing can be said besides."""


def _one_file(names: Names, folder: Folder, part: str | None, config: Mapping[str, Any]) -> Folder:
    """PEFT's keys without its config: ranks are in the shapes, and alpha is in the file, or said, or it is refused."""
    folder, entries, rest = respelled(names, folder), [], {}
    for key, tensor in folder.tensors.items():
        path, factor = next(
            ((key.removeprefix(PREFIX).removesuffix(end), own) for end, own in _ENDS.items() if key.endswith(end)),
            ("", ""),
        )
        if factor and path in names.by_path:
            entries.append(Entry(path, factor, key))
        else:
            rest[key] = tensor
    return in_pefts_words(names, folder, entries, alpha=None, config=config, rest=rest)


_ENDS = {
    ".lora_A.weight": "A", ".lora_B.weight": "B", ".lora_embedding_A": "A", ".lora_embedding_B": "B", ".alpha": "alpha",
    ".lora_magnitude_vector": "m", ".lora_B.bias": "b",
}  # fmt: skip


def _is(kind: str) -> Callable[[Names, Folder], bool]:
    return lambda names, folder: folder.config.get("peft_type") == kind


def _has_factors(names: Names, folder: Folder) -> bool:
    return not folder.config and any(".lora_A" in key or ".lora_embedding_A" in key for key in folder.tensors)


def _ours(model: nn.Module, folder: Folder, part: str | None, config: Mapping[str, Any]) -> list[Saved]:
    if folder.header is None:
        refuse(folder.tensor(HEADER), "the header is missing", "save the adapter again")
    return read_own(model, folder, folder.header)


def _plain(read: Callable[[nn.Module, Folder], list[Saved]]) -> Callable[..., list[Saved]]:
    return lambda model, folder, part, config: read(model, folder)


DIALECTS = (
    Dialect(
        "lora_fx", "a header `lora_fx` in the tensor file, also without a config",
        lambda names, folder: folder.header is not None or _is(OWN)(names, folder), read=_ours, whole=True,
    ),
    Dialect(
        "AdaLoRA", "`peft_type: ADALORA`; `….lora_A`, `….lora_E`, `….lora_B`",
        _is(ADALORA), read=_plain(read_adalora), whole=True,
    ),
    Dialect("peft", "`peft_type: LORA`; `base_model.model.….lora_A.weight`", _is(PEFT), whole=True),
    Dialect(
        "kohya", "`lora_unet_….lora_down.weight`, `.lora_up.weight`, `.alpha`; `lora_te_…`, `lora_te2_…`",
        diffusion.is_kohya, diffusion.from_kohya, write=diffusion.to_kohya,
    ),
    Dialect(
        "diffusers", "`unet.….lora_A.weight`; `….lora.down.weight`; `….processor.to_q_lora.down.weight`",
        diffusion.is_diffusers, diffusion.from_diffusers, write=diffusion.to_diffusers,
    ),
    Dialect(
        "loralib", "`….lora_A`, `….lora_B` in a state dict",
        loralib.is_loralib, loralib.from_loralib, loralib.read,
    ),
    Dialect("one file of PEFT's", "`….lora_A.weight` without a config", _has_factors, _one_file),
)  # fmt: skip


def read(model: nn.Module, folder: Folder, part: str | None, config: Mapping[str, Any]) -> list[Saved]:
    """The adapters that the files hold for this model.

    Raises:
        FileError: no dialect is theirs, or they do not fit.
    """
    modules = Modules(model)
    dialect = _dialect(modules, folder, part, config)
    if folder.config.get("peft_type") != OWN:
        _refuse_classless(model, folder)
    if dialect.read is not None:
        return dialect.read(model, folder, part, config)
    return read_lora(model, folder if dialect.into is None else dialect.into(modules, folder, part, config))


def _refuse_classless(model: nn.Module, folder: Folder) -> None:
    """Modules of an exported program hold the parameters, and are of no class that files could speak of."""
    bare = (path for path, own in model.named_modules() if type(own) is nn.Module and own._parameters)
    if isinstance(model, fx.GraphModule) and (path := next(bare, None)) is not None:
        reason = f"it speaks of layers by their classes, and {path} has none: the model comes from torch.export"
        how = "load it into the model before it is exported, save_adapter(…, peft=False), and load that folder here"
        refuse(str(folder.path), reason, f"{how}, into copy.deepcopy(exported.module())")


def in_words_of_pefts(names: Names, folder: Folder, part: str | None, config: Mapping[str, Any]) -> Folder:
    """The files as PEFT would have written them; as they are, where they are PEFT's or ours.

    Raises:
        FileError: no dialect is theirs, or what they name is not there.
    """
    dialect = _dialect(names, folder, part, config)
    return folder if dialect.into is None else dialect.into(names, folder, part, config)


def _dialect(names: Names, folder: Folder, part: str | None, config: Mapping[str, Any]) -> Dialect:
    dialect = next((row for row in DIALECTS if row.recognised(names, folder)), None)
    if dialect is None:
        keys = list(folder.tensors)[:3]
        reason = f"its keys ({', '.join(keys) or 'none'}) are of no dialect that is known"
        refuse(str(folder.path), reason, "; ".join(f"{row.name}: {row.keys}" for row in DIALECTS))
    if dialect.whole and (config or part):
        what = f"part={part!r}" if part else f"config={dict(config)!r}"
        refuse(str(folder.path), f"{what}, and the files say themselves what they are", "leave it out")
    check_types({**config, "peft_type": PEFT}, "config")
    return dialect


def written(name: str, model: nn.Module, files: Files, part: str | None) -> Single:
    """One file of a dialect, of what PEFT would get."""
    row = next((row for row in DIALECTS if row.name == name and row.write is not None), None)
    assert row is not None and row.write is not None, name
    config, tensors, _ = files
    if part is None:
        refuse("part", f"a file of {name}'s says which part of a pipeline the model is", 'say it: part="unet"')
    return row.write(config, tensors, layers_of(Modules(model), config, tensors), part)


WRITTEN = tuple(row.name for row in DIALECTS if row.write is not None)
