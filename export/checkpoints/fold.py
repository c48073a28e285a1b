"""Fold a checkpoint, not a model:   every file of BASE, with round(W + Σ δ) where an adapter has an entry for W

A shard is copied byte by byte, header and all; only the bytes of adapted tensors become others, some rows at a time.
So names, shards, order, dtypes and metadata stay, whatever they are, and memory is a few blocks and the adapters.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from lora_fx.errors import FoldError, few
from lora_fx.export.adapters.beside import RESIZED
from lora_fx.export.adapters.folder import read_folder
from lora_fx.export.checkpoints.arithmetic import BLOCK, Arithmetic, Piece, pieces
from lora_fx.export.checkpoints.checkpoint import MANIFEST, REMAINDER, Checkpoint, read_checkpoint
from lora_fx.export.checkpoints.entries import Given, Share, read_shares
from lora_fx.export.checkpoints.manifest import File, Manifest, read_manifest
from lora_fx.export.checkpoints.streams import Prefix, Rewriting, Segment, copies, digest
from lora_fx.export.checkpoints.work import Work
from lora_fx.reading import refuse

Adapters = str | os.PathLike[str] | Mapping[Any, float] | Sequence[Any]
Progress = Callable[[int, int], None]
"""Is told how many bytes are done, of how many."""


@dataclass(frozen=True)
class Folded:
    """What a fold has written."""

    folder: Path
    tensors: tuple[str, ...]
    """Those that are other numbers now."""
    bytes: int
    """Of all files, without the way back."""
    kept_bytes: int
    """Of the way back."""

    def __str__(self) -> str:
        kept = f", and {self.kept_bytes:,} to unfold it" if self.kept_bytes else ""
        return f"{self.folder}: {len(self.tensors)} tensors folded, {self.bytes:,} bytes{kept}"


def fold_checkpoint(
    base: str | os.PathLike[str],
    adapters: Adapters,
    out: str | os.PathLike[str],
    *,
    keep: bool = False,
    part: str | None = None,
    config: Mapping[str, Any] | None = None,
    leave_out: Sequence[str] = (),
    progress: Progress | None = None,
) -> Folded:
    """Fold adapters into a checkpoint on disk, tensor by tensor: `out` is `base` with round(W + Σ strength·δ) in it.

    Every element is the real sum, rounded once to the tensor's own dtype, as `fold` does it in a model. Shards, index,
    names, dtypes and all other files stay as they are. Memory is the adapters' and some blocks of 16 MiB (of a row,
    where that is larger; of a whole tensor for kinds that cannot be taken by rows). The folder appears when it is
    whole: until then ``out.partial`` holds what is finished, and the same call goes on with that, to the same bytes.

    Args:
        base: a folder of safetensors shards, with its index or without; or one safetensors file.
        adapters: an adapter in any dialect that `load_adapter` reads, its folder or its file; several; or path →
            strength, with which δ is multiplied.
        out: the folder to write; not there, or empty.
        keep: also write what rounding took away, some tenths of a byte for each element that is folded, and the
            adapters: then `unfold_checkpoint` gives the base back to the bit.
        part: of files for several models of a pipeline, which one the base is: ``"unet"``, ``"text_encoder"``.
        config: options of PEFT's that the files do not say, as ``{"lora_alpha": 16}`` of one file.
        leave_out: patterns of files of `base` that are no part of it.
        progress: is called with the bytes that are done, and those that there are.

    Raises:
        FileError: base, adapter or index are damaged, do not belong together, or say too little without the model; or
            `out` cannot be written.
        FoldError: a number is not finite, or does not fit into the dtype.
    """
    checkpoint = read_checkpoint(base, leave_out)
    given = [Given(path, strength, part, config or {}) for path, strength in _strengths(adapters)]
    shares: dict[str, list[Share]] = {}
    said = []
    for k, one in enumerate(given):
        own = read_shares(one, checkpoint, f"adapter {k + 1}" if len(given) > 1 else "default")
        said.append(_said(one, own))
        for share in own:
            shares.setdefault(share.tensor, []).append(share)
    size = checkpoint.bytes + (sum(checkpoint.tensors[name].elements for name in shares) if keep else 0)
    task = {
        "verb": "fold", "version": 2, "block": BLOCK, "keep": keep, "adapters": said,
        "base": {name: (checkpoint.place / name).stat().st_size for name in checkpoint.files},
    }  # fmt: skip
    with Work(Path(out), task, size).begun() as work:
        files, beside = _folded(work, checkpoint, shares, keep, _counter(checkpoint.bytes, progress))
        extra: dict[str, bytes] = {}
        if keep:
            for k, (one, of) in enumerate(zip(given, said, strict=True)):
                home = read_folder(one.path).home
                extra |= {f"{REMAINDER}/adapter_{k}/{name}": (home / name).read_bytes() for name in of["sha256"]}
        manifest = Manifest(checkpoint.place.resolve().name, said, files, beside, sorted(shares), keep)
        work.publish({**extra, MANIFEST: manifest.to_json()})
    return Folded(Path(out), tuple(sorted(shares)), checkpoint.bytes, sum(file.bytes for file in beside.values()))


def _strengths(adapters: Adapters) -> list[tuple[Path, float]]:
    """Each adapter's folder, with its strength."""
    if isinstance(adapters, Mapping):
        pairs = [(Path(path), float(strength)) for path, strength in adapters.items()]
    elif isinstance(adapters, str | os.PathLike):
        pairs = [(Path(adapters), 1.0)]
    else:
        pairs = [(Path(path), 1.0) for path in adapters]
    if not pairs:
        refuse("adapters", "there is none", "pass the folder or the file of an adapter")
    for path, strength in pairs:
        if not abs(strength) < float("inf"):
            refuse(str(path), f"its strength is {strength}", "give it a finite number")
    return pairs


def _said(given: Given, shares: Sequence[Share]) -> dict[str, Any]:
    """For the manifest."""
    folder = read_folder(given.path)
    digests = {name: digest(folder.home / name) for name in folder.files}
    resized = {share.tensor: list(share.adapter.rows or ()) for share in shares if share.adapter.role == RESIZED}
    of_file = {"part": given.part, "config": dict(given.config), "resized": resized}
    besides = {key: value for key, value in of_file.items() if value}
    return {"name": given.path.resolve().name, "strength": given.strength, "sha256": digests, **besides}


def _folded(
    work: Work, checkpoint: Checkpoint, shares: Mapping[str, Sequence[Share]], keep: bool, tell: Callable[[int], None]
) -> tuple[dict[str, File], dict[str, File]]:
    """Every file, as it is now; and the ways back."""
    arithmetic, files, beside = Arithmetic(), {}, {}
    for name in checkpoint.files:
        own = _own(checkpoint, name, shares)
        way = f"{REMAINDER}/{name}.remainder" if keep and own else None
        target = work.file(way) if way else None
        segments = _segments(checkpoint, name, own, lambda piece: partial(arithmetic.fold, piece, keep=keep))
        rewriting = Rewriting(checkpoint.place / name, work.file(name), target, copied=not own)
        end = rewriting.run(segments, work.done.get(name, Prefix()), work.noting(name, tell))
        files[name] = File(end.bytes, end.target, end.source)
        if way is not None:
            beside[way] = File(end.beside, end.beside_digest)
    return files, beside


def _own(checkpoint: Checkpoint, file: str, shares: Mapping[str, Sequence[Share]]) -> dict[str, Sequence[Share]]:
    """What is added to the tensors of one file."""
    return {name: own for name, own in shares.items() if checkpoint.tensors[name].file == file}


def _counter(total: int, progress: Progress | None) -> Callable[[int], None]:
    """What is told of bytes that have come, and tells how many there are."""
    done = 0

    def tell(more: int) -> None:
        nonlocal done
        done += more
        if progress is not None:
            progress(done, total)

    return tell


def _segments(
    checkpoint: Checkpoint, file: str, shares: Mapping[str, Sequence[Share]], change: Callable[[Piece], Any]
) -> Iterator[Segment]:
    """A file from its first byte to its last."""
    at, size = 0, (checkpoint.place / file).stat().st_size
    for stored in sorted((checkpoint.tensors[name] for name in shares), key=lambda t: t.start):
        if not stored.elements:
            continue
        for piece in pieces(stored, shares[stored.name]):
            yield from copies(at, piece.start)
            yield Segment(piece.start, piece.stop, change(piece))
            at = piece.stop
    yield from copies(at, size)


def unfold_checkpoint(
    folded: str | os.PathLike[str], out: str | os.PathLike[str], *, progress: Progress | None = None
) -> Folded:
    """Write the base of a folded checkpoint, to the bit: its hashes are those that the fold has read.

    Args:
        folded: a folder that `fold_checkpoint(…, keep=True)` has written, as it was.
        out: the folder to write; not there, or empty. As in `fold_checkpoint`, it appears when it is whole.
        progress: as there.

    Raises:
        FileError: a file is not what the fold has written, or its way back was not kept; or `out` cannot be written.
        FoldError: the base did not come out.
    """
    place = Path(folded)
    manifest = read_manifest(place)
    if not manifest.kept:
        refuse(str(place), "it was folded without its way back", "fold with keep=True (--keep), or keep the base")
    checkpoint = read_checkpoint(place)
    if {*checkpoint.files} != {*manifest.files}:
        odd = sorted({*checkpoint.files} ^ {*manifest.files})
        refuse(str(place), f"its files are others than the fold has written: {few(odd, 5)}", "restore the folder")
    shares: dict[str, list[Share]] = {}
    for k, said in enumerate(manifest.adapters):
        path = place / REMAINDER / f"adapter_{k}"
        _check(path, said["sha256"])
        name = f"adapter {k + 1}" if len(manifest.adapters) > 1 else "default"
        for share in read_shares(Given.kept(path, said), checkpoint, name):
            shares.setdefault(share.tensor, []).append(share)
    for name, file in manifest.beside.items():
        if digest(place / name) != file.sha256:
            refuse(str(place / name), "it is not what the fold has written", "restore the file")
    task = {
        "verb": "unfold", "version": 1, "block": BLOCK,
        "folded": {name: file.sha256 for name, file in manifest.files.items()},
    }  # fmt: skip
    with Work(Path(out), task, checkpoint.bytes).begun() as work:
        _given_back(work, checkpoint, shares, manifest, _counter(checkpoint.bytes, progress))
        work.publish({})
    return Folded(Path(out), tuple(sorted(shares)), checkpoint.bytes, 0)


def _given_back(
    work: Work,
    checkpoint: Checkpoint,
    shares: Mapping[str, Sequence[Share]],
    manifest: Manifest,
    tell: Callable[[int], None],
) -> None:
    arithmetic = Arithmetic()
    for name in checkpoint.files:
        own, at = _own(checkpoint, name, shares), str(checkpoint.place / name)
        with ExitStack() as stack:
            records: Iterator[Callable[[], bytes]] = iter(())
            if own:
                file = stack.enter_context(open(checkpoint.place / REMAINDER / f"{name}.remainder", "rb"))
                records = _records(file.fileno())
            change = partial(_unfolding, arithmetic, records)
            rewriting = Rewriting(checkpoint.place / name, work.file(name), copied=not own)
            segments = _segments(checkpoint, name, own, change)
            end = rewriting.run(segments, work.done.get(name, Prefix()), work.noting(name, tell))
        if end.source != manifest.files[name].sha256:
            refuse(at, "it is not what the fold has written", "restore the file")
        if end.target != manifest.files[name].base:
            remedy = "unfold it with the lora_fx and the torch that folded it"
            raise FoldError(f"what came out is not the base of {name}", place=at, remedy=remedy)


def _records(handle: int) -> Iterator[Callable[[], bytes]]:
    """What reads each record of a file of ways back."""
    at, size = 0, os.fstat(handle).st_size
    while at < size:
        length = int.from_bytes(os.pread(handle, 8, at), "little")
        yield partial(os.pread, handle, length, at + 8)
        at += 8 + length


def _unfolding(
    arithmetic: Arithmetic, records: Iterator[Callable[[], bytes]], piece: Piece
) -> Callable[[torch.Tensor], None]:
    record = next(records)
    return lambda data: arithmetic.unfold(piece, data, record())


def _check(folder: Path, digests: Mapping[str, str]) -> None:
    for name, wanted in digests.items():
        if not (folder / name).is_file() or digest(folder / name) != wanted:
            refuse(str(folder / name), "it is not what the fold has written", "restore the file")
