"""Memory and processor time of exports: of one that is held against torch's own, and of one that is streamed from a
checkpoint which is never in memory; and the memory of sessions that share weights.

    python benchmarks/onnx_memory.py [--part cost | stream | sessions] [--device cuda]

Each measurement in a process of its own: its processor time with that of the process in which ONNX Runtime runs, on one
thread, and its highest resident size (with the file pages that it has mapped). Needs transformers (the `test` extra),
and, at full size, 10 GB of disk.
"""

from __future__ import annotations

import importlib
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import torch
from measuring import arguments, report
from safetensors.torch import save_file
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

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


def gpt2(tiny: bool) -> GPT2LMHeadModel:
    """124 M parameters."""
    sizes = dict(n_embd=32, n_layer=1, n_head=2, vocab_size=128, n_positions=64) if tiny else {}
    return GPT2LMHeadModel(GPT2Config(use_cache=False, **sizes)).eval()


def peak(pid: int | str = "self") -> float:
    """The highest resident size of a process, in MiB. (`getrusage` gives the parent's to a child.)"""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024


def children() -> list[int]:
    """The processes that this one has started and that are there: ONNX Runtime's."""
    tasks = Path("/proc/self/task").glob("*/children")
    return [int(pid) for task in tasks for pid in task.read_text().split()]


def processor() -> float:
    """Seconds of this process and of its children."""
    fields = [Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split() for pid in children()]
    return time.process_time() + sum(int(f[11]) + int(f[12]) for f in fields) / os.sysconf("SC_CLK_TCK")


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


def export(folder: Path, tiny: bool, prove: bool) -> dict[str, float]:
    model = on_meta(tiny)
    before, start, used = peak(), time.perf_counter(), processor()
    lora_fx.load_adapter(model, folder / "adapter", IDS)
    made = lora_fx.export_onnx(
        model, IDS, folder / "model.onnx", dynamic_shapes=AXES, weights=folder, external_data=True, prove=prove
    )
    return {
        "MiB": peak() - before,
        "worker": max(map(peak, children()), default=0.0),
        "s": time.perf_counter() - start,
        "CPU s": processor() - used,
        "bytes": made.bytes,
        "proven": float(made.proof is not None and len(made.proof.folded)),
    }


def exported(folder: Path, tiny: bool, how: str, device: str) -> dict[str, float]:
    """GPT-2 with an adapter, or its base by torch alone."""
    importlib.import_module("onnxscript.optimizer")  # what takes seconds for the first time, and is no export
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model, inputs = gpt2(tiny).to(device), {name: ids.to(device) for name, ids in IDS.items()}
    if how != "torch":
        lora_fx.apply(model, RULE, inputs, check=False)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.normal_(std=0.02)
    used, options = processor(), dict(dynamic_shapes=AXES)
    if how == "torch":
        torch.onnx.export(model, (), folder / "m.onnx", kwargs=inputs, dynamo=True, verbose=False, **options)
    else:
        asked = {"check": False} if how == "unchecked" else {"prove": True}
        lora_fx.export_onnx(model, inputs, folder / "m.onnx", **options, **asked)
    return {"CPU s": processor() - used, "MiB": peak(), "worker": max(map(peak, children()), default=0.0)}


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


#: step → what it does, in a folder, tiny or not, with the model on a device where it is not on meta
STEPS: dict[str, Callable[[Path, bool, str], Any]] = {
    "load": lambda folder, tiny, device: load(folder, tiny),
    "adapter": lambda folder, tiny, device: adapter(folder, tiny),
    "tasks": lambda folder, tiny, device: tasks(folder, tiny),
    "export": lambda folder, tiny, device: export(folder, tiny, prove=False),
    "prove": lambda folder, tiny, device: export(folder, tiny, prove=True),
    "torch": lambda folder, tiny, device: exported(folder, tiny, "torch", device),
    "unchecked": lambda folder, tiny, device: exported(folder, tiny, "unchecked", device),
    "proven": lambda folder, tiny, device: exported(folder, tiny, "proven", device),
    "alone": lambda folder, tiny, device: sessions(folder, tiny, shared=False),
    "shared": lambda folder, tiny, device: sessions(folder, tiny, shared=True),
}


def in_a_process(step: str, folder: Path, options: Any) -> dict[str, float]:
    if options.tiny:  # only to see that it runs
        return STEPS[step](folder, True, options.device)
    command = [sys.executable, "-W", "ignore", __file__, "--device", options.device, "--run", step, str(folder)]
    out = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    return json.loads(out.splitlines()[-1])


def stream(options: Any) -> None:
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        size = checkpoint(folder, options.tiny)
        in_a_process("adapter", folder, options)
        rows = []
        for label, step in (("as it is", "export"), ("with a proof", "prove")):
            made = in_a_process(step, folder, options)
            loaded = in_a_process("load", folder, options)
            rows.append((
                label, f"{size / 1e9:.2f}", f"{made['bytes'] / 1e9:.2f}", f"{made['MiB']:.0f}",
                f"{made['worker']:.0f}", f"{made['CPU s']:.0f}", f"{made['s']:.0f}",
                "yes" if loaded["finite"] and loaded["spread"] else "NO",
            ))  # fmt: skip
            (folder / "model.onnx.data").unlink()
    header = (
        "", "checkpoint, GB", "file, GB", "highest resident size above the imports, MiB",
        "of the checker's process, MiB", "CPU s", "s", "loads and runs",
    )  # fmt: skip
    report("Exported from a checkpoint: a Llama on meta, query and value folded", header, rows, options)


def cost(options: Any) -> None:
    """In turns, and each against torch in the same round: the machine may do other things too."""
    steps = {
        "torch.onnx.export of the base": "torch",
        "export_onnx(check=False)": "unchecked",
        "export_onnx(prove=True)": "proven",
    }
    rounds = []
    for _ in range(1 if options.tiny else options.rounds):
        found = {}
        for step in steps.values():
            with tempfile.TemporaryDirectory() as place:
                found[step] = in_a_process(step, Path(place), options)
        rounds.append(found)

    def median(step: str, what: str, to_torch: bool = False) -> float:
        return statistics.median(f[step][what] / (f["torch"][what] if to_torch else 1) for f in rounds)

    rows = [
        (
            label, f"{median(step, 'CPU s'):.1f}", f"{median(step, 'CPU s', True):.2f}", f"{median(step, 'MiB'):.0f}",
            f"{median(step, 'MiB', True):.2f}", f"{median(step, 'worker'):.0f}",
        )
        for label, step in steps.items()
    ]  # fmt: skip
    header = ("", "CPU s", "/ torch", "highest resident size, MiB", "/ torch", "of ONNX Runtime's process, MiB")
    note = (
        f"Medians of {len(rounds)} rounds. Query and value folded; prove=True checks, too: certificate, three shapes."
    )
    report("Cost of an export: GPT-2, 124 M parameters, one thread", header, rows, options, note)


def shared_sessions(options: Any) -> None:
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        made = in_a_process("tasks", folder, options)
        rows = [
            (label, f"{found['first']:.0f}", f"{found['further']:.0f}")
            for label, found in (
                ("a file of its own for each task", in_a_process("alone", folder, options)),
                ("one file, the tasks' folded weights", in_a_process("shared", folder, options)),
            )
        ]
    note = f"The file has {made['file']:.0f} MiB, a task's folded weights {made['own']:.0f} MiB."
    report("Resident size of sessions", ("", "first session, MiB", "each further task, MiB"), rows, options, note)


def main() -> None:
    parser = arguments(__doc__, rounds=3)
    parser.add_argument("--part", choices=("cost", "stream", "sessions"), help="one of the tables")
    parser.add_argument("--device", default="cpu", help="of the model of the table of costs")
    parser.add_argument("--run", nargs=2, help="one step, in this process")
    options = parser.parse_args()
    if options.run:
        print(json.dumps(STEPS[options.run[0]](Path(options.run[1]), options.tiny, options.device)))
        return
    parts = {"cost": cost, "stream": stream, "sessions": shared_sessions}
    for name, part in parts.items():
        if options.part in (None, name):
            part(options)


if __name__ == "__main__":
    main()
