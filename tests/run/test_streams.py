"""Streams as a caller may leave them: closed, or of an encoding that lacks what is printed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import pytest

ROWS = {"é": "ü│𝔘", "name": 'a"\\', "кот": ["\u200d", 3]}
PRINTS = "import json, sys; from mixmerge.cli.printing import ready_streams, {0}; ready_streams(); {0}(*json.loads(sys.argv[1]))"


def say(command: list[str]) -> subprocess.CompletedProcess[str]:
    """Call a command with an ASCII terminal."""
    there = {**os.environ, "PYTHONIOENCODING": "ascii"}
    return subprocess.run(command, env=there, capture_output=True, encoding="ascii", check=True)


@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&-", "<&- >&- 2>&-"])
def test_a_run_whose_streams_are_closed_does_its_work_all_the_same(copy, closed):
    shutil.rmtree(copy.only("report/*"))
    ran = subprocess.run(
        ["sh", "-c", f'exec "$@" {closed}', "sh", *copy.command("run")],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    assert len(copy.records()) == 32
    assert "Traceback" not in ran.stderr
    assert bool(ran.stdout) == (">&-" not in closed.replace("2>&-", ""))
    assert bool(ran.stderr) == ("2>&-" not in closed)


def test_an_error_whose_stream_is_closed_keeps_its_exit_status_and_does_not_go_to_the_answers(study):
    study.edit("method: ties", "method: tise")
    ran = subprocess.run(
        ["sh", "-c", 'exec "$@" 2>&-', "sh", *study.command("plan")], stdout=subprocess.PIPE, check=False
    )
    assert (ran.returncode, ran.stdout) == (2, b"")


def test_a_lineage_is_drawn_in_ascii_where_the_encoding_has_no_more(finished):
    command = finished.study.command("lineage")
    command.insert(5, "ties")
    whole = subprocess.run(command, capture_output=True, encoding="utf-8", check=True).stdout
    plain = say(command).stdout
    assert "├─ " in whole
    assert plain == whole.translate(str.maketrans("├└│─", "|`|-"))


@pytest.mark.parametrize(
    ("printer", "rows"), [("print_json", [ROWS]), ("print_rows", [{"n": "é", "rows": [ROWS]}, "rows"])]
)
def test_json_is_the_same_in_every_encoding(printer, rows):
    said = say([sys.executable, "-c", PRINTS.format(printer), json.dumps(rows)]).stdout
    assert json.loads(said) == rows[0]


def test_what_an_encoding_lacks_is_printed_as_its_escape(finished):
    command = finished.study.command("show", "--example", "1")
    command.insert(5, "mixture/mix")
    assert "\\u27e6" in say(command).stdout
