"""Modules, operations and regions of quantization with Transformer Engine's arguments."""

from __future__ import annotations

import contextlib
import copy
import pickle
import threading
import types

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import lighterage.compat.transformer_engine as te
from lighterage import nn as lighterage_nn
from lighterage import ops, recipes
from lighterage.compat.transformer_engine.recipe import Format
from tests.compat.stacks import DEVICE, SMALL, assert_nothing_left

RECIPES = [
    te.recipe.Float8BlockScaling(),
    te.recipe.MXFP8BlockScaling(),
    te.recipe.NVFP4BlockScaling(disable_stochastic_rounding=True),
    te.recipe.Float8CurrentScaling(fp8_format=Format.E4M3),
]
every_recipe = pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.format_name)


def rows(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.bfloat16).to(DEVICE).requires_grad_()


# --- recipes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        (te.recipe.Float8BlockScaling(), recipes.Float8BlockScaling()),
        (te.recipe.Float8BlockScaling(use_f32_scales=True), recipes.Float8BlockScaling(power_of_2_scale=False)),
        (te.recipe.MXFP8BlockScaling(), recipes.MXFP8BlockScaling()),
        (
            te.recipe.NVFP4BlockScaling(disable_rht=True, disable_stochastic_rounding=True),
            recipes.NVFP4BlockScaling(random_hadamard_transform=False, stochastic_rounding=False),
        ),
        (te.recipe.Float8CurrentScaling(), recipes.Float8CurrentScaling()),
        (
            te.recipe.Float8CurrentScaling(use_power_2_scales=True, fp8_format=Format.E4M3),
            recipes.Float8CurrentScaling(fp8_format="e4m3", power_of_2_scale=True),
        ),
    ],
)
def test_a_recipe_is_the_recipe_of_its_name(theirs, ours):
    assert isinstance(theirs, type(ours))
    assert vars(theirs) == vars(ours)
    assert pickle.loads(pickle.dumps(theirs)) == copy.deepcopy(theirs) == theirs


@pytest.mark.parametrize(
    ("kind", "options", "match"),
    [
        (te.recipe.Float8BlockScaling, {"fp8_format": Format.HYBRID}, "fp8_format"),
        (te.recipe.Float8BlockScaling, {"w_block_scaling_dim": 1}, "w_block_scaling_dim"),
        (te.recipe.MXFP8BlockScaling, {"margin": 1}, "margin"),
        (te.recipe.MXFP8BlockScaling, {"fp8_dpa": True}, "fp8_dpa"),
        (te.recipe.NVFP4BlockScaling, {"disable_2d_quantization": True}, "disable_2d_quantization"),
        (te.recipe.NVFP4BlockScaling, {"nvfp4_4over6": "all"}, "4over6"),
        (te.recipe.Float8CurrentScaling, {"fp8_format": Format.E5M2}, "fp8_format"),
        (te.recipe.Float8CurrentScaling, {"backward_override": "dequantized"}, "backward_override"),
    ],
)
def test_an_option_that_is_not_here_is_an_error(kind, options, match):
    with pytest.raises(ValueError, match=match):
        kind(**options)


def test_delayed_scaling_is_refused_with_what_to_use():
    with pytest.raises(NotImplementedError, match="Float8CurrentScaling"):
        te.recipe.DelayedScaling(amax_history_len=16)


# --- regions ------------------------------------------------------------------------------------------------------


@every_recipe
def test_a_region_decides_what_a_layer_computes(recipe):
    layer = te.Linear(128, 128, params_dtype=torch.bfloat16)
    x = rows(128, 128)
    plain = ops.linear(x, layer.weight, layer.bias)
    quantized = ops.linear(x, layer.weight, layer.bias, recipe=recipe)
    assert not torch.equal(plain, quantized)
    assert torch.equal(layer(x), plain)
    with te.autocast(recipe=recipe):
        assert torch.equal(layer(x), quantized)
        with te.autocast(enabled=False):
            assert torch.equal(layer(x), plain)
        assert torch.equal(layer(x), quantized)
    with te.fp8_autocast(enabled=True, fp8_recipe=recipe):
        assert torch.equal(layer(x), quantized)
    with te.fp8_autocast(enabled=False):
        assert torch.equal(layer(x), plain)
    assert torch.equal(layer(x), plain)


def test_a_region_ends_with_an_exception_and_belongs_to_its_thread():
    layer, x = te.Linear(64, 64, params_dtype=torch.bfloat16), rows(32, 64)
    plain = layer(x)
    with pytest.raises(KeyError), te.autocast(recipe=RECIPES[0]):
        raise KeyError
    assert torch.equal(layer(x), plain)
    with te.autocast(recipe=RECIPES[0]):
        results: list[torch.Tensor] = []
        thread = threading.Thread(target=lambda: results.append(layer(x)))
        thread.start()
        thread.join()
        assert torch.equal(results[0], plain)


def test_a_region_needs_a_recipe_and_says_what_it_cannot_do():
    with pytest.raises(ValueError, match="needs a recipe"):
        te.autocast()
    with pytest.raises(TypeError, match="recipe"):
        te.autocast(recipe="fp8")
    for options in ({"calibrating": True}, {"amax_reduction_group": object()}, {"_graph": True}):
        with pytest.warns(te.NotHonoured, match="no history"):
            te.autocast(recipe=RECIPES[0], **options)


def test_recomputation_outside_of_the_region_is_refused_and_inside_is_the_same():
    layer, recipe = te.Linear(64, 64, params_dtype=torch.bfloat16), RECIPES[0]
    x, y = rows(32, 64), rows(32, 64)
    with te.autocast(recipe=recipe):
        layer(x).float().square().sum().backward()
        expected = layer.weight.grad.clone()
        out = checkpoint(layer, y, use_reentrant=False)
    with pytest.raises(RuntimeError, match="context_fn"):
        out.float().square().sum().backward()
    layer.zero_grad()
    y = rows(32, 64)
    with te.autocast(recipe=recipe):
        out = checkpoint(
            layer, y, use_reentrant=False, context_fn=lambda: (contextlib.nullcontext(), te.autocast(recipe=recipe))
        )
    out.float().square().sum().backward()
    assert torch.equal(layer.weight.grad, expected)
    assert torch.equal(x.grad, y.grad)


# --- layers -------------------------------------------------------------------------------------------------------


def test_layers_begin_as_theirs_do():
    torch.manual_seed(0)
    for layer in (te.Linear(512, 256), te.GroupedLinear(4, 128, 256)):
        weights = torch.cat([p.flatten() for name, p in layer.named_parameters() if name.startswith("weight")])
        assert weights.std().item() == pytest.approx(0.023, rel=0.05)
        assert weights.mean().abs() < 1e-3
        assert all((p == 0).all() for name, p in layer.named_parameters() if name.startswith("bias"))
        assert next(layer.parameters()).device.type == DEVICE.type
    layer = te.Linear(8, 4, init_method=nn.init.ones_, params_dtype=torch.bfloat16, bias=False, device="cpu")
    assert (layer.weight == 1).all() and layer.weight.dtype is torch.bfloat16 and layer.bias is None
    assert list(te.GroupedLinear(2, 8, 4).state_dict()) == ["weight0", "weight1", "bias0", "bias1"]


def test_state_dicts_of_theirs_load_with_their_extra_state():
    model = nn.Sequential(te.Linear(8, 8), te.GroupedLinear(2, 8, 8), te.DotProductAttention(2, 8), te.ops.Linear(8, 8))
    theirs = {name: torch.randn_like(value) for name, value in model.state_dict().items()}
    extra = {f"{index}._extra_state": torch.empty(0, dtype=torch.uint8) for index in range(4)}
    copied = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    for one in (model, copied):
        one.load_state_dict(theirs | extra)
        assert all(torch.equal(value, theirs[name]) for name, value in one.state_dict().items())
        with pytest.raises(RuntimeError, match="Unexpected"):
            one.load_state_dict(theirs | {"0.other": torch.empty(0)})


def test_a_bias_can_be_returned_instead_of_added():
    x = rows(6, 16)
    layer = te.Linear(16, 8, return_bias=True, params_dtype=torch.bfloat16)
    nn.init.normal_(layer.bias)
    out, bias = layer(x)
    assert bias is layer.bias
    assert torch.equal(out, ops.linear(x, layer.weight))
    assert te.Linear(16, 8, bias=False, return_bias=True, params_dtype=torch.bfloat16)(x)[1] is None
    grouped = te.GroupedLinear(2, 16, 8, return_bias=True, params_dtype=torch.bfloat16)
    out, biases = grouped(x, [4, 2])
    assert [b is p for b, p in zip(biases, (grouped.bias0, grouped.bias1), strict=True)] == [True, True]
    assert te.GroupedLinear(2, 16, 8, bias=False, return_bias=True, params_dtype=torch.bfloat16)(x, [4, 2])[1] is None


@every_recipe
@pytest.mark.parametrize("on_device", [False, True], ids=["integers", "device tensor"])
def test_grouped_linear_is_the_function_of_its_weights(recipe, on_device):
    layer = te.GroupedLinear(3, 128, 128, params_dtype=torch.bfloat16)
    sizes = [128, 0, 256]
    splits = torch.tensor(sizes, device=DEVICE) if on_device else sizes
    x, y = rows(384, 128), rows(384, 128)
    with te.autocast(recipe=recipe):
        out = layer(x, splits)
    out.float().square().sum().backward()
    got = [p.grad.clone() for p in layer.parameters()]
    layer.zero_grad()
    weights = [getattr(layer, f"weight{i}") for i in range(3)]
    biases = [getattr(layer, f"bias{i}") for i in range(3)]
    expected = ops.grouped_linear(y, weights, splits, bias=biases, recipe=recipe)
    expected.float().square().sum().backward()
    assert torch.equal(out, expected)
    assert torch.equal(x.grad, y.grad)
    assert all(torch.equal(a, p.grad) for a, p in zip(got, layer.parameters(), strict=True))


@pytest.mark.parametrize(
    "option",
    [
        {"sequence_parallel": True},
        {"tp_size": 2},
        {"tp_group": object()},
        {"parallel_mode": "column"},
        {"fuse_wgrad_accumulation": True},
        {"delay_wgrad_compute": True},
        {"get_rng_state_tracker": object()},
        {"ub_overlap_ag": True},
    ],
    ids=lambda option: next(iter(option)),
)
def test_what_layers_cannot_do_is_an_error(option):
    (name,) = option
    for make in (lambda: te.Linear(8, 8, **option), lambda: te.GroupedLinear(2, 8, 8, **option)):
        with pytest.raises(ValueError, match=name):
            make()


def test_what_forward_cannot_do_is_an_error_or_a_warning():
    layer, x = te.Linear(8, 8), torch.randn(4, 8, device=DEVICE)
    with pytest.raises(ValueError, match="fp8_output"):
        layer(x, fp8_output=True)
    for first in (True, False):
        with pytest.warns(te.NotHonoured, match="is_first_microbatch"):
            out = layer(x, is_first_microbatch=first)
        assert torch.equal(out, layer(x))
        with pytest.warns(te.NotHonoured, match="is_first_microbatch"):
            te.GroupedLinear(1, 8, 8)(x, [4], is_first_microbatch=first)


@pytest.mark.parametrize("mask", ["causal", "no_mask"])
def test_attention_takes_their_formats(mask):
    attention = te.DotProductAttention(4, 16, num_gqa_groups=2, attn_mask_type=mask)
    q, k, v = (torch.randn(3, 8, heads, 16, device=DEVICE) for heads in (4, 2, 2))  # bshd
    expected = ops.attention(q, k, v, causal=mask == "causal")
    assert torch.equal(attention(q, k, v, qkv_format="bshd"), expected)
    first = attention(*(t.transpose(0, 1).contiguous() for t in (q, k, v)))
    assert first.shape == (8, 3, 64)
    torch.testing.assert_close(first.transpose(0, 1), expected)


@pytest.mark.parametrize("mask", ["padding", "padding_causal"])
def test_attention_takes_packed_sequences(mask):
    attention = te.DotProductAttention(2, 16, qkv_format="thd")
    q, k, v = (torch.randn(12, 2, 16, device=DEVICE) for _ in range(3))
    ends = torch.tensor([0, 5, 12], dtype=torch.int32)
    out = attention(q, k, v, cu_seqlens_q=ends, cu_seqlens_kv=ends, max_seqlen_q=7, attn_mask_type=mask)
    assert torch.equal(out, ops.attention(q, k, v, cu_seqlens=ends, max_seqlen=7, causal=mask == "padding_causal"))
    with pytest.raises(ValueError, match="cu_seqlens_q"):
        attention(q, k, v, attn_mask_type=mask)
    with pytest.raises(ValueError, match="attn_mask_type"):
        attention(q, k, v, cu_seqlens_q=ends)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"attn_mask_type": "arbitrary"}, "attn_mask_type"),
        ({"qkv_format": "bhsd"}, "qkv_format"),
        ({"window_size": (4, 0)}, "window"),
        ({"cp_group": object()}, "cp_group"),
        ({"tp_size": 2}, "tp_size"),
        ({"softmax_type": "learnable"}, "softmax_type"),
        ({"attention_dropout": 0.1, "get_rng_state_tracker": object()}, "get_rng_state_tracker"),
        ({"kv_channels": (16, 32)}, "kv_channels"),
    ],
)
def test_what_attention_cannot_do_is_an_error(options, match):
    with pytest.raises(ValueError, match=match):
        te.DotProductAttention(**({"num_attention_heads": 2, "kv_channels": 16} | options))


@pytest.mark.parametrize(
    "option",
    [
        {"attention_mask": torch.ones(1, 1, 8, 8, dtype=torch.bool)},
        {"alibi_slopes": torch.ones(2)},
        {"core_attention_bias_type": "post_scale_bias"},
        {"checkpoint_core_attention": True},
        {"inference_params": object()},
        {"cu_seqlens_q": torch.tensor([0, 8])},
    ],
    ids=lambda option: next(iter(option)),
)
def test_what_attentions_forward_cannot_do_is_an_error(option):
    q, k, v = (torch.randn(8, 1, 2, 16, device=DEVICE) for _ in range(3))
    with pytest.raises(ValueError, match=next(iter(option)).removesuffix("_q")):
        te.DotProductAttention(2, 16)(q, k, v, **option)
    with pytest.raises(ValueError, match="heads"):
        te.DotProductAttention(4, 16)(q, k, v)


# --- operations ---------------------------------------------------------------------------------------------------


class _SwiGLU(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = x.chunk(2, dim=-1)
        return nn.functional.silu(gate) * up


@every_recipe
def test_grouped_linear_works_in_a_sequential_and_offloads(recipe):
    mlp = te.ops.Sequential(
        te.ops.GroupedLinear(2, 128, 256, bias=False, dtype=torch.bfloat16),
        _SwiGLU(),
        te.ops.GroupedLinear(2, 128, 128, bias=False, dtype=torch.bfloat16),
    )
    sizes = torch.tensor([128, 128], device=DEVICE)

    def run(context, controller=None) -> list[torch.Tensor]:
        mlp.zero_grad()
        x = rows(256, 128)
        with te.autocast(recipe=recipe), context:
            out = mlp(x, sizes, sizes)
        if controller is not None:
            controller.start_offload_layer(0)
            controller.release_activation_forward_gpu_memory(0)
        out.float().square().sum().backward()
        return [out.detach(), x.grad, *(p.grad.clone() for p in mlp.parameters())]

    expected = run(contextlib.nullcontext())
    context, _, controller = te.get_cpu_offload_context(enabled=True, manual_synchronization=True, policy=SMALL)
    for _ in range(2):
        got = run(context, controller)
        assert all(torch.equal(a, b) for a, b in zip(expected, got, strict=True))
        stats = context.offloader.stats()
        assert stats.bytes_in == stats.bytes_out > 0
    assert_nothing_left(context)


def test_a_sequential_hands_out_extra_inputs_in_order_and_counts_them():
    grouped = te.ops.GroupedLinear(2, 16, 16, dtype=torch.float32)
    sequential = te.ops.Sequential(te.ops.Linear(16, 16), grouped, nn.ReLU(), te.ops.GroupedLinear(1, 16, 8))
    x = torch.randn(6, 16, device=DEVICE)
    out = sequential(x, [4, 2], [6])
    assert torch.equal(out, sequential[3](grouped(sequential[0](x), [4, 2]).relu(), [6]))
    assert grouped.num_groups == 2
    nested = te.ops.Sequential(te.ops.Sequential(*sequential[:2]), *sequential[2:])
    assert nested.num_extra_inputs == 2 and torch.equal(nested(x, [4, 2], [6]), out)
    for given in ((), ([4, 2],), ([4, 2], [6], [6])):
        with pytest.raises(ValueError, match="2 extra inputs"):
            sequential(x, *given)
    with pytest.raises(ValueError, match="accumulate_into_main_grad"):
        te.ops.GroupedLinear(1, 8, 8, accumulate_into_main_grad=True)


# --- quantization -------------------------------------------------------------------------------------------------


def test_split_quantize_and_its_sub_views_take_their_arguments():
    x = torch.randn(96, 128, dtype=torch.bfloat16, device=DEVICE)
    tensors, (_, columnwise) = te.split_quantize(x, [64, 32], [te.MXFP8Quantizer()] * 2, False)
    expected = [t.columnwise_data.clone() for t in tensors]
    info = te.get_columnwise_subview_info(tensors, columnwise)
    te.restore_columnwise_subviews(tensors, columnwise.clone(), info)
    assert all(torch.equal(t.columnwise_data, e) for t, e in zip(tensors, expected, strict=True))
    assert te.split_quantize(x, [64, 32], [te.MXFP8Quantizer()] * 2, True)[1] == []


# --- the house ----------------------------------------------------------------------------------------------------


def test_every_public_name_is_there_and_is_no_module_of_its_own_engine():
    for name in te.__all__:
        assert getattr(te, name) is not None
    assert isinstance(te.ops, types.ModuleType) and isinstance(te.recipe, types.ModuleType)
    assert issubclass(te.Linear, lighterage_nn.Linear)
