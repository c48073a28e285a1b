"""`apply`: plan, insert, and the small verbs on what was inserted."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from lora_fx.changes import changing
from lora_fx.checks.certification import Certificate, certify_adapted
from lora_fx.checks.oracles import active_adapters, misrounded, parameters
from lora_fx.deltas.adapter import Adapter
from lora_fx.errors import PlanError
from lora_fx.model import wiring
from lora_fx.model.inventory import inventory, weight_name
from lora_fx.passes.planning import plan


def apply(
    model: nn.Module, rules: Any, example_inputs: Any = None, *, name: str = "default", check: bool = True
) -> nn.Module:
    """Insert trainable low-rank branches where the rules say, in place, and freeze everything else.

    The model keeps its class, its `state_dict` keys and its outputs (B = 0: bit for bit). Adapter parameters stand
    beside the weights they belong to: ``q_proj.weight`` gains ``q_proj.weight_lora_default.A`` and ``.B``.

    Args:
        rules: one `Rule` or several; dicts; the path of a TOML file. The first rule that matches a site decides it.
        example_inputs: a tensor, a tuple of positional or a dict of keyword inputs; transformers' models have some.
        name: the adapter's name. Applying again adds a second adapter under another name, further sites under the same.
        check: compare the adapted model with the dense W + s·B·A on the example inputs, in train and in eval mode.

    Returns:
        The same model.

    Raises:
        LoraFxError: a rule, a site, the inputs or the self-check refuses; the model is bitwise what it was.
    """
    from lora_fx.passes.insert import Insert

    with changing(model, "apply"):
        return Insert(plan(model, rules, example_inputs, name=name), check)()


def certify(model: nn.Module, example_inputs: Any = None, *, gradients: bool = True) -> Certificate:
    """Measure every use of every adapted weight: is it W + s·B·A, and how is it realised?

    Each use is held against the same op on the dense sum, on the x that reaches it, with random factors (B ≠ 0), in the
    recorded program of the adapted model; then the whole model against the model with the dense sums, in eval and in
    train mode. Of a folded model the branches are put back for that, every folded element is checked to be the sum
    rounded once, and the model is folded again. Afterwards the model is bitwise what it was.

    Takes two captures and some ten runs of the model, the dense sum of one weight at a time in float64, and, for a
    folded model, a second copy of its folded weights.

    Args:
        example_inputs: as in `apply`. What they do not reach is listed as unseen, never as covered.
        gradients: also run backward once, and name the adapters that no gradient reaches.

    Returns:
        A certificate, true where every use was seen and is W + s·B·A: `print` it, or keep its `to_json()`.

    Raises:
        PlanError: the model has no active adapter, or its fold was final.
        CaptureError: the model does not run on the inputs, or is on meta.
        LoraFxError: a thread is inside a forward of the model.
    """
    from lora_fx.passes.fold import fold, unfold

    with changing(model, "certify"):
        if not inventory(model).folded:
            return certify_adapted(model, example_inputs, gradients=gradients)
        folded = _folded_weights(model)
        unfold(model)
        certificate = certify_adapted(model, example_inputs, gradients=gradients)
        plain, acting = parameters(model), active_adapters(model)
        wrong = {name: misrounded(plain[name], weight, acting[name]).numel() for name, weight in folded.items()}
        fold(model)
    return replace(certificate, folded=wrong)


def _folded_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """name → a copy of each weight that a fold has written."""
    here = inventory(model)
    return {
        weight_name(here.modules[module][0], attribute): module.get_parameter(attribute).detach().clone()
        for module, record in here.records.items()
        for attribute in record.attributes
    }


def adapters(model: nn.Module) -> dict[str, list[str]]:
    """The adapters in the model: name → names of the weights it adapts."""
    found: dict[str, list[str]] = {}
    for path, _, child, adapter in wiring.find_adapters(model):
        weight = f"{path}.{wiring.attribute_of(child)}".lstrip(".")
        names = found.setdefault(adapter.name, [])
        if weight not in names:
            names.append(weight)
    return found


def activate(model: nn.Module, *names: str) -> nn.Module:
    """Make exactly these adapters act (and train); all others stay, and do nothing. No name: the base model."""
    _known({a.name for a in _all(model)}, names)
    with changing(model, "activate"):
        _mark_active(model, names)
        wiring.wire_or_dispatch(model)
    return model


def _mark_active(model: nn.Module, names: tuple[str, ...]) -> None:
    for adapter in _all(model):
        adapter.active = adapter.name in names
        adapter.requires_grad_(adapter.active)


def switch(model: nn.Module, *names: str) -> nn.Module:
    """Fold these adapters in the place of those that are folded now, through the exact base weights.

    Raises:
        LoraFxError: a name is not there, or a fold is refused; see `fold`, `unfold`.
    """
    from lora_fx.passes.fold import fold, take_back

    _known({*inventory(model).names}, names)
    with changing(model, "switch") as undo:
        if inventory(model).folded:
            take_back(model, undo)
        _mark_active(model, names)
        return fold(model)


def deactivate(model: nn.Module) -> nn.Module:
    """The base model again, with all adapters kept for `activate`."""
    return activate(model)


def remove(model: nn.Module, *names: str) -> nn.Module:
    """Take these adapters out for good. When the last one is gone, every module has its original class."""
    _known({a.name for a in _all(model)}, names)
    with changing(model, "remove"):
        wiring.unwire(model)
        for _, owner, child, adapter in list(wiring.find_adapters(model)):
            if adapter.name in names:
                wiring.detach(owner, child)
        if not any(_all(model)):
            for module in model.modules():
                wiring.unmark(module)
        wiring.wire_or_dispatch(model)
    return model


def _all(model: nn.Module) -> list[Adapter]:
    return list(dict.fromkeys(adapter for *_, adapter in wiring.find_adapters(model)))


def _known(have: set[str], names: tuple[str, ...]) -> None:
    for name in names:
        if name not in have:
            raise PlanError(
                f"there is no adapter named {name!r}",
                place="the model",
                remedy=f"it has {', '.join(sorted(have)) or 'no adapters'}",
            )
