"""Times that can be compared on a machine that does other things too: paired, interleaved, and with intervals."""

from __future__ import annotations

import gc
import math
import os
import platform
import random
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

CONFIDENCE = 0.99


@dataclass(frozen=True)
class Interval:
    """The median of some values, and two of them between which the true median lies with this confidence."""

    median: float
    low: float
    high: float
    confidence: float

    @classmethod
    def of(cls, values: Sequence[float], confidence: float = CONFIDENCE) -> Interval:
        """The narrowest pair of order statistics that has the confidence, whatever the distribution is.

        The k-th value from below and the one from above miss the median where fewer than k of n lie on one side of it:
        with 2·P(Binomial(n, ½) < k). Of few values even the outermost have less than what is asked, and say so.
        """
        own = sorted(values)
        n = len(own)
        missed = [2 * sum(math.comb(n, k) for k in range(rank)) / 2**n for rank in range(1, n // 2 + 1)] or [1.0]
        rank = max([k for k, chance in enumerate(missed, 1) if chance <= 1 - confidence], default=1)
        return cls(statistics.median(own), own[rank - 1], own[n - rank], 1 - missed[rank - 1])

    def __contains__(self, value: float) -> bool:
        return self.low <= value <= self.high

    def above(self, other: Interval) -> bool | None:
        """Whether all of it is; None where the two meet, and are not told apart."""
        return True if self.low > other.high else False if self.high < other.low else None

    @property
    def span(self) -> str:
        return f"{self.low:.3f}–{self.high:.3f}"


@dataclass(frozen=True)
class Verdict:
    """Something that the paper says, and whether it is so here."""

    says: str
    holds: bool | None
    """None where what was measured does not tell."""
    seen: str

    def __str__(self) -> str:
        return f"{_WORDS[self.holds]}  {self.says}: {self.seen}"


_WORDS = {True: "yes", False: "no ", None: "?  "}


def all_of(answers: Iterable[bool | None]) -> bool | None:
    """Each of several, of which some may not be told."""
    found = set(answers)
    return False if False in found else None if None in found else True


def ending(verdicts: Sequence[Verdict]) -> list[str]:
    """The lines that end a table."""
    answers = [verdict.holds for verdict in verdicts]
    if all(answers):
        return [*map(str, verdicts), "All of it holds here."]
    unknown = f", {answers.count(None)} are not told apart (?)" if None in answers else ""
    return [*map(str, verdicts), f"{answers.count(True)} of {len(answers)} hold here{unknown}."]


def interleaved(
    calls: Mapping[str, Callable[[], Any]], seconds: float, least: int = 2, *,
    before: Mapping[str, Callable[[], Any]] = MappingProxyType({}), step: Callable[[Any], None] = lambda _: None,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:  # fmt: skip
    """Seconds of each call in each round. A round makes every call once, in an order drawn anew, so that what else the
    machine does falls on all of them alike. The first round is not counted.

    Args:
        seconds: how long rounds go on.
        least: how many there are, whatever that takes.
        before: what is done before a call, outside of its time.
        step: called after each round that counts.
    """
    order, found = random.Random(0), dict[str, list[float]]((name, []) for name in calls)
    started, number = math.inf, -1
    gc.freeze()  # what a round collects is its own, not everything that is imported
    try:
        while number < least or time.monotonic() - started < seconds:
            gc.collect()
            for name in order.sample(list(calls), len(calls)):
                before.get(name, lambda: None)()
                start = clock()
                calls[name]()
                if number >= 0:
                    found[name].append(clock() - start)
            number += 1
            if number == 0:
                started = time.monotonic()
            else:
                step(number)
    finally:
        gc.unfreeze()
    return found


def ratios(times: Mapping[str, Sequence[float]], name: str, to: str) -> list[float]:
    """Within each round: noise that lasts longer than a round cancels."""
    return [a / b for a, b in zip(times[name], times[to], strict=True)]


def machine() -> dict[str, Any]:
    """The processor, its cores, and how many programs have wanted one in the last minute."""
    lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines() if Path("/proc/cpuinfo").exists() else []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    name = named[0] if named else platform.processor() or platform.machine()
    return {"processor": name, "cores": os.cpu_count() or 1, "load": round(os.getloadavg()[0], 2)}
