"""Runs the demo's two trainings, compares them, and shows the comparison."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import sys
from collections.abc import Callable, Iterator

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from lighterage.cli.demo_config import PRESETS, DemoConfig
from lighterage.cli.demo_plan import MOST_STEPS, draw_planned_step
from lighterage.cli.demo_plot import draw
from lighterage.cli.demo_text import standard_library_text
from lighterage.cli.demo_train import RunResult, reproducible, train
from lighterage.engine import host_memory

_MIB = 1024**2
FEWEST_TIMED = 5
"""Of fewer timed steps no overhead is told: one slow step would be most of it."""


def choose(args: argparse.Namespace) -> DemoConfig:
    """The preset that fits the machine and `--quick`, with what was given on the command line in its place.

    Raises:
        ValueError: a size is out of range, or the device is not there.
    """
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        kind = torch.device(device).type
    except RuntimeError as error:
        raise ValueError(f"--device {device}: {error}") from error
    if kind not in ("cpu", "cuda"):
        raise ValueError(f"--device {device}: the demo runs on cpu and cuda.")
    if kind == "cpu":
        device = "cpu"  # it has one, whatever its number
    elif not torch.cuda.is_available():
        raise ValueError(f"--device {device}: PyTorch finds no CUDA device here. Leave --device out to use the CPU.")
    elif (torch.device(device).index or 0) >= torch.cuda.device_count():
        raise ValueError(f"--device {device}: there are {torch.cuda.device_count()} CUDA devices here, from 0.")
    preset = PRESETS[args.model]["quick" if args.quick else "gpu" if kind == "cuda" else "cpu"]
    names = (
        "recipe",
        "steps",
        "layers",
        "hidden",
        "seq",
        "batch",
        "experts",
        "top_k",
        "keep_last",
        "seed",
        "tier",
        "plot",
        "out",
    )
    given = {name: value for name in names if (value := getattr(args, name)) is not None}
    config = dataclasses.replace(preset, device=device, **given)
    there = torch.cuda.mem_get_info(device)[1] if kind == "cuda" else host_memory.total_bytes()
    if (least := _least_bytes(config)) > there:
        raise ValueError(
            f"a model of these sizes takes {least / _MIB:,.0f} MiB at the very least, and there are "
            f"{there / _MIB:,.0f} MiB. Take fewer --layers, a smaller --hidden, --seq or --batch, or fewer --experts."
        )
    return config


def _least_bytes(config: DemoConfig) -> int:
    """Weights of attention and network, their gradients and two moments of each, and a layer's input for each token."""
    networks = config.experts if config.model == "moe" else 1
    weights = config.layers * config.hidden**2 * (4 + 3 * networks)
    return 2 * (4 * weights + config.layers * config.batch * config.seq * config.hidden)


def run(config: DemoConfig) -> int:
    """Run the demo and return its exit status: 0 if every bit is equal and memory was freed, otherwise 1."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=110)
    text = standard_library_text()
    if len(text) <= config.seq:
        print(
            f"lighterage demo: --seq {config.seq} is as much as there is to train on, {len(text)} bytes. Take less.",
            file=sys.stderr,
        )
        return 2
    console.print(
        f"Training on {len(text) / _MIB:.1f} MiB of Python's standard library, on {_device_name(config)}: "
        f"{_model_name(config)}, {config.batch} × {config.seq} bytes a step, {config.steps} steps, seed {config.seed}.",
        highlight=False,
    )
    results: list[RunResult] = []
    with reproducible():
        for offload in (False, True):
            name = "with offload" if offload else "without offload"
            with _progress(console, name, config.steps) as on_step:
                results.append(train(config, text, offload=offload, on_step=on_step))
    plain, moved = results
    differences = compare(plain, moved)
    config.out.mkdir(parents=True, exist_ok=True)
    figure = config.out / "activation_bytes.png"
    draw(plain, moved, path=figure, title=_figure_title(config))
    (config.out / "demo.json").write_text(json.dumps(_as_json(config, plain, moved, differences), indent=1) + "\n")

    console.print()
    console.print(moved.report, markup=False, highlight=False, soft_wrap=True)
    console.print()
    console.print(_table(plain, moved, differences))
    console.print(f"Activation bytes over time: {figure}", highlight=False, soft_wrap=True)
    if config.plot:
        _plot(config, text, console)
    failures = [*differences, *_not_freed(plain, moved), *_too_many_copies(plain, moved)]
    for failure in failures:
        console.print(f"FAILED: {failure}", style="bold red", markup=False, highlight=False, soft_wrap=True)
    if not failures:
        saved = 1 - moved.peak_bytes / plain.peak_bytes
        console.print(f"Same bits, {saved:.0%} less activation memory at the peak.", style="bold green")
    return 1 if failures else 0


def _plot(config: DemoConfig, text: torch.Tensor, console: Console) -> None:
    with _progress(console, "planned", MOST_STEPS) as on_step:
        planned = draw_planned_step(config, text, on_step=on_step)
    if planned is None:
        console.print(f"No plan was made within {MOST_STEPS} steps: they took too different times.", highlight=False)
        return
    console.print(planned.why, markup=False, highlight=False, soft_wrap=True)
    console.print(f"The step as planned: {planned.figure}", highlight=False, soft_wrap=True)


def compare(plain: RunResult, moved: RunResult) -> list[str]:
    """One sentence for each kind of thing that differs between the two runs; none if every bit is equal."""
    differences = []
    for step, (before, after) in enumerate(zip(plain.losses, moved.losses, strict=True), start=1):
        if before.hex() != after.hex():
            differences.append(f"the loss of step {step} is {after!r} with offload and {before!r} without.")
            break
    for step, (grads, moved_grads) in enumerate(zip(plain.gradients, moved.gradients, strict=True), start=1):
        names = [name for name in grads if grads[name] != moved_grads[name]]
        if names:
            differences.append(f"in step {step}, {len(names)} of {len(grads)} gradients differ, first {names[0]}.")
            break
    names = [name for name in plain.weights if plain.weights[name] != moved.weights[name]]
    if names:
        differences.append(
            f"after the last step, {len(names)} of {len(plain.weights)} weights differ, first {names[0]}."
        )
    return differences


def _not_freed(plain: RunResult, moved: RunResult) -> list[str]:
    assert moved.stats is not None, "the second run has an offloader"
    if moved.stats.bytes_out == 0:
        return ["nothing was freed: the offloader moved no bytes. The report above says why each one was kept."]
    if moved.peak_bytes >= plain.peak_bytes:
        return [
            f"nothing was freed: {moved.stats.bytes_out / _MIB:.1f} MiB were moved, but the device held "
            f"{moved.peak_bytes / _MIB:.1f} MiB at the peak with and {plain.peak_bytes / _MIB:.1f} MiB without. "
            "The peak lies in layers that stay, or between two moves: take more --layers, or a smaller --keep-last."
        ]
    return []


def _too_many_copies(plain: RunResult, moved: RunResult) -> list[str]:
    assert moved.stats is not None and plain.num_allocations is not None, "only the second run has an offloader"
    copies = max(moved.stats.copies_out, moved.stats.copies_in)
    if copies <= plain.num_allocations:
        return []
    return [f"{copies} copies were made one way, for {plain.num_allocations} allocations to move."]


@contextlib.contextmanager
def _progress(console: Console, name: str, steps: int) -> Iterator[Callable[[int, float], None]]:
    """A bar on a terminal; a line for every tenth of the way elsewhere."""
    if not console.is_terminal:
        every = max(1, steps // 10)

        def print_line(step: int, loss: float) -> None:
            if step == 0 or (step + 1) % every == 0:
                console.print(f"{name:<16} step {step + 1:>3}/{steps}  loss {loss:.4f}", highlight=False)

        yield print_line
        return
    columns = (
        TextColumn("{task.description:<16}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(name, total=steps, loss="–")
        yield lambda step, loss: progress.update(task, completed=step + 1, loss=f"{loss:.4f}")


def _table(plain: RunResult, moved: RunResult, differences: list[str]) -> Table:
    stats = moved.stats
    assert stats is not None, "the second run has an offloader"
    table = Table(title="lighterage demo")
    table.add_column("")
    table.add_column("without offload", justify="right")
    table.add_column("with offload", justify="right")
    table.add_row("loss, first step", f"{plain.losses[0]:.6f}", f"{moved.losses[0]:.6f}")
    table.add_row("loss, last step", f"{plain.losses[-1]:.6f}", f"{moved.losses[-1]:.6f}")
    num_compared = len(plain.losses) + len(plain.gradients) * len(plain.weights) + len(plain.weights)
    table.add_row(
        f"{num_compared} losses, gradients and weights",
        "",
        "[bold red]DIFFERENT[/]" if differences else "[bold green]bitwise equal[/]",
    )
    table.add_section()
    table.add_row("activation bytes on the device, peak", _mib(plain.peak_bytes), _mib(moved.peak_bytes))
    table.add_row("of that, freed", "", f"{1 - moved.peak_bytes / plain.peak_bytes:.1%}")
    table.add_row("bytes moved a step, out / in", "", f"{_mib(stats.bytes_out)} / {_mib(stats.bytes_in)}")
    table.add_row("buffers saved a step by layers that move", f"{plain.num_allocations}", "")
    table.add_row("copies a step, out / in", "", f"{stats.copies_out} / {stats.copies_in}")
    table.add_row("saved by autograd a step", "", f"{_mib(stats.saved_bytes)} ({_mib(stats.unique_bytes)} unique)")
    table.add_section()
    table.add_row("time a step, median", f"{plain.median_ms:.1f} ms", f"{moved.median_ms:.1f} ms")
    table.add_row("time a step, fastest – slowest", _spread(plain.step_ms), _spread(moved.step_ms))
    few = min(len(plain.step_ms), len(moved.step_ms)) < FEWEST_TIMED
    table.add_row("overhead", "", "too few steps to tell" if few else f"{moved.median_ms / plain.median_ms - 1:+.1%}")
    table.add_row("reloads that came late", "", f"{stats.late_reloads} ({stats.late_ms:.1f} ms)")
    return table


def _as_json(config: DemoConfig, plain: RunResult, moved: RunResult, differences: list[str]) -> dict[str, object]:
    def one(result: RunResult) -> dict[str, object]:
        return {
            "losses": result.losses,
            "step_ms": result.step_ms,
            "peak_bytes": result.peak_bytes,
            "num_allocations": result.num_allocations,
            "weights": result.weights,
            "stats": None if result.stats is None else dataclasses.asdict(result.stats),
        }

    return {
        "config": {**dataclasses.asdict(config), "out": str(config.out)},
        "device": _device_name(config),
        "torch": torch.__version__,
        "differences": differences,
        "without_offload": one(plain),
        "with_offload": one(moved),
    }


def _device_name(config: DemoConfig) -> str:
    device = torch.device(config.device)
    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    return f"the CPU ({torch.get_num_threads()} threads)"


def _figure_title(config: DemoConfig) -> str:
    return (
        f"Activations of one training step on {_device_name(config)}\n"
        f"{_model_name(config)}, {config.batch} × {config.seq} tokens, last {config.keep_last} kept"
    )


def _model_name(config: DemoConfig) -> str:
    name = f"{config.layers} layers, width {config.hidden}"
    if config.model == "dense":
        return name
    recipe = "" if config.recipe == "none" else f", {config.recipe}"
    return f"{name}, {config.experts} experts of which {config.top_k} a token{recipe}"


def _mib(nbytes: int) -> str:
    return f"{nbytes / _MIB:.1f} MiB"


def _spread(values: list[float]) -> str:
    return f"{min(values):.1f} – {max(values):.1f} ms"
