"""Activation rewrites, checked: what the recorded program of the adapted model does at each use, and behind each block,
is what the kind's paper says (`lora_fx.checks.regions`), and all else in it is the model itself.

A forward that looks at numbers may take another path, as a router chooses other experts: then θ stands almost where it
starts. Where the two programs are not one but for the rewrites even so, the recorded program of the model itself is run
with each rewrite done at its place, in the dtype that the model has:

    y' = rewritten(use, x, θ)     at the nodes that consume the weight
    h' = put_behind(h, ids, θ)      at the marks behind blocks

Nothing is shared with what stands in forwards: neither the reading of weights nor the formulas. New ids are put into
the inputs where these are what looks up the table, since no base model runs on them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from lora_fx.changes import Undo, safe_point
from lora_fx.checks.definitions import put_behind, rewritten
from lora_fx.checks.flow import Flow, Reading
from lora_fx.checks.regions import Mark, call_of, measured, rewrites
from lora_fx.checks.uses import Coverage, names_of
from lora_fx.checks.verification import (
    Draws,
    NotRun,
    Report,
    as_real,
    compare_all,
    dither,
    in_mode,
    quiet,
    relative_error,
    run_adapted,
    with_dense_weights,
)
from lora_fx.deltas.adapter import Adapter
from lora_fx.deltas.realisation import Realisation
from lora_fx.deltas.rewrites import SEPARATOR
from lora_fx.errors import CaptureError, essence
from lora_fx.graph.capture import Inputs, capture_graph
from lora_fx.graph.forms import Call
from lora_fx.graph.nodes import base_name, call, first_operand
from lora_fx.graph.own_state import undisturbed
from lora_fx.graph.places import is_away
from lora_fx.graph.views import CASTS, COPIES, MOVES
from lora_fx.model.behind import blocks_of, callers, hidden, with_hidden
from lora_fx.model.classes import unwired
from lora_fx.model.inventory import Inventory, Storage, inventory
from lora_fx.model.lookups import Lookups


def is_rewrite(adapter: Adapter) -> bool:
    return not adapter.kind.is_delta


def deltas_of(storages: Sequence[Storage]) -> list[Storage]:
    """What deltas do to these weights; without those that have none."""
    own = [replace(s, adapters=tuple(a for a in s.adapters if not is_rewrite(a))) for s in storages]
    return [storage for storage in own if storage.adapters]


def rewrites_of(storages: Sequence[Storage]) -> list[Storage]:
    """The same of what rewrites the results of their uses."""
    return [replace(s, adapters=tuple(own)) for s in storages if (own := rewrites(s))]


@dataclass(frozen=True)
class Checked:
    """What was measured in one mode."""

    report: Report
    """Of the whole model as it runs: against its recorded program where that was measured part by part, and else
    against the model itself with the rewrites done."""
    rows: tuple[Coverage, ...]
    """For each use that is rewritten, each block that something stands behind, and each weight whose uses were not
    seen."""
    apart: bool
    """Each of them was measured by itself, in float64."""


def check_rewritten(model: nn.Module, inputs: Inputs, training: bool, undo: list[Undo]) -> Checked | NotRun:
    """The adapted model, with the θ it has, against the model itself with its deltas in the weights and the rewrites at
    their places; see `check_once`, whose arguments these are.

    Raises:
        NotServed: the adapted model does not run.
        CaptureError: the model itself does not, or cannot be recorded.
    """
    here = inventory(model)
    storages, marks = here.storages(), list[Mark]()
    with in_mode(model, training):
        with unwired(model), with_dense_weights(model, undo):
            try:
                with _marked(here, storages, marks):
                    captured = capture_graph(model, inputs, as_is=True)
                flow = Flow(captured, storages, here.modules)
            except CaptureError as error:
                if not training or isinstance(error.__cause__, torch.OutOfMemoryError | MemoryError):
                    raise
                return NotRun(essence(error).partition("\n")[0])
        _refuse_transformed(model, flow)
        places = {n: marks[n.args[2]] for n in captured.graph.nodes if n.target is torch.ops.lora_fx.behind.default}
        given = _with_tokens(flow, here)
        adapted = run_adapted(model, given)
        away = any(is_away(*owner) for storage in storages for owner in storage.owners)
        seen = None if away else measured(model, flow, places, given)
        if seen is None and not away:  # experts may have been chosen by other numbers
            with quiet(storages, undo):
                adapted, seen = run_adapted(model, given), measured(model, flow, places, given)
        if seen is not None:
            report, rows = compare_all(adapted, seen.outputs, seen.moved), seen.rows
        else:
            adapted = run_adapted(model, given)
            with unwired(model), with_dense_weights(model, undo):
                report, rows = _by_replay(model, flow, places, given, adapted)
    read = {storage for reading in flow.readings for storage in reading.acting.values()}
    unread = (_row(s, "", "", Realisation.UNSEEN, problem=_UNSEEN) for s in storages if rewrites(s) and s not in read)
    return Checked(report, (*rows, *unread), seen is not None)


_UNSEEN = "the example inputs do not reach it"


def _refuse_transformed(model: nn.Module, flow: Flow) -> None:
    if flow.captured.transformed:
        raise CaptureError(
            "a part of it runs inside of a transform of torch.func, where no use can be rewritten by itself",
            place=type(model).__name__,
            remedy="pass check=False, or adapt it by kinds that are deltas of a weight",
        )


def _row(storage: Storage, *rest: Any, **more: Any) -> Coverage:
    return Coverage(names_of(storage), tuple(a.name for a in rewrites(storage)), *rest, **more)


# ── marks ────────────────────────────────────────────────────────────────────────────────────────────────────────────


@torch.library.custom_op("lora_fx::behind", mutates_args=())
def behind(h: torch.Tensor, ids: torch.Tensor, mark: int) -> torch.Tensor:
    """h, in a recorded program: there, at the positions of these ids, an adapter stands behind a block."""
    return h.clone()


@contextmanager
def _marked(here: Inventory, storages: Sequence[Storage], marks: list[Mark]) -> Iterator[None]:
    """Inside, a program that is recorded of the model itself has a mark wherever something stands behind a block."""
    ids: dict[Adapter, torch.Tensor] = {}

    def mark(own: Mark, block: nn.Module, args: Any, output: Any) -> Any:
        if own.adapter not in ids:
            return output
        marks.append(own)
        return with_hidden(output, behind(hidden(output), ids[own.adapter], len(marks) - 1))

    def read(adapter: Adapter, table: torch.Tensor, own: torch.Tensor) -> None:
        ids[adapter] = own

    with ExitStack() as hooks:
        for storage in storages:
            for adapter in (a for a in storage.adapters if a.kind.behind is not None):
                for tensor, block in blocks_of(adapter, here.modules).items():
                    paths = here.modules[block]
                    own = Mark(storage, adapter, _tensor(adapter, paths, tensor), paths[0])
                    hooks.callback(block.register_forward_hook(partial(mark, own), prepend=True).remove)
                hooks.enter_context(Lookups(storage.owners, partial(read, adapter)))
        yield


def _tensor(adapter: Adapter, paths: Sequence[str], otherwise: str) -> str:
    """Of θ, that of the block with these paths, as the settings count them.

    Args:
        otherwise: where the paths are others: of the model as a part of another, or of a part of it.
    """
    counted = enumerate(adapter.settings["blocks"].split(SEPARATOR))
    return next((f"block_{k}" for k, path in counted if path in paths), otherwise)


# ── the program of the model itself, with the rewrites done ──────────────────────────────────────────────────────────


def _by_replay(
    model: nn.Module, flow: Flow, marks: Mapping[fx.Node, Mark], given: Inputs, adapted: list[torch.Tensor]
) -> tuple[Report, tuple[Coverage, ...]]:
    plain, moved = (_Replay(flow, marks, shaken) for shaken in (False, True))
    try:
        itself = [replay.outputs(model, given) for replay in (plain, moved)]
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # of any op, with numbers that choose another path than the one that was recorded
        why = essence(error).partition("\n")[0]
        raise CaptureError(
            f"its forward takes another path where something is rewritten, and cannot be compared: {why}",
            place=type(model).__name__,
            remedy="pass check=False, or adapt it by kinds that are deltas of a weight",
        ) from error
    report = compare_all(adapted, *itself)
    rows = [row for reading in flow.readings for row in _rows(reading, report, plain.effects.get(reading.node, 0.0))]
    return report, tuple(rows)


def _rows(reading: Reading, report: Report, effect: float) -> list[Coverage]:
    problem = "" if report else "the whole model is not the one with this rewrite in it"
    if report and effect <= report.bound:
        problem = "nothing to measure: on these inputs its output does not depend on the adapters"
    numbers = effect, report.error, report.bound
    return [
        _row(s, reading.module, reading.form, s.adapters[0].realised, *numbers, dtype=report.dtype, problem=problem)
        for s in reading.acting.values()
        if s is not None and rewrites(s)
    ]


class _Replay(fx.Interpreter):
    """Runs a recorded program of the model itself, with the rewrites done.

    Args:
        shaken: round what they give once more, to see what rounding does.
    """

    def __init__(self, flow: Flow, marks: Mapping[fx.Node, Mark], shaken: bool) -> None:
        super().__init__(flow.captured.module)
        self.flow, self.marks, self.draws = flow, marks, Draws(0) if shaken else None
        self.effects: dict[fx.Node, float] = {}
        self._readings = {reading.node: reading for reading in flow.readings}

    def outputs(self, model: nn.Module, inputs: Inputs) -> list[torch.Tensor]:
        """With the random draws of `run`."""
        with undisturbed(model), torch.no_grad():
            torch.manual_seed(0)
            return [as_real(t) for t in self.run(*self.flow.arguments(inputs))]

    def run_node(self, node: fx.Node) -> Any:
        safe_point()
        if (mark := self.marks.get(node)) is not None:
            h, ids = (self.env[n] for n in node.args[:2])  # type: ignore[index]
            return self._rounded(node, put_behind(mark.adapter, mark.tensor, h, ids))
        reading = self._readings.get(node)
        adapters = [a for s in reading.acting.values() if s is not None for a in rewrites(s)] if reading else []
        if not adapters:
            return super().run_node(node)
        found = call_of(self.flow, node)
        assert found is not None, "the plan has refused what is no product"
        use, x = partial(self._of, node, found), self.env[found.x]
        new = any(a.kind.new_ids(a.settings) for a in adapters)
        plain = use(x.clamp(max=adapters[0].layout.size("i") - 1) if new else x)
        for adapter in adapters:
            use = partial(rewritten, adapter, use)
        exact = use(x)
        self.effects[node] = relative_error(plain, exact, exact)
        return self._rounded(node, exact)

    def _rounded(self, node: fx.Node, exact: torch.Tensor) -> torch.Tensor:
        dtype = node.meta["val"].dtype
        if self.draws is not None:
            exact = exact * dither(exact, torch.finfo(dtype).eps / 2, self.draws)
        return exact.to(dtype)

    def _of(self, node: fx.Node, found: Call, x: Any) -> torch.Tensor:
        """What the op makes of this operand."""
        env = {n: self.env[n] for n in node.all_input_nodes} | {found.x: x}
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), env.__getitem__)
        return call(node, args, kwargs).to(torch.float64)


# ── indices of new tokens ────────────────────────────────────────────────────────────────────────────────────────────


def _with_tokens(flow: Flow, here: Inventory) -> Inputs:
    """The inputs, with new tokens in the place of every other one where such are looked up."""
    inputs = flow.captured.inputs
    flat, spec = pytree.tree_flatten((inputs.args, inputs.kwargs))
    which = [k for k, leaf in enumerate(flat) if isinstance(leaf, torch.Tensor)]
    state = [n for n in flow.captured.graph.nodes if n.op == "placeholder"]
    leaves = dict(zip([n for n in state if n not in flow.captured.tensors], which, strict=True))
    for reading in flow.readings:
        adapters = [a for s in reading.acting.values() if s is not None for a in rewrites(s)]
        counts = [count for a in adapters if (count := a.kind.new_ids(a.settings)) and _in_call(a, reading, here)]
        found = call_of(flow, reading.node)
        given = None if found is None or not found.form.looks_up else leaves.get(_source(found.x))
        if given is not None and counts:
            flat[given] = _mixed(flat[given], adapters[0].layout.size("i"), min(counts))
    args, kwargs = pytree.tree_unflatten(flat, spec)
    return Inputs(args, kwargs)


def _in_call(adapter: Adapter, reading: Reading, here: Inventory) -> bool:
    """Whether new ids may be looked up there: those of blocks, in a call of the module that these are in."""
    calls = [path for module, paths in here.modules.items() if adapter in callers(module) for path in paths]
    inside = any(not path or f"{reading.module}.".startswith(f"{path}.") for path in calls)
    return adapter.kind.behind is None or inside


def _source(node: Any) -> Any:
    """What is moved or cast, and no more."""
    while isinstance(node, fx.Node) and node.op == "call_function" and base_name(node) in {*MOVES, *COPIES, *CASTS}:
        node = first_operand(node)
    return node


def _mixed(ids: torch.Tensor, first: int, count: int) -> torch.Tensor:
    own = ids.clone()
    some = own.view(-1)[::2] if own.is_contiguous() else own
    some.copy_(first + torch.arange(some.numel(), device=ids.device).reshape(some.shape) % count)
    return own
