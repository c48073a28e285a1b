"""Tests of Triton's kernels in its interpreter, on a CPU.

Triton asks once, when it is imported, whether it is to interpret. So each file here is a process of its own, which a
test of the suite starts: there Triton interprets, and everywhere else it compiles.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent


def passes(name: str) -> None:
    """The tests of that file pass, and none of them is skipped."""
    line = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", str(HERE / name)]
    env = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(line, capture_output=True, text=True, timeout=600, check=False, env=env, cwd=HERE.parents[1])
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert "skipped" not in done.stdout
