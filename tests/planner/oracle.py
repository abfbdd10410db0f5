"""A second simulator, by small steps of time: slow, plain, and written from the model's description alone."""

from __future__ import annotations

import dataclasses
import random

from lighterage.planner.plan import Fetch, Mode, Move, Plan, SectionPlan
from lighterage.planner.timeline import Link, Phase, SavedAllocation, SectionRecord, Timeline, Use

TICK_MS = 1 / 256


@dataclasses.dataclass
class _Lane:
    rate: float
    setup: float
    chunk: float
    queue: list
    urgent: list
    current: object = None
    hurries: bool = False
    setup_left: float = 0.0
    bytes_left: float = 0.0
    chunk_left: float = 0.0
    aside: tuple | None = None

    def take(self, hurry):
        """Take something up; where there is `hurry`, only that."""
        if self.current is not None:
            return
        self.hurries = bool(self.urgent)
        if self.urgent:
            self.current = self.urgent.pop(0)
        elif hurry:
            return
        elif self.aside is not None:
            self.current, self.bytes_left = self.aside
            self.aside, self.setup_left, self.chunk_left = None, 0.0, self.chunk
            return
        elif self.queue:
            self.current = self.queue.pop(0)
        else:
            return
        self.setup_left, self.bytes_left, self.chunk_left = self.setup, float(self.current.nbytes), self.chunk

    def carries(self):
        return self.current is not None and self.setup_left <= 0


class _Thing:
    def __init__(self, section, allocation, mode, saved):
        self.section, self.allocation, self.mode, self.saved = section, allocation, mode, saved
        self.nbytes = allocation.nbytes
        self.held = allocation.held_bytes
        self.on_device = False
        self.sent = self.here = self.queued = self.read = self.left = False
        self.move = None


def step(timeline: Timeline, plan: Plan, link: Link, chunk: float = float("inf")) -> tuple[float, int]:
    """(ms, peak bytes), within a few ticks for each event."""
    out = _Lane(link.out_bytes_per_s / 1e3, link.copy_us / 1e3, chunk, [], [])
    back = _Lane(link.in_bytes_per_s / 1e3, link.copy_us / 1e3, chunk, [], [])
    both = link.both_bytes_per_s / 1e3
    clock = busy = busy_before = 0.0
    peak = 0
    forward_ms = {p.section: p.ms for p in timeline.phases if p.direction == "forward"}
    forward_work = {p.section: p.work_bytes for p in timeline.phases if p.direction == "forward"}
    forward_at = {p.section: i for i, p in enumerate(timeline.phases) if p.direction == "forward"}
    backward_at = {p.section: i for i, p in enumerate(timeline.phases) if p.direction == "backward"}
    extra = {}
    for index, (record, decided) in enumerate(zip(timeline.sections, plan.sections, strict=True)):
        whole = forward_ms[index] if record.recompute_ms is None else record.recompute_ms
        extra[index] = {"save": 0.0, "selective": record.selective_ms, "recompute": whole}[decided.mode]
    things = {}
    for index, (record, decided) in enumerate(zip(timeline.sections, plan.sections, strict=True)):
        for a in record.allocations:
            foreign = any(use.section != index for use in a.uses)
            saved = decided.mode == "save" or a.kind == "input" or foreign
            saved = saved or (decided.mode == "selective" and a.kind in ("product", "other"))
            things[index, a.save] = thing = _Thing(index, a, decided.mode, saved)
            moves = [m for m in decided.moves if m.save == a.save]
            thing.move = moves[0] if moves and saved and a.kept is None else None
    first_at = {
        key: min((backward_at[use.section] for use in thing.allocation.uses), default=None)
        for key, thing in things.items()
    }
    seen = {thing.section for thing in things.values() if thing.move is not None}
    seen |= {index for index, decided in enumerate(plan.sections) if decided.mode == "selective"}

    def hurry():
        return bool(back.urgent) or (back.current is not None and back.hurries)

    def tick():
        nonlocal clock, busy
        clock += TICK_MS
        back.take(False)
        out.take(hurry())
        busy += TICK_MS * sum(lane.current is not None for lane in (out, back))
        o, b = out.rate, back.rate
        if out.carries() and back.carries() and o + b > both:
            o, b = min(o, both / 2), min(b, both / 2)
            o, b = min(out.rate, both - b), min(back.rate, both - o)
        for lane, rate in ((out, o), (back, b)):
            time = TICK_MS
            while lane.current is not None and time > 0:
                used = min(time, max(lane.setup_left, 0))
                lane.setup_left -= used
                time -= used
                if lane.setup_left > 1e-12:
                    break
                used = min(time, min(lane.bytes_left, lane.chunk_left) / rate)
                lane.bytes_left -= used * rate
                lane.chunk_left -= used * rate
                time -= used
                if lane.bytes_left <= 1e-6:
                    if lane is out:
                        lane.current.sent = True
                    else:
                        lane.current.here = True
                    lane.current = None
                    lane.take(lane is out and hurry())
                elif lane.chunk_left <= 1e-6:
                    lane.chunk_left = chunk
                    if hurry() and not lane.hurries:
                        lane.aside, lane.current = (lane.current, lane.bytes_left), None
                        lane.take(lane is out)

    def see(work):
        nonlocal peak
        peak = max(peak, sum(t.held for t in things.values() if t.on_device) + work)

    def need(thing, work):
        nonlocal busy_before
        if thing.move is not None and thing.left and not thing.here:
            if not thing.queued:
                thing.queued = thing.on_device = True
                back.urgent.append(thing)
            see(work)
            before = busy
            while not thing.here:
                tick()
            busy_before += busy - before  # nothing computes meanwhile
        thing.read = True

    for index, phase in enumerate(timeline.phases):
        busy_before = busy
        work = phase.work_bytes
        happenings = []
        again = extra[phase.section] if phase.direction == "backward" else 0.0
        total = phase.ms + again
        if again:
            work = max(work, forward_work[phase.section])
            happenings.append((again, 2.5, "work", None))
        for fetch in plan.fetches[index]:
            thing = things[fetch.section, fetch.save]
            if thing.left and not thing.queued:
                thing.queued = thing.on_device = True
                back.queue.append(thing)
        see(work)
        for thing in things.values():
            a = thing.allocation
            own = thing.section == phase.section
            if phase.direction == "forward" and own:
                happenings.append((a.born_ms, 0, "birth" if thing.saved else "reborn", thing))
                if not thing.saved:
                    happenings.append((phase.ms, 4, "death", thing))
            if phase.direction == "backward":
                uses = [use for use in a.uses if use.section == phase.section]
                if own and not thing.saved:
                    scale = again / forward_ms[phase.section]
                    happenings.append((a.born_ms * scale, 0, "reborn", thing))
                    last = max((u.last_ms for u in a.uses), default=1e9)
                    happenings.append((min(again + last, total), 4, "death", thing))
                elif uses:
                    at = min(u.first_ms for u in uses) + again
                    if again:
                        at = 0.0 if not own or a.kind == "input" else a.born_ms * again / forward_ms[phase.section]
                    happenings.append((at, 2, "need", thing))
                    if max(backward_at[u.section] for u in a.uses) == index:
                        happenings.append((max(u.last_ms for u in uses) + again, 4, "death", thing))
        position = 0.0
        for at, _, what, thing in sorted(happenings, key=lambda h: (h[0], h[1])):
            # A part of a tick is waited whole: that is the error of this simulator.
            while position < at - 1e-9:
                tick()
                position += TICK_MS
            if what == "birth":
                thing.on_device = True
                if thing.move is not None:
                    out.queue.append(thing)
            elif what == "reborn":
                thing.on_device = True
            elif what == "need":
                need(thing, work)
            elif what == "work":
                work = phase.work_bytes
            elif what == "death":
                thing.on_device = False
            see(work)
        while position < total - 1e-9:
            tick()
            position += TICK_MS
        for _ in range(round(link.compute_slowdown * (busy - busy_before) / TICK_MS)):
            tick()
        host_ms = 0.0
        for key, thing in things.items():
            if thing.move is not None:
                host_ms += link.move_us / 2000 * ((index == forward_at[thing.section]) + (index == first_at[key]))
        if phase.section in seen:
            record = timeline.sections[phase.section]
            host_ms += record.hooks_forward_ms if phase.direction == "forward" else record.hooks_backward_ms
        for _ in range(round(host_ms / TICK_MS)):
            tick()
        for thing in things.values():
            due = thing.move is not None and index == forward_at[thing.section] + thing.move.release_after
            if due and not thing.read:
                while not thing.sent:
                    tick()
                thing.on_device, thing.left = False, True
    return clock, peak


KINDS = ("input", "product", "pointwise", "other")


def random_timeline(rng: random.Random, *, num_sections: int | None = None, most: int = 3) -> Timeline:
    """Some sections in last-in-first-out order, or as pipelines have it; times in quarters of a millisecond."""
    count = num_sections or rng.randint(3, 5)
    forward = [rng.randint(2, 8) for _ in range(count)]
    backward = [rng.randint(4, 16) for _ in range(count)]

    def moment(length: int) -> float:
        return rng.randint(0, 4 * length) / 4

    sections = []
    for index in range(count):
        allocations = []
        for save in range(1, rng.randint(1, most) + 1):
            nbytes = rng.randint(1, 12) * 100
            uses = []
            readers = {index} if rng.random() < 0.9 else {index, rng.randrange(index, count)}
            for section in sorted(readers, reverse=True):
                first, last = sorted((moment(backward[section]), moment(backward[section])))
                uses.append(Use(section=section, first_ms=first, last_ms=last))
            allocations.append(
                SavedAllocation(
                    save=save,
                    nbytes=nbytes,
                    held_bytes=nbytes + rng.choice((0, 0, 50)),
                    born_ms=moment(forward[index]),
                    uses=tuple(uses) if rng.random() < 0.95 else (),
                    kind=rng.choice(KINDS),
                    kept="marked" if rng.random() < 0.05 else None,
                )
            )
        sections.append(
            SectionRecord(
                name=f"layers.{index}",
                allocations=tuple(allocations),
                selective_ms=rng.choice((None, rng.randint(1, forward[index]))),
                recompute_ms=rng.choice((None, None, rng.randint(1, 2 * forward[index]))),
                not_recomputed="a buffer changes" if rng.random() < 0.1 else None,
            )
        )
    phases = [
        Phase(direction="forward", section=i, ms=forward[i], work_bytes=rng.randint(0, 5) * 100) for i in range(count)
    ]
    if rng.random() < 0.5:
        phases.append(Phase(direction="other", section=None, ms=rng.randint(0, 4), work_bytes=rng.randint(0, 5) * 100))
    phases += [
        Phase(direction="backward", section=i, ms=backward[i], work_bytes=rng.randint(0, 8) * 100)
        for i in reversed(range(count))
    ]
    if rng.random() < 0.3:
        # As in a pipeline: a backward may come before the forward of others.
        forwards, backwards = phases[:count], phases[-count:]
        phases = list(forwards)
        for phase in reversed(backwards):
            after = next(i for i, p in enumerate(phases) if p.direction == "forward" and p.section == phase.section)
            phases.insert(rng.randint(after + 1, len(phases)), phase)
    return Timeline(sections=tuple(sections), phases=tuple(phases))


def random_hooks(rng: random.Random, timeline: Timeline) -> Timeline:
    """The same, with hooks that cost something in most sections; some have hooks alike."""
    alike = (rng.randint(1, 8) / 4, rng.randint(1, 8) / 4)
    costs = [rng.choice((alike, alike, (rng.randint(0, 8) / 4, rng.randint(0, 8) / 4))) for _ in timeline.sections]
    sections = (
        dataclasses.replace(section, hooks_forward_ms=forward, hooks_backward_ms=backward)
        for section, (forward, backward) in zip(timeline.sections, costs, strict=True)
    )
    return dataclasses.replace(timeline, sections=tuple(sections))


def random_link(rng: random.Random, compute_slowdown: float = 0.0, move_us: float = 0.0) -> Link:
    out, back = rng.choice((40e3, 100e3, 200e3, 400e3)), rng.choice((40e3, 100e3, 200e3, 400e3))
    return Link(
        out_bytes_per_s=out,
        in_bytes_per_s=back,
        both_bytes_per_s=(out + back) * rng.choice((0.5, 0.7, 1.0, 1.2)),
        copy_us=rng.choice((0.0, 250.0)),
        compute_slowdown=compute_slowdown,
        move_us=move_us,
    )


def modes_of(timeline: Timeline, section: int) -> list[Mode]:
    """The modes that a section may have."""
    record = timeline.sections[section]
    if record.gap or record.not_recomputed:
        return ["save"]
    return ["save", "recompute"] + (["selective"] if record.selective_ms is not None else [])


def random_plan(rng: random.Random, timeline: Timeline) -> Plan:
    """Any plan at all, sensible or not."""
    sections = []
    fetches: list[list[Fetch]] = [[] for _ in timeline.phases]
    for index, record in enumerate(timeline.sections):
        moves = []
        for allocation in record.allocations:
            if rng.random() < 0.7:
                moves.append(Move(save=allocation.save, release_after=rng.randint(0, 4)))
                if rng.random() < 0.8:
                    fetches[rng.randrange(len(fetches))].append(Fetch(section=index, save=allocation.save))
        mode = rng.choice(modes_of(timeline, index))
        sections.append(SectionPlan(name=record.name, mode=mode, moves=tuple(moves)))
    for phase in fetches:
        rng.shuffle(phase)
    return Plan(sections=tuple(sections), fetches=tuple(tuple(phase) for phase in fetches))
