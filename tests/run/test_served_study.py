"""Studies whose answers or verdicts come from servers: real processes that load the model, are killed, die and lie."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from safetensors.torch import load_file, save_file
from scripted_judge import Reply
from scripted_judge import serving as scripted

TRANSFORMERS = (
    f"'{sys.executable}' -m transformers.cli.transformers serve {{model}} --host {{host}} --port {{port}} --device cpu"
)
# Quick to start: says how long the prompt is, and the first bytes of the model's weights; what it was asked and its
# process stand in files beside it.
SERVER = """
import hashlib, json, os, sys, time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

here, model, port, *flags = Path(sys.argv[0]).parent, *sys.argv[1:]
with (here / "started").open("a") as file:
    file.write(f"{os.getpid()} {model}\\n")
if "broken" in flags:
    sys.exit("error: it has no kernels for this machine")
weights = hashlib.sha256((Path(model) / "model.safetensors").read_bytes()).hexdigest()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self.say({"data": []})

    def do_POST(self):
        raw = self.rfile.read(int(self.headers["Content-Length"]))
        with (here / "asked").open("ab") as file:
            file.write(raw + b"\\n")
        if (here / "dying").exists() and (here / "asked").read_bytes().count(b"\\n") > 3:
            sys.stderr.write("CUDA error: an illegal memory access\\n")
            os._exit(9)
        time.sleep(0.4 if (here / "slow").exists() else 0)
        body = json.loads(raw)
        length = sum(len(message["content"]) for message in body["messages"])
        message = {"role": "assistant", "content": f"{length} letters, {weights[:6]}, {' '.join(flags)}"}
        self.say({"choices": [{"message": message, "finish_reason": "stop"}], "usage": {"completion_tokens": 5}})

    def say(self, what):
        data = json.dumps(what).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        pass


ThreadingHTTPServer(("127.0.0.1", int(port)), Handler).serve_forever()
"""


@pytest.fixture(scope="session")
def answered(made_once, new_study, study_in, tiny_base) -> Any:
    """A finished study of two candidates in float32 that say something else at every step."""

    def make(folder: Path) -> None:
        base = Path(shutil.copytree(tiny_base, folder / "base"))
        tensors = load_file(base / "model.safetensors")
        tensors = {name: tensor.float() * (20 if tensor.dim() == 2 else 1) for name, tensor in tensors.items()}
        save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
        config = json.loads((base / "config.json").read_text(encoding="utf-8"))
        (base / "config.json").write_text(json.dumps(config | {"dtype": "float32"}), encoding="utf-8")
        study = new_study(folder / "study")
        (study.folder / "base").unlink()
        (study.folder / "base").symlink_to(base, target_is_directory=True)
        text = study.recipe.read_text(encoding="utf-8")
        start, end = text.index("baselines:"), text.index("evaluation:")
        study.recipe.write_text(text[:start] + text[end:], encoding="utf-8")
        done = study.call("run")
        assert done.returncode == 0, done.stderr

    return study_in(made_once("answered", make) / "study")


@pytest.fixture
def copy(answered, tmp_path: Path) -> Any:
    """A copy of that study: its models are there, answers of servers are not."""
    shutil.copytree(answered.folder, tmp_path / "study", symlinks=True)
    return type(answered)(tmp_path / "study")


@pytest.fixture
def small(copy) -> Iterator[Path]:
    """The folder of the small server; no process of it is left after a test."""
    folder = copy.folder / "server"
    folder.mkdir()
    (folder / "serve.py").write_text(SERVER, encoding="utf-8")
    yield folder
    assert no_process_of(copy.folder)


def start(folder: Path, *flags: str) -> str:
    return f"'{sys.executable}' '{folder}/serve.py' {{model}} {{port}} {' '.join(flags)}"


def served(**keys: Any) -> tuple[str, str]:
    return "--set", "evaluation.server=" + json.dumps(keys)


def texts(study) -> dict[str, list[str]]:
    """The newest responses, by `candidate.set`."""
    found: dict[str, tuple[float, list[str]]] = {}
    for file in study.store.glob("generate/*/responses.jsonl"):
        rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        name, at = file.parent.name.partition("--")[0], (file.parent / "record.json").stat().st_mtime_ns
        found[name] = max(found.get(name, (0, [])), (at, [row["text"] for row in rows]))
    return {name: rows for name, (_, rows) in found.items()}


def asked(folder: Path) -> list[str]:
    file = folder / "asked"
    return file.read_text(encoding="utf-8").splitlines() if file.exists() else []


def started(folder: Path) -> list[str]:
    return (folder / "started").read_text(encoding="utf-8").splitlines()


def processes_of(folder: Path) -> list[psutil.Process]:
    """Processes other than this one that have the folder in their command."""
    found = []
    for process in psutil.process_iter(["cmdline", "status"]):
        if process.info["status"] != psutil.STATUS_ZOMBIE and any(
            str(folder) in word for word in process.info["cmdline"] or ()
        ):
            found.append(process)
    return found


def no_process_of(folder: Path, seconds: float = 60) -> bool:
    end = time.monotonic() + seconds
    while (found := processes_of(folder)) and time.monotonic() < end:
        time.sleep(0.05)
    return not found


def wait_until(condition, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def one_line(stderr: str, *words: str) -> str:
    """The only line with those words."""
    assert "Traceback" not in stderr
    [line] = [line for line in stderr.splitlines() if all(word in line for word in words)]
    return line


def failed(stderr: str) -> str:
    """The line on the first of the base's steps that failed; which of its sets comes first is the planner's to say."""
    return one_line(stderr, "generate/base.", "  FAILED: ")


# A server for every candidate


def test_a_real_server_of_every_candidate_says_what_this_process_says_and_is_gone(copy):
    pytest.importorskip("fastapi")
    pytest.importorskip("uvicorn")
    before = texts(copy)
    shutil.rmtree(copy.store / "generate")
    done = copy.call("run", *served(start=TRANSFORMERS), "--set", "evaluation.limit.test=1")
    assert done.returncode == 0, done.stderr
    after = texts(copy)
    assert set(after) == {f"{candidate}.{name}" for candidate in ("base", "general") for name in ("general", "harmful")}
    for name, rows in after.items():
        assert set(rows) <= set(before[name]), "greedy, in float32: the same texts"
        assert len(rows) == 4
        assert any(rows)
    assert no_process_of(copy.folder)


def test_every_candidate_has_one_server_for_all_its_prompts(copy, small):
    done = copy.call("run", *served(start=start(small), extra={"min_p": 0.1}))
    assert done.returncode == 0, done.stderr
    models = [line.split()[1] for line in started(small)]
    assert sorted(Path(model).name.partition("--")[0] for model in models) == ["base", "general"]
    bodies = [json.loads(line) for line in asked(small)]
    assert len(bodies) == 24
    assert {body["min_p"] for body in bodies} == {0.1}
    assert {body["model"] for body in bodies} == set(models)
    found = texts(copy)
    weights = {name: {text.split()[2] for text in rows} for name, rows in found.items()}
    assert weights["base.general"] == weights["base.harmful"] != weights["general.general"]
    again = copy.call("run", *served(start=start(small), extra={"min_p": 0.1}))
    assert again.returncode == 0, again.stderr
    assert len(started(small)) == 2, "what is answered needs no server"


def test_a_model_that_is_made_again_is_asked_again(copy, small):
    only = ("run", *served(start=start(small)), "--only", "generate/general.general")
    assert copy.call(*only).returncode == 0
    before = asked(small)
    for folder in [*copy.store.glob("generate/general.general--*"), copy.only("train/general--*")]:
        shutil.rmtree(folder)
    assert copy.call(*only).returncode == 0
    assert len(asked(small)) == 2 * len(before), (
        "what another model said, of other bytes perhaps, is no answer of this one"
    )


def test_another_command_is_another_server_and_its_answers_are_its_own(copy, small):
    for flag in ("one", "two"):
        done = copy.call("run", *served(start=start(small, flag)))
        assert done.returncode == 0, done.stderr
        assert all(text.endswith(flag) for rows in texts(copy).values() for text in rows)


def test_a_run_killed_half_way_leaves_no_server_and_the_same_command_asks_only_the_rest(copy, small):
    (small / "slow").touch()
    arguments = served(start=start(small), concurrency=1)
    run = subprocess.Popen(copy.command("run", *arguments), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_until(lambda: len(asked(small)) >= 4)
    run.send_signal(signal.SIGKILL)
    run.wait()
    assert no_process_of(copy.folder)
    (small / "slow").unlink()
    done = copy.call("run", *arguments)
    assert done.returncode == 0, done.stderr
    bodies = asked(small)
    assert len(set(bodies)) == 24
    assert len(bodies) <= 25, "at most what was under way is asked again"


# Servers that fail


def test_a_program_that_is_not_there_is_refused_with_its_line_before_anything_starts(copy):
    done = copy.call("check", *served(start="no-such-server {model} {port}"))
    assert done.returncode == 2
    assert "no program 'no-such-server'" in one_line(done.stderr, "no-such-server")
    text = copy.recipe.read_text(encoding="utf-8")
    server = '  server: {start: "no-such-server {model} {port}"}\n'
    copy.recipe.write_text(text.replace("  max_new_tokens", server + "  max_new_tokens"), encoding="utf-8")
    number = copy.recipe.read_text(encoding="utf-8").splitlines().index(server.rstrip()) + 1
    written = copy.call("check")
    assert written.returncode == 2
    assert f"recipe.yaml:{number}" in one_line(written.stderr, "no-such-server")


def test_a_server_that_dies_at_once_is_one_line_with_its_last_words_and_a_log_that_stays(copy, small):
    done = copy.call("run", *served(start=start(small, "broken")))
    assert done.returncode == 1
    line = failed(done.stderr)
    assert "the server ended with status 1: error: it has no kernels for this machine" in line
    assert "no kernels" in log_in(line).read_text(encoding="utf-8")
    assert "; 1 more step(s) that ask this server are not tried in this run" in line
    assert done.stderr.count("  FAILED: ") == len(started(small)) == 2, "once for each model"


def log_in(line: str) -> Path:
    """The log that a message names."""
    [word] = {word.rstrip(":;,.") for word in line.split() if ".log" in word}
    return Path(word)


def test_a_server_that_dies_in_the_middle_is_told_by_its_death_and_carried_on_from(copy, small):
    (small / "dying").touch()
    arguments = served(start=start(small), concurrency=1)
    done = copy.call("run", *arguments)
    assert done.returncode == 1
    line = failed(done.stderr)
    assert "the server ended with status 9: " in line
    assert "CUDA error: an illegal memory access" in line
    assert "illegal memory access" in log_in(line).read_text(encoding="utf-8")
    (small / "dying").unlink()
    before = asked(small)
    again = copy.call("run", *arguments)
    assert again.returncode == 0, again.stderr
    assert not set(before[:3]) & set(asked(small)[len(before) :]), "what was answered is kept"


def test_a_server_that_dies_at_a_later_step_is_told_by_its_death_too(copy, small):
    """The prompts of the first set are answered; the server is gone when the second set comes."""
    (small / "serve.py").write_text(SERVER.replace("> 3", "> 6"), encoding="utf-8")
    (small / "dying").touch()
    done = copy.call("run", *served(start=start(small), concurrency=1))
    assert done.returncode == 1
    line = failed(done.stderr)
    assert "the server ended with status 9: " in line
    assert "CUDA error: an illegal memory access" in line
    assert "illegal memory access" in log_in(line).read_text(encoding="utf-8")


# A server that is there already


def test_a_server_given_by_its_url_is_asked_for_every_candidate_by_name(copy):
    def answer(body: dict[str, Any]) -> Reply:
        return Reply(f"{body['model']} was asked")

    with scripted(answer) as server:
        arguments = served(url=server.url, model="lab/{candidate}")
        done = copy.call("run", *arguments)
        assert done.returncode == 0, done.stderr
        assert {name: set(rows) for name, rows in texts(copy).items()} == {
            f"{candidate}.{name}": {f"lab/{candidate} was asked"}
            for candidate in ("base", "general")
            for name in ("general", "harmful")
        }
        assert len(server.bodies) == 24
    gone = copy.call("run", *arguments, "--set", "evaluation.max_new_tokens=5")
    assert gone.returncode == 1
    assert server.url in failed(gone.stderr)
    assert gone.stderr.count("  FAILED: ") == 1, "the other candidate has the same server"
    assert "; 3 more step(s) that ask this server are not tried" in gone.stderr


# A judge that mixmerge starts


def test_a_judge_is_started_for_a_folder_and_stopped_and_its_verdicts_are_known_by_the_model(copy, small):
    script = SERVER.replace(
        '{"role": "assistant", "content": f"{length} letters, {weights[:6]}, {\' \'.join(flags)}"}',
        '{"role": "assistant", "content": "unsafe\\nS2" if length % 2 else "safe"}',
    )
    assert script != SERVER
    (small / "serve.py").write_text(script, encoding="utf-8")
    judge = Path(shutil.copytree(copy.folder / "base", copy.folder / "judge"))
    entry = {"start": start(small), "model": "judge", "asks": "harm", "guard": "llama-guard"}
    arguments = ("--set", "judges.endpoints.guard=" + json.dumps(entry))
    planned = copy.call("plan", *arguments)
    assert planned.returncode == 0, planned.stderr
    assert (
        f"judge guard.harm: up to 12 requests to {copy.folder / 'judge'} at a server that is started"
        in planned.stdout + planned.stderr
    )
    done = copy.call("run", *arguments)
    assert done.returncode == 0, done.stderr
    [line] = started(small)
    assert line.split()[1] == str(judge)
    verdicts = [
        json.loads(line)["verdict"]
        for file in copy.store.glob("judge/*.harmful.guard.harm--*/verdicts.jsonl")
        for line in file.read_text(encoding="utf-8").splitlines()
    ]
    assert len(verdicts) == 12
    assert set(verdicts) <= {"harmful", "safe", "invalid"}
    number = len(asked(small))
    moved = judge.rename(copy.folder / "elsewhere")
    entry["model"] = "elsewhere"
    again = copy.call("run", "--set", "judges.endpoints.guard=" + json.dumps(entry))
    assert again.returncode == 0, again.stderr
    assert (len(asked(small)), moved.is_dir()) == (number, True), "the same model in another folder"
    told = json.loads(copy.call("report", "--json", "--set", "judges.endpoints.guard=" + json.dumps(entry)).stdout)
    assert told["scores"]["prompt_sets"] == {"general": "general", "harmful": "harmful"}


# Samples


def test_a_sample_is_the_same_in_any_store_and_no_greedy_answer(answered, tmp_path):
    found = []
    for name in ("one", "two"):
        shutil.copytree(answered.folder, tmp_path / name, symlinks=True)
        study = type(answered)(tmp_path / name)
        done = study.call("run", "--set", "evaluation.temperature=0.7")
        assert done.returncode == 0, done.stderr
        found.append(texts(study))
    assert found[0] == found[1]
    assert found[0] != texts(answered)
