"""`adopt` writes one line into a recipe and leaves all else as it stands."""

from __future__ import annotations

import pytest

from mixmerge.errors import RecipeError, UserError
from mixmerge.recipe.adopt import adopt_into
from mixmerge.recipe.load import load_recipe


@pytest.fixture
def poet(study):
    folder = study.folder / "experts" / "poet"
    folder.mkdir(parents=True)
    return folder


def adopted(study):
    return load_recipe(study.recipe).recipe.adopted


def test_the_first_adopted_model_makes_the_section_and_nothing_else_changes(study, poet):
    before = study.recipe.read_text()
    assert adopt_into(study.recipe, "poet", str(poet)) == ("poet: {path: ./experts/poet}", None)
    assert study.recipe.read_text().startswith(before.rstrip())
    assert adopted(study)["poet"].path == "./experts/poet"
    assert load_recipe(study.recipe).recipe.candidates()["poet"] == "expert"


def test_more_models_join_the_section_with_its_indent_and_comments(study, poet):
    study.recipe.write_text(
        study.recipe.read_text() + "adopted:  # ours\n    # from Anna\n    poet: {path: experts/poet}\n"
    )
    adopt_into(study.recipe, "second", str(poet), start="general")
    adopt_into(study.recipe, "far", "org/name", revision="v1.0")
    assert study.recipe.read_text().endswith(
        "adopted:  # ours\n"
        "    far: {hub: org/name, revision: v1.0}\n"
        "    second: {path: ./experts/poet, start: general}\n"
        "    # from Anna\n"
        "    poet: {path: experts/poet}\n"
    )
    assert list(adopted(study)) == ["far", "second", "poet"]


def test_an_odd_path_or_revision_comes_back_as_it_was_given(study, tmp_path):
    odd = tmp_path.parent / 'a: "b" #c'
    odd.mkdir(exist_ok=True)
    adopt_into(study.recipe, "odd", str(odd))
    adopt_into(study.recipe, "numbered", "org/name", revision="1e5")
    assert adopted(study)["odd"].path == str(odd)
    assert adopted(study)["numbered"].revision == "1e5"


@pytest.mark.parametrize(
    ("name", "place", "start", "what"),
    [
        ("a b", "org/x", None, "'a b' is not a valid name; use letters"),
        ("poet", "./nowhere", None, "./nowhere: no such folder; give a folder, or a Hub id"),
        ("general", "org/x", None, "the name 'general' is taken by adopted.general; rename one"),
        ("base", "org/x", None, "the name 'base' is taken by base"),
        ("poet", "org/x", "generel", "unknown candidate 'generel'; did you mean 'general'"),
        ("poet", "org/x", "poet", "'poet' needs itself"),
    ],
)
def test_what_cannot_be_adopted_leaves_the_recipe_alone(study, name, place, start, what):
    before = study.recipe.read_text()
    with pytest.raises(UserError) as caught:
        adopt_into(study.recipe, name, place, start=start)
    assert what in str(caught.value)
    assert study.recipe.read_text() == before
    assert {path.name for path in study.folder.iterdir() if path.name.startswith(".")} == set()


def test_a_model_that_was_adopted_before_is_named_with_the_line_in_the_recipe(study):
    line, _ = adopt_into(study.recipe, "poet", "org/x")
    with pytest.raises(RecipeError) as caught:
        adopt_into(study.recipe, "poet", "org/y")
    number = study.recipe.read_text().splitlines().index(f"  {line}") + 1
    where, what = f"{study.recipe}:{number}: adopted.poet", "'poet' is adopted already"
    assert str(caught.value) == f"{where}: {what}; give another name, or correct that line"


def test_a_section_in_one_line_is_not_edited(study):
    study.recipe.write_text(study.recipe.read_text() + "adopted: {poet: {hub: org/x}}\n")
    with pytest.raises(RecipeError, match=r"'adopted' is written in one line; add to it: second: {hub: org/y}"):
        adopt_into(study.recipe, "second", "org/y")


def test_a_study_may_consist_of_adopted_models_alone(study):
    text = study.recipe.read_text()
    begin, end = text.index("data:"), text.index("evaluation:")
    study.recipe.write_text(
        text[:begin]
        + "adopted: {a: {hub: o/a}, b: {hub: o/b}}\nmerges: {both: {method: linear, models: [a, b], parameters: {weight: 1.0}}}\n"
        + text[end:]
    )
    recipe = load_recipe(study.recipe).recipe
    assert recipe.candidates() == {"base": "base", "a": "expert", "b": "expert", "both": "merge"}
    assert recipe.needs() == {"a": ["base"], "b": ["base"], "both": ["a", "b"]}


def test_a_training_without_data_or_budget_is_refused_with_its_line(study):
    text = study.recipe.read_text()
    study.recipe.write_text(text.replace("budget: {rows: 8}\n", ""))
    with pytest.raises(RecipeError, match=r"experts.general: 'budget' is missing; add it here, or for all"):
        load_recipe(study.recipe)
    study.recipe.write_text(text[: text.index("data:")] + text[text.index("budget:") :])
    with pytest.raises(RecipeError, match=r"experts.general: no data to train on"):
        load_recipe(study.recipe)


def test_a_template_adopts_a_model_for_every_language(study):
    study.recipe.write_text(study.recipe.read_text() + 'adopted:\n  "only-{lang}": {path: "experts/{lang}"}\n')
    assert {name: entry.path for name, entry in adopted(study).items()} == {
        "only-en": "experts/en",
        "only-fr": "experts/fr",
    }


def test_a_recipe_that_waits_for_two_models_takes_them_one_after_the_other(study):
    text = study.recipe.read_text()
    study.recipe.write_text(text.replace("mix: {weight: 1.0}}", "first: {weight: 1.0}, second: {weight: 1.0}}"))
    _, left = adopt_into(study.recipe, "first", "org/first")
    assert "unknown candidate 'second'" in str(left)
    with pytest.raises(RecipeError, match=r"adopted.second.start: unknown candidate 'nobody'"):
        adopt_into(study.recipe, "second", "org/second", start="nobody")
    assert adopt_into(study.recipe, "second", "org/second")[1] is None
    assert load_recipe(study.recipe).recipe.needs()["ties"] == ["general", "first", "second"]


@pytest.mark.parametrize("end", ["adopted:", "adopted: # ours", "adopted:\n  # from Anna"])
def test_a_section_that_is_empty_or_ends_the_file_is_filled(study, end):
    study.recipe.write_text(study.recipe.read_text() + end)
    assert adopt_into(study.recipe, "far", "org/name")[1] is None
    assert adopted(study)["far"].hub == "org/name"


def test_a_recipe_behind_a_link_and_its_line_ends_stay_what_they_were(study):
    text = study.recipe.read_bytes().replace(b"\n", b"\r\n")
    real = study.folder / "real.yaml"
    real.write_bytes(text)
    study.recipe.unlink()
    study.recipe.symlink_to("real.yaml")
    adopt_into(study.recipe, "far", "org/name")
    assert study.recipe.is_symlink()
    assert adopted(study)["far"].hub == "org/name"
    assert real.read_bytes().count(b"\n") == real.read_bytes().count(b"\r\n")


def test_a_recipe_whose_text_would_break_is_left_alone(study):
    study.recipe.write_text(study.recipe.read_text() + "...\n")
    before = study.recipe.read_bytes()
    with pytest.raises(UserError):
        adopt_into(study.recipe, "far", "org/name")
    assert study.recipe.read_bytes() == before
