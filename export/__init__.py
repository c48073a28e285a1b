"""Ways out of a model: adapter files, ONNX files, and the sessions that run them."""

from lora_fx.export.onnx_folding import OnnxFold, fold_onnx
from lora_fx.export.onnx_switchable import save_onnx_adapter
from lora_fx.export.onnx_tasks import save_onnx_weights
from lora_fx.export.sessions import Session

__all__ = ["OnnxFold", "Session", "fold_onnx", "save_onnx_adapter", "save_onnx_weights"]
