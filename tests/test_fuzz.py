"""Damaged adapter folders, by the thousand: each is refused with the model as it was, or it means what it says.

Files with our header have a digest: no damage in what it covers may be loaded. PEFT's own files have none: what is
loaded from a damaged one must be what it says, by a reader of the format that is written here once more.

`LORA_FX_PROFILE=deep` tries 10,000 and more.
"""

from __future__ import annotations

import io
import json
import math
import os
import random
import re
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lora_fx
from lora_fx import LoraFxError, Rule
from lora_fx.export.adapters.folder import CONFIG, DIGEST, HEADER, TENSORS
from lora_fx.model.inventory import inventory
from tests import reference

FILES = 12_000 if os.environ.get("LORA_FX_PROFILE") == "deep" else 420
LIMIT = 10.0  # seconds for a file
FORMS = ("own", "peft with our header", "peft")


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.layers = nn.Embedding(6, 5), nn.ModuleList([nn.Linear(5, 5), nn.Linear(5, 5)])
        self.head = nn.Linear(5, 3)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.table(ids)
        for layer in self.layers:
            x = layer(x).tanh()
        return self.head(x)


def net() -> nn.Module:
    torch.manual_seed(0)
    return Net()


Files = tuple[bytes, bytes]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Files]:
    """The config and the tensors of an adapter in each form."""
    model = lora_fx.apply(net(), [Rule(where="head", rank=2, alpha=3), Rule(where="*", rank=2, alpha=3)])
    reference.fill(model)
    found = {}
    for form in FORMS:
        folder = tmp_path_factory.mktemp("form")
        lora_fx.save_adapter(model, folder, peft=form != "own")
        config, tensors = (folder / CONFIG).read_bytes(), (folder / TENSORS).read_bytes()
        if form == "peft":
            table, numbers = parse(tensors)
            table["__metadata__"] = {"format": "pt"}
            tensors = packed(table, numbers)
        found[form] = config, tensors
    return found


# ── the format, once more ────────────────────────────────────────────────────────────────────────────────────────────


def parse(file: bytes) -> tuple[dict[str, Any], bytes]:
    size = int.from_bytes(file[:8], "little")
    return json.loads(file[8 : 8 + size]), file[8 + size :]


def packed(table: Any, numbers: bytes) -> bytes:
    text = (table if isinstance(table, str) else json.dumps(table)).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + numbers


_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def read(file: bytes) -> dict[str, torch.Tensor]:
    table, numbers = parse(file)
    table.pop("__metadata__", None)
    found = {}
    for key, entry in table.items():
        start, stop = entry["data_offsets"]
        flat = torch.frombuffer(bytearray(numbers[start:stop]), dtype=_DTYPES[entry["dtype"]])
        found[key] = flat.reshape(entry["shape"])
    return found


def said(config: bytes, tensors: bytes) -> dict[str, tuple[torch.Tensor, torch.Tensor, float]]:
    """weight → A, B and the scale, as PEFT reads them for this model."""
    options, factors, found = json.loads(config), read(tensors), {}
    for name in ("table", "layers.0", "layers.1", "head"):
        embedding = name == "table"
        first, second = ("lora_embedding_A", "lora_embedding_B") if embedding else ("lora_A.weight", "lora_B.weight")
        A = factors.get(f"base_model.model.{name}.{first}")
        if A is None:
            continue
        B = factors[f"base_model.model.{name}.{second}"]
        rank, alpha = (
            next((v for k, v in (options.get(key) or {}).items() if re.match(rf"(.*\.)?({k})$", name)), default)
            for key, default in (("rank_pattern", options.get("r", 8)), ("alpha_pattern", options.get("lora_alpha", 8)))
        )
        found[f"{name}.weight"] = A, B, alpha / (math.sqrt(rank) if options.get("use_rslora") else rank)
    return found


def loaded(model: nn.Module) -> dict[str, tuple[torch.Tensor, torch.Tensor, float]]:
    return {
        f"{place.path}.{place.attribute}": (place.adapter.A.detach(), place.adapter.B.detach(), place.adapter.scale)
        for place in inventory(model).places
    }


def same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    """The same numbers; dtypes may differ: factors are kept in float32."""
    return a.keys() == b.keys() and all(
        all(x.shape == y.shape and torch.equal(x.float(), y.float()) for x, y in zip(a[k][:2], b[k][:2], strict=True))
        and a[k][2] == b[k][2]
        for k in a
    )


# ── damage ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def flip(data: bytes, at: random.Random) -> bytes:
    data = bytearray(data)
    for _ in range(at.choice((1, 1, 1, 2, 8))):
        data[at.randrange(len(data))] ^= 1 << at.randrange(8)
    return bytes(data)


def flip_early(data: bytes, at: random.Random) -> bytes:
    return flip(data[:40], at) + data[40:]


def cut(data: bytes, at: random.Random) -> bytes:
    return data[: at.randrange(len(data))]


def leave_out(data: bytes, at: random.Random) -> bytes:
    start = at.randrange(len(data))
    return data[:start] + data[start + at.randrange(1, 40) :]


def put_in(data: bytes, at: random.Random) -> bytes:
    start = at.randrange(len(data))
    more = at.choice((at.randbytes(at.randrange(1, 20)), b"\0", b"\xff\xfe", b"[" * 3000, b'{"a":' * 2000, b"9" * 400))
    return data[:start] + more + data[start:]


def twice(data: bytes, at: random.Random) -> bytes:
    start, stop = sorted((at.randrange(len(data)), at.randrange(len(data))))
    return data[:stop] + data[start:]


def exchange(data: bytes, at: random.Random) -> bytes:
    size = at.choice((1, 4, 20, 100, 120))
    a, b = sorted((at.randrange(len(data)), at.randrange(len(data))))
    if b - a < size:
        return flip(data, at)
    return data[:a] + data[b : b + size] + data[a + size : b] + data[a : a + size] + data[b + size :]


NUMBERS = (
    "0", "-1", "1", "3", "1e999", "-1e999", "NaN", "Infinity", "1.5", "true", "null", '"8"', "[]", "9" * 30, "9" * 400,
    "9" * 5000, "2147483648", "18446744073709551615", "1e-320",
)  # fmt: skip


def another_number(data: bytes, at: random.Random) -> bytes:
    found = list(re.finditer(rb"-?\d+(\.\d+)?", data))
    if not found:
        return flip(data, at)
    number = at.choice(found)
    return data[: number.start()] + at.choice(NUMBERS).encode() + data[number.end() :]


def another_word(data: bytes, at: random.Random) -> bytes:
    """One quoted string becomes another one of the file's, or something odd."""
    found = list(re.finditer(rb'"[^"\\]*"', data))
    if len(found) < 2:
        return flip(data, at)
    word = at.choice(found)
    odd = (b'""', b'"../../etc/passwd"', b'"/etc/passwd"', rb'"a\u0000b"', b'"__metadata__"', b'"("', b'".*"', b'"F16"')
    new = at.choice((*odd, at.choice(found)[0]))
    return data[: word.start()] + new + data[word.end() :]


def another_value(data: bytes, at: random.Random) -> bytes:
    """JSON with one entry anywhere in it changed, left out, doubled or renamed."""
    value = json.loads(data)
    places = list(_places(value))
    holder, key = at.choice(places)
    other = at.choice(places)
    change = at.randrange(5)
    if change == 0:
        holder[key] = at.choice((None, True, 0, -3, 1.5, "", "x", [], {}, [[]], {"a": 1}, 10**30, "é", [1, 2]))
    elif change == 1:
        del holder[key]
    elif change == 2:
        holder[key], other[0][other[1]] = other[0][other[1]], holder[key]
        return json.dumps(_tree(value)).encode()
    elif isinstance(holder, dict):
        holder[at.choice(("r", "use_dora", "exclude_modules", "layers_to_transform", "lora_bias", "a/b", "", "\0"))] = (
            holder[key] if change == 3 else holder.pop(key)
        )
    else:
        holder.append(holder[key])
    return json.dumps(value).encode()


def _tree(value: Any, depth: int = 0) -> Any:
    """Without a part that holds itself."""
    if depth > 8:
        return None
    if isinstance(value, dict):
        return {k: _tree(v, depth + 1) for k, v in value.items()}
    return [_tree(v, depth + 1) for v in value] if isinstance(value, list) else value


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    for key in range(len(value)) if isinstance(value, list) else list(value):
        yield value, key
        if isinstance(value[key], dict | list):
            yield from _places(value[key])


def doubled_key(data: bytes, at: random.Random) -> bytes:
    """The first key of the object once more, at its end, with another value."""
    key = re.search(rb'"[^"]*"', data)
    assert key is not None
    end = data.rindex(b"}")
    return data[:end] + b", " + key[0] + b": " + at.choice(NUMBERS).encode() + data[end:]


BYTES = (flip, flip_early, cut, leave_out, put_in, twice, exchange)
TEXT = (another_number, another_word, another_value, doubled_key)


def in_header(change: Callable[[bytes, random.Random], bytes]) -> Callable[[bytes, random.Random], bytes]:
    """A change of safetensors' JSON header, with its length set right."""

    def changed(data: bytes, at: random.Random) -> bytes:
        size = int.from_bytes(data[:8], "little")
        text = change(data[8 : 8 + size], at)
        return len(text).to_bytes(8, "little") + text + data[8 + size :]

    changed.__name__ = f"{change.__name__} in the header"
    return changed


def in_our_header(change: Callable[[bytes, random.Random], bytes]) -> Callable[[bytes, random.Random], bytes]:
    """A change of our own header. Half of them come with the digest that a forger would put beside it."""

    def changed(data: bytes, at: random.Random) -> bytes:
        from lora_fx.reading import tensors_digest

        table, numbers = parse(data)
        meta = table["__metadata__"]
        if HEADER not in meta:
            return in_header(change)(data, at)
        meta[HEADER] = change(meta[HEADER].encode(), at).decode("utf-8", "replace")
        if at.random() < 0.5:
            meta[DIGEST] = tensors_digest(meta[HEADER], io.BytesIO(data))
            meta["forged"] = "yes"
        return packed(table, numbers)

    changed.__name__ = f"{change.__name__} in our header"
    return changed


def exchange_tensors(data: bytes, at: random.Random) -> bytes:
    """Two tensors take each other's name: shapes may fit, and the numbers are all there."""
    table, numbers = parse(data)
    keys = [key for key in table if key != "__metadata__"]
    a, b = at.sample(keys, 2)
    table[a], table[b] = table[b], table[a]
    return packed(table, numbers)


def another_dtype(data: bytes, at: random.Random) -> bytes:
    table, numbers = parse(data)
    key = at.choice([key for key in table if key != "__metadata__"])
    table[key]["dtype"] = at.choice(("F16", "BF16", "F64", "I32", "F8_E4M3", "BOOL", "X9"))
    return packed(table, numbers)


TENSOR_CHANGES = (
    *BYTES, exchange_tensors, another_dtype, *(in_header(c) for c in (*TEXT, leave_out)), *map(in_our_header, TEXT),
)  # fmt: skip
CONFIG_CHANGES = (*BYTES, *TEXT, another_value, another_number)


def damaged(files: Files, others: list[Files], at: random.Random) -> tuple[str, Files]:
    """What was done, and the two files after it."""
    config, tensors = files
    kind = at.randrange(10)
    if kind == 0:
        other = at.choice(others)
        middle = at.randrange(len(tensors))
        whole = at.random() < 0.5
        return "splice", (config, other[1] if whole else tensors[:middle] + other[1][middle:])
    change = at.choice(TENSOR_CHANGES if kind < 6 else CONFIG_CHANGES)
    if kind < 6:
        return change.__name__, (config, change(tensors, at))
    return f"{change.__name__} in the config", (change(config, at), tensors)


# ── the law ──────────────────────────────────────────────────────────────────────────────────────────────────────────


class Hang(BaseException):
    pass


@contextmanager
def limited(seconds: float) -> Iterator[None]:
    def late(*_: Any) -> None:
        raise Hang

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def marks(model: nn.Module) -> list[Any]:
    return [(type(m), sorted(m.__dict__), sorted(m._modules)) for m in model.modules()]


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="the time limit needs setitimer")
@pytest.mark.parametrize("form", FORMS)
def test_a_damaged_folder_is_refused_or_means_what_it_says(
    form: str, folders: dict[str, Files], tmp_path: Path, record_property: Callable[[str, Any], None]
) -> None:
    model, original = net(), folders[form]
    state, before = reference.bits(model), marks(model)
    others = [files for name, files in folders.items() if name != form]
    good = said(*folders["peft"])
    outcomes: Counter[str] = Counter()
    for n in range(FILES // len(FORMS)):
        what, (config, tensors) = damaged(original, others, random.Random(f"{form} {n}"))
        (tmp_path / CONFIG).write_bytes(config)
        (tmp_path / TENSORS).write_bytes(tensors)
        try:
            with limited(LIMIT):
                lora_fx.load_adapter(model, tmp_path, check=False)
        except LoraFxError as error:
            assert error.reason and error.place and error.remedy, (n, what, error)
            outcomes["refused"] += 1
        except BaseException as error:
            raise AssertionError(f"{form} {n}, {what}: {type(error).__name__}: {error}") from error
        else:
            outcomes[f"loaded after {what}"] += 1
            check_meaning(form, config, tensors, original, loaded(model), good, f"{form} {n}, {what}")
            lora_fx.remove(model, *lora_fx.adapters(model))
            for parameter in model.parameters():  # apply froze them
                parameter.requires_grad_(True)
        assert marks(model) == before, (n, what)
        assert reference.same_bits(reference.bits(model), state), (n, what)
    record_property("outcomes", dict(outcomes))
    assert outcomes["refused"] > 0.6 * (FILES // len(FORMS))
    print(form, dict(outcomes))


def check_meaning(
    form: str, config: bytes, tensors: bytes, original: Files, found: dict[str, Any], good: dict[str, Any], label: str
) -> None:
    try:
        meta = parse(tensors)[0].get("__metadata__") or {}
    except ValueError:
        raise AssertionError(f"{label}: it was loaded, and its header is no JSON") from None
    if "forged" in meta:  # as good as any other file: it says what it says, in numbers that are numbers
        assert all(bool(t.isfinite().all()) for factors in found.values() for t in factors[:2]), label
    elif HEADER in meta:
        assert same(found, good), f"{label}: the digest could tell"
    else:
        assert same(found, said(config, tensors)), label
