"""What the benchmarks share: paired, interleaved timing; machine and versions; tables, JSON, RESULTS.md."""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import platform
import random
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from lora_fx.tables import table

RESULTS = Path(__file__).parent / "RESULTS.md"


@dataclass
class Times:
    """Seconds of each candidate in each round."""

    seconds: dict[str, list[float]]

    def median(self, name: str) -> float:
        return statistics.median(self.seconds[name])

    def ratio(self, name: str, to: str) -> tuple[float, float, float]:
        """Median and quartiles of the ratios within a round: noise that lasts longer than a round cancels."""
        ratios = self._ratios(name, to)
        if len(ratios) < 2:
            return ratios[0], ratios[0], ratios[0]
        low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
        return middle, low, high

    def interval(self, name: str, to: str) -> tuple[float, float, float]:
        """Median of the ratios, and where the true median lies with 95 % confidence: between two order statistics."""
        ratios = self._ratios(name, to)
        n = len(ratios)
        rank = max(1, int((n - 1.96 * n**0.5) / 2))  # the normal approximation of the binomial distribution
        return statistics.median(ratios), ratios[rank - 1], ratios[n - rank]

    def _ratios(self, name: str, to: str) -> list[float]:
        return sorted(a / b for a, b in zip(self.seconds[name], self.seconds[to], strict=True))


def paired(
    candidates: dict[str, Callable[[], Any]],
    rounds: int,
    warm_up: int = 1,
    calls: int = 1,
    clock: Callable[[], float] = time.perf_counter,
) -> Times:
    """Each round calls every candidate, in a random order; `calls` times in a row, for the time of one of them.

    Args:
        clock: `time.thread_time` for what runs in one thread: what it computes, whatever else the machine does.
    """
    times: dict[str, list[float]] = {name: [] for name in candidates}
    cuda = torch.cuda.is_available()
    gc.freeze()  # what a round collects is its own, not everything that is imported
    for number in range(-warm_up, rounds):
        gc.collect()
        for name in random.sample(list(candidates), len(candidates)):
            if cuda:
                torch.cuda.synchronize()
            start = clock()
            for _ in range(calls):
                candidates[name]()
            if cuda:
                torch.cuda.synchronize()
            if number >= 0:
                times[name].append((clock() - start) / calls)
    gc.unfreeze()
    return Times(times)


def shown(ratio: tuple[float, float, float], digits: int = 2) -> str:
    return f"{ratio[0]:.{digits}f} ({ratio[1]:.{digits}f}–{ratio[2]:.{digits}f})"


def machine(device: str = "cpu") -> str:
    """Where and with what this was measured."""
    where = torch.cuda.get_device_name() if device == "cuda" else f"{_processor()}, {torch.get_num_threads()} threads"
    packages = []
    for name in ("torch", "transformers", "peft", "onnxruntime"):
        try:
            packages.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            continue
    return f"{where}; {', '.join(packages)}; {datetime.date.today()}"


def _processor() -> str:
    try:
        lines = subprocess.run(["lscpu"], capture_output=True, text=True, check=True).stdout.splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("Model name"))
    except (OSError, StopIteration, subprocess.CalledProcessError):
        return platform.processor() or platform.machine()


def arguments(document: str | None, rounds: int) -> argparse.ArgumentParser:
    """The options that every benchmark has."""
    parser = argparse.ArgumentParser(description=(document or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=rounds, help="paired rounds; medians and quartiles are shown")
    parser.add_argument("--tiny", action="store_true", help="smallest sizes: only to see that it runs")
    parser.add_argument("--json", type=Path, help="write the table there as JSON, too")
    parser.add_argument("--record", action="store_true", help="put the table into benchmarks/RESULTS.md")
    return parser


def report(
    title: str, header: Sequence[str], rows: Sequence[Sequence[str]], options: argparse.Namespace, note: str = ""
) -> None:
    """Print a table, and put it where the options say."""
    where = machine(getattr(options, "device", "cpu"))
    text = "\n".join(filter(None, [title, note, where, "", table(header, rows, right=range(1, len(header)))]))
    print(text)
    if options.json:
        found = [dict(zip(header, row, strict=True)) for row in rows]
        options.json.write_text(json.dumps({"title": title, "machine": where, "rows": found}, indent=1) + "\n")
    if options.record:
        _record(title, note, where, header, rows)


def _record(title: str, note: str, where: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """The section of this title, in the place of the old one."""
    cells = ([cell.replace("|", r"\|") for cell in row] for row in (header, ["---"] * len(header), *rows))
    lines = ["| " + " | ".join(row) + " |" for row in cells]
    section = "\n".join(filter(None, [f"## {title}\n", note and note + "\n", f"{where}\n", *lines])) + "\n"
    before = RESULTS.read_text(encoding="utf-8") if RESULTS.exists() else "# Results\n"
    head, *sections = before.split("\n## ")
    kept = [f"## {s.strip()}\n" for s in sections if s.partition("\n")[0] != title]
    RESULTS.write_text("\n".join([head.strip() + "\n", *sorted([*kept, section])]), encoding="utf-8")
