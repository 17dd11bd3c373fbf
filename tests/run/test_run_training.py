"""Trainings of every kind, carried out as steps of a study by the real command line."""

from __future__ import annotations

import json
import shutil
import sys

from safetensors.torch import load_file

ONE_SET = """\
evaluation:
  prompts:
    general: {purpose: general, path: "prompts/general.{lang}.jsonl"}
  max_new_tokens: 4
statistics: {draws: 100}
how: {checkpoint_every: 1}
"""


def rows_of(study, name: str) -> list[dict]:
    """The mixture of a training."""
    text = next(study.store.glob(f"mixture/{name}--*/rows.jsonl")).read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def test_sft_then_dpo_and_sft_then_merge_then_dpo_run(study):
    study.chain_trainings(ONE_SET)
    ran = study.call("run")
    assert ran.returncode == 0, ran.stderr
    models = study.out / "runs" / "tiny" / "models"
    found = {name: load_file(models / name / "model.safetensors") for name in ("general", "aligned", "both", "after")}
    name = "model.layers.0.self_attn.q_proj.weight"
    for start, trained in (("general", "aligned"), ("both", "after")):
        assert not found[start][name].equal(found[trained][name])
    record = json.loads(next(study.store.glob("train/aligned--*/record.json")).read_text())
    assert record["measurements"]["first_margin"] == 0 != record["measurements"]["last_margin"]
    manifest = json.loads(next(study.store.glob("mixture/aligned--*/manifest.json")).read_text())
    assert record["measurements"]["tokens"] == manifest["tokens"], "both sides of a pair are counted alike"
    page = (study.out / "runs" / "tiny" / "report.html").read_text(encoding="utf-8")
    for said in ("Loss of general", "Loss of aligned", "Reward margin of aligned", "Reward margin of after"):
        assert f'aria-label="{said} over its steps"' in page
    assert "DPO from both, " in page
    assert (models / "aligned" / "metrics.jsonl").is_file(), "the page says that the metrics lie there"
    rows = rows_of(study, "aligned")
    assert all(row["rejected"][0]["role"] == "assistant" for row in rows)
    assert not any("rejected" in row for row in rows_of(study, "general"))


def test_a_training_that_was_killed_before_its_record_does_not_trip_over_the_links_to_its_start(study, own_base):
    tokenizer = own_base / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text().rstrip()[:-1] + " " * 1_300_000 + "}")  # large enough to be linked
    ran = study.call("run", "--only", "train/general")
    assert ran.returncode == 0, ran.stderr
    made = study.only("train/general--*")
    out = study.store / ".partial" / f"train-{made.name.partition('--')[2]}" / "out"
    weights, start = (made / "model.safetensors").read_bytes(), study.only("base/*") / "tokenizer.json"
    assert (made / "tokenizer.json").samefile(start), "or else there is nothing to trip over"
    out.parent.mkdir(parents=True)
    made.rename(out)
    (out / "record.json").unlink()
    again = study.call("run", "--only", "train/general")
    assert again.returncode == 0, again.stderr
    assert (made / "model.safetensors").read_bytes() == weights
    assert start.read_bytes() == (made / "tokenizer.json").read_bytes() == tokenizer.read_bytes()
    assert study.call("verify").returncode == 0


TRAINER = """
import json, sys
from pathlib import Path
from safetensors.torch import load_file, save_file
import shutil

model, mixture, out, work, rate = sys.argv[1:6]
print("the trainer was here", flush=True)
shutil.copytree(model, out, dirs_exist_ok=True)
Path(out, "record.json").unlink(missing_ok=True)
rows = [json.loads(line) for line in Path(mixture, "rows.jsonl").read_text().splitlines()]
weights = {name: tensor + float(rate) * len(rows) for name, tensor in load_file(Path(model, "model.safetensors")).items()}
Path(out, "model.safetensors").unlink()
save_file(weights, Path(out, "model.safetensors"), {"format": "pt"})
if not Path(work, "again").exists():
    Path(work, "again").touch()
    sys.exit("a first try that fails")
"""


def test_a_command_of_the_users_own_trains_is_logged_and_carries_on(study):
    script = study.folder / "own trainer.py"
    script.write_text(TRAINER)
    text = study.recipe.read_text()
    command = f"{{launcher}} '{script}' {{model}} {{mixture}} {{out}} {{work}} {{learning_rate}}"
    experts = f'experts: {{own: {{mixture: general, training: {{engine: command, command: "{command}"}}}}}}\n'
    head = text[: text.index("experts:")].replace("1.0e-3, batch_size: 2, max_length: 256, precision: fp32", "0.5")
    study.recipe.write_text(head + experts + ONE_SET.replace("checkpoint_every: 1", f"launcher: '{sys.executable} -u'"))
    first = study.call("run")
    assert first.returncode == 1
    assert "the command ended with status 1; see the log" in first.stdout + first.stderr
    log = next((study.out / "runs" / "tiny" / "logs").glob("train-own.log")).read_text()
    assert "the trainer was here" in log
    assert "a first try that fails" in log
    again = study.call("run")
    assert again.returncode == 0, again.stderr
    models = study.out / "runs" / "tiny" / "models"
    before, after = (load_file(models / name / "model.safetensors") for name in ("base", "own"))
    name = "model.layers.0.self_attn.q_proj.weight"
    assert after[name].equal(before[name] + 0.5 * 8)
    assert "No metrics of: own." in (study.out / "runs" / "tiny" / "report.html").read_text(encoding="utf-8")
    record = json.loads(next(study.store.glob("train/own--*/record.json")).read_text())
    assert record["measurements"]["rows"] == 8
    assert record["measurements"]["command"].startswith(f"{sys.executable} -u '{script}' ")


def test_a_study_trains_in_two_processes_and_what_was_trained_is_found_by_one(study):
    text = study.recipe.read_text()
    study.recipe.write_text(text[: text.index("experts:")] + "experts: {general: {mixture: general}}\n" + ONE_SET)
    ran = study.call("run", "--set", "how.processes=2", "--set", "how.fsdp=true")
    assert ran.returncode == 0, ran.stderr
    record = json.loads(next(study.store.glob("train/general--*/record.json")).read_text())
    assert (record["how"]["processes"], record["how"]["fsdp"]) == (2, True)
    assert not (study.store / ".tokens").exists(), "nothing is left to train on them"
    events = (study.out / "runs" / "tiny" / "events.jsonl").read_text()
    assert '"event": "failed"' not in events
    assert {"config.json", "metrics.jsonl", "model.safetensors", "tokenizer.json"} <= set(record["files"])
    again = study.call("plan")
    assert again.returncode == 0
    assert "train/general" in again.stdout
    assert all("done" in line for line in again.stdout.splitlines() if "train/general" in line)


def test_a_training_that_is_left_to_ray_is_not_started_without_it(finished, tmp_path, mixmerge):
    study = finished.copy(tmp_path / "copy")
    shutil.rmtree(study.store / "train")
    study.edit("how: {", "how: {nodes: 2, launcher: ray, ")
    status, _, err = mixmerge("run", study.recipe, "--out", study.out, "--only", "train/mix")
    assert status == 1
    assert "train/mix  FAILED: how.launcher: Ray starts nothing here; run with --backend ray" in err
