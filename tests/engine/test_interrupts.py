"""A Ctrl-C wherever the engine happens to be, a close from another thread, and a section left in another thread."""

from __future__ import annotations

import inspect
import os
import sys
import threading
from types import FrameType
from typing import Any

import pytest
import torch
from torch import nn

import lighterage
from lighterage import OffloadError
from lighterage.engine.hooks import Attachment
from lighterage.planner.plan import Move, Plan, SectionPlan
from tests.engine.programs import (
    Stack,
    batch,
    bits,
    grads_of,
    mlp_layer,
    mlp_stack,
    no_hook_is_pushed,
    offloaded,
    train,
)

# Where sections begin and end. (A block that an interrupt catches just as it is granted goes with its store.)
FILES = ("hooks.py", "opening.py", "resting.py", "scopes.py", "sections.py", "steps.py", "modules.py")


class _InterruptAt:
    """Raises KeyboardInterrupt when the lines and returns in `FILES` have been counted up to `at`."""

    def __init__(self, at: int) -> None:
        self.left = at
        self.where = ""

    def __call__(self, frame: FrameType, event: str, arg: object) -> Any:
        path = frame.f_code.co_filename
        is_ours = os.sep + os.path.join("lighterage", "engine") + os.sep in path and os.path.basename(path) in FILES
        # Python itself swallows what is raised in finalizers and in the callbacks of weak references.
        return self._count if is_ours and frame.f_code.co_name not in ("__del__", "note") else None

    def _count(self, frame: FrameType, event: str, arg: object) -> Any:
        # What is raised where a generator yields would end it without its `finally`, as no signal handler can.
        if event == "line" or (event == "return" and not frame.f_code.co_flags & inspect.CO_GENERATOR):
            self.left -= 1
            if self.left == 0:
                self.where = f"{os.path.basename(frame.f_code.co_filename)}:{frame.f_lineno} ({event})"
                raise KeyboardInterrupt
        return self._count


def _interrupted(model: nn.Module, at: int) -> tuple[str, bool]:
    """Where a step of `model` was interrupted, which is nowhere if it is shorter; and whether it raised."""
    interrupt = _InterruptAt(at)
    before = sys.gettrace()
    sys.settrace(interrupt)
    try:
        train(batch(2))(model)
    except KeyboardInterrupt as caught:
        caught.__traceback__ = None
        return interrupt.where, True
    finally:
        sys.settrace(before)
    return interrupt.where, False


@pytest.mark.parametrize("whole", [False, True], ids=["layers", "whole model"])
def test_wherever_an_interrupt_comes_no_hook_is_left_and_the_next_steps_are_right_and_end(whole: bool) -> None:
    torch.manual_seed(0)
    model: Stack = mlp_stack(2)
    expected = [bits(v) for v in train(batch(1))(model)] + grads_of(model)
    at, interrupted = 1, 0
    while True:
        with offloaded(model if whole else model.layers) as offloader:
            train(batch(2))(model)
            where, raised = _interrupted(model, at)
            interrupted += raised
            if not where:
                break
            assert no_hook_is_pushed(), where
            saved = offloader.stats(total=True).saved_bytes
            model.zero_grad()
            assert [bits(v) for v in train(batch(1))(model)] + grads_of(model) == expected, where
            assert offloader.stats(total=True).saved_bytes > saved, f"the step did not end: {where}"
        assert offloader.stats().host_bytes_reserved == 0, where
        at += 3
    assert interrupted > 50


def test_wherever_an_interrupt_comes_under_a_plan_the_hooks_that_sections_at_rest_put_by_are_no_more_and_no_less() -> (
    None
):
    torch.manual_seed(0)
    model: Stack = mlp_stack(3)
    expected = [bits(v) for v in train(batch(1))(model)] + grads_of(model)
    with lighterage.offload(model, min_bytes=64, tier="host", recompute="never") as offloader:
        for _ in range(5):
            train(batch(1))(model)
        timeline = offloader.timeline
    assert timeline is not None
    moved = [tuple(Move(save=a.save, release_after=0) for a in s.allocations if s.gap) for s in timeline.sections]
    sections = tuple(SectionPlan(name=s.name, moves=m) for s, m in zip(timeline.sections, moved, strict=True))
    plan = Plan(sections=sections, fetches=((),) * len(timeline.phases))
    at, interrupted = 1, 0
    while True:
        with lighterage.offload(model, min_bytes=64, tier="host") as offloader:
            offloader.use_plan(plan, timeline)
            where, raised = _interrupted(model, at)
            interrupted += raised
            if not where:
                break
            assert no_hook_is_pushed(), where
            model.zero_grad()
            assert [bits(v) for v in train(batch(1))(model)] + grads_of(model) == expected, where
            assert no_hook_is_pushed() and offloader.stats().host_bytes_in_use == 0, where
        assert offloader.stats().host_bytes_reserved == 0, where
        at += 2
    assert interrupted > 50


def test_a_section_that_is_left_in_another_thread_is_refused() -> None:
    errors: list[BaseException] = []
    with lighterage.offload([mlp_layer()], keep_last=0) as offloader:
        scope = offloader.section("stray")
        scope.__enter__()

        def leave() -> None:
            try:
                scope.__exit__(None, None, None)
            except OffloadError as error:
                errors.append(error)

        thread = threading.Thread(target=leave)
        thread.start()
        thread.join()
        torch._C._autograd._pop_saved_tensors_default_hooks()
    assert "'stray' is left in another thread" in str(errors[0])


def test_an_offloader_that_another_thread_closes_as_a_call_begins_lets_the_call_go_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    covers = Attachment.covers
    layer = mlp_layer()
    offloader = lighterage.offload([layer], keep_last=0)

    def covers_and_closes(attachment: Attachment, module: nn.Module) -> bool:
        found = covers(attachment, module)
        offloader.close()
        return found

    monkeypatch.setattr(Attachment, "covers", covers_and_closes)
    layer(batch()).sum().backward()
    assert no_hook_is_pushed()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_child_forked_while_another_thread_is_in_the_engine_can_ask_and_close() -> None:
    offloader = lighterage.offload([mlp_layer()], keep_last=0)
    inside, done = threading.Event(), threading.Event()

    def hold() -> None:
        with offloader._lock:
            inside.set()
            assert done.wait(30)

    holder = threading.Thread(target=hold)
    holder.start()
    assert inside.wait(10)
    child = os.fork()
    if child == 0:
        threading.Timer(10, os._exit, (1,)).start()  # rather than hang
        offloader.stats()
        offloader.close()
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    done.set()
    holder.join()
    offloader.close()
    assert os.waitstatus_to_exitcode(status) == 0
