"""The NVFP4 kernels give the reference's bytes for every split of a group, in two launches."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from tests.kernels.triton_cases import (
    DEVICE,
    DTYPES,
    Views,
    check_against_reference,
    check_swiglu_is_fused_exactly,
    ends_of,
    hard_input,
    make_buffer,
    read_views,
    tame_input,
)

pytest.importorskip("triton")

from lighterage.formats.layout import bulk_layout
from lighterage.kernels.reference.nvfp4 import quantize, unpack
from lighterage.kernels.triton import nvfp4, nvfp4_amax
from lighterage.kernels.triton.nvfp4 import split_quantize_nvfp4

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, in the interpreter: NaN and Inf are meant


def _check(x, splits, *, hadamard=False, block_2d=False, directions=(False, True), **tuning) -> None:
    def reference(part: torch.Tensor, columnwise: bool) -> Views:
        data, scale, amax = quantize(part, columnwise=columnwise, block_2d=block_2d, hadamard=hadamard and columnwise)
        return {"data": data, "scale": scale, "scale_inv": scale, "amax": amax}

    launch = partial(
        split_quantize_nvfp4, hadamard=hadamard, block_2d=block_2d, stochastic_rounding=False, seed=0, **tuning
    )
    check_against_reference(x, splits, "nvfp4", launch, reference, block_2d=block_2d, directions=directions)


@pytest.mark.parametrize("block_2d", [False, True])
@pytest.mark.parametrize("make", [hard_input, tame_input])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_byte_equals_the_reference(dtype, make, block_2d) -> None:
    _check(make(80, 144, dtype), [64, 0, 16], block_2d=block_2d)


@pytest.mark.parametrize("make", [hard_input, tame_input])
def test_hadamard_equals_the_reference(make) -> None:
    _check(make(80, 80, torch.bfloat16), [48, 0, 32], hadamard=True)


@pytest.mark.parametrize("hadamard", [False, True])
@pytest.mark.parametrize(
    ("splits", "num_cols"),
    [([16], 16), ([0, 48, 0, 144, 0], 32), ([128, 0, 16], 144), ([0], 64), ([0, 0], 16), ([16] * 5, 16)],
)
def test_ragged_and_empty_splits_equal_the_reference(splits, num_cols, hadamard) -> None:
    _check(tame_input(sum(splits) + 7, num_cols, torch.bfloat16), splits, hadamard=hadamard)


@pytest.mark.parametrize("hadamard", [False, True])
@pytest.mark.parametrize("columnwise", [False, True])
def test_one_direction_alone_equals_the_reference(columnwise, hadamard) -> None:
    _check(tame_input(48, 48, torch.bfloat16), [16, 32], directions=(columnwise,), hadamard=hadamard)


def test_an_empty_input_still_has_its_amax() -> None:
    _check(torch.empty(0, 32, dtype=torch.bfloat16, device=DEVICE), [0, 0, 0])


@pytest.mark.parametrize("tuning", [{"tile_k": 256, "num_warps": 4}, {"tile_k": 128, "tiles_per_program": 1}])
def test_the_cut_of_the_work_does_not_change_a_byte(tuning) -> None:
    _check(tame_input(160, 208, torch.bfloat16), [32, 128], hadamard=True, **tuning)


def test_a_tile_that_gave_wrong_scales_is_refused() -> None:
    with pytest.raises(ValueError, match="tile_k is 128 or more"):
        _check(tame_input(32, 64, torch.bfloat16), [32], tile_k=64)


def _check_swiglu(h, splits, *, hadamard=False, block_2d=False) -> None:
    options = {"hadamard": hadamard, "block_2d": block_2d, "stochastic_rounding": False, "seed": 0}
    launch = partial(split_quantize_nvfp4, **options)
    check_swiglu_is_fused_exactly(h, splits, "nvfp4", launch, block_2d=block_2d)


@pytest.mark.parametrize(("hadamard", "block_2d"), [(False, False), (True, False), (False, True)])
def test_swiglu_on_the_way_in_changes_no_byte(hadamard, block_2d) -> None:
    _check_swiglu(tame_input(80, 2 * 48, torch.bfloat16), [48, 0, 16], hadamard=hadamard, block_2d=block_2d)


@pytest.mark.parametrize("amax", [0.0, 1e-40, 1e-38, 1.0, 6.0, 10.0, 2688.0, 3.3e38, float("inf")])
def test_every_global_scale_equals_the_reference(amax) -> None:
    x = torch.linspace(-1, 1, 16 * 16).view(16, 16) * min(amax, 3.4e38)
    x[2, 3] = amax
    _check(x.to(DEVICE), [16])


def _stochastic(x, splits, seed, *, hadamard=False, block_2d=False) -> list[torch.Tensor]:
    """The codes of the whole matrix in both directions, rounded at random, as (M, K) and (K, M)."""
    layouts = [bulk_layout("nvfp4", splits, x.shape[1], columnwise=columnwise) for columnwise in (False, True)]
    buffers = [make_buffer(layout) for layout in layouts]
    split_quantize_nvfp4(
        x,
        ends_of(splits),
        *buffers,
        num_splits=len(splits),
        hadamard=hadamard,
        block_2d=block_2d,
        stochastic_rounding=True,
        seed=seed,
    )
    return [
        unpack(read_views(buffer, layout, "data", 0).view(layout.views("data")[0].shape))
        for buffer, layout in zip(buffers, layouts, strict=True)
    ]


def _values(codes: torch.Tensor) -> torch.Tensor:
    return torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])[codes.long()]


def _grid_input(num_rows: int, num_cols: int) -> torch.Tensor:
    """Values between -6 and 6 in blocks that all have amax 6 in a tensor of amax 6: scales are 1, values stay."""
    x = torch.rand(num_rows, num_cols, generator=torch.Generator().manual_seed(7)) * 12 - 6
    x[torch.arange(num_rows), :] = torch.where(
        (torch.arange(num_rows)[:, None] + torch.arange(num_cols)[None, :]) % 16 == 0, 6.0, x
    )
    return x


def test_stochastic_rounding_gives_the_two_neighbours_with_the_right_mean() -> None:
    x = _grid_input(128, 128)
    grid = torch.tensor([-6, -4, -3, -2, -1.5, -1, -0.5, 0, 0.5, 1, 1.5, 2, 3, 4, 6])
    below = grid[torch.searchsorted(grid, x, right=True).clamp(max=len(grid)) - 1]
    above = grid[torch.searchsorted(grid, x).clamp(max=len(grid) - 1)]
    row, col = _stochastic(x.to(DEVICE), [128], seed=11)
    for values in (_values(row), _values(col).t()):
        assert ((values == below) | (values == above)).all()
        step = (above - below).clamp(min=0.5)
        error = (values - x) / step
        # 16384 errors of a standard deviation of at most 0.5 steps; truncated random bits bias by up to 1/256.
        assert abs(error.mean().item()) < 4 * 0.5 / 128 + 1 / 256
        assert 0.2 < error.std().item() < 0.5
    assert (_values(row) != _values(col).t()).any()  # the directions draw their own numbers


def test_stochastic_rounding_repeats_with_its_seed_and_differs_with_another() -> None:
    x = _grid_input(64, 64).to(DEVICE)
    first, again, other = (_stochastic(x, [64], seed) for seed in (5, 5, 6))
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])
    assert not torch.equal(first[0], other[0]) and not torch.equal(first[1], other[1])


def test_stochastic_2d_blocks_are_transposes_of_each_other() -> None:
    row, col = _stochastic(_grid_input(64, 64).to(DEVICE), [64], seed=5, block_2d=True)
    assert torch.equal(row, col.t())


def test_what_is_compiled_does_not_depend_on_the_rows_or_on_a_few_splits(monkeypatch) -> None:
    asked = set()

    def compiled(kernel, grid, pointers, numbers, constants, **options) -> None:
        dtypes = tuple(pointer.dtype for pointer in pointers)
        asked.add((kernel.fn.__name__, dtypes, tuple(constants.values()), tuple(options.items())))

    for module in (nvfp4, nvfp4_amax):
        monkeypatch.setattr(module, "launch", compiled)
    buffer = torch.empty(16, dtype=torch.uint8, device=DEVICE)
    for num_rows, num_splits in ((16, 1), (4096, 8), (1 << 20, 64)):
        x = torch.empty(num_rows, 32, dtype=torch.bfloat16, device=DEVICE)
        ends = ends_of([num_rows // num_splits] * num_splits)
        split_quantize_nvfp4(
            x,
            ends,
            buffer,
            buffer,
            num_splits=num_splits,
            hadamard=True,
            block_2d=False,
            stochastic_rounding=True,
            seed=1,
        )
    assert len(asked) == 2


def test_misuse_is_refused() -> None:
    x = torch.randn(16, 16, device=DEVICE)
    buffer = torch.empty(4096, dtype=torch.uint8, device=DEVICE)
    options = {"num_splits": 1, "block_2d": False, "stochastic_rounding": False, "seed": 0}
    with pytest.raises(ValueError, match="takes bf16"):
        split_quantize_nvfp4(x, ends_of([16]), buffer, buffer, hadamard=True, **options)


@pytest.mark.gpu
@pytest.mark.parametrize("make", [hard_input, tame_input])
@pytest.mark.parametrize("dtype", DTYPES)
def test_large_groups_equal_the_reference(dtype, make) -> None:
    x = make(4096, 1040, dtype, seed=1)
    for splits in ([512] * 8, [1024, 0, 16, 1008, 48, 2000]):
        _check(x, splits)
        _check(x, splits, block_2d=True)
        if dtype == torch.bfloat16:
            _check(x, splits, hadamard=True)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_swiglu_on_the_way_in_changes_no_byte_of_large_groups(dtype) -> None:
    h, splits = tame_input(4096, 2 * 1040, dtype, seed=1), [1024, 0, 16, 1008, 48, 2000]
    _check_swiglu(h, splits)
    _check_swiglu(h, splits, block_2d=True)
    if dtype == torch.bfloat16:
        _check_swiglu(h, splits, hadamard=True)


@pytest.mark.gpu
@pytest.mark.parametrize("hadamard", [False, True])
def test_many_splits_equal_the_reference(hadamard) -> None:
    splits = (torch.randint(0, 12, (256,), generator=torch.Generator().manual_seed(3)) * 16).tolist()
    _check(tame_input(sum(splits), 384, torch.bfloat16, seed=2), splits, hadamard=hadamard)


@pytest.mark.gpu
def test_division_is_ieee() -> None:
    """One split for each of 4096 amax of random mantissa: a quotient that is one unit off moves scales or codes."""
    generator = torch.Generator().manual_seed(4)
    for _ in range(4):
        amax = torch.rand(1024, 1, 1, generator=generator) * 1000
        x = torch.rand(1024, 16, 64, generator=generator) * amax
        _check(x.view(-1, 64).to(DEVICE), [16] * 1024)
