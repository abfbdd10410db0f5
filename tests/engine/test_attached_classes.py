"""Attaching changes nothing that an author wrote on a module's class, and says so where something is in the way."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import weight_norm

import lighterage
from lighterage import OffloadError


class Counting(nn.Module):
    calls: ClassVar[int] = 0

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        type(self).calls += 1
        y: Tensor = self.inner(x)
        return y


def test_what_a_forward_writes_on_its_class_is_there_for_all_and_after_close() -> None:
    Counting.calls = 0
    layers = nn.Sequential(*(Counting() for _ in range(3)))
    with lighterage.offload(layers, keep_last=0):
        layers(torch.randn(2, 16))
        assert Counting.calls == 3
        assert {type(layer).calls for layer in layers} == {3}
    assert Counting.calls == 3


def test_a_class_with_a_metaclass_of_its_own_is_attached() -> None:
    class Meta(type):
        pass

    class Own(nn.Linear, metaclass=Meta):
        pass

    layers = nn.Sequential(Own(16, 16))
    with lighterage.offload(layers, keep_last=0):
        assert isinstance(type(layers[0]), Meta)
        layers(torch.randn(2, 16)).sum().backward()
    assert type(layers[0]) is Own


def test_a_parametrization_may_come_and_go_while_attached() -> None:
    layers = nn.Sequential(nn.Linear(16, 16))
    with lighterage.offload(layers, keep_last=0):
        weight_norm(layers[0])
        layers(torch.randn(2, 16)).sum().backward()
        parametrize.remove_parametrizations(layers[0], "weight")
        assert isinstance(layers[0].weight, nn.Parameter)
        layers(torch.randn(2, 16)).sum().backward()
    assert "weight" not in vars(nn.Linear) and type(layers[0]) is nn.Linear


def test_taking_away_a_parametrization_from_before_is_refused_and_works_after_close() -> None:
    layers = nn.Sequential(weight_norm(nn.Linear(16, 16)))
    with (
        lighterage.offload(layers, keep_last=0),
        pytest.raises(TypeError, match=r"'weight' cannot be taken .* Close the offloader"),
    ):
        parametrize.remove_parametrizations(layers[0], "weight")
    layers(torch.randn(2, 16)).sum().backward()
    parametrize.remove_parametrizations(layers[0], "weight")
    assert type(layers[0]) is nn.Linear


def test_a_class_that_forbids_subclasses_is_told_by_name_with_a_remedy() -> None:
    class Final(nn.Module):
        def __init_subclass__(cls, **_: Any) -> None:
            raise TypeError("no subclass")

    with pytest.raises(TypeError, match=r"calls of a Final cannot be wrapped.*no subclass.*offloader\.section"):
        lighterage.offload([Final()])


def test_a_second_offloader_on_the_same_modules_is_warned_of_and_takes_over() -> None:
    layers = nn.Sequential(*(nn.Linear(64, 64) for _ in range(3)))

    def step() -> None:
        layers(torch.randn(64, 64)).square().sum().backward()

    first = lighterage.offload(layers, keep_last=0, min_bytes=1)
    with pytest.warns(UserWarning, match="belongs to another offloader already") as caught:
        second = lighterage.offload(layers, keep_last=0, min_bytes=1)
    assert {warning.filename for warning in caught} == {__file__}
    step()
    assert first.stats().copies_out > 0 and second.stats().copies_out == 0
    first.close()
    step()
    assert second.stats().copies_out > 0
    second.close()
    assert type(layers[0]) is nn.Linear


def test_a_section_is_entered_once() -> None:
    with lighterage.offload([nn.Linear(4, 4)]) as offloader:
        section = offloader.section("a")
        with section:
            pass
        with pytest.raises(OffloadError, match=r"offloader\.section\('a'\) was left already"), section:
            pass
        with pytest.raises(OffloadError, match="without having been entered"):
            offloader.section("b").__exit__(None, None, None)
