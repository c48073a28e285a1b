"""What the tests hold lora_fx against: plain torch and the checks' own δ, without a line of the branch algebra."""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.func import functional_call

import lora_fx
from lora_fx import Rule
from lora_fx.analysis.biases import Biases
from lora_fx.checks.oracles import delta as delta
from lora_fx.checks.verification import cast_inputs, scatter
from lora_fx.graph.capture import Inputs, normalize_inputs, output_tensors
from lora_fx.graph.own_state import undisturbed
from lora_fx.model.inventory import inventory
from lora_fx.testing import comparing
from lora_fx.testing.comparing import bits as bits
from lora_fx.testing.comparing import graph_lines as graph_lines


def fill(model: nn.Module, seed: int = 0) -> None:
    """Random θ with a delta about as large as a usual weight: B ≠ 0, and every feature is moved."""
    generator = torch.Generator().manual_seed(seed)
    weights = {place.adapter: place.parameter for place in inventory(model).places}
    with torch.no_grad():
        for adapter in distinct_adapters(model):
            if adapter.kind.name != "lora":
                scatter(adapter, weights[adapter], generator, 0.5)
                continue
            for factor, fan in ((adapter.A, adapter.A.shape[-1]), (adapter.B, adapter.rank)):
                factor.copy_(torch.randn(factor.shape, generator=generator, dtype=torch.float64) * 0.5 / math.sqrt(fan))


def scattered(model: nn.Module, seed: int = 0, share: float = 0.5) -> nn.Module:
    """θ of every adapter, of whatever kind, away from where it starts by this share of the weight."""
    generator = torch.Generator().manual_seed(seed)
    for place in inventory(model).places:
        if place.child in place.owner._modules:
            scatter(place.adapter, place.parameter, generator, share)
    return model


def distinct_adapters(model: nn.Module) -> list:
    return list(dict.fromkeys(place.adapter for place in inventory(model).places))


def dense_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """name → W + Σ scale · B·A of every adapted parameter, in float64."""
    sums: dict[str, torch.Tensor] = {}
    for place in inventory(model).places:
        if place.adapter.active:
            start = sums.get(place.weight, place.parameter.detach().double())
            sums[place.weight] = start + delta(place.parameter, place.adapter)
    return sums


def run_dense(base: nn.Module, weights: dict[str, torch.Tensor], inputs: Inputs, seed: int = 0) -> list[torch.Tensor]:
    """The base model with these weights in the place of its own."""
    dtypes = {name: p.dtype for name, p in base.named_parameters(remove_duplicate=False)}
    weights = {name: w.to(dtypes[name]) for name, w in weights.items()}
    kept = [(module, dict(module._parameters)) for module in base.modules()]
    try:
        with undisturbed(base), torch.no_grad():
            torch.manual_seed(seed)
            return [t.clone() for t in _called(base, weights, inputs)]
    finally:
        for module, own in kept:  # torch's functional_call leaves other numbers in a module that has two names
            module._parameters.update(own)


def _called(base: nn.Module, weights: dict[str, torch.Tensor], inputs: Inputs) -> list[torch.Tensor]:
    # Each owner is named on its own. (With tie_weights=True a module under two names is left with a plain tensor.)
    return output_tensors(functional_call(base, dict(weights), inputs.args, inputs.kwargs, tie_weights=False))


def in_double(model: nn.Module, example_inputs) -> tuple[nn.Module, Inputs]:
    """The model and its inputs in float64."""
    return model.double(), cast_inputs(normalize_inputs(model, example_inputs), torch.float64)


def same_bits(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(comparing.same_bits(a[k], b[k]) for k in a)


def classes(model: nn.Module) -> dict[str, type]:
    return {name: type(module) for name, module in model.named_modules()}


EVERYTHING = Rule(
    when=lambda site: not site.weight.problem and min(site.in_features, site.out_features) > 1, rank=2, alpha=3
)


def everything(base: torch.nn.Module, inputs, kind: str) -> Rule:
    """All that can take an adapter of the kind."""
    if kind != "bias":
        settings = {"rank": 2, "alpha": 3} if kind in ("lora", "dora", "adalora") else {}
        return Rule(when=EVERYTHING.matches, kind=kind, **settings)
    biases = Biases(program := lora_fx.capture(base, inputs))
    owned = {use.weight.name: [biases.of(u) for u in use.weight.uses if u.multiplies] for use in program.uses}
    with_bias = {name for name, own in owned.items() if own and None not in own and len({*own}) == 1}

    return Rule(when=lambda site: EVERYTHING.matches(site) and site.weight.name in with_bias, kind=kind)
