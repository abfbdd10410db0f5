"""Tells, before the first step, of rules that match none of the modules that were given."""

from __future__ import annotations

import difflib
import fnmatch
import warnings
from collections.abc import Sequence

from .modules import SectionModules
from .policy import Policy

_MOST_NAMES = 8


def check_rules(policy: Policy, modules: SectionModules, *, stacklevel: int) -> None:
    """Compare the patterns of `policy.rules` with the names of sections and of the modules inside them.

    Shapes and dtypes are known in the steps alone. So are the names that code gives to its own sections, but those are
    never computed again: a rule that asks for it has to match a section that is known now.

    Warns: a pattern matches no name; `stacklevel` as seen from the caller.
    Raises:
        ValueError: a pattern matches no section, and what it names is to be computed again.
    """
    if not policy.rules:
        return
    sections = [name for name, _ in modules.sections]
    names = [*modules.gaps]
    for section, module in modules.sections:
        names += [f"{section}.{inner}" if inner else section for inner, _ in module.named_modules()]
    for rule in policy.rules:
        again = rule[1] == "recompute"
        known = sections if again else names
        if any(fnmatch.fnmatchcase(name, rule[0]) for name in known):
            continue
        told = f"no {'section' if again else 'section or module inside one'} has a name like {rule[0]!r}, and the rule "
        told += f"{tuple(rule)!r} binds those that have."
        if (meant := _meant(rule[0], known)) is not None:
            told += f" Perhaps {meant!r} was meant."
        told += f" The {'sections' if again else 'names'} are: {_listed(known)}."
        if again:
            raise ValueError(f"{told} Of sections only whole modules are computed again.")
        warnings.warn(
            f"{told} If it is for a section that your code opens by offloader.section(), all is well.",
            stacklevel=stacklevel + 1,
        )


def _meant(pattern: str, names: Sequence[str]) -> str | None:
    """`pattern` with its last parts spelt as in the nearest of `names`; None where none is near.

    >>> _meant("*.mpl", ["layers.0", "layers.0.mlp"])
    '*.mlp'
    """
    spelt = pattern.strip("*").strip(".")
    count = spelt.count(".") + 1
    tails = dict.fromkeys(".".join(name.split(".")[-count:]) for name in names)
    near = difflib.get_close_matches(spelt, tails, n=1)
    return pattern.replace(spelt, near[0]) if spelt and near else None


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(names[:_MOST_NAMES])
    return shown if len(names) <= _MOST_NAMES else f"{shown} and {len(names) - _MOST_NAMES} more"
