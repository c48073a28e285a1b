"""What was trained beside the factors, in PEFT's words:   W → W′, b → b′

| PEFT's word | what it is here |
|---|---|
| `modules_to_save`, and the heads that a task adds to it | `full` on each parameter of the module |
| `bias="all"`, `bias="lora_only"` | `full` on the bias |
| `lora_bias` | `bias`: b is moved by s·(the bias of B) |
| `trainable_token_indices` | `full` on rows of the embedding, and of a head that is tied to it |
| a base embedding in the file, of a resized vocabulary | `full` on its last rows |

PEFT copies a module that it saves whole, so that one which shares a weight has its own from then on;
`ensure_weight_tying` is its word for a copy that both read. Read off PEFT 0.21.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from lora_fx.deltas.kinds import kind_named
from lora_fx.export.adapters.folder import Folder
from lora_fx.export.adapters.peft import (
    EMBEDDINGS,
    ITS_BASE,
    PREFIX,
    Layer,
    Modules,
    embedding,
    fused,
    head,
    names_of,
    tied,
    ties_under,
)
from lora_fx.export.adapters.values import OWN_FORMAT, Held, Saved
from lora_fx.graph.layout import Layout
from lora_fx.model.inventory import plain_path, weight_name
from lora_fx.reading import refuse

KINDS = ("full", "bias")
TOKENS = "token_adapter.trainable_tokens_delta"
UNDER_TOKENS = ".token_adapter.base_layer."
"""In the key of a base weight whose rows are trained."""
RESIZED = "resized"
"""The part of an adapter on the rows that a resized vocabulary has more."""

_ORIGINAL = ".original_module."
_RESIZE = "first model.resize_token_embeddings(n), to the n rows that it was saved with"


def inside(path: str, of: str) -> bool:
    return path == of or path.startswith(f"{of}.")


# ── reading ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def whole_modules(modules: Modules, folder: Folder) -> list[str]:
    """The paths of the modules that PEFT saves whole by its config: it takes every ending, also of a word."""
    wanted, place = folder.config.get("modules_to_save") or (), folder.option("modules_to_save")
    paths = [path for path in modules.by_path if any(f"{PREFIX}{path}".endswith(end) for end in wanted)]
    for path in paths:
        outer = next((other for other in paths if other != path and inside(path, other)), None)
        if not path or outer is not None:
            reason = f"it takes {path or 'the model itself'}{f', and {outer} around it' if path else ''}"
            refuse(place, reason, "save the adapter from one that takes each module once")
        if len(names := modules.modules[modules.by_path[path]]) > 1:
            reason = f"{path} has the names {' = '.join(map(plain_path, names))}, and PEFT trains a copy for each"
            refuse(place, reason, ITS_BASE)
    return paths


def read(modules: Modules, folder: Folder, layers: Sequence[Layer], rest: dict[str, torch.Tensor]) -> list[Saved]:
    """What of the tensors that no layer has taken was trained beside them; `rest` loses it.

    Raises:
        FileError: a tensor that the config speaks of is missing, or is of another model.
    """
    reader = _Reader(modules, folder, layers, rest)
    whole, tokens, biases = [*reader.whole()], [*reader.tokens()], [*reader.biases()]
    trained = {name: {*(one.rows or ())} for one in tokens for name in one.weights}
    return [*whole, *tokens, *biases, *reader.resized(trained)]


@dataclass(frozen=True)
class _Reader:
    modules: Modules
    folder: Folder
    layers: Sequence[Layer]
    rest: dict[str, torch.Tensor]

    def whole(self) -> Iterator[Saved]:
        """Modules that are saved whole."""
        ties, tie = tied(self.modules), ties_under(self.folder) == "modules_to_save"
        for path in whole_modules(self.modules, self.folder):
            for layer in self.layers:
                if inside(layer.target, path):
                    reason = f"{layer.target} is adapted inside {path}, which is saved whole"
                    refuse(self.folder.option("modules_to_save"), reason, ITS_BASE)
            for name, tensor, trained in state(self.modules, path):
                value, place = self._taken(f"{PREFIX}{name}"), self.folder.tensor(f"{PREFIX}{name}")
                if not trained:
                    self._refuse_other(place, tensor, value)
                    continue
                again = f"{PREFIX}{path}.modules_to_save{name.removeprefix(path)}"
                if again in self.rest:  # so PEFT writes biases of such modules twice
                    self._refuse_other(self.folder.tensor(again), value, self._taken(again))
                names = ties if tie and name in ties else (name,)
                for other in names:
                    if other != name and (key := f"{PREFIX}{other}") in self.rest:
                        self._refuse_other(self.folder.tensor(key), value, self._taken(key))
                yield self._full(names, value, place)

    def tokens(self) -> Iterator[Saved]:
        """Rows of embeddings."""
        wanted, place = self.folder.config.get("trainable_token_indices"), self.folder.option("trainable_token_indices")
        if not wanted:
            return
        own = embedding(self.modules)
        if isinstance(wanted, list):
            if not own:
                refuse(place, "the model does not say which of its modules embeds tokens", ITS_BASE)
            wanted = {own.rpartition(".")[0]: wanted}
        ties = tied(self.modules)
        for end, rows in wanted.items():
            paths = [path for path in self.modules.by_path if path and f"{PREFIX}{path}".endswith(end)]
            if not paths:
                refuse(place, f"{end!r} names no module of this {type(self.modules.model).__name__}", ITS_BASE)
            for path in paths:
                name = f"{path}.weight"
                if name in ties[1:] and wanted.keys() != {end}:  # it reads what the embedding reads
                    continue
                value, names = self._taken(f"{PREFIX}{path}.{TOKENS}"), ties if name == own and ties else (name,)
                for other in names[1:]:
                    if (key := f"{PREFIX}{other.rpartition('.')[0]}.{TOKENS}") in self.rest:
                        self._refuse_other(self.folder.tensor(key), value, self._taken(key))
                yield self._rows(names, rows, value)

    def biases(self) -> Iterator[Saved]:
        """Biases of the base."""
        which = self.folder.config.get("bias") or "none"
        if which == "none":
            return
        adapted = {layer.target for layer in self.layers}
        for key in [key for key in self.rest if key.endswith(".bias") and _ORIGINAL not in key]:
            name = self._base_name(key)
            if name is None or (which == "lora_only" and name.rpartition(".")[0] not in adapted):
                continue
            yield self._full((name,), self._taken(key), self.folder.tensor(key))

    def resized(self, trained: Mapping[str, set[int]]) -> Iterator[Saved]:
        """Base weights in the file: the model's own, but for the rows that a larger vocabulary has more.

        Args:
            trained: rows that stand in the file as they were trained, of which the base's are of no use.
        """
        once: dict[str, torch.Tensor] = {}
        for key in list(self.rest):
            if _ORIGINAL in key:  # which nothing reads while its copy acts
                name: str | None = self._base_name(key.replace(_ORIGINAL, "."))
            else:
                name = self._base_name(key)
            if name is None:
                continue
            base, value = self.modules.parameter(name), self._taken(key)
            assert base is not None
            if value.shape[1:] == base.shape[1:] and len(value) != len(base) and name in self._embeddings():
                reason = f"the file has {len(value)} rows of it, of a resized vocabulary, and the model {len(base)}"
                refuse(self.folder.tensor(key), reason, _RESIZE)
            if value.shape == base.shape and torch.equal(base.detach().cpu().to(value.dtype), value):
                continue
            own = trained.get(name, set())
            rows = self._more_rows(name, base, value, own)
            if rows is None:
                reason = "the file carries a base weight, and the model's is another"
                refuse(self.folder.tensor(key), reason, "load that base weight into the model first")
            names = names_of(self.modules, name)
            if (before := once.setdefault(names[0], value)) is not value:  # one weight, under another of its names
                self._refuse_other(self.folder.tensor(key), before, value)
                continue
            under = {n.rpartition(".")[0] for n in names} & {layer.target for layer in self.layers}
            if under and self.folder.config.get("use_dora"):
                reason = f"its vocabulary was resized, and DoRA turns the weight of {', '.join(under)} as it was then"
                refuse(self.folder.tensor(key), reason, "load that base weight into the model first")
            if rows:
                yield self._rows(names, rows, value[rows], RESIZED)

    def _more_rows(self, name: str, base: torch.Tensor, value: torch.Tensor, own: set[int]) -> list[int] | None:
        """Of an embedding the last rows, which alone are others, without its own; None where it is something else."""
        if name not in self._embeddings() or value.shape != base.shape:
            return None
        return more_rows((base.detach().cpu().to(value.dtype) != value).any(dim=1), own)

    def _embeddings(self) -> tuple[str, ...]:
        return tuple(filter(None, (embedding(self.modules), head(self.modules))))

    def _base_name(self, key: str) -> str | None:
        """Of the parameter that PEFT loads the key into."""
        name = key.removeprefix(PREFIX).replace(UNDER_TOKENS, ".").replace(".base_layer.", ".")
        return name if key.startswith(PREFIX) and self.modules.parameter(name) is not None else None

    def _taken(self, key: str) -> torch.Tensor:
        if key not in self.rest:
            reason = "the key is missing"
            refuse(self.folder.tensor(key), reason, "restore the file; its config says that this was trained")
        return self.rest.pop(key)

    def _refuse_other(self, place: str, one: torch.Tensor, other: torch.Tensor) -> None:
        if one.shape != other.shape or not torch.equal(one.detach().cpu().to(other.dtype), other):
            refuse(place, "it is no parameter that trains, and the model's is another", ITS_BASE)

    def _full(self, names: tuple[str, ...], value: torch.Tensor, place: str) -> Saved:
        base = self.modules.parameter(names[0])
        assert base is not None
        self._refuse_shape(place, value, tuple(base.shape), names[0])
        layout = Layout("o" * base.ndim, tuple(base.shape))
        return Saved(names, kind_named("full"), {"weight": value.reshape(-1, 1)}, layout, None, {}, place)

    def _rows(self, names: tuple[str, ...], rows: list[int], value: torch.Tensor, part: str = "") -> Saved:
        base, place = self.modules.parameter(names[0]), self.folder.tensor(f"{PREFIX}{names[0].rpartition('.')[0]}")
        if base is None or base.ndim != 2:
            refuse(place, f"{names[0]} is no table of rows", ITS_BASE)
        if len(set(rows)) != len(rows) or not all(0 <= row < len(base) for row in rows):
            reason = f"its rows {rows[:20]} are no rows of a table of {len(base)}, each once"
            more = _RESIZE if max(rows) >= len(base) else ITS_BASE
            refuse(self.folder.option("trainable_token_indices"), reason, more)
        self._refuse_shape(f"{place}.{TOKENS}", value, (len(rows), base.shape[1]), names[0])
        order = sorted(range(len(rows)), key=rows.__getitem__)
        theta, layout = {"weight": value[order]}, Layout("oi", tuple(base.shape))
        return Saved(names, kind_named("full"), theta, layout, tuple(sorted(rows)), {}, place, part=part)

    def _refuse_shape(self, place: str, value: torch.Tensor, wanted: tuple[int, ...], name: str) -> None:
        if not wanted:
            refuse(place, f"{name} is a single number, which has no features", "set it in the model")
        if not value.is_floating_point() or tuple(value.shape) != wanted:
            refuse(place, f"it is {value.dtype} {tuple(value.shape)}, and {name} wants {wanted}", ITS_BASE)


def more_rows(other: torch.Tensor, own: set[int]) -> list[int] | None:
    """The rows that a vocabulary was given more, by which of a table are others: the last ones, and those that were
    trained for themselves, its `own`, which are left out. None where others are, or none is the base's."""
    rows = [row for row in torch.nonzero(other).flatten().tolist() if row not in own]
    if not rows:
        return []
    last = [row for row in range(rows[0], len(other)) if row not in own]
    return rows if rows == last and rows[0] > 0 else None


def shift_key(layer: Layer) -> str:
    return f"{PREFIX}{layer.path}.lora_B.bias"


def shift(folder: Folder, layer: Layer, bias: tuple[int, ...] | None, scale: float) -> Saved:
    """Of `lora_bias`: what a layer's branch adds to the bias of its base, which has this shape."""
    key = shift_key(layer)
    value, place = folder.tensors.get(key), folder.tensor(key)
    if value is None:
        refuse(place, "the key is missing", "restore the file; its config says lora_bias")
    if bias is None:
        reason = f"lora_bias: the branch has a bias, and {layer.target} has none for it to be added to"
        refuse(place, reason, "give the layer one, of zeros, before you load")
    if tuple(value.shape) != bias:
        refuse(
            place,
            f"its shape is {tuple(value.shape)}, and the bias of {layer.target} wants {bias}",
            ITS_BASE,
        )
    theta = {
        "shift": (value.double() * scale).to(value.dtype if value.dtype.itemsize >= 4 else torch.float32).reshape(-1, 1)
    }
    layout = Layout("o", bias)
    part = "" if folder.config.get("bias") in (None, "none") else "branch"  # beside that of the base
    return Saved((f"{layer.target}.bias",), kind_named("bias"), theta, layout, None, {}, place, part=part)


def state(modules: Modules, path: str) -> Iterator[tuple[str, torch.Tensor, bool]]:
    """(name, tensor, whether it is a parameter) of what the state dict of the module holds, each under every name."""
    for at, module in modules.by_path.items():
        if inside(at, path):
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    yield weight_name(at, name), parameter, True
            for name, buffer in module._buffers.items():
                if buffer is not None and name not in module._non_persistent_buffers_set:
                    yield weight_name(at, name), buffer, False


# ── writing ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Written:
    """What PEFT's config and tensors say of it, and our header of each adapter: where its θ lies."""

    options: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    entries: dict[Held, dict[str, Any]] = field(default_factory=dict)


def write(modules: Modules, held: Sequence[Held], layers: Mapping[str, Layer], scales: Mapping[str, float]) -> Written:
    """PEFT's words for adapters that are no factors.

    Args:
        layers: PEFT's layers by their targets, which have factors.
        scales: of each of them.

    Raises:
        FileError: PEFT has no word for one, or would compute something else.
    """
    writer = _Writer(modules, layers, scales, Written())
    left = list(held)
    left = writer.shifts(left)
    left = writer.tokens(left)
    left = writer.biases(left)
    writer.whole(left)
    return writer.written


@dataclass(frozen=True)
class _Writer:
    modules: Modules
    layers: Mapping[str, Layer]
    scales: Mapping[str, float]
    written: Written

    def shifts(self, held: Sequence[Held]) -> list[Held]:
        """`lora_bias`, where each layer's bias is moved: PEFT has one word for all."""
        mine = {h.weights[0].rpartition(".")[0]: h for h in held if _moves_bias(h)}
        plain = all(layer.kind in ("linear", "conv1d", "conv") for layer in self.layers.values())
        if not mine or mine.keys() != self.layers.keys() or not plain or not all(self.scales.values()):
            return list(held)
        for path, h in mine.items():
            own = h.adapter.get_parameter("shift").detach().cpu()
            value = (own.double() / self.scales[path]).to(own.dtype).flatten()
            self.written.tensors[f"{PREFIX}{path}.lora_B.bias"] = value
            self._keep(h)
        self.written.options["lora_bias"] = True
        return [h for h in held if h not in mine.values()]

    def tokens(self, held: Sequence[Held]) -> list[Held]:
        """Rows of embeddings, and the whole table of one whose vocabulary was resized."""
        left, found, ties = [], dict[str, list[int]](), tied(self.modules)
        for h in held:
            path, _, attribute = h.weights[0].rpartition(".")
            if h.adapter.kind.name != "full" or h.adapter.rows is None or h.adapter.layout.sides != "oi":
                left.append(h)
                continue
            self._refuse_ties(h, ties)
            if h.part == RESIZED:
                alike = any(o.part != RESIZED and o.adapter.rows and o.weights == h.weights for o in held)
                for name in h.weights:
                    self._put(name, self._sum(name, [h]), UNDER_TOKENS if alike else ".")
                self._keep(h)
                continue
            layered = next((t for t in self.layers if inside(t, path)), None)
            if not isinstance(self.modules.by_path[path], nn.Embedding) or layered or attribute != "weight":
                refuse(h.weights[0], "PEFT trains rows of embeddings that have no adapter beside them", OWN_FORMAT)
            self._refuse_ending(path)
            key = f"{PREFIX}{path}.{TOKENS}"
            found[path], self.written.tensors[key] = list(h.adapter.rows), h.whole
            self.written.entries[h] = {"keys": {"weight": key}}
        if found:
            self.written.options["trainable_token_indices"] = found
        return left

    def biases(self, held: Sequence[Held]) -> list[Held]:
        """Biases of layers with factors, and those that are trained without the rest of their module."""
        mine: dict[str, list[Held]] = {}
        more = {n.rpartition(".")[0] for h in held for n in h.weights if not n.endswith(".bias")}
        for h in held:
            name = h.weights[0]
            owner = name.rpartition(".")[0]
            if len(h.weights) == 1 and name.endswith(".bias") and (owner in self.layers or owner not in more):
                mine.setdefault(name, []).append(h)
        for name, own in mine.items():
            self._put(name, self._sum(name, own))
            for h in own:
                self._keep(h, name)
        if mine:
            only = all(name.rpartition(".")[0] in self.layers for name in mine)
            self.written.options["bias"] = "lora_only" if only else "all"
        return [h for h in held if not any(h in own for own in mine.values())]

    def whole(self, held: Sequence[Held]) -> None:
        """Modules with all that they hold."""
        ties = tied(self.modules)
        mine: dict[str, list[Held]] = {}
        for h in held:
            self._refuse_ties(h, ties)
            for name in h.weights:
                mine.setdefault(name, []).append(h)
        paths = dict.fromkeys(name.rpartition(".")[0] for name in mine)
        for path in paths:
            self._refuse_module(path, next(name for name in mine if name.rpartition(".")[0] == path), paths)
        for path in paths:
            for name, tensor, _ in state(self.modules, path):
                value = self._sum(name, mine[name]) if name in mine else tensor.detach().cpu().clone()
                self.written.tensors[f"{PREFIX}{name}"] = value
        for h in held:
            self._keep(h, h.weights[0])
        if paths:
            tie = [h for h in held if len(h.weights) > 1]
            heads = {name.rpartition(".")[0] for h in tie for name in h.weights[1:]}
            saved = [path for path in paths if path not in heads]
            self.written.options["modules_to_save"] = saved
            if tie and not any(path.rpartition(".")[2] in EMBEDDINGS for path in saved):
                reason = f"PEFT ties what trains whole where it is called {' or '.join(EMBEDDINGS)}"
                refuse(" = ".join(tie[0].weights), reason, OWN_FORMAT)
            if tie:
                self.written.options["ensure_weight_tying"] = True

    def _put(self, name: str, value: torch.Tensor, between: str = ".") -> None:
        """In the place of a parameter of the base."""
        owner, _, attribute = name.rpartition(".")
        layer = self.layers.get(owner)
        around = next((t for t in self.layers if owner != t and inside(owner, t)), None)
        if around is not None or (layer is not None and layer.kind in ("attention", "parameter")):
            refuse(name, f"PEFT's layer around {around or owner} has no word for it", OWN_FORMAT)
        between = ".base_layer." if layer is not None else between
        self.written.tensors[f"{PREFIX}{owner}{between}{attribute}"] = value

    def _keep(self, h: Held, name: str = "") -> None:
        """θ itself, unless it stands in PEFT's tensor of this name."""
        if name and h.adapter.kind.name == "full" and h.adapter.rows is None:
            own = [key for key in self.written.tensors if key.replace(".base_layer.", ".") == f"{PREFIX}{name}"]
            self.written.entries[h] = {"keys": {"weight": own[0]}, "sides": "o" * len(h.adapter.layout.shape)}
            return
        base = ".".join(filter(None, ("lora_fx", h.weights[0], h.part)))
        keys = {tensor: f"{base}.{tensor}" for tensor, _ in h.adapter.named_parameters()}
        self.written.tensors.update({keys[t]: p.detach().cpu() for t, p in h.adapter.named_parameters()})
        self.written.entries[h] = {"keys": keys}

    def _sum(self, name: str, held: Sequence[Held]) -> torch.Tensor:
        """The weight with their deltas; of one that was trained as it is, that."""
        first = held[0].adapter
        if len(held) == 1 and first.kind.name == "full" and first.rows is None:
            return held[0].whole
        base = self.modules.parameter(name)
        assert base is not None
        with torch.no_grad():
            return sum((h.adapter.delta(base) for h in held), base.to(first.dtype)).cpu()

    def _refuse_ties(self, h: Held, ties: Sequence[str]) -> None:
        """One adapter for several modules: PEFT has it where a model of transformers' ties them to its embedding."""
        if len(h.weights) > 1 and set(h.weights) != set(ties):
            reason = f"it has the names {' = '.join(h.weights)}, and PEFT trains a copy for each module"
            refuse(h.weights[0], reason, OWN_FORMAT)
        if len(h.weights) == 1 and h.weights[0] in ties[:1] and h.adapter.rows is not None:
            refuse(h.weights[0], f"PEFT trains the same rows of {', '.join(ties[1:])}", OWN_FORMAT)

    def _refuse_module(self, path: str, name: str, together: Mapping[str, None]) -> None:
        module = self.modules.by_path[path]
        forbidden = nn.ModuleDict | nn.ModuleList | nn.ParameterDict | nn.ParameterList
        layer = next((t for t in self.layers if inside(t, path) or inside(path, t)), None)
        outer = next((p for p in together if p != path and inside(path, p)), None)
        if not path:
            refuse(name, "the model itself holds it, and PEFT saves modules inside the model", OWN_FORMAT)
        if isinstance(module, forbidden):
            refuse(name, f"PEFT saves no {type(module).__name__} whole", OWN_FORMAT)
        if len(paths := self.modules.modules[module]) > 1:
            reason = f"its module has the names {' = '.join(map(plain_path, paths))}, and PEFT trains a copy for each"
            refuse(name, reason, OWN_FORMAT)
        if layer is not None:
            refuse(name, f"PEFT saves {path} whole, and adapts {layer} there", OWN_FORMAT)
        if outer is not None:
            refuse(name, f"PEFT saves {outer} whole, which it is inside of", OWN_FORMAT)
        if why := fused(self.modules, path):
            refuse(name, why, OWN_FORMAT)
        self._refuse_ending(path)

    def _refuse_ending(self, path: str) -> None:
        """PEFT takes every module whose path ends so, and keeps from adapting what its pattern of it matches."""
        other = next((p for p in self.modules.by_path if p != path and p.endswith(path)), None)
        if other is not None:
            refuse(path, f"PEFT would take {other} too: it ends in the same words", OWN_FORMAT)
        if not re.fullmatch(r"[\w.]+", path):
            refuse(path, "PEFT takes its name for a pattern", OWN_FORMAT)
        lost = next((t for t in self.layers if re.match(rf"(^|.*\.){path}($|\..*)", t)), None)
        if lost is not None:
            refuse(path, f"PEFT would not adapt {lost}, where the words of {path} occur", OWN_FORMAT)


def _moves_bias(h: Held) -> bool:
    whole = h.adapter.kind.name == "bias" and h.adapter.rows is None
    return whole and len(h.weights) == 1 and h.weights[0].endswith(".bias")
