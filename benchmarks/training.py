"""A training step (forward and backward) of lora_fx, PEFT and the floor: the same model, frozen, gradients flowing.

    python benchmarks/training.py [--rounds 15] [--compile] [--device cuda --dtype bfloat16] [--only "llama.*"]

With one thread (`OMP_NUM_THREADS=1`) it is the time that this thread computes, whatever else the machine does.

The floor computes every gradient that a step must pass through, and no adapter: nothing that trains adapters in the
first layer can be faster. Beside a base of lower precision PEFT keeps adapters in float32, and computes in that, too;
"PEFT, cast" has them in the base's dtype, which is faster. Needs peft and transformers (the `test` extra).
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter, thread_time
from typing import Any

import peft
import torch
import torch.nn.functional as F
from measuring import arguments, paired, report, shown
from torch import nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    ViTConfig,
    ViTForImageClassification,
)

import lora_fx
from lora_fx import Rule
from lora_fx.demo.experiment import VisionTransformer

RANK, ALPHA = 8, 16


@dataclass(frozen=True)
class Size:
    hidden: int
    layers: int
    batch: int
    tokens: int
    vocabulary: int = 2048

    @property
    def heads(self) -> int:
        return max(1, self.hidden // 64)


def llama(size: Size) -> tuple[nn.Module, dict[str, Any]]:
    config = LlamaConfig(
        hidden_size=size.hidden, intermediate_size=size.hidden * 43 // 16, num_hidden_layers=size.layers,
        num_attention_heads=size.heads, vocab_size=size.vocabulary, use_cache=False,
    )  # fmt: skip
    return LlamaForCausalLM(config), _text(size)


def gpt2(size: Size) -> tuple[nn.Module, dict[str, Any]]:
    config = GPT2Config(
        n_embd=size.hidden, n_layer=size.layers, n_head=size.heads, vocab_size=size.vocabulary,
        n_positions=size.tokens, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, use_cache=False,
    )  # fmt: skip
    return GPT2LMHeadModel(config), _text(size)


def vit(size: Size) -> tuple[nn.Module, dict[str, Any]]:
    side = 16 * int(size.tokens**0.5)
    config = ViTConfig(
        hidden_size=size.hidden, intermediate_size=4 * size.hidden, num_hidden_layers=size.layers,
        num_attention_heads=size.heads, image_size=side, num_labels=10,
    )  # fmt: skip
    images = torch.randn(size.batch, 3, side, side)
    return ViTForImageClassification(config), {"pixel_values": images, "labels": torch.arange(size.batch) % 10}


def demo(size: Size) -> tuple[nn.Module, dict[str, Any]]:
    """The demo's model and its batch, whatever the size."""
    return VisionTransformer(), {"images": torch.randn(128, 1, 8, 8)}


def _text(size: Size) -> dict[str, Any]:
    ids = torch.randint(0, size.vocabulary, (size.batch, size.tokens))
    return {"input_ids": ids, "labels": ids}


@dataclass(frozen=True)
class Case:
    name: str
    build: Callable[[Size], tuple[nn.Module, dict[str, Any]]]
    rule: dict[str, Any]
    targets: str
    """What PEFT adapts: a regular expression over module names."""
    dropout: float = 0.0
    kind: str = "lora"


QUERY_VALUE = {"role": "attention.query | attention.value"}
CASES = (
    Case("Llama, all linears", llama, {"where": "*_proj"}, r".*_proj"),
    Case("Llama, all linears, dropout 0.1", llama, {"where": "*_proj"}, r".*_proj", 0.1),
    Case("Llama, query | value", llama, QUERY_VALUE, r".*(q|v)_proj"),
    Case("GPT-2, query | value parts (PEFT: whole c_attn)", gpt2, QUERY_VALUE, r".*c_attn"),
    Case("ViT, query | value", vit, QUERY_VALUE, r".*\.(query|value|q_proj|v_proj)"),
    Case("the demo's ViT, query | value, dropout 0.05", demo, QUERY_VALUE, r".*to_(q|v)", 0.05),
    Case("Llama, all linears, DoRA", llama, {"where": "*_proj"}, r".*_proj", kind="dora"),
    Case("Llama, all linears, DoRA, dropout 0.1", llama, {"where": "*_proj"}, r".*_proj", 0.1, "dora"),
)


def with_lora_fx(base: nn.Module, inputs: dict[str, Any], case: Case, **settings: Any) -> nn.Module:
    rule = Rule(**case.rule, kind=case.kind, rank=RANK, alpha=ALPHA, dropout=case.dropout, **settings)
    short = {name: t[:1] for name, t in inputs.items()}
    return lora_fx.apply(copy.deepcopy(base), rule, short, check=False)


def with_peft(base: nn.Module, case: Case, cast: bool = False) -> nn.Module:
    """
    Args:
        cast: the adapters are of the base's dtype.
    """
    config = peft.LoraConfig(
        r=RANK, lora_alpha=ALPHA, target_modules=case.targets, lora_dropout=case.dropout, use_dora=case.kind == "dora"
    )
    return peft.get_peft_model(copy.deepcopy(base), config, autocast_adapter_dtype=not cast)


def floor(base: nn.Module) -> nn.Module:
    """All weights frozen; the first activation asks for a gradient."""
    model = copy.deepcopy(base).requires_grad_(False)
    if isinstance(model, VisionTransformer):
        first = model.patches
    else:
        first = model.vit.embeddings if hasattr(model, "vit") else model.get_input_embeddings()
    first.register_forward_hook(lambda module, args, out: out.requires_grad_())
    return model


def loss(model: nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
    found = model(**inputs)
    return F.cross_entropy(found, torch.arange(len(found)) % 10) if isinstance(found, torch.Tensor) else found.loss


def step(model: nn.Module, inputs: dict[str, Any]) -> None:
    loss(model, inputs).backward()
    for parameter in model.parameters():
        parameter.grad = None


def peak_bytes(model: nn.Module, inputs: dict[str, Any]) -> int:
    """The most memory that a step takes on a GPU, above what was taken before."""
    step(model, inputs)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step(model, inputs)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def saved_bytes(model: nn.Module, inputs: dict[str, Any]) -> int:
    """What a forward keeps for backward, each storage once, parameters and buffers not counted.

    Read off the nodes: hooks on saved tensors would change what is saved.
    """
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    found: dict[int, int] = {}
    nodes, seen = [loss(model, inputs).grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        nodes += [before for before, _ in node.next_functions]
        for t in _saved_by(node):
            found[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
    return sum(size for place, size in found.items() if place not in own)


def _saved_by(node: Any) -> list[torch.Tensor]:
    if hasattr(node, "saved_tensors"):  # a torch.autograd.Function
        return [t for t in node.saved_tensors if t is not None]
    values = [getattr(node, name) for name in dir(node) if name.startswith("_saved_")]
    values += [one for value in values if isinstance(value, tuple) for one in value]
    return [value for value in values if isinstance(value, torch.Tensor)]


def main() -> None:
    parser = arguments(__doc__, rounds=15)
    parser.add_argument("--only", default=".*", help="cases whose name is this, a regular expression")
    parser.add_argument("--compile", action="store_true", help="torch.compile, Inductor")
    parser.add_argument("--schedules", action="store_true", help="lora_fx with each schedule, instead of PEFT")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=256)
    options = parser.parse_args()
    size = Size(options.hidden, options.layers, options.batch, options.tokens)
    if options.tiny:
        size = Size(64, 1, 2, 16, 64)
    rows = []
    for case in CASES:
        if re.fullmatch(options.only, case.name, re.IGNORECASE) and not (options.schedules and case.kind != "lora"):
            rows.append(_row(case, size, options))
    names = options.dtype, f"hidden {size.hidden}", f"{size.layers} layers", f"{size.batch}×{size.tokens} tokens"
    title = "Compiled training step" if options.compile else "Training step"
    if options.schedules:
        title += " by schedule"
        header = ("", "auto, ms", "branch / auto", "in_place / auto", "fused / auto", "dense / auto")
    else:
        header = (
            "", "lora_fx, ms", "/ PEFT", "/ PEFT, cast", "/ floor", "PEFT / floor", "full / PEFT",
            "saved for backward / PEFT", "a step's memory, GiB: lora_fx, PEFT, cast, floor",
        )  # fmt: skip
    report(f"{title}: {', '.join(names)}, rank {RANK}", header, rows, options)


def _row(case: Case, size: Size, options: Any) -> tuple[str, ...]:
    torch.manual_seed(0)
    base, inputs = case.build(size)
    base = base.to(options.device, getattr(torch, options.dtype)).train()
    inputs = {
        k: t.to(options.device, getattr(torch, options.dtype)) if t.is_floating_point() else t.to(options.device)
        for k, t in inputs.items()
    }
    if options.schedules:
        models = {
            how: with_lora_fx(base, inputs, case, schedule=how) for how in ("auto", "branch", "in_place", "fused")
        }
        if not case.dropout and options.dtype == "float32":
            models["dense"] = with_lora_fx(base, inputs, case, schedule="dense")
        else:
            models["dense"] = models["fused"]
    else:
        models = {
            "lora_fx": with_lora_fx(base, inputs, case),
            "PEFT": with_peft(base, case),
            "floor": floor(base),
            "full": copy.deepcopy(base),
        }
        if options.dtype != "float32":
            models["PEFT, cast"] = with_peft(base, case, cast=True)
        saved = saved_bytes(models["lora_fx"], inputs) / saved_bytes(models["PEFT"], inputs)
        of = [name for name in ("lora_fx", "PEFT", "PEFT, cast", "floor") if name in models]
        on_gpu = options.device == "cuda"
        memory = ", ".join(f"{peak_bytes(models[name], inputs) / 2**30:.2f}" for name in of) if on_gpu else ""
    if options.compile:
        for model in models.values():
            model.compile()
    clock = thread_time if options.device == "cpu" and torch.get_num_threads() == 1 else perf_counter
    times = paired({n: lambda m=m: step(m, inputs) for n, m in models.items()}, options.rounds, warm_up=2, clock=clock)
    if options.schedules:
        return (case.name, f"{1e3 * times.median('auto'):.0f}",
                *(shown(times.ratio(n, "auto")) for n in ("branch", "in_place", "fused", "dense")))  # fmt: skip
    cast = shown(times.ratio("lora_fx", "PEFT, cast")) if "PEFT, cast" in models else ""
    return (
        case.name, f"{1e3 * times.median('lora_fx'):.0f}", shown(times.ratio("lora_fx", "PEFT")), cast,
        shown(times.ratio("lora_fx", "floor")), shown(times.ratio("PEFT", "floor")),
        shown(times.ratio("full", "PEFT")), f"{saved:.2f}", memory,
    )  # fmt: skip


if __name__ == "__main__":
    main()
