"""What kind of machine this is, and which one a record tells of."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

from mixmerge import machine
from mixmerge.machine import Machine, this_machine, visible

RECORD = {"host": "vm", "machine": "x86_64", "cores": 4, "versions": {"torch": "2.13.0+cpu"}}


def test_this_machine_has_the_cores_that_this_process_may_use():
    found = this_machine()
    assert found.processor == platform.machine()
    assert found.cores == len(os.sched_getaffinity(0))
    code = "import sys; from mixmerge.machine import this_machine; this_machine(); assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    ("said", "left"),
    [
        (None, ("A", "B", "C")),
        ("", ()),
        ("2", ("C",)),
        ("1,0", ("B", "A")),
        ("0, 7", ("A",)),
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
    machine._gpus.cache_clear()
    try:
        assert this_machine().gpus == ("NVIDIA H200", "NVIDIA H200")
        assert str(Machine("x86_64", 16, this_machine().gpus)) == "16 cores of x86_64, 2 NVIDIA H200"
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
        assert len(this_machine().gpus) == 1
    finally:
        machine._gpus.cache_clear()


def test_a_record_tells_its_machine_with_or_without_gpus():
    assert Machine.of_record(RECORD) == Machine("x86_64", 4)
    assert Machine.of_record(RECORD | {"gpus": ["NVIDIA H200"]}) == Machine("x86_64", 4, ("NVIDIA H200",))


@pytest.mark.parametrize("lost", ["machine", "cores", "versions"])
def test_a_record_that_does_not_tell_its_machine_is_of_none(lost):
    assert Machine.of_record({key: value for key, value in RECORD.items() if key != lost}) is None


def test_a_record_of_a_torch_with_cuda_may_be_of_any_gpu():
    assert Machine.of_record(RECORD | {"versions": {"torch": "2.13.0"}}) is None
