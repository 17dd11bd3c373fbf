"""What a plan does about training rows that are also prompts: refuse, drop and count, or ignore."""

from __future__ import annotations

import json

import pytest

from mixmerge.errors import DataError, RecipeError
from mixmerge.plan.graph import Plan

DROP = "evaluation.overlap=drop"
NEAR = "Here is question number 1: What colour has the grass"  # a prompt without its question mark


def add_row(study, name, **row):
    with (study.folder / f"data/{name}.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(row, ensure_ascii=False) + "\n")


@pytest.fixture
def overlapped(study):
    """The tiny study with an exact and a near duplicate among its general rows, which the judge reads as well."""
    prompts = [json.loads(line) for line in (study.folder / "prompts/harmful.fr.jsonl").read_text().splitlines()]
    add_row(study, "general.fr", id="twin", prompt=prompts[0]["prompt"].upper(), completion="Non.")
    add_row(study, "general.en", id="near", prompt=NEAR + "es", completion="Green.")
    add_row(study, "general.en", id="nearer", prompt=NEAR + " s", completion="It is.")
    study.edit("evaluation:\n", "evaluation:\n  overlap: {near: 0.7}\n")
    return study


def mixtures(plan: Plan) -> dict[str, str]:
    return {step.name: step.id for step in plan.steps if step.kind == "mixture"}


def test_a_refusal_names_the_first_row_and_counts_all_by_kind_and_language(overlapped, planned):
    with pytest.raises(DataError) as caught:
        planned()
    text = str(caught.value).replace(f"{overlapped.folder}/", "")
    assert text.startswith(
        "recipe.yaml:5: data.general: 3 training row(s) are also prompts: 1 exact (fr 1), 2 near (en 2); first row 'en/near' "
        "(near, general.en.jsonl:9): 'Here is question number 1: What colour has the grass?'; take them out of one side"
    )


def test_dropped_rows_are_counted_and_enter_the_mixtures_that_lose_them(overlapped, planned):
    plan = planned("evaluation.overlap={action: drop, near: 0.7}")
    counts = {"exact": {"fr": 1}, "near": {"en": 2}}
    assert plan.dropped == {"general": counts, "judges.refusal.answers": counts}
    for name in ("general", "mix"):
        step = plan.find(f"mixture/{name}")
        assert step.what["dropped"]["counts"] == counts
        assert step.how["dropped"] == {"general": ["en/near", "en/nearer", "fr/twin"]}
    assert Plan.from_json(json.loads(json.dumps(plan.to_json()))).dropped == plan.dropped


def test_a_mixture_in_another_language_or_of_another_objective_keeps_its_identity(overlapped, planned):
    overlapped.edit("experts:\n", "experts:\n  fr: {mixture: general, languages: [fr]}\n  safe: {mixture: safety}\n")
    exact = mixtures(planned("evaluation.overlap={action: drop, near: null}"))
    near = mixtures(planned("evaluation.overlap={action: drop, near: 0.7}"))
    ignored = mixtures(planned("evaluation.overlap=ignore", "judges={}"))
    assert {name for name in near if near[name] != exact[name]} == {"general", "mix"}
    assert {name for name in near if exact[name] != ignored[name]} == {"general", "mix", "fr"}


def test_where_nothing_overlaps_dropping_changes_no_identity(planned):
    before, after = planned(), planned(DROP)
    assert [step.id for step in before.steps] == [step.id for step in after.steps]
    assert after.dropped == {}


def test_the_judges_rows_are_dropped_too_and_enter_its_identity(overlapped, planned):
    plan = planned("evaluation.overlap={action: drop, near: 0.7}")
    assert plan.find("fit-judge/refusal").what["dropped"] == {
        "answers": ["en/near", "en/nearer", "fr/twin"],
        "refusals": [],
    }
    assert "dropped" not in planned("judges={}", "evaluation.overlap=ignore").find("fit-judge/refusal").what


def test_the_judges_rows_are_refused_where_only_they_overlap(study, planned):
    path = study.folder / "data/answers.en.jsonl"
    path.write_text((study.folder / "data/general.en.jsonl").read_text())
    add_row(study, "answers.en", id="near", prompt=NEAR + "s?", completion="Green.")
    other = study.folder / "data/answers.fr.jsonl"
    other.write_text((study.folder / "data/general.fr.jsonl").read_text())
    study.edit('answers: "data/general.{lang}.jsonl"', 'answers: "data/answers.{lang}.jsonl"')
    with pytest.raises(
        DataError, match=r"judges\.refusal\.answers: 1 row\(s\) of the judge are also prompts: 1 near \(en 1\)"
    ):
        planned()
    assert planned("evaluation.overlap={near: null}").steps
    assert planned(DROP).dropped == {"judges.refusal.answers": {"near": {"en": 1}}}


def test_dropping_all_rows_of_a_cell_is_an_empty_cell(study, planned):
    file = study.folder / "data/safety.fr.jsonl"
    prompt = json.loads((study.folder / "prompts/general.en.jsonl").read_text().splitlines()[0])["prompt"]
    rows = [json.loads(line) | {"prompt": prompt} for line in file.read_text().splitlines()]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    study.edit('refusals: "data/safety.{lang}.jsonl"', 'refusals: "starter:train/safety.{lang}.jsonl"')
    with pytest.raises(RecipeError, match="no 'safety' row in 'fr'"):
        planned(DROP)


def test_rows_with_a_prompts_id_are_dropped_where_the_recipe_says_they_are_parallel(study, planned):
    add_row(study, "general.fr", id="p1", prompt="Quelque chose de tout à fait autre ?", completion="Oui.")
    assert planned(DROP).dropped == {}
    plan = planned("evaluation.overlap={action: drop, parallel: {general: [general, harmful]}}")
    assert plan.dropped == {"general": {"parallel": {"fr": 1}}}
    assert planned("evaluation.overlap={action: drop, parallel: {general: [harmful]}}").dropped == {}
    with pytest.raises(DataError, match=r"1 parallel \(fr 1\); first row 'fr/p1' \(parallel, \S+:\d+\)"):
        planned("evaluation.overlap={parallel: {general: [general]}}")


@pytest.mark.parametrize(
    ("overlap", "error"),
    [
        (
            "{parallel: {genral: [general]}}",
            "overlap.parallel.genral: unknown data set 'genral'; did you mean 'general'?",
        ),
        (
            "{parallel: {general: [harmles]}}",
            "overlap.parallel.general.0: unknown prompt set 'harmles'; did you mean 'harmful'?",
        ),
        ("{near: 0}", "overlap.near: Input should be greater than 0"),
        ("{near: 80}", "overlap.near: Input should be less than or equal to 1 (given: 80); for 80 percent write 0.8"),
        ("drp", "overlap.action: Input should be 'refuse', 'drop' or 'ignore' (given: 'drp')"),
        ("{nearr: 1}", "overlap.nearr: unknown key 'nearr'; did you mean 'near'?"),
    ],
)
def test_a_mistake_about_overlaps_is_one_line(planned, overlap, error):
    with pytest.raises(RecipeError) as caught:
        planned(f"evaluation.overlap={overlap}")
    assert f"--set: evaluation.{error}" in str(caught.value)


def test_check_says_what_was_left_out(mixmerge, overlapped):
    arguments = ("check", overlapped.recipe, "--set", "evaluation.overlap={action: drop, near: 0.7}")
    status, out, _ = mixmerge(*arguments)
    assert status == 0
    assert "\ngeneral: rows left out because they are also prompts: 1 exact (fr 1), 2 near (en 2)\n" in out
    found = json.loads(mixmerge(*arguments, "--json")[1])
    assert found["dropped"]["general"] == {"exact": {"fr": 1}, "near": {"en": 2}}
