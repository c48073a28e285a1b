"""The sweep over tables 5, 6 and those of the methods: what its rows are, and that it goes on where it was."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from click.testing import CliRunner

import lora_fx
from lora_fx.cli.paper import paper
from lora_fx.errors import FileError
from lora_fx.paper import sweep as module
from lora_fx.paper.sweep import RUNS, TABLES, Cell, Run, _Systems, planned, shown, sweep
from lora_fx.paper.tasks import TASKS, Effort, Text

TEXT, DIGITS = TASKS["text"], TASKS["digits"]


@pytest.fixture
def short(monkeypatch):
    """Few steps of a narrow model: what is learned does not matter here."""
    monkeypatch.setattr(Text, "base_effort", Effort(30, 4, 4e-3))
    monkeypatch.setattr(Text, "effort", Effort(20, 4, 0.0))
    monkeypatch.setattr(Text, "depth", 2)


def few(table: str = "weights", rows: int = 3) -> list[Run]:
    return planned(TEXT, [table], 1)[:rows]


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
def test_what_is_compared_at_one_budget_has_it(task):
    systems = _Systems(task)
    model, inputs = task.model().eval(), task.example()
    for name, _, system, _ in systems.weights():
        rows = lora_fx.plan(model, system.rules, inputs).rows
        dearest = max(sum(r.parameters // r.rank for r in rows if r.role == row.role) for row in rows)
        assert systems.budget - dearest < sum(row.parameters for row in rows) <= systems.budget, name


def test_a_run_of_two_tables_is_trained_once():
    runs = planned(TEXT, TABLES, 3)
    by_table = {name: {run.key for run in runs if run.table == name} for name in TABLES}
    assert by_table["weights"] & by_table["methods"] and by_table["methods"] & by_table["data"]
    assert len({(run.table, run.row, run.column, run.seed) for run in runs}) == len(runs)
    assert not {run.key for run in runs} & {run.key for run in planned(TEXT, TABLES, 3, quick=True)}
    assert not {run.key for run in runs} & {run.key for run in planned(DIGITS, TABLES, 3)}


def test_an_interrupted_sweep_goes_on_where_it_was(short, tmp_path, monkeypatch):
    whole = sweep(few(), tmp_path / "whole", jobs=1)
    trained, own = [], module.trained
    monkeypatch.setattr(module, "trained", lambda run, base: trained.append(run.key) or own(run, base))

    def interrupt(key):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sweep(few(), tmp_path / "parts", jobs=1, step=interrupt)
    with (tmp_path / "parts" / RUNS).open("a", encoding="utf-8") as file:
        file.write('{"key": "ab')  # as a machine that loses its power leaves it
    steps = []
    assert sweep(few(), tmp_path / "parts", jobs=1, step=steps.append) == whole
    assert trained == steps == [run.key for run in few()]  # each once: the first before
    assert [json.loads(line)["key"] for line in (tmp_path / "parts" / RUNS).read_text("utf-8").splitlines()] == steps


def test_two_at_a_time_are_the_same_as_one_after_the_other(tmp_path):
    """In processes of their own, where nothing is made small: of a few steps."""
    runs = [replace(run, steps=2, base_steps=2) for run in few(rows=2)]
    assert sweep(runs, tmp_path / "two", jobs=2) == sweep(runs, tmp_path / "one", jobs=1)


@pytest.mark.parametrize("table", ["methods", "choice"])
def test_every_row_trains_and_has_its_parameters(short, tmp_path, table):
    found = {cell.row: cell for cell in sweep(planned(TEXT, [table], 1), tmp_path, jobs=1)}
    budget = _Systems(TEXT).budget
    assert all(0 < cell.scores[0] < 8 for cell in found.values())  # of 2^8 characters a guess has 8 bits
    for row, cell in found.items():
        if row in ("lora_fx.suggest", "LoRA q, v") or row.startswith("the same"):
            assert 0.75 * budget < cell.parameters <= budget, row


@pytest.mark.parametrize(
    "line", ["{}", "nothing", '{"key": "a", "score": NaN, "parameters": 3}', '{"key": 1, "score": []}']
)
def test_a_note_that_is_none_is_refused_by_its_place(tmp_path, line):
    (tmp_path / RUNS).write_text(f'{line}\n{{"key": "a", "score": 1.0, "parameters": 3}}\n', encoding="utf-8")
    with pytest.raises(FileError, match=r"line 1: it is no note of a run"):
        module.Notes(tmp_path / RUNS, module.Outcome.read)


def test_a_table_marks_the_best_and_shows_the_spread():
    cells = [Cell("weights", "text", "q", "", 10, (2.0, 3.0)), Cell("weights", "text", "all", "", 1200, (1.0, 1.0))]
    text = shown(cells)
    assert "2.500 ± 0.707\n" in text and "1.000 ± 0.000 *" in text and "1,200" in text and "2 seeds" in text


def test_the_command_writes_tables_and_figures(short, tmp_path):
    options = ["sweep", "-o", str(tmp_path / "out"), "--task", "text", "--table", "choice", "--jobs", "1"]
    result = CliRunner().invoke(paper, [*options, "--seeds", "1"])
    assert result.exit_code == 0, result.output
    said = json.loads((tmp_path / "out" / "sweep.json").read_text("utf-8"))
    assert {row["row"] for row in said["rows"]} >= {"lora_fx.suggest", "AdaLoRA: all"}
    assert (tmp_path / "out" / "text-choice.png").stat().st_size > 10_000
    assert (tmp_path / "out" / "sweep.txt").read_text("utf-8").strip() in result.output
