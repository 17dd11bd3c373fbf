"""What earlier runs left: records by kind and name, and the failures that an event log tells of."""

from __future__ import annotations

import json
import os

import pytest

from mixmerge.plan.graph import REVISIONS, Step
from mixmerge.run.history import MOST, History
from mixmerge.run.store import RECORD, Store


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path)


def finish(store: Store, name: str, number: int = 0, kind: str = "merge"):
    """A finished step with one file; each is a second younger than the one before."""
    step = Step(kind, name, {"number": number})
    (store.begin(step).out / "file").write_text("content")
    record = {"id": step.id, "kind": kind, "name": name, "revision": REVISIONS[kind], "what": dict(step.what)}
    folder = store.commit(step, record | {"inputs": {}, "files": {"file": 7}})
    os.utime(folder / RECORD, (1e9 + number, 1e9 + number))
    return step, folder


def test_the_first_of_a_name_is_the_newest_of_that_very_name(store):
    for number, name in enumerate(("ties", "ties", "ties--x", "linear")):
        finish(store, name, number)
    history = History(store)
    assert history.named("merge", "ties")[0]["what"] == {"number": 1}
    assert history.named("merge", "ties--x")[0]["what"] == {"number": 2}
    assert history.named("merge", "slerp") == []
    assert history.named("train", "ties") == []


def test_a_damaged_step_counts_as_absent(store):
    _, old = finish(store, "ties", 0)
    step, folder = finish(store, "ties", 1)
    (folder / "file").write_text("cut")
    history = History(store)
    assert history.named("merge", "ties")[0]["what"] == {"number": 0}
    assert history.record(step.id) is None
    assert [record["what"]["number"] for record in history.records("merge")] == [0]
    assert "3 bytes" in str(history.damage(step.id))
    assert old.is_dir()


def test_records_of_a_kind_come_newest_first_and_not_without_end(store):
    for number in range(MOST + 3):
        finish(store, f"m{number}", number)
    finish(store, "other", kind="mixture")
    found = History(store).records("merge")
    assert [record["what"]["number"] for record in found] == list(range(MOST + 2, 2, -1))


def test_an_empty_place_has_no_history(store):
    history = History(store, store.root / "runs" / "x" / "events.jsonl")
    step = Step("merge", "ties", {})
    assert (history.find(step.id), history.damage(step.id), history.running(step)) == (None, None, None)
    assert (history.named("merge", "ties"), history.records("merge"), history.failure(step.id)) == ([], [], None)
    assert not history.interrupted(step)
    assert not store.folder.exists()


def test_begun_and_leased_steps_are_seen_as_the_store_sees_them(store):
    step = Step("merge", "ties", {})
    store.begin(step)
    assert History(store).interrupted(step)
    with store.lease(step):
        assert History(store).running(step)["pid"] == os.getpid()
    assert History(store).running(step) is None


@pytest.mark.parametrize(
    ("events", "failed"),
    [
        ([{"event": "failed", "step": "a", "error": "no memory"}], "no memory"),
        ([{"event": "failed", "step": "a", "error": "x"}, {"event": "done", "step": "a"}], None),
        ([{"event": "failed", "step": "a", "error": "x"}, {"event": "start", "step": "a"}], None),
        ([{"event": "start", "step": "a"}, {"event": "failed", "step": "a", "error": "again"}], "again"),
        ([{"event": "failed", "step": "b", "error": "x"}], None),
        ([{"event": "failed", "step": "a"}], "without a word"),
    ],
)
def test_a_step_failed_if_that_is_the_last_that_is_told_of_it(store, events, failed):
    log = store.root / "events.jsonl"
    log.write_text("".join(json.dumps(event) + "\n" for event in events))
    assert History(store, log).failure("a") == failed


def test_an_event_log_that_is_cut_short_or_strange_is_read_as_far_as_it_goes(store):
    log = store.root / "events.jsonl"
    log.write_bytes(b'{"event": "failed", "step": "a", "error": "x"}\n[1]\nnull\n\xff\n{"event": "done", "st')
    assert History(store, log).failure("a") == "x"
