"""Starts in what W is made of:   δ = s·(B·A − B₀·A₀),   B = B₀ and A = A₀ at the start.

PiSSA and OLoRA train the leading directions of a weight, and freeze the rest. Their papers write that as a base that is
changed, W − s·B₀·A₀, with a plain B·A beside it. Here W stays what it is, and the same difference is computed as

    B·A − B₀·A₀  =  B·(A − A₀) + (B − B₀)·A₀  =  [B  B − B₀]·[A − A₀; A₀]

that is as factors of twice the rank. At the start one factor of each product is 0, so δ is 0 to the bit; the gradients
of A and B are those of B·A; and they fold, and go into files, as every product of factors does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from lora_fx.errors import KindError


def starts(shapes: Mapping[str, Sequence[int]]) -> dict[str, Sequence[int]]:
    """A0 and B0, of the shapes of A and B."""
    return {f"{name}0": shape for name, shape in shapes.items()}


def factors(theta: Any) -> tuple[Any, Any]:
    """[A − A₀; A₀] and [B  B − B₀]."""
    return torch.cat((theta.A - theta.A0, theta.A0), -2), torch.cat((theta.B, theta.B - theta.B0), -1)


def pissa(theta: Any, weight: torch.Tensor) -> None:
    """A₀ = √(S/s)·Vᵀ and B₀ = U·√(S/s) of the leading singular values (section 3, equations 2 and 3); with `niter` by
    that many rounds of subspace iteration, on random directions, instead of a whole decomposition."""
    niter, matrix = theta.niter, weight.to(theta.A.dtype)
    if niter is not None and (isinstance(niter, bool) or not isinstance(niter, int) or niter < 0):
        raise KindError(
            f"niter={niter!r} is no number of rounds", place="kind='pissa'", remedy="say 4, or leave it out"
        )
    if not theta.scale:
        reason = "its scale is 0, and the leading part of W is s·B₀·A₀"
        raise KindError(reason, place="kind='pissa'", remedy="give it another alpha")
    if niter is None:
        U, S, Vt = torch.linalg.svd(matrix, full_matrices=False)
    else:
        U, S, V = torch.svd_lowrank(matrix, theta.rank, niter)
        Vt = V.mT
    root = (S[..., : theta.rank] / abs(theta.scale)).sqrt()
    sign = 1.0 if theta.scale > 0 else -1.0
    _from_here(theta, root[..., None] * Vt[..., : theta.rank, :], sign * U[..., : theta.rank] * root[..., None, :])


def olora(theta: Any, weight: torch.Tensor) -> None:
    """A₀ the first rows of R, B₀ the first columns of Q (algorithm 1), whatever the scale."""
    Q, R = torch.linalg.qr(weight.to(theta.A.dtype))
    _from_here(theta, R[..., : theta.rank, :], Q[..., : theta.rank])


def _from_here(theta: Any, A: torch.Tensor, B: torch.Tensor) -> None:
    for name, start in (("A", A), ("A0", A), ("B", B), ("B0", B)):
        getattr(theta, name).copy_(start)
