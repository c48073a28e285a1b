"""Names of before, for rooms that have not moved to `inventory` and `marks` yet."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from lora_fx.deltas.adapter import Adapter
from lora_fx.model.classes import is_generated as is_generated
from lora_fx.model.classes import is_wired as is_wired
from lora_fx.model.classes import show as show
from lora_fx.model.classes import unwire as unwire
from lora_fx.model.classes import unwired as unwired
from lora_fx.model.inventory import Storage as Storage
from lora_fx.model.inventory import inventory
from lora_fx.model.inventory import is_shard as is_shard
from lora_fx.model.inventory import plain_path as plain_path
from lora_fx.model.marks import attach as attach
from lora_fx.model.marks import attribute_of as attribute_of
from lora_fx.model.marks import child_name as child_name
from lora_fx.model.marks import detach as detach
from lora_fx.model.marks import forget as forget
from lora_fx.model.marks import is_reader as is_reader
from lora_fx.model.marks import mark_reader as mark_reader
from lora_fx.model.marks import remember as remember
from lora_fx.model.marks import unmark as unmark

FOLDED = "_lora_fx_folded"


def adapters_of(owner: nn.Module) -> dict[str, Adapter]:
    found = {name: child for name, child in owner._modules.items() if isinstance(child, Adapter)}
    found.update({name: child for name, child in owner.__dict__.items() if isinstance(child, Adapter)})
    return found


def find_adapters(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, Adapter]]:
    for place in inventory(model).places:
        yield place.path, place.owner, place.child, place.adapter


def adapted_storages(model: nn.Module) -> list[Storage]:
    return inventory(model).storages()


def refuse_displaced(model: nn.Module) -> None:
    inventory(model)
