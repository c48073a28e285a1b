"""What a branch costs for each call of a small layer: lora_fx, PEFT and a hand-written module, paired and interleaved.

    python benchmarks/call_overhead.py [--rounds 200]

One round calls every candidate in a random order; a ratio is taken within a round, so noise that lasts longer than a
round cancels. Needs peft (the `test` extra).
"""

from __future__ import annotations

import argparse
import random
import time

import peft
import torch
import torch.nn.functional as F
from torch import nn

import lora_fx
from lora_fx import Rule
from lora_fx.tables import table

CALLS = 50  # of one candidate in one round


class HandWritten(nn.Module):
    """What one writes for a single layer."""

    def __init__(self, linear: nn.Linear, rank: int, scale: float) -> None:
        super().__init__()
        self.linear, self.scale = linear, scale
        self.A = nn.Parameter(torch.randn(rank, linear.in_features))
        self.B = nn.Parameter(torch.randn(linear.out_features, rank))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x) + F.linear(F.linear(x, self.A) * self.scale, self.B)


def candidates(x: torch.Tensor) -> dict[str, nn.Module]:
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["0"])
    return {
        "hand-written": HandWritten(nn.Linear(64, 64), 4, 2.0),
        "lora_fx": lora_fx.apply(nn.Linear(64, 64), Rule(where="*", rank=4, alpha=8), x),
        "peft": peft.get_peft_model(nn.Sequential(nn.Linear(64, 64)), config).base_model.model[0],
        "no branch": nn.Linear(64, 64),
    }


def seconds(module: nn.Module, x: torch.Tensor) -> float:
    start = time.perf_counter()
    for _ in range(CALLS):
        module(x)
    return (time.perf_counter() - start) / CALLS


def quartiles(values: list[float]) -> tuple[float, float, float]:
    low, middle, high = torch.tensor(values, dtype=torch.float64).quantile(torch.tensor([0.25, 0.5, 0.75]).double())
    return float(low), float(middle), float(high)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=200)
    rounds = parser.parse_args().rounds
    torch.manual_seed(0)
    torch.set_num_threads(1)
    x = torch.randn(8, 64)
    modules = {name: module.eval() for name, module in candidates(x).items()}
    times: dict[str, list[float]] = {name: [] for name in modules}
    with torch.no_grad():
        for _ in range(rounds):
            for name in random.sample(list(modules), len(modules)):
                times[name].append(seconds(modules[name], x))
    rows = []
    for name, values in times.items():
        low, middle, high = (1e6 * q for q in quartiles(values))
        ratio = quartiles([a / b for a, b in zip(values, times["hand-written"], strict=True)])
        rows.append((name, f"{middle:.1f}", f"{low:.1f}–{high:.1f}", f"{ratio[1]:.2f} ({ratio[0]:.2f}–{ratio[2]:.2f})"))
    print(f"8×64 → 64, rank 4, no gradients, torch {torch.__version__}, peft {peft.__version__}, {rounds} rounds")
    print(table(("", "µs a call", "quartiles", "× hand-written"), rows, right=(1, 2, 3)))


if __name__ == "__main__":
    main()
