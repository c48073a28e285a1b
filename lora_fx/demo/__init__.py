"""`lora-fx demo`: the experiment, then the table and the picture of it."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

from lora_fx.demo import experiment
from lora_fx.demo.experiment import FULL, PICTURE, QUICK, Outcome, stage
from lora_fx.demo.report import draw_figure, print_outcome

if TYPE_CHECKING:
    from rich.console import Console


def run_demo(folder: Path, *, seed: int = 0, quick: bool = False, console: Console | None = None) -> Outcome:
    """Do it all, print the table, and leave an ONNX file, the adapter and a figure in `folder`.

    Raises:
        LoraFxError: a package is missing, or the folder cannot be written; nothing has been trained then.
    """
    started = time.perf_counter()
    experiment.require_packages()
    from rich.console import Console

    experiment.prepare(folder)
    console = console or Console()
    with experiment.one_thread(seed), experiment.progress_bars(console) as progress:
        outcome = experiment.measure(folder, QUICK if quick else FULL, seed, progress)
        with stage(progress, "drawing the figure"):
            draw_figure(outcome, folder / PICTURE)
    print_outcome(outcome, folder, time.perf_counter() - started, console)
    return outcome
