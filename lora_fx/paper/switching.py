"""Task switching (4.2 of the LoRA paper): a task's adapter in the place of another's, against reloading the model.

    switch              W + δ₁ becomes W + δ₂ in the weights, by way of W's own bits
    activate            the branches act, and nothing is folded: the cheapest switch, and each call costs more
    reload              the other task's checkpoint, out of the page cache, copied into the model's parameters
    reload, from disk   the same, of a file that is not in the page cache

GPT-2 medium with random weights, r = 4 on query and value. Where tasks are switched, both adapters are on one model;
where it is reloaded, every task has a checkpoint of its own, which was folded by itself.
"""

from __future__ import annotations

import os
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

import lora_fx
from lora_fx import Rule
from lora_fx.errors import LoraFxError
from lora_fx.paper.latency import Shape
from lora_fx.paper.outcome import prepared
from lora_fx.paper.timing import Interval, Verdict, ending, interleaved, machine, ratios
from lora_fx.tables import table

SWITCH, ACTIVATE, RELOAD, DISK = WAYS = "switch", "activate", "reload", "reload, from disk"
TASKS = "first", "second"
RULE = Rule(role="attention.query | attention.value", rank=4)


@dataclass(frozen=True)
class Way:
    """One way to another task."""

    name: str
    bytes: int
    """Of what a task has of its own."""
    seconds: float
    reload: Interval
    """The time of a reload over its own, within the rounds."""
    disk: Interval
    """The same of a reload from disk."""


@dataclass(frozen=True)
class Outcome:
    """What switching and reloading took."""

    shape: Shape
    threads: int
    rounds: int
    load: float
    ways: tuple[Way, ...]

    def way(self, name: str) -> Way:
        return next(way for way in self.ways if way.name == name)

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "verdicts": [asdict(verdict) for verdict in verdicts(self)]}


def measure(shape: Shape, rounds: int, folder: Path, step: Callable[[Any], None] = lambda _: None) -> Outcome:
    """Go to the other task and back in every way, `rounds` times in turns, and see that the weights are the task's.

    Args:
        folder: for the checkpoints while it runs, two times the model's bytes.
        step: called after each round.

    Raises:
        FileError: the folder cannot be written.
        LoraFxError: transformers, which has the model, is not there; or the weights after a switch are not the task's.
    """
    prepared(folder)
    load = machine()["load"]
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        files = {task: _checkpoint(shape, task, Path(scratch)) for task in TASKS}
        ways = _Ways(shape, files)
        before = {DISK: ways.forget}
        times = interleaved(ways.calls, 0, rounds, before=before, step=step)
        ways.check()
    bytes_ = {**dict.fromkeys(WAYS, ways.task_bytes), RELOAD: ways.file_bytes, DISK: ways.file_bytes}
    found = []
    for name in WAYS:
        reload, disk = (Interval.of(ratios(times, other, name)) for other in (RELOAD, DISK))
        found.append(Way(name, bytes_[name], statistics.median(times[name]), reload, disk))
    return Outcome(shape, torch.get_num_threads(), rounds, load, tuple(found))


def _adapted(shape: Shape) -> nn.Module:
    """A model with an adapter for each task, none of them folded, the first one active."""
    model = shape.build()
    generator = torch.Generator().manual_seed(1)
    for task in TASKS:
        lora_fx.apply(model, RULE, torch.arange(8)[None], name=task, check=False)
    for adapter in _adapters(model):
        for parameter in adapter.parameters():
            parameter.data.copy_(0.02 * torch.randn(parameter.shape, generator=generator))
    return lora_fx.activate(model, TASKS[0])


def _adapters(model: nn.Module) -> list[lora_fx.Adapter]:
    return [module for module in model.modules() if isinstance(module, lora_fx.Adapter)]


def _checkpoint(shape: Shape, task: str, folder: Path) -> Path:
    from safetensors.torch import save_model

    model = lora_fx.fold(lora_fx.activate(_adapted(shape), task), final=True)
    path = folder / f"{task}.safetensors"
    save_model(model, str(path))
    with path.open("rb") as file:
        os.fsync(file.fileno())  # pages that wait to be written stay in the cache
    return path


class _Ways:
    """A model for each way; every call takes it to the task that it has not."""

    def __init__(self, shape: Shape, files: dict[str, Path]) -> None:
        self.files, self.file_bytes = files, files[TASKS[0]].stat().st_size
        self.folded, self.branched, self.plain = _adapted(shape), _adapted(shape), shape.build()
        own = [a for a in _adapters(self.branched) if a.name == TASKS[0]]
        self.task_bytes = sum(p.nbytes for adapter in own for p in adapter.parameters())
        lora_fx.fold(self.folded)
        self._load(TASKS[0])
        self.at = dict.fromkeys(WAYS, 0)
        self.calls: dict[str, Callable[[], Any]] = {
            SWITCH: lambda: lora_fx.switch(self.folded, self._next(SWITCH)),
            ACTIVATE: lambda: lora_fx.activate(self.branched, self._next(ACTIVATE)),
            RELOAD: lambda: self._load(self._next(RELOAD)),
            DISK: lambda: self._load(self._next(DISK)),
        }

    def _next(self, way: str) -> str:
        self.at[way] = 1 - self.at[way]
        return TASKS[self.at[way]]

    def _load(self, task: str) -> None:
        from safetensors.torch import load_model

        load_model(self.plain, str(self.files[task]))

    def forget(self) -> None:
        """Take the next file out of the page cache; both are in it again after the call."""
        with self.files[TASKS[1 - self.at[DISK]]].open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

    def check(self) -> None:
        """After all these switches the weights are those that a task's own fold has given, to the bit."""
        for task in TASKS:
            lora_fx.switch(self.folded, task)
            self._load(task)
            own = self.folded.state_dict()
            for name, tensor in self.plain.state_dict().items():
                if not torch.equal(tensor, own[name]):
                    remedy = "this is a defect of lora_fx: please report it"
                    raise LoraFxError(f"{name} is not the weight of {task!r}", place="switch", remedy=remedy)


_ONE = Interval(1, 1, 1, 1)


def verdicts(found: Outcome) -> list[Verdict]:
    """The paper's claims: less to store and to move, and less time."""
    task, model = found.way(SWITCH), found.way(RELOAD)
    times = model.bytes / task.bytes
    made = [Verdict("a task has fewer bytes of its own than the model", times > 1, f"{times:,.0f} times fewer")]
    for name in (SWITCH, ACTIVATE):
        own = found.way(name)
        for what, ratio in (("out of the page cache", own.reload), ("from disk", own.disk)):
            seen = f"that takes {ratio.median:.3g} times as long ({ratio.low:.3g}–{ratio.high:.3g})"
            made.append(Verdict(f"{name} takes less time than a reload {what}", ratio.above(_ONE), seen))
    return made


def shown(found: Outcome) -> str:
    """How it was measured, the table, and the claims with what they came to."""
    here, threads = machine(), "one thread" if found.threads == 1 else f"{found.threads} threads"
    lines = [
        f"{found.shape}, float32, two tasks of r = 4 on q and v.",
        f"{here['processor']}, {here['cores']} cores, {threads}, load {found.load:.1f}.",
        f"Medians of {found.rounds} paired rounds; interval: where the true median of the ratio lies with "
        f"{100 * found.ways[0].reload.confidence:.1f} %.",
    ]
    header = "way to another task", "bytes of a task", "ms", "reload / it", "interval", "from disk / it", "interval"
    cells = []
    for way in found.ways:
        times = [(f"{r.median:.3g}", f"{r.low:.3g}–{r.high:.3g}") for r in (way.reload, way.disk)]
        cells.append((way.name, f"{way.bytes:,}", f"{1e3 * way.seconds:,.2f}", *times[0], *times[1]))
    weights = "After all of it the weights were each task's own, to the bit."
    return "\n".join([*lines, "", table(header, cells, right=range(1, 7)), weights, "", *ending(verdicts(found))])
