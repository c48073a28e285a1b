"""The patterns of somebody else's config, matched within a bound.

A pattern of ten characters can take Python's matcher for ever, which nothing in the same process ends. So what repeats
or branches is matched by a Python of its own, with the same `re` that PEFT uses, and that is ended after `SECONDS` of a
processor; or of the clock after `PATIENCE`, for a busy machine is no fault of the pattern.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Sequence

from lora_fx.reading import refuse

SECONDS = 1
PATIENCE = 60
EVERY = r"[^.]*"
"""PEFT's own pattern of any one name."""

_PLAIN = re.compile(r"(?:[^\\*+?{}()\[\]]|\\\.)*")
"""Names with dots, several with ``|``: as many steps as there are characters in them."""

_MATCH = """
import json, re, sys
patterns, names, how, seconds = json.load(sys.stdin)
try:
    import resource
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
except ImportError:  # Windows: the clock alone
    pass
found = []
for pattern in patterns:
    match = getattr(re.compile(pattern), how)
    found.append({name: m[m.lastindex or 0] for name in names if (m := match(name))})
json.dump(found, sys.stdout)
"""


def matching(
    patterns: Sequence[str], names: Sequence[str], place: str, around: tuple[str, str] | None = None
) -> list[dict[str, str]]:
    """For each pattern, the names that it matches whole, each with what its last group has found.

    Args:
        around: patterns before and after it, which are then matched from the start on.

    Raises:
        FileError: one is no pattern, or takes too long.
    """
    before, after = around or ("", "")
    if not patterns:
        return []
    how, whole = ("match" if around else "fullmatch"), [f"{before}{pattern}{after}" for pattern in patterns]
    shown = ", ".join(repr(p[:200]) for p in patterns[:3]) + (", …" if len(patterns) > 3 else "")
    remedy = "write it without repetitions inside of repetitions, or as a list of names"
    if all(pattern == EVERY or _PLAIN.fullmatch(pattern) for pattern in patterns):
        try:
            compiled = [getattr(re.compile(pattern), how) for pattern in whole]
        except (re.error, RecursionError) as error:
            refuse(place, f"{shown} is no pattern: {error}", remedy, error)
        return [{name: m[m.lastindex or 0] for name in names if (m := match(name))} for match in compiled]
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-S", "-c", _MATCH],
            input=json.dumps([whole, list(names), how, SECONDS]),
            capture_output=True,
            text=True,
            timeout=PATIENCE,
        )
    except subprocess.TimeoutExpired as error:
        refuse(place, f"{shown} is not through with {len(names)} names after {PATIENCE} s", remedy, error)
    except OSError as error:
        refuse(place, f"{shown}: the process that matches it does not start: {error}", remedy, error)
    if done.returncode < 0:  # a signal has ended it
        refuse(place, f"{shown} is not through with {len(names)} names after {SECONDS} s of a processor", remedy)
    if done.returncode:
        refuse(place, f"{shown} is no pattern: {' '.join(done.stderr.splitlines()[-1:])[:200]}", remedy)
    return list(json.loads(done.stdout))
