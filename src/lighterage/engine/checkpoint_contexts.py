"""`selective_checkpoint_contexts`: PyTorch's checkpoint policies, of which those that name the CPU are honoured."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any, TypeGuard

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy, SelectiveCheckpointContext

from .scopes import innermost
from .selective import Held, HeldHere, HeldOnHost, Hold, Op, contexts

PolicyFunction = Callable[..., CheckpointPolicy | bool]

_SAVE = (CheckpointPolicy.MUST_SAVE, CheckpointPolicy.PREFER_SAVE)
_OFFLOAD = tuple(
    getattr(CheckpointPolicy, name)
    for name in ("MUST_CPU_OFFLOAD", "PREFER_CPU_OFFLOAD")
    if hasattr(CheckpointPolicy, name)
)

# Older versions of PyTorch do not tell the policy what the operator gave.
_TELLS_OUTPUT = "op_output" in inspect.signature(SelectiveCheckpointContext).parameters


def selective_checkpoint_contexts(
    policy: PolicyFunction | Sequence[Op],
) -> Callable[[], tuple[TorchDispatchMode, TorchDispatchMode]]:
    """What `torch.utils.checkpoint.checkpoint(..., use_reentrant=False, context_fn=...)` takes, made of a policy.

    The same as `functools.partial(torch.utils.checkpoint.create_selective_checkpoint_contexts, policy)`, but that what
    `CheckpointPolicy.MUST_CPU_OFFLOAD` and `PREFER_CPU_OFFLOAD` name is moved and comes back, where PyTorch computes it
    again. It moves as the innermost lighterage scope around the checkpoint moves things; where there is none (no
    offloader, or one whose sections are the checkpointed layers themselves), it is copied to plain host memory, for
    which the host waits. Operators that write to their arguments are always computed again, and so is what
    `PREFER_CPU_OFFLOAD` names and is written over before backward. Random operators that are not computed again leave
    the generators as they did in forward.

    Args:
        policy: a function of (context, operator, *args, **kwargs) that gives a `CheckpointPolicy`; or a list of
            operators to save, all others being computed again.

    Raises:
        TypeError: `policy` is neither.
    """
    if callable(policy):
        function = policy
    elif _are_operators(policy):
        function = functools.partial(_save_listed, frozenset(policy))
    else:
        raise TypeError(
            "policy is a function that gives a CheckpointPolicy, or a list of operators such as "
            f"torch.ops.aten.mm.default; got {policy!r}."
        )
    return functools.partial(
        contexts, functools.partial(_choose, function), again_if_overwritten=lambda hold: hold is _move_or_again
    )


def _are_operators(policy: object) -> TypeGuard[Sequence[Op]]:
    return isinstance(policy, Sequence) and all(isinstance(op, torch._ops.OpOverload) for op in policy)


def _save_listed(ops: frozenset[Op], context: object, op: Op, *args: object, **kwargs: object) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if op in ops else CheckpointPolicy.PREFER_RECOMPUTE


def _choose(
    function: PolicyFunction, op: Op, number: int, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any
) -> Hold | None:
    context = SelectiveCheckpointContext(is_recompute=False, **({"op_output": out} if _TELLS_OUTPUT else {}))
    chosen = function(context, op, *args, **kwargs)
    if isinstance(chosen, bool):
        chosen = CheckpointPolicy.MUST_SAVE if chosen else CheckpointPolicy.PREFER_RECOMPUTE
    if chosen in _SAVE:
        return HeldHere
    if chosen not in _OFFLOAD:
        return None
    return _move if chosen is _OFFLOAD[0] else _move_or_again


def _move_or_again(tensor: torch.Tensor) -> Held:
    """As `_move`, for what is preferred and no more: what is written over since is computed again."""
    return _move(tensor)


def _move(tensor: torch.Tensor) -> Held:
    scope = innermost()
    return HeldOnHost(tensor) if scope is None else scope.hold(tensor)
