"""Sort tokens by expert with each expert's rows padded to an alignment, and bring them back.

All of it happens on the device: the capacity follows from the shapes alone, so the host never asks how many tokens an
expert got, and no token is ever dropped.

Shape suffixes: T tokens, k experts of each, E experts, C rows of capacity, H features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from types import ModuleType
from typing import Any, cast, overload

import torch
from torch import Tensor

from lighterage.formats.arguments import check_count
from lighterage.formats.layout import split_rows
from lighterage.formats.parts import round_up
from lighterage.formats.splits import Splits, check_sizes
from lighterage.formats.tensor_arguments import check_no_transform, check_same_device, check_tensor
from lighterage.kernels.reference import permute as reference
from lighterage.unseen import unseen

_WHOLE = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


@dataclass(frozen=True, kw_only=True, eq=False)
class Permutation:
    """Where the copies of tokens go. Made by `plan_permutation`; everything lies on the device of the experts."""

    rows: Tensor
    """int32 (T, k): the row of each copy of each token."""
    tokens: Tensor
    """int32 (C,): the token in each row; -1 in rows that hold none."""
    m_splits: Tensor
    """int64 (E,): rows of each expert, padded; rows after the last are no expert's."""
    num_tokens_of: Tensor
    """int64 (E,): copies that went to each expert."""

    @property
    def num_rows(self) -> int:
        """C, the rows of what `permute` returns."""
        return self.tokens.shape[0]

    @cached_property
    def splits(self) -> Splits:
        """`m_splits` as grouped layers take them, made once for all that work on these rows."""
        return Splits(num_rows=self.num_rows, ends=self.m_splits.cumsum(0))


def capacity(num_copies: int, num_experts: int, alignment: int) -> int:
    """The most rows that `num_copies` can take when they are spread over experts, each padded to `alignment`.

    >>> capacity(100, 8, 1), capacity(100, 8, 16), capacity(3, 8, 16)
    (100, 208, 48)
    """
    return (num_copies + min(num_experts, num_copies) * (alignment - 1)) // alignment * alignment


@unseen
def plan_permutation(experts: Tensor, num_experts: int, alignment: int = 1) -> Permutation:
    """Where each copy of each token goes: by expert, and among those of one expert by token.

    experts: (T, k) whole numbers from 0 to `num_experts` - 1; checked on the CPU only. The k of a token differ.
    The host never waits. torch.compile ends its graph here, and at the functions that take the plan.
    Raises: ValueError: on a wrong shape or dtype, or a number out of range.
    """
    check_no_transform("permutation")
    check_tensor("experts", experts, dtypes=None)
    if experts.ndim != 2 or experts.shape[1] == 0 or experts.dtype not in _WHOLE:
        raise ValueError(
            f"experts must be whole numbers of shape (T, k), k 1 or more; got {experts.dtype} {tuple(experts.shape)}."
        )
    alignment = check_count("alignment", alignment, least=1)
    num_experts = check_count("num_experts", num_experts, least=1)
    if (
        experts.device.type == "cpu"
        and experts.numel()
        and not 0 <= int(experts.min()) <= int(experts.max()) < num_experts
    ):
        raise ValueError(
            f"experts must be from 0 to {num_experts - 1}; got {int(experts.min())} to {int(experts.max())}."
        )
    if experts.itemsize < 4:
        experts = experts.int()  # bytes would index as a mask, and their numbers end before those of the experts may
    num_rows = capacity(experts.numel(), num_experts, alignment)
    place = _kernels(experts).place_copies
    rows, tokens, padded, sizes = place(experts, num_experts, alignment, num_rows)
    return Permutation(rows=rows, tokens=tokens, m_splits=padded, num_tokens_of=sizes)


@unseen
def permute(x: Tensor, plan: Permutation) -> Tensor:
    """The rows of `x` by expert, each expert's padded with zeros.

    x: (T, H). Returns (C, H). Backward needs the plan's `rows` and nothing of x.
    Raises: ValueError: if `plan` is for another number of tokens.
    """
    _check_call(plan, x=x)
    if x.ndim != 2 or x.shape[0] != plan.rows.shape[0]:
        raise ValueError(f"permute takes ({plan.rows.shape[0]}, H), as its plan was made; got {tuple(x.shape)}.")
    return cast(Tensor, _Permute.apply(x, plan.rows, plan.tokens))  # type: ignore[no-untyped-call]


@unseen
def unpermute(x: Tensor, plan: Permutation, weights: Tensor | None = None) -> Tensor:
    """The sum of the copies of each token, added in float32 (float64 of float64), rounded once.

    x: (C, H). weights: (T, k) to multiply the copies by, or None for 1. Returns (T, H) of x's dtype.
    Backward needs indices; and x, if the gradient of `weights` is wanted. A layer that weights its rows before its last
    product, by `weights_of_rows`, has the same sum, because that product is linear, and need not save x.
    Raises: ValueError: on shapes other than the plan's.
    """
    _check_call(plan, x=x, **({} if weights is None else {"weights": weights}))
    if x.ndim != 2 or x.shape[0] != plan.num_rows:
        raise ValueError(f"unpermute takes ({plan.num_rows}, H), what permute gave; got {tuple(x.shape)}.")
    if weights is not None and weights.shape != plan.rows.shape:
        raise ValueError(f"weights must be {tuple(plan.rows.shape)}, one for each copy; got {tuple(weights.shape)}.")
    if weights is None:
        return cast(Tensor, _Unpermute.apply(x, plan.rows, plan.tokens))  # type: ignore[no-untyped-call]
    return cast(Tensor, _WeightedUnpermute.apply(x, weights, plan.rows, plan.tokens))  # type: ignore[no-untyped-call]


@unseen
def weights_of_rows(weights: Tensor, plan: Permutation) -> Tensor:
    """The weight of each row: (C,) from (T, k), 0 in rows that hold no token.

    Raises: ValueError: on a shape other than the plan's.
    """
    _check_call(plan, weights=weights)
    if weights.shape != plan.rows.shape:
        raise ValueError(f"weights must be {tuple(plan.rows.shape)}, one for each copy; got {tuple(weights.shape)}.")
    return cast(Tensor, _WeightsOfRows.apply(weights, plan.rows, plan.num_rows))  # type: ignore[no-untyped-call]


def _check_call(plan: Permutation, **tensors: Tensor) -> None:
    check_no_transform("permutation")
    if not isinstance(plan, Permutation):
        raise TypeError(f"plan must be what plan_permutation gave; got {type(plan).__name__}.")
    for name, tensor in tensors.items():
        check_tensor(name, tensor)
    check_same_device(plan=plan.tokens, **tensors)


class _Permute(torch.autograd.Function):
    """Rows out to their experts; gradients back."""

    @staticmethod
    def forward(ctx: Any, x_TH: Tensor, rows_Tk: Tensor, tokens_C: Tensor) -> Tensor:
        ctx.save_for_backward(rows_Tk)
        return _gathered(x_TH, tokens_C)

    @staticmethod
    def backward(ctx: Any, grad_CH: Tensor) -> tuple[Tensor, None, None]:
        (rows_Tk,) = ctx.saved_tensors
        return _summed(grad_CH, rows_Tk), None, None


class _Unpermute(torch.autograd.Function):
    """Rows back to their tokens, summed; gradients out."""

    @staticmethod
    def forward(ctx: Any, x_CH: Tensor, rows_Tk: Tensor, tokens_C: Tensor) -> Tensor:
        ctx.save_for_backward(tokens_C)
        return _summed(x_CH, rows_Tk)

    @staticmethod
    def backward(ctx: Any, grad_TH: Tensor) -> tuple[Tensor, None, None]:
        (tokens_C,) = ctx.saved_tensors
        return _gathered(grad_TH, tokens_C), None, None


class _WeightedUnpermute(torch.autograd.Function):
    """Rows back to their tokens, weighted and summed."""

    @staticmethod
    def forward(ctx: Any, x_CH: Tensor, weights_Tk: Tensor, rows_Tk: Tensor, tokens_C: Tensor) -> Tensor:
        kept = x_CH if ctx.needs_input_grad[1] else None
        ctx.save_for_backward(kept, weights_Tk, rows_Tk, tokens_C)
        wide = torch.promote_types(x_CH.dtype, torch.float32)
        sum_TH = torch.zeros(rows_Tk.shape[0], x_CH.shape[1], dtype=wide, device=x_CH.device)
        for rows_T, weights_T in zip(rows_Tk.unbind(1), weights_Tk.unbind(1), strict=True):
            sum_TH.addcmul_(x_CH.index_select(0, rows_T), weights_T.to(wide)[:, None])
        return sum_TH.to(x_CH.dtype)

    @staticmethod
    def backward(ctx: Any, grad_TH: Tensor) -> tuple[Tensor | None, ...]:
        x_CH, weights_Tk, rows_Tk, tokens_C = ctx.saved_tensors
        dx_CH = dweights_Tk = None
        if ctx.needs_input_grad[0]:
            weights_C = _weights_out(weights_Tk, rows_Tk, tokens_C.shape[0])
            dx_CH = _gathered(grad_TH, tokens_C).mul_(weights_C[:, None])
        if x_CH is not None:
            wide = torch.promote_types(x_CH.dtype, torch.float32)
            products = [
                torch.linalg.vecdot(x_CH.index_select(0, rows_T).to(wide), grad_TH.to(wide))
                for rows_T in rows_Tk.unbind(1)
            ]
            dweights_Tk = torch.stack(products, dim=1).to(weights_Tk.dtype)
        return dx_CH, dweights_Tk, None, None


class _WeightsOfRows(torch.autograd.Function):
    """Weights out to the rows of their tokens."""

    @staticmethod
    def forward(ctx: Any, weights_Tk: Tensor, rows_Tk: Tensor, num_rows: int) -> Tensor:
        ctx.save_for_backward(rows_Tk)
        return _weights_out(weights_Tk, rows_Tk, num_rows)

    @staticmethod
    def backward(ctx: Any, grad_C: Tensor) -> tuple[Tensor, None, None]:
        (rows_Tk,) = ctx.saved_tensors
        return grad_C.index_select(0, rows_Tk.view(-1)).view(rows_Tk.shape), None, None


def _kernels(x: Tensor) -> ModuleType:
    """The kernels for the device and dtype of `x`."""
    if not x.is_cuda or x.dtype == torch.float64:
        return reference
    from lighterage.kernels.triton import permute as triton

    return triton


def _gathered(x_TH: Tensor, tokens_C: Tensor) -> Tensor:
    return cast(Tensor, _kernels(x_TH).gather_rows(x_TH, tokens_C))


def _summed(x_CH: Tensor, rows_Tk: Tensor) -> Tensor:
    return cast(Tensor, _kernels(x_CH).sum_rows(x_CH, rows_Tk))


def _weights_out(weights_Tk: Tensor, rows_Tk: Tensor, num_rows: int) -> Tensor:
    return weights_Tk.new_zeros(num_rows).scatter_(0, rows_Tk.view(-1).long(), weights_Tk.reshape(-1))


# --- rows that are sorted already ------------------------------------------------------------------------------------


@overload
def pad_rows(x: Tensor, m_splits: Sequence[int], alignment: int) -> tuple[Tensor, list[int]]: ...
@overload
def pad_rows(x: Tensor, m_splits: Tensor, alignment: int) -> tuple[Tensor, Tensor]: ...
def pad_rows(x: Tensor, m_splits: Sequence[int] | Tensor, alignment: int) -> tuple[Tensor, list[int] | Tensor]:
    """`x` with rows of zeros behind each split, so that every split's are a multiple of `alignment`.

    x: (M, H), sorted by split. m_splits: sizes, as whole numbers or a tensor on x's device. Rows past the last split
    stay behind it.

    Returns: the padded rows, and the padded sizes in the kind that was given. With sizes in a tensor there are as many
    rows as any sizes need, and the host does not wait; with whole numbers there are as many as these need.
    Raises: ValueError: if the sizes are not those of x.

    >>> pad_rows(torch.ones(3, 1), [1, 2], 4)[0].flatten().tolist()
    [1.0, 0.0, 0.0, 0.0, 1.0, 1.0, 0.0, 0.0]
    """
    check_tensor("x", x)
    if x.ndim != 2:
        raise ValueError(f"pad_rows takes rows (M, H); got {tuple(x.shape)}. Flatten the leading dimensions.")
    plan, padded = _padding(m_splits, x.shape[0], alignment, x.device)
    return permute(x, plan), padded


def unpad_rows(x: Tensor, m_splits: Sequence[int] | Tensor, alignment: int, num_rows: int | None = None) -> Tensor:
    """Take out of `x` the rows that `pad_rows` with the same sizes put in.

    num_rows: the rows that `pad_rows` was given, needed where the sizes lie on a device. It must be that very number:
        padding rounds it up, so with sizes in a tensor a number nearby may fit the rows of x too.
    Raises: ValueError: if it is missing, or x has not the rows that `pad_rows` gives for it.
    """
    check_tensor("x", x)
    if num_rows is None:
        if isinstance(m_splits, Tensor) and m_splits.device.type != "cpu":
            raise ValueError(
                "unpad_rows with sizes on a device needs num_rows, the rows before padding: asking the device would "
                "make the host wait. Pass num_rows=x.shape[0] of what pad_rows was given."
            )
        num_rows = sum(_sizes(m_splits, x.device))
    if x.ndim != 2 or check_count("num_rows", num_rows) > x.shape[0]:
        raise ValueError(
            f"unpad_rows takes what pad_rows gave for {num_rows} rows, a matrix of as many or more; got "
            f"{tuple(x.shape)}. Pass the sizes and num_rows that pad_rows was given."
        )
    plan, _ = _padding(m_splits, num_rows, alignment, x.device)
    return unpermute(x, plan)


def _sizes(m_splits: Sequence[int] | Tensor, device: torch.device) -> tuple[int, ...]:
    """Sizes that the host can read, checked."""
    if isinstance(m_splits, Tensor):
        check_sizes(m_splits, device)
        m_splits = m_splits.tolist()
    return split_rows(m_splits).rows


def _padding(
    m_splits: Sequence[int] | Tensor, num_rows: int, alignment: int, device: torch.device
) -> tuple[Permutation, list[int] | Tensor]:
    alignment, num_rows = check_count("alignment", alignment, least=1), check_count("num_rows", num_rows)
    sizes: tuple[int, ...] = ()
    if isinstance(m_splits, Tensor) and m_splits.device.type != "cpu":
        check_sizes(m_splits, device)
    else:
        sizes = _sizes(m_splits, device)
        if not sizes or sum(sizes) > num_rows:
            raise ValueError(
                f"m_splits must be sizes of 0 or more that make up at most the {num_rows} rows; got {list(sizes)}."
            )
    padded: list[int] | None = None
    if isinstance(m_splits, Tensor):
        capacity_rows = round_up(num_rows + min(len(m_splits), num_rows) * (alignment - 1), alignment)
    else:
        padded = [round_up(size, alignment) for size in sizes]
        capacity_rows = sum(padded) + num_rows - sum(sizes)
    on_device = m_splits if isinstance(m_splits, Tensor) else torch.tensor(sizes, dtype=torch.int64)
    ends = on_device.to(device=device, dtype=torch.int64).cumsum(0)
    rows = torch.arange(num_rows, device=device)
    groups = torch.searchsorted(ends, rows, right=True)
    places, tokens, m_splits_padded, of_each = reference.place_sorted(rows, groups, ends, 1, alignment, capacity_rows)
    plan = Permutation(rows=places, tokens=tokens, m_splits=m_splits_padded, num_tokens_of=of_each)
    return plan, plan.m_splits if padded is None else padded
