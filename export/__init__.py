"""Trained weights -> ONNX, and what is measured on the result."""
