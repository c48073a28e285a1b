"""A checkpoint as the model has it that transformers loads from it.

    block_sparse_moe.gate.weight                   →  mlp.gate.weight                   another name
    experts.0.w1.weight … experts.7.w1.weight,
    experts.0.w3.weight … experts.7.w3.weight      →  experts.gate_up_proj (8, 2n, m)   stacked, then side by side

transformers' own table of conversions says so, for each `model_type`. Adapters have the names of models; what they add
to a tensor that was merged is added to its parts, where they lie. Only the one way in which experts are merged is
understood; what is merged in another way keeps its names on disk, so that an adapter of it fits nowhere.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from lora_fx.deltas.adapter import Adapter
from lora_fx.export.adapters.conversions import conversions, in_the_model
from lora_fx.export.checkpoints.checkpoint import Checkpoint, Stored
from lora_fx.export.checkpoints.shares import IN_THE_MODEL, Share, adapter_of
from lora_fx.graph.layout import Layout
from lora_fx.reading import refuse


@dataclass(frozen=True)
class Part:
    """A tensor on disk: one expert of a tensor of the model, and some indices of its axis after that."""

    tensor: str
    expert: int
    start: int
    stop: int


@dataclass(frozen=True)
class Loaded:
    """The names and shapes that a model has, over those of its checkpoint."""

    checkpoint: Checkpoint
    """By the model's names. A tensor that is merged has its first part's place; its numbers cannot be read."""
    names: Mapping[str, str] = field(default_factory=dict)
    """Name in the model → name on disk, of those that have another."""
    parts: Mapping[str, Sequence[Part]] = field(default_factory=dict)
    """Of tensors that are merged."""

    @staticmethod
    def of(checkpoint: Checkpoint) -> Loaded:
        rules = [*conversions(checkpoint.config)]
        renamed: dict[str, list[str]] = defaultdict(list)
        merged: dict[str, list[tuple[int, str]]] = defaultdict(list)
        for name in sorted(checkpoint.tensors, key=_natural) if rules else ():
            own, turn = in_the_model(name, rules)
            if turn is None:
                renamed[own].append(name)
            else:
                merged[own].append((turn, name))
        tensors, parts = {}, {}
        for own, sources in merged.items():
            if own not in renamed and (found := _stacked(own, sources, checkpoint)) is not None:
                tensors[own], parts[own] = found
        held = {part.tensor for own in parts.values() for part in own}
        once = {own: names[0] for own, names in renamed.items() if len(names) == 1}
        names = {own: name for own, name in once.items() if own != name and own not in checkpoint.tensors}
        kept = {*checkpoint.tensors} - held - {*names.values()}
        tensors |= {own: replace(checkpoint.tensors[name], name=own) for own, name in names.items()}
        tensors |= {name: checkpoint.tensors[name] for name in kept}
        aliases = {alias: own for alias, own in checkpoint.aliases.items() if own in kept}
        return Loaded(replace(checkpoint, tensors=tensors, aliases=aliases), names, parts)

    def by_its_names(self, said: Mapping[str, Any] | None) -> dict[str, Any] | None:
        """What is said of tensors on disk, by the model's names."""
        own = {name: model for model, name in self.names.items()}
        return None if said is None else {own.get(name, name): value for name, value in said.items()}

    def on_disk(self, share: Share, place: str) -> Iterator[Share]:
        """What a share of a tensor of the model adds to those on disk."""
        if share.tensor not in self.parts:
            yield replace(share, tensor=self.names.get(share.tensor, share.tensor))
            return
        adapter = share.adapter
        if adapter.kind.name != "lora":
            reason = (
                f"{share.tensor} lies as {len(self.parts[share.tensor])} tensors, and {adapter.kind.name} takes all"
            )
            refuse(place, reason, IN_THE_MODEL)
        for part in self.parts[share.tensor]:
            if (own := _part_of(adapter, part)) is not None:
                yield Share(part.tensor, own)


def _natural(name: str) -> list[tuple[bool, int, str]]:
    """Experts in the order of their numbers, as transformers stacks them."""
    return [(not word.isdecimal(), int(word) if word.isdecimal() else 0, word) for word in name.split(".")]


def _stacked(own: str, sources: Sequence[tuple[int, str]], checkpoint: Checkpoint) -> tuple[Stored, list[Part]] | None:
    """The tensor that is merged of these, and where each of them is in it; None where they do not fit together."""
    turns: dict[int, list[Stored]] = defaultdict(list)
    for turn, name in sources:
        turns[turn].append(checkpoint.tensors[name])
    experts = len(turns[0])
    each = [turns[turn] for turn in range(len(turns))]
    if any(len(own) != experts or len({(t.shape, t.dtype) for t in own}) != 1 for own in each):
        return None
    firsts = [own[0] for own in each]
    if any(len(t.shape) != 2 or t.shape[1] != firsts[0].shape[1] or t.dtype != firsts[0].dtype for t in firsts):
        return None
    parts, at = list[Part](), 0
    for own_turn in each:
        stop = at + own_turn[0].shape[0]
        parts += [Part(stored.name, expert, at, stop) for expert, stored in enumerate(own_turn)]
        at = stop
    return replace(firsts[0], name=own, shape=(experts, at, firsts[0].shape[1])), parts


def _part_of(adapter: Adapter, part: Part) -> Adapter | None:
    """An adapter of the tensor on disk; None where nothing of it is adapted."""
    layout, A, B = adapter.layout, adapter.A[part.expert], adapter.B[part.expert]
    shape = (part.stop - part.start, layout.shape[2])
    rows = range(layout.size("o")) if adapter.rows is None else adapter.rows
    if layout.sides == "boi":
        inside = [k for k, row in enumerate(rows) if part.start <= row < part.stop]
        own = tuple(rows[k] - part.start for k in inside)
        B = B[inside]
    else:  # side by side along what A reads
        own, A = tuple(rows), A[:, part.start : part.stop]
    if not own:
        return None
    here = Layout(layout.sides[1:], shape)
    only = None if own == tuple(range(here.size("o"))) else own
    said = {"rank": adapter.rank, "alpha": adapter.alpha, "scaling": adapter.scaling}
    return adapter_of(here, "lora", {"A": A, "B": B}, adapter.name, said, only, adapter.role)
