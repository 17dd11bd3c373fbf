"""A training example as `mixmerge show` prints it: the training's own tokens, safe to print."""

from __future__ import annotations

import json
import os
import pty
import subprocess
from pathlib import Path

import pytest
from test_mixture_step import make

from mixmerge.errors import UserError
from mixmerge.plan.build import build_plan
from mixmerge.recipe.load import load_recipe
from mixmerge.run.example import training_example
from mixmerge.run.record import sealed
from mixmerge.terminal import visible
from mixmerge.train.tokens import IGNORED, load_tokenizer, tokenise


def user(text):
    return {"role": "user", "content": text}


def mixture_of(folder: Path, *conversations) -> Path:
    """A folder with rows.jsonl; of each conversation the last turn is the answer."""
    folder.mkdir()
    rows = [
        {
            "id": f"en/{index}",
            "objective": "general",
            "lang": "en",
            "prompt": list(turns[:-1]),
            "completion": [{"role": "assistant", "content": turns[-1]}],
        }
        for index, turns in enumerate(conversations)
    ]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "rows.jsonl").write_text(text, encoding="utf-8")
    return folder


def parts(example):
    return [(part.text, part.trained) for part in example.parts]


def test_the_answer_and_its_end_are_marked_as_learned_and_nothing_else(tiny_base, tmp_path):
    folder = mixture_of(tmp_path / "m", [user("What?"), "That."])
    example = training_example(folder, tiny_base, row=1, max_length=None)
    assert parts(example) == [
        ("<|im_start|>user\nWhat?<|im_end|>\n<|im_start|>assistant\n", False),
        ("That.<|im_end|>\n", True),
    ]
    assert (example.row, example.id, example.truncated) == (1, "en/0", False)


def test_the_rejected_answer_of_a_pair_is_shown_as_well(tiny_base, tmp_path):
    folder = mixture_of(tmp_path / "m", [user("What?"), "That."])
    assert training_example(folder, tiny_base, row=1, max_length=None).rejected is None
    row = json.loads((folder / "rows.jsonl").read_text())
    row["rejected"] = [{"role": "assistant", "content": "No idea."}]
    (folder / "rows.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    example = training_example(folder, tiny_base, row=1, max_length=None)
    assert [text for text, trained in parts(example) if trained] == ["That.<|im_end|>\n"]
    assert example.rejected is not None
    assert (example.rejected.text, example.rejected.trained) == ("No idea.<|im_end|>\n", True)


def test_earlier_answers_are_shown_as_learned_only_where_all_turns_are(tiny_base, tmp_path):
    turns = [user("1"), {"role": "assistant", "content": "2"}, user("3"), "4"]
    folder = mixture_of(tmp_path / "m", turns)
    example = training_example(folder, tiny_base, row=1, max_length=None)
    assert [text for text, trained in parts(example) if trained] == ["4<|im_end|>\n"]
    example = training_example(folder, tiny_base, row=1, max_length=None, all_turns=True)
    assert [text for text, trained in parts(example) if trained] == ["2<|im_end|>\n", "4<|im_end|>\n"]


def test_the_counts_and_the_text_are_those_of_the_training(tiny_base, tmp_path):
    folder = mixture_of(tmp_path / "m", [user("Où est le café ? " * 5), "नमस्ते — là-bas. " * 5])
    row = json.loads((folder / "rows.jsonl").read_text())
    tokenizer = load_tokenizer(tiny_base)
    made = tokenise([row], tokenizer, 1000)
    example = training_example(folder, tiny_base, row=1, max_length=1000)
    assert example.tokens(trained=True) == sum(label != IGNORED for label in made.labels[0])
    assert example.tokens(trained=False) == sum(label == IGNORED for label in made.labels[0])
    assert "".join(text for text, _ in parts(example)) == tokenizer.decode(made.ids[0])


def test_a_row_cut_at_the_trainings_length_is_shown_cut(tiny_base, tmp_path):
    folder = mixture_of(tmp_path / "m", [user("q"), "word " * 50])
    example = training_example(folder, tiny_base, row=1, max_length=60)
    assert example.truncated
    assert sum(part.tokens for part in example.parts) == 60


def test_a_row_of_which_no_answer_is_left_has_no_parts(tiny_base, tmp_path):
    folder = mixture_of(tmp_path / "m", [user("word " * 50), "a"])
    assert training_example(folder, tiny_base, row=1, max_length=20).parts == ()


def test_a_character_that_is_cut_in_the_middle_of_its_bytes_is_shown_once(tiny_base, tmp_path):
    folder = mixture_of(tmp_path / "m", [user("q"), "語" * 30])
    whole = training_example(folder, tiny_base, row=1, max_length=None)
    for length in range(sum(p.tokens for p in whole.parts) - 8, sum(p.tokens for p in whole.parts)):
        text = training_example(folder, tiny_base, row=1, max_length=length).parts[-1].text
        assert text.rstrip("\ufffd").strip("語") in ("", "<|im_end|>", "<|im_end|>\n")


def test_any_row_can_be_shown_and_one_beyond_the_last_is_refused(tiny_base, tmp_path):
    folder = mixture_of(tmp_path / "m", [user("a"), "b"], [user("c"), "d"])
    assert training_example(folder, tiny_base, row=2, max_length=None).id == "en/1"
    with pytest.raises(UserError, match="--example 3: the mixture has 2 rows; give a number from 1 to 2"):
        training_example(folder, tiny_base, row=3, max_length=None)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain, déjà vu, हिन्दी, 中文, 🙂", "plain, déjà vu, हिन्दी, 中文, 🙂"),
        ("क्\u200dष می\u200cخواهم", "क्\u200dष می\u200cخواهم"),
        ("narrow\u202fspace\u00a0here", "narrow\u202fspace\u00a0here"),
        ("\x1b[31mred", "\\x1b[31mred"),
        ("back\rover", "back\\rover"),
        ("\x9b2J", "\\x9b2J"),
        ("\u202eesrever\u2066", "\\u202eesrever\\u2066"),
        ("a\u2028b", "a\\u2028b"),
        ("\ud800", "\\ud800"),
        ("\U000e0041", "\\U000e0041"),
    ],
)
def test_what_would_steer_a_terminal_is_shown_as_its_escape_and_spelling_is_left(text, shown):
    assert visible(text) == shown


def test_line_breaks_are_kept_only_where_that_is_asked():
    assert visible("a\n\tb") == "a\\n\\tb"
    assert visible("a\n\tb\x07", keep="\n\t") == "a\n\tb\\x07"


# The command


@pytest.fixture
def drawn(study):
    """The tiny study with its mixtures drawn; the first English answer carries an escape sequence."""
    path = study.folder / "data/general.en.jsonl"
    path.write_text(path.read_text().replace("It is blue.", "It is \\u001b[2Jblue.", 1))
    study.edit("budget: {rows: 8}", "budget: {rows: 16}")
    plan = build_plan(load_recipe(study.recipe))
    for name in ("general", "mix"):
        make(plan, study.out, f"mixture/{name}")
    return study


def test_show_says_that_a_mixture_is_not_drawn_yet(mixmerge, study):
    status, out, err = mixmerge("show", study.recipe, "mixture/mix", "--out", study.out)
    assert (status, err) == (0, "")
    assert out.endswith("example: the mixture is not drawn yet; mixmerge run RECIPE draws it\n")
    assert not study.out.exists()


def test_show_prints_the_first_row_of_a_mixture_with_the_learned_part_marked(mixmerge, drawn):
    status, out, err = mixmerge("show", drawn.recipe, "mixture/mix", "--out", drawn.out)
    assert (status, err) == (0, "")
    (mixture,) = drawn.store.glob("mixture/mix--*")
    first = json.loads((mixture / "rows.jsonl").read_text().splitlines()[0])
    answer = first["completion"][0]["content"]
    assert f"example: row 1, {first['id']}: " in out
    assert " tokens read, " in out
    assert f"{first['prompt'][0]['content']}<|im_end|>\n<|im_start|>assistant\n⟦" in out
    assert f"⟦{answer}<|im_end|>\n⟧" in out.replace("\\x1b", "\x1b")
    assert "data general: 16 rows (en 8, fr 8)" in out


def test_an_example_says_which_line_of_which_file_it_comes_from(mixmerge, drawn):
    out = mixmerge("show", drawn.recipe, "mixture/mix", "--example", "3", "--out", drawn.out)[1]
    (mixture,) = drawn.store.glob("mixture/mix--*")
    row = json.loads((mixture / "rows.jsonl").read_text(encoding="utf-8").splitlines()[2])
    file, line = next(
        (file, number)
        for file in sorted((drawn.folder / "data").iterdir())
        for number, text in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1)
        if file.name == f"{row['objective']}.{row['lang']}.jsonl" and json.loads(text)["id"] == row["id"][3:]
    )
    place = f"data/{file.name}:{line}"
    assert f"it comes from data set {row['objective']}, {place}\n" in out
    told = mixmerge("show", drawn.recipe, "mixture/mix", "--example", "3", "--json", "--out", drawn.out)[1]
    origin = json.loads(told)["example"]["origin"]
    assert (f"{origin['file']}:{origin['row']}", origin["data"], origin["turn"]) == (place, row["objective"], 0)


def test_a_mixture_of_an_older_mixmerge_has_examples_without_a_place(mixmerge, drawn):
    (folder,) = drawn.store.glob("mixture/mix--*")
    (folder / "origins.jsonl").unlink()
    record = json.loads((folder / "record.json").read_text())
    del record["files"]["origins.jsonl"]
    (folder / "record.json").write_text(json.dumps(sealed(record)))
    out = mixmerge("show", drawn.recipe, "mixture/mix", "--out", drawn.out)[1]
    assert "where it comes from was not recorded: an older mixmerge drew it\n" in out


def test_no_row_of_a_mixture_can_steer_the_terminal(mixmerge, drawn):
    shown = [
        mixmerge("show", drawn.recipe, "mixture/general", "--example", str(row), "--out", drawn.out)[1]
        for row in range(1, 17)
    ]
    assert all("\x1b" not in out for out in shown)
    assert sum("It is \\x1b[2Jblue." in out for out in shown) == 1


def test_an_example_in_json_has_its_parts_and_counts(mixmerge, drawn):
    out = mixmerge("show", drawn.recipe, "mixture/mix", "--example", "2", "--json", "--out", drawn.out)[1]
    example = json.loads(out)["example"]
    assert (example["row"], example["max_length"], example["truncated"]) == (2, 256, False)
    assert [part["trained"] for part in example["parts"]] == [False, True]
    assert all(part["tokens"] > 0 for part in example["parts"])


def test_an_example_that_cannot_be_shown_is_refused_in_one_line(mixmerge, drawn):
    status, out, err = mixmerge("show", drawn.recipe, "mixture/mix", "--example", "99", "--out", drawn.out)
    assert (status, out) == (2, "")
    assert err == "error: --example 99: the mixture has 16 rows; give a number from 1 to 16\n"
    status, out, err = mixmerge("show", drawn.recipe, "merge/ties", "--example", "1", "--out", drawn.out)
    assert (status, out) == (2, "")
    assert err == "error: --example: merge/ties is no mixture and no training; name one, as in mixture/NAME\n"


TALK = {"messages": [user("One?"), {"role": "assistant", "content": "Two."}, user("Three?")]}


def test_the_marks_are_those_of_the_training_that_reads_the_mixture(mixmerge, study):
    for code in ("en", "fr"):
        talk = [*TALK["messages"], {"role": "assistant", "content": f"Four {code}."}]
        path = study.folder / f"data/talk.{code}.jsonl"
        path.write_text("".join(json.dumps({"id": str(i), "messages": talk}) + "\n" for i in range(4)))
    study.edit('{objective: general, path: "data/general.', '{objective: general, path: "data/talk.')
    study.edit("  general: {mixture: general}", "  general: {mixture: general, training: {train_on: all}}")
    # another training of the same mixture learns otherwise, under its own name
    study.edit("baselines:\n", "  last: {mixture: general}\nbaselines:\n")
    study.edit("    mixture: {general: 0.5, safety: 0.5}", "    mixture: {safety: 1.0}")
    make(build_plan(load_recipe(study.recipe)), study.out, "mixture/general")
    all_turns, one_turn = ["Two.<|im_end|>\n", "Four"], ["Four"]
    for step, training, learned in (
        ("mixture/general", "train/general", all_turns),
        ("train/general", "train/general", all_turns),
        ("train/last", "train/last", one_turn),
    ):
        status, out, err = mixmerge("show", study.recipe, step, "--out", study.out)
        assert (status, err) == (0, "")
        assert f" tokens learned by {training}\n" in out
        assert [text[:4] for text in out.split("⟦")[1:]] == [text[:4] for text in learned]
    shown = json.loads(mixmerge("show", study.recipe, "train/last", "--json", "--out", study.out)[1])["example"]
    assert (shown["training"], [part["trained"] for part in shown["parts"]]) == ("train/last", [False, True])


def test_of_a_training_by_a_command_it_is_said_that_the_marks_are_its_own(mixmerge, study):
    command = "x {model} {mixture} {out} {max_length}"
    study.edit(
        "  general: {mixture: general}",
        f"  general: {{mixture: general, training: {{engine: command, max_length: 200, command: '{command}'}}}}",
    )
    make(build_plan(load_recipe(study.recipe)), study.out, "mixture/general")
    out = mixmerge("show", study.recipe, "mixture/general", "--out", study.out)[1]
    assert "the last answer is marked; what train/general learns of it is its command's choice\n" in out
    assert (
        json.loads(mixmerge("show", study.recipe, "mixture/general", "--json", "--out", study.out)[1])["example"][
            "max_length"
        ]
        == 200
    )


def test_on_a_terminal_the_learned_part_is_in_colour(drawn):
    master, slave = pty.openpty()
    done = subprocess.Popen(drawn.command("show", "mixture/mix"), stdout=slave, stderr=slave, stdin=slave)
    os.close(slave)
    text = b""
    try:
        while chunk := os.read(master, 4096):
            text += chunk
    except OSError:  # the other end is closed: that is how a terminal ends on Linux
        pass
    os.close(master)
    assert done.wait() == 0
    assert b"\x1b[1;32m" in text
    assert "⟦".encode() not in text
