"""Each model in a process of its own, with a limit of time and of memory; what comes of it as a row.

The processes are forked off this one, which has imported the packages: that saves the imports. A model that ends its
process ends nothing else.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import resource
import signal
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import IO

import torch
from torch import nn

import lora_fx
from tests.compatibility import Model
from tests.compatibility.checking import Row, check
from tests.processes import exit_status, forked

_PAGE = os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True)
class Limits:
    """What one model may take."""

    seconds: float = 150.0
    """Of a processor; five times that on the clock."""
    bytes: int = 6 * 2**30
    """Resident."""


@dataclass
class _Running:
    model: Model
    result: IO[str]
    output: IO[str]
    start: float


def warm_up() -> None:
    """Import what the first capture imports, once for all processes."""
    lora_fx.capture(nn.Linear(2, 2), torch.ones(1, 2))


@dataclass(frozen=True)
class Mode:
    """What is done with each model."""

    row: type[Row] = Row
    check: Callable[[Model], Row] = check


def run(models: Sequence[Model], at_once: int, limits: Limits, mode: Mode = Mode()) -> Iterator[Row]:
    """A row for each model, as they end."""
    waiting = list(models)
    running: dict[int, _Running] = {}
    try:
        while waiting or running:
            while waiting and len(running) < at_once:
                own = _Running(waiting.pop(0), _file(), _file(), time.monotonic())
                running[_start(own, limits, mode)] = own
            time.sleep(0.05)
            for pid, own in list(running.items()):
                over = _over(pid, own, limits)
                status = exit_status(pid, kill=bool(over))
                if status is not None:
                    del running[pid]
                    yield _row(own, status, over, mode)
    finally:
        for pid in running:
            exit_status(pid, kill=True)


def _file() -> IO[str]:
    return tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")


def _over(pid: int, own: _Running, limits: Limits) -> str:
    """Which limit it is over; empty for none."""
    if time.monotonic() - own.start > 5 * limits.seconds:
        return f"the time limit of {5 * limits.seconds:.0f} s"
    with contextlib.suppress(OSError), open(f"/proc/{pid}/statm", encoding="ascii") as file:
        if int(file.read().split()[1]) * _PAGE > limits.bytes:
            return f"the memory limit of {limits.bytes / 2**30:.0f} GiB"
    return ""


def _row(own: _Running, status: int, over: str, mode: Mode) -> Row:
    own.result.seek(0)
    own.output.seek(0)
    text, printed = own.result.read(), own.output.read()
    own.result.close()
    own.output.close()
    if status == 0:
        row = mode.row(**json.loads(text))
    else:
        last = printed.strip().splitlines()[-1:] or [""]
        ended = "the time limit" if status == -signal.SIGXCPU else f"the process ended with {status}"
        row = mode.row(own.model.package, own.model.name, raw=[over or f"{ended}: {last[0][:200]}"])
    row.seconds = time.monotonic() - own.start
    return row


def _start(own: _Running, limits: Limits, mode: Mode) -> int:
    """Fork a process that checks the model."""

    def call() -> int:
        resource.setrlimit(resource.RLIMIT_CPU, (math.ceil(limits.seconds), math.ceil(limits.seconds) + 5))
        json.dump(asdict(mode.check(own.model)), own.result)
        own.result.flush()
        return 0

    return forked(call, own.output)
