"""python -m tests.mutants [names] [--jobs 2] [--markdown FILE]: which law or test catches which mutant.

First the suites run on the library as it is, and must be green. Then each mutant runs its suite, laws first, in a
process of its own that ends at the second failure. One that survives is a hole in the tests: the exit status says so.

The processes are forked off this one, which has imported torch, but nothing of lora_fx: that saves half of the time.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import re
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO

from tests.mutants import MUTANTS, ROOT, Area, Mutant, hook, mutant
from tests.processes import exit_status, forked

RANDOM_LAWS, ZOO_LAWS = "tests/test_random_laws.py", "tests/test_laws.py"
LIMIT = 300.0  # seconds: a mutant that makes a test hang is caught by that, and the table says so
#: what is slow and catches nothing that a fast test does not
SLOW = ("tests/test_fold.py::test_a_thousand_switches_lose_nothing",)
#: what every process needs anyway
PRELOADED = ("torch", "torch.fx.experimental.proxy_tensor", "peft", "onnxscript")


@dataclass(frozen=True)
class Job:
    """A suite to run on the mutant of that name; on the library as it is, for an empty name."""

    name: str
    suite: Area
    limit: float = LIMIT
    most: int = 2
    """Failures after which it ends; 0 for no end."""


@dataclass(frozen=True)
class Outcome:
    """What running a suite came to."""

    failures: tuple[str, ...]
    """The names of the failing tests, laws first."""
    seconds: float
    output: str

    @property
    def caught(self) -> bool:
        return bool(self.failures)


def arguments(job: Job) -> list[str]:
    """pytest's: the laws over random models, the laws on a few architectures of the zoo, then the suite's tests."""
    laws = [RANDOM_LAWS, f"--laws={job.suite.laws}"] if job.suite.laws else []
    zoo = [ZOO_LAWS, f"--zoo={job.suite.zoo}"] if job.suite.zoo else []
    slow = [f"--deselect={test}" for test in SLOW]
    quiet = ["-q", "--tb=no", "-rfE", "-W", "ignore:Module already imported:pytest.PytestAssertRewriteWarning"]
    options = ["-p", "tests.mutants.plugin", "-p", "no:cacheprovider", "-n", "0", *quiet, *slow]
    return [*options, f"--maxfail={job.most}", *laws, *zoo, *job.suite.tests]


def run(jobs: Sequence[Job], at_once: int) -> Iterator[tuple[Job, Outcome]]:
    """Each job with its outcome, as they end."""
    waiting: list[Job] = list(jobs)
    running: dict[int, tuple[Job, IO[str], float]] = {}
    with contextlib.ExitStack() as files:
        try:
            while waiting or running:
                while waiting and len(running) < at_once:
                    job, output = waiting.pop(0), files.enter_context(tempfile.TemporaryFile("w+"))
                    running[_start(job, output)] = job, output, time.monotonic()
                time.sleep(0.1)
                for pid, (job, output, start) in list(running.items()):
                    seconds = time.monotonic() - start
                    status = exit_status(pid, seconds > job.limit)
                    if status is not None:
                        del running[pid]
                        yield job, _outcome(job, status, output, seconds)
        finally:
            for pid in running:
                exit_status(pid, kill=True)


def _outcome(job: Job, status: int, output: IO[str], seconds: float) -> Outcome:
    output.seek(0)
    text = output.read()
    late = (f"the time limit of {job.limit:.0f} s",) if seconds > job.limit else ()
    return Outcome(late or failed(status, text), seconds, text)


def _start(job: Job, output: IO[str]) -> int:
    """Fork a process that runs pytest on the mutated library."""

    def call() -> int:
        os.chdir(ROOT)
        os.environ[hook.VARIABLE] = job.name
        os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT / "tests/mutants/startup"), str(ROOT)])
        import pytest

        return int(pytest.main(arguments(job)))

    return forked(call, output, raised=4)


def failed(status: int, output: str) -> tuple[str, ...]:
    """The tests that failed, by pytest's exit status and short summary.

    Raises:
        RuntimeError: pytest did not run tests that failed or passed: a wrong argument, an error in a plugin. Nothing is
            caught by that.
    """
    found = re.findall(r"^(?:FAILED|ERROR) (?:\S*?::)?(\S.*?)(?: - .*)?$", output, re.MULTILINE)
    if status < 0:
        found.append(f"signal {-status}")
    elif status not in (0, 1, 2) or bool(status) != bool(found):
        raise RuntimeError(f"pytest ended with status {status}:\n{output[-3000:]}")
    return tuple(sorted(dict.fromkeys(found), key=lambda test: not is_law(test)))


def is_law(test: str) -> bool:
    return re.match(r"test_l\d", test) is not None


def control(suites: Sequence[Area], at_once: int) -> None:
    """The suites must be green on the library as it is.

    Raises:
        SystemExit: they are not.
    """
    tests = list(dict.fromkeys(test for suite in suites for test in suite.tests))
    whole = {test for test in tests if "::" not in test}
    tests = [test for test in tests if test in whole or test.partition("::")[0] not in whole]
    zoo = ",".join(dict.fromkeys(name for suite in suites for name in suite.zoo.split(",") if name))
    laws = ",".join(dict.fromkeys(law for suite in suites for law in suite.laws.split(",") if law))
    parts = [Area(tuple(tests[1:])), Area(tuple(tests[:1]), zoo, laws)]
    start = time.monotonic()
    jobs = [Job("", part, 1800, 0) for part in parts if part.tests]
    outcomes = [outcome for _, outcome in run(jobs, at_once)]
    for outcome in outcomes:
        if outcome.failures:
            sys.exit(
                f"the library as it is fails {', '.join(outcome.failures)}: mend that first\n{outcome.output[-3000:]}"
            )
    print(f"the library as it is: green, {time.monotonic() - start:.0f} s", flush=True)


def table(rows: Sequence[Mutant], outcomes: dict[str, Outcome]) -> str:
    """Markdown, for a person: which test caught what."""
    lines = ["| mutant | area | defect | caught by | s |", "|---|---|---|---|---|"]
    for row in rows:
        outcome = outcomes[row.name]
        lines.append(f"| {row.name} | {row.area} | {row.what} | {shown(outcome)} | {outcome.seconds:.0f} |")
    return "\n".join(lines)


def shown(outcome: Outcome) -> str:
    names = [test.removeprefix("test_") for test in outcome.failures[:2]]
    return ", ".join(name if len(name) < 90 else f"{name[:88]}…" for name in names) or "NOTHING: it survives"


def summary(outcomes: dict[str, Outcome], seconds: float) -> str:
    by_law = sum(any(is_law(test) for test in o.failures) for o in outcomes.values())
    caught = sum(o.caught for o in outcomes.values())
    return f"{caught}/{len(outcomes)} caught, {by_law} of them by a law, in {seconds / 60:.1f} minutes"


def preload() -> None:
    for variable, value in (("OMP_NUM_THREADS", "1"), ("TRANSFORMERS_VERBOSITY", "error"), ("HF_HUB_OFFLINE", "1")):
        os.environ.setdefault(variable, value)
    for name in PRELOADED:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    assert not any(name.partition(".")[0] == "lora_fx" for name in sys.modules)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*", help="mutants, or areas; all of them by default")
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time")
    parser.add_argument("--markdown", metavar="FILE", help="write the table there too")
    parser.add_argument("--quick", action="store_true", help="leave out the laws over random models")
    parser.add_argument("--no-control", action="store_true", help="do not run the suites on the real library before")
    options = parser.parse_args(argv)
    rows = [row for row in MUTANTS if not options.names or {row.area, row.name} & set(options.names)]
    for name in set(options.names) - {row.area for row in rows}:
        mutant(name)  # raises for a name that is none
    start = time.monotonic()
    jobs = [Job(row.name, replace(row.suite, laws="") if options.quick else row.suite) for row in rows]
    preload()
    if not options.no_control:
        control([job.suite for job in jobs], options.jobs)
    outcomes: dict[str, Outcome] = {}
    for job, outcome in run(jobs, options.jobs):
        outcomes[job.name] = outcome
        print(f"{job.name:36} {mutant(job.name).area:13} {outcome.seconds:5.0f} s  {shown(outcome)}", flush=True)
    last = summary(outcomes, time.monotonic() - start)
    if options.markdown:
        Path(options.markdown).write_text(f"{table(rows, outcomes)}\n\n{last}\n", encoding="utf-8")
    print(last)
    return 0 if all(outcome.caught for outcome in outcomes.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
