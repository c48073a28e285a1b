"""What an fx node is, for those who read a captured graph: its op's name, its shape, what it writes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from lora_fx.graph.forms import op_name
from lora_fx.graph.views import COPIES, MOVES

PRODUCTS = frozenset({"matmul", "mm", "bmm", "baddbmm", "addmm", "addbmm", "einsum", "tensordot"})
ALIASES = frozenset({*MOVES, *COPIES, "expand_as", "view_as", "as_strided", "diagonal"} - {"clone", "lift_fresh_copy"})


def base_name(node: fx.Node) -> str:
    """The name of its op; an in-place op is called as the one that makes a new tensor."""
    name = op_name(node.target)
    return name[:-1] if name.endswith("_") and not name.endswith("__") else name


def call(node: fx.Node, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Its op, run on these arguments."""
    assert callable(node.target)
    return node.target(*args, **kwargs)


def first_operand(node: fx.Node) -> fx.Node | None:
    """Its first positional argument, where that is a node."""
    return node.args[0] if node.args and isinstance(node.args[0], fx.Node) else None


def looked_into(node: fx.Node) -> fx.Node | None:
    """The tensor that its value is a view of, or that it writes into."""
    if written := written_by(node):
        return written[0]
    return first_operand(node) if (name := base_name(node)) in ALIASES or name == "getitem" else None


def operands(node: fx.Node) -> list[fx.Node]:
    """The nodes among its arguments, in order, each as often as it is there (`all_input_nodes` has each once)."""
    return [n for n in pytree.tree_leaves((node.args, node.kwargs)) if isinstance(n, fx.Node)]


def is_float(value: Any) -> bool:
    if isinstance(value, torch.Tensor):
        return value.dtype.is_floating_point or value.dtype.is_complex
    return isinstance(value, list | tuple) and any(is_float(v) for v in value)


def shape_of(node: fx.Node) -> tuple[int, ...]:
    value = node.meta.get("val")
    return tuple(value.shape) if isinstance(value, torch.Tensor) else ()


def dim_of(node: fx.Node) -> int:
    """The dim that a softmax or a glu runs along, counted from the last."""
    dim: Any = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", -1)
    return dim - len(shape_of(node)) if dim >= 0 else dim


def written_by(node: fx.Node) -> list[fx.Node]:
    """The arguments an op writes in place."""
    if not (isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable):
        return []
    given = dict(zip((a.name for a in node.target._schema.arguments), node.args, strict=False)) | node.kwargs
    writable = [a.name for a in node.target._schema.arguments if a.alias_info is not None and a.alias_info.is_write]
    return [arg for name in writable for arg in pytree.tree_leaves(given.get(name)) if isinstance(arg, fx.Node)]
