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
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from lora_fx.deltas.adapter import Adapter
from lora_fx.errors import FileError, KindError, few
from lora_fx.export.adapters import dialects
from lora_fx.export.adapters import peft as peft_format
from lora_fx.export.adapters.beside import TOKENS, shift_key
from lora_fx.export.adapters.folder import ADALORA, CONFIG, OWN, Folder, read_folder
from lora_fx.export.adapters.peft import ITS_BASE, PREFIX, Layer
from lora_fx.export.adapters.spelling import respelled
from lora_fx.export.checkpoints.beside import FACTOR, Rows, Ties, base_tensor, is_held, is_saved_whole, shift_of
from lora_fx.export.checkpoints.checkpoint import FLOATS, Checkpoint, Stored
from lora_fx.export.checkpoints.loaded import Loaded
from lora_fx.export.checkpoints.orientation import Orientation
from lora_fx.export.checkpoints.shares import IN_THE_MODEL, Share, adapter_of, plain_name, refuse_tied
from lora_fx.graph.layout import Layout
from lora_fx.reading import boundary, refuse

OURS = "lora_fx."
"""What a key begins with that PEFT has no word for."""
_KEY = re.compile(r"(.+)\.(lora_embedding_A|lora_A(?:\.weight)?)")


@dataclass(frozen=True)
class Given:
    """An adapter that is to be folded, and what is said of it besides."""

    path: Path
    strength: float = 1.0
    part: str | None = None
    """Of a pipeline, where its file is for several models."""
    config: Mapping[str, Any] = field(default_factory=dict)
    """Options of PEFT's that its file does not say."""
    resized: Mapping[str, Sequence[int]] | None = None
    """Of a table whose vocabulary was resized, the rows that it has more, where the checkpoint is the folded one: as
    the base it tells by its numbers."""

    @staticmethod
    def kept(folder: Path, said: Mapping[str, Any]) -> Given:
        """What a fold has kept in a folder."""
        path = folder if CONFIG in said["sha256"] else folder / next(iter(said["sha256"]))
        return Given(path, said["strength"], said.get("part"), said.get("config", {}), said.get("resized", {}))


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
        try:
            found = _shares(folder, Loaded(checkpoint), given, name)
        except FileError:  # by the names on disk; its model may have others
            loaded = Loaded.of(checkpoint)
            if not loaded.names and not loaded.parts:
                raise
            found = _shares(folder, loaded, given, name)
    if not found:
        refuse(str(folder.path), "it adapts nothing", "pass the folder of an adapter")
    whole = Counter(share.tensor for share in found if share.adapter.rows is None and not share.adapter.role)
    for share in found:
        if whole[share.tensor] > 1:
            refuse(
                str(folder.path), f"it has two entries for {share.tensor}", "restore the file from where it was saved"
            )
        if checkpoint.tensors[share.tensor].dtype not in FLOATS:
            stored = checkpoint.tensors[share.tensor]
            reason = f"it is stored as {stored.dtype}, and a fold adds to {', '.join(FLOATS)}"
            refuse(checkpoint.at(share.tensor), reason, "fold into the checkpoint it was quantised from, then quantise")
        share.adapter.adjust(given.strength)
    return found


def _shares(folder: Folder, loaded: Loaded, given: Given, name: str) -> list[Share]:
    there = _Stored(loaded.checkpoint)
    folder = dialects.in_words_of_pefts(there, folder, given.part, given.config)
    if folder.config["peft_type"] == OWN:
        found = _own(folder, loaded.checkpoint, name)
    else:
        found = _peft(respelled(there, folder), loaded, name, loaded.by_its_names(given.resized))
    return [own for share in found for own in loaded.on_disk(share, str(folder.path))]


# ── names ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def fitted(
    wanted: Sequence[str], checkpoint: Checkpoint, place: str, heads: Collection[str] = (), remedy: str = ""
) -> dict[str, str]:
    """Each name as the checkpoint has it. A model inside another has a prefix: one for all, more or less.

    Args:
        heads: names of what was trained whole, which a base without a head does not have.
        remedy: for names that are no adapter's.

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
    near_by, reason = f"near: {', '.join(near) or 'none'}", f"the checkpoint has no {few(lost, 5)}"
    if remedy:
        refuse(place, reason, f"{remedy}; {near_by}")
    tied = [name for name in lost if checkpoint.config.get("tie_word_embeddings", True) and "head" in name]
    if not tied and {*lost} <= {*heads}:
        save = "AutoModelForSequenceClassification.from_pretrained(base, num_labels=…).save_pretrained(…)"
        refuse(
            place, f"{reason}, which was trained whole", f"fold into a base of the class that has it, as {save} does"
        )
    if tied:
        reason += ": where it is tied to the embedding, adding to that would change the embedding too"
    renamed = f"; or, where transformers renames or merges what it loads, {IN_THE_MODEL}"
    other = ITS_BASE + (renamed if checkpoint.config.get("model_type") else "")
    refuse(place, reason, f"{IN_THE_MODEL if tied else other}; {near_by}")


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


# ── PEFT's format ────────────────────────────────────────────────────────────────────────────────────────────────────


def _peft(folder: Folder, loaded: Loaded, name: str, resized: Mapping[str, Sequence[int]] | None) -> Iterator[Share]:
    checkpoint, config = loaded.checkpoint, folder.config
    plain = {key: value for key, value in config.items() if key not in ("modules_to_save", "bias")}
    peft_format.check_options(replace(folder, config=plain))
    keys = {key: key.removeprefix(PREFIX) for key in folder.tensors}
    paths = sorted({m[1] for key in keys.values() if (m := _KEY.fullmatch(key))})
    raw = _raw_parameters(folder, paths, checkpoint)
    for path in paths:
        if path not in raw and (".base_layer" in path or f"{path}.in_proj_weight" in checkpoint.tensors):
            reason = "it is of a MultiheadAttention, or of several parameters of one module: only the model says which"
            refuse(folder.tensor(path), reason, IN_THE_MODEL)
    if config.get("trainable_token_indices") and not any(key.endswith(f".{TOKENS}") for key in keys):
        refuse(folder.option("trainable_token_indices"), "the file holds no rows", "restore both files of one save")
    ties = Ties(folder, checkpoint, paths)
    paths = [path for path in paths if path not in ties.heads.values()]
    wanted = {path: raw.get(path, f"{path}.weight") for path in paths}
    said = _said_of_it(folder)
    others = {key: plain_name(keys[key]) for key in folder.tensors if not FACTOR.fullmatch(key)}
    apart = ties.again | {f"{PREFIX}{path}.lora_B.bias" for path in paths if config.get("lora_bias")}
    others = {key: own for key, own in others.items() if key not in apart and not key.startswith(OURS)}
    firsts = [entry["weights"][0] for entry in said]
    heads = {own for key, own in others.items() if is_saved_whole(folder, key)}
    found = fitted([*wanted.values(), *firsts, *others.values()], checkpoint, str(folder.path), heads)
    layers = {path: _layer(path, checkpoint.tensors[found[wanted[path]]], path in raw, folder) for path in paths}
    layers = _settled(layers, loaded, {path: found[wanted[path]] for path in paths}, folder)
    if len({*(found[name] for name in wanted.values())}) < len(wanted):
        twice = next(n for n in found.values() if [*(found[w] for w in wanted.values())].count(n) > 1)
        refuse(str(folder.path), f"it has two entries for {twice}", IN_THE_MODEL)
    sizes = _Sizes.of(folder, [layer.target for layer in layers.values()])
    used = {*ties.again, *(key for entry in said for key in entry["keys"].values())}
    beside = [_entry(folder, entry, found[entry["weights"][0]], checkpoint, name) for entry in said]
    yield from beside
    for path, layer in layers.items():
        tensor = found[wanted[path]]
        entries = _entries(folder, wanted[path])
        names = entries[0]["weights"] if entries else [wanted[path], *ties.names(path)]
        refuse_tied(checkpoint.tensors[tensor], names, checkpoint, layer.kind == "embedding", folder.tensor(path))
        made, taken = _adapters(folder, layer, sizes, entries, name)
        used |= taken
        yield from (Share(tensor, adapter) for adapter in made)
        if config.get("lora_bias"):
            used.add(shift_key(layer))
            yield from shift_of(folder, layer, tensor, made, checkpoint, name) if folder.header is None else ()
    rows = Rows(folder, checkpoint, name, resized)
    for key, own in others.items():
        used.add(key)
        tensor = found[own]
        if any(share.tensor == tensor for share in beside):  # our header says it
            continue
        if key.endswith(f".{TOKENS}"):
            yield from rows.trained(key, tensor)
        else:
            yield from base_tensor(folder, key, tensor, checkpoint, name, rows)
    if lost := sorted({*folder.tensors} - used):
        refuse(folder.tensor(lost[0]), "it is half of an entry, or of a kind that the config does not name", ITS_BASE)


def _said_of_it(folder: Folder) -> list[dict[str, Any]]:
    """What our header says of adapters that are no factors: where θ itself lies."""
    return [] if folder.header is None else [e for e in folder.header["adapters"] if isinstance(e.get("keys"), dict)]


@dataclass(frozen=True)
class _Sizes:
    """Rank and alpha of each target, by the config: all of them asked for at once, for patterns take time."""

    ranks: Mapping[str, int]
    alphas: Mapping[str, float]

    @staticmethod
    def of(folder: Folder, targets: Sequence[str]) -> _Sizes:
        if folder.config["peft_type"] == ADALORA:  # its rank_pattern says something else
            return _Sizes({}, {})
        return _Sizes(peft_format.ranks(folder, targets), peft_format.alphas(folder, targets))


def _raw_parameters(folder: Folder, paths: Sequence[str], checkpoint: Checkpoint) -> dict[str, str]:
    """Path → the parameter that it is of, where the config has `target_parameters`: its keys do not name it. Of several
    of one module each has a wrapper of its own, and its factors' shapes tell which."""
    attributes: dict[str, list[str]] = {}
    for target in dict.fromkeys(folder.config.get("target_parameters") or ()):
        above, _, attribute = target.rpartition(".")
        attributes.setdefault(above, []).append(attribute)
    modules: dict[str, list[str]] = {}
    for path in paths if attributes else ():
        modules.setdefault(re.sub(r"(\.base_layer)+$", "", path), []).append(path)
    found: dict[str, str] = {}
    for module, own in modules.items():
        words = module.split(".")
        ends = [".".join(words[n:]) for n in range(len(words) + 1)]  # "", at last: of any module that has it
        said = {f"{module}.{attribute}": end for end in ends for attribute in attributes.get(end, ())}
        names = [name for name, end in said.items() if end or is_held(name, checkpoint)]
        if len(own) == len(names) == 1:
            found[own[0]] = names[0]
        if len(names) <= 1:
            continue
        fits = {path: [name for name in names if _is_of(folder, path, name, checkpoint)] for path in own}
        if len({*itertools.chain(*fits.values())}) != len(own) or any(len(fitting) != 1 for fitting in fits.values()):
            reason = f"{module} has several target_parameters, and the shapes of the factors do not tell which is which"
            refuse(folder.option("target_parameters"), reason, IN_THE_MODEL)
        found |= {path: fitting[0] for path, fitting in fits.items()}
    return found


def _is_of(folder: Folder, path: str, name: str, checkpoint: Checkpoint) -> bool:
    """Whether the factors of a path have the shapes that a parameter wants."""
    A, B = (folder.tensors.get(f"{PREFIX}{path}.lora_{factor}.weight") for factor in "AB")
    shapes = [t.shape for own, t in checkpoint.tensors.items() if f".{own}".endswith(f".{name}")]
    return A is not None and B is not None and any({A.shape[-1], B.shape[0]} == {*s[-2:]} for s in shapes)


def _layer(path: str, stored: Stored, raw: bool, folder: Folder) -> Layer:
    """PEFT's layer, by its keys and the shape of its weight: a matrix as (out, in), until `_settled`."""
    shape, base = stored.shape, f"{PREFIX}{path}"
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
            refuse(place, reason, IN_THE_MODEL)
        return Layer(path, path, Layout("o" + "i" * (len(shape) - 1), shape), "conv")
    refuse(place, f"its A has the shape {tuple(A.shape)}, and {stored.name} has {shape}", ITS_BASE)


def _settled(
    layers: Mapping[str, Layer], loaded: Loaded, tensors: Mapping[str, str], folder: Folder
) -> dict[str, Layer]:
    """With what lies (in, out), as transformers' Conv1D: the factors' shapes say so, or the files of a square one."""
    flag, orientation = bool(folder.config.get("fan_in_fan_out")), Orientation.of(loaded.checkpoint)
    settled: dict[str, Layer] = {}
    for path, layer in layers.items():
        shape = layer.layout.shape
        if layer.kind not in ("linear", "parameter"):
            settled[path] = layer
            continue
        A = folder.tensors.get(layer.keys[0], folder.tensors.get(f"{PREFIX}{path}.lora_A"))
        assert A is not None
        transposed = shape[-2] == A.shape[-1] != shape[-1] and (layer.kind == "linear" or len(shape) == 3)
        if tensors[path] in loaded.parts:  # of linear layers, each of which lies (out, in)
            transposed = False
        elif shape[-2] == shape[-1] and (layer.kind == "linear" or len(shape) == 3):
            said = None if layer.kind == "parameter" else orientation.transposed(tensors[path])
            if said != flag:
                how = {True: "as (in, out)", False: "as (out, in)", None: "either way"}
                reason = f"{tensors[path]} is square {shape}: the config says {how[flag]}, the checkpoint {how[said]}"
                refuse(folder.option("fan_in_fan_out"), reason, IN_THE_MODEL)
            transposed = flag
        kind = "conv1d" if layer.kind == "linear" else layer.kind
        sides = "io" if len(shape) == 2 else "bio"
        settled[path] = replace(layer, kind=kind, layout=Layout(sides, shape)) if transposed else layer
    return settled


_WHOLE: dict[str, Any] = {"part": "", "start": 0, "shift": 0}


def _entries(folder: Folder, name: str) -> list[dict[str, Any]]:
    """The adapters of a weight that lie one after the other along the rank, where the file has our header."""
    entries = [] if folder.header is None else folder.header["adapters"]
    return [entry for entry in entries if name in entry["weights"] and "keys" not in entry]


def _adapters(
    folder: Folder, layer: Layer, sizes: _Sizes, entries: Sequence[Mapping[str, Any]], name: str
) -> tuple[list[Adapter], set[str]]:
    """A layer's adapters, and the keys they were made of."""
    config, target = folder.config, layer.target
    if config["peft_type"] == ADALORA:
        theta = layer.adalora(folder)
        rank = len(theta["singular"])
        settings = {"rank": rank, "alpha": peft_format.adalora_scale(config) * rank}
        made = [adapter_of(layer.layout, "adalora", theta, name, settings)] if rank else []
        return made, {*layer.adalora_keys.values()}
    whole = layer.decode(folder, sizes.ranks[target])
    taken, extra, kind = {*layer.keys}, {}, "lora"
    if config.get("use_dora"):
        if why := layer.why_not_dora:
            refuse(folder.option("use_dora"), why, peft_format.TRAIN)
        extra, kind = layer.sizes(folder), "dora"
        taken.add(layer.magnitude)
    made = []
    for entry in entries or [_WHOLE]:
        with boundary("its header does not describe its tensors", folder.tensor(target), "save the adapter again"):
            alpha = sizes.alphas.get(target)
            settings = dict(entry["settings"]) if "kind" in entry else _settings(folder, whole.rank, alpha, entry)
            start, stop = int(entry["start"]), int(entry["start"]) + int(settings["rank"])
            B = torch.ldexp(whole.B[..., start:stop], torch.tensor(-int(entry["shift"])))
            theta = {"A": whole.A[..., start:stop, :], "B": B, **extra}
            settings = {key: value for key, value in settings.items() if key in ("rank", "alpha", "scaling")}
            part = str(entry["part"])
            made.append(adapter_of(layer.layout, kind, theta, name, settings, role=part))
    return made, taken


def _settings(folder: Folder, rank: int, alpha: float | None, entry: Mapping[str, Any]) -> dict[str, Any]:
    """rank, alpha and scaling, as our header says or the config."""
    if "rank" in entry:
        return {"rank": int(entry["rank"]), "alpha": float(entry["alpha"]), "scaling": str(entry["scaling"])}
    assert alpha is not None, "it does not say its alpha"
    return {"rank": rank, "alpha": float(alpha), "scaling": "rslora" if folder.config.get("use_rslora") else "standard"}


# ── our own format ───────────────────────────────────────────────────────────────────────────────────────────────────


def _own(folder: Folder, checkpoint: Checkpoint, name: str) -> Iterator[Share]:
    if folder.header is None:
        refuse(str(folder.path), "the header is missing", "save the adapter again")
    entries = folder.header["adapters"]
    firsts = [entry["weights"][0] for entry in entries]
    found = fitted([*dict.fromkeys(firsts)], checkpoint, str(folder.path))
    for entry in entries:
        yield _entry(folder, entry, found[entry["weights"][0]], checkpoint, name)


def _entry(folder: Folder, entry: Mapping[str, Any], tensor: str, checkpoint: Checkpoint, name: str) -> Share:
    """An adapter by our header."""
    names, kind = entry["weights"], str(entry.get("kind", "lora"))
    stored, keys = checkpoint.tensors[tensor], entry["keys"]
    keys = dict(zip("AB", keys, strict=True)) if kind == "lora" else keys
    place = folder.tensor(next(iter(keys.values())))
    refuse_tied(stored, names, checkpoint, str(entry["role"]) == "embedding", place)
    with boundary("its header does not describe its tensors", place, "save the adapter again"):
        theta = {t: folder.tensors[key] for t, key in keys.items()}
        said = dict(entry["settings"]) if "kind" in entry else _settings(folder, 0, None, entry)
        sides = str(entry["sides"])
        assert len(sides) == len(stored.shape) and {*sides} <= {*"boi"}, f"{sides!r} are no axes of {tensor}"
        layout = Layout(sides, stored.shape)
        rows = None if entry["rows"] is None else tuple(itertools.starmap(range, entry["rows"]))
        whole = None if rows is None else tuple(itertools.chain(*rows))
        assert whole is None or (whole and max(whole) < layout.size("o")), "it has other rows"
        if kind == "full" and whole is None:  # it may stand in the weight's own shape
            layout = Layout("o" + "i" * (len(sides) - 1), stored.shape)
            theta = {"weight": _by_rows(theta["weight"], Layout(sides, stored.shape))}
        try:
            adapter = adapter_of(layout, kind, theta, name, said, whole, str(entry["role"] or entry["part"]))
        except KindError as error:
            refuse(place, f"{error.place}: {error.reason}", error.remedy, error)
    return Share(tensor, adapter)


def _by_rows(theta: torch.Tensor, layout: Layout) -> torch.Tensor:
    """θ of `full`, of features or in the weight's own shape, as the rows of its first axis."""
    weight = theta if tuple(theta.shape) == layout.shape else layout.to_weight(theta)
    return weight.reshape(layout.shape[0], -1)
