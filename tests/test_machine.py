"""What kind of machine this is, and which one a record tells of."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

from mixmerge import machine
from mixmerge.machine import Machine, this_machine, visible

RECORD = {
    "host": "vm",
    "machine": "x86_64",
    "processor": "AMD EPYC 9654",
    "cores": 4,
    "versions": {"torch": "2.13.0+cpu"},
}


def test_this_machine_has_the_cores_that_this_process_may_use():
    found = this_machine()
    assert found.processor == machine.processor_model()
    assert found.cores == len(os.sched_getaffinity(0))
    code = "import sys; from mixmerge.machine import this_machine; this_machine(); assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    ("text", "name"),
    [
        (
            "processor\t: 0\nmodel name\t: AMD EPYC 9654 96-Core Processor \nflags\t: x\n",
            "AMD EPYC 9654 96-Core Processor",
        ),
        ("processor\t: 0\nBogoMIPS\t: 50.00\nCPU part\t: 0xd40\n", None),
        ("model name\t: \nflags\t: x\n", None),
    ],
)
def test_the_processor_is_told_by_its_makers_name_else_by_its_architecture(tmp_path, monkeypatch, text, name):
    (tmp_path / "cpuinfo").write_text(text)
    monkeypatch.setattr(machine, "CPUINFO", tmp_path / "cpuinfo")
    assert machine.processor_model.__wrapped__() == (name or platform.processor() or platform.machine())


def test_two_processors_of_one_architecture_are_two_kinds_of_machine():
    one, other = Machine("AMD EPYC 9654", 4), Machine("Intel Xeon 8480", 4)
    assert not one.of_kind(other)
    assert one.of_kind(Machine("AMD EPYC 9654", 4))


@pytest.mark.parametrize(
    ("said", "left"),
    [
        (None, ("A", "B", "C")),
        ("", ()),
        ("2", ("C",)),
        ("1,0", ("B", "A")),
        ("0, 7", ("A",)),
        ("-1", ()),
        ("0,-1,1", ("A",)),
        ("GPU-8932f937-d72c,GPU-0aa5", ("A", "B")),
    ],
)
def test_the_gpus_are_those_that_cuda_shows(said, left):
    assert visible(("A", "B", "C"), said) == left


def test_the_names_of_gpus_are_read_from_the_driver(tmp_path, monkeypatch):
    for place in ("0000:01:00.0", "0000:02:00.0"):
        (tmp_path / place).mkdir()
        text = "Model: \t\t NVIDIA H200\nIRQ:   \t\t 42\nGPU UUID: \t GPU-1\n"
        (tmp_path / place / "information").write_text(text)
    monkeypatch.setattr(machine, "DRIVER", tmp_path)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    machine.gpu_models.cache_clear()
    try:
        assert this_machine().gpus == ("NVIDIA H200", "NVIDIA H200")
        assert str(Machine("x86_64", 16, this_machine().gpus)) == "16 cores of x86_64, 2 NVIDIA H200"
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
        assert len(this_machine().gpus) == 1
    finally:
        machine.gpu_models.cache_clear()


def test_a_record_tells_its_machine_with_or_without_gpus():
    assert Machine.of_record(RECORD) == Machine("AMD EPYC 9654", 4)
    assert Machine.of_record(RECORD | {"gpus": ["NVIDIA H200"]}) == Machine("AMD EPYC 9654", 4, ("NVIDIA H200",))


@pytest.mark.parametrize("lost", ["processor", "cores", "versions"])
def test_a_record_that_does_not_tell_its_machine_is_of_none(lost):
    assert Machine.of_record({key: value for key, value in RECORD.items() if key != lost}) is None


def test_a_record_of_a_torch_with_cuda_may_be_of_any_gpu():
    assert Machine.of_record(RECORD | {"versions": {"torch": "2.13.0"}}) is None
