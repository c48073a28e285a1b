"""A call of the model as the file will have it: flat tensors, in the model's order, with the names of dynamic axes.

transformers' caches are objects that a file cannot take or give. Inside `flat_caches` the model is called with a list
of (key, value) for each layer in their place, and returns one.
"""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from lora_fx.changes import borrowed
from lora_fx.errors import CaptureError, ExportError
from lora_fx.export.onnx.runtimes import refuse
from lora_fx.graph.capture import Inputs


@dataclass(frozen=True)
class Call:
    """A call of the model, and which of its axes are dynamic."""

    inputs: Inputs
    """With keyword inputs in the order of the signature, which torch.export wants."""
    shapes: dict[str, Any] | None
    """torch.export's dynamic_shapes for every argument, without names."""
    labels: dict[tuple[int, int], str]
    """(number of the input tensor, axis) → the name of an axis that must be dynamic; "" where it was given none."""
    names: tuple[str, ...]
    """For each input tensor its name in the file; "" where the exporter's own is as good."""

    @classmethod
    def of(cls, model: nn.Module, inputs: Inputs, dynamic_shapes: Any) -> Call:
        bound = _bind(model, inputs)
        ordered = [name for name in (*bound, *inputs.kwargs) if name in inputs.kwargs]
        inputs = Inputs(inputs.args, {name: inputs.kwargs[name] for name in ordered})
        word = cache_word(model)
        in_files = {argument: CACHE if argument == word else argument for argument in bound}
        names = tuple(name for argument, value in bound.items() for name in _names(in_files[argument], value))
        if dynamic_shapes is None:
            return cls(inputs, None, {}, names)
        if hasattr(dynamic_shapes, "dynamic_shapes"):  # torch.export.ShapesCollection
            dynamic_shapes = dynamic_shapes.dynamic_shapes(model, inputs.args, inputs.kwargs)
        labels: list[dict[int, str]] = []
        shapes = _spread(_keyed(model, bound, dynamic_shapes), bound, "dynamic_shapes", labels)
        named = {(n, axis): label for n, own in enumerate(labels) for axis, label in own.items()}
        return cls(inputs, shapes, named, names)

    def traced(self) -> Inputs:
        """Inputs to translate with: torch.export takes a dynamic axis of one element, or none, for a special case."""
        leaves, spec = pytree.tree_flatten((self.inputs.args, self.inputs.kwargs))
        places = [k for k, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)]
        sizes: dict[str, int] = {}
        for (n, axis), label in self.labels.items():
            if " + " not in label:
                sizes[label] = max(2, leaves[places[n]].shape[axis], sizes.get(label, 0))
        for (n, axis), label in self.labels.items():
            tensor, parts = leaves[places[n]], label.split(" + ")
            named = label and all(part in sizes for part in parts)
            size = sum(sizes[part] for part in parts) if named else max(2, tensor.shape[axis])
            leaves[places[n]] = resized(tensor, axis, size)
        return Inputs(*pytree.tree_unflatten(leaves, spec))

    def with_argument(self, model: nn.Module, name: str, value: Any, shapes: Any) -> Call:
        """The call with one more keyword argument, behind all other tensors; the names stay those of the others."""
        bound = _bind(model, Inputs(self.inputs.args, {**self.inputs.kwargs, name: value}))
        behind = [*bound][[*bound].index(name) + 1 :]
        if tensors_in([bound[key] for key in behind]):
            taken = f"{type(model).__name__}.forward takes tensors through **{behind[-1]}"
            remedy = "pass only inputs that forward names"
            refuse("example_inputs", f"{taken}, where no other input can follow", remedy)
        kwargs = {**self.inputs.kwargs, name: value}
        kwargs = dict(sorted(kwargs.items(), key=lambda item: (item[0] not in bound, item[0] == name)))
        every = dict.fromkeys(bound) if self.shapes is None else self.shapes
        return replace(self, inputs=Inputs(self.inputs.args, kwargs), shapes={**every, name: shapes})


def resized(tensor: torch.Tensor, axis: int, size: int) -> torch.Tensor:
    """With another size of an axis: entries repeated or left out evenly: masks and positions keep their order."""
    old = tensor.shape[axis]
    if size == old:
        return tensor
    if not old:
        return tensor.new_zeros([*tensor.shape[:axis], size, *tensor.shape[axis + 1 :]])
    return tensor.index_select(axis, torch.arange(size, device=tensor.device) * old // size)


def tensors_in(value: Any) -> list[torch.Tensor]:
    """All of them, in order, in containers or in the inputs of a call."""
    leaves = pytree.tree_leaves((value.args, value.kwargs) if isinstance(value, Inputs) else value)
    return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]


def _names(argument: str, value: Any) -> list[str]:
    if is_flat_cache(value):
        return [f"{argument}.{name}" for name in cache_names(value)]
    return [""] * len(tensors_in(value))


def _bind(model: nn.Module, inputs: Inputs) -> dict[str, Any]:
    """argument name → value."""
    try:
        return inspect.signature(model.forward).bind(*inputs.args, **inputs.kwargs).arguments
    except TypeError as error:
        given = f"{len(inputs.args)} positional inputs" + "".join(f", {name}=…" for name in inputs.kwargs)
        raise CaptureError(
            f"{type(model).__name__}.forward does not take {given}: {error}",
            place="example_inputs",
            remedy="pass inputs that model(*inputs) or model(**inputs) accepts",
        ) from error


def _keyed(model: nn.Module, bound: dict[str, Any], given: Any) -> dict[str, Any]:
    """Dynamic shapes by the name of the argument."""
    if isinstance(given, Mapping) and given and all(isinstance(key, int) for key in given):
        given = (given,)  # the axes of the one input
    if isinstance(given, tuple | list):
        if len(given) > len(bound):
            reason = f"dynamic_shapes has {len(given)} entries for {len(bound)} inputs"
            refuse("dynamic_shapes", reason, f"give one entry for each of {', '.join(bound)}")
        return dict(zip(bound, given, strict=False))
    if not isinstance(given, Mapping):
        refuse("dynamic_shapes", f"dynamic_shapes is {given!r}", 'pass a dict: {"input": {0: "batch"}}')
    keyed = dict(given)
    for name, parameter in inspect.signature(model.forward).parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD and name in bound and name not in keyed:
            keyed[name] = {key: keyed.pop(key) for key in list(keyed) if key in bound[name]}
    return keyed


def _spread(spec: Any, value: Any, place: str, labels: list[dict[int, str]]) -> Any:
    """The dynamic shapes of `value` with an entry for every part of it; names go to `labels`, one for each tensor."""
    if isinstance(value, torch.Tensor):
        labels.append({})
        return _axes(spec, value, place, labels[-1])
    if isinstance(value, Mapping):
        spec = {} if spec is None else spec
        if not isinstance(spec, Mapping) or not set(spec) <= set(value):
            raise _misfit(spec, place, f"a dict with keys among {', '.join(map(str, value))}")
        return {key: _spread(spec.get(key), part, f"{place}[{key!r}]", labels) for key, part in value.items()}
    if is_flat_cache(value) and isinstance(spec, Mapping):
        spec = [(spec, spec)] * len(value)  # the axes of every key and value
    if isinstance(value, tuple | list):
        spec = (None,) * len(value) if spec is None else spec
        if not isinstance(spec, tuple | list) or len(spec) != len(value):
            raise _misfit(spec, place, f"{len(value)} entries")
        parts = [_spread(s, part, f"{place}[{n}]", labels) for n, (s, part) in enumerate(zip(spec, value, strict=True))]
        return tuple(parts) if isinstance(value, tuple) else parts
    tensors = tensors_in(value)
    if spec is not None and not tensors:
        raise _misfit(spec, place, f"None: {value!r} is no tensor, and stays what it is")
    labels += [{} for _ in tensors]  # a container of another kind: torch.export knows how it wants its shapes
    return spec


def _axes(spec: Any, tensor: torch.Tensor, place: str, labels: dict[int, str]) -> Any:
    """The spec of one tensor, for torch.export, which knows no plain names."""
    if spec is None:
        return None
    if isinstance(spec, tuple | list):
        spec = dict(enumerate(spec))
    if not isinstance(spec, Mapping) or not all(isinstance(a, int) and 0 <= a < tensor.ndim for a in spec):
        raise _misfit(spec, place, f'axis numbers from 0 to {tensor.ndim - 1} as keys: {{0: "batch"}}')
    for axis, size in spec.items():
        hint = getattr(getattr(size, "type", None), "name", "")
        if size is None or isinstance(size, int) or hint in ("AUTO", "STATIC"):
            continue  # the exporter may decide
        name = size if isinstance(size, str) else getattr(size, "__name__", "")
        labels[axis] = name if all(part.isidentifier() for part in name.split(" + ")) else ""
    return {axis: torch.export.Dim.DYNAMIC if isinstance(size, str) else size for axis, size in spec.items()}


def _misfit(spec: Any, place: str, wanted: str) -> ExportError:
    return ExportError(f"{spec!r} does not fit the input", place=place, remedy=f"give {wanted}")


def axis_names(program: Any, call: Call) -> dict[Any, str]:
    """torch's symbols → the names of the axes."""
    names: dict[Any, str] = {}
    for n, (value, _) in enumerate(graph_inputs(program, call.inputs)):
        for axis, size in enumerate(value.shape):
            name = call.labels.get((n, axis))
            if isinstance(size, int) and name is not None:
                why = "the model works with no other size, so the axis cannot be dynamic"
                remedy = "leave that axis out of dynamic_shapes"
                refuse(f"input {value.name!r}", f"axis {axis} must be {size}: {why}", remedy)
            if name:
                names.setdefault(str(size.value), name)
    return names


def graph_inputs(program: Any, inputs: Inputs) -> list[tuple[Any, torch.Tensor]]:
    """(input of the graph, the tensor that is fed to it); slots of a switchable graph come behind those."""
    tensors = tensors_in(inputs)
    return list(zip(program.model.graph.inputs[: len(tensors)], tensors, strict=True))


# ── caches ───────────────────────────────────────────────────────────────────────────────────────────────────────────


CACHE = "past_key_values"
"""What files call the cache that goes in, whatever the model does."""


def cache_word(model: nn.Module) -> str:
    """What a forward calls its cache: ``cache`` in models of transformers from 5.24 on."""
    known = inspect.signature(model.forward).parameters
    theirs = any(kind.__module__.startswith("transformers.") for kind in type(model).__mro__)
    return "cache" if theirs and CACHE not in known and "cache" in known else CACHE


def in_its_words(model: nn.Module, inputs: Inputs, shapes: Any) -> tuple[Inputs, Any]:
    """Inputs and dynamic shapes with the cache under the name that the forward has for it, not the one it had."""
    word = cache_word(model)

    def renamed(given: Mapping[str, Any]) -> dict[str, Any]:
        return {word if name == CACHE else name: value for name, value in given.items()}

    return Inputs(inputs.args, renamed(inputs.kwargs)), renamed(shapes) if isinstance(shapes, Mapping) else shapes


@contextmanager
def flat_caches(model: nn.Module, inputs: Inputs) -> Iterator[Inputs]:
    """Inside, the model takes and returns a list of (key, value) for every cache object; what comes is the inputs so.
    With ``use_cache=True`` and no cache among the inputs it returns one all the same.

    Raises:
        ExportError: a cache of another kind than transformers' `DynamicCache` of plain layers.
    """
    caches = [value for value in (*inputs.args, *inputs.kwargs.values()) if is_cache(value)]
    flat = Inputs(tuple(map(_flat, inputs.args)), {name: _flat(value) for name, value in inputs.kwargs.items()})
    if not caches and not inputs.kwargs.get("use_cache"):
        yield flat
        return
    places = {place for place, value in (*enumerate(inputs.args), *inputs.kwargs.items()) if is_cache(value)}
    kind, inner = type(caches[0]) if caches else list, model.__dict__.get("forward")

    @functools.wraps(type(model).forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        given = [kind(value) if n in places else value for n, value in enumerate(args)]
        named = {name: kind(value) if name in places else value for name, value in kwargs.items()}
        output = inner(*given, **named) if inner else type(self).forward(self, *given, **named)
        if isinstance(output, Mapping):
            return {name: _flat(value) for name, value in output.items()}
        return tuple(map(_flat, output)) if isinstance(output, tuple) else output

    with borrowed(model):
        # A method, not a closure over the model: a deep copy of the model calls itself.
        model.__dict__["forward"] = types.MethodType(forward, model)
        yield flat


def is_cache(value: Any) -> bool:
    return any(cls.__module__ == "transformers.cache_utils" and cls.__name__ == "Cache" for cls in type(value).__mro__)


def _flat(value: Any) -> Any:
    """A cache as a list of its layers' (key, value); anything else as it is."""
    if not is_cache(value):
        return value
    layers = [type(layer).__name__ for layer in value.layers]
    if type(value).__name__ != "DynamicCache" or set(layers) - {"DynamicLayer"}:
        kinds = ", ".join(dict.fromkeys(layers)) or "no layers"
        reason = f"a {type(value).__name__} ({kinds}) has no form of plain tensors that the model could be given again"
        remedy = "pass a DynamicCache() that was made without a config and filled by a forward; or use_cache=False"
        refuse("example_inputs", reason, remedy)
    if not all(layer.is_initialized for layer in value.layers):
        remedy = "fill the cache with a forward of the model first; the file will take an empty past too"
        refuse("example_inputs", "a layer of the cache is empty: its tensors have no shape yet", remedy)
    return [(layer.keys, layer.values) for layer in value.layers]


def is_flat_cache(value: Any) -> bool:
    """A list of pairs: what `flat_caches` makes of a cache."""
    return isinstance(value, list) and bool(value) and all(isinstance(v, tuple) and len(v) == 2 for v in value)


def cache_names(value: Any) -> list[str]:
    """Names of a flat cache's tensors, as Optimum's files have them: ``0.key``, ``0.value``, ``1.key`` …"""
    return [f"{n}.{part}" for n in range(len(value)) for part in ("key", "value")]
