"""Who decides what moves of a section named in code: the policy, calls by hand, or nobody."""

from __future__ import annotations

import pytest
from torch import Tensor, nn

import lighterage
from lighterage import Offloader, Policy
from tests.engine.programs import assert_nothing_left, batch, bits


def _offloader(**policy: object) -> Offloader:
    return lighterage.offload([nn.Identity()], Policy(min_bytes=64, keep_last=0, release_after=0), **policy)


def _saved(x: Tensor) -> Tensor:
    return (x.exp().sin() * x).tanh()


def _gradient() -> object:
    x = batch()
    _saved(x).sum().backward()
    return bits(x.grad)


def test_a_kept_section_stays_whole_and_says_so() -> None:
    with _offloader() as offloader:
        x = batch()
        with offloader.section("kept", plan="keep"):
            y = _saved(x)
        y.sum().backward()
        del y
        assert bits(x.grad) == _gradient()
        assert offloader.stats().bytes_out == 0
        assert 'plan="keep"' in str(offloader.report())
        assert_nothing_left(offloader)


@pytest.mark.parametrize("calls", [[], ["evict"], ["release"], ["evict", "release"], ["release", "prefetch"]])
def test_a_section_by_hand_moves_on_request_alone(calls: list[str]) -> None:
    with _offloader() as offloader:
        x = batch()
        with offloader.section("by hand", plan="manual") as live:
            y = _saved(x)
        for _ in range(3):  # others pass, which would release it
            with offloader.section("other"):
                pass
        assert live is not None and live.section is not None
        assert not [a for a in live.section.live_allocations() if a.stage.name != "HELD"]
        assert all(row.bytes_out == 0 for row in [live.section.row])
        for call in calls:
            getattr(offloader, call)(live)
        assert (live.section.row.bytes_out > 0) == bool(calls)
        away = [a for a in live.section.live_allocations() if a.stage.name == "AWAY"]
        assert bool(away) == (bool(calls) and calls[-1] == "release")
        del away
        y.sum().backward()
        del y
        assert bits(x.grad) == _gradient()
        assert_nothing_left(offloader)


def test_a_section_by_hand_under_select_marked_moves_what_is_marked() -> None:
    with _offloader(select="marked") as offloader:
        x = batch()
        with offloader.section("by hand", plan="manual") as live:
            hidden = x.exp()
            y = (hidden.sin() * x).tanh()
        assert live is not None
        lighterage.mark_offload(hidden)
        nbytes = hidden.nbytes
        del hidden
        offloader.release(live)
        y.sum().backward()
        del y
        assert bits(x.grad) == _gradient()
        assert offloader.stats().bytes_out == nbytes
        assert_nothing_left(offloader)


def test_an_unknown_plan_is_an_error() -> None:
    with _offloader() as offloader, pytest.raises(ValueError, match="plan is"):
        offloader.section("x", plan="auto")  # type: ignore[arg-type]
