"""Killed at any step, every kind of training ends with the very weights and metrics of one that was not."""

from __future__ import annotations

import json
import shutil
import signal

import pytest
from tiny_training import metrics_of, run_child, same, train, weights

# How a training may differ in what its checkpoint must hold: dropout draws from a generator, an adapter is saved alone.
KINDS = {
    "sft": {},
    "dpo": {"method": "dpo"},
    "sft in bf16 and in parts": {"precision": "bf16", "gradient_accumulation": 2},
    "dpo in parts": {"method": "dpo", "gradient_accumulation": 4},
    "sft by lora with dropout": {"adapter": {"type": "lora", "r": 4, "dropout": 0.2}, "save_dtype": "float32"},
    "dpo by lora": {"method": "dpo", "adapter": {"type": "lora", "r": 4}, "save_dtype": "float32"},
}
HARDER = [kind for kind in KINDS if kind not in ("sft", "dpo")]  # the plain ones are killed in their own files
STEPS = 18  # 24 rows, 4 a step, 3 epochs; a checkpoint every 4 steps


def mixture_of(kind, request):
    return request.getfixturevalue("choices" if "dpo" in kind else "facts")


@pytest.fixture(scope="module")
def unbroken(llama, request, tmp_path_factory):
    """Each kind trained in one go, once."""
    made = {}

    def unbroken(kind):
        if kind not in made:
            folder = tmp_path_factory.mktemp("unbroken")
            train(llama, mixture_of(kind, request), folder, None, 4, epochs=3, **KINDS[kind])
            made[kind] = folder
        return made[kind]

    return unbroken


@pytest.mark.parametrize("kind", HARDER)
def test_a_training_killed_in_its_middle_ends_as_if_it_had_not_been(kind, llama, unbroken, request, tmp_path):
    mixture = mixture_of(kind, request)
    killed = run_child(llama, mixture, tmp_path, 10, epochs=3, **KINDS[kind])
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    steps = []
    train(llama, mixture, tmp_path, lambda done, _: steps.append(done), 4, epochs=3, **KINDS[kind])
    assert steps == list(range(9, STEPS + 1))
    assert same(weights(tmp_path), weights(unbroken(kind)))
    assert metrics_of(tmp_path) == metrics_of(unbroken(kind))


class KilledError(BaseException):
    """Ends a training as a kill does: no code of ours catches it."""


@pytest.mark.parametrize("kind", HARDER)
def test_a_training_stopped_again_and_again_ends_as_if_it_had_not_been(kind, llama, unbroken, request, tmp_path):
    mixture = mixture_of(kind, request)
    for stop in (1, 7, STEPS):

        def progress(done, _, stop=stop):
            if done == stop:
                raise KilledError

        with pytest.raises(KilledError):
            train(llama, mixture, tmp_path, progress, 1, epochs=3, **KINDS[kind])
        assert not (tmp_path / "out").exists()
    train(llama, mixture, tmp_path, None, 1, epochs=3, **KINDS[kind])
    assert same(weights(tmp_path), weights(unbroken(kind)))


@pytest.mark.parametrize("kind", ["sft", "dpo by lora"])
def test_a_checkpoint_that_is_cut_is_dropped_and_the_training_starts_from_the_one_before(
    kind, llama, unbroken, request, tmp_path
):
    mixture = mixture_of(kind, request)
    assert run_child(llama, mixture, tmp_path, 11, epochs=3, **KINDS[kind]).returncode == -signal.SIGKILL
    whole = tmp_path / "work" / "checkpoint-8"
    half = tmp_path / "work" / "checkpoint-12"
    shutil.copytree(whole, half)
    marker = json.loads((half / "whole.json").read_text())
    largest = max(marker["value"]["files"], key=marker["value"]["files"].get)
    (half / largest).write_bytes((half / largest).read_bytes()[:-100])
    train(llama, mixture, tmp_path, None, 4, epochs=3, **KINDS[kind])
    assert same(weights(tmp_path), weights(unbroken(kind)))


@pytest.mark.parametrize("kind", ["sft by lora with dropout"])
def test_a_training_is_the_same_in_a_process_that_trained_before(kind, llama, facts, choices, request, tmp_path):
    mixture = mixture_of(kind, request)
    assert run_child(llama, mixture, tmp_path / "fresh", -1, **KINDS[kind]).returncode == 0
    train(llama, choices, tmp_path / "other", None, 4, method="dpo", seed=9)
    train(llama, facts, tmp_path / "another", None, 4, seed=8)
    train(llama, mixture, tmp_path / "after", None, 4, **KINDS[kind])
    assert same(weights(tmp_path / "fresh"), weights(tmp_path / "after"))
