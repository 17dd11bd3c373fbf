"""What machines have and steps take: GPUs by name, memory, and never more than there is."""

from __future__ import annotations

import os
import stat

import psutil
import pytest

from mixmerge import machine
from mixmerge.plan.graph import Plan, Step
from mixmerge.run import resources
from mixmerge.run.local import LocalBackend
from mixmerge.run.progress import Progress
from mixmerge.run.resources import (
    LOADED,
    RUNNING,
    Demand,
    Pool,
    Resources,
    Share,
    demand_of,
    demand_of_all,
    free_here,
    jobs_at_once,
)
from mixmerge.run.runner import Study, run_plan
from mixmerge.run.store import Store

GB = 1 << 30
TWO = Resources(8, 64 * GB, ("0", "1"))
WHAT = {
    "method": "sft",
    "learning_rate": 1e-3,
    "epochs": 1.0,
    "batch_size": 4,
    "max_length": 64,
    "warmup_ratio": 0.1,
    "scheduler": "cosine",
    "weight_decay": 0.0,
    "precision": "fp32",
    "seed": 0,
}


@pytest.fixture
def store(base_step, tmp_path):
    """A store with the tiny base in it."""
    run_plan(Plan("base", (base_step,), {}), tmp_path, jobs=1, threads=1, progress=Progress())
    return Store(tmp_path)


def weights(store, base_step) -> int:
    return sum(path.stat().st_size for path in store.path(base_step.id).glob("*.safetensors"))


def generate(base_step, **how) -> Step:
    return Step("generate", "base.p", {}, {"model": base_step.id}, how={"device": "auto", **how})


def train(base_step, **how) -> Step:
    return Step("train", "a", WHAT, {"model": base_step.id, "mixture": "0" * 12}, how={"device": "auto", **how})


# The pool


def test_a_pool_gives_each_gpu_to_one_step_at_a_time():
    pool = Pool(TWO)
    first, second = pool.take(Demand(1)), pool.take(Demand(1))
    assert (first, second) == (Share(("0",), 0), Share(("1",), 0))
    assert pool.take(Demand(1)) is None
    pool.give(first)
    assert pool.take(Demand(1)) == Share(("0",), 0)


def test_a_step_for_two_gpus_waits_for_both():
    pool = Pool(TWO)
    one = pool.take(Demand(1))
    assert pool.take(Demand(2)) is None
    pool.give(one)
    assert pool.take(Demand(2)).gpus == ("0", "1")


def test_memory_is_shared_out_and_given_back():
    pool = Pool(TWO)
    most = pool.take(Demand(0, 60 * GB))
    assert pool.take(Demand(0, 5 * GB)) is None
    assert pool.take(Demand(0, 4 * GB)) is not None
    pool.give(most)
    assert pool.take(Demand(0, 60 * GB)) is not None


def test_a_step_that_wants_more_than_there_is_gets_all_of_it_alone():
    pool = Pool(TWO)
    small = pool.take(Demand(0, GB))
    assert pool.take(Demand(9, 900 * GB)) is None
    pool.give(small)
    assert pool.take(Demand(9, 900 * GB)) == Share(("0", "1"), 64 * GB)


# The machine


def test_gpus_are_those_that_cuda_visible_devices_names(monkeypatch):
    for said, gpus in (("0,1", ("0", "1")), ("GPU-ab, 3", ("GPU-ab", "3")), ("", ()), ("-1", ()), ("0,-1,1", ("0",))):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", said)
        assert free_here().gpus == gpus


@pytest.mark.parametrize(
    ("script", "gpus"),
    [
        ("echo 'GPU 0: NVIDIA H200 (UUID: GPU-1)'; echo 'GPU 1: NVIDIA H200 (UUID: GPU-2)'", ("0", "1")),
        ("echo 'No devices were found'", ()),
        ("exit 9", ()),
    ],
)
def test_without_it_gpus_are_those_that_the_driver_lists(monkeypatch, tmp_path, script, gpus):
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    machine.gpu_models.cache_clear()
    try:
        assert free_here().gpus == gpus
        assert machine.gpu_models() == ("NVIDIA H200",) * len(gpus)
    finally:
        machine.gpu_models.cache_clear()


def test_a_machine_has_the_cores_and_the_memory_that_are_free():
    found = free_here()
    assert found.cores == len(os.sched_getaffinity(0))
    assert 0 < found.memory <= psutil.virtual_memory().total


# What steps take


def test_generation_takes_a_gpu_where_there_is_one_and_it_may(store, base_step):
    assert demand_of(generate(base_step), store, TWO).gpus == 1
    assert demand_of(generate(base_step, device="cpu"), store, TWO).gpus == 0
    assert demand_of(generate(base_step), store, Resources(8, 64 * GB)).gpus == 0


def test_generation_takes_its_model_and_some_in_memory(store, base_step):
    assert demand_of(generate(base_step), store, TWO).memory == RUNNING + int(LOADED * weights(store, base_step))


def test_a_training_takes_a_gpu_for_each_of_its_processes(store, base_step):
    assert demand_of(train(base_step), store, TWO).gpus == 1
    assert demand_of(train(base_step, processes=2), store, TWO).gpus == 2
    assert demand_of(train(base_step, processes=2, device="cpu"), store, TWO).gpus == 0


def test_a_training_on_cpu_takes_the_memory_of_its_estimate_in_each_process(store, base_step):
    alone = demand_of(train(base_step), store, Resources(8, 64 * GB)).memory - RUNNING
    assert alone > 3 * weights(store, base_step), "weights, gradients and moments in float32"
    both = demand_of(train(base_step, processes=2), store, Resources(8, 64 * GB)).memory - RUNNING
    assert alone < both <= 2 * alone


def test_a_server_that_is_started_takes_all_gpus_and_one_by_url_none(store, base_step):
    started = generate(base_step, server={"start": "vllm serve {model} --port {port}", "urls": None})
    assert demand_of(started, store, TWO).gpus == 2
    given = Step("judge", "x", {}, how={"urls": ["http://127.0.0.1:1/v1"], "start": None})
    assert demand_of(given, store, TWO) == Demand(0, RUNNING)


def test_merges_and_scores_take_no_gpu(store, base_step):
    for kind in ("merge", "score", "report", "judge", "mixture"):
        assert demand_of(Step(kind, "x", {}, {"model0": base_step.id}), store, TWO) == Demand(0, RUNNING)


def test_a_judge_that_is_a_model_takes_a_gpu_as_it_would_not_see_one_otherwise(store):
    for judge in ("classifier", "guard"):
        assert demand_of(Step("judge", "x", {"judge": judge}, {}), store, TWO).gpus == 1
    for judge in ("reference", "refusal", "llm"):
        assert demand_of(Step("judge", "x", {"judge": judge}, {}), store, TWO).gpus == 0


def test_a_batch_takes_the_most_that_one_of_its_steps_takes(store, base_step):
    wanted = {"a": Demand(1, GB), "b": Demand(0, 2 * GB)}
    batch = [Step("score", name, {}, {}) for name in wanted]
    assert demand_of_all(batch, lambda step: wanted[step.name]) == Demand(1, 2 * GB)


# At work


def test_steps_that_run_at_once_have_gpus_of_their_own(chain, tmp_path, monkeypatch):
    """What a worker's environment says; that torch then sees only that device is CUDA's word."""
    monkeypatch.setattr(resources, "ON_DEVICE", ("merge",))
    root = tmp_path / "out"
    study, store = Study(root, "chain"), Store(root)
    run_plan(Plan("chain", chain.steps[:1], {}), root, jobs=1, threads=1, progress=Progress())
    study.open(chain)
    backend = LocalBackend(store, study.plan_file, jobs=4, threads=1, machine=Resources(4, 64 * GB, ("0", "1")))
    one, two = chain.steps[1:3]
    with store.lease(one), store.lease(two):
        assert backend.start([one])
        assert backend.start([two])
        assert not backend.start([chain.steps[3]]), "no third GPU"
        assert [backend.next()["event"] for _ in range(2)] == ["waiting", "waiting"]
        said = [psutil.Process(w.process.pid).environ()["CUDA_VISIBLE_DEVICES"] for w in backend._working]
        assert said == ["0", "1"]
        backend.kill()
    while backend.busy:
        assert backend.next()["event"] == "exit"
    assert backend.start([one])
    backend.kill()
    backend.close()


@pytest.mark.parametrize(
    ("asked", "machine", "jobs"),
    [
        (None, Resources(2, 0), 1),
        (2, Resources(8, 0), 2),
        (6, Resources(2, 0), 2),
        (None, Resources(2, 0, ("0", "1")), 4),
        (3, Resources(1, 0, ("0", "1")), 3),
        (40, Resources(16, 0, ("0", "1")), 16),
    ],
)
def test_no_more_steps_at_once_than_cores_but_for_two_a_gpu(asked, machine, jobs):
    assert jobs_at_once(asked, machine) == jobs


def test_two_steps_that_do_not_fit_beside_each_other_follow_one_another(chain, tmp_path):
    root = tmp_path / "out"
    study, store = Study(root, "chain"), Store(root)
    run_plan(Plan("chain", chain.steps[:1], {}), root, jobs=1, threads=1, progress=Progress())
    study.open(chain)
    backend = LocalBackend(store, study.plan_file, jobs=4, threads=1, machine=Resources(4, RUNNING * 3 // 2))
    assert backend.start([chain.steps[1]])
    assert not backend.start([chain.steps[2]])
    while backend.busy:
        backend.next()
    assert backend.start([chain.steps[2]])
    while backend.busy:
        backend.next()
    backend.close()
    store.refresh()
    assert all(store.find(step.id) for step in chain.steps[:3])
