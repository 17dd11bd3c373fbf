"""Rows evidently in another language than they say: found by the real identifier, and reported, dropped or refused."""

import dataclasses
import doctest
import json
from pathlib import Path

import pytest

import mixmerge.data.tongue
import mixmerge.langid
from mixmerge.data.formats import Row
from mixmerge.data.loading import SAMPLE, load_rows
from mixmerge.data.sources import DataSource
from mixmerge.data.tongue import evident_language
from mixmerge.data.words import account_line
from mixmerge.errors import DataError

SHARED = Path(__file__).parents[3] / "shared" / "data"

SAID = {
    "en": (
        "What should one do when it rains all day long?",
        "Stay at home, make some tea and read a good book that you like.",
    ),
    "fr": (
        "Que faire quand il pleut toute la journée ?",
        "Restez à la maison, préparez du thé et lisez un bon livre.",
    ),
    "es": (
        "¿Qué se puede hacer en casa cuando llueve todo el día y hace mucho frío?",
        "Es mejor quedarse en casa, preparar un té caliente y leer un buen libro de aventuras junto a la ventana.",
    ),
    "hi": (
        "जब दिन भर बारिश हो तो क्या करना चाहिए?",
        "घर पर रहिए, चाय बनाइए और कोई अच्छी किताब पढ़िए, क्योंकि बाहर जाने से आप भीग जाएंगे और बीमार हो सकते हैं।",
    ),
    "ru": ("Что делать, если весь день идёт дождь?", "Оставайтесь дома, заварите чай и почитайте хорошую книгу."),
    "ar": ("ماذا نفعل عندما تمطر السماء طوال اليوم؟", "ابق في المنزل واصنع كوبا من الشاي واقرأ كتابا جيدا وممتعا."),
    "de": ("Was tut man, wenn es den ganzen Tag regnet?", "Man bleibt zu Hause, kocht Tee und liest ein gutes Buch."),
}


def row(lang, prompt, answer):
    return Row("1", lang, [{"role": "user", "content": prompt}], answer)


@pytest.mark.parametrize("module", [mixmerge.data.tongue, mixmerge.langid])
def test_the_examples_in_the_docstrings_hold_here_too(module):
    found = doctest.testmod(module)
    assert found.attempted > 0
    assert found.failed == 0


@pytest.mark.parametrize("lang", SAID)
def test_a_row_in_its_own_language_is_left_alone(lang):
    assert evident_language(row(lang, *SAID[lang])) is None


@pytest.mark.parametrize("claimed", SAID)
@pytest.mark.parametrize("lang", SAID)
def test_a_row_of_which_nothing_is_in_its_language_is_found(lang, claimed):
    assert evident_language(row(claimed, *SAID[lang])) == (None if lang == claimed else lang)


def test_a_translation_is_left_alone_whichever_side_its_language_is_on():
    asked, said = f"Translate into French: {SAID['en'][1]}", SAID["fr"][1]
    assert evident_language(row("en", asked, said)) is None
    assert evident_language(row("fr", asked, said)) is None
    assert evident_language(row("ru", asked, said)) == "fr"


def test_an_answer_elsewhere_to_a_question_at_home_is_left_to_the_language_judge():
    assert evident_language(row("fr", SAID["fr"][0], SAID["de"][1])) is None


@pytest.mark.parametrize(
    "answer",
    [
        "def add(first, second):\n    return first + second\n\nprint(add(2, 3))",
        "```python\nfor number in range(10):\n    print('number', number)\n```",
        '{"name": "Anna Schmidt", "city": "Berlin", "street": "Unter den Linden"}',
        "x = (3 + 4) * 2 = 14; y = x / 7 = 2; x + y = 16",
        "42",
        "Ja, gern.",
        "Johann Sebastian Bach",
        "https://example.org/a/very/long/address/that/says/nothing/in/any/language",
    ],
)
def test_code_sums_names_and_short_answers_say_nothing_of_a_language(answer):
    assert evident_language(row("hi", SAID["de"][0], answer)) is None
    assert evident_language(row("fr", "?", answer)) is None


def test_a_question_too_short_to_tell_leaves_it_to_the_answer():
    assert evident_language(row("fr", "Regen?", SAID["de"][1])) == "de"


def test_varieties_and_languages_that_spelling_hardly_parts_are_not_other_languages():
    croatian = "Ostanite kod kuće, skuhajte čaj i pročitajte dobru knjigu, jer vani pada kiša cijeli dan."
    assert evident_language(row("sr", "?", croatian)) is None
    indonesian = "Tinggallah di rumah, buatlah teh dan bacalah buku yang bagus karena hujan turun sepanjang hari."
    assert evident_language(row("ms", "?", indonesian)) is None
    assert evident_language(row("id", "?", indonesian)) is None
    assert evident_language(row("arb", *SAID["ar"])) is None


def test_a_language_that_the_identifier_does_not_know_is_never_judged():
    assert evident_language(row("tpi", *SAID["en"])) is None


def test_the_system_turn_and_earlier_answers_are_not_the_question():
    turns = [
        {"role": "system", "content": SAID["en"][1]},
        {"role": "user", "content": SAID["fr"][0]},
        {"role": "assistant", "content": SAID["en"][1]},
        {"role": "user", "content": SAID["fr"][1]},
    ]
    assert evident_language(Row("1", "en", turns, SAID["fr"][1])) == "fr"
    assert evident_language(Row("1", "fr", turns, SAID["de"][1])) is None


# Data sets


@pytest.fixture
def mixed(tmp_path):
    """Eight rows that say fr: two of them in German, one in English; and two good ones that say en."""
    spoken = ["fr", "fr", "de", "fr", "en", "fr", "de", "fr"]
    rows = [dict(zip(("prompt", "completion"), SAID[code], strict=True)) | {"lang": "fr"} for code in spoken]
    rows += [dict(zip(("prompt", "completion"), SAID["en"], strict=True)) | {"lang": "en"}] * 2
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return tmp_path


def load(folder, sample=SAMPLE, **options):
    return load_rows(DataSource(path="a.jsonl", lang_column="lang", **options), ["en", "fr"], folder, sample=sample)


def test_by_default_rows_in_other_languages_are_kept_counted_and_shown(mixed):
    loaded = load(mixed)
    account = loaded.account
    assert (len(loaded.rows), account.kept, account.judged) == (10, {"en": 2, "fr": 8}, 10)
    assert {code: tally.rows for code, tally in account.wrong_language.items()} == {"fr": 3}
    line = account_line("chat", account)
    assert "3 of 10 judged evidently in another language than they say (fr 3; first fr: a.jsonl:" in line


def test_nothing_is_judged_where_nobody_asked_for_a_report(mixed):
    account = load(mixed, sample=0).account
    assert (account.judged, account.wrong_language) == (0, {})
    assert load(mixed, sample=0, wrong_language="drop") == load(mixed, wrong_language="drop")


def test_rows_in_other_languages_can_be_dropped_and_are_counted(mixed):
    loaded = load(mixed, wrong_language="drop")
    account = loaded.account
    assert [row.id for row in loaded.rows] == ["fr/1", "fr/2", "fr/4", "fr/6", "fr/8", "en/9", "en/10"]
    assert account.kept == {"en": 2, "fr": 5}
    assert account.wrong_language["fr"].first == "a.jsonl:3: in 'de'"
    assert account.read == sum(account.kept.values()) + account.wrong_rows
    assert "3 of 10 judged evidently in another language than they say dropped" in account_line("chat", account)


def test_rows_in_other_languages_can_be_refused_with_their_number(mixed):
    with pytest.raises(DataError) as caught:
        load(mixed, wrong_language="refuse")
    assert str(caught.value) == (
        f"{mixed}/a.jsonl:3: this row says 'fr' and is evidently in 'de' (3 such rows of 10); "
        "mend it, or set wrong_language: drop or report"
    )


def test_a_dropped_row_does_not_count_towards_the_limit_and_a_refused_one_beyond_it_is_not_read(mixed):
    assert [row.id for row in load(mixed, wrong_language="drop", limit=3).rows if row.lang == "fr"] == [
        "fr/1",
        "fr/2",
        "fr/4",
    ]
    assert len(load(mixed, wrong_language="refuse", limit=2).rows) == 4


def test_a_language_of_which_nothing_is_left_is_refused_with_the_reason(mixed):
    lines = (mixed / "a.jsonl").read_text().splitlines()
    (mixed / "a.jsonl").write_text("\n".join([lines[2], lines[4], lines[8]]) + "\n")
    with pytest.raises(DataError, match=r"no rows for language 'fr' in 3 records \(2 evidently in others dropped\)"):
        load(mixed, wrong_language="drop")


def test_a_report_judges_the_same_sample_of_a_large_data_set_whatever_its_order(tmp_path):
    rows = [
        {"id": f"r{i}", "lang": "fr"} | dict(zip(("prompt", "completion"), SAID["de" if i % 4 else "fr"], strict=True))
        for i in range(SAMPLE + 500)
    ]
    counts = []
    for order in (rows, rows[::-1]):
        (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in order), encoding="utf-8")
        account = load_rows(DataSource(path="a.jsonl"), ["fr"], tmp_path, sample=SAMPLE).account
        assert account.judged == SAMPLE
        counts.append(account.wrong_rows)
    assert counts[0] == counts[1]
    assert 0.65 * SAMPLE < counts[0] < 0.85 * SAMPLE


def test_only_dropping_changes_the_rows_and_so_the_identity():
    source = DataSource(path="a.jsonl")
    assert dataclasses.replace(source, wrong_language="refuse").choices() == source.choices() == {}
    assert dataclasses.replace(source, wrong_language="drop").choices() == {"wrong_language": "drop"}


@pytest.mark.parametrize("name", ["general/sft_train", "general/dpo_train", "safety/sft_train", "safety/dpo_train"])
def test_hardly_a_row_of_real_data_is_called_wrong_and_most_are_found_once_they_are(name):
    """22,212 rows in six languages, full of translations, code and questions in English with answers elsewhere."""
    if not (SHARED / f"{name}.jsonl").is_file():
        pytest.skip("the shared data sets are not beside this checkout")
    languages = ["en", "fr", "hi", "es", "ru", "ar"]
    lines = (SHARED / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()[::10]
    rows = []
    for line in lines:
        record = json.loads(line)
        rows.append(row(record["lang"], record["prompt"], record.get("response") or record["chosen"]))
    called = [item for item in rows if evident_language(item) is not None]
    assert len(called) <= 1
    lying = [dataclasses.replace(r, lang=languages[languages.index(r.lang) - 1]) for r in rows]
    found = sum(evident_language(item) is not None for item in lying)
    assert found > 0.5 * len(lying)


def test_the_codes_that_are_known_are_those_that_the_model_answers():
    from mixmerge.langid import known_languages, likelihoods

    assert known_languages() == set(likelihoods("text", most=1000))
