"""`lora-fx inspect`: what is in a file."""

from __future__ import annotations

import math
import re
from collections import Counter
from pathlib import Path
from typing import Any

import click

from lora_fx.cli.shown import as_json, show
from lora_fx.errors import LoraFxError

_FACTOR = re.compile(r"[._](lora|lokr|loha|hada|dora|oft|ia3|boft|vera)_")
"""In the names of tensors that adapters have, whoever wrote them: PEFT, kohya, diffusers, loralib, LyCORIS."""


@click.command()
@click.argument("place", type=click.Path(path_type=Path))
@as_json
def inspect(place: Path, as_json: bool) -> None:
    """Say what is in an adapter's folder, a checkpoint, a safetensors file or an ONNX file. Nothing in it is run.

    \b
    Example:
      lora-fx inspect task-adapter
    """
    from lora_fx.export.adapters.folder import CONFIG

    remedy = "pass an adapter's folder, a checkpoint, a .safetensors or an .onnx file"
    try:
        place.stat()
    except OSError as error:
        raise LoraFxError(f"it cannot be read: {error.strerror}", place=str(place), remedy=remedy) from error
    if place.suffix == ".onnx":
        text, said = _onnx(place)
    elif place.is_dir() and (place / CONFIG).exists():
        text, said = _adapter(place)
    elif place.is_dir() or place.suffix == ".safetensors":
        text, said = _checkpoint(place)
    else:
        raise LoraFxError("it is nothing that is known here", place=str(place), remedy=remedy)
    show(text, said, as_json)


def _adapter(place: Path) -> tuple[str, dict[str, Any]]:
    from lora_fx.export.adapters.folder import read_folder
    from lora_fx.tables import table

    folder = read_folder(place)
    config = folder.config
    keys = ("peft_type", "r", "lora_alpha", "use_rslora", "use_dora", "task_type", "base_model_name_or_path")
    said = {key: config[key] for key in keys if config.get(key) is not None and config[key] is not False}
    entries = folder.header["adapters"] if folder.header else []
    body = [
        (key, "×".join(map(str, t.shape)), str(t.dtype).removeprefix("torch.")) for key, t in folder.tensors.items()
    ]
    numbers = sum(t.numel() for t in folder.tensors.values())
    size = sum(t.numel() * t.element_size() for t in folder.tensors.values())
    lines = [table(("tensor", "shape", "dtype"), sorted(body)), ", ".join(f"{k}={v}" for k, v in said.items())]
    lines += [f"written by lora_fx: {len(entries)} adapters, named {folder.header['name']}"] if folder.header else []
    lines.append(f"adapter: {len(body)} tensors, {numbers:,} numbers, {size:,} bytes, all finite")
    rows = [{"name": key, "shape": list(t.shape), "dtype": dtype} for (key, t), (*_, dtype) in
            zip(folder.tensors.items(), body, strict=True)]  # fmt: skip
    return "\n".join(lines), {"what": "adapter", **said, "bytes": size, "tensors": rows, "adapters": entries}


def _checkpoint(place: Path) -> tuple[str, dict[str, Any]]:
    from lora_fx.export.checkpoints.checkpoint import MANIFEST, read_checkpoint
    from lora_fx.export.checkpoints.manifest import read_manifest
    from lora_fx.tables import table

    found = read_checkpoint(place)
    dtypes = Counter(stored.dtype for stored in found.tensors.values())
    numbers = {dtype: sum(s.elements for s in found.tensors.values() if s.dtype == dtype) for dtype in dtypes}
    body = [
        (name, f"{sum(s.file == name for s in found.tensors.values())}", f"{size:,}")
        for name, size in found.shards.items()
    ]
    lines = [table(("shard", "tensors", "bytes"), body, right=(1, 2))]
    lines += [f"{dtype}: {count} tensors, {numbers[dtype]:,} numbers" for dtype, count in sorted(dtypes.items())]
    largest = max(found.tensors.values(), key=lambda s: s.stop - s.start, default=None)
    if largest is not None:
        lines.append(f"largest: {largest.name} {'×'.join(map(str, largest.shape))}")
    said: dict[str, Any] = {
        "what": "checkpoint", "architectures": found.config.get("architectures"), "shards": found.shards,
        "dtypes": dict(dtypes), "numbers": numbers, "others": list(found.others),
        "tensors": {s.name: {"file": s.file, "dtype": s.dtype, "shape": list(s.shape)} for s in found.tensors.values()},
    }  # fmt: skip
    if place.is_dir() and (place / MANIFEST).exists():
        manifest = read_manifest(place)
        names = ", ".join(f"{a['name']} × {a['strength']:g}" for a in manifest.adapters)
        way = "with" if manifest.kept else "without"
        lines.append(f"folded: {len(manifest.tensors)} tensors of {manifest.base}, {names}; {way} the way back")
        said["folded"] = {"base": manifest.base, "adapters": list(manifest.adapters), "kept": manifest.kept}
    if place.is_file() and any(_FACTOR.search(name) for name in found.tensors):
        said["what"] = "adapter"
        lines.append(f"adapter: {len(found.tensors)} tensors in one file; its folder, where there is one, says more")
        return "\n".join(lines), said
    kind = ", ".join(found.config.get("architectures") or ["of a model that it does not name"])
    lines.append(f"checkpoint: {kind}, {len(found.tensors)} tensors, {len(found.others)} other files")
    return "\n".join(lines), said


def _onnx(place: Path) -> tuple[str, dict[str, Any]]:
    from lora_fx.export.onnx.loading import load_model
    from lora_fx.export.onnx.runtimes import require
    from lora_fx.tables import table

    require("onnx")
    model = load_model(place, "pass an ONNX file")
    graph = model.graph
    operators = Counter(node.op_type for node in graph)
    given = {value.name for value in graph.inputs}
    weights = [value for name, value in graph.initializers.items() if name not in given]
    numbers = sum(
        math.prod(value.shape or ()) for value in weights if all(isinstance(n, int) for n in value.shape or ())
    )
    slots = [value for name, value in graph.initializers.items() if name in given]
    body = [(kind, str(value.name), str(value.shape), str(value.dtype)) for kind, values in
            (("input", graph.inputs), ("output", graph.outputs)) for value in values
            if value not in slots]  # fmt: skip
    opsets = ", ".join(f"{domain or 'ai.onnx'} {version}" for domain, version in model.opset_imports.items())
    lines = [table(("", "name", "shape", "type"), body)]
    lines.append(", ".join(f"{count} {name}" for name, count in operators.most_common()))
    if slots:
        lines.append(f"switchable: {len(slots) // 2} slots for adapters")
    own = {key: value for key, value in model.metadata_props.items() if key.startswith("lora_fx") and len(value) < 100}
    lines += [f"{key}: {value}" for key, value in own.items()]
    lines.append(f"ONNX: {opsets}, {sum(operators.values())} nodes, {len(weights)} weights, {numbers:,} numbers")
    said = {
        "what": "onnx", "opsets": dict(model.opset_imports), "operators": dict(operators), "weights": len(weights),
        "numbers": numbers, "slots": len(slots) // 2, "metadata": own,
        "values": [dict(zip(("kind", "name", "shape", "type"), row, strict=True)) for row in body],
    }  # fmt: skip
    return "\n".join(lines), said
