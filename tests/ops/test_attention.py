"""Attention: right for every layout, repeatable, and with an output that moves once or not at all."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint

import lighterage
from lighterage.formats import Float8BlockQuantizer, Float8BlockTensor
from lighterage.marks import Mark, mark_of
from lighterage.ops.attention import attention
from lighterage.ops.rotary import rotary_table, rotate_heads


def heads(batch: int = 2, tokens: int = 12, num_heads: int = 4, width: int = 16, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, tokens, num_heads, width, generator=generator).requires_grad_()


def plainly(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float | None) -> Tensor:
    """softmax(q k^T * scale) v in float64, one head after another."""
    groups = q.shape[2] // k.shape[2]
    outs = []
    for head in range(q.shape[2]):
        qh, kh, vh = (x[:, :, i].double() for x, i in ((q, head), (k, head // groups), (v, head // groups)))
        scores = qh @ kh.transpose(1, 2) * (scale or q.shape[-1] ** -0.5)
        if causal:
            scores = scores.masked_fill(torch.ones(scores.shape[1:], dtype=torch.bool).triu(1), float("-inf"))
        outs.append(scores.softmax(-1) @ vh)
    return torch.cat(outs, dim=-1)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("scale", [None, 0.3])
def test_values_and_gradients_are_those_of_the_formula(causal, kv_heads, scale):
    q, k, v = heads(), heads(num_heads=kv_heads, seed=1), heads(num_heads=kv_heads, seed=2)
    out = attention(q, k, v, causal=causal, scale=scale)
    wanted = plainly(q, k, v, causal, scale)
    assert out.shape == (2, 12, 64)
    torch.testing.assert_close(out.double(), wanted, atol=1e-5, rtol=1e-4)
    found = torch.autograd.grad(out.square().sum(), (q, k, v))
    for grad, by_formula in zip(found, torch.autograd.grad(wanted.square().sum(), (q, k, v)), strict=True):
        torch.testing.assert_close(grad, by_formula, atol=1e-4, rtol=1e-4)


SIZES = {"one": [12], "several": [5, 1, 6], "with empty ones": [0, 7, 0, 5, 0]}


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES.keys())
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_packed_sequences_attend_each_to_itself(sizes, causal, kv_heads):
    q, k, v = heads(1), heads(1, num_heads=kv_heads, seed=1), heads(1, num_heads=kv_heads, seed=2)
    ends = torch.tensor([0, *torch.tensor(sizes).cumsum(0).tolist()], dtype=torch.int32)
    out = attention(q[0], k[0], v[0], causal=causal, cu_seqlens=ends)
    bounds = list(zip(ends[:-1].tolist(), ends[1:].tolist(), strict=True))
    wanted = torch.cat([attention(q[:, a:b], k[:, a:b], v[:, a:b], causal=causal)[0] for a, b in bounds if a < b])
    torch.testing.assert_close(out, wanted, atol=1e-6, rtol=1e-5)
    found = torch.autograd.grad(out.square().sum(), (q, k, v))
    for grad, one_by_one in zip(found, torch.autograd.grad(wanted.square().sum(), (q, k, v)), strict=True):
        torch.testing.assert_close(grad, one_by_one, atol=1e-5, rtol=1e-5)


def test_packed_sequences_may_attend_to_others():
    q, k, v = heads(1, 5), heads(1, 7, seed=1), heads(1, 7, seed=2)
    ends, ends_kv = torch.tensor([0, 2, 5]), torch.tensor([0, 4, 7])
    out = attention(q[0], k[0], v[0], cu_seqlens=ends, cu_seqlens_kv=ends_kv)
    wanted = torch.cat([attention(q[:, :2], k[:, :4], v[:, :4]), attention(q[:, 2:], k[:, 4:], v[:, 4:])], 1)[0]
    torch.testing.assert_close(out, wanted, atol=1e-6, rtol=1e-5)


def test_packed_float64_has_the_gradients_of_the_formula():
    q, k, v = (heads(1, seed=seed).detach().double().requires_grad_() for seed in range(3))
    out = attention(q[0], k[0], v[0], cu_seqlens=torch.tensor([0, 5, 12]))
    wanted = torch.cat([plainly(q[:, a:b], k[:, a:b], v[:, a:b], False, None)[0] for a, b in ((0, 5), (5, 12))])
    found = torch.autograd.grad(out.square().sum(), (q, k, v))
    for grad, by_formula in zip(found, torch.autograd.grad(wanted.square().sum(), (q, k, v)), strict=True):
        torch.testing.assert_close(grad, by_formula, atol=1e-12, rtol=1e-12)


def test_packed_sequences_save_each_byte_once():
    """A kernel for each sequence, and yet what is saved is five allocations, the output one of them."""
    q, k, v = (heads(1, seed=seed)[0].detach().clone().requires_grad_() for seed in range(3))
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.detach()) or t, lambda t: t):
        out = attention(q, k, v, cu_seqlens=torch.tensor([0, 3, 4, 12]))
    assert len({t.untyped_storage()._cdata for t in saved}) == 5
    assert out.untyped_storage()._cdata in {t.untyped_storage()._cdata for t in saved}


@pytest.mark.parametrize("packed", [False, True])
def test_dropout_repeats_with_the_seed_and_in_a_checkpoint(packed):
    q, k, v = (heads(1, seed=seed) for seed in range(3))
    ends = torch.tensor([0, 5, 12]) if packed else None

    def run(seed: int, wrap: Callable[..., Any] | None = None) -> list[Tensor]:
        torch.manual_seed(seed)
        inputs = [x[0] if packed else x for x in (q, k, v)]

        def attend(*x: Tensor) -> Tensor:
            return attention(*x, dropout=0.5, cu_seqlens=ends)

        out = attend(*inputs) if wrap is None else wrap(attend, *inputs, use_reentrant=False)
        return [out.detach(), *torch.autograd.grad(out.square().sum(), (q, k, v))]

    first = run(3)
    assert all(torch.equal(a, b) for a, b in zip(first, run(3), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(first, run(3, checkpoint), strict=True))
    assert not torch.equal(first[0], run(4)[0])
    assert not torch.equal(first[0], attention(*(x[0] if packed else x for x in (q, k, v)), cu_seqlens=ends))


# --- its output, quantized -------------------------------------------------------------------------------------------


def test_a_quantized_output_holds_the_codes_of_the_plain_one():
    q, k, v = (heads(2, 64, 8, seed=seed).bfloat16() for seed in range(3))
    quantizer = Float8BlockQuantizer()
    out = attention(q, k, v, causal=True, output_quantizer=quantizer)
    wanted = quantizer(attention(q, k, v, causal=True))
    assert isinstance(out, Float8BlockTensor)
    assert out.shape == (2, 64, 128)
    assert all(torch.equal(a, b) for a, b in zip(out.data_tensors(), wanted.data_tensors(), strict=True))


def test_the_gradient_of_a_quantized_output_goes_straight_through():
    grads = []
    for quantizer in (None, Float8BlockQuantizer()):
        q, k, v = (heads(2, 64, 8, seed=seed) for seed in range(3))
        out = attention(q, k, v, causal=True, output_quantizer=quantizer)
        out.backward(torch.linspace(-1, 1, out.numel()).view(out.shape))
        grads.append([x.grad for x in (q, k, v)])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


# --- its output and what moves ---------------------------------------------------------------------------------------

WIDTH, HEADS, TOKENS, BATCH = 64, 4, 64, 2
ONE = BATCH * TOKENS * WIDTH * 4
LSE = BATCH * TOKENS * HEADS * 4


class Attend(nn.Module):
    """Product, rotation, attention. Keeps weak references to what it made."""

    def __init__(self, mark_output: Any = "auto") -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        self.register_buffer("table", rotary_table(TOKENS, WIDTH // HEADS))
        self.mark_output = mark_output
        self.made: dict[str, StorageWeakRef] = {}

    def forward(self, x: Tensor) -> Tensor:
        product = self.qkv(x).unflatten(-1, (3 * HEADS, WIDTH // HEADS))
        turned = rotate_heads(product, self.table, 2 * HEADS)
        q, k, v = turned.chunk(3, dim=2)
        out = attention(q, k, v, causal=True, mark_output=self.mark_output)
        for name, tensor in (("product", product), ("qkv", turned), ("output", out)):
            self.made[name] = StorageWeakRef(tensor.untyped_storage())
        return out


class Layer(nn.Module):
    """Attention and its projection."""

    def __init__(self, mark_output: Any = "auto") -> None:
        super().__init__()
        self.attend = Attend(mark_output)
        self.out = nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.out(self.attend(x))


@dataclasses.dataclass
class Moved:
    """What two equal steps with offload did."""

    first: lighterage.OffloadStats
    second: lighterage.OffloadStats
    kept: str
    alive: set[str]
    """What was still on the device after the first forward, of the first layer."""


def moved(sections: Callable[[nn.ModuleList], Any], mark_output: Any = "auto") -> Moved:
    """Two steps of three layers, whose bits are compared with those of the same without offload."""
    torch.manual_seed(0)
    layers = nn.ModuleList(Layer(mark_output) for _ in range(3))
    x = torch.randn(BATCH, TOKENS, WIDTH, requires_grad=True)

    def forward() -> Tensor:
        y = x * 1.0  # nobody else holds it
        for layer in layers:
            y = layer(y)
        return y.square().mean()

    def step() -> list[Tensor]:
        loss = forward()
        loss.backward()
        found = [loss.detach(), x.grad, *(p.grad for p in layers.parameters())]
        x.grad = None
        layers.zero_grad()
        return found

    wanted = step()
    with lighterage.offload(sections(layers), keep_last=0, min_bytes=1024, release_after=0) as offloader:
        assert all(torch.equal(a, b) for a, b in zip(step(), wanted, strict=True))
        first = offloader.stats()
        loss = forward()
        alive = {name for name, ref in layers[0].attend.made.items() if not ref.expired()}
        loss.backward()
        x.grad = None
        layers.zero_grad()
        assert all(torch.equal(a, b) for a, b in zip(step(), wanted, strict=True))
        return Moved(first, offloader.stats(), str(offloader.report()), alive)


def test_in_one_section_with_its_projection_each_byte_moves_once_and_all_is_freed():
    """Input, rotated heads, output and logarithms: the projection saves the output again, and adds nothing."""
    found = moved(lambda layers: layers)
    assert found.alive == set()
    for stats in (found.first, found.second):
        assert stats.bytes_out == stats.bytes_in == 3 * (ONE + 3 * ONE + ONE + LSE)
        assert stats.bytes_out == stats.unique_bytes - stats.kept_bytes
    assert "mark_not_offload" not in found.kept


def test_in_two_sections_each_byte_moves_once_and_all_is_freed():
    found = moved(lambda layers: [part for layer in layers for part in (layer.attend, layer.out)])
    assert found.alive == set()
    for stats in (found.first, found.second):
        assert stats.bytes_out == stats.bytes_in == 3 * (ONE + 3 * ONE + ONE + LSE)


def test_a_mark_would_hold_back_what_both_save():
    found = moved(lambda layers: layers, mark_output=True)
    assert found.alive == {"output"}
    assert found.first.bytes_out == 3 * (ONE + 3 * ONE + LSE)
    assert "mark_not_offload" in found.kept


def test_an_output_that_attention_holds_is_not_moved_for_its_projection():
    """Attention saved outside all sections: the projection's section would move the output in vain."""
    found = moved(lambda layers: [layer.out for layer in layers])
    assert found.first.bytes_out == found.second.bytes_out == 0
    assert "mark_not_offload" in found.kept
    in_vain = moved(lambda layers: [layer.out for layer in layers], mark_output=False)
    assert in_vain.first.bytes_out == 3 * ONE
    assert in_vain.alive == {"qkv", "output"}


def test_an_output_that_leaves_its_section_is_not_moved_if_marked():
    """The projection outside all sections holds it: the mark says so before the first copy."""
    marked = moved(lambda layers: [layer.attend for layer in layers], mark_output=True)
    found = moved(lambda layers: [layer.attend for layer in layers])
    assert marked.first.bytes_out == marked.second.bytes_out
    assert found.first.bytes_out == marked.first.bytes_out + 3 * ONE
    # Without a mark the engine learns it from what was not freed, all but the last: backward comes before it is missed.
    assert found.second.bytes_out == marked.second.bytes_out + ONE
    assert marked.alive == found.alive == {"output"}


def test_a_mark_on_a_quantized_output_is_on_its_codes():
    """Those are handed on; what the kernel saved, before it was quantized, moves."""
    q, k, v = (heads(2, 64, 8, seed=seed) for seed in range(3))
    out = attention(q, k, v, output_quantizer=Float8BlockQuantizer(), mark_output=True)
    assert all(mark_of(part.untyped_storage()._cdata) is Mark.NOT_OFFLOAD for part in out.data_tensors())
    with lighterage.offload([nn.Identity()], keep_last=0, min_bytes=1) as offloader:
        with offloader.section("attention"):
            inner = attention(q, k, v, output_quantizer=Float8BlockQuantizer(), mark_output=True)
        inner.backward(torch.ones(out.shape))
        assert offloader.stats().bytes_out >= out.numel() * 4


def test_a_quantized_output_that_nobody_holds_is_not_marked():
    q, k, v = (heads(2, 64, 8, seed=seed) for seed in range(3))
    out = attention(q, k, v, output_quantizer=Float8BlockQuantizer())
    assert all(mark_of(part.untyped_storage()._cdata) is None for part in out.data_tensors())


@pytest.mark.parametrize("grad", [False, True])
def test_marks_are_for_outputs_that_a_kernel_saved(grad):
    q, k, v = (heads(seed=seed).detach().requires_grad_(grad) for seed in range(3))
    assert (mark_of(attention(q, k, v).untyped_storage()._cdata) is Mark.NOT_OFFLOAD) == grad
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        # Plain operators save weights, not the output: whoever saves that may move it.
        assert mark_of(attention(q, k, v).untyped_storage()._cdata) is None


# --- wrong use -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"k": heads(num_heads=3), "v": heads(num_heads=3)}, "divide the number of query heads"),
        ({"k": heads(num_heads=0), "v": heads(num_heads=0)}, "divide the number of query heads"),
        ({"k": heads(tokens=9), "v": heads(tokens=9), "causal": True}, "as many keys as queries"),
        ({"v": heads(tokens=9)}, "same tokens and heads"),
        ({"q": heads()[0]}, "cu_seqlens"),
        ({"dropout": 1.0}, "less than 1"),
        ({"cu_seqlens_kv": torch.tensor([0, 12])}, "pass cu_seqlens too"),
    ],
)
def test_wrong_use_is_refused_with_the_remedy(change, match):
    arguments = {"q": heads(), "k": heads(), "v": heads()} | change
    with pytest.raises(ValueError, match=match):
        attention(arguments.pop("q"), arguments.pop("k"), arguments.pop("v"), **arguments)


@pytest.mark.parametrize(
    ("ends", "match"),
    [
        (torch.tensor([0, 5]), "rise from 0 to the 12 tokens"),
        (torch.tensor([0, 9, 5, 12]), "rise"),
        (torch.tensor([0.0, 12.0]), "whole numbers"),
        (torch.tensor([12]), "sequences"),
    ],
)
def test_wrong_ends_of_sequences_are_refused(ends, match):
    q = heads(1)[0]
    with pytest.raises(ValueError, match=match):
        attention(q, q, q, cu_seqlens=ends)


def test_mixed_dtypes_are_refused():
    with pytest.raises(TypeError, match="one dtype"):
        attention(heads(), heads().bfloat16(), heads())


# --- rotary positions ------------------------------------------------------------------------------------------------


def test_rotation_keeps_products_of_equal_distance():
    """What it is for: the product of a query and a key depends on how far apart they are."""
    table = rotary_table(10, 16)
    q, k = (torch.randn(16, generator=torch.Generator().manual_seed(seed)).expand(1, 10, 1, 16) for seed in (0, 1))
    q, k = (rotate_heads(x, table, 1)[0, :, 0].double() for x in (q, k))
    products = q @ k.t()
    for distance in range(-3, 4):
        diagonal = products.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), atol=1e-5, rtol=1e-4)


def test_rotation_leaves_values_alone_and_has_the_right_gradient():
    table = rotary_table(5, 8)
    x = heads(2, 5, 3, 8)
    out = rotate_heads(x, table, 2)
    assert torch.equal(out[:, :, 2], x[:, :, 2])
    assert torch.equal(out[:, 0], x[:, 0])
    a, b = x[:, :, :2].chunk(2, dim=-1)
    cos, sin = table[:, :, None]
    wanted = torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)
    torch.testing.assert_close(out[:, :, :2], wanted)
    weights = torch.randn_like(out)
    grad, wanted_grad = (
        torch.autograd.grad((y * w).sum(), x, retain_graph=True)[0]
        for y, w in ((out, weights), (torch.cat([wanted, x[:, :, 2:]], dim=2), weights))
    )
    torch.testing.assert_close(grad, wanted_grad)


def test_an_odd_head_is_refused():
    with pytest.raises(ValueError, match="even"):
        rotary_table(4, 7)
