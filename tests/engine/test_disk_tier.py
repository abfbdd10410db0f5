"""Claims about a disk that is full, broken or spent: a clear error, nothing lost in silence, nothing left behind."""

from __future__ import annotations

import errno
import gc
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

import lighterage
from lighterage import Offloader, OffloadError
from tests.engine.lockstep import bits

NUM_LAYERS = 5


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(64, 64) / 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(x @ self.weight).sin()


class Twins:
    """A model with offload and the same without."""

    def __init__(self, folder: Path, **policy: Any) -> None:
        self._threads_before = set(threading.enumerate())
        self.model = nn.Sequential(*(Layer() for _ in range(NUM_LAYERS)))
        self.plain = nn.Sequential(*(Layer() for _ in range(NUM_LAYERS)))
        self.plain.load_state_dict(self.model.state_dict())
        defaults = {"keep_last": 0, "min_bytes": 1, "tier": "disk", "disk_dir": folder, "release_after": 0}
        self.offloader = lighterage.offload(self.model, **{**defaults, **policy})
        self.step = 0

    def forward(self, model: nn.Module) -> Tensor:
        generator = torch.Generator().manual_seed(self.step)
        return model(torch.randn(32, 64, generator=generator, requires_grad=True)).square().mean()

    def check(self, loss: Tensor | None = None) -> None:
        """Backward of `loss`, or a whole step: the bits are those without offload."""
        loss = self.forward(self.model) if loss is None else loss
        expected = self.forward(self.plain)
        assert bits(loss) == bits(expected)
        loss.backward()
        expected.backward()
        del loss, expected
        self.check_grads()

    def check_grads(self) -> None:
        for ours, plain in zip(self.model.parameters(), self.plain.parameters(), strict=True):
            assert ours.grad is not None and plain.grad is not None and bits(ours.grad) == bits(plain.grad)
        self.model.zero_grad()
        self.plain.zero_grad()
        self.step += 1

    def end(self) -> None:
        stats = self.offloader.stats()
        assert stats.host_bytes_in_use == stats.disk_bytes_in_use == 0
        assert self.offloader.sections == []
        self.offloader.close()
        assert set(threading.enumerate()) <= self._threads_before


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """A folder for the disk tier, in which nothing may be left."""
    yield tmp_path
    assert list(tmp_path.iterdir()) == []


def told(call: Callable[[], object]) -> str:
    """What the OffloadError of `call` says. Unlike pytest.raises this does not keep the frames that it passed."""
    try:
        call()
    except OffloadError as error:
        return str(error)
    pytest.fail("no OffloadError was raised")


def refuse(call: str, code: int, monkeypatch: pytest.MonkeyPatch, when: Callable[[int], bool]) -> None:
    """`os.pwrite` or `os.preadv` fails at those calls, counted from 0, of which `when` says so."""
    real, count = getattr(os, call), iter(range(1 << 30))

    def refusing(*args: Any) -> int:
        if when(next(count)):
            raise OSError(code, os.strerror(code))
        return real(*args)

    monkeypatch.setattr(os, call, refusing)


# --- a full disk --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("release_after", [0, 1, 2])
@pytest.mark.parametrize("first", [0, 1, 2])
def test_a_full_disk_is_told_in_forward_and_the_next_step_is_right(
    folder: Path, monkeypatch: pytest.MonkeyPatch, release_after: int, first: int
) -> None:
    twins = Twins(folder, release_after=release_after)
    twins.check()
    with monkeypatch.context() as patch:
        refuse("pwrite", errno.ENOSPC, patch, lambda n: n >= first)
        text = told(lambda: twins.forward(twins.model))
        assert "No space left on device" in text and "set disk_dir" in text and str(folder) in text
        assert "of section '" in text and "stays on the device" in text and "float32" in text
    twins.check()
    assert twins.offloader.stats().bytes_out > 0
    twins.end()


@pytest.mark.parametrize("release_after", [0, 100])
def test_what_could_not_be_written_is_not_counted_as_moved(
    folder: Path, monkeypatch: pytest.MonkeyPatch, release_after: int
) -> None:
    """Also where nothing ever waits for the copies, since backward comes first."""
    twins = Twins(folder, release_after=release_after, keep_last=NUM_LAYERS - 1 if release_after == 0 else 0)
    with monkeypatch.context() as patch:
        refuse("pwrite", errno.ENOSPC, patch, lambda _: True)
        if release_after == 0:
            told(lambda: twins.forward(twins.model))
        else:
            loss = twins.forward(twins.model)
            time.sleep(0.1)  # the copies are over, well or badly
            twins.check(loss)
            del loss
    stats = twins.offloader.stats()
    assert stats.bytes_out == stats.copies_out == stats.bytes_in == 0
    kept = [reason for section in twins.offloader.report().sections for reason in section.kept]
    assert "the transfer failed" in kept
    twins.check()
    twins.end()


def test_what_could_not_be_written_stays_usable(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    twins = Twins(folder, release_after=100)
    with monkeypatch.context() as patch:
        refuse("pwrite", errno.ENOSPC, patch, lambda n: n % 3 == 1)
        loss = twins.forward(twins.model)
        num_told = 0
        for section in twins.offloader.sections:
            try:
                twins.offloader.release(section)
            except OffloadError as error:
                num_told += "No space left" in str(error)
        assert num_told > 0
        del section
    twins.check(loss)
    report = twins.offloader.report()
    assert any("failed" in reason for section in report.sections for reason in section.kept)
    del loss
    twins.check()
    twins.end()


def test_a_release_that_failed_can_be_asked_for_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    twins = Twins(folder, release_after=100)
    with monkeypatch.context() as patch:
        refuse("pwrite", errno.ENOSPC, patch, lambda _: True)
        loss = twins.forward(twins.model)
        for section in twins.offloader.sections[:2]:
            with pytest.raises(OffloadError, match="No space left"):
                twins.offloader.release(section)
    for section in twins.offloader.sections[:2]:
        twins.offloader.release(section)
        twins.offloader.prefetch(section)
    twins.check(loss)
    del loss
    twins.end()


class Save(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, seen: list[Any], *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(*tensors)
        ctx.seen = seen
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        ctx.seen.append([bits(tensor) for tensor in ctx.saved_tensors])
        return (grad, None, *[None] * len(ctx.saved_tensors))


@pytest.mark.parametrize("fails", [0, 1])
def test_half_an_allocation_that_was_written_is_not_taken_for_the_whole(
    folder: Path, monkeypatch: pytest.MonkeyPatch, fails: int
) -> None:
    offloader = lighterage.offload(
        nn.Identity(), keep_last=0, min_bytes=1, tier="disk", disk_dir=folder, release_after=100
    )
    whole, x, seen = torch.arange(20_000.0), torch.ones(1, requires_grad=True), []
    halves = whole[:10_000], whole[10_000:]
    expected = [[bits(halves[1])], [bits(halves[0])]]
    with monkeypatch.context() as patch:
        refuse("pwrite", errno.ENOSPC, patch, lambda n: n == fails)
        with offloader.section("first"):
            y = Save.apply(x, seen, halves[0])
        with offloader.section("second"):
            y = Save.apply(y, seen, halves[1])
        del whole, halves
        num_told = 0
        for section in offloader.sections:
            try:
                offloader.release(section)
            except OffloadError:
                num_told += 1
        assert num_told > 0
    y.backward()
    assert seen == expected
    del y, section
    assert offloader.stats().host_bytes_in_use == 0
    offloader.close()


def test_what_a_full_disk_kept_is_freed_with_its_graph(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    offloader = lighterage.offload(
        nn.Identity(), keep_last=0, min_bytes=1, tier="disk", disk_dir=folder, release_after=100
    )
    tensor, x = torch.ones(10_000), torch.ones(1, requires_grad=True)
    alive = StorageWeakRef(tensor.untyped_storage())
    refuse("pwrite", errno.ENOSPC, monkeypatch, lambda _: True)
    gc.disable()
    try:
        with offloader.section("full"):
            y = Save.apply(x, [], tensor)
        del tensor
        try:
            offloader.release(offloader.sections[0])
        except OffloadError:
            told = True
        assert told and not alive.expired()
        del y
        assert alive.expired(), "a failed copy holds the memory of a graph that is gone"
    finally:
        gc.enable()
    assert offloader.stats().host_bytes_in_use == 0
    offloader.close()


def test_a_file_that_cannot_be_made_is_told_and_the_next_step_is_right(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    twins = Twins(folder)
    real = os.open

    def refusing(path: Any, *args: Any, **kwargs: Any) -> int:
        if "lighterage-" in str(path):
            raise OSError(errno.EMFILE, "Too many open files")
        return real(path, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", refusing)
        text = told(lambda: twins.forward(twins.model))
        assert "needs a file in" in text and "Too many open files" in text
    twins.check()
    twins.end()


# --- reading back -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefetch_ahead", [0, 2])
@pytest.mark.parametrize("first", [0, 3])
def test_a_read_error_is_told_in_backward_and_the_next_step_is_right(
    folder: Path, monkeypatch: pytest.MonkeyPatch, first: int, prefetch_ahead: int
) -> None:
    twins = Twins(folder, prefetch_ahead=prefetch_ahead)
    loss = twins.forward(twins.model)
    with monkeypatch.context() as patch:
        refuse("preadv", errno.EIO, patch, lambda n: n >= first)
        text = told(loss.backward)
        assert "Input/output error" in text and "Check the disk" in text
    del loss
    twins.model.zero_grad()
    twins.check()
    twins.end()


def test_a_read_that_failed_does_not_spoil_another_graph(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    twins = Twins(folder, prefetch_ahead=0)
    doomed, good = twins.forward(twins.model), twins.forward(twins.model)
    with monkeypatch.context() as patch:
        refuse("preadv", errno.EIO, patch, lambda n: n == 0)
        told(doomed.backward)
    del doomed
    twins.model.zero_grad()
    twins.check(good)
    del good
    twins.end()


@pytest.mark.parametrize("checksums", [True, False])
def test_a_damaged_file_is_told_where_checksums_are_asked_for(
    folder: Path, monkeypatch: pytest.MonkeyPatch, checksums: bool
) -> None:
    twins = Twins(folder, disk_checksums=checksums)
    real = os.pwrite

    def flipping(fd: int, data: memoryview, at: int) -> int:
        done = real(fd, data, at)
        real(fd, bytes([data[5] ^ 1]), at + 5)
        return done

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", flipping)
        loss = twins.forward(twins.model)
    if checksums:
        text = told(loss.backward)
        assert "checksum of" in text and "damaged" in text
    else:
        loss.backward()  # the test's damage is real, and nothing looks
        expected = twins.forward(twins.plain)
        expected.backward()
        with pytest.raises(AssertionError):
            twins.check_grads()
        del expected
    del loss
    twins.model.zero_grad()
    twins.plain.zero_grad()
    twins.check()
    twins.end()


# --- room ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tier", ["disk", "host"])
@pytest.mark.parametrize("budget", [0, 9000, 20_000])
def test_what_finds_no_room_stays_and_the_report_says_so(folder: Path, tier: str, budget: int) -> None:
    of_disk = {"disk_dir": folder} if tier == "disk" else {"disk_dir": None}
    twins = Twins(folder, tier=tier, host_budget=budget, **of_disk)
    for _ in range(3):
        twins.check()
        stats, report = twins.offloader.stats(), twins.offloader.report()
        assert stats.host_bytes_peak <= budget and stats.host_bytes_reserved <= budget
        assert stats.kept_bytes > 0 and (stats.bytes_out > 0) == (budget > 0)
        assert any("budget" in reason for section in report.sections for reason in section.kept)
        assert "budget" in str(report)
    twins.end()


def test_an_unlimited_budget_moves_all_that_a_limited_one_kept(folder: Path) -> None:
    twins = Twins(folder)
    twins.check()
    stats = twins.offloader.stats()
    assert stats.bytes_out == stats.bytes_in > 0
    assert not any("budget" in reason for section in twins.offloader.report().sections for reason in section.kept)
    twins.end()


# --- the folder ---------------------------------------------------------------------------------------------------


def test_a_folder_that_does_not_serve_is_refused_at_once(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for bad in (tmp_path / "nowhere", tmp_path / "file"):
        with pytest.raises(ValueError, match="disk_dir must be a"):
            lighterage.offload(nn.Sequential(Layer()), tier="disk", disk_dir=bad)
    with pytest.raises(TypeError, match="disk_dir is a path"):
        lighterage.offload(nn.Sequential(Layer()), tier="disk", disk_dir=7)
    with pytest.raises(ValueError, match="disk tier alone"):
        lighterage.offload(nn.Sequential(Layer()), tier="host", disk_dir=tmp_path)


def test_a_refused_offloader_leaves_the_modules_as_they_were(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(Layer())
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(ValueError, match="must be writable"):
        lighterage.offload(model, tier="disk", disk_dir=tmp_path)
    assert type(model[0]) is Layer and type(model) is nn.Sequential


def test_nothing_has_a_name_while_bytes_rest(folder: Path) -> None:
    twins = Twins(folder)
    loss = twins.forward(twins.model)
    assert twins.offloader.stats().disk_bytes_in_use > 0
    assert list(folder.iterdir()) == []
    twins.check(loss)
    del loss
    twins.end()


def test_the_disk_space_is_given_back_on_close(folder: Path) -> None:
    twins = Twins(folder)
    twins.check()
    before = {os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd") if _is_ours(fd, folder)}
    assert len(before) == 1 and before.pop().endswith("(deleted)")
    twins.end()
    assert not [fd for fd in os.listdir("/proc/self/fd") if _is_ours(fd, folder)]


def _is_ours(fd: str, folder: Path) -> bool:
    try:
        return os.readlink(f"/proc/self/fd/{fd}").startswith(str(folder))
    except OSError:
        return False


def test_a_graph_that_outlives_close_is_read_from_the_file(folder: Path) -> None:
    twins = Twins(folder)
    loss = twins.forward(twins.model)
    twins.offloader.close()
    assert isinstance(twins.offloader, Offloader)
    twins.check(loss)
    del loss
    twins.end()
