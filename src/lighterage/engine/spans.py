"""Byte intervals: which bytes of an allocation still have to move, and in how few copies."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

Span = tuple[int, int]
"""A half-open range of bytes, `[lo, hi)`. It is empty when `hi <= lo`."""


def merge(spans: Iterable[Span], gap: int = 0) -> list[Span]:
    """The union of `spans`, sorted and disjoint, with neighbours joined that lie at most `gap` bytes apart.

    The joined gap belongs to the result: one copy over a small hole costs less than two copies.

    >>> merge([(8, 12), (0, 4), (4, 6)], gap=2)
    [(0, 12)]
    """
    merged: list[Span] = []
    for lo, hi in sorted(spans):
        if hi <= lo:
            continue
        if merged and lo - merged[-1][1] <= gap:
            merged[-1] = (merged[-1][0], max(merged[-1][1], hi))
        else:
            merged.append((lo, hi))
    return merged


def subtract(span: Span, covered: Sequence[Span]) -> list[Span]:
    """The parts of `span` that lie outside `covered`, which must be sorted and disjoint.

    >>> subtract((0, 10), [(2, 4), (8, 12)])
    [(0, 2), (4, 8)]
    """
    lo, hi = span
    missing: list[Span] = []
    for covered_lo, covered_hi in covered:
        if covered_hi <= lo:
            continue
        if covered_lo >= hi:
            break
        if covered_lo > lo:
            missing.append((lo, covered_lo))
        lo = covered_hi
    if lo < hi:
        missing.append((lo, hi))
    return missing


def covers(covered: Sequence[Span], span: Span) -> bool:
    """Whether every byte of `span` lies in `covered`, which must be sorted and disjoint. An empty span is covered.

    >>> covers([(0, 4), (4, 8)], (2, 6))
    True
    """
    return not subtract(span, covered)


def total(spans: Iterable[Span]) -> int:
    """The number of bytes in the union of `spans`: a byte that several spans name counts once.

    >>> total([(0, 4), (2, 6)])
    6
    """
    return sum(hi - lo for lo, hi in merge(spans))
