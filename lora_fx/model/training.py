"""What of a model trains: what the user says, from where `apply` starts.

* The first adapter that a model gets freezes the model's own parameters, once. New θ trains.
* From then on `requires_grad` is the user's: a frozen A, a trained head. No verb changes it, but that
* an adapter that is deactivated does not train, and that it does again what it did, when it is activated.

After the last adapter is removed, the model's own parameters are still frozen: nobody knows which of them trained.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from lora_fx.graph.program import storage_key
from lora_fx.model.inventory import base_parameters, inventory


def freeze(model: nn.Module) -> None:
    """Freeze the model's own parameters, where it has no adapter yet."""
    if not inventory(model).adapters:
        for parameter in base_parameters(model).values():
            parameter.requires_grad_(False)


SAVE, IGNORE, REFUSE = "save", "ignore", "refuse"
"""What to do about parameters that train beside an adapter which is saved."""


def trained_beside(model: nn.Module) -> list[tuple[str, ...]]:
    """The names of each storage of the model's own that has ``requires_grad``."""
    names: dict[tuple, list[str]] = {}
    trained = set[tuple]()
    for name, parameter in base_parameters(model).items():
        key = storage_key(parameter)
        names.setdefault(key, []).append(name)
        trained |= {key} if parameter.requires_grad else set()
    return [tuple(own) for key, own in names.items() if key in trained]


def why_not_alone(model: nn.Module, beside: str, known: Sequence[str] = (REFUSE, IGNORE)) -> tuple[str, str, str]:
    """The place, reason and remedy where a file of an adapter would leave out what else has been trained; or empty."""
    if beside not in known:
        return "beside", f"{beside!r} is unknown", f"say one of {', '.join(map(repr, known))}"
    if beside != REFUSE or not (trained := trained_beside(model)):
        return "", "", ""
    first, *more = (names[0] for names in trained)
    reason = "it has requires_grad, and a file of an adapter holds no parameters of the model"
    also = f"; so have {', '.join(more[:3])}{', …' if len(more) > 3 else ''}" if more else ""
    remedy = (
        'train it as an adapter, Rule(kind="full") or Rule(kind="bias"), where it multiplies or is a bias; '
        'or freeze it; or say beside="ignore", and save it yourself'
    )
    return first, reason + also, remedy
