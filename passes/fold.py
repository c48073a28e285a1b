"""Fold the branches into the weights, and take them out again.

    W' = round(W + Σ δ)

Each storage once, in place, rounded once (`deltas.exact_sum`). After it every module has its original class, and the
model is its base graph with other numbers in it. A storage of which only some uses are adapted is split: those uses get
a copy of their own. Unfolding is exact, bit for bit: unless it is final, a fold keeps what rounding took away.

A fold, unfold or switch that is cut short (no memory, Ctrl-C) goes back, block by block, to the bits that were. A final
fold does so too, with what it keeps until it is whole, up to `_UNDOABLE` elements. The larger ones keep nothing: all
that can be refused has been refused before they write, then they go forward only. Ctrl-C waits for their end, and a
block that finds no memory is folded in halves, down to a row. Either way the weights are the old ones or the new ones.
A GPU is waited for twice in a fold, however many blocks it has (`deltas.ahead`), and twice in an unfold.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace

import torch
from torch import nn

from lora_fx.changes import Undo, uninterrupted
from lora_fx.deltas.ahead import foresee
from lora_fx.deltas.exact_sum import ExactSum, Way, kept
from lora_fx.deltas.fused_sum import FusedSum
from lora_fx.deltas.rounded_sum import KeptWeight, RoundedSum
from lora_fx.deltas.rounding import checksum, read, same
from lora_fx.errors import FoldError
from lora_fx.graph.places import refuse_away
from lora_fx.model import marks
from lora_fx.model.classes import is_wired, unwire
from lora_fx.model.inventory import Inventory, Storage, inventory, is_folded, weight_name
from lora_fx.model.marks import FoldRecord, PutAway
from lora_fx.passes.base import UNFOLDED, Condition, Facts, Pass, Result
from lora_fx.passes.keeping import forget_classes
from lora_fx.passes.wiring import keep_keys

_UNDOABLE = 2**25  # elements up to which a final fold can be undone until it is whole: that takes 32 MiB or less


def _why_inactive(model: nn.Module, facts: Facts) -> str:
    here = inventory(model)
    found = here.folded or any(place.adapter.active for place in here.places)
    return "" if found else "the model has no active adapter"


ACTIVE = Condition(
    "an active adapter", _why_inactive, "apply or activate one first; lora_fx.adapters(model) lists them", FoldError
)
FOLDED = Condition(
    "a folded model",
    lambda model, facts: "" if inventory(model).folded else "the model is not folded, or its fold was final",
    "only fold(model) without final=True can be undone",
    FoldError,
)
PLAIN = Condition(
    "every module in its own class",
    lambda model, facts: "a module has a generated class still" if is_wired(model) else "",
)


@dataclass(frozen=True)
class Fold(Pass):
    """Fold every active adapter of a model, in place; a folded model stays as it is.

    Args:
        final: keep nothing: no memory, and no way back.
    """

    final: bool = False

    name = "fold"
    requires = (ACTIVE,)
    ensures = (PLAIN,)

    def call(self, model: nn.Module, facts: Facts) -> Result:
        if is_folded(model):
            return Result(model, False)
        _fold(model, self.final, facts)
        return Result(model, True)


@dataclass(frozen=True)
class Unfold(Pass):
    """Take the adapters out of the weights again, to the bit. Nothing reads them until a `Rewrite`.

    Args:
        if_folded: leave a model alone that is not folded, in the place of refusing it.
    """

    if_folded: bool = False

    name = "unfold"
    ensures = (UNFOLDED,)

    def call(self, model: nn.Module, facts: Facts) -> Result:
        if self.if_folded and not inventory(model).folded:
            return Result(model, False)
        FOLDED.check(model, facts, self.name)
        _take_back(model, facts.undo)
        return Result(model, True)


def kept_bytes(model: nn.Module) -> int:
    """The memory a folded model keeps to be unfolded, in bytes; the adapters themselves not counted."""
    return sum(way.bytes for record in inventory(model).records.values() for way in record.ways.values())


def _fold(model: nn.Module, final: bool, facts: Facts) -> None:
    """Write the sums into the weights, and put the adapters away."""
    here = inventory(model)
    storages = here.storages()
    for_good = final and sum(storage.parameter.numel() for storage in storages) > _UNDOABLE
    with torch.no_grad():
        undoable = [not (storage.split or for_good) for storage in storages]
        ahead = foresee([_sum(s, back) for s, back in zip(storages, undoable, strict=True)], undoable)
    sums = list(ahead.sums)
    unwire(model, here)
    if final:
        forget_classes(here.modules)
    ways: defaultdict[nn.Module, dict[str, Way | KeptWeight]] = defaultdict(dict)
    originals: defaultdict[nn.Module, dict[str, nn.Parameter]] = defaultdict(dict)
    copies: defaultdict[nn.Module, list[tuple[str, torch.Tensor]]] = defaultdict(list)
    with torch.no_grad():
        for k, storage in enumerate(storages):
            if storage.split:
                for owner, attribute in storage.owners:
                    originals[owner][attribute] = storage.parameter
                storage.replace(nn.Parameter(sums[k].weight.clone(), storage.parameter.requires_grad))
                sums[k] = replace(sums[k], weight=storage.parameter.detach())
        if for_good:
            facts.outlast(uninterrupted())
        with _for_good(model) if for_good else nullcontext():
            for k, (storage, whole) in enumerate(zip(storages, sums, strict=True)):
                if storage.split or for_good:
                    whole.fold_for_good(ahead.scratch(k), ahead.founds[k])
                    for owner, attribute in () if final else storage.owners:
                        copies[owner].append((attribute, checksum(storage.parameter)))
                else:
                    owner, attribute = storage.owners[0]
                    ways[owner][attribute] = whole.fold(ahead.scratch(k), facts.undo, ahead.founds[k])
            for module in here.modules:
                children = {c: PutAway(a, c in module._modules) for c, a in here.of(module).items()}
                _put_away(module, FoldRecord(children, ways[module], originals[module], tuple(copies[module])), final)
            keep_keys(inventory(model))


def refuse_unfoldable(storage: Storage) -> None:
    """What a fold would refuse before it writes, from the numbers that there are now.

    Raises:
        FoldError: an adapter is no delta, a weight is on meta or put away by accelerate, a number is not finite, or a
            sum does not fit into the dtype.
    """
    whole = _sum(storage, None)
    assert whole.unread is not None
    (answer,) = read([whole.unread])
    whole.checked(answer, None)


def _sum(storage: Storage, undoable: bool | None) -> ExactSum | FusedSum | RoundedSum:
    """`undoable`: None where it is not to be folded."""
    weight, adapters, name = storage.parameter, storage.adapters, storage.names[0]
    for adapter in adapters:
        if not adapter.kind.is_delta:
            raise FoldError(
                f"the kind {adapter.kind.name!r} does not fold: {adapter.kind.why}",
                place=f"{name}, adapter {adapter.name!r}",
                remedy='export it with adapters="unfolded"; or activate only adapters that are deltas, and fold those',
            )
    refuse_away(*storage.owners[0], name, "a fold would be lost with the next forward", FoldError)
    if weight.is_meta:
        raise FoldError("the weight is on meta: it has no numbers", place=name, remedy="materialise the model first")
    if all(adapter.kind.low_rank for adapter in adapters):
        deltas, names = [adapter.exact() for adapter in adapters], [adapter.name for adapter in adapters]
        fused = None if undoable is None else FusedSum.of(weight.detach(), deltas, undoable, name, names)
        return fused or ExactSum.of(weight.detach(), list(map(kept, deltas)), name, names)
    return RoundedSum.of(weight.detach(), adapters, name)


@contextmanager
def _for_good(model: nn.Module) -> Iterator[None]:
    """Inside, there is no way back."""
    try:
        yield
    except Exception as error:
        raise FoldError(
            f"a final fold ended before it was whole: {error}",
            place=type(model).__name__,
            remedy="some of its weights are folded, and nothing is kept to undo that: load the base weights again",
        ) from error


def _put_away(module: nn.Module, record: FoldRecord, final: bool) -> None:
    for child in record.children:
        marks.detach(module, child)
    if final:
        marks.unmark(module)
    elif record.children:
        marks.keep_fold_record(module, record)


def _take_back(model: nn.Module, undo: list[Undo]) -> None:
    """Unfold the weights; the adapters are back, but nothing reads them yet."""
    here = inventory(model)
    written = [_way(here, m, attribute) for m, record in here.records.items() for attribute in record.ways]
    starts = {name: way.starts_at(weight) for name, weight, way in written}
    for module, record in here.records.items():
        for attribute, was in record.copies:
            name, weight = _folded(here, module, attribute)
            starts[name] = same(checksum(weight), was)
    for name, (right,) in zip(starts, read([*starts.values()]), strict=True):
        if not right:
            raise _written(name)
    exact = [way.take_back(weight, undo) for _, weight, way in written]
    assert all(right for (right,) in read(exact)), "unfolding is exact"
    for module, record in here.records.items():
        module._parameters.update(record.originals)
        marks.drop_fold_record(module)
    for place in here.put_away:
        registered = here.records[place.owner].children[place.child].registered
        marks.attach(place.owner, place.child, place.adapter.to(place.parameter.device), registered)


def _way(here: Inventory, module: nn.Module, attribute: str) -> tuple[str, torch.Tensor, Way | KeptWeight]:
    """The name of a folded weight, the weight, and its way back."""
    return *_folded(here, module, attribute), here.records[module].ways[attribute]


def _folded(here: Inventory, module: nn.Module, attribute: str) -> tuple[str, torch.Tensor]:
    """The name of a folded weight, and the weight."""
    weight = module._parameters.get(attribute)
    name = weight_name(here.modules[module][0], attribute)
    refuse_away(module, attribute, name, "what unfolds it would be lost with the next forward", FoldError)
    if weight is None:
        raise _written(name)
    return name, weight.detach()


def _written(name: str) -> FoldError:
    return FoldError(
        "the folded weight has been written to or cast since it was folded",
        place=name,
        remedy="unfold before training, loading or casting; or keep the model as it is: it cannot be unfolded",
    )
