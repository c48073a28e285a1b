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
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx

from lora_fx.changes import in_turn
from lora_fx.errors import RuleError
from lora_fx.graph.forms import FORMS, Call, find, op_name
from lora_fx.graph.nodes import operands
from lora_fx.graph.program import Program, Use, Weight
from lora_fx.graph.views import COPIES, MOVES

_COMMUTE = frozenset({"add", "mul", "__add__", "__mul__"})
_PASS = frozenset(MOVES) | COPIES | {"dropout", "feature_dropout", "identity"}


def find_pattern(program: Program, pattern: Callable[..., Any], place: str) -> list[dict[str, Weight]]:
    """Every place where `pattern` matches, as its argument names bound to weights.

    Raises:
        RuleError: the pattern is no plain function of torch calls, or multiplies with none of its arguments.
    """
    pattern_graph, calls = _trace(pattern, place)
    result = pattern_graph.output_node().args[0]
    if not isinstance(result, fx.Node):
        raise RuleError("the pattern returns no single value", place=place, remedy="return the last call's result")
    matcher = _Matcher(calls, {use.node: use for use in program.uses if use.call})
    matches = (next(matcher.match(result, node, {}), None) for node in program.graph.nodes)
    return [{k: v for k, v in bound.items() if isinstance(v, Weight)} for bound in matches if bound is not None]


def _trace(pattern: Callable[..., Any], place: str) -> tuple[fx.Graph, dict[fx.Node, Call]]:
    """The pattern's graph, and its matmuls with a weight."""
    try:
        with in_turn():  # it patches torch
            graph = fx.Tracer().trace(pattern)
    except Exception as error:
        raise RuleError(
            f"the pattern cannot be traced: {error}",
            place=place,
            remedy="write a function of tensors that only makes torch calls: lambda x, w: F.relu(F.linear(x, w))",
        ) from error
    calls: dict[fx.Node, Call] = {}
    for node in graph.nodes:
        readings = [call for n in reversed(operands(node)) if (call := _reading(node, n))]
        known = [call for call in readings if any(call.weight is c.weight for c in calls.values())]
        if readings and (known or readings[0].weight.op == "placeholder"):
            calls[node] = (known or readings)[0]
    if not calls:
        taken = ", ".join(inspect.signature(pattern).parameters)
        raise RuleError(
            f"none of its arguments ({taken}) is the weight of a matmul",
            place=place,
            remedy="pass the weights as arguments and multiply with them: lambda x, w: F.linear(x, w)",
        )
    return graph, calls


def _reading(node: fx.Node, weight: fx.Node) -> Call | None:
    """The matmul that a node of a pattern is if this operand is the weight; how many axes it has, nobody says."""
    name = _name(node)
    if name not in FORMS or FORMS[name].looks_up:
        return None
    for axes in range(2, 6):
        call = find(name, node.args, node.kwargs, {weight: axes}.get)
        if call is not None:
            return call
    return None


def _name(node: fx.Node) -> str:
    if node.op not in ("call_function", "call_method"):
        return ""
    name = op_name(node.target)
    return name if name in FORMS else name.removesuffix("_").strip("_")


def _factors(node: fx.Node) -> list[fx.Node]:
    """Its operands; of a matmul without the bias."""
    name, nodes = _name(node), operands(node)
    if name in ("addmm", "baddbmm"):
        return nodes[1:3]
    return nodes[:2] if name in FORMS and not FORMS[name].looks_up else nodes


def _skip(node: Any) -> Any:
    while isinstance(node, fx.Node) and _name(node) in _PASS and (read := operands(node)):
        node = read[0]
    return node


@dataclass(frozen=True)
class _Matcher:
    """Every method yields each way to read `have` as `want`, with the arguments that it binds."""

    calls: Mapping[fx.Node, Call]  # the pattern's matmuls
    uses: Mapping[fx.Node, Use]  # the program's

    def match(self, want: fx.Node, have: Any, bound: dict[str, Any]) -> Iterator[dict[str, Any]]:
        want, have = _skip(want), _skip(have)
        if want.op == "placeholder":
            yield from _bind(want, have, bound)
        elif want in self.calls:
            yield from self._matmul(self.calls[want], have, bound)
        elif isinstance(have, fx.Node) and _name(want) == _name(have):
            ours, theirs = _factors(want), _factors(have)
            for order in itertools.permutations(theirs) if _name(want) in _COMMUTE else [theirs]:
                if len(order) >= len(ours):
                    yield from self._all(ours, order, bound)

    def _matmul(self, call: Call, have: Any, bound: dict[str, Any]) -> Iterator[dict[str, Any]]:
        use = self.uses.get(have)
        if use is None or not isinstance(call.x, fx.Node):
            return
        for now in _bind(call.weight, use.weight, bound):
            yield from self.match(call.x, use.x, now)

    def _all(self, want: Sequence[fx.Node], have: Sequence[Any], bound: dict[str, Any]) -> Iterator[dict[str, Any]]:
        if not want:
            yield bound
            return
        for first in self.match(want[0], have[0], bound):
            yield from self._all(want[1:], have[1:], first)


def _bind(argument: fx.Node, value: Any, bound: dict[str, Any]) -> Iterator[dict[str, Any]]:
    name = str(argument.target)
    if bound.get(name, value) is value:
        yield {**bound, name: value}
