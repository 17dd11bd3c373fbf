"""Rows of whole data sets: languages from a column, bad rows refused or dropped, limits, and the account of it all."""

import dataclasses
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mixmerge.data.account import RowError
from mixmerge.data.loading import load_rows, take_out
from mixmerge.data.sources import DataSource
from mixmerge.data.words import account_line
from mixmerge.errors import DataError


def write(tmp_path, name, records):
    text = "".join((record if isinstance(record, str) else json.dumps(record)) + "\n" for record in records)
    (tmp_path / name).write_text(text, encoding="utf-8")


def pair(index, **more):
    return {"prompt": f"question {index}", "completion": f"answer {index}"} | more


def load(tmp_path, languages=("en",), path="a.jsonl", **options):
    return load_rows(DataSource(path=path, **options), list(languages), tmp_path)


def refusal(*args, **named):
    with pytest.raises(DataError) as caught:
        load(*args, **named)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def balanced(account):
    """Every record that was read is counted once."""
    dropped = account.wrong_rows if account.wrong_dropped else 0
    skipped = sum(account.other_language.values())
    return account.read == sum(account.kept.values()) + skipped + account.bad_rows + account.beyond_limit + dropped


# Files by language


def test_rows_of_all_languages_are_loaded_and_parallel_ids_stay_apart(tmp_path):
    for lang in ("en", "bn"):
        write(tmp_path, f"a.{lang}.jsonl", [pair(1, id="g-1"), pair(2)])
    loaded = load(tmp_path, ["en", "bn"], path="a.{lang}.jsonl")
    found = [(item.id, item.lang) for item in loaded.rows]
    assert found == [("en/g-1", "en"), ("en/2", "en"), ("bn/g-1", "bn"), ("bn/2", "bn")]
    assert loaded.account.kept == {"en": 2, "bn": 2}
    assert balanced(loaded.account)


def test_an_id_used_twice_is_refused_with_both_places(tmp_path):
    write(tmp_path, "a.jsonl", [pair(1, id="g"), pair(2, id="g")])
    message = refusal(tmp_path)
    assert f"{tmp_path}/a.jsonl:2: id 'g' was used before, at a.jsonl:1; mend it" in message
    account = load(tmp_path, bad_rows="drop").account
    assert account.bad["repeated id"].first == "a.jsonl:2: id 'g' was used before, at a.jsonl:1"
    assert (account.kept, account.bad["repeated id"].rows) == ({"en": 1}, 1)


def test_an_empty_file_is_refused_with_its_language_even_where_bad_rows_are_dropped(tmp_path):
    write(tmp_path, "a.jsonl", [])
    assert "no rows for language 'en'" in refusal(tmp_path)
    assert "no rows for language 'en'" in refusal(tmp_path, bad_rows="drop")


# A language column


def test_one_file_with_a_language_column_serves_all_languages_of_the_recipe(tmp_path):
    named = ["en", "fr-CA", "French", "eng_Latn", "EN"]
    write(tmp_path, "a.jsonl", [pair(index, language=name) for index, name in enumerate(named)])
    loaded = load(tmp_path, ["fr", "en"], lang_column="language")
    assert [row.lang for row in loaded.rows] == ["en", "fr", "fr", "en", "en"]
    assert [row.id for row in loaded.rows] == ["en/1", "fr/2", "fr/3", "en/4", "en/5"]
    assert loaded.account.read == 5
    assert balanced(loaded.account)


def test_rows_of_other_languages_are_skipped_and_counted(tmp_path):
    named = ["en", "deu", "de-AT", "Yoruba", "en"]
    write(tmp_path, "a.jsonl", [pair(index, lang=name) for index, name in enumerate(named)])
    account = load(tmp_path, lang_column="lang").account
    assert (account.kept, account.other_language) == ({"en": 2}, {"de": 2, "yo": 1})
    assert balanced(account)
    assert account_line("x", account) == "data x: 2 of 5 rows (en 2); 3 in other languages skipped (de 2, yo 1)"


def test_a_row_of_another_language_is_not_looked_into(tmp_path):
    write(tmp_path, "a.jsonl", [pair(1, lang="en"), {"lang": "de", "prompt": "", "completion": None}])
    assert load(tmp_path, lang_column="lang").account.bad == {}


@pytest.mark.parametrize(("value", "shown"), [(None, "None"), ("", "''"), ("Klingonish", "'Klingonish'"), (3, "3")])
def test_a_row_whose_language_nobody_knows_is_bad(tmp_path, value, shown):
    write(tmp_path, "a.jsonl", [pair(1, lang="en"), pair(2, lang=value)])
    assert f"a.jsonl:2: 'lang' is {shown}, which names no language" in refusal(tmp_path, lang_column="lang")
    account = load(tmp_path, lang_column="lang", bad_rows="drop").account
    assert account.bad["no language"].rows == 1


def test_a_language_column_that_is_not_there_is_named_with_those_that_are(tmp_path):
    write(tmp_path, "a.jsonl", [pair(1, lang="en")])
    message = refusal(tmp_path, lang_column="language")
    assert "missing column 'language' (lang_column); columns found: completion, lang, prompt" in message


def test_a_language_that_the_column_never_names_is_refused_with_those_it_names(tmp_path):
    write(tmp_path, "a.jsonl", [pair(1, lang="en"), pair(2, lang="de")])
    message = refusal(tmp_path, ["en", "hi"], lang_column="lang")
    assert "no rows for language 'hi' in 2 records (other languages there: de)" in message
    assert "'languages'" in message


def test_a_column_and_a_file_per_language_agree_or_rows_are_skipped(tmp_path):
    for lang in ("en", "fr"):
        write(tmp_path, f"a.{lang}.jsonl", [pair(1, lang=lang), pair(2, lang="en")])
    account = load(tmp_path, ["en", "fr"], path="a.{lang}.jsonl", lang_column="lang").account
    assert (account.kept, account.other_language) == ({"en": 2, "fr": 1}, {"en": 1})


# Bad rows

BAD = {
    "empty text": pair(1, completion=" "),
    "not text": pair(1, completion=3),
    "half a surrogate pair": '{"prompt": "q", "completion": "\\ud800"}',
    "missing column": {"prompt": "q", "text": "a"},
    "roles out of order": {"messages": [{"role": "assistant", "content": "a"}] * 2},
    "unknown role": {"messages": [{"role": "oracle", "content": "a"}]},
    "not messages": {"messages": ["a"]},
    "equal sides": {"prompt": "q", "chosen": "a", "rejected": "a "},
    "broken JSON": '{"prompt": ',
    "not an object": "[1]",
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_row_is_refused_by_name_or_dropped_and_counted(tmp_path, kind):
    write(tmp_path, "a.jsonl", [pair(1), BAD[kind], pair(3)])
    message = refusal(tmp_path)
    assert message.startswith(f"{tmp_path}/a.jsonl:2: ")
    assert message.endswith("set bad_rows: drop")
    loaded = load(tmp_path, bad_rows="drop")
    assert [row.id for row in loaded.rows] == ["en/1", "en/3"]
    assert {name: tally.rows for name, tally in loaded.account.bad.items()} == {kind: 1}
    assert loaded.account.bad[kind].first.startswith("a.jsonl:2: ")
    assert balanced(loaded.account)


def test_a_line_that_is_not_utf8_spoils_that_line_only(tmp_path):
    good = json.dumps(pair(1)).encode()
    (tmp_path / "a.jsonl").write_bytes(good + b"\n" + good.replace(b"q", b"\xff") + b"\n" + good + b"\n")
    assert "a.jsonl:2: not UTF-8: byte 0xff at column 13" in refusal(tmp_path)
    account = load(tmp_path, bad_rows="drop").account
    assert (account.kept, account.bad["not UTF-8"].rows) == ({"en": 2}, 1)


def test_a_row_of_a_table_that_is_ragged_or_not_utf8_spoils_that_row_only(tmp_path):
    (tmp_path / "a.csv").write_bytes(b'prompt,completion\nq,a\nq\n"two\nlines",\xe9\nq,b\n')
    account = load(tmp_path, path="a.csv", bad_rows="drop").account
    assert account.kept == {"en": 2}
    assert account.bad["ragged row"].first == "a.csv:2: 1 cells under 2 columns"
    assert account.bad["not UTF-8"].first.startswith("a.csv:3: not UTF-8: byte 0xe9")


def test_a_refusal_names_the_first_bad_row_and_counts_each_kind_in_all(tmp_path):
    write(tmp_path, "a.jsonl", [pair(1), BAD["unknown role"], BAD["empty text"], BAD["empty text"]])
    message = refusal(tmp_path)
    assert "a.jsonl:2: turn 1 of 'messages' has the role 'oracle'" in message
    assert "(3 bad rows of 4: 2 empty text, 1 unknown role)" in message


def test_bad_rows_of_all_languages_are_counted_before_a_data_set_is_refused(tmp_path):
    write(tmp_path, "a.en.jsonl", [pair(1), BAD["empty text"]])
    write(tmp_path, "a.fr.jsonl", [pair(1), BAD["empty text"], BAD["equal sides"]])
    message = refusal(tmp_path, ["en", "fr"], path="a.{lang}.jsonl")
    assert "a.en.jsonl:2: " in message
    assert "(3 bad rows of 5: 2 empty text, 1 equal sides)" in message


def test_a_file_of_which_nothing_can_be_used_is_refused_whatever_is_said(tmp_path):
    write(tmp_path, "a.jsonl", [{"text": "a"}, {"text": "b"}])
    message = refusal(tmp_path, bad_rows="drop")
    assert "a.jsonl:1: no known format" in message
    assert "(2 bad rows of 2: 2 missing column)" in message
    assert "bad_rows" not in message


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.parquet", b"PAR1 no table", "broken Parquet"),
        ("a.json", b'{"x": 1}', "expected an array"),
        ("a.json", b'[{"x": "\xff"}]', "not UTF-8"),
        ("a.csv", b"prompt,\xff\nq,a\n", "the header is not UTF-8"),
        ("a.csv", b'prompt,completion\n"q"x,a\n', "broken CSV"),
    ],
)
def test_a_file_that_is_broken_as_a_whole_is_refused_whatever_is_said(tmp_path, name, content, said):
    (tmp_path / name).write_bytes(content)
    assert said in refusal(tmp_path, path=name, bad_rows="drop")


def test_a_missing_file_is_refused_whatever_is_said(tmp_path):
    assert "no file for language 'en'" in refusal(tmp_path, bad_rows="drop")


def test_a_mistake_in_the_column_map_is_no_matter_of_single_rows(tmp_path):
    write(tmp_path, "a.jsonl", [pair(1), pair(2)])
    assert "maps an unknown column" in refusal(tmp_path, bad_rows="drop", columns={"answr": "completion"})


def test_json_that_is_nested_too_deeply_is_a_bad_row_and_no_crash(tmp_path):
    write(tmp_path, "a.jsonl", [pair(1), "[" * 100_000 + "]" * 100_000])
    assert load(tmp_path, bad_rows="drop").account.bad["broken JSON"].rows == 1


def test_what_bad_rows_hold_cannot_steer_the_terminal_nor_spoil_the_account(tmp_path):
    nasty = "\x1b[2J\u202e\ud800"
    write(tmp_path, "a.jsonl", [pair(1), {"messages": [{"role": nasty, "content": "a"}]}, {nasty: 1}])
    for text in (
        refusal(tmp_path),
        account_line("x", load(tmp_path, bad_rows="drop").account),
        json.dumps(load(tmp_path, bad_rows="drop").account.to_json(), ensure_ascii=False),
    ):
        assert text.isprintable()
        text.encode("utf-8")


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("array", [False, True])
def test_a_key_given_twice_in_one_object_is_a_bad_row(tmp_path, nested, array):
    turns = '{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "content": "c"}'
    bad = f'{{"messages": [{turns}]}}' if nested else '{"prompt": "a", "completion": "b", "completion": "c"}'
    name, lines = ("a.json" if array else "a.jsonl"), [json.dumps(pair(1)), bad, json.dumps(pair(3))]
    (tmp_path / name).write_text(f"[{', '.join(lines)}]" if array else "\n".join(lines))
    key = "content" if nested else "completion"
    assert f"{name}:2: the key '{key}' is given twice in one object; mend it" in refusal(tmp_path, path=name)
    loaded = load(tmp_path, path=name, bad_rows="drop")
    assert [row.id for row in loaded.rows] == ["en/1", "en/3"]
    assert loaded.account.bad["a key given twice"].rows == 1
    assert balanced(loaded.account)


def test_equal_keys_of_different_objects_are_fine(tmp_path):
    write(tmp_path, "a.jsonl", [pair(1, more={"prompt": "x", "rest": [{"prompt": 1}, {"prompt": 2}]})])
    assert load(tmp_path).account.bad == {}


def test_a_null_character_makes_a_bad_row(tmp_path):
    write(tmp_path, "a.jsonl", [pair(1), {"prompt": "a", "completion": "b\0c"}])
    assert "a.jsonl:2: 'completion' holds U+0000, which is no text; mend it" in refusal(tmp_path)
    assert load(tmp_path, bad_rows="drop").account.bad["U+0000"].rows == 1


def test_rows_with_a_replacement_character_are_kept_and_counted(tmp_path):
    rows = [pair(1), pair(2, completion="caf\ufffd"), {"prompt": "\ufffd?", "chosen": "a", "rejected": "b"}]
    write(tmp_path, "a.jsonl", [*rows, {"prompt": "?", "chosen": "a", "rejected": "\ufffd"}])
    account = load(tmp_path).account
    assert (account.kept, account.replaced.rows, account.replaced.first) == ({"en": 4}, 3, "a.jsonl:2")
    line = account_line("x", account)
    assert line == "data x: 4 rows (en 4); 3 with U+FFFD, where a character was lost before (first a.jsonl:2)"
    told = json.loads(json.dumps(account.to_json()))
    assert type(account).from_json(told) == account
    del told["replaced"]  # as records had it before
    assert type(account).from_json(told).replaced.rows == 0


# Limits


def test_a_limit_keeps_the_first_rows_of_each_language_and_stops_reading(tmp_path):
    for lang in ("en", "fr"):
        write(tmp_path, f"a.{lang}.jsonl", [pair(1), pair(2), pair(3), "this is never read"])
    loaded = load(tmp_path, ["en", "fr"], path="a.{lang}.jsonl", limit=2)
    assert [row.id for row in loaded.rows] == ["en/1", "en/2", "fr/1", "fr/2"]
    assert (loaded.account.read, loaded.account.limit_reached) == (4, ["en", "fr"])
    assert "limit reached in en, fr" in account_line("x", loaded.account)


def test_a_limit_on_a_file_of_several_languages_reads_on_until_each_is_full(tmp_path):
    named = ["en", "en", "en", "fr", "de", "fr", "en"]
    write(tmp_path, "a.jsonl", [pair(index, lang=name) for index, name in enumerate(named)])
    account = load(tmp_path, ["en", "fr"], lang_column="lang", limit=2).account
    assert (account.read, account.kept, account.beyond_limit) == (6, {"en": 2, "fr": 2}, 1)
    assert balanced(account)


def test_a_limit_that_is_not_reached_changes_nothing(tmp_path):
    write(tmp_path, "a.jsonl", [pair(1), pair(2)])
    assert load(tmp_path, limit=5) == load(tmp_path)
    assert load(tmp_path, limit=5).account.limit_reached == []


def test_a_bad_row_does_not_count_towards_the_limit(tmp_path):
    write(tmp_path, "a.jsonl", [BAD["empty text"], pair(2), pair(3), pair(4)])
    loaded = load(tmp_path, limit=2, bad_rows="drop")
    assert [row.id for row in loaded.rows] == ["en/2", "en/3"]


# The account

RECORDS = st.lists(
    st.one_of(
        st.builds(
            lambda i, lang: pair(i, lang=lang), st.integers(0, 9), st.sampled_from(["en", "fr", "de", None, "?"])
        ),
        st.sampled_from(list(BAD.values())),
    ),
    max_size=30,
)


@given(RECORDS, st.one_of(st.none(), st.integers(1, 4)))
def test_every_record_that_was_read_is_counted_once(tmp_path_factory, records, limit):
    folder = tmp_path_factory.mktemp("any")
    write(folder, "a.jsonl", [pair(100, lang="en"), pair(101, lang="fr"), *records])
    loaded = load(folder, ["en", "fr"], lang_column="lang", bad_rows="drop", limit=limit)
    account = loaded.account
    assert balanced(account)
    assert sum(account.kept.values()) == len(loaded.rows)
    assert account.read <= len(records) + 2
    assert limit is None or max(account.kept.values()) <= limit
    assert json.loads(json.dumps(account.to_json())) == account.to_json()


def test_an_account_is_the_same_wherever_the_files_stand(tmp_path):
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        write(tmp_path / folder, "a.jsonl", [pair(1), BAD["empty text"], BAD["unknown role"]])
    one, two = (load(tmp_path / folder, bad_rows="drop").account for folder in ("one", "two"))
    assert one == two
    assert str(tmp_path) not in json.dumps(one.to_json())


def test_a_line_for_people_names_every_kind_with_its_first_row(tmp_path):
    write(tmp_path, "a.jsonl", [pair(1), BAD["empty text"], BAD["unknown role"], BAD["empty text"]])
    line = account_line("chat", load(tmp_path, bad_rows="drop").account)
    assert line.startswith("data chat: 1 of 4 rows (en 1); 3 bad dropped (2 empty text, 1 unknown role; ")
    assert "first empty text: a.jsonl:2: 'completion' is empty" in line
    assert "first unknown role: a.jsonl:3: " in line


def test_a_data_set_of_none_of_the_languages_is_said_to_be_unread(tmp_path):
    loaded = load(tmp_path, ["en", "fr"], lang="de")
    assert loaded.rows == []
    assert account_line("x", loaded.account) == "data x: not read, it has none of the languages asked for"


def test_an_account_comes_back_from_its_record_as_it_was(tmp_path):
    write(tmp_path, "a.jsonl", [pair(1, lang="en"), BAD["empty text"], pair(2, lang="de"), pair(3, lang="en")])
    account = load(tmp_path, lang_column="lang", bad_rows="drop", limit=2).account
    again = type(account).from_json(json.loads(json.dumps(account.to_json())))
    assert again == account
    assert account_line("x", again) == account_line("x", account)


# Identity


def test_choices_that_can_change_the_rows_are_told_and_defaults_are_not():
    plain = DataSource(path="a.jsonl")
    assert plain.choices() == {}
    chosen = dataclasses.replace(plain, lang_column="lang", limit=3, bad_rows="drop")
    assert chosen.choices() == {"lang_column": "lang", "limit": 3, "bad_rows": "drop"}


# Rows that are unfit for what they are loaded for


def unfit(loaded, *ids):
    return [(row, RowError("too big", kind="size", do="shrink it")) for row in loaded.rows if row.id in ids]


def test_unfit_rows_are_taken_out_and_counted_like_bad_ones_that_reading_found(tmp_path):
    write(tmp_path, "a.jsonl", [pair(1), pair(2, completion=""), pair(3), pair(4)])
    source = DataSource(path="a.jsonl", bad_rows="drop")
    loaded = load_rows(source, ["en"], tmp_path)
    left = take_out(loaded, source, unfit(loaded, "en/3", "en/4"))
    assert [row.id for row in left.rows] == ["en/1"]
    assert left.account.kinds() == "2 size, 1 empty text"
    assert left.account.bad["size"].first == "a.jsonl:3: too big"
    assert balanced(left.account)
    assert loaded.account.kept == {"en": 3}, "the first account stays as it was"


def test_unfit_rows_are_refused_with_file_and_row_where_bad_ones_are(tmp_path):
    write(tmp_path, "a.jsonl", [pair(1), pair(2)])
    source = DataSource(path="a.jsonl")
    loaded = load_rows(source, ["en"], tmp_path)
    with pytest.raises(DataError) as caught:
        take_out(loaded, source, unfit(loaded, "en/2"))
    assert str(caught.value) == f"{tmp_path}/a.jsonl:2: too big; shrink it, or set bad_rows: drop"
    assert take_out(loaded, source, []).rows == loaded.rows


def test_a_language_of_unfit_rows_only_is_refused_with_what_was_dropped(tmp_path):
    for lang in ("en", "fr"):
        write(tmp_path, f"a.{lang}.jsonl", [pair(1)])
    source = DataSource(path="a.{lang}.jsonl", bad_rows="drop")
    loaded = load_rows(source, ["en", "fr"], tmp_path)
    with pytest.raises(DataError, match=r"no rows for language 'fr' in 2 records \(1 size dropped\)"):
        take_out(loaded, source, unfit(loaded, "fr/1"))
