"""Of what a forward returns it is told what its backward reads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from lighterage.graphs.saved_outputs import saved_outputs

X = torch.ones(4, requires_grad=True)
W = torch.ones(2, 2, requires_grad=True)


def _with(make: Callable[[Tensor], Any]) -> Callable[[], Any]:
    return lambda: make(X * 2)


@pytest.mark.parametrize(
    ("run", "expected"),
    [
        (lambda: X * 2, ()),
        (lambda: (X * 2).view(2, 2), ()),
        (lambda: (X * 2).sum(), ()),
        (lambda: torch.nn.functional.linear(X.view(1, 2, 2), W), ()),
        (lambda: torch.nn.functional.layer_norm(X, (4,)), ()),
        (_with(lambda y: (y, y)), ()),
        (_with(lambda y: (y, y.view(2, 2))), ()),
        (_with(lambda y: (y.view(4, 1), y.view(2, 2))), ()),
        (_with(lambda y: tuple(y.chunk(2))), ()),
        (lambda: X.sigmoid(), (0,)),
        (lambda: X.sigmoid().view(2, 2), (0,)),
        (lambda: tuple(X.relu().chunk(2)), (0, 1)),
        (_with(lambda y: (y, y * y)), (0,)),
        (_with(lambda y: (y * y, y)), (1,)),
        (_with(lambda y: (y, y.view(2, 2) ** 2)), (0,)),
        (_with(lambda y: (y.view(2, 2), y**2)), (0,)),
        (lambda: X.view(2, 2), (0,)),  # the caller's own memory: rather one too many
    ],
)
def test_what_backward_reads_is_told(run: Callable[[], Any], expected: tuple[int, ...]) -> None:
    outputs = run()
    assert saved_outputs(outputs if isinstance(outputs, tuple) else (outputs,)) == expected
