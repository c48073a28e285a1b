"""`lora-fx fold`, `unfold`, `verify`, `extract`: checkpoints on disk, without the model."""

from __future__ import annotations

from pathlib import Path

import click

from lora_fx.cli.lazy import FAILED
from lora_fx.cli.shown import as_json, progress, show
from lora_fx.errors import LoraFxError

_PLACE = click.Path(path_type=Path)
_leave_out = click.option(
    "--leave-out",
    multiple=True,
    metavar="PATTERN",
    help="Files of the checkpoint that are no part of it: 'original/*'.",
)
_out = click.option("-o", "--out", type=_PLACE, required=True, metavar="FOLDER", help="Written when it is whole.")


@click.command()
@click.argument("base", type=_PLACE)
@click.argument("adapters", nargs=-1, required=True, metavar="ADAPTER[=STRENGTH]...")
@_out
@click.option("--keep", is_flag=True, help="Also write the way back, for `lora-fx unfold`.")
@click.option("--part", help="Of a file for a whole pipeline, the model that BASE is: unet, text_encoder, ….")
@click.option("--alpha", type=float, help="Of files that do not say their alpha.")
@_leave_out
@as_json
def fold(
    base: Path,
    adapters: tuple[str, ...],
    out: Path,
    keep: bool,
    part: str | None,
    alpha: float | None,
    leave_out: tuple[str, ...],
    as_json: bool,
) -> None:
    """Fold adapters into a checkpoint on disk: W ← round(W + Σ strength·δ), tensor by tensor, without the model.

    BASE is a folder of safetensors shards, or one file; each ADAPTER a folder of PEFT's or lora_fx's, or one file in
    any dialect that load_adapter reads: kohya's, diffusers', loralib's. Shards, index, dtypes and all other files stay
    as they are, and lora_fx_fold.json has the hashes. What was interrupted goes on where it was when the same command
    is given again.

    \b
    Example:
      lora-fx fold Llama-3.2-1B task-adapter style-adapter=0.5 -o Llama-3.2-1B-task
    """
    from lora_fx import fold_checkpoint

    config, each = None if alpha is None else {"lora_alpha": alpha}, _strengths(adapters)
    with progress("fold") as tell:
        done = fold_checkpoint(base, each, out, keep=keep, part=part, config=config, leave_out=leave_out, progress=tell)
    said = {"folder": str(out), "bytes": done.bytes, "kept_bytes": done.kept_bytes, "tensors": list(done.tensors)}
    show(done, said, as_json)


def _strengths(texts: tuple[str, ...]) -> dict[str, float]:
    each: dict[str, float] = {}
    for path, strength in map(_strength, texts):
        if path in each:
            remedy = f"give it once, with the sum of its strengths: {path}={each[path] + strength:g}"
            raise LoraFxError(f"{path} is given twice", place="ADAPTER", remedy=remedy)
        each[path] = strength
    return each


def _strength(text: str) -> tuple[str, float]:
    """``folder=0.5``: a folder may have a = in its name."""
    path, _, strength = text.rpartition("=")
    if not path or Path(text).exists():
        return text, 1.0
    try:
        return path, float(strength)
    except ValueError:
        return text, 1.0


@click.command()
@click.argument("folded", type=_PLACE)
@_out
@as_json
def unfold(folded: Path, out: Path, as_json: bool) -> None:
    """Write the base of a checkpoint that was folded with --keep, to the bit: its hashes are compared.

    \b
    Example:
      lora-fx unfold Llama-3.2-1B-task -o Llama-3.2-1B
    """
    from lora_fx import unfold_checkpoint

    with progress("unfold") as tell:
        done = unfold_checkpoint(folded, out, progress=tell)
    show(f"{out}: {done.bytes:,} bytes, the base's to the bit", {"folder": str(out), "bytes": done.bytes}, as_json)


@click.command()
@click.argument("folder", type=_PLACE)
@click.option("--base", type=_PLACE, metavar="FOLDER", help="Also hold this against what was folded into.")
@click.option("--adapter", "adapters", type=_PLACE, multiple=True, metavar="FOLDER", help="Also these, in their order.")
@as_json
@click.pass_context
def verify(context: click.Context, folder: Path, base: Path | None, adapters: tuple[Path, ...], as_json: bool) -> None:
    """Hold a folded checkpoint against its manifest: is every file what the fold has written?

    Exit code 3 where one is not.

    \b
    Example:
      lora-fx verify Llama-3.2-1B-task --base Llama-3.2-1B --adapter task-adapter
    """
    from lora_fx import verify_checkpoint
    from lora_fx.errors import FileError
    from lora_fx.export.checkpoints.manifest import read_manifest

    read_manifest(folder)
    try:
        with progress("verify") as tell:
            found = verify_checkpoint(folder, base=base, adapters=adapters, progress=tell)
    except FileError as error:
        show(
            f"NOT as it was written: {error}",
            {"verified": False, "place": error.place, "reason": error.reason},
            as_json,
        )
        context.exit(FAILED)
    said = {"verified": True, "files": found.files, "bytes": found.bytes, "tensors": list(found.manifest.tensors)}
    show(found, said, as_json)


@click.command()
@click.argument("base", type=_PLACE)
@click.argument("tuned", type=_PLACE)
@click.option("-r", "--rank", type=click.IntRange(1), required=True, help="Of the adapter.")
@_out
@click.option("--ignore", multiple=True, metavar="PATTERN", help="Tensors that may differ, and stay as in the base.")
@_leave_out
@as_json
def extract(
    base: Path, tuned: Path, rank: int, out: Path, ignore: tuple[str, ...], leave_out: tuple[str, ...], as_json: bool
) -> None:
    """Write the adapter of this rank that is nearest to D = TUNED − BASE, in PEFT's format, and say which share of ‖D‖²
    it keeps of each weight.

    \b
    Example:
      lora-fx extract Llama-3.2-1B Llama-3.2-1B-Instruct -r 16 -o instruct-adapter --ignore '*norm*'
    """
    from lora_fx import extract_adapter

    with progress("extract") as tell:
        found = extract_adapter(base, tuned, out, rank, ignore=ignore, leave_out=leave_out, progress=tell)
    rows = [dict(vars(row), shape=list(row.shape)) for row in found.rows]
    show(found, {"folder": str(out), "energy": found.energy, "ignored": list(found.ignored), "weights": rows}, as_json)
