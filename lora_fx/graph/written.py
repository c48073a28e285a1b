"""What a forward writes into parameters, put back; no parameter is copied that no op is about to write to.

    p.data = new       the old numbers are still there, in an alias of p that keeps their storage
    p.mul_(0.9)        an op says in its schema what it writes: what lies there is copied before it runs

The second is seen through whichever alias of p is written, `p.data.mul_(0.9)` too, by a dispatch mode. Below one a
model takes other ways than it does for its user: no schedule but `branch`, nothing compiled. So each model is looked at
once in each mode, and runs as it is from then on, with copies of what it was seen to write to.

Out of reach is what no op of torch does: an array of numpy's that shares the memory, a kernel of another library's that
says nothing of what it writes; and a write that depends on the numbers, and comes in a later run alone.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from lora_fx.graph.places import away_in_memory, is_away, is_plain

_Place = tuple[Any, ...]

#: model → train mode or not → names of the parameters that it was seen to write to
_seen: WeakKeyDictionary[nn.Module, dict[bool, frozenset[str]]] = WeakKeyDictionary()


def is_seen(model: nn.Module) -> bool:
    """It has been looked at in the mode in which it is."""
    return model.training in _seen.get(model, {})


class Writes(TorchDispatchMode):
    """Entered, it sees every op before it runs. Where it is not, what the model was seen to write to is put back."""

    supports_higher_order_operators = True  # `torch.cond` is one

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.replaced: tuple[nn.Parameter, ...] = ()
        """After `restore`: what had other numbers by another way than in place, `p.data = …` or `self.p = …`."""
        self.written: frozenset[int] = frozenset()
        """After `restore`: the storages of those, and of what an op was about to write to."""
        self._held = [
            (m._parameters, name, p)
            for m in model.modules()
            for name, p in m._parameters.items()
            if p is not None and not is_away(m, name)
        ]
        self._trained = [(p, p.requires_grad) for _, _, p in self._held]
        plain = dict.fromkeys(p for _, _, p in self._held if is_plain(p))
        self._aliases = {p: p.detach() for p in plain}
        self._unwritten: dict[int, list[torch.Tensor]] = {}  # by storage
        for alias in (*self._aliases.values(), *(t.detach() for t in away_in_memory(model, "_parameters"))):
            if not alias.is_meta:
                self._unwritten.setdefault(_storage(alias), []).append(alias)
        self._copies: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._model = model
        known = frozenset[str]().union(*_seen.get(model, {}).values())
        for name, p in model.named_parameters() if known else ():
            if name in known:
                self._copy(p)

    def remember(self, training: bool) -> None:
        """What it has seen of the model in this mode, after `restore`."""
        names = (name for name, p in self._model.named_parameters() if is_plain(p) and _storage(p) in self.written)
        _seen.setdefault(self._model, {})[training] = frozenset(names)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for number, name in _writes(func):
            self._copy(args[number] if number < len(args) else kwargs.get(name))
        return func(*args, **kwargs)

    def _copy(self, written: Any) -> None:
        for tensor in pytree.tree_leaves(written):
            if isinstance(tensor, torch.Tensor) and is_plain(tensor):
                for alias in self._unwritten.pop(_storage(tensor), ()):
                    self._copies.append((alias, alias.clone()))

    def restore(self) -> None:
        """Every parameter lies where it lay, with the numbers that it had. Which one a module has under a name is for
        those to put back who keep its tables."""
        for alias, numbers in self._copies:
            alias.copy_(numbers)
        others = [p for table, name, p in self._held if p in self._aliases and table.get(name) is not p]
        moved = [(p, alias) for p, alias in self._aliases.items() if _place(p) != _place(alias)]
        self.replaced = (*others, *(p for p, alias in moved if not _same(p, alias)))
        for p, alias in moved:
            p.data = alias
        for p, trained in self._trained:
            if p.requires_grad != trained:
                p.requires_grad_(trained)
        self.written = frozenset(map(_storage, (*self.replaced, *(alias for alias, _ in self._copies))))


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _place(tensor: torch.Tensor) -> _Place:
    return _storage(tensor), tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """The same numbers, as after `flatten_parameters`."""
    return not a.is_meta and a.dtype == b.dtype and a.device == b.device and torch.equal(a, b)


#: torch's batch norms write these, and their schemas say nothing of it
_UNSAID = ("running_mean", "running_var")


@lru_cache(maxsize=4096)
def _writes(func: Any) -> tuple[tuple[int, str], ...]:
    """Number and name of each argument that an op writes in place."""
    schema = getattr(func, "_schema", None)
    arguments = enumerate(()) if schema is None else enumerate(schema.arguments)
    return tuple(
        (k, a.name) for k, a in arguments if a.name in _UNSAID or (a.alias_info is not None and a.alias_info.is_write)
    )
