"""The documentation is true: its blocks run, print and refuse what the pages say, and what they name is there."""

from __future__ import annotations

import doctest
import importlib
import importlib.util
import inspect
import pkgutil
import re

import pytest
import torch

import lora_fx
import lora_fx.export
import lora_fx.passes
import lora_fx.testing
from lora_fx import Rule, errors
from lora_fx.deltas.schedules import SCHEDULES
from tests.documentation import PAGES, ROOT, blocks, fill, run

FACES = (lora_fx, lora_fx.export, lora_fx.passes, lora_fx.testing)
_MARKS = r"|not run: .+|written to \w+\.txt|(prints|refuses)(, with other numbers)?"
EXPORTING = {"command", "onnx", "testing", "troubleshooting"}
"""Pages with blocks that export."""


def page(name: str) -> str:
    return (ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "path", [pytest.param(p, id=p.stem, marks=[pytest.mark.onnx] * (p.stem in EXPORTING)) for p in PAGES]
)
def test_the_blocks_of_a_page_run(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with torch.random.fork_rng(devices=()):
        ran = run(path)
    assert ran == sum(b.language in ("python", "console") and not b.mark.startswith("not run") for b in blocks(path))


@pytest.mark.parametrize("path", PAGES, ids=lambda p: p.stem)
def test_what_a_page_shows_belongs_to_a_block(path):
    """A mark before the wrong block, or a misspelt one, would check nothing."""
    found = blocks(path)
    for before, block in zip([None, *found], found, strict=False):
        wanted = r"|with other numbers" if block.language == "console" else _MARKS
        assert re.fullmatch(wanted, block.mark), block.place
        if block.mark.startswith(("prints", "refuses")):
            assert block.language == "text" and before is not None and before.language == "python", block.place
    assert path.read_text(encoding="utf-8").count("```") == 2 * len(found), "a block without a language"


def test_results_go_into_their_own_blocks(tmp_path):
    (tmp_path / "paper").mkdir()
    (tmp_path / "paper" / "one.png").write_bytes(b"old")
    results = tmp_path / "results"
    results.mkdir()
    for name, text in (("one.txt", "new  \n"), ("one.png", "new"), ("two.png", "new")):
        (results / name).write_text(text, encoding="utf-8")
    page, block = tmp_path / "p.md", "<!-- written to {}.txt -->\n```text\n{}\n```\n"
    page.write_text("```text\nold\n```\n" + block.format("one", "old") + block.format("two", "old"), encoding="utf-8")
    assert fill(page, results) == ["one.txt", "one.png"]
    assert [found.text for found in blocks(page)] == ["old\n", "new\n", "old\n"]
    assert (tmp_path / "paper" / "one.png").read_bytes() == b"new" and not (tmp_path / "paper" / "two.png").exists()


# ── doctests ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def _modules() -> list[str]:
    """Every module of the library that says what it does by example; `demo` and `cli` have none to import for."""
    names = []
    for face in (lora_fx, lora_fx.passes, lora_fx.export):
        for info in pkgutil.walk_packages(face.__path__, f"{face.__name__}."):
            spec = importlib.util.find_spec(info.name)
            if spec is not None and spec.origin is not None:
                with open(spec.origin, encoding="utf-8") as file:
                    names += [info.name] * (">>> " in file.read())
    return sorted({*names})


@pytest.mark.parametrize("name", _modules())
def test_the_examples_in_docstrings_run(name):
    with torch.random.fork_rng(devices=()):
        came = doctest.testmod(importlib.import_module(name))
    assert came.attempted and not came.failed


# ── names ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_reference_has_every_public_name():
    listed = {*re.findall(r"^::: ([\w.]+)$", page("reference"), re.M)}
    short = {name.rpartition(".")[2] for name in listed}
    for face in FACES:
        missing = {n for n in face.__all__ if n not in short and not n.isupper() and not n.endswith("Error")}
        assert not missing, f"{face.__name__}: {missing}"
    for name in listed - {"lora_fx.errors"}:
        module, _, attribute = name.rpartition(".")
        assert hasattr(importlib.import_module(module), attribute), name


def _documented() -> list[tuple[str, object]]:
    return [(f"{f.__name__}.{n}", getattr(f, n)) for f in FACES for n in f.__all__ if callable(getattr(f, n))]


@pytest.mark.parametrize(("name", "subject"), _documented(), ids=[name for name, _ in _documented()])
def test_docstrings_name_arguments_that_are_there(name, subject):
    text = inspect.getdoc(subject) or ""
    assert text, "no docstring"
    section = re.search(r"^Args:\n((?:    .*\n|\n)+)", f"{text}\n", re.M)
    if section is None:
        return
    named = [n.strip(" *") for line in re.findall(r"^    (\S[^:]*):", section[1], re.M) for n in line.split(",")]
    assert named and {*named} <= {*inspect.signature(subject).parameters}


def test_each_family_of_errors_has_an_entry():
    headings = re.findall(r"^## (\w+Error)$", page("troubleshooting"), re.M)
    families = [n for n, c in vars(errors).items() if inspect.isclass(c) and issubclass(c, errors.LoraFxError)]
    assert sorted(headings) == sorted(families)


def test_each_law_names_tests_that_are_there():
    laws = re.split(r"^\*\*(L\d+)\*\*", page("laws"), flags=re.M)[1:]
    assert laws[::2] == [f"L{n}" for n in range(1, 16)]
    for law, text in zip(laws[::2], laws[1::2], strict=True):
        named = re.findall(r"`tests/(\w+)\.py::(\w+)`", text.partition("\n## ")[0])
        assert named, law
        for file, test in named:
            assert f"def {test}(" in (ROOT / "tests" / f"{file}.py").read_text(encoding="utf-8"), (law, test)


def test_the_keys_and_settings_of_a_rule_are_all_in_its_page():
    fields = set(Rule.__dataclass_fields__) - {"op"}  # the old spelling of form
    tables = page("rules").partition("## A part of a fused weight")[0]
    assert fields - {"adapt"} == {*re.findall(r"^\| `(\w+)` \|", tables, re.M)} and '`adapt="' in tables


def test_the_schedules_are_all_in_their_page():
    assert {*SCHEDULES} <= {*re.findall(r"^\| `(\w+)` \|", page("training"), re.M)}


def test_the_navigation_has_every_page():
    settings = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    assert {*re.findall(r"^  - .*: (\w+)\.md$", settings, re.M)} == {path.stem for path in PAGES}
