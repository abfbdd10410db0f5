"""How this interface says that it cannot do what an argument asks: an error, or a warning with the reason."""

from __future__ import annotations

import warnings
from collections.abc import Mapping

import torch


class NotHonoured(UserWarning):
    """An argument was understood, and has no effect. The results are those that it would have given."""


def warn_not_honoured(what: str, why: str, *, stacklevel: int = 3) -> None:
    """Warn the caller of the function that calls this."""
    warnings.warn(f"{what} has no effect here: {why}", NotHonoured, stacklevel=stacklevel)


def refuse(owner: str, given: Mapping[str, tuple[object, object, str]]) -> None:
    """Refuse every argument that was given something else than its default.

    given: by name: the value, the value that asks for nothing, and what to do instead.
    Raises: ValueError: naming the first such argument.
    """
    for name, (value, harmless, remedy) in given.items():
        if value is not harmless and value != harmless:
            shown = f"a tensor {tuple(value.shape)}" if isinstance(value, torch.Tensor) else repr(value)
            raise ValueError(f"{owner}({name}={shown}) is not supported; the only value here is {harmless!r}. {remedy}")


TENSOR_PARALLEL = "There is no tensor parallelism here: shard with torch.distributed's own, around this module."
OVERLAP = "There is no overlap of products with communication here: leave it out."
MAIN_GRAD = "Gradients go to .grad: accumulate them there, or copy them with Tensor.register_post_accumulate_grad_hook."
RNG_TRACKER = "Parameters are drawn from PyTorch's generator: seed it, or load them."
