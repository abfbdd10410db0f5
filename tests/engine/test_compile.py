"""Claims about torch.compile: layers and whole models compile as before, once, and give the bits they gave."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters
from torch.utils.checkpoint import checkpoint

import lighterage
from tests.engine.twin import (
    CleanBlock,
    Model,
    Run,
    assert_nothing_left,
    batch,
    compare,
    identity,
    layers_of,
    loss_of,
    same_bits,
    stood_aside,
    train_step,
)

Prepare = Callable[[nn.Module], nn.Module]

backends = pytest.mark.parametrize("backend", ["eager", "aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    # Compiling in this process is quicker for a handful of tiny graphs than starting workers is.
    with torch._inductor.config.patch(compile_threads=1):
        yield
    torch._dynamo.reset()


def make_clean() -> nn.Module:
    return Model(num_layers=3, block=CleanBlock)


def each_layer_wrapped(backend: str, fullgraph: bool = True) -> Prepare:
    def prepare(model: nn.Module) -> nn.Module:
        torch._dynamo.reset()
        layers = layers_of(model)
        for index, layer in enumerate(layers):
            layers[index] = torch.compile(layer, backend=backend, fullgraph=fullgraph)
        return model

    return prepare


def each_layer_in_place(backend: str, fullgraph: bool = True) -> Prepare:
    def prepare(model: nn.Module) -> nn.Module:
        torch._dynamo.reset()
        for layer in layers_of(model):
            layer.compile(backend=backend, fullgraph=fullgraph)
        return model

    return prepare


def whole_model(backend: str) -> Prepare:
    def prepare(model: nn.Module) -> nn.Module:
        torch._dynamo.reset()
        return torch.compile(model, backend=backend)

    return prepare


def whole_model_in_place(backend: str) -> Prepare:
    def prepare(model: nn.Module) -> nn.Module:
        torch._dynamo.reset()
        model.compile(backend=backend)
        return model

    return prepare


def counting_graphs(made: list[int]) -> Callable[[nn.Module, int], torch.Tensor]:
    """A step that writes down how many graphs there were at its end."""

    def step(model: nn.Module, seed: int) -> torch.Tensor:
        loss = train_step(model, seed)
        made.append(counters["stats"]["unique_graphs"])
        return loss

    return step


def compared(prepare: Prepare, before: bool, make: Callable[[], nn.Module] = make_clean, **options: object) -> Run:
    """Compare with `prepare` done before or after offload(), and demand that only the first step compiled."""
    made: list[int] = []
    run = compare(
        make,
        before=prepare if before else identity,
        after=identity if before else prepare,
        step=counting_graphs(made),
        steps=4,
        keep_last=0,
        **options,  # type: ignore[arg-type]
    )
    plain, offloaded = made[:4], made[4:]
    assert offloaded[0] > 0, "nothing was compiled"
    assert plain[0] == plain[-1]
    assert offloaded[0] == offloaded[-1], f"compiled again in later steps: {offloaded}"
    return run


before_or_after = pytest.mark.parametrize("before", [True, False], ids=["compile then offload", "offload then compile"])


@backends
@before_or_after
@pytest.mark.parametrize("how", [each_layer_wrapped, each_layer_in_place])
def test_each_layer_compiled_as_a_full_graph_gives_the_same_bits_and_compiles_once(
    how: Callable[[str], Prepare], before: bool, backend: str
) -> None:
    compared(how(backend), before)


@before_or_after
def test_layers_of_a_whole_model_that_was_given_compile_once(before: bool) -> None:
    compared(each_layer_in_place("aot_eager"), before, given=identity)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@before_or_after
@pytest.mark.parametrize("how", [whole_model, whole_model_in_place])
@pytest.mark.parametrize("given", [layers_of, identity], ids=["layers", "whole model"])
def test_a_compiled_whole_model_gives_the_same_bits_and_compiles_once(
    how: Callable[[str], Prepare], given: Callable[[nn.Module], nn.Module], before: bool, backend: str
) -> None:
    compared(how(backend), before, given=given)


class CutModel(Model):
    """A whole model whose graph is cut where its layers begin, with and without offload."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x).relu()
        for layer in self.layers:
            torch._dynamo.graph_break()
            x = layer(x)
        return self.head(x).log_softmax(-1)


@pytest.mark.slow
@before_or_after
def test_a_whole_model_compiled_by_inductor_gives_the_bits_of_the_same_graphs_without_offload(before: bool) -> None:
    # Inductor rounds by what it fuses, so the bits are those of a model whose graph is cut at the same places.
    compared(whole_model("inductor"), before, make=lambda: CutModel(num_layers=3, block=CleanBlock))


def test_a_whole_model_compiled_with_fullgraph_says_that_a_section_cuts_the_graph() -> None:
    model = make_clean()
    with lighterage.offload(layers_of(model), min_bytes=64):
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        with pytest.raises(torch._dynamo.exc.Unsupported, match="section"):
            loss_of(compiled, 0)


def test_checkpointed_compiled_layers_recompute_and_give_the_same_bits() -> None:
    class Checkpointed(Model):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.stem(x).relu()
            for layer in self.layers:
                x = checkpoint(layer, x, use_reentrant=False)
            return self.head(x).log_softmax(-1)

    make = partial(Checkpointed, num_layers=3, block=CleanBlock)
    run = compared(each_layer_in_place("aot_eager"), True, make=make, given=identity)
    assert stood_aside(run.report, "checkpoint") >= 3


def test_a_named_section_inside_a_compiled_function_gives_the_same_bits() -> None:
    plain = make_clean()
    model = make_clean()
    model.load_state_dict(plain.state_dict())
    train_step(plain, 0)
    with lighterage.offload([model.stem], min_bytes=64, keep_last=0) as offloader:

        def forward(x: torch.Tensor) -> torch.Tensor:
            x = model.stem(x).relu()
            with offloader.section("trunk"):
                for layer in model.layers:
                    x = layer(x)
            return model.head(x).log_softmax(-1)

        out = torch.compile(forward, backend="aot_eager")(batch(0))
        (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
        assert offloader.stats().bytes_out > 0
        assert_nothing_left(offloader)
    for a, b in zip(plain.parameters(), model.parameters(), strict=True):
        assert same_bits(a.grad, b.grad)


def test_dynamo_is_not_imported_by_a_program_that_compiles_nothing() -> None:
    program = """
import sys, torch, lighterage
model = torch.nn.Sequential(*(torch.nn.Linear(64, 64) for _ in range(3)))
with lighterage.offload(model, min_bytes=64, keep_last=0) as offloader:
    y = model(torch.ones(8, 64))
    lighterage.mark_not_offload(y)
    y.sum().backward()
    assert offloader.stats().bytes_out > 0
print("torch._dynamo" in sys.modules)
"""
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "False", ran.stdout + ran.stderr
