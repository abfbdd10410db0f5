"""Operations, and the container that hands each its extra inputs."""

from __future__ import annotations

from collections.abc import Sequence as Many

import torch
from torch import nn

from lighterage import ops as lighterage_ops
from lighterage.compat.transformer_engine.checkpoints import accept_extra_state
from lighterage.compat.transformer_engine.honesty import MAIN_GRAD, RNG_TRACKER, TENSOR_PARALLEL, refuse
from lighterage.compat.transformer_engine.linear import device_of
from lighterage.compat.transformer_engine.quantized_regions import RegionRecipe
from lighterage.formats import Splits
from lighterage.nn import GroupedLinear as _GroupedLinear
from lighterage.nn import Linear as _Linear


class Linear(_Linear):
    """y = x w^T + bias, quantized as the `autocast` region says."""

    num_extra_inputs = 0

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        tensor_parallel_mode: str | None = None,
        tensor_parallel_group: object = None,
        sequence_parallel: bool = False,
        rng_state_tracker_function: object = None,
        accumulate_into_main_grad: bool = False,
    ) -> None:
        """`bias`, `device`, `dtype`: of the parameters, initialised as `torch.nn.Linear` does.

        Raises: ValueError: an option that is not here.
        """
        refuse(
            "ops.Linear",
            {
                "tensor_parallel_mode": (tensor_parallel_mode, None, TENSOR_PARALLEL),
                "tensor_parallel_group": (tensor_parallel_group, None, TENSOR_PARALLEL),
                "sequence_parallel": (sequence_parallel, False, TENSOR_PARALLEL),
                "rng_state_tracker_function": (rng_state_tracker_function, None, RNG_TRACKER),
                "accumulate_into_main_grad": (accumulate_into_main_grad, False, MAIN_GRAD),
            },
        )
        super().__init__(in_features, out_features, bias=bias, device=device_of(device), dtype=dtype)
        self._region = RegionRecipe()
        accept_extra_state(self)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(*, in_features) to (*, out_features)."""
        return lighterage_ops.linear(x, self.weight, self.bias, recipe=self._region.now(self))


class GroupedLinear(_GroupedLinear):
    """`num_groups` linear layers, each over its own rows of one input; the sizes are an extra input."""

    num_extra_inputs = 1

    def __init__(
        self,
        num_groups: int,
        in_features: int,
        out_features: int,
        *,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        rng_state_tracker_function: object = None,
        accumulate_into_main_grad: bool = False,
    ) -> None:
        """`bias`, `device`, `dtype`: of the parameters `weight0`, … and `bias0`, …, initialised as `torch.nn.Linear`.

        Raises: ValueError: an option that is not here.
        """
        refuse(
            "ops.GroupedLinear",
            {
                "rng_state_tracker_function": (rng_state_tracker_function, None, RNG_TRACKER),
                "accumulate_into_main_grad": (accumulate_into_main_grad, False, MAIN_GRAD),
            },
        )
        super().__init__(
            num_groups,
            in_features,
            out_features,
            bias=bias,
            device=device_of(device),
            dtype=dtype,
            single_weight=False,
        )
        self._region = RegionRecipe()
        accept_extra_state(self)

    @property
    def num_groups(self) -> int:
        """How many linear layers it is."""
        return self.num_gemms

    def forward(self, x: torch.Tensor, split_sizes: Many[int] | torch.Tensor | Splits) -> torch.Tensor:
        """(*, in_features) to (*, out_features).

        split_sizes: rows of each layer, as an integer tensor on the device, for which nothing waits, or as integers.
        """
        return lighterage_ops.grouped_linear(
            x,
            self._separate("weight"),
            split_sizes,
            bias=self._separate("bias") if self.use_bias else None,
            recipe=self._region.now(self),
        )


class Sequential(nn.Sequential):
    """Modules in a row: `sequential(x, *extra_inputs)`.

    Each operation takes as many of the extra inputs, in order, as its `num_extra_inputs` says, a `Sequential` inside of
    this one as many as its operations take, and any other module none. Two `GroupedLinear` in a row so take the sizes
    twice. Nothing is fused.
    """

    @property
    def num_extra_inputs(self) -> int:
        """How many extra inputs its operations take."""
        return sum(getattr(module, "num_extra_inputs", 0) for module in self)

    def forward(self, input: object, *extra_inputs: object) -> object:  # noqa: A002 - nn.Sequential's name
        """Raises: ValueError: too few or too many extra inputs."""
        wanted = self.num_extra_inputs
        if len(extra_inputs) != wanted:
            raise ValueError(
                f"the operations of this Sequential take {wanted} extra inputs; got {len(extra_inputs)}. A "
                "GroupedLinear takes its split sizes: sequential(x, split_sizes)."
            )
        x = input
        left = list(extra_inputs)
        for module in self:
            num_own = getattr(module, "num_extra_inputs", 0)
            own, left = left[:num_own], left[num_own:]
            x = module(x, *own)
        return x
