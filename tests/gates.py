"""python -m tests.gates [names]: what must hold before a commit is taken, beside the tests. No GPU, about two minutes.

    python -m tests.gates                # all of them, as .ci/run does
    python -m tests.gates lint format    # these, as pre-commit does

The package is type-checked, and runs the README's code, as people install it: from its wheel, in an environment that
cannot see this checkout's `lora_fx`. It borrows everything else from this environment, so nothing is downloaded.
"""

from __future__ import annotations

import argparse
import functools
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import tomllib
import zipfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGES = ("lora_fx", "passes", "export")
SOURCES = (*PACKAGES, "pyproject.toml", "README.md", "LICENSE")
"""What a wheel is built from."""
IN_A_WHEEL = ("lora_fx/py.typed", "licenses/LICENSE")


_ONE_AT_A_TIME = threading.Lock()


class GateError(Exception):
    """A gate is shut, and why."""


@dataclass(frozen=True)
class Gate:
    """One row of the table: a call that raises where something does not hold."""

    name: str
    what: str
    run: Callable[[Path], None]
    """Takes a folder for its files, which the gates of one run share."""


def _run(*command: str | Path, cwd: Path = ROOT) -> str:
    """What a command says.

    Raises:
        GateError: its exit status is not 0; with what it said.
    """
    done = subprocess.run(command, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if done.returncode:
        raise GateError(f"{' '.join(map(str, command))} ended with {done.returncode}\n{done.stdout}")
    return done.stdout


def _python(module: str, *arguments: str | Path) -> str:
    return _run(sys.executable, "-m", module, *arguments)


def lint(folder: Path) -> None:
    _python("ruff", "check", ".")


def format_(folder: Path) -> None:
    _python("ruff", "format", "--check", ".")


def docs(folder: Path) -> None:
    _python("mkdocs", "build", "--strict", "--quiet", "--site-dir", folder / "site")


def fresh(folder: Path) -> Path:
    """The Python of an environment with the built wheel, and with all that this one has but this checkout.

    Raises:
        GateError: the wheel cannot be built or installed, or lacks a file.
    """
    with _ONE_AT_A_TIME:
        return _fresh(folder)


@functools.cache
def _fresh(folder: Path) -> Path:
    own = Path(tempfile.mkdtemp(dir=folder))
    (own / "source").mkdir()
    for name in SOURCES:  # a copy: building leaves a folder behind, whose files the next wheel would take up again
        _copy(ROOT / name, own / "source" / name)
    _python("pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", own, own / "source")
    (built,) = own.glob("*.whl")
    with zipfile.ZipFile(built) as file:
        names = file.namelist()
    if missing := [name for name in IN_A_WHEEL if not any(n.endswith(name) for n in names)]:
        raise GateError(f"{built.name} lacks {', '.join(missing)}")
    _python("venv", "--without-pip", own / "env")
    python = own / "env" / "bin" / "python"
    (site,) = own.glob("env/lib/python*/site-packages")
    borrowed = "\n".join(path for path in sys.path if path.endswith("-packages"))  # read without the .pth files in them
    (site / "borrowed.pth").write_text(borrowed + "\n", encoding="utf-8")
    _python("pip", "--python", python, "install", "--quiet", "--no-deps", "--ignore-installed", built)
    return python


def _copy(source: Path, to: Path) -> None:
    if source.is_dir():
        shutil.copytree(source, to, ignore=shutil.ignore_patterns("__pycache__", ".*"))
    else:
        shutil.copy(source, to)


def wheel(folder: Path) -> None:
    """The installed package is the wheel's, of the version that stands in pyproject.toml, and so is its command."""
    python = fresh(folder)
    code = "import lora_fx; print(lora_fx.__file__, lora_fx.__version__, sep='|')"
    place, version = _run(python, "-c", code, cwd=folder).strip().split("|")
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    if version != declared or not Path(place).resolve().is_relative_to(folder.resolve()):
        raise GateError(f"{place} of version {version} was imported, not the wheel of version {declared}")
    _run(python.with_name("lora-fx"), "--version", cwd=folder)


def types(folder: Path) -> None:
    python = fresh(folder)
    config, cache = ROOT / "pyproject.toml", ROOT / ".mypy_cache"
    _run(python, "-m", "mypy", "--config-file", config, "--cache-dir", cache, "-p", "lora_fx", cwd=folder)


def readme(folder: Path) -> None:
    """Tested in a copy of this checkout without the packages: what is imported there is the wheel's."""
    python, beside = fresh(folder), folder / "beside"
    files = _run("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard").split("\0")
    for name in files:
        if name.partition("/")[0] not in PACKAGES and (ROOT / name).is_file():
            (beside / name).parent.mkdir(parents=True, exist_ok=True)
            _copy(ROOT / name, beside / name)
    _run(python, "-m", "pytest", "-n", "0", "-p", "no:cacheprovider", "tests/test_readme.py", cwd=beside)


#: in the order in which they start, two at a time
GATES = (
    Gate("lint", "ruff check", lint),
    Gate("format", "ruff format --check", format_),
    Gate("wheel", "the wheel builds, is whole, and is what a fresh environment imports", wheel),
    Gate("docs", "the documentation builds strictly", docs),
    Gate("types", "mypy over the installed wheel", types),
    Gate("readme", "the installed wheel runs the README's code", readme),
)


def _try(gate: Gate, folder: Path) -> tuple[float, str]:
    """The seconds that a gate took, and why it is shut; empty where it is open."""
    start = time.monotonic()
    try:
        gate.run(folder)
    except GateError as error:
        return time.monotonic() - start, str(error)
    return time.monotonic() - start, ""


def main(arguments: Sequence[str] | None = None) -> int:
    names = [gate.name for gate in GATES]
    table = "gates:\n" + "\n".join(f"  {gate.name:8} {gate.what}" for gate in GATES)
    parser = argparse.ArgumentParser(
        prog="python -m tests.gates", epilog=table, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", help="of gates; all without one")
    chosen = parser.parse_args(arguments).names or names
    if unknown := [name for name in chosen if name not in names]:
        parser.error(f"{', '.join(unknown)}: no such gate; there are {', '.join(names)}")
    rows = [gate for gate in GATES if gate.name in chosen]
    green = True
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(2) as pool:
        for gate, (seconds, reason) in zip(rows, pool.map(lambda gate: _try(gate, Path(folder)), rows), strict=True):
            print(f"{gate.name:8} {seconds:6.1f} s  {f'SHUT: {reason}' if reason else 'ok'}", flush=True)
            green &= not reason
    return 0 if green else 1


if __name__ == "__main__":
    sys.exit(main())
