"""What is done, what is to run, and which field is the reason."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from mixmerge.plan.explain import explain
from mixmerge.plan.graph import REVISIONS
from mixmerge.run.store import Store


@pytest.fixture
def finish(study):
    """Put a step's record into the store as if it had been carried out."""

    def finish(step, plan):
        store = Store(study.out)
        store.begin(step)
        inputs = {role: {"id": i, "name": plan.by_id[i].name} for role, i in step.inputs.items()}
        record = {"id": step.id, "revision": REVISIONS[step.kind], "what": dict(step.what), "inputs": inputs}
        return store.commit(step, record)

    return finish


@pytest.fixture
def why(study, planned):
    """Title -> (state, reasons) with overrides."""

    def why(*overrides):
        return {e.step.title: (e.state, e.why) for e in explain(planned(*overrides), Store(study.out))}

    return why


def test_nothing_is_made_before_the_first_run(why):
    assert set(why().values()) == {("to run", ("not made yet",))}


def test_what_is_in_the_store_is_done(planned, finish, why):
    plan = planned()
    for step in plan.steps:
        finish(step, plan)
    assert set(why().values()) == {("done", ())}


def test_the_reason_names_the_field_with_both_values_and_what_follows_names_its_input(planned, finish, why):
    plan = planned()
    for step in plan.steps:
        finish(step, plan)
    found = why("merges.ties.parameters.density=0.7")
    todo = {title: reasons for title, (state, reasons) in found.items() if state != "done"}
    assert todo["merge/ties"] == ("config.parameters.density: 0.5 -> 0.7",)
    assert todo["generate/ties.general"] == ("input merge/ties is to be made again",)
    assert "input generate/ties.general is to be made again" in todo["judge/ties.general.quality"]
    assert "input merge/ties is to be made again" in todo["score/tiny"]
    assert not any(title.startswith(("train/", "mixture/")) for title in todo)


def test_several_fields_are_all_named(planned, finish, why):
    plan = planned()
    for step in plan.steps:
        finish(step, plan)
    found = why("training.epochs=2", "training.learning_rate=0.01", "seed=4")
    assert found["train/mix"][1][:3] == ("epochs: 1.0 -> 2.0", "learning_rate: 0.001 -> 0.01", "seed: 0 -> 4")


def test_a_record_of_an_earlier_revision_says_so(planned, finish, why, monkeypatch):
    plan = planned()
    for step in plan.steps:
        finish(step, plan)
    monkeypatch.setitem(REVISIONS, "merge", 2)
    state, reasons = why()["merge/ties"]
    assert state == "to run"
    assert reasons == ("mixmerge makes merge steps differently now (revision 1 -> current)",)


def test_a_new_and_a_dropped_input_are_told(planned, finish, why):
    plan = planned()
    for step in plan.steps:
        finish(step, plan)
    reasons = why("baselines={}", "merges={}")["score/tiny"][1]
    assert "no longer needs model/mix" in reasons
    assert any(reason.startswith("candidates: [") for reason in reasons)


def test_work_that_was_begun_is_interrupted_and_work_under_a_live_lease_is_running(study, planned, why):
    step = planned().find("train/mix")
    store = Store(study.out)
    store.begin(step)
    assert why()["train/mix"] == ("interrupted", ("not made yet",))
    with store.lease(step):
        assert why()["train/mix"] == ("running", ())
    assert why()["train/mix"][0] == "interrupted"


def test_the_lease_of_a_dead_process_is_no_running_step(study, planned, why):
    plan = planned()
    step = plan.find("train/mix")
    (study.folder / "step.json").write_text(json.dumps(step.to_json()))
    code = (
        "import json, os, sys, pathlib; from mixmerge.run.store import Store; from mixmerge.plan.graph import Step\n"
        "step = Step.from_json(json.loads(pathlib.Path(sys.argv[1]).read_text()))\n"
        "held = Store(pathlib.Path(sys.argv[2])).lease(step); assert held.__enter__(); os._exit(9)"
    )
    subprocess.run([sys.executable, "-c", code, study.folder / "step.json", study.out], check=False)
    assert list((study.store / ".leases").glob("*.json"))
    assert why()["train/mix"][0] == "to run"


def test_another_candidate_whose_name_only_begins_alike_is_no_reason(study, planned, finish, why):
    study.edit("  mix:\n", "  mix--er: {mixture: general, training: {epochs: 5}}\n  mix:\n")
    plan = planned()
    finish(plan.find("train/mix--er"), plan)
    assert why()["train/mix"] == ("to run", ("not made yet",))


def test_a_damaged_record_is_the_reason_and_no_other_step_is_compared_with_it(planned, finish, why):
    plan = planned()
    folder = finish(plan.find("merge/ties"), plan)
    (folder / "record.json").write_text("{")
    assert why()["merge/ties"] == ("to run", ("damaged: record.json cannot be read",))
    assert why("merges.ties.parameters.density=0.7")["merge/ties"] == ("to run", ("not made yet",))


def test_a_step_whose_record_was_taken_away_is_to_run(planned, finish, why):
    plan = planned()
    folder = finish(plan.find("merge/ties"), plan)
    (folder / "record.json").unlink()
    assert why()["merge/ties"] == ("to run", ("not made yet",))
