"""`Linear` and `GroupedLinear` with Transformer Engine's arguments, state dict and initial values."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn

from lighterage import nn as lighterage_nn
from lighterage import ops
from lighterage.compat.transformer_engine.checkpoints import accept_extra_state
from lighterage.compat.transformer_engine.honesty import (
    MAIN_GRAD,
    OVERLAP,
    RNG_TRACKER,
    TENSOR_PARALLEL,
    refuse,
    warn_not_honoured,
)
from lighterage.compat.transformer_engine.quantized_regions import RegionRecipe
from lighterage.formats import Splits

InitMethod = Callable[[torch.Tensor], object]
Output = torch.Tensor | tuple[torch.Tensor, torch.Tensor | None] | tuple[torch.Tensor, list[torch.Tensor] | None]
_INIT_STD = 0.023


class Linear(lighterage_nn.Linear):
    """y = x w^T + bias, quantized as the `autocast` region says that it runs in."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        sequence_parallel: bool = False,
        fuse_wgrad_accumulation: bool = False,
        tp_group: object = None,
        tp_size: int = 1,
        get_rng_state_tracker: object = None,
        init_method: InitMethod | None = None,
        bias: bool = True,
        return_bias: bool = False,
        params_dtype: torch.dtype | None = None,
        parallel_mode: str | None = None,
        parameters_split: object = None,
        device: torch.device | str | None = None,
        ub_overlap_ag: bool = False,
        ub_overlap_rs: bool = False,
        ub_overlap_rs_dgrad: bool = False,
        ub_bulk_dgrad: bool = False,
        ub_bulk_wgrad: bool = False,
        ub_name: str | None = None,
        rng_tracker_name: str | None = None,
        delay_wgrad_compute: bool = False,
        symmetric_ar_type: str | None = None,
        save_original_input: bool = False,
        name: str | None = None,
    ) -> None:
        """init_method: fills the weight; a normal distribution of standard deviation 0.023 unless given. Biases are 0.

        return_bias: do not add the bias, but return it beside the output.
        params_dtype: of the parameters; PyTorch's default unless given.
        device: of the parameters; the accelerator unless given, or the CPU where there is none.
        save_original_input: save the input itself and quantize it again in backward.
        ub_name, name: labels, for debugging there; kept as `name`.
        Raises: ValueError: an option that is not here.
        """
        _refuse_parallel("Linear", locals())
        super().__init__(
            in_features,
            out_features,
            bias=bias,
            save_original_input=save_original_input,
            device=device_of(device),
            dtype=params_dtype,
        )
        self.name = name or ub_name
        self.return_bias = return_bias
        self._region = RegionRecipe()
        accept_extra_state(self)
        initialise(self, init_method)

    def forward(  # type: ignore[override]
        self,
        inp: torch.Tensor,
        is_first_microbatch: bool | None = None,
        fp8_output: bool = False,
        fp8_grad: bool = False,
    ) -> Output:
        """(*, in_features) to (*, out_features); with `return_bias` beside the bias, or None without one.

        is_first_microbatch: warned of. Weights are quantized in each forward, with the same result.
        """
        _check_microbatch(is_first_microbatch)
        dtypes = "Outputs and gradients have the dtype of the input."
        refuse("Linear.forward", {"fp8_output": (fp8_output, False, dtypes), "fp8_grad": (fp8_grad, False, dtypes)})
        out = ops.linear(
            inp,
            self.weight,
            None if self.return_bias else self.bias,
            recipe=self._region.now(self),
            save_original_input=self.save_original_input,
        )
        return (out, self.bias) if self.return_bias else out


class GroupedLinear(lighterage_nn.GroupedLinear):
    """`num_gemms` linear layers, each over its own rows of one input, quantized as the `autocast` region says.

    Its parameters are `weight0`, `weight1`, … and `bias0`, …
    """

    def __init__(
        self,
        num_gemms: int,
        in_features: int,
        out_features: int,
        sequence_parallel: bool = False,
        fuse_wgrad_accumulation: bool = False,
        tp_group: object = None,
        tp_size: int = 1,
        get_rng_state_tracker: object = None,
        rng_tracker_name: str | None = None,
        init_method: InitMethod | None = None,
        bias: bool = True,
        return_bias: bool = False,
        params_dtype: torch.dtype | None = None,
        parallel_mode: str | None = None,
        device: torch.device | str | None = None,
        ub_overlap_rs: bool = False,
        ub_overlap_ag: bool = False,
        ub_name: str | None = None,
        delay_wgrad_compute: bool = False,
        save_original_input: bool = False,
        name: str | None = None,
    ) -> None:
        """Arguments as of `Linear`.

        Raises: ValueError: an option that is not here.
        """
        _refuse_parallel("GroupedLinear", locals())
        super().__init__(
            num_gemms,
            in_features,
            out_features,
            bias=bias,
            save_original_input=save_original_input,
            device=device_of(device),
            dtype=params_dtype,
            single_weight=False,
        )
        self.name = name or ub_name
        self.return_bias = return_bias
        self._region = RegionRecipe()
        accept_extra_state(self)
        initialise(self, init_method)

    def forward(  # type: ignore[override]
        self,
        inp: torch.Tensor,
        m_splits: Sequence[int] | torch.Tensor | Splits,
        is_first_microbatch: bool | None = None,
    ) -> Output:
        """(*, in_features) to (*, out_features); with `return_bias` beside the list of biases, or None without any.

        m_splits: rows of each layer, as integers or as an integer tensor on the device, for which nothing waits.
        is_first_microbatch: warned of. Weights are quantized in each forward, with the same result.
        """
        _check_microbatch(is_first_microbatch)
        biases = self._separate("bias") if self.use_bias else None
        out = ops.grouped_linear(
            inp,
            self._separate("weight"),
            m_splits,
            bias=None if self.return_bias else biases,
            recipe=self._region.now(self),
            save_original_input=self.save_original_input,
        )
        return (out, biases) if self.return_bias else out


def device_of(device: torch.device | str | None) -> torch.device | str:
    """`device`, or the accelerator, or the CPU where there is none."""
    return device or torch.accelerator.current_accelerator(check_available=True) or "cpu"


def initialise(module: nn.Module, init_method: InitMethod | None) -> None:
    """Fill weights with `init_method`, or as Transformer Engine does unless told, and biases with zeros."""
    for name, parameter in module.named_parameters(recurse=False):
        if name.startswith("bias"):
            nn.init.zeros_(parameter)
        elif init_method is None:
            nn.init.normal_(parameter, mean=0.0, std=_INIT_STD)
        else:
            with torch.no_grad():
                init_method(parameter)


def _check_microbatch(is_first_microbatch: bool | None) -> None:
    if is_first_microbatch is not None:
        warn_not_honoured(
            f"is_first_microbatch={is_first_microbatch}",
            "weights are quantized in every forward, so that none can be stale; the values are the same.",
            stacklevel=6,  # past nn.Module's own calls
        )


_REFUSED: dict[str, tuple[object, str]] = {
    "sequence_parallel": (False, TENSOR_PARALLEL),
    "tp_group": (None, TENSOR_PARALLEL),
    "tp_size": (1, TENSOR_PARALLEL),
    "parallel_mode": (None, TENSOR_PARALLEL),
    "symmetric_ar_type": (None, TENSOR_PARALLEL),
    "fuse_wgrad_accumulation": (False, MAIN_GRAD),
    "delay_wgrad_compute": (False, "Both gradients are computed in one backward."),
    "get_rng_state_tracker": (None, RNG_TRACKER),
    "rng_tracker_name": (None, RNG_TRACKER),
    "parameters_split": (None, "There is one weight: split it after it was made, or use several layers."),
    "ub_overlap_ag": (False, OVERLAP),
    "ub_overlap_rs": (False, OVERLAP),
    "ub_overlap_rs_dgrad": (False, OVERLAP),
    "ub_bulk_dgrad": (False, OVERLAP),
    "ub_bulk_wgrad": (False, OVERLAP),
}


def _refuse_parallel(owner: str, arguments: dict[str, object]) -> None:
    refuse(owner, {name: (arguments[name], *rule) for name, rule in _REFUSED.items() if name in arguments})
