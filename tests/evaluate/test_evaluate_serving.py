"""Servers that are started, waited for and stopped: real processes, one of them a real server of a real tiny model."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from mixmerge.errors import CheckpointError, StepError, UserError
from mixmerge.evaluate.serving import check_command, serving, visible_devices

# A server that is quick to start, for what does not depend on a model. It says what it was started with.
SCRIPT = """
import json, os, signal, socket, subprocess, sys, time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

model, port, *flags = sys.argv[1:]
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
if "deaf" in flags:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
if "slow" in flags:
    time.sleep(600)
loading = time.monotonic() + (1.0 if "loading" in flags else 0.0)


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        known = self.path == "/v1/models" or (self.path == "/health" and "bare" not in flags)
        status = 404 if not known else 503 if time.monotonic() < loading else 200
        names = ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS")
        found = {"pids": [os.getpid(), child.pid], "arguments": sys.argv[1:], "group": os.getpgid(0)}
        body = json.dumps(found | {name: os.environ.get(name) for name in names}).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
        if self.path == "/die":
            os._exit(7)


class Server(ThreadingHTTPServer):
    allow_reuse_address = True


if "steal" in flags and not os.path.exists(model + "/stolen"):
    # what happens where another program is quicker: it takes the port, and we cannot
    with open(model + "/stolen", "w") as told:
        told.write(port + "\\n")
    while socket.socket().connect_ex(("127.0.0.1", int(port))):
        time.sleep(0.01)
Server(("127.0.0.1", int(port)), Handler).serve_forever()
"""


@pytest.fixture
def command(tmp_path: Path) -> Callable[..., str]:
    """The command template of the small server, with flags."""
    script = tmp_path / "server.py"
    script.write_text(SCRIPT, encoding="utf-8")
    return lambda *flags: f"'{sys.executable}' '{script}' {{model}} {{port}} {' '.join(flags)}"


def ask(url: str, path: str, body: object = None) -> tuple[int, dict]:
    """What a server says to a GET, or to a POST of `body`."""
    host = url.removeprefix("http://").partition("/")[0]
    connection = http.client.HTTPConnection(host, timeout=60)
    connection.request(
        "GET" if body is None else "POST",
        path,
        None if body is None else json.dumps(body),
        {"Content-Type": "application/json"},
    )
    answer = connection.getresponse()
    said = answer.read()
    connection.close()
    return answer.status, json.loads(said)


def gone(pids: list[int], seconds: float = 60) -> bool:
    """Whether all the processes end in time."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if not any(psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE for pid in pids):
            return True
        time.sleep(0.02)
    return False


# What starts and what stops


def test_a_server_is_ready_inside_and_gone_with_its_children_after(command: Callable[..., str], tmp_path: Path) -> None:
    with serving(command(), tmp_path, log=tmp_path / "logs" / "server.log", devices=[]) as (url,):
        status, said = ask(url, "/v1/models")
        assert status == 200
        assert said["arguments"][0] == str(tmp_path)
        assert url == f"http://127.0.0.1:{said['arguments'][1]}/v1"
        assert said["group"] == said["pids"][0] != os.getpgid(0)
        assert all(psutil.pid_exists(pid) for pid in said["pids"])
    assert gone(said["pids"], seconds=0.5)
    log = (tmp_path / "logs" / "server.log").read_text(encoding="utf-8")
    assert log.startswith(f"$ {sys.executable} ")


def test_a_server_that_answers_before_it_has_loaded_is_waited_for(command: Callable[..., str], tmp_path: Path) -> None:
    with serving(command("loading"), tmp_path, log=tmp_path / "log", devices=[]) as (url,):
        assert ask(url, "/health")[0] == 200


def test_a_server_without_a_health_page_is_asked_for_its_models(command: Callable[..., str], tmp_path: Path) -> None:
    with serving(command("bare", "loading"), tmp_path, log=tmp_path / "log", devices=[]) as (url,):
        assert ask(url, "/health")[0] == 404
        assert ask(url, "/v1/models")[0] == 200


def test_replicas_share_out_the_devices_and_the_threads(command: Callable[..., str], tmp_path: Path) -> None:
    with serving(
        command("{threads}"),
        tmp_path,
        log=tmp_path / "server.log",
        replicas=2,
        threads=6,
        devices=["0", "GPU-a", "2", "3", "9"],
    ) as urls:
        said = [ask(url, "/health")[1] for url in urls]
    assert len(set(urls)) == 2
    assert [found["CUDA_VISIBLE_DEVICES"] for found in said] == ["0,GPU-a", "2,3"]
    assert [found["OMP_NUM_THREADS"] for found in said] == ["3", "3"]
    assert [found["arguments"][2] for found in said] == ["3", "3"]
    assert gone([pid for found in said for pid in found["pids"]])
    assert {path.name for path in tmp_path.glob("*.log")} == {"server.log", "server.1.log"}


def test_without_devices_a_server_sees_what_we_see(
    command: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    with serving(command(), tmp_path, log=tmp_path / "log", devices=[]) as (url,):
        assert ask(url, "/health")[1]["CUDA_VISIBLE_DEVICES"] is None
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3, 5")
    assert visible_devices() == ["3", "5"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    assert visible_devices() == []


def test_a_server_that_does_not_hear_sigterm_is_killed(command: Callable[..., str], tmp_path: Path) -> None:
    with serving(command("deaf"), tmp_path, log=tmp_path / "log", devices=[], grace_seconds=0.3) as (url,):
        pids = ask(url, "/health")[1]["pids"]
    assert gone(pids, seconds=0.5)


def test_a_port_that_another_program_took_is_exchanged_for_another(command: Callable[..., str], tmp_path: Path) -> None:
    log, told, taken = tmp_path / "log", tmp_path / "stolen", socket.socket()

    def steal() -> None:
        """Be the other program: take the port that the server is about to listen at."""
        while not (told.exists() and told.read_text().endswith("\n")):
            time.sleep(0.01)
        taken.bind(("127.0.0.1", int(told.read_text())))
        taken.listen()

    threading.Thread(target=steal, daemon=True).start()
    with taken, serving(command("steal"), tmp_path, log=log, devices=[]) as (url,):
        assert ask(url, "/health")[0] == 200
    started = [line for line in log.read_text(encoding="utf-8").splitlines() if line.startswith("$ ")]
    assert len(started) == 2
    assert url.endswith(f":{started[1].split()[-2]}/v1")
    assert told.read_text().strip() == started[0].split()[-2] != started[1].split()[-2]


# What goes wrong


def test_a_server_that_dies_while_it_starts_is_told_at_once_with_its_last_words(tmp_path: Path) -> None:
    command = f"""'{sys.executable}' -c 'import sys; print("loading"); sys.exit("no {{model}} on {{port}}")'"""
    with (
        pytest.raises(StepError, match=rf"log: the server ended with status 1: loading \| no {tmp_path} on \d+; see"),
        serving(command, tmp_path, log=tmp_path / "log", devices=[]),
    ):
        raise AssertionError("it was not ready")


def test_a_server_killed_by_a_signal_is_told_by_its_number(tmp_path: Path) -> None:
    command = f"""'{sys.executable}' -c 'import os; os.kill(os.getpid(), 9)' {{model}} {{port}}"""
    with (
        pytest.raises(StepError, match=r"ended by signal 9: it said nothing"),
        serving(command, tmp_path, log=tmp_path / "log", devices=[]),
    ):
        raise AssertionError("it was not ready")


def test_a_server_that_is_never_ready_is_given_up_and_stopped(command: Callable[..., str], tmp_path: Path) -> None:
    before = {process.pid for process in psutil.Process().children(recursive=True)}
    with (
        pytest.raises(StepError, match=r"not ready after 1 s"),
        serving(command("slow"), tmp_path, log=tmp_path / "log", devices=[], ready_seconds=1),
    ):
        raise AssertionError("it was not ready")
    assert {process.pid for process in psutil.Process().children(recursive=True)} <= before


def test_one_dead_replica_stops_the_others(command: Callable[..., str], tmp_path: Path) -> None:
    once = tmp_path / "once.py"
    once.write_text(
        "import os, sys\n"
        "try: os.mkdir(sys.argv[1] + '/first')\n"
        "except FileExistsError: sys.exit('second')\n"
        "sys.argv = sys.argv[:]\n"
        f"exec(open({str(tmp_path / 'server.py')!r}).read())\n",
        encoding="utf-8",
    )
    command()
    with (
        pytest.raises(StepError, match=r"ended with status 1: second"),
        serving(
            f"'{sys.executable}' '{once}' {{model}} {{port}}", tmp_path, log=tmp_path / "l", replicas=2, devices=[]
        ),
    ):
        raise AssertionError("it was not ready")
    assert not [process for process in psutil.Process().children(recursive=True) if process.is_running()]


def test_an_error_of_ours_while_a_server_is_dead_is_told_as_its_death(
    command: Callable[..., str], tmp_path: Path
) -> None:
    with (
        pytest.raises(StepError, match=r"ended with status 7") as told,
        serving(command(), tmp_path, log=tmp_path / "log", devices=[]) as (url,),
    ):
        _die_and_miss_it(url)
    assert isinstance(told.value.__cause__, CheckpointError)
    with (
        pytest.raises(CheckpointError, match=r"no answer"),
        serving(command(), tmp_path, log=tmp_path / "log", devices=[]),
    ):
        raise CheckpointError("no answer")


def _die_and_miss_it(url: str) -> None:
    """Fail as a client does, which knows nothing of the server's process."""
    ask(url, "/die")
    raise CheckpointError("no answer")


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("serve {model} --host 127.0.0.1", r"does not use \{port\}"),
        ("serve --port {port}", r"does not use \{model\}"),
        ("serve {model} {prt}", r"unknown \{prt\}; did you mean 'port'\?"),
        ("serve '{model} {port}", r"cannot be read: no closing quotation"),
        ("serve {model} {port} {", r"cannot be read: .*double braces"),
        ("no-such-program-here {model} {port}", r"no program 'no-such-program-here'"),
        ("", r"does not use \{model\}"),
    ],
)
def test_a_command_that_cannot_work_is_refused_before_anything_starts(template: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        check_command(template)


def test_more_servers_than_gpus_are_refused(command: Callable[..., str], tmp_path: Path) -> None:
    with (
        pytest.raises(UserError, match=r"2 servers on 1 GPUs"),
        serving(command(), tmp_path, log=tmp_path / "log", replicas=2, devices=["0"]),
    ):
        raise AssertionError("it was not refused")
    with pytest.raises(ValueError, match="replicas"), serving(command(), tmp_path, log=tmp_path / "log", replicas=0):
        raise AssertionError("it was not refused")


def test_words_of_the_command_reach_the_server_without_a_shell(command: Callable[..., str], tmp_path: Path) -> None:
    model = tmp_path / "a folder; touch harm $(touch harm)"
    model.mkdir()
    template = command("'$HOME && touch harm'", "'{{json}}'")
    with serving(template, model, log=tmp_path / "log", devices=[]) as (url,):
        said = ask(url, "/health")[1]["arguments"]
    assert (said[0], *said[2:]) == (str(model), "$HOME && touch harm", "{json}")
    assert not list(tmp_path.rglob("harm"))


# No orphans

PARENT = """
import json, sys, time
from pathlib import Path
from mixmerge.evaluate.serving import serving
with serving(sys.argv[1], Path(sys.argv[2]), log=Path(sys.argv[2]) / "log", devices=[], grace_seconds=0.5) as urls:
    print(urls[0], flush=True)
    time.sleep(600)
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_when_the_parent_is_killed_no_server_is_left(
    command: Callable[..., str], tmp_path: Path, number: signal.Signals
) -> None:
    arguments = [sys.executable, "-c", PARENT, command("deaf") if number == signal.SIGTERM else command(), tmp_path]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, encoding="utf-8") as parent:
        assert parent.stdout is not None
        url = parent.stdout.readline().strip()
        pids = ask(url, "/health")[1]["pids"]
        (keeper,) = [process.pid for process in psutil.Process(parent.pid).children()]
        parent.send_signal(number)
        parent.wait()
    assert gone([keeper, *pids])
    with socket.socket() as again:
        again.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        again.bind(("127.0.0.1", int(url.rpartition(":")[2].partition("/")[0])))


def test_when_the_keeper_itself_is_killed_the_server_goes_too(command: Callable[..., str], tmp_path: Path) -> None:
    with (
        pytest.raises(StepError, match=r"the server ended by signal 9"),
        serving(command(), tmp_path, log=tmp_path / "log", devices=[]) as (url,),
    ):
        _lose_the_keeper(ask(url, "/health")[1]["pids"])


def _lose_the_keeper(pids: list[int]) -> None:
    (keeper,) = psutil.Process().children()
    keeper.kill()
    assert gone(pids[:1])
    os.kill(pids[1], signal.SIGKILL)  # what the server had started: the keeper's own end is all that is lost here
    raise CheckpointError("no answer")


# A real server of a real model


def test_transformers_serves_a_tiny_model_offline_and_is_stopped(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("fastapi")
    pytest.importorskip("uvicorn")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    command = f"'{sys.executable}' -m transformers.cli.transformers serve {{model}} --host {{host}} --port {{port}} --device cpu"
    with serving(command, tiny_base, log=tmp_path / "server.log", devices=[]) as (url,):
        body = {
            "model": str(tiny_base),
            "messages": [{"role": "user", "content": "Why?"}],
            "max_tokens": 5,
            "temperature": 0,
        }
        status, said = ask(url, "/v1/chat/completions", body)
        assert (status, said["choices"][0]["finish_reason"]) == (200, "length")
        assert said["usage"]["completion_tokens"] == 5
        (keeper,) = psutil.Process().children()
        pids = [keeper.pid, *(child.pid for child in keeper.children(recursive=True))]
    assert gone(pids, seconds=0.5)
