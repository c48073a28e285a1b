"""PEFT's format: which weights of a model its config names, and where and in which axes it keeps their factors.

`Layer` is a weight as PEFT sees it, `Modules` a model. Read off PEFT 0.21, and nothing of PEFT is imported; where PEFT
computes something else than W + s·B·A, `Modules.why_not` says so. PEFT has two ways: around a module, base(x) + s·B·A·x
(`target_modules`), and inside it, where a parameter reads as W + s·B·A (`target_parameters`).
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from typing import Any

import torch
from torch import nn

from lora_fx.deltas.low_rank import LowRank
from lora_fx.export.adapters.folder import ADALORA, Folder
from lora_fx.export.adapters.patterns import EVERY
from lora_fx.graph.layout import Layout
from lora_fx.graph.program import storage_key
from lora_fx.model.classes import spec_of
from lora_fx.model.inventory import inventory, plain_path, weight_name
from lora_fx.reading import refuse

ITS_BASE = "load the base model it was made for"
TRAIN = "train it with lora_fx.apply, which computes W + s·B·A there"
SPOKEN = (0, 21)  # the newest PEFT whose meaning of the files is known here

KINDS = ("lora", "dora")  # what its LoRA files hold

ATTENTION = ("in_proj_weight", "out_proj.weight")  # what PEFT adapts of a MultiheadAttention

PREFIX = "base_model.model."
_FUSED = "torch's fused TransformerEncoderLayer reads it in eval, past PEFT's modules"


def turned(delta: LowRank, sides: str) -> LowRank | None:
    """For a weight read with other sides: the same, with A and B in each other's place, or None."""
    if delta.layout.sides == sides:
        return delta
    if delta.rows is not None or delta.layout.sides.translate(str.maketrans("io", "oi")) != sides:
        return None
    layout = Layout(sides, delta.layout.shape)
    return replace(delta, layout=layout, A=delta.B.transpose(-2, -1), B=delta.A.transpose(-2, -1))


@dataclass(frozen=True)
class Layer:
    """The factors of one weight as PEFT keeps them."""

    target: str
    """The module or the parameter that PEFT is told to adapt."""
    path: str
    """What its keys begin with."""
    layout: Layout
    """The weight's axes as PEFT takes them: A reads ``i``, B makes ``o``, ``b`` are experts."""
    kind: str
    """``linear``, ``conv1d`` (transformers' (in, out) one), ``embedding``, ``conv``, ``attention`` or ``parameter``."""
    times: int = 1
    """How often PEFT adds the delta: its MultiheadAttention adds that of `out_proj` twice (huggingface/peft#3774)."""

    @property
    def keys(self) -> tuple[str, str]:
        a, b = ("embedding_A", "embedding_B") if self.kind == "embedding" else ("A.weight", "B.weight")
        return f"{PREFIX}{self.path}.lora_{a}", f"{PREFIX}{self.path}.lora_{b}"

    @property
    def magnitude(self) -> str:
        """The key of DoRA's m."""
        return f"{PREFIX}{self.path}.lora_magnitude_vector"

    @property
    def magnitude_shape(self) -> tuple[int, ...]:
        """A convolution's is laid out as its output."""
        out = self.layout.size("o")
        return (1, out, *[1] * (len(self.layout.shape) - 2)) if self.kind == "conv" else (out,)

    @property
    def why_not_dora(self) -> str:
        """Why PEFT has no DoRA here; empty where it has."""
        known = self.kind in ("linear", "conv1d", "embedding", "conv")
        return "" if known else f"PEFT has no DoRA for {self.target}, which it adapts as {self.kind}"

    @property
    def adalora_keys(self) -> dict[str, str]:
        """Tensor of the kind `adalora` → its key."""
        names = {"P": "lora_B", "singular": "lora_E", "Q": "lora_A"}
        return {tensor: f"{PREFIX}{self.path}.{name}" for tensor, name in names.items()}

    def adalora(self, folder: Folder) -> dict[str, torch.Tensor]:
        """P (out, rank), λ (rank, 1) and Q (rank, in) out of a folder: the ranks that its training has left."""
        known = self.kind in ("linear", "conv1d") or (self.kind == "conv" and len(self.layout.shape) == 4)
        if not known:
            refuse(
                folder.tensor(self.path),
                f"PEFT has no AdaLoRA for {self.target}, which it adapts as {self.kind}",
                TRAIN,
            )
        config, entry = folder.config, f"{self.path}.lora_E"
        alive = (config.get("rank_pattern") or {}).get(entry, [True] * config["init_r"])
        if len(alive) != config["init_r"]:
            reason = f"{entry} says of {len(alive)} ranks whether they act, and init_r is {config['init_r']}"
            refuse(folder.option("rank_pattern"), reason, "restore both files of one save")
        rank, found = sum(alive), {}
        shapes = {"P": (self.layout.size("o"), rank), "singular": (rank, 1), "Q": (rank, self.layout.size("i"))}
        for tensor, key in self.adalora_keys.items():
            value = folder.tensors.get(key)
            if value is None:
                remedy = "restore the file; its config says that this layer is adapted"
                refuse(folder.tensor(key), "the key is missing", remedy)
            if tuple(value.shape) != shapes[tensor]:
                reason = f"its shape is {tuple(value.shape)}; rank {rank} on {self.target} {self.layout.shape} wants "
                refuse(folder.tensor(key), f"{reason}{shapes[tensor]}", "restore both files of one save")
            found[tensor] = value
        return found

    def sizes(self, folder: Folder) -> dict[str, torch.Tensor]:
        """DoRA's m out of a folder, (out, 1)."""
        found = folder.tensors.get(self.magnitude)
        if found is None:
            refuse(folder.tensor(self.magnitude), "the key is missing", "restore the file; its config says use_dora")
        if tuple(found.shape) != self.magnitude_shape:
            reason = (
                f"its shape is {tuple(found.shape)}; {self.target} {self.layout.shape} wants {self.magnitude_shape}"
            )
            refuse(folder.tensor(self.magnitude), reason, f"{ITS_BASE}, with the adapter_config.json of the same save")
        return {"magnitude": found.reshape(-1, 1)}

    def shapes(self, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The shapes of the two tensors in the file."""
        inner, outer, shape = self.layout.size("i"), self.layout.size("o"), self.layout.shape
        if self.kind == "conv":
            return (rank, *shape[1:]), (outer, rank, *[1] * (len(shape) - 2))
        total = rank * math.prod(self.layout.batch)
        return (total, inner), (outer, total)

    def encode(self, A: torch.Tensor, B: torch.Tensor) -> dict[str, torch.Tensor]:
        """Factors in this layer's axes as PEFT's tensors: experts outermost in A's rows, innermost in B's."""
        shapes = self.shapes(B.shape[-1])
        factors = A, B.permute(1, 2, 0) if self.layout.batch else B
        return {key: t.reshape(shape) for key, t, shape in zip(self.keys, factors, shapes, strict=True)}

    def decode(self, folder: Folder, rank: int) -> LowRank:
        """B·A out of a folder, not scaled: the inverse of `encode`."""
        for key, want in zip(self.keys, self.shapes(rank), strict=True):
            if key not in folder.tensors:
                remedy = "restore the file; its config says that this layer is adapted"
                refuse(folder.tensor(key), "the key is missing", remedy)
            shape = tuple(folder.tensors[key].shape)
            if shape != want:
                reason = f"its shape is {shape}; rank {rank} on {self.target} {self.layout.shape} wants {want}"
                refuse(folder.tensor(key), reason, f"{ITS_BASE}, with the adapter_config.json of the same save")
        A, B = (folder.tensors[key] for key in self.keys)
        if self.layout.batch:
            B = B.reshape(B.shape[0], rank, -1).permute(2, 0, 1)
        shape_a, shape_b = (self.layout.shape_of(factor, rank) for factor in "AB")
        return LowRank(self.layout, A.reshape(shape_a), B.reshape(shape_b), 1.0, rank)


#: modules that PEFT has layers for → `Layer.kind`
_KINDS = (
    (nn.MultiheadAttention, "attention"),
    (nn.Embedding, "embedding"),
    (nn.Conv1d | nn.Conv2d | nn.Conv3d, "conv"),
    (nn.Linear, "linear"),
)


def known_kind(module: nn.Module, attribute: str) -> str:
    """PEFT's dispatch by module type; empty where it knows no such module."""
    conv1d = any(c.__name__ == "Conv1D" for c in type(module).__mro__) and hasattr(module, "nf")
    kind = next((kind for known, kind in _KINDS if isinstance(module, known)), "conv1d" if conv1d else "")
    return kind if attribute == (ATTENTION[0] if kind == "attention" else "weight") else ""


#: whose forwards are known to be what PEFT takes them for, a call of W that its branch can be added to
_KNOWN = frozenset({
    nn.Module, nn.Linear, nn.Embedding, nn.MultiheadAttention,
    nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.modules.conv._ConvNd,
})  # fmt: skip
_KNOWN_NAMES = re.compile(r"Conv1D|FalconLinear|(?!T5Gemma2)\w+ScaledWordEmbedding")  # those of transformers


def why_not_beside(module: nn.Module) -> str:
    """Why base(x) + s·B·A·x, as PEFT has it, may not be the module with W + s·B·A in it; empty where it is.

    PEFT puts its layer around the module: what the module does to x before W, or to the product after it, the branch
    goes without. Unknown means no.
    """
    spec = spec_of(module)
    cls = spec.base if spec else type(module)
    for method in ("forward", "__call__", "_conv_forward"):
        owner = next((c for c in cls.__mro__ if method in vars(c)), nn.Module)
        if owner not in _KNOWN and not (
            owner.__module__.startswith("transformers.") and _KNOWN_NAMES.fullmatch(owner.__name__)
        ):
            return f"{owner.__name__} has a {method} of its own"
    scaled = "ScaledWordEmbedding" in "".join(c.__name__ for c in cls.__mro__)
    if isinstance(module, nn.Embedding) and hasattr(module, "embed_scale") and not scaled:
        return "it has an embed_scale, with which PEFT multiplies the branch"
    if "forward" in vars(module) and not _only_moves(module):
        return "its forward is replaced on the instance"
    hooks = (*module._forward_pre_hooks.values(), *module._forward_hooks.values())
    foreign = next((hook for hook in hooks if not str(getattr(hook, "__module__", "")).startswith("torch.")), None)
    if foreign is not None:
        return f"it has the hook {getattr(foreign, '__qualname__', type(foreign).__name__)}"
    return ""


def _only_moves(module: Any) -> bool:
    """Its forward is accelerate's, which moves tensors between devices."""
    hook = getattr(module, "_hf_hook", None)
    hooks = getattr(hook, "hooks", [hook])
    return all(type(own).__module__.startswith("accelerate.") for own in hooks)


class Modules:
    """A model as PEFT sees it: its modules by name, and the layer for each weight."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.modules = model, inventory(model).modules
        """Each module → its paths."""
        named = [(path, module) for module, paths in self.modules.items() for path in paths]
        self.by_path = {plain_path(path): module for path, module in named}  # what a wrapper holds comes after it

    @property
    def base(self) -> str:
        return f"this {type(self.model).__name__}"

    def is_table(self, path: str) -> bool:
        return known_kind(self.by_path[path], "weight") == "embedding"

    def parent(self, path: str) -> nn.Module:
        return self.by_path[path.rpartition(".")[0]]

    @property
    def names(self) -> list[str]:
        """Of all parameters, under each of their names."""
        return [weight_name(path, name) for path, module in self.by_path.items() for name in _own_names(module)]

    @property
    def parameters(self) -> list[str]:
        """The names of all parameters, as PEFT walks over them."""
        return [weight_name(plain_path(paths[0]), name) for m, paths in self.modules.items() for name in _own_names(m)]

    def parameter(self, name: str) -> nn.Parameter | None:
        path, _, attribute = name.rpartition(".")
        return self.by_path[path]._parameters.get(attribute) if path in self.by_path else None

    def is_raw(self, name: str) -> bool:
        """Whether PEFT has to be given the parameter itself (`target_parameters`), which then reads as W + s·B·A in
        the module: it knows no such module, or would add the branch outside of what this one does."""
        path, _, attribute = name.rpartition(".")
        module, kind = self.by_path[path], known_kind(self.by_path[path], attribute)
        may_be = kind in ("linear", "conv1d", "embedding") and not self._is_inside(path)
        return not kind or (may_be and bool(why_not_beside(module)))

    def _is_inside(self, path: str) -> bool:
        """Inside a MultiheadAttention, which calls no module inside it, and which PEFT takes as one."""
        return isinstance(self.parent(path), nn.MultiheadAttention)

    def why_not(self, name: str, raw: bool) -> str:
        """Why PEFT would not compute W + s·B·A for this weight; empty where it does."""
        path, _, attribute = name.rpartition(".")
        module: Any = self.by_path[path]
        if not path:
            return "the model itself holds it, and PEFT replaces modules inside the model"
        if len(paths := self.modules[module]) > 1:
            return f"its module has the names {' = '.join(map(plain_path, paths))}, and PEFT adapts only the first"
        if why := fused(self, path):
            return why
        if raw:
            return _why_not_raw(module, attribute)
        kind = known_kind(module, attribute)
        if beside := why_not_beside(module) or (why_not_beside(self.parent(path)) if self._is_inside(path) else ""):
            return f"{beside}, and PEFT adds the branch outside of that"
        if kind == "conv" and (module.groups != 1 or set(module.dilation) != {1} or module.padding_mode != "zeros"):
            plain = "one group, no dilation and zero padding"
            return f"PEFT's branch of a convolution has {plain}, not {module.extra_repr()}"
        if kind == "embedding" and module.max_norm is not None:
            return f"PEFT renormalises A with the embedding's max_norm={module.max_norm}"
        if kind == "attention" and not module._qkv_same_embed_dim:
            return "PEFT adapts a MultiheadAttention only where query, key and value have one width"
        return ""

    def layer(self, name: str, raw: Sequence[str]) -> Layer:
        """PEFT's layer for a weight; `raw` are all the parameters that PEFT is given."""
        path, _, attribute = name.rpartition(".")
        module, weight = self.by_path[path], self.parameter(name)
        assert weight is not None
        shape = tuple(weight.shape)
        kind = "" if name in raw else known_kind(module, attribute)
        if kind == "linear" and self._is_inside(path):
            above, _, child = path.rpartition(".")
            return Layer(above, f"{above}.base_layer.{child}", Layout("oi", shape), "attention", times=2)
        if kind:
            sides = {"conv1d": "io", "embedding": "io", "conv": "o" + "i" * (len(shape) - 1)}.get(kind, "oi")
            return Layer(path, path, Layout(sides, shape), kind)
        nested = [p for p in _own_names(module) if f"{path}.{p}" in raw]
        around = len(nested) - 1 - nested.index(attribute)
        transposed = getattr(module, "is_transposed", False)
        sides = "oi" if len(shape) == 2 else ("bio" if transposed else "boi")
        return Layer(name, path + ".base_layer" * around, Layout(sides, shape), "parameter")


def names_of(modules: Modules, name: str) -> tuple[str, ...]:
    """Every name of the parameter's storage, in the order of the model."""
    keys = {n: storage_key(p) for n in modules.names if (p := modules.parameter(n)) is not None}
    return tuple(n for n, key in keys.items() if key == keys[name])


def tied(modules: Modules) -> tuple[str, ...]:
    """The names of the embedding's weight and of those that PEFT knows to be tied to it; empty where none is.

    It asks a model of transformers' for them: `_tied_weights_keys`, unless the config says that they are not tied.
    """
    model: Any = modules.model
    name = embedding(modules)
    config = getattr(model, "config", None)
    if not name or not getattr(config, "tie_word_embeddings", False):
        return ()
    known = {
        weight_name(plain_path(paths[0]), key)
        for module, paths in modules.modules.items()
        for key in getattr(module, "_tied_weights_keys", None) or ()
    }
    rest = [n for n in names_of(modules, name) if n in known and n != name]
    return (name, *rest) if rest else ()


def embedding(modules: Modules) -> str:
    """The name of the weight of the model's input embedding; empty where it has none to tell."""
    return _told(modules, "get_input_embeddings", nn.Embedding)


def head(modules: Modules) -> str:
    """The same of its output embedding."""
    return _told(modules, "get_output_embeddings", nn.Module)


def _told(modules: Modules, how: str, kind: type[nn.Module]) -> str:
    ask: Any = getattr(modules.model, how, None)
    try:
        module = ask() if ask else None
    except Exception:  # of any model: it has none that it could tell
        return ""
    paths = modules.modules.get(module, ()) if isinstance(module, kind) else ()
    return f"{plain_path(paths[0])}.weight" if paths else ""


def fused(modules: Modules, path: str) -> str:
    """Why torch reads past the modules that PEFT would put at this path; empty where it does not."""
    parts = path.split(".")
    for n in range(len(parts)):
        above = modules.by_path[".".join(parts[:n])]
        if isinstance(above, nn.TransformerEncoderLayer) and above.self_attn.batch_first:
            return _FUSED
    return ""


def _own_names(module: nn.Module) -> list[str]:
    return [name for name, _ in module.named_parameters(recurse=False)]


def _why_not_raw(module: nn.Module, attribute: str) -> str:
    weight = module._parameters[attribute]
    if type(module).__module__.startswith("torch.nn.") and not isinstance(module, nn.Linear | nn.Embedding):
        return f"PEFT has no layer for the {attribute} of {type(module).__name__}"
    if weight is None or weight.ndim not in (2, 3):
        return f"PEFT adapts raw parameters of 2 or 3 axes, not of {0 if weight is None else weight.ndim}"
    if weight.ndim == 3 and weight.shape[0] == 1 and getattr(module, "is_transposed", False):
        return "PEFT adds the transposed delta to a single expert"
    return ""


def why_not_together(layers: Sequence[Layer], transposed: bool) -> str:
    """PEFT has one `fan_in_fan_out`: each Linear or Conv1D sets it anew, and other layers take it as they find it."""
    kinds, where = {layer.kind for layer in layers}, "where fan_in_fan_out is set, as by Conv1D layers"
    if "attention" in kinds and ("conv1d" in kinds or transposed):
        return f"PEFT transposes the delta of MultiheadAttention.out_proj {where}"
    if "parameter" in kinds and ("conv1d" in kinds or transposed):
        return f"PEFT refuses raw parameters {where}"
    return ""


# ── its config ───────────────────────────────────────────────────────────────────────────────────────────────────────

#: options of PEFT's LoraConfig that lora_fx honours, or that change nothing in a trained adapter
_READ = frozenset({
    "peft_type", "r", "lora_alpha", "lora_dropout", "use_rslora", "target_modules", "exclude_modules",
    "target_parameters", "layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern", "bias",
    "init_lora_weights", "use_dora", "modules_to_save", "trainable_token_indices", "lora_bias", "ensure_weight_tying",
})  # fmt: skip
_FREE = frozenset({
    "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
    "fan_in_fan_out", "megatron_core", "loftq_config", "eva_config", "corda_config", "lora_ga_config",
    "qalora_group_size", "runtime_config", "modules_to_tie", "target_modules_to_tie",
})  # fmt: skip
_ADALORA = frozenset({
    "init_r", "target_r", "tinit", "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight", "total_step",
})  # fmt: skip

EMBEDDINGS = ("embed_tokens", "lm_head")
"""PEFT's EMBEDDING_LAYER_NAMES."""

HEADS = {"SEQ_CLS": ("classifier", "score"), "TOKEN_CLS": ("classifier", "score"), "QUESTION_ANS": ("qa_outputs",)}
"""What PEFT trains besides, by the task."""

#: initialisations that leave the base weights alone
_INITS = (True, False, None, "gaussian", "eva", "orthogonal")

_MERGE = "merge it into its base with PEFT (merge_and_unload), or train plain LoRA"

_REASONS = {
    "use_dora": "the file has the sizes of DoRA, and its config does not say so",
    "lora_bias": "the file has a bias of the branch, and its config does not say so",
    "layer_replication": "it changes how many layers the base model has",
    "alora_invocation_tokens": "the branch acts only after certain tokens",
    "use_qalora": "the branch reads pooled inputs",
}


def check_options(folder: Folder) -> None:
    """Every option that changes what the adapter computes is honoured or refused by name."""
    config = folder.config
    known = _READ | _FREE | (_ADALORA if config["peft_type"] == ADALORA else frozenset())
    for key, value in config.items():
        if key in known or value is None or value is False or value in ("", [], {}):
            continue
        why = _REASONS.get(key, "lora_fx does not know what this option does to the adapter")
        refuse(folder.option(key), f"{key}={value!r}: {why}", _MERGE)
    if config["peft_type"] == ADALORA and config.get("lora_bias"):
        refuse(folder.option("lora_bias"), "PEFT's AdaLoRA has no bias of its branch", _MERGE)
    if (init := config.get("init_lora_weights", True)) not in _INITS:
        reason = f"init_lora_weights={init!r}: it changes the base weights when it starts"
        convert = "save_pretrained(..., path_initial_model_for_weight_conversion=...)"
        refuse(folder.option("init_lora_weights"), reason, f"convert it to plain LoRA with PEFT: {convert}")


def targeted_layers(modules: Modules, folder: Folder) -> Iterator[tuple[str, Layer]]:
    """(name, layer) of every weight that PEFT adapts in this model by its config."""
    config, place = folder.config, folder.option("target_modules")
    every = str(config.get("target_modules")).lower() == "all-linear"
    given: Any = getattr(modules.model, "get_output_embeddings", None) if every else None
    head = given() if given else None
    targets, whole = set() if every else _targets(modules, folder), saved_whole(modules, folder)
    if ties_under(folder) == "target_modules":
        ties = [name.rpartition(".")[0] for name in tied(modules)]
        targets |= {*ties} if {*ties[:1]} & targets else set()  # PEFT ties their adapters to the embedding's
    for module, (path, *_) in modules.modules.items():
        linear = known_kind(module, "weight") in ("linear", "conv1d") and module is not head
        if not path or path in whole or not (linear if every else path in targets):
            continue
        taken, attention = f"it takes {path}, a {type(module).__name__}", isinstance(module, nn.MultiheadAttention)
        if isinstance(modules.parent(path), nn.MultiheadAttention):
            taken += " inside a MultiheadAttention, which never calls it"
            refuse(place, taken, "target the attention module itself")
        if not (attention or known_kind(module, "weight")):
            refuse(place, taken, ITS_BASE)
        for weight in ATTENTION if attention else ("weight",):
            yield _loadable(modules, f"{path}.{weight}", (), place)
    wanted = {*(config.get("target_parameters") or ())}
    raw = [name for name in modules.parameters if _ends_in(name, wanted)]
    for name in raw:
        yield _loadable(modules, name, raw, folder.option("target_parameters"))


def _loadable(modules: Modules, name: str, raw: Sequence[str], place: str) -> tuple[str, Layer]:
    if modules.parameter(name) is None:
        refuse(f"{place}: {name}", "it is no parameter here: something computes it", ITS_BASE)
    why = modules.why_not(name, name in raw)
    if why and why != _FUSED:  # such a layer PEFT trains well, and is wrong only in eval
        refuse(f"{place}: {name}", why, TRAIN)
    return name, modules.layer(name, raw)


def _targets(modules: Modules, folder: Folder) -> set[str]:
    """PEFT's matching: not excluded, and a full match of a pattern, an exact path, or the end of a path in one of the
    layers."""
    config, paths = folder.config, [path for path, *_ in modules.modules.values()]

    def taken(key: str) -> set[str]:
        given = config.get(key) or ()
        if isinstance(given, str):
            return {*folder.matcher.matching([given], paths, folder.option(key))[0]}
        ends = {*given}
        return {path for path in paths if _ends_in(path, ends)}

    exact, found = config.get("target_modules") or (), taken("target_modules")
    if not isinstance(exact, str):
        found = found & ({*exact} | _in_layers(folder, paths))
    return found - taken("exclude_modules")


def ties_under(folder: Folder) -> str:
    """The option whose modules PEFT ties to the embedding; empty where it ties none.

    `ensure_weight_tying` alone does nothing: one of the options has to name a module `embed_tokens` or `lm_head`, and
    what is saved whole goes before what has factors.
    """
    if not folder.config.get("ensure_weight_tying"):
        return ""
    for option in ("modules_to_save", "target_modules"):
        names = folder.config.get(option) or ()
        if isinstance(names, str):
            found = folder.matcher.matching([names], EMBEDDINGS, folder.option(option))[0]
        else:
            found = {name: "" for name in names if name.rpartition(".")[2] in EMBEDDINGS}
        if found:
            return option
    return ""


def saved_whole(modules: Modules, folder: Folder) -> set[str]:
    """The paths at which PEFT adapts nothing: in its eyes the names of what it saves whole are patterns."""
    wanted = folder.config.get("modules_to_save") or ()
    around = r"(^|.*\.)(?:", r")($|\..*)"
    found = folder.matcher.matching(wanted, list(modules.by_path), folder.option("modules_to_save"), around)
    return {path for own in found for path in own}


def _in_layers(folder: Folder, paths: Sequence[str]) -> set[str]:
    layers, patterns = (folder.config.get(key) for key in ("layers_to_transform", "layers_pattern"))
    if layers is None or layers == []:
        return {*paths}
    patterns = [patterns] if isinstance(patterns, str) and patterns else patterns or [EVERY]
    start = r".*?\." if patterns == [EVERY] else r"(?:^|.*?\.)"
    numbers: dict[str, str] = {}
    place, around = folder.option("layers_pattern"), (start, r"\.(\d+)\.")
    for found in folder.matcher.matching(patterns, paths, place, around):
        numbers = found | numbers  # the first pattern decides
    wanted = {layers} if isinstance(layers, int) else {*layers}
    return {path for path, number in numbers.items() if int(number) in wanted}


def _ends_in(path: str, targets: Collection[str]) -> bool:
    """Whether one of them is the path, or its last words."""
    words = path.split(".")
    return any(".".join(words[n:]) in targets for n in range(len(words)))


def _values(folder: Folder, key: str, targets: Sequence[str], default: Any) -> dict[str, Any]:
    """For each target the value of the first pattern, in the file's order, that matches it."""
    table, values = folder.config.get(key) or {}, dict.fromkeys(targets, default)
    found = folder.matcher.matching([*table], targets, folder.option(key), (r"(.*\.)?(", ")$"))
    for value, own in reversed([*zip(table.values(), found, strict=True)]):
        values |= dict.fromkeys(own, value)
    return values


def ranks(folder: Folder, targets: Sequence[str]) -> dict[str, int]:
    return _values(folder, "rank_pattern", targets, folder.config.get("r") or 8)


def alphas(folder: Folder, targets: Sequence[str]) -> dict[str, float]:
    alpha = folder.config.get("lora_alpha")
    return _values(folder, "alpha_pattern", targets, 8 if alpha is None else alpha)


def adalora_scale(config: Mapping[str, Any]) -> float:
    """PEFT divides by the rank that the training began with, and a little more; pruning leaves that as it is."""
    alpha, first = config["lora_alpha"], config["init_r"]
    return (alpha if alpha > 0 else float(first)) / (first + 1e-5)


def release(config: dict) -> tuple[int, ...]:
    """The (major, minor) version of the PEFT that wrote the config; older ones did not write it."""
    found = re.match(r"(\d+)\.(\d+)", str(config.get("peft_version") or "0.0"))
    return (int(found[1]), int(found[2])) if found else (sys.maxsize, 0)


def meaning(config: Mapping[str, Any]) -> dict[str, Any]:
    """What of the config decides what the tensors mean: null where it says nothing."""
    return {key: config.get(key) for key in sorted(_READ)}


def check_rest(modules: Modules, rest: Mapping[str, torch.Tensor], folder: Folder) -> None:
    """What nothing has taken must be what the model has: then it says nothing."""
    if not rest:
        return
    state = modules.model.state_dict(keep_vars=True)
    for key, value in rest.items():
        place = folder.tensor(key)
        for end, option in ((".lora_magnitude_vector", "use_dora"), (".lora_B.bias", "lora_bias")):
            if key.endswith(end):
                refuse(place, f"{option}: {_REASONS[option]}", _MERGE)
        base = state.get(key.removeprefix(PREFIX).replace(".base_layer.", "."))
        if base is None or not key.startswith(PREFIX):
            reason = "no layer that the config names has this key"
            near = ", ".join(get_close_matches(key.removeprefix(PREFIX), modules.names[:2_000], 3, 0.5)) or "none"
            refuse(place, reason, f"load the base model and the config it was saved with; near: {near}")
        if base.shape != value.shape or not torch.equal(base.detach().cpu().to(value.dtype), value):
            reason = "the file carries a base weight, and the model's is another"
            refuse(place, reason, "load that base weight into the model first")
