"""The calls of CUDA's driver about graphs under capture, which PyTorch does not offer."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator
from functools import cache
from typing import Any, Protocol

import torch

_ACTIVE = 1
_RELAXED = 2
_SET_DEPENDENCIES = 1
_NO_DESTRUCTOR_SYNC = 1
_MOVE_REFERENCE = 1
_EVENT_RECORD_NODE = 7
_SEMAPHORE_BYTES = 64
"""More than any platform's `sem_t` takes."""

# Note [Who learns that a graph is gone]
# A graph may be replayed as long as it, or what was instantiated from it, exists, and nobody but the driver knows how
# long that is. A user object is what the driver releases then, on a thread of its own, by a C function. That function
# must not be Python: the thread would need the interpreter, which may be ending. So it is `sem_post` of the C library,
# and what it is given is a semaphore in memory that is never freed before it was posted.


class Deed(Protocol):
    """Tells when a graph and all that was instantiated from it is destroyed, and its last replay is through."""

    @property
    def is_over(self) -> bool:
        """Whether that has come. Never blocks."""
        ...

    def wait(self) -> None:
        """Block the calling thread until it has."""
        ...


class GraphDriver(Protocol):
    """What a capture asks of the driver. Streams, graphs and events are raw handles."""

    def capture_of(self, stream: int) -> tuple[int, int] | None:
        """The id of the capture that `stream` takes part in, and the graph; None outside, or where it has failed."""
        ...

    def rejoin(self, lane: int, stream: int) -> bool:
        """Let what `lane` captures next depend on what `stream` has captured so far, and on nothing else.

        What it captured before stays in the graph, and the capture may end without `stream` having waited for it.
        """
        ...

    def own(self, graph: int) -> Deed | None:
        """A deed that lasts as long as the graph under capture, or None where the driver refuses one."""
        ...

    def relaxed(self) -> contextlib.AbstractContextManager[None]:
        """For the block, calls of this thread that have nothing to do with the capture do not break it."""
        ...

    def recorded_events(self, graph: int) -> frozenset[int]:
        """The events that nodes of the graph record at each replay: those that were made with `external=True`."""
        ...


class Semaphore:
    """A semaphore of the C library: any thread posts it without Python."""

    def __init__(self) -> None:
        libc = self._libc = _libc()
        self._over = False
        self.address: int = libc.calloc(1, _SEMAPHORE_BYTES)
        if not self.address or libc.sem_init(self.address, 0, 0):
            raise MemoryError("the C library made no semaphore")

    @property
    def is_over(self) -> bool:
        if not self._over:
            value = ctypes.c_int(0)
            self._libc.sem_getvalue(self.address, ctypes.byref(value))
            self._over = value.value > 0
        return self._over

    def wait(self) -> None:
        while not self._over and self._libc.sem_wait(self.address):
            pass  # a signal interrupted it
        if not self._over:
            self._over = True
            self._libc.sem_post(self.address)  # for whoever else waits

    def __del__(self) -> None:
        if getattr(self, "_over", False):  # otherwise somebody may yet post it
            self._libc.free(self.address)


class CudaGraphDriver:
    """`GraphDriver` over libcuda. Source: CUDA driver API, since 12.3: stream management, graphs, user objects."""

    def __init__(self, cuda: ctypes.CDLL) -> None:
        pointer, size, number = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_uint
        self._capture_info = _typed(cuda.cuStreamGetCaptureInfo_v3, *[pointer] * 7)
        self._set_dependencies = _typed(
            cuda.cuStreamUpdateCaptureDependencies_v2, pointer, pointer, pointer, size, number
        )
        self._exchange_mode = _typed(cuda.cuThreadExchangeStreamCaptureMode, pointer)
        self._create_object = _typed(cuda.cuUserObjectCreate, pointer, pointer, pointer, number, number)
        self._release_object = _typed(cuda.cuUserObjectRelease, pointer, number)
        self._retain_object = _typed(cuda.cuGraphRetainUserObject, pointer, pointer, number, number)
        self._nodes = _typed(cuda.cuGraphGetNodes, pointer, pointer, pointer)
        self._node_type = _typed(cuda.cuGraphNodeGetType, pointer, pointer)
        self._node_event = _typed(cuda.cuGraphEventRecordNodeGetEvent, pointer, pointer)
        self._post = ctypes.cast(_libc().sem_post, pointer)

    def capture_of(self, stream: int) -> tuple[int, int] | None:
        status, number, graph = ctypes.c_int(0), ctypes.c_uint64(0), ctypes.c_void_p()
        code = self._capture_info(
            stream, ctypes.byref(status), ctypes.byref(number), ctypes.byref(graph), None, None, None
        )
        if code or status.value != _ACTIVE or graph.value is None:
            return None
        return number.value, graph.value

    def rejoin(self, lane: int, stream: int) -> bool:
        status, count = ctypes.c_int(0), ctypes.c_size_t(0)
        nodes, edges = ctypes.c_void_p(), ctypes.c_void_p()
        code = self._capture_info(
            stream, ctypes.byref(status), None, None, ctypes.byref(nodes), ctypes.byref(edges), ctypes.byref(count)
        )
        return not code and not self._set_dependencies(lane, nodes, edges, count, _SET_DEPENDENCIES)

    def own(self, graph: int) -> Deed | None:
        deed, made = Semaphore(), ctypes.c_void_p()
        if self._create_object(ctypes.byref(made), deed.address, self._post, 1, _NO_DESTRUCTOR_SYNC):
            return None
        if self._retain_object(graph, made, 1, _MOVE_REFERENCE):
            self._release_object(made, 1)
            return None
        return deed

    @contextlib.contextmanager
    def relaxed(self) -> Iterator[None]:
        mode = ctypes.c_int(_RELAXED)
        self._exchange_mode(ctypes.byref(mode))
        try:
            yield
        finally:
            self._exchange_mode(ctypes.byref(mode))

    def recorded_events(self, graph: int) -> frozenset[int]:
        count = ctypes.c_size_t(0)
        if self._nodes(graph, None, ctypes.byref(count)) or not count.value:
            return frozenset()
        nodes = (ctypes.c_void_p * count.value)()
        self._nodes(graph, nodes, ctypes.byref(count))
        events: set[int] = set()
        kind, event = ctypes.c_int(0), ctypes.c_void_p()
        for node in nodes:
            self._node_type(node, ctypes.byref(kind))
            if kind.value == _EVENT_RECORD_NODE and not self._node_event(node, ctypes.byref(event)) and event.value:
                events.add(event.value)
        return frozenset(events)


@cache
def _libc() -> Any:
    libc = ctypes.CDLL(None)
    libc.calloc.restype = ctypes.c_void_p
    libc.calloc.argtypes = [ctypes.c_size_t, ctypes.c_size_t]
    libc.free.restype = None
    libc.free.argtypes = [ctypes.c_void_p]
    libc.sem_init.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_uint]
    libc.sem_getvalue.argtypes = [ctypes.c_void_p, ctypes.c_void_p]
    libc.sem_wait.argtypes = libc.sem_post.argtypes = [ctypes.c_void_p]
    return libc


def _typed(call: Any, *arguments: Any) -> Any:
    call.argtypes = arguments
    call.restype = ctypes.c_int
    return call


@cache
def graph_driver() -> GraphDriver | None:
    """The driver's calls, or None where there is no CUDA, or one without them."""
    if torch.version.cuda is None or not torch.cuda.is_available():
        return None
    try:
        return CudaGraphDriver(ctypes.CDLL("libcuda.so.1"))
    except (OSError, AttributeError):
        return None
