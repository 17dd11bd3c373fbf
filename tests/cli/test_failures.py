"""What a person reads at the end of a run that failed: each failure with its log, and what waits for it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mixmerge.cli.running import NAMED, blocked_lines, report_failures
from mixmerge.errors import StepError
from mixmerge.plan.graph import Plan, Step
from mixmerge.run.runner import Outcome, Study


def step(title: str, *inputs: Step) -> Step:
    kind, _, name = title.partition("/")
    return Step(kind, name, {"name": name}, {f"in{at}": one.id for at, one in enumerate(inputs)})


BASE, X, Y = step("base/base"), step("train/x"), step("train/y")
MERGE = step("merge/m", X)
BOTH = step("merge/both", X, Y)
ANSWERS = step("generate/m", MERGE)
PLAN = Plan("study", (BASE, X, Y, MERGE, BOTH, ANSWERS), {})


def outcome(**how) -> Outcome:
    failed = {X.id: "the loss is nan", Y.id: "out of memory"}
    return Outcome(failed=failed, blocked=[MERGE.id, BOTH.id, ANSWERS.id], **how)


def told(found: Outcome, plan: Plan, folder, capsys) -> list[str]:
    """The lines of standard error; the run ends with the exit status of a failure."""
    with pytest.raises(StepError):
        report_failures(found, plan, Study(folder, plan.study))
    said = capsys.readouterr()
    assert said.out == ""
    return said.err.splitlines()


def test_each_failure_is_a_line_with_its_log_and_blocked_steps_name_it(tmp_path, capsys):
    logs = tmp_path / "runs" / "study" / "logs"
    logs.mkdir(parents=True)
    for name in ("train-x.log", "train-y.log"):
        (logs / name).touch()
    assert told(outcome(), PLAN, tmp_path, capsys) == [
        f"error: train/x: the loss is nan (log: {logs / 'train-x.log'})",
        f"error: train/y: out of memory (log: {logs / 'train-y.log'})",
        "not started: merge/m, generate/m, because of train/x",
        "not started: merge/both, because of train/x, train/y",
    ]


def test_a_step_that_failed_before_it_was_started_names_no_log(tmp_path, capsys):
    lines = told(outcome(), PLAN, tmp_path, capsys)
    assert lines[:2] == ["error: train/x: the loss is nan", "error: train/y: out of memory"]


def test_of_many_failures_the_first_are_told_and_the_rest_counted(tmp_path, capsys):
    many = [step(f"train/{at:03}") for at in range(300)]
    after = [step(f"merge/{at:03}", one) for at, one in enumerate(many)]
    plan = Plan("study", (*many, *after), {})
    found = Outcome(failed={one.id: "no" for one in many}, blocked=[one.id for one in after])
    lines = told(found, plan, tmp_path, capsys)
    assert len(lines) == 2 * (NAMED + 1)
    assert lines[NAMED] == f"error: and 290 more like these, each with its log in {tmp_path / 'runs/study/logs'}"
    assert lines[-1] == "not started: 290 more"


def test_of_many_blocked_steps_the_first_are_named_and_the_rest_counted():
    after = [step(f"merge/{at:03}", X) for at in range(300)]
    found = Outcome(failed={X.id: "no"}, blocked=[one.id for one in after])
    [line] = blocked_lines(found, Plan("study", (X, *after), {}))
    assert line.endswith("merge/009 and 290 more, because of train/x")


def test_what_no_failure_blocks_says_why_it_did_not_start():
    plan = Plan("study", (BASE, X), {})
    ended = Outcome(failed={BASE.id: "no"}, blocked=[X.id], ended=True)
    [line] = blocked_lines(ended, plan)
    assert (
        line
        == "not started: train/x, as the recipe or its data has to change; --keep-going goes on with what does not need that"
    )
    full = Outcome(failed={BASE.id: "no"}, blocked=[X.id], ended=True, full=True)
    assert list(blocked_lines(full, plan)) == ["not started: train/x, as the disk is full"]
    lost = Outcome(failed={BASE.id: "no"}, blocked=[X.id])
    assert list(blocked_lines(lost, plan)) == ["not started: train/x, as the server that they ask failed others"]


def test_errors_that_would_steer_the_terminal_are_made_visible(tmp_path, capsys):
    found = Outcome(failed={X.id: "bad file \x1b[2J\u202e name"})
    [line] = told(found, PLAN, tmp_path, capsys)
    assert "bad file \\x1b[2J\\u202e name" in line


def test_a_run_that_went_well_says_nothing(tmp_path, capsys):
    report_failures(Outcome(done=[X.id]), PLAN, Study(tmp_path, "study"))
    assert capsys.readouterr() == ("", "")


def test_an_answer_that_finds_no_space_is_a_line_and_no_traceback():
    with Path("/dev/full").open("w") as full:
        command = [sys.executable, "-m", "mixmerge", "methods"]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr == f"error: what is printed: {os.strerror(28)}\n"


def test_a_reader_that_has_seen_enough_ends_a_command_without_a_word():
    command = [sys.executable, "-m", "mixmerge", "schema"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as done:
        done.stdout.close()
        assert done.stderr.read() == ""
        assert done.wait() in (0, 1)


def test_status_and_show_say_of_a_step_that_it_failed_and_why(study, mixmerge):
    study.edit(
        "  mix:\n",
        """  mix:\n    training: {engine: command, command: "sh -c 'exit 3; : {mixture} {model} {out}'"}\n""",
    )
    assert study.call("run", "--only", "train/mix").returncode == 1
    status, out, _ = mixmerge("status", study.recipe, "--out", study.out)
    assert status == 0
    counts, failure = out.splitlines()
    assert ", 1 failed, " in counts
    assert failure.startswith("failed: train/mix: ")
    found = json.loads(mixmerge("status", study.recipe, "--out", study.out, "--json")[1])
    assert found["counts"]["failed"] == 1
    assert found["failed"] == {"train/mix": failure.removeprefix("failed: train/mix: ")}
    shown = mixmerge("show", study.recipe, "train/mix", "--out", study.out)[1].splitlines()[0]
    assert "  not done, " in shown
    assert found["failed"]["train/mix"] in shown
    blocked = json.loads(mixmerge("show", study.recipe, "merge/ties", "--out", study.out, "--json")[1])
    assert blocked["state"] == "blocked"
    assert blocked["folder"] is None
