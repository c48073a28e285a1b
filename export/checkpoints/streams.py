"""A file written anew from another, block by block: read, changed and written at the same time.

    reader   reads a block of the source, and puts it into the digest of what was read
    caller   changes it
    writer   writes it, puts it into the digest of what was written, and says how far the file is
    flusher  waits until it is on the disk

At most a few blocks are under way, and no more than these stay in the system's cache: what is there of others is not
pushed out by bytes that are needed once, and memory that was given back a moment ago is faster than memory that the
system has to find. What a process that was killed had written is taken up again where its last line in
the journal ends, once both files have the digests there that the line has.
"""

from __future__ import annotations

import hashlib
import mmap
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lora_fx.export.checkpoints.arithmetic import BLOCK
from lora_fx.reading import refuse

_DEPTH = 2  # blocks that are read ahead, and as many that wait to be written
_MOST = 8  # blocks that are changed at a time: each takes memory
_PART = 2**20  # bytes of one call of the system: they are still in the cache when they are hashed
_UNWRITTEN = 2**24  # bytes that are in the system's cache, and not on the disk, before that is seen to
_AGAIN = "restore it, or remove what was begun to begin anew"
_EMPTY = hashlib.sha256().hexdigest()


@dataclass(frozen=True)
class Segment:
    """Some bytes of a file, and what becomes of them."""

    start: int
    stop: int
    change: Callable[[torch.Tensor], bytes | None] | None = None
    """Changes the bytes in place; what it returns goes to the file beside. None: they are copied."""


@dataclass(frozen=True)
class Prefix:
    """How far a file is."""

    bytes: int = 0
    source: str = _EMPTY
    """sha256 of as much of the source, in hexadecimal."""
    target: str = _EMPTY
    """… of the target."""
    beside: int = 0
    """Bytes of the file beside."""
    beside_digest: str = _EMPTY


@dataclass(frozen=True)
class Rewriting:
    """One file on its way.

    Args:
        source: what is read.
        target: what is written.
        beside: where what the changes return is put, one after the other, each after its length.
        copied: nothing is changed: the target's digest is the source's.
    """

    source: Path
    target: Path
    beside: Path | None = None
    copied: bool = False

    def run(self, segments: Iterable[Segment], was: Prefix, said: Callable[[Prefix], None]) -> Prefix:
        """Write the target, from where it is: all that was written is trusted, or nothing.

        Args:
            segments: all of the file's, in order. One that begins before `was` ends also ends before.
            was: how far an earlier process has said to be.
            said: is told how far the file is: once at its beginning, and after each block.

        Raises:
            FileError: the source is another one than it was then.
        """
        with _Files(self, was) as files:
            end = files.begun
            said(end)
            for end in _overlapped(files, (s for s in segments if s.stop > files.begun.bytes)):
                said(end)
        return end


def digest(path: Path, progress: Callable[[int], None] | None = None) -> str:
    """sha256 of a file, in hexadecimal."""
    with open(path, "rb", buffering=0) as file:
        return _fed(file, os.fstat(file.fileno()).st_size, progress).hexdigest()


def _fed(file: Any, count: int, progress: Callable[[int], None] | None = None) -> Any:
    """A digest of the next bytes of a file, or of fewer where it ends before."""
    found, buffer = hashlib.sha256(), memoryview(bytearray(4 * 2**20))
    while count:
        got = file.readinto(buffer[: min(len(buffer), count)])
        if not got:
            break
        found.update(buffer[:got])
        count -= got
        if progress is not None:
            progress(got)
    return found


@dataclass(frozen=True)
class _Changed:
    """A segment that is to be written."""

    segment: Segment
    buffer: torch.Tensor
    source: str
    """The digest of the source up to its end."""
    more: bytes | None


class _Files:
    """The files of a rewriting, open where it goes on, and their digests so far."""

    def __init__(self, of: Rewriting, was: Prefix) -> None:
        self.of, self.begun = of, was
        self.buffers: list[torch.Tensor] = []
        self.forgotten = 0

    def __enter__(self) -> _Files:
        with ExitStack() as stack:
            self.source = stack.enter_context(open(self.of.source, "rb", buffering=0))
            self.target = stack.enter_context(_opened(self.of.target))
            self.beside = None if self.of.beside is None else stack.enter_context(_opened(self.of.beside))
            self._take_up()
            self.closing = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self.closing.close()

    def _take_up(self) -> None:
        was = self.begun
        with ThreadPoolExecutor(2) as both:
            source = both.submit(_fed, self.source, was.bytes)
            target = both.submit(_fed, self.target, was.bytes)
            self.read_digest, self.digest = source.result(), target.result()
        self.beside_digest = hashlib.sha256() if self.beside is None else _fed(self.beside, was.beside)
        if self.read_digest.hexdigest() != was.source:
            refuse(str(self.of.source), "it is not what it was when this was begun", _AGAIN)
        found = (self.digest.hexdigest(), self.beside_digest.hexdigest())
        if found != (was.target, was.beside_digest):
            self.begun = Prefix()
            self.read_digest, self.digest, self.beside_digest = (hashlib.sha256() for _ in range(3))
        self.beside_at = self.begun.beside
        self.source.seek(self.begun.bytes)
        for file, at in ((self.target, self.begun.bytes), (self.beside, self.begun.beside)):
            if file is not None:
                file.seek(at)
                file.truncate(at)

    def read(self, segment: Segment) -> tuple[torch.Tensor, str]:
        """A buffer that begins with the segment's bytes, and the digest of the source so far."""
        _forget(self.source, self.forgotten, segment.start)  # all that was read before, up to its last page
        self.forgotten = segment.start
        size = segment.stop - segment.start
        if size <= BLOCK and self.buffers:
            buffer = self.buffers.pop()
        else:
            buffer = torch.empty(max(size, BLOCK), dtype=torch.uint8)
        data, got = buffer.numpy().data[:size], 0
        while got < size:
            more = self.source.readinto(data[got : got + _PART])
            if not more:
                refuse(str(self.of.source), f"it ends at byte {segment.start + got:,}", "restore the file")
            self.read_digest.update(data[got : got + more])
            got += more
        return buffer, self.read_digest.hexdigest()

    def write(self, changed: _Changed) -> Prefix:
        segment, buffer, more = changed.segment, changed.buffer, changed.more
        data = buffer.numpy().data[: segment.stop - segment.start]
        _write(self.target, data, None if self.of.copied else self.digest)
        if more is not None:
            assert self.beside is not None
            record = len(more).to_bytes(8, "little") + more
            _write(self.beside, memoryview(record), self.beside_digest)
            self.beside_at += len(record)
        if len(buffer) == BLOCK:
            self.buffers.append(buffer)
        target = changed.source if self.of.copied else self.digest.hexdigest()
        return Prefix(segment.stop, changed.source, target, self.beside_at, self.beside_digest.hexdigest())

    def flush(self, start: int, stop: int) -> None:
        """What was written there goes to the disk, and out of the cache."""
        if hasattr(os, "posix_fadvise"):
            os.fdatasync(self.target.fileno())
            _forget(self.target, start, stop)


def _forget(file: Any, start: int, stop: int) -> None:
    """The system need not keep these bytes in its cache: whole pages of them, once they are on the disk."""
    if hasattr(os, "posix_fadvise") and stop > start:
        first = start // mmap.PAGESIZE * mmap.PAGESIZE
        os.posix_fadvise(file.fileno(), first, stop - first, os.POSIX_FADV_DONTNEED)


def _opened(path: Path) -> Any:
    return open(path, "r+b" if path.exists() else "x+b", buffering=0)


def _write(file: Any, data: memoryview, digest: Any | None) -> None:
    """Into the file, and into the digest of what it holds."""
    while data:
        part = data[: file.write(data[:_PART])]
        if digest is not None:
            digest.update(part)
        data = data[len(part) :]


def _overlapped(files: _Files, segments: Iterable[Segment]) -> Iterator[Prefix]:
    """Reader, writer and flusher have a thread each, which takes what it is given in order; changes have as many as
    torch has."""
    changing: deque[Future[_Changed]] = deque()
    behind: deque[Future[Prefix]] = deque()
    flushing: deque[Future[None]] = deque()
    flushed = files.begun.bytes

    def change(segment: Segment, read: Future[tuple[torch.Tensor, str]]) -> _Changed:
        buffer, source = read.result()
        more = segment.change(buffer[: segment.stop - segment.start]) if segment.change else None
        return _Changed(segment, buffer, source, more)

    def write(changed: Future[_Changed]) -> Prefix:
        nonlocal flushed
        end = files.write(changed.result())
        if end.bytes - flushed >= _UNWRITTEN:
            flushing.append(flusher.submit(files.flush, flushed, end.bytes))
            flushed = end.bytes
        if len(flushing) > _DEPTH:
            flushing.popleft().result()
        return end

    with ExitStack() as stack:
        count = stack.enter_context(_one_thread_each())
        flusher, reader, changer, writer = (stack.enter_context(ThreadPoolExecutor(n)) for n in (1, 1, count, 1))
        for segment in segments:
            changing.append(changer.submit(change, segment, reader.submit(files.read, segment)))
            if len(changing) > count + _DEPTH:
                behind.append(writer.submit(write, changing.popleft()))
            if len(behind) > _DEPTH:
                yield behind.popleft().result()
        while changing:
            behind.append(writer.submit(write, changing.popleft()))
        while behind:
            yield behind.popleft().result()
        for flush in flushing:
            flush.result()


@contextmanager
def _one_thread_each() -> Iterator[int]:
    """Inside, an op of torch runs in one thread; what comes is how many there were. Blocks side by side keep the cores
    busy where ops in several threads would wait for each other after each."""
    count = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield min(count, _MOST)
    finally:
        torch.set_num_threads(count)


def copies(start: int, stop: int) -> Iterator[Segment]:
    """The segments of bytes that are copied."""
    for at in range(start, stop, BLOCK):
        yield Segment(at, min(at + BLOCK, stop))
