"""Trimmed tokenizers: text that the kept tokens cover keeps its pieces, and every other text is still told apart."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from mixmerge.errors import ModelError
from mixmerge.model.tokens import BpeTokenizer, write_trimmed
from mixmerge.model.trim import choose_tokens
from mixmerge.model.words import read_words

WORDS = [
    "the",
    "house",
    "été",
    "maison",
    "l'eau",
    "Bonjour",
    "don't",
    "être",
    "🙂",
    "किताब",
    "книга",
    "كتاب",
    "東京",
    "\n\n",
    "  ",
]
texts = st.lists(st.one_of(st.text(max_size=12), st.sampled_from(WORDS)), max_size=6).map(" ".join)
many = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


class Pair:
    """A tokenizer before and after trimming to the English words."""

    def __init__(self, folder: Path, out: Path, extra: int) -> None:
        self.whole = BpeTokenizer.read(folder)
        self.before = self.whole.open()
        self.before.no_padding()
        start = self.whole.always_kept()
        kept = choose_tokens(self.whole, start, [read_words("en", self.before)], len(start) + extra)
        self.new = write_trimmed(self.whole, kept, out)
        self.after = Tokenizer.from_file(str(out / "tokenizer.json"))
        self.after.no_padding()

    def check(self, text: str) -> bool:
        """Hold the promises for one text; True where all of its tokens were kept."""
        before, after = self.before.encode(text), self.after.encode(text)
        assert self.after.decode(after.ids) == self.before.decode(before.ids)
        covered = self.new.keys() >= set(before.ids)
        if covered:
            assert after.tokens == before.tokens
            assert after.ids == [self.new[old] for old in before.ids]
        return covered


@pytest.fixture(params=["tiny_gpt2", "tiny_llama"])
def pair(request: pytest.FixtureRequest, tmp_path: Path) -> Pair:
    out = tmp_path / "trimmed"
    out.mkdir()
    return Pair(request.getfixturevalue(request.param), out, 500)


def test_any_text_decodes_as_before_and_covered_text_keeps_its_pieces(pair: Pair) -> None:
    assert pair.check("The house and the people")
    assert not pair.check("aujourd'hui les maisons étaient grandes")

    @many
    @given(texts)
    def holds(text: str) -> None:
        pair.check(text)

    holds()


def test_any_text_decodes_as_before_in_gemma_and_covered_text_keeps_its_pieces(gemma: Path, tmp_path: Path) -> None:
    pair = Pair(gemma, tmp_path, 20_000)
    assert pair.check("The house by the river is old, and nobody knows why.")
    assert not pair.check("Straßenverkehrsordnung")

    @many
    @given(texts)
    def holds(text: str) -> None:
        pair.check(text)

    holds()


def test_a_token_needs_the_pieces_that_bpe_makes_on_the_way_to_it() -> None:
    spec = _spec(
        {"a": 0, "b": 1, "c": 2, "ab": 3, "bc": 4, "abc": 5}, [["b", "c"], ["a", "b"], ["ab", "c"], ["a", "bc"]]
    )
    tokenizer = BpeTokenizer(spec, "here")
    assert tokenizer.needed_by(5) == {4, 5}  # b+c comes first, so ab is never made inside abc
    assert tokenizer.needed_by(3) == {3}
    assert tokenizer.needed_by(0) == {0}


def test_only_merges_whose_pieces_and_result_are_kept_stay_in_their_order() -> None:
    spec = _spec({"a": 0, "b": 1, "c": 2, "ab": 3, "bc": 4, "abc": 5}, ["b c", "a b", "ab c", "a bc"])
    trimmed, new = BpeTokenizer(spec, "here").trimmed({0, 1, 2, 4, 5})
    assert trimmed["model"]["merges"] == ["b c", "a bc"]
    assert trimmed["model"]["vocab"] == {"a": 0, "b": 1, "c": 2, "bc": 3, "abc": 4}
    assert new == {0: 0, 1: 1, 2: 2, 4: 3, 5: 4}


def test_bos_padding_and_added_tokens_get_their_new_ids(tiny_llama: Path, tmp_path: Path) -> None:
    whole = BpeTokenizer.read(tiny_llama)
    write_trimmed(whole, whole.always_kept(), tmp_path)
    after = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    one, two = after.encode_batch(["a", "a b c"])
    assert one.tokens[0] == "<s>"
    assert one.ids[0] == after.token_to_id("<s>")
    assert one.ids[-1] == after.padding["pad_id"] == after.token_to_id("</s>")
    assert len(one.ids) == len(two.ids)
    assert after.encode("x<|im_end|>").ids[-1] == after.token_to_id("<|im_end|>")


@pytest.mark.parametrize("kind", ["RobertaProcessing", "BertProcessing"])
def test_other_post_processors_get_their_new_ids_too(kind: str) -> None:
    spec = _spec({"a": 0, "ab": 1, "b": 2, "<s>": 3, "</s>": 4}, [["a", "b"]])
    inner = {"type": kind, "sep": ["</s>", 4], "cls": ["<s>", 3], "trim_offsets": True, "add_prefix_space": False}
    spec["post_processor"] = {"type": "Sequence", "processors": [inner]}
    trimmed, _ = BpeTokenizer(spec, "here").trimmed({0, 2, 3, 4})
    processor = trimmed["post_processor"]["processors"][0]
    assert (processor["cls"], processor["sep"]) == (["<s>", 2], ["</s>", 3])


def test_files_of_the_old_vocabulary_do_not_stay_beside_the_new_one(tiny_gpt2: Path, tmp_path: Path) -> None:
    for name in ("vocab.json", "merges.txt", "tokenizer.model", "added_tokens.json"):
        (tmp_path / name).write_text("old")
    last = json.loads((tiny_gpt2 / "tokenizer.json").read_text())["added_tokens"][-1]
    decoder = {"added_tokens_decoder": {str(last["id"]): {"content": last["content"], "special": True}}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(decoder))
    whole = BpeTokenizer.read(tiny_gpt2)
    new = write_trimmed(whole, whole.always_kept(), tmp_path)
    assert sorted(file.name for file in tmp_path.glob("*.*") if file.is_file()) == [
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    written = json.loads((tmp_path / "tokenizer_config.json").read_text())["added_tokens_decoder"]
    assert written == {str(new[last["id"]]): {"content": last["content"], "special": True}}


@pytest.mark.parametrize("kind", ["Unigram", "WordPiece", "WordLevel"])
def test_other_kinds_of_tokenizer_are_refused(kind: str, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": {"type": kind, "vocab": {}}}))
    with pytest.raises(ModelError, match=f"a {kind} tokenizer cannot be trimmed; only BPE tokenizers can"):
        BpeTokenizer.read(tmp_path)


def test_word_ending_suffixes_are_refused() -> None:
    spec = _spec({"a": 0}, [])
    spec["model"]["end_of_word_suffix"] = "</w>"
    with pytest.raises(ModelError, match="end_of_word_suffix cannot be trimmed"):
        BpeTokenizer(spec, "here")


def test_a_folder_without_tokenizer_json_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no tokenizer.json; load it with transformers.AutoTokenizer"):
        BpeTokenizer.read(tmp_path)


def _spec(vocabulary: dict[str, int], merges: list[list[str]] | list[str]) -> dict[str, object]:
    return {"added_tokens": [], "post_processor": None, "model": {"type": "BPE", "vocab": vocabulary, "merges": merges}}


@pytest.mark.parametrize(
    ("content", "kept"),
    [("<unused12>", False), ("[unused3]", False), ("<|reserved_special_token_7|>", False), ("<end_of_turn>", True)],
)
def test_placeholders_that_no_text_holds_are_not_kept(content: str, kept: bool) -> None:
    vocabulary = {"a": 0, "b": 1, "ab": 2, content: 3}
    spec = _spec(vocabulary, [["a", "b"]])
    spec["added_tokens"] = [{"id": 3, "content": content, "special": True}]
    tokenizer = BpeTokenizer(spec, "here")
    assert tokenizer.always_kept() == {0, 1} | ({3} if kept else set())
    trimmed, new = tokenizer.trimmed({0, 1, 2})
    assert trimmed["added_tokens"] == []
    assert 3 not in new
