"""Claims about the memory of parameters and buffers: it is known whatever becomes of a module between two steps."""

from __future__ import annotations

import torch
from torch import nn

import lighterage
from lighterage.engine.modules import Residents, SectionModules


def residents_of(model: nn.Module) -> Residents:
    return Residents(SectionModules(model).all_modules)


def key_of(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


def test_memory_that_a_parameter_was_given_between_two_steps_is_known() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    residents = residents_of(model)
    weight = model[0].weight
    before = weight.data
    weight.data = torch.ones(4, 4)
    residents.refresh()
    assert residents.reason(key_of(weight), weight) == "parameter"
    assert residents.reason(key_of(before), before) is None
    mean = model[1].running_mean
    assert isinstance(mean, torch.Tensor) and residents.reason(key_of(mean), mean) == "buffer"


def test_modules_that_came_and_went_between_two_steps_are_known_and_forgotten() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4)))
    residents = residents_of(model)
    gone = model[1][0].weight  # type: ignore[index]
    model[1][0] = nn.Linear(4, 4)  # type: ignore[index]
    residents.refresh()
    came = model[1][0].weight  # type: ignore[index]
    assert residents.reason(key_of(came), came) == "parameter"
    assert key_of(gone) not in residents.owners


def test_what_is_as_it_was_is_not_entered_anew() -> None:
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(3)))
    model[2].weight = model[0].weight  # tied
    residents = residents_of(model)
    before = dict(residents.owners)
    residents.refresh()
    assert len(before) == 5
    assert all(residents.owners[key] is owner for key, owner in before.items())


def test_parameters_without_memory_are_left_out() -> None:
    model = nn.Sequential(nn.Linear(4, 4, device="meta"), nn.LazyLinear(4))
    assert residents_of(model).owners == {}


def test_parameters_can_be_swapped_while_an_offloader_is_attached() -> None:
    """PyTorch swaps no tensor that has weak references; `Module.to` and `load_state_dict` swap, if told to."""
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    with lighterage.offload(model, keep_last=0, min_bytes=0) as offloader:
        model(torch.randn(2, 4)).sum().backward()
        model.zero_grad()
        before = torch.__future__.get_swap_module_params_on_conversion()
        torch.__future__.set_swap_module_params_on_conversion(True)
        try:
            model.to(torch.float64)
        finally:
            torch.__future__.set_swap_module_params_on_conversion(before)
        model(torch.randn(2, 4, dtype=torch.float64)).sum().backward()
        assert model[0].weight.dtype == torch.float64 and offloader.stats().bytes_out > 0
        weight = model[0].weight
        assert offloader._residents.reason(key_of(weight), weight) == "parameter"
