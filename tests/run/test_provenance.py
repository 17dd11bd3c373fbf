"""Provenance: each record says how, of what, where and with how much work its step was made."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from mixmerge.cli.printing import print_provenance
from mixmerge.plan.graph import Plan
from mixmerge.run.progress import Progress
from mixmerge.run.provenance import Meter, git_state, gpu_names, invocation, machine, own_git, seeds
from mixmerge.run.runner import run_plan
from mixmerge.run.store import Store

LINUX = pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux's")
GIT = [
    "git",
    "-c",
    "user.name=a",
    "-c",
    "user.email=a@b",
    "-c",
    "init.defaultBranch=main",
    "-c",
    "commit.gpgsign=false",
]


def git(folder: Path, *words: str) -> str:
    return subprocess.run([*GIT, *words], cwd=folder, check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture
def repository(tmp_path):
    """A repository with a recipe in a folder below it, committed."""
    folder = tmp_path / "repository" / "studies"
    folder.mkdir(parents=True)
    (folder / "recipe.yaml").write_text("name: x\n")
    (folder.parent / "notes.txt").write_text("x\n")
    git(folder.parent, "init", "-q")
    git(folder.parent, "add", ".")
    git(folder.parent, "commit", "-q", "-m", "first")
    return folder


# The records of a whole study


def test_every_record_of_a_study_says_where_it_comes_from(finished):
    study = finished.study
    for name, path in study.records().items():
        told = json.loads(path.read_text())["provenance"]
        assert told["argv"][1:] == ["run", str(study.recipe), "--out", str(study.out)], name
        assert told["recipe"] == str(study.recipe)
        assert {"folder", "git", "host", "machine", "cores", "gpus", "python", "versions", "seeds"} <= told.keys()
        assert told["seconds"] >= 0
        assert told["peak_rss_mb"] > 10
    training = json.loads(next(study.store.glob("train/mix--*/record.json")).read_text())["provenance"]
    assert training["seeds"]["seed"] == 0


@LINUX
def test_a_training_wrote_at_least_the_bytes_of_its_model(finished):
    (path,) = finished.study.store.glob("train/mix--*/record.json")
    record = json.loads(path.read_text())
    assert record["provenance"]["bytes_written"] >= record["files"]["model.safetensors"]
    assert record["provenance"]["bytes_read"] > 0
    assert record["provenance"]["disk_bytes_read"] >= 0


def test_show_prints_the_provenance_and_the_hashes_for_people(finished, mixmerge):
    study = finished.study
    status, out, _ = mixmerge("show", study.recipe, "train/mix", "--out", study.out)
    record = json.loads(mixmerge("show", study.recipe, "train/mix", "--out", study.out, "--json")[1])["record"]
    assert status == 0
    for words in (
        f"run {study.recipe} --out {study.out}\n",
        "  git: in no repository\n",
        "  gpus: none\n" if not record["provenance"]["gpus"] else "  gpus: ",
        "  versions: mixmerge 0.1.0, torch ",
        "  seeds: seed 0\n",
        f"bytes, sha256 {record['sha256']['model.safetensors'][:16]}\n",
        "  peak_rss_mb: ",
    ):
        assert words in out, words


def test_a_record_of_an_older_mixmerge_is_shown_with_what_it_has(finished, mixmerge, tmp_path):
    study = finished.copy(tmp_path / "study")
    (path,) = study.store.glob("merge/ties--*/record.json")
    record = json.loads(path.read_text())
    del record["sha256"], record["seal"]
    record["provenance"] = {"seconds": 1.5, "versions": {"torch": "1"}}
    path.write_text(json.dumps(record))
    status, out, err = mixmerge("show", study.recipe, "merge/ties", "--out", study.out)
    assert (status, err) == (0, "")
    assert "provenance:\n  seconds: 1.5\n  versions: torch 1\nfiles:\n" in out


def test_the_commit_of_the_recipe_is_in_the_records_of_its_run(base_step, repository, tmp_path):
    plan = Plan("one", (base_step,), {"base": base_step.id}, called={"recipe": str(repository / "recipe.yaml")})
    run_plan(plan, tmp_path / "out", jobs=1, threads=1, progress=Progress()).check()
    told = Store(tmp_path / "out").record(base_step.id)["provenance"]
    assert told["git"] == {"commit": git(repository, "rev-parse", "HEAD"), "dirty": False}
    assert told["argv"] == sys.argv
    assert told["seeds"] == {}


# Git


def test_a_change_that_is_not_committed_makes_the_folder_dirty(repository):
    recipe, commit = repository / "recipe.yaml", git(repository, "rev-parse", "HEAD")
    assert git_state(recipe) == {"commit": commit, "dirty": False}
    (repository / "mixmerge-out").mkdir()
    (repository / "mixmerge-out" / "x").write_text("an output")
    assert git_state(recipe) == {"commit": commit, "dirty": False}
    (repository.parent / "notes.txt").write_text("y\n")
    assert git_state(recipe) == {"commit": commit, "dirty": True}
    git(repository.parent, "commit", "-qam", "second")
    later = git_state(recipe)
    assert (later["dirty"], later["commit"] != commit) == (False, True)


def test_mixmerge_tells_its_own_commit_where_it_runs_from_a_checkout(repository):
    package = repository / "package"
    package.mkdir()
    module = package / "module.py"
    module.write_text("x = 1\n")
    assert own_git(module) is None, "installed beside something that is in a repository"
    git(repository, "add", "package")
    git(repository, "commit", "-qm", "package")
    assert own_git(module) == {"commit": git(repository, "rev-parse", "HEAD"), "dirty": False}
    module.write_text("x = 2\n")
    assert own_git(module)["dirty"] is True


@pytest.mark.parametrize(
    ("text", "driver"),
    [
        ("NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15  Tue Mar  5 22:23:56 UTC 2024\n", "550.54.15"),
        ("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.86.15  Release Build  (x)\n", "570.86.15"),
        ("something else\n", None),
        (None, None),
    ],
)
def test_the_driver_of_the_machine_is_told_where_there_is_one(tmp_path, monkeypatch, text, driver):
    file = tmp_path / "version"
    if text is not None:
        file.write_text(text)
    monkeypatch.setattr("mixmerge.run.provenance.DRIVER", file)
    assert machine()["versions"].get("NVIDIA driver") == driver


def test_the_versions_name_what_trains_reads_data_and_scores_and_the_cuda_of_torch():
    import torch

    told = machine()["versions"]
    assert {"peft", "accelerate", "datasets", "scikit-learn", "lm-eval"} <= told.keys()
    assert told["peft"] == metadata.version("peft")
    assert told.get("CUDA") == torch.version.cuda


def test_a_recipe_that_git_does_not_know_is_dirty(repository):
    (repository / "new.yaml").write_text("name: y\n")
    assert git_state(repository / "new.yaml")["dirty"] is True
    assert git_state(repository / "recipe.yaml")["dirty"] is False


def test_outside_of_a_repository_without_commits_and_without_git_there_is_no_commit(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "plain"
    folder.mkdir()
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))
    assert git_state(folder / "recipe.yaml") is None
    git(folder, "init", "-q")
    told = git_state(folder / "recipe.yaml")
    assert told == {"commit": None, "why": "fatal: Needed a single revision"}
    assert git_state(tmp_path / "nowhere" / "recipe.yaml")["commit"] is None
    monkeypatch.setenv("PATH", str(folder))
    assert git_state(folder / "recipe.yaml") == {"commit": None, "why": "git is not installed"}
    print_provenance({"git": told})
    assert capsys.readouterr().out == "provenance:\n  git: not known: fatal: Needed a single revision\n"


def test_asking_git_changes_no_file_and_runs_no_program_of_the_repository(repository):
    program = repository / "run-me"
    program.write_text(f"#!/bin/sh\ntouch {repository}/was-run\n")
    program.chmod(0o755)
    git(repository, "config", "core.fsmonitor", str(program))
    os.utime(repository.parent / "notes.txt", (1, 1))  # what `git status` would write into its index
    before = (repository.parent / ".git/index").read_bytes()
    git_state(repository / "recipe.yaml")
    assert (repository.parent / ".git/index").read_bytes() == before
    assert not (repository / "was-run").exists()


def test_a_plan_without_a_recipe_says_how_the_process_was_called():
    told = invocation("")
    told.pop("mixmerge_git", None)
    assert told == {"argv": sys.argv, "folder": str(Path.cwd())}


# Measuring


@LINUX
def test_the_peak_is_that_of_the_step_and_not_of_what_was_done_before():
    code = (
        "from mixmerge.run.provenance import Meter\nimport json\n"
        "first = Meter()\nblock = bytearray(b'x') * (200 << 20)\ndel block\nlarge = first.read()\n"
        "second = Meter()\nsmall = second.read()\nprint(json.dumps([large['peak_rss_mb'], small['peak_rss_mb']]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    large, small = json.loads(done.stdout)
    assert large > 200
    assert small < large - 150


@LINUX
def test_bytes_are_counted_from_when_the_meter_was_made_also_those_of_processes(tmp_path):
    (tmp_path / "before").write_bytes(bytes(1 << 20))
    meter = Meter()
    (tmp_path / "now").write_bytes(bytes(300_000))
    (tmp_path / "now").read_bytes()
    held = (resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss << 10) + 10_000_000  # more than any before
    child = f"open({str(tmp_path / 'child')!r}, 'wb').write(bytes(500_000)); b'x'.ljust({held}, b'y')"
    subprocess.run([sys.executable, "-c", child], check=True)
    took = meter.read()
    assert 800_000 <= took["bytes_written"] < 1 << 20
    assert took["bytes_read"] >= 300_000
    assert took["peak_rss_of_a_child_mb"] > held / 2**20
    assert "peak_rss_of_a_child_mb" not in Meter().read(), "it was that of an earlier step"


def test_seeds_are_found_wherever_they_stand_and_nothing_else_is():
    what = {
        "seed": 3,
        "config": {"data_seed": 4, "seeds": [1], "models": [{"seed": 5}]},
        "seedling": 6,
        "x": {"seed": "no"},
    }
    assert seeds(what) == {"seed": 3, "config.data_seed": 4, "config.models.0.seed": 5}


def test_a_machine_tells_its_name_its_versions_and_its_accelerators():
    told = machine()
    assert told["versions"]["mixmerge"] == "0.1.0"
    assert told["gpus"] == gpu_names()
    assert json.loads(json.dumps(told)) == told


def test_accelerators_of_the_driver_are_named_where_torch_uses_none(tmp_path, monkeypatch):
    from mixmerge import machine as this

    for number, name in enumerate(("NVIDIA H200", "NVIDIA A100-SXM4-80GB")):
        (tmp_path / f"0000:0{number}:00.0").mkdir()
        told = f"Model: \t\t {name}\nIRQ:   \t\t 77\nGPU UUID: \t GPU-x\n"
        (tmp_path / f"0000:0{number}:00.0" / "information").write_text(told)
    monkeypatch.setattr(this, "DRIVER", tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))  # no nvidia-smi
    this.gpu_models.cache_clear()
    try:
        assert gpu_names() == ["NVIDIA H200", "NVIDIA A100-SXM4-80GB"]
    finally:
        this.gpu_models.cache_clear()
