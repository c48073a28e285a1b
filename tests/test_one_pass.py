"""The schedule of one pass: its kernels in Triton's interpreter, and their compilation for GPUs that are not there."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.interpreted import passes

HERE = Path(__file__).parent


def test_what_the_kernels_compute_in_the_interpreter():
    pytest.importorskip("triton")
    passes("branches.py")


COMPILED = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from lora_fx.deltas import gpu_kernels

FLAGS = {
    "_pass": [(True, True, False), (True, False, True), (False, True, True)],
    "_write": [(True, False), (False, True)],
    "_drop": [()],
    "_times": [()],
}
NAMES = {"_pass": ("DOWN", "SUM", "DROP"), "_write": ("ADD", "DROP"), "_drop": (), "_times": ()}
for name, several in FLAGS.items():
    kernel, blocks = getattr(gpu_kernels, name), gpu_kernels.PASS if name == "_pass" else gpu_kernels.WRITE
    for flags in several:
        fixed = dict(zip(NAMES[name], flags), ROWS=blocks.rows, COLUMNS=blocks.columns)
        fixed |= {"RANK": 8, "WIDE": 16} if NAMES[name] else {}
        fixed |= {"CHUNK": blocks.chunk} if name == "_pass" else {}
        types = {"p": "*bf16", "y": "*bf16", "x": "*bf16", "to": "*bf16", "up": "fp32", "scale": "fp32"}
        types |= {"w": "*bf16"} | dict.fromkeys(("q", "z", "h", "g", "a", "b"), "*fp32")
        signature = {n: "constexpr" if n in fixed else types.get(n, "i32") for n in kernel.arg_names}
        constants = {(kernel.arg_names.index(n),): value for n, value in fixed.items()}
        for capability in (80, 90):
            target = GPUTarget("cuda", capability, 32)
            triton.compile(ASTSource(kernel, signature, constants), target=target, options=blocks.options)
            print(name, flags, capability)
"""


def test_they_compile_for_gpus_that_are_not_there(tmp_path):
    """The interpreter takes what the compiler refuses, as a variable that changes its type in a loop."""
    pytest.importorskip("triton")
    env = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    line = [sys.executable, "-W", "ignore", "-c", COMPILED]
    found = subprocess.run(line, capture_output=True, text=True, timeout=300, check=False, env=env, cwd=HERE.parent)
    assert found.returncode == 0, found.stderr[-4000:]
    assert len(found.stdout.splitlines()) == 14
