"""The kernel for Hopper compiles without one, into code that keeps products under way: no spills, no serialization."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

pytest.importorskip("triton", minversion="3.6")

_COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonASTSource

from lighterage.kernels.triton.grouped_gemm_hopper_rows import _grouped_rows_kernel as kernel

constants = dict(OUT_FEATURES=4096, DEPTH=2048, STAGES=6, UNROLL=4, GROUP=8, LANES=64, POWER_OF_2={power_of_2},
                 HAS_BIAS=False)
codes, out = gl.NVMMASharedLayout(128, 8, 2), gl.NVMMASharedLayout(128, 16, 2)
types = dict(x_desc=f"tensordesc<fp8e4nv[64, 128],{{codes!r}}>", w_desc=f"tensordesc<fp8e4nv[128, 128],{{codes!r}}>",
             out_desc=f"tensordesc<bf16[64, 128],{{out!r}}>", out="*bf16", bias="*bf16", x_buffer="*u8", w_buffer="*u8",
             ends="*i64", num_splits="i32", num_rows="i32")
names = kernel.arg_names
source = GluonASTSource(
    fn=kernel,
    signature={{name: types.get(name, "constexpr") for name in names}},
    constexprs={{(names.index(name),): value for name, value in constants.items()}},
    attrs={{(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if types.get(name, "").startswith("*")}},
)
compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=dict(num_warps=4, enable_fp_fusion=False))
print(get_ptxas(90).path)
print(compiled.metadata.shared)
print(compiled.asm["ptx"])
"""


@pytest.mark.parametrize("power_of_2", [True, False])
def test_products_are_not_serialized_and_nothing_spills(power_of_2, tmp_path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    code = _COMPILE.format(power_of_2=power_of_2)
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=150)
    assert done.returncode == 0, done.stderr[-2000:]
    ptxas, shared, ptx = done.stdout.split("\n", 2)
    assert int(shared) <= 227 * 1024
    assert "wgmma.mma_async" in ptx
    (tmp_path / "kernel.ptx").write_text(ptx)
    command = [ptxas, "-v", "-arch=sm_90a", str(tmp_path / "kernel.ptx"), "-o", str(tmp_path / "kernel.cubin")]
    report = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stderr
    assert "0 bytes spill stores, 0 bytes spill loads" in report, report
    assert "Potential Performance Loss" not in report, report


def test_a_descriptor_over_fields_that_were_checked_is_gluons_own() -> None:
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    from lighterage.kernels.triton.grouped_gemm_hopper import described

    for dtype, bits in ((torch.float8_e4m3fn, 8), (torch.bfloat16, 16), (torch.float32, 32)):
        layout = gl.NVMMASharedLayout(128, bits, 2)
        for rows in (128, 256, 128):  # the last one over fields that were kept
            matrix = (
                torch.zeros(rows * 64, dtype=torch.uint8).view(dtype) if bits == 8 else torch.zeros(rows, 64).to(dtype)
            )
            own = TensorDescriptor(matrix, [rows, 64], [64, 1], [64, 128], layout)
            made = described(matrix, rows, 64, 64, 128)
            assert type(made) is TensorDescriptor and made.base is matrix
            assert {**vars(made), "base": None} == {**vars(own), "base": None}
    with pytest.raises(AssertionError):
        described(torch.zeros(8, 9, dtype=torch.bfloat16), 8, 9, 64, 128)  # rows that are no multiple of 16 bytes
