"""Where a recorded program reads adapted weights: what carries them, who consumes them, where their branches end."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from heapq import heappop, heappush
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from lora_fx.graph.capture import (
    MODULE,
    Capture,
    Inputs,
)
from lora_fx.graph.forms import DENSE_OPS, FORMS, Call, find, op_name
from lora_fx.graph.nodes import base_name, first_operand, looked_into, shape_of, written_by
from lora_fx.graph.program import storage_key
from lora_fx.graph.views import COPIES, MOVES
from lora_fx.model.inventory import Storage


@dataclass(eq=False)
class Reading:
    """A node that consumes weights, and the node at which its branches have been added."""

    node: fx.Node
    acting: dict[fx.Node, Storage | None]
    """The placeholder of each weight that it consumes → the storage as it is read here; None where it was split off."""
    end: fx.Node
    dense: bool
    """It is handed the sum W + δ."""
    bypass: str
    """Who reads the node's output before the branch is added."""
    between: tuple[fx.Node, ...] = ()
    """What a lowered program does to the node's output before it adds the branch: views, and a plain bias."""

    @property
    def module(self) -> str:
        return self.node.meta.get(MODULE, "")

    @property
    def form(self) -> str:
        name = op_name(self.node.target)
        return FORMS[name].name if name in FORMS else name


class Flow:
    """One walk over a captured graph: which nodes carry an adapted weight, or factors, and who consumes the weights."""

    def __init__(
        self, captured: Capture, storages: Sequence[Storage], paths: Mapping[nn.Module, tuple[str, ...]]
    ) -> None:
        self.captured, self.paths = captured, paths
        self.storages: dict[fx.Node, list[Storage]] = {}
        self.carriers: dict[fx.Node, tuple[fx.Node, ...]] = {}
        """node → the placeholders of the weights that it is a view or a function of."""
        self.sums: dict[fx.Node, frozenset[int]] = {}
        """W + Σ δ → the ids of the adapters."""
        self.factors: dict[fx.Node, frozenset[int]] = {}
        """node made of θ alone → the ids of their adapters."""
        self.mixed: dict[fx.Node, frozenset[int]] = {}
        """node made of weights and θ alone, as δ(W, θ) is → the ids of the adapters."""
        self.pure: set[fx.Node] = set(captured.tensors)
        self._order = {node: k for k, node in enumerate(captured.graph.nodes)}
        self._inside: dict[Reading, frozenset[fx.Node]] = {}
        self._find_roots(storages)
        consumers = [n for n in captured.graph.nodes if n.op == "call_function" and self._consumes(n)]
        self.readings = [self._reading(node) for node in consumers]

    @property
    def unmeasured(self) -> bool:
        """A weight decides something, or is an output, without a use: `if W.norm() > 1`, `return y, W.norm()`."""
        users = (user for node in self.carriers for user in node.users)
        return any(user.op == "output" or not _is_tensors(user.meta.get("val")) for user in users)

    def counts(self) -> Counter[Storage]:
        """weight → how many nodes consume it."""
        acting = (storage for reading in self.readings for storage in reading.acting.values())
        return Counter(storage for storage in acting if storage is not None)

    def arguments(self, inputs: Inputs | None = None) -> list[torch.Tensor]:
        """What the captured graph takes: the model's tensors as they are now, and the inputs, or others like them."""
        captured, inputs = self.captured, inputs or self.captured.inputs
        leaves = pytree.tree_leaves((inputs.args, inputs.kwargs))
        state = [captured.tensors[n] for n in captured.graph.nodes if n.op == "placeholder" and n in captured.tensors]
        return [*state, *(leaf for leaf in leaves if isinstance(leaf, torch.Tensor))]

    def inside(self, reading: Reading) -> frozenset[fx.Node]:
        """The nodes from a use to the end of its branches: what is made of it or of weights and factors, and not of
        what made its other operands."""
        if reading not in self._inside:
            self._inside[reading] = self._found_inside(reading)
        return self._inside[reading]

    def _found_inside(self, reading: Reading) -> frozenset[fx.Node]:
        before = _Made(self._order, (n for n in reading.node.all_input_nodes if n not in self.carriers))
        found: dict[fx.Node, bool] = {reading.node: True}

        def is_inside(node: fx.Node) -> bool:
            if node not in found:
                found[node] = False
                alone = node in self.factors or node in self.carriers or node in self.mixed
                if alone or (node.all_input_nodes and node not in before):
                    inputs = list(map(is_inside, node.all_input_nodes))  # all of them: each is noted
                    found[node] = alone or any(inputs)
            return found[node]

        for node in (reading.end, *(n for n in reading.node.all_input_nodes if n in self.carriers)):
            is_inside(node)
        return frozenset(node for node, within in found.items() if within)

    def by_rows(self, reading: Reading) -> Call | None:
        """alpha·x·Wᵀ of one weight, as it is, whose branches of low rank stand beside it: they are the same for every
        W. None for any other use."""
        (root, storage), *others = reading.acting.items()
        if others or reading.between or storage is None or not all(a.kind.low_rank for a in storage.adapters):
            return None
        if not all(n in (root, reading.node) or n not in self.carriers for n in self.inside(reading)):
            return None
        node = reading.node
        found = find(node.target, node.args, node.kwargs, lambda n: len(shape_of(n)) if n is root else None)
        if found is None or not found.form.by_rows or found.out_dims != (-1,):
            return None
        return found if found.sides == storage.adapters[0].layout.sides and len(found.sides) == 2 else None

    def around(self, reading: Reading) -> frozenset[fx.Node]:
        """What those nodes are computed from."""
        inside = self.inside(reading)
        return frozenset(n for node in inside for n in node.all_input_nodes if n not in inside)

    def _find_roots(self, storages: Sequence[Storage]) -> None:
        weights: dict[tuple, list[Storage]] = {}
        factors: dict[tuple, int] = {}
        for storage in storages:
            weights.setdefault(storage_key(storage.parameter), []).append(storage)
            for adapter in storage.adapters:
                factors.update((storage_key(t), id(adapter)) for t in adapter.parameters())
        for node, tensor in self.captured.tensors.items():
            key = storage_key(tensor)
            if key in weights:
                self.storages[node], self.carriers[node] = weights[key], (node,)
            elif key in factors:
                self.factors[node] = frozenset([factors[key]])

    def _consumes(self, node: fx.Node) -> bool:
        """Whether the node makes an activation from a weight; notes what it carries where it does not."""
        inputs = node.all_input_nodes
        pure = all(n in self.pure for n in inputs)
        carried = [n for n in inputs if n in self.carriers]
        made_of = [own for n in inputs if (own := self.factors.get(n) or self.mixed.get(n))]
        used = pure and bool(carried) and self._multiplies(node)
        if pure and not used:
            self.pure.add(node)
        else:
            self._write(node)
        if used:
            return True
        if not carried:
            if made_of and (pure or _moves(node, self.factors)):
                self.factors[node] = frozenset().union(*made_of)
            return False
        if pure and (branches := self._branches_of_others(node)):
            self.factors[node] = branches
            return False
        if pure and made_of:
            self.mixed[node] = frozenset().union(*made_of)
            plain = any(n not in self.mixed for n in carried)  # W + δ; where neither is W, two sums are added
            if plain and _is_add(node) and any(shape_of(node) == shape_of(root) for root in self._roots(node)):
                self.sums[node] = self.mixed[node]
        elif not (pure or _moves(node, self.carriers)):
            return True
        self.carriers[node] = self._roots(node)
        return False

    def _branches_of_others(self, node: fx.Node) -> frozenset[int]:
        """The adapters whose factors it multiplies with a weight, where those adapt another: the branch of that one."""
        made = (self.factors[n] for n in node.all_input_nodes if n in self.factors and n not in self.carriers)
        own = {id(a) for root in self._roots(node) for storage in self.storages[root] for a in storage.adapters}
        found = frozenset[int]().union(*made)
        return found if own.isdisjoint(found) else frozenset()

    def _multiplies(self, node: fx.Node) -> bool:
        """A product of a weight, or of W + Σ δ, with a constant or with another one: a use that no input reaches."""
        name = base_name(node)
        if not (name in FORMS or name in DENSE_OPS or name.startswith("conv")):
            return False  # else a part of δ(W, θ) may multiply with factors
        inside = [n for n in node.all_input_nodes if n in self.factors or (n in self.mixed and not self._summed(n))]
        return not inside

    def _write(self, node: fx.Node) -> None:
        """What an activation is written into began as a constant, and is one no longer."""
        for target in written_by(node):
            below: fx.Node | None = target
            while below is not None:
                self.pure.discard(below)
                below = looked_into(below)

    def _roots(self, node: fx.Node) -> tuple[fx.Node, ...]:
        return tuple(dict.fromkeys(root for n in node.all_input_nodes for root in self.carriers.get(n, ())))

    def _reading(self, node: fx.Node) -> Reading:
        roots = self._roots(node)
        carried = [n for n in node.all_input_nodes if n in self.carriers]
        summed = [self._summed(n) for n in carried]
        end, added, bypass, between = self._end(node, roots)
        acting = {root: self._acting(node, root, added.union(*summed)) for root in roots}
        return Reading(node, acting, end, all(summed), bypass, between)

    def _acting(self, node: fx.Node, root: fx.Node, adapters: frozenset[int]) -> Storage | None:
        """Adapters: the ids of those whose branches, or sums, were found here."""
        storages, module = self.storages[root], node.meta.get(MODULE, "")
        if not storages[0].split:
            return storages[0]
        for storage in storages:
            inside = any(module in self.paths[owner] for owner, _ in storage.owners)
            if inside or adapters & {id(a) for a in storage.adapters}:
                return storage
        return None

    def _summed(self, node: fx.Node) -> frozenset[int]:
        """The adapters whose delta has been added to this weight."""
        return self.sums.get(node, frozenset()).union(
            *(self._summed(n) for n in node.all_input_nodes if n in self.carriers)
        )

    def _end(
        self, node: fx.Node, roots: tuple[fx.Node, ...]
    ) -> tuple[fx.Node, frozenset[int], str, tuple[fx.Node, ...]]:
        """The last of the adds that put branches of these weights onto the node's output, whose branches, who reads it
        before that, and what stands between."""
        own = frozenset(id(a) for root in roots for storage in self.storages[root] for a in storage.adapters)
        added: frozenset[int] = frozenset()
        end, between, passed = node, list[fx.Node](), list[fx.Node]()
        while True:
            adds = [(u, made) for u in node.users if _is_add(u) and (made := self._branch(u, node) & own)]
            if adds:
                (end, made), added = adds[0], added | adds[0][1]
                between, passed = between + passed, []
                if others := [u for u in node.users if u is not end]:
                    bypass = f"{others[0].name} in {others[0].meta.get(MODULE, '') or 'the model'}"
                    return end, added, bypass, tuple(between)
                node = end
            elif self.captured.lowered and (step := self._step(node)) is not None:
                passed.append(step)
                node = step
            else:
                return end, added, "", tuple(between)

    def _step(self, node: fx.Node) -> fx.Node | None:
        """The one user of a node, where it moves what the node gives, or adds a plain tensor of the model."""
        if len(node.users) != 1:
            return None
        (user,) = node.users
        moves = first_operand(user) is node and (base_name(user) in MOVES or base_name(user) in COPIES)
        others = [n for n in user.all_input_nodes if n is not node]
        plain = all(n in self.captured.tensors and n not in self.carriers and n not in self.factors for n in others)
        return user if (moves and not others) or (_is_add(user) and plain) else None

    def _branch(self, add: fx.Node, node: fx.Node) -> frozenset[int]:
        """The adapters of the branch that is added to `node`."""
        return frozenset().union(*(self._made_by(n) for n in add.all_input_nodes if n is not node))

    def _made_by(self, node: fx.Node) -> frozenset[int]:
        """The adapters with whose factors it multiplies, or whose product it moves or scales."""
        if _is_add(node) and node not in self.factors:
            return frozenset()  # a use with its branch, on a constant
        inputs = node.all_input_nodes
        made = frozenset().union(*(self.factors.get(n, frozenset()) for n in inputs))
        return self._made_by(inputs[0]) if not made and len(inputs) == 1 else made


class _Made:
    """Nodes, and whatever they are made of: found from the last one back, no further than to what is asked for, which
    stands close to them."""

    def __init__(self, order: Mapping[fx.Node, int], nodes: Iterable[fx.Node]) -> None:
        self.order, self.known = order, set[fx.Node]()
        self.waiting: list[tuple[int, fx.Node]] = []
        self._note(nodes)

    def __contains__(self, node: fx.Node) -> bool:
        while self.waiting and -self.waiting[0][0] > self.order[node]:
            self._note(heappop(self.waiting)[1].all_input_nodes)
        return node in self.known

    def _note(self, nodes: Iterable[fx.Node]) -> None:
        for node in nodes:
            if node not in self.known:
                self.known.add(node)
                heappush(self.waiting, (-self.order[node], node))


def _is_tensors(value: Any) -> bool:
    return all(isinstance(leaf, torch.Tensor) for leaf in pytree.tree_leaves(value))


def _is_add(node: fx.Node) -> bool:
    return op_name(node.target) in ("add", "add_", "__add__", "__iadd__")


def _moves(node: fx.Node, carriers: Mapping[fx.Node, Any]) -> bool:
    """A movement op, or a gather of whole experts, of a carrier."""
    first, name = node.args[0] if node.args else None, op_name(node.target)
    if not isinstance(first, fx.Node) or first not in carriers:
        return False
    if name in ("index", "index_select"):
        return first.meta["val"].ndim >= 3
    return name in MOVES or name in COPIES
