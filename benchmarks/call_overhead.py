"""What a branch costs for each call of a small layer: lora_fx, PEFT, a hand-written module; and what importing costs.

    python benchmarks/call_overhead.py [--rounds 200]

And what it costs to switch the adapters of a Llama off and on again: 24 layers of 7 linears.

A linear 64 → 64 of 8 rows, and torch's attention, 64 wide with 4 heads, of 2×8 tokens; rank 4, one thread, 50 calls of
each candidate in a round, without gradients and with; the time that the thread computes. Needs peft (the `test` extra).

By hand is what one writes for that layer alone: a module with two more matrices; the attention with its projections and
`scaled_dot_product_attention`, or torch's own function with the sums W + s·B·A.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from time import thread_time

import peft
import torch
import torch.nn.functional as F
from measuring import arguments, paired, report, shown
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import lora_fx
from lora_fx import Rule

CALLS = 50


class HandWritten(nn.Module):
    """What one writes for a single layer."""

    def __init__(self, linear: nn.Linear, rank: int, scale: float) -> None:
        super().__init__()
        self.linear, self.scale = linear.requires_grad_(False), scale
        self.A = nn.Parameter(torch.randn(rank, linear.in_features))
        self.B = nn.Parameter(torch.randn(linear.out_features, rank))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x) + F.linear(F.linear(x, self.A) * self.scale, self.B)


class HandWrittenAttention(nn.MultiheadAttention):
    """Self-attention of one shape of input, with no mask and no weights returned."""

    def __init__(self, width: int, heads: int, rank: int, scale: float) -> None:
        super().__init__(width, heads, batch_first=True)
        self.requires_grad_(False)
        self.scale = scale
        self.A, self.A_out = (nn.Parameter(torch.randn(rank, width)) for _ in range(2))
        self.B, self.B_out = nn.Parameter(torch.randn(3 * width, rank)), nn.Parameter(torch.randn(width, rank))

    def forward(self, x: torch.Tensor, *_: torch.Tensor, need_weights: bool = False) -> tuple[torch.Tensor, None]:
        many, tokens, _ = x.shape
        packed = F.linear(x, self.in_proj_weight, self.in_proj_bias)
        packed = packed + F.linear(F.linear(x, self.A) * self.scale, self.B)
        q, k, v = packed.view(many, tokens, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape)
        return self.out_proj(mixed) + F.linear(F.linear(mixed, self.A_out) * self.scale, self.B_out), None


class SummedAttention(HandWrittenAttention):
    """Torch's own function, which takes every mask and option, with the sums."""

    def forward(self, x: torch.Tensor, *_: torch.Tensor, need_weights: bool = False) -> tuple[torch.Tensor, None]:
        x = x.transpose(0, 1)
        packed = self.in_proj_weight + self.scale * self.B @ self.A
        out = self.out_proj.weight + self.scale * self.B_out @ self.A_out
        mixed, _ = F.multi_head_attention_forward(
            x, x, x, self.embed_dim, self.num_heads, packed, self.in_proj_bias, None, None, False, 0.0, out,
            self.out_proj.bias, training=self.training, need_weights=need_weights,
        )  # fmt: skip
        return mixed.transpose(0, 1), None


RULE = Rule(where="*", rank=4, alpha=8)


def linears(x: torch.Tensor) -> dict[str, nn.Module]:
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["0"])
    modules = {
        "hand-written": HandWritten(nn.Linear(64, 64), 4, 2.0),
        "lora_fx, generated forward": lora_fx.apply(nn.Linear(64, 64), RULE, x),
        "lora_fx, dispatched": lora_fx.apply(nn.Linear(64, 64), RULE),
        "PEFT": peft.get_peft_model(nn.Sequential(nn.Linear(64, 64)), config).base_model.model[0],
        "no branch": nn.Linear(64, 64).requires_grad_(False),
    }
    for name, realised in (("lora_fx, generated forward", "graph"), ("lora_fx, dispatched", "dispatch")):
        assert modules[name].weight_lora_default.realised == realised
    return modules


def attentions(x: torch.Tensor) -> dict[str, nn.Module]:
    return {
        "hand-written": HandWrittenAttention(64, 4, 4, 2.0),
        "hand-written, sums": SummedAttention(64, 4, 4, 2.0),
        "lora_fx, dispatched": lora_fx.apply(nn.MultiheadAttention(64, 4, batch_first=True), RULE, (x, x, x)),
        "no branch": nn.MultiheadAttention(64, 4, batch_first=True).requires_grad_(False),
    }


def switching(layers: int) -> dict[str, Callable[[], None]]:
    """All adapters off, and on again."""
    config = LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=layers, num_attention_heads=4, vocab_size=64
    )
    rule, inputs = Rule(where="*_proj", rank=4), {"input_ids": torch.arange(16)[None]}
    other = peft.get_peft_model(LlamaForCausalLM(config), peft.LoraConfig(r=4, target_modules=r".*_proj")).base_model

    def off_and_on(model: nn.Module) -> Callable[[], None]:
        def switched() -> None:
            lora_fx.activate(model)
            lora_fx.activate(model, "default")

        return switched

    def peft_off_and_on() -> None:
        other.disable_adapter_layers()
        other.enable_adapter_layers()

    generated = lora_fx.apply(LlamaForCausalLM(config), rule, inputs, check=False)
    return {
        "PEFT": peft_off_and_on,
        "lora_fx, generated forwards": off_and_on(generated),
        "lora_fx, dispatched": off_and_on(lora_fx.apply(WithoutInputs(config), rule, check=False)),
    }


class WithoutInputs(LlamaForCausalLM):
    """Planned from its module types: whoever reads a weight is served."""

    dummy_inputs = None


def called(module: nn.Module, x: torch.Tensor, **options: bool) -> Callable[[], None]:
    inputs = (x, x, x) if isinstance(module, nn.MultiheadAttention) else (x,)

    def often() -> None:
        for _ in range(CALLS):
            y = module(*inputs, **options)
            if torch.is_grad_enabled():
                (y[0] if options else y).sum().backward()

    return often


def seconds_to_import() -> float:
    """Beyond torch, in a process of its own; modules are compiled already, as after an installation.

    What torch left to the garbage collector is collected before: it takes 0.1 s, whoever's import it falls into.
    """
    code = (
        "import gc, torch, time; gc.collect(); t = time.perf_counter(); from lora_fx import plan; "
        "print(time.perf_counter() - t)"
    )
    settings = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    settings["PYTHONPYCACHEPREFIX"] = str(Path(tempfile.gettempdir()) / "lora_fx-compiled")
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=settings)
    return float(out.stdout)


def main() -> None:
    options = arguments(__doc__, rounds=200).parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    rows = []
    for layer, of, x, asked in (
        ("linear", linears, torch.randn(8, 64), {}),
        ("attention", attentions, torch.randn(2, 8, 64), {"need_weights": False}),
    ):
        modules = {name: module.eval() for name, module in of(x).items()}
        for gradients in False, True:
            own = x.clone().requires_grad_(gradients)
            with torch.set_grad_enabled(gradients):
                works = {name: called(m, own, **asked) for name, m in modules.items()}
                times = paired(works, options.rounds, clock=thread_time)
            title = f"{layer}, with backward" if gradients else layer
            for name in modules:
                median, least = times.median(name), min(times.seconds[name])
                us = [f"{1e6 * seconds / CALLS:.1f}" for seconds in (median, least)]
                rows.append((name, title, *us, shown(times.ratio(name, "hand-written"))))
    report("A call of a small adapted layer", ("", "", "µs", "least", "/ hand-written"), rows, options)
    works = switching(2 if options.tiny else 24)
    times = paired(works, max(3, options.rounds // 10), clock=thread_time)
    rows = [(name, f"{1e3 * times.median(name):.1f}", shown(times.ratio(name, "PEFT"))) for name in works]
    report("Adapters of 168 linears off and on again", ("", "ms", "/ PEFT"), rows, options)
    seconds_to_import()  # compiles
    found = [seconds_to_import() for _ in range(1 if options.tiny else 15)]
    rows = [("import lora_fx", f"{statistics.median(found):.3f}", f"{min(found):.3f}–{max(found):.3f}")]
    report("Importing lora_fx, beyond torch", ("", "s", "from – to"), rows, options)


if __name__ == "__main__":
    main()
