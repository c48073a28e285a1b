"""Who reads a table, with which ids: seen from outside, as the model's own code does it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from lora_fx.graph.forms import FORMS, find, op_name


class Lookups(TorchFunctionMode):
    """Inside, each reading of these tables is told.

    Args:
        tables: module and attribute of each; a tied one under each of its names, or under one.
        seen: called with the table and the ids, before it is read.
    """

    def __init__(
        self, tables: Sequence[tuple[nn.Module, str]], seen: Callable[[torch.Tensor, torch.Tensor], None]
    ) -> None:
        super().__init__()
        self._tables, self._seen = tables, seen

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = op_name(func)
        if name in FORMS and FORMS[name].looks_up and not torch.compiler.is_dynamo_compiling():
            call = find(func, args, kwargs, lambda own: 2 if self._is_table(own) else None)
            if call is not None:
                self._seen(call.weight, call.x)
        return func(*args, **kwargs)

    def _is_table(self, operand: Any) -> bool:
        return any(operand is module._parameters[attribute] for module, attribute in self._tables)
