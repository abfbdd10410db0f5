"""Draw a bulk layout as text, and keep the drawings in a document up to date.

`python -m lighterage.formats.drawing docs/formats.md` draws anew every block that begins with a line such as
`<!-- layout: fp8_block columnwise 256,0,96 512 -->` and ends with `<!-- end -->`.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import cast

from lighterage.formats.layout import BulkLayout, bulk_layout
from lighterage.formats.parts import FormatName

_BLOCK = re.compile(r"(<!-- layout: (\w+)( columnwise)?( 2-D)? ([\d,]+) (\d+) -->\n).*?(<!-- end -->)", re.DOTALL)
_WIDTH = 60


def draw(layout: BulkLayout) -> str:
    """A map of the buffer: what lies where, top to bottom, the gaps between, and the end.

    >>> print(draw(bulk_layout("fp8_block", [5, 3], 96)))
         0 ┌────────────────────────────────────────────────────────────┐
           │ data 0        uint8   (5, 96)            480               │
       480 ├╌╌╌╌╌╌╌╌╌╌╌╌╌╌╌╌╌╌╌╌╌╌╌╌╌╌╌╌╌╌╌╌╌╌╌╌╌╌╌╌╌╌╌╌╌╌╌╌╌╌╌╌╌╌╌╌╌╌╌╌┤ gap of 32
       512 ├────────────────────────────────────────────────────────────┤
           │ data 1        uint8   (3, 96)            288               │
       800 ├────────────────────────────────────────────────────────────┤
           │ scale_inv 0   float32 (1, 8)             32                │
       832 ├────────────────────────────────────────────────────────────┤
           │ scale_inv 1   float32 (1, 4)             16                │
       848 └────────────────────────────────────────────────────────────┘ and 256 more bytes to align the start
    """
    lines: list[str] = []
    cursor = 0
    for part in layout.parts:
        for index, view in enumerate(layout.views(part.name)):
            if view.offset > cursor:
                lines.append(f"{cursor:>6} ├{'╌' * _WIDTH}┤ gap of {view.offset - cursor}")
            rule = "┌" + "─" * _WIDTH + "┐" if not lines else "├" + "─" * _WIDTH + "┤"
            if view.num_bytes or not lines:
                lines.append(f"{view.offset:>6} {rule}")
            size = str(view.num_bytes) if view.num_bytes else "0, its own tensor"
            text = f" {f'{part.name} {index}':<13} {view.dtype:<7} {view.shape!s:<18} {size}"
            lines.append(f"       │{text:<{_WIDTH}}│")
            cursor = view.offset + view.num_bytes
    more = layout.allocated_bytes - layout.num_bytes
    lines.append(f"{cursor:>6} └{'─' * _WIDTH}┘ and {more} more bytes to align the start")
    return "\n".join(lines)


def redraw(text: str) -> str:
    """`text` with every marked block drawn anew."""

    def block(match: re.Match[str]) -> str:
        head, name, columnwise, block_2d, splits, num_cols, end = match.groups()
        layout = bulk_layout(
            cast(FormatName, name),
            [int(split) for split in splits.split(",")],
            int(num_cols),
            columnwise=columnwise is not None,
            block_2d=block_2d is not None,
        )
        return f"{head}```text\n{draw(layout)}\n```\n{end}"

    return _BLOCK.sub(block, text)


def main(paths: list[str]) -> None:
    """Redraw the documents at `paths` in place."""
    for path in map(Path, paths):
        path.write_text(redraw(path.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
