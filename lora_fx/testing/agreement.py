"""Three values that must agree: the adapted model's is the dense one's, give or take what moves in the nudged one.

    error(adapted, dense)  ≤  SLACK · max(error(nudged, dense), the nudge itself)

Values are models, tensors, numbers, containers and objects with attributes, compared item by item; each difference is
one line.
"""

from __future__ import annotations

import types
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from lora_fx.checks.verification import SLACK, noise_floor, relative_error
from lora_fx.deltas.adapter import Adapter
from lora_fx.testing.comparing import same_bits
from lora_fx.testing.twins import MARK, NUDGE

#: Below float64 a nudge is one whole rounding step, and the accident that it hides in a number is ruled out by how many
#: numbers there are: a tensor of fewer is not compared by value there.
FEW = 8


# ── what must agree ──────────────────────────────────────────────────────────────────────────────────────────────────


class Comparison:
    """Where the adapted life differs from the dense one by more than the nudged one does.

    Args:
        precision: the coarsest dtype that the values were computed in.
        folded: parameters hold sums, which may be rounded.
    """

    def __init__(self, precision: torch.dtype = torch.float64, folded: bool = False) -> None:
        self.precision, self.folded = precision, folded
        self.seen: set[tuple[int, int]] = set()

    def differences(self, path: str, a: Any, b: Any, m: Any) -> Iterator[str]:
        """One line for each place at which `a` is not `b`."""
        if a is b or isinstance(b, type | types.FunctionType | types.ModuleType | types.BuiltinFunctionType):
            if a is not b and getattr(a, "__qualname__", a) != getattr(b, "__qualname__", b):
                yield f"{path} is {a}, not {b}"
            return
        if (id(a), id(b)) in self.seen:
            return
        self.seen.add((id(a), id(b)))
        if isinstance(b, nn.Module):
            yield from self._modules(path, a, b, m)
        elif isinstance(b, torch.Tensor):
            yield from self._tensors(path, a, b, m)
        elif type(a) is not type(b):
            yield f"{path} is {_short(a)}, a {type(a).__name__}, not {_short(b)}, a {type(b).__name__}"
        elif isinstance(b, float):
            yield from self._numbers(path, a, b, m)
        elif isinstance(b, Mapping):
            yield from self._mappings(path, a, b, m)
        elif isinstance(b, list | tuple | deque):
            yield from self._sequences(path, a, b, m)
        elif isinstance(b, torch.Generator):
            yield from self.differences(f"{path}'s state", a.get_state(), b.get_state(), m.get_state())
        elif isinstance(b, types.MethodType):
            yield from self.differences(path, a.__func__, b.__func__, getattr(m, "__func__", None))
        elif isinstance(b, np.ndarray | np.generic):
            yield from self.differences(path, *(torch.as_tensor(np.asarray(v)) for v in (a, b, m)))
        elif is_dataclass(b):
            yield from self._mappings(path, *({f.name: getattr(v, f.name, None) for f in fields(b)} for v in (a, b, m)))
        elif hasattr(b, "__dict__") and not callable(b):
            yield from self._mappings(path, vars(a), vars(b), getattr(m, "__dict__", {}))
        elif isinstance(b, int | str | bytes | bool | set | frozenset | complex | type(None)) and a != b:
            yield f"{path} is {_short(a)}, not {_short(b)}"

    def _modules(self, path: str, a: Any, b: nn.Module, m: Any) -> Iterator[str]:
        if type(b).__name__ not in [cls.__name__ for cls in type(a).__mro__]:  # torch makes some classes anew each time
            yield f"{path} is a {type(a).__name__}, not a {type(b).__name__}"
            return
        parts = [_parts(v) for v in (a, b, m)]
        for part in parts[1]:
            yield from self._mappings(path, *(own[part] for own in parts))

    def _mappings(self, path: str, a: Any, b: Any, m: Any) -> Iterator[str]:
        for name in dict.fromkeys((*b, *a)):
            place = f"{path}.{name}" if isinstance(name, str) and name.isidentifier() else f"{path}[{name!r}]"
            if name not in a:
                yield f"{place} is missing: it is {_short(b[name])} in the dense model"
            elif name not in b:
                yield f"{place} is {_short(a[name])}: the dense model has no such thing"
            else:
                yield from self.differences(place, a[name], b[name], m[name] if name in m else b[name])

    def _sequences(self, path: str, a: Any, b: Any, m: Any) -> Iterator[str]:
        if len(a) != len(b):
            yield f"{path} has {len(a)} items, not {len(b)}"
            return
        alike = m if len(m) == len(b) else b
        for k, items in enumerate(zip(a, b, alike, strict=True)):
            yield from self.differences(f"{path}[{k}]", *items)

    def _numbers(self, path: str, a: float, b: float, m: Any) -> Iterator[str]:
        tensors = [torch.tensor(float(v), dtype=torch.float64) for v in (a, b, m)]
        yield from self._tensors(path, *tensors)

    def _tensors(self, path: str, a: Any, b: torch.Tensor, m: Any) -> Iterator[str]:
        if not isinstance(a, torch.Tensor):
            yield f"{path} is {_short(a)}, a {type(a).__name__}, not a tensor"
            return
        if (a.dtype, a.shape, a.requires_grad) != (b.dtype, b.shape, b.requires_grad):
            yield f"{path} is {_described(a)}, not {_described(b)}"
            return
        untouched = isinstance(b, nn.Parameter) and not self.folded
        a, b = a.detach(), b.detach()
        if a.shape == b.shape and same_bits(a, b):
            return
        if untouched:
            yield f"{path}: the weight's own bits have changed"
        elif not b.is_floating_point():
            yield f"{path} is {_short(a)}, not {_short(b)}"
        elif self.precision == torch.float64 or b.numel() >= FEW:
            moved = m.detach() if isinstance(m, torch.Tensor) and m.shape == b.shape else b
            error, bound = relative_error(a, b, b), self._bound(b, moved)
            if not error <= bound:
                yield f"{path} differs: error {error:.3g} against a bound of {bound:.3g} ({_short(a)}, not {_short(b)})"

    def _bound(self, b: torch.Tensor, moved: torch.Tensor) -> float:
        dtype = max((self.precision, b.dtype), key=lambda d: torch.finfo(d).eps)
        least = torch.finfo(dtype).eps * (NUDGE / 2 if dtype == torch.float64 else 1.0)
        return SLACK * max(noise_floor(b, moved), least)


def _parts(module: nn.Module) -> dict[str, dict[str, Any]]:
    """What a module consists of, without what is lora_fx's; of hooks how many there are."""
    own = {k: v for k, v in vars(module).items() if not k.startswith(MARK) and not isinstance(v, Adapter)}
    children = {k: v for k, v in own.pop("_modules").items() if not isinstance(v, Adapter)}
    hooks = {k: len(own.pop(k)) for k in list(own) if "_hooks" in k and isinstance(own[k], Mapping)}
    for name in ("_flat_weights", "_flat_weight_refs"):  # of recurrent layers: the same parameters
        own.pop(name, None)
    tables = {k: own.pop(k) for k in ("_parameters", "_buffers")}
    return {"children": children, "hooks": hooks, **tables, "attributes": own}


def _short(value: Any) -> str:
    text = str(value.tolist()) if isinstance(value, torch.Tensor) else repr(value)
    text = " ".join(text.split())
    return text if len(text) <= 100 else f"{text[:97]}..."


def _described(tensor: torch.Tensor) -> str:
    gradient = " with a gradient" if tensor.requires_grad else ""
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}{gradient}"
