"""Mixtures of experts and attention on an accelerator: the same bits, nothing that waits for the device, all freed."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

import lighterage
from lighterage.nn import GatedMLP, MoE, TransformerBlock
from lighterage.ops import attention
from lighterage.recipes import (
    Float8BlockScaling,
    Float8CurrentScaling,
    MXFP8BlockScaling,
    NVFP4BlockScaling,
)

pytestmark = pytest.mark.gpu

RECIPES = {
    "none": None,
    "fp8_block": Float8BlockScaling(),
    "mxfp8": MXFP8BlockScaling(),
    "nvfp4": NVFP4BlockScaling(),
    "fp8_current": Float8CurrentScaling(fp8_format="e4m3"),
}
all_recipes = pytest.mark.parametrize("name", RECIPES)
WIDTH, FFN, TOKENS, BATCH = 256, 512, 512, 2


@pytest.fixture(autouse=True)
def _exact(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Attention's backward adds with atomics unless told otherwise."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
    torch.cuda.synchronize()


@contextlib.contextmanager
def waits_are_errors() -> Iterator[None]:
    """Make PyTorch raise where the host would wait for the device."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it says that it is a prototype
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def blocks(name: str, num_layers: int = 4, num_experts: int = 8, sparse: bool = True) -> nn.ModuleList:
    torch.manual_seed(0)
    recipe = RECIPES[name]

    def network() -> nn.Module:
        if sparse:
            return MoE(WIDTH, FFN, num_experts, min(2, num_experts), recipe=recipe, shared_ffn_size=FFN, z_weight=1e-3)
        return GatedMLP(WIDTH, FFN, recipe=recipe)

    layers = [TransformerBlock(WIDTH, 4, network(), num_kv_heads=2, recipe=recipe) for _ in range(num_layers)]
    return nn.ModuleList(layers).to("cuda", torch.bfloat16)


def batch(seed: int) -> Tensor:
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(BATCH, TOKENS, WIDTH, device="cuda", dtype=torch.bfloat16, generator=generator)


def forward(layers: nn.ModuleList, x: Tensor) -> Tensor:
    for layer in layers:
        x = layer(x)
    return x.float().square().mean()


def step(layers: nn.ModuleList, seed: int) -> list[Tensor]:
    torch.manual_seed(seed)
    x = batch(seed).requires_grad_()
    loss = forward(layers, x)
    loss.backward()
    assert x.grad is not None
    found = [loss.detach(), x.grad, *(p.grad.clone() for p in layers.parameters() if p.grad is not None)]
    layers.zero_grad()
    return found


@all_recipes
@pytest.mark.parametrize("num_experts", [1, 8, 64])
def test_same_bits_and_one_copy_each_way(name: str, num_experts: int) -> None:
    """The splits change each step; of 64 experts some may have no token."""
    layers = blocks(name, num_experts=num_experts)
    wanted = [step(layers, seed) for seed in range(3)]
    with lighterage.offload(layers, keep_last=1) as offloader:
        for seed in range(3):
            assert all(torch.equal(a, b) for a, b in zip(step(layers, seed), wanted[seed], strict=True))
            stats = offloader.stats()
            assert stats.bytes_in == stats.bytes_out > 0
            assert stats.copies_in == stats.copies_out <= 16 * 3


@all_recipes
@pytest.mark.parametrize("sparse", [True, False], ids=["moe", "dense"])
def test_nothing_waits_for_the_device(name: str, sparse: bool) -> None:
    layers = blocks(name, sparse=sparse)
    for seed in range(2):
        step(layers, seed)  # compiles kernels
    inputs = [batch(seed).requires_grad_() for seed in range(2)]
    torch.cuda.synchronize()
    torch.use_deterministic_algorithms(False)  # its own versions of some operators wait
    with waits_are_errors():
        for x in inputs:
            forward(layers, x).backward()


@pytest.mark.parametrize("name", ["none", "fp8_block"])
def test_nothing_waits_for_the_device_with_offload(name: str) -> None:
    layers = blocks(name)
    with lighterage.offload(layers, keep_last=1, min_bytes=4096) as offloader:
        for seed in range(3):
            step(layers, seed)
        inputs = [batch(seed).requires_grad_() for seed in range(2)]
        torch.cuda.synchronize()
        torch.use_deterministic_algorithms(False)
        with waits_are_errors():
            for x in inputs:
                forward(layers, x).backward()
        assert offloader.stats().bytes_out > 0


@all_recipes
def test_what_moved_is_off_the_device(name: str) -> None:
    """After forward of layers that all move, what the device holds is less than a fifth of what they saved.

    That fifth has the quantized weights, which stay, what is under the smallest size, and what the last layer gave.
    """
    layers = blocks(name, num_layers=6, num_experts=4)
    held = []
    for offload in (False, True):
        context = lighterage.offload(layers, keep_last=0, min_bytes=4096, release_after=0) if offload else None
        with context or contextlib.nullcontext():
            step(layers, 0)
            x = torch.cat([batch(seed) for seed in range(8)]).requires_grad_()
            before = torch.cuda.memory_allocated()
            loss = forward(layers, x)
            torch.cuda.synchronize()
            held.append(torch.cuda.memory_allocated() - before)
            loss.backward()
            layers.zero_grad()
    assert held[1] < held[0] / 5, f"{held[0]} bytes without offload, {held[1]} with it"


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("on_device", [False, True])
def test_packed_sequences_attend_each_to_itself(causal: bool, kv_heads: int, on_device: bool) -> None:
    torch.manual_seed(0)
    sizes = [100, 1, 0, 155]
    total = sum(sizes)
    q, k, v = (
        torch.randn(total, heads, 64, device="cuda", dtype=torch.bfloat16).requires_grad_()
        for heads in (4, kv_heads, kv_heads)
    )
    ends = torch.tensor([0, *torch.tensor(sizes).cumsum(0).tolist()], dtype=torch.int32)
    out = attention(q, k, v, causal=causal, cu_seqlens=ends.cuda() if on_device else ends, max_seqlen=160)
    pieces = []
    for a, b in zip(ends[:-1].tolist(), ends[1:].tolist(), strict=True):
        if a < b:
            parts = [x[None, a:b].float() for x in (q, k, v)]
            pieces.append(attention(*parts, causal=causal)[0])
    wanted = torch.cat(pieces)
    torch.testing.assert_close(out.float(), wanted, atol=2e-2, rtol=2e-2)
    toward = torch.randn_like(wanted)
    found = torch.autograd.grad((out.float() * toward).sum(), (q, k, v))
    for grad, by_pieces in zip(found, torch.autograd.grad((wanted * toward).sum(), (q, k, v)), strict=True):
        torch.testing.assert_close(grad.float(), by_pieces.float(), atol=5e-2, rtol=5e-2)


def test_packed_attention_never_reads_the_ends_of_its_sequences() -> None:
    q = torch.randn(256, 4, 64, device="cuda", dtype=torch.bfloat16).requires_grad_()
    ends = torch.tensor([0, 100, 256], dtype=torch.int32, device="cuda")
    torch.use_deterministic_algorithms(False)
    attention(q, q, q, causal=True, cu_seqlens=ends).sum().backward()
    with waits_are_errors():
        attention(q, q, q, causal=True, cu_seqlens=ends).sum().backward()


def test_packed_attention_with_dropout_wants_its_ends_on_the_host() -> None:
    q = torch.randn(256, 4, 64, device="cuda", dtype=torch.bfloat16)
    ends = torch.tensor([0, 100, 256], dtype=torch.int32)
    torch.manual_seed(1)
    first = attention(q, q, q, dropout=0.5, cu_seqlens=ends)
    torch.manual_seed(1)
    assert torch.equal(first, attention(q, q, q, dropout=0.5, cu_seqlens=ends))
    with pytest.raises(ValueError, match=r"cu_seqlens\.cpu"):
        attention(q, q, q, dropout=0.5, cu_seqlens=ends.cuda())


@pytest.mark.parametrize("name", ["none", "fp8_block"])
def test_the_output_of_attention_moves_once(name: str) -> None:
    """Attention saves it and so does the projection; heads are one allocation, which leaves in one copy."""
    layers = blocks(name, sparse=False)
    attend = nn.ModuleList(layer.attention for layer in layers)
    with lighterage.offload(attend, keep_last=0, min_bytes=4096, release_after=0) as offloader:
        step(layers, 0)
        step(layers, 1)
        stats = offloader.stats()
    tokens = BATCH * TOKENS
    heads = tokens * (4 + 2 * 2) * (WIDTH // 4) * 2
    output, logarithms = tokens * WIDTH * 2, tokens * 4 * 4
    codes = tokens * WIDTH * 2 if name == "none" else tokens * WIDTH * 9 // 8
    assert stats.bytes_out <= len(layers) * (heads + output + logarithms + codes)
    assert stats.copies_out <= 4 * len(layers)
