"""Deliberate defects of the library, a row each: the tests must turn red on every one of them.

A row names a defect, the file, a text that occurs in it exactly once, what stands there instead, and the defect in a
sentence. Nothing on disk is ever changed: `tests.mutants.hook` replaces the text while the module is imported.

    python -m tests.mutants                      all of them, and which law or test caught which
    python -m tests.mutants unfold_off_by_one    one
    LORA_FX_MUTANT=unfold_off_by_one python -m pytest -p tests.mutants.plugin -n 0 tests/test_fold.py
"""

from __future__ import annotations

from tests.mutants.rows import MUTANTS
from tests.mutants.table import AREAS, ROOT, Area, Mutant

__all__ = ["AREAS", "MUTANTS", "ROOT", "Area", "Mutant", "mutant"]


def mutant(name: str) -> Mutant:
    """The row of that name."""
    for row in MUTANTS:
        if row.name == name:
            return row
    raise KeyError(f"no mutant {name!r}; there are {', '.join(row.name for row in MUTANTS)}")
