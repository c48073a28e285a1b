"""python -m tests.versions [names] [--torch V] [--transformers V] [--peft V] [--python FILE] [--folder FOLDER]

The laws, the integration tests and those of files on other versions of what lora_fx stands on. Each set of versions
gets an environment of its own, which a second run finds again; what a set leaves open, pip takes the newest of.

    python -m tests.versions                        # torch-2.13 and newest
    python -m tests.versions lowest                 # every lower bound of pyproject.toml, taken at its word
    python -m tests.versions --torch 2.14.1 --transformers 5.24.0

Other packages' announcements (a FutureWarning, a DeprecationWarning) are listed, also where they point at a line of
ours, and turn nothing red. The exit status says whether all was green.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).parent.parent
NAMED = ("torch", "transformers", "peft")
"""What the command line can name a version of, and what the table shows."""
RUNS = {
    "laws": ("-m", "laws", "tests/test_laws.py", "tests/test_random_laws.py"),
    "integration": ("tests/test_integration.py",),
    "files": tuple(
        f"tests/test_{of}.py" for of in ("onnx", "onnx_folding", "sessions", "hostile_files", "adapter_files")
    ),
}
ANNOUNCEMENTS = ("-W", "default::FutureWarning", "-W", "default::DeprecationWarning")
COUNT = re.compile(r"^[=\s]*((?:\d+ \w+(?:, )?)+) in [\d.]+s.*$", re.M)
"""pytest's last line: ``1 failed, 640 passed in 300.12s``."""


def requirements(extra: str) -> Iterator[str]:
    """What pyproject.toml asks for with that extra, the extras it is made of among it: ``torch>=2.11``."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for row in project["optional-dependencies"][extra] if extra else project["dependencies"]:
        inner = re.fullmatch(r"lora-fx\[(.*)\]", row)
        for name in inner[1].split(",") if inner else ():
            yield from requirements(name)
        if not inner:
            yield row


def lower_bounds() -> dict[str, str]:
    """Package → the lowest version that the library and its `test` extra say they take."""
    rows = (*requirements(""), *requirements("test"))
    return dict(re.match(r"([\w.-]+)[^>]*>=([\w.]+)", row).groups() for row in rows)  # type: ignore[union-attr]  # a test holds every row to it


#: name → the versions it pins
SETS: dict[str, Mapping[str, str]] = {
    "torch-2.13": {"torch": "2.13.0"},
    "newest": {},
    "lowest": lower_bounds() | {"torch": "2.13.0"},  # older ones are offered with CUDA only
}
DEFAULT = ("torch-2.13", "newest")


def environment(folder: Path, pins: Mapping[str, str], python: str) -> Path:
    """Make an environment with lora_fx, its `test` extra and those versions, or bring it up to date; its Python.

    Raises:
        subprocess.CalledProcessError: pip finds no such versions that go together.
    """
    found = folder / "bin" / "python"
    if not found.exists():
        subprocess.run([python, "-m", "venv", folder], check=True)
    asked = [f"{name}=={version}" for name, version in pins.items()]
    newest = [name for name in NAMED if name not in pins]  # named, or --upgrade keeps what is there
    command = [found, "-m", "pip", "install", "--quiet", "--upgrade", "-e", f"{ROOT}[test]", *asked, *newest]
    subprocess.run(command, check=True)
    return found


def installed(python: Path) -> dict[str, str]:
    """Name → version, in that environment, of the packages that can be named."""
    return dict(zip(NAMED, _ask(python, f"*map(importlib.metadata.version, {NAMED!r})").split(), strict=True))


def _ask(python: str | Path, what: str) -> str:
    """What `print(what)` says in that Python."""
    command = [python, "-c", f"import importlib.metadata, sys; print({what})"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def run(python: Path, arguments: Sequence[str], log: Path) -> tuple[bool, str]:
    """Whether that run of pytest was green, and its count of tests; all that it says goes into the log."""
    command = [python, "-m", "pytest", "-p", "no:cacheprovider", "-rfE", *ANNOUNCEMENTS, *arguments]
    with log.open("w", encoding="utf-8") as file:
        status = subprocess.run(command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, check=False).returncode
    text = log.read_text(encoding="utf-8")
    counts = COUNT.findall(text)
    for line in re.findall(r"^(?:FAILED|ERROR) .*$", text, re.M):
        print(f"  {line}")
    return status == 0, counts[-1] if counts else f"pytest ended with {status}"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = _parser()
    options = parser.parse_args(arguments)
    if unknown := [name for name in options.names if name not in SETS]:
        parser.error(f"{', '.join(unknown)}: no such set of versions; there are {', '.join(SETS)}")
    own = {name: version for name in NAMED if (version := getattr(options, name))}
    chosen = {name: SETS[name] for name in options.names}
    if own:
        chosen["-".join(f"{name}-{version}" for name, version in own.items())] = own
    green, language = True, "python-" + _ask(options.python, "'%d.%d' % sys.version_info[:2]")
    for name, pins in (chosen or {name: SETS[name] for name in DEFAULT}).items():
        python = environment(options.folder / language / name, pins, options.python)
        print(f"{name}, {language}", *(f"{n} {v}" for n, v in installed(python).items()), sep=", ", flush=True)
        for what, selection in RUNS.items():
            start = time.monotonic()
            passed, count = run(python, selection, options.folder / language / f"{name}-{what}.log")
            print(f"  {what}: {count}, {time.monotonic() - start:.0f} s", flush=True)
            green &= passed
    return 0 if green else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.versions", description="the laws on other versions")
    parser.add_argument("names", nargs="*", help=f"sets: {', '.join(SETS)}")
    for name in NAMED:
        parser.add_argument(f"--{name}", metavar="VERSION", help="of a set of your own")
    parser.add_argument("--python", default=sys.executable, metavar="FILE", help="to make environments with")
    parser.add_argument("--folder", type=Path, default=ROOT / ".versions", help="for environments and logs")
    return parser


if __name__ == "__main__":
    sys.exit(main())
