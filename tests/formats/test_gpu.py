"""On a CUDA device: the kernels behind the formats give the reference's bits, and the host never waits."""

from __future__ import annotations

import pytest
import torch

from lighterage.formats import (
    MXFP8Quantizer,
    NVFP4Quantizer,
    dequantize_group,
    get_columnwise_subview_info,
    restore_columnwise_subviews,
    split_quantize,
)
from tests.formats.cases import ALL, BULK, no_waiting, same_codes
from tests.kernels.inputs import DTYPES, KINDS, make_input

pytestmark = pytest.mark.gpu
SPLITS = [256, 0, 96, 32, 512]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ALL)
def test_the_device_gives_the_bits_of_the_cpu(name: str, kind: str) -> None:
    for dtype in DTYPES if name != "nvfp4_rht" else (torch.bfloat16,):
        x = make_input(kind, sum(SPLITS), 160, dtype)
        quantizer = ALL[name]()
        wanted, _ = split_quantize(x, SPLITS, [quantizer] * len(SPLITS))
        got, buffers = split_quantize(x.cuda(), SPLITS, [quantizer] * len(SPLITS))
        plain, _ = split_quantize(x.cuda(), SPLITS, [quantizer] * len(SPLITS), backend="reference")
        assert len(buffers) == (2 if name in BULK else 0)
        for a, b, c in zip(got, wanted, plain, strict=True):
            assert same_codes(c.cpu(), b), "the reference on the device"
            assert same_codes(a.cpu(), b), "the kernels"
        alone = quantizer(x.cuda()[:256])
        assert same_codes(alone, got[0])
        torch.testing.assert_close(alone.dequantize().cpu(), wanted[0].dequantize(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("name", BULK)
def test_the_host_never_waits(name: str) -> None:
    x = torch.randn(sum(SPLITS), 256, dtype=torch.bfloat16, device="cuda")
    quantizer = BULK[name]()
    with no_waiting():
        tensors, buffers = split_quantize(x, SPLITS, [quantizer] * len(SPLITS))
        info = get_columnwise_subview_info(tensors, buffers[1])
        tensors.update_usage(rowwise_usage=False, columnwise_usage=False)
        restore_columnwise_subviews(tensors, buffers[1], info)
        dequantize_group(tensors, "columnwise")
        assert len(list(tensors)) == len(SPLITS)
        quantizer(x)


@pytest.mark.parametrize("name", BULK)
def test_a_buffer_goes_to_the_host_and_back_to_another_address(name: str) -> None:
    x = torch.randn(sum(SPLITS), 160, dtype=torch.bfloat16, device="cuda")
    tensors, buffers = split_quantize(x, SPLITS, [BULK[name](rowwise=False)] * len(SPLITS))
    wanted = [tensor.clone() for tensor in tensors]
    info = get_columnwise_subview_info(tensors, buffers[0])
    resting, address = buffers[0].cpu(), buffers[0].data_ptr()
    tensors.update_usage(columnwise_usage=False)
    with pytest.raises(ValueError, match=r"must be on cuda:0, where the tensors are; got cpu"):
        restore_columnwise_subviews(tensors, resting, info)
    back = resting.cuda()
    assert back.data_ptr() != address
    restore_columnwise_subviews(tensors, back, info)
    assert all(same_codes(a, b) for a, b in zip(tensors, wanted, strict=True))


def test_tensors_move_between_devices_with_their_codes() -> None:
    for make in ALL.values():
        q = make()(torch.randn(64, 96, dtype=torch.bfloat16))
        there = q.cuda()
        assert type(there) is type(q) and str(there.device) == "cuda:0"
        assert same_codes(there.cpu(), q)
        pinned = torch.empty_like(there, device="cpu", pin_memory=True)
        assert pinned.is_pinned() and same_codes(pinned.copy_(there), q)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_stochastic_rounding_is_reproducible_from_either_generator(device: str) -> None:
    x = torch.randn(512, 256, dtype=torch.bfloat16, device="cuda")

    def draw(seed: int, times: int) -> list[torch.Tensor]:
        generator = torch.Generator(device).manual_seed(seed)
        quantizer = NVFP4Quantizer(stochastic_rounding=True, with_rht=True, generator=generator)
        return [quantizer(x) for _ in range(times)]

    a, b = draw(1, 2), draw(1, 2)
    assert same_codes(a[0], b[0]) and same_codes(a[1], b[1])
    assert not same_codes(a[0], a[1]) and not same_codes(a[0], draw(2, 1)[0])


def test_stochastic_rounding_has_the_right_mean() -> None:
    x = torch.randn(64, 256, device="cuda").clamp(-4, 4)
    x[:, ::16] = 4.0  # every block's largest value, which its scale keeps: nothing saturates
    generator = torch.Generator().manual_seed(0)
    quantizer = NVFP4Quantizer(stochastic_rounding=True, generator=generator)
    num_draws = 400
    for direction in ("rowwise", "columnwise"):
        quantizer.set_usage(rowwise=direction == "rowwise", columnwise=direction == "columnwise")
        nearest = NVFP4Quantizer(rowwise=quantizer.rowwise, columnwise=quantizer.columnwise)(x).dequantize()
        mean = torch.stack([quantizer(x).dequantize() for _ in range(num_draws)]).mean(0)
        inside = x.abs() < 3.5  # columns without a 4 may saturate by half a step of their scale
        error = (mean - x)[inside].abs()
        # Steps are at most a third of the largest value, which is 4.
        assert error.max() < 5 * (4 / 3 / 2) / num_draws**0.5 + 4 / 3 / 256
        assert error.mean() < (nearest - x)[inside].abs().mean() / 4


def test_strides_streams_and_views_do_not_matter() -> None:
    x = torch.randn(160, 64, dtype=torch.bfloat16, device="cuda")
    wanted = MXFP8Quantizer()(x.t().contiguous())
    assert same_codes(MXFP8Quantizer()(x.t()), wanted)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        other = MXFP8Quantizer()(x.t())
    torch.cuda.current_stream().wait_stream(stream)
    assert same_codes(other, wanted)
