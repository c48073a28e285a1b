"""The house rules that a reader relies on: who imports whom, and how fast."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
HEAVY = ("onnx", "onnxruntime", "onnxscript", "transformers", "peft", "sklearn", "matplotlib", "rich")

#: from the bottom up; a module imports only from modules before it
LAYERS = [
    {"errors", "random_models", "rematerialization", "rounding", "tables", "views"},
    {"changes", "schedules"},
    {"forms", "layout", "frontend"},
    {"adapter", "nodes"},
    {"tracing"},
    {"wiring", "program"},
    {"feature_split"},
    {"dataflow"},
    {"roles", "verification"},
    {"certification", "oracles", "sites"},
    {"rules", "patterns"},
    {"planning"},
    {"passes.fold", "passes.insert"},
    {"passes"},
    {"export.adapter_folder", "export.onnx_calls", "export.onnx_files", "export.onnx_weights", "export.runtimes"},
    {"export.onnx_graphs", "export.onnx_optimization", "export.onnx_runs", "export.onnx_tasks", "export.peft_format"},
    {"export.onnx_folding", "export.onnx_proof", "export.onnx_switchable"},
    {"application", "export.adapter_files", "export.onnx_export", "export.sessions", "testing"},
    {"export", "demo"},
    {"demo_report"},
    {"cli"},
]


def modules() -> dict[str, Path]:
    found = {path.stem: path for path in (ROOT / "lora_fx").glob("*.py") if path.stem != "__init__"}
    for room in ("passes", "export"):
        for path in (ROOT / room).glob("*.py"):
            found[room if path.stem == "__init__" else f"{room}.{path.stem}"] = path
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


@pytest.mark.parametrize("name", sorted(modules()))
def test_imports_go_downwards(name):
    known = modules()
    level = next((k for k, layer in enumerate(LAYERS) if name in layer), None)
    assert level is not None, f"{name} has no place in LAYERS"
    below = set().union(*LAYERS[:level])
    used = {n.removeprefix("lora_fx.") for n in imports(known[name], top_level=True) if n.startswith("lora_fx.")} & set(
        known
    )
    assert used <= below, f"{name} imports {sorted(used - below)}"


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
    code = f"import sys, lora_fx; print([m for m in {HEAVY!r} if m in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"
