"""What a forward writes into parameters, put back; no parameter is copied that no op is about to write to.

    p.data = new       the old numbers are still there, in an alias of p that keeps their storage
    p.mul_(0.9)        an op says in its schema what it writes: what lies there is copied before it runs

Through whichever alias of p the second is written (`p.data.mul_(0.9)` too), a recording sees it, as it sees every op
before it runs (`Writes.recorded`). So of a model that has been recorded no more is copied, from then on, than what was
seen to be written to. One that has not, in the mode in which it is to run, runs once below a dispatch mode (`Looking`).

What has been seen counts until the verb ends: the next one may meet a model that writes every hundredth step. What was
written to once is copied ever after.

Without numbers (on meta, or while torch exports) tensors are told apart by what is recorded of them alone: `Detached`.

Out of reach is what no op of torch does: an array of numpy's that shares the memory, a kernel of another library's that
says nothing of what it writes; and a write that depends on the numbers, and comes in a later run of the verb alone.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack

from lora_fx.changes import verb_number
from lora_fx.graph.places import Stays, in_memory, is_away, is_plain, storage_of

_Mode = tuple[bool, frozenset[int]]
"""Whether it is differentiated, and which of its modules are in train mode, by id."""

#: module → names of its own parameters that a forward has written to
_written: WeakKeyDictionary[nn.Module, set[str]] = WeakKeyDictionary()

#: model → the verb in which it was looked at last, and in which modes
_looked_at: WeakKeyDictionary[nn.Module, tuple[int, set[_Mode]]] = WeakKeyDictionary()


def is_known(model: nn.Module) -> bool:
    """In this verb it has been looked at in the mode in which it is."""
    verb, modes = _looked_at.get(model, (0, set[_Mode]()))
    return verb == verb_number() and _mode(model) in modes


def know(model: nn.Module) -> None:
    """What it writes in the mode in which it is has been seen, to the end."""
    if (verb := verb_number()) is None:
        return
    if model not in _looked_at or _looked_at[model][0] != verb:
        _looked_at[model] = verb, set()
    _looked_at[model][1].add(_mode(model))


def know_copy(model: nn.Module, copy: nn.Module) -> None:
    """What is known of a model is known of a copy."""
    pairs = list(zip(model.modules(), copy.modules(), strict=True))
    for module, own in pairs:
        if module in _written:
            _written[own] = set(_written[module])
    if model in _looked_at:
        verb, modes = _looked_at[model]
        twin = {id(module): id(own) for module, own in pairs}
        _looked_at[copy] = verb, {(grad, frozenset(twin[m] for m in training)) for grad, training in modes}


def _mode(model: nn.Module) -> _Mode:
    modules = list(model.modules())
    beside = {id(inner) for m in modules if isinstance(m, Stays) for inner in m.modules()}  # adapters
    return torch.is_grad_enabled(), frozenset(id(m) for m in modules if m.training and id(m) not in beside)


class Writes:
    """Made before a model runs: how to put its parameters back. What it is known to write to is copied right then."""

    def __init__(self, model: nn.Module) -> None:
        self.replaced: tuple[nn.Parameter, ...] = ()
        """After `restore`: what had other numbers by another way than in place, `p.data = …` or `self.p = …`."""
        self.written: frozenset[int] = frozenset()
        """After `restore`: the storages of those, of what an op was about to write to, and of what is known."""
        self._held = [(m, name, p) for m in model.modules() for name, p in m._parameters.items() if p is not None]
        self._trained = [(p, p.requires_grad) for _, _, p in self._held]
        self._aliases: dict[nn.Parameter, torch.Tensor] = {}
        self._places: dict[int, list[tuple[nn.Module, str, torch.Tensor]]] = {}  # storage → what lies there
        self._copies: dict[int, list[tuple[torch.Tensor, torch.Tensor]]] = {}  # storage → what lay there
        known = []
        for module, name, p in self._held:
            away = is_away(module, name)
            here = in_memory(module, name) if away else p
            if here is None or not is_plain(here):
                continue
            alias = here.detach()
            if not away:
                self._aliases[p] = alias
            if alias.is_meta:
                continue
            self._places.setdefault(storage_of(alias), []).append((module, name, alias))
            if name in _written.get(module, ()):
                known.append(alias)
        self._copy(known)

    def before(self, func: Any, args: Any, kwargs: Any) -> None:
        """An op is about to run."""
        for number, name in _writes(func):
            self._copy(args[number] if number < len(args) else kwargs.get(name))

    def recorded(self, call: Callable[..., Any]) -> Callable[..., Any]:
        """`make_fx`'s function that records an op and runs it, with the op seen before."""

        def seen(mode: Any, func: Any, pre_dispatch: bool, args: Any, kwargs: Any) -> Any:
            self.before(func, args, kwargs)
            return call(mode, func, pre_dispatch, args, kwargs)

        return seen

    def _copy(self, written: Any) -> None:
        for tensor in pytree.tree_leaves(written):
            if not isinstance(tensor, torch.Tensor):
                continue
            storage = storage_of(tensor)
            if storage in self._places and storage not in self._copies:
                self._copies[storage] = [(alias, alias.clone()) for _, _, alias in self._places[storage]]

    def restore(self) -> None:
        """Every parameter lies where it lay, with the numbers that it had. Which one a module has under a name is for
        those to put back who keep its tables."""
        for copies in self._copies.values():
            for alias, numbers in copies:
                alias.copy_(numbers)
        others = [p for m, name, p in self._held if p in self._aliases and m._parameters.get(name) is not p]
        moved = [(p, alias) for p, alias in self._aliases.items() if lies_at(p) != lies_at(alias)]
        self.replaced = (*others, *(p for p, alias in moved if not _same(p, alias)))
        for p, alias in moved:
            p.data = alias
        for p, trained in self._trained:
            if p.requires_grad != trained:
                p.requires_grad_(trained)
        for storage in self._copies:
            for module, name, _ in self._places[storage]:
                _written.setdefault(module, set()).add(name)
        self.written = frozenset((*map(storage_of, self.replaced), *self._copies))


class Looking(TorchDispatchMode):
    """Inside, every op is seen before it runs, and runs as it is."""

    supports_higher_order_operators = True  # `torch.cond` is one

    def __init__(self, writes: Writes) -> None:
        super().__init__()
        self._writes = writes

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self._writes.before(func, args, kwargs)
        return func(*args, **kwargs)


_DATA: Any = torch.Tensor.data
_READ, _SET = _DATA.__get__, _DATA.__set__


class Detached(TorchFunctionMode):
    """Inside, ``t.data`` is ``t.detach()``: the same memory, which torch records as such. Of ``t.data`` it records
    nothing, and takes it for a constant; without numbers not even its storage then says whose it is.

    Args:
        set: what is done with a tensor whose ``.data`` is to be set; None for what torch does.
    """

    def __init__(self, set: Callable[[torch.Tensor], Any] | None = None) -> None:
        super().__init__()
        self._set = set

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func == _READ and type(args[0]) in (torch.Tensor, nn.Parameter, FakeTensor):
            return args[0].detach()
        if func == _SET and self._set is not None:
            return self._set(args[0])
        return func(*args, **(kwargs or {}))


def only_looked_at() -> bool:
    """All dispatch modes that see what runs here are of this kind."""
    return all(type(mode) is Looking for mode in _get_current_dispatch_mode_stack())


def lies_at(tensor: torch.Tensor) -> tuple[Any, ...]:
    """Which numbers in memory are a tensor's."""
    return storage_of(tensor), tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype


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
