"""The laws of a kind, over random models: what whoever writes one tests it with."""

from __future__ import annotations

import copy
import tempfile
from typing import Any

import torch
from torch import nn

from lora_fx.application import apply, certify
from lora_fx.checks.oracles import delta
from lora_fx.checks.verification import run, verify
from lora_fx.deltas.realisation import Realisation
from lora_fx.export.adapters.files import load_adapter, save_adapter
from lora_fx.graph.capture import Inputs, no_fast_paths, normalize_inputs, output_tensors
from lora_fx.model.inventory import inventory
from lora_fx.testing import comparing
from lora_fx.testing.assertions import assert_folds_exactly
from lora_fx.testing.strategies import adapters, models, rules_for


def assert_kind(kind: str, data: Any) -> None:
    """The laws of a registered kind hold on one random model, with rules and θ that are drawn for it.

    A freshly adapted model is the base, bit for bit; with another θ it is the model with W + δ in its weights, as is
    each use; each tensor of θ gets a gradient, and no other; the fold is W + δ rounded once, leaves the base's
    graph and is undone to the bit; saved and loaded it is the same model.

    Args:
        kind: its name.
        data: of ``@given(st.data())``.

    Raises:
        AssertionError: a law does not hold; it shows the model, as a program that can be pasted.
    """
    model, example = data.draw(models())
    base, inputs = model.requires_grad_(False), normalize_inputs(model, example)
    rules = data.draw(rules_for(base, example, kinds=(kind,)))
    adapted = apply(copy.deepcopy(base), rules, example)
    with no_fast_paths():
        same = all(map(torch.equal, run(base, inputs), run(adapted, inputs)))
    _require(same, "a freshly adapted model is not the base, bit for bit", base, rules)
    data.draw(adapters(sizes=(1.0, 0.25)))(adapted)
    report = verify(_dense(base, adapted), adapted, inputs)
    _require(bool(report), f"it is not the model with W + δ in its weights: {report}", base, rules)
    certificate = certify(adapted, inputs, gradients=False)
    right = all(row.error <= row.bound and row.realised != Realisation.MISSED for row in certificate.rows)
    _require(right and all(certificate.whole), f"a use is not W + δ:\n{certificate}", base, rules)
    _check_gradients(base, adapted, inputs, rules)
    assert_folds_exactly(adapted, example)
    fresh = copy.deepcopy(base)
    with tempfile.TemporaryDirectory() as folder:
        save_adapter(adapted, folder, peft=False)
        load_adapter(fresh, folder, example)
    before, after = comparing.bits(adapted), comparing.bits(fresh)
    changed = [name for name in before if name not in after or not comparing.same_bits(before[name], after[name])]
    _require(not changed and len(before) == len(after), f"{changed}: saved and loaded it is another one", base, rules)


def _dense(base: nn.Module, adapted: nn.Module) -> nn.Module:
    """The base with W + Σ δ in the place of each adapted weight; those that are read differently apart."""
    dense, twins = copy.deepcopy(base), dict[Any, nn.Parameter]()
    acting = inventory(adapted).by_weight(active=True)
    for name, adapters_there in acting.items():
        weight = base.get_parameter(name)
        key = id(weight), *map(id, adapters_there)
        if key not in twins:
            total = weight.detach().to(torch.float64) + delta(weight, *adapters_there)
            twins[key] = nn.Parameter(total.to(weight.dtype), requires_grad=False)
        path, _, attribute = name.rpartition(".")
        setattr(dense.get_submodule(path), attribute, twins[key])
    return dense


def _check_gradients(base: nn.Module, adapted: nn.Module, inputs: Inputs, rules: Any) -> None:
    """Where the base's own weight would get a gradient, each tensor of θ does."""
    free = copy.deepcopy(base).requires_grad_(True)
    try:
        reached = _with_gradient(free, inputs)
    except RuntimeError:  # the base itself has no backward on these inputs: torch's grouped_mm wants strides
        return
    found = _with_gradient(copy.deepcopy(adapted), inputs)
    wanted = {
        f"{place.path}.{place.child}.{name}".lstrip(".")
        for place in inventory(adapted).places
        if place.child in place.owner._modules and place.weight in reached
        for name in place.adapter._parameters
    }
    _require(not wanted - found, f"no gradient reaches {', '.join(sorted(wanted - found))}", base, rules)
    trained = {name for name, p in adapted.named_parameters(remove_duplicate=False) if p.requires_grad}
    theta = {name for name in trained if "_lora_default" in name}
    _require(trained == theta, f"{', '.join(sorted(trained - theta))} of the base is trained", base, rules)


def _with_gradient(model: nn.Module, inputs: Inputs) -> set[str]:
    """Every name of the parameters that a random cotangent on the outputs reaches."""
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        outputs = [t for t in output_tensors(inputs.call(model)) if t.requires_grad]
    sum((t * torch.randn(t.shape, generator=generator).to(t.dtype)).sum() for t in outputs).backward()  # type: ignore[union-attr]  # no output: no adapter
    named = model.named_parameters(remove_duplicate=False)
    return {name for name, p in named if p.grad is not None and bool((p.grad != 0).any())}


def _require(holds: bool, message: str, model: nn.Module, rules: Any) -> None:
    if not holds:
        raise AssertionError(f"{message}\n{model!r}\nwith {rules}")
