"""Imported once by the server of `tests.processes.elsewhere`: all that its processes would import and parse anew."""

from __future__ import annotations

import importlib.util
import tempfile
from pathlib import Path

import torch

import lora_fx
from tests.registry import one_registry

torch.set_num_threads(1)
if importlib.util.find_spec("onnxscript") is not None:
    one_registry()
    with tempfile.TemporaryDirectory() as folder:
        lora_fx.export_onnx(torch.nn.Linear(2, 2), torch.ones(1, 2), Path(folder) / "m.onnx")
