"""Graphs of standard operators alone, traced from transformers: the path that needs torch."""
