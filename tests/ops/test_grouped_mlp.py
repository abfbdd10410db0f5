"""`grouped_mlp`: right numbers, what it saves, and the same bits whichever way it saves it."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from lighterage.formats import bulk_layout
from lighterage.ops import grouped_mlp
from tests.ops import recipe_cases as cases
from tests.ops.recipe_cases import QUANTIZED, RECIPES, check_offload, ragged, same_bits

H, F = 64, 32
EVERY = pytest.mark.parametrize("name", RECIPES)
EVERY_QUANTIZED = pytest.mark.parametrize("name", QUANTIZED)


def _inputs(num_experts: int, rows: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> list[torch.Tensor]:
    """x, w1, w2, probs."""
    generator = torch.Generator().manual_seed(seed)
    shapes = (rows, H), (num_experts, 2 * F, H), (num_experts, H, F)
    values = [torch.randn(shape, generator=generator) / (1, H**0.5, F**0.5)[i] for i, shape in enumerate(shapes)]
    leaves = [value.to(dtype).requires_grad_() for value in values]
    return [*leaves, torch.rand(rows, generator=generator).requires_grad_()]


def _backward(y: torch.Tensor, leaves: list[torch.Tensor]) -> list[torch.Tensor]:
    y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(9)).to(y.dtype))
    return [y.detach(), *cases.gradients(leaves)]


@EVERY
@pytest.mark.parametrize("with_probs", [False, True])
def test_values_and_gradients_are_near_those_of_float64(name: str, with_probs: bool) -> None:
    splits = [32, 0, 128, 64]
    leaves = _inputs(4, sum(splits))[: 4 if with_probs else 3]
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    wanted = []
    for expert, x in enumerate(exact[0].split(splits)):
        gate, up = (x @ exact[1][expert].t()).chunk(2, 1)
        wanted.append(nn.functional.silu(gate) * up)
    rows = torch.cat(wanted) * (exact[3][:, None] if with_probs else 1)
    y = torch.cat([part @ exact[2][expert].t() for expert, part in enumerate(rows.split(splits))])
    right = _backward(y, exact)
    probs = leaves[3] if with_probs else None
    got = _backward(grouped_mlp(*leaves[:3], splits, probs=probs, recipe=RECIPES[name]), leaves)  # type: ignore[arg-type]
    assert [value.dtype for value in got] == [torch.bfloat16] * 4 + [torch.float32] * with_probs
    for value, exact_value in zip(got, right, strict=True):
        assert cases.error(value, exact_value) < 2.5 * cases.ERRORS[name]


@EVERY
@pytest.mark.parametrize("with_probs", [False, True])
def test_however_the_activation_is_saved_the_bits_are_the_same(name: str, with_probs: bool) -> None:
    leaves = _inputs(4, 128)
    results = []
    for mode in ("auto", "quantized", "recompute"):
        torch.manual_seed(0)
        probs = leaves[3] if with_probs else None
        y = grouped_mlp(*leaves[:3], [32, 0, 64, 32], probs=probs, recipe=RECIPES[name], save_activation=mode)  # type: ignore[arg-type]
        results.append(_backward(y, leaves))
    for other in results[1:]:
        assert all(same_bits(a, b) for a, b in zip(results[0], other, strict=True))


def _saved(name: str, mode: str, splits: list[int]) -> list[torch.Tensor]:
    packed: list[torch.Tensor] = []
    x, w1, w2, _ = _inputs(len(splits), sum(splits))

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        packed.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        grouped_mlp(x, w1, w2, splits, recipe=RECIPES[name], save_activation=mode)  # type: ignore[arg-type]
    return packed


@EVERY_QUANTIZED
def test_what_is_saved_are_two_tensors_or_three(name: str) -> None:
    splits = [32, 0, 64, 32]
    x, h = _saved(name, "auto", splits)
    assert x.dtype.itemsize == 1 and h.shape == (128, 2 * F) and h.dtype == torch.bfloat16
    assert len(_saved(name, "recompute", splits)) == 2
    _, again, activation = _saved(name, "quantized", splits)
    assert again.shape == h.shape
    if name != "fp8_tensor":
        assert activation.numel() == bulk_layout(name, splits, F, columnwise=True).num_bytes  # type: ignore[arg-type]


class _Layer(nn.Module):
    def __init__(self, num_experts: int, name: str, splits: list[int], seed: int, mode: str = "auto") -> None:
        super().__init__()
        _, w1, w2, _ = _inputs(num_experts, 0, seed=seed)
        self.w1, self.w2 = nn.Parameter(w1.detach()), nn.Parameter(w2.detach())
        self.recipe, self.splits, self.mode = RECIPES[name], splits, mode

    def forward(self, x: torch.Tensor, probs: torch.Tensor | None = None) -> torch.Tensor:
        return grouped_mlp(x, self.w1, self.w2, self.splits, probs=probs, recipe=self.recipe, save_activation=self.mode)  # type: ignore[arg-type]


def _run(layers: nn.ModuleList, x: torch.Tensor) -> torch.Tensor:
    y = x.clone()
    for layer in layers:
        y = layer(y)
    return y.float().square().mean()


@pytest.mark.parametrize("num_experts", [1, 4, 64])
@EVERY
def test_one_copy_a_buffer_freed_whole_and_the_same_bits(name: str, num_experts: int) -> None:
    splits = ragged(num_experts, num_experts + 3)
    layers = nn.ModuleList(_Layer(num_experts, name, splits, seed) for seed in range(2))
    x = _inputs(1, sum(splits))[0]
    stats = check_offload(
        layers,
        partial(_run, layers, x),
        [x, *layers.parameters()],
        copies=4,
        tier="host" if num_experts == 4 else "disk",
    )
    rows = sum(splits)
    if name in ("fp8_block", "mxfp8", "nvfp4"):
        of_x = bulk_layout(name, splits, H, columnwise=True).num_bytes  # type: ignore[arg-type]
    else:
        of_x = rows * H * (2 if name == "none" else 1)
    assert stats.bytes_out == 2 * (of_x + rows * 2 * F * 2)


@EVERY_QUANTIZED
def test_a_saved_activation_is_one_copy_more(name: str) -> None:
    splits = [32, 0, 64, 32]
    layers = nn.ModuleList(_Layer(4, name, splits, seed, "quantized") for seed in range(2))
    x = _inputs(1, 128)[0]
    check_offload(layers, partial(_run, layers, x), [x, *layers.parameters()], copies=6)


@EVERY
@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_around_it_changes_no_bit(name: str, reentrant: bool) -> None:
    layers = [_Layer(2, name, [32, 64], seed) for seed in range(2)]
    x, _, _, probs = _inputs(2, 96)
    leaves = [x, probs, *layers[0].parameters(), *layers[1].parameters()]

    def run(wrap: bool) -> list[torch.Tensor]:
        torch.manual_seed(5)
        y = x
        for layer in layers:
            y = checkpoint(layer, y, probs, use_reentrant=reentrant) if wrap else layer(y, probs)
        return _backward(y, leaves)

    wanted = run(False)
    assert all(same_bits(a, b) for a, b in zip(run(True), wanted, strict=True))


@EVERY
def test_a_graph_that_is_retained_can_run_again_with_the_same_bits(name: str) -> None:
    leaves = _inputs(2, 64)
    y = grouped_mlp(*leaves[:3], [32, 32], probs=leaves[3], recipe=RECIPES[name])
    found = []
    for retain in (True, False):
        y.backward(torch.ones_like(y), retain_graph=retain)
        found.append(cases.gradients(leaves))
    assert all(same_bits(a, b) for a, b in zip(*found, strict=True))
    with pytest.raises(RuntimeError, match="second time"):
        y.backward(torch.ones_like(y))


@EVERY
@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (3,), (0, 3), (1, 2)])
def test_only_the_gradients_that_are_wanted(name: str, wanted: tuple[int, ...]) -> None:
    leaves = _inputs(4, 128)
    splits = [32, 0, 64, 32]
    torch.manual_seed(0)
    y = grouped_mlp(*leaves[:3], splits, probs=leaves[3], recipe=RECIPES[name])
    every = _backward(y, leaves)[1:]
    some = [leaf.detach().requires_grad_(index in wanted) for index, leaf in enumerate(leaves)]
    torch.manual_seed(0)
    got = _backward(grouped_mlp(*some[:3], splits, probs=some[3], recipe=RECIPES[name]), some)[1:]
    assert len(got) == len(wanted)
    if name != "nvfp4":  # whose random roundings of one direction depend on whether the other is made
        assert all(same_bits(got[i], every[index]) for i, index in enumerate(wanted))


def test_one_row_may_come_without_a_leading_dimension() -> None:
    w1, w2, x = torch.randn(1, 64, 32), torch.randn(1, 32, 32), torch.randn(32)
    assert torch.equal(grouped_mlp(x, w1, w2, [1]), grouped_mlp(x[None], w1, w2, [1])[0])


@EVERY
def test_no_rows_at_all(name: str) -> None:
    leaves = _inputs(2, 0)
    y, dx, dw1, dw2, dprobs = _backward(grouped_mlp(*leaves[:3], [0, 0], probs=leaves[3], recipe=RECIPES[name]), leaves)
    assert y.shape == dx.shape == (0, H) and not dw1.any() and not dw2.any() and dprobs.shape == (0,)


@EVERY
def test_autocast_casts_the_input_and_leaves_master_weights(name: str) -> None:
    leaves = _inputs(2, 64, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = grouped_mlp(*leaves[:3], [32, 32], recipe=RECIPES[name])
    assert y.dtype == torch.bfloat16
    assert all(value.dtype == torch.float32 for value in _backward(y, leaves[:3])[1:])


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"m_splits": [32, 16]}, ValueError, "add up"),
        ({"m_splits": [64]}, ValueError, "each of the 2 experts"),
        ({"m_splits": [24, 40]}, ValueError, r"multiples of 16.*pad_rows"),
        ({"w1": torch.zeros(2, 48, H, dtype=torch.bfloat16)}, ValueError, "w1"),
        ({"w2": torch.zeros(2, H, F)}, TypeError, "one dtype"),
        ({"probs": torch.ones(3)}, ValueError, "probs"),
        ({"probs": torch.ones(64, dtype=torch.int64)}, ValueError, "probs"),
        ({"save_activation": "bf16"}, ValueError, "save_activation"),
        ({"recipe": "fp8"}, TypeError, "recipe"),
        ({"backend": "cutlass"}, ValueError, "cutlass"),
    ],
)
def test_wrong_use_is_told(change: dict[str, object], error: type[Exception], match: str) -> None:
    x, w1, w2, _ = _inputs(2, 64)
    arguments: dict[str, object] = {"x": x, "w1": w1, "w2": w2, "m_splits": [32, 32], "recipe": QUANTIZED["fp8_block"]}
    with pytest.raises(error, match=match):
        grouped_mlp(**(arguments | change))  # type: ignore[arg-type]
