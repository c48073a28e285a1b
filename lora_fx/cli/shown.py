"""What a command shows: progress on a terminal, and its outcome as text or as JSON."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import click

from lora_fx.errors import LoraFxError

as_json = click.option("--json", "as_json", is_flag=True, help="Print one JSON object in the place of the text.")


def show(outcome: Any, said: dict[str, Any], json_wanted: bool) -> None:
    """On stdout: the outcome as it prints, or what is said of it as JSON, which has no NaN: null."""
    say(json.dumps(_finite(said), indent=1, allow_nan=False) if json_wanted else str(outcome))


def say(text: str) -> None:
    """On stdout.

    Raises:
        LoraFxError: it cannot be written there.
    """
    try:
        click.echo(text)
    except OSError as error:
        # What Python flushes once more at its end would make another exit code of ours.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not isinstance(error, BrokenPipeError):  # whoever read it has enough: `| head`
            reason = f"what was done cannot be shown: {error.strerror}"
            raise LoraFxError(reason, place="stdout", remedy="make room where it goes") from error


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@contextmanager
def progress(what: str) -> Iterator[Callable[[int, int], None] | None]:
    """On stderr, where that is a terminal: a bar, the rate and the time left."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich import progress as bars
    from rich.console import Console

    columns = (
        bars.TextColumn("{task.description}"), bars.BarColumn(), bars.DownloadColumn(binary_units=True),
        bars.TransferSpeedColumn(), bars.TimeRemainingColumn(),
    )  # fmt: skip
    with bars.Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
