"""Why an adapter's ops are no branch that a fold can take: what they meet on their way to a sum, by its own name.

    x → [scale] → A → [bias] → [vector] → B → [bias] → [vector] → Add(…, W·x)

What stands in brackets is here looked for. It is what PEFT's other settings and torch's optimizer put there.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from lora_fx.export.onnx.branches import ADAPTER, REMEDY, Op, Reader, op_type, scope_of

_SUMS = ("Add", "Sub", "Sum")
_IN_TORCH = "merge it in torch before the export: PEFT's merge_and_unload, or lora_fx's export of the adapted model"


@dataclass(frozen=True)
class Obstacle:
    """What stands in the way of one factor of an adapter."""

    factor: str
    """The constant's name."""
    reason: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.factor}: {self.reason}"


def obstacles(reader: Reader) -> list[Obstacle]:
    """Of every linear op that is an adapter's, by its names or by its place beside PEFT's base_layer."""
    if held := _held_as_inputs(reader):
        return held
    every = [op for node in reader.model.graph.all_nodes() if (op := reader.linear(node)) is not None]
    named = [op for op in every if not reader.fixed(op.x)]  # DoRA has B·A of the unit matrix, for its norms
    bases = [scope.removesuffix("base_layer") for op in named if (scope := scope_of(op.node)).endswith(".base_layer")]
    found: dict[tuple[str, str], Obstacle] = {}
    for op in named:
        scope = scope_of(op.node)
        pefts = any(scope.startswith(base) and scope != f"{base}base_layer" for base in bases)
        said = obstacle(reader, op) if pefts or ADAPTER.search(reader.names(op)) else None
        if said is not None:  # both factors of an adapter meet the same
            found.setdefault(said, Obstacle(op.constant.name, *said))
    return [*found.values()]


def _held_as_inputs(reader: Reader) -> list[Obstacle]:
    """Weights that are inputs of the graph, too: an adapter's, or what else there is of some. In a switchable graph of
    ours such are its slots."""
    graph = reader.model.graph
    if reader.model.metadata_props.get("lora_fx.form") == "switchable":
        return []
    held = [v for v in graph.inputs if v.const_value is not None and len(v.const_value.shape) > 1]
    held = [v for v in held if ADAPTER.search(v.name)] or held
    reason = "it is an input of the graph, too: whoever runs the file may give another in its place"
    remedy = "export with keep_initializers_as_inputs=False, or take the weights out of the graph's inputs"
    return [Obstacle(value.name, reason, remedy) for value in held]


def obstacle(reader: Reader, op: Op) -> tuple[str, str] | None:
    """Reason and remedy; None where nothing is met up to a sum."""
    if (body := _body(reader, op.node)) is not None:
        outer, name = body
        reason = f"it is inside of the {name} of {_called(outer)}, where no fold looks"
        return reason, f"export the model without torch.cond or a loop around its adapters, or {_IN_TORCH}"
    if (scaled := _multiplied(reader, op.x)) is not None:
        reason = f"its input is multiplied by {scaled.name} first, and the weight's beside it is not"
        return reason, "multiply that into lora_A before the export"
    if (given := _given_out(reader, op)) is not None:
        reason = f"{given.name} is an output of the graph, and needs it"
        return reason, "take that out of the graph's outputs, or fold the torch model before it is exported"
    vector = None
    for node, value in _path(reader, op):
        if op_type(node) in ("Gemm", "Conv", "ConvTranspose"):
            return _beside_product(reader, node)
        other = next((v for v in node.inputs if v is not None and v is not value), value)
        constant = reader.fixed(other)
        if op_type(node) in _SUMS and constant:
            return (
                f"{other.name} is added to the branch, as PEFT's lora_bias is: that is no delta of a weight",
                _IN_TORCH,
            )
        if op_type(node) in ("Mul", "Div") and constant:
            vector = vector or other
            continue
        if op_type(node) in _SUMS and (vector is None or _multiplied(reader, other) is not None):
            reason = "the weight's own product is scaled too, as DoRA does it: W' is no sum of W and B·A"
            return None if vector is None else (reason, _IN_TORCH)
        if op_type(node) not in _SUMS:
            return f"{_called(node)} takes it: a branch is linear in its input", REMEDY
        break
    if vector is None:
        return None
    shape = [*vector.shape] if vector.shape is not None else "?"
    reason = f"the branch is scaled by {vector.name}, {shape}: each feature by a number of its own"
    return reason, "multiply it into lora_A or lora_B before the export"


def _path(reader: Reader, op: Op) -> Iterator[tuple[Any, Any]]:
    """Every node on the way of a product, with the value that it reads, but for those that a branch may have."""
    node, value = op.node, op.node.outputs[0]
    if len(node.inputs) > 2 and node.inputs[2] is not None:
        yield node, op.x
    while len(uses := value.uses()) == 1 and not value.is_graph_output():
        (use,) = uses
        node = use.node
        if len(node.inputs) > 2 and reader.linear(node) is not None:
            yield node, value
        elif reader.linear(node) is None and not reader.passes(node, value):
            yield node, value
            if op_type(node) not in ("Mul", "Div"):
                return
        value = node.outputs[0]


def _given_out(reader: Reader, op: Op) -> Any:
    """The branch, or a value on the way to it, that the graph gives out."""
    node = op.node
    while len(node.inputs) < 3 or node.inputs[2] is None:  # else it is a sum
        value = node.outputs[0]
        if value.is_graph_output():
            return value
        on = [use.node for use in value.uses() if reader.linear(use.node) or reader.passes(use.node, value)]
        if len(on) != 1:
            return None
        node = on[0]
    return None


def _beside_product(reader: Reader, node: Any) -> tuple[str, str]:
    """What an op with a third input adds to its product."""
    added = node.inputs[2]
    if reader.fixed(added):
        reason = f"{_called(node)} adds {added.name} to the product, as PEFT's lora_bias does"
        return f"{reason}: that is no delta of a weight", _IN_TORCH
    reason = f"{_called(node)} adds its C, {added.name}, to the product: an Add that is not in the graph"
    return reason, "export with optimize=False, or the graph before MatMul and Add became one Gemm"


def _called(node: Any) -> str:
    return f"{node.op_type} {node.name or node.outputs[0].name}"


def _multiplied(reader: Reader, value: Any) -> Any:
    """The constant by which a value was multiplied last."""
    node = value.producer()
    if node is None or op_type(node) not in ("Mul", "Div"):
        return None
    return next((v for v in node.inputs if v is not None and reader.fixed(v)), None)


def _body(reader: Reader, inner: Any) -> tuple[Any, str] | None:
    """The node that has another in one of its bodies, and what that is called."""
    import onnx_ir

    kinds = (onnx_ir.AttributeType.GRAPH, onnx_ir.AttributeType.GRAPHS)
    for node in reader.model.graph.all_nodes():
        for held in node.attributes.values():
            graphs = (held.value if held.type == kinds[1] else [held.value]) if held.type in kinds else []
            if any(inner.graph is graph for graph in graphs):
                return node, held.name
    return None
