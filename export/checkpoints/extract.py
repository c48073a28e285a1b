"""An adapter out of two checkpoints:   TUNED − BASE = D   →   B·A, the nearest of its rank

How the nearest is found says `lora_fx.deltas.nearest`; the two files are read a few times, and D is never in memory.
What is said of each weight, the share of ‖D‖² that its adapter keeps, is measured on the factors that are written.
"""

from __future__ import annotations

import fnmatch
import os
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lora_fx.deltas.nearest import Factors, Kept, Rows, energy, nearest, summarised
from lora_fx.errors import few
from lora_fx.export.adapters.folder import CONFIG, TENSORS
from lora_fx.export.checkpoints.arithmetic import BLOCK
from lora_fx.export.checkpoints.checkpoint import FLOATS, Checkpoint, Stored, read_checkpoint
from lora_fx.export.checkpoints.entries import fitted
from lora_fx.export.checkpoints.orientation import Orientation
from lora_fx.export.checkpoints.work import refuse_taken
from lora_fx.reading import boundary, refuse, to_json

_TABLES = re.compile(r"(^|\.)(\w*emb\w*|wte|wpe)\.")
_TASKS = (
    ("ForCausalLM", "CAUSAL_LM"), ("LMHeadModel", "CAUSAL_LM"), ("ForSequenceClassification", "SEQ_CLS"),
    ("ForConditionalGeneration", "SEQ_2_SEQ_LM"), ("ForTokenClassification", "TOKEN_CLS"),
)  # fmt: skip


@dataclass(frozen=True)
class Extracted:
    """What was written, and what was left out."""

    folder: Path
    rows: tuple[Kept, ...]
    ignored: tuple[str, ...]
    """Tensors that differ, and that the adapter does not hold."""

    @property
    def energy(self) -> float:
        """Of all weights together."""
        return energy(self.rows)

    def __str__(self) -> str:
        return summarised(self.rows, self.ignored, self.folder)


def extract_adapter(
    base: str | os.PathLike[str],
    tuned: str | os.PathLike[str],
    out: str | os.PathLike[str],
    rank: int,
    *,
    ignore: Sequence[str] = (),
    leave_out: Sequence[str] = (),
    progress: Callable[[int, int], None] | None = None,
) -> Extracted:
    """Write the low-rank adapter that is nearest to what changed from one checkpoint to another, in PEFT's format.

    Args:
        base, tuned: two checkpoints of one model, as in `fold_checkpoint`.
        out: the folder to write; not there, or empty.
        rank: of every weight; of one with fewer rows or columns as many as it has.
        ignore: patterns of tensors that may differ and are left out: what is no matrix of a Linear (or Conv1D) has no
            place in such an adapter.
        leave_out: patterns of files that are no part of the checkpoints.
        progress: is called with the bytes that are done, and those that there are.

    Returns:
        For each weight the share of its change's energy that the adapter holds.

    Raises:
        FileError: the checkpoints are damaged or of different models, nothing differs, something differs that the
            adapter cannot hold, or `out` cannot be written.
    """
    target = Path(out).absolute()
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        refuse("rank", f"{rank!r} is no positive integer", "give it a rank, such as 16")
    refuse_taken(target)
    old, new = (read_checkpoint(path, leave_out) for path in (base, tuned))
    names = fitted([*new.tensors], old, str(tuned), remedy="pass the base that it was tuned from")
    changed, done = [], 0
    for name, stored in new.tensors.items():
        pair = _Pair(old, new, names[name], name)
        if pair.differs():
            changed.append(pair)
        done += stored.stop - stored.start
        if progress is not None:
            progress(done, 2 * new.bytes)
    ignored = [pair.new for pair in changed if any(fnmatch.fnmatch(pair.new, pattern) for pattern in ignore)]
    changed = [pair for pair in changed if pair.new not in ignored]
    if not changed:
        refuse(str(tuned), "no weight differs from the base's", "pass the base and what was trained from it")
    orientation = Orientation.of(new)
    if odd := [pair.new for pair in changed if not pair.is_matrix or orientation.transposed(pair.new) is None]:
        reason = f"{few(odd, 5)} differ, and a LoRA adapter holds matrices of Linear modules"
        refuse(str(tuned), reason, "leave them as they are in the base: --ignore PATTERN, or ignore=[…]")
    rows: list[Kept] = []
    tensors: dict[str, torch.Tensor] = {}
    size = sum(pair.bytes for pair in changed)
    flags = {pair.new: bool(orientation.transposed(pair.new)) for pair in changed}
    for pair in changed:
        A, B = pair.nearest(rank)
        rows.append(pair.kept(A, B))
        key = f"base_model.model.{pair.new.removesuffix('.weight')}.lora_"
        tensors |= {f"{key}A.weight": B.T if flags[pair.new] else A, f"{key}B.weight": A.T if flags[pair.new] else B}
        done += pair.bytes * new.bytes // max(size, 1)
        if progress is not None:
            progress(min(done, 2 * new.bytes), 2 * new.bytes)
    _write(target, _config(old, Path(base), rows, rank, any(flags.values())), tensors)
    return Extracted(Path(out), tuple(rows), tuple(ignored))


@dataclass(frozen=True)
class _Pair:
    """A tensor before and after."""

    before: Checkpoint
    after: Checkpoint
    old: str
    new: str

    @property
    def stored(self) -> Stored:
        return self.after.tensors[self.new]

    @property
    def bytes(self) -> int:
        return self.stored.stop - self.stored.start

    @property
    def is_matrix(self) -> bool:
        dtypes = {self.stored.dtype, self.before.tensors[self.old].dtype}
        weight = self.new.endswith(".weight") and not _TABLES.search(self.new)
        return weight and len(self.stored.shape) == 2 and dtypes <= {*FLOATS}

    def differs(self) -> bool:
        """In a bit.

        Raises:
            FileError: it has another shape.
        """
        was = self.before.tensors[self.old]
        if was.shape != self.stored.shape:
            reason = f"its shape is {self.stored.shape}, and in the base {was.shape}"
            refuse(self.after.at(self.new), reason, "pass two checkpoints of one model")
        if was.dtype != self.stored.dtype:
            return True
        with ExitStack() as stack:
            stack.enter_context(boundary("it cannot be read", self.after.at(self.new), "restore the files"))
            one = stack.enter_context(open(self.before.place / was.file, "rb"))
            two = stack.enter_context(open(self.after.place / self.stored.file, "rb"))
            one.seek(was.start)
            two.seek(self.stored.start)
            for at in range(0, self.bytes, BLOCK):
                count = min(BLOCK, self.bytes - at)
                if one.read(count) != two.read(count):
                    return True
        return False

    def blocks(self) -> Iterator[tuple[int, int, torch.Tensor]]:
        """Rows of D, in float64."""
        rows, columns = self.stored.shape
        step = max(1, BLOCK // 8 // max(columns, 1))
        for start in range(0, rows, step):
            stop = min(start + step, rows)
            after = self.after.read_rows(self.new, start, stop).to(torch.float64)
            block = after.sub_(self.before.read_rows(self.old, start, stop).to(torch.float64))
            if not bool(block.isfinite().all()):
                refuse(self.after.at(self.new), "it holds NaN or Inf, or the base's does", "take another checkpoint")
            yield start, stop, block

    @property
    def change(self) -> Rows:
        """D."""
        rows, columns = self.stored.shape
        return Rows(rows, columns, self.blocks)

    def nearest(self, rank: int) -> Factors:
        """A (rank, columns) and B (rows, rank), float32: D ≈ B·A."""
        A, B = nearest(self.change, rank)
        return A.float(), B.float()

    def kept(self, A: torch.Tensor, B: torch.Tensor) -> Kept:
        return Kept.of(self.new, self.stored.shape, len(A), *self.change.measured(A, B))


def _config(base: Checkpoint, place: Path, rows: Sequence[Kept], rank: int, transposed: bool) -> dict[str, Any]:
    """PEFT's: alpha is the rank, so that δ = B·A."""
    paths = {row.weight.removesuffix(".weight"): row.rank for row in rows}
    kind = str(next(iter(base.config.get("architectures") or [""])))
    return {
        "peft_type": "LORA",
        "task_type": next((task for end, task in _TASKS if kind.endswith(end)), None),
        "base_model_name_or_path": base.config.get("_name_or_path") or str(place),
        "inference_mode": True,
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": transposed,
        "target_modules": [*paths],
        "rank_pattern": {f"^{re.escape(path)}": own for path, own in paths.items() if own != rank},
        "alpha_pattern": {f"^{re.escape(path)}": own for path, own in paths.items() if own != rank},
        "init_lora_weights": True,
    }


def _write(target: Path, config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    from safetensors.torch import save_file

    partial = target.with_name(f"{target.name}.partial")
    with boundary("it cannot be written", str(target), "choose a folder on a disk with space and permission"):
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        try:
            save_file({key: t.contiguous() for key, t in tensors.items()}, partial / TENSORS, {"format": "pt"})
            (partial / CONFIG).write_bytes(to_json(config, indent=2))
            os.replace(partial, target)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
