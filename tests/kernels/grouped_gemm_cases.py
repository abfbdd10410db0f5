"""Operands of grouped products in bulk buffers, and the products expert by expert that the kernels are held against."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from lighterage.formats import Float8BlockQuantizer, split_quantize
from lighterage.formats.split_tensors import SplitTensors
from lighterage.kernels.reference.grouped_gemm import block_scaled_product
from tests.kernels.triton_cases import DEVICE, ends_of

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2


@dataclass(frozen=True, kw_only=True)
class Case:
    """A group of experts: x (M, K), dy (M, N) and w (E, N, K), quantized both ways."""

    splits: Sequence[int]
    in_features: int
    out_features: int
    x_dtype: torch.dtype = E4M3
    dy_dtype: torch.dtype = E4M3
    w_block_2d: bool = True
    power_of_2: bool = True

    @property
    def ends(self) -> torch.Tensor:
        return ends_of(self.splits)

    def quantized(self, num_cols: int, fp8_dtype: torch.dtype, seed: int) -> SplitTensors:
        x = spread(sum(self.splits), num_cols, seed)
        quantizer = Float8BlockQuantizer(fp8_dtype=fp8_dtype, power_of_2_scale=self.power_of_2)
        return split_quantize(x, self.splits, [quantizer] * len(self.splits))[0]

    def x(self) -> SplitTensors:
        return self.quantized(self.in_features, self.x_dtype, 1)

    def dy(self) -> SplitTensors:
        return self.quantized(self.out_features, self.dy_dtype, 2)

    def w(self) -> SplitTensors:
        num_experts, rows = len(self.splits), self.out_features
        quantizer = Float8BlockQuantizer(
            block_scaling_dim=2 if self.w_block_2d else 1, power_of_2_scale=self.power_of_2
        )
        w = spread(num_experts * rows, self.in_features, 3)
        return split_quantize(w, [rows] * num_experts, [quantizer] * num_experts)[0]


def spread(num_rows: int, num_cols: int, seed: int) -> torch.Tensor:
    """bf16 values whose 1x16 runs differ in magnitude, so that a scale of the wrong tile shows."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(num_rows, num_cols, generator=generator)
    exponents = torch.randint(-6, 6, (math.ceil(num_rows / 16), math.ceil(num_cols / 16)), generator=generator)
    x *= torch.exp2(exponents.float()).repeat_interleave(16, 0)[:num_rows].repeat_interleave(16, 1)[:, :num_cols]
    return x.bfloat16().to(DEVICE)


def expected(
    a: SplitTensors, b: SplitTensors, directions: tuple[str, str], out_dtype: torch.dtype
) -> list[torch.Tensor]:
    """The reference's product of every pair of members."""
    products = []
    for a_member, b_member in zip(a, b, strict=True):
        fields = [
            getattr(member, f"{direction}_{name}")
            for member, direction in ((a_member, directions[0]), (b_member, directions[1]))
            for name in ("data", "scale_inv")
        ]
        products.append(
            block_scaled_product(
                *fields,
                a_dtype=a_member.fp8_dtype,
                b_dtype=b_member.fp8_dtype,
                b_block_2d=b_member.block_scaling_dim == 2,
                out_dtype=out_dtype,
            )
        )
    return products


def slab_oracle(
    a: SplitTensors, b: SplitTensors, directions: tuple[str, str], out_dtype: torch.dtype
) -> list[torch.Tensor]:
    """What the hardware computes, from one-slab products of `torch._scaled_mm` without fast accumulation: exact.

    Source: Transformer Engine tests/pytorch/references/blockwise_fp8_gemm_reference.py, which meets cuBLAS bit for bit.
    """
    one = torch.ones((), device=DEVICE)
    products = []
    for a_member, b_member in zip(a, b, strict=True):
        a_codes, a_scale = _codes(a_member, directions[0])
        b_codes, b_scale = _codes(b_member, directions[1])
        y = torch.zeros(a_codes.shape[0], b_codes.shape[0], device=DEVICE)
        for slab in range(a_scale.shape[0] if y.numel() else 0):
            cols = slice(slab * 128, slab * 128 + 128)
            part = torch._scaled_mm(
                a_codes[:, cols].contiguous(),
                b_codes[:, cols].contiguous().t(),
                scale_a=one,
                scale_b=one,
                out_dtype=torch.float32,
                use_fast_accum=False,
            )
            scaled = (part * a_scale[slab, :, None]).double()
            y = torch.addcmul(y.double(), scaled, b_scale[slab].double()).float()
        products.append(y.to(out_dtype))
    return products


def _codes(member: torch.Tensor, direction: str) -> tuple[torch.Tensor, torch.Tensor]:
    """FP8 (rows, depth), and the scale of every (slab, row)."""
    codes = getattr(member, f"{direction}_data").view(member.fp8_dtype)
    scale = getattr(member, f"{direction}_scale_inv")
    num_slabs = -(-codes.shape[1] // 128)
    if member.block_scaling_dim == 2:
        scale = scale[:, :num_slabs].t().repeat_interleave(128, 1)
    return codes, scale[:num_slabs, : codes.shape[0]]


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    """Norm of the difference over the norm of what is wanted; 0 if both are empty."""
    norm = float(want.double().norm())
    difference = float((got.double() - want.double()).norm())
    return difference / norm if norm else difference
