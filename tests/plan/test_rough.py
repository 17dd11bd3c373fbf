"""Rough rates: what a step takes where nothing was measured, against what real studies took, and what is not known."""

from __future__ import annotations

import pytest

from mixmerge.machine import Machine
from mixmerge.plan.rough import SPREAD, gpus_of, rough_bytes, rough_seconds
from mixmerge.plan.size import Size
from mixmerge.plan.work import Facts, Work, work_of

TWO_CORES, H200 = Machine("x86_64", 2), Machine("x86_64", 16, ("NVIDIA H200",))
GEMMA = Size(151_526_016, 303_052_032, "the base's record")
AYA = Size(8_028_033_024, 16_056_066_048, "the base's files")


def train(**changes):
    what = {"method": "sft", "epochs": 1.0, "precision": "bf16"} | changes
    return {"kind": "train", "what": what, "how": {"processes": 1}, "inputs": {}}


def generate(prompts=120, longest=40, **how):
    how = {"prompts": prompts, "batch_size": 96} | how
    return {"kind": "generate", "what": {"max_new_tokens": longest}, "how": how, "inputs": {}}


def seconds(spec, size=GEMMA, tokens=None, on=TWO_CORES):
    work = work_of(spec, Facts(None if size is None else size.parameters, tokens))
    return rough_seconds(spec["kind"], spec["what"], spec["how"], work, size, on)


@pytest.mark.parametrize(
    ("spec", "tokens", "measured"),
    [  # the quickstart on two cores of a server
        (train(), 24_000, 121.0),
        (train(), 48_000, 249.0),
        (generate(), None, 13.0),
        (
            {
                "kind": "merge",
                "what": {"config": {"merge_method": "ties"}},
                "how": {},
                "inputs": dict.fromkeys("abc", "x"),
            },
            None,
            1.9,
        ),
        ({"kind": "judge", "what": {"judge": "refusal"}, "how": {"prompts": 120}, "inputs": {}}, None, 2.2),
    ],
)
def test_what_a_real_study_took_is_within_the_range(spec, tokens, measured):
    found = seconds(spec, tokens=tokens)
    assert found / SPREAD <= measured <= found * SPREAD


def test_a_gpu_trains_a_large_model_in_hours_and_cores_in_months():
    gpu, cores = (seconds(train(), AYA, 10_000_000, on) for on in (H200, TWO_CORES))
    assert 600 < gpu < 3600
    assert cores > 30 * 86_400


def test_time_grows_with_tokens_epochs_and_weights():
    once = seconds(train(), AYA, 1_000_000, H200)
    assert seconds(train(epochs=3.0), AYA, 1_000_000, H200) > 2.5 * once
    assert seconds(train(), AYA, 3_000_000, H200) == pytest.approx(seconds(train(epochs=3.0), AYA, 1_000_000, H200))
    assert seconds(train(method="dpo"), AYA, 1_000_000, H200) > once
    assert seconds(train(adapter={"type": "lora"}), AYA, 1_000_000, H200) < once


def test_checkpointing_and_more_processes_are_counted():
    spec, more, shared = train(), train(), train()
    more["how"] = {"gradient_checkpointing": True}
    shared["how"] = {"processes": 8, "nodes": 2}
    eight = Machine("x86_64", 64, ("NVIDIA H100",) * 8)
    once = seconds(spec, AYA, 50_000_000, eight)
    assert seconds(more, AYA, 50_000_000, eight) > once
    assert seconds(shared, AYA, 50_000_000, eight) < once / 10


@pytest.mark.parametrize(
    ("how", "on", "gpus"),
    [
        ({"device": "cpu"}, H200, 0),
        ({"device": "auto"}, TWO_CORES, 0),
        ({"device": "auto"}, H200, 2),
        ({"device": "cuda"}, TWO_CORES, 2),
        ({}, H200, 2),
    ],
)
def test_gpus_are_taken_where_there_are_any_or_one_is_asked_for(how, on, gpus):
    assert gpus_of(how, Work(1.0, 1.0, gpus=2), on) == gpus


def test_a_gpu_that_is_not_known_is_a_plain_one():
    known, other, none = (Machine("x86_64", 2, gpus) for gpus in (("NVIDIA L40S",), ("Some XPU",), ()))
    cuda = generate(device="cuda")
    assert seconds(cuda, on=known) < seconds(cuda, on=other) == seconds(cuda, on=none)


def test_a_server_elsewhere_and_tasks_of_unknown_length_are_not_guessed():
    url = {"urls": ["http://localhost:1/v1"], "replicas": 1}
    served = generate(server=url)
    served["what"] |= {"server": {"known_as": "x"}}
    assert seconds(served) is None
    harness = {"tasks": ["a"], "limit": None, "num_fewshot": None}
    assert seconds({"kind": "harness", "what": harness, "how": {}, "inputs": {}}) is None
    assert seconds(train(), None, 1000) is None
    pipeline = {"kind": "judge", "what": {"judge": "pipeline"}, "how": {"prompts": 3, "path": "x.joblib"}, "inputs": {}}
    assert seconds(pipeline) is None


def test_a_guard_on_this_machine_takes_as_long_as_it_is_large(tmp_path):
    spec = {"kind": "judge", "what": {"judge": "guard"}, "how": {"prompts": 100, "path": str(tmp_path)}, "inputs": {}}
    (tmp_path / "model.safetensors").write_bytes(bytes(2_000_000))
    small = seconds(spec)
    (tmp_path / "model-2.safetensors").write_bytes(bytes(20_000_000))
    assert seconds(spec) > small


@pytest.mark.parametrize(
    ("kind", "what", "bytes_"),
    [
        ("train", {"method": "sft"}, 303_052_032),
        ("train", {"method": "sft", "save_dtype": "float32"}, 606_104_064),
        ("merge", {"config": {"dtype": "float32"}}, 606_104_064),
        ("merge", {"config": {"dtype": "bfloat16"}}, 303_052_032),
        ("adopt", {"source": {}}, 303_052_032),
    ],
)
def test_a_model_takes_the_bytes_of_its_weights(kind, what, bytes_):
    work = Work(1.0, 1.0)
    assert rough_bytes(kind, what, {}, work, GEMMA) == bytes_
    assert rough_bytes(kind, what, {}, work, None) is None


def test_answers_and_verdicts_take_some_bytes_each():
    assert 10_000 < rough_bytes("generate", {}, {"prompts": 120}, Work(1.0, 4800.0), GEMMA) < 200_000
    assert 10_000 < rough_bytes("judge", {}, {}, Work(120.0, 120.0), GEMMA) < 100_000
    assert rough_bytes("judge", {}, {}, Work(None, None), GEMMA) is None
