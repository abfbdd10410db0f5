"""What the user asks of an offloader."""

from __future__ import annotations

import dataclasses
import fnmatch
import os
import re
from collections.abc import Sequence
from typing import Literal

_UNITS = {"": 1, "B": 1}
for _power, _prefix in enumerate("KMGT", start=1):
    _UNITS[f"{_prefix}IB"] = 1024**_power
    _UNITS[f"{_prefix}B"] = 1000**_power


_MOST_BYTES = 2.0**63
_MOST_SLOWDOWN = 1e15


def parse_bytes(value: int | str, *, name: str) -> int:
    """Bytes from a number or from text such as `"24GiB"`, `"512 MiB"`, `"1.5GB"`.

    Raises:
        ValueError: the text is not a size, or the size is negative.
        TypeError: `value` is neither a whole number nor text.
    """
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise TypeError(f'{name} is a number of bytes or text such as "24GiB"; got {value!r}.')
    if isinstance(value, str):
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", value)
        if match is None or match[2].upper() not in _UNITS:
            raise ValueError(f'{name} is a number of bytes or text such as "24GiB" or "512MiB"; got {value!r}.')
        nbytes = float(match[1]) * _UNITS[match[2].upper()]
        if nbytes > _MOST_BYTES:
            raise ValueError(f"{name} is more than any machine has: {value[:40]!r}. Leave it out for no limit.")
        return int(nbytes)
    if value < 0:
        raise ValueError(f"{name} cannot be negative; got {value}. Leave it out for no limit.")
    if value > _MOST_BYTES:
        raise ValueError(f"{name} is more than any machine has: {str(value)[:40]}. Leave it out for no limit.")
    return int(value)


class _Default(int):
    """A number that nobody named: it tells a plan made by hand from one left to the library."""


_BY_HAND = ("keep_last", "release_after", "prefetch_ahead")


Rule = tuple[str, Literal["offload", "keep", "recompute"]] | tuple[str, Literal["offload", "keep"], str]
"""A pattern of names, what becomes of what matches it, and perhaps a pattern of shape and dtype."""

DEFAULT_SLOWDOWN = 0.01
"""What a plan may cost where nothing is said of it."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Policy:
    """How an offloader chooses what to move, where to, and when. Every field may be given to `offload` by its name.

    Either the plan is made from what is measured (`device_budget`, or `max_slowdown`, which is 0.01 where nothing else
    is said), or by hand (`keep_last`, `release_after`, `prefetch_ahead`).

    Raises:
        ValueError, TypeError: a field is out of its range or of the wrong type; the message says what to give.
    """

    keep_last: int = _Default(2)
    """Sections at the end of the forward pass whose saved tensors stay on the device: backward wants them at once."""

    min_bytes: int = 65536
    """Allocations smaller than this many bytes stay. Small tensors inside a large allocation go with it."""

    select: Literal["unmarked", "marked"] = "unmarked"
    """`"unmarked"`: move all but what is marked `mark_not_offload`. `"marked"`: only what is marked `mark_offload`."""

    host_budget: int | str | None = None
    """Most bytes at rest at once, as a number or `"24GiB"`. What finds no room stays on the device. None: no limit
    but the machine's."""

    tier: Literal["host", "disk"] | None = None
    """Where allocations rest. None: host memory for accelerator tensors, disk for CPU tensors."""

    disk_dir: str | os.PathLike[str] | None = None
    """Folder of the disk tier. None: the system's temporary folder."""

    disk_checksums: bool = False
    """Whether the disk tier checks a CRC-32 of every range that it reads back."""

    release_after: int = _Default(1)
    """Sections that pass after a section's end before its device memory is given back. More hides a slower link behind
    more compute, and holds that many sections' bytes longer."""

    prefetch_ahead: int = _Default(2)
    """Sections whose bytes are on their way back while backward works on one. 0: only on demand."""

    device_budget: int | str | None = None
    """The most device memory of a step, as a number of bytes or `"40GiB"`: the fastest plan under it is made. On an
    accelerator that is what `max_memory_allocated` tells of forward and backward; on the CPU, what is saved. It
    is of one device: modules on several need an offloader for each."""

    max_slowdown: float | None = None
    """The part of a step that a plan may cost: with 0.02 the smallest peak is sought whose step is at most 1.02 times
    as long."""

    recompute: Literal["auto", "never"] | None = None
    """Whether a plan may compute sections again in backward, whole or all but their products, where that is better than
    to move. Never those whose forward changes a buffer or another attribute. None: `"auto"` where `device_budget`,
    `max_slowdown` or a rule asks for something, otherwise `"never"`: a second forward may do what the first one did to
    the world outside of the model, which is nothing to happen unasked."""

    rules: Sequence[Rule] = ()
    """What binds the plan, the first that matches: pairs such as `("*.mlp", "offload")` or `("*.norm*", "keep")`, whose
    pattern is that of file names and matches sections and the modules inside them. A third part matches shape and
    dtype: `("*", "keep", "(8192, *) bfloat16")`. `"recompute"` has a whole section computed again, whatever `recompute`
    says of the others."""

    def __post_init__(self) -> None:
        for name in ("keep_last", "min_bytes", "release_after", "prefetch_ahead"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{name} is a whole number; got {value!r} ({type(value).__name__}).")
            if value < 0:
                raise ValueError(f"{name} cannot be negative; got {value}. 0 is the smallest.")
        if self.select not in ("unmarked", "marked"):
            raise ValueError(
                f'select is "unmarked" (move all but mark_not_offload) or "marked" (move only mark_offload); '
                f"got {self.select!r}."
            )
        if self.tier not in (None, "host", "disk"):
            raise ValueError(f'tier is "host", "disk" or None (chosen by the device); got {self.tier!r}.')
        if self.host_budget is not None:
            parse_bytes(self.host_budget, name="host_budget")
        if not isinstance(self.disk_checksums, bool):
            raise TypeError(f"disk_checksums is True or False; got {self.disk_checksums!r}.")
        if self.disk_dir is not None:
            if not isinstance(self.disk_dir, str | os.PathLike):
                raise TypeError(f"disk_dir is a path; got {self.disk_dir!r}.")
            if self.tier == "host":
                raise ValueError(
                    f'disk_dir={os.fspath(self.disk_dir)!r} is used by the disk tier alone, and tier="host" was asked '
                    'for. Leave disk_dir out, or take tier="disk".'
                )
            if not os.path.isdir(self.disk_dir):
                raise ValueError(
                    f"disk_dir must be a folder that exists; {os.fspath(self.disk_dir)!r} is none. Make it first."
                )
        self._check_goal()

    def _check_goal(self) -> None:
        if self.recompute not in ("auto", "never", None):
            raise ValueError(f'recompute is "auto" or "never"; got {self.recompute!r}.')
        if self.device_budget is not None and parse_bytes(self.device_budget, name="device_budget") == 0:
            raise ValueError('device_budget is more than 0 bytes, such as "40GiB". Leave it out for no budget.')
        if self.max_slowdown is not None:
            value = self.max_slowdown
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise TypeError(f"max_slowdown is a part of the step, such as 0.02; got {value!r}.")
            if not 0 <= value <= _MOST_SLOWDOWN:
                raise ValueError(f"max_slowdown is a part of the step, such as 0.02, and not negative; got {value!r}.")
            if self.device_budget is not None:
                raise ValueError(
                    f"device_budget={self.device_budget!r} asks for the fastest plan under a peak, and "
                    f"max_slowdown={value!r} for the smallest peak at a price. Leave one of the two out."
                )
        goals = [name for name in ("device_budget", "max_slowdown") if getattr(self, name) is not None]
        goals += ["rules"] if self.rules else []
        goals += ["recompute"] if self.recompute == "auto" else []
        if goals and self.by_hand:
            hand = next(name for name in _BY_HAND if not isinstance(getattr(self, name), _Default))
            raise ValueError(
                f"{goals[0]}={getattr(self, goals[0])!r} asks for a plan that is made from what is measured, and "
                f"{hand}={int(getattr(self, hand))} makes one by hand. Leave one of the two out."
            )
        given: object = self.rules  # as it came, whatever its type says
        if isinstance(given, str) or not isinstance(given, Sequence):
            raise TypeError(f'rules are pairs such as [("*.mlp", "offload"), ("*.norm*", "keep")]; got {given!r}.')
        for rule in given:
            if not isinstance(rule, tuple | list) or not all(isinstance(part, str) for part in rule):
                raise TypeError(f'a rule is a pattern and what becomes of it: ("*.mlp", "offload"); got {rule!r}.')
            if len(rule) not in (2, 3) or rule[1] not in ("offload", "keep", "recompute"):
                raise ValueError(
                    'a rule says "offload", "keep" or "recompute" of a pattern, and may add one of shape and dtype: '
                    f'("*.mlp", "offload") or ("*", "keep", "(8192, *) bfloat16"); got {rule!r}.'
                )
            if len(rule) == 3 and rule[1] == "recompute":
                raise ValueError(
                    f"a section is computed again whole, and a rule cannot name shapes of it; got {rule!r}. Leave the "
                    "third part out."
                )

    @property
    def device_budget_bytes(self) -> int | None:
        """`device_budget` as bytes, or None."""
        return None if self.device_budget is None else parse_bytes(self.device_budget, name="device_budget")

    @property
    def budget_bytes(self) -> int | None:
        """`host_budget` as bytes, or None."""
        return None if self.host_budget is None else parse_bytes(self.host_budget, name="host_budget")

    @property
    def may_recompute(self) -> bool:
        """Whether a plan may compute sections again."""
        if self.recompute is None:
            asked = self.device_budget is not None or self.max_slowdown is not None
            return asked or any(rule[1] == "recompute" for rule in self.rules)
        return self.recompute == "auto"

    def may_compute_again(self, section: str) -> bool:
        """Whether a plan may compute the section of this name again: a rule that says so wins over `recompute`."""
        whole = next((r[1] for r in self.rules if len(r) == 2 and fnmatch.fnmatchcase(section, r[0])), None)
        return self.may_recompute or whole == "recompute"

    @property
    def by_hand(self) -> bool:
        """Whether `keep_last`, `release_after` or `prefetch_ahead` was named: then the plan is the user's."""
        return not all(isinstance(getattr(self, name), _Default) for name in _BY_HAND)
