"""What only CUDA can do: page-lock host memory in place, and issue many copies with one call of the driver."""

from __future__ import annotations

import array
import contextlib
import ctypes
from collections.abc import Sequence
from functools import cache

import torch

from .graph_driver import graph_driver


class CudaPinner:
    """Page-locks host memory for every device of this process, by way of one that is in use."""

    def __init__(self, device: torch.device) -> None:
        # Whichever thread comes here first: its current device may be one that this process has nothing on, where the
        # call would make a context, which is hundreds of MiB of somebody else's memory.
        self._device = device

    def pin(self, address: int, nbytes: int) -> None:
        """Register [address, address + nbytes) with the driver.

        Raises:
            OSError: the driver refused; the message holds its reason.
        """
        # A capture that is under way would be broken by it, and has nothing to do with it.
        driver = graph_driver()
        with torch.cuda.device(self._device), contextlib.nullcontext() if driver is None else driver.relaxed():
            code = int(torch.cuda.cudart().cudaHostRegister(address, nbytes, 1))
        if code:
            raise OSError(f"cudaHostRegister of {nbytes} bytes failed with error {code}")

    def unpin(self, address: int) -> None:
        """Undo `pin` for the registration that begins at `address`."""
        driver = graph_driver()
        with torch.cuda.device(self._device), contextlib.nullcontext() if driver is None else driver.relaxed():
            torch.cuda.cudart().cudaHostUnregister(address)


class _Attributes(ctypes.Structure):
    """`CUmemcpyAttributes`: the order in which sources are read, two hints of location, flags."""

    _fields_ = (
        ("source_access_order", ctypes.c_int),
        ("source_hint", ctypes.c_int * 2),
        ("destination_hint", ctypes.c_int * 2),
        ("flags", ctypes.c_uint),
    )


_IN_STREAM_ORDER = 1


class CopyBatches:
    """Copies between pinned memory and a device, many in one call: about 1 µs each, where `Tensor.copy_` takes 4.

    Source: CUDA driver API, `cuMemcpyBatchAsync`, since CUDA 12.8.
    """

    def __init__(self, call: ctypes._NamedFuncPointer, single: ctypes._NamedFuncPointer, device_index: int) -> None:
        self._call = call
        self._single = single
        self._device_index = device_index
        self._attributes = _Attributes(_IN_STREAM_ORDER)
        self._first = ctypes.c_size_t(0)

    def copy(self, destinations: Sequence[int], sources: Sequence[int], sizes: Sequence[int], stream: int) -> bool:
        """Issue copies on the raw `stream`, each of `sizes[i]` bytes from address `sources[i]` to `destinations[i]`.

        Returns False where this way is shut, and nothing was issued: while another device is the current one. A graph
        takes no batches, so in its capture the copies are issued one by one; `Tensor.copy_` would not know that memory
        is pinned which PyTorch did not allocate.
        """
        if torch._C._cuda_getDevice() != self._device_index:
            return False
        if torch._C._cuda_isCurrentStreamCapturing():
            return all(
                not self._single(to, here, size, stream)
                for to, here, size in zip(destinations, sources, sizes, strict=True)
            )
        count = len(sizes)
        # Arrays of ctypes take four times as long to fill. These live until the call returns, which copies them.
        lists = [array.array("Q", numbers) for numbers in (destinations, sources, sizes)]
        failed = ctypes.c_size_t(0)
        code: int = self._call(
            *[numbers.buffer_info()[0] for numbers in lists],
            count,
            ctypes.byref(self._attributes),
            ctypes.byref(self._first),
            1,
            ctypes.byref(failed),
            stream,
        )
        return code == 0


@cache
def copy_batches(device: torch.device) -> CopyBatches | None:
    """The driver's batched copies for `device`, or None where the driver has none."""
    if device.type != "cuda" or torch.version.cuda is None:
        return None
    try:
        driver = ctypes.CDLL("libcuda.so.1")
        call, single = driver.cuMemcpyBatchAsync, driver.cuMemcpyAsync
    except (OSError, AttributeError):
        return None
    pointer, size = ctypes.c_void_p, ctypes.c_size_t
    call.argtypes = [pointer, pointer, pointer, size, pointer, pointer, size, pointer, pointer]
    single.argtypes = [pointer, pointer, size, pointer]
    call.restype = single.restype = ctypes.c_int
    return CopyBatches(call, single, device.index)
