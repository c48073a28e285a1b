"""Benchmarks are no timed tests: here they only have to run."""

from __future__ import annotations

import importlib
import json
import math
import runpy
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


LATENCY = ("base", "unfolded", "folded", "base again", "switchable, no adapter", "switchable, an adapter")
LATENCIES = [f"batch {batch}: {what}" for batch in (1, 16) for what in LATENCY]


def command(name: str, *options: str) -> str:
    line = [sys.executable, "-W", "ignore", str(BENCHMARKS / name), *options]
    return subprocess.run(line, capture_output=True, text=True, timeout=300, check=True).stdout


@pytest.fixture
def run(monkeypatch, capsys):
    """The same in this process, where everything is imported already."""
    monkeypatch.syspath_prepend(BENCHMARKS)

    def run(name: str, *options: str) -> str:
        monkeypatch.setattr(sys, "argv", [name, *options])
        with warnings.catch_warnings(action="ignore"):
            runpy.run_path(str(BENCHMARKS / name), run_name="__main__")
        return capsys.readouterr().out

    yield run
    sys.modules.pop("measuring", None)


def test_the_interval_of_a_median_is_that_of_the_binomial_distribution(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    measuring = importlib.import_module("measuring")
    for n in (1, 2, 10, 101, 600):
        times = measuring.Times({"a": [float(k) for k in range(n, 0, -1)], "b": [1.0] * n})
        middle, low, high = times.interval("a", "b")
        assert middle == (n + 1) / 2 and low + high == n + 1
        outside = 2 * sum(math.comb(n, k) for k in range(int(low))) / 2**n  # fewer than `low` lie below the median
        assert outside <= 0.05 or low == 1
    monkeypatch.delitem(sys.modules, "measuring")


def test_it_is_a_command(tmp_path):
    out = command("folding.py", "--tiny", "--rounds", "1", "--json", str(tmp_path / "table.json"))
    assert json.loads((tmp_path / "table.json").read_text())["title"] in out


def test_call_overhead_runs(run):
    out = run("call_overhead.py", "--tiny", "--rounds", "2")
    for name in ("hand-written", "lora_fx", "PEFT", "no branch"):
        assert f"\n{name}" in out


REAL_SIZE = [
    "forward", "apply(check=False)", "apply", "load_adapter(check=False)", "load_adapter", "certify",
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "options", "rows"),
    [
        ("training.py", ["--only", "vit.*"], ["ViT, query | value"]),
        ("experts.py", ["--tokens", "16"], ["16"]),
        ("schedules.py", ["--dtypes", "float32"], ["float32, forward", "float32, with backward"]),
        ("folding.py", [], ["float32", "bfloat16"]),
        ("scale.py", [], ["1", "2"]),
        ("real_size.py", [], REAL_SIZE),
        pytest.param("onnx_memory.py", ["--part", "stream"], ["0.00"], marks=pytest.mark.onnx),
        pytest.param("onnx_graphs.py", ["--part", "latency"], LATENCIES, marks=pytest.mark.onnx),
    ],
)
def test_a_benchmark_runs_and_its_table_is_json_too(run, tmp_path, name, options, rows):
    file = tmp_path / "table.json"
    out = run(name, "--tiny", "--rounds", "1", "--json", str(file), *options)
    found = json.loads(file.read_text())
    assert found["title"] in out and "torch 2." in found["machine"]
    assert [next(iter(row.values())) for row in found["rows"]] == rows
    assert all(row.values() for row in found["rows"])
