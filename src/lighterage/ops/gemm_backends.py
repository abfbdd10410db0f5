"""Which code multiplies: the backends' common interface, and the choice of one by name."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Literal, Protocol, get_args

import torch

from lighterage.formats.arguments import is_one_of

if TYPE_CHECKING:
    from lighterage.formats.splits import Splits
    from lighterage.ops.gemm_operands import Operand

BackendName = Literal["auto", "torch", "triton", "mixed", "reference", "emulation"]
_NAMES = get_args(BackendName)

_BY_FORMAT: dict[str | None, tuple[str, ...]] = {
    None: ("torch", "reference"),
    "fp8_block": ("torch", "triton", "mixed", "reference"),
    "mxfp8": ("emulation", "reference"),
    "nvfp4": ("emulation", "reference"),
}

LARGE_ROWS = 2048
"""Rows of an expert, on average, from which "auto" takes weight gradients expert by expert."""


class GemmBackend(Protocol):
    """How the products of `lighterage.ops.grouped_gemm` are made. Without state: one call and its backward share it."""

    @property
    def name(self) -> str:
        """The name that it is chosen by."""
        ...

    def forward(
        self, x: Operand, w: Operand, splits: Splits, *, out_dtype: torch.dtype, bias: torch.Tensor | None
    ) -> torch.Tensor:
        """See `grouped_forward`."""
        ...

    def dgrad(self, dy: Operand, w: Operand, splits: Splits, *, out_dtype: torch.dtype) -> torch.Tensor:
        """See `grouped_dgrad`."""
        ...

    def wgrad(self, dy: Operand, x: Operand, splits: Splits, *, out_dtype: torch.dtype) -> torch.Tensor:
        """See `grouped_wgrad`."""
        ...


def choose_backend(
    name: BackendName,
    format_name: str | None,
    device: torch.device,
    splits: Splits | None = None,
    *,
    power_of_2_scales: bool = False,
) -> GemmBackend:
    """The backend for operands of one format: chosen once, for a call and for its backward.

    name: "triton": one launch of a grouped kernel (FP8 block). "torch": PyTorch's own products, for FP8 one for each
        expert. "mixed" (FP8 block): forward and input gradient as "triton", the weight gradient as "torch".
        "emulation": dequantized to bf16 (MXFP8, NVFP4). "reference": float32 or float64, for any device, slow.
        "auto": what is fastest on the device.
    format_name: "fp8_block", "mxfp8", "nvfp4", or None for operands that are not quantized.
    splits: how the rows are split; "auto" looks at sizes that the host knows.
    power_of_2_scales: the FP8 block scales of inputs and gradients are known to be powers of two. Changes speed alone.

    Raises: ValueError: on an unknown name, or one that cannot multiply this format on this device. TypeError: on a
        device that is none.
    """
    if not is_one_of(name, _NAMES):
        names = ", ".join(map(repr, _NAMES))
        raise ValueError(f"a GEMM backend is one of {names}; got {name!r}.")
    if not isinstance(device, torch.device):
        raise TypeError(f"device must be a torch.device; got {device!r}. Pass x.device, or torch.device({device!r}).")
    if not is_one_of(format_name, _BY_FORMAT):
        raise ValueError(f"products are known of the formats {list(_BY_FORMAT)}; got {format_name!r}.")
    chosen = _fastest(format_name, device, splits) if name == "auto" else name
    if chosen not in _BY_FORMAT[format_name]:
        raise ValueError(
            f"the GEMM backend {chosen!r} does not multiply {format_name or 'operands that are not quantized'}. "
            f"Pass 'auto' or one of {', '.join(map(repr, _BY_FORMAT[format_name]))}."
        )
    return _make(chosen, format_name, device, splits, power_of_2_scales)


def _fastest(format_name: str | None, device: torch.device, splits: Splits | None) -> str:
    if format_name is None:
        return "torch"
    if device.type != "cuda":
        return "reference"
    if format_name in ("mxfp8", "nvfp4"):
        return "emulation"
    if splits is not None and _few_large(splits) and capability(device)[0] == 9:
        return "mixed" if has_hopper_kernel(device) else "torch"
    return "triton"


def _few_large(splits: Splits) -> bool:
    """Whether a weight gradient for each expert keeps a Hopper GPU busy: measured in benchmarks/results.

    A call takes the host some 20 µs, in which the device multiplies 512 rows by as many columns as a weight of
    4096×4096 has.
    """
    if splits.rows is None:
        return False
    num_busy = sum(size > 0 for size in splits.rows.rows)
    return num_busy > 0 and splits.rows.total >= LARGE_ROWS * num_busy


@lru_cache
def capability(device: torch.device) -> tuple[int, int]:
    """The compute capability of a CUDA device, which PyTorch looks up anew each time."""
    return torch.cuda.get_device_capability(device)


@lru_cache
def has_hopper_kernel(device: torch.device) -> bool:
    """Whether the kernel for Hopper runs on `device`: there, with a Triton that has what it is written in."""
    if device.type != "cuda" or capability(device)[0] != 9:
        return False
    try:
        import lighterage.kernels.triton.grouped_gemm_hopper_rows  # noqa: F401
    except (ImportError, AttributeError):
        return False
    return True


def _make(
    name: str, format_name: str | None, device: torch.device, splits: Splits | None, power_of_2_scales: bool
) -> GemmBackend:
    from lighterage.ops.gemm_reference import ReferenceBackend

    if name == "reference" or (format_name is None and device.type != "cuda"):
        return ReferenceBackend(name)
    if name == "torch" and format_name is None:
        from lighterage.ops.gemm_torch import TorchGroupedBackend

        return TorchGroupedBackend()
    if name in ("torch", "mixed"):
        _check_scaled_mm(name, device, splits)
    if name == "torch":
        from lighterage.ops.gemm_scaled_mm import ScaledMMBackend

        return ScaledMMBackend()
    _check_triton(name, device)
    if name == "emulation":
        from lighterage.ops.gemm_emulation import EmulationBackend

        return EmulationBackend()
    from lighterage.ops.gemm_triton import TritonBackend

    triton = TritonBackend(hopper=has_hopper_kernel(device), power_of_2_scales=power_of_2_scales)
    if name == "triton":
        return triton
    from lighterage.ops.gemm_mixed import MixedBackend

    return MixedBackend(rows=triton)


def _check_scaled_mm(name: str, device: torch.device, splits: Splits | None) -> None:
    if device.type != "cuda":
        raise ValueError(
            f"the GEMM backend {name!r} multiplies FP8 on CUDA devices; got operands on {device}. "
            "Pass backend='reference', or 'auto'."
        )
    if splits is not None and splits.host is None:
        raise ValueError(
            f"the GEMM backend {name!r} multiplies expert by expert, so the host must know the splits; they are a "
            "device tensor. Pass backend='triton', which reads them on the device, or m_splits as a list of integers."
        )


def _check_triton(name: str, device: torch.device) -> None:
    try:
        import triton
    except ImportError as error:
        raise ValueError(
            f"the GEMM backend {name!r} needs the package triton, which cannot be imported. Install it, or pass "
            "backend='reference'."
        ) from error
    if device.type == "cuda":
        if name != "emulation" and capability(device) < (8, 9):
            raise ValueError(
                f"the GEMM backend {name!r} needs a GPU that multiplies FP8, compute capability 8.9 or later; got "
                f"{torch.cuda.get_device_name(device)}. Pass backend='reference'."
            )
    elif not triton.knobs.runtime.interpret:
        raise ValueError(
            f"the GEMM backend {name!r} runs on CUDA devices; got operands on {device}. Pass backend='reference', or "
            "set TRITON_INTERPRET=1 before the first import of triton to interpret the kernels."
        )
