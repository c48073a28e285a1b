"""All that is measured on a GPU, one part after the other, each within its time: under eight minutes on an H100.

    python benchmarks/gpu.py --output gpu.md [--only "fold|experts"] [--dry-run]

A part that fails, or takes longer than its time, is named with what it said last, and the next one begins. The file is
written anew after each part: the card and the versions, then the tables. `--dry-run` goes the same way on the CPU, with
the smallest sizes.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from measuring import machine

HERE = Path(__file__).parent
TESTS = HERE.parent / "tests" / "test_gpu.py"


@dataclass(frozen=True)
class Part:
    """One benchmark, or the tests."""

    name: str
    script: str
    """Empty for the tests."""
    options: tuple[str, ...]
    seconds: int
    """What it may take."""
    dry: tuple[str, ...] = ()
    """Options of a dry run."""

    def command(self, table: Path, dry: bool) -> list[str]:
        if not self.script:
            return [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:benchmark", str(TESTS)]
        own = [*self.dry, "--tiny", "--rounds", "1"] if dry else self.options
        return [sys.executable, "-W", "ignore", str(HERE / self.script), "--json", str(table), *own]


CUDA = ("--device", "cuda")
BF16 = (*CUDA, "--dtype", "bfloat16")
LLAMA = ("--only", "llama.*")
PARTS = (
    Part("tests", "", (), 60),
    Part(
        "apply, certify and fold 7B", "real_size.py",
        (*CUDA, "--layers", "32", "--width", "4096", "--inner", "11008"), 120,
    ),
    Part(
        "training, large", "training.py",
        (*BF16, *LLAMA, "--hidden", "4096", "--layers", "8", "--tokens", "2048", "--rounds", "5"), 75, LLAMA,
    ),
    Part(
        "training, launch-bound", "training.py",
        (*BF16, *LLAMA, "--hidden", "1024", "--layers", "12", "--tokens", "512", "--rounds", "5"), 40, LLAMA,
    ),
    Part(
        "training, compiled", "training.py",
        (*BF16, *LLAMA, "--compile", "--hidden", "4096", "--layers", "2", "--tokens", "2048", "--rounds", "5"),
        60, LLAMA,
    ),
    Part("products", "products.py", ("--rounds", "8"), 60),
    Part("experts", "experts.py", (*BF16, "--sizes", "64", "2048", "1408", "--tokens", "128", "--rounds", "5"), 25),
    Part("ONNX Runtime", "onnx_graphs.py", ("--part", "latency", *CUDA, "--rounds", "20"), 30, ("--part", "latency")),
)  # fmt: skip


@dataclass(frozen=True)
class Outcome:
    """What a part came to."""

    part: Part
    seconds: float
    text: str
    """Its table as markdown; of the tests, and of a part that failed, the last that it said."""
    whole: bool


def run(part: Part, dry: bool) -> Outcome:
    with tempfile.TemporaryDirectory() as folder:
        table, said = Path(folder) / "table.json", Path(folder) / "said.txt"
        start = time.perf_counter()
        with said.open("w") as out:
            command = part.command(table, dry)
            child = subprocess.Popen(
                command, stdout=out, stderr=subprocess.STDOUT, cwd=HERE.parent, start_new_session=True
            )
            try:
                code = child.wait(timeout=part.seconds)
                why = f"ended with {code}"
            except subprocess.TimeoutExpired:
                code, why = 1, f"took longer than its {part.seconds} s"
            finally:
                _end(child)
        seconds = time.perf_counter() - start
        last = [line for line in said.read_text(errors="replace").splitlines() if line.strip()][-3:]
        if code or (part.script and not table.exists()):
            return Outcome(part, seconds, "\n".join([f"It {why}:", "", *(f"    {line}" for line in last)]), False)
        text = _markdown(json.loads(table.read_text())["rows"]) if part.script else f"    {last[-1]}"
        return Outcome(part, seconds, text, True)


def _end(child: subprocess.Popen) -> None:
    """It, and what it has started: many a benchmark measures in processes of their own, which hold the GPU's memory."""
    with suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()


def _markdown(rows: Sequence[dict[str, str]]) -> str:
    cells = [list(rows[0]), ["---"] * len(rows[0]), *(list(row.values()) for row in rows)]
    return "\n".join("| " + " | ".join(cell.replace("|", r"\|") for cell in row) + " |" for row in cells)


def write(path: Path, outcomes: Sequence[Outcome], device: str) -> None:
    lines = ["# On a GPU" if device == "cuda" else "# Dry run, on the CPU", "", machine(device), ""]
    for one in outcomes:
        failed = "" if one.whole else ", **not measured**"
        lines += [f"## {one.part.name} ({one.seconds:.0f} s of {one.part.seconds}{failed})", ""]
        lines += [f"`{one.part.script} {' '.join(one.part.options)}`", ""] if one.part.script else []
        lines += [one.text, ""]
    path.write_text("\n".join(lines), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="the file of the tables, as markdown")
    parser.add_argument("--only", default=".*", help="parts whose name is this, a regular expression")
    parser.add_argument("--dry-run", action="store_true", help="on the CPU, with the smallest sizes")
    options = parser.parse_args()
    parts = [part for part in PARTS if re.fullmatch(options.only, part.name)]
    if not parts:
        raise SystemExit(f"there is no part {options.only!r}: there are {', '.join(part.name for part in PARTS)}")
    if not options.dry_run and not torch.cuda.is_available():
        raise SystemExit("there is no CUDA device: nothing was measured; --dry-run shows that the parts run")
    outcomes: list[Outcome] = []
    for part in parts:
        outcomes.append(run(part, options.dry_run))
        write(options.output, outcomes, "cpu" if options.dry_run else "cuda")
        print(f"{part.name}: {outcomes[-1].seconds:.0f} s{'' if outcomes[-1].whole else ', not measured'}", flush=True)
    if not all(one.whole for one in outcomes):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
