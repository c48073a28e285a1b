"""Classes that modules have had: for adapters that acted before, none is traced again.

    activate(model); activate(model, "default")   # the second gives each module the class that it had

A class is kept with all that its trace has relied on: the adapters and the shapes of their weights, what model code has
read off modules, the names it has looked up, and what stands in the module's own class. It is given again where
each of these is the same object still; else the forward is traced anew. Unknown means no: a trace that has taken a
value from a closure is not kept.

Nothing of it is in the model: it is not copied or pickled, and goes with the module, or when adapters are removed.
"""

from __future__ import annotations

import builtins
import operator
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import FunctionType
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
from torch import nn

from lora_fx.deltas.adapter import Adapter
from lora_fx.deltas.kinds import own_factors
from lora_fx.graph.forms import FORMS
from lora_fx.model.classes import Reads
from lora_fx.passes.rewriting import Relied

_MOST = 4  # sets of active adapters for which a module's class is kept


@dataclass(frozen=True)
class Key:
    """What a module's class is made for."""

    base: type[nn.Module]
    reads: Reads
    """By dispatch."""
    fallback: Reads


@dataclass(frozen=True, eq=False)
class _Code:
    """What many modules' traces rely on alike."""

    named: tuple[tuple[dict[str, Any], str, tuple[str, ...], Any], ...]
    """Scope, name, attributes from there on, what was there."""
    base: type
    content: tuple[Any, ...]
    """All that was in that class."""
    forms: tuple[Any, ...]
    """The table of forms."""


@dataclass(frozen=True)
class _Kept:
    key: Key
    cls: type[nn.Module]
    owners: tuple[tuple[str, ref[nn.Module]], ...]
    """What the trace has read from, and what the graph names: path below the module, and which one."""
    read: tuple[tuple[str, str, Any], ...]
    """Path, attribute, what was there."""
    code: _Code


_kept: WeakKeyDictionary[nn.Module, tuple[_Kept, ...]] = WeakKeyDictionary()


def forget_classes(modules: Iterable[nn.Module]) -> None:
    """Keep none of these modules' classes."""
    for module in modules:
        _kept.pop(module, None)


class Keeper:
    """What is kept, as one change of a model looks at it: what many modules rely on is looked up once.

    Args:
        active: module → its active adapters by child name.
        reads: module → what it reads with them.
    """

    def __init__(self, active: Mapping[nn.Module, Mapping[str, Adapter]], reads: Mapping[nn.Module, Reads]) -> None:
        self._active, self._reads = active, reads
        self._adapted: dict[nn.Module, dict[str, _Adapted]] = {}
        self._same_code: dict[_Code, bool] = {}
        self._codes: dict[Any, _Code] = {}
        self._forms = (*FORMS, *FORMS.values())

    def find(self, module: nn.Module, key: Key) -> type[nn.Module] | None:
        """The class that the module had for this key, where a trace would give it again."""
        kept = _kept.get(module, ())
        for one in kept:
            if one.key == key and self._holds(module, one):
                if one is not kept[0]:
                    _kept[module] = (one, *(other for other in kept if other is not one))
                return one.cls
        return None

    def keep(self, module: nn.Module, key: Key, relied: Relied) -> None:
        """The class that the module has now, for this key; of a trace that has relied on this."""
        owners = tuple((path, ref(owner)) for path, owner in relied.owners.items())
        read = tuple((path, name, self._value(relied.owners[path], name)) for path, name in relied.read)
        new = _Kept(key, type(module), owners, read, self._code_of(relied, key.base))
        _kept[module] = (new, *(old for old in _kept.get(module, ()) if old.key != key))[:_MOST]

    def _holds(self, module: nn.Module, kept: _Kept) -> bool:
        if "forward" in module.__dict__ or not self._is_code(kept.code):
            return False
        owners: dict[str, nn.Module] = {}
        for path, owner in kept.owners:
            here = _below(module, path)
            if here is None or here is not owner():
                return False
            owners[path] = here
        return all(_same(self._value(owners[path], name), was) for path, name, was in kept.read)

    def _is_code(self, code: _Code) -> bool:
        if code not in self._same_code:
            self._same_code[code] = (
                _are(self._forms, code.forms)
                and all(_named(scope, name, path) is was for scope, name, path, was in code.named)
                and _are(_content(code.base), code.content)
            )
        return self._same_code[code]

    def _code_of(self, relied: Relied, base: type) -> _Code:
        """One object for modules that rely on the same."""
        at = base, frozenset((id(scope), name, path) for scope, name, path in relied.named)
        if at not in self._codes:
            named = tuple((*one, _named(*one)) for one in relied.named)
            self._codes[at] = _Code(named, base, _content(base), self._forms)
        return self._codes[at]

    def _value(self, module: nn.Module, name: str) -> Any:
        """What a trace gets for `module.<name>`; for a tensor, it does not matter which."""
        if module in self._active and name in (adapted := self._adapted_of(module)):
            return adapted[name]
        own = module.__dict__
        if name in own["_parameters"] or name in own["_buffers"] or isinstance(own.get(name), torch.Tensor):
            return torch.Tensor
        child = own["_modules"].get(name)
        return own.get(name, _NOTHING) if child is None else ref(child)

    def _adapted_of(self, module: nn.Module) -> dict[str, _Adapted]:
        if module not in self._adapted:
            own = self._active[module]
            self._adapted[module] = {
                attribute: _Adapted.of(module._parameters[attribute], children, [own[child] for child in children])
                for attribute, children, _ in self._reads[module]
            }
        return self._adapted[module]


_NOTHING = object()


def _named(scope: dict[str, Any], name: str, path: tuple[str, ...]) -> Any:
    """What code of this scope gets for a name, with these attributes from there on."""
    value = scope.get(name, getattr(builtins, name, _NOTHING))
    for attribute in path:
        value = getattr(value, attribute, _NOTHING)
    return value


def _content(kind: type) -> tuple[Any, ...]:
    """All that stands in a class and in those that it is derived from, and the code of its functions."""
    found: list[Any] = []
    for base in kind.__mro__:
        for name, value in vars(base).items():
            found += name, value
            if isinstance(value, FunctionType):
                found += value.__code__, value.__defaults__
    return tuple(found)


@dataclass(frozen=True)
class _Adapted:
    """An adapted weight as a trace reads it."""

    shape: tuple[int, ...]
    children: tuple[str, ...]
    parts: tuple[Any, ...]

    @staticmethod
    def of(parameter: torch.Tensor | None, children: tuple[str, ...], adapters: list[Adapter]) -> _Adapted:
        assert parameter is not None, children
        parts: list[Any] = [type(parameter), parameter.dtype]
        for adapter in adapters:
            settings = adapter._settings
            if adapter.kind.factors is own_factors:  # a trace has these as numbers that may change
                settings = {name: value for name, value in settings.items() if name not in ("rank", "alpha")}
            parts += ref(adapter), adapter.dtype, adapter.realised, adapter.drops, *settings, *settings.values()
        return _Adapted(tuple(parameter.shape), children, tuple(parts))


def _same(now: Any, was: Any) -> bool:
    if now is was:
        return True
    if not isinstance(now, _Adapted) or not isinstance(was, _Adapted):
        return False
    return (now.shape, now.children) == (was.shape, was.children) and _are(now.parts, was.parts)


def _are(now: tuple[Any, ...], was: tuple[Any, ...]) -> bool:
    """The same objects in the same order."""
    return now is was or (len(now) == len(was) and all(map(operator.is_, now, was)))


def _below(module: nn.Module, path: str) -> nn.Module | None:
    """The module at this path; an adapter of a tied weight is no registered child of all its owners."""
    here: Any = module
    for name in path.split(".") if path else ():
        here = here._modules.get(name) or here.__dict__.get(name)
        if not isinstance(here, nn.Module):
            return None
    return here
