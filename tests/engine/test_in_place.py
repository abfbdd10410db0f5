"""In-place changes: what PyTorch refuses is refused in its words; what it accepts gives the same bits."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lighterage
from tests.engine.programs import (
    PLANS,
    WIDTH,
    Layer,
    Save,
    Stack,
    assert_same_bits,
    batch,
    bits,
    both_tiers,
    every_plan,
    mlp_layer,
    mlp_stack,
    no_hook_is_pushed,
    offloaded,
    train,
)
from tests.engine.test_same_bits import Pair

W = (WIDTH, WIDTH)

# --- what PyTorch refuses -----------------------------------------------------------------------------------------


def refusal(run: Callable[..., Any], *args: Any) -> str:
    """What `run` was refused with. The error itself is dropped: its traceback would hold the graph."""
    try:
        run(*args)
    except RuntimeError as error:
        message = str(error)
    else:
        pytest.fail("nothing was raised")
    assert "has been modified by an inplace operation" in message
    assert no_hook_is_pushed()
    return message


class Keeper:
    """A section that saves one tensor, and lets the test change it afterwards."""

    def __init__(self, change: Callable[[Tensor], Any], make: Callable[[Tensor], Tensor] = torch.clone) -> None:
        self.change = change
        self.make = make
        self.saved: Tensor | None = None

    def layer(self) -> Layer:
        def fn(x: Tensor) -> Tensor:
            self.saved = self.make(x.detach())
            return Save.apply(x, [], self.saved)

        return Layer(fn)

    def run(self, model: Any) -> None:
        out = model(batch())
        assert self.saved is not None
        self.change(self.saved)
        self.saved = None
        out.sum().backward()


CHANGES: dict[str, Callable[[Tensor], Any]] = {
    "itself": lambda t: t.mul_(2),
    "a view of it": lambda t: t[3:5].zero_(),
    "a transpose": lambda t: t.t().add_(1),
    "a single element": lambda t: t.view(-1)[7].fill_(3.0),
    "through detach": lambda t: t.detach().neg_(),
    "by copy_": lambda t: t.copy_(torch.zeros_like(t)),
    "with the same values": lambda t: t.mul_(1),
    "out=": lambda t: torch.add(t, 1, out=t),
}
KEPT_OR_MOVED: dict[str, dict[str, Any]] = {
    "released": PLANS[0],
    "moved, still on the device": {**PLANS[0], "release_after": 9},
    "kept: keep_last": {**PLANS[0], "keep_last": 9},
    "kept: under min_bytes": {**PLANS[0], "min_bytes": 1 << 30},
    "kept: not marked": {**PLANS[0], "select": "marked"},
}


@pytest.mark.parametrize("change", CHANGES, ids=str)
@pytest.mark.parametrize("policy", KEPT_OR_MOVED, ids=str)
def test_a_change_of_a_saved_tensor_raises_as_pytorch_does(policy: str, change: str) -> None:
    keeper = Keeper(CHANGES[change])
    model = Stack([keeper.layer()])
    plain = refusal(keeper.run, model)
    with offloaded(model.layers, **KEPT_OR_MOVED[policy]) as offloader:
        message = refusal(keeper.run, model)
        assert "section 'Layer.0'" in message
        assert f"[torch.FloatTensor [{WIDTH}, {WIDTH}]" in message
        # The words and the versions are PyTorch's own.
        start = "one of the variables needed for gradient computation has been modified by an inplace operation: "
        assert message.startswith(start) and plain.startswith(start)
        versions = re.compile(r"is at version (\d+); expected version (\d+) instead")
        assert versions.search(message).groups() == versions.search(plain).groups()
        assert (offloader.stats(total=True).bytes_out > 0) == ("kept" not in policy)
        # The next step is right.
        keeper.change = lambda t: None
        keeper.run(model)


@both_tiers
def test_what_an_operation_of_pytorch_saved_is_watched_too(tier: str) -> None:
    def spoiled(x: Tensor, w: Tensor) -> Tensor:
        h = (x @ w).exp()  # saves its output
        return h.sin().mul_(2) + h.add_(1)

    model = Stack([mlp_layer(), Layer(spoiled, W)])
    refusal(train(batch()), model)
    with offloaded(model.layers, tier=tier):
        message = refusal(train(batch()), model)
        assert "[torch.FloatTensor [32, 32]" in message and "section 'Layer.1'" in message


def test_a_parameter_changed_between_forward_and_backward_raises_as_pytorch_does() -> None:
    model = mlp_stack(2)

    def run() -> None:
        out = model(batch())
        with torch.no_grad():
            model.layers[1].weights[0].mul_(0.5)
        out.sum().backward()

    refusal(run)
    with offloaded(model.layers):
        assert "section 'Layer.1'" in refusal(run)


@pytest.mark.parametrize("policy", ["released", "kept: under min_bytes"])
def test_a_change_of_a_wrapper_subclass_raises_as_pytorch_does(policy: str) -> None:
    keeper = Keeper(lambda t: t.mul_(2.0), lambda x: Pair((x * 9).to(torch.int8), x.clone()))
    model = Stack([keeper.layer()])
    refusal(keeper.run, model)
    with offloaded(model.layers, **KEPT_OR_MOVED[policy]):
        message = refusal(keeper.run, model)
        assert "[Pair [32, 32]" in message and "section 'Layer.0'" in message


@pytest.mark.parametrize(
    "dtype", [torch.float8_e4m3fn, torch.int8, torch.bool, torch.complex64, torch.bfloat16], ids=str
)
def test_every_dtype_is_watched(dtype: torch.dtype) -> None:
    keeper = Keeper(lambda t: t.copy_(torch.ones_like(t)), lambda x: x.to(dtype))
    model = Stack([keeper.layer()])
    refusal(keeper.run, model)
    with offloaded(model.layers) as offloader:
        message = refusal(keeper.run, model)
        assert "[32, 32]" in message and "section 'Layer.0'" in message
        assert offloader.stats().bytes_out > 0


def test_a_sparse_tensor_is_watched() -> None:
    keeper = Keeper(lambda t: t.mul_(2), lambda x: x.relu().to_sparse())
    model = Stack([keeper.layer()])
    refusal(keeper.run, model)
    with offloaded(model.layers):
        assert "section 'Layer.0'" in refusal(keeper.run, model)


def test_a_change_between_two_backwards_raises_at_the_second() -> None:
    """Even though the bytes that came back are the right ones: PyTorch itself would refuse."""
    keeper = Keeper(lambda t: None)
    layer = keeper.layer()
    with offloaded([layer]):
        loss = layer(batch()).sum()
        loss.backward(retain_graph=True)
        assert keeper.saved is not None
        keeper.saved.add_(1)
        refusal(loss.backward)
        keeper.saved = None
        del loss


# --- what PyTorch accepts -----------------------------------------------------------------------------------------


def _saved_changed_saved_again(x: Tensor, w: Tensor) -> Tensor:
    h = x @ w
    h.sin()  # saves h, and nobody asks for it
    h.mul_(2)
    return h.cos()


def _saved_changed_saved_again_kept_alive(x: Tensor, w: Tensor) -> Tensor:
    h = x @ w
    unused = h.sin()
    h.mul_(2)
    out = h.cos()
    out.unused = unused  # its graph lives as long as the output, and is never run
    return out


def _many_times(x: Tensor, w: Tensor) -> Tensor:
    h = x @ w
    parts = []
    for _ in range(4):
        h = h.clone()
        h.sin()
        h.add_(1)
        parts.append(h.cos())
        h = h * 0.5
    return sum(parts[1:], parts[0])


def _a_buffer_filled_bit_by_bit(x: Tensor, w: Tensor) -> Tensor:
    """Rows are written into one buffer and used as constants: each is saved at another version of the buffer."""
    buffer = torch.zeros(4, WIDTH, WIDTH)
    out = x
    for i in range(4):
        buffer[i].copy_((x.detach() + i).sin())
        out = out + (out * 0.1) @ (buffer[i].clone() * w)
    return out


def _scratch_that_is_written_again(x: Tensor, w: Tensor) -> Tensor:
    scratch = torch.empty(WIDTH, WIDTH)
    torch.sin(x.detach(), out=scratch)
    first = (x * scratch).detach()  # saves scratch, and nobody asks for it
    torch.cos(x.detach(), out=scratch)
    return (x @ w) * scratch + first


def _the_output_is_changed_by_who_gets_it(x: Tensor, w: Tensor) -> Tensor:
    return (x @ w).add_(1).mul_(0.5).relu_()


def _batch_norm_twice(x: Tensor, w: Tensor) -> Tensor:
    mean, var = torch.zeros(WIDTH), torch.ones(WIDTH)
    h = F.batch_norm(x @ w, mean, var, training=True)
    return F.batch_norm(h, mean, var, training=True)


def _dropout_in_place(x: Tensor, w: Tensor) -> Tensor:
    return F.dropout(x @ w, 0.3, training=True, inplace=True).sin()


def _changed_before_saved(x: Tensor, w: Tensor) -> Tensor:
    h = (x @ w).detach()
    for _ in range(5):
        h.mul_(1.1)
    return (x * h).tanh()


ACCEPTED = [
    _saved_changed_saved_again,
    _saved_changed_saved_again_kept_alive,
    _many_times,
    _a_buffer_filled_bit_by_bit,
    _scratch_that_is_written_again,
    _the_output_is_changed_by_who_gets_it,
    _batch_norm_twice,
    _dropout_in_place,
    _changed_before_saved,
]


@every_plan
@pytest.mark.parametrize("program", ACCEPTED, ids=lambda fn: fn.__name__.strip("_"))
def test_what_pytorch_accepts_gives_the_same_bits(program: Callable[..., Tensor], plan: dict[str, Any]) -> None:
    def build() -> nn.Module:
        return Stack([Layer(program, W) for _ in range(3)])  # what the last one keeps, the others may move

    assert_same_bits(build, train(batch()), tier="host", steps=2, **plan)


@both_tiers
@pytest.mark.parametrize("release_after", [0, 3])
def test_a_tensor_changed_after_its_section_was_released_and_saved_again_gives_the_same_bits(
    release_after: int, tier: str
) -> None:
    """Law 4: a range that has moved serves a later save only if nothing was written to it since."""
    held: list[Tensor] = []

    def first(x: Tensor, w: Tensor) -> Tensor:
        h = (x @ w).detach()
        held.append(h)
        (x * h).sum()  # saves h in this section; the graph of it is dropped
        return x * 1.5

    def second(x: Tensor, w: Tensor) -> Tensor:
        h = held.pop()
        h.add_(1)
        return (x * h) @ w

    model = lambda: Stack([Layer(first, W), mlp_layer(), Layer(second, W)])  # noqa: E731
    assert_same_bits(model, train(batch()), tier=tier, release_after=release_after)


@both_tiers
@pytest.mark.parametrize("release_after", [0, 3])
def test_the_stale_copy_of_a_graph_that_lives_on_is_not_used_for_a_later_save(release_after: int, tier: str) -> None:
    """The first graph is alive, so the moved copy of the first version is at hand, and must not be taken."""
    alive: list[Any] = []

    def first(x: Tensor, w: Tensor) -> Tensor:
        h = (x @ w).detach()
        alive[:] = [h, x * h]
        return x * 1.5

    def second(x: Tensor, w: Tensor) -> Tensor:
        h, _ = alive
        h.add_(1)
        return (x * h) @ w

    def run(model: nn.Module) -> list[Tensor]:
        returned = train(batch())(model)
        alive.clear()
        return returned

    model = lambda: Stack([Layer(first, W), mlp_layer(), Layer(second, W)])  # noqa: E731
    assert_same_bits(model, run, tier=tier, release_after=release_after)


@both_tiers
def test_an_inference_of_the_moved_bytes_is_of_the_version_that_was_saved(tier: str) -> None:
    """Each of three live saves of one buffer, at three versions: only the last may be asked for, and it is right."""
    logs: list[Any] = []
    with offloaded([mlp_layer()], tier=tier) as offloader:
        x = batch()
        buffer = torch.zeros(W)
        outs = []
        for version in range(3):
            buffer.fill_(version + 1)
            with offloader.section(f"version {version}"):
                outs.append(Save.apply(x, logs, buffer))
        outs[2].sum().backward()
        assert logs[0][0][0] == bits(torch.full(W, 3.0))
        for version in (0, 1):
            assert f"section 'version {version}'" in refusal(outs[version].sum().backward)
        outs.clear()


def test_a_write_through_data_is_seen_where_its_own_counter_shows_the_same_number() -> None:
    """`.data` has a counter of its own: what was moved before the write must not serve what is saved after it."""
    log: list[Any] = []
    with offloaded([mlp_layer()]) as offloader:
        x = batch()
        buffer = torch.zeros(W)
        buffer.add_(1)
        with offloader.section("before"):
            alive = Save.apply(x, log, buffer)
        other = buffer.data
        other.add_(1)
        assert other._version == buffer._version
        with offloader.section("after"):
            out = Save.apply(x, log, other)
        out.sum().backward()
        del alive, out
        assert log[0][0][0] == bits(torch.full(W, 2.0))


def test_a_change_after_backward_is_nobodys_business() -> None:
    def run(model: Any) -> list[Tensor]:
        x = batch()
        out = model(x)
        out.square().sum().backward()
        with torch.no_grad():
            x.mul_(2)
            out.zero_()
        return [x.grad, out.detach()]

    assert_same_bits(mlp_stack, run)


class _WritesInBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * 2

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        x.mul_(3)
        return gradient * x


class _TanhThenWrite(torch.nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return _WritesInBackward.apply(torch.tanh(x))  # tanh has saved the same allocation


@pytest.mark.parametrize("retain", [False, True])
@pytest.mark.parametrize(
    "policy",
    [{"keep_last": 0}, {"keep_last": 0, "release_after": 0}, {"keep_last": 9}, {"keep_last": 0, "tier": "host"}],
    ids=str,
)
def test_a_write_by_one_backward_is_noticed_by_the_next(policy: dict[str, Any], retain: bool) -> None:
    """Law 8: tensors rebuilt over one allocation share a version counter, as those that were saved did."""
    layers = torch.nn.Sequential(*(_TanhThenWrite() for _ in range(3)))
    x = torch.linspace(-1, 1, 4096).requires_grad_()
    with lighterage.offload(layers, min_bytes=64, **policy):
        loss = layers(x).sum()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward(retain_graph=retain)


# --- threads ------------------------------------------------------------------------------------------------------


def _count_moves(monkeypatch: pytest.MonkeyPatch, meanwhile: Callable[[], None] = lambda: None) -> list[int]:
    """The values that version counters are set to; `meanwhile` is called while one is moved."""
    bump, moves = torch._C._autograd._unsafe_set_version_counter, []

    def watched(tensors: Any, versions: Any) -> None:
        bump(tensors, versions)
        moves.append(versions[0])
        if len(moves) % 2:
            meanwhile()

    monkeypatch.setattr(torch._C._autograd, "_unsafe_set_version_counter", watched)
    return moves


def test_saving_a_tensor_and_views_of_it_again_moves_nobodys_version_counter(monkeypatch: pytest.MonkeyPatch) -> None:
    """What PyTorch saved of it elsewhere is checked by other threads without a lock, and would be found changed."""
    moves = _count_moves(monkeypatch)
    x = torch.randn(32, 32, requires_grad=True)
    with lighterage.offload([nn.Identity()], keep_last=0, min_bytes=0) as offloader:
        h = x * 1
        with offloader.section("same"):
            y = h.sin() * h + h.t() @ h[:, ::2].exp().sum(1) + h.exp()
        y.sum().backward()
        assert offloader.stats().copies_out > 0
    assert moves == []


@pytest.mark.parametrize("plan", ["policy", "keep"])
def test_a_use_while_another_thread_compares_counters_is_no_change(plan: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(32, 32, requires_grad=True)
    errors: list[BaseException] = []
    threads: list[threading.Thread] = []
    with (
        lighterage.offload([nn.Identity()], keep_last=0, min_bytes=0) as offloader,
        lighterage.offload([nn.Identity()], keep_last=0, min_bytes=0) as other,
    ):
        h = x * 1
        with offloader.section("before", plan=plan):
            y = h.sin()

        def use() -> None:
            try:
                torch.autograd.grad(y.sum(), h)
            except RuntimeError as error:
                errors.append(error)

        def meanwhile() -> None:
            threads.append(threading.Thread(target=use))
            threads[-1].start()
            threads[-1].join(0.3)

        moves = _count_moves(monkeypatch, meanwhile)
        with other.section("comparing"):
            z = h.sin() * h.detach()  # two tensors of one storage, of which nothing tells that they share a counter
        assert moves
        for thread in threads:
            thread.join()
        torch.autograd.grad(z.sum(), h)
    assert errors == []
    assert len(threads) == 1
