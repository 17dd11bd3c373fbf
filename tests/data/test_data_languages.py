import doctest

import pytest

import mixmerge.data.account
import mixmerge.data.languages
import mixmerge.data.words
import mixmerge.terminal
from mixmerge.data.languages import known_language, match_language


@pytest.mark.parametrize(
    "module", [mixmerge.data.account, mixmerge.data.languages, mixmerge.data.words, mixmerge.terminal]
)
def test_the_examples_in_the_docstrings_hold(module):
    found = doctest.testmod(module)
    assert found.attempted > 0
    assert found.failed == 0


@pytest.mark.parametrize(
    ("value", "code"),
    [
        ("en", "en"),
        ("EN", "en"),
        (" en ", "en"),
        ("en-US", "en"),
        ("en_GB", "en"),
        ("eng", "en"),
        ("eng_Latn", "en"),
        ("English", "en"),
        ("zho_Hans", "zh"),
        ("zh-Hant-TW", "zh"),
        ("Simplified Chinese", "zh"),
        ("arb", "ar"),
        ("Standard  Arabic", "ar"),
        ("pes", "fa"),
        ("français", "fr"),
        ("हिन्दी", "hi"),
        ("Русский", "ru"),
    ],
)
def test_codes_tags_and_names_of_a_language_are_one(value, code):
    assert known_language(value) == code


@pytest.mark.parametrize("value", [None, "", " ", 7, True, ["en"], "und", "mul", "NaN", "Klingonish", "english?", "e"])
def test_what_names_no_language_is_no_language(value):
    assert known_language(value) is None


def test_a_code_that_the_table_lacks_is_a_language_of_its_own():
    assert known_language("tpi") == "tpi"
    assert known_language("tpi_Latn") == "tpi"
    assert match_language("tpi", ["en", "tpi"]) == "tpi"


def test_no_name_stands_for_two_languages():
    names = [name for line in mixmerge.data.languages._TABLE.split() if (name := line) != "|"]
    assert len(names) == len(set(names))


def test_the_code_as_it_stands_wins_over_what_it_also_means():
    assert match_language("arb", ["ar", "arb"]) == "arb"
    assert match_language("ar", ["arb", "ar"]) == "ar"
    assert match_language("arb", ["en", "ar"]) == "ar"
    assert match_language("ar-EG", ["en", "arb"]) == "arb"


def test_every_language_that_a_recipe_may_name_can_be_matched_by_its_code():
    for code in ("en", "fr", "hi", "es", "ru", "ar", "tl", "bn", "sw", "te", "eng", "ceb"):
        assert match_language(code.upper(), ["xx", code]) == code
