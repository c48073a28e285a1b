"""Fold and unfold 2 GiB of weights: time against PEFT's `merge_and_unload`, extra memory, and every element checked.

    python benchmarks/folding.py [--rounds 5] [--gib 2] [--device cuda]

Weights of 4096×4096, rank 8. PEFT's merge cannot be undone exactly; its counterpart is `fold(final=True)`. The extra
memory is the highest resident size during the fold, in a process of its own, above that before it.
"""

from __future__ import annotations

import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from measuring import arguments, report
from torch import nn

WIDTH, RANK = 4096, 8


def build(dtype: torch.dtype, width: int, layers: int, device: str) -> nn.Module:
    torch.manual_seed(0)
    linears = [nn.Linear(width, width, bias=False, dtype=dtype, device="meta") for _ in range(layers)]
    model = nn.Sequential(*linears).to_empty(device=device)
    with torch.no_grad():
        one = torch.randn(width, width) * width**-0.5
        for linear in model:
            linear.weight.copy_(one)
    return model


def fill(model: nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape) * 0.02)


def forget_peak(device: str) -> None:
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # of building


def now(device: str) -> float:
    """Seconds, when all that was asked of the device is done."""
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def resident(device: str) -> int:
    if device == "cuda":
        return torch.cuda.memory_allocated()
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def peak(device: str) -> int:
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def run(what: str, dtype: str, width: int, layers: int, device: str) -> tuple[float, float, float]:
    """Seconds of the fold and of the unfold, and the bytes that the fold took beside the model."""
    model = build(getattr(torch, dtype), width, layers, device)
    if what == "PEFT":
        import peft

        config = peft.LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=r"\d+")
        model = peft.get_peft_model(model, config)
        fill(model)
        forget_peak(device)
        before, start = resident(device), now(device)
        model.merge_and_unload()
        return now(device) - start, 0, peak(device) - before
    import lora_fx

    lora_fx.apply(model, lora_fx.Rule(where="*", rank=RANK, alpha=2 * RANK))
    fill(model)
    forget_peak(device)
    before, start = resident(device), now(device)
    lora_fx.fold(model, final=what == "final")
    folded, high = now(device) - start, peak(device) - before
    start = now(device)
    if what == "undoable":
        lora_fx.unfold(model)
    return folded, now(device) - start, high


def in_a_process(what: str, dtype: str, width: int, layers: int, device: str) -> tuple[float, float, float]:
    command = [sys.executable, "-W", "ignore", __file__, "--run", what, dtype, str(width), str(layers), device]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    return float(out[-3]), float(out[-2]), float(out[-1])


def main() -> None:
    parser = arguments(__doc__, rounds=5)
    parser.add_argument("--gib", type=float, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--run", nargs=5, help="one measurement, in this process")
    options = parser.parse_args()
    if options.run:
        what, dtype, width, layers, device = options.run
        print(*run(what, dtype, int(width), int(layers), device))
        return
    measured = run if options.tiny else in_a_process
    rows = []
    width = 64 if options.tiny else WIDTH
    for dtype in ("float32", "bfloat16"):
        size = getattr(torch, dtype).itemsize
        layers = 2 if options.tiny else round(options.gib * 2**30 / (width * width * size))
        found: dict[str, list[tuple[float, float, float]]] = {"PEFT": [], "final": [], "undoable": []}
        for _ in range(options.rounds):
            for what in found:
                found[what].append(measured(what, dtype, width, layers, options.device))

        def middle(what: str, part: int, found: dict = found) -> float:
            return statistics.median(one[part] for one in found[what])

        ratios = [a[0] / b[0] for a, b in zip(found["final"], found["PEFT"], strict=True)]
        rows.append((
            dtype, f"{middle('PEFT', 0):.2f}", f"{middle('final', 0):.2f}",
            f"{statistics.median(ratios):.2f} ({min(ratios):.2f}–{max(ratios):.2f})",
            f"{middle('undoable', 0):.2f}", f"{middle('undoable', 1):.2f}",
            f"{middle('undoable', 1) / middle('undoable', 0):.2f}",
            f"{middle('final', 2) / 2**20:.0f}", f"{middle('PEFT', 2) / 2**20:.0f}",
        ))  # fmt: skip
    header = (
        "weights", "PEFT merge, s", "fold(final=True), s", "/ PEFT", "fold, s", "unfold, s", "unfold / fold",
        "extra memory of fold(final=True), MiB", "PEFT's, MiB",
    )  # fmt: skip
    report(
        f"Folding {options.gib:g} GiB, rank {RANK}", header, rows, options, "Each measurement in a process of its own."
    )


if __name__ == "__main__":
    main()
