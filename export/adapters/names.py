"""What the keys of an adapter's file can name, whoever knows it: a model, or a checkpoint that has no model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol


class Names(Protocol):
    """The modules that there are."""

    @property
    def by_path(self) -> Mapping[str, Any]:
        """Those that may be adapted, and what they are in, by their names."""

    @property
    def base(self) -> str:
        """What has them, in words."""

    def is_table(self, path: str) -> bool:
        """Whether PEFT adapts this module as an embedding."""
