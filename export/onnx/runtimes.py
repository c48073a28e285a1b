"""The packages of the extras `onnx` and `onnx-gpu`, what they refuse, and which devices their runtime computes on."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from importlib import metadata
from typing import Any, NoReturn

from lora_fx.errors import ExportError
from lora_fx.reading import boundary

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
        reason = "onnxruntime and onnxruntime-gpu are both installed, and overwrite each other's files"
        remedy = "uninstall both with pip, then pip install 'lora-fx[onnx]' or 'lora-fx[onnx-gpu]'"
        refuse("onnxruntime", reason, remedy)
    try:
        return importlib.import_module(package)
    except ImportError as error:
        reason = f"the package {package} cannot be imported: {error}"
        refuse("export_onnx", reason, "pip install 'lora-fx[onnx]' (or 'lora-fx[onnx-gpu]')", error)


def _is_installed(distribution: str) -> bool:
    return next(iter(metadata.distributions(name=distribution)), None) is not None


def refuse(place: str, reason: str, remedy: str, cause: BaseException | None = None) -> NoReturn:
    raise ExportError(reason, place=place, remedy=remedy) from cause


def refusing(reason: str, place: str, remedy: str) -> AbstractContextManager[None]:
    """Inside, what a package raises becomes an `ExportError`: the reason, and what the package says."""
    return boundary(reason, place, remedy, ExportError)


def quiet_options() -> Any:
    """`onnxruntime.SessionOptions` without the warnings, of which one comes for every slot: it can be overridden."""
    options = require("onnxruntime").SessionOptions()
    options.log_severity_level = 3
    return options


def require_providers(names: Sequence[str]) -> None:
    """Whether they load is only known when a session opens.

    Raises:
        ExportError: there is none, or one is unknown, or not in this build of ONNX Runtime.
    """
    onnxruntime = require("onnxruntime")
    available = onnxruntime.get_available_providers()
    unknown, remedy = [name for name in names if name not in available], f"this build has {', '.join(available)}"
    if not names:
        refuse("providers", "there is none", remedy)
    if unknown and unknown[0] not in onnxruntime.get_all_providers():
        refuse("providers", f"{unknown[0]!r} is no execution provider", remedy)
    if unknown:  # of which ONNX Runtime says so in a warning, and takes the CPU
        remedy += "; pip install 'lora-fx[onnx-gpu]' in the place of 'lora-fx[onnx]' has those for GPUs"
        refuse("providers", f"{unknown[0]!r} is not in this build of ONNX Runtime", remedy)


def open_session(path: str, providers: Sequence[Provider] | None, options: Any = None) -> Any:
    """An `onnxruntime.InferenceSession` that runs on the providers it was asked for, or an error.

    Args:
        providers: in order of preference. None takes TensorRT, CUDA and the CPU where the build has them, and is an
            error where the build is one for GPUs and none of its GPU providers loads.

    Raises:
        ExportError: a provider that was asked for is unknown, not in this build, or did not load; or the file does not.
    """
    onnxruntime = require("onnxruntime")
    available = onnxruntime.get_available_providers()
    wanted = [name for name in (*GPU, CPU) if name in available] if providers is None else providers
    asked = [(p, {}) if isinstance(p, str) else (p[0], dict(p[1])) for p in wanted]
    require_providers([name for name, _ in asked])
    if any(name in GPU for name, _ in asked) and hasattr(onnxruntime, "preload_dlls"):
        onnxruntime.preload_dlls()
    remedy = "pass the path of a file that export_onnx wrote, with its .data file beside it"
    with refusing("ONNX Runtime does not load it", path, remedy):
        session = onnxruntime.InferenceSession(path, options, providers=asked)
    loaded = session.get_providers()
    missing = [name for name, _ in asked if name not in loaded]
    if missing and (providers is not None or not any(name in GPU for name in loaded)):
        remedy = f"install what it needs (pip install 'lora-fx[onnx-gpu]', a driver), or ask for {CPU!r} by name"
        reason = f"{', '.join(missing)} did not load: the session would run on {', '.join(loaded)}"
        refuse("providers", reason, remedy)
    return session
