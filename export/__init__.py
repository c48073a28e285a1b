"""Files that leave the house: adapters and ONNX graphs."""
