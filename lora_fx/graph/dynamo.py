"""What Dynamo is told about code of ours.

* `inlined`: compiled as a part of its caller, or not at all. Dynamo looks at each frame that runs below compiled code.
  Where it cannot trace a forward (of an `nn.LSTM`, or one that takes a lock), it runs that as Python, and torch's own
  functions in there too; but what stands in their place here it would compile one by one, for each weight anew.
* `reverse_matmul`: W @ x, for a W that is no tensor.
"""

from __future__ import annotations

import importlib
import operator
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch._C._dynamo import eval_frame

_Function = TypeVar("_Function", bound=Callable[..., Any])


def inlined(function: _Function) -> _Function:
    """The same, which runs as Python, with all that it calls, wherever its caller does."""
    try:
        skip = eval_frame._FrameAction.SKIP
        eval_frame.set_code_exec_strategy(function.__code__, eval_frame._FrameExecStrategy(skip, skip))
    except AttributeError:  # a torch that has other names for it: compiled one by one they are right as well
        pass
    return function


def reverse_matmul() -> bool:
    """Have Dynamo say ``Tensor.__rmatmul__(x, W)`` for W @ x, as it says ``Tensor.__rsub__(x, W)`` for W − x.

    Its table of reversed operators has no row for this one, and without it says ``Tensor.matmul(x, W)``, just as for
    x @ W: nobody could tell the two apart, and a square W would be multiplied from the wrong side. Dynamo calls this
    while it traces, so that nobody else has to import it.
    """
    try:
        builtin: Any = importlib.import_module("torch._dynamo.variables.builtin")
        builtin.populate_builtin_to_tensor_fn_map()
        builtin.BUILTIN_TO_TENSOR_RFN_MAP.setdefault(operator.matmul, torch.Tensor.__rmatmul__)
    except (ImportError, AttributeError):  # a torch without that table has another way, which is Python's own
        return False
    return True


reverse_matmul._dynamo_marked_constant = True  # type: ignore[attr-defined]  # as `assume_constant_result` marks it
