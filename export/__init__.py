"""Trained weights -> ONNX files and a Codabench bundle, and measurements of them."""
