"""Processes that a tool has forked off."""

from __future__ import annotations

import contextlib
import os
import signal


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
