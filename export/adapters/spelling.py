"""Other spellings of PEFT's keys:   `module.q.lora_A.default.weight`   →   `base_model.model.q.lora_A.weight`

Names of wrappers, a prefix that is missing or doubled, and the name of the adapter, which stands in the keys of a model
in memory and not in those of a file. A spelling is read where what it names is there; two entries that come out as one
are refused.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator
from dataclasses import replace

import torch

from lora_fx.export.adapters.folder import Folder
from lora_fx.export.adapters.names import Names
from lora_fx.export.adapters.peft import PREFIX
from lora_fx.model.inventory import plain_path
from lora_fx.reading import refuse

_AROUND = (PREFIX, "module.", "base_model.")
_SITE = re.compile(r"\.(?:lora_|token_adapter\.|modules_to_save\.|ranknum)")

#: what stands before the name of the adapter, and after it
_NAMED = (
    re.compile(r"(.*\.lora_[AB])\.(?!weight$|bias$)([^.]+)(\.(?:weight|bias))"),
    re.compile(r"(.*\.lora_(?:embedding_[AB]|E|[AB]))\.(?!weight$|bias$)([^.]+)()"),
    re.compile(r"(.*\.lora_magnitude_vector)\.(?!weight$)([^.]+)(?:\.weight)?()"),
    re.compile(r"(.*\.trainable_tokens_delta)\.([^.]+)()"),
)


def respelled(there: Names, folder: Folder) -> Folder:
    """The folder with the keys that PEFT writes."""
    names = set[str]()
    tensors: dict[str, torch.Tensor] = {}
    spelled: dict[str, str] = {}
    for key, tensor in folder.tensors.items():
        own = _in_place(there, key, names)
        if own in tensors and not (_is_copy(key, spelled[own]) and torch.equal(tensors[own], tensor)):
            reason = f"it and {folder.spelled.get(spelled[own], spelled[own])} are two entries for one weight"
            refuse(folder.tensor(key), reason, "leave one of them out of the file")
        tensors[own], spelled[own] = tensor, key
    if len(names) > 1:
        reason = f"it holds the adapters {', '.join(sorted(names))}"
        refuse(str(folder.path), reason, "save each in a folder of its own, as PEFT's save_pretrained does")
    given = {own: folder.spelled.get(key, key) for own, key in spelled.items() if own != folder.spelled.get(key, key)}
    return replace(folder, tensors=tensors, spelled=given)


def nearest(key: str, known: list[str]) -> str:
    """What is called almost so, in words."""
    near = difflib.get_close_matches(key, known[:2_000], 3, 0.5)
    return ", ".join(near) or "none"


def _in_place(there: Names, key: str, names: set[str]) -> str:
    """PEFT's key for this one; itself where nothing that it may name is there."""
    plain = plain_path(key)
    own = next((c for c in _candidates(plain) if _is_there(there, c)), None)
    if own is None:
        return key
    for pattern in _NAMED:
        if found := pattern.fullmatch(own):
            names.add(found[2])
            own = found[1] + found[3]
    own = own.removesuffix(".weight") if own.endswith(".lora_magnitude_vector.weight") else own
    before, _, after = own.partition(".modules_to_save.")
    if after:
        name, _, rest = after.partition(".")
        named = f"{before}.{after}".rpartition(".")[0] not in there.by_path
        own = f"{before}.{rest if named else after}"
        names |= {name} if named else set()
    return PREFIX + own


def _candidates(key: str) -> Iterator[str]:
    """Without PEFT's prefix, and without more and more of what may stand around the model."""
    yield key.removeprefix(PREFIX)
    yield key
    while around := next((word for word in _AROUND if key.startswith(word)), ""):
        key = key.removeprefix(around)
        yield key


def _is_there(there: Names, key: str) -> bool:
    path = _SITE.split(key)[0] if _SITE.search(key) else key.rpartition(".")[0]
    while path.endswith(".base_layer"):
        path = path.removesuffix(".base_layer")
    path = path.replace(".base_layer.", ".").replace(".original_module", "")
    return bool(path) and path in there.by_path


def _is_copy(*keys: str) -> bool:
    """PEFT writes biases of a module that it saves whole twice."""
    return sum(".modules_to_save." in key for key in keys) == 1
