"""What a matmul with its branch is expected to take:   time = launches + bytes / bandwidth + operations / rate.

A class of devices has one row of constants, measured once; `auto` chooses by what comes out, and a plan prints it. The
formula wants no more than to tell schedules apart: with n tokens, W of in×out and rank r,

* every schedule takes the frozen matmul, and its backward to x;
* the branch passes over x and y again: a product with A and one with B, six in all with gradients. `fused` computes
  them in the fewest ops, and the fast way round, in a function of ours that autograd calls; `in_place` leaves backward
  to autograd, which has an op for each scale and sum, and one more pass; `branch` has those in the forward, too;
* `dense` makes W + s·B·A, in·out elements, and again in backward; it has four of the six products.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from types import MappingProxyType

import torch


@dataclass(frozen=True)
class Device:
    """A class of devices. Times are in µs."""

    launch: float
    """What an op takes before it computes anything: Python, dispatch, autograd's node for it, a kernel's launch."""
    call: float
    """What an autograd function of ours takes besides, forward and backward."""
    bandwidth: float
    """Bytes in a µs."""
    rates: Mapping[int, float]
    """Operations of a matmul in a µs, by the bytes of an element."""
    fresh: float
    """From so many bytes on, memory for a result comes from the system each time…"""
    faults: float
    """… and so many bytes of it in a µs."""


#: measured with `benchmarks/schedules.py` on one thread of an AMD EPYC with AVX-512; glibc maps from 32 MiB on
CPU = Device(5.0, 36.0, 25e3, MappingProxyType({2: 180e3, 4: 85e3, 8: 42e3}), 2**25, 1.7e3)

#: measured on an H100 SXM: a copy of 512 MiB, and bfloat16 matmuls of 8192 tokens, 4096×4096 and 4096×11008. (A small
#: product that is added onto y has 0.6 of that bandwidth, the others 0.8.) Python's share is a CPU's
H100 = Device(5.0, 40.0, 2.9e6, MappingProxyType({2: 8e8, 4: 4e7, 8: 3e7}), math.inf, math.inf)

#: a guess: half of that
GPU = Device(5.0, 40.0, 1.4e6, MappingProxyType({2: 4e8, 4: 2e7, 8: 1e7}), math.inf, math.inf)


def device_class(device: torch.device) -> Device:
    """The row of this device. Of what is on meta nothing is known but that it will be somewhere: it counts as a CPU."""
    if device.type in ("cpu", "meta"):
        return CPU
    return _of_cuda(device.index or 0) if device.type == "cuda" else GPU


@lru_cache(maxsize=16)
def _of_cuda(index: int) -> Device:
    name = torch.cuda.get_device_name(index)
    return H100 if any(known in name for known in ("H100", "H200", "GH200")) else GPU


@dataclass(frozen=True)
class Matmul:
    """x·Wᵀ with a branch."""

    inputs: int
    outputs: int
    rank: int
    size: int
    """Bytes of an element."""
    cast: bool = False
    """The factors are kept in another dtype."""
    gradients: bool = True
    """Forward and backward, to x and the factors; or the forward alone."""


def expected(schedule: str, matmul: Matmul, tokens: float, device: Device = CPU) -> float:
    """µs of a call: of ``branch``, ``in_place``, ``fused`` or ``dense``; or of the frozen matmul alone, ``plain``."""
    m, both = matmul, 2 if matmul.gradients else 1
    across, weight = tokens * (m.inputs + m.outputs), m.inputs * m.outputs
    launches, skinny, sums, moved = 7 if m.gradients else 1, 0, 0, (weight + across) * both  # autograd's engine is 5
    if schedule != "plain":
        skinny = 3 if m.gradients else 1
        launches += (6 if m.gradients else 2) + (2 * both if m.cast else 0)
        moved += across * (4 if m.gradients else 1.5)  # y and the gradient of x are read and written
    if schedule in ("branch", "in_place") and m.gradients:  # two scales and a sum of their own
        launches += 3
        moved += 1.5 * across  # the sum, over x; in and out are not told apart
    if schedule == "branch":
        launches += 2 if not m.gradients else 1
        moved += across
    if schedule == "dense":
        sums = both
        launches -= 0 if m.gradients else 1
        skinny -= 1
        moved += 4 * sums * weight - across * (2 if m.gradients else 1.5)
    slow = 1.5 if schedule in ("branch", "in_place") else 1
    operations = 2 * (tokens * weight * both + m.rank * (slow * skinny * across + sums * weight))
    time = device.launch * launches + moved * m.size / device.bandwidth
    time += operations / device.rates.get(m.size, device.rates[4])
    if sums and weight * m.size > device.fresh:
        time += sums * weight * m.size / device.faults
    if schedule in ("fused", "dense") and m.gradients:
        time += device.call
    return time


def cheapest(schedules: Iterable[str], matmul: Matmul, tokens: int, device: Device = CPU) -> str:
    """The one that is expected to take the least, in training and without gradients: one for both, which then give the
    same bits. Of two that take the same, the first."""
    both = [replace(matmul, gradients=whether) for whether in (False, True)]
    frozen = [expected("plain", case, tokens, device) for case in both]

    def share(name: str) -> float:
        return sum(expected(name, case, tokens, device) / own for case, own in zip(both, frozen, strict=True))

    return min(schedules, key=share)
