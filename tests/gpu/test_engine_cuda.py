"""Law 6 on an accelerator: blocks and device memory under churn, on several streams, with lanes that are held up."""

from __future__ import annotations

import errno
import itertools
import os
import random
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lighterage
from lighterage import OffloadError, Policy
from lighterage.engine.cuda import CudaPinner
from lighterage.engine.offloader import Offloader

pytestmark = pytest.mark.gpu

MIB = 1 << 20
LONG = 100_000_000
"""Cycles: some 50 ms, longer than anything a test issues meanwhile."""


class Keep(torch.autograd.Function):
    """Saves `tensors`; backward hands what came back to `look`, on the stream that it runs on."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, look: Callable[[tuple[Tensor, ...]], None], *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(*tensors)
        ctx.look = look
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        ctx.look(saved)
        return (grad, None, *[None] * len(saved))


class Spoil(torch.autograd.Function):
    """Its backward takes memory on its own stream and fills it, waiting for nobody."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, nbytes: int) -> Tensor:
        ctx.nbytes = nbytes
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        spoil(ctx.nbytes)
        return grad, None


def spoil(nbytes: int) -> None:
    """Write to whatever memory of this size the allocator thinks is free for the current stream."""
    taken = [torch.full((nbytes,), 85, dtype=torch.uint8, device="cuda") for _ in range(4)]
    del taken


def offloader_of(before_copies: Callable[[], None] | None = None, **policy: Any) -> Offloader:
    chosen = {"keep_last": 0, "min_bytes": 1, "release_after": 0, "prefetch_ahead": 0, **policy}
    return Offloader(nn.ModuleList([nn.Identity()]), Policy(**chosen), before_copies=before_copies)


def noise(nbytes: int, seed: int) -> Tensor:
    generator = torch.Generator(device="cuda").manual_seed(seed)
    return torch.randint(0, 256, (nbytes,), dtype=torch.uint8, device="cuda", generator=generator)


def leaf() -> Tensor:
    return torch.ones(1, device="cuda", requires_grad=True)


# --- churn --------------------------------------------------------------------------------------------------------


class Churn:
    """Programs that use little memory again and again. The device itself counts what came back wrong."""

    def __init__(self, seed: int, offloader: Offloader) -> None:
        self.chance = random.Random(seed)
        self.seeds = itertools.count(seed * 1_000_003)
        self.offloader = offloader
        self.x = leaf()
        self.wrong = torch.zeros((), dtype=torch.int64, device="cuda")
        self.num_seen = 0
        self.graphs: list[tuple[Tensor, list[Tensor]]] = []

    def save(self) -> None:
        chance = self.chance
        with self.offloader.section(f"of {chance.randrange(3)}"):
            for _ in range(chance.randint(1, 3)):
                buffer = noise(chance.choice([100_000, 300_000, 700_000, 1_500_000]), next(self.seeds))
                cut = chance.randrange(buffer.numel())
                views = [buffer[:cut], buffer[cut // 2 :: 2], buffer[cut:cut]]
                expected = [view.clone() for view in views]

                def look(saved: tuple[Tensor, ...], expected: list[Tensor] = expected) -> None:
                    self.num_seen += 1
                    for one, other in zip(saved, expected, strict=True):
                        self.wrong += (one != other).sum()

                self.graphs.append((Keep.apply(self.x, look, *views), expected))

    def use(self) -> None:
        if self.graphs:
            index = self.chance.randrange(len(self.graphs))
            again = self.chance.random() < 0.2
            torch.autograd.grad(self.graphs[index][0].sum(), self.x, retain_graph=again)
            if not again:
                del self.graphs[index]

    def drop(self) -> None:
        if self.graphs:
            del self.graphs[self.chance.randrange(len(self.graphs))]

    def by_hand(self) -> None:
        sections = self.offloader.sections
        if sections:
            verb = self.chance.choice([self.offloader.evict, self.offloader.release, self.offloader.prefetch])
            verb(self.chance.choice(sections))

    def run(self, num_programs: int) -> None:
        steps = [self.save, self.save, self.use, self.use, self.drop, self.by_hand]
        for _ in range(num_programs):
            for step in self.chance.choices(steps, k=10):
                step()
            while len(self.graphs) > 8:
                self.use()
        while self.graphs:
            self.use()


@pytest.mark.parametrize("tier", ["host", "disk"])
@pytest.mark.parametrize("release_after", [0, 2])
def test_blocks_and_device_memory_are_not_used_again_too_early(tier: str, release_after: int) -> None:
    chance = random.Random(release_after)
    num_programs = wrong = moved = refused = 0
    enough, too_long = time.monotonic() + 5, time.monotonic() + 120
    for seed in itertools.count():
        offloader = offloader_of(
            lambda: torch.cuda._sleep(chance.choice([0, 0, 0, 100_000, 1_000_000, 5_000_000])),
            tier=tier,
            host_budget=chance.choice([2 * MIB, 6 * MIB]),
            release_after=release_after,
            prefetch_ahead=seed % 4,
        )
        with offloader:
            churn = Churn(seed, offloader)
            churn.run(20)
            wrong += int(churn.wrong)
            assert churn.num_seen > 0 and wrong == 0
            assert offloader.stats().host_bytes_in_use == 0
            moved += offloader.stats(total=True).bytes_in
            refused += sum(offloader.report().refusals.values())
        num_programs += 20
        told = num_programs >= 40 and moved > 50 * MIB and refused > 0
        if time.monotonic() > (enough if told else too_long):  # a tool that watches the device may slow all of it
            break
    assert told, f"{num_programs} programs moved {moved} bytes, and {refused} were refused: too little was tried"


def test_several_threads_and_streams_share_an_offloader() -> None:
    offloader = offloader_of(
        lambda: torch.cuda._sleep(200_000), host_budget=32 * MIB, release_after=1, prefetch_ahead=2
    )
    results: list[tuple[int, int]] = []

    def work(seed: int) -> None:
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            churn = Churn(seed, offloader)
            churn.run(10)
            stream.synchronize()
            results.append((churn.num_seen, int(churn.wrong)))
            del churn

    workers = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(150)
    assert len(results) == 4 and all(seen > 0 and wrong == 0 for seen, wrong in results)
    assert offloader.stats().host_bytes_in_use == 0
    offloader.close()


# --- several streams ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["by the next section", "by hand"])
def test_memory_released_on_another_stream_is_not_overwritten_while_it_leaves(how: str) -> None:
    nbytes, side, main = 24 * MIB, torch.cuda.Stream(), torch.cuda.current_stream()
    offloader = offloader_of(lambda: torch.cuda._sleep(LONG), release_after=1 if how.startswith("by the next") else 9)
    wrong = torch.zeros((), dtype=torch.int64, device="cuda")
    expected = noise(nbytes, 1)

    def look(saved: tuple[Tensor, ...]) -> None:
        wrong.add_((saved[0] != expected).sum())

    with offloader:
        with offloader.section("on main"):
            y = Keep.apply(leaf(), look, noise(nbytes, 1))
        with torch.cuda.stream(side):
            if how == "by hand":
                offloader.release(offloader.sections[0])
            else:
                with offloader.section("on side"):
                    Keep.apply(leaf(), look, torch.ones(1, device="cuda"))
        spoil(nbytes)
        y.sum().backward()
        main.synchronize()
        assert offloader.stats(total=True).bytes_in >= nbytes
    assert int(wrong) == 0


# One leaf feeds both streams: the mismatch is what the test is about.
@pytest.mark.filterwarnings("ignore:The AccumulateGrad node's stream does not match:UserWarning")
def test_memory_that_came_back_on_one_stream_stays_while_another_reads_it() -> None:
    nbytes, side, main = 24 * MIB, torch.cuda.Stream(), torch.cuda.current_stream()
    offloader = offloader_of(release_after=0, prefetch_ahead=1)
    seen: list[Tensor] = []

    def look_late(saved: tuple[Tensor, ...]) -> None:
        assert torch.cuda.current_stream() == side
        torch.cuda._sleep(LONG)
        seen.append(saved[0].clone())

    with offloader:
        for _ in range(2):
            x = leaf()
            spoiled = Spoil.apply(x, nbytes)
            side.wait_stream(main)
            with torch.cuda.stream(side), offloader.section("on side"):
                a = Keep.apply(x, look_late, noise(nbytes, 2))
            main.wait_stream(side)
            with offloader.section("on main"):
                y = Keep.apply(a + spoiled, lambda _: None, noise(MIB, 3))
            del a, spoiled
            torch.cuda.synchronize()
            torch.autograd.grad(y.sum(), x)
            torch.cuda.synchronize()
            del y
        assert offloader.stats(total=True).bytes_in >= 2 * nbytes
    expected = noise(nbytes, 2)
    assert len(seen) == 2 and all(torch.equal(one, expected) for one in seen)


def test_what_is_written_between_saved_ranges_is_not_lost() -> None:
    """Bytes that an earlier copy took along come anew, and after it: many ranges return in one call of the driver."""
    offloader = offloader_of(release_after=99)
    seen: list[list[Tensor]] = []

    def look(saved: tuple[Tensor, ...]) -> None:
        seen.append([one.clone() for one in saved])

    with offloader:
        for _ in range(8):
            seen.clear()
            buffer = torch.zeros(MIB, dtype=torch.uint8, device="cuda")
            with offloader.section("filled"):
                buffer[:400_000], buffer[402_000:] = 1, 2
                y = Keep.apply(leaf(), look, buffer[:400_000], buffer[402_000:])
                offloader.evict(offloader.sections[0])
                torch.cuda.synchronize()
                buffer.data[400_000:402_000] = 3  # PyTorch counts no version
                y = Keep.apply(y, look, buffer[400_000:402_000], buffer)
            expected = [[buffer[400_000:402_000].clone(), buffer.clone()], [buffer[:400_000].clone()]]
            offloader.release(offloader.sections[0])
            del buffer
            spoil(MIB)
            y.backward()
            del y
            for got, wanted in zip(seen, expected, strict=True):
                assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=False))
        assert offloader.stats().bytes_in > MIB


def test_a_dropped_graph_leaves_its_memory_to_copies_under_way() -> None:
    nbytes = 24 * MIB
    offloader = offloader_of(lambda: torch.cuda._sleep(LONG // 4), release_after=0)
    wrong = torch.zeros((), dtype=torch.int64, device="cuda")
    with offloader:
        for round_ in range(6):
            doomed = []
            for index in range(2):
                with offloader.section(f"doomed {index}"):
                    doomed.append(Keep.apply(leaf(), lambda _: None, noise(nbytes, 10 + round_)))
            offloader.prefetch(offloader.sections[0])
            del doomed
            fresh = noise(nbytes, round_)
            expected = fresh.clone()

            def look(saved: tuple[Tensor, ...], expected: Tensor = expected) -> None:
                wrong.add_((saved[0] != expected).sum())

            with offloader.section("wanted"):
                y = Keep.apply(leaf(), look, fresh)
            kept = fresh.clone()
            del fresh
            spoil(nbytes)
            y.sum().backward()
            wrong.add_((kept != expected).sum())
            del y
        assert int(wrong) == 0
        torch.cuda.synchronize()
        assert offloader.stats().host_bytes_in_use == 0 and offloader.sections == []


# --- memory and the hot path --------------------------------------------------------------------------------------


class Decoder(nn.Module):
    """One layer with attention and a gated MLP."""

    def __init__(self, width: int = 256, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList([nn.RMSNorm(width), nn.RMSNorm(width)])
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.gate_up = nn.Linear(width, 8 * width, bias=False)
        self.down = nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        q, k, v = self.qkv(self.norms[0](x)).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        scores = (q @ k.transpose(-1, -2) / 8).tril().softmax(-1)
        x = x + self.out((scores @ v).transpose(1, 2).reshape(batch, length, width))
        gate, up = self.gate_up(self.norms[1](x)).chunk(2, dim=-1)
        return x + self.down(nn.functional.silu(gate) * up)


def decoder(num_layers: int = 6) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(Decoder() for _ in range(num_layers))).to("cuda", torch.bfloat16)


def tokens(length: int, seed: int = 0) -> Tensor:
    generator = torch.Generator(device="cuda").manual_seed(seed)
    return torch.randn(2, length, 256, device="cuda", generator=generator).bfloat16()


def grads_of(model: nn.Module, x: Tensor) -> list[Tensor]:
    loss = model(x).float().square().mean()
    return [loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))]


@pytest.mark.parametrize("tier", ["host", "disk"])
@pytest.mark.parametrize(("release_after", "prefetch_ahead"), [(0, 0), (1, 2), (3, 3)])
def test_a_decoder_has_the_same_bits(tier: str, release_after: int, prefetch_ahead: int) -> None:
    model = decoder()
    wanted = [grads_of(model, tokens(512, seed)) for seed in range(3)]
    with lighterage.offload(
        model, keep_last=1, tier=tier, release_after=release_after, prefetch_ahead=prefetch_ahead
    ) as offloader:
        for _ in range(2):
            for seed in range(3):
                got = grads_of(model, tokens(512, seed))
                assert all(torch.equal(a, b) for a, b in zip(got, wanted[seed], strict=True))
        stats = offloader.stats()
        # The last sections are asked for before `release_after` others have passed: those never left the device.
        moved_back = stats.bytes_in == stats.bytes_out if release_after < 3 else 0 < stats.bytes_in < stats.bytes_out
        assert stats.bytes_out > 0 and moved_back and stats.still_alive_bytes == 0


def test_nothing_is_pinned_after_the_second_identical_step(monkeypatch: pytest.MonkeyPatch) -> None:
    pins: list[int] = []
    pin = CudaPinner.pin

    def counted(self: CudaPinner, address: int, nbytes: int) -> None:
        pins.append(nbytes)
        pin(self, address, nbytes)

    monkeypatch.setattr(CudaPinner, "pin", counted)
    model = decoder()
    with lighterage.offload(model, keep_last=1) as offloader:
        for _ in range(2):  # the first can do without some: see Note [The first step]
            grads_of(model, tokens(1024))
        torch.cuda.synchronize()
        before = len(pins)
        assert before > 0 and sum(pins) == offloader.stats().host_bytes_reserved
        for _ in range(5):
            grads_of(model, tokens(1024))
        assert len(pins) == before
        stats = offloader.stats()
        assert stats.host_bytes_reserved <= 1.05 * stats.host_bytes_peak + 4 * MIB


@pytest.mark.undisturbed
def test_device_and_host_memory_stay_flat_over_two_hundred_steps_of_changing_sizes() -> None:
    model, chance = decoder(3), random.Random(5)
    with lighterage.offload(model, keep_last=0) as offloader:
        lengths = [64 * chance.randint(1, 12) for _ in range(40)]
        for length in [12 * 64, *lengths]:
            grads_of(model, tokens(length))
        before = torch.cuda.memory_reserved(), offloader.stats().host_bytes_reserved
        for length in lengths * 4:
            grads_of(model, tokens(length))
        assert torch.cuda.memory_reserved() <= 1.1 * before[0]
        assert offloader.stats().host_bytes_reserved <= 1.05 * before[1]


@pytest.mark.undisturbed
def test_both_lanes_are_busy_at_once() -> None:
    """Backward of the first microbatch fetches while the bytes of the second are still leaving."""
    nbytes = 64 * MIB
    offloader = offloader_of(release_after=99, prefetch_ahead=2)
    with offloader:
        for round_ in range(4):  # by the third there is host memory for all of it
            if round_ == 3:
                profile = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA])
                profile.start()
            graphs = []
            for microbatch in range(2):
                y = leaf()
                for index in range(6):
                    memory = torch.full((nbytes,), microbatch, dtype=torch.uint8, device="cuda")
                    with offloader.section(f"section {index}"):
                        y = Keep.apply(y, lambda _: None, memory)
                    del memory
                graphs.append(y)
                if microbatch == 0:  # its bytes are away before the second microbatch begins
                    torch.cuda.synchronize()
                    for section in offloader.sections:
                        offloader.release(section)
                    del section
            graphs[0].sum().backward()
            graphs[1].sum().backward()
            torch.cuda.synchronize()
            del graphs, y
        profile.stop()
    spans: dict[str, list[tuple[float, float]]] = {"DtoH": [], "HtoD": []}
    for event in profile.events():
        for kind, found in spans.items():
            if kind in event.name and event.device_type == torch.autograd.DeviceType.CUDA:
                found.append((event.time_range.start, event.time_range.end))
    assert any(lo < end and start < hi for lo, hi in spans["DtoH"] for start, end in spans["HtoD"])


# --- failures -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("call", "code"), [("pwrite", errno.ENOSPC), ("preadv", errno.EIO)])
def test_a_failing_disk_is_told_and_the_next_step_is_right(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, code: int
) -> None:
    model = decoder(3)
    wanted = grads_of(model, tokens(256))

    def refused(*_: object) -> int:
        raise OSError(code, os.strerror(code))

    with lighterage.offload(model, keep_last=0, tier="disk", disk_dir=tmp_path) as offloader:
        with monkeypatch.context() as patch:
            patch.setattr(os, call, refused)
            try:
                grads_of(model, tokens(256))
                text = ""
            except OffloadError as error:
                text = str(error)
        assert os.strerror(code) in text
        for _ in range(2):
            got = grads_of(model, tokens(256))
            assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))
        assert offloader.stats().disk_bytes_in_use == 0
    assert list(tmp_path.iterdir()) == []


def test_a_passage_to_disk_that_is_busy_or_too_small_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lighterage.engine.stores.PASSAGE_BYTES", 1 * MIB)
    pwrite, count = os.pwrite, itertools.count()

    def slow(fd: int, data: memoryview, at: int) -> int:
        if next(count):
            time.sleep(0.3)
        return pwrite(fd, data, at)

    monkeypatch.setattr(os, "pwrite", slow)
    offloader = offloader_of(tier="disk", release_after=0)
    wrong = torch.zeros((), dtype=torch.int64, device="cuda")
    with offloader:
        graphs = []
        for index, nbytes in enumerate([900_000, 700_000, 3 * MIB, 800_000, 100_000, 900_000]):
            expected = noise(nbytes, index)

            def look(saved: tuple[Tensor, ...], expected: Tensor = expected) -> None:
                wrong.add_((saved[0] != expected).sum())

            with offloader.section(f"section {index}"):
                graphs.append(Keep.apply(leaf(), look, noise(nbytes, index)))
            if index == 0:
                time.sleep(0.1)  # it is on disk, and the next one fills the passage for a while
        for graph in graphs:
            graph.sum().backward()
        assert int(wrong) == 0


def test_an_in_place_change_is_told() -> None:
    offloader = offloader_of()
    with offloader:
        buffer = noise(MIB, 0)
        with offloader.section("changed"):
            y = Keep.apply(leaf(), lambda _: None, buffer)
        buffer.add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()
