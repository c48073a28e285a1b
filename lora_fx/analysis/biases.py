"""The bias of a use: the parameter that is added to what a weight makes, as the graph shows it."""

from __future__ import annotations

from typing import Any

from torch import fx, nn

from lora_fx.graph.forms import op_name
from lora_fx.graph.nodes import first_operand
from lora_fx.graph.program import Program, Use, Weight, storage_key
from lora_fx.graph.views import CASTS, COPIES, MOVES

_TORCH_READS_WHOLE = (nn.RNNBase, nn.RNNCellBase, nn.MultiheadAttention)


class Biases:
    """Of a program: each with all its names, and with the uses that read it."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self._tensors = program.capture.tensors if program.capture else {}
        self._found: dict[tuple, Weight] = {}
        for name, parameter in program.model.named_parameters(remove_duplicate=False):
            bias = self._found.setdefault(storage_key(parameter), Weight((), parameter))
            bias.names += (name,)
        for use in program.uses:
            if (key := self._read_by(use)) is not None:
                self._found[key].uses.append(use)

    @property
    def named(self) -> dict[str, Weight]:
        """Every parameter under each of its names, with the uses whose bias it is."""
        return {name: bias for bias in self._found.values() for name in bias.names}

    def of(self, use: Use) -> Weight | None:
        """What is added to this use's output; None where it has no bias.

        It is an operand of the op itself, or of an addition that reads its output. Where no graph shows it (an LSTM
        takes its weights whole, inputs were not given), it is what a module of torch's own calls so.
        """
        key = self._read_by(use)
        return None if key is None else self._found[key]

    def _read_by(self, use: Use) -> tuple | None:
        """The storage of the bias; None where the use has none."""
        if not use.multiplies:
            return None
        if use.call is None or not use.seen:
            return self._named(use)
        key = self._parameter(use.call.options.get("bias"))
        if key is not None:
            return key
        adds = [user for user in use.node.users if op_name(user.target) in ("add", "add_", "__add__", "__iadd__")]
        others = (self._parameter(n) for user in adds for n in user.all_input_nodes if n is not use.node)
        return next((key for key in others if key is not None), None)

    def _parameter(self, node: Any) -> tuple | None:
        """The storage of the parameter that a node is a view or a cast of."""
        while isinstance(node, fx.Node) and node not in self._tensors:
            name = op_name(node.target) if node.op == "call_function" else ""
            node = first_operand(node) if name in MOVES or name in COPIES or name in CASTS else None
        tensor = self._tensors.get(node) if isinstance(node, fx.Node) else None
        key = None if tensor is None else storage_key(tensor)
        return key if key in self._found else None

    def _named(self, use: Use) -> tuple | None:
        path, _, attribute = use.weight.name.rpartition(".")
        owner = self.program.model.get_submodule(path)
        if not (isinstance(owner, _TORCH_READS_WHOLE) or not use.seen):
            return None
        bias = owner._parameters.get(attribute.replace("weight", "bias"))
        return None if bias is None else storage_key(bias)
