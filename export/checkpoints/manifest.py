"""What a fold says of itself, in ``lora_fx_fold.json``: sha256 of every file that it read and wrote.

They are those of whole files, as `sha256sum` computes them and hubs show them. Nothing in it depends on when or where
the fold ran, so that a fold that is done again gives the same bytes, manifest and all.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_fx.errors import FileError, few
from lora_fx.export.adapters.folder import read_folder
from lora_fx.export.checkpoints.checkpoint import MANIFEST, REMAINDER
from lora_fx.export.checkpoints.streams import digest
from lora_fx.reading import TABLE, boundary, contents, to_json

_VERSION = 1
_FOLD = "pass a folder that fold_checkpoint has written"


@dataclass(frozen=True)
class File:
    """A file that was written."""

    bytes: int
    sha256: str
    base: str = ""
    """sha256 of the file of the base that it was made of."""


@dataclass(frozen=True)
class Manifest:
    """Of one fold."""

    base: str
    """The name of the base's folder."""
    adapters: Sequence[Mapping[str, Any]]
    """name, strength and sha256 of each file of each; part and config, where they were said, and the rows
    that a resized vocabulary has more."""
    files: Mapping[str, File]
    beside: Mapping[str, File]
    """The ways back."""
    tensors: Sequence[str]
    """Those that are other numbers now."""
    kept: bool

    def to_json(self) -> bytes:
        said = {
            "lora_fx_fold": _VERSION,
            "base": self.base,
            "adapters": list(self.adapters),
            "files": {n: {"bytes": f.bytes, "sha256": f.sha256, "base_sha256": f.base} for n, f in self.files.items()},
            "remainders": {name: {"bytes": f.bytes, "sha256": f.sha256} for name, f in self.beside.items()},
            "tensors": list(self.tensors),
            "kept": self.kept,
        }
        return to_json(said, indent=1) + b"\n"


def read_manifest(folder: Path) -> Manifest:
    """That of a folded checkpoint.

    Raises:
        FileError: there is none, or it is damaged.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise FileError(f"it has no {MANIFEST}", place=str(folder), remedy=_FOLD)
    with boundary("it is no manifest of a fold", str(path), "restore the file"):
        said = json.loads(contents(path, most=TABLE))
        assert said["lora_fx_fold"] == _VERSION, f"it is of version {said['lora_fx_fold']!r}"
        files = {n: File(int(f["bytes"]), str(f["sha256"]), str(f["base_sha256"])) for n, f in said["files"].items()}
        beside = {n: File(int(f["bytes"]), str(f["sha256"])) for n, f in said["remainders"].items()}
        for name in (*files, *beside):
            assert not Path(name).is_absolute() and ".." not in Path(name).parts, f"{name!r} leaves the folder"
        adapters: list[dict[str, Any]] = [
            {**_besides(a), "name": str(a["name"]), "strength": float(a["strength"]), "sha256": dict(a["sha256"])}
            for a in said["adapters"]
        ]
        assert all(Path(n).name == n for a in adapters for n in a["sha256"]), "an adapter's file leaves its folder"
        assert all(a["sha256"] for a in adapters), "an adapter has no file"
        return Manifest(str(said["base"]), adapters, files, beside, [*map(str, said["tensors"])], bool(said["kept"]))


def _besides(adapter: Mapping[str, Any]) -> dict[str, Any]:
    """What was said of an adapter that its files do not say."""
    kinds = {"part": str, "config": dict, "resized": dict}
    found = {key: adapter[key] for key in kinds if key in adapter}
    assert all(isinstance(value, kinds[key]) for key, value in found.items()), f"{found} is not of an adapter"
    return found


@dataclass(frozen=True)
class Verified:
    """What was found to be as the manifest says."""

    folder: Path
    manifest: Manifest
    files: int
    """How many were read."""
    bytes: int

    def __str__(self) -> str:
        folded = f"{len(self.manifest.tensors)} tensors folded into {self.manifest.base}"
        return f"{self.folder}: {folded}; {self.files} files, {self.bytes:,} bytes, are as they were written"


def verify_checkpoint(
    folder: str | os.PathLike[str],
    *,
    base: str | os.PathLike[str] | None = None,
    adapters: Sequence[str | os.PathLike[str]] = (),
    progress: Callable[[int, int], None] | None = None,
) -> Verified:
    """Hold a folded checkpoint against its manifest: every file of it is what `fold_checkpoint` has written.

    Args:
        base: also hold this checkpoint against what was folded into.
        adapters: also hold these folders against the adapters that were folded, in their order.
        progress: is called with the bytes that are done, and those that there are.

    Raises:
        FileError: a file is missing, changed or new; all of them are named.
    """
    place = Path(folder)
    manifest = read_manifest(place)
    wanted: dict[Path, str] = {place / n: f.sha256 for n, f in (*manifest.files.items(), *manifest.beside.items())}
    if base is not None:
        at = Path(base)
        at = at.parent if at.is_file() else at
        wanted |= {at / name: file.base for name, file in manifest.files.items()}
    folders = [read_folder(Path(path)).home for path in adapters]
    if folders and len(folders) != len(manifest.adapters):
        reason = f"{len(manifest.adapters)} adapters were folded, and {len(folders)} are given"
        raise FileError(reason, place=str(place), remedy="give each of them, in their order")
    if manifest.kept:
        folders = [place / REMAINDER / f"adapter_{k}" for k in range(len(manifest.adapters))] + folders
    for k, at in enumerate(folders):
        digests = manifest.adapters[k % len(manifest.adapters)]["sha256"]
        wanted |= {at / name: sha256 for name, sha256 in digests.items()}
    known = {path.resolve() for path in wanted} | {(place / MANIFEST).resolve()}
    new = [
        p.relative_to(place).as_posix() for p in sorted(place.rglob("*")) if p.is_file() and p.resolve() not in known
    ]
    gone = [str(path) for path in wanted if not path.is_file()]
    sizes = {path: path.stat().st_size for path in wanted if path.is_file()}
    done, changed = 0, []

    def tell(more: int) -> None:
        nonlocal done
        done += more
        if progress is not None:
            progress(done, sum(sizes.values()))

    for path in sizes:
        with boundary("it cannot be read", str(path), "restore the file"):
            if digest(path, tell) != wanted[path]:
                changed.append(str(path))
    found = {"is missing": gone, "is not what it was": changed, "is new": new}
    if any(found.values()):
        reason = "; ".join(f"{few(names, 5)} {what}" for what, names in found.items() if names)
        raise FileError(reason, place=str(place), remedy="restore what has changed, or fold again")
    return Verified(place, manifest, len(sizes), sum(sizes.values()))
