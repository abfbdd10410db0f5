"""What every launcher asks of its arguments and of the device, and a way to launch that is short for the host.

Note [What a launch depends on]
Triton reads every argument and option of a launch anew, to find what it compiled for them: 20 to 30 microseconds for
the kernels here, more than all else that the host does for a group. What it compiles depends on the constants and
options, on the pointers' dtypes and whether they are multiples of 16, on the dtypes, blocks and layouts of
descriptors, and on whether an integer needs 64 bits, for integers are declared `do_not_specialize`. `launch` keeps what
was compiled by just these.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import Protocol

import torch
import triton

_INPUT_MAX = {dtype: torch.finfo(dtype).max for dtype in (torch.bfloat16, torch.float16, torch.float32)}
_AS_IT_IS = nullcontext()  # switching to the device that is current already costs the host several microseconds


@lru_cache
def has_fp8_casts(device_index: int | None) -> bool:
    """Whether the device converts to FP8 in hardware; the interpreter does not."""
    if triton.knobs.runtime.interpret or device_index is None:
        return False
    return torch.cuda.get_device_capability(device_index) >= (8, 9)


def on_device_of(x: torch.Tensor) -> AbstractContextManager[object]:
    """Makes the device of `x` the current one, which is the one that Triton launches on."""
    if not x.is_cuda or x.get_device() == torch.cuda.current_device():
        return _AS_IT_IS
    return torch.cuda.device(x.device)


class Descriptor(Protocol):
    """A matrix that the TMA loads or stores a block of at a time: Gluon's `TensorDescriptor`."""

    base: torch.Tensor
    block_shape: list[int]
    layout: object


_compiled: dict[tuple[object, ...], triton.compiler.CompiledKernel] = {}


def launch(
    kernel: triton.JITFunction,
    grid: int | tuple[int, int],
    pointers: Sequence[torch.Tensor],
    numbers: Sequence[int | float],
    constants: Mapping[str, object],
    *,
    num_warps: int,
    maxnreg: int | None = None,
    descriptors: Sequence[Descriptor] = (),
) -> None:
    """Launch `grid` programs on the current stream of the current device, where the pointers are.

    kernel: `@triton.jit`, whose parameters are descriptors if there are any, then pointers, then numbers that it does
        not specialize, then constants.
    numbers: integers of 64 bits or fewer, and floats. constants: by name, in the kernel's order.
    Multiplications and additions are not fused. Note [What a launch depends on].
    """
    key = (
        kernel.fn,  # hashed by what it is: a kernel's own hash is that of its source
        pointers[0].get_device(),
        tuple([(pointer.dtype, pointer.data_ptr() % 16 == 0) for pointer in pointers]),
        tuple([float if isinstance(number, float) else -(2**31) <= number < 2**31 for number in numbers]),
        tuple(constants.values()),
        num_warps,
        maxnreg,
        tuple([(descriptor.base.dtype, *descriptor.block_shape, descriptor.layout) for descriptor in descriptors]),
    )
    whole_grid = (grid, 1, 1) if isinstance(grid, int) else (*grid, 1)
    compiled = _compiled.get(key)
    if compiled is not None:
        compiled[whole_grid](*descriptors, *pointers, *numbers, *constants.values())
        return
    if not triton.knobs.runtime.interpret:
        first, num_numbers = len(descriptors) + len(pointers), len(numbers)
        assert kernel.arg_names[first + num_numbers :] == list(constants)
        of_numbers = zip(kernel.params[first : first + num_numbers], numbers, strict=True)
        assert all(isinstance(number, float) or param.do_not_specialize for param, number in of_numbers)
    options: dict[str, object] = {} if maxnreg is None else {"maxnreg": maxnreg}
    options |= {"num_warps": num_warps, "enable_fp_fusion": False}
    made = kernel[whole_grid](*descriptors, *pointers, *numbers, **constants, **options)
    if not triton.knobs.runtime.interpret:
        _compiled[key] = made


def either(wanted: torch.Tensor | None, other: torch.Tensor | None) -> torch.Tensor:
    """`wanted`, or for a kernel that will not touch it, the other: one of them is there."""
    buffer = other if wanted is None else wanted
    assert buffer is not None
    return buffer


def input_max(dtype: torch.dtype) -> float:
    """Largest finite value of an input's dtype."""
    return _INPUT_MAX[dtype]


def quantized_shape(x: torch.Tensor, swiglu: bool) -> tuple[int, int]:
    """Rows and columns of what is quantized: those of `x`, or half the columns if `x` is SwiGLU's gates and ups."""
    num_rows, num_cols = x.shape
    if swiglu and num_cols % 2:
        raise ValueError(f"SwiGLU takes as many gates as ups; got {num_cols} columns. Pass an (M, 2F) matrix.")
    return num_rows, num_cols // 2 if swiglu else num_cols


def check_group(x: torch.Tensor, ends: torch.Tensor, num_splits: int, *buffers: torch.Tensor | None) -> None:
    """Refuse what a kernel would silently misread."""
    if x.dim() != 2 or not x.is_contiguous() or x.dtype not in _INPUT_MAX:
        raise ValueError(
            f"The kernels take a contiguous (M, K) matrix of bf16, fp16 or fp32; got {tuple(x.shape)} {x.dtype} with "
            f"strides {x.stride()}. Call .reshape(-1, K).contiguous() first."
        )
    if ends.dtype != torch.int64 or ends.dim() != 1 or ends.shape[0] < num_splits:
        raise ValueError(
            f"ends needs {num_splits} int64 row counts on {x.device}; got {tuple(ends.shape)} {ends.dtype}. "
            "Pass the inclusive prefix sums of the splits."
        )
    if all(buffer is None for buffer in buffers):
        raise ValueError("Both buffers are None: there is nothing to quantize into. Pass one for each usage asked for.")
    for buffer in buffers:
        if buffer is not None and (buffer.dtype != torch.uint8 or buffer.data_ptr() % 16):
            raise ValueError(
                f"A bulk buffer is uint8 and begins at a multiple of 16 bytes; got {buffer.dtype} at "
                f"{buffer.data_ptr() % 16} past one. Allocate it as the bulk layout says."
            )
