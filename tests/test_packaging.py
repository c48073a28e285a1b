"""What is published: every file in the wheel, every import declared, one version everywhere, and gates that are run."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from tests import gates, versions

ROOT = Path(__file__).parent.parent
CONFIG = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PROJECT, SETUPTOOLS = CONFIG["project"], CONFIG["tool"]["setuptools"]
FOLDERS = {"lora_fx": "lora_fx", "passes": "lora_fx.passes", "export": "lora_fx.export"}
"""Folder → the package it is."""

#: beginning of a module's name → the extras whose packages it may import, the library's own dependencies beside them
EXTRAS = {
    "lora_fx.export.onnx": ("onnx",),
    "lora_fx.testing": ("testing", "onnx"),
    "lora_fx.demo": ("demo",),
    "lora_fx.paper": ("paper",),
}
#: what whoever names a model of it has, or a torch with CUDA
THEIRS = {
    "lora_fx.cli.given": {"transformers"},
    "lora_fx.export.adapters.conversions": {"transformers"},
    "lora_fx.deltas.fold_kernels": {"triton"},
    "lora_fx.deltas.gpu_kernels": {"triton"},
}
#: what is imported under another name than it is installed
IMPORTED = {"scikit-learn": "sklearn", "onnx-ir": "onnx_ir"}
#: comes with torch, which cannot work without it
WITH_TORCH = {"sympy"}


def sources() -> dict[str, Path]:
    """Module → file, of all that is published."""
    found = {}
    for folder, package in FOLDERS.items():
        for path in (ROOT / folder).rglob("*.py"):
            name = ".".join([package, *path.relative_to(ROOT / folder).with_suffix("").parts])
            found[name.removesuffix(".__init__")] = path
    return found


def names(rows) -> set[str]:
    """``torch>=2.11`` → ``torch``, as it is imported."""
    found = {re.match(r"[\w-]+", row)[0] for row in rows}
    return {IMPORTED.get(name, name) for name in found}


def test_every_folder_with_code_is_in_the_wheel():
    packages = {
        ".".join([package, *path.parent.relative_to(ROOT / folder).parts])
        for folder, package in FOLDERS.items()
        for path in (ROOT / folder).rglob("*.py")
    }
    assert sorted(SETUPTOOLS["packages"]) == sorted(packages)
    assert SETUPTOOLS["package-dir"] == {package: folder for folder, package in FOLDERS.items()}
    assert all((path.parent / "__init__.py").exists() for path in sources().values())


@pytest.mark.parametrize("name", sorted(sources()))
def test_a_module_imports_only_what_is_declared_for_it(name):
    extras = [extra for start, found in EXTRAS.items() if name.startswith(start) for extra in found]
    declared = names(versions.requirements("")) | WITH_TORCH | THEIRS.get(name, set())
    declared |= {n for extra in extras for n in names(versions.requirements(extra))}
    imported = set()
    for node in ast.walk(ast.parse(sources()[name].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            imported |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add(node.module.partition(".")[0])
    assert imported - sys.stdlib_module_names - {"lora_fx"} <= declared


def test_the_library_imports_without_the_packages_of_its_extras():
    optional = {n for extra in PROJECT["optional-dependencies"] for n in names(versions.requirements(extra))}
    optional -= names(versions.requirements(""))
    block = f"import sys; sys.modules.update(dict.fromkeys({sorted(optional)!r}))"
    subprocess.run(
        [sys.executable, "-c", f"{block}; from lora_fx import *; import lora_fx.cli, lora_fx.export"], check=True
    )


@pytest.mark.parametrize("extra", ["", *PROJECT["optional-dependencies"]])
def test_every_requirement_has_a_bound_below(extra):
    for row in versions.requirements(extra):
        assert re.fullmatch(r"[\w-]+(\[[\w,]+\])?(>=|==)[\d.]+(,<[\d.]+)?(; sys_platform == 'linux')?", row), row


def test_a_new_torch_is_not_refused():
    (torch,) = [row for row in PROJECT["dependencies"] if row.startswith("torch")]
    assert "<" not in torch and "=" in torch


def test_the_pinned_versions_lie_within_the_bounds():
    from packaging.requirements import Requirement

    pins = dict(row.split("==") for row in (ROOT / "constraints.txt").read_text(encoding="utf-8").split())
    for row in map(Requirement, [*versions.requirements(""), *versions.requirements("test")]):
        assert row.name not in pins or pins[row.name] in row.specifier
    assert pins.keys() == {*versions.NAMED, "click"}  # what the command line shows is click's


def test_the_changelog_begins_with_this_version():
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.search(r"^## (\S+)", text, re.M)[1] + ".0" == PROJECT["version"]


def test_the_licence_is_whole_and_named():
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert text.lstrip().startswith("Apache License") and "END OF TERMS AND CONDITIONS" in text
    assert (PROJECT["license"], PROJECT["license-files"]) == ("Apache-2.0", ["LICENSE"])


def test_the_types_are_published():
    assert (ROOT / "lora_fx" / "py.typed").exists()
    assert "py.typed" in SETUPTOOLS["package-data"]["lora_fx"]


def test_the_gates_are_run():
    ci = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert "python -m tests.gates\n" in ci and ci.index("tests.gates") < ci.index("test-command.sh\n")
    quick = (ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8")
    hooks = re.findall(r"entry: python -m tests\.gates (\w+)", quick)
    assert {"lint", "format"} <= set(hooks) <= {gate.name for gate in gates.GATES}


def test_a_shut_gate_is_said_and_the_others_still_run(monkeypatch, capsys):
    def shut(folder):
        raise gates.GateError("the reason")

    def opened(folder):
        pass

    monkeypatch.setattr(gates, "GATES", (gates.Gate("first", "", shut), gates.Gate("second", "", opened)))
    assert gates.main([]) == 1 and gates.main(["second"]) == 0
    first, second, again = capsys.readouterr().out.splitlines()
    assert first.startswith("first") and first.endswith("SHUT: the reason")
    assert second.endswith("ok") and again.startswith("second")


def test_a_gate_that_is_none_is_refused(capsys):
    with pytest.raises(SystemExit):
        gates.main(["speling"])
    assert "speling: no such gate; there are lint, format" in capsys.readouterr().err


# ── the laws on other versions ───────────────────────────────────────────────────────────────────────────────────────


def test_the_lowest_set_pins_every_bound():
    pins = versions.SETS["lowest"]
    for row in [*versions.requirements(""), *versions.requirements("test")]:
        name, bound = re.match(r"([\w-]+)>=([\d.]+)", row).groups()
        assert pins[name] == (bound if name != "torch" else "2.13.0")


@pytest.mark.parametrize(
    ("last", "count"),
    [
        ("640 passed in 300.12s (0:05:00)", "640 passed"),
        ("1 failed, 2891 passed, 3 skipped, 2 warnings in 31.99s", "1 failed, 2891 passed, 3 skipped, 2 warnings"),
        ("===== 2 errors in 0.50s =====", "2 errors"),
    ],
)
def test_the_count_is_read_off_the_last_line(last, count):
    assert versions.COUNT.findall(f"F.. [100%]\nFAILED tests/test_laws.py::test_l1 - AssertionError\n{last}\n") == [
        count
    ]


def test_a_set_of_ones_own_is_one_environment_with_those_pins(monkeypatch, capsys, tmp_path):
    made = {}
    monkeypatch.setattr(versions, "environment", lambda folder, pins, python: made.setdefault(folder, pins))
    monkeypatch.setattr(versions, "installed", lambda python: dict.fromkeys(versions.NAMED, "1"))
    monkeypatch.setattr(versions, "run", lambda python, selection, log: ("laws" in selection, "1 passed"))
    own = ["--torch", "2.14.1", "--peft", "0.21.2", "--folder", str(tmp_path)]
    assert versions.main(own) == 1  # the integration tests were red
    language = "python-{}.{}".format(*sys.version_info)
    assert made == {tmp_path / language / "torch-2.14.1-peft-0.21.2": {"torch": "2.14.1", "peft": "0.21.2"}}
    first, second = capsys.readouterr().out.splitlines()[:2]
    assert first == f"torch-2.14.1-peft-0.21.2, {language}, torch 1, transformers 1, peft 1"
    assert second.startswith("  laws: 1 passed")


def test_a_set_that_is_none_is_refused(capsys):
    with pytest.raises(SystemExit):
        versions.main(["nwest"])
    assert "nwest: no such set of versions; there are torch-2.13, newest, lowest" in capsys.readouterr().err
