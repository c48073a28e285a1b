"""Files of image models:   kohya's and diffusers' words   ⇄   PEFT's

    lora_unet_mid_block_attn1_to_q.lora_down.weight, .lora_up.weight, .alpha        kohya: names with `_` for `.`
    unet.mid_block.attn1.to_q.lora_A.weight, .lora_B.weight                         diffusers
    unet.mid_block.attn1.to_q.lora.down.weight, .lora.up.weight                     diffusers, before PEFT
    unet.mid_block.attn1.processor.to_q_lora.down.weight, …                         and before that

One file may be for several models, the parts of a pipeline. The scale of each weight is alpha / rank; where no alpha is
said, alpha is the rank, as both libraries have it. Facts of the formats: diffusers 0.42 (`lora_conversion_utils`,
`state_dict_utils`, `peft_utils`), sd-scripts `networks/lora.py`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from lora_fx.export.adapters.entries import Entry, Single, in_pefts_words, of_a_part
from lora_fx.export.adapters.folder import PEFT, Folder, check_types
from lora_fx.export.adapters.names import Names
from lora_fx.export.adapters.peft import PREFIX, Layer
from lora_fx.export.adapters.spelling import nearest
from lora_fx.export.adapters.values import OWN_FORMAT
from lora_fx.reading import boundary, refuse

Layers = Mapping[str, tuple[Layer, float]]
"""Module → PEFT's layer, and alpha where the scale is alpha / rank."""

METADATA = "lora_adapter_metadata"

#: what kohya's keys begin with → the part of a pipeline
KOHYA = {
    "lora_unet_": "unet", "lora_te_": "text_encoder", "lora_te1_": "text_encoder", "lora_te2_": "text_encoder_2",
    "lora_te3_": "text_encoder_3", "lora_transformer_": "transformer",
}  # fmt: skip
PARTS = ("unet", "transformer", "transformer_2", "prior", "text_encoder", "text_encoder_2", "text_encoder_3")

_FACTORS = {"lora_down.weight": "A", "lora_up.weight": "B", "alpha": "alpha"}
_WHY_NOT = {
    "lora_mid": "LoCon's factor in the middle", "hada_": "LoHa, a product of two low-rank matrices element by element",
    "lokr_": "LoKr, a Kronecker product", "dora_scale": "DoRA over axes that the file does not say",
    "diff": "a whole difference", "oft_": "OFT, a rotation", "glora": "GLoRA",
}  # fmt: skip


# ── kohya ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def is_kohya(names: Names, folder: Folder) -> bool:
    return not folder.config and any(key.startswith(tuple(KOHYA)) for key in folder.tensors)


def from_kohya(names: Names, folder: Folder, part: str | None, config: Mapping[str, Any]) -> Folder:
    split = {key: next((start for start in KOHYA if key.startswith(start)), "") for key in folder.tensors}
    for key, start in split.items():
        if not start:
            refuse(folder.tensor(key), f"it begins with none of {', '.join(KOHYA)}", "load it with what wrote it")
    part, root = of_a_part(names, folder, [KOHYA[start] for start in split.values()], part)
    by_name: dict[str, list[str]] = {}
    for path in names.by_path:
        if path.startswith(root) and path:
            by_name.setdefault(path.removeprefix(root).replace(".", "_"), []).append(path)
    entries = []
    for key, start in split.items():
        if KOHYA[start] != part:
            continue
        name, _, what = key.removeprefix(start).partition(".")
        if what not in _FACTORS:
            why = next((why for word, why in _WHY_NOT.items() if word in what), f"{what!r}, which kohya's LoRA has not")
            refuse(folder.tensor(key), f"it is {why}", "load it with what wrote it")
        if name not in by_name:
            reason = f"{name!r} is no module of {names.base}"
            refuse(folder.tensor(key), reason, f"pass the model it was made for; near: {nearest(name, [*by_name])}")
        if len(by_name[name]) > 1:
            reason = f"{name!r} may be {' or '.join(by_name[name])}: they differ in _ and ."
            refuse(folder.tensor(key), reason, "rename one of the modules")
        entries.append(Entry(by_name[name][0], _FACTORS[what], key))
    return in_pefts_words(names, folder, entries, alpha="rank", config=config)


def to_kohya(config: Mapping[str, Any], tensors: Mapping[str, torch.Tensor], layers: Layers, part: str) -> Single:
    """The tensors and the metadata of kohya's file."""
    start = next((start for start, own in KOHYA.items() if own == part), "")
    if not start:
        refuse("part", f"{part!r} is none of {', '.join(dict.fromkeys(KOHYA.values()))}", "say which the model is")
    _refuse_others(config, layers, "kohya", ("linear", "conv"))
    found = dict[str, torch.Tensor]()
    for path, (layer, alpha) in layers.items():
        name = start + path.replace(".", "_")
        if f"{name}.alpha" in found:
            refuse(path, f"another module is called {name} too, with _ for .", "rename one of them")
        for key, word in zip(layer.keys, ("lora_down.weight", "lora_up.weight"), strict=True):
            found[f"{name}.{word}"] = tensors[key]
        narrow = torch.tensor(alpha, dtype=torch.float32)
        found[f"{name}.alpha"] = narrow if narrow.item() == alpha else torch.tensor(alpha, dtype=torch.float64)
    said = {"format": "pt", "ss_network_module": "networks.lora", "ss_network_dim": str(config["r"])}
    return found, {**said, "ss_network_alpha": str(config["lora_alpha"])}


# ── diffusers ────────────────────────────────────────────────────────────────────────────────────────────────────────

_ENDS = (
    (re.compile(r"(.+)\.processor\.to_(q|k|v|out)_lora\.(down|up)\.weight"), r"\1.to_\2"),
    (re.compile(r"(.+)\.to_(q|k|v|out)_lora\.(down|up)\.weight"), r"\1.to_\2"),
    (re.compile(r"(.+)\.(?:lora|lora_linear_layer)\.(down|up)\.weight"), r"\1"),
    (re.compile(r"(.+)\.lora_(A|B)\.weight"), r"\1"),
    (re.compile(r"(.+)\.lora_B\.(bias)"), r"\1"),
    (re.compile(r"(.+)\.(lora_magnitude_vector)(?:\.weight)?"), r"\1"),
    (re.compile(r"(.+)\.(alpha)"), r"\1"),
)
_MEANS = {"down": "A", "up": "B", "lora_magnitude_vector": "m", "bias": "b"}

#: of text encoders, what diffusers called the projections of an attention before PEFT
_PROJECTIONS = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}


def is_diffusers(names: Names, folder: Folder) -> bool:
    """It says so, or all of it is for the parts of a pipeline, whose names the model does not have itself."""
    if folder.config or not folder.tensors:
        return False
    parts = {key.partition(".")[0] for key in folder.tensors}
    if not parts <= {*PARTS}:
        return False
    old = any(word in key for key in folder.tensors for word in ("_lora.", ".lora.", ".lora_linear_layer."))
    return (
        METADATA in folder.said
        or folder.file.startswith("pytorch_lora_weights")
        or old
        or any(part not in names.by_path for part in parts)
    )


def from_diffusers(names: Names, folder: Folder, part: str | None, config: Mapping[str, Any]) -> Folder:
    split = {key: key.partition(".")[0] for key in folder.tensors}
    part, root = of_a_part(names, folder, split.values(), part)
    entries = []
    for key, own in split.items():
        if own != part:
            continue
        found = next(((m, site) for p, site in _ENDS if (m := p.fullmatch(key.removeprefix(f"{own}.")))), None)
        if found is None:
            refuse(folder.tensor(key), "it is none of diffusers' words for LoRA", "load it with what wrote it")
        match, site = found
        path = root + match.expand(site)
        if path not in names.by_path or f"{path}.0" in names.by_path:
            before, _, last = path.rpartition(".")
            others = (
                f"{path}.0",
                f"{before}.{_PROJECTIONS.get(last, last)}",
            )  # a list with a dropout; a text encoder's
            path = next((other for other in others if other in names.by_path), path)
        if path not in names.by_path:
            reason = f"{path.removeprefix(root)!r} is no module of {names.base}"
            near = nearest(path, [p for p in names.by_path if p.startswith(root)])
            refuse(folder.tensor(key), reason, f"pass the model it was made for; near: {near}")
        word = match[match.lastindex or 1]
        entries.append(Entry(path, _MEANS.get(word, word), key))
    config = {**_metadata(folder, part), **config}
    return in_pefts_words(names, folder, entries, alpha="rank", config=config, root=root)


def _metadata(folder: Folder, part: str) -> dict[str, Any]:
    """PEFT's config for a part, as far as the file says it."""
    if METADATA not in folder.said:
        return {}
    place = folder.tensor(METADATA)
    with boundary("it cannot be read", place, "save the adapter again"):
        table = json.loads(folder.said[METADATA])
        found = {k.removeprefix(f"{part}."): v for k, v in table.items() if k.startswith(f"{part}.")}
    config = {**found, "peft_type": PEFT}
    check_types(config, place)
    return config if found else {}


def to_diffusers(config: Mapping[str, Any], tensors: Mapping[str, torch.Tensor], layers: Layers, part: str) -> Single:
    """The tensors and the metadata of diffusers' file."""
    if part not in PARTS:
        refuse("part", f"{part!r} is none of {', '.join(PARTS)}", "say which the model is")
    _refuse_others(config, layers, "diffusers", ("linear", "conv"))
    found = {f"{part}.{key.removeprefix(PREFIX)}": tensor for key, tensor in tensors.items()}
    options = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "target_modules", "use_rslora", "use_dora", "bias")
    said = {f"{part}.{option}": config[option] for option in (*options, "lora_dropout")}
    return found, {"format": "pt", METADATA: json.dumps(said, indent=2, sort_keys=True)}


def _refuse_others(config: Mapping[str, Any], layers: Layers, who: str, known: Iterable[str]) -> None:
    """What a dialect has no word for."""
    plain = {"bias": "none", "use_dora": False}
    options = ("use_dora", "lora_bias", "bias", "modules_to_save", "trainable_token_indices", "ensure_weight_tying")
    for option in options:
        if config.get(option) not in (None, plain.get(option)):
            refuse(who, f"it has no word for {option}={config[option]!r}", OWN_FORMAT)
    for path, (layer, _) in layers.items():
        if layer.kind not in known:
            refuse(path, f"{who} has no word for a weight that PEFT adapts as {layer.kind}", OWN_FORMAT)
