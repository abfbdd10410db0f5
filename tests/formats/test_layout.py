"""Bulk layouts: the worked offsets, and what holds for every layout."""

from __future__ import annotations

import doctest
import pickle
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lighterage.formats import layout as layout_module
from lighterage.formats import parts
from lighterage.formats.layout import BulkLayout, bulk_layout

SPLITS = [256, 0, 96]
#        format, columnwise, 2-D: [(part, [(shape, offset)])], end, allocated
WORKED = {
    ("fp8_block", False, False): (
        {
            "data": [((256, 512), 0), ((0, 512), 131072), ((96, 512), 131072)],
            "scale_inv": [((4, 256), 180224), ((4, 0), 184320), ((4, 96), 184320)],
        },
        185856,
        186112,
    ),
    ("fp8_block", True, False): (
        {
            "data": [((512, 256), 0), ((512, 0), 131072), ((512, 96), 131072)],
            "scale_inv": [((2, 512), 180224), ((0, 512), 184320), ((1, 512), 184320)],
        },
        186368,
        186624,
    ),
    ("fp8_block", False, True): (
        {
            "data": [((256, 512), 0), ((0, 512), 131072), ((96, 512), 131072)],
            "scale_inv": [((2, 4), 180224), ((0, 4), 180256), ((1, 4), 180256)],
        },
        180272,
        180528,
    ),
    ("fp8_block", True, True): (
        {
            "data": [((512, 256), 0), ((512, 0), 131072), ((512, 96), 131072)],
            "scale_inv": [((4, 4), 180224), ((4, 0), 180288), ((4, 4), 180288)],
        },
        180352,
        180608,
    ),
    ("mxfp8", False, False): (
        {
            "data": [((256, 512), 0), ((0, 512), 131072), ((96, 512), 131072)],
            "scale_inv": [((256, 16), 180224), ((0, 16), 184320), ((128, 16), 184320)],
        },
        186368,
        186624,
    ),
    ("mxfp8", True, False): (
        {
            "data": [((256, 512), 0), ((0, 512), 131072), ((96, 512), 131072)],
            "scale_inv": [((8, 512), 180224), ((0, 512), 184320), ((4, 512), 184320)],
        },
        186368,
        186624,
    ),
    ("nvfp4", False, False): (
        {
            "data": [((256, 256), 0), ((0, 256), 65536), ((96, 256), 65536)],
            "scale_inv": [((256, 32), 90112), ((0, 32), 98304), ((128, 32), 98304)],
            "amax": [((1,), 102400), ((1,), 102416), ((1,), 102432)],
        },
        102436,
        102692,
    ),
    ("nvfp4", True, False): (
        {
            "data": [((512, 128), 0), ((512, 0), 65536), ((512, 48), 65536)],
            "scale_inv": [((512, 16), 90112), ((512, 0), 98304), ((512, 8), 98304)],
            "amax": [((1,), 102400), ((1,), 102416), ((1,), 102432)],
        },
        102436,
        102692,
    ),
}


@pytest.mark.parametrize("case", WORKED)
def test_worked_offsets(case: tuple[str, bool, bool]) -> None:
    format_name, columnwise, block_2d = case
    wanted, end, allocated = WORKED[case]
    layout = bulk_layout(format_name, SPLITS, 512, columnwise=columnwise, block_2d=block_2d)
    got = {part.name: [(view.shape, view.offset) for view in layout.views(part.name)] for part in layout.parts}
    assert got == wanted
    assert (layout.num_bytes, layout.allocated_bytes) == (end, allocated)


def test_docstring_examples_run() -> None:
    assert doctest.testmod(layout_module).failed == 0


@st.composite
def layouts(draw: st.DrawFn) -> BulkLayout:
    format_name = draw(st.sampled_from(["fp8_block", "mxfp8", "nvfp4"]))
    multiple = parts_multiple(format_name)
    splits = [multiple * m for m in draw(st.lists(st.integers(0, 40), min_size=1, max_size=9))]
    row_shape = (*draw(st.lists(st.integers(1, 3), max_size=2)), multiple * draw(st.integers(0, 12)))
    return bulk_layout(format_name, splits, row_shape, columnwise=draw(st.booleans()), block_2d=draw(st.booleans()))


def parts_multiple(format_name: str) -> int:
    return layout_module.BLOCK_MULTIPLE[format_name]


@given(layouts())
def test_views_are_disjoint_aligned_inside_and_packed_as_the_rule_says(layout: BulkLayout) -> None:
    cursor = 0
    for part in layout.parts:
        for view, rows in zip(layout.views(part.name), layout._rows, strict=True):
            assert view.offset == parts.round_up(cursor, part.alignment), "next aligned place, nothing between"
            assert view.num_bytes == part.split_bytes(rows), "the closed form is the size of the shape"
            cursor = view.offset + view.num_bytes
    assert layout.num_bytes == cursor
    assert layout.allocated_bytes == cursor + 256


@given(layouts())
def test_layouts_are_values(layout: BulkLayout) -> None:
    again = pickle.loads(pickle.dumps(layout))
    assert again == layout and hash(again) == hash(layout) and again.num_bytes == layout.num_bytes
    assert again.views("data") == layout.views("data")
    assert len(pickle.dumps(layout)) < 400


def test_leading_dimensions_count_as_rows() -> None:
    flat = bulk_layout("mxfp8", [64, 32], 96, columnwise=True)
    deep = bulk_layout("mxfp8", [16, 8], (4, 96), columnwise=True)
    assert deep.num_bytes == flat.num_bytes
    assert [view.shape for view in deep.views("data")] == [(16, 4, 96), (8, 4, 96)]
    assert [view.offset for view in deep.views("scale_inv")] == [view.offset for view in flat.views("scale_inv")]
    assert bulk_layout("fp8_block", [2], (3, 128), columnwise=True).view("data", 0).shape == (128, 2, 3)


def test_strides_are_those_of_a_contiguous_tensor() -> None:
    view = bulk_layout("fp8_block", [2], (3, 128), columnwise=True).view("data", 0)
    assert view.stride == (6, 3, 1)


def test_no_splits_need_no_bytes() -> None:
    layout = bulk_layout("nvfp4", [], 64)
    assert (layout.num_bytes, layout.allocated_bytes, len(layout), layout.views("amax")) == (0, 0, 0, [])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("mxfp8", [32], 100), "MXFP8 needs K divisible by 32; got K=100"),
        (("nvfp4", [32], 100), "NVFP4 needs K divisible by 16; got K=100"),
        (("mxfp8", [32, 16], 64), "rows of every split divisible by 32; got 16 rows in split 1"),
        (("fp8_block", [3, -1], 64), "must not be negative; got -1 at index 1"),
        (("int4", [3], 64), "unknown format 'int4'"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(arguments: tuple[str, list[int], int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        bulk_layout(*arguments)  # type: ignore[arg-type]


def test_unknown_parts_and_splits_that_are_no_integers_are_refused() -> None:
    with pytest.raises(KeyError, match="has no part 'amax'"):
        bulk_layout("mxfp8", [32], 64).view("amax", 0)
    with pytest.raises(TypeError, match="must be integers"):
        bulk_layout("fp8_block", [1.5], 64)  # type: ignore[list-item]


def test_layouts_need_no_torch_and_formats_no_triton() -> None:
    program = """
import importlib.util, pathlib, sys, types
root = pathlib.Path(sys.argv[1])
for name in ("lighterage", "lighterage.formats"):
    sys.modules[name] = types.ModuleType(name)
for name in ("arguments", "parts", "layout"):
    spec = importlib.util.spec_from_file_location(f"lighterage.formats.{name}", root / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
assert module.bulk_layout("mxfp8", [32], 64).num_bytes
assert "torch" not in sys.modules
"""
    folder = layout_module.__file__.rsplit("/", 1)[0]
    subprocess.run([sys.executable, "-c", program, folder], check=True)
    program = "import lighterage.formats, sys; assert 'triton' not in sys.modules, 'triton was imported'"
    subprocess.run([sys.executable, "-c", program], check=True)
