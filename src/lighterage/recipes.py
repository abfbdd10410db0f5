"""Which quantizer each operand of a linear layer gets: one frozen class for each training recipe.

The three products of a layer y = x w^T read their operands along the dimension that they contract:

| product | x | w | dy |
| --- | --- | --- | --- |
| forward y = x w^T | rowwise | rowwise | |
| input gradient dx = dy w | | columnwise | rowwise |
| weight gradient dw = dy^T x | columnwise | | columnwise |

so `quantizer` is told which directions are needed. No recipe, `None`, means the dtype that the operands have.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, TypeAlias, cast, get_args

import torch

from lighterage.formats import (
    Float8BlockQuantizer,
    Float8CurrentScalingQuantizer,
    MXFP8Quantizer,
    NVFP4Quantizer,
)
from lighterage.formats.arguments import check_count, check_flags, is_one_of
from lighterage.formats.bulk import Quantizer

Role = Literal["input", "weight", "grad"]
"""What is quantized: a layer's input, its weight, or the gradient of its output."""
_ROLES = get_args(Role)


@dataclass(frozen=True, kw_only=True)
class Float8BlockScaling:
    """FP8 with one float32 scale for 1x128 values of inputs and gradients and 128x128 of weights; E4M3 throughout."""

    power_of_2_scale: bool = True
    """Round scales down to powers of two."""
    amax_epsilon: float = 0.0
    """A smaller largest magnitude of a block counts as this."""

    format_name: ClassVar[Literal["fp8_block"]] = "fp8_block"
    """Of the quantized tensors."""
    row_multiple: ClassVar[int] = 16
    """What the rows of every expert must be a multiple of."""
    alignment: ClassVar[int] = 16
    """What to pad them to."""
    dim_multiple: ClassVar[int] = 16
    """What the input and output features must be multiples of."""

    def __post_init__(self) -> None:
        self.quantizer("input", rowwise=True, columnwise=True)  # checks the fields

    def draw_seed(self) -> None:
        """Nothing here is random."""

    def quantizer(self, role: Role, *, rowwise: bool, columnwise: bool, seed: int | None = None) -> Quantizer:
        """A new quantizer for an operand in this role.

        Raises: ValueError: on an unknown role.
        """
        return Float8BlockQuantizer(
            rowwise=rowwise,
            columnwise=columnwise,
            block_scaling_dim=2 if _checked(role) == "weight" else 1,
            power_of_2_scale=self.power_of_2_scale,
            amax_epsilon=self.amax_epsilon,
        )


@dataclass(frozen=True, kw_only=True)
class MXFP8BlockScaling:
    """FP8 E4M3 with one power-of-two scale for 32 values, in every role."""

    format_name: ClassVar[Literal["mxfp8"]] = "mxfp8"
    """Of the quantized tensors."""
    row_multiple: ClassVar[int] = 32
    """What the rows of every expert must be a multiple of."""
    alignment: ClassVar[int] = 32
    """What to pad them to."""
    dim_multiple: ClassVar[int] = 32
    """What the input and output features must be multiples of."""

    def draw_seed(self) -> None:
        """Nothing here is random."""

    def quantizer(self, role: Role, *, rowwise: bool, columnwise: bool, seed: int | None = None) -> Quantizer:
        """A new quantizer for an operand in this role.

        Raises: ValueError: on an unknown role.
        """
        _checked(role)
        return MXFP8Quantizer(rowwise=rowwise, columnwise=columnwise)


@dataclass(frozen=True, kw_only=True)
class NVFP4BlockScaling:
    """Four-bit values with E4M3 scales for 16 of them (16x16 for weights) and a float32 amax; operands must be bf16.

    What the weight gradient reads of inputs and output gradients passes the random Hadamard transform; output gradients
    are rounded stochastically, in both directions.
    """

    random_hadamard_transform: bool = True
    """Transform the columnwise direction of inputs and gradients, by runs of 16 rows."""
    stochastic_rounding: bool = True
    """Round gradients to one of the two neighbouring values at random, with the right mean."""

    format_name: ClassVar[Literal["nvfp4"]] = "nvfp4"
    """Of the quantized tensors."""
    row_multiple: ClassVar[int] = 16
    """What the rows of every expert must be a multiple of."""
    alignment: ClassVar[int] = 128
    """What to pad them to."""
    dim_multiple: ClassVar[int] = 16
    """What the input and output features must be multiples of."""

    def __post_init__(self) -> None:
        check_flags(self, "random_hadamard_transform", "stochastic_rounding")

    def draw_seed(self) -> int | None:
        """A seed for the gradients of one call, from PyTorch's default CPU generator, if rounding is stochastic.

        See Note [When the seed is drawn].
        """
        return int(torch.randint(2**62, ())) if self.stochastic_rounding else None

    def quantizer(self, role: Role, *, rowwise: bool, columnwise: bool, seed: int | None = None) -> Quantizer:
        """A new quantizer for an operand in this role.

        seed: of the random roundings of a gradient, what `draw_seed` gave in forward.
        Raises: ValueError: on an unknown role, or a gradient to round stochastically without a seed.
        """
        generator = None
        if _checked(role) == "grad" and self.stochastic_rounding:
            if seed is None:
                raise ValueError(
                    "stochastic rounding of a gradient needs a seed to be repeatable; got None. Draw one in forward, "
                    "recipe.draw_seed(), and pass it on: quantizer('grad', ..., seed=seed)."
                )
            generator = torch.Generator().manual_seed(check_count("seed", seed))
        return NVFP4Quantizer(
            rowwise=rowwise,
            columnwise=columnwise,
            with_rht=self.random_hadamard_transform and role != "weight",
            stochastic_rounding=generator is not None,
            generator=generator,
            with_2d_quantization=role == "weight",
        )


# Note [When the seed is drawn]
# Random roundings happen in backward, but their seed is drawn in forward and kept with the graph. So a second backward
# through the same graph rounds alike, the order in which backward runs does not matter, and activation checkpointing,
# which restores the CPU generator before it recomputes, draws the same seed again. It is drawn under no_grad too:
# reentrant checkpointing runs its first forward so, and what follows must find the generator where it left it.


@dataclass(frozen=True, kw_only=True)
class Float8CurrentScaling:
    """FP8 with one float32 scale for a whole tensor, from its own largest magnitude.

    E4M3 for inputs and weights. Gradients are E5M2, whose range they may need, unless `fp8_format` says otherwise.
    """

    fp8_format: Literal["hybrid", "e4m3"] = "hybrid"
    """"hybrid": gradients in E5M2. "e4m3": E4M3 throughout."""
    power_of_2_scale: bool = False
    """Round the scale down to a power of two."""
    amax_epsilon: float = 0.0
    """A smaller largest magnitude of a tensor counts as this."""

    format_name: ClassVar[Literal["fp8_tensor"]] = "fp8_tensor"
    """Of the quantized tensors."""
    row_multiple: ClassVar[int] = 16
    """What the rows of every expert must be a multiple of."""
    alignment: ClassVar[int] = 16
    """What to pad them to."""
    dim_multiple: ClassVar[int] = 16
    """What the input and output features must be multiples of."""

    def __post_init__(self) -> None:
        if not is_one_of(self.fp8_format, ("hybrid", "e4m3")):
            raise ValueError(f"fp8_format must be 'hybrid' or 'e4m3'; got {self.fp8_format!r}.")
        self.quantizer("input", rowwise=True, columnwise=True)  # checks the other fields

    def draw_seed(self) -> None:
        """Nothing here is random."""

    def quantizer(self, role: Role, *, rowwise: bool, columnwise: bool, seed: int | None = None) -> Quantizer:
        """A new quantizer for an operand in this role.

        Raises: ValueError: on an unknown role.
        """
        wide = _checked(role) == "grad" and self.fp8_format == "hybrid"
        return Float8CurrentScalingQuantizer(
            rowwise=rowwise,
            columnwise=columnwise,
            fp8_dtype=torch.float8_e5m2 if wide else torch.float8_e4m3fn,
            power_of_2_scale=self.power_of_2_scale,
            amax_epsilon=self.amax_epsilon,
        )


Recipe: TypeAlias = Float8BlockScaling | MXFP8BlockScaling | NVFP4BlockScaling | Float8CurrentScaling
"""Any of them."""


def check_recipe(recipe: object) -> Recipe | None:
    """`recipe`, if it is one or None.

    Raises: TypeError.
    """
    if recipe is not None and not isinstance(recipe, get_args(Recipe)):
        names = ", ".join(f"{kind.__name__}()" for kind in get_args(Recipe))
        raise TypeError(f"a recipe is one of {names} or None (the dtype of the operands); got {recipe!r}.")
    return cast("Recipe | None", recipe)


def alignment_of(recipe: Recipe | None) -> int:
    """What the rows of every expert must be a multiple of; 1 without a recipe."""
    return 1 if recipe is None else recipe.alignment


def _checked(role: Role) -> Role:
    if not is_one_of(role, _ROLES):
        raise ValueError(f"role must be one of {list(_ROLES)}; got {role!r}.")
    return role


__all__ = [
    "Float8BlockScaling",
    "Float8CurrentScaling",
    "MXFP8BlockScaling",
    "NVFP4BlockScaling",
    "Recipe",
    "Role",
    "alignment_of",
    "check_recipe",
]
