"""Arguments of the wrong kind are refused at the call, with the rule, what was received, and what to do."""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np
import pytest
import torch

from lighterage.formats import (
    Float8BlockQuantizer,
    Float8CurrentScalingQuantizer,
    MXFP8Quantizer,
    NVFP4Quantizer,
    Splits,
    bulk_capacity,
    bulk_layout,
    dequantize_group,
    get_columnwise_subview_info,
    restore_columnwise_subviews,
    split_quantize,
)
from lighterage.recipes import Float8BlockScaling, Float8CurrentScaling, NVFP4BlockScaling

X = torch.randn(32, 64)
Q = Float8BlockQuantizer


def group() -> tuple:
    return split_quantize(X, [16, 16], [Q()] * 2)


@pytest.mark.parametrize("value", ["no", 1, 0, None, 2.0])
@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("power_of_2_scale", Float8BlockScaling),
        ("power_of_2_scale", Float8CurrentScaling),
        ("random_hadamard_transform", NVFP4BlockScaling),
        ("stochastic_rounding", NVFP4BlockScaling),
        ("power_of_2_scale", Q),
        ("rowwise", Q),
        ("columnwise", MXFP8Quantizer),
        ("with_rht", NVFP4Quantizer),
        ("with_2d_quantization", NVFP4Quantizer),
        ("power_of_2_scale", Float8CurrentScalingQuantizer),
    ],
)
def test_flags_are_true_or_false_and_nothing_that_passes_for_it(name: str, make: Callable[..., object], value) -> None:
    with pytest.raises(TypeError, match=re.escape(f"{name} must be True or False; got {value!r}")):
        make(**{name: value})


@pytest.mark.parametrize("make", [Float8BlockScaling, Float8CurrentScaling])
@pytest.mark.parametrize("value", ["1e-5", None, True, float("nan"), float("inf"), -1.0])
def test_an_epsilon_is_a_finite_number(make: Callable[..., object], value) -> None:
    with pytest.raises((TypeError, ValueError), match="amax_epsilon must be a"):
        make(amax_epsilon=value)


@pytest.mark.parametrize(
    "m_splits",
    [
        [True, True],
        [16.0, 16.0],
        "ab",
        None,
        32,
        {16: 0},
        {16},
        [[16], [16]],
        torch.tensor([16.0, 16.0]),
        [16 + 0j, 16],
    ],
    ids=repr,
)
def test_sizes_are_a_list_of_integers(m_splits) -> None:
    for call in (lambda: bulk_layout("fp8_block", m_splits, 64), lambda: split_quantize(X, m_splits, [Q()] * 2)):
        with pytest.raises(TypeError, match=r"m_splits .* integers"):
            call()


def test_sizes_of_other_integer_types_count_like_pythons() -> None:
    wanted = bulk_layout("fp8_block", [200, 200], 64)
    for m_splits in (np.array([200, 200], dtype=np.uint8), list(np.array([200, 200])), torch.tensor([200, 200])):
        assert bulk_layout("fp8_block", m_splits, 64) == wanted
        splits = Splits.of(m_splits, 400, "cpu")
        assert splits.host == (200, 200) and set(map(type, splits.host)) == {int}


def test_sizes_in_a_tensor_may_add_up_to_less_than_the_rows_and_those_in_a_list_may_not() -> None:
    tensors, buffers = split_quantize(X, torch.tensor([8, 16]), [Q()] * 2)
    alone, wanted = split_quantize(X[:24].contiguous(), [8, 16], [Q()] * 2)
    assert all(torch.equal(a, b) for a, b in zip(buffers, wanted, strict=True))
    values = dequantize_group(tensors, "rowwise")
    assert torch.equal(values[:24], dequantize_group(alone, "rowwise")) and not values[24:].any()
    splits = Splits.of(torch.tensor([8, 16]), 32, "cpu")
    assert splits.num_rows == 32 and splits.host == (8, 16) and not splits.cover_all_rows
    for m_splits in ([8, 16], torch.tensor([32, 8])):
        with pytest.raises(ValueError, match=r"too (short|long) by 8"):
            split_quantize(X, m_splits, [Q()] * 2)


CALLS: list[tuple[Callable[[], object], str]] = [
    (lambda: bulk_layout("fp8_block", [16], 1.5), "row_shape must be"),  # type: ignore[arg-type]
    (lambda: bulk_layout("fp8_block", [16], -1), "row_shape must be .* got -1"),
    (lambda: bulk_layout([], [16], 64), "unknown format"),  # type: ignore[arg-type]
    (lambda: bulk_layout("fp8_block", [16], 64, columnwise=1), "columnwise must be True or False"),  # type: ignore[arg-type]
    (lambda: bulk_capacity("fp8_block", num_rows=-1, num_splits=2, num_cols=64), "num_rows must be .* got -1"),
    (lambda: bulk_capacity("fp8_block", num_rows=8, num_splits=1.5, num_cols=64), "num_splits must be"),  # type: ignore[arg-type]
    (lambda: Splits.of([16], 16, None), "device must be a torch.device"),  # type: ignore[arg-type]
    (lambda: Splits.of([16], 16.0, "cpu"), "num_rows must be a whole number"),  # type: ignore[arg-type]
    (lambda: Q(block_scaling_dim=True), "block_scaling_dim must be 1"),
    (lambda: NVFP4Quantizer(stochastic_rounding=True, generator=7), "generator must be a torch.Generator"),  # type: ignore[arg-type]
    (lambda: NVFP4BlockScaling().quantizer("grad", rowwise=True, columnwise=True, seed="x"), "seed must be"),  # type: ignore[arg-type]
    (lambda: Q().set_usage(rowwise="no"), "rowwise must be True or False"),
    (lambda: Q()(X).update_usage(rowwise_usage="no"), "rowwise_usage must be True or False"),  # type: ignore[arg-type]
    (lambda: Q()(X).dequantize(torch.uint8), "dequantized to bf16"),
    (lambda: Q()(X).dequantize("bf16"), "dequantized to bf16"),  # type: ignore[arg-type]
    (lambda: Q()(X).restore_from_saved(None), "restore_from_saved takes the list"),
    (lambda: Q()(X, backend=[]), "backend must be"),  # type: ignore[arg-type]
    (lambda: Q()(X.to("meta")), "meta device"),
    (lambda: split_quantize(X, [16, 16], None), "quantizers must be a list"),  # type: ignore[arg-type]
    (lambda: split_quantize(X, [16, 16], ["x", "x"]), "quantizers must be quantizers"),  # type: ignore[list-item]
    (lambda: split_quantize(X, [16, 16], [Q()] * 2, disable_bulk_allocation="no"), "disable_bulk_allocation must"),  # type: ignore[arg-type]
    (lambda: dequantize_group([Q()(X)], "rowwise"), "dequantize_group takes"),  # type: ignore[arg-type]
    (lambda: dequantize_group(group()[0], "sideways"), "dequantize_group takes .* 'sideways'"),  # type: ignore[arg-type]
    (lambda: get_columnwise_subview_info(None, group()[1][1]), "tensors are a list"),  # type: ignore[arg-type]
    (lambda: restore_columnwise_subviews(group()[0], group()[1][1], None), "info is what"),  # type: ignore[arg-type]
    (lambda: torch.func.grad(lambda x: Q()(x).dequantize().sum())(X), "torch.func"),
    (lambda: torch.vmap(lambda x: Q()(x).dequantize())(torch.zeros(2, 32, 64)), "torch.func"),
]


@pytest.mark.parametrize(("call", "message"), CALLS, ids=[message for _, message in CALLS])
def test_other_arguments_are_refused_with_their_names(call: Callable[[], object], message: str) -> None:
    with pytest.raises((TypeError, ValueError, RuntimeError), match=message) as caught:
        call()
    assert "/lighterage/" in str(caught.traceback[-1].path)


def test_an_assignment_into_a_quantized_tensor_is_refused_not_lost() -> None:
    q = Q()(X)
    with pytest.raises(TypeError, match=r"cannot be written element by element.*quantizer\.update"):
        q[0] = 1.0
    assert torch.equal(q.dequantize(), Q()(X).dequantize())
