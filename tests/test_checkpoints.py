"""Checkpoints on disk: folded as the model would be, to the bit, whatever ends it; and back to the base's bytes."""

from __future__ import annotations

import copy
import errno
import json
import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file, save_model
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

import lora_fx
from lora_fx import Rule
from lora_fx.deltas import exact_sum
from lora_fx.errors import FileError, FoldError
from lora_fx.export.adapters.folder import CONFIG, TENSORS
from lora_fx.export.checkpoints import arithmetic, extract, streams, work
from lora_fx.export.checkpoints.checkpoint import MANIFEST, REMAINDER
from tests import damage
from tests.checkpoints import IDS, contents, folder, llama, pair, plain, refused, same, saved, tensors, trained

pytestmark = pytest.mark.usefixtures("small_blocks")
ROOT = Path(__file__).parent.parent


def gpt2() -> nn.Module:
    """Conv1D, some of them square."""
    torch.manual_seed(0)
    config = GPT2Config(n_embd=24, n_layer=2, n_head=2, vocab_size=32, n_positions=16, bos_token_id=0, eos_token_id=0)
    return GPT2LMHeadModel(config).eval()


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    rules = [Rule(role="attention.* | mlp.down", rank=3, alpha=5)]
    return make(tmp_path_factory.mktemp("task"), llama().to(torch.bfloat16), rules)


@pytest.fixture
def task(made, tmp_path):
    """A base, an adapter on it, and the tensors of the model in which it is folded."""
    base, adapter, wanted = made
    return shutil.copytree(base, tmp_path / "base"), shutil.copytree(adapter, tmp_path / "adapter"), wanted


def make(folder: Path, model: nn.Module, rules: list[Rule], dtype=None, peft: bool = True):
    base, adapter = saved(model, folder / "base"), folder / "adapter"
    lora_fx.apply(model, rules, IDS)
    trained(model)
    lora_fx.save_adapter(model, adapter, peft=peft)
    lora_fx.fold(model, final=True)
    return base, adapter, model.state_dict()


# ── the same numbers as in memory ────────────────────────────────────────────────────────────────────────────────────

EVERY = [Rule(role="attention.* | mlp.*", rank=3, alpha=5)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("build", "rules", "in_peft"),
    [
        (llama, EVERY, True),
        (llama, [Rule(role="attention.* | mlp.*", kind="dora", rank=2)], True),
        (llama, [Rule(role="mlp.*", kind="adalora", rank=2), Rule(role="attention.query", kind="full")], False),
        (gpt2, [Rule(role="attention.query | attention.value | attention.output | mlp.*", rank=3)], True),
        (gpt2, [Rule(role="attention.output | mlp.*", kind="dora", rank=2)], True),
        (gpt2, [Rule(role="attention.query", rank=2), Rule(role="mlp.up", kind="bias")], False),
    ],
    ids=["lora", "dora", "adalora, full", "conv1d, parts", "conv1d, dora", "parts, bias"],
)
def test_it_is_the_fold_of_the_model(build, rules, in_peft, dtype, tmp_path):
    base, adapter, wanted = make(tmp_path, build().to(dtype), rules, peft=in_peft)
    done = lora_fx.fold_checkpoint(base, adapter, tmp_path / "out", keep=True)
    found, before = tensors(tmp_path / "out"), tensors(base)
    assert not same(found, wanted) and {*found} == {*before}
    assert {*same(found, before)} == {*done.tensors} and len(done.tensors) >= 4
    assert all(found[name].dtype == dtype for name in done.tensors)
    lora_fx.unfold_checkpoint(tmp_path / "out", tmp_path / "back")
    assert contents(tmp_path / "back") == contents(base)


def test_everything_else_is_copied_byte_by_byte(task, tmp_path):
    base, adapter, _ = task
    lora_fx.fold_checkpoint(base, adapter, tmp_path / "out")
    before, after = contents(base), contents(tmp_path / "out")
    assert {*after} == {*before, MANIFEST}
    assert all(after[name] == data for name, data in before.items() if not name.endswith(".safetensors"))
    for name in (n for n in before if n.endswith(".safetensors")):
        head = 8 + int.from_bytes(before[name][:8], "little")
        assert after[name][:head] == before[name][:head] and len(after[name]) == len(before[name])


def test_strengths_multiply_deltas_and_several_adapters_add_up(tmp_path):
    model = llama()
    base = saved(model, tmp_path / "base")
    for k, kind in enumerate((None, None, "dora")):
        twin = copy.deepcopy(model)
        lora_fx.apply(twin, [Rule(role="mlp.* | attention.output", kind=kind, rank=2)], IDS)
        trained(twin, seed=k)
        lora_fx.save_adapter(twin, tmp_path / str(k))
    out, halves = tmp_path / "out", {tmp_path / "0": 0.5, tmp_path / "1": -2, tmp_path / "2": 0.25}
    lora_fx.fold_checkpoint(base, halves, out, keep=True)
    before, found = tensors(base), tensors(out)
    deltas: dict[str, torch.Tensor] = {}
    for path, strength in halves.items():
        alone = load_file(path / TENSORS)
        for name in before:
            key = f"base_model.model.{name.removesuffix('.weight')}.lora_"
            if f"{key}A.weight" not in alone:
                continue
            W, (A, B) = before[name].double(), (alone[f"{key}{f}.weight"].double() for f in "AB")
            delta = B @ A
            if f"{key}magnitude_vector" in alone:
                turned = W + delta
                delta = (
                    alone[f"{key}magnitude_vector"].double()[:, None] * turned / turned.norm(dim=1, keepdim=True) - W
                )
            deltas[name] = deltas.get(name, 0) + strength * delta
    assert {*deltas} == {*same(found, before)}
    assert not same(found, {n: (w.double() + deltas.get(n, 0)).float() for n, w in before.items()})
    lora_fx.unfold_checkpoint(out, tmp_path / "back")
    assert contents(tmp_path / "back") == contents(base)


@pytest.mark.parametrize(
    ("build", "settings"),
    [
        (
            llama,
            dict(
                target_modules="all-linear", use_rslora=True, alpha_pattern={"q_proj": 3}, rank_pattern={"up_proj": 2}
            ),
        ),
        (llama, dict(target_modules=["embed_tokens", "v_proj"])),
        (gpt2, dict(target_modules=["c_attn", "c_proj"], fan_in_fan_out=True)),
        (llama, dict(target_modules=["q_proj", "lm_head"], use_dora=True)),
    ],
    ids=["patterns", "embedding", "conv1d", "dora"],
)
def test_pefts_own_adapters(build, settings, tmp_path):
    model = build()
    base = saved(model, tmp_path / "base")
    with warnings.catch_warnings(action="ignore"):
        adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=6, **settings))
        trained(adapted)
        adapted.save_pretrained(tmp_path / "adapter")
    lora_fx.fold_checkpoint(base, tmp_path / "adapter", tmp_path / "out")
    before, found = tensors(base), tensors(tmp_path / "out")
    merged = adapted.double().merge_and_unload().state_dict()
    names = {name for name in found if not torch.equal(merged[name].float(), before[name])}
    assert names == {*same(found, before)}
    for name in names:  # PEFT sums in float64 here: it may be a step of float32 off where that rounds the other way
        steps = (found[name].view(torch.int32) - merged[name].float().view(torch.int32)).abs()
        assert int(steps.max()) <= 1 and int(steps.sum()) <= 1


OTHERS: dict[str, dict[str, Any]] = {
    "kohya.safetensors": {}, "diffusers.safetensors": {"part": "unet"}, "one.safetensors": {}, "pickled": {},
    "loralib.pt": {"config": {"lora_alpha": 2}},
}  # fmt: skip


@pytest.fixture(scope="module")
def dialects(tmp_path_factory):
    """A base of two layers, and the same adapter on it in every dialect."""
    folder, model = tmp_path_factory.mktemp("dialects"), damage.adapted()
    save_file(damage.net().state_dict(), folder / "base.safetensors")
    lora_fx.save_adapter(model, folder / "adapter")
    damage.write_dialects(folder, model)
    return folder


@pytest.mark.parametrize("name", OTHERS)
def test_another_dialect_is_the_same_adapter(name, dialects, tmp_path):
    base = dialects / "base.safetensors"
    lora_fx.fold_checkpoint(base, dialects / name, tmp_path / "out", keep=True, **OTHERS[name])
    model = lora_fx.load_adapter(damage.net(), dialects / "adapter", damage.X)
    lora_fx.fold(model, final=True)
    found = load_file(tmp_path / "out" / base.name)
    assert same(found, model.state_dict()) == [] and len(same(found, load_file(base))) == 2
    lora_fx.verify_checkpoint(tmp_path / "out", base=base, adapters=[dialects / name])
    lora_fx.unfold_checkpoint(tmp_path / "out", tmp_path / "back")
    assert (tmp_path / "back" / base.name).read_bytes() == base.read_bytes()


def test_a_dialect_that_does_not_say_enough_is_refused(dialects, tmp_path):
    def refusal(match: str, adapter: Path, **besides: Any) -> None:
        with pytest.raises(FileError, match=match):
            lora_fx.fold_checkpoint(dialects / "base.safetensors", adapter, tmp_path / "out", **besides)
        assert not list(tmp_path.glob("out*"))

    refusal("do not say their alpha", dialects / "loralib.pt")
    refusal("nothing for the part 'vae'", dialects / "kohya.safetensors", part="vae")
    refusal("the files say themselves", dialects / "adapter", part="unet")
    save_file({"lora_unet_7.lora_down.weight": torch.ones(2, 32)}, tmp_path / "a.safetensors")
    refusal("'7' is no module of this checkpoint", tmp_path / "a.safetensors")
    save_file({"strange": torch.ones(2, 32)}, tmp_path / "b.safetensors")
    refusal("of no dialect that is known", tmp_path / "b.safetensors")
    groups = {"0.lora_A": torch.ones(4, 32), "0.lora_B": torch.ones(16, 2)}
    save_file(groups, tmp_path / "c.safetensors")
    refusal("of a MergedLinear", tmp_path / "c.safetensors", config={"lora_alpha": 2})


def test_experts_are_matrices_of_their_own(tmp_path):
    torch.manual_seed(0)
    weight, A, B = torch.randn(3, 10, 4), torch.randn(6, 4), torch.randn(10, 6)
    (tmp_path / "base").mkdir()
    save_file({"moe.up": weight}, tmp_path / "base" / "model.safetensors")
    adapter = folder(tmp_path, {"moe.lora_A.weight": A, "moe.lora_B.weight": B}, r=2, target_parameters=["moe.up"])
    lora_fx.fold_checkpoint(tmp_path / "base", adapter, tmp_path / "out", keep=True)
    delta = torch.einsum("oer,eri->eoi", _expert_b(B).double(), A.view(3, 2, 4).double())
    assert torch.equal(tensors(tmp_path / "out")["moe.up"], (weight.double() + 4 * delta).float())
    lora_fx.unfold_checkpoint(tmp_path / "out", tmp_path / "back")
    assert contents(tmp_path / "back") == contents(tmp_path / "base")


def _expert_b(B: torch.Tensor) -> torch.Tensor:
    """(out, r·E), experts fastest → (out, E, r)."""
    return B.view(B.shape[0], 2, 3).transpose(1, 2)


def test_tensors_of_one_size_and_other_widths_follow_each_other(tmp_path, monkeypatch):
    """Pieces of 150 numbers: 15 rows, of which tiles have 9, and one row, which is a tile."""
    monkeypatch.setattr(exact_sum, "_TILE", 96)
    torch.manual_seed(0)
    model = nn.ModuleDict({"a": nn.Linear(10, 30, bias=False), "b": nn.Linear(150, 3, bias=False)})
    (tmp_path / "base").mkdir()
    save_file(model.state_dict(), tmp_path / "base" / "model.safetensors")
    factors = {f"base_model.model.{n}.lora_{f}.weight": torch.randn(s) for n, m in model.items()
               for f, s in (("A", (2, m.in_features)), ("B", (m.out_features, 2)))}  # fmt: skip
    (tmp_path / "adapter").mkdir()
    save_file(factors, tmp_path / "adapter" / TENSORS)
    said = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["a", "b"]}
    (tmp_path / "adapter" / CONFIG).write_text(json.dumps(said))
    lora_fx.fold_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    folded = load_file(tmp_path / "out" / "model.safetensors")
    for name, module in model.items():
        A, B = (factors[f"base_model.model.{name}.lora_{f}.weight"].double() for f in "AB")
        assert torch.equal(folded[f"{name}.weight"], (module.weight.double() + B @ A).float())


def test_a_model_inside_another_has_a_prefix(tmp_path):
    base = plain(tmp_path, {"h.0.up.weight": torch.zeros(6, 4), "h.0.down.weight": torch.zeros(4, 6)})
    adapter = folder(tmp_path, pair("transformer.h.0.up", 6, 4) | pair("transformer.h.0.down", 4, 6))
    assert lora_fx.fold_checkpoint(base, adapter, tmp_path / "out").tensors == ("h.0.down.weight", "h.0.up.weight")
    adapter = folder(tmp_path, pair("0.up", 6, 4) | pair("0.down", 4, 6))
    assert lora_fx.fold_checkpoint(base, adapter, tmp_path / "more").tensors == ("h.0.down.weight", "h.0.up.weight")


def test_one_file_is_a_checkpoint(tmp_path):
    base = plain(tmp_path, {"up.weight": torch.zeros(6, 4)})
    adapter = folder(tmp_path, pair("up", 6, 4))
    lora_fx.fold_checkpoint(base / "model.safetensors", adapter, tmp_path / "out")
    assert {*contents(tmp_path / "out")} == {"model.safetensors", MANIFEST}


def test_a_name_that_was_saved_for_another_is_that_tensor(tmp_path):
    model = nn.ModuleDict({"table": nn.Embedding(6, 4), "head": nn.Linear(4, 6, bias=False)})
    model["head"].weight = model["table"].weight
    (tmp_path / "base").mkdir()
    save_model(model, str(tmp_path / "base" / "model.safetensors"))
    (kept,) = tensors(tmp_path / "base")
    for path in ("head", "table"):
        with pytest.raises(FileError, match=r"may be read by two modules, and the adapter is for one"):
            lora_fx.fold_checkpoint(tmp_path / "base", folder(tmp_path, pair(path, 6, 4)), tmp_path / "out")
    assert kept in ("head.weight", "table.weight")


# ── whatever ends it ─────────────────────────────────────────────────────────────────────────────────────────────────

_KILLED = """
import os, random, signal, sys, time
import torch, lora_fx
from lora_fx.export.checkpoints import arithmetic, fold, streams
base, adapter, out, seed = sys.argv[1:]
for module in (arithmetic, fold, streams):
    module.BLOCK = 600
random.seed(int(seed))
kills, written = 0, streams._write
def slowly(file, data, digest):
    time.sleep(0.0005)
    written(file, data, digest)
streams._write = slowly
while True:
    child = os.fork()
    if not child:
        lora_fx.fold_checkpoint(base, adapter, out, keep=True)
        os._exit(0)
    if kills < 10:
        time.sleep(random.uniform(0.002, 0.04))
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    kills += os.WIFSIGNALED(status)
    if os.WIFEXITED(status):
        print(kills, os.WEXITSTATUS(status))
        break
"""


def test_killed_at_random_and_gone_on_with_it_is_the_same_bytes(task, tmp_path):
    base, adapter, _ = task
    lora_fx.fold_checkpoint(base, adapter, tmp_path / "whole", keep=True)
    line = [sys.executable, "-W", "ignore", "-c", _KILLED, str(base), str(adapter), str(tmp_path / "out"), "7"]
    kills, code = subprocess.check_output(line, text=True, cwd=ROOT).split()
    assert int(kills) == 10 and code == "0"
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert not (tmp_path / "out.partial").exists()


class Stop(Exception):
    pass


def stopped(monkeypatch, after: int, error: Exception):
    """A write fails after so many."""
    left, write = after, streams._write

    def failing(file, data, digest):
        nonlocal left
        left -= 1
        if left < 0:
            raise error
        write(file, data, digest)

    monkeypatch.setattr(streams, "_write", failing)
    return lambda: monkeypatch.setattr(streams, "_write", write)


def test_a_full_disk_keeps_what_was_finished(task, tmp_path, monkeypatch):
    base, adapter, _ = task
    lora_fx.fold_checkpoint(base, adapter, tmp_path / "whole")
    again = stopped(monkeypatch, 40, OSError(errno.ENOSPC, "No space left on device"))
    with pytest.raises(FileError, match=r"No space left on device; what was finished is kept in .*out.partial\n.*room"):
        lora_fx.fold_checkpoint(base, adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    again()
    folded, fold = [], arithmetic.Arithmetic.fold
    monkeypatch.setattr(arithmetic.Arithmetic, "fold", lambda *own, **how: folded.append(1) or fold(*own, **how))
    lora_fx.fold_checkpoint(base, adapter, tmp_path / "out")
    rest = len(folded)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    shutil.rmtree(tmp_path / "out")
    lora_fx.fold_checkpoint(base, adapter, tmp_path / "out")
    assert 0 < rest < len(folded) - rest  # what was finished was not done again


def test_what_is_read_and_written_goes_out_of_the_systems_cache(task, tmp_path, monkeypatch):
    """Each byte of the base once it was read, of the result once it is on the disk; no more than a few blocks wait."""
    base, adapter, _ = task
    monkeypatch.setattr(streams, "_UNWRITTEN", 600)
    name = shard(base).name
    there = {"size": 0, "written": 0, "on the disk": 0, "gone": 0, "read": 0, "forgotten": 0}
    write, sync, advise = streams._write, os.fdatasync, os.posix_fadvise

    def of(handle: int) -> str:
        path = Path(os.readlink(f"/proc/self/fd/{handle}"))
        return {base: "base", tmp_path / "out.partial": "result"}[path.parent] if path.name == name else ""

    def writing(file, data, digest):
        write(file, data, digest)
        if of(file.fileno()) == "result":
            there["written"] += len(data)
            assert there["written"] - there["on the disk"] <= 600 * (streams._DEPTH + 3)

    def syncing(handle):
        before = there["written"]
        sync(handle)
        if of(handle) == "result":
            there["on the disk"] = before

    def advising(handle, start, length, advice):
        advise(handle, start, length, advice)
        what = of(handle)
        assert advice == os.POSIX_FADV_DONTNEED
        if what:
            known = "gone" if what == "result" else "forgotten"
            assert start <= there[known] < start + length
            assert what == "base" or start + length <= there["on the disk"]
            there[known] = start + length

    monkeypatch.setattr(streams, "_write", writing)
    monkeypatch.setattr(os, "fdatasync", syncing)
    monkeypatch.setattr(os, "posix_fadvise", advising)
    lora_fx.fold_checkpoint(base, adapter, tmp_path / "out")
    size = (base / name).stat().st_size
    assert there["written"] == size and min(there["gone"], there["forgotten"]) >= size - 2 * 600


def test_a_disk_that_fails_late_is_an_error(task, tmp_path, monkeypatch):
    """What the system could not write is known when it is asked to, and by nobody who asks after that."""
    base, adapter, _ = task
    lora_fx.fold_checkpoint(base, adapter, tmp_path / "whole")
    monkeypatch.setattr(streams, "_UNWRITTEN", (shard(base)).stat().st_size // 2 + 1)

    def failing(handle):
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch, pytest.raises(FileError, match="Input/output error"):
        patch.setattr(os, "fdatasync", failing)
        lora_fx.fold_checkpoint(base, adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    lora_fx.fold_checkpoint(base, adapter, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_too_little_room_is_said_before_anything_is_written(task, tmp_path, monkeypatch):
    base, adapter, _ = task
    monkeypatch.setattr(work.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(2**20, 2**20, 4096))
    with pytest.raises(FileError, match="the disk has 4,096"):
        lora_fx.fold_checkpoint(base, adapter, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith("out")] == []


def begun(task, tmp_path, monkeypatch, **options) -> Path:
    """A fold that was stopped half-way."""
    base, adapter, _ = task
    again = stopped(monkeypatch, 48, Stop())
    with pytest.raises(Stop):
        lora_fx.fold_checkpoint(base, adapter, tmp_path / "out", **options)
    again()
    return tmp_path / "out.partial"


@pytest.mark.parametrize("what", ["a shard", "its end", "the way back", "the last line", "a whole file"])
def test_what_was_finished_is_verified_before_it_is_trusted(what, task, tmp_path, monkeypatch):
    base, adapter, _ = task
    lora_fx.fold_checkpoint(base, adapter, tmp_path / "whole", keep=True)
    partial = begun(task, tmp_path, monkeypatch, keep=True)
    lines = [json.loads(line) for line in (partial / ".journal").read_text().splitlines()]
    first, last = sorted(partial.glob("*.safetensors"))[0].name, partial / lines[-1]["file"]
    assert lines[-1]["bytes"] > 0 and (partial / REMAINDER / f"{first}.remainder").stat().st_size
    if what == "the last line":
        with open(partial / ".journal", "ab") as file:
            file.write(b'{"file": "model-0000')
    elif what == "its end":
        last.write_bytes(last.read_bytes()[:-7])
    elif what == "a whole file":
        (partial / "config.json").write_text("{}")
    else:
        other = partial / f"{REMAINDER}/{first}.remainder" if what == "the way back" else partial / first
        data = bytearray(other.read_bytes())
        data[len(data) // 2] ^= 1
        other.write_bytes(data)
    lora_fx.fold_checkpoint(base, adapter, tmp_path / "out", keep=True)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_another_task_or_another_base_does_not_go_on_with_it(task, tmp_path, monkeypatch):
    base, adapter, _ = task
    partial = begun(task, tmp_path, monkeypatch)
    with pytest.raises(FileError, match=r"another task was begun in it: it differs in adapters"):
        lora_fx.fold_checkpoint(base, {adapter: 0.5}, tmp_path / "out")
    with pytest.raises(FileError, match=r"it differs in keep"):
        lora_fx.fold_checkpoint(base, adapter, tmp_path / "out", keep=True)
    file = base / "config.json"
    file.write_text(file.read_text().replace("llama", "lIama"))  # as long as before
    with pytest.raises(FileError, match=r"config.json: it is not what it was when this was begun"):
        lora_fx.fold_checkpoint(base, adapter, tmp_path / "out")
    (partial / ".journal").write_text("[]\n")
    with pytest.raises(FileError, match="it is no journal"):
        lora_fx.fold_checkpoint(base, adapter, tmp_path / "out")


def test_two_at_once_is_one_too_many(task, tmp_path):
    base, adapter, _ = task
    met = []

    def second(done, total):
        if not met:
            with pytest.raises(FileError, match="another process is at work in it") as error:
                lora_fx.fold_checkpoint(base, adapter, tmp_path / "out")
            met.append(error)

    lora_fx.fold_checkpoint(base, adapter, tmp_path / "out", progress=second)
    assert met


def test_progress_is_told_in_bytes(task, tmp_path, monkeypatch):
    base, adapter, _ = task
    begun(task, tmp_path, monkeypatch)
    seen = []
    lora_fx.fold_checkpoint(base, adapter, tmp_path / "out", progress=lambda *at: seen.append(at))
    total = sum(map(len, contents(base).values()))
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert seen[-1] == (total, total) and {of for _, of in seen} == {total}


# ── what is refused ──────────────────────────────────────────────────────────────────────────────────────────────────


def shard(base: Path) -> Path:
    return sorted(base.glob("*.safetensors"))[1]


def index(base: Path, change) -> None:
    file = base / "model.safetensors.index.json"
    table = json.loads(file.read_text())
    change(table["weight_map"])
    file.write_text(json.dumps(table))


DAMAGE = {
    "missing": (lambda b: shard(b).unlink(), "which is not there"),
    "truncated": (
        lambda b: shard(b).write_bytes(shard(b).read_bytes()[:-1]),
        "it is truncated: it has .* bytes, and its",
    ),
    "longer": (lambda b: shard(b).write_bytes(shard(b).read_bytes() + b"\0"), "it is longer than its table says"),
    "no header": (lambda b: shard(b).write_bytes(b"\0" * 4), "it is no safetensors file|cannot be read"),
    "a folder": (
        lambda b: (shard(b).unlink(), shard(b).mkdir()) if False else _folder_for(shard(b)),
        "no regular file",
    ),
    "lies": (
        lambda b: index(b, lambda m: m.update({"lm_head.weight": shard(b).name + ""}) or _swap(m)),
        "it says that",
    ),
    "names more": (lambda b: index(b, lambda m: m.update({"ghost": shard(b).name})), "says that ghost is in"),
    "names less": (lambda b: index(b, lambda m: m.pop("lm_head.weight")), "says that lm_head.weight is in no file"),
    "leaves": (
        lambda b: index(b, lambda m: m.update({"lm_head.weight": "../x.safetensors"})),
        "which is no file beside",
    ),
    "no index": (lambda b: (b / "model.safetensors.index.json").write_text("[]"), "no index of safetensors files"),
    "pickles": (lambda b: (b / "pytorch_model.bin").touch(), "may hold the weights a second time"),
    "a link": (lambda b: (b / "link").symlink_to(b / "extra"), "a link to a folder"),
    "a pipe": (lambda b: os.mkfifo(b / "pipe"), "no regular file but a pipe"),
}


def _folder_for(path: Path) -> None:
    path.unlink()
    path.mkdir()


def _swap(table: dict[str, str]) -> None:
    names = sorted({*table.values()})
    table["lm_head.weight"] = next(name for name in names if name != table["model.norm.weight"])
    table["model.norm.weight"] = table["lm_head.weight"]


@pytest.mark.parametrize("what", DAMAGE)
def test_a_damaged_base_is_refused(what, task, tmp_path):
    base, adapter, _ = task
    damage, match = DAMAGE[what]
    damage(base)
    before = contents(base) if what != "a pipe" else None
    refused(match, base, adapter, tmp_path / "out")
    assert not (tmp_path / "out.partial").exists()
    assert before is None or contents(base) == before


def test_a_file_that_is_no_part_of_it_can_be_left_out(task, tmp_path):
    base, adapter, _ = task
    (base / "pytorch_model.bin").touch()
    lora_fx.fold_checkpoint(base, adapter, tmp_path / "out", leave_out=["*.bin", "extra/*"])
    assert {*contents(tmp_path / "out")} == {n for n in contents(base) if n[:5] != "extra" and n[-3:] != "bin"} | {
        MANIFEST
    }


NAN = torch.full((2, 4), float("nan"))
TABLE = {"embed.weight": torch.zeros(8, 4), "up.weight": torch.zeros(6, 4), "sq.weight": torch.zeros(4, 4)}
CONV = {"c.weight": torch.zeros(6, 4, 3)}
ENTRIES = {
    "another base": (TABLE, pair("up", 6, 5), {}, "its shape is .*; rank 2 on up"),
    "nowhere": (TABLE, pair("upp", 6, 4), {}, r"the checkpoint has no upp.weight\n.*near: up.weight"),
    "half": (TABLE, {"up.lora_A.weight": torch.zeros(2, 4)}, {}, "the key is missing"),
    "other half": (TABLE, pair("sq", 4, 4) | {"up.lora_B.weight": torch.zeros(6, 2)}, {}, "it is half of an entry"),
    "NaN": (TABLE, {**pair("up", 6, 4), "up.lora_A.weight": NAN}, {}, "it holds NaN"),
    "no delta": (TABLE, pair("up", 6, 4), {"lora_bias": True}, r"has no up.bias for it[\s\S]*save the base with"),
    "no rows": (TABLE, pair("up", 6, 4), {"trainable_token_indices": [1]}, "the file holds no rows"),
    "nothing": (TABLE, {"up.weight": torch.zeros(6, 4)}, {}, "it adapts nothing"),
    "another base's": (TABLE, {**pair("up", 6, 4), "sq.weight": torch.ones(4, 4)}, {}, "the checkpoint's is another"),
    "a resized one": (TABLE, {**pair("up", 6, 4), "embed.weight": torch.ones(9, 4)}, {}, r"its shape is \(9, 4\)"),
    "a convolution": (CONV, {"c.lora_A.weight": torch.zeros(2, 4, 3), "c.lora_B.weight": torch.zeros(6, 2, 1)}, {},
                      "does not say how that is padded"),
    "integers": ({"up.weight": torch.zeros(6, 4, dtype=torch.int8)}, pair("up", 6, 4), {}, "it is stored as I8"),
    "attention": ({"a.in_proj_weight": torch.zeros(12, 4)}, pair("a", 12, 4), {}, "of a MultiheadAttention"),
    "transposed": (TABLE, pair("sq", 4, 4), {"fan_in_fan_out": True},
                   r"square .* as \(in, out\), the checkpoint as \(out"),
    "two parameters": ({"m.a": torch.zeros(6, 4), "m.b": torch.zeros(6, 4)}, pair("m", 6, 4),
                       {"target_parameters": ["m.a", "m.b"]}, "has several target_parameters"),
}  # fmt: skip


@pytest.mark.parametrize("what", ENTRIES)
def test_an_adapter_that_does_not_fit_is_refused(what, tmp_path):
    numbers, factors, config, match = ENTRIES[what]
    refused(match, plain(tmp_path, numbers), folder(tmp_path, factors, **config), tmp_path / "out")
    assert not (tmp_path / "out.partial").exists()


def test_two_entries_for_one_weight_are_refused(tmp_path):
    base = plain(tmp_path, {"model.up.weight": torch.zeros(6, 4)})
    adapter = folder(tmp_path, pair("model.up", 6, 4) | {"up.lora_A.weight": torch.zeros(2, 4)})
    refused("the checkpoint has no up.weight", base, adapter, tmp_path / "out")


def test_a_square_matrix_lies_as_its_neighbours_of_that_name(tmp_path):
    numbers = {
        "a.c_proj.weight": torch.zeros(4, 4), "a.c_proj.bias": torch.zeros(4),
        "m.c_proj.weight": torch.zeros(6, 4), "m.c_proj.bias": torch.zeros(4),
        "q.weight": torch.zeros(4, 4), "q.bias": torch.zeros(4), "o.weight": torch.zeros(4, 4),
    }  # fmt: skip
    base = plain(tmp_path, numbers)
    factors = pair("a.c_proj", 4, 4)
    lora_fx.fold_checkpoint(base, folder(tmp_path, factors, fan_in_fan_out=True), tmp_path / "out")
    A, B = (factors[f"a.c_proj.lora_{f}.weight"].double() for f in "AB")
    assert torch.equal(tensors(tmp_path / "out")["a.c_proj.weight"], (4 * (B @ A)).T.float())
    refused("is square", base, folder(tmp_path, factors), tmp_path / "more")
    for flag in (False, True):  # with a bias, and no neighbour of its name, in a checkpoint that has both
        refused("is square", base, folder(tmp_path, pair("q", 4, 4), fan_in_fan_out=flag), tmp_path / "more")
    factors = pair("o", 4, 4)  # a Conv1D has a bias
    lora_fx.fold_checkpoint(base, folder(tmp_path, factors), tmp_path / "more")
    A, B = (factors[f"o.lora_{f}.weight"].double() for f in "AB")
    assert torch.equal(tensors(tmp_path / "more")["o.weight"], (4 * (B @ A)).float())


def test_numbers_that_are_not_finite_are_refused_by_name(task, tmp_path):
    base, adapter, _ = task
    file = next(f for f in base.glob("*.safetensors") if "model.layers.1.mlp.down_proj.weight" in load_file(f))
    numbers = load_file(file)
    numbers["model.layers.1.mlp.down_proj.weight"][3, 5] = float("nan")
    save_file(numbers, file, {"format": "pt"})
    refused("model.layers.1.mlp.down_proj.weight: the weight holds NaN", base, adapter, tmp_path / "out", FoldError)
    numbers["model.layers.1.mlp.down_proj.weight"][3, 5] = 0
    save_file(numbers, file, {"format": "pt"})
    shutil.rmtree(tmp_path / "out.partial")
    refused("does not fit into torch.bfloat16", base, {adapter: 1e43}, tmp_path / "out", FoldError)
    refused("its strength is inf", base, {adapter: float("inf")}, tmp_path / "out")
    refused("there is none", base, [], tmp_path / "out")


def test_a_folder_that_is_not_empty_is_not_written_to(task, tmp_path):
    base, adapter, _ = task
    (tmp_path / "out").mkdir()
    lora_fx.fold_checkpoint(base, adapter, tmp_path / "out")
    before = contents(tmp_path / "out")
    refused("the folder is not empty", base, adapter, tmp_path / "out")
    refused("it is there, and no folder", base, adapter, tmp_path / "out" / "config.json")
    refused("Not a directory", base, adapter, tmp_path / "out" / "config.json" / "more")
    assert contents(tmp_path / "out") == before and not [*tmp_path.glob("*.partial")]


# ── the manifest, and the way back ───────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def kept(task, tmp_path):
    base, adapter, _ = task
    lora_fx.fold_checkpoint(base, adapter, tmp_path / "out", keep=True)
    return tmp_path / "out", base, adapter


def test_a_manifest_holds_for_the_files_that_were_read_and_written(kept, tmp_path):
    out, base, adapter = kept
    found = lora_fx.verify_checkpoint(out, base=base, adapters=[adapter])
    assert found.files > 2 * len(contents(base)) and "are as they were written" in str(found)
    lines = subprocess.check_output(["sha256sum", *sorted(contents(base))], cwd=base, text=True).splitlines()
    said = json.loads((out / MANIFEST).read_text())["files"]
    assert {name: file["base_sha256"] for name, file in said.items()} == {n: d for d, n in map(str.split, lines)}
    assert str(tmp_path) not in (out / MANIFEST).read_text()


def spoiled(folder: Path) -> Iterator[str]:
    """Each file but the manifest, by turns with another last bit."""
    for name in contents(folder):
        if name != MANIFEST:
            data = (folder / name).read_bytes()
            (folder / name).write_bytes(bytes([*data[:-1], data[-1] ^ 1]) if data else b"x")
            yield name
            (folder / name).write_bytes(data)


def test_every_file_that_changes_is_named(kept):
    out, base, adapter = kept
    for name in spoiled(out):
        with pytest.raises(FileError, match=rf"{name} is not what it was"):
            lora_fx.verify_checkpoint(out)
    (base / "config.json").write_text("{}")
    with pytest.raises(FileError, match=r"base/config.json is not what it was"):
        lora_fx.verify_checkpoint(out, base=base)
    (adapter / CONFIG).write_text((adapter / CONFIG).read_text() + " ")
    with pytest.raises(FileError, match=r"adapter/adapter_config.json is not what it was"):
        lora_fx.verify_checkpoint(out, adapters=[adapter])
    with pytest.raises(FileError, match=r"1 adapters were folded, and 2 are given"):
        lora_fx.verify_checkpoint(out, adapters=[adapter, adapter])
    (out / "new").touch()
    (out / "tokenizer.json").unlink()
    with pytest.raises(FileError, match=r"tokenizer.json is missing; new is new"):
        lora_fx.verify_checkpoint(out)
    (out / MANIFEST).write_text('{"lora_fx_fold": 2}')
    with pytest.raises(FileError, match="it is of version 2"):
        lora_fx.verify_checkpoint(out)
    with pytest.raises(FileError, match=r"it has no lora_fx_fold.json"):
        lora_fx.verify_checkpoint(base)


def test_nothing_is_unfolded_but_what_was_written(kept, tmp_path):
    out, base, adapter = kept
    for _ in spoiled(out):
        with pytest.raises(FileError, match=r"it is not what the fold has written|table|index|cannot be read"):
            lora_fx.unfold_checkpoint(out, tmp_path / "back")
        assert not (tmp_path / "back").exists()
        shutil.rmtree(tmp_path / "back.partial", ignore_errors=True)
    manifest = json.loads((out / MANIFEST).read_text())
    first = next(name for name in manifest["files"] if name.endswith(".safetensors"))
    other = {**manifest["files"][first], "base_sha256": manifest["files"][first]["sha256"]}
    (out / MANIFEST).write_text(json.dumps({**manifest, "files": {**manifest["files"], first: other}}))
    with pytest.raises(FoldError, match=f"what came out is not the base of {first}"):
        lora_fx.unfold_checkpoint(out, tmp_path / "back")
    shutil.rmtree(tmp_path / "back.partial")
    (out / "new").touch()
    with pytest.raises(FileError, match=r"its files are others than the fold has written: new"):
        lora_fx.unfold_checkpoint(out, tmp_path / "back")
    lora_fx.fold_checkpoint(base, adapter, tmp_path / "for good")
    with pytest.raises(FileError, match="it was folded without its way back"):
        lora_fx.unfold_checkpoint(tmp_path / "for good", tmp_path / "back")


def test_an_unfold_that_was_stopped_goes_on(kept, tmp_path, monkeypatch):
    out, base, _ = kept
    again = stopped(monkeypatch, 40, Stop())
    with pytest.raises(Stop):
        lora_fx.unfold_checkpoint(out, tmp_path / "back")
    again()
    lora_fx.unfold_checkpoint(out, tmp_path / "back")
    assert contents(tmp_path / "back") == contents(base)


def test_a_fold_of_a_fold_has_its_own_manifest(kept, tmp_path):
    out, _, adapter = kept
    lora_fx.fold_checkpoint(out, {adapter: -1}, tmp_path / "twice", keep=True)
    assert json.loads((tmp_path / "twice" / MANIFEST).read_text())["base"] == "out"
    lora_fx.unfold_checkpoint(tmp_path / "twice", tmp_path / "back")
    assert tensors(tmp_path / "back").keys() == tensors(out).keys()
    assert not same(tensors(tmp_path / "back"), tensors(out))


# ── an adapter out of two checkpoints ────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("build", [llama, gpt2])
def test_what_was_folded_is_extracted(build, tmp_path):
    roles = "attention.query | attention.value | attention.output | mlp.*"
    base, _, _ = make(tmp_path, build(), [Rule(role=roles, rank=3, alpha=5)])
    lora_fx.fold_checkpoint(base, tmp_path / "adapter", tmp_path / "tuned")
    (tmp_path / "tuned" / "adapter.safetensors.txt").touch()
    found = lora_fx.extract_adapter(base, tmp_path / "tuned", tmp_path / "found", 9)  # parts of one weight have 3 × 3
    assert {row.weight for row in found.rows} == {*same(tensors(tmp_path / "tuned"), tensors(base))}
    lora_fx.fold_checkpoint(base, tmp_path / "found", tmp_path / "again")
    wanted, again, before = tensors(tmp_path / "tuned"), tensors(tmp_path / "again"), tensors(base)
    for row in found.rows:
        change = (wanted[row.weight].double() - before[row.weight].double()).norm()
        rest = (again[row.weight].double() - wanted[row.weight].double()).norm()
        noise = 2.0**-24 * (wanted[row.weight].double().norm() + 9 * change)  # of the tuned weights, and of the factors
        assert rest <= 4 * noise and abs(row.change - float(change)) <= 2.0**-48 * row.change
    model = type(build()).from_pretrained(base)
    with warnings.catch_warnings(action="error"):
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)  # PEFT reads it
        adapted = peft.PeftModel.from_pretrained(model, tmp_path / "found")
    assert len(adapted.peft_config["default"].target_modules) == len(found.rows)


@pytest.mark.parametrize("shape", [(40, 70), (520, 600), (600, 520)])
def test_the_nearest_of_a_rank_is_kept(shape, tmp_path, monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(extract, "BLOCK", 2**16)
    W, U, V = torch.randn(shape), torch.randn(shape[0], 30), torch.randn(30, shape[1])
    D = (U * 0.6 ** torch.arange(30)) @ V
    base = plain(tmp_path, {"up.weight": W, "norm.weight": torch.ones(5)})
    save_file({"up.weight": W + D, "norm.weight": torch.ones(5)}, tmp_path / "tuned.safetensors")
    found = lora_fx.extract_adapter(base, tmp_path / "tuned.safetensors", tmp_path / "out", 6)
    (row,) = found.rows
    sizes = torch.linalg.svdvals((W + D).double() - W.double())
    best = float((sizes[:6] ** 2).sum() / (sizes**2).sum())
    # subspace iteration of 4 rounds with 8 more directions: what is lost of each is (σ₁₅ / σ₆)¹⁶ at most, and a factor
    # in float32 is off by 2⁻²⁴
    lost = 6 * float(sizes[14] / sizes[5]) ** 16 + 6 * 2.0**-23
    assert best - lost <= row.energy <= best + 2.0**-50 and row.rank == 6
    assert f"{row.energy:.2%}" in str(found) and abs(found.energy - row.energy) <= 2.0**-50


def test_what_an_adapter_cannot_hold_is_named_or_left_out(tmp_path):
    torch.manual_seed(0)
    before = {"up.weight": torch.zeros(6, 4), "norm.weight": torch.ones(4), "embed.weight": torch.zeros(8, 4)}
    base = plain(tmp_path, before)
    tuned = tmp_path / "tuned.safetensors"
    save_file({name: t + torch.randn_like(t) for name, t in before.items()}, tuned)
    with pytest.raises(FileError, match=r"embed.weight, norm.weight differ, and a LoRA adapter holds matrices"):
        lora_fx.extract_adapter(base, tuned, tmp_path / "out", 2)
    found = lora_fx.extract_adapter(base, tuned, tmp_path / "out", 9, ignore=["norm.*", "embed.weight"])
    assert {*found.ignored} == {"norm.weight", "embed.weight"} and "left out, though they differ" in str(found)
    assert [row.rank for row in found.rows] == [4] and found.energy > 1 - 2.0**-40
    lora_fx.fold_checkpoint(base, tmp_path / "out", tmp_path / "again")
    for reason, other in {
        "no weight differs": before,
        "the checkpoint has no other.weight": {**before, "other.weight": torch.zeros(2, 2)},
        r"its shape is \(6, 5\), and in the base \(6, 4\)": {**before, "up.weight": torch.zeros(6, 5)},
        "it holds NaN or Inf": {**before, "up.weight": torch.full((6, 4), float("inf"))},
    }.items():
        save_file(other, tuned)
        with pytest.raises(FileError, match=reason):
            lora_fx.extract_adapter(base, tuned, tmp_path / "more", 2)
    with pytest.raises(FileError, match="0 is no positive integer"):
        lora_fx.extract_adapter(base, tuned, tmp_path / "more", 0)
    with pytest.raises(FileError, match="the folder is not empty"):
        lora_fx.extract_adapter(base, tuned, tmp_path / "out", 2)
    assert not (tmp_path / "more").exists() and not [*tmp_path.glob("*.partial")]
