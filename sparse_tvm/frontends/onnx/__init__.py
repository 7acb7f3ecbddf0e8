"""ONNX: files and models in memory, read, checked, simplified and written."""
