"""What a command leaves: its table on the screen, as text and as JSON, and its figures beside them."""

from __future__ import annotations

import importlib
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lora_fx.errors import FileError, LoraFxError
from lora_fx.reading import boundary, to_json


def needs_figures() -> None:
    """Raise before anything is computed where no figure can be drawn."""
    try:
        importlib.import_module("matplotlib.figure")
    except ImportError as error:
        reason = f"matplotlib cannot be imported: {error}"
        raise LoraFxError(reason, place="lora-fx paper", remedy="pip install 'lora-fx[paper]'") from error


def prepared(out: Path) -> None:
    """Make the folder; known before an hour of work, not after it, whether it can be written.

    Raises:
        FileError: it cannot.
    """
    with boundary("the folder cannot be written", str(out), "pass a folder of yours with -o", FileError):
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass


@contextmanager
def progress(title: str, steps: int) -> Iterator[Callable[[Any], None]]:
    """A bar with the time that is left, on standard error; call what comes back after each step."""
    from rich import progress as bars
    from rich.console import Console

    columns = bars.TextColumn("{task.description}"), bars.BarColumn(28), bars.MofNCompleteColumn()
    times = bars.TimeElapsedColumn(), bars.TextColumn("left:"), bars.TimeRemainingColumn()
    with bars.Progress(*columns, *times, console=Console(stderr=True)) as bar:
        task = bar.add_task(title, total=steps)
        yield lambda _: bar.advance(task)


@contextmanager
def written(out: Path, name: str, shown: str, said: dict[str, Any]) -> Iterator[Path]:
    """Write the table, and yield the folder for figures; print it when they are there.

    Raises:
        FileError: the folder cannot be written.
    """
    with boundary("the results cannot be written", str(out), "pass a folder of yours with -o", FileError):
        out.mkdir(parents=True, exist_ok=True)
        (out / f"{name}.txt").write_text(f"{shown}\n", encoding="utf-8")
        (out / f"{name}.json").write_bytes(to_json(said, indent=1) + b"\n")
        yield out
    print(shown)
