"""The demo: it finds what differs, sees what is freed, and runs from end to end."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from lighterage.cli import demo_run, demo_train, main
from lighterage.cli.demo_config import DemoConfig
from lighterage.cli.demo_measure import LiveBytes, SavedAllocations, StepClock, over_time
from lighterage.cli.demo_model import Decoder
from lighterage.cli.demo_plan import draw_planned_step
from lighterage.cli.demo_moe import RECIPES
from lighterage.cli.demo_text import batches, standard_library_text
from lighterage.cli.demo_train import RunResult, digest, train

TINY = DemoConfig(steps=3, layers=2, hidden=64, seq=16, batch=2, keep_last=1)
DENSE = dataclasses.replace(TINY, model="dense", recipe="none")


@pytest.fixture(scope="module", params=[TINY, DENSE], ids=["moe", "dense"])
def plain(request) -> RunResult:
    return train(request.param, standard_library_text(4096), offload=False, on_step=lambda step, loss: None)


def test_text_is_the_same_each_time_and_is_python():
    text = standard_library_text(50_000)
    assert len(text) == 50_000
    assert torch.equal(text, standard_library_text(50_000))
    assert b"import " in bytes(text.tolist())


def test_text_leaves_out_packages_and_tests(tmp_path):
    (tmp_path / "site-packages").mkdir()
    (tmp_path / "site-packages" / "a.py").write_text("installed")
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "b.py").write_text("tests")
    (tmp_path / "z.py").write_text("second")
    (tmp_path / "c.py").write_text("first ")
    assert bytes(standard_library_text(root=tmp_path).tolist()) == b"first second"


def test_text_of_an_empty_library_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no Python sources"):
        standard_library_text(root=tmp_path)


def test_batches_repeat_with_the_seed_and_shift_by_one():
    text = standard_library_text(1000)
    here, following = next(batches(text, batch=3, seq=8, seed=5))
    again, _ = next(batches(text, batch=3, seq=8, seed=5))
    other, _ = next(batches(text, batch=3, seq=8, seed=6))
    assert torch.equal(here, again)
    assert not torch.equal(here, other)
    assert torch.equal(here[:, 1:], following[:, :-1])


def test_the_clock_passes_every_place_of_a_step():
    model = Decoder(layers=3, width=64, tokens=8)
    clock = StepClock(list(model.layers), torch.device("cpu"))
    text = torch.randint(256, (1, 9))
    for _ in range(2):
        with clock.step():
            loss = model(text[:, :-1], text[:, 1:])
            clock.mark()
            loss.backward()
        places = clock.places_ms()
        assert len(places) == 2 * 3 + 3
        assert places == sorted(places)
    assert not any(layer._forward_hooks or layer._forward_pre_hooks for layer in model.layers)


def test_live_bytes_counts_what_a_step_made_and_nothing_else():
    clock = StepClock([], torch.device("cpu"))
    before = torch.zeros(1000)
    live = LiveBytes(clock, torch.device("cpu"), [before])
    with live, clock.step():
        made = before + 1
        view = made[10:]
        del made
        view.add_(1)
        before.mul_(2)
        assert live.samples[-1][1] == 4000
        del view
        before.add_(1)
    assert live.samples[-1][1] == 0


def test_live_bytes_sees_a_storage_emptied_in_place():
    clock = StepClock([], torch.device("cpu"))
    live = LiveBytes(clock, torch.device("cpu"), [])
    with live, clock.step():
        made = torch.ones(1000)
        made.untyped_storage().resize_(0)
        torch.ones(1)
    assert live.samples[-1][1] == 4


def test_live_bytes_sees_memory_taken_below_the_dispatcher():
    """The offloader brings bytes back without a word to dispatch modes; a peak without them would flatter it."""
    clock = StepClock([], torch.device("cpu"))
    live = LiveBytes(clock, torch.device("cpu"), [])
    with live, clock.step():
        with torch._C._DisableTorchDispatch():
            hidden = torch.empty(1000)
        torch.ones(1)
    assert live.samples[-1][1] == 4004
    del hidden


def test_the_watched_step_sees_what_comes_back(monkeypatch):
    """Backward needs each layer's saved tensors on the device, so no layer's backward can hold less than they are."""
    seen = []

    def keep_samples(samples, places_ms):
        seen.extend(samples)
        return over_time(samples, places_ms)

    monkeypatch.setattr(demo_train, "over_time", keep_samples)
    sizes = DemoConfig(steps=3, layers=4, hidden=128, seq=128, batch=4, keep_last=1)
    moved = train(sizes, standard_library_text(100_000), offload=True, on_step=lambda step, loss: None)
    assert moved.stats is not None
    bytes_a_layer = moved.stats.bytes_in / (sizes.layers - sizes.keep_last)
    # The first layer is the last that backward comes to: told by its place in the step, which no clock can move.
    first_layer = 2 * sizes.layers + 1
    at_the_end = [nbytes for place, nbytes in seen if place == first_layer]
    assert max(at_the_end) > bytes_a_layer


def test_samples_spread_over_the_times_of_their_places():
    times, nbytes = over_time([(0, 5), (0, 7), (1, 9)], [0.0, 10.0, 30.0])
    assert times == [2.5, 7.5, 20.0]
    assert nbytes == [5, 7, 9]


def test_digest_tells_every_bit():
    zero = torch.zeros(3)
    assert digest(zero) == digest(torch.zeros(3))
    assert digest(zero) != digest(-zero)
    assert digest(torch.tensor([float("nan")])) == digest(torch.tensor([float("nan")]))


def test_the_model_learns(plain):
    assert plain.losses[-1] < plain.losses[0]


@pytest.mark.parametrize("config", [TINY, DENSE], ids=["moe", "dense"])
def test_equal_runs_have_no_difference(config):
    runs = [
        train(config, standard_library_text(4096), offload=False, on_step=lambda step, loss: None) for _ in range(2)
    ]
    assert demo_run.compare(*runs) == []


@pytest.mark.parametrize("recipe", sorted(RECIPES))
def test_every_recipe_learns_with_equal_bits_and_one_copy_a_buffer(recipe):
    config = DemoConfig(recipe=recipe, steps=3, layers=2, hidden=128, seq=128, batch=2, experts=4, keep_last=1)
    text = standard_library_text(100_000)
    plain, moved = (train(config, text, offload=offload, on_step=lambda step, loss: None) for offload in (False, True))
    assert demo_run.compare(plain, moved) == []
    assert plain.losses[-1] < plain.losses[0]
    assert moved.stats is not None
    assert moved.stats.copies_out == moved.stats.copies_in == plain.num_allocations > 0


def test_saved_allocations_are_those_of_the_layers_that_are_named():
    layers = torch.nn.ModuleList(torch.nn.Linear(64, 64, bias=False) for _ in range(3))
    saved = SavedAllocations(layers, layers[:2], min_bytes=1024)
    with saved:
        y = torch.randn(64, 64)
        for layer in layers:
            y = layer(y).relu()
    assert saved.count == 2, "the inputs of two layers; neither weights nor what is saved between layers"
    y.sum().backward()


def test_each_kind_of_difference_is_told(plain):
    losses = [*plain.losses[:-1], plain.losses[-1] + 1e-7]
    gradients = [dict(step) for step in plain.gradients]
    gradients[1]["head.weight"] = "other"
    weights = {**plain.weights, "norm.weight": "other"}
    wrong = dataclasses.replace(plain, losses=losses, gradients=gradients, weights=weights)
    loss, gradient, weight = demo_run.compare(plain, wrong)
    assert "loss of step 3" in loss
    assert "step 2" in gradient
    assert "head.weight" in gradient
    assert "norm.weight" in weight


def test_demo_runs_to_the_end(tmp_path, capsys):
    assert main(["demo", "--quick", "--device", "cpu", "--steps", "3", "--out", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert "bitwise equal" in text
    assert "Same bits" in text
    assert (tmp_path / "activation_bytes.png").read_bytes().startswith(b"\x89PNG")
    kept = json.loads((tmp_path / "demo.json").read_text())
    assert kept["differences"] == []
    assert kept["with_offload"]["peak_bytes"] < kept["without_offload"]["peak_bytes"]
    assert kept["with_offload"]["stats"]["bytes_out"] > 0


def test_demo_fails_when_the_bits_differ(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(demo_run, "compare", lambda plain, moved: ["the loss of step 1 is another."])
    assert main(["demo", "--model", "dense", "--quick", "--device", "cpu", "--steps", "3", "--out", str(tmp_path)]) == 1
    assert "FAILED: the loss of step 1 is another." in capsys.readouterr().out


def test_the_dense_model_is_still_there(tmp_path, capsys):
    sizes = ["--hidden", "64", "--seq", "64", "--steps", "3"]
    assert main(["demo", "--model", "dense", "--quick", "--device", "cpu", *sizes, "--out", str(tmp_path)]) == 0
    assert "experts" not in capsys.readouterr().out


def test_demo_fails_when_an_allocation_takes_two_copies(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(SavedAllocations, "count", 5)
    assert main(["demo", "--model", "dense", "--quick", "--device", "cpu", "--steps", "3", "--out", str(tmp_path)]) == 1
    assert "copies were made one way, for 5 allocations" in capsys.readouterr().out


def test_demo_fails_when_nothing_is_freed(tmp_path, capsys):
    # Width 64 and 8 tokens: every allocation is under the smallest size that is worth a copy.
    sizes = ["--model", "dense", "--hidden", "64", "--seq", "8", "--batch", "1", "--steps", "3"]
    assert main(["demo", "--quick", "--device", "cpu", *sizes, "--out", str(tmp_path)]) == 1
    assert "nothing was freed: the offloader moved no bytes" in capsys.readouterr().out


def test_plot_trains_under_a_plan_and_draws_it(tmp_path):
    losses = []
    config = dataclasses.replace(DENSE, layers=4, plot=True, out=tmp_path)
    planned = draw_planned_step(config, standard_library_text(4096), on_step=lambda _, loss: losses.append(loss))
    assert planned is not None and planned.why
    assert planned.figure.read_bytes().startswith(b"\x89PNG")
    assert len(losses) >= 4
