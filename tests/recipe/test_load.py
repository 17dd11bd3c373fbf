"""Reading a recipe: what it becomes, and one line with place, reason and advice for every mistake."""

from __future__ import annotations

import pytest

from mixmerge.merge.config import MergeConfig
from mixmerge.recipe.load import merge_config


def test_a_recipe_becomes_checked_data_in_its_own_order(recipe):
    loaded = recipe.load()
    found = loaded.recipe
    assert list(found.candidates()) == [
        "base",
        "general",
        "safety",
        "only-en",
        "only-fr",
        "mix",
        "ties",
        "slerp",
        "tongues",
    ]
    assert list(found.candidates().values()) == ["base", *["expert"] * 4, "baseline", *["merge"] * 3]
    assert found.base.path == "./model"
    assert loaded.folder == recipe.path.parent.resolve()
    assert loaded.path == recipe.path


def test_short_forms_mean_what_the_long_forms_say(recipe):
    found = recipe.load().recipe
    assert found.experts["general"].mixture == {"general": 1.0}
    assert found.experts["safety"].languages == {"en": 1.0}
    assert found.merges["slerp"].models == {"general": {}, "safety": {}}


@pytest.mark.parametrize(
    ("text", "path", "hub"),
    [("./m", "./m", None), ("/m", "/m", None), ("~/m", "~/m", None), ("org/name", None, "org/name")],
)
def test_a_base_in_one_word_is_a_folder_or_a_hub_id(recipe, text, path, hub):
    recipe.change("base:\n  path: ./model\n  chat_template: chatml\n", f"base: {text}\n")
    base = recipe.load().recipe.base
    assert (base.path, base.hub) == (path, hub)


def test_a_training_overrides_only_the_keys_that_it_names(recipe):
    found = recipe.load().recipe
    own = found.training_of(found.experts["safety"])
    assert (own.epochs, own.learning_rate, own.batch_size) == (2, 1e-4, 4)
    assert found.training_of(found.experts["general"]) == found.training


def test_a_training_may_override_a_key_back_to_its_default(recipe):
    recipe.change("{epochs: 2}", "{batch_size: 8}")
    found = recipe.load().recipe
    assert found.training_of(found.experts["safety"]).batch_size == 8


# Unknown keys


@pytest.mark.parametrize(
    ("old", "new", "key", "advice"),
    [
        ("seed: 3", "sed: 3", "sed", "did you mean 'seed'?"),
        ("  chat_template: chatml", "  chat_templat: chatml", "base.chat_templat", "did you mean 'chat_template'?"),
        ("    objective: safety", "    objektive: safety", "data.refusals.objektive", "did you mean 'objective'?"),
        ("  batch_size: 4", "  batchsize: 4", "training.batchsize", "did you mean 'batch_size'?"),
        ("{epochs: 2}", "{epoch: 2}", "experts.safety.training.epoch", "did you mean 'epochs'?"),
        ("      rows: 64", "      row: 64", "baselines.mix.budget.row", "did you mean 'rows'?"),
        ("    method: ties", "    methods: ties", "merges.ties.methods", "did you mean 'method'?"),
        ("{purpose: general,", "{purpos: general,", "evaluation.prompts.general.purpos", "did you mean 'purpose'?"),
        ("{dev: 2,", "{train: 2,", "evaluation.limit.train", "known: dev, test"),
        ("{margin: 0.02}", "{marge: 0.02}", "judges.quality.marge", "did you mean 'margin'?"),
        ("  jobs: 1", "  job: 1", "how.job", "did you mean 'jobs'?"),
        (
            "budget: {tokens: 1000}",
            "budget: {tokens: 1000, words: 2}",
            "budget.words",
            "known: baselines, rows, tokens",
        ),
    ],
)
def test_an_unknown_key_is_refused_wherever_it_stands(breaks, old, new, key, advice):
    line, error = breaks(old, new)
    assert error.startswith(f"recipe.yaml:{line}: {key}: unknown key '{key.rpartition('.')[2]}'; {advice}")


def test_a_missing_key_is_shown_at_the_mapping_that_lacks_it(breaks):
    line, error = breaks("    objective: safety\n", "")
    assert error == f"recipe.yaml:{line - 1}: data.refusals: 'objective' is missing; add it"


def test_a_missing_top_level_key_names_the_file(recipe):
    recipe.change("name: demo\n", "")
    assert recipe.refused() == "recipe.yaml: 'name' is missing; add it"


def test_the_first_mistake_is_told_and_the_others_counted(recipe):
    recipe.change("  batch_size: 4", "  batch_size: none")
    recipe.change("  jobs: 1", "  jobs: 0")
    assert recipe.refused().endswith("(1 more after this one)")


# Types and ranges


@pytest.mark.parametrize(
    ("old", "new", "key", "word"),
    [
        ("seed: 3", "seed: three", "seed", "valid integer (given: 'three')"),
        ("seed: 3", "seed: 3.5", "seed", "integer"),
        ("seed: 3", "seed: true", "seed", "valid integer (given: True)"),
        ("seed: 3", "seed: -1", "seed", "greater than or equal to 0 (given: -1)"),
        ("name: demo", "name: 7", "name", "valid string (given: 7)"),
        ("name: demo", "name: a/b", "name", "'a/b' is not a valid name; use letters"),
        ("name: demo", "name: ../up", "name", "is not a valid name"),
        ("[en, fr]", "[]", "languages", "at least 1 item"),
        ("[en, fr]", "[en, en]", "languages", "'en' is listed twice"),
        ("[en, fr]", "[en, french]", "languages.1", "'french' is not a valid language code; use an ISO 639-1 code"),
        ("[en, fr]", "en", "languages", "valid list (given: 'en')"),
        ("[en, fr]", "[en, 4]", "languages.1", "valid string (given: 4)"),
        ("budget: {tokens: 1000}", "budget: 1000", "budget", "expected a mapping of keys to values (given: 1000)"),
        ("budget: {tokens: 1000}", "budget: {}", "budget", "give exactly one of tokens or rows"),
        ("{tokens: 1000}", "{tokens: 5, rows: 5}", "budget", "give exactly one of tokens or rows"),
        ("{tokens: 1000}", "{tokens: 0}", "budget.tokens", "greater than or equal to 1 (given: 0)"),
        ("learning_rate: 1.0e-4", "learning_rate: 0", "training.learning_rate", "greater than 0"),
        ("learning_rate: 1.0e-4", "learning_rate: .inf", "training.learning_rate", "finite"),
        ("learning_rate: 1.0e-4", "learning_rate: .nan", "training.learning_rate", "finite"),
        ("learning_rate: 1.0e-4", "learning_rate: '1e-4'", "training.learning_rate", "valid number (given: '1e-4')"),
        ("learning_rate: 1.0e-4", "scheduler: cosin", "training.scheduler", "'cosine'"),
        ("  path: ./model\n", "  path: ./model\n  hub: a/b\n", "base", "exactly one of path, hub or package"),
        ("  path: ./model\n", "  path: ./model\n  revision: v1\n", "base", "revision goes with hub only"),
        ('    path: "plain.{lang}.jsonl"\n', "", "data.plain", "exactly one of path or hub"),
        ("mixture: {general: 0.7, safety: 0.3}", "mixture: {general: 0}", "experts.only-en.mixture", "add up to 0"),
        ("mixture: {general: 0.7, safety: 0.3}", "mixture: {general: -1}", "experts.only-en.mixture.general", ">= 0"),
        ("mixture: {general: 0.7, safety: 0.3}", "mixture: [general]", "experts.only-en.mixture", "mapping"),
        ("    languages: [en]", "    languages: [en, en]", "experts.safety.languages", "'en' is listed twice"),
        ("    languages: [en]", "    languages: [{en: 1}]", "experts.safety.languages", "list of names"),
        ("models: [general, safety]", "models: [general, general]", "merges.slerp.models", "'general' is listed twice"),
        ("models: [general, safety]", "models: [general, {safety: 1}]", "merges.slerp.models", "list of names"),
        ("models: [general, safety]", "models: [general, 3]", "merges.slerp.models", "list of names"),
        ("models: [general, safety]", "models: general", "merges.slerp.models", "mapping"),
        ("{margin: 0.02}", "{margin: 2}", "judges.quality.margin", "less than or equal to 1 (given: 2)"),
        ("{dev: 2, test: 4}", "{test: 0}", "evaluation.limit.test", "greater than or equal to 1"),
        ("  jobs: 1", "  device: gpu", "how.device", "'auto', 'cpu' or 'cuda'"),
        ("{purpose: general,", "{purpose: danger,", "evaluation.prompts.general.purpose", "'harmful'"),
    ],
)
def test_a_wrong_value_is_refused_with_what_was_given(breaks, old, new, key, word):
    _, error = breaks(old, new)
    place, _, rest = error.removeprefix("recipe.yaml:").partition(": ")
    assert place.isdecimal(), error
    assert rest.startswith(f"{key}: "), error
    assert word.replace(">=", "greater than or equal to") in rest


def test_a_name_that_would_not_make_a_folder_is_refused(breaks):
    line, error = breaks("  safety:\n    mixture: safety", "  s/fety:\n    mixture: safety")
    assert error.startswith(f"recipe.yaml:{line}: experts.s/fety: 's/fety' is not a valid name")


# References


@pytest.mark.parametrize(
    ("old", "new", "error"),
    [
        ("    mixture: general", "    mixture: genral", "unknown objective 'genral'; did you mean 'general'?"),
        ("{general: 1, safety: 1}", "{general: 1, harm: 1}", "unknown objective 'harm'; known: general, safety"),
        ("    languages: [en]", "    languages: [de]", "unknown language 'de'; known: en, fr"),
        ("    languages: [en]", "    languages: {de: 1}", "unknown language 'de'; known: en, fr"),
        (
            "      safety: {weight: 1.0}",
            "      saftey: {weight: 1.0}",
            "unknown candidate 'saftey'; did you mean 'safety'?",
        ),
        ("models: [general, safety]", "models: [general, nobody]", "unknown candidate 'nobody'; known: "),
        (
            "    parameters: {density: 0.5}",
            "    base: bse\n    parameters: {density: 0.5}",
            "unknown candidate 'bse'; did you",
        ),
        ("    training: {epochs: 2}", "    start: geneal", "unknown candidate 'geneal'; did you mean 'general'?"),
    ],
)
def test_a_reference_to_nothing_is_refused_at_its_line(breaks, old, new, error):
    line, found = breaks(old, new)
    assert found.startswith(f"recipe.yaml:{line}: ")
    assert error in found


@pytest.mark.parametrize(
    ("old", "new", "taken"),
    [
        ("  mix:\n", "  safety:\n", "baselines.safety: the name 'safety' is taken by experts.safety"),
        ("  ties:\n", "  mix:\n", "merges.mix: the name 'mix' is taken by baselines.mix"),
        ("  slerp:\n", "  base:\n", "merges.base: the name 'base' is taken by base"),
        ("  slerp:\n", "  only-en:\n", "merges.only-en: the name 'only-en' is taken by experts.only-en"),
    ],
)
def test_a_name_may_be_used_once_over_all_groups(breaks, old, new, taken):
    line, error = breaks(old, new)
    assert error == f"recipe.yaml:{line}: {taken}; rename one"


def test_a_key_written_twice_is_refused(breaks):
    line, error = breaks("  slerp:\n", "  ties:\n")
    assert error.startswith(f"recipe.yaml:{line}: ")
    assert "duplicate key" in error


def test_candidates_that_need_each_other_are_named_and_those_that_only_wait_are_not(breaks):
    line, error = breaks(
        "  slerp:\n    method: slerp\n    models: [general, safety]\n    parameters: {t: 0.5}\n",
        "  one: {method: linear, models: {two: {weight: 1}, general: {weight: 1}}}\n"
        "  two: {method: linear, models: {one: {weight: 1}, general: {weight: 1}}}\n"
        "  late: {method: linear, models: {two: {weight: 1}, general: {weight: 1}}}\n",
    )
    assert error.startswith(f"recipe.yaml:{line}: merges.one: candidates need each other: one, two;")


def test_a_candidate_that_starts_from_itself_is_refused(breaks):
    _, error = breaks("    training: {epochs: 2}", "    start: safety")
    assert "experts.safety: 'safety' needs itself" in error


def test_a_cycle_through_a_training_is_seen(breaks):
    _, error = breaks("    training: {epochs: 2}", "    start: ties")
    assert "candidates need each other: safety, ties" in error


def test_a_merge_may_feed_a_training_and_a_training_a_merge(recipe):
    recipe.change("    budget:\n      rows: 64\n", "    start: slerp\n")
    recipe.change("    method: ties\n", "    method: ties\n    base: slerp\n")
    assert recipe.load().recipe.baselines["mix"].start == "slerp"


def test_a_recipe_without_candidates_is_refused(recipe):
    text = recipe.path.read_text()
    start, end = text.index("experts:"), text.index("evaluation:")
    recipe.path.write_text(text[:start] + text[end:])
    assert (
        recipe.refused() == "recipe.yaml: no experts, adopted models, baselines or merges; add at least one candidate"
    )


# Merges


@pytest.mark.parametrize(
    ("old", "new", "key", "word"),
    [
        ("    method: ties", "    method: tie", "merges.ties.method", "'tie'; did you mean 'ties'?"),
        ("    method: ties", "    method: model_stok", "merges.ties.method", "'model_stok'"),
        ("{density: 0.5}", "{density: 1.5}", "merges.ties.parameters.density", "between 0 and 1, got 1.5"),
        ("{density: 0.5}", "{density: 50}", "merges.ties.parameters.density", "did you mean 0.5?"),
        ("{density: 0.5}", "{density: half}", "merges.ties.parameters.density", "finite number, got 'half'"),
        ("{density: 0.5}", "{density: 0.5, lamda: 1}", "merges.ties.parameters.lamda", "no parameter 'lamda'"),
        ("{density: 0.5}", "{density: 0.5, t: 0.5}", "merges.ties.parameters.t", "it is a parameter of slerp"),
        ("general: {weight: 1.0}", "general: {wieght: 1.0}", "merges.ties.models.general.wieght", "'weight'?"),
        ("general: {weight: 1.0}", "general: {weight: x}", "merges.ties.models.general.weight", "got 'x'"),
        ("general: {weight: 1.0}", "general: 1.0", "merges.ties.models.general", "expected a mapping"),
        ("    parameters: {t: 0.5}", "    parameters: {}", "merges.slerp.method", "needs 't'"),
        ("models: [general, safety]", "models: [general, safety, mix]", "merges.slerp.models", "slerp merges"),
        ("models: [general, safety]", "models: [general]", "merges.slerp.models", "slerp merges"),
        ("only-{lang}: {weight: 0.5}", "only-{lang}: {weight: 0.0}", "merges.tongues.models", "sum to 0"),
    ],
)
def test_a_mistake_in_a_merge_is_shown_where_it_stands_in_the_recipe(breaks, old, new, key, word):
    _, error = breaks(old, new)
    place, _, rest = error.removeprefix("recipe.yaml:").partition(": ")
    assert place.isdecimal(), error
    assert rest.startswith(f"{key}: "), error
    assert word in rest


def test_a_merge_parameter_on_its_own_line_is_shown_there(breaks):
    line, error = breaks("      safety: {weight: 1.0}", "      safety:\n        weight: much")
    assert error.startswith(f"recipe.yaml:{line + 1}: merges.ties.models.safety.weight: ")


def test_task_vectors_start_from_the_base_unless_the_recipe_says_otherwise(recipe):
    loaded = recipe.load()
    merges = loaded.recipe.merges
    configs = {name: merge_config(name, merge, loaded.marks) for name, merge in merges.items()}
    assert all(isinstance(config, MergeConfig) for config in configs.values())
    assert {name: config.base_model for name, config in configs.items()} == {
        "ties": "base",
        "slerp": "general",
        "tongues": None,
    }
    assert [entry.model for entry in configs["tongues"].models] == ["only-en", "only-fr"]


# --set


def test_an_override_replaces_or_adds_a_key(recipe):
    found = recipe.load(
        "seed=9", "merges.ties.parameters.density=0.7", "judges.refusal.answers=a.jsonl", "how.jobs=2"
    ).recipe
    assert found.seed == 9
    assert found.merges["ties"].parameters == {"density": 0.7}
    assert found.judges.refusal.answers == "a.jsonl"
    assert found.how.jobs == 2


def test_an_override_may_be_any_yaml(recipe):
    found = recipe.load("languages=[fr, en]", "experts.safety.languages=[fr]", "budget={rows: 5}").recipe
    assert found.languages == ["fr", "en"]
    assert found.budget.rows == 5


def test_an_override_comes_before_templates(recipe):
    assert "only-de" in recipe.load("languages=[en, de]").recipe.experts


@pytest.mark.parametrize(
    ("override", "error"),
    [
        ("seed", "--set seed: expected key.path=value"),
        ("=4", "--set =4: expected key.path=value"),
        ("seed=[1", "--set seed=[1: the value is not YAML"),
        ("seed=x", "--set: seed: Input should be a valid integer (given: 'x')"),
        ("sed=1", "--set: sed: unknown key 'sed'; did you mean 'seed'?"),
        ("nothing.there=1", "--set: nothing: unknown key 'nothing'; known: "),
        ("seed.deep=1", "--set seed.deep=1: seed is not a mapping"),
        ("name.=1", "--set name.=1: name is not a mapping"),
        ("merges.ties.parameters.density=2", "--set: merges.ties.parameters.density: 'density' must lie between"),
        ("merges.ties={method: linaer, models: [general, safety]}", "--set: merges.ties.method: unknown"),
        ("experts.safety.languages=[de]", "--set: experts.safety.languages.de: unknown language 'de'"),
        ("how.fast=1", "--set: how.fast: unknown key 'fast'"),
        ("budget={1: 2}", "--set: budget.1: unknown key '1'"),
    ],
)
def test_a_bad_override_is_named_as_such(recipe, override, error):
    assert recipe.refused(override).startswith(error)


def test_an_override_does_not_hide_the_lines_of_its_neighbours(recipe):
    line = recipe.change("      rows: 64", "      rows: 0")
    assert recipe.refused("seed=1").startswith(f"recipe.yaml:{line}: baselines.mix.budget.rows: ")
