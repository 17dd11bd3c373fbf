"""The lines on the whole: what is not known is said beside the sum that lacks it, and is never nought."""

from __future__ import annotations

import json
import re

import pytest

from mixmerge.cli.planning import total_lines
from mixmerge.machine import Machine
from mixmerge.plan.estimate import estimate, total
from mixmerge.run.history import History
from mixmerge.run.store import Store

HERE = Machine("x86_64", 2)
EIGHT = Machine("x86_64", 64, ("NVIDIA H100",) * 8)
JUDGE = {"url": "http://localhost:9/v1", "model": "m", "asks": ["quality", "harm"], "known_as": "gpt"}
PRICES = {"requests": 1000, "price_in": 2.0, "price_out": 10.0}


@pytest.fixture
def whole(study, planned):
    """The total of all steps of the tiny study with some overrides, on a machine."""

    def whole(*overrides, on=HERE):
        plan = planned(*overrides)
        return total(plan, estimate(plan, plan.steps, History(Store(study.out)), on), on)

    return whole


@pytest.fixture
def unknown_base(monkeypatch):
    monkeypatch.setattr("mixmerge.plan.estimate.base_size", lambda plan, record: None)


def lines(found, free=10**12) -> dict[str, str]:
    """First word or words -> line."""
    return {line.partition(":")[0]: line for line in total_lines(found, free)}


def judges(**changes) -> str:
    return "judges.endpoints.gpt=" + json.dumps(JUDGE | changes)


def test_gpu_hours_of_steps_that_nothing_tells_are_not_nought(whole, unknown_base):
    found = whole(on=EIGHT)
    steps = found.missing["gpu_seconds"]
    assert steps == 2 + 8, "trainings and generations"
    assert lines(found)["GPU hours"] == f"GPU hours: not known of {steps} steps"


def test_time_and_disk_without_a_part_are_at_least_so_much(whole, unknown_base):
    found = whole(on=EIGHT)
    told = lines(found)
    time, disk = found.missing["seconds"], found.missing["disk_bytes"]
    assert told["time left"].startswith("time left: at least ")
    assert f"one step after another, {time} steps unknown, " in told["time left"]
    assert re.fullmatch(rf"disk: at least [\d.]+ kB, {disk} steps unknown, .* are free", told["disk"])
    assert len([line for line in total_lines(found, None) if line.startswith("not estimated")]) >= 2


def test_gpu_hours_of_which_some_are_known_say_how_many_are_not(whole):
    start = judges(url=None, start="env serve {model} --port {port}")
    found = whole(start, on=EIGHT)
    steps = found.missing["gpu_seconds"]
    assert steps > 0
    assert re.fullmatch(
        rf"GPU hours: at least [\d.e-]+ \([\d.e-]+ to [\d.e-]+\), {steps} steps unknown", lines(found)["GPU hours"]
    )


def test_a_whole_that_is_known_says_about_and_of_no_unknown_step(whole):
    found = whole()
    told = lines(found)
    assert found.missing == {}
    assert told["time left"].startswith("time left: about ")
    assert told["GPU hours"] == "GPU hours: 0, no GPU is used"
    assert told["disk"].startswith("disk: about ")
    assert not any("unknown" in line or "at least " in line.partition(",")[0] for line in told.values())
    assert not {"judges", "money"} & set(told)
    assert re.search(r", \d+ s more to start \d+ processes, ", told["time left"])


def test_money_is_told_with_its_range_and_when_less_is_spent(whole):
    told = lines(whole(judges(budget=PRICES)))
    assert re.fullmatch(
        r"money: about [\d.]+ \([\d.]+ to [\d.]+\), by the recipe's prices where no answer is there already",
        told["money"],
    )
    assert "up to about" not in told["money"]


def test_money_without_prices_is_not_known(whole):
    found = whole(judges(budget=None))
    assert lines(found)["money"] == f"money: not known of {found.missing['money']} steps"
    assert found.missing["money"] > 0


def test_money_of_judges_with_and_without_prices_is_at_least_that_of_the_ones(whole):
    both = {"gpt": JUDGE | {"budget": PRICES}, "other": JUDGE | {"known_as": "other", "asks": ["harm"]}}
    found = whole("judges.endpoints=" + json.dumps(both))
    steps = found.missing["money"]
    assert re.match(rf"money: at least [\d.]+ \([\d.]+ to [\d.]+\), {steps} steps unknown, by ", lines(found)["money"])


def test_nothing_left_has_no_lines(planned):
    assert list(total_lines(total(planned(), {}, HERE), 1)) == []


def test_sources_of_a_sum_are_parted_so_that_each_can_be_read(whole):
    found = whole()
    parts = found.seconds.source.split("; ")
    assert "rough, from the model's size by the base's files" in parts
    assert len(parts) <= 4
    assert re.fullmatch(r"\d+ more", parts[-1]) or len(parts) < 4
    assert whole(judges(budget=PRICES)).money.source == "rough, from the longest answers"


def test_the_json_of_the_total_has_the_counts_of_unknown_steps(whole, unknown_base):
    told = json.loads(json.dumps(whole(on=EIGHT).to_json()))
    assert told["missing"]["seconds"] >= told["missing"]["gpu_seconds"] > 0
    assert told["gpu_seconds"]["value"] == 0
