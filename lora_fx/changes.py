"""A change of a model: by one thread at a time, while the model rests, and wholly or not at all.

Every verb that changes a model (apply, load_adapter, activate, switch, remove, fold, unfold) does so inside `changing`:

* **one at a time:** verbs wait for each other, whichever thread calls them and on whichever model;
* **while the model rests:** a verb refuses when a thread is inside a forward of one of the model's modules, or inside a
  hook of one. It looks at the threads' stacks once, when it starts, so a forward costs nothing. The limit: a forward
  that another thread *starts* while a verb runs is not seen; whoever shares a model among threads keeps them apart;
* **wholly or not at all:** whatever ends a verb early (an error, no memory, Ctrl-C) leaves the model bitwise what it
  was: classes, graphs, adapters, marks, flags, and every weight. The gradient mode, too, is what it was.
"""

from __future__ import annotations

import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch
from torch import fx, nn

from lora_fx.errors import LoraFxError

Undo = Callable[[], Any]

_RUNS = frozenset({"_call_impl", "forward", "generate"})  # functions that run a model, given as their first argument
_TABLES = ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set")

_lock = threading.RLock()
_open: list[tuple[nn.Module, list[Undo]]] = []  # the changes in progress, outermost first, of the thread with the lock


@contextmanager
def in_turn() -> Iterator[None]:
    """Inside, no other thread's verb runs."""
    inner = _lock._is_owned()  # type: ignore[attr-defined]  # not in its stub
    with _lock:
        if not inner:
            _open.clear()
        yield


@contextmanager
def alone(model: nn.Module, verb: str) -> Iterator[None]:
    """Inside, no other thread's verb runs; the model was at rest when it began.

    Raises:
        LoraFxError: a thread is inside a forward of one of the model's modules.
    """
    with in_turn():
        _refuse_running(model, verb)
        yield


@contextmanager
def changing(model: nn.Module, verb: str) -> Iterator[list[Undo]]:
    """Inside, the model may be changed; when an exception leaves the block, it is bitwise what it was.

    What modules are and hold is put back here. Whoever writes into a tensor's numbers first appends to the list that
    this gives how to undo that: a call that allocates little, and does no harm when the write has not happened.
    A change inside another one of the same model is a part of it.
    """
    with alone(model, verb):
        outer = next((undo for open_, undo in _open if open_ is model), None)
        if outer is not None:
            yield outer
            return
        undo: list[Undo] = []
        before = _Before(model)
        _open.append((model, undo))
        try:
            yield undo
        except BaseException as error:
            if isinstance(error, MemoryError | RuntimeError):
                traceback.clear_frames(error.__traceback__)  # they hold the tensors that filled the memory
            with uninterrupted():
                _roll_back(undo)
                before.restore()
            if not isinstance(error, LoraFxError):
                error.add_note(f"lora_fx has undone this {verb}: the model is bitwise what it was.")
            raise
        finally:
            _open.pop()


@contextmanager
def borrowed(model: nn.Module) -> Iterator[None]:
    """Inside a change, for a part of it: whatever modules become and hold in here, afterwards they are as before."""
    before = _Before(model)
    try:
        yield
    finally:
        before.restore()


@contextmanager
def undone(undo: list[Undo]) -> Iterator[None]:
    """Inside a change, for a part of it: what its list gets in here is undone afterwards, or else with the change."""
    outer = len(undo)
    try:
        yield
    finally:
        while len(undo) > outer:  # Ctrl-C may come in here
            undo[-1]()
            undo.pop()


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Signals that Python code handles (Ctrl-C is one) wait until the block has run."""
    if threading.current_thread() is not threading.main_thread():
        yield  # Python runs signal handlers in the main thread alone
        return
    arrived: list[int] = []
    handlers = {s: h for s in signal.valid_signals() if callable(h := signal.getsignal(s))}
    try:
        for number in handlers:
            signal.signal(number, lambda n, frame: arrived.append(n))
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for late in dict.fromkeys(arrived):
            signal.raise_signal(late)


def _roll_back(undo: list[Undo]) -> None:
    while undo:
        try:
            undo[-1]()
        except Exception as error:
            raise LoraFxError(
                f"a change failed, and undoing it failed too: {error}",
                place="the model",
                remedy="its weights are no longer what they were: load them again",
            ) from error
        undo.pop()


# ── what a model was ─────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Switch:
    """Something that is turned for a while, such as one of torch's own switches."""

    read: Callable[[], Any]
    turn: Callable[[Any], Any]

    @contextmanager
    def set_for_now(self, value: Any) -> Iterator[None]:
        before = self.read()
        self.turn(value)
        try:
            yield
        finally:
            self.turn(before)


GRADIENTS = Switch(torch.is_grad_enabled, torch.set_grad_enabled)
FAST_PATHS = Switch(torch.backends.mha.get_fastpath_enabled, torch.backends.mha.set_fastpath_enabled)
ONEDNN = Switch(torch._C._get_mkldnn_enabled, torch._C._set_mkldnn_enabled)
TRACER = Switch(sys.gettrace, sys.settrace)
PROFILER = Switch(sys.getprofile, sys.setprofile)


def calls_seen_by(see: Callable[[FrameType, str, Any], Any]) -> AbstractContextManager[None]:
    """Inside, `see(frame, event, arg)` gets each "call" and "return" of a Python function in this thread.

    Python has two places for that. A profiler in C (cProfile, pyinstrument, VizTracer, yappi) cannot be put back into
    its own from Python, and need not be seen there; a tracer (a debugger, coverage) can. So the tracer's place is taken
    where it is free, and otherwise the profiler's, unless that has a profiler in C.
    """

    def profile(frame: FrameType, event: str, arg: Any) -> None:
        if event in ("call", "return"):
            see(frame, event, arg)

    def trace(frame: FrameType, event: str, arg: Any) -> Any:
        frame.f_trace_lines = False
        profile(frame, event, arg)
        return trace

    written_in_c = not (PROFILER.read() is None or callable(PROFILER.read()))
    if TRACER.read() is None or written_in_c:
        return TRACER.set_for_now(trace)
    return PROFILER.set_for_now(profile)


class _Before:
    """What the modules of a model are and hold: references alone, no number is copied. And torch's own switches.

    Ctrl-C in the `__exit__` of a `torch.no_grad()` leaves gradients off, for whatever runs next.
    """

    def __init__(self, model: nn.Module) -> None:
        self.switches = [(switch, switch.read()) for switch in (GRADIENTS, FAST_PATHS, ONEDNN)]
        self.modules = [(m, type(m), _tables(m)) for m in model.modules()]
        # A GraphModule has a class of its own, which is given another forward with each graph.
        classes = [type(m) for m in model.modules() if isinstance(m, fx.GraphModule)]
        self.forwards = [(cls, vars(cls)["forward"]) for cls in classes if "forward" in vars(cls)]
        self.trainable = [(p, p.requires_grad) for p in model.parameters()]

    def restore(self) -> None:
        for switch, was in self.switches:
            switch.turn(was)
        for module, cls, tables in self.modules:
            if type(module) is not cls:
                module.__class__ = cls
            for table, was in tables:
                table.clear()
                table.update(was)
        for graph_class, forward in self.forwards:
            graph_class.forward = forward
        for parameter, was in self.trainable:
            if parameter.requires_grad != was:
                parameter.requires_grad_(was)


def _tables(module: nn.Module) -> list[tuple[Any, Any]]:
    """The dictionaries that a module keeps its parts in, with copies; a GraphModule's meta has our marks in one."""
    tables = [module.__dict__, *(module.__dict__.get(key) for key in _TABLES)]
    if isinstance(module, fx.GraphModule):
        tables += [module.meta, *module.meta.values()]
    return [(table, table.copy()) for table in tables if isinstance(table, dict | set)]


# ── who runs it ──────────────────────────────────────────────────────────────────────────────────────────────────────


def _refuse_running(model: nn.Module, verb: str) -> None:
    """Another thread may also be inside a module around the model; this one's own caller knows what it does."""
    paths = {id(m): name or "the model" for name, m in model.named_modules()}
    names = {t.ident: t.name for t in threading.enumerate()}
    mine = "call it after that forward, not in it or in a hook"
    theirs = "wait until that forward has returned: join the thread, or take one lock for forwards and changes"
    for thread, frame in sys._current_frames().items():
        own = thread == threading.get_ident()
        who = "this thread" if own else f"thread {names.get(thread, str(thread))!r}"
        for module in _running(frame):
            if any(id(m) in paths for m in ([module] if own else module.modules())):
                raise LoraFxError(
                    f"{verb} would change the model while {who} is inside a forward of {type(module).__name__}",
                    place=paths.get(id(module), "a module around the model"),
                    remedy=mine if own else theirs,
                )


def _running(frame: FrameType | None) -> Iterator[nn.Module]:
    """The modules whose forwards a stack is inside of, innermost first."""
    while frame is not None:
        code = frame.f_code
        if code.co_name in _RUNS and code.co_argcount:
            first = frame.f_locals.get(code.co_varnames[0])
            if isinstance(first, nn.Module):
                yield first
        frame = frame.f_back
