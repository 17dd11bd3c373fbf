"""A training is spread over machines by whatever runs a command on each of them; here these are processes of one."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import psutil
import pytest
from test_train_together import gone, near, together, what_of
from tiny_training import tiny_model, train, weights

from mixmerge.errors import StepError, UserError
from mixmerge.train.settings import Devices
from mixmerge.train.together import KilledError

LAUNCHER = """
import subprocess, sys
count, command = int(sys.argv[1]), sys.argv[2:]
print("a launcher may say what it likes", flush=True)
started = [subprocess.Popen(command) for _ in range(count)]
sys.exit(max(process.wait() for process in started))
"""


@pytest.fixture(scope="module")
def steady(tmp_path_factory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("steady"))


@pytest.fixture
def launcher(tmp_path):
    """What runs a command so many times, as srun does once on each machine."""
    (tmp_path / "launch.py").write_text(LAUNCHER)
    return lambda count: f"{sys.executable} {tmp_path / 'launch.py'} {count}"


def test_two_machines_learn_what_one_process_learns(launcher, steady, facts, tmp_path, capfd):
    steps: list[int] = []
    alone = train(steady, facts, tmp_path / "alone", **what_of())
    both = together(
        steady, facts, tmp_path / "both", lambda done, _: steps.append(done), Devices(1, nodes=2), launcher(2)
    )
    assert steps == list(range(1, alone["steps"] + 1))
    assert near(weights(tmp_path / "alone"), weights(tmp_path / "both"))
    assert alone["tokens"] == both["tokens"]
    assert "a launcher may say what it likes" in capfd.readouterr().err
    assert not list((tmp_path / "both" / "work").glob("meeting*"))


def test_machines_are_ended_with_the_training_and_the_process_that_failed_is_named(launcher, steady, facts, tmp_path):
    seen: list[psutil.Process] = []

    def kill(done, _):
        if done == 2:
            seen.extend(psutil.Process(os.getpid()).children(recursive=True))
            next(member for member in seen if member.cmdline()[-1] == "1").send_signal(signal.SIGKILL)

    with pytest.raises(
        StepError, match=r"^training process 1 of 2: it was ended by SIGKILL; was there memory enough\?"
    ):
        together(steady, facts, tmp_path, kill, Devices(1, nodes=2), launcher(2), epochs=50)
    assert len(seen) == 5, "the launcher, two machines, a process each"
    assert gone(seen)


@pytest.mark.parametrize(
    ("command", "kind", "said"),
    [
        ("no-such-launcher -n 2", UserError, "how.launcher: 'no-such-launcher' cannot be started: No such file"),
        ("false", StepError, "the launcher: it ended with status 1 without a word; see the log"),
        ("sh -c 'kill -9 $$'", KilledError, "the launcher: it was ended by SIGKILL without a word; see the log"),
        ("true", StepError, "the launcher: it ended with status 0 without a word; see the log"),
    ],
)
def test_a_launcher_that_starts_nothing_is_named(command, kind, said, steady, facts, tmp_path):
    with pytest.raises(kind, match=re.escape(said)):
        together(steady, facts, tmp_path, None, Devices(1, nodes=2), command)


def test_a_launcher_that_starts_one_too_many_is_told_so(launcher, steady, facts, tmp_path):
    with pytest.raises(UserError, match=r"^how.launcher: the launcher ran the command more than 2 times; have it run "):
        together(steady, facts, tmp_path, None, Devices(1, nodes=2), launcher(3))


def test_a_machine_that_does_not_come_is_missed_and_those_that_came_are_ended(
    launcher, steady, facts, tmp_path, monkeypatch
):
    monkeypatch.setattr("mixmerge.train.together.BEAT_S", 0.5)
    monkeypatch.setattr("mixmerge.train.together.COME_S", 8.0)
    with pytest.raises(
        StepError, match=r"^how.launcher: 1 of 2 machines have come within 8 s of each other; have it run"
    ):
        together(steady, facts, tmp_path, None, Devices(1, nodes=2), launcher(1))
    assert not [
        child for child in psutil.Process().children(recursive=True) if "mixmerge.train" in str(child.cmdline())
    ]


def test_a_machine_that_nobody_hears_ends_with_its_processes(steady, facts, tmp_path):
    """Its launcher's head was killed, and the launcher forwards nothing."""
    meeting = tmp_path / "meeting"
    meeting.mkdir()
    spec = meeting / "spec.json"
    folders = {"model": steady, "mixture": facts, "out": tmp_path / "out", "work": tmp_path, "meeting": meeting}
    told = {name: str(folder) for name, folder in folders.items()}
    what = {"cache": None, "devices": asdict(Devices(1, nodes=2)), "what": what_of(), "threads": 1, "device": "cpu"}
    spec.write_text(json.dumps(told | what | {"place": {"checkpoint_every": 4}}))
    code = f"import mixmerge.train.node as n; n.LOST_S = 8.0; raise SystemExit(n.main([{str(spec)!r}]))"
    node = subprocess.Popen([sys.executable, "-W", "ignore", "-c", code], stdout=subprocess.DEVNULL)
    assert node.wait(60) == 1
    assert not [process for process in psutil.process_iter(["cmdline"]) if str(spec) in (process.info["cmdline"] or ())]
