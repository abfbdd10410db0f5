"""Claims about the disk tier: bytes back as they went, nothing left behind, every failure told."""

from __future__ import annotations

import errno
import gc
import os
import stat
import threading
from pathlib import Path

import pytest
import torch

from lighterage.engine import disk as disk_module
from lighterage.engine.disk import DiskStore, Extent
from lighterage.errors import OffloadError


class ManualFence:
    """A fence that finishes when it is waited for."""

    def __init__(self) -> None:
        self.finished = False

    def done(self) -> bool:
        return self.finished

    def wait(self) -> None:
        self.finished = True

    def order(self) -> None:
        self.wait()


def noise(nbytes: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, (nbytes,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def must(extent: Extent | None) -> Extent:
    assert extent is not None
    return extent


@pytest.mark.parametrize("checksums", [False, True])
@pytest.mark.parametrize("nbytes", [0, 1, 511, 100_003])
def test_what_is_read_is_what_was_written(tmp_path: Path, nbytes: int, checksums: bool) -> None:
    store = DiskStore(tmp_path, budget=None, checksums=checksums)
    before, extent, after = (must(store.acquire(n)) for n in (700, nbytes, 700))
    data = {extent: noise(nbytes, 1), before: noise(700, 2), after: noise(700, 3)}
    for where, tensor in data.items():
        store.write(where, tensor)
    for where, tensor in data.items():
        back = torch.zeros_like(tensor)
        store.read(where, back)
        assert torch.equal(back, tensor)
    store.close()


def test_ranges_of_an_extent_move_on_their_own(tmp_path: Path) -> None:
    store = DiskStore(tmp_path, budget=None, checksums=True)
    extent, data = must(store.acquire(1000)), noise(1000)
    store.write(extent, data[:300])
    store.write(extent, data[300:], offset=300)
    store.write(extent, data[200:400], offset=200)
    back = torch.zeros(500, dtype=torch.uint8)
    store.read(extent, back, offset=150)
    assert torch.equal(back, data[150:650])


def test_short_writes_and_reads_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pwrite, preadv = os.pwrite, os.preadv
    monkeypatch.setattr(os, "pwrite", lambda fd, view, at: pwrite(fd, view[:1000], at))
    monkeypatch.setattr(os, "preadv", lambda fd, views, at: preadv(fd, [views[0][:777]], at))
    store, data, back = DiskStore(tmp_path, budget=None), noise(12_345), torch.zeros(12_345, dtype=torch.uint8)
    extent = must(store.acquire(12_345))
    store.write(extent, data)
    store.read(extent, back)
    assert torch.equal(back, data)


def test_large_transfers_go_in_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk_module, "_CHUNK", 4096)
    store, data, back = DiskStore(tmp_path, budget=None), noise(10_000), torch.zeros(10_000, dtype=torch.uint8)
    extent = must(store.acquire(10_000))
    store.write(extent, data)
    store.read(extent, back)
    assert torch.equal(back, data)


def test_nothing_has_a_name_while_the_store_is_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    modes: list[int] = []
    os_open = os.open

    def watched(path: str, flags: int, mode: int = 0o777) -> int:
        fd = os_open(path, flags, mode)
        if "lighterage-" in str(path):
            modes.append(stat.S_IMODE(os.stat(os.path.dirname(path)).st_mode))
            modes.append(stat.S_IMODE(os.fstat(fd).st_mode))
            assert not os.get_inheritable(fd) and flags & os.O_EXCL
        return fd

    monkeypatch.setattr(os, "open", watched)
    store = DiskStore(tmp_path, budget=None)
    assert store._fd is None, "the file is made when it is first needed"
    store.write(must(store.acquire(5000)), noise(5000))
    assert modes == [0o700, 0o600]
    assert list(tmp_path.iterdir()) == []
    assert store._fd is not None and os.fstat(store._fd).st_nlink == 0


def test_a_failed_open_leaves_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object) -> int:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(os, "open", refused)
    with pytest.raises(OffloadError, match=r"needs a file in .*Too many open files"):
        DiskStore(tmp_path, budget=None).acquire(1)
    assert list(tmp_path.iterdir()) == []


def test_a_bad_directory_is_refused_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"existing folder; .*/nowhere does not exist. Create it"):
        DiskStore(tmp_path / "nowhere", budget=None)
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="is not a folder"):
        DiskStore(tmp_path / "file", budget=None)
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(ValueError, match=r"must be writable; .* is not. Change its permissions"):
        DiskStore(tmp_path, budget=None)


def test_a_full_disk_is_an_error_that_says_where_and_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = DiskStore(tmp_path, budget=None)
    extent, pwrite = must(store.acquire(9000)), os.pwrite

    def nearly_full(fd: int, view: memoryview, at: int) -> int:
        if at >= extent.offset + 4096:
            raise OSError(errno.ENOSPC, "No space left on device")
        return pwrite(fd, view[:4096], at)

    monkeypatch.setattr(os, "pwrite", nearly_full)
    with pytest.raises(OffloadError) as caught:
        store.write(extent, noise(9000))
    text = str(caught.value)
    assert "writing 9000 bytes" in text and "after 4096 bytes" in text and str(tmp_path) in text
    assert "No space left on device" in text and "are free there" in text and "set disk_dir" in text
    assert isinstance(caught.value.__cause__, OSError)


def test_a_read_past_the_end_of_the_file_is_an_error(tmp_path: Path) -> None:
    store = DiskStore(tmp_path, budget=None)
    extent = must(store.acquire(1000))
    with pytest.raises(OffloadError, match=r"reading 1000 bytes .* failed after 0 bytes .*no byte was moved"):
        store.read(extent, torch.zeros(1000, dtype=torch.uint8))


def test_an_input_output_error_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> int:
        raise OSError(errno.EIO, "Input/output error")

    store = DiskStore(tmp_path, budget=None)
    extent = must(store.acquire(10))
    monkeypatch.setattr(os, "preadv", broken)
    with pytest.raises(OffloadError, match=r"Input/output error.*Check the disk"):
        store.read(extent, torch.zeros(10, dtype=torch.uint8))


def test_a_checksum_finds_a_flipped_bit(tmp_path: Path) -> None:
    store = DiskStore(tmp_path, budget=None, checksums=True)
    extent, data = must(store.acquire(5000)), noise(5000)
    store.write(extent, data)
    assert store._fd is not None
    os.pwrite(store._fd, bytes([int(data[123]) ^ 4]), extent.offset + 123)
    with pytest.raises(OffloadError, match=r"the checksum of 4.9 KiB at byte 0 .*damaged"):
        store.read(extent, torch.zeros(5000, dtype=torch.uint8))


def test_the_budget_is_honoured_and_extents_are_used_again(tmp_path: Path) -> None:
    store = DiskStore(tmp_path, budget=10_240)
    extent = must(store.acquire(10_000))
    assert store.acquire(1000) is None
    assert store.refusal == "disk budget of 10.0 KiB is spent"
    fence = ManualFence()
    extent.retire([fence])
    assert store.bytes_in_use == 0
    assert must(store.acquire(10_000)).fences == (fence,)
    assert (store.bytes_peak, store.bytes_reserved) == (10_000, 10_240)


def test_close_waits_for_fences_and_running_copies_and_frees_the_space(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = DiskStore(tmp_path, budget=None)
    extent, fence = must(store.acquire(100)), ManualFence()
    must(store.acquire(100)).retire([fence])
    started, go_on, pwrite = threading.Event(), threading.Event(), os.pwrite

    def slow(fd: int, view: memoryview, at: int) -> int:
        started.set()
        go_on.wait(10)
        return pwrite(fd, view, at)

    monkeypatch.setattr(os, "pwrite", slow)
    writer = threading.Thread(target=store.write, args=(extent, noise(100)))
    writer.start()
    started.wait(10)
    extent.retire()
    closer = threading.Thread(target=store.close)
    closer.start()
    closer.join(0.05)
    assert closer.is_alive(), "close returned while a write was running"
    go_on.set()
    closer.join(10)
    writer.join(10)
    assert fence.finished and store._fd is None and store.bytes_reserved == 0
    store.close()
    assert store.acquire(1) is None and store.refusal == "the disk store is closed"
    with pytest.raises(OffloadError, match="Close the offloader after the last backward"):
        store.read(extent, torch.zeros(100, dtype=torch.uint8))


def test_an_extent_that_outlives_close_stays_readable(tmp_path: Path) -> None:
    store, data, back = DiskStore(tmp_path, budget=None), noise(100), torch.zeros(100, dtype=torch.uint8)
    extent = must(store.acquire(100))
    store.write(extent, data)
    store.close()
    assert store.acquire(1) is None
    store.read(extent, back)
    assert torch.equal(back, data)
    extent.retire()
    store.close()
    assert store._fd is None and store.bytes_reserved == 0


def test_a_dropped_store_closes_its_file(tmp_path: Path) -> None:
    store = DiskStore(tmp_path, budget=None)
    must(store.acquire(1))
    fd = store._fd
    assert fd is not None
    del store
    gc.collect()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)


@pytest.mark.filterwarnings("ignore:This process.*is multi-threaded:DeprecationWarning")
def test_a_forked_child_is_told_that_the_graph_is_its_parents(tmp_path: Path) -> None:
    store, data = DiskStore(tmp_path, budget=None), noise(1000)
    extent = must(store.acquire(1000))
    store.write(extent, data)
    child = os.fork()
    if child == 0:
        told = 0
        for call in (lambda: store.acquire(1), lambda: store.write(extent, data), lambda: store.read(extent, data)):
            try:
                call()
            except OffloadError as error:
                told += "belongs to the parent process" in str(error)
        extent.retire()
        store.close()
        os._exit(0 if told == 3 else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    back = torch.zeros(1000, dtype=torch.uint8)
    store.read(extent, back)
    assert torch.equal(back, data)
