"""What ONNX Runtime makes of base, unfolded and folded graphs: fused nodes, and latency.

    python benchmarks/onnx_graphs.py [--rounds 60] [--part fusion | latency]

Fusion: the runtime's own optimizer, and its offline tool for transformers where that knows the architecture. Latency:
paired, interleaved calls of sessions on the CPU, one thread. Needs transformers (the `test` extra).
"""

from __future__ import annotations

import functools
import logging
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import onnx
import onnxruntime
import torch
from measuring import arguments, paired, report, shown
from torch import nn
from transformers import (
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    ViTConfig,
    ViTForImageClassification,
)

import lora_fx
from lora_fx import Rule
from lora_fx.export import Session, save_onnx_adapter
from lora_fx.export.onnx.proof import fused_operators

RULE = Rule(role="attention.query | attention.value", rank=8)
FORMS = ("base", "unfolded", "folded")
OPSET = {"BERT, sdpa, opset 23": 23}


def tokens(batch: int = 2, length: int = 16) -> dict[str, torch.Tensor]:
    return {"input_ids": torch.arange(batch * length).reshape(batch, length) % 90}


def masked(batch: int = 2, length: int = 16) -> dict[str, torch.Tensor]:
    return {**tokens(batch, length), "attention_mask": torch.ones(batch, length, dtype=torch.long)}


def bert(attention: str, width: int, layers: int) -> nn.Module:
    config = BertConfig(
        hidden_size=width, num_hidden_layers=layers, num_attention_heads=width // 16, intermediate_size=4 * width,
        vocab_size=99, attn_implementation=attention,
    )  # fmt: skip
    return BertModel(config, add_pooling_layer=False)


def models(width: int, layers: int) -> dict[str, tuple[nn.Module, dict[str, torch.Tensor], str]]:
    """name → model, inputs, and the name that the offline tool has for its kind."""
    heads = dict(num_hidden_layers=layers, num_attention_heads=width // 16, hidden_size=width)
    gpt2 = GPT2Config(n_embd=width, n_layer=layers, n_head=width // 16, vocab_size=99, use_cache=False)
    vit = ViTConfig(image_size=32, patch_size=8, intermediate_size=4 * width, **heads)
    llama = LlamaConfig(intermediate_size=2 * width, vocab_size=99, use_cache=False, **heads)
    return {
        "BERT, eager": (bert("eager", width, layers), masked(), "bert"),
        "BERT, sdpa": (bert("sdpa", width, layers), masked(), "bert"),
        "BERT, sdpa, opset 23": (bert("sdpa", width, layers), masked(), "bert"),
        "GPT-2": (GPT2LMHeadModel(gpt2), tokens(), "gpt2"),
        "ViT": (ViTForImageClassification(vit), {"pixel_values": torch.randn(2, 3, 32, 32)}, "vit"),
        "Llama": (LlamaForCausalLM(llama), tokens(), ""),
    }


def files(
    model: nn.Module, inputs: Any, folder: Path, name: str, forms: tuple[str, ...], **options: Any
) -> dict[str, Path]:
    """The model's file in each form; adapters with B ≠ 0."""
    model.eval()
    found = {"base": lora_fx.export_onnx(model, inputs, folder / f"{name}.base.onnx", **options).path}
    lora_fx.apply(model, RULE, inputs)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.02)
    for form in forms[1:]:
        found[form] = lora_fx.export_onnx(model, inputs, folder / f"{name}.{form}.onnx", adapters=form, **options).path
    return found


def tool_operators(path: Path, kind: str, heads: int, width: int) -> dict[str, int] | None:
    """The runtime's own operators after its offline tool for transformers; None where the tool fails."""
    from onnxruntime.transformers.optimizer import optimize_model

    logging.disable(logging.WARNING)
    try:
        optimized = optimize_model(str(path), model_type=kind, num_heads=heads, hidden_size=width, opt_level=0)
    except AttributeError:  # of onnxruntime 1.32, on every GPT-2 that has no past
        return None
    finally:
        logging.disable(logging.NOTSET)
    counts: dict[str, int] = {}
    for node in optimized.model.graph.node:
        if node.domain == "com.microsoft":
            counts[node.op_type] = counts.get(node.op_type, 0) + 1
    return counts


def fusion(options: Any) -> None:
    width, layers = (32, 2) if options.tiny else (64, 4)
    rows, differ = [], []
    for name, (model, inputs, kind) in models(width, layers).items():
        with tempfile.TemporaryDirectory() as place:
            folder, counted = Path(place), {}
            made = files(model, inputs, folder, "m", FORMS, opset=OPSET.get(name, 20))
            for form, path in made.items():
                nodes = len(onnx.load(path).graph.node)
                online = fused_operators(path, folder)
                offline = tool_operators(path, kind, width // 16, width) if kind else {}
                counted[form] = (nodes, online, offline)
                rows.append((f"{name}: {form}", str(nodes), listed(online), listed(offline) if kind else "–"))
            if counted["folded"] != counted["base"]:
                differ.append(name)
    note = "folded = base in every row" if not differ else f"folded differs from base: {', '.join(differ)}"
    header = ("", "nodes in the file", "fused by the session", "fused by the offline tool")
    report(f"Fused nodes: {layers} layers, {width} wide, adapters on query and value", header, rows, options, note)
    if differ:
        raise SystemExit(note)


def listed(counts: dict[str, int] | None) -> str:
    if counts is None:
        return "the tool fails"
    return ", ".join(f"{n} {op}" for op, n in sorted(counts.items())) or "none"


def latency(options: Any) -> None:
    # Short calls on one thread: on a machine that does other things too, long ones never run alone.
    large = (768, 12, 128) if options.device == "cuda" else (128, 2, 32)
    width, layers, length = (32, 1, 8) if options.tiny else large
    rows = []
    with tempfile.TemporaryDirectory() as place:
        folder, model, inputs = Path(place), bert("sdpa", width, layers), masked(2, length)
        dynamic = {"input_ids": {0: "batch"}, "attention_mask": {0: "batch"}}
        forms = (*FORMS, "switchable")
        made = files(model, inputs, folder, "m", forms, dynamic_shapes=dynamic)
        adapter = save_onnx_adapter(model, folder / "a.onnx_adapter")
        settings = onnxruntime.SessionOptions()
        settings.intra_op_num_threads, settings.log_severity_level = 1, 3
        providers = ["CUDAExecutionProvider" if options.device == "cuda" else "CPUExecutionProvider"]
        sessions = {form: Session(path, providers=providers, options=settings) for form, path in made.items()}
        sessions["base again"] = Session(made["base"], providers=providers, options=settings)
        sessions["switchable"].load_adapter(adapter, "a")
        for batch in (1, 16):
            feeds = {name: tensor.numpy() for name, tensor in masked(batch, length).items()}
            calls: dict[str, Callable[[], Any]] = {
                name: functools.partial(session.run, feeds) for name, session in sessions.items()
            }
            calls["switchable, no adapter"] = calls.pop("switchable")
            calls["switchable, an adapter"] = functools.partial(sessions["switchable"].run, feeds, "a")
            times = paired(calls, options.rounds, warm_up=3, calls=max(1, 4 // batch))
            for name in calls:
                ratios = (shown(f(name, "base"), 3) for f in (times.ratio, times.interval))
                rows.append((f"batch {batch}: {name}", f"{times.median(name) * 1e3:.2f}", *ratios))
    title = f"Latency in ONNX Runtime: BERT, {layers} layers, {width} wide, {length} tokens, rank 8 on query and value"
    note = "One thread a session. Base again: a second session of the base's own file, which is what 1 looks like here."
    report(title, ("", "ms", "/ base (quartiles)", "/ base (95 % interval of the median)"), rows, options, note)


def main() -> None:
    parser = arguments(__doc__, rounds=60)
    parser.add_argument("--part", choices=("fusion", "latency"), help="one of the two tables")
    parser.add_argument("--device", default="cpu", help="of the latency")
    options = parser.parse_args()
    torch.manual_seed(0)
    numpy.random.seed(0)
    if options.part != "latency":
        fusion(options)
    if options.part != "fusion":
        latency(options)


if __name__ == "__main__":
    main()
