"""Hugging Face checkpoint → split ONNX graphs, without torch or transformers."""
