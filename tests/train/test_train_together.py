"""Two processes learn what one learns, carry on when killed, end together, and name the one that died."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch
from tiny_training import QUICK, metrics_of, same, tiny_model, train, weights

from mixmerge.errors import ModelError, StepError, UserError
from mixmerge.train.together import shares_refused, train_together

# 24 rows, 2 epochs: 48 rows, or 46 where one is held out. A last part of a batch that is not full is where the rows of
# processes differ in number.
IN_PARTS = {"batch_size": 8, "gradient_accumulation": 2, "epochs": 1.79}
KINDS = {
    "sft without padding and one row left": {"padding_free": True, "batch_size": 10, "epochs": 1.7, "held_out": 0.05},
    "sft in parts": IN_PARTS,
    "dpo in parts with odd pairs": {"method": "dpo", "loss": "ipo", "beta": 0.5, "held_out": 0.05, **IN_PARTS},
    "sft by lora": {"adapter": {"type": "lora", "r": 4}},
}
EXACT = ("step", "lr", "tokens", "completion_tokens")


@pytest.fixture(scope="module")
def steady(tmp_path_factory) -> Path:
    """A model without dropout, whose draws are others in another number of processes."""
    return tiny_model(tmp_path_factory.mktemp("steady"))


def what_of(**settings):
    defaults = {"method": "sft", **QUICK, "epochs": 2, "precision": "fp32", "save_dtype": "float32"}
    return defaults | settings


def together(model, mixture, folder, progress=None, processes=2, checkpoint_every=4, **settings):
    """Train in two processes, as `tiny_training.train` does in one."""
    place = {"work": folder / "work", "threads": processes, "device": "cpu", "checkpoint_every": checkpoint_every}
    what = what_of(**settings)
    return train_together(processes, what, model, mixture, folder / "out", progress=progress, **place)


def near(one, two) -> bool:
    return one.keys() == two.keys() and all(torch.allclose(one[name], two[name], atol=1e-5, rtol=0) for name in one)


def members(parent: int) -> list[psutil.Process]:
    """The training processes that a process has started."""
    return [child for child in psutil.Process(parent).children() if "mixmerge.train.rank" in child.cmdline()]


def gone(processes: list[psutil.Process]) -> bool:
    _, alive = psutil.wait_procs(processes, timeout=60)
    return not alive


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_learn_what_one_learns_to_within_rounding(kind, steady, facts, choices, tmp_path):
    mixture = choices if "dpo" in kind else facts
    steps: list[tuple[int, int]] = []
    alone = train(steady, mixture, tmp_path / "alone", **what_of(**KINDS[kind]))
    both = together(steady, mixture, tmp_path / "both", lambda *at: steps.append(at), **KINDS[kind])
    assert steps == [(step, alone["steps"]) for step in range(1, alone["steps"] + 1)]
    assert near(weights(tmp_path / "alone"), weights(tmp_path / "both"))
    assert sorted(f.name for f in (tmp_path / "alone/out").iterdir()) == sorted(
        f.name for f in (tmp_path / "both/out").iterdir()
    )
    for one, two in zip(metrics_of(tmp_path / "alone"), metrics_of(tmp_path / "both"), strict=True):
        assert one.keys() == two.keys()
        assert {key: one[key] for key in EXACT if key in one} == {key: two[key] for key in EXACT if key in two}
        if "held_out" in one:
            assert one["held_out"]["en"] == pytest.approx(two["held_out"]["en"], abs=1e-4)
        else:
            assert {**one} == pytest.approx({**two}, abs=1e-4)
    for counted in ("rows", "tokens", "completion_tokens", "truncated_rows", "dropped_rows"):
        assert alone[counted] == both[counted]
    assert not (tmp_path / "both" / "work" / "meeting").exists()


CHILD = """
import json, os, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from test_train_together import members, together
model, mixture, folder, kill_at = Path(sys.argv[2]), Path(sys.argv[3]), Path(sys.argv[4]), int(sys.argv[5])
def progress(done, total):
    if done == kill_at:
        print(json.dumps([member.pid for member in members(os.getpid())]), flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
together(model, mixture, folder, progress, **json.loads(sys.argv[6]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process that its parent is gone")
@pytest.mark.parametrize("method", ["sft", "dpo"])
def test_processes_end_with_the_one_that_started_them_and_carry_on_in_any_number(
    method, steady, facts, choices, tmp_path
):
    mixture = facts if method == "sft" else choices
    arguments = [Path(__file__).parent, steady, mixture, tmp_path / "killed", 6, json.dumps({"method": method})]
    killed = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", CHILD, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert killed.returncode == -signal.SIGKILL
    pids = json.loads(killed.stdout)
    assert len(pids) == 2
    assert gone([psutil.Process(pid) for pid in pids if psutil.pid_exists(pid)])
    assert (tmp_path / "killed" / "work" / "checkpoint-4" / "whole.json").is_file()
    steps: list[int] = []
    if method == "sft":
        together(steady, mixture, tmp_path / "killed", lambda done, _: steps.append(done))
        together(steady, mixture, tmp_path / "unbroken")
        assert same(weights(tmp_path / "killed"), weights(tmp_path / "unbroken"))
    else:
        train(steady, mixture, tmp_path / "killed", lambda done, _: steps.append(done), **what_of(method=method))
        train(steady, mixture, tmp_path / "unbroken", **what_of(method=method))
        assert near(weights(tmp_path / "killed"), weights(tmp_path / "unbroken"))
    assert steps[0] in (5, 9), "the processes may have gone on a little before they heard that they are alone"


def test_a_process_that_is_killed_ends_the_other_and_is_named_with_advice(steady, facts, tmp_path):
    seen: list[psutil.Process] = []

    def kill(done, _):
        if done == 2:
            seen.extend(members(os.getpid()))
            next(member for member in seen if member.cmdline()[-1] == "1").send_signal(signal.SIGKILL)

    with pytest.raises(StepError) as caught:
        together(steady, facts, tmp_path, kill, epochs=50)
    said = str(caught.value)
    assert said.startswith("training process 1 of 2: it was ended by SIGKILL; was there memory enough? it needs about ")
    assert "training.gradient_accumulation: 2" in said
    assert len(seen) == 2
    assert gone(seen)
    assert not (tmp_path / "out").exists()


def test_a_process_that_fails_is_named_with_what_it_said(steady, facts, tmp_path, capfd):
    with pytest.raises(StepError, match=r"^training process [01] of 2: the (loss|gradient norm) is (nan|inf) at step "):
        together(steady, facts, tmp_path, learning_rate=1e30, warmup_ratio=0)
    assert "Traceback" in capfd.readouterr().err, "the log has the whole of it"
    (tmp_path / "facts").mkdir()
    row = json.loads((facts / "rows.jsonl").read_text().splitlines()[0]) | {"lang": ["not a name"]}
    (tmp_path / "facts" / "rows.jsonl").write_text((json.dumps(row) + "\n") * 4)
    with pytest.raises(StepError, match=r"^training process [01] of 2: TypeError: .*; see the log$"):
        together(steady, tmp_path / "facts", tmp_path / "odd", held_out=0.5)


def test_what_a_person_can_mend_reads_as_it_does_of_one_process(facts, tmp_path):
    bare = tiny_model(tmp_path / "bare", template=None)
    with pytest.raises(ModelError) as alone:
        train(bare, facts, tmp_path / "one")
    with pytest.raises(ModelError) as caught:
        together(bare, facts, tmp_path / "two")
    assert str(caught.value) == str(alone.value)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"batch_size": 8}, None),
        ({"batch_size": 9}, "batch_size 9 does not divide among 2 processes"),
        ({"batch_size": 6, "gradient_accumulation": 3}, None),
        (
            {"batch_size": 8, "gradient_accumulation": 8},
            "batch_size 8 does not divide among 2 processes in 8 parts",
        ),
        ({"method": "dpo", "loss": "aot"}, "loss aot compares all pairs of a batch with each other"),
        ({"method": "dpo", "loss": "ipo"}, None),
        ({"adapter": {"type": "qlora"}}, "qlora trains in one process"),
        ({"adapter": {"type": "dora"}}, None),
    ],
)
def test_what_processes_cannot_share_is_known_beforehand(settings, said):
    refused = shares_refused(what_of(**settings), 2)
    assert (refused is None) == (said is None)
    assert refused is None or refused.startswith(said)


def test_settings_that_cannot_be_are_refused_as_ever():
    with pytest.raises(UserError, match="batch_size cannot be 0"):
        shares_refused(what_of(batch_size=0), 2)
