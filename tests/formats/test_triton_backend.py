"""`backend="triton"` reaches the kernels with the right arguments: on Triton's interpreter, which needs no GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import torch
from lighterage.formats import split_quantize
from tests.formats.cases import BULK, same_codes

for name in ("fp8_block", "fp8_block_fp32_e5m2", "mxfp8", "nvfp4_rht"):
    make = BULK[name]
    x, splits = torch.randn(48, 2, 32, dtype=torch.bfloat16), [16, 0, 32]
    quantizers = [make()] * 3
    kernels, buffers = split_quantize(x, splits, quantizers, backend="triton")
    plain, _ = split_quantize(x, splits, quantizers)
    assert len(buffers) == 2 and all(same_codes(a, b) for a, b in zip(kernels, plain, strict=True)), name
    assert same_codes(quantizers[0](x[:16], backend="triton"), plain[0]), name
print("all equal")
"""


def test_kernels_and_reference_agree_behind_the_public_call() -> None:
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        cwd=Path(__file__).parents[2],
        env=environment,
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
    )
    assert done.stdout.strip() == "all equal", done.stderr
