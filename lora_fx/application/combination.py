"""Adapters out of adapters: `combine`."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from lora_fx.deltas.nearest import Approximation
from lora_fx.passes.base import Pass
from lora_fx.passes.combine import EXACT, Combine
from lora_fx.passes.pipeline import Pipeline


def combine(
    model: nn.Module,
    adapters: Mapping[str, float],
    name: str,
    *,
    method: str = EXACT,
    rank: int | None = None,
    density: float | None = None,
    seed: int = 0,
) -> Approximation:
    """Make a new adapter of others in the model: δ = Σ wᵢ·δᵢ. It is there, and does not act until it is activated.

        lora_fx.combine(model, {"style": 0.7, "task": 0.3}, name="both")
        lora_fx.activate(model, "both")

    A weight that only some of them adapt gets the sum of those. What has factors (`lora`, `adalora`, a low-rank kind of
    your own) becomes `lora` with the scale 1: different ranks, alphas and rsLoRA's scaling are in the numbers. Beside
    these, `full` is summed into `full`, `bias` into `bias`, by each method without a loss of rank; another kind is
    refused. The new adapter has no dropout, and the dtype of the widest of its sources.

    Args:
        adapters: name → weight, finite, negative too; of a weight of 0 nothing is taken.
        name: of the new adapter.
        method: ``"exact"``: the factors one after the other, B = [… wᵢ·sᵢ·Bᵢ …], as wide as all ranks together; each
            element of B is rounded once, and that is all. ``"svd"``: the nearest to that sum of a rank, found from the
            factors, without making δ. ``"ties"`` (Yadav et al., NeurIPS 2023) keeps of each δᵢ the largest elements,
            elects for each element the sign of their sum, and takes the mean of wᵢ·δᵢ over those that have it;
            ``"dare"`` (Yu et al., ICML 2024) drops elements of each δᵢ at random, rescales the others, and sums: both
            then take the nearest of a rank. They need δ of one weight at a time, for each adapter and once more, in
            float64. PEFT calls these three ``svd``, ``ties_svd`` and ``dare_linear_svd``; its ``ties`` and
            ``dare_linear`` do the same to A and to B apart, whose product is another thing.
        rank: of the new adapter, for all methods but ``"exact"``; None for the largest of those that it is made of.
        density: which share of the elements ``"ties"`` and ``"dare"`` keep, above 0, up to 1.
        seed: of what ``"dare"`` drops.

    Returns:
        For each weight ‖D‖ of what the method has made of the deltas, and the share of its energy that the adapter
        holds: 1 for ``"exact"``.

    Raises:
        AdapterError: there is no adapter of a name, the new name is taken, an option is none, a kind has no such sum,
            or numbers are not finite.
        PlanError: the model is folded.
        LoraFxError: a thread is inside a forward of the model. The model is bitwise what it was, each time.
    """
    passes = combining(adapters, name, method=method, rank=rank, density=density, seed=seed)
    return Pipeline("combine", passes)(model).facts[Approximation]


def combining(
    adapters: Mapping[str, float],
    name: str,
    *,
    method: str = EXACT,
    rank: int | None = None,
    density: float | None = None,
    seed: int = 0,
) -> tuple[Pass, ...]:
    """The passes of `combine`."""
    return (Combine(adapters, name, method, rank, density, seed),)
