"""Links by name, for machines that are not at hand."""

from __future__ import annotations

from .figures import parse_rate
from .timeline import Link

_GB = 1e9

PCIE_COMPUTE_SLOWDOWN = 0.016
"""Of an H100 on PCIe 5: the decoder's step takes 1.8 % longer beside copies out, 1.4 beside copies in, 3.3 beside both.
`benchmarks.decoder --cases beside` measures it; the figures are of `benchmarks/results/probes-2026-11-26`."""

NAMED: dict[str, Link] = {
    "pcie4": Link(
        name="PCIe 4 x16",
        out_bytes_per_s=26 * _GB,
        in_bytes_per_s=25 * _GB,
        both_bytes_per_s=42 * _GB,
    ),
    "pcie5": Link(
        name="PCIe 5 x16",
        out_bytes_per_s=55 * _GB,
        in_bytes_per_s=55 * _GB,
        both_bytes_per_s=98 * _GB,
        compute_slowdown=PCIE_COMPUTE_SLOWDOWN,
    ),
    "nvlink-c2c": Link(
        name="NVLink-C2C",
        out_bytes_per_s=300 * _GB,
        in_bytes_per_s=370 * _GB,
        both_bytes_per_s=500 * _GB,
    ),
}
"""What copies reach, not what is printed on the box.

PCI Express: 16 lanes of 16 GT/s (4.0) or 32 GT/s (5.0) in 128b/130b code are 31.5 and 63.0 GB/s each way (PCI
Express Base Specification 4.0 and 5.0); packets of 256 bytes with their headers leave some 80 to 90 %. The figures of
PCIe 5 are those measured in `benchmarks/results`. NVLink-C2C: 450 GB/s each way, 900 in total (NVIDIA Grace Hopper
Superchip Architecture, white paper). Copies go from and to the CPU's LPDDR5X, of up to 500 GB/s in all, which is what
both ways at once share, and reach some two thirds to four fifths of the link one way. The figures of PCIe 4 and
NVLink-C2C are estimates, with nothing known of what compute loses beside them: `lighterage doctor` measures.
"""


def link_named(text: str) -> Link:
    """A link by its name in `NAMED`, or of a rate each way, such as `450GB/s`; both at once, nine tenths of the sum.

    Raises:
        ValueError: the text is neither; it lists the names.
    """
    if (link := NAMED.get(text.strip().lower())) is not None:
        return link
    try:
        each = parse_rate(text)
    except ValueError as error:
        raise ValueError(f"a link is one of {', '.join(NAMED)}, or {str(error)[0].lower()}{str(error)[1:]}") from None
    return Link(out_bytes_per_s=each, in_bytes_per_s=each, both_bytes_per_s=1.8 * each, name=text.strip())
