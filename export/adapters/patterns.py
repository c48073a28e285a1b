"""The patterns of somebody else's config, matched within a bound.

A pattern of ten characters can take Python's matcher for ever, which nothing in the same process ends. So what repeats
or branches, and what is very much, is matched by a Python of its own, with the same `re` that PEFT uses. That is ended
when all patterns of the file together have taken `SECONDS` of a processor; or after `PATIENCE` of the clock, for a busy
machine is no fault of the pattern.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field

from lora_fx.reading import refuse

SECONDS = 1.0
PATIENCE = 60
LEAST = 0.01
"""A processor's clock may have no finer steps."""

MOST = 2_000_000
"""Plain patterns × names: one to two seconds, as PEFT's own files never need."""

EVERY = r"[^.]*"
"""PEFT's own pattern of any one name."""

_PLAIN = re.compile(r"(?:[^\\*+?{}()\[\]]|\\\.)*")
"""Names with dots, several with ``|``: as many steps as there are characters in them."""

_MATCH = """
import json, re, signal, sys, time
patterns, names, how, seconds = json.load(sys.stdin)
if hasattr(signal, "setitimer"):  # on Windows: the clock alone
    signal.setitimer(signal.ITIMER_PROF, seconds)
began, found = time.process_time(), []
for pattern in patterns:
    match = getattr(re.compile(pattern), how)
    found.append({name: m[m.lastindex or 0] for name in names if (m := match(name))})
json.dump([found, time.process_time() - began], sys.stdout)
"""

Found = list[dict[str, str]]
"""For each pattern, the names that it matches, each with what its last group has found."""


@dataclass
class Matcher:
    """What matches the patterns of one file: what they take together is bounded, and nothing is matched twice."""

    left: float = SECONDS
    """Of the file's seconds."""
    _known: dict[tuple[object, ...], Found] = field(default_factory=dict)

    def matching(
        self, patterns: Sequence[str], names: Sequence[str], place: str, around: tuple[str, str] = ("", "")
    ) -> Found:
        """For each pattern, the names that it matches whole.

        Args:
            around: patterns before and after it, which are then matched from the start on.

        Raises:
            FileError: one is no pattern, or they take too long.
        """
        if not patterns:
            return []
        key = (tuple(patterns), tuple(names), around)
        if key not in self._known:
            self._known[key] = self._match(patterns, names, place, around)
        return self._known[key]

    def _match(self, patterns: Sequence[str], names: Sequence[str], place: str, around: tuple[str, str]) -> Found:
        how, whole = ("match" if any(around) else "fullmatch"), [f"{around[0]}{p}{around[1]}" for p in patterns]
        shown = ", ".join(repr(p[:200]) for p in patterns[:3]) + (", …" if len(patterns) > 3 else "")
        remedy = "write it without repetitions inside of repetitions, or as a list of names"
        plain = all(pattern == EVERY or _PLAIN.fullmatch(pattern) for pattern in patterns)
        if plain and len(patterns) * len(names) <= MOST:
            try:
                compiled = [getattr(re.compile(pattern), how) for pattern in whole]
            except (re.error, RecursionError) as error:
                refuse(place, f"{shown} is no pattern: {error}", remedy, error)
            return [{name: m[m.lastindex or 0] for name in names if (m := match(name))} for match in compiled]
        try:
            done = subprocess.run(
                [sys.executable, "-I", "-S", "-c", _MATCH],
                input=json.dumps([whole, list(names), how, self.left]),
                capture_output=True,
                text=True,
                timeout=PATIENCE,
            )
        except subprocess.TimeoutExpired as error:
            refuse(place, f"{shown} is not through with {len(names)} names after {PATIENCE} s", remedy, error)
        except OSError as error:
            refuse(place, f"{shown}: the process that matches it does not start: {error}", remedy, error)
        if done.returncode < 0:  # a signal has ended it
            reason = f"{shown} is not through with {len(names)} names after the {SECONDS:g} s of a processor that"
            refuse(place, f"{reason} all patterns of the file have together", remedy)
        if done.returncode:
            refuse(place, f"{shown} is no pattern: {' '.join(done.stderr.splitlines()[-1:])[:200]}", remedy)
        found, seconds = json.loads(done.stdout)
        self.left = max(self.left - max(seconds, LEAST), LEAST)  # a timer of 0 is none
        return list(found)
