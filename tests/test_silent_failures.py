"""The table of silent failures: lora_fx's column is right or refused, and the table of the docs is what comes out."""

from __future__ import annotations

import functools
import importlib.metadata
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

import lora_fx
from benchmarks import silent_failures
from benchmarks.silent_failures import CASES, NO_EFFECT, RIGHT, Case, Truth, is_sound, measure_peft, report
from lora_fx.checks.verification import compare

ROOT = Path(__file__).parent.parent
BY_NAME = {case.name: case for case in CASES}
COMPUTED = "a Linear with weight_norm"
LINEAR = BY_NAME["F.linear(x, self.lin.weight)"]
WAY_BACK = next(case for case in CASES if case.judge is silent_failures.judge_way_back)
ROUNDED = BY_NAME["bfloat16, safe_merge=True"]

measure_lora_fx = functools.cache(silent_failures.measure_lora_fx)  # the table asks again


@pytest.mark.parametrize("name", BY_NAME)
def test_lora_fx_is_right_or_refuses_with_its_reason(name):
    expected = ("refused: the weight is computed", "–") if name == COMPUTED else (RIGHT, RIGHT)
    cells = measure_lora_fx(BY_NAME[name])
    assert cells[0].startswith(expected[0]) and cells[1] == expected[1], cells
    assert is_sound(cells)


@pytest.mark.parametrize("name", BY_NAME)
def test_the_adapter_of_a_case_has_an_effect_that_noise_cannot_hide(name):
    truth = Truth(BY_NAME[name])
    assert not compare(truth.plain, truth.right, truth.right, truth.noise, truth.case.dtype)


def _one_step_up(model: nn.Module) -> nn.Module:
    lora_fx.fold(model)
    with torch.no_grad():
        weight = model.get_parameter("lin.weight")[0, :2]
        weight.copy_(torch.nextafter(weight, torch.full_like(weight, torch.inf)))
    return model


@pytest.mark.parametrize(
    ("case", "cell"),
    [
        (replace(LINEAR, fold=lora_fx.deactivate), NO_EFFECT),
        (replace(LINEAR, scale=2 * LINEAR.scale), "WRONG, off by 50 %"),
        (replace(ROUNDED, fold=_one_step_up), "WRONG, 0.03 % of the weights misrounded"),
        (replace(WAY_BACK, fold=lora_fx.fold), "WRONG, "),
    ],
    ids=["lost", "half", "misrounded", "not undone"],
)
def test_a_library_that_was_wrong_would_be_called_wrong(case: Case, cell: str):
    cells = silent_failures.measure_lora_fx(case)
    assert cells[1].startswith(cell), cells
    assert not is_sound(cells)


def test_a_refused_fold_is_shown_with_its_reason():
    case = replace(LINEAR, fold=lambda model: lora_fx.fold(lora_fx.deactivate(model)))
    cells = silent_failures.measure_lora_fx(case)
    assert cells == (RIGHT, "refused: the model has no active adapter (it requires an active adapter)") and is_sound(
        cells
    )


def test_the_command_fails_where_lora_fx_is_wrong(monkeypatch, capsys):
    for case, status in ((LINEAR, 0), (replace(LINEAR, scale=2 * LINEAR.scale), 1)):
        monkeypatch.setattr(silent_failures, "CASES", (case,))
        assert silent_failures.main([]) == status
        assert f"\n{LINEAR.name}  " in capsys.readouterr().out


def test_a_failure_that_peft_warns_of_is_no_silent_one():
    assert measure_peft(BY_NAME["Conv1d, 2 groups"]) == ("right (warns)", "refused")


def test_the_table_of_the_docs_is_what_the_command_prints():
    shown = (ROOT / "docs" / "silent.md").read_text(encoding="utf-8")
    shown = shown.partition("<!-- silent failures -->\n")[2].partition("\n<!-- /silent failures -->")[0]
    printed = report([(case.name, *measure_peft(case), *measure_lora_fx(case)) for case in CASES], markdown=True)
    if _is_pinned("peft") and _is_pinned("torch"):
        assert shown == printed
    assert _of_lora_fx(shown) == _of_lora_fx(printed)


def _is_pinned(package: str) -> bool:
    """The installed version is the one of constraints.txt, for which the table was made."""
    installed = importlib.metadata.version(package).partition("+")[0]
    return f"{package}=={installed}" in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()


def _of_lora_fx(markdown: str) -> set[tuple[str, ...]]:
    """Case and lora_fx's cells of each row: another PEFT may put a row under another title."""
    rows = [line.strip("| ").split(" | ") for line in markdown.splitlines() if line.startswith("| ")]
    return {(row[0], *row[3:]) for row in rows if len(row) == 5}
