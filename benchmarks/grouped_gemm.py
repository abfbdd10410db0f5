"""Grouped FP8 block-scaled products: TFLOP/s of forward, input gradient and weight gradient, beside what PyTorch has.

    python -m benchmarks.grouped_gemm --out benchmarks/results

Times are between CUDA events around single calls that are enqueued one after another, so that a way whose host is
slower than the device shows it. Operands are larger than the cache. The dense column is one per-tensor FP8 product of
as many operations, without experts or block scales: what is left to win.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.environment import capture
from benchmarks.shapes import EXPERTS, STACK_8, STACK_64, ExpertsShape
from lighterage.formats import Float8BlockQuantizer, split_quantize
from lighterage.formats.split_tensors import SplitTensors
from lighterage.formats.splits import Splits
from lighterage.ops.grouped_gemm import GemmBackend, choose_backend, grouped_dgrad, grouped_forward, grouped_wgrad

E4M3 = torch.float8_e4m3fn
TARGET, STRETCH = 1.0, 1.3
"""Times torch._grouped_mm in bf16, forward and input gradient."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One product of one shape; TFLOP/s, None where there is no such way."""

    shape: str
    splits: str
    product: str
    sizes: str
    auto: str
    """The backend that 'auto' takes."""
    triton: float
    spread_percent: float
    """Between the 10th and the 90th percentile of its time."""
    loop: float | None
    bf16: float | None
    rowwise: float | None
    dense: float | None
    host_us: float
    loop_host_us: float | None


def times_ms(call: Callable[[], object], repeats: int) -> list[float]:
    """Milliseconds between events around each of `repeats` calls, after three that are not counted."""
    for _ in range(3):
        call()
    torch.cuda.synchronize()
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    for start, end in events:
        start.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) for start, end in events]


def host_us(call: Callable[[], object], repeats: int = 10) -> float:
    """Median host microseconds of a call that is not waited for."""
    times = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        times.append((time.perf_counter() - start) * 1e6)
    torch.cuda.synchronize()
    return statistics.median(times)


class Layer:
    """One linear layer of a shape: operands in FP8 blocks, and plain ones made when they are asked for."""

    def __init__(self, shape: ExpertsShape, in_features: int, out_features: int) -> None:
        self.shape, self.sizes = shape, (in_features, out_features)
        self.splits = Splits.of(shape.splits, shape.rows, "cuda")
        self.flops = 2 * shape.rows * in_features * out_features

    def randn(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)

    def quantized(self, num_cols: int) -> SplitTensors:
        quantizers = [Float8BlockQuantizer()] * self.shape.experts
        return split_quantize(self.randn(self.shape.rows, num_cols), self.splits, quantizers)[0]

    def quantized_weight(self) -> SplitTensors:
        num_in, num_out = self.sizes
        experts = self.shape.experts
        quantizers = [Float8BlockQuantizer(block_scaling_dim=2)] * experts
        return split_quantize(self.randn(experts * num_out, num_in), [num_out] * experts, quantizers)[0]

    def ways(self, product: str) -> dict[str, Callable[[], object] | None]:
        """What can be timed, by the name of its column."""
        num_in, num_out = self.sizes
        cuda = torch.device("cuda")
        triton = choose_backend("triton", "fp8_block", cuda, self.splits, power_of_2_scales=True)
        loop = choose_backend("torch", "fp8_block", cuda, self.splits)
        offs = self.splits.ends_int32
        rows, experts = self.shape.rows, self.shape.experts

        def through(backend: GemmBackend, call: Callable[..., object], *operands: object) -> Callable[[], object]:
            return lambda: call(*operands, self.splits, backend=backend, out_dtype=torch.bfloat16)

        if product == "weight gradient":
            dy, x = self.quantized(num_out), self.quantized(num_in)
            a, b = self.randn(rows, num_out), self.randn(rows, num_in)
            return {
                "triton": through(triton, grouped_wgrad, dy, x),
                "loop": through(loop, grouped_wgrad, dy, x),
                "bf16": lambda: torch._grouped_mm(a.t(), b, offs=offs),
                "rowwise": self._rowwise_wgrad(offs),
                "dense": self._dense(num_out, rows, num_in),
            }
        depth, width = (num_in, num_out) if product == "forward" else (num_out, num_in)
        call = grouped_forward if product == "forward" else grouped_dgrad
        x, w = self.quantized(depth), self.quantized_weight()
        a, b = self.randn(rows, depth), self.randn(experts, width, depth)
        a8, b8 = a.to(E4M3), b.to(E4M3)
        scale_a, scale_b = torch.ones(rows, device="cuda"), torch.ones(experts, width, device="cuda")
        return {
            "triton": through(triton, call, x, w),
            "loop": through(loop, call, x, w),
            "bf16": lambda: torch._grouped_mm(a, b.transpose(1, 2), offs=offs),
            "rowwise": lambda: torch._scaled_grouped_mm(
                a8, b8.transpose(1, 2), scale_a, scale_b, offs=offs, out_dtype=torch.bfloat16
            ),
            "dense": self._dense(rows, depth, width),
        }

    def _rowwise_wgrad(self, offs: torch.Tensor) -> Callable[[], object]:
        num_in, num_out = self.sizes
        rows, experts = self.shape.rows, self.shape.experts
        a8, b8 = self.randn(num_out, rows).to(E4M3), self.randn(num_in, rows).to(E4M3)
        scale_a = torch.ones(experts * num_out, device="cuda")
        scale_b = torch.ones(experts * num_in, device="cuda")
        return lambda: torch._scaled_grouped_mm(a8, b8.t(), scale_a, scale_b, offs=offs, out_dtype=torch.bfloat16)

    def _dense(self, num_rows: int, depth: int, num_cols: int) -> Callable[[], object]:
        a8, b8 = self.randn(num_rows, depth).to(E4M3), self.randn(num_cols, depth).to(E4M3)
        one = torch.ones((), device="cuda")
        return lambda: torch._scaled_mm(a8, b8.t(), scale_a=one, scale_b=one, out_dtype=torch.bfloat16)


def measure(layer: Layer, product: str, repeats: int) -> Row:
    """One row of the table."""
    rates: dict[str, float | None] = {}
    ways = layer.ways(product)
    spread = 0.0
    for name, call in ways.items():
        try:
            times = times_ms(call, repeats) if call is not None else None
        except (RuntimeError, ValueError) as error:  # a peer that cannot: the table says so
            if name in ("triton", "loop"):
                raise
            print(f"{name}: {error}", flush=True)
            times = None
        rates[name] = None if times is None else layer.flops / statistics.median(times) / 1e9
        if name == "triton" and times is not None:
            deciles = statistics.quantiles(times, n=10)
            spread = 100 * (deciles[-1] - deciles[0]) / statistics.median(times)
    triton = rates["triton"]
    assert triton is not None
    shape, (num_in, num_out) = layer.shape, layer.sizes
    return Row(
        shape=shape.name,
        splits=f"{shape.experts} × {shape.splits[0]}",
        product=product,
        sizes=f"{num_in} → {num_out}",
        auto=choose_backend("auto", "fp8_block", torch.device("cuda"), layer.splits).name,
        triton=triton,
        spread_percent=spread,
        loop=rates["loop"],
        bf16=rates["bf16"],
        rowwise=rates["rowwise"],
        dense=rates["dense"],
        host_us=host_us(ways["triton"]),
        loop_host_us=host_us(ways["loop"]),
    )


def to_markdown(rows: list[Row], environment: str) -> str:
    """The table, and what stands above it."""
    lines = [
        "# Grouped FP8 block-scaled products, TFLOP/s",
        "",
        environment,
        f"- to reach: {TARGET:.1f} × bf16 grouped, forward and input gradient; {STRETCH:.1f} × is the stretch",
        "- dense: one per-tensor FP8 product of as many operations",
        "",
        "| shape | rows | features | product | triton (spread) | loop of scaled_mm | bf16 grouped | FP8 row-wise "
        "| dense | triton × bf16 | auto | host µs, triton | host µs, loop |",
        "|" + "---|" * 13,
    ]
    for row in rows:
        ratio = "–" if row.bf16 is None else f"{row.triton / row.bf16:.2f}"
        cells = [
            row.shape,
            row.splits,
            row.sizes,
            row.product,
            f"{row.triton:.0f} ({row.spread_percent:.0f} %)",
            *("–" if rate is None else f"{rate:.0f}" for rate in (row.loop, row.bf16, row.rowwise, row.dense)),
            ratio,
            row.auto,
            f"{row.host_us:.0f}",
            "–" if row.loop_host_us is None else f"{row.loop_host_us:.0f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder to write the table and the figures into")
    parser.add_argument("--all", action="store_true", help="every shape; otherwise the stacks of 64 and 8 experts")
    parser.add_argument("--repeats", type=int, default=20)
    arguments = parser.parse_args()
    environment = capture(torch.device("cuda"), "benchmarks.grouped_gemm")
    rows = []
    for shape in EXPERTS if arguments.all else (STACK_64, STACK_8):
        for sizes in ((shape.hidden, 2 * shape.ffn), (shape.ffn, shape.hidden)):
            for product in ("forward", "input gradient", "weight gradient"):
                rows.append(measure(Layer(shape, *sizes), product, arguments.repeats))
                print(rows[-1], flush=True)
                torch.cuda.empty_cache()
    table = to_markdown(rows, environment.to_markdown())
    print(table)
    if arguments.out:
        arguments.out.mkdir(parents=True, exist_ok=True)
        results = {"environment": dataclasses.asdict(environment), "rows": [dataclasses.asdict(row) for row in rows]}
        (arguments.out / "grouped_gemm.json").write_text(json.dumps(results, indent=1) + "\n")
        (arguments.out / "grouped_gemm.md").write_text(table)


if __name__ == "__main__":
    main()
