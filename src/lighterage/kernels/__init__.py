"""Quantization kernels: they take plain tensors and numbers, and know nothing of tensor classes.

`reference` is plain torch; `triton` holds the fast launchers, and is imported only by those who ask for it.
"""
