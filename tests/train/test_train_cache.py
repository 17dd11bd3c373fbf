"""Tokenised rows are made once for all that train on the same, and never taken for those of something else."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable

import numpy as np
import pytest
from tiny_training import FACTS, metrics_of, same, tiny_model, tiny_tokenizer, train, weights

from mixmerge.kept import keep, kept
from mixmerge.train.cache import kept_tokens
from mixmerge.train.tokens import Tokenised, TokenisedPairs, tokenise, tokenise_pairs

ROWS = [
    {
        "prompt": [{"role": "user", "content": prompt}],
        "completion": [{"role": "assistant", "content": answer}],
        "rejected": [{"role": "assistant", "content": "no"}],
    }
    for prompt, answer in [*FACTS, ("long " * 60, "never seen"), ("the same", "no")]
]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def asked(tmp_path, model) -> Callable[..., tuple[Tokenised | TokenisedPairs, bool]]:
    """Ask for the tokens of ROWS, and say whether they had to be made."""

    def ask(told=("rows", 1), *, kind=Tokenised, of=None):
        made = []

        def make():
            made.append(True)
            return (tokenise if kind is Tokenised else tokenise_pairs)(ROWS, tiny_tokenizer(), 40)

        return kept_tokens(tmp_path / "cache", of or model, told, kind, make), bool(made)

    return ask


@pytest.mark.parametrize("kind", [Tokenised, TokenisedPairs])
def test_what_is_read_is_what_was_made(asked, kind):
    (made, first), (read, second) = asked(kind=kind), asked(kind=kind)
    assert (first, second) == (True, False)
    for name in kind.columns:
        one, two = getattr(made, name), getattr(read, name)
        assert len(one) == len(two) == (5 if kind is Tokenised else 4)
        assert all(np.array_equal(a, b) and b.dtype == np.int32 for a, b in zip(one, two, strict=True))
    assert (made.kept, made.truncated, made.dropped, made.diverging) == (
        *(read.kept, read.truncated, read.dropped, read.diverging),
    )
    assert read.dropped == (1 if kind is Tokenised else 2)
    assert made.lengths == read.lengths
    order = [2, 0, len(read.kept)]
    assert made.dataset(order).to_list() == read.dataset(order).to_list()


def test_other_rows_another_kind_or_another_tokenizer_are_made_for_themselves(asked, model, tmp_path):
    assert asked(("rows", 1))[1]
    assert asked(("rows", 2))[1]
    assert asked(("rows", 1), kind=TokenisedPairs)[1]
    other = shutil.copytree(model, tmp_path / "other")
    assert not asked(of=other)[1], "the same tokenizer of another model"
    settings = json.loads((other / "tokenizer_config.json").read_text())
    (other / "tokenizer_config.json").write_text(json.dumps(settings | {"bos_token": "<eos>"}))
    assert asked(of=other)[1]
    (other / "chat_template.jinja").write_text("{{ messages[0].content }}")
    assert asked(of=other)[1]


@pytest.mark.parametrize("damage", ["empty", "cut", "noise"])
def test_a_damaged_file_is_made_anew(asked, tmp_path, damage):
    asked()
    (file,) = (tmp_path / "cache").iterdir()
    whole = file.read_bytes()
    file.write_bytes({"empty": b"", "cut": whole[: len(whole) // 2], "noise": b"noise" * 99}[damage])
    assert asked()[1]
    assert not asked()[1]
    assert [f.name for f in (tmp_path / "cache").iterdir()] == [file.name]


def test_a_file_in_which_a_bit_has_flipped_anywhere_is_made_anew_and_named(asked, tmp_path, caplog):
    asked()
    (file,) = (tmp_path / "cache").iterdir()
    whole = file.read_bytes()
    for place in range(0, len(whole), 97):
        flipped = bytearray(whole)
        flipped[place] ^= 1 << place % 8
        file.write_bytes(flipped)
        assert asked()[1], place
        assert file.read_bytes() == whole
    assert set(caplog.messages) == {f"{file} has changed since it was written: it is made again"}


def test_a_folder_that_a_run_which_ended_throws_away_costs_the_tokens_alone(asked, tmp_path, monkeypatch):
    asked()
    found = kept

    def gone(*of):
        file = found(*of)
        shutil.rmtree(tmp_path / "cache")
        return file

    def going(folder, name, suffix, write):
        keep(folder, name, suffix, lambda file: (write(file), shutil.rmtree(folder)))

    with monkeypatch.context() as patched:
        patched.setattr("mixmerge.train.cache.kept", gone)
        patched.setattr("mixmerge.train.cache.keep", going)
        assert asked()[1]
    assert asked()[1]
    assert not asked()[1]


def test_without_a_folder_nothing_is_kept(model, tmp_path):
    made = kept_tokens(None, model, ["rows"], Tokenised, lambda: tokenise(ROWS, tiny_tokenizer(), 40))
    assert len(made.ids) == 5
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("method", ["sft", "dpo"])
def test_trainings_of_the_same_rows_share_them_and_learn_what_they_would(method, model, facts, choices, tmp_path):
    mixture = facts if method == "sft" else choices
    for name, cache in (("own", None), ("first", tmp_path / "cache"), ("second", tmp_path / "cache")):
        train(model, mixture, tmp_path / name, method=method, cache=cache)
    assert same(weights(tmp_path / "own"), weights(tmp_path / "first"))
    assert same(weights(tmp_path / "own"), weights(tmp_path / "second"))
    told = [[{**line, "seconds": 0} for line in metrics_of(tmp_path / name)] for name in ("own", "second")]
    assert told[0] == told[1]
    assert len(list((tmp_path / "cache").iterdir())) == 1
    train(model, mixture, tmp_path / "another", method=method, cache=tmp_path / "cache", learning_rate=1e-4, seed=2)
    assert len(list((tmp_path / "cache").iterdir())) == 1, "neither the rate nor the order of rows changes a token"
    train(model, mixture, tmp_path / "shorter", method=method, cache=tmp_path / "cache", max_length=24)
    assert len(list((tmp_path / "cache").iterdir())) == 2
