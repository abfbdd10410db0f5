"""Quantized tensor formats, and groups of them that share one buffer."""
