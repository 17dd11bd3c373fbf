"""Trainings of every kind, carried out as steps of a study by the real command line."""

from __future__ import annotations

import json

from safetensors.torch import load_file

CHAIN = """\
experts:
  general: {mixture: general}
  aligned: {mixture: safety, start: general, training: {method: dpo}}
  after: {mixture: safety, start: both, training: {method: dpo, beta: 0.5}}
merges:
  both: {method: linear, models: {general: {weight: 1}, aligned: {weight: 1}}}
"""
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
    text = study.recipe.read_text()
    study.recipe.write_text(text[: text.index("experts:")] + CHAIN + ONE_SET)
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
    rows = rows_of(study, "aligned")
    assert all(row["rejected"][0]["role"] == "assistant" for row in rows)
    assert not any("rejected" in row for row in rows_of(study, "general"))
