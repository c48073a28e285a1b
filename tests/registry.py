"""One registry of ONNX functions for all exports of a process."""

from __future__ import annotations

import functools
import importlib.util


@functools.cache
def one_registry() -> None:
    """torch parses its 500 ONNX functions anew for each export: here once."""
    if importlib.util.find_spec("onnxscript") is None:
        return
    from torch.onnx._internal.exporter._registration import ONNXRegistry

    ONNXRegistry.from_torchlib = staticmethod(functools.cache(ONNXRegistry.from_torchlib))  # type: ignore[assignment]
