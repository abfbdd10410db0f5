"""Law 5, freed means freed: the memory of what was released is gone, or the ledger says who still has it."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from lighterage import Policy
from lighterage.engine.offloader import Offloader
from lighterage.engine.traffic import TRY_AGAIN_STEPS
from tests.engine.programs import (
    WIDTH,
    Layer,
    Save,
    Stack,
    batch,
    both_tiers,
    mlp_stack,
    offloaded,
    train,
    wait_until,
    weak,
)
from tests.engine.test_same_bits import Pair

N = WIDTH * WIDTH * 4
W = (WIDTH, WIDTH)


class Watched:
    """Layers that save one intermediate each, the memory of which the test watches."""

    def __init__(self, num_layers: int = 4, make: Callable[[Tensor], Tensor] = torch.clone) -> None:
        self.refs: list[StorageWeakRef] = []
        self.make = make
        self.stack = Stack([Layer(self._fn) for _ in range(num_layers)])

    def _fn(self, x: Tensor) -> Tensor:
        saved = self.make(x.detach())
        self.refs.append(weak(saved))
        return Save.apply(x, [], saved)

    @property
    def gone(self) -> list[bool]:
        return [ref.expired() for ref in self.refs]


@both_tiers
@pytest.mark.parametrize(
    ("release_after", "expected"),
    [
        (0, [True, True, True, True]),
        (1, [True, True, True, False]),
        (2, [True, True, False, False]),
        (3, [True, False, False, False]),
        (9, [False, False, False, False]),
    ],
)
def test_memory_is_gone_when_the_plan_says_so(release_after: int, expected: list[bool], tier: str) -> None:
    watched = Watched()
    with offloaded(watched.stack.layers, tier=tier, release_after=release_after) as offloader:
        out = watched.stack(batch())
        assert watched.gone == expected
        out.sum().backward()
        del out
        assert offloader.stats().bytes_in == sum(expected) * N
        assert offloader.stats().still_alive_bytes == 0


@pytest.mark.parametrize(
    "make",
    [
        lambda x: x.clone().t(),
        lambda x: x.clone()[3:, ::2],
        lambda x: torch.complex(x, x).conj(),
        lambda x: x.repeat(4, 1).chunk(4)[2],
        lambda x: x[:1].clone().expand(50, WIDTH),
        lambda x: x.clone().view(torch.uint8),
    ],
    ids=["transpose", "slice", "conj", "part of a buffer", "expanded", "another dtype"],
)
def test_memory_of_every_kind_of_view_is_gone(make: Callable[[Tensor], Tensor]) -> None:
    """A view keeps its buffer alive: the whole buffer must go."""
    watched = Watched(2, make)
    with offloaded(watched.stack.layers):
        out = watched.stack(batch())
        assert watched.gone == [True, True]
        out.sum().backward()
        del out


def test_memory_inside_a_wrapper_subclass_is_gone() -> None:
    refs: list[StorageWeakRef] = []

    def fn(x: Tensor) -> Tensor:
        pair = Pair((x.detach() * 9).to(torch.int8), x.detach().clone())
        refs.extend([weak(pair.codes), weak(pair.scale)])
        return Save.apply(x, [], pair)

    stack = Stack([Layer(fn), Layer(fn)])
    with offloaded(stack.layers):
        out = stack(batch())
        assert [ref.expired() for ref in refs] == [True] * 4
        out.sum().backward()
        del out


def test_memory_inside_a_jagged_tensor_is_gone() -> None:
    refs: list[StorageWeakRef] = []

    def fn(x: Tensor) -> Tensor:
        jagged = torch.nested.nested_tensor_from_jagged(x.detach().clone(), torch.tensor([0, 3, WIDTH]))
        refs.append(weak(jagged.values()))
        return Save.apply(x, [], jagged)

    stack = Stack([Layer(fn)])
    with offloaded(stack.layers):
        out = stack(batch())
        assert refs[0].expired()
        out.sum().backward()
        del out


def test_small_views_do_not_hold_the_buffer_that_they_live_in() -> None:
    """The reason why the unit is the allocation: scales must not keep the data alive."""
    refs: list[StorageWeakRef] = []

    def fn(x: Tensor) -> Tensor:
        buffer = x.detach().repeat(4, 1).flatten()
        refs.append(weak(buffer))
        return Save.apply(x, [], *buffer.split(WIDTH * WIDTH), buffer[7], buffer[9:11], buffer[:0])

    stack = Stack([Layer(fn), Layer(fn)])
    with offloaded(stack.layers, min_bytes=N):
        out = stack(batch())
        assert all(ref.expired() for ref in refs)
        out.sum().backward()
        del out


def test_memory_goes_only_after_its_copy() -> None:
    """Release waits for a slow lane; a lane that has not copied holds the bytes."""
    slow = [0.05]
    watched = Watched(2)
    policy = Policy(min_bytes=64, keep_last=0, release_after=9, prefetch_ahead=0)
    with Offloader(list(watched.stack.layers), policy, before_copies=lambda: time.sleep(slow[0])) as offloader:
        out = watched.stack(batch())
        start = time.perf_counter()
        for section in offloader.sections:
            offloader.release(section)
        del section
        assert time.perf_counter() - start > 0.05
        assert watched.gone == [True, True]
        slow[0] = 0.0
        out.sum().backward()
        del out


def test_an_allocation_that_took_the_place_of_a_dropped_one_is_released_too() -> None:
    """Python gives the id of an object that is gone to the next one: neither may be taken for the other."""
    refs: list[StorageWeakRef] = []
    flush: Callable[[], Any]

    def fn(x: Tensor) -> Tensor:
        kept = []
        for i in range(20):
            Save.apply(x, [], (x.detach() + i))  # its graph is dropped at once
            flush()
            saved = x.detach() * i
            refs.append(weak(saved))
            kept.append(Save.apply(x, [], saved))
            del saved
        return sum(kept[1:], kept[0])

    stack = Stack([Layer(fn), Layer(fn)])
    with offloaded(stack.layers) as offloader:
        flush = lambda: [offloader.evict(section) for section in offloader.sections]  # noqa: E731
        out = stack(batch())
        assert sum(not ref.expired() for ref in refs) == 0
        out.sum().backward()
        del out


def test_what_a_section_saved_again_after_its_release_is_released_too() -> None:
    shared: list[Tensor] = []
    refs: list[StorageWeakRef] = []

    def first(x: Tensor) -> Tensor:
        shared.append(x.detach().clone())
        refs.append(weak(shared[0]))
        return Save.apply(x, [], shared[0])

    def second(x: Tensor) -> Tensor:
        return Save.apply(x, [], shared.pop().t())

    stack = Stack([Layer(first), Layer(second)])
    with offloaded(stack.layers) as offloader:
        for _ in range(2):
            out = stack(batch())
            assert refs.pop().expired()
            out.sum().backward()
            del out
        stats = offloader.stats(total=True)
        assert stats.still_alive_bytes == 0
        assert stats.bytes_out == 2 * N


# --- afterwards ---------------------------------------------------------------------------------------------------


@both_tiers
@pytest.mark.parametrize("prefetch_ahead", [0, 2])
def test_reloaded_memory_is_gone_after_its_backward(prefetch_ahead: int, tier: str) -> None:
    refs: list[StorageWeakRef] = []
    alive_before: list[int] = []

    class Look(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, saved: Tensor) -> Tensor:
            ctx.save_for_backward(saved)
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
            alive_before.append(sum(not ref.expired() for ref in refs))
            refs.append(weak(ctx.saved_tensors[0]))
            return grad, None

    stack = Stack([Layer(lambda x: Look.apply(x, x.detach().clone())) for _ in range(4)])
    with offloaded(stack.layers, tier=tier, prefetch_ahead=prefetch_ahead) as offloader:
        for _ in range(2):
            loss = stack(batch()).sum()
            loss.backward()
            assert len(refs) == 4
            assert all(ref.expired() for ref in refs)
            # A section's memory is gone before the next one is reached.
            assert alive_before == [0, 0, 0, 0]
            refs.clear()
            alive_before.clear()
            del loss
            assert offloader.stats().bytes_in == 4 * N


def test_room_at_rest_is_given_back_section_by_section() -> None:
    in_use: list[int] = []
    watched = Watched(4)
    with offloaded(watched.stack.layers) as offloader:
        x = batch()
        h = x
        for layer in watched.stack.layers:
            h = layer(h)
            h.register_hook(lambda grad: in_use.append(offloader.stats().host_bytes_in_use) or None)
        assert offloader.stats().host_bytes_in_use == 4 * N
        h.sum().backward()
        del h
        assert in_use == [4 * N, 3 * N, 2 * N, N]


@both_tiers
def test_room_at_rest_is_counted_on_its_tier(tier: str) -> None:
    watched = Watched(3)
    with offloaded(watched.stack.layers, tier=tier) as offloader:
        out = watched.stack(batch())
        stats = offloader.stats()
        assert stats.host_bytes_in_use == 3 * N
        assert stats.disk_bytes_in_use == (3 * N if tier == "disk" else 0)
        assert stats.host_bytes_peak == 3 * N
        assert (stats.host_bytes_reserved >= 3 * N) == (tier == "host")
        del out
        assert offloader.stats().host_bytes_in_use == 0
        assert offloader.stats().host_bytes_peak == 3 * N


def test_room_at_rest_is_used_again() -> None:
    """Law 7: after the second identical step nothing grows."""
    model = mlp_stack(3)
    with offloaded(model.layers, tier="host") as offloader:
        sizes = []
        for _ in range(6):
            train(batch())(model)
            sizes.append((offloader.stats().host_bytes_reserved, offloader.stats().host_bytes_peak))
    assert len(set(sizes[1:])) == 1


# --- still alive --------------------------------------------------------------------------------------------------


@both_tiers
def test_what_somebody_else_holds_is_reported_and_not_moved_again(tier: str) -> None:
    hoard: list[Tensor] = []

    def hoarding(x: Tensor) -> Tensor:
        saved = x.detach().double()
        hoard.append(saved)
        return Save.apply(x, [], saved, x.detach().clone())

    stack = Stack([Layer(hoarding), Layer(lambda x: Save.apply(x, [], x.detach().clone()))])
    with offloaded(stack.layers, tier=tier) as offloader:
        train(batch())(stack)
        stats, text = offloader.stats(), str(offloader.report())
        assert stats.still_alive_bytes == 2 * N
        assert stats.bytes_out == 2 * N + N + N
        # The report names section, shape and dtype.
        assert "(32, 32) float64" in text and "Layer.0" in text
        (section, other) = offloader.report().sections
        assert section.still_alive == [("(32, 32) float64", 2 * N)]
        assert other.still_alive == []
        for _ in range(2):
            train(batch())(stack)
            stats = offloader.stats()
            assert stats.bytes_out == 2 * N
            assert stats.still_alive_bytes == 0
            assert sum(offloader.report().sections[0].kept.values()) == 2 * N
            assert any("held by somebody else" in reason for reason in offloader.report().sections[0].kept)


def test_what_was_held_once_moves_again_after_some_steps() -> None:
    hoard: list[Tensor] = []

    def hoarding(x: Tensor) -> Tensor:
        saved = x.detach().double()
        if not moved:
            hoard.append(saved)
        return Save.apply(x, [], saved)

    moved: list[int] = []
    stack = Stack([Layer(hoarding), Layer(lambda x: Save.apply(x, [], x.detach().clone()))])
    with offloaded(stack.layers) as offloader:
        for step in range(TRY_AGAIN_STEPS + 2):
            train(batch())(stack)
            moved.append(offloader.stats().bytes_out)
            if step == 0:
                assert offloader.stats().still_alive_bytes == 2 * N
            hoard.clear()
        assert moved == [3 * N] + [N] * TRY_AGAIN_STEPS + [3 * N]
        assert offloader.stats().still_alive_bytes == 0


def test_what_is_held_for_good_is_tried_ever_more_rarely() -> None:
    hoard: list[Tensor] = []

    def hoarding(x: Tensor) -> Tensor:
        saved = x.detach().double()
        hoard.append(saved)
        return Save.apply(x, [], saved)

    stack = Stack([Layer(hoarding), Layer(lambda x: Save.apply(x, [], x.detach().clone()))])
    with offloaded(stack.layers) as offloader:
        tried = []
        for step in range(7 * TRY_AGAIN_STEPS + 4):
            train(batch())(stack)
            if offloader.stats().still_alive_bytes:
                tried.append(step)
        gaps = [later - earlier - 1 for earlier, later in itertools.pairwise(tried)]
        assert gaps == [TRY_AGAIN_STEPS, 2 * TRY_AGAIN_STEPS, 4 * TRY_AGAIN_STEPS]


@both_tiers
@pytest.mark.parametrize("look", ["unrelated gradient", "gradient through the section", "attribute of a node"])
def test_a_look_at_what_was_saved_from_inside_the_section_is_not_backward(tier: str, look: str) -> None:
    def curious(x: Tensor) -> Tensor:
        saved = x.detach().clone()
        refs.append(weak(saved))
        y = Save.apply(x, [], saved).tanh()
        if look == "unrelated gradient":
            w = torch.ones(1, requires_grad=True)
            torch.autograd.grad((w * w).sum(), w)
        elif look == "gradient through the section":
            torch.autograd.grad(y.sum(), x, retain_graph=True)
        else:
            assert y.grad_fn._saved_result.shape == W
        return y

    refs: list[StorageWeakRef] = []
    stack = Stack([Layer(curious) for _ in range(4)])
    x = batch().requires_grad_()
    with offloaded(stack.layers, tier=tier, keep_last=1, release_after=0) as offloader:
        y = stack(x)
        assert wait_until(lambda: [ref.expired() for ref in refs] == [True] * 3 + [False])
        y.sum().backward()
        stats = offloader.stats()
        assert stats.bytes_out == stats.bytes_in > 0


def test_a_held_view_keeps_the_whole_allocation_and_is_reported() -> None:
    hoard: list[Tensor] = []

    def hoarding(x: Tensor) -> Tensor:
        buffer = x.detach().repeat(4, 1)
        hoard[:] = [buffer[3, :2]]
        return Save.apply(x, [], buffer[WIDTH:])

    stack = Stack([Layer(hoarding)])
    with offloaded(stack.layers) as offloader:
        train(batch())(stack)
        assert offloader.stats().still_alive_bytes == 4 * N


def test_what_is_held_when_it_is_released_and_let_go_of_later_is_not_reported() -> None:
    """The output of a section is held by the caller until the next one has taken it: that is no leak."""
    model = mlp_stack(4)
    with offloaded(model.layers) as offloader:
        for _ in range(3):
            loss = model(batch() * 1.0).square().sum()
            loss.backward()
            del loss
            assert offloader.stats().still_alive_bytes == 0
        assert offloader.stats().bytes_out > 0


def test_a_step_that_frees_again_is_moved_again() -> None:
    """The verdict is of one save in one section: other sections, and saves of another size, go on moving."""
    hoard: list[Tensor] = []

    def fn(x: Tensor) -> Tensor:
        saved = x.detach().clone()
        hoard.append(saved)
        return Save.apply(x, [], saved)

    stack = Stack([Layer(fn)])
    with offloaded(stack.layers) as offloader:
        train(batch())(stack)
        assert offloader.stats().still_alive_bytes == N
        train(batch(2, 2 * WIDTH, WIDTH))(stack)
        assert offloader.stats().bytes_out == 2 * N


# --- how many are alive at once -----------------------------------------------------------------------------------


@pytest.mark.parametrize("release_after", [0, 1, 2])
def test_no_more_sections_are_on_the_device_than_the_plan_holds(release_after: int) -> None:
    watched = Watched(8)
    most = 0
    with offloaded(watched.stack.layers, release_after=release_after):
        h = batch()
        for layer in watched.stack.layers:
            h = layer(h)
            most = max(most, watched.gone.count(False))
        assert most == release_after
        del h


def test_keep_last_keeps_the_last_sections() -> None:
    watched = Watched(5)
    with offloaded(watched.stack.layers, keep_last=2) as offloader:
        out = watched.stack(batch())
        assert watched.gone == [True, True, True, False, False]
        out.sum().backward()
        del out
        stats = offloader.stats()
        assert (stats.bytes_out, stats.kept_bytes) == (3 * N, 2 * N)
        assert wait_until(lambda: watched.gone == [True] * 5)


def test_keep_last_of_sections_named_in_code_is_known_from_the_second_step() -> None:
    with offloaded([mlp_stack(1)], keep_last=1) as offloader:
        for step in range(3):
            refs = []
            x = batch()
            for name in ("a", "b", "c"):
                with offloader.section(name):
                    saved = x.detach().clone()
                    refs.append(weak(saved))
                    x = Save.apply(x, [], saved)
                    del saved
            gone = [ref.expired() for ref in refs]
            assert gone == ([True, True, True] if step == 0 else [True, True, False])
            x.sum().backward()
            del x


def test_what_backward_already_used_on_the_device_is_not_thrown_away_in_front_of_the_next() -> None:
    """Asked for while it was held: it is in use, and a later release must not pull it away for nothing."""
    watched = Watched(1)
    layer = watched.stack.layers[0]
    with offloaded([layer], release_after=5) as offloader:
        loss = layer(batch()).sum()
        loss.backward(retain_graph=True)
        (section,) = offloader.sections
        offloader.release(section)
        assert watched.gone == [False]
        loss.backward()
        del loss, section
        assert offloader.stats().bytes_in == 0
        assert wait_until(lambda: watched.gone == [True])
