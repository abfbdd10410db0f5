"""`make_graphed_callables` refuses what does not fit, and says what would."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lighterage import GraphError, make_graphed_callables
from lighterage.graphs import Graphed
from lighterage.graphs.recording import Recording

X = torch.zeros(2)


def double(x: Tensor) -> Tensor:
    return x * 2


def hooked() -> nn.Module:
    module = nn.Linear(2, 2)
    module.register_forward_hook(lambda *_: None)
    return module


def hooked_parameter() -> nn.Module:
    module = nn.Linear(2, 2)
    module.bias.register_post_accumulate_grad_hook(lambda _: None)
    module.weight.register_hook(lambda grad: grad * 2)
    return module


def graphed() -> nn.Module:
    module = nn.Linear(2, 2)
    recording = Recording("Linear", module, [X], pytree.tree_flatten((X,))[1], (), module, True)
    module.forward = Graphed(recording, module.forward, module)  # type: ignore[method-assign]
    return module


def with_buffer() -> nn.Module:
    module = nn.Linear(2, 2)
    module.register_buffer("scale", torch.ones(1, requires_grad=True))
    return module


TWICE = nn.Linear(2, 2)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((double, (X,)), {"num_warmup_iters": -1}, ValueError, "a whole number from 0 up; got -1"),
        ((double, (X,)), {"num_warmup_iters": True}, ValueError, "got True"),
        ((double, (X,)), {"pre_warmup_hook": 3}, TypeError, "pre_warmup_hook is called without arguments"),
        ((double, (X,)), {"post_warmup_hook": "f"}, TypeError, "post_warmup_hook is called without"),
        ((double, X), {}, TypeError, r"sample_args of double is a tuple.*got a Tensor. Write \(x,\)"),
        (((double, double), ((X,),)), {}, ValueError, "for each of 2 callables; got 1"),
        (((double,), [(X,)]), {}, ValueError, "for each of 1 callables; got a list"),
        (((), ()), {}, ValueError, "for each of 0 callables"),
        ((3, (X,)), {}, TypeError, "a module or a function can be graphed, or a tuple of them; got 3"),
        (([double], [(X,)]), {}, TypeError, "or a tuple of them; got \\[<function"),
        ((double, (X,)), {"pool": 3}, TypeError, r"pool is torch.cuda.graph_pool_handle\(\).*got 3"),
        ((double, (X,)), {"allow_unused_input": "no"}, TypeError, "allow_unused_input is True or False; got 'no'"),
        ((double, (X, 3)), {}, TypeError, "sample_args of double holds a int; only tensors can change"),
        ((hooked(), (X,)), {}, ValueError, "Linear has module hooks.*Register them after"),
        (((TWICE, TWICE), ((X,), (X,))), {}, ValueError, "the same Linear stands twice.*nn.Sequential of its own"),
        ((nn.Sequential(graphed()), (X,)), {}, ValueError, r"0 of Sequential has graphs.*Call 0.forward.reset\(\)"),
        ((hooked_parameter(), (X,)), {}, ValueError, "parameter weight of Linear has a hook.*scaled twice"),
        ((with_buffer(), (X,)), {}, ValueError, "buffer scale of Linear needs a gradient.*Make it a parameter"),
    ],
)
def test_what_does_not_fit_is_refused(
    arguments: tuple[Any, Any], options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        make_graphed_callables(*arguments, **options)


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without CUDA")
def test_without_a_cuda_device_it_says_so() -> None:
    module = nn.Linear(2, 2)
    with pytest.raises(GraphError, match="needs a CUDA device, and there is none"):
        make_graphed_callables(module, (X,))
    assert "forward" not in module.__dict__
