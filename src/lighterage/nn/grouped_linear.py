"""`GroupedLinear`: a linear layer for each expert."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Self

import torch
from torch import nn

from lighterage.formats.arguments import check_count, check_flag
from lighterage.formats.splits import Splits
from lighterage.ops.checks import check_features
from lighterage.ops.grouped_linear import grouped_linear
from lighterage.ops.stacking import are_side_by_side
from lighterage.recipes import Recipe, check_recipe


class GroupedLinear(nn.Module):
    """`num_gemms` linear layers, each over its own rows of one input, in a handful of launches for all of them."""

    def __init__(
        self,
        num_gemms: int,
        in_features: int,
        out_features: int,
        *,
        bias: bool = True,
        recipe: Recipe | None = None,
        save_original_input: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        single_weight: bool = True,
    ) -> None:
        """`bias`, `device`, `dtype`: of the parameters, each expert's initialised as `torch.nn.Linear` does.

        recipe: None multiplies in the dtype of the parameters.
        save_original_input: save the input itself and quantize it again in backward.
        single_weight: the form of the parameters, and so of the state dict. True: one `weight` (num_gemms,
            out_features, in_features) and one `bias` (num_gemms, out_features). False: `weight0`, `weight1`, … and
            `bias0`, …, as Transformer Engine's module of this name has them. Those lie side by side in one storage, and
            are used without a copy as long as they do: `pack_parameters` puts them back there.
        """
        super().__init__()
        check_count("num_gemms", num_gemms, least=1)
        check_count("in_features", in_features)
        check_count("out_features", out_features)
        for name, flag in (
            ("save_original_input", save_original_input),
            ("single_weight", single_weight),
            ("bias", bias),
        ):
            check_flag(name, flag)
        self.num_gemms, self.in_features, self.out_features = num_gemms, in_features, out_features
        self.recipe = check_recipe(recipe)
        check_features(self.recipe, in_features, out_features)
        self.save_original_input = save_original_input
        self.single_weight = single_weight
        self.use_bias = bias
        shapes = {"weight": (out_features, in_features)} | ({"bias": (out_features,)} if bias else {})
        for name, shape in shapes.items():
            whole = torch.empty(num_gemms, *shape, device=device, dtype=dtype)
            if single_weight:
                self.register_parameter(name, nn.Parameter(whole))
            else:
                for index, part in enumerate(whole):
                    self.register_parameter(f"{name}{index}", nn.Parameter(part))
        if single_weight and not bias:
            self.register_parameter("bias", None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Fill the parameters anew: uniformly up to 1 / sqrt(in_features)."""
        bound = 1 / math.sqrt(max(self.in_features, 1))
        for parameter in self.parameters(recurse=False):
            nn.init.uniform_(parameter, -bound, bound)

    def forward(self, x: torch.Tensor, m_splits: Sequence[int] | torch.Tensor | Splits) -> torch.Tensor:
        """(*, in_features) to (*, out_features): see `lighterage.ops.grouped_linear`.

        m_splits: rows of each expert, as integers or as an integer tensor on the device, for which nothing waits.
        """
        return grouped_linear(
            x,
            self._stack("weight"),
            m_splits,
            bias=self._stack("bias") if self.use_bias else None,
            recipe=self.recipe,
            save_original_input=self.save_original_input,
        )

    def _stack(self, name: str) -> torch.Tensor | list[torch.Tensor]:
        if self.single_weight:
            parameter = getattr(self, name)
            assert isinstance(parameter, torch.Tensor)
            return parameter
        return self._separate(name)

    def _separate(self, name: str) -> list[torch.Tensor]:
        parameters, parts = self._parameters, []
        for index in range(self.num_gemms):
            part = parameters.get(f"{name}{index}")  # quicker than the attribute, which may be made of others
            parts.append(getattr(self, f"{name}{index}") if part is None else part)
        return parts

    def pack_parameters(self) -> Self:
        """Move separate parameters back into one storage, where they are not; they stay the same objects.

        Done by the module itself when it is made, copied, or moved (`to`, `half`, …). Call it after something else has
        given parameters memory of their own.
        """
        if not self.single_weight:
            for name in ("weight", "bias") if self.use_bias else ("weight",):
                if any(f"{name}{index}" not in self._parameters for index in range(self.num_gemms)):
                    continue  # pruned or parametrized: made anew in each forward
                parts = self._separate(name)
                if not are_side_by_side(parts) and all(type(part.data) is torch.Tensor for part in parts):
                    for part, packed in zip(parts, torch.stack([part.data for part in parts]), strict=True):
                        part.data = packed
        return self

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self.pack_parameters()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self.pack_parameters()

    def extra_repr(self) -> str:
        """What `print` shows."""
        return (
            f"num_gemms={self.num_gemms}, in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.use_bias}, recipe={self.recipe}, single_weight={self.single_weight}"
        )
