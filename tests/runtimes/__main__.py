"""The table of `python -m tests.runtimes`: see the package."""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import lora_fx
from lora_fx.export import Session
from tests import runtimes
from tests.runtimes import ADAPTERS, INPUTS, MODELS, Places, Switchables, build, ended, greedy

EQUAL, REFUSED = "equal", "refused"
WAYS = {
    "genai": "pip install onnxruntime-genai; or --genai PYTHON",
    "optimum": "pip install optimum-onnx 'transformers<4.58' in an environment of its own; --optimum PYTHON",
    "modules": "npm install onnxruntime-node onnxruntime-web @huggingface/transformers; --modules FOLDER",
    "browser": "a chromium; --browser FILE",
}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.runtimes", description=runtimes.__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=[*MODELS, "all"], default=["gpt2", "llama"])
    for name, way in WAYS.items():
        parser.add_argument(f"--{name}", help=way)
    options = parser.parse_args()
    names = [*MODELS] if "all" in options.models else options.models
    places = Places.found(**{name: getattr(options, name) for name in WAYS})
    failed = 0
    with tempfile.TemporaryDirectory() as folder:
        for row in rows(places, names, Path(folder)):
            print("{:<18} {:<10} {:<9} {:<34} {}".format(*row), flush=True)
            failed += not row[-1].startswith((EQUAL, REFUSED, "missing"))
    print(f"{failed} differ or fail")
    return int(failed > 0)


def rows(places: Places, names: list[str], folder: Path) -> Iterator[tuple[str, ...]]:
    for name in names:
        yield from tokens(places, name, folder)
    files = folder / "switchable"
    files.mkdir()
    case = Switchables(files)
    case.for_javascript()
    for package in ("onnxruntime-node", "onnxruntime-web"):
        yield switched(package, places.modules, "modules", case, lambda at, p=package: runtimes.in_node(at, p, files))
    modules = places.modules
    yield switched(
        "browser", modules and places.browser, "browser", case, lambda at: runtimes.in_browser(modules, at, files)
    )


def tokens(places: Places, name: str, folder: Path) -> Iterator[tuple[str, ...]]:
    """Greedy tokens of one model in every runtime."""
    model, what = build(name), "folded, greedy"
    refused = ""
    at = {target: folder / f"{name}-{target}" for target in ("genai", "optimum", "transformers.js")}
    try:
        for target, path in at.items():
            try:
                lora_fx.export_onnx(model, INPUTS, path, target=target, check=target == "genai")
            except lora_fx.LoraFxError as error:
                if target != "optimum":
                    raise
                refused = str(error)
        runtimes.write_tokenizer(at["transformers.js"])
        switchable = at["genai"].with_name(f"{name}-switchable")
        lora_fx.export_onnx(model, INPUTS, switchable, target="genai", adapters="switchable", check=False)
        files = {a: lora_fx.save_onnx_adapter(model, folder / f"{name}-{a}.onnx_adapter", name=a) for a in ADAPTERS}
    except lora_fx.LoraFxError as error:
        yield "export", "", name, "every target", f"FAILED: {error}"
        return
    sliding = bool(getattr(model.config, "sliding_window", None))
    wanted = {"": ended(greedy(model))}
    switched = {}
    for adapter in ("", *ADAPTERS):
        lora_fx.activate(model, adapter) if adapter else lora_fx.deactivate(model)
        switched[adapter] = ended(greedy(model))
    if len({str(said) for said in switched.values()}) != len(switched) or wanted[""] != switched[ADAPTERS[0]]:
        yield "torch", "", name, what, "FAILED: the adapters change no token, so that nothing would be shown"
    version, session = metadata.version("onnxruntime"), Session(at["genai"] / "model.onnx")
    yield judged("onnxruntime", name, what, wanted, lambda: said(version, {"": runtimes.in_session(session)}))
    both = Session(switchable / "model.onnx", adapters=files)
    yield judged(
        "onnxruntime", name, "switchable, greedy", switched,
        lambda: said(version, {a: runtimes.in_session(both, a or None) for a in switched}),
    )  # fmt: skip

    def in_genai(path: Path, adapters: Any) -> Any:
        return runtimes.genai(places.genai, path, adapters, sliding)

    if not places.genai:
        yield missing("genai", name, what, "genai")
    else:
        yield judged("genai", name, what, wanted, lambda: in_genai(at["genai"], {}))
        yield judged("genai", name, "Adapters, greedy", switched, lambda: in_genai(switchable, files))
    for runtime, option, run in (
        ("optimum", "optimum", runtimes.optimum),
        ("transformers.js", "modules", runtimes.transformers_js),
    ):
        place = getattr(places, option)
        if runtime == "optimum" and refused:
            yield runtime, "", name, what, f"{REFUSED}: {refused}"
        elif place:
            yield judged(runtime, name, what, wanted, lambda r=run, p=place, f=at[runtime]: r(p, f))
        else:
            yield missing(runtime, name, what, option)


def said(version: str, tokens: Any) -> dict[str, Any]:
    return {"version": version, "tokens": tokens}


def missing(runtime: str, name: str, what: str, option: str) -> tuple[str, ...]:
    return runtime, "", name, what, f"missing: {WAYS[option]}"


def judged(runtime: str, name: str, what: str, wanted: Any, run: Callable[[], Any]) -> tuple[str, ...]:
    try:
        found = run()
    except Exception as error:
        return runtime, "", name, what, f"FAILED: {error}"
    got = {adapter: ended(rows) for adapter, rows in found["tokens"].items()}
    count = sum(len(row) for rows in wanted.values() for row in rows)
    return runtime, found["version"], name, what, f"{EQUAL}: {count} tokens" if got == wanted else f"DIFFERENT: {got}"


def switched(runtime: str, place: Any, option: str, case: Switchables, run: Callable[[Any], Any]) -> tuple[str, ...]:
    what = "required slots, logits, damage"
    if not place:
        return missing(runtime, "net", what, option)
    try:
        found = run(place)
    except Exception as error:
        return runtime, "", "net", what, f"FAILED: {error}"
    wrong = case.wrong(found)
    return runtime, found["version"], "net", what, f"DIFFERENT: {'; '.join(wrong)}" if wrong else EQUAL


if __name__ == "__main__":
    sys.exit(main())
