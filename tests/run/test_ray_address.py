"""Before there is a cluster: backends that there are none of, addresses that nothing is at, Ray that is not installed."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from mixmerge.errors import StepError, UserError
from mixmerge.machine import usable_cores
from mixmerge.plan.graph import Plan, Step
from mixmerge.run.backends import backend_for, checked
from mixmerge.run.ray import cluster as ray_cluster
from mixmerge.run.ray.address import AUTH, GIVE_TOKEN, for_a_step, joined, own_token
from mixmerge.run.ray.backend import Asked, Running, ask, missing
from mixmerge.run.ray.cluster import Cluster, Node, unlike
from mixmerge.run.ray.task import Seen, look
from mixmerge.run.resources import RUNNING, Demand

DO = "give host:port as `ray start` prints it, with the run on a machine of the cluster"


def test_a_backend_with_a_slip_of_the_pen_is_refused_with_what_was_meant(study, mixmerge):
    status, out, err = mixmerge("run", study.recipe, "--out", study.out, "--backend", "rya")
    assert (status, out) == (2, "")
    assert err == "error: --backend: no backend 'rya'; did you mean 'ray'?\n"
    assert not study.out.exists()


def test_an_address_that_no_backend_would_read_is_refused(study, mixmerge):
    status, _, err = mixmerge("run", study.recipe, "--out", study.out, "--address", "auto")
    assert (status, err) == (2, "error: --address: the local backend joins no cluster; add --backend ray\n")
    checked("local", None)
    checked("ray", "auto")


@pytest.mark.parametrize("backend", ["local", "ray"])
def test_an_address_that_a_variable_left_empty_is_refused_and_starts_no_cluster(study, mixmerge, backend):
    status, _, err = mixmerge("run", study.recipe, "--out", study.out, "--backend", backend, "--address", " ")
    assert (status, err) == (2, "error: --address: the address is empty; give host:port, or leave it out\n")
    assert not study.out.exists()


def test_what_a_batch_lost_nodes_for_is_told_by_what_it_takes(base_step):
    nodes = [Node(str(number), f"10.0.0.{number}", 4, 2, 1 << 30) for number in range(3)]
    on_two = Running([base_step], Demand(gpus=4), least=2, nodes=2)
    assert [missing(on_two, left) for left in (nodes, nodes[:2])] == [None, None]
    assert missing(on_two, nodes[:1]) == "the cluster has 1 of the 2 nodes with 2 GPUs left that it takes"
    assert (
        missing(Running([base_step], Demand(), nodes=2), nodes[:1])
        == "the cluster has 1 of the 2 nodes left that it takes"
    )
    assert missing(on_two, []) == "no node is left"
    less = [node._replace(gpus=1) for node in nodes]
    assert missing(on_two, [*nodes[:1], *less]) == "the cluster has 1 of the 2 nodes with 2 GPUs left that it takes"
    assert missing(Running([base_step], Demand(gpus=2), least=2), less) == "no node with 2 GPUs is left"
    assert missing(Running([base_step], Demand()), less[:1]) is None


def test_what_is_asked_for_is_what_some_node_has_all_of(base_step):
    many = Node("a", "10.0.0.1", 16, 0, 8 << 30)
    large, gpu = many._replace(cores=4, memory=64 << 30), many._replace(cores=8, gpus=1)
    run = Running([base_step], Demand(memory=32 << 30))
    assert ask(run, [many, large], 16) == Asked(4, 0, 32 << 30), (
        "a step that lacks cores takes longer, one that lacks memory dies"
    )
    assert ask(run, [many], 16) == Asked(16, 0, 8 << 30)
    assert ask(replace(run, least=1), [many, large, gpu], 16) == Asked(8, 1, 8 << 30)
    assert ask(replace(run, least=1), [large], 16) == Asked(4, 1, 32 << 30), "until a node with a GPU is there again"
    run.asked = ask(run, [large], 16)
    assert [run.fits([node]) for node in (many, large, gpu)] == [False, True, False]


def test_a_training_over_nodes_asks_for_what_so_many_of_them_have():
    step = Step("train", "a", {}, {}, {"nodes": 2, "processes": 1})
    big, small, least = (Node(str(cores), f"10.0.0.{cores}", cores, 0, cores << 30) for cores in (16, 4, 1))
    run = Running([step], Demand(memory=32 << 30), nodes=2)
    assert run.spread
    run.asked = ask(run, [least, big, small], 16)
    assert run.asked == Asked(4, 0, RUNNING)
    assert [run.fits(nodes) for nodes in ([big, small], [big, small, least], [big, least], [big])] == [
        True,
        True,
        False,
        False,
    ]


@pytest.mark.parametrize("address", ["head", "head:", ":6379", "head:port", "head:70000", "ray://head:10001"])
def test_what_is_no_address_is_refused_before_anything_is_asked(study, mixmerge, address):
    status, _, err = mixmerge("run", study.recipe, "--out", study.out, "--backend", "ray", "--address", address)
    assert (status, err) == (2, f"error: --address: '{address}' is no host:port; {DO}\n")
    assert not study.out.exists()


def test_an_address_that_nobody_is_at_is_told_in_one_line(study, mixmerge):
    with closing(socket.socket()) as taken:
        taken.bind(("127.0.0.1", 0))  # and does not listen
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        status, _, err = mixmerge("run", study.recipe, "--out", study.out, "--backend", "ray", "--address", address)
    assert (status, err) == (2, f"error: --address: nothing answers at {address}: Connection refused; {DO}\n")
    status, _, err = mixmerge("run", study.recipe, "--out", study.out, "--backend", "ray", "--address", "no.invalid:1")
    assert status == 2
    assert err.startswith("error: --address: nothing answers at no.invalid:1: ")
    assert not study.out.exists()


def test_an_address_from_the_environment_is_named_as_such(study, mixmerge, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:8265")
    status, _, err = mixmerge("run", study.recipe, "--out", study.out, "--backend", "ray")
    assert (status, err) == (2, f"error: RAY_ADDRESS: 'http://127.0.0.1:8265' is no host:port; {DO}\n")


def test_a_port_that_answers_and_is_no_cluster_is_given_up_soon(tmp_path, monkeypatch):
    monkeypatch.setattr(ray_cluster, "JOIN_S", 3.0)
    with closing(socket.create_server(("127.0.0.1", 0))) as other:
        address = f"127.0.0.1:{other.getsockname()[1]}"
        with pytest.raises(UserError, match=r"what answers at .* is no Ray cluster"):
            Cluster(address, tmp_path / "logs" / "ray.log")
    assert not (tmp_path / "logs").exists()


def test_where_ray_is_not_installed_the_command_that_installs_it_is_told(study, tmp_path):
    (tmp_path / "ray").mkdir()
    (tmp_path / "ray" / "__init__.py").write_text("raise ModuleNotFoundError('No module named ray')", encoding="utf-8")
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    ran = subprocess.run(
        study.command("run", "--backend", "ray"),
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (ran.returncode, ran.stdout) == (2, "")
    assert ran.stderr == "error: --backend ray: Ray is not installed; pip install 'mixmerge[ray]'\n"


def test_the_local_backend_is_left_to_the_run(tmp_path):
    with backend_for("local", Plan("study", (), {}), tmp_path, address=None, jobs=None, threads=None) as backend:
        assert backend is None


def test_what_a_node_sees_of_a_study_is_compared_with_what_is_here(tmp_path):
    plan = tmp_path / "plan.json"
    assert look(plan, 0.0).digest is None
    plan.write_text("{}", encoding="utf-8")
    here = look(plan, 0.0)
    assert unlike(look(plan, 5.0, here.digest), here, tmp_path) is None
    assert unlike(Seen(None, here.version), here, tmp_path) == f"does not see the study in {tmp_path}"
    assert unlike(Seen(here.digest, "9.9"), here, tmp_path) == f"has mixmerge 9.9, here is {here.version}"


def test_another_runner_of_the_study_makes_it_no_other_one(chain, tmp_path):
    digests = []
    for called, steps in (({}, chain.steps), ({"argv": ["run"]}, chain.steps), ({}, chain.steps[:-1])):
        file = tmp_path / "plan.json"
        file.write_text(json.dumps(replace(chain, called=called, steps=steps).to_json()), encoding="utf-8")
        digests.append(look(file, 0.0).digest)
    assert digests[0] == digests[1] != digests[2]


def test_without_an_address_a_cluster_of_this_machine_lives_as_long_as_the_run(tmp_path, helpers):
    log = tmp_path / "ray.log"
    heard: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, _: heard.append(number))
    cluster = Cluster(None, log)
    try:
        os.kill(os.getpid(), signal.SIGTERM)
        helpers.wait(lambda: heard, "what a user's handler hears, which Ray leaves in its place")
        (raylet,) = [process for process in psutil.Process().children() if process.name() == "raylet"]
        blocked = re.search(r"SigBlk:\s*(\w+)", Path(f"/proc/{raylet.pid}/status").read_text())[1]
        assert int(blocked, 16) >> (signal.SIGHUP - 1) & 1, "a terminal that closes would end it, and steps with it"
        assert signal.SIGHUP not in signal.pthread_sigmask(signal.SIG_BLOCK, ())
        (node,) = cluster.nodes()
        assert node.cores == usable_cores()
        started = psutil.Process().children(recursive=True)
        assert any("raylet" in process.name() for process in started)
    finally:
        cluster.close()
        signal.signal(signal.SIGTERM, before)
    assert psutil.wait_procs(started, 20)[1] == []
    assert log.is_file()


# Tokens


def test_a_step_gets_the_tokens_of_its_cluster_and_nothing_else_of_ray():
    auth = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "secret", "RAY_AUTH_TOKEN_PATH": "/run/token"}
    told = for_a_step({**auth, "RAY_JOB_ID": "1", "RAY_ADDRESS": "a:1", "HF_HOME": "/hf"}, "b:2")
    assert told == {**auth, "HF_HOME": "/hf", "MIXMERGE_RAY_ADDRESS": "b:2"}


def test_a_step_that_cannot_join_its_cluster_names_the_cluster(tmp_path):
    with pytest.raises(StepError, match=r"its process cannot join the Ray cluster at nowhere"), joined("nowhere"):
        pass


def test_a_training_by_two_processes_joins_a_cluster_of_its_own_by_its_token(study, tmp_path):
    study.edit("how: {", "how: {device: cpu, processes: 2, ")
    home = tmp_path / "home"
    home.mkdir()
    environment = {name: value for name, value in os.environ.items() if name not in AUTH} | {"HOME": str(home)}
    command = study.command("run", "--backend", "ray", "--only", "train/mix")
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=300)
    assert ran.returncode == 0, ran.stderr
    assert len(study.records()) == 3
    assert list(home.rglob("auth_token")) == [], "every cluster that is started later would ask for it"


def test_a_cluster_of_ones_own_is_closed_to_those_without_its_token_and_leaves_no_settings(
    study, tmp_path, monkeypatch
):
    for name in AUTH:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    before = dict(os.environ)
    cluster = Cluster(None, tmp_path / "ray.log")
    try:
        assert os.environ["RAY_AUTH_TOKEN"]
        environment = {name: value for name, value in os.environ.items() if name not in AUTH}
        command = study.command("run", "--backend", "ray", "--address", cluster.address)
        ran = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=120)
    finally:
        address = cluster.address
        cluster.close()
    assert (ran.returncode, ran.stdout) == (2, "")
    what = f"error: --address: the cluster at {address} wants another token, or one at all"
    assert ran.stderr == f"{what}; {GIVE_TOKEN}\n"
    assert {name: value for name, value in os.environ.items() if name in AUTH} == {}
    assert before.items() <= os.environ.items()
    assert list(tmp_path.rglob("auth_token")) == []


@pytest.mark.parametrize("given", [{"RAY_AUTH_MODE": "disabled"}, {"RAY_AUTH_TOKEN_PATH": "/run/token"}])
def test_a_token_or_its_absence_that_a_user_set_is_left_as_it_is(given, monkeypatch):
    for name in AUTH:
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    with own_token():
        assert {name: value for name, value in os.environ.items() if name in AUTH} == given
