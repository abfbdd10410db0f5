"""Plain-torch quantization: slow, exact, on any device; the oracle that faster kernels are held to, bit for bit."""

from lighterage.kernels.reference import casts, fp8_block, fp8_tensor, mxfp8, nvfp4

__all__ = ["casts", "fp8_block", "fp8_tensor", "mxfp8", "nvfp4"]
