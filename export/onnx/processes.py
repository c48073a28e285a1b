"""What native code does with a file, in a process of its own: what crashes there, or is killed, is an error here.

There are two: ONNX Runtime, and onnx's inference of shapes, which reads graphs that anybody may have made, and is given
bounded memory and time. One process of a kind serves a Python process: to start one for each file takes longer than a
small model. It ends with the Python process, and is started again where it has ended before. Nothing is shared over a
fork.
"""

from __future__ import annotations

import atexit
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any, NoReturn, Self

import torch

from lora_fx.export.onnx import worker
from lora_fx.export.onnx.runtimes import refuse

_SHOWN = 2000
_ROOM = 2**30
"""Bytes that the inference of shapes may take, and eight times the graph: some six copies of it are made."""


@dataclass(frozen=True)
class Program:
    """What a process is for."""

    name: str
    """As `worker` knows it."""
    place: str
    does: str
    remedy: str
    patience: float | None = None
    """Seconds for an answer; None waits."""


_RUNTIME = Program(
    "runtime",
    "ONNX Runtime",
    "ran the file",
    "make room if it was out of memory; else make fewer axes dynamic, or export in float32, "
    "and report the file that check=False writes to onnxruntime",
)
_SHAPES = Program(
    "shapes",
    "onnx.shape_inference",
    "read the graph",
    "load it with the program that wrote it, and export it again",
    patience=120.0,
)


class Said(RuntimeError):
    """What ONNX Runtime has raised in the other process, of a type that has the name which it has there."""


class Apart:
    """A session of ONNX Runtime in the other process, on its CPU.

    Raises:
        Said: what ONNX Runtime raises there.
        ExportError: the process has ended.
    """

    def __init__(self, path: Path) -> None:
        self._number, self._runner = next(_NUMBERS), _running()
        said = {"do": "open", "path": str(path.absolute()), "threads": torch.get_num_threads()}
        found, _ = self._ask(said)
        self.inputs: list[tuple[str, str, tuple[int | str | None, ...]]]
        """Name, type and shape of each."""
        self.inputs = [(name, kind, tuple(shape)) for name, kind, shape in found["inputs"]]
        self.outputs: list[str] = found["outputs"]

    def run(self, feeds: Mapping[str, Any]) -> Sequence[Any]:
        """All outputs, for arrays by name."""
        return [*self._ask({"do": "run"}, feeds)[1].values()]

    def _ask(self, said: dict[str, Any], arrays: Mapping[str, Any] | None = None) -> tuple[dict[str, Any], Any]:
        return self._runner.ask({**said, "number": self._number}, arrays or {})

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._runner.alive:
            self._ask({"do": "close"})


def optimized(path: Path, target: Path) -> None:
    """Write what ONNX Runtime's optimizer makes of a file, with its numbers in a file of their own."""
    _running().ask({"do": "optimize", "path": str(path.absolute()), "target": str(target.absolute())}, {})


def checked(path: Path) -> None:
    """Have `onnx.checker` look at a file, and infer its shapes.

    Raises:
        Said: what it says against the file.
        ExportError: the process has ended.
    """
    _running().ask({"do": "check", "path": str(path.absolute())}, {})


def with_shapes(graph: bytes) -> bytes:
    """A message, with what onnx infers of the shapes in it.

    Raises:
        Said: what onnx says against it, or that it has not the memory.
        ExportError: the process has ended, or has not come to an end.
    """
    import numpy

    said = {"do": "shapes", "memory": _ROOM + 8 * len(graph)}
    _, arrays = _running(_SHAPES).ask(said, {"graph": numpy.frombuffer(graph, numpy.uint8)})
    return arrays["graph"].tobytes()


def has_interpreter() -> bool:
    """A process can be started: not in a program that was frozen, or that embeds Python."""
    return bool(sys.executable) and not getattr(sys, "frozen", False)


class Runner:
    """The process. One thread asks at a time."""

    def __init__(self, program: Program) -> None:
        self.program = program
        if not has_interpreter():
            reason = "ONNX Runtime checks a file in a process of its own, for which there is no Python interpreter here"
            refuse("export_onnx", reason, "pass check=False, and check the file elsewhere")
        self.pid, self._turn, self._said, self._late = os.getpid(), threading.Lock(), "", False
        self._log = tempfile.TemporaryFile()  # noqa: SIM115
        # Without the program's own folder, and with our search path: it imports what we would import.
        command = [sys.executable, "-P", worker.__file__, json.dumps([*map(str, sys.path)]), program.name]
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=self._log)
        atexit.register(self.end, 1.0)
        try:
            self._answer()  # it has imported what it needs
        except EOFError:
            self._ended()
        except BaseException:
            self.end()
            raise

    @property
    def alive(self) -> bool:
        return self.pid == os.getpid() and not self._log.closed and self._process.poll() is None

    def ask(self, said: Mapping[str, Any], arrays: Mapping[str, Any]) -> tuple[dict[str, Any], Any]:
        with self._turn:
            message = worker.packed(said, arrays)
            try:
                with self._in_time():
                    worker.write(self._stdin, message)
                    return self._answer()
            except (EOFError, OSError, ValueError):  # of a pipe that is broken, or closed
                self._ended()
            except Said:
                raise
            except BaseException:  # of a signal: what comes later would be taken for the answer to another question
                self.end()
                raise

    def _answer(self) -> tuple[dict[str, Any], Any]:
        said, arrays = worker.read(self._stdout)
        if "error" in said:
            raise type(said["error"], (Said,), {})(said["message"])
        return said, arrays

    @contextmanager
    def _in_time(self) -> Iterator[None]:
        """Whoever waits longer than the program has patience is told that the process has ended, because it has."""

        def late() -> None:
            self._late = True
            self._process.kill()

        if self.program.patience is None:
            yield
            return
        clock = threading.Timer(self.program.patience, late)
        clock.daemon = True
        clock.start()
        try:
            yield
        finally:
            clock.cancel()

    @property
    def _stdin(self) -> Any:
        return self._process.stdin

    @property
    def _stdout(self) -> Any:
        return self._process.stdout

    def _ended(self) -> NoReturn:
        if not self._log.closed:
            self._said = self._close(10.0)
        code = self._process.returncode
        how = f"with exit code {code}"
        if code < 0:
            how = f"by signal {-code}"
            with suppress(ValueError):
                how = f"by {signal.Signals(-code).name}"
        last, program = f"; it said last: {self._said}" if self._said else "", self.program
        if self._late:
            how = f"after {program.patience:g} s without an answer"
        refuse(program.place, f"the process in which it {program.does} has ended {how}{last}", program.remedy)

    def end(self, patience: float = 0.0) -> None:
        """End the process, if it has not ended after this many seconds; of the process that began it alone."""
        if self.pid == os.getpid() and not self._log.closed:
            self._close(patience)

    def _close(self, patience: float) -> str:
        """What the process has printed last."""
        atexit.unregister(self.end)
        for stream in (self._stdin, self._stdout):
            with suppress(OSError, ValueError):
                stream.close()
        try:
            self._process.wait(patience)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        with self._log:
            self._log.seek(0)
            lines = self._log.read()[-_SHOWN:].decode(errors="replace").split("\n")
        return next((line.strip() for line in reversed(lines) if line.strip()), "")


_NUMBERS = count()
_starting = threading.Lock()
_runners: list[Runner] = []
"""Those of another process that this one was forked from are that one's business."""


def _running(program: Program = _RUNTIME) -> Runner:
    with _starting:
        for one in _runners:
            if one.program is program and one.alive:
                return one
        ours = [one for one in _runners if one.pid != os.getpid() or one.alive]
        _runners[:] = [*ours, found := Runner(program)]
    return found
