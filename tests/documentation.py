"""The documentation as a program: its Python blocks, and what the page shows that they print or refuse.

A page's blocks run from top to bottom in one scope. A comment on the line before a block says more:

    <!-- not run: why -->                 before a python block
    <!-- prints -->                       before a text block: exactly what the python block before it printed
    <!-- prints, with other numbers -->   the same, whatever its numbers are
    <!-- refuses -->                      before a text block: the error that ended the python block before it; also
                                          with other numbers
    <!-- with other numbers -->           before a console block
    <!-- written to NAME.txt -->          before a text block: what a command that takes long has written; see below

A console block is a transcript: each line that begins with a dollar is given to a shell, and what comes out stands
below it.

`python -m tests.documentation [page …]` writes what comes out into the pages. `--results FOLDER` puts what such a
command has written into FOLDER in the place of those blocks, and its figures in the place of those in `docs/paper`.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import types
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

from lora_fx import LoraFxError
from lora_fx.cli import main as lora_fx_command

ROOT = Path(__file__).parent.parent
PAGES = tuple(sorted((ROOT / "docs").glob("*.md")))
_FENCE = re.compile(r"(?:^<!-- (?P<mark>[^\n]*?) -->\n)?^```(?P<language>\w+)\n(?P<text>.*?)^```$", re.M | re.S)


@dataclass(frozen=True)
class Block:
    """A fenced block."""

    page: Path
    line: int
    """Of its first line, from 1."""
    language: str
    mark: str
    """The comment before it."""
    text: str

    @property
    def place(self) -> str:
        return f"{self.page.name}:{self.line}"


def blocks(page: Path) -> list[Block]:
    """Every fenced block of a page with its language, in order."""
    text = page.read_text(encoding="utf-8")
    return [
        Block(page, text.count("\n", 0, m.start("text")) + 1, m["language"], m["mark"] or "", m["text"])
        for m in _FENCE.finditer(text)
    ]


def run(page: Path, **scope: Any) -> int:
    """Run a page with these names in its scope; the number of python blocks that ran comes back.

    Raises:
        AssertionError: something that the page shows is not what comes out.
    """
    ran = 0
    for block, shown, came in _come(page, scope):
        ran += 1
        if shown is not None:
            assert _agrees(came, shown), f"{block.place} gives\n{came}\nand the page shows\n{shown.text}"
    return ran


def write(page: Path) -> None:
    """Put what comes out into the page, where it shows something else: for changes that were meant."""
    text = page.read_text(encoding="utf-8")
    for _, shown, came in _come(page, {}):
        if shown is not None and not _agrees(came, shown):
            fence = f"<!-- {shown.mark} -->\n```{shown.language}\n" if shown.mark else f"```{shown.language}\n"
            text = text.replace(f"{fence}{shown.text}```", f"{fence}{_trimmed(came)}\n```", 1)
    page.write_text(text, encoding="utf-8")


def fill(page: Path, folder: Path) -> list[str]:
    """Put the results of commands that are in the folder into the page, and their figures beside it; which, comes back.

    They are shown as they were written: nothing can run them again in a test.
    """
    text, done = page.read_text(encoding="utf-8"), []
    for block in blocks(page):
        file = folder / block.mark.removeprefix("written to ")
        if block.mark.startswith("written to ") and file.is_file():
            fence = f"<!-- {block.mark} -->\n```{block.language}\n"
            text = text.replace(f"{fence}{block.text}```", f"{fence}{_trimmed(file.read_text('utf-8'))}\n```", 1)
            done.append(file.name)
    page.write_text(text, encoding="utf-8")
    for figure in sorted((page.parent / "paper").glob("*.png")):
        if (folder / figure.name).is_file():
            shutil.copy(folder / figure.name, figure)
            done.append(figure.name)
    return done


def _come(page: Path, scope: dict[str, Any]) -> Iterator[tuple[Block, Block | None, str]]:
    """Each block that runs, what the page shows of it, and what comes out."""
    module = types.ModuleType(f"page_{page.stem}")  # dataclasses and pickle look their module up
    module.__dict__.update(scope)
    sys.modules[module.__name__] = module
    try:
        for block, shown in _with_what_is_shown(blocks(page)):
            if block.mark.startswith("not run"):
                assert block.mark.removeprefix("not run").strip(": "), f"{block.place}: say why it is not run"
                continue
            if block.language == "console":
                yield block, shown, _transcript(block)
                continue
            came = _execute(block, module.__dict__, refuses=shown is not None and shown.mark.startswith("refuses"))
            yield block, shown, came
    finally:
        del sys.modules[module.__name__]


def _with_what_is_shown(found: list[Block]) -> Iterator[tuple[Block, Block | None]]:
    for block, after in zip(found, [*found[1:], None], strict=False):
        if block.language == "console":
            yield block, block
        if block.language == "python":
            yield block, after if after is not None and after.mark.startswith(("prints", "refuses")) else None


def _execute(block: Block, scope: dict[str, Any], refuses: bool) -> str:
    """What it printed, or the error that it must end with."""
    code = compile("\n" * (block.line - 1) + block.text, str(block.page), "exec")  # a trace points into the page
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        try:
            exec(code, scope)
        except LoraFxError as error:
            if refuses:
                return f"{type(error).__name__}: {error}"
            raise
    assert not refuses, f"{block.place} refuses nothing"
    return printed.getvalue()


def _transcript(block: Block) -> str:
    """Each command of the block, and what the shell says to it; a plain one of ours needs none, nor a new process."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    environment = {**os.environ, "PATH": path, "PYTHONWARNINGS": "ignore", "COLUMNS": "100"}
    came = []
    for line in block.text.splitlines():
        if line.startswith("$ lora-fx ") and _plain(line):
            came.append(f"{line}\n{_answer(line).strip()}")
        elif line.startswith("$ "):
            done = subprocess.run(
                ["bash", "-c", line[2:]], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
            )
            came.append(f"{line}\n{done.stdout.strip()}")
    return "\n".join(came)


def _plain(line: str) -> bool:
    """Whether a shell would only split it into words."""
    words = shlex.shlex(line.removeprefix("$ "), posix=True, punctuation_chars=True)
    return not any(set(word) <= set(";&|<>()") for word in words) and not set(line.removeprefix("$ ")) & set("$`*?~")


def _answer(line: str) -> str:
    """What a command of ours says, its error too."""
    said = io.StringIO()
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.dict(os.environ, COLUMNS="100"))
        stack.enter_context(warnings.catch_warnings(action="ignore"))
        stack.enter_context(contextlib.redirect_stdout(said))
        stack.enter_context(contextlib.redirect_stderr(said))
        lora_fx_command(shlex.split(line)[2:])
    return said.getvalue()


def _agrees(came: str, shown: Block) -> bool:
    same = _without_numbers if shown.mark.endswith("with other numbers") else _trimmed
    return same(came) == same(shown.text)


def _trimmed(text: str) -> str:
    return "\n".join(line.rstrip() for line in text.strip().splitlines())


def _without_numbers(text: str) -> list[str]:
    """Words alone: columns are as wide as their widest number, and a hash is one."""
    return re.sub(r"#[0-9a-f]{8}|[-+]?\d[\d.,]*(?:e[-+]?\d+)?", "#", re.sub("─+", "─", text)).split()


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.documentation")
    parser.add_argument("pages", nargs="*", default=[page.stem for page in PAGES])
    parser.add_argument("--results", type=Path, metavar="FOLDER", help="of a command: nothing is run")
    options = parser.parse_args(arguments)
    for page in PAGES:
        if page.stem not in options.pages:
            continue
        if options.results:
            print(page.stem, *fill(page, options.results))
            continue
        with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
            write(page)


if __name__ == "__main__":
    main(sys.argv[1:])
