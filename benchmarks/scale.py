"""Capture, plan and apply at scale: against `torch.export`, and with 175 billion parameters on `meta`.

    python benchmarks/scale.py [--rounds 5] [--device cuda]

Every measurement in a process of its own. Needs transformers (the `test` extra).
"""

from __future__ import annotations

import argparse
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import torch
from measuring import arguments, report
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import lora_fx
from lora_fx import Rule


def llama(layers: int, hidden: int) -> tuple[torch.nn.Module, dict]:
    config = LlamaConfig(
        hidden_size=hidden, intermediate_size=4 * hidden, num_hidden_layers=layers, num_attention_heads=hidden // 32,
        vocab_size=1000, use_cache=False,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval(), {"input_ids": torch.arange(16).reshape(1, 16)}


def gpt3(layers: int, width: int) -> tuple[torch.nn.Module, dict]:
    config = GPT2Config(n_embd=width, n_layer=layers, n_head=max(1, width // 128), use_cache=False)
    with torch.device("meta"):
        return GPT2LMHeadModel(config).eval(), {"input_ids": torch.zeros(1, 16, dtype=torch.long)}


def run(what: str, layers: int, width: int, device: str) -> tuple[float, float]:
    """Seconds, and the highest resident size of this process in MiB."""
    model, inputs = (gpt3 if what == "meta" else llama)(layers, width)
    if what != "meta":
        model, inputs = model.to(device), {name: numbers.to(device) for name, numbers in inputs.items()}
    rule = Rule(role="attention.query | attention.value", rank=8)
    start = now(device)
    if what == "export":
        torch.export.export(model, (), inputs)
    else:
        lora_fx.apply(model, rule, inputs, check=what == "checked")
    seconds = now(device) - start
    return seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def now(device: str) -> float:
    """Seconds, when all that was asked of the device is done."""
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter()


def in_a_process(what: str, layers: int, width: int, device: str) -> tuple[float, float]:
    command = [sys.executable, "-W", "ignore", __file__, "--run", what, str(layers), str(width), device]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    return float(out[-2]), float(out[-1])


def main() -> None:
    parser = arguments(__doc__, rounds=5)
    parser.add_argument("--device", default="cpu", help="of the models that are not on meta")
    parser.add_argument("--run", nargs=4, help="one measurement, in this process")
    parser.add_argument("--part", choices=("cpu", "meta"), help="one of the two tables")
    options = parser.parse_args()
    if options.run:
        what, layers, width, device = options.run
        print(*run(what, int(layers), int(width), device))
        return
    measured = run if options.tiny else in_a_process
    if options.part != "meta":
        against_export(measured, options)
    if options.part != "cpu":
        on_meta(measured, options)


def against_export(measured: Callable[..., tuple[float, float]], options: argparse.Namespace) -> None:
    layers, width = (2, 64) if options.tiny else (32, 256)
    found: dict[str, list[float]] = {"export": [], "apply": [], "checked": []}
    for _ in range(options.rounds):
        for what in found:
            found[what].append(measured(what, layers, width, options.device)[0])
    middle = {what: statistics.median(values) for what, values in found.items()}
    ratios = [a / b for a, b in zip(found["apply"], found["export"], strict=True)]
    rows = [
        ("torch.export", f"{middle['export']:.2f}", ""),
        ("apply, without its check", f"{middle['apply']:.2f}",
         f"{statistics.median(ratios):.2f} ({min(ratios):.2f}–{max(ratios):.2f})"),
        ("apply", f"{middle['checked']:.2f}", f"{middle['checked'] / middle['export']:.2f}"),
    ]  # fmt: skip
    report(f"Capture, plan, apply: Llama, {layers} layers, {width} wide", ("", "s", "/ torch.export"), rows, options)


def on_meta(measured: Callable[..., tuple[float, float]], options: argparse.Namespace) -> None:
    few, many, width = (1, 2, 256) if options.tiny else (24, 96, 12288)
    found: dict[int, list[tuple[float, float]]] = {few: [], many: []}
    for _ in range(options.rounds):
        for layers in found:
            found[layers].append(measured("meta", layers, width, options.device))
    rows = []
    for layers, values in found.items():
        ratios = [a[0] / b[0] for a, b in zip(values, found[few], strict=True)]
        rows.append((
            str(layers), f"{statistics.median(seconds for seconds, _ in values):.1f}",
            f"{max(memory for _, memory in values):.0f}",
            f"{statistics.median(ratios):.2f} ({min(ratios):.2f}–{max(ratios):.2f})",
        ))  # fmt: skip
    parameters = 12 * many * width**2 / 1e9
    title = f"Plan and apply on meta: GPT-3 shape, {width:,} wide, up to {parameters:.0f} billion parameters"
    report(title, ("layers", "s", "highest resident size, MiB", f"/ {few} layers"), rows, options)


if __name__ == "__main__":
    main()
