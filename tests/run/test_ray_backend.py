"""The Ray backend, on a real cluster of two nodes on this machine: the same results, and deaths that cost nothing."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

import psutil
import pytest
from ray.cluster_utils import Cluster

from mixmerge.errors import UserError
from mixmerge.plan.graph import Plan, Step
from mixmerge.run.ray import cluster as ray_cluster
from mixmerge.run.runner import Study
from mixmerge.run.store import write_json

MB = 1 << 20
NODE = {"num_gpus": 1, "object_store_memory": 80 * MB, "include_dashboard": False}
RUNNER = """
import json, sys
from pathlib import Path
from mixmerge.errors import UserError
from mixmerge.plan.graph import Plan, Step
from mixmerge.run.ray import cluster as ray_cluster
from mixmerge.run.backends import backend_for
from mixmerge.run.progress import Progress
from mixmerge.run.runner import run_plan
plan, out = Plan.from_json(json.loads(Path(sys.argv[1]).read_text())), Path(sys.argv[2])
with backend_for("ray", plan, out, address=sys.argv[3], jobs=None, threads=None) as backend:
    outcome = run_plan(plan, out, jobs=None, threads=None, progress=Progress(), backend=backend)
print(json.dumps({"done": outcome.done, "failed": outcome.failed, "blocked": outcome.blocked, "bug": outcome.bug}))
"""


@pytest.fixture(scope="module")
def cluster():
    """A head without cores, and two nodes with a core each, and a GPU by name."""
    before = set(psutil.Process().children(recursive=True))
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as a shell has it for what it starts in the background
    monkeypatch = pytest.MonkeyPatch()
    monkeypatch.setenv("RAY_worker_niceness", "0")  # other tests run meanwhile
    cluster = Cluster(initialize_head=True, head_node_args={**NODE, "num_cpus": 0, "num_gpus": 0, "memory": 500 * MB})
    for _ in range(2):
        add_node(cluster)
    signal.signal(signal.SIGINT, handler)
    yield cluster
    monkeypatch.undo()
    cluster.shutdown()
    left = set(psutil.Process().children(recursive=True)) - before
    _, alive = psutil.wait_procs(left, 20)
    assert alive == []


def add_node(cluster: Cluster, cores: int = 1):
    return cluster.add_node(num_cpus=cores, memory=4000 * MB, **NODE)


def on_ray(study, cluster: Cluster, *arguments: str) -> list[str]:
    return study.command("run", "--backend", "ray", "--address", cluster.address, *arguments)


def carry_out(plan: Plan, folder: Path, cluster: Cluster) -> subprocess.CompletedProcess[str]:
    """A plan run on the cluster by a process of its own; its standard output is the outcome."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "plan.json", plan.to_json())
    command = [sys.executable, "-c", RUNNER, str(folder / "plan.json"), str(folder / "out"), cluster.address]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)


def events(study) -> list[dict]:
    with suppress(FileNotFoundError):
        text = (study.out / "runs" / "tiny" / "events.jsonl").read_text(encoding="utf-8")
        return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
    return []


def commanded(study, name: str, script: str) -> None:
    """Let the training be a command: what `script` does, and then a copy of its start."""
    command = f"sh -c '{script}; cp {{model}}/*.json {{model}}/*.safetensors {{out}}; : {{mixture}}'"
    training = f'training: {{engine: command, command: "{command}"}}'
    if name == "general":
        study.edit("{mixture: general}", f"{{mixture: general, {training}}}")
    else:
        study.edit("  mix:\n", f"  mix:\n    {training}\n")


def started(study, title: str) -> dict | None:
    """The first start of that step."""
    starts = [event for event in events(study) if event["event"] == "start"]
    if not starts:
        return None
    plan = Plan.from_json(json.loads((study.out / "runs/tiny/plan.json").read_text(encoding="utf-8")))
    return next((event for event in starts if event["step"] == plan.find(title).id), None)


def processes_of(study) -> list[psutil.Process]:
    """The commands that train for the study, on any node: children of the processes of steps."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if str(study.store) in " ".join(process.cmdline()):
                found.append(process)
    return found


def call(*arguments: str, **options) -> subprocess.CompletedProcess[str]:
    """The command line, in a process of its own."""
    command = [sys.executable, "-m", "mixmerge", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=300, **options)


@contextmanager
def running(command: list[str], **options):
    """A run, which ends with the block."""
    with subprocess.Popen(command, **options) as process:
        try:
            yield process
        finally:
            process.kill()


# The ordinary way


def test_a_study_on_two_nodes_gives_the_ids_and_the_scores_of_one_machine(cluster, study, finished):
    arguments = ("run", "recipe.yaml", "--out", "out", "--backend", "ray", "--address", cluster.address, "--json")
    ran = call(*arguments, cwd=study.folder)  # the nodes were started in another folder
    assert ran.returncode == 0, ran.stderr
    assert (study.out / "runs/tiny/logs/merge-ties.log").is_file()
    assert study.records().keys() == finished.study.records().keys()
    assert json.loads(ran.stdout)["scores"] == finished.study.scores()
    starts = [event for event in events(study) if event["event"] == "start"]
    assert len({event["step"] for event in starts}) == len(starts) == len(study.records())
    assert len({event["node"] for event in starts}) == 2, "one node had nothing to do"
    for folder in (study.store, finished.study.store):
        assert not list((folder / ".leases").glob("*.json"))
    weights = {out: next(out.glob("merge/ties--*/model.safetensors")) for out in (study.store, finished.study.store)}
    assert len({path.read_bytes() for path in weights.values()}) == 1


def test_a_step_that_fails_is_told_with_its_log_and_stops_only_what_depends_on_it(cluster, broken_chain, tmp_path):
    bad = next(step for step in broken_chain.steps if step.name == "bad")
    greedy = Step("train", "greedy", {"engine": "command"}, {}, {"processes": 2})
    plan = replace(broken_chain, steps=(*broken_chain.steps, greedy))
    ran = carry_out(plan, tmp_path, cluster)
    outcome = json.loads(ran.stdout)
    assert {plan.by_id[i].name for i in outcome["done"]} == {"base", "good"}
    assert {plan.by_id[i].name for i in outcome["blocked"]} == {"after", "last"}
    assert outcome["failed"].keys() == {bad.id, greedy.id}
    assert "nonsense" in outcome["failed"][bad.id]
    assert "error: merge/bad: " in Study(tmp_path / "out", "broken").log(bad).read_text()
    more = "it takes 2 GPUs, and no node of the cluster has more than 1; lower how.processes, or add a node"
    assert outcome["failed"][greedy.id] == more
    assert "tried again" not in ran.stderr
    lines = ran.stderr.splitlines()
    assert lines[0] == "broken: 6 steps, 0 already there, 6 to run"
    assert all(line.startswith("[") and "/6]" in line for line in lines[1:]), "Ray says something in between"


# Deaths


def test_what_dies_with_a_node_is_done_again_and_what_dies_each_time_fails(cluster, study, helpers):
    commanded(
        study, "general", "echo tried >> {work}/tries; kill -9 $(grep PPid: /proc/$PPID/status | tr -dc 0-9)"
    )  # the process of the step
    commanded(study, "mix", "echo tried >> {work}/tries; test $(wc -l < {work}/tries) -gt 1 || sleep 600")
    command = on_ray(study, cluster, "--only", "merge/ties")
    with running(command, stderr=subprocess.PIPE, text=True) as run:
        start = helpers.wait(lambda: started(study, "train/mix"), "a training", 180)
        helpers.wait(lambda: list(study.store.glob(".partial/*/work/kept/tries")), "its command", 180)
        node = next(node for node in cluster.worker_nodes if node.node_id == start["node"])
        cluster.remove_node(node, allow_graceful=False)
        try:
            _, err = run.communicate(timeout=200)
        finally:
            add_node(cluster)
    assert run.returncode == 1, err
    assert f"train/mix: its node {start['address']} died; tried again (2 of 3)" in err
    again = [event["node"] for event in events(study) if event["event"] == "start" and event["step"] == start["step"]]
    assert again[0] == start["node"]
    assert start["node"] not in again[1:]
    done = [event["step"] for event in events(study) if event["event"] == "done"]
    assert len(done) == len(set(done)) == len(study.records()) == 4
    assert "train/general: its process was ended by signal 9; tried again (2 of 3)" in err
    assert "train/general: its process was ended by signal 9; tried again (3 of 3)" in err
    assert "train/general  FAILED: its process was ended by signal 9, 3 times; was there memory enough?" in err
    (tries,) = study.store.glob(".partial/train-*/work/kept/tries")
    assert tries.read_text() == "tried\n" * 3
    log = study.out / "runs/tiny/logs/train-general.log"
    deaths = [line for line in log.read_text().splitlines() if line.startswith("its process was ended by signal 9")]
    assert len(deaths) == 3
    assert f"(log: {log})" in err


def test_what_waits_for_a_node_that_dies_is_started_with_what_the_others_have(cluster, study, helpers):
    study.edit("how: {", "how: {threads: 2, ")
    flag = study.folder / "flag"
    for name in ("general", "mix"):
        commanded(study, name, f"echo tried >> {{work}}/tries; test -e {flag} || sleep 600")
    big = add_node(cluster, cores=2)
    with running(on_ray(study, cluster, "--only", "train/*", "--jobs", "2"), stderr=subprocess.PIPE, text=True) as run:
        helpers.wait(lambda: list(study.store.glob(".partial/*/work/kept/tries")), "a training", 180)
        assert len(list(study.store.glob(".partial/*/work/kept/tries"))) == 1, "the other one waits for two cores"
        flag.touch()
        cluster.remove_node(big, allow_graceful=False)
        _, err = run.communicate(timeout=200)
    assert run.returncode == 0, err
    assert len(study.records()) == 5
    assert "died; tried again (2 of 3)" in err
    assert re.search(r"no node has the 2 cores and .* any more that it was to have; started with 1 core and", err)


def test_a_run_that_is_interrupted_or_killed_leaves_no_process_on_any_node(cluster, study, helpers):
    commanded(study, "mix", "echo tried >> {work}/tries; test $(wc -l < {work}/tries) -gt 3 || sleep 600")
    command = on_ray(study, cluster, "--only", "train/mix")

    def at_work(times: int) -> None:
        tries = "*/work/kept/tries"
        helpers.wait(
            lambda: [p for p in study.store.glob(f".partial/{tries}") if p.read_text() == "tried\n" * times],
            "a training",
            180,
        )
        assert processes_of(study)

    default = partial(signal.signal, signal.SIGINT, signal.default_int_handler)
    with running(command, stderr=subprocess.PIPE, text=True, preexec_fn=default) as run:
        at_work(1)
        run.send_signal(signal.SIGTERM)
        _, err = run.communicate(timeout=60)
    interrupted = "interrupted; run the same command again to carry on\n"
    assert (run.returncode, err.endswith(interrupted)) == (143, True), err
    helpers.wait(lambda: not processes_of(study), "their end", 10)
    with running(command, stderr=subprocess.PIPE, text=True, preexec_fn=default) as run:
        at_work(2)
        for _ in range(2):
            run.send_signal(signal.SIGINT)
            time.sleep(0.5)
        _, err = run.communicate(timeout=60)
    assert (run.returncode, err.endswith(interrupted)) == (130, True), err
    assert "StackTrace" not in err
    helpers.wait(lambda: not processes_of(study), "their end", 10)
    with running(command, stderr=subprocess.DEVNULL):
        at_work(3)
    helpers.wait(lambda: not processes_of(study), "their end", 60)
    ended = subprocess.run(command, capture_output=True, text=True, check=False, timeout=200)
    assert ended.returncode == 0, ended.stderr
    assert "waiting" not in ended.stderr, "a lease of a process that is gone"


@pytest.mark.parametrize("lost", ["gcs", "raylet"])
def test_a_run_whose_head_is_lost_says_so_in_one_line(study, helpers, lost):
    commanded(study, "mix", "echo tried >> {work}/tries; sleep 600")
    alone = Cluster(initialize_head=True, head_node_args={**NODE, "num_cpus": 2, "memory": 4000 * MB})
    address = alone.address
    try:
        with running(on_ray(study, alone, "--only", "train/mix"), stderr=subprocess.PIPE, text=True) as run:
            helpers.wait(lambda: list(study.store.glob(".partial/*/work/kept/tries")), "its command", 180)
            alone.head_node.kill_gcs_server() if lost == "gcs" else alone.head_node.kill_raylet()
            _, err = run.communicate(timeout=200)
    finally:
        alone.shutdown()
    assert run.returncode == 1, err
    node = f"the Ray node {address.partition(':')[0]}, by which this run is in the cluster, is gone"
    head = f"the head of the Ray cluster at {address} is gone: Connection refused"
    assert (
        f"error: {head if lost == 'gcs' else node}; start it again, and run the same command again to carry on\n" in err
    )
    assert "Traceback" not in err
    helpers.wait(lambda: not processes_of(study), "their end", 60)


# Nodes


def test_nodes_without_cores_run_no_steps_and_those_that_see_another_study_are_named(cluster, tmp_path, monkeypatch):
    monkeypatch.setattr(ray_cluster, "SIGHT_S", 0.1)
    plan = tmp_path / "plan.json"
    plan.write_text("{}", encoding="utf-8")
    joined = ray_cluster.Cluster(cluster.address, tmp_path / "ray.log")
    try:
        assert joined.address == cluster.address
        nodes = joined.nodes()
        assert [(node.cores, node.gpus, node.memory) for node in nodes] == [(1, 1, 4000 * MB)] * 2
        joined.check_sight(plan)
        with pytest.raises(UserError) as told:  # a file that is another one in every process
            joined.check_sight(Path("/proc/self/stat"))
    finally:
        joined.close()
    assert str(told.value).startswith("nodes ")
    assert ": does not see the study in /proc/self; put --out on a folder that all nodes see" in str(told.value)


# Work that several nodes share


def test_a_generation_that_nodes_share_and_lose_a_process_of_has_the_bytes_of_one(cluster, finished, tmp_path, helpers):
    study = finished.copy(tmp_path / "copy")
    shutil.rmtree(next(study.store.glob("generate/ties.general--*")))
    study.edit("how: {", "how: {generate_processes: 2, generate_batch_size: 2, ")
    command = on_ray(study, cluster, "--only", "generate/ties.general")
    with running(command, stderr=subprocess.PIPE, text=True) as run:
        helpers.wait(lambda: members("mixmerge.run.share"), "a share", 120)[0].kill()
        _, err = run.communicate(timeout=300)
    assert run.returncode == 0, err
    assert "1 to run" in err
    assert re.search(r"generate/ties.general: process [12] of 2 died; tried again \(2 of 3\)", err)
    answers = [
        next(out.glob("generate/ties.general--*/responses.jsonl")) for out in (study.store, finished.study.store)
    ]
    assert answers[0].read_bytes() == answers[1].read_bytes()


def test_a_training_over_two_nodes_that_loses_a_process_gives_the_weights_of_one_machine(
    cluster, finished, tmp_path, helpers
):
    here, there = (finished.copy(tmp_path / name) for name in ("here", "there"))
    for study, how in ((here, "processes: 2"), (there, "nodes: 2, launcher: ray")):
        study.edit("how: {", f"how: {{device: cpu, {how}, ")
        study.edit("batch_size: 2,", "batch_size: 2, epochs: 6,")
    only = ("--only", "train/mix")
    with running(on_ray(there, cluster, *only), stderr=subprocess.PIPE, text=True) as run:
        helpers.wait(lambda: list(there.store.glob(".partial/train-*/work/checkpoint-*/whole.json")), "a start", 240)
        trainers = members("RayTrainWorker")
        assert len(trainers) == 2
        trainers[1].kill()
        _, err = run.communicate(timeout=300)
    assert run.returncode == 0, err
    log = (there.out / "runs/tiny/logs/train-mix.log").read_text(encoding="utf-8")
    again = "its processes died; Ray Train started them again (2 of 3)"
    assert f"train/mix: {again}" in err
    assert again in log
    assert here.call("run", *only).returncode == 0
    folders = [max(study.store.glob("train/mix--*"), key=lambda path: path.stat().st_ctime) for study in (here, there)]
    assert folders[0].name == folders[1].name
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        assert (folders[0] / name).read_bytes() == (folders[1] / name).read_bytes(), name
    records = [json.loads((folder / "record.json").read_text())["measurements"] for folder in folders]
    same = ("steps", "rows", "tokens", "first_loss", "last_loss")
    assert [records[0][key] for key in same] == [records[1][key] for key in same]
    assert not list(there.store.rglob("meeting-*"))


def test_a_training_over_two_nodes_whose_starter_is_killed_is_tried_again_and_carries_on(cluster, study, helpers):
    study.edit("how: {", "how: {device: cpu, nodes: 2, launcher: ray, ")
    study.edit("batch_size: 2,", "batch_size: 2, epochs: 6,")
    with running(on_ray(study, cluster, "--only", "train/mix"), stderr=subprocess.PIPE, text=True) as run:
        helpers.wait(lambda: list(study.store.glob(".partial/train-*/work/checkpoint-*/whole.json")), "a start", 240)
        starter = members("mixmerge.run.ray.train")
        assert len(starter) == 1
        starter[0].kill()
        _, err = run.communicate(timeout=300)
    assert run.returncode == 0, err
    assert "train/mix: its process was ended by signal 15; tried again (2 of 3)" in err
    log = (study.out / "runs/tiny/logs/train-mix.log").read_text(encoding="utf-8")
    assert "Ray Train: it was ended by SIGKILL without a word" in log
    told = [event["event"] for event in events(study) if event["event"] in ("start", "done")]
    assert told == ["start", "done"] * 2 + ["start", "start", "done"]
    record = json.loads(next(study.store.glob("train/mix--*/record.json")).read_text(encoding="utf-8"))
    assert 0 < record["measurements"]["steps_resumed"] < record["measurements"]["steps"]


def test_a_training_that_fails_on_other_nodes_leaves_what_its_processes_said_in_its_log(cluster, study):
    study.edit("how: {", "how: {device: cpu, nodes: 2, launcher: ray, ")
    study.edit("learning_rate: 1.0e-3", "learning_rate: 1.0e+30")
    ran = subprocess.run(
        on_ray(study, cluster, "--only", "train/mix"), capture_output=True, text=True, check=False, timeout=300
    )
    log = (study.out / "runs/tiny/logs/train-mix.log").read_text(encoding="utf-8")
    assert ran.returncode == 1, ran.stderr + log
    error = re.search(r"error: train/mix: (.*) \(log: ", ran.stderr)[1]
    assert "Traceback (most recent call last)" in log
    assert error.partition(";")[0] in log.partition("Traceback")[2]


def members(word: str) -> list[psutil.Process]:
    """The processes on the nodes of this test that have the word in their command."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            if word in " ".join(process.cmdline()):
                found.append(process)
    return found
