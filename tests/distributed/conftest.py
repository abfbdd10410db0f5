"""Two processes over gloo, shared by the tests of a run."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from tests.distributed.crew import Crew


@pytest.fixture(scope="session")
def _pair() -> Iterator[Crew]:
    crew = Crew(2)
    yield crew
    crew.stop()


@pytest.fixture
def launch(_pair: Crew) -> Callable[[Callable[[int, int], None]], None]:
    """Calls a function of a test module as `work(rank, num_processes)` in two processes at once."""
    return _pair.run
