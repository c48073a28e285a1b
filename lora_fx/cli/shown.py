"""What a command shows: progress on a terminal, and its outcome as text or as JSON."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import click

as_json = click.option("--json", "as_json", is_flag=True, help="Print one JSON object in the place of the text.")


def show(outcome: Any, said: dict[str, Any], json_wanted: bool) -> None:
    """On stdout: the outcome as it prints, or what is said of it as JSON."""
    click.echo(json.dumps(said, indent=1) if json_wanted else str(outcome))


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
