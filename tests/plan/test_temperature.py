"""Languages by temperature, from recipe to the cells of a mixture."""

from __future__ import annotations

import json

import pytest

from mixmerge.errors import RecipeError

HOT = "baselines={mix: {mixture: {general: 1, safety: 3}, temperature: 2}}"


def cells(plan, name="mix"):
    mixture = plan.by_id[plan.by_id[plan.models[name]].inputs["mixture"]]
    return {(cell["objective"], cell["lang"]): cell["share"] for cell in mixture.what["cells"]}


@pytest.fixture
def uneven(study):
    """The tiny study with 2 of 8 general rows in French."""
    file = study.folder / "data/general.fr.jsonl"
    file.write_text("\n".join(file.read_text().splitlines()[:2]) + "\n")
    return study


def test_each_objective_is_shared_by_its_own_rows(uneven, planned):
    found = cells(planned(HOT))
    assert found == {
        ("general", "en"): pytest.approx(0.25 * 2 / 3),
        ("general", "fr"): pytest.approx(0.25 * 1 / 3),
        ("safety", "en"): 0.375,
        ("safety", "fr"): 0.375,
    }


def test_the_temperature_is_in_the_identity_as_the_shares_that_it_comes_to(study, planned):
    ids = [planned(HOT.replace("temperature: 2", f"temperature: {t}")).find("mixture/mix").id for t in (1, 2, 7.5)]
    assert len(set(ids)) == 1, "as many rows in every language: equal shares at any temperature"
    assert ids[0] == planned("baselines={mix: {mixture: {general: 1, safety: 3}}}").find("mixture/mix").id


def test_rows_that_are_dropped_do_not_count(uneven, planned):
    prompt = json.loads((uneven.folder / "prompts/general.en.jsonl").read_text().splitlines()[0])["prompt"]
    with (uneven.folder / "data/general.fr.jsonl").open("a") as file:
        for index in range(40):
            file.write(json.dumps({"id": f"x{index}", "prompt": prompt, "completion": "No."}) + "\n")
    judge = "judges={refusal: {answers: 'starter:train/general.{lang}.jsonl', refusals: 'starter:train/safety.{lang}.jsonl'}}"
    found = cells(planned(HOT, "evaluation.overlap=drop", judge))
    assert found["general", "en"] == pytest.approx(2 * found["general", "fr"])


def test_a_language_without_rows_of_an_objective_gets_none_of_it(study, planned):
    study.edit('"data/safety.{lang}.jsonl"}\nbudget', '"data/safety.{lang}.jsonl", languages: [en]}\nbudget')
    assert ("safety", "fr") not in cells(planned(HOT))
    with pytest.raises(RecipeError, match="no 'safety' row in 'fr'"):
        planned()
    with pytest.raises(RecipeError, match=r"mix\.mixture\.safety: no 'safety' row in any of its languages; add data"):
        planned("baselines={mix: {mixture: {general: 1, safety: 3}, temperature: 2, languages: [fr]}}")


def test_weights_of_languages_multiply_with_the_temperature(uneven, planned):
    found = cells(planned("baselines={mix: {mixture: general, languages: {en: 1, fr: 2}, temperature: 2}}"))
    assert found == {("general", "en"): 0.5, ("general", "fr"): 0.5}


def test_a_temperature_can_be_swept(uneven, planned):
    plan = planned("baselines={'mix-{temperature}': {mixture: general, temperature: {sweep: [1, 2]}}}", "merges={}")
    assert cells(plan, "mix-1")["general", "fr"] == pytest.approx(0.2)
    assert cells(plan, "mix-2")["general", "fr"] == pytest.approx(1 / 3)


@pytest.mark.parametrize("value", ["0.5", "0", "-1", ".inf", "hot"])
def test_a_temperature_below_one_is_refused(planned, value):
    with pytest.raises(RecipeError, match=r"--set: baselines\.mix\.temperature: Input should be"):
        planned(f"baselines={{mix: {{mixture: general, temperature: {value}}}}}")
