"""What a process tells the one that started it: events on standard output, all else elsewhere."""

from __future__ import annotations

import subprocess
import sys
from threading import Thread

import pytest

from mixmerge.events import read_events

CHILD = """
import os, sys
from threading import Thread
from mixmerge.events import take_stdout

emit = take_stdout()
print("a library prints")
os.system("echo a child of it prints")
threads = [Thread(target=lambda n=n: [emit("step", thread=n, at=at, said="привет\\n") for at in range(100)]) for n in range(4)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
os.write(1, b"and so does C\\n")
emit("done")
"""


def told() -> tuple[list[dict], str]:
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, encoding="utf-8"
    )
    log: list[str] = []
    reader = Thread(target=lambda: log.append(child.stderr.read()))
    reader.start()
    events = list(read_events(child.stdout))
    reader.join()
    child.stdout.close()
    child.stderr.close()
    assert child.wait() == 0
    return events, log[0]


def test_events_of_many_threads_come_whole_and_in_their_order():
    events, _ = told()
    assert events.pop() == {"event": "done"}
    assert len(events) == 400
    for thread in range(4):
        own = [event for event in events if event["thread"] == thread]
        assert own == [{"event": "step", "thread": thread, "at": at, "said": "привет\n"} for at in range(100)]


def test_what_is_printed_goes_to_standard_error_whoever_prints_it():
    _, log = told()
    assert sorted(log.splitlines()) == ["a child of it prints", "a library prints", "and so does C"]


def test_half_a_line_of_a_killed_process_is_no_event():
    assert list(read_events(['{"event": "progress", "done": 1}\n', '{"event": "pro'])) == [
        {"event": "progress", "done": 1}
    ]


def test_what_others_write_between_events_goes_beside_them_and_is_an_error_where_nobody_may():
    lines = ['{"event": "done"}\n', "job 7 queued\n", "3\n", '{"no": "event"}\n', '{"event": "cut']
    beside: list[str] = []
    assert list(read_events(lines, beside.append)) == [{"event": "done"}]
    assert beside == lines[1:]
    for odd, said in zip(lines[1:4], ("Expecting value", "no event: '3", "no event: "), strict=True):
        with pytest.raises(ValueError, match=said):
            list(read_events([odd]))
