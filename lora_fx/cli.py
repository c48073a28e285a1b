"""The command `lora-fx`. What it refuses, it says in one message, with exit code 2."""

from __future__ import annotations

import argparse
import importlib.metadata
import sys
from collections.abc import Sequence
from pathlib import Path

from lora_fx.errors import LoraFxError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; the exit code comes back: 0, 2 for a refusal, 130 for Ctrl-C."""
    options = _parser().parse_args(arguments)
    try:
        options.run(options)
    except LoraFxError as error:
        print(f"lora-fx: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("lora-fx: interrupted", file=sys.stderr)
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lora-fx", description="LoRA as a graph-rewriting compiler pass: y = x·Wᵀ ⇄ y = x·Wᵀ + s·(x·Aᵀ)·Bᵀ"
    )
    parser.add_argument("--version", action="version", version=f"lora-fx {importlib.metadata.version('lora-fx')}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    demo = commands.add_parser(
        "demo",
        help="adapt, fold and export a small vision transformer on real data, in about a minute",
        description="Train a small vision transformer on handwritten digits, rotate the digits by 90°, adapt the model "
        "to them with LoRA, fold the adapter, export to ONNX, and measure what each step did. "
        "Needs: pip install 'lora-fx[demo]'",
    )
    out, seed = "where the files go (default: ./%(default)s)", "of the split, the weights and the batches (default: 0)"
    demo.add_argument("--out", type=Path, default=Path("lora_fx_demo"), metavar="FOLDER", help=out)
    demo.add_argument("--seed", type=_seed, default=0, metavar="N", help=seed)
    demo.add_argument("--quick", action="store_true", help="the same path with few training steps, for CI")
    demo.set_defaults(run=_demo)
    pipeline = commands.add_parser(
        "pipeline",
        help="show the passes that a verb runs on a model",
        description="Show the passes that a verb runs on a model, with what each requires and ensures. "
        "In Python: lora_fx.pipeline(verb, ...), to insert passes of your own.",
    )
    pipeline.add_argument("verb", nargs="?", default="apply", choices=tuple(_VERBS), help="default: %(default)s")
    pipeline.set_defaults(run=_pipeline)
    return parser


#: each verb with arguments that stand for a user's
_VERBS: dict[str, tuple[str, ...]] = {
    "apply": ("rules",), "plan": ("rules",), "fold": (), "unfold": (), "activate": ("adapter",), "deactivate": (),
    "remove": ("adapter",), "switch": ("adapter",), "load_adapter": ("folder",),
    "export_onnx": ("inputs", "model.onnx"),
}  # fmt: skip


def _pipeline(options: argparse.Namespace) -> None:
    from lora_fx import Rule, pipeline

    arguments = (Rule(where="*", rank=8) if word == "rules" else word for word in _VERBS[options.verb])
    print(pipeline(options.verb, *arguments))


def _seed(text: str) -> int:
    seed = int(text)
    if not 0 <= seed < 2**32:  # what scikit-learn's split takes
        raise argparse.ArgumentTypeError(f"{seed} is not between 0 and 2**32 - 1")
    return seed


def _demo(options: argparse.Namespace) -> None:
    from lora_fx.demo import run_demo

    run_demo(options.out, seed=options.seed, quick=options.quick)


if __name__ == "__main__":
    sys.exit(main())
