"""Runs one program twice, a step at a time: plainly, and with offload; everything that can be seen must agree."""

from __future__ import annotations

import contextlib
import random
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

import lighterage
from lighterage.engine import buffers
from lighterage.engine.offloader import Offloader

BYTES_OF_A_VALUE = 1024
"""Values are float32 vectors of 256 elements: 1 KiB, so that a program is quick and a small budget is soon spent."""
ROWS = 8

DTYPES = (torch.float32, torch.bfloat16, torch.int64, torch.uint8, torch.bool, torch.complex64, torch.float8_e4m3fn)
VIEWS = (
    "whole", "slice", "strided", "transposed", "chunk", "expanded", "overlapping", "element", "nothing", "bytes", "conj"
)  # fmt: skip
Pick = tuple[int, str, int, int]
"""Which tensor, which of `VIEWS`, and two numbers that choose which view of that kind."""
BUILTINS = ("sin", "tanh", "mul", "gram", "softmax", "gate", "flip", "add")


def bits(tensor: Tensor) -> tuple[Any, ...]:
    """All that can be told of a strided tensor, as data that `==` compares."""
    tensor = tensor.detach()
    form = (tensor.dtype, tuple(tensor.shape), tensor.stride(), tensor.is_conj(), tensor.is_neg())
    flat = tensor.resolve_conj().resolve_neg().contiguous().reshape(-1)
    return (*form, flat.view(torch.uint8).numpy().tobytes())


def view_of(base: Tensor, kind: str, a: int, b: int) -> Tensor:
    """A view of the one-dimensional `base`; `a` and `b` choose which."""
    n = base.numel()
    lo, hi = sorted((a % n, b % n))
    if kind == "slice":
        return base[lo : hi + 1]
    if kind == "strided":
        return base[lo :: 2 + b % 3]
    if kind == "transposed":
        return base.view(ROWS, -1).t()[a % (n // ROWS) :]
    if kind == "chunk":
        return base.view(ROWS, -1).chunk(2, dim=1)[a % 2]
    if kind == "expanded":
        return base[lo : lo + 1].expand(3, 1 + b % 5)
    if kind == "overlapping":
        return base.unfold(0, 8, 3)[a % 4 :]
    if kind == "element":
        return base[lo]
    if kind == "nothing":
        return base[lo:lo]
    if kind == "bytes":
        return base.view(torch.uint8)[lo : hi + 1]
    if kind == "conj":
        turned = base.conj() if base.is_complex() else base
        return turned.imag if base.is_complex() and a % 2 else turned
    assert kind == "whole"
    return base


class Node(torch.autograd.Function):
    """Saves its input, its output if told to, and `views`; backward logs the bits of all that it gets."""

    @staticmethod
    def forward(ctx: Any, side: Side, x: Tensor, save_output: bool, *views: Tensor) -> Tensor:
        y = x * 1.0009765625 - 0.25
        saved = (x, y, *views) if save_output else (x, *views)
        ctx.save_for_backward(*saved)
        ctx.side, ctx.num_views = side, len(views)
        ctx.places = [tensor.data_ptr() % buffers.CONGRUENCE if tensor.numel() else None for tensor in saved]
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        ctx.side.log.append([bits(tensor) for tensor in saved])
        for tensor, place in zip(saved, ctx.places, strict=True):
            assert place is None or tensor.data_ptr() % buffers.CONGRUENCE == place, "an address changed modulo 512"
        return (None, grad * saved[0].cos(), None, *[None] * ctx.num_views)


def builtin(op: str, x: Tensor, y: Tensor) -> Tensor:
    """An operation of PyTorch's own, bounded, from vectors to a vector."""
    if op == "mul":
        return x * y
    if op == "gram":
        m = x.view(ROWS, -1)
        return torch.tanh((m @ m.t()) @ y.view(ROWS, -1)).view(-1)
    if op == "softmax":
        return torch.softmax(x.view(ROWS, -1), dim=0).view(-1)
    if op == "gate":
        half, other = x.view(ROWS, -1).chunk(2, dim=1)
        return torch.cat([half * torch.sigmoid(other), other], dim=1).view(-1)
    if op == "flip":
        return x.view(ROWS, -1).t().contiguous().view(-1).sigmoid()
    if op == "add":
        return x + y
    return x.sin() if op == "sin" else x.tanh()


class Side:
    """What one of the two runs holds."""

    def __init__(self) -> None:
        self.buffers: list[Tensor] = []
        self.leaves: list[Tensor] = []
        self.values: list[Tensor] = []
        self.log: list[Any] = []
        self.made: list[StorageWeakRef] = []

    def note(self, tensor: Tensor) -> Tensor:
        self.made.append(StorageWeakRef(tensor.untyped_storage()))
        return tensor


class Crash(Exception):
    """Ends a section early."""


class Lockstep:
    """One program, run twice. The plain run has a thread to itself, since saved-tensor hooks belong to a thread."""

    def __init__(self, policies: Sequence[lighterage.Policy], *, seed: int, max_delay_ms: float) -> None:
        self._random = random.Random(seed)
        self._delays = random.Random(seed + 1)
        self._max_delay_s = max_delay_ms / 1e3
        self._threads_before = set(threading.enumerate())
        self._thread = ThreadPoolExecutor(1)
        self.plain, self.moved = Side(), Side()
        self.offloaders = [
            Offloader(nn.ModuleList([nn.Identity()]), policy, before_copies=self._delay) for policy in policies
        ]
        self._closed: list[Offloader] = []
        self._open: list[tuple[Any, Any]] = []
        """Sections, each with the hooks that lay on top before it was opened."""
        self.num_done = 0
        self.num_refused = 0

    def _delay(self) -> None:
        if self._delays.random() < 0.5:
            time.sleep(self._delays.random() * self._max_delay_s)

    # --- both runs ------------------------------------------------------------------------------------------------

    def _both(self, step: Callable[[Side], Any], *, backward: bool = False, thread: bool = False) -> None:
        """Take a step on either side: the same outcome, or a RuntimeError of the same kind."""
        # A backward that fails leaves the queue of its thread holding the graph, in PyTorch itself: end that thread.
        plainly = _elsewhere if backward else lambda *of: self._thread.submit(_outcome, *of).result()
        expected = plainly(step, self.plain)
        alone = thread or (backward and expected[0] != "done")
        found = (_elsewhere if alone else _outcome)(step, self.moved)
        assert found == expected, f"{expected[0]} without offload, {found[0]} with it"
        self.num_done += found[0] == "done"
        self.num_refused += found[0] != "done"
        assert self.plain.log == self.moved.log, "a saved tensor came back with other bits"
        self.plain.log.clear()
        self.moved.log.clear()

    def new_buffer(self, dtype: torch.dtype, multiple: int) -> None:
        """A tensor without a gradient, of unique contents."""
        seed = self._random.getrandbits(31)

        def step(side: Side) -> None:
            generator = torch.Generator().manual_seed(seed)
            raw = torch.randint(0, 100, (BYTES_OF_A_VALUE * multiple,), dtype=torch.uint8, generator=generator)
            side.buffers.append(side.note(raw.view(dtype) if dtype is not torch.bool else raw > 50))

        self._both(step)

    def new_value(self) -> None:
        """A leaf."""
        seed = self._random.getrandbits(31)

        def step(side: Side) -> None:
            generator = torch.Generator().manual_seed(seed)
            leaf = torch.randn(BYTES_OF_A_VALUE // 4, generator=generator, requires_grad=True)
            side.leaves.append(leaf)
            side.values.append(side.note(leaf))

        self._both(step)

    def node(self, value: int, save_output: bool, views: Sequence[Pick], grad: bool = True) -> None:
        """Save views of buffers (and by a negative index, of values) in a custom autograd function."""

        def step(side: Side) -> None:
            def tensor(index: int) -> Tensor:
                if index < 0 or not side.buffers:
                    return side.values[index % len(side.values)]
                return side.buffers[index % len(side.buffers)]

            with torch.set_grad_enabled(grad):
                picked = [view_of(tensor(index), kind, a, b) for index, kind, a, b in views]
                result = Node.apply(side, side.values[value % len(side.values)], save_output, *picked)
            if grad:
                side.values.append(side.note(result))

        self._both(step)

    def builtin(self, op: str, first: int, second: int, grad: bool = True) -> None:
        def step(side: Side) -> None:
            x, y = (side.values[index % len(side.values)] for index in (first, second))
            with torch.set_grad_enabled(grad):
                result = builtin(op, x, y)
            if grad:
                side.values.append(side.note(result))

        self._both(step)

    def change_buffer(self, index: int, kind: str, a: int, b: int) -> None:
        """An in-place change through a view: legal, unless a graph that saved the buffer is still to run."""

        def step(side: Side) -> None:
            if side.buffers:
                view = view_of(side.buffers[index % len(side.buffers)], kind, a, b)
                with contextlib.suppress(RuntimeError):  # expanded and overlapping views cannot be written to
                    view.copy_(view.clone().flip(0) if view.dim() else torch.zeros_like(view))

        self._both(step)

    def change_value(self, index: int) -> None:
        self._both(lambda side: side.values[index % len(side.values)].mul_(-1.5) is None)

    def backward(self, index: int, *, retain: bool, thread: bool = False) -> None:
        def step(side: Side) -> list[Any]:
            value = side.values[index % len(side.values)]
            grads = torch.autograd.grad(
                value, side.leaves, torch.ones_like(value), retain_graph=retain, allow_unused=True
            )
            return [None if grad is None else bits(grad) for grad in grads]

        self._both(step, backward=True, thread=thread)

    def drop_value(self, index: int) -> None:
        self._both(lambda side: side.values.pop(index % len(side.values)) is None if len(side.values) > 1 else None)

    def drop_buffer(self, index: int) -> None:
        self._both(lambda side: side.buffers.pop(index % len(side.buffers)) is None if side.buffers else None)

    # --- the run with offload only ----------------------------------------------------------------------------------

    def open_section(self, which: int) -> None:
        before = torch._C._autograd._top_saved_tensors_default_hooks(True)
        section = self.offloaders[which % len(self.offloaders)].section(f"at depth {len(self._open)}")
        section.__enter__()
        self._open.append((section, before))

    def close_section(self) -> None:
        if self._open:
            section, before = self._open.pop()
            section.__exit__(None, None, None)
            self._expect_top(before)

    def crash(self, levels: int, kind: type[BaseException]) -> None:
        """An exception ends the innermost sections."""
        for _ in range(min(levels, len(self._open))):
            section, before = self._open.pop()
            error = kind("on purpose")
            with contextlib.suppress(Crash, KeyboardInterrupt):
                section.__exit__(type(error), error, None)
            self._expect_top(before)

    def _expect_top(self, before: Any) -> None:
        top = torch._C._autograd._top_saved_tensors_default_hooks(True)
        assert (top is None) == (before is None) and (top is None or top[0] is before[0]), "the wrong hooks are on top"

    def mark(self, index: int, *, offload: bool) -> None:
        mark = lighterage.mark_offload if offload else lighterage.mark_not_offload
        side = self.moved
        mark((side.buffers or side.values)[index % len(side.buffers or side.values)])

    def by_hand(self, which: int, verb: str, index: int) -> None:
        """Evict, release or prefetch a live section."""
        offloader = self.offloaders[which % len(self.offloaders)]
        sections = offloader.sections
        if sections:
            getattr(offloader, verb)(sections[index % len(sections)])

    def close_offloader(self, which: int) -> None:
        """Close one of two; what it has saved is still to be used."""
        if len(self.offloaders) > 1 and not self._open:
            self._closed.append(self.offloaders.pop(which % len(self.offloaders)))
            self._closed[-1].close()

    @property
    def depth(self) -> int:
        """How many sections are open."""
        return len(self._open)

    # --- what must hold ---------------------------------------------------------------------------------------------

    def check_now(self) -> None:
        """What holds after every step."""
        for offloader in self.offloaders:
            budget, stats = offloader.policy.budget_bytes, offloader.stats()
            assert budget is None or stats.host_bytes_in_use <= budget
            assert stats.host_bytes_in_use == 0 or offloader.sections, "bytes at rest belong to nobody"

    def check_freed(self) -> None:
        """What the plain run has freed, the run with offload has freed too, once copies under way have finished."""
        assert not self._open
        freed = [index for index, ref in enumerate(self.plain.made) if ref.expired()]
        eventually(
            lambda: all(self.moved.made[index].expired() for index in freed), "memory is held that the plain run freed"
        )

    def end(self) -> None:
        """Close and drop everything: nothing may be left."""
        while self._open:
            self.close_section()
        self.check_freed()
        for side in (self.plain, self.moved):
            side.buffers.clear()
            side.values.clear()
            side.leaves.clear()
        assert all(ref.expired() for ref in self.plain.made), "the test itself holds tensors"
        self.check_freed()
        for offloader in [*self.offloaders, *self._closed]:
            stats = offloader.stats()
            assert stats.host_bytes_in_use == stats.disk_bytes_in_use == 0
            assert offloader.sections == []
            offloader.close()
        self._thread.shutdown()
        eventually(lambda: set(threading.enumerate()) <= self._threads_before, "threads are left")


def eventually(holds: Callable[[], bool], complaint: str) -> None:
    """Wait a moment for copies under way."""
    deadline = time.monotonic() + 5
    while not holds():
        assert time.monotonic() < deadline, complaint
        time.sleep(0.001)


def _elsewhere(step: Callable[[Side], Any], side: Side) -> tuple[str, Any]:
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(_outcome, step, side).result()


def _outcome(step: Callable[[Side], Any], side: Side) -> tuple[str, Any]:
    try:
        return "done", step(side)
    except lighterage.OffloadError:
        raise
    except RuntimeError as error:
        text = str(error)
        changed = "modified by an inplace operation" in text or "has been modified inplace" in text
        return "changed in place" if changed else text.partition(".")[0], None
