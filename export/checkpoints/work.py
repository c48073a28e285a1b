"""A folder that is written in one step, in however many processes: OUT.partial, until it is whole and becomes OUT.

    OUT.partial/.journal    {"task": …}                         what is being done; another task does not go on here
                            {"file": …, "bytes": …, sha256 …}   how far each file is

A line is added after each block. A line that a kill has cut short is none, and a file that does not have the digest of
its last line begins anew. So whatever ends a run, running it again gives the same bytes.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO

from lora_fx.errors import FileError
from lora_fx.export.checkpoints.streams import Prefix
from lora_fx.reading import refuse, to_json

_JOURNAL = ".journal"
_SPARE = 2**20  # bytes for manifest and journal


class Work:
    """What is being done in a folder that is not whole yet.

    Args:
        out: the folder that it becomes.
        task: what is done, as JSON can say it: where it is what an earlier process did, that is gone on with.
        size: bytes that will be written, for the disk.

    Raises:
        FileError: `out` is there and not empty, another process or another task is at work, or there is no room.
    """

    def __init__(self, out: Path, task: Mapping[str, Any], size: int) -> None:
        self.out, self.task, self.size = out.absolute(), json.loads(to_json(task)), size
        self.folder = self.out.with_name(f"{self.out.name}.partial")
        self.done: dict[str, Prefix] = {}

    @contextmanager
    def begun(self) -> Iterator[Work]:
        """Inside, files may be written. What ends it early leaves what was finished, for the next time."""
        refuse_taken(self.out)
        with self._refusing():
            self.folder.mkdir(parents=True, exist_ok=True)
        with self._refusing(), open(self.folder / _JOURNAL, "a+b") as self._journal:
            _lock(self._journal, self.folder)
            fresh = self._journal.tell() == 0  # it is opened at its end
            try:
                self._read()
                self._refuse_small_disk()
                yield self
            except BaseException:
                if fresh and not any(prefix.bytes for prefix in self.done.values()):  # nothing to go on with
                    shutil.rmtree(self.folder, ignore_errors=True)
                raise

    def _read(self) -> None:
        self._journal.seek(0)
        lines = self._journal.read().split(b"\n")[:-1]  # what comes after the last end of a line was cut short
        whole = sum(len(line) + 1 for line in lines)
        self._journal.truncate(whole)
        try:
            rows = [json.loads(line) for line in lines]
            first = rows[0]["task"] if rows else None
            self.done = {row.pop("file"): Prefix(**row) for row in rows[1:]}
        except (ValueError, KeyError, TypeError):
            refuse(str(self.folder / _JOURNAL), "it is no journal of lora_fx", f"remove {self.folder} to begin anew")
        if first is None:
            self._line({"task": self.task})
        elif first != self.task:
            changed = [key for key in self.task if first.get(key) != self.task[key]]
            reason = f"another task was begun in it: it differs in {', '.join(changed) or 'its version'}"
            refuse(str(self.folder), reason, "finish that one, or remove the folder to begin anew")

    def _refuse_small_disk(self) -> None:
        there = sum(f.stat().st_size for f in self.folder.rglob("*") if f.is_file())
        free = shutil.disk_usage(self.folder).free
        if (missing := self.size + _SPARE - there - free) > 0:
            reason = f"{self.size - there:,} bytes are to be written, and the disk has {free:,}"
            refuse(str(self.folder), reason, f"make room for {missing:,} bytes, or write to another disk")

    def file(self, name: str) -> Path:
        """Where a file of the folder is written."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def noting(self, name: str, progress: Callable[[int], None]) -> Callable[[Prefix], None]:
        """What writes down how far a file is, and tells how many bytes have come to it."""
        before = 0

        def note(prefix: Prefix) -> None:
            nonlocal before
            if self.done.get(name) != prefix:
                self.done[name] = prefix
                self._line({"file": name, **asdict(prefix)})
            progress(prefix.bytes - before)
            before = prefix.bytes

        return note

    def _line(self, row: Mapping[str, Any]) -> None:
        self._journal.write(to_json(row) + b"\n")
        self._journal.flush()

    def publish(self, manifest: Mapping[str, bytes]) -> None:
        """The last files, and then the folder gets its name."""
        for name, data in manifest.items():
            self.file(name).write_bytes(data)
        _sync(self.folder)
        refuse_taken(self.out)
        (self.folder / _JOURNAL).unlink()
        os.replace(self.folder, self.out)

    @contextmanager
    def _refusing(self) -> Iterator[None]:
        """What the system says, as an error of ours."""
        try:
            yield
        except OSError as error:
            kept = f"; what was finished is kept in {self.folder}" if self.folder.is_dir() else ""
            how = {errno.ENOSPC: "make room", errno.EDQUOT: "make room", errno.EACCES: "choose a folder of yours"}
            remedy = f"{how.get(error.errno or 0, 'see to that')}, and run it again"
            raise FileError(
                f"{error.strerror or error}{kept}",
                place=str(error.filename or self.out),
                remedy=remedy,
            ) from error


def refuse_taken(out: Path) -> None:
    """What is written is a folder that is not there, or empty."""
    if out.is_dir() and not any(out.iterdir()):
        return
    if out.exists() or out.is_symlink():
        what = "the folder is not empty" if out.is_dir() else "it is there, and no folder"
        refuse(str(out), what, "choose another name, or remove it first")


def _lock(file: BinaryIO, folder: Path) -> None:
    """Until it is closed, or the process ends; where the system has no such locks, nobody else is kept out."""
    try:
        import fcntl
    except ImportError:
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        refuse(str(folder), "another process is at work in it", "wait for that one", error)


def _sync(folder: Path) -> None:
    """Everything in a folder is on its disk, before the folder gets its name."""
    for path in folder.rglob("*"):
        if path.is_file():
            handle = os.open(path, os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)
