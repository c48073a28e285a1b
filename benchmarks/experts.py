"""Experts: factored branches of a 3-D weight against PEFT's `target_parameters`, forward and backward.

    python benchmarks/experts.py [--rounds 15]

16 experts, 256 → 512, one 3-D parameter (experts, out, in), as many tokens for each. PEFT adds the dense delta of every
expert to the parameter; lora_fx multiplies with the factors. The floor is the forward of the frozen experts alone; "by
hand" is the fewest products that give the output and both gradients, in an autograd function for this one shape: what
is left for a library to win. Needs peft (the `test` extra).
"""

from __future__ import annotations

import copy
from typing import Any

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


class _ByHand(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Any, weight: Any, A: Any, B: Any) -> Any:  # type: ignore[override]
        z = torch.bmm(x, A.mT)
        ctx.save_for_backward(x, B, z)
        return torch.bmm(x, weight.mT).baddbmm_(z, B.mT, alpha=2)

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:  # type: ignore[override]
        x, B, z = ctx.saved_tensors
        return None, None, torch.bmm(torch.bmm(grad, B).mT, x).mul_(2), torch.bmm(grad.mT, z).mul_(2)


class ByHand(nn.Module):
    def __init__(self, weight: torch.Tensor, rank: int) -> None:
        super().__init__()
        experts, outputs, inputs = weight.shape
        self.weight = nn.Parameter(weight.detach().clone(), requires_grad=False)
        like = {"device": weight.device, "dtype": weight.dtype}
        self.A = nn.Parameter(torch.randn(experts, rank, inputs, **like))
        self.B = nn.Parameter(torch.zeros(experts, outputs, rank, **like))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _ByHand.apply(x, self.weight, self.A, self.B)


def step(model: nn.Module, x: torch.Tensor, gradient: torch.Tensor) -> None:
    model(x).backward(gradient)
    for parameter in model.parameters():
        parameter.grad = None


def main() -> None:
    parser = arguments(__doc__, rounds=15)
    parser.add_argument("--tokens", type=int, nargs="+", default=[4, 16, 64], help="for each expert")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--sizes", type=int, nargs=3, default=[16, 256, 512], help="experts, inputs, outputs")
    options = parser.parse_args()
    sizes = (4, 16, 24) if options.tiny else tuple(options.sizes)
    place = {"device": options.device, "dtype": getattr(torch, options.dtype)}
    rows = []
    for tokens in options.tokens:
        torch.manual_seed(0)
        base = Model(*sizes).to(**place)
        x, gradient = (torch.randn(sizes[0], tokens, width, **place) for width in sizes[1:])
        config = peft.LoraConfig(r=8, lora_alpha=16, target_modules=[], target_parameters=["experts.weight"])
        ours = lora_fx.apply(copy.deepcopy(base), Rule(where="*", rank=8, alpha=16), x)
        theirs = peft.get_peft_model(copy.deepcopy(base), config)
        hand = ByHand(base.experts.weight, 8)
        frozen = base.requires_grad_(False)
        candidates = {
            "lora_fx": lambda m=ours, x=x, g=gradient: step(m, x, g),
            "PEFT": lambda m=theirs, x=x, g=gradient: step(m, x, g),
            "by hand": lambda m=hand, x=x, g=gradient: step(m, x, g),
            "floor": lambda m=frozen, x=x: m(x),
        }
        calls = 8 if options.device == "cuda" else 1  # as in a model, where Python is ahead of the GPU
        times = paired(candidates, options.rounds, warm_up=2, calls=calls)
        milliseconds = (f"{1e3 * times.median(n):.1f}" for n in candidates)
        ratios = (shown(times.ratio(n, "PEFT")) for n in ("lora_fx", "by hand", "floor"))
        rows.append((str(tokens), *milliseconds, *ratios))
    title = f"Experts: {sizes[0]} of {sizes[1]}×{sizes[2]}, {options.dtype}, rank 8, forward and backward"
    header = ("tokens an expert", *(f"{n}, ms" for n in candidates), "lora_fx / PEFT", "by hand / PEFT", "floor / PEFT")
    report(title, header, rows, options)


if __name__ == "__main__":
    main()
