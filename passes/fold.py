"""Fold the branches into the weights, and take them out again.

    W' = round(W + Σ s·B·A)

Product and sum are float64, in row blocks of bounded memory; the sum is rounded once to W's own dtype, in place, once for
each storage. After it every module has its original class, and the model is its base graph with other numbers in it.
A storage of which only some uses are adapted is split: those uses get a copy of their own.

Unfolding is exact, bit for bit: the fold keeps the original weights (as many bytes as the folded weights have) unless it
is final.
"""

from __future__ import annotations

import copy as copying
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lora_fx import wiring
from lora_fx.adapter import Adapter
from lora_fx.errors import FoldError
from lora_fx.layout import Layout

_BLOCK = 2**20  # elements of a weight that are folded at a time: 8 MiB in float64


@dataclass
class _Kept:
    """What one owner needs to be unfolded."""

    children: dict[str, tuple[Adapter, bool]]
    """Its adapters, and whether they were registered as children."""
    originals: dict[str, nn.Parameter | torch.Tensor]
    """attribute → the original parameter (split) or its original elements."""


@dataclass(frozen=True)
class Fold:
    """Fold every active adapter of a model, in place.

    Args:
        final: keep nothing: no memory, and no way back.
    """

    final: bool = False

    def __call__(self, model: nn.Module) -> nn.Module:
        if is_folded(model):
            return model
        storages = wiring.adapted_storages(model)
        if not storages:
            raise FoldError(
                "the model has no active adapter",
                place=type(model).__name__,
                remedy="apply or activate one first; lora_fx.adapters(model) lists them",
            )
        for storage in storages:
            _check(storage, _name(model, storage))
        wiring.unwire(model)
        originals: dict[int, dict[str, Any]] = {}
        with torch.no_grad():
            for storage in storages:
                old = _fold_storage(storage, self.final)
                for owner, attribute in storage.owners if storage.split else storage.owners[:1]:
                    originals.setdefault(id(owner), {})[attribute] = old
        for module in list(model.modules()):
            _put_away(module, originals.get(id(module), {}), self.final)
        wiring.keep_keys(model)
        return model


@dataclass(frozen=True)
class Unfold:
    """Take the adapters out of the weights again; every weight is bitwise what it was before the fold."""

    def __call__(self, model: nn.Module) -> nn.Module:
        if not is_folded(model):
            raise FoldError(
                "the model is not folded, or its fold was final",
                place=type(model).__name__,
                remedy="only fold(model) without final=True can be undone",
            )
        for module in list(model.modules()):
            kept = module.__dict__.pop(wiring.FOLDED, None)
            if kept is not None:
                _take_back(module, kept)
        wiring.wire_or_dispatch(model)
        return model


def fold(model: nn.Module, *, copy: bool = False, final: bool = False) -> nn.Module:
    """Fold the active adapters into the weights (the LoRA papers say *merge*), each storage once, rounded once.

    Args:
        copy: fold a copy, and leave `model` alone.
        final: keep nothing for `unfold`. Otherwise the original weights are kept: as many bytes as the folded weights.

    Returns:
        The model, or its copy: its original classes, the base model's `state_dict` keys, other numbers.

    Raises:
        FoldError: there is no active adapter, or a factor or sum is not finite; nothing has been written then.
    """
    return Fold(final)(copying.deepcopy(model) if copy else model)


def unfold(model: nn.Module) -> nn.Module:
    """Undo `fold`: every weight bitwise as before, the branches back in place.

    Raises:
        FoldError: the model is not folded, or its fold was final.
    """
    return Unfold()(model)


def is_folded(model: nn.Module) -> bool:
    """Whether the model carries what `unfold` needs."""
    return any(wiring.FOLDED in module.__dict__ for module in model.modules())


def _name(model: nn.Module, storage: wiring.Storage) -> str:
    owner, attribute = storage.owners[0]
    path = next(name for name, module in model.named_modules() if module is owner)
    return f"{path}.{attribute}".lstrip(".")


def _check(storage: wiring.Storage, name: str) -> None:
    """Refuse before anything is written."""
    parameter = storage.parameter
    if parameter.is_meta:
        raise FoldError("the weight is on meta: it has no numbers", place=name, remedy="materialise the model first")
    if not bool(parameter.isfinite().all()):
        raise FoldError("the weight holds NaN or Inf", place=name, remedy="repair the weight before folding")
    largest = float(parameter.detach().abs().max()) if parameter.numel() else 0.0
    for adapter in storage.adapters:
        for label, factor in (("A", adapter.A), ("B", adapter.B)):
            if not bool(factor.isfinite().all()):
                raise FoldError(
                    f"{label} of adapter {adapter.name!r} holds NaN or Inf",
                    place=name,
                    remedy="load an earlier checkpoint of the adapter",
                )
        largest += _bound(adapter)
    if largest <= torch.finfo(parameter.dtype).max:
        return
    for start, stop in _blocks(parameter):  # only the exact sums can tell
        if not bool(_sum(parameter, storage.adapters, start, stop).isfinite().all()):
            raise FoldError(
                f"W + s·B·A does not fit into {parameter.dtype}",
                place=name,
                remedy="lower the scale, or fold the model in a wider dtype",
            )


def _bound(adapter: Adapter) -> float:
    """An upper bound of |s·B·A|, elementwise."""
    A, B = adapter.A.detach().double(), adapter.B.detach().double()
    return abs(adapter.scale) * adapter.rank * float(A.abs().max()) * float(B.abs().max())


def _fold_storage(storage: wiring.Storage, final: bool) -> Any:
    """Write the folded weight; what comes back restores the old one."""
    old = storage.parameter
    new = old
    if storage.split:
        new = nn.Parameter(old.detach().clone(), old.requires_grad)
        storage.replace(new)
    kept = None if final else (old if storage.split else old.detach().clone())
    for start, stop in _blocks(new):
        new.detach()[start:stop] = _sum(new, storage.adapters, start, stop)
    return kept


def _blocks(parameter: torch.Tensor) -> Iterator[tuple[int, int]]:
    rows = parameter.shape[0]
    step = max(1, _BLOCK // max(parameter[0].numel(), 1))
    for start in range(0, rows, step):
        yield start, min(start + step, rows)


def _sum(parameter: torch.Tensor, adapters: tuple[Adapter, ...], start: int, stop: int) -> torch.Tensor:
    """round(W + Σ s·B·A) of these rows of W."""
    total = parameter.detach()[start:stop].to(torch.float64)
    for adapter in adapters:
        total = total + _delta_rows(adapter, start, stop).to(total.device)
    return round_once(total, parameter.dtype)


def _delta_rows(adapter: Adapter, start: int, stop: int) -> torch.Tensor:
    """s·B·A in float64, only for the indices start:stop of the weight's first axis."""
    layout = adapter.layout
    A, B = adapter.A.detach().to(torch.float64), adapter.whole(adapter.B.detach()).to(torch.float64)
    side = layout.sides[0]
    per_row = (layout.axes[0].size if side == "b" else layout.size(side)) // layout.shape[0]
    rows = slice(start * per_row, stop * per_row)
    if side == "o":
        B = B[..., rows, :]
    elif side == "i":
        A = A[..., :, rows]
    else:
        A, B = A[rows], B[rows]
    block = Layout(layout.sides, (stop - start, *layout.shape[1:]))
    return block.delta(A, B) * adapter.scale


def round_once(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """float64 values rounded to nearest-even in `dtype`.

    torch converts float64 to bfloat16 and float16 by way of float32, which rounds twice. Rounding to odd in between (the
    last bit of float32 set whenever something was lost) makes the second rounding see that (Boldo and Melquiond 2008).
    """
    if dtype in (torch.float64, torch.float32):
        return values.to(dtype)
    near = values.to(torch.float32)
    back = near.to(torch.float64)
    bits = near.view(torch.int32)
    away = back.abs() > values.abs()  # one step towards zero where float32 rounded away from it
    inexact = (back != values) & near.isfinite()
    odd = torch.where(inexact, (bits - away.to(torch.int32)) | 1, bits)
    return odd.view(torch.float32).to(dtype)


def _put_away(module: nn.Module, originals: dict[str, Any], final: bool) -> None:
    children = {
        child: (adapter, child in module._modules)
        for child, adapter in ({} if isinstance(module, Adapter) else wiring.adapters_of(module)).items()
    }
    for child in children:
        wiring.detach(module, child)
    if final:
        wiring.unmark(module)
    elif children:
        module.__dict__[wiring.FOLDED] = _Kept(children, originals)


def _take_back(module: nn.Module, kept: _Kept) -> None:
    with torch.no_grad():
        for attribute, original in kept.originals.items():
            current = module._parameters[attribute]
            assert current is not None
            if isinstance(original, nn.Parameter):
                module._parameters[attribute] = original
            else:
                current.detach().copy_(original)
    for child, (adapter, registered) in kept.children.items():
        parameter = module._parameters[wiring.attribute_of(child)]
        assert parameter is not None
        wiring.attach(module, child, adapter.to(parameter.device), registered)
