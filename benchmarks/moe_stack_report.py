"""The stack's results as tables: each figure beside what it has to reach."""

from __future__ import annotations

from benchmarks.decoder_cases import GIB, Row
from benchmarks.decoder_report import _gib as gib
from benchmarks.decoder_report import _judge as judge
from benchmarks.decoder_report import _table as table
from benchmarks.decoder_report import _verdict as verdict
from benchmarks.environment import Environment

STEP_MS = {8: 44.0, 64: 80.0}
PEER_MS = {8: "46", 64: "184–220"}
"""Transformer Engine 2.20.2 on an H100, without offload."""


def to_markdown(results: Row, environment: Environment) -> str:
    """All tables for which there are results."""
    rates = results["rates"]
    parts = [
        "# Grouped SwiGLU MLPs with quantized operands",
        environment.to_markdown()
        + f"\n- device: copy {rates['copy_bytes_per_s'] / 1e9:.0f} GB/s read + written; dense products of "
        f"16384×4096×4096 FP8 1×128 by 128×128 {rates['product_flops'] / 1e12:.0f} TFLOP/s, 1×128 by 1×128 "
        f"{rates['weight_gradient_flops'] / 1e12:.0f}, bf16 {results['bf16_flops'] / 1e12:.0f}"
        + _link(results["links"])
        + "\n- limit: every pass at those rates, operands read once and results written once, one after another",
    ]
    if results.get("steps") or results.get("host"):
        parts += ["## What was to be reached", table(["case", "measured", "target", ""], targets(results))]
    for case, title in (("steps", "## Steps of the stack"), ("models", "## Two layers of models")):
        if results.get(case):
            parts += [title, _steps(results[case], results["links"])]
    if "bytes" in results:
        rows = [[row["recipe"], f"{row['measured']:.1f}", f"{row['formula']:.1f}"] for row in results["bytes"]]
        parts += ["## Bytes saved a token and layer", table(["recipe", "measured", "by the formula"], rows)]
    if "host" in results:
        rows = [
            [
                row["shape"]["experts"],
                f"{row['host_us']['none']:.0f}",
                f"{row['host_us']['offload']:.0f}",
                f"{row['forward_us']['none']:.0f} / {row['forward_us']['offload']:.0f}",
                row["copies_out"],
                row["num_pairs"],
                f"{row['added_us_a_layer']:.0f} ({lower:.0f} – {upper:.0f})",
            ]
            for row in results["host"]
            for lower, upper in [row["added_us_a_layer_quartiles"]]
        ]
        header = [
            "experts",
            "host µs a step, none",
            "offload",
            "forward alone, none / offload",
            "copies out",
            "pairs of steps",
            "added µs a layer: median of the differences (quartiles)",
        ]
        parts += ["## Host time, narrow layers", table(header, rows)]
    return "\n\n".join(parts)


def targets(results: Row) -> list[list[str]]:
    """One row for each target: case, measured, target, verdict."""
    rows: list[list[str]] = []
    for row in results.get("steps", []):
        of_fp8 = row["recipe"] == "fp8_block"
        if row["mode"] == "none" and of_fp8 and row["experts"] in STEP_MS:
            rows.append(
                judge(f"{row['experts']} experts, FP8 block, step ms", row["device"]["median"], STEP_MS[row["experts"]])
            )
            rows[-1][0] += f" (limit {row['limit_ms']:.1f}; Transformer Engine {PEER_MS[row['experts']]})"
        if row["mode"] == "offload" and of_fp8:
            case = f"{row['experts']} experts, {row['layers_moved']} layers offloaded"
            if row["held_bytes"]:
                share = row["freed_bytes"] / row["saved_by_them_bytes"]
                rows.append([f"{case}: freed of saved", f"{share:.1%}", "≥ 97 %", verdict(share >= 0.97)])
            rows.append(judge(f"{case}: copies out a layer", row["copies_a_layer"], 8.0))
    if counts := results.get("launches"):
        text = ", ".join(f"{count} at {experts}" for experts, count in counts.items())
        case = "launches of a grouped layer, forward and backward, by experts"
        rows.append([case, text, "equal", verdict(len(set(counts.values())) == 1)])
    host = results.get("host", [])
    return rows + [
        judge(f"{row['shape']['experts']} experts: host µs added a layer", row["added_us_a_layer"], 200.0)
        for row in host
    ]


def _link(links: Row) -> str:
    if links["out_gb_s"] is None:
        return ""
    return (
        f"\n- link: {links['out_gb_s']:.1f} GB/s out, {links['in_gb_s']:.1f} in, {links['both_gb_s']:.1f} both at once"
    )


def _steps(rows: list[Row], links: Row) -> str:
    lines = []
    for row in rows:
        device, stats = row["device"], row.get("stats")
        freed = ""
        if stats and row["held_bytes"]:
            saved, gone = row["saved_by_them_bytes"], row["freed_bytes"]
            freed = f"{gone / GIB:.2f} of {saved / GIB:.2f} ({gone / saved:.1%})"
        lines.append(
            [
                row["shape"],
                row["experts"],
                row["recipe"],
                row["mode"],
                f"{device['median']:.1f}",
                f"{device['min']:.1f} – {device['max']:.1f}",
                f"{row['limit_ms']:.1f}",
                f"{row['host_forward']['median']:.1f}",
                f"{row['host']['median']:.1f}",
                row["launches"],
                gib(row["held_bytes"]),
                f"{stats['copies_out']} / {stats['copies_in']}" if stats else "",
                gib(stats["bytes_out"]) if stats else "",
                freed,
                _link_ms(stats, links) if stats else "",
                f"{stats['late_ms']:.1f}" if stats else "",
            ]
        )
    header = ["shape", "experts", "recipe", "mode", "device ms", "min – max", "limit ms", "host forward ms", "host ms"]
    header += ["launches", "GiB held after forward", "copies out / in", "GiB out", "GiB freed of saved"]
    header += ["link ms, out + in", "late ms"]
    return table(header, lines)


def _link_ms(stats: Row, links: Row) -> str:
    """What the copies take at the link's rates: out while forward runs, in while backward does."""
    if links["out_gb_s"] is None:
        return ""
    return f"{stats['bytes_out'] / links['out_gb_s'] / 1e6:.1f} + {stats['bytes_in'] / links['in_gb_s'] / 1e6:.1f}"
