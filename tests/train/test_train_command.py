"""A training by a command: files in, files out, its words filled in, its failures told, its work kept."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from safetensors.torch import load_file

from mixmerge.errors import ModelError, StepError, UserError
from mixmerge.train.command import command_fields, how_it_ended, train_by_command

# a whole trainer of the user's own, on plain transformers
TRAINER = """
import json, sys
from pathlib import Path
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

model, mixture, out, work, rate = sys.argv[1:6]
rows = [json.loads(line) for line in Path(mixture, "rows.jsonl").read_text().splitlines()]
network, tokenizer = AutoModelForCausalLM.from_pretrained(model), AutoTokenizer.from_pretrained(model)
optimiser = torch.optim.SGD(network.parameters(), lr=float(rate))
for row in rows:
    text = tokenizer.apply_chat_template(row["prompt"] + row["completion"], tokenize=False)
    ids = tokenizer(text, return_tensors="pt").input_ids
    network(input_ids=ids, labels=ids).loss.backward()
    optimiser.step()
    optimiser.zero_grad()
network.save_pretrained(out)
Path(out, "metrics.jsonl").write_text(json.dumps({"step": len(rows)}) + chr(10))
"""


@pytest.fixture
def mixture(tmp_path: Path) -> Path:
    folder = tmp_path / "mixture"
    folder.mkdir()
    rows = [
        {"prompt": [{"role": "user", "content": f"Say {i}"}], "completion": [{"role": "assistant", "content": str(i)}]}
        for i in range(3)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "manifest.json").write_text(json.dumps({"rows": 3, "tokens": 50}))
    return folder


@pytest.fixture
def script(tmp_path: Path):
    def script(text: str) -> str:
        file = tmp_path / "trainer's own.py"
        file.write_text(textwrap.dedent(text))
        return f'{sys.executable} "{file}" {{model}} {{mixture}} {{out}} {{work}}'

    return script


@pytest.fixture
def trained(tiny_base, mixture, tmp_path):
    """Carries a command out; the measurements."""

    def trained(command: str, **settings):
        launcher = settings.pop("launcher", "")
        return train_by_command(
            command,
            tiny_base,
            mixture,
            tmp_path / "out",
            settings,
            work=tmp_path / "work",
            seed=7,
            threads=1,
            launcher=launcher,
        )

    return trained


def test_a_trainer_of_the_users_own_makes_a_whole_model(script, trained, tiny_base, tmp_path):
    measured = trained(script(TRAINER) + " {learning_rate}", learning_rate=0.1, epochs=2.0)
    assert measured.pop("command").startswith(f"{sys.executable} '")
    assert measured == {"rows": 3, "tokens": 100, "adapter": False}
    before, after = (load_file(folder / "model.safetensors") for folder in (tiny_base, tmp_path / "out"))
    assert before.keys() == after.keys()
    assert any((before[name].float() != after[name].float()).any() for name in before)
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (tiny_base / "tokenizer.json").read_bytes()
    assert (tmp_path / "out" / "metrics.jsonl").read_text() == '{"step": 3}\n'


def test_an_adapter_that_is_left_is_folded_into_the_start(script, trained, tiny_base, tmp_path):
    measured = trained(
        script("""
        import sys, torch
        from peft import LoraConfig, get_peft_model
        from transformers import AutoModelForCausalLM
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(sys.argv[1]), LoraConfig(r=2, target_modules=["q_proj"]))
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.ones_(parameter)
        model.save_pretrained(sys.argv[3])
        """)
    )
    assert (measured["tokens"], measured["adapter"]) == (None, True)
    before, after = (load_file(folder / "model.safetensors") for folder in (tiny_base, tmp_path / "out"))
    changed = {name for name in before if (before[name] != after[name]).any()}
    assert changed == {name for name in before if "q_proj" in name}


def test_the_words_are_filled_in_without_a_shell(script, trained, tmp_path, tiny_base, mixture):
    copy = """
        import json, os, shutil, sys
        from pathlib import Path
        shutil.copytree(sys.argv[1], sys.argv[3], dirs_exist_ok=True)
        Path(sys.argv[4], "seen.json").write_text(json.dumps([sys.argv[1:], os.environ["OMP_NUM_THREADS"]]))
        """
    trained(
        "{launcher} " + script(copy) + " --lr={learning_rate} {{literal}} '$HOME; rm -rf x' {seed} {threads}",
        learning_rate=0.5,
        launcher="env LAUNCHED=1",
    )
    words, threads = json.loads((tmp_path / "work" / "kept" / "seen.json").read_text())
    assert words[:2] == [str(tiny_base.resolve()), str(mixture.resolve())]
    assert words[4:] == ["--lr=0.5", "{literal}", "$HOME; rm -rf x", "7", "1"]
    assert threads == os.environ["OMP_NUM_THREADS"]


def test_the_model_folder_is_empty_and_the_work_is_kept_when_it_is_called_again(script, trained, tiny_base, tmp_path):
    command = script("""
        import shutil, sys
        from pathlib import Path
        assert not list(Path(sys.argv[3]).iterdir())
        count = Path(sys.argv[4], "count")
        count.write_text(str(int(count.read_text()) + 1) if count.exists() else "1")
        shutil.copytree(sys.argv[1], sys.argv[3], dirs_exist_ok=True)
        if count.read_text() == "1":
            sys.exit(3)
        """)
    with pytest.raises(StepError, match=r"python\S*: the command ended with status 3; see the log; run it again"):
        trained(command)
    assert not (tmp_path / "out").exists()
    trained(command)
    assert (tmp_path / "work" / "kept" / "count").read_text() == "2"
    assert (tmp_path / "out" / "model.safetensors").exists()


def test_what_goes_wrong_with_the_program_is_told(script, trained):
    with pytest.raises(StepError, match="no-such-trainer: the command cannot be started: no such file or directory"):
        trained("no-such-trainer {model} {mixture} {out}")
    with pytest.raises(StepError, match="the command was ended by SIGKILL"):
        trained(script("import os; os.kill(os.getpid(), 9)"))
    with pytest.raises(ModelError, match=r"no config.json"):
        trained(script("pass"))


def test_a_model_that_does_not_fit_its_start_is_refused(script, trained, tmp_path):
    with pytest.raises(ModelError, match=r"has shape"):
        trained(
            script("""
            import sys
            from transformers import AutoConfig, AutoModelForCausalLM
            config = AutoConfig.from_pretrained(sys.argv[1])
            config.vocab_size += 3
            AutoModelForCausalLM.from_config(config).save_pretrained(sys.argv[3])
            """)
        )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("command", "what"),
    [
        ("run {modle} {mixture} {out}", "the command has an unknown {modle}; did you mean 'model'"),
        ("run {model} {mixture}", "the command does not use {out}; it has to say where it reads and writes"),
        ("run {model} {mixture} {out} {", "the command cannot be read: "),
        ("run {model!r} {mixture} {out}", "the command has an unknown {model}"),
        ("run '{model} {mixture} {out}", "the command cannot be read: no closing quotation"),
        ("run {model} {mixture} {out} {learning}", "unknown {learning}; did you mean 'learning_rate'"),
        ("run {model} {mixture} {out} {}", "unknown {}"),
    ],
)
def test_a_command_that_cannot_hold_is_refused_beforehand(command, what):
    with pytest.raises(UserError) as caught:
        command_fields(command, ["learning_rate", "epochs"])
    assert what in str(caught.value)


def test_the_names_that_a_command_uses_are_known_beforehand():
    used = command_fields(
        "{launcher} run {model} --x={epochs} {mixture}/rows.jsonl {out} {{}}", ["epochs", "batch_size"]
    )
    assert used == {"launcher", "model", "mixture", "out", "epochs"}


# No orphans

# A trainer of four processes, none of which ends when it is asked to: the program itself, what it runs, what that started in a
# session of its own, and one that has lost its parent. Each leaves its pid. Called again it tells which of them are there.
STUBBORN = """
import os, signal, subprocess, sys, time
from pathlib import Path
signal.signal(signal.SIGTERM, signal.SIG_IGN)
kept, name = Path(sys.argv[4]), sys.argv[5]
def there(pid):
    stat = Path("/proc", pid, "stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] not in "ZX"
if name == "first" and list(kept.glob("*.pid")):
    time.sleep(0.5)
    pids = [file.read_text() for file in kept.glob("*.pid")]
    Path(kept, "left").write_text(" ".join(pid for pid in pids if there(pid)) or "none")
    sys.exit(5)
Path(kept, name + ".new").write_text(str(os.getpid()))
Path(kept, name + ".new").rename(Path(kept, name + ".pid"))
again = [sys.executable, *sys.argv[:5]]
if name == "first":
    subprocess.Popen([*again, "second"])
if name == "second":
    subprocess.Popen([*again, "session"], start_new_session=True)
    subprocess.Popen(["sh", "-c", 'setsid "$@" & exit', "sh", *again, "orphan"])
time.sleep(600)
"""
FAMILY = ("first", "second", "session", "orphan")
linux_only = pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells who is whose child for good")


@pytest.fixture
def started(tiny_base, mixture, tmp_path):
    """Starts a process that carries the command out, and gives it with its keeper and all that the command consists of."""
    begun: list[psutil.Process] = []

    def started(command: str) -> tuple[subprocess.Popen, psutil.Process, list[psutil.Process]]:
        call = (
            "from pathlib import Path; from mixmerge.train import command as c; c.GRACE_S = 0.5; "
            f"c.train_by_command({command!r}, Path({str(tiny_base)!r}), Path({str(mixture)!r}), "
            f"Path({str(tmp_path / 'out')!r}), {{}}, work=Path({str(tmp_path / 'work')!r}), seed=0, threads=1)"
        )
        parent = subprocess.Popen([sys.executable, "-c", call], stderr=subprocess.DEVNULL)
        files = [tmp_path / "work" / "kept" / f"{name}.pid" for name in FAMILY]
        while not all(file.exists() for file in files):
            assert parent.poll() is None
            time.sleep(0.05)
        family = [psutil.Process(int(file.read_text())) for file in files]
        (keeper,) = psutil.Process(parent.pid).children()
        begun.extend([keeper, *family])
        return parent, keeper, family

    yield started
    for process in begun:
        with suppress(psutil.NoSuchProcess):
            process.kill()


@linux_only
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
@pytest.mark.parametrize("by", ["", "sh -c '\"$@\"; exit' sh "])
def test_a_step_that_is_ended_takes_all_processes_of_its_command_with_it(script, started, by, number):
    parent, keeper, family = started(by + script(STUBBORN) + " first")
    parent.send_signal(number)
    parent.wait()
    assert psutil.wait_procs([keeper, *family], timeout=30)[1] == []


@linux_only
def test_a_command_that_ends_by_itself_leaves_no_process_behind(script, trained, tmp_path):
    with pytest.raises(StepError, match="ended with status 3"):
        trained(
            script("""
            import subprocess, sys
            from pathlib import Path
            left = subprocess.Popen(["sleep", "600"], start_new_session=True)
            Path(sys.argv[4], "pid").write_text(str(left.pid))
            sys.exit(3)
            """)
        )
    assert not psutil.pid_exists(int((tmp_path / "work" / "kept" / "pid").read_text()))


@linux_only
def test_a_trainer_that_is_asked_to_end_has_time_to_keep_a_checkpoint(script, started, tmp_path):
    """Also where a shell that started it is gone at once."""
    command = script(
        STUBBORN.replace(
            "signal.signal(signal.SIGTERM, signal.SIG_IGN)",
            "signal.signal(signal.SIGTERM, lambda *_: (time.sleep(0.2), Path(kept, name).touch(), os._exit(0)))",
        )
    )
    parent, keeper, family = started(f"sh -c '\"$@\"; exit' sh {command} first")
    parent.kill()
    parent.wait()
    assert psutil.wait_procs([keeper, *family], timeout=30)[1] == []
    assert {name for name in FAMILY if (tmp_path / "work" / "kept" / name).exists()} == set(FAMILY)


@linux_only
def test_the_next_run_ends_what_is_left_before_it_starts_where_the_keeper_was_killed_too(
    script, started, trained, tmp_path, monkeypatch
):
    monkeypatch.setattr("mixmerge.train.command.GRACE_S", 0.5)
    command = script(STUBBORN) + " first"
    parent, keeper, family = started(command)
    for process in (parent, keeper):
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert any(process.is_running() for process in family[1:]), "they have another parent now"
    with pytest.raises(StepError, match="ended with status 5"):
        trained(command)
    assert (tmp_path / "work" / "kept" / "left").read_text() == "none"


@linux_only
def test_the_next_run_begins_only_when_the_keeper_has_ended_the_last_one(script, started, trained, tmp_path):
    command = script(STUBBORN) + " first"
    parent, _, _ = started(command)
    parent.kill()
    parent.wait()
    with pytest.raises(StepError, match="ended with status 5"):
        trained(command)
    assert (tmp_path / "work" / "kept" / "left").read_text() == "none"


def test_an_exit_status_is_told_in_words():
    assert [how_it_ended(status) for status in (0, 3, -9, -15)] == [
        "ended with status 0",
        "ended with status 3",
        "was ended by SIGKILL",
        "was ended by SIGTERM",
    ]


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_a_model_with_weights_that_are_no_numbers_is_refused_by_its_tensor(script, trained, tmp_path, value):
    spoilt = f"""
        import shutil, sys
        from pathlib import Path
        from safetensors.torch import load_file, save_file
        shutil.copytree(sys.argv[1], sys.argv[3], dirs_exist_ok=True)
        tensors = load_file(Path(sys.argv[1], "model.safetensors"))
        tensors["model.norm.weight"][-1] = float("{value}")
        save_file(tensors, Path(sys.argv[3], "model.safetensors"), {{"format": "pt"}})
        """
    with pytest.raises(StepError, match=r"left a model whose tensor 'model\.norm\.weight' holds NaN or infinity; see"):
        trained(script(spoilt))
    assert not (tmp_path / "out").exists()


def test_an_adapter_with_weights_that_are_no_numbers_is_refused_too(script, trained, tmp_path):
    with pytest.raises(StepError, match=r"tensor '\S*lora_B\S*' holds NaN or infinity"):
        trained(
            script("""
            import sys, torch
            from peft import LoraConfig, get_peft_model
            from transformers import AutoModelForCausalLM
            model = get_peft_model(AutoModelForCausalLM.from_pretrained(sys.argv[1]), LoraConfig(r=2, target_modules=["q_proj"]))
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    torch.nn.init.constant_(parameter, float("nan"))
            model.save_pretrained(sys.argv[3])
            """)
        )
    assert not (tmp_path / "out").exists()
