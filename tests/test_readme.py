"""The README is true: its code runs, what it shows is what comes out, its commands are the ones CI runs."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import settings
from torch import nn

import lora_fx
from lora_fx import Rule
from tests.zoo import case

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.S)


@pytest.mark.onnx
def test_the_ten_lines_on_the_first_screen_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model, example_inputs = case("llama").build()
    exec(BLOCKS[0], {"model": model, "example_inputs": example_inputs})
    assert {"model.onnx", "adapter"} <= {path.name for path in tmp_path.iterdir()}


def test_the_rules_run():
    model, inputs = case("llama").build()
    scope = {"F": F, "Rule": Rule}
    exec(BLOCKS[1], scope)
    rows = {row.weight.name for row in lora_fx.plan(model, scope["rules"], inputs).rows}
    assert "lm_head.weight" not in rows and len(rows) == 2 * 3


def test_the_generated_forward_is_the_one_shown():
    layer = nn.Linear(6, 8)
    lora_fx.apply(layer, Rule(where="*", rank=2, alpha=4), torch.randn(3, 6))
    lines = [re.sub(r";  .* = None$", "", line).replace(" : ", ": ") for line in lora_fx.show(layer).splitlines()]
    assert ast.unparse(ast.parse("\n".join(lines))) == ast.unparse(ast.parse(BLOCKS[2]))


def test_the_certificate_runs(capsys):
    model, example_inputs = case("native-gated-mlp").build()
    lora_fx.apply(model, Rule(where="*", rank=2), example_inputs)
    exec(BLOCKS[3], {"lora_fx": lora_fx, "model": model, "example_inputs": example_inputs})
    assert capsys.readouterr().out.rstrip().endswith("4 of 4 uses are covered")


@pytest.mark.onnx
def test_the_lines_for_the_users_own_tests_run():
    _, inputs = case("native-gated-mlp").build()
    scope = {"lora_fx": lora_fx, "make_model": lambda: case("native-gated-mlp").build()[0], "inputs": inputs}
    exec(BLOCKS[4], scope)
    settings(max_examples=2)(scope["test_our_model_survives_lora"])()


@pytest.mark.onnx
def test_the_lines_about_onnx_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model, inputs = case("gpt2").build()
    lora_fx.apply(model, Rule(where="*attn*", rank=2), inputs, name="task")
    scope = {"lora_fx": lora_fx, "model": model, "inputs": inputs}
    exec(BLOCKS[5], scope)
    assert scope["report"].proof.folded and len(scope["report"].comparisons) == 3
    exec(BLOCKS[6], scope)
    assert scope["session"].adapters.keys() == {"task"}


def test_every_name_of_the_readme_is_public():
    for name in re.findall(r"(?<!`)lora_fx\.([a-z_]+)\(", README):
        assert callable(getattr(lora_fx, name)), name
    table = README.partition("## More")[2]
    for cell in re.findall(r"^\| (`.*?) \|", table, flags=re.M):
        for name in re.findall(r"`(?:lora_fx\.export\.)?([A-Za-z_]+)(?:\(|`)", cell):
            assert hasattr(lora_fx, name) or hasattr(lora_fx.export, name), name


def test_the_keys_of_the_readme_are_the_keys_of_a_rule():
    table = README.partition("## Rules")[2].partition("Settings:")[0]
    keys = re.findall(r"^\| `([a-z]+)` \|", table, flags=re.M)
    assert set(keys) <= set(Rule.__dataclass_fields__) and len(keys) == 6


def test_ci_runs_the_command_of_the_readme():
    command = README.partition("<!-- test command -->")[2].partition("```bash\n")[2].partition("\n```")[0]
    assert command == 'pip install -c constraints.txt -e ".[test]" && python -m pytest'
    assert "<!-- test command -->" in (Path(__file__).parent.parent / ".ci" / "run").read_text(encoding="utf-8")
