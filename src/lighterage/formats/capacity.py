"""How large a buffer must be for splits that only the device knows: from their number and the rows alone. Pure Python.

    >>> capacity = bulk_capacity("mxfp8", num_rows=352, num_splits=3, num_cols=512)
    >>> [
    ...     capacity.num_bytes - bulk_layout("mxfp8", m_splits, 512).num_bytes
    ...     for m_splits in ([256, 0, 96], [288, 32, 32])
    ... ]
    [4096, 0]

Where everything lies in such a buffer is what `bulk_layout` says of the true splits. The bytes after that are unused.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import gcd

from lighterage.formats.layout import BLOCK_MULTIPLE, BulkLayout, bulk_layout, check_blocks
from lighterage.formats.parts import BASE_ALIGNMENT, FormatName, Part, parts_of, round_up


@dataclass(frozen=True, kw_only=True)
class BulkCapacity:
    """The description of one buffer whose splits the host does not know. Made by `bulk_capacity`; a small value."""

    format_name: FormatName
    num_rows: int
    """Rows of the input: the splits add up to as many or fewer."""
    num_splits: int
    num_cols: int
    columnwise: bool
    block_2d: bool
    num_bytes: int
    """Enough for any splits; what the worst of them take, where every split's data keeps the alignment by itself."""

    @property
    def allocated_bytes(self) -> int:
        """Bytes to allocate so that the start can be rounded up to `BASE_ALIGNMENT` wherever the memory lies."""
        return self.num_bytes + BASE_ALIGNMENT if self.num_splits else 0

    def __len__(self) -> int:
        return self.num_splits

    def layout(self, sizes: tuple[int, ...]) -> BulkLayout:
        """Where everything lies, now that the rows of every split are known.

        Raises: ValueError: if the format's blocks do not divide a size.
        """
        return bulk_layout(self.format_name, sizes, self.num_cols, columnwise=self.columnwise, block_2d=self.block_2d)


@lru_cache(maxsize=512)
def bulk_capacity(
    format_name: FormatName,
    *,
    num_rows: int,
    num_splits: int,
    num_cols: int,
    columnwise: bool = False,
    block_2d: bool = False,
) -> BulkCapacity:
    """The buffer that any `num_splits` splits of at most `num_rows` rows fit into: see the module's docstring.

    num_rows, num_cols: the shape of the input. columnwise, block_2d: as for `bulk_layout`.

    Raises: ValueError: on an unknown format, sizes that are none, or columns that the format's blocks do not divide.
    """
    for name, count in (("num_rows", num_rows), ("num_splits", num_splits), ("num_cols", num_cols)):
        if type(count) is not int or count < 0:
            raise ValueError(f"{name} must be a whole number of 0 or more; got {count!r}. Convert it with int().")
    check_blocks(format_name, num_cols)
    num_bytes = 0
    for part in parts_of(format_name, (num_cols,), columnwise, block_2d) if num_splits else ():
        most = _most_bytes(part, num_rows // BLOCK_MULTIPLE[format_name], num_splits, BLOCK_MULTIPLE[format_name])
        num_bytes = round_up(num_bytes, part.alignment) + most
    return BulkCapacity(
        format_name=format_name,
        num_rows=num_rows,
        num_splits=num_splits,
        num_cols=num_cols,
        columnwise=columnwise,
        block_2d=block_2d,
        num_bytes=num_bytes,
    )


def _most_bytes(part: Part, num_blocks: int, num_splits: int, block_rows: int) -> int:
    """The most bytes that one part of all splits can take, when every split is a number of blocks of `block_rows` rows.

    The splits that begin most units have one block each; the blocks that are left over then fill whole units.
    """
    if part.rows_per_unit == 0:
        return round_up(part.unit_bytes, part.alignment) * (num_splits - 1) + part.unit_bytes
    num_begun = min(num_blocks, num_splits)
    if part.rows_per_unit <= block_rows:
        assert block_rows % part.rows_per_unit == 0
        unit_bytes, num_units = part.unit_bytes * (block_rows // part.rows_per_unit), num_blocks
    else:
        assert part.rows_per_unit % block_rows == 0
        unit_bytes = part.unit_bytes
        num_units = num_begun + (num_blocks - num_begun) // (part.rows_per_unit // block_rows)
    most_padding = part.alignment - gcd(unit_bytes, part.alignment)
    return unit_bytes * num_units + num_begun * most_padding
