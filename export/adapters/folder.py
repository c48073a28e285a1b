"""The files of an adapter: a folder with its config and its tensors, or one file; read with suspicion, written as one.

Nothing in a file is trusted: types, numbers and shapes are checked before anyone uses them, a pickle is opened for
tensors alone, and no name in a file is taken for a path. Our header in the tensor file carries a digest over itself,
the names and shapes of the tensors, and the numbers. The files may be symbolic links, as in the caches of model hubs,
which keep files under their digests: whoever made the folder chose where they point. Saving never writes through a
link.
"""

from __future__ import annotations

import ctypes
import io
import json
import os
import secrets
import shutil
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from lora_fx.export.adapters.patterns import Matcher
from lora_fx.export.adapters.pickles import unpickled
from lora_fx.reading import boundary, contents, packed, refuse, regular, tensor_table, tensors_digest, to_json

CONFIG, TENSORS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
DIFFUSERS = ("pytorch_lora_weights.safetensors", "pytorch_lora_weights.bin")
MODEL = "model.safetensors"
"""In a checkpoint of the Trainer: see `pretrained`."""
PICKLES = (".bin", ".pt", ".pth")
PEFT, ADALORA, OWN = "LORA", "ADALORA", "LORA_FX"  # peft_type: two of PEFT's own, and what only lora_fx can read
HEADER, DIGEST, VERSION = "lora_fx", "lora_fx_sha256", 1

_RESTORE = "restore the file from where the adapter was saved"


@dataclass(frozen=True)
class Folder:
    """What an adapter's folder, or its one file, holds."""

    path: Path
    config: dict[str, Any]
    """Empty where the file comes without one."""
    tensors: dict[str, torch.Tensor]
    """Finite, and floating point, but for what may be a buffer."""
    header: dict[str, Any] | None
    """Ours, where there is one."""
    file: str = TENSORS
    """Where the tensors stand; of one file, its own name."""
    said: Mapping[str, str] = field(default_factory=dict)
    """What the header of the tensor file says besides."""
    spelled: Mapping[str, str] = field(default_factory=dict)
    """Key → what the file calls it, where that is another."""
    matcher: Matcher = field(default_factory=Matcher, compare=False, repr=False)
    """Of the patterns in its config."""

    @property
    def home(self) -> Path:
        """Where its files lie."""
        return self.path.parent if self.path.is_file() else self.path

    @property
    def files(self) -> tuple[str, ...]:
        """Their names: of its tensors, and of its config, where it has one."""
        return (self.file,) if self.path.is_file() else (CONFIG, self.file)

    @cached_property
    def saved_whole(self) -> frozenset[str]:
        """The names under `modules_to_save`."""
        return frozenset(self.config.get("modules_to_save") or ())

    def option(self, key: str) -> str:
        """The place of an option of the config, for errors."""
        return f"{self.path if self.path.is_file() else self.path / CONFIG}, {key}"

    def tensor(self, key: str) -> str:
        """The place of a tensor, or of our header, for errors."""
        place = self.path if self.path.is_file() else self.path / self.file
        return f"{place}, {self.spelled.get(key, key)}"


def read_folder(path: Path) -> Folder:
    """A folder of an adapter, one that holds exactly one in a subfolder, or a single file of tensors."""
    with boundary("it cannot be read", str(path), _RESTORE):
        if path.is_file() and path.name in (TENSORS, PICKLE) and (path.parent / CONFIG).is_file():
            path = path.parent
        single = path if path.is_file() else next((path / n for n in DIFFUSERS if _is_alone(path, n)), None)
        if single is None and _is_alone(path, MODEL) and _is_ours(path / MODEL):
            single = path / MODEL
        if single is not None:
            tensors, header, said = _unpack(single)
            return Folder(single, dict(header["config"]) if header else {}, tensors, header, single.name, said)
        folder = _find_folder(path)
        config = read_config(folder / CONFIG)
        pickled = not (folder / TENSORS).is_file() and (folder / PICKLE).is_file()
        tensors, header, said = _unpack(folder / (PICKLE if pickled else TENSORS))
        return Folder(folder, config, tensors, header, PICKLE if pickled else TENSORS, said)


def by_name(folder: Folder) -> list[Folder]:
    """One for each adapter in it: a checkpoint of the Trainer holds all of a model's."""
    header = folder.header
    if header is None or not header.get("others"):
        return [folder]
    with boundary("it cannot be read", folder.tensor(HEADER), _RESTORE):
        rest = {str(name): list(entries) for name, entries in header["others"].items()}
    named = {header["name"]: header["adapters"], **rest}
    return [replace(folder, header={**header, "name": n, "adapters": own, "others": {}}) for n, own in named.items()]


def chosen(folder: Folder, name: str | None) -> Folder:
    """Of a file with several adapters the one of this name.

    Raises:
        FileError: there is none.
    """
    several = {str(own.header["name"]): own for own in by_name(folder) if own.header is not None}
    if len(several) < 2:
        return folder
    if name not in several:
        reason = f"it holds the adapters {', '.join(several)}, and name={name!r}"
        refuse(str(folder.path), reason, "say which of them by name, or lora_fx.from_pretrained them all")
    return several[name]


def _is_alone(path: Path, name: str) -> bool:
    return (path / name).is_file() and not (path / CONFIG).is_file()


def _is_ours(file: Path) -> bool:
    """It has our header: a whole model's file is not read for that."""
    with open(regular(file), "rb") as opened:
        table = json.loads(tensor_table(opened, str(file), _RESTORE))
    return isinstance(table, dict) and HEADER in (table.get("__metadata__") or {})


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
    "modules_to_save": (_are(_is_text), "a list of names"),
    "bias": (lambda v: v in ("none", "all", "lora_only"), "'none', 'all' or 'lora_only'"),
    "lora_bias": (lambda v: isinstance(v, bool), "true or false"),
    "ensure_weight_tying": (lambda v: isinstance(v, bool), "true or false"),
    "trainable_token_indices": (
        lambda v: _are(_is_int)(v) or _table_of(_are(_is_int))(v),
        "a list of integers, or a table of such lists",
    ),
    "layers_to_transform": (lambda v: _is_int(v) or _are(_is_int)(v), "an integer or a list of integers"),
    "layers_pattern": (lambda v: _is_text(v) or _are(_is_text)(v), "a name or a list of names"),
}
_NEEDED = ("r", "lora_alpha", "init_r")  # PEFT has no null there

#: what an AdaLoRA's config has besides, or means by a word of the same name
_ADALORA_TYPES = {
    "init_r": _TYPES["r"],
    "rank_pattern": (_table_of(_are(lambda v: isinstance(v, bool))), "a table of lists of true and false"),
}


def read_config(file: Path) -> dict[str, Any]:
    """PEFT's options, each of a type that it may have."""
    with boundary("it cannot be read", str(file), _RESTORE):
        config = json.loads(contents(file, _RESTORE).decode("utf-8"))
    if not isinstance(config, dict):
        refuse(str(file), f"it holds a {type(config).__name__}, not a table", _RESTORE)
    kind = config.get("peft_type")
    if kind not in (PEFT, ADALORA, OWN):
        refuse(f"{file}, peft_type", f"{kind!r} is no LoRA adapter", "load it with the library that wrote it")
    check_types(config, str(file))
    return config


def check_types(config: Mapping[str, Any], file: str) -> None:
    """Refuse options of PEFT's that are not what they may be."""
    for key, (test, wanted) in (_TYPES | (_ADALORA_TYPES if config["peft_type"] == ADALORA else {})).items():
        default = key not in config or (config[key] is None and key not in _NEEDED)
        if not default and not test(config[key]):
            refuse(f"{file}, {key}", f"{repr(config[key])[:200]} is not {wanted}", _RESTORE)


# ── adapter_model.safetensors ────────────────────────────────────────────────────────────────────────────────────────


def _pack(tensors: dict[str, torch.Tensor], header: dict[str, Any]) -> bytes:
    """A safetensors file with our header in it, and a digest over the header and the numbers."""
    import safetensors.torch

    tensors = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
    text = to_json(header).decode()
    return packed(tensors, safetensors.torch, {"format": "pt", HEADER: text}, DIGEST, text)


_Unpacked = tuple[dict[str, torch.Tensor], dict[str, Any] | None, dict[str, str]]


def _unpack(file: Path) -> _Unpacked:
    from safetensors.torch import load

    meta: dict[str, str] = {}
    with boundary("it cannot be read", str(file), _RESTORE):
        data = contents(file, _RESTORE, most=None)
        if file.suffix in PICKLES:
            tensors = unpickled(data, str(file))
        else:
            table = tensor_table(io.BytesIO(data), str(file), _RESTORE)
            tensors = load(data)
            meta = json.loads(table).get("__metadata__") or {}
    for key, tensor in tensors.items():
        counts = tensor.dtype in (torch.int64, torch.bool) and ".lora_" not in key  # buffers beside what was trained
        if not counts and (not tensor.is_floating_point() or tensor.dtype.itemsize < 2):
            dtypes = "factors are float16, bfloat16, float32 or float64: save them so"
            refuse(f"{file}, {key}", f"its dtype is {tensor.dtype}", dtypes)
        if not bool(tensor.float().isfinite().all()):
            reason = "it holds NaN, Inf or numbers beyond float32"
            refuse(f"{file}, {key}", reason, "load an earlier checkpoint of the adapter")
    return tensors, _read_header(meta, data, f"{file}, {HEADER}") if HEADER in meta else None, meta


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


def write_single(file: Path, tensors: dict[str, torch.Tensor], said: dict[str, str]) -> None:
    """One safetensors file, in the place of another or of none, in one step."""
    import safetensors.torch

    _write_whole(file, safetensors.torch.save({k: t.detach().cpu().contiguous() for k, t in tensors.items()}, said))


def write_checkpoint(file: Path, tensors: dict[str, torch.Tensor], header: dict[str, Any]) -> None:
    """The same with our header."""
    _write_whole(file, _pack(tensors, header))


def _write_whole(file: Path, data: bytes) -> None:
    file = file.resolve()
    if file.is_dir():
        refuse(str(file), "it is a folder", "pass the path of a file that ends in .safetensors")
    fresh = file.with_name(f".{file.name}.{secrets.token_hex(4)}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        _write_file(fresh, data)
        os.replace(fresh, file)
        _sync_folder(file.parent)
    except OSError as error:
        refuse(str(file), f"it cannot be written: {error}", "choose a disk with space and permission", error)
    finally:
        fresh.unlink(missing_ok=True)


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
