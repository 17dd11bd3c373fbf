"""What `plan` tells of a real finished study that is changed: states, estimates from its own records, the chart, the total."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest

from mixmerge.machine import this_machine

CHANGED = ("--set", "training.learning_rate=0.002")


@pytest.fixture
def asked(finished, mixmerge):
    """What `plan` prints of the finished study with some arguments."""

    def asked(*arguments):
        status, out, err = mixmerge("plan", finished.study.recipe, *arguments, "--out", finished.study.out)
        assert status == 0, err
        return out

    return asked


@pytest.fixture
def copy(finished, tmp_path):
    return finished.copy(tmp_path / "study")


def records(study, kind: str):
    return [json.loads(path.read_text()) for title, path in study.records().items() if title.startswith(f"{kind}/")]


def test_a_record_says_what_machine_it_was_made_on(finished):
    for record in records(finished.study, "train"):
        told = record["provenance"]
        here = this_machine()
        assert (told["processor"], told["cores"], told["gpus"]) == (here.processor, here.cores, list(here.gpus))


def test_changed_trainings_are_told_with_what_the_last_ones_took(asked, finished):
    found = json.loads(asked(*CHANGED, "--json"))
    steps = {f"{step['kind']}/{step['name']}": step for step in found["steps"]}
    took = [record["provenance"]["seconds"] for record in records(finished.study, "train")]
    for name in ("general", "mix"):
        step = steps[f"train/{name}"]
        assert (step["state"], step["why"]) == ("changed", ["learning_rate: 0.001 -> 0.002"])
        assert step["blocked_by"] == []
        seconds = step["estimate"]["seconds"]
        assert seconds["source"] == "2 earlier trainings here"
        assert seconds["low"] <= seconds["value"] <= seconds["high"]
        assert min(took) / 2 <= seconds["value"] <= max(took) * 2
        written = sum(next(r for r in records(finished.study, "train") if r["name"] == name)["files"].values())
        assert step["estimate"]["disk_bytes"]["value"] == pytest.approx(written, rel=0.2)
    merge = steps["merge/ties"]
    assert (merge["state"], [entry["title"] for entry in merge["blocked_by"]]) == (
        "blocked",
        ["train/general", "train/mix"],
    )
    assert merge["estimate"]["seconds"]["source"] == "1 earlier merge here"
    assert "estimate" not in steps["mixture/mix"], "it is done"
    assert found["machine"]["cores"] == this_machine().cores
    assert found["total"]["unknown"] == {}
    assert found["total"]["free_bytes"] > 0
    values = [step["estimate"]["seconds"]["value"] for step in steps.values() if "estimate" in step]
    assert found["total"]["seconds"]["value"] == pytest.approx(sum(values))


def test_a_training_of_twenty_times_the_work_has_a_range_that_holds_twenty_times_the_time(copy):
    planned = json.loads(copy.call("plan", "--set", "training.epochs=20", "--json").stdout)
    told = next(s for s in planned["steps"] if (s["kind"], s["name"]) == ("train", "general"))["estimate"]["seconds"]
    took = [record["provenance"]["seconds"] for record in records(copy, "train")]
    assert told["low"] <= 20 * max(took)
    assert 20 * min(took) <= told["high"], "as if nothing of it had been a start"
    assert 2 * told["low"] <= told["high"]
    assert told["low"] <= told["value"] <= told["high"]
    assert planned["total"]["starting"]["value"] > planned["total"]["processes"] / 2 > 0


def test_the_lines_tell_state_time_disk_and_reason_and_then_the_whole(asked):
    lines = asked(*CHANGED).splitlines()
    row = next(line for line in lines if " train/mix " in line)
    assert re.fullmatch(
        r"\w{12}  train/mix +changed +(<1 s|[\d.]+ (s|min)) +[\d.]+ kB  learning_rate: 0.001 -> 0.002", row
    )
    row = next(line for line in lines if " generate/ties.general " in line)
    assert "  blocked  " in row
    assert row.endswith("input merge/ties is to be made again; blocked by merge/ties")
    done = next(line for line in lines if " mixture/mix " in line)
    assert done.endswith("  done")
    assert any(line.startswith("time left: about ") and "if all that can runs at once" in line for line in lines)
    assert "GPU hours: 0, no GPU is used" in lines or this_machine().gpus
    assert any(re.search(r"of the time for 2 steps: 2 earlier trainings here", line) for line in lines)
    assert any(line.startswith("disk: about ") and line.endswith(" are free") for line in lines)
    assert not any(line.startswith("not estimated") for line in lines)


def test_a_finished_study_has_nothing_left_and_tells_no_time(asked):
    out = asked()
    assert "time left" not in out
    assert "~" not in out
    assert json.loads(asked("--json"))["total"]["seconds"]["value"] == 0


def test_the_chart_shows_what_is_done_and_what_would_run(asked):
    chart = asked(*CHANGED, "--graph")
    assert chart.startswith("flowchart LR\n")
    assert '["mixture/mix<br/>done"]:::done' in chart
    assert '["train/mix<br/>changed"]:::changed' in chart
    assert '["merge/ties<br/>blocked"]:::blocked' in chart
    assert chart.count("]:::") == 32


def test_a_chart_and_json_at_once_are_refused(mixmerge, study):
    status, out, err = mixmerge("plan", study.recipe, "--graph", "--json", "--out", study.out)
    assert (status, out) == (2, "")
    assert err == "error: plan: --graph and --json print two different things; give one of them\n"


def test_a_step_that_failed_is_told_with_its_error_and_blocks_what_needs_it(copy):
    planned = copy.call("plan", "--set", "seed=1", "--json")
    step = next(s for s in json.loads(planned.stdout)["steps"] if (s["kind"], s["name"]) == ("train", "mix"))
    events = copy.out / "runs" / "tiny" / "events.jsonl"
    with events.open("a") as file:
        file.write(
            json.dumps({"event": "failed", "step": step["id"], "error": "the training ran out of memory"}) + "\n"
        )
    lines = copy.call("plan", "--set", "seed=1").stdout.splitlines()
    own = next(line for line in lines if " train/mix " in line)
    assert "failed last time: the training ran out of memory" in own
    merge = next(line for line in lines if " merge/ties " in line)
    assert "blocked by train/mix, which failed: the training ran out of memory" in merge


def test_planning_with_estimates_imports_no_torch(finished):
    code = (
        "import sys; sys.argv = ['mixmerge', 'plan', *sys.argv[1:]]\n"
        "from mixmerge.cli import main; main()\n"
        "heavy = {'torch', 'transformers', 'trl', 'sklearn', 'scipy.stats'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    arguments = [str(finished.study.recipe), *CHANGED, "--out", str(finished.study.out)]
    ran = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, encoding="utf-8", check=False)
    assert ran.returncode == 0, ran.stderr
