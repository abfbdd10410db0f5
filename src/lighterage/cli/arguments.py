"""What the subcommands ask of their arguments before they work for minutes."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

_NEGATIVE = re.compile(r"-(\.?\d|inf|nan)", re.IGNORECASE)


def join_negatives(argv: Sequence[str]) -> list[str]:
    """`argv` with values that begin with a minus tied to their options, which argparse would take for options.

    Whoever reads the value then says what is wrong with it.

    >>> join_negatives(["whatif", "t.json", "--link", "-5GB/s"])
    ['whatif', 't.json', '--link=-5GB/s']
    """
    joined: list[str] = []
    for text in argv:
        if joined and joined[-1].startswith("--") and "=" not in joined[-1] and _NEGATIVE.match(text):
            joined[-1] += f"={text}"
        else:
            joined.append(text)
    return joined


def check_writable(option: str, path: Path, *, endings: tuple[str, ...] = ()) -> None:
    """Make sure that a file can be written to `path`, which `option` named.

    Raises:
        ValueError: it cannot; or its name does not end as one of `endings`.
    """
    if endings and path.suffix.lower() not in endings:
        raise ValueError(f"{option} names a file that ends in {' or '.join(endings)}; got {str(path)!r}.")
    try:
        is_dir, is_there, has_folder = path.is_dir(), path.exists(), path.parent.is_dir()
    except OSError as error:  # a name that is too long, say
        raise ValueError(f"{option} {_short(path)}: {error.strerror}.") from None
    if is_dir:
        raise ValueError(f"{option} {_short(path)} is a folder. Name a file in it.")
    if not has_folder:
        raise ValueError(f"{option} {_short(path)}: there is no folder {_short(path.parent)}. Make it first.")
    if not os.access(path if is_there else path.parent, os.W_OK):
        raise ValueError(f"{option} {_short(path)} cannot be written here. Name another file.")


def _short(path: Path) -> str:
    text = str(path)
    return text if len(text) <= 100 else f"{text[:60]}…{text[-30:]}"
