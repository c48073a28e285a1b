"""Law L15, histories: whatever happens to an adapted model, it is its dense twin, with all side effects.

Run it longer with ``LORA_FX_PROFILE=deep python -m pytest -n 0 -s tests/test_histories.py``; it prints how many steps
each module has lived through.
"""

from __future__ import annotations

import os
from collections import Counter

import pytest
from hypothesis import settings
from hypothesis.stateful import run_state_machine_as_test

from lora_fx.testing import STATEFUL, histories

DEEP = os.environ.get("LORA_FX_PROFILE") == "deep"
TABLE = {row.name: row for row in STATEFUL}

pytestmark = pytest.mark.laws


@pytest.fixture(scope="module")
def lived():
    """Steps and histories by module, printed at the end."""
    found: dict[str, Counter] = {}
    yield found
    print(f"\n{'module':24}{'steps':>8}{'histories':>11}")
    for name, counts in found.items():
        print(f"{name:24}{counts['steps']:8}{counts['histories']:11}")
        for what in sorted(set(counts) - {"steps", "histories"}):
            print(f"    {counts[what]} × {what}")
    total = sum(found.values(), Counter())
    print(f"{len(found):3} modules{'':14}{total['steps']:8}{total['histories']:11}")


@pytest.mark.parametrize("row", [row for row in STATEFUL if not row.refused], ids=lambda row: row.name)
def test_l15_an_adapted_model_is_its_dense_twin_after_any_history(row, lived):
    machine = histories(row.make, row.inputs(), row.changes, shared=row.shared)
    lived[row.name] = machine.counts
    run_state_machine_as_test(
        machine, settings=settings(max_examples=12 if DEEP else 2, stateful_step_count=30 if DEEP else 12)
    )
