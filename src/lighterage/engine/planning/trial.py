"""The trial: steps in which sections of one class run in different ways, to see what each of the ways takes."""

from __future__ import annotations

import collections
import dataclasses
import statistics
from collections.abc import Callable, Collection, Mapping

from ...planner.plan import Fetch, Mode, Move, Plan, SectionPlan
from ...planner.timeline import Timeline
from .section_log import Role
from .step_log import StepLog
from .timelines import others_ms, phase_ms, waiting_phases

# Note [What hooks and moves cost]
# Where the host is what a step waits for, steps that are measured take longer than any other: every save of theirs is
# recorded, and under a budget all of it moves. A plan made for such times would spend what is not there. And what it
# decides costs the host itself: hooks on each save of a section that does not rest, Python for each allocation that
# moves. On blocks of experts in FP8 three moved sections of eight cost 8 of 109 ms, none of them for the device.
# So in the trial sections of one class run in each of the ways that a plan may choose: at rest, with hooks, moving what
# they save, and computed again, in part or whole; in each step another one in another way, so that neither places in a
# step nor moments of an unquiet host speak for a way. Each section is compared with itself as it was measured. Where
# the device had its work before it wanted it, host time costs nothing, and what differs is noise.

TRIAL_STEPS = 6
"""On an accelerator. A CPU's steps are the host's in any case, and its trial is for what is computed again."""

_SELECTIVE_OF_A_CLASS = 3
_LEAST_TO_MOVE = 4
"""Sections of a class below which none of them moves in the trial: then it is not known what that costs."""

_NOISE = 0.025
"""Of a phase: what differs by less does not differ."""

_ROLES_TO_WAIT: tuple[Role, ...] = ("bare", "hooked", "moved")

_LEAST_AGAIN = 0.02
"""Of a section's forward: the least that computing again is taken to cost."""

_MOSTLY = 0.5
"""Of the phases of a class: where the device waits for its host in more than so many, it does in all."""

_HOOKS_PART = 1 / 3
"""Of what moving sections take longer, where none was tried with hooks alone: what hooks are taken to cost. In a block
of experts, 33 saves at 12 to 18 µs beside 19 allocations that move, at 80 to 110 µs: between a fifth and a third."""

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
        self._roles: list[dict[int, Role]] = []
        """Of each step."""
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
        alike: dict[object, list[int]] = collections.defaultdict(list)
        for index in sorted(classes):
            if self._on_host or index != max(classes):  # backward begins with that one, and is not like the others
                alike[classes[index]].append(index)
        self._roles = [{} for _ in range(1 if self._on_host else TRIAL_STEPS)]
        for indices in alike.values():
            if self._on_host:
                may = [index for index in indices if index in selective]
                self._roles[0].update(dict.fromkeys(_spread(may, _SELECTIVE_OF_A_CLASS), "selective"))
                continue
            able: dict[Role, Collection[int]] = {"selective": selective, "again": again}
            wanted: list[Role] = ["again", "selective"] if limited else ["selective", "bare", "hooked", "again"]
            for step, roles in enumerate(self._roles):
                roles.update(_share_out(indices, wanted, able, step))
        if not any(self._roles):
            self._roles = []

    def bare(self, step: int) -> frozenset[int]:
        """The sections that rest in that step of the trial."""
        return frozenset(index for index, role in self._roles[step].items() if role == "bare")

    @property
    def num_steps(self) -> int:
        """So many steps are for the trial."""
        return len(self._roles)

    def plan(self, timeline: Timeline, step: int) -> Plan:
        """What that step of the trial does: nothing is waited for, so that it goes at the pace of planned steps."""
        modes: dict[Role, Mode] = {"selective": "selective", "again": "recompute"}
        forward = {p.section: number for number, p in enumerate(timeline.phases) if p.direction == "forward"}
        turn = next((n for n, p in enumerate(timeline.phases) if p.direction == "backward"), len(timeline.phases))
        sections: list[SectionPlan] = []
        back: list[Fetch] = []
        for index, record in enumerate(timeline.sections):
            role = self._roles[step].get(index)
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

    def rested(self) -> set[object]:
        """The classes of which a section ran at rest, and backward was seen to come to it."""
        found = set()
        for log in self.logs:
            ms = phase_ms(log)
            for section in log.sections:
                if section.index is not None and section.role == "bare" and _whole(ms, section.index):
                    found.add(self._classes[section.index])
        return found

    def others_part(self, timed: list[StepLog]) -> float:
        """Of the time that passes between sections in `timed`, what passes there in the trial."""
        if self._on_host or not self.logs:
            return 1.0
        usual, tried = (min(map(others_ms, logs), default=0.0) for logs in (timed, self.logs))
        return min(1.0, tried / usual) if usual > 0 else 1.0

    def costs(self, usual: Mapping[int, Pair]) -> dict[object, Costs]:
        """What each class takes. `usual`: of sections in the steps that were measured."""
        seen: dict[object, dict[str, list[Pair]]] = collections.defaultdict(lambda: collections.defaultdict(list))
        waits: dict[object, list[tuple[bool, bool]]] = collections.defaultdict(list)
        counts: dict[object, list[int]] = collections.defaultdict(list)
        derived: dict[object, list[float]] = collections.defaultdict(list)
        for log, roles in zip(self.logs, self._roles, strict=False):
            ms, waiting = phase_ms(log), waiting_phases(log)
            for section in log.sections:
                index = section.index
                if index is None or index not in roles or index not in usual or not _whole(ms, index):
                    continue
                one = self._classes[index]
                # What became of it is what counts: one that was to be computed again may not have been fit for it.
                role = section.role or "hooked"
                forward, backward = usual[index]
                if not (forward > 0 and backward > 0):
                    continue
                seen[one][role].append((ms["forward", index] / forward, ms["backward", index] / backward))
                if role in _ROLES_TO_WAIT:
                    waits[one].append((waiting["forward", index], waiting["backward", index]))
                if role == "moved":
                    counts[one].append(section.num_moved)
                if section.stopwatch is not None and (derived_ms := section.stopwatch.ms()) is not None:
                    derived[one].append(derived_ms)
        found = {}
        for one in set(self._classes.values()):
            normal = [usual[index] for index, kind in self._classes.items() if kind == one and index in usual]
            if normal:
                forward, backward = _each(normal, statistics.median)
                parts = {role: _each(each, statistics.median) for role, each in seen[one].items()}
                roles_ms = {role: (part * forward, other * backward) for role, (part, other) in parts.items()}
                waiting_parts = _each([(float(f), float(b)) for f, b in waits[one]] or [(1.0, 1.0)], statistics.mean)
                found[one] = _costs(
                    roles_ms,
                    (forward, backward),
                    (waiting_parts[0] > _MOSTLY, waiting_parts[1] > _MOSTLY),
                    round(statistics.median(counts[one] or [0])),
                    statistics.median(derived[one]) if derived[one] else None,
                )
        return found


def _share_out(
    indices: list[int], wanted: list[Role], able: Mapping[Role, Collection[int]], step: int
) -> dict[int, Role]:
    """The roles of one class of sections in one step of the trial."""
    roles: dict[int, Role] = {}
    if len(indices) >= _LEAST_TO_MOVE:
        # Not late ones, which would be waited for where backward begins.
        early = indices[: len(indices) // 2]
        for number in range(1 if len(indices) < 6 else 2):
            roles[early[(step + number * max(1, len(early) // 2)) % len(early)]] = "moved"
    turn = step
    for index in indices:
        for _ in wanted if index not in roles else ():
            role = wanted[turn % len(wanted)]
            turn += 1
            if role not in able or index in able[role]:
                roles[index] = role
                break
    return roles


def _costs(
    seen: Mapping[str, Pair],
    usual: Pair,
    waiting: tuple[bool, bool],
    num_moves: int,
    derived_ms: float | None = None,
) -> Costs:
    """What the ways of one class cost.

    Args:
        seen: by role, what phases took.
        usual: what they took in the steps that were measured.
        waiting: whether the device waits for its host, in forward and in backward.
        num_moves: of a section that moves.
        derived_ms: what backward took to derive what selective recomputation does not save, if it was timed.
    """
    bare, hooked, moved = (seen.get(role) for role in ("bare", "hooked", "moved"))
    selective, again = seen.get("selective"), seen.get("again")
    # With hooks, or computed again, a forward is nearly bare; no backward is, and its bounds differ from way to way.
    rests = [one for one in (bare, hooked, again) if one is not None]
    least = min((one[0] for one in rests), default=usual[0]), usual[1] if bare is None else bare[1]
    parts = _where(waiting, (_part(least[0], usual[0]), _part(least[1], usual[1])), (1.0, 1.0))
    base = parts[0] * usual[0], parts[1] * usual[1]
    hooks, moves = (0.0, 0.0), 0.0
    if hooked is not None:
        hooks = _where(waiting, _beyond(hooked, base))
        if moved is not None:
            moves = sum(_where(waiting, _beyond(moved, _sum(base, hooks))))
    elif moved is not None and rests:
        beyond = _where(waiting, _beyond(moved, base))
        hooks = (_HOOKS_PART * beyond[0], _HOOKS_PART * beyond[1])
        moves = sum(beyond) - sum(hooks)
    # Where the host is not waited for, a forward takes what it takes, and a backward what the device computes more.
    beside = hooked or bare or moved or usual
    return Costs(
        parts=parts,
        hooks=hooks,
        selective=None if selective is None else _again(selective, base, hooks, beside, waiting, derived_ms),
        again=None if again is None or not any(waiting) else _again(again, base, (0.0, 0.0), beside, waiting),
        moves=moves,
        num_moves=num_moves,
    )


def _again(
    seen: Pair,
    base: Pair,
    hooks: Pair,
    beside: Pair,
    waiting: tuple[bool, bool],
    timed_ms: float | None = None,
) -> float:
    """What it takes beyond base and hooks. It takes some time, whatever the noise says.

    `timed_ms`: of its backward, where that was timed by itself: half a millisecond of 15 is lost in what phases differ.
    """
    forward = seen[0] - base[0] - hooks[0] if waiting[0] else 0.0
    if timed_ms is not None:
        return max(_LEAST_AGAIN * base[0], max(0.0, forward) + timed_ms)
    backward = seen[1] - (base[1] + hooks[1] if waiting[1] else beside[1])
    return max(_LEAST_AGAIN * base[0], forward + backward)


def _where(waiting: tuple[bool, bool], one: Pair, other: Pair = (0.0, 0.0)) -> Pair:
    return (one[0] if waiting[0] else other[0]), (one[1] if waiting[1] else other[1])


def _part(bare: float, usual: float) -> float:
    return bare / usual if bare < (1 - _NOISE) * usual else 1.0


def _beyond(one: Pair, other: Pair) -> Pair:
    """What `one` takes longer than `other`, where that is more than noise."""
    forward, backward = (a - b if a > (1 + _NOISE) * b else 0.0 for a, b in zip(one, other, strict=True))
    return forward, backward


def _sum(one: Pair, other: Pair) -> Pair:
    return one[0] + other[0], one[1] + other[1]


def _each(pairs: list[Pair], of: Callable[[list[float]], float]) -> Pair:
    return of([one for one, _ in pairs]), of([one for _, one in pairs])


def _whole(ms: Mapping[tuple[str, int], float], index: int) -> bool:
    return ("forward", index) in ms and ("backward", index) in ms


def _spread(indices: list[int], num: int) -> list[int]:
    """Up to `num` of `indices`, from the middle of as many equal parts."""
    num = min(num, len(indices))
    return [indices[(2 * part + 1) * len(indices) // (2 * num)] for part in range(num)]
