"""Benchmarks are no timed tests: here they only have to run."""

from __future__ import annotations

import dataclasses
import importlib
import json
import math
import runpy
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


CHECKPOINTS = ["cp -r", *(f"lora-fx {verb}" for verb in ("fold", "fold --keep", "verify", "unfold"))]
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


def test_call_overhead_runs(run):
    out = run("call_overhead.py", "--tiny", "--rounds", "2")
    for name in ("hand-written", "lora_fx", "PEFT", "no branch"):
        assert f"\n{name}" in out


REAL_SIZE = [
    "forward", "apply(check=False)", "apply", "load_adapter(check=False)", "load_adapter", "certify", "fold", "unfold",
    "fold(final=True)", "PEFT's merge", "PEFT's merge, bfloat16",
]  # fmt: skip


def test_the_kernels_of_products_compute_what_they_say():
    pytest.importorskip("triton")
    assert command("products.py", "--tiny", "--rounds", "1").count("16×16, 32, 4 warps") == 9


@pytest.mark.parametrize(
    ("name", "options", "rows"),
    [
        ("training.py", ["--only", "vit.*"], ["ViT, query | value"]),
        ("experts.py", ["--tokens", "16"], ["16"]),
        ("schedules.py", ["--dtypes", "float32"], ["float32, forward", "float32, with backward"]),
        ("folding.py", [], ["float32", "bfloat16"]),
        ("scale.py", [], ["1", "2"]),
        ("real_size.py", [], REAL_SIZE),
        ("checkpoints.py", ["--part", "fold", "--kills", "1"], CHECKPOINTS),
        pytest.param("onnx_memory.py", ["--part", "stream"], ["as it is", "with a proof"], marks=pytest.mark.onnx),
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


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    yield importlib.import_module("gpu")
    for name in ("gpu", "measuring"):
        sys.modules.pop(name, None)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_the_gpu_script_says_that_there_is_no_gpu(gpu, monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--output", str(tmp_path / "gpu.md")])
    with pytest.raises(SystemExit, match="there is no CUDA device: nothing was measured"):
        gpu.main()
    assert not list(tmp_path.iterdir())


def test_the_gpu_script_goes_on_after_a_failure_and_a_part_that_takes_too_long(gpu, monkeypatch, tmp_path):
    good = next(part for part in gpu.PARTS if part.name == "experts")
    good = dataclasses.replace(good, seconds=200)
    wrong, slow = dataclasses.replace(good, dry=("--nonsense",)), dataclasses.replace(good, seconds=0)
    monkeypatch.setattr(gpu, "PARTS", (wrong, slow, good))
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--output", str(tmp_path / "gpu.md"), "--dry-run"])
    with pytest.raises(SystemExit, match="1"):
        gpu.main()
    _, first, second, third = (tmp_path / "gpu.md").read_text().split("\n## ")
    assert "not measured" in first and "unrecognized arguments: --nonsense" in first
    assert "took longer than its 0 s" in second
    assert "not measured" not in third and "| tokens an expert | lora_fx, ms |" in third


def test_the_gpu_script_takes_less_than_eight_minutes_and_its_options_are_there(gpu):
    assert sum(part.seconds for part in gpu.PARTS) <= 480
    for part in gpu.PARTS:
        texts = [(BENCHMARKS / name).read_text() for name in (part.script, "measuring.py") if part.script]
        for option in (*part.options, *part.dry):
            assert not option.startswith("--") or any(f'"{option}"' in text for text in texts), (part.name, option)
