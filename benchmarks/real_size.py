"""apply, load_adapter, certify and fold at real size: a Llama of 1.1 billion parameters in bfloat16, all projections.

    python benchmarks/real_size.py [--device cuda] [--layers 16] [--width 2048] [--rounds 1]

On a CPU every measurement is in a process of its own. PEFT's merge is that of adapters in float32, as it makes them,
and in bfloat16. Needs peft and transformers (the `test` extra). 7 billion parameters on a GPU: ``--device cuda --layers
32 --width 4096 --inner 11008``.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from measuring import arguments, report
from transformers import LlamaConfig, LlamaForCausalLM

import lora_fx
from lora_fx import Rule

RULE = Rule(where="*_proj", rank=8)


def llama(layers: int, width: int, inner: int, device: str) -> tuple[torch.nn.Module, dict]:
    """It and 16 tokens; weights are made where they stay, without a copy in float32."""
    config = LlamaConfig(
        hidden_size=width, intermediate_size=inner, num_hidden_layers=layers, num_attention_heads=width // 64,
        num_key_value_heads=max(1, width // 256), use_cache=False, dtype=torch.bfloat16,
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device(device):
        standard = torch.get_default_dtype()
        torch.set_default_dtype(torch.bfloat16)
        try:
            model = LlamaForCausalLM(config).eval().requires_grad_(False)
        finally:
            torch.set_default_dtype(standard)
    return model, {"input_ids": torch.arange(16, device=device)[None]}


class Peak:
    """The most memory that something takes, in MiB, beyond what is taken when it begins."""

    def __init__(self, device: str) -> None:
        self.device, self.most, self.over = device, 0, threading.Event()

    def taken(self) -> int:
        if self.device == "cuda":
            return torch.cuda.max_memory_allocated()
        return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * 4096

    def __enter__(self) -> Peak:
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        self.first = self.most = self.taken()
        self.watch = threading.Thread(target=self._watch, daemon=True)
        self.watch.start()
        return self

    def _watch(self) -> None:
        while not self.over.wait(0.005):
            self.most = max(self.most, self.taken())

    def __exit__(self, *_: Any) -> None:
        self.over.set()
        self.watch.join()
        self.most = max(self.most, self.taken())

    @property
    def mebibytes(self) -> float:
        return (self.most - self.first) / 2**20


def fill(model: torch.nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.02)


def action(what: str, model: torch.nn.Module, inputs: dict, folder: str) -> Callable[[], Any]:
    """What is timed; what it needs is made before."""
    if what == "forward":
        return lambda: model(**inputs)
    if what.startswith("apply"):
        return lambda: lora_fx.apply(model, RULE, inputs, check=what == "apply")
    if what.startswith("merge"):
        import peft

        config = peft.LoraConfig(r=RULE.rank, lora_alpha=16, target_modules=r".*_proj")
        theirs = peft.get_peft_model(model, config, autocast_adapter_dtype=what == "merge")
        fill(theirs)
        return theirs.merge_and_unload
    lora_fx.apply(model, RULE, inputs, check=False)
    fill(model)
    if what == "certify":
        return lambda: lora_fx.certify(model, inputs)
    if what.startswith("fold"):
        return lambda: lora_fx.fold(model, final=what == "fold for good")
    if what == "unfold":
        lora_fx.fold(model)
        return lambda: lora_fx.unfold(model)
    lora_fx.save_adapter(model, folder)
    lora_fx.remove(model, "default")
    return lambda: lora_fx.load_adapter(model, folder, inputs, check=what == "load_adapter")


def run(what: str, options: argparse.Namespace) -> tuple[float, float]:
    """Seconds, and MiB above the model."""
    model, inputs = llama(options.layers, options.width, options.inner, options.device)
    with torch.no_grad():
        model(**inputs)
    with tempfile.TemporaryDirectory() as folder:
        measured = action(what, model, inputs, folder)
        with Peak(options.device) as peak:
            if options.device == "cuda":
                torch.cuda.synchronize()
            start = time.perf_counter()
            result = measured()
            if options.device == "cuda":
                torch.cuda.synchronize()
            seconds = time.perf_counter() - start
    if what == "certify" and not result:
        raise SystemExit(f"not certified:\n{result}")
    return seconds, peak.mebibytes


def in_a_process(what: str, options: argparse.Namespace) -> tuple[float, float]:
    own = ["--device", options.device, *(f"--{k}={getattr(options, k)}" for k in ("layers", "width", "inner"))]
    command = [sys.executable, "-W", "ignore", __file__, "--run", what, *own]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    return float(out[-2]), float(out[-1])


WHAT = {
    "forward": "forward", "apply(check=False)": "apply unchecked", "apply": "apply",
    "load_adapter(check=False)": "load_adapter unchecked", "load_adapter": "load_adapter", "certify": "certify",
    "fold": "fold", "unfold": "unfold", "fold(final=True)": "fold for good", "PEFT's merge": "merge",
    "PEFT's merge, bfloat16": "merge bfloat16",
}  # fmt: skip


def main() -> None:
    parser = arguments(__doc__, rounds=1)
    parser.add_argument("--run", help="one measurement, in this process")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--inner", type=int, help="of the MLP; four times the width unless given")
    options = parser.parse_args()
    if options.tiny:
        options.layers, options.width = 2, 64
    options.inner = options.inner or 4 * options.width
    if options.run:
        print(*run(options.run, options))
        return
    measured = run if options.tiny or options.device == "cuda" else in_a_process
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in WHAT}
    for _ in range(options.rounds):
        for name, what in WHAT.items():
            found[name].append(measured(what, options))
    seconds = {name: statistics.median(s for s, _ in values) for name, values in found.items()}
    unchecked = seconds["apply(check=False)"]
    rows = [
        (name, f"{seconds[name]:.3g}", f"{seconds[name] / unchecked:.2f}", f"{max(m for _, m in found[name]):.0f}")
        for name in WHAT
    ]
    title = f"Real size: Llama, {options.layers} layers, {options.width} wide, bfloat16, 16 tokens"
    report(title, ("", "s", "/ apply(check=False)", "memory above the model, MiB"), rows, options)


if __name__ == "__main__":
    main()
