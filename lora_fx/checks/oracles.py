"""What W + Σ δ is: one definition for every check, which shares no algebra with branches, folds and files.

δ          =  strength · scale · Σᵣ B[…, r] · A[…, r]     in float64, over the weight's own axes
folded[k]  =  round(W[k] + Σ δ[k])             with an error bound, as fractions where that cannot tell
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

import torch

from lora_fx.deltas.adapter import Adapter
from lora_fx.deltas.kinds import Theta

_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
_UNIT = 2.0**-53
_PART = 2**18  # elements that are judged at a time: in a CPU's caches


def delta(weight: torch.Tensor, *adapters: Adapter) -> torch.Tensor:
    """Σ δ of adapters of this weight, in float64 and the weight's own axes: of low-rank ones from their plain fields
    alone, of others by what their kind says δ is."""
    first, *others = (_delta(weight, adapter) for adapter in adapters)
    return sum(others, start=first)


def _delta(weight: torch.Tensor, adapter: Adapter) -> torch.Tensor:
    if not adapter.kind.is_delta:  # the weight stays what it is
        return torch.zeros(weight.shape, dtype=torch.float64, device=weight.device)
    if adapter.kind.low_rank:  # it does not depend on W
        return _Product.of(adapter).delta()
    assert adapter.kind.delta is not None
    with torch.no_grad():
        own = adapter.kind.delta(adapter.matrix(weight.detach().to(torch.float64)), wide(adapter))
        return adapter.layout.to_weight(adapter.embedded(own)) * adapter.strength


def moved_by(x: torch.Tensor, *adapters: Adapter) -> torch.Tensor:
    """Σ x·δᵀ of adapters of low rank of one matrix, (rows, in) → (rows, out), in float64, without making a δ."""
    first, *others = (_Product.of(adapter).times(x) for adapter in adapters)
    return sum(others, start=first)


def delta_size(weight: torch.Tensor, adapter: Adapter) -> float:
    """The root mean square of δ; of factors without making it: ‖B·A‖² = Σ (Bᵀ·B) ⊙ (A·Aᵀ)."""
    if not adapter.kind.low_rank:
        own = delta(weight, adapter)
        return float(own.square().mean().sqrt()) if own.numel() else 0.0
    assert adapter.kind.factors is not None
    A, B = (factor.detach() for factor in adapter.kind.factors(wide(adapter)))
    squares = ((B.mT @ B) * (A @ A.mT)).sum().clamp_min(0)
    return abs(adapter.scale * adapter.strength) * math.sqrt(float(squares) / max(weight.numel(), 1))


def wide(adapter: Adapter) -> Theta:
    """θ in float64."""
    return adapter.theta_of({name: getattr(adapter, name).detach().to(torch.float64) for name in adapter.tensors})


def misrounded(weight: torch.Tensor, folded: torch.Tensor, adapters: Sequence[Adapter]) -> torch.Tensor:
    """Flat indices of the elements of `folded` that are not W + Σ δ, rounded once to W's dtype.

    float64 has no wider type beside it: there a sum of n terms may be off by n roundings of what is added up. A δ that
    is no product of factors is known in float64 only: an element is right where it is within `SHARE` of that.
    """
    if not all(adapter.kind.low_rank for adapter in adapters):
        return _off(folded, weight.detach().to(torch.float64), delta(weight, *adapters))
    products, found = [_Product.of(adapter) for adapter in adapters], []
    row = weight[0].numel() if len(weight) else 0
    step = max(1, _PART // max(row, 1))
    for start in range(0, len(weight), step):
        size = min(step, len(weight) - start)
        parts = [product.part(start, size) for product in products]
        wrong = _misrounded(weight.narrow(0, start, size), folded.narrow(0, start, size), adapters, parts)
        found.append(wrong + start * row)
    return torch.cat(found) if found else torch.tensor([], dtype=torch.long)


def _misrounded(
    weight: torch.Tensor, folded: torch.Tensor, adapters: Sequence[Adapter], products: Sequence[_Product]
) -> torch.Tensor:
    """The same for some indices of the first axis, with the products' parts of these."""
    plain = weight.detach().to(torch.float64)
    total = sum((product.delta() for product in products), start=plain)
    size = sum((product.size() for product in products), start=plain.abs())
    error = sum(2 * adapter.width + 2 for adapter in adapters) * _UNIT * size
    value = folded.detach().to(torch.float64)
    if weight.dtype == torch.float64:
        return (~((value - total).abs() <= 2 * error)).reshape(-1).nonzero().squeeze(1)
    low, high = (_step(folded, by).to(torch.float64) for by in (-1, 1))
    sure = ((low + value) / 2 + error < total) & (total < (value + high) / 2 - error)  # midpoints are exact in float64
    doubtful = (~sure).reshape(-1).nonzero().squeeze(1)
    wrong = [k for k in doubtful.tolist() if not _is_nearest(k, plain, folded, products)]
    return torch.tensor(wrong, dtype=torch.long)


#: of the largest element and the largest δ: what float64 may lose where a δ is computed in another order
SHARE = 2.0**-46


def _off(folded: torch.Tensor, plain: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
    """Flat indices of what is further than half a step from the float64 sum, and from what float64 may lose of it."""
    total, value = plain + own, folded.detach().to(torch.float64)
    lost = SHARE * float(plain.abs().max() + own.abs().max()) if plain.numel() else 0.0
    low, high = (_step(folded, by).to(torch.float64) for by in (-1, 1))
    right = ((low + value) / 2 - lost <= total) & (total <= (value + high) / 2 + lost)
    return (~right).reshape(-1).nonzero().squeeze(1)


def grouped_mm(
    left: torch.Tensor,
    right: torch.Tensor,
    offs: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """`torch.nn.functional.grouped_mm` in any dtype: its kernel takes no float64.

    Args:
        offs: where each group ends: in the rows of `left`, in the columns of `right`, or, where both are matrices, in
            what they are summed over. Rows and columns beyond the last one are 0.
    """
    if offs is None:
        return left @ right if bias is None else left @ right + bias
    ends = offs.tolist()
    spans = [slice(a, b) for a, b in zip([0, *ends], ends, strict=False)]
    if left.ndim == right.ndim == 2:
        return torch.stack([left[:, span] @ right[span] for span in spans])
    out = left.new_zeros(left.shape[-2], right.shape[-1])
    for k, span in enumerate(spans):
        part = left[span] @ right[k] if right.ndim == 3 else left[k] @ right[:, span]
        out[(span,) if right.ndim == 3 else (slice(None), span)] = part if bias is None else part + bias[k]
    return out


@dataclass(frozen=True)
class _Product:
    """One δ: two factors in float64 over the weight's own axes, of size 1 where a factor has none; the rank is last."""

    scale: float
    B: torch.Tensor
    A: torch.Tensor
    sides: str
    """Of each axis of the weight, ``b``, ``o`` or ``i``."""

    @classmethod
    def of(cls, adapter: Adapter) -> _Product:
        sides, shape, rank = adapter.layout.sides, adapter.layout.shape, adapter.width
        axes = {side: [k for k, s in enumerate(sides) if s == side] for side in "boi"}
        size = {side: [shape[k] for k in own] for side, own in axes.items()}

        def over_axes(factor: torch.Tensor, own: str, other: str) -> torch.Tensor:
            order = [*axes["b"], *axes[own], *axes[other]]
            split = factor.reshape(*size["b"], *size[own], *[1] * len(size[other]), rank)
            return split.permute(*(order.index(k) for k in range(len(order))), len(order))

        assert adapter.kind.factors is not None
        A, B = (factor.detach() for factor in adapter.kind.factors(wide(adapter)))
        if adapter.rows is not None:
            whole = B.new_zeros(*B.shape[:-2], math.prod(size["o"]), rank)
            whole[..., list(adapter.rows), :] = B
            B = whole
        scale = adapter.strength * (adapter.alpha / _divisor(adapter))
        return cls(scale, over_axes(B, "o", "i"), over_axes(A.mT, "i", "o"), sides)

    def delta(self) -> torch.Tensor:
        return self._sum(self.B, self.A).mul_(self.scale)

    def part(self, start: int, size: int) -> _Product:
        """Of these indices of the first axis."""
        B, A = (f.narrow(0, start, size) if f.shape[0] > 1 else f for f in (self.B, self.A))
        return replace(self, B=B, A=A)

    def times(self, x: torch.Tensor) -> torch.Tensor:
        """x·δᵀ of a matrix."""
        B, A = (factor.reshape(-1, factor.shape[-1]).to(x.device) for factor in (self.B, self.A))
        return (x @ A @ B.mT).mul_(self.scale)

    def size(self) -> torch.Tensor:
        """The same of absolute values: no partial sum is larger."""
        return abs(self.scale) * self._sum(self.B.abs(), self.A.abs())

    def _sum(self, B: torch.Tensor, A: torch.Tensor) -> torch.Tensor:
        """Σᵣ B[…, r] · A[…, r], as one matrix product of each batch: nothing of rank × the weight's size is made."""
        order = sorted(range(len(self.sides)), key=lambda k: "boi".index(self.sides[k]))
        sizes = [max(B.shape[k], A.shape[k]) for k in order]
        batch = math.prod(size for k, size in zip(order, sizes, strict=True) if self.sides[k] == "b")
        left, right = (factor.permute(*order, -1).reshape(batch, -1, factor.shape[-1]) for factor in (B, A))
        return (left @ right.mT).reshape(sizes).permute([order.index(k) for k in range(len(sizes))])

    def exact(self, index: tuple[int, ...], shape: Sequence[int]) -> Fraction:
        """One element, not rounded."""
        b, a = (factor.expand(*shape, -1)[index].tolist() for factor in (self.B, self.A))
        return Fraction(self.scale) * sum(Fraction(x) * Fraction(y) for x, y in zip(b, a, strict=True))


def _divisor(adapter: Adapter) -> float:
    return math.sqrt(adapter.rank) if adapter.scaling == "rslora" else adapter.rank


def _step(values: torch.Tensor, by: int) -> torch.Tensor:
    """The neighbours in the order of numbers: one float further from −∞, or towards it."""
    integers = _INTEGERS[values.dtype.itemsize]
    values = values.detach().contiguous()
    raw = values.view(integers).to(torch.int64)
    limit = torch.iinfo(integers).max
    ordered = torch.where(raw < 0, -(raw & limit), raw) + by  # −0 and +0 are one number
    raw = torch.where(ordered < 0, -ordered | torch.iinfo(integers).min, ordered)
    return raw.to(integers).view(values.dtype)


def _is_nearest(flat: int, plain: torch.Tensor, folded: torch.Tensor, products: Sequence[_Product]) -> bool:
    """Nearest, the even one of two as near, in exact arithmetic."""
    value = folded.detach().reshape(-1)[flat]
    if not bool(value.isfinite()):
        return False
    index = tuple(int(n) for n in torch.unravel_index(torch.tensor(flat), plain.shape))
    exact = Fraction(float(plain[index])) + sum(product.exact(index, plain.shape) for product in products)
    mine = abs(Fraction(float(value)) - exact)
    for by in (-1, 1):
        other = float(_step(value[None], by))
        if not math.isfinite(other):
            continue
        theirs = abs(Fraction(other) - exact)
        odd = int(value[None].view(_INTEGERS[value.itemsize])) & 1
        if theirs < mine or (theirs == mine and odd):
            return False
    return True
