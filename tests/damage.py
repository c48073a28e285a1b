"""python -m tests.damage [--flips N] [--seed S]

Single flipped bits in every kind of file that lora_fx writes: each damaged file is opened as its reader opens it, and
run. A table says how many were refused by an error of ours, and how many were accepted with the output of the whole
file, with another one, or raised something else. The exit status says whether the last two are none.

In the rows with a seal *of their own* the damage is of somebody who seals the file again: what a digest cannot tell is
left to the loaders, which may accept it, and may not raise anything but our errors. So it is in the dialects of others
that have *no seal*.
"""

from __future__ import annotations

import argparse
import random
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import nn

import lora_fx
from lora_fx import LoraFxError, Rule
from lora_fx.export import Session, onnx_digest, save_onnx_adapter, save_onnx_weights
from tests import reference

REFUSED, SAME, OTHER, RAW = "refused", "same output", "another output", "raw"
X = torch.linspace(-1, 1, 3 * 32).reshape(3, 32)


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 32)).eval()


def adapted() -> nn.Module:
    model = lora_fx.apply(net(), Rule(where="*", rank=2), X, check=False)
    reference.fill(model)
    return model


@dataclass(frozen=True)
class Target:
    """A file in a folder with what it needs, and how it is opened and run."""

    file: str
    opened: Callable[[Path], numpy.ndarray]
    within: bytes = b""
    """Only from here on, up to the next 600 bytes, it is damaged: the manifest."""


def _switched(folder: Path, name: str, **options: Any) -> numpy.ndarray:
    session = Session(folder / name, adapters={"a": folder / "a.onnx_adapter"}, **options)
    return session.run(X.numpy(), "a")[session.outputs[0]]


def _whole(name: str) -> Callable[[Path], numpy.ndarray]:
    return lambda folder: _switched(folder, name)


def _resealed(name: str) -> Callable[[Path], numpy.ndarray]:
    return lambda folder: _switched(folder, name, digest=onnx_digest(folder / name))


def _adapter_resealed(folder: Path) -> numpy.ndarray:
    from lora_fx.export.onnx import loading

    loading.seal(folder / "a.onnx_adapter")
    return _switched(folder, "switchable.onnx")


def _task(folder: Path) -> numpy.ndarray:
    session = Session(folder / "base.onnx", shared=True).task(folder / "task.safetensors")
    return session.run(X.numpy())[session.outputs[0]]


def _loaded(folder: Path) -> numpy.ndarray:
    with torch.no_grad():
        return lora_fx.load_adapter(net(), folder / "adapter", X, check=False)(X).numpy()


def _dialect(name: str, config: dict[str, Any] | None = None) -> Callable[[Path], numpy.ndarray]:
    def opened(folder: Path) -> numpy.ndarray:
        with torch.no_grad():
            return lora_fx.load_adapter(net(), folder / name, X, check=False, config=config)(X).numpy()

    return opened


TARGETS: dict[str, Target] = {
    ".onnx_adapter": Target("a.onnx_adapter", _whole("switchable.onnx")),
    "task file": Target("task.safetensors", _task),
    "base of tasks": Target("base.onnx", _task),
    "its weights": Target("base.onnx.data", _task),
    "switchable graph": Target("switchable.onnx", _whole("switchable.onnx")),
    "its manifest": Target("switchable.onnx", _whole("switchable.onnx"), b"lora_fx.slots"),
    "switchable graph, its weights beside it": Target("beside.onnx", _whole("beside.onnx")),
    "these weights": Target("beside.onnx.data", _whole("beside.onnx")),
    "adapter_model.safetensors, with our header": Target("adapter/adapter_model.safetensors", _loaded),
    "switchable graph, a seal of its own": Target("switchable.onnx", _resealed("switchable.onnx")),
    "its manifest, a seal of its own": Target("switchable.onnx", _resealed("switchable.onnx"), b"lora_fx.slots"),
    ".onnx_adapter, a seal of its own": Target("a.onnx_adapter", _adapter_resealed),
    "PEFT's folder, no seal": Target("peft/adapter_model.safetensors", _dialect("peft")),
    "PEFT's config, no seal": Target("peft/adapter_config.json", _dialect("peft")),
    "PEFT's pickle, sums of zip": Target("pickled/adapter_model.bin", _dialect("pickled")),
    "a head beside it, no seal": Target("beside/adapter_model.safetensors", _dialect("beside")),
    "one file, no seal": Target("one.safetensors", _dialect("one.safetensors")),
    "kohya, no seal": Target("kohya.safetensors", _dialect("kohya.safetensors")),
    "diffusers, no seal": Target("diffusers.safetensors", _dialect("diffusers.safetensors")),
    "loralib, sums of zip": Target("loralib.pt", _dialect("loralib.pt", {"lora_alpha": 2})),
}


def own_seal(name: str) -> bool:
    """Nothing tells its numbers from others: damage may be accepted, and may not end in anything but our errors."""
    return name.endswith(("of its own", "no seal"))


def write(folder: Path) -> Path:
    """The files, whole."""
    import onnx

    from lora_fx.export.onnx import loading

    model = adapted()
    lora_fx.export_onnx(model, X, folder / "switchable.onnx", adapters="switchable", check=False)
    graph = onnx.load(folder / "switchable.onnx")
    onnx.save(graph, folder / "beside.onnx", save_as_external_data=True, size_threshold=0, location="beside.onnx.data")
    loading.seal(folder / "beside.onnx", [folder / "beside.onnx.data"])
    save_onnx_adapter(model, folder / "a.onnx_adapter")
    lora_fx.save_adapter(model, folder / "adapter")
    lora_fx.export_onnx(net(), X, folder / "base.onnx", external_data=True, check=False)
    lora_fx.export_onnx(model, X, folder / "folded.onnx", check=False)
    save_onnx_weights(folder / "base.onnx", folder / "folded.onnx", folder / "task.safetensors")
    write_dialects(folder, model)
    return folder


def write_dialects(folder: Path, model: nn.Module) -> None:
    """The same adapter in every dialect of `lora_fx.export.adapters.dialects`."""
    from safetensors.torch import load_file, save_file

    for dialect in ("kohya", "diffusers"):
        lora_fx.save_adapter(model, folder / f"{dialect}.safetensors", dialect=dialect, part="unet")
    for name in ("peft", "pickled"):
        shutil.copytree(folder / "adapter", folder / name)
    plain = load_file(folder / "adapter" / "adapter_model.safetensors")
    save_file(plain, folder / "peft" / "adapter_model.safetensors")
    torch.save(plain, folder / "pickled" / "adapter_model.bin")
    (folder / "pickled" / "adapter_model.safetensors").unlink()
    paths = {key.removeprefix("base_model.model.").partition(".")[0] for key in plain}
    save_file(plain | {f"{path}.alpha": torch.tensor(2.0) for path in paths}, folder / "one.safetensors")
    named = {key.removeprefix("base_model.model.").removesuffix(".weight"): t for key, t in plain.items()}
    torch.save(named, folder / "loralib.pt")
    model[2].bias.requires_grad_(True)
    lora_fx.save_adapter(model, folder / "beside")
    model[2].bias.requires_grad_(False)
    save_file(
        load_file(folder / "beside" / "adapter_model.safetensors"), folder / "beside" / "adapter_model.safetensors"
    )


def flipped(data: bytes, target: Target, draw: random.Random) -> bytes:
    first = data.index(target.within) if target.within else 0
    last = min(len(data), first + 600) if target.within else len(data)
    made, bit = bytearray(data), draw.randrange(first * 8, last * 8)
    made[bit // 8] ^= 1 << bit % 8
    return bytes(made)


def outcomes(folder: Path, name: str, flips: int, seed: int) -> Iterator[tuple[str, str]]:
    """What came of each flip, and what was said; the file is whole again in the end."""
    target, draw = TARGETS[name], random.Random(f"{name} {seed}")
    file = folder / target.file
    data, expected = file.read_bytes(), target.opened(folder)
    kept = file.with_name("kept")
    shutil.copyfile(file, kept)
    try:
        for _ in range(flips):
            file.write_bytes(flipped(data, target, draw))
            try:
                same = numpy.array_equal(target.opened(folder), expected)
                yield (SAME if same else OTHER), ""
            except LoraFxError as error:
                yield REFUSED, str(error)
            except Exception as error:
                yield RAW, f"{type(error).__name__}: {error}"
    finally:
        kept.replace(file)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.damage", description="single flipped bits")
    parser.add_argument("--flips", type=int, default=1250, help="in each kind of file (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    total, wrong = Counter[str](), 0
    with tempfile.TemporaryDirectory() as place:
        folder = write(Path(place))
        for name in TARGETS:
            found = list(outcomes(folder, name, options.flips, options.seed))
            counts = Counter(outcome for outcome, _ in found)
            print(f"{name:45}", *(f"{kind} {counts[kind]:6}" for kind in (REFUSED, SAME, OTHER, RAW)), flush=True)
            for said in {said for outcome, said in found if outcome == RAW}:
                print(f"    {said[:200]}")
            wrong += counts[RAW] + (0 if own_seal(name) else counts[OTHER])
            total += Counter() if own_seal(name) else counts
    print(f"{total.total():,} flips:", *(f"{total[kind]:,} {kind}" for kind in (REFUSED, SAME, OTHER, RAW)))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
