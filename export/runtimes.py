"""The packages of the extras `onnx` and `onnx-gpu`, and which devices their runtime computes on."""

from __future__ import annotations

import importlib
from importlib import metadata
from typing import Any

from lora_fx.errors import ExportError


def require(package: str) -> Any:
    """The package, of one of the two extras.

    Raises:
        ExportError: it is missing, or both runtimes are installed: they are one import name, and whichever was
            installed last has overwritten the other.
    """
    if package == "onnxruntime" and all(map(_is_installed, ("onnxruntime", "onnxruntime-gpu"))):
        raise ExportError(
            "onnxruntime and onnxruntime-gpu are both installed, and overwrite each other's files",
            place="onnxruntime",
            remedy="uninstall both with pip, then pip install 'lora-fx[onnx]' or 'lora-fx[onnx-gpu]'",
        )
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ExportError(
            f"the package {package} cannot be imported: {error}",
            place="export_onnx",
            remedy="pip install 'lora-fx[onnx]' (or 'lora-fx[onnx-gpu]')",
        ) from error


def _is_installed(distribution: str) -> bool:
    try:
        metadata.distribution(distribution)
    except metadata.PackageNotFoundError:
        return False
    return True
