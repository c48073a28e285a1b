"""What of a model trains: what the user says, from where `apply` starts.

* The first adapter that a model gets freezes the model's own parameters, once. New θ trains.
* From then on `requires_grad` is the user's: a frozen A, a trained head. No verb changes it, but that
* an adapter that is deactivated does not train, and that it does again what it did, when it is activated.

After the last adapter is removed, the model's own parameters are still frozen: nobody knows which of them trained.
"""

from __future__ import annotations

from torch import nn

from lora_fx.model.inventory import base_parameters, inventory


def freeze(model: nn.Module) -> None:
    """Freeze the model's own parameters, where it has no adapter yet."""
    if not inventory(model).adapters:
        for parameter in base_parameters(model).values():
            parameter.requires_grad_(False)


IGNORE, REFUSE = "ignore", "refuse"
BESIDE = (REFUSE, IGNORE)
"""What to do about parameters that train beside an adapter which is saved alone."""


def why_not_alone(model: nn.Module, beside: str) -> tuple[str, str, str]:
    """The place, reason and remedy where a file of an adapter would leave out what else has been trained; or empty."""
    if beside not in BESIDE:
        return "beside", f"{beside!r} is unknown", f"say one of {', '.join(map(repr, BESIDE))}"
    names: dict[int, str] = {}
    for name, parameter in base_parameters(model).items():
        if parameter.requires_grad:
            names.setdefault(id(parameter), name)
    if beside == IGNORE or not names:
        return "", "", ""
    first, *more = names.values()
    reason = "it has requires_grad, and a file of an adapter holds no parameters of the model"
    also = f"; so have {', '.join(more[:3])}{', …' if len(more) > 3 else ''}" if more else ""
    remedy = (
        'train it as an adapter, Rule(kind="full") or Rule(kind="bias"), where it multiplies or is a bias; '
        'or freeze it; or say beside="ignore", and save it yourself'
    )
    return first, reason + also, remedy
