"""Structural patterns: a plain Python function of torch calls, found in a captured graph.

    def gated_mlp(x, gate, up, down):
        return F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)

The function is traced with `torch.fx`; an argument that is the weight of a matmul is bound to a weight of the program,
any other argument to any value. Forms with other layouts (`Conv1D`, `x @ W`) match the same call, biases and numbers
are ignored, and so are casts, dropout and views between the calls.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Iterator
from typing import Any

from torch import fx

from lora_fx.errors import RuleError
from lora_fx.graph.forms import FORMS, op_name
from lora_fx.graph.program import Program, Use, Weight
from lora_fx.graph.views import COPIES, MOVES

_MATMULS = frozenset(FORMS) - {"embedding"}
_COMMUTE = frozenset({"add", "mul", "__add__", "__mul__"})
_PASS = frozenset(MOVES) | COPIES | {"dropout", "feature_dropout", "identity"}


def find_pattern(program: Program, pattern: Callable[..., Any], place: str) -> list[dict[str, Weight]]:
    """Every place where `pattern` matches, as its argument names bound to weights.

    Raises:
        RuleError: the pattern is no plain function of torch calls, or multiplies with none of its arguments.
    """
    graph, weights = _trace(pattern, place)
    result = next(n for n in graph.nodes if n.op == "output").args[0]
    if not isinstance(result, fx.Node):
        raise RuleError("the pattern returns no single value", place=place, remedy="return the last call's result")
    by_node: dict[fx.Node, Use] = {use.node: use for use in program.uses if use.call}
    found = []
    for node in program.graph.nodes:
        for bound in _match(result, node, {}, by_node, weights):
            found.append({name: weight for name, weight in bound.items() if isinstance(weight, Weight)})
            break
    return found


def _trace(pattern: Callable[..., Any], place: str) -> tuple[fx.Graph, frozenset[str]]:
    try:
        graph = fx.Tracer().trace(pattern)
    except Exception as error:
        raise RuleError(
            f"the pattern cannot be traced: {error}",
            place=place,
            remedy="write a function of tensors that only makes torch calls: lambda x, w: F.relu(F.linear(x, w))",
        ) from error
    names = set()
    for node in graph.nodes:
        if _name(node) in _MATMULS:
            names |= {n.target for n in _operands(node)[1:] if n.op == "placeholder"}
    if not names:
        taken = ", ".join(inspect.signature(pattern).parameters)
        raise RuleError(
            f"none of its arguments ({taken}) is the weight of a matmul",
            place=place,
            remedy="pass the weights as arguments and multiply with them: lambda x, w: F.linear(x, w)",
        )
    return graph, frozenset(names)


def _name(node: Any) -> str:
    if not isinstance(node, fx.Node) or node.op not in ("call_function", "call_method"):
        return ""
    name = op_name(node.target)
    if name in ("wrapper", "fn"):  # functional wrappers hide their name
        name = getattr(node.target, "__name__", name)
    return name.removesuffix("_").strip("_") if name not in FORMS else name


def _operands(node: fx.Node) -> list[fx.Node]:
    values = itertools.chain(node.args, node.kwargs.values())
    flat = itertools.chain.from_iterable(v if isinstance(v, list | tuple) else (v,) for v in values)
    nodes = [v for v in flat if isinstance(v, fx.Node)]
    if _name(node) in ("addmm", "baddbmm"):
        return nodes[1:3]
    return nodes[:2] if _name(node) in _MATMULS else nodes


def _skip(node: Any) -> Any:
    while isinstance(node, fx.Node) and _name(node) in _PASS and _operands(node):
        node = _operands(node)[0]
    return node


def _match(
    want: fx.Node, have: Any, bound: dict[str, Any], uses: dict[fx.Node, Use], weights: frozenset[str]
) -> Iterator[dict[str, Any]]:
    """Every way to read `have` as `want`, each with the arguments it binds."""
    want, have = _skip(want), _skip(have)
    if want.op == "placeholder":
        known = bound.get(want.target, have)
        if known is have:
            yield {**bound, want.target: have}
        return
    if not isinstance(have, fx.Node):
        return
    if _name(want) in _MATMULS and any(n.op == "placeholder" and n.target in weights for n in _operands(want)):
        yield from _match_matmul(want, have, bound, uses, weights)
        return
    if _name(want) != _name(have):
        return
    ours, theirs = _operands(want), _operands(have)
    orders = itertools.permutations(theirs) if _name(want) in _COMMUTE else [tuple(theirs)]
    for order in orders:
        if len(order) >= len(ours):
            yield from _match_all(list(zip(ours, order, strict=False)), bound, uses, weights)


def _match_matmul(
    want: fx.Node, have: fx.Node, bound: dict, uses: dict, weights: frozenset[str]
) -> Iterator[dict[str, Any]]:
    use = uses.get(have)
    if use is None or use.call is None:
        return
    argument = next(n for n in _operands(want) if n.op == "placeholder" and n.target in weights)
    x = next((n for n in _operands(want) if n is not argument), None)
    if bound.get(argument.target, use.weight) is not use.weight or x is None:
        return
    yield from _match(x, use.x, {**bound, argument.target: use.weight}, uses, weights)


def _match_all(
    pairs: list[tuple[fx.Node, Any]], bound: dict, uses: dict, weights: frozenset[str]
) -> Iterator[dict[str, Any]]:
    if not pairs:
        yield bound
        return
    (want, have), *rest = pairs
    for first in _match(want, have, bound, uses, weights):
        yield from _match_all(rest, first, uses, weights)
