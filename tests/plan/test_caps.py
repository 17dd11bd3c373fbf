"""Caps and repeats of parts of a mixture, from recipe to the mixture's step."""

from __future__ import annotations

import pytest

from mixmerge.errors import RecipeError


def mix(text):
    return f"baselines={{mix: {{mixture: {{general: 1, safety: 1}}, {text}}}}}"


def what(plan):
    return plan.find("mixture/mix").what


def test_a_cap_holds_a_language_back_and_the_step_says_from_what(planned):
    found = what(planned(mix("languages: {en: 3, fr: 1}, caps: {en: 0.5}")))
    shares = {f"{cell['objective']}/{cell['lang']}": cell["share"] for cell in found["cells"]}
    assert shares == pytest.approx(dict.fromkeys(["general/en", "general/fr", "safety/en", "safety/fr"], 0.25))
    assert found["capped"] == {
        "general/en": {"asked": 0.375, "share": pytest.approx(0.25)},
        "safety/en": {"asked": 0.375, "share": pytest.approx(0.25)},
    }


def test_a_cap_that_holds_nothing_back_changes_no_identity(planned):
    ids = {planned(mix(text)).models["mix"] for text in ("caps: {en: 0.5}", "caps: {general: 0.9}", "caps: {}")}
    assert ids == {planned().models["mix"]}


def test_a_cap_of_nothing_takes_the_part_out(planned):
    found = what(planned(mix("caps: {safety/fr: 0}")))
    assert [(cell["objective"], cell["lang"]) for cell in found["cells"]] == [
        ("general", "en"),
        ("general", "fr"),
        ("safety", "en"),
    ]


def test_repeats_of_a_part_let_a_small_cell_fill_a_large_share(planned):
    large = "budget: {rows: 120}, languages: {en: 1, fr: 3}"
    with pytest.raises(RecipeError, match="general/fr has 8 rows, which give 32 rows with max_repeats 4"):
        planned(mix(large))
    found = what(planned(mix(f"{large}, max_repeats: {{fr: 6}}")))
    assert found["repeats"] == {"general/fr": 6, "safety/fr": 6}
    assert found["max_repeats"] == 4


def test_repeats_of_a_part_hold_for_a_budget_in_tokens_too(planned):
    with pytest.raises(RecipeError, match=r"safety/en has 8 rows, which give at most \d+ tokens with max_repeats 1"):
        planned(mix("budget: {tokens: 4000}, max_repeats: {general: 50, safety: 1}"))
    planned(mix("budget: {tokens: 4000}, max_repeats: {general: 50, safety: 50}"))


@pytest.mark.parametrize("key", ["caps", "max_repeats"])
@pytest.mark.parametrize(
    ("parts", "error"),
    [
        (
            "{en: 1, safety: 1}",
            "{}.safety: 'en' is a language and 'safety' an objective, so a row could be under both; name",
        ),
        ("{safety: 1, safety/en: 1}", "{}.safety/en: 'safety' is an objective and 'safety/en' a cell, so a row could"),
        ("{de: 1}", "{}.de: unknown language, objective or cell 'de'; known: en, fr, general, safety"),
        ("{safety/de: 1}", "{}.safety/de: unknown language, objective or cell 'safety/de'; did you mean 'safety/en'?"),
        ("{safty: 1}", "{}.safty: unknown language, objective or cell 'safty'; did you mean 'safety'?"),
        ("{en: -1}", "{}.en: Input should be greater than or equal to"),
    ],
)
def test_parts_that_mean_nothing_are_one_line(planned, key, parts, error):
    with pytest.raises(RecipeError) as caught:
        planned(mix(f"{key}: {parts}"))
    assert f"--set: baselines.mix.{error.format(key)}" in str(caught.value)


def test_a_cap_in_percent_is_told_what_to_write(planned):
    with pytest.raises(RecipeError, match=r"less than or equal to 1 \(given: 50\); for 50 percent write 0\.5"):
        planned(mix("caps: {en: 50}"))


def test_caps_that_leave_a_part_of_the_mixture_to_nobody_are_refused(planned):
    with pytest.raises(RecipeError, match=r"baselines\.mix\.caps: the caps leave 0\.25 of the mixture to nobody"):
        planned(mix("caps: {en: 0.5, fr: 0.25}"))


def test_a_cap_can_be_swept(planned):
    plan = planned("baselines={'mix-{en}': {mixture: general, caps: {en: {sweep: [0.25, 0.1]}}}}", "merges={}")
    shares = [plan.find(f"mixture/mix-{cap}").what["cells"][0]["share"] for cap in ("0.25", "0.1")]
    assert shares == pytest.approx([0.25, 0.1])
