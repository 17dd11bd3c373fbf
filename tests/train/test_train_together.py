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
from mixmerge.train.settings import Devices
from mixmerge.train.together import shares_refused, train_together

# 24 rows, 2 epochs: 48 rows, or 46 where one is held out. A last part of a batch that is not full is where the rows of
# processes differ in number.
IN_PARTS = {"batch_size": 8, "gradient_accumulation": 2, "epochs": 1.79}
KINDS = {
    "sft without padding and one row left": {"padding_free": True, "batch_size": 10, "epochs": 1.7, "held_out": 0.075},
    "sft in parts": IN_PARTS,
    "dpo in parts with odd pairs": {"method": "dpo", "loss": "ipo", "beta": 0.5, "held_out": 0.075, **IN_PARTS},
    "sft by lora": {"adapter": {"type": "lora", "r": 4}},
}
TWO = Devices(2)
SHARED = Devices(2, fsdp=True)
EXACT = ("step", "lr", "tokens", "completion_tokens")


@pytest.fixture(scope="module")
def steady(tmp_path_factory) -> Path:
    """A model without dropout, whose draws are others in another number of processes."""
    return tiny_model(tmp_path_factory.mktemp("steady"))


def what_of(**settings):
    defaults = {"method": "sft", **QUICK, "epochs": 2, "precision": "fp32", "save_dtype": "float32"}
    return defaults | settings


def together(model, mixture, folder, progress=None, devices=TWO, launcher="", gradient_checkpointing=False, **settings):
    """Train in two processes, as `tiny_training.train` does in one."""
    place = {"work": folder / "work", "threads": 2, "device": "cpu", "checkpoint_every": 4}
    what, told = what_of(**settings), {"progress": progress, "launcher": launcher}
    place["gradient_checkpointing"] = gradient_checkpointing
    return train_together(devices, what, model, mixture, folder / "out", **told, **place)


def near(one, two) -> bool:
    return one.keys() == two.keys() and all(torch.allclose(one[name], two[name], atol=1e-5, rtol=0) for name in one)


def members(parent: int) -> list[psutil.Process]:
    """The training processes that a process has started."""
    return [child for child in psutil.Process(parent).children() if "mixmerge.train.rank" in child.cmdline()]


def gone(processes: list[psutil.Process]) -> bool:
    _, alive = psutil.wait_procs(processes, timeout=60)
    return not alive


@pytest.mark.parametrize(
    ("kind", "devices"),
    [(kind, TWO) for kind in KINDS] + [(kind, SHARED) for kind in KINDS if "without padding" in kind or "dpo" in kind],
    ids=lambda value: {TWO: "ddp", SHARED: "fsdp"}.get(value) if isinstance(value, Devices) else value,
)
def test_two_processes_learn_what_one_learns_to_within_rounding(kind, devices, steady, facts, choices, tmp_path):
    mixture = choices if "dpo" in kind else facts
    steps: list[tuple[int, int]] = []
    alone = train(steady, mixture, tmp_path / "alone", **what_of(**KINDS[kind]))
    both = together(steady, mixture, tmp_path / "both", lambda *at: steps.append(at), devices, **KINDS[kind])
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
    assert not list((tmp_path / "both" / "work").glob("meeting*"))


CHILD = """
import json, os, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from test_train_together import Devices, members, together
model, mixture, folder, kill_at = Path(sys.argv[2]), Path(sys.argv[3]), Path(sys.argv[4]), int(sys.argv[5])
def progress(done, total):
    if done == kill_at:
        print(json.dumps([member.pid for member in members(os.getpid())]), flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
settings = json.loads(sys.argv[6])
together(model, mixture, folder, progress, Devices(2, fsdp=settings.pop("fsdp")), **settings)
"""


def test_two_processes_learn_beside_four_bits_what_one_learns(steady, facts, tmp_path):
    settings = {"adapter": {"type": "qlora", "r": 4}}
    train(steady, facts, tmp_path / "alone", **what_of(**settings))
    together(steady, facts, tmp_path / "both", **settings)
    one, two = weights(tmp_path / "alone"), weights(tmp_path / "both")
    assert all(torch.allclose(one[name], two[name], atol=1e-3) for name in one), "four bits are computed with in bf16"


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process that its parent is gone")
@pytest.mark.parametrize(("method", "fsdp"), [("sft", False), ("dpo", True)])
def test_processes_end_with_the_one_that_started_them_and_carry_on_in_any_number(
    method, fsdp, steady, facts, choices, tmp_path
):
    mixture = facts if method == "sft" else choices
    settings = {"method": method, "fsdp": fsdp}
    arguments = [Path(__file__).parent, steady, mixture, tmp_path / "killed", 6, json.dumps(settings)]
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
    if method == "sft" or fsdp:
        devices = SHARED if fsdp else TWO
        if fsdp:
            with pytest.raises(
                StepError, match=r"checkpoint-\d: the checkpoint was written with how.fsdp: true; set it"
            ):
                train(steady, mixture, tmp_path / "killed", **what_of(method=method))
        together(steady, mixture, tmp_path / "killed", lambda done, _: steps.append(done), devices, method=method)
        together(steady, mixture, tmp_path / "unbroken", None, devices, method=method)
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
    rows = [json.loads(line) | {"lang": ["not a name"]} for line in (facts / "rows.jsonl").read_text().splitlines()]
    (tmp_path / "facts" / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
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
        ({"adapter": {"type": "qlora"}}, None),
        ({"adapter": {"type": "dora"}}, None),
    ],
)
def test_what_processes_cannot_share_is_known_beforehand(settings, said):
    refused = shares_refused(what_of(**settings), TWO)
    assert (refused is None) == (said is None)
    assert refused is None or refused.startswith(said)


def test_settings_that_cannot_be_are_refused_as_ever():
    with pytest.raises(UserError, match="batch_size cannot be 0"):
        shares_refused(what_of(batch_size=0), TWO)


@pytest.mark.parametrize("adapter", [None, {"type": "lora", "r": 4}], ids=["all weights", "lora"])
def test_weights_that_are_shared_out_lie_in_halves_and_are_written_whole(adapter, facts, tmp_path):
    tied = tiny_model(tmp_path / "tied", hidden_size=64, intermediate_size=512, tie_word_embeddings=True)
    settings = {"precision": "bf16", "save_dtype": "bfloat16", "adapter": adapter}
    alone = train(tied, facts, tmp_path / "alone", **what_of(**settings))
    both = together(tied, facts, tmp_path / "both", None, SHARED, gradient_checkpointing=True, **settings)
    assert both["last_loss"] == pytest.approx(alone["last_loss"], abs=0.02)
    one, two = weights(tmp_path / "alone"), weights(tmp_path / "both")
    assert {name: weight.dtype for name, weight in one.items()} == {name: weight.dtype for name, weight in two.items()}
    assert all(torch.allclose(one[name].float(), two[name].float(), atol=0.02) for name in one)
    assert (tmp_path / "both/out/config.json").read_text() == (tmp_path / "alone/out/config.json").read_text()
    (checkpoint,) = (tmp_path / "both" / "work").glob("checkpoint-*")
    sizes = [file.stat().st_size for file in checkpoint.glob("pytorch_model_fsdp_0/*.distcp")]
    assert len(sizes) == 2
    assert max(sizes) < 0.6 * sum(sizes)
