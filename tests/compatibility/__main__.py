"""python -m tests.compatibility [names] [--package P] [--jobs 1] [--markdown FILE]: models of other people's packages.

Each model of the tables beside this file is adapted whole and held against plain torch: outputs, gradients, a training
step, fold, unfold, save, load, certify, and roles against the names that its authors gave. The packages get an
environment of their own, which a second run finds again; all that they need comes from PyPI, no weights among it.

    python -m tests.compatibility                             # everything: an hour or two
    python -m tests.compatibility --package vit_pytorch
    python -m tests.compatibility beit UNet2DModel
    python -m tests.compatibility --onnx                      # files of some 100 architectures, by family; two hours

The exit status says whether nothing was wrong, nothing raised what is none of our errors, and all was certified.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path

from tests.registry import one_registry

ROOT = Path(__file__).parent.parent.parent
PINNED = (
    "torch==2.13.0", "transformers==5.17.0", "diffusers==0.42.1", "torch-geometric==2.8.1", "x-transformers==2.31.10",
    "peft==0.21.2", "accelerate", "einops", "ftfy", "scipy", "pillow",
    "onnx==1.23.2", "onnxruntime==1.32.0", "onnxscript==0.7.2",
)  # fmt: skip
#: installed without what they ask for: they would take another torch
ALONE = ("torchvision==0.28.0", "timm==1.0.31", "open-clip-torch==3.3.0", "vit-pytorch==1.26.11")
#: package → the module beside this file with its table
TABLES = {
    "transformers": "transformers_models",
    "diffusers": "diffusers_models",
    "vit_pytorch": "image_models",
    "timm": "image_models",
    "open_clip": "image_models",
    "x_transformers": "sequence_models",
    "torch_geometric": "graph_models",
    "zoo": "zoo_models",
}


def environment(folder: Path, python: str) -> Path:
    """Make an environment with lora_fx and the packages, or find it as it was made; its Python.

    Raises:
        subprocess.CalledProcessError: pip cannot install them.
    """
    found, said = folder / "bin" / "python", folder / "packages"
    wanted = "\n".join((*PINNED, *ALONE))
    if said.exists() and said.read_text(encoding="utf-8") == wanted:
        return found
    if not found.exists():
        subprocess.run([python, "-m", "venv", folder], check=True)
    pip = [found, "-m", "pip", "install", "--quiet"]
    subprocess.run([*pip, "-e", f"{ROOT}[testing]", *PINNED], check=True)
    subprocess.run([*pip, "--no-deps", *ALONE], check=True)
    said.write_text(wanted, encoding="utf-8")
    return found


def prepare() -> None:
    """What the packages want before they are imported."""
    import torch

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    # torchvision's kernels are built for a torch with CUDA, and do not load beside another; its Python asks for these.
    for name in ("nms", "qnms"):
        signature = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
        torch.library.define(f"torchvision::{name}", signature)


def check_here(options: argparse.Namespace) -> int:
    """Run it in this Python, which has the packages."""
    prepare()
    from tests.compatibility import onnx_files, onnx_report, report, running

    mode, written = running.Mode(), report.report
    if options.onnx:
        mode, written = running.Mode(onnx_files.FilesRow, onnx_files.check), onnx_report.report
        one_registry()
    running.warm_up()
    packages = options.package or [package for package in TABLES if options.onnx or package != "zoo"]
    tables = dict.fromkeys(TABLES[package] for package in packages)
    found = [m for t in tables for m in importlib.import_module(f"tests.compatibility.{t}").models()]
    found = onnx_files.of_families(found) if options.onnx and not options.names else found
    chosen = [m for m in found if m.package in packages and (not options.names or m.name in options.names)]
    start, limits = time.monotonic(), running.Limits(options.limit)
    rows = report.read(options.rows, mode.row) if options.rows else []
    done = {(row.package, row.name) for row in rows}
    for row in running.run([m for m in chosen if (m.package, m.name) not in done], options.jobs, limits, mode):
        rows.append(row)
        print(report.line(row), flush=True)
        if options.rows:
            report.append(options.rows, row)
    text = written(rows, {name: _version(name) for name in ("torch", *(row.package for row in rows))})
    if options.markdown:
        report.write(options.markdown, text)
    print(f"\n{report.summary(rows)}\n{(time.monotonic() - start) / 60:.0f} minutes")
    return 0 if rows and not any(row.faults for row in rows) else 1


def _version(package: str) -> str:
    names = {"open_clip": "open_clip_torch", "zoo": "lora-fx"}
    return importlib.metadata.version(names.get(package, package))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.compatibility", description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*", help="models; all of them by default")
    parser.add_argument("--package", action="append", choices=list(TABLES), help="only this one; may be given again")
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time")
    parser.add_argument("--onnx", action="store_true", help="export them, and run the files; and some of the zoo")
    parser.add_argument("--limit", type=float, default=150.0, metavar="SECONDS", help="of a processor, for a model")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the table there")
    parser.add_argument("--rows", type=Path, metavar="FILE", help="keep what came out there; what is in it is not run")
    parser.add_argument("--here", action="store_true", help="this Python has the packages: make no environment")
    parser.add_argument("--python", default=sys.executable, metavar="FILE", help="to make the environment with")
    parser.add_argument("--folder", type=Path, default=ROOT / ".versions", help="for the environment")
    options = parser.parse_args(arguments)
    if options.here:
        return check_here(options)
    language = f"python-{sys.version_info.major}.{sys.version_info.minor}"
    python = environment(options.folder / language / "compatibility", options.python)
    quiet = {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [python, "-m", "tests.compatibility", "--here", *(sys.argv[1:] if arguments is None else arguments)]
    return subprocess.run(command, cwd=ROOT, env={**os.environ, **quiet}, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
