"""The copy-lane protocol: an ordered asynchronous queue of copies, the fences it hands back, and what rests where."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol

import torch

from ..planner.lanes import CHUNK_BYTES

# Note [Urgent reloads]
# A reload is urgent when backward waits for it and nobody has started it: what `Traffic.load` finds away; and what a
# section saved that is away when backward comes to it out of turn, first of all what is asked for. (In turn, the link
# is merely behind: what is on its way was needed before, and what is away is next.)
# It goes on a lane of its own. What the inbound lane was given before cannot be called back: its copies are cut into
# chunks, between which lanes that are threads let an urgent one in. A CUDA device does not: there, past copies that are
# on their way, a kernel reads what is urgent (`host_reader.py`, Note [Why a kernel reads]). What either lane is given
# afterwards comes after the urgent copy. Three things keep this safe.
# 1. Bytes whose copy out is not finished must first go out. So an urgent copy waits for that before it holds up anybody
#    (`RightOfWay`), and streams wait for events that were recorded before, never for such as are yet to come.
# 2. Its fence is one like any other: who next writes the block that it reads, or uses the memory that it writes, comes
#    after it. No rule about blocks counts on there being one inbound lane.
# 3. Inside a graph's capture there is no urgent lane and there are no chunks. A replay makes the same copies in the
#    same order each time, and that is the order in which backward asked for them when it was captured.
# What was started, and is asked for while it waits in its queue, is left there. Copying it again would move its bytes
# twice; and what is before it in the queue was started before it because it is needed before it, as far as anybody
# knew: `come_back_for` and a plan's fetches go by need. They knew wrong where backward takes another way than in the
# step before. Then it waits for no more than what is back and not used, which is at most a window, and in the next
# step the order is known.


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

    def point(self) -> torch.Event | None:
        """Where the calling thread's stream is now, if a graph is captured on it."""
        ...

    def evict(self, sources: Sequence[Source], *, since: torch.Event | None = None) -> list[Resting | None]:
        """Start copying each range out, after the work issued so far. None where there is no room for it.

        `since`: a `point` of the same capture at which the bytes were final; the copies come after that alone.
        """
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

    def restore(
        self, batches: Sequence[Sequence[tuple[Resting, torch.Tensor]]], *, urgent: bool = False
    ) -> list[Fence]:
        """Start copying each resting range into its contiguous tensor; a fence for each batch, which batches may share.

        Urgent ones overtake what was started before: see Note [Urgent reloads]. The tensors' version counters stay as
        they are: what they count is what backward writes.
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


def chunks_of(parts: Sequence[torch.Tensor]) -> Iterable[tuple[int, torch.Tensor]]:
    """The bytes of uint8 tensors that follow one another, in chunks, each within one of them, and where it starts.

    A chunk ends at each multiple of `CHUNK_BYTES` at the latest, so those of a write are also those of a read.
    """
    if len(parts) == 1 and parts[0].numel() <= CHUNK_BYTES:
        return ((0, parts[0]),)
    return _cut(parts)


def _cut(parts: Sequence[torch.Tensor]) -> Iterator[tuple[int, torch.Tensor]]:
    start = 0
    for part in parts:
        size, lo = part.numel(), 0
        while lo < size:
            hi = min(size, lo + CHUNK_BYTES - (start + lo) % CHUNK_BYTES)
            yield start + lo, part[lo:hi]
            lo = hi
        start += size


Copies = tuple[Sequence[int], Sequence[int], Sequence[int]]
"""Addresses that are copied to, addresses that are copied from, and bytes."""


def in_chunks(destinations: Sequence[int], sources: Sequence[int], sizes: Sequence[int]) -> Copies:
    """The same copies, cut into chunks where they are larger than one."""
    if max(sizes, default=0) <= CHUNK_BYTES:
        return destinations, sources, sizes
    cut = [
        (to + at, here + at, min(CHUNK_BYTES, size - at))
        for to, here, size in zip(destinations, sources, sizes, strict=True)
        for at in range(0, size, CHUNK_BYTES)
    ]
    return [to for to, _, _ in cut], [here for _, here, _ in cut], [size for _, _, size in cut]
