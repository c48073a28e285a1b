"""Every use of an adapted weight in a recorded program, held against the same op on W + δ, in float64."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from lora_fx.changes import safe_point
from lora_fx.checks.flow import Flow, Reading
from lora_fx.checks.oracles import delta, grouped_mm, moved_by
from lora_fx.checks.verification import (
    Draws,
    Report,
    as_real,
    compare_all,
    dither,
    relative_error,
)
from lora_fx.deltas.realisation import Realisation
from lora_fx.graph.forms import Call
from lora_fx.graph.nodes import base_name, call, is_float, written_by
from lora_fx.graph.own_state import undisturbed
from lora_fx.model.inventory import Storage


@dataclass(frozen=True)
class Coverage:
    """One use of one adapted weight."""

    weight: str
    """Its names where it is read with the branch, joined by ``=``."""
    adapters: tuple[str, ...]
    """The adapters that act on this use; none where it was split off and must stay as it was."""
    module: str
    """Path of the module whose forward executes the use; empty for the model itself."""
    form: str
    realised: Realisation
    effect: float = 0.0
    """How far the adapters move this use's output, relative to its root mean square."""
    error: float = 0.0
    """How far the output is from the use of the dense W + δ, relative likewise."""
    bound: float = 0.0
    """What rounding explains: see `lora_fx.verify`."""
    dtype: str = ""
    """In which it was measured: float64, or its own where an op of it takes no float64."""
    problem: str = ""
    """Why this use is not covered; empty where it is."""

    @property
    def covered(self) -> bool:
        return not self.problem


def not_as_often(storages: Sequence[Storage], base: Counter[Storage], adapted: Counter[Storage]) -> Iterator[Coverage]:
    """A row for each adapted weight that the base model does not read, or the adapted one another number of times."""
    for storage in storages:
        if not base[storage]:
            yield _row(storage, "", "", Realisation.UNSEEN, problem="the example inputs do not reach it")
        elif adapted[storage] != base[storage]:
            reason = f"the base model reads it {base[storage]} times, the adapted one {adapted[storage]} times"
            yield _row(storage, "", "", Realisation.MISSED, problem=reason)


def measured(model: nn.Module, flow: Flow) -> tuple[list[Coverage], list[torch.Tensor]]:
    """A row for each use, and what the recorded program gives, with the random draws of `run`."""
    with undisturbed(model), torch.no_grad():
        torch.manual_seed(0)
        replay = _Replay(flow)
        outputs = replay.run(*flow.arguments())
    return replay.rows, [as_real(t) for t in outputs]


def names_of(storage: Storage) -> str:
    return " = ".join(storage.names)


def _row(storage: Storage, *rest: Any, **more: Any) -> Coverage:
    return Coverage(names_of(storage), tuple(a.name for a in storage.adapters), *rest, **more)


_Computed = tuple[list[torch.Tensor], list[torch.Tensor], dict[fx.Node, list[torch.Tensor]], list[torch.Tensor]]


class _Replay(fx.Interpreter):
    """Runs a captured graph on its own inputs, and holds each use of an adapted weight against the dense sum."""

    def __init__(self, flow: Flow) -> None:
        super().__init__(flow.captured.module)
        self.flow = flow
        self.rows: list[Coverage] = []
        self._judges: dict[fx.Node, list[Callable[[list[torch.Tensor]], None]]] = defaultdict(list)
        self._readings = {reading.node: reading for reading in flow.readings}
        kept = {n for node in flow.carriers for n in node.all_input_nodes if n not in flow.carriers}
        kept.update(n for reading in flow.readings for n in flow.around(reading))
        for last, freed in self.user_to_last_uses.items():  # what a use or its branch is computed from once more
            self.user_to_last_uses[last] = [n for n in freed if n not in kept]

    def run_node(self, node: fx.Node) -> Any:
        safe_point()
        reading = self._readings.get(node)
        product = None if reading is None else self.flow.by_rows(reading)
        if reading is not None and product is None:
            self._compute_apart(reading, partial(self._computed, reading, wide=True))
        result = super().run_node(node)
        if reading is not None and product is not None:
            self._compute_apart(reading, partial(self._without_weight, reading, product, result))
        for judge in self._judges.pop(node, ()):
            judge(_floats(result))
        return result

    def _compute_apart(self, reading: Reading, computed: Callable[[], _Computed]) -> None:
        """The use with the dense sums, before the model runs it: it may write into its operands. In float64, and what
        was recorded in float64 too; where an op of it takes none, in its own dtype, which rounding blurs."""
        try:
            rows = self._judged(reading, *computed())
            if any(row.problem == _NOTHING for row in rows):  # it multiplies zeros: an empty cache, a first state
                drawn = self._judged(reading, *self._computed(reading, wide=True, drawn=True))  # with W, which is rare
                pairs = zip(rows, drawn, strict=True)
                rows = [own if row.problem == _NOTHING and not own.problem else row for row, own in pairs]
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except Exception:  # of any kernel
            whole, moved, without, _ = self._computed(reading, wide=False)
            self._judges[reading.end].append(
                lambda actual: self.rows.extend(self._judged(reading, whole, moved, without, actual))
            )
        else:
            self.rows += rows

    def _computed(self, reading: Reading, wide: bool, drawn: bool = False) -> _Computed:
        """The outputs with W + Σ δ, with that moved by as much as rounding may, and with the plain W for one of them;
        and, in float64, what the recorded nodes from the use to the end of its branches give.

        Args:
            drawn: with random numbers for the use's other operands, instead of those that have reached it.
        """
        plain = {root: self.flow.captured.tensors[root].detach() for root in reading.acting}
        if wide:
            plain = {root: weight.to(torch.float64) for root, weight in plain.items()}
        whole, moved = dict(plain), dict(plain)
        adapted = {root: storage for root, storage in reading.acting.items() if storage is not None}
        draws, shake = Draws(0), 0.0
        for root, storage in adapted.items():
            weight = plain[root]
            total = weight + delta(weight, *storage.adapters).to(weight.device)
            if wide:  # the sum of n products, each rounded, in any order
                terms = max(storage.adapters[0].layout.size(side) for side in "io")
                shake = max(shake, torch.finfo(torch.float64).eps / 2 * math.sqrt(terms))
            else:
                moved[root] = (total * dither(weight, torch.finfo(weight.dtype).eps / 2, draws)).to(weight.dtype)
            whole[root] = total.to(weight.dtype)
        use = _Use(self.flow, reading, self.env, wide)
        if drawn:
            use.draw(draws)
        without = {root: use.dense(whole | {root: plain[root]}) for root in adapted}
        shaken = use.dense(whole, shake, draws) if wide else use.dense(moved)
        return use.dense(whole), shaken, without, use.recorded(plain) if wide else []

    def _without_weight(self, reading: Reading, product: Call, plain: torch.Tensor) -> _Computed:
        """As `_computed`, where branches stand beside x·Wᵀ: on sums of all rows of x with random weights. Such sums are
        equal where each row is, and nothing of the size of W or δ has to be there in float64 (Freivalds 1977).

        Args:
            plain: what the model has made of W alone.
        """
        ((root, storage),) = reading.acting.items()
        assert storage is not None
        size, draws = storage.adapters[0].layout.size, Draws(0)
        use = _Use(self.flow, reading, self.env, True)
        x, y = use.given(product.x).reshape(-1, size("i")), plain.reshape(-1, size("o")).to(torch.float64)
        finite = x.isfinite().all(-1) & y.isfinite().all(-1)  # nothing is known of the others
        x, y = x[finite], y[finite]
        weights = torch.randn(_SUMS, len(x), generator=draws.on(x.device), device=x.device, dtype=torch.float64)
        shake = torch.finfo(torch.float64).eps / 2 * math.sqrt(max(size("i"), size("o")))
        both = torch.cat([weights @ x, weights @ (x * dither(x, shake, draws))])
        own, shaken = (moved_by(both, *storage.adapters) * product.options.get("alpha", 1)).chunk(2)
        (branches,) = use.recorded({reading.node: torch.zeros_like(plain, dtype=torch.float64)})
        without, branches = weights @ y, weights @ branches.reshape(-1, size("o"))[finite]
        return [without + own], [without + shaken], {root: [without]}, [without + branches]

    def _judged(
        self,
        reading: Reading,
        whole: list[torch.Tensor],
        moved: list[torch.Tensor],
        without: dict[fx.Node, list[torch.Tensor]],
        actual: list[torch.Tensor],
    ) -> list[Coverage]:
        """A row for each weight of a use: `without` is what it gives with the plain W for one of them."""
        rows = list[Coverage]()
        report = compare_all(actual, whole, moved)
        place = reading.module, reading.form
        for root, storage in reading.acting.items():
            if storage is None:
                name, numbers = names_of(self.flow.storages[root][0]), (0.0, report.error, report.bound)
                problem = "" if report else "it must read the plain weight, and does not"
                rows.append(
                    Coverage(name, (), *place, Realisation.SPLIT_OFF, *numbers, dtype=report.dtype, problem=problem)
                )
                continue
            pairs = zip(without[root], whole, strict=True)
            effect = max((relative_error(w, e, e) for w, e in pairs), default=0.0)
            realised = Realisation.DENSE if reading.dense else storage.adapters[0].realised
            numbers, problem = (effect, report.error, report.bound), _problem(reading, effect, report)
            rows.append(_row(storage, *place, realised, *numbers, dtype=report.dtype, problem=problem))
        return rows


@dataclass
class _Use:
    """One use of adapted weights, computed apart from the model, on the operands that have reached it there."""

    flow: Flow
    reading: Reading
    env: Mapping[fx.Node, Any]
    wide: bool
    """Computes in float64, and leaves out what casts to a narrower dtype."""
    drawn: dict[fx.Node, Any] = field(default_factory=dict)
    """Operands to compute on, in the place of those that have reached it."""

    def draw(self, draws: Draws) -> None:
        """Random numbers for all operands that are no weights of ours, no factors and no integers."""

        def normal(t: torch.Tensor) -> torch.Tensor:
            return (
                torch.randn(t.shape, generator=draws.on(t.device), dtype=t.dtype, device=t.device) if is_float(t) else t
            )

        for n in self.reading.node.all_input_nodes:
            if n not in self.flow.carriers and n not in self.flow.factors and is_float(value := self.given(n)):
                self.drawn[n] = pytree.tree_map_only(torch.Tensor, normal, value)

    def dense(
        self, weights: Mapping[fx.Node, torch.Tensor], shake: float = 0.0, draws: Draws | None = None
    ) -> list[torch.Tensor]:
        """The floating-point outputs with these weights in the place of the node's own, and without its branches.

        Args:
            shake: move each number of the other operands by this share of it.
        """
        made = dict[fx.Node, Any](weights)
        if draws is not None:
            for n in self.reading.node.all_input_nodes:
                if n not in self.flow.carriers and is_float(value := self.given(n)):
                    made[n] = pytree.tree_map(lambda t: t * dither(t, shake, draws), value)
        value = self._run(self.reading.node, partial(self._plain, made))
        for step in self.reading.between:
            value = self._run(step, partial(self._after, value))
        return [t.clone() for t in _floats(value)]

    def recorded(self, weights: Mapping[fx.Node, torch.Tensor]) -> list[torch.Tensor]:
        """The floating-point outputs of the nodes from the use to the end of its branches."""
        inside, made = self.flow.inside(self.reading), dict[fx.Node, Any](weights)

        def value(node: fx.Node) -> Any:
            if node not in made:
                known = node.op != "call_function" or (node in self.env and node not in inside)
                made[node] = self.given(node) if known else self._run(node, value)
            return made[node]

        return _floats(value(self.reading.end))

    def _plain(self, made: dict[fx.Node, Any], node: fx.Node) -> Any:
        """An operand with the weights of `made` in it; of a sum W + δ, W alone: they hold the sum."""
        if node in made:
            return made[node]
        if node not in self.flow.carriers:
            return self.given(node)
        if node in self.flow.sums:
            carried = [n for n in node.all_input_nodes if n in self.flow.carriers]
            return self._plain(made, next((n for n in carried if n not in self.flow.mixed), carried[0]))
        return self._run(node, partial(self._plain, made))

    def _after(self, value: Any, node: fx.Node) -> Any:
        """An operand of what stands between the use and its branch: `value`, or what the model has."""
        return self.given(node) if node in self.env or node in self.flow.captured.tensors else value

    def given(self, node: fx.Node) -> Any:
        """An operand, as it has reached the use."""
        if node in self.drawn:
            return self.drawn[node]
        value = tensor if (tensor := self.flow.captured.tensors.get(node)) is not None else self.env[node]
        return pytree.tree_map_only(torch.Tensor, widened, value) if self.wide else value

    def _run(self, node: fx.Node, value: Callable[[fx.Node], Any]) -> Any:
        return run_apart(node, value, self.wide)


def run_apart(node: fx.Node, value: Callable[[fx.Node], Any], wide: bool = True) -> Any:
    """One op, apart from the model; what it writes is a copy, since the model itself has yet to write there.

    Args:
        value: its operands.
        wide: in float64, with what asks for a narrower dtype left out.
    """
    if wide and base_name(node) == "view" and any(isinstance(a, torch.dtype) for a in node.args):
        raise TypeError("the bits of a float64 are not those of the narrower number")
    written = written_by(node)

    def given(argument: Any) -> Any:
        if isinstance(argument, fx.Node):
            own = value(argument)
            return own.clone() if argument in written else own
        return widened(argument) if wide else argument

    args, kwargs = fx.node.map_aggregate((node.args, node.kwargs), given)  # type: ignore[misc]
    if wide and base_name(node) == "_grouped_mm":
        return grouped_mm(*args, **kwargs)  # type: ignore[arg-type]  # as the schema has them
    return call(node, args, kwargs)


def widened(value: Any) -> Any:
    """A tensor, or a dtype that is asked for: in float64, or complex128, where it is no integer."""
    if isinstance(value, torch.dtype):
        return torch.float64 if value.is_floating_point else torch.complex128 if value.is_complex else value
    if isinstance(value, torch.Tensor) and is_float(value):
        return value.to(torch.complex128 if value.is_complex() else torch.float64)
    return value


#: So many sums of the rows of x are measured: one tells, but for bad luck.
_SUMS = 2

_NOTHING = "nothing to measure: on these inputs its output does not depend on the adapters"


def _problem(reading: Reading, effect: float, report: Report) -> str:
    if reading.bypass:
        return f"{reading.bypass} reads its output without the branch"
    if not report:
        without = abs(report.error - effect) <= report.bound
        return "the adapters have no effect here" if without else "it is not the use of W + δ"
    if effect > report.bound:
        return ""
    if effect > report.noise:
        return f"rounding in {report.dtype} could hide its effect: certify a copy in float32 or float64"
    return _NOTHING


def _floats(value: Any) -> list[torch.Tensor]:
    found = (as_real(t) for t in pytree.tree_leaves(value) if isinstance(t, torch.Tensor))
    return [t for t in found if t.is_floating_point()]
