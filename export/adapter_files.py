"""Adapters as files, in PEFT's own format:   W + s·B·A   ⇄   adapter_config.json + adapter_model.safetensors

PEFT adapts modules, lora_fx adapts weights. `Layer` is the bridge: where PEFT keeps the factors of one weight, and in
which axes it reads them. Saving writes one `Layer` for each name of a weight, loading reads them back.

What PEFT's format has no word for (rows of a fused weight, roles, the dropout of each weight, who shares a tied weight)
stands in the header of the tensor file, under ``lora_fx``. PEFT skips it, and replaces it together with the tensors when
it saves, so it never goes stale. Parts of a fused weight lie one after the other along the rank, with zero rows in B for
the features that are no part:

    s·B₁·A₁ + s·B₂·A₂   =   s·[B₁ B₂]·[A₁; A₂]

so PEFT computes the same function, and our own header says where to cut. A weight that no PEFT layer computes in the
same way is refused by name; with ``peft=False`` the folder holds the factors as they are, under a `peft_type` that PEFT
refuses.
"""

from __future__ import annotations

import ctypes
import difflib
import hashlib
import json
import math
import os
import re
import secrets
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import nn

from lora_fx import wiring
from lora_fx.adapter import Adapter
from lora_fx.errors import FileError
from lora_fx.forms import FORMS, Call
from lora_fx.layout import Layout
from lora_fx.passes.insert import Insert
from lora_fx.planning import Plan, Row, plan_rows, read_program
from lora_fx.program import Program, Use, Weight
from lora_fx.rules import Rule
from lora_fx.views import View

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
PICKLE = "adapter_model.bin"
OWN = "LORA_FX"  # the peft_type of what only lora_fx can read
HEADER, DIGEST, VERSION = "lora_fx", "lora_fx_sha256", 1
PREFIX = "base_model.model."
SPOKEN = (0, 21)  # the newest PEFT whose meaning of the files is known here
OWN_FORMAT = "save_adapter(..., peft=False) writes a folder that lora_fx can load and PEFT refuses"

Factors = tuple[torch.Tensor, torch.Tensor]


# ── PEFT's layers: where it keeps the factors of one weight, and in which axes ───────────────────────────────────────


@dataclass(frozen=True)
class Layer:
    """The factors of one weight as PEFT keeps them."""

    target: str
    """The module or the parameter that PEFT is told to adapt."""
    path: str
    """What its keys begin with."""
    shape: tuple[int, ...]
    sides: str
    """The weight's axes as PEFT takes them: A reads ``i``, B makes ``o``, ``b`` are experts."""
    kind: str
    """``linear``, ``conv1d`` (transformers' (in, out) linear), ``embedding``, ``conv``, ``attention`` or ``parameter``."""
    times: int = 1
    """How often PEFT adds the delta: its MultiheadAttention adds that of `out_proj` twice (huggingface/peft#3774)."""

    @property
    def keys(self) -> tuple[str, str]:
        if self.kind == "embedding":
            return f"{PREFIX}{self.path}.lora_embedding_A", f"{PREFIX}{self.path}.lora_embedding_B"
        return f"{PREFIX}{self.path}.lora_A.weight", f"{PREFIX}{self.path}.lora_B.weight"

    @property
    def layout(self) -> Layout:
        return Layout(self.sides, self.shape)

    @property
    def experts(self) -> int:
        return self.shape[0] if "b" in self.sides else 0

    def shapes(self, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The shapes of the two tensors in the file."""
        inner, outer = self.layout.size("i"), self.layout.size("o")
        if self.kind == "conv":
            return (rank, *self.shape[1:]), (outer, rank, *[1] * (len(self.shape) - 2))
        total = rank * max(self.experts, 1)
        return (total, inner), (outer, total)

    def encode(self, A: torch.Tensor, B: torch.Tensor) -> Factors:
        """Our factors, in this layer's axes, as PEFT's tensors: experts outermost in A's rows, innermost in B's columns."""
        rank = B.shape[-1]
        first, second = self.shapes(rank)
        return A.reshape(first), (B.permute(1, 2, 0) if self.experts else B).reshape(second)

    def decode(self, A: torch.Tensor, B: torch.Tensor, rank: int) -> Factors:
        """The inverse of `encode`."""
        inner, outer = self.layout.size("i"), self.layout.size("o")
        if self.experts:
            return A.reshape(-1, rank, inner), B.reshape(outer, rank, -1).permute(2, 0, 1)
        return A.reshape(rank, inner), B.reshape(outer, rank)


class _Modules:
    """The modules of a model by name, as PEFT sees them, and why it cannot adapt a weight."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.by_path = dict(model.named_modules(remove_duplicate=False))
        self.paths: dict[int, list[str]] = {}
        for path, module in self.by_path.items():
            if not isinstance(module, Adapter):
                self.paths.setdefault(id(module), []).append(path)

    def parent(self, path: str) -> nn.Module:
        return self.by_path[path.rpartition(".")[0]]

    def is_raw(self, name: str) -> bool:
        """Whether PEFT has to be given the parameter (`target_parameters`), since it knows no such module."""
        path, _, attribute = name.rpartition(".")
        return _known_kind(self.by_path[path], attribute) == "" and not self.why_not_raw(name)

    def why_not_raw(self, name: str) -> str:
        path, _, attribute = name.rpartition(".")
        module = self.by_path[path]
        weight = module._parameters[attribute]
        if type(module).__module__.startswith("torch.nn."):
            return f"PEFT has no layer for {attribute} of {type(module).__name__}"
        if weight is None or weight.ndim not in (2, 3):
            return f"PEFT adapts raw parameters of 2 or 3 axes, not of {0 if weight is None else weight.ndim}"
        if weight.ndim == 3 and weight.shape[0] == 1 and getattr(module, "is_transposed", False):
            return "PEFT adds the transposed delta to a single expert"
        return ""

    def why_not(self, name: str) -> str:
        """Why PEFT would not compute W + s·B·A for this weight; empty where it does."""
        path, _, attribute = name.rpartition(".")
        module = self.by_path[path]
        if not path:
            return "the model itself holds it, and PEFT replaces modules inside the model"
        if len(self.paths[id(module)]) > 1:
            return f"its module has the names {' = '.join(self.paths[id(module)])}, and PEFT adapts only the first"
        parts = path.split(".")
        for n in range(len(parts)):
            above = self.by_path[".".join(parts[:n])]
            if isinstance(above, nn.TransformerEncoderLayer) and above.self_attn.batch_first:
                return "torch's fused TransformerEncoderLayer reads it in eval, past PEFT's modules"
        kind = _known_kind(module, attribute)
        if kind == "":
            return self.why_not_raw(name)
        if kind == "conv" and (module.groups != 1 or set(module.dilation) != {1} or module.padding_mode != "zeros"):
            return (
                f"PEFT's branch of a convolution has groups=1, no dilation and zero padding, not {module.extra_repr()}"
            )
        if kind == "embedding" and module.max_norm is not None:
            return f"PEFT renormalises A with the embedding's max_norm={module.max_norm}"
        if kind == "attention" and not module._qkv_same_embed_dim:
            return "PEFT adapts a MultiheadAttention only where query, key and value have one width"
        return ""

    def layer(self, name: str, raw: Sequence[str]) -> Layer:
        """PEFT's layer for a weight; `raw` are all the parameters that PEFT is given."""
        path, _, attribute = name.rpartition(".")
        module = self.by_path[path]
        weight = module._parameters[attribute]
        assert weight is not None
        shape = tuple(weight.shape)
        kind = _known_kind(module, attribute)
        if kind == "linear" and isinstance(self.parent(path), nn.MultiheadAttention):
            above, _, child = path.rpartition(".")
            return Layer(above, f"{above}.base_layer.{child}", shape, "oi", "attention", times=2)
        if kind:
            sides = {"conv1d": "io", "embedding": "io", "conv": "o" + "i" * (len(shape) - 1)}.get(kind, "oi")
            return Layer(path, path, shape, sides, kind)
        nested = [p for p, _ in module.named_parameters(recurse=False) if f"{path}.{p}" in raw]
        around = len(nested) - 1 - nested.index(attribute)
        transposed = getattr(module, "is_transposed", False)
        sides = "oi" if len(shape) == 2 else ("bio" if transposed else "boi")
        return Layer(name, path + ".base_layer" * around, shape, sides, "parameter")


def _known_kind(module: nn.Module, attribute: str) -> str:
    """PEFT's dispatch by module type; empty where it knows no such module."""
    if isinstance(module, nn.MultiheadAttention):
        return "attention" if attribute == "in_proj_weight" else ""
    if attribute != "weight":
        return ""
    if isinstance(module, nn.Embedding):
        return "embedding"
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return "conv"
    if isinstance(module, nn.Linear):
        return "linear"
    if any(c.__name__ == "Conv1D" for c in type(module).__mro__) and hasattr(module, "nf"):
        return "conv1d"
    return ""


def _why_not_together(layers: Sequence[Layer], transposed: bool) -> str:
    """PEFT has one `fan_in_fan_out` for all layers: the last Linear or Conv1D sets it, other layers take it as it is."""
    kinds = {layer.kind for layer in layers}
    if "attention" in kinds and ("conv1d" in kinds or transposed):
        return (
            "PEFT transposes the delta of MultiheadAttention.out_proj where fan_in_fan_out is set, as for Conv1D layers"
        )
    if "parameter" in kinds and ("conv1d" in kinds or transposed):
        return "PEFT refuses raw parameters where fan_in_fan_out is set, as for Conv1D layers"
    return ""


def _turned(A: torch.Tensor, B: torch.Tensor, have: str, want: str) -> Factors | None:
    """Factors for a weight read with other sides: the same, with A and B in each other's place, or None."""
    if have == want:
        return A, B
    if have.translate(str.maketrans("io", "oi")) == want:
        return B.transpose(-2, -1), A.transpose(-2, -1)
    return None


# ── save ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class _Held:
    """An adapter in the model, and every name of its weight that reads with it."""

    adapter: Adapter
    weights: tuple[str, ...]
    part: str

    @property
    def whole(self) -> Factors:
        A, B = self.adapter.A.detach().cpu(), self.adapter.B.detach()
        return A, self.adapter.whole(B).cpu()

    def entry(self) -> dict[str, Any]:
        a = self.adapter
        return {
            "weights": list(self.weights), "part": self.part, "role": a.role, "sides": a.layout.sides, "rank": a.rank,
            "alpha": a.alpha, "scaling": a.scaling, "dropout": a.dropout.p, "rows": _ranges(a.rows),
        }  # fmt: skip


def save_adapter(model: nn.Module, path: str | os.PathLike, name: str = "default", *, peft: bool = True) -> None:
    """Write the adapter of this name into a folder that PEFT and `load_adapter` read.

    The folder is new or old in one step; files of other names in it stay. Only safetensors is written, never pickle.

    Args:
        path: the folder; made if it is not there.
        name: the adapter's name in the model.
        peft: write PEFT's format, and refuse what it cannot say. ``False`` writes any adapter in lora_fx's own, which
            PEFT refuses to read.

    Raises:
        FileError: there is no such adapter, a factor is not finite, or PEFT would compute something else; nothing has
            been written then.
    """
    held = _held(model, name)
    config, tensors, entries = _as_peft(model, held, name) if peft else _as_own(held)
    header = {"version": VERSION, "name": name, "config": _meaning(config), "adapters": entries}
    _write(Path(path), _json(config, indent=2), _pack(tensors, header))


def _held(model: nn.Module, name: str) -> list[_Held]:
    found: dict[Adapter, list[str]] = {}
    parts: dict[Adapter, str] = {}
    names = []
    for path, owner, child, adapter in wiring.find_adapters(model):
        names.append(adapter.name)
        if adapter.name != name:
            continue
        attribute = wiring.attribute_of(child)
        weights = found.setdefault(adapter, [])
        at = 0 if child in owner._modules else len(weights)  # the name that state_dict shows comes first
        weights.insert(at, f"{path}.{attribute}".lstrip("."))
        parts[adapter] = child.removeprefix(wiring.child_name(attribute, name)).lstrip("_")
    if not found:
        _fail(
            type(model).__name__,
            f"there is no adapter named {name!r}",
            f"it has {', '.join(sorted(set(names))) or 'no adapters'}; a folded model must be unfolded first",
        )
    held = [_Held(adapter, tuple(weights), parts[adapter]) for adapter, weights in found.items()]
    for h in held:
        for label, factor in (("A", h.adapter.A), ("B", h.adapter.B)):
            _check_saveable(factor, f"{h.weights[0]}, {label} of adapter {name!r}")
    return held


def _check_saveable(factor: torch.Tensor, place: str) -> None:
    if factor.is_meta:
        _fail(place, "it is on meta and has no numbers", "materialise the model first")
    if hasattr(factor, "full_tensor"):
        _fail(place, "it is sharded (DTensor)", "gather the adapter before saving it")
    if not bool(factor.isfinite().all()):
        _fail(place, "it holds NaN or Inf", "save an earlier checkpoint of the adapter")


def _as_own(held: list[_Held]) -> tuple[dict, dict[str, torch.Tensor], list[dict]]:
    """The factors as they are."""
    tensors, entries = {}, []
    for h in held:
        base = ".".join(filter(None, (h.weights[0], h.part)))
        keys = f"{base}.A", f"{base}.B"
        tensors.update(zip(keys, (h.adapter.A.detach().cpu(), h.adapter.B.detach().cpu()), strict=True))
        entries.append({**h.entry(), "keys": keys})
    return {"peft_type": OWN, "lora_fx_version": VERSION}, tensors, entries


def _as_peft(model: nn.Module, held: list[_Held], name: str) -> tuple[dict, dict[str, torch.Tensor], list[dict]]:
    """PEFT's config and tensors. Adapters with one target share its rank and its scale."""
    modules = _Modules(model)
    _refuse_outside_reads(model, name)
    names = [weight for h in held for weight in h.weights]
    for weight in names:
        if why := modules.why_not(weight):
            _fail(weight, why, OWN_FORMAT)
    raw = [weight for weight in names if modules.is_raw(weight)]
    targets: dict[str, dict[Layer, list[_Held]]] = {}
    for h in held:
        for weight in h.weights:
            layer = modules.layer(weight, raw)
            targets.setdefault(layer.target, _attention_layers(modules, layer)).setdefault(layer, []).append(h)
    tensors: dict[str, torch.Tensor] = {}
    slots: dict[tuple[_Held, Layer], tuple[int, int]] = {}
    scales: dict[str, tuple[int, float]] = {}
    rslora = all(h.adapter.scaling == "rslora" for h in held)
    for target, layers in targets.items():
        rank, alpha = scales[target] = _shared_scale(layers, rslora)
        scale = alpha / (math.sqrt(rank) if rslora else rank)
        for layer, members in layers.items():
            tensors.update(_joined(layer, members, rank, scale, slots))
    entries = []
    for h in held:
        start, shift = slots[h, modules.layer(h.weights[0], raw)]
        entries.append({**h.entry(), "start": start, "shift": shift})
    return _config(modules, targets, scales, rslora), tensors, entries


def _attention_layers(modules: _Modules, layer: Layer) -> dict[Layer, list[_Held]]:
    """PEFT always adapts both projections of a MultiheadAttention: one that has no adapter gets zeros."""
    if layer.kind != "attention":
        return {}
    return {modules.layer(f"{layer.target}.{w}", ()): [] for w in ("in_proj_weight", "out_proj.weight")}


def _refuse_outside_reads(model: nn.Module, name: str) -> None:
    """PEFT adapts calls of a module; a module around it that reads the weight itself goes past that."""
    for path, module in model.named_modules():
        if not wiring.is_reader(module):
            continue
        found = re.search(rf"(?<!self)\.(\w+){wiring.child_name('', name)}\w*\.[AB]\b", wiring.show(module))
        if found:
            _fail(
                path or type(model).__name__,
                f"its forward reads the {found[1]} of a module inside it, and PEFT adapts only calls of that module",
                OWN_FORMAT,
            )


def _shared_scale(layers: Mapping[Layer, list[_Held]], rslora: bool) -> tuple[int, float]:
    """One rank and one alpha for all adapters of a target."""
    members = [h.adapter for group in layers.values() for h in group]
    rank = max(sum(h.adapter.rank for h in group) for group in layers.values())
    first = members[0]
    if rank == first.rank and (first.scaling == "rslora") == rslora:
        return rank, first.alpha
    return rank, first.scale * (math.sqrt(rank) if rslora else rank)


def _joined(
    layer: Layer, members: list[_Held], rank: int, scale: float, slots: dict[tuple[_Held, Layer], tuple[int, int]]
) -> dict[str, torch.Tensor]:
    """PEFT's two tensors for a layer: its adapters side by side along the rank, zeros up to `rank`."""
    dtype = members[0].adapter.dtype if members else torch.float32
    A = torch.zeros(layer.layout.shape_of("A", rank), dtype=dtype)
    B = torch.zeros(layer.layout.shape_of("B", rank), dtype=dtype)
    start = 0
    for h in members:
        turned = _turned(*h.whole, h.adapter.layout.sides, layer.sides)
        if turned is None:
            _fail(
                h.weights[0],
                f"the model reads it as {h.adapter.layout.sides!r} (o: out, i: in, b: batch), PEFT as {layer.sides!r}",
                OWN_FORMAT,
            )
        a, b = turned
        shift = _power_of_two(h, scale * layer.times, b)
        stop = start + h.adapter.rank
        A[..., start:stop, :], B[..., start:stop] = a, torch.ldexp(b, torch.tensor(shift))
        slots[h, layer] = start, shift
        start = stop
    return dict(zip(layer.keys, layer.encode(A, B), strict=True))


def _power_of_two(h: _Held, scale: float, B: torch.Tensor) -> int:
    """The n with scale of the adapter = 2ⁿ · scale of the target. Only such a factor goes into B and out without loss."""
    own = h.adapter.scale
    ratio = own / scale if scale else (1.0 if own == 0 else math.nan)
    near = round(math.log2(ratio)) if ratio > 0 else 0
    exact = abs(ratio - 2.0**near) <= 4 * sys.float_info.epsilon * 2.0**near
    there = torch.ldexp(B, torch.tensor(near))
    if not (exact and torch.equal(torch.ldexp(there, torch.tensor(-near)), B)):
        _fail(
            h.weights[0],
            f"PEFT keeps one scale for all of it; alpha={h.adapter.alpha:g} at rank={h.adapter.rank} is a scale of {own:g}, "
            f"and {scale:g} times no power of two",
            f"give the parts of one weight the same alpha / rank, or {OWN_FORMAT}",
        )
    return near


def _config(
    modules: _Modules,
    targets: Mapping[str, Mapping[Layer, list[_Held]]],
    scales: Mapping[str, tuple[int, float]],
    rslora: bool,
) -> dict[str, Any]:
    layers = [layer for group in targets.values() for layer in group]
    kinds = {layer.kind for layer in layers}
    parameters = [layer.target for layer in layers if layer.kind == "parameter"]
    if why := _why_not_together(layers, False):
        _fail(next(layer.target for layer in layers if layer.kind == "conv1d"), why, OWN_FORMAT)
    (rank, alpha), _ = Counter(scales.values()).most_common(1)[0]
    return {
        "peft_type": "LORA",
        "peft_version": ".".join(map(str, SPOKEN)),
        "task_type": None,
        "base_model_name_or_path": getattr(modules.model, "name_or_path", None) or None,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": _number(alpha),
        "lora_dropout": _shared_dropout(targets),
        "use_rslora": rslora,
        "bias": "none",
        "fan_in_fan_out": "conv1d" in kinds and "linear" not in kinds,
        "target_modules": _target_modules(modules, [t for t in targets if t not in parameters]),
        "target_parameters": _target_parameters(modules, parameters) or None,
        "rank_pattern": {_exactly(t): r for t, (r, _) in scales.items() if r != rank},
        "alpha_pattern": {_exactly(t): _number(a) for t, (_, a) in scales.items() if a != alpha},
        "init_lora_weights": True,
    }


def _exactly(path: str) -> str:
    """A pattern key for this path alone. PEFT lets any prefix stand before a key: ``lin`` would match ``block.lin``."""
    return "^" + re.escape(path)


def _target_modules(modules: _Modules, targets: list[str]) -> list[str] | str:
    """Full paths; where one of them is also the end of another module's path, a pattern of full paths."""
    others = [path for path in modules.by_path if path not in targets]
    if any(path.endswith(f".{target}") for path in others for target in targets):
        return "|".join(re.escape(target) for target in targets)
    return targets


def _target_parameters(modules: _Modules, parameters: list[str]) -> list[str]:
    every = [name for name, _ in modules.model.named_parameters() if name not in parameters]
    for parameter in parameters:
        clash = next((name for name in every if name.endswith(f".{parameter}")), None)
        if clash:
            _fail(parameter, f"PEFT's target_parameters would take {clash} too: it ends in the same words", OWN_FORMAT)
    return parameters


def _shared_dropout(targets: Mapping[str, Mapping[Layer, list[_Held]]]) -> float:
    """PEFT has one dropout for all layers, drops nothing on embeddings and attention, and refuses it on parameters."""
    pairs = [(layer, h) for group in targets.values() for layer, members in group.items() for h in members]
    seen = {h.adapter.dropout.p: layer for layer, h in pairs if layer.kind not in ("embedding", "attention")}
    if len(seen) > 1:
        _fail(
            seen[max(seen)].target,
            f"PEFT keeps one dropout for all layers, and these have {', '.join(f'{p:g}' for p in sorted(seen))}",
            f"give all rules the same dropout, or {OWN_FORMAT}",
        )
    dropout = next(iter(seen), 0.0)
    parameter = next((layer.target for layer, _ in pairs if layer.kind == "parameter"), None)
    if dropout and parameter:
        _fail(
            parameter,
            f"dropout={dropout:g} on a raw parameter, which PEFT cannot drop",
            f"set dropout=0, or {OWN_FORMAT}",
        )
    return dropout


# ── load ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class _Saved:
    """An adapter out of a file."""

    weights: tuple[str, ...]
    A: torch.Tensor
    B: torch.Tensor
    sides: str
    alpha: float
    scaling: str
    place: str
    """The file and the key, for errors."""
    dropout: float = 0.0
    ranges: tuple[tuple[int, int], ...] | None = None
    role: str = ""
    part: str = ""

    @property
    def rank(self) -> int:
        return self.B.shape[-1]


def load_adapter(
    model: nn.Module,
    path: str | os.PathLike,
    example_inputs: Any = None,
    *,
    name: str | None = None,
    check: bool = True,
) -> nn.Module:
    """Insert an adapter that `save_adapter` or PEFT has written, in place.

    What `save_adapter` wrote comes back bit for bit: factors, scale, rows, roles, dropout. What PEFT wrote means here
    what it means there: an adapter on a module acts where that module reads its weight, and nowhere else. Factors are
    kept in float32 (float64 for float64 weights).

    Args:
        path: the folder, or one that holds exactly one adapter in a subfolder (where PEFT puts named adapters).
        example_inputs: as in `apply`.
        name: the adapter's name in the model; None for the name it was saved under (PEFT's: "default").
        check: compare the adapted model with the dense W + s·B·A, as in `apply`.

    Returns:
        The same model.

    Raises:
        FileError: a file is missing, damaged, made for another model, or uses what lora_fx does not compute.
        LoraFxError: the model cannot be adapted there. The model is bitwise what it was, each time.
    """
    folder = _folder(Path(path))
    config = _read_config(folder / CONFIG)
    tensors, header = _unpack(folder)
    with wiring.unwired(model):
        saved = (
            _read_own(model, folder, config, tensors, header) if header else _read_peft(model, folder, config, tensors)
        )
        name = name or (header["name"] if header else "default")
        _refuse_name(model, name)
        plan = _plan(model, saved, example_inputs, name)
    return Insert(plan, check)()


def _refuse_name(model: nn.Module, name: str) -> None:
    if not isinstance(name, str) or not name.isidentifier():
        _fail("name", f"{name!r} is no identifier", "name the adapter with letters, digits and _")
    if any(adapter.name == name for *_, adapter in wiring.find_adapters(model)):
        _fail(
            type(model).__name__,
            f"it already has an adapter named {name!r}",
            f"pass another name to load_adapter, or lora_fx.remove(model, {name!r}) first",
        )


def _plan(model: nn.Module, saved: list[_Saved], example_inputs: Any, name: str) -> Plan:
    program = read_program(model, example_inputs)
    weights = {n: w for w in program.weights for n in w.names}
    for s in saved:
        _check_target(s, weights)
    rows = [_row(program, s, weights[s.weights[0]]) for s in _shared(saved, weights)]
    return plan_rows(program, tuple(row.rule for row in rows), name, rows)


def _check_target(s: _Saved, weights: Mapping[str, Weight]) -> None:
    for n in s.weights:
        if n not in weights:
            near = difflib.get_close_matches(n, weights, 3)
            _fail(
                s.place,
                f"the model has no weight {n!r}",
                f"load the base model it was made for; near: {', '.join(near) or 'none'}",
            )
    weight = weights[s.weights[0]]
    if any(weights[n] is not weight for n in s.weights):
        _fail(s.place, f"it adapts one weight under the names {', '.join(s.weights)}, which this model does not tie",
              "load the base model it was made for, with its weights tied")  # fmt: skip
    if weight.parameter.is_meta:
        _fail(weight.name, "the weight is on meta: the adapter would lose its numbers", "materialise the model first")
    if not any(u.call for u in weight.uses):  # unseen: then the file says how the weight is read
        call = Call(FORMS["matmul"], None, None, s.sides)
        path = s.weights[0].rpartition(".")[0]
        if not weight.uses:
            weight.uses.append(Use(weight, None, View.of(weight.shape), path, call))  # type: ignore[arg-type]


def _shared(saved: list[_Saved], weights: Mapping[str, Weight]) -> list[_Saved]:
    """PEFT keeps an adapter for each module; equal ones on modules that share the weight are one."""
    kept: list[_Saved] = []
    for s in saved:
        for k, other in enumerate(kept):
            if weights[other.weights[0]] is weights[s.weights[0]] and _same(other, s):
                kept[k] = replace(other, weights=(*other.weights, *s.weights))
                break
        else:
            kept.append(s)
    return kept


def _same(a: _Saved, b: _Saved) -> bool:
    settings = [(s.alpha, s.scaling, s.rank, s.ranges) for s in (a, b)]
    turned = _turned(b.A, b.B, b.sides, a.sides)
    return (
        settings[0] == settings[1]
        and turned is not None
        and torch.equal(a.A, turned[0])
        and torch.equal(a.B, turned[1])
    )


def _row(program: Program, s: _Saved, weight: Weight) -> Row:
    layout = weight.layout
    rows = _rows_of(s, layout)
    A, B = _oriented(s, layout, rows)
    modules = dict(program.model.named_modules(remove_duplicate=False))
    owners = tuple((n.rpartition(".")[0], n.rpartition(".")[2]) for n in s.weights)
    mine = {(id(modules[path]), attribute) for path, attribute in owners}
    others = [n.rpartition(".") for n in weight.names]
    outside = {path for path, _, attribute in others if (id(modules[path]), attribute) not in mine}
    uses = tuple(u for u in weight.uses if u.module not in outside)
    rule = Rule(
        where=weight.name, rank=s.rank, alpha=s.alpha, dropout=s.dropout, scaling=s.scaling, init=_copier(A, B)
    )  # fmt: skip
    return Row(weight, rule, s.role, s.part, rows, uses, owners, bool(outside))


def _rows_of(s: _Saved, layout: Layout) -> tuple[int, ...] | None:
    if s.ranges is None:
        return None
    out, last = layout.size("o"), 0
    for start, stop in s.ranges:
        if not last <= start < stop <= out:
            _fail(
                s.place, f"its rows {start}:{stop} are no rows of {out} features", "load the base model it was made for"
            )
        last = stop
    return tuple(row for start, stop in s.ranges for row in range(start, stop))


def _oriented(s: _Saved, layout: Layout, rows: tuple[int, ...] | None) -> Factors:
    """The factors in the axes in which this model reads the weight."""
    turned = _turned(s.A, s.B, s.sides, layout.sides)
    if turned is None or (rows is not None and s.sides != layout.sides):
        _fail(
            s.place,
            f"it reads the weight's axes as {s.sides!r} (o: out, i: in, b: batch), the model as {layout.sides!r}",
            "load the base model it was made for, with example inputs that run as they did there",
        )
    A, B = turned
    shape_b = layout.shape_of("B", s.rank) if rows is None else (*layout.batch, len(rows), s.rank)
    for label, factor, want in (("A", A, layout.shape_of("A", s.rank)), ("B", B, shape_b)):
        if tuple(factor.shape) != want:
            _fail(
                s.place,
                f"{label} has the shape {tuple(factor.shape)}, and {s.weights[0]} wants {want}",
                "load the base model it was made for",
            )
    return A, B


def _copier(A: torch.Tensor, B: torch.Tensor) -> Callable[[torch.Tensor, torch.Tensor], None]:
    def from_file(a: torch.Tensor, b: torch.Tensor) -> None:
        a.copy_(A)
        b.copy_(B)

    return from_file


# ── what save_adapter wrote ──────────────────────────────────────────────────────────────────────────────────────────


def _read_own(
    model: nn.Module, folder: Path, config: dict, tensors: dict[str, torch.Tensor], header: dict
) -> list[_Saved]:
    """The adapters, by the header of the tensor file."""
    for key, value in header["config"].items():
        if config.get(key) != value:
            _fail(
                f"{folder / CONFIG}, {key}",
                f"it says {config.get(key)!r}, and {TENSORS} was written with {value!r}",
                "restore both files of one save; a change of settings is saved from the model",
            )
    own = config["peft_type"] == OWN
    if not own:
        _check_options(config, folder / CONFIG)
    modules = _Modules(model)
    place = f"{folder / TENSORS}, {HEADER}"
    names = [name for entry in header["adapters"] for name in entry["weights"]]
    for name in names:
        path, _, attribute = name.rpartition(".")
        if modules.by_path.get(path) is None or modules.by_path[path]._parameters.get(attribute) is None:
            near = difflib.get_close_matches(name, dict(model.named_parameters()), 3)
            _fail(
                place,
                f"the model has no weight {name!r}",
                f"load the base model it was made for; near: {', '.join(near) or 'none'}",
            )
    raw = [name for name in names if not own and modules.is_raw(name)]
    try:
        return [_entry(modules, entry, tensors, raw, config, folder) for entry in header["adapters"]]
    except (KeyError, IndexError, TypeError, ValueError, AssertionError, RuntimeError) as error:
        _fail(place, f"its header does not describe its tensors: {error!r}", "save the adapter again", error)


def _entry(
    modules: _Modules, entry: dict, tensors: dict[str, torch.Tensor], raw: list[str], config: dict, folder: Path
) -> _Saved:
    name, rank = entry["weights"][0], int(entry["rank"])
    ranges = None if entry["rows"] is None else tuple((int(a), int(b)) for a, b in entry["rows"])
    sides = entry["sides"]
    if "keys" in entry:
        key = entry["keys"][0]
        A, B = (tensors[k] for k in entry["keys"])
    else:
        layer = modules.layer(name, raw)
        key = layer.keys[0]
        start, stop = int(entry["start"]), int(entry["start"]) + rank
        total = _rank_of(config, layer.target)
        _check_shapes(layer, total, tensors, folder)
        A, B = layer.decode(*(tensors[k] for k in layer.keys), total)
        A, B = A[..., start:stop, :], torch.ldexp(B[..., start:stop], torch.tensor(-int(entry["shift"])))
        turned = _turned(A, B, layer.sides, sides)
        assert turned is not None, f"{sides!r} are no axes of {name}"
        A, B = turned
        if ranges is not None:
            B = torch.cat([B[..., a:b, :] for a, b in ranges], dim=-2)
    assert B.shape[-1] == rank, f"{name} has rank {B.shape[-1]}, not {rank}"
    return _Saved(
        tuple(entry["weights"]), A, B, sides, float(entry["alpha"]), entry["scaling"], f"{folder / TENSORS}, {key}",
        float(entry["dropout"]), ranges, str(entry["role"]), str(entry["part"]),
    )  # fmt: skip


def _ranges(rows: tuple[int, ...] | None) -> list[list[int]] | None:
    """Rows as half-open ranges."""
    if rows is None:
        return None
    ranges: list[list[int]] = []
    for row in rows:
        if ranges and ranges[-1][1] == row:
            ranges[-1][1] = row + 1
        else:
            ranges.append([row, row + 1])
    return ranges


# ── what PEFT wrote ──────────────────────────────────────────────────────────────────────────────────────────────────

#: options of PEFT's LoraConfig that lora_fx honours, or that change nothing in a trained adapter
_READ = frozenset({
    "peft_type", "r", "lora_alpha", "lora_dropout", "use_rslora", "target_modules", "exclude_modules",
    "target_parameters", "layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern", "bias",
    "init_lora_weights",
})  # fmt: skip
_FREE = frozenset({
    "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
    "fan_in_fan_out", "megatron_core", "loftq_config", "eva_config", "corda_config", "lora_ga_config",
    "qalora_group_size", "runtime_config",
})  # fmt: skip

#: initialisations that leave the base weights alone
_INITS = (True, False, None, "gaussian", "eva", "orthogonal")

_REASONS = {
    "use_dora": "DoRA also scales the columns of W + s·B·A",
    "lora_bias": "the branch has a bias of its own",
    "modules_to_save": "it replaces whole modules of the base model",
    "trainable_token_indices": "it replaces rows of the embedding",
    "layer_replication": "it changes how many layers the base model has",
    "alora_invocation_tokens": "the branch acts only after certain tokens",
    "use_qalora": "the branch reads pooled inputs",
    "ensure_weight_tying": "one adapter stands under several modules",
}


def _check_options(config: dict, place: Path) -> None:
    """Every option that changes what the adapter computes is honoured or refused by name."""
    merge = "merge it into its base with PEFT (merge_and_unload), or train plain LoRA"
    for key, value in config.items():
        if key in _READ or key in _FREE or value is None or value is False or value in ("", [], {}):
            continue
        why = _REASONS.get(key, "lora_fx does not know what this option does to the adapter")
        _fail(f"{place}, {key}", f"{key}={value!r}: {why}", merge)
    if config.get("bias", "none") != "none":
        _fail(f"{place}, bias", f"bias={config['bias']!r}: it also trains biases of the base model", merge)
    if config.get("init_lora_weights", True) not in _INITS:
        _fail(
            f"{place}, init_lora_weights",
            f"init_lora_weights={config['init_lora_weights']!r}: it changes the base weights when it starts",
            "convert it to plain LoRA with PEFT: save_pretrained(..., path_initial_model_for_weight_conversion=...)",
        )


def _read_peft(model: nn.Module, folder: Path, config: dict, tensors: dict[str, torch.Tensor]) -> list[_Saved]:
    """The adapters that PEFT's config puts into this model, with their tensors."""
    if config["peft_type"] == OWN:
        _fail(f"{folder / TENSORS}, {HEADER}", "the header is missing", "save the adapter again")
    _check_options(config, folder / CONFIG)
    modules = _Modules(model)
    saved, left = [], dict(tensors)
    targeted = list(_targeted(modules, config, folder / CONFIG))
    if why := _why_not_together([layer for _, layer in targeted], bool(config.get("fan_in_fan_out"))):
        _fail(f"{folder / CONFIG}, fan_in_fan_out", why, "train it with lora_fx.apply, which computes W + s·B·A there")
    for name, layer in targeted:
        rank = _rank_of(config, layer.target)
        _check_shapes(layer, rank, tensors, folder)
        A, B = layer.decode(*(left.pop(key) for key in layer.keys), rank)
        alpha = _pattern(config, "alpha_pattern", layer.target, _or(config.get("lora_alpha"), 8))
        # PEFT drops nothing on embeddings and attention
        dropout = 0.0 if layer.kind in ("embedding", "attention") else float(config.get("lora_dropout") or 0.0)
        if layer.times > 1 and _release(config) > SPOKEN and bool(B.any()):
            _fail(
                f"{folder / CONFIG}, peft_version",
                f"PEFT {config['peft_version']} wrote it, and only up to 0.21 is it known how often PEFT adds {name}'s delta",
                "merge it into its base with PEFT (merge_and_unload)",
            )
        scaling = "rslora" if config.get("use_rslora") else "standard"
        saved.append(
            _Saved(
                (name,),
                A,
                B,
                layer.sides,
                float(alpha) * layer.times,
                scaling,
                f"{folder / TENSORS}, {layer.keys[0]}",
                dropout,
            )
        )
    _check_left(model, left, folder)
    if not saved:
        _fail(
            f"{folder / CONFIG}, target_modules",
            f"{config.get('target_modules')!r} matches no module of this {type(model).__name__}",
            "load the base model it was made for",
        )
    return saved


def _targeted(modules: _Modules, config: dict, place: Path) -> Iterator[tuple[str, Layer]]:
    """(name, layer) of every weight that PEFT adapts in this model by its config."""
    linears = _all_linear(modules.model) if str(config.get("target_modules")).lower() == "all-linear" else None
    for path, module in modules.model.named_modules():
        if not path or isinstance(module, Adapter):
            continue
        if not (path in linears if linears is not None else _is_target(config, path)):
            continue
        inside = isinstance(modules.parent(path), nn.MultiheadAttention)
        if inside or not (_known_kind(module, "weight") or isinstance(module, nn.MultiheadAttention)):
            _fail(
                f"{place}, target_modules",
                f"it takes {path}, a {type(module).__name__}"
                + (" inside a MultiheadAttention, which never calls it" if inside else ""),
                "target the attention module itself" if inside else "load the base model it was made for",
            )
        attention = isinstance(module, nn.MultiheadAttention)
        for weight in ("in_proj_weight", "out_proj.weight") if attention else ("weight",):
            yield _loadable(modules, f"{path}.{weight}", (), f"{place}, target_modules")
    raw = [n for n, _ in modules.model.named_parameters() if _ends_in(n, config.get("target_parameters") or ())]
    for name in raw:
        yield _loadable(modules, name, raw, f"{place}, target_parameters")


def _loadable(modules: _Modules, name: str, raw: Sequence[str], place: str) -> tuple[str, Layer]:
    fused = "torch's fused"  # PEFT trains such a layer well, and is wrong only in eval
    why = modules.why_not(name)
    if why and not why.startswith(fused):
        _fail(f"{place}: {name}", why, "train it with lora_fx.apply, which computes W + s·B·A there")
    return name, modules.layer(name, raw)


def _all_linear(model: nn.Module) -> set[str]:
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    return {p for p, m in model.named_modules() if _known_kind(m, "weight") in ("linear", "conv1d") and m is not head}


def _ends_in(path: str, targets: Sequence[str]) -> bool:
    return any(path == target or path.endswith(f".{target}") for target in targets)


def _is_target(config: dict, path: str) -> bool:
    """PEFT's matching: excluded, full match of a pattern, exact path, or the end of a path in one of the layers."""
    exclude, target = config.get("exclude_modules"), config.get("target_modules")
    if exclude and (re.fullmatch(exclude, path) if isinstance(exclude, str) else _ends_in(path, exclude)):
        return False
    if isinstance(target, str):
        return re.fullmatch(target, path) is not None
    if target is None or path in target:
        return target is not None
    return _ends_in(path, target) and _in_layers(config, path)


def _in_layers(config: dict, path: str) -> bool:
    layers, patterns = config.get("layers_to_transform"), config.get("layers_pattern")
    if layers is None or layers == []:
        return True
    patterns = [patterns] if isinstance(patterns, str) and patterns else patterns or [r"[^.]*"]
    starts = r".*?\." if patterns == [r"[^.]*"] else r"(?:^|.*?\.)"
    found = next(filter(None, (re.match(rf"{starts}{p}\.(\d+)\.", path) for p in patterns)), None)
    return found is not None and int(found[found.lastindex or 1]) in ([layers] if isinstance(layers, int) else layers)


def _pattern(config: dict, key: str, target: str, default: Any) -> Any:
    """The value of the first pattern, in the file's order, that matches the target."""
    for pattern, value in (config.get(key) or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", target):
            return value
    return default


def _release(config: dict) -> tuple[int, ...]:
    """The (major, minor) version of the PEFT that wrote the config; older ones did not write it."""
    found = re.match(r"(\d+)\.(\d+)", str(config.get("peft_version") or "0.0"))
    return (int(found[1]), int(found[2])) if found else (sys.maxsize, 0)


def _or(value: Any, default: Any) -> Any:
    return default if value is None else value


def _rank_of(config: dict, target: str) -> int:
    return int(_pattern(config, "rank_pattern", target, _or(config.get("r"), 8)))


def _check_shapes(layer: Layer, rank: int, tensors: Mapping[str, torch.Tensor], folder: Path) -> None:
    for key, want in zip(layer.keys, layer.shapes(rank), strict=True):
        place = f"{folder / TENSORS}, {key}"
        if key not in tensors:
            _fail(place, "the key is missing", "restore the file; its config says that this layer is adapted")
        if tuple(tensors[key].shape) != want:
            _fail(
                place,
                f"it has the shape {tuple(tensors[key].shape)}; rank {rank} on {layer.target} {layer.shape} wants {want}",
                "load the base model it was made for, with the adapter_config.json of the same save",
            )


def _check_left(model: nn.Module, left: Mapping[str, torch.Tensor], folder: Path) -> None:
    """PEFT also writes base weights (of an adapted embedding): they must be the ones the model has."""
    state = model.state_dict(keep_vars=True)
    for key, value in left.items():
        place = f"{folder / TENSORS}, {key}"
        if key.endswith(".lora_magnitude_vector"):
            _fail(place, f"use_dora: {_REASONS['use_dora']}", "merge it into its base with PEFT (merge_and_unload)")
        if key.endswith(".lora_B.bias"):
            _fail(place, f"lora_bias: {_REASONS['lora_bias']}", "merge it into its base with PEFT (merge_and_unload)")
        base = state.get(key.removeprefix(PREFIX).replace(".base_layer.", "."))
        if base is None or not key.startswith(PREFIX):
            _fail(
                place,
                "no layer that the config names has this key",
                "load the base model and the config it was saved with",
            )
        if base.shape != value.shape or not torch.equal(base.detach().cpu().to(value.dtype), value):
            _fail(
                place,
                "the file carries a base weight, and the model's is another",
                "load that base weight into the model first",
            )


# ── files ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def _folder(path: Path) -> Path:
    """The folder with the adapter: this one, or its only subfolder that holds one."""
    if not path.is_dir():
        _fail(str(path), "there is no such folder", "pass the folder that save_adapter or save_pretrained wrote")
    if (path / CONFIG).is_file():
        return path
    inside = sorted(p.parent for p in path.glob(f"*/{CONFIG}"))
    if len(inside) != 1:
        found = f"; it holds {', '.join(p.name for p in inside)}" if inside else ""
        _fail(str(path), f"it has no {CONFIG}{found}", "pass the folder of one adapter")
    return inside[0]


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return (_is_int(value) or isinstance(value, float)) and math.isfinite(value)


def _are(test: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and all(test(v) for v in value)


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _table_of(test: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, dict) and all(test(v) for v in value.values())


#: option → (what it may be, in words)
_TYPES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "r": (lambda v: _is_int(v) and v > 0, "a positive integer"),
    "lora_alpha": (_is_number, "a finite number"),
    "lora_dropout": (lambda v: _is_number(v) and 0 <= v < 1, "a probability below 1"),
    "use_rslora": (lambda v: isinstance(v, bool), "true or false"),
    "rank_pattern": (_table_of(lambda v: _is_int(v) and v > 0), "a table of positive integers"),
    "alpha_pattern": (_table_of(_is_number), "a table of finite numbers"),
    "target_modules": (lambda v: _is_text(v) or _are(_is_text)(v), "a pattern or a list of names"),
    "exclude_modules": (lambda v: _is_text(v) or _are(_is_text)(v), "a pattern or a list of names"),
    "target_parameters": (_are(_is_text), "a list of names"),
    "layers_to_transform": (lambda v: _is_int(v) or _are(_is_int)(v), "an integer or a list of integers"),
    "layers_pattern": (lambda v: _is_text(v) or _are(_is_text)(v), "a name or a list of names"),
}
_PATTERNS = ("target_modules", "exclude_modules", "layers_pattern", "rank_pattern", "alpha_pattern")


def _read_config(file: Path) -> dict[str, Any]:
    remedy = "restore the file from where the adapter was saved"
    try:
        config = json.loads(file.read_bytes().decode("utf-8"))
    except (OSError, UnicodeDecodeError, ValueError, RecursionError) as error:
        _fail(str(file), f"it cannot be read: {error}", remedy, error)
    if not isinstance(config, dict):
        _fail(str(file), f"it holds a {type(config).__name__}, not a table", remedy)
    kind = config.get("peft_type")
    if kind not in ("LORA", OWN):
        _fail(f"{file}, peft_type", f"{kind!r} is no LoRA adapter", "load it with the library that wrote it")
    for key, (test, wanted) in _TYPES.items():
        if config.get(key) is not None and not test(config[key]):
            _fail(f"{file}, {key}", f"{config[key]!r} is not {wanted}", remedy)
    for key in _PATTERNS:
        for pattern in _patterns(key, config.get(key)):
            try:
                re.compile(pattern)
            except re.error as error:
                _fail(f"{file}, {key}", f"{pattern!r} is no pattern: {error}", remedy, error)
    return config


def _patterns(key: str, value: Any) -> list[str]:
    """The regular expressions in an option's value; the lists of modules hold plain names."""
    if isinstance(value, list) and key != "layers_pattern":
        return []
    return [value] if isinstance(value, str) else list(value or ())


def _meaning(config: Mapping[str, Any]) -> dict[str, Any]:
    """What of the config decides what the tensors mean."""
    keys = (
        "peft_type",
        "r",
        "lora_alpha",
        "use_rslora",
        "target_modules",
        "target_parameters",
        "rank_pattern",
        "alpha_pattern",
    )
    return {key: config[key] for key in keys if key in config}


def _pack(tensors: dict[str, torch.Tensor], header: dict[str, Any]) -> bytes:
    """A safetensors file with our header in it, and a digest over the header and the numbers."""
    from safetensors.torch import save

    tensors = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
    text = _json(header).decode()
    plain = save(tensors)
    return save(tensors, {"format": "pt", HEADER: text, DIGEST: _digest(text, plain)})


def _digest(text: str, file: bytes) -> str:
    """Over the header's text and the numbers: everything behind the 8 bytes of length and the JSON header."""
    start = 8 + int.from_bytes(file[:8], "little")
    return hashlib.sha256(text.encode() + file[start:]).hexdigest()


def _unpack(folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any] | None]:
    """The tensors, all floating point and finite, and our header where there is one."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    file = folder / TENSORS
    if not file.is_file() and (folder / PICKLE).is_file():
        _fail(
            str(folder / PICKLE),
            "it is a pickle, which can run any code when it is opened",
            f"save the adapter as {TENSORS} with PEFT, where you trust it",
        )
    try:
        data = file.read_bytes()
        tensors = load(data)
        meta = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")]).get("__metadata__") or {}
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        _fail(str(file), f"it cannot be read: {error}", "restore the file from where the adapter was saved", error)
    for key, tensor in tensors.items():
        _check_tensor(tensor, f"{file}, {key}")
    return tensors, _read_header(meta, data, tensors, file)


def _check_tensor(tensor: torch.Tensor, place: str) -> None:
    if not tensor.is_floating_point() or tensor.dtype.itemsize < 2:
        _fail(place, f"its dtype is {tensor.dtype}", "factors are float16, bfloat16, float32 or float64: save them so")
    if not bool(tensor.isfinite().all()) or (
        tensor.dtype == torch.float64 and not bool(tensor.float().isfinite().all())
    ):
        _fail(place, "it holds NaN, Inf or numbers beyond float32", "load an earlier checkpoint of the adapter")


def _read_header(meta: dict, data: bytes, tensors: dict[str, torch.Tensor], file: Path) -> dict[str, Any] | None:
    if HEADER not in meta:
        return None
    place, remedy = f"{file}, {HEADER}", "restore the file from where the adapter was saved"
    if meta.get(DIGEST) != _digest(meta[HEADER], data):
        _fail(place, "its numbers are not the ones that were saved: the file is damaged", remedy)
    try:
        header = json.loads(meta[HEADER])
        version, entries = header["version"], header["adapters"]
        names = [list(map(str, entry["weights"])) for entry in entries]
        known = isinstance(header["config"], dict) and isinstance(header["name"], str) and all(names)
    except (ValueError, KeyError, TypeError) as error:
        _fail(place, f"it cannot be read: {error!r}", remedy, error)
    if version != VERSION or not known or not entries:
        _fail(
            place, f"it is of version {version!r} with {len(entries)} adapters", f"this lora_fx reads version {VERSION}"
        )
    return header


def _write(folder: Path, config: bytes, tensors: bytes) -> None:
    """Both files, or neither. A new folder, and one that holds an adapter alone, changes in a single step.

    In a folder with other files too, the config goes first and comes last: in between no reader takes it for an adapter.
    """
    if folder.exists() and not folder.is_dir():
        _fail(str(folder), "it is a file", "pass the path of a folder")
    folder = folder.resolve()
    fresh = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}")
    try:
        fresh.mkdir(parents=True)
        for name, data in ((TENSORS, tensors), (CONFIG, config)):
            _write_file(fresh / name, data)
        _sync_folder(fresh)
        _publish(fresh, folder)
        _sync_folder(folder.parent)
    except OSError as error:
        _fail(
            str(folder), f"it cannot be written: {error}", "choose a folder on a disk with space and permission", error
        )
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def _publish(fresh: Path, folder: Path) -> None:
    if not folder.exists():
        os.replace(fresh, folder)
        return
    alone = {entry.name for entry in folder.iterdir()} <= {CONFIG, TENSORS}
    if alone and _exchange(fresh, folder):
        return
    old = folder / CONFIG, fresh / f"old_{CONFIG}"
    changed = not old[0].is_file() or old[0].read_bytes() != (fresh / CONFIG).read_bytes()
    withdrawn = changed and old[0].is_file()
    if withdrawn:
        os.replace(*old)
    try:
        os.replace(fresh / TENSORS, folder / TENSORS)
    except BaseException:
        if withdrawn:
            os.replace(*reversed(old))
        raise
    if changed:
        os.replace(fresh / CONFIG, folder / CONFIG)
    _sync_folder(folder)


def _exchange(a: Path, b: Path) -> bool:
    """Swap two folders in one step, as Linux can; False where the system cannot."""
    call = getattr(ctypes.CDLL(None), "renameat2", None) if sys.platform == "linux" else None
    here, swap = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return call is not None and call(here, os.fsencode(a), here, os.fsencode(b), swap) == 0


def _write_file(path: Path, data: bytes) -> None:
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(path: Path) -> None:
    """Make renames in a folder survive a power cut, where the system can open folders."""
    if sys.platform == "win32":
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _json(value: Any, indent: int | None = None) -> bytes:
    return json.dumps(value, indent=indent, sort_keys=True, allow_nan=False).encode()


def _number(value: float) -> int | float:
    """Whole numbers as integers, as PEFT types them."""
    return int(value) if float(value).is_integer() else value


def _fail(place: str, reason: str, remedy: str, cause: BaseException | None = None) -> NoReturn:
    raise FileError(reason, place=place, remedy=remedy) from cause
