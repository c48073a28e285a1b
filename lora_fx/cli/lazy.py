"""A group whose commands are rows of a table: each is imported when it is called."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import click

from lora_fx.errors import LoraFxError

REFUSED, FAILED, INTERRUPTED = 2, 3, 130


class Row(NamedTuple):
    """A command that is not there yet."""

    home: str
    """``module:attribute``."""
    help: str
    """For the table of commands."""


class Lazy(click.Group):
    """A group that imports a command when it is called, and turns what is refused into a message and an exit code."""

    def __init__(self, *arguments: Any, rows: Mapping[str, Row], **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.rows = rows

    def list_commands(self, context: click.Context) -> list[str]:
        return list(self.rows)

    def get_command(self, context: click.Context, name: str) -> click.Command | None:
        if name not in self.rows:
            return None
        module, _, attribute = self.rows[name].home.partition(":")
        return getattr(importlib.import_module(module), attribute)

    def format_commands(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, row.help) for name, row in self.rows.items()])

    def shell_complete(self, context: click.Context, incomplete: str) -> list[Any]:
        from click.shell_completion import CompletionItem

        own = [CompletionItem(n, help=r.help) for n, r in self.rows.items() if n.startswith(incomplete)]
        return own + click.Command.shell_complete(self, context, incomplete)  # the options

    def invoke(self, context: click.Context) -> Any:
        try:
            return super().invoke(context)
        except LoraFxError as error:
            click.echo(f"lora-fx: {error}", err=True)
            context.exit(REFUSED)
        except KeyboardInterrupt:
            click.echo("lora-fx: interrupted", err=True)
            context.exit(INTERRUPTED)
