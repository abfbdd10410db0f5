"""The decoder's results as tables: each figure beside what it has to reach."""

from __future__ import annotations

from benchmarks.decoder_cases import GIB, MIB, Row
from benchmarks.environment import Environment

FREED_GIB = 2.4
LOWEST_PEAK_GIB = 8.5


def to_markdown(results: Row, environment: Environment) -> str:
    """All tables for which there are results."""
    shape = results["shape"]
    parts = [
        f"# {shape['name']}: hidden {shape['hidden']}, feed-forward {shape['ffn']}, sequence {shape['seq']}, "
        f"batch {shape['batch']}, bf16",
        environment.to_markdown(),
        "## What was to be reached",
        _table(["case", "measured", "target", ""], targets(results)),
    ]
    if "links" in results:
        links = results["links"]
        rows = [[_number(links[key]) for key in ("out_gb_s", "in_gb_s", "both_gb_s")]]
        parts += ["## The link, pinned, GB/s", _table(["out", "in", "both at once, in total"], rows)]
    if results.get("beside"):
        rows = [
            [name, f"{found['median']:+.1%}", f"{found['min']:+.1%} – {found['max']:+.1%}"]
            for name, found in results["beside"].items()
        ]
        parts += ["## The step beside copies of no use to it", _table(["copies", "longer by", "min – max"], rows)]
    if "steps" in results:
        parts += ["## Steps, modes in turn", _steps(results["steps"])]
    if "first" in results:
        parts += ["## First step, a fresh process each", _first(results["first"])]
    if "bits" in results:
        rows = [
            [
                row["mode"],
                row["num_gradients"],
                "equal" if row["equal"] else "**different**",
                _gib(row.get("bytes_out")),
            ]
            for row in results["bits"]
        ]
        parts += [
            "## Bits, deterministic kernels",
            _table(["mode", "gradients", "loss and gradients", "GiB moved out"], rows),
        ]
    return "\n\n".join(parts)


def targets(results: Row) -> list[list[str]]:
    """One row for each target: case, measured, target, verdict."""
    rows = _step_targets(results) if "steps" in results else []
    if "first" in results:
        rows += _first_targets(results["first"])
    if "host" in results:
        host = results["host"]
        saves = f"{host['saves_a_layer']:.0f} saves"
        rows.append(_judge(f"host time added a layer ({saves}), µs", host["added_us_a_layer"], 400.0))
        rows.append(_judge("host time added by a kept save, µs", host["added_us_a_kept_save"], 6.0))
    if "lanes" in results:
        rate = results["lanes"]["both_busy_gb_s"]
        passed = None if rate is None else rate >= 85
        rows.append(["both lanes busy, GB/s in total", _number(rate), "≥ 85", _verdict(passed)])
    if "sizes" in results:
        sizes = results["sizes"]
        for key, name in (("device_bytes", "device MiB"), ("host_bytes", "host MiB reserved")):
            settled, then = sizes[key]["settled"], sizes[key]["then_at_most"]
            rows.append(
                [
                    f"{name}, {sizes['steps']} steps of {sizes['lengths']} lengths",
                    f"{then / MIB:.1f}",
                    f"≤ {settled / MIB:.1f} (first half)",
                    _verdict(then <= settled),
                ]
            )
    if "bits" in results:
        equal = all(row["equal"] for row in results["bits"])
        rows.append(["loss and gradients", "equal" if equal else "different", "bitwise equal", _verdict(equal)])
    return rows


def _step_targets(results: Row) -> list[list[str]]:
    timed = {row["mode"]: row for row in results["steps"] if "skipped" not in row}
    if "none" not in timed or not timed["none"]["peak_bytes"]:
        return []
    none = timed["none"]
    ours = [row for row in timed.values() if "stats" in row]
    rows = []
    freed = [row for row in ours if none["peak_bytes"] - row["peak_bytes"] >= FREED_GIB * GIB]
    if freed:
        best = min(freed, key=lambda row: row["device"]["median"])
        ratio = best["device"]["median"] / none["device"]["median"]
        saved = (none["peak_bytes"] - best["peak_bytes"]) / GIB
        rows.append(_judge(f"step × none, {saved:.2f} GiB under none ({best['mode']})", ratio, 1.05))
    else:
        rows.append([f"step × none, {FREED_GIB} GiB under none", "no policy frees so much", "≤ 1.05", "**missed**"])
    links = results.get("links")
    everything = [row for row in ours if row["mode"].split(",")[0] == "keep_last=1"]
    if links and links["out_gb_s"] and everything:
        low = [row for row in everything if row["peak_bytes"] <= LOWEST_PEAK_GIB * GIB]
        best = min(low or everything, key=lambda row: row["device"]["median"])
        stats = best["stats"]
        limit_ms = stats["bytes_out"] / links["out_gb_s"] / 1e6 + stats["bytes_in"] / links["in_gb_s"] / 1e6
        rows.append(_judge(f"step ms, all but the last layer ({best['mode']})", best["device"]["median"], limit_ms))
        rows.append(_judge("its peak, GiB", best["peak_bytes"] / GIB, LOWEST_PEAK_GIB))
    return rows


def _first_targets(first: list[Row]) -> list[list[str]]:
    timed = {row["mode"]: row for row in first if "skipped" not in row}
    rows = []
    for name, row in timed.items():
        if "in_flight_bytes" not in row:
            continue
        if "none" in timed:
            rows.append(_judge(f"first step × none ({name})", row["first_s"] / timed["none"]["first_s"], 1.5))
        if row["in_flight_bytes"]:
            rows.append(_judge(f"pinned × most in flight ({name})", row["pinned_bytes"] / row["in_flight_bytes"], 1.05))
    return rows


def _steps(rows: list[Row]) -> str:
    none = next((row["device"]["median"] for row in rows if row["mode"] == "none" and "device" in row), None)
    lines = []
    for row in rows:
        if "skipped" in row:
            lines.append([row["mode"], row["skipped"], *[""] * 8])
            continue
        device, stats = row["device"], row.get("stats", {})
        lines.append(
            [
                row["mode"],
                f"{device['median']:.1f}",
                f"{device['min']:.1f} – {device['max']:.1f}",
                f"{row['wall']['median']:.1f}",
                f"{device['median'] / none:.3f}" if none else "",
                _gib(row["peak_bytes"]),
                _gib(stats.get("bytes_out")),
                f"{stats['copies_out']} / {stats['copies_in']}" if stats else "",
                f"{stats['late_reloads']} ({stats['late_ms']:.1f})" if stats else "",
                _gib(stats.get("host_bytes_reserved")),
            ]
        )
    header = [
        "mode",
        "device ms",
        "min – max",
        "wall ms",
        "× none",
        "peak GiB",
        "GiB out",
        "copies out / in",
        "late (ms)",
        "pinned GiB",
    ]
    return _table(header, lines)


def _first(rows: list[Row]) -> str:
    lines = []
    for row in rows:
        if "skipped" in row:
            lines.append([row["mode"], row["skipped"], "", "", ""])
            continue
        times = f"{min(row['times_s']):.2f} – {max(row['times_s']):.2f}"
        lines.append(
            [
                row["mode"],
                f"{row['first_s']:.2f}",
                times,
                _gib(row.get("pinned_bytes")),
                _gib(row.get("in_flight_bytes")),
            ]
        )
    return _table(["mode", "first step s", "min – max", "pinned GiB after 3 steps", "most in flight GiB"], lines)


def _judge(case: str, measured: float, at_most: float) -> list[str]:
    return [case, _number(measured), f"≤ {_number(at_most)}", _verdict(measured <= at_most)]


def _verdict(passed: bool | None) -> str:
    return "not measured" if passed is None else "reached" if passed else "**missed**"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}"


def _gib(nbytes: int | None) -> str:
    return "" if nbytes is None else f"{nbytes / GIB:.2f}"


def _table(header: list[str], rows: list[list[object]] | list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)
