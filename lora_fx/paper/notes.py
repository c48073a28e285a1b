"""Notes in a folder of what is over, a line of JSON each: a command that was interrupted goes on where it was."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, Generic, TypeVar

from lora_fx.errors import FileError

T = TypeVar("T")
"""A dataclass whose ``key`` says what it is of."""


class Notes(Generic[T]):
    """What is noted in a file, by key; what an interrupted write has left of a line is not there.

    Args:
        read: what a line says → the outcome; raises ValueError, TypeError or KeyError where it says none.

    Raises:
        FileError: a line is no note.
    """

    def __init__(self, path: Path, read: Callable[[Any], T]) -> None:
        self.path, self.found = path, dict[str, T]()
        text = self.path.read_text(encoding="utf-8") if self.path.exists() else ""
        whole = text.rpartition("\n")[0]
        for number, line in enumerate(whole.splitlines(), 1):
            try:
                self._keep(read(json.loads(line)))
            except (ValueError, TypeError, KeyError) as error:
                place, remedy = f"{self.path}, line {number}", "delete that line: what it was of is done again"
                raise FileError(f"it is no note of a run: {error}", place=place, remedy=remedy) from error
        if whole and not text.endswith("\n"):
            self.path.write_text(f"{whole}\n", encoding="utf-8")

    def add(self, outcome: T) -> None:
        """On disk when it returns."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(outcome)) + "\n")  # type: ignore[call-overload]
            file.flush()
            os.fsync(file.fileno())
        self._keep(outcome)

    def _keep(self, outcome: Any) -> None:
        self.found[outcome.key] = outcome
