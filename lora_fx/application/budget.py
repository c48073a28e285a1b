"""AdaLoRA's budget of ranks (Zhang et al., ICLR 2023):   W' = W + s·P·Λ·Q,   and of all the λ the most important act.

    importance    S(λₖ) = s(λₖ) + mean s(P[:, k]) + mean s(Q[k, :])        of one singular value, its two vectors too
                  s(w)  = Ī(w)·Ū(w),   I(w) = |w·∂L/∂w|                    (equations 7 to 10)
                  Ī ← β₁·Ī + (1 − β₁)·I,   Ū ← β₂·Ū + (1 − β₂)·|I − Ī|
    budget        b(t) = b₀ first; then b_T + (b₀ − b_T)·(1 − t′)³, t′ from 0 to 1; then b_T     (equation 12)
    penalty       γ·Σ (‖PᵀP − I‖² + ‖QQᵀ − I‖²), Frobenius                  (equation 4)

A λ outside of the budget is set to 0, and may come back while the budget still falls: its vectors train on.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from lora_fx.deltas.adapter import Adapter
from lora_fx.errors import AdapterError
from lora_fx.passes.insert import Rewrite
from lora_fx.passes.pipeline import Pipeline
from lora_fx.passes.prune import Prune, of_kind

_TENSORS = ("P", "singular", "Q")


class Budget:
    """How many singular values act, over all sites of one `adalora` adapter, and which.

    Its place in a training step: ``(loss + budget.penalty()).backward(); optimizer.step(); budget.step()``, and then
    ``optimizer.zero_grad()``, for `step` reads the gradients. After the last one, `finish`.

    Args:
        model: adapted with ``kind="adalora"``; the rank that its rules gave is where the budget starts.
        ranks: how many singular values are left in the end, over all sites.
        steps: the number of training steps in all.
        warmup: steps at the beginning in which all of them act (the paper's t_i).
        settle: steps at the end in which they stay the same (t_f).
        every: steps from one choice to the next (Δ_T).
        sensitivity: β₁. uncertainty: β₂.
        orthogonality: γ.
        name: the adapter's name.

    Raises:
        AdapterError: there is no such adapter, or it is of another kind; a number is none that can be.
    """

    def __init__(
        self,
        model: nn.Module,
        ranks: int,
        steps: int,
        *,
        warmup: int = 0,
        settle: int = 0,
        every: int = 1,
        sensitivity: float = 0.85,
        uncertainty: float = 0.85,
        orthogonality: float = 0.1,
        name: str = "default",
    ) -> None:
        self.model, self.name = model, name
        self.adapters = {places[0].weight: adapter for adapter, places in of_kind(model, name).items()}
        """The first name of each weight → its adapter."""
        self.first = sum(adapter.rank for adapter in self.adapters.values())
        self.ranks, self.steps, self.warmup, self.settle, self.every = ranks, steps, warmup, settle, every
        self.sensitivity, self.uncertainty, self.orthogonality = sensitivity, uncertainty, orthogonality
        self.taken = 0
        """Steps so far."""
        self._check()
        self._means = {label: torch.zeros_like(p) for label, p in self._theta()}
        self._doubts = {label: torch.zeros_like(p) for label, p in self._theta()}
        self._alive = {site: torch.ones(a.rank, dtype=torch.bool) for site, a in self.adapters.items()}

    def _check(self) -> None:
        whole = {"ranks": (1, self.first), "steps": (1, math.inf), "warmup": (0, self.steps), "every": (1, math.inf)}
        whole["settle"] = (0, self.steps)
        for what, (least, most) in whole.items():
            value = getattr(self, what)
            if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
                raise self._error(f"{what}={value!r}", f"a whole number from {least} to {most:g}")
        if self.warmup + self.settle > self.steps:
            raise self._error(f"warmup={self.warmup} and settle={self.settle}", f"at most steps={self.steps} together")
        for what, most in {"sensitivity": 1.0, "uncertainty": 1.0, "orthogonality": math.inf}.items():
            value = getattr(self, what)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < most:
                raise self._error(f"{what}={value!r}", f"a number from 0 to below {most:g}")

    def _error(self, reason: str, remedy: str) -> AdapterError:
        place = f"the budget of adapter {self.name!r}, which starts with {self.first} ranks"
        return AdapterError(f"{reason} cannot be", place=place, remedy=f"give {remedy}")

    def _theta(self) -> list[tuple[tuple[str, str], nn.Parameter]]:
        return [((site, t), a.get_parameter(t)) for site, a in self.adapters.items() for t in _TENSORS]

    def at(self, step: int) -> int:
        """b(t): how many singular values act after so many steps."""
        if step >= self.steps - self.settle:
            return self.ranks
        if step <= self.warmup:
            return self.first
        left = 1 - (step - self.warmup) / (self.steps - self.settle - self.warmup)
        return self.ranks + int((self.first - self.ranks) * left**3)

    def penalty(self) -> torch.Tensor:
        """What to add to the loss, so that P and Q become orthogonal: γ·Σ (‖PᵀP − I‖² + ‖QQᵀ − I‖²)."""
        parts = []
        for adapter in self.adapters.values():
            for gram in (adapter.get_parameter("P").mT @ adapter.get_parameter("P"),
                         adapter.get_parameter("Q") @ adapter.get_parameter("Q").mT):  # fmt: skip
                parts.append((gram - torch.eye(adapter.rank, dtype=gram.dtype, device=gram.device)).square().sum())
        device = parts[0].device
        return self.orthogonality * torch.stack([part.to(device, torch.float32) for part in parts]).sum()

    @torch.no_grad()
    def step(self) -> int:
        """After the optimizer's step, before its gradients go: measure, choose, and set the rest to 0.

        Returns:
            How many singular values act.

        Raises:
            AdapterError: an adapter has no gradient, or one that is not finite; nothing was changed.
        """
        gradients = {label: self._gradient(label, p) for label, p in self._theta()}
        self.taken += 1
        for label, p in self._theta():
            now, mean, doubt = (p * gradients[label]).abs(), self._means[label], self._doubts[label]
            mean.lerp_(now, 1 - self.sensitivity)
            doubt.lerp_((now - mean).abs(), 1 - self.uncertainty)
        budget, settled = self.at(self.taken), self.taken > self.steps - self.settle
        if (self.taken % self.every == 0 and not settled) or self.taken == self.steps - self.settle:
            self._choose(budget)
        for site, adapter in self.adapters.items():
            singular = adapter.get_parameter("singular")
            singular.mul_(self._alive[site].to(singular.device, singular.dtype).unsqueeze(-1))
        return self.acting

    def _gradient(self, label: tuple[str, str], parameter: nn.Parameter) -> torch.Tensor:
        found = parameter.grad
        if found is not None and bool(found.isfinite().all()):
            return found
        reason, remedy = "has no gradient", "call step after backward, before zero_grad"
        if found is not None:
            reason, remedy = "has a gradient with NaN or Inf", "skip the step, as its optimizer has to"
        raise AdapterError(f"{label[1]} {reason}", place=f"{label[0]}, adapter {self.name!r}", remedy=remedy)

    def _choose(self, budget: int) -> None:
        """The most important ones of all sites; of equals the first, so that there are never more."""
        scores = torch.cat([self._score(site, adapter).cpu() for site, adapter in self.adapters.items()])
        best = torch.zeros(len(scores), dtype=torch.bool)
        best[scores.argsort(descending=True, stable=True)[:budget]] = True
        each = best.split([adapter.rank for adapter in self.adapters.values()])
        self._alive = dict(zip(self.adapters, each, strict=True))

    def _score(self, site: str, adapter: Adapter) -> torch.Tensor:
        """S of each rank of a site, (rank,); of experts the mean."""
        own = {t: self._means[site, t] * self._doubts[site, t] for t in _TENSORS}
        total = own["singular"].squeeze(-1) + own["P"].mean(-2) + own["Q"].mean(-1)
        return total.reshape(-1, adapter.rank).mean(0)

    @property
    def acting(self) -> int:
        """How many singular values the budget lets act now."""
        return sum(int(alive.sum()) for alive in self._alive.values())

    def finish(self) -> nn.Module:
        """Take the ranks that do not act out of the model: out of its files, its folds and its forwards.

        A site of which none is left loses its adapter. What trains then are new parameters.

        Raises:
            AdapterError: nothing would be left, or a singular value is not finite; the model is bitwise what it was.
        """
        return Pipeline("prune", (Prune(self.name), Rewrite()))(self.model).model

    def state_dict(self) -> dict[str, Any]:
        """All that a later run goes on from, beside the model and the optimizer."""
        return {
            "taken": self.taken,
            "means": {".".join(label): t.clone() for label, t in self._means.items()},
            "doubts": {".".join(label): t.clone() for label, t in self._doubts.items()},
            "alive": {site: alive.clone() for site, alive in self._alive.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there.

        Raises:
            AdapterError: it is the state of a budget over other adapters; nothing was changed.
        """
        mine = self.state_dict()
        for part in ("means", "doubts", "alive"):
            theirs = {site: tuple(t.shape) for site, t in state[part].items()}
            if theirs != {site: tuple(t.shape) for site, t in mine[part].items()}:
                raise self._error(f"a state over {len(theirs)} tensors of other sites or shapes", "that of this model")
        self.taken = int(state["taken"])
        for part, own in (("means", self._means), ("doubts", self._doubts)):
            for label, tensor in own.items():
                tensor.copy_(state[part][".".join(label)])
        self._alive = {site: state["alive"][site].clone() for site in self._alive}
