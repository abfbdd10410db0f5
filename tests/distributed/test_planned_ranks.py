"""Ranks plan together over gloo: the same plan, no collective of the offloader's own, also in a later process group."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.distributed import planned_ranks

Launch = Callable[[Callable[[int, int], None]], None]


@pytest.mark.parametrize("work", [planned_ranks.work_under_ddp, planned_ranks.work_under_fsdp])
def test_ranks_make_the_same_plan_without_a_collective(work: Callable[[int, int], None], launch: Launch) -> None:
    launch(work)


def test_plans_are_made_in_a_later_process_group(launch: Launch) -> None:
    launch(planned_ranks.work_after_another_process_group)
