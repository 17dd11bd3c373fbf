"""Small real plans: a base and merges of it, which a worker carries out in a moment."""

from __future__ import annotations

import json
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from mixmerge.plan.graph import Plan, Step
from mixmerge.plan.models import folder_fingerprint


def merge_step(name: str, *models: str, **config: Any) -> Step:
    """A linear merge of the given steps with equal weights."""
    entries = [{"model": f"model{index}", "parameters": {"weight": 1.0}} for index in range(len(models))]
    what = {"config": {"merge_method": "linear", "models": entries, **config}, "seed": 0}
    return Step("merge", name, what, {f"model{index}": model for index, model in enumerate(models)})


@pytest.fixture
def base_step(tiny_base: Path) -> Step:
    what = {"source": {"content": folder_fingerprint(tiny_base, None)}, "trim": None, "chat_template": None}
    return Step("base", "base", what, how={"path": str(tiny_base)})


@pytest.fixture
def chain(base_step: Step) -> Plan:
    """base -> one, two -> both, three."""
    one = merge_step("one", base_step.id)
    two = merge_step("two", base_step.id, dtype="float32")
    both = merge_step("both", one.id, base_step.id)
    three = merge_step("three", both.id)
    steps = (base_step, one, two, both, three)
    return Plan("chain", steps, {step.name: step.id for step in steps})


@pytest.fixture
def broken_chain(base_step: Step) -> Plan:
    """base -> good, bad; bad -> after -> last; the merge `bad` cannot be."""
    good = merge_step("good", base_step.id)
    bad = merge_step("bad", base_step.id, merge_method="nonsense")
    after = merge_step("after", bad.id, base_step.id)
    last = merge_step("last", after.id)
    steps = (base_step, bad, good, after, last)
    return Plan("broken", steps, {step.name: step.id for step in steps})


def wait_until(condition: Callable[[], Any], what: str, seconds: float = 60.0) -> Any:
    """The first true value of the condition."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if found := condition():
            return found
        time.sleep(0.02)
    raise AssertionError(f"waited {seconds:.0f} s in vain: {what}")


def workers_of(pid: int, *steps: Step) -> list[psutil.Process]:
    """The worker processes that a runner has started for any of the steps."""
    found = []
    for child in psutil.Process(pid).children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            if {step.id for step in steps} & set(child.cmdline()):
                found.append(child)
    return found


@pytest.fixture
def held_by() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Start a command that says True once it holds a lease, and holds it until its standard input closes."""
    started: list[subprocess.Popen[str]] = []

    def held_by(*command: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        started.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == "True\n"
        return process

    yield held_by
    for process in started:
        process.kill()
        process.communicate()


@pytest.fixture
def helpers():
    """What tests in this folder share: merge_step, wait_until, workers_of."""

    class Helpers:
        merge = staticmethod(merge_step)
        wait = staticmethod(wait_until)
        workers = staticmethod(workers_of)

    return Helpers


@dataclass(frozen=True)
class Finished:
    """The tiny study after one unbroken run, and what that run printed."""

    study: Any
    printed: str
    progress: str

    def copy(self, folder: Path) -> Any:
        """The study and everything it made, in another place."""
        shutil.copytree(self.study.folder, folder, symlinks=True)
        return type(self.study)(folder)


@pytest.fixture(scope="session")
def finished(made_once: Callable[..., Path], new_study, study_in) -> Finished:
    """One unbroken run of the tiny study by the real command line; tests that change anything take a copy."""

    def make(folder: Path) -> None:
        ran = new_study(folder / "study").call("run")
        assert ran.returncode == 0, ran.stderr
        (folder / "said.json").write_text(json.dumps([ran.stdout, ran.stderr]), encoding="utf-8")

    folder = made_once("finished", make)
    return Finished(study_in(folder / "study"), *json.loads((folder / "said.json").read_text(encoding="utf-8")))


@pytest.fixture
def copy(finished: Finished, tmp_path: Path) -> Any:
    """A copy of the finished study, to be changed."""
    return finished.copy(tmp_path / "study")
