"""lm-evaluation-harness on a real tiny model: its scores against log-likelihoods by hand, and what a run leaves behind."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mixmerge.errors import CheckpointError, ModelError, StepError, UserError
from mixmerge.evaluate.harness import run_harness
from mixmerge.evaluate.harness_results import read_harness, scores

needs_harness = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None,
    reason="lm-evaluation-harness is not installed: pip install 'mixmerge[lm-eval]'",
)

CHOICE = """\
task: tiny_choice
dataset_path: json
dataset_kwargs: {data_files: {test: choice.jsonl, train: shots.jsonl}}
training_split: train
test_split: test
fewshot_split: train
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: options
doc_to_target: gold
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}
metadata: {version: 2.0}
"""
EXACT = """\
task: tiny_exact
dataset_path: json
dataset_kwargs: {data_files: {test: exact.jsonl}}
test_split: test
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["@@"], max_gen_toks: 5}
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true}
filter_list:
  - {name: whole, filter: [{function: take_first}]}
  - {name: number, filter: [{function: regex, regex_pattern: "([0-9]+)"}, {function: take_first}]}
metadata: {version: 1}
"""
TEXTS = """\
task: tiny_texts
dataset_path: json
dataset_kwargs: {data_files: {test: texts.jsonl}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list:
  - {metric: word_perplexity, aggregation: weighted_perplexity, higher_is_better: false}
"""
GROUP = """\
group: tiny_both
task: [tiny_choice, tiny_other]
aggregate_metric_list:
  - {metric: acc, aggregation: mean, weight_by_size: true}
metadata: {version: 7}
"""


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_choice(folder: Path, count: int = 9) -> list[dict[str, Any]]:
    rows = [
        {"question": f"Thing {i} is", "options": ["blue", "green as grass", f"{i}"][: 2 + i % 2], "gold": i % 2}
        for i in range(count)
    ]
    write_rows(folder / "choice.jsonl", rows)
    write_rows(folder / "shots.jsonl", [{"question": "Snow is", "options": ["white", "black"], "gold": 0}] * 3)
    (folder / "choice.yaml").write_text(CHOICE, encoding="utf-8")
    return rows


def write_exact(folder: Path, rows: list[dict[str, Any]]) -> None:
    write_rows(folder / "exact.jsonl", rows)
    (folder / "exact.yaml").write_text(EXACT, encoding="utf-8")


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    """A folder for tasks of one's own."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    return folder


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Data sets are prepared in the test's own folder."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def opened(tiny_base: Path) -> tuple[Any, Any]:
    """The tiny model and its tokenizer, as transformers opens them."""
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_base, dtype="auto")
    return model.eval(), transformers.AutoTokenizer.from_pretrained(tiny_base)


def copy_of(model: Path, folder: Path, change: Callable[[dict[str, torch.Tensor]], None] | None = None) -> Path:
    shutil.copytree(model, folder)
    if change is not None:
        weights = load_file(folder / "model.safetensors")
        change(weights)
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def log_likelihood(opened: tuple[Any, Any], context: str, answer: str) -> float:
    """The sum of the answer's log-probabilities after the context, one sequence at a time."""
    model, tokenizer = opened
    before = tokenizer(context)["input_ids"]
    whole = tokenizer(context + answer)["input_ids"]
    assert whole[: len(before)] == before
    with torch.inference_mode():
        logits = model(torch.tensor([whole])).logits[0].float().log_softmax(-1)
    return math.fsum(logits[i - 1, whole[i]].item() for i in range(len(before), len(whole)))


@needs_harness
def test_accuracy_is_that_of_log_likelihoods_computed_by_hand(
    tasks: Path, tmp_path: Path, tiny_base: Path, opened: tuple[Any, Any]
) -> None:
    rows = write_choice(tasks)
    result = run_harness(tiny_base, ["tiny_choice"], tmp_path / "out", include_path=tasks, device="cpu", batch_size=1)
    expected = []
    for row in rows:
        sums = [log_likelihood(opened, row["question"], f" {option}") for option in row["options"]]
        per_character = [total / len(option) for total, option in zip(sums, row["options"], strict=True)]
        expected.append(
            {
                "acc": float(sums.index(max(sums)) == row["gold"]),
                "acc_norm": float(per_character.index(max(per_character)) == row["gold"]),
            }
        )
    found, samples = read_harness(tmp_path / "out")
    assert [sample["scores"] for sample in samples] == expected
    assert {0.0, 1.0} == {entry["acc"] for entry in expected} | {entry["acc_norm"] for entry in expected}
    assert found == result
    task = result["tasks"]["tiny_choice"]
    for metric in ("acc", "acc_norm"):
        values = [entry[metric] for entry in expected]
        mean = sum(values) / 9
        assert task["metrics"][metric]["value"] == pytest.approx(mean)
        assert task["metrics"][metric]["stderr"] == pytest.approx(math.sqrt(mean * (1 - mean) / 8))
        assert {key: task["metrics"][metric][key] for key in ("n", "better", "paired")} == {
            "n": 9, "better": "higher", "paired": True,
        }  # fmt: skip
    assert (task["version"], task["num_fewshot"], task["documents"]) == ("2.0", 0, 9)
    assert len({sample["doc_hash"] for sample in samples}) == 9


def answered(opened: tuple[Any, Any], count: int) -> list[dict[str, str]]:
    """Questions with the five tokens that the model writes, greedily."""
    model, tokenizer = opened
    rows = []
    for index in range(count):
        question = f"Say {'why ' * index}{index}:"
        ids = tokenizer(question, return_tensors="pt")
        with torch.inference_mode():
            made = model.generate(**ids, max_new_tokens=5, do_sample=False)[0, ids["input_ids"].shape[1] :]
        rows.append({"question": question, "answer": tokenizer.decode(made, skip_special_tokens=True)})
    return rows


@needs_harness
def test_an_answer_matches_where_it_is_what_the_model_writes(
    tasks: Path, tmp_path: Path, tiny_base: Path, opened: tuple[Any, Any]
) -> None:
    rows = answered(opened, 6)
    for row in rows[::3]:
        row["answer"] += "?"
    write_exact(tasks, rows)
    result = run_harness(tiny_base, ["tiny_exact"], tmp_path / "out", include_path=tasks, device="cpu", batch_size=1)
    metrics = result["tasks"]["tiny_exact"]["metrics"]
    assert metrics["exact_match@whole"]["value"] == pytest.approx(4 / 6)
    assert metrics["exact_match@number"]["value"] == 0
    _, samples = read_harness(tmp_path / "out")
    assert [sample["scores"]["exact_match@whole"] for sample in samples] == [0, 1, 1, 0, 1, 1]
    assert list(scores(result)) == ["bench/tiny_exact/exact_match@whole", "bench/tiny_exact/exact_match@number"]
    shown, score = scores(result)["bench/tiny_exact/exact_match@whole"]
    assert shown == "tiny_exact, exact match (whole)"
    assert (score.better, score.paired, score.n) == ("higher", True, 6)


@needs_harness
def test_a_group_has_the_mean_of_its_tasks_by_their_documents(tasks: Path, tmp_path: Path, tiny_base: Path) -> None:
    write_choice(tasks)
    other = CHOICE.replace("tiny_choice", "tiny_other").replace("choice.jsonl", "other.jsonl")
    (tasks / "other.yaml").write_text(other, encoding="utf-8")
    write_rows(tasks / "other.jsonl", [{"question": f"It {i}", "options": ["a", "b"], "gold": 1} for i in range(4)])
    (tasks / "both.yaml").write_text(GROUP, encoding="utf-8")
    seen: list[tuple[int, int]] = []
    result = run_harness(
        tiny_base,
        ["tiny_both"],
        tmp_path / "out",
        include_path=tasks,
        device="cpu",
        progress=lambda done, known: seen.append((done, known)),
    )
    parts = [result["tasks"][name]["metrics"]["acc"] for name in ("tiny_choice", "tiny_other")]
    group = result["groups"]["tiny_both"]
    assert sorted(group["members"]) == ["tiny_choice", "tiny_other"]
    assert group["metrics"]["acc"]["value"] == pytest.approx((9 * parts[0]["value"] + 4 * parts[1]["value"]) / 13)
    assert (group["metrics"]["acc"]["n"], group["metrics"]["acc"]["better"]) == (13, "higher")
    assert next(iter(scores(result))) == "bench/tiny_both/acc"
    requests = 5 * 2 + 4 * 3 + 4 * 2
    assert seen[-1] == (requests, requests)
    assert [done for done, _ in seen] == list(range(1, requests + 1))
    assert set(result["identity"]["tasks"]) == {"tiny_both", "tiny_choice", "tiny_other"}


@needs_harness
def test_settings_reach_the_harness_and_are_told(tasks: Path, tmp_path: Path, tiny_base: Path) -> None:
    write_choice(tasks)
    plain = run_harness(tiny_base, ["tiny_choice"], tmp_path / "a", include_path=tasks, device="cpu", limit=3)
    assert [row["doc_id"] for row in read_harness(tmp_path / "a")[1]] == [0, 1, 2]
    assert plain["tasks"]["tiny_choice"]["metrics"]["acc"]["n"] == 3
    assert plain["tasks"]["tiny_choice"]["documents"] == 9
    chat = run_harness(
        tiny_base,
        ["tiny_choice"],
        tmp_path / "b",
        include_path=tasks,
        device="cpu",
        num_fewshot=2,
        apply_chat_template=True,
    )
    assert chat["tasks"]["tiny_choice"]["num_fewshot"] == 2
    assert chat["settings"]["apply_chat_template"] is True
    (tasks / "choice.yaml").write_text(CHOICE + "num_fewshot: 0\n", encoding="utf-8")
    fixed = run_harness(
        tiny_base, ["tiny_choice"], tmp_path / "c", include_path=tasks, device="cpu", num_fewshot=2, limit=2
    )
    assert fixed["tasks"]["tiny_choice"]["num_fewshot"] == 0
    assert any("fixed at 0 examples" in note["text"] for note in fixed["notes"])


@needs_harness
def test_a_candidates_own_decoding_settings_decide_nothing(
    tasks: Path, tmp_path: Path, tiny_base: Path, opened: tuple[Any, Any]
) -> None:
    write_exact(tasks, answered(opened, 3))
    noisy = copy_of(tiny_base, tmp_path / "noisy")
    settings = json.loads((noisy / "generation_config.json").read_text(encoding="utf-8"))
    settings |= {"do_sample": True, "temperature": 5.0, "repetition_penalty": 9.0}
    (noisy / "generation_config.json").write_text(json.dumps(settings), encoding="utf-8")
    result = run_harness(noisy, ["tiny_exact"], tmp_path / "out", include_path=tasks, device="cpu", batch_size=1)
    assert result["tasks"]["tiny_exact"]["metrics"]["exact_match@whole"]["value"] == 1


@needs_harness
def test_a_score_that_is_no_mean_over_documents_is_not_paired(tasks: Path, tmp_path: Path, tiny_base: Path) -> None:
    write_choice(tasks)
    text = CHOICE.replace("{metric: acc_norm, aggregation: mean,", "{metric: mcc, aggregation: matthews_corrcoef,")
    (tasks / "choice.yaml").write_text(text, encoding="utf-8")
    metrics = run_harness(tiny_base, ["tiny_choice"], tmp_path / "out", include_path=tasks, device="cpu")["tasks"][
        "tiny_choice"
    ]["metrics"]
    assert metrics["acc"]["paired"]
    assert not metrics["mcc"]["paired"]
    assert metrics["mcc"]["n"] == 9
    assert -1 <= metrics["mcc"]["value"] <= 1
    assert metrics["mcc"]["stderr"] >= 0
    assert all(set(row["scores"]) == {"acc"} for row in read_harness(tmp_path / "out")[1])


@needs_harness
def test_prompts_that_were_cut_are_counted_in_the_notes(tasks: Path, tmp_path: Path, tiny_base: Path) -> None:
    write_choice(tasks, 1)
    write_rows(
        tasks / "choice.jsonl",
        [{"question": "why? " * count, "options": ["a", "b"], "gold": 0} for count in (300, 301)],
    )
    result = run_harness(tiny_base, ["tiny_choice"], tmp_path / "out", include_path=tasks, device="cpu")
    (note,) = [note for note in result["notes"] if "Truncating" in note["text"]]
    assert note["times"] >= 2


@needs_harness
@pytest.mark.parametrize("kind", ["choice", "exact"])
def test_weights_that_are_nan_are_named_and_nothing_is_written(
    kind: str, tasks: Path, tmp_path: Path, tiny_base: Path
) -> None:
    write_choice(tasks)
    write_exact(tasks, [{"question": "Say:", "answer": "?"}])

    def spoil(weights: dict[str, torch.Tensor]) -> None:
        weights["model.layers.1.mlp.up_proj.weight"][3, 5] = torch.nan

    broken = copy_of(tiny_base, tmp_path / "broken", spoil)
    with pytest.raises(
        ModelError, match=r"broken: the model's logits are not finite; .*: 1, 'model.layers.1.mlp.up_proj"
    ):
        run_harness(broken, [f"tiny_{kind}"], tmp_path / "out", include_path=tasks, device="cpu")
    assert not (tmp_path / "out").exists()


@needs_harness
def test_a_killed_run_leaves_nothing_and_runs_again(tasks: Path, tmp_path: Path, tiny_base: Path) -> None:
    write_choice(tasks, 200)
    out = tmp_path / "out"
    code = (
        "import sys, time\nfrom pathlib import Path\nfrom mixmerge.evaluate.harness import run_harness\n"
        "def progress(done, known):\n    print(done, known, flush=True)\n    time.sleep(0.01)\n"
        "run_harness(Path(sys.argv[1]), ['tiny_choice'], Path(sys.argv[2]), include_path=Path(sys.argv[3]),"
        " device='cpu', progress=progress)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(tiny_base), str(out), str(tasks)], stdout=subprocess.PIPE, encoding="utf-8"
    )
    assert process.stdout is not None
    with process:
        assert process.stdout.readline() == "1 500\n"
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert not list(out.rglob("*.json*"))
    result = run_harness(tiny_base, ["tiny_choice"], out, include_path=tasks, device="cpu")
    assert read_harness(out)[0] == result
    assert sorted(path.name for path in out.iterdir()) == ["results.json", "samples.jsonl"]


@needs_harness
def test_rows_of_another_run_are_not_read_with_the_results(tasks: Path, tmp_path: Path, tiny_base: Path) -> None:
    write_choice(tasks, 2)
    out = tmp_path / "out"
    with pytest.raises(CheckpointError, match=r"out: no results of the harness: FileNotFoundError"):
        read_harness(out)
    run_harness(tiny_base, ["tiny_choice"], out, include_path=tasks, device="cpu")
    rows = (out / "samples.jsonl").read_text(encoding="utf-8")
    (out / "samples.jsonl").write_text(rows.splitlines()[0] + "\n", encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"samples.jsonl: not the rows that the results belong to; run it again"):
        read_harness(out)


@needs_harness
def test_what_a_model_lacks_is_said_before_it_is_asked(tasks: Path, tmp_path: Path, tiny_base: Path) -> None:
    write_choice(tasks, 2)
    silent = copy_of(tiny_base, tmp_path / "silent")
    (silent / "chat_template.jinja").unlink()
    with pytest.raises(ModelError, match=r"silent: the tokenizer has no chat template; run without"):
        run_harness(silent, ["tiny_choice"], tmp_path / "o", include_path=tasks, device="cpu", apply_chat_template=True)
    (silent / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"silent: no \*.safetensors file; save the model as safetensors"):
        run_harness(silent, ["tiny_choice"], tmp_path / "o", include_path=tasks, device="cpu")
    with pytest.raises(ModelError, match=r"tasks: not a model folder: no config.json"):
        run_harness(tasks, ["tiny_choice"], tmp_path / "o", include_path=tasks, device="cpu")


@needs_harness
def test_a_task_that_breaks_while_it_runs_is_one_line(tasks: Path, tmp_path: Path, tiny_base: Path) -> None:
    write_exact(tasks, [{"question": "Say:", "answer": "?"}])
    (tasks / "exact.yaml").write_text(EXACT.replace("max_gen_toks: 5", "max_gen_toks: 5000"), encoding="utf-8")
    with pytest.raises(StepError, match=r"tiny_exact: lm-evaluation-harness failed: AssertionError: .*5000") as caught:
        run_harness(tiny_base, ["tiny_exact"], tmp_path / "out", include_path=tasks, device="cpu")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


class _Hub(BaseHTTPRequestHandler):
    """A Hub that has nothing, and remembers what it was asked."""

    asked: list[str]

    def do_GET(self) -> None:
        self.asked.append(self.path)
        self.send_response(404)
        self.send_header("X-Error-Code", "RepoNotFound")
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_HEAD = do_POST = do_GET

    def log_message(self, *_: Any) -> None:
        """Say nothing."""


@pytest.fixture
def hub() -> Iterator[tuple[str, list[str]]]:
    """The address of an empty Hub on loopback, and the paths that it is asked for."""
    asked: list[str] = []
    server = HTTPServer(("127.0.0.1", 0), type("Hub", (_Hub,), {"asked": asked}))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", asked
    server.shutdown()
    thread.join()
    server.server_close()


@needs_harness
def test_local_tasks_ask_the_hub_nothing_and_a_missing_data_set_is_named(
    tasks: Path, tmp_path: Path, tiny_base: Path, hub: tuple[str, list[str]]
) -> None:
    url, asked = hub
    write_choice(tasks, 2)
    write_exact(tasks, [{"question": "Say:", "answer": "?"}])
    code = (
        "import sys\nfrom pathlib import Path\nfrom mixmerge.errors import DataError\n"
        "from mixmerge.evaluate.harness import run_harness\n"
        "base, out, tasks = map(Path, sys.argv[1:])\n"
        "run_harness(base, ['tiny_choice', 'tiny_exact'], out, include_path=tasks, device='cpu')\nprint('ran', flush=True)\n"
        "sys.stdin.readline()\n"
        "text = (tasks / 'choice.yaml').read_text().replace('dataset_path: json', 'dataset_path: nobody/nothing')\n"
        "(tasks / 'choice.yaml').write_text(text)\n"
        "try:\n    run_harness(base, ['tiny_choice'], out, include_path=tasks, device='cpu')\n"
        "except DataError as error:\n    print(error)\n"
    )
    environment = {key: value for key, value in os.environ.items() if not key.startswith("HF_HUB")}
    environment |= {"HF_ENDPOINT": url, "HF_HOME": str(tmp_path / "home"), "NO_PROXY": "127.0.0.1"}
    command = [sys.executable, "-c", code, str(tiny_base), str(tmp_path / "out"), str(tasks)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, encoding="utf-8", env=environment
    ) as process:
        assert process.stdout is not None
        assert process.stdin is not None
        assert process.stdout.readline() == "ran\n"
        assert asked == []
        process.stdin.write("\n")
        process.stdin.close()
        told = process.stdout.read()
    assert told.startswith("tiny_choice: cannot load the task or its data set: DatasetNotFoundError")
    assert "; check that the Hub has nobody/nothing and can be reached" in told
    assert any("nobody/nothing" in path for path in asked)


@needs_harness
def test_perplexity_is_that_of_the_text_by_hand_and_lower_is_better(
    tasks: Path, tmp_path: Path, tiny_base: Path, opened: tuple[Any, Any]
) -> None:
    texts = ["The sky is blue.", "Grass and the sun", "why why why"]
    write_rows(tasks / "texts.jsonl", [{"text": text} for text in texts])
    (tasks / "texts.yaml").write_text(TEXTS, encoding="utf-8")
    result = run_harness(tiny_base, ["tiny_texts"], tmp_path / "out", include_path=tasks, device="cpu", batch_size=1)
    total = sum(log_likelihood(opened, "<s>", text) for text in texts)
    words = sum(len(text.split()) for text in texts)
    metric = result["tasks"]["tiny_texts"]["metrics"]["word_perplexity"]
    assert metric["value"] == pytest.approx(math.exp(-total / words), rel=1e-3)
    assert (metric["better"], metric["paired"], metric["n"]) == ("lower", False, 3)
    assert [row["scores"] for row in read_harness(tmp_path / "out")[1]] == [{}, {}, {}]


@needs_harness
def test_functions_of_a_task_of_ones_own_are_called(tasks: Path, tmp_path: Path, tiny_base: Path) -> None:
    write_choice(tasks)
    (tasks / "choice.yaml").write_text(CHOICE + "process_results: !function own.score\n", encoding="utf-8")
    (tasks / "own.py").write_text(
        "def score(doc, results):\n    return {'acc': doc['gold'], 'acc_norm': 1 - doc['gold']}\n", encoding="utf-8"
    )
    run_harness(tiny_base, ["tiny_choice"], tmp_path / "out", include_path=tasks, device="cpu")
    found = [row["scores"] for row in read_harness(tmp_path / "out")[1]]
    assert found == [{"acc": i % 2, "acc_norm": 1 - i % 2} for i in range(9)]


@needs_harness
def test_a_metric_without_a_finite_value_is_refused(tasks: Path, tmp_path: Path, tiny_base: Path) -> None:
    write_choice(tasks)
    (tasks / "choice.yaml").write_text(CHOICE + "process_results: !function own.score\n", encoding="utf-8")
    (tasks / "own.py").write_text(
        "def score(doc, results):\n    return {'acc': float('nan'), 'acc_norm': 1.0}\n", encoding="utf-8"
    )
    with pytest.raises(StepError, match=r"tiny_choice: 'acc,none' has no finite value: nan"):
        run_harness(tiny_base, ["tiny_choice"], tmp_path / "out", include_path=tasks, device="cpu")
    assert not (tmp_path / "out").exists()


@needs_harness
def test_weights_that_overflow_on_the_way_are_told_from_broken_ones(
    tasks: Path, tmp_path: Path, tiny_base: Path
) -> None:
    write_choice(tasks)

    def grow(weights: dict[str, torch.Tensor]) -> None:
        weights["lm_head.weight"].fill_(3e38)

    grown = copy_of(tiny_base, tmp_path / "grown", grow)
    with pytest.raises(
        ModelError, match=r"grown: the model's logits are not finite; its weights are finite: they overflow"
    ):
        run_harness(grown, ["tiny_choice"], tmp_path / "out", include_path=tasks, device="cpu")


@needs_harness
def test_one_task_asked_for_twice_is_refused(tasks: Path, tmp_path: Path, tiny_base: Path) -> None:
    write_choice(tasks)
    other = CHOICE.replace("tiny_choice", "tiny_other")
    (tasks / "other.yaml").write_text(other, encoding="utf-8")
    (tasks / "both.yaml").write_text(GROUP, encoding="utf-8")
    with pytest.raises(UserError, match=r"Duplicate task 'tiny_choice'.*; name each task once"):
        run_harness(tiny_base, ["tiny_both", "tiny_choice"], tmp_path / "out", include_path=tasks, device="cpu")


@needs_harness
def test_a_package_that_a_task_needs_is_named(tasks: Path, tmp_path: Path, tiny_base: Path) -> None:
    write_choice(tasks)
    (tasks / "choice.yaml").write_text(CHOICE + "process_docs: !function own.process\n", encoding="utf-8")
    (tasks / "own.py").write_text("import no_such_package\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"tiny_choice: the task's functions .*; pip install no_such_package, or what"):
        run_harness(tiny_base, ["tiny_choice"], tmp_path / "out", include_path=tasks, device="cpu")


@needs_harness
def test_results_that_cannot_be_written_are_one_line(tasks: Path, tmp_path: Path, tiny_base: Path) -> None:
    write_choice(tasks, 2)
    (tmp_path / "out").write_text("a file", encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"out: cannot write: FileExistsError"):
        run_harness(tiny_base, ["tiny_choice"], tmp_path / "out", include_path=tasks, device="cpu")


@needs_harness
@pytest.mark.parametrize(("name", "value"), [("batch_size", 0), ("limit", 0)])
def test_sizes_that_are_not_positive_are_refused(name: str, value: int, tmp_path: Path) -> None:
    settings: dict[str, Any] = {name: value}
    with pytest.raises(ValueError, match=r"must be positive"):
        run_harness(tmp_path, ["tiny_choice"], tmp_path / "out", **settings)


@needs_harness
def test_paths_may_be_relative_to_where_the_user_stands(
    tasks: Path, tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_choice(tasks, 2)
    (tmp_path / "model").symlink_to(tiny_base, target_is_directory=True)
    monkeypatch.chdir(tmp_path)
    run_harness(Path("model"), ["tiny_choice"], Path("out"), include_path=Path("tasks"), device="cpu", threads=1)
    assert len(read_harness(tmp_path / "out")[1]) == 2
    assert Path.cwd() == tmp_path


@needs_harness
def test_nothing_of_the_harness_is_left_behind(
    tasks: Path, tmp_path: Path, tiny_base: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Neither its log's settings, nor bars on the terminal, nor an environment variable."""
    import logging

    import tqdm

    write_choice(tasks, 2)
    log = logging.getLogger("lm_eval")
    before = (log.level, log.propagate, list(log.handlers), tqdm.tqdm.__init__, dict(os.environ))
    capfd.readouterr()
    run_harness(tiny_base, ["tiny_choice"], tmp_path / "out", include_path=tasks, device="cpu")
    told = capfd.readouterr()
    assert (log.level, log.propagate, list(log.handlers), tqdm.tqdm.__init__, dict(os.environ)) == before
    assert told.out == ""
    assert "it/s" not in told.err
