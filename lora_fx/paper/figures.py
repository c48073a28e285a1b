"""Figures that read like the paper's 3 and 4: φ(i, j) in colour, from 0 to 1."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lora_fx import Memory
from lora_fx.paper.amplification import Amplified
from lora_fx.paper.counts import Count
from lora_fx.paper.latency import ADAPTERS, BASE, Row
from lora_fx.paper.subspaces import Overlap
from lora_fx.paper.sweep import Cell
from lora_fx.paper.tasks import TASKS

PER_FIGURE = 4
"""Weights in one figure."""


def draw_overlaps(found: Sequence[Overlap], folder: Path, first: str, second: str) -> list[Path]:
    """A figure for each few weights: of every weight a row with φ of A, of B, and of random Gaussians.

    Args:
        first, second: what the two adapters are called, on the axes.
    """
    from matplotlib.figure import Figure

    weights = list(dict.fromkeys(o.weight for o in found))
    kinds = list(dict.fromkeys(o.of for o in found))
    by = {(o.weight, o.of): o for o in found}
    paths = []
    for start in range(0, len(weights), PER_FIGURE):
        shown = weights[start : start + PER_FIGURE]
        figure = Figure(figsize=(3.4 * (len(kinds) + 1) + 1, 3.1 * len(shown) + 0.4), dpi=130, layout="constrained")
        grid = figure.subplots(len(shown), len(kinds) + 1, squeeze=False)
        image: Any = None
        for row, weight in zip(grid, shown, strict=True):
            for axis, kind in zip(row, kinds, strict=False):
                image = _draw_phi(axis, by[weight, kind], by[weight, kind].phi, _title(by[weight, kind]))
                axis.set(xlabel=f"j, directions of {second}", ylabel=f"i, of {first}")
            _draw_phi(
                row[-1], by[weight, kinds[0]], by[weight, kinds[0]].random, "random Gaussians, shaped like the first"
            )
            row[-1].set(xlabel="j", ylabel="i")
        figure.colorbar(image, ax=grid, ticks=[0, 0.2, 0.4, 0.6, 0.8, 1], shrink=0.9, label="φ(i, j)")
        paths.append(folder / (f"phi_{start // PER_FIGURE + 1}.png" if len(weights) > PER_FIGURE else "phi.png"))
        figure.savefig(paths[-1])
    return paths


def _title(overlap: Overlap) -> str:
    a, b = overlap.ranks
    names = {"A": f"φ(A r={a}, A r={b})", "B": f"φ(B r={a}, B r={b})"}
    return f"{overlap.weight.removesuffix('.weight')}\n{names.get(overlap.of, f'φ of δ ({overlap.of}), r={a}, r={b}')}"


def _draw_phi(axis: Any, overlap: Overlap, phi: Any, title: str) -> Any:
    n, m = phi.shape
    image = axis.imshow(
        phi.numpy(), vmin=0, vmax=1, cmap="magma", aspect="auto", interpolation="nearest",
        extent=(0.5, m + 0.5, n + 0.5, 0.5),
    )  # fmt: skip
    axis.set_title(title, fontsize=9)
    axis.set(xticks=_ticks(m), yticks=_ticks(n))
    return image


def _ticks(n: int) -> list[int]:
    step = max(1, round(n / 8))
    return sorted({1, *range(step, n + 1, step), n} - ({n - 1} if step > 2 else set()))


def draw_layers(found: Sequence[Overlap], path: Path) -> Path:
    """φ(k, k) over the weights, k the smaller number of directions, beside what random subspaces have."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.6), dpi=130, layout="constrained")
    axis = figure.subplots()
    for kind in dict.fromkeys(o.of for o in found):
        own = [o for o in found if o.of == kind]
        k = [min(o.phi.shape) - 1 for o in own]
        axis.plot([float(o.phi[n, n]) for o, n in zip(own, k, strict=True)], marker="o", label=f"of {kind}")
        expected = [float(o.expected[n, n]) for o, n in zip(own, k, strict=True)]
        axis.plot(expected, linestyle=":", color=axis.lines[-1].get_color(), label=f"of {kind}, random: k / features")
    names = list(dict.fromkeys(o.weight.removesuffix(".weight") for o in found))
    _name(axis, names)
    axis.set(ylim=(0, 1.02), ylabel="φ(k, k)")
    axis.legend(frameon=False, fontsize=8)
    figure.savefig(path)
    return path


def draw_amplifications(found: Sequence[Amplified], path: Path) -> Path:
    """‖UᵀWV‖ over the weights for the directions of δ, of W and random ones; the factor; the energy of δ."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 3.9), dpi=130, layout="constrained")
    norms, factor, energy = figure.subplots(1, 3)
    names = [a.weight.removesuffix(".weight") for a in found]
    for label, values in (
        ("U, V of W", [a.along_w for a in found]),
        ("U, V of δ", [a.along_delta for a in found]),
        ("random U, V", [a.along_random for a in found]),
        ("‖δ‖", [a.norm_delta for a in found]),
    ):
        norms.plot(values, marker="o", label=label, linestyle="--" if label == "‖δ‖" else "-")
    norms.set(yscale="log", title="‖UᵀWV‖ and ‖δ‖, Frobenius")
    norms.legend(frameon=False, fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1.08), ncols=4, handlelength=1)
    factor.bar(range(len(found)), [a.factor for a in found], color="#2f6fb2")
    factor.set(title="amplification: ‖δ‖ / ‖UᵀWV‖ of δ's directions")
    for axis in (norms, factor):
        _name(axis, names)
    for a in found:
        energy.plot(range(1, len(a.energy) + 1), a.energy, marker=".", label=a.weight.removesuffix(".weight"))
    energy.set(title="energy of δ in its first directions", xlabel="directions", ylim=(0, 1.02))
    if len(found) <= 8:
        energy.legend(frameon=False, fontsize=7)
    figure.savefig(path)
    return path


def _name(axis: Any, names: Sequence[str]) -> None:
    """Along x, without the words that all begin and end with, at a slant where there are many."""
    names = _short(names)
    slant: dict[str, Any] = {"rotation": 60, "ha": "right"} if len(names) > 3 else {}
    axis.set_xticks(range(len(names)), names, fontsize=7, **slant)


def _short(names: Sequence[str]) -> list[str]:
    words = [name.split(".") for name in names]
    shared = 0
    while len(names) > 1 and all(len(w) > shared + 1 for w in words) and len({w[shared] for w in words}) == 1:
        shared += 1
    return [".".join(w[shared:]) for w in words]


def draw_counts(found: Sequence[Count], path: Path) -> Path:
    """Every row of the paper's tables: printed against counted, on logarithmic axes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 5), dpi=130, layout="constrained")
    axis = figure.subplots()
    for label, marker, chosen in (("equal", "o", True), ("not equal", "x", False)):
        own = [c for c in found if (c.equal != "no") == chosen]
        axis.scatter([1e6 * float(c.claim.theirs) for c in own], [c.ours for c in own], marker=marker, label=label)
    ends = [min(c.ours for c in found), max(c.ours for c in found)]
    axis.plot(ends, ends, color="#9aa5b1", linewidth=0.8, zorder=0)
    axis.set(xscale="log", yscale="log", xlabel="trainable parameters, as printed", ylabel="… as counted")
    axis.legend(frameon=False)
    figure.savefig(path)
    return path


def draw_memory(memory: Memory, path: Path) -> Path:
    """The parts of a step's memory, stacked, with adapters and without."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.4, 4.4), dpi=130, layout="constrained")
    axis = figure.subplots()
    columns = [memory.full.to_json(), memory.adapted.to_json()]
    below = [0.0, 0.0]
    for part in ("weights", "adapters", "gradients", "optimizer", "activations"):
        heights = [column[part] / 1e9 for column in columns]
        axis.bar(range(2), heights, 0.6, bottom=below, label=part)
        below = [low + height for low, height in zip(below, heights, strict=True)]
    axis.set_xticks(range(2), ["full fine-tuning", "adapted"])
    axis.set(ylabel="GB")
    axis.legend(frameon=False)
    figure.savefig(path)
    return path


def draw_cells(found: Sequence[Cell], folder: Path) -> list[Path]:
    """A figure for each task and table: every row's mean with its spread over the seeds; with columns, a line each."""
    from matplotlib.figure import Figure

    paths = []
    for task, name in dict.fromkeys((cell.task, cell.table) for cell in found):
        own = [cell for cell in found if (cell.task, cell.table) == (task, name)]
        rows, columns = (list(dict.fromkeys(getattr(cell, key) for cell in own)) for key in ("row", "column"))
        by = {(cell.row, cell.column): cell for cell in own}
        height = max(2.4, 0.34 * len(rows) + 1.2) if len(columns) == 1 else 3.6
        figure = Figure(figsize=(6.4, height), dpi=130, layout="constrained")
        axis = figure.subplots()
        for row in rows if len(columns) > 1 else ():
            line = [by[row, column] for column in columns]
            axis.errorbar(columns, [c.mean for c in line], [c.spread for c in line], marker="o", capsize=3, label=row)
        if len(columns) > 1:
            axis.set_ylabel(TASKS[task].unit)
            axis.legend(fontsize=8)
        else:
            line = [by[row, columns[0]] for row in rows]
            names = [f"{c.row} ({c.parameters:,})" for c in line]
            axis.errorbar([c.mean for c in line], names, xerr=[c.spread for c in line], fmt="o", capsize=3)
            axis.invert_yaxis()
            axis.set_xlabel(TASKS[task].unit)
        axis.grid(alpha=0.3)
        axis.set_title(f"{task}: {name}", fontsize=10)
        paths.append(folder / f"{task}-{name}.png")
        figure.savefig(paths[-1])
    return paths


def draw_latency(found: Sequence[Row], path: Path) -> Path:
    """How much slower than the base each system is at each size, with its interval, and the paper's adapters beside."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 4), dpi=130, layout="constrained")
    axis = figure.subplots()
    sizes, systems = (list(dict.fromkeys(getattr(row, key) for row in found)) for key in ("size", "system"))
    systems.remove(BASE)
    for k, system in enumerate(systems):
        own = [row for row in found if row.system == system]
        at = [n + 0.13 * (k - (len(systems) - 1) / 2) for n in range(len(sizes))]
        ends = [
            [100 * (row.ratio.median - row.ratio.low) for row in own],
            [100 * (row.ratio.high - row.ratio.median) for row in own],
        ]
        bars = axis.errorbar(at, [row.slower for row in own], ends, fmt="o", capsize=3, label=system)
        printed = [(x, row.theirs) for x, row in zip(at, own, strict=True) if row.theirs is not None]
        if system in ADAPTERS and printed:
            color = bars.lines[0].get_color()
            axis.scatter(*zip(*printed, strict=True), marker="D", facecolors="none", edgecolors=color)
    axis.scatter([], [], marker="D", facecolors="none", edgecolors="black", label="the paper's")
    axis.axhline(0, color="#9aa5b1", linewidth=0.8, zorder=0)
    axis.set_xticks(range(len(sizes)), [f"{s} ({s.stands_for})" if s.stands_for else str(s) for s in sizes])
    axis.set(xlabel="batch × length", ylabel="slower than the base, %")
    axis.legend(fontsize=8, frameon=False)
    figure.savefig(path)
    return path
