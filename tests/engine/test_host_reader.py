"""What a kernel reads from the host is what is there; and it is asked only where the engine is taken."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap

import pytest
import torch

from lighterage.engine import host_reader
from lighterage.engine.host_reader import HostReader

INTERPRETED = """
    import random, torch
    from lighterage.engine.read_kernel import read

    chance = random.Random(0)
    for number in range(40):
        nbytes = chance.choice([0, 1, 7, 8, 16, 4095, 4096, 16384, 16385, 40000, 50001])
        at, to = chance.choice([0, 1, 8, 16]), chance.choice([0, 3, 8])
        source = torch.randint(0, 256, (nbytes + at,), dtype=torch.uint8)
        memory = torch.full((nbytes + to + 64,), 7, dtype=torch.uint8)
        read(memory[to : to + nbytes], source[at:])
        assert torch.equal(memory[to : to + nbytes], source[at:]), (nbytes, at, to)
        assert bool((memory[:to] == 7).all()) and bool((memory[to + nbytes :] == 7).all()), "it wrote beside"
    print("equal")
"""


def test_the_kernel_copies_bytes_of_any_number_and_alignment() -> None:
    pytest.importorskip("triton")
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(INTERPRETED)],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "equal\n"), done.stderr


def test_nothing_is_read_before_the_kernel_is_there_which_is_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[str] = []
    monkeypatch.setattr(host_reader, "_has_triton", lambda: True)
    monkeypatch.setattr("lighterage.background.start", lambda _, name: begun.append(name))
    reader = HostReader(torch.device("cuda", 0))
    to, parts = torch.zeros(5, dtype=torch.uint8), (torch.ones(2, dtype=torch.uint8), torch.full((3,), 2).byte())
    assert not reader.read([(to, parts)]) and not reader.read([(to, parts)])
    assert len(begun) == 1 and not to.any()
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    reader._read = lambda here, there: here.copy_(there)  # type: ignore[assignment,return-value]
    assert reader.read([(to, parts)]) and to.tolist() == [1, 1, 2, 2, 2]


def test_without_triton_nothing_is_begun(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_reader, "_has_triton", lambda: False)
    monkeypatch.setattr("lighterage.background.start", lambda *_: pytest.fail("began"))
    assert not HostReader(torch.device("cuda", 0)).read([])


def test_a_kernel_that_cannot_be_compiled_is_told_and_leaves_all_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise RuntimeError("Failed to find C compiler")

    monkeypatch.setattr(host_reader, "_has_triton", lambda: True)
    monkeypatch.setattr("lighterage.background.start", lambda run, _: run())
    reader = HostReader(torch.device("cuda", 0))
    monkeypatch.setattr(reader, "make_ready", fail)
    with pytest.warns(UserWarning, match="not compiled .RuntimeError: Failed to find C compiler"):
        assert not reader.read([])
    assert not reader.read([])


def test_nothing_is_read_while_another_device_is_the_current_one(monkeypatch: pytest.MonkeyPatch) -> None:
    reader = HostReader(torch.device("cuda", 1))
    reader._read = lambda *_: pytest.fail("it would run on the other device")  # type: ignore[assignment]
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    assert not reader.read([(torch.zeros(1, dtype=torch.uint8), (torch.ones(1, dtype=torch.uint8),))])
