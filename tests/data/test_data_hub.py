"""Hub data sets through the real `datasets`, on local folders laid out as on the Hub: no network, nothing replaced."""

import json
import shutil

import datasets
import pytest

from mixmerge.data.loading import load_rows
from mixmerge.data.sources import DataSource, fingerprint, read_records
from mixmerge.errors import DataError

CARD = """---
configs:
- config_name: en
  data_files:
  - {split: train, path: en/train.jsonl}
  - {split: test, path: en/test.jsonl}
- config_name: fr
  data_files:
  - {split: train, path: fr/train.jsonl}
---
"""


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """`datasets` reads its cache's place once, at import."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def pair(index, **more):
    return {"prompt": f"question {index}", "completion": f"answer {index}"} | more


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@pytest.fixture
def by_config(tmp_path):
    """A data set with a configuration per language."""
    folder = tmp_path / "by-config"
    write(folder / "en/train.jsonl", [pair(i) for i in range(4)])
    write(folder / "en/test.jsonl", [pair(9)])
    write(folder / "fr/train.jsonl", [pair(i, completion=f"réponse {i}") for i in range(3)])
    (folder / "README.md").write_text(CARD, encoding="utf-8")
    return folder


def typed(tmp_path, rows, features):
    """A data set in Parquet whose types `datasets` itself wrote."""
    folder = tmp_path / "typed"
    folder.mkdir()
    datasets.Dataset.from_list(rows, features=datasets.Features(features)).to_parquet(folder / "train.parquet")
    return folder


def load(tmp_path, languages=("en",), **options):
    return load_rows(DataSource(**({"split": "train"} | options)), list(languages), tmp_path)


def refusal(*args, **named):
    with pytest.raises(DataError) as caught:
        load(*args, **named)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_configuration_per_language_is_named_by_lang(tmp_path, by_config, streaming):
    loaded = load(tmp_path, ["en", "fr"], hub="./by-config", config="{lang}", streaming=streaming)
    assert loaded.account.kept == {"en": 4, "fr": 3}
    assert loaded.rows[4].completion == "réponse 0"
    assert loaded.rows[4].id == "fr/1"


def test_the_split_is_the_one_that_was_asked_for(tmp_path, by_config):
    assert [row.completion for row in load(tmp_path, hub="./by-config", config="en", split="test").rows] == ["answer 9"]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("options", "said"),
    [({"config": "de"}, "'de' not found"), ({"config": "en", "split": "dev"}, "plit"), ({}, "Config name is missing")],
)
def test_a_configuration_or_split_that_is_not_there_is_one_line(tmp_path, by_config, streaming, options, said, capfd):
    message = refusal(tmp_path, hub="./by-config", streaming=streaming, **options)
    assert message.startswith("hub:./by-config/")
    assert "cannot load the data set" in message
    assert said in message
    assert capfd.readouterr().err == "", "no log lines, no progress bars"


def test_streaming_gives_the_rows_and_the_fingerprint_of_reading_whole(tmp_path, by_config):
    whole, stream = (
        DataSource(hub="./by-config", config="{lang}", split="train", streaming=streaming)
        for streaming in (False, True)
    )
    assert load_rows(whole, ["en", "fr"], tmp_path) == load_rows(stream, ["en", "fr"], tmp_path)
    assert fingerprint(whole, ["en", "fr"], tmp_path) == fingerprint(stream, ["en", "fr"], tmp_path)
    assert whole.choices() == stream.choices()


def test_streaming_with_a_limit_reads_no_more_than_it_needs(tmp_path):
    folder = tmp_path / "large"
    rows = [pair(i) for i in range(1000)]
    write(folder / "train-0.jsonl", rows)
    (folder / "train-1.jsonl").write_text("this is no JSON and is never read\n")
    loaded = load(tmp_path, hub="./large", streaming=True, limit=10)
    assert (len(loaded.rows), loaded.account.read, loaded.account.limit_reached) == (10, 10, ["en"])
    assert "cannot load the data set" in refusal(tmp_path, hub="./large", limit=10)


def test_a_data_set_that_breaks_while_it_streams_is_named_with_its_row(tmp_path, capfd):
    folder = tmp_path / "large"
    write(folder / "train-0.jsonl", [pair(i) for i in range(5)])
    (folder / "train-1.jsonl").write_text('{"prompt": "q"\n')
    assert "hub:./large/train:6: cannot read on: " in refusal(tmp_path, hub="./large", streaming=True)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("streaming", [False, True])
def test_a_language_column_of_class_labels_is_read_by_name(tmp_path, streaming):
    text, label = datasets.Value("string"), datasets.ClassLabel(names=["English", "fr", "de"])
    rows = [pair(i, language=number) for i, number in enumerate([0, 1, 2, 0, -1])]
    typed(tmp_path, rows, {"prompt": text, "completion": text, "language": label})
    loaded = load(tmp_path, ["en", "fr"], hub="./typed", lang_column="language", bad_rows="drop", streaming=streaming)
    assert [row.lang for row in loaded.rows] == ["en", "fr", "en"]
    assert loaded.account.other_language == {"de": 1}
    assert loaded.account.bad["no language"].rows == 1


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", ["list of structures", "structure of lists"])
def test_messages_are_read_in_either_type_that_datasets_has_for_them(tmp_path, kind, streaming):
    text = datasets.Value("string")
    turn = {"role": text, "content": text}
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    if kind == "list of structures":
        typed(tmp_path, [{"messages": turns}], {"messages": datasets.List(turn)})
    else:
        columns = {"role": ["user", "assistant"], "content": ["q", "a"]}
        typed(tmp_path, [{"messages": columns}], {"messages": {key: datasets.List(text) for key in turn}})
    (row,) = load(tmp_path, hub="./typed", streaming=streaming).rows
    assert (row.prompt, row.completion) == ([{"role": "user", "content": "q"}], "a")


def test_turns_that_a_table_gave_empty_keys_of_other_rows_are_read_by_those_they_fill(tmp_path):
    text = datasets.Value("string")
    keys = dict.fromkeys(("from", "value", "role", "content"), text)
    one = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    two = [{"from": "human", "value": "r"}, {"from": "gpt", "value": "b"}]
    full = [{"messages": [dict.fromkeys(keys) | turn for turn in turns]} for turns in (one, two)]
    typed(tmp_path, full, {"messages": datasets.List(keys)})
    assert [row.completion for row in load(tmp_path, hub="./typed").rows] == ["a", "b"]


def test_integer_ids_are_ids_and_an_integer_answer_is_no_text(tmp_path):
    text, number = datasets.Value("string"), datasets.Value("int64")
    rows = [{"id": 7, "prompt": "q", "completion": "a"}]
    folder = typed(tmp_path, rows, {"id": number, "prompt": text, "completion": text})
    assert load(tmp_path, hub="./typed").rows[0].id == "en/7"
    shutil.rmtree(folder)
    typed(tmp_path, [{"prompt": "q", "completion": 3}], {"prompt": text, "completion": number})
    assert "hub:./typed/train:1: 'completion' is int, expected text" in refusal(tmp_path, hub="./typed")


def test_bad_rows_of_a_hub_data_set_are_dropped_and_counted_with_their_place(tmp_path):
    write(tmp_path / "set/train.jsonl", [pair(1), pair(2, completion=""), pair(3)])
    account = load(tmp_path, hub="./set", bad_rows="drop").account
    assert account.kept == {"en": 2}
    assert account.bad["empty text"].first == "hub:./set/train:2: 'completion' is empty"


def test_a_local_folder_is_known_by_its_contents_and_not_by_its_place(tmp_path, by_config):
    def known(folder, hub="./by-config"):
        return fingerprint(DataSource(hub=hub, config="en", split="train"), ["en"], folder)

    before = known(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    shutil.copytree(by_config, tmp_path / "elsewhere" / "set")
    assert known(tmp_path / "elsewhere", "./set") == before
    assert known(tmp_path, f"{tmp_path}/elsewhere/set") == before
    (by_config / "README.md").write_text(CARD.replace("en/test", "en/train"), encoding="utf-8")
    assert known(tmp_path) != before


def test_a_local_folder_that_is_not_there_is_named(tmp_path):
    assert refusal(tmp_path, hub="./nothing") == (
        "hub:./nothing: cannot load the data set: no such folder; for one file use 'path'"
    )


def test_a_reader_that_stops_early_leaves_the_librarys_settings_as_they_were(tmp_path, by_config):
    before = (datasets.is_progress_bar_enabled(), datasets.logging.get_verbosity())
    records = read_records(DataSource(hub="./by-config", config="en", split="train"), "en", tmp_path)
    next(records)
    records.close()
    assert (datasets.is_progress_bar_enabled(), datasets.logging.get_verbosity()) == before


def test_the_hub_that_cannot_be_reached_is_one_line(tmp_path):
    message = refusal(tmp_path, hub="nobody/there-is-no-such-set")
    assert message.startswith("hub:nobody/there-is-no-such-set/train: cannot load the data set: ")
    assert "that the Hub can be reached" in message
