"""Two ranks with a device each over NCCL: what `tests/distributed` claims over gloo, with the same functions."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.distributed as dist

from tests.distributed import planned_ranks, test_data_parallel, test_pipelines
from tests.distributed.crew import Crew

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
    pytest.mark.skipif(not (dist.is_available() and dist.is_nccl_available()), reason="needs NCCL"),
]

Launch = Callable[[Callable[[int, int], None]], None]


@pytest.fixture(scope="module")
def _pair() -> Iterator[Crew]:
    # The first call starts the processes, PyTorch and NCCL in them.
    crew = Crew(2, "nccl", limit_s=120)
    yield crew
    crew.stop()


@pytest.fixture
def launch(_pair: Crew) -> Launch:
    return _pair.run


@pytest.mark.parametrize(
    "work",
    [
        test_data_parallel.ddp,
        test_data_parallel.ddp_without_synchronisation,
        test_data_parallel.ddp_given_itself,
        test_data_parallel.fsdp,
        test_data_parallel.fsdp_that_keeps_parameters_gathered,
        test_data_parallel.fsdp_with_mixed_precision,
        test_data_parallel.fsdp_with_microbatches,
        test_data_parallel.fsdp_with_checkpoints,
        test_data_parallel.fsdp_sections_are_where_its_hooks_are,
    ],
)
def test_data_parallel_ranks_have_the_same_bits(work: Callable[[int, int], None], launch: Launch) -> None:
    launch(work)


@pytest.mark.parametrize("work", [planned_ranks.work_under_ddp, planned_ranks.work_under_fsdp])
def test_ranks_make_the_same_plan_without_a_collective(work: Callable[[int, int], None], launch: Launch) -> None:
    launch(work)


@pytest.mark.parametrize(
    "work",
    [
        test_pipelines.one_forward_one_backward,
        test_pipelines.checkpointed_one_forward_one_backward,
        test_pipelines.interleaved,
        test_pipelines.v_shaped_zero_bubble,
        test_pipelines.one_offloader_for_all_stages,
    ],
)
def test_a_pipeline_has_the_same_bits_and_its_order_is_learned(
    work: Callable[[int, int], None], launch: Launch
) -> None:
    launch(work)


def test_plans_are_made_in_a_later_process_group(launch: Launch) -> None:
    """The last: the processes go on in the group that it leaves."""
    launch(planned_ranks.work_after_another_process_group)
