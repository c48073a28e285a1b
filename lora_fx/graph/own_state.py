"""What a model's own code keeps from call to call, so that a run to look at it can leave no trace.

That is more than parameters (`lora_fx.graph.written`) and buffers: counters, logs and caches in attributes, lists,
dicts and objects of the model's own; globals and class attributes that its code names; Python's, numpy's and torch's
random state. What is found is put back in place, since others may hold the same list. Out of reach are iterators
(`itertools.count`), files, and what other libraries keep for themselves.
"""

from __future__ import annotations

import contextlib
import operator
import random
import sys
import types
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache, partial
from types import CodeType, FunctionType
from typing import Any

import torch
from torch import nn

from lora_fx.graph.places import buffers_away, is_plain
from lora_fx.graph.written import Looking, Writes, is_known, know, lies_at

_CODE = (type, types.ModuleType, FunctionType, types.BuiltinFunctionType, types.MethodType, property)
_ATOMS = frozenset({
    type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size, nn.Parameter,
})  # fmt: skip
_OTHERS = frozenset({
    "torch", "logging", "threading", "weakref", "functools", "abc", "typing", "_thread", "enum",
    "accelerate",
})  # fmt: skip
"""Packages whose objects are no state of a model's: what accelerate has put away is the size of the model."""

_TABLES = frozenset(vars(nn.Module())) - {"training"}

Undo = Callable[[], Any]


class _Stance:
    """Of this process, as torch's is."""

    eager = False
    """All that is compiled runs as Python."""


_stance = _Stance()


@contextlib.contextmanager
def uncompiled() -> Iterator[None]:
    """What is compiled, and `torch.cond`, which compiles itself, runs as Python. Below a dispatch mode it must: there
    dynamo gives up on what it meets, for good, and no later `torch.cond` of the process would run."""
    if not _may_be_compiled():
        yield
        return
    was, _stance.eager = _stance.eager, True
    try:
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        _stance.eager = was


def _may_be_compiled() -> bool:
    """Where dynamo is not loaded nothing is, and importing it takes a second."""
    return "torch._dynamo" in sys.modules and not _stance.eager


@contextlib.contextmanager
def undisturbed(model: nn.Module, look: Callable[[], Any] | None = None) -> Iterator[Writes]:
    """Whatever runs inside leaves all that the model's code keeps bitwise as it was, and its parameters; of those none
    is copied that nothing writes to.

    Args:
        look: runs the model as it will run inside, in the mode in which it is: where it is not known yet what is
            written to in that, it is looked at. What is compiled cannot be: it runs once more before, as Python. None
            where what runs inside has been recorded, or is being recorded.
    """
    unknown = look is not None and not is_known(model)
    if look is not None and unknown and _may_be_compiled():
        with _undisturbed(model) as writes, uncompiled(), Looking(writes):
            try:
                look()
                know(model)
            except (MemoryError, torch.OutOfMemoryError):
                raise
            except Exception:  # the run inside raises it too, and says what it is of
                pass
        unknown = False
    with _undisturbed(model) as writes, Looking(writes) if unknown else contextlib.nullcontext():
        yield writes
        if unknown:
            know(model)


@contextlib.contextmanager
def _undisturbed(model: nn.Module) -> Iterator[Writes]:
    kept, writes = _Kept(model), Writes(model)
    devices = {t.device for t in (*model.parameters(), *model.buffers()) if t.device.type == "cuda"}
    with torch.random.fork_rng(devices=[d.index or 0 for d in devices]):
        try:
            yield writes
        finally:
            with torch.no_grad():
                writes.restore()
            kept.restore()


class _Kept:
    """References to everything, and copies of numbers: how to put each back."""

    def __init__(self, model: nn.Module) -> None:
        self.undo: list[Undo] = [partial(random.setstate, random.getstate())]
        # Under autocast torch keeps the casts of trainable parameters, which hold other numbers while a check runs.
        torch.clear_autocast_cache()
        self.undo.append(torch.clear_autocast_cache)
        self.empty: list[Any] = []  # torch's tables with nothing in them: most of what modules have
        self.seen: dict[int, Any] = {}  # by id, held so that the id stays theirs
        if (numpy := sys.modules.get("numpy.random")) is not None:
            self.undo.append(partial(numpy.set_state, numpy.get_state()))
        modules = []
        for module in model.modules():
            if type(module).__module__.startswith("lora_fx."):  # an adapter keeps nothing from call to call
                self.undo.append(partial(setattr, module, "training", module.training))
            else:
                modules.append(module)
        self._keep_all([*modules, *buffers_away(model)])
        for cls in dict.fromkeys(base for m in modules for base in type(m).__mro__ if _is_users(base)):
            self._keep_class(cls)

    def restore(self) -> None:
        with torch.no_grad():
            for undo in reversed(self.undo):
                undo()
        for table in filter(None, self.empty):
            table.clear()

    def _keep_all(self, values: Iterable[Any]) -> None:
        todo = list(values)
        while todo:
            value = todo.pop()
            if type(value) in _ATOMS or id(value) in self.seen or isinstance(value, _CODE):
                continue
            self.seen[id(value)] = value
            todo += self._keep(value)

    def _keep(self, value: Any) -> Iterable[Any]:
        """Keep one value; what is in it comes back."""
        if isinstance(value, torch.Tensor):
            if not (isinstance(value, nn.Parameter) or value.is_meta or value.is_inference()):
                # Whether it moved cannot be asked: batch norm moves its statistics without moving their version.
                alias = value.detach()
                self.undo.append(partial(_restore_tensor, value, alias, _told_apart(alias).clone()))
            return ()
        if isinstance(value, dict):
            was = dict(dict.items(value))  # a class of its own may make something up in `__getitem__`
            self.undo.append(partial(_restore_dict, value, was))
            return was.values() if type(value) is dict else (*was.values(), *self._attributes(value))
        if isinstance(value, list | deque):
            self.undo.append(partial(_restore_list, value, list(value)))
            return value if type(value) is list else (*value, *self._attributes(value))
        if isinstance(value, set):
            self.undo.append(partial(_restore_set, value, set(value)))
            return ()
        if isinstance(value, tuple):
            inside = tuple.__iter__(value)  # a class of its own may refuse to be iterated, or to have a length
            return inside if type(value) is tuple else (*inside, *self._attributes(value))
        return self._keep_object(value)

    def _keep_object(self, value: Any) -> Iterable[Any]:
        package = type(value).__module__.partition(".")[0]
        if isinstance(value, random.Random):
            self.undo.append(partial(value.setstate, value.getstate()))
        elif isinstance(value, torch.Generator):
            self.undo.append(partial(value.set_state, value.get_state()))
        elif package == "numpy":
            _keep_numpy(value, self.undo)
        elif isinstance(value, nn.Module):
            return self._keep_module(value)
        elif package not in _OTHERS:
            return self._attributes(value)
        return ()

    def _keep_module(self, module: nn.Module) -> Iterable[Any]:
        own = vars(module)
        self.undo.append(partial(_restore_dict, own, dict(own)))
        found: list[Any] = []
        for key, value in own.items():
            if key in _TABLES and not value:
                self.empty.append(value)
            elif key in ("_parameters", "_modules"):  # weights are not copied, and modules are kept one by one
                self.undo.append(partial(_restore_dict, value, dict(value)))
            elif type(value) not in _ATOMS:
                found.append(value)
        return found

    def _attributes(self, value: Any) -> list[Any]:
        """What an object has in its attributes."""
        found: list[Any] = []
        own = getattr(value, "__dict__", None)
        if isinstance(own, dict):
            self.undo.append(partial(_restore_dict, own, dict(own)))
            found += own.values()
        for name in _slots(type(value).__mro__):
            if (inner := getattr(value, name, _EMPTY)) is not _EMPTY:
                self.undo.append(partial(_restore_attribute, value, name, inner))
                found.append(inner)
        return found

    def _keep_class(self, cls: type) -> None:
        """Its attributes, and the globals and closures that its methods name."""
        for name, value in list(vars(cls).items()):
            function = getattr(value, "fget", None) or getattr(value, "__func__", value)
            if isinstance(function, FunctionType):
                self._keep_names(function)
            elif not (name.startswith("__") or isinstance(value, _CODE) or hasattr(value, "__get__")):
                self.undo.append(partial(_restore_attribute, cls, name, value))
                self._keep_all([value])

    def _keep_names(self, function: FunctionType) -> None:
        if id(function) in self.seen:
            return
        self.seen[id(function)] = function
        scope = function.__globals__
        for name in _names(function.__code__):
            value = scope.get(name)
            if isinstance(value, FunctionType) and value.__globals__ is scope:
                self._keep_names(value)
            elif name in scope and not isinstance(value, _CODE):
                self.undo.append(partial(_restore_item, scope, name, value))
                self._keep_all([value])
        for cell in function.__closure__ or ():
            if (value := _content(cell)) is not _EMPTY and not isinstance(value, _CODE):
                self.undo.append(partial(setattr, cell, "cell_contents", value))
                self._keep_all([value])
        self._keep_all((*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values(), vars(function)))


# ── how each is put back ─────────────────────────────────────────────────────────────────────────────────────────────
# Only where it has changed: other threads may be reading the same containers.


def _restore_tensor(value: torch.Tensor, alias: torch.Tensor, was: torch.Tensor) -> None:
    _told_apart(alias).copy_(was)
    if is_plain(value) and lies_at(value) != lies_at(alias):  # by `value.data = …`
        value.data = alias


def _restore_dict(value: dict, was: dict) -> None:
    same = len(value) == len(was) and all(map(operator.is_, dict.keys(value), was))
    if not (same and all(map(operator.is_, dict.values(value), was.values()))):
        value.clear()
        value.update(was)


def _restore_list(value: Any, was: list) -> None:
    if len(value) != len(was) or any(v is not w for v, w in zip(value, was, strict=True)):
        value.clear()
        value.extend(was)


def _restore_set(value: set, was: set) -> None:
    if value != was:
        value.clear()
        value.update(was)


def _restore_attribute(owner: Any, name: str, was: Any) -> None:
    if getattr(owner, name, _EMPTY) is not was:
        setattr(owner, name, was)


def _restore_item(scope: dict, name: str, was: Any) -> None:
    if scope.get(name, _EMPTY) is not was:
        scope[name] = was


def _told_apart(tensor: torch.Tensor) -> torch.Tensor:
    """Each number once: what was expanded shows one under many indices, and torch writes to none of those."""
    if tensor.layout != torch.strided or tensor.is_nested:  # it has no strides
        return tensor
    for axis, (size, stride) in enumerate(zip(tensor.shape, tensor.stride(), strict=True)):
        if stride == 0 and size > 1:
            tensor = tensor.narrow(axis, 0, 1)
    return tensor


def _keep_numpy(value: Any, undo: list[Undo]) -> None:
    numpy = sys.modules["numpy"]
    if isinstance(value, numpy.ndarray) and value.flags.writeable:
        undo.append(partial(numpy.copyto, value, value.copy()))
    elif isinstance(value, numpy.random.Generator):
        undo.append(partial(setattr, value.bit_generator, "state", value.bit_generator.state))
    elif isinstance(value, numpy.random.RandomState):
        undo.append(partial(value.set_state, value.get_state()))


# ── what there is ────────────────────────────────────────────────────────────────────────────────────────────────────

_EMPTY = object()


@lru_cache(maxsize=4096)
def _slots(bases: tuple[type, ...]) -> tuple[str, ...]:
    found = (getattr(base, "__slots__", ()) for base in bases)
    names = (name for names in found for name in ((names,) if isinstance(names, str) else names))
    return tuple(name for name in names if not name.startswith("__"))


def _is_users(cls: type) -> bool:
    return cls.__module__.partition(".")[0] not in ("builtins", "torch", "lora_fx")


def _content(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # nothing was put in yet
        return _EMPTY


@lru_cache(maxsize=4096)
def _names(code: CodeType) -> frozenset[str]:
    """What the code names, with the functions written inside it."""
    inner = (_names(const) for const in code.co_consts if isinstance(const, CodeType))
    return frozenset(code.co_names).union(*inner)
