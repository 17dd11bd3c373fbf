"""Memory that runs out in a training is named, with what the training needs and what to change; advice is arithmetic."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_training import QUICK, tiny_model

from mixmerge.errors import ModelError, StepError
from mixmerge.train.memory import Shape, memory_advice, naming_lack_of_memory, settings_memory, shape_of
from mixmerge.train.settings import Adapter, Devices, DpoSettings, SftSettings

SMALL = Shape(parameters=1000, layers=4, hidden=8, inner=32, vocabulary=100)
PLAIN = SftSettings(batch_size=8, max_length=64)


def needs(advice: str) -> list[str]:
    """The names of what advice says to change, in its order."""
    return [part.split(":")[0] for part in advice.partition("; set ")[2].split(", ")]


def test_settings_make_the_estimate_that_the_rows_and_weights_make():
    whole = settings_memory(SMALL, PLAIN)
    parts = settings_memory(SMALL, replace(PLAIN, gradient_accumulation=4))
    assert whole.activations == 4 * parts.activations
    assert settings_memory(SMALL, replace(PLAIN, gradient_accumulation=2), devices=Devices(2)) == parts
    pairs = settings_memory(SMALL, DpoSettings(batch_size=8, max_length=64))
    assert (pairs.activations, pairs.weights) == (2 * whole.activations, whole.weights)
    adapted = settings_memory(SMALL, replace(PLAIN, adapter=Adapter(r=1)))
    assert adapted.optimiser < whole.optimiser
    assert settings_memory(SMALL, PLAIN, checkpointing=True).activations < whole.activations


def test_processes_share_rows_and_with_fsdp_all_else_that_they_hold():
    alone, four = settings_memory(SMALL, PLAIN), Devices(processes=2, nodes=2)
    rows = settings_memory(SMALL, PLAIN, devices=four)
    assert (rows.activations * 4, rows.logits * 4) == (alone.activations, alone.logits)
    assert (rows.weights, rows.gradients, rows.optimiser) == (alone.weights, alone.gradients, alone.optimiser)
    all_of_it = settings_memory(SMALL, PLAIN, devices=replace(four, fsdp=True))
    assert all_of_it.total * 4 == alone.total


def test_advice_begins_with_what_saves_most_and_says_how_much(llama):
    advice = memory_advice(llama, replace(PLAIN, batch_size=64, max_length=256))
    assert advice.startswith("it needs about 0.")
    assert "; set training.gradient_accumulation: 64 (the rows of a step stay the same): about 0.0 GB, or" in advice
    assert needs(advice)[0] == "training.gradient_accumulation"
    assert sorted(needs(advice)[1:]) == [
        *("or how.gradient_checkpointing", "or training.adapter", "or training.max_length"),
    ]
    few = memory_advice(llama, replace(PLAIN, batch_size=2, max_length=8))
    assert needs(few)[0] == "training.adapter", "with few tokens the weights weigh most"


def test_advice_leaves_out_what_is_set_already(llama):
    done = replace(PLAIN, gradient_accumulation=8, adapter=Adapter())
    assert needs(memory_advice(llama, done, checkpointing=True)) == ["training.max_length"]
    assert needs(memory_advice(llama, replace(done, max_length=2), checkpointing=True)) == [""]
    among = replace(PLAIN, gradient_accumulation=4)
    assert "how.fsdp" in needs(memory_advice(llama, among, devices=Devices(2)))
    assert "fsdp" not in memory_advice(llama, among, devices=Devices(2, fsdp=True))
    assert "gradient_accumulation" not in memory_advice(llama, among, devices=Devices(2))


def test_advice_without_a_shape_has_no_figures(tmp_path):
    advice = memory_advice(tmp_path, PLAIN, checkpointing=True)
    assert advice.startswith("set training.gradient_accumulation: 8 ")
    assert "GB" not in advice
    last = replace(PLAIN, gradient_accumulation=8, adapter=Adapter(), max_length=2)
    assert memory_advice(tmp_path, last, checkpointing=True) == "train a smaller model"


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        MemoryError(),
        OSError(12, "Cannot allocate memory"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:131] DefaultCPUAllocator: can't allocate memory: you tried"),
        RuntimeError("std::bad_alloc"),
    ],
)
def test_every_word_for_missing_memory_is_understood(error, llama):
    named = r"the training ran out of memory \(.*; it needs about .* GB by estimate; set"
    with pytest.raises(StepError, match=named), naming_lack_of_memory(llama, PLAIN):
        raise error
    with pytest.raises(StepError, match="ran out of memory"), naming_lack_of_memory(llama, PLAIN):
        raise ModelError("cannot load the model") from error


def test_other_errors_are_left_as_they_are(llama):
    for error in (ValueError("x"), RuntimeError("the loss is NaN"), ModelError("no such folder"), OSError(2, "gone")):
        with pytest.raises(type(error)) as caught, naming_lack_of_memory(llama, PLAIN):
            raise error
        assert caught.value is error


LIMITED = """
import json, resource, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import mixmerge.train.trainer, mixmerge.train.pairs
from tiny_training import train
from mixmerge.errors import MixmergeError
model, mixture, folder = map(Path, sys.argv[2:5])
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 400 * 2**20, resource.RLIM_INFINITY))
try:
    train(model, mixture, folder, **json.loads(sys.argv[5]))
except MixmergeError as error:
    sys.exit(f"{type(error).__name__}: {error}")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not bound a process's memory")
@pytest.mark.parametrize("method", ["sft", "dpo"])
def test_a_training_that_truly_runs_out_of_memory_says_what_to_change(method, facts, choices, tmp_path):
    model = tiny_model(tmp_path / "wide", intermediate_size=60_000, num_hidden_layers=1)
    mixture = facts if method == "sft" else choices
    settings = json.dumps({"method": method, "batch_size": 24, "gradient_accumulation": 2, "adapter": {"r": 2}})
    arguments = [Path(__file__).parent, model, mixture, tmp_path, settings]
    ended = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", LIMITED, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    said = ended.stderr.strip().splitlines()[-1]
    assert said.startswith("StepError: the training ran out of memory (RuntimeError: "), ended.stderr
    assert "allocate memory" in said
    estimate = settings_memory(
        shape_of(model),
        replace(SftSettings(), **QUICK | {"batch_size": 12 if method == "sft" else 24}, adapter=Adapter(r=2)),
    )
    assert f"it needs about {estimate.total / 1e9:.1f} GB by estimate; set " in said
    assert "training.gradient_accumulation: 24 (the rows of a step stay the same): about " in said
    assert "how.gradient_checkpointing: true: about " in said
    assert "adapter" not in said.partition("; set ")[2]
    assert not (tmp_path / "out").exists()
