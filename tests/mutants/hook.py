"""The mutated library in the place of the real one, for a process that has LORA_FX_MUTANT=<name> in its environment.

    source on disk  →  source with one row of the table replaced  →  what `import lora_fx` runs

The file on disk is only read. `startup/sitecustomize.py` installs this in every Python that starts with that folder on
PYTHONPATH: in pytest, in its xdist workers, and in processes that a test starts.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import linecache
import os
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec, SourceFileLoader
from types import CodeType, ModuleType

from tests.mutants import Mutant, mutant

VARIABLE = "LORA_FX_MUTANT"


class _MutatedLoader(SourceFileLoader):
    """Runs the mutated source under the real file's name; reads and writes no bytecode."""

    def __init__(self, fullname: str, path: str, source: str) -> None:
        super().__init__(fullname, path)
        self.source = source

    def get_source(self, fullname: str) -> str:
        return self.source

    def get_code(self, fullname: str) -> CodeType:
        lines = self.source.splitlines(keepends=True)
        linecache.cache[self.path] = (len(self.source), None, lines, self.path)  # no time: tracebacks show the mutant
        return compile(self.source, self.path, "exec", dont_inherit=True)


class _Finder(importlib.abc.MetaPathFinder):
    """Finds the one mutated module, by way of the finders behind it."""

    def __init__(self, row: Mutant) -> None:
        self.row = row

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self.row.module:
            return None
        others = (f for f in sys.meta_path if f is not self and hasattr(f, "find_spec"))
        spec = next(filter(None, (f.find_spec(fullname, path, target) for f in others)), None)
        if spec is None or spec.origin is None:
            return None
        with open(spec.origin, encoding="utf-8") as file:
            source = self.row.applied(file.read())
        spec.loader = _MutatedLoader(fullname, spec.origin, source)
        return spec


def install() -> None:
    """Once in a process, and before anyone has imported the module."""
    name = os.environ.get(VARIABLE)
    if not name or any(isinstance(finder, _Finder) for finder in sys.meta_path):
        return
    row = mutant(name)
    if row.module in sys.modules:
        raise RuntimeError(f"{row.module} is imported already: {VARIABLE}={name} came too late")
    sys.meta_path.insert(0, _Finder(row))
