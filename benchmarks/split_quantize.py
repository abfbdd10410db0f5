"""`split_quantize`: device time against the device's own copy rate, host time, and launches, over the number of splits.

    python -m benchmarks.split_quantize --out benchmarks/results

The rate of a row counts the input once for each pass over it (NVFP4 makes two) and every byte of the buffers. Device
time is that of a replayed CUDA graph, so that the host is not in it; host time is that of the public call, and shows
what a training step pays before the device may start.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from benchmarks.environment import capture
from lighterage.formats import Float8BlockQuantizer, MXFP8Quantizer, NVFP4Quantizer, bulk_layout, split_quantize
from lighterage.kernels.triton.fp8_block import split_quantize_fp8_block
from lighterage.kernels.triton.mxfp8 import split_quantize_mxfp8
from lighterage.kernels.triton.nvfp4 import split_quantize_nvfp4

NUM_ROWS, NUM_COLS = 32768, 4096
E4M3 = torch.float8_e4m3fn


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One format: how to launch it, and what its row is held against."""

    name: str
    format_name: str
    launch: Callable[..., None]
    options: dict[str, object]
    quantizer: Callable[[], object]
    passes: int
    """Over the input."""
    ragged_multiples: tuple[int, ...]
    """What the rows of ragged splits are multiples of, one measurement each."""
    target_percent: int
    """Of the copy rate."""
    sweep: dict[str, Sequence[object]]
    """Tuning arguments of the launcher, and the values to try."""


_NVFP4_SWEEP = {
    "tile_k,num_warps,max_registers": ((128, 8, 128), (128, 4, None)),
    "tiles_per_program": (1, 4),
}
_NVFP4_OPTIONS: dict[str, object] = {"block_2d": False, "stochastic_rounding": False, "seed": 0}
CASES = (
    Case(
        name="FP8 block",
        format_name="fp8_block",
        launch=split_quantize_fp8_block,
        options={"fp8_dtype": E4M3, "power_of_2": True, "epsilon": 0.0, "block_2d": False},
        quantizer=Float8BlockQuantizer,
        passes=1,
        ragged_multiples=(16, 1),
        target_percent=75,
        sweep={
            "num_warps,max_registers": ((4, 128), (4, 168), (8, 64), (8, 80), (8, 96), (8, 128), (16, 32), (16, 64))
        },
    ),
    Case(
        name="MXFP8",
        format_name="mxfp8",
        launch=split_quantize_mxfp8,
        options={"fp8_dtype": E4M3},
        quantizer=MXFP8Quantizer,
        passes=1,
        ragged_multiples=(32,),
        target_percent=60,
        sweep={"num_warps": (1, 2, 4, 8)},
    ),
    Case(
        name="NVFP4",
        format_name="nvfp4",
        launch=split_quantize_nvfp4,
        options={"hadamard": False, **_NVFP4_OPTIONS},
        quantizer=NVFP4Quantizer,
        passes=2,
        ragged_multiples=(16,),
        target_percent=40,
        sweep=_NVFP4_SWEEP,
    ),
    Case(
        name="NVFP4, Hadamard",
        format_name="nvfp4",
        launch=split_quantize_nvfp4,
        options={"hadamard": True, **_NVFP4_OPTIONS},
        quantizer=lambda: NVFP4Quantizer(with_rht=True),
        passes=2,
        ragged_multiples=(16,),
        target_percent=40,
        sweep={**_NVFP4_SWEEP, "amax_tile_k,amax_warps": ((1024, 8), (512, 4))},
    ),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the table."""

    case: str
    splits: str
    device_us: float
    spread_us: float
    """Between the 10th and the 90th percentile."""
    gb_per_s: float
    percent_of_copy: float
    target_percent: int
    host_us: float
    launches: int
    loop_us: float
    """The same kernel once for each split, from a Python loop."""
    compiled_us: float | None
    """`torch.compile` of the reference."""


def even_splits(num_splits: int) -> list[int]:
    """Splits of equal size."""
    return [NUM_ROWS // num_splits] * num_splits


def ragged_splits(num_splits: int, multiple: int) -> list[int]:
    """Splits of random size, each a multiple of `multiple`, that add up to all rows."""
    generator = torch.Generator().manual_seed(1)
    cuts = torch.randint(0, NUM_ROWS // multiple, (num_splits - 1,), generator=generator).sort().values * multiple
    bounds = [0, *cuts.tolist(), NUM_ROWS]
    return [after - before for before, after in itertools.pairwise(bounds)]


def graph_times_us(call: Callable[[], None], *, repeats: int = 25, calls: int = 5) -> list[float]:
    """Device microseconds of one call, for each replay of a CUDA graph of several."""
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            call()
    graph.replay()
    times = []
    for _ in range(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1000 / calls)
    return times


def event_time_us(call: Callable[[], object], repeats: int = 5) -> float:
    """Median microseconds between an event before the call and one after it: the slower of host and device."""
    call()
    times = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1000)
    return statistics.median(times)


def host_time_us(call: Callable[[], object], *, rounds: int = 8, calls: int = 20) -> float:
    """Median host microseconds of one call that is not waited for."""
    times = []
    call()
    for _ in range(rounds):
        torch.cuda.synchronize()
        for _ in range(calls):
            start = time.perf_counter()
            call()
            times.append((time.perf_counter() - start) * 1e6)
    torch.cuda.synchronize()
    return statistics.median(times)


def count_launches(call: Callable[[], object]) -> int:
    """Kernels that one call launches; copies of the splits to the device are not kernels."""
    call()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        torch.cuda.synchronize()
    on_device = [event for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    return sum(not event.name.startswith(("Memcpy", "Memset")) for event in on_device)


def copy_rate() -> float:
    """GB/s, read and written, of a copy of 2 GiB on the device: the fastest of three ways to make it.

    A copy node of a graph runs on other engines than an eager copy and is slower; a kernel of one read and one write is
    what `split_quantize` itself can hope for.
    """
    source = torch.randint(0, 255, (1 << 28,), dtype=torch.int64, device="cuda")
    target = torch.empty_like(source)
    ways = [
        statistics.median(graph_times_us(lambda: target.copy_(source), repeats=15, calls=2)),
        statistics.median(graph_times_us(lambda: torch.neg(source, out=target), repeats=15, calls=2)),
        event_time_us(lambda: target.copy_(source), repeats=15),
    ]
    return 2 * source.nbytes / min(ways) / 1000


class Group:
    """The input, the splits and the buffers of one measurement."""

    def __init__(self, case: Case, x: torch.Tensor, splits: Sequence[int]) -> None:
        self.case, self.x, self.splits = case, x, splits
        self.ends = torch.tensor(list(itertools.accumulate(splits)), device="cuda")
        layouts = [
            bulk_layout(case.format_name, splits, NUM_COLS, columnwise=columnwise) for columnwise in (False, True)
        ]
        self.buffers = [torch.empty(layout.num_bytes, dtype=torch.uint8, device="cuda") for layout in layouts]

    def launch(self, **tuning: object) -> None:
        """Quantize the group."""
        self.case.launch(self.x, self.ends, *self.buffers, num_splits=len(self.splits), **self.case.options, **tuning)

    @property
    def num_bytes(self) -> int:
        """Bytes that must move: read in every pass, and written."""
        read = self.x.numel() * self.x.element_size() * self.case.passes
        return read + sum(buffer.numel() for buffer in self.buffers)

    def loop_us(self) -> float:
        """The same kernel from a Python loop, one split at a time, each into buffers of its own."""
        parts = [Group(self.case, part, [len(part)]) for part in self.x.split(self.splits) if len(part)]

        def loop() -> None:
            for part in parts:
                part.launch()

        return event_time_us(loop)


def compiled_us(case: Case, x: torch.Tensor, splits: Sequence[int]) -> float:
    """`torch.compile` of the reference, over all splits and both directions."""
    quantizer = case.quantizer()

    @torch.compile(dynamic=False)
    def reference(x: torch.Tensor) -> list[tuple[torch.Tensor, ...]]:
        return [quantizer.reference(part, columnwise, None) for part in x.split(splits) for columnwise in (False, True)]

    return event_time_us(lambda: reference(x))


def measure(case: Case, x: torch.Tensor, splits: Sequence[int], label: str, copy_gb_s: float, compiled: bool) -> Row:
    """One row of the table."""
    group = Group(case, x, splits)
    times = graph_times_us(group.launch)
    device_us = statistics.median(times)
    deciles = statistics.quantiles(times, n=10)
    rate = group.num_bytes / device_us / 1000
    loop_us = group.loop_us()
    quantizers = [case.quantizer()] * len(splits)

    def call() -> object:
        return split_quantize(x, splits, quantizers)

    return Row(
        case=case.name,
        splits=label,
        device_us=device_us,
        spread_us=deciles[-1] - deciles[0],
        gb_per_s=rate,
        percent_of_copy=100 * rate / copy_gb_s,
        target_percent=case.target_percent,
        host_us=host_time_us(call),
        launches=count_launches(call),
        loop_us=loop_us,
        compiled_us=compiled_us(case, x, splits) if compiled else None,
    )


def sweep(x: torch.Tensor, copy_gb_s: float, cases: Sequence[Case]) -> list[dict[str, object]]:
    """Every tuning of every case at 256 splits, where idle programs cost most; the best first."""
    found: list[dict[str, object]] = []
    for case in cases:
        group, results = Group(case, x, even_splits(256)), []
        for values in itertools.product(*case.sweep.values()):
            tuning: dict[str, object] = {}
            for names, value in zip(case.sweep, values, strict=True):
                pairs = zip(names.split(","), value if isinstance(value, tuple) else (value,), strict=True)
                tuning.update(pairs)
            try:
                device_us = statistics.median(graph_times_us(lambda: group.launch(**tuning), repeats=9))  # noqa: B023
            except Exception as error:  # a tuning that does not fit the device is a result too
                print(f"{case.name}: {tuning}: {type(error).__name__}: {error}", flush=True)
                continue
            percent = 100 * group.num_bytes / device_us / 1000 / copy_gb_s
            results.append({"case": case.name, "us": device_us, "percent": percent, "tuning": tuning})
        results.sort(key=lambda result: result["percent"], reverse=True)
        for result in results[:6]:
            print(f"{case.name}: {result['us']:7.1f} us {result['percent']:5.1f} % {result['tuning']}", flush=True)
        found += results
    return found


def to_markdown(rows: Sequence[Row], copy_gb_s: float, environment: str) -> str:
    """The table with what it stands on."""
    lines = [
        f"# split_quantize of {NUM_ROWS}×{NUM_COLS} bf16, rowwise + columnwise",
        "",
        environment,
        f"- device copy, read + written: {copy_gb_s:.0f} GB/s",
        "- device time: median of a replayed CUDA graph, and its 10th to 90th percentile",
        "- host time: median of calls that are not waited for",
        "",
        "| format | splits | device µs (spread) | GB/s | % of copy | to reach | host µs | launches "
        "| loop over splits µs | compiled reference µs |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        compiled = "–" if row.compiled_us is None else f"{row.compiled_us:.0f}"
        lines.append(
            f"| {row.case} | {row.splits} | {row.device_us:.0f} ({row.spread_us:.0f}) | {row.gb_per_s:.0f} | "
            f"{row.percent_of_copy:.0f} | {row.target_percent} | {row.host_us:.0f} | {row.launches} | "
            f"{row.loop_us:.0f} | {compiled} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure, print, and write a table and its figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="folder for split_quantize.md and split_quantize.json")
    parser.add_argument("--sweep", action="store_true", help="try the tunings of the kernels instead")
    parser.add_argument("--quick", action="store_true", help="8 and 256 splits only")
    parser.add_argument("--compile", action="store_true", help="also torch.compile of the reference, at 8 splits")
    parser.add_argument("--only", help="cases whose name contains this")
    arguments = parser.parse_args()
    cases = [case for case in CASES if arguments.only is None or arguments.only.lower() in case.name.lower()]

    copy_gb_s = copy_rate()
    print(f"copy {copy_gb_s:.0f} GB/s", flush=True)
    x = torch.randn(NUM_ROWS, NUM_COLS, device="cuda").to(torch.bfloat16)
    environment = capture(x.device, "benchmarks.split_quantize")
    results: dict[str, object] = {"environment": dataclasses.asdict(environment), "copy_gb_per_s": copy_gb_s}
    name = "split_quantize_sweep" if arguments.sweep else "split_quantize"
    table = None
    if arguments.sweep:
        results["sweep"] = sweep(x, copy_gb_s, cases)
    else:
        rows = []
        for case in cases:
            for num_splits in (8, 256) if arguments.quick else (1, 8, 64, 256):
                compiled = arguments.compile and num_splits == 8
                rows.append(measure(case, x, even_splits(num_splits), str(num_splits), copy_gb_s, compiled))
                print(rows[-1], flush=True)
            for multiple in case.ragged_multiples:
                label = f"64 ragged, of {multiple}s" if multiple > 1 else "64 ragged, any"
                rows.append(measure(case, x, ragged_splits(64, multiple), label, copy_gb_s, False))
                print(rows[-1], flush=True)
        results["rows"] = [dataclasses.asdict(row) for row in rows]
        table = to_markdown(rows, copy_gb_s, environment.to_markdown())
        print(table)
    if arguments.out:
        arguments.out.mkdir(parents=True, exist_ok=True)
        (arguments.out / f"{name}.json").write_text(json.dumps(results, indent=1) + "\n")
        if table:
            (arguments.out / f"{name}.md").write_text(table)


if __name__ == "__main__":
    main()
