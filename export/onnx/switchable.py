"""One graph with a slot for an adapter at every adapted weight: A and B are inputs, of any rank, which may be left out.

    y = op(x, W) + up(down(x, A), B)          A: (…, r, in), B: (…, out, r), by default of rank 0 or of zeros

The scale is in B, a part of a fused weight has zero rows for the others, and several adapters of one weight stand
beside each other along the rank. Each slot has the name of its weight, so that an adapter's file fits every graph of
its model: ``<weight>.lora_A`` and ``<weight>.lora_B``.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import json
import math
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lora_fx.changes import borrowed, changing
from lora_fx.deltas.adapter import Adapter
from lora_fx.export.onnx import portable
from lora_fx.export.onnx.calls import Call
from lora_fx.export.onnx.files import folder_beside, move_files, writable
from lora_fx.export.onnx.loading import seal
from lora_fx.export.onnx.runtimes import refuse, require
from lora_fx.export.onnx.targets import OPTIONAL
from lora_fx.export.onnx.weights import Weights, tensor_bytes
from lora_fx.model.inventory import Place, base_parameters, inventory
from lora_fx.model.marks import attach, child_name, detach
from lora_fx.model.training import REFUSE, why_not_alone
from lora_fx.passes.wiring import wire

SWITCHABLE = "switchable"
MANIFEST = "lora_fx.slots"
FACTORS = "lora_fx_factors"
"""The argument that A and B are given in while a model is translated."""

_RANK = torch.export.Dim.DYNAMIC

# What ONNX Runtime runs with a rank of 0. It dies of a division by zero in a Conv, and in an Einsum.
_MULTIPLY = frozenset({"MatMul", "Gemm"})
_MOVE = frozenset(
    {"Transpose", "Reshape", "Squeeze", "Unsqueeze", "Expand", "Slice", "Gather", "GatherND", "Cast", "Identity"}
)

_TRACED = 2  # the rank that a slot is traced with: torch.export takes 0 and 1 for special sizes
_SLOT = "slot"

Slots = dict[str, Adapter]
"""Weight → what the model reads beside it while it is translated: of all rows, with scale 1."""


def adapted(model: nn.Module) -> dict[str, list[Place]]:
    """Name of each adapted weight → its adapters there, active or not."""
    found: dict[str, list[Place]] = {}
    for place in inventory(model).places:
        if not place.adapter.kind.low_rank:
            adapter = place.adapter
            reason = f"the adapter {adapter.name!r} is of the kind {adapter.kind.name!r}, which has no factors to feed"
            other = "folded" if adapter.kind.is_delta else "unfolded"
            refuse(place.weight, reason, f'export with adapters="{other}", or remove it')
        found.setdefault(place.weight, []).append(place)
    if not found:
        reason = "the model has no adapter beside a weight"
        refuse(type(model).__name__, reason, "apply or load the adapters first; unfold a folded model")
    return found


@contextmanager
def slots_in(model: nn.Module) -> Iterator[Slots]:
    """Inside, the model reads a slot in the place of the adapters of each weight."""
    with borrowed(model):
        slots = {}
        for name, places in adapted(model).items():
            for place in places:
                detach(place.owner, place.child)
            owner, first = places[0].owner, places[0].adapter
            slot = Adapter(
                first.layout, rank=_TRACED, alpha=_TRACED, name=_SLOT, dtype=first.dtype, device=first.device
            ).eval()
            slot.change(realised=first.realised)
            slots[name] = slot
            attach(owner, child_name(places[0].attribute, _SLOT), slot)
        wire(model)
        yield slots


@contextmanager
def factors_as_inputs(model: nn.Module, slots: Slots, call: Call) -> Iterator[Call]:
    """Inside, the model takes the slots' A and B as one more argument; what comes is the call with it."""
    plain = model.forward

    @functools.wraps(type(model).forward)
    def forward(*args: Any, **kwargs: Any) -> Any:
        given = kwargs.pop(FACTORS)
        before = [dict(slot._parameters) for slot in slots.values()]
        try:
            for slot, (a, b) in zip(slots.values(), given, strict=True):
                slot._parameters.update(A=a, B=b)
            return plain(*args, **kwargs)
        finally:
            for slot, own in zip(slots.values(), before, strict=True):
                slot._parameters.update(own)

    signature = inspect.signature(plain)
    last = [p for p in signature.parameters.values() if p.kind is p.VAR_KEYWORD]
    named = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
    own = inspect.Parameter(FACTORS, inspect.Parameter.KEYWORD_ONLY)
    forward.__signature__ = signature.replace(parameters=[*named, own, *last])  # type: ignore[attr-defined]
    with borrowed(model):
        model.__dict__["forward"] = forward
        factors = [(slot.A.detach(), slot.B.detach()) for slot in slots.values()]
        ranks = [({a.ndim - 2: _RANK}, {b.ndim - 1: _RANK}) for a, b in factors]
        yield call.with_argument(model, FACTORS, factors, ranks)


def open_slots(graph: Any, slots: Slots, inputs: int, kind: str) -> dict[str, dict[str, Any]]:
    """Give the inputs that are A and B their names, a place behind the model's own inputs, and empty defaults where
    they are optional.

    Returns:
        What a session is told of each; the rank is the least that the graph runs with, the one of an empty slot.
    """
    import onnx_ir
    from onnx_ir.tensor_adapters import TorchTensor

    values = [value for value in graph.inputs if value.name.startswith(FACTORS)]
    own = [value for value in graph.inputs if not value.name.startswith(FACTORS)]
    assert len(own) == inputs and len(values) == 2 * len(slots), "the exporter has dropped an input"
    graph.inputs[:] = [*own, *values]
    opened = {}
    for n, (weight, slot) in enumerate(slots.items()):
        factors = values[2 * n : 2 * n + 2]
        least = 0 if all(map(_may_be_empty, factors)) else 1
        for value, factor in zip(factors, "AB", strict=True):
            shape, name = slot.layout.shape_of(factor, 0), f"{weight}.lora_{factor}"
            empty = torch.zeros(slot.layout.shape_of(factor, least), dtype=slot.dtype)
            value.shape = onnx_ir.Shape([size or f"{weight}.rank" for size in shape])
            value.name = name
            if kind == OPTIONAL:
                value.const_value = TorchTensor(empty, name=name)
                graph.initializers[name] = value
            dtype = str(slot.dtype).removeprefix("torch.")
            opened[name] = {"weight": weight, "dtype": dtype, "shape": shape, "rank": least}
    return opened


def empty_slots(manifest: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """What makes each slot of a manifest one without an adapter: rank 0, or zeros where the graph does not run so."""
    return {
        name: torch.zeros([size or slot["rank"] for size in slot["shape"]], dtype=getattr(torch, slot["dtype"]))
        for name, slot in manifest["inputs"].items()
    }


def _may_be_empty(factor: Any) -> bool:
    """Whether all that multiplies with this factor runs where its rank is 0."""
    nodes = factor.consumers()
    moved = [value for node in nodes if node.op_type in _MOVE for value in node.outputs]
    return all(node.op_type in _MOVE | _MULTIPLY for node in nodes) and all(map(_may_be_empty, moved))


def factors_of(model: nn.Module, name: str) -> dict[str, torch.Tensor]:
    """Input of the graph → A or B of the adapter of this name.

    Raises:
        AdapterError: there is none.
    """
    inventory(model).require([name])
    found: dict[str, torch.Tensor] = {}
    for weight, places in adapted(model).items():
        own = [place.adapter.low_rank().detached() for place in places if place.adapter.name == name]
        if own:
            found[f"{weight}.lora_A"] = torch.cat([delta.A for delta in own], -2).cpu()
            found[f"{weight}.lora_B"] = torch.cat([delta.whole * delta.scale for delta in own], -1).cpu()
    for key, factor in found.items():
        if not bool(factor.isfinite().all()):
            reason = f"adapter {name!r} holds NaN or Inf, or does with its scale in it"
            refuse(key, reason, "load an earlier checkpoint of the adapter")
    return found


def base_version(model: nn.Module, load: Callable[[str], torch.Tensor] | None = None) -> int:
    """31 bits of the sha256 of the base model's parameters, names and numbers: which model an adapter is for.

    Args:
        load: reads the numbers of a parameter on meta, by its name.
    """
    digest = hashlib.sha256()
    for name, parameter in sorted(base_parameters(model).items()):
        if parameter.is_meta and load is None:
            reason = "the weight is on meta: which base model this is cannot be told"
            refuse(name, reason, "save the adapter from a model that has its weights")
        numbers = load(name) if parameter.is_meta and load else parameter
        digest.update(json.dumps([name, str(parameter.dtype), [*parameter.shape]]).encode())
        digest.update(tensor_bytes(numbers.to(parameter.dtype)))
    return int.from_bytes(digest.digest()[:4], "big") >> 1


def manifest(model: nn.Module, slots: dict[str, dict[str, Any]], graph: str, weights: Weights) -> dict[str, Any]:
    """What a session checks before it lets an adapter in."""
    version = base_version(model, lambda name: weights[name].load())
    return {"version": 1, "base": version, "graph": graph, "inputs": slots}


def save_onnx_adapter(
    model: nn.Module,
    path: str | os.PathLike[str],
    old: str | os.PathLike[str] | None = None,
    *,
    name: str = "default",
    beside: str = REFUSE,
) -> Path:
    """Write one adapter of a model, for the switchable graphs of the same base model, as an ``.onnx_adapter`` file,
    which ONNX Runtime can load too, or as ``.safetensors``, for JavaScript: the path says which.

    The scale is in B. The file's model version is `base_version`: a `Session` refuses files of other base models.

    Args:
        path: the file. It is replaced in one step.
        old: the path, where the name stands before it; deprecated.
        name: the adapter's name, as in `apply`.
        beside: as in `save_adapter`, what to do about parameters of the model that have ``requires_grad``.

    Raises:
        AdapterError: there is no such adapter.
        ExportError: more than adapters trains, it is folded, it holds NaN or Inf, or the path cannot be written.
    """
    if old is not None:
        warnings.warn("write save_onnx_adapter(model, path, name=…)", DeprecationWarning, stacklevel=2)
        name, path = str(path), old
    onnxruntime = require("onnxruntime")
    target = writable(path)
    with changing(model, "save_onnx_adapter"):
        factors, version = factors_of(model, name), base_version(model)
    if any(why := why_not_alone(model, beside)):
        refuse(*why)
    for key, factor in factors.items():
        if factor.dtype == torch.bfloat16:
            reason = "the factor is bfloat16, which the file format cannot be given from Python"
            refuse(key, reason, "adapters of lora_fx are float32 beside bfloat16 weights: cast this one back")
    with folder_beside(target) as folder:
        made = folder / target.name
        if target.suffix == portable.SUFFIX:
            portable.write_factors(made, factors, version)
        else:
            file = onnxruntime.AdapterFormat()
            file.set_adapter_version(1)
            file.set_model_version(version)
            values = {
                key: onnxruntime.OrtValue.ortvalue_from_numpy(t.contiguous().numpy()) for key, t in factors.items()
            }
            file.set_parameters(values)
            file.export_adapter(str(made))
            seal(made)
        move_files([made], target)
    return target


def _is_slot(said: Any) -> bool:
    """What a manifest says of a slot: one axis, the rank, is open, and a rank of 1 is of a size that can be."""
    shape = said["shape"]
    sizes = isinstance(shape, list) and shape.count(0) == 1 and all(type(n) is int and 0 <= n < 2**31 for n in shape)
    known = isinstance(said["weight"], str) and said["dtype"] in ("float16", "bfloat16", "float32", "float64")
    return sizes and known and said["rank"] in (0, 1) and math.prod(n or 1 for n in shape) < 2**31


def read_manifest(metadata: Mapping[str, str], place: str) -> dict[str, Any]:
    """The manifest in a file's metadata.

    Raises:
        ExportError: there is none that this version reads.
    """
    try:
        found = json.loads(metadata[MANIFEST])
        whole = found["version"] == 1 and {"base", "graph"} <= found.keys() and isinstance(found["base"], int)
        known = whole and all(map(_is_slot, found["inputs"].values()))
    except (AttributeError, KeyError, ValueError, TypeError, RecursionError):
        known = False
    if not known:
        reason = "the graph has no slots for adapters that this version of lora_fx knows"
        refuse(place, reason, 'export it with adapters="switchable"')
    return found
