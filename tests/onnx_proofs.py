"""Folded files, proven against the base graph: architectures × opsets × biases × optimized or not.

    python -m tests.onnx_proofs [--jobs 2] [--kind dora] [NAME ...]

Each is exported with ``prove=True``: the same graph as the base's, every folded element the sum rounded once, and ONNX
Runtime equal to torch on the example inputs and on two other shapes. Another kind than `lora` at opset 20 alone, with
biases, optimized.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import tempfile
import time
import warnings
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

import lora_fx
from tests import reference
from tests.registry import one_registry
from tests.zoo import case

#: architecture → the axes that are dynamic, by input; "batch" for the first axis of every input
ARCHITECTURES: dict[str, Any] = {
    "gpt2": {"input_ids": {0: "batch", 1: "tokens"}},
    "llama": {"input_ids": {0: "batch", 1: "tokens"}},
    "qwen3": {"input_ids": {0: "batch", 1: "tokens"}},
    "gemma2": {"input_ids": {0: "batch", 1: "tokens"}},
    "gpt-neox": {"input_ids": {0: "batch", 1: "tokens"}},
    "bert": "batch",
    "distilbert": "batch",
    "t5": "batch",
    "bart": "batch",
    "vit": "batch",
    "convnext": "batch",
    "resnet": "batch",
    "olmoe-batched": "batch",
    "native-encoder": "batch",
    "native-mha": "batch",
    "native-tied": "batch",
    "native-conv2d": "batch",
    "native-batchnorm": "batch",
    "native-called-thrice": "batch",
}
OPSETS = (18, 20, 23)


@dataclass(frozen=True)
class Variant:
    """One cell of the table."""

    name: str
    opset: int
    zero_biases: bool
    optimize: bool
    kind: str = "lora"

    def __str__(self) -> str:
        biases, optimized = "zero" if self.zero_biases else "biased", "" if self.optimize else ", not optimized"
        return f"{self.name}, {self.kind}, opset {self.opset}, {biases}{optimized}"


def variants(names: list[str], kind: str) -> list[Variant]:
    if kind != "lora":
        return [Variant(name, 20, False, True, kind) for name in names or ARCHITECTURES]
    return [Variant(*v) for v in itertools.product(names or ARCHITECTURES, OPSETS, (False, True), (True, False))]


def export(variant: Variant, folder: Path) -> lora_fx.ExportReport:
    """The proven file of one variant.

    Raises:
        LoraFxError: it cannot be proven.
    """
    torch.manual_seed(0)
    model, inputs = case(variant.name).build()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.zeros_(parameter) if variant.zero_biases else nn.init.normal_(parameter, std=0.1)
    lora_fx.apply(model, reference.everything(model, inputs, variant.kind), inputs, check=False)
    reference.fill(model)
    axes = ARCHITECTURES[variant.name]
    if axes == "batch":
        axes = {key: {0: "batch"} for key in inputs} if isinstance(inputs, dict) else {0: "batch"}
        axes = axes if isinstance(inputs, dict | torch.Tensor) else tuple({0: "batch"} for _ in inputs)
    return lora_fx.export_onnx(
        model,
        inputs,
        folder / "m.onnx",
        opset=variant.opset,
        optimize=variant.optimize,
        dynamic_shapes=axes,
        prove=True,
    )


def prove(variant: Variant) -> tuple[str, str]:
    """A line about it, and what failed."""
    torch.set_num_threads(1)
    one_registry()
    warnings.simplefilter("ignore")
    start = time.perf_counter()
    try:
        with tempfile.TemporaryDirectory() as folder:
            report = export(variant, Path(folder))
    except lora_fx.LoraFxError as error:
        return f"{variant}: NOT PROVEN", str(error)
    proof = report.proof
    assert proof is not None
    shapes = len(report.comparisons)
    line = (
        f"{variant}: {proof.nodes} nodes, {len(proof.folded)} folded, {proof.untouched} untouched, "
        f"{len(proof.evaluated)} evaluated, {shapes} shapes, largest difference {report.largest:.1e}, "
        f"fused {'alike' if proof.fused == proof.base_fused else 'DIFFERENTLY'}, {time.perf_counter() - start:.0f} s"
    )
    return line, "" if shapes == 3 and proof.fused == proof.base_fused else "fewer shapes, or fused differently"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*", help="architectures; all by default")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--kind", default="lora", help="of the adapters")
    options = parser.parse_args()
    wanted, failed = variants(options.names, options.kind), 0
    with ProcessPoolExecutor(options.jobs) as pool:
        for line, problem in pool.map(prove, wanted):
            print(line + (f"\n  {problem}" if problem else ""), flush=True)
            failed += bool(problem)
    print(f"{len(wanted) - failed} of {len(wanted)} proven")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
