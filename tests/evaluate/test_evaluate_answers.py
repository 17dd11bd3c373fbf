"""The file of answers: what is in it stays, what damages it is named."""

from __future__ import annotations

import os
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from mixmerge.errors import CheckpointError
from mixmerge.evaluate.answers import Answers, Reply, Spent, changed_answers, request_key
from mixmerge.evaluate.client import Client


def damage(path: Path, kind: str) -> None:
    if kind == "text":
        path.write_text("these are not answers " * 100)
    elif kind == "cut":
        content = path.read_bytes()
        path.write_bytes(content[: len(content) // 2 // 4096 * 4096 + 100])
    elif kind == "page":
        content = bytearray(path.read_bytes())
        content[4096 : 4096 * 4] = os.urandom(4096 * 3)
        path.write_bytes(content)


@pytest.mark.parametrize("kind", ["text", "cut", "page"])
def test_a_damaged_file_is_named_with_what_to_do(tmp_path, kind):
    path = tmp_path / "a.db"
    answers = Answers(path)
    answers.keep("s", [(bytes([n]) * 32, Reply(200, b"x" * 900)) for n in range(200)], Spent(200))
    answers.close()
    damage(path, kind)
    with pytest.raises(CheckpointError, match=r"a\.db: the file of answers is damaged .*\.recover.*move it away"):
        Client(["http://127.0.0.1:9/v1"], answers=path)


def test_a_damaged_row_is_named_and_not_asked_again(tmp_path):
    body = {"messages": []}
    answers = Answers(tmp_path / "a.db")
    answers.keep("s", [(request_key("s", body), Reply(200, b'{"choices": [{"mess'))], Spent(1))
    answers.close()
    client = Client(["http://127.0.0.1:9/v1"], answers=tmp_path / "a.db", scope="s")
    with client, pytest.raises(CheckpointError, match=r"was damaged after it was written; move the file away"):
        client.ask([body])


def test_an_answer_that_changed_on_the_disk_is_told_of_and_is_not_there(tmp_path, caplog):
    path = tmp_path / "a.db"
    answers = Answers(path)
    rows = [(bytes([n]) * 32, Reply(200, b"verdict %02d A" % n)) for n in range(10)]
    answers.keep("s", rows, Spent(10))
    answers.close()
    path.write_bytes(
        path.read_bytes().replace(b"verdict 04 A", b"verdict 04 B").replace(b"verdict 07 A", b"verdict 97 A")
    )
    answers = Answers(path)
    whole = {key: reply for key, reply in rows if key[0] not in (4, 7)}
    assert answers.find([key for key, _ in rows]) == whole
    assert caplog.messages == [f"{path}: answers that changed since they were kept, and are asked for again: 2"]
    assert answers.find([key for key, _ in rows]) == whole
    assert len(caplog.messages) == 1
    answers.keep("s", [rows[4]], Spent(1))
    assert answers.find([rows[4][0]]) == dict([rows[4]]), "the new one counts"
    assert answers.spent("s") == Spent(11)
    answers.close()


@pytest.mark.parametrize("bit", [1, 0x80])
@pytest.mark.parametrize("at", range(0, 200, 7))
def test_a_flip_anywhere_in_a_row_is_an_answer_that_is_not_there_or_damage_that_is_named(tmp_path, at, bit):
    path = tmp_path / "a.db"
    answers = Answers(path)
    rows = [(bytes([n]) * 32, Reply(200, b"%02d verdict " % n * 9)) for n in range(9)]
    answers.keep("s", rows, Spent(9))
    answers.close()
    data = bytearray(path.read_bytes())
    data[data.index(rows[4][0]) - 8 + at] ^= bit
    path.write_bytes(data)
    try:
        answers = Answers(path)
        found = answers.find([key for key, _ in rows])
        assert found.items() <= dict(rows).items(), "no other answer is taken for one of these"
        assert len(found) >= 7
        answers.keep("s", rows, Spent(9))
        assert answers.find([key for key, _ in rows]) == dict(rows)
        answers.close()
    except CheckpointError as error:
        assert "the file of answers is damaged" in str(error)  # noqa: PT017


def test_an_answer_that_another_process_asked_for_again_meanwhile_stays(tmp_path):
    path = tmp_path / "a.db"
    one = Answers(path)
    one.keep("s", [(b"k" * 32, Reply(200, b"verdict A"))], Spent(1))
    one.close()
    path.write_bytes(path.read_bytes().replace(b"verdict A", b"verdict B"))
    one, other = Answers(path), Answers(path)
    changed = changed_answers(one._reader)
    assert other.find([b"k" * 32]) == {}
    other.keep("s", [(b"k" * 32, Reply(200, b"verdict C"))], Spent(1))
    one._remove(changed)
    assert one.find([b"k" * 32]) == {b"k" * 32: Reply(200, b"verdict C")}
    one.close()
    other.close()


def test_a_file_of_an_older_version_is_read_on_and_believed(tmp_path):
    path = tmp_path / "a.db"
    rows = [(bytes([n]) * 32, Reply(200, b"verdict")) for n in range(3)]
    answers = Answers(path)
    answers.keep("s", rows[:2], Spent(2))
    answers.close()
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("ALTER TABLE answers DROP COLUMN xxh3")
        connection.execute("PRAGMA user_version=1")
    for _ in range(2):
        answers = Answers(path)
        answers.keep("s", rows, Spent(3))
        assert answers.find([key for key, _ in rows]) == dict(rows)
        answers.remove_changed()
        answers.close()
    path.write_bytes(path.read_bytes().replace(b"verdict", b"VERDICT"))
    answers = Answers(path)
    assert sorted(answers.find([key for key, _ in rows])) == [key for key, _ in rows[:2]], "only the third has a digest"
    answers.close()


def test_the_first_reply_to_a_request_stays_and_both_are_paid(tmp_path):
    one, other = Answers(tmp_path / "a.db"), Answers(tmp_path / "a.db")
    one.keep("s", [(b"k", Reply(200, b"first"))], Spent(1, 0, 10, 5))
    assert other.keep("s", [(b"k", Reply(200, b"second"))], Spent(1, 0, 10, 5)) == Spent(2, 0, 20, 10)
    assert one.find([b"k", b"unknown"]) == {b"k": Reply(200, b"first")}
    assert (one.spent("s"), one.spent("another")) == (Spent(2, 0, 20, 10), Spent())
    one.close()
    other.close()


def test_more_keys_than_one_query_takes_are_found(tmp_path):
    answers = Answers(tmp_path / "a.db")
    rows = [(n.to_bytes(32, "big"), Reply(200, b"\xff\x00")) for n in range(2500)]
    answers.keep("s", rows, Spent(2500))
    assert answers.find([key for key, _ in rows]) == dict(rows)
    answers.close()


def test_an_answer_is_synced_and_logged_before_it_counts(tmp_path):
    answers = Answers(tmp_path / "a.db")
    settings = [answers._writer.execute(f"PRAGMA {name}").fetchone()[0] for name in ("journal_mode", "synchronous")]
    answers.close()
    assert settings == ["wal", 2], "2 is FULL"


def test_a_database_of_another_program_is_left_alone(tmp_path):
    path = tmp_path / "a.db"
    connection = sqlite3.connect(path)
    connection.execute("CREATE TABLE mine (x)")
    connection.commit()
    connection.close()
    with pytest.raises(CheckpointError, match=r"not a file of answers .*another path"):
        Answers(path)
    connection = sqlite3.connect(path)
    assert connection.execute("SELECT name FROM sqlite_master").fetchall() == [("mine",)]
    connection.close()


def test_a_path_that_cannot_be_a_file_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"cannot be read or written .*its folder"):
        Answers(tmp_path)


def test_what_was_spent_can_be_added_up():
    assert Spent(1, 2, 30, 40) + Spent(1, 0, 1, 1) * 2 == Spent(3, 2, 32, 42)
    assert Spent(1, 2, 30, 40).requests == 3
