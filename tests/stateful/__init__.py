"""Modules with a state of their own, and what may happen to each: the table that law L15 draws from.

    y  =  f(x, W; state),   state  →  state'     whatever a forward reads beside x and W, and whatever it writes

Each row is small (6 features in, 4 out), owns or reads weights that can be adapted, and names the changes that its own
code would notice. People write all of these; none of them is a library's model.

Each file has modules of one sort, and their rows; the names in a row's changes are those of its file.
"""

from __future__ import annotations

from tests.stateful import (
    arguments,
    attributes,
    buffers,
    containers,
    functions,
    modes,
    outside,
    parts,
    tensors,
    weights,
)
from tests.stateful.table import Linear, Stateful, sequences

__all__ = ["STATEFUL", "Stateful", "sequences"]

#: the table
STATEFUL = (
    Stateful(Linear),
    *buffers.ROWS,
    *attributes.ROWS,
    *containers.ROWS,
    *outside.ROWS,
    *tensors.ROWS,
    *modes.ROWS,
    *arguments.ROWS,
    *functions.ROWS,
    *weights.ROWS,
    *parts.ROWS,
)
