"""Adapters as what section 7 looks at:   δ = s·B·A   with its directions, read off the factors.

Nothing here makes δ. With thin QR, Bˢ = Q_B·R_B and Aᵀ = Q_A·R_A, δ is Q_B·(R_B·R_Aᵀ)·Q_Aᵀ, and a singular value
decomposition of the (rank, rank) matrix in the middle gives all of δ's directions (Golub and Van Loan 2013, 5.2).
"""

from __future__ import annotations

import io
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lora_fx.errors import FileError, LoraFxError
from lora_fx.export.adapters import peft as peft_format
from lora_fx.export.adapters.folder import CONFIG, OWN, PEFT, TENSORS, Folder, read_folder
from lora_fx.model.inventory import inventory
from lora_fx.reading import boundary, contents, tensor_table

_PAIR = re.compile(r"(?:base_model\.model\.)?(.+)\.lora_(?:embedding_)?A(?:\.weight)?")
_SAVED = "pass the folder of an adapter, as save_adapter and PEFT write it"


@dataclass(frozen=True)
class Directions:
    """A singular value decomposition without the directions whose values are rounding: U·diag(S)·Vᵀ."""

    U: torch.Tensor
    """(out, n), orthonormal columns; the largest value's first."""
    S: torch.Tensor
    """(n,)"""
    V: torch.Tensor
    """(in, n)"""

    @classmethod
    def of(cls, left: torch.Tensor, right: torch.Tensor) -> Directions:
        """Those of left·right, (out, r) and (r, in), of which the product is never made."""
        (Q, R), (P, T) = torch.linalg.qr(left), torch.linalg.qr(right.mT)
        u, s, vh = torch.linalg.svd(R @ T.mT)
        rounding = torch.finfo(s.dtype).eps * max(len(left), right.shape[-1])
        n = int((s > s[0] * rounding).sum())
        return cls((Q @ u)[:, :n], s[:n], (P @ vh.mT)[:, :n])

    @property
    def energy(self) -> torch.Tensor:
        """(n,): the share of ‖·‖²_F that the first 1, 2, … directions hold."""
        squares = self.S.square()
        return squares.cumsum(0) / squares.sum()

    @property
    def effective_rank(self) -> float:
        """exp of the entropy of the singular values as shares of their sum (Roy and Vetterli 2007)."""
        share = self.S / self.S.sum()
        return float((-share * share.log()).sum().exp())


@dataclass(frozen=True, eq=False)
class Factors:
    """One adapter on one weight, in float64."""

    name: str
    """Of the weight; a part or an expert of one in brackets."""
    A: torch.Tensor
    """(rank, in)"""
    B: torch.Tensor
    """(out, rank)"""
    scale: float | None
    """s; None where a file of tensors alone does not say it."""
    weight: torch.Tensor | None = None
    """W, (out, in), where it is there."""
    transposed: bool | None = False
    """The base model keeps W as (in, out); None where nobody says."""
    rows: tuple[int, ...] | None = None
    """The output features of the base model's weight that this is for; None for all."""

    def __post_init__(self) -> None:
        out, inner = self.shape
        if self.A.shape[0] != self.B.shape[1]:
            reason = f"A is {tuple(self.A.shape)} and B {tuple(self.B.shape)}: they have no rank in common"
            raise LoraFxError(reason, place=self.name, remedy=_SAVED)
        if self.rank > min(out, inner):
            reason = (
                f"its rank is {self.rank}, and a weight of {out}×{inner} has no more than {min(out, inner)} directions"
            )
            raise LoraFxError(reason, place=self.name, remedy="train it with a rank that the weight has")
        for factor, numbers in (("A", self.A), ("B", self.B)):
            if not bool(numbers.isfinite().all()):
                raise LoraFxError(f"{factor} holds NaN or Inf", place=self.name, remedy="take an earlier checkpoint")
            if not bool(numbers.any()):
                raise LoraFxError(f"{factor} is zero: it has no directions", place=self.name, remedy="train it first")

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)"""
        return self.B.shape[0], self.A.shape[1]

    @property
    def rank(self) -> int:
        return self.A.shape[0]

    @cached_property
    def delta(self) -> Directions:
        """Of s·B·A.

        Raises:
            LoraFxError: s is not known.
        """
        if self.scale is None:
            raise LoraFxError(
                "its scale alpha / rank is not known: the file has tensors alone",
                place=self.name,
                remedy=f"put its {CONFIG} beside it, and pass the folder",
            )
        return Directions.of(self.scale * self.B, self.A)

    def directions(self, of: str = "A") -> torch.Tensor:
        """(features, n): orthonormal, the largest singular value's first.

        Args:
            of: ``"A"`` (right-singular, of its input) or ``"B"`` (left-singular, of its output), as in the paper's 7.2;
                ``"in"`` or ``"out"`` for those of B·A.
        """
        if of in ("A", "B"):
            eye = torch.eye(self.rank, dtype=self.A.dtype)
            return Directions.of(eye, self.A).V if of == "A" else Directions.of(self.B, eye).U
        if of not in ("in", "out"):
            raise LoraFxError(f"of={of!r}", place=self.name, remedy="there are 'A', 'B', 'in' and 'out'")
        product = Directions.of(self.B, self.A)
        return product.V if of == "in" else product.U


def read_adapter(source: nn.Module | str | os.PathLike[str], name: str = "default") -> dict[str, Factors]:
    """Name of each adapted weight → its factors, in the order of the model or the file.

    Args:
        source: an adapted model; the folder of an adapter, in PEFT's format or lora_fx's own; or a safetensors file.
        name: the adapter's name, of a model.

    Raises:
        AdapterError: the model has no adapter of that name.
        FileError: it cannot be read.
        LoraFxError: an adapter has no factors, no directions yet, or a rank above the weight's.
    """
    if isinstance(source, nn.Module):
        return _of_model(source, name)
    path = Path(source)
    if path.is_file() and not ((path.parent / CONFIG).is_file() and path.name == TENSORS):
        return _of_pairs(str(path), read_tensors(path), None)
    folder = read_folder(path.parent if path.is_file() else path)
    with boundary("it cannot be taken apart", str(folder.path), _SAVED):
        if folder.config["peft_type"] == OWN:
            return _of_own(folder)
        if folder.config["peft_type"] != PEFT:
            reason = f"peft_type={folder.config['peft_type']!r}"
            raise FileError(reason, place=str(folder.path), remedy="load it into its model, and pass the model")
        return _of_pairs(str(folder.path), folder.tensors, folder)


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """What a safetensors file holds.

    Raises:
        FileError: it is none.
    """
    from safetensors.torch import load

    with boundary("it cannot be read", str(path), _SAVED):
        data = contents(path, _SAVED, most=None)
        tensor_table(io.BytesIO(data), str(path), _SAVED)
        return load(data)


def _of_model(model: nn.Module, name: str) -> dict[str, Factors]:
    here = inventory(model)
    here.require([name])
    found: dict[str, Factors] = {}
    seen = set()
    for place in here.places:
        adapter = place.adapter
        if adapter.name != name or adapter in seen:
            continue
        seen.add(adapter)
        if not adapter.kind.low_rank:
            raise LoraFxError(
                f"its kind {adapter.kind.name!r} has no factors", place=place.weight, remedy="section 7 is about B·A"
            )
        delta = adapter.exact().detached()
        W = adapter.matrix(place.parameter.detach())
        found |= _split(place.weight, delta.A, delta.B, float(adapter.scale), W, place.part)
    if not found:
        raise LoraFxError(
            f"the adapter {name!r} is folded into its weights", place="the model", remedy="lora_fx.unfold(model) first"
        )
    return found


def _split(
    name: str, A: torch.Tensor, B: torch.Tensor, scale: float, W: torch.Tensor | None, part: str = "", **rest: Any
) -> dict[str, Factors]:
    """An adapter of each expert along the axes in front."""
    if A.ndim == 2:
        own = f"{name}[{part}]" if part else name
        return {own: Factors(own, _wide(A), _wide(B), scale, None if W is None else _wide(W), **rest)}
    found: dict[str, Factors] = {}
    for n in range(A.shape[0]):
        own = f"{part}, {n}" if part else str(n)
        found |= _split(name, A[n], B[n], scale, None if W is None else W[n], own, **rest)
    return found


def _of_own(folder: Folder) -> dict[str, Factors]:
    found: dict[str, Factors] = {}
    assert folder.header is not None, f"{TENSORS} has no header"
    for entry in folder.header["adapters"]:
        name = entry["weights"][0]
        if "kind" in entry:
            raise LoraFxError(f"its kind {entry['kind']!r} has no factors", place=name, remedy="section 7 is about B·A")
        A, B = (folder.tensors[key] for key in entry["keys"])
        root = entry["rank"] ** (0.5 if entry["scaling"] == "rslora" else 1)
        sides = entry["sides"].replace("b", "")
        rest = {"transposed": sides.startswith("i"), "rows": _rows(entry)}
        found |= _split(name, A, B, entry["alpha"] / root, None, entry["part"], **rest)
    return found


def _of_pairs(place: str, tensors: Mapping[str, torch.Tensor], folder: Folder | None) -> dict[str, Factors]:
    """PEFT's tensors: parts of a fused weight are one adapter of all of it, unless our header says where to cut."""
    config: Mapping[str, Any] = {} if folder is None else folder.config
    if config.get("use_dora"):
        raise FileError("it is DoRA, whose delta is more than B·A", place=place, remedy="section 7 is about B·A")
    pairs = {m[1]: (key, key.replace("lora_A", "lora_B").replace("lora_embedding_A", "lora_embedding_B"))
             for key in tensors if (m := _PAIR.fullmatch(key))}  # fmt: skip
    if not pairs:
        raise FileError("it has no lora_A", place=place, remedy=_SAVED)
    ranks = None if folder is None else peft_format.ranks(folder, list(pairs))
    alphas = None if folder is None else peft_format.alphas(folder, list(pairs))
    found = {}
    for path, (a, b) in sorted(pairs.items(), key=lambda pair: _in_order(pair[0])):
        if b not in tensors:
            raise FileError(f"it has {a}, and no {b}", place=place, remedy="restore the file")
        A, B = tensors[a].flatten(1), tensors[b].flatten(1)
        scale = None
        if ranks is not None and alphas is not None:
            if ranks[path] != A.shape[0]:  # of experts PEFT lays all along the rank
                reason = f"the config says rank {ranks[path]}, and A has {A.shape[0]} rows"
                remedy = "load it into its model with lora_fx.load_adapter, and pass the model"
                raise FileError(reason, place=f"{place}, {a}", remedy=remedy)
            scale = float(alphas[path]) / A.shape[0] ** (0.5 if config.get("use_rslora") else 1)
        transposed = None if folder is None else bool(config.get("fan_in_fan_out")) or "embedding" in a
        name = f"{path}.weight"
        for entry in _entries(folder, name) or [_WHOLE]:
            own = f"{name}[{entry['part']}]" if entry["part"] else name
            start, rows = entry["start"], _rows(entry)
            along = slice(start, start + entry["rank"] if entry["rank"] else None)
            left = _wide(B[:, along]) if rows is None else _wide(B[:, along])[list(rows)]
            found[own] = Factors(own, _wide(A[along]), left, scale, None, transposed, rows)
    return found


_WHOLE: dict[str, Any] = {"part": "", "start": 0, "rank": 0, "rows": None}


def _entries(folder: Folder | None, name: str) -> list[dict[str, Any]]:
    """The adapters of a weight that lie one after the other along the rank, where the file has our header."""
    entries = [] if folder is None or folder.header is None else folder.header["adapters"]
    return [entry for entry in entries if name in entry["weights"]]


def _rows(entry: Mapping[str, Any]) -> tuple[int, ...] | None:
    return None if entry["rows"] is None else tuple(row for start, stop in entry["rows"] for row in range(start, stop))


def _in_order(path: str) -> list[tuple[int, str]]:
    """Layer 2 before layer 10: a file has no order."""
    return [(int(word), "") if word.isdigit() else (-1, word) for word in path.split(".")]


def _wide(numbers: torch.Tensor) -> torch.Tensor:
    return numbers.detach().to("cpu", torch.float64)
