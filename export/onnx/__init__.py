"""ONNX files and their sessions."""
