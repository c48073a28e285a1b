"""`lora-fx paper …`: each writes its tables as text and JSON, and its figures, into the folder that `-o` names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from lora_fx.cli.lazy import Lazy, Row

ROWS = {
    "subspaces": Row("lora_fx.cli.paper:subspaces", "φ(A₁, A₂, i, j) of two adapters: figures 3 and 4."),
    "counts": Row("lora_fx.cli.paper:counts", "Its tables of trainable parameters, counted on its architectures."),
    "memory": Row("lora_fx.cli.paper:memory", "GPT-3's training memory, with adapters and without, on its shape."),
    "sweep": Row("lora_fx.cli.paper:sweep", "Which weights, which rank, which method: trained on two tasks."),
    "latency": Row("lora_fx.cli.paper:latency", "What folded LoRA and adapter layers cost at inference: table 1."),
    "switching": Row("lora_fx.cli.paper:switching", "Another task: folded in place, against reloading the model."),
    "amplification": Row("lora_fx.cli.paper:amplification", "Which directions of W are amplified: table 7."),
}


@click.command(cls=Lazy, rows=ROWS)
def paper() -> None:
    """The claims of the LoRA paper (Hu et al. 2022), on your own model. Each command prints its table, and writes it as
    text and JSON, with its figures, into a folder."""


_out = click.option(
    "-o", "--out", type=click.Path(path_type=Path), required=True, metavar="FOLDER", help="For the files."
)
_seed = click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Of the random directions.")
_adapter = click.Path(path_type=Path)


@click.command()
@click.argument("first", type=_adapter)
@click.argument("second", type=_adapter)
@_out
@_seed
@click.option(
    "--of", type=click.Choice(["A", "B", "in", "out"]), multiple=True, default=("A", "B"), show_default=True,
    help="Whose directions: of a factor, or of δ on its input or output side.",
)  # fmt: skip
def subspaces(first: Path, second: Path, out: Path, seed: int, of: tuple[str, ...]) -> None:
    """How much of the directions of one adapter is in another's, for all i and j, beside random Gaussians.

    FIRST and SECOND are folders of adapters (PEFT's or lora_fx's) or safetensors files: of two ranks as in figure 3, of
    two seeds as in figure 4.
    """
    from lora_fx.paper.factors import read_adapter
    from lora_fx.paper.figures import draw_layers, draw_overlaps
    from lora_fx.paper.outcome import needs_figures, written
    from lora_fx.paper.subspaces import overlaps, table_of_overlaps

    needs_figures()
    found = overlaps(read_adapter(first), read_adapter(second), of, seed)
    said = {"first": first.name, "second": second.name, "seed": seed}
    with written(out, "subspaces", table_of_overlaps(found), {**said, "rows": [o.to_json() for o in found]}) as folder:
        draw_overlaps(found, folder, first.name, second.name)
        draw_layers(found, folder / "phi_over_layers.png")


@click.command()
@click.argument("adapter", type=_adapter)
@click.option("--base", type=_adapter, required=True, help="The base model's safetensors file, or a folder of them.")
@_out
@_seed
@click.option("--rank", type=click.IntRange(1), help="How many directions; all of δ's without it.")
def amplification(adapter: Path, base: Path, out: Path, seed: int, rank: int | None) -> None:
    """‖UᵀWV‖ for the directions of δ, of W and random ones, and the amplification factor, over all layers.

    ADAPTER is the folder of an adapter (PEFT's or lora_fx's).
    """
    from lora_fx.paper.amplification import amplifications, table_of_amplifications
    from lora_fx.paper.base import with_base
    from lora_fx.paper.factors import read_adapter
    from lora_fx.paper.figures import draw_amplifications
    from lora_fx.paper.outcome import needs_figures, written

    needs_figures()
    found = amplifications(with_base(read_adapter(adapter), base), rank, seed)
    said: dict[str, Any] = {"adapter": adapter.name, "rank": rank, "seed": seed, "rows": [a.to_json() for a in found]}
    with written(out, "amplification", table_of_amplifications(found), said) as folder:
        draw_amplifications(found, folder / "amplification.png")


@click.command()
@_out
def counts(out: Path) -> None:
    """Every row of the paper's tables whose ranks are given: theirs, ours, equal or not, and why not. On shapes alone:
    nothing is allocated."""
    from lora_fx.paper.counts import checkpoint, count, rows_to_json, table_of_counts
    from lora_fx.paper.figures import draw_counts
    from lora_fx.paper.outcome import needs_figures, written

    needs_figures()
    found, stored = count(), checkpoint()
    with written(out, "counts", table_of_counts(found, stored), rows_to_json(found, stored)) as folder:
        draw_counts(found, folder / "counts.png")


@click.command()
@_out
@click.option("--layers", type=click.IntRange(1), default=96, show_default=True, help="Fewer, for a quick look.")
def memory(out: Path, layers: int) -> None:
    """What a training step of GPT-3 holds, by part, against the paper's 1.2 TB → 350 GB. On its shape alone: nothing is
    allocated. For a model of yours: lora_fx.memory(model, rules)."""
    from lora_fx.paper.figures import draw_memory
    from lora_fx.paper.outcome import needs_figures, written
    from lora_fx.paper.training_memory import gpt3_memory, shown

    needs_figures()
    found = gpt3_memory(layers)
    with written(out, "memory", shown(found), {"layers": layers, **found.to_json()}) as folder:
        draw_memory(found, folder / "memory.png")


@click.command()
@_out
@click.option(
    "--table", "tables", type=click.Choice(["weights", "ranks", "methods", "data", "choice"]), multiple=True,
    help="All of them without it.",
)  # fmt: skip
@click.option("--task", "tasks", type=click.Choice(["text", "digits"]), multiple=True, help="Both without it.")
@click.option("--seeds", type=click.IntRange(1), default=3, show_default=True, help="How often each row is trained.")
@click.option("--jobs", type=click.IntRange(1), help="Trainings at a time, of a thread each: all cores without it.")
@click.option("--quick", is_flag=True, help="A tenth of the steps, one seed: to see that all of it runs.")
def sweep(
    out: Path, tables: tuple[str, ...], tasks: tuple[str, ...], seeds: int, jobs: int | None, quick: bool
) -> None:
    """Train a small base model, then adapt it in every way of the tables, and compare what is held out.

    `text`: a character GPT of Python's prose learns its code and tables. `digits`: a vision transformer of upright
    digits learns digits that lie on their side. Runs that are over are noted in the folder: the same command goes on
    where an interrupted one was.
    """
    from lora_fx.paper.figures import draw_cells
    from lora_fx.paper.outcome import needs_figures, progress, written
    from lora_fx.paper.sweep import TABLES, planned, shown
    from lora_fx.paper.sweep import sweep as swept
    from lora_fx.paper.tasks import TASKS

    needs_figures()
    runs = [run for task in tasks or TASKS for run in planned(TASKS[task], tables or TABLES, seeds, quick)]
    with progress("training", len({run.key for run in runs})) as step:
        found = swept(runs, out, jobs, step)
    said = {"seeds": 1 if quick else seeds, "quick": quick, "rows": [cell.to_json() for cell in found]}
    with written(out, "sweep", shown(found), said) as folder:
        draw_cells(found, folder)


def _sizes(context: click.Context, option: click.Parameter, texts: tuple[str, ...]) -> tuple[tuple[int, int], ...]:
    found = []
    for text in texts:
        batch, sign, length = text.partition("x")
        if not (sign and batch.isdecimal() and length.isdecimal() and int(batch) and 0 < int(length) <= 1024):
            raise click.BadParameter(f"{text!r} is no BATCHxLENGTH with a length of at most 1024: 16x256")
        found.append((int(batch), int(length)))
    return tuple(found)


@click.command()
@_out
@click.option("--layers", type=click.IntRange(1, 24), default=2, show_default=True, help="24 for all of GPT-2 medium.")
@click.option("--width", type=click.IntRange(64, 1024), default=1024, show_default=True, help="A multiple of 64.")
@click.option(
    "--size", "sizes", multiple=True, callback=_sizes, metavar="BxL",
    help="Batch x length, once for each; the paper's three without it.",
)  # fmt: skip
@click.option("--scale", type=click.IntRange(1), default=1, show_default=True, help="Divide the batches by this.")
@click.option("--shorter", type=click.IntRange(1), default=1, show_default=True, help="Divide the lengths by this.")
@click.option("--openings", type=click.IntRange(1), default=9, show_default=True, help="How often sessions are opened.")
@click.option(
    "--seconds", type=click.FloatRange(0), default=20, show_default=True, help="Of each size in each opening, at least."
)
@click.option("--threads", type=click.IntRange(0), default=0, help="Of the CPU: all cores without it.")
@click.option("--cuda", is_flag=True, help="On a GPU, by ONNX Runtime's CUDAExecutionProvider.")
@click.option("--processor-time", is_flag=True, help="Count the processor's seconds on one thread: for a busy machine.")
@click.option("--quick", is_flag=True, help="A small shape and small sizes: to see that all of it runs.")
def latency(
    out: Path, layers: int, width: int, sizes: tuple[tuple[int, int], ...], scale: int, shorter: int,
    openings: int, seconds: float, threads: int, cuda: bool, processor_time: bool, quick: bool,
) -> None:  # fmt: skip
    """GPT-2 medium in ONNX Runtime at the paper's sizes: the base, the base again, LoRA folded and unfolded, Adapter H
    and L, in paired rounds.

    It takes 2 of 24 layers, which are all alike, so that two cores do it in half an hour. What is over is noted in the
    folder: the same command goes on where an interrupted one was.

    Of whole lengths a CPU computes products all the time, where the paper's GPU waits for launches. For its regime on a
    CPU: --width 128 --shorter 64 --processor-time --openings 91 --seconds 0.2.
    """
    from lora_fx.paper import latency as module
    from lora_fx.paper.figures import draw_latency
    from lora_fx.paper.outcome import needs_figures, progress, written

    needs_figures()
    shape = module.QUICK_SHAPE if quick else module.Shape(layers, width)
    given = tuple(module.Size(*size) for size in sizes) or (module.QUICK if quick else module.SIZES)
    given = tuple(module.scaled(size, scale, shorter) for size in given)
    plan = module.Plan(shape, given, openings, 0.5 if quick else seconds, cuda, threads, processor_time)
    with progress("exports and timings", plan.steps) as step:
        found = module.measure(plan, out, step)
    with written(out, "latency", module.shown(plan, found), module.to_json(plan, found)) as folder:
        draw_latency(found, folder / "latency.png")


@click.command()
@_out
@click.option("--layers", type=click.IntRange(1, 24), default=24, show_default=True, help="Of GPT-2 medium.")
@click.option("--rounds", type=click.IntRange(1), default=15, show_default=True, help="Switches of each kind.")
@click.option("--quick", is_flag=True, help="A small shape: to see that all of it runs.")
def switching(out: Path, layers: int, rounds: int, quick: bool) -> None:
    """Two tasks of GPT-2 medium, LoRA of r = 4 on q and v: from one to the other by `lora_fx.switch`, which folds it in
    the other's place, and by reading its whole checkpoint from disk; time and bytes."""
    from lora_fx.paper import switching as module
    from lora_fx.paper.latency import QUICK_SHAPE, Shape
    from lora_fx.paper.outcome import progress, written

    with progress("switches", rounds) as step:
        found = module.measure(QUICK_SHAPE if quick else Shape(layers), rounds, out, step)
    with written(out, "switching", module.shown(found), found.to_json()):
        pass
