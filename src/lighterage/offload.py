"""`lighterage.offload`: the one line to use."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

from torch import nn

from .engine.offloader import Offloader
from .engine.policy import Policy


def offload(modules: nn.Module | Iterable[nn.Module], policy: Policy | None = None, **shorthands: Any) -> Offloader:
    """Move what `modules` save for backward off the device during forward, and back for backward.

    Gradients and losses are bitwise those of the same program without it.

    Args:
        modules: a ModuleList, Sequential or iterable of modules in forward order, each a section; or a single module,
            whose longest ModuleList or Sequential gives the sections, and whose saves between them move too.
        policy: what to move, where to and when.
        **shorthands: fields of `Policy` by name; they win over those of `policy`.

    Returns:
        The offloader: `report()`, `stats()`, `close()`; also a context manager.

    Raises:
        TypeError: something else than modules was given, or an unknown shorthand.
        ValueError: no module was given, a field of the policy is out of its range, a rule has a section computed
            again of which there is none, or a `device_budget` is set for modules on several devices.
    """
    if policy is not None and not isinstance(policy, Policy):
        raise TypeError(f"policy is a lighterage.Policy; got {type(policy).__name__}. Fields go by name: keep_last=2.")
    fields = {field.name for field in dataclasses.fields(Policy)}
    unknown = sorted(set(shorthands) - fields)
    if unknown:
        raise TypeError(f"offload has no option {unknown[0]!r}. The fields of Policy are: {', '.join(sorted(fields))}.")
    chosen = dataclasses.replace(policy, **shorthands) if policy is not None else Policy(**shorthands)
    return Offloader(modules, chosen)
