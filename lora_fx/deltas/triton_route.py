"""Where Triton's kernels take the place of torch's ops: on a GPU that has been seen to compute what they say.

There are two sorts of work: branches (`gpu_kernels`) and folds (`fold_kernels`, a `Route` in `fused_sum`). Each is one
route, which says for which dtypes and sizes it is, and asks each device once in a process.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field

import torch


@dataclass(frozen=True, eq=False)
class Route:
    """Work that kernels do in place of torch's ops, where they may.

    The first time that somebody asks for a device, they are compared with torch there. If Triton does not import, makes
    no kernel, or something else comes out, that is said once, and torch computes. A device that has no memory for the
    comparison decides nothing: it is asked again.
    """

    what: str
    """The work, as the warning names it."""
    prove: Callable[[torch.device], None]
    """Runs all kernels there, and raises where something comes out that is not torch's."""
    dtypes: tuple[torch.dtype, ...]
    """Of what they read and write."""
    sizes: range
    """The elements of a tensor for which they are."""
    capability: tuple[int, int] | None = None
    """The least one of an NVIDIA GPU for which they are; None for any GPU."""
    decided: dict[torch.device, bool] = field(default_factory=dict)

    def knows(self, dtype: torch.dtype, elements: int) -> bool:
        """They are for such a tensor."""
        return dtype in self.dtypes and elements in self.sizes

    def runs_on(self, device: torch.device) -> bool:
        """They compute there, and give what torch gives."""
        decided = self.decided.get(device)
        return self._decide(device) if decided is None else decided

    def refuse(self, device: torch.device, error: Exception) -> None:
        """Torch's ops from now on."""
        self.decided[device] = False
        reason = f"{type(error).__name__}: {error}".partition("\n")[0]
        warnings.warn(
            f"lora_fx computes {self.what} on {device} with torch's ops, which are slower, not Triton's: {reason}",
            stacklevel=2,
        )

    def _decide(self, device: torch.device) -> bool:
        if not self._is_for(device):
            self.decided[device] = False
            return False
        try:
            self.prove(device)
        except Exception as error:  # of whatever a compiler and a driver raise
            if not is_full(error):
                self.refuse(device, error)
            return False
        self.decided[device] = True
        return True

    def _is_for(self, device: torch.device) -> bool:
        if device.type != "cuda" or self.capability is None:
            return device.type == "cuda"
        return not torch.version.hip and torch.cuda.get_device_capability(device) >= self.capability


def is_full(error: Exception) -> bool:
    """There is no memory. A CPU and Triton have no error of their own for that."""
    full = isinstance(error, torch.OutOfMemoryError | MemoryError)
    return full or any(said in str(error) for said in ("can't allocate memory", "[CUDA]: out of memory"))


def _prove_branches(device: torch.device) -> None:
    from lora_fx.deltas import gpu_kernels

    gpu_kernels.prove(device)


BRANCHES = Route(
    "branches",
    _prove_branches,
    dtypes=(torch.bfloat16, torch.float16),
    sizes=range(2**23, 2**63),  # passing over fewer takes no longer than launching a kernel from Python
    capability=(8, 0),
)
"""Of tensors of tokens."""
