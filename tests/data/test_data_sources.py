import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from mixmerge.data.sources import DataSource, fingerprint, read_records, resolve, source_languages
from mixmerge.errors import DataError


def records(path, tmp_path, lang="en"):
    return list(read_records(DataSource(path=str(path)), lang, tmp_path))


def refusal(call, *args, **named):
    with pytest.raises(DataError) as caught:
        call(*args, **named)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_jsonl_records_come_with_their_line_and_blank_lines_still_count(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"x": 1}\n\n{"x": "é"}\n', encoding="utf-8")
    file = tmp_path / "a.jsonl"
    assert records("a.jsonl", tmp_path) == [(f"{file}:1", {"x": 1}), (f"{file}:3", {"x": "é"})]


def test_a_byte_order_mark_is_no_part_of_the_first_record(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"x": 1}\n')
    assert records("a.jsonl", tmp_path)[0][1] == {"x": 1}


def test_a_json_array_is_read_record_by_record(tmp_path):
    (tmp_path / "a.json").write_text('[{"x": 1},\n {"x": 2}]', encoding="utf-8")
    assert [(where.rsplit(":", 1)[1], record) for where, record in records("a.json", tmp_path)] == [
        ("1", {"x": 1}),
        ("2", {"x": 2}),
    ]


@pytest.mark.parametrize(("name", "mark"), [("a.csv", ","), ("a.tsv", "\t")])
def test_delimited_files_keep_quoted_marks_and_line_breaks(tmp_path, name, mark):
    (tmp_path / name).write_text(f'prompt{mark}completion\n"a{mark}b"{mark}"two\nlines"\nc{mark}d\n', encoding="utf-8")
    assert [record for _, record in records(name, tmp_path)] == [
        {"prompt": f"a{mark}b", "completion": "two\nlines"},
        {"prompt": "c", "completion": "d"},
    ]


def test_parquet_gives_the_records_that_were_written(tmp_path):
    import pyarrow as arrow
    import pyarrow.parquet as parquet

    rows = [{"prompt": f"p{i}", "turns": [{"role": "user", "content": "x"}]} for i in range(3000)]
    parquet.write_table(arrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    read = records("a.parquet", tmp_path)
    assert [record for _, record in read] == rows
    assert read[-1][0].endswith("a.parquet:3000")


def test_a_local_data_set_folder_is_read_through_datasets(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "train.jsonl").write_text('{"prompt": "a", "completion": "b"}\n', encoding="utf-8")
    read = list(read_records(DataSource(hub=str(folder), split="train"), "en", tmp_path))
    assert [record for _, record in read] == [{"prompt": "a", "completion": "b"}]
    assert read[0][0] == f"hub:{folder}/train:1"


def test_a_hub_set_that_cannot_be_loaded_is_named_with_advice(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    source = DataSource(hub=str(tmp_path / "nothing"), split="train")
    message = refusal(lambda: list(read_records(source, "en", tmp_path)))
    assert "cannot load the data set: no such folder" in message


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.jsonl", b'{"x": 1}\n{"x": \xff}\n', "a.jsonl:2: not UTF-8: byte 0xff at column 7"),
        ("a.jsonl", b'{"x": 1}\n{"x": \n', "a.jsonl:2: broken JSON"),
        ("a.jsonl", b'{"x": 1}\n[1]\n', "a.jsonl:2: expected an object, found list"),
        ("a.json", b'[{"x": 1},\n{"x"]', "a.json:2: broken JSON"),
        ("a.json", b'{"x": 1}', "a.json:1: expected an array"),
        ("a.csv", b"a,b\n1,2\n3\n", "a.csv:2: 1 cells under 2 columns"),
        ("a.csv", b'a,b\n"1"x,2\n', "a.csv:1: broken CSV"),
        ("a.parquet", b"PAR1 this is no table", "a.parquet:1: broken Parquet"),
        ("a.xlsx", b"", "a.xlsx: cannot read a '.xlsx' file"),
    ],
)
def test_a_broken_file_is_named_with_its_row(tmp_path, name, content, expected):
    (tmp_path / name).write_bytes(content)
    assert expected in refusal(records, name, tmp_path)


def test_a_missing_file_is_named_with_its_language_and_the_nearest_name(tmp_path):
    (tmp_path / "general.en.jsonl").write_text("{}\n")
    message = refusal(resolve, "general.{lang}.jsonl", lang="bn", relative_to=tmp_path)
    assert "no file for language 'bn'" in message
    assert str(tmp_path / "general.bn.jsonl") in message
    assert "did you mean 'general.en.jsonl'?" in message


def test_a_missing_folder_is_named(tmp_path):
    assert f"the folder {tmp_path / 'no'} does not exist" in refusal(
        resolve, "no/a.jsonl", lang=None, relative_to=tmp_path
    )


@pytest.mark.parametrize(
    "path", ["a.{language}.jsonl", "a.{}.jsonl", "a.{lang!r}.jsonl", "a.{lang:3}.jsonl", "a.{lang"]
)
def test_a_wrong_template_is_refused_with_the_right_one(tmp_path, path):
    assert "the only placeholder is {lang}" in refusal(resolve, path, lang="en", relative_to=tmp_path)


def test_a_template_read_without_language_is_refused(tmp_path):
    assert "without a language" in refusal(resolve, "a.{lang}.jsonl", lang=None, relative_to=tmp_path)


def test_starter_paths_lead_into_the_package_and_not_out_of_it(tmp_path):
    import mixmerge.errors

    package = Path(mixmerge.errors.__file__).parent
    message = refusal(resolve, "starter:train/none.{lang}.jsonl", lang="en", relative_to=tmp_path)
    assert str(package / "starter" / "train" / "none.en.jsonl") in message
    assert "may not leave" in refusal(resolve, "starter:../errors.py", lang=None, relative_to=tmp_path)


def test_a_source_is_a_path_or_a_hub_id_and_not_both():
    assert "both" in refusal(DataSource, path="a", hub="b")
    assert "no path" in refusal(DataSource)


def test_one_file_for_several_languages_is_refused_unless_its_language_is_named():
    assert "one file for 2 languages (en, bn)" in refusal(source_languages, DataSource(path="a.jsonl"), ["en", "bn"])
    assert source_languages(DataSource(path="a.jsonl"), ["en"]) == ["en"]
    assert source_languages(DataSource(path="a.jsonl", lang="bn"), ["en", "bn"]) == ["bn"]
    assert source_languages(DataSource(path="a.jsonl", lang="bn"), ["en"]) == []
    assert source_languages(DataSource(hub="x/y", config="{lang}"), ["en", "bn"]) == ["en", "bn"]


def test_a_fingerprint_follows_contents_and_languages_but_not_place_or_order(tmp_path):
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        for lang in ("en", "bn"):
            (tmp_path / folder / f"a.{lang}.jsonl").write_text(f'{{"x": "{lang}"}}\n')
    source = DataSource(path="a.{lang}.jsonl")
    before = fingerprint(source, ["en", "bn"], tmp_path / "one")
    assert before == fingerprint(source, ["bn", "en"], tmp_path / "two")
    assert before != fingerprint(source, ["en"], tmp_path / "one")
    (tmp_path / "one" / "a.bn.jsonl").write_text('{"x": "other"}\n')
    assert before != fingerprint(source, ["en", "bn"], tmp_path / "one")


def test_a_pinned_hub_commit_needs_no_network_and_every_part_enters(tmp_path):
    commit = "0123456789abcdef0123456789abcdef01234567"
    variants = [
        DataSource(hub="a/b", config="c", split="train", revision=commit),
        DataSource(hub="a/x", config="c", split="train", revision=commit),
        DataSource(hub="a/b", config="x", split="train", revision=commit),
        DataSource(hub="a/b", config="c", split="test", revision=commit),
        DataSource(hub="a/b", config="c", split="train", revision=commit[::-1]),
    ]
    assert len({fingerprint(source, ["en"], tmp_path) for source in variants}) == len(variants)


def test_a_hub_branch_is_fingerprinted_by_the_commit_that_the_hub_names(tmp_path):
    commits = {"main": "a" * 40}
    asked = []

    class Hub(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            body = json.dumps({"_id": "1", "id": "a/b", "sha": commits["main"]}).encode()
            self.send_response(200)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args):
            pass

    server = HTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    code = (
        "from pathlib import Path; from mixmerge.data.sources import DataSource, fingerprint\n"
        "print(fingerprint(DataSource(hub='a/b', split='train', revision='main'), ['en'], Path('.')))"
    )
    # The client reads its endpoint once, at import, so it is asked in a process of its own.
    environment = {**os.environ, "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HUB_OFFLINE": "0"}

    def ask():
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    try:
        first = ask()
        commits["main"] = "b" * 40
        second = ask()
    finally:
        server.shutdown()
        server.server_close()
    assert first != second
    assert any("/api/datasets/a/b" in path for path in asked)
    pinned = DataSource(hub="a/b", split="train", revision="b" * 40)
    assert second == fingerprint(pinned, ["en"], tmp_path)


def test_parquet_text_that_is_not_utf8_is_named(tmp_path):
    import pyarrow as arrow
    import pyarrow.parquet as parquet

    offsets, bad = arrow.py_buffer(b"\x00\x00\x00\x00\x02\x00\x00\x00"), arrow.py_buffer(b"\xff\xfe")
    column = arrow.Array.from_buffers(arrow.string(), 1, [None, offsets, bad])
    parquet.write_table(arrow.table({"prompt": column}), tmp_path / "bad.parquet")
    with pytest.raises(DataError, match=r"bad.parquet:1: broken Parquet: text that is not UTF-8"):
        list(read_records(DataSource(path="bad.parquet"), "en", tmp_path))
