"""Claims about free ranges, against a model that marks every byte."""

from __future__ import annotations

import random
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lighterage.engine.free_list import FreeList

programs = st.lists(
    st.one_of(
        st.tuples(st.just("take"), st.integers(1, 12)),
        st.tuples(st.just("give"), st.integers(0, 50)),
        st.tuples(st.just("grow"), st.integers(1, 20)),
    ),
    max_size=80,
)


@given(programs)
def test_any_program_matches_a_byte_by_byte_model(program: list[tuple[str, int]]) -> None:
    free = FreeList()
    taken: list[tuple[int, int]] = []
    used: list[bool] = []
    for action, number in program:
        if action == "grow":
            free.grow(number)
            used += [False] * number
        elif action == "take":
            offset = free.take(number)
            text = "".join(".x"[byte] for byte in used)
            if offset is None:
                assert "." * number not in text
                continue
            assert text[offset : offset + number] == "." * number, "a range is handed out once"
            used[offset : offset + number] = [True] * number
            taken.append((offset, number))
        elif taken:
            offset, nbytes = taken.pop(number % len(taken))
            free.give(offset, nbytes)
            used[offset : offset + nbytes] = [False] * nbytes
        assert (free.size, free.in_use) == (len(used), sum(used))
        model = "".join(".x"[byte] for byte in used)
        assert free.tail_free == len(model) - len(model.rstrip("."))
        assert ["." * (hi - lo) for lo, hi in free.free_ranges()] == [run for run in model.split("x") if run]
    for offset, nbytes in taken:
        free.give(offset, nbytes)
    assert free.free_ranges() == ([(0, free.size)] if free.size else [])


def test_the_smallest_hole_that_fits_serves_and_the_lowest_of_equals() -> None:
    free = FreeList()
    free.grow(100)
    for nbytes in (10, 1, 4, 1, 4, 1):
        free.take(nbytes)
    free.give(16, 4)
    free.give(11, 4)
    free.give(0, 10)
    assert [free.take(nbytes) for nbytes in (3, 4, 8, 8)] == [11, 16, 0, 21]


def test_last_in_first_out_lifetimes_leave_no_holes() -> None:
    free = FreeList()
    sizes = [random.Random(0).randrange(1, 1000) for _ in range(200)]
    for _ in range(3):
        held = []
        for nbytes in sizes:
            if nbytes > free.tail_free:
                free.grow(nbytes - free.tail_free)
            held.append((free.take(nbytes), nbytes))
        assert free.size == sum(sizes)
        for offset, nbytes in reversed(held):
            assert offset is not None
            free.give(offset, nbytes)


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(1, 30), st.integers(0, 6)), min_size=1, max_size=60))
def test_a_program_that_is_repeated_never_grows_the_space_again(program: list[tuple[int, int]]) -> None:
    free = FreeList()
    sizes = []
    for _ in range(3):
        held: list[tuple[int, int]] = []
        for nbytes, num_given in program:
            offset = free.take(nbytes)
            if offset is None:
                free.grow(nbytes - free.tail_free + nbytes // 3)
                offset = free.take(nbytes)
                assert offset is not None
            held.append((offset, nbytes))
            for _ in range(min(num_given, len(held))):
                free.give(*held.pop(nbytes % len(held)))
        for rest in held:
            free.give(*rest)
        sizes.append(free.size)
    assert sizes[0] == sizes[1] == sizes[2]


@pytest.mark.parametrize("again", [(0, 8), (4, 4), (2, 8), (12, 4), (14, 8), (-2, 2), (5, 0)])
def test_a_range_given_back_twice_or_from_outside_is_an_assertion_error(again: tuple[int, int]) -> None:
    free = FreeList()
    free.grow(16)
    assert free.take(8) == 0
    assert free.take(4) == 8
    free.give(0, 8)
    with pytest.raises(AssertionError):
        free.give(*again)
    assert free.in_use == 4


def test_thousands_of_blocks_stay_fast() -> None:
    free, rng = FreeList(), random.Random(1)
    free.grow(1 << 30)
    begun = time.perf_counter()
    held = [(free.take(nbytes), nbytes) for nbytes in (rng.randrange(1, 5000) for _ in range(5000))]
    rng.shuffle(held)
    for offset, nbytes in held:
        assert offset is not None
        free.give(offset, nbytes)
    assert time.perf_counter() - begun < 2.0, "10,000 calls; a scan for each would take far longer"
    assert free.free_ranges() == [(0, 1 << 30)]
