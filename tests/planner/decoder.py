"""A decoder of eight equal layers, with the figures of a real one."""

from __future__ import annotations

from lighterage.planner.timeline import Link, Phase, SavedAllocation, SectionRecord, Timeline, Use

GIB = 1 << 30
MIB = 1 << 20

LINK = Link(out_bytes_per_s=55e9, in_bytes_per_s=55e9, both_bytes_per_s=98e9, copy_us=5.0, name="PCIe 5 x16")

FORWARD_MS = 7.1
BACKWARD_MS = 14.0

# MiB, what it is, where in forward it is saved, where in backward it is read first and last (parts of the phase).
# 8192 tokens of width 4096 in two bytes are 64 MiB; the hidden width is 14336, keys and values are a quarter wide.
SAVES = (
    (64, "input", 0.01, 0.93, 0.99),
    (64, "pointwise", 0.03, 0.86, 0.93),
    (64, "product", 0.10, 0.70, 0.85),
    (16, "product", 0.12, 0.70, 0.84),
    (16, "product", 0.13, 0.70, 0.83),
    (64, "pointwise", 0.15, 0.68, 0.72),
    (16, "pointwise", 0.16, 0.68, 0.72),
    (64, "product", 0.30, 0.60, 0.68),
    (1, "product", 0.30, 0.60, 0.68),
    (64, "pointwise", 0.38, 0.52, 0.58),
    (64, "pointwise", 0.40, 0.46, 0.51),
    (224, "product", 0.60, 0.18, 0.26),
    (224, "product", 0.78, 0.14, 0.20),
    (224, "pointwise", 0.80, 0.10, 0.16),
    (100, "pointwise", 0.82, 0.10, 0.15),
    (40, "other", 0.99, 0.00, 0.05),
)


def decoder(num_layers: int = 8) -> Timeline:
    """Base 3.38 GiB; each layer's backward leaves 0.40 GiB of gradients, and works in 0.25 GiB."""
    base, gradients, work = int(3.38 * GIB), int(0.405 * GIB), int(0.22 * GIB)

    def record(index: int) -> SectionRecord:
        return SectionRecord(
            name=f"layers.{index}",
            selective_ms=0.07 * FORWARD_MS,
            allocations=tuple(
                SavedAllocation(
                    save=save,
                    nbytes=mib * MIB,
                    held_bytes=mib * MIB,
                    born_ms=born * FORWARD_MS,
                    uses=(Use(section=index, first_ms=first * BACKWARD_MS, last_ms=last * BACKWARD_MS),),
                    kind=kind,
                    label=f"({mib}, 1048576) uint8",
                )
                for save, (mib, kind, born, first, last) in enumerate(SAVES, start=1)
            ),
        )

    phases = [
        Phase(direction="forward", section=index, ms=FORWARD_MS, work_bytes=base + work) for index in range(num_layers)
    ]
    phases.append(Phase(direction="other", section=None, ms=1.0, work_bytes=base + work))
    phases += [
        Phase(direction="backward", section=index, ms=BACKWARD_MS, work_bytes=base + work + gradients * done)
        for done, index in enumerate(reversed(range(num_layers)), start=1)
    ]
    return Timeline(
        sections=tuple(record(index) for index in range(num_layers)), phases=tuple(phases), device="decoder"
    )
