"""A pickle of tensors, opened by torch's reader of weights alone: no code in it runs.

What `torch.save` has written since torch 1.6 is a zip file of the pickle and of the numbers, as they are. One that is
compressed, whose sums are not right, or that holds anything but tensors by name, is refused before or after.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Mapping

import torch

from lora_fx.reading import ROWS, TEXT, boundary, refuse

_REMEDY = "save the adapter as safetensors, where you trust it"


def unpickled(data: bytes, place: str) -> dict[str, torch.Tensor]:
    """Tensors by name, each with numbers of its own in memory.

    Raises:
        FileError: it is no such file, or is damaged.
    """
    if not zipfile.is_zipfile(io.BytesIO(data)):
        refuse(place, "it is no file that torch.save has written since torch 1.6", _REMEDY)
    with boundary("it cannot be read", place, _REMEDY):
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            entries = archive.infolist()
            large = any(entry.file_size > TEXT for entry in entries if entry.filename.endswith(".pkl"))
            if large or len(entries) > ROWS or any(entry.compress_type for entry in entries):
                refuse(place, "it is compressed, or its pickle is larger than a table of tensors can be", _REMEDY)
            if (damaged := archive.testzip()) is not None:
                refuse(place, f"{damaged} in it is damaged", "restore the file")
        found = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    if isinstance(found, Mapping) and len(found) == 1 and isinstance(inner := next(iter(found.values())), Mapping):
        found = inner  # as {"state_dict": …}
    if not isinstance(found, Mapping):
        refuse(place, f"it holds a {type(found).__name__}, and no tensors by name", _REMEDY)
    for key, value in found.items():
        if not isinstance(key, str) or not isinstance(value, torch.Tensor):
            refuse(place, f"{str(key)[:200]} in it is a {type(value).__name__}, and no tensor", _REMEDY)
        if value.layout != torch.strided or value.device.type != "cpu" or not _has_its_numbers(value):
            refuse(f"{place}, {key[:200]}", "its numbers do not lie in the file one after the other", _REMEDY)
    return {key: value.detach() for key, value in found.items()}


def _has_its_numbers(tensor: torch.Tensor) -> bool:
    """It is no view that is larger than what is stored."""
    return tensor.numel() * tensor.element_size() <= tensor.untyped_storage().nbytes()
