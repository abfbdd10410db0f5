"""Recipes under Transformer Engine's names and arguments; each is the recipe of `lighterage.recipes` that it asks for.

The environment variables that change defaults there (`NVTE_FP8_BLOCK_SCALING_FP32_SCALES` and the like) are not read:
pass the argument.
"""

from __future__ import annotations

import enum
from typing import Literal, NoReturn

from lighterage import recipes
from lighterage.compat.transformer_engine.honesty import refuse

_ATTENTION = "Attention is in the dtype of its inputs."
_BACKWARD = "Backward multiplies what forward quantized."


class Format(enum.Enum):
    """The number formats of the two passes."""

    E2M1 = "e2m1"
    E4M3 = "e4m3"
    E5M2 = "e5m2"
    HYBRID = "hybrid"
    """E4M3 in forward, E5M2 for gradients."""


class Float8CurrentScaling(recipes.Float8CurrentScaling):
    """FP8 with a scale for each tensor, from its own largest magnitude."""

    def __init__(
        self,
        use_power_2_scales: bool = False,
        fp8_format: Format = Format.HYBRID,
        *,
        fp8_dpa: bool = False,
        fp8_mha: bool = False,
        backward_override: str | None = None,
    ) -> None:
        """Raises: ValueError: a format other than HYBRID and E4M3, or an option that is not here."""
        _refuse_common("Float8CurrentScaling", fp8_dpa, fp8_mha, backward_override)
        names: dict[Format, Literal["hybrid", "e4m3"]] = {Format.HYBRID: "hybrid", Format.E4M3: "e4m3"}
        if fp8_format not in names:
            raise ValueError(f"fp8_format is Format.HYBRID or Format.E4M3; got {fp8_format!r}.")
        super().__init__(fp8_format=names[fp8_format], power_of_2_scale=use_power_2_scales)


class Float8BlockScaling(recipes.Float8BlockScaling):
    """FP8 with a scale for 1x128 values of inputs and gradients and 128x128 of weights; E4M3."""

    def __init__(
        self,
        use_f32_scales: bool = False,
        fp8_format: Format = Format.E4M3,
        *,
        x_block_scaling_dim: int = 1,
        w_block_scaling_dim: int = 2,
        grad_block_scaling_dim: int = 1,
        fp8_dpa: bool = False,
        fp8_mha: bool = False,
        backward_override: str | None = None,
    ) -> None:
        """Raises: ValueError: an option that is not here."""
        _refuse_common("Float8BlockScaling", fp8_dpa, fp8_mha, backward_override)
        blocks = "Inputs and gradients have 1x128 blocks, weights 128x128."
        refuse(
            "Float8BlockScaling",
            {
                "fp8_format": (fp8_format, Format.E4M3, "Gradients are E4M3 too."),
                "x_block_scaling_dim": (x_block_scaling_dim, 1, blocks),
                "w_block_scaling_dim": (w_block_scaling_dim, 2, blocks),
                "grad_block_scaling_dim": (grad_block_scaling_dim, 1, blocks),
            },
        )
        super().__init__(power_of_2_scale=not use_f32_scales)


class MXFP8BlockScaling(recipes.MXFP8BlockScaling):
    """FP8 with a power-of-two scale for 32 values; E4M3."""

    def __init__(
        self,
        margin: int = 0,
        fp8_format: Format = Format.E4M3,
        *,
        fp8_dpa: bool = False,
        fp8_mha: bool = False,
        backward_override: str | None = None,
    ) -> None:
        """Raises: ValueError: an option that is not here."""
        _refuse_common("MXFP8BlockScaling", fp8_dpa, fp8_mha, backward_override)
        refuse(
            "MXFP8BlockScaling",
            {
                "margin": (margin, 0, "Scales follow from the values of their block."),
                "fp8_format": (fp8_format, Format.E4M3, "Gradients are E4M3 too."),
            },
        )
        super().__init__()


class NVFP4BlockScaling(recipes.NVFP4BlockScaling):
    """Four-bit values with a scale for 16 of them, 16x16 for weights, and one for the whole tensor."""

    def __init__(
        self,
        disable_rht: bool = False,
        disable_stochastic_rounding: bool = False,
        disable_2d_quantization: bool = False,
        *,
        fp4_format: Format = Format.E2M1,
        fp8_format: Format = Format.E4M3,
        row_scaled_activation: bool = False,
        nvfp4_4over6: str = "none",
        fp8_dpa: bool = False,
        fp8_mha: bool = False,
        backward_override: str | None = None,
    ) -> None:
        """Raises: ValueError: an option that is not here."""
        _refuse_common("NVFP4BlockScaling", fp8_dpa, fp8_mha, backward_override)
        refuse(
            "NVFP4BlockScaling",
            {
                "disable_2d_quantization": (disable_2d_quantization, False, "Weights have 16x16 blocks."),
                "fp4_format": (fp4_format, Format.E2M1, "There is no other four-bit format."),
                "fp8_format": (fp8_format, Format.E4M3, "Scales are E4M3."),
                "row_scaled_activation": (row_scaled_activation, False, "A tensor has one largest magnitude."),
                "nvfp4_4over6": (nvfp4_4over6, "none", "Blocks are scaled to the largest code."),
            },
        )
        super().__init__(random_hadamard_transform=not disable_rht, stochastic_rounding=not disable_stochastic_rounding)


class DelayedScaling:
    """Scales from the largest magnitudes of earlier steps: not here."""

    def __init__(self, *args: object, **kwargs: object) -> NoReturn:
        """Raises: NotImplementedError: always."""
        raise NotImplementedError(
            "there is no delayed scaling here: every scale comes from the tensor that it belongs to. Use "
            "Float8CurrentScaling, which has the same formats and no history, or Float8BlockScaling."
        )


def _refuse_common(owner: str, fp8_dpa: bool, fp8_mha: bool, backward_override: str | None) -> None:
    refuse(
        owner,
        {
            "fp8_dpa": (fp8_dpa, False, _ATTENTION),
            "fp8_mha": (fp8_mha, False, _ATTENTION),
            "backward_override": (backward_override, None, _BACKWARD),
        },
    )
