"""Signals at random moments of every verb, and what the model, torch and the files are afterwards:

    python -m tests.interrupts [--count 2000] [--seed 0] [--only apply,certify] [--forked]

A moment is a time (when a timer's signal comes), a line of Python anywhere in the verb, in torch and in the standard
library too, or a bytecode where something is entered, left or patched. The handler raises a `KeyboardInterrupt`, as
Ctrl-C does, or a `TimeoutError`, which a model or torch may catch. After each, the model has to be bitwise the old or
the new one, torch as it was, files whole or not there, and the verb has to work. All interrupts come to one process,
which at the end runs, adapts and folds every model of the zoo. `--forked` gives each of them a process of its own, to
count those that would have broken it.
"""

from __future__ import annotations

import argparse
import builtins
import copy
import gc
import json
import logging
import math
import os
import random
import signal
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.fx import _symbolic_trace
from torch.fx.experimental import proxy_tensor
from torch.nn.modules import module as torch_hooks

import lora_fx
from lora_fx import changes
from lora_fx.graph.capture import output_tensors, recording
from lora_fx.tables import table
from tests import reference, test_faults
from tests.registry import one_registry
from tests.test_faults import IDS, RULES, UNTOUCHED, Look, adapted, contents, small, switches, whole
from tests.zoo import ZOO, call


@dataclass(frozen=True, eq=False)
class Verb:
    """What is interrupted: `run` gets the model, and a folder to write into."""

    name: str
    share: float
    """Of the interrupts, relative to the shares of the others."""
    make: Callable[[], nn.Module]
    run: Callable[[nn.Module, Path], Any]
    draws: bool = False
    """It moves the random state."""

    def ready(self) -> nn.Module:
        return copy.deepcopy(_made(self.make))

    def __call__(self, model: nn.Module, folder: Path) -> None:
        torch.manual_seed(0)
        self.run(model, folder)


@cache
def _made(make: Callable[[], nn.Module]) -> nn.Module:
    return make()


@cache
def _scratch() -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory()


@cache
def _saved() -> Path:
    lora_fx.save_adapter(adapted(), Path(_scratch().name) / "a", name="one", peft=False)
    return Path(_scratch().name) / "a"


_SHARES = {"apply": 7, "certify": 5, "fold": 5, "unfold": 2, "switch": 2, "apply, another": 1}
VERBS = (
    Verb("capture", 5, small, lambda model, _: lora_fx.capture(model, IDS)),
    Verb("plan", 1, small, lambda model, _: lora_fx.plan(model, RULES, IDS)),
    *(
        Verb(name, _SHARES.get(name, 0.5), make, lambda model, _, run=run: run(model), name.startswith("apply"))
        for name, (make, run) in (test_faults.VERBS | test_faults.CHECKS).items()
    ),
    Verb("verify", 1, small, lambda model, _: lora_fx.verify(model, model, IDS)),
    Verb("save_adapter", 1, adapted, lambda model, at: lora_fx.save_adapter(model, at / "a", name="one", peft=False)),
    Verb("load_adapter", 1, small, lambda model, _: lora_fx.load_adapter(model, _saved(), IDS), draws=True),
    Verb("export_onnx", 2.5, adapted, lambda model, at: lora_fx.export_onnx(model, IDS, at / "m.onnx")),
)


# ── the moment ───────────────────────────────────────────────────────────────────────────────────────────────────────


class Handler:
    """Of the signal; it raises."""

    def __init__(self, error: BaseException) -> None:
        self.error, self.called = error, 0

    def __call__(self, number: int, frame: FrameType | None) -> None:
        self.called += 1
        raise self.error


class At:
    """A signal when so many seconds have gone."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def __enter__(self) -> None:
        signal.setitimer(signal.ITIMER_REAL, self.seconds)

    def __exit__(self, *_: Any) -> None:
        signal.setitimer(signal.ITIMER_REAL, 0)


_ENTERS = frozenset({"__enter__", "__exit__", "__init__", "close", "pop", "remove", "restore", "helper", "trace"})
_PATCH = (
    "contextlib.py", "_symbolic_trace.py", "proxy_tensor.py", "_python_dispatch.py", "overrides.py", "grad_mode.py",
    "changes.py", "capture.py", "classes.py", "files.py", "folder.py", "tempfile.py",
)  # fmt: skip


class In:
    """A signal in the nth function that is called, so many steps into it.

    Args:
        narrow: count only the functions that enter, leave or patch something, and bytecodes in the place of lines.
        call: n, from 0; -1 to count them all.
    """

    def __init__(self, narrow: bool, call: int = -1, steps: int = 0) -> None:
        self.narrow, self.call, self.steps, self.seen = narrow, call, steps, 0

    def __enter__(self) -> In:
        self.before = sys.gettrace()
        sys.settrace(self._called)
        return self

    def __exit__(self, *_: Any) -> None:
        sys.settrace(self.before)

    def _called(self, frame: FrameType, event: str, arg: Any) -> Any:
        if frame.f_code in UNTOUCHED or (self.narrow and not _is_narrow(frame)):
            return None
        self.seen += 1
        if self.seen - 1 != self.call:
            return None
        frame.f_trace_opcodes = self.narrow
        return self._step

    def _step(self, frame: FrameType, event: str, arg: Any) -> Any:
        if event in ("opcode" if self.narrow else "line", "return") and self.steps >= 0:
            self.steps = -1 if event == "return" else self.steps - 1
            if self.steps < 0:
                signal.raise_signal(signal.SIGALRM)
        return self._step


def _is_narrow(frame: FrameType) -> bool:
    code = frame.f_code
    return code.co_name in _ENTERS or code.co_filename.endswith(_PATCH)


# ── what has to be as it was ─────────────────────────────────────────────────────────────────────────────────────────


def world(random_state: bool) -> dict[str, Any]:
    """What Python, torch and lora_fx keep for the process, or for this thread."""
    modules = (torch_hooks, _symbolic_trace, fx.proxy, proxy_tensor, torch, F, math, builtins)
    owners = (*modules, nn.Module, fx.Tracer, fx.proxy.TracerBase, fx.Graph, torch.Tensor)
    return {
        "functions": {(o.__name__, n): id(v) for o in owners for n, v in vars(o).items() if callable(v)},
        "switches": (*switches(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu")),
        "modes": (torch._C._len_torch_function_stack(), torch._C._len_torch_dispatch_stack()),
        "keys": (str(torch._C._dispatch_tls_local_include_set()), str(torch._C._dispatch_tls_local_exclude_set())),
        "tracing": (
            getattr(_symbolic_trace, "_is_fx_tracing_flag", None), proxy_tensor._CURRENT_MAKE_FX_TRACER,
            torch._guards.TracingContext.try_get(), torch.compiler.is_exporting(), torch.compiler.is_compiling(),
            torch.onnx.is_in_onnx_export(),
        ),
        "hooks": [(k, len(v)) for k, v in vars(torch_hooks).items() if "_global_" in k and isinstance(v, dict)],
        "tools": (sys.getprofile(), sys.gettrace()),
        "handlers": [signal.getsignal(number) for number in signal.valid_signals()],
        "warnings": list(warnings.filters),
        "loggers": [(k, len(v.filters)) for k, v in logging.root.manager.loggerDict.items() if hasattr(v, "filters")],
        "streams": (id(sys.stdout), id(sys.stderr)),
        "collector": gc.isenabled(),
        "lock": changes._lock._is_owned(),  # type: ignore[attr-defined]
        "recording": recording.on,
        "random state": torch.get_rng_state().tolist() if random_state else None,
    }  # fmt: skip


def trouble_with_torch() -> list[str]:
    """What of a fresh module does not work."""
    try:
        module = nn.Sequential(nn.Linear(3, 4), nn.ReLU())
        module(torch.ones(2, 3)).sum().backward()
        traced = fx.symbolic_trace(module).graph
    except BaseException as error:
        return [f"a fresh module raises {error!r}"[:120]]
    return [] if module[0].weight.grad is not None and len(traced.nodes) == 4 else ["a fresh module is not itself"]


def written(folder: Path) -> dict[str, bytes]:
    """The files, each with its bytes in ascending order: safetensors writes its metadata in any."""
    return {name: bytes(sorted(data)) for name, data in contents(folder).items()}


@dataclass(frozen=True)
class Result:
    """What a verb makes of a model and of a folder."""

    whole: list[Any]
    bits: dict[str, torch.Tensor]
    files: dict[str, bytes]

    @classmethod
    def of(cls, model: nn.Module, folder: Path) -> Result:
        return cls(whole(model), reference.bits(model), written(folder))

    def differs(self, other: Result) -> list[str]:
        same = {
            "adapters or classes": self.whole == other.whole,
            "numbers": reference.same_bits(self.bits, other.bits),
            "files": self.files == other.files,
        }
        return [what for what, is_same in same.items() if not is_same]


@dataclass(frozen=True)
class Measured:
    """A verb that ran to its end."""

    result: Result
    seconds: float
    calls: int
    narrow: int

    @classmethod
    def of(cls, verb: Verb) -> Measured:
        def ran(moment: AbstractContextManager[Any]) -> tuple[Result, float]:
            with tempfile.TemporaryDirectory() as folder:
                model = verb.ready()
                with moment:
                    start = time.perf_counter()
                    verb(model, Path(folder))
                    seconds = time.perf_counter() - start
                return Result.of(model, Path(folder)), seconds

        ran(At(0))  # what is imported at the first call
        every, narrow = In(False), In(True)
        ran(every)
        ran(narrow)
        result, seconds = ran(At(0))
        return cls(result, seconds, every.seen, narrow.seen)


@dataclass(frozen=True)
class Outcome:
    """What an interrupt came to."""

    verb: str
    moment: str
    left: str
    """``old`` or ``new``: the model."""
    broken: list[str]


def interrupt(verb: Verb, measured: Measured, draw: random.Random) -> Outcome:
    """One, at the first moment drawn that comes before the end."""
    while True:
        moment = draw.choice(("time", "line", "bytecode"))
        error = draw.choice((KeyboardInterrupt, TimeoutError))("says the handler")
        if moment == "time":
            when: Any = At(draw.random() * measured.seconds)
        else:
            calls, most = (measured.calls, 8) if moment == "line" else (measured.narrow, 60)
            when = In(moment == "bytecode", draw.randrange(calls), draw.randrange(most))
        outcome = _interrupted(verb, measured, moment, when, Handler(error))
        if outcome is not None:
            return outcome


def _interrupted(verb: Verb, measured: Measured, moment: str, when: Any, handler: Handler) -> Outcome | None:
    signal.signal(signal.SIGALRM, handler)
    model = verb.ready()
    torch.manual_seed(0)
    look, before, raised = Look(model), world(not verb.draws), None
    with tempfile.TemporaryDirectory() as at:
        folder = Path(at)
        try:
            with when:
                verb.run(model, folder)
        except BaseException as error:
            raised = error
        if not handler.called:
            if raised is not None:
                raise raised
            return None
        broken = []
        if raised is not handler.error:
            broken.append(f"it came out as {type(raised).__name__}: {raised}".splitlines()[0][:120])
        after = world(not verb.draws)
        broken += [f"{what}: not as before" for what, was in before.items() if was != after[what]]
        left = _left(model, look, folder, measured, broken)
        broken += trouble_with_torch()
    if left == "old":
        with tempfile.TemporaryDirectory() as at:
            try:
                verb(model, Path(at))
                again = Result.of(model, Path(at)).differs(measured.result)
                broken += [f"called again: other {what}" for what in again]
            except BaseException as error:
                broken.append(f"called again: {error!r}"[:120])
    return Outcome(verb.name, moment, left, broken)


def _left(model: nn.Module, look: Look, folder: Path, measured: Measured, broken: list[str]) -> str:
    found = written(folder)
    if found and found != measured.result.files:
        broken.append(f"files: {', '.join(found)}")
    if [path for path in folder.rglob("*") if path.is_dir() and not any(path.iterdir())]:
        broken.append("an empty folder is left")
    if look.same(model):
        return "old"
    try:
        differs = Result(whole(model), reference.bits(model), measured.result.files).differs(measured.result)
    except BaseException as error:
        differs = [repr(error)]
    broken += [f"the model is neither old nor new: {what}" for what in differs]
    return "new"


def forked(function: Callable[[], Outcome]) -> Outcome:
    """What it returns in a process of its own."""
    read, write = os.pipe()
    sys.stdout.flush()
    child = os.fork()
    if not child:
        os.close(read)
        try:
            os.write(write, json.dumps(asdict(function())).encode())
        finally:
            os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        data = pipe.read()
    os.waitpid(child, 0)
    return Outcome(**json.loads(data)) if data else Outcome("", "", "", ["the process died"])


def interrupts(verbs: Sequence[Verb], count: int, seed: int = 0, alone: bool = False) -> Iterator[Outcome]:
    """So many of them, each verb its share, in a random order."""
    draw, handler = random.Random(seed), signal.getsignal(signal.SIGALRM)
    measured = {verb: Measured.of(verb) for verb in verbs}
    turns = [*verbs, *draw.choices(verbs, [verb.share for verb in verbs], k=count)][:count]
    try:
        for verb in turns:
            one = partial(interrupt, verb, measured[verb], random.Random(draw.random()))
            yield forked(one) if alone else one()
    finally:
        signal.signal(signal.SIGALRM, handler)


# ── the zoo ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def zoo_outputs() -> dict[str, list[torch.Tensor]]:
    """What every model of the zoo returns, as it is, adapted and folded."""
    found = {}
    for case in ZOO:
        model, inputs = case.build()
        with torch.no_grad():
            outputs = [output_tensors(call(model, inputs))]
            lora_fx.apply(model, reference.EVERYTHING, inputs, check=False)
            reference.fill(model)
            outputs.append(output_tensors(call(model, inputs)))
            outputs.append(output_tensors(call(lora_fx.fold(model), inputs)))
        found[case.name] = [tensor.clone() for tensors in outputs for tensor in tensors]
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="names of verbs, joined by semicolons")
    parser.add_argument("--forked", action="store_true", help="each in a process of its own; without the zoo")
    options = parser.parse_args()
    torch.set_num_threads(1)
    one_registry()
    names = options.only.split(";") if options.only else [verb.name for verb in VERBS]
    before = {} if options.forked else zoo_outputs()
    outcomes: list[Outcome] = []
    with suppress(KeyboardInterrupt):  # then the table of those until then
        for outcome in interrupts([v for v in VERBS if v.name in names], options.count, options.seed, options.forked):
            outcomes.append(outcome)
            broken = sum(bool(o.broken) for o in outcomes)
            print(f"\r{len(outcomes)} of {options.count}, {broken} broken", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    print(shown(outcomes))
    other = []
    if not options.forked:
        after = zoo_outputs()
        other = [n for n in before if not all(map(torch.equal, before[n], after[n]))]
        print(f"{len(after) - len(other)} of {len(after)} models of the zoo run, adapted and folded too, as before")
    return 1 if other or any(outcome.broken for outcome in outcomes) else 0


def shown(outcomes: Sequence[Outcome]) -> str:
    """A row for each verb, and what has broken, with how often."""
    moments = ("time", "line", "bytecode")
    rows = []
    for name in [*dict.fromkeys(outcome.verb for outcome in outcomes), ""]:
        own = [outcome for outcome in outcomes if name in ("", outcome.verb)]
        kinds = [str(sum(outcome.moment == moment for outcome in own)) for moment in moments]
        broken = [f"{sum(bool(o.broken) for o in own if o.moment == moment)}" for moment in moments]
        left = [str(sum(outcome.left == which for outcome in own)) for which in ("old", "new")]
        rows.append((name or "all", *kinds, *left, *broken))
    header = ("verb", *(f"at a {moment}" for moment in moments), "old", "new", *(f"broken, {m}" for m in moments))
    lines = [table(header, rows, right=range(1, 9))]
    reasons = Counter(f"{o.verb}: {o.broken[0]}" for o in outcomes if o.broken)
    lines += [f"{times:5} × {reason}" for reason, times in reasons.most_common(40)]
    good = sum(not outcome.broken for outcome in outcomes)
    return "\n".join([*lines, f"{good} of {len(outcomes)} interrupts left everything old or new"])


if __name__ == "__main__":
    sys.exit(main())
