"""A text file appears whole or not at all, and a failed writing leaves nothing."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

from mixmerge.whole import write_whole


def test_a_file_is_replaced_as_a_whole_in_utf8_with_its_own_line_ends(tmp_path):
    path = tmp_path / "rows.jsonl"
    for text in ("one\n", "नमस्ते\nдва\n"):
        write_whole(path, text)
        assert path.read_bytes() == text.encode()
    assert [file.name for file in tmp_path.iterdir()] == ["rows.jsonl"]


def test_several_that_write_at_once_never_mix_their_bytes(tmp_path):
    path = tmp_path / "rows.jsonl"
    texts = [str(number) * 50_000 for number in range(8)]
    with ThreadPoolExecutor(8) as crowd:  # one pid, as two machines may have
        list(crowd.map(lambda text: [write_whole(path, text) for _ in range(10)], texts))
    assert path.read_text() in texts
    assert [file.name for file in tmp_path.iterdir()] == ["rows.jsonl"]


def test_what_cannot_be_written_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "rows.jsonl"
    write_whole(path, "old")
    with pytest.raises(UnicodeEncodeError):
        write_whole(path, "new \ud800")
    assert path.read_text() == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["rows.jsonl"]
