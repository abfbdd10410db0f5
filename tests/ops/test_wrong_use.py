"""Arguments of the wrong kind are refused by the layers at the call, naming them; sizes may fall short in a tensor."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from lighterage import nn, ops
from lighterage.formats import Float8BlockQuantizer, Float8CurrentScalingQuantizer
from lighterage.ops.permute import Permutation
from lighterage.recipes import (
    Float8BlockScaling,
    Float8CurrentScaling,
    MXFP8BlockScaling,
    NVFP4BlockScaling,
    Recipe,
)

R = Float8BlockScaling()
bf16 = torch.bfloat16
X, W = torch.randn(32, 64, dtype=bf16), torch.randn(2, 64, 64, dtype=bf16)
W2, ONE = torch.randn(2, 64, 32, dtype=bf16), torch.randn(64, 64, dtype=bf16)
HEADS, PACKED = torch.randn(1, 8, 2, 16), torch.randn(8, 2, 16)
ENDS = torch.tensor([0, 3, 8])
LOGITS = torch.randn(8, 4)
NESTED = torch.nested.nested_tensor([torch.zeros(3, 64), torch.zeros(4, 64)], layout=torch.jagged)


def plan() -> Permutation:
    return ops.plan_permutation(torch.zeros(32, 1, dtype=torch.int64), 2)


def attend(**options: object) -> torch.Tensor:
    return ops.attention(PACKED, PACKED, PACKED, cu_seqlens=ENDS, **options)  # type: ignore[arg-type]


CALLS: dict[str, tuple[Callable[..., object], str]] = {
    "x is a list": (lambda: ops.grouped_linear([1.0], W, [16, 16], recipe=R), "x must be a torch.Tensor; got list"),
    "x is nested": (lambda: ops.linear(NESTED, ONE, recipe=R), "x must be a strided tensor; got a nested one"),
    "x is sparse": (lambda: ops.grouped_mlp(X.to_sparse(), W, W2, [16, 16]), "x must be a strided tensor"),
    "x is on meta": (lambda: ops.linear(X.to("meta"), ONE.to("meta"), recipe=R), "x is on the meta device"),
    "w is none": (lambda: ops.linear(X, None, recipe=R), "weight must be a torch.Tensor"),
    "w is a list of none": (lambda: ops.grouped_linear(X, [None], [32]), "weight 0 must be a torch.Tensor"),
    "w is quantized": (
        lambda: ops.linear(X, Float8BlockQuantizer()(ONE), recipe=R),
        "weight must be in high precision",
    ),
    "w1 is none": (lambda: ops.grouped_mlp(X, None, W2, [16, 16]), "w1 must be a torch.Tensor"),
    "no experts": (lambda: ops.grouped_linear(X[:0], W[:0], [], recipe=R), "there must be an expert"),
    "no features": (lambda: ops.grouped_linear(X[:, :0], W[..., :0], [16, 16]), "there must be an expert and an input"),
    "probs is a list": (lambda: ops.grouped_mlp(X, W, W2, [16, 16], probs=[1.0]), "probs must be a torch.Tensor"),
    "a flag is a word": (
        lambda: ops.grouped_linear(X, W, [16, 16], save_original_input="no"),
        "save_original_input must be True or False",
    ),
    "the backend is a list": (lambda: ops.grouped_linear(X, W, [16, 16], backend=[]), "a GEMM backend is one of"),
    "the device is a word": (lambda: ops.choose_backend("auto", None, "cuda"), r"Pass .*torch.device\('cuda'\)"),
    "the activation is a list": (
        lambda: ops.grouped_mlp(X, W, W2, [16, 16], save_activation=[]),
        "save_activation must be one of",
    ),
    "torch.func.grad": (
        lambda: torch.func.grad(lambda x: ops.linear(x, ONE, recipe=R).float().sum())(X),
        "torch.func",
    ),
    "vmap": (lambda: torch.vmap(lambda x: ops.linear(x, ONE, recipe=R))(X[None]), "torch.func"),
    "vmap of permute": (lambda: torch.vmap(lambda x: ops.permute(x, plan()))(X[None]), "torch.func"),
    "grad of the router": (lambda: torch.func.grad(lambda x: ops.router_logits(x, ONE).sum())(X), "torch.func"),
    "router of integers": (lambda: ops.router_logits(X.long(), ONE), "x must be of bfloat16"),
    "router of other widths": (lambda: ops.router_logits(X, ONE[:, :32]), r"takes x \(T, H\) and weight"),
    "router bias": (lambda: ops.route(LOGITS, 2, bias=torch.zeros(3)), r"bias must be \(4,\)"),
    "top_k is not whole": (lambda: ops.route(LOGITS, 1.5), "top_k must be a whole number"),
    "score is a list": (lambda: ops.route(LOGITS, 1, score=[]), "score must be one of"),
    "balance of other shapes": (lambda: ops.load_balancing_loss(LOGITS, torch.ones(3)), "takes scores"),
    "z-loss of a number": (lambda: ops.router_z_loss(torch.tensor(1.0)), "takes logits"),
    "a loss that is many": (lambda: ops.attach_loss(X, torch.ones(3)), "a loss to attach is one number"),
    "experts of bool": (lambda: ops.plan_permutation(torch.ones(3, 1) > 0, 2), "experts must be whole numbers"),
    "alignment is not whole": (lambda: ops.plan_permutation(torch.ones(3, 1).long(), 2, 1.5), "alignment must be"),
    "permute without a plan": (lambda: ops.permute(X, None), "plan must be what plan_permutation gave"),
    "permute elsewhere": (lambda: ops.permute(X.to("meta"), plan()), "must be on one device"),
    "unpermute complex": (lambda: ops.unpermute(torch.zeros(32, 2, dtype=torch.complex64), plan()), "x must be of"),
    "pad with bools": (lambda: ops.pad_rows(X, [True, True], 16), "m_splits must be integers"),
    "pad with floats": (lambda: ops.pad_rows(X, torch.tensor([16.0, 16.0]), 16), "1-D and of integers"),
    "pad a vector": (lambda: ops.pad_rows(X[0], [64], 16), "pad_rows takes rows"),
    "unpad too many": (lambda: ops.unpad_rows(X, [30], 16, num_rows=40), "unpad_rows takes what pad_rows gave"),
    "unpad too few": (lambda: ops.unpad_rows(X, [30], 16, num_rows=29), "at most the 29 rows"),
    "max_seqlen too short": (lambda: attend(max_seqlen=4), "max_seqlen must be at least the longest.* got 4"),
    "max_seqlen of 0": (lambda: attend(max_seqlen=0), "max_seqlen must be at least 1"),
    "max_seqlen of -1": (lambda: attend(max_seqlen_kv=-1), "max_seqlen_kv must be at least 1"),
    "max_seqlen is not whole": (lambda: attend(max_seqlen="8"), "max_seqlen must be a whole number"),
    "max_seqlen of a batch": (lambda: ops.attention(HEADS, HEADS, HEADS, max_seqlen=8), "belongs to packed"),
    "causal is a word": (lambda: attend(causal="no"), "causal must be True or False"),
    "scale is a word": (lambda: attend(scale="1"), "scale must be a number"),
    "an unknown mark": (lambda: attend(mark_output="no"), "mark_output must be"),
    "no quantizer": (lambda: attend(output_quantizer="fp8"), "output_quantizer must be a quantizer"),
    "attention of integers": (lambda: ops.attention(*[PACKED.long()] * 3, cu_seqlens=ENDS), "q must be of"),
    "ends of bool": (lambda: ops.attention(PACKED, PACKED, PACKED, cu_seqlens=ENDS > 0), "whole numbers"),
    "narrow values": (lambda: ops.attention(PACKED, PACKED, PACKED[..., :8], cu_seqlens=ENDS), "as wide as queries"),
    "rotary positions": (lambda: ops.rotary_table(1.5, 16), "num_positions must be a whole number"),
    "too many heads": (lambda: ops.rotate_heads(HEADS, ops.rotary_table(8, 16), 3), "turns up to all heads"),
    "a short table": (lambda: ops.rotate_heads(HEADS, ops.rotary_table(4, 16), 1), r"table must be \(2, 8, 8\)"),
    "num_gemms": (lambda: nn.GroupedLinear(1.5, 64, 64), "num_gemms must be a whole number"),
    "features": (lambda: nn.Linear("64", 64), "in_features must be a whole number"),
    "moe of a vector": (lambda: nn.MoE(64, 32, 4, 1)(torch.zeros(64)), r"x must be \(\*, 64\)"),
    "moe of other widths": (lambda: nn.MoE(64, 32, 4, 1)(torch.zeros(3, 63)), r"x must be \(\*, 64\)"),
    "moe score": (lambda: nn.MoE(64, 32, 4, 1, score="x"), "score must be one of"),
    "moe balance": (lambda: nn.MoE(64, 32, 4, 1, balance_weight="x"), "balance_weight must be a number"),
    "moe z weight": (lambda: nn.MoE(64, 32, 4, 1, z_weight=float("nan")), "z_weight must be finite"),
    "moe shared": (lambda: nn.MoE(64, 32, 4, 1, shared_ffn_size=-1), "shared_ffn_size must be at least 0"),
    "moe backend": (lambda: nn.MoE(64, 32, 4, 1, backend="x"), "backend must be one of"),
    "gated save": (lambda: nn.GatedMLP(64, 32, save_activation="x"), "save_activation must be one of"),
    "moe top_k": (lambda: nn.MoE(64, 32, 4, 1.5), "top_k must be a whole number"),
    "no heads": (lambda: nn.SelfAttention(64, 0), "num_heads must be at least 1"),
    "no network": (lambda: nn.TransformerBlock(64, 4, None), "feed_forward must be a torch.nn.Module"),
}


@pytest.mark.parametrize("name", CALLS)
def test_arguments_of_the_wrong_kind_are_refused_with_their_names(name: str) -> None:
    call, message = CALLS[name]
    with pytest.raises((TypeError, ValueError, RuntimeError), match=message) as caught:
        call()
    assert "/lighterage/" in str(caught.traceback[-1].path)


@pytest.mark.parametrize(
    "recipe", [None, R, MXFP8BlockScaling(), NVFP4BlockScaling(stochastic_rounding=False), Float8CurrentScaling()]
)
@pytest.mark.parametrize("sizes", [[32], [32, 64, 0]])
def test_rows_past_sizes_in_a_tensor_are_nobodys_whatever_device_they_lie_on(
    recipe: Recipe | None, sizes: list[int]
) -> None:
    """As with sizes on a GPU: zeros come out of them and go back into them, and experts do not see them."""
    total, num = sum(sizes), len(sizes)
    generator = torch.Generator().manual_seed(0)
    x, dy = (torch.randn(total + 32, n, generator=generator).to(bf16) for n in (64, 64))
    leaves = [torch.randn(*shape, generator=generator).to(bf16) for shape in ((num, 64, 64), (num, 64))]
    for rows, rest in ((x, float("inf")), (dy, 1e3)):
        rows[total:] = rest  # what a scale for the whole tensor must not see
    found = []
    for rows, m_splits in ((slice(None), torch.tensor(sizes)), (slice(total), sizes)):
        x_, w, b = (leaf.clone().requires_grad_() for leaf in (x[rows], *leaves))
        y = ops.grouped_linear(x_, w, m_splits, bias=b, recipe=recipe)
        y.backward(dy[rows])
        found.append((y, x_.grad, w.grad, b.grad))
    longer, wanted = found
    for a, b in zip(longer, wanted, strict=True):
        assert a is not None and b is not None and torch.equal(a[: len(b)], b) and not a[len(b) :].any()


@pytest.mark.parametrize("quantizer", [Float8BlockQuantizer(), Float8CurrentScalingQuantizer()])
def test_a_quantized_input_needs_all_its_rows_to_belong_to_the_layer(quantizer) -> None:
    recipe = R if isinstance(quantizer, Float8BlockQuantizer) else Float8CurrentScaling()
    with pytest.raises(ValueError, match="one layer over all its rows"):
        ops.grouped_linear(quantizer(X), W[:1], torch.tensor([16]), recipe=recipe)


def test_numbers_for_unpadding_that_padding_would_round_alike_cannot_be_told_apart() -> None:
    """What the documentation of `unpad_rows` says of sizes in a tensor."""
    sizes = torch.tensor([10, 20])
    padded, _ = ops.pad_rows(X[:30].float(), sizes, 16)
    assert torch.equal(ops.unpad_rows(padded, sizes, 16, num_rows=30), X[:30].float())
    assert ops.unpad_rows(padded, sizes, 16, num_rows=31).shape[0] == 31
    with pytest.raises(ValueError, match=r"unpermute takes|at most"):
        ops.unpad_rows(padded, sizes, 16, num_rows=60)
