"""How a use of an adapted weight comes to read W + δ: one word for each way, everywhere."""

from __future__ import annotations

from enum import StrEnum


class Realisation(StrEnum):
    """Of an adapter one of the first three, each less than the one before; the certificate tells the others apart, use
    by use."""

    GRAPH = "graph"
    """A branch in a generated forward."""
    DISPATCH = "dispatch"
    """The attribute reads as an `AdaptedWeight`, which puts a branch there when the op runs."""
    DENSE = "dense"
    """The op takes W + δ whole; of an adapter, the attribute reads as that, since its reader wants a plain tensor."""
    SPLIT_OFF = "split off"
    """Another use of a tied weight, which reads the plain W."""
    MISSED = "missed"
    """The base model has this use, and the adapted one does not."""
    UNSEEN = "unseen"
    """The example inputs did not reach it."""
