"""What Python waits for: calls that on a GPU come back only when all that was asked for before is done.

They are counted where no GPU is, by what they are. A copy from one device to another is not seen there.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

#: their answer is a number for Python, or has a size that depends on numbers
OPERATIONS = frozenset({
    "_local_scalar_dense", "equal", "is_nonzero", "nonzero", "argwhere", "masked_select", "_unique", "_unique2",
    "unique_dim", "unique_consecutive", "unique_dim_consecutive", "bincount", "repeat_interleave", "histc",
    "_assert_async", "linalg_matrix_rank",
})  # fmt: skip
#: the same, but torch does not compute them with operations; and numbers that are sent to a device
CALLS = frozenset({"tolist", "numpy", "__array__", "cpu"})
SENDS = frozenset({"tensor", "as_tensor"})
MASKED = frozenset({"index", "index_put", "index_put_", "_index_put_impl_"})


class Waits:
    """Inside, `seen` gets the name of each."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    def __enter__(self) -> Waits:
        self.stack = ExitStack()
        self.stack.enter_context(_Calls(self.seen))
        self.stack.enter_context(_Operations(self.seen))
        return self

    def __exit__(self, *error: Any) -> None:
        self.stack.__exit__(*error)


class _Calls(TorchFunctionMode):
    def __init__(self, seen: list[str]) -> None:
        super().__init__()
        self.seen = seen

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = getattr(func, "__name__", ""), kwargs or {}
        if name in CALLS or (name in SENDS and kwargs.get("device") is not None):
            self.seen.append(name)
        return func(*args, **kwargs)


class _Operations(TorchDispatchMode):
    def __init__(self, seen: list[str]) -> None:
        super().__init__()
        self.seen = seen

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        masked = name in MASKED and any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1])
        if name in OPERATIONS or masked:
            self.seen.append(name)
        return func(*args, **(kwargs or {}))
