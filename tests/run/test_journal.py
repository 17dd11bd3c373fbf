"""The event log: valid JSON lines whatever was killed, every run with its beginning and its end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from mixmerge.errors import CheckpointError, FullDiskError
from mixmerge.machine import named_gpus
from mixmerge.plan.graph import Plan
from mixmerge.run.journal import Journal, add_line


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def of_run(study, *arguments: str) -> list[dict]:
    """The events that one command adds."""
    path = study.out / "runs" / "tiny" / "events.jsonl"
    before = len(lines(path)) if path.exists() else 0
    study.call(*arguments)
    return lines(path)[before:]


def empty(path: Path, error: BaseException | None = None, failed: list[str] | None = None) -> None:
    """A run without steps, which may end with an error."""
    plan = Plan("empty", (), {}, called={"argv": ["mixmerge", "run"], "folder": "/here"})
    with Journal(path).run(plan, left=0, came_to=lambda: {"done": 0, "failed": failed or [], "left": 0}):
        if error is not None:
            raise error


def test_a_line_that_was_cut_short_is_closed_and_spoils_no_other(tmp_path):
    path = tmp_path / "events.jsonl"
    path.write_text('{"event": "begin"}\n{"event": "sta')
    add_line(path, b'{"event": "begin"}\n')
    add_line(path, b'{"event": "end"}\n')
    assert path.read_text().splitlines() == [
        '{"event": "begin"}',
        '{"event": "sta',
        '{"event": "begin"}',
        '{"event": "end"}',
    ]


def test_lines_of_many_writers_never_mix(tmp_path):
    path = tmp_path / "events.jsonl"

    def write(name: str) -> None:
        for at in range(50):
            add_line(path, json.dumps({"name": name * 200, "at": at}).encode() + b"\n")

    writers = [threading.Thread(target=write, args=(name,)) for name in "abcd"]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    found = lines(path)
    assert len(found) == 200
    for name in "abcd":
        assert [line["at"] for line in found if line["name"][0] == name] == list(range(50))


def test_a_writer_that_is_killed_at_any_moment_leaves_at_most_one_line_that_is_none(tmp_path, helpers):
    path = tmp_path / "events.jsonl"
    code = (
        "import sys; from pathlib import Path; from mixmerge.run.journal import Journal\n"
        "journal = Journal(Path(sys.argv[1])); print('ready', flush=True)\n"
        "while True: journal.note({'event': 'note', 'text': 'x' * 5000})\n"
    )
    for _ in range(3):
        process = subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE)
        process.stdout.readline()
        before = path.stat().st_size if path.exists() else 0
        helpers.wait(lambda before=before: path.exists() and path.stat().st_size > before + 50_000, "it writes")
        process.send_signal(signal.SIGKILL)
        process.communicate()
        with path.open("ab") as file:
            file.write(b'{"event": "no')  # as a machine that loses its power leaves it
    Journal(path).note({"event": "note", "text": "after"})
    told = path.read_text(encoding="utf-8").splitlines()
    # the kill itself may have cut a line as well: the three ends are then on it
    assert sum(line.endswith('{"event": "no') for line in told) == 3
    whole = [json.loads(line) for line in told if line.endswith("}")]
    assert len(whole) == len(told) - 3
    assert whole[-1]["text"] == "after"


def test_a_run_tells_its_words_its_folder_and_what_it_came_to(finished, tmp_path):
    path = finished.study.out / "runs" / "tiny" / "events.jsonl"
    told = lines(path)
    first, last = told[0], next(event for event in told if event["event"] == "end")
    assert first["event"] == "begin"
    assert first["argv"][1:3] == ["run", str(finished.study.recipe)]
    assert (first["study"], first["steps"], first["left"]) == ("tiny", 32, 32)
    assert Path(first["folder"]).is_dir()
    assert (last["outcome"], last["done"], last["failed"], last["left"]) == ("done", 32, [], 0)
    assert last["run"] == first["run"]
    assert last["at"] - first["at"] <= last["seconds"] + 1


def test_every_event_of_a_step_has_its_name_and_every_start_its_process(finished):
    told = lines(finished.study.out / "runs" / "tiny" / "events.jsonl")
    own = [event for event in told if "step" in event]
    assert {"train/mix", "merge/ties", "score/tiny"} <= {event["title"] for event in own}
    for event in own:
        if event["event"] == "start":
            assert event["pid"] != os.getpid()
            assert event["host"] == os.uname().nodename
            assert event["gpus"] == (named_gpus() or [])
    done = {event["title"]: event["measurements"] for event in own if event["event"] == "done"}
    assert done["train/mix"]["steps"] > 0


def test_a_run_that_has_nothing_to_do_and_a_step_by_hand_say_so(finished, tmp_path):
    copy = finished.copy(tmp_path / "copy")
    begin, end = of_run(copy, "run")
    assert (begin["left"], end["outcome"], end["done"]) == (0, "done", 0)
    one = of_run(copy, "step", "merge/ties")
    assert [event["event"] for event in one] == ["begin", "end"]
    assert one[0]["argv"][1] == "step"


@pytest.mark.parametrize(
    ("error", "outcome"), [(KeyboardInterrupt(), "interrupted"), (FullDiskError("no space left"), "error")]
)
def test_an_end_by_an_interruption_or_an_error_is_told_and_goes_on(tmp_path, error, outcome):
    path = tmp_path / "events.jsonl"
    with pytest.raises(type(error)):
        empty(path, error)
    begin, end = lines(path)
    assert begin["argv"] == ["mixmerge", "run"]
    assert end["outcome"] == outcome
    assert end["error"].startswith(type(error).__name__)


def test_failures_make_the_outcome_and_how_far_a_step_is_is_no_line(tmp_path):
    path = tmp_path / "events.jsonl"
    empty(path, failed=["abc"])
    Journal(path).note({"event": "progress", "step": "abc", "done": 1, "total": 2})
    assert [line["event"] for line in lines(path)] == ["begin", "end"]
    assert lines(path)[-1]["outcome"] == "failed"


def test_two_runs_of_one_log_are_told_apart(tmp_path):
    path = tmp_path / "events.jsonl"
    empty(path)
    empty(path)
    assert len({line["run"] for line in lines(path)}) == 2


def test_text_that_is_no_unicode_and_line_breaks_keep_the_log_whole(tmp_path):
    path = tmp_path / "events.jsonl"
    Journal(path).note({"event": "failed", "error": "a\nb\u2028c \udcff", "place": Path("/x")})
    [line] = [json.loads(line) for line in path.read_bytes().split(b"\n") if line]
    assert line["error"].startswith("a\nb\u2028c ")


def test_a_log_that_cannot_be_written_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"events\.jsonl"):
        Journal(tmp_path / "nowhere" / "events.jsonl").note({"event": "note"})


def test_the_gpus_of_a_step_are_those_that_it_was_given(monkeypatch):
    for said, gpus in (("0,1", ["0", "1"]), ("", []), ("-1", []), (" GPU-ab , 3", ["GPU-ab", "3"])):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", said)
        assert named_gpus() == gpus
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert named_gpus() is None
