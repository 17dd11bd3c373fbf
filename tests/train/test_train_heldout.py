"""Held-out rows: which they are, that they are never trained on, and that learning shows on them."""

import json
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_train_dpo import answer_logps
from tiny_training import QUICK, metrics_of, run_child, same, tiny_model, train, weights, write_rows
from transformers import AutoModelForCausalLM, AutoTokenizer

from mixmerge.train.fit import read_mixture
from mixmerge.train.heldout import by_language, held_out_rows, nested
from mixmerge.train.settings import settings_from
from mixmerge.train.sft import train_sft

REAL = Path(__file__).parents[3] / "shared" / "data" / "general"

ROWS = st.lists(
    st.builds(
        lambda objective, lang, number: {"id": f"{lang}/{number}", "objective": objective, "lang": lang},
        st.sampled_from(["general", "safety"]),
        st.sampled_from(["en", "fr", "hi"]),
        st.integers(0, 30),
    ),
    max_size=80,
)


def key(row):
    return row["lang"], row["objective"], row["id"]


@given(ROWS, st.floats(0.01, 0.9), st.integers(0, 5))
def test_all_uses_of_a_row_are_held_out_together_and_every_language_keeps_some_on_either_side(rows, share, seed):
    held = held_out_rows(rows, share, seed)
    out = {key(row) for place, row in enumerate(rows) if place in held}
    kept = {key(row) for place, row in enumerate(rows) if place not in held}
    assert not out & kept
    for lang in {row["lang"] for row in rows}:
        distinct = {key(row) for row in rows if row["lang"] == lang}
        of_out = sum(which[0] == lang for which in out)
        assert of_out < len(distinct)
        assert abs(of_out - share * len(distinct)) <= 1 or of_out == 1
        assert of_out >= (len(distinct) > 1)


@given(ROWS, st.floats(0.01, 0.9), st.integers(0, 5), st.randoms(use_true_random=False))
def test_the_order_of_the_rows_plays_no_part_in_which_are_held_out(rows, share, seed, random):
    mixed = list(rows)
    random.shuffle(mixed)
    found = [
        {key(row) for place, row in enumerate(order) if place in held_out_rows(order, share, seed)}
        for order in (rows, mixed)
    ]
    assert found[0] == found[1]


def test_parallel_rows_are_held_out_in_all_languages_at_once():
    rows = [{"id": f"{lang}/{n}", "objective": "g", "lang": lang} for n in range(50) for lang in ("en", "fr", "hi")]
    held = held_out_rows(rows, 0.1, 0)
    numbers = Counter(rows[place]["id"].partition("/")[2] for place in held)
    assert len(numbers) == 5
    assert set(numbers.values()) == {3}
    assert held_out_rows(rows, 0.1, 1) != held
    assert held_out_rows(rows, 0.0, 0) == set()


def test_a_row_used_twice_is_read_once_when_it_is_held_out():
    rows = [{"id": "en/1", "objective": "g", "lang": "en"}] * 2 + [{"id": "fr/1", "objective": "g", "lang": "fr"}]
    assert by_language(rows, [0, 1, 2]) == {"en": rows[:1], "fr": rows[2:]}


def test_measures_of_the_log_are_told_by_language():
    entry = {"held_out/en/loss": 1.5, "held_out/en/margin": 0.1, "held_out/fr/loss": 2.0, "step": 0, "epoch": 0.0}
    assert nested(entry) == {"en": {"loss": 1.5, "margin": 0.1}, "fr": {"loss": 2.0}}
    assert nested({"loss": 1.0, "step": 1}) == {}


def two_languages(folder, *mixtures):
    """The mixtures' rows, the second's in French."""
    lines = []
    for lang, mixture in zip(("en", "fr"), mixtures, strict=True):
        for line in (mixture / "rows.jsonl").read_text().splitlines():
            row = json.loads(line)
            lines.append(json.dumps(row | {"lang": lang, "id": f"{lang}/{row['id'].partition('/')[2]}"}))
    made = write_rows(folder, [])
    (made / "rows.jsonl").write_text("\n".join(lines) + "\n")
    return made


@pytest.mark.parametrize("method", ["sft", "dpo"])
def test_held_out_rows_are_read_before_after_and_between_and_change_no_weight(method, llama, facts, choices, tmp_path):
    one = facts if method == "sft" else choices
    mixture = two_languages(tmp_path / "mix", one, one)
    settings = {"method": method, "held_out": 0.2, "epochs": 2}
    measured = train(llama, mixture, tmp_path / "one", **settings)
    lines = metrics_of(tmp_path / "one")
    shown = [line for line in lines if "held_out" in line]
    assert [line["step"] for line in shown] == [0, measured["steps"]]
    assert measured["held_out"] == {"rows": 10, "before": shown[0]["held_out"], "after": shown[1]["held_out"]}
    names = {"loss"} if method == "sft" else {"loss", "margin", "accuracy"}
    assert {lang: set(values) for lang, values in shown[0]["held_out"].items()} == {"en": names, "fr": names}
    assert measured["rows"] == 48
    assert measured["steps"] == -(-2 * 38 // 4)

    rows, _ = read_mixture(mixture)
    held = held_out_rows(rows, 0.2, 1)
    left = write_rows(tmp_path / "left", [])
    kept = [row for place, row in enumerate(rows) if place not in held]
    (left / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in kept))
    train(llama, left, tmp_path / "two", method=method, epochs=2)
    assert same(weights(tmp_path / "one"), weights(tmp_path / "two")), "as if the others had never been there"
    assert [line for line in lines if "loss" in line] == metrics_of(tmp_path / "two")


@pytest.mark.parametrize(("every", "steps"), [(2, [0, 2, 4, 5]), (5, [0, 5]), (9, [0, 5])])
def test_held_out_rows_are_read_between_as_often_as_asked_and_no_weight_changes(every, steps, llama, facts, tmp_path):
    settings = settings_from({**QUICK, "method": "sft", "held_out": 0.2})
    for name, asked in (("often", every), ("seldom", None)):
        place = {"work": tmp_path / name / "work", "threads": 1, "evaluate_every": asked}
        train_sft(llama, facts, tmp_path / name / "out", settings, **place)
    read = [line["step"] for line in metrics_of(tmp_path / "often") if "held_out" in line]
    assert read == steps
    assert same(weights(tmp_path / "often"), weights(tmp_path / "seldom"))
    losses = [[line for line in metrics_of(tmp_path / name) if "loss" in line] for name in ("often", "seldom")]
    assert [line["step"] for line in losses[0]] == [1, 2, 3, 4, 5], "no step's own line is lost"
    assert losses[0] == losses[1]


def test_the_loss_of_a_language_is_that_of_its_held_out_answers(llama, facts, tmp_path):
    mixture = two_languages(tmp_path / "mix", facts, facts)
    measured = train(llama, mixture, tmp_path, held_out=0.2, precision="fp32", save_dtype="float32")
    rows, _ = read_mixture(mixture)
    tokenizer = AutoTokenizer.from_pretrained(llama)
    for folder, said in ((llama, "before"), (tmp_path / "out", "after")):
        for lang, own in by_language(rows, held_out_rows(rows, 0.2, 1)).items():
            pairs = [row | {"rejected": row["completion"] + row["completion"]} for row in own]
            logps = answer_logps(folder, pairs, "chosen")
            tokens = sum(len(tokenizer(row["completion"][0]["content"] + "<|im_end|>\n")["input_ids"]) for row in own)
            assert measured["held_out"][said][lang]["loss"] == pytest.approx(-logps.sum() / tokens, rel=1e-4)


@pytest.mark.parametrize("method", ["sft", "dpo"])
def test_a_killed_training_reads_what_it_had_read_no_second_time(method, llama, facts, choices, tmp_path):
    mixture = facts if method == "sft" else choices
    settings = {"method": method, "held_out": 0.2, "epochs": 3}
    train(llama, mixture, tmp_path / "whole", None, 4, **settings)
    run_child(llama, mixture, tmp_path / "cut", 11, **settings)
    train(llama, mixture, tmp_path / "cut", None, 4, **settings)
    assert metrics_of(tmp_path / "whole") == metrics_of(tmp_path / "cut")
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "cut"))


# Learning on real data


def real_rows(file, count, longest):
    """Short rows of the shared data, so many a language; skips where they are not there."""
    path = REAL / file
    if not path.is_file():
        pytest.skip(f"the shared data ({file}) is not beside this checkout")
    found: dict[str, list[dict]] = {}
    with path.open(encoding="utf-8") as stream:
        for line in stream:
            row = json.loads(line)
            own = found.setdefault(row["lang"], [])
            if (
                len(own) < count
                and sum(len(row[k].encode()) for k in ("prompt", "chosen", "response", "rejected") if k in row)
                < longest
            ):
                own.append(row)
    return found


def write_real(folder, found):
    lines = []
    for lang, rows in found.items():
        for row in rows:
            line = {"id": f"{lang}/{row['id']}", "objective": "general", "lang": lang}
            line["prompt"] = [{"role": "user", "content": row["prompt"]}]
            line["completion"] = [{"role": "assistant", "content": row.get("chosen") or row["response"]}]
            if "rejected" in row:
                line["rejected"] = [{"role": "assistant", "content": row["rejected"]}]
            lines.append(json.dumps(line, ensure_ascii=False))
    folder.mkdir()
    (folder / "rows.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def reader(tmp_path_factory):
    """A random model with room for real rows in bytes."""
    return tiny_model(tmp_path_factory.mktemp("reader"), max_position_embeddings=1024, hidden_size=64)


def test_after_sft_on_real_rows_the_held_out_loss_of_every_language_falls(reader, tmp_path):
    mixture = write_real(tmp_path / "mix", real_rows("sft_train.jsonl", 40, 700))
    measured = train(
        reader, mixture, tmp_path, held_out=0.15, max_length=512, learning_rate=1e-2, batch_size=8, epochs=2
    )
    before, after = measured["held_out"]["before"], measured["held_out"]["after"]
    assert set(before) == {"ar", "en", "es", "fr", "hi", "ru"}
    for lang in before:
        assert after[lang]["loss"] < 0.8 * before[lang]["loss"], lang


def test_after_dpo_on_real_pairs_the_margin_rises_on_those_held_out(reader, tmp_path):
    found = real_rows("dpo_train.jsonl", 24, 1500)
    mixture = write_real(tmp_path / "mix", found)
    measured = train(
        reader,
        mixture,
        tmp_path,
        method="dpo",
        held_out=0.2,
        max_length=512,
        learning_rate=2e-3,
        batch_size=8,
        epochs=3,
    )
    before, after = measured["held_out"]["before"], measured["held_out"]["after"]
    assert measured["last_margin"] > measured["first_margin"] + 0.1
    assert all(abs(values["margin"]) < 0.05 for values in before.values())
    risen = [lang for lang in after if after[lang]["margin"] > before[lang]["margin"]]
    assert len(risen) >= 4, "of five held-out pairs a language, chance may keep some back"
    assert sum(values["margin"] for values in after.values()) / len(after) > 0.5
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.vocab_size == 416
