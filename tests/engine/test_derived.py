"""Saves that are derived: not saved, but made again by one cheap operator from what else is saved."""

from __future__ import annotations

import collections
import copy
import ctypes
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode

import lighterage
from lighterage import Offloader
from lighterage.engine.planning import proofs, timelines, tracing
from lighterage.engine.planning.derived import Derivation, Made, Source
from lighterage.engine.planning.origins import is_cheap
from lighterage.engine.planning.room import Room
from lighterage.engine.planning.tracing import Tracer
from lighterage.planner.plan import Fetch, Move, Plan, SectionPlan
from lighterage.planner.timeline import Timeline
from tests.engine.planned import STEPS_TO_PLAN, assert_equal, train
from tests.engine.programs import Layer, Stack, assert_nothing_left

WIDTH = 32
KIB = 1024

Fn = Callable[..., Tensor]


def gated(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """Norm, gate and up, and their product: the norm's result and two others need not be saved."""
    n = F.layer_norm(x, (WIDTH,))
    return x + (F.silu(n @ gate) * (n @ up)) @ down


def stack(fn: Fn = gated, layers: int = 4, *shapes: tuple[int, ...]) -> Stack:
    torch.manual_seed(0)
    return Stack([Layer(fn, *(shapes or ((WIDTH, WIDTH),) * 3)) for _ in range(layers)])


def pair(fn: Fn = gated, *shapes: tuple[int, ...]) -> tuple[Stack, Stack]:
    model = stack(fn, 4, *shapes)
    return model, copy.deepcopy(model)


def rows(seed: int = 1, num: int = 64) -> list[Tensor]:
    return [torch.randn(num, WIDTH, generator=torch.Generator().manual_seed(seed), requires_grad=True)]


def everywhere(timeline: Timeline, *, moves: bool = False) -> Plan:
    """Selective in every section. `moves`: what it saves leaves, and comes back when it is asked for."""
    sections = tuple(
        SectionPlan(
            name=s.name,
            mode="save" if s.selective_ms is None else "selective",
            moves=tuple(Move(save=a.save, release_after=0) for a in s.allocations) if moves else (),
        )
        for s in timeline.sections
    )
    nothing: tuple[tuple[Fetch, ...], ...] = ((),) * len(timeline.phases)
    return Plan(sections=sections, fetches=nothing)


def offloaded(model: Stack) -> Offloader:
    return lighterage.offload(model.layers, recompute="auto", min_bytes=64, tier="host", max_slowdown=0.5)


def learn(model: Stack, offloader: Offloader, *, moves: bool = False) -> Timeline:
    """Measure, and have every section selective from now on."""
    train(model, rows(), STEPS_TO_PLAN)
    timeline = offloader.timeline
    assert timeline is not None
    offloader.use_plan(everywhere(timeline, moves=moves), timeline)
    return timeline


def derived(timeline: Timeline, section: int = 1) -> list[int]:
    """The saves that are not saved."""
    return [a.save for a in timeline.sections[section].allocations if a.kind == "pointwise"]


class Calls(TorchDispatchMode):
    """Counts operators, and watches what they gave."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.made: dict[str, list[StorageWeakRef]] = collections.defaultdict(list)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        self.names.append(name)
        out = func(*args, **(kwargs or {}))
        first = out[0] if isinstance(out, tuple) else out
        if isinstance(first, Tensor):
            self.made[name].append(StorageWeakRef(first.untyped_storage()))
        return out


class Here:
    """A handle of what is there."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor

    def unpack(self) -> Tensor:
        return self._tensor


@pytest.fixture
def never_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """No forward may run a second time."""

    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("a forward was to run again")

    monkeypatch.setattr("lighterage.engine.planning.recompute.checkpoint", refuse)


@pytest.fixture
def proven(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What is derived in the first step has the bits that were saved: nothing is found out there that was not known."""
    yield from all_proven(monkeypatch)


def all_proven(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    found: list[Tensor] = []
    compare = proofs._differences

    def kept(a: Tensor, b: Tensor) -> list[Tensor]:
        differs = compare(a, b)
        found.extend(differs)
        return differs

    monkeypatch.setattr(proofs, "_differences", kept)
    yield
    assert found
    assert not any(map(bool, found))


# --- what is derived ------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("never_again")
@pytest.mark.parametrize("moves", [False, True])
def test_what_cheap_operators_make_of_what_is_saved_is_not_saved(moves: bool) -> None:
    plain, model = pair()
    expected = train(plain, rows(), 3)
    with offloaded(model) as offloader:
        train(model, rows(), STEPS_TO_PLAN)
        saved = sum(section.unique_bytes for section in offloader.report().sections)
        timeline = learn(model, offloader, moves=moves)
        assert_equal(expected, train(model, rows(), 3))
        stats = offloader.stats()
        kept = sum(section.unique_bytes for section in offloader.report().sections)
        assert stats.bytes_out > 0 if moves else stats.bytes_out == 0
        assert_nothing_left(offloader)
    # The norm, silu, and the last product's operand.
    assert [len(derived(timeline, i)) for i in range(4)] == [3, 3, 3, 3]
    gone = sum(a.nbytes for s in timeline.sections for a in s.allocations if a.kind == "pointwise")
    assert gone == 4 * 3 * 64 * WIDTH * 4
    assert kept == saved - gone


def test_what_is_derived_is_alive_neither_between_forward_and_backward_nor_after_its_last_reader() -> None:
    _, model = pair()
    with offloaded(model) as offloader:
        learn(model, offloader)
        x = rows()[0]
        loss = model(x).square().mean()
        calls = Calls()
        with calls:
            loss.backward()
        # Each once for its section, though two products read the norm, and the last operand is made of silu.
        assert calls.names.count("native_layer_norm") == 4
        assert calls.names.count("silu") == 4
        assert_nothing_left(offloader)


class Looks(torch.autograd.Function):
    """Passes on, and looks as backward comes to it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, look: Callable[[], None]) -> Tensor:
        ctx.look = look
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        ctx.look()
        return grad, None


def test_what_backward_has_read_goes_while_the_rest_of_its_section_waits() -> None:
    """Whatever is saved holds the hook that packed it: that must not hold what else the section has saved."""
    saved: list[StorageWeakRef] = []
    gone: list[bool] = []

    def fn(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
        x = Looks.apply(x.sin(), lambda: gone.append(saved[-1].expired()))
        n = F.layer_norm(x, (WIDTH,))
        g = n @ gate
        saved.append(StorageWeakRef(g.untyped_storage()))
        return x + (F.silu(g) * (n @ up)) @ down

    _, model = pair(fn)
    with offloaded(model) as offloader:
        timeline = learn(model, offloader)
        assert derived(timeline)
        saved.clear()
        gone.clear()
        model.layers[0](rows()[0]).square().mean().backward()
        assert gone == [True]


def test_a_graph_that_is_kept_holds_nothing_derived() -> None:
    _, model = pair()
    with offloaded(model) as offloader:
        learn(model, offloader)
        loss, calls = model(rows()[0]).square().mean(), Calls()
        with calls:
            loss.backward(retain_graph=True)
        assert calls.names.count("silu") == 2 * 4, "again for each that asks"
        assert all(ref.expired() for ref in calls.made["silu"] + calls.made["native_layer_norm"])


def test_a_graph_that_is_kept_goes_again() -> None:
    plain, model = pair()
    with offloaded(model) as offloader:
        learn(model, offloader, moves=True)
        for one in (plain, model):
            one.zero_grad(set_to_none=True)
            loss = one(rows()[0]).square().mean()
            loss.backward(retain_graph=True)
            loss.backward()
        for a, b in zip(plain.parameters(), model.parameters(), strict=True):
            assert torch.equal(a.grad, b.grad)
        del loss
        assert_nothing_left(offloader)


def test_second_derivatives_are_those_without_offload() -> None:
    plain, model = pair()
    found = []
    with offloaded(model) as offloader:
        learn(model, offloader, moves=True)
        model.zero_grad(set_to_none=True)
        for one in (plain, model):
            x = rows()[0]
            (grad,) = torch.autograd.grad(one(x).square().mean(), x, create_graph=True)
            grad.square().sum().backward()
            found.append([x.grad, *(p.grad for p in one.parameters())])
            one.zero_grad(set_to_none=True)
        for a, b in zip(*found, strict=True):
            assert (a is None) == (b is None)
            assert a is None or torch.equal(a, b)
        del grad
        assert_nothing_left(offloader)


@pytest.mark.usefixtures("proven", "never_again")
@pytest.mark.parametrize("inside", [False, True], ids=["backward outside", "backward inside"])
def test_operators_are_called_below_autocast_as_they_were(inside: bool) -> None:
    plain, model = pair()

    def steps(one: Stack) -> list[tuple[Tensor, list[Tensor]]]:
        results = []
        for _ in range(2):
            one.zero_grad(set_to_none=True)
            with torch.autocast("cpu", torch.bfloat16):
                loss = one(rows()[0]).float().square().mean()
                if inside:
                    loss.backward()
            if not inside:
                loss.backward()
            results.append((loss.detach(), [p.grad.clone() for p in one.parameters() if p.grad is not None]))
        return results

    expected = steps(plain)
    with offloaded(model) as offloader:
        for _ in range(STEPS_TO_PLAN):
            steps(model)
        timeline = offloader.timeline
        assert timeline is not None
        assert derived(timeline)
        offloader.use_plan(everywhere(timeline), timeline)
        assert_equal(expected, steps(model))


def chunked(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    gate, up = (x @ a).chunk(2, dim=-1)
    return x + (F.gelu(gate) * up) @ b


def transposed(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    y = (x @ a).view(8, -1, WIDTH).transpose(0, 1)
    return x + (y.sigmoid().contiguous().to(torch.float64).float().reshape(x.shape[0], -1) * 2.0) @ b


def joined(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    y = (x @ a).tanh()
    return x + torch.cat([y[:, : WIDTH // 2].exp(), y[:, WIDTH // 2 :].softmax(-1)], -1).relu() @ b


def dropped(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return x + F.dropout(F.silu(F.dropout(x @ a, 0.3)), 0.2) @ b


def in_place(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    y = (x @ a).relu()
    z = y * 1.5
    z.add_(1.0).mul_(0.5)
    return x + (z * z.sin()) @ b


def written_source(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    y = x @ a
    s = y * 1.5  # saves nothing
    y.mul_(2.0)
    t = y * y  # saves what y has become
    return x + (s * t).tanh() @ b + t.sin() @ b


def by_index(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    y = (x @ a).tanh()
    order = torch.arange(x.shape[0] - 1, -1, -1)
    return x + y.index_select(0, order).sin().gather(0, order[:, None].expand_as(y)) @ b


@pytest.mark.usefixtures("proven", "never_again")
@pytest.mark.parametrize("moves", [False, True])
@pytest.mark.parametrize(
    ("fn", "shapes"),
    [
        (chunked, ((WIDTH, 2 * WIDTH), (WIDTH, WIDTH))),
        (transposed, ((WIDTH, WIDTH), (WIDTH, WIDTH))),
        (joined, ((WIDTH, WIDTH), (WIDTH, WIDTH))),
        (dropped, ((WIDTH, WIDTH), (WIDTH, WIDTH))),
        (in_place, ((WIDTH, WIDTH), (WIDTH, WIDTH))),
        (written_source, ((WIDTH, WIDTH), (WIDTH, WIDTH))),
        (by_index, ((WIDTH, WIDTH), (WIDTH, WIDTH))),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_views_casts_and_writes_give_the_same_bits(
    fn: Fn, shapes: tuple[tuple[int, ...], ...], moves: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(timelines, "_ENOUGH", 0.0)  # whatever can be derived is
    plain, model = pair(fn, *shapes)
    expected = train(plain, rows(), 3)
    with offloaded(model) as offloader:
        timeline = learn(model, offloader, moves=moves)
        assert derived(timeline)
        assert_equal(expected, train(model, rows(), 3))
        assert_nothing_left(offloader)


def test_which_operators_are_cheap() -> None:
    aten = torch.ops.aten
    for op in (
        aten.silu.default,
        aten.mul.Tensor,
        aten._to_copy.default,
        aten.native_layer_norm.default,
        aten.cat.default,
    ):
        assert is_cheap(op)
    dear = (aten.mm.default, aten.convolution.default, aten._scaled_dot_product_flash_attention_for_cpu.default)
    random = (aten.bernoulli.p, aten.native_dropout.default, aten.rand_like.default)
    writes = (aten.relu_.default, aten.add_.Tensor, aten.copy_.default)
    unordered = (aten.index_add.default, aten.scatter_add.default, aten.cumsum.default)
    for op in (*dear, *random, *writes, *unordered, aten.empty_like.default):
        assert not is_cheap(op)


def test_an_operator_is_called_again_below_autocast() -> None:
    x = torch.randn(4, 4)
    source = Source(Here(x), 0, 0, x.dtype, x.shape, x.stride())
    made = Made(torch.ops.aten.mm.default, [], {}, None, x.dtype, x.shape, x.stride(), 0, 0, "cpu", x.nbytes)
    with torch.autocast("cpu", torch.bfloat16):
        again = Derivation(made, [source, source], {}, lasting=False).unpack()
    assert torch.equal(again, x @ x)


def test_an_operator_that_gives_something_else_says_what_to_do() -> None:
    x = torch.randn(4, 4)
    source = Source(Here(x), 0, 0, x.dtype, x.shape, x.stride())
    made = Made(torch.ops.aten.sin.default, [], {}, None, x.dtype, torch.Size((2, 8)), (8, 1), 0, 0, "cpu", x.nbytes)
    with pytest.raises(lighterage.OffloadError, match=r'a setting that has changed since.*or pass recompute="never"'):
        Derivation(made, [source], {}, lasting=False).unpack()


# --- what is not ----------------------------------------------------------------------------------------------------


class Doubled(torch.autograd.Function):
    """Computes inside, and saves what it has computed."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        y = x * 2.0
        ctx.save_for_backward(x, y)
        return y.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        x, y = ctx.saved_tensors
        return grad * (y / x)


def test_what_an_autograd_function_has_computed_is_saved() -> None:
    def fn(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        y = Doubled.apply((x @ a).sigmoid())
        return x + (y * y.sin()) @ b

    plain, model = pair(fn, (WIDTH, WIDTH), (WIDTH, WIDTH))
    expected = train(plain, rows(), 3)
    with offloaded(model) as offloader:
        timeline = learn(model, offloader)
        # The input, what the Function was given, has computed and gave; and of the last, a sine and a product.
        kinds = [a.kind for a in timeline.sections[1].allocations]
        assert kinds == ["input", "other", "other", "other", "pointwise", "pointwise"]
        assert_equal(expected, train(model, rows(), 3))


class Turned(torch.autograd.Function):
    """Writes to what it is given as a kernel does, and gives a view of it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        write_unseen(x)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * 0.5


@pytest.mark.usefixtures("proven", "never_again")
def test_what_an_autograd_function_gives_of_what_it_was_given_is_saved() -> None:
    def fn(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        turned = Turned.apply((x @ a).sigmoid() + 1.0)
        n = F.layer_norm(x, (WIDTH,))
        return x + turned.square() @ b + F.silu(n @ a) @ b

    plain, model = pair(fn, (WIDTH, WIDTH), (WIDTH, WIDTH))
    expected = train(plain, rows(), 3)
    with offloaded(model) as offloader:
        timeline = learn(model, offloader)
        assert derived(timeline)
        assert_equal(expected, train(model, rows(), 3))


def write_unseen(tensor: Tensor) -> None:
    """As a kernel of somebody else's does: PyTorch's version counter tells nothing."""
    assert tensor.is_contiguous()
    data = (ctypes.c_float * tensor.numel()).from_address(tensor.data_ptr())
    for i in range(tensor.numel()):
        data[i] = data[i] * 0.5


def test_what_a_kernel_writes_without_pytorchs_knowledge_is_found_out_in_the_first_step() -> None:
    def fn(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        s = F.silu(x @ a)
        write_unseen(s)
        return x + s @ b

    plain, model = pair(fn, (WIDTH, WIDTH), (WIDTH, WIDTH))
    expected = train(plain, rows(), 3)
    with offloaded(model) as offloader:
        timeline = learn(model, offloader)
        assert_equal(expected, train(model, rows(), 3))
    # It is computed again by the whole forward, which writes again.
    assert timeline.sections[1].selective_ms is not None


def runs_of(model: Stack, offloader: Offloader, ran: list[int], expected: list[Any]) -> float:
    """How often each layer's forward runs in a step, told by what it adds to `ran`; its steps are as `expected`."""
    learn(model, offloader)
    ran.clear()
    assert_equal(expected, train(model, rows(), 3))
    return len(ran) / (4 * 3)


def test_where_there_is_no_room_to_compare_the_forward_runs_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Room, "has", lambda self, nbytes: False)
    ran: list[int] = []

    def fn(x: Tensor, *weights: Tensor) -> Tensor:
        ran.append(1)
        return gated(x, *weights)

    plain, model = pair(fn)
    expected = train(plain, rows(), 3)
    with offloaded(model) as offloader:
        assert runs_of(model, offloader, ran, expected) == 2


def test_where_little_could_be_derived_the_forward_runs_again() -> None:
    ran: list[int] = []

    def fn(x: Tensor, a: Tensor) -> Tensor:
        ran.append(1)
        y = (x + 1.0).sigmoid()  # saves its result alone, of two that are cheap
        return x + y.sin() @ a

    plain, model = pair(fn, (WIDTH, WIDTH))
    expected = train(plain, rows(), 3)
    with offloaded(model) as offloader:
        assert runs_of(model, offloader, ran, expected) == 2


def test_small_sums_of_large_tensors_are_saved() -> None:
    _, model = pair()
    with offloaded(model) as offloader:
        timeline = learn(model, offloader)
        kinds = {a.label: a.kind for a in timeline.sections[1].allocations}
    assert kinds["(64, 1) float32"] != "pointwise", "the norm's mean takes as long as the norm"


# --- what runs inside a section ---------------------------------------------------------------------------------------


def test_operators_that_take_functions_run() -> None:
    def fn(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        h = F.silu(x @ a)
        with torch.no_grad():
            chosen = torch.cond(h.sum() > 0, lambda t: t.sin(), lambda t: t.cos(), (h,))
        return x + (h * chosen) @ b

    plain, model = pair(fn, (WIDTH, WIDTH), (WIDTH, WIDTH))
    expected = train(plain, rows(), 3)
    with offloaded(model) as offloader:
        learn(model, offloader, moves=True)
        assert_equal(expected, train(model, rows(), 3))


def test_functions_that_are_compiled_stay_compiled() -> None:
    calls: list[int] = []

    def backend(graph: Any, examples: Any) -> Any:
        def run(*args: Any) -> Any:
            calls.append(1)
            return graph(*args)

        return run

    @torch.compile(backend=backend)
    def act(y: Tensor) -> Tensor:
        return F.silu(y) * y.tanh()

    plain, model = pair(lambda x, a, b: x + act(x @ a) @ b, (WIDTH, WIDTH), (WIDTH, WIDTH))
    expected = train(plain, rows(), 1)
    assert len(calls) == 4
    with offloaded(model) as offloader:
        for _ in range(STEPS_TO_PLAN + 2):
            calls.clear()
            assert_equal(expected, train(model, rows(), 1))
            assert len(calls) >= 4
        learn(model, offloader)
        assert_equal(expected, train(model, rows(), 1))
    torch._dynamo.reset()


class Freed(nn.Module):
    """Its scale has memory in its forward, and when backward comes to what it gave, as sharded parameters have."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.randn(WIDTH, WIDTH) / 4)
        self.scale = nn.Parameter(torch.rand(WIDTH))
        self._full = (torch.empty(0),)

    def _fill(self) -> None:
        storage = self.scale.untyped_storage()
        if storage.nbytes() == 0:
            storage.resize_(4 * WIDTH)
            with torch.no_grad(), torch.autograd._unsafe_preserve_version_counter(self.scale):
                self.scale.copy_(self._full[0])

    def forward(self, x: Tensor) -> Tensor:
        self._fill()
        self._full[0].resize_(WIDTH).copy_(self.scale.detach())
        y = (x @ self.a) * self.scale
        self.scale.untyped_storage().resize_(0)
        if y.requires_grad:
            y.register_hook(lambda grad: self._fill())
        return x + y.tanh() @ self.a


def test_an_operand_without_memory_is_noticed_before_it_is_read() -> None:
    torch.manual_seed(0)
    plain = Stack([Freed() for _ in range(3)])
    model = copy.deepcopy(plain)

    expected = train(plain, rows(), 1)
    with offloaded(model):
        assert_equal(expected, train(model, rows(), 1))  # the first step, which compares
    x = torch.randn(4, 4)
    source = Source(Here(x), 0, 0, x.dtype, x.shape, x.stride())
    x.untyped_storage().resize_(0)
    with pytest.raises(lighterage.OffloadError, match="has no memory when backward needs it"):
        source.tensor()


def chain(k: int) -> Fn:
    def fn(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        y = x @ a
        for _ in range(k):
            y = y * y.tanh()
        return x + y @ b

    return fn


def test_one_handle_computes_nothing_twice_where_nothing_is_kept() -> None:
    _, model = pair(chain(10), (WIDTH, WIDTH), (WIDTH, WIDTH))
    with offloaded(model) as offloader:
        learn(model, offloader)
        loss, calls = model(rows()[0]).square().mean(), Calls()
        with calls:
            loss.backward(retain_graph=True)
    # Each of some 20 handles a section calls at most the 20 operators before it; they were two to the tenth.
    assert calls.names.count("tanh") <= 4 * 20 * 10


def test_long_chains_are_cut_before_pythons_stack_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    depths: list[int] = []

    class Told(Derivation):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            depths.append(self.depth)

    monkeypatch.setattr(tracing, "Derivation", Told)

    def fn(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        y = x @ a
        for _ in range(240):
            y = y.tanh()
        return x + y @ b

    plain, model = pair(fn, (WIDTH, WIDTH), (WIDTH, WIDTH))
    expected = train(plain, rows(), 1)
    with offloaded(model) as offloader:
        timeline = learn(model, offloader)
        assert 200 < len(derived(timeline)) < 239, "all but the last would be"
        depths.clear()

        def deeper(frames: int) -> None:
            if frames:
                deeper(frames - 1)
            else:
                assert_equal(expected, train(model, rows(), 1))

        deeper(600)
    assert max(depths) == tracing._MOST_DEEP


def test_a_write_that_only_computing_again_minds_says_so() -> None:
    def fn(x: Tensor, a: Tensor, scale: Tensor) -> Tensor:
        return x + (x @ a * scale) @ a

    _, model = pair(fn, (WIDTH, WIDTH), (WIDTH,))
    with offloaded(model) as offloader:
        timeline = learn(model, offloader)
        assert derived(timeline)
        loss = model(rows()[0]).square().mean()
        a, scale = model.layers[-1].weights
        torch.autograd.grad(loss, scale, retain_graph=True)
        with torch.no_grad():
            scale.add_(1.0)
        with pytest.raises(RuntimeError, match=r'inplace operation.*compute again.*recompute="never"'):
            torch.autograd.grad(loss, a)


def test_a_tracer_leaves_whatever_an_interrupt_has_left_of_it() -> None:
    tracer = Tracer()
    tracer.__exit__(None, None, None)  # before it was entered
    tracer.__enter__()
    tracer.drop()
    tracer.drop()
    assert _get_current_dispatch_mode() is None
    tracer.__enter__()
    for flags in ("old_dispatch_mode_flags", "old_non_infra_dispatch_mode_flags"):
        getattr(tracer, flags).clear()  # in the middle of its exit
    tracer.drop()
    assert _get_current_dispatch_mode() is None


# --- steps that change ----------------------------------------------------------------------------------------------


def test_another_way_through_the_forward_saves_what_it_cannot_derive() -> None:
    other = [False]

    def fn(x: Tensor, *weights: Tensor) -> Tensor:
        if not other[0]:
            return gated(x, *weights)
        gate, up, down = weights
        n = F.layer_norm(x, (WIDTH,))
        with torch.no_grad():
            n.mul_(0.5)
        return x + ((n @ gate).exp() * (n @ up)) @ down

    plain, model = pair(fn)
    with offloaded(model) as offloader:
        learn(model, offloader)
        for way in (False, True, False, True):
            other[0] = way
            assert_equal(train(plain, rows(), 2), train(model, rows(), 2))
        assert_nothing_left(offloader)


@pytest.mark.parametrize("num", [8, 200])
def test_another_size_is_derived_as_well(num: int) -> None:
    plain, model = pair()
    with offloaded(model) as offloader:
        learn(model, offloader)
        assert_equal(train(plain, rows(num=num), 3), train(model, rows(num=num), 3))


def test_a_source_that_is_written_to_after_its_forward_is_told_as_ever() -> None:
    _, model = pair()
    with offloaded(model) as offloader:
        learn(model, offloader)
        x = rows()[0] * 1.0
        loss = model(x).square().mean()
        with torch.no_grad():
            x.add_(1.0)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


def test_a_forward_that_raises_leaves_nothing_behind() -> None:
    fail = [False]

    def fn(x: Tensor, *weights: Tensor) -> Tensor:
        y = gated(x, *weights)
        if fail[0]:
            raise KeyError("in the middle")
        return y

    plain, model = pair(fn)
    with offloaded(model) as offloader:
        learn(model, offloader)
        fail[0] = True
        with pytest.raises(KeyError):
            model(rows()[0])
        fail[0] = False
        assert_equal(train(plain, rows(), 2), train(model, rows(), 2))
        assert_nothing_left(offloader)


def test_a_budget_is_kept_to_with_what_is_derived(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, model = pair()
    expected = train(plain, rows(num=256), 3)
    with offloaded(model) as offloader:
        train(model, rows(num=256), STEPS_TO_PLAN)
        usual = offloader.timeline
        assert usual is not None
        peak = usual.measured_peak_bytes
    assert peak is not None
    with lighterage.offload(
        model.layers, device_budget=int(0.8 * peak), recompute="auto", min_bytes=64, tier="host"
    ) as offloader:
        train(model, rows(num=256), STEPS_TO_PLAN + 3)
        assert_equal(expected, train(model, rows(num=256), 3))
        report = offloader.report()
        assert report.measured_peak_bytes is not None
        assert report.measured_peak_bytes <= 0.8 * peak


def test_a_comparison_finds_one_bit_and_looks_at_every_part(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proofs, "_CHUNK", 64)
    for shape in ((), (3,), (7, 33), (2, 5, 129)):
        a = torch.randn(shape).bfloat16()
        assert not any(map(bool, proofs._differences(a, a.clone())))
        for at in {0, a.numel() // 2, a.numel() - 1}:
            b = a.clone()
            b.view(-1).view(torch.int16)[at] ^= 1
            assert any(map(bool, proofs._differences(a, b)))
    nan = torch.full((100,), float("nan"))
    assert not any(map(bool, proofs._differences(nan, nan.clone())))
    turned = torch.randn(40, 30).t()
    assert not any(map(bool, proofs._differences(turned, turned.clone())))


def test_nothing_is_derived_where_it_may_not_be_computed_again() -> None:
    _, model = pair()
    with lighterage.offload(model.layers, recompute="never", min_bytes=64, tier="host") as offloader:
        train(model, rows(), STEPS_TO_PLAN)
        timeline = offloader.timeline
        assert timeline is not None
        assert all(section.selective_ms is None for section in timeline.sections)
