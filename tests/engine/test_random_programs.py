"""Random programs give the same bits with offload as without, under lanes that delay copies at random."""

from __future__ import annotations

import itertools
import random
import threading
import time
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from torch import Tensor, nn

from lighterage import Policy, mark_not_offload
from lighterage.engine import stores
from lighterage.engine.disk import DiskStore
from lighterage.engine.offloader import Offloader
from tests.engine.lockstep import BUILTINS, DTYPES, VIEWS, Crash, Lockstep, bits, eventually

INDEX = st.integers(0, 7)
PLACE = st.integers(0, 2000)
PICKS = st.lists(st.tuples(st.integers(-3, 5), st.sampled_from(VIEWS), PLACE, PLACE), max_size=5)
POLICIES = st.builds(
    Policy,
    tier=st.sampled_from(["disk", "host"]),
    host_budget=st.sampled_from([None, None, 3000, 10_000]),
    min_bytes=st.sampled_from([0, 600, 2000]),
    keep_last=st.integers(0, 1),
    release_after=st.integers(0, 3),
    prefetch_ahead=st.integers(0, 3),
    select=st.sampled_from(["unmarked", "unmarked", "marked"]),
    disk_checksums=st.booleans(),
)


@pytest.fixture(autouse=True)
def _small_world(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors of these tests have kilobytes: gather, join, cut and separate them as if they had megabytes."""
    monkeypatch.setattr("lighterage.engine.lanes.CHUNK_BYTES", 700)
    monkeypatch.setattr("lighterage.engine.traffic.GATHER_BYTES", 2500)
    monkeypatch.setattr("lighterage.engine.allocation.COPY_GAP", 64)
    monkeypatch.setattr("lighterage.engine.allocation.BUFFER_GAP", 256)


class Programs(RuleBasedStateMachine):
    """Any order of saves, sections, marks, in-place changes, exceptions and backwards."""

    world: Lockstep

    @initialize(policies=st.lists(POLICIES, min_size=1, max_size=2), seed=st.integers(0, 1000))
    def begin(self, policies: list[Policy], seed: int) -> None:
        self.world = Lockstep(policies, seed=seed, max_delay_ms=3)
        self.world.new_value()
        self.world.new_buffer(torch.float32, 2)

    @rule(dtype=st.sampled_from(DTYPES), multiple=st.integers(1, 4))
    def make_buffer(self, dtype: torch.dtype, multiple: int) -> None:
        self.world.new_buffer(dtype, multiple)

    @rule()
    def make_leaf(self) -> None:
        self.world.new_value()

    @rule(which=INDEX)
    def open_section(self, which: int) -> None:
        if self.world.depth < 4:
            self.world.open_section(which)

    @rule()
    def close_section(self) -> None:
        self.world.close_section()

    @rule(levels=st.integers(1, 3), kind=st.sampled_from([Crash, KeyboardInterrupt]))
    def crash_in_sections(self, levels: int, kind: type[BaseException]) -> None:
        self.world.crash(levels, kind)

    @rule(value=INDEX, save_output=st.booleans(), views=PICKS)
    def save(self, value: int, save_output: bool, views: list[Any]) -> None:
        self.world.node(value, save_output, views)

    @rule(value=INDEX, views=PICKS, which=INDEX)
    def save_in_a_section_of_its_own(self, value: int, views: list[Any], which: int) -> None:
        self.world.open_section(which)
        self.world.node(value, True, views)
        self.world.close_section()

    @rule(value=INDEX, buffer=INDEX, kind=st.sampled_from(VIEWS), a=PLACE, b=PLACE, which=INDEX)
    def save_change_and_save_again(self, value: int, buffer: int, kind: str, a: int, b: int, which: int) -> None:
        for _ in range(2):
            self.world.open_section(which)
            self.world.node(value, False, [(buffer, kind, a, b), (buffer, "nothing", b, a)])
            self.world.close_section()
            self.world.change_buffer(buffer, "whole", a, b)
            self.world.backward(-1, retain=True)
            self.world.change_buffer(buffer, "slice", b, a)

    @precondition(lambda self: self.world.depth == 0)
    @rule(value=INDEX, views=PICKS, which=INDEX, kind=st.sampled_from([Crash, KeyboardInterrupt]))
    def save_crash_and_drop(self, value: int, views: list[Any], which: int, kind: type[BaseException]) -> None:
        self.world.open_section(which)
        self.world.node(value, True, views)
        self.world.crash(1, kind)
        self.world.drop_value(-1)
        self.world.check_freed()

    @rule(value=INDEX, views=PICKS)
    def run_without_gradients(self, value: int, views: list[Any]) -> None:
        self.world.node(value, True, views, grad=False)
        self.world.builtin("gram", value, value, grad=False)

    @rule(op=st.sampled_from(BUILTINS), first=INDEX, second=INDEX)
    def compute(self, op: str, first: int, second: int) -> None:
        self.world.builtin(op, first, second)

    @rule(index=INDEX, offload=st.booleans())
    def mark(self, index: int, offload: bool) -> None:
        self.world.mark(index, offload=offload)

    @rule(index=INDEX, kind=st.sampled_from(VIEWS), a=PLACE, b=PLACE)
    def change_a_buffer(self, index: int, kind: str, a: int, b: int) -> None:
        self.world.change_buffer(index, kind, a, b)

    @rule(index=INDEX)
    def change_a_value(self, index: int) -> None:
        self.world.change_value(index)

    @rule(index=INDEX, retain=st.booleans(), thread=st.booleans())
    def backward(self, index: int, retain: bool, thread: bool) -> None:
        self.world.backward(index, retain=retain, thread=thread)

    @rule(index=INDEX)
    def drop_a_value(self, index: int) -> None:
        self.world.drop_value(index)

    @rule(index=INDEX)
    def drop_a_buffer(self, index: int) -> None:
        self.world.drop_buffer(index)

    @rule(which=INDEX, verb=st.sampled_from(["evict", "release", "release", "prefetch"]), index=INDEX)
    def by_hand(self, which: int, verb: str, index: int) -> None:
        self.world.by_hand(which, verb, index)

    @precondition(lambda self: self.world.depth == 0)
    @rule()
    def look_for_what_is_freed(self) -> None:
        self.world.check_freed()

    @precondition(lambda self: self.world.depth == 0)
    @rule(which=INDEX)
    def close_an_offloader_and_go_on(self, which: int) -> None:
        self.world.close_offloader(which)

    @invariant()
    def nothing_is_at_rest_for_nobody(self) -> None:
        if hasattr(self, "world"):
            self.world.check_now()

    def teardown(self) -> None:
        if hasattr(self, "world"):
            self.world.end()


@pytest.mark.parametrize("aligned", [False, True])
def test_any_program_gives_the_same_bits_and_leaves_nothing(aligned: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if aligned:  # as on an accelerator: most of what comes back is allocated as the tensor that was saved
        monkeypatch.setattr("lighterage.engine.cpu.CpuTransport.alignment", 64)
        monkeypatch.setattr("lighterage.engine.buffers.CONGRUENCE", 64)
    run_state_machine_as_test(Programs, settings=settings(max_examples=80, stateful_step_count=40))


# --- law 6 --------------------------------------------------------------------------------------------------------


class Keep(torch.autograd.Function):
    """Saves `tensors`, and shows backward what came back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, seen: list[Any], *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(*tensors)
        ctx.seen = seen
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        ctx.seen.append([bits(tensor) for tensor in saved])
        return (grad, None, *[None] * len(saved))


def _delays(seed: int) -> Iterator[float]:
    """Mostly none, often short, now and then long enough for the other lane and the program to get far ahead."""
    chance = random.Random(seed)
    while True:
        yield chance.choice([0.0, 0.0, 0.0, 0.0001, 0.0005, 0.002])


class Churn:
    """Programs that use few blocks again and again, each time for bytes that were never seen before."""

    def __init__(self, seed: int) -> None:
        chance = self.chance = random.Random(seed)
        delays = _delays(seed)
        self.offloader = Offloader(
            nn.ModuleList([nn.Identity()]),
            Policy(
                tier=chance.choice(["host", "disk"]),
                host_budget=chance.choice([8 << 10, 16 << 10, 64 << 10]),
                min_bytes=1,
                keep_last=0,
                release_after=chance.randrange(4),
                prefetch_ahead=chance.randrange(4),
                disk_checksums=chance.random() < 0.3,
            ),
            before_copies=lambda: time.sleep(next(delays)),
        )
        self.patterns = itertools.count(seed * 1_000_003)
        self.x = torch.ones(1, requires_grad=True)
        self.graphs: list[tuple[Tensor, list[Any], list[Any], list[bool]]] = []
        """Each with what backward saw, what it has to see, and whether its memory has been written to since."""
        self.buffer: Tensor | None = None
        self.is_spoilt: list[bool] = []

    def fresh(self) -> Tensor:
        nbytes = self.chance.choice([300, 1000, 2000, 4000, 6000])
        generator = torch.Generator().manual_seed(next(self.patterns))
        return torch.randint(0, 256, (nbytes,), dtype=torch.uint8, generator=generator)

    def save(self) -> None:
        """One section that saves views of new memory, and perhaps of memory that an earlier one saved too."""
        chance = self.chance
        with self.offloader.section(f"of {chance.randrange(3)}"):
            for _ in range(chance.randint(1, 3)):
                if self.buffer is None or chance.random() < 0.6:
                    self.buffer, self.is_spoilt = self.fresh(), []
                elif chance.random() < 0.3:
                    self.change()
                n = self.buffer.numel()
                cuts = sorted(chance.sample(range(n), 4))
                views = [
                    self.buffer[cuts[0] : cuts[2]],
                    self.buffer[cuts[1] : cuts[3] : 2],
                    self.buffer[n - cuts[0] : n - cuts[0]],
                ]
                chance.shuffle(views)
                if chance.random() < 0.2:
                    mark_not_offload(views[0])
                seen: list[Any] = []
                graph = Keep.apply(self.x, seen, *views)
                self.graphs.append((graph, seen, [bits(view) for view in views], self.is_spoilt))
        if chance.random() < 0.5:
            self.buffer = None

    def change(self) -> None:
        """Write to the memory that was saved last: its graphs are void, and what is saved from now on is new."""
        assert self.buffer is not None
        self.buffer.add_(1)
        self.is_spoilt.append(True)
        self.is_spoilt = []

    def use(self) -> None:
        """Backward of any graph; it may be wanted again."""
        if not self.graphs:
            return
        index = self.chance.randrange(len(self.graphs))
        graph, seen, expected, is_spoilt = self.graphs[index]
        again = self.chance.random() < 0.2
        if is_spoilt:
            with ThreadPoolExecutor(1) as thread:  # see Lockstep._both: an error leaves the graph with its thread
                text = thread.submit(self._complaint, graph).result()
            assert "modified by an inplace operation" in text
            del self.graphs[index]
            return
        torch.autograd.grad(graph, self.x, torch.ones(1), retain_graph=again)
        assert seen == [expected], "a block was used again too early"
        seen.clear()
        if not again:
            del self.graphs[index]

    def _complaint(self, graph: Tensor) -> str:
        try:
            torch.autograd.grad(graph, self.x, torch.ones(1))
        except RuntimeError as error:
            return str(error)
        return ""

    def drop(self) -> None:
        if self.graphs:
            del self.graphs[self.chance.randrange(len(self.graphs))]

    def by_hand(self) -> None:
        sections = self.offloader.sections
        if sections:
            verb = self.chance.choice([self.offloader.evict, self.offloader.release, self.offloader.prefetch])
            verb(self.chance.choice(sections))

    def drop_on_its_way_back(self) -> None:
        """The room of what is being read is free for the next section."""
        self.save()
        for section in self.offloader.sections[-1:]:
            self.offloader.release(section)
            self.offloader.prefetch(section)
        del self.graphs[-3:]
        self.save()

    def program(self) -> None:
        steps = [self.save, self.save, self.use, self.use, self.drop, self.by_hand, self.drop_on_its_way_back]
        for step in self.chance.choices(steps, k=10):
            step()
        while len(self.graphs) > 6:
            self.use()

    def end(self) -> None:
        while self.graphs:
            self.use()
        self.buffer = None
        assert self.offloader.stats().host_bytes_in_use == 0
        self.offloader.close()


def test_what_is_written_between_saved_ranges_is_not_lost() -> None:
    """A kernel fills one buffer part by part, and PyTorch counts no version: bytes that a copy took along come anew."""
    offloader = Offloader(nn.ModuleList([nn.Identity()]), Policy(tier="host", min_bytes=1, keep_last=0))
    x, seen, buffer = torch.ones(1, requires_grad=True), [], torch.zeros(1000, dtype=torch.uint8)
    with offloader.section("filled"):
        buffer.numpy()[:400], buffer.numpy()[450:] = 1, 2
        y = Keep.apply(x, seen, buffer[:400], buffer[450:])
        offloader.evict(offloader.sections[0])
        eventually(lambda: offloader.stats().host_bytes_in_use == 1000, "the gap is copied too")
        time.sleep(0.01)
        buffer.numpy()[400:450] = 3
        y = Keep.apply(y, seen, buffer[400:450], buffer)
    expected = [[bits(buffer[400:450]), bits(buffer)], [bits(buffer[:400]), bits(buffer[450:])]]
    offloader.release(offloader.sections[0])
    y.backward()
    assert seen == expected
    del y
    offloader.close()


class Witness:
    """Looks at every copy: each read has to give what was written to its room, even if nobody waits for it any more.

    A graph that is dropped while its bytes come back would never show in a gradient that its room was overwritten.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.num_reads = 0
        self.num_urgent = 0
        self.num_wrong = 0
        self._written: dict[tuple[int, int], tuple[Any, int]] = {}
        """By room and offset: the room, and the checksum of a chunk."""
        for store in (DiskStore, stores._ArenaStore):
            monkeypatch.setattr(store, "write", self._watched_write(store.write))
            monkeypatch.setattr(store, "read", self._watched_read(store.read))

    def _watched_write(self, write: Any) -> Any:
        def watched(store: Any, room: Any, data: Tensor, offset: int = 0) -> None:
            data = data.clone()  # the program may be writing to it: its graph is void, but its copy is looked at
            self._written[id(room), offset] = (room, zlib.crc32(data.numpy().tobytes()))
            write(store, room, data, offset)

        return watched

    def _watched_read(self, read: Any) -> Any:
        def watched(store: Any, room: Any, data: Tensor, offset: int = 0) -> None:
            try:
                read(store, room, data, offset)
            finally:
                self.num_reads += 1
                self.num_urgent += threading.current_thread().name == "lighterage-urgent"
                self.num_wrong += zlib.crc32(data.numpy().tobytes()) != self._written[id(room), offset][1]

        return watched

    def forget(self) -> None:
        self._written.clear()


@pytest.mark.slow
def test_no_block_is_used_again_before_its_last_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    witness = Witness(monkeypatch)
    until = time.monotonic() + 20
    num_programs = moved = refused = 0
    for seed in itertools.count():
        churn = Churn(seed)
        for _ in range(40):
            churn.program()
            num_programs += 1
        churn.end()
        assert witness.num_wrong == 0, "a block was written again before it was read"
        witness.forget()
        moved += churn.offloader.stats(total=True).bytes_out
        refused += sum(churn.offloader.report().refusals.values())
        if time.monotonic() > until and num_programs >= 1000:  # fewer would prove nothing
            break
    assert moved > 1000 * 2000 and refused > 0 and witness.num_reads > 1000, "blocks were not used often enough"
    assert 1000 < witness.num_urgent < witness.num_reads - 1000, "one of the lanes in was hardly used"
