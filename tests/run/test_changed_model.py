"""A model that changes between the plan and the step that reads it never enters the store under the old content's id."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from mixmerge.errors import ModelError
from mixmerge.hashes import file_sha256
from mixmerge.plan.build import build_plan
from mixmerge.plan.graph import Plan
from mixmerge.recipe.load import load_recipe
from mixmerge.run.store import Store
from mixmerge.run.worker import carry_out

CHANGED = r"{}: the model has changed since the plan was made; run the same command again"


def quiet(event: str, **data: Any) -> None:
    """Events that nobody waits for."""


def change(file: Path) -> None:
    """Another last byte, and the same size, date and inode: still weights that can be read."""
    stat = file.stat()
    with file.open("r+b") as weights:
        weights.seek(-1, os.SEEK_END)
        last = weights.read(1)
        weights.seek(-1, os.SEEK_END)
        weights.write(bytes([last[0] ^ 1]))
    os.utime(file, ns=(stat.st_mtime_ns, stat.st_mtime_ns))
    assert file.stat().st_ino == stat.st_ino


@pytest.fixture
def planned(study) -> Callable[..., Plan]:
    def planned(*overrides: str) -> Plan:
        return build_plan(load_recipe(study.recipe, overrides))

    return planned


def make(plan: Plan, store: Store, title: str) -> Path:
    step = plan.find(title)
    carry_out(step, plan, store, {}, quiet)
    return store.path(step.id)


@pytest.mark.parametrize("how", ["", ", trim_vocab: 300", ", chat_template: chatml"])
def test_a_base_that_changes_after_the_plan_is_refused_and_the_old_one_is_still_to_be_made(
    study, own_base, planned, how
):
    plan, store = planned(f"base={{path: ./base{how}}}"), Store(study.out)
    change(own_base / "model.safetensors")
    with pytest.raises(ModelError, match=CHANGED.format(own_base)):
        make(plan, store, "base/base")
    assert store.find(plan.find("base/base").id) is None
    assert not list(study.store.glob("base/*"))
    change(own_base / "model.safetensors")
    made = make(plan, store, "base/base")
    if "trim" not in how:
        assert file_sha256(made / "model.safetensors") == file_sha256(own_base / "model.safetensors")


@pytest.mark.parametrize("file", ["config.json", "tokenizer.json"])
def test_a_base_whose_settings_change_after_the_plan_is_refused_too(study, own_base, planned, file):
    plan, store = planned(), Store(study.out)
    (own_base / file).write_text((own_base / file).read_text(encoding="utf-8") + "\n", encoding="utf-8")
    with pytest.raises(ModelError, match=CHANGED.format(own_base)):
        make(plan, store, "base/base")
    assert store.find(plan.find("base/base").id) is None


def test_a_plan_that_is_made_again_takes_the_changed_base_as_another_one(study, own_base, planned):
    plan, store = planned(), Store(study.out)
    change(own_base / "model.safetensors")
    with pytest.raises(ModelError, match="has changed since the plan"):
        make(plan, store, "base/base")
    again = planned()
    assert again.find("base/base").id != plan.find("base/base").id
    made = make(again, store, "base/base")
    assert file_sha256(made / "model.safetensors") == file_sha256(own_base / "model.safetensors")


@pytest.mark.parametrize("kind", ["model", "adapter"])
def test_what_is_adopted_and_changes_after_the_plan_is_refused(study, planned, kind):
    expert = study.folder / "expert"
    if kind == "model":
        shutil.copytree(study.folder / "base", expert)
    else:
        config = LoraConfig(r=2, target_modules=["q_proj"])
        get_peft_model(AutoModelForCausalLM.from_pretrained(study.folder / "base"), config).save_pretrained(expert)
    plan, store = planned("adopted.mine={path: ./expert}"), Store(study.out)
    make(plan, store, "base/base")
    weights = next(expert.glob("*.safetensors"))
    change(weights)
    with pytest.raises(ModelError, match=CHANGED.format(expert)):
        make(plan, store, "adopt/mine")
    assert store.find(plan.find("adopt/mine").id) is None
    change(weights)
    assert make(plan, store, "adopt/mine").is_dir()
