"""Attention's modules: arguments reach the function, and what is around it is right."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

import lighterage
from lighterage.formats import Float8BlockQuantizer, Float8BlockTensor
from lighterage.nn import DotProductAttention, SelfAttention
from lighterage.nn.attention import positions_of
from lighterage.recipes import Float8BlockScaling
from tests.nn.layers import RECIPES


def test_dot_product_attention_is_torchs_with_heads_side_by_side():
    q, k, v = (torch.randn(2, 9, heads, 16) for heads in (4, 2, 2))
    out = DotProductAttention(causal=True, scale=0.2)(q, k, v)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    wanted = scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.2, enable_gqa=True)
    torch.testing.assert_close(out, wanted.transpose(1, 2).flatten(2))


def test_dropout_is_for_training():
    q = torch.randn(1, 9, 2, 16)
    module = DotProductAttention(dropout=0.5)
    assert not torch.equal(module(q, q, q), module(q, q, q))
    module.eval()
    assert torch.equal(module(q, q, q), module(q, q, q))


def test_a_quantizer_quantizes_the_output():
    q = torch.randn(2, 16, 2, 16)
    assert isinstance(DotProductAttention(output_quantizer=Float8BlockQuantizer())(q, q, q), Float8BlockTensor)


def test_attention_has_no_state():
    assert not DotProductAttention().state_dict()
    assert list(SelfAttention(32, 2).state_dict()) == ["qkv.weight", "out.weight"]


@pytest.mark.parametrize("name", RECIPES)
def test_packed_sequences_are_sequences_side_by_side(name):
    """Positions begin anew in each, and none sees another. Quantized, blocks may hold rows of two."""
    torch.manual_seed(0)
    module = SelfAttention(64, 4, num_kv_heads=2, recipe=RECIPES[name], dtype=torch.bfloat16)
    x = torch.randn(1, 128, 64, dtype=torch.bfloat16)
    out = module(x[0], cu_seqlens=torch.tensor([0, 32, 96, 128], dtype=torch.int32), max_seqlen=64)
    wanted = torch.cat([module(x[:, a:b]) for a, b in ((0, 32), (32, 96), (96, 128))], dim=1)[0]
    far = (out - wanted).float().norm() / wanted.float().norm()
    assert far < {"none": 0.01, "nvfp4": 0.2}.get(name, 0.06)


def test_positions_begin_anew_in_each_sequence():
    assert positions_of(7, torch.tensor([0, 3, 3, 7])).tolist() == [0, 1, 2, 0, 1, 2, 3]


@pytest.mark.parametrize("dtype", [torch.int8, torch.int16, torch.int32, torch.int64])
def test_ends_of_sequences_may_be_any_whole_numbers(dtype):
    module, x, ends = SelfAttention(32, 2), torch.randn(9, 32), torch.tensor([0, 3, 3, 9])
    assert torch.equal(module(x, cu_seqlens=ends.to(dtype)), module(x, cu_seqlens=ends))


@pytest.mark.parametrize(
    ("x", "ends", "error", "match"),
    [
        (torch.randn(8, 32), torch.tensor([0, 8]), ValueError, "positions for 6 tokens; got 8"),
        (torch.randn(8, 32), torch.tensor([2, 4, 8]), ValueError, "rise from 0 to the 8 tokens of x"),
        (torch.randn(8, 32), torch.tensor([0.0, 8.0]), ValueError, "cu_seqlens must be whole numbers"),
        (torch.randn(8, 32), torch.tensor([[0, 8]]), ValueError, "cu_seqlens must be whole numbers"),
        (torch.randn(8, 32), [0, 4, 8], TypeError, "cu_seqlens must be a torch.Tensor"),
        (torch.randn(1, 4, 32), torch.tensor([0, 4]), ValueError, r"x must be \(tokens, width\)"),
        (torch.randn(4, 32), None, ValueError, r"x must be \(batch, tokens, width\)"),
        (torch.randn(32), None, ValueError, r"x must be \(batch, tokens, width\)"),
    ],
)
def test_sequences_that_do_not_fit_are_refused_before_their_positions_are_looked_up(x, ends, error, match):
    with pytest.raises(error, match=match):
        SelfAttention(32, 2, max_positions=6)(x, cu_seqlens=ends)


def test_wrong_options_are_refused_when_the_module_is_made():
    with pytest.raises(ValueError, match="dropout must be"):
        DotProductAttention(dropout=2.0)
    with pytest.raises(ValueError, match="dropout must be"):
        SelfAttention(32, 2, dropout=float("nan"))
    with pytest.raises(ValueError, match="mark_output must be"):
        DotProductAttention(mark_output="x")
    with pytest.raises(TypeError, match=r"recipe\.quantizer"):
        DotProductAttention(output_quantizer=Float8BlockScaling())


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("how", ["argument", "context", "to"])
def test_positions_are_made_anew_when_a_model_comes_from_the_meta_device(how: str, assign: bool) -> None:
    module, x = SelfAttention(32, 2, max_positions=64), torch.randn(2, 64, 32)
    if how == "argument":
        other = SelfAttention(32, 2, max_positions=64, device="meta")
    elif how == "context":
        with torch.device("meta"):
            other = SelfAttention(32, 2, max_positions=64)
    else:
        other = SelfAttention(32, 2, max_positions=64).to("meta")
    if not assign:
        other = other.to_empty(device="cpu")
    other.load_state_dict(module.state_dict(), assign=assign)
    assert torch.equal(other(x), module(x))


def test_positions_stay_exact_when_the_model_is_cast():
    module = SelfAttention(32, 2, max_positions=300)
    before = module.table_bits.clone()
    assert torch.equal(module.bfloat16().table_bits, before)
    assert module.table_bits.view(torch.float32)[0, 299, 0].item() == pytest.approx(torch.tensor(299.0).cos().item())


@pytest.mark.parametrize("name", RECIPES)
def test_what_attention_saves_is_its_inputs_codes_rotated_heads_output_and_logarithms(name):
    """So the projection adds nothing: it saves the output, as the kernel does."""
    torch.manual_seed(0)
    batch, tokens, width, heads, kv_heads = 2, 64, 128, 4, 2
    module = SelfAttention(width, heads, num_kv_heads=kv_heads, recipe=RECIPES[name], dtype=torch.bfloat16)
    with lighterage.offload([module], keep_last=0, min_bytes=2048, release_after=0) as offloader:
        x = torch.randn(batch, tokens, width, dtype=torch.bfloat16, requires_grad=True)
        module(x * 1).sum().backward()
        stats = offloader.stats()
    num_tokens = batch * tokens
    heads_bytes = num_tokens * (heads + 2 * kv_heads) * (width // heads) * 2
    if kv_heads != heads:  # PyTorch's CPU kernel saves keys that it repeated, beside the values in the rotated heads
        heads_bytes += 2 * num_tokens * width * 2
    rest = num_tokens * width * 2 + num_tokens * heads * 4
    codes = {"none": 2.0, "fp8_block": 1.1, "mxfp8": 1.1, "nvfp4": 0.7, "fp8_current": 1.0}[name]
    assert stats.bytes_out <= heads_bytes + rest + codes * num_tokens * width
    assert stats.copies_out == stats.copies_in <= 6
    assert stats.bytes_in == stats.bytes_out


def test_heads_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="num_heads must divide"):
        SelfAttention(30, 4)
    with pytest.raises(ValueError, match="num_kv_heads"):
        SelfAttention(32, 4, num_kv_heads=3)
    with pytest.raises(ValueError, match="max_positions=9"):
        SelfAttention(32, 4, max_positions=8)(torch.randn(1, 9, 32))
