"""The trial: steps in which sections of one class run in different ways, to see what each of the ways takes."""

from __future__ import annotations

import collections
import dataclasses
import statistics
from collections.abc import Collection, Mapping

from ...planner.plan import Fetch, Mode, Move, Plan, SectionPlan
from ...planner.timeline import Timeline
from .section_log import Role
from .step_log import StepLog
from .timelines import others_ms, phase_ms

# Note [What hooks and moves cost]
# Where the host is what a step waits for, steps that are measured take longer than any other: every save of theirs is
# recorded, and under a budget all of it moves. A plan made for such times would spend what is not there. And what it
# decides costs the host itself: hooks on each save of a section that does not rest, Python for each allocation that
# moves. On blocks of experts in FP8 three moved sections of eight cost 8 of 109 ms, none of them for the device.
# So in the trial sections of one class run side by side in each of the ways that a plan may choose: at rest, with
# hooks, moving what they save, and computed again, in part or whole. Of each phase the shortest of some steps counts,
# for an unquiet host is never too fast. The times of plans are those at rest; hooks, moves and what is computed again
# are charged to those that have them. What differs by little is noise, and taken for none: a step that waits for its
# device shows no difference at all.

TRIAL_STEPS = 5
"""On an accelerator. A CPU's steps are the host's in any case, and its trial is for what is computed again."""

SELECTIVE_OF_A_CLASS = 3
_MOST_OF_A_ROLE = 2
_LEAST_TO_MOVE = 4
"""Sections of a class below which none of them moves in the trial: then it is not known what that costs."""

_LEAST_MS = 1e-6
_NOISE = 0.025
"""Of a phase: what differs by less does not differ."""

_LEAST_AGAIN = 0.02
"""Of a section's forward: the least that computing again is taken to cost."""

_HOOKS_PART = 1 / 3
"""Of what moving sections take longer, where none was tried with hooks alone: what hooks are taken to cost. A save
costs some 15 µs, and there are three for each allocation that moves, at 80 to 100 µs."""

Pair = tuple[float, float]
"""Of a section's forward and of its backward."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Costs:
    """What one class of sections takes, in milliseconds."""

    parts: Pair = (1.0, 1.0)
    """Of what its phases took in the steps that were measured, what they take at rest."""

    hooks: Pair = (0.0, 0.0)
    selective: float | None = None
    """What selective recomputation takes beside them; None: not tried."""

    again: float | None = None
    """What computing it again as a whole takes; None: not tried."""

    moves: float = 0.0
    """What moving all that one of them saves takes beside hooks."""

    num_moves: int = 0


class Trial:
    """Which sections run in which way, and what was seen of it."""

    def __init__(self, *, on_host: bool) -> None:
        """`on_host`: whether the steps are the host's."""
        self._on_host = on_host
        self._roles: dict[int, Role] = {}
        self._classes: dict[int, object] = {}
        self.logs: list[StepLog] = []

    def choose(
        self, classes: Mapping[int, object], selective: Collection[int], again: Collection[int], *, limited: bool
    ) -> None:
        """Give sections their roles.

        Args:
            classes: by section, what is the same for those that take the same time.
            selective: the sections that can be computed again in part.
            again: those that can be as a whole.
            limited: whether steps must not take all that the device has: what is not computed again moves.
        """
        self.logs = []
        self._classes = dict(classes)
        self._roles = {}
        alike: dict[object, list[int]] = collections.defaultdict(list)
        for index in sorted(classes):
            if self._on_host or index != max(classes):  # backward begins with that one, and is not like the others
                alike[classes[index]].append(index)
        for indices in alike.values():
            if self._on_host:
                may = [index for index in indices if index in selective]
                self._roles.update(dict.fromkeys(_spread(may, SELECTIVE_OF_A_CLASS), "selective"))
            else:
                self._share_out(indices, selective, again, limited=limited)

    def _share_out(
        self, indices: list[int], selective: Collection[int], again: Collection[int], *, limited: bool
    ) -> None:
        count = len(indices)
        # Not late ones, which would be waited for where backward begins.
        moved = {indices[count // 3], indices[count // 6]} if count >= 6 else set(indices[:1])
        if count < _LEAST_TO_MOVE:
            moved = set()
        self._roles.update(dict.fromkeys(sorted(moved), "moved"))
        wanted: list[Role] = ["again", "selective"] if limited else ["selective", "bare", "hooked", "again"]
        given: collections.Counter[Role] = collections.Counter()
        turn = 0
        for index in indices:
            for _ in wanted if index not in moved else ():
                role = wanted[turn % len(wanted)]
                turn += 1
                full = given[role] == _MOST_OF_A_ROLE and role != ("again" if limited else "hooked")
                unable = (role == "selective" and index not in selective) or (role == "again" and index not in again)
                if not (full or unable):
                    given[role] += 1
                    self._roles[index] = role
                    break

    @property
    def bare(self) -> frozenset[int]:
        """The sections that rest."""
        return frozenset(index for index, role in self._roles.items() if role == "bare")

    @property
    def num_steps(self) -> int:
        """So many steps are for the trial."""
        if not self._roles:
            return 0
        return 1 if self._on_host else TRIAL_STEPS

    def plan(self, timeline: Timeline) -> Plan:
        """What the steps of the trial do: nothing is waited for, so that they go at the pace of steps under a plan."""
        modes: dict[Role, Mode] = {"selective": "selective", "again": "recompute"}
        forward = {p.section: number for number, p in enumerate(timeline.phases) if p.direction == "forward"}
        turn = next((n for n, p in enumerate(timeline.phases) if p.direction == "backward"), len(timeline.phases))
        sections: list[SectionPlan] = []
        back: list[Fetch] = []
        for index, record in enumerate(timeline.sections):
            role = self._roles.get(index)
            moves = record.allocations if role == "moved" else ()
            after = max(0, turn - 1 - forward.get(index, 0))
            sections.append(
                SectionPlan(
                    name=record.name,
                    mode="save" if role is None else modes.get(role, "save"),
                    moves=tuple(Move(save=a.save, release_after=after) for a in moves),
                )
            )
            back = [Fetch(section=index, save=a.save) for a in moves] + back
        fetches = tuple(tuple(back) if number == turn else () for number in range(len(timeline.phases)))
        return Plan(sections=tuple(sections), fetches=fetches)

    def others_part(self, timed: list[StepLog]) -> float:
        """Of the time that passes between sections in `timed`, what passes there in the trial."""
        if self._on_host or not self.logs:
            return 1.0
        usual, tried = (min(map(others_ms, logs), default=0.0) for logs in (timed, self.logs))
        return min(1.0, tried / usual) if usual > 0 else 1.0

    def costs(self, usual: Mapping[int, Pair]) -> dict[object, Costs]:
        """What each class takes. `usual`: of sections in the steps that were measured."""
        seen: dict[object, dict[str, list[Pair]]] = collections.defaultdict(lambda: collections.defaultdict(list))
        counts: dict[object, list[int]] = collections.defaultdict(list)
        told = {section.index: section for log in self.logs for section in log.sections}
        all_ms = [phase_ms(log) for log in self.logs]
        for index in self._roles if self.logs else ():
            # What became of it is what counts: one that was to be computed again may have been found not to be fit.
            roles = {section.role for log in self.logs for section in log.sections if section.index == index}
            times = [(ms["forward", index], ms["backward", index]) for ms in all_ms if _whole(ms, index)]
            if len(roles) == 1 and times and index in usual and (role := roles.pop()) is not None:
                # Places differ: the device slows down within a step. So each section is compared with itself.
                forward = min(one for one, _ in times) / max(usual[index][0], _LEAST_MS)
                backward = min(one for _, one in times) / max(usual[index][1], _LEAST_MS)
                seen[self._classes[index]][role].append((forward, backward))
                if role == "moved":
                    counts[self._classes[index]].append(told[index].num_moved)
        found = {}
        for one in set(self._classes.values()):
            normal = [usual[index] for index, kind in self._classes.items() if kind == one and index in usual]
            if normal:
                forward, backward = _median(normal)
                parts = {role: _median(each) for role, each in seen[one].items()}
                roles_ms = {role: (part * forward, other * backward) for role, (part, other) in parts.items()}
                found[one] = _costs(roles_ms, (forward, backward), round(statistics.median(counts[one] or [0])))
        return found


def _costs(seen: Mapping[str, Pair], usual: Pair, num_moves: int) -> Costs:
    bare, again = seen.get("bare"), seen.get("again")
    if bare is None and again is not None:
        # Its forward is nearly bare; its backward holds another one, of which the device may have hidden any part.
        bare = min(again[0], usual[0]), usual[1]
    selective = seen.get("selective")
    hooked = seen.get("hooked")
    if bare is None:
        return Costs(selective=None if selective is None else _again(selective, hooked or usual, usual))
    parts = _part(bare[0], usual[0]), _part(bare[1], usual[1])
    bare = parts[0] * usual[0], parts[1] * usual[1]
    hooks, moves = (0.0, 0.0), 0.0
    moved = seen.get("moved")
    if hooked is not None:
        hooks = _beyond(hooked, bare)
        if moved is not None:
            moves = sum(_beyond(moved, _sum(bare, hooks)))
    elif moved is not None:
        beyond = _beyond(moved, bare)
        hooks = (_HOOKS_PART * beyond[0], _HOOKS_PART * beyond[1])
        moves = sum(beyond) - sum(hooks)
    return Costs(
        parts=parts,
        hooks=hooks,
        selective=None if selective is None else _again(selective, _sum(bare, hooks), bare),
        again=None if again is None else _again(again, bare, bare),
        moves=moves,
        num_moves=num_moves,
    )


def _part(bare: float, usual: float) -> float:
    return bare / usual if bare < (1 - _NOISE) * usual else 1.0


def _again(again: Pair, without: Pair, bare: Pair) -> float:
    """What it takes beyond `without`. It takes some time, whatever the noise says."""
    return max(_LEAST_AGAIN * bare[0], sum(again) - sum(without))


def _beyond(one: Pair, other: Pair) -> Pair:
    """What `one` takes longer than `other`, where that is more than noise."""
    forward, backward = (a - b if a > (1 + _NOISE) * b else 0.0 for a, b in zip(one, other, strict=True))
    return forward, backward


def _sum(one: Pair, other: Pair) -> Pair:
    return one[0] + other[0], one[1] + other[1]


def _median(times: list[Pair]) -> Pair:
    return statistics.median(one for one, _ in times), statistics.median(one for _, one in times)


def _whole(ms: Mapping[tuple[str, int], float], index: int) -> bool:
    return ("forward", index) in ms and ("backward", index) in ms


def _spread(indices: list[int], num: int) -> list[int]:
    """Up to `num` of `indices`, from the middle of as many equal parts."""
    num = min(num, len(indices))
    return [indices[(2 * part + 1) * len(indices) // (2 * num)] for part in range(num)]
