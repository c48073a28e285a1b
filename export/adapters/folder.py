"""The folder of an adapter: adapter_config.json and adapter_model.safetensors, read with suspicion, written as one.

Nothing in a file is trusted: types, numbers and shapes are checked before anyone uses them, no pickle is ever opened,
and no name in a file is taken for a path. Our header in the tensor file carries a digest over itself, the names and
shapes of the tensors, and the numbers. The two files may be symbolic links, as in the caches of model hubs, which keep
files under their digests: whoever made the folder chose where they point. Saving never writes through a link.
"""

from __future__ import annotations

import ctypes
import io
import json
import os
import secrets
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lora_fx.reading import boundary, contents, packed, refuse, tensor_table, tensors_digest, to_json

CONFIG, TENSORS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
PEFT, ADALORA, OWN = "LORA", "ADALORA", "LORA_FX"  # peft_type: two of PEFT's own, and what only lora_fx can read
HEADER, DIGEST, VERSION = "lora_fx", "lora_fx_sha256", 1

_RESTORE = "restore the file from where the adapter was saved"


@dataclass(frozen=True)
class Folder:
    """What an adapter's folder holds."""

    path: Path
    config: dict[str, Any]
    tensors: dict[str, torch.Tensor]
    """All floating point and finite."""
    header: dict[str, Any] | None
    """Ours, where there is one."""

    def option(self, key: str) -> str:
        """The place of an option of the config, for errors."""
        return f"{self.path / CONFIG}, {key}"

    def tensor(self, key: str) -> str:
        """The place of a tensor, or of our header, for errors."""
        return f"{self.path / TENSORS}, {key}"


def read_folder(path: Path) -> Folder:
    with boundary("it cannot be read", str(path), _RESTORE):
        folder = _find_folder(path)
        return Folder(folder, _read_config(folder / CONFIG), *_unpack(folder))


def _find_folder(path: Path) -> Path:
    """This one, or its only subfolder that holds an adapter."""
    if not path.is_dir():
        refuse(str(path), "there is no such folder", "pass the folder that save_adapter or save_pretrained wrote")
    if (path / CONFIG).is_file():
        return path
    inside = sorted(p.parent for p in path.glob(f"[!.]*/{CONFIG}"))  # a save that was killed leaves hidden ones
    if len(inside) != 1:
        found = f"; it holds {', '.join(p.name for p in inside)}" if inside else ""
        refuse(str(path), f"it has no {CONFIG}{found}", "pass the folder of one adapter")
    return inside[0]


# ── adapter_config.json ──────────────────────────────────────────────────────────────────────────────────────────────


_LARGEST = torch.finfo(torch.float32).max


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return (_is_int(value) or isinstance(value, float)) and abs(value) <= _LARGEST


def _are(test: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and all(test(v) for v in value)


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _table_of(test: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, dict) and all(test(v) for v in value.values())


#: option → (what it may be, in words)
_TYPES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "r": (lambda v: _is_int(v) and v > 0, "a positive integer"),
    "lora_alpha": (_is_number, "a finite number in float32"),
    "lora_dropout": (lambda v: _is_number(v) and 0 <= v < 1, "a probability below 1"),
    "use_rslora": (lambda v: isinstance(v, bool), "true or false"),
    "use_dora": (lambda v: isinstance(v, bool), "true or false"),
    "rank_pattern": (_table_of(lambda v: _is_int(v) and v > 0), "a table of positive integers"),
    "alpha_pattern": (_table_of(_is_number), "a table of finite numbers in float32"),
    "target_modules": (lambda v: _is_text(v) or _are(_is_text)(v), "a pattern or a list of names"),
    "exclude_modules": (lambda v: _is_text(v) or _are(_is_text)(v), "a pattern or a list of names"),
    "target_parameters": (_are(_is_text), "a list of names"),
    "layers_to_transform": (lambda v: _is_int(v) or _are(_is_int)(v), "an integer or a list of integers"),
    "layers_pattern": (lambda v: _is_text(v) or _are(_is_text)(v), "a name or a list of names"),
}
_NEEDED = ("r", "lora_alpha", "init_r")  # PEFT has no null there

#: what an AdaLoRA's config has besides, or means by a word of the same name
_ADALORA_TYPES = {
    "init_r": _TYPES["r"],
    "rank_pattern": (_table_of(_are(lambda v: isinstance(v, bool))), "a table of lists of true and false"),
}


def _read_config(file: Path) -> dict[str, Any]:
    with boundary("it cannot be read", str(file), _RESTORE):
        config = json.loads(contents(file, _RESTORE).decode("utf-8"))
    if not isinstance(config, dict):
        refuse(str(file), f"it holds a {type(config).__name__}, not a table", _RESTORE)
    kind = config.get("peft_type")
    if kind not in (PEFT, ADALORA, OWN):
        refuse(f"{file}, peft_type", f"{kind!r} is no LoRA adapter", "load it with the library that wrote it")
    for key, (test, wanted) in (_TYPES | (_ADALORA_TYPES if kind == ADALORA else {})).items():
        default = key not in config or (config[key] is None and key not in _NEEDED)
        if not default and not test(config[key]):
            refuse(f"{file}, {key}", f"{repr(config[key])[:200]} is not {wanted}", _RESTORE)
    return config


# ── adapter_model.safetensors ────────────────────────────────────────────────────────────────────────────────────────


def _pack(tensors: dict[str, torch.Tensor], header: dict[str, Any]) -> bytes:
    """A safetensors file with our header in it, and a digest over the header and the numbers."""
    import safetensors.torch

    tensors = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
    text = to_json(header).decode()
    return packed(tensors, safetensors.torch, {"format": "pt", HEADER: text}, DIGEST, text)


def _unpack(folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any] | None]:
    from safetensors.torch import load

    file = folder / TENSORS
    if not file.is_file() and (folder / PICKLE).is_file():
        remedy = f"save the adapter as {TENSORS} with PEFT, where you trust it"
        refuse(str(folder / PICKLE), "it is a pickle, which can run any code when it is opened", remedy)
    with boundary("it cannot be read", str(file), _RESTORE):
        data = contents(file, _RESTORE, most=None)
        table = tensor_table(io.BytesIO(data), str(file), _RESTORE)
        tensors = load(data)
        meta = json.loads(table).get("__metadata__") or {}
    for key, tensor in tensors.items():
        if not tensor.is_floating_point() or tensor.dtype.itemsize < 2:
            dtypes = "factors are float16, bfloat16, float32 or float64: save them so"
            refuse(f"{file}, {key}", f"its dtype is {tensor.dtype}", dtypes)
        if not bool(tensor.float().isfinite().all()):
            reason = "it holds NaN, Inf or numbers beyond float32"
            refuse(f"{file}, {key}", reason, "load an earlier checkpoint of the adapter")
    return tensors, _read_header(meta, data, f"{file}, {HEADER}") if HEADER in meta else None


def _read_header(meta: dict, data: bytes, place: str) -> dict[str, Any]:
    if meta.get(DIGEST) != tensors_digest(meta[HEADER], io.BytesIO(data)):
        refuse(place, "its numbers are not the ones that were saved: the file is damaged", _RESTORE)
    try:
        header = json.loads(meta[HEADER])
        version, entries = header["version"], header["adapters"]
        names = [entry["weights"] for entry in entries]
        known = isinstance(header["config"], dict) and _is_text(header["name"])
        known = known and all(n and _are(_is_text)(n) for n in names)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        refuse(place, f"it cannot be read: {error!r}", _RESTORE, error)
    if version != VERSION or not known or not entries:
        reason = f"it is of version {version!r} with {len(entries)} adapters"
        refuse(place, reason, f"this lora_fx reads version {VERSION}: use the one that wrote it")
    return header


# ── writing ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def write_folder(
    folder: Path, config: dict[str, Any], tensors: dict[str, torch.Tensor], header: dict[str, Any]
) -> None:
    """Both files, or neither, in one step: a new folder takes the place of the old one, and has its other files too.

    Where folders cannot be exchanged (systems other than Linux), or a file can have no second name (no hard links), the
    config goes first and comes last: a kill in between leaves no adapter to read, and the old one in a hidden folder.
    """
    files = ((TENSORS, _pack(tensors, header)), (CONFIG, to_json(config, indent=2)))
    if folder.exists() and not folder.is_dir():
        refuse(str(folder), "it is a file", "pass the path of a folder")
    folder = folder.resolve()
    fresh = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}")
    try:
        fresh.mkdir(parents=True)
        for name, data in files:
            _write_file(fresh / name, data)
        _sync_folder(fresh)
        _publish(fresh, folder)
        _sync_folder(folder)
        _sync_folder(folder.parent)
    except OSError as error:
        remedy = "choose a folder on a disk with space and permission"
        refuse(str(folder), f"it cannot be written: {error}", remedy, error)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def _publish(fresh: Path, folder: Path) -> None:
    if not folder.exists():
        os.replace(fresh, folder)
        return
    old = [name for name in (CONFIG, TENSORS) if (folder / name).is_file()]
    if old == [CONFIG, TENSORS] and (folder / CONFIG).read_bytes() == (fresh / CONFIG).read_bytes():
        os.replace(fresh / TENSORS, folder / TENSORS)
        return
    if _link_others(folder, fresh) and _exchange(fresh, folder):
        _rescue(fresh, folder)
        return
    aside: list[tuple[Path, Path]] = []
    try:
        for name in old:
            os.replace(folder / name, fresh / f"old_{name}")
            aside.append((fresh / f"old_{name}", folder / name))
        for name in (TENSORS, CONFIG):
            os.replace(fresh / name, folder / name)
    except BaseException:
        for kept, place in reversed(aside):
            os.replace(kept, place)
        raise


def _link_others(folder: Path, fresh: Path) -> bool:
    """Give every other file of the folder a second name in the fresh one; False where that cannot be."""

    def own(at: str, names: list[str]) -> set[str]:
        return {CONFIG, TENSORS} & {*names} if Path(at) == folder else set()

    try:
        shutil.copytree(folder, fresh, symlinks=True, ignore=own, copy_function=os.link, dirs_exist_ok=True)
    except (OSError, shutil.Error):
        return False
    return True


def _rescue(old: Path, folder: Path) -> None:
    """What somebody put into the old folder since its files were linked."""
    for at, _, names in os.walk(old):
        for name in names:
            place = folder / Path(at).relative_to(old) / name
            if not os.path.lexists(place):
                place.parent.mkdir(parents=True, exist_ok=True)
                os.replace(Path(at) / name, place)


def _exchange(a: Path, b: Path) -> bool:
    """Swap two folders in one step, as Linux can; False where the system cannot."""
    call = getattr(ctypes.CDLL(None), "renameat2", None) if sys.platform == "linux" else None
    here, swap = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return call is not None and call(here, os.fsencode(a), here, os.fsencode(b), swap) == 0


def _write_file(path: Path, data: bytes) -> None:
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(path: Path) -> None:
    """Make renames in a folder survive a power cut, where the system can open folders."""
    if sys.platform == "win32":
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
