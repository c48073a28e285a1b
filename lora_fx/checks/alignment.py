"""The recorded program of an adapted model, held against that of the model itself node for node.

    itself     …  u = use(x, W)                       c = next(u)    …
    adapted    …  [ u' = use(x', W)  …  end ]         c' = next(end) …

Both ran in one order. So what computes with activations comes in one order too, and between stands what adapters add:
for each use a run of nodes, its region, of which the last one is read behind it. How long a region is is found by what
comes behind: the shortest one with which all of the rest fits. Of what is in it nothing is taken for granted, but that
it computes with what the use computes with, and with θ of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from lora_fx.checks.flow import Flow
from lora_fx.deltas.adapter import Adapter
from lora_fx.graph.nodes import base_name, first_operand


@dataclass(frozen=True, eq=False)
class Region:
    """What an adapted model does in the place of one node."""

    node: fx.Node
    """Of the model itself."""
    nodes: tuple[fx.Node, ...]
    """Of the adapted one, in order: those that compute with activations. It may be none."""
    end: fx.Node
    """What is read in its place."""
    behind: fx.Node
    """What runs when all of it has run."""


@dataclass(frozen=True, eq=False)
class Alignment:
    """Two programs that are the same but for their regions."""

    regions: tuple[Region, ...]
    nodes: Mapping[fx.Node, fx.Node]
    """Inputs, and what is computed with activations, of the model itself, as it is read → of the adapted one."""
    same: Callable[[fx.Node, fx.Node], bool]
    """Whether a node of the model itself and one of the adapted one are one op on the same operands."""


def align(itself: Flow, adapted: Flow, replaced: Mapping[fx.Node, Collection[Adapter]]) -> Alignment | None:
    """Which node is which; None where the two are not the same program elsewhere.

    Args:
        replaced: each node of the model itself in whose place a region may stand → the adapters that act there.
    """
    return _Walk(itself, adapted, replaced).alignment()


#: steps that the walk may take for each node, before it gives up: one and a few for those it comes back to
_PATIENCE = 32


@dataclass(frozen=True)
class _Choice:
    """A region whose end is open."""

    at: int
    start: int
    ends: Iterator[int]
    known: int
    """How many nodes were known before it."""


class _Walk:
    def __init__(self, itself: Flow, adapted: Flow, replaced: Mapping[fx.Node, Collection[Adapter]]) -> None:
        self.itself, self.adapted, self.replaced = itself, adapted, replaced
        self.steps, self.others = _steps(itself), _steps(adapted)
        self.output = next(iter(adapted.captured.graph.find_nodes(op="output")))
        self.found: dict[fx.Node, fx.Node] = {}
        self.given = _inputs(itself), _inputs(adapted)

    def alignment(self) -> Alignment | None:
        i = j = 0
        open_ones, chosen = list[_Choice](), dict[int, tuple[int, int]]()
        for _ in range(_PATIENCE * (len(self.others) + 1)):
            if i == len(self.steps):
                if j == len(self.others) and self._same_outputs():
                    regions = tuple(self._region(k, *span) for k, span in chosen.items())
                    return Alignment(regions, dict(zip(*self.given, strict=True)) | self.found, self._same)
            elif self.steps[i] in self.replaced:
                open_ones.append(_Choice(i, j, self._ends(i, j), len(self.found)))
            elif j < len(self.others) and self._same(self.steps[i], self.others[j]):
                self.found[self.steps[i]] = self.others[j]
                i, j = i + 1, j + 1
                continue
            while open_ones:  # the next end of the last region that has one
                choice = open_ones[-1]
                for node in list(self.found)[choice.known :]:
                    del self.found[node]
                chosen = {k: span for k, span in chosen.items() if k < choice.at}
                if (j := next(choice.ends, -1)) >= 0:
                    chosen[choice.at], i = (choice.start, j), choice.at + 1
                    self.found[self.steps[choice.at]] = self._end(self.steps[choice.at], choice.start, j)
                    break
                open_ones.pop()
            else:
                return None
        return None

    def _region(self, at: int, start: int, stop: int) -> Region:
        node = self.steps[at]
        behind = self.others[stop] if stop < len(self.others) else self.output
        return Region(node, tuple(self.others[start:stop]), self.found[node], behind)

    def _end(self, node: fx.Node, start: int, stop: int) -> fx.Node:
        """Of an empty region, what its first operand is."""
        return self.others[stop - 1] if stop > start else self.found[seen(node.args[0])]  # type: ignore[arg-type]

    def _ends(self, at: int, start: int) -> Iterator[int]:
        """Where the region of a node that begins here may end, the nearest first: the weights that the node reads are
        read in it, no other activations than the node's, and no θ of other places."""
        node = self.steps[at]
        if self._may_be_empty(node):
            yield start
        most = len(self.others) - sum(not self._may_be_empty(node) for node in self.steps[at + 1 :])
        theta = {id(adapter.owner(tensor)) for adapter in self.replaced[node] for tensor in adapter.tensors}
        unread, known = self._weights(self.itself, node), self._operands(node)
        for stop in range(start + 1, most + 1):
            own = self.others[stop - 1]
            if not (set(map(seen, own.all_input_nodes)) - self.adapted.pure <= known and self._theta(own) <= theta):
                return
            unread -= self._weights(self.adapted, own)
            if not unread:
                yield stop
            known.add(own)

    def _operands(self, node: fx.Node) -> set[fx.Node]:
        """What a node of the model itself computes with, but for weights, in the adapted program."""
        images = dict(zip(*self.given, strict=True)) | self.found
        return {images[own] for n in node.all_input_nodes if (own := seen(n)) in images}

    def _may_be_empty(self, node: fx.Node) -> bool:
        """A mark of a place, and no op."""
        return node in self.replaced and not self._weights(self.itself, node)

    def _weights(self, flow: Flow, node: fx.Node) -> set[int]:
        """The ids of the adapted weights that a node reads."""
        return set().union(*(_adapted(flow, root) for n in node.all_input_nodes for root in flow.carriers.get(n, ())))

    def _theta(self, node: fx.Node) -> frozenset[int]:
        """The ids of the adapters whose θ a node of the adapted program reads."""
        flow, inputs = self.adapted, node.all_input_nodes
        return frozenset().union(*(made.get(n, ()) for n in inputs for made in (flow.factors, flow.mixed)))

    def _same_outputs(self) -> bool:
        (own,) = self.itself.captured.graph.find_nodes(op="output")
        return self._alike(own.args, self.output.args)

    def _same(self, node: fx.Node, other: fx.Node) -> bool:
        """One op on the same operands."""
        return node.target == other.target and self._alike((node.args, node.kwargs), (other.args, other.kwargs))

    def _alike(self, own: Any, other: Any) -> bool:
        if isinstance(own, fx.Node):
            return isinstance(other, fx.Node) and self._is(seen(own), seen(other))
        if isinstance(own, list | tuple):
            return isinstance(other, list | tuple) and len(own) == len(other) and all(map(self._alike, own, other))
        if isinstance(own, dict):
            return own.keys() == other.keys() and all(self._alike(own[key], other[key]) for key in own)
        if isinstance(own, slice):
            parts = (own.start, own.stop, own.step)
            return isinstance(other, slice) and self._alike(parts, (other.start, other.stop, other.step))
        return type(own) is type(other) and (own == other or (own != own and other != other))

    def _is(self, node: fx.Node, other: fx.Node) -> bool:
        if node in self.found:
            return self.found[node] is other
        if node.op != "call_function":
            return self._same_tensor(node, other)
        return node in self.itself.pure and other.op == "call_function" and self._same(node, other)

    def _same_tensor(self, node: fx.Node, other: fx.Node) -> bool:
        """One parameter or buffer, a constant of the same numbers, or one input."""
        own, its = self.itself.captured.tensors.get(node), self.adapted.captured.tensors.get(other)
        if own is None or its is None:
            return own is its and (node, other) in zip(*self.given, strict=True)
        if own is its or _adapted(self.itself, node) & _adapted(self.adapted, other):
            return True
        constants = node.op == other.op == "get_attr"
        return constants and own.dtype == its.dtype and own.device == its.device and torch.equal(own, its)


def _steps(flow: Flow) -> list[fx.Node]:
    """What is computed with activations; what follows from the model's tensors alone stands at its readers."""
    return [n for n in flow.captured.graph.nodes if n.op == "call_function" and n not in flow.pure and seen(n) is n]


def seen(node: fx.Node) -> fx.Node:
    """Itself; of a cast to what it is already, which gives back its operand, that: all later code reads the cast."""
    while node.op == "call_function" and base_name(node) == "to" and (own := first_operand(node)) is not None:
        value, was = node.meta.get("val"), own.meta.get("val")
        copies = any(a is True for a in (*node.args, node.kwargs.get("copy")))
        if not isinstance(value, torch.Tensor) or not isinstance(was, torch.Tensor) or copies:
            break
        if (value.dtype, value.device, value.shape, value.stride()) != (was.dtype, was.device, was.shape, was.stride()):
            break
        node = own
    return node


def _adapted(flow: Flow, root: fx.Node) -> set[int]:
    return {id(storage) for storage in flow.storages.get(root, ())}


def _inputs(flow: Flow) -> list[fx.Node]:
    return [n for n in flow.captured.graph.find_nodes(op="placeholder") if n not in flow.captured.tensors]
