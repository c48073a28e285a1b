"""Activation rewrites, checked: the recorded program of the model itself, with each rewrite done at the uses of its
weight, is what the adapted model must give.

    y' = around(use, x, θ)        in float64, at the nodes that consume the weight

Nothing is shared with what stands in forwards: not the reading of weights, nor the order or the dtype of θ's sums. The
indices of new tokens are put into the inputs where these are what looks up the table, since no base model runs on them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from lora_fx.changes import Undo, safe_point
from lora_fx.checks.flow import Flow, Reading
from lora_fx.checks.oracles import rewritten
from lora_fx.checks.uses import Coverage, names_of
from lora_fx.checks.verification import (
    Draws,
    NotRun,
    Report,
    as_real,
    compare_all,
    dither,
    in_mode,
    relative_error,
    run_adapted,
    with_dense_weights,
)
from lora_fx.deltas.adapter import Adapter
from lora_fx.deltas.realisation import Realisation
from lora_fx.errors import CaptureError, essence
from lora_fx.graph.capture import Inputs, capture_graph
from lora_fx.graph.forms import Call, find
from lora_fx.graph.nodes import base_name, call, first_operand, shape_of
from lora_fx.graph.own_state import undisturbed
from lora_fx.graph.views import CASTS, COPIES, MOVES
from lora_fx.model.behind import blocks_of, hidden, with_hidden
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
    own = [replace(s, adapters=tuple(a for a in s.adapters if is_rewrite(a))) for s in storages]
    return [storage for storage in own if storage.adapters]


@dataclass(frozen=True)
class Checked:
    """What was measured in one mode."""

    report: Report
    rows: tuple[Coverage, ...]
    """For each use that is rewritten, and for each weight whose uses were not seen."""


def check_rewritten(model: nn.Module, inputs: Inputs, training: bool, undo: list[Undo]) -> Checked | NotRun:
    """The adapted model, with the θ it has, against the recorded one with its deltas in the weights and the rewrites
    at their uses; see `check_once`, whose arguments these are.

    Raises:
        NotServed: the adapted model does not run.
        CaptureError: the model itself does not, or cannot be recorded.
    """
    here = inventory(model)
    storages = rewrites_of(here.storages())
    with in_mode(model, training):
        with unwired(model), with_dense_weights(model, undo):
            try:
                with _behind_blocks(here, storages):
                    captured = capture_graph(model, inputs, as_is=True)
                flow = Flow(captured, storages, here.modules)
            except CaptureError as error:
                if not training or isinstance(error.__cause__, torch.OutOfMemoryError | MemoryError):
                    raise
                return NotRun(essence(error).partition("\n")[0])
            _refuse_transformed(model, flow)
            given = _with_tokens(flow)
            plain, moved = (_Replay(flow, shaken) for shaken in (False, True))
            wanted, noise = (replay.outputs(model, given) for replay in (plain, moved))
        adapted = run_adapted(model, given)
    report = compare_all(adapted, wanted, noise)
    rows = [row for reading in flow.readings for row in _rows(reading, report, plain.effects[reading.node])]
    seen = {storage for reading in flow.readings for storage in reading.acting.values()}
    unseen = (_row(s, "", "", Realisation.UNSEEN, problem=_UNSEEN) for s in storages if s not in seen)
    return Checked(report, (*rows, *unseen))


_UNSEEN = "the example inputs do not reach it"


def _refuse_transformed(model: nn.Module, flow: Flow) -> None:
    if flow.captured.transformed:
        raise CaptureError(
            "a part of it runs inside of a transform of torch.func, where no use can be rewritten by itself",
            place=type(model).__name__,
            remedy="pass check=False, or adapt it by kinds that are deltas of a weight",
        )


def _rows(reading: Reading, report: Report, effect: float) -> list[Coverage]:
    problem = "" if report else "the whole model is not the one with this rewrite in it"
    if report and effect <= report.bound:
        problem = "nothing to measure: on these inputs its output does not depend on the adapters"
    numbers = effect, report.error, report.bound
    return [
        _row(s, reading.module, reading.form, s.adapters[0].realised, *numbers, dtype=report.dtype, problem=problem)
        for s in reading.acting.values()
        if s is not None
    ]


def _row(storage: Storage, *rest: Any, **more: Any) -> Coverage:
    return Coverage(names_of(storage), tuple(a.name for a in storage.adapters), *rest, **more)


@contextmanager
def _behind_blocks(here: Inventory, storages: Sequence[Storage]) -> Iterator[None]:
    """Inside, the model itself has what stands behind its blocks, by hooks: a program that is recorded has it in it."""
    ids: dict[Adapter, torch.Tensor] = {}

    def rewrite(adapter: Adapter, tensor: str, block: nn.Module, args: Any, output: Any) -> Any:
        h, own = hidden(output), ids.get(adapter)
        if own is None:
            return output
        n, theta = adapter.layout.size("i"), adapter.get_parameter(tensor)
        rows = theta[(own - n).clamp(min=0, max=len(theta) - 1)].to(h.dtype)
        return with_hidden(output, torch.where((own < n)[..., None], h, rows))

    def read(adapter: Adapter, table: torch.Tensor, own: torch.Tensor) -> None:
        ids[adapter] = own

    with ExitStack() as hooks:
        for storage in storages:
            for adapter in (a for a in storage.adapters if a.kind.behind is not None):
                for tensor, block in blocks_of(adapter, here.modules).items():
                    hook = block.register_forward_hook(partial(rewrite, adapter, tensor), prepend=True)
                    hooks.callback(hook.remove)
                hooks.enter_context(Lookups(storage.owners, partial(read, adapter)))
        yield


class _Replay(fx.Interpreter):
    """Runs a recorded program of the model itself, with the rewrites done.

    Args:
        shaken: round what they give once more, to see what rounding does.
    """

    def __init__(self, flow: Flow, shaken: bool) -> None:
        super().__init__(flow.captured.module)
        self.flow, self.draws = flow, Draws(0) if shaken else None
        self.effects: dict[fx.Node, float] = {}
        self._readings = {reading.node: reading for reading in flow.readings}

    def outputs(self, model: nn.Module, inputs: Inputs) -> list[torch.Tensor]:
        """With the random draws of `run`."""
        with undisturbed(model), torch.no_grad():
            torch.manual_seed(0)
            return [as_real(t) for t in self.run(*self.flow.arguments(inputs))]

    def run_node(self, node: fx.Node) -> Any:
        safe_point()
        reading = self._readings.get(node)
        adapters = [a for s in reading.acting.values() if s is not None for a in s.adapters] if reading else []
        if not adapters:
            if reading is not None:
                self.effects[node] = 0.0
            return super().run_node(node)
        found = _call(self.flow, node)
        assert found is not None, "the plan has refused what is no product"
        x, plain = self.env[found.x], self._of(node, found, None)
        use = partial(self._of, node, found)
        for adapter in sorted(adapters, key=lambda own: own.kind.behind is None):  # it hides new ids from the table
            use = partial(rewritten, adapter, use)
        exact = use(x)
        self.effects[node] = relative_error(plain, exact, exact) if plain is not None else 1.0
        if self.draws is not None:
            exact = exact * dither(exact, torch.finfo(node.meta["val"].dtype).eps / 2, self.draws)
        return exact.to(node.meta["val"].dtype)

    def _of(self, node: fx.Node, found: Call, x: Any) -> Any:
        """What the op makes of this operand; of None, of the one that has reached it, where it can."""
        env = {n: self.env[n] for n in node.all_input_nodes}
        if x is not None:
            env[found.x] = x
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), env.__getitem__)
        try:
            return call(node, args, kwargs)
        except IndexError:
            if x is None:
                return None  # an index that the table does not have
            raise


def _call(flow: Flow, node: fx.Node) -> Call | None:
    return find(node.target, node.args, dict(node.kwargs), lambda n: len(shape_of(n)) if n in flow.carriers else None)


# ── indices of new tokens ────────────────────────────────────────────────────────────────────────────────────────────


def _with_tokens(flow: Flow) -> Inputs:
    """The inputs, with new tokens in the place of every other one where such are looked up."""
    inputs = flow.captured.inputs
    flat, spec = pytree.tree_flatten((inputs.args, inputs.kwargs))
    which = [k for k, leaf in enumerate(flat) if isinstance(leaf, torch.Tensor)]
    state = [n for n in flow.captured.graph.nodes if n.op == "placeholder"]
    leaves = dict(zip([n for n in state if n not in flow.captured.tensors], which, strict=True))
    for reading in flow.readings:
        adapters = [a for s in reading.acting.values() if s is not None for a in s.adapters]
        counts = [count for a in adapters if (count := a.kind.new_ids(a.settings))]
        found = _call(flow, reading.node)
        given = None if found is None or not found.form.looks_up else leaves.get(_source(found.x))
        if given is not None and counts:
            flat[given] = _mixed(flat[given], adapters[0].layout.size("i"), min(counts))
    args, kwargs = pytree.tree_unflatten(flat, spec)
    return Inputs(args, kwargs)


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
