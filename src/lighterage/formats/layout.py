"""Where every part of a bulk-allocated group of quantized tensors lies in its buffer, from shapes alone.

One buffer holds one direction (rowwise or columnwise) of a whole group of splits: the data of every split, then the
scales of every split, then the amax of every split. Allocation, kernels, sub-views, saving and the drawings in the
documentation all read this one description. No torch is needed.

    >>> layout = bulk_layout("fp8_block", [5, 3], 96)
    >>> [(view.offset, view.shape) for view in layout.views("data")]
    [(0, (5, 96)), (512, (3, 96))]
    >>> [(view.offset, view.shape, view.dtype) for view in layout.views("scale_inv")]
    [(800, (1, 8), 'float32'), (832, (1, 4), 'float32')]
    >>> layout.num_bytes, layout.allocated_bytes
    (848, 1104)

Shape letters: M rows of one split (its leading dimensions flattened), K the last dimension.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from math import prod

from lighterage.formats.arguments import check_flag, is_one_of
from lighterage.formats.parts import BASE_ALIGNMENT, FormatName, Part, SplitRows, parts_of, round_up

_ITEM_BYTES = {"uint8": 1, "float32": 4}


@dataclass(frozen=True, kw_only=True, slots=True)
class ViewSpec:
    """How to rebuild one contiguous tensor over its buffer."""

    offset: int
    """Bytes from the start of the buffer. Meaningless for a view of no bytes, which is a tensor of its own."""
    shape: tuple[int, ...]
    dtype: str
    """"uint8" or "float32"."""

    @property
    def num_bytes(self) -> int:
        """Bytes that the view covers."""
        return prod(self.shape) * _ITEM_BYTES[self.dtype]

    @property
    def stride(self) -> tuple[int, ...]:
        """Strides in elements: those of a contiguous tensor."""
        strides = [1]
        for size in reversed(self.shape[1:]):
            strides.append(strides[-1] * max(size, 1))
        return tuple(reversed(strides))


class BulkLayout:
    """The description of one buffer: which splits it holds, and where. Made by `bulk_layout`; equal if all is equal."""

    __slots__ = (
        "_offsets",
        "_rows",
        "block_2d",
        "columnwise",
        "format_name",
        "num_bytes",
        "parts",
        "row_shape",
        "splits",
    )

    def __init__(
        self,
        format_name: FormatName,
        rows: SplitRows,
        row_shape: tuple[int, ...],
        columnwise: bool,
        block_2d: bool,
    ) -> None:
        self.format_name = format_name
        self.splits = rows.splits
        self.row_shape = row_shape
        self.columnwise = columnwise
        self.block_2d = block_2d
        self.parts = parts_of(format_name, row_shape, columnwise, block_2d)
        self.num_bytes = 0
        """Bytes from the start of the buffer to the end of its last view."""
        self._rows = rows.rows
        self._offsets: dict[str, list[int]] = {}
        if rows.splits:
            for part in self.parts:
                last = part.split_bytes(rows.rows[-1])
                before = part.total_bytes(rows) - round_up(last, part.alignment)
                self.num_bytes = round_up(self.num_bytes, part.alignment) + before + last

    @property
    def allocated_bytes(self) -> int:
        """Bytes to allocate so that the start can be rounded up to `BASE_ALIGNMENT` wherever the memory lies."""
        return self.num_bytes + BASE_ALIGNMENT if self.splits else 0

    def __len__(self) -> int:
        return len(self.splits)

    def view(self, name: str, index: int) -> ViewSpec:
        """The view spec of the part called `name` of split `index`.

        Raises: KeyError: no such part. IndexError: no such split.
        """
        for part in self.parts:
            if part.name == name:
                lead = (self.splits[index], *self.row_shape[:-1])
                return ViewSpec(offset=self.offsets(part)[index], shape=part.shape(lead), dtype=part.dtype)
        raise KeyError(f"{self.format_name} has no part {name!r}; it has {[part.name for part in self.parts]}")

    def views(self, name: str) -> list[ViewSpec]:
        """The view specs of the part called `name`, one for each split."""
        return [self.view(name, index) for index in range(len(self.splits))]

    def __iter__(self) -> Iterator[dict[str, ViewSpec]]:
        """For each split, its view specs by part name."""
        for index in range(len(self.splits)):
            yield {part.name: self.view(part.name, index) for part in self.parts}

    def offsets(self, wanted: Part) -> list[int]:
        """Where one of the `parts` of every split begins, in bytes; counted when it is first asked for."""
        if wanted.name not in self._offsets:
            cursor = 0
            for part in self.parts:
                sizes = [part.split_bytes(num_rows) for num_rows in self._rows]
                steps = [round_up(size, part.alignment) for size in sizes]
                offsets = list(accumulate(steps[:-1], initial=round_up(cursor, part.alignment)))
                self._offsets[part.name] = offsets
                cursor = offsets[-1] + sizes[-1]
        return self._offsets[wanted.name]

    def _key(self) -> tuple[FormatName, tuple[int, ...], tuple[int, ...], bool, bool]:
        return self.format_name, self.splits, self.row_shape, self.columnwise, self.block_2d

    def __eq__(self, other: object) -> bool:
        return isinstance(other, BulkLayout) and self._key() == other._key()

    def __hash__(self) -> int:
        return hash(self._key())

    def __reduce__(self) -> tuple[object, ...]:
        return _layout_of, self._key()

    def __repr__(self) -> str:
        way = "columnwise" if self.columnwise else "rowwise"
        block = ", 2-D blocks" if self.block_2d else ""
        row = ", ".join(map(str, self.row_shape))
        return f"BulkLayout({self.format_name} {way}{block}, {len(self)} splits of (*, {row}), {self.num_bytes} bytes)"


def _layout_of(
    format_name: FormatName, splits: tuple[int, ...], row_shape: tuple[int, ...], columnwise: bool, block_2d: bool
) -> BulkLayout:
    return BulkLayout(format_name, SplitRows(splits, prod(row_shape[:-1])), row_shape, columnwise, block_2d)


@lru_cache(maxsize=256)
def known_layout(
    format_name: FormatName, rows: SplitRows, row_shape: tuple[int, ...], columnwise: bool, block_2d: bool
) -> BulkLayout:
    """`BulkLayout` of checked rows, kept: the layers and steps that split alike share one, with what it has counted."""
    return BulkLayout(format_name, rows, row_shape, columnwise, block_2d)


def bulk_layout(
    format_name: FormatName,
    m_splits: Sequence[int],
    row_shape: int | tuple[int, ...],
    *,
    columnwise: bool = False,
    block_2d: bool = False,
) -> BulkLayout:
    """Lay out one direction of a group of quantized tensors in one buffer.

    m_splits: size of each split along the first dimension of the input; zeros are welcome.
    row_shape: the input's other dimensions, or its last one alone where it has only two.
    columnwise: the columnwise direction instead of the rowwise one.
    block_2d: the scales of two-dimensional blocks (128x128 for fp8_block; nvfp4 keeps the shapes of 1x16).

    Every split's data begins at a multiple of 256 bytes, every scale matrix and amax at a multiple of 16; the parts
    follow each other with no other gap. A tensor of no bytes takes none, but the cursor still moves to its alignment.
    See the module's docstring for a worked example.

    Raises: ValueError: on an unknown format, a negative split, or sizes that the format's blocks do not divide.
        TypeError: on splits, dimensions or flags of another kind.
    Source: Transformer Engine pytorch/csrc/extensions/allocate.cpp and cast.cpp (bulk allocation).
    """
    try:
        shape = (
            (operator.index(row_shape),) if hasattr(row_shape, "__index__") else tuple(map(operator.index, row_shape))
        )
    except TypeError:
        shape = ()
    if not shape or min(shape) < 0 or isinstance(row_shape, bool):
        raise TypeError(
            f"row_shape must be K, or the input's dimensions after the first, of 0 or more; got {row_shape!r}."
        )
    check_flag("columnwise", columnwise)
    check_flag("block_2d", block_2d)
    return BulkLayout(format_name, checked_rows(format_name, m_splits, shape), shape, columnwise, block_2d)


_INT, _UNORDERED = {int}, (set, frozenset, dict)
BLOCK_MULTIPLE: dict[str, int] = {"fp8_block": 1, "mxfp8": 32, "nvfp4": 16}
"""What the rows of every split and K must be multiples of."""
_TITLE = {"fp8_block": "Float8Block", "mxfp8": "MXFP8", "nvfp4": "NVFP4"}


def checked_rows(format_name: FormatName, m_splits: Sequence[int], row_shape: tuple[int, ...]) -> SplitRows:
    """The rows of every split, after checking that none is negative and that the format's blocks divide them and K.

    Raises: ValueError, TypeError: naming the first size that breaks the rule.
    """
    check_blocks(format_name, row_shape[-1])
    rows = split_rows(m_splits, prod(row_shape[:-1]))
    check_split_blocks(format_name, rows)
    return rows


def split_rows(m_splits: Sequence[int], rows_per_split: int = 1) -> SplitRows:
    """The rows of every split, each of whose entries has `rows_per_split`, after checking that none is negative.

    Raises: ValueError, TypeError: naming the first size that breaks the rule.
    """
    rows = SplitRows(_whole_numbers(m_splits), rows_per_split)
    if rows.bits < 0:
        index = next(i for i, num_rows in enumerate(rows.rows) if num_rows < 0)
        raise ValueError(f"m_splits must not be negative; got {rows.splits[index]} at index {index}. Use 0 for none.")
    return rows


def _whole_numbers(m_splits: Sequence[int]) -> tuple[int, ...]:
    try:
        sizes = tuple(m_splits)
        if set(map(type, sizes)) <= _INT and not isinstance(m_splits, _UNORDERED):
            return sizes
        if isinstance(m_splits, _UNORDERED) or any(isinstance(size, bool) for size in sizes):
            raise TypeError
        return tuple(map(operator.index, sizes))  # NumPy's, which would overflow where Python's do not
    except (TypeError, RuntimeError):
        raise TypeError(f"m_splits must be integers; got {m_splits!r}. Convert each split with int().") from None


def check_blocks(format_name: FormatName, num_cols: int) -> None:
    """Check that there is such a format, and that its blocks divide K.

    Raises: ValueError.
    """
    if not is_one_of(format_name, BLOCK_MULTIPLE):
        raise ValueError(f"unknown format {format_name!r} for a bulk layout. Pass one of {sorted(BLOCK_MULTIPLE)}.")
    multiple = BLOCK_MULTIPLE[format_name]
    if num_cols % multiple:
        raise ValueError(
            f"{_TITLE[format_name]} needs K divisible by {multiple}; got K={num_cols}. Pad K, or use Float8Block."
        )


def check_split_blocks(format_name: FormatName, rows: SplitRows) -> None:
    """Check that the format's blocks divide the rows of every split.

    Raises: ValueError: naming the first that they do not.
    """
    multiple = BLOCK_MULTIPLE[format_name]
    if rows.bits % multiple:
        index = next(i for i, num_rows in enumerate(rows.rows) if num_rows % multiple)
        raise ValueError(
            f"{_TITLE[format_name]} needs the rows of every split divisible by {multiple}; got {rows.rows[index]} rows "
            f"in split {index}. Pad each split to a multiple of {multiple}, or use Float8Block."
        )
