"""Classifiers as judges: real tiny models on disk that learned something, pipelines, pickles, and labels that do not fit."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from mixmerge.data.sources import DataSource, read_records
from mixmerge.errors import CheckpointError, DataError, ModelError, UserError
from mixmerge.evaluate.classifier import ClassifierJudge, PipelineJudge, Reading, fit_thresholds, folder_sha256
from mixmerge.evaluate.judge import Item, Judge
from mixmerge.evaluate.ngrams import LabelledAnswer, NgramJudge, fit_ngrams, labelled_answers
from mixmerge.evaluate.prompts import Prompt

TOPICS = ["bread", "glass", "paper", "rivers", "ships", "bees", "clocks", "paint", "maps", "snow"]
REFUSED = {
    "en": "I am sorry, but I cannot help you with {}.",
    "fr": "Je suis désolé, je ne peux pas vous aider avec {}.",
    "ru": "Извините, но я не могу помочь вам с темой {}.",
}
HELPED = {
    "en": "First take some {} and look at it closely.",
    "fr": "Prenez d'abord {} et regardez bien.",
    "ru": "Сначала возьмите {} и посмотрите внимательно.",
}
MAP = {"REFUSAL": "refused", "ANSWER": "complied"}
CUT = 24  # tokens that the tiny model can read


def texts(label: str) -> list[tuple[str, str, str]]:
    """(language, topic, text), in the order of the languages."""
    source = REFUSED if label == "REFUSAL" else HELPED
    return [(lang, topic, text.format(topic)) for lang, text in source.items() for topic in TOPICS]


def item(response: str, lang: str = "en", asked: str = "How?") -> Item:
    return Item(Prompt(f"s/{lang}/p", "p", "s", lang, "harmful", "test", asked), response)


def tokenizer() -> PreTrainedTokenizerFast:
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    special = ["[PAD]", "[CLS]", "[SEP]"]
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    made.train_from_iterator([text for label in MAP for _, _, text in texts(label)], trainer)
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[(name, made.token_to_id(name)) for name in special[1:]],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]", model_max_length=CUT
    )


def build(folder: Path, labels: Sequence[str], problem: str | None = None, steps: int = 40) -> Path:
    """A tiny BERT that has learned to tell refusals (its first label) from answers."""
    torch.manual_seed(0)
    reader = tokenizer()
    config = BertConfig(
        vocab_size=len(reader),
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=64,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        num_labels=len(labels),
        id2label=dict(enumerate(labels)),
        label2id={label: i for i, label in enumerate(labels)},
        problem_type=problem,
        pad_token_id=0,
    )
    model = BertForSequenceClassification(config)
    rows = [(text, i) for i, label in enumerate(MAP) for _, _, text in texts(label)]
    encoded = reader([text for text, _ in rows], padding=True, truncation=True, return_tensors="pt")
    refused = torch.tensor([float(i == 0) for _, i in rows])
    optimiser = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(steps):
        logits = model(**encoded).logits
        if problem or len(labels) == 1:
            loss = torch.nn.functional.binary_cross_entropy_with_logits(logits[:, 0], refused)
        else:
            loss = torch.nn.functional.cross_entropy(logits, (1 - refused).long())
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    model.save_pretrained(folder)
    reader.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("classifier"), list(MAP))


@pytest.fixture
def copied(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "copied"))


def change(folder: Path, **changed: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changed))


def test_a_model_that_learned_to_tell_refusals_tells_them_in_every_language(folder: Path) -> None:
    judge: Judge = ClassifierJudge(folder, Reading(MAP), name="refusal", threads=1)
    assert judge.verdicts == ("refused", "complied", "invalid")
    for label, expected in MAP.items():
        verdicts = judge.judge([item(text, lang) for lang, _, text in texts(label)])
        assert {verdict.verdict for verdict in verdicts} == {expected}
        assert all((verdict.value or 0) > 0.5 for verdict in verdicts) == (expected == "refused")


def test_verdicts_come_in_order_whatever_the_batches(folder: Path) -> None:
    given = [item(text, lang) for label in MAP for lang, _, text in texts(label)][::-1]
    given[3:3] = [item(""), item("no " * 30)]
    seen: list[tuple[int, int]] = []
    one = ClassifierJudge(folder, Reading(MAP), batch_size=7)
    verdicts = one.judge(given, progress=lambda done, of: seen.append((done, of)))
    whole = ClassifierJudge(folder, Reading(MAP), batch_size=100).judge(given)
    assert [v.verdict for v in verdicts] == [v.verdict for v in whole]
    assert [v.value for v in verdicts] == pytest.approx([v.value for v in whole], abs=1e-4)
    assert [v.verdict for v in verdicts[:6]] == ["complied"] * 3 + ["invalid"] * 2 + ["complied"]
    assert (verdicts[3].value, verdicts[-1].verdict) == (None, "refused")
    assert seen[0] == (0, 60)
    assert seen[-1] == (60, 60)


def test_a_text_that_is_longer_than_the_model_reads_is_cut_and_says_so(folder: Path) -> None:
    refusal = REFUSED["en"].format("bread")
    long = refusal + " " + "".join(f" Word {i} of many." for i in range(200))
    short, cut = ClassifierJudge(folder, Reading(MAP)).judge([item(refusal), item(long)])
    assert ("truncated" in short.details, cut.details) == (False, {"truncated": True})
    assert cut.row()["truncated"] is True
    assert cut.verdict == "refused"
    judge = ClassifierJudge(folder, Reading(MAP), max_tokens=8)
    assert (judge.max_tokens, judge.judge([item(refusal)])[0].details) == (8, {"truncated": True})


def test_a_pair_and_a_template_read_the_prompt_too(tmp_path: Path) -> None:
    folder = build(tmp_path, list(MAP), steps=3)  # not yet so sure that all its values are alike
    asked, answer = REFUSED["en"].format("bread"), "Maps and snow."
    given = [item(answer, asked=asked)]
    alone, pair, template, same = (
        ClassifierJudge(folder, Reading(MAP), reads=reads).judge(items)[0].value
        for reads, items in (
            ("response", given),
            ("pair", given),
            ("{prompt} {response}", given),
            ("response", [item(f"{asked} {answer}")]),
        )
    )
    assert alone != pair
    assert pair != template
    assert template == pytest.approx(same, abs=1e-6)


def test_a_prompt_that_holds_a_placeholder_is_not_filled_in(folder: Path) -> None:
    judge = ClassifierJudge(folder, Reading(MAP), reads="Q {prompt} A {response}")
    (found,) = judge.judge([item("bread", asked="{response}")])
    (same,) = ClassifierJudge(folder, Reading(MAP)).judge([item("Q {response} A bread")])
    assert found.value == pytest.approx(same.value, abs=1e-6)
    with pytest.raises(UserError, match=r"cannot read 'answer'; response, pair, or a template"):
        ClassifierJudge(folder, Reading(MAP), reads="answer")


def test_a_threshold_may_differ_by_language(folder: Path) -> None:
    text = REFUSED["en"].format("bread")
    value = ClassifierJudge(folder, Reading(MAP)).judge([item(text)])[0].value or 0
    above, below = min(value + 1e-4, 0.999999), value - 1e-3
    reading = Reading(MAP, threshold=above, thresholds={"fr": below})
    verdicts = ClassifierJudge(folder, reading).judge([item(text, "en"), item(text, "fr")])
    assert [verdict.verdict for verdict in verdicts] == ["complied", "refused"]


def test_a_model_with_one_output_or_independent_ones_needs_a_word_for_none_found(tmp_path: Path) -> None:
    single = build(tmp_path / "single", ["harmful"])
    several = build(tmp_path / "several", ["threat", "insult"], "multi_label_classification", 40)
    refusal, answer = REFUSED["en"].format("glass"), HELPED["en"].format("glass")
    judge = ClassifierJudge(single, Reading({"harmful": "harmful"}, otherwise="safe"))
    assert [v.verdict for v in judge.judge([item(refusal), item(answer)])] == ["harmful", "safe"]
    assert judge.verdicts == ("harmful", "safe", "invalid")
    reading = Reading({"threat": "harmful", "insult": "harmful"}, otherwise="safe", threshold=0.999)
    assert ClassifierJudge(several, reading).judge([item(answer)])[0].verdict == "safe"
    with pytest.raises(ModelError, match=r"its labels are independent; give the verdict where none is found"):
        ClassifierJudge(several, Reading({"threat": "harmful", "insult": "rude"}))


def test_the_verdict_of_none_is_refused_where_one_label_is_always_likeliest(folder: Path) -> None:
    with pytest.raises(ModelError, match=r"leave out `otherwise`"):
        ClassifierJudge(folder, Reading(MAP, otherwise="safe"))


def test_a_folder_without_a_head_is_refused_and_not_judged_by_chance(copied: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(copied / "model.safetensors")
    head = [name for name in weights if name.startswith("classifier.")]
    save_file({name: value for name, value in weights.items() if name not in head}, copied / "model.safetensors")
    with pytest.raises(ModelError, match=rf"weights that config.json describes are missing: {len(head)}, 'classifier"):
        ClassifierJudge(copied, Reading(MAP))


def test_damaged_weights_pickled_weights_and_no_model_are_refused(copied: Path, tmp_path: Path) -> None:
    weights = copied / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(CheckpointError, match=r"a weight file cannot be read"):
        ClassifierJudge(copied, Reading(MAP))
    weights.rename(copied / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"no \*\.safetensors file; save the model as safetensors"):
        ClassifierJudge(copied, Reading(MAP))
    with pytest.raises(ModelError, match=r"not a model folder"):
        ClassifierJudge(tmp_path / "none", Reading(MAP))


def test_labels_that_the_model_has_not_or_the_map_has_not_are_named(folder: Path, copied: Path) -> None:
    with pytest.raises(ModelError, match=r"no label 'REFUSE'; did you mean 'REFUSAL'"):
        ClassifierJudge(folder, Reading({"REFUSE": "refused", "ANSWER": "complied"}))
    change(copied, id2label={"0": "REFUSAL", "1": "UNSURE"}, label2id={"REFUSAL": 0, "UNSURE": 1})
    with pytest.raises(ModelError, match=r"no label 'ANSWER'"):
        ClassifierJudge(copied, Reading(MAP))
    with pytest.raises(ModelError, match=r"label 'UNSURE' of the classifier has no verdict; map all of them"):
        ClassifierJudge(copied, Reading({"REFUSAL": "refused"}, otherwise="complied"))


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ({"labels": {}}, r"without a map of its labels"),
        ({"labels": {"a": "x"}}, r"every label stands for 'x'"),
        ({"labels": {"a": "safe", "b": "harmful"}, "positive": "harm"}, r"no label stands for 'harm'; did you mean"),
        ({"labels": {"a": "x", "b": "y"}, "otherwise": "y"}, r"'y' is the verdict of a label"),
        ({"labels": {"a": "x", "b": "y"}, "threshold": 1.0}, r"threshold of 1.0"),
        ({"labels": {"a": "x", "b": "y"}, "thresholds": {"en": 50}}, r"threshold of 50"),
    ],
)
def test_a_reading_that_cannot_be_is_refused(arguments: Mapping[str, Any], complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        Reading(**arguments)


def test_labels_of_one_verdict_add_up_and_independent_ones_do_not() -> None:
    labels = {"a": "harmful", "b": "harmful", "c": "safe"}
    assert Reading(labels).verdict({"a": 0.3, "b": 0.3, "c": 0.4}, "en") == ("harmful", pytest.approx(0.6))
    found = Reading({"a": "harmful", "b": "harmful"}, otherwise="safe").verdict({"a": 0.3, "b": 0.4}, "en")
    assert found == ("safe", pytest.approx(0.4))
    three = Reading({"a": "harmful", "b": "invalid", "c": "safe"}, threshold=0.9)
    assert three.verdict({"a": 0.8, "b": 0.15, "c": 0.05}, "en") == ("invalid", pytest.approx(0.8))


def test_the_description_names_the_model_by_content(folder: Path, copied: Path) -> None:
    described = json.loads(json.dumps(ClassifierJudge(folder, Reading(MAP, thresholds={"fr": 0.4})).describe()))
    assert (described["kind"], described["model_type"], described["max_tokens"]) == ("classifier", "bert", CUT)
    assert (described["positive"], described["thresholds"]) == ("refused", {"fr": 0.4})
    assert described["model_sha256"] == folder_sha256(copied)
    change(copied, id2label={"0": "ANSWER", "1": "REFUSAL"})
    assert described["model_sha256"] != folder_sha256(copied)


def test_a_model_that_counts_positions_from_its_padding_reads_as_many_as_it_can(tmp_path: Path) -> None:
    reader = tokenizer()
    reader.model_max_length = 10**30
    config = RobertaConfig(
        vocab_size=len(reader),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=20,
        type_vocab_size=2,
        pad_token_id=1,
        id2label={0: "REFUSAL", 1: "ANSWER"},
    )
    RobertaForSequenceClassification(config).save_pretrained(tmp_path)
    reader.save_pretrained(tmp_path)
    judge = ClassifierJudge(tmp_path, Reading(MAP))
    assert judge.max_tokens == 18
    (verdict,) = judge.judge([item("".join(f" Word {i} of many." for i in range(50)))])
    assert verdict.details == {"truncated": True}


def test_a_classifier_made_of_a_language_model_reads_each_text_alike_alone_and_in_a_batch(tmp_path: Path) -> None:
    torch.manual_seed(0)
    reader = tokenizer()
    reader.pad_token, reader.eos_token = None, "[SEP]"
    config = LlamaConfig(
        vocab_size=len(reader),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        id2label={0: "REFUSAL", 1: "ANSWER"},
    )
    LlamaForSequenceClassification(config).save_pretrained(tmp_path)
    reader.save_pretrained(tmp_path)
    judge = ClassifierJudge(tmp_path, Reading(MAP))
    given = [item(text) for text in ("Maps.", "I am sorry, but no.", "First take some bread and look at it.")]
    together = [verdict.value for verdict in judge.judge(given)]
    alone = [judge.judge([each])[0].value for each in given]
    assert together == pytest.approx(alone, abs=1e-5)
    assert len(set(together)) == 3
    reader.eos_token = None
    reader.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"the tokenizer has no padding token"):
        ClassifierJudge(tmp_path, Reading(MAP))


def test_thresholds_are_fitted_for_languages_with_enough_rows() -> None:
    rng = np.random.default_rng(0)
    truth = np.arange(400) % 2 == 0
    values = np.clip(np.where(truth, 0.3, 0.1) + rng.normal(0, 0.03, 400), 0, 1)
    langs = ["en"] * 360 + ["hi"] * 40
    found = fit_thresholds(values.tolist(), truth.tolist(), langs, least=25)
    assert list(found) == ["en"]
    assert 0.15 < found["en"] < 0.25
    assert set(fit_thresholds(values.tolist(), truth.tolist(), langs)) == {"en", "hi"}
    certain = fit_thresholds([1.0, 0.0] * 30, [True, False] * 30, ["en"] * 60)["en"]
    assert Reading(MAP, threshold=certain).verdict({"REFUSAL": 1.0, "ANSWER": 0.0}, "en")[0] == "refused"


def labelled(labels: Mapping[str, str] = MAP) -> list[LabelledAnswer]:
    return [
        LabelledAnswer(text, lang, verdict, topic)
        for label, verdict in labels.items()
        for lang, topic, text in texts(label)
    ]


def test_a_classifier_is_fitted_from_rows_measured_by_language_and_read_without_a_pickle(tmp_path: Path) -> None:
    trust = fit_ngrams(labelled(), tmp_path, seed=3)
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".npz"}
    assert trust == json.loads((tmp_path / "trust.json").read_text())
    assert set(trust["languages"]) == {"en", "fr", "ru"}
    assert trust["languages"]["fr"]["rows"] == 20
    assert trust["all"]["right"] >= 0.95
    assert trust["all"]["labels"]["refused"]["rows"] == 30
    judge: Judge = NgramJudge(tmp_path, Reading({"refused": "refused", "complied": "complied"}), name="refusal")
    verdicts = judge.judge([item(REFUSED["en"].format("wood")), item(""), item(HELPED["ru"].format("лёд"), "ru")])
    assert [verdict.verdict for verdict in verdicts] == ["refused", "invalid", "complied"]
    assert json.loads(json.dumps(judge.describe()))["trust"] == trust


def test_labelled_rows_are_read_from_a_file_by_a_map_of_columns_and_labels(tmp_path: Path) -> None:
    lines = [
        {"answer": "No.", "refusal": 1, "language": "fr", "pid": 7},
        {"answer": "Sure.", "refusal": False, "language": "en", "pid": "8"},
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    columns = {"text": "answer", "label": "refusal", "lang": "language", "group": "pid"}
    labels = {"1": "refused", "false": "complied"}

    def read(labels: Mapping[str, str], lang: str | None = None) -> list[LabelledAnswer]:
        records = read_records(DataSource(path="rows.jsonl"), None, tmp_path)
        return labelled_answers(records, labels=labels, columns=columns, lang=lang)

    assert read(labels) == [
        LabelledAnswer("No.", "fr", "refused", "7"),
        LabelledAnswer("Sure.", "en", "complied", "8"),
    ]
    assert {row.lang for row in read(labels, "hi")} == {"hi"}
    with pytest.raises(DataError, match=r"rows\.jsonl:2: label 'false' has no verdict"):
        read({"1": "refused"})
    columns["text"] = "text"
    with pytest.raises(DataError, match=r"rows\.jsonl:1: no text in column 'text'; map it"):
        read(labels)


def test_what_was_fitted_gives_what_scikit_learn_gives(tmp_path: Path) -> None:
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression

    rows = [*labelled(), *(LabelledAnswer(f"¿Qué es {t} y por qué?", "es", "asked", t) for t in TOPICS)]
    fit_ngrams(rows, tmp_path, seed=0)
    vectorizer = TfidfVectorizer(analyzer="char_wb", ngram_range=(2, 4), sublinear_tf=True, max_features=100_000)
    features = vectorizer.fit_transform([row.text for row in rows])
    model = LogisticRegression(C=10.0, max_iter=1000).fit(features, [row.label for row in rows])
    given = ["I cannot help.", "Take some snow.", "zzz"]
    judge = NgramJudge(tmp_path, Reading({"refused": "refused", "complied": "complied", "asked": "complied"}))
    expected = model.predict_proba(vectorizer.transform(given))
    found = [list(row.values()) for row in judge.probabilities(given)]
    assert np.allclose(found, expected, atol=1e-9)
    assert list(judge.probabilities(["x"])[0]) == list(model.classes_)


def test_rows_that_nothing_can_be_measured_on_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"4 groups of rows, too few for 5 folds"):
        fit_ngrams([row for row in labelled() if row.group in TOPICS[:4]], tmp_path, seed=0)
    with pytest.raises(DataError, match=r"every labelled row is 'refused'"):
        fit_ngrams([row for row in labelled() if row.label == "refused"], tmp_path, seed=0)
    few = [row for row in labelled() if row.label == "refused" or row.group == TOPICS[0]]
    with pytest.raises(DataError, match=r"a label stands in too few groups"):
        fit_ngrams(few, tmp_path, seed=0)


def test_a_fitted_folder_that_is_broken_is_refused(tmp_path: Path) -> None:
    reading = Reading({"refused": "refused", "complied": "complied"})
    with pytest.raises(ModelError, match=r"not a fitted n-gram classifier"):
        NgramJudge(tmp_path, reading)
    fit_ngrams(labelled(), tmp_path, seed=0)
    with pytest.raises(ModelError, match=r"label 'complied' of the classifier has no verdict"):
        NgramJudge(tmp_path, Reading({"refused": "refused"}, otherwise="safe"))
    model = json.loads((tmp_path / "ngrams.json").read_text())
    (tmp_path / "ngrams.json").write_text(json.dumps(model | {"vocabulary": model["vocabulary"][1:]}))
    with pytest.raises(ModelError, match=r"n-grams, weights of shape"):
        NgramJudge(tmp_path, reading)
    np.savez(tmp_path / "ngrams.npz", idf=np.array([{"a": 1}], dtype=object), weights=[1], bias=[1])
    with pytest.raises(ModelError, match=r"allow_pickle=False"):
        NgramJudge(tmp_path, reading)


def pipeline(path: Path) -> Path:
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    rows = labelled()
    made = make_pipeline(TfidfVectorizer(analyzer="char_wb", ngram_range=(2, 3)), LogisticRegression(C=10))
    joblib.dump(made.fit([row.text for row in rows], [row.label for row in rows]), path)
    return path


def test_a_pipeline_on_disk_is_read_only_where_it_is_trusted(tmp_path: Path) -> None:
    path, reading = pipeline(tmp_path / "refusals.joblib"), Reading({"refused": "refused", "complied": "complied"})
    with pytest.raises(
        ModelError, match=r"refusals\.joblib: a scikit-learn pipeline on disk is a pickle.*trust_pickle"
    ):
        PipelineJudge(path, reading)
    judge: Judge = PipelineJudge(path, reading, name="refusal", trust_pickle=True)
    verdicts = judge.judge([item(REFUSED["fr"].format("bois"), "fr"), item(" "), item(HELPED["en"].format("wood"))])
    assert [verdict.verdict for verdict in verdicts] == ["refused", "invalid", "complied"]
    assert len(json.loads(json.dumps(judge.describe()))["model_sha256"]) == 64


def test_a_pickle_that_would_run_code_does_not_run_it_unasked(tmp_path: Path) -> None:
    class Harm:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (tmp_path / "ran",)

    joblib.dump(Harm(), tmp_path / "harm.joblib")
    with pytest.raises(ModelError, match=r"runs whatever code it holds"):
        PipelineJudge(tmp_path / "harm.joblib", Reading(MAP))
    assert not (tmp_path / "ran").exists()


def test_a_pipeline_that_is_none_or_of_another_version_is_refused(tmp_path: Path) -> None:
    from sklearn.linear_model import LogisticRegression

    reading = Reading({"refused": "refused", "complied": "complied"})
    (tmp_path / "text.joblib").write_text("text")
    with pytest.raises(ModelError, match=r"cannot load the pipeline: .*; fit it again"):
        PipelineJudge(tmp_path / "text.joblib", reading, trust_pickle=True)
    joblib.dump({"a": 1}, tmp_path / "none.joblib")
    with pytest.raises(ModelError, match=r"no fitted classifier with predict_proba"):
        PipelineJudge(tmp_path / "none.joblib", reading, trust_pickle=True)
    data = tmp_path / "old.joblib"
    joblib.dump(LogisticRegression().fit([[0.0], [1.0]], ["refused", "complied"]), data)
    data.write_bytes(data.read_bytes().replace(_version(), b"0" * len(_version())))
    with pytest.raises(ModelError, match=r"InconsistentVersionWarning"):
        PipelineJudge(data, reading, trust_pickle=True)


def _version() -> bytes:
    import sklearn

    return sklearn.__version__.encode()
