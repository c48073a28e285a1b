"""Which ids a call of a model was given, for what stands behind its blocks.

    with a call:   table(ids)  →  give(ids)        …        block(h)  →  of(h): the ids at whose positions h stands

A call is one of the module that has the table and the blocks in it (`lora_fx.model.behind`). Calls nest, each with ids
of its own, and each thread has its calls. What a backward runs again (gradient checkpointing) is outside of every call:
there the block's input says whose it is, by the memory that it lies in, which the checkpoint has kept. What nobody
knows is refused.
"""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch.compiler import is_dynamo_compiling
from torch.multiprocessing.reductions import StorageWeakRef

from lora_fx.errors import LoraFxError

_FEW = 64  # activations that are known at a time, before those that are gone are looked for


class Flown:
    """Activations, and the ids at whose positions they stand, for as long as these live. Threads share it."""

    def __init__(self) -> None:
        self._known: dict[tuple[Any, ...], tuple[StorageWeakRef, torch.Tensor]] = {}
        self._most, self._lock = _FEW, threading.Lock()

    def note(self, h: torch.Tensor, ids: torch.Tensor) -> None:
        if (key := _place(h)) is None:
            return
        with self._lock:
            if len(self._known) >= self._most:
                self._known = {k: own for k, own in self._known.items() if not own[0].expired()}
                self._most = 2 * len(self._known) + _FEW
            self._known[key] = StorageWeakRef(h.untyped_storage()), ids

    def of(self, h: torch.Tensor) -> torch.Tensor | None:
        with self._lock:  # a weak reference keeps the address of a storage from being another's
            storage, ids = self._known.get(_place(h) or (), (None, None))
        return None if storage is None or storage.expired() else ids


def _place(h: torch.Tensor) -> tuple[Any, ...] | None:
    """Where it lies; None for what lies nowhere: inside of a transform of torch.func, say."""
    try:
        return h.untyped_storage()._cdata, h.storage_offset(), tuple(h.shape)
    except (RuntimeError, NotImplementedError):
        return None


class Calls(threading.local):
    """The calls of one model, as one thread is in them."""

    def __init__(self, flown: Flown) -> None:  # in each thread, with the same
        self.flown = flown
        self.inside: int | None = None
        """The backward in which the innermost call began, -1 for none; None outside of every call."""
        self.ids: torch.Tensor | None = None
        self.asked = True
        """A block has taken the ids."""
        self.mixed = False
        """Others have come before a block had taken them."""

    def enter(self) -> tuple[Any, ...]:
        """A call begins; what comes back ends it."""
        before = self.inside, self.ids, self.asked, self.mixed
        self.inside, self.ids, self.asked, self.mixed = _backward(), None, True, False
        return before

    def leave(self, before: tuple[Any, ...]) -> None:
        self.inside, self.ids, self.asked, self.mixed = before

    def give(self, ids: Any, words: int) -> None:
        """The table, of so many words, is read with these ids.

        Raises:
            LoraFxError: they are no tensor, or ids of new tokens come outside of a call.
        """
        if not isinstance(ids, torch.Tensor):
            raise _refused("the table is traced, and no trace shows which ids a call is given", "do not trace it by fx")
        if self.inside is None or self.inside != _backward():
            again = is_dynamo_compiling() or _backward() != -1
            if not again and not ids.is_meta and bool((ids >= words).any()):
                raise _refused(
                    "ids of new tokens are looked up outside of a call of the model: nothing behind its blocks would "
                    "know of them",
                    "pass the ids to the model, not their embeddings",
                )
            return
        if ids is not self.ids:
            self.mixed = self.mixed or not self.asked
            self.ids, self.asked = ids, False

    def of(self, h: torch.Tensor) -> torch.Tensor | None:
        """The ids at whose positions the input of a block stands; None where a call has looked none up.

        Raises:
            LoraFxError: nobody knows.
        """
        if self.inside is not None and self.inside == _backward():
            self.asked = True
            if self.mixed:
                raise _refused(
                    "the table was read twice before a block ran: whose positions these are is not known",
                    "leave that block out of settings['blocks']",
                )
            return self.ids
        known = None if is_dynamo_compiling() else self.flown.of(h)
        if known is None:
            raise _refused(
                "a block runs outside of a call of the model that it is part of: which tokens its input is of is not "
                "known",
                "call the model; and checkpoint single blocks, or the whole, without moving what is kept",
            )
        return known

    def __deepcopy__(self, memo: dict[int, Any]) -> Calls:
        return new_calls()

    def __reduce__(self) -> tuple[Any, ...]:
        return new_calls, ()


def new_calls() -> Calls:
    return Calls(Flown())


def _backward() -> int:
    """The number of the backward that this thread runs; -1 for none."""
    return -1 if is_dynamo_compiling() else torch._C._current_graph_task_id()


def _refused(reason: str, remedy: str) -> LoraFxError:
    return LoraFxError(reason, place="an adapter of the kind 'prefix_layer'", remedy=remedy)
