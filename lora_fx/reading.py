"""Files that somebody else made: what is opened is a regular file, of a size that can be, and what it says of itself.

A name in a folder may be a pipe, which keeps a reader waiting for ever, a device or another folder. A table may say
that it has millions of rows. One flipped bit may leave a file that loads. So each loader begins here, before a library
sees the file, and what a library raises inside of `boundary` comes out as one of our errors.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from lora_fx.errors import FileError, LoraFxError, essence

TEXT = 8 * 2**20
"""Bytes of a text, a table of settings: what Python makes of it takes up to 25 times as much."""

TABLE = 24 * 2**20
"""Bytes of the table of a safetensors file."""

_LONG = re.compile(rb'\[[^\[\]"]{4000}')
"""A list of numbers that is no shape."""

ROWS = 100_000
"""Tensors of a safetensors file: the adapter of every expert of the largest models stays below."""

RESTORE = "restore the file, or pass another path"


def refuse(place: str, reason: str, remedy: str, cause: BaseException | None = None) -> NoReturn:
    raise FileError(reason, place=place, remedy=remedy) from cause


@contextmanager
def boundary(reason: str, place: str, remedy: str, error: type[LoraFxError] = FileError) -> Iterator[None]:
    """Inside, what a library raises becomes one of our errors: the reason, and what the library says. An error of ours
    has said it; that of a file becomes one of the kind that is wanted."""
    try:
        yield
    except LoraFxError as own:
        if error is FileError or not isinstance(own, FileError):
            raise
        raise error(own.reason, place=own.place, remedy=own.remedy) from own
    except Exception as cause:
        said = essence(cause)
        raise error(f"{reason}: {said}" if reason else said, place=place, remedy=remedy) from cause


def regular(path: str | os.PathLike[str], remedy: str = RESTORE) -> Path:
    """The path, of a regular file, or of a link to one.

    Raises:
        FileError: it is something else, or nothing.
    """
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError) as error:
        refuse(str(path), f"it cannot be read: {getattr(error, 'strerror', None) or error}", remedy, error)
    if not stat.S_ISREG(mode):
        refuse(str(path), f"it is no regular file but {_kind(mode)}", remedy)
    return Path(path)


def _kind(mode: int) -> str:
    kinds = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket"}
    return kinds.get(stat.S_IFMT(mode), "a device")


def contents(path: str | os.PathLike[str], remedy: str = RESTORE, most: int | None = TEXT) -> bytes:
    """What is in a regular file, of no more bytes than `most`.

    Raises:
        FileError: it is none, is larger, or cannot be read.
    """
    file = regular(path, remedy)
    with boundary("it cannot be read", str(file), remedy):
        size = file.stat().st_size
        if most is not None and size > most:
            refuse(str(file), f"it has {size:,} bytes, and {most:,} are the most that such a file may have", remedy)
        return file.read_bytes()


def tensor_table(file: BinaryIO, place: str, remedy: str = RESTORE) -> bytes:
    """The table of a safetensors file, as it is written there: the reader is left where the numbers begin.

    Raises:
        FileError: it is larger, or has more rows, than any that is read here.
    """
    size = int.from_bytes(file.read(8), "little")
    if size > TABLE:
        reason = f"it cannot be read: its table would have {size:,} bytes, and {TABLE:,} are the most that are read"
        refuse(place, reason, remedy)
    table = file.read(size)
    if _LONG.search(table):
        refuse(place, "it cannot be read: a tensor of its table has thousands of axes", remedy)
    rows = table.count(b'"data_offsets"')
    if rows > ROWS:
        refuse(place, f"it has {rows:,} tensors, and {ROWS:,} are the most that are read", remedy)
    return table


def tensors_digest(text: str, file: BinaryIO) -> str:
    """sha256 over a text, what a safetensors file says of each tensor (name, dtype, shape, place), and the numbers."""
    table = json.loads(tensor_table(file, "the tensors"))
    table.pop("__metadata__", None)
    digest = hashlib.sha256(b"\0".join((text.encode(), to_json(table), b"")))
    while chunk := file.read(2**20):
        digest.update(chunk)
    return digest.hexdigest()


def packed(tensors: dict[str, Any], framework: Any, metadata: dict[str, str], key: str, text: str) -> bytes:
    """A safetensors file with metadata, and under a key of it the digest of a text and of the tensors.

    Args:
        framework: `safetensors.torch` or `safetensors.numpy`.
    """
    plain = framework.save(tensors)
    return framework.save(tensors, {**metadata, key: tensors_digest(text, io.BytesIO(plain))})


def to_json(value: Any, indent: int | None = None) -> bytes:
    return json.dumps(value, indent=indent, sort_keys=True, allow_nan=False).encode()
