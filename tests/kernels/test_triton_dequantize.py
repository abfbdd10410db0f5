"""Decoding a group in one launch gives the bits that the formats' own `dequantize` gives split by split."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.triton_cases import DEVICE, DTYPES, hard_input, tame_input

pytest.importorskip("triton")

from lighterage.formats import Splits, SplitTensors, dequantize_group, split_quantize
from lighterage.kernels.triton.dequantize import dequantize_rows
from tests.formats.cases import BULK

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, in the interpreter: NaN and Inf are meant
NAMES = [*BULK, "mxfp8_e5m2"]


def _group(name: str, x: torch.Tensor, splits: list[int], *, unused: int = 0) -> SplitTensors:
    """Quantized by the reference; with rows that belong to no split, which only the device may leave."""
    if name == "mxfp8_e5m2":
        quantizer = BULK["mxfp8"](fp8_dtype=torch.float8_e5m2)
    else:
        quantizer = BULK[name]()
    of: object = splits
    if unused:
        of = Splits(num_rows=len(x), ends=torch.tensor(splits, device=DEVICE).cumsum(0))
    return split_quantize(x, of, [quantizer] * len(splits), backend="reference")[0]


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal bits, but that one NaN is as good as another."""
    nan = a.isnan()
    bits = {2: torch.int16, 4: torch.int32}[a.itemsize]
    same = torch.equal(a.view(bits)[~nan], b.view(bits)[~nan])
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(nan, b.isnan()) and same


def _check(name: str, x: torch.Tensor, splits: list[int], *, dtype: torch.dtype | None = None, **options: bool) -> None:
    unused = len(x) - sum(splits)
    group = _group(name, x, splits, unused=unused)
    for direction in ("rowwise", "columnwise"):
        wanted = dequantize_group(group, direction, dtype=dtype, backend="reference", **options)
        assert wanted.shape == x.shape and wanted.dtype == (dtype or x.dtype)
        got = dequantize_group(group, direction, dtype=dtype, backend="triton", **options)
        assert _same(got, wanted), direction
        assert not got[len(x) - unused :].any()


def _input(name: str, num_rows: int, num_cols: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return (tame_input if name.startswith("nvfp4") else hard_input)(num_rows, num_cols, dtype)


@pytest.mark.parametrize("name", NAMES)
def test_every_value_has_the_bits_of_the_reference(name: str) -> None:
    _check(name, _input(name, 192, 160), [128, 0, 64])


@pytest.mark.parametrize("name", NAMES)
def test_the_reference_of_a_group_is_its_members_own_dequantize(name: str) -> None:
    x = _input(name, 96, 160)
    group = _group(name, x, [64, 32])
    for direction in ("rowwise", "columnwise"):
        members = [tensor.detach() for tensor in group]
        for member in members:
            member.update_usage(**{f"{'columnwise' if direction == 'rowwise' else 'rowwise'}_usage": False})
            if name == "nvfp4_rht":
                member.with_rht = False  # else it is transformed back
        values = dequantize_group(group, direction, dtype=torch.float32, backend="reference")
        assert _same(values, torch.cat([member.dequantize(torch.float32) for member in members]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["fp8_block_fp32_e5m2", "mxfp8", "nvfp4"])
def test_results_of_every_dtype(name: str, dtype: torch.dtype) -> None:
    _check(name, _input(name, 64, 96, torch.float32), [32, 32], dtype=dtype)


@pytest.mark.parametrize("name", ["fp8_block", "fp8_block_2d", "mxfp8", "nvfp4", "nvfp4_2d"])
def test_ragged_splits_and_rows_past_the_last_one(name: str) -> None:
    _check(name, _input(name, 32 * 11 + 5, 288), [0, 96, 0, 32, 160, 0])


@pytest.mark.parametrize("name", ["fp8_block", "fp8_block_2d"])
def test_splits_that_no_word_divides(name: str) -> None:
    _check(name, _input(name, 5 + 130 + 17, 19), [5, 0, 130, 17])


def test_many_small_splits() -> None:
    _check("nvfp4", _input("nvfp4", 16 * 70, 32), [16] * 70)


@pytest.mark.parametrize("name", ["nvfp4", "nvfp4_2d"])
def test_without_amax_bf16_is_exact(name: str) -> None:
    x = _input(name, 96, 96)
    _check(name, x, [64, 32], with_amax=False)
    group = _group(name, x, [64, 32])
    for direction in ("rowwise", "columnwise"):
        exact = dequantize_group(group, direction, dtype=torch.float32, with_amax=False)
        assert torch.equal(dequantize_group(group, direction, with_amax=False).float(), exact)


def test_every_code_and_scale_is_decoded() -> None:
    """All 256 codes under 256 E8M0 scales, and all E2M1 codes under all scales that quantization makes."""
    codes = torch.arange(256, dtype=torch.uint8).view(8, 32).repeat(256, 1)
    scales = torch.zeros(2048, 4, dtype=torch.uint8)
    scales[:, 0] = torch.arange(2048) // 8
    for fp8_dtype in (torch.float8_e4m3fn, torch.float8_e5m2):
        group = _group(
            "mxfp8" if fp8_dtype == torch.float8_e4m3fn else "mxfp8_e5m2", torch.zeros(2048, 32, device=DEVICE), [2048]
        )
        buffer = torch.cat([codes.flatten(), scales.flatten()]).to(DEVICE)
        group = group.with_buffers(rowwise=buffer)
        wanted = dequantize_group(group, "rowwise", backend="reference")
        assert _same(dequantize_group(group, "rowwise", backend="triton"), wanted)
    data = torch.tensor([0x10, 0x32, 0x54, 0x76, 0x98, 0xBA, 0xDC, 0xFE], dtype=torch.uint8).repeat(128, 1)
    scales = torch.zeros(128, 4, dtype=torch.uint8)
    scales[:, 0] = torch.arange(128).clamp(max=0x7E)
    for amax in (1.0, 6.0, 3e38, 1e-38, float("inf"), 0.0):
        last = torch.tensor([amax]).view(torch.uint8)
        group = _group("nvfp4", torch.zeros(128, 16, device=DEVICE), [128])
        group = group.with_buffers(rowwise=torch.cat([data.flatten(), scales.flatten(), last]).to(DEVICE))
        wanted = dequantize_group(group, "rowwise", backend="reference")
        assert _same(dequantize_group(group, "rowwise", backend="triton"), wanted)


def test_nothing_to_decode() -> None:
    for name in ("fp8_block", "nvfp4"):
        for shape in ((0, 32), (32, 0)):
            group = _group(name, torch.zeros(shape, device=DEVICE), [shape[0], 0])
            assert dequantize_group(group, "columnwise", backend="triton").shape == shape


def test_a_direction_that_is_not_there_is_refused() -> None:
    group = _group("mxfp8", torch.zeros(32, 32), [32])
    group.update_usage(rowwise_usage=False)
    with pytest.raises(ValueError, match=r"no rowwise buffer to read: the group has \['columnwise'\].*with_buffers"):
        dequantize_group(group, "rowwise")
    alone = split_quantize(torch.zeros(32, 32), [32], [BULK["mxfp8"]()], disable_bulk_allocation=True)[0]
    with pytest.raises(ValueError, match="the group has none"):
        dequantize_group(alone, "rowwise")


def test_what_the_kernel_would_misread_is_refused() -> None:
    group = _group("mxfp8", torch.zeros(32, 32), [32])
    buffer, ends = group.buffers["rowwise"], group.splits.ends
    rest = {"num_rows": 32, "num_cols": 32, "num_splits": 1, "columnwise": False, "block_2d": False}
    for wrong, message in (
        ({"format_name": "int4"}, "no kernel to decode 'int4'"),
        ({"out_dtype": torch.float64}, "out_dtype must be bf16, fp16 or fp32; got torch.float64"),
        ({"buffer": buffer[1:]}, "begins at a multiple of 16 bytes.*1 past one"),
        ({"ends": ends.int()}, r"1 int64 row counts on .*; got \(1,\) torch.int32"),
        ({"num_splits": 2}, r"2 int64 row counts .*; got \(1,\)"),
    ):
        given = {"buffer": buffer, "ends": ends, "format_name": "mxfp8", "out_dtype": torch.bfloat16, **rest, **wrong}
        with pytest.raises(ValueError, match=message):
            dequantize_rows(given.pop("buffer"), given.pop("ends"), **given)


@pytest.mark.gpu
@pytest.mark.parametrize("name", NAMES)
def test_large_groups_have_the_bits_of_the_reference(name: str) -> None:
    x = _input(name, 4096, 1056)
    _check(name, x, [512] * 8)
    _check(name, x, [1024, 0, 32, 992, 64, 1952])
    _check(name, x, [32, 0] * 60)
