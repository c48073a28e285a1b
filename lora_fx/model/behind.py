"""Code around the forwards of whole modules, for what stands behind blocks.

    call:    a call of it begins and ends       the least module in which the table is read and blocks run
    block:   h  →  h' = behind(h, ids, θ)       h is what it gives, or the first of that

What is around them is kept on the modules; a class of ours runs it (`lora_fx.model.classes`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import wraps
from typing import Any

import torch
from torch import fx, nn

from lora_fx.deltas.adapter import Adapter
from lora_fx.errors import LoraFxError
from lora_fx.graph.places import is_shard

_CALL, _BEHIND = "_lora_fx_call", "_lora_fx_behind"


@dataclass(frozen=True)
class Behind:
    """What stands behind one block."""

    adapter: Adapter
    tensor: str
    """Of θ: (ids, features)."""
    words: int
    """Of the table: the first id behind its last one."""

    def of(self, block: nn.Module, given: Iterable[Any], output: Any) -> Any:
        """What becomes of a block's output.

        Raises:
            LoraFxError: it is not known which positions of it are new tokens', or it has none.
        """
        if any(isinstance(value, fx.Proxy) for value in given):
            raise self._error(block, "is traced by torch.fx, which shows nobody the ids of a call")
        h = hidden(output)
        entered = next((t for t in given if isinstance(t, torch.Tensor) and t.is_floating_point()), None)
        if h is None or entered is None:
            raise self._error(block, f"{'gives' if h is None else 'is given'} no activations")
        ids = self.adapter.calls.of(entered)
        if ids is None:
            return output
        theta = getattr(self.adapter, self.tensor)
        if is_shard(theta) or theta.ndim != 2:
            raise self._error(block, "runs where θ is sharded")
        if h.shape != (*ids.shape, theta.shape[1]):
            raise self._error(block, f"gives {tuple(h.shape)}, for ids of {tuple(ids.shape)}")
        kind: Any = self.adapter.kind
        new = kind.behind(h, ids, theta, self.words)
        if not torch.compiler.is_dynamo_compiling():
            for t in (entered, new):
                if t.shape == h.shape:
                    self.adapter.calls.flown.note(t, ids)
        return with_hidden(output, new)

    def _error(self, block: nn.Module, why: str) -> LoraFxError:
        return LoraFxError(
            f"the block {why}",
            place=f"adapter {self.adapter.name!r}, behind a {type(block).__name__}",
            remedy="leave it out of settings['blocks'], or call the model as it was planned",
        )


def hidden(output: Any) -> Any:
    """The activations in what a block gives: that, or the first of a tuple; None where it is neither."""
    first = output[0] if type(output) in (tuple, list) and output else output
    return first if isinstance(first, torch.Tensor) and first.is_floating_point() else None


def with_hidden(output: Any, h: Any) -> Any:
    return type(output)((h, *output[1:])) if type(output) in (tuple, list) else h


# ── on modules ───────────────────────────────────────────────────────────────────────────────────────────────────────


def stand(adapter: Adapter, calls: Iterable[nn.Module], blocks: Mapping[str, nn.Module]) -> None:
    """Have an adapter behind these blocks, tensor of θ → block, in calls of these modules."""
    words = adapter.layout.size("i")
    for call in calls:
        call.__dict__[_CALL] = (*callers(call), adapter)
    for tensor, block in blocks.items():
        block.__dict__[_BEHIND] = (*behind(block), Behind(adapter, tensor, words))


def leave(module: nn.Module, adapters: Iterable[Adapter]) -> None:
    """Undo that, for these adapters, in this module."""
    gone = set(adapters)
    kept: Mapping[str, tuple[Any, ...]] = {
        _CALL: tuple(a for a in callers(module) if a not in gone),
        _BEHIND: tuple(one for one in behind(module) if one.adapter not in gone),
    }
    for key, own in kept.items():
        if own:
            module.__dict__[key] = own
        else:
            module.__dict__.pop(key, None)


def callers(module: nn.Module) -> tuple[Adapter, ...]:
    """The adapters of whose model a call of this module is one."""
    return module.__dict__.get(_CALL, ())


def behind(module: nn.Module) -> tuple[Behind, ...]:
    return module.__dict__.get(_BEHIND, ())


def is_wrapped(module: nn.Module) -> bool:
    """Whether something acts around its forward."""
    return any(a.active for a in callers(module)) or any(one.adapter.active for one in behind(module))


def blocks_of(adapter: Adapter, modules: Iterable[nn.Module]) -> dict[str, nn.Module]:
    """Tensor of θ → the block that it stands behind, of those among these modules."""
    return {one.tensor: m for m in modules for one in behind(m) if one.adapter is adapter}


def around(forward: Callable[..., Any], spec: Any) -> Callable[..., Any]:
    """The forward of a class of ours, with what is around it.

    Args:
        spec: of the class: whoever keeps this forward beyond its time gets the one of today.
    """

    @wraps(forward)
    def called(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if getattr(type(self), "_lora_fx", None) is not spec:
            return type(self).forward(self, *args, **kwargs)
        calls = [adapter.calls for adapter in callers(self) if adapter.active]
        before = [own.enter() for own in calls]
        try:
            output = forward(self, *args, **kwargs)
        finally:
            for own, was in zip(calls, before, strict=True):
                own.leave(was)
        for one in behind(self):
            if one.adapter.active:
                output = one.of(self, (*args, *kwargs.values()), output)
        return output

    return called
