"""The house rules that a reader relies on: who imports whom, and how fast."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
HEAVY = ("onnx", "onnxruntime", "onnxscript", "transformers", "peft", "sklearn", "matplotlib", "rich")

#: from the bottom up; a module imports from its own room and from rooms below it
ROOMS = [
    {"errors", "tables", "walking"},
    {"changes", "reading"},
    {"graph"},
    {"deltas"},
    {"model", "analysis"},
    {"checks"},
    {"passes"},
    {"export"},
    {"application"},
    {"lora_fx"},
    {"testing", "demo"},
    {"paper"},
    {"cli"},
]


def modules() -> dict[str, Path]:
    """Module, without the package's own name → file."""
    found = {}
    for folder, prefix in ((ROOT / "lora_fx", ""), (ROOT / "passes", "passes."), (ROOT / "export", "export.")):
        for path in folder.rglob("*.py"):
            name = prefix + ".".join(path.relative_to(folder).with_suffix("").parts)
            found[name.removesuffix(".__init__") if name != "__init__" else "lora_fx"] = path
    return found


def room(name: str) -> str:
    return name.partition(".")[0]


def level(name: str) -> int:
    found = next((k for k, rooms in enumerate(ROOMS) if room(name) in rooms), None)
    assert found is not None, f"{name} has no place in ROOMS"
    return found


def imports(path: Path, top_level: bool) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    nodes = tree.body if top_level else list(ast.walk(tree))
    names: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}:{node.lineno}: a relative import"
            names |= {node.module or ""} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def used(name: str) -> set[str]:
    """The modules of ours that one imports, wherever in it."""
    known = modules()
    found = {n.removeprefix("lora_fx.") for n in imports(known[name], top_level=False) if n.startswith("lora_fx")}
    return {n for n in found if n in known} - {name, room(name)}


@pytest.mark.parametrize("name", sorted(modules()))
def test_imports_go_downwards(name):
    up = {n for n in used(name) if room(n) != room(name) and level(n) >= level(name)}
    assert not up, f"{name} imports {sorted(up)}"


def test_no_modules_import_each_other_in_a_circle():
    left = {name: used(name) for name in modules()}
    while free := [name for name, below in left.items() if not below & left.keys()]:
        for name in free:
            del left[name]
    assert not left, f"in or above a circle: {left}"


def test_the_house_has_few_rooms():
    assert len([p for p in (ROOT / "lora_fx").iterdir() if p.suffix == ".py" or (p / "__init__.py").exists()]) <= 16


@pytest.mark.parametrize("name", sorted(modules()))
def test_heavy_packages_are_imported_where_they_are_needed(name):
    used = {n.partition(".")[0] for n in imports(modules()[name], top_level=True)}
    assert not used & set(HEAVY)


CLOSE = {"allclose", "assert_close", "assert_allclose", "assert_almost_equal", "isclose", "approx"}
TOLERANCES = {"atol", "rtol", "abs_tol", "rel_tol"}
SOURCES = [
    f
    for room in ("lora_fx", "passes", "export", "tests", "examples", "benchmarks")
    for f in ROOT.glob(f"{room}/**/*.py")
]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_tolerance_is_set_by_hand(path):
    """Bounds come from a float64 run and the model's own noise (`verification.compare`), or bits are compared."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        name = getattr(node, "id", None) or getattr(node, "attr", None)
        if isinstance(node, ast.Name | ast.Attribute) and name in CLOSE:
            found.append((node.lineno, name))
        if isinstance(node, ast.keyword) and node.arg in TOLERANCES:
            found.append((node.value.lineno, node.arg))
        if isinstance(node, ast.Compare):
            small = [c for c in ast.walk(node) if isinstance(c, ast.Constant) and isinstance(c.value, float)]
            found += [(c.lineno, c.value) for c in small if 0 < abs(c.value) < 0.01]
    assert not found


def test_no_module_has_the_name_of_a_public_function():
    import lora_fx

    public = {name for name in lora_fx.__all__ if callable(getattr(lora_fx, name)) and name.islower()}
    assert not public & {name for name in modules() if "." not in name}  # the module would shadow the function


def test_the_import_brings_nothing_heavy_with_it():
    code = f"import sys; from lora_fx import *; print([m for m in {HEAVY!r} if m in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"
