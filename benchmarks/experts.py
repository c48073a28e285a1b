"""Experts: factored branches of a 3-D weight against PEFT's `target_parameters`, forward and backward.

    python benchmarks/experts.py [--rounds 15]

16 experts, 256 → 512, one 3-D parameter (experts, out, in), as many tokens for each. PEFT adds the dense delta of every
expert to the parameter; lora_fx multiplies with the factors. The floor is the forward of the frozen experts alone.
Needs peft (the `test` extra).
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
    def __init__(self, experts: int, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(experts, outputs, inputs) * inputs**-0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.bmm(x, self.weight.transpose(1, 2))


class Model(nn.Module):
    def __init__(self, *sizes: int) -> None:
        super().__init__()
        self.experts = Experts(*sizes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.experts(x)


def step(model: nn.Module, x: torch.Tensor, gradient: torch.Tensor) -> None:
    model(x).backward(gradient)
    for parameter in model.parameters():
        parameter.grad = None


def main() -> None:
    parser = arguments(__doc__, rounds=15)
    parser.add_argument("--tokens", type=int, nargs="+", default=[4, 16, 64], help="for each expert")
    options = parser.parse_args()
    sizes = (4, 16, 24) if options.tiny else (16, 256, 512)
    rows = []
    for tokens in options.tokens:
        torch.manual_seed(0)
        base = Model(*sizes)
        x, gradient = (torch.randn(sizes[0], tokens, width) for width in sizes[1:])
        config = peft.LoraConfig(r=8, lora_alpha=16, target_modules=[], target_parameters=["experts.weight"])
        ours = lora_fx.apply(copy.deepcopy(base), Rule(where="*", rank=8, alpha=16), x)
        theirs = peft.get_peft_model(copy.deepcopy(base), config)
        frozen = base.requires_grad_(False)
        candidates = {
            "lora_fx": lambda m=ours, x=x, g=gradient: step(m, x, g),
            "PEFT": lambda m=theirs, x=x, g=gradient: step(m, x, g),
            "floor": lambda m=frozen, x=x: m(x),
        }
        times = paired(candidates, options.rounds, warm_up=2)
        milliseconds = (f"{1e3 * times.median(n):.1f}" for n in candidates)
        ratios = (shown(times.ratio(n, "PEFT")) for n in ("lora_fx", "floor"))
        rows.append((str(tokens), *milliseconds, *ratios))
    title = f"Experts: {sizes[0]} of {sizes[1]}×{sizes[2]}, rank 8, forward and backward"
    header = ("tokens an expert", "lora_fx, ms", "PEFT, ms", "floor, ms", "lora_fx / PEFT", "floor / PEFT")
    report(title, header, rows, options)


if __name__ == "__main__":
    main()
