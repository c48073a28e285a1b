"""A change of a model: by one thread at a time, while the model rests, and wholly or not at all.

Every verb that changes a model (apply, load_adapter, activate, switch, remove, fold, unfold) does so inside `changing`:

* **one at a time:** verbs wait for each other, whichever thread calls them and on whichever model;
* **while the model rests:** a verb refuses when a thread is inside a forward of one of the model's modules, or inside a
  hook of one. It looks at the threads' stacks once, when it starts, so a forward costs nothing. The limit: a forward
  that another thread *starts* while a verb runs is not seen; whoever shares a model among threads keeps them apart;
* **wholly or not at all:** whatever ends a verb early (an error, no memory, Ctrl-C) leaves the model bitwise what it
  was: classes, graphs, adapters, marks, flags, and every weight. The gradient mode, too, is what it was;
* **stopped where it can stop:** a verb patches torch for a while, in many places. So signals that Python code handles
  (Ctrl-C, a timer's) wait, and their handlers run at the next `safe_point`: between two passes, two modules, two blocks
  of a weight, two nodes that are recorded. A third Ctrl-C, while two wait, is let in where it comes, and may leave
  torch patched; undoing a change, and a large final fold, let in none. What another thread throws into this one
  (`PyThreadState_SetAsyncExc`) is no signal, and does not wait: the model is undone, but torch may be left patched.
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
from lora_fx.walking import modules_of

Undo = Callable[[], Any]

_RUNS = frozenset({"_call_impl", "forward", "generate"})  # functions that run a model, given as their first argument
_TABLES = ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set")

_KINDS_OF_TABLES = (dict, set)

_LOOK = 0.1  # seconds after which who waits for its turn looks for signals
_INSISTS = 3  # how many Ctrl-C it takes to stop a verb that comes to no safe point
_NUMBERS = tuple(sorted(signal.valid_signals()))

_lock = threading.RLock()
_open: list[tuple[nn.Module, list[Undo]]] = []  # the changes in progress, outermost first, of the thread with the lock


class _Verbs:
    """Of the process, whichever thread they run in."""

    number = 0
    """Of the outermost one that runs."""


_verbs = _Verbs()


@contextmanager
def in_turn() -> Iterator[None]:
    """Inside, no other thread's verb runs, and signals wait for a safe point."""
    with signals_wait():
        inner = _lock._is_owned()  # type: ignore[attr-defined]  # not in its stub
        while not _lock.acquire(timeout=_LOOK):
            safe_point()
        try:
            if not inner:
                _open.clear()
                _verbs.number += 1
            yield
        finally:
            _lock.release()


def verb_number() -> int | None:
    """Another one for each outermost verb of the process; None where this thread is inside of none."""
    return _verbs.number if _lock._is_owned() else None  # type: ignore[attr-defined]


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
        before, random_state = _Before(model), torch.get_rng_state()
        _open.append((model, undo))
        try:
            yield undo
            safe_point()  # the last from which there is a way back
        except BaseException as error:
            if isinstance(error, MemoryError | RuntimeError):
                traceback.clear_frames(error.__traceback__)  # they hold the tensors that filled the memory
            with uninterrupted():
                _roll_back(undo)
                before.restore()
                torch.set_rng_state(random_state)  # fresh factors were drawn from it
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
        while len(undo) > outer:  # an exception of another thread may come in here
            undo[-1]()
            undo.pop()


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


# ── signals ──────────────────────────────────────────────────────────────────────────────────────────────────────────


class _Signals(threading.local):
    """Python runs signal handlers in the main thread, and in no other."""

    def __init__(self) -> None:
        self.waits = 0
        """How many blocks are open in which signals wait: while there is one, handlers run at safe points."""
        self.shut = 0
        """How many of them have no safe points."""
        self.foreign = 0
        """How many blocks of code are open that may catch an `Exception` for its own."""
        self.wrapped: dict[int, _Waiter] = {}
        self.arrived: list[_Waiter] = []


_signals = _Signals()


@dataclass(eq=False)
class _Waiter:
    """Stands in the place of a signal's handler. One check tells whether it waits, so it may be put there, and taken
    out, while signals come."""

    number: int
    handler: Callable[[int, FrameType | None], Any]
    times: int = 0
    """How often the signal has come since it was let in."""

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if not _signals.waits:
            self.handler(number, frame)
            return
        self.times += 1
        if self.times == 1:
            _signals.arrived.append(self)
        if self.times >= _INSISTS and number == signal.SIGINT and not _signals.shut:
            self._insist(frame)

    def _insist(self, frame: FrameType | None) -> None:
        _signals.arrived.remove(self)
        self.times = 0
        try:
            self.handler(self.number, frame)
        except BaseException as error:
            error.add_note("lora_fx was not at a safe point: torch may be left patched, so start a new process.")
            raise


@contextmanager
def signals_wait(safe_points: bool = True) -> Iterator[None]:
    """Inside, signals that Python code handles wait for the next safe point, or the end of the outermost block."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    shut = not safe_points
    _signals.waits += 1
    _signals.shut += shut
    try:
        if _signals.waits == 1:
            _wrap_handlers()
        yield
    finally:
        _signals.shut -= shut
        try:
            if _signals.waits == 1:
                _give_back_handlers()
        finally:
            _signals.waits -= 1
            if not _signals.waits:
                safe_point()


def uninterrupted() -> AbstractContextManager[None]:
    """Inside, signals that Python code handles wait for the end, whatever safe points there are."""
    return signals_wait(safe_points=False)


def safe_point() -> None:
    """Here a verb can be stopped: run the handlers of the signals that wait. What one raises ends the verb."""
    if _signals.arrived and not _signals.shut:
        due, _signals.arrived = _signals.arrived, []
        _let_in(due, sys._getframe(1))


def _let_in(due: list[_Waiter], frame: FrameType) -> None:
    """In their order, each of them; an exception is the context of a later one's."""
    if not due:
        return
    due[0].times = 0
    try:
        due[0].handler(due[0].number, frame)
    except Exception as error:
        if _signals.foreign:
            raise _Passing(error) from error
        raise
    finally:
        _let_in(due[1:], frame)


class _Passing(BaseException):
    """Carries an `Exception` of a handler through code that would take it for its own."""

    def __init__(self, error: Exception) -> None:
        self.error = error


@contextmanager
def foreign() -> Iterator[None]:
    """Inside runs code that may catch an `Exception`, torch's or a model's: one of a signal's handler goes through."""
    before = _signals.foreign
    try:
        _signals.foreign = before + 1
        yield
    except _Passing as passing:
        if before:
            raise
        raise passing.error from passing.error.__cause__
    finally:
        _signals.foreign = before


def _wrap_handlers() -> None:
    for number in _NUMBERS:
        handler = signal.getsignal(number)
        if isinstance(handler, _Waiter):  # one that could not be taken out
            handler = handler.handler
        if callable(handler):
            _signals.wrapped[number] = _Waiter(number, handler)
            signal.signal(number, _signals.wrapped[number])


def _give_back_handlers() -> None:
    """But for those that were set in the meantime. One that is back may raise before the others are: then once more."""
    try:
        _give_back()
    finally:
        _give_back()
        _signals.wrapped.clear()


def _give_back() -> None:
    for number, waiter in _signals.wrapped.items():
        handler = waiter.handler
        if signal.getsignal(number) is waiter:
            signal.signal(number, handler)


# ── what a model was ─────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Switch:
    """Something that is turned for a while, such as one of torch's own switches."""

    read: Callable[[], Any]
    turn: Callable[[Any], Any]

    @contextmanager
    def set_for_now(self, value: Any) -> Iterator[None]:
        before = self.read()
        try:
            self.turn(value)
            yield
        finally:
            self.turn(before)


GRADIENTS = Switch(torch.is_grad_enabled, torch.set_grad_enabled)
FAST_PATHS = Switch(torch.backends.mha.get_fastpath_enabled, torch.backends.mha.set_fastpath_enabled)
ONEDNN = Switch(torch._C._get_mkldnn_enabled, torch._C._set_mkldnn_enabled)


def onednn_has(dtype: torch.dtype) -> bool:
    """Whether oneDNN multiplies in this dtype on this CPU."""
    if dtype == torch.bfloat16:
        return torch._C._has_mkldnn and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    if dtype == torch.float16:
        return torch._C._has_mkldnn and torch.ops.mkldnn._is_mkldnn_fp16_supported()
    return torch._C._has_mkldnn


TRACER = Switch(sys.gettrace, sys.settrace)
PROFILER = Switch(sys.getprofile, sys.setprofile)


def calls_seen_by(see: Callable[[FrameType], Any]) -> AbstractContextManager[None]:
    """Inside, `see(frame)` gets each call of a Python function in this thread, before it runs.

    Python has two places for that. A profiler in C (cProfile, pyinstrument, VizTracer, yappi) cannot be put back into
    its own from Python, and need not be seen there; a tracer (a debugger, coverage) can. So the tracer's place is taken
    where it is free, and otherwise the profiler's, unless that has a profiler in C.
    """

    def seen(frame: FrameType, event: str, arg: Any) -> None:
        if event == "call":
            see(frame)

    written_in_c = not (PROFILER.read() is None or callable(PROFILER.read()))
    return (TRACER if TRACER.read() is None or written_in_c else PROFILER).set_for_now(seen)


class _Before:
    """What the modules of a model are and hold: references alone, no number is copied. And torch's own switches.

    An exception in the `__exit__` of a `torch.no_grad()` leaves gradients off, for whatever runs next.
    """

    def __init__(self, model: nn.Module) -> None:
        self.switches = [(switch, switch.read()) for switch in (GRADIENTS, FAST_PATHS, ONEDNN)]
        modules = modules_of(model)
        self.modules = [(m, type(m), _tables(m)) for m in modules]
        # A GraphModule has a class of its own, which is given another forward with each graph.
        classes = [type(m) for m in modules if isinstance(m, fx.GraphModule)]
        self.forwards = [(cls, vars(cls)["forward"]) for cls in classes if "forward" in vars(cls)]
        self.trainable = [(p, p.requires_grad) for m in modules for p in m._parameters.values() if p is not None]

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
    own = module.__dict__
    tables = [own, *[own.get(key) for key in _TABLES]]
    if isinstance(module, fx.GraphModule):
        tables += [module.meta, *module.meta.values()]
    return [(table, table.copy() if table else ()) for table in tables if isinstance(table, _KINDS_OF_TABLES)]


# ── who runs it ──────────────────────────────────────────────────────────────────────────────────────────────────────


def _refuse_running(model: nn.Module, verb: str) -> None:
    """Another thread may also be inside a module around the model; this one's own caller knows what it does."""
    paths: dict[int, str] = {}  # made when a thread runs a model at all
    names = {t.ident: t.name for t in threading.enumerate()}
    mine = "call it after that forward, not in it or in a hook"
    theirs = "wait until that forward has returned: join the thread, or take one lock for forwards and changes"
    for thread, frame in sys._current_frames().items():
        own = thread == threading.get_ident()
        who = "this thread" if own else f"thread {names.get(thread, str(thread))!r}"
        for module in _running(frame):
            paths = paths or {id(m): name or "the model" for name, m in model.named_modules()}
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
