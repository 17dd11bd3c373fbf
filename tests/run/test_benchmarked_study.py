"""Studies with more than the local judges and metrics: the harness, checked prompt sets, classifiers, calibrations, plans."""

from __future__ import annotations

import csv
import importlib.util
import json
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import joblib
import pytest
import torch
from scripted_judge import rubric_judge, serving
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from test_evaluate_classifier import MAP, build
from test_evaluate_guard import folder as guard_folder  # noqa: F401 a fixture

CANDIDATES = ("base", "general", "mix", "ties")
SHARED = Path(__file__).parents[3] / "shared" / "data" / "eval"
TASK = """\
task: facts
dataset_path: json
dataset_kwargs: {data_files: {test: facts.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{q}}"
doc_to_choice: [blue, green]
doc_to_target: a
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""
REFUSALS = {"en": "I cannot help with that request", "fr": "Je ne peux pas vous aider"}
ANSWERS = {"en": "Sure, here is how it goes", "fr": "Bien sûr, voici comment faire"}


@pytest.fixture
def copy(finished, tmp_path: Path) -> Any:
    """A copy of the finished study; what is added to it is left to do."""
    return finished.copy(tmp_path / "study")


def write(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def override(key: str, value: Any) -> tuple[str, str]:
    return "--set", f"{key}={json.dumps(value)}"


def ran(study, *arguments: str, command: str = "run") -> str:
    """What a run that ended well printed."""
    done = study.call(command, *arguments)
    assert done.returncode == 0, done.stderr
    return str(done.stdout)


def scores_of(study, *arguments: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(ran(study, "--json", *arguments, command="report"))["scores"]
    return found


def rows_of(study, kind: str, name: str, file: str) -> list[dict[str, Any]]:
    """The rows of the newest step of that name."""
    folders = study.store.glob(f"{kind}/{name}--*/record.json")
    newest = max(folders, key=lambda path: path.stat().st_mtime_ns).parent
    return [json.loads(line) for line in (newest / file).read_text(encoding="utf-8").splitlines()]


def left(study, *arguments: str) -> set[str]:
    """The steps that a plan says are to run."""
    found = json.loads(ran(study, "--json", *arguments, command="plan"))
    return {f"{step['kind']}/{step['name']}" for step in found["steps"] if step["state"] != "done"}


def refused_line(done: subprocess.CompletedProcess[str]) -> str:
    """The only line of a refusal."""
    assert done.returncode in (1, 2), done.stderr
    assert "Traceback" not in done.stderr
    [line] = [line for line in done.stderr.splitlines() if "error: " in line or "FAILED: " in line][:1]
    return line


# lm-evaluation-harness


@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm-evaluation-harness is not installed")
def test_tasks_of_the_harness_stand_in_the_tables_and_are_carried_on_after_a_kill(copy):
    facts = [{"q": f"The colour of thing {i} is", "a": i % 2} for i in range(6)]
    write(copy.folder / "tasks" / "facts.jsonl", facts)
    (copy.folder / "tasks" / "facts.yaml").write_text(TASK, encoding="utf-8")
    bench = override("evaluation.harness", {"known": {"tasks": ["facts"], "include_path": "tasks"}})
    steps = {f"harness/{name}.known" for name in CANDIDATES}
    assert left(copy, *bench) == steps | {"score/tiny", "report/tiny"}
    run = subprocess.Popen(copy.command("run", *bench), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    end = time.monotonic() + 120
    while not (first := copy.finished().keys() & finished_harness(copy)) and time.monotonic() < end:
        time.sleep(0.02)
    run.send_signal(signal.SIGKILL)
    run.wait()
    kept = {name: copy.finished()[name] for name in first}
    printed = ran(copy, *bench)
    assert {name: copy.finished()[name] for name in kept} == kept, "what was done is left alone"
    [(key, found)] = scores_of(copy, *bench)["harness"].items()
    assert key == "bench/facts/acc"
    assert (found["name"], found["better"], set(found["candidates"])) == ("facts, acc", "higher", set(CANDIDATES))
    for estimate in found["candidates"].values():
        assert estimate["n"] == 6
        assert 0 <= estimate["low"] <= estimate["value"] <= estimate["high"] <= 1
        assert estimate["low"] < estimate["high"]
    folder = copy.out / "runs" / "tiny"
    with (folder / "scores.csv").open(encoding="utf-8", newline="") as file:
        table = [row for row in csv.DictReader(file) if key in row.values()]
    assert {row["candidate"] for row in table} == set(CANDIDATES)
    assert "facts, acc" in (folder / "report.html").read_text(encoding="utf-8")
    assert "facts, acc" in printed
    fewer = override("evaluation.harness", {"known": {"tasks": ["facts"], "include_path": "tasks", "limit": 2}})
    assert left(copy, *fewer) == steps | {"score/tiny", "report/tiny"}
    assert left(copy, *bench) == set()


def finished_harness(study) -> set[str]:
    return {name for name in study.finished() if name.startswith("harness/")}


# Prompt sets with a check


def test_checked_sets_are_benchmarks_or_decide_the_wins_of_general_ones(copy):
    for code in ("en", "fr"):
        words = [{"id": f"w{i}", "prompt": f"{code}: say word {i} of the list", "reference": "no"} for i in range(4)]
        write(copy.folder / f"prompts/word.{code}.jsonl", words)
        sums = [{"id": f"s{i}", "prompt": f"{code}: add {i} and {i}, please", "answer": str(2 * i)} for i in range(4)]
        write(copy.folder / f"prompts/sum.{code}.jsonl", sums)
        stones = [
            {"id": f"c{i}", "prompt": f"{code}: which is stone {i}?", "options": ["flint", "plum"], "reference": i % 2}
            for i in range(10)
        ]
        write(copy.folder / f"prompts/stone.{code}.jsonl", stones)
    sets = {
        "word": {"purpose": "benchmark", "path": "prompts/word.{lang}.jsonl", "check": "exact"},
        "sum": {
            "purpose": "general",
            "path": "prompts/sum.{lang}.jsonl",
            "check": "number",
            "columns": {"reference": "answer"},
        },
        "stone": {
            "purpose": "benchmark",
            "path": "prompts/stone.{lang}.jsonl",
            "check": "choice",
            "columns": {"choices": "options"},
            "dev": 0.2,
        },
    }
    arguments = [word for name, entry in sets.items() for word in override(f"evaluation.prompts.{name}", entry)]
    printed = ran(copy, *arguments)
    scores = scores_of(copy, *arguments)
    assert scores["prompt_sets"] == {
        "general": "general",
        "harmful": "harmful",
        "word": "benchmark",
        "sum": "general",
        "stone": "benchmark",
    }
    assert scores["prompts"]["stone"] == {"dev": 2, "test": 8}
    test = scores["splits"]["test"]
    for name in CANDIDATES:
        for bench in ("word", "stone"):
            rows = rows_of(copy, "judge", f"{name}.{bench}.check", "verdicts.jsonl")
            right = [row["verdict"] == "correct" for row in rows if row["split"] == "test"]
            assert test[f"bench/{bench}"][name]["macro"]["value"] == pytest.approx(sum(right) / len(right))
            assert {row["lang"] for row in rows} == {"en", "fr"}
    pairs = rows_of(copy, "judge", "mix.sum.quality", "verdicts.jsonl")
    assert {row["verdict"] for row in pairs} <= {"win", "loss", "tie"}
    assert len(pairs) == 8
    for bench in ("word", "stone"):
        assert f"bench/{bench}" in (copy.out / "runs/tiny/scores.csv").read_text(encoding="utf-8")
        assert bench in printed


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"check": "choice"}, "no choices to check a letter of"),
        ({"check": "number"}, "no number in the reference 'It is blue.'"),
        ({"check": "exact", "dev": 0.2}, "a dev row, where a share is to be drawn"),
    ],
    ids=str,
)
def test_a_check_that_a_set_does_not_fit_is_one_line_before_anything_runs(copy, entry, message):
    arguments = [word for key, value in entry.items() for word in override(f"evaluation.prompts.general.{key}", value)]
    line = refused_line(copy.call("check", *arguments))
    assert "evaluation.prompts.general" in line
    assert message in line


@pytest.mark.parametrize(
    ("like", "file", "purpose"),
    [("mgsm", "general_qa.jsonl", "benchmark"), ("xsafety", "safety_harmful_prompts.jsonl", "harmful")],
)
def test_a_known_set_is_read_asked_and_scored_by_its_name(copy, like, file, purpose):
    if not (SHARED / file).is_file():
        pytest.skip(f"the shared data pack is not beside this checkout: {file}")
    entry = {"like": like, "path": str(SHARED / file), "dev": 0.2}
    arguments = (
        *override(f"evaluation.prompts.{like}", entry),
        *override("evaluation.limit", {"dev": 1, "test": 3}),
        *override("evaluation.overlap", {"near": None}),
    )
    ran(copy, *arguments)
    scores = scores_of(copy, *arguments)
    assert scores["prompt_sets"][like] == purpose
    assert scores["prompts"][like] == {"dev": 1, "test": 3}
    rows = rows_of(copy, "generate", f"mix.{like}", "responses.jsonl")
    assert {(row["lang"], row["split"]) for row in rows} == {(a, b) for a in ("en", "fr") for b in ("dev", "test")}
    assert len(rows) == 8
    assert {row["pid"] for row in rows if row["lang"] == "en"} == {row["pid"] for row in rows if row["lang"] == "fr"}
    if like == "mgsm":
        assert set(scores["splits"]["test"]["bench/mgsm"]["mix"]["languages"]) == {"en", "fr"}


# Classifiers


def labelled(path: Path) -> Path:
    """Refusals and answers, as rows of text and label."""
    rows = [
        {"id": f"{lang}{i}", "lang": lang, "text": f"{text} ({i})", "label": label}
        for label, texts in (("r", REFUSALS), ("c", ANSWERS))
        for lang, text in texts.items()
        for i in range(10)
    ]
    return write(path, rows)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, guard_folder: Path) -> dict[str, dict[str, Any]]:  # noqa: F811
    """A judge of every kind, as a recipe names them."""
    place = tmp_path_factory.mktemp("judges")
    texts = [f"{text} {i}" for texts in (REFUSALS, ANSWERS) for text in texts.values() for i in range(10)]
    pipeline = make_pipeline(TfidfVectorizer(), LogisticRegression())
    joblib.dump(pipeline.fit(texts, ["r"] * 20 + ["c"] * 20), place / "pipeline.joblib")
    words = {"r": "refused", "c": "complied"}
    return {
        "words": {
            "kind": "ngrams",
            "path": str(labelled(place / "rows.jsonl")),
            "asks": "refusal",
            "labels": words,
        },
        "bert": {"path": str(build(place / "bert", list(MAP), steps=10)), "asks": "refusal", "labels": MAP},
        "pickle": {
            "kind": "pipeline",
            "path": str(place / "pipeline.joblib"),
            "asks": "refusal",
            "labels": words,
            "trust_pickle": True,
        },
        "guard": {
            "kind": "guard",
            "path": str(guard_folder),
            "asks": "harm",
            "labels": {"unsafe": "harmful", "safe": "safe"},
        },
    }


def test_every_kind_of_classifier_judges_and_the_one_that_is_named_decides(copy, models):
    panel = override("judges.classifiers", models)
    ran(copy, *panel)
    first = scores_of(copy, *panel)
    assert first["agreement"]["harm"]["judges"][1:] != []
    for name, entry in models.items():
        judge = f"{name}.{entry['asks']}"
        arguments = (*panel, *override("judges.decide", {"harm": name}))
        ran(copy, *arguments, command="score")
        bad = "harmful" if entry["asks"] == "harm" else "complied"
        for candidate in CANDIDATES:
            rows = rows_of(copy, "judge", f"{candidate}.harmful.{judge}", "verdicts.jsonl")
            assert len(rows) == 6
            assert {row["judge"] for row in rows} == {judge}
        found = scores_of(copy, *arguments)
        assert found["counts"]["mix"].keys() >= {f"{judge}: {row['verdict']}" for row in rows_of_mix(copy, judge)}
        test = [row["verdict"] for row in rows_of_mix(copy, judge) if row["split"] == "test"]
        decided = [word for word in test if word not in ("unparsed", "unanswered")]
        value = found["splits"]["test"]["harm"]["mix"]["macro"]["value"]
        if len(decided) == len(test):
            assert value == pytest.approx(test.count(bad) / len(test)), judge
        [described] = {path.read_text(encoding="utf-8") for path in copy.store.glob(f"judge/*.{judge}--*/judge.json")}
        said = json.loads(described)
        assert (said["name"], said["kind"]) == (judge, {"words": "classifier"}.get(name, said["kind"]))
    trust = json.loads(next(copy.store.glob("judge/mix.harmful.words.refusal--*/judge.json")).read_text())["trust"]
    assert trust
    page = (copy.out / "runs" / "tiny" / "report.html").read_text(encoding="utf-8")
    assert all(f"{name}.{entry['asks']}" in page for name, entry in models.items())


def rows_of_mix(study, judge: str) -> list[dict[str, Any]]:
    return rows_of(study, "judge", f"mix.harmful.{judge}", "verdicts.jsonl")


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("pickle", {"trust_pickle": False}, "set trust_pickle: true"),
        ("bert", {"labels": {"REFUSAL": "refused", "ANSWERS": "complied"}}, "ANSWERS"),
        ("guard", {"labels": {"nasty": "harmful", "nice": "harmless"}}, "'harmless' is no verdict on harm"),
    ],
)
def test_a_classifier_that_does_not_fit_is_one_line(copy, models, name, change, message):
    entry = models[name] | change
    line = refused_line(copy.call("check", *override("judges.classifiers", {name: entry})))
    assert "judges.classifiers" in line
    assert message in line


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("name", ["bert", "guard"])
def test_a_model_that_judges_does_not_fall_back_to_the_cpu_where_cuda_is_asked_for(copy, models, name):
    judge = override("judges.classifiers", {name: models[name]})
    line = refused_line(copy.call("run", *judge, "--set", "how.device=cuda"))
    assert "how.device: there is no CUDA device here; set it to auto or cpu" in line


# Calibration


def answers_with_labels(path: Path, question: str) -> Path:
    """Answers as rows of prompt, response and label; the scripted judge of harm goes by digits."""
    rows = []
    for lang in ("en", "fr"):
        for i in range(12):
            if question == "harm":
                rows.append((lang, f"Take {i} of them." if i % 2 else "Take some.", "harmful" if i % 2 else "safe"))
            else:
                texts = REFUSALS if i % 2 else ANSWERS
                rows.append((lang, texts[lang], "refused" if i % 2 else "complied"))
    return write(
        path,
        [
            {"lang": lang, "prompt": f"request {i} in {lang}", "response": text, "label": label}
            for i, (lang, text, label) in enumerate(rows)
        ],
    )


def test_a_calibration_of_a_judge_behind_a_server_holds_for_that_judge_alone(copy):
    rows = answers_with_labels(copy.folder / "harm.jsonl", "harm")
    with serving(rubric_judge()) as server:
        entry: dict[str, Any] = {"url": server.url, "model": "m", "asks": ["harm"]}
        judge = override("judges.endpoints.gpt", entry)
        printed = ran_calibrate(copy, "gpt.harm", rows, *judge)
        assert "gpt.harm on 24 labelled rows" in printed
        found = json.loads((copy.folder / "cal.json").read_text(encoding="utf-8"))
        assert (found["question"], found["all"]["accuracy"]["value"]) == ("harm", 1.0)
        asked = len(server.bodies)
        ran_calibrate(copy, "gpt.harm", rows, *judge)
        assert len(server.bodies) == asked, "measured again from the answers on disk"
        measured = entry | {"calibration": {"harm": "cal.json"}}
        arguments = override("judges.endpoints.gpt", measured)
        ran(copy, *arguments)
        corrected = scores_of(copy, *arguments)["corrected"]["harm"]
        assert (corrected["rows"], set(corrected["rates"])) == (24, set(CANDIDATES))
        other = override("judges.endpoints.gpt", measured | {"model": "m2"})
        line = refused_line(copy.call("run", *other))
        assert "calibrates another judge than 'gpt.harm': model 'm' -> 'm2'" in line
        again = copy.call("score", *other)
        assert "model 'm' -> 'm2'" in refused_line(again)
        limit = override("judges.endpoints.gpt", measured | {"max_tokens": 99})
        assert "max_tokens 512 -> 99" in refused_line(copy.call("run", *limit))


def ran_calibrate(study, judge: str, rows: Path, *arguments: str) -> str:
    to = study.folder / "cal.json"
    return ran(study, judge, str(rows), "--to", str(to), *arguments, command="calibrate")


def test_a_calibration_of_a_fitted_classifier_corrects_its_rates_until_it_is_another(copy, models):
    rows = answers_with_labels(copy.folder / "refusals.jsonl", "refusal")
    judge = override("judges.classifiers.words", models["words"])
    printed = ran_calibrate(copy, "words.refusal", rows, *judge)
    assert "sensitivity (refused)" in printed
    assert not list(copy.store.glob("judge/*.words.refusal--*")), "the study itself is not begun"
    entry = models["words"] | {"calibration": "cal.json"}
    decides = override("judges.decide", {"harm": "words"})
    arguments = (*override("judges.classifiers.words", entry), *decides)
    ran(copy, *arguments)
    corrected = scores_of(copy, *arguments)["corrected"]["harm"]
    assert corrected["rows"] == 24
    stricter = (*override("judges.classifiers.words", entry | {"threshold": 0.9}), *decides)
    line = refused_line(copy.call("run", *stricter))
    assert "calibrates another judge than 'words.refusal': threshold nothing -> 0.9" in line


# What a plan says beforehand


def test_a_plan_says_what_can_be_detected_and_what_judges_will_be_asked(copy):
    entry = {"url": "https://judge.example/v1", "model": "m", "asks": ["quality", "harm"]}
    arguments = override("judges.endpoints.gpt", entry)
    printed = copy.call("plan", *arguments)
    assert printed.returncode == 0, printed.stderr
    said = printed.stdout + printed.stderr
    assert "detectable between two candidates, in points, with 80 % power at 95 %: win rate" in said
    # three candidates against the base, in both orders; four by themselves
    assert "judge gpt.quality: up to 36 requests to m at https://judge.example/v1" in said
    assert "judge gpt.harm: up to 24 requests to m at https://judge.example/v1" in said
    found = json.loads(ran(copy, "--json", *arguments, command="plan"))
    text = json.dumps(found)
    assert "up to 36 requests" in text
    assert "detectable between two candidates" in text
