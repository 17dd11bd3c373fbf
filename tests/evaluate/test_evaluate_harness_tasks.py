"""Tasks of lm-evaluation-harness by name: found without importing it, with what decides their results."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mixmerge.errors import DataError, UserError
from mixmerge.evaluate.harness_tasks import check_tasks, identity

needs_harness = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None,
    reason="lm-evaluation-harness is not installed: pip install 'mixmerge[lm-eval]'",
)
SOURCE = Path(__file__).parents[2] / "src"
HUB = """\
task: tiny_hub
dataset_path: somebody/something
dataset_kwargs: {revision: 0a1b2c, data_files: {test: not-here.jsonl}}
test_split: test
doc_to_text: question
doc_to_target: answer
"""

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


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    """A folder for tasks of one's own."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    return folder


@needs_harness
def test_the_harness_own_names_are_found_without_it(tmp_path: Path) -> None:
    """Groups, tags and includes of some of its folders, against its own reading of them."""
    import lm_eval.tasks

    folders = [Path(lm_eval.tasks.__file__).parent / name for name in ("mmlu", "acpbench", "scrolls", "arc", "glue")]
    manager = lm_eval.tasks.TaskManager(include_defaults=False, include_path=[str(folder) for folder in folders])
    found = check_tasks(manager.all_tasks)
    assert set(manager.all_tasks) <= set(found)
    for name in manager.all_tags:
        assert found[name].members == tuple(sorted(manager.task_index[name].tags))
    mmlu = check_tasks(["mmlu"])
    leaves = [definition for definition in mmlu.values() if not definition.members]
    assert len(leaves) == 57
    assert {definition.hub for definition in leaves} == {("cais/mmlu",)}


@needs_harness
def test_an_unknown_task_is_answered_with_the_nearest_name(tasks: Path) -> None:
    with pytest.raises(UserError, match=r"lm-evaluation-harness: unknown task 'helaswag'; did you mean 'hellaswag'\?"):
        check_tasks(["helaswag"])
    write_choice(tasks)
    with pytest.raises(UserError, match=r"tasks: unknown task 'tiny_chioce'; did you mean 'tiny_choice'\?"):
        check_tasks(["tiny_choice", "tiny_chioce"], tasks)
    with pytest.raises(UserError, match=r"no task of lm-evaluation-harness is named; name at least one"):
        check_tasks([])
    with pytest.raises(UserError, match=r"none: no such folder of tasks"):
        check_tasks(["tiny_choice"], tasks / "none")


@needs_harness
def test_a_definition_that_cannot_be_used_is_named(tasks: Path) -> None:
    write_choice(tasks)
    place = tasks / "choice.yaml"

    def told(text: str) -> str:
        place.write_text(text, encoding="utf-8")
        with pytest.raises((UserError, DataError)) as caught:
            check_tasks(["tiny_choice"], tasks)
        return str(caught.value)

    assert "runs code that the model writes; leave it out" in told(CHOICE + "unsafe_code: true\n")
    assert "shows images or sound" in told(CHOICE + "doc_to_image: [picture]\n")
    assert "choice.yaml: the definition includes itself" in told(CHOICE + "include: choice.yaml\n")
    assert "choice.yaml: cannot read the task's definition: ParserError" in told(CHOICE + "metric_list: [}\n")
    assert "none.jsonl is not there" in told(CHOICE.replace("choice.jsonl", "none.jsonl"))
    assert "none.yaml: cannot read the task's definition: FileNotFoundError" in told(CHOICE + "include: none.yaml\n")


@needs_harness
def test_a_task_written_in_another_style_is_still_found(tasks: Path) -> None:
    write_choice(tasks)
    (tasks / "choice.yaml").unlink()
    (tasks / "flow.yaml").write_text(
        "{task: flowing, tag: [streams], dataset_path: json, dataset_kwargs: {data_files: {test: choice.jsonl}}}\n",
        encoding="utf-8",
    )
    assert check_tasks(["flowing"], tasks)["flowing"].own
    assert check_tasks(["streams"], tasks)["streams"].members == ("flowing",)


@needs_harness
def test_identity_holds_what_decides_results_and_no_path(tasks: Path, tmp_path: Path) -> None:
    write_choice(tasks)
    (tasks / "shared.yml").write_text("description: Answer.\n", encoding="utf-8")
    text = CHOICE + "include: shared.yml\nprocess_docs: !function own.process\n"
    (tasks / "choice.yaml").write_text(text, encoding="utf-8")
    (tasks / "own.py").write_text("def process(docs):\n    return docs\n", encoding="utf-8")

    def found(folder: Path = tasks) -> str:
        return json.dumps(identity(check_tasks(["tiny_choice"], folder)), sort_keys=True)

    first = found()
    moved = Path(shutil.copytree(tasks, tmp_path / "moved"))
    (moved / "choice.jsonl").rename(moved / "renamed.jsonl")
    (moved / "choice.yaml").write_text(
        "# a comment\n" + text.replace("choice.jsonl", "renamed.jsonl"), encoding="utf-8"
    )
    assert found(moved) == first
    assert str(tmp_path) not in first
    seen = {first}
    for name, old, new in (
        ("choice.yaml", "acc_norm", "brier_score"),
        ("shared.yml", "Answer", "Choose"),
        ("own.py", "return docs", "return docs.select([0])"),
        ("choice.jsonl", "blue", "red"),
    ):
        before = (tasks / name).read_text(encoding="utf-8")
        (tasks / name).write_text(before.replace(old, new), encoding="utf-8")
        seen.add(found())
    assert len(seen) == 5
    assert identity(check_tasks(["hellaswag"]))["tasks"]["hellaswag"]["hub"] == ["Rowan/hellaswag"]


def test_without_the_harness_the_error_says_how_to_install_it(tmp_path: Path) -> None:
    code = (
        "import sys\nsys.path.insert(0, sys.argv[1])\nfrom mixmerge.errors import UserError\n"
        "from mixmerge.evaluate.harness_tasks import check_tasks\n"
        "try:\n    check_tasks(['hellaswag'])\nexcept UserError as error:\n    print(error)\n"
    )
    found = subprocess.run(
        [sys.executable, "-I", "-S", "-c", code, str(SOURCE)], capture_output=True, encoding="utf-8", check=True
    )
    assert found.stdout == "the package 'lm-eval' is not installed; pip install 'mixmerge[lm-eval]'\n"


@needs_harness
def test_a_group_names_its_tasks_and_those_of_its_groups(tasks: Path) -> None:
    write_choice(tasks)
    (tasks / "other.yaml").write_text(CHOICE.replace("tiny_choice", "tiny_other"), encoding="utf-8")
    (tasks / "inner.yaml").write_text("group: inner\ntask:\n  - tiny_other\n", encoding="utf-8")
    (tasks / "outer.yaml").write_text(
        "group: outer\ntask:\n  - task: tiny_choice\n    num_fewshot: 1\n  - group: within\n    task: [inner]\n"
        "  - task: only_here\n    dataset_path: json\n",
        encoding="utf-8",
    )
    found = check_tasks(["outer"], tasks)
    assert found["outer"].members == ("tiny_choice", "inner")
    assert set(found) == {"outer", "tiny_choice", "inner", "tiny_other"}
    (tasks / "inner.yaml").write_text("group: inner\ntask:\n  - tiny_othre\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"unknown task 'tiny_othre'; did you mean 'tiny_other'\?"):
        check_tasks(["outer"], tasks)


@needs_harness
def test_a_task_of_ones_own_hides_one_of_the_harness(tasks: Path) -> None:
    write_choice(tasks)
    (tasks / "choice.yaml").write_text(CHOICE.replace("tiny_choice", "hellaswag"), encoding="utf-8")
    own, theirs = check_tasks(["hellaswag"], tasks)["hellaswag"], check_tasks(["hellaswag"])["hellaswag"]
    assert (own.own, own.version, own.hub) == (True, "2.0", ())
    assert (theirs.own, theirs.hub) == (False, ("Rowan/hellaswag",))
    assert len(own.data) == 2


@needs_harness
def test_a_data_set_on_the_hub_is_named_with_its_revision(tasks: Path) -> None:
    (tasks / "hub.yaml").write_text(HUB, encoding="utf-8")
    assert check_tasks(["tiny_hub"], tasks)["tiny_hub"].hub == ("somebody/something@0a1b2c",)
    (tasks / "hub.yaml").write_text(
        HUB.replace("somebody/something", "json").replace("not-here", "https://example.org/x"), encoding="utf-8"
    )
    found = check_tasks(["tiny_hub"], tasks)["tiny_hub"]
    assert (found.hub, found.data) == (("https://example.org/x.jsonl@0a1b2c",), ())


@needs_harness
@pytest.mark.parametrize("written", ["data_files: {test: 'parts/*.jsonl'}", "data_dir: parts", "data_files: [parts]"])
def test_every_local_data_file_counts(written: str, tasks: Path) -> None:
    (tasks / "parts").mkdir()
    for name in ("a", "b"):
        (tasks / "parts" / f"{name}.jsonl").write_text(json.dumps({"question": name}) + "\n", encoding="utf-8")
    text = HUB.replace("somebody/something", "json").replace("data_files: {test: not-here.jsonl}", written)
    (tasks / "hub.yaml").write_text(text, encoding="utf-8")
    first = check_tasks(["tiny_hub"], tasks)["tiny_hub"]
    assert len(set(first.data)) == 2
    (tasks / "parts" / "b.jsonl").write_text(json.dumps({"question": "c"}) + "\n", encoding="utf-8")
    assert check_tasks(["tiny_hub"], tasks)["tiny_hub"].data != first.data


@needs_harness
def test_a_folder_laid_out_as_a_data_set_counts_by_its_files(tasks: Path) -> None:
    (tasks / "set").mkdir()
    (tasks / "set" / "test.jsonl").write_text("{}\n", encoding="utf-8")
    text = HUB.replace("somebody/something", "./set").replace(", data_files: {test: not-here.jsonl}", "")
    (tasks / "hub.yaml").write_text(text, encoding="utf-8")
    found = check_tasks(["tiny_hub"], tasks)["tiny_hub"]
    assert (len(found.data), found.hub) == (1, ())


@needs_harness
def test_names_are_found_however_a_line_is_written(tasks: Path) -> None:
    """Quoted keys and values, comments, lists of tags in both styles, and names that an include brings."""
    lines = {
        "quoted": '"task": "quoted"\n"tag": "first"',
        "noted": "task: noted  # the name\ntag:\n  - first\n  # between\n  - second",
        "flowing": "task: 'flowing'\ntag: [first, \"third\"]",
        "included": "include: _tagged\ntask: included",
        "inherited": "include: [_named]",
    }
    for name, text in lines.items():
        (tasks / f"{name}.yaml").write_text(text + "\ndoc_to_text: x\n", encoding="utf-8")
    (tasks / "_tagged").write_text("tag: second\n", encoding="utf-8")
    (tasks / "_named").write_text("task: inherited\n", encoding="utf-8")
    assert set(check_tasks(list(lines), tasks)) == set(lines)
    tags = check_tasks(["first", "second", "third"], tasks)
    assert {tag: tags[tag].members for tag in ("first", "second", "third")} == {
        "first": ("flowing", "noted", "quoted"),
        "second": ("included", "noted"),
        "third": ("flowing",),
    }


@needs_harness
def test_a_check_imports_neither_the_harness_nor_torch() -> None:
    code = (
        "import sys\nfrom mixmerge.evaluate.harness_tasks import check_tasks\ncheck_tasks(['hellaswag', 'mmlu'])\n"
        "print([name for name in ('lm_eval', 'torch', 'transformers', 'datasets') if name in sys.modules])\n"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, encoding="utf-8", check=True)
    assert found.stdout == "[]\n"
