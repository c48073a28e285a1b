"""The packages of the extras `onnx` and `onnx-gpu`, and which devices their runtime computes on."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from importlib import metadata
from typing import Any

from lora_fx.errors import ExportError, essence

CPU = "CPUExecutionProvider"
GPU = ("TensorrtExecutionProvider", "CUDAExecutionProvider")

Provider = str | tuple[str, Mapping[str, Any]]
"""The name of an execution provider, or its name and its options, as ONNX Runtime takes them."""


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


def open_session(path: str, providers: Sequence[Provider] | None, options: Any = None) -> Any:
    """An `onnxruntime.InferenceSession` that runs on the providers it was asked for, or an error.

    Args:
        providers: in order of preference. None takes TensorRT, CUDA and the CPU where the build has them, and is an
            error where the build is one for GPUs and none of its GPU providers loads.

    Raises:
        ExportError: a provider that was asked for is unknown, not in this build, or did not load; or the file does not.
    """
    onnxruntime = require("onnxruntime")
    asked = [_named(provider) for provider in (_default(onnxruntime) if providers is None else providers)]
    _refuse_unknown(onnxruntime, [name for name, _ in asked])
    if any(name in GPU for name, _ in asked) and hasattr(onnxruntime, "preload_dlls"):
        onnxruntime.preload_dlls()
    try:
        session = onnxruntime.InferenceSession(path, options, providers=asked)
    except Exception as error:
        raise ExportError(
            f"ONNX Runtime does not load it: {essence(error)}",
            place=path,
            remedy="pass the path of a file that export_onnx wrote, with its .data file beside it",
        ) from error
    loaded = session.get_providers()
    missing = [name for name, _ in asked if name not in loaded]
    if missing and (providers is not None or not any(name in GPU for name in loaded)):
        raise ExportError(
            f"{', '.join(missing)} did not load: the session would run on {', '.join(loaded)}",
            place="providers",
            remedy=f"install what it needs (pip install 'lora-fx[onnx-gpu]', a driver), or ask for {CPU!r} by name",
        )
    return session


def _named(provider: Provider) -> tuple[str, dict[str, Any]]:
    return (provider, {}) if isinstance(provider, str) else (provider[0], dict(provider[1]))


def _default(onnxruntime: Any) -> list[str]:
    return [name for name in (*GPU, CPU) if name in onnxruntime.get_available_providers()]


def _refuse_unknown(onnxruntime: Any, names: Sequence[str]) -> None:
    """ONNX Runtime says this in a warning, and takes the CPU."""
    available = onnxruntime.get_available_providers()
    for name in names:
        if name not in available:
            known = name in onnxruntime.get_all_providers()
            raise ExportError(
                f"{name!r} is {'not in this build of ONNX Runtime' if known else 'no execution provider'}",
                place="providers",
                remedy=f"this build has {', '.join(available)}"
                + (
                    "; pip install 'lora-fx[onnx-gpu]' in the place of 'lora-fx[onnx]' has those for GPUs"
                    if known
                    else ""
                ),
            )
    if not names:
        raise ExportError("there is none", place="providers", remedy=f"this build has {', '.join(available)}")
