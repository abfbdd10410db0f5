"""The interpreter's switch interval while plans are made is short, and afterwards what it was."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest

from lighterage.engine.planning.making import _giving_way
from tests.engine.test_lanes_cpu import in_child

SHORT = pytest.approx(5e-5)
USUAL = 0.003


@pytest.fixture(autouse=True)
def usual() -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(USUAL)
    yield
    sys.setswitchinterval(before)


def test_plans_made_at_once_restore_it_when_the_last_is_made() -> None:
    first, second = _giving_way(), _giving_way()
    first.__enter__()
    second.__enter__()
    assert sys.getswitchinterval() == SHORT
    first.__exit__(None, None, None)
    assert sys.getswitchinterval() == SHORT
    second.__exit__(None, None, None)
    assert sys.getswitchinterval() == pytest.approx(USUAL)


def test_what_a_program_sets_meanwhile_stays() -> None:
    with _giving_way():
        sys.setswitchinterval(0.01)
    assert sys.getswitchinterval() == pytest.approx(0.01)


def test_a_child_forked_meanwhile_has_the_usual_one() -> None:
    def child() -> int:
        if sys.getswitchinterval() != pytest.approx(USUAL):
            return 1
        with _giving_way():  # and plans as ever
            pass
        return 0 if sys.getswitchinterval() == pytest.approx(USUAL) else 2

    with _giving_way():
        assert in_child(child) == 0
