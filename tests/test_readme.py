"""The README is a door, and true: its code runs, its commands are the ones CI runs."""

from __future__ import annotations

import copy
import re
import runpy
from pathlib import Path

import pytest

import lora_fx
import lora_fx.export
from lora_fx.cli import command
from tests.documentation import ROOT, run
from tests.zoo import case

PAGE = ROOT / "README.md"
README = PAGE.read_text(encoding="utf-8")


@pytest.mark.onnx
def test_its_blocks_run(tmp_path, monkeypatch):
    model, example_inputs = case("llama").build()
    budget = runpy.run_path(str(ROOT / "examples" / "budget_pass.py"))["Budget"]
    monkeypatch.chdir(tmp_path)
    scope = dict(model=model, other_model=copy.deepcopy(model), example_inputs=example_inputs, Budget=budget)
    assert run(PAGE, **scope) == 2
    assert {"model.onnx", "adapter", "folder"} <= {path.name for path in tmp_path.iterdir()}


def test_it_is_a_door():
    assert len(README.splitlines()) <= 150


def test_its_links_work_where_it_is_shown():
    """On a package index nothing lies beside it."""
    assert not re.findall(r"\]\((?!https://|#)[^)]*\)", README)
    named = re.findall(r"`((?:docs|examples|benchmarks)/[^`]*)`", README)
    assert named and [path for path in named if not (ROOT / path).exists()] == []


def test_every_name_of_the_readme_is_public():
    for name in re.findall(r"(?<!`)lora_fx\.([a-z_]+)\(", README):
        assert callable(getattr(lora_fx, name)), name
    table = README.partition("## The calls")[2].partition("\n## ")[0]
    cells = re.findall(r"^\| (`.*?) \|", table, flags=re.M)
    named = [n for cell in cells for n in re.findall(r"`(?:lora_fx\.export\.)?([A-Za-z_]+)(?:\(|`)", cell)]
    assert [n for n in named if not hasattr(lora_fx, n) and not hasattr(lora_fx.export, n)] == []
    functions = {n for n in lora_fx.__all__ if n.islower()}
    assert functions <= {*named}, functions - {*named}


def test_ci_runs_the_command_of_the_readme():
    command = README.partition("<!-- test command -->")[2].partition("```bash\n")[2].partition("\n```")[0]
    assert command == 'pip install -c constraints.txt -e ".[test]" && python -m pytest'
    assert "<!-- test command -->" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")


def test_the_demo_command_is_one_of_the_command_line():
    shown = README.partition("<!-- demo command -->")[2].partition("```bash\n")[2].partition("\n```")[0]
    install, _, demo = shown.partition(" && ")
    assert install == 'pip install -c constraints.txt -e ".[demo]"'
    program, name, *arguments = demo.split()
    context = command.make_context(program, [name])
    asked = command.get_command(context, name).make_context(name, arguments, parent=context)
    assert program == "lora-fx" and asked.params["out"] == Path("lora_fx_demo")
