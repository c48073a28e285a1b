"""What each runtime finds in the folder that it is given: one row a runtime.

    ort               model.onnx, the path itself, with the names and axes of the call
    genai             folder/model.onnx         + genai_config.json
    optimum           folder/model.onnx         + config.json, generation_config.json
    transformers.js   folder/onnx/model.onnx    + config.json, generation_config.json

The three that want a folder drive a language model in one way, which is exported for them: new tokens, on the cache of
those before, from an empty one on. Their loaders know its inputs, outputs and axes by the names that Optimum gave them.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from lora_fx.errors import essence
from lora_fx.export.onnx.calls import CACHE, cache_word, is_cache
from lora_fx.export.onnx.runtimes import refuse, require
from lora_fx.graph.capture import Inputs

OPTIONAL, REQUIRED = "optional", "required"
SLOTS = (OPTIONAL, REQUIRED)
"""Whether A and B of a switchable graph have defaults, so that a call may leave them out."""

TOKENS, MASK, POSITIONS = "input_ids", "attention_mask", "position_ids"
LOGITS = "logits"

AXES: Mapping[str, Mapping[int, str]] = {
    TOKENS: {0: "batch_size", 1: "sequence_length"},
    MASK: {0: "batch_size", 1: "past_sequence_length + sequence_length"},
    POSITIONS: {0: "batch_size", 1: "sequence_length"},
    CACHE: {0: "batch_size", 2: "past_sequence_length"},
}
"""transformers.js makes the first cache by these names, and takes any other for 0."""

_FEWEST = 4  # tokens: two before, and two new ones, as no axis of one element can be dynamic while it is traced


@dataclass(frozen=True)
class Step:
    """One step of a language model, and what configurations say of it."""

    inputs: Inputs
    axes: Mapping[str, Any]
    """The dynamic shapes of the inputs."""
    config: Any
    """Of transformers: the model's, and how it generates."""
    generation: Any
    cache: tuple[tuple[int, ...], ...]
    """The shape of each layer's keys: (batch, heads, tokens, size of a head)."""
    vocabulary: int

    @property
    def text(self) -> Any:
        """What the configuration says of the language model, where it is one of several."""
        return self.config.get_text_config(decoder=True)


@dataclass(frozen=True)
class Target:
    """How a runtime wants its files."""

    graph: str = ""
    """Where the graph lies in the folder; "" where the path is the graph's own."""
    data: str = ".data"
    """What the name of a data file adds to the graph's."""
    configs: Mapping[str, Callable[[Step, bool], Mapping[str, Any]]] = field(default_factory=dict)
    """File → what is in it, of the step, and of whether the graph has a data file."""
    slots: tuple[str, ...] = ()
    """Which slots of a switchable graph the runtime can fill."""
    check: Callable[[Step], None] = lambda _: None
    """Refuses a step that the runtime cannot serve."""


# ── one step ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def step_of(model: nn.Module, inputs: Inputs, target: str) -> Step:
    """The step that the target is to run: the second half of the example's tokens, on the cache of the first half. The
    first token is masked, as padding is, so that a mask which the model does not heed is seen.

    Raises:
        ExportError: the model is no decoder with a cache, or the inputs are not its tokens.
    """
    place, config = type(model).__name__, getattr(model, "config", None)
    known = inspect.signature(model.forward).parameters
    word = cache_word(model)
    missing = [name for name in (TOKENS, MASK, word) if name not in known]
    if getattr(config, "is_encoder_decoder", False):
        missing = ["a decoder alone: it has an encoder too"]
    if missing or not hasattr(config, "get_text_config"):
        reason = f"target={target!r} runs decoders of transformers, which take {TOKENS}, {MASK} and {CACHE}"
        lacks = f"it lacks {', '.join(missing)}" if missing else "it has no transformers configuration"
        refuse(place, f"{reason}; {lacks}", 'export it with target="ort", under names and axes of your own')
    tokens = _tokens(model, inputs, target)
    past = tokens.shape[1] // 2
    mask = torch.ones_like(tokens)
    mask[:, 0] = 0
    given = {TOKENS: tokens, MASK: mask}
    if POSITIONS in known:
        given[POSITIONS] = (mask.cumsum(-1) - 1).clamp_min(0)
    before = {name: part[:, :past] for name, part in given.items()}
    after = {name: part[:, past:] for name, part in given.items()}
    logits, cache = _first_half(model, before, word, target)
    inputs = Inputs((), {**after, MASK: mask, word: cache, **({"use_cache": True} if "use_cache" in known else {})})
    shapes = tuple(tuple(layer.keys.shape) for layer in cache.layers)
    axes = {name: AXES[CACHE if name == word else name] for name in inputs.kwargs if name in (*AXES, word)}
    return Step(inputs, axes, config, getattr(model, "generation_config", None), shapes, logits.shape[-1])


def _tokens(model: nn.Module, inputs: Inputs, target: str) -> torch.Tensor:
    given = {**dict(zip(inspect.signature(model.forward).parameters, inputs.args, strict=False)), **inputs.kwargs}
    given.pop("use_cache", None)
    tokens = given.pop(TOKENS, None)
    fits = isinstance(tokens, torch.Tensor) and tokens.ndim == 2 and tokens.dtype == torch.int64
    if given or not fits or tokens.shape[1] < _FEWEST:
        found = f"{tokens.dtype} {[*tokens.shape]}" if isinstance(tokens, torch.Tensor) else type(tokens).__name__
        reason = f"target={target!r} takes {TOKENS} alone, int64 [batch, {_FEWEST} or more], and makes the rest itself"
        also = f" with {', '.join(given)}" if given else ""
        refuse("example_inputs", f"{reason}; it was given {found}{also}", f'pass {{"{TOKENS}": tokens}}')
    return tokens


def _first_half(model: nn.Module, before: Mapping[str, Any], word: str, target: str) -> tuple[torch.Tensor, Any]:
    """What the model returns for the tokens before, with their cache."""
    cache = require("transformers").DynamicCache()  # without a config, its layers keep all tokens
    # Without numbers shapes count alone, and transformers looks into no mask while it is traced, as it seems to be.
    traced = FakeTensorMode(allow_non_fake_inputs=True) if before[TOKENS].is_meta else None
    try:
        with torch.no_grad(), traced or nullcontext():
            before = {name: traced.from_tensor(part) if traced else part for name, part in before.items()}
            output = model(**before, **{word: cache}, use_cache=True)
        logits, cache = output[LOGITS], output[word]
    except Exception as error:
        reason = f"the model does not give {LOGITS} and a cache for tokens, a mask and a DynamicCache: {essence(error)}"
        refuse(type(model).__name__, reason, f'target={target!r} needs them; export it with target="ort"', error)
    filled = is_cache(cache) and all(getattr(layer, "keys", None) is not None for layer in cache.layers)
    if not filled or not cache.layers:
        reason = f"target={target!r} runs decoders with a cache, and the model returns none that is filled"
        refuse(type(model).__name__, reason, 'export it with target="ort"')
    for layer in cache.layers if traced else ():
        layer.keys, layer.values = (
            torch.empty(t.shape, dtype=t.dtype, device="meta") for t in (layer.keys, layer.values)
        )
    return logits, cache


# ── what the configurations say ──────────────────────────────────────────────────────────────────────────────────────


def _context(step: Step) -> Any:
    return getattr(step.text, "max_position_embeddings", None)


def _check_genai(step: Step) -> None:
    shapes = {(shape[1], shape[3]) for shape in step.cache}
    if len(shapes) != 1:
        said = ", ".join(f"{heads} × {size}" for heads, size in sorted(shapes))
        reason = f'target="genai" keeps caches of one shape, and the layers have {said} (heads × size)'
        refuse(type(step.config).__name__, reason, 'export it with target="ort"')
    if not isinstance(_context(step), int):
        reason = 'target="genai" has to say how many tokens fit, and the configuration has no max_position_embeddings'
        refuse(type(step.config).__name__, reason, "set model.config.max_position_embeddings")


#: where optimum-onnx (0.1) reads the heads, and the size of one, from a field of the configuration
_OPTIMUM_HEADS = frozenset({
    "arcee", "cohere", "deepseek_v3", "gemma", "gemma3", "gemma3_text", "glm", "gpt_oss", "granite", "helium", "llama",
    "mistral", "nemotron", "qwen2", "qwen3", "qwen3_moe", "smollm3", "stablelm",
})  # fmt: skip
_OPTIMUM_SIZES = frozenset({"gemma", "gemma3", "gemma3_text", "gpt_oss", "nemotron"})


def _check_optimum(step: Step) -> None:
    """It makes the first cache itself, of a shape that it knows by the name of the architecture."""
    text, kind = step.text, step.config.model_type
    heads = size = None
    if isinstance(getattr(text, "num_attention_heads", None), int) and isinstance(text.hidden_size, int):
        heads, size = text.num_attention_heads, text.hidden_size // text.num_attention_heads
    if kind in _OPTIMUM_HEADS:
        heads = text.num_key_value_heads
    elif kind in ("falcon", "gpt_bigcode") and text.multi_query and not getattr(text, "new_decoder_architecture", 0):
        heads = 1
    elif kind == "falcon":
        heads = text.num_kv_heads
    if kind in _OPTIMUM_SIZES:
        size = text.head_dim
    elif kind == "deepseek_v3":  # of keys; values have another
        size = text.qk_rope_head_dim + text.qk_nope_head_dim
    found = {(shape[1], shape[3]) for shape in step.cache}
    if found != {(heads, size)}:
        said = ", ".join(f"{heads} × {size}" for heads, size in sorted(found))
        reason = f"optimum makes the first cache of a {kind} {heads} × {size} (heads × size), and the model's is {said}"
        refuse(type(step.config).__name__, reason, 'export it with target="ort", "genai" or "transformers.js"')


#: of transformers' generation_config.json, what genai knows under the same name
_SEARCH = (
    "do_sample", "temperature", "top_k", "top_p", "repetition_penalty", "num_beams", "length_penalty",
    "no_repeat_ngram_size", "min_length",
)  # fmt: skip


def _genai(step: Step, external: bool) -> dict[str, Any]:
    """https://onnxruntime.ai/docs/genai/reference/config.html; "decoder" is its type for every model of this kind."""
    text, (_, heads, _, size) = step.text, step.cache[0]
    fed = {name: name for name in (TOKENS, MASK, POSITIONS) if name in step.inputs.kwargs}
    pairs = ("key", "value")
    decoder = {
        "filename": "model.onnx",
        "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
        "head_size": size,
        "hidden_size": text.hidden_size,
        "num_attention_heads": text.num_attention_heads,
        "num_hidden_layers": len(step.cache),
        "num_key_value_heads": heads,
        "inputs": fed | {f"past_{part}_names": f"{CACHE}.%d.{part}" for part in pairs},
        "outputs": {LOGITS: LOGITS} | {f"present_{part}_names": f"present.%d.{part}" for part in pairs},
    }
    ids = {f"{name}_token_id": _token(step, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    ids = {name: value for name, value in ids.items() if value is not None}
    if "pad_token_id" not in ids and "eos_token_id" in ids:
        ids["pad_token_id"] = ids["eos_token_id"][0] if isinstance(ids["eos_token_id"], list) else ids["eos_token_id"]
    said = {name: getattr(step.generation, name, None) for name in _SEARCH}
    return {
        "model": {
            "type": "decoder",
            "context_length": _context(step),
            "vocab_size": step.vocabulary,
            **ids,
            "decoder": decoder,
        },
        "search": {
            "max_length": _context(step),
            "past_present_share_buffer": False,  # the graph returns a new cache, with the new tokens in it
            **{name: value for name, value in said.items() if value is not None},
        },
    }


def _token(step: Step, name: str) -> Any:
    """How the model generates says it, else its configuration."""
    return next((t for c in (step.generation, step.text) if (t := getattr(c, name, None)) is not None), None)


def _config(step: Step, external: bool) -> dict[str, Any]:
    return dict(json.loads(step.config.to_json_string()))


def _config_js(step: Step, external: bool) -> dict[str, Any]:
    """With the file's name, of which a browser would take another by default, and whether it has a data file."""
    said: dict[str, Any] = {"dtype": "fp32"}  # the name "model.onnx": the types are read off the graph
    if external:
        said["use_external_data_format"] = {"model.onnx": 1}
    return {**_config(step, external), "transformers.js_config": said}


def _generation(step: Step, external: bool) -> dict[str, Any]:
    return dict(json.loads(step.generation.to_json_string())) if step.generation is not None else {}


_HUB = {"config.json": _config, "generation_config.json": _generation}

TARGETS: Mapping[str, Target] = {
    "ort": Target(slots=SLOTS),
    "genai": Target("model.onnx", configs={"genai_config.json": _genai}, slots=(OPTIONAL,), check=_check_genai),
    "optimum": Target("model.onnx", configs=_HUB, check=_check_optimum),
    "transformers.js": Target("onnx/model.onnx", "_data", {**_HUB, "config.json": _config_js}),
}
