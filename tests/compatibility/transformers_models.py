"""transformers' architectures outside the zoo: one model for each type of config, made tiny.

A config is made small by the names of its settings: sizes, counts, vocabularies, lists that go with them. Where that is
not enough, `SETTINGS` has a row for the type. The inputs follow from the signature of the model's forward.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import inspect
import re
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

from tests.compatibility import Model

#: heads that a type is tried with, before its base model
HEADS = (
    "CAUSAL_LM", "SEQ_TO_SEQ_CAUSAL_LM", "MASKED_LM", "SPEECH_SEQ_2_SEQ", "CTC", "IMAGE_CLASSIFICATION",
    "IMAGE_TEXT_TO_TEXT", "OBJECT_DETECTION", "SEMANTIC_SEGMENTATION", "UNIVERSAL_SEGMENTATION", "DEPTH_ESTIMATION",
    "AUDIO_CLASSIFICATION", "TIME_SERIES_PREDICTION", "SEQUENCE_CLASSIFICATION", "VIDEO_CLASSIFICATION",
    "IMAGE_TO_IMAGE", "PRETRAINING", "KEYPOINT_DETECTION", "MASK_GENERATION", "TEXT_TO_WAVEFORM", "BACKBONE",
)  # fmt: skip

WIDTH, HEADS_OF_ONE, INNER, LAYERS, VOCABULARY, LENGTH, IMAGE, PATCH = 32, 4, 48, 2, 101, 64, 32, 8

LARGEST = 3_000_000
"""Parameters that a model may have."""

#: pattern over a setting's name → its value where it is a number; the first that matches counts
SIZES: tuple[tuple[str, int], ...] = (
    (r"(^|_)codebook_size$", 64),
    (r"num_feat_extract_layers$", 7),  # as many as conv_dim has entries
    (r"(^|_)(vocab_size|vocab|entity_vocab_size|num_embeddings)$", VOCABULARY),
    (r"(num_key_value_heads|num_kv_heads|kv_heads|attention_head_num_kv)$", 2),
    (r"(num_attention_heads|attention_heads|n_heads?|num_heads|head_num|nhead|heads|encoder_ffn_heads)$", HEADS_OF_ONE),
    (r"(num_(hidden_)?layers?|n_layers?|encoder_layers|decoder_layers|num_encoder_layers|num_decoder_layers"
     r"|num_blocks|depth|(en|de)coder_num_layers|num_\w+_layers|layers)$", LAYERS),
    (r"(intermediate_size|ffn_dim|d_ff|dim_feedforward|n_inner|ffn_hidden_size|ffn_hidden_dim|feedforward_dim"
     r"|hidden_dim|intermediate_dim|mlp_dim|d_inner|inner_dim|feed_forward_size|\w*intermediate_size)$", INNER),
    (r"(^|_)(hidden_size|d_model|n_embd|embed_dim|embedding_dim|embedding_size|projection_dim|dim|hidden_dim|width"
     r"|emb_dim|attention_hidden_size|output_hidden_size|out_hidden_size|d_embed|feature_size|text_embed_dim"
     r"|decoder_hidden_size|encoder_hidden_size|hidden_channels|fusion_hidden_size|mask_feature_size)$", WIDTH),
    (r"(d_kv|attention_head_size|kv_channels|head_size|dim_head)$", 8),
    (r"(kv_lora_rank|q_lora_rank)$", 16),
    (r"(conv_pos_embedding_groups|num_groups|upsample_groups|norm_num_groups)$", 4),
    (r"(n_positions|max_position_embeddings|max_(source|target)_positions|n_ctx|max_seq_len(gth)?|seq_length"
     r"|max_sequence_length|n_positions|max_length|context_length_max)$", LENGTH),
    (r"(num_(local_)?experts|n_routed_experts|moe_num_experts|num_moe_experts)$", 4),
    (r"(num_experts_per_tok(en)?|num_selected_experts|moe_top_?k|moe_k|num_experts_per_token|top_k_experts)$", 2),
    (r"(n_shared_experts|num_shared_experts|n_group|topk_group)$", 1),
    (r"(image_size|img_size|input_size|pretrain_img_size)$", IMAGE),
    (r"(patch_size)$", PATCH),
    (r"(num_queries|num_query_tokens|num_latents)$", 6),
    (r"(mamba_d_state|state_size|ssm_state_size)$", 8),
    (r"(num_mel_bins|n_mels)$", 16),
)  # fmt: skip

#: of lists: how large each entry is; the widths of stages double
LISTS: tuple[tuple[str, int], ...] = (
    (r"(depths|layers|num_blocks|block_repeats|num_layers|encoder_layers)$", 1),
    (r"conv_dim$", 8),
    (r"(hidden_sizes|embed_dims?|dims|channels|\w*out_channels)$", 16),
    (r"(num_heads|num_attention_heads|num_key_value_heads|heads)$", 2),
)  # fmt: skip

#: settings that follow from others, or name layers that are gone
DERIVED = ("out_features", "out_indices", "stage_names", "per_layer_config")

SPECIAL = re.compile(r"_token(_id|_index)?s?$|_id$|_ids$")

#: type → settings of its own, over what the patterns make; a nested table goes into a nested config
SERIES = dict(prediction_length=4, context_length=8, lags_sequence=[1, 2], num_time_features=1, num_parallel_samples=3)
SETTINGS: dict[str, dict[str, Any]] = {
    "autoformer": SERIES | dict(label_length=4, moving_average=3),
    "informer": SERIES,
    "time_series_transformer": SERIES,
    "patchtst": dict(num_input_channels=3, context_length=32, patch_length=8, patch_stride=8, prediction_length=4),
    "patchtsmixer": dict(num_input_channels=3, context_length=32, patch_length=8, patch_stride=8, prediction_length=4),
    "mamba2": dict(hidden_size=32, expand=2, num_heads=8, head_dim=8, n_groups=1, state_size=8, chunk_size=8),
    "decision_transformer": dict(state_dim=5, act_dim=3),
    "lilt": dict(channel_shrink_ratio=4, hidden_size=24, num_attention_heads=2),
    "layoutlmv3": dict(coordinate_size=4, shape_size=8),
    "mgp-str": dict(image_size=[32, 128]),
    "esmc": dict(num_key_value_heads=4),
    "lfm2_moe": dict(layer_types=["conv", "full_attention"], num_hidden_layers=2),
}

#: type → keyword inputs of its own
SERIES_INPUTS = dict(
    past_values=lambda: torch.randn(2, 10),
    past_time_features=lambda: torch.randn(2, 10, 1),
    past_observed_mask=lambda: torch.ones(2, 10),
    future_values=lambda: torch.randn(2, 4),
    future_time_features=lambda: torch.randn(2, 4, 1),
)
INPUTS: dict[str, dict[str, Any]] = {
    "autoformer": SERIES_INPUTS,
    "informer": SERIES_INPUTS,
    "time_series_transformer": SERIES_INPUTS,
    "patchtst": dict(past_values=lambda: torch.randn(2, 32, 3)),
    "patchtsmixer": dict(past_values=lambda: torch.randn(2, 32, 3)),
    "decision_transformer": dict(
        states=lambda: torch.randn(2, 4, 5),
        actions=lambda: torch.randn(2, 4, 3),
        rewards=lambda: torch.randn(2, 4, 1),
        returns_to_go=lambda: torch.randn(2, 4, 1),
        timesteps=lambda: torch.arange(4).expand(2, 4).clone(),
        attention_mask=lambda: torch.ones(2, 4, dtype=torch.long),
    ),
    "bros": dict(bbox=lambda: torch.rand(2, 7, 8)),
    "lxmert": dict(visual_feats=lambda: torch.randn(2, 5, 2048), visual_pos=lambda: torch.rand(2, 5, 4)),
    "blip_2_qformer": dict(query_embeds=lambda: torch.randn(2, 6, WIDTH)),
}


def tiny(values: Any, name: str = "") -> Any:
    """A setting, or a table of them, made small by its name."""
    if isinstance(values, Mapping):
        small = {str(key): tiny(value, str(key)) for key, value in values.items() if key not in DERIVED}
        return _consistent(small, values)
    if isinstance(values, bool) or values is None:
        return values
    if isinstance(values, int):
        if SPECIAL.search(name):
            return values % 90
        return next((min(size, values) if values > 0 else values for p, size in SIZES if re.search(p, name)), values)
    if isinstance(values, list | tuple) and values and all(type(v) is int for v in values):
        if SPECIAL.search(name):
            return type(values)(v % 90 for v in values)
        own = next((size for pattern, size in LISTS if re.search(pattern, name)), None)
        return values if own is None else type(values)(own * (2**k if own == 16 else 1) for k in range(len(values)))
    return values


def _consistent(small: dict[str, Any], large: Mapping[str, Any]) -> dict[str, Any]:
    """What depends on the number of layers or heads follows it."""
    heads = next((small[k] for k in ("num_attention_heads", "num_heads", "n_heads") if small.get(k)), HEADS_OF_ONE)
    if "head_dim" in small and small["head_dim"] is None:
        small["head_dim"] = WIDTH // HEADS_OF_ONE
    if small.get("kv_lora_rank") and "num_key_value_heads" in small:
        small["num_key_value_heads"] = heads
    if "mrope_section" in small:
        small["mrope_section"] = [2, 1, 1]  # half of a head's 8
    if "mamba_n_heads" in small:
        small |= {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_expand": 2}
    kinds = small.get("layer_types")
    if isinstance(kinds, list) and kinds:
        count = "num_hidden_layers" if "num_hidden_layers" in small else "n_layers"
        chosen = list(dict.fromkeys(kinds))[:4]
        chosen += chosen[:1] * (LAYERS - len(chosen))
        small["layer_types"], small[count] = chosen, len(chosen)
    before, now = large.get("num_hidden_layers"), small.get("num_hidden_layers")
    for key, value in small.items():  # one entry for each layer
        if isinstance(value, list) and key != "layer_types" and len(value) == before and isinstance(now, int):
            small[key] = value[-now:]
    for key in ("use_cache", "use_mems_train", "output_attentions", "output_hidden_states"):
        if key in small:
            small[key] = False
    return small


def _merged(values: dict[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(values)
    for key, value in own.items():
        nested = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = _merged(merged[key], value) if nested else value
    return merged


def configured(kind: str) -> Any:
    """The tiny config of this type."""
    from transformers import CONFIG_MAPPING

    cls = CONFIG_MAPPING[kind]
    values = _merged(tiny(cls().to_dict()), SETTINGS.get(kind, {}))
    for key in ("transformers_version", "model_type", "architectures", "torch_dtype", "dtype"):
        values.pop(key, None)
    return cls.from_dict(values)


def class_of(config: Any) -> type:
    """The class that a config's type is tried with.

    Raises:
        LookupError: there is none.
    """
    from transformers.models.auto import modeling_auto

    tables = [*(f"MODEL_FOR_{head}_MAPPING_NAMES" for head in HEADS), "MODEL_MAPPING_NAMES"]
    names = [getattr(modeling_auto, table, {}).get(config.model_type) for table in tables]
    names = [n[0] if isinstance(n, list | tuple) else n for n in names if n]
    module = importlib.import_module(type(config).__module__.replace("configuration_", "modeling_"))
    found = [getattr(module, name) for name in names if hasattr(module, name)]
    if not found:
        raise LookupError("no auto class has a model for it")
    return found[0]


def _make(kind: str) -> tuple[nn.Module, Any]:
    """The model, and the first inputs that it takes of those that its signature allows."""
    config, problem = configured(kind), None
    model = class_of(config)(config).float().eval()
    if (size := sum(p.numel() for p in model.parameters())) > LARGEST:
        raise LookupError(f"it stays large: {size:,} parameters")
    for inputs in _candidates(kind, model):
        try:
            with torch.no_grad():
                copy.deepcopy(model)(**copy.deepcopy(inputs))
        except Exception as error:
            problem = problem or error
        else:
            return model, inputs
    raise problem or LookupError("its forward takes nothing that is known here")


def _candidates(kind: str, model: nn.Module) -> Iterator[dict[str, Any]]:
    first = inputs_of(kind, model)
    yield first
    for name in ("input_features", "input_values", "pixel_values"):
        for other in SHAPES[name] if name in first else ():
            yield first | {name: torch.randn(other)}
    if "input_ids" in first and "pixel_values" in first:
        yield from _with_image_tokens(model, first)
    if "input_ids" in first:
        yield {k: v for k, v in first.items() if k in ("input_ids", "attention_mask", "decoder_input_ids")}


#: name → other shapes than the first
SHAPES = {
    "input_features": ((2, LENGTH, 16), (2, 1, LENGTH, 16), (2, 16, 2 * LENGTH), (2, 2 * LENGTH, 16)),
    "input_values": ((2, 1, 1600), (2, LENGTH, 16), (2, 1, 16, LENGTH)),
    "pixel_values": ((2, 1, 3, IMAGE, IMAGE), (2, 2, 3, IMAGE, IMAGE), (2, 3, 64, 64), (2, 3, 128, 128)),
}


def _with_image_tokens(model: nn.Module, inputs: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """As many image tokens as the model says it has features."""
    token = _setting(model.config, "image_token_id", "image_token_index", default=None)
    try:
        with torch.no_grad():
            copy.deepcopy(model)(**copy.deepcopy(inputs))
    except Exception as error:
        said = re.search(r"tokens: \d+, features: (\d+)", str(error))
        if said and token is not None and int(said[1]) % 2 == 0 and int(said[1]) < 1000:
            ids = inputs["input_ids"]
            ids = torch.cat([ids.where(ids != token, 3), torch.full((2, int(said[1]) // 2), token)], dim=1)
            yield inputs | {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def inputs_of(kind: str, model: nn.Module) -> dict[str, Any]:
    """Keyword inputs, by the names that the forward has."""
    takes = list(inspect.signature(model.forward).parameters)
    config = model.config
    found: dict[str, Any] = {}
    for name in takes:
        if name in INPUTS.get(kind, {}):
            continue
        with contextlib.suppress(LookupError):
            found[name] = _input(name, config, takes)
    return found | {name: make() for name, make in INPUTS.get(kind, {}).items()}


def _setting(config: Any, *names: str, default: Any) -> Any:
    """The first of these that the config, or one of the configs in it, has."""
    inner = [c for key in ("text_config", "vision_config", "audio_config", "encoder", "decoder", "backbone_config")
             if (c := getattr(config, key, None)) is not None]  # fmt: skip
    for own in (config, *inner):
        for name in names:
            value = own.get(name) if isinstance(own, Mapping) else getattr(own, name, None)
            if value is not None:
                return value
    return default


def _input(name: str, config: Any, takes: list[str]) -> torch.Tensor:
    vocabulary = min(90, _setting(config, "vocab_size", default=90))
    if name == "input_ids" or (name == "decoder_input_ids"):
        return torch.randint(3, vocabulary, (2, 7 if name == "input_ids" else 5))
    if name == "attention_mask" and "input_ids" in takes and "pixel_values" not in takes:
        mask = torch.ones(2, 7, dtype=torch.long)
        return mask
    if name == "pixel_values":
        size = _setting(config, "image_size", default=IMAGE)
        size = size if isinstance(size, int) else size[0]
        return torch.randn(2, _setting(config, "num_channels", "in_channels", default=3), size, size)
    if name == "input_features":
        return torch.randn(2, _setting(config, "num_mel_bins", "n_mels", default=16), LENGTH)
    if name == "input_values":
        return torch.randn(2, 1600)
    raise LookupError(name)


def kinds() -> Iterator[str]:
    """Every type of config whose class no case of the zoo has."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    known = _zoo_configs()
    seen: set[str] = set()
    for kind, name in CONFIG_MAPPING_NAMES.items():
        if name not in known and name not in seen:
            seen.add(name)
            yield kind


def _zoo_configs() -> set[str]:
    """The names of the config classes that the zoo's models have."""
    import transformers

    from tests.zoo import transformers_models

    source = inspect.getsource(transformers_models)
    names = {n for n in re.findall(r'"([A-Z]\w+)"', source) if n[0].isupper() and hasattr(transformers, n)}
    found = {getattr(getattr(transformers, n), "config_class", None) for n in names}
    return {c.__name__ for c in found if c is not None}


def models() -> Iterator[Model]:
    for kind in kinds():
        yield Model("transformers", kind, partial(_make, kind))
