"""The fold of a weight with deltas that are no products of factors:   W' = round(W + Σ δ(W, θ))

The sum is taken in float64 and rounded once to W's own dtype. How far float64 may be from the real sum depends on the
kind; `lora_fx.checks.oracles.SHARE` is what checks allow for it. A δ that is a function of W cannot be taken out of the
folded weight again, so the way back keeps W.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch

from lora_fx.changes import Undo
from lora_fx.deltas.adapter import Adapter
from lora_fx.deltas.exact_sum import Found
from lora_fx.deltas.rounding import Scratch, checksum, round_once, same
from lora_fx.errors import FoldError


def rounded_sum(weight: torch.Tensor, adapters: Sequence[Adapter], dtype: torch.dtype, name: str) -> torch.Tensor:
    """W + Σ δ(W, θ) as a new tensor, rounded once to `dtype`, which may be narrower than W's own.

    Raises:
        FoldError: a number is not finite, or does not fit into the dtype.
    """
    rounded = _rounded(weight, adapters, dtype)
    _refuse_infinite(bool(rounded.isfinite().all()), adapters, dtype, name)
    return rounded


def _rounded(weight: torch.Tensor, adapters: Sequence[Adapter], dtype: torch.dtype) -> torch.Tensor:
    plain = weight.detach().to(torch.float64)
    total = plain.clone()
    with torch.no_grad():
        for adapter in adapters:
            wide = {tensor: p.to(plain.device, torch.float64) for tensor, p in adapter.named_parameters()}
            total += adapter.delta(plain, adapter.theta_of(wide))
    return round_once(total, dtype)


def _refuse_infinite(finite: bool, adapters: Sequence[Adapter], dtype: torch.dtype, name: str) -> None:
    if not finite:
        kinds = ", ".join(f"{adapter.name!r} ({adapter.kind.name})" for adapter in adapters)
        raise FoldError(
            f"W + δ is not finite in {dtype}, with δ of the adapters {kinds}",
            place=name,
            remedy="look for NaN and Inf in the weight and in the adapters; train with less, or take a wider dtype",
        )


@dataclass(frozen=True)
class RoundedSum:
    """W + Σ δ(W, θ), to be written into the weight."""

    weight: torch.Tensor
    adapters: tuple[Adapter, ...]
    name: str
    unread: torch.Tensor
    """Whether all of it is finite, on its device: what `checked` asks for."""

    @staticmethod
    def of(weight: torch.Tensor, adapters: tuple[Adapter, ...], name: str) -> RoundedSum:
        return RoundedSum(weight, adapters, name, _rounded(weight, adapters, weight.dtype).isfinite().all())

    def checked(self, finite: Sequence[float], sums: Sequence[float] | None) -> RoundedSum:
        """Itself.

        Raises:
            FoldError: a number is not finite, or does not fit into the dtype.
        """
        _refuse_infinite(all(finite), self.adapters, self.weight.dtype, self.name)
        return self

    def fold(self, scratch: Scratch, undo: list[Undo], founds: Sequence[Found | None]) -> KeptWeight:
        """Write the sum; what comes is the way back, and `undo` gets it."""
        folded, before = self._folded(), self.weight.clone()
        undo.append(partial(self.weight.copy_, before))
        self.weight.copy_(folded)
        return KeptWeight(before, checksum(folded))

    def fold_for_good(self, scratch: Scratch, founds: Sequence[Found | None]) -> None:
        """Write the sum, and keep nothing."""
        self.weight.copy_(self._folded())

    def _folded(self) -> torch.Tensor:
        return _rounded(self.weight, self.adapters, self.weight.dtype)


@dataclass(frozen=True)
class KeptWeight:
    """The way from the folded weight back: the original one."""

    original: torch.Tensor
    folded: torch.Tensor
    """Checksum of the folded weight: it must still be what it was."""

    @property
    def bytes(self) -> int:
        return self.original.numel() * self.original.element_size()

    def starts_at(self, weight: torch.Tensor) -> torch.Tensor:
        """The folded weight is bitwise what the fold has made it; the answer is on its device."""
        if weight.dtype != self.original.dtype:
            return torch.zeros((), dtype=torch.bool, device=weight.device)
        return same(checksum(weight), self.folded)

    def take_back(self, weight: torch.Tensor, undo: list[Undo]) -> torch.Tensor:
        """Write the weight that was; `undo` gets the folded one. It is the one that was, as what comes says."""
        undo.append(partial(weight.copy_, weight.clone()))
        weight.copy_(self.original)
        return torch.ones((), dtype=torch.bool, device=weight.device)
