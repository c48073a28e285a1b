"""Benchmarks are no timed tests: here they only have to run."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


LATENCY = ("base", "unfolded", "folded", "base again", "switchable, no adapter", "switchable, an adapter")


def run(name: str, *options: str) -> str:
    command = [sys.executable, "-W", "ignore", str(BENCHMARKS / name), *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=True).stdout


def test_call_overhead_runs():
    out = run("call_overhead.py", "--tiny", "--rounds", "2")
    for name in ("hand-written", "lora_fx", "PEFT", "no branch"):
        assert f"\n{name}" in out


@pytest.mark.parametrize(
    ("name", "options", "rows"),
    [
        ("training.py", ["--only", "vit.*"], ["ViT, query | value"]),
        ("experts.py", ["--tokens", "16"], ["16"]),
        ("folding.py", [], ["float32", "bfloat16"]),
        ("scale.py", [], ["1", "2"]),
        ("onnx_memory.py", ["--part", "stream"], ["0.00"]),
        ("onnx_graphs.py", ["--part", "latency"], [f"batch {batch}: {what}" for batch in (1, 16) for what in LATENCY]),
    ],
)
def test_a_benchmark_runs_and_its_table_is_json_too(tmp_path, name, options, rows):
    file = tmp_path / "table.json"
    out = run(name, "--tiny", "--rounds", "1", "--json", str(file), *options)
    found = json.loads(file.read_text())
    assert found["title"] in out and "torch 2." in found["machine"]
    assert [next(iter(row.values())) for row in found["rows"]] == rows
    assert all(row.values() for row in found["rows"])
