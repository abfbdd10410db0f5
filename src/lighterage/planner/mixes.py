"""Which sections to move, to compute again and to keep, where a plan needs all three."""

from __future__ import annotations

from collections.abc import Sequence

from .frontier import Modes
from .plan import Mode
from .thrift import halving

# Note [What plans come to]
# Near the floor the best plans look alike: the first sections are moved, those after them computed again, and the last
# kept, whole or but for what is cheap. The first section is the one that backward comes to last; where the peak is
# there, computing it again frees nothing, while a copy of it has all of the step to leave and to come back. Where there
# is room for it by then, it is computed again, and those after it are moved. What the last sections save is gone by
# then. The path of the search has none of these: it computes sections again from the last to the first, and moves what
# is idle for long, whatever section it is of. From there it is many changes away, each of which makes the plan worse.
# Blocks of experts in bf16 were planned at 218 ms within 8.27 GiB before, and at 145 with these.

_MOST_HEAD = 3 / 8
"""Of the sections, those from the first on that are moved while others are computed again."""


def mixes(start: Modes, choices: Sequence[Sequence[Mode]]) -> list[tuple[Modes, frozenset[int]]]:
    """Modes, and the sections of which all is moved; such that any beginning of them is spread over all.

    Args:
        start: of each section, its mode where nothing is computed again.
        choices: of each section, the modes that it may have.
    """
    again = [section for section, modes in enumerate(choices) if "recompute" in modes]
    found: list[tuple[Modes, frozenset[int]]] = []
    for light in _light(start, choices):
        for head in _parts_of(len(again), _MOST_HEAD):
            for lead in (0, 1) if head > 1 else (0,):
                first = again[head - 1] + 1 if head else 0
                for count in _parts_of(len(again) - head, 1.0)[1:]:
                    modes: list[Mode] = [*start[:first], *light[first:]]
                    for section in again[:lead] + again[head : head + count]:
                        modes[section] = "recompute"
                    found.append((tuple(modes), frozenset(again[lead:head])))
    return [found[int(number)] for number in halving(range(len(found)))]


def _light(start: Modes, choices: Sequence[Sequence[Mode]]) -> list[Modes]:
    """Modes in which nothing is computed again as a whole: in part wherever it can be, and nowhere.

    But for the last section, whose saves backward needs at once.
    """
    light: list[Mode] = ["selective" if "selective" in modes else modes[0] for modes in choices]
    light[-1:] = start[-1:]
    return [tuple(light), start] if tuple(light) != start else [start]


def _parts_of(count: int, most: float) -> list[int]:
    """From 0 up to the part `most` of `count`, in eighths of it."""
    return sorted({round(count * eighths / 8) for eighths in range(1 + round(8 * most))})
