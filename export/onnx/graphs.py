"""The ONNX graph of a model: translated by torch, with the names that users know, described, and as text."""

from __future__ import annotations

import hashlib
import importlib.metadata
import io
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from itertools import count
from typing import Any, NoReturn

import torch
from torch import nn
from torch.utils import _pytree as pytree

from lora_fx.export.onnx.calls import Call, axis_names, cache_names, is_flat_cache
from lora_fx.export.onnx.runtimes import refuse, refusing
from lora_fx.graph.capture import no_fast_paths, stoppable
from lora_fx.graph.written import Detached


def translate(model: nn.Module, call: Call, opset: int) -> Any:
    """torch.onnx's program, not optimized yet."""
    inputs = call.traced()
    # Without keyword inputs, torch takes a dict in the last place for them: this empty one is all that it takes then.
    last: tuple[dict[str, Any], ...] = (
        () if inputs.kwargs or not isinstance((inputs.args or (None,))[-1], dict) else ({},)
    )
    shown = io.StringIO()  # where it fails, torch prints the graph so far; the exception says more
    remedy = "the exception this one was raised from says more; torch.export.export(model, ...) shows it alone"
    if hasattr(model, "set_experts_implementation"):
        remedy = 'if the model is a mixture of experts, call model.set_experts_implementation("batched_mm") before'
    ours = refusing("torch.onnx.export refuses the model", type(model).__name__, remedy)
    with _data_recorded(model), stoppable(), ours, torch.no_grad(), no_fast_paths(), redirect_stderr(shown):
        program = torch.onnx.export(
            model.eval(),
            (*inputs.args, *last),
            kwargs=inputs.kwargs,
            dynamic_shapes=call.shapes,
            opset_version=opset,
            custom_translation_table=_translations(opset),
            dynamo=True,
            optimize=False,
            verbose=False,
        )
    sys.stderr.write(shown.getvalue())
    assert program is not None
    version = program.model.opset_imports.get("", opset)
    if version != opset:
        reason = f"torch.onnx wrote opset {version} where {opset} was asked for"
        refuse(type(model).__name__, reason, f"export with opset={version}")
    if call.labels:
        program.rename_axes(axis_names(program, call))
    return program


class _Set(BaseException):
    """The ``.data`` of this tensor is to be set. torch would take an Exception for a reason to try in another way,
    whose graph ends the process."""


@contextmanager
def _data_recorded(model: nn.Module) -> Iterator[None]:
    """Inside, torch's exporter records what the model reads of ``.data``.

    Raises:
        ExportError: the model sets it, of which no way of torch's makes a graph.
    """

    def stop(tensor: torch.Tensor) -> NoReturn:
        named = (*model.named_parameters(), *model.named_buffers())
        raise _Set(next((name for name, own in named if own is tensor), "a tensor"))

    try:
        with Detached(stop):
            yield
    except _Set as found:
        reason = (
            f"the model gives {found} another tensor by `.data =` while it runs: torch.export records no such thing"
        )
        remedy = "use what is computed where it is read, or write it with copy_ below torch.no_grad()"
        refuse(type(model).__name__, reason, remedy)


def _translations(opset: int) -> dict[Any, Callable[..., Any]]:
    """Our own. For convolutions: torch's give one without a bias a bias of zeros, which for conv3d has two axes, and
    which nothing takes out again where the weight's channels are dynamic, as the rank of a slot is. For attention from
    opset 23 on: torch's refuses keys and values of one head for all queries (Falcon), or as many as queries."""
    from onnxscript.function_libs.torch_lib.ops.core import aten_convolution
    from onnxscript.function_libs.torch_lib.ops.nn import aten_scaled_dot_product_attention as by_steps

    def conv(x, weight, bias=None, stride=(1,), padding=(0,), dilation=(1,), groups=1):  # type: ignore[no-untyped-def]
        return aten_convolution(x, weight, bias, stride, padding, dilation, groups=groups)

    def attention(q, k, v, mask=None, dropout=0.0, is_causal=False, scale=None, enable_gqa=False):  # type: ignore[no-untyped-def]
        whole = importlib.import_module("torch.onnx._internal.exporter._torchlib.ops.nn")
        grouped = enable_gqa and q.shape[1] != k.shape[1]
        broadcast = not grouped and not q.shape[1] == k.shape[1] == v.shape[1]
        translate = by_steps if broadcast else whole.aten_scaled_dot_product_attention_23
        return translate(q, k, v, mask, dropout, is_causal, scale=scale, enable_gqa=grouped)

    aten = torch.ops.aten
    own = dict.fromkeys((aten.conv1d.default, aten.conv2d.default, aten.conv3d.default), conv)
    return own | ({aten.scaled_dot_product_attention.default: attention} if opset >= 23 else {})


def name_interface(
    graph: Any, program: Any, call: Call, input_names: Sequence[str] | None, output_names: Sequence[str] | None
) -> None:
    """Names of inputs and outputs: the given ones, else those of the call's arguments and of the keys of a dict that
    the model returns; caches are ``past_key_values.0.key`` and ``present.0.key``, as in Optimum's files."""
    for values, given, own, place in (
        (graph.inputs[: len(call.names)], input_names, call.names, "input_names"),
        (graph.outputs, output_names, _output_names(program, len(graph.outputs)), "output_names"),
    ):
        if given is not None and (len(given) != len(values) or len({*given}) != len(given)):
            reason = f"{place} is {[*given]}: {len({*given})} names for {len(values)} tensors"
            refuse(place, reason, f"give one name for each of {', '.join(value.name for value in values)}")
        for value, name in zip(values, given or own, strict=True):
            if not name or name == value.name:
                continue
            everything = [*graph.inputs, *graph.initializers.values(), *(v for node in graph for v in node.outputs)]
            taken = {other.name: other for other in everything}
            if name in taken:  # whoever else has it gets another one
                taken[name].name = next(n for k in count(1) if (n := f"{name}_{k}") not in taken)
            value.name = name


def _output_names(program: Any, total: int) -> list[str]:
    """A name for each output; empty where the model says none."""
    spec = program.exported_program.call_spec.out_spec
    if spec.num_leaves != total:
        return [""] * total
    structure = pytree.tree_unflatten(list(range(total)), spec)
    keyed = structure.items() if isinstance(structure, Mapping) else enumerate(structure if total > 1 else [structure])
    names: list[str] = []
    for key, part in keyed:
        if is_flat_cache(part):
            names += [f"present.{name}" for name in cache_names(part)]
        else:
            inside = len(pytree.tree_leaves(part))
            named = key if isinstance(key, str) else ""
            names += [f"{named}.{n}" if named and inside > 1 else named for n in range(inside)]
    return names


def describe(model: Any, notes: Mapping[str, str]) -> None:
    """Say who made it and what it is; take out the traces and source paths of the machine it was made on."""
    outer, graphs = (model.graph, *model.functions.values()), [*model.graphs()]
    nodes = [node for graph in outer for node in graph.all_nodes()]
    values = [value for node in nodes for value in node.outputs]
    values += [v for graph in graphs for v in (*graph.inputs, *graph.outputs, *graph.initializers.values())]
    for thing in (*graphs, *nodes, *values):
        namespace = thing.metadata_props.get("namespace")  # viewers group by the module path of a node
        thing.metadata_props.clear()
        thing.metadata_props.update({"namespace": namespace} if namespace else {})
        thing.doc_string = None
    for function in model.functions.values():
        function.metadata_props.clear()
    # ONNX Runtime's tools look for torch's name to know what they have before them.
    model.producer_name, model.producer_version, model.doc_string = "pytorch", str(torch.__version__), None
    model.metadata_props.clear()
    ours = next(iter(importlib.metadata.distributions(name="lora-fx")), None)
    model.metadata_props.update({"lora_fx.version": ours.version if ours else "unknown", **notes})


def operators(model: Any) -> Counter[str]:
    """How many nodes of each operator, subgraphs and functions included."""
    return Counter(node.op_type for graph in (model.graph, *model.functions.values()) for node in graph.all_nodes())


def as_torch(tensor: Any) -> torch.Tensor:
    """A tensor of a file as torch's, by its bytes: numpy has no bfloat16."""
    from onnx_ir.tensor_adapters import to_torch_dtype

    raw = getattr(tensor, "raw", None)
    if isinstance(raw, torch.Tensor):
        return raw.detach().cpu()
    shape, dtype = tuple(tensor.shape), to_torch_dtype(tensor.dtype)
    data = bytearray(tensor.tobytes())
    return torch.frombuffer(data, dtype=dtype).reshape(shape) if data else torch.empty(shape, dtype=dtype)


def attribute(node: Any, name: str) -> Any:
    found = node.attributes.get(name)
    value = None if found is None else found.value
    return tuple(value) if isinstance(value, list | tuple) else value


def order(node: Any, axes: int) -> tuple[int, ...]:
    """The axes of its input, as a Transpose or an Identity puts them."""
    if node.op_type == "Identity":
        return tuple(range(axes))
    given = attribute(node, "perm")
    return tuple(reversed(range(axes))) if given is None else given


def names_in(graph: Any) -> set[str]:
    """Of all that is in a graph and in its bodies."""
    nodes = [*graph.all_nodes()]
    bodies = [graph, *(g for g in graph.subgraphs())]
    values = [v for body in bodies for v in (*body.inputs, *body.initializers.values())]
    values += [value for node in nodes for value in node.outputs]
    return {thing.name for thing in (*values, *nodes) if thing.name}


def free_name(like: str | None, taken: set[str]) -> str:
    """A name that nothing has yet, which it has from now on; none for what has none."""
    if not like:
        return ""
    names = (f"{like}.folded{f'_{number}' if number else ''}" for number in count())
    taken.add(name := next(name for name in names if name not in taken))
    return name


def infer_shapes(model: Any) -> None:
    """Types and shapes of all values, by onnx.

    onnx_ir's pass makes a tensor of a sequence that has no type in the file: that stays without one, and so does, in
    such a graph, what may be either.
    """
    from onnx_ir.passes import common

    untyped = [value for node in model.graph.all_nodes() for value in node.outputs if value.type is None]
    common.ShapeInferencePass()(model)
    admitted = {value: _tensors(value, model.opset_imports) for value in untyped}
    if False in admitted.values():
        for value in (value for value, tensor in admitted.items() if not tensor):
            value.type = value.shape = None


def _tensors(value: Any, opsets: Mapping[str, int]) -> bool | None:
    """An op gives tensors there: always, never (False), or also something else (None)."""
    import onnx

    node = value.producer()
    try:
        schema = onnx.defs.get_schema(node.op_type, opsets.get(node.domain, 1), node.domain)
    except onnx.defs.SchemaError:  # an op that onnx does not know, and infers nothing of
        return True
    kinds = {kind.startswith("tensor") for kind in schema.outputs[min(value.index(), len(schema.outputs) - 1)].types}
    return kinds.pop() if len(kinds) == 1 else None


def graph_lines(model: Any, renamed: Mapping[str, str] | None = None) -> list[str]:
    """All of a file but the numbers in its initializers, one line for each thing: equal texts are equal graphs.

    Args:
        renamed: initializers that stand for others.
    """
    import onnx_ir

    names = dict(renamed or {})

    def lines(graph: Any) -> Iterator[str]:
        for kind, values in (("input", graph.inputs), ("output", graph.outputs)):
            yield from (f"{kind} {_typed(value, names)}" for value in values)
        yield from sorted({f"initializer {_typed(value, names)}" for value in graph.initializers.values()})
        for node in graph:
            inputs = ", ".join("–" if value is None else names.get(value.name, value.name) for value in node.inputs)
            outputs = ", ".join(_typed(value, names) for value in node.outputs)
            yield f"{outputs} = {node.domain}.{node.op_type}.{node.overload}({inputs}) as {node.name}"
            for held in sorted(node.attributes.values(), key=lambda a: a.name):
                inner = held.value if held.type == onnx_ir.AttributeType.GRAPHS else [held.value]
                if held.type in (onnx_ir.AttributeType.GRAPH, onnx_ir.AttributeType.GRAPHS):
                    yield from (f"  {held.name}: {line}" for graph in inner for line in lines(graph))
                else:
                    text = onnx_ir.to_proto(held).SerializeToString(deterministic=True)
                    yield f"  {held.name}: {hashlib.sha256(text).hexdigest()}"

    opsets = [f"opset {domain or 'ai.onnx'} {version}" for domain, version in sorted(model.opset_imports.items())]
    return [*opsets, *lines(model.graph), *(line for f in model.functions.values() for line in lines(f))]


def _typed(value: Any, names: Mapping[str, str]) -> str:
    shape = "?" if value.shape is None else ", ".join(str(getattr(size, "value", size)) for size in value.shape)
    return f"{names.get(value.name, value.name)}: {value.dtype}[{shape}]"


def graph_digest(model: Any) -> str:
    return hashlib.sha256("\n".join(graph_lines(model)).encode()).hexdigest()
