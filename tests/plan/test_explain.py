"""What is done, what is to run, and which field is the reason."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from mixmerge.plan.build import build_plan
from mixmerge.plan.explain import explain
from mixmerge.plan.graph import KINDS, REVISIONS
from mixmerge.recipe.load import load_recipe
from mixmerge.run.history import History
from mixmerge.run.runner import Study
from mixmerge.run.store import Store


@pytest.fixture
def finish(study):
    """Put a step's record into the store as if it had been carried out."""

    def finish(step, plan):
        store = Store(study.out)
        store.begin(step)
        inputs = {role: {"id": i, "name": plan.by_id[i].name} for role, i in step.inputs.items()}
        record = {"id": step.id, "revision": REVISIONS[step.kind], "what": dict(step.what), "inputs": inputs}
        return store.commit(step, record | {"provenance": dict(plan.called)})

    return finish


@pytest.fixture
def why(study, planned):
    """Title -> (state, reasons) with overrides."""

    def why(*overrides):
        return {e.step.title: (e.state, e.why) for e in explain(planned(*overrides), History(Store(study.out)))}

    return why


def test_nothing_is_made_before_the_first_run(why):
    found = why()
    assert {reasons for _, reasons in found.values()} == {("not made yet",)}
    ready = {title for title, (state, _) in found.items() if state == "to run"}
    assert ready == {"base/base", "fit-judge/refusal"}
    assert {state for title, (state, _) in found.items() if title not in ready} == {"blocked"}


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
    assert state == "changed"
    assert reasons == ("mixmerge makes merge steps differently now (revision 1 -> current)",)


@pytest.fixture
def ran(study, planned, finish):
    """Carry out a plan with overrides in the study's own folder: all of its steps, or those of some kinds."""

    def ran(*overrides, kinds=KINDS):
        plan = Study(study.out, "tiny").open(planned(*overrides))
        for step in plan.steps:
            if step.kind in kinds and Store(study.out).find(step.id) is None:
                finish(step, plan)
        return plan

    return ran


def why_now(study, plan):
    history = History(Store(study.out), Study(study.out, plan.study).events)
    return {e.step.title: (e.state, e.why) for e in explain(plan, history)}


def test_a_variant_that_was_run_between_changes_no_field_of_the_recipe(study, planned, ran):
    ran()
    ran("merges.ties.parameters.density=0.7")
    found = why_now(study, planned("training.learning_rate=5"))
    assert found["train/mix"] == ("changed", ("learning_rate: 0.001 -> 5.0",))
    assert found["merge/ties"][0] == "blocked"
    assert set(found["merge/ties"][1]) == {
        "input train/general is to be made again",
        "input train/mix is to be made again",
    }


def test_another_study_in_the_store_changes_no_field_of_this_one(study, planned, ran, finish):
    ran()
    text = study.recipe.read_text().replace("name: tiny", "name: other").replace("1.0e-3", "2.0e-3")
    (study.folder / "other.yaml").write_text(text.replace("languages: [en, fr]", "languages: [en]"))
    other = build_plan(load_recipe(study.folder / "other.yaml"))
    for step in other.steps:
        if Store(study.out).find(step.id) is None:
            finish(step, other)
    found = why_now(study, planned("languages=[en]"))
    assert not any("learning_rate" in reason for _, reasons in found.values() for reason in reasons)
    assert found["train/mix"] == ("changed", ("input mixture/mix is new",)), "that study's mixture is this one's too"


def test_without_a_run_of_its_own_a_step_is_compared_with_the_most_alike(study, planned, finish):
    for overrides in (("seed=3", "training.epochs=2"), ("training.learning_rate=0.01",)):
        plan = planned(*overrides)
        finish(plan.find("train/mix"), plan)
        finish(plan.find("base/base"), plan) if Store(study.out).find(plan.models["base"]) is None else None
    found = why_now(study, planned("training.learning_rate=0.02"))
    assert "learning_rate: 0.01 -> 0.02" in found["train/mix"][1]
    assert not any(reason.startswith(("epochs", "seed")) for reason in found["train/mix"][1])


def test_a_step_that_was_begun_with_these_settings_has_not_changed(study, planned, ran):
    ran("merges.ties.parameters.density=0.7")
    plan = ran(kinds=("base", "mixture", "train"))
    Store(study.out).begin(plan.find("merge/ties"))
    assert why_now(study, planned())["merge/ties"] == ("interrupted", ("not made yet",))


def test_what_the_last_run_was_to_make_and_did_not_is_compared_with_what_was_made(study, planned, ran):
    ran()
    ran("merges.ties.parameters.density=0.7", kinds=())
    found = why_now(study, planned("merges.ties.parameters.density=0.7"))
    assert found["merge/ties"] == ("changed", ("config.parameters.density: 0.5 -> 0.7",))


def test_json_has_each_changed_field_with_both_values_and_cuts_nothing(study, planned, ran):
    path = study.folder / "base/tokenizer_config.json"
    own = study.folder / "base/chat_template.jinja"
    jinja = own.read_text() if own.exists() else json.loads(path.read_text())["chat_template"]
    one, two = (jinja + "{# " + "x" * 300 + f" {letter} #}}" for letter in "ab")
    (study.folder / "one.jinja").write_text(one)
    (study.folder / "two.jinja").write_text(two)
    ran("base={path: ./base, chat_template: one.jinja}")
    plan = planned("base={path: ./base, chat_template: two.jinja}", "languages=[en]")
    entries = {e.step.title: e for e in explain(plan, History(Store(study.out), Study(study.out, "tiny").events))}
    told = entries["base/base"].to_json()
    assert told["changes"] == [{"field": "chat_template", "old": one, "new": two}]
    assert told["why"] == [f"chat_template: {json.dumps(one)} -> {json.dumps(two)}"]
    (said,) = entries["base/base"].why
    assert said == f'chat_template: ...{"x" * 19} a #}}" -> ...{"x" * 19} b #}}"'
    cells = [change for change in entries["mixture/general"].to_json()["changes"] if change["field"] == "cells.1"]
    assert cells == [{"field": "cells.1", "old": {"objective": "general", "lang": "fr", "share": 0.5}}]


def test_a_damaged_plan_of_the_last_run_spoils_no_plan(study, planned, ran):
    ran()
    Study(study.out, "tiny").plan_file.write_text("[")
    assert why_now(study, planned("training.epochs=2"))["train/mix"] == ("changed", ("epochs: 1.0 -> 2.0",))


def test_a_new_and_a_dropped_input_are_told(planned, finish, why):
    plan = planned()
    for step in plan.steps:
        finish(step, plan)
    reasons = why("baselines={}", "merges={}")["score/tiny"][1]
    assert "no longer needs model/mix" in reasons
    assert sum(reason.startswith("candidates.") and ": removed " in reason for reason in reasons) == 2, reasons


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
    assert why()["train/mix"][0] == "blocked"


def test_another_candidate_whose_name_only_begins_alike_is_no_reason(study, planned, finish, why):
    study.edit("  mix:\n", "  mix--er: {mixture: general, training: {epochs: 5}}\n  mix:\n")
    plan = planned()
    finish(plan.find("train/mix--er"), plan)
    assert why()["train/mix"] == ("blocked", ("not made yet",))


def test_a_damaged_record_is_the_reason_and_no_other_step_is_compared_with_it(planned, finish, why):
    plan = planned()
    folder = finish(plan.find("merge/ties"), plan)
    (folder / "record.json").write_text("{")
    assert why()["merge/ties"] == ("blocked", ("damaged: record.json cannot be read",))
    assert why("merges.ties.parameters.density=0.7")["merge/ties"] == ("blocked", ("not made yet",))


def test_a_step_whose_record_was_taken_away_is_to_run(planned, finish, why):
    plan = planned()
    folder = finish(plan.find("merge/ties"), plan)
    (folder / "record.json").unlink()
    assert why()["merge/ties"] == ("blocked", ("not made yet",))


def entry_of(study, plan, title, events=None):
    entries = explain(plan, History(Store(study.out), events))
    return next(entry for entry in entries if entry.step.title == title)


def test_an_input_that_is_not_there_blocks_and_is_named(study, planned, finish):
    plan = planned()
    assert [str(b) for b in entry_of(study, plan, "merge/ties").blocked_by] == [
        "train/general",
        "train/mix",
        "base/base",
    ]
    finish(plan.find("base/base"), plan)
    finish(plan.find("train/mix"), plan)
    entry = entry_of(study, plan, "merge/ties")
    assert (entry.state, [str(blocker) for blocker in entry.blocked_by]) == ("blocked", ["train/general"])
    finish(plan.find("train/general"), plan)
    entry = entry_of(study, plan, "merge/ties")
    assert (entry.state, entry.blocked_by) == ("to run", ())


def test_a_changed_step_says_as_well_what_it_waits_for(study, planned, finish):
    plan = planned()
    for step in plan.steps:
        finish(step, plan)
    other = planned("merges.ties.parameters.density=0.7", "training.epochs=2")
    entry = entry_of(study, other, "merge/ties")
    assert entry.state == "changed"
    assert "config.parameters.density: 0.5 -> 0.7" in entry.why
    assert {blocker.step.title for blocker in entry.blocked_by} == {"train/general", "train/mix"}
    assert entry_of(study, other, "generate/ties.general").state == "blocked"
    assert entry_of(study, other, "mixture/mix").state == "done"


def test_a_failure_is_told_of_the_step_and_of_all_that_waits_for_it(study, planned, finish):
    plan = planned()
    finish(plan.find("base/base"), plan)
    failed, events = plan.find("train/mix"), study.folder / "events.jsonl"
    events.write_text(json.dumps({"event": "failed", "step": failed.id, "error": "no memory"}) + "\n")
    entry = entry_of(study, plan, "train/mix", events)
    assert entry.why[0] == "failed last time: no memory"
    assert (entry.state, entry.failed) == ("blocked", "no memory"), "its mixture is not there either"
    for title in ("merge/ties", "generate/ties.general", "judge/ties.general.language", "score/tiny"):
        first = entry_of(study, plan, title, events).blocked_by[0]
        assert (first.step, first.error) == (failed, "no memory")
    assert str(first) == "train/mix, which failed: no memory"
    assert all(b.error is None for b in entry_of(study, plan, "generate/general.general", events).blocked_by)
    told = entry_of(study, plan, "merge/ties", events).to_json()
    assert told["blocked_by"][0] == {"id": failed.id, "title": "train/mix", "failed": "no memory"}
    assert told["state"] == "blocked"
    finish(failed, plan)
    assert entry_of(study, plan, "train/mix", events).state == "done"
    assert all(b.error is None for b in entry_of(study, plan, "merge/ties", events).blocked_by)
