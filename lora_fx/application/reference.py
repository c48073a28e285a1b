"""The base model as the reference of preference training: the same modules, with no adapter acting."""

from __future__ import annotations

from typing import Any

from torch import nn

from lora_fx.application import disabled
from lora_fx.deltas.adapter import Adapter


class Reference(nn.Module):
    """What a model is without its adapters, in eval mode. It has no parameters of its own: see `reference`."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.__dict__["_adapted"] = model  # no child: nobody moves, casts, counts or trains it here
        self.eval()

    def __getattr__(self, name: str) -> Any:
        if "_adapted" not in self.__dict__:  # as while it is copied
            raise AttributeError(name)
        return getattr(self.__dict__["_adapted"], name)

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        model = self.__dict__["_adapted"]
        modes = [(module, module.training) for module in model.modules()]
        with disabled(model):
            try:
                model.eval()
                return super().__call__(*arguments, **named)
            finally:
                for module, training in modes:
                    module.training = training

    def forward(self, *arguments: Any, **named: Any) -> Any:
        return self.__dict__["_adapted"](*arguments, **named)

    def state_dict(self, *arguments: Any, **named: Any) -> dict[str, Any]:  # type: ignore[override]
        """The base's, which whoever keeps something beside it knows it by; the tensors are the model's own."""
        model = self.__dict__["_adapted"]
        state = model.state_dict(*arguments, **named)
        start = named.get("prefix", "")
        adapters = tuple(f"{start}{path}." for path, module in model.named_modules() if isinstance(module, Adapter))
        return {key: tensor for key, tensor in state.items() if not key.startswith(adapters)}


def reference(model: nn.Module) -> Reference:
    """The model without its adapters, as a model of its own that has no weights of its own.

        DPOTrainer(model, ref_model=lora_fx.reference(model), …)

    Each call switches the adapters off, runs the model in eval mode, and switches them on again: the base, bit for bit
    as `disabled` gives it, in no memory. What is asked of it besides (a config, a head, a device) the model answers.
    What was trained beside the adapters is not the base's any more, and nothing switches it off.

    Raises, when it is called:
        PlanError: the model is folded.
        LoraFxError: a thread is inside a forward of the model.
    """
    return Reference(model)
