"""`Splits`: what the host knows of them, what the device does, and what is refused."""

from __future__ import annotations

import copy
import dataclasses
import doctest
import pickle

import pytest
import torch

from lighterage.formats import Splits
from lighterage.formats import splits as splits_module
from tests.formats.cases import no_waiting

CPU = torch.device("cpu")


def from_device(sizes: list[int], num_rows: int) -> Splits:
    """Splits as they come from a device tensor, on the CPU: the host does not know them."""
    return Splits(num_rows=num_rows, ends=torch.tensor(sizes, dtype=torch.int64).cumsum(0))


@pytest.mark.parametrize(
    "m_splits",
    [[3, 0, 2], (3, 0, 2), torch.tensor([3, 0, 2]), torch.tensor([3, 0, 2], dtype=torch.int32)],
    ids=["list", "tuple", "int64", "int32"],
)
def test_sizes_of_every_kind_give_the_same_splits(m_splits: object) -> None:
    splits = Splits.of(m_splits, 5, CPU)
    assert (splits.num_splits, splits.num_rows, splits.host, splits.sizes) == (3, 5, (3, 0, 2), (3, 0, 2))
    assert (splits.ends.tolist(), splits.ends.dtype, splits.device) == ([3, 3, 5], torch.int64, CPU)
    assert splits.ends_int32.dtype == torch.int32 and splits.ends_int32 is splits.ends_int32, "made once"
    assert Splits.of(splits, 5, CPU) is splits
    assert Splits.of(m_splits, 5, "cpu").host == (3, 0, 2)


def test_splits_of_the_device_are_asked_for_at_the_first_look_and_once() -> None:
    splits = from_device([3, 0, 2], 6)
    assert (splits.host, splits.num_splits, splits.num_rows) == (None, 3, 6)
    assert splits.sizes == (3, 0, 2) and splits.sizes is splits.sizes
    assert splits.host is None, "what the host knew when they were made decides which way is taken"
    assert Splits.of(splits, 6, CPU) is splits


def test_no_splits() -> None:
    splits = Splits.of([], 0, CPU)
    assert (splits.num_splits, splits.host, splits.sizes, splits.ends.shape) == (0, (), (), (0,))
    assert from_device([], 4).sizes == ()


def test_leading_dimensions_count_as_rows() -> None:
    splits = Splits.of([2, 0, 1], 3, CPU, rows_per_split=4)
    assert (splits.host, splits.num_rows, splits.ends.tolist()) == ((8, 0, 4), 12, [8, 8, 12])
    assert Splits.of(Splits.of([2, 0, 1], 3, CPU), 3, CPU, rows_per_split=4).host == (8, 0, 4)


def test_splits_are_immutable_and_can_be_copied_and_pickled() -> None:
    for splits in (Splits.of([3, 2], 5, CPU), from_device([3, 2], 5)):
        with pytest.raises(dataclasses.FrozenInstanceError):
            splits.num_rows = 4
        assert splits.ends_int32.tolist() == [3, 5]
        for again in (copy.deepcopy(splits), pickle.loads(pickle.dumps(splits))):
            assert (again.host, again.num_rows, again.sizes) == (splits.host, 5, (3, 2))


@pytest.mark.parametrize(
    ("m_splits", "error", "message"),
    [
        ([3, 1], ValueError, r"must add up .* got a sum of 4 for 5: too short by 1\. Slice x"),
        ([3, 3], ValueError, "got a sum of 6 for 5: too long by 1"),
        ([7, -2], ValueError, "must not be negative; got -2 at index 1. Use 0"),
        (torch.tensor([7, -2]), ValueError, "must not be negative; got -2 at index 1"),
        ([2.5, 2.5], TypeError, r"must be integers; got \[2.5, 2.5\]"),
        (5, TypeError, "must be integers; got 5"),
        (torch.tensor([2.5, 2.5]), TypeError, r"1-D and of integers; got \(2,\) torch.float32"),
        (torch.tensor([True, False]), TypeError, "torch.bool"),
        (torch.tensor([[3, 2]]), TypeError, r"1-D and of integers; got \(1, 2\) torch.int64"),
        (torch.tensor(5), TypeError, r"got \(\) torch.int64"),
        (torch.tensor([3, 2], device="meta"), ValueError, "on the CPU or on cpu, where the rows are; got meta"),
        (Splits.of([3, 3], 6, CPU), ValueError, "are of 6 rows on cpu; got 5 rows on cpu"),
    ],
)
def test_what_does_not_fit_is_refused_with_a_remedy(m_splits: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Splits.of(m_splits, 5, CPU)


def test_splits_of_another_device_are_refused() -> None:
    with pytest.raises(ValueError, match="of 5 rows on cpu; got 5 rows on meta"):
        Splits.of(Splits.of([3, 2], 5, CPU), 5, torch.device("meta"))


def test_splits_of_the_device_split_a_matrix() -> None:
    with pytest.raises(ValueError, match=r"more than 2 dimensions. Pass x.flatten\(0, -2\)"):
        Splits.of(from_device([3, 2], 5), 5, CPU, rows_per_split=4)


@pytest.mark.parametrize("sizes", [[4, 2], [7, -2]])
def test_sizes_that_the_device_got_wrong_are_told_at_the_first_look(sizes: list[int]) -> None:
    with pytest.raises(ValueError, match=r"from the device must not be negative nor add up to more than the 5 rows"):
        assert from_device(sizes, 5).sizes


def test_docstring_examples_run() -> None:
    assert doctest.testmod(splits_module).failed == 0


@pytest.mark.gpu
def test_the_host_never_waits_and_reads_no_size_from_the_device() -> None:
    sizes = torch.tensor([3, 0, 2], device="cuda", dtype=torch.int32)
    torch.cuda.synchronize()
    with no_waiting():
        splits = Splits.of(sizes, 8, torch.device("cuda"))
        known = Splits.of([3, 0, 5], 8, splits.device)
        assert (splits.host, splits.num_splits, str(splits.device)) == (None, 3, "cuda:0")
        ends = splits.ends_int32
    assert ends.tolist() == [3, 3, 5] and known.ends.tolist() == [3, 3, 8] and splits.sizes == (3, 0, 2)
    assert Splits.of(sizes.cpu(), 5, splits.device).host == (3, 0, 2)
    with pytest.raises(ValueError, match="on the CPU or on cpu, where the rows are; got cuda:0"):
        Splits.of(sizes, 5, CPU)
