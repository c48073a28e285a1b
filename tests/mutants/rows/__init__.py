"""The rows of the table, a file for each room of the library, or for a part of a large one; all files here are read."""

from __future__ import annotations

from importlib import import_module
from pkgutil import iter_modules

MUTANTS = tuple(row for room in iter_modules(__path__) for row in import_module(f"{__name__}.{room.name}").ROWS)
