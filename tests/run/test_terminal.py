"""Runs on real terminals, by the real command line: what is seen, how they are ended, and what is left then."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pty
import re
import signal
import struct
import subprocess
import termios
import threading
import time
from pathlib import Path

import psutil
import pytest

from mixmerge.plan.build import build_plan
from mixmerge.plan.graph import Step
from mixmerge.recipe.load import load_recipe
from mixmerge.run.store import Store

ESCAPE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


class Terminal:
    """A command on a terminal of its own, as its foreground job; everything that it writes is kept."""

    def __init__(self, command: list[str], columns: int, environment: dict[str, str]) -> None:
        self.pid, self.end = pty.fork()
        if self.pid == 0:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            for name in ("COLUMNS", "LINES"):  # pytest's workers have them; they would count for more than the terminal
                os.environ.pop(name, None)
            os.execvpe(command[0], command, {**os.environ, **environment})
        fcntl.ioctl(self.end, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
        self.process, self.raw, self.status = psutil.Process(self.pid), b"", None
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        with contextlib.suppress(OSError):  # the other end is gone
            while part := os.read(self.end, 65536):
                self.raw += part

    @property
    def text(self) -> str:
        return ESCAPE.sub("", self.raw.decode(errors="replace"))

    def type(self, text: str) -> None:
        os.write(self.end, text.encode())

    def exit_status(self, seconds: float = 300.0) -> int:
        """Wait for the end."""
        if self.status is None:
            end = time.monotonic() + seconds
            while not (ended := os.waitpid(self.pid, os.WNOHANG))[0]:
                assert time.monotonic() < end, (
                    f"{seconds:.0f} s and no end; the last that it wrote:\n{self.text[-2000:]}"
                )
                time.sleep(0.02)
            self.status = os.waitstatus_to_exitcode(ended[1])
            self._reader.join(10)
        return self.status


@pytest.fixture
def on_terminal():
    """Start a command on a terminal; all are ended with the test."""
    started: list[Terminal] = []

    def on_terminal(command: list[str], columns: int = 80, **environment: str) -> Terminal:
        started.append(Terminal(command, columns, {"TERM": "xterm-256color", **environment}))
        return started[-1]

    yield on_terminal
    for one in started:
        if one.status is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(one.pid, signal.SIGKILL)
            one.exit_status()
        with contextlib.suppress(OSError):
            os.close(one.end)


def first_step(study) -> Step:
    return build_plan(load_recipe(study.recipe)).steps[0]


def last_event(study) -> dict:
    return json.loads((study.out / "runs" / "tiny" / "events.jsonl").read_text().splitlines()[-1])


def left_clean(terminal: Terminal) -> bool:
    return terminal.raw.rfind(b"\x1b[?25l") < terminal.raw.rfind(b"\x1b[?25h")


@pytest.mark.parametrize("columns", [80, 40])
def test_a_terminal_has_a_table_that_fits_and_is_left_clean_by_ctrl_c(study, on_terminal, helpers, columns):
    base = first_step(study)
    with Store(study.out).lease(base):  # so that there is something to wait for
        terminal = on_terminal(study.command("run"), columns, NO_COLOR="1")
        helpers.wait(lambda: "another runner is at base/base" in terminal.text, "the table")
        helpers.wait(lambda: "tiny: 0/32 done, 0:0" in terminal.text, "the line of the study")
        workers = helpers.workers(terminal.pid, base)
        terminal.type("\x03")
        assert terminal.exit_status() == 130
    assert terminal.text.rstrip().endswith("interrupted; run the same command again to carry on")
    assert left_clean(terminal)
    assert workers
    assert psutil.wait_procs(workers, timeout=30)[1] == []
    drawn = [line.removesuffix("^C") for line in re.split(r"[\r\n]+", terminal.text) if line.startswith("tiny: 0/32")]
    assert max(map(len, drawn)) <= columns
    assert not re.search(r"\x1b\[3[0-9]", terminal.raw.decode()), "a person who wants no colours gets none"
    assert last_event(study)["outcome"] == "interrupted"


def test_a_terminal_that_can_do_nothing_gets_plain_lines(study, on_terminal):
    terminal = on_terminal(study.command("run", "--only", "base/base"), TERM="dumb")
    assert terminal.exit_status() == 0
    assert "\x1b" not in terminal.raw.decode()
    lines = terminal.text.splitlines()
    assert lines[0] == "tiny: 1 step, 0 already there, 1 to run"
    assert lines[1] == "[0/1] base/base ..."
    assert lines[2].startswith("[1/1] base/base  ")


def test_a_colour_that_is_forced_makes_no_terminal_of_a_file(study):
    command = study.command("run", "--only", "base/base")
    done = subprocess.run(command, capture_output=True, check=True, env={**os.environ, "FORCE_COLOR": "1"})
    assert b"\x1b[?25l" not in done.stderr
    assert b"[0/1] base/base ..." in ESCAPE.sub("", done.stderr.decode()).encode()


@pytest.mark.parametrize("how", ["asked to end", "terminal closed"])
def test_a_run_that_is_asked_to_end_or_loses_its_terminal_ends_as_by_ctrl_c(study, on_terminal, helpers, how):
    base = first_step(study)
    with Store(study.out).lease(base):
        terminal = on_terminal(study.command("run"))
        helpers.wait(lambda: "another runner is at base/base" in terminal.text, "the table")
        workers = helpers.workers(terminal.pid, base)
        if how == "asked to end":
            terminal.process.terminate()
            assert terminal.exit_status() == 128 + signal.SIGTERM
            assert left_clean(terminal)
        else:
            terminal.process.send_signal(signal.SIGHUP)  # what the kernel sends as the terminal closes
            os.close(terminal.end)
            assert terminal.exit_status() == 128 + signal.SIGHUP
    assert workers
    assert psutil.wait_procs(workers, timeout=30)[1] == []
    told = last_event(study)
    assert (told["event"], told["outcome"]) == ("end", "interrupted")
    assert told["error"] == f"KeyboardInterrupt: {'SIGTERM' if how == 'asked to end' else 'SIGHUP'}"


def test_two_requests_to_end_that_come_together_are_one(study, helpers):
    with Store(study.out).lease(first_step(study)):
        run = subprocess.Popen(study.command("run"), stderr=subprocess.PIPE, text=True)
        assert any("base/base: another runner is at it, waiting" in line for line in run.stderr)
        for number in (signal.SIGSTOP, signal.SIGHUP, signal.SIGTERM, signal.SIGCONT):  # both have come when it goes on
            run.send_signal(number)
        _, err = run.communicate(timeout=60)
    assert run.returncode in (128 + signal.SIGHUP, 128 + signal.SIGTERM)
    stopping = "stopping; what is finished is kept (once more: at once)"
    told = [line for line in err.splitlines() if "waiting" not in line]
    assert told == [stopping, "interrupted; run the same command again to carry on"]


def test_a_run_that_ignores_hang_ups_goes_on_without_its_terminal(study, on_terminal, helpers):
    base, answer = first_step(study), study.folder / "answer.txt"
    with Store(study.out).lease(base):
        terminal = on_terminal(
            ["sh", "-c", "trap '' HUP; exec \"$@\" > $0", str(answer), *study.command("run", "--only", "base/base")]
        )
        helpers.wait(lambda: "another runner is at base/base" in terminal.text, "the table")
        terminal.process.send_signal(signal.SIGHUP)
        os.close(terminal.end)
    assert terminal.exit_status() == 0
    assert [name.partition("--")[0] for name in study.finished()] == ["base/base"]
    assert "base/base" in answer.read_text()


def test_a_study_whose_reader_goes_away_is_finished_all_the_same(study):
    command = study.command("run", "--only", "mixture/general")
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as runner:
        runner.stderr.readline()
        runner.stderr.close()
        assert runner.wait(120) == 0
    assert {name.partition("--")[0] for name in study.finished()} == {"base/base", "mixture/general"}
    assert last_event(study)["outcome"] == "done"


def test_ctrl_c_in_a_training_ends_its_process_and_keeps_its_checkpoint(finished, tmp_path, on_terminal, helpers):
    study = finished.copy(tmp_path / "study")
    arguments = ("--only", "train/general", "--set", "training.epochs=50")
    terminal = on_terminal(study.command("run", *arguments))
    partial, leases = study.store / ".partial", study.store / ".leases"
    helpers.wait(lambda: list(partial.glob("train-*/work/checkpoint-*")), "a checkpoint")
    workers = [child for child in terminal.process.children(recursive=True) if "worker" in " ".join(child.cmdline())]
    assert list(leases.glob("*.json"))
    terminal.type("\x03")
    assert terminal.exit_status() == 130
    assert workers
    assert psutil.wait_procs(workers, timeout=10)[1] == []
    assert "train/general" in terminal.text
    assert re.search(r"running +done +for +left", terminal.text)
    assert list(partial.glob("train-*/work/checkpoint-*"))
    assert not list(leases.glob("*.json")), "nobody holds it any more"
    assert left_clean(terminal)


def test_a_process_that_is_asked_to_end_gives_its_step_back_at_once(finished, tmp_path, helpers):
    study = finished.copy(tmp_path / "study")
    command = study.command("run", "--only", "train/general", "--set", "training.epochs=50")
    partial, leases = study.store / ".partial", study.store / ".leases"
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as runner:
        helpers.wait(lambda: list(partial.glob("train-*/work/checkpoint-*")), "a checkpoint")
        (lease,) = leases.glob("[!r]*.json")  # not that of the run itself
        os.kill(json.loads(lease.read_text())["pid"], signal.SIGTERM)
        _, err = runner.communicate(timeout=120)
    assert runner.returncode == 1
    assert "train/general  FAILED: its process was ended by signal 15" in err
    assert not list(leases.glob("*.json")), "also another machine may carry on at once"
    assert list(partial.glob("train-*/work/checkpoint-*"))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--jobs", "0"], "'--jobs': Input should be greater than or equal to 1"),
        (["--jobs", "x"], "'--jobs': Input should be a valid integer"),
        (["--only", "trian/*"], "no step is called 'trian/*'; did you mean"),
        (["--only", ""], "no step is called ''"),
    ],
)
def test_options_that_cannot_be_are_refused_before_anything_is_written(study, mixmerge, arguments, said):
    status, out, err = mixmerge("run", study.recipe, *arguments, "--out", study.out)
    assert (status, out) == (2, "")
    assert said in " ".join(err.split())
    assert not (study.out / "runs").exists()


def test_only_steps_that_are_done_are_named_with_their_folders_and_nothing_runs(finished, mixmerge):
    before = finished.study.finished()
    status, out, err = mixmerge("run", finished.study.recipe, "--only", "merge/*", "--out", finished.study.out)
    assert status == 0
    assert "already there, 0 to run" in err
    assert Path(out.splitlines()[-1].split()[-1]).is_dir()
    assert finished.study.finished() == before


@pytest.mark.parametrize("columns", [80, 60, 40])
def test_a_table_on_a_narrow_terminal_loses_nothing_and_breaks_no_word(finished, on_terminal, columns):
    terminal = on_terminal(finished.study.command("report"), columns)
    assert terminal.exit_status() == 0
    assert terminal.text.count("…") == finished.printed.count("…"), "those of open intervals alone"
    assert set(finished.printed.split()) <= set(terminal.text.split())
    table = terminal.text[terminal.text.index("Candidate") :].splitlines()[:10]
    assert max(map(len, table)) <= columns
