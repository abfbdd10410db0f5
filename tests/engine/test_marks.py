"""Marks hold for the allocation that a tensor lives in, and write nothing on anyone's tensor."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import lighterage
from lighterage import mark_not_offload, mark_offload
from lighterage.engine.traffic import GATHER_BYTES
from tests.engine.programs import WIDTH, Layer, Save, Stack, batch, bits, both_tiers, offloaded, train
from tests.engine.test_same_bits import Pair

N = WIDTH * WIDTH * 4


def bytes_out(save: Callable[[Tensor], list[Tensor]], **policy: Any) -> int:
    """The bytes that one step moves, in which two layers save `save(x)` each; its bits are checked."""
    log: list[Any] = []

    def fn(x: Tensor) -> Tensor:
        return Save.apply(x, log, *save(x.detach()))

    stack = Stack([Layer(fn), Layer(fn)])
    train(batch())(stack)
    expected = list(log)
    log.clear()
    with offloaded(stack.layers, **policy) as offloader:
        train(batch())(stack)
        assert log == expected
        return offloader.stats().bytes_out


def _mark(mark: Callable[..., None], which: Callable[[Tensor], Any]) -> Callable[[Tensor], list[Tensor]]:
    def save(x: Tensor) -> list[Tensor]:
        saved = x.clone()
        mark(which(saved))
        return [saved, x.clone()]

    return save


VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "itself": lambda t: t,
    "transpose": lambda t: t.t(),
    "slice": lambda t: t[3:5, 1:],
    "element": lambda t: t[0, 0],
    "empty view": lambda t: t[:0],
    "detached": lambda t: t.detach(),
    "another dtype": lambda t: t.view(torch.int32),
    "wrapper of it": lambda t: Pair(t.view(torch.int32), t.new_zeros(1)),
}


@both_tiers
@pytest.mark.parametrize("view", VIEWS, ids=str)
def test_mark_not_offload_holds_for_the_allocation_of(view: str, tier: str) -> None:
    assert bytes_out(_mark(mark_not_offload, VIEWS[view]), tier=tier) == 2 * N


@both_tiers
@pytest.mark.parametrize("view", VIEWS, ids=str)
def test_mark_offload_holds_for_the_allocation_of(view: str, tier: str) -> None:
    assert bytes_out(_mark(mark_offload, VIEWS[view]), tier=tier, select="marked") == 2 * N


def test_without_marks_everything_moves_or_nothing() -> None:
    def save(x: Tensor) -> list[Tensor]:
        return [x.clone()]

    assert bytes_out(save) == 2 * N
    assert bytes_out(save, select="marked") == 0


def test_mark_offload_changes_nothing_under_unmarked() -> None:
    assert bytes_out(_mark(mark_offload, lambda t: t)) == 4 * N


@pytest.mark.parametrize("select", ["unmarked", "marked"])
@pytest.mark.parametrize("order", [(mark_offload, mark_not_offload), (mark_not_offload, mark_offload)])
def test_not_wins_over_offload(select: str, order: tuple[Callable[..., None], ...]) -> None:
    def save(x: Tensor) -> list[Tensor]:
        saved = x.clone()
        for mark in order:
            mark(saved)
        return [saved]

    assert bytes_out(save, select=select) == 0


def test_a_view_of_a_marked_tensor_made_later_is_marked() -> None:
    def save(x: Tensor) -> list[Tensor]:
        buffer = x.repeat(2, 1)
        mark_not_offload(buffer)
        return list(buffer.chunk(2))

    assert bytes_out(save) == 0


def test_the_parts_of_a_marked_wrapper_subclass_stay() -> None:
    def save(x: Tensor) -> list[Tensor]:
        pair = Pair((x * 9).to(torch.int8), x.clone())
        mark_not_offload(pair)
        return [pair, x.clone()]

    assert bytes_out(save) == 2 * N


def test_a_mark_on_one_part_of_a_wrapper_subclass_leaves_the_other() -> None:
    def save(x: Tensor) -> list[Tensor]:
        pair = Pair((x * 9).to(torch.int8), x.clone())
        mark_not_offload(pair.scale)
        return [pair]

    assert bytes_out(save) == 2 * N // 4


def test_several_tensors_are_marked_in_one_call() -> None:
    def save(x: Tensor) -> list[Tensor]:
        saved = [x + i for i in range(3)]
        mark_not_offload(*saved[:2])
        return saved

    assert bytes_out(save) == 2 * N


@both_tiers
@pytest.mark.parametrize("release_after", [0, 1, 3])
@pytest.mark.parametrize("gather_bytes", [1, GATHER_BYTES])
def test_a_mark_on_an_operations_own_output_after_it_was_saved_holds(
    release_after: int, gather_bytes: int, tier: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`exp` saves its output before anyone can mark it; the mark comes before the release. However large it is."""
    monkeypatch.setattr("lighterage.engine.traffic.GATHER_BYTES", gather_bytes)
    kept: list[Any] = []

    def fn(x: Tensor) -> Tensor:
        out = (x + 0.5).exp()
        mark_not_offload(out)
        kept.append(torch.multiprocessing.reductions.StorageWeakRef(out.untyped_storage()))
        return out + 1

    stack = Stack([Layer(fn) for _ in range(3)])
    with offloaded(stack.layers, tier=tier, release_after=release_after) as offloader:
        out = stack(batch())
        assert not any(ref.expired() for ref in kept)
        assert offloader.stats().host_bytes_in_use == 0
        out.sum().backward()
        del out
        stats = offloader.stats()
        assert (stats.bytes_out, stats.bytes_in, stats.kept_bytes) == (0, 0, 3 * N)


def test_under_a_plan_too_what_is_marked_after_it_was_saved_is_not_moved(monkeypatch: pytest.MonkeyPatch) -> None:
    """Copies of what is large start at once there: the plan knows by then what is marked."""
    monkeypatch.setattr("lighterage.engine.traffic.GATHER_BYTES", 1)

    def fn(x: Tensor) -> Tensor:
        out, other = (x + 0.5).exp(), (x - 0.5).exp()
        mark_not_offload(out)
        return out + other

    stack = Stack([Layer(fn) for _ in range(4)])
    with lighterage.offload(stack.layers, rules=[("*", "offload")], max_slowdown=9.0, min_bytes=64) as offloader:
        for _ in range(12):
            train(batch())(stack)
        assert offloader.plan is not None
        assert offloader.stats().bytes_out == 4 * N


@both_tiers
def test_a_late_mark_offload_holds(tier: str) -> None:
    def fn(x: Tensor) -> Tensor:
        out = (x + 0.5).exp()
        mark_offload(out)
        return out + 1

    stack = Stack([Layer(fn) for _ in range(3)])
    with offloaded(stack.layers, tier=tier, select="marked") as offloader:
        train(batch())(stack)
        stats = offloader.stats()
    assert (stats.bytes_out, stats.bytes_in, stats.kept_bytes) == (3 * N, 3 * N, 0)


@both_tiers
def test_a_mark_after_the_copy_and_before_the_release_holds(tier: str) -> None:
    """The copy may have been made; the device memory stays, and the room at rest is given back."""
    saved: list[Tensor] = []

    def fn(x: Tensor) -> Tensor:
        saved.append(x.detach().clone())
        return Save.apply(x, [], saved[-1])

    stack = Stack([Layer(fn) for _ in range(2)])
    with offloaded(stack.layers, tier=tier, release_after=9) as offloader:
        out = stack(batch())
        for section in offloader.sections:
            offloader.evict(section)
        mark_not_offload(*saved)
        for section in offloader.sections:
            offloader.release(section)
        del section
        assert offloader.stats().host_bytes_in_use == 0
        out.sum().backward()
        del out
        assert offloader.stats().bytes_in == 0
        assert offloader.stats().kept_bytes == 2 * N


@both_tiers
@pytest.mark.parametrize("select", ["unmarked", "marked"])
def test_marks_in_the_middle_of_everything_give_the_same_bits(select: str, tier: str) -> None:
    """Law 1, whatever is marked when."""

    def fn(x: Tensor, mark: bool) -> Tensor:
        a = x + 1
        b = a.exp()
        if mark:
            mark_offload(a)
            mark_not_offload(b.t())
        c = b * a
        if mark:
            mark_offload(c)
        d = c.sin() * b[:, :1]
        if mark:
            mark_not_offload(a[2:])
        return d

    def run(mark: bool) -> list[Any]:
        x = batch()
        loss = x
        for layer in layers:
            loss = layer(loss, mark)
        loss.sum().backward()
        return [bits(loss), bits(x.grad)]

    layers = [Layer(fn) for _ in range(3)]
    expected = run(mark=False)
    with offloaded(layers, tier=tier, select=select, release_after=1) as offloader:
        for _ in range(2):
            assert run(mark=True) == expected
            assert offloader.stats().bytes_out > 0


def test_a_mark_ends_with_its_allocation() -> None:
    """Memory is used again at the same address, and the mark must not come with it."""

    def save(x: Tensor) -> list[Tensor]:
        for _ in range(50):
            mark_not_offload(x.clone())
        return [x.clone()]

    assert bytes_out(save) == 2 * N


def test_many_marks_are_swept() -> None:
    from lighterage.marks import _MARKS

    for _ in range(1000):
        mark_not_offload(torch.empty(4))
    assert len(_MARKS._by_storage) < 200


def test_marks_write_nothing_on_the_tensor() -> None:
    tensor = torch.ones(4, requires_grad=True)
    version = tensor._version
    before = set(dir(tensor)), dict(tensor.__dict__)
    mark_not_offload(tensor)
    mark_offload(tensor)
    assert (set(dir(tensor)), dict(tensor.__dict__)) == before
    assert tensor._version == version


def test_marks_hold_no_memory() -> None:
    tensor = torch.ones(4)
    ref = torch.multiprocessing.reductions.StorageWeakRef(tensor.untyped_storage())
    mark_offload(tensor)
    mark_not_offload(tensor.view(2, 2))
    del tensor
    assert ref.expired()


@pytest.mark.parametrize("mark", [mark_not_offload, mark_offload])
def test_tensors_that_are_never_moved_are_accepted(mark: Callable[..., None]) -> None:
    mark()
    mark(torch.eye(3).to_sparse(), torch.empty(0), torch.empty(3, device="meta"), torch.tensor(1.0))
    mark(torch.nn.Parameter(torch.ones(3)), torch.ones(3).to(torch.float8_e4m3fn))


@pytest.mark.parametrize("mark", [mark_not_offload, mark_offload])
@pytest.mark.parametrize("wrong", [None, 3, [torch.ones(2)], {"x": torch.ones(2)}], ids=repr)
def test_what_is_no_tensor_is_refused_with_the_remedy(mark: Callable[..., None], wrong: object) -> None:
    """Law 8."""
    with pytest.raises(TypeError, match=rf"{mark.__name__} takes tensors; argument 1 .*unpacked"):
        mark(torch.ones(2), wrong)


def test_marks_are_public() -> None:
    assert lighterage.mark_offload is mark_offload
    assert lighterage.mark_not_offload is mark_not_offload
