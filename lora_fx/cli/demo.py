"""`lora-fx demo`"""

from __future__ import annotations

from pathlib import Path

import click


@click.command()
@click.option(
    "-o", "--out", type=click.Path(path_type=Path), default=Path("lora_fx_demo"), metavar="FOLDER", show_default=True,
    help="Where the files go.",
)  # fmt: skip
@click.option(
    "--seed", type=click.IntRange(0, 2**32 - 1), default=0, metavar="N", show_default=True,  # what scikit-learn takes
    help="Of the split, the weights and the batches.",
)  # fmt: skip
@click.option("--quick", is_flag=True, help="The same path with few training steps, for CI.")
def demo(out: Path, seed: int, quick: bool) -> None:
    """Train a small vision transformer on handwritten digits, rotate the digits by 90°, adapt the model to them with
    LoRA, fold the adapter, export to ONNX, and measure what each step did. Needs: pip install 'lora-fx[demo]'
    """
    from lora_fx.demo import run_demo

    run_demo(out, seed=seed, quick=quick)
