"""The disk tier: one anonymous file that allocations rest in."""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import tempfile
import threading
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

from ..errors import OffloadError
from .fenced_space import Claim, FencedSpace, Lease
from .units import MIB, format_bytes

_CHUNK = 64 * MIB
"""The most bytes of one system call."""

_CLOSED = "the disk store is closed"

_PyBUF_WRITE = 0x200
# Not (c_char * n).from_address: ctypes keeps every array type it has ever made, so changing sizes would leak.
_memory_from_address = ctypes.PYFUNCTYPE(ctypes.py_object, ctypes.c_void_p, ctypes.c_ssize_t, ctypes.c_int)(
    ("PyMemoryView_FromMemory", ctypes.pythonapi)
)


class Extent(Lease):
    """A range of a `DiskStore`'s file."""

    __slots__ = ("checksums",)

    def __init__(self, claim: Claim) -> None:
        super().__init__(claim)
        self.checksums: dict[tuple[int, int], int] = {}
        """CRC-32 of each range `(lo, hi)` of this extent that one `write` wrote; empty without checksums."""


class DiskStore:
    """Hands out extents of one file that has no name, so that nothing is left behind, not even after a crash.

    `directory`: where the file's bytes are stored; None for the system's temporary folder. `budget`: the most bytes of
    the file; None for no limit but the disk's. `checksums`: verify what is read against what was written.

    Raises:
        ValueError: when `directory` is not a folder that can be written to.
    """

    def __init__(
        self, directory: str | os.PathLike[str] | None, *, budget: int | None, checksums: bool = False
    ) -> None:
        self.refusal: str | None = None
        """Why the last `acquire` that returned None did; None as long as none has."""
        self._fd: int | None = None
        self._closed = False
        self._num_running = 0  # reads and writes that use the descriptor now
        self._io = threading.Condition()
        self._space = FencedSpace("the disk store of lighterage")
        self._directory = _checked(directory)
        self._budget = budget
        self._checksums = checksums

    def acquire(self, nbytes: int) -> Extent | None:
        """An extent of `nbytes` bytes, or None: then `refusal` says why.

        The caller orders its first write after the extent's `fences`. The first call makes the file.

        Raises:
            OffloadError: in a forked child, or when the file cannot be made.
        """
        claim = None if self._closed else self._space.acquire(nbytes, self._grow)
        if claim is None:
            self.refusal = _CLOSED if self._closed else self.refusal
            return None
        return Extent(claim)

    def write(self, extent: Extent, tensor_u8: torch.Tensor, offset: int = 0) -> None:
        """Write a contiguous 1-D uint8 CPU tensor to `extent`, from its byte `offset` on. Blocks, without the GIL.

        Raises:
            OffloadError: when the disk is full or fails, in a forked child, after `close`.
        """
        memory = _window(extent, tensor_u8, offset)
        lo, hi = offset, offset + len(memory)
        if self._checksums:
            for old in list(extent.checksums):
                if old[0] < hi and lo < old[1]:
                    extent.checksums.pop(old, None)
        self._transfer("writing", os.pwrite, extent, memory, offset)
        if self._checksums:
            extent.checksums[lo, hi] = zlib.crc32(memory)

    def read(self, extent: Extent, tensor_u8: torch.Tensor, offset: int = 0) -> None:
        """Fill a contiguous 1-D uint8 CPU tensor from `extent`, from its byte `offset` on. Blocks, without the GIL.

        With checksums, every range of one earlier `write` that lies wholly in what is read is verified.

        Raises:
            OffloadError: when the disk fails, the file is damaged, in a forked child, after `close`.
        """
        memory = _window(extent, tensor_u8, offset)
        self._transfer("reading", _pread, extent, memory, offset)
        for (lo, hi), expected in list(extent.checksums.items()):
            if offset <= lo and hi <= offset + len(memory):
                found = zlib.crc32(memory[lo - offset : hi - offset])
                if found != expected:
                    raise OffloadError(
                        f"what is read from disk must be what was written: the checksum of {format_bytes(hi - lo)} at "
                        f"byte {extent.offset + lo} of the file in {self._directory} was {expected:08x} and is now "
                        f"{found:08x}. The data is damaged: set disk_dir to a folder on another disk, and run the step "
                        "again from its forward."
                    )

    @property
    def bytes_in_use(self) -> int:
        """Bytes of the extents that are not retired."""
        return self._space.bytes_in_use

    @property
    def bytes_peak(self) -> int:
        """The most bytes that were ever in use at once."""
        return self._space.bytes_peak

    @property
    def bytes_reserved(self) -> int:
        """Bytes of the file at its largest; 0 before it is made and once it is gone."""
        return 0 if self._fd is None else self._space.size

    def close(self) -> None:
        """Wait for the copies of retired extents and for running reads and writes, then give the disk space back.

        An extent that is still live stays readable: the file then goes with this store, or at the next `close`. In a
        forked child this does nothing.
        """
        if self._space.is_foreign():
            return
        self._closed = True  # from here on nobody acquires
        self._space.settle()
        if not self._space.is_empty:
            return
        with self._io:
            self._io.wait_for(lambda: self._num_running == 0)
            self._drop_file()

    def __del__(self) -> None:
        # Whoever still reads or writes holds this store, so there is nobody to wait for; in a forked child this
        # closes the child's own descriptor only.
        if getattr(self, "_fd", None) is not None:
            self._drop_file()

    def _drop_file(self) -> None:
        fd, self._fd = self._fd, None
        if fd is not None:
            os.close(fd)

    def _grow(self, needed: int) -> int:
        """Extend the file by `needed` bytes; returns how many, 0 when refused. Called with the space's lock held."""
        if self._budget is not None and self._space.size + needed > self._budget:
            self.refusal = f"disk budget of {format_bytes(self._budget)} is spent"
            return 0
        if self._fd is None:
            try:
                self._fd = _open_anonymous(self._directory)
            except OSError as error:
                raise OffloadError(
                    f"the disk tier needs a file in {self._directory}, and making it failed: {error.strerror}. "
                    "Make the folder writable again, or set disk_dir to another one."
                ) from error
        return needed

    @contextmanager
    def _descriptor(self) -> Iterator[int]:
        """The file's descriptor, which stays open for as long as the context lasts."""
        self._space.check_process()
        with self._io:
            if self._fd is None:
                raise OffloadError(
                    "an extent can be read and written only until it is retired and its disk store is closed; this "
                    "store is closed. Close the offloader after the last backward."
                )
            self._num_running += 1
            fd = self._fd
        try:
            yield fd
        finally:
            with self._io:
                self._num_running -= 1
                self._io.notify_all()

    def _transfer(
        self, doing: str, call: Callable[[int, memoryview, int], int], extent: Extent, memory: memoryview, offset: int
    ) -> None:
        """Repeat `call(fd, memory, position)` until all of `memory` is done; EINTR is retried by Python itself."""
        done = 0
        with self._descriptor() as fd:
            while done < len(memory):
                try:
                    moved = call(fd, memory[done : done + _CHUNK], extent.offset + offset + done)
                except OSError as error:
                    raise self._failure(doing, len(memory), done, error.strerror or str(error), error.errno) from error
                if moved == 0:
                    raise self._failure(doing, len(memory), done, "no byte was moved", None)
                done += moved

    def _failure(self, doing: str, nbytes: int, done: int, reason: str, code: int | None) -> OffloadError:
        try:
            free = format_bytes(shutil.disk_usage(self._directory).free)
        except OSError as error:
            free = f"an unknown number of bytes ({error.strerror})"
        if code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            remedy = "Free space there, set disk_dir to a folder with more room, or offload less"
        else:
            remedy = "Check the disk, or set disk_dir to a folder on another one"
        return OffloadError(
            f"{doing} {nbytes} bytes of an offloaded allocation failed after {done} bytes in {self._directory}: "
            f"{reason}; {free} are free there, the file holds {format_bytes(self._space.size)}. {remedy}."
        )


def _checked(directory: str | os.PathLike[str] | None) -> Path:
    path = Path(tempfile.gettempdir() if directory is None else directory).absolute()
    if not path.is_dir():
        found = "is not a folder" if path.exists() else "does not exist"
        raise ValueError(f"disk_dir must be an existing folder; {path} {found}. Create it, or name another.")
    if not os.access(path, os.W_OK | os.X_OK):
        raise ValueError(f"disk_dir must be writable; {path} is not. Change its permissions, or name another.")
    return path


def _open_anonymous(directory: Path) -> int:
    """The descriptor of a new file in `directory` that only this user could open, and nobody can: its name is gone."""
    folder = tempfile.mkdtemp(prefix="lighterage-", dir=directory)  # 0700
    path = os.path.join(folder, "allocations")
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    finally:
        with suppress(FileNotFoundError):
            os.unlink(path)
        os.rmdir(folder)


def _window(extent: Extent, tensor_u8: torch.Tensor, offset: int) -> memoryview:
    """The memory of `tensor_u8`, which the caller keeps alive, for system calls to work on without a copy."""
    nbytes = tensor_u8.numel()
    assert tensor_u8.dtype == torch.uint8 and tensor_u8.device.type == "cpu", f"{tensor_u8.dtype}, {tensor_u8.device}"
    assert tensor_u8.dim() == 1 and tensor_u8.is_contiguous(), "the disk tier moves contiguous bytes"
    assert offset >= 0, f"an extent starts at byte 0; got {offset}"
    assert offset + nbytes <= extent.nbytes, f"[{offset}, {offset + nbytes}) leaves the {extent.nbytes} bytes"
    if nbytes == 0:
        return memoryview(b"")
    view: memoryview = _memory_from_address(tensor_u8.data_ptr(), nbytes, _PyBUF_WRITE)
    return view


def _pread(fd: int, memory: memoryview, position: int) -> int:
    return os.preadv(fd, [memory], position)
