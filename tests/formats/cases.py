"""One quantizer of every kind, and inputs that all of them take, for tests that must hold for every format."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from lighterage import formats

Make = Callable[..., object]
E5M2 = torch.float8_e5m2

BULK: dict[str, Make] = {
    "fp8_block": formats.Float8BlockQuantizer,
    "fp8_block_2d": lambda **usage: formats.Float8BlockQuantizer(block_scaling_dim=2, **usage),
    "fp8_block_fp32_e5m2": lambda **usage: formats.Float8BlockQuantizer(
        power_of_2_scale=False, fp8_dtype=E5M2, amax_epsilon=1e-4, **usage
    ),
    "mxfp8": formats.MXFP8Quantizer,
    "nvfp4": formats.NVFP4Quantizer,
    "nvfp4_rht": lambda **usage: formats.NVFP4Quantizer(with_rht=True, **usage),
    "nvfp4_2d": lambda **usage: formats.NVFP4Quantizer(with_2d_quantization=True, **usage),
}
ALL: dict[str, Make] = {**BULK, "fp8_tensor": formats.Float8CurrentScalingQuantizer}


def bytes_equal(a: torch.Tensor | None, b: torch.Tensor | None) -> bool:
    """Same shape, dtype and bits; None equals None."""
    if a is None or b is None:
        return a is b
    same = a.shape == b.shape and a.dtype == b.dtype
    return same and torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def same_codes(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Two quantized tensors of one class, with the same fields there and the same bits in them."""
    return (
        type(a) is type(b)
        and a.shape == b.shape
        and a.dtype == b.dtype
        and all(bytes_equal(getattr(a, name), getattr(b, name)) for name in type(a).FIELDS)  # type: ignore[attr-defined]
    )


@contextmanager
def no_waiting() -> Iterator[None]:
    """Any operation that makes the host wait for the device is an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch says that it may miss some
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")
