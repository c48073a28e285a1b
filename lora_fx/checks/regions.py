"""Every rewrite in the recorded program of an adapted model, held against what its paper says, in float64.

    rewritten use      nodes(x, y)     against     rewritten(use, x)        y = use(x), which the recorded op gives
    behind a block     nodes(h, ids)   against     put_behind(h, ids)

What ran between a use and its readers (`lora_fx.checks.alignment`) is computed once more, on what has reached it, the
casts in it left out. Each id that is new is looked up there, among words, whichever the example inputs have.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import fx, nn

from lora_fx.changes import safe_point
from lora_fx.checks.alignment import Alignment, Region, align, seen
from lora_fx.checks.definitions import Shaken, as_it_is, put_behind, rewritten
from lora_fx.checks.flow import Flow, Reading
from lora_fx.checks.oracles import delta
from lora_fx.checks.uses import Coverage, names_of, run_apart, widened
from lora_fx.checks.verification import Draws, as_real, compare_all, dither, relative_error
from lora_fx.deltas.adapter import Adapter
from lora_fx.errors import CaptureError
from lora_fx.graph.capture import Inputs, capture_graph
from lora_fx.graph.forms import Call, find
from lora_fx.graph.nodes import shape_of
from lora_fx.graph.own_state import undisturbed
from lora_fx.model.inventory import Storage

_NOTHING = "nothing to measure: on these inputs its output does not depend on the adapters"


@dataclass(frozen=True)
class Mark:
    """A place behind a block where an adapter stands."""

    storage: Storage
    """The table whose adapter it is."""
    adapter: Adapter
    tensor: str
    block: str
    """Its path."""


@dataclass(frozen=True)
class Measured:
    """What was seen of an adapted program."""

    rows: tuple[Coverage, ...]
    outputs: list[torch.Tensor]
    """What it gave while it was recorded, with the random draws of `run`."""
    moved: list[torch.Tensor]
    """The same where what rewrites give is rounded once more."""


def rewrites(storage: Storage) -> list[Adapter]:
    """The adapters of a weight that rewrite its uses, in the order in which they stand around them."""
    own = [adapter for adapter in storage.adapters if not adapter.kind.is_delta]
    return sorted(own, key=lambda adapter: adapter.kind.behind is None)  # that hides new ids from the table


def call_of(flow: Flow, node: fx.Node) -> Call | None:
    return find(node.target, node.args, dict(node.kwargs), lambda n: len(shape_of(n)) if n in flow.carriers else None)


def measured(model: nn.Module, itself: Flow, marks: Mapping[fx.Node, Mark], given: Inputs) -> Measured | None:
    """A row for each rewrite, of the model in the mode it is in. None where its recorded program is not that of the
    model itself but for what adapters add, or takes no float64.

    Args:
        itself: of the model without its adapters, with all weights that have some.
        marks: where it is marked.
        given: inputs, with new ids among them.
    """
    storages = [storage for own in itself.storages.values() for storage in own]
    try:
        with undisturbed(model):
            torch.manual_seed(0)
            captured = capture_graph(model, given, as_is=True)
    except CaptureError:
        return None
    adapted = Flow(captured, storages, itself.paths)
    used = {r.node: [a for s in r.acting.values() if s is not None for a in s.adapters] for r in itself.readings}
    acting = {node: own for node, own in used.items() if own} | {node: [own.adapter] for node, own in marks.items()}
    aligned = None if captured.transformed else align(itself, adapted, acting)
    if aligned is None:
        return None
    replay = _Replay(itself, adapted, aligned, marks)
    try:
        with undisturbed(model), torch.no_grad():
            torch.manual_seed(0)
            moved = replay.run(*adapted.arguments(given))
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception:  # of any kernel
        return None
    return Measured(tuple(replay.rows), [as_real(t) for t in captured.outputs], [as_real(t) for t in moved])


class _Replay(fx.Interpreter):
    """Runs the recorded program of the adapted model, and measures each region where it begins."""

    def __init__(self, itself: Flow, adapted: Flow, aligned: Alignment, marks: Mapping[fx.Node, Mark]) -> None:
        super().__init__(adapted.captured.module)
        self.rows, self._draws = list[Coverage](), Draws(0)
        self._before, self._after = defaultdict[fx.Node, list[Any]](list), defaultdict[fx.Node, list[Any]](list)
        readings = {reading.node: reading for reading in itself.readings}
        kept, self._ends = set[fx.Node](), set[fx.Node]()
        for region in aligned.regions:
            place: _Behind | _Around
            if region.node in marks:
                place = _Behind(itself, adapted, aligned, region, marks[region.node])
                self._before[(*region.nodes, region.behind)[0]].append(place)
            else:
                place = _Around(itself, adapted, aligned, region, readings[region.node])
                if not place.storages:
                    continue
                self._after[place.use].append(place)
            self._ends.add(region.end)
            kept.update(place.kept)
        for last, freed in self.user_to_last_uses.items():
            self.user_to_last_uses[last] = [node for node in freed if node not in kept]

    def run_node(self, node: fx.Node) -> Any:
        safe_point()
        for place in self._before[node]:
            self.rows += place.rows(self.env, None)
        result = super().run_node(node)
        for place in self._after[node]:
            self.rows += place.rows(self.env, result)
        if node in self._ends:
            step = torch.finfo(result.dtype).eps / 2
            return (result * dither(result, step, self._draws)).to(result.dtype)
        return result


@dataclass(frozen=True, eq=False)
class _Place:
    """Where a rewrite stands, in both programs."""

    itself: Flow
    adapted: Flow
    aligned: Alignment
    region: Region

    def recorded(self, env: Mapping[fx.Node, Any], given: Mapping[fx.Node, Any]) -> torch.Tensor:
        """What its nodes make, in float64, with these values in the places of the nodes' own."""
        made, tensors, inside = dict(given), self.adapted.captured.tensors, frozenset(self.region.nodes)

        def value(node: fx.Node) -> Any:
            node = seen(node)
            if node not in made:
                if node in tensors:
                    made[node] = widened(tensors[node].detach())
                elif node in inside or node in self.adapted.pure:
                    made[node] = self._run(node, value)
                else:
                    made[node] = widened(env[node])
            return made[node]

        return value(self.region.end).to(torch.float64)

    def _run(self, node: fx.Node, value: Callable[[fx.Node], Any]) -> Any:
        return run_apart(node, value)

    def _judged(
        self, actual: list[torch.Tensor], exact: list[torch.Tensor], moved: list[torch.Tensor], effect: float
    ) -> dict[str, Any]:
        report = compare_all(actual, exact, moved)
        problem = "" if report else "it is not what the kind says"
        if report and effect <= report.bound:
            problem = _NOTHING
        return {"effect": effect, "error": report.error, "bound": report.bound, "dtype": "float64", "problem": problem}


def _dithered(draws: Draws, terms: int) -> Shaken:
    """As much as a sum of so many products, each rounded, may move, in any order."""
    step = torch.finfo(torch.float64).eps / 2 * math.sqrt(terms)
    return lambda t: t * dither(t, step, draws)


@dataclass(frozen=True, eq=False)
class _Around(_Place):
    reading: Reading

    @cached_property
    def storages(self) -> list[Storage]:
        """The weights that it reads and that have rewrites."""
        return [storage for storage in self.reading.acting.values() if storage is not None and rewrites(storage)]

    @cached_property
    def call(self) -> Call:
        found = call_of(self.itself, self.reading.node)
        assert found is not None, "the plan has refused what is no product"
        return found

    @cached_property
    def use(self) -> fx.Node:
        """The op itself, in the region: the first node that reads the weight."""
        reads = {reading.node: reading for reading in self.adapted.readings}
        return next(n for n in self.region.nodes if n in reads and self.storages[0] in reads[n].acting.values())

    @cached_property
    def x(self) -> fx.Node | None:
        """Of the adapted program; None where it follows from the model's tensors alone."""
        return self.aligned.nodes.get(seen(self.call.x))

    @property
    def kept(self) -> list[fx.Node]:
        return [self.x] if self.x is not None and self.call.form.looks_up else []

    @cached_property
    def plain(self) -> bool:
        """The op is that of the model itself, on the same operands: no more of it than its y is needed."""
        return not self.sums and self.aligned.same(self.reading.node, self.use)

    @cached_property
    def sums(self) -> dict[fx.Node, Storage]:
        """The weights that it reads with deltas."""
        acting = self.reading.acting.items()
        return {root: s for root, s in acting if s is not None and any(a.kind.is_delta for a in s.adapters)}

    @cached_property
    def as_stored(self) -> bool:
        """A table of any dtype gives its rows as they are."""
        return self.call.form.looks_up and not self.sums

    def rows(self, env: Mapping[fx.Node, Any], y: Any) -> Iterator[Coverage]:
        x = self._given(env, self.call.x)
        for storage in self.storages:
            size, draws = storage.adapters[0].layout.size, Draws(0)
            shaken = _dithered(draws, max(size("i"), size("o")))
            own, actual, exact, moved, effect = rewrites(storage), [], [], [], 0.0
            counts = [count for a in own if (count := a.kind.new_ids(a.settings))]
            for given in drawn_ids(x, size("i"), min(counts)) if counts and self.x is not None else [x]:
                at = {} if self.x is None else {self.x: widened(given)}
                if self.plain:
                    at[self.use] = widened(y)
                use = partial(self._use, env, widened(y) if self.plain and given is x else None)
                actual.append(self.recorded(env, at))
                exact.append(_all(own, use, given, as_it_is))
                moved.append(_all(own, partial(use, shaken=shaken), given, shaken))
                without = use(given.clamp(max=size("i") - 1) if counts else given)
                effect = max(effect, relative_error(without, exact[-1], exact[-1]))
            place = self.reading.module, self.reading.form, storage.adapters[0].realised
            yield Coverage(
                names_of(storage), tuple(a.name for a in own), *place, **self._judged(actual, exact, moved, effect)
            )

    def _run(self, node: fx.Node, value: Callable[[fx.Node], Any]) -> Any:
        if node is not self.use or not self.as_stored:
            return super()._run(node, value)
        table = self.adapted.captured.tensors
        return widened(run_apart(node, lambda n: table[seen(n)].detach() if seen(n) in table else value(n), wide=False))

    def _use(self, env: Mapping[fx.Node, Any], y: Any, x: Any, shaken: Shaken = as_it_is) -> torch.Tensor:
        """The op of the model itself, with its deltas, in float64.

        Args:
            y: what it gives, where that is known.
        """
        if y is not None:
            return shaken(y)
        wide = not self.as_stored
        made = {seen(self.call.x): shaken(widened(x)) if wide and x.is_floating_point() else x}
        for root, storage in self.sums.items():
            weight = storage.weight.detach().to(torch.float64)
            made[root] = weight + delta(weight, *storage.adapters).to(weight.device)

        def value(node: fx.Node) -> Any:
            node = seen(node)
            if node not in made:
                made[node] = self._given(env, node, value, wide)
            return made[node]

        return run_apart(self.reading.node, value, wide).to(torch.float64)

    def _given(
        self,
        env: Mapping[fx.Node, Any],
        node: fx.Node,
        value: Callable[[fx.Node], Any] | None = None,
        wide: bool = False,
    ) -> Any:
        """An operand of the model itself, as it is in the adapted one."""
        node = seen(node)
        if node in self.aligned.nodes:
            own = env[self.aligned.nodes[node]]
        elif node in self.itself.captured.tensors:
            own = self.itself.captured.tensors[node].detach()
        else:
            return run_apart(node, value or partial(self._given, env), wide)
        return widened(own) if wide else own


def _all(adapters: list[Adapter], use: Callable[[Any], torch.Tensor], x: Any, shaken: Shaken) -> torch.Tensor:
    """The later ones around the earlier ones."""
    for adapter in adapters:
        use = partial(rewritten, adapter, use, shaken=shaken)
    return use(x)


@dataclass(frozen=True, eq=False)
class _Behind(_Place):
    mark: Mark

    @property
    def kept(self) -> list[fx.Node]:
        return [self.aligned.nodes[seen(n)] for n in self.region.node.args[:2]]  # type: ignore[index, arg-type]

    def rows(self, env: Mapping[fx.Node, Any], y: Any) -> Iterator[Coverage]:
        h_at, ids_at = self.kept
        adapter, tensor, h, draws = self.mark.adapter, self.mark.tensor, widened(env[h_at]), Draws(0)
        actual, exact, moved, effect = [], [], [], 0.0
        count = adapter.kind.new_ids(adapter.settings)
        for ids in drawn_ids(env[ids_at], adapter.layout.size("i"), count):
            actual.append(self.recorded(env, {h_at: h, ids_at: ids}))
            exact.append(put_behind(adapter, tensor, h, ids))
            shaken = _dithered(draws, 1)
            moved.append(put_behind(adapter, tensor, shaken(h), ids, shaken))
            effect = max(effect, relative_error(h, exact[-1], exact[-1]))
        numbers = self._judged(actual, exact, moved, effect)
        place = self.mark.block, f"behind it {tensor}", adapter.realised
        yield Coverage(names_of(self.mark.storage), (adapter.name,), *place, **numbers)


def drawn_ids(like: torch.Tensor, words: int, count: int) -> Iterator[torch.Tensor]:
    """Ids of this shape, so many that each new one is looked up; every other one is a word: last, first, any"""
    new = torch.arange(words, words + count, device=like.device)
    others = torch.randint(words, new.shape, generator=Draws(0).on(like.device), device=like.device)
    others[:1] = words - 1
    others[1:2] = 0
    both = torch.stack([new, others], -1).flatten()
    places = torch.arange(-(-len(both) // like.numel()) * like.numel(), device=like.device) % len(both)
    yield from both[places].to(like.dtype).reshape(-1, *like.shape)
