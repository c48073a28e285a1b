"""The table of mutants fits the library, and a mutant really is what a test imports. (`python -m tests.mutants`.)"""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from functools import cache
from importlib import import_module
from operator import attrgetter
from pathlib import Path
from types import CodeType

import pytest

from tests.mutants import AREAS, MUTANTS, ROOT, Area, Mutant, mutant
from tests.mutants.__main__ import Job, Outcome, failed, run, shown, summary


@cache
def compiled(file: str) -> CodeType:
    return compile((ROOT / file).read_text(encoding="utf-8"), file, "exec")


def same(a: CodeType, b: CodeType) -> bool:
    """Whether the two do the same, wherever their lines stand."""
    if len(a.co_consts) != len(b.co_consts):
        return False
    for one, other in zip(a.co_consts, b.co_consts, strict=True):
        code = isinstance(one, CodeType) and isinstance(other, CodeType)
        if not (same(one, other) if code else repr(one) == repr(other)):
            return False
    parts = "code names varnames cellvars freevars argcount kwonlyargcount flags exceptiontable"
    signature = attrgetter(*(f"co_{part}" for part in parts.split()))
    return signature(a) == signature(b)


@pytest.mark.parametrize("row", MUTANTS, ids=lambda row: row.name)
def test_a_row_fits_the_library_of_today(row):
    source = (ROOT / row.file).read_text(encoding="utf-8")
    mutated = compile(row.applied(source), row.file, "exec")
    assert not same(mutated, compiled(row.file)), "only its looks have changed"
    assert re.fullmatch(r"[a-z_0-9]+", row.name) and row.what.endswith(".")


def test_the_table_is_as_long_as_it_has_to_be():
    assert len(MUTANTS) == len({row.name for row in MUTANTS}) == len({(r.file, r.old, r.new) for r in MUTANTS}) >= 25
    assert {row.area for row in MUTANTS} == set(AREAS)


def test_a_row_stands_in_the_file_of_its_room_with_all_others_of_its_module():
    stands: dict[str, str] = {}
    for path in (ROOT / "tests/mutants/rows").glob("[!_]*.py"):
        rows = import_module(f"tests.mutants.rows.{path.stem}").ROWS
        where = (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").split("`")[1]
        assert {row.file.rpartition("/")[0].startswith(where) for row in rows} == {True}, path.name
        assert all(stands.setdefault(row.file, path.name) == path.name for row in rows), path.name


def test_every_suite_is_there():
    tests = {test for row in MUTANTS for test in row.suite.tests}
    for test in tests:
        path, _, name = test.partition("::")
        assert not name or f"def {name.partition('[')[0]}(" in (ROOT / path).read_text(encoding="utf-8"), test
        assert (ROOT / path).exists(), test


def test_a_row_that_no_longer_fits_says_which_one_it_is():
    row = Mutant("gone", "fold", "passes/fold.py", "no such text", "", "Nothing.")
    with pytest.raises(ValueError, match=r"gone: passes/fold\.py has 'no such text' 0 times"):
        row.applied("def fold(): ...")
    with pytest.raises(KeyError, match=r"no mutant 'nobody'; there are .*factors_swapped"):
        mutant("nobody")


def pytest_on(name: str, *arguments: str) -> subprocess.CompletedProcess:
    """pytest in a process of its own, on the mutant of that name."""
    environment = {**os.environ, "LORA_FX_MUTANT": name, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-p", "tests.mutants.plugin", "-p", "no:cacheprovider", "-n", "0", "-q"]
    return subprocess.run(
        [*command, *arguments], cwd=ROOT, env=environment, text=True, capture_output=True, timeout=240
    )  # fmt: skip


@pytest.mark.parametrize(
    ("name", "test"),
    [
        ("view_step_ignored", "tests/test_forms.py::test_the_branch_is_the_op_with_the_delta_as_its_weight"),
        ("round_once_is_plain_to", "tests/test_fold.py::test_torch_itself_rounds_twice"),
    ],
)
def test_a_mutant_turns_a_test_red_that_is_green_without_it(name, test):
    files = [ROOT / mutant(name).file, ROOT / test.partition("::")[0]]
    before = [file.read_bytes() for file in files]
    red, green = pytest_on(name, "--tb=short", test), pytest_on("", test)
    assert green.returncode == 0, green.stdout
    assert red.returncode == 1 and re.search(r"\d+ failed|FAILED", red.stdout), red.stdout + red.stderr
    assert [file.read_bytes() for file in files] == before


def test_the_mutant_is_in_every_python_that_the_test_starts_and_its_source_can_be_read():
    code = "import inspect, lora_fx.graph.views as v;"
    code += "print(v.View.of((6, 8)).slice(0, None, None, 2).strides, v.__file__);"
    code += "print('strides[d]\\n' in inspect.getsource(v.View.slice), v.__spec__.origin == v.__file__)"
    path = os.pathsep.join([str(ROOT / "tests/mutants/startup"), str(ROOT)])
    for name, strides in (("view_step_ignored", "(8, 1)"), ("", "(16, 1)")):
        environment = {**os.environ, "LORA_FX_MUTANT": name, "PYTHONPATH": path}
        shown = subprocess.check_output([sys.executable, "-c", code], env=environment, text=True, timeout=120)
        assert shown.splitlines() == [f"{strides} {ROOT / 'lora_fx/graph/views.py'}", f"{bool(name)} True"]


def test_a_mutant_that_comes_too_late_says_so():
    code = "from lora_fx import plan; import os; os.environ['LORA_FX_MUTANT'] = 'scale_dropped';"
    code += "from tests.mutants import hook; hook.install()"
    late = subprocess.run([sys.executable, "-c", code], cwd=ROOT, text=True, capture_output=True, timeout=120)
    assert late.returncode == 1 and "lora_fx.deltas.adapted_weight is imported already" in late.stderr


# ── the runner ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_what_pytest_says_is_read_laws_first():
    output = (
        "..F\nFAILED tests/test_a.py::test_b[x y] - AssertionError: a - b\nERROR tests/test_laws.py::test_l2_x[mha]\n"
    )
    assert failed(1, output) == ("test_l2_x[mha]", "test_b[x y]")
    assert failed(0, "3 passed") == ()
    assert failed(-9, "") == ("signal 9",)
    for status, text in ((4, "usage: pytest"), (5, "no tests ran"), (1, "INTERNALERROR"), (0, output)):
        with pytest.raises(RuntimeError, match=f"status {status}"):
            failed(status, text)


def test_a_survivor_is_told_apart_from_what_is_caught():
    outcomes = {"a": Outcome((), 2.0, ""), "b": Outcome(("test_l1_x",), 1.0, ""), "c": Outcome(("test_y",), 1.0, "")}
    assert shown(outcomes["a"]) == "NOTHING: it survives" and shown(outcomes["b"]) == "l1_x"
    assert summary(outcomes, 90) == "2/3 caught, 1 of them by a law, in 1.5 minutes"


def test_a_hanging_mutant_ends_at_the_time_limit(tmp_path: Path):
    (tmp_path / "test_sleep.py").write_text("import time\n\ndef test_sleep():\n    time.sleep(600)\n")
    ((_, outcome),) = run([Job("", Area((str(tmp_path / "test_sleep.py"),)), limit=5.0)], 1)
    assert outcome.failures == ("the time limit of 5 s",) and outcome.caught and outcome.seconds < 60
