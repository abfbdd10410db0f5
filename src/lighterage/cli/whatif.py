"""`lighterage whatif`: what a measured step could be on other links."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from lighterage.cli.arguments import check_writable
from lighterage.errors import BudgetError
from lighterage.planner.choose import plan
from lighterage.planner.figures import parse_size, rate, size
from lighterage.planner.goal import Goal
from lighterage.planner.links import NAMED, link_named
from lighterage.planner.pareto import ParetoPoint, pareto
from lighterage.planner.plan import Plan
from lighterage.planner.simulate import simulate
from lighterage.planner.timeline import Link, Timeline

if TYPE_CHECKING:
    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]

_PICTURES = (".png", ".svg", ".pdf", ".jpg")
_MOST_BYTES = 1 << 60
_MOST_MS = 1e12
_RATES = (1e3, 1e18)
_MOST_SLOWDOWN = 1e6

_DESCRIPTION = """\
From a timeline that was measured (offloader.timeline.to_json()), work out the best that can be had on one or more
links: the curve of peak memory against step time, as a table and a picture. With a goal, the plan for it too.
Needs no GPU. Exits with 1 if no plan meets the budget.
"""


def add_parser(commands: Subparsers) -> None:
    """Add `whatif` to the subcommands."""
    parser = commands.add_parser(
        "whatif",
        help="work out peak memory against step time for a measured step, on any link",
        description=_DESCRIPTION,
        epilog=_links_table(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("timeline", type=Path, help="file that holds the timeline")
    parser.add_argument(
        "--link",
        action="append",
        metavar="LINK",
        help="a name below, a rate each way such as 450GB/s, or a file of a measured link; may be repeated "
        "(default: pcie5)",
    )
    parser.add_argument("--budget", metavar="SIZE", help="a plan whose peak is at most this, such as 30GiB")
    parser.add_argument(
        "--max-slowdown", type=float, metavar="PART", help="a plan that is so much slower, such as 0.02"
    )
    parser.add_argument(
        "--recompute", choices=["auto", "never"], default="auto", help="whether sections may be computed again"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("whatif.png"), help="picture of the curve (default: whatif.png)"
    )
    parser.add_argument("--plan", type=Path, metavar="FILE", help="write the plan for the goal, as JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Carry out what `args` describe."""
    if importlib.util.find_spec("matplotlib") is None:
        print("lighterage whatif needs matplotlib. Run: pip install 'lighterage[demo]'", file=sys.stderr)
        return 2
    try:
        if args.plan is not None and args.budget is None and args.max_slowdown is None:
            raise ValueError("--plan needs a goal: give --budget or --max-slowdown.")
        if args.plan is not None and args.link is not None and len(args.link) > 1:
            raise ValueError(f"--plan writes one plan, and {len(args.link)} links were given. Give one --link.")
        check_writable("--out", args.out, endings=_PICTURES)
        if args.plan is not None:
            check_writable("--plan", args.plan, endings=(".json",))
            if args.plan.exists() and args.plan.samefile(args.timeline):
                raise ValueError(f"--plan {args.plan} is the timeline itself. Name another file.")
        timeline = _timeline(args.timeline)
        links = [_link(text) for text in args.link or ["pcie5"]]
        goal = _goal(args)
        return _show(args, timeline, links, goal)
    except (ValueError, UnicodeDecodeError) as error:
        print(f"lighterage whatif: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"lighterage whatif: {str(error.filename)[:100]}: {error.strerror}.", file=sys.stderr)
        return 2


def _timeline(path: Path) -> Timeline:
    timeline = Timeline.from_json(path.read_text())
    if not timeline.step_ms:
        raise ValueError(f"{path} is of a step that takes no time. Keep offloader.timeline once it is there.")
    nbytes = max(
        [phase.work_bytes for phase in timeline.phases]
        + [allocation.held_bytes for section in timeline.sections for allocation in section.allocations]
    )
    if not nbytes:
        raise ValueError(
            f"{path} is of a step that takes no memory, so there is none to save. Measure a larger one: what is "
            "smaller than min_bytes is not told."
        )
    if timeline.step_ms > _MOST_MS or nbytes > _MOST_BYTES:
        raise ValueError(
            f"{path} is of a step of {timeline.step_ms:.3g} ms with {nbytes:.3g} bytes in one place: there is no such "
            "device, so the file is damaged. Measure again."
        )
    return timeline


def _link(text: str) -> Link:
    path = Path(text)
    link = Link.from_json(path.read_text()) if path.suffix == ".json" else link_named(text)
    low, high = _RATES
    for each in (link.out_bytes_per_s, link.in_bytes_per_s, link.both_bytes_per_s):
        if not low <= each <= high:
            raise ValueError(
                f"a link carries from {low:.0e} to {high:.0e} bytes a second; got {each:.3g} ({text[:60]!r})."
            )
    return link


def _goal(args: argparse.Namespace) -> Goal | None:
    if args.budget is None and args.max_slowdown is None:
        return None
    try:
        budget = None if args.budget is None else parse_size(args.budget)
    except OverflowError:
        raise ValueError(f"--budget {args.budget[:60]} is more than any device has.") from None
    if budget is not None and budget > _MOST_BYTES:
        raise ValueError(f"--budget {args.budget[:60]} is more than any device has.")
    if args.max_slowdown is not None and args.max_slowdown > _MOST_SLOWDOWN:
        raise ValueError(f"--max-slowdown is a part of the step, 0.02 for 2 %; got {args.max_slowdown}.")
    return Goal(device_budget=budget, max_slowdown=args.max_slowdown, recompute=args.recompute)


def _show(args: argparse.Namespace, timeline: Timeline, links: list[Link], goal: Goal | None) -> int:
    from lighterage.cli.whatif_plot import draw_curves  # matplotlib loads here, not for --help

    kept = simulate(timeline, _kept(timeline), links[0])
    print(
        f"{timeline.device or 'A step'}: {len(timeline.sections)} sections, {timeline.step_ms:.1f} ms, a peak of "
        f"{size(kept.peak_bytes)} with everything kept."
    )
    status = 0
    curves: list[tuple[Link, tuple[ParetoPoint, ...]]] = []
    for link in links:
        curve = pareto(timeline, link, recompute=args.recompute)
        curves.append((link, curve))
        print(f"\n{_named(link)}")
        print(_table(curve, kept.peak_bytes))
        if goal is None:
            continue
        try:
            made = plan(timeline, link, goal)
        except BudgetError as error:
            print(f"\n{error}")
            status = 1
            continue
        print(f"\n{made}")
        if args.plan is not None:
            args.plan.write_text(made.to_json() + "\n")
            print(f"The plan: {args.plan}")
    draw_curves(
        curves,
        path=args.out,
        device=timeline.device or "a device without a name",
        step_ms=timeline.step_ms,
        kept_bytes=kept.peak_bytes,
        budget_bytes=goal.device_budget if goal else None,
        max_slowdown=goal.max_slowdown if goal else None,
    )
    print(f"\nThe curve: {args.out}")
    return status


def _kept(timeline: Timeline) -> Plan:
    return plan(timeline, NAMED["pcie5"], Goal(max_slowdown=0.0, rules=(("*", "keep"),)))


def _table(curve: tuple[ParetoPoint, ...], kept_bytes: int) -> str:
    lines = [
        f"{'peak':>12} {'less':>7} {'step ms':>10} {'longer':>8} {'moved':>7} {'selective':>10} {'recomputed':>11}"
    ]
    lines += [
        f"{size(point.peak_bytes):>12} {1 - point.peak_bytes / kept_bytes:>7.1%} {point.step_ms:>10.1f} "
        f"{point.slowdown:>8.1%} {point.num_moved:>7} {point.num_selective:>10} {point.num_recomputed:>11}"
        for point in curve
    ]
    return "\n".join(lines)


def _named(link: Link) -> str:
    return (
        f"{link.name or 'A link'}: {rate(link.out_bytes_per_s)} out, {rate(link.in_bytes_per_s)} in, "
        f"{rate(link.both_bytes_per_s)} both at once."
    )


def _links_table() -> str:
    width = max(map(len, NAMED))
    rows = (
        f"  {name:<{width}}  {link.name:<11} {rate(link.out_bytes_per_s):>9} out, {rate(link.in_bytes_per_s):>9} in, "
        f"{rate(link.both_bytes_per_s):>9} both"
        for name, link in NAMED.items()
    )
    return "\n".join(["links by name:", *rows])
