"""Claims about byte intervals, each against a set of single bytes."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from lighterage.engine.spans import Span, covers, merge, subtract, total

spans = st.lists(st.tuples(st.integers(0, 40), st.integers(0, 40)), max_size=8)


def bytes_of(some: list[Span]) -> set[int]:
    return {byte for lo, hi in some for byte in range(lo, hi)}


@given(spans)
def test_merge_is_the_sorted_disjoint_union(some: list[Span]) -> None:
    merged = merge(some)
    assert bytes_of(merged) == bytes_of(some)
    assert all(lo < hi for lo, hi in merged)
    assert all(before[1] < after[0] for before, after in pairwise(merged))


@given(spans, st.integers(0, 10))
def test_merge_joins_exactly_the_neighbours_within_the_gap(some: list[Span], gap: int) -> None:
    merged = merge(some, gap)
    assert all(after[0] - before[1] > gap for before, after in pairwise(merged))
    assert bytes_of(some) <= bytes_of(merged)
    exact = merge(some)
    filled = {byte for (_, lo), (hi, _) in pairwise(exact) if hi - lo <= gap for byte in range(lo, hi)}
    assert bytes_of(merged) == bytes_of(some) | filled


@given(spans, st.tuples(st.integers(0, 40), st.integers(0, 40)))
def test_subtract_and_covers_agree_with_sets(some: list[Span], span: Span) -> None:
    covered = merge(some)
    missing = subtract(span, covered)
    assert bytes_of(missing) == bytes_of([span]) - bytes_of(covered)
    assert missing == merge(missing)
    assert covers(covered, span) == (not missing)


@given(spans)
def test_total_counts_every_byte_once(some: list[Span]) -> None:
    assert total(some) == len(bytes_of(some))


def test_adjacent_pieces_cover_a_span_across_them() -> None:
    assert covers([(0, 4), (4, 8)], (2, 6))
    assert not covers([(0, 4), (5, 8)], (2, 6))
