"""What the demo measured, as a table and as one picture."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lora_fx.demo import ADAPTER, MODEL, PICTURE, ROTATED, RULE, UPRIGHT, Outcome

if TYPE_CHECKING:
    from rich.console import Console

# ── the table ────────────────────────────────────────────────────────────────────────────────────────────────────────


def print_outcome(outcome: Outcome, folder: Path, seconds: float, console: Console) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table(title=f"\n{len(outcome.test.labels)} held-out digits, every number from an ONNX file", title_justify="left")
    for name, justify in (("", "left"), ("base", "right"), ("with branches", "right"), ("folded", "right")):
        table.add_column(name, justify=justify)
    for group in rows(outcome):
        for cells in group:
            table.add_row(*cells)
        table.add_section()
    console.print(table)
    for name, value in facts(outcome):
        console.print(Text(f"{name}: {value}"), soft_wrap=True)
    console.print(Text(f"\n{folder.resolve()}  ({seconds:.0f} s)"), soft_wrap=True)
    for name, what in contents(outcome, folder):
        console.print(Text(f"  {name:<12}{what}"), soft_wrap=True)


def rows(outcome: Outcome) -> list[list[tuple[str, ...]]]:
    """Groups of rows: a name, then base, with branches, folded."""
    low, middle, high = outcome.quartiles.tolist()
    columns = outcome.columns
    share = f"{outcome.trainable:,} = {outcome.trainable / outcome.parameters:.1%}"
    return [
        [(f"accuracy, {task}", *(f"{column.accuracy[task]:.1%}" for column in columns)) for task in (UPRIGHT, ROTATED)],
        [
            ("trained parameters", f"{outcome.parameters:,}", share, "–"),
            ("ONNX nodes", *(str(column.nodes) for column in columns)),
        ],
        [
            ("one digit: median µs", *(f"{m:.1f}" for m in middle)),
            ("  quartiles µs", *(f"{a:.1f}–{b:.1f}" for a, b in zip(low, high, strict=True))),
            ("  paired with base", *(f"{ratio:.2f} ×" for ratio in outcome.slowdown)),
        ],
        [("torch ↔ ONNX Runtime", *(f"{column.largest:.1e}" for column in columns))],
    ]


def facts(outcome: Outcome) -> list[tuple[str, str]]:
    return [
        ("Adapted", f"{RULE.label}, found by dataflow"),
        ("Folded graph = base graph, node for node", _yes(outcome.same_graph)),
        ("Folded model = adapted model", str(outcome.equivalence)),
        ("Unfold gives back every bit", _yes(outcome.restored)),
    ]


def contents(outcome: Outcome, folder: Path) -> list[tuple[str, str]]:
    return [
        (MODEL, f"the folded model, {outcome.folded.bytes / 1024:.0f} KiB"),
        (f"{ADAPTER}/", f"the adapter in PEFT's format, {outcome.adapter_bytes / 1024:.1f} KiB"),
        (PICTURE, "the story in one picture"),
    ]


def _yes(value: bool) -> str:
    return "yes" if value else "NO"


# ── the picture ──────────────────────────────────────────────────────────────────────────────────────────────────────

BASE, LORA, RIGHT, WRONG, INK = "#9aa5b1", "#2f6fb2", "#2e7d4f", "#b3413a", "#26303a"  # colours that differ in grey too
SHOWN = (2, 3, 4, 7)  # digits that look like none of the ten when they lie on their side


def draw_figure(outcome: Outcome, path: Path) -> None:
    """Examples on the left, accuracies in the middle, the price on the right."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    style = {"font.family": "DejaVu Sans", "font.size": 10, "text.color": INK, "axes.labelcolor": INK, "xtick.color": INK,
             "ytick.color": INK, "axes.edgecolor": INK, "axes.spines.top": False, "axes.spines.right": False}  # fmt: skip
    with rc_context(style):
        figure = Figure(figsize=(13, 4.9), dpi=150)
        examples, bars, price = figure.subfigures(1, 3, width_ratios=(4.6, 3.6, 3.2))
        _draw_examples(examples, outcome)
        _draw_accuracy(bars, outcome)
        _draw_latency(price, outcome)
        figure.savefig(path)


def _title(figure: Any, text: str) -> None:
    figure.text(0.03, 0.94, text, fontsize=12, fontweight="bold")


def _draw_examples(figure: Any, outcome: Outcome) -> None:
    _title(figure, "What the models read")
    axes = figure.subplots(2, len(SHOWN))
    figure.subplots_adjust(left=0.16, right=0.97, top=0.86, bottom=0.13, hspace=0.42, wspace=0.15)
    for row, (task, data) in zip(axes, outcome.test.tasks().items(), strict=True):
        row[0].text(-0.25, 0.5, task, transform=row[0].transAxes, rotation=90, ha="center", va="center", fontsize=11)
        for axis, digit in zip(row, SHOWN, strict=True):
            which = int((data.labels == digit).nonzero()[0])  # the first of its kind, not a chosen one
            axis.imshow(data.images[which, 0], cmap="gray_r", vmin=0, vmax=1)
            axis.set_xticks([])
            axis.set_yticks([])
            for spine in axis.spines.values():
                spine.set_visible(True)
                spine.set_color(BASE)
            for height, name, column in ((-0.13, "base", outcome.base), (-0.28, "LoRA", outcome.folded)):
                _write_verdict(axis, height, name, int(column.predictions[task][which]), digit)


def _write_verdict(axis: Any, height: float, name: str, read: int, digit: int) -> None:
    mark, colour = ("✓", RIGHT) if read == digit else ("✗", WRONG)
    axis.text(0.04, height, name, transform=axis.transAxes, fontsize=9.5, va="center")
    axis.text(0.98, height, f"{read} {mark}", transform=axis.transAxes, fontsize=10.5, va="center", ha="right",
              color=colour, fontweight="bold")  # fmt: skip


def _draw_accuracy(figure: Any, outcome: Outcome) -> None:
    _title(figure, "How often they are right")
    axis = figure.subplots()
    figure.subplots_adjust(left=0.15, right=0.97, top=0.82, bottom=0.13)
    n = len(outcome.test.labels)
    names = ("base", f"LoRA, {outcome.trainable / outcome.parameters:.1%} of the parameters")
    for shift, column, colour, name in zip((-0.2, 0.2), (outcome.base, outcome.folded), (BASE, LORA), names, strict=True):
        for place, task in enumerate((UPRIGHT, ROTATED)):
            share = column.accuracy[task]
            low, high = wilson_interval(share, n)
            spread = [[100 * (share - low)], [100 * (high - share)]]
            axis.bar(place + shift, 100 * share, 0.38, color=colour, label=None if place else name, yerr=spread,
                     error_kw={"ecolor": INK, "capsize": 3, "elinewidth": 1})  # fmt: skip
            axis.text(place + shift, 100 * high + 1.5, f"{100 * share:.0f} %", ha="center", fontsize=11, fontweight="bold")
    axis.axhline(10, color=INK, linewidth=0.8, linestyle=":")
    axis.text(0.5, 11, "chance", fontsize=8.5, ha="center")
    axis.set_xticks([0, 1], [f"digits {UPRIGHT}", f"digits {ROTATED}"], fontsize=11)
    axis.tick_params(axis="x", length=0)
    axis.set_yticks(range(0, 101, 25))
    axis.set_ylim(0, 108)
    axis.set_ylabel(f"accuracy (%) on {n} held-out digits, 95 % interval")
    axis.legend(frameon=False, loc="lower left", bbox_to_anchor=(-0.02, 1.0), ncols=2, fontsize=9.5, handlelength=1,
                columnspacing=1.2, borderpad=0)  # fmt: skip


def _draw_latency(figure: Any, outcome: Outcome) -> None:
    _title(figure, "What it costs to run")
    axis = figure.subplots()
    figure.subplots_adjust(left=0.19, right=0.95, top=0.82, bottom=0.13)
    low, middle, high = outcome.quartiles.tolist()
    names = ("base", "branches", "folded")
    for place, colour in enumerate((BASE, "#a9c7e6", LORA)):
        spread = [[middle[place] - low[place]], [high[place] - middle[place]]]
        axis.bar(place, middle[place], 0.62, color=colour, yerr=spread,
                 error_kw={"ecolor": INK, "capsize": 4, "elinewidth": 1})  # fmt: skip
        text = f"{outcome.columns[place].nodes} nodes\n{outcome.slowdown[place]:.2f} ×"
        axis.text(place, high[place] + 0.02 * max(high), text, ha="center", va="bottom", fontsize=10.5)
    axis.set_xticks(range(3), names, fontsize=11)
    axis.tick_params(axis="x", length=0)
    axis.set_ylim(0, 1.22 * max(high))
    axis.set_ylabel("µs for one digit, ONNX Runtime, one thread")
    figure.text(0.19, 0.855, f"median and quartiles of {len(outcome.times):,} interleaved runs", fontsize=9.5)


def wilson_interval(share: float, n: int, z: float = 1.96) -> tuple[float, float]:
    """The 95 % interval of a share that was counted on n cases (Wilson 1927)."""
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return max(0.0, middle - half), min(1.0, middle + half)
