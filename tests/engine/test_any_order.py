"""Laws 2 and 3: any saved tensor may be asked for at any time and in any order, and nothing is left behind."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lighterage
from lighterage import OffloadError, Policy
from lighterage.engine.allocation import Allocation
from lighterage.engine.cpu import CpuTransport
from lighterage.engine.offloader import Offloader
from tests.engine.programs import (
    PLANS,
    WIDTH,
    Layer,
    Save,
    Stack,
    assert_nothing_left,
    assert_same_bits,
    batch,
    bits,
    both_tiers,
    every_plan,
    grads_of,
    mlp,
    mlp_layer,
    mlp_stack,
    no_hook_is_pushed,
    offloaded,
    train,
    twin,
    wait_until,
    weak,
)

# --- orders of backward -------------------------------------------------------------------------------------------


def _microbatches(*order: str) -> Callable[[Any], list[Tensor]]:
    """`F1 F2 B1 B2` and the like."""

    def run(model: nn.Module) -> list[Tensor]:
        inputs: dict[str, Tensor] = {}
        losses: dict[str, Tensor] = {}
        returned: list[Tensor] = []
        for what, which in order:
            if what == "F":
                inputs[which] = batch(int(which))
                losses[which] = model(inputs[which]).square().mean()
            else:
                losses[which].backward()
                returned += [losses.pop(which).detach(), inputs.pop(which).grad]
        return returned

    return run


def _retain_graph(model: nn.Module) -> list[Tensor]:
    x = batch()
    loss = model(x).square().sum()
    loss.backward(retain_graph=True)
    once = x.grad.clone()
    loss.backward(retain_graph=True)
    loss.backward()
    return [loss.detach(), once, x.grad]


def _retain_graph_between_forwards(model: nn.Module) -> list[Tensor]:
    x, y = batch(1), batch(2)
    first = model(x).square().sum()
    first.backward(retain_graph=True)
    second = model(y).cos().sum()
    first.backward()
    second.backward()
    return [x.grad, y.grad]


def _double_backward(model: nn.Module) -> list[Tensor]:
    x = batch()
    loss = model(x).sin().sum()
    (grad,) = torch.autograd.grad(loss, x, create_graph=True)
    grad.square().sum().backward()
    return [loss.detach(), grad.detach(), x.grad]


def _hessian_vector_products(model: nn.Module) -> list[Tensor]:
    x = batch()
    (grad,) = torch.autograd.grad(model(x).sin().sum(), x, create_graph=True)
    products = [torch.autograd.grad((grad * v).sum(), x, retain_graph=True)[0] for v in (batch(2), batch(3))]
    return [grad.detach(), *products]


def _grad_on_parts(model: Any) -> list[Tensor]:
    x = batch()
    outs = [x]
    for layer in model.layers:
        outs.append(layer(outs[-1]))
    parts = [
        torch.autograd.grad(outs[2].sum(), outs[1], retain_graph=True),
        torch.autograd.grad(outs[4].sum(), outs[2], retain_graph=True),
        torch.autograd.grad(outs[1].sum(), list(model.layers[0].parameters()), retain_graph=True),
        torch.autograd.grad(outs[3].sum(), x, retain_graph=True),
    ]
    outs[-1].square().sum().backward()
    return [x.grad, *(grad for part in parts for grad in part)]


def _forward_order_backward(model: Any) -> list[Tensor]:
    """Backward visits the first section first: each section's input is cut off from the one before."""
    x = batch()
    pairs = []
    for layer in model.layers:
        x = x.detach().requires_grad_()
        pairs.append((x, layer(x)))
        x = pairs[-1][1]
    for _, out in pairs:
        out.square().sum().backward()
    return [given.grad for given, _ in pairs]


def _input_gradients_before_weight_gradients(model: Any) -> list[Tensor]:
    """As zero-bubble schedules do: backward of the inputs for all, then of the weights."""
    xs = [batch(1), batch(2)]
    losses = [model(x).square().sum() for x in xs]
    weights = list(model.parameters())
    inputs = [torch.autograd.grad(loss, x, retain_graph=True)[0] for loss, x in zip(losses, xs, strict=True)]
    returned = [grad for loss in losses for grad in torch.autograd.grad(loss, weights)]
    return [*inputs, *returned]


def _cross_section_use(model: Any) -> list[Tensor]:
    """What one section saved is used by others, and by code outside all of them."""
    x = batch()
    a = model.layers[0](x)
    b = model.layers[1](a) * a
    c = model.layers[2](b + a) * a
    d = (model.layers[3](c * b) * a).exp().tanh()
    loss = (d * a * c).sum()
    loss.backward()
    return [loss.detach(), x.grad]


def _layer_drop(model: Any) -> list[Tensor]:
    returned = []
    for seed, dropped in ((1, {1}), (2, {0, 2}), (3, set()), (4, {3})):
        x = batch(seed)
        h = x
        for index, layer in enumerate(model.layers):
            out = layer(h)
            h = h if index in dropped else out
        h.square().sum().backward()
        returned.append(x.grad)
    return returned


def _another_number_of_microbatches_each_step() -> Callable[[Any], list[Tensor]]:
    calls: dict[int, int] = {}

    def run(model: nn.Module) -> list[Tensor]:
        count = calls[id(model)] = calls.get(id(model), 0) + 1
        names = "1234"[: 1 + count * 2 % 4]
        return _microbatches(*[f"F{n}" for n in names], *[f"B{n}" for n in names])(model)

    return run


def _forward_without_backward(model: nn.Module) -> list[Tensor]:
    dropped = model(batch(2))
    value = dropped.detach().clone()
    del dropped
    kept_until_the_end = model(batch(3))
    returned = train(batch(1))(model)
    return [value, *returned, kept_until_the_end.detach()]


def _eval_passes_between(model: nn.Module) -> list[Tensor]:
    returned = []
    with torch.no_grad():
        returned.append(model(batch(5)))
    returned += train(batch(1))(model)
    with torch.inference_mode():
        returned.append(model(batch(5)).clone())
    x = batch(6)
    loss = model(x).sum()
    with torch.no_grad():
        returned.append(model(batch(5)))
    with torch.inference_mode():
        returned.append(model(batch(5)).clone())
    loss.backward()
    return [*returned, x.grad]


def _backward_under_inference_of_another(model: nn.Module) -> list[Tensor]:
    x = batch()
    loss = model(x).sum()
    with torch.no_grad():
        loss.backward()
    return [x.grad]


def _part_of_the_graph_is_dropped(model: Any) -> list[Tensor]:
    x = batch()
    h = model.layers[0](x)
    side = model.layers[1](h)
    value = side.detach().sum()
    del side
    out = model.layers[3](model.layers[2](h))
    out.sum().backward()
    return [value, x.grad]


def _backward_of_one_layer_while_the_next_runs_forward(model: Any) -> list[Tensor]:
    x = batch()
    h = model.layers[0](x)
    (early,) = torch.autograd.grad(h.sum(), x, retain_graph=True)
    h = model.layers[1](h + early)
    (middle,) = torch.autograd.grad(h.sum(), x, retain_graph=True)
    out = model.layers[3](model.layers[2](h * middle))
    out.sum().backward()
    return [early, middle, x.grad]


def _multi_tensor_backward(model: Any) -> list[Tensor]:
    x, y = batch(1), batch(2)
    torch.autograd.backward([model(x).sum(), model(y).cos().sum(), model.layers[2](x + y).sum()])
    return [x.grad, y.grad]


ORDERS: dict[str, Callable[[Any], list[Tensor]]] = {
    "F1 B1": _microbatches("F1", "B1"),
    "F1 F2 B1 B2": _microbatches("F1", "F2", "B1", "B2"),
    "F1 F2 B2 B1": _microbatches("F1", "F2", "B2", "B1"),
    "one forward one backward": _microbatches("F1", "F2", "F3", "B1", "F4", "B2", "F5", "B3", "B4", "B5"),
    "any order at all": _microbatches("F1", "F2", "F3", "B2", "F4", "B4", "B1", "B3"),
    "retain_graph": _retain_graph,
    "retain_graph between forwards": _retain_graph_between_forwards,
    "double backward": _double_backward,
    "hessian vector products": _hessian_vector_products,
    "grad on parts": _grad_on_parts,
    "first section first": _forward_order_backward,
    "inputs before weights": _input_gradients_before_weight_gradients,
    "use across sections": _cross_section_use,
    "layer drop": _layer_drop,
    "forward without backward": _forward_without_backward,
    "no_grad and inference_mode between": _eval_passes_between,
    "backward under no_grad": _backward_under_inference_of_another,
    "part of the graph dropped": _part_of_the_graph_is_dropped,
    "backward within forward": _backward_of_one_layer_while_the_next_runs_forward,
    "backward of several at once": _multi_tensor_backward,
}


@both_tiers
@pytest.mark.parametrize("order", ORDERS, ids=str)
def test_every_order_gives_the_same_bits_and_leaves_nothing(order: str, tier: str) -> None:
    assert_same_bits(mlp_stack, ORDERS[order], tier=tier, release_after=0, prefetch_ahead=2)


@every_plan
@pytest.mark.parametrize(
    "order", ["one forward one backward", "any order at all", "retain_graph", "double backward", "use across sections"]
)
def test_every_order_gives_the_same_bits_under_every_plan(order: str, plan: dict[str, Any]) -> None:
    assert_same_bits(mlp_stack, ORDERS[order], tier="host", **plan)


def test_a_step_that_differs_from_the_last_one_gives_the_same_bits() -> None:
    """Law 2: what was learned of the order is a guess."""
    assert_same_bits(mlp_stack, _another_number_of_microbatches_each_step(), steps=5, prefetch_ahead=2, release_after=1)


# --- errors on the way --------------------------------------------------------------------------------------------


class _Trip(torch.autograd.Function):
    """Raises in backward when `trip` holds an error."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, trip: list[BaseException]) -> Tensor:
        ctx.trip = trip
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        if ctx.trip:
            raise ctx.trip.pop()
        return grad, None


class _Tripping(Stack):
    """A stack with an error in the middle of one layer's forward or backward, when one is set."""

    def __init__(self) -> None:
        self.forward_trip: list[BaseException] = []
        self.backward_trip: list[BaseException] = []

        def fn(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
            h = torch.tanh(x @ a)
            if self.forward_trip:
                raise self.forward_trip.pop()
            return x + _Trip.apply(h, self.backward_trip).sin() @ b

        super().__init__([mlp_layer(), mlp_layer(), Layer(fn, (WIDTH, WIDTH), (WIDTH, WIDTH)), mlp_layer()])


@both_tiers
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit], ids=lambda e: e.__name__)
@pytest.mark.parametrize("where", ["forward", "backward"])
@pytest.mark.parametrize("whole", [False, True], ids=["layers", "whole model"])
def test_after_an_error_nothing_is_left_and_the_next_step_is_right(
    where: str, error: type[BaseException], tier: str, whole: bool
) -> None:
    torch.manual_seed(0)
    model = _Tripping()
    expected = [bits(v) for v in train(batch(1))(model)] + grads_of(model)
    model.zero_grad()
    with offloaded(model if whole else model.layers, tier=tier) as offloader:
        trips = model.forward_trip if where == "forward" else model.backward_trip
        for _ in range(2):
            trips.append(error("on purpose"))
            before = threading.active_count()
            try:
                train(batch(2))(model)
            except error as caught:
                assert "on purpose" in str(caught)  # noqa: PT017 - SystemExit and KeyboardInterrupt are no Exceptions
                caught.__traceback__ = None
            else:
                pytest.fail("the error was swallowed")
            assert no_hook_is_pushed()
            assert threading.active_count() <= before + 3  # the lanes: out, in, urgent
            assert_nothing_left(offloader)
            model.zero_grad()
            assert [bits(v) for v in train(batch(1))(model)] + grads_of(model) == expected
            assert offloader.stats().bytes_out > 0
            model.zero_grad()


def test_an_error_in_a_section_of_code_leaves_nothing() -> None:
    with offloaded([mlp_layer()]) as offloader:
        layer = mlp_layer()
        try:
            with offloader.section("code"):
                kept = layer(batch())
                raise KeyboardInterrupt
        except KeyboardInterrupt:
            pass
        assert no_hook_is_pushed()
        kept.sum().backward()  # what it saved before is still right
        assert all(p.grad is not None for p in layer.parameters())
        del kept


def test_backward_of_a_graph_whose_forward_failed_later_is_right() -> None:
    torch.manual_seed(0)
    model = _Tripping()
    x = batch()
    h = model.layers[1](model.layers[0](x))
    (expected,) = torch.autograd.grad(h.sum(), x)
    with offloaded(model.layers):
        h = model.layers[1](model.layers[0](x))
        model.forward_trip.append(ValueError("on purpose"))
        with pytest.raises(ValueError, match="on purpose"):
            model.layers[2](h)
        (grad,) = torch.autograd.grad(h.sum(), x)
        assert bits(grad) == bits(expected)
        del h


def test_a_second_backward_without_retain_graph_raises_as_pytorch_does_and_leaves_nothing() -> None:
    model = mlp_stack(2)
    with offloaded(model.layers):
        loss = model(batch()).sum()
        loss.backward()
        with pytest.raises(RuntimeError, match="backward through the graph a second time"):
            loss.backward()
        del loss


# --- several offloaders -------------------------------------------------------------------------------------------


def _expect(model: nn.Module, *inputs: Tensor) -> list[Any]:
    other = twin(model)
    returned = train(*inputs)(other)
    return [bits(v) for v in returned] + grads_of(other)


def _got(model: nn.Module, *inputs: Tensor) -> list[Any]:
    model.zero_grad()
    returned = train(*inputs)(model)
    return [bits(v) for v in returned] + grads_of(model)


@both_tiers
def test_two_offloaders_side_by_side_give_the_same_bits(tier: str) -> None:
    model = mlp_stack(4)
    expected = _expect(model, batch(1), batch(2))
    with offloaded(model.layers[:2], tier=tier) as one, offloaded(model.layers[2:], tier="host") as two:
        for _ in range(2):
            assert _got(model, batch(1), batch(2)) == expected
            for offloader in (one, two):
                assert offloader.stats().bytes_out > 0
                assert_nothing_left(offloader)


@both_tiers
def test_two_offloaders_within_each_other_give_the_same_bits(tier: str) -> None:
    model = Stack([Stack([mlp_layer(), mlp_layer()]), Stack([mlp_layer(), mlp_layer()])])
    expected = _expect(model, batch(1), batch(2))
    inner_layers = [layer for stack in model.layers for layer in stack.layers]
    with offloaded(inner_layers, tier=tier) as inner, offloaded(model.layers) as outer:
        for _ in range(2):
            assert _got(model, batch(1), batch(2)) == expected
            assert inner.stats().bytes_out > 0
            for offloader in (inner, outer):
                assert_nothing_left(offloader)


@pytest.mark.filterwarnings("ignore:.*belongs to another offloader already:UserWarning")
def test_two_offloaders_of_the_same_modules_give_the_same_bits() -> None:
    model = mlp_stack(3)
    expected = _expect(model, batch())
    with offloaded(model.layers) as one, offloaded(model.layers) as two:
        assert _got(model, batch()) == expected
        assert one.stats().bytes_out + two.stats().bytes_out > 0
        assert_nothing_left(one)
        assert_nothing_left(two)


@pytest.mark.filterwarnings("ignore:.*belongs to another offloader already:UserWarning")
def test_offloaders_may_be_closed_in_any_order() -> None:
    model = mlp_stack(3)
    expected = _expect(model, batch())
    one = lighterage.offload(model.layers, min_bytes=64, keep_last=0)
    two = lighterage.offload(model.layers, min_bytes=64, keep_last=0)
    one.close()
    assert _got(model, batch()) == expected
    assert_nothing_left(two)
    two.close()
    assert _got(model, batch()) == expected
    assert type(model.layers[0]) is Layer


# --- closing ------------------------------------------------------------------------------------------------------


@both_tiers
def test_a_backward_after_close_gives_the_same_bits_and_leaves_nothing(tier: str) -> None:
    model = mlp_stack(3)
    expected = _expect(model, batch())
    offloader = lighterage.offload(model.layers, tier=tier, min_bytes=64, keep_last=0, release_after=0)
    x = batch()
    loss = model(x).square().sum()
    offloader.close()
    loss.backward()
    assert [bits(loss), bits(x.grad), *grads_of(model)] == expected
    del loss
    assert_nothing_left(offloader)
    offloader.close()


def test_close_gives_the_modules_their_class_back_and_ends_the_lanes() -> None:
    before = threading.active_count()
    model = mlp_stack(2)
    with offloaded(model.layers):
        _got(model, batch())
        assert threading.active_count() > before
    assert [type(layer) for layer in model.layers] == [Layer, Layer]
    assert threading.active_count() == before
    stats = _got(model, batch())
    assert stats


def test_an_offloader_that_was_closed_counts_nothing_more() -> None:
    model = mlp_stack(2)
    with offloaded(model.layers) as offloader:
        _got(model, batch())
    before = offloader.stats(total=True)
    _got(model, batch())
    assert offloader.stats(total=True) == before
    with pytest.raises(OffloadError, match="close"), offloader.section("late"):
        pass


# --- by hand ------------------------------------------------------------------------------------------------------

_BY_HAND = [
    ["evict", "release", "prefetch"],
    ["release"],
    ["prefetch"],
    ["release", "release", "evict", "prefetch", "prefetch"],
    ["prefetch", "evict", "release"],
    ["release", "prefetch", "release", "evict"],
    ["evict", "prefetch", "release", "prefetch"],
]


@both_tiers
@pytest.mark.parametrize("calls", _BY_HAND, ids=lambda calls: " ".join(calls))
@pytest.mark.parametrize("plan", [PLANS[0], PLANS[3]], ids=["released at once", "held"])
def test_evict_release_and_prefetch_in_any_order_give_the_same_bits(
    calls: list[str], plan: dict[str, Any], tier: str
) -> None:
    """Law 2: what is moved when decides speed and memory only."""
    model = mlp_stack(4)
    expected = _expect(model, batch(1), batch(2))
    with offloaded(model.layers, tier=tier, **plan) as offloader:
        for reverse in (False, True):
            model.zero_grad()
            returned = []
            for seed in (1, 2):
                x = batch(seed)
                h = x
                for layer in model.layers:
                    h = layer(h)
                    for section in offloader.sections:
                        getattr(offloader, calls[0])(section)
                loss = h.square().sum()
                for call in calls:
                    sections = offloader.sections
                    assert len(sections) == 4
                    for section in reversed(sections) if reverse else sections:
                        getattr(offloader, call)(section)
                del section, sections
                loss.backward()
                del h
                returned += [bits(loss), bits(x.grad)]
                del loss
            assert returned + grads_of(model) == expected
            assert offloader.stats().bytes_out > 0
            assert_nothing_left(offloader)


def test_calls_by_hand_during_backward_give_the_same_bits() -> None:
    model = mlp_stack(4)
    expected = _expect(model, batch())
    with offloaded(model.layers) as offloader:
        x = batch()
        h = x
        for layer in model.layers:
            h = layer(h)

            def meddle(grad: Tensor) -> None:
                for section in offloader.sections:
                    offloader.release(section)
                    offloader.prefetch(section)
                    offloader.evict(section)

            h.register_hook(meddle)
        loss = h.square().sum()
        loss.backward()
        assert [bits(loss), bits(x.grad), *grads_of(model)] == expected
        del loss, h


def test_the_methods_refuse_what_is_no_section_of_theirs() -> None:
    """Law 8."""
    model = mlp_stack(2)
    with offloaded(model.layers) as one, offloaded([mlp_layer()]) as two:
        out = model(batch())
        (section, _) = one.sections
        for method in ("evict", "release", "prefetch"):
            with pytest.raises(ValueError, match="belongs to another offloader"):
                getattr(two, method)(section)
            with pytest.raises(TypeError, match=r"taken from offloader\.sections"):
                getattr(one, method)("Layer.0")
        del out, section, _


# --- threads ------------------------------------------------------------------------------------------------------


@both_tiers
@pytest.mark.parametrize("plan", [PLANS[0], PLANS[1]], ids=["on demand", "prefetch"])
def test_backward_from_several_threads_gives_the_same_bits(plan: dict[str, Any], tier: str) -> None:
    model = mlp_stack(4)
    wanted = [
        [bits(g) for g in torch.autograd.grad(model(batch(seed)).square().sum(), list(model.parameters()))]
        for seed in range(6)
    ]
    with offloaded(model.layers, tier=tier, **plan):
        for _ in range(2):
            losses = [model(batch(seed)).square().sum() for seed in range(6)]
            got: list[Any] = [None] * 6

            def work(which: int, losses: list[Tensor] = losses, got: list[Any] = got) -> None:
                grads = torch.autograd.grad(losses[which], list(model.parameters()))
                got[which] = [bits(g) for g in grads]

            threads = [threading.Thread(target=work, args=(which,)) for which in range(6)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert got == wanted
            losses.clear()


def test_backward_of_one_graph_from_several_threads_gives_the_same_bits() -> None:
    """One packed object may be unpacked by several threads at once, and is brought back once."""
    model = mlp_stack(4)
    policy = Policy(min_bytes=64, keep_last=0, release_after=0, prefetch_ahead=2)
    weights = list(model.parameters())
    wanted = [bits(g) for g in torch.autograd.grad(model(batch()).square().sum(), weights)]
    with Offloader(list(model.layers), policy, before_copies=lambda: time.sleep(0.001)) as offloader:
        loss = model(batch()).square().sum()
        got: list[Any] = []

        def work() -> None:
            got.append([bits(g) for g in torch.autograd.grad(loss, weights, retain_graph=True)])

        threads = [threading.Thread(target=work) for _ in range(5)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert got == [wanted] * 5
        loss = loss.detach()
        assert_nothing_left(offloader)
        stats = offloader.stats()
        assert stats.bytes_in == stats.bytes_out > 0


def test_what_is_asked_for_while_another_thread_lets_go_of_it_is_right(monkeypatch: pytest.MonkeyPatch) -> None:
    h = batch() * 1
    (wanted,) = torch.autograd.grad(h.sin().sum(), h)
    with offloaded([mlp_layer()]) as offloader:
        with offloader.section("released", plan="manual") as live:
            first = h.cos()
        assert live is not None
        offloader.evict(live)
        use = Allocation.use

        def release_and_use(allocation: Allocation, *args: Any) -> Any:
            other = threading.Thread(target=offloader.release, args=(live,))
            other.start()
            other.join(10)
            return use(allocation, *args)

        with offloader.section("asks"):
            second = h.sin()
            monkeypatch.setattr(Allocation, "use", release_and_use)
            (found,) = torch.autograd.grad(second.sum(), h)  # inside its section, so it is no visit of backward
        monkeypatch.undo()
        assert bits(found) == bits(wanted)
        del first, second


def test_an_allocation_that_several_threads_ask_for_at_once_comes_back_once(monkeypatch: pytest.MonkeyPatch) -> None:
    allocate = CpuTransport.allocate

    def slowly(transport: CpuTransport, size: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        time.sleep(0.01)  # lets the other threads come in the middle of it
        return allocate(transport, size, dtype)

    monkeypatch.setattr(CpuTransport, "allocate", slowly)
    log: list[Any] = []
    with offloaded([mlp_layer()]) as offloader:
        x = batch()
        with offloader.section("shared"):
            saved = x.detach().clone()
            outs = [Save.apply(x, log, saved[i:]) for i in range(5)]
            wanted = sorted(str(bits(saved[i:])) for i in range(5))
            del saved
        threads = [threading.Thread(target=lambda out=out: torch.autograd.grad(out.sum(), x)) for out in outs]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        outs.clear()
        del threads, thread
        assert sorted(str(entry[0][0]) for entry in log) == wanted
        stats = offloader.stats()
        assert (stats.copies_in, stats.bytes_in) == (1, WIDTH * WIDTH * 4)


@both_tiers
def test_forward_and_backward_in_several_threads_at_once_give_the_same_bits(tier: str) -> None:
    model = mlp_stack(3)
    weights = list(model.parameters())
    wanted = {
        seed: [bits(g) for g in torch.autograd.grad(model(batch(seed)).square().sum(), weights)] for seed in range(4)
    }
    wrong: list[int] = []
    with offloaded(model.layers, tier=tier, release_after=1, prefetch_ahead=2):

        def work(seed: int) -> None:
            for _ in range(5):
                grads = torch.autograd.grad(model(batch(seed)).square().sum(), weights)
                if [bits(g) for g in grads] != wanted[seed] or not no_hook_is_pushed():
                    wrong.append(seed)

        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert wrong == []


# --- references ---------------------------------------------------------------------------------------------------


def test_a_dropped_graph_gives_everything_back_without_the_garbage_collector() -> None:
    """Law 3: a handle's lifetime is the lifetime of the bytes. A saved output must not close a cycle."""
    refs = []

    def fn(x: Tensor, w: Tensor) -> Tensor:
        h = (x @ w).exp()  # exp saves its output
        refs.append(weak(h))
        return h.tanh().sigmoid()

    for plan in PLANS:
        for min_bytes in (64, 1 << 30):
            model = Stack([Layer(fn, (WIDTH, WIDTH)) for _ in range(2)])
            with offloaded(model.layers, **{**plan, "min_bytes": min_bytes}):
                out = model(batch())
                refs.append(weak(out))
                del out
                # A copy that was under way when the graph was dropped holds its source until it has finished.
                deadline = time.monotonic() + 5.0
                while not all(ref.expired() for ref in refs) and time.monotonic() < deadline:
                    time.sleep(0.001)
                assert wait_until(lambda: all(ref.expired() for ref in refs))


def test_a_live_section_is_listed_until_its_graph_is_gone() -> None:
    model = mlp_stack(3)
    with offloaded(model.layers) as offloader:
        out = model(batch())
        assert [s.name for s in offloader.sections] == ["Layer.0", "Layer.1", "Layer.2"]
        assert offloader.stats().host_bytes_in_use > 0
        del out
        assert offloader.sections == []


def test_holding_a_section_does_not_keep_the_step_open() -> None:
    """A step ends when its handles are gone, whoever still holds what `sections` listed."""
    model = mlp_stack(3)
    with offloaded(model.layers) as offloader:
        out = model(batch())
        held = offloader.sections
        out.sum().backward()
        del out
        assert offloader.sections == []
        assert offloader.report().steps == 1
        for section in held:
            for call in (offloader.prefetch, offloader.evict, offloader.release):
                call(section)
        assert_nothing_left(offloader)


def test_deleting_the_offloader_in_the_middle_keeps_backward_right() -> None:
    """Law 3: what the pack hook returned owns what it needs."""
    model = mlp_stack(3)
    expected = _expect(model, batch())
    x = batch()
    offloader = lighterage.offload(model.layers, min_bytes=64, keep_last=0, release_after=0)
    loss = model(x).square().sum()
    offloader.close()
    del offloader
    loss.backward()
    assert [bits(loss), bits(x.grad), *grads_of(model)] == expected


def test_what_is_saved_by_reference_to_an_unused_part_is_given_back() -> None:
    """Backward of a part frees the part's bytes, and the rest when the graph goes."""
    model = mlp_stack(3)
    with offloaded(model.layers) as offloader:
        x = batch()
        a = model.layers[0](x)
        b = model.layers[1](a.detach().requires_grad_())
        both = offloader.stats().host_bytes_in_use
        b.sum().backward()
        del b
        one = offloader.stats().host_bytes_in_use
        assert 0 < one < both
        a.sum().backward()
        del a


def test_saving_nothing_is_no_section() -> None:
    with offloaded([nn.Identity(), nn.Flatten(0)]) as offloader:
        x = batch()
        with offloader.section("empty"):
            pass
        out = x + 1
        assert offloader.sections == []
        del out


def test_saved_lists_of_many_views_leave_nothing() -> None:
    log: list[Any] = []

    def fn(x: Tensor) -> Tensor:
        buffer = x.detach().repeat(8, 1)
        return Save.apply(x, log, *buffer.split(8), *buffer.t().unbind(0))

    def run(model: nn.Module) -> list[Any]:
        log.clear()
        returned = train(batch())(model)
        return [*returned, *log]

    assert_same_bits(lambda: Stack([Layer(fn)] * 2), run, steps=2)


def test_lanes_with_random_delays_give_the_same_bits_in_every_order() -> None:
    """Law 6 on the way: order of jobs on two lanes never shows."""
    import random

    chance = random.Random(5)
    model = mlp_stack(4)
    wanted = {name: ([bits(v) for v in run(twin(model))]) for name, run in ORDERS.items()}
    policy = Policy(min_bytes=64, keep_last=0, release_after=1, prefetch_ahead=1)

    def delay() -> None:
        if chance.random() < 0.2:
            time.sleep(chance.random() * 2e-3)

    with Offloader(list(model.layers), policy, before_copies=delay) as offloader:
        for name, run in ORDERS.items():
            model.zero_grad()
            assert [bits(v) for v in run(model)] == wanted[name], name
            assert_nothing_left(offloader)


def test_mlp_is_the_function_that_the_stack_runs() -> None:
    """The oracle of this file is the plain model itself: guard it against a stack that does nothing."""
    model = mlp_stack(1)
    x = batch()
    assert torch.equal(model(x), mlp(x, *model.layers[0].weights))
