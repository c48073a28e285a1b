"""The rows of ONNX files as text: a line for each family, then what was refused, and which models."""

from __future__ import annotations

import datetime
from collections import Counter
from collections.abc import Mapping, Sequence

from tests.compatibility.onnx_files import FAMILIES, FORMS, LEVELS, OPSETS, FilesRow, family
from tests.compatibility.report import reasons

FILES = [f"{form} {opset}" for form in FORMS for opset in OPSETS]


def report(rows: Sequence[FilesRow], versions: Mapping[str, str]) -> str:
    """Markdown."""
    ran = [row for row in rows if not row.idle]
    said = ", ".join(f"{name} {version}" for name, version in sorted(versions.items()) if name != "zoo")
    files = sum(len(row.files) for row in ran)
    parts = ["## The table", _table(ran)]
    parts.append(f"{len(ran)} architectures, {files} files, {sum(r.adapters for r in ran):,} adapters. {said}; "
                 f"{datetime.date.today():%d %B %Y}.")  # fmt: skip
    parts += reasons("What torch's exporter, or ONNX Runtime with its file, does not do with the base", ran,
                     lambda row: _theirs(row))  # fmt: skip
    parts += reasons("What was refused", ran, lambda row: row.refused)
    parts += reasons("What raised an error that is none of ours", ran, lambda row: row.raw)
    parts += reasons("What was wrong", ran, lambda row: row.wrong)
    parts += ["## Which models", *(_names(ran, key) for key in FAMILIES)]
    return "\n\n".join(parts) + "\n"


def _theirs(row: FilesRow) -> list[str]:
    """Without the form: each reason once for a model."""
    return list(dict.fromkeys(text.split(", ", 2)[2] for text in row.theirs))


def _table(rows: Sequence[FilesRow]) -> str:
    head = ["family", "architectures", *FILES, *LEVELS, "torch refuses", "refused", "wrong", "raw"]
    lines = [f"| {' | '.join(head)} |", f"|---|{'--:|' * (len(head) - 1)}"]
    total: Counter[str] = Counter()
    for key in FAMILIES:
        own = [row for row in rows if family(row.package, row.name) == key]
        counts = Counter({"architectures": len(own)})
        for row in own:
            counts.update([*row.files])
            counts.update(row.files.values())
            counts["torch refuses"] += not row.files and not row.refused and not row.faults
            counts.update({"refused": len(row.refused), "wrong": len(row.wrong), "raw": len(row.raw)})
        total.update(counts)
        lines.append(f"| {key} | {' | '.join(str(counts[name]) for name in head[1:])} |")
    lines.append(f"| **all** | {' | '.join(str(total[name]) for name in head[1:])} |")
    return "\n".join(lines)


def _names(rows: Sequence[FilesRow], key: str) -> str:
    return f"**{key}**: {', '.join(row.name for row in rows if family(row.package, row.name) == key)}."
