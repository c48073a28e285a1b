"""Benchmarks are no timed tests: here they only have to run."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


def test_call_overhead_runs():
    command = [sys.executable, "-W", "ignore", str(BENCHMARKS / "call_overhead.py"), "--rounds", "2"]
    out = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True).stdout
    for name in ("hand-written", "lora_fx", "peft", "no branch"):
        assert f"\n{name}" in out
