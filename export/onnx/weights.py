"""The numbers of an exported program, by name: where each comes from, and when.

A program is translated from the structure of the base model alone. The numbers are put in by name, one tensor at a
time and not before the file is written: a fold takes no second copy of the model, and a model on meta takes its weights
from a checkpoint that never has to fit into memory.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import nn

from lora_fx.changes import safe_point
from lora_fx.deltas.adapter import Adapter
from lora_fx.deltas.exact_sum import folded_weight
from lora_fx.deltas.rounded_sum import rounded_sum
from lora_fx.export.onnx.runtimes import refuse, refusing
from lora_fx.graph.capture import on_meta
from lora_fx.model.classes import unwired
from lora_fx.model.inventory import inventory, weight_name
from lora_fx.passes.fold import refuse_unfoldable
from lora_fx.reading import RESTORE, TABLE, contents, regular, tensor_table


@dataclass(frozen=True)
class Weight:
    """One parameter or buffer of the program."""

    name: str
    dtype: torch.dtype
    shape: torch.Size
    storage: int
    """Which storage it has in the base model: a fold may give one use of a tied weight a copy of its own."""
    load: Callable[[], torch.Tensor]
    """The numbers in the base model."""
    stored: bool
    """They are in a file: each `load` reads them."""
    adapters: tuple[Adapter, ...] = ()
    """Those that are folded into it."""

    def numbers(self) -> torch.Tensor:
        """round(W + Σ δ), or W."""
        safe_point()
        loaded = self.load()
        if not self.adapters:
            return loaded.to(self.dtype)
        if not all(adapter.kind.low_rank for adapter in self.adapters):
            return rounded_sum(loaded, self.adapters, self.dtype, self.name)
        return folded_weight(loaded, [adapter.exact() for adapter in self.adapters], self.dtype, self.name)


Weights = dict[str, Weight]


@contextmanager
def structure(model: nn.Module, folded: bool, checkpoint: Checkpoint | None = None) -> Iterator[Weights]:
    """Inside, the model may be traced; what comes says what its tensors hold, under all their names.

    Args:
        folded: trace the base model, with the active adapters folded into what the tensors hold. A use of a tied weight
            that is folded alone has a parameter of its own then, without numbers.
        checkpoint: where the numbers of tensors on meta are.
    """
    with ExitStack() as stack:
        adapters: dict[int, tuple[Adapter, ...]] = {}
        split: dict[int, nn.Parameter] = {}
        if folded:
            storages = inventory(model).storages()
            for storage in storages:
                if checkpoint is None:
                    refuse_unfoldable(storage)
            stack.enter_context(unwired(model))
            for storage in storages:
                old = storage.parameter
                if storage.split:
                    storage.replace(nn.Parameter(torch.empty_like(old), old.requires_grad))
                    stack.callback(storage.replace, old)
                    split[id(storage.parameter)] = old
                for owner, attribute in storage.owners:
                    adapters[id(owner._parameters[attribute])] = storage.adapters
        named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
        names: dict[int, list[str]] = {}
        for name, tensor in named:
            names.setdefault(id(split.get(id(tensor), tensor)), []).append(name)
        kept, weights = _kept_originals(model), {}
        for name, tensor in named:
            source = split.get(id(tensor), tensor)
            storage = kept.get(name, source.untyped_storage()._cdata)
            stored = checkpoint is not None and source.is_meta
            load = checkpoint.loader(names[id(source)], source) if checkpoint and stored else source.detach
            own = adapters.get(id(tensor), ())
            weights[name] = Weight(name, source.dtype, source.shape, storage, load, stored, own)
        if checkpoint is not None:
            stack.enter_context(on_meta(model))
        yield weights


def seen(model: nn.Module, weights: Weights) -> tuple[object, ...]:
    """What a trace of a model meets: where two are equal, two traces are of one program.

    These are the modules themselves, what each runs (its class, a forward or hooks of its own), and what it reads:
    which names have one tensor, which storage each is of, and its type. A graph that was written anew is another one.
    """
    modules: list[object] = []
    for path, module in model.named_modules(remove_duplicate=False):
        own, kind = vars(module), type(module)
        hooks = [tuple(h.values()) for h in (module._forward_hooks, module._forward_pre_hooks)]
        modules.append((path, id(module), kind, kind.forward, own.get("forward"), *hooks, module.training))
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    first: dict[int, str] = {}
    tensors = [
        (n, first.setdefault(id(t), n), weights[n].storage, weights[n].dtype, weights[n].shape) for n, t in named
    ]
    return (*modules, *tensors)


def _kept_originals(model: nn.Module) -> dict[str, int]:
    """Of a model that has been folded: parameter name → its storage in the base model, where the fold split it off."""
    here = inventory(model)
    return {
        weight_name(path, attribute): original.untyped_storage()._cdata
        for module, record in here.records.items()
        for path in here.modules[module]
        for attribute, original in record.originals.items()
    }


def adapter_digest(adapters: Mapping[str, Sequence[Adapter]]) -> str:
    """sha256 over the numbers of adapters and what they stand for, by the names of their weights."""
    digest = hashlib.sha256()
    for name in sorted(adapters):
        for adapter in adapters[name]:
            said = adapter.scale if adapter.kind.low_rank else [adapter.kind.name, dict(adapter.settings)]
            digest.update(json.dumps([name, adapter.name, said, adapter.strength, adapter.rows]).encode())
            for factor in adapter.parameters():
                digest.update(str((factor.dtype, tuple(factor.shape))).encode())
                digest.update(tensor_bytes(factor))
    return digest.hexdigest()


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """The bits of a tensor's numbers."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


class Checkpoint:
    """Tensors by name in safetensors files, read when they are asked for.

    Args:
        place: a ``.safetensors`` file, an ``….index.json``, or a folder with one index, or with files.
    """

    def __init__(self, place: str | os.PathLike[str]) -> None:
        self.place = Path(place)
        self._found: dict[str, tuple[Path, tuple[int, ...]]] = {}
        for file in self._files():
            with opened(file) as tensors:
                for name in tensors.keys():  # noqa: SIM118
                    self._found[name] = file, tuple(tensors.get_slice(name).get_shape())

    def _files(self) -> list[Path]:
        place = self.place
        if place.is_dir():
            index = [*place.glob("*.safetensors.index.json")]
            if len(index) != 1:
                files = sorted(place.glob("*.safetensors"))
                return files or self._refuse("the folder holds no .safetensors file")
            place = index[0]
        if not place.exists():
            self._refuse("there is no such file or folder")
        if not place.name.endswith(".index.json"):
            return [place]
        try:
            names = {*json.loads(contents(place, RESTORE, TABLE))["weight_map"].values()}
            inside = all(Path(name).name == name for name in names)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            inside = False
        return [place.with_name(n) for n in sorted(names)] if inside else self._refuse("it is no index of files beside")

    def _refuse(self, reason: str) -> NoReturn:
        refuse(str(self.place), reason, "pass a .safetensors file, an index of some, or the folder with them")

    def loader(self, names: Sequence[str], tensor: torch.Tensor) -> Callable[[], torch.Tensor]:
        """What reads the numbers of a tensor of the model, which may have several names, one of them in the files."""
        name = next((n for n in names if n in self._found), None)
        if name is None:
            remedy = "pass this model's own checkpoint; give buffers that no checkpoint holds their numbers"
            refuse(str(self.place), f"{' = '.join(names)} is on meta, and in none of its files", remedy)
        file, shape = self._found[name]
        if shape != tuple(tensor.shape):
            reason = f"it has shape {shape} where the model has {tuple(tensor.shape)}"
            refuse(f"{file}, {name}", reason, "pass the checkpoint of this model")
        return partial(_read, file, name)


def _read(file: Path, name: str) -> torch.Tensor:
    with opened(file) as tensors:
        return tensors.get_tensor(name)


@contextmanager
def opened(file: Path, framework: str = "pt", remedy: str = RESTORE) -> Iterator[Any]:
    from safetensors import safe_open

    with refusing("it cannot be read", str(file), remedy):
        with open(regular(file, remedy), "rb") as raw:
            tensor_table(raw, str(file), remedy)
        with safe_open(file, framework=framework) as tensors:
            yield tensors
