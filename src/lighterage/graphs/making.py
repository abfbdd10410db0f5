"""`make_graphed_callables`: warm up, capture, and put the replays in the place of modules and functions."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..errors import GraphError
from .recording import Recording
from .replaying import Graphed

if TYPE_CHECKING:
    from torch.cuda import _POOL_HANDLE as Pool

Hook = Callable[[], object]


def make_graphed_callables(
    modules: Any,
    sample_args: Any,
    *,
    num_warmup_iters: int = 3,
    pre_warmup_hook: Hook | None = None,
    post_warmup_hook: Hook | None = None,
    pool: Pool | None = None,
    allow_unused_input: bool = False,
) -> Any:
    """Replay the forward and the backward pass of modules or functions as CUDA graphs, one of each for each callable.

    Offload that is attached to the modules is captured with them: copies are part of the graphs, and host memory that
    they use belongs to them until they are destroyed. Each backward graph reads what its own forward graph wrote.

    Args:
        modules: an nn.Module, or a function of its arguments alone, or a tuple of them in the order in which they run.
            Modules are changed in place: their `forward` becomes a `Graphed`. Graphs that they had are destroyed first.
        sample_args: a tuple of positional arguments, tensors in any nesting; for a tuple of callables one such tuple
            for each. They are copied. Each argument must need a gradient or not as in use.
        num_warmup_iters: passes, forward and backward, before capture: kernels are compiled and chosen in them, and
            offload learns what moves. Random numbers are drawn and buffers (batch statistics) written as in any pass.
        pre_warmup_hook: called without arguments before the first warm-up pass of each callable.
        post_warmup_hook: called after the last one.
        pool: `torch.cuda.graph_pool_handle()`, or a graph's `pool()`, to share memory with. Graphs that share memory
            must run in the order of their capture, and never at once. Those of one call share it always. A backward
            whose saved bytes another one's replay has written over is refused.
        allow_unused_input: whether arguments and parameters may go unused; they get no gradient then.

    Returns: the modules themselves, and a `Graphed` for each function; in a tuple where a tuple was given. They take
        `cuda_graph_stream` and `cuda_graph_event`: see `Graphed.__call__`. Outputs are memory of the graph, which its
        next replay overwrites; so is what `torch.autograd.grad` gives, while `.grad` is a copy.

    Raises:
        GraphError: there is no CUDA device, or a pass does what no graph can hold. The callables then have none.
        TypeError, ValueError: the arguments do not fit; the message says which, and what to give.
    """
    single = not isinstance(modules, tuple)
    callables = (modules,) if single else modules
    samples = (sample_args,) if single else sample_args
    _check_options(num_warmup_iters, pre_warmup_hook, post_warmup_hook, pool, allow_unused_input)
    _check_arguments(callables, samples)
    if not torch.cuda.is_available():
        raise GraphError("make_graphed_callables needs a CUDA device, and there is none. Call the modules as they are.")
    if torch.is_autocast_enabled("cuda") and torch.is_autocast_cache_enabled():
        raise GraphError(
            "autocast keeps casts of weights from one call to the next, which no replay would renew. Enter autocast "
            "with cache_enabled=False around make_graphed_callables."
        )
    if torch.cuda.is_current_stream_capturing():
        raise GraphError(
            "make_graphed_callables was called inside a graph's capture, which would break it. Call it before, or let "
            "the graph under capture hold the modules as they are."
        )
    for one in callables:
        earlier = _graphed(one)
        if earlier is not None:
            earlier.reset()
    recordings = [_prepare(one, args) for one, args in zip(callables, samples, strict=True)]
    if len(devices := {recording.device for recording in recordings}) > 1:
        raise ValueError(
            f"the callables are on {' and '.join(sorted(map(str, devices)))}; those of one call share memory of one "
            "device. Call make_graphed_callables for each device."
        )
    chosen_pool: Pool = torch.cuda.graph_pool_handle() if pool is None else pool
    device = recordings[0].device
    stream = torch.cuda.Stream(device)
    with torch.cuda.device(device), torch.enable_grad():
        _warm_up(recordings, stream, num_warmup_iters, pre_warmup_hook, post_warmup_hook, allow_unused_input)
        # In the order in which they run, since they share memory.
        for recording in recordings:
            recording.capture_forward(chosen_pool, stream)
        for recording in reversed(recordings):
            recording.capture_backward(chosen_pool, stream, allow_unused_input)
        for recording in recordings:
            recording.note_parts()  # forward may have replaced buffers
        torch.cuda.synchronize()
    made = tuple(_install(one, recording) for one, recording in zip(callables, recordings, strict=True))
    return made[0] if single else made


def _check_options(
    num_warmup_iters: object, pre: Hook | None, post: Hook | None, pool: object, allow_unused_input: object
) -> None:
    if isinstance(num_warmup_iters, bool) or not isinstance(num_warmup_iters, int) or num_warmup_iters < 0:
        raise ValueError(f"num_warmup_iters is a whole number from 0 up; got {num_warmup_iters!r}.")
    for name, hook in (("pre_warmup_hook", pre), ("post_warmup_hook", post)):
        if hook is not None and not callable(hook):
            raise TypeError(f"{name} is called without arguments, or None; got {hook!r}.")
    if pool is not None and not (isinstance(pool, tuple) and len(pool) == 2):
        raise TypeError(f"pool is torch.cuda.graph_pool_handle(), or the pool() of a graph; got {pool!r}.")
    if not isinstance(allow_unused_input, bool):
        raise TypeError(f"allow_unused_input is True or False; got {allow_unused_input!r}.")


def _check_arguments(callables: tuple[Any, ...], samples: Any) -> None:
    if not callables or not isinstance(samples, tuple) or len(samples) != len(callables):
        raise ValueError(
            f"sample_args has one tuple of arguments for each of {len(callables)} callables; got "
            f"{len(samples) if isinstance(samples, tuple) else f'a {type(samples).__name__}'}. For a single callable "
            "pass its tuple itself."
        )
    seen: set[int] = set()
    for one, args in zip(callables, samples, strict=True):
        if isinstance(one, nn.Module) and id(one) in seen:
            raise ValueError(
                f"the same {_name(one)} stands twice among the callables, and has one forward to replace. Wrap it in "
                "an nn.Sequential of its own for each; microbatches in flight at once need a call each."
            )
        seen.add(id(one))
        if not callable(one):
            raise TypeError(f"a module or a function can be graphed, or a tuple of them; got {one!r}.")
        if not isinstance(args, tuple):
            raise TypeError(
                f"sample_args of {_name(one)} is a tuple of positional arguments; got a {type(args).__name__}. Write "
                "(x,) for one."
            )
        for leaf in pytree.tree_leaves(args):
            if not isinstance(leaf, Tensor):
                raise TypeError(
                    f"sample_args of {_name(one)} holds a {type(leaf).__name__}; only tensors can change from one "
                    "replay to the next. Bind the rest with functools.partial or in the module."
                )
        if isinstance(one, nn.Module):
            _check_module(one)


def _check_module(module: nn.Module) -> None:
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    if any(getattr(module, name) for name in hooks):
        raise ValueError(
            f"{_name(module)} has module hooks, which would run both inside the graph and around it. Register them "
            "after make_graphed_callables."
        )
    for name, parameter in module.named_parameters():
        if parameter._backward_hooks:
            raise ValueError(
                f"parameter {name} of {_name(module)} has a hook, which would run both inside the graph and on what it "
                "gives: a gradient that it scales would be scaled twice. Register it after make_graphed_callables, or "
                "with register_post_accumulate_grad_hook."
            )
    for name, part in module.named_modules():
        if part is not module and _graphed(part) is not None:
            raise ValueError(
                f"{name} of {_name(module)} has graphs of its own, and a graph cannot hold another's replay. Call "
                f"{name}.forward.reset() first, or leave {_name(module)} as it is."
            )
    for name, buffer in module.named_buffers():
        if buffer.requires_grad:
            raise ValueError(
                f"buffer {name} of {_name(module)} needs a gradient, and only parameters and arguments get one. Make "
                "it a parameter."
            )


def _name(one: Any) -> str:
    return type(one).__name__ if isinstance(one, nn.Module) else getattr(one, "__qualname__", repr(one))


def _graphed(one: Any) -> Graphed | None:
    """The graphs that a callable already has."""
    found = one.__dict__.get("forward") if isinstance(one, nn.Module) else one
    return found if isinstance(found, Graphed) else None


def _prepare(one: Any, args: tuple[Any, ...]) -> Recording:
    leaves, spec = pytree.tree_flatten(args)
    module = one if isinstance(one, nn.Module) else None
    parameters = () if module is None else tuple(module.parameters())
    for tensor in (*leaves, *parameters):
        if not tensor.is_cuda:
            raise ValueError(
                f"{_name(one)} uses a tensor {tuple(tensor.shape)} {tensor.dtype} on {tensor.device}; a graph reads "
                "and writes memory of a CUDA device. Move it there."
            )
    if len(devices := {tensor.device for tensor in (*leaves, *parameters)}) > 1:
        raise ValueError(
            f"{_name(one)} uses tensors on {' and '.join(sorted(map(str, devices)))}; a graph is captured on a stream "
            "of one device. Graph what is on each device by itself."
        )
    if not leaves and not parameters:
        raise ValueError(f"{_name(one)} has neither arguments nor parameters, so nothing could change between replays.")
    return Recording(
        name=_name(one),
        function=one.eager if isinstance(one, Graphed) else one,
        arguments=[leaf.detach().clone().requires_grad_(leaf.requires_grad) for leaf in leaves],
        arguments_spec=spec,
        parameters=parameters,
        module=module,
        training=None if module is None else module.training,
    )


def _warm_up(
    recordings: list[Recording],
    stream: torch.cuda.Stream,
    num_passes: int,
    before: Hook | None,
    after: Hook | None,
    allow_unused: bool,
) -> None:
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for recording in recordings if num_passes else ():
            if before is not None:
                before()
            for _ in range(num_passes):
                outputs = recording.run()
                if recording.differentiable(outputs):
                    grads = tuple(torch.ones_like(y) if y.requires_grad else None for y in outputs)
                    recording.gradients(outputs, grads, allow_unused)
                del outputs
            if after is not None:
                after()
    torch.cuda.synchronize()


def _install(one: Any, recording: Recording) -> Any:
    if not isinstance(one, nn.Module):
        return Graphed(recording, recording.function, None)
    one.forward = Graphed(recording, one.forward, one)
    return one
