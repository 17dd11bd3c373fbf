"""The runner: order, failures, kills, races and orphans, with real worker processes on small real steps."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections import Counter
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from rich.console import Console

from mixmerge.errors import CheckpointError, StepError, UserError
from mixmerge.plan.build import build_plan
from mixmerge.plan.graph import Plan, Step
from mixmerge.recipe.load import load_recipe
from mixmerge.run.local import usable_threads, worker_environment
from mixmerge.run.progress import Progress
from mixmerge.run.runner import Outcome, Study, run_plan, was_there_memory
from mixmerge.run.store import Store, write_json

RUNNER = """
import json, sys
from pathlib import Path
from mixmerge.plan.graph import Plan
from mixmerge.run.progress import Progress
from mixmerge.run.runner import run_plan
plan = Plan.from_json(json.loads(Path(sys.argv[1]).read_text()))
outcome = run_plan(plan, Path(sys.argv[2]), jobs=int(sys.argv[3]), threads=1, progress=Progress())
print(json.dumps({"done": outcome.done, "failed": outcome.failed, "blocked": outcome.blocked, "bug": outcome.bug}))
"""


class Spoken(Progress):
    """Progress that keeps what it says."""

    def __init__(self) -> None:
        super().__init__(Console(file=io.StringIO(), width=200))
        self.lines: list[str] = []

    def _say(self, text: str) -> None:
        super()._say(text)
        self.lines.append(text)


def carry_out(plan: Plan, root: Path, jobs: int = 1) -> Outcome:
    return run_plan(plan, root, jobs=jobs, threads=1, progress=Spoken())


def events(root: Path, plan: Plan) -> list[dict]:
    return [json.loads(line) for line in Study(root, plan.study).events.read_text().splitlines()]


def names(plan: Plan, ids) -> set[str]:
    return {plan.by_id[step_id].name for step_id in ids}


@pytest.fixture
def start(tmp_path):
    """Start a runner in a process of its own; all are ended with the test."""
    started = []

    def start(plan: Plan, jobs: int = 1, root: Path = tmp_path / "out") -> subprocess.Popen[str]:
        file = tmp_path / f"plan-{len(started)}.json"
        write_json(file, plan.to_json())
        process = subprocess.Popen(
            [sys.executable, "-c", RUNNER, str(file), str(root), str(jobs)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            # a shell's background job ignores SIGINT, and hands that down
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


# The ordinary way


@pytest.mark.parametrize("jobs", [1, 3])
def test_every_step_is_done_once_and_after_its_inputs(chain, tmp_path, jobs):
    outcome = carry_out(chain, tmp_path, jobs)
    assert sorted(outcome.done) == sorted(chain.by_id)
    assert (outcome.failed, outcome.blocked, outcome.bug) == ({}, [], False)
    seen: set[str] = set()
    for event in events(tmp_path, chain):
        if event["event"] == "start":
            assert seen.issuperset(chain.by_id[event["step"]].inputs.values())
        elif event["event"] == "done":
            seen.add(event["step"])
    assert not list((tmp_path / "store" / ".partial").iterdir())
    assert not list((tmp_path / "store" / ".leases").glob("*.json"))


def test_the_same_again_starts_nothing(chain, tmp_path):
    carry_out(chain, tmp_path)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "store").rglob("*") if path.is_file()}
    spoken = Spoken()
    outcome = run_plan(chain, tmp_path, jobs=1, threads=1, progress=spoken)
    assert outcome.done == []
    assert spoken.lines == ["chain: 5 steps, 5 already there, 0 to run"]
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "store").rglob("*") if path.is_file()} == before


def test_only_what_is_missing_is_made(chain, tmp_path):
    carry_out(chain, tmp_path)
    store = Store(tmp_path)
    (store.path(chain.steps[3].id) / "record.json").unlink()
    assert names(chain, carry_out(chain, tmp_path).done) == {"both"}


def test_a_record_says_what_went_in_what_was_measured_and_where(chain, tmp_path):
    carry_out(chain, tmp_path)
    both = chain.steps[3]
    record = Store(tmp_path).record(both.id)
    assert (record["id"], record["kind"], record["name"], record["what"]) == (both.id, "merge", "both", both.what)
    assert record["inputs"]["model0"] == {"id": chain.steps[1].id, "name": "one"}
    assert record["measurements"]["tensors"] > 0
    folder = Store(tmp_path).path(both.id)
    assert record["files"] == {
        str(p.relative_to(folder)): p.stat().st_size
        for p in sorted(folder.rglob("*"))
        if p.is_file() and p.name != "record.json"
    }
    assert {"seconds", "peak_rss_mb", "host", "cores", "python", "versions"} <= record["provenance"].keys()
    assert record["provenance"]["versions"]["mixmerge"] == "0.1.0"


def test_models_are_linked_by_name_and_old_links_go(chain, tmp_path):
    carry_out(chain, tmp_path)
    links = Study(tmp_path, "chain").folder / "models"
    assert {path.name for path in links.iterdir()} == {"base", "one", "two", "both", "three"}
    assert (links / "both").resolve() == Store(tmp_path).path(chain.steps[3].id).resolve()
    less = Plan("chain", chain.steps, {"renamed": chain.steps[3].id})
    carry_out(less, tmp_path)
    assert {path.name for path in links.iterdir()} == {"renamed"}


@pytest.mark.parametrize(("jobs", "shared"), [(4, ["one", "two"]), (1, ["one", "two", "three"])])
def test_a_group_shares_a_process_and_where_there_is_one_its_family_does(base_step, helpers, tmp_path, jobs, shared):
    merges = [
        Step(step.kind, step.name, step.what, step.inputs, group=group)
        for step, group in (
            (helpers.merge("one", base_step.id, dtype="float32"), "some a"),
            (helpers.merge("two", base_step.id, dtype="bfloat16"), "some a"),
            (helpers.merge("three", base_step.id, dtype="float16"), "some b"),
            (helpers.merge("four", base_step.id), ""),
        )
    ]
    plan = Plan("group", (base_step, *merges), {})
    runner = threading.Thread(
        target=run_plan, args=(plan, tmp_path), kwargs={"jobs": jobs, "threads": 1, "progress": Spoken()}
    )
    with Store(tmp_path).lease(merges[0]):  # so that its process stays long enough to be looked at
        runner.start()
        helpers.wait(lambda: helpers.workers(os.getpid(), merges[0]), "the group's process")
        command = helpers.workers(os.getpid(), merges[0])[0].cmdline()
    runner.join()
    assert command[-len(shared) :] == [step.id for step in merges if step.name in shared]
    assert len(list((tmp_path / "store" / "merge").iterdir())) == 4


# Failures


def test_a_failing_step_stops_only_what_depends_on_it(broken_chain, tmp_path):
    outcome = carry_out(broken_chain, tmp_path)
    assert names(broken_chain, outcome.failed) == {"bad"}
    assert names(broken_chain, outcome.blocked) == {"after", "last"}
    assert names(broken_chain, outcome.done) == {"base", "good"}
    assert "unknown merge_method 'nonsense'" in next(iter(outcome.failed.values()))
    with pytest.raises(StepError, match=r"^1 step\(s\) failed, 2 could not start, the rest is kept; mend the cause"):
        outcome.check()


def test_a_mixture_that_cannot_be_drawn_ends_the_run_before_anything_is_generated(study, tmp_path, monkeypatch):
    monkeypatch.setattr("mixmerge.plan.mixture.check_tokens", lambda *_, **__: None)
    plan = build_plan(load_recipe(study.recipe, ["budget={tokens: 8000000}"]))
    outcome = carry_out(plan, tmp_path / "out", jobs=2)
    assert {plan.by_id[i].title for i in outcome.done} == {"base/base"}
    assert {plan.by_id[i].title for i in outcome.failed} == {"mixture/general", "mixture/mix"}
    assert len(outcome.blocked) == len(plan.steps) - 3
    assert all("but its share of the budget is" in error for error in outcome.failed.values())


def test_a_failure_leaves_no_finished_folder_and_a_log(broken_chain, tmp_path):
    carry_out(broken_chain, tmp_path)
    bad = broken_chain.find("merge/bad")
    assert Store(tmp_path).find(bad.id) is None
    assert "nonsense" in Study(tmp_path, "broken").log(bad).read_text()
    assert Store(tmp_path).running(bad) is None


def test_a_step_that_fails_is_tried_again_by_the_next_run(broken_chain, tmp_path):
    carry_out(broken_chain, tmp_path)
    again = carry_out(broken_chain, tmp_path)
    assert (names(broken_chain, again.failed), again.done) == ({"bad"}, [])


def test_a_bug_is_told_from_a_mistake(base_step, tmp_path):
    plan = Plan("bug", (base_step, Step("merge", "odd", {"seed": 0}, {"model0": base_step.id})), {})
    outcome = carry_out(plan, tmp_path)
    assert list(outcome.failed.values()) == ["KeyError: 'config'"]
    assert outcome.bug
    with pytest.raises(StepError) as caught:
        outcome.check()
    assert caught.value.exit_code == 70
    assert "Traceback" in Study(tmp_path, "bug").log(plan.steps[1]).read_text()


def test_a_killed_worker_is_named_and_its_step_fails(chain, tmp_path, start, helpers):
    store = Store(tmp_path / "out")
    with store.lease(chain.steps[1]):  # so that the worker waits
        runner = start(chain)
        worker = helpers.wait(lambda: helpers.workers(runner.pid, chain.steps[1]), "a worker at `one`")[0]
        helpers.wait(lambda: "waiting" in Study(tmp_path / "out", "chain").events.read_text(), "it waits")
        worker.send_signal(signal.SIGKILL)
        out, err = runner.communicate(timeout=120)
    found = json.loads(out)
    assert found["failed"] == {chain.steps[1].id: "its process was ended by signal 9; was there memory enough?"}
    assert found["bug"] is False
    assert names(chain, found["blocked"]) == {"both", "three"}
    assert names(chain, found["done"]) == {"base", "two"}
    assert "merge/one: another runner is at it, waiting" in err
    assert "merge/one  FAILED: its process was ended by signal 9" in err
    assert names(chain, carry_out(chain, tmp_path / "out").done) == {"one", "both", "three"}


def test_of_two_runs_at_once_one_tells_of_each_step_that_it_made_it_and_the_other_who_did(chain, tmp_path, start):
    runners = [start(chain), start(chain)]
    told = [runner.communicate(timeout=240) for runner in runners]
    assert [runner.returncode for runner in runners] == [0, 0]
    log = events(tmp_path / "out", chain)
    done = [event for event in log if event["event"] == "done"]
    assert sorted(event["step"] for event in done if "by" not in event) == sorted(step.id for step in chain.steps)
    found = [event for event in done if "by" in event]
    assert all((event["by"], event["measurements"]) == ("another runner", {}) for event in found)
    ends = [event for event in log if event["event"] == "end"]
    assert sum(end["done"] for end in ends) == len(chain.steps)
    assert sum(end["by_others"] for end in ends) == len(found)
    assert sum(err.count("made by another runner") for _, err in told) == len(found)


def test_a_step_that_was_waited_for_is_said_to_be_made_by_another_runner(chain, tmp_path, start, helpers):
    root, elsewhere, step = tmp_path / "out", tmp_path / "elsewhere", chain.steps[1]
    short = Plan("chain", chain.steps[:2], {})
    carry_out(short, elsewhere)
    carry_out(Plan("chain", chain.steps[:1], {}), root)
    with Store(root).lease(step):
        runner = start(short)
        helpers.wait(lambda: "waiting" in Study(root, "chain").events.read_text(), "it waits")
        made = Store(elsewhere).path(step.id)
        shutil.copytree(made, root / made.relative_to(elsewhere))
    out, err = runner.communicate(timeout=120)
    assert json.loads(out)["done"] == [step.id]
    assert "merge/one  made by another runner" in err
    end = events(root, chain)[-1]
    assert (end["done"], end["by_others"]) == (0, 1)


def test_a_killed_training_is_told_what_would_need_less_memory(base_step, tiny_base, tmp_path):
    carry_out(Plan("base", (base_step,), {}), tmp_path)
    what = {"method": "sft", "learning_rate": 1e-3, "epochs": 1.0, "batch_size": 4, "max_length": 64}
    what |= {"warmup_ratio": 0.1, "scheduler": "cosine", "weight_decay": 0.0, "precision": "fp32", "seed": 0}
    step = Step(
        "train", "mix", what, {"model": base_step.id, "mixture": "0" * 12}, how={"gradient_checkpointing": True}
    )
    said = was_there_memory(step, Store(tmp_path))
    assert said.startswith("was there memory enough? it needs about 0.")
    assert "training.gradient_accumulation: 4" in said
    assert "gradient_checkpointing" not in said
    for other in (replace(step, inputs={"model": "f" * 12}), replace(step, what={"engine": "command"}), base_step):
        assert was_there_memory(other, Store(tmp_path)) == "was there memory enough?"


def test_of_a_killed_group_only_the_first_unfinished_step_fails(base_step, helpers, tmp_path, start):
    merges = [
        Step(s.kind, s.name, s.what, s.inputs, group="g")
        for s in (helpers.merge("one", base_step.id), helpers.merge("two", base_step.id, dtype="float32"))
    ]
    plan = Plan("group", (base_step, *merges), {})
    store = Store(tmp_path / "out")
    with store.lease(merges[0]):
        runner = start(plan)
        worker = helpers.wait(lambda: helpers.workers(runner.pid, merges[0]), "a worker at the group")[0]
        worker.send_signal(signal.SIGKILL)
        out, _ = runner.communicate(timeout=120)
    found = json.loads(out)
    assert names(plan, found["failed"]) == {"one"}
    assert names(plan, found["done"]) == {"base", "two"}


def test_a_worker_ends_when_its_runner_is_killed(chain, tmp_path, start, helpers):
    store = Store(tmp_path / "out")
    with store.lease(chain.steps[1]), store.lease(chain.steps[2]):  # so that both workers wait, as long as we like
        runner = start(chain, jobs=2)
        workers = helpers.wait(
            lambda: found if len(found := helpers.workers(runner.pid, *chain.steps[1:3])) == 2 else [], "two workers"
        )
        told = Study(tmp_path / "out", "chain").events
        helpers.wait(lambda: told.read_text().count("waiting") == 2, "both wait, and have nothing more to say")
        runner.send_signal(signal.SIGKILL)
        runner.wait()
        _, alive = psutil.wait_procs(workers, timeout=30)
        assert alive == []
    assert names(chain, carry_out(chain, tmp_path / "out").done) == {"one", "two", "both", "three"}


def test_an_interrupted_runner_ends_its_workers_and_keeps_what_is_done(chain, tmp_path, start, helpers):
    store = Store(tmp_path / "out")
    with store.lease(chain.steps[1]):
        runner = start(chain)
        workers = helpers.wait(lambda: helpers.workers(runner.pid, chain.steps[1]), "a worker at `one`")
        runner.send_signal(signal.SIGINT)
        _, err = runner.communicate(timeout=60)
        assert "KeyboardInterrupt" in err
        _, alive = psutil.wait_procs(workers, timeout=30)
        assert alive == []
    assert Store(tmp_path / "out").find(chain.steps[0].id) is not None


# Races


def test_two_runners_at_once_do_every_step_once(chain, tmp_path, start):
    runners = [start(chain, jobs=2), start(chain, jobs=2)]
    outputs = [runner.communicate(timeout=200) for runner in runners]
    for runner, (out, err) in zip(runners, outputs, strict=True):
        assert runner.returncode == 0, err
        assert json.loads(out)["failed"] == {}
    started = Counter(event["step"] for event in events(tmp_path / "out", chain) if event["event"] == "start")
    assert started == dict.fromkeys(chain.by_id, 1)
    store = Store(tmp_path / "out")
    assert all(store.find(step_id) for step_id in chain.by_id)


@pytest.fixture
def plans(chain, base_step, helpers) -> list[Plan]:
    """Two studies that have three steps of five in common."""
    both = chain.by_id[chain.models["both"]]
    own = helpers.merge("own", both.id, base_step.id)
    last = helpers.merge("last", own.id)
    shared = tuple(step for step in chain.steps if step.name in ("base", "one", "both"))
    return [chain, Plan("other", (*shared, own, last), {})]


def begun(root: Path, *plans: Plan) -> Counter:
    return Counter(e["step"] for plan in plans for e in events(root, plan) if e["event"] == "start")


def test_two_studies_at_once_make_what_they_share_once(plans, tmp_path, start):
    runners = [start(plan, jobs=2) for plan in plans]
    for runner in runners:
        out, err = runner.communicate(timeout=200)
        assert runner.returncode == 0, err
        assert (json.loads(out)["failed"], json.loads(out)["blocked"]) == ({}, [])
    ids = {step.id for plan in plans for step in plan.steps}
    assert begun(tmp_path / "out", *plans) == dict.fromkeys(ids, 1)
    assert all(Store(tmp_path / "out").find(step_id) for step_id in ids)
    for folder in (".partial", ".leases"):
        assert list((tmp_path / "out/store" / folder).iterdir()) == []


@pytest.mark.parametrize("victim", [0, 1])
def test_when_one_of_two_runners_is_killed_the_other_carries_on_and_repeats_nothing(
    plans, tmp_path, start, helpers, victim
):
    root, store = tmp_path / "out", Store(tmp_path / "out")
    runners = [start(plan, jobs=2) for plan in plans]
    helpers.wait(lambda: len(list(root.glob("runs/*/events.jsonl"))) == 2 and store.folder.is_dir(), "both at work")
    helpers.wait(lambda: begun(root, plans[victim]), "a step of the one that is killed")
    family = psutil.Process(runners[victim].pid).children(recursive=True)
    done = {name.rpartition("--")[2] for name in (str(path.parent) for path in store.folder.glob("*/*--*/record.json"))}
    before = {step: count for step, count in begun(root, *plans).items() if step in done}
    for process in (*family, runners[victim]):
        with suppress(ProcessLookupError, psutil.NoSuchProcess):
            os.kill(process.pid, signal.SIGKILL)
    out, err = runners[1 - victim].communicate(timeout=200)
    assert runners[1 - victim].returncode == 0, err
    assert json.loads(out)["failed"] == {}
    assert psutil.wait_procs(family, timeout=30)[1] == []
    again = carry_out(plans[victim], root)
    assert again.failed == {}
    ids = {step.id for plan in plans for step in plan.steps}
    counts = begun(root, *plans)
    assert counts.keys() == ids
    assert {step: counts[step] for step in before} == before, "what was finished is not begun again"
    assert sum(counts.values()) <= len(ids) + 2, "two steps at most were in the hands of the one that was killed"
    for folder in (".partial", ".leases"):
        assert list((root / "store" / folder).iterdir()) == []


def test_a_runner_waits_for_a_step_that_another_is_at_and_takes_its_result(chain, tmp_path, start, helpers):
    root = tmp_path / "out"
    step, store = chain.steps[1], Store(root)
    with store.lease(step):
        runner = start(chain)
        helpers.wait(
            lambda: list(root.glob("runs/chain/events.jsonl")) and "waiting" in Study(root, "chain").events.read_text(),
            "it waits",
        )
        folders = store.begin(step)
        source = Store(root).path(chain.steps[0].id)
        for path in source.iterdir():
            if path.name != "record.json":
                (folders.out / path.name).write_bytes(path.read_bytes())
        store.commit(step, {"made": "elsewhere"})
    out, _ = runner.communicate(timeout=120)
    assert json.loads(out)["failed"] == {}
    assert Store(root).record(step.id) == {"id": step.id, "made": "elsewhere"}


@pytest.mark.parametrize("group", ["", "one process"])
def test_what_another_is_at_is_put_off_until_there_is_nothing_else(base_step, tmp_path, start, helpers, group):
    dtypes = ("float32", "float16", "bfloat16")
    merges = [replace(helpers.merge(dtype, base_step.id, dtype=dtype), group=group) for dtype in dtypes]
    plan = Plan("shared", (base_step, *merges), {})
    events = Study(tmp_path / "out", "shared").events
    with Store(tmp_path / "out").lease(merges[0]):
        runner = start(plan)
        helpers.wait(lambda: events.exists() and "waiting" in events.read_text(), "it waits")
        store = Store(tmp_path / "out")
        assert [store.find(merge.id) is not None for merge in merges] == [False, True, True]
    out, _ = runner.communicate(timeout=120)
    assert len(json.loads(out)["done"]) == 4


def test_while_one_process_waits_for_another_runner_its_place_is_free(base_step, tmp_path, start, helpers):
    first, second, third = (helpers.merge(d, base_step.id, dtype=d) for d in ("float32", "float16", "bfloat16"))
    plan = Plan("places", (base_step, first, second, third), {})
    events = Study(tmp_path / "out", "places").events
    with Store(tmp_path / "out").lease(first):
        runner = start(plan)
        with Store(tmp_path / "out").lease(second):
            helpers.wait(lambda: events.exists() and events.read_text().count("waiting") == 2, "it waits for both")
            assert Store(tmp_path / "out").find(third.id) is not None
        helpers.wait(lambda: Store(tmp_path / "out").find(second.id) is not None, "the second one")
    assert json.loads(runner.communicate(timeout=120)[0])["failed"] == {}


def test_a_run_with_other_settings_takes_nothing_from_under_one_that_is_at_work(
    chain, base_step, tmp_path, start, helpers
):
    root, events = tmp_path / "out", Study(tmp_path / "out", "chain").events
    other = Plan("chain", (base_step, helpers.merge("other", base_step.id, dtype="float16")), {})
    with Store(root).lease(chain.steps[1]):
        runner = start(chain)
        helpers.wait(lambda: events.exists() and "waiting" in events.read_text(), "it waits")
        assert carry_out(other, root).failed == {}
    out, _ = runner.communicate(timeout=120)
    assert (json.loads(out)["failed"], json.loads(out)["blocked"]) == ({}, [])
    assert not list(Study(root, "chain").folder.glob(".plan-*")), "the last to end tidies up"


# Where things cannot be written


def test_a_root_that_cannot_be_made_is_named(chain, tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(CheckpointError, match="Not a directory"):
        carry_out(chain, tmp_path / "file" / "out")


def test_scores_of_an_unfinished_study_are_asked_for_in_vain(chain, tmp_path):
    score = Step("score", "chain", {})
    plan = Plan("chain", (*chain.steps, score), {})
    with pytest.raises(UserError, match="chain: the study is not finished; mixmerge run RECIPE"):
        Study(tmp_path, "chain").scores(plan, Store(tmp_path))


# Threads


def test_a_step_gets_its_share_of_the_cores_unless_the_environment_says_otherwise(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS")
    cores = len(os.sched_getaffinity(0))
    assert usable_threads() == cores
    assert usable_threads(jobs=cores) == 1
    assert usable_threads(jobs=10 * cores) == 1
    for said, threads in (("3", 3), ("2,1", 2), ("", cores), ("0", cores), ("many", cores)):
        monkeypatch.setenv("OMP_NUM_THREADS", said)
        assert usable_threads() == threads


def test_a_worker_is_told_its_threads_and_to_stay_silent_on_the_network():
    environment = worker_environment(5)
    assert environment["OMP_NUM_THREADS"] == environment["MKL_NUM_THREADS"] == "5"
    assert environment["HF_HUB_DISABLE_TELEMETRY"] == "1"
    assert environment["PATH"] == os.environ["PATH"]


# What a person sees


def test_plain_lines_say_how_far_the_study_is(broken_chain, tmp_path):
    spoken = Spoken()
    run_plan(broken_chain, tmp_path, jobs=1, threads=1, progress=spoken)
    assert spoken.lines[0] == "broken: 5 steps, 0 already there, 5 to run"
    assert spoken.lines[1] == "[0/5] base/base ..."
    assert spoken.lines[2].startswith("[1/5] base/base  ")
    assert spoken.lines[2].endswith(" M parameters)")
    assert any(line.startswith("[1/5] merge/bad  FAILED: ") for line in spoken.lines)
    assert any(line.startswith("[2/5] merge/good  ") for line in spoken.lines)


def test_a_terminal_gets_a_table_and_is_left_clean(chain, tmp_path):
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=100)
    progress = Progress(console)
    run_plan(chain, tmp_path, jobs=1, threads=1, progress=progress)
    progress.stop()
    text = screen.getvalue()
    assert "chain: 0/5 done, 0:00" in text
    assert "[1/5] base/base  " in text
    assert text.count("\x1b[?25l") == text.count("\x1b[?25h"), "the cursor is shown again"


# Parts of a study


def test_only_some_steps_bring_what_they_need_and_leave_the_rest(chain, tmp_path):
    spoken = Spoken()
    outcome = run_plan(chain, tmp_path, jobs=1, threads=1, progress=spoken, only=["merge/both"])
    assert names(chain, outcome.done) == {"base", "one", "both"}
    assert (outcome.failed, outcome.blocked) == ({}, [])
    assert spoken.lines[0] == "chain: 3 steps, 0 already there, 3 to run"
    assert names(chain, carry_out(chain, tmp_path).done) == {"two", "three"}


def test_a_base_that_fails_ends_the_run_and_keeping_going_goes_past_it(base_step, helpers, tmp_path):
    gone = Step("base", "gone", {"source": {"content": "gone"}, "trim": None, "chat_template": None})
    gone = replace(gone, how={"path": str(tmp_path / "nowhere")})
    merges = [helpers.merge("good", base_step.id), helpers.merge("lost", gone.id)]
    plan = Plan("two bases", (gone, base_step, *merges), {})
    ended = carry_out(plan, tmp_path / "ended")
    assert ended.ended
    assert "good" not in names(plan, ended.done)
    kept = run_plan(plan, tmp_path / "kept", jobs=1, threads=1, progress=Spoken(), keep_going=True)
    assert names(plan, kept.done) == {"base", "good"}
    assert names(plan, kept.failed) == {"gone"}
    assert names(plan, kept.blocked) == {"lost"}


def test_a_base_whose_process_is_killed_stops_only_what_depends_on_it(base_step, start, helpers, tmp_path):
    held = replace(base_step, name="held", what=base_step.what | {"source": {"content": "other"}})
    good, lost = helpers.merge("good", base_step.id), helpers.merge("lost", held.id)
    plan, store = Plan("two bases", (held, base_step, good, lost), {}), Store(tmp_path / "out")
    with store.lease(held):
        runner = start(plan)
        (worker,) = helpers.wait(lambda: helpers.workers(runner.pid, held), "a worker")
        waits = (line for line in iter(runner.stderr.readline, "") if "another runner is at it" in line)
        assert next(waits)
        worker.kill()
        said = runner.communicate(timeout=120)[1]
    store.refresh()
    assert [store.find(step.id) is not None for step in plan.steps] == [False, True, True, False]
    assert "base/held  FAILED: its process was ended by signal 9" in said
    last = Study(tmp_path / "out", plan.study).log(held).read_text().splitlines()[-1]
    assert re.fullmatch(r"\d{4}-.*\+00:00 mixmerge: its process was ended by signal 9; was there memory enough\?", last)


def test_interrupted_twice_a_run_is_over_at_once_and_leaves_no_process(base_step, tmp_path, start, helpers):
    merge = helpers.merge("held", base_step.id)
    plan = Plan("twice", (base_step, merge), {})
    with Store(tmp_path / "out").lease(merge):
        runner = start(plan)
        events = Study(tmp_path / "out", "twice").events
        helpers.wait(lambda: events.exists() and "waiting" in events.read_text(), "the worker waits")
        (worker,) = helpers.workers(runner.pid, merge)
        worker.suspend()  # deaf to SIGTERM, like one deep in a library
        runner.send_signal(signal.SIGINT)
        lines = iter(runner.stderr.readline, "")
        assert any("stopping; what is finished is kept" in line for line in lines)
        runner.send_signal(signal.SIGINT)
        runner.communicate(timeout=60)
        _, alive = psutil.wait_procs([worker], timeout=30)
        assert alive == []
