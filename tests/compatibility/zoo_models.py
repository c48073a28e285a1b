"""The zoo's models, and its own nets."""

from __future__ import annotations

from collections.abc import Iterator

from tests import zoo
from tests.compatibility import Model


def models() -> Iterator[Model]:
    for case in zoo.ZOO:
        yield Model("zoo", case.name, case.build)
