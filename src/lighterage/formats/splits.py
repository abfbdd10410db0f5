"""How the rows of a matrix are split over experts, as the host and the device know it.

The host plans with sizes, kernels read the splits' ends on the device. Sizes that are a device tensor, as a router
leaves them, stay there: `Splits` then knows how many splits and rows there are, which is all that shapes depend on, and
nothing waits. Make one for a step, and pass it to everything that works on the same rows.

    >>> splits = Splits.of([2, 0, 3], num_rows=5, device=torch.device("cpu"))
    >>> splits.num_splits, splits.host, splits.ends.tolist()
    (3, (2, 0, 3), [2, 2, 5])
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import final

import torch

from lighterage.formats.arguments import check_count
from lighterage.formats.layout import split_rows
from lighterage.formats.parts import SplitRows

_NEEDS_MATRIX = (
    "splits that only the device knows are of the rows of a matrix; got x of more than 2 dimensions. "
    "Pass x.flatten(0, -2), and the sizes in its rows."
)


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class Splits:
    """`num_splits` runs of consecutive rows, some of them perhaps empty. Immutable. Made by `Splits.of`."""

    num_rows: int
    """Rows of the matrix. Those past the last split, which only sizes in a tensor may leave, belong to none."""
    ends: torch.Tensor
    """int64 (num_splits,), on the device: the rows up to and including each split."""
    rows: SplitRows | None = None
    """The sizes with their sums, where the host knows them."""

    @classmethod
    def of(
        cls,
        m_splits: Sequence[int] | torch.Tensor | Splits,
        num_rows: int,
        device: torch.device | str,
        *,
        rows_per_split: int = 1,
    ) -> Splits:
        """Splits from their sizes, checked as far as the host knows them. The host never waits for the device.

        m_splits: integers; a 1-D integer tensor on the CPU, which is read; one on `device`, which is not; or `Splits`,
            which are checked against the rest and returned.
        num_rows: what integers must add up to. Sizes in a tensor, on either, may add up to less.
        device: where the rows are. Work lands on its current stream.
        rows_per_split: rows that a unit of `m_splits` and of `num_rows` stands for, where `num_rows` counts the first
            of several leading dimensions.

        Raises: ValueError, TypeError: naming the rule, what was received, and what to do.
        """
        may_be_short = not isinstance(m_splits, Sequence)
        check_count("num_rows", num_rows)
        if not isinstance(device, (str, torch.device)):
            raise TypeError(f"device must be a torch.device or its name; got {device!r}. Pass x.device.")
        if isinstance(device, str) or (device.type == "cuda" and device.index is None):
            device = torch.empty(0, device=device).device  # with its index
        if isinstance(m_splits, Splits):
            if m_splits.num_rows != num_rows or m_splits.device != device:
                raise ValueError(
                    f"these Splits are of {m_splits.num_rows} rows on {m_splits.device}; got {num_rows} rows on "
                    f"{device}. Make others: Splits.of(m_splits, num_rows, device)."
                )
            if rows_per_split == 1:
                return m_splits
            if m_splits.host is None:
                raise ValueError(_NEEDS_MATRIX)
            m_splits = m_splits.host
        if isinstance(m_splits, torch.Tensor):
            check_sizes(m_splits, device)
            if m_splits.device.type != "cpu":
                if rows_per_split != 1:
                    raise ValueError(_NEEDS_MATRIX)
                return cls(num_rows=num_rows, ends=m_splits.cumsum(0, dtype=torch.int64))
            m_splits = m_splits.tolist()
        rows = split_rows(m_splits, rows_per_split)
        total = rows.total if rows_per_split == 1 else sum(rows.splits)
        if total > num_rows or (total < num_rows and not may_be_short):
            which = "short" if total < num_rows else "long"
            raise ValueError(
                f"m_splits must add up to the first dimension of x; got a sum of {total} for {num_rows}: too {which} "
                f"by {abs(total - num_rows)}. Slice x, or correct m_splits."
            )
        return cls(num_rows=num_rows * rows_per_split, ends=upload_ends(rows.rows, device), rows=rows)

    @property
    def num_splits(self) -> int:
        """How many splits there are."""
        return self.ends.shape[0]

    @property
    def device(self) -> torch.device:
        """Where the rows are."""
        return self.ends.device

    @property
    def host(self) -> tuple[int, ...] | None:
        """The size of every split; None if only the device knows."""
        return None if self.rows is None else self.rows.rows

    @property
    def cover_all_rows(self) -> bool:
        """Whether the host knows that every row belongs to a split."""
        return self.rows is not None and self.rows.total == self.num_rows

    @cached_property
    def ends_int32(self) -> torch.Tensor:
        """`ends` as int32, converted once: what `torch._grouped_mm` reads."""
        return self.ends.to(torch.int32)

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """The size of every split. If only the device knows them, the first look waits for it.

        Raises: ValueError: if the device holds a negative size, or more rows than there are.
        """
        if self.rows is not None:
            return self.rows.rows
        ends = self.ends.tolist()
        sizes = tuple([end - start for start, end in zip([0, *ends], ends, strict=False)])
        if min(sizes, default=0) < 0 or (ends and ends[-1] > self.num_rows):
            raise ValueError(
                f"m_splits from the device must not be negative nor add up to more than the {self.num_rows} rows; got "
                f"{list(sizes)}. Correct what computes them."
            )
        return sizes


def upload_ends(rows: Sequence[int], device: torch.device) -> torch.Tensor:
    """The rows up to and including each split, int64, on `device`, without waiting for it.

    The copy leaves from pinned memory, whose allocator keeps it until the copy is done and then uses it again.
    """
    if not rows:
        return torch.empty(0, dtype=torch.int64, device=device)
    sizes = torch.frombuffer(array("q", rows), dtype=torch.int64)
    if device.type != "cuda":
        return sizes.cumsum(0).to(device)
    staging = torch.empty(len(rows), dtype=torch.int64, pin_memory=True)
    return torch.cumsum(sizes, 0, out=staging).to(device, non_blocking=True)


def check_sizes(m_splits: torch.Tensor, device: torch.device) -> None:
    """Check that a tensor can hold the sizes of splits of rows on `device`.

    Raises: ValueError, TypeError.
    """
    dtype = m_splits.dtype
    if m_splits.dim() != 1 or dtype.is_floating_point or dtype.is_complex or dtype == torch.bool:
        raise TypeError(
            f"m_splits as a tensor must be 1-D and of integers; got {tuple(m_splits.shape)} {dtype}. "
            "Pass the number of rows of each split; m_splits.long() if they are whole numbers."
        )
    if m_splits.device.type != "cpu" and m_splits.device != device:
        raise ValueError(
            f"m_splits must be on the CPU or on {device}, where the rows are; got {m_splits.device}. "
            f"Pass m_splits.to({str(device)!r})."
        )
