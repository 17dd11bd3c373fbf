"""A study that is killed thirty times, runner and children alike, ends like one that never was."""

from __future__ import annotations

import ctypes
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import replace

import psutil
import pytest

from mixmerge.run.progress import Progress
from mixmerge.run.runner import run_plan
from mixmerge.run.store import Store

KILLS = 30
HELD = """
import os, signal, sys
from pathlib import Path
from mixmerge.run.store import Store
with Store(Path(sys.argv[1])).hold(sys.argv[2]):
    os.kill(os.getpid(), signal.SIGKILL)
"""
SUBREAPER = 36  # PR_SET_CHILD_SUBREAPER of prctl(2): who loses its parent becomes a child of this process


@pytest.fixture
def orphans_come_here():
    """Every process that a run leaves behind is a child of this one, and so is found."""
    prctl = getattr(ctypes.CDLL(None), "prctl", None)
    if prctl is None or prctl(SUBREAPER, 1, 0, 0, 0):
        pytest.skip("orphans cannot be caught here (that needs Linux)")
    yield
    prctl(SUBREAPER, 0, 0, 0, 0)


def family() -> list[psutil.Process]:
    return psutil.Process().children(recursive=True)


def kill_all(draw: random.Random) -> None:
    """SIGKILL to the runner, the fork server, the workers and what they started, in any order, until none is left."""
    while victims := family():
        draw.shuffle(victims)
        for victim in victims:
            with suppress(ProcessLookupError):
                os.kill(victim.pid, signal.SIGKILL)
        psutil.wait_procs(victims, timeout=30)


def events(study) -> list[dict]:
    """What was told so far; a line that a kill cut short is none."""
    path = study.out / "runs" / "tiny" / "events.jsonl"
    found = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found


def begun(told: list[dict]) -> list[str]:
    return [event["step"] for event in told if event["event"] == "start"]


def made(study) -> dict[str, tuple[int, int]]:
    """`kind/name--id` -> inode and mtime of its record: what tells that nobody has made the step again."""
    return {name: ((stat := path.stat()).st_ino, stat.st_mtime_ns) for name, path in study.records().items()}


def kill_at_a_moment(study, draw: random.Random) -> tuple[bool, str]:
    """Run the study and kill all of it after a few events, or on its way to the first; whether it was killed, and what it said.

    Called so often that a study of 32 steps is through, a step or none is finished in between.
    """
    told, wanted = len(events(study)), draw.choice([0, 0, 1, 1, 1, 2])
    runner = subprocess.Popen(study.command("run"), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    while runner.poll() is None and len(events(study)) < told + wanted:
        time.sleep(0.005)
    end = time.monotonic() + draw.uniform(0.0, 0.1 if wanted else 2.0)
    while runner.poll() is None and time.monotonic() < end:
        time.sleep(0.005)
    killed = runner.poll() is None
    if killed:
        kill_all(draw)
    return killed, runner.communicate(timeout=60)[1]


def test_a_study_that_is_killed_at_thirty_moments_ends_like_an_unbroken_one(finished, study, orphans_come_here):
    draw = random.Random(30)
    kept: dict[str, tuple[int, int]] = {}
    kills = 0
    while kills < KILLS:
        told = len(events(study))
        killed, err = kill_at_a_moment(study, draw)
        kills += killed
        assert "Traceback" not in err
        assert family() == [], "a process outlived its runner"
        done = {name.rpartition("--")[2] for name in kept}
        assert done.isdisjoint(begun(events(study)[told:])), "a finished step was begun again"
        now = made(study)
        assert {name: now.get(name) for name in kept} == kept, "a finished step was made again"
        if not killed:  # a fast machine is through before: some of it once more
            for name in draw.sample(sorted(now), 8):
                shutil.rmtree(study.store / name)
                now.pop(name)
        kept = now
    last = study.call("run")
    assert last.returncode == 0, last.stderr
    assert {name: made(study).get(name) for name in kept} == kept
    assert made(study).keys() == finished.study.records().keys()
    assert sorted(study.store.glob(".partial/*")) == sorted(study.store.glob(".leases/*")) == []
    assert study.scores() == finished.study.scores()
    for name in finished.study.records():
        for file in ("model.safetensors", "responses.jsonl", "verdicts.jsonl", "rows.jsonl"):
            if (whole := finished.study.store / name / file).exists():
                assert whole.read_bytes() == (study.store / name / file).read_bytes(), f"{name}/{file}"
    checked = study.call("verify")
    assert checked.stdout == "32 finished steps: 32 whole, 0 damaged\n"


@pytest.mark.parametrize("name", ["one", "two"])
def test_what_an_earlier_run_began_is_carried_on_first(chain, tmp_path, name):
    step = next(step for step in chain.steps if step.name == name)
    store = Store(tmp_path)
    store.begin(step)
    left = subprocess.run([sys.executable, "-c", HELD, str(tmp_path), step.id], check=False, stdout=subprocess.DEVNULL)
    assert (left.returncode, store.leases.names()) == (-signal.SIGKILL, {step.id}), "the lease of a dead run"
    assert store.begun() == {step.id}
    base, *rest = chain.steps
    run_plan(replace(chain, steps=(base,)), tmp_path, jobs=1, threads=1, progress=Progress())
    run_plan(chain, tmp_path, jobs=1, threads=1, progress=Progress())
    lines = (tmp_path / "runs/chain/events.jsonl").read_text(encoding="utf-8").splitlines()
    made = [event["step"] for event in map(json.loads, lines) if event["event"] == "start"]
    assert made[:2] == [base.id, step.id]
    assert sorted(made) == sorted([base.id, *(one.id for one in rest)])
