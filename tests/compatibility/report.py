"""Rows as text: a line for each model, a table for each package, and what was refused, by reason."""

from __future__ import annotations

import datetime
import json
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tests.compatibility.checking import Row

VERDICTS = ("right", "refused", "wrong", "raw", "not certified")


def read(file: Path, kind: type[Row] = Row) -> list[Any]:
    """The rows that a run before this one has kept."""
    return [kind(**json.loads(text)) for text in file.read_text(encoding="utf-8").splitlines()] if file.exists() else []


def append(file: Path, row: Row) -> None:
    with file.open("a", encoding="utf-8") as out:
        out.write(json.dumps(asdict(row)) + "\n")


MARK = "<!-- what follows is written by python -m tests.compatibility --markdown -->"


def write(file: Path, text: str) -> None:
    """Into the file: below the mark, where it has one."""
    head, mark, _ = file.read_text(encoding="utf-8").partition(MARK) if file.exists() else ("", "", "")
    file.write_text(f"{head}{mark}\n\n{text}" if mark else text, encoding="utf-8")


def line(row: Row) -> str:
    said = row.idle or "; ".join((*row.raw, *row.wrong, *row.uncertified, *row.refused))
    return f"{row.package:16} {row.name:36} {row.verdict:13} {row.adapters:4} adapters {row.seconds:5.0f} s  {said}"


def summary(rows: Sequence[Row]) -> str:
    counts = Counter(row.verdict for row in rows)
    ran = sum(not row.idle for row in rows)
    said = ", ".join(f"{counts[verdict]} {verdict}" for verdict in VERDICTS)
    return f"{ran} models, {sum(row.adapters for row in rows):,} adapters: {said}"


def report(rows: Sequence[Row], versions: Mapping[str, str]) -> str:
    """Markdown: the table, then reasons, then which models."""
    packages = dict.fromkeys(row.package for row in rows)
    said = f"{summary(rows)}. torch {versions['torch']}, {datetime.date.today():%d %B %Y}."
    parts = ["## The table", _table(rows, packages, versions), said]
    parts += reasons("What was refused", rows, lambda row: row.refused)
    parts += reasons("What raised an error that is none of ours", rows, lambda row: row.raw)
    parts += reasons("What was wrong", rows, lambda row: row.wrong)
    parts += reasons("What was not certified", rows, lambda row: row.uncertified)
    parts += reasons("What is worth a note", rows, lambda row: row.notes)
    parts += ["## Which models", *(_names(rows, package) for package in packages)]
    return "\n\n".join(parts) + "\n"


def _table(rows: Sequence[Row], packages: Iterable[str], versions: Mapping[str, str]) -> str:
    head = ("package", "version", "models", "adapters", *VERDICTS, "role is the name's", "abstained", "do not run")
    lines = [f"| {' | '.join(head)} |", f"|---|---|{'--:|' * (len(head) - 2)}"]
    for package in packages:
        own = [row for row in rows if row.package == package]
        counts = Counter(row.verdict for row in own)
        numbers = [sum(not row.idle for row in own), sum(row.adapters for row in own)]
        numbers += [counts[verdict] for verdict in VERDICTS]
        numbers += [sum(row.agreeing for row in own), sum(row.abstained for row in own), counts["does not run"]]
        lines.append(f"| {package} | {versions[package]} | {' | '.join(f'{n:,}' for n in numbers)} |")
    return "\n".join(lines)


def reasons(title: str, rows: Sequence[Row], of: Callable[[Row], list[str]]) -> list[str]:
    """One line for each reason, without names and numbers, and the models it was given for."""
    found: dict[str, dict[str, None]] = defaultdict(dict)
    for row in rows:
        for text in of(row):
            found[_plain(text)][row.name] = None
    if not found:
        return []
    ordered = sorted(found.items(), key=lambda pair: -len(pair[1]))
    return [f"## {title}", "\n".join(f"- {reason}: {', '.join(names)}" for reason, names in ordered)]


def _plain(text: str) -> str:
    """A reason without what differs from model to model."""
    text = re.sub(r"\(\d[\d, ]*\)|\[\d[\d, ]*\]", "(…)", text)
    text = re.sub(r"\b[\w]+(\.\w+)+\b", "…", text)
    return re.sub(r"\d+(\.\d+)?(e-?\d+)?", "n", text).replace("|", "/")


def _names(rows: Sequence[Row], package: str) -> str:
    ran = [row.name for row in rows if row.package == package and not row.idle]
    return f"**{package}**: {', '.join(ran)}."
