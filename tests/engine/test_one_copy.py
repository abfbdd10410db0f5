"""Law 4: a byte moves once each way, neighbouring ranges travel in one copy, and no byte moves that nobody saved."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lighterage
from lighterage import OffloadStats
from tests.engine.programs import WIDTH, Layer, Save, Stack, batch, both_tiers, mlp_stack, offloaded, train

N = WIDTH * WIDTH * 4
"""Bytes of one activation."""
W = (WIDTH, WIDTH)


def figures(
    save: Callable[[Tensor], list[Tensor]], num_layers: int = 1, tier: str = "disk", **policy: Any
) -> OffloadStats:
    """The figures of one step in which each layer saves `save(x)`, and nothing else."""

    def fn(x: Tensor) -> Tensor:
        return Save.apply(x, [], *save(x.detach()))

    model = Stack([Layer(fn) for _ in range(num_layers)])
    with offloaded(model.layers, tier=tier, **policy) as offloader:
        train(batch())(model)
        return offloader.stats()


def moved(stats: OffloadStats) -> tuple[int, int, int, int]:
    return (stats.copies_out, stats.bytes_out, stats.copies_in, stats.bytes_in)


@both_tiers
def test_a_tensor_and_its_transpose_make_one_copy(tier: str) -> None:
    def save(x: Tensor) -> list[Tensor]:
        a = x.clone()
        return [a, a.t()]

    stats = figures(save, tier=tier)
    assert moved(stats) == (1, N, 1, N)
    assert (stats.saved_bytes, stats.unique_bytes) == (2 * N, N)


@both_tiers
def test_mm_of_a_with_its_own_transpose_makes_one_copy(tier: str) -> None:
    def fn(x: Tensor) -> Tensor:
        a = x + 1
        return torch.mm(a, a.t())

    model = Stack([Layer(fn)])
    with offloaded(model.layers, tier=tier) as offloader:
        train(batch())(model)
        assert moved(offloader.stats()) == (1, N, 1, N)


def test_the_parts_of_a_chunked_projection_make_one_copy() -> None:
    def save(x: Tensor) -> list[Tensor]:
        return list(x.repeat(1, 3).chunk(3, dim=-1))

    assert moved(figures(save)) == (1, 3 * N, 1, 3 * N)


def test_the_parts_of_an_interleaved_projection_make_one_copy() -> None:
    def save(x: Tensor) -> list[Tensor]:
        return list(x.repeat(1, 3).view(WIDTH, 4, 3, 8).unbind(2))

    assert moved(figures(save)) == (1, 3 * N, 1, 3 * N)


def test_the_halves_of_a_swiglu_input_make_one_copy() -> None:
    def fn(x: Tensor, w: Tensor) -> Tensor:
        gate, up = (x @ w).chunk(2, dim=-1)
        return F.silu(gate) * up

    model = Stack([Layer(fn, (WIDTH, 2 * WIDTH))])
    with offloaded(model.layers) as offloader:
        train(batch())(model)
        report = offloader.report()
    # The input, the halves in their common buffer, and silu's output.
    assert moved(report.stats) == (3, 4 * N, 3, 4 * N)


@pytest.mark.parametrize(
    ("ranges", "copies", "nbytes"),
    [
        ([(0, 100), (50, 150)], 1, 600),
        ([(0, 100), (100, 200)], 1, 800),
        ([(100, 200), (0, 100)], 1, 800),
        ([(0, 1024), (10, 20), (1000, 1024)], 1, 4096),
        ([(5, 6)], 1, 4),
        ([(0, 10), (2000, 2010)], 2, 80),
        ([(2000, 2010), (0, 10), (0, 2), (2005, 2012)], 2, 88),
        ([(0, 10), (20, 30)], 1, 120),
    ],
    ids=["overlapping", "adjacent", "in reverse", "nested", "one element", "distant", "distant, several", "small gap"],
)
@both_tiers
def test_bytes_moved_are_the_union_of_the_ranges(
    ranges: list[tuple[int, int]], copies: int, nbytes: int, tier: str
) -> None:
    """Ranges nearer than 4 KiB join, the small gap between them included."""

    def save(x: Tensor) -> list[Tensor]:
        buffer = x.repeat(4, 1).flatten()
        return [buffer[lo:hi] for lo, hi in ranges]

    assert moved(figures(save, tier=tier)) == (copies, nbytes, copies, nbytes)


@pytest.mark.parametrize("experts", [1, 8, 64])
def test_a_bulk_buffer_makes_one_copy_whatever_the_number_of_experts(experts: int) -> None:
    """Law 7 on the way: data and scales of every expert live in one buffer, and the number of copies does not grow."""

    def save(x: Tensor) -> list[Tensor]:
        buffer = (x.repeat(16, 1) * 1000).to(torch.int32).view(torch.uint8).flatten()
        data, scales = buffer[:65024].split(65024 // experts), buffer[65024:].split(512 // experts)
        return [
            *(part.view(torch.float8_e4m3fn) for part in data),
            *(part[:4].view(torch.float32) for part in scales),
        ]

    stats = figures(save)
    end = 65024 + 512 - 512 // experts + 4
    assert moved(stats) == (1, end, 1, end)


def test_small_tensors_that_share_an_allocation_with_large_ones_go_with_it_in_one_copy() -> None:
    def save(x: Tensor) -> list[Tensor]:
        buffer = x.clone().flatten()
        return [buffer[1020:1024], buffer[:1020], buffer[0]]

    assert moved(figures(save, min_bytes=N)) == (1, N, 1, N)


def test_a_small_view_of_a_large_allocation_moves_alone() -> None:
    """`min_bytes` is of the allocation; what is moved is what was saved."""
    stats = figures(lambda x: [x.clone()[0, :4]], min_bytes=N)
    assert moved(stats) == (1, 16, 1, 16)


def test_an_allocation_saved_by_several_sections_moves_once() -> None:
    shared: list[Tensor] = []

    def save(x: Tensor) -> list[Tensor]:
        if not shared:
            shared.append(x.clone())
        return [shared[0].t()]

    try:
        stats = figures(save, num_layers=5, release_after=9)
    finally:
        shared.clear()
    assert moved(stats)[:2] == (1, N)
    assert (stats.saved_bytes, stats.unique_bytes, stats.num_sections) == (5 * N, N, 5)


@both_tiers
@pytest.mark.parametrize("release_after", [0, 1, 9])
def test_a_residual_stream_saved_by_two_sections_moves_once(release_after: int, tier: str) -> None:
    """The output of one section is saved by the next one too, after the first has been released."""

    def fn(x: Tensor) -> Tensor:
        return x.tanh().sin()  # tanh saves its output, sin the same tensor as its input; the next tanh saves its own

    model = Stack([Layer(fn) for _ in range(4)])

    def run() -> Tensor:
        h = batch()
        first = model.layers[0].weights
        assert len(first) == 0
        for layer in model.layers:
            h = layer(h)
        return (h * h).sum()

    with offloaded(model.layers, tier=tier, release_after=release_after) as offloader:
        run().backward()
        assert moved(offloader.stats())[:2] == (4, 4 * N)


@pytest.mark.parametrize("release_after", [0, 1, 9])
def test_an_input_saved_by_every_section_crosses_once_each_way(release_after: int) -> None:
    def fn(h: Tensor, x: Tensor) -> Tensor:
        return h + x.sin()

    layers = [Layer(fn) for _ in range(4)]
    with offloaded(layers, release_after=release_after) as offloader:
        leaf = batch()
        x = leaf + 1
        h = torch.zeros(W)
        for layer in layers:
            h = layer(h, x)
        del x
        loss = h.sum()
        del h
        loss.backward()
        del loss
        stats = offloader.stats()
        assert moved(stats)[:2] == (1, N)
        assert stats.bytes_in <= N


def test_ranges_saved_by_later_sections_add_only_their_new_bytes() -> None:
    shared = torch.arange(1024.0)
    step = iter([(0, 256), (128, 512), (0, 512), (768, 1024)])

    stats = figures(lambda x: [shared[slice(*next(step))]], num_layers=4, release_after=9)
    assert stats.bytes_out == (512 + 256) * 4
    assert stats.unique_bytes == (512 + 256) * 4


@both_tiers
def test_several_backwards_bring_each_byte_back_once(tier: str) -> None:
    model = mlp_stack(3)
    with offloaded(model.layers, tier=tier) as offloader:
        loss = model(batch()).square().sum()
        for _ in range(3):
            loss.backward(retain_graph=True)
        del loss
        stats = offloader.stats()
    assert stats.bytes_in == stats.bytes_out > 0
    assert stats.copies_in == stats.copies_out


def test_what_was_changed_in_place_moves_again() -> None:
    """Correctness first."""
    buffer = torch.zeros(W)

    def save(x: Tensor) -> list[Tensor]:
        buffer.add_(1)
        return [buffer]

    def fn(x: Tensor) -> Tensor:
        Save.apply(x, [], *save(x))
        return Save.apply(x, [], *save(x))

    model = Stack([Layer(fn)])
    with offloaded(model.layers, release_after=9) as offloader:
        alive = []
        with offloader.section("first"):
            alive.append(Save.apply(batch(), [], buffer))
        buffer.add_(1)
        with offloader.section("second"):
            alive.append(Save.apply(batch(), [], buffer))
        alive[1].sum().backward()
        alive.clear()
        assert moved(offloader.stats())[:2] == (2, 2 * N)


def test_a_second_step_moves_its_own_bytes_again() -> None:
    """A byte range moves once in one step; a new step saves anew."""
    shared = torch.ones(W)

    def fn(x: Tensor) -> Tensor:
        return Save.apply(x, [], shared.clone())

    model = Stack([Layer(fn), Layer(fn)])
    with offloaded(model.layers) as offloader:
        for _ in range(3):
            train(batch())(model)
            assert moved(offloader.stats()) == (2, 2 * N, 2, 2 * N)
        assert moved(offloader.stats(total=True)) == (6, 6 * N, 6, 6 * N)


def test_each_microbatch_moves_its_own_bytes() -> None:
    model = mlp_stack(2)
    with offloaded(model.layers) as offloader:
        loss = model(batch(1) + 1).square().sum()
        loss.backward()
        del loss
        one = offloader.stats()
        losses = [model(batch(seed) + 1).square().sum() for seed in (1, 2, 3)]
        for loss in losses:
            loss.backward()
        del loss
        losses.clear()
        three = offloader.stats()
    assert three.bytes_out == 3 * one.bytes_out
    assert three.num_sections == 3 * one.num_sections


def test_zero_size_views_move_nothing() -> None:
    def save(x: Tensor) -> list[Tensor]:
        a = x.clone()
        return [a[:0], a[3:3].t(), a]

    assert moved(figures(save)) == (1, N, 1, N)


def test_an_expanded_tensor_moves_the_bytes_that_it_has() -> None:
    stats = figures(lambda x: [x[:1].clone().expand(1000, WIDTH)])
    assert moved(stats) == (1, WIDTH * 4, 1, WIDTH * 4)


def test_what_is_never_asked_for_never_comes_back() -> None:
    model = mlp_stack(3)
    with offloaded(model.layers) as offloader:
        out = model(batch())
        del out
        stats = offloader.stats()
    assert stats.bytes_out > 0
    assert stats.bytes_in == stats.copies_in == 0


def test_an_allocation_that_two_waiting_sections_saved_comes_back_once() -> None:
    """Law 4: the outputs of one section are the inputs of the next, and both are fetched ahead together."""
    layers = nn.ModuleList(nn.Sequential(nn.Linear(64, 64), nn.Tanh()) for _ in range(10))
    with lighterage.offload(layers, min_bytes=64, keep_last=0, release_after=0, prefetch_ahead=3) as offloader:
        for _ in range(3):
            x, skips = torch.randn(64, 64), []
            for position, layer in enumerate(layers):
                x = layer(x * skips.pop() if position >= 5 else x)
                if position < 5:
                    skips.append(x)
            x.square().mean().backward()
            del x
            stats = offloader.stats()
            assert 0 < stats.bytes_in <= stats.bytes_out
            assert stats.copies_in <= stats.copies_out
