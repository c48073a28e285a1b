"""Ways out of a model: adapter files, ONNX files, and the sessions that run them."""

from lora_fx.export.onnx.folding import OnnxBranch, OnnxFold, fold_onnx
from lora_fx.export.onnx.loading import onnx_digest
from lora_fx.export.onnx.sessions import Session
from lora_fx.export.onnx.switchable import save_onnx_adapter
from lora_fx.export.onnx.tasks import save_onnx_weights

__all__ = ["OnnxBranch", "OnnxFold", "Session", "fold_onnx", "onnx_digest", "save_onnx_adapter", "save_onnx_weights"]
