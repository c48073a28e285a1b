"""Experts: factored branches of a 3-D weight against PEFT's `target_parameters`, forward and backward.

    python benchmarks/experts.py [--rounds 15]

A layer of 16 experts (256 → 512 → 256) whose weights are two 3-D parameters. PEFT adds the dense delta of every expert
to the parameter in each forward; lora_fx multiplies with the factors. Needs peft (the `test` extra).
"""

from __future__ import annotations

import copy

import peft
import torch
from measuring import arguments, paired, report, shown
from torch import nn

import lora_fx
from lora_fx import Rule


class Experts(nn.Module):
    """Tokens are split evenly over the experts."""

    def __init__(self, experts: int, inputs: int, hidden: int) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(experts, inputs, hidden) * inputs**-0.5)
        self.down = nn.Parameter(torch.randn(experts, hidden, inputs) * hidden**-0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.bmm(torch.relu(torch.bmm(x, self.up)), self.down)


class Model(nn.Module):
    def __init__(self, *sizes: int) -> None:
        super().__init__()
        self.experts = Experts(*sizes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.experts(x)


def main() -> None:
    parser = arguments(__doc__, rounds=15)
    parser.add_argument("--tokens", type=int, nargs="+", default=[16, 64, 256], help="for each expert")
    options = parser.parse_args()
    sizes = (4, 16, 24) if options.tiny else (16, 256, 512)
    rows = []
    for tokens in options.tokens:
        torch.manual_seed(0)
        base = Model(*sizes)
        x = torch.randn(sizes[0], tokens, sizes[1])
        names = ["experts.up", "experts.down"]
        config = peft.LoraConfig(r=8, lora_alpha=16, target_modules=[], target_parameters=names)
        models = {
            "lora_fx": lora_fx.apply(copy.deepcopy(base), Rule(where="*", rank=8, alpha=16), x),
            "PEFT": peft.get_peft_model(copy.deepcopy(base), config),
        }

        def step(model: nn.Module, x: torch.Tensor = x) -> None:
            model(x).sum().backward()

        times = paired({n: lambda m=m: step(m) for n, m in models.items()}, options.rounds, warm_up=2)
        milliseconds = (f"{1e3 * times.median(n):.1f}" for n in ("lora_fx", "PEFT"))
        rows.append((str(tokens), *milliseconds, shown(times.ratio("lora_fx", "PEFT"))))
    title = f"Experts: {sizes[0]} of {sizes[1]}×{sizes[2]}, rank 8, forward and backward"
    report(title, ("tokens an expert", "lora_fx, ms", "PEFT, ms", "lora_fx / PEFT"), rows, options)


if __name__ == "__main__":
    main()
