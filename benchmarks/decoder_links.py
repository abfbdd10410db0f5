"""What the link carries, alone, beside a step, and in both directions at once; each function returns plain data."""

from __future__ import annotations

import itertools
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

import lighterage
from benchmarks.decoder_cases import MIB, Row, spread, synchronize
from benchmarks.decoder_model import build, inputs
from benchmarks.decoder_modes import make
from benchmarks.shapes import DecoderShape
from lighterage.engine.link import Lanes


def link_rates(device: torch.device, nbytes: int = 256 * MIB, rounds: int = 10) -> Row:
    """GB/s (1e9 bytes) between pinned host memory and the device: out alone, in alone, both at once in total."""
    if device.type != "cuda":
        return {"out_gb_s": None, "in_gb_s": None, "both_gb_s": None}
    lanes = Lanes(device, nbytes)
    lanes.seconds(nbytes, out=4, back=4)

    def rate(out: bool, back: bool) -> float:
        # Four copies each way: enough that starting them does not count.
        return lanes.rate(nbytes, out=4 * out, back=4 * back, rounds=rounds) / 1e9

    return {"out_gb_s": rate(True, False), "in_gb_s": rate(False, True), "both_gb_s": rate(True, True)}


def beside_copies(shape: DecoderShape, device: torch.device, *, nbytes: int = 256 * MIB, rounds: int) -> Row:
    """By which part the step without offload is longer while lanes are busy all through it with copies of no use to it.

    Each such step is compared with the one before and the one after it, beside which nothing is copied.
    """
    if device.type != "cuda":
        return {}
    mode = make("none", build(shape, device))
    x, probe = inputs(shape, device)
    here = [torch.empty(nbytes, dtype=torch.uint8, device=device) for _ in range(2)]
    there = [torch.zeros(nbytes, dtype=torch.uint8, pin_memory=True) for _ in range(2)]
    lanes = [torch.cuda.Stream(device) for _ in range(2)]

    def step(out: int, back: int) -> float:
        synchronize(device)
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        for _ in range(40):  # 10 GiB each way: longer than the step
            with torch.cuda.stream(lanes[0]):
                for _ in range(out):
                    there[0].copy_(here[0], non_blocking=True)
            with torch.cuda.stream(lanes[1]):
                for _ in range(back):
                    here[1].copy_(there[1], non_blocking=True)
        first.record()
        mode.step(x, probe)
        last.record()
        synchronize(device)
        return first.elapsed_time(last)

    for _ in range(3):
        step(0, 0)
    longer: dict[str, list[float]] = {"out": [], "in": [], "both": []}
    for _ in range(rounds):
        for name, out, back in (("out", 1, 0), ("in", 0, 1), ("both", 1, 1)):
            before, beside, after = step(0, 0), step(out, back), step(0, 0)
            longer[name].append(2 * beside / (before + after) - 1)
    return {name: spread(values) for name, values in longer.items()}


def both_lanes(device: torch.device, *, nbytes: int = 256 * MIB, sections: int = 8) -> Row:
    """GB/s in total over the times in which copies out and copies in were both under way.

    Two graphs are in flight: the forward of one, then the backward of the one before. The sections compute next to
    nothing, so the link is what limits, and they are released one graph later, so that copies out and copies in meet.
    """
    if device.type != "cuda":
        return {"both_busy_gb_s": None, "why": "needs an accelerator"}
    x = torch.randn(nbytes // 2, device=device, dtype=torch.bfloat16, requires_grad=True)
    offloader = lighterage.offload(
        torch.nn.ModuleList([torch.nn.Identity()]), keep_last=0, release_after=sections, prefetch_ahead=3
    )

    def forward() -> Tensor:
        h = x * 1.0
        for index in range(sections):
            with offloader.section(f"sine {index}"):
                h = torch.sin(h)
        return h

    def run(graphs: int) -> None:
        previous = forward()
        for _ in range(graphs):
            following = forward()
            previous.backward(gradient=x.detach())
            x.grad = None
            previous = following
        previous.backward(gradient=x.detach())
        x.grad = None
        synchronize(device)

    run(2)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run(4)
    offloader.close()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    copies = [
        (event["ts"], event["ts"] + event["dur"], event["args"]["bytes"], "HtoD" in event["name"])
        for event in events
        if event.get("cat") == "gpu_memcpy" and ("HtoD" in event["name"] or "DtoH" in event["name"])
    ]
    return overlap(copies)


def overlap(copies: Sequence[tuple[float, float, int, bool]]) -> Row:
    """Rates of copies (start µs, end µs, bytes, inbound): in total while both directions are busy, and overall.

    Copies of 100 bytes each way over [0, 10) and [5, 15) µs are both busy for 5 µs, in which 50 + 50 bytes pass.
    """
    edges = sorted({edge for start, end, _, _ in copies for edge in (start, end)})
    busy_us = any_us = 0.0
    busy_bytes = 0.0
    for lo, hi in itertools.pairwise(edges):
        active = [copy for copy in copies if copy[0] < hi and copy[1] > lo]
        directions = {inbound for _, _, _, inbound in active}
        any_us += (hi - lo) * bool(active)
        if len(directions) == 2:
            busy_us += hi - lo
            busy_bytes += sum(nbytes * (hi - lo) / (end - start) for start, end, nbytes, _ in active)
    return {
        "num_copies": len(copies),
        "both_busy_ms": busy_us / 1e3,
        "any_busy_ms": any_us / 1e3,
        "both_busy_gb_s": busy_bytes / busy_us / 1e3 if busy_us else None,
        "overall_gb_s": sum(copy[2] for copy in copies) / any_us / 1e3 if any_us else None,
    }
