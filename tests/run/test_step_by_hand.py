"""`mixmerge step`: a launcher of one's own, which knows no more than the plan's ids."""

from __future__ import annotations

import json
import shutil
import subprocess


def test_steps_that_are_carried_out_by_hand_are_those_of_a_run(finished, tmp_path, mixmerge):
    study = finished.copy(tmp_path / "copy")
    for kind in ("merge", "score", "report"):
        shutil.rmtree(study.store / kind)
    page, table = (study.out / "runs" / "tiny" / name for name in ("report.html", "scores.csv"))
    page.unlink()
    table.unlink()
    for title in ("merge/ties", "score/tiny", "report/tiny"):
        assert mixmerge("step", study.recipe, title, "--out", study.out)[0] == 0
    assert study.records().keys() == finished.study.records().keys()
    assert study.scores() == finished.study.scores()
    assert page.read_bytes() == next(study.store.glob("report/*/report.html")).read_bytes()
    assert table.is_file()


def test_a_step_is_named_with_its_folder_and_done_once(study, mixmerge):
    status, out, err = mixmerge("step", study.recipe, "base/base", "--out", study.out)
    assert status == 0, err
    folder = out.splitlines()[1].split()[1]
    assert folder.startswith(str(study.store / "base" / "base--"))
    before = study.finished()
    status, out, err = mixmerge("step", study.recipe, "base/base", "--out", study.out, "--json")
    assert (status, json.loads(out)) == (0, {"steps": {"base/base": folder}})
    assert "1 already there, 0 to run" in err
    assert study.finished() == before


def test_a_step_whose_inputs_are_not_done_is_refused_with_the_first_of_them(study, mixmerge):
    status, out, err = mixmerge("step", study.recipe, "train/general", "--out", study.out)
    assert (status, out) == (2, "")
    assert err == "error: train/general: it needs base/base, which is not done; carry out base/base first\n"


def test_a_step_that_nobody_knows_is_refused_with_what_was_meant(study, mixmerge):
    status, _, err = mixmerge("step", study.recipe, "trian/general", "--out", study.out)
    assert status == 2
    assert "no step 'trian/general' in this study; did you mean 'train/general'?" in err


def test_two_launchers_at_one_step_do_it_once(study, mixmerge):
    assert mixmerge("step", study.recipe, "base/base", "--out", study.out)[0] == 0
    command = study.command("step", "mixture/general")
    both = [subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) for _ in range(2)]
    assert [one.wait(120) for one in both] == [0, 0]
    for one in both:
        one.stderr.close()
    events = (study.out / "runs" / "tiny" / "events.jsonl").read_text().splitlines()
    mixture = next(name.partition("--")[2] for name in study.records() if name.startswith("mixture/general--"))
    started = [e for e in map(json.loads, events) if e["event"] == "start" and e["step"] == mixture]
    assert len(started) == 1
