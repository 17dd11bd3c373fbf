"""Leases: one holder at a time, whoever dies, stands still, or sets a clock; with real processes, also of another namespace."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mixmerge.errors import CheckpointError, StepError
from mixmerge.plan.graph import Step
from mixmerge.run import lease as lease_module
from mixmerge.run.lease import Leases
from mixmerge.run.processes import alive, this_process
from mixmerge.run.store import Store

STEP = Step("merge", "ties", {"density": 0.5})
ELSEWHERE = {"host": "elsewhere", "boot": "another", "namespace": "pid:[1]", "pid": 1, "born": 1.0, "token": "t"}
HOLD = """
import sys
from pathlib import Path
from mixmerge.run import lease
from mixmerge.run.store import Store
from mixmerge.plan.graph import Step
if len(sys.argv) > 2:
    lease.HEARTBEAT_S, lease.EXPIRES_S = map(float, sys.argv[2:])
store, step = Store(Path(sys.argv[1])), Step("merge", "ties", {"density": 0.5})
with store.lease(step, lambda: print("lost", flush=True)) as held:
    print(held, flush=True)
    for line in sys.stdin:
        try:
            store.begin(step)
            print(store.commit(step, {"by": "the one that stood still"}), flush=True)
        except Exception as error:
            print(error, flush=True)
"""
CROWD = """
import os, sys, time
from pathlib import Path
from mixmerge.run.lease import Leases
root, turns = Path(sys.argv[1]), int(sys.argv[2])
leases, inside = Leases(root / "leases"), root / "inside"
taken = 0
while taken < turns:
    if (child := os.fork()) == 0:  # dies with the lease in its hands
        with leases.hold("x") as held:
            if held:
                inside.touch(exist_ok=False)
                inside.unlink()
            os._exit(9)
    os.waitpid(child, 0)
    with leases.hold("x") as held:
        if held:
            inside.touch(exist_ok=False)
            time.sleep(0.0005)
            inside.unlink()
            taken += 1
"""


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path)


@pytest.fixture
def hold(tmp_path: Path, held_by):
    """Another process that holds the lease until its standard input closes; `first`: words before its command."""

    def hold(*arguments: float, first: tuple[str, ...] = ()) -> subprocess.Popen[str]:
        return held_by(*first, sys.executable, "-c", HOLD, str(tmp_path), *map(str, arguments))

    return hold


@pytest.fixture
def quick(monkeypatch):
    """Let the heart beat a hundred times a second."""
    monkeypatch.setattr(lease_module, "HEARTBEAT_S", 0.01)


@pytest.fixture
def namespace():
    """The words that start a command in a process namespace of its own, as a container has."""
    words = ("unshare", "--pid", "--fork", "--kill-child", "--mount-proc")
    if shutil.which(words[0]) is None or subprocess.run([*words, "true"], capture_output=True, check=False).returncode:
        pytest.skip("no process namespace can be made here (that needs root)")
    return words


def lease_of(store: Store) -> Path:
    return store.leases.path(STEP.id)


def put(store: Store, owner: object, age: float = 0.0) -> Path:
    """A lease that somebody left; `age` in seconds."""
    path = lease_of(store)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(owner if isinstance(owner, str) else json.dumps(owner))
    os.utime(path, (time.time() - age, time.time() - age))
    return path


def left(store: Store) -> list[str]:
    return sorted(path.name for path in store.leases.folder.iterdir())


# Held and free


def test_a_lease_is_held_by_one_and_free_again_afterwards(store):
    with store.lease(STEP) as first:
        assert first
        with Store(store.root).lease(STEP) as second:
            assert not second
        with store.lease(STEP) as again:
            assert not again
        assert store.running(STEP)["pid"] == os.getpid(), "trying does not take it away"
        assert left(store) == [f"{STEP.id}.json"]
    assert store.running(STEP) is None
    with store.lease(STEP) as third:
        assert third
    assert left(store) == []


def test_a_lease_is_free_after_an_error(store):
    with pytest.raises(RuntimeError), store.lease(STEP):
        raise RuntimeError("x")
    assert store.running(STEP) is None


def test_leases_of_other_steps_are_apart(store):
    with store.lease(STEP), store.lease(Step("merge", "ties", {"density": 0.7})) as other:
        assert other


def test_of_many_that_take_let_go_and_die_never_two_hold_it(tmp_path):
    crowd = [subprocess.Popen([sys.executable, "-c", CROWD, str(tmp_path), "40"]) for _ in range(4)]
    try:
        assert [process.wait(300) for process in crowd] == [0, 0, 0, 0]
    finally:
        for process in crowd:
            process.kill()
    leases = Leases(tmp_path / "leases")
    leases.sweep()
    assert list(leases.folder.iterdir()) == []


def test_of_two_that_find_a_dead_lease_only_one_takes_it(store, tmp_path):
    code = """
import os, sys, time
from pathlib import Path
from mixmerge.plan.graph import Step
from mixmerge.run.store import Store
root = Path(sys.argv[1])
store = Store(root)
for number in range(40):
    step = Step("merge", "x", {"number": number})
    (root / f"here-{number}-{os.getpid()}").touch()
    while len(list(root.glob(f"here-{number}-*"))) < 4:
        pass
    with store.lease(step) as held:
        if held:
            (root / f"held-{number}-{os.getpid()}").touch()
            while len(list(root.glob(f"tried-{number}-*"))) < 3:
                time.sleep(0.0005)
        else:
            (root / f"tried-{number}-{os.getpid()}").touch()
"""
    store.leases.folder.mkdir(parents=True)
    for number in range(40):
        dead = {**this_process(), "born": 1.0, "token": f"dead{number}"}
        store.leases.path(Step("merge", "x", {"number": number}).id).write_text(json.dumps(dead))
    crowd = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path)]) for _ in range(4)]
    try:
        for process in crowd:
            assert process.wait(120) == 0
    finally:
        for process in crowd:
            process.kill()
    held = sorted(int(path.name.split("-")[1]) for path in tmp_path.glob("held-*"))
    assert held == list(range(40)), "each dead lease is taken over once"
    assert left(store) == []


@pytest.mark.parametrize("code", [errno.EPERM, errno.EOPNOTSUPP])
def test_a_file_system_without_hard_links_has_leases_too(store, monkeypatch, code):
    def link(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "link", link)
    with store.lease(STEP) as first, store.lease(STEP) as second:
        assert (first, second) == (True, False)
    assert left(store) == []


def test_a_disk_that_fails_is_named_with_the_folder_of_leases(store, monkeypatch):
    def link(*_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "link", link)
    with pytest.raises(CheckpointError, match=r"\.leases: Input/output error"), store.lease(STEP):
        pass
    assert left(store) == []


# Processes of this machine


def test_a_live_process_keeps_its_step(store, hold):
    holder = hold()
    with store.lease(STEP) as held:
        assert not held
    assert store.running(STEP)["pid"] == holder.pid
    assert store.leases.live() == {STEP.id}


@pytest.mark.parametrize("mtime", [0, 4_000_000_000])
def test_a_live_process_keeps_its_step_whatever_a_clock_says_of_its_lease(store, hold, mtime):
    hold()
    os.utime(lease_of(store), (mtime, mtime))
    with store.lease(STEP) as held:
        assert not held
    assert store.leases.live() == {STEP.id}


def test_a_killed_process_loses_its_step_at_once(store, hold):
    holder = hold()
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert lease_of(store).exists()
    assert store.running(STEP) is None
    assert store.leases.live() == set()
    with store.lease(STEP) as held:
        assert held
        assert store.running(STEP)["pid"] == os.getpid()
    assert left(store) == []


def test_a_killed_process_that_nobody_has_waited_for_is_dead_too(store, hold):
    hold().send_signal(signal.SIGKILL)
    while store.running(STEP) is not None:  # a zombie until we wait for it
        time.sleep(0.01)
    with store.lease(STEP) as held:
        assert held


def test_a_pid_that_was_given_to_another_process_is_no_owner(store):
    put(store, {**this_process(), "born": this_process()["born"] - 100, "token": "t"})
    assert store.running(STEP) is None
    with store.lease(STEP) as held:
        assert held


def test_a_process_is_known_by_its_birth_since_the_boot_and_only_from_its_own_namespace(namespace):
    own = this_process()
    assert alive(own) is True
    assert alive({**own, "born": own["born"] + 1}) is False
    assert alive({**own, "pid": 2**30}) is False
    for key in ("boot", "namespace"):
        assert alive({**own, key: "another"}) is None
    assert alive({"host": socket.gethostname(), "pid": os.getpid()}) is None, "of an older version"
    assert alive({}) is None
    ask = "import json, sys; from mixmerge.run.processes import alive; print(alive(json.loads(sys.argv[1])))"
    said = subprocess.run([*namespace, sys.executable, "-c", ask, json.dumps(own)], capture_output=True, text=True)
    assert said.stdout == "None\n", said.stderr


# Processes that cannot be seen


@pytest.mark.parametrize(("age", "held"), [(0, False), (30, False), (-30, False), (3600, True), (-3600, True)])
def test_a_lease_of_another_machine_is_taken_once_it_is_old_and_was_watched(store, quick, age, held):
    put(store, ELSEWHERE, age)
    assert (store.running(STEP) is None) == held
    assert (store.leases.live() == set()) == held
    with store.lease(STEP) as got:
        assert got == held
    assert left(store) == ([] if held else [f"{STEP.id}.json"])


def test_a_live_lease_is_not_taken_when_a_clock_jumps_by_hours(store, hold, namespace, quick):
    hold(0.01, 60.0, first=namespace)
    for turn in range(20):
        date = turn % 2 * (time.time() + 10**7)
        os.utime(lease_of(store), (date, date))
        with store.lease(STEP) as held:  # its date is far off, and it beats while it is watched
            assert not held
    for date in (0, time.time() + 10**7):
        os.utime(lease_of(store), (date, date))
        assert store.leases.live() == {STEP.id}


def test_a_watcher_that_stood_still_itself_has_not_watched(store, monkeypatch):
    put(store, ELSEWHERE)
    now = [time.monotonic()]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    for _ in range(5):
        with store.lease(STEP) as held:
            assert not held
        now[0] += 3600  # five looks, hours apart
    for _ in range(30):
        now[0] += 1
        with store.lease(STEP) as held:
            if held:
                break
    assert held, "a minute of looks is enough"


def test_equal_pids_in_two_containers_are_two_processes(store, hold, namespace, quick):
    hold(0.01, 60.0, first=namespace)
    owner = json.loads(lease_of(store).read_text())
    assert owner["host"] == socket.gethostname()
    assert owner["namespace"] != this_process()["namespace"]
    with store.lease(STEP) as held:
        assert not held, "its pid means nothing here"


def test_a_process_that_stood_still_is_told_that_it_lost_its_step_and_finishes_nothing(
    store, hold, namespace, monkeypatch
):
    for name, value in (("HEARTBEAT_S", 0.1), ("EXPIRES_S", 0.3)):
        monkeypatch.setattr(lease_module, name, value)
    holder = hold(0.1, 0.3, first=namespace)
    inner = int(subprocess.check_output(["pgrep", "-P", str(holder.pid)], text=True))
    os.kill(inner, signal.SIGSTOP)
    while True:
        with store.lease(STEP) as held:
            if not held:
                time.sleep(0.05)
                continue
            os.kill(inner, signal.SIGCONT)
            assert holder.stdout.readline() == "lost\n"
            holder.stdin.write("commit\n")
            holder.stdin.flush()
            said = holder.stdout.readline()
            assert said == (
                "another runner took the step over, since this process stood still for more than a minute; "
                "run the same command again\n"
            )
            holder.communicate(timeout=30)
            assert holder.returncode == 0
            assert store.running(STEP)["pid"] == os.getpid(), "it left our lease alone"
            break
    assert store.find(STEP.id) is None
    assert left(store) == []


def test_a_step_that_was_taken_from_its_runner_is_not_committed(store):
    with store.lease(STEP):
        store.begin(STEP)
        put(store, ELSEWHERE)
        with pytest.raises(StepError, match="another runner took the step over"):
            store.commit(STEP, {})
    assert json.loads(lease_of(store).read_text()) == ELSEWHERE, "it is not ours to remove"
    assert store.find(STEP.id) is None


# The heartbeat, and what is left


def test_a_lease_beats_while_it_is_held(store, quick):
    with store.lease(STEP):
        os.utime(lease_of(store), (0, 0))
        while lease_of(store).stat().st_mtime == 0:
            time.sleep(0.01)
    assert left(store) == []


@pytest.mark.parametrize("text", ["", "{", "[1", '{"pid": 3}'])
def test_a_lease_that_cannot_be_read_is_given_a_minute(store, quick, text):
    put(store, text)
    assert store.running(STEP) is not None
    with store.lease(STEP) as held:
        assert not held
    put(store, text, age=3600)
    with store.lease(STEP) as held:
        assert held
    assert left(store) == []


@pytest.mark.parametrize("text", ["", "[[1, 2]]", '{"pid": null, "host": 3}', '{"token": "../a", "born": {}}', "\x00{"])
def test_rubbish_in_a_lease_reads_as_a_process_that_it_does_not_name(study, mixmerge, text):
    step = mixmerge("show", study.recipe, "train/general", "--out", study.out)[1].split()[1]
    path = Leases(study.store / ".leases").path(step)
    path.parent.mkdir(parents=True)
    path.write_text(text)
    status, out, _ = mixmerge("status", study.recipe, "--out", study.out)
    assert status == 0
    assert out.splitlines()[1] == "running: train/general by a process that its lease does not name"


def test_status_names_the_process_that_is_at_a_step(study, mixmerge):
    step = mixmerge("show", study.recipe, "train/general", "--out", study.out)[1].split()[1]
    with Store(study.out).hold(step):
        out = mixmerge("status", study.recipe, "--out", study.out)[1]
    assert out.splitlines()[1] == f"running: train/general by process {os.getpid()} on {socket.gethostname()}"


def test_a_claim_whose_maker_died_keeps_nobody_from_the_lease(store):
    dead = {**this_process(), "born": 1.0}
    put(store, {**dead, "token": "first"})
    folder = store.leases.folder
    (folder / f"{STEP.id}.first.claim").write_text(json.dumps({**dead, "token": "second"}))
    (folder / f"{STEP.id}.second.claim").write_text(json.dumps({**dead, "token": "third"}))
    assert store.running(STEP) is None
    with store.lease(STEP) as held:
        assert held
        assert left(store) == [f"{STEP.id}.json"]
    assert left(store) == []


@pytest.mark.parametrize("after", ["link", "remove"])
def test_a_process_that_dies_as_it_lets_go_keeps_nobody_from_the_lease(store, tmp_path, after):
    kill = """
import os, signal, sys
from pathlib import Path
from mixmerge.run.lease import Leases
done = getattr(os, "link" if sys.argv[2] == "link" else "unlink")
with Leases(Path(sys.argv[1])).hold("some"):
    def die(*arguments, **options):
        done(*arguments, **options)
        os.kill(os.getpid(), signal.SIGKILL)
    setattr(os, "link" if sys.argv[2] == "link" else "unlink", die)
"""
    folder = tmp_path / "leases"
    died = subprocess.run([sys.executable, "-c", kill, str(folder), after], check=False)
    assert died.returncode == -signal.SIGKILL
    assert len(list(folder.iterdir())) == (2 if after == "link" else 1)
    leases = Leases(folder)
    assert leases.holder("some") is None
    with leases.hold("some") as held, Leases(folder).hold("some") as other:
        assert (held is not None, other) == (True, None)
    leases.sweep()
    assert list(folder.iterdir()) == []


def test_a_claim_of_a_live_process_is_respected(store):
    put(store, {**this_process(), "born": 1.0, "token": "first"})
    (store.leases.folder / f"{STEP.id}.first.claim").write_text(json.dumps({**this_process(), "token": "second"}))
    assert store.running(STEP)["pid"] == os.getpid()
    with store.lease(STEP) as held:
        assert not held


def test_what_killed_processes_left_is_swept_and_what_live_ones_have_is_not(store, hold):
    dead, folder = {**this_process(), "born": 1.0}, store.leases.folder
    hold()
    for name, owner in (
        ("aa.json", {**dead, "token": "1"}),
        ("aa.1.claim", {**dead, "token": "2"}),
        ("bb.9.claim", {**dead, "token": "3"}),
        (".scratch", dead),
        (".live", this_process()),
    ):
        (folder / name).write_text(json.dumps(owner))
    (folder / ".empty").touch()
    (folder / ".old").touch()
    os.utime(folder / ".old", (0, 0))
    store.leases.sweep()
    assert left(store) == [".empty", ".live", f"{STEP.id}.json"]


def test_an_empty_folder_or_none_has_nothing_to_sweep(tmp_path):
    Leases(tmp_path / "none").sweep()
    assert not (tmp_path / "none").exists()
    assert Leases(tmp_path).live() == set()
