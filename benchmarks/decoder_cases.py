"""What is measured of the decoder, one function a case; each returns plain data."""

from __future__ import annotations

import contextlib
import gc
import itertools
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.decoder_model import build, inputs
from benchmarks.decoder_modes import Mode, NotInstalledError, make
from benchmarks.shapes import HOST_BOUND, TINY, DecoderShape

GIB = 1024**3
MIB = 1024**2
Row = dict[str, Any]


def synchronize(device: torch.device) -> None:
    """Wait for the device; nothing to do on a CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed_step(mode: Mode, x: Tensor, probe: Tensor) -> tuple[float, float, int]:
    """One step: its milliseconds on the device, its milliseconds on the wall, its peak bytes."""
    cuda = x.is_cuda
    synchronize(x.device)
    if cuda:
        torch.cuda.reset_peak_memory_stats(x.device)
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
    start = time.perf_counter()
    mode.step(x, probe)
    if cuda:
        last.record()
    synchronize(x.device)
    wall_ms = (time.perf_counter() - start) * 1e3
    if not cuda:
        return wall_ms, wall_ms, 0
    return first.elapsed_time(last), wall_ms, torch.cuda.max_memory_allocated(x.device)


def timed_steps(mode: Mode, x: Tensor, probe: Tensor, count: int) -> tuple[list[float], list[float], int]:
    """`count` steps in a row, as training takes them: milliseconds of each on the device and on the wall; peak bytes.

    On a device the host is not made to wait between them. Before the first of them the device was idle.
    """
    if not x.is_cuda:
        walls = [timed_step(mode, x, probe)[1] for _ in range(count)]
        return walls, walls, 0
    synchronize(x.device)
    torch.cuda.reset_peak_memory_stats(x.device)
    events = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
    start = time.perf_counter()
    events[0].record()
    for event in events[1:]:
        mode.step(x, probe)
        event.record()
    synchronize(x.device)
    wall_ms = (time.perf_counter() - start) * 1e3 / count
    each = [before.elapsed_time(after) for before, after in itertools.pairwise(events)]
    return each, [wall_ms] * count, torch.cuda.max_memory_allocated(x.device)


def spread(values: Sequence[float]) -> Row:
    """Median, least and most of `values`."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "num": len(values)}


def side_by_side(
    shape: DecoderShape, device: torch.device, names: Sequence[str], *, rounds: int, warm: int
) -> list[Row]:
    """Steps of every mode in turn, again and again, so that drift of the machine falls on all of them.

    Each turn is one step that is not timed (it follows another mode's) and two that are.
    """
    model = build(shape, device)
    x, probe = inputs(shape, device)
    rows: list[Row] = []
    running: list[tuple[Mode, Row]] = []
    for name in names:
        row: Row = {"mode": name, "device_ms": [], "wall_ms": [], "peak_bytes": 0}
        rows.append(row)
        try:
            running.append((make(name, model), row))
        except NotInstalledError as error:
            row["skipped"] = str(error)
    for turn in range(-warm, rounds):
        for mode, row in list(running):
            try:
                steps = [timed_step(mode, x, probe) for _ in range(3)][1:]
            except Exception as error:  # a peer that fails is a result, and must not stop the others
                if mode.offloader is not None or mode.name == "none":
                    raise
                row["skipped"] = f"fails: {type(error).__name__}: {str(error)[:120]}"
                running.remove((mode, row))
                continue
            model.zero_grad(set_to_none=True)
            mode.model.zero_grad(set_to_none=True)
            if turn >= 0:
                row["device_ms"] += [step[0] for step in steps]
                row["wall_ms"] += [step[1] for step in steps]
                row["peak_bytes"] = max(row["peak_bytes"], *(step[2] for step in steps))
    for mode, row in running:
        row["device"] = spread(row["device_ms"])
        row["wall"] = spread(row["wall_ms"])
        if mode.offloader is not None:
            stats = mode.offloader.stats()
            row["stats"] = {name: getattr(stats, name) for name in stats.__dataclass_fields__}
        mode.close()
    return rows


def same_bits(shape: DecoderShape, device: torch.device, names: Sequence[str]) -> list[Row]:
    """Loss and every gradient of each policy against the same step without offload, under deterministic kernels."""
    rows: list[Row] = []
    was = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    filled, torch.utils.deterministic.fill_uninitialized_memory = (
        torch.utils.deterministic.fill_uninitialized_memory,
        False,
    )
    try:
        model = build(shape, device)
        x, probe = inputs(shape, device)
        plain = make("none", model)
        loss = plain.step(x, probe)
        wanted = [parameter.grad.clone() for parameter in plain.model.parameters()]
        again = plain.step(x, probe)
        repeats = torch.equal(loss, again) and _equal_gradients(plain, wanted)
        rows.append({"mode": "none, run twice", "equal": repeats, "num_gradients": len(wanted)})
        for name in names:
            with contextlib.closing(make(name, model)) as mode:
                for _ in range(3):  # the first step learns the order of backward; the later ones prefetch by it
                    equal = torch.equal(mode.step(x, probe), loss) and _equal_gradients(mode, wanted)
                    if not equal:
                        break
                stats = mode.offloader.stats()
            rows.append({"mode": name, "equal": equal, "num_gradients": len(wanted), "bytes_out": stats.bytes_out})
    finally:
        torch.use_deterministic_algorithms(was)
        torch.utils.deterministic.fill_uninitialized_memory = filled
    return rows


def _equal_gradients(mode: Mode, wanted: list[Tensor]) -> bool:
    return all(
        torch.equal(parameter.grad.view(torch.int16), gradient.view(torch.int16))
        for parameter, gradient in zip(mode.model.parameters(), wanted, strict=True)
    )


def first_step_here(name: str, shape: DecoderShape, device: torch.device) -> Row:
    """The first step of this process, with making the offloader, pinning and loading of kernels in it."""
    model = build(shape, device)
    x, probe = inputs(shape, device)
    synchronize(device)
    start = time.perf_counter()
    try:
        mode = make(name, model)
        mode.step(x, probe)
    except NotInstalledError as error:
        return {"mode": name, "skipped": str(error)}
    except Exception as error:  # a peer that fails is a result
        return {"mode": name, "skipped": f"fails: {type(error).__name__}: {str(error)[:120]}"}
    synchronize(device)
    first_s = time.perf_counter() - start
    for _ in range(2):
        mode.step(x, probe)
    synchronize(device)
    row: Row = {"mode": name, "first_s": first_s}
    if mode.offloader is not None:
        stats = mode.offloader.stats()
        row |= {"pinned_bytes": stats.host_bytes_reserved, "in_flight_bytes": stats.host_bytes_peak}
    elif device.type == "cuda":
        row["pinned_bytes"] = _pinned_by_torch()
    return row


def _pinned_by_torch() -> int | None:
    # What its pinned allocator took from the driver, in use or not; absent from older versions.
    read = getattr(torch.cuda, "host_memory_stats", None)
    return None if read is None else read().get("allocated_bytes.current")


def first_steps(names: Sequence[str], device: torch.device, *, tiny: bool, repeats: int) -> list[Row]:
    """`first_step_here` of each mode, in a fresh process each time, the modes in turn."""
    rows: dict[str, Row] = {}
    for _ in range(repeats):
        for name in names:
            command = [sys.executable, "-m", "benchmarks.decoder", "--device", str(device), "--first-step", name]
            done = subprocess.run(command + ["--tiny"] * tiny, capture_output=True, text=True, check=False, timeout=300)
            if done.returncode:
                rows[name] = {"mode": name, "skipped": f"fails: {done.stderr.strip().splitlines()[-1][:200]}"}
                continue
            row = json.loads(done.stdout.splitlines()[-1])
            times = [*rows.get(name, {}).get("times_s", []), row.get("first_s")]
            rows[name] = {**row, "times_s": times}
    for row in rows.values():
        if "skipped" not in row:
            row["first_s"] = statistics.median(row["times_s"])
    return list(rows.values())


def host_time(device: torch.device, *, rounds: int) -> Row:
    """Host time that offload adds to forward and backward, for a layer and for a save.

    The model is so narrow that the device is always ahead of the host: the time from the first call of forward to the
    return of backward, with no synchronisation inside, is then the host's own. In the one policy `min_bytes` parts the
    tensors as the default does at full size (activations move; row norms and log-sum-exps stay); in the other
    everything stays, so the two costs are seen apart.
    """
    shape = HOST_BOUND if device.type == "cuda" else TINY
    model = build(shape, device)
    x, probe = inputs(shape, device)
    modes = {
        "none": make("none", model),
        "moved": make("keep_last=0,min_bytes=16384", model),
        "kept": make(f"keep_last=0,min_bytes={1 << 50}", model),
    }
    times: dict[str, list[float]] = {name: [] for name in modes}
    for turn in range(-5, rounds):
        for name, mode in modes.items():
            mode.model.zero_grad(set_to_none=True)
            synchronize(device)
            gc.disable()  # a collection in one of the three would be taken for its cost
            start = time.perf_counter()
            loss = mode.model(x, probe)
            loss.backward()
            elapsed_us = (time.perf_counter() - start) * 1e6
            gc.enable()
            del loss
            if turn >= 0:
                times[name].append(elapsed_us)
    num_saves = _count_saves(modes["none"], x, probe)
    medians = {name: statistics.median(values) for name, values in times.items()}
    bytes_out = modes["moved"].offloader.stats().bytes_out
    for mode in modes.values():
        mode.close()
    return {
        "shape": shape.name,
        "num_layers": shape.layers,
        "saves_a_layer": num_saves / shape.layers,
        "bytes_out": bytes_out,
        "host_us": {name: spread(values) for name, values in times.items()},
        "added_us_a_layer": (medians["moved"] - medians["none"]) / shape.layers,
        "added_us_a_moved_save": (medians["moved"] - medians["none"]) / num_saves,
        "added_us_a_kept_save": (medians["kept"] - medians["none"]) / num_saves,
    }


def _count_saves(mode: Mode, x: Tensor, probe: Tensor) -> int:
    num_saves = 0

    def pack(tensor: Tensor) -> Tensor:
        nonlocal num_saves
        num_saves += 1
        return tensor.detach()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        mode.model(x, probe).backward()
    return num_saves


def changing_sizes(shape: DecoderShape, device: torch.device, *, steps: int, policy: str) -> Row:
    """Device memory in use and host memory reserved over `steps` steps whose sequence lengths change.

    The longest comes first; the first half of the steps is the time to settle, and in the second half nothing may grow.
    """
    model = build(shape, device)
    mode = make(policy, model)
    generator = torch.Generator().manual_seed(2)
    top = shape.seq // 2
    lengths = [top, *(torch.randint(1, 17, (steps - 1,), generator=generator) * (top // 16)).tolist()]
    device_bytes: list[int] = []
    host_bytes: list[int] = []
    for seq in lengths:
        x, probe = inputs(shape, device, seq=seq)
        mode.step(x, probe)
        del x, probe
        mode.model.zero_grad(set_to_none=True)
        synchronize(device)
        device_bytes.append(torch.cuda.memory_allocated(device) if device.type == "cuda" else 0)
        host_bytes.append(mode.offloader.stats().host_bytes_reserved)
    mode.close()
    half = steps // 2
    return {
        "steps": steps,
        "lengths": len(set(lengths)),
        "policy": policy,
        "device_bytes": {"settled": max(device_bytes[half // 2 : half]), "then_at_most": max(device_bytes[half:])},
        "host_bytes": {"settled": max(host_bytes[half // 2 : half]), "then_at_most": max(host_bytes[half:])},
    }
