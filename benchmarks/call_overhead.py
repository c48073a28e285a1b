"""What a branch costs for each call of a small layer: lora_fx, PEFT, a hand-written module; and what importing costs.

    python benchmarks/call_overhead.py [--rounds 200]

8×64 → 64, rank 4, no gradients, one thread; 50 calls of each candidate in a round. Needs peft (the `test` extra).
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import peft
import torch
import torch.nn.functional as F
from measuring import arguments, paired, report, shown
from torch import nn

import lora_fx
from lora_fx import Rule

CALLS = 50


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
        "PEFT": peft.get_peft_model(nn.Sequential(nn.Linear(64, 64)), config).base_model.model[0],
        "no branch": nn.Linear(64, 64),
    }


def called(module: nn.Module, x: torch.Tensor) -> Callable[[], None]:
    def often() -> None:
        for _ in range(CALLS):
            module(x)

    return often


def seconds_to_import() -> float:
    """Beyond torch, in a process of its own; modules are compiled already, as after an installation.

    What torch left to the garbage collector is collected before: it takes 0.1 s, whoever's import it falls into.
    """
    code = (
        "import gc, torch, time; gc.collect(); t = time.perf_counter(); import lora_fx; print(time.perf_counter() - t)"
    )
    settings = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    settings["PYTHONPYCACHEPREFIX"] = str(Path(tempfile.gettempdir()) / "lora_fx-compiled")
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=settings)
    return float(out.stdout)


def main() -> None:
    options = arguments(__doc__, rounds=200).parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    x = torch.randn(8, 64)
    modules = {name: module.eval() for name, module in candidates(x).items()}
    with torch.no_grad():
        times = paired({name: called(module, x) for name, module in modules.items()}, options.rounds)
    rows = [
        (name, f"{1e6 * times.median(name) / CALLS:.1f}", shown(times.ratio(name, "hand-written")),
         shown(times.ratio(name, "PEFT")))
        for name in modules
    ]  # fmt: skip
    report("A call of a small adapted layer", ("", "µs", "/ hand-written", "/ PEFT"), rows, options)
    seconds_to_import()  # compiles
    found = [seconds_to_import() for _ in range(1 if options.tiny else 15)]
    rows = [("import lora_fx", f"{statistics.median(found):.3f}", f"{min(found):.3f}–{max(found):.3f}")]
    report("Importing lora_fx, beyond torch", ("", "s", "from – to"), rows, options)


if __name__ == "__main__":
    main()
