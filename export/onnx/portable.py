"""An adapter of a switchable graph as a ``.safetensors`` file, which every language reads; `examples/web` does.

Its tensors are the inputs of the graph by name, and its metadata says which base model they are for, and what they are:

    lora_fx.base      the base model's version, as in the graph's manifest
    lora_fx.sha256    of the base's version, a 0 byte, the file's table of tensors as JSON with sorted keys, a 0 byte,
                      and all that stands behind the table
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy
import torch

from lora_fx.export.onnx.runtimes import refuse
from lora_fx.export.onnx.weights import opened
from lora_fx.reading import packed, tensors_digest

SUFFIX = ".safetensors"
_BASE, _DIGEST = "lora_fx.base", "lora_fx.sha256"


def write_factors(path: Path, factors: Mapping[str, torch.Tensor], base: int) -> None:
    import safetensors.torch as framework

    tensors = {name: factor.contiguous() for name, factor in factors.items()}
    path.write_bytes(packed(tensors, framework, {_BASE: str(base)}, _DIGEST, str(base)))


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
        with path.open("rb") as bytes_of:
            found = tensors_digest(said[_BASE], bytes_of)
        if said[_DIGEST] != found:
            refuse(str(path), "it is damaged: its tensors are not the ones that were saved", "copy or save it again")
        return {name: file.get_tensor(name) for name in file.keys()}, int(said[_BASE])  # noqa: SIM118
