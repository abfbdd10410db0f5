"""`lighterage doctor`: it measures what there is, says what does not apply, and survives what fails."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from lighterage.cli import doctor_measure, main
from lighterage.cli.doctor import describe
from lighterage.cli.doctor_measure import Disk, Findings, Placement, SizeRates, disk_rates, examine, parse_cpus
from lighterage.planner.timeline import Link
from tests.planner.decoder import LINK

MIB = 1 << 20
CPU = torch.device("cpu")


def test_a_cpu_has_its_disk_measured_and_is_told_what_does_not_apply(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(doctor_measure, "_CHUNK", MIB)
    assert main(["doctor", "--device", "cpu", "--disk-dir", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    for words in ("Device: the CPU", "no accelerator", "Disk tier: ", "Memory lock", "NUMA", "Host memory", "10 ms"):
        assert words in text
    assert "FAILED" not in text
    assert list(tmp_path.iterdir()) == []


def test_json_holds_the_same(tmp_path, capsys):
    assert main(["doctor", "--device", "cpu", "--disk-dir", str(tmp_path), "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["link"] is None and data["disk"]["write_bytes_per_s"] > 1e6 and data["failures"] == []
    assert data.keys() == {field.name for field in dataclasses.fields(Findings)}


def test_what_fails_is_reported_and_the_rest_is_measured(tmp_path, capsys):
    assert main(["doctor", "--device", "cpu", "--disk-dir", str(tmp_path / "missing")]) == 1
    text = capsys.readouterr().out
    assert "FAILED: the disk tier: FileNotFoundError" in text and "Host memory" in text


@pytest.mark.parametrize("device", ["tpu9", "cuda:0" if not torch.cuda.is_available() else "xpu:0"])
def test_a_device_that_is_not_there_is_wrong_use(device, capsys):
    assert main(["doctor", "--device", device]) == 2
    assert f"--device {device}" in capsys.readouterr().err


GPU = Findings(
    device="NVIDIA H100 80GB HBM3 (cuda:0)",
    is_accelerator=True,
    device_bytes=80 << 30,
    link=LINK,
    by_size=tuple(
        SizeRates(nbytes=nbytes, out_bytes_per_s=rate, in_bytes_per_s=rate, both_bytes_per_s=1.7 * rate)
        for nbytes, rate in ((65536, 11e9), (MIB, 49e9), (4 * MIB, 55e9), (64 * MIB, 55e9))
    ),
    pin_bytes_per_s=1.5 * (1 << 30),
    memory_lock_bytes=8 * MIB,
    host_total_bytes=200 << 30,
    host_available_bytes=150 << 30,
    placement=Placement(device_node=1, cpu_nodes=(0, 1)),
    disk=Disk(folder="/tmp", free_bytes=1 << 40, write_bytes_per_s=2e9, read_bytes_per_s=5e9),
)


def test_a_gpu_is_told_what_can_be_hidden():
    text = describe(GPU)
    assert "It can hide 0.55 GB" in text and "for each 10 ms" in text and "a forward of 100 ms hides 5.5 GB" in text
    assert "Copies of 4 MiB and more use nine tenths" in text
    assert "carry 85%" in text and "0.67 s a GiB" in text and "8 MiB (`ulimit -l`)" in text
    assert "numactl --cpunodebind=1 --membind=1" in text
    assert "20 MB for each 10 ms" in text


def test_a_gpu_beside_its_process_and_one_whose_place_is_unknown():
    beside = dataclasses.replace(GPU, placement=Placement(device_node=1, cpu_nodes=(1,)), memory_lock_bytes=None)
    assert "both on node 1" in describe(beside) and "Memory lock: no limit" in describe(beside)
    unknown = dataclasses.replace(GPU, placement=Placement(device_node=None, cpu_nodes=(0,)))
    assert "the system does not say" in describe(unknown)
    nothing = Findings(device="odd", is_accelerator=True, failures=("the link: OSError: no",))
    assert "FAILED: the link" in describe(nothing)


def test_lists_of_cpus_are_read():
    assert parse_cpus("0-2,7\n") == {0, 1, 2, 7}
    assert parse_cpus("") == set()


def test_the_disk_is_measured_in_whole(tmp_path):
    disk = disk_rates(str(tmp_path), 1)
    assert disk.write_bytes_per_s > 0 and disk.read_bytes_per_s > 0 and disk.free_bytes > 0


@pytest.mark.gpu
def test_a_gpu_is_measured(tmp_path, capsys):
    file = tmp_path / "link.json"
    assert main(["doctor", "--device", "cuda", "--disk-dir", str(tmp_path), "--link", str(file)]) == 0
    text = capsys.readouterr().out
    assert "It can hide" in text and "Pinning" in text and "FAILED" not in text
    assert Link.from_json(file.read_text()).out_bytes_per_s > 1e8


def test_a_link_is_not_written_where_there_is_none(tmp_path, capsys):
    assert main(["doctor", "--device", "cpu", "--disk-dir", str(tmp_path), "--link", str(tmp_path / "l.json")]) == 2
    assert "no link of an accelerator" in capsys.readouterr().err
    assert examine(CPU, str(tmp_path), disk_bytes=1).link is None


def test_a_link_that_cannot_be_written_is_told_before_the_measuring(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(doctor_measure, "examine", lambda device, disk_dir: pytest.fail("it measured"))
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    for link, told in (
        (tmp_path / "missing" / "l.json", "Make it first"),
        (tmp_path / "l.txt", "ends in .json"),
        (tmp_path, "ends in .json"),
    ):
        assert main(["doctor", "--device", "cuda:1", "--link", str(link)]) == 2
        assert told in capsys.readouterr().err
    assert main(["doctor", "--device", "cuda:2"]) == 2
    assert "--device cuda:2: there are 2 here" in capsys.readouterr().err
