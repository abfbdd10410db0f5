"""The capacity of a buffer is enough for any splits, and no more than the worst of them need."""

from __future__ import annotations

import doctest
import pickle
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lighterage.formats import bulk_layout, capacity
from lighterage.formats.capacity import BulkCapacity, bulk_capacity
from lighterage.formats.layout import BLOCK_MULTIPLE

FORMATS = sorted(BLOCK_MULTIPLE)
DATA_BYTES = {"fp8_block": 1, "mxfp8": 1, "nvfp4": 0.5}


def of(
    format_name: str, num_rows: int, num_splits: int, num_cols: int, columnwise: bool, block_2d: bool
) -> BulkCapacity:
    return bulk_capacity(
        format_name,
        num_rows=num_rows,
        num_splits=num_splits,
        num_cols=num_cols,
        columnwise=columnwise,
        block_2d=block_2d,
    )


@given(
    format_name=st.sampled_from(FORMATS),
    blocks=st.lists(st.integers(0, 40), max_size=9),
    unused=st.integers(0, 100),
    num_cols=st.integers(0, 12),
    columnwise=st.booleans(),
    block_2d=st.booleans(),
)
def test_any_splits_fit(
    format_name: str, blocks: list[int], unused: int, num_cols: int, columnwise: bool, block_2d: bool
) -> None:
    multiple = BLOCK_MULTIPLE[format_name]
    sizes = tuple(multiple * block for block in blocks)
    num_cols *= multiple
    found = of(format_name, sum(sizes) + unused, len(sizes), num_cols, columnwise, block_2d)
    layout = bulk_layout(format_name, sizes, num_cols, columnwise=columnwise, block_2d=block_2d)
    assert found.num_bytes >= layout.num_bytes
    assert found.layout(sizes) == layout and len(found) == len(layout)
    assert found.allocated_bytes - found.num_bytes == layout.allocated_bytes - layout.num_bytes


def _all_splits(num_blocks: int, num_splits: int) -> Iterator[tuple[int, ...]]:
    if num_splits == 1:
        yield from ((n,) for n in range(num_blocks + 1))
        return
    for first in range(num_blocks + 1):
        for rest in _all_splits(num_blocks - first, num_splits - 1):
            yield (first, *rest)


@pytest.mark.parametrize("block_2d", [False, True])
@pytest.mark.parametrize("columnwise", [False, True])
@pytest.mark.parametrize("num_splits", [1, 2, 3])
@pytest.mark.parametrize("format_name", FORMATS)
def test_the_worst_splits_need_all_of_it_where_data_keep_the_alignment(
    format_name: str, num_splits: int, columnwise: bool, block_2d: bool
) -> None:
    multiple, num_cols = BLOCK_MULTIPLE[format_name], 512
    assert num_cols * multiple * DATA_BYTES[format_name] % 256 == 0
    for num_blocks in (0, 1, 2, 5, 13):
        worst = max(
            bulk_layout(
                format_name, [multiple * n for n in blocks], num_cols, columnwise=columnwise, block_2d=block_2d
            ).num_bytes
            for blocks in _all_splits(num_blocks, num_splits)
        )
        found = of(format_name, num_blocks * multiple, num_splits, num_cols, columnwise, block_2d)
        assert found.num_bytes == worst


def test_a_large_group_of_any_splits_costs_little_more_than_of_aligned_ones() -> None:
    for format_name in FORMATS:
        for columnwise in (False, True):
            layout = bulk_layout(format_name, [128] * 256, 4096, columnwise=columnwise)
            found = of(format_name, 32768, 256, 4096, columnwise, False)
            assert layout.num_bytes <= found.num_bytes <= layout.num_bytes * (1.2 if format_name == "nvfp4" else 1.1)


def test_capacities_are_small_values() -> None:
    found = of("mxfp8", 320, 4, 64, True, False)
    assert pickle.loads(pickle.dumps(found)) == found and hash(found) is not None and len(pickle.dumps(found)) < 400
    assert of("nvfp4", 64, 0, 64, True, False).allocated_bytes == 0


def test_sizes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="MXFP8 needs K divisible by 32; got K=100"):
        of("mxfp8", 64, 2, 100, False, False)
    with pytest.raises(ValueError, match="unknown format 'int4'"):
        of("int4", 64, 2, 64, False, False)
    with pytest.raises(ValueError, match="rows of every split divisible by 32; got 16 rows in split 1"):
        of("mxfp8", 64, 2, 64, False, False).layout((32, 16))


def test_docstring_examples_run() -> None:
    assert doctest.testmod(capacity).failed == 0
