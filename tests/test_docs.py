"""The documentation is true: every block of every page runs, and prints or refuses what the page says."""

from __future__ import annotations

import ast
import doctest
import importlib.util
import re
import subprocess
import sys

import pytest
import torch

import lora_fx
import lora_fx.export
import lora_fx.passes
import lora_fx.testing
from lora_fx import errors
from tests.documentation import PAGES, ROOT, blocks, run

ONNX = {"onnx", "peft", "testing", "troubleshooting"}


def page(name: str) -> str:
    return (ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "path", [pytest.param(p, id=p.stem, marks=[pytest.mark.onnx] * (p.stem in ONNX)) for p in PAGES]
)
def test_every_block_of_the_page_runs(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with torch.random.fork_rng(devices=()):
        ran = run(path, {"__name__": path.stem})
    assert ran == sum(b.language == "python" and not b.mark.startswith("not run") for b in blocks(path))
