"""An adapter of a switchable graph as a ``.safetensors`` file, which every language reads; `examples/web` does.

Its tensors are the inputs of the graph by name, and its metadata says which base model they are for, and what they are:

    lora_fx.base      the base model's version, as in the graph's manifest
    lora_fx.sha256    of the base's version, a 0 byte, the file's table of tensors as JSON with sorted keys, a 0 byte,
                      and all that stands behind the table
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy
import torch

from lora_fx.export.onnx.runtimes import refuse
from lora_fx.export.onnx.weights import opened

SUFFIX = ".safetensors"
_BASE, _DIGEST = "lora_fx.base", "lora_fx.sha256"


def write_factors(path: Path, factors: Mapping[str, torch.Tensor], base: int) -> None:
    from safetensors.torch import save

    tensors = {name: factor.contiguous() for name, factor in factors.items()}
    path.write_bytes(save(tensors, {_BASE: str(base), _DIGEST: _digest(str(base), save(tensors))}))


def read_factors(path: Path) -> tuple[dict[str, numpy.ndarray[Any, Any]], int]:
    """A and B by name, and the version of their base model.

    Raises:
        ExportError: the file is damaged, or not one of these.
    """
    remedy = "pass a file that save_onnx_adapter wrote"
    with opened(path, "np", remedy) as file:
        said = file.metadata() or {}
        if not {_BASE, _DIGEST} <= said.keys() or not said[_BASE].isdecimal():
            refuse(str(path), "it does not say which base model it is for", remedy)
        if said[_DIGEST] != _digest(said[_BASE], path.read_bytes()):
            refuse(str(path), "it is damaged: its tensors are not the ones that were saved", "copy or save it again")
        return {name: file.get_tensor(name) for name in file.keys()}, int(said[_BASE])  # noqa: SIM118


def _digest(base: str, file: bytes) -> str:
    """Of a file that has been read as one of tensors."""
    end = 8 + int.from_bytes(file[:8], "little")
    table = json.loads(file[8:end])
    table.pop("__metadata__", None)
    said = json.dumps(table, sort_keys=True)
    return hashlib.sha256(b"\0".join((base.encode(), said.encode(), file[end:]))).hexdigest()
