"""Which graph's replay spoils what another one saved, where they have their memory from one pool."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch.cuda import _POOL_HANDLE as Pool

# Note [Graphs that share memory]
# What a forward graph saves is kept from those graphs alone that were captured between it and its backward graph. Every
# other one of the pool was given memory as if nothing were saved, and writes there. So after a replay of such a one the
# backward is refused. Captures of one pool nest (all forward graphs of a call, then its backward graphs, the last one
# first), so what waits for backward does too: the last to have begun is the first to be spoilt, and looking at that one
# is enough.


class Ticket:
    """One forward replay, for as long as its backward may still come. The autograd graph holds it."""

    __slots__ = ("__weakref__", "spent", "spoilt", "turn", "versions")

    def __init__(self, turn: int, versions: tuple[int, ...] = ()) -> None:
        self.turn = turn
        self.versions = versions
        """Of the outputs that backward reads."""
        self.spent = False
        self.spoilt = False
        """Whether a graph was replayed since that may have written over what this replay saved."""


class SharedMemory:
    """The graphs of one pool, by their places in the order of capture, and which of them wait for backward."""

    def __init__(self) -> None:
        self.stream: torch.cuda.Stream | None = None
        """Where one of them was replayed last. The next one comes after it, also where an event let the caller's stream
        go on before the replay was through."""
        self._num_captured = 0
        self._waiting: list[tuple[int, int, weakref.ref[Ticket]]] = []

    def captured(self) -> int:
        """The place of the graph that was captured last."""
        self._num_captured += 1
        return self._num_captured

    def replays(self, place: int) -> None:
        """The graph at `place` is replayed: what others saved that it was not kept from is spoilt."""
        waiting = self._waiting
        while waiting and not waiting[-1][0] < place < waiting[-1][1]:
            ticket = waiting.pop()[2]()
            if ticket is not None:
                ticket.spoilt = True

    def waits(self, ticket: Ticket, forward: int, backward: int) -> None:
        """The graph at `forward` was replayed, and the one at `backward` may come for what it saved."""
        self._waiting.append((forward, backward, weakref.ref(ticket)))


_POOLS: weakref.WeakValueDictionary[Pool, SharedMemory] = weakref.WeakValueDictionary()


def memory_of(pool: Pool) -> SharedMemory:
    """What is known of the graphs of `pool`. Lives as long as somebody holds it."""
    found = _POOLS.get(pool)
    if found is None:
        found = _POOLS[pool] = SharedMemory()
    return found
