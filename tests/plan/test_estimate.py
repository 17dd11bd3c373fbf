"""What steps to run will take: learnt from records of the same kind of machine, rough elsewhere, named where unknown."""

from __future__ import annotations

import json
import math
import platform
from dataclasses import replace

import pytest

from mixmerge.machine import Machine
from mixmerge.plan.estimate import estimate, free_bytes, total
from mixmerge.plan.graph import REVISIONS
from mixmerge.run.history import History
from mixmerge.run.record import sealed
from mixmerge.run.store import Store

HERE = Machine("x86_64", 2)
PARAMETERS, WEIGHTS = 1000, 4000
MEASURED = {
    "base": {"parameters": PARAMETERS},
    "mixture": {"rows": 8, "tokens": 400},
    "train": {"rows": 8, "tokens": 400},
    "merge": {"parameters": PARAMETERS},
}
JUDGE = {
    "url": "http://localhost:9/v1",
    "model": "m",
    "asks": ["quality", "harm"],
    "known_as": "gpt",
    "budget": {"requests": 1000, "price_in": 2.0, "price_out": 10.0},
}


def judged(**changes) -> str:
    return "judges.endpoints.gpt=" + json.dumps(JUDGE | changes)


@pytest.fixture
def made(study):
    """Put a step into the store as if it had been carried out on a machine, in so many seconds."""

    def made(plan, title, seconds, *, on=HERE, host=None, measured=None, written=WEIGHTS):
        step, store = plan.find(title), Store(study.out)
        if (earlier := store.find(step.id)) is not None:
            store.remove(earlier)
        name = "model.safetensors" if step.kind in ("base", "train", "merge") else "rows.jsonl"
        (store.begin(step).out / name).write_bytes(bytes(written))
        record = {
            "id": step.id,
            "kind": step.kind,
            "name": step.name,
            "revision": REVISIONS[step.kind],
            "what": dict(step.what),
            "inputs": {role: {"id": i, "name": plan.by_id[i].name} for role, i in step.inputs.items()},
            "how": dict(step.how),
            "measurements": MEASURED.get(step.kind, {}) if measured is None else measured,
            "files": {name: written},
            "provenance": {
                "host": host or platform.node(),
                "processor": on.processor,
                "cores": on.cores,
                "gpus": list(on.gpus),
                "seconds": seconds,
            },
        }
        return store.commit(step, record)

    return made


@pytest.fixture
def told(study):
    """Title -> estimate of every step of a plan that is not done."""

    def told(plan, on=HERE):
        history = History(Store(study.out))
        left = [step for step in plan.steps if history.find(step.id) is None]
        return {plan.by_id[i].title: found for i, found in estimate(plan, left, history, on).items()}

    return told


def test_without_any_record_all_is_rough_and_nothing_is_nought(planned, told):
    plan = planned()
    found = told(plan)
    assert set(found) == {step.title for step in plan.steps}
    for title, one in found.items():
        assert one.seconds.source.startswith("rough, from "), title
        assert 0 < one.seconds.low < one.seconds.value < one.seconds.high
        assert one.disk_bytes.value > 0
        assert (one.unknown, one.gpus, one.requests, one.money) == ({}, 0, None, None)
    assert found["train/mix"].seconds.source == "rough, from the model's size by the base's files"
    assert found["mixture/mix"].seconds.source == "rough, from its budget"


def test_a_training_is_scaled_from_those_that_were_done_here(planned, made, told):
    plan = planned()
    made(plan, "base/base", 1.0)
    for name, seconds in (("general", 100.0), ("mix", 120.0)):
        made(plan, f"mixture/{name}", 1.0)
        made(plan, f"train/{name}", seconds, measured={"rows": 8, "tokens": 400, "seconds": seconds - 10})
    again = told(planned("training.learning_rate=0.01", "training.epochs=3"))["train/mix"]
    assert again.seconds.source == "2 earlier trainings here"
    assert again.seconds.value == pytest.approx(10 + 3 * 100), "loading is done once, however long it learns"
    assert 110 < again.seconds.low < 280, "no more than ten seconds were its start"
    assert again.seconds.high >= 3 * 120, "or none"
    assert (again.disk_bytes.value, again.disk_bytes.source) == (WEIGHTS, "2 earlier trainings")


def test_records_of_another_kind_of_machine_tell_no_time_but_the_disk(planned, made, told):
    plan = planned()
    made(plan, "base/base", 1.0)
    for other in (Machine("x86_64", 64), Machine("aarch64", 2), Machine("x86_64", 2, ("NVIDIA H200",))):
        made(plan, "train/general", 100.0, on=other, written=7777)
        found = told(planned("training.learning_rate=0.01"))["train/general"]
        assert found.seconds.source.startswith("rough"), other
        assert (found.disk_bytes.value, found.disk_bytes.source) == (7777, "1 earlier training")
    found = told(planned("training.learning_rate=0.01"), on=Machine("x86_64", 2, ("NVIDIA H200",)))["train/general"]
    assert found.seconds.source == "1 earlier training here"
    assert found.gpus == 1


def test_a_source_names_the_machines_of_this_kind_that_its_records_were_made_on(planned, made, told):
    plan = planned()
    made(plan, "base/base", 1.0)
    made(plan, "merge/ties", 8.0, host="node7")
    changed = planned("merges.ties.parameters.density=0.7")
    assert told(changed)["merge/ties"].seconds.source == "1 earlier merge on a machine of this kind (node7)"
    made(changed, "merge/ties", 8.0)
    again = told(planned("merges.ties.parameters.density=0.2"))["merge/ties"]
    assert again.seconds.source == "2 earlier merges here and on a machine of this kind (node7)"


def test_a_record_without_its_processor_tells_no_time(planned, made, told):
    plan = planned()
    made(plan, "base/base", 1.0)
    folder = made(plan, "merge/ties", 8.0)
    record = json.loads((folder / "record.json").read_text())
    record["provenance"]["machine"] = record["provenance"].pop("processor")
    (folder / "record.json").write_text(json.dumps(record))
    changed = planned("merges.ties.parameters.density=0.7")
    assert told(changed)["merge/ties"].seconds.source.startswith("rough")


def test_a_record_that_changed_since_it_was_written_tells_nothing(planned, made, told):
    plan = planned()
    made(plan, "base/base", 1.0)
    folder = made(plan, "merge/ties", 8.0)
    record = json.loads((folder / "record.json").read_text())
    changed = planned("merges.ties.parameters.density=0.7")
    (folder / "record.json").write_text(json.dumps(sealed(record)))
    assert told(changed)["merge/ties"].seconds.value == 8.0
    record = sealed(record)
    record["provenance"]["seconds"] = 9000.0
    (folder / "record.json").write_text(json.dumps(record))
    found = told(changed)["merge/ties"]
    assert found.seconds.source.startswith("rough")
    assert found.disk_bytes.source.startswith("rough")


def test_another_method_tells_less_and_its_range_is_wider(planned, made, told):
    plan = planned()
    made(plan, "base/base", 1.0)
    made(plan, "merge/ties", 8.0)
    found = told(planned("merges.ties.method=linear", "merges.ties.parameters={}"))["merge/ties"]
    assert found.seconds.source == "1 earlier merge here with other settings"
    assert found.seconds.high / found.seconds.value > 2.5
    same = told(planned("merges.ties.parameters.density=0.7"))["merge/ties"]
    assert (same.seconds.value, same.seconds.source) == (8.0, "1 earlier merge here")
    assert same.seconds.high < found.seconds.high


def test_a_trial_of_a_few_rows_does_not_tell_hours_for_many(planned, made, told):
    plan = planned()
    made(plan, "base/base", 1.0)
    made(plan, "mixture/general", 0.8)
    made(plan, "train/general", 12.0, measured={"rows": 8, "tokens": 400, "seconds": 1.0})
    made(plan, "merge/ties", 16.6)
    found = told(planned("budget.rows=800", "training.max_repeats=200", "merges.ties.parameters.density=0.7"))
    train, merge, mixture = (found[title].seconds for title in ("train/general", "merge/ties", "mixture/general"))
    assert train.value == pytest.approx(11 + 100), "only what it measured of learning grows"
    assert train.low < 50
    assert train.high > 12 * 100, "checkpoints and the like may grow as well"
    assert merge.low < 0.9, "the first one loads and compiles what the next one finds there"
    assert mixture.low < 0.8 < 1.5 < mixture.high


def test_several_records_of_the_same_work_need_no_rough_rates_beside_them(planned, made, told):
    plan = planned()
    made(plan, "base/base", 1.0)
    for title in ("base.general", "base.harmful", "general.general"):
        if title == "general.general":
            made(plan, "train/general", 9.0)
        made(plan, f"generate/{title}", 60.0, measured={"rows": 6})
    found = told(plan)["generate/ties.general"].seconds
    assert (found.low, found.value, found.high) == (pytest.approx(60), pytest.approx(60), pytest.approx(60))


def test_a_budget_in_rows_is_read_as_the_tokens_that_rows_had(planned, made, told):
    plan = planned()
    made(plan, "base/base", 1.0)
    made(plan, "mixture/general", 2.0)  # 50 tokens a row
    made(plan, "train/general", 10.0, measured={"rows": 8, "tokens": 400, "seconds": 6.0})
    found = told(planned("budget.rows=16", "training.max_repeats=4"))
    assert found["mixture/general"].seconds.value == pytest.approx(2 * 2**0.5), "its start is not known"
    assert found["train/general"].seconds.value == pytest.approx(4 + 2 * 6)
    cut = told(planned("budget.rows=16", "training.max_repeats=4", "training.max_length=25"))
    assert cut["train/general"].seconds.value == pytest.approx(10)


def test_answers_are_scaled_by_prompts_and_by_their_longest(planned, made, told):
    plan = planned()
    made(plan, "base/base", 1.0)
    made(plan, "generate/base.general", 6.4, measured={"rows": 6})
    found = told(plan)
    assert found["generate/base.harmful"].seconds.value == pytest.approx(6.4)
    assert found["generate/base.harmful"].seconds.source == "1 earlier generation here"
    longer = told(planned("evaluation.max_new_tokens=68"))
    assert longer["generate/base.harmful"].seconds.value == pytest.approx(6.4 * 2**0.5)
    assert longer["generate/base.harmful"].seconds.low < 6.4 < 12.8 < longer["generate/base.harmful"].seconds.high
    fewer = told(planned("evaluation.limit.test=1"))
    assert fewer["generate/base.harmful"].seconds.value == pytest.approx(6.4 * (2 / 3) ** 0.5)


def test_a_server_elsewhere_has_no_time_before_it_was_asked_and_is_named(planned, told):
    found = told(planned(judged()))["judge/mix.general.gpt.quality"]
    assert found.seconds is None
    assert found.unknown == {"seconds": "how fast its server is shows once it was asked"}
    assert (found.requests, found.gpus) == (12, 0)


def test_requests_tokens_and_money_are_the_judges_by_its_prices(planned, told):
    found = told(planned(judged()))
    quality, harm = found["judge/mix.general.gpt.quality"], found["judge/mix.harmful.gpt.harm"]
    assert (quality.requests, harm.requests) == (12, 6), "a pair is asked in both orders"
    assert quality.tokens_in.source == "rough, from the longest answers"
    assert quality.money.value == pytest.approx((2 * quality.tokens_in.value + 10 * quality.tokens_out.value) / 1e6)
    assert quality.money.low < quality.money.value < quality.money.high
    assert found["judge/mix.general.language"].requests is None


def test_tokens_are_learnt_from_what_the_judge_was_asked_before_on_any_machine(planned, made, told):
    plan = planned(judged())
    tally = {"server": {"answered": 4, "prompt_tokens": 400, "completion_tokens": 80}}
    made(plan, "judge/base.harmful.gpt.harm", 3.0, on=Machine("aarch64", 1), measured=tally)
    found = told(plan)["judge/mix.harmful.gpt.harm"]
    assert (found.tokens_in.value, found.tokens_out.value) == (600, 120)
    assert found.tokens_in.source == "1 earlier judging by this judge"
    assert found.money.value == pytest.approx((2 * 600 + 10 * 120) / 1e6)
    assert (found.seconds.value, found.seconds.source) == (pytest.approx(3.0), "1 earlier judging by this server")
    other = told(planned(judged(model="other")))["judge/mix.harmful.gpt.harm"]
    assert other.tokens_in.source.startswith("rough")


def test_a_judge_without_prices_is_named_and_one_that_is_started_here_costs_no_money(planned, told):
    found = told(planned(judged(budget=None)))["judge/mix.harmful.gpt.harm"]
    assert found.money is None
    assert found.unknown["money"] == "the recipe has no price_in and price_out of its judge"
    start = {"url": None, "start": "env serve {model} --port {port}", "budget": None}
    here = told(planned(judged(**start)), on=replace(HERE, gpus=("NVIDIA H200",)))["judge/mix.harmful.gpt.harm"]
    assert (here.money, here.gpus) == (None, 1)
    assert set(here.unknown) == {"seconds"}


def test_a_base_that_nothing_tells_of_leaves_its_steps_named_and_not_at_nought(planned, told, monkeypatch):
    monkeypatch.setattr("mixmerge.plan.estimate.base_size", lambda plan, record: None)
    plan = planned()
    found = told(plan)
    for title in ("base/base", "train/mix", "merge/ties", "generate/mix.general"):
        assert found[title].seconds is None
        assert found[title].unknown["seconds"] == "the size of the base is not known yet"
    assert found["train/mix"].disk_bytes is None
    whole = total(plan, {plan.find(title).id: one for title, one in found.items()})
    assert "train/mix" in whole.unknown["seconds"]["the size of the base is not known yet"]
    assert "merge/ties" in whole.unknown["disk_bytes"]["the size of the base is not known yet"]


def test_a_record_of_an_earlier_mixmerge_with_other_fields_is_passed_over(planned, made, told):
    plan = planned()
    made(plan, "base/base", 1.0)
    folder = made(plan, "generate/base.general", 3.0)
    record = json.loads((folder / "record.json").read_text())
    record["what"], record["how"] = {}, {}
    (folder / "record.json").write_text(json.dumps(record))
    assert told(plan)["generate/mix.general"].seconds.source.startswith("rough")


def test_the_total_is_the_sum_and_the_longest_chain_is_at_most_that(planned, told):
    plan = planned(judged())
    found = {plan.find(title).id: one for title, one in told(plan).items()}
    whole = total(plan, found)
    assert whole.seconds.value == pytest.approx(sum(one.seconds.value for one in found.values() if one.seconds))
    assert whole.seconds.low < whole.seconds.value < whole.seconds.high
    chain = ["base/base", "mixture/mix", "train/mix", "merge/ties", "generate/ties.general"]
    assert sum(found[plan.find(title).id].seconds.value for title in chain) <= whole.longest < whole.seconds.value
    assert whole.requests == sum(one.requests or 0 for one in found.values())
    assert whole.money.value == pytest.approx(math.fsum(one.money.value for one in found.values() if one.money))
    assert sum(count for count, _ in whole.sources.values()) == sum(one.seconds is not None for one in found.values())
    slow = whole.unknown["seconds"]["how fast its server is shows once it was asked"]
    assert slow == [plan.by_id[i].title for i, one in found.items() if one.seconds is None]
    assert json.loads(json.dumps(whole.to_json()))["requests"] == whole.requests


def test_gpu_time_is_counted_for_each_gpu_of_a_step(planned, told):
    plan = planned("how.processes=2", "how.device=cuda")
    found = told(plan)
    assert (found["train/mix"].gpus, found["generate/mix.general"].gpus, found["merge/ties"].gpus) == (2, 1, 0)
    whole = total(plan, {plan.find(title).id: one for title, one in found.items()})
    expected = sum(one.seconds.value * one.gpus for one in found.values())
    assert whole.gpu_seconds.value == pytest.approx(expected)


def test_processes_that_are_to_be_started_take_time_beside_their_steps(planned, told):
    plan = planned()
    found = {plan.find(title).id: one for title, one in told(plan).items()}
    cores, gpus = total(plan, found, HERE), total(plan, found, replace(HERE, gpus=("NVIDIA H200",)))
    groups = {step.group or step.id for step in plan.steps}
    assert cores.processes == gpus.processes == len(groups) < len(plan.steps), "steps of a group share one"
    assert cores.starting.value < gpus.starting.value, "forks have the libraries already, where there is no GPU"
    assert cores.starting.low < cores.starting.value < cores.starting.high
    assert cores.seconds == gpus.seconds
    assert total(plan, {}, HERE).starting.value == 0


def test_nothing_left_is_nothing_to_wait_for(planned):
    whole = total(planned(), {})
    assert (whole.seconds.value, whole.longest, whole.money, dict(whole.unknown)) == (0, 0.0, None, {})


def test_free_disk_is_that_of_the_nearest_folder_that_is_there(tmp_path):
    assert free_bytes(tmp_path / "not" / "yet") > 0


@pytest.mark.parametrize("part", [{"resumed": 3}, {"tensors_resumed": 1}, {"server": {"answered": 0}}])
def test_seconds_of_a_part_of_the_work_tell_nothing(planned, made, told, part):
    plan = planned()
    made(plan, "base/base", 1.0)
    made(plan, "generate/base.general", 0.1, measured={"rows": 6} | part)
    assert told(plan)["generate/mix.general"].seconds.source.startswith("rough")
    made(plan, "generate/base.harmful", 5.0, measured={"rows": 6, "resumed": 0})
    assert told(plan)["generate/mix.general"].seconds.source == "1 earlier generation here"


def test_a_training_that_was_killed_and_carried_on_tells_what_all_of_it_took(planned, made, told):
    plan = planned()
    made(plan, "base/base", 1.0)
    made(plan, "mixture/general", 2.0)
    measured = {"rows": 8, "tokens": 400, "seconds": 100.0, "steps_resumed": 3, "seconds_resumed": 75.0}
    made(plan, "train/general", 35.0, measured=measured)  # 10 to start again, and the last step
    found = told(plan)["train/mix"].seconds
    assert (found.value, found.source) == (pytest.approx(110), "1 earlier training here")
    twice = told(planned("budget.rows=16", "training.max_repeats=4"))["train/general"].seconds
    assert twice.value == pytest.approx(10 + 2 * 100)


def test_steps_of_equal_work_have_equal_estimates_and_others_their_own(planned, made, told):
    plan = planned()
    made(plan, "base/base", 1.0)
    made(plan, "judge/base.general.language", 2.0, measured={"right": 6}, written=600)
    found = told(plan)
    language = {title: one for title, one in found.items() if title.endswith(".language")}
    assert {one.seconds.value for one in language.values()} == {2.0}
    assert {one.disk_bytes.value for one in language.values()} == {600}
    assert found["judge/mix.harmful.refusal"].seconds.source.startswith("rough")
