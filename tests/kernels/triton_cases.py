"""Inputs, and the comparison of a bulk buffer with the reference, that the tests of every Triton kernel share."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is defined

from lighterage.formats.layout import BulkLayout, FormatName, bulk_layout  # noqa: E402
from lighterage.kernels.triton.swiglu import swiglu  # noqa: E402

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
FILL = 0xA5  # what a buffer holds before: a byte that was not written shows

Views = dict[str, torch.Tensor]
Reference = Callable[[torch.Tensor, bool], Views]


def hard_input(num_rows: int, num_cols: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """Values of every magnitude, with blocks of zeros, NaN and Inf, subnormals and the dtype's extremes."""
    generator = torch.Generator().manual_seed(seed)
    finfo = torch.finfo(dtype)
    x = torch.randn(num_rows, num_cols, generator=generator)
    # A different scale for each 16x16 block, so that blocks of every size have different amax.
    block_exponents = torch.randint(-12, 12, (-(-num_rows // 16), -(-num_cols // 16)), generator=generator).float()
    x *= torch.exp2(block_exponents).repeat_interleave(16, 0)[:num_rows].repeat_interleave(16, 1)[:, :num_cols]
    x = x.to(dtype)
    x[:, 16:48] = 0
    x[: num_rows // 2, 16:32] = finfo.smallest_normal / 4  # subnormal
    specials = (float("nan"), -float("nan"), float("inf"), -float("inf"), finfo.max, -finfo.max, -0.0, finfo.tiny)
    for i, special in enumerate(specials):
        row, col = (i * 37 + 5) % max(num_rows, 1), (i * 53 + 70) % num_cols
        if num_rows:
            x[row, col] = special
    if num_rows > 3:
        x[3] = float("nan")
    return x.to(DEVICE)


def tame_input(num_rows: int, num_cols: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """Finite values of every magnitude from subnormal to large, so that one Inf does not decide a tensor's scale."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(num_rows, num_cols, generator=generator)
    exponents = torch.randint(-14, 6, (num_rows, 1), generator=generator) + torch.randint(
        -6, 6, (1, num_cols), generator=generator
    )
    x = (x * torch.exp2(exponents.float())).to(dtype)
    x[:, :16] = torch.tensor([6, 3, -1.5, 0.75, 0.25, -0.25, 5, -5, -0.0, 0, 1.25, 1.75, 2.5, 3.5, 4.5, 0.5]).to(dtype)
    if num_rows > 1:
        x[1, num_cols // 2] = float("nan")
        x[num_rows - 1, num_cols - 1] = -float("nan")
    return x.to(DEVICE)


def ends_of(splits: Sequence[int]) -> torch.Tensor:
    """The inclusive prefix sums of the splits, on the device."""
    return torch.tensor(splits, dtype=torch.int64).cumsum(0).to(DEVICE)


def make_buffer(layout: BulkLayout) -> torch.Tensor:
    """A bulk buffer of exactly the layout's bytes, none of them written yet."""
    return torch.full((layout.num_bytes,), FILL, dtype=torch.uint8, device=DEVICE)


def read_views(buffer: torch.Tensor, layout: BulkLayout, part: str, split: int) -> torch.Tensor:
    """One tensor of the buffer, as bytes."""
    spec = layout.views(part)[split]
    start = spec.offset if spec.num_bytes else 0
    return buffer[start : start + spec.num_bytes].cpu()


def check_against_reference(
    x: torch.Tensor,
    splits: Sequence[int],
    format_name: FormatName,
    launch: Callable[..., None],
    reference: Reference,
    *,
    block_2d: bool = False,
    directions: Sequence[bool] = (False, True),
) -> None:
    """Run `launch` over the group and compare every byte of every view with the reference of each split alone."""
    layouts = {
        columnwise: bulk_layout(format_name, splits, x.shape[1], columnwise=columnwise, block_2d=block_2d)
        for columnwise in directions
    }
    buffers = {columnwise: make_buffer(layout) for columnwise, layout in layouts.items()}
    launch(x, ends_of(splits), buffers.get(False), buffers.get(True), num_splits=len(splits))
    start = 0
    for split, num_rows in enumerate(splits):
        part_x = x[start : start + num_rows]
        start += num_rows
        for columnwise in directions:
            layout = layouts[columnwise]
            expected_views = reference(part_x, columnwise)
            for part in layout.parts:
                expected = expected_views[part.name].cpu().flatten().clone().view(torch.uint8)
                got = read_views(buffers[columnwise], layout, part.name, split)
                assert got.shape == expected.shape
                wrong = (got != expected).nonzero().flatten()
                assert len(wrong) == 0, (
                    f"{part.name} of split {split} ({num_rows} rows), columnwise={columnwise}: {len(wrong)} of "
                    f"{len(got)} bytes differ, the first at {wrong[0].item()}: got {got[wrong[0]]:#x}, "
                    f"expected {expected[wrong[0]]:#x}"
                )


def check_swiglu_is_fused_exactly(
    h: torch.Tensor,
    splits: Sequence[int],
    format_name: FormatName,
    launch: Callable[..., None],
    *,
    block_2d: bool = False,
) -> None:
    """Quantizing the SwiGLU of `h` (M, 2F) as it is loaded gives the bytes of quantizing it as it was stored."""
    y = swiglu(h)
    layouts = [
        bulk_layout(format_name, splits, y.shape[1], columnwise=columnwise, block_2d=block_2d)
        for columnwise in (False, True)
    ]
    fused, unfused = ([make_buffer(layout) for layout in layouts] for _ in range(2))
    launch(h, ends_of(splits), *fused, num_splits=len(splits), swiglu=True)
    launch(y, ends_of(splits), *unfused, num_splits=len(splits))
    for got, expected in zip(fused, unfused, strict=True):
        assert torch.equal(got, expected)
