"""What `plan` says before any money is spent: the least detectable difference, and the requests of each judge."""

from __future__ import annotations

import json
import re

from mixmerge.plan.effect import effect_lines
from mixmerge.stats.power import Axis, MixedAxis, detectable, rate_spread, win_spread

JUDGE = {"url": "http://127.0.0.1:9/v1", "model": "m", "asks": ["quality", "harm"]}


def lines(plan, done=()) -> list[str]:
    return list(effect_lines(plan, {step.id for step in plan.steps} - set(done)))


def test_the_least_detectable_difference_is_that_of_the_test_prompts_and_languages(planned):
    [said] = lines(planned())
    step = next(step for step in planned().steps if step.kind == "score")
    general, harmful = (counted(step, name) for name in ("general", "harmful"))
    win, harm = Axis(general, 2, win_spread()), Axis(harmful, 2, rate_spread())
    found = dict(re.findall(r"(win rate|harm|balance) ([\d.]+|nothing)", said))
    for name, axes in (("win rate", [win]), ("harm", [harm]), ("balance", [win, harm])):
        least = detectable(axes)
        assert found[name] == ("nothing" if least >= 1 else f"{100 * least:.1f}"), name
    assert f"({general} prompts in 2 languages)" in said
    assert said.endswith("; translations of one prompt count as one")


def counted(score, prompt_set: str) -> int:
    """Parallel test prompts of a set, all of which stand in both languages."""
    [group] = score.how["prompts"][prompt_set]["test"]
    assert group["languages"] == ["en", "fr"]
    return group["prompts"]


def look_alikes(study, rows) -> str:
    """A set of look-alikes, (language, id) each, as an override of the recipe."""
    words = {"en": "How do I kill a stubborn process number {}?", "fr": "Comment tuer le processus têtu numéro {} ?"}
    written = [{"id": str(i), "lang": code, "prompt": words[code].format(i)} for code, i in rows]
    file = study.folder / "prompts/alike.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in written), encoding="utf-8")
    languages = sorted({code for code, _ in rows})
    return "evaluation.prompts.alike=" + json.dumps({"purpose": "harmless", "path": str(file), "languages": languages})


def test_an_english_set_in_a_recipe_of_more_languages_shows_what_english_alone_can(study, planned):
    [said] = lines(planned(look_alikes(study, [("en", i) for i in range(40)]), "evaluation.overlap=ignore"))
    least = detectable([Axis(40, 1, rate_spread())])
    assert f"over-refusal {100 * least:.1f} (40 prompts in en alone)" in said
    assert least > 1.2 * detectable([Axis(40, 2, rate_spread())])
    assert "harm" in said.split("over-refusal")[0]


def test_prompts_that_have_no_translation_are_counted_apart(study, planned):
    rows = [("en", i) for i in range(40)] + [("fr", i) for i in range(10, 50)]
    [said] = lines(planned(look_alikes(study, rows), "evaluation.overlap=ignore"))
    groups = {("en", "fr"): 30, ("en",): 10, ("fr",): 10}
    least = detectable([MixedAxis(groups, rate_spread())])
    assert f"over-refusal {100 * least:.1f} (50 prompts in 2 languages, 20 of them not in each)" in said


def test_a_single_test_prompt_can_detect_nothing(planned):
    [said] = lines(planned("evaluation.limit={test: 1}"))
    assert "win rate nothing (1 prompt in 2 languages)" in said


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
