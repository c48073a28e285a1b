"""Adapters that nobody has trained: out of others (`combine`), out of two models (`extract`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from lora_fx.deltas.nearest import Approximation
from lora_fx.model.training import REFUSE
from lora_fx.passes.base import Pass
from lora_fx.passes.combine import EXACT, Combine
from lora_fx.passes.extract import Extract
from lora_fx.passes.insert import Check, Insert, Rewrite
from lora_fx.passes.pipeline import Pipeline
from lora_fx.passes.planning import Schedule


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
        adapters: name → weight, finite, negative too; of a weight of 0 nothing is taken. The strength that an adapter
            happens to act with has no part in it.
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


def extract(
    base: nn.Module,
    tuned: nn.Module,
    rank: int,
    example_inputs: Any = None,
    *,
    name: str = "default",
    beside: str = REFUSE,
    ignore: Sequence[str] = (),
    check: bool = True,
) -> Approximation:
    """Insert into `base` the adapter of this rank that is nearest to what `tuned` has become, in place.

    Of each weight that differs and multiplies, D = W_tuned − W: the leading singular directions of D, in float64; D is
    there in blocks of rows only. It acts, and trains, as after `apply`; save it, and the tuned model is `base` and a
    small file. For checkpoints on disk there is `extract_adapter`.

    Args:
        tuned: a model of the same parameters and buffers, by name and shape; it is left as it is. Fold its adapters
            for good first, if it has some.
        rank: of every weight; of one with fewer rows or columns as many as it has.
        example_inputs: as in `apply`: what they show is which weights multiply, and how.
        name: of the new adapter.
        beside: what to do about what else differs, norms, biases and weights that the inputs do not reach:
            ``"refuse"`` it by name; keep it whole, as adapters of the kind ``"full"``; or ``"ignore"`` it. Buffers,
            which no adapter has, are refused unless ignored.
        ignore: patterns of names that may differ, and stay as they are in the base.
        check: as in `apply`.

    Returns:
        For each weight ‖D‖ and the share of its energy that the adapter holds, measured; and what is left out.

    Raises:
        PlanError: the two are of different architectures (the first difference is named), nothing differs, something
            differs that nobody has said may be left out, or a weight cannot be adapted.
        LoraFxError: as in `apply`. The model is bitwise what it was, each time.
    """
    passes = extracting(tuned, rank, example_inputs, name=name, beside=beside, ignore=ignore, check=check)
    return Pipeline("extract", passes)(base).facts[Approximation]


def extracting(
    tuned: nn.Module,
    rank: int,
    example_inputs: Any = None,
    *,
    name: str = "default",
    beside: str = REFUSE,
    ignore: Sequence[str] = (),
    check: bool = True,
) -> tuple[Pass, ...]:
    """The passes of `extract`."""
    first = Extract(tuned, rank, example_inputs, name, beside, tuple(ignore))
    return first, Schedule(), Insert(), Rewrite(), *([Check()] if check else [])
