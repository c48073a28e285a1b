"""The folded weights of a task, apart from the graph that they are for.

Folded files of one base model have one graph: what differs is the numbers of the folded weights. Those alone, under the
names of the graph's initializers, make a session of the base's file one of the task's.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy

from lora_fx.export.onnx.files import folder_beside, move_files, writable
from lora_fx.export.onnx.loading import SEAL, load_model
from lora_fx.export.onnx.runtimes import refuse, require
from lora_fx.export.onnx.weights import opened
from lora_fx.reading import packed, tensors_digest

GRAPH = "lora_fx.graph"
"""The key of the graph's digest, in the metadata of both kinds of file."""

_REMEDY = "pass a file that export_onnx wrote"
_LEAST = 1024  # bytes: smaller initializers are no gain to share, and the runtime reads shapes and axes off some


def save_onnx_weights(
    base: str | os.PathLike[str], folded: str | os.PathLike[str], path: str | os.PathLike[str]
) -> dict[str, int]:
    """Write the weights in which a folded file differs from the base model's as a ``.safetensors`` file.

    Args:
        base, folded: two files that `export_onnx` wrote, of the base model and of the model with its adapters folded.
        path: for `lora_fx.export.Session.task`. It is replaced in one step.

    Returns:
        initializer → bytes.

    Raises:
        ExportError: a file cannot be read, the two are not the same graph, or nothing differs.
    """
    import safetensors.numpy

    require("onnx")
    target = writable(path)
    graphs = [load_model(Path(file), _REMEDY) for file in (base, folded)]
    digests = [graph.metadata_props.get(GRAPH, "") for graph in graphs]
    if not digests[0] or digests[0] != digests[1]:
        reason = f"the graphs are not the same: {digests[0][:8] or 'unknown'} and {digests[1][:8] or 'unknown'}"
        refuse(str(folded), reason, "export the base model and the folded one with the same arguments of export_onnx")
    before, after = (_initializers(graph) for graph in graphs)
    found = {}
    for name, tensor in after.items():
        array = _array(tensor, name)
        if array.tobytes() != _array(before[name], name).tobytes():
            _refuse_infinite(str(folded), name, array)
            found[name] = numpy.ascontiguousarray(array)
    small = [name for name, array in found.items() if array.nbytes < _LEAST]
    if not found or small:
        reason = f"{small[0]} is too small to be put into a session" if small else "the two files have the same weights"
        refuse(str(folded), reason, "open the folded file in a session of its own")
    with folder_beside(target) as folder:
        metadata = {"format": "np", GRAPH: digests[0]}
        data = packed(found, safetensors.numpy, metadata, SEAL, digests[0])
        (folder / target.name).write_bytes(data)
        move_files([folder / target.name], target)
    return {name: array.nbytes for name, array in found.items()}


def read_weights(path: Path) -> dict[str, numpy.ndarray]:
    """The initializers of a file that sessions can share."""
    tensors = _initializers(load_model(path, _REMEDY))
    return {name: _array(tensor, name) for name, tensor in tensors.items() if tensor.nbytes >= _LEAST}


def read_task(path: Path, graph: str, base: Mapping[str, numpy.ndarray]) -> dict[str, numpy.ndarray]:
    """A task's weights, checked against the graph's.

    Raises:
        ExportError: the file cannot be read, is not what was written, holds NaN or Inf, or is for another graph.
    """
    with opened(path, "np", "pass a file that save_onnx_weights wrote") as file:
        said = file.metadata() or {}
        of = said.get(GRAPH, "")
        with open(path, "rb") as raw:
            damaged = said.get(SEAL) != tensors_digest(of, raw)
        if damaged:
            reason = "its numbers are not the ones that were saved: it is damaged"
            reason = reason if SEAL in said else "it has no digest: it is from before lora_fx wrote one, or damaged"
            refuse(str(path), reason, "save it again with save_onnx_weights")
        found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    for name, array in found.items():
        _refuse_infinite(str(path), name, array)
    wrong = [n for n, a in found.items() if n not in base or (a.shape, a.dtype) != (base[n].shape, base[n].dtype)]
    if not of or of != graph or wrong or not found:
        reason = f"the graph has no weight {wrong[0]!r} of that shape" if wrong else "it is for another graph"
        refuse(str(path), reason, "make it with save_onnx_weights from this graph's own file")
    return found


def _refuse_infinite(place: str, name: str, array: numpy.ndarray) -> None:
    if array.dtype.kind == "f" and not numpy.isfinite(array).all():
        refuse(f"{place}, {name}", "it holds NaN or Inf", "fold an earlier checkpoint of the adapter")


def _initializers(graph: Any) -> dict[str, Any]:
    inputs = {value.name for value in graph.graph.inputs}
    return {name: value.const_value for name, value in graph.graph.initializers.items() if name not in inputs}


def _array(tensor: Any, name: str) -> numpy.ndarray:
    array = tensor.numpy()
    if array.dtype.kind not in "fiub" or array.dtype.name == "bfloat16":
        reason = f"its type is {array.dtype.name}, which ONNX Runtime cannot be given from Python"
        refuse(name, reason, "export in float32 or float16")
    return array
