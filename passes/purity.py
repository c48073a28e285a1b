"""What a forward may do for its trace to be the forward: on every call, with its side effects. Unknown means no.

A trace runs a forward once and keeps the torch calls. It is the forward only where Python adds nothing that another
call could do otherwise, and leaves nothing behind. So Python may

* read arguments, children, parameters, buffers and other tensors (nodes, each of them), and immutable attributes of the
  module itself, whose names are kept: setting one gives the base forward back;
* call torch, on whatever (a node each, factories and random draws too), its children, and functions of its own;
* compute with numbers, tuples, and lists that it makes.

Everything else stops the trace before it happens: containers, configs and globals, `os`, `random`, `numpy`; tests for
None, for a type, for train or gradient mode; whatever writes to anything but a local.
"""

from __future__ import annotations

import dis
import inspect
import math
import operator
import os
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, lru_cache
from types import CodeType, FrameType
from typing import Any

import torch
from torch import nn, overrides
from torch._library.custom_ops import CustomOpDef

from lora_fx.changes import calls_seen_by
from lora_fx.deltas import schedules
from lora_fx.graph import views
from lora_fx.model import classes

_TORCH = os.path.dirname(torch.__file__)
_NN_MODULES = os.path.join(_TORCH, "nn", "modules")
_FX = os.path.join(_TORCH, "fx")
_STANDARD = os.path.dirname(os.__file__) + os.sep
_OWN = tuple(os.path.dirname(m) + os.sep for m in (views.__file__, schedules.__file__, classes.__file__, __file__))

#: instructions that compute with locals, or whose names are looked at; several Pythons' together
_INSTRUCTIONS = frozenset({
    "RESUME", "NOP", "CACHE", "EXTENDED_ARG", "POP_TOP", "PUSH_NULL", "COPY", "SWAP", "PRECALL", "CALL", "CALL_KW",
    "CALL_FUNCTION_EX", "KW_NAMES", "LOAD_CONST", "LOAD_FAST", "LOAD_FAST_CHECK", "LOAD_FAST_AND_CLEAR",
    "LOAD_FAST_LOAD_FAST", "STORE_FAST", "STORE_FAST_LOAD_FAST", "STORE_FAST_STORE_FAST", "DELETE_FAST",
    "LOAD_CLOSURE", "MAKE_CELL", "COPY_FREE_VARS", "STORE_DEREF", "LOAD_DEREF", "LOAD_GLOBAL", "LOAD_ATTR",
    "LOAD_METHOD", "LOAD_SUPER_ATTR", "BINARY_OP", "BINARY_SUBSCR", "BINARY_SLICE", "STORE_SUBSCR", "STORE_SLICE",
    "UNARY_POSITIVE", "UNARY_NEGATIVE", "UNARY_NOT", "UNARY_INVERT", "TO_BOOL", "COMPARE_OP", "CONTAINS_OP",
    "BUILD_TUPLE", "BUILD_LIST", "BUILD_MAP", "BUILD_SET", "BUILD_CONST_KEY_MAP", "BUILD_SLICE", "BUILD_STRING",
    "LIST_EXTEND", "LIST_APPEND", "LIST_TO_TUPLE", "SET_ADD", "SET_UPDATE", "MAP_ADD", "DICT_UPDATE", "DICT_MERGE",
    "CALL_INTRINSIC_1", "UNPACK_SEQUENCE", "UNPACK_EX", "GET_ITER", "GET_LEN", "FOR_ITER", "END_FOR",
    "JUMP_FORWARD", "JUMP_BACKWARD", "JUMP_BACKWARD_NO_INTERRUPT", "POP_JUMP_IF_TRUE", "POP_JUMP_IF_FALSE",
    "POP_JUMP_FORWARD_IF_TRUE", "POP_JUMP_FORWARD_IF_FALSE", "POP_JUMP_BACKWARD_IF_TRUE",
    "POP_JUMP_BACKWARD_IF_FALSE", "JUMP_IF_TRUE_OR_POP", "JUMP_IF_FALSE_OR_POP", "RETURN_VALUE", "RETURN_CONST",
    "MAKE_FUNCTION", "SET_FUNCTION_ATTRIBUTE", "FORMAT_VALUE", "FORMAT_SIMPLE", "FORMAT_WITH_SPEC", "CONVERT_VALUE",
    "LOAD_ASSERTION_ERROR", "RAISE_VARARGS", "RERAISE",
})  # fmt: skip
#: what an instruction that is not among them does, in words; by a part of its name
_WORDS = {
    "NONE": "tests for None", "IS_OP": "tests for None", "STORE_ATTR": "sets an attribute",
    "DELETE_ATTR": "deletes an attribute", "GLOBAL": "sets a global", "SUBSCR": "deletes an item",
    "WITH": "opens a `with` block", "IMPORT": "imports", "EXC": "handles exceptions", "YIELD": "is a generator",
    "GENERATOR": "is a generator", "MATCH": "matches a pattern", "AWAIT": "waits",
}  # fmt: skip

_IMMUTABLE: tuple[type, ...] = (
    int, float, bool, complex, str, bytes, types.NoneType, torch.dtype, torch.device, torch.layout,
    torch.memory_format, torch.Size,
)  # fmt: skip
_TYPES: frozenset[Any] = frozenset({
    list, dict, set, frozenset, tuple, str, bytes, int, float, bool, complex, slice, range, enumerate, reversed, zip,
    super, torch.Size, torch.device, torch.Tensor,
})  # fmt: skip
_BUILTINS = frozenset({len, abs, sum, min, max, round, divmod, pow, any, all, sorted})
#: torch's functions that make a tensor of none: no argument shows that they are torch's
_FACTORIES = frozenset({
    torch.arange, torch.as_tensor, torch.bartlett_window, torch.blackman_window, torch.empty, torch.empty_strided,
    torch.eye, torch.full, torch.hamming_window, torch.hann_window, torch.kaiser_window, torch.linspace,
    torch.logspace, torch.normal, torch.ones, torch.rand, torch.randint, torch.randn, torch.randperm,
    torch.scalar_tensor, torch.tensor, torch.tril_indices, torch.triu_indices, torch.zeros,
})  # fmt: skip


_OPS = (torch._ops.OpOverload, torch._ops.OpOverloadPacket, CustomOpDef)


class Untraceable(Exception):
    """Why a forward cannot be traced soundly."""


class Watch:
    """Follows one forward through its trace, and stops it at the first step that is not on the list.

    Args:
        attribute: what stands in the trace for the tensor of this name of this module.
    """

    def __init__(self, root: nn.Module, attribute: Callable[[nn.Module, str], Any]) -> None:
        forward = type(root).forward
        if not isinstance(forward, types.FunctionType):
            raise Untraceable(f"{type(root).__name__}.forward is a {type(forward).__name__}")
        if not _is_plain(forward):
            raise Untraceable(f"{forward.__qualname__} has a default that can change")
        for kind in {type(module) for module in root.modules()}:
            if kind.__getattribute__ is not object.__getattribute__:  # type: ignore[comparison-overlap]  # its own
                raise Untraceable(f"{kind.__name__} reads attributes in a way of its own")
        self.root = root
        self._first = _place(forward.__code__)
        self.attribute = attribute
        self.touched: dict[tuple[nn.Module, str], None] = {}
        """What has been read off modules, by model code."""
        self.named: dict[tuple[int, str, tuple[str, ...]], dict[str, Any]] = {}
        """What model code has looked up: id of the scope, name, attributes from there on → the scope."""
        self.lasting = True
        """Nothing came from a closure, which nobody can look into later."""
        self.read: set[str] = set()
        """Immutable attributes and methods of the module, which the trace has baked in."""
        self.why = ""
        self._frames: list[FrameType] = []  # of model code, also those that have ended
        self._inner: set[Any] = set()  # code of functions that model code makes

    @contextmanager
    def following(self) -> Iterator[None]:
        """Inside, model code of this thread is followed."""
        read = self._reader()
        kinds: set[Any] = {type(module) for module in self.root.modules()}
        for kind in kinds:
            assert kind.__getattribute__ in (object.__getattribute__, read), "in turn: one trace at a time"
            type.__setattr__(kind, "__getattribute__", read)  # a class of ours may hand on what is set
        try:
            with calls_seen_by(self._see):
                yield
        finally:
            for kind in kinds:
                type.__delattr__(kind, "__getattribute__")
            if self.why:
                raise Untraceable(self.why)

    def refuse(self, why: str) -> None:
        self.why = self.why or why
        raise Untraceable(self.why)

    def follows_torch(self, frame: FrameType) -> bool:
        """Whether this frame, of a mode, hears of a call of torch that model code itself has made."""
        heard, entry = frame.f_code, frame
        while entry.f_back not in self._frames:
            if entry.f_back is None:
                return False
            entry = entry.f_back
        return entry.f_code is heard or entry.f_code in _torch_code()

    def _see(self, frame: FrameType) -> None:
        """Follow a call: of code of the model, or by it. What such code calls is none of it any more."""
        code = frame.f_code
        by_model = frame.f_back in self._frames
        if not (by_model or (not self._frames and _place(code) == self._first)):
            return
        if is_model_file(code.co_filename):
            if why := _why_not(frame, code in self._inner):
                self.refuse(f"{code.co_qualname} {why}")
            self._note_names(frame, code in self._inner)
            self._inner.update(inner for inner in code.co_consts if isinstance(inner, CodeType))
            self._frames.append(frame)
        elif code not in _torch_code() and not code.co_filename.startswith((*_OWN, _FX)):
            self.refuse(f"it calls {code.co_qualname}")

    def _note_names(self, frame: FrameType, inner: bool) -> None:
        for name, path, free in _chains(frame.f_code):
            if not free:
                self.named[id(frame.f_globals), name, path] = frame.f_globals
            elif not (inner or name == "__class__"):
                self.lasting = False

    def _reader(self) -> Callable[[nn.Module, str], Any]:
        def __getattribute__(module: nn.Module, name: str) -> Any:
            if sys._getframe(1) in self._frames:
                return self._value(module, name)
            return object.__getattribute__(module, name)

        return __getattribute__

    def _value(self, module: nn.Module, name: str) -> Any:
        """What model code gets for `module.<name>`."""
        own, kind = vars(module), type(module)
        self.touched[module, name] = None
        spec = classes.spec_of(module)
        if spec is not None and any(name == attribute for attribute, *_ in spec.reads):
            return object.__getattribute__(module, name)
        if name in own["_parameters"] or name in own["_buffers"] or isinstance(own.get(name), torch.Tensor):
            return self.attribute(module, name)
        if own["_modules"].get(name) is not None:
            return own["_modules"][name]
        what = f"{name} of {kind.__name__}"
        if name == "training":
            self.refuse(f"tests training of {kind.__name__}")
        if name in own:
            if module is not self.root or not _is_immutable(own[name]):
                self.refuse(f"reads {what}, a {type(own[name]).__name__}")
            self.read.add(name)
            return own[name]
        found = inspect.getattr_static(kind, name, None)
        function = found.__func__ if isinstance(found, staticmethod) else found
        if module is not self.root or not isinstance(function, types.FunctionType) or not _is_plain(function):
            self.refuse(f"reads {what}, a {type(found).__name__}" if found is not None else f"there is no {what}")
        self.read.add(name)
        return object.__getattribute__(module, name)


def _place(code: CodeType) -> tuple[Any, ...]:
    """Where it is written: fx makes a copy of the code of a forward that has `*args`."""
    return code.co_filename, code.co_firstlineno, code.co_qualname


# ── what code names ──────────────────────────────────────────────────────────────────────────────────────────────────


@lru_cache(maxsize=4096)
def is_model_file(file: str) -> bool:
    """Whether code of this file belongs to a model, and not to what runs it."""
    if file.startswith(_NN_MODULES):
        return not file.endswith(("module.py", "container.py", "dropout.py", "utils.py"))
    if file.startswith(("<frozen", _TORCH + os.sep)) or file.startswith(_OWN):
        return False
    return not file.startswith(_STANDARD) or "site-packages" in file  # those lie inside the standard library's folder


def _why_not(frame: FrameType, inner: bool) -> str:
    """What in the code that is about to run could go another way on the next call; empty if nothing.

    Args:
        inner: the code is a function that model code has made: what it takes from the one around it are locals.
    """
    code = frame.f_code
    if why := _forbidden(code):
        return why
    for name, path, free in _chains(code):
        if free and (inner or name == "__class__"):
            continue
        scope = frame.f_locals if free else frame.f_globals
        value = scope.get(name, frame.f_builtins.get(name, _Missing))
        if not _may_be_named(value, path):
            return f"uses {'.'.join((name, *path))}"
        if value is super and (found := _beside_methods(frame)):
            return f"reads {found} of its class"
    return ""


def _beside_methods(frame: FrameType) -> str:
    """What the code reads off `super()` that is no method."""
    first = frame.f_locals.get(frame.f_code.co_varnames[0]) if frame.f_code.co_argcount else None
    for name in _read_above(frame.f_code):
        found = [vars(base)[name] for base in type(first).__mro__ if name in vars(base)]
        if not all(isinstance(value, types.FunctionType | property) for value in found):
            return name
    return ""


@lru_cache(maxsize=4096)
def _read_above(code: CodeType) -> frozenset[str]:
    """The attributes that follow a `super()`; all there are, where it is used otherwise."""
    found, above = set(), False
    for step in dis.get_instructions(code):
        if step.opname == "LOAD_GLOBAL" and step.argval == "super":
            above = True
        elif above and step.opname in ("LOAD_ATTR", "LOAD_METHOD", "LOAD_SUPER_ATTR"):
            found.add(step.argval)
            above = False
        elif above and step.opname not in ("PUSH_NULL", "PRECALL", "CALL", "LOAD_DEREF", "LOAD_FAST", "EXTENDED_ARG"):
            return frozenset(code.co_names)
    return frozenset(found)


def _may_be_named(value: Any, path: tuple[str, ...]) -> bool:
    owner = None
    for name in path:
        owner, value = value, getattr(value, name, _Missing)
    if isinstance(value, types.FunctionType):
        return _is_plain(value)
    if owner in (torch, math) and isinstance(value, torch.dtype | torch.layout | torch.memory_format | float):
        return True
    if isinstance(value, types.BuiltinFunctionType):
        return _is_known(value)
    if isinstance(value, type):
        return value in _TYPES or (issubclass(value, Exception) and value.__module__ == "builtins")
    return isinstance(value, _OPS) or (owner is torch.Tensor and value in _torch_functions())


def _is_plain(function: types.FunctionType) -> bool:
    """Nothing can change in it but its code: no attribute, and no default that can."""
    if function.__code__.co_filename.startswith(_FX) and hasattr(
        function, "__wrapped__"
    ):  # math.sqrt, for as long as fx traces
        return True
    defaults = (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values())
    return (not vars(function) or function.__module__.startswith("torch")) and all(map(_is_immutable, defaults))


def _is_immutable(value: Any) -> bool:
    if isinstance(value, tuple | frozenset) and type(value) in (tuple, frozenset):
        return all(map(_is_immutable, value))
    if isinstance(value, types.FunctionType):
        return _is_plain(value)
    return type(value) in _IMMUTABLE or (isinstance(value, types.BuiltinFunctionType) and _is_known(value))


def _is_known(function: types.BuiltinFunctionType) -> bool:
    """Torch's functions that are nodes, and what computes with numbers."""
    return function in _torch_functions() or function in _BUILTINS or function.__self__ in (math, operator)


@cache
def _torch_functions() -> frozenset[Any]:
    """Torch's functions that a call of is a node."""
    return frozenset(overrides.get_testing_overrides()) | _FACTORIES


@cache
def _torch_code() -> frozenset[CodeType]:
    functions = (*_torch_functions(), *(op.__call__ for op in _OPS))
    return frozenset(f.__code__ for f in functions if isinstance(f, types.FunctionType))


class _Missing:
    """No such name."""


@lru_cache(maxsize=4096)
def _forbidden(code: CodeType) -> str:
    """The instruction that this code may not have, in words."""
    for step in dis.get_instructions(code):
        if step.opname not in _INSTRUCTIONS:
            words = (text for part, text in _WORDS.items() if part in step.opname)
            return next(words, f"has the instruction {step.opname}")
        if step.opname == "BINARY_OP" and step.argrepr.endswith("="):
            return f"changes a value in place, by {step.argrepr}"
        if step.opname == "STORE_DEREF" and step.argval in code.co_freevars:
            return f"sets {step.argval} of the function around it"
        if step.opname == "CALL_INTRINSIC_1" and "LIST_TO_TUPLE" not in step.argrepr:
            return f"has the instruction {step.argrepr}"
    dunder = [name for name in code.co_names if name.startswith("__")]
    return f"reads {dunder[0]}" if dunder else ""


@lru_cache(maxsize=4096)
def _chains(code: CodeType) -> tuple[tuple[str, tuple[str, ...], bool], ...]:
    """The names that the code takes from outside, with the attributes that it reads off each: torch, (nn, functional);
    and whether it is of a function around it."""
    found: list[tuple[str, tuple[str, ...], bool]] = []
    grows = False
    for step in dis.get_instructions(code):
        if step.opname in ("LOAD_GLOBAL", "LOAD_DEREF"):
            grows = step.opname == "LOAD_GLOBAL" or step.argval in code.co_freevars
            if grows:
                found.append((step.argval, (), step.opname == "LOAD_DEREF"))
        elif grows and step.opname in ("LOAD_ATTR", "LOAD_METHOD"):
            name, path, free = found[-1]
            found[-1] = (name, (*path, step.argval), free)
        elif step.opname not in ("EXTENDED_ARG", "NOP", "CACHE"):
            grows = False
    return tuple(dict.fromkeys(found))
