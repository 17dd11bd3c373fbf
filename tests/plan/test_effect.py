"""What `plan` says before any money is spent: the least detectable difference, and the requests of each judge."""

from __future__ import annotations

import json
import re

from mixmerge.plan.effect import effect_lines
from mixmerge.stats.power import Axis, detectable, rate_spread, win_spread

JUDGE = {"url": "http://127.0.0.1:9/v1", "model": "m", "asks": ["quality", "harm"]}


def lines(plan, done=()) -> list[str]:
    return list(effect_lines(plan, {step.id for step in plan.steps} - set(done)))


def test_the_least_detectable_difference_is_that_of_the_test_prompts_and_languages(planned):
    [said] = lines(planned())
    step = next(step for step in planned().steps if step.kind == "score")
    general, harmful = (step.how["prompts"][name]["test"] for name in ("general", "harmful"))
    win, harm = Axis(general, 2, win_spread()), Axis(harmful, 2, rate_spread())
    found = dict(re.findall(r"(win rate|harm|balance) ([\d.]+|nothing)", said))
    for name, axes in (("win rate", [win]), ("harm", [harm]), ("balance", [win, harm])):
        least = detectable(axes)
        assert found[name] == ("nothing" if least >= 1 else f"{100 * least:.1f}"), name
    assert "2 languages" in said


def test_a_single_test_prompt_can_detect_nothing(planned):
    [said] = lines(planned("evaluation.limit={test: 1}"))
    assert "win rate nothing (1 prompts)" in said


def test_requests_are_counted_from_the_judge_steps_that_are_left(planned):
    plan = planned("judges.endpoints.gpt=" + json.dumps(JUDGE))
    judged = [step for step in plan.steps if step.how.get("judge") == "gpt.harm"]
    asked = {line.split(":")[0]: line for line in lines(plan)[1:]}
    pairs = [step for step in plan.steps if step.how.get("judge") == "gpt.quality"]
    assert (
        f"up to {2 * sum(step.how['prompts'] for step in pairs):,} requests to m at http" in asked["judge gpt.quality"]
    )
    assert f"up to {sum(step.how['prompts'] for step in judged):,} requests" in asked["judge gpt.harm"]
    left = {line.split(":")[0] for line in lines(plan, done=[step.id for step in judged])}
    assert "judge gpt.harm" not in left


def test_a_budget_that_cannot_suffice_is_said_before_it_is_spent(planned):
    plan = planned("judges.endpoints.gpt=" + json.dumps(JUDGE | {"budget": {"requests": 3}}))
    assert all(line.endswith("; its budget is 3 requests") for line in lines(plan)[1:])
    assert not any("budget" in line for line in lines(planned("judges.endpoints.gpt=" + json.dumps(JUDGE))))
