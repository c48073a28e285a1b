"""An adapter of a switchable graph as a ``.safetensors`` file, which every language reads; `examples/web` does.

Its tensors are the inputs of the graph by name, and its metadata says which base model they are for, and what they are:

    lora_fx.base      the base model's version, as in the graph's manifest
    lora_fx.digest    sha256 of the text, one line a tensor in the order of names, and then of all numbers in that order
                      text:  lora_fx.base, then for each tensor  name dtype size×size    dtype as safetensors has it
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy
import torch

from lora_fx.export.onnx.runtimes import refuse
from lora_fx.export.onnx.weights import opened, tensor_bytes

SUFFIX = ".safetensors"
_BASE, _DIGEST = "lora_fx.base", "lora_fx.digest"
_DTYPES = {torch.float16: "F16", torch.float32: "F32", torch.float64: "F64"}


def write_factors(path: Path, factors: Mapping[str, torch.Tensor], base: int) -> None:
    from safetensors.torch import save_file

    said = {"format": "pt", _BASE: str(base), _DIGEST: _digest(str(base), factors)}
    save_file({name: factor.contiguous() for name, factor in factors.items()}, path, said)


def read_factors(path: Path) -> tuple[dict[str, numpy.ndarray[Any, Any]], int]:
    """A and B by name, and the version of their base model.

    Raises:
        ExportError: the file is damaged, or not one of these.
    """
    remedy = "pass a file that save_onnx_adapter wrote"
    with opened(path, "pt", remedy) as file:
        said = file.metadata() or {}
        factors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    if not {_BASE, _DIGEST} <= said.keys() or not said[_BASE].isdecimal():
        refuse(str(path), "it does not say which base model it is for", remedy)
    strange = [name for name, factor in factors.items() if factor.dtype not in _DTYPES]
    if strange or said[_DIGEST] != _digest(said[_BASE], factors):
        refuse(str(path), "it is damaged: its tensors are not the ones that were saved", "copy or save it again")
    return {name: factor.numpy() for name, factor in factors.items()}, int(said[_BASE])


def _digest(base: str, factors: Mapping[str, torch.Tensor]) -> str:
    named = sorted(factors.items())
    lines = [base, *(f"{n} {_DTYPES[t.dtype]} {'×'.join(map(str, t.shape))}" for n, t in named)]
    digest = hashlib.sha256("\n".join(lines).encode())
    for _, factor in named:
        digest.update(tensor_bytes(factor))
    return digest.hexdigest()
