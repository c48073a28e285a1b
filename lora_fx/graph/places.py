"""Where a model's tensors live: whole and here, in parts over processes, or put away until a forward asks for them.

accelerate (`cpu_offload`, `disk_offload`, a device map) leaves a parameter on meta, and a hook on its module that loads
the numbers before each forward of that module and lets go of them after it. So they are here for as long as the forward
runs, as other objects each time, and whatever wants them meanwhile asks the hook.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from lora_fx.errors import CaptureError, LoraFxError

_HOOK = "_hf_hook"
_BACK = (
    "accelerate.hooks.remove_hook_from_submodules(model) brings the weights back; a model whose weights have never "
    "been in memory is loaded anew without offloading"
)


def is_plain(tensor: torch.Tensor) -> bool:
    """Whether it is no more than strided numbers, and its class is torch's own."""
    return is_torchs(tensor) and tensor.layout is torch.strided


def is_torchs(tensor: torch.Tensor) -> bool:
    """Whether its class is torch's own, and no library's or user's."""
    return type(tensor) in (torch.Tensor, nn.Parameter)


def storage_of(tensor: torch.Tensor) -> int:
    """Equal for tensors of one storage, on every device, `meta` too. What has none (sparse, or inside of a `vmap`) is
    one with itself alone."""
    try:
        return tensor.untyped_storage()._cdata
    except RuntimeError:
        return id(tensor)


def refuse_lazy(model: nn.Module) -> None:
    """Raise where a model has no shapes yet.

    Raises:
        CaptureError: a parameter or a buffer is lazy.
    """
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if isinstance(tensor, nn.UninitializedParameter | nn.UninitializedBuffer):
            kind = "parameter" if isinstance(tensor, nn.Parameter) else "buffer"
            remedy = "run the model once on real inputs before"
            raise CaptureError(f"the {kind} is lazy: it has no shape yet", place=name, remedy=remedy)


# ── in parts ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def is_shard(parameter: torch.Tensor | None) -> bool:
    """Whether this is one process's part of a parameter: of FSDP2, of tensor parallelism, or of FSDP1, which makes it
    flat."""
    if "torch.distributed.tensor" in sys.modules and isinstance(parameter, torch.distributed.tensor.DTensor):
        return True
    return parameter is not None and parameter.dim() == 1 and hasattr(parameter, "_fsdp_flattened")


def refuse_shards(model: nn.Module) -> None:
    """Raise where a model is in parts: a capture would wait for the other processes, or see this one's part.

    Raises:
        CaptureError: one is.
    """
    for name, parameter in model.named_parameters():
        if is_shard(parameter):
            raise CaptureError(
                f"the parameter is sharded: this process has a part of it ({type(parameter).__name__})",
                place=name,
                remedy="apply, or load the adapter, before fully_shard, which shards its factors too; tensor "
                "parallelism (parallelize_module, a tp_plan) takes a folded model",
            )
    for name, module in model.named_modules():
        if _is_fsdp(module):
            raise CaptureError(
                f"{type(module).__name__} is sharded by FSDP, which would neither shard nor reduce what comes later",
                place=name or "the model",
                remedy="apply, or load the adapter, before fully_shard or FullyShardedDataParallel",
            )


def _is_fsdp(module: nn.Module) -> bool:
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return fsdp is not None and isinstance(module, (fsdp.FSDPModule, fsdp.FullyShardedDataParallel))


def refuse_shard(module: nn.Module, name: str, parameter: torch.Tensor | None) -> None:
    """Raise where tensor parallelism registers a part of a parameter, two calls above, with a module that has adapters:
    it knows the base's call alone. FSDP sets it as an attribute.

    Raises:
        LoraFxError: it does.
    """
    if parameter is not None and is_shard(parameter) and sys._getframe(2).f_code is not nn.Module.__setattr__.__code__:
        raise LoraFxError(
            f"{type(module).__name__} has adapters, and is to get a part of a parameter: a {type(parameter).__name__}",
            place=name,
            remedy="fold them before parallelize_module; fully_shard takes a model with adapters as it is",
        )


# ── put away ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def _hooks(module: nn.Module) -> list[Any]:
    """accelerate's hooks on a module that move tensors between devices."""
    hook = vars(module).get(_HOOK)
    return [own for own in getattr(hook, "hooks", [hook]) if hasattr(own, "weights_map")]


def loader(module: nn.Module) -> Any:
    """The hook that loads the module's own parameters before each of its forwards; None where they are here."""
    return next((hook for hook in _hooks(module) if hook.offload), None)


def is_away(module: nn.Module, attribute: str) -> bool:
    """Whether accelerate has put this parameter away."""
    parameter = module._parameters.get(attribute)
    return parameter is not None and parameter.is_meta and loader(module) is not None


def without_numbers(model: nn.Module) -> bool:
    """Whether a parameter is on meta, and nothing loads it before a forward."""
    return any(
        p is not None and p.is_meta and loader(m) is None for m in model.modules() for p in m._parameters.values()
    )


def loaded(module: nn.Module, attribute: str) -> torch.Tensor:
    """A parameter as the module's next forward reads it, on the device that this runs on."""
    parameter = module._parameters[attribute]
    assert parameter is not None, attribute
    if not is_away(module, attribute):
        return parameter.detach()
    hook = loader(module)
    return hook.weights_map[attribute].detach().to(hook.execution_device, parameter.dtype)


def in_memory(module: nn.Module, attribute: str) -> torch.Tensor | None:
    """What a hook loads a parameter from, where that is memory: tied ones have one there."""
    hook = loader(module)
    one, again = (None if hook is None else hook.weights_map.get(attribute) for _ in range(2))
    if one is None or again is None or one.data_ptr() != again.data_ptr():  # what is on disk is mapped anew each time
        return None
    return one


def is_parted(module: nn.Module, attribute: str) -> bool:
    """Whether accelerate has put away a parameter that was tied to another one, so that which one cannot be told."""
    hook = loader(module)
    return hook is not None and attribute in hook.tied_params_names and in_memory(module, attribute) is None


def buffers_away(model: nn.Module) -> list[torch.Tensor]:
    """What hooks load buffers from that they have put away in memory: a forward on the same device writes there."""
    found = (in_memory(module, name) for module in model.modules() if loader(module) for name in module._buffers)
    return [buffer for buffer in found if buffer is not None]


class Instead(Mapping[str, torch.Tensor]):
    """What a hook loads, with a function of one of the parameters in its place."""

    def __init__(
        self, plain: Mapping[str, torch.Tensor], name: str, of: Callable[[torch.Tensor], torch.Tensor]
    ) -> None:
        self.plain, self.name, self.of = plain, name, of

    def __getitem__(self, key: str) -> torch.Tensor:
        return self.of(self.plain[key]) if key == self.name else self.plain[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self.plain)

    def __len__(self) -> int:
        return len(self.plain)


def refuse_preloaded(model: nn.Module) -> None:
    """Raise where a hook loads the parameters of all modules inside of its own: it would look for θ among them.

    Raises:
        CaptureError: one does.
    """
    for path, module in model.named_modules():
        if any(hook.offload and hook.place_submodules for hook in _hooks(module)):
            raise CaptureError(
                f"{type(module).__name__} is offloaded by accelerate together with what is in it "
                "(preload_module_classes): its hook would look for the factors among what it has put away",
                place=path or "the model",
                remedy="apply, or load the adapter, before the model is offloaded; or leave preload_module_classes out",
            )


def refuse_away(module: nn.Module, attribute: str, name: str, what: str, error: type[LoraFxError]) -> None:
    """Raise where accelerate has put a weight away that something wants to write or to measure.

    Args:
        name: of the weight.
        what: why that cannot be: ``a fold would be lost``.
    """
    if is_away(module, attribute):
        raise error(
            f"the weight is offloaded by accelerate, it is here only while its module runs: {what}",
            place=name,
            remedy=_BACK,
        )


def refuse_any_away(model: nn.Module, what: str, error: type[LoraFxError]) -> None:
    """`refuse_away` for every parameter of a model."""
    for path, module in model.named_modules():
        for attribute in module._parameters:
            refuse_away(module, attribute, f"{path}.{attribute}" if path else attribute, what, error)


def is_moved(module: nn.Module, calls: int) -> bool:
    """Whether who reads a parameter of this module is code that moves it, and is to get what is there.

    Args:
        calls: how many calls above the caller it is.
    """
    if "_old_forward" not in module.__dict__ and "torch.distributed.tensor.parallel" not in sys.modules:
        return False
    if torch.compiler.is_compiling():
        return False
    reader = sys._getframe(calls + 1).f_globals.get("__name__", "")
    return reader.startswith(("accelerate.", "torch.distributed.tensor."))


@contextmanager
def hooks_aside(model: nn.Module) -> Iterator[None]:
    """Inside, no module of the model moves what it is given, or its parameters, to another device."""
    hooked = [(vars(module), vars(module)[_HOOK]) for module in model.modules() if _hooks(module)]
    try:
        for table, hook in hooked:
            table[_HOOK] = _Others([own for own in getattr(hook, "hooks", [hook]) if not hasattr(own, "weights_map")])
        yield
    finally:
        for table, hook in hooked:
            table[_HOOK] = hook


class _Others:
    """The hooks of a module that move nothing, as one."""

    def __init__(self, hooks: list[Any]) -> None:
        self.hooks = hooks
        self.no_grad = any(hook.no_grad for hook in hooks)

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        for hook in self.hooks:
            args, kwargs = hook.pre_forward(module, *args, **kwargs)
        return args, kwargs

    def post_forward(self, module: nn.Module, output: Any) -> Any:
        for hook in self.hooks:
            output = hook.post_forward(module, output)
        return output


class Stays(nn.Module):
    """A module whose parameters accelerate is not to put away: whoever reads them calls no forward of it."""

    inlined = False
    """A graph around reads them, and the weight, without a call of the module that holds both."""

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        refuse_shard(self, name, param)
        super().register_parameter(name, param)

    @property
    def _hf_hook(self) -> Any:
        if _HOOK not in self.__dict__:
            raise AttributeError(_HOOK)
        return self.__dict__[_HOOK]

    @_hf_hook.setter
    def _hf_hook(self, hook: Any) -> None:
        self.__dict__[_HOOK] = hook
        for own in _hooks(self):
            if own.offload and self.inlined:
                raise LoraFxError(
                    "accelerate loads a weight when its module is called, and the graph of the GraphModule around it "
                    "has the call inside, with the branch",
                    place=type(self).__name__,
                    remedy="accelerate.hooks.remove_hook_from_submodules(model); offload first and apply then",
                )
            if own.offload:
                own.pre_forward(self)
                own.offload = False
                for parameter in self._parameters.values():  # what accelerate has on disk cannot be written to
                    if parameter is not None:
                        parameter.data = parameter.data.clone()

    @_hf_hook.deleter
    def _hf_hook(self) -> None:
        del self.__dict__[_HOOK]
