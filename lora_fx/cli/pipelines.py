"""`lora-fx pipeline`"""

from __future__ import annotations

import click

from lora_fx.cli.shown import say

#: each verb with arguments that stand for a user's
_VERBS: dict[str, tuple[str, ...]] = {
    "apply": ("rules",), "plan": ("rules",), "fold": (), "unfold": (), "activate": ("adapter",), "deactivate": (),
    "remove": ("adapter",), "rename": ("adapter", "other"), "switch": ("adapter",), "load_adapter": ("folder",),
    "export_onnx": ("inputs", "model.onnx"),
}  # fmt: skip


@click.command()
@click.argument("verb", type=click.Choice(tuple(_VERBS)), default="apply")
def pipeline(verb: str) -> None:
    """Show the passes that a verb runs on a model, with what each requires and ensures. In Python:
    lora_fx.pipeline(verb, ...), to insert passes of your own.
    """
    from lora_fx import Rule
    from lora_fx import pipeline as passes_of

    arguments = (Rule(where="*", rank=8) if word == "rules" else word for word in _VERBS[verb])
    say(str(passes_of(verb, *arguments)))
