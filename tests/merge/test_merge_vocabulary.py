"""Models with different vocabularies: which rows the merge takes for each token, and that transformers loads what comes out."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from model_folders import config_for, read_model, write_model
from safetensors.torch import save_file

from mixmerge.errors import CheckpointError, ModelError, RecipeError
from mixmerge.merge import load_config, merge, parse_config, tensors
from mixmerge.merge.tokenizer import TEMPLATES, read_tokenizer, unite
from mixmerge.merge.vocabulary import vocabulary_tensors

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

TEXTS = {
    "english": ["the cat sat on the mat and the dog ran to the cat"],
    "german": ["der Hund und die Katze und der Hund sind das"],
    "mixed": ["the dog sat and the cat ran and und"],
}
SPECIAL = {"english": [], "german": ["<|im_start|>", "<|im_end|>"], "mixed": ["<x>"]}
PADDED = {"english": 8}  # rows beyond the tokenizer's tokens
TEMPLATE = {"english": "E{{ messages[0]['content'] }}", "german": "G{{ bos_token }}", "mixed": "G{{ bos_token }}"}


def make_tokenizer(name: str, kind: str = "bpe"):
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    start = ["</s>", "<s>", "<unk>"] if name == "german" else ["<unk>", "<s>", "</s>"]
    if kind == "bpe":
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(
            vocab_size=300, special_tokens=start, initial_alphabet=alphabet, show_progress=False
        )
        made = Tokenizer(models.BPE())
        made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    elif kind == "plain bpe":
        trainer = trainers.BpeTrainer(vocab_size=100, special_tokens=start, show_progress=False)
        made = Tokenizer(models.BPE(unk_token="<unk>"))
        made.normalizer, made.decoder = normalizers.Replace(" ", "▁"), decoders.Replace("▁", " ")
    elif kind == "unigram":
        trainer = trainers.UnigramTrainer(vocab_size=60, special_tokens=start, unk_token="<unk>", show_progress=False)
        made = Tokenizer(models.Unigram())
        made.pre_tokenizer, made.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    else:
        trainer = trainers.WordPieceTrainer(vocab_size=60, special_tokens=start, show_progress=False)
        made = Tokenizer(models.WordPiece(unk_token="<unk>"))
        made.pre_tokenizer, made.decoder = pre_tokenizers.Whitespace(), decoders.WordPiece()
    made.train_from_iterator(TEXTS[name] * 3, trainer)
    wrapped = PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    wrapped.add_special_tokens({"additional_special_tokens": SPECIAL[name]})
    return wrapped


def make_model(name: str, folder: Path, kind: str = "bpe", tied: bool = False) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = make_tokenizer(name, kind)
    tokenizer.chat_template = TEMPLATE[name]
    tokenizer.save_pretrained(folder)
    torch.manual_seed(len(name))
    size = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": None}
    rows = len(tokenizer) + PADDED.get(name, 0)
    LlamaForCausalLM(LlamaConfig(vocab_size=rows, tie_word_embeddings=tied, **size, **ids)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def three(tmp_path_factory):
    root = tmp_path_factory.mktemp("three")
    return {name: make_model(name, root / name) for name in TEXTS}


def ids_of(folder: Path) -> dict[str, int]:
    spec = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = spec["model"]["vocab"]
    if isinstance(vocabulary, list):
        vocabulary = {token: number for number, (token, _) in enumerate(vocabulary)}
    return {**vocabulary, **{token["content"]: token["id"] for token in spec["added_tokens"]}}


def merge_all(folders, out: Path, *, weights=(0.5, 0.3, 0.2), base=None, **top) -> Path:
    per_model = [{"weight": weight} for weight in weights[: len(folders)]]
    config = config_for("linear", folders, base=base, per_model=per_model, parameters={"normalize": False}, **top)
    merge(config, out)
    return out


def load(folder: Path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model, AutoTokenizer.from_pretrained(folder)


EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def row_of(token, own, held, base):
    """The rule, written again: `held` are the rows of the models that have the token."""
    if own in held:
        return held[own]
    if len(held) == 1:
        return next(iter(held.values()))
    return held[base] if base in held else torch.stack(list(held.values())).double().mean(0).float()


@pytest.mark.parametrize("base", [None, "german", "mixed"])
@pytest.mark.parametrize("source", ["union", "base", "mixed"])
def test_every_row_is_the_tokens_own_else_the_only_one_else_the_bases_else_the_mean(source, base, three, tmp_path):
    if source == "base" and base is None:
        pytest.skip("needs a base")
    rows = {name: read_model(folder) for name, folder in three.items()}
    ids = {name: ids_of(folder) for name, folder in three.items()}
    wanted = str(three["mixed"]) if source == "mixed" else source
    for own in three:
        weights = [float(name == own) for name in three]
        base_folder = None if base is None else three[base]
        folder = tmp_path / own
        merge_all(list(three.values()), folder, weights=weights, base=base_folder, tokenizer_source=wanted)
        out, tokens = read_model(folder), ids_of(folder)
        assert len(out[EMBEDDING]) == len(out[HEAD]) == len(tokens) == max(tokens.values()) + 1
        assert json.loads((folder / "config.json").read_text())["vocab_size"] == len(tokens)
        for tensor in (EMBEDDING, HEAD):
            for token, number in tokens.items():
                held = {name: rows[name][tensor][ids[name][token]] for name in three if token in ids[name]}
                expected = row_of(token, own, held, base)
                assert torch.allclose(out[tensor][number], expected, rtol=1e-6, atol=1e-9), token


def test_a_union_keeps_the_first_ones_ids_then_the_others_new_tokens_in_their_order(three, tmp_path):
    out = merge_all(list(three.values()), tmp_path / "out", tokenizer_source="union")
    expected = list(dict.fromkeys(t for f in three.values() for t, _ in sorted(ids_of(f).items(), key=lambda i: i[1])))
    assert [token for token, _ in sorted(ids_of(out).items(), key=lambda item: item[1])] == expected
    based = merge_all(list(three.values()), tmp_path / "based", tokenizer_source="union", base=three["german"])
    first = ids_of(three["german"])
    assert {token: number for token, number in ids_of(based).items() if token in first} == first


@pytest.mark.parametrize("kind", ["bpe", "plain bpe", "unigram", "wordpiece"])
@pytest.mark.parametrize("tied", [False, True])
def test_transformers_loads_a_union_writes_every_models_text_with_it_and_generates(kind, tied, tmp_path):
    folders = [make_model(name, tmp_path / name, kind, tied) for name in TEXTS]
    out = merge_all(folders, tmp_path / "out", tokenizer_source="union", chat_template="auto")
    model, tokenizer = load(out)
    first = make_tokenizer("english", kind)
    assert tokenizer.get_vocab() == ids_of(out)
    assert (HEAD in read_model(out)) is not tied
    for name, (text,) in TEXTS.items():
        numbers = tokenizer(text, add_special_tokens=False)["input_ids"]
        if kind != "wordpiece":
            assert tokenizer.decode(numbers).strip() == text
        # the first one's merges go first, so another's text is not always split as by its own, but never worse
        assert len(numbers) <= len(first(text, add_special_tokens=False)["input_ids"])
        assert tokenizer.unk_token_id not in numbers
        for token in SPECIAL[name]:
            assert tokenizer.encode(f"{token}", add_special_tokens=False) == [ids_of(out)[token]]
            assert tokenizer.decode(tokenizer.encode(token, add_special_tokens=False), skip_special_tokens=True) == ""
    prompt = torch.tensor([tokenizer.encode("the cat", add_special_tokens=False)])
    assert model.generate(prompt, max_new_tokens=3, min_new_tokens=3, do_sample=False).shape[1] == prompt.shape[1] + 3
    tokenizer.save_pretrained(tmp_path / "again")
    assert load_again(tmp_path / "again").get_vocab() == ids_of(out)


def load_again(folder: Path):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def test_text_of_the_first_model_alone_is_split_as_before_where_no_new_merge_fires(three, tmp_path):
    out = merge_all([three["english"], three["german"]], tmp_path / "out", tokenizer_source="union")
    before, after = make_tokenizer("english"), load_again(out)
    assert after.encode("the cat sat on the mat") == before.encode("the cat sat on the mat")


def test_hash_seeds_and_blocks_and_threads_change_no_byte_of_a_union(three, tmp_path, monkeypatch):
    code = "import sys; from mixmerge.merge import merge, load_config; from pathlib import Path; merge(Path(sys.argv[1]), Path(sys.argv[2]))"
    config = config_for(
        "ties",
        [three["mixed"], three["german"]],
        base=three["english"],
        parameters={"weight": 0.6, "density": 0.5},
        tokenizer={"source": "union", "pad_to_multiple_of": 64},
    )
    path = tmp_path / "merge.yml"
    path.write_text(json.dumps(config.to_mergekit()))
    for seed in ("1", "2"):
        env = os.environ | {"PYTHONHASHSEED": seed}
        subprocess.run([sys.executable, "-c", code, str(path), str(tmp_path / seed)], check=True, env=env)
    monkeypatch.setattr(tensors, "BLOCK", 40)
    merge(path, tmp_path / "3", threads=3)
    for name in ("model.safetensors", "tokenizer.json", "config.json", "tokenizer_config.json"):
        assert len({(tmp_path / seed / name).read_bytes() for seed in "123"}) == 1, name


def test_padding_rows_are_the_mean_of_the_others_and_config_json_counts_them(three, tmp_path):
    block = {"source": "union", "pad_to_multiple_of": 128}
    out = merge_all(list(three.values()), tmp_path / "out", weights=(0, 1, 0), tokenizer=block)
    rows, tokens = read_model(out)[EMBEDDING], len(ids_of(out))
    assert len(rows) % 128 == 0
    assert 0 < len(rows) - tokens < 128
    assert json.loads((out / "config.json").read_text())["vocab_size"] == len(rows)
    assert torch.allclose(rows[tokens:], rows[:tokens].double().mean(0).float(), atol=1e-7)
    load(out)


def test_a_models_special_tokens_come_with_its_tokenizer(three, tmp_path):
    (three["english"] / "generation_config.json").write_text('{"eos_token_id": [2, 1], "suppress_token_id": 5}')
    out = merge_all([three["english"], three["german"]], tmp_path / "out", tokenizer_source=str(three["german"]))
    config = json.loads((out / "config.json").read_text())
    ids = ids_of(three["german"])
    assert (config["bos_token_id"], config["eos_token_id"]) == (ids["<s>"], ids["</s>"]) == (1, 0)
    generation = json.loads((out / "generation_config.json").read_text())
    assert generation["eos_token_id"] == 0
    token = next(token for token, number in ids_of(three["english"]).items() if number == 5)
    assert generation["suppress_token_id"] == ids[token]
    kept = merge_all([three["german"], three["english"]], tmp_path / "kept", tokenizer_source="union")
    assert json.loads((kept / "config.json").read_text())["eos_token_id"] == 0


def test_tokens_take_the_rows_that_they_are_given(three, tmp_path):
    folder = {name: str(path) for name, path in three.items()}
    tokens = {
        "<x>": {"source": {"kind": "zero"}},
        "<|im_start|>": {"source": {"kind": "model_token", "model": folder["german"], "token": "</s>"}},
        "<|im_end|>": {"source": {"kind": "model_token", "model": folder["mixed"], "token_id": 7}},
        "Ġthe": {"source": folder["mixed"], "force": True},
        "Ġcat": {"source": folder["mixed"]},
        "<new>": {"source": {"kind": "zero"}},
    }
    block = {"source": "union", "tokens": tokens}
    out = merge_all(list(three.values()), tmp_path / "out", weights=(1, 0, 0), tokenizer=block)
    rows, ids = read_model(out)[EMBEDDING], ids_of(out)
    own = {name: (read_model(path)[EMBEDDING], ids_of(path)) for name, path in three.items()}

    def row(name, token):
        return own[name][0][own[name][1][token]]

    assert not rows[ids["<x>"]].any()
    assert not rows[ids["<new>"]].any()
    assert torch.equal(rows[ids["<|im_start|>"]], row("german", "</s>"))
    assert torch.equal(rows[ids["<|im_end|>"]], own["mixed"][0][7])
    assert torch.equal(rows[ids["Ġthe"]], row("mixed", "Ġthe"))
    assert torch.equal(rows[ids["Ġcat"]], row("english", "Ġcat"))
    assert load_again(out).encode("<new>", add_special_tokens=False) == [ids["<new>"]]


def test_a_token_can_come_from_a_model_that_is_not_merged(three, tmp_path):
    block = {"source": "base", "tokens": {"<x>": {"source": str(three["mixed"])}}}
    folders = [three["english"], three["german"]]
    out = merge_all(folders, tmp_path / "out", base=three["english"], weights=(0.5, 0.5), tokenizer=block)
    expected = read_model(three["mixed"])[EMBEDDING][ids_of(three["mixed"])["<x>"]]
    assert torch.allclose(read_model(out)[EMBEDDING][ids_of(out)["<x>"]], expected, atol=1e-8)


def test_a_token_that_no_model_has_gets_zeros_and_the_card_says_so(three, tmp_path):
    folders = [three["english"], three["mixed"]]
    config = config_for("linear", folders, parameters={"weight": 1}, tokenizer_source=str(three["german"]))
    measured = merge(config, tmp_path / "out")
    rows, ids = read_model(tmp_path / "out")[EMBEDDING], ids_of(tmp_path / "out")
    assert not rows[ids["Hund"]].any()
    assert any("no model has a row for" in note and "filled with zeros" in note for note in measured["notes"])
    assert "filled with zeros" in (tmp_path / "out" / "README.md").read_text()


def test_different_vocabularies_without_a_tokenizer_setting_are_refused_before_a_byte_is_written(three, tmp_path):
    with pytest.raises(ModelError, match=r"has shape .* their vocabularies differ: set tokenizer_source to union"):
        merge_all(list(three.values()), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_tokenizer_that_is_missing_or_of_another_kind_is_refused_before_a_byte_is_written(three, tmp_path):
    bare = write_model(tmp_path / "bare", read_model(three["english"]), vocab_size=308)
    with pytest.raises(ModelError, match=r"bare: tokenizer.json is missing"):
        merge_all([three["english"], bare], tmp_path / "out", tokenizer_source="union")
    unigram = make_model("german", tmp_path / "unigram", "unigram")
    with pytest.raises(ModelError, match=r"differ in kind \(BPE and Unigram\); a union cannot hold both"):
        merge_all([three["english"], unigram], tmp_path / "out", tokenizer_source="union")
    plain = make_model("german", tmp_path / "plain", "plain bpe")
    with pytest.raises(ModelError, match=r"how bytes and spaces are spelt \(byte level and plain\)"):
        merge_all([three["english"], plain], tmp_path / "out", tokenizer_source="union")
    tokens = {"<x>": {"source": {"kind": "model_token", "model": str(three["german"]), "token": "nowhere"}}}
    with pytest.raises(ModelError, match=r"german: it has no row for 'nowhere', which '<x>' is to take"):
        merge_all([three["english"]], tmp_path / "out", tokenizer={"source": "union", "tokens": tokens})
    assert {path.name for path in tmp_path.iterdir()} == {"bare", "unigram", "plain"}


def test_another_tokenizer_is_another_merge_for_a_run_that_carries_on(three, tmp_path):
    from mixmerge.merge.sources import Files
    from mixmerge.merge.stream import prepare

    config = config_for(
        "linear", [three["english"], three["german"]], parameters={"weight": 1}, tokenizer_source="union"
    )
    before = prepare(config, Files()).fingerprints
    assert prepare(config, Files()).fingerprints == before
    file = three["german"] / "tokenizer.json"
    text = file.read_text()
    file.write_text(text.replace('"Hund"', '"Mund"'))
    after = prepare(config, Files()).fingerprints
    file.write_text(text)
    assert after != before


def test_a_union_is_verified_and_rehearsed_with_the_models_that_only_give_rows(three, tmp_path):
    from mixmerge.merge import rehearse, verify

    giver = tmp_path / "giver"
    shutil.copytree(three["mixed"], giver)
    block = {"source": "union", "tokens": {"<x>": {"source": str(giver)}, "<new>": {"source": {"kind": "zero"}}}}
    folders = [three["english"], three["german"]]
    merge_all(folders, tmp_path / "out", weights=(0.5, 0.5), tokenizer=block)
    assert verify(tmp_path / "out")["tensors"] > 0
    config = config_for("linear", folders, parameters={"weight": 1}, tokenizer=block)
    assert set(rehearse(config)["models"]) == {str(folder) for folder in (*folders, giver)}
    save_file({name: tensor + 1 for name, tensor in read_model(giver).items()}, giver / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"giver' is not the one that this merge was made from"):
        verify(tmp_path / "out")


@pytest.mark.parametrize("wanted", ["auto", *TEMPLATES, "X{{ messages[0]['content'] }}"])
def test_a_chat_template_is_the_most_frequent_one_a_named_one_or_itself(wanted, three, tmp_path):
    settings = three["english"] / "tokenizer_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"chat_template": "old"}))
    out = merge_all(list(three.values()), tmp_path / "out", tokenizer_source="union", chat_template=wanted)
    tokenizer = load_again(out)
    talk = [{"role": "user", "content": "a question"}, {"role": "assistant", "content": "an answer"}]
    text = tokenizer.apply_chat_template(talk, tokenize=False)
    prompt = tokenizer.apply_chat_template(talk[:1], tokenize=False, add_generation_prompt=True)
    assert "chat_template" not in json.loads((out / "tokenizer_config.json").read_text())
    if wanted == "auto":
        assert text == "G<s>"
    elif wanted in TEMPLATES:
        assert text.startswith(prompt.rstrip())
        assert text.index("a question") < text.index("an answer")
        assert "\\n" not in text
    else:
        assert text == "Xa question"


def test_auto_without_any_chat_template_is_refused(tmp_path):
    model = write_model(tmp_path / "m", {"w": torch.ones(2)})
    with pytest.raises(ModelError, match=r"chat_template is auto, and none of the models has a chat template"):
        merge_all([model], tmp_path / "out", chat_template="auto")


def test_a_chat_template_alone_leaves_the_tokens_as_they_are(three, tmp_path):
    out = merge_all([three["english"]], tmp_path / "out", chat_template="chatml")
    assert (out / "chat_template.jinja").read_text() == TEMPLATES["chatml"]
    assert (out / "tokenizer.json").read_bytes() == (three["english"] / "tokenizer.json").read_bytes()
    assert len(read_model(out)[EMBEDDING]) == len(read_model(three["english"])[EMBEDDING])


def test_an_adapter_that_grew_the_vocabulary_brings_its_tokens(three, tmp_path):
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    tokenizer = load_again(three["english"])
    tokenizer.add_special_tokens({"additional_special_tokens": ["<grown>"]})
    model = AutoModelForCausalLM.from_pretrained(three["english"])
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"]))
    wrapped.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    tokenizer.save_pretrained(tmp_path / "adapter")
    reference = f"{three['english']}+{tmp_path / 'adapter'}"
    out = merge_all([reference, three["german"]], tmp_path / "out", weights=(1, 0), tokenizer_source="union")
    grown = model.get_input_embeddings().weight[tokenizer.convert_tokens_to_ids("<grown>")]
    assert torch.equal(read_model(out)[EMBEDDING][ids_of(out)["<grown>"]], grown.detach())
    alone = merge_all([reference], tmp_path / "alone", weights=(1,))
    assert json.loads((alone / "config.json").read_text())["vocab_size"] == len(tokenizer)
    AutoModelForCausalLM.from_pretrained(alone)


@pytest.mark.parametrize("architecture", ["llama", "gemma3", "gpt2"])
def test_tensors_with_a_row_per_token_are_found_by_their_shape_and_place(architecture, tiny_models):
    from mixmerge.merge.checkpoint import open_checkpoint

    found = vocabulary_tensors([open_checkpoint(folder) for folder in tiny_models(architecture)])
    assert (
        set(found)
        == {
            "llama": {EMBEDDING, HEAD},
            "gemma3": {EMBEDDING},
            "gpt2": {"transformer.wte.weight"},
        }[architecture]
    )


def test_models_with_one_tokenizer_united_are_merged_as_without_it(three, tmp_path):
    folders = [three["german"], three["german"]]
    other = tmp_path / "other"
    shutil.copytree(three["german"], other)
    folders[1] = other
    plain = merge_all(folders, tmp_path / "plain", weights=(0.5, 0.5))
    united = merge_all(folders, tmp_path / "united", weights=(0.5, 0.5), tokenizer_source="union")
    for name in ("model.safetensors", "tokenizer.json", "config.json", "tokenizer_config.json"):
        assert (plain / name).read_bytes() == (united / name).read_bytes()


def test_an_old_tokenizer_json_keeps_its_form_of_merges(tmp_path, three):
    first = read_tokenizer(three["english"], "first")
    pairs = first.spec["model"]["merges"]
    first.spec["model"]["merges"] = [" ".join(pair) for pair in pairs]
    united = unite([first, read_tokenizer(three["german"], "second")])
    assert all(isinstance(merge, str) for merge in united.spec["model"]["merges"])
    assert united.spec["model"]["merges"][: len(pairs)] == first.spec["model"]["merges"]
    assert len({tuple(merge.split(" ")) for merge in united.spec["model"]["merges"]}) == len(
        united.spec["model"]["merges"]
    )


def test_the_block_without_settings_of_its_own_means_what_tokenizer_source_does(three):
    raw = {"merge_method": "linear", "models": [{"model": "a"}], "parameters": {"weight": 1}}
    assert (
        parse_config({**raw, "tokenizer": {"source": "union"}}).vocabulary
        == parse_config({**raw, "tokenizer_source": "union"}).vocabulary
    )
    assert parse_config(raw).vocabulary is None
    assert parse_config({**raw, "tokenizer_source": "x"}).vocabulary.source == "x"


def test_slices_of_models_with_different_vocabularies_share_the_union(three, tmp_path):
    slices = [{"sources": [{"model": str(three[name]), "layer_range": [0, 2]}]} for name in ("english", "german")]
    raw = {"merge_method": "passthrough", "slices": slices}
    with pytest.raises(
        ModelError, match=r"lm_head.weight' of .* their vocabularies differ: set tokenizer_source to union"
    ):
        merge(parse_config(raw), tmp_path / "out")
    merge(parse_config({**raw, "tokenizer_source": "union"}), tmp_path / "out")
    out, ids = read_model(tmp_path / "out"), ids_of(tmp_path / "out")
    for tensor, name in ((EMBEDDING, "english"), (HEAD, "german")):
        own = read_model(three[name])[tensor]
        for token, number in ids_of(three[name]).items():
            assert torch.equal(out[tensor][ids[token]], own[number])
    model, tokenizer = load(tmp_path / "out")
    assert model.config.num_hidden_layers == 4
    assert tokenizer.get_vocab() == ids


CHAIN = """\
name: blend
merge_method: linear
models: [{model: english}, {model: german}]
parameters: {weight: 0.5}
tokenizer_source: union
---
merge_method: linear
models: [{model: mixed}, {model: german}]
parameters: {weight: 0.5}
tokenizer: {source: blend, tokens: {Hund: {source: blend, force: true}}}
"""


def link(three, root: Path) -> None:
    for name, folder in three.items():
        (root / name).symlink_to(folder)


@pytest.mark.parametrize("merged", [False, True])
def test_a_later_merge_takes_the_tokenizer_and_rows_of_an_earlier_ones_result(merged, three, tmp_path):
    link(three, tmp_path)
    first, last = CHAIN.split("---\n")
    last = last.replace("{model: german}", "{model: blend}") if merged else last
    path, seen = tmp_path / "merge.yml", []
    path.write_text(f"{first}---\n{last}")
    measured = merge(path, tmp_path / "out", progress=lambda done, total: seen.append((done, total)))
    assert seen[-1][0] == seen[-1][1] > measured["parameters"]
    for text, out in ((first, "blend"), (last, "by_hand")):
        path.write_text(text)
        merge(path, tmp_path / out)
    for file in ("model.safetensors", "config.json", "tokenizer.json"):
        assert (tmp_path / "out" / file).read_bytes() == (tmp_path / "by_hand" / file).read_bytes()
    hund = read_model(tmp_path / "blend")[EMBEDDING][ids_of(tmp_path / "blend")["Hund"]]
    assert torch.allclose(read_model(tmp_path / "out")[EMBEDDING][ids_of(tmp_path / "out")["Hund"]], hund)
    load(tmp_path / "out")


def test_a_merge_without_tokenizer_settings_is_foreseen_to_have_the_vocabulary_of_an_earlier_one(three, tmp_path):
    link(three, tmp_path)
    path = tmp_path / "merge.yml"
    last = "merge_method: linear\nmodels: [{model: blend}, {model: german}]\nparameters: {weight: 1}\n"
    path.write_text(f"{CHAIN.split('---')[0]}---\n{last}")
    with pytest.raises(ModelError, match=r"in 'blend' and .* in 'german'; their vocabularies differ"):
        merge(path, tmp_path / "out")
    assert not (tmp_path / ".out.earlier").exists()


def test_the_notes_of_earlier_merges_are_told_as_well(three, tmp_path):
    link(three, tmp_path)
    path = tmp_path / "merge.yml"
    models = "merge_method: linear\nmodels: [{model: english}, {model: mixed}]\nparameters: {weight: 1}"
    first = f"name: blend\n{models}\ntokenizer_source: german"
    path.write_text(f"{first}\n---\nmerge_method: linear\nmodels: [{{model: blend}}]\nparameters: {{weight: 1}}\n")
    assert any("filled with zeros" in note for note in merge(path, tmp_path / "out")["notes"])


def test_a_tokenizer_of_a_merge_that_is_not_there_is_refused_with_its_line(three, tmp_path):
    link(three, tmp_path)
    path = tmp_path / "merge.yml"
    path.write_text(CHAIN.replace("source: blend,", "source: blent,", 1))
    with pytest.raises(RecipeError, match=r"merge.yml:10.*'blent' is neither a merge of this file nor a folder"):
        merge(load_config(path), tmp_path / "out")


def test_a_stored_output_layer_that_repeats_a_tied_embedding_is_left_out_of_a_union(tmp_path):
    folders = [make_model(name, tmp_path / name, tied=True) for name in ("english", "german")]
    expected = read_model(merge_all(folders, tmp_path / "expected", tokenizer_source="union"))
    held = read_model(folders[1])
    save_file({**held, HEAD: held[EMBEDDING].clone()}, folders[1] / "model.safetensors")
    out = merge_all(folders, tmp_path / "out", tokenizer_source="union")
    assert {name: tensor.tolist() for name, tensor in read_model(out).items()} == {
        name: tensor.tolist() for name, tensor in expected.items()
    }
    load(out)
