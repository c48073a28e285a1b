"""The command `lora-fx`. What it refuses, it says in one message.

Exit codes: 0 done, 2 refused (what was asked for is malformed, or cannot be), 3 looked at and found wrong (`verify`,
`certify`), 130 interrupted (Ctrl-C); 1 with a trace is a defect of ours. `lora-fx --help` needs no torch.
"""

from __future__ import annotations

from collections.abc import Sequence

import click

from lora_fx.cli.lazy import INTERRUPTED, REFUSED, Lazy, Row


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; the exit code comes back."""
    try:
        return command.main(arguments, prog_name="lora-fx", standalone_mode=False) or 0
    except click.ClickException as error:
        error.show()
        return REFUSED
    except click.Abort:  # Ctrl-C outside of a command
        click.echo("lora-fx: interrupted", err=True)
        return INTERRUPTED


COMMANDS = {
    "plan": Row("lora_fx.cli.models:plan", "What rules come to on a model, as a table."),
    "fold": Row("lora_fx.cli.checkpoints:fold", "Fold adapters into a checkpoint on disk, without the model."),
    "unfold": Row("lora_fx.cli.checkpoints:unfold", "The base of a folded checkpoint again, to the bit."),
    "extract": Row("lora_fx.cli.checkpoints:extract", "The adapter nearest to what changed between two checkpoints."),
    "inspect": Row("lora_fx.cli.inspecting:inspect", "What is in an adapter, a checkpoint or an ONNX file."),
    "export": Row("lora_fx.cli.models:export", "A model with its adapters folded, as a checked ONNX file."),
    "verify": Row("lora_fx.cli.checkpoints:verify", "Is every file of a folded checkpoint what was written?"),
    "certify": Row("lora_fx.cli.models:certify", "Is every use of every adapted weight W + δ?"),
    "demo": Row("lora_fx.cli.demo:demo", "Adapt, fold and export a small vision transformer, in a minute."),
    "paper": Row("lora_fx.cli.paper:paper", "The claims of the LoRA paper, on your own model, one command each."),
    "pipeline": Row("lora_fx.cli.pipelines:pipeline", "Show the passes that a verb runs on a model."),
}


_SETTINGS = {"help_option_names": ["-h", "--help"], "max_content_width": 100}


@click.command(cls=Lazy, rows=COMMANDS, context_settings=_SETTINGS)
@click.version_option(package_name="lora-fx", message="lora-fx %(version)s")
def command() -> None:
    """LoRA as a graph-rewriting compiler pass: y = x·Wᵀ ⇄ y = x·Wᵀ + s·(x·Aᵀ)·Bᵀ

    Exit codes: 0 done, 2 refused, 3 found wrong, 130 interrupted. Completion for bash, likewise zsh and fish:
    eval "$(_LORA_FX_COMPLETE=bash_source lora-fx)"
    """
