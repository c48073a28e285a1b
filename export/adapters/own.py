"""Our own format:   θ as it is, and a header in the tensor file that says what it is.

The header also stands in PEFT's files that we write, with what PEFT has no word for: then it says where in PEFT's
tensors each adapter lies.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from lora_fx.deltas.kinds import Space, Theta, kind_named
from lora_fx.deltas.schedules import AUTO
from lora_fx.errors import KindError
from lora_fx.export.adapters import peft as peft_format
from lora_fx.export.adapters.folder import HEADER, OWN, TENSORS, VERSION, Folder
from lora_fx.export.adapters.peft import ITS_BASE, Layer, Modules, turned
from lora_fx.export.adapters.values import BOTH, Files, Held, Saved
from lora_fx.graph.layout import Layout
from lora_fx.reading import boundary, refuse


def as_own(held: list[Held]) -> Files:
    """θ as it is; what adapters have in common once."""
    tensors: dict[str, torch.Tensor] = {}
    entries: list[dict[str, Any]] = []
    bases = {h.adapter: ".".join(filter(None, (h.weights[0], h.part))) for h in held}
    for h in held:
        keys = {tensor: f"{bases[h.adapter.owner(tensor)]}.{tensor}" for tensor in h.adapter.tensors}
        tensors |= {keys[tensor]: p for tensor, p in h.adapter.named_parameters()}
        entries.append({**h.entry(), "keys": (keys["A"], keys["B"]) if h.adapter.kind.name == "lora" else keys})
    return {"peft_type": OWN, "lora_fx_version": VERSION}, tensors, entries


def read_own(model: nn.Module, folder: Folder, header: dict[str, Any]) -> list[Saved]:
    """The adapters, by the header of the tensor file."""
    config = folder.config
    for key, value in header["config"].items():
        if config.get(key) != value:
            reason = f"it says {config.get(key)!r}, and {TENSORS} was written with {value!r}"
            refuse(folder.option(key), reason, BOTH)
    own = config["peft_type"] == OWN
    if not own:
        peft_format.check_options(folder)
    modules, place = Modules(model), folder.tensor(HEADER)
    names = [name for entry in header["adapters"] for name in entry["weights"]]
    for name in names:
        if modules.parameter(name) is None:
            near = difflib.get_close_matches(name, modules.parameters, 3)
            refuse(place, f"the model has no weight {name!r}", f"{ITS_BASE}; near: {', '.join(near) or 'none'}")
    raw = [] if own else list(config.get("target_parameters") or ())
    with boundary("its header does not describe its tensors", place, "save the adapter again"):
        whole = [entry["weights"][0] for entry in header["adapters"] if entry.get("keys") is None]
        layers = {name: modules.layer(name, raw) for name in whole}
        ranks = peft_format.ranks(folder, [layer.target for layer in layers.values()])
        try:
            return [_entry(modules, entry, layers, ranks, folder) for entry in header["adapters"]]
        except KindError as error:
            refuse(place, f"{error.place}: {error.reason}", error.remedy, error)


def _entry(
    modules: Modules, entry: dict[str, Any], layers: Mapping[str, Layer], ranks: Mapping[str, int], folder: Folder
) -> Saved:
    name, sides, kind = entry["weights"][0], str(entry["sides"]), kind_named(str(entry.get("kind", "lora")))
    parameter, keys = modules.parameter(name), entry.get("keys")
    assert parameter is not None and set(sides) <= set("boi"), f"{sides!r} are no axes of {name}"
    assert "i" not in sides or kind.adapts == "weight", f"{kind.name} on {sides!r}"
    assert "i" in sides or kind.name == "full" or kind.adapts == "bias", f"{kind.name} on {sides!r}"
    layout, settings = Layout(sides, tuple(parameter.shape)), kind.complete(_settings(entry))
    rows: tuple[int, ...] | None = None
    if keys is None:
        layer = layers[name]
        place, start, stop = folder.tensor(layer.keys[0]), int(entry["start"]), int(entry["start"]) + settings["rank"]
        if (kind.name == "dora") != bool(folder.config.get("use_dora")):  # as in a file from before there was DoRA
            reason = f"it says {folder.config.get('use_dora')!r}, and {TENSORS} was written with the kind {kind.name!r}"
            refuse(folder.option("use_dora"), reason, BOTH)
        whole = layer.decode(folder, ranks[layer.target])
        B = torch.ldexp(whole.B[..., start:stop], torch.tensor(-int(entry["shift"])))
        delta = turned(replace(whole, A=whole.A[..., start:stop, :], B=B, rank=settings["rank"]), sides)
        assert delta is not None, f"{sides!r} are no axes of {name}"
        theta = {"A": delta.A, "B": delta.B, **({} if kind.name == "lora" else layer.sizes(folder))}
    else:
        keys = dict(zip("AB", keys, strict=True)) if kind.name == "lora" else keys
        theta = {tensor: folder.tensors[key] for tensor, key in keys.items()}
        place = folder.tensor(next(iter(keys.values())))
    if entry["rows"] is not None:
        rows = tuple(_rows(entry["rows"], layout.size("o"), place))
        theta = {**theta, "B": theta["B"][..., list(rows), :]} if keys is None else theta
    space = Space(layout.batch, layout.size("o") if rows is None else len(rows), layout.size("i"), Theta(**settings))
    shapes = kind.shapes(space)
    assert theta.keys() == shapes.keys(), f"θ of the kind {kind.name!r} is {', '.join(shapes)}, not {', '.join(theta)}"
    if kind.name == "full" and rows is None and "i" not in sides and theta["weight"].shape == parameter.shape:
        theta = {"weight": theta["weight"].reshape(-1, 1)}  # as PEFT has it
    for tensor, shape in shapes.items():
        if tuple(theta[tensor].shape) != tuple(shape):
            found = tuple(theta[tensor].shape)
            refuse(place, f"{tensor} has the shape {found}, and {name} wants {tuple(shape)}", ITS_BASE)
    assert re.fullmatch(r"\w*", entry["part"]), f"{entry['part']!r} is no part"
    settings.pop("init", None)
    said = str(entry["role"]), str(entry["part"])
    return Saved(tuple(entry["weights"]), kind, theta, layout, rows, settings, place, *said)


def _settings(entry: dict[str, Any]) -> dict[str, Any]:
    if "kind" in entry:
        return dict(entry["settings"])
    return {
        "rank": int(entry["rank"]), "alpha": float(entry["alpha"]), "scaling": entry["scaling"],
        "dropout": float(entry["dropout"]), "schedule": str(entry.get("schedule", AUTO)),
    }  # fmt: skip


def _rows(ranges: list[list[int]], out: int, place: str) -> list[int]:
    rows: list[int] = []
    for start, stop in ((int(a), int(b)) for a, b in ranges):
        if not (rows[-1] + 1 if rows else 0) <= start < stop <= out:
            reason = f"its rows {start}:{stop} are no rows of {out} features"
            refuse(place, reason, ITS_BASE)
        rows += range(start, stop)
    assert rows, "it has a part of no rows"
    return rows
