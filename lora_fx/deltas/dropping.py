"""Dropout on the input of a branch, with fewer random numbers.

    x  →  x · keep / P(keep)        keep: 1 or 0 for each element, by chance

On a CPU torch draws a number for each element, in one thread whatever there is, and that takes longer than the branch.
Sixteen bits decide as well, and four elements share a draw.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.fx.experimental.proxy_tensor import get_proxy_mode
from torch.nn import functional as F

from lora_fx.deltas import one_pass
from lora_fx.deltas.compiled_schedules import ORDINARY
from lora_fx.errors import AdapterError
from lora_fx.graph.capture import recording

_BITS = 16
_LEAST = 2**-7
"""Nearer to 0 or to 1 the rounding of a probability would count; it is off by no more than 2⁻¹⁷."""


class BranchDropout(nn.Dropout):
    """`nn.Dropout`, which takes its numbers from torch's generator, too, but other ones.

    The probability is the multiple of 2⁻¹⁶ next to p, and what is kept is scaled by that, so that the mean is x. In a
    program that is compiled, captured, exported or transformed, and anywhere but on a CPU, it is `nn.Dropout`.
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # torch's name for it
        p = self.p
        if self.training and p and not torch.compiler.is_compiling() and _may_not_draw():
            raise AdapterError(
                f"dropout={p:g} draws in train mode, and vmap was not told how: its randomness is 'error'",
                place="the dropout of a branch",
                remedy="call vmap(…, randomness='different') or 'same', or model.eval() first",
            )
        if torch.compiler.is_compiling() or not (self.training and _LEAST <= p <= 1 - _LEAST):
            return F.dropout(input, p, self.training, self.inplace)
        if _draws(input):
            return input * kept(input, p)
        return one_pass.Dropped.of(input, p) if one_pass.may_drop(input) else F.dropout(input, p, True, self.inplace)


def _draws(x: Any) -> bool:
    """Whether to draw for it here. Nothing decides that could be another when a checkpoint computes it again."""
    if type(x) not in ORDINARY or not x.is_cpu or not x.is_floating_point():
        return False
    captured = recording.on or torch._C._is_tracing() or get_proxy_mode() is not None
    return not captured and not torch._C._are_functorch_transforms_active()


def _may_not_draw() -> bool:
    """Whether a vmap around it refuses random numbers."""
    if not torch._C._are_functorch_transforms_active():
        return False
    around = [
        torch._C._functorch.CVmapInterpreterPtr(own)
        for own in torch._C._functorch.get_interpreter_stack() or ()
        if own.key() == torch._C._functorch.TransformType.Vmap
    ]
    return any(own.randomness() == torch._C._functorch.RandomnessType.Error for own in around)


def kept(x: torch.Tensor, p: float) -> torch.Tensor:
    """For each element of x 0 or, with probability 1 − p, the reciprocal of that; in its dtype."""
    return decided(random_bits(x.numel()).view(x.shape), p, x.dtype)


def random_bits(n: int) -> torch.Tensor:
    """n times sixteen of them, four by a draw."""
    return torch.empty((n + 3) // 4, dtype=torch.int64).random_(-(2**63), None).view(torch.int16)[:n]


def decided(bits: torch.Tensor, p: float, dtype: torch.dtype) -> torch.Tensor:
    """`kept` by sixteen random bits for each element."""
    dropped = round(p * 2**_BITS)  # of so many values
    return bits.ge(dropped - 2 ** (_BITS - 1)).to(dtype).mul_(2**_BITS / (2**_BITS - dropped))
