"""What is asked of flags, numbers and choices before they are used. Pure Python.

Python would take "no" for true and 1.5 for a count, and fail late or not at all.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Container, Sequence
from typing import cast


def check_flag(name: str, value: object) -> None:
    """Check that `value` is True or False.

    Raises: TypeError.
    """
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False; got {value!r}. Pass a bool.")


def check_flags(owner: object, *names: str) -> None:
    """`check_flag` of attributes, by name."""
    for name in names:
        check_flag(name, getattr(owner, name))


def check_count(name: str, value: object, *, least: int = 0) -> int:
    """`value` as an int, if it is a whole number of at least `least`.

    Raises: TypeError, ValueError.
    """
    if isinstance(value, bool) or not hasattr(type(value), "__index__"):
        raise TypeError(f"{name} must be a whole number; got {value!r}. Convert it with int().")
    count = operator.index(cast(int, value))
    if count < least:
        raise ValueError(f"{name} must be at least {least}; got {count}.")
    return count


def check_number(name: str, value: object, *, least: float = -math.inf) -> None:
    """Check that `value` is a finite number of at least `least`.

    Raises: TypeError, ValueError.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number; got {value!r}. Pass a float.")
    if not (math.isfinite(value) and value >= least):
        rule = "finite" if least == -math.inf else f"a finite number of {least} or more"
        raise ValueError(f"{name} must be {rule}; got {value!r}.")


def is_one_of(value: object, choices: Container[object]) -> bool:
    """Whether `value` is one of some names or numbers; True is not 1, and what cannot be compared is none."""
    return isinstance(value, (str, int, type(None))) and not isinstance(value, bool) and value in choices


def check_list(name: str, value: object) -> None:
    """Check that `value` is a list or something like one.

    Raises: TypeError.
    """
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise TypeError(f"{name} must be a list; got a {type(value).__name__}. Pass one for each split or expert.")
