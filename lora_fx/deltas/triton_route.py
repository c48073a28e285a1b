"""Whether Triton's kernels take the place of torch's ops: on a GPU that has been seen to compute what they say."""

from __future__ import annotations

import warnings
from functools import lru_cache

import torch

HALF = (torch.bfloat16, torch.float16)
"""The dtypes of what they read and write."""

LARGE = 2**23
"""Elements of a tensor of tokens from which on passing over it takes longer than launching a kernel from Python."""


@lru_cache(maxsize=16)
def available(device: torch.device) -> bool:
    """Whether the kernels run on this device, and give what torch gives; if they should and do not, it is said once."""
    if device.type != "cuda" or torch.version.hip or torch.cuda.get_device_capability(device) < (8, 0):
        return False
    try:
        from lora_fx.deltas import gpu_kernels

        gpu_kernels.prove(device)
    except Exception as error:  # of whatever a compiler and a driver raise
        reason = f"{type(error).__name__}: {error}".partition("\n")[0]
        warnings.warn(f"lora_fx computes branches on {device} with torch's ops, not Triton's: {reason}", stacklevel=2)
        return False
    return True
