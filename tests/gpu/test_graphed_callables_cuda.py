"""`make_graphed_callables` on a device: streams and events, new data, pools, turns, and errors."""

from __future__ import annotations

import contextlib
import copy
import gc
import types
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lighterage
from lighterage import GraphError, make_graphed_callables
from lighterage.graphs import Graphed, replaying
from tests.gpu.graph_models import FORBIDDEN, LONG, WIDTH, Block, assert_equal, batch, eventually, make, step

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    yield
    torch.cuda.synchronize()
    gc.collect()


class Late(torch.autograd.Function):
    """Twice its input, some 50 ms late, in forward and in backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        torch.cuda._sleep(LONG)
        return x * 2

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        torch.cuda._sleep(LONG)
        return grad * 2


def late(x: Tensor) -> Tensor:
    return Late.apply(x)


def ones(value: float = 1.0) -> Tensor:
    return torch.full((1 << 16,), value, device="cuda", requires_grad=True)


# --- the contract of stream and event -----------------------------------------------------------------------------


def read_forward(function: Graphed, **where: Any) -> tuple[Tensor, Tensor]:
    """What the main stream reads at once after a replay with 2, after one with 1; and what it should read."""
    function(ones(1.0), **where)
    torch.cuda.synchronize()
    seen = function(ones(2.0), **where).detach().clone()
    torch.cuda.synchronize()
    return seen, torch.full_like(seen, 4.0)


def read_backward(function: Graphed, **where: Any) -> tuple[Tensor, Tensor]:
    for value in (1.0, 2.0):
        x = ones(1.0)
        y = function(x, **where)
        torch.cuda.synchronize()
        (grad,) = torch.autograd.grad(y, x, torch.full_like(y, value))
        seen = grad.clone()
        torch.cuda.synchronize()
    return seen, torch.full_like(seen, 4.0)


def read_late_input(function: Graphed, **where: Any) -> tuple[Tensor, Tensor]:
    """The input is filled by a long kernel of the main stream just before."""
    x = ones(1.0)
    torch.cuda.synchronize()
    torch.cuda._sleep(LONG)
    x.data.fill_(2.0)
    seen = function(x, **where).detach().clone()
    torch.cuda.synchronize()
    return seen, torch.full_like(seen, 4.0)


def _nothing(*_: object) -> None:
    pass


def _waits_for_no_replay(stream: torch.cuda.Stream, other: torch.cuda.Stream) -> None:
    if stream != torch.cuda.default_stream():
        stream.wait_stream(other)


def _waits_for_no_caller(stream: torch.cuda.Stream, other: torch.cuda.Stream) -> None:
    if stream == torch.cuda.default_stream():
        stream.wait_stream(other)


CASES = [
    pytest.param(read_forward, False, ("follow", _waits_for_no_replay), id="forward, no event"),
    pytest.param(read_forward, True, ("record", _nothing), id="forward, event"),
    pytest.param(read_forward, True, ("await_event", _nothing), id="forward, event not waited for"),
    pytest.param(read_backward, False, ("follow", _waits_for_no_replay), id="backward, no event"),
    pytest.param(read_backward, True, ("record", _nothing), id="backward, event"),
    pytest.param(read_backward, True, ("await_event", _nothing), id="backward, event not waited for"),
    pytest.param(read_late_input, True, ("follow", _waits_for_no_caller), id="input of the caller's stream"),
]


@pytest.mark.parametrize(("read", "with_event", "step_left_out"), CASES)
@pytest.mark.parametrize("broken", [False, True], ids=["", "broken"])
def test_no_reader_sees_a_half_written_output(
    read: Callable[..., tuple[Tensor, Tensor]],
    with_event: bool,
    step_left_out: tuple[str, Callable[..., None]],
    broken: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A long kernel on the side stream, read at once on the main one. Broken: without that step the race is seen."""
    function = make_graphed_callables(late, (ones(),))
    where: dict[str, Any] = {"cuda_graph_stream": torch.cuda.Stream()}
    if with_event:
        where["cuda_graph_event"] = torch.cuda.Event()
    if broken:
        monkeypatch.setattr(replaying, *step_left_out)
    seen, wanted = read(function, **where)
    assert torch.equal(seen, wanted) != broken


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("side", [False, True])
def test_a_graph_of_another_device_than_the_current_one_has_its_own_device_s_streams(side: bool) -> None:
    device = torch.device("cuda", 1)
    function = make_graphed_callables(late, (ones().detach().to(device).requires_grad_(),))
    with torch.cuda.device(device):
        stream = torch.cuda.Stream()
    where: dict[str, Any] = {"cuda_graph_stream": stream, "cuda_graph_event": torch.cuda.Event()} if side else {}
    for value in (1.0, 2.0):
        x = torch.ones(1 << 16, device=device, requires_grad=True)
        torch.cuda.synchronize(device)
        with torch.cuda.device(device):
            torch.cuda._sleep(LONG)
        x.data.fill_(value)  # late, on the stream that is current on its device
        y = function(x, **where)
        seen = y.detach().clone()
        (grad,) = torch.autograd.grad(y, x, torch.full_like(y, value))
        back = grad.clone()
        assert torch.cuda.current_device() == 0
        torch.cuda.synchronize(device)
        assert torch.equal(seen, torch.full_like(seen, 2 * value))
        assert torch.equal(back, torch.full_like(back, 2 * value))


def test_the_event_tells_other_streams_too() -> None:
    function = make_graphed_callables(late, (ones(),))
    side, third, event = torch.cuda.Stream(), torch.cuda.Stream(), torch.cuda.Event()
    function(ones(1.0))
    torch.cuda.synchronize()
    y = function(ones(3.0), cuda_graph_stream=side, cuda_graph_event=event)
    third.wait_event(event)
    with torch.cuda.stream(third):
        seen = y.detach().clone()
    torch.cuda.synchronize()
    assert torch.equal(seen, torch.full_like(seen, 6.0))


def test_an_event_is_recorded_where_no_graph_is_replayed() -> None:
    function = make_graphed_callables(late, (ones(),))
    event, third = torch.cuda.Event(), torch.cuda.Stream()
    with torch.no_grad():
        y = function(ones(3.0), cuda_graph_event=event)
    third.wait_event(event)
    with torch.cuda.stream(third):
        seen = y.clone()
    torch.cuda.synchronize()
    assert torch.equal(seen, torch.full_like(seen, 6.0))


def test_an_external_event_recorded_inside_releases_early() -> None:
    event, side = torch.cuda.Event(external=True), torch.cuda.Stream()

    def two(x: Tensor) -> tuple[Tensor, Tensor]:
        torch.cuda._sleep(LONG)
        first = x * 2
        event.record()
        torch.cuda._sleep(4 * LONG)
        return first, x * 3

    with torch.no_grad():
        function = make_graphed_callables(two, (torch.ones(1 << 16, device="cuda"),))
        function(torch.full((1 << 16,), 1.0, device="cuda"), cuda_graph_stream=side, cuda_graph_event=event)
        torch.cuda.synchronize()
        first, second = function(
            torch.full((1 << 16,), 2.0, device="cuda"), cuda_graph_stream=side, cuda_graph_event=event
        )
        seen = first.clone()
        through = torch.cuda.current_stream().record_event()
        through.synchronize()
        assert not side.query(), "the main stream waited for the whole replay"
        assert torch.equal(seen, torch.full_like(seen, 4.0))
        torch.cuda.synchronize()
        assert torch.equal(second, torch.full_like(second, 6.0))


def test_a_replay_waits_for_one_that_released_early_on_another_stream() -> None:
    """The input of the second one is copied to where the first one still reads."""
    event, side = torch.cuda.Event(external=True), torch.cuda.Stream()

    def two(x: Tensor) -> tuple[Tensor, Tensor]:
        first = x * 2
        event.record()
        torch.cuda._sleep(LONG)
        return first, x * 3

    function = make_graphed_callables(two, (torch.ones(1 << 16, device="cuda"),))
    inputs = [torch.full((1 << 16,), value, device="cuda") for value in (1.0, 2.0)]
    torch.cuda.synchronize()
    _, second = function(inputs[0], cuda_graph_stream=side, cuda_graph_event=event)
    with torch.cuda.stream(side):
        seen = second.clone()
    _, second = function(inputs[1])
    torch.cuda.synchronize()
    assert torch.equal(seen, torch.full_like(seen, 3.0)) and torch.equal(second, torch.full_like(second, 6.0))


def test_an_event_recorded_in_forward_alone_is_recorded_after_backward() -> None:
    event, side = torch.cuda.Event(external=True), torch.cuda.Stream()

    def function(x: Tensor) -> Tensor:
        y = late(x)
        event.record()
        return y

    graphed = make_graphed_callables(function, (ones(),))
    seen, wanted = read_backward(graphed, cuda_graph_stream=side, cuda_graph_event=event)
    assert torch.equal(seen, wanted)


# --- as a drop-in -------------------------------------------------------------------------------------------------


def test_a_tuple_of_modules_takes_new_data_each_time() -> None:
    blocks = nn.ModuleList(Block() for _ in range(3)).cuda()
    twins = copy.deepcopy(blocks)
    made = make_graphed_callables(tuple(blocks), tuple((batch().requires_grad_(),) for _ in blocks))
    assert made == tuple(blocks)

    def run(layers: nn.ModuleList, seed: int) -> list[Tensor]:
        for p in layers.parameters():
            p.grad = None
        x = batch(seed).requires_grad_()
        y: Tensor = x
        for layer in layers:
            y = layer(y)
        y.pow(2).mean().backward()
        assert x.grad is not None
        return [y.detach().clone(), x.grad, *(p.grad for p in layers.parameters() if p.grad is not None)]

    for seed in range(4):
        assert_equal(run(blocks, seed), run(twins, seed))


def test_gradients_add_up_over_replays_and_the_optimizer_s_steps_are_seen() -> None:
    model = make(2)
    twin = copy.deepcopy(model)
    make_graphed_callables(model, (batch(),))
    for one in (model, twin):
        optimizer = torch.optim.SGD(one.parameters(), lr=0.1)
        for round_ in range(3):
            for seed in range(2):
                one(batch(10 * round_ + seed)).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=round_ == 1)
        one(batch(99)).backward()
    assert_equal([p.grad for p in model.parameters()], [p.grad for p in twin.parameters()])


def test_hooks_frame_the_warm_up_of_each_callable() -> None:
    seen: list[str] = []

    def watched(name: str) -> Callable[[Tensor], Tensor]:
        def function(x: Tensor) -> Tensor:
            seen.append(f"{name}{'!' if torch.cuda.is_current_stream_capturing() else ''}")
            return x * 2

        return function

    make_graphed_callables(
        (watched("a"), watched("b")),
        ((ones(),), (ones(),)),
        num_warmup_iters=2,
        pre_warmup_hook=lambda: seen.append("before"),
        post_warmup_hook=lambda: seen.append("after"),
    )
    assert seen == ["before", "a", "a", "after", "before", "b", "b", "after", "a!", "b!"]


def test_arguments_and_results_may_be_nested() -> None:
    def function(pair: tuple[Tensor, dict[str, Tensor]], z: Tensor) -> dict[str, Any]:
        x, rest = pair
        return {"sum": x + rest["y"], "all": [x * z, z.argmax()]}

    def arguments(seed: int) -> tuple[Any, ...]:
        x, y, z = (batch(3 * seed + i, 8).requires_grad_(i == 0) for i in range(3))
        return ((x, {"y": y}), z)

    graphed = make_graphed_callables(function, arguments(0))
    for seed in range(3):
        args = arguments(seed)
        got, wanted = graphed(*args), function(*args)
        assert torch.equal(got["sum"], wanted["sum"]) and torch.equal(got["all"][0], wanted["all"][0])
        assert torch.equal(got["all"][1], wanted["all"][1]) and not got["all"][1].requires_grad
        (grad,) = torch.autograd.grad(got["sum"].sum() + got["all"][0].sum(), args[0][0])
        assert torch.equal(grad, torch.autograd.grad(wanted["sum"].sum() + wanted["all"][0].sum(), args[0][0])[0])


def test_dropout_draws_what_eager_draws() -> None:
    layer = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Dropout(0.5)).cuda()
    twin = copy.deepcopy(layer)
    make_graphed_callables(layer, (batch(),))
    for seed in range(3):
        torch.manual_seed(seed)
        got = layer(batch(seed))
        got = [got.detach().clone(), *torch.autograd.grad(got.sum(), list(layer.parameters()))]
        torch.manual_seed(seed)
        wanted = twin(batch(seed))
        assert_equal(got, [wanted.detach(), *torch.autograd.grad(wanted.sum(), list(twin.parameters()))])


def test_unused_inputs_are_an_error_unless_allowed() -> None:
    def function(x: Tensor, y: Tensor) -> Tensor:
        return x * 2

    with pytest.raises(RuntimeError, match="not have been used"):
        make_graphed_callables(function, (ones(), ones()))
    graphed = make_graphed_callables(function, (ones(), ones()), allow_unused_input=True)
    x, y = ones(), ones()
    graphed(x, y).sum().backward()
    assert x.grad is not None and y.grad is None


def test_a_parameter_that_a_function_closes_over_is_refused() -> None:
    layer = nn.Linear(WIDTH, 4).cuda()
    with pytest.raises(ValueError, match=r"uses a tensor \(4,.*make an nn.Module"):
        make_graphed_callables(lambda x: layer(x).relu(), (batch().requires_grad_(),))
    layer.requires_grad_(False)
    make_graphed_callables(lambda x: layer(x).relu(), (batch().requires_grad_(),))


def test_eval_and_no_grad_run_without_graphs() -> None:
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Dropout(0.9)).cuda()
    make_graphed_callables(model, (batch(),))
    y = model(batch(1))
    with torch.no_grad():  # does not overwrite what the forward above saved
        model(batch(2))
    model.eval()
    assert torch.equal(model(batch(3)), model[0](batch(3)))
    model.train()
    y.sum().backward()


# --- turns --------------------------------------------------------------------------------------------------------


def test_a_second_forward_before_its_backward_is_refused() -> None:
    model = make(2)
    make_graphed_callables(model, (batch(),))
    first = model(batch(1))
    with pytest.raises(GraphError, match="its backward is still to come"):
        model(batch(2))
    first.backward()
    second = model(batch(2))
    del second  # nobody can run its backward any more
    model(batch(3)).backward()


def test_a_second_backward_is_refused() -> None:
    model = make(2)
    make_graphed_callables(model, (batch(),))
    loss = model(batch(1))
    loss.backward(retain_graph=True)
    with pytest.raises(GraphError, match="for the second time"):
        loss.backward(retain_graph=True)
    again = model(batch(2))
    with pytest.raises(GraphError, match="for the second time"):
        loss.backward()
    again.backward()


def test_an_output_that_backward_reads_may_not_be_written_to_and_any_other_may() -> None:
    """As without graphs: a sigmoid saves what it returns, a product with a number does not."""
    saving = make_graphed_callables(lambda x: x.sigmoid(), (ones(),))
    y = saving(ones(2.0))
    z = y.sum()
    y.detach().add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        z.backward()
    del y, z
    saving(ones(3.0)).sum().backward()
    other = make_graphed_callables(lambda x: (x * 2).view(256, -1), (ones(),))
    for _ in range(2):
        x = ones(2.0)
        y = other(x)
        y += 1
        y.sum().backward()
        assert x.grad is not None and torch.equal(x.grad, torch.full_like(x, 2))


@pytest.mark.parametrize("keep_last", [0, 1])
def test_the_same_with_offload(keep_last: int) -> None:
    """What was copied out is not changed by who writes to the output, and what stays is looked after."""
    layers = nn.Sequential(*(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Sigmoid()) for _ in range(3))).cuda()
    twin = copy.deepcopy(layers)
    with lighterage.offload(layers, keep_last=keep_last, release_after=0):
        make_graphed_callables(layers, (batch(),))
        y = layers(batch(1))
        z = y.sum()
        y.detach().zero_()
        grads: list[Tensor | None] = []
        with contextlib.suppress(GraphError):
            z.backward()
            grads = [p.grad for p in layers.parameters()]
        if grads:
            twin(batch(1)).sum().backward()
            assert_equal(grads, [p.grad for p in twin.parameters()])
        layers.forward.reset()


def test_a_moved_parameter_is_refused() -> None:
    model = make(1)
    make_graphed_callables(model, (batch(),))
    model.layers[0].up.weight.data = model.layers[0].up.weight.data.clone()
    with pytest.raises(GraphError, match="is not where it was"):
        model(batch(1))


class Averaging(nn.Module):
    """Keeps a running mean of what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH)
        self.register_buffer("mean", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.mean.mul_(0.5).add_(x.mean())
        return self.layer(x) * self.mean


def test_parts_that_were_replaced_are_refused() -> None:
    """The graph would go on with the old ones, in memory that may be somebody else's by now."""
    model = Averaging().cuda()
    make_graphed_callables(model, (batch(),))
    twin = Averaging().cuda()
    twin.load_state_dict(model.state_dict())
    for seed in (1, 2):
        model(batch(seed))
        twin(batch(seed))
        assert_equal(list(model.buffers()), list(twin.buffers()))
    model.mean = torch.zeros_like(model.mean)
    with pytest.raises(GraphError, match="the buffer 'mean' of Averaging"):
        model(batch(1))
    make_graphed_callables(model, (batch(),))
    model.load_state_dict(twin.state_dict(), assign=True)
    with pytest.raises(GraphError, match=r"of Averaging.*is not where it was"):
        model(batch(1))


def test_a_forward_that_somebody_patched_is_captured_again_and_put_back() -> None:
    model = nn.Linear(WIDTH, WIDTH).cuda()
    model.forward = types.MethodType(lambda self, x: nn.functional.linear(x, self.weight, self.bias) + 1, model)
    x = batch(1)
    wanted = model(x).detach()
    for _ in range(2):
        make_graphed_callables(model, (batch(),))
        assert torch.equal(model(x), wanted)
    model.forward.reset()
    assert torch.equal(model(x), wanted)


def test_none_is_returned_as_it_is() -> None:
    function = make_graphed_callables(lambda x: (x * 2, None), (ones(),))
    x = ones(3.0)
    y, nothing = function(x)
    assert nothing is None and torch.equal(y, x * 2)
    y.sum().backward()
    assert x.grad is not None and torch.equal(x.grad, torch.full_like(x, 2))


def test_a_backward_whose_bytes_another_graph_has_written_over_is_refused() -> None:
    """Graphs of one call have their memory from one pool."""
    first, second = models = [make(2), make(3)]
    twins = copy.deepcopy(models)
    make_graphed_callables((first, second), ((batch(),), (batch(),)))
    losses = [model(batch(1)) for model in models]
    losses[0].backward()
    with pytest.raises(GraphError, match="shares memory with it"):
        losses[1].backward()
    for model in models:
        model.zero_grad(set_to_none=True)
    losses = [model(batch(2)) for model in models]
    for loss in reversed(losses):
        loss.backward()
    for model, twin in zip(models, twins, strict=True):
        twin(batch(2)).backward()
        assert_equal([p.grad for p in model.parameters()], [p.grad for p in twin.parameters()])


@pytest.mark.parametrize("offload", [False, True])
def test_microbatches_in_flight_have_graphs_of_their_own(offload: bool) -> None:
    """One forward, one backward, with two in flight: the one that began first goes back first."""
    model = make(3)
    twin = copy.deepcopy(model)
    offloader = lighterage.offload(model.layers, keep_last=1) if offload else None
    slots = [nn.Sequential(model) for _ in range(2)]
    for slot in slots:
        make_graphed_callables(slot, (batch(),))
    model.zero_grad(set_to_none=True)
    waiting: list[Tensor] = []
    for number in range(6):
        waiting.append(slots[number % 2](batch(number)))
        if len(waiting) == 2:
            waiting.pop(0).backward()
    waiting.pop().backward()
    for number in range(6):
        twin(batch(number)).backward()
    assert_equal([p.grad for p in model.parameters()], [p.grad for p in twin.parameters()])
    if offloader is not None:
        assert offloader.stats(total=True).bytes_in > 0
        offloader.close()


def test_inside_a_capture_nothing_is_captured() -> None:
    layer = nn.Linear(WIDTH, 4).cuda()
    x = batch()
    layer(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = layer(x)
        with pytest.raises(GraphError, match="inside a graph's capture"):
            make_graphed_callables(layer, (x,))
    graph.replay()
    assert torch.equal(y, layer(x))


def test_other_arguments_are_refused() -> None:
    model = nn.Linear(WIDTH, 4).cuda()
    make_graphed_callables(model, (batch(),))
    with pytest.raises(
        ValueError, match=r"captured with a tensor \(2048, 512\) float32 on cuda:0, and got \(2047, 512\)"
    ):
        model(batch(rows=2047))
    with pytest.raises(ValueError, match="would get none"):
        model(batch().requires_grad_())
    with pytest.raises(TypeError, match="in the same places"):
        model(batch(), batch())
    layer = nn.Linear(4, 4).cuda()
    layer.register_buffer("b", torch.ones(1, device="cuda", requires_grad=True))
    with pytest.raises(ValueError, match="needs a gradient, and only"):
        make_graphed_callables(layer, (batch(),))
    with pytest.raises(ValueError, match="Move it there"):
        make_graphed_callables(nn.Linear(4, 4), (batch(),))
    with torch.autocast("cuda"), pytest.raises(GraphError, match="cache_enabled=False"):
        make_graphed_callables(nn.Linear(WIDTH, 4).cuda(), (batch(),))


# --- pools, and the lives of graphs -------------------------------------------------------------------------------


def test_two_callables_share_a_pool() -> None:
    models = [make(3), make(2)]
    twins = copy.deepcopy(models)
    pool = torch.cuda.graph_pool_handle()
    with lighterage.offload(models[0].layers, keep_last=0), lighterage.offload(models[1].layers, keep_last=0):
        for model in models:
            make_graphed_callables(model, (batch(),), pool=pool)
        for seed in range(3):
            for model, twin in zip(models, twins, strict=True):
                assert_equal(step(model, batch(seed)), step(twin, batch(seed)))


def test_destroyed_graphs_give_their_memory_back_and_are_captured_again() -> None:
    model = make()
    twin = copy.deepcopy(model)
    with lighterage.offload(model.layers, keep_last=1) as offloader:
        make_graphed_callables(model, (batch(),))
        assert_equal(step(model, batch(1)), step(twin, batch(1)))
        model.zero_grad(set_to_none=True)
        twin.zero_grad(set_to_none=True)
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        before = torch.cuda.memory_reserved()
        model.forward.reset()
        assert "forward" not in model.__dict__
        gc.collect()
        torch.cuda.empty_cache()
        assert torch.cuda.memory_reserved() < before
        assert eventually(lambda: offloader.stats().host_bytes_in_use == 0)
        assert_equal(step(model, batch(2)), step(twin, batch(2)))
        for rows in (1024, 2048):  # the second time its earlier graphs are destroyed first
            make_graphed_callables(model, (batch(rows=rows),))
            assert_equal(step(model, batch(3, rows)), step(twin, batch(3, rows)))
        model.forward.reset()


def test_a_backward_that_comes_after_reset_is_an_error() -> None:
    model = make(1)
    make_graphed_callables(model, (batch(),))
    loss = model(batch(1))
    model.forward.reset()
    with pytest.raises(GraphError, match="was reset"):
        loss.backward()


def test_a_copy_of_a_graphed_module_runs_without_graphs() -> None:
    model = make(1)
    make_graphed_callables(model, (batch(),))
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.layers[0].up.weight.zero_()
    assert not torch.equal(other(batch(1)), model(batch(1)))
    with pytest.raises(TypeError, match="cannot be pickled"):
        model.forward.__reduce_ex__(2)


@pytest.mark.parametrize("when", ["forward", "backward"])
@pytest.mark.parametrize("how", ["python", FORBIDDEN])
def test_an_error_inside_capture_leaves_all_usable(when: str, how: str) -> None:
    failing = [True]

    class Fail(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            fail("forward")
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            fail("backward")
            return grad.clone()

    def fail(here: str) -> None:
        if failing[0] and here == when and torch.cuda.is_current_stream_capturing():
            if how == "python":
                raise KeyError("stop")
            torch.cuda.current_stream().synchronize()

    class Failing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = make(3)

        def forward(self, x: Tensor) -> Tensor:
            return Fail.apply(self.model(x))

    model = Failing()
    twin = copy.deepcopy(model.model)
    with lighterage.offload(model.model.layers, keep_last=0) as offloader:
        stream = torch.cuda.current_stream()
        with pytest.raises((KeyError, RuntimeError)):
            make_graphed_callables(model, (batch(),))
        assert torch.cuda.current_stream() == stream and gc.isenabled()
        assert "forward" not in model.__dict__
        torch.cuda.synchronize()
        gc.collect()
        assert eventually(lambda: offloader.stats().host_bytes_in_use == 0)
        assert_equal(step(model, batch(1)), step(twin, batch(1)))
        # The allocator is out of the capture too: memory that two streams share is given out again.
        side = torch.cuda.Stream()
        addresses = set()
        for _ in range(6):
            shared = torch.empty(64 << 20, dtype=torch.uint8, device="cuda")
            shared.record_stream(side)
            addresses.add(shared.data_ptr())
            del shared
            torch.cuda.synchronize()
        assert len(addresses) < 6
        failing[0] = False
        make_graphed_callables(model, (batch(),))
        assert_equal(step(model, batch(2)), step(twin, batch(2)))
        model.forward.reset()
