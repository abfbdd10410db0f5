"""What each format keeps of one split, as data: the name, dtype, shape and alignment of every tensor. Pure Python.

Shape letters: M rows of one split (its leading dimensions flattened), K the last dimension.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, reduce
from math import prod
from operator import or_
from typing import Literal

FormatName = Literal["fp8_block", "mxfp8", "nvfp4"]
BASE_ALIGNMENT = 256  # bytes: of the buffer's start and of every split's data
SMALL_ALIGNMENT = 16  # bytes: of every scale matrix and amax


def round_up(value: int, multiple: int) -> int:
    """The smallest multiple of `multiple` that is at least `value`."""
    return -(-value // multiple) * multiple


class SplitRows:
    """The rows of every split, and the sums over them that both directions of a group need.

    Counting bytes is the host's hot path: everything that aligned splits allow is plain arithmetic, and the rest is
    counted once.
    """

    __slots__ = ("_num_units", "bits", "rows", "splits", "total")

    def __init__(self, splits: tuple[int, ...], rows_per_split: int) -> None:
        self.splits = splits
        self.rows = splits if rows_per_split == 1 else tuple([split * rows_per_split for split in splits])
        self.bits = reduce(or_, self.rows, 0)
        """All rows or-ed together: negative if any is, and divisible by a power of two if all are."""
        self.total = sum(self.rows)
        self._num_units: dict[int, int] = {}

    def __eq__(self, other: object) -> bool:
        return isinstance(other, SplitRows) and self.splits == other.splits and self.rows == other.rows

    def __hash__(self) -> int:
        return hash(self.rows)

    def num_units(self, rows_per_unit: int) -> int:
        """Units of all splits, each split's last one counted whole. `rows_per_unit`: a power of two."""
        if self.bits & (rows_per_unit - 1) == 0:
            return self.total // rows_per_unit
        if rows_per_unit not in self._num_units:
            more, shift = rows_per_unit - 1, rows_per_unit.bit_length() - 1
            self._num_units[rows_per_unit] = sum([(num_rows + more) >> shift for num_rows in self.rows])
        return self._num_units[rows_per_unit]


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """One kind of tensor that each split has in the buffer: its data, its scales or its amax.

    A split of M rows takes `unit_bytes * ceil(M / rows_per_unit)` bytes, the closed form that kernels use too.
    """

    name: str
    dtype: str
    alignment: int
    unit_bytes: int
    rows_per_unit: int
    """0: the size does not depend on the rows."""
    shape: Callable[[tuple[int, ...]], tuple[int, ...]]
    """From a split's leading dimensions to the tensor's shape."""

    def split_bytes(self, num_rows: int) -> int:
        """Bytes of the part that belongs to a split of `num_rows`."""
        return self.unit_bytes * (-(-num_rows // self.rows_per_unit) if self.rows_per_unit else 1)

    def total_bytes(self, rows: SplitRows) -> int:
        """Bytes of all splits, each rounded up to the alignment."""
        if not self.rows_per_unit:
            return round_up(self.unit_bytes, self.alignment) * len(rows.rows)
        if self.unit_bytes % self.alignment == 0:
            return self.unit_bytes * rows.num_units(self.rows_per_unit)
        unit, per, mask = self.unit_bytes, self.rows_per_unit, self.alignment - 1
        return sum([(unit * -(-num_rows // per) + mask) & ~mask for num_rows in rows.rows])


@lru_cache(maxsize=512)
def parts_of(format_name: FormatName, row_shape: tuple[int, ...], columnwise: bool, block_2d: bool) -> tuple[Part, ...]:
    """The parts of one format, in the order in which they lie in the buffer."""
    K = row_shape[-1]
    if format_name == "fp8_block":
        return _fp8_block_parts(K, columnwise, block_2d)
    if format_name == "mxfp8":
        return _mxfp8_parts(K, columnwise)
    return _nvfp4_parts(K, columnwise)


def _data(unit_bytes: int, shape: Callable[[tuple[int, ...]], tuple[int, ...]]) -> Part:
    return Part(
        name="data", dtype="uint8", alignment=BASE_ALIGNMENT, unit_bytes=unit_bytes, rows_per_unit=1, shape=shape
    )


def _scale(dtype: str, unit_bytes: int, rows_per_unit: int, shape: Callable[[int], tuple[int, ...]]) -> Part:
    return Part(
        name="scale_inv",
        dtype=dtype,
        alignment=SMALL_ALIGNMENT,
        unit_bytes=unit_bytes,
        rows_per_unit=rows_per_unit,
        shape=lambda lead: shape(prod(lead)),
    )


def _fp8_block_parts(K: int, columnwise: bool, block_2d: bool) -> tuple[Part, ...]:
    """Data as it is, or transposed if columnwise; float32 scales over tiles of 128, rows padded to 16 bytes."""
    tiles_K, padded_K, padded_tiles_K = -(-K // 128), round_up(K, 4), round_up(-(-K // 128), 4)
    if columnwise:
        data = _data(K, lambda lead: (K, *lead))
        if block_2d:
            scale = _scale("float32", tiles_K * 16, 512, lambda M: (tiles_K, round_up(-(-M // 128), 4)))
        else:
            scale = _scale("float32", padded_K * 4, 128, lambda M: (-(-M // 128), padded_K))
    else:
        data = _data(K, lambda lead: (*lead, K))
        if block_2d:
            scale = _scale("float32", padded_tiles_K * 4, 128, lambda M: (-(-M // 128), padded_tiles_K))
        else:
            scale = _scale("float32", tiles_K * 16, 4, lambda M: (tiles_K, round_up(M, 4)))
    return data, scale


def _mxfp8_parts(K: int, columnwise: bool) -> tuple[Part, ...]:
    """Data as it is in both directions; E8M0 scales over 32 values, padded to tiles of 128 x 4."""
    data = _data(K, lambda lead: (*lead, K))
    if columnwise:
        padded_K = round_up(K, 128)
        return data, _scale("uint8", padded_K * 4, 128, lambda M: (round_up(M // 32, 4), padded_K))
    padded_blocks_K = round_up(K // 32, 4)
    return data, _scale("uint8", padded_blocks_K * 128, 128, lambda M: (round_up(M, 128), padded_blocks_K))


def _nvfp4_parts(K: int, columnwise: bool) -> tuple[Part, ...]:
    """Two values a byte, transposed if columnwise; E4M3 scales over 16 values, padded to tiles of 128 x 4; an amax."""
    amax = Part(
        name="amax", dtype="float32", alignment=SMALL_ALIGNMENT, unit_bytes=4, rows_per_unit=0, shape=lambda lead: (1,)
    )
    if columnwise:
        padded_K = round_up(K, 128)
        data = _data(K // 2, lambda lead: (K, prod(lead) // 2))
        return data, _scale("uint8", padded_K * 4, 64, lambda M: (padded_K, round_up(M // 16, 4))), amax
    padded_blocks_K = round_up(K // 16, 4)
    data = _data(K // 2, lambda lead: (*lead, K // 2))
    return data, _scale("uint8", padded_blocks_K * 128, 128, lambda M: (round_up(M, 128), padded_blocks_K)), amax
