"""Triton kernels: each splits a matrix, quantizes every split, and writes the bulk buffers of both directions."""
