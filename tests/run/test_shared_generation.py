"""Generation by several processes: the very bytes of one, whoever answers what, and after any of them was killed."""

from __future__ import annotations

import json
import re
import shutil

import pytest

from mixmerge.errors import CheckpointError, StepError, retold
from mixmerge.evaluate.engine import GenerationSettings
from mixmerge.evaluate.generate import generate
from mixmerge.evaluate.prompts import Prompt
from mixmerge.evaluate.shared import BATCHES, begin_shares, generate_share, join_shares
from mixmerge.evaluate.transformers_engine import TransformersEngine
from mixmerge.kept import sealed, unsealed

SETTINGS = GenerationSettings(max_new_tokens=6)
SAMPLED = GenerationSettings(max_new_tokens=6, temperature=1.0, seed=3)


@pytest.fixture(scope="module")
def engine(tiny_base) -> TransformersEngine:
    return TransformersEngine(tiny_base, threads=1, device="cpu", memory=1 << 30)


@pytest.fixture
def prompts() -> list[Prompt]:
    """Of many lengths; one is too long for the model."""
    texts = ["colour " * (at % 7 + 1) + str(at) for at in range(17)] + ["couleur " * 600]
    return [Prompt(f"s/p{at}/en", f"p{at}", "s", "en", "general", "test", text) for at, text in enumerate(texts)]


@pytest.mark.parametrize("settings", [SETTINGS, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("of", [1, 2, 3, 9])
def test_so_many_processes_write_the_bytes_of_one(engine, prompts, tmp_path, of, settings):
    alone = generate(engine, prompts, tmp_path / "alone.jsonl", settings, batch_size=4)
    told: list[tuple[int, int]] = []
    for number in reversed(range(of)):
        generate_share(
            engine,
            prompts,
            tmp_path,
            settings,
            number=number,
            of=of,
            batch_size=4,
            progress=lambda *at: told.append(at),
        )
    assert join_shares(tmp_path, tmp_path / "joined.jsonl") == alone
    assert (tmp_path / "joined.jsonl").read_bytes() == (tmp_path / "alone.jsonl").read_bytes()
    assert sum(done for done, total in told if done == total) >= len(prompts)


def test_what_is_answered_is_not_asked_again_also_by_another_number_of_processes(engine, prompts, tmp_path):
    generate_share(engine, prompts, tmp_path, SETTINGS, number=0, of=2, batch_size=4)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("batch-*")}
    with pytest.raises(CheckpointError, match="no process has answered this batch"):
        join_shares(tmp_path, tmp_path / "joined.jsonl")
    assert not (tmp_path / "joined.jsonl").exists()
    for number in range(3):  # and batches of another size are not cut any more
        generate_share(engine, prompts, tmp_path, SETTINGS, number=number, of=3, batch_size=1)
    assert before.items() <= {path: path.stat().st_mtime_ns for path in tmp_path.glob("batch-*")}.items()
    generate(engine, prompts, tmp_path / "alone.jsonl", SETTINGS, batch_size=4)
    join_shares(tmp_path, tmp_path / "joined.jsonl")
    assert (tmp_path / "joined.jsonl").read_bytes() == (tmp_path / "alone.jsonl").read_bytes()


def test_batches_of_other_prompts_are_refused_with_what_to_remove(engine, prompts, tmp_path):
    (tmp_path / BATCHES).write_text(sealed([3, 4]), encoding="utf-8")
    with pytest.raises(CheckpointError, match=f"not the batches of {len(prompts)} prompts"):
        generate_share(engine, prompts, tmp_path, SETTINGS, number=0, of=1)
    assert [path.name for path in tmp_path.iterdir()] == [BATCHES]


@pytest.mark.parametrize("damage", ["lost rows", "flipped", "that of the next"])
def test_a_batch_that_has_changed_is_found_when_all_are_joined_and_answered_again(
    engine, prompts, tmp_path, damage, caplog
):
    def share():
        generate_share(engine, prompts, tmp_path, SETTINGS, number=0, of=1, batch_size=4)

    share()
    (first,) = tmp_path.glob("batch-*-000000.json")
    whole = first.read_bytes()
    damaged = {
        "lost rows": whole.replace(b'{\\"', b"", 1),
        "flipped": whole[:199] + b"x" + whole[200:],
        "that of the next": next(tmp_path.glob("batch-*-000001.json")).read_bytes(),
    }
    first.write_bytes(damaged[damage])
    with pytest.raises(
        CheckpointError, match=r"batch-\w+-000000\.json: no process has answered this batch; run it again"
    ):
        join_shares(tmp_path, tmp_path / "joined.jsonl")
    assert caplog.messages == [f"{first} has changed since it was written: it is answered again"]
    share()
    assert first.read_bytes() == whole
    assert join_shares(tmp_path, tmp_path / "joined.jsonl")["rows"] == len(prompts)


@pytest.mark.parametrize("damage", ["flipped", "empty", "null", "cut"])
def test_where_nobody_can_tell_how_batches_were_cut_all_are_answered_again(engine, prompts, tmp_path, damage, caplog):
    def share(name="joined"):
        begin_shares(tmp_path)
        generate_share(engine, prompts, tmp_path, SETTINGS, number=0, of=1, batch_size=4)
        join_shares(tmp_path, tmp_path / name)

    share("whole")
    place = tmp_path / BATCHES
    told = place.read_bytes()
    place.write_bytes({"flipped": told.replace(b"[", b"z"), "empty": b"", "null": b"null", "cut": told[:9]}[damage])
    again = f"{place}: the file has changed since it was written; run it again, which begins anew"
    with pytest.raises(CheckpointError, match=re.escape(again)):
        generate_share(engine, prompts, tmp_path, SETTINGS, number=0, of=1, batch_size=4)
    share()
    assert (tmp_path / "joined").read_bytes() == (tmp_path / "whole").read_bytes()
    again = "the prompts are cut into batches again"
    assert caplog.messages == [f"{place} has changed since it was written: {again}"]


def test_batches_that_were_cut_otherwise_are_not_taken_for_those_of_a_new_cut(engine, prompts, tmp_path):
    for size, name in ((3, "first"), (4, "joined")):
        generate_share(engine, prompts, tmp_path, SETTINGS, number=0, of=1, batch_size=size)
        join_shares(tmp_path, tmp_path / name)
        (tmp_path / BATCHES).unlink()
    generate(engine, prompts, tmp_path / "alone", SETTINGS, batch_size=4)
    assert (tmp_path / "joined").read_bytes() == (tmp_path / "alone").read_bytes()


def test_batches_that_hold_too_few_rows_are_refused_when_they_are_joined(engine, prompts, tmp_path):
    generate_share(engine, prompts, tmp_path, SETTINGS, number=0, of=1, batch_size=4)
    (first,) = tmp_path.glob("batch-*-000000.json")
    name, rows = unsealed(first.read_bytes())
    first.write_text(sealed([name, rows.partition("\n")[2]]))
    with pytest.raises(CheckpointError, match=rf"{len(prompts) - 1} rows for {len(prompts)} prompts"):
        join_shares(tmp_path, tmp_path / "joined.jsonl")


def test_engines_beside_each_other_share_the_memory(tiny_base):
    alone, beside = (TransformersEngine(tiny_base, threads=1, device="cpu", beside=other) for other in (0, 3))
    assert beside._memory < 0.5 * alone._memory


def test_an_error_of_a_process_keeps_its_kind_and_a_bug_names_the_process():
    known = retold({"kind": "CheckpointError", "what": "torn", "where": "file", "do": "mend it"}, "process 1 of 2")
    assert (type(known), str(known)) == (CheckpointError, "file: torn; mend it")
    bug = retold({"kind": None, "what": "KeyError: 'x'"}, "process 1 of 2")
    assert (type(bug), str(bug)) == (StepError, "process 1 of 2: KeyError: 'x'; see the log")


@pytest.fixture
def again(finished, tmp_path):
    """The finished study without the answers of two candidates, to be given by two processes."""
    study = finished.copy(tmp_path / "copy")
    for name in ("base", "ties"):
        shutil.rmtree(next(study.store.glob(f"generate/{name}.general--*")))
    study.edit("how: {", "how: {generate_processes: 2, ")
    return study


def responses(study) -> dict[str, bytes]:
    return {path.parent.name: path.read_bytes() for path in study.store.glob("generate/*/responses.jsonl")}


def test_a_study_whose_generations_are_shared_has_the_same_ids_and_answers(again, finished, mixmerge):
    status, _, err = mixmerge("run", again.recipe, "--out", again.out, "--only", "generate/*.general")
    assert status == 0, err
    assert "2 to run" in err
    assert responses(again) == responses(finished.study)
    records = [json.loads(path.read_text()) for path in again.store.glob("generate/ties.general--*/record.json")]
    assert [record["how"]["processes"] for record in records] == [2]
    assert not list(again.store.rglob("batch*"))


def test_a_process_that_fails_is_told_as_one_process_would(again, mixmerge):
    (tokenizer,) = again.store.glob("merge/ties--*/tokenizer.json")
    size = tokenizer.stat().st_size
    tokenizer.write_bytes(b" " * size)  # the record knows sizes alone
    status, _, err = mixmerge("run", again.recipe, "--out", again.out, "--only", "generate/ties.general")
    assert status == 1
    assert "generate/ties.general  FAILED: " in err
    assert "without a word" not in err


def test_a_server_answers_alone_and_processes_beside_it_are_refused(study, mixmerge):
    study.edit("how: {", "how: {generate_processes: 2, ")
    study.edit(
        "max_new_tokens: 4", "max_new_tokens: 4\n  server: {url: 'http://127.0.0.1:1/v1', model: 'm-{candidate}'}"
    )
    status, _, err = mixmerge("check", study.recipe)
    assert status == 2
    assert "how.generate_processes: a server answers, which is asked everything at once; leave it out" in err
