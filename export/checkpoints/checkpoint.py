"""A checkpoint on disk: which tensor lies where, without reading a number of it.

A folder with ``….safetensors.index.json`` and its shards, a folder with safetensors files, or one such file. Every
other file of the folder belongs to it and is copied as it is. The tables are read here and not by `safetensors`, which
maps whole files into memory: a shard may be larger than the address space that a job is given.
"""

from __future__ import annotations

import fnmatch
import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from lora_fx.errors import few
from lora_fx.reading import RESTORE, TABLE, boundary, contents, refuse, regular, tensor_table

MANIFEST, REMAINDER = "lora_fx_fold.json", "lora_fx_remainder"
"""What a fold adds to a folder: its manifest, and with ``keep`` the way back."""

#: dtypes that a fold computes with, by their names in safetensors files
FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}

#: bytes of an element; what is not here is copied, and its size is not checked
_SIZES = {
    "F64": 8, "I64": 8, "U64": 8, "C64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2,
    "I8": 1, "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1,
}  # fmt: skip

#: what may hold the base's weights a second time: a loader that takes it would not see the fold
_COPIES = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.gguf", "*.onnx", "*.onnx_data", "*.h5", "*.msgpack", "*.ckpt")

_WHOLE = "restore the checkpoint from where it was saved"


@dataclass(frozen=True)
class Stored:
    """A tensor in a file."""

    name: str
    file: str
    dtype: str
    """As safetensors call it."""
    shape: tuple[int, ...]
    start: int
    """Its first byte in the file."""
    stop: int

    @property
    def elements(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class Checkpoint:
    """Where everything is."""

    place: Path
    """The folder."""
    shards: dict[str, int]
    """File → its bytes."""
    tensors: dict[str, Stored]
    others: tuple[str, ...]
    """Paths of all other files in the folder, relative to it."""
    aliases: dict[str, str] = field(default_factory=dict)
    """Another name of a tensor → the one that is stored, where `safetensors.torch.save_model` wrote it."""
    config: dict[str, Any] = field(default_factory=dict)
    """config.json, where there is one."""

    @property
    def files(self) -> tuple[str, ...]:
        """All of them, in order."""
        return tuple(sorted([*self.shards, *self.others]))

    @property
    def bytes(self) -> int:
        return sum((self.place / name).stat().st_size for name in self.files)

    def at(self, name: str) -> str:
        """The place of a tensor, for errors."""
        return f"{self.place / self.tensors[name].file}, {name}"

    def read(self, name: str) -> torch.Tensor:
        """The numbers of one tensor that is floating point, as they are stored."""
        stored = self.tensors[name]
        return self.read_rows(name, 0, stored.shape[0] if stored.shape else 1)

    def read_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """The indices start:stop of its first axis."""
        stored = self.tensors[name]
        rows = max(stored.shape[0], 1) if stored.shape else 1
        width = (stored.stop - stored.start) // rows
        data = torch.empty((stop - start) * width, dtype=torch.uint8)
        with boundary("it cannot be read", self.at(name), _WHOLE), open(self.place / stored.file, "rb") as file:
            file.seek(stored.start + start * width)
            got = file.readinto(data.numpy().data) if len(data) else 0
        if got != len(data):
            refuse(self.at(name), "the file ends before the tensor does", _WHOLE)
        shape = (stop - start, *stored.shape[1:]) if stored.shape else ()
        return data.view(FLOATS[stored.dtype]).view(shape)


def read_checkpoint(path: str | os.PathLike[str], leave_out: Sequence[str] = ()) -> Checkpoint:
    """Read the tables of a checkpoint, and check what they say of its files.

    Args:
        path: its folder, or one safetensors file.
        leave_out: patterns of files that are no part of it (``original/*``).

    Raises:
        FileError: there is none; an index lies, or leaves its folder; a shard is missing, truncated or damaged; or a
            file beside the shards may hold the weights a second time.
    """
    place = Path(path)
    if place.is_file():
        return _checkpoint(place.parent, [place.name], [])
    if not place.is_dir():
        refuse(str(place), "there is no such file or folder", "pass the folder of a checkpoint")
    names = [name for name in _files(place) if not any(fnmatch.fnmatch(name, p) for p in leave_out)]
    top = [name for name in names if "/" not in name]
    indexes = [name for name in top if name.endswith(".safetensors.index.json")]
    if len(indexes) > 1:
        refuse(str(place), f"it has {len(indexes)} indexes: {few(indexes, 5)}", "leave out all but one")
    shards = _indexed(place, indexes[0]) if indexes else [name for name in top if name.endswith(".safetensors")]
    if not shards:
        refuse(str(place), "it holds no .safetensors file", "save the checkpoint with safe_serialization=True")
    others = [name for name in names if name not in shards]
    for name in others:
        if any(fnmatch.fnmatch(name, pattern) for pattern in _COPIES):
            reason = "it may hold the weights a second time, and a loader that takes it would not see the fold"
            refuse(str(place / name), reason, f"leave it out: --leave-out {name!r}, or leave_out=[{name!r}]")
    found = _checkpoint(place, shards, others)
    if indexes:
        _check_index(place / indexes[0], found)
    return found


def _files(place: Path) -> list[str]:
    """All files in a folder, without what an earlier fold has put there."""
    names = []
    for at, folders, files in os.walk(place):
        inside = Path(at).relative_to(place)
        folders[:] = sorted(f for f in folders if (inside / f).as_posix() != REMAINDER)
        for name in folders:
            if (Path(at) / name).is_symlink():
                refuse(str(Path(at) / name), "it is a link to a folder", "leave it out, or put the folder in its place")
        names += [(inside / name).as_posix() for name in files if (inside / name).as_posix() != MANIFEST]
    return sorted(names)


def _table_of(file: Path) -> dict[str, str]:
    with boundary("it is no index of safetensors files", str(file), _WHOLE):
        table = json.loads(contents(file, RESTORE, TABLE))["weight_map"]
        assert all(isinstance(name, str) for name in table.values()), "weight_map does not name files"
    return table


def _indexed(place: Path, index: str) -> list[str]:
    """The shards that an index names: files of its own folder."""
    found = sorted({*_table_of(place / index).values()})
    for name in found:
        if Path(name).name != name or name in ("", ".", ".."):
            refuse(str(place / index), f"it names {name!r}, which is no file beside it", _WHOLE)
        if not (place / name).exists():
            refuse(str(place / index), f"it names {name}, which is not there", "restore that shard")
    return found


def _check_index(index: Path, found: Checkpoint) -> None:
    table = _table_of(index)
    for name in sorted({*table, *found.tensors}):
        stored = found.tensors.get(name)
        where = None if stored is None else stored.file
        if where != table.get(name):
            reason = f"it says that {name} is in {table.get(name, 'no file')}, and it is in {where or 'none of them'}"
            refuse(str(index), reason, _WHOLE)


def _checkpoint(place: Path, shards: Sequence[str], others: Sequence[str]) -> Checkpoint:
    sizes: dict[str, int] = {}
    tensors: dict[str, Stored] = {}
    aliases: dict[str, str] = {}
    for name in others:
        regular(place / name, "leave it out, or put a file in its place")
    for shard in shards:
        own, said, sizes[shard] = _read_table(place, shard)
        for stored in own:
            if stored.name in tensors:
                reason = f"{stored.name} is in {tensors[stored.name].file}, too"
                refuse(str(place / shard), reason, "leave one of them out")
            tensors[stored.name] = stored
        aliases |= {name: kept for name, kept in said.items() if isinstance(kept, str)}
    aliases = {name: kept for name, kept in aliases.items() if kept in tensors and name not in tensors}
    config = {}
    if (place / "config.json").is_file():
        with boundary("it cannot be read", str(place / "config.json"), _WHOLE):
            config = json.loads(contents(place / "config.json"))
            assert isinstance(config, dict), "it holds no table"
    return Checkpoint(place, sizes, tensors, tuple(others), aliases, config)


def _read_table(place: Path, shard: str) -> tuple[list[Stored], dict[str, Any], int]:
    """The tensors of a file, in the order in which they lie, its metadata, and its size."""
    path = regular(place / shard, _WHOLE)
    unread, none = (boundary(why, str(path), _WHOLE) for why in ("it cannot be read", "it is no safetensors file"))
    with unread, open(path, "rb") as file, none:
        size = os.fstat(file.fileno()).st_size
        table = json.loads(tensor_table(file, str(path), _WHOLE))
        first = file.tell()
        said = table.pop("__metadata__", None) or {}
        found = []
        for name, row in table.items():
            start, stop = (int(offset) for offset in row["data_offsets"])
            shape = tuple(int(n) for n in row["shape"])
            assert 0 <= start <= stop and all(n >= 0 for n in shape), f"{name} has no place"
            wanted = math.prod(shape) * _SIZES.get(row["dtype"], 0)
            assert row["dtype"] not in _SIZES or stop - start == wanted, (
                f"{name} has {stop - start} bytes, and its shape {shape} in {row['dtype']} wants {wanted}"
            )
            found.append(Stored(name, shard, str(row["dtype"]), shape, first + start, first + stop))
    found.sort(key=lambda stored: (stored.start, stored.stop))
    end = first
    for stored in found:
        if stored.start != end:
            refuse(str(path), f"{stored.name} does not begin where the tensor before it ends", _WHOLE)
        end = stored.stop
    if end != size:
        short = "truncated" if end > size else "longer than its table says"
        refuse(str(path), f"it is {short}: it has {size:,} bytes, and its table speaks of {end:,}", _WHOLE)
    return found, said, size
