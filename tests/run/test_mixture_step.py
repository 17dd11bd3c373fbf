"""The mixture step: real data files, a real tokenizer; what became of the records stands in manifest and record."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mixmerge.errors import DataError
from mixmerge.plan.build import build_plan
from mixmerge.plan.graph import Plan
from mixmerge.recipe.load import load_recipe
from mixmerge.run.store import Store
from mixmerge.run.worker import carry_out

COLUMN = "data.general={objective: general, path: data/all.jsonl, lang_column: language, bad_rows: drop}"


def quiet(event: str, **data: Any) -> None:
    """Events that nobody waits for."""


def make(plan: Plan, out: Path, title: str) -> Path:
    """Carry out one step and what it needs; gives its folder."""
    store, step = Store(out), plan.find(title)
    for needed in (*step.inputs.values(), step.id):
        carry_out(plan.by_id[needed], plan, store, {}, quiet)
    return store.path(step.id)


@pytest.fixture
def planned(study) -> Callable[..., Plan]:
    def planned(*overrides: str) -> Plan:
        return build_plan(load_recipe(study.recipe, overrides))

    return planned


@pytest.fixture
def one_file(study) -> Path:
    """The general rows of both languages in one file, with a language column, a bad row and a row in German."""
    names = {"en": "English", "fr": "fr-CA"}
    rows = [
        json.loads(line) | {"language": names[code]}
        for code in ("en", "fr")
        for line in (study.folder / f"data/general.{code}.jsonl").read_text().splitlines()
    ]
    rows.insert(3, {"id": "bad", "prompt": "q", "completion": "", "language": "en"})
    rows.insert(5, {"id": "other", "prompt": "Was?", "completion": "Das.", "language": "deu"})
    path = study.folder / "data/all.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_a_mixture_records_the_sha256_of_each_file_that_it_is_drawn_from(study, planned):
    from mixmerge.hashes import file_sha256

    folder = make(planned(), study.out, "mixture/mix")
    manifest, record = (json.loads((folder / name).read_text()) for name in ("manifest.json", "record.json"))
    path = study.folder / "data/safety.fr.jsonl"
    said = {"lang": "fr", "file": "data/safety.fr.jsonl", "bytes": path.stat().st_size, "sha256": file_sha256(path)}
    assert manifest["data"]["safety"]["files"][1] == said
    assert record["measurements"]["data"]["safety"]["files"] == manifest["data"]["safety"]["files"]
    assert [entry["lang"] for entry in manifest["data"]["general"]["files"]] == ["en", "fr"]


def origins(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "origins.jsonl").read_text(encoding="utf-8").splitlines()]


def test_each_row_of_a_mixture_leads_to_the_line_that_it_was_read_from(study, planned):
    folder = make(planned("budget.rows=40", "training.max_repeats=5"), study.out, "mixture/mix")
    rows = [json.loads(line) for line in (folder / "rows.jsonl").read_text(encoding="utf-8").splitlines()]
    told = origins(folder)
    assert [entry["id"] for entry in told] == [row["id"] for row in rows]
    for row, entry in zip(rows, told, strict=True):
        source = json.loads((study.folder / entry["file"]).read_text(encoding="utf-8").splitlines()[entry["row"] - 1])
        assert f"{row['lang']}/{source['id']}" == row["id"]
        assert source["prompt"] == row["prompt"][0]["content"]
        assert entry["data"] == row["objective"]
    assert max(entry["turn"] for entry in told) > 0
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["origins"]["file"] == "origins.jsonl"
    assert json.loads((folder / "record.json").read_text())["sha256"]["origins.jsonl"] == manifest["origins"]["sha256"]


def test_rows_without_ids_of_two_data_sets_of_one_objective_are_told_apart(study, planned):
    for code in ("en", "fr"):
        path = study.folder / f"data/general.{code}.jsonl"
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        for name, end in (("plain", ""), ("more", " More.")):
            lines = [{"prompt": row["prompt"] + end, "completion": row["completion"]} for row in rows]
            text = "".join("\n" + json.dumps(line) + "\n" for line in lines)  # every second line is empty
            (study.folder / f"data/{name}.{code}.jsonl").write_text(text, encoding="utf-8")
    more = "data.more={objective: general, path: 'data/more.{lang}.jsonl'}"
    plain = "data.general.path=data/plain.{lang}.jsonl"
    folder = make(planned(plain, more, "budget.rows=32"), study.out, "mixture/general")
    rows = [json.loads(line) for line in (folder / "rows.jsonl").read_text(encoding="utf-8").splitlines()]
    told = origins(folder)
    assert len({row["id"] for row in rows}) == 16, "each id stands for two rows"
    assert len({(entry["file"], entry["row"]) for entry in told}) == 32
    for row, entry in zip(rows, told, strict=True):
        assert (entry["data"] == "more") == row["prompt"][0]["content"].endswith(" More.")
        assert entry["file"] == f"data/{'more' if entry['data'] == 'more' else 'plain'}.{row['lang']}.jsonl"
        assert (entry["row"] % 2, row["id"]) == (0, f"{row['lang']}/{entry['row']}")


def test_a_row_of_a_data_set_folder_leads_to_its_record_there(study, planned):
    hub = study.folder / "hub"
    hub.mkdir()
    text = (study.folder / "data/general.en.jsonl").read_text(encoding="utf-8")
    (hub / "train.jsonl").write_text(text, encoding="utf-8")
    overrides = ("languages=[en]", "data.general={objective: general, hub: ./hub}", "budget.rows=4")
    folder = make(planned(*overrides), study.out, "mixture/general")
    for row, entry in zip((folder / "rows.jsonl").read_text().splitlines(), origins(folder), strict=True):
        source = json.loads(text.splitlines()[entry["row"] - 1])
        assert json.loads(row)["id"] == f"en/{source['id']}"
        assert (entry["data"], entry["file"]) == ("general", "hub:./hub/train")
    (file,) = json.loads((folder / "manifest.json").read_text())["data"]["general"]["files"]
    assert (file["file"], file["bytes"], len(file["sha256"])) == ("hub:./hub/train", None, 64)


def test_a_mixture_keeps_the_account_of_its_data_in_manifest_and_record(study, planned, one_file):
    folder = make(planned(COLUMN), study.out, "mixture/mix")
    manifest = json.loads((folder / "manifest.json").read_text())
    record = json.loads((folder / "record.json").read_text())
    assert manifest["data"] == record["measurements"]["data"]
    assert manifest["data"]["safety"]["kept"] == {"en": 8, "fr": 8}
    account = manifest["data"]["general"]
    assert account["read"] == 18
    assert account["kept"] == {"en": 8, "fr": 8}
    assert account["other_language"] == {"de": 1}
    assert account["bad"] == {"empty text": {"rows": 1, "first": "all.jsonl:4: 'completion' is empty"}}


def test_one_file_with_a_language_column_gives_the_rows_that_a_file_a_language_gives(study, planned, one_file):
    apart, together = (
        make(planned(*overrides), study.out, "mixture/general") / "rows.jsonl" for overrides in ((), (COLUMN,))
    )
    assert apart.parent != together.parent
    assert apart.read_bytes() == together.read_bytes()


@pytest.mark.parametrize("streaming", ["false", "true"])
def test_a_local_data_set_folder_gives_the_rows_that_its_files_give(study, planned, tmp_path, monkeypatch, streaming):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    card = "---\nconfigs:\n"
    for code in ("en", "fr"):
        (study.folder / f"set/{code}").mkdir(parents=True)
        (study.folder / f"set/{code}/rows.jsonl").write_bytes(
            (study.folder / f"data/general.{code}.jsonl").read_bytes()
        )
        card += f"- config_name: {code}\n  data_files: {code}/rows.jsonl\n"
    (study.folder / "set/README.md").write_text(card + "---\n")
    hub = f"data.general={{objective: general, hub: ./set, config: '{{lang}}', streaming: {streaming}}}"
    files, folder = (
        make(planned(*overrides), study.out, "mixture/general") / "rows.jsonl" for overrides in ((), (hub,))
    )
    assert files.parent != folder.parent
    assert files.read_bytes() == folder.read_bytes()


def test_a_mixture_of_one_language_counts_the_others_as_skipped(study, planned, one_file):
    folder = make(planned(COLUMN, "experts.general.languages=[fr]"), study.out, "mixture/general")
    account = json.loads((folder / "manifest.json").read_text())["data"]["general"]
    assert account["kept"] == {"fr": 8}
    assert account["other_language"] == {"en": 9, "de": 1}


def test_a_limit_holds_in_the_mixture_too(study, planned, one_file):
    folder = make(planned(COLUMN, "data.general.limit=2"), study.out, "mixture/general")
    rows = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
    assert {row["id"] for row in rows} == {"en/g00", "en/g01", "fr/g00", "fr/g01"}
    account = json.loads((folder / "manifest.json").read_text())["data"]["general"]
    assert account["limit_reached"] == ["en", "fr"]


def test_an_option_that_changes_rows_makes_the_mixture_and_what_follows_new(planned, one_file):
    before = planned(COLUMN)
    after = planned(COLUMN, "data.general.limit=5")
    assert before.find("mixture/general").id != after.find("mixture/general").id
    assert before.find("train/general").id != after.find("train/general").id
    assert before.find("base/base").id == after.find("base/base").id


def test_mixtures_made_before_there_were_such_options_keep_their_ids(planned):
    what = planned().find("mixture/general").what["data"]["general"]
    assert what.keys() == {"objective", "languages", "fingerprint", "columns", "lang"}


def test_checking_says_what_became_of_each_record(study, mixmerge, one_file):
    status, out, err = mixmerge("check", study.recipe, "--set", COLUMN, "--out", study.out)
    assert (status, err) == (
        0,
        "note: mix: of the pairs in the data set 'safety' the chosen answers are learnt (method: sft)\n"
        "note: trainings left to defaults: scheduler cosine, warmup_ratio 0.1\n",
    )
    assert out.splitlines() == [
        "data general: 16 of 18 rows (en 8, fr 8); 1 in other languages skipped (de 1); "
        "1 bad dropped (1 empty text; first empty text: all.jsonl:4: 'completion' is empty)",
        "data safety: 16 rows (en 8, fr 8)",
        f"{study.recipe}: ok; 1 expert, 1 baseline, 1 merge, 2 languages, 32 steps",
    ]


def test_a_bad_row_that_is_not_dropped_stops_everything_before_it_starts(study, mixmerge, one_file):
    status, out, err = mixmerge(
        "check", study.recipe, "--set", COLUMN, "--set", "data.general.bad_rows=refuse", "--out", study.out
    )
    assert (status, out) == (2, "")
    assert "data.general: " in err
    assert err.endswith("all.jsonl:4: 'completion' is empty; mend it, or set bad_rows: drop\n")


def test_rows_evidently_in_another_language_are_told_when_checking_and_in_the_mixture(study, mixmerge):
    path = study.folder / "data/general.fr.jsonl"
    german = {"id": "x", "prompt": "Was tut man bei Regen, wenn es den ganzen Tag nicht aufhört?"}
    german["completion"] = "Man bleibt am besten zu Hause, kocht sich einen Tee und liest ein gutes Buch."
    path.write_text(path.read_text() + json.dumps(german) + "\n", encoding="utf-8")
    out = mixmerge("check", study.recipe, "--out", study.out)[1]
    told = "1 of 17 judged evidently in another language than they say (fr 1; first fr: general.fr.jsonl:9: in 'de')"
    assert out.splitlines()[0] == f"data general: 17 rows (en 8, fr 9); {told}"
    folder = make(build_plan(load_recipe(study.recipe)), study.out, "mixture/general")
    account = json.loads((folder / "manifest.json").read_text())["data"]["general"]
    assert account["wrong_language"] == {"fr": {"rows": 1, "first": "general.fr.jsonl:9: in 'de'"}}
    status, _, err = mixmerge("plan", study.recipe, "--set", "data.general.wrong_language=refuse", "--out", study.out)
    assert status == 2
    assert "general.fr.jsonl:9: this row says 'fr' and is evidently in 'de' (1 such row of 17)" in err


def test_progress_says_how_many_rows_of_the_data_were_left_out(study, planned, one_file, capsys):
    from mixmerge.run.progress import Progress

    plan, told = planned(COLUMN), []
    step, store = plan.find("mixture/general"), Store(study.out)
    for needed in (*step.inputs.values(), step.id):
        carry_out(plan.by_id[needed], plan, store, {}, lambda event, **data: told.append({"event": event, **data}))
    progress = Progress()
    progress.begin(plan.study, total=len(plan.steps), todo=plan.steps)
    for event in told:
        progress.take(plan.by_id[event["step"]], event)
    progress.stop()
    assert "tokens, 1 bad row of its data left out)" in capsys.readouterr().err


LONG = {"id": "long", "prompt": "word " * 400, "completion": "short"}


DROPPING = 'data.general={objective: general, path: "data/general.{lang}.jsonl", bad_rows: drop}'
TOO_LONG = {"rows": 1, "first": "general.en.jsonl:9: the prompt alone fills max_length 256"}


@pytest.fixture
def with_long_prompt(study) -> Path:
    """A row whose prompt alone has more tokens than the trainings read of a row."""
    path = study.folder / "data/general.en.jsonl"
    path.write_text(path.read_text() + json.dumps(LONG) + "\n")
    return path


def test_a_prompt_that_fills_the_length_is_refused_like_any_other_bad_row(study, mixmerge, with_long_prompt):
    status, out, err = mixmerge("check", study.recipe, "--out", study.out)
    assert (status, out) == (2, "")
    assert err == (
        f"error: {study.recipe}:5: data.general: {with_long_prompt}:9: the prompt alone fills max_length 256; "
        "raise training.max_length of 'general', or set bad_rows: drop\n"
    )


def test_a_prompt_that_fills_the_length_is_dropped_and_counted_wherever_bad_rows_are(
    study, planned, mixmerge, with_long_prompt
):
    arguments = (study.recipe, "--set", DROPPING, "--out", study.out)
    line = (
        "data general: 16 of 17 rows (en 8, fr 8); 1 bad dropped (1 prompt too long; first prompt too long: "
        "general.en.jsonl:9: the prompt alone fills max_length 256)"
    )
    assert mixmerge("check", *arguments)[1].splitlines()[0] == line
    folder = make(planned(DROPPING), study.out, "mixture/general")
    manifest, record = (json.loads((folder / f"{name}.json").read_text()) for name in ("manifest", "record"))
    account = manifest["data"]["general"]
    assert (account["read"], account["kept"], account["bad"]) == (17, {"en": 8, "fr": 8}, {"prompt too long": TOO_LONG})
    assert record["measurements"]["data"] == manifest["data"]
    assert "long" not in (folder / "rows.jsonl").read_text()
    assert line in mixmerge("show", study.recipe, "mixture/general", *arguments[1:])[1]


def test_a_prompt_that_only_the_exact_count_finds_too_long_is_refused_by_the_step(study, planned):
    """Planning counts with some slack."""
    path = study.folder / "data/general.en.jsonl"
    path.write_text(path.read_text() + json.dumps({"id": "long", "prompt": "é" * 125, "completion": "short"}) + "\n")
    plan = planned()
    told = "may have a prompt that alone fills max_length 256: the mixture step counts their tokens exactly"
    assert f"of the data set 'general' 1 row {told}" in plan.notes
    with pytest.raises(DataError) as caught:
        make(plan, study.out, "mixture/general")
    said = "the prompt alone fills max_length 256; raise training.max_length of 'general', or set bad_rows: drop"
    assert str(caught.value) == f"{path}:9: {said}"


def test_a_budget_in_tokens_counts_what_training_reads_of_a_row(study, planned):
    for code in ("en", "fr"):
        file = study.folder / f"data/general.{code}.jsonl"
        rows = [json.loads(line) | {"completion": "a long answer " * 100} for line in file.read_text().splitlines()]
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    folder = make(planned("budget={tokens: 512}", "training.max_length=64"), study.out, "mixture/general")
    manifest = json.loads((folder / "manifest.json").read_text())
    assert (manifest["rows"], manifest["tokens"]) == (8, 512)
