"""What the demo measured, as a table and as one picture."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_fx.demo.experiment import ADAPTER, MODEL, PICTURE, ROTATED, RULE, UPRIGHT, Outcome

if TYPE_CHECKING:
    from rich.console import Console


def print_outcome(outcome: Outcome, folder: Path, seconds: float, console: Console) -> None:
    from rich.table import Table
    from rich.text import Text

    title = f"\n{len(outcome.test.labels)} held-out digits, read by three ONNX files"
    table = Table(title=title, title_justify="left", title_style="bold")
    table.add_column("")
    for name in ("base", "with branches", "folded"):
        table.add_column(name, justify="right")
    for group in rows(outcome):
        for cells in group:
            table.add_row(*cells)
        table.add_section()
    console.print(table)
    for heading, lines in (("", facts(outcome)), (f"\n{folder} ({seconds:.0f} s)", contents(outcome))):
        if heading:
            console.print(Text(heading), soft_wrap=True)
        grid = Table.grid(padding=(0, 2))
        for line in lines:
            grid.add_row(*map(Text, line))
        console.print(grid)


def rows(outcome: Outcome) -> list[list[tuple[str, ...]]]:
    """Groups of rows: a name, then base, with branches, folded."""
    low, middle, high = outcome.quartiles.tolist()
    columns = outcome.columns
    share = f"{outcome.trainable:,} = {percent(outcome.trainable / outcome.parameters)}"
    return [
        [(f"accuracy, {task}", *(percent(column.accuracy[task]) for column in columns)) for task in (UPRIGHT, ROTATED)],
        [
            ("trained parameters", f"{outcome.parameters:,}", share, "–"),
            ("ONNX nodes", *(str(column.nodes) for column in columns)),
        ],
        [
            ("one digit: median µs", *(f"{m:.1f}" for m in middle)),
            ("  quartiles µs", *(f"{a:.1f}–{b:.1f}" for a, b in zip(low, high, strict=True))),
            ("  paired with base", *(f"{ratio:.2f} ×" for ratio in outcome.slowdown)),
        ],
        [("max |torch − runtime|", *(f"{column.largest:.1e}" for column in columns))],
    ]


def facts(outcome: Outcome) -> list[tuple[str, str]]:
    same = outcome.equivalence
    noise = f"{same.error:.1e} apart, rounding explains {same.bound:.1e}"
    return [
        ("adapted, by dataflow", f"{RULE.role}, rank {RULE.rank}, alpha {RULE.alpha}"),
        ("folded graph is the base's, node for node", _yes(outcome.same_graph)),
        ("folded model is the adapted one", f"{_yes(same.equivalent)} ({noise})"),
        ("unfolding gives back every bit", _yes(outcome.restored)),
    ]


def contents(outcome: Outcome) -> list[tuple[str, str]]:
    return [
        (f"  {MODEL}", f"the folded model, {outcome.folded.bytes / 1024:.0f} KiB"),
        (f"  {ADAPTER}/", f"the adapter in PEFT's format, {outcome.adapter_bytes / 1024:.1f} KiB"),
        (f"  {PICTURE}", "the story in one picture"),
    ]


def percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _yes(value: bool) -> str:
    return "yes" if value else "NO"


INK = "#26303a"
BASE, BRANCHES, LORA = "#9aa5b1", "#a9c7e6", "#2f6fb2"
RIGHT, WRONG = "#2e7d4f", "#b3413a"
SHOWN = (2, 3, 4, 7)  # digits that look like none of the ten when they lie on their side
_BAR = {"ecolor": INK, "capsize": 3, "elinewidth": 1}


def draw_figure(outcome: Outcome, path: Path) -> None:
    """Examples on the left, accuracies in the middle, the price on the right."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    style: Any = {"font.family": "DejaVu Sans", "font.size": 10, "axes.spines.top": False, "axes.spines.right": False}
    style |= dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color", "axes.edgecolor"), INK)
    with rc_context(style):
        figure = Figure(figsize=(13, 4.8), dpi=150)
        figure.text(0.018, 0.935, _headline(outcome), fontsize=14, fontweight="bold")
        examples, bars, price = figure.subfigures(1, 3, squeeze=False, width_ratios=(4.9, 3.6, 3.1))[0]
        _draw_examples(examples, outcome)
        _draw_accuracy(bars, outcome)
        _draw_latency(price, outcome)
        figure.savefig(path)


def _headline(outcome: Outcome) -> str:
    before, after = outcome.base.accuracy[ROTATED], outcome.folded.accuracy[ROTATED]
    share = percent(outcome.trainable / outcome.parameters)
    graph = f"the base's {outcome.base.nodes}" if outcome.same_graph else str(outcome.folded.nodes)
    return (
        f"Rotated digits: {100 * before:.0f} % → {100 * after:.0f} % right, by training {share} of the parameters; "
        f"folded, it runs {graph} nodes"
    )


def _title(figure: Any, text: str, below: str = "") -> None:
    figure.text(0.045, 0.855, text, fontsize=12)
    figure.text(0.045, 0.805, below, fontsize=9.5)


def _draw_examples(figure: Any, outcome: Outcome) -> None:
    _title(figure, "What they read (the first held-out 2, 3, 4 and 7)")
    axes = figure.subplots(2, len(SHOWN))
    figure.subplots_adjust(left=0.1, right=0.98, top=0.83, bottom=0.12, hspace=0.36, wspace=0.12)
    for row, (task, data) in zip(axes, outcome.test.tasks().items(), strict=True):
        row[0].text(-0.17, 0.5, task, transform=row[0].transAxes, rotation=90, ha="center", va="center", fontsize=11)
        for axis, digit in zip(row, SHOWN, strict=True):
            which = int((data.labels == digit).nonzero()[0])
            axis.imshow(data.images[which, 0], cmap="gray_r", vmin=0, vmax=1)
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set(visible=True, color=BASE)
            for height, name, column in ((-0.11, "base", outcome.base), (-0.25, "LoRA", outcome.folded)):
                _write_verdict(axis, height, name, int(column.predictions[task][which]), digit)


def _write_verdict(axis: Any, height: float, name: str, read: int, digit: int) -> None:
    mark, colour = ("✓", RIGHT) if read == digit else ("✗", WRONG)
    shared = dict(transform=axis.transAxes, va="center", fontsize=10.5)
    axis.text(0.03, height, name, **shared)
    axis.text(0.98, height, f"{read} {mark}", ha="right", color=colour, fontweight="bold", **shared)


def _draw_accuracy(figure: Any, outcome: Outcome) -> None:
    n = len(outcome.test.labels)
    _title(figure, f"How often they are right ({n} held-out digits)")
    axis = figure.subplots()
    figure.subplots_adjust(left=0.17, right=0.97, top=0.765, bottom=0.1)
    bars = ((-0.2, outcome.base, BASE, "base"), (0.2, outcome.folded, LORA, "LoRA, folded"))
    for shift, column, colour, name in bars:
        for place, task in enumerate((UPRIGHT, ROTATED)):
            share = column.accuracy[task]
            low, high = wilson_interval(share, n)
            spread = [[100 * (share - low)], [100 * (high - share)]]
            label = None if place else name
            axis.bar(place + shift, 100 * share, 0.38, color=colour, label=label, yerr=spread, error_kw=_BAR)
            text = f"{100 * share:.0f} %"
            axis.text(place + shift, 100 * high + 1.5, text, ha="center", fontsize=12, fontweight="bold")
    axis.axhline(10, color=INK, linewidth=0.9, linestyle=":")
    axis.text(1.46, 11.5, "chance", fontsize=9.5)
    axis.set_xticks([0, 1], [f"digits {UPRIGHT}", f"digits {ROTATED}"], fontsize=11)
    axis.tick_params(axis="x", length=0)
    axis.set(yticks=range(0, 101, 25), xlim=(-0.5, 1.75), ylim=(0, 106), ylabel="accuracy (%), with its 95 % interval")
    axis.legend(frameon=False, loc="lower left", bbox_to_anchor=(-0.175, 1.03), ncols=2, handlelength=1, borderpad=0)


def _draw_latency(figure: Any, outcome: Outcome) -> None:
    _title(figure, "One digit in ONNX Runtime", "median and quartiles; ×: paired with the base")
    axis = figure.subplots()
    figure.subplots_adjust(left=0.17, right=0.95, top=0.765, bottom=0.14)
    low, middle, high = outcome.quartiles.numpy()
    axis.bar(range(3), middle, 0.66, color=(BASE, BRANCHES, LORA), yerr=(middle - low, high - middle), error_kw=_BAR)
    for place, ratio in enumerate(outcome.slowdown):
        axis.text(place, high[place] + 0.02 * max(high), f"{ratio:.2f} ×", ha="center", fontsize=12, fontweight="bold")
    names = ("base", "branches", "folded")
    labels = [f"{name}\n{column.nodes} nodes" for name, column in zip(names, outcome.columns, strict=True)]
    axis.set_xticks(range(3), labels, fontsize=10.5)
    axis.tick_params(axis="x", length=0)
    axis.set(ylim=(0, 1.12 * max(high)), ylabel="µs on one thread")


def wilson_interval(share: float, n: int, z: float = 1.96) -> tuple[float, float]:
    """The 95 % interval of a share that was counted on n cases (Wilson 1927)."""
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return max(0.0, middle - half), min(1.0, middle + half)
