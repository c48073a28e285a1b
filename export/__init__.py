"""Ways out of a model: adapter files, ONNX files, and the sessions that run them."""

from lora_fx.export.sessions import Session

__all__ = ["Session"]
