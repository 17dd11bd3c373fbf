"""A note where a training is to be shared by more processes than this machine has GPUs."""

from __future__ import annotations

import pytest

from mixmerge import machine

FOUR, BATCH = "how.processes=4", "training.batch_size=4"


@pytest.fixture
def with_gpus(tmp_path, monkeypatch):
    """Put a driver's program on the path that lists so many GPUs."""

    def with_gpus(count: int) -> None:
        program = tmp_path / "nvidia-smi"
        listed = "".join(f"echo 'GPU {at}: NVIDIA H100 (UUID: GPU-{at})'\n" for at in range(count))
        program.write_text(f"#!/bin/sh\n{listed}")
        program.chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        machine.gpu_models.cache_clear()

    yield with_gpus
    machine.gpu_models.cache_clear()


def told(plan) -> list[str]:
    return [note for note in plan.notes if note.startswith("how.processes: ")]


def test_more_processes_than_gpus_are_told_before_anything_runs(planned, with_gpus):
    with_gpus(1)
    want = "how.processes: 4 processes share a training, and this machine has 1 GPU"
    assert told(planned(FOUR, BATCH)) == [f"{want}; here it would end at once, since each process needs one"]


@pytest.mark.parametrize(
    ("gpus", "settings"),
    [
        (4, [FOUR, BATCH]),
        (8, [FOUR, BATCH]),
        (1, []),
        (1, [FOUR, BATCH, "how.device=cpu"]),
        (0, [FOUR, BATCH]),
    ],
)
def test_enough_gpus_or_none_at_all_need_no_note(planned, with_gpus, gpus, settings):
    with_gpus(gpus)
    assert told(planned(*settings)) == []


@pytest.mark.parametrize(("gpus", "notes"), [(0, 1), (1, 0)])
def test_a_device_that_this_machine_has_none_of_is_told(planned, with_gpus, gpus, notes):
    with_gpus(gpus)
    found = [note for note in planned("how.device=cuda").notes if note.startswith("how.device: ")]
    assert found == ["how.device: cuda, and this machine has no GPU; here trainings would end at once"] * notes


def test_the_note_is_printed_by_check(study, with_gpus, mixmerge):
    with_gpus(2)
    status, out, err = mixmerge("check", study.recipe, "--set", FOUR, "--set", BATCH)
    assert status == 0, err
    assert "4 processes share a training, and this machine has 2 GPUs" in out + err
