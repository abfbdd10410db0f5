"""`grouped_linear`: right numbers, one buffer saved, and the same bits whatever is around it."""

from __future__ import annotations

import importlib
from functools import partial

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from lighterage import recipes
from lighterage.formats import bulk_layout
from lighterage.formats.splits import Splits
from lighterage.ops import grouped_linear as public
from lighterage.ops.grouped_linear import grouped_linear
from tests.ops import recipe_cases as cases
from tests.ops.recipe_cases import QUANTIZED, RECIPES, Recorded, check_offload, ragged, same_bits

K, N = 64, 96
EVERY = pytest.mark.parametrize("name", RECIPES)
EVERY_QUANTIZED = pytest.mark.parametrize("name", QUANTIZED)


def _inputs(
    num_experts: int, rows: int, *, bias: bool = True, dtype: torch.dtype = torch.bfloat16, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, K, generator=generator).to(dtype).requires_grad_()
    w = (torch.randn(num_experts, N, K, generator=generator) / K**0.5).to(dtype).requires_grad_()
    b = torch.randn(num_experts, N, generator=generator).to(dtype).requires_grad_() if bias else None
    return x, w, b


def _gradient(rows: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(rows, N, generator=torch.Generator().manual_seed(9)).to(dtype)


def _backward(y: torch.Tensor, *leaves: torch.Tensor | None) -> list[torch.Tensor]:
    y.backward(_gradient(y.shape[0], y.dtype))
    return [y.detach(), *cases.gradients(leaf for leaf in leaves if leaf is not None)]


@EVERY
@pytest.mark.parametrize("num_experts", [1, 4])
def test_values_and_gradients_are_near_those_of_float64(name: str, num_experts: int) -> None:
    splits = ragged(num_experts, 12)
    x, w, b = _inputs(num_experts, sum(splits))
    assert b is not None
    exact = [leaf.detach().double().requires_grad_() for leaf in (x, w, b)]
    parts = exact[0].split(splits)
    wanted = torch.cat([part @ exact[1][e].t() + exact[2][e] for e, part in enumerate(parts)])
    wanted.backward(_gradient(len(x)).double())
    got = _backward(grouped_linear(x, w, splits, bias=b, recipe=RECIPES[name]), x, w, b)
    for value, right in zip(got, [wanted, *(leaf.grad for leaf in exact)], strict=True):
        assert value.dtype == torch.bfloat16
        assert cases.error(value, right) < cases.ERRORS[name]


def test_the_grouped_kernel_reads_the_buffers_that_came_back() -> None:
    """With the interpreter on a CPU: no member of a group is made, so the buffers are all that there is."""
    x, w, b = _inputs(2, 48)
    moved = torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor.clone(), lambda tensor: tensor.clone())
    results = []
    for backend in ("reference", "triton"):
        with moved:
            y = grouped_linear(x, w, [16, 32], bias=b, recipe=QUANTIZED["fp8_block"], backend=backend)  # type: ignore[arg-type]
        results.append(_backward(y, x, w, b))
    for reference, got in zip(*results, strict=True):
        assert cases.error(got, reference) < 0.005


@EVERY
def test_experts_without_rows_have_zero_gradients(name: str) -> None:
    x, w, b = _inputs(4, 64)
    assert b is not None
    _, _, dw, db = _backward(grouped_linear(x, w, [0, 32, 0, 32], bias=b, recipe=RECIPES[name]), x, w, b)
    assert not dw[[0, 2]].any() and not db[[0, 2]].any()
    assert dw[1].any() and db[3].any()


@EVERY
def test_no_rows_at_all(name: str) -> None:
    x, w, b = _inputs(2, 0)
    y, dx, dw, db = _backward(grouped_linear(x, w, [0, 0], bias=b, recipe=RECIPES[name]), x, w, b)
    assert y.shape == (0, N) and dx.shape == (0, K) and not dw.any() and not db.any()


class _Layer(nn.Module):
    """The function as a section, with what it needs."""

    def __init__(self, num_experts: int, recipe: recipes.Recipe | None, *, seed: int, **options: bool) -> None:
        super().__init__()
        _, w, b = _inputs(num_experts, 0, seed=seed)
        self.w, self.b = nn.Parameter(w.detach()[:, :K].clone()), nn.Parameter(b.detach()[:, :K].clone())  # type: ignore[union-attr]
        self.recipe, self.options = recipe, options
        self.splits: list[int] | Splits = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return grouped_linear(x, self.w, self.splits, bias=self.b, recipe=self.recipe, **self.options)


def _layers(num_experts: int, name: str, splits: list[int], num: int = 2, **options: bool) -> nn.ModuleList:
    layers = nn.ModuleList(_Layer(num_experts, RECIPES[name], seed=i, **options) for i in range(num))
    for layer in layers:
        layer.splits = splits
    return layers


def _run(layers: nn.ModuleList, x: torch.Tensor) -> torch.Tensor:
    y = x.clone()  # which nobody holds but the layer
    for layer in layers:
        y = layer(y)
    return y.float().square().mean()


@pytest.mark.parametrize("num_experts", [1, 4, 64])
@EVERY_QUANTIZED
def test_one_copy_a_layer_freed_whole_and_the_same_bits(
    name: str, num_experts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = importlib.import_module("lighterage.ops.grouped_linear")
    recorded = Recorded(module.columnwise_bytes)
    monkeypatch.setattr(module, "columnwise_bytes", recorded)
    splits = ragged(num_experts, 4 if num_experts == 1 else num_experts + 3)
    layers = _layers(num_experts, name, splits)
    x = _inputs(1, sum(splits))[0]
    stats = check_offload(
        layers,
        partial(_run, layers, x),
        [x, *layers.parameters()],
        refs=lambda: recorded.refs,
        copies=2,
        tier="host" if num_experts == 4 else "disk",
    )
    assert len(recorded.refs) == 2
    assert recorded.num_bytes == 2 * stats.bytes_out, "once without offload, once with it"
    if name in ("fp8_block", "mxfp8", "nvfp4"):
        assert stats.bytes_out == 2 * bulk_layout(name, splits, K, columnwise=True).num_bytes  # type: ignore[arg-type]


@pytest.mark.parametrize("num_experts", [1, 4, 64])
def test_without_a_recipe_the_input_is_what_is_saved(num_experts: int) -> None:
    splits = ragged(num_experts, num_experts + 3)
    layers = _layers(num_experts, "none", splits)
    x = _inputs(1, sum(splits))[0]
    stats = check_offload(layers, partial(_run, layers, x), [x, *layers.parameters()], copies=2)
    assert stats.bytes_out == 2 * x.nbytes


@EVERY
def test_splits_may_change_each_step(name: str) -> None:
    layers = _layers(4, name, [])
    x = _inputs(1, 128)[0]
    for splits in ([128, 0, 0, 0], [32, 32, 32, 32], [0, 64, 64, 0]):
        for layer in layers:
            layer.splits = splits
        check_offload(layers, partial(_run, layers, x), [x, *layers.parameters()], copies=2)


@EVERY_QUANTIZED
def test_one_tensor_is_saved_and_weights_pass_no_hook(name: str) -> None:
    x, w, b = _inputs(4, 128)
    packed: list[torch.Tensor] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        packed.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        grouped_linear(x, w, [32, 32, 32, 32], bias=b, recipe=RECIPES[name])
    assert [tensor.dtype.itemsize for tensor in packed] == [1]
    num_values = packed[0].numel() * (2 if name == "nvfp4" else 1)
    assert x.numel() <= num_values <= 2 * x.numel(), "codes, and scales"


@EVERY
def test_frozen_weights_save_nothing_of_the_input(name: str) -> None:
    x, w, _ = _inputs(4, 128)
    splits = [32, 64, 0, 32]
    torch.manual_seed(0)
    wanted = _backward(grouped_linear(x, w, splits, recipe=RECIPES[name]), x)[1]
    w.grad = None
    packed: list[torch.Tensor] = []
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: packed.append(t) or t, lambda t: t)
    torch.manual_seed(0)
    with hooks:
        y = grouped_linear(x, w.detach(), splits, recipe=RECIPES[name])
    assert all(tensor.data_ptr() == w.data_ptr() for tensor in packed)
    if name != "nvfp4":  # whose random roundings of one direction depend on whether the other is made
        assert same_bits(_backward(y, x)[1], wanted)


@EVERY
def test_an_input_without_gradient_keeps_no_weight(name: str) -> None:
    x, w, b = _inputs(4, 128)
    splits = [32, 64, 0, 32]
    wanted = _backward(grouped_linear(x, w, splits, bias=b, recipe=RECIPES[name]), w, b)[1:]
    y = grouped_linear(x.detach(), w, splits, bias=b, recipe=RECIPES[name])
    node = y.grad_fn.next_functions[0][0]  # type: ignore[union-attr]
    assert node.weight is None  # type: ignore[union-attr]
    got = _backward(y, w, b)[1:]
    if name != "nvfp4":
        assert all(same_bits(a, b) for a, b in zip(got, wanted, strict=True))


@EVERY
def test_microbatches_add_up(name: str) -> None:
    x, w, b = _inputs(4, 256)
    assert b is not None
    halves = [(x.detach()[:128], [64, 0, 32, 32]), (x.detach()[128:], [0, 0, 96, 32])]
    apart = []
    for part, splits in halves:
        torch.manual_seed(0)
        apart.append(_backward(grouped_linear(part, w, splits, bias=b, recipe=RECIPES[name]), w, b)[1:])
    outputs = []
    for part, splits in halves:
        torch.manual_seed(0)
        outputs.append(grouped_linear(part, w, splits, bias=b, recipe=RECIPES[name]))
    for y in outputs:
        y.backward(_gradient(128))
    for leaf, first, second in zip((w, b), *apart, strict=True):
        assert leaf.grad is not None and same_bits(leaf.grad, first + second)


@EVERY
def test_a_graph_that_is_retained_can_run_again_with_the_same_bits(name: str) -> None:
    x, w, b = _inputs(4, 128)
    y = grouped_linear(x, w, [32, 64, 0, 32], bias=b, recipe=RECIPES[name])
    found = []
    for retain in (True, False):
        y.backward(_gradient(128), retain_graph=retain)
        found.append(cases.gradients([x, w, b]))  # type: ignore[list-item]
    assert all(same_bits(a, b) for a, b in zip(*found, strict=True))
    with pytest.raises(RuntimeError, match="second time"):
        y.backward(_gradient(128))


@EVERY_QUANTIZED
def test_the_weights_copy_goes_with_the_first_backward(name: str) -> None:
    x, w, _ = _inputs(2, 64)
    y = grouped_linear(x, w, [32, 32], recipe=RECIPES[name])
    node = y.grad_fn.next_functions[0][0]  # type: ignore[union-attr]
    assert node.weight is not None  # type: ignore[union-attr]
    y.backward(_gradient(64))
    assert node.weight is None  # type: ignore[union-attr]


@EVERY
def test_the_same_layer_twice_in_one_graph(name: str) -> None:
    layers = _layers(2, name, [32, 32], num=1)
    x = _inputs(1, 64)[0]

    def run() -> torch.Tensor:
        return layers[0](layers[0](x.clone())).float().square().mean()

    check_offload(layers, run, [x, *layers.parameters()], copies=2)


@EVERY
@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_around_it_changes_no_bit(name: str, reentrant: bool) -> None:
    layers = _layers(2, name, [32, 32])
    x = _inputs(1, 64)[0]

    def run(wrap: bool) -> list[torch.Tensor]:
        torch.manual_seed(5)
        y = x
        for layer in layers:
            y = checkpoint(layer, y, use_reentrant=reentrant) if wrap else layer(y)
        loss = y.float().square().mean()
        loss.backward()
        return [loss.detach(), *cases.gradients([x, *layers.parameters()])]

    wanted = run(False)
    assert all(same_bits(a, b) for a, b in zip(run(True), wanted, strict=True))


@EVERY
def test_checkpoint_and_offload_together(name: str) -> None:
    layers = _layers(2, name, [32, 32])
    blocks = nn.ModuleList(_Checkpointed(layer) for layer in layers)
    x = _inputs(1, 64)[0]
    check_offload(blocks, partial(_run, blocks, x), [x, *layers.parameters()], copies=2)


class _Checkpointed(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return checkpoint(self.layer, x, use_reentrant=False)


@EVERY
def test_compile_around_it_gives_the_same_bits(name: str) -> None:
    layers = _layers(2, name, [32, 32])
    x = _inputs(1, 64)[0]

    def run(call: nn.Module) -> list[torch.Tensor]:
        torch.manual_seed(5)
        y = call(x * 2) + 1
        y.float().sum().backward()
        return [y.detach(), *cases.gradients([x, *layers.parameters()])]

    model = nn.Sequential(*layers)
    wanted = run(model)
    compiled = torch.compile(model, backend="aot_eager")
    assert all(same_bits(a, b) for a, b in zip(run(compiled), wanted, strict=True))


@EVERY_QUANTIZED
def test_saving_the_original_input_gives_the_same_bits(name: str) -> None:
    splits = [32, 64, 0, 32]
    results = []
    for option in (False, True):
        layers = _layers(4, name, splits, save_original_input=option)
        x = _inputs(1, 128)[0]
        torch.manual_seed(0)
        _run(layers, x).backward()
        results.append(cases.gradients([x, *layers.parameters()]))
        stats = check_offload(layers, partial(_run, layers, x), [x, *layers.parameters()], copies=2)
        assert (stats.bytes_out == 2 * x.nbytes) == option
    assert all(same_bits(a, b) for a, b in zip(*results, strict=True))


@EVERY
def test_separate_weights_side_by_side_or_not(name: str) -> None:
    x, w, b = _inputs(3, 96)
    assert b is not None
    splits = [32, 32, 32]
    torch.manual_seed(0)
    wanted = _backward(grouped_linear(x, w, splits, bias=b, recipe=RECIPES[name]), x, w, b)
    whole_w, whole_b = w.detach().clone(), b.detach().clone()
    beside = [part.requires_grad_() for part in whole_w], [part.requires_grad_() for part in whole_b]
    apart = [p.clone().requires_grad_() for p in whole_w], [p.clone().requires_grad_() for p in whole_b]
    for weights, biases in (beside, apart):
        torch.manual_seed(0)
        y, dx, *rest = _backward(
            grouped_linear(x, weights, splits, bias=biases, recipe=RECIPES[name]), x, *weights, *biases
        )
        got = [y, dx, torch.stack(rest[:3]), torch.stack(rest[3:])]
        assert all(same_bits(a, b) for a, b in zip(got, wanted, strict=True))


def test_gradients_of_separate_weights_are_views_of_one() -> None:
    x, w, _ = _inputs(3, 96, bias=False)
    weights = [part.clone().requires_grad_() for part in w.detach()]
    grouped_linear(x, weights, [32, 32, 32], recipe=QUANTIZED["fp8_block"]).backward(_gradient(96))
    assert len({weight.grad.untyped_storage().data_ptr() for weight in weights}) == 1  # type: ignore[union-attr]


@EVERY
def test_leading_dimensions_are_rows(name: str) -> None:
    x, w, b = _inputs(2, 64)
    flat = grouped_linear(x, w, [32, 32], bias=b, recipe=RECIPES[name])
    shaped = grouped_linear(x.view(4, 16, K), w, [32, 32], bias=b, recipe=RECIPES[name])
    assert shaped.shape == (4, 16, N) and same_bits(shaped.flatten(0, 1), flat)


@EVERY
def test_autocast_casts_the_input_and_leaves_master_weights(name: str) -> None:
    x, w, b = _inputs(2, 64, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = grouped_linear(x, w, [32, 32], bias=b, recipe=RECIPES[name])
    assert y.dtype == torch.bfloat16
    _, dx, dw, db = _backward(y, x, w, b)
    assert dx.dtype == dw.dtype == db.dtype == torch.float32
    by_hand = grouped_linear(
        x.bfloat16(), w.bfloat16() if name == "none" else w, [32, 32], bias=b.bfloat16() if b is not None else None,
        recipe=RECIPES[name],
    )  # fmt: skip
    assert cases.error(y.detach(), by_hand.detach()) < 0.005


@EVERY_QUANTIZED
def test_float32_weights_with_bf16_rows(name: str) -> None:
    x, _, _ = _inputs(2, 64)
    _, w, b = _inputs(2, 64, dtype=torch.float32)
    y, dx, dw, _ = _backward(grouped_linear(x, w, [32, 32], bias=b, recipe=RECIPES[name]), x, w, b)
    assert y.dtype == dx.dtype == torch.bfloat16 and dw.dtype == torch.float32


def test_random_roundings_follow_the_default_generator() -> None:
    x, w, _ = _inputs(2, 64)

    def dx(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return _backward(grouped_linear(x, w, [32, 32], recipe=recipes.NVFP4BlockScaling()), x, w)[1]

    assert same_bits(dx(1), dx(1)) and not same_bits(dx(1), dx(2))


def test_nothing_is_saved_where_autograd_does_not_record() -> None:
    x, w, b = _inputs(2, 64)
    with torch.no_grad():
        y = grouped_linear(x, w, [32, 32], bias=b, recipe=QUANTIZED["fp8_block"])
    assert not y.requires_grad
    assert same_bits(y, public(x, w, [32, 32], bias=b, recipe=QUANTIZED["fp8_block"]).detach())


def test_double_backward_is_refused() -> None:
    x, w, _ = _inputs(2, 64)
    y = grouped_linear(x, w, [32, 32], recipe=QUANTIZED["fp8_block"])
    (dx,) = torch.autograd.grad(y, x, _gradient(64).requires_grad_(), create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"m_splits": [32, 16]}, ValueError, "add up"),
        ({"m_splits": [96, -32]}, ValueError, "negative"),
        ({"m_splits": [64]}, ValueError, "each of the 2 experts"),
        ({"m_splits": [24, 40]}, ValueError, r"multiples of 16.*pad_rows"),
        ({"m_splits": torch.tensor([0.5, 0.5])}, TypeError, "integers"),
        ({"x": torch.zeros(64, 48)}, ValueError, "64 input features"),
        ({"x": torch.zeros(64, K, dtype=torch.int32)}, TypeError, "bf16"),
        ({"weight": torch.zeros(N, K)}, ValueError, r"\(E, N, K\)"),
        ({"weight": torch.zeros(2, 20, K)}, ValueError, "divisible by 16"),
        ({"weight": torch.zeros(2, N, K, device="meta")}, ValueError, "meta"),
        ({"bias": torch.zeros(2, 3)}, ValueError, "bias must be"),
        ({"backend": "cutlass"}, ValueError, "cutlass"),
        ({"backend": "emulation"}, ValueError, "emulation"),
        ({"backend": "torch"}, ValueError, "CUDA"),
        ({"recipe": "fp8"}, TypeError, "recipe"),
        ({"recipe": None, "x": torch.zeros(64, K)}, TypeError, "autocast"),
        ({"weight": []}, ValueError, "got none"),
        ({"weight": [torch.zeros(N, K), torch.zeros(K, N)]}, ValueError, "alike"),
    ],
)
def test_wrong_use_is_told(change: dict[str, object], error: type[Exception], match: str) -> None:
    x, w, b = _inputs(2, 64)
    arguments: dict[str, object] = {
        "x": x,
        "weight": w,
        "m_splits": [32, 32],
        "bias": b,
        "recipe": QUANTIZED["fp8_block"],
    }
    with pytest.raises(error, match=match):
        grouped_linear(**(arguments | change))  # type: ignore[arg-type]
