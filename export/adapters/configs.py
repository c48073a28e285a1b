"""PEFT's configs as rules:   LoraConfig(r=8, target_modules=["q_proj"], …)   →   the same sites, rank, alpha, dropout

A config says for one model what a file of PEFT's says for it, but for the numbers. So it is read as such a file of an
adapter that has not begun to train: which weights, in which axes, what trains beside them and what is refused, are
those of `load_adapter`. Nothing of PEFT is imported.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lora_fx.deltas.kinds import kind_named
from lora_fx.errors import RuleError
from lora_fx.export.adapters import beside
from lora_fx.export.adapters import peft as peft_format
from lora_fx.export.adapters.files import planned
from lora_fx.export.adapters.folder import ADALORA, CONFIG, PEFT, Folder, check_types, read_config
from lora_fx.export.adapters.peft import HEADS, PREFIX, Modules, embedding
from lora_fx.export.adapters.peft_files import read_lora
from lora_fx.export.adapters.values import Saved
from lora_fx.graph.program import Program
from lora_fx.model.classes import unwired
from lora_fx.model.inventory import weight_name
from lora_fx.passes.base import UNFOLDED, Facts, Pass, Result, given
from lora_fx.passes.planning import Plan
from lora_fx.reading import boundary

_USUAL = "TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING"

#: init_lora_weights → our kind, and its settings; ``pissa_niter_4`` is another of them
_STARTS: Mapping[Any, tuple[str, Mapping[str, Any]]] = {
    True: ("lora", {"init": "kaiming"}), None: ("lora", {"init": "kaiming"}),
    "gaussian": ("lora", {"init": "gaussian"}), "pissa": ("pissa", {}), "olora": ("olora", {}),
}  # fmt: skip


@dataclass(frozen=True)
class PeftRules:
    """What a config of PEFT's asks for; `apply`, `plan` and `memory` take it as rules. See `rules_from_peft`."""

    config: Mapping[str, Any]
    """Its options, in the words of `adapter_config.json`."""
    place: str = "LoraConfig"
    """Where they stand, for errors."""


def rules_from_peft(config: Any) -> PeftRules:
    """A config of PEFT's as rules: `lora_fx.apply(model, rules_from_peft(config))` adapts what PEFT would.

    `apply`, `plan` and `memory` also take the config itself. The weights are those that PEFT finds by their names, in
    its order of patterns; each gets the rank, alpha, scaling and dropout that it has there. What PEFT trains besides
    (`modules_to_save`, the head of a task, biases, token rows) gets the kind `full`: the same function and the same
    gradients, and off when the adapters are. The start is B = 0; ``pissa`` and ``olora`` become the kinds of that name,
    which leave the base what it is.

    Args:
        config: a `peft.LoraConfig`, a mapping of its options, or the path of an `adapter_config.json` or of its folder.

    Raises:
        RuleError: it is no config of LoRA, or an option is of no type that PEFT has for it.
        FileError: the same of a file, or there is none.

    `apply` refuses by name what lora_fx does not compute, starts that change the base, and layers for which PEFT
    computes something else than W + s·B·A.
    """
    if isinstance(config, PeftRules):
        return config
    if isinstance(config, str | os.PathLike):
        path = Path(config)
        file = path / CONFIG if path.is_dir() else path
        return PeftRules(read_config(file), str(file))
    options = config if isinstance(config, Mapping) else getattr(config, "to_dict", dict)()
    options = {str(key): _plain(value) for key, value in options.items()}
    options.setdefault("peft_type", PEFT)
    place = "LoraConfig" if isinstance(config, Mapping) else type(config).__name__
    if not isinstance(config, Mapping) and not hasattr(config, "peft_type"):
        raise RuleError(f"{config!r} is no config of PEFT's", place="rules_from_peft", remedy="pass a LoraConfig")
    if options["peft_type"] != PEFT:
        ways = {ADALORA: "write Rule(kind='adalora', rank=12), with lora_fx.Budget for its ranks"}
        remedy = ways.get(options["peft_type"], "write rules of the kinds that lora_fx has, or register_kind one")
        raise RuleError(f"peft_type={options['peft_type']!r} is not LoRA", place=place, remedy=remedy)
    with boundary("", place, "write what PEFT's LoraConfig takes", RuleError):
        check_types(options, place)
    return PeftRules(options, place)


def is_config(rules: Any) -> bool:
    """Whether these are a config of PEFT's in the place of rules."""
    if isinstance(rules, Mapping):
        return "peft_type" in rules
    return isinstance(rules, PeftRules) or hasattr(rules, "peft_type")


def _plain(value: Any) -> Any:
    """As a JSON file has it."""
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, set | frozenset):
        return sorted(value)
    return list(value) if isinstance(value, tuple) else value


@dataclass(frozen=True)
class _Untrained(Folder):
    """A file of PEFT's without numbers: tensors have shapes, and no memory."""

    place: str = ""

    def option(self, key: str) -> str:
        return f"{self.place}, {key}"

    def tensor(self, key: str) -> str:
        return f"{self.place}: {key.removeprefix(PREFIX)}"


@dataclass(frozen=True)
class Start(Pass):
    """Plan the adapters that a config of PEFT's asks for.

    Args:
        rules: `rules_from_peft` of it.
        example_inputs, adapter: as in `apply`.
    """

    rules: PeftRules
    example_inputs: Any = None
    adapter: str = "default"

    name = "start"
    requires = (UNFOLDED,)
    ensures = (given(Program), given(Plan))

    def call(self, model: nn.Module, facts: Facts) -> Result:
        remedy = "write rules instead"
        with unwired(model), boundary("it cannot be applied to this model", self.rules.place, remedy, RuleError):
            saved = list(_saved(model, self.rules))
        return planned(model, saved, self.adapter, self.example_inputs)


def _saved(model: nn.Module, rules: PeftRules) -> Iterator[Saved]:
    """What `load_adapter` would find in the file that PEFT would write before the first step."""
    config, modules = _complete(model, rules), Modules(model)
    kind, start = _start(config.pop("init_lora_weights", True), rules.place)
    folder = _Untrained(Path(), config, {}, None, place=rules.place)
    peft_format.check_options(folder)
    if kind != "lora" and config.get("use_dora"):
        reason = f"init_lora_weights={kind!r} and use_dora: one weight has one kind of adapter"
        raise RuleError(reason, place=rules.place, remedy="leave one of them out")
    if config.get("lora_bias"):
        reason = "lora_bias: PEFT multiplies the bias of the branch with its scale, and so its gradient"
        raise RuleError(reason, place=rules.place, remedy="train the layers' own: apply again with Rule(kind='bias')")
    tensors = dict(_tensors(modules, folder))
    if not tensors:
        wanted = {key: config[key] for key in ("target_modules", "target_parameters") if config.get(key)}
        reason = f"{wanted} matches nothing that PEFT adapts in this {type(model).__name__}"
        near = ", ".join(name.rpartition(".")[0] for name in modules.names if name.endswith(".weight"))
        raise RuleError(reason, place=rules.place, remedy=f"its modules are {near}"[:500])
    alone = not peft_format.ties_under(folder)
    for s in read_lora(model, replace(folder, tensors=tensors), needed=False):
        if "rank" in s.settings:
            own = s.kind if kind == "lora" else kind_named(kind)
            s = replace(s, kind=own, settings={**s.settings, **start})
        yield replace(s, started=False, alone=alone)


def _start(init: Any, place: str) -> tuple[str, Mapping[str, Any]]:
    """A kind, and the settings that say how it starts."""
    word, _, rounds = str(init).partition("_niter_")
    if word == "pissa" and rounds.isdecimal():
        return "pissa", {"niter": int(rounds)}
    if not isinstance(init, str | bool | None) or init not in _STARTS:
        reason = f"init_lora_weights={init!r}: the adapted model would not start as the base, or by its data"
        raise RuleError(reason, place=place, remedy="leave it out, or say 'gaussian', 'pissa', 'olora'")
    return _STARTS[init]


def _complete(model: nn.Module, rules: PeftRules) -> dict[str, Any]:
    """The config with what PEFT adds to it by itself: heads of a task, and targets by the type of the model."""
    config = dict(rules.config)
    if heads := HEADS.get(str(config.get("task_type"))):
        own = config.get("modules_to_save") or ()
        config["modules_to_save"] = [*own, *(head for head in heads if head not in own)]
    named = any(config.get(key) for key in ("target_modules", "target_parameters", "trainable_token_indices"))
    if not named:
        config["target_modules"] = _usual(model, rules.place)
    return config


def _usual(model: nn.Module, place: str) -> Any:
    kind = getattr(getattr(model, "config", None), "model_type", None)
    remedy = "say target_modules=['q_proj', 'v_proj'], or 'all-linear'"
    usual = getattr(sys.modules.get("peft.utils.constants"), _USUAL, None)  # a config of theirs has imported it
    if usual is None:
        reason = "it names no target_modules, and PEFT, which has a table of them, is not imported"
        raise RuleError(reason, place=place, remedy=remedy)
    if kind not in usual:
        reason = f"it names no target_modules, and PEFT has none for the model type {kind!r}"
        raise RuleError(reason, place=place, remedy=remedy)
    return _plain(usual[kind])


def _tensors(modules: Modules, folder: Folder) -> Iterator[tuple[str, torch.Tensor]]:
    """What would be in the file."""
    config = folder.config
    layers = [layer for _, layer in peft_format.targeted_layers(modules, folder)]
    if any(layer.kind == "parameter" for layer in layers) and config.get("lora_dropout"):
        reason = f"lora_dropout={config['lora_dropout']} on target_parameters, which PEFT cannot drop"
        raise RuleError(reason, place=folder.option("target_parameters"), remedy="set lora_dropout=0, or write rules")
    ranks = peft_format.ranks(folder, [layer.target for layer in layers])
    for layer in layers:
        for key, shape in zip(layer.keys, layer.shapes(ranks[layer.target]), strict=True):
            yield key, _empty(shape)
        if config.get("use_dora"):
            yield layer.magnitude, _empty(layer.magnitude_shape)
    whole = beside.whole_modules(modules, folder)
    for path in whole:
        for name, tensor, _ in beside.state(modules, path):
            yield f"{PREFIX}{name}", tensor
    for name, parameter in _biases(modules, folder, {layer.target for layer in layers}, whole):
        yield f"{PREFIX}{name}", parameter
    wanted = config.get("trainable_token_indices") or {}
    wanted = {embedding(modules).rpartition(".")[0]: wanted} if isinstance(wanted, list) else wanted
    for end, rows in wanted.items():
        for path in modules.by_path:
            table = modules.parameter(f"{path}.weight") if path and f"{PREFIX}{path}".endswith(end) else None
            if table is not None:
                yield f"{PREFIX}{path}.{beside.TOKENS}", _empty((len(rows), *table.shape[1:]))


def _biases(
    modules: Modules, folder: Folder, adapted: set[str], whole: list[str]
) -> Iterator[tuple[str, torch.Tensor]]:
    which = folder.config.get("bias") or "none"
    for path, module in modules.by_path.items() if which != "none" else ():
        for last, parameter in module.named_parameters(recurse=False):
            name = weight_name(path, last)
            mine = "bias" in name if which == "all" else path in adapted and last == "bias"
            if not mine or any(beside.inside(path, own) for own in whole):
                continue
            if last != "bias":
                reason = f"bias={which!r} trains {name} in PEFT, which goes by the word in its name"
                raise RuleError(reason, place=folder.option("bias"), remedy="say bias='lora_only', or write rules")
            yield name, parameter


def _empty(shape: tuple[int, ...]) -> torch.Tensor:
    return torch.zeros(1).expand(shape)
