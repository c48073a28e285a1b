"""Sums that are spelled otherwise, as the Adds that a fold reads: only those that an adapter's branch is a term of.

Sub(a, b)         ⇒     Add(a, Neg(b))
Sum(a, b, c)      ⇒     Add(Add(a, b), c)
"""

from __future__ import annotations

from typing import Any

from lora_fx.export.onnx.branches import Reader, op_type
from lora_fx.export.onnx.graphs import free_name, names_in


def spell_out(reader: Reader) -> bool:
    """Whether there was one: then the graph has values whose shapes nobody has inferred yet."""
    graph, taken, found = reader.model.graph, set[str](), False
    for node in list(graph):
        if op_type(node) not in ("Sub", "Sum") or len(node.inputs) < 2 or not (adapters := reader.adapters_of(node)):
            continue
        if node.op_type == "Sum" or node.inputs[0] in adapters:
            taken, found = taken or names_in(graph), True
            _as_adds(graph, node, adapters, taken)
    return found


def _as_adds(graph: Any, node: Any, adapters: set[Any], taken: set[str]) -> None:
    """The node stays, with its output, as the last of them; of a Sum's terms the adapters are added last."""
    import onnx_ir

    def before(op: str, *inputs: Any) -> Any:
        value = onnx_ir.Value(name=free_name(node.outputs[0].name, taken), type=node.outputs[0].type)
        graph.insert_before(node, onnx_ir.Node("", op, inputs, outputs=[value], name=free_name(node.name, taken)))
        return value

    terms = node.inputs if node.op_type == "Sub" else sorted(node.inputs, key=adapters.__contains__)
    first, *others, last = terms
    for other in others:
        first = before("Add", first, other)
    last = before("Neg", last) if node.op_type == "Sub" else last
    node.op_type = "Add"
    node.resize_inputs(2)
    node.replace_input_with(0, first)
    node.replace_input_with(1, last)
