"""Finished steps that were damaged later: noticed, said in one line, made again; never a traceback."""

from __future__ import annotations

import dataclasses
import io
import shutil
from pathlib import Path

import pytest
from rich.console import Console

from mixmerge.plan.explain import explain
from mixmerge.run.progress import Progress
from mixmerge.run.runner import run_plan
from mixmerge.run.store import Store


class Heard(Progress):
    """Progress that keeps what it says."""

    def __init__(self) -> None:
        super().__init__(Console(file=io.StringIO(), width=300))

    @property
    def text(self) -> str:
        return str(self.console.file.getvalue())


def carry_out(plan, root):
    heard = Heard()
    return run_plan(plan, root, jobs=1, threads=1, progress=heard), heard.text


@pytest.fixture
def made(chain, tmp_path):
    """The chain, carried out: base -> one, two -> both, three."""
    assert len(carry_out(chain, tmp_path)[0].done) == 5
    return Store(tmp_path)


def weights(store: Store, plan, name: str) -> Path:
    return store.path(next(step.id for step in plan.steps if step.name == name)) / "model.safetensors"


def test_a_step_that_lost_a_part_of_a_file_is_not_done_and_is_made_again(made, chain, tmp_path):
    file = weights(made, chain, "two")
    whole = file.read_bytes()
    file.unlink()  # not in place: weights may be hard links
    file.write_bytes(whole[:-10])
    made.refresh()
    damage = f"model.safetensors has {len(whole) - 10} bytes, its record says {len(whole)}"
    entry = next(entry for entry in explain(chain, made) if entry.step.name == "two")
    assert (entry.state, entry.why) == ("to run", (f"damaged: {damage}",))
    outcome, said = carry_out(chain, tmp_path)
    assert [chain.by_id[i].name for i in outcome.done] == ["two"]
    assert f"damaged, made again: merge/two: {damage}\n" in said
    assert file.read_bytes() == whole


def test_a_lost_file_and_a_broken_record_are_damage_too(made, chain, tmp_path):
    weights(made, chain, "one").unlink()
    (weights(made, chain, "three").parent / "record.json").write_text("{")
    made.refresh()
    assert made.damage(chain.models["one"]) == "model.safetensors is missing"
    assert made.damage(chain.models["three"]) == "record.json cannot be read"
    assert made.find(chain.models["one"]) is None
    outcome, _ = carry_out(chain, tmp_path)
    assert {chain.by_id[i].name for i in outcome.done} == {"one", "three"}
    assert outcome.failed == {}


def test_a_damaged_step_under_an_old_name_is_replaced(made, chain, tmp_path):
    folder = weights(made, chain, "two").parent
    shutil.move(folder, folder.with_name(folder.name.replace("two", "deux")))
    weights(Store(tmp_path), chain, "two").unlink()
    carry_out(chain, tmp_path)
    assert [p.name for p in folder.parent.glob(f"*--{chain.models['two']}")] == [folder.name]


def test_a_file_found_damaged_while_it_is_read_names_the_folder_to_remove(made, chain, tmp_path, helpers):
    file = weights(made, chain, "one")
    data = bytearray(file.read_bytes())
    data[8:40] = b"\xff" * 32  # of the same size
    file.unlink()
    file.write_bytes(data)
    more = helpers.merge("more", chain.models["one"])
    plan = dataclasses.replace(chain, steps=(*chain.steps, more))
    outcome, _ = carry_out(plan, tmp_path)
    assert list(outcome.failed) == [more.id]
    assert f"remove the folder {file.parent} and run the same command again" in outcome.failed[more.id]
    assert not outcome.bug
    shutil.rmtree(file.parent)
    outcome, _ = carry_out(plan, tmp_path)
    assert {plan.by_id[i].name for i in outcome.done} == {"one", "more"}


# A whole study


@pytest.fixture
def copy(finished, tmp_path):
    return finished.copy(tmp_path / "study")


def only(study, pattern: str) -> Path:
    (found,) = study.store.glob(pattern)
    return found


def test_every_kind_of_damage_of_a_finished_study_is_mended_by_the_same_command(finished, copy):
    only(copy, "score/*/scores.json").write_text("{\n")
    only(copy, "report/*/report.html").unlink()
    only(copy, "generate/base.general--*/responses.jsonl").write_text('{"half": ')
    only(copy, "judge/mix.general.quality--*/verdicts.jsonl").unlink()
    asked = copy.call("report")
    assert asked.returncode == 2
    assert asked.stderr.startswith("error: tiny: score/tiny is damaged: scores.json has 2 bytes, its record says ")
    planned = copy.call("plan", "--why").stdout
    assert "damaged: report.html is missing" in planned
    assert planned.endswith("32 steps: 28 done, 4 to run\n")
    ran = copy.call("run")
    assert ran.returncode == 0, ran.stderr
    assert ran.stderr.count("damaged, made again: ") == 4
    assert ran.stdout.splitlines()[:-1] == finished.printed.splitlines()[:-1]


def test_scores_that_are_no_json_name_their_folder_and_its_removal_mends_it(copy):
    file = only(copy, "score/*/scores.json")
    file.write_bytes(b"{" + b" " * (file.stat().st_size - 1))
    for command in ("run", "report"):
        asked = copy.call(command)
        assert asked.returncode == 1, asked.stderr
        assert f"{file}: the file is damaged: " in asked.stderr
        assert f"; remove the folder {file.parent} and run the same command again" in asked.stderr
        assert "Traceback" not in asked.stderr
    shutil.rmtree(file.parent)
    assert copy.call("run").returncode == 0


@pytest.mark.parametrize("kind", ["base that has no tokenizer", "base that is no model"])
def test_a_base_that_breaks_after_it_was_checked_fails_in_one_line_and_is_not_done(base_step, tmp_path, kind):
    from mixmerge.plan.graph import Plan

    base = tmp_path / "base"
    shutil.copytree(base_step.how["path"], base)
    broken = base / ("tokenizer.json" if "tokenizer" in kind else "config.json")
    broken.write_text("{}")
    step = dataclasses.replace(base_step, how={"path": str(base)})
    outcome, said = carry_out(Plan("broken", (step,), {"base": step.id}), tmp_path / "out")
    (error,) = outcome.failed.values()
    assert str(broken) in error
    assert not outcome.bug
    assert ".partial" not in said
    assert Store(tmp_path / "out").find(step.id) is None
