"""What we keep on the modules of a model: adapters beside their weights, marks, and the record of a fold.

All state lives in the model itself, so that copies, pickles and `state_dict` have it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import fx, nn

from lora_fx.deltas.adapter import Adapter
from lora_fx.deltas.exact_sum import Way
from lora_fx.deltas.rounded_sum import KeptWeight
from lora_fx.errors import LoraFxError

ORIGINAL = "_lora_fx_graph"
"""The graph that a GraphModule had before."""
_READS = "_lora_fx_reads"  # this module's forward is rewritten as a graph
_FOLDED = "_lora_fx_folded"  # what unfolding this module needs
_PRESERVED = "_user_preserved_attributes"  # in a GraphModule's meta: attributes that torch gives to its copies
_CONVERSIONS = "_lora_fx_conversions"  # how transformers would have rewritten the model's keys on saving
_RESIZE = "resize_token_embeddings"
_HEAD = "get_output_embeddings"
SEPARATOR = "_lora_"


def child_name(attribute: str, adapter: str, part: str = "") -> str:
    """The name of the `Adapter` child beside its weight: ``weight_lora_default``, ``weight_lora_default_query``."""
    return f"{attribute}{SEPARATOR}{adapter}" + (f"_{part.rpartition('.')[2]}" if part else "")


def attribute_of(child: str) -> str:
    """The attribute that the weight has, beside which an adapter of this name stands."""
    return child.partition(SEPARATOR)[0]


def attach(owner: nn.Module, child: str, adapter: Adapter, register: bool = True) -> None:
    """Put an adapter beside its weight. A tied weight's other owners refer to it without registering it twice."""
    if register:
        owner.add_module(child, adapter)
    else:
        owner.__dict__[child] = adapter


def detach(owner: nn.Module, child: str) -> None:
    """Take an adapter away from beside its weight."""
    owner._modules.pop(child, None)
    owner.__dict__.pop(child, None)


def remember(module: nn.Module, key: str, value: Any) -> None:
    """Keep something of ours on a module. A GraphModule's copies only have what its meta names."""
    module.__dict__[key] = value
    if isinstance(module, fx.GraphModule):
        module.meta.setdefault(_PRESERVED, {})[key] = value


def forget(module: nn.Module, key: str) -> Any:
    """Take it off again; None where there was nothing."""
    if isinstance(module, fx.GraphModule) and key in module.meta.get(_PRESERVED, {}):
        del module.meta[_PRESERVED][key]
        if not module.meta[_PRESERVED]:
            del module.meta[_PRESERVED]
    return module.__dict__.pop(key, None)


def mark_reader(module: nn.Module) -> None:
    """This module's forward is to be rewritten as a graph."""
    remember(module, _READS, True)


def is_reader(module: nn.Module) -> bool:
    return _READS in module.__dict__


def unmark(module: nn.Module) -> None:
    forget(module, _READS)


def keep_conversions(module: nn.Module) -> None:
    """Put aside how transformers would rewrite the model's keys on saving: they are saved as they are."""
    if _CONVERSIONS not in module.__dict__:
        remember(module, _CONVERSIONS, {k: v for k, v in module.__dict__.items() if k == "_weight_conversions"})
        module.__dict__["_weight_conversions"] = []


def give_back_conversions(module: nn.Module) -> None:
    """Undo `keep_conversions`."""
    if _CONVERSIONS in module.__dict__:
        del module.__dict__["_weight_conversions"]
        module.__dict__.update(forget(module, _CONVERSIONS))


def hold_size(module: nn.Module) -> None:
    """Refuse `resize_token_embeddings` of a transformers model for as long as its embedding or its head is adapted."""
    module.__dict__[_RESIZE] = partial(_resize, module)


def release_size(module: nn.Module) -> None:
    """Undo `hold_size`."""
    if getattr(module.__dict__.get(_RESIZE), "func", None) is _resize:
        del module.__dict__[_RESIZE]


CHECKPOINTS: dict[str, Callable[..., Any]] = {}
"""Method of a transformers model → what it is of an adapted one; the room that writes files puts its own in here."""


def hold_checkpoints(module: nn.Module) -> None:
    """Have a transformers model save and load its adapters, and what trains, without the base."""
    for name, function in CHECKPOINTS.items():
        if _is_pretrained(module) and name not in module.__dict__:
            module.__dict__[name] = partial(function, module)


def release_checkpoints(module: nn.Module) -> None:
    """Undo `hold_checkpoints`."""
    for name, function in CHECKPOINTS.items():
        if getattr(module.__dict__.get(name), "func", None) is function:
            del module.__dict__[name]


def _is_pretrained(module: nn.Module) -> bool:
    return any(
        c.__name__ == "PreTrainedModel" and c.__module__.startswith("transformers.") for c in type(module).__mro__
    )


def hold_head(module: nn.Module) -> None:
    """Refuse TRL the head of a transformers model for as long as that is adapted: it takes the weight, and calls an op
    of its own with it, past the forward that has the branch."""
    module.__dict__[_HEAD] = partial(_head, module)


def release_head(module: nn.Module) -> None:
    """Undo `hold_head`."""
    if getattr(module.__dict__.get(_HEAD), "func", None) is _head:
        del module.__dict__[_HEAD]


def _head(self: Any) -> Any:
    caller = str(sys._getframe(1).f_globals.get("__name__"))
    if caller.partition(".")[0] == "trl":
        raise LoraFxError(
            f"it has an adapter, and {caller} multiplies with its weight past the head's forward, without the branch",
            place=f"the head of {type(self).__name__}",
            remedy="leave the head out of the rules, as Rule(where='lm_head') before the others does",
        )
    return type(self).get_output_embeddings(self)


def _resize(self: Any, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, **options: Any) -> Any:
    now, wanted = self.get_input_embeddings().weight.shape[0], new_num_tokens
    if pad_to_multiple_of:
        wanted = -(-(now if wanted is None else wanted) // pad_to_multiple_of) * pad_to_multiple_of
    if wanted in (None, now):
        return type(self).resize_token_embeddings(self, new_num_tokens, pad_to_multiple_of, **options)
    raise LoraFxError(
        f"the embedding or the head has an adapter for {now} tokens, and is to have {wanted}",
        place=f"{type(self).__name__}.{_RESIZE}",
        remedy="resize first and apply then; or fold(model, final=True), resize, and apply again",
    )


# ── the record of a fold ─────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class PutAway:
    """An adapter that a fold has taken from beside its weight."""

    adapter: Adapter
    registered: bool
    """It was a child of the module; the other owners of a tied weight refer to it."""


@dataclass(frozen=True)
class FoldRecord:
    """What one module needs to be unfolded."""

    children: Mapping[str, PutAway]
    ways: Mapping[str, Way | KeptWeight] = field(default_factory=dict)
    """attribute → the way back to the original weight, which the fold has overwritten."""
    originals: Mapping[str, nn.Parameter] = field(default_factory=dict)
    """attribute → the original parameter: the fold has given this module a copy of its own."""
    copies: tuple[tuple[str, torch.Tensor], ...] = ()
    """Attribute and checksum of each such copy: it must still be what it was. Unknown of what older versions folded."""

    @property
    def attributes(self) -> tuple[str, ...]:
        return *self.ways, *self.originals


def fold_record(module: nn.Module) -> FoldRecord | None:
    """The record of this module; None where nothing of it is folded."""
    return module.__dict__.get(_FOLDED)


def keep_fold_record(module: nn.Module, record: FoldRecord) -> None:
    remember(module, _FOLDED, record)


def drop_fold_record(module: nn.Module) -> None:
    forget(module, _FOLDED)
