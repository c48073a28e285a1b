"""Which tensor of a checkpoint each entry of an adapter means, from key names, shapes and configs alone.

    base_model.model.<path>.lora_A.weight, <path>.lora_B.weight   →   <path>.weight, (out, in), or (in, out) as Conv1D
    <path>.lora_embedding_A, <path>.lora_embedding_B              →   <path>.weight, an embedding
    <path>.lora_A.weight of a name in `target_parameters`         →   that parameter, 2-D or of experts
    <path>.<name> under `modules_to_save`, biases under `bias`    →   the tensor of that name: kind `full`
    other dialects' keys (`lora_fx.export.adapters.dialects`)     →   PEFT's, by the names that the checkpoint has
    our own format                                                →   the names, axes and kinds of its header

There is no model here, and so no graph. What only a graph can tell (whether another use reads an embedding, how a
convolution is padded, which axis of a square matrix is which) is taken from what files say, or refused by name.
"""

from __future__ import annotations

import difflib
import itertools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lora_fx.deltas.adapter import Adapter
from lora_fx.errors import KindError, few
from lora_fx.export.adapters import dialects
from lora_fx.export.adapters import peft as peft_format
from lora_fx.export.adapters.folder import ADALORA, CONFIG, OWN, Folder, read_folder
from lora_fx.export.adapters.peft import ITS_BASE, Layer
from lora_fx.export.adapters.spelling import respelled
from lora_fx.export.checkpoints.checkpoint import FLOATS, Checkpoint, Stored
from lora_fx.export.checkpoints.orientation import Orientation
from lora_fx.graph.layout import Layout
from lora_fx.reading import boundary, refuse

_PREFIX = "base_model.model."
_IN_THE_MODEL = "load it into its model (lora_fx.load_adapter), fold there, and save the model"
_KEY = re.compile(r"(.+)\.(lora_embedding_A|lora_A(?:\.weight)?)")
_FACTOR = re.compile(r".+\.(lora_embedding_[AB]|lora_[AB](\.weight)?|lora_E|lora_magnitude_vector|ranknum)")


@dataclass(frozen=True)
class Share:
    """What one adapter adds to one tensor of a checkpoint."""

    tensor: str
    adapter: Adapter
    strength: float = 1.0
    """δ is multiplied with it."""


@dataclass(frozen=True)
class Given:
    """An adapter that is to be folded, and what is said of it besides."""

    path: Path
    strength: float = 1.0
    part: str | None = None
    """Of a pipeline, where its file is for several models."""
    config: Mapping[str, Any] = field(default_factory=dict)
    """Options of PEFT's that its file does not say."""

    @staticmethod
    def kept(folder: Path, said: Mapping[str, Any]) -> Given:
        """What a fold has kept in a folder."""
        path = folder if CONFIG in said["sha256"] else folder / next(iter(said["sha256"]))
        return Given(path, said["strength"], said.get("part"), said.get("config", {}))


class _Stored:
    """The modules that a checkpoint tells of by the names of its tensors."""

    base = "this checkpoint"

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.by_path: dict[str, None] = {}
        for name in (*checkpoint.tensors, *checkpoint.aliases):
            while name := name.rpartition(".")[0]:
                self.by_path[name] = None

    def is_table(self, path: str) -> bool:
        """It is not known: a table's factors are those of a matrix that lies (in, out), which their shapes tell."""
        return False


def read_shares(given: Given, checkpoint: Checkpoint, name: str) -> list[Share]:
    """The entries of an adapter, each with the tensor that it means.

    Args:
        name: what the adapter is called, where its file does not say.

    Raises:
        FileError: it cannot be read, is for another base, fits nowhere, or says too little without the model.
    """
    folder = read_folder(given.path)
    with boundary("it cannot be put onto this checkpoint", str(folder.path), ITS_BASE):
        there = _Stored(checkpoint)
        folder = dialects.in_words_of_pefts(there, folder, given.part, given.config)
        if folder.config["peft_type"] == OWN:
            found = [*_own(folder, checkpoint, name)]
        else:
            found = [*_peft(respelled(there, folder), checkpoint, name)]
    if not found:
        refuse(str(folder.path), "it adapts nothing", "pass the folder of an adapter")
    names = [share.tensor for share in found]
    for share in found:
        if names.count(share.tensor) > 1 and share.adapter.rows is None and not share.adapter.role:
            refuse(
                str(folder.path), f"it has two entries for {share.tensor}", "restore the file from where it was saved"
            )
        if checkpoint.tensors[share.tensor].dtype not in FLOATS:
            stored = checkpoint.tensors[share.tensor]
            reason = f"it is stored as {stored.dtype}, and a fold adds to {', '.join(FLOATS)}"
            refuse(checkpoint.at(share.tensor), reason, "fold into the checkpoint it was quantised from, then quantise")
    return [replace(share, strength=given.strength) for share in found]


# ── names ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def fitted(wanted: Sequence[str], checkpoint: Checkpoint, place: str) -> dict[str, str]:
    """Each name as the checkpoint has it. A model inside another has a prefix: one for all, more or less.

    Raises:
        FileError: some of them fit nowhere, or the prefix is not the only one.
    """
    have = {**{name: name for name in checkpoint.tensors}, **checkpoint.aliases}
    if not wanted or all(name in have for name in wanted):
        return {name: have[name] for name in wanted}
    if not any(name in have for name in wanted):
        ways = [way for way in _prefixes(wanted[0], have) if all(_moved(name, *way) in have for name in wanted)]
        if len(ways) == 1:
            return {name: have[_moved(name, *ways[0])] for name in wanted}
        if ways:
            reason = f"{wanted[0]} may be {few([_moved(wanted[0], *way) for way in ways], 3)}"
            refuse(place, reason, "pass the checkpoint whose names the adapter was trained with")
    lost = [name for name in wanted if name not in have]
    near = [*dict.fromkeys(itertools.chain(*(difflib.get_close_matches(name, have, 2) for name in lost[:5])))]
    tied = [name for name in lost if checkpoint.config.get("tie_word_embeddings", True) and "head" in name]
    reason = f"the checkpoint has no {few(lost, 5)}"
    if tied:
        reason += ": where it is tied to the embedding, adding to that would change the embedding too"
    refuse(place, reason, f"{_IN_THE_MODEL if tied else ITS_BASE}; near: {', '.join(near) or 'none'}")


def _prefixes(name: str, have: Iterable[str]) -> Iterator[tuple[int, str]]:
    """Leading words that are left out, and what comes before the rest instead."""
    words, names = name.split("."), {*have}
    for k in range(1, len(words) - 1):
        if ".".join(words[k:]) in names:
            yield k, ""
    for other in sorted(names):
        if other.endswith(f".{name}"):
            yield 0, other.removesuffix(name)


def _moved(name: str, out: int, prefix: str) -> str:
    return prefix + ".".join(name.split(".")[out:])


def _refuse_tied(stored: Stored, names: Sequence[str], checkpoint: Checkpoint, embedding: bool, place: str) -> None:
    """An embedding and a head may be one weight, of which PEFT adapts one use: the file has to know both."""
    config = checkpoint.config
    text = config.get("text_config") if isinstance(config.get("text_config"), dict) else {}
    assert isinstance(text, dict)
    tied = config.get("tie_word_embeddings", text.get("tie_word_embeddings"))
    rows = config.get("vocab_size", text.get("vocab_size"))
    vocabulary = stored.shape[0] == rows if isinstance(rows, int) else embedding
    every = [stored.name, *(alias for alias, kept in checkpoint.aliases.items() if kept == stored.name)]
    twice = [name for name in every if name not in names] if len(every) > 1 else []
    if twice or (vocabulary and tied is not False and len(names) < 2):
        said = f"it also stands as {few(twice, 3)}" if twice else "its config does not say tie_word_embeddings: false"
        reason = f"{stored.name} may be read by two modules, and the adapter is for one: {said}"
        refuse(place, reason, _IN_THE_MODEL)


#: what a file of PEFT's may say and a checkpoint cannot be asked about
_ONLY_IN_THE_MODEL = {
    "lora_bias": "the branch has a bias of its own, and only the model says to which bias it is added",
    "trainable_token_indices": "rows of an embedding were trained, and only the model says what is tied to it",
    "ensure_weight_tying": "what is saved whole is tied, and only the model says to what",
}


# ── PEFT's format ────────────────────────────────────────────────────────────────────────────────────────────────────


def _peft(folder: Folder, checkpoint: Checkpoint, name: str) -> Iterator[Share]:
    config = folder.config
    for option, why in _ONLY_IN_THE_MODEL.items():
        if config.get(option):
            refuse(folder.option(option), why, _IN_THE_MODEL)
    plain = {key: value for key, value in config.items() if key not in ("modules_to_save", "bias")}
    peft_format.check_options(replace(folder, config=plain))
    keys = {key: key.removeprefix(_PREFIX) for key in folder.tensors}
    paths = sorted({m[1] for key in keys.values() if (m := _KEY.fullmatch(key))})
    beside = [key for key in folder.tensors if not _FACTOR.fullmatch(key)]
    raw = _raw_parameters(folder, paths)
    for path in paths:
        if ".base_layer" in path or f"{path}.in_proj_weight" in checkpoint.tensors:
            reason = "it is of a MultiheadAttention, or of several parameters of one module: only the model says which"
            refuse(folder.tensor(path), reason, _IN_THE_MODEL)
    wanted = {path: raw.get(path, f"{path}.weight") for path in paths}
    others = {key: _plain_name(keys[key]) for key in beside}
    found = fitted([*wanted.values(), *others.values()], checkpoint, str(folder.path))
    layers = {path: _layer(path, checkpoint.tensors[found[wanted[path]]], path in raw, folder) for path in paths}
    layers = _settled(layers, checkpoint, {path: found[wanted[path]] for path in paths}, folder)
    if len({*(found[name] for name in wanted.values())}) < len(wanted):
        twice = next(n for n in found.values() if [*(found[w] for w in wanted.values())].count(n) > 1)
        refuse(str(folder.path), f"it has two entries for {twice}", _IN_THE_MODEL)
    used: set[str] = set()
    for path, layer in layers.items():
        tensor = found[wanted[path]]
        entries = _entries(folder, wanted[path])
        names = entries[0]["weights"] if entries else [wanted[path]]
        _refuse_tied(checkpoint.tensors[tensor], names, checkpoint, layer.kind == "embedding", folder.tensor(path))
        made, taken = _adapters(folder, layer, entries, name)
        used |= taken
        yield from (Share(tensor, adapter) for adapter in made)
    for key, own in others.items():
        used.add(key)
        yield from _beside(folder, key, found[own], checkpoint, name)
    if lost := sorted({*folder.tensors} - used):
        refuse(folder.tensor(lost[0]), "it is half of an entry, or of a kind that the config does not name", ITS_BASE)


def _plain_name(key: str) -> str:
    """Of a base tensor in an adapter's file, as PEFT writes it."""
    return re.sub(r"\.(base_layer|original_module|modules_to_save(\.default)?)(?=\.)", "", key)


def _raw_parameters(folder: Folder, paths: Sequence[str]) -> dict[str, str]:
    """Path → the parameter that it is of, where the config has `target_parameters`: its keys do not name it."""
    found: dict[str, str] = {}
    for path in paths:
        for target in folder.config.get("target_parameters") or ():
            above, _, attribute = target.rpartition(".")
            if path == above or path.endswith(f".{above}") or not above:
                if path in found:
                    reason = f"{path} has several target_parameters, and only the model knows which is the inner one"
                    refuse(folder.option("target_parameters"), reason, _IN_THE_MODEL)
                found[path] = f"{path}.{attribute}"
    return found


def _layer(path: str, stored: Stored, raw: bool, folder: Folder) -> Layer:
    """PEFT's layer, by its keys and the shape of its weight: a matrix as (out, in), until `_settled`."""
    shape, base = stored.shape, f"{_PREFIX}{path}"
    place = folder.tensor(path)
    if f"{base}.lora_embedding_A" in folder.tensors:
        return Layer(path, path, Layout("io", shape), "embedding")
    A = folder.tensors.get(f"{base}.lora_A.weight", folder.tensors.get(f"{base}.lora_A"))
    if A is None:
        refuse(place, "its keys do not begin with base_model.model.", "save it with PEFT's save_pretrained")
    if raw:
        sides = "oi" if len(shape) == 2 else "boi"
        return Layer(stored.name, path, Layout(sides, shape), "parameter")
    if len(shape) == 2:
        return Layer(path, path, Layout("oi", shape), "linear")
    if len(shape) in (3, 4, 5) and A.ndim == len(shape):
        if set(shape[2:]) != {1} and folder.header is None:
            reason = f"it is of a convolution {shape}, and a checkpoint does not say how that is padded and dilated"
            refuse(place, reason, _IN_THE_MODEL)
        return Layer(path, path, Layout("o" + "i" * (len(shape) - 1), shape), "conv")
    refuse(place, f"its A has the shape {tuple(A.shape)}, and {stored.name} has {shape}", ITS_BASE)


def _settled(
    layers: Mapping[str, Layer], checkpoint: Checkpoint, tensors: Mapping[str, str], folder: Folder
) -> dict[str, Layer]:
    """With what lies (in, out), as transformers' Conv1D: the factors' shapes say so, or the files of a square one."""
    flag, orientation = bool(folder.config.get("fan_in_fan_out")), Orientation.of(checkpoint)
    settled: dict[str, Layer] = {}
    for path, layer in layers.items():
        shape = layer.layout.shape
        if layer.kind not in ("linear", "parameter"):
            settled[path] = layer
            continue
        A = folder.tensors.get(layer.keys[0], folder.tensors.get(f"{_PREFIX}{path}.lora_A"))
        assert A is not None
        transposed = shape[-2] == A.shape[-1] != shape[-1] and (layer.kind == "linear" or len(shape) == 3)
        if shape[-2] == shape[-1] and (layer.kind == "linear" or len(shape) == 3):
            said = None if layer.kind == "parameter" else orientation.transposed(tensors[path])
            if said != flag:
                how = {True: "as (in, out)", False: "as (out, in)", None: "either way"}
                reason = f"{tensors[path]} is square {shape}: the config says {how[flag]}, the checkpoint {how[said]}"
                refuse(folder.option("fan_in_fan_out"), reason, _IN_THE_MODEL)
            transposed = flag
        kind = "conv1d" if layer.kind == "linear" else layer.kind
        sides = "io" if len(shape) == 2 else "bio"
        settled[path] = replace(layer, kind=kind, layout=Layout(sides, shape)) if transposed else layer
    return settled


_WHOLE: dict[str, Any] = {"part": "", "start": 0, "shift": 0}


def _entries(folder: Folder, name: str) -> list[dict[str, Any]]:
    """The adapters of a weight that lie one after the other along the rank, where the file has our header."""
    entries = [] if folder.header is None else folder.header["adapters"]
    return [entry for entry in entries if name in entry["weights"]]


def _adapters(
    folder: Folder, layer: Layer, entries: Sequence[Mapping[str, Any]], name: str
) -> tuple[list[Adapter], set[str]]:
    """A layer's adapters, and the keys they were made of."""
    config, target = folder.config, layer.target
    if config["peft_type"] == ADALORA:
        theta = layer.adalora(folder)
        rank = len(theta["singular"])
        settings = {"rank": rank, "alpha": peft_format.adalora_scale(config) * rank}
        made = [_adapter(layer.layout, "adalora", theta, name, settings)] if rank else []
        return made, {*layer.adalora_keys.values()}
    whole = layer.decode(folder, peft_format.ranks(folder, [target])[target])
    taken, extra, kind = {*layer.keys}, {}, "lora"
    if config.get("use_dora"):
        if why := layer.why_not_dora:
            refuse(folder.option("use_dora"), why, peft_format.TRAIN)
        extra, kind = layer.sizes(folder), "dora"
        taken.add(layer.magnitude)
    made = []
    for entry in entries or [_WHOLE]:
        with boundary("its header does not describe its tensors", folder.tensor(target), "save the adapter again"):
            settings = dict(entry["settings"]) if "kind" in entry else _settings(folder, layer, whole.rank, entry)
            start, stop = int(entry["start"]), int(entry["start"]) + int(settings["rank"])
            B = torch.ldexp(whole.B[..., start:stop], torch.tensor(-int(entry["shift"])))
            theta = {"A": whole.A[..., start:stop, :], "B": B, **extra}
            settings = {key: value for key, value in settings.items() if key in ("rank", "alpha", "scaling")}
            part = str(entry["part"])
            made.append(_adapter(layer.layout, kind, theta, name, settings, role=part))
    return made, taken


def _settings(folder: Folder, layer: Layer, rank: int, entry: Mapping[str, Any]) -> dict[str, Any]:
    """rank, alpha and scaling, as our header says or the config."""
    if "rank" in entry:
        return {"rank": int(entry["rank"]), "alpha": float(entry["alpha"]), "scaling": str(entry["scaling"])}
    alpha = float(peft_format.alphas(folder, [layer.target])[layer.target])
    return {"rank": rank, "alpha": alpha, "scaling": "rslora" if folder.config.get("use_rslora") else "standard"}


def _adapter(
    layout: Layout,
    kind: str,
    theta: Mapping[str, torch.Tensor],
    name: str,
    settings: Mapping[str, Any],
    rows: tuple[int, ...] | None = None,
    role: str = "",
) -> Adapter:
    first = next(iter(theta.values()))
    adapter = Adapter(layout, kind=kind, rows=rows, name=name, role=role, dtype=first.dtype, **settings)
    for tensor, value in theta.items():
        was = adapter.get_parameter(tensor)
        assert was.shape == value.shape, f"{tensor} has the shape {tuple(value.shape)}, and not {tuple(was.shape)}"
        adapter._parameters[tensor] = nn.Parameter(value, requires_grad=False)
    return adapter


def _beside(folder: Folder, key: str, tensor: str, checkpoint: Checkpoint, name: str) -> Iterator[Share]:
    """A tensor of the base in the adapter's file: trained beside it, or the base's own."""
    stored, value, place = checkpoint.tensors[tensor], folder.tensors[key], folder.tensor(key)
    if stored.shape != tuple(value.shape):
        reason = f"its shape is {tuple(value.shape)}, and that of {tensor} is {stored.shape}"
        refuse(place, reason, f"{ITS_BASE}, with the vocabulary that it was trained with")
    words = key.removeprefix(_PREFIX).split(".")[:-1]
    above = [".".join(words[: n + 1]) for n in range(len(words))]
    trained = any(path.endswith(word) for path in above for word in folder.config.get("modules_to_save") or ())
    trained |= folder.config.get("bias", "none") != "none" and key.endswith(".bias")
    if trained:
        layout = Layout("o" + "i" * (len(stored.shape) - 1), stored.shape)
        _refuse_tied(stored, [tensor], checkpoint, "embed" in tensor, place)
        yield Share(tensor, _adapter(layout, "full", {"weight": value.reshape(stored.shape[0], -1)}, name, {}))
    elif stored.dtype not in FLOATS or not torch.equal(checkpoint.read(tensor).to(value.dtype), value):
        refuse(place, "the file carries a base weight, and the checkpoint's is another", ITS_BASE)


# ── our own format ───────────────────────────────────────────────────────────────────────────────────────────────────


def _own(folder: Folder, checkpoint: Checkpoint, name: str) -> Iterator[Share]:
    if folder.header is None:
        refuse(str(folder.path), "the header is missing", "save the adapter again")
    entries = folder.header["adapters"]
    firsts = [entry["weights"][0] for entry in entries]
    found = fitted([*dict.fromkeys(firsts)], checkpoint, str(folder.path))
    for entry in entries:
        names, tensor, kind = entry["weights"], found[entry["weights"][0]], str(entry.get("kind", "lora"))
        stored, keys = checkpoint.tensors[tensor], entry["keys"]
        keys = dict(zip("AB", keys, strict=True)) if kind == "lora" else keys
        place = folder.tensor(next(iter(keys.values())))
        _refuse_tied(stored, names, checkpoint, str(entry["role"]) == "embedding", place)
        with boundary("its header does not describe its tensors", place, "save the adapter again"):
            theta = {t: folder.tensors[key] for t, key in keys.items()}
            said = dict(entry["settings"]) if "kind" in entry else _settings(folder, _NO_LAYER, 0, entry)
            sides = str(entry["sides"])
            assert len(sides) == len(stored.shape) and {*sides} <= {*"boi"}, f"{sides!r} are no axes of {tensor}"
            rows = None if entry["rows"] is None else tuple(itertools.starmap(range, entry["rows"]))
            whole = None if rows is None else tuple(itertools.chain(*rows))
            assert whole is None or (whole and max(whole) < Layout(sides, stored.shape).size("o")), "it has other rows"
            try:
                adapter = _adapter(Layout(sides, stored.shape), kind, theta, name, said, whole, str(entry["role"]))
            except KindError as error:
                refuse(place, f"{error.place}: {error.reason}", error.remedy, error)
        yield Share(tensor, adapter)


_NO_LAYER = Layer("", "", Layout("o", (1,)), "")
