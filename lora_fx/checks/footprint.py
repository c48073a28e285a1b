"""The bytes that a training step holds, before any of it is there.

The forward runs on fake tensors, which have shapes, dtypes and a device, and no memory. What autograd keeps for
backward is seen as it is packed, each storage once; a parameter, a buffer or an input that is kept is there anyway.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.optim import Optimizer
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils.weak import WeakTensorKeyDictionary

from lora_fx.errors import CaptureError, LoraFxError, essence
from lora_fx.graph.capture import Inputs, as_python, does_not_run
from lora_fx.graph.places import refuse_lazy, storage_of
from lora_fx.tables import table

OPTIMIZERS: dict[str, Callable[[Any], Optimizer]] = {
    "adamw": torch.optim.AdamW, "adam": torch.optim.Adam, "sgd": torch.optim.SGD, "adagrad": torch.optim.Adagrad,
    "rmsprop": torch.optim.RMSprop, "adafactor": torch.optim.Adafactor,
}  # fmt: skip


_UNITS = (1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (0.0, "bytes")
"""The first of which full fine-tuning holds ten."""


def _in(unit: float, value: int) -> str:
    return f"{value / unit:,.2f}" if unit else f"{value:,}"


@dataclass(frozen=True)
class Footprint:
    """Bytes, while a step stands between its forward and its backward, with gradients and optimizer state there."""

    weights: int
    """Parameters and buffers of the model's own."""
    adapters: int
    gradients: int
    optimizer: int
    activations: int
    """What autograd keeps for backward."""

    @property
    def total(self) -> int:
        return self.state + self.activations

    @property
    def state(self) -> int:
        """What is there whatever the inputs: the total without activations."""
        return self.weights + self.adapters + self.gradients + self.optimizer

    def to_json(self) -> dict[str, int]:
        return {**asdict(self), "state": self.state, "total": self.total}


@dataclass(frozen=True)
class Memory:
    """What training with adapters needs, and full fine-tuning beside it. `print` it, or keep its `to_json()`."""

    adapted: Footprint
    full: Footprint
    trainable: int
    """Parameters that train, of the adapters."""
    parameters: int
    """… of the model."""

    @property
    def ratio(self) -> float:
        """The whole of the one as a share of the other."""
        return self.adapted.total / self.full.total

    def to_json(self) -> dict[str, Any]:
        """Bytes, by part."""
        return {
            "adapted": self.adapted.to_json(), "full": self.full.to_json(), "ratio": self.ratio,
            "trainable": self.trainable, "parameters": self.parameters,
        }  # fmt: skip

    def __str__(self) -> str:
        adapted, full = self.adapted.to_json(), self.full.to_json()
        unit, name = next(row for row in _UNITS if self.full.total >= 10 * row[0])
        parts = ("weights", "adapters", "gradients", "optimizer", "state", "activations", "total")
        rows = [(part, _in(unit, adapted[part]), _in(unit, full[part])) for part in parts]
        shown = table(("", f"adapted, {name}", f"full fine-tuning, {name}"), rows, right=(1, 2))
        return f"{shown}\n{self.trainable:,} of {self.parameters:,} parameters train; {self.ratio:.3f} of the memory"


def on_meta(model: nn.Module, dtype: torch.dtype | None) -> nn.Module:
    """A copy on meta, with floating parameters in this dtype: nothing of the model's size is there twice.

    Raises:
        CaptureError: the model cannot be copied, or has no shapes yet.
    """
    refuse_lazy(model)
    memo: dict[int, Any] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        meta = torch.empty_strided(tensor.shape, tensor.stride(), dtype=_cast(tensor, dtype), device="meta")
        memo[id(tensor)] = nn.Parameter(meta, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else meta
    try:
        return copy.deepcopy(model, memo)
    except Exception as error:
        raise CaptureError(
            f"{type(model).__name__} cannot be copied: {essence(error)}",
            place="copy.deepcopy(model)",
            remedy="pass a model that can",
        ) from error


def _cast(tensor: torch.Tensor, dtype: torch.dtype | None) -> torch.dtype:
    return dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype


def measured(model: nn.Module, inputs: Inputs, optimizer: Any, device: torch.device, own: Iterable[Any]) -> Footprint:
    """The footprint of a model on meta that trains what has ``requires_grad``.

    Args:
        device: whose kernels the forward takes: what they keep differs.
        own: the parameters of adapters.
    """
    adapters = {storage_of(p): p for p in own}
    everything = {storage_of(t): t for t in (*model.parameters(), *model.buffers())}
    trained = list({storage_of(p): p for p in model.parameters() if p.requires_grad}.values())
    return Footprint(
        weights=sum(_bytes(t) for key, t in everything.items() if key not in adapters),
        adapters=sum(map(_bytes, adapters.values())),
        gradients=sum(map(_bytes, trained)),
        optimizer=optimizer_state(trained, optimizer),
        activations=kept_for_backward(model, inputs, device),
    )


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def optimizer_state(trained: Iterable[torch.Tensor], optimizer: Any) -> int:
    """Bytes of an optimizer's state after a step on parameters of these shapes, which it makes on meta.

    Args:
        optimizer: a name of `OPTIMIZERS`, or what makes an optimizer of a list of parameters.

    Raises:
        LoraFxError: there is no such optimizer, or it does not step on meta.
    """
    make = OPTIMIZERS.get(optimizer) if isinstance(optimizer, str) else optimizer
    if not callable(make):
        raise LoraFxError(
            f"{optimizer!r} is no optimizer",
            place="optimizer",
            remedy=f"{', '.join(OPTIMIZERS)}, or a class of torch's",
        )
    parameters = [nn.Parameter(torch.empty(p.shape, dtype=p.dtype, device="meta")) for p in trained]
    for parameter in parameters:
        parameter.grad = torch.empty_like(parameter)
    try:
        made = make(parameters)
        made.step()
        state = [t for own in made.state.values() for t in pytree.tree_leaves(own) if isinstance(t, torch.Tensor)]
    except Exception as error:
        raise LoraFxError(
            f"its state cannot be seen on meta: {essence(error)}",
            place=f"optimizer {getattr(optimizer, '__name__', optimizer)!s}",
            remedy=f"one of {', '.join(OPTIMIZERS)}",
        ) from error
    return sum(_bytes(t) for t in {storage_of(t): t for t in state}.values())


def kept_for_backward(model: nn.Module, inputs: Inputs, device: torch.device) -> int:
    """Bytes of the storages that autograd keeps from a forward of a model on meta, in train mode.

    Raises:
        CaptureError: the model does not run on the inputs.
    """
    try:
        with _untraced():
            return _kept_of_fakes(model, inputs, device, _Known())
    except Exception:  # it looks at numbers that are not there: then it is to see that it is traced
        try:
            return _kept_of_fakes(model, inputs, device, nullcontext())
        except Exception as error:
            raise does_not_run(model, error) from error


def _kept_of_fakes(model: nn.Module, inputs: Inputs, device: torch.device, known: Any) -> int:
    def fake(tensor: torch.Tensor) -> torch.Tensor:
        made = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)
        if isinstance(known, _Known) and not tensor.is_meta:
            known.learn(made, tensor)
        return made

    with FakeTensorMode(allow_non_fake_inputs=True), known, _filled(model, fake), as_python():
        args, kwargs = pytree.tree_map_only(torch.Tensor, fake, (inputs.args, inputs.kwargs))
        there = [*model.parameters(), *model.buffers()]
        there += [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        return kept(lambda: model(*args, **kwargs), there)


class _Known(TorchDispatchMode):
    """Over fake tensors: small integers and truth values keep their numbers, so that a model decides by them what it
    decides in training (whether a mask is needed, which kernel attends)."""

    MOST = 2**20
    _UNSURE = frozenset({torch.Tag.nondeterministic_seeded})

    def __init__(self) -> None:
        super().__init__()
        self.numbers: WeakTensorKeyDictionary = WeakTensorKeyDictionary()

    def learn(self, fake: torch.Tensor, numbers: torch.Tensor) -> None:
        if not numbers.is_floating_point() and not numbers.is_complex() and numbers.numel() <= self.MOST:
            with _disable_current_modes():
                self.numbers[fake] = numbers.detach().cpu()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        known = all(t in self.numbers for t in given)
        if known and func is torch.ops.aten._local_scalar_dense.default:
            with _disable_current_modes():
                return self.numbers[given[0]].item()
        result = func(*args, **kwargs)
        if not isinstance(result, torch.Tensor) or result.is_floating_point() or result.is_complex():
            return result
        if func._schema.is_mutable:
            for tensor in (result, *given):
                self.numbers.pop(tensor, None)
        elif known and result.numel() <= self.MOST and not self._UNSURE & {*func.tags} and "empty" not in str(func):
            own, options = pytree.tree_map_only(torch.Tensor, lambda t: self.numbers[t], (args, kwargs))
            options = {**options, "device": "cpu"} if "device" in options else options
            with _disable_current_modes():
                self.numbers[result] = func(*own, **options)
        return result


@contextmanager
def _untraced() -> Iterator[None]:
    """Inside, torch's public name does not say that a tensor is fake: transformers takes it for tracing, and gives its
    kernels a mask that training has not."""
    plain = torch._subclasses.FakeTensor
    torch._subclasses.FakeTensor = type("Fake", (), {})  # type: ignore[misc, assignment]
    try:
        yield
    finally:
        torch._subclasses.FakeTensor = plain  # type: ignore[misc]


def kept(forward: Callable[[], Any], there: Iterable[torch.Tensor]) -> int:
    """Bytes of the storages that autograd keeps while `forward` runs, each once, without those of tensors that are
    there anyway."""
    own = {storage_of(tensor) for tensor in there}
    found: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if storage_of(tensor) not in own:
            found.setdefault(storage_of(tensor), tensor.detach())
        return tensor

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = forward()  # kept until all is counted: storages that end leave their names to others
    total = sum(tensor.untyped_storage().nbytes() for tensor in found.values())
    del result
    return total


@contextmanager
def _filled(model: nn.Module, make: Callable[[torch.Tensor], torch.Tensor]) -> Iterator[None]:
    """Inside, the model is in train mode with other tensors, one for each of its own."""
    tables: list[dict[str, Any]] = [t for m in model.modules() for t in (m._parameters, m._buffers)]
    places = [(t, name, old) for t in tables for name, old in t.items() if old is not None]
    modes = [(module, module.training) for module in model.modules()]
    made: dict[int, torch.Tensor] = {}
    try:
        for own, name, old in places:
            if id(old) not in made:
                new = make(old)
                made[id(old)] = nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new
            own[name] = made[id(old)]
        model.train()
        yield
    finally:
        for own, name, old in places:
            own[name] = old
        for module, mode in modes:
            module.training = mode
