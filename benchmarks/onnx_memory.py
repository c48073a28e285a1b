"""Memory: a file streamed from a checkpoint that is never in memory, and sessions that share weights.

    python benchmarks/onnx_memory.py [--part stream | sessions]

Each measurement in a process of its own: its highest resident size, above that of the imports. Needs transformers (the
`test` extra), and, at full size, 10 GB of disk.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy
import torch
from measuring import arguments, report
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

import lora_fx
from lora_fx import Rule
from lora_fx.export import Session, save_onnx_weights

RULE = Rule(role="attention.query | attention.value", rank=8)
IDS = {"input_ids": torch.arange(32).reshape(2, 16)}
AXES = {"input_ids": {0: "batch", 1: "tokens"}}


def llama(tiny: bool, layers: int = 0) -> LlamaForCausalLM:
    """About 3.1 GB in float32."""
    width, layers = (64, 2) if tiny else (2048, layers or 14)
    config = LlamaConfig(
        hidden_size=width, num_hidden_layers=layers, num_attention_heads=width // 32, intermediate_size=11 * width // 4,
        vocab_size=128 if tiny else 8192, use_cache=False,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def peak() -> float:
    """The highest resident size of this process, in MiB. (`getrusage` gives the parent's to a child.)"""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024


def resident() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20


def on_meta(tiny: bool) -> LlamaForCausalLM:
    """Parameters on meta, buffers that no checkpoint holds (rotary frequencies) with their numbers."""
    with torch.device("meta"):
        model = llama(tiny)
    model.model.rotary_emb = type(model.model.rotary_emb)(model.config)
    return model


def checkpoint(folder: Path, tiny: bool) -> int:
    """Random weights in several files and an index, as large models come; and an adapter."""
    generator, size, index, shard = torch.Generator().manual_seed(0), 0, {}, {}
    names = list(on_meta(tiny).named_parameters())
    for n, (name, meta) in enumerate(names):
        shard[name] = torch.randn(meta.shape, generator=generator) * (0.02 if meta.ndim > 1 else 1.0)
        size += shard[name].nbytes
        if sum(t.nbytes for t in shard.values()) > 2**29 or n == len(names) - 1:
            file = f"model-{len(set(index.values())):05}.safetensors"
            save_file(shard, folder / file)
            index.update(dict.fromkeys(shard, file))
            shard = {}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    return size


def adapter(folder: Path, tiny: bool) -> None:
    """An adapter of the model's shapes, saved without its base weights."""
    model = lora_fx.apply(on_meta(tiny), RULE, IDS)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, lora_fx.Adapter):
                module.A = torch.nn.Parameter(torch.randn(module.A.shape) * 0.02)
                module.B = torch.nn.Parameter(torch.randn(module.B.shape) * 0.02)
    lora_fx.save_adapter(model, folder / "adapter")


def export(folder: Path, tiny: bool) -> dict[str, float]:
    model = on_meta(tiny)
    before, start = peak(), time.perf_counter()
    lora_fx.load_adapter(model, folder / "adapter", IDS)
    made = lora_fx.export_onnx(
        model, IDS, folder / "model.onnx", dynamic_shapes=AXES, weights=folder, external_data=True
    )
    return {
        "MiB": peak() - before,
        "s": time.perf_counter() - start,
        "bytes": made.bytes,
        "adapters": len(made.adapters),
    }


def load(folder: Path, tiny: bool) -> dict[str, float]:
    """The file loads, and gives finite numbers."""
    logits = Session(folder / "model.onnx").run({"input_ids": IDS["input_ids"].numpy()})["logits"]
    return {"finite": float(numpy.isfinite(logits).all()), "spread": float(logits.std())}


def sessions(folder: Path, tiny: bool, shared: bool) -> dict[str, float]:
    before = resident()
    kept = [Session(folder / "base.onnx", shared=shared)]
    first = resident() - before
    for task in ("a", "b"):
        kept.append(kept[0].task(folder / f"{task}.safetensors") if shared else Session(folder / f"{task}.onnx"))
    return {"first": first, "further": (resident() - before - first) / 2}


def tasks(folder: Path, tiny: bool) -> dict[str, float]:
    """The base's file, and two folded ones."""
    torch.manual_seed(0)
    model = llama(tiny, layers=4)
    options = dict(dynamic_shapes=AXES, external_data=True)
    size = lora_fx.export_onnx(model, IDS, folder / "base.onnx", **options).bytes
    for task in ("a", "b"):
        lora_fx.activate(lora_fx.apply(model, RULE, IDS, name=task), task)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.normal_(std=0.02)
        lora_fx.export_onnx(model, IDS, folder / f"{task}.onnx", **options)
        own = sum(
            save_onnx_weights(folder / "base.onnx", folder / f"{task}.onnx", folder / f"{task}.safetensors").values()
        )
    return {"file": size / 2**20, "own": own / 2**20}


STEPS: dict[str, Any] = {
    "export": export, "load": load, "adapter": adapter, "tasks": tasks,
    "alone": lambda folder, tiny: sessions(folder, tiny, shared=False),
    "shared": lambda folder, tiny: sessions(folder, tiny, shared=True),
}  # fmt: skip


def in_a_process(step: str, folder: Path, tiny: bool) -> dict[str, float]:
    if tiny:  # only to see that it runs
        return STEPS[step](folder, tiny)
    command = [sys.executable, "-W", "ignore", __file__, "--run", step, str(folder)]
    out = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    return json.loads(out.splitlines()[-1])


def stream(options: Any) -> None:
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        size = checkpoint(folder, options.tiny)
        in_a_process("adapter", folder, options.tiny)
        exported = in_a_process("export", folder, options.tiny)
        loaded = in_a_process("load", folder, options.tiny)
    row = (
        f"{size / 1e9:.2f}", f"{exported['bytes'] / 1e9:.2f}", f"{exported['MiB']:.0f}", f"{exported['s']:.0f}",
        "yes" if loaded["finite"] and loaded["spread"] else "NO",
    )  # fmt: skip
    header = ("checkpoint, GB", "file, GB", "highest resident size above the imports, MiB", "s", "loads and runs")
    report("Exported from a checkpoint: a Llama on meta, query and value folded", header, [row], options)


def shared_sessions(options: Any) -> None:
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        made = in_a_process("tasks", folder, options.tiny)
        rows = [
            (label, f"{found['first']:.0f}", f"{found['further']:.0f}")
            for label, found in (
                ("a file of its own for each task", in_a_process("alone", folder, options.tiny)),
                ("one file, the tasks' folded weights", in_a_process("shared", folder, options.tiny)),
            )
        ]
    note = f"The file has {made['file']:.0f} MiB, a task's folded weights {made['own']:.0f} MiB."
    report("Resident size of sessions", ("", "first session, MiB", "each further task, MiB"), rows, options, note)


def main() -> None:
    parser = arguments(__doc__, rounds=1)
    parser.add_argument("--part", choices=("stream", "sessions"), help="one of the two tables")
    parser.add_argument("--run", nargs=2, help="one step, in this process")
    options = parser.parse_args()
    if options.run:
        print(json.dumps(STEPS[options.run[0]](Path(options.run[1]), options.tiny)))
        return
    if options.part != "sessions":
        stream(options)
    if options.part != "stream":
        shared_sessions(options)


if __name__ == "__main__":
    main()
