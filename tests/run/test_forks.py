"""The fork server: real processes that begin with libraries loaded, are waited for, and end with the runner."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
import termios
import threading
from pathlib import Path

import psutil
import pytest

from mixmerge.plan.graph import Plan
from mixmerge.run import forks
from mixmerge.run.fork_server import NEEDED
from mixmerge.run.forks import ForkServer, Request, usable
from mixmerge.run.local import worker_environment
from mixmerge.run.progress import Progress
from mixmerge.run.runner import Study, run_plan
from mixmerge.run.store import Store

pytestmark = pytest.mark.skipif(not usable(), reason="a fork is not safe on this machine")


class Silent(Progress):
    def begin(self, *_, **__): ...
    def take(self, *_): ...
    def end(self, *_): ...


@pytest.fixture
def server(tmp_path):
    server = ForkServer(worker_environment(1), tmp_path / "server.log")
    yield server
    server.close()


@pytest.fixture
def waiting(chain, tmp_path, server):
    """A forked worker that waits for a lease which this process holds; its events; its plan's first merge."""
    root, step = tmp_path / "out", chain.steps[1]
    study = Study(root, "chain")
    study.open(chain)
    run_plan(Plan("chain", chain.steps[:1], {}), root, jobs=1, threads=1, progress=Silent())
    study.open(chain)
    heard, told = os.pipe()
    with Store(root).lease(step):
        argv = [str(root), str(study.plan_file), step.id]
        process = server.fork(Request(argv, ["merge"], str(tmp_path / "worker.log"), told))
        os.close(told)
        with os.fdopen(heard) as events:
            assert json.loads(events.readline())["event"] == "waiting"
            yield process, events, step


def run(plan, root, **how):
    return run_plan(plan, root, **{"jobs": 1, "threads": 1, "progress": Silent(), **how})


def processes_of_the_server(parent: int) -> list[psutil.Process]:
    return [p for p in psutil.Process(parent).children() if "mixmerge.run.fork_server" in p.cmdline()]


def test_a_forked_process_says_in_ps_what_it_is_at_and_leads_a_group(waiting):
    process, _, step = waiting
    words = psutil.Process(process.pid).cmdline()
    assert words[:3] == ["python", "-m", "mixmerge.run.worker"]
    assert words[-1] == step.id
    assert os.getpgid(process.pid) == process.pid


def test_a_forked_process_is_waited_for_with_a_time_limit(waiting):
    process, _, _ = waiting
    assert process.poll() is None
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.05)


def test_how_a_forked_process_ended_is_known_by_its_signal(waiting):
    process, events, _ = waiting
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait(30) == process.poll() == -signal.SIGKILL
    assert events.read() == ""


def test_closing_the_server_ends_what_it_forked(waiting, server):
    process, _, _ = waiting
    server.close()
    assert process.poll() == -signal.SIGKILL
    assert server.fork(Request([], [], "", 1)) is None


def test_a_killed_server_leaves_its_processes_at_work_and_is_told_to_be_gone(waiting, server):
    process, _, _ = waiting
    server._process.kill()
    assert process.wait(30) == -signal.SIGKILL, "nobody can say how it will end"
    assert psutil.Process(process.pid).is_running()
    assert server.fork(Request([], [], "", 1)) is None
    os.kill(process.pid, signal.SIGKILL)


def test_a_server_that_is_killed_with_a_request_unread_is_told_to_be_gone_too(server, helpers):
    os.kill(server._process.pid, signal.SIGSTOP)  # before it has read anything
    told = []
    asking = threading.Thread(target=lambda: told.append(server.fork(Request([], [], "", 1))), daemon=True)
    asking.start()
    helpers.wait(lambda: any(fcntl.ioctl(server._socket, termios.TIOCOUTQ, bytes(4))), "the request on its way")
    server._process.kill()
    asking.join(30)
    assert told == [None]


def test_steps_are_carried_out_by_plain_processes_once_the_server_is_gone(chain, tmp_path, monkeypatch):
    forked = ForkServer.fork

    def fork(server, request):
        server._process.kill()
        server._process.wait()
        return forked(server, request)

    monkeypatch.setattr(ForkServer, "fork", fork)
    outcome = run(chain, tmp_path)
    assert len(outcome.done) == len(chain.steps)
    assert outcome.failed == {}


def test_where_an_accelerator_is_no_process_is_forked_and_the_outputs_are_the_same(chain, tmp_path, monkeypatch):
    one = run(chain, tmp_path / "forked")
    monkeypatch.setattr(forks, "ACCELERATORS", (os.devnull,))
    assert not usable()
    monkeypatch.setattr(ForkServer, "__init__", lambda *_: pytest.fail("a server was started"))
    two = run(chain, tmp_path / "plain")
    assert one.done == two.done
    for step in chain.steps[1:]:
        files = [Store(tmp_path / name).path(step.id) / "model.safetensors" for name in ("forked", "plain")]
        assert files[0].read_bytes() == files[1].read_bytes()


def test_a_run_leaves_no_server_and_no_descriptor_behind(chain, tmp_path):
    run(chain, tmp_path / "first")
    before = len(list(Path("/proc/self/fd").iterdir()))
    run(chain, tmp_path / "second")
    assert processes_of_the_server(os.getpid()) == []
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_a_run_with_nothing_to_do_starts_no_server(chain, tmp_path, monkeypatch):
    run(chain, tmp_path)
    monkeypatch.setattr(ForkServer, "__init__", lambda *_: pytest.fail("a server was started"))
    assert run(chain, tmp_path).done == []


def test_the_server_ends_when_its_runner_is_killed(chain, tmp_path, helpers):
    script = (
        "import sys; from pathlib import Path; from mixmerge.plan.graph import Plan; import json;"
        "from mixmerge.run.runner import run_plan; from mixmerge.run.progress import Progress;"
        "run_plan(Plan.from_json(json.loads(sys.argv[2])), Path(sys.argv[1]), jobs=1, threads=1, progress=Progress())"
    )
    with Store(tmp_path).lease(chain.steps[1]):
        command = [sys.executable, "-c", script, str(tmp_path), json.dumps(chain.to_json())]
        runner = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        helpers.wait(lambda: helpers.workers(runner.pid, chain.steps[1]), "a worker")
        family = psutil.Process(runner.pid).children(recursive=True)
        assert processes_of_the_server(runner.pid)
        runner.kill()
        runner.wait()
        assert psutil.wait_procs(family, timeout=30)[1] == []


ENDLESS = "import pathlib, time; pathlib.Path({mark!r}).touch(); time.sleep(3600)"
ASKS = """
import os, sys
from pathlib import Path
from mixmerge.run.forks import ForkServer, Request
from mixmerge.run.local import worker_environment
server = ForkServer(worker_environment(1), Path(sys.argv[1]))
print(server._process.pid, flush=True)
try:
    server.fork(Request([], ["merge"], sys.argv[1], os.pipe()[1]))
except KeyboardInterrupt:
    server.close()
    print("closed")
"""


@pytest.fixture
def importing(tmp_path, monkeypatch, helpers):
    """The environment of a server in which one of the libraries takes an hour to import; a wait for that moment."""
    mark = tmp_path / "imports"
    (tmp_path / "slow").mkdir()
    (tmp_path / "slow" / "numba.py").write_text(ENDLESS.format(mark=str(mark)))
    paths = [str(tmp_path / "slow"), *filter(None, [os.environ.get("PYTHONPATH")])]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))
    return lambda: helpers.wait(mark.exists, "the import")


@pytest.fixture
def asking(tmp_path, importing):
    """A runner that waits for a server which imports; and that server."""
    runner = subprocess.Popen(
        [sys.executable, "-c", ASKS, str(tmp_path / "server.log")],
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    imports = psutil.Process(int(runner.stdout.readline()))
    importing()
    yield runner, imports
    runner.kill()
    runner.communicate()
    if imports.is_running():
        imports.kill()


def test_a_server_that_imports_ends_with_a_runner_that_is_killed(asking):
    runner, imports = asking
    runner.kill()
    assert psutil.wait_procs([imports], timeout=60)[1] == []


def test_a_runner_that_is_interrupted_while_its_server_imports_does_not_wait_for_that(asking):
    runner, imports = asking
    runner.send_signal(signal.SIGINT)
    assert runner.communicate(timeout=60)[0] == "closed\n"
    assert psutil.wait_procs([imports], timeout=60)[1] == []


TWO = """
import json, sys
from pathlib import Path
from mixmerge.plan.graph import Plan
from mixmerge.run.local import LocalBackend
from mixmerge.run.store import Store
root, plan_file = Path(sys.argv[1]), Path(sys.argv[2])
base, merge = Plan.from_json(json.loads(plan_file.read_text())).steps
backend = LocalBackend(Store(root), plan_file, jobs=2, threads=1)
backend.kill = lambda: print("killed")
backend.start([base])
print(backend.next()["event"], flush=True)
try:
    backend.start([merge])
except KeyboardInterrupt:
    backend.stop()
    backend.close()
    print("stopped")
"""


def test_interrupted_while_the_server_imports_for_one_process_the_other_is_asked_to_end(
    base_step, tmp_path, importing, helpers
):
    plan, root = Plan("two", (base_step, helpers.merge("second", base_step.id)), {}), tmp_path / "out"
    study = Study(root, plan.study)
    study.open(plan)
    with Store(root).lease(base_step):
        runner = subprocess.Popen(
            [sys.executable, "-c", TWO, str(root), str(study.plan_file)],
            stdout=subprocess.PIPE,
            text=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )
        try:
            assert runner.stdout.readline() == "waiting\n"
            importing()
            (worker,) = helpers.workers(runner.pid, base_step)
            runner.send_signal(signal.SIGINT)
            assert runner.communicate(timeout=60)[0] == "stopped\n"
            assert psutil.wait_procs([worker], timeout=60)[1] == []
        finally:
            runner.kill()


@pytest.mark.parametrize("name", sorted({name for names in NEEDED.values() for name in names}))
def test_what_the_server_loads_ahead_exists_and_starts_no_thread_of_python(name):
    code = f"import importlib, threading; importlib.import_module({name!r}); print(threading.active_count())"
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split()[-1] == "1"


def test_a_worker_that_fails_by_a_bug_ends_with_its_traceback_in_the_log(base_step, tmp_path):
    from mixmerge.plan.graph import Step

    plan = Plan("bug", (base_step, Step("merge", "odd", {"seed": 0}, {"model0": base_step.id})), {})
    outcome = run(plan, tmp_path)
    assert outcome.bug
    assert "Traceback" in Study(tmp_path, "bug").log(plan.steps[1]).read_text()
    assert Path(tmp_path / "runs" / "bug" / "logs" / "fork-server.log").is_file()
