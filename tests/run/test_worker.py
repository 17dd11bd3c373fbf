"""The worker: one step under its lease, its events, its log, and what it calls an error."""

from __future__ import annotations

import json
import resource
import signal
import subprocess
import sys
from queue import Queue

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from mixmerge.errors import CheckpointError, DataError, MixmergeError, StepError
from mixmerge.evaluate.limits import BudgetError, NoKeyError, ServerError, Shortage
from mixmerge.plan.graph import Step
from mixmerge.run.local import Worker, log_file, worker_environment
from mixmerge.run.servers import connect, servers_of, told_of
from mixmerge.run.steps import StepContext, let_go
from mixmerge.run.store import RECORD, Store, write_json
from mixmerge.run.worker import _log, _named, carry_out


@pytest.fixture
def told():
    """The events that were emitted, as (event, data)."""
    return []


@pytest.fixture
def emit(told):
    return lambda event, **data: told.append((event, data))


@pytest.fixture
def plan_file(chain, tmp_path):
    folder = tmp_path / "runs" / "chain"
    folder.mkdir(parents=True)
    write_json(folder / "plan.json", chain.to_json())
    return folder / "plan.json"


def test_a_step_is_begun_told_of_and_done_once(chain, tmp_path, told, emit):
    store, base = Store(tmp_path), chain.steps[0]
    carry_out(base, chain, store, {}, emit)
    assert [event for event, _ in told] == ["start", "done"]
    assert told[-1][1]["measurements"]["parameters"] > 0
    assert store.running(base) is None
    before = store.path(base.id).joinpath(RECORD).stat().st_mtime_ns
    carry_out(base, chain, store, {}, emit)
    assert [event for event, _ in told] == ["start", "done", "done"], "done already: told, not begun"
    assert store.path(base.id).joinpath(RECORD).stat().st_mtime_ns == before


def test_progress_is_told_to_the_end(chain, tmp_path, told, emit):
    store = Store(tmp_path)
    for step in chain.steps[:2]:
        carry_out(step, chain, store, {}, emit)
    last = [data for event, data in told if event == "progress"][-1]
    assert last["done"] == last["total"] > 0


def test_a_step_that_was_killed_after_its_record_is_only_put_into_its_place(chain, tmp_path, told, emit):
    store, base = Store(tmp_path), chain.steps[0]
    write_json(store.begin(base).out / RECORD, {"id": base.id, "from": "before the kill"})
    carry_out(base, chain, store, {}, emit)
    assert [(event, fields["by"]) for event, fields in told] == [("done", "an earlier run")]
    assert store.record(base.id)["from"] == "before the kill"


@pytest.mark.parametrize("name", ["base", "one"])
def test_what_a_kill_left_in_the_folder_does_not_stand_in_the_way(chain, tmp_path, emit, name):
    store = Store(tmp_path)
    for step in chain.steps[:2]:
        if step.name == name:
            (store.begin(step).out / "half").write_text("x")
        carry_out(step, chain, store, {}, emit)
    folder = store.path(chain.find(f"{'base' if name == 'base' else 'merge'}/{name}").id)
    assert not (folder / "half").exists()
    assert (folder / "model.safetensors").is_file()


def test_a_worker_whose_step_is_taken_over_says_so_leaves_the_rest_and_ends(chain, plan_file, tmp_path):
    store, step, after = Store(tmp_path), *chain.steps[1:3]
    carry_out(chain.steps[0], chain, store, {}, lambda *_, **__: None)
    code = (
        "import sys; from mixmerge.run import lease, steps, worker; import time; lease.HEARTBEAT_S = 0.05;"
        "steps.CARRY_OUT['merge'] = lambda context: time.sleep(600); sys.exit(worker.main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", code, str(tmp_path), str(plan_file), step.id, after.id]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        started = json.loads(process.stdout.readline())
        assert (started["event"], started["step"], started["pid"]) == ("start", step.id, process.pid)
        theirs = {"host": "elsewhere", "pid": 1, "token": "theirs"}
        write_json(store.leases.path(step.id), theirs)
        failed, skipped = (json.loads(line) for line in process.stdout)
        assert process.wait() == 1
    assert (failed["event"], failed["step"], failed["bug"]) == ("failed", step.id, False)
    assert failed["error"].startswith("another runner took the step over, since this process stood still")
    assert skipped == {"event": "skipped", "step": after.id}
    assert store.running(step) == theirs
    assert store.find(step.id) is None


def test_an_error_leaves_the_lease_free_and_the_step_undone(broken_chain, tmp_path, emit):
    store = Store(tmp_path)
    carry_out(broken_chain.steps[0], broken_chain, store, {}, emit)
    with pytest.raises(MixmergeError, match="nonsense"):
        carry_out(broken_chain.steps[1], broken_chain, store, {}, emit)
    assert store.running(broken_chain.steps[1]) is None
    assert store.find(broken_chain.steps[1].id) is None


def test_data_that_changed_since_the_plan_is_noticed(study, tmp_path, emit):
    from mixmerge.plan.build import build_plan
    from mixmerge.recipe.load import load_recipe

    plan, store = build_plan(load_recipe(study.recipe)), Store(study.out)
    carry_out(plan.find("base/base"), plan, store, {}, emit)
    path = study.folder / "data/general.en.jsonl"
    path.write_text(path.read_text().replace("sky", "night sky"))
    with pytest.raises(StepError, match="the data set 'general' has changed since the plan was made; run the same"):
        carry_out(plan.find("mixture/general"), plan, store, {}, emit)


def test_a_worker_process_sends_events_alone_to_its_output_and_the_rest_to_the_log_of_the_step(
    chain, plan_file, tmp_path
):
    ids = [step.id for step in chain.steps[:2]]
    command = [sys.executable, "-m", "mixmerge.run.worker", str(tmp_path), str(plan_file), *ids]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        lines = [json.loads(line) for line in process.stdout]
        assert process.wait() == 0
    assert [(line["event"], line["step"]) for line in lines if line["event"] != "progress"] == [
        (event, step_id) for step_id in ids for event in ("start", "done")
    ]
    assert all(log_file(plan_file, step).exists() for step in chain.steps[:2])


def test_a_worker_that_fails_says_so_with_its_status_and_its_log(broken_chain, tmp_path):
    folder = tmp_path / "runs" / "broken"
    folder.mkdir(parents=True)
    write_json(folder / "plan.json", broken_chain.to_json())
    ids = [step.id for step in broken_chain.steps[:3]]
    command = [sys.executable, "-m", "mixmerge.run.worker", str(tmp_path), str(folder / "plan.json"), *ids]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        lines = [json.loads(line) for line in process.stdout]
        assert process.wait() == 1
    ends = [line["event"] for line in lines if line["event"] in ("done", "failed")]
    assert ends == ["done", "failed", "done"], "the step after the failed one is done"
    log = log_file(folder / "plan.json", broken_chain.steps[1]).read_text()
    assert "error: merge/bad: " in log.splitlines()[-1]
    assert "nonsense" in log
    assert log_file(folder / "plan.json", broken_chain.steps[2]).read_text() == ""


def test_the_log_of_an_error_that_we_raised_ends_with_its_line_and_has_no_traceback(tmp_path, capsys):
    step = Step("train", "x", {})
    print("the trainer's own words", file=sys.stderr)
    with pytest.raises(StepError) as caught:
        raise StepError("the command ended with status 3")
    _log(caught.value, step, str(caught.value))
    said = capsys.readouterr().err.splitlines()
    assert said == ["the trainer's own words", "error: train/x: the command ended with status 3"]


@pytest.mark.parametrize("hidden", [False, True])
def test_the_log_of_an_error_with_another_behind_it_has_the_traceback_above_its_line(capsys, hidden):
    def read():
        try:
            return {}["weights"]
        except KeyError as error:
            raise StepError("no weights") from (None if hidden else error)

    with pytest.raises(StepError) as caught:
        read()
    _log(caught.value, Step("train", "x", {}), "no weights")
    *before, last = capsys.readouterr().err.splitlines()
    assert last == "error: train/x: no weights"
    assert ("KeyError: 'weights'" in before) is not hidden


def test_the_log_of_what_we_did_not_foresee_or_only_named_has_the_traceback(capsys):
    for error, named in ((RuntimeError("shapes differ"), None), (PermissionError(13, "denied"), "no permission")):
        try:
            raise error
        except Exception as caught:
            _log(caught, Step("train", "x", {}), named)
        said = capsys.readouterr().err
        assert "Traceback" in said
        assert said.splitlines()[-1] == (
            "RuntimeError: shapes differ" if named is None else "error: train/x: no permission"
        )


def test_a_worker_that_cannot_even_start_ends_with_its_status_and_a_log(base_step, tmp_path):
    events: Queue = Queue()
    worker = Worker(
        [base_step], root=tmp_path, plan_file=tmp_path / "gone.json", environment=worker_environment(1), events=events
    )
    end = events.get(timeout=60)
    assert (end["event"], end["worker"], end["code"]) == ("exit", worker, 1)
    assert "FileNotFoundError" in log_file(tmp_path / "gone.json", base_step).read_text()
    worker.signal(signal.SIGTERM)  # too late, and no error
    assert worker.wait(5)


# What an error is called


def test_a_named_error_stays_what_it_is(tmp_path):
    error = DataError("x", where="f:1")
    assert _named(error, tmp_path) is error


def test_an_error_of_the_system_is_named_with_its_file(tmp_path):
    named = _named(FileNotFoundError(2, "No such file or directory", "/gone"), tmp_path)
    assert isinstance(named, CheckpointError)
    assert str(named) == "/gone: No such file or directory"


def test_a_full_disk_inside_a_librarys_own_error_is_named(tmp_path):
    error = RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)")
    assert "no space left on the disk" in str(_named(error, tmp_path / "step"))


def test_an_error_of_the_system_inside_a_librarys_own_is_named_with_the_folder(tmp_path):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, before[1]))
    try:
        with pytest.raises(SafetensorError) as caught:
            save_file({"weight": torch.zeros(1 << 16)}, tmp_path / "model.safetensors")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    named = _named(caught.value, tmp_path / "step")
    assert isinstance(named, CheckpointError)
    assert str(named) == f"{tmp_path / 'step'}: File too large"


def test_what_we_did_not_foresee_is_a_bug(tmp_path):
    assert _named(KeyError("config"), tmp_path / "step") is None
    assert _named(RuntimeError("shapes differ"), tmp_path / "step") is None


def test_a_group_that_shares_a_thing_makes_it_once_and_drops_it_for_the_next(chain, tmp_path):
    shared: dict = {}
    context = StepContext(
        chain.steps[0], tmp_path, tmp_path, Store(tmp_path), shared, lambda done, total: None, print, tmp_path / "log"
    )
    made = []

    def make(name):
        assert "value" not in shared, "the last one is dropped before the next is made"
        made.append(name)
        return name

    assert [context.keep(key, lambda key=key: make(key)) for key in ("a", "a", "b", "b", "a")] == [
        "a",
        "a",
        "b",
        "b",
        "a",
    ]
    assert made == ["a", "b", "a"]


def server_step(name: str, group: str, urls: list[str], *, key: str | None = None) -> Step:
    place = {"urls": urls, "start": None, "replicas": 1, "ready_within": 9.0, "key": key, "timeout": 9.0}
    how = {"server": place | {"concurrency": 2}}
    return Step("judge", name, {"judge": "endpoint", "name": name}, how=how, group=group)


A, B = "http://a/v1", "http://b/v1"


def test_steps_of_one_server_are_known_by_its_model_and_by_its_address_with_the_key():
    one, same, other = (server_step(n, f"judge {n}", u) for n, u in (("x", [A, B]), ("y", [B, A]), ("z", [A])))
    assert servers_of(one)[0] == "judge x"
    assert servers_of(one)[1] == servers_of(same)[1] != servers_of(other)[1]
    assert servers_of(one)[1] != servers_of(server_step("x", "judge x", [A, B], key="KEY"))[1]
    assert servers_of(server_step("x", "generate 1", [])) == ("generate 1",), "one that is started serves one model"
    assert servers_of(Step("merge", "m", {})) == ()


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (ServerError("gone"), {"server": f"{A} by None"}),
        (ServerError("no such model", of_model=True), {"server": "judge x"}),
        (StepError("no usable answer"), {"server": "judge x"}),
        (NoKeyError("no key"), {"server": f"{A} by None"}),
        (DataError("a damaged row"), {}),
        (None, {}),
    ],
)
def test_what_a_failed_step_tells_of_its_server_is_what_others_share(error, told):
    assert told_of(server_step("x", "judge x", [A]), error) == told
    assert told_of(Step("merge", "m", {}), error) == {}


def test_a_spent_budget_is_told_in_numbers_and_leaves_the_server_to_the_next_step(tmp_path):
    class Held:
        closed = False

        def close(self) -> None:
            self.closed = True

    error = BudgetError(Shortage("the budget of 3 requests", 1, 2, 30, None), where="judge x")
    told = told_of(server_step("x", "judge x", [A]), error)
    assert told == {
        "budget": {
            "whose": "judge x",
            "over": "the budget of 3 requests",
            "done": 1,
            "missing": 2,
            "tokens": 30,
            "money": None,
        }
    }
    held = Held()
    shared = {"key": "x", "value": held}
    let_go(shared, error)
    assert (shared["value"], held.closed) == (held, False)
    let_go(shared, ServerError("gone"))
    assert (shared, held.closed) == ({}, True)


def test_a_kept_client_tells_the_step_that_asks_it_now(tmp_path):
    shared: dict = {}
    clients = []
    for name in ("one", "two"):
        step, words = server_step(name, "judge x", ["http://127.0.0.1:9/v1"]), []
        folders = (tmp_path, tmp_path, Store(tmp_path))
        context = StepContext(step, *folders, shared, lambda done, total: None, words.append, tmp_path / "log")
        clients.append(connect(context, "m", scope="s", name="judge x").client)
        clients[-1].tell(f"to {name}")
        assert words == [f"to {name}"]
    assert clients[0] is clients[1]
    other = connect(context, "m", scope="s", name="judge x", budget={"requests": 3}).client
    assert other is not clients[0], "another budget is another client's"
    let_go(shared)


def test_every_kind_of_step_can_be_carried_out():
    from mixmerge.plan.graph import KINDS
    from mixmerge.run.steps import CARRY_OUT

    assert set(CARRY_OUT) == set(KINDS)
