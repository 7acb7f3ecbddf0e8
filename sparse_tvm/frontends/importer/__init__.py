"""From ONNX to Relax: the one way that every source's model takes."""
