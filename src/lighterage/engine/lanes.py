"""The copy-lane protocol: an ordered asynchronous queue of copies, the fences it hands back, and what rests where."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

import torch


class Wait(Protocol):
    """How long a use of reloaded bytes had to wait for them."""

    def milliseconds(self) -> float | None:
        """The time lost, 0.0 if none was, or None while the device has not come so far. Never blocks."""
        ...


class Fence(Protocol):
    """The point in a lane's queue after which a set of copies has finished."""

    def done(self) -> bool:
        """Whether the copies have finished. Never blocks."""
        ...

    def wait(self) -> None:
        """Block the calling host thread until the copies have finished; raise the error that stopped them, if any."""
        ...

    def order(self) -> Wait | None:
        """Make the work that the calling thread issues next come after the copies.

        On an accelerator the current stream waits and the host goes on; on the CPU the host itself waits. Returns how
        long that took, or None where the copies had finished before.

        Raises:
            OffloadError: the copies failed.
        """
        ...

    def ordered_on(self, stream: int) -> bool:
        """Whether what comes next on the stream with this key is known to come after the copies. Never blocks."""
        ...


class _Finished:
    """The fence of copies that were never started."""

    def done(self) -> bool:
        return True

    def wait(self) -> None:
        pass

    def order(self) -> Wait | None:
        return None

    def ordered_on(self, stream: int) -> bool:
        return True


FINISHED: Fence = _Finished()


class Resting(Protocol):
    """The bytes of one range, away from the device.

    They are given up, and their room with them, when nobody holds this any more or `retire` is called, whichever comes
    first. The room is written again only after the copies into it and those that `restore` made of it.
    """

    @property
    def nbytes(self) -> int: ...

    @property
    def left(self) -> Fence:
        """After this, the range's device memory may be used for something else."""
        ...

    def retire(self, fences: Iterable[Fence] = ()) -> None:
        """Give the room back, to be written again only after `fences` too. Takes no lock; harmless when repeated."""
        ...


Source = tuple[torch.UntypedStorage, int, int]
"""A byte range [lo, hi) of a storage."""


class Transport(Protocol):
    """Moves byte ranges of one device to one tier and back: two lanes and the room at their far end.

    Every method is called with the offloader's lock held, except `Resting.retire` and the fences' own methods.
    """

    @property
    def refusal(self) -> str | None:
        """Why the last range that found no room found none."""
        ...

    def stream_key(self) -> int:
        """Tells the stream that the calling thread issues work on from every other one; 0 where there are none."""
        ...

    def capture(self) -> int:
        """Tells the graph that is captured on the calling thread's stream from every other one; 0 where none is."""
        ...

    def evict(self, sources: Sequence[Source]) -> list[Resting | None]:
        """Start copying each range out, after the work issued so far. None where there is no room for it."""
        ...

    @property
    def alignment(self) -> int:
        """What the addresses of `allocate` are multiples of."""
        ...

    def allocate(self, size: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """Device memory, a contiguous tensor, from the pool of the calling thread's stream."""
        ...

    def allocate_as(self, size: Sequence[int], stride: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """The same, with the strides that it shall show where a dimension of one leaves a choice."""
        ...

    def restore(self, batches: Sequence[Sequence[tuple[Resting, torch.Tensor]]]) -> list[Fence]:
        """Start copying each resting range into its contiguous tensor; a fence for each batch, which batches may share.

        The tensors' version counters stay as they are: what they count is what backward writes.
        """
        ...

    def share(self, storage: torch.UntypedStorage) -> None:
        """Tell the allocator that the calling thread's stream uses `storage`, which another stream allocated."""
        ...

    def share_with_lanes(self, storage: torch.UntypedStorage) -> None:
        """Tell the allocator that the lanes use `storage`: its memory is used again only after what they do now."""
        ...

    def bury(self, storage: torch.UntypedStorage, fence: Fence) -> None:
        """Drop device memory that a copy may still touch. Takes no lock: it is called from finalizers."""
        ...

    def tidy(self) -> None:
        """Drop what was buried: its memory is used again only after its copies."""
        ...

    def device_bytes(self) -> int | None:
        """Device memory that is allocated now, or None where that is not known."""
        ...

    def close(self) -> None:
        """Wait for the copies under way and give everything back. Bytes that handles still own stay readable."""
        ...
