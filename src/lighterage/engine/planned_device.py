"""Chooses the device on which steps are measured and planned for, and tells of those that are left out of it."""

from __future__ import annotations

import warnings
from collections.abc import Iterable

import torch

from .policy import Policy

_REMEDY = (
    "Give the modules of each device to an offload() of their own, or name keep_last, release_after or prefetch_ahead "
    "to make the plan by hand."
)


def planned_device(policy: Policy, accelerators: Iterable[torch.device], *, stacklevel: int) -> torch.device:
    """The first of `accelerators`, on which the modules are, or the CPU if there are none.

    A plan is made of one device's times and peaks: what is on others moves by it, but is not measured.

    Warns: the modules are on several devices, and a plan is made for them; `stacklevel` as seen from the caller.
    Raises:
        ValueError: the same, and the plan is to keep to a budget, which would hold on one of them alone.
    """
    devices = sorted(accelerators, key=lambda device: (device.type, device.index))
    if not devices:
        return torch.device("cpu")
    if len(devices) > 1 and not policy.by_hand:
        where = " and ".join(str(device) for device in devices)
        if policy.device_budget is not None:
            raise ValueError(
                f"device_budget={policy.device_budget!r} is of one device, and the modules are on {where}. {_REMEDY}"
            )
        warnings.warn(
            f"the modules are on {where}, and a plan is made from what is measured on one device, here {devices[0]}: "
            f"times and peaks of the other{'s' if len(devices) > 2 else ''} are not in it. {_REMEDY}",
            stacklevel=stacklevel + 1,
        )
    return devices[0]
