"""Tables for people."""

from __future__ import annotations

from collections.abc import Sequence


def table(header: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> str:
    """Columns as wide as their widest cell; those in `right` are aligned to the right."""
    everything = [tuple(header), *(tuple(row) for row in rows)]
    widths = [max(len(row[k]) for row in everything) for k in range(len(header))]
    kept = [k for k in range(len(header)) if any(row[k] for row in everything[1:])]

    def line(row: Sequence[str]) -> str:
        return "  ".join(row[k].rjust(widths[k]) if k in right else row[k].ljust(widths[k]) for k in kept).rstrip()

    return "\n".join([line(everything[0]), "  ".join("─" * widths[k] for k in kept), *map(line, everything[1:])])
