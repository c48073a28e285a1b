"""Fold the branches into the weights, and take them out again.

    W' = round(W + Σ s·B·A)

Each storage once, in place, in row blocks of bounded memory; every element is the real sum rounded once to W's own
dtype (`deltas.rounding`). After it every module has its original class, and the model is its base graph with other
numbers in it. A storage of which only some uses are adapted is split: those uses get a copy of their own.

Unfolding is exact, bit for bit. The fold keeps what rounding took away, unless it is final: some tenths of a byte for
each element, at most one where the delta is no larger than the weights (`kept_bytes` tells).

A fold, unfold or switch that is cut short (no memory, Ctrl-C) goes back, block by block, to the bits that were. A final
fold does so too, with what it keeps until it is whole, up to `_UNDOABLE` elements. The larger ones keep nothing: all
that can be refused has been refused before they write, then they go forward only. Ctrl-C waits for their end, and a
block that finds no memory is folded in halves, down to a row. Either way the weights are the old ones or the new ones.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import partial

import torch
from torch import nn

from lora_fx.changes import Undo, uninterrupted
from lora_fx.deltas.adapter import Adapter
from lora_fx.deltas.rounding import (
    BEFORE,
    DELTA,
    ROUNDED,
    TOTAL,
    Remainder,
    Scratch,
    checksum,
    remember,
    round_once,
    round_sum,
)
from lora_fx.errors import FoldError
from lora_fx.graph.layout import Layout
from lora_fx.model import wiring
from lora_fx.model.classes import is_wired, unwire
from lora_fx.model.inventory import inventory
from lora_fx.model.marks import PutAway
from lora_fx.passes.base import UNFOLDED, Condition, Facts, Pass, Result
from lora_fx.passes.wiring import keep_keys

_BLOCK = 2**19  # elements of a weight that are folded at a time: fewer calls of torch, and the caches still help
_UNDOABLE = 2**25  # elements up to which a final fold can be undone until it is whole: that takes 32 MiB or less


@dataclass
class _Kept:
    """What one owner needs to be unfolded."""

    children: dict[str, PutAway]
    originals: dict[str, nn.Parameter | _Way]
    """attribute → the original parameter (of a split storage), or the way back to its elements."""

    @property
    def attributes(self) -> tuple[str, ...]:
        return tuple(self.originals)


@dataclass(frozen=True)
class _Term:
    """One adapter's share of the sum, as it was when it was folded."""

    layout: Layout
    A: torch.Tensor
    B: torch.Tensor
    scale: float
    bound: float
    """No element of s·B·A is larger, and no part of its sum."""

    @staticmethod
    def of(adapter: Adapter) -> _Term:
        delta = adapter.low_rank().detached()
        A, B, scale = delta.A, delta.whole, delta.scale
        return _Term(delta.layout, A.clone(), B.clone(), scale, abs(scale) * delta.rank * _largest(A) * _largest(B))

    def wide(self) -> _Term:
        """With float64 factors, to compute with."""
        return replace(self, A=self.A.to(torch.float64), B=self.B.to(torch.float64))

    def rows(self, start: int, stop: int) -> _Term:
        """The term of the indices start:stop of the weight's first axis."""
        layout, A, B = self.layout, self.A, self.B
        side = layout.sides[0]
        per_row = (layout.axes[0].size if side == "b" else layout.size(side)) // layout.shape[0]
        rows = slice(start * per_row, stop * per_row)
        if side == "o":
            B = B[..., rows, :]
        elif side == "i":
            A = A[..., :, rows]
        else:
            A, B = A[rows], B[rows]
        return replace(self, layout=Layout(layout.sides, (stop - start, *layout.shape[1:])), A=A, B=B)

    def add_to(self, total: torch.Tensor, dtype: torch.dtype) -> None:
        """Add s·B·A of a wide term to `total`, contiguous and float64, for a weight of this dtype.

        A float64 weight has no bits to spare: its sums are taken in one order, the same on every device and with any
        number of threads. For narrower ones a matmul may take them in any order, which `_steps` bounds.
        """
        if dtype == torch.float64:
            total += self.delta()
            return
        A, B, axes = self.A, self.B * self.scale, self.layout.axes
        sides = "".join(axis.side for axis in axes)
        if sides in ("oi", "io", "boi", "bio"):
            left, right = (B, A) if sides.endswith("oi") else (A.mT, B.mT)
            matrix = total.view([axis.size for axis in axes])
            matrix.baddbmm_(left, right) if matrix.ndim == 3 else matrix.addmm_(left, right)
        else:
            total += self.layout.delta(A, B)

    def delta(self) -> torch.Tensor:
        """s·B·A of a wide term in the weight's axes, float64, summed in one order."""
        A, B = self.A, self.B * self.scale
        total = B[..., :, 0:1] * A[..., 0:1, :]
        product = torch.empty_like(total)
        for k in range(1, A.shape[-2]):
            total += torch.mul(B[..., :, k : k + 1], A[..., k : k + 1, :], out=product)
        return self.layout.to_weight(total)

    def bounds(self, flat: torch.Tensor) -> torch.Tensor:
        """Σ |s·B·A| of single elements."""
        A, B = self._at(flat)
        return (A.abs() * B.abs()).sum(-1) * abs(self.scale)

    def exact(self, flat: torch.Tensor) -> list[Fraction]:
        """s·B·A of single elements, as fractions."""
        scale = Fraction(self.scale)
        A, B = (factor.tolist() for factor in self._at(flat))
        return [
            scale * sum(Fraction(x) * Fraction(y) for x, y in zip(a, b, strict=True)) for a, b in zip(A, B, strict=True)
        ]

    def _at(self, flat: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The column of A and the row of B that make each element."""
        batch, out, inner = self.layout.locate(flat)
        A = self.A.reshape(-1, *self.A.shape[-2:])[batch, :, inner]
        B = self.B.reshape(-1, *self.B.shape[-2:])[batch, out, :]
        return A, B


@dataclass(frozen=True)
class _Way:
    """The way from the folded weight back to the original one, block by block."""

    terms: tuple[_Term, ...]
    remainders: tuple[Remainder, ...]
    folded: int
    """Checksum of the folded weight: it must still be what it was."""
    original: int
    """Checksum of the original weight: it must be what comes out."""

    @property
    def bytes(self) -> int:
        return sum(r.bytes for r in self.remainders)


def _why_inactive(model: nn.Module, facts: Facts) -> str:
    here = inventory(model)
    found = here.folded or any(place.adapter.active for place in here.places)
    return "" if found else "the model has no active adapter"


def _why_unfolded(model: nn.Module, facts: Facts) -> str:
    return "" if inventory(model).folded else "the model is not folded, or its fold was final"


def _why_wired(model: nn.Module, facts: Facts) -> str:
    return "a module has a generated class still" if is_wired(model) else ""


ACTIVE = Condition(
    "an active adapter",
    _why_inactive,
    "apply or activate one first; lora_fx.adapters(model) lists them",
    FoldError,
)
FOLDED = Condition("a folded model", _why_unfolded, "only fold(model) without final=True can be undone", FoldError)
PLAIN = Condition("every module in its own class", _why_wired)


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
        if inventory(model).folded:
            return Result(model, False)
        fold_model(model, self.final, facts)
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
        take_back(model, facts.undo)
        return Result(model, True)


def fold_model(model: nn.Module, final: bool, facts: Facts) -> None:
    """Write W + Σ s·B·A into every storage that an active adapter acts on, and put the adapters away."""
    storages = inventory(model).storages()
    magnitudes = [check_foldable(storage, _name(model, storage)) for storage in storages]
    for_good = final and sum(s.parameter.numel() for s in storages) > _UNDOABLE
    unwire(model)
    originals: dict[int, dict[str, nn.Parameter | _Way]] = {}
    with torch.no_grad():
        begun = [(storage, *_begin(storage)) for storage in storages]
        scratches = _scratches([storage.parameter for storage in storages])
        if for_good:
            facts.outlast(uninterrupted())
        with _for_good(model) if for_good else nullcontext():
            for (storage, old, terms, wide), magnitude in zip(begun, magnitudes, strict=True):
                weight, keep = storage.parameter.detach(), not (storage.split or for_good)
                scratch = scratches[weight.dtype, weight.device]
                way = _fold_weight(weight, terms, wide, magnitude, scratch, facts.undo, keep)
                for owner, attribute in storage.owners if storage.split else storage.owners[:1]:
                    originals.setdefault(id(owner), {})[attribute] = old if storage.split else way
            for module in list(model.modules()):
                _put_away(module, originals.get(id(module), {}), final)
            keep_keys(model)


def take_back(model: nn.Module, undo: list[Undo]) -> None:
    """Unfold the weights; the adapters are back, but nothing reads them yet."""
    if not is_folded(model):
        raise FoldError(
            "the model is not folded, or its fold was final",
            place=type(model).__name__,
            remedy="only fold(model) without final=True can be undone",
        )
    wiring.refuse_displaced(model)
    kept = [(m, m.__dict__[wiring.FOLDED]) for m in model.modules() if wiring.FOLDED in m.__dict__]
    for path, module in model.named_modules():
        if wiring.FOLDED in module.__dict__:
            _check_unchanged(path, module, module.__dict__[wiring.FOLDED])
    for module, what in kept:
        _take_back(module, what, undo)
        wiring.forget(module, wiring.FOLDED)


def folded_weight(weight: torch.Tensor, adapters: Sequence[Adapter], dtype: torch.dtype, name: str) -> torch.Tensor:
    """W + Σ s·B·A as a new tensor, rounded once to `dtype`, which may be narrower than W's own.

    Raises:
        FoldError: a number is not finite, or does not fit into the dtype.
    """
    terms = [_Term.of(adapter) for adapter in adapters]
    magnitude = _largest(weight) + sum(term.bound for term in terms)
    folded = torch.empty(weight.shape, dtype=dtype, device=weight.device)
    if math.isfinite(magnitude):
        wide, scratch = [term.wide() for term in terms], _scratch(folded)
        for start, stop in _blocks(weight):
            block, parts = weight[start:stop], [term.rows(start, stop) for term in wide]
            total = _total(block, parts, scratch)
            folded[start:stop] = _rounded(block, total, parts, magnitude, scratch)
    if not math.isfinite(magnitude) or not math.isfinite(_largest(folded)):
        raise FoldError(
            f"W + s·B·A is not finite in {dtype}",
            place=name,
            remedy="look for NaN and Inf in the weight and the factors; lower the scale, or take a wider dtype",
        )
    return folded


def is_folded(model: nn.Module) -> bool:
    """Whether the model carries what `unfold` needs."""
    return any(wiring.FOLDED in module.__dict__ for module in model.modules())


def put_away(model: nn.Module) -> list[Adapter]:
    """The adapters that a folded model keeps for `unfold`."""
    kept = [m.__dict__[wiring.FOLDED] for m in model.modules() if wiring.FOLDED in m.__dict__]
    return list(dict.fromkeys(away.adapter for k in kept for away in k.children.values()))


def kept_bytes(model: nn.Module) -> int:
    """The memory a folded model keeps to be unfolded, in bytes; the adapters themselves not counted."""
    kept = [m.__dict__[wiring.FOLDED] for m in model.modules() if wiring.FOLDED in m.__dict__]
    return sum(way.bytes for k in kept for way in k.originals.values() if isinstance(way, _Way))


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


def _name(model: nn.Module, storage: wiring.Storage) -> str:
    owner, attribute = storage.owners[0]
    path = next(name for name, module in model.named_modules() if module is owner)
    return f"{path}.{attribute}".lstrip(".")


def check_foldable(storage: wiring.Storage, name: str) -> float:
    """Refuse before anything is written. What comes back is no smaller than any element of W + Σ s·B·A."""
    parameter = storage.parameter
    if parameter.is_meta:
        raise FoldError("the weight is on meta: it has no numbers", place=name, remedy="materialise the model first")
    largest = _largest(parameter)
    if not math.isfinite(largest):
        raise FoldError("the weight holds NaN or Inf", place=name, remedy="repair the weight before folding")
    for adapter in storage.adapters:
        for label, factor in (("A", adapter.A), ("B", adapter.B)):
            if not math.isfinite(_largest(factor)):
                raise FoldError(
                    f"{label} of adapter {adapter.name!r} holds NaN or Inf",
                    place=name,
                    remedy="load an earlier checkpoint of the adapter",
                )
    terms = [_Term.of(adapter).wide() for adapter in storage.adapters]
    magnitude = largest + sum(term.bound for term in terms)
    if magnitude <= torch.finfo(parameter.dtype).max:
        return magnitude
    scratch = _scratch(parameter.detach())
    for start, stop in _blocks(parameter):  # only the sums themselves can tell
        block = parameter.detach()[start:stop]
        total = _delta(block, [term.rows(start, stop) for term in terms], scratch).add_(block)
        if not math.isfinite(_largest(round_once(total, parameter.dtype))):
            raise FoldError(
                f"W + s·B·A does not fit into {parameter.dtype}",
                place=name,
                remedy="lower the scale, or fold the model in a wider dtype",
            )
    return magnitude


def _begin(storage: wiring.Storage) -> tuple[nn.Parameter, tuple[_Term, ...], list[_Term]]:
    """All that folding it keeps in memory: the old parameter, a copy where others still read that, the factors."""
    old, terms = storage.parameter, tuple(_Term.of(adapter) for adapter in storage.adapters)
    wide = [term.wide() for term in terms]
    if storage.split:
        storage.replace(nn.Parameter(old.detach().clone(), old.requires_grad))
    return old, terms, wide


def _fold_weight(
    weight: torch.Tensor,
    terms: tuple[_Term, ...],
    wide: Sequence[_Term],
    magnitude: float,
    scratch: Scratch,
    undo: list[Undo],
    keep: bool,
) -> _Way:
    """Write the folded weight; what comes back leads to the old one, where that is to be kept."""
    before, remainders = _checksum(weight) if keep else 0, []
    for start, stop in _blocks(weight):
        block, parts = weight[start:stop], [term.rows(start, stop) for term in wide]
        if not keep:
            _fold_for_good(block, parts, magnitude, scratch)
            continue
        delta = _delta(block, parts, scratch)
        total = scratch.wide(TOTAL, block.shape).copy_(block).add_(delta)
        new = _rounded(block, total, parts, magnitude, scratch)
        difference = total.copy_(new).sub_(delta)
        remainder = remember(block, difference, 2 * magnitude, 4 * _steps(parts), scratch)
        remainders.append(remainder)
        _write(block, new, undo, partial(_unfold_block, block, parts, remainder), scratch)
    return _Way(terms, tuple(remainders), _checksum(weight) if keep else 0, before)


def _scratches(weights: Sequence[torch.Tensor]) -> dict[tuple[torch.dtype, torch.device], Scratch]:
    """One for the weights of each dtype on each device."""
    sizes: dict[tuple[torch.dtype, torch.device], int] = {}
    for weight in weights:
        start, stop = next(_blocks(weight), (0, 0))
        key = weight.dtype, weight.device
        sizes[key] = max(sizes.get(key, 0), weight[start:stop].numel())
    return {key: Scratch(elements, *key) for key, elements in sizes.items()}


def _scratch(weight: torch.Tensor) -> Scratch:
    return _scratches([weight])[weight.dtype, weight.device]


def _checksum(weight: torch.Tensor) -> int:
    return sum(checksum(weight[start:stop]) for start, stop in _blocks(weight))


def _unfold_weight(weight: torch.Tensor, way: _Way, undo: list[Undo]) -> None:
    wide = [term.wide() for term in way.terms]
    scratch = _scratch(weight)
    for (start, stop), remainder in zip(_blocks(weight), way.remainders, strict=True):
        block, parts = weight[start:stop], [term.rows(start, stop) for term in wide]
        old = remainder.restore(_guess(block, parts, scratch))
        _write(block, old, undo, partial(_fold_for_good, block, parts), scratch)


def _write(block: torch.Tensor, new: torch.Tensor, undo: list[Undo], way_back: Undo, scratch: Scratch) -> None:
    """Into the weight. Cut short at whichever line, what stands on the list gives back the block that was."""
    undo.append(partial(block.copy_, scratch.narrow(BEFORE, block.shape).copy_(block)))
    block.copy_(new)
    undo[-1] = way_back


def _unfold_block(block: torch.Tensor, terms: Sequence[_Term], remainder: Remainder) -> None:
    """The way back of a fold that is cut short, maybe for want of memory: then in halves."""
    try:
        block.copy_(remainder.restore(_guess(block, terms, Scratch.of(block))))
        return
    except Exception:
        if len(block) < 4:
            raise
    middle, width = len(block) // 4 * 2, block[0].numel()
    for start, stop in (0, middle), (middle, len(block)):
        part = _part(remainder, start * width, stop * width)
        _unfold_block(block[start:stop], [term.rows(start, stop) for term in terms], part)


def _part(remainder: Remainder, start: int, stop: int) -> Remainder:
    """The remainder of the flat elements start:stop; start is even, for two steps lie in a byte."""
    if remainder.places is None:
        return Remainder(None, None, remainder.numbers[start:stop])
    inside = (remainder.places >= start) & (remainder.places < stop)
    nibbles = None if remainder.nibbles is None else remainder.nibbles[start // 2 : (stop + 1) // 2]
    return Remainder(nibbles, remainder.places[inside] - start, remainder.numbers[inside])


def _fold_for_good(
    block: torch.Tensor, terms: Sequence[_Term], magnitude: float | None = None, scratch: Scratch | None = None
) -> None:
    """Keeping nothing. Where memory is short, in halves: some of the weight may have been folded before."""
    try:
        if magnitude is None:
            magnitude = _largest(block) + sum(term.bound for term in terms)
        scratch = scratch or Scratch.of(block)
        block.copy_(_rounded(block, _total(block, terms, scratch), terms, magnitude, scratch))
        return
    except Exception:
        if len(block) == 1:
            raise
    middle = len(block) // 2
    for rows in (0, middle), (middle, len(block)):
        _fold_for_good(block[slice(*rows)], [term.rows(*rows) for term in terms], magnitude, scratch)


def _delta(block: torch.Tensor, terms: Sequence[_Term], scratch: Scratch) -> torch.Tensor:
    delta = scratch.wide(DELTA, block.shape).zero_()
    for term in terms:
        term.add_to(delta, block.dtype)
    return delta


def _total(block: torch.Tensor, terms: Sequence[_Term], scratch: Scratch) -> torch.Tensor:
    total = scratch.wide(TOTAL, block.shape).copy_(block)
    if block.dtype == torch.float64:  # as it is summed where the delta is needed, too
        return total.add_(_delta(block, terms, scratch))
    for term in terms:
        term.add_to(total, block.dtype)
    return total


def _steps(terms: Sequence[_Term]) -> float:
    """How far W + Σ s·B·A, summed in float64 in any order, may be from the real number, as a share of its magnitude:
    each operation rounds by at most 2⁻⁵³ of what is there at most."""
    return sum(2 * term.A.shape[-2] + 2 for term in terms) * 2.0**-53


def _largest(values: torch.Tensor) -> float:
    """The largest magnitude; NaN or Inf if one is there."""
    if not values.numel():
        return 0.0
    low, high = torch.stack(values.detach().aminmax()).tolist()
    return max(-low, high) if low == low else low


def _guess(folded: torch.Tensor, terms: Sequence[_Term], scratch: Scratch) -> torch.Tensor:
    """W' − D: the original weight, give or take a few steps."""
    delta = _delta(folded, terms, scratch)
    difference = scratch.wide(TOTAL, folded.shape).copy_(folded).sub_(delta)
    return scratch.narrow(ROUNDED, folded.shape).copy_(difference)


def _rounded(
    block: torch.Tensor, total: torch.Tensor, terms: Sequence[_Term], magnitude: float, scratch: Scratch
) -> torch.Tensor:
    """The sums W + Σ s·B·A of a block, to the nearest numbers of W's dtype, in `scratch`."""
    flat = block.reshape(-1)

    def errors(places: torch.Tensor) -> torch.Tensor:
        return _steps(terms) * sum((term.bounds(places) for term in terms), flat[places].to(torch.float64).abs())

    def exact(places: torch.Tensor) -> list[Fraction]:
        sums = [Fraction(w) for w in flat[places].double().tolist()]
        for term in terms:
            sums = [a + b for a, b in zip(sums, term.exact(places), strict=True)]
        return sums

    return round_sum(total, magnitude, _steps(terms), errors, exact, scratch)


def _blocks(parameter: torch.Tensor) -> Iterator[tuple[int, int]]:
    rows = parameter.shape[0]
    step = max(1, _BLOCK // max(parameter[0].numel(), 1))
    for start in range(0, rows, step):
        yield start, min(start + step, rows)


def _put_away(module: nn.Module, originals: dict[str, nn.Parameter | _Way], final: bool) -> None:
    children = {
        child: PutAway(adapter, child in module._modules)
        for child, adapter in ({} if isinstance(module, Adapter) else wiring.adapters_of(module)).items()
    }
    for child in children:
        wiring.detach(module, child)
    if final:
        wiring.unmark(module)
    elif children:
        wiring.remember(module, wiring.FOLDED, _Kept(children, originals))


def _check_unchanged(path: str, module: nn.Module, kept: _Kept) -> None:
    """Refuse before anything is written."""
    for attribute, original in kept.originals.items():
        weight = module._parameters[attribute]
        if isinstance(original, _Way) and (weight is None or _checksum(weight) != original.folded):
            raise FoldError(
                "the folded weight has been written to or cast since it was folded",
                place=f"{path}.{attribute}".lstrip("."),
                remedy="unfold before training, loading or casting; or keep the model as it is: it cannot be unfolded",
            )


def _take_back(module: nn.Module, kept: _Kept, undo: list[Undo]) -> None:
    with torch.no_grad():
        for attribute, original in kept.originals.items():
            if isinstance(original, nn.Parameter):
                module._parameters[attribute] = original
                continue
            weight = module._parameters[attribute].detach()  # type: ignore[union-attr]
            _unfold_weight(weight, original, undo)
            assert _checksum(weight) == original.original, "unfolding is exact"
    for child, away in kept.children.items():
        parameter = module._parameters[wiring.attribute_of(child)]
        assert parameter is not None
        wiring.attach(module, child, away.adapter.to(parameter.device), away.registered)
