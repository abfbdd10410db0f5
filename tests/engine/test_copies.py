"""Claims about copies, pickles, forks and replicas of an offloaded model, and what is left when it is gone."""

from __future__ import annotations

import contextlib
import copy
import gc
import io
import itertools
import os
import pickle
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import lighterage
from tests.engine.twin import (
    Block,
    Model,
    assert_nothing_left,
    assert_same,
    batch,
    compare,
    identity,
    layers_of,
    loss_of,
    same_bits,
    train,
    train_step,
)

Copy = Callable[[nn.Module], nn.Module]
both_given = pytest.mark.parametrize("given", [layers_of, identity], ids=["layers", "whole model"])


def by_pickle(model: nn.Module) -> nn.Module:
    data = pickle.dumps(model)
    assert b"lighterage" not in data
    loaded: nn.Module = pickle.loads(data)
    return loaded


def by_old_pickle(model: nn.Module) -> nn.Module:
    data = pickle.dumps(model, protocol=2)
    assert b"lighterage" not in data
    loaded: nn.Module = pickle.loads(data)
    return loaded


def by_torch_save(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    assert b"lighterage" not in file.getvalue()
    file.seek(0)
    loaded: nn.Module = torch.load(file, weights_only=False)
    return loaded


def by_ema(model: nn.Module) -> nn.Module:
    averaged: nn.Module = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9)).module
    return averaged


every_copy = pytest.mark.parametrize("made", [copy.deepcopy, by_pickle, by_old_pickle, by_torch_save, by_ema])


@both_given
@every_copy
def test_a_copy_is_of_the_original_classes_and_free_of_the_offloader(
    given: Callable[[nn.Module], nn.Module], made: Copy
) -> None:
    model = Model()
    plain = copy.deepcopy(model)
    with lighterage.offload(given(model), min_bytes=64, keep_last=0) as offloader:
        train_step(model, 9)
        model.zero_grad()
        twin = made(model)
        assert [type(m) for m in twin.modules()] == [type(m) for m in plain.modules()]
        assert not any("lighterage" in repr(type(m).__mro__) for m in twin.modules())
        before = offloader.stats(total=True).bytes_out
        assert before > 0
        assert_same(train(plain, train_step, plain, 2), train(twin, train_step, twin, 2))
        assert offloader.stats(total=True).bytes_out == before
        train_step(model, 9)
        assert offloader.stats(total=True).bytes_out > before
        assert_nothing_left(offloader)


def test_a_shallow_copy_is_of_the_original_class() -> None:
    model = Model()
    with lighterage.offload(model.layers, min_bytes=64):
        twin = copy.copy(model.layers[0])
        assert type(twin) is Block
        assert twin.up is model.layers[0].up
        assert isinstance(model.layers[0], Block)


def test_a_copy_made_between_forward_and_backward_disturbs_neither() -> None:
    def step(model: nn.Module, seed: int) -> torch.Tensor:
        loss = loss_of(model, seed)
        twin = copy.deepcopy(model)
        other = loss_of(twin, seed)
        loss.backward()
        other.backward()
        for a, b in zip(model.parameters(), twin.parameters(), strict=True):
            assert same_bits(a.grad, b.grad)
        return loss.detach()

    compare(Model, given=identity, step=step, keep_last=0)


@pytest.mark.filterwarnings("ignore:.*belongs to another offloader already:UserWarning")
@every_copy
def test_a_copy_under_two_offloaders_is_free_of_both(made: Copy) -> None:
    model = Model()
    with lighterage.offload(model.layers, min_bytes=64), lighterage.offload(model, min_bytes=64):
        twin = made(model)
        assert type(twin) is Model
        assert all(type(layer) is Block for layer in twin.layers)


def test_a_copy_can_be_offloaded_by_itself() -> None:
    model = Model()
    with lighterage.offload(model, min_bytes=64, keep_last=0) as first:
        twin = copy.deepcopy(model)
        with lighterage.offload(twin, min_bytes=64, keep_last=0) as second:
            loss, other = loss_of(model, 0), loss_of(twin, 0)
            loss.backward()
            other.backward()
            assert first.stats().bytes_out == second.stats().bytes_out > 0
            assert_nothing_left(first)
            assert_nothing_left(second)
        for a, b in zip(model.parameters(), twin.parameters(), strict=True):
            assert same_bits(a.grad, b.grad)


def test_an_averaged_model_follows_training_as_without_offload() -> None:
    averages: list[dict[str, torch.Tensor]] = []

    def follow(model: nn.Module) -> nn.Module:
        ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))

        def update(_: nn.Module, __: object) -> None:
            if torch.is_grad_enabled():
                ema.update_parameters(model)
                with torch.no_grad():
                    ema(batch(0))
                averages.append({name: t.clone() for name, t in ema.module.state_dict().items()})

        model.register_forward_pre_hook(update)
        return model

    compare(Model, given=identity, after=follow, keep_last=0)
    for a, b in zip(averages[:3], averages[3:], strict=True):
        assert all(same_bits(a[name], b[name]) for name in a)


def test_names_and_state_dict_of_an_offloaded_model_are_as_before() -> None:
    model = Model()
    before = (
        repr(model),
        list(model.state_dict()),
        [n for n, _ in model.named_modules()],
        vars(model.layers[0]).keys(),
    )
    with lighterage.offload(model, min_bytes=64):
        assert before == (
            repr(model),
            list(model.state_dict()),
            [n for n, _ in model.named_modules()],
            vars(model.layers[0]).keys(),
        )


# --- the same module under several hands --------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.*belongs to another offloader already:UserWarning")
@pytest.mark.parametrize("first_closed", [0, 1])
@pytest.mark.parametrize("given", [(layers_of, layers_of), (layers_of, identity), (identity, identity)])
def test_two_offloaders_of_one_model_close_in_either_order(
    given: tuple[Callable[[nn.Module], nn.Module], ...], first_closed: int
) -> None:
    model = Model()
    plain = copy.deepcopy(model)
    expected = train(plain, train_step, plain, 3)
    offloaders = [lighterage.offload(g(model), min_bytes=64, keep_last=0) for g in given]

    def step(model: nn.Module, seed: int) -> torch.Tensor:
        loss = train_step(model, seed)
        if seed < 2:
            offloaders[first_closed if seed == 0 else 1 - first_closed].close()
        return loss

    assert_same(expected, train(model, step, model, 3))
    assert sum(o.stats(total=True).bytes_out for o in offloaders) > 0
    for offloader in offloaders:
        assert_nothing_left(offloader)
    assert type(model) is Model
    assert all(type(layer) is Block for layer in model.layers)


def test_closing_gives_the_classes_back_and_moves_nothing_more() -> None:
    model = Model()
    offloader = lighterage.offload(model, min_bytes=64, keep_last=0)
    assert type(model.layers[0]) is not Block
    train_step(model, 0)
    offloader.close()
    assert type(model) is Model
    assert all(type(layer) is Block for layer in model.layers)
    moved = offloader.stats(total=True).bytes_out
    train_step(model, 1)
    assert offloader.stats(total=True).bytes_out == moved > 0


def test_a_model_can_be_offloaded_anew_after_close() -> None:
    model = Model()
    for _ in range(3):
        with lighterage.offload(model, min_bytes=64, keep_last=0) as offloader:
            train_step(model, 0)
            assert offloader.stats().bytes_out > 0
    assert type(model) is Model


@pytest.mark.parametrize("first", ["offload", "parametrize"])
def test_parametrized_layers_give_the_same_bits(first: str) -> None:
    def normed(model: nn.Module) -> nn.Module:
        for layer in layers_of(model):
            parametrizations.weight_norm(layer.up)
            parametrize.register_parametrization(layer.down, "weight", Doubled())
        return model

    def listed(model: nn.Module) -> nn.Module:
        return nn.ModuleList(m for layer in model.layers for m in (layer.up, layer.down))

    before, after = (identity, normed) if first == "offload" else (normed, identity)
    run = compare(Model, given=listed, before=before, after=after, keep_last=0)
    layer = run.offloaded.layers[0]
    assert isinstance(layer.up, nn.Linear)
    parametrize.remove_parametrizations(layer.down, "weight")
    assert not parametrize.is_parametrized(layer.down)


class Doubled(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 2


def test_replicas_as_data_parallel_makes_them_are_offloaded_in_their_threads() -> None:
    def step(model: nn.Module, seed: int) -> torch.Tensor:
        losses: list[torch.Tensor] = [torch.empty(0)] * 2
        replicas = [replicate(model) for _ in losses]

        def work(rank: int) -> None:
            losses[rank] = loss_of(replicas[rank], 10 * seed + rank)

        threads = [threading.Thread(target=work, args=(rank,)) for rank in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        loss = torch.stack(losses).sum()
        loss.backward()
        return loss.detach()

    run = compare(Model, given=identity, step=step, keep_last=0)
    assert {s.runs for s in run.report.sections if s.name == "layers.0"} == {2}


def replicate(module: nn.Module) -> nn.Module:
    """As torch.nn.parallel.replicate does it: shallow replicas, parameters that are copies with a gradient path."""
    replica = module._replicate_for_data_parallel()
    for name, child in module.named_children():
        setattr(replica, name, replicate(child)) if name.isidentifier() else replica.add_module(name, replicate(child))
    for name, parameter in module.named_parameters(recurse=False):
        setattr(replica, name, parameter * 1)
    return replica


# --- fork ---------------------------------------------------------------------------------------------------------

PRELUDE = """
import gc, os, sys, torch, lighterage
from torch import nn
torch.manual_seed(0)
model = nn.Sequential(*(nn.Sequential(nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 32)) for _ in range(4)))
x = torch.randn(16, 32)

def grads():
    model.zero_grad()
    loss = model(x).square().sum()
    loss.backward()
    return [loss.detach()] + [p.grad.clone() for p in model.parameters()]

def same(a, b):
    return all(torch.equal(p, q) for p, q in zip(a, b, strict=True))

def in_child(work):
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            work()
            sys.stdout.flush()
            code = 0
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", flush=True)
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

expected = grads()
offloader = lighterage.offload(model, min_bytes=64, keep_last=0, release_after=0)
assert same(grads(), expected)
moved = offloader.stats(total=True).bytes_out
assert moved > 0
"""


def run_alone(program: str) -> str:
    """The output of a fresh process: a fork of this one would take its threads' locks along."""
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore::DeprecationWarning"}
    ran = subprocess.run(
        [sys.executable, "-c", PRELUDE + program], capture_output=True, text=True, timeout=60, env=env, check=False
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran.stdout


def test_a_forked_child_runs_forward_and_backward_with_the_offloader_inert() -> None:
    out = run_alone("""
def work():
    assert same(grads(), expected)
    assert offloader.stats(total=True).bytes_out == moved
    gc.collect()

assert in_child(work) == 0
assert same(grads(), expected)
assert offloader.stats(total=True).bytes_out > moved
assert offloader.stats().host_bytes_in_use == 0
offloader.close()
print("parent went on")
""")
    assert out.strip() == "parent went on"


def test_backward_in_a_child_forked_after_forward_is_a_clear_error_and_the_parent_goes_on() -> None:
    out = run_alone("""
model.zero_grad()
loss = model(x).square().sum()
assert in_child(loss.backward) == 1
loss.backward()
assert same([loss.detach()] + [p.grad for p in model.parameters()], expected)
del loss
assert offloader.stats().host_bytes_in_use == 0
print("parent went on")
""")
    error, parent = out.strip().splitlines()
    assert error.startswith("OffloadError: ")
    assert "fork" in error and "forward" in error
    assert parent == "parent went on"


def test_a_forked_child_that_drops_a_graph_or_closes_disturbs_nothing_of_its_parent() -> None:
    out = run_alone("""
model.zero_grad()
loss = model(x).square().sum()

def work():
    global loss
    del loss
    gc.collect()
    offloader.close()
    assert same(grads(), expected)

assert in_child(work) == 0
loss.backward()
assert same([loss.detach()] + [p.grad for p in model.parameters()], expected)
print("parent went on")
""")
    assert out.strip() == "parent went on"


def test_workers_of_a_data_loader_disturb_nothing() -> None:
    out = run_alone("""
class Data(torch.utils.data.Dataset):
    def __len__(self):
        return 8
    def __getitem__(self, index):
        with torch.no_grad():
            return x + index, model(x).sum()

for data, _ in torch.utils.data.DataLoader(Data(), num_workers=2, batch_size=2):
    loss = model(data[0]).square().sum()
    loss.backward()
    del loss
assert same(grads(), expected)
assert offloader.stats().host_bytes_in_use == 0
offloader.close()
print("done")
""")
    assert out.strip() == "done"


def test_a_process_that_never_closes_ends_at_once_and_quietly() -> None:
    start = time.monotonic()
    out = run_alone("""
loss = model(x).square().sum()
print("end")
""")
    assert out.strip() == "end"
    assert time.monotonic() - start < 40


# --- what is left -------------------------------------------------------------------------------------------------


def lanes() -> list[threading.Thread]:
    return [t for t in threading.enumerate() if t.name.startswith("lighterage")]


def files() -> int:
    return len(os.listdir("/proc/self/fd"))


@contextlib.contextmanager
def nothing_stays() -> Iterator[None]:
    """Demand that threads and file descriptors are as many afterwards."""
    gc.collect()
    threads, descriptors = len(lanes()), files()
    yield
    gc.collect()
    deadline = time.monotonic() + 5
    while (len(lanes()) > threads or files() > descriptors) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert len(lanes()) <= threads, lanes()
    assert files() <= descriptors


def test_close_ends_the_threads_and_closes_the_files() -> None:
    with nothing_stays():
        model = Model()
        with lighterage.offload(model, min_bytes=64, keep_last=0):
            train_step(model, 0)
            assert lanes()


@pytest.mark.parametrize("dropped_with_a_live_graph", [False, True])
def test_dropping_the_model_and_the_offloader_leaves_no_thread_and_no_file(dropped_with_a_live_graph: bool) -> None:
    with nothing_stays():
        model = Model()
        offloader = lighterage.offload(model, min_bytes=64, keep_last=0)
        train_step(model, 0)
        loss = loss_of(model, 1) if dropped_with_a_live_graph else None
        watched = [weakref.ref(model), weakref.ref(offloader), weakref.ref(model.layers[0])]
        del model, offloader, loss
        gc.collect()
        assert [ref() for ref in watched] == [None] * 3


def test_a_graph_that_outlives_model_and_offloader_still_runs_backward() -> None:
    plain = Model()
    model = copy.deepcopy(plain)
    x = batch(0).requires_grad_()
    (expected,) = torch.autograd.grad(plain(x).square().sum(), x)
    with nothing_stays():
        offloader = lighterage.offload(model, min_bytes=64, keep_last=0)
        loss = model(x).square().sum()
        del model, offloader
        gc.collect()
        (got,) = torch.autograd.grad(loss, x)
        assert same_bits(got, expected)
        del loss


def test_an_offloader_that_nobody_holds_goes_on_with_its_model() -> None:
    plain = Model()
    model = copy.deepcopy(plain)
    expected = train(plain, train_step, plain, 2)
    lighterage.offload(model, min_bytes=64, keep_last=0)
    gc.collect()
    assert type(model) is not Model
    assert_same(expected, train(model, train_step, model, 2))
    assert lanes()


def test_many_offloaders_one_after_another_leave_nothing(tmp_path: Path) -> None:
    with nothing_stays():
        for index in itertools.islice(itertools.cycle([True, False]), 10):
            model = Model(num_layers=2)
            offloader = lighterage.offload(model, min_bytes=64, keep_last=0, disk_dir=tmp_path)
            train_step(model, 0)
            if index:
                offloader.close()
        del model, offloader
        gc.collect()
    assert list(tmp_path.iterdir()) == []


# --- several devices ----------------------------------------------------------------------------------------------


@pytest.mark.gpu
# PyTorch's own, the first time that a thread of its backward meets cuBLAS.
@pytest.mark.filterwarnings("ignore:Attempting to run cuBLAS:UserWarning")
def test_a_model_over_several_devices_gives_the_same_bits() -> None:
    if torch.cuda.device_count() > 1:
        devices = [torch.device("cuda", 0), torch.device("cuda", 1)] * 2
    else:
        devices = [torch.device("cuda"), torch.device("cpu")] * 2

    class Spread(Model):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.stem(x).relu()
            for layer, device in zip(self.layers, devices, strict=True):
                x = layer(x.to(device))
            return self.head(x.to("cpu")).log_softmax(-1)

    def make() -> nn.Module:
        model = Spread(width=64)
        for layer, device in zip(model.layers, devices, strict=True):
            layer.to(device)
        return model

    run = compare(make, given=identity, keep_last=0)
    moved = {s.name: s.bytes_out for s in run.report.sections}
    assert moved["layers.0"] > 0
    if devices[1].type == "cuda":
        assert moved["layers.1"] > 0
