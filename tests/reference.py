"""What the tests hold lora_fx against: plain torch, written without a line of lora_fx's own algebra."""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.func import functional_call

from lora_fx.checks import oracles
from lora_fx.checks.oracles import bits as bits
from lora_fx.checks.oracles import graph_lines as graph_lines
from lora_fx.checks.verification import cast_inputs
from lora_fx.graph.capture import Inputs, normalize_inputs, output_tensors, undisturbed
from lora_fx.model import wiring

_LETTERS = "abcdefghijklmnopqstuvwxyz"  # without r, the rank


def fill(model: nn.Module, seed: int = 0) -> None:
    """Random factors with a delta about as large as a usual weight: B ≠ 0, and every feature is moved."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for adapter in distinct_adapters(model):
            for factor, fan in ((adapter.A, adapter.A.shape[-1]), (adapter.B, adapter.rank)):
                factor.copy_(torch.randn(factor.shape, generator=generator, dtype=torch.float64) * 0.5 / math.sqrt(fan))


def distinct_adapters(model: nn.Module) -> list:
    return list(dict.fromkeys(adapter for *_, adapter in wiring.find_adapters(model)))


def delta(adapter) -> torch.Tensor:
    """scale · B·A, contracted by einsum over the rank straight into the weight's axes."""
    sides, shape = adapter.layout.sides, adapter.layout.shape
    axes = dict(enumerate(_LETTERS[: len(shape)]))
    pick = {side: [k for k, s in enumerate(sides) if s == side] for side in "boi"}
    label = {side: "".join(axes[k] for k in ks) for side, ks in pick.items()}
    size = {side: [shape[k] for k in ks] for side, ks in pick.items()}
    A = adapter.A.detach().double().reshape(*size["b"], adapter.rank, *size["i"])
    flat = torch.zeros(*size["b"], math.prod(size["o"]), adapter.rank, dtype=torch.float64)
    rows = range(math.prod(size["o"])) if adapter.rows is None else adapter.rows
    flat[..., list(rows), :] = adapter.B.detach().double().reshape(*size["b"], -1, adapter.rank)
    B = flat.reshape(*size["b"], *size["o"], adapter.rank)
    equation = f"{label['b']}{label['o']}r,{label['b']}r{label['i']}->{''.join(axes.values())}"
    scale = adapter.alpha / (math.sqrt(adapter.rank) if adapter.scaling == "rslora" else adapter.rank)
    return scale * torch.einsum(equation, B, A)


def dense_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """name → W + Σ scale · B·A of every adapted parameter, in float64."""
    sums: dict[str, torch.Tensor] = {}
    for path, owner, child, adapter in wiring.find_adapters(model):
        attribute = wiring.attribute_of(child)
        name = f"{path}.{attribute}".lstrip(".")
        if adapter.active:
            start = sums.get(name, owner._parameters[attribute].detach().double())
            sums[name] = start + delta(adapter)
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
    return a.keys() == b.keys() and all(oracles.same_bits(a[k], b[k]) for k in a)


def classes(model: nn.Module) -> dict[str, type]:
    return {name: type(module) for name, module in model.named_modules()}
