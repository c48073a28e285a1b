"""Whether gradients reach θ: of a model's outputs, wherever one reaches W + δ in the model itself.

    dL/dθ  =  (∂δ/∂θ)ᵀ · dL/d(W + δ)          so θ trains unless the right side is 0

An output can be right where this is not: an autograd function of the model's own that gets the weight as no tensor
computes with it, and returns its gradient to nobody.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointError

from lora_fx.changes import Undo, onednn_has, safe_point
from lora_fx.checks.verification import called, in_mode, quiet, with_dense_weights
from lora_fx.deltas.adapter import Adapter
from lora_fx.errors import CaptureError
from lora_fx.graph.capture import Inputs, does_not_run, output_tensors
from lora_fx.graph.own_state import uncompiled, undisturbed
from lora_fx.graph.places import is_away
from lora_fx.model.classes import unwired
from lora_fx.model.inventory import Storage


@dataclass(frozen=True)
class Reach:
    """Which adapters train on the example inputs."""

    free: tuple[Adapter, ...] = ()
    """No gradient reaches them."""
    lost: tuple[Adapter, ...] = ()
    """Those of them whose W + δ gets one in the model itself."""
    error: CaptureError | None = None
    """Why backward does not run: in the adapted model alone, where some are lost, and else in neither."""


def reach(model: nn.Module, inputs: Inputs, storages: Sequence[Storage], undo: list[Undo]) -> Reach:
    """Run backward once, in train mode or, where the model does not run in that, in eval mode; of the model itself,
    with the sums W + δ in its weights, only where an adapter is not reached.

    Args:
        storages: with the adapters to ask about; those that do not train are not.
        undo: the list of the change that this is a part of; see `check_once`.
    """
    found = _reach(model, inputs, storages, undo)
    if not found.lost or all(adapter.kind.is_delta for storage in storages for adapter in storage.adapters):
        return found
    with quiet(storages, undo):  # with other activations a router may have left an expert out
        return _reach(model, inputs, storages, undo)


def _reach(model: nn.Module, inputs: Inputs, storages: Sequence[Storage], undo: list[Undo]) -> Reach:
    factors = [(a, p) for s in storages for a in s.adapters for p in a.parameters() if p.requires_grad]
    adapters = tuple(dict.fromkeys(adapter for adapter, _ in factors))
    failed: CaptureError | None = None
    for training in (True, False):
        error = None
        try:
            found = _gradients(model, inputs, training, [p for _, p in factors])
        except CaptureError as own:
            error, found = own, [None] * len(factors)
        moved = {adapter for (adapter, _), g in zip(factors, found, strict=True) if _is_one(g)}
        # One that is 0 by rounding has come all the same.
        apart = set(adapters) - {adapter for (adapter, _), g in zip(factors, found, strict=True) if g is not None}
        free = tuple(adapter for adapter in adapters if adapter not in moved)
        try:
            wanted = _in_itself(model, inputs, training, storages, undo) if apart else frozenset()
        except CaptureError:
            failed = failed or error
            if error is None:
                return Reach(free)
            continue
        return Reach(free, tuple(adapter for adapter in free if adapter in apart & wanted), error)
    return Reach(error=failed)


def _in_itself(
    model: nn.Module, inputs: Inputs, training: bool, storages: Sequence[Storage], undo: list[Undo]
) -> frozenset[Adapter]:
    """The adapters that the gradient of their W + δ moves."""
    here = [storage for storage in storages if not any(is_away(*owner) for owner in storage.owners)]
    with unwired(model), with_dense_weights(model, undo):
        sums = [storage.parameter for storage in here]
        with contextlib.ExitStack() as frozen:
            for weight in sums:
                frozen.callback(partial(weight.requires_grad_, weight.requires_grad))
                weight.requires_grad_(True)
            found = _gradients(model, inputs, training, sums)
    moved = set()
    for storage, gradient in zip(here, found, strict=True):
        for adapter in storage.adapters if gradient is not None and _is_one(gradient) else ():
            own = [p for p in adapter.parameters() if p.requires_grad]
            if not adapter.kind.is_delta:  # it acts on what the weight makes
                moved.add(adapter)
                continue
            with torch.enable_grad():
                delta = adapter.delta(storage.weight.detach())
            cotangent = gradient.to(delta.device, delta.dtype)  # type: ignore[union-attr]
            if own and any(map(_is_one, torch.autograd.grad(delta, own, cotangent, allow_unused=True))):
                moved.add(adapter)
    return frozenset(moved)


def _is_one(gradient: torch.Tensor | None) -> bool:
    return gradient is not None and bool((gradient != 0).any())


def _gradients(
    model: nn.Module, inputs: Inputs, training: bool, of: list[nn.Parameter]
) -> Sequence[torch.Tensor | None]:
    """Of all outputs, for random cotangents.

    Raises:
        CaptureError: the model does not run on the inputs in this mode, or not backward.
    """
    try:
        return _once(model, inputs, training, of, contextlib.nullcontext())
    except CaptureError as error:
        if not isinstance(error.__cause__, CheckpointError):
            raise
    # A checkpoint runs again within backward, where `_InFloat32` sees each op, and must find what it found before: so
    # all of it is seen.
    return _once(model, inputs, training, of, _InFloat32())


def _once(
    model: nn.Module,
    inputs: Inputs,
    training: bool,
    of: list[nn.Parameter],
    forward: contextlib.AbstractContextManager[Any],
) -> Sequence[torch.Tensor | None]:
    safe_point()
    run = partial(inputs.call, model)
    with in_mode(model, training), torch.enable_grad(), uncompiled(), undisturbed(model, run):
        torch.manual_seed(0)
        with forward:
            outputs = [t for t in output_tensors(called(model, inputs)) if t.requires_grad]
        if not outputs or not of:
            return [None] * len(of)
        try:
            cotangents = [torch.randn_like(t) for t in outputs]
            with _InFloat32(*(t for t in (torch.bfloat16, torch.float16) if not onednn_has(t))):
                return torch.autograd.grad(outputs, of, cotangents, allow_unused=True)
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            raise does_not_run(model, error) from error


class _InFloat32(TorchDispatchMode):
    """On a CPU, products of these dtypes by way of float32: without instructions for one, torch's kernels take forty
    times as long for g·W as for x·Wᵀ."""

    def __init__(self, *dtypes: torch.dtype) -> None:
        super().__init__()
        self.dtypes = dtypes

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, func._schema.name.removeprefix("aten::")
        tensors = [a for a in args if isinstance(a, torch.Tensor)]
        dtype = tensors[0].dtype if tensors else torch.float32
        narrow = dtype in self.dtypes and all(t.is_cpu and t.dtype == dtype for t in tensors)
        product = func._overloadname == "default" and name.removesuffix("_") in ("mm", "bmm", "addmm", "baddbmm")
        if not (narrow and product):
            return func(*args, **kwargs)
        *added, left, right = tensors
        left, step = left.float(), max(1, _PART // max(right.shape[-2], 1))
        made = torch.cat([left @ part.float() for part in right.split(step, -1)], -1)
        for other in added:
            made *= kwargs.get("alpha", 1)
            if beta := kwargs.get("beta", 1):  # of 0, whatever is there does not count
                made = made + beta * other.float()
        return args[0].copy_(made) if name.endswith("_") else made.to(dtype)


#: elements of a factor that are widened at a time
_PART = 2**20
