"""PEFT's two files, whole:   adapters of a model   ⇄   adapter_config.json and the tensors."""

from __future__ import annotations

import math
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lora_fx.deltas.kinds import Theta, kind_named
from lora_fx.export.adapters import beside
from lora_fx.export.adapters import peft as peft_format
from lora_fx.export.adapters.conversions import conversions, in_the_model
from lora_fx.export.adapters.folder import PEFT, Folder
from lora_fx.export.adapters.peft import HEADS, ITS_BASE, PREFIX, Layer, Modules
from lora_fx.export.adapters.spelling import respelled
from lora_fx.export.adapters.values import OWN_FORMAT, Files, Held, Saved
from lora_fx.model.classes import own_class
from lora_fx.reading import refuse

# ── writing ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class _Target:
    """What PEFT is told to adapt, with the adapters in each of its layers: they share one rank and one alpha."""

    layers: Mapping[Layer, list[Held]]
    rank: int
    alpha: float
    """Whole numbers as integers, as PEFT types them."""
    scale: float

    @classmethod
    def of(cls, layers: Mapping[Layer, list[Held]], rslora: bool, least: int = 0) -> _Target:
        """Of a rank of at least so much."""
        groups = layers.values()
        rank = max(least, *(sum(h.adapter.rank for h in group) for group in groups))
        first = next(h.adapter for group in groups for h in group)
        divisor = math.sqrt(rank) if rslora else rank
        own = rank == first.rank and (first.scaling == "rslora") == rslora
        alpha = first.alpha if own else first.scale * divisor
        return cls(layers, rank, int(alpha) if float(alpha).is_integer() else alpha, alpha / divisor)


def as_peft(
    model: nn.Module, held: list[Held], name: str, task_type: str | None = None, one_rank: bool = False
) -> Files:
    """PEFT's config and tensors. Adapters with one target share its rank and its scale; or all do, the largest."""
    modules = Modules(model)
    held = [h.plain() for h in held]
    every, held = held, [h for h in held if h.adapter.kind.name not in beside.KINDS]
    _refuse_kinds(held, every)
    names = [weight for h in held for weight in h.weights]
    for weight in names:
        if why := modules.why_not(weight, modules.is_raw(weight)):
            refuse(weight, why, OWN_FORMAT)
    raw = [weight for weight in names if modules.is_raw(weight)]
    rslora = all(h.adapter.scaling == "rslora" for h in held)
    layers: dict[str, dict[Layer, list[Held]]] = {}
    for h in held:
        for weight in h.weights:
            layer = modules.layer(weight, raw)
            _refuse_outside_reads(h, layer)
            own = layers.setdefault(layer.target, {})
            if layer.kind == "attention" and not own:  # PEFT adapts both projections: without an adapter one gets zeros
                own.update({modules.layer(f"{layer.target}.{w}", ()): [] for w in peft_format.ATTENTION})
            own.setdefault(layer, []).append(h)
    targets = {name: _Target.of(own, rslora) for name, own in layers.items()}
    if one_rank:
        most = max((target.rank for target in targets.values()), default=0)
        targets = {name: _Target.of(own, rslora, most) for name, own in layers.items()}
    tensors: dict[str, torch.Tensor] = {}
    slots: dict[tuple[Held, Layer], dict[str, int]] = {}
    for target in targets.values():
        for layer in target.layers:
            tensors.update(_joined(layer, target, slots))
    where = {h: slots[h, modules.layer(h.weights[0], raw)] for h in held}
    scales = {name: target.scale for name, target in targets.items()}
    kinds = {name: next(iter(target.layers)) for name, target in targets.items()}
    more = beside.write(modules, [h for h in every if h not in where], kinds, scales)
    entries = [{**h.entry(), **(where[h] if h in where else more.entries[h])} for h in every]
    ties = set(peft_format.tied(modules))
    if ties and any(ties <= {*h.weights} for h in held):
        more.options["ensure_weight_tying"] = True
    config = {**_config(modules, targets, rslora), **more.options}
    return {**config, "task_type": task_type or _task(model, config)}, tensors | more.tensors, entries


def _task(model: nn.Module, config: Mapping[str, Any]) -> str | None:
    """PEFT's word for what a class of transformers' is for. For a classifier it trains the head, and wants it in the
    file: only of one that is there."""
    name = own_class(model).__name__
    if not hasattr(model, "config"):
        return None
    if name.endswith(("ForCausalLM", "LMHeadModel")) and hasattr(model, "prepare_inputs_for_generation"):
        return "CAUSAL_LM"
    if name.endswith("ForConditionalGeneration") and getattr(model.config, "is_encoder_decoder", False):
        return "SEQ_2_SEQ_LM"
    for ending, task in _HEADED.items():
        if name.endswith(ending) and {*HEADS[task]} & {*(config.get("modules_to_save") or ())}:
            return task
    return None


_HEADED = {
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
}


def _refuse_kinds(held: list[Held], every: list[Held]) -> None:
    """A LoRA file of PEFT's holds `lora` or `dora`, one of them for all that it adapts."""
    kinds = list(dict.fromkeys(h.adapter.kind.name for h in held))
    for h in held or every[:1]:
        kind = h.adapter.kind.name
        if kind not in peft_format.KINDS:
            refuse(h.weights[0], f"the kind {kind!r} is none of a LoRA file of PEFT's", OWN_FORMAT)
        if len(kinds) > 1:
            refuse(h.weights[0], f"the adapters are of the kinds {', '.join(kinds)}, and PEFT keeps one", OWN_FORMAT)
        if kind == "dora" and h.adapter.rows is not None:
            refuse(h.weights[0], "it is a part of the weight, and PEFT's DoRA trains all sizes of it", OWN_FORMAT)


def _refuse_outside_reads(h: Held, layer: Layer) -> None:
    """PEFT adapts calls of a module, and torch's attention whole: who reads another's weight goes past that."""
    if h.adapter.read_outside and layer.kind != "attention":
        reads = f"{h.adapter.read_outside} reads the weight of a module inside it"
        refuse(h.weights[0], f"{reads}, and PEFT adapts only calls of that module", OWN_FORMAT)


def _joined(layer: Layer, target: _Target, slots: dict[tuple[Held, Layer], dict[str, int]]) -> dict[str, torch.Tensor]:
    """A layer's adapters side by side along the rank, with the target's scale, and zeros up to the target's rank.

    Args:
        slots: is told where each adapter lies: from `start` on along the rank, its B 2^shift times as large.
    """
    members, start = target.layers[layer], 0
    dora = bool(members) and members[0].adapter.kind.name == "dora"
    if dora and (why := layer.why_not_dora):
        refuse(members[0].weights[0], why, OWN_FORMAT)
    dtype = next((h.adapter.dtype for h in members), torch.float32)
    A, B = (torch.zeros(layer.layout.shape_of(factor, target.rank), dtype=dtype) for factor in "AB")
    for h in members:
        delta, stop = h.turned(layer), start + h.adapter.rank
        shift = _power_of_two(h, target.scale * layer.times, delta.B)
        A[..., start:stop, :] = delta.A
        B[..., start:stop] = torch.ldexp(delta.B, torch.tensor(shift))
        slots[h, layer] = {"start": start, "shift": shift}
        start = stop
    tensors = layer.encode(A, B)
    if dora:
        magnitude = members[0].adapter.get_parameter("magnitude").detach().cpu().clone()  # two layers may share it
        tensors[layer.magnitude] = magnitude.reshape(layer.magnitude_shape)
    return tensors


def _power_of_two(h: Held, scale: float, B: torch.Tensor) -> int:
    """The n with scale of the adapter = 2ⁿ · scale of the target: only 2ⁿ goes into B, and out of it, without loss."""
    own = h.adapter.scale
    ratio = own / scale if scale else (1.0 if own == 0 else math.nan)
    near = round(math.log2(ratio)) if ratio > 0 else 0
    exact = abs(ratio - 2.0**near) <= 4 * sys.float_info.epsilon * 2.0**near
    there = torch.ldexp(B, torch.tensor(near))
    if not (exact and torch.equal(torch.ldexp(there, torch.tensor(-near)), B)):
        reason = f"alpha={h.adapter.alpha:g} at rank={h.adapter.rank} is a scale of {own:g}, and PEFT keeps one for all"
        reason += f" of it: {scale:g}, times no power of two"
        refuse(h.weights[0], reason, f"give the parts of one weight the same alpha / rank, or {OWN_FORMAT}")
    return near


def _config(modules: Modules, targets: Mapping[str, _Target], rslora: bool) -> dict[str, Any]:
    layers = [layer for target in targets.values() for layer in target.layers]
    kinds = {layer.kind for layer in layers}
    parameters = [layer.target for layer in layers if layer.kind == "parameter"]
    if why := peft_format.why_not_together(layers, False):
        refuse(next(layer.target for layer in layers if layer.kind == "conv1d"), why, OWN_FORMAT)
    for parameter in parameters:
        clashes = [n for n in modules.parameters if n.endswith(f".{parameter}") and n not in parameters]
        if clashes:
            reason = f"PEFT's target_parameters would take {clashes[0]} too: it ends in the same words"
            refuse(parameter, reason, OWN_FORMAT)
    paths = [target for target in targets if target not in parameters]
    others = [path for path in modules.by_path if path not in paths]
    clash = any(other.endswith(f".{path}") for other in others for path in paths)  # a pattern takes only whole paths
    members = (h for target in targets.values() for own in target.layers.values() for h in own)
    dora = any(h.adapter.kind.name == "dora" for h in members)
    exactly = {"^" + re.escape(name): t for name, t in targets.items()}  # PEFT allows any prefix before a key
    ((rank, alpha), _), *_ = Counter((t.rank, t.alpha) for t in targets.values()).most_common(1)
    return {
        "peft_type": PEFT,
        "peft_version": ".".join(map(str, peft_format.SPOKEN)),
        "task_type": None,
        "base_model_name_or_path": getattr(modules.model, "name_or_path", None) or None,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": _shared_dropout(targets),
        "use_rslora": rslora,
        "use_dora": dora,
        "bias": "none",
        "fan_in_fan_out": "conv1d" in kinds and "linear" not in kinds,
        "target_modules": "|".join(map(re.escape, paths)) if clash else paths,
        "target_parameters": parameters or None,
        "rank_pattern": {key: t.rank for key, t in exactly.items() if t.rank != rank},
        "alpha_pattern": {key: t.alpha for key, t in exactly.items() if t.alpha != alpha},
        "init_lora_weights": True,
    }


def _shared_dropout(targets: Mapping[str, _Target]) -> float:
    """PEFT has one dropout for all layers, drops nothing on embeddings and attention, and refuses it on parameters."""
    pairs = [(layer, h) for t in targets.values() for layer, members in t.layers.items() for h in members]
    seen = {h.adapter.dropout.p: layer for layer, h in pairs if layer.kind not in ("embedding", "attention")}
    if len(seen) > 1:
        found = ", ".join(f"{p:g}" for p in sorted(seen))
        reason = f"PEFT keeps one dropout for all layers, and these have {found}"
        refuse(seen[max(seen)].target, reason, f"give all rules the same dropout, or {OWN_FORMAT}")
    dropout = next(iter(seen), 0.0)
    parameter = next((layer.target for layer, _ in pairs if layer.kind == "parameter"), None)
    if dropout and parameter:
        reason = f"dropout={dropout:g} on a raw parameter, which PEFT cannot drop"
        refuse(parameter, reason, f"set dropout=0, or {OWN_FORMAT}")
    return dropout


# ── reading ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def read_lora(model: nn.Module, folder: Folder, needed: bool = True) -> list[Saved]:
    """The adapters that a config of PEFT's LoRA puts into this model, with their tensors.

    Args:
        needed: refuse a config that targets nothing.
    """
    return _read(model, folder, _lora, needed)


def read_adalora(model: nn.Module, folder: Folder) -> list[Saved]:
    """The same of PEFT's AdaLoRA."""
    return _read(model, folder, _adalora)


@dataclass(frozen=True)
class _Taken:
    """What one layer has in the files, and the keys that it takes."""

    saved: list[Saved]
    keys: Sequence[str]


_Layers = Sequence[tuple[str, Layer]]
_FACTOR = re.compile(re.escape(PREFIX) + r"(.+)\.lora_A(?:\.weight)?")


def _read(
    model: nn.Module, folder: Folder, take: Callable[[Modules, Folder, _Layers], Iterator[_Taken]], needed: bool = True
) -> list[Saved]:
    peft_format.check_options(folder)
    modules = Modules(model)
    folder = respelled(modules, folder)
    config, rest = folder.config, dict(folder.tensors)
    _refuse_renamed(modules, folder)
    targeted = list(peft_format.targeted_layers(modules, folder))
    if not targeted and needed:
        reason = f"{config.get('target_modules')!r} matches no module of this {type(model).__name__}"
        refuse(folder.option("target_modules"), reason, ITS_BASE)
    layers = [layer for _, layer in targeted]
    if why := peft_format.why_not_together(layers, bool(config.get("fan_in_fan_out"))):
        refuse(folder.option("fan_in_fan_out"), why, peft_format.TRAIN)
    saved = []
    for taken in take(modules, folder, targeted):
        saved += taken.saved
        for key in taken.keys:
            del rest[key]
    saved += beside.read(modules, folder, layers, rest)
    peft_format.check_rest(modules, rest, folder)
    return saved


def _refuse_renamed(modules: Modules, folder: Folder) -> None:
    """Layers of before transformers renamed and stacked them: of an older release, or out of a checkpoint."""
    paths = {key: match[1] for key in folder.tensors if (match := _FACTOR.fullmatch(key))}
    lost = {key: path for key, path in paths.items() if path not in modules.by_path}
    said: Any = getattr(getattr(modules.model, "config", None), "to_dict", None)
    rules = [*conversions(said())] if lost and said is not None else []
    for key, path in sorted(lost.items()):
        own, turn = in_the_model(f"{path}.weight", rules)
        if own != f"{path}.weight" and modules.parameter(own) is not None:
            how = "stacked into" if turn is not None else "called"
            reason = f"{path} is {how} {own.removesuffix('.weight')} by the transformers that is installed"
            write = "PeftModel.from_pretrained(base, folder).save_pretrained(new_folder)"
            refuse(folder.tensor(key), reason, f"PEFT writes it for this one: {write}; then load new_folder")


def _lora(modules: Modules, folder: Folder, targeted: _Layers) -> Iterator[_Taken]:
    config, targets = folder.config, [layer.target for _, layer in targeted]
    kind = kind_named("dora" if config.get("use_dora") else "lora")
    ranks, alphas = peft_format.ranks(folder, targets), peft_format.alphas(folder, targets)
    for name, layer in targeted:
        if kind.name == "dora" and (why := layer.why_not_dora):
            refuse(f"{folder.option('use_dora')}: {name}", why, peft_format.TRAIN)
        delta = layer.decode(folder, ranks[layer.target])
        theta = {"A": delta.A, "B": delta.B, **(layer.sizes(folder) if kind.name == "dora" else {})}
        keys = [*layer.keys, *([layer.magnitude] if kind.name == "dora" else [])]
        if layer.times > 1 and peft_format.release(config) > peft_format.SPOKEN and bool(delta.B.any()):
            reason = f"PEFT {config['peft_version']} wrote it; up to 0.21 PEFT adds the delta of {name} twice, and now?"
            refuse(folder.option("peft_version"), reason, "merge it into its base with PEFT (merge_and_unload)")
        settings = {
            "rank": delta.rank,
            "alpha": float(alphas[layer.target]) * layer.times,
            "scaling": "rslora" if config.get("use_rslora") else "standard",
            # PEFT drops nothing on embeddings and attention
            "dropout": 0.0 if layer.kind in ("embedding", "attention") else float(config.get("lora_dropout") or 0.0),
        }
        saved = [Saved((name,), kind, theta, layer.layout, None, settings, folder.tensor(layer.keys[0]))]
        if config.get("lora_bias"):
            bias, scale = modules.parameter(f"{layer.target}.bias"), Theta(**settings).scale
            saved.append(beside.shift(folder, layer, None if bias is None else tuple(bias.shape), scale))
            keys.append(beside.shift_key(layer))
        yield _Taken(saved, keys)


def _adalora(modules: Modules, folder: Folder, targeted: _Layers) -> Iterator[_Taken]:
    """Each weight's, with the scale that it has in PEFT."""
    config, kind = folder.config, kind_named("adalora")
    for name, layer in targeted:
        theta = layer.adalora(folder)
        rank = len(theta["singular"])
        settings = {
            "rank": rank,
            "alpha": peft_format.adalora_scale(config) * rank,
            "dropout": float(config.get("lora_dropout") or 0.0),
        }
        place = folder.tensor(layer.adalora_keys["singular"])
        saved = [Saved((name,), kind, theta, layer.layout, None, settings, place)]
        # its training may have left nothing of a layer
        yield _Taken(saved if rank else [], list(layer.adalora_keys.values()))


def layers_of(
    modules: Modules, config: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]
) -> dict[str, tuple[Layer, float]]:
    """Of files that we write: the target of each layer → the layer, and alpha where its scale is alpha / rank."""
    folder = Folder(Path(), dict(config), dict(tensors), None)
    layers = [layer for _, layer in peft_format.targeted_layers(modules, folder)]
    targets = [layer.target for layer in layers]
    ranks, alphas = peft_format.ranks(folder, targets), peft_format.alphas(folder, targets)
    root = {target: math.sqrt(ranks[target]) if config["use_rslora"] else 1.0 for target in targets}
    return {layer.target: (layer, alphas[layer.target] * root[layer.target]) for layer in layers}
