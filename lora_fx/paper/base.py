"""The base weights of adapters that came out of files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch

from lora_fx.errors import FileError, LoraFxError
from lora_fx.paper.factors import Factors
from lora_fx.reading import boundary, regular, tensor_table

_ITS_OWN = "pass the base model it was trained on"
_BASE = "pass the base model's safetensors file, or the folder of those"


def with_base(adapters: Mapping[str, Factors], path: Path) -> dict[str, Factors]:
    """The adapters with W from safetensors files, of which only these weights are read.

    Args:
        path: a file, or a folder with one or more.

    Raises:
        FileError: there is no such file, or none of them holds a weight.
        LoraFxError: a weight is of another model, or square and nobody says which axis is in and which is out.
    """
    from safetensors import safe_open

    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    where: dict[str, Path] = {}
    for file in files:
        with boundary("it cannot be read", str(file), _BASE):
            with regular(file, _BASE).open("rb") as opened:
                tensor_table(opened, str(file), _BASE)
            with safe_open(file, "pt") as tensors:
                where |= dict.fromkeys(tensors.keys(), file)
    found = {}
    for name, adapter in adapters.items():
        key = _key(name, list(where), str(path))
        with safe_open(where[key], "pt") as tensors:
            W = tensors.get_tensor(key).to(torch.float64).flatten(1)
        found[name] = replace(adapter, weight=_turned(W, adapter))
    return found


def _key(name: str, keys: list[str], place: str) -> str:
    """A model inside of another one has its name before or after: ``transformer.h.0…`` is ``h.0…``."""
    name = name.partition("[")[0]
    near = [key for key in keys if key == name or key.endswith(f".{name}") or name.endswith(f".{key}")]
    if name in near:
        return name
    if len(near) != 1:
        reason = f"it holds {'no' if not near else f'{len(near)} weights like'} {name}"
        raise FileError(reason, place=place, remedy=_BASE)
    return near[0]


def _turned(W: torch.Tensor, adapter: Factors) -> torch.Tensor:
    """(out, in), of the adapter's rows."""
    out, inner = adapter.shape
    if adapter.rows is not None:
        axis = 1 if adapter.transposed else 0
        if W.shape[axis] <= max(adapter.rows):
            reason = f"the base weight is {W.shape[0]}×{W.shape[1]}, and has no feature {max(adapter.rows)}"
            raise LoraFxError(reason, place=adapter.name, remedy=_ITS_OWN)
        W = W.index_select(axis, torch.tensor(adapter.rows))
        return W.mT.contiguous() if adapter.transposed else W
    if tuple(W.shape) not in ((out, inner), (inner, out)):
        reason = f"the base weight is {W.shape[0]}×{W.shape[1]}, the adapter for {out}×{inner}: it is another model's"
        raise LoraFxError(reason, place=adapter.name, remedy=_ITS_OWN)
    if out != inner:
        return W if tuple(W.shape) == (out, inner) else W.mT.contiguous()
    if adapter.transposed is None:
        reason = "the weight is square, and the file does not say whether the model keeps it as (out, in) or (in, out)"
        raise LoraFxError(reason, place=adapter.name, remedy="put its adapter_config.json beside it, pass the folder")
    return W.mT.contiguous() if adapter.transposed else W
