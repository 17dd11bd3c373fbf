"""Held-out rows: which they are, that they are never trained on, and that learning shows on them."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_train_dpo import answer_logps
from tiny_training import QUICK, metrics_of, run_child, same, tiny_model, train, weights, write_rows
from transformers import AutoModelForCausalLM, AutoTokenizer

from mixmerge.data.loading import load_rows
from mixmerge.data.sources import DataSource
from mixmerge.errors import DataError
from mixmerge.train.fit import read_mixture
from mixmerge.train.heldout import by_language, held_out_rows, nested, prompt_fraction
from mixmerge.train.settings import settings_from
from mixmerge.train.sft import train_sft

REAL = Path(__file__).parents[3] / "shared" / "data" / "general"

HELD = 0.12  # of the 24 prompts of `facts` and of `choices`, five


def row(prompt, answer="yes", name="en/1", lang="en"):
    turns = prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]
    said = [{"role": "assistant", "content": answer}]
    return {"id": name, "objective": "g", "lang": lang, "prompt": turns, "completion": said}


def held_prompts(rows, share):
    """The prompts that are held out; none where there would be all or none."""
    try:
        return {rows[place]["prompt"][0]["content"] for place in held_out_rows(rows, share, "mix")}
    except DataError:
        return {one["prompt"][0]["content"] for one in rows if prompt_fraction(one["prompt"]) < share}


PROMPTS = st.lists(st.text(st.characters(codec="utf-8"), min_size=1, max_size=4), max_size=40)


@given(PROMPTS, PROMPTS, st.floats(0.01, 0.9), st.floats(0.01, 0.9))
def test_a_prompt_is_held_out_in_every_mixture_or_in_none_and_by_every_larger_share(one, two, share, other):
    first, second = (
        [row(prompt, name=f"{which}/{n}") for n, prompt in enumerate(found)]
        for which, found in (("a", one), ("b", two))
    )
    both = set(one) & set(two)
    assert held_prompts(first, share) & both == held_prompts(second, share) & both
    low, high = sorted((share, other))
    assert held_prompts(first, low) <= held_prompts(first, high)


def test_about_the_share_of_many_prompts_is_held_out():
    rows = [row(f"What is {n}?") for n in range(4000)]
    for share in (0.02, 0.1, 0.5):
        assert len(held_out_rows(rows, share, "mix")) / len(rows) == pytest.approx(share, abs=4 * (share / 4000) ** 0.5)
    assert held_out_rows(rows, 0.0, "mix") == set()


def test_what_has_the_prompt_of_a_held_out_row_is_held_out_whatever_its_id_answer_objective_and_white_space():
    rows = [row(f"What is {n}?") for n in range(50)]
    held = held_out_rows(rows, 0.2, "mix")
    copies = [
        row(f"  What  is\n{n}? ", "another answer", f"fr/{n + 7}", "fr") | {"objective": "safety"} for n in range(50)
    ]
    assert held_out_rows(rows + copies, 0.2, "mix") == held | {place + 50 for place in held}
    assert prompt_fraction(row("caf\u00e9")["prompt"]) == prompt_fraction(row("cafe\u0301")["prompt"])


def test_all_turns_of_a_prompt_and_who_says_them_decide():
    turns = [("user", "Hello"), ("assistant", "Hello, what do you want?"), ("user", "Why?")]
    whole = [{"role": role, "content": text} for role, text in turns]
    others = [whole[-1:], whole[::-1], [whole[0] | {"role": "system"}, *whole[1:]], [whole[0], whole[2]]]
    assert len({prompt_fraction(prompt) for prompt in (whole, *others)}) == 5


def test_a_share_that_holds_out_nothing_or_everything_is_refused_with_what_to_do(llama, facts, tmp_path):
    with pytest.raises(
        DataError, match=r"^training\.held_out: held_out 0\.05 holds out no row of 24.*; raise training\.held_out, or"
    ):
        train(llama, facts, tmp_path, held_out=0.05)
    with pytest.raises(DataError, match=r"held_out 0\.95 holds out every row of 24.*; lower training\.held_out"):
        train(llama, facts, tmp_path, held_out=0.95)
    assert not (tmp_path / "out").exists()


def test_a_row_used_twice_is_read_once_when_it_is_held_out():
    rows = [row("Why?"), row("Why?"), row("Why?", name="fr/1", lang="fr")]
    assert by_language(rows, [0, 1, 2]) == {"en": rows[:1], "fr": rows[2:]}


def test_rows_of_two_data_sets_that_share_an_id_are_all_read(tmp_path):
    for name in ("one", "two"):
        lines = [json.dumps({"prompt": f"{name}: what is {n}?", "response": f"{n}"}) for n in range(8)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    found = [load_rows(DataSource(path=f"{name}.jsonl"), ["en"], tmp_path).rows for name in ("one", "two")]
    assert [one.id for one in found[0]] == [two.id for two in found[1]], "rows without ids are numbered"
    rows = [row(item.prompt, item.completion, item.id) for item in (*found[0], *found[1])]
    assert by_language(rows, range(16)) == {"en": rows}
    answered_twice = [row("Why?", "yes"), row("Why?", "no")]
    assert by_language(answered_twice, [0, 1]) == {"en": answered_twice}


def test_languages_without_a_held_out_row_and_without_a_trained_one_are_named(llama, facts, tmp_path):
    lines = [json.loads(line) for line in (facts / "rows.jsonl").read_text().splitlines()]
    held = held_out_rows(lines, HELD, "facts")
    langs = {min(held): "hi", min(set(range(24)) - held): "fr"}
    lines = [one | {"lang": langs.get(place, "en")} for place, one in enumerate(lines)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(one) + "\n" for one in lines))
    told = train(llama, tmp_path, tmp_path / "made", held_out=HELD)["held_out"]
    assert (told["rows"], told["without"], told["untrained"]) == (5, ["fr"], ["hi"])
    assert set(told["before"]) == set(told["after"]) == {"en", "hi"}


def test_what_one_training_of_a_chain_holds_out_the_next_one_holds_out(llama, facts, choices):
    rows = {name: read_mixture(mixture)[0] for name, mixture in (("facts", facts), ("choices", choices))}
    prompts = [
        [found[place]["prompt"] for place in sorted(held_out_rows(found, HELD, "mix"))] for found in rows.values()
    ]
    assert prompts[0] == prompts[1]
    assert len(prompts[0]) == 5


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
    settings = {"method": method, "held_out": HELD, "epochs": 2}
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
    held = held_out_rows(rows, HELD, "mix")
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
    measured = train(llama, mixture, tmp_path, held_out=HELD, precision="fp32", save_dtype="float32")
    rows, _ = read_mixture(mixture)
    tokenizer = AutoTokenizer.from_pretrained(llama)
    for folder, said in ((llama, "before"), (tmp_path / "out", "after")):
        for lang, own in by_language(rows, held_out_rows(rows, HELD, "mix")).items():
            pairs = [row | {"rejected": row["completion"] + row["completion"]} for row in own]
            logps = answer_logps(folder, pairs, "chosen")
            tokens = sum(len(tokenizer(row["completion"][0]["content"] + "<|im_end|>\n")["input_ids"]) for row in own)
            assert measured["held_out"][said][lang]["loss"] == pytest.approx(-logps.sum() / tokens, rel=1e-4)


@pytest.mark.parametrize("method", ["sft", "dpo"])
def test_a_killed_training_reads_what_it_had_read_no_second_time(method, llama, facts, choices, tmp_path):
    mixture = facts if method == "sft" else choices
    settings = {"method": method, "held_out": HELD, "epochs": 3}
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
