"""A sharded checkpoint on disk, folded: beside a copy of it, and beside PEFT's load, merge and save.

    python benchmarks/checkpoints.py [--gib 8] [--kills 10] [--part all | fold | peft] [--folder FOLDER]

Random bfloat16 in the shapes of a Llama, 4096 wide, in shards of 1 GiB, with an adapter of rank 16 on all linears.
Each row is a process of its own: seconds of the clock, seconds of the processor, its highest resident size; the folds
run with an address space of 2 GiB above what torch itself takes. Then every element is held against the fold in
memory, a fold is killed at random moments and gone on with, and unfolded, and the hashes of all files are compared.
Each begins with nothing of the base in the system's cache. Needs transformers and peft (the `test` extra), and four
times the checkpoint's size of disk.
"""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from measuring import arguments, report
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import LlamaConfig

from lora_fx.deltas.exact_sum import folded_weight
from lora_fx.deltas.low_rank import LowRank
from lora_fx.export.checkpoints.manifest import read_manifest
from lora_fx.export.checkpoints.streams import digest
from lora_fx.graph.layout import Layout

ADDRESSES = 2 * 2**30
"""Bytes of address space beside torch, whose libraries take 0.6 GiB on a CPU, and 3.2 GiB where they are CUDA's."""
RANK, ALPHA = 16, 32
LINEARS = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}

_RUN = """
import resource, runpy, sys, time
limit = int(sys.argv.pop(1))
if limit:
    import torch
    limit += resource.getpagesize() * int(open("/proc/self/statm").read().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
try:
    del sys.argv[0]
    runpy.run_module(sys.argv[0], run_name="__main__")
finally:
    peak = next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM"))
    print("peak", peak, time.process_time(), file=sys.stderr)
"""

_PEFT = """
import sys
from peft import PeftModel
from transformers import AutoModelForCausalLM
base, adapter, out = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(out, max_shard_size="1GB")
"""


def shapes(config: LlamaConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    width, inner = config.hidden_size, config.intermediate_size
    yield "model.embed_tokens.weight", (config.vocab_size, width)
    for n in range(config.num_hidden_layers):
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            yield f"model.layers.{n}.self_attn.{name}.weight", (width, width)
        for name in ("gate_proj", "up_proj"):
            yield f"model.layers.{n}.mlp.{name}.weight", (inner, width)
        yield f"model.layers.{n}.mlp.down_proj.weight", (width, inner)
        for name in ("input_layernorm", "post_attention_layernorm"):
            yield f"model.layers.{n}.{name}.weight", (width,)
    yield "model.norm.weight", (width,)
    yield "lm_head.weight", (config.vocab_size, width)


def numbers(shape: tuple[int, ...]) -> torch.Tensor:
    """Random bfloat16 between 2⁻¹² and 2⁻⁴: sign, exponent and mantissa are drawn, which takes no time."""
    bits = torch.empty(shape, dtype=torch.int16).random_(-(2**15), 2**15)
    exponents = bits.bitwise_right_shift(7).bitwise_and_(7).add_(115).bitwise_left_shift_(7)
    return bits.bitwise_and_(-(2**15) + 127).bitwise_or_(exponents).view(torch.bfloat16)


def make(folder: Path, gib: float, tiny: bool) -> None:
    """The base in folder/base, the adapter in folder/adapter."""
    width, vocabulary, inner = (64, 128, 176) if tiny else (4096, 32000, 11008)
    layer = 2 * (4 * width**2 + 3 * width * inner)
    layers = 2 if tiny else max(1, round((gib * 2**30 - 4 * vocabulary * width) / layer))
    config = LlamaConfig(
        hidden_size=width, intermediate_size=inner, num_hidden_layers=layers, num_attention_heads=width // 64 or 1,
        vocab_size=vocabulary, tie_word_embeddings=False, dtype="bfloat16", architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    base, adapter = folder / "base", folder / "adapter"
    base.mkdir(parents=True)
    adapter.mkdir()
    config.save_pretrained(base)
    (base / "tokenizer.json").write_text("{}")
    where, factors, size = {}, {}, 0
    every = [*shapes(config)]
    most = 2**30 if not tiny else 2**16
    plan: list[list[tuple[str, tuple[int, ...]]]] = [[]]
    for name, shape in every:
        size += 2 * torch.Size(shape).numel()
        if size > most:
            plan.append([])
            size = 2 * torch.Size(shape).numel()
        plan[-1].append((name, shape))
    for k, names in enumerate(plan):
        file = f"model-{k + 1:05}-of-{len(plan):05}.safetensors"
        shard = {name: numbers(shape) for name, shape in names}
        save_file(shard, base / file, {"format": "pt"})
        where |= dict.fromkeys(shard, file)
    total = sum(2 * torch.Size(shape).numel() for _, shape in every)
    index = {"metadata": {"total_size": total}, "weight_map": where}
    (base / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    for name, shape in every:
        path = name.removesuffix(".weight")
        if path.rpartition(".")[2] in LINEARS:
            key = f"base_model.model.{path}"
            factors[f"{key}.lora_A.weight"] = torch.randn(RANK, shape[1]) * 0.02
            factors[f"{key}.lora_B.weight"] = torch.randn(shape[0], RANK) * 0.02
    save_file(factors, adapter / "adapter_model.safetensors")
    said = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "target_modules": sorted(LINEARS)}
    (adapter / "adapter_config.json").write_text(json.dumps({**said, "task_type": "CAUSAL_LM"}))


def measured(line: list[str], folder: Path) -> list[str]:
    """Seconds, processor seconds, MiB."""
    os.sync()
    for file in folder.rglob("*"):
        if file.is_file():
            with open(file, "rb") as opened:
                os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    seconds, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        raise SystemExit(f"{line} ended with {done.returncode}\n{done.stdout}\n{done.stderr}")
    cpu = sum(getattr(after, f) - getattr(before, f) for f in ("ru_utime", "ru_stime"))
    peaks = [row.split() for row in done.stderr.splitlines() if row.startswith("peak ")]
    return [f"{seconds:.2f}", f"{cpu:.2f}", f"{int(peaks[0][1]) / 1024:.0f}" if peaks else ""]


def python(*arguments: str | Path, limit: int = 0) -> list[str]:
    return [sys.executable, "-W", "ignore", "-c", _RUN, str(limit), *map(str, arguments)]


def fold(folder: Path, out: str, *options: str) -> list[str]:
    line = ("fold", folder / "base", folder / "adapter", "-o", folder / out, *options)
    return python("lora_fx.cli", *line, limit=ADDRESSES)


def killed(line: list[str], times: int, seconds: float) -> int:
    """Run a command to its end, killing it at random moments; how often it was killed."""
    kills = 0
    while True:
        process = subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            process.wait(random.uniform(0.1, 0.9) * seconds / 4 if kills < times else None)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            kills += 1
            continue
        assert process.returncode == 0, process.returncode
        return kills


def compare(folder: Path, out: str) -> int:
    """Hold every element against the fold in memory; how many there are."""
    scale, count = ALPHA / RANK, 0
    with safe_open(folder / "adapter" / "adapter_model.safetensors", "pt") as adapter:
        keys = {*adapter.keys()}
        for file in sorted((folder / "base").glob("*.safetensors")):
            with safe_open(file, "pt") as base, safe_open(folder / out / file.name, "pt") as folded:
                for name in base.keys():  # noqa: SIM118
                    wanted, key = base.get_tensor(name), f"base_model.model.{name.removesuffix('.weight')}.lora_"
                    if f"{key}A.weight" in keys:
                        A, B = (adapter.get_tensor(f"{key}{factor}.weight") for factor in "AB")
                        delta = LowRank(Layout("oi", tuple(wanted.shape)), A, B, scale, RANK)
                        wanted = folded_weight(wanted, [delta], wanted.dtype, name)
                    assert torch.equal(wanted.view(torch.int16), folded.get_tensor(name).view(torch.int16)), name
                    count += wanted.numel()
    return count


def hashes(folder: Path) -> dict[str, str]:
    return {f.relative_to(folder).as_posix(): digest(f) for f in sorted(folder.rglob("*")) if f.is_file()}


def main() -> None:
    parser = arguments(__doc__, 1)
    parser.add_argument("--gib", type=float, default=8)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--part", choices=("all", "fold", "peft"), default="all")
    parser.add_argument("--folder", type=Path, help="where the checkpoints go, which are removed afterwards")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(dir=options.folder))
    rows: list[list[str]] = []

    def row(name: str, line: list[str]) -> None:
        rows.append([name, *measured(line, folder)])
        print(*rows[-1], flush=True)

    try:
        make(folder, options.gib, options.tiny)
        size = sum(f.stat().st_size for f in (folder / "base").iterdir()) / 2**30
        row("cp -r", ["cp", "-r", str(folder / "base"), str(folder / "copy")])
        shutil.rmtree(folder / "copy")
        found = ""
        if options.part != "peft":
            row("lora-fx fold", fold(folder, "folded"))
            count = compare(folder, "folded")
            once = {n: f.sha256 for n, f in read_manifest(folder / "folded").files.items()}
            shutil.rmtree(folder / "folded")
            row("lora-fx fold --keep", fold(folder, "kept", "--keep"))
            row("lora-fx verify", python("lora_fx.cli", "verify", folder / "kept", limit=ADDRESSES))
            ways = hashes(folder / "kept" / "lora_fx_remainder")
            kept = sum(f.stat().st_size for f in (folder / "kept" / "lora_fx_remainder").rglob("*") if f.is_file())
            row(
                "lora-fx unfold",
                python("lora_fx.cli", "unfold", folder / "kept", "-o", folder / "back", limit=ADDRESSES),
            )
            assert hashes(folder / "back") == hashes(folder / "base"), "unfolded to other bytes"
            for name in ("back", "kept"):
                shutil.rmtree(folder / name)
            kills = killed(fold(folder, "killed", "--keep"), options.kills, float(rows[-3][1]))
            assert hashes(folder / "killed" / "lora_fx_remainder") == ways, "killed and gone on to other bytes"
            assert {n: digest(folder / "killed" / n) for n in once} == once, "killed and gone on to other bytes"
            shutil.rmtree(folder / "killed")
            found = (
                f"{count:,} elements equal to the fold in memory; the way back has {kept / 2**30:.2f} GiB and gives the"
                f" base's bytes; killed {kills} times and gone on with, the same bytes."
            )
        if options.part != "fold":
            script = folder / "merge.py"
            script.write_text(_PEFT)
            line = [sys.executable, "-W", "ignore", "-c", _RUN.replace("run_module", "run_path"), "0", str(script)]
            row("PEFT load, merge, save", [*line, *(str(folder / n) for n in ("base", "adapter", "merged"))])
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    copy = max(float(rows[0][1]), 0.01)
    table = [[*cells, f"{float(cells[1]) / copy:.2f}"] for cells in rows]
    header = ("", "seconds", "processor seconds", "peak MiB", "÷ cp -r")
    note = f"{size:.2f} GiB of bfloat16 in shards, rank {RANK} on all linears; address space 2 GiB above torch's."
    report("A checkpoint on disk", header, table, options, f"{note} {found}".strip())


if __name__ == "__main__":
    main()
