"""The command line: exit statuses, one line for every mistake, nothing written where nothing was started."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mixmerge.cli import RECIPES, app, recipe_file

ROOT = Path(__file__).parents[2]
HEAVY = ("torch", "transformers", "trl", "numpy", "scipy", "sklearn", "datasets", "altair", "safetensors", "tokenizers")


def commands() -> dict[str, object]:
    import typer.main

    return dict(typer.main.get_command(app).commands)


def modules_after(code: str) -> set[str]:
    """The heavy modules that a fresh process has loaded after some code."""
    told = f"import sys\n{code}\nprint([name for name in {HEAVY!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", told], capture_output=True, text=True, check=True)
    return set(eval(done.stdout.splitlines()[-1]))


# Light


@pytest.mark.parametrize("arguments", [["--help"], ["run", "--help"], ["merge", "--help"]])
def test_help_loads_nothing_heavy(arguments):
    code = f"from mixmerge.cli import main\nsys.argv = ['mixmerge', *{arguments!r}]\ntry:\n    main()\nexcept SystemExit:\n    pass"
    assert modules_after(code) == set()


@pytest.mark.parametrize(
    "name", ["mixmerge", "mixmerge.run", "mixmerge.plan.graph", "mixmerge.run.store", "mixmerge.errors"]
)
def test_importing_the_package_loads_nothing_heavy(name):
    assert modules_after(f"import {name}") == set()


def test_a_recipe_is_checked_without_torch(study):
    code = f"from mixmerge.recipe.load import load_recipe\nload_recipe({str(study.recipe)!r})"
    assert {"torch", "transformers", "trl"} & modules_after(code) == set()


def test_planning_and_merging_need_no_torch(study):
    code = (
        "from mixmerge.plan.build import build_plan\nfrom mixmerge.recipe.load import load_recipe\n"
        f"build_plan(load_recipe({str(study.recipe)!r}))\nimport mixmerge.merge"
    )
    assert {"torch", "transformers", "trl"} & modules_after(code) == set()


# Help and documentation


def test_every_command_says_what_it_does_and_explains_its_options(mixmerge):
    status, out, _ = mixmerge("--help")
    assert status == 0
    for name, command in commands().items():
        assert re.search(rf"^  {re.escape(name)} +\S", out, re.M), f"{name} has no line in --help"
        for parameter in command.params:
            if parameter.name != "help":
                assert getattr(parameter, "help", None), f"{name}: {parameter.name} has no help"


def test_every_command_is_documented():
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    text = "\n".join(page.read_text(encoding="utf-8") for page in pages)
    missing = [name for name in commands() if f"mixmerge {name}" not in text]
    assert missing == []


def test_every_command_that_reads_can_print_json():
    writes_text = {"init", "schema"}
    for name, command in commands().items():
        options = {option for parameter in command.params for option in parameter.opts}
        assert ("--json" in options) == (name not in writes_text), name


def test_no_arguments_print_the_help_and_exit_2(mixmerge):
    status, out, err = mixmerge()
    assert status == 2
    assert "Usage: mixmerge" in out + err


def test_the_installed_command_is_this_one():
    command = Path(sys.executable).with_name("mixmerge")
    done = subprocess.run([command, "--help"], capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert "One recipe in" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["runn", "x"], "runn"),
        (["run"], "RECIPE"),
        (["run", "x.yaml", "--job", "2"], "--job"),
        (["run", "x.yaml", "--jobs", "0"], "jobs"),
        (["run", "x.yaml", "--jobs", "many"], "--jobs"),
        (["merge", "x.yml"], "OUT"),
    ],
)
def test_a_wrong_argument_exits_2_and_is_named(mixmerge, arguments, word):
    status, out, err = mixmerge(*arguments)
    assert status == 2
    assert out == ""
    assert word.lower() in err.lower()
    assert "Traceback" not in err


# init, check, plan


@pytest.mark.parametrize("name", RECIPES)
def test_init_writes_a_recipe_that_comes_with_mixmerge(mixmerge, tmp_path, name):
    target = tmp_path / "mine.yaml"
    status, out, _ = mixmerge("init", target, "--like", name)
    assert status == 0
    assert target.read_text() == recipe_file(name).read_text()
    assert f"mixmerge check {target}" in out


def test_init_overwrites_nothing_and_knows_its_recipes(mixmerge, tmp_path):
    target = tmp_path / "mine.yaml"
    target.write_text("mine")
    status, _, err = mixmerge("init", target)
    assert (status, target.read_text()) == (2, "mine")
    assert err == f"error: {target}: the file is there already; give another name\n"
    assert mixmerge("init", tmp_path / "x.yaml", "--like", "quickstar")[2].endswith("did you mean 'quickstart'?\n")
    assert mixmerge("init", tmp_path / "no" / "x.yaml")[0] == 2
    assert list(tmp_path.iterdir()) == [target]


def test_check_says_ok_and_writes_nothing(mixmerge, study):
    before = sorted(study.folder.rglob("*"))
    status, out, err = mixmerge("check", study.recipe, "--out", study.out)
    assert (status, err.count("\n")) == (0, 2)
    assert err.startswith("note: mix: of the pairs in the data set 'safety'")
    assert err.endswith("note: trainings left to defaults: scheduler cosine, warmup_ratio 0.1\n")
    *data, last = out.splitlines()
    assert data == ["data general: 16 rows (en 8, fr 8)", "data safety: 16 rows (en 8, fr 8)"]
    assert last.startswith(f"{study.recipe}: ok; 1 expert")
    assert last.endswith("2 languages, 32 steps")
    found = json.loads(mixmerge("check", study.recipe, "--json", "--out", study.out)[1])
    assert found["ok"] is True
    assert found["data"]["general"]["kept"] == {"en": 8, "fr": 8}
    assert sorted(study.folder.rglob("*")) == before


@pytest.mark.parametrize("command", ["plan", "status"])
def test_asking_before_the_first_run_writes_nothing(mixmerge, study, command):
    status, out, err = mixmerge(command, study.recipe, "--out", study.out)
    assert (status, err) == (0, mixmerge("check", study.recipe)[2] if command == "plan" else "")
    assert "32 to run" in out
    assert not study.out.exists()


def test_a_plan_in_json_has_every_step_with_state_and_reason(mixmerge, study):
    found = json.loads(mixmerge("plan", study.recipe, "--json", "--out", study.out)[1])
    assert found["study"] == "tiny"
    assert len(found["steps"]) == 32
    assert {step["state"] for step in found["steps"]} == {"to run", "blocked"}
    assert all(step["why"] == ["not made yet"] for step in found["steps"])
    assert all(bool(step["blocked_by"]) == (step["state"] == "blocked") for step in found["steps"])


def test_a_budget_that_follows_from_a_rule_is_told_by_plan_and_show(mixmerge, study):
    rule = ("--set", "budget={rows: 8, baselines: sum}", "--out", study.out)
    assert "\nbudget of mix: 8 rows, sum of all experts\n" in mixmerge("plan", study.recipe, *rule)[1]
    assert "  budget_rule: sum of all experts\n" in mixmerge("show", study.recipe, "mixture/mix", *rule)[1]
    assert "budget of" not in mixmerge("plan", study.recipe, "--out", study.out)[1]


def test_show_explains_a_step_that_is_not_done(mixmerge, study):
    status, out, _ = mixmerge("show", study.recipe, "merge/ties", "--out", study.out)
    assert status == 0
    assert "not done" in out
    assert '"density": 0.5' in out
    assert "model0: train/general" in out


@pytest.mark.parametrize("command", ["report"])
def test_results_of_a_study_that_is_not_finished_are_refused(mixmerge, study, command):
    status, out, err = mixmerge(command, study.recipe, "--out", study.out)
    assert (status, out) == (2, "")
    assert err == "error: tiny: the study is not finished; mixmerge run RECIPE\n"
    assert not study.out.exists()


def test_a_step_that_does_not_exist_is_refused(mixmerge, study):
    status, _, err = mixmerge("show", study.recipe, "merge/tise", "--out", study.out)
    assert status == 2
    assert err == "error: no step 'merge/tise' in this study; did you mean 'merge/ties'?\n"


# Every mistake: one line, exit 2, nothing started, nothing written


def rewrite(path: Path, change) -> None:
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(row) + "\n" for row in change(rows)))


def drop(column):
    return lambda rows: [{k: v for k, v in row.items() if not (i == 2 and k == column)} for i, row in enumerate(rows)]


def without_weights(study) -> None:
    files = (study.folder / "base").resolve()
    (study.folder / "base").unlink()
    shutil.copytree(files, study.folder / "base", ignore=shutil.ignore_patterns("*.safetensors"))


def overlap(study) -> None:
    row = json.loads((study.folder / "prompts/general.fr.jsonl").read_text().splitlines()[1])
    extra = {"id": "extra", "prompt": row["prompt"].upper() + "!", "completion": "Oui."}
    rewrite(study.folder / "data/general.fr.jsonl", lambda rows: [*rows, extra])


def ask_again(study, name: str, text_of: str, row: int) -> None:
    """Give a prompt the text of another one."""
    files = [study.folder / f"prompts/{key}.jsonl" for key in (name, text_of)]
    text = json.loads(files[1].read_text().splitlines()[0])["prompt"]
    rewrite(files[0], lambda rows: [r | {"prompt": f" {text.upper()}!"} if i == row else r for i, r in enumerate(rows)])


def few_topics(study) -> None:
    for code in ("en", "fr"):
        for name in ("general", "safety"):
            lines = (study.folder / f"data/{name}.{code}.jsonl").read_text().splitlines()[:2]
            (study.folder / f"data/few-{name}.{code}.jsonl").write_text("\n".join(lines) + "\n")
    study.edit(
        'answers: "data/general.{lang}.jsonl", refusals: "data/',
        'answers: "data/few-general.{lang}.jsonl", refusals: "data/few-',
    )


def one_topic_of_refusals(study) -> None:
    for code in ("en", "fr"):
        lines = (study.folder / f"data/safety.{code}.jsonl").read_text().splitlines()[:2]
        (study.folder / f"data/one.{code}.jsonl").write_text("\n".join(lines) + "\n")
    study.edit('refusals: "data/safety.{lang}.jsonl"', 'refusals: "data/one.{lang}.jsonl"')


MISTAKES = {
    "more tokens than the data has": (
        lambda s: s.edit("{rows: 8}", "{tokens: 8000000}"),
        r"recipe\.yaml:10: experts\.general: general/en has 8 rows, which give at most \d+ tokens with max_repeats 4, .*",
    ),
    "one token": (
        lambda s: s.edit("{rows: 8}", "{tokens: 1}"),
        r"recipe\.yaml:10: experts\.general: the budget of 1 tokens leaves 0\.5 for general/en, less than one row; .*",
    ),
    "more bytes than the data has": (
        lambda s: (
            s.edit("{rows: 8}", "{tokens: 80000}"),
            s.edit("base: ./base", "base: {path: ./base, trim_vocab: 300}"),
        ),
        r"recipe\.yaml:10: experts\.general: general/en has 8 rows, which give at most \d+ tokens .*",
    ),
    "prompt in dev and test": (
        lambda s: ask_again(s, "harmful.fr", "harmful.fr", 1),
        r"recipe\.yaml:23: evaluation\.prompts\.harmful: .*harmful\.fr\.jsonl:2: this test prompt of 'harmful' is also a "
        r"dev prompt of 'harmful', at .*harmful\.fr\.jsonl:1: .*; take it out of one of them.*",
    ),
    "prompt in two sets": (
        lambda s: ask_again(s, "harmful.en", "general.fr", 0),
        r"recipe\.yaml:23: evaluation\.prompts\.harmful: .*harmful\.en\.jsonl:1: this dev prompt of 'harmful' is also a "
        r"dev prompt of 'general', at .*general\.fr\.jsonl:1: .*",
    ),
    "misspelt objective of a data set": (
        lambda s: s.edit("objective: safety", "objective: safty"),
        r"recipe\.yaml:6: data\.safety\.objective: 'safety' is used in mixtures, and the data set 'safety' has objective "
        r"'safty'; write objective: safety",
    ),
    "misspelt objective of a mixture": (
        lambda s: s.edit("safety: 0.5}", "safty: 0.5}"),
        r"recipe\.yaml:13: baselines\.mix\.mixture\.safty: unknown objective 'safty'; did you mean 'safety'\?",
    ),
    "folder as a data path": (
        lambda s: s.edit('path: "data/general.{lang}.jsonl"}\n  safety', 'path: "data", lang: en}\n  safety'),
        r"recipe\.yaml:5: data\.general: .*/data: a folder, not a file; name a file in it: .*",
    ),
    "Hub data set of several languages": (
        lambda s: s.edit('path: "data/general.{lang}.jsonl"}\n  safety', "hub: some/thing}\n  safety"),
        r"recipe\.yaml:5: data\.general: hub:some/thing: one Hub data set for 2 languages \(en, fr\); .*config or split.*",
    ),
    "level in percent": (
        lambda s: s.edit("{draws: 100}", "{draws: 100, level: 95}"),
        r"recipe\.yaml:\d+: statistics\.level: .*less than 1 \(given: 95\); for 95 percent write 0\.95",
    ),
    "few topics for the judge": (
        few_topics,
        r"recipe\.yaml:\d+: judges\.refusal: \d topics, too few for 5-fold cross-validation; .*",
    ),
    "refusals of one topic for the judge": (
        one_topic_of_refusals,
        r"recipe\.yaml:\d+: judges\.refusal: one label stands in too few topics, so refusals cannot be told from answers; .*",
    ),
    "unknown key": (
        lambda s: s.edit("name: tiny", "nome: tiny"),
        r"recipe\.yaml:1: nome: unknown key 'nome'; did you mean 'name'\?",
    ),
    "wrong type": (
        lambda s: s.edit("{rows: 8}", "{rows: few}"),
        r"recipe\.yaml:7: budget\.rows: .*valid integer \(given: 'few'\)",
    ),
    "unknown method": (
        lambda s: s.edit("method: ties", "method: tiez"),
        r"recipe\.yaml:\d+: merges\.ties\.method: .*'tiez'; did you mean 'ties'",
    ),
    "unknown language": (
        lambda s: s.edit("  general: {mixture: general}", "  general: {mixture: general, languages: [de]}"),
        r"recipe\.yaml:\d+: experts\.general\.languages\.de: unknown language 'de'; known: en, fr",
    ),
    "language that no judge knows": (
        lambda s: s.edit("languages: [en, fr]", "languages: [en, fr, qq]"),
        r"recipe\.yaml:3: languages: .*qq.*",
    ),
    "broken YAML": (lambda s: s.edit("languages: [en, fr]", "languages: [en, fr"), r"recipe\.yaml:\d+: .+"),
    "no recipe": (lambda s: s.recipe.unlink(), r"recipe\.yaml: cannot read the file: No such file or directory"),
    "language and language column": (
        lambda s: s.edit(
            'general.{lang}.jsonl"}\n  safety', 'general.{lang}.jsonl", lang: en, lang_column: x}\n  safety'
        ),
        r"recipe\.yaml:5: data\.general: give lang or lang_column, not both",
    ),
    "language column that is not there": (
        lambda s: s.edit('general.{lang}.jsonl"}\n  safety', 'general.{lang}.jsonl", lang_column: tongue}\n  safety'),
        r"recipe\.yaml:5: data\.general: .*general\.en\.jsonl:1: missing column 'tongue' \(lang_column\); columns found: "
        r"completion, id, prompt \(16 bad rows of 16: 16 no language\); correct 'lang_column'",
    ),
    "streaming of a file": (
        lambda s: s.edit('general.{lang}.jsonl"}\n  safety', 'general.{lang}.jsonl", streaming: true}\n  safety'),
        r"recipe\.yaml:5: data\.general: streaming goes with hub only; files are always read row by row",
    ),
    "wrong policy for wrong languages": (
        lambda s: s.edit(
            'general.{lang}.jsonl"}\n  safety', 'general.{lang}.jsonl", wrong_language: ignore}\n  safety'
        ),
        r"recipe\.yaml:5: data\.general\.wrong_language: .*'report', 'drop' or 'refuse' \(given: 'ignore'\)",
    ),
    "limit of no rows": (
        lambda s: s.edit('general.{lang}.jsonl"}\n  safety', 'general.{lang}.jsonl", limit: 0}\n  safety'),
        r"recipe\.yaml:5: data\.general\.limit: .*greater than or equal to 1 \(given: 0\)",
    ),
    "language without data": (
        lambda s: s.edit("languages: [en, fr]", "languages: [en, fr, hi]"),
        r".*no file for language 'hi': .*general\.hi\.jsonl does not exist; .*",
    ),
    "missing data file": (
        lambda s: (s.folder / "data/safety.fr.jsonl").unlink(),
        r".*no file for language 'fr': .*safety\.fr\.jsonl",
    ),
    "missing prompt file": (lambda s: (s.folder / "prompts/harmful.en.jsonl").unlink(), r".*harmful\.en\.jsonl"),
    "row without a column": (
        lambda s: rewrite(s.folder / "data/general.fr.jsonl", drop("completion")),
        r"recipe\.yaml:5: data\.general: .*data/general\.fr\.jsonl:3: .*completion.*",
    ),
    "row that is no JSON": (
        lambda s: (s.folder / "data/general.fr.jsonl").write_text('{"prompt": "x", "completion": "y"}\n{"prompt"\n'),
        r".*data/general\.fr\.jsonl:2: broken JSON: .*",
    ),
    "prompt without a reference": (
        lambda s: rewrite(s.folder / "prompts/general.en.jsonl", drop("reference")),
        r"recipe\.yaml:\d+: evaluation\.prompts\.general: no reference answer for prompt 'general/en/p2' in .*",
    ),
    "prompt without text": (
        lambda s: rewrite(s.folder / "prompts/harmful.en.jsonl", drop("prompt")),
        r"recipe\.yaml:23: evaluation\.prompts\.harmful: .*prompts/harmful\.en\.jsonl:3: .*prompt.*",
    ),
    "judge's row without a kind": (
        lambda s: rewrite(s.folder / "data/safety.en.jsonl", drop("kind")),
        r"recipe\.yaml:\d+: judges\.refusal: .*data/safety\.en\.jsonl:3: .*kind.*",
    ),
    "empty mixture cell": (
        lambda s: s.edit('"data/safety.{lang}.jsonl"}\nbudget', '"data/safety.{lang}.jsonl", languages: [en]}\nbudget'),
        r"recipe\.yaml:\d+: baselines\.mix\.mixture\.safety: no 'safety' row in 'fr'; add data in that language.*",
    ),
    "budget beyond the data": (
        lambda s: s.edit("{rows: 8}", "{rows: 5000}"),
        r"recipe\.yaml:10: experts\.general: general/en has 8 rows, which give 32 rows with max_repeats 4, .*",
    ),
    "empty data file": (
        lambda s: (s.folder / "data/general.en.jsonl").write_text(""),
        r".*no rows for language 'en'.*",
    ),
    "prompt in the training data": (
        overlap,
        r"recipe\.yaml:\d+: data\.general: 1 training row\(s\) are also prompts: 1 exact \(fr 1\); "
        r"first row 'fr/extra' \(exact, general.fr.jsonl:9\): 'Voici .*'; take them out of one side, or set evaluation\.overlap: drop or ignore",
    ),
    "base without safetensors": (without_weights, r"recipe\.yaml:2: base: .*/base has no \.safetensors file; .*"),
    "no base": (lambda s: s.edit("base: ./base", "base: ./bass"), r"recipe\.yaml:2: base: no folder .*/bass; .*"),
    "base that is no folder": (
        lambda s: s.edit("base: ./base", "base: ./recipe.yaml"),
        r"recipe\.yaml:2: base: no folder .*",
    ),
    "package that is not installed": (
        lambda s: s.edit("base: ./base", "base: {package: not-there}"),
        r"recipe\.yaml:2: base: the package 'not-there' is not installed; .*",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_and_nothing_is_started_or_written(mixmerge, study, mistake):
    make, line = MISTAKES[mistake]
    make(study)
    before = sorted(study.folder.rglob("*"))
    status, out, err = mixmerge("run", study.recipe, "--out", study.out)
    assert status == 2, err
    assert out == ""
    assert re.fullmatch(rf"error: (.*/)?{line}.*\n", err), err
    assert not study.out.exists()
    assert sorted(study.folder.rglob("*")) == before


@pytest.mark.parametrize("mistake", ["unknown key", "row without a column", "base without safetensors"])
@pytest.mark.parametrize("command", ["check", "plan", "status", "report"])
def test_every_command_on_a_recipe_finds_the_same_mistake(mixmerge, study, command, mistake):
    make, line = MISTAKES[mistake]
    make(study)
    status, out, err = mixmerge(command, study.recipe, "--out", study.out)
    assert (status, out) == (2, "")
    assert re.fullmatch(rf"error: (.*/)?{line}.*\n", err), err
    assert not study.out.exists()


def test_an_override_that_is_wrong_is_named(mixmerge, study):
    status, _, err = mixmerge("run", study.recipe, "--set", "merges.ties.parameters.density=70", "--out", study.out)
    assert status == 2
    assert err.startswith("error: --set: merges.ties.parameters.density: 'density' must lie between 0 and 1, got 70; ")
    assert not study.out.exists()


def test_an_override_of_a_misspelt_entry_suggests_the_right_one(mixmerge, study):
    wrong = "merges.tis.parameters.density=0.3"
    status, _, err = mixmerge("check", study.recipe, "--set", wrong, "--out", study.out)
    assert status == 2
    assert err.startswith(
        "error: --set: merges.tis: no 'tis' in the recipe, and 'method' is missing; did you mean 'ties'?"
    )


@pytest.mark.parametrize("command", ["check", "plan", "run", "status", "show", "report"])
@pytest.mark.parametrize("below", ["", "/further/down"])
def test_an_out_that_is_a_file_is_refused_by_every_command(mixmerge, study, command, below):
    file = study.folder / "taken"
    file.write_text("x")
    step = ["merge/ties"] if command == "show" else []
    status, out, err = mixmerge(command, study.recipe, *step, "--out", f"{file}{below}")
    assert (status, out) == (2, "")
    assert err == f"error: --out {file}: a file, not a folder; give a folder, or remove the file\n"
    assert file.read_text() == "x"


@pytest.mark.parametrize("command", ["merge", "trim-vocab"])
def test_a_model_is_not_written_over_a_file(mixmerge, tiny_base, tmp_path, command):
    file, config = tmp_path / "taken", tmp_path / "merge.yml"
    file.write_text("x")
    config.write_text(f"merge_method: linear\nmodels:\n  - model: {tiny_base}\n    parameters: {{weight: 1}}\n")
    given = [config, file] if command == "merge" else [tiny_base, file, "--languages", "en", "--size", "300"]
    status, out, err = mixmerge(command, *given)
    assert (status, out) == (2, "")
    assert str(file) in err
    assert err.count("\n") == 1


@pytest.fixture
def as_nobody(study):
    """Run the study into a folder as a user who may read everything here and write nothing."""

    def as_nobody(out: Path) -> subprocess.CompletedProcess[str]:
        command = [*study.command("run")[:-1], str(out)]
        if os.geteuid() == 0:
            if not shutil.which("setpriv"):
                pytest.skip("root may write everywhere, and there is no setpriv to become somebody else")
            own = [folder for folder in study.folder.parents if folder.name.startswith(("pytest-", "popen-"))]
            for folder in (study.folder, *own):
                folder.chmod(0o755)
            command = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", *command]
        return subprocess.run(command, capture_output=True, text=True, check=False, cwd="/")

    files = (study.folder / "base").resolve()
    (study.folder / "base").unlink()
    shutil.copytree(files, study.folder / "base")
    for path in ((study.folder / "base"), *(study.folder / "base").iterdir()):
        path.chmod(0o755)
    return as_nobody


def test_an_out_folder_that_may_not_be_written_is_named(study, as_nobody):
    closed = study.folder / "closed"
    closed.mkdir(0o555)
    done = as_nobody(closed / "out")
    assert done.returncode == 1, done.stderr
    assert re.fullmatch(
        rf"error: {closed}\S*: no permission to write; let this user write there to go on, or .*\n", done.stderr
    )


@pytest.mark.parametrize("file", ["base/model.safetensors", "data/general.en.jsonl"])
def test_a_file_that_may_not_be_read_is_named(study, as_nobody, file):
    (study.folder / file).chmod(0)
    done = as_nobody(study.folder / "out")
    assert done.returncode in (1, 2), done.stderr
    assert done.stderr.count("\n") == 1
    assert str(study.folder / file) in done.stderr
    assert "ermission" in done.stderr


@pytest.mark.parametrize(
    "bug", [ZeroDivisionError("a bug"), FileNotFoundError(2, "a bug", "nowhere"), OSError("a bug")]
)
def test_a_bug_keeps_its_traceback_and_exits_70(mixmerge, study, monkeypatch, bug):
    def broken(*_, **__):
        raise bug

    monkeypatch.setattr("mixmerge.plan.build.build_plan", broken)
    status, out, err = mixmerge("check", study.recipe, "--out", study.out)
    assert (status, out) == (70, "")
    assert "Traceback" in err
    assert type(bug).__name__ in err
    assert "a bug" in err


# merge without a recipe


def test_models_are_merged_without_a_recipe(mixmerge, tiny_base, tmp_path):
    config = tmp_path / "merge.yml"
    config.write_text(
        f"merge_method: linear\ndtype: float32\nmodels:\n  - model: {tiny_base}\n    parameters: {{weight: 1}}\n"
    )
    status, out, _ = mixmerge("merge", config, tmp_path / "merged", "--json")
    assert status == 0
    assert json.loads(out)["method"] == "linear"
    assert (tmp_path / "merged" / "model.safetensors").is_file()
    status, _, err = mixmerge("merge", config, tmp_path / "merged")
    assert status == 2
    assert str(tmp_path / "merged") in err
    status, out, _ = mixmerge("merge", "--verify", tmp_path / "merged")
    assert status == 0
    assert "byte for byte" in out


def test_a_dry_run_of_a_merge_writes_nothing(mixmerge, tiny_base, tmp_path):
    config = tmp_path / "merge.yml"
    config.write_text(f"merge_method: linear\nmodels: [{{model: {tiny_base}, parameters: {{weight: 1}}}}]\n")
    status, out, _ = mixmerge("merge", config, "--dry-run")
    assert status == 0
    assert "nothing was written" in out
    status, out, _ = mixmerge("merge", config, tmp_path / "merged", "--dry-run", "--json")
    assert json.loads(out)["bytes_written"] > 0
    assert [path.name for path in tmp_path.glob("merge*")] == ["merge.yml"]


def test_verifying_takes_a_model_that_a_merge_has_made(mixmerge, tiny_base, tmp_path):
    status, _, err = mixmerge("merge", "--verify", tiny_base)
    assert status == 1
    assert "only a model that mixmerge merge has written can be verified" in err
    status, _, err = mixmerge("merge", "--verify", tiny_base, tmp_path / "out")
    assert status == 2
    assert "mixmerge merge --verify MODEL" in err


def test_a_mistake_in_a_merge_configuration_is_named_with_its_line(mixmerge, tiny_base, tmp_path):
    config = tmp_path / "merge.yml"
    config.write_text(f"merge_method: linear\nmodels:\n  - model: {tiny_base}\n    parameters: {{wieght: 1}}\n")
    status, out, err = mixmerge("merge", config, tmp_path / "merged")
    assert (status, out) == (2, "")
    assert err.startswith(f"error: {config}:4: models.0.parameters.wieght: ")
    assert not (tmp_path / "merged").exists()


def test_the_package_runs_as_a_module_and_lists_what_python_can_call():
    import mixmerge as package

    done = subprocess.run([sys.executable, "-m", "mixmerge", "--help"], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    assert "merge" in done.stdout
    assert all(callable(getattr(package, name)) for name in package.__all__)
    assert "merge_state_dicts" in package.__all__
