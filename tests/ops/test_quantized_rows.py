"""An input that was quantized already gives a layer the bits that quantizing it there would have given."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import lighterage
from lighterage.formats import Float8BlockQuantizer
from lighterage.formats.quantized_tensor import has_usage
from lighterage.nn import DotProductAttention, Linear
from lighterage.ops import attention, grouped_linear, linear
from lighterage.recipes import Float8BlockScaling, Float8CurrentScaling, MXFP8BlockScaling, NVFP4BlockScaling

RECIPES = {
    "fp8_block": Float8BlockScaling(),
    "mxfp8": MXFP8BlockScaling(),
    "nvfp4": NVFP4BlockScaling(stochastic_rounding=False),
    "fp8_current": Float8CurrentScaling(),
}
all_recipes = pytest.mark.parametrize("name", RECIPES)
HEADS, HEAD_WIDTH, TOKENS, BATCH = 4, 32, 64, 2
WIDTH = HEADS * HEAD_WIDTH


def inputs() -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(BATCH, TOKENS, HEADS, HEAD_WIDTH, dtype=torch.bfloat16, requires_grad=True) for _ in range(3)]


class Layer(nn.Module):
    """Attention whose output is quantized by itself or by the projection."""

    def __init__(self, name: str, quantized: bool) -> None:
        super().__init__()
        torch.manual_seed(1)
        recipe = RECIPES[name]
        quantizer = recipe.quantizer("input", rowwise=True, columnwise=True) if quantized else None
        self.core = DotProductAttention(causal=True, output_quantizer=quantizer)
        self.out = Linear(WIDTH, 64, recipe=recipe, dtype=torch.bfloat16)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.out(self.core(q, k, v))


def step(layer: Layer, q: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
    out = layer(q * 1, k * 1, v * 1)
    toward = torch.randn(out.shape, generator=torch.Generator().manual_seed(2)).bfloat16()
    return [out.detach(), *torch.autograd.grad(out, [q, k, v, *layer.parameters()], toward)]


@all_recipes
def test_attention_may_quantize_for_its_projection(name):
    """Forward, and every gradient, to the bit."""
    found, wanted = (step(Layer(name, quantized), *inputs()) for quantized in (True, False))
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


@all_recipes
def test_with_offload_the_bits_are_the_same_and_each_byte_moves_once(name):
    """The kernel's output and the projection's codes: two allocations, which nobody holds back."""
    layer, given = Layer(name, True), inputs()
    wanted = step(layer, *given)
    with lighterage.offload([layer], keep_last=0, min_bytes=1024, release_after=0) as offloader:
        for _ in range(2):
            assert all(torch.equal(a, b) for a, b in zip(step(layer, *given), wanted, strict=True))
            stats = offloader.stats()
            assert stats.bytes_in == stats.bytes_out > 4 * BATCH * TOKENS * WIDTH * 2
            assert stats.bytes_out == stats.unique_bytes - stats.kept_bytes
            assert stats.copies_out == stats.copies_in == 6
            assert stats.still_alive_bytes == 0


@all_recipes
def test_the_tensor_that_was_given_keeps_its_codes(name):
    recipe = RECIPES[name]
    x = recipe.quantizer("input", rowwise=True, columnwise=True)(torch.randn(64, 128, dtype=torch.bfloat16))
    before = [part.clone() for part in x.data_tensors()]
    w = torch.randn(64, 128, dtype=torch.bfloat16, requires_grad=True)
    for _ in range(2):
        linear(x, w, recipe=recipe, save_original_input=True).sum().backward()
    assert has_usage(x, "rowwise") and has_usage(x, "columnwise")
    assert all(torch.equal(a, b) for a, b in zip(x.data_tensors(), before, strict=True))


def test_what_the_recipe_would_not_have_made_is_refused():
    w = torch.randn(64, 128, dtype=torch.bfloat16, requires_grad=True)
    x = torch.randn(64, 128, dtype=torch.bfloat16)
    with pytest.raises(TypeError, match="quantized already must be what MXFP8BlockScaling"):
        linear(Float8BlockQuantizer()(x), w, recipe=MXFP8BlockScaling())
    with pytest.raises(TypeError, match="block_scaling_dim"):
        linear(Float8BlockQuantizer(block_scaling_dim=2)(x), w, recipe=Float8BlockScaling())
    with pytest.raises(ValueError, match="reads the columnwise codes"):
        linear(Float8BlockQuantizer(columnwise=False)(x), w, recipe=Float8BlockScaling())
    with pytest.raises(ValueError, match="not of 2 experts"):
        grouped_linear(Float8BlockQuantizer()(x), torch.stack([w, w]), [32, 32], recipe=Float8BlockScaling())


def test_one_direction_is_enough_where_the_weight_is_frozen():
    w, x = torch.randn(64, 128, dtype=torch.bfloat16), torch.randn(64, 128, dtype=torch.bfloat16)
    y = linear(Float8BlockQuantizer(columnwise=False)(x), w, recipe=Float8BlockScaling())
    assert torch.equal(y, linear(x, w, recipe=Float8BlockScaling()))


def test_autocast_leaves_codes_alone():
    q = torch.randn(1, 32, 4, 32, dtype=torch.bfloat16)
    x = attention(q, q, q, output_quantizer=Float8BlockQuantizer())
    w = torch.randn(64, 128)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = linear(x, w, recipe=Float8BlockScaling())
    assert torch.equal(y, linear(x, w, recipe=Float8BlockScaling()))


@all_recipes
def test_codes_that_were_copied_are_an_input_too(name):
    """Data and scales then lie apart, and the products read them from one buffer."""
    recipe = RECIPES[name]
    x, w = torch.randn(64, 128).bfloat16(), torch.randn(32, 128).bfloat16().requires_grad_()
    quantized = recipe.quantizer("input", rowwise=True, columnwise=True)(x)
    found = []
    for given in (quantized, quantized.clone(), quantized.to("cpu", copy=True)):
        y = linear(given, w, recipe=recipe)
        found.append((y, *torch.autograd.grad(y, w, torch.ones_like(y))))
        assert has_usage(given, "rowwise") and has_usage(given, "columnwise")
    assert all(torch.equal(a, b) for others in found[1:] for a, b in zip(found[0], others, strict=True))
