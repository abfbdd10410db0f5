"""The backend "torch" for FP8 blocks: `scaled_mm` for each expert, whose rows the host must know.

Note [Views without members]
A loop over experts is as fast as the host makes its operands. Members of a group are wrapper tensors, and a pair of
them costs the host more than the device takes for its product. So the codes and scales of each expert are cut out of
the bulk buffers, a view each, at places that are worked out once for a layout.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

import torch

from lighterage.formats.layout import BulkLayout
from lighterage.formats.split_tensors import SplitTensors
from lighterage.ops.gemm_operands import Direction, bulk_buffer, check_aligned, fp8_dtype_of, quantized

if TYPE_CHECKING:
    from lighterage.formats.splits import Splits
    from lighterage.ops.gemm_operands import Operand

_TILE_1x128, _BLOCK_128x128 = 4, 5  # of torch.nn.functional.ScalingType
_scaled_mm = torch._scaled_mm_v2  # has an `out`, which torch.nn.functional.scaled_mm has not


@dataclass(frozen=True)
class ScaledMMBackend:
    """`torch.nn.functional.scaled_mm` for each expert."""

    name: str = "torch"

    def forward(
        self, x: Operand, w: Operand, splits: Splits, *, out_dtype: torch.dtype, bias: torch.Tensor | None
    ) -> torch.Tensor:
        """See `grouped_forward`."""
        return _rows(x, w, splits, ("x", "rowwise"), out_dtype, bias)

    def dgrad(self, dy: Operand, w: Operand, splits: Splits, *, out_dtype: torch.dtype) -> torch.Tensor:
        """See `grouped_dgrad`."""
        return _rows(dy, w, splits, ("dy", "columnwise"), out_dtype, None)

    def wgrad(self, dy: Operand, x: Operand, splits: Splits, *, out_dtype: torch.dtype) -> torch.Tensor:
        """See `grouped_wgrad`."""
        dy, x = quantized(dy, "dy", "columnwise"), quantized(x, "x", "columnwise")
        check_aligned(splits, 16, "scaled_mm")
        out = torch.empty(splits.num_splits, dy.num_cols, x.num_cols, dtype=out_dtype, device=splits.device)
        operands = zip(_Matrices(dy, "dy", "columnwise"), _Matrices(x, "x", "columnwise", second=True), strict=True)
        for (a, b), product, size in zip(operands, out.unbind(0), splits.sizes, strict=True):
            if size:
                _multiply(a, b, product)
            else:
                product.zero_()
        return out


def _rows(
    x: Operand,
    w: Operand,
    splits: Splits,
    which: tuple[str, Direction],
    out_dtype: torch.dtype,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    role, w_direction = which
    x, w = quantized(x, role, "rowwise"), quantized(w, "w", w_direction)
    check_aligned(splits, 16, "scaled_mm")
    out_features = w.splits.num_rows // splits.num_splits if w_direction == "rowwise" else w.num_cols
    sizes = splits.sizes
    out = torch.empty(splits.num_rows, out_features, dtype=out_dtype, device=splits.device)
    operands = zip(_Matrices(x, role, "rowwise"), _Matrices(w, "w", w_direction, second=True), strict=True)
    for expert, ((a, b), rows) in enumerate(zip(operands, out[: sum(sizes)].split(sizes), strict=True)):
        if not sizes[expert]:
            continue
        if bias is None:
            _multiply(a, b, rows)
        else:
            y = torch.empty_like(rows, dtype=torch.float32)
            _multiply(a, b, y)
            rows.copy_(y.add_(bias[expert].float()))
    out[sum(sizes) :].zero_()
    return out


class _Matrix(NamedTuple):
    """One operand of one expert."""

    codes: torch.Tensor
    """FP8 (rows, depth), or (depth, rows) of a second operand."""
    scale: torch.Tensor
    """float32, as `scaled_mm` takes it: (rows, slabs) of 1x128 scales, (slabs, blocks of rows) of 128x128 ones."""
    recipe: int


class _Matrices:
    """The codes and scales of every expert of a group in one direction: note [Views without members]."""

    def __init__(self, operand: SplitTensors, role: str, direction: Direction, *, second: bool = False) -> None:
        fp8_dtype = fp8_dtype_of(operand)
        if fp8_dtype != torch.float8_e4m3fn:
            raise ValueError(
                f"scaled_mm multiplies block-scaled operands in E4M3 only; {role} is E5M2. Pass backend='triton', or "
                "quantize with fp8_dtype=torch.float8_e4m3fn."
            )
        buffer = bulk_buffer(operand, role, direction)
        self._codes = buffer.view(fp8_dtype)
        self._scales = buffer[: buffer.numel() // 4 * 4].view(torch.float32)
        self._recipe = _BLOCK_128x128 if operand.block_2d else _TILE_1x128
        self._places = _places(operand.group.layout(direction), second)

    def __iter__(self) -> Iterator[_Matrix]:
        codes, scales, recipe = self._codes, self._scales, self._recipe
        # Strided views count from the start of the storage, of which the buffer may be a part.
        first_code, first_scale = codes.storage_offset(), scales.storage_offset()
        for place in self._places:
            yield _Matrix(
                codes.as_strided(place.size, place.stride, first_code + place.offset),
                scales.as_strided(place.scale_size, place.scale_stride, first_scale + place.scale_offset),
                recipe,
            )


class _Place(NamedTuple):
    """Where one expert's operand lies: sizes, strides and offsets of two views, in elements."""

    size: tuple[int, int]
    stride: tuple[int, int]
    offset: int
    scale_size: tuple[int, int]
    scale_stride: tuple[int, int]
    scale_offset: int


@lru_cache(maxsize=256)
def _places(layout: BulkLayout, second: bool) -> tuple[_Place, ...]:
    places = []
    for views in layout:
        data, scale = views["data"], views["scale_inv"]
        num_cols = layout.row_shape[-1]
        num_rows = data.num_bytes // num_cols if num_cols else 0
        rows, depth = (num_cols, num_rows) if layout.columnwise else (num_rows, num_cols)
        num_slabs, padded = scale.shape
        places.append(
            _Place(
                size=(depth, rows) if second else (rows, depth),
                stride=(1, depth) if second else (depth, 1),
                offset=data.offset,
                scale_size=(padded, num_slabs) if layout.block_2d else (rows, num_slabs),
                scale_stride=(1, padded),
                scale_offset=scale.offset // 4,
            )
        )
    return tuple(places)


def _multiply(a: _Matrix, b: _Matrix, out: torch.Tensor) -> None:
    """`out` = a @ b.T."""
    _scaled_mm(a.codes, b.codes, [a.scale], [a.recipe], [], [b.scale], [b.recipe], [], None, out.dtype, out=out)
