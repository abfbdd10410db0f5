"""What every test shares: GPU tests are skipped without a GPU, seeds are fixed, no hook is left behind."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, settings

from lighterage.engine.streams import Streams

# Triton decides when it is first imported, by whichever test that is, whether kernels are interpreted.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# The default repeats the same examples everywhere, so a failure in CI is a failure here.
# `HYPOTHESIS_PROFILE=deep make test` looks for new ones.
settings.register_profile(
    "repeatable", deadline=None, derandomize=True, print_blob=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.register_profile(
    "deep", deadline=None, max_examples=2000, print_blob=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeatable"))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--delay-lanes",
        action="store_true",
        help="hold up a CUDA device's lanes at random before their copies, in every test: results must stay the same",
    )


@pytest.fixture(autouse=True)
def _lanes_delayed_on_request(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if not request.config.getoption("--delay-lanes"):
        return
    chance = random.Random(0)
    hold_up = Streams.hold_up

    def longer(self: Streams) -> None:
        hold_up(self)
        if self.device.type == "cuda":
            torch.cuda._sleep(chance.choice([0, 0, 100_000, 1_000_000, 3_000_000]))

    monkeypatch.setattr(Streams, "hold_up", longer)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs a CUDA device where there is none."""
    if torch.cuda.is_available():
        return
    no_gpu = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(no_gpu)


@pytest.fixture(autouse=True)
def _fixed_seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _no_saved_tensor_hook_left() -> Iterator[None]:
    """A hook left pushed would change every later test in this process: fail the one that left it."""
    yield
    left = torch._C._autograd._top_saved_tensors_default_hooks(True)
    if left is not None:
        while torch._C._autograd._top_saved_tensors_default_hooks(True) is not None:
            torch._C._autograd._pop_saved_tensors_default_hooks()
        pytest.fail(f"saved-tensor hooks were left pushed: {left[0]!r}")
