"""Whether a matrix of a checkpoint lies as (in, out), as transformers' Conv1D has it, and not as (out, in).

The file does not say. A bias does: it is as long as there are output features, and a Conv1D always has one. So a matrix
without a bias is none; one that is not square tells for itself; for a square one, modules of the same name tell
(`c_proj` of an MLP for that of an attention), and then all of the checkpoint, where no matrix lies (in, out).
"""

from __future__ import annotations

from dataclasses import dataclass

from lora_fx.export.checkpoints.checkpoint import Checkpoint


@dataclass(frozen=True)
class Orientation:
    """What the biases of a checkpoint tell."""

    told: dict[str, bool | None]
    """Matrix with a bias → whether it lies (in, out); None for a square one."""

    @staticmethod
    def of(checkpoint: Checkpoint) -> Orientation:
        told: dict[str, bool | None] = {}
        for name, stored in checkpoint.tensors.items():
            bias = checkpoint.tensors.get(name.removesuffix("weight") + "bias")
            if not name.endswith(".weight") or len(stored.shape) != 2 or bias is None or len(bias.shape) != 1:
                continue
            rows, columns = (n == bias.shape[0] for n in stored.shape)
            told[name] = None if rows == columns else columns
        return Orientation(told)

    def transposed(self, name: str) -> bool | None:
        """True for (in, out), False for (out, in); None where the checkpoint does not tell."""
        if name not in self.told:
            return False
        if self.told[name] is not None:
            return self.told[name]
        alike = {said for other, said in self.told.items() if _leaf(other) == _leaf(name) and said is not None}
        if len(alike) == 1:
            return alike.pop()
        return None if True in self.told.values() else False


def _leaf(name: str) -> str:
    return name.split(".")[-2]
