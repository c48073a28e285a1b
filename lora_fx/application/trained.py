"""What of a model trains: counted, and in groups for an optimizer."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from lora_fx.errors import LoraFxError
from lora_fx.graph.places import refuse_lazy
from lora_fx.model.inventory import inventory


@dataclass(frozen=True)
class Summary:
    """How many parameters there are, each counted once. `print` it: one line."""

    trainable: int
    total: int
    """Those of adapters too."""
    adapters: dict[str, int]
    """The name of an adapter → how many weights it adapts. Those that a fold put away are not among them."""

    @property
    def share(self) -> float:
        return self.trainable / max(self.total, 1)

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "share": self.share}

    def __str__(self) -> str:
        names = ", ".join(f"{name} on {n} weight{'s' if n > 1 else ''}" for name, n in self.adapters.items())
        return f"{self.trainable:,} of {self.total:,} parameters train, {self.share:.4%}; adapters: {names or 'none'}"


def summary(model: nn.Module) -> Summary:
    """How many parameters of the model train, and how many there are; what adapters it has.

    Raises:
        CaptureError: a parameter or a buffer is lazy, and has no shape yet.
    """
    refuse_lazy(model)
    parameters = list(dict.fromkeys(model.parameters()))
    trainable = sum(p.numel() for p in parameters if p.requires_grad)
    counts: dict[str, int] = {}
    for adapter in inventory(model).adapters:
        counts[adapter.name] = counts.get(adapter.name, 0) + 1
    return Summary(trainable, sum(p.numel() for p in parameters), counts)


def parameter_groups(model: nn.Module, lr: float, ratio: float = 16.0) -> list[dict[str, Any]]:
    """What trains, for an optimizer, with another rate for B than for A: LoRA+ (Hayou, Ghosh and Yu 2024).

        torch.optim.AdamW(lora_fx.parameter_groups(model, lr=2e-4), weight_decay=0.01)

    At the start B is 0 and A is not, and the larger a model is the more B has to move for both to learn alike. Every B
    of an adapter gets ratio·lr; all else that trains, A, sizes, biases, what trains beside adapters, gets lr.

    Args:
        lr: the rate of all but B.
        ratio: λ; the paper's is 16.

    Returns:
        At most two groups, each with ``params`` and ``lr``, in the model's order.

    Raises:
        LoraFxError: nothing trains, or lr or ratio is no number above 0.
    """
    for name, value in (("lr", lr), ("ratio", ratio)):
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            raise LoraFxError(f"{name}={value!r}", place="parameter_groups", remedy="give a number above 0")
    trained = [p for p in dict.fromkeys(model.parameters()) if p.requires_grad]
    if not trained:
        remedy = "apply adapters first, or activate them: an adapter that is not active does not train"
        raise LoraFxError("no parameter has requires_grad", place=type(model).__name__, remedy=remedy)
    fast = {id(p) for a in inventory(model).adapters for name, p in a.named_parameters() if name == "B"}
    groups = (([p for p in trained if id(p) not in fast], lr), ([p for p in trained if id(p) in fast], lr * ratio))
    return [{"params": own, "lr": rate} for own, rate in groups if own]
