"""Programs to run with and without offload, what must be equal, and what must be gone afterwards."""

from __future__ import annotations

import copy
import gc
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass

import lighterage
from lighterage import Offloader, OffloadStats

WIDTH = 32

PLANS: list[dict[str, Any]] = [
    {"keep_last": 0, "release_after": 0, "prefetch_ahead": 0},
    {"keep_last": 0, "release_after": 1, "prefetch_ahead": 2},
    {"keep_last": 1, "release_after": 0, "prefetch_ahead": 2},
    {"keep_last": 1, "release_after": 3, "prefetch_ahead": 0},
]
both_tiers = pytest.mark.parametrize("tier", ["disk", "host"])
every_plan = pytest.mark.parametrize(
    "plan", PLANS, ids=lambda plan: "-".join(f"{name.split('_')[0]}{value}" for name, value in plan.items())
)
AT_ONCE = PLANS[0]
"""Everything moves, is released when its section ends, and comes back on demand."""


# --- bits ---------------------------------------------------------------------------------------------------------


def bits(value: Any) -> Any:
    """All that can be told of a tensor, as data that `==` compares: a NaN equals itself, -0.0 differs from 0.0."""
    if not isinstance(value, Tensor):
        return repr(value)
    value = value.detach()
    if value.is_nested:  # a jagged one names its ragged size anew each time
        return (type(value).__name__, str(value.dtype), str(value.layout), [bits(part) for part in value.unbind()])
    outer = (type(value).__name__, str(value.dtype), tuple(value.shape), str(value.layout))
    if is_traceable_wrapper_subclass(value):
        names, _ = value.__tensor_flatten__()
        return (*outer, {name: bits(getattr(value, name)) for name in names})
    if value.layout is torch.sparse_coo:
        return (*outer, bits(value._indices()), bits(value._values()))
    if value.layout is torch.sparse_csr:
        return (*outer, bits(value.crow_indices()), bits(value.col_indices()), bits(value.values()))
    if value.is_quantized:
        return (*outer, bits(value.int_repr()), value.q_scale(), value.q_zero_point())
    resolved = value.resolve_conj().resolve_neg().contiguous().reshape(-1)
    return (*outer, resolved.view(torch.uint8).numpy().tobytes())


def form(tensor: Tensor) -> tuple[Any, ...]:
    """How a tensor lies in memory, apart from where."""
    if tensor.layout is not torch.strided or tensor.is_nested or is_traceable_wrapper_subclass(tensor):
        return (str(tensor.layout), tensor.is_nested)
    return (tensor.stride(), tensor.is_conj(), tensor.is_neg())


class Save(torch.autograd.Function):
    """Passes `x` on, saves `tensors`, and logs the bits and the form of what backward gets of them."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, log: list[Any], *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(*tensors)
        ctx.log = log
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        ctx.log.append([(bits(tensor), form(tensor)) for tensor in saved])
        return (grad, None, *[None] * len(saved))


# --- models -------------------------------------------------------------------------------------------------------


class Layer(nn.Module):
    """Calls `fn(x, *weights)`, each weight a parameter of one of `shapes`."""

    def __init__(self, fn: Callable[..., Tensor], *shapes: tuple[int, ...]) -> None:
        super().__init__()
        self.fn = fn
        self.weights = nn.ParameterList([torch.randn(shape) / shape[0] ** 0.5 for shape in shapes])

    def forward(self, *args: Any) -> Tensor:
        return self.fn(*args, *self.weights)


def mlp(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """A residual block: saves its input, activations, and a view of each weight."""
    return x + torch.tanh(x @ a).sin() @ b


def mlp_layer() -> Layer:
    return Layer(mlp, (WIDTH, WIDTH), (WIDTH, WIDTH))


class Stack(nn.Module):
    """Layers in a row."""

    def __init__(self, layers: Iterable[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def mlp_stack(num_layers: int = 4) -> Stack:
    return Stack([mlp_layer() for _ in range(num_layers)])


def batch(seed: int = 1, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape or (WIDTH, WIDTH), generator=generator, requires_grad=True)


# --- running ------------------------------------------------------------------------------------------------------


class Storages(TorchDispatchMode):
    """Remembers every storage that is made while it is active, without keeping any alive."""

    def __init__(self) -> None:
        super().__init__()
        self._made: dict[int, StorageWeakRef] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(out):
            self._note(tensor)
        return out

    def _note(self, tensor: Any) -> None:
        if type(tensor) is Tensor and tensor.layout is torch.strided and tensor.untyped_storage().nbytes() > 0:
            storage = tensor.untyped_storage()
            self._made[storage._cdata] = StorageWeakRef(storage)

    def alive(self, besides: Iterable[Tensor] = ()) -> int:
        """How many of them are alive, those of `besides` not counted."""
        allowed = {tensor.untyped_storage()._cdata for tensor in besides if tensor.layout is torch.strided}
        return sum(not ref.expired() for key, ref in self._made.items() if key not in allowed)


def no_hook_is_pushed() -> bool:
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is None


def assert_nothing_left(offloader: Offloader) -> None:
    """Law 3: nothing is at rest, no section lives, no hook is pushed."""
    stats = offloader.stats()
    assert stats.host_bytes_in_use == 0, f"{stats.host_bytes_in_use} bytes are still at rest"
    assert stats.disk_bytes_in_use == 0, f"{stats.disk_bytes_in_use} bytes are still on disk"
    assert offloader.sections == []
    assert no_hook_is_pushed()


def _with_grads(model: nn.Module, returned: Sequence[Any]) -> list[Any]:
    grads = [None if p.grad is None else bits(p.grad) for p in model.parameters()]
    return [bits(value) for value in returned] + grads


Run = Callable[[Any], Sequence[Any]]
"""Runs one step of a model, and returns what must be equal besides the gradients of its parameters."""


def _one_step(model: nn.Module, run: Run, most_alive: int = 0) -> tuple[list[Any], int]:
    """The bits of one step, and how many storages it left alive besides the model's and its gradients.

    Copies that nobody waits for any more hold their memory until they are done: more than `most_alive` get some time.
    """
    torch.manual_seed(7)
    model.zero_grad(set_to_none=True)
    storages = Storages()
    with storages:
        returned = run(model)
    outcome = _with_grads(model, returned)
    del returned
    kept = [*model.parameters(), *model.buffers(), *(p.grad for p in model.parameters() if p.grad is not None)]
    wait_until(lambda: storages.alive(kept) <= most_alive)
    return outcome, storages.alive(kept)


def assert_same_bits(
    build: Callable[[], nn.Module],
    run: Run,
    *,
    steps: int = 3,
    moves: bool = True,
    tier: str = "disk",
    watch_storages: bool = True,
    **policy: Any,
) -> list[OffloadStats]:
    """Law 1: `run` gives the same bits with and without offload, bytes were moved, and nothing is left behind.

    `build` is called once, and the run without offload gets a copy; its `layers`, or else the model itself, are the
    sections. Each step is run anew, so that the later ones follow an order that was learned. The figures of the steps
    are returned.
    """
    torch.manual_seed(0)
    model = build()
    without = twin(model)
    plain = [_one_step(without, run, 1 << 30) for _ in range(steps)]
    options = {"min_bytes": 64, **AT_ONCE, **policy}
    all_stats = []
    before = gc.isenabled()
    gc.disable()  # what only the garbage collector would free counts as left behind
    try:
        with lighterage.offload(getattr(model, "layers", model), tier=tier, **options) as offloader:
            for step, (outcome, alive) in enumerate(plain):
                moved_outcome, moved_alive = _one_step(model, run, alive if watch_storages and step > 0 else 1 << 30)
                assert moved_outcome == outcome
                assert_nothing_left(offloader)
                if watch_storages and step > 0:  # the first one opens the arena
                    assert moved_alive <= alive, f"{moved_alive - alive} storages are still alive"
                all_stats.append(offloader.stats())
                assert (all_stats[-1].bytes_out > 0) == moves, f"{all_stats[-1].bytes_out} bytes were moved"
        assert offloader.stats().host_bytes_reserved == 0
    finally:
        if before:
            gc.enable()
    return all_stats


def train(*inputs: Tensor) -> Run:
    """One forward and backward on each input; its loss and the input's gradient."""

    def run(model: nn.Module) -> list[Tensor]:
        returned: list[Tensor] = []
        for given in inputs:
            x = given.detach().clone().requires_grad_()
            loss = model(x).square().sum()
            loss.backward()
            assert x.grad is not None
            returned += [loss.detach(), x.grad]
        return returned

    return run


@contextmanager
def offloaded(modules: Any, *, tier: str = "disk", **policy: Any) -> Iterator[Offloader]:
    """An offloader that moves almost everything at once, and leaves nothing behind at its end."""
    with lighterage.offload(modules, tier=tier, **{"min_bytes": 64, **AT_ONCE, **policy}) as offloader:
        yield offloader
        assert_nothing_left(offloader)


def weak(tensor: Tensor) -> StorageWeakRef:
    """Tells whether the memory of `tensor` is gone, without keeping it."""
    return StorageWeakRef(tensor.untyped_storage())


def wait_until(claim: Callable[[], bool], seconds: float = 5.0) -> bool:
    """Whether `claim` comes true in time: a copy that nobody waits for holds its memory until it is done."""
    deadline = time.monotonic() + seconds
    while not claim() and time.monotonic() < deadline:
        time.sleep(0.001)
    return claim()


def twin(model: nn.Module) -> nn.Module:
    """A copy of `model` of its own, without gradients."""
    other = copy.deepcopy(model)
    other.zero_grad(set_to_none=True)
    return other


def grads_of(model: nn.Module) -> list[Any]:
    return [None if p.grad is None else bits(p.grad) for p in model.parameters()]
