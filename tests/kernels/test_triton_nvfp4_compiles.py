"""What NVFP4's kernel is compiled into, seen without a GPU: what keeps its compilation short, and no detours."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest

pytest.importorskip("triton", minversion="3.6")

_COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from lighterage.kernels.triton.nvfp4 import _split_quantize_kernel as kernel

constants = dict(NUM_COLS=4096, ROWWISE=True, COLUMNWISE=True, HADAMARD=True, BLOCK_2D=False, STOCHASTIC={stochastic},
                 SWIGLU={swiglu}, LANES=64, C=128, TILES_PER_PROGRAM=4, HARDWARE=True)
types = dict(x="*bf16", ends="*i64", partials="*fp32", row_buffer="*u8", col_buffer="*u8", num_splits="i32",
             rows_per_program="i32", num_partials="i32", seed="i64")
names = kernel.arg_names
source = ASTSource(
    fn=kernel,
    signature={{name: types.get(name, "constexpr") for name in names}},
    constexprs={{(names.index(name),): value for name, value in constants.items()}},
    attrs={{(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if types.get(name, "").startswith("*")}},
)
options = dict(num_warps=8, maxnreg=128, enable_fp_fusion=False)
compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
print(compiled.asm["ttgir"])
"""


def _ttgir(tmp_path, **options: bool) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    code = _COMPILE.format(**options)
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=150)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def _computed_pointers(ttgir: str) -> list[str]:
    """The loads and stores of tensors whose pointers no loop carries: note [Pointers that a loop carries]."""
    carried = {name for args in re.findall(r"iter_args\((.*?)\) ->", ttgir) for name in re.findall(r"(%\w+) =", args)}
    accesses = re.findall(r"tt\.(?:load|store) (%\w+)\b.*: tensor<", ttgir)
    assert len(accesses) > 32
    return [pointers for pointers in accesses if pointers not in carried]


@pytest.mark.parametrize("swiglu", [False, True])
def test_the_compiler_walks_the_kernel_for_three_stores_alone(swiglu, tmp_path) -> None:
    ttgir = _ttgir(tmp_path, stochastic=False, swiglu=swiglu)
    assert len(_computed_pointers(ttgir)) == 3  # the scales of both directions, and the columnwise codes


def test_random_numbers_are_made_where_they_are_used(tmp_path) -> None:
    ttgir = _ttgir(tmp_path, stochastic=True, swiglu=False)
    assert not re.findall(r"ttg\.convert_layout .* tensor<8x128x", ttgir)  # one would pass through shared memory
