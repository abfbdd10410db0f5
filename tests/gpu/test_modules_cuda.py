"""Grouped layers on a GPU: the same bits under offload, no wait for the device, launches that do not grow."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import nn

import lighterage
from lighterage.nn import GroupedLinear, Linear
from lighterage.ops import grouped_linear, grouped_mlp
from lighterage.ops.gemm_backends import BackendName
from lighterage.recipes import Float8BlockScaling, Float8CurrentScaling, Recipe
from tests.ops import recipe_cases as cases
from tests.ops.recipe_cases import QUANTIZED, RECIPES, ragged, same_bits

pytestmark = pytest.mark.gpu

bf16 = torch.bfloat16
ON_DEVICE: dict[str, Recipe | None] = {
    # Per-tensor gradients in E5M2 are multiplied expert by expert, for which the host must know the splits.
    **{name: recipe for name, recipe in RECIPES.items() if name != "fp8_tensor"},
    "fp8_tensor_e4m3": Float8CurrentScaling(fp8_format="e4m3"),
}


@contextmanager
def no_waiting() -> Iterator[None]:
    """Inside, whatever makes the host wait for the device is an error."""
    torch.cuda.synchronize()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it says that it is a prototype
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


class _MLP(nn.Module):
    def __init__(self, num_experts: int, hidden: int, features: int, recipe: Recipe | None) -> None:
        super().__init__()
        self.w1 = nn.Parameter(torch.randn(num_experts, 2 * features, hidden, device="cuda", dtype=bf16) / hidden**0.5)
        self.w2 = nn.Parameter(torch.randn(num_experts, hidden, features, device="cuda", dtype=bf16) / features**0.5)
        self.recipe = recipe

    def forward(self, x: torch.Tensor, splits: object, probs: torch.Tensor | None = None) -> torch.Tensor:
        return grouped_mlp(x, self.w1, self.w2, splits, probs=probs, recipe=self.recipe)  # type: ignore[arg-type]


def _compare(layers: nn.ModuleList, run: Callable[[], torch.Tensor], leaves: list[torch.Tensor], copies: int) -> None:
    def step(offloader: lighterage.Offloader | None = None) -> list[torch.Tensor]:
        torch.manual_seed(3)
        loss = run()
        for section in offloader.sections if offloader is not None else ():
            offloader.release(section)  # the last one too, which backward would otherwise find where it was
        loss.backward()
        return [loss.detach().clone(), *cases.gradients(leaves)]

    wanted = step()
    assert all(same_bits(a, b) for a, b in zip(step(), wanted, strict=True)), "not reproducible by itself"
    with lighterage.offload(layers, keep_last=0, min_bytes=1) as offloader:
        for _ in range(3):
            got = step(offloader)
            assert len(got) == len(wanted) and all(same_bits(a, b) for a, b in zip(got, wanted, strict=True))
        stats = offloader.stats()
    assert (stats.copies_out, stats.copies_in) == (copies, copies)
    assert stats.bytes_out > 0 and stats.still_alive_bytes == 0


@pytest.mark.parametrize("device_splits", [False, True])
@pytest.mark.parametrize("num_experts", [1, 4, 64])
@pytest.mark.parametrize("name", ON_DEVICE)
def test_grouped_linear_has_the_same_bits_under_offload(name: str, num_experts: int, device_splits: bool) -> None:
    layers = nn.ModuleList(
        GroupedLinear(num_experts, 256, 256, recipe=ON_DEVICE[name], device="cuda", dtype=bf16) for _ in range(2)
    )
    splits: object = ragged(num_experts, 2 * num_experts + 3, 128)
    rows = sum(splits)  # type: ignore[call-overload]
    x = torch.randn(rows, 256, device="cuda", dtype=bf16, requires_grad=True)
    splits = torch.tensor(splits, device="cuda") if device_splits else splits

    def run() -> torch.Tensor:
        y = x.clone()
        for layer in layers:
            y = layer(y, splits)
        return y.float().square().mean()

    _compare(layers, run, [x, *layers.parameters()], copies=2)


@pytest.mark.parametrize("num_experts", [1, 4, 64])
@pytest.mark.parametrize("name", QUANTIZED)
def test_grouped_mlp_has_the_same_bits_under_offload(name: str, num_experts: int) -> None:
    layers = nn.ModuleList(_MLP(num_experts, 256, 128, RECIPES[name]) for _ in range(2))
    splits = ragged(num_experts, 2 * num_experts + 3, 128)
    x = torch.randn(sum(splits), 256, device="cuda", dtype=bf16, requires_grad=True)

    def run() -> torch.Tensor:
        y = x.clone()
        for layer in layers:
            y = layer(y, splits)
        return y.float().square().mean()

    _compare(layers, run, [x, *layers.parameters()], copies=4)


@pytest.mark.parametrize("name", ON_DEVICE)
def test_with_splits_on_the_device_the_host_never_waits(name: str) -> None:
    splits = torch.tensor([256, 0, 384, 128], device="cuda")
    layer = GroupedLinear(4, 256, 512, recipe=ON_DEVICE[name], device="cuda", dtype=bf16)
    mlp = _MLP(4, 512, 256, ON_DEVICE[name])
    # Rows past the last split are nobody's.
    x = torch.randn(1024, 256, device="cuda", dtype=bf16, requires_grad=True)
    probs = torch.rand(1024, device="cuda", requires_grad=True)
    gradient = torch.randn(1024, 512, device="cuda", dtype=bf16)
    for attempt in range(2):  # kernels are compiled and loaded by the first
        with no_waiting() if attempt else torch.enable_grad():
            y = mlp(layer(x, splits), splits, probs)
            y.backward(gradient)
    assert not y[768:].any() and not x.grad[768:].any()  # type: ignore[index]
    assert y[:768].any() and not layer.weight.grad[1].any()
    assert not probs.grad[768:].any()  # type: ignore[index]


@pytest.mark.parametrize("name", ON_DEVICE)
def test_what_lies_past_the_last_split_changes_no_bit(name: str) -> None:
    splits = torch.tensor([256, 0, 384, 128], device="cuda")
    layer = GroupedLinear(4, 256, 512, recipe=ON_DEVICE[name], device="cuda", dtype=bf16)
    rows = torch.randn(1024, 256, device="cuda", dtype=bf16)
    gradient = torch.randn(1024, 512, device="cuda", dtype=bf16)
    found = []
    for rest in (0.0, float("inf")):
        x, dy = rows.clone(), gradient.clone()
        x[768:], dy[768:] = rest, rest
        torch.manual_seed(3)
        y = layer(x.requires_grad_(), splits)
        y.backward(dy)
        assert x.grad is not None
        found.append([y, x.grad, *cases.gradients(layer.parameters())])
    assert all(same_bits(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("name", ON_DEVICE)
def test_splits_on_the_device_give_the_bits_of_splits_on_the_host(name: str) -> None:
    recipe = ON_DEVICE[name]
    sizes = [256, 0, 384, 128]
    x = torch.randn(768, 256, device="cuda", dtype=bf16, requires_grad=True)
    w = torch.randn(4, 512, 256, device="cuda", dtype=bf16, requires_grad=True)
    b = torch.randn(4, 512, device="cuda", dtype=bf16, requires_grad=True)
    gradient = torch.randn(768, 512, device="cuda", dtype=bf16)
    found = []
    for splits in (sizes, torch.tensor(sizes, device="cuda"), torch.tensor(sizes, device="cuda", dtype=torch.int32)):
        torch.manual_seed(0)
        y = grouped_linear(x, w, splits, bias=b, recipe=recipe)
        y.backward(gradient)
        found.append([y.detach(), *cases.gradients([x, w, b])])
    for other in found[1:]:
        assert all(same_bits(a, b) for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("name", RECIPES)
def test_values_and_gradients_are_near_those_of_float64(name: str) -> None:
    splits = [256, 0, 384, 128]
    leaves = [torch.randn(768, 256, device="cuda"), torch.randn(4, 512, 256, device="cuda") / 16]
    leaves = [leaf.to(bf16).requires_grad_() for leaf in (*leaves, torch.randn(4, 512, device="cuda"))]
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    gradient = torch.randn(768, 512, device="cuda", dtype=bf16)
    parts = exact[0].split(splits)
    right = torch.cat([part @ exact[1][e].t() + exact[2][e] for e, part in enumerate(parts)])
    right.backward(gradient.double())
    y = grouped_linear(leaves[0], leaves[1], splits, bias=leaves[2], recipe=RECIPES[name])
    y.backward(gradient)
    for value, wanted in zip(
        [y, *(leaf.grad for leaf in leaves)], [right, *(leaf.grad for leaf in exact)], strict=True
    ):
        assert cases.error(value, wanted) < cases.ERRORS[name]  # type: ignore[arg-type]


def _launches(call: Callable[[], object]) -> int:
    call()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        torch.cuda.synchronize()
    on_device = [event for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    return sum(not event.name.startswith(("Memcpy", "Memset")) for event in on_device)


@pytest.mark.parametrize("name", ["fp8_block", "mxfp8", "nvfp4"])
def test_launches_do_not_grow_with_the_number_of_experts(name: str) -> None:
    """On the grouped path: for few large experts "auto" may take products that are launched one by one."""
    counts = set()
    backend: BackendName = "triton" if name == "fp8_block" else "emulation"
    for num_experts in (8, 64, 256):
        weight = torch.randn(num_experts, 256, 256, device="cuda", dtype=bf16, requires_grad=True)
        x = torch.randn(256 * 128, 256, device="cuda", dtype=bf16, requires_grad=True)
        gradient = torch.randn(256 * 128, 256, device="cuda", dtype=bf16)
        splits = [len(x) // num_experts] * num_experts

        def step(weight: torch.Tensor = weight, x: torch.Tensor = x, splits: list[int] = splits) -> None:
            weight.grad = x.grad = None
            grouped_linear(x, weight, splits, recipe=RECIPES[name], backend=backend).backward(gradient)  # noqa: B023

        counts.add(_launches(step))
    assert len(counts) == 1


@pytest.mark.parametrize("recipe", [Float8BlockScaling(), Float8CurrentScaling()], ids=["fp8_block", "fp8_tensor"])
def test_linear_through_the_products_of_pytorch(recipe: Recipe) -> None:
    layers = nn.ModuleList(Linear(512, 512, recipe=recipe, device="cuda", dtype=bf16) for _ in range(2))
    x = torch.randn(4, 256, 512, device="cuda", dtype=bf16, requires_grad=True)

    def run() -> torch.Tensor:
        y = x.clone()
        for layer in layers:
            y = layer(y)
        return y.float().square().mean()

    _compare(layers, run, [x, *layers.parameters()], copies=2)


def test_compile_around_a_grouped_layer() -> None:
    layer = GroupedLinear(4, 256, 256, recipe=Float8BlockScaling(), device="cuda", dtype=bf16)
    splits = torch.tensor([256, 0, 128, 128], device="cuda")
    x = torch.randn(512, 256, device="cuda", dtype=bf16)

    def forward(x: torch.Tensor) -> torch.Tensor:
        return layer(x * 2, splits).relu()

    assert same_bits(torch.compile(forward)(x), forward(x))


def test_a_backend_that_needs_the_host_refuses_splits_on_the_device() -> None:
    layer = GroupedLinear(2, 256, 256, device="cuda", dtype=bf16)
    x = torch.randn(256, 256, device="cuda", dtype=bf16)
    splits = torch.tensor([128, 128], device="cuda")
    with pytest.raises(ValueError, match="triton"):
        grouped_linear(x, layer.weight, splits, recipe=Float8BlockScaling(), backend="torch")
    with pytest.raises(ValueError, match="e4m3"):
        grouped_linear(x, layer.weight, splits, recipe=Float8CurrentScaling(), backend="torch").sum().backward()
