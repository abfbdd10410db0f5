"""Sort copies of tokens by expert, gather their rows, and sum them back: a handful of launches for any sizes.

Letters: T tokens, k copies of each, E experts, C rows, H features.

Note [A stable sort without sorting]
A copy's row is the start of its expert, plus the copies of that expert before it. Those in other blocks are counted
first (`_count_kernel`, and a running sum over blocks), those in its own by a running sum over a table of one row for
each copy and one column for each expert. No atomics: the order is that of the copies, in every run.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from lighterage.kernels.triton.launch import launch, on_device_of

_TABLE = 8192  # entries of a block's table, which lies in registers
_MAX_COLS = 2048  # columns that a program of the row kernels has at a time


@triton.jit(do_not_specialize=["num_copies"])
def _count_kernel(experts, counts, num_copies, EXPERTS: tl.constexpr, BLOCK: tl.constexpr):
    block = tl.program_id(0)
    copy = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    expert = tl.load(experts + copy, mask=copy < num_copies, other=-1).to(tl.int32)
    column = tl.arange(0, EXPERTS)
    here = (expert[:, None] == column[None, :]).to(tl.int32)
    tl.store(counts + block * EXPERTS + column, tl.sum(here, 0))


@triton.jit(do_not_specialize=["num_copies", "num_blocks", "num_experts", "alignment"])
def _place_kernel(
    experts,
    counted,
    rows,
    tokens,
    padded_sizes,
    sizes,
    num_copies,
    num_blocks,
    num_experts,
    alignment,
    COPIES_OF_EACH: tl.constexpr,
    EXPERTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    block = tl.program_id(0)
    column = tl.arange(0, EXPERTS)
    size = tl.load(counted + (num_blocks - 1) * EXPERTS + column)
    padded = (size + (alignment - 1)) // alignment * alignment
    in_blocks_before = tl.where(block > 0, EXPERTS, 0)
    before = tl.load(counted + (block - 1) * EXPERTS + column, mask=column < in_blocks_before, other=0)
    start = tl.cumsum(padded, 0) - padded + before

    copy = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    exists = copy < num_copies
    expert = tl.load(experts + copy, mask=exists, other=-1).to(tl.int32)
    here = (expert[:, None] == column[None, :]).to(tl.int32)
    row = tl.sum(here * (start[None, :] + tl.cumsum(here, 0) - 1), 1)
    tl.store(rows + copy, row, mask=exists)
    tl.store(tokens + row, (copy // COPIES_OF_EACH).to(tl.int32), mask=exists)
    if block == 0:
        tl.store(padded_sizes + column, padded.to(tl.int64), mask=column < num_experts)
        tl.store(sizes + column, size.to(tl.int64), mask=column < num_experts)


@triton.jit
def _gather_rows_kernel(x, tokens, out, NUM_COLS: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    token = tl.load(tokens + row).to(tl.int64)
    num_read = tl.where(token >= 0, NUM_COLS, 0)
    for first in range(0, NUM_COLS, BLOCK):
        col = first + tl.arange(0, BLOCK)
        value = tl.load(x + token * NUM_COLS + col, mask=col < num_read, other=0.0)
        tl.store(out + row * NUM_COLS + col, value, mask=col < NUM_COLS)


@triton.jit
def _sum_rows_kernel(x, rows, out, NUM_COLS: tl.constexpr, COPIES_OF_EACH: tl.constexpr, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    for first in range(0, NUM_COLS, BLOCK):
        col = first + tl.arange(0, BLOCK)
        total = tl.zeros([BLOCK], tl.float32)
        for i in tl.static_range(COPIES_OF_EACH):
            row = tl.load(rows + token * COPIES_OF_EACH + i).to(tl.int64)
            total += tl.load(x + row * NUM_COLS + col, mask=col < NUM_COLS, other=0.0).to(tl.float32)
        tl.store(out + token * NUM_COLS + col, total.to(out.dtype.element_ty), mask=col < NUM_COLS)


def place_copies(
    experts_Tk: torch.Tensor, num_experts: int, alignment: int, num_rows: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """As `kernels.reference.permute.place_copies`; on the current stream, without a word from the device."""
    device, num_copies = experts_Tk.device, experts_Tk.numel()
    columns = max(16, triton.next_power_of_2(num_experts))
    block = max(16, min(256, _TABLE // columns))
    num_blocks = max(1, triton.cdiv(num_copies, block))
    experts = experts_Tk.contiguous()
    counts = torch.empty(num_blocks, columns, dtype=torch.int32, device=device)
    rows = torch.empty(experts.shape, dtype=torch.int32, device=device)
    tokens = torch.full((num_rows,), -1, dtype=torch.int32, device=device)
    padded, sizes = torch.empty(2, num_experts, dtype=torch.int64, device=device).unbind(0)
    constants = {"EXPERTS": columns, "BLOCK": block}
    with on_device_of(experts):
        launch(_count_kernel, num_blocks, [experts, counts], [num_copies], constants, num_warps=4)
        counted = counts.cumsum(0, dtype=torch.int32)
        launch(
            _place_kernel,
            num_blocks,
            [experts, counted, rows, tokens, padded, sizes],
            [num_copies, num_blocks, num_experts, alignment],
            {"COPIES_OF_EACH": max(1, experts.shape[1]), **constants},
            num_warps=4,
        )
    return rows, tokens, padded, sizes


def gather_rows(x_TH: torch.Tensor, tokens_C: torch.Tensor) -> torch.Tensor:
    """As `kernels.reference.permute.gather_rows`, in one launch on the current stream; any dtype."""
    x_TH = x_TH.contiguous()
    out_CH = torch.empty(tokens_C.shape[0], x_TH.shape[1], dtype=x_TH.dtype, device=x_TH.device)
    if out_CH.numel():
        constants = {"NUM_COLS": x_TH.shape[1], "BLOCK": min(_MAX_COLS, triton.next_power_of_2(x_TH.shape[1]))}
        with on_device_of(x_TH):
            launch(_gather_rows_kernel, len(out_CH), [x_TH, tokens_C, out_CH], [], constants, num_warps=4)
    return out_CH


def sum_rows(x_CH: torch.Tensor, rows_Tk: torch.Tensor) -> torch.Tensor:
    """As `kernels.reference.permute.sum_rows` of bf16, fp16 or fp32, in one launch on the current stream."""
    x_CH = x_CH.contiguous()
    num_tokens, copies_of_each = rows_Tk.shape
    out_TH = torch.empty(num_tokens, x_CH.shape[1], dtype=x_CH.dtype, device=x_CH.device)
    if out_TH.numel():
        constants = {
            "NUM_COLS": x_CH.shape[1],
            "COPIES_OF_EACH": copies_of_each,
            "BLOCK": min(_MAX_COLS, triton.next_power_of_2(x_CH.shape[1])),
        }
        with on_device_of(x_CH):
            launch(_sum_rows_kernel, num_tokens, [x_CH, rows_Tk, out_TH], [], constants, num_warps=4)
    return out_TH
