"""Inputs that quantization gets wrong first: mixed magnitudes, subnormals, huge values, zeros, NaN and Inf."""

from __future__ import annotations

import torch

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
KINDS = ("random", "wide", "subnormal", "huge", "zero", "nan", "inf", "sparse")


def make_input(kind: str, num_rows: int, num_cols: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """(num_rows, num_cols) of the kind called `kind`; all finite in `dtype` unless the kind says otherwise."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(num_rows, num_cols, generator=generator)
    info = torch.finfo(dtype)
    if kind == "wide":
        x = x * torch.exp2(torch.randint(-12, 12, x.shape, generator=generator).float())
    elif kind == "subnormal":
        x = x * info.tiny
    elif kind == "huge":
        x = (x.double() * info.max).clamp(info.min, info.max).float()
    elif kind == "zero":
        x = x * 0
    elif kind in ("nan", "inf"):
        place = torch.rand(x.shape, generator=generator) < 0.02
        x = torch.where(place, x.sign() * float(kind), x)
    elif kind == "sparse":
        x = torch.where(torch.rand(x.shape, generator=generator) < 0.9, torch.zeros(()), x)
    return x.to(dtype)
