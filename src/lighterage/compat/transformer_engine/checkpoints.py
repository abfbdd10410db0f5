"""State dicts that Transformer Engine's modules saved, which carry more than parameters."""

from __future__ import annotations

from typing import Any

from torch import nn


def accept_extra_state(module: nn.Module) -> None:
    """Let `module` load state dicts with an `_extra_state` beside its parameters.

    It is the history of delayed scaling, which nothing here has; of other recipes it is empty.
    """
    module.register_load_state_dict_pre_hook(_drop_extra_state)


def _drop_extra_state(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: object) -> None:
    state_dict.pop(f"{prefix}_extra_state", None)
