"""Processes that a tool has forked off, and those of tests that end badly or set limits."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import traceback
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import forkserver
from pathlib import Path
from typing import IO, Any
from unittest import mock

ROOT = Path(__file__).parent.parent


def forked(call: Callable[[], int], output: IO[Any], raised: int = 1) -> int:
    """Fork a process that leads a group of its own and says all it says into `output`; its id.

    It ends with the number that the call returns, or with `raised` where it raises.
    """
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        return pid
    status = raised
    try:
        os.setsid()
        for stream in (1, 2):
            os.dup2(output.fileno(), stream)
        status = call()
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def exit_status(pid: int, kill: bool) -> int | None:
    """The exit status of a process, which leads a group of its own; negative for a signal; None while it runs.

    Args:
        kill: end it and its children first.
    """
    if kill:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)
    ended, status = os.waitpid(pid, 0 if kill else os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if ended else None


def elsewhere(function: Callable[..., Any], *arguments: Any) -> Any:
    """What a function of a test's module returns in another process, which has imported `tests.ready`.

    It is forked off a server that has done nothing else, one for all such calls of a pytest worker.
    """
    freed = {"MALLOC_MMAP_THRESHOLD_": str(2**20)}  # large blocks go back to the system, which may limit them
    found = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.ready"])
    with mock.patch.dict(os.environ, freed, OMP_NUM_THREADS="1", PYTHONPATH=found):
        forkserver.ensure_running()
        with ProcessPoolExecutor(1, mp_context=context) as pool:
            return pool.submit(function, *arguments).result(timeout=300)
