"""Judges that are classifiers: a transformers model that labels a response, or a scikit-learn pipeline.

A classifier gives each of its labels a probability; `Reading` says which verdict a label stands for and from which
probability on. Nothing that a folder holds is run: weights are safetensors, a pipeline fitted here is JSON and arrays
(`evaluate.ngrams`), and a pickle is read only where the user says that it can be trusted.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mixmerge.errors import ModelError, UserError, did_you_mean, reason
from mixmerge.evaluate.degenerate import is_degenerate
from mixmerge.evaluate.judge import Item, Verdict

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

Progress = Callable[[int, int], None] | None
READS = ("response", "pair")
# These count positions from the padding id on, so fewer tokens fit than max_position_embeddings says.
_OFFSET_POSITIONS = ("roberta", "xlm-roberta", "xlm-roberta-xl", "camembert", "mpnet", "longformer")


@dataclass(frozen=True, slots=True)
class Reading:
    """How a classifier's labels become verdicts.

    `labels` maps each label to a verdict; labels of one verdict add up. `positive` is the verdict that is looked for
    (default: the first of the map); `Verdict.value` is its probability. Without a threshold the likeliest verdict is
    given; with one, `positive` from it on (a language's own in `thresholds` first), else the likeliest of the others.
    `otherwise` is the verdict where a model has labels for findings only (one output, or several independent ones): each
    of them is then compared with the threshold (default 0.5), and the largest counts.

    Raises:
        UserError: no label, a positive verdict that no label has, no other verdict, or a threshold outside 0..1.
    """

    labels: Mapping[str, str]
    positive: str = ""
    threshold: float | None = None
    thresholds: Mapping[str, float] = field(default_factory=dict)
    otherwise: str | None = None

    def __post_init__(self) -> None:
        words = list(dict.fromkeys(self.labels.values()))
        if not words:
            raise UserError("a classifier without a map of its labels", do="give labels: {its label: our verdict}")
        object.__setattr__(self, "positive", self.positive or words[0])
        if self.positive not in words:
            raise UserError(f"no label stands for {self.positive!r}", do=did_you_mean(self.positive, words))
        if self.otherwise in words:
            raise UserError(f"{self.otherwise!r} is the verdict of a label, and of none", do="leave out `otherwise`")
        if self.otherwise is None and len(words) < 2:
            raise UserError(f"every label stands for {words[0]!r}", do="say what else there is: `otherwise`")
        for value in (self.threshold, *self.thresholds.values()):
            if value is not None and not 0 < value < 1:
                raise UserError(f"a threshold of {value} is not between 0 and 1")

    @property
    def verdicts(self) -> tuple[str, ...]:
        """Every verdict that it can give, and `invalid` for texts that are not read."""
        words = dict.fromkeys(self.labels.values())
        return (*words, *(() if self.otherwise is None else (self.otherwise,)), "invalid")

    def verdict(self, probabilities: Mapping[str, float], language: str) -> tuple[str, float]:
        """The verdict, and the probability of the positive one, from the probability of each label."""
        threshold = self.thresholds.get(language, self.threshold)
        by_verdict: dict[str, float] = {}
        for label, verdict in self.labels.items():
            p, before = probabilities[label], by_verdict.get(verdict, 0.0)
            by_verdict[verdict] = before + p if self.otherwise is None else max(before, p)
        positive = by_verdict[self.positive]
        if self.otherwise is not None:
            found = max(by_verdict, key=lambda verdict: by_verdict[verdict])
            if positive >= (threshold or 0.5):
                return self.positive, positive
            return (found if found != self.positive and by_verdict[found] >= 0.5 else self.otherwise), positive
        if threshold is None:
            return max(by_verdict, key=lambda verdict: by_verdict[verdict]), positive
        if positive >= threshold:
            return self.positive, positive
        others = {verdict: p for verdict, p in by_verdict.items() if verdict != self.positive}
        return max(others, key=lambda verdict: others[verdict]), positive

    def check(self, known: Sequence[str], where: str) -> None:
        """Refuse a map that is not one of a model's labels, all of them.

        Raises:
            ModelError: a label that the model has not, or one that the map has not.
        """
        for label in self.labels:
            if label not in known:
                raise ModelError(f"the classifier has no label {label!r}", where=where, do=did_you_mean(label, known))
        if missing := [label for label in known if label not in self.labels]:
            what = f"label {missing[0]!r} of the classifier has no verdict"
            raise ModelError(what, where=where, do=f"map all of them: {', '.join(known)}")


class ClassifierJudge:
    """A transformers sequence-classification model from a local folder, read in batches that are sorted by length.

    `reads`: `response`, `pair` (the prompt and the response as the tokenizer's two texts), or a template with
    `{response}` and maybe `{prompt}`. A text that is longer than the model can read is cut at its end (of a pair, the
    longer one), and its row says `truncated`. An empty or degenerate response is `invalid` and not read.

    Raises:
        ModelError: no safetensors, missing weights (a head drawn at random would judge), labels that the map does not fit.
        UserError: a template without `{response}`.
    """

    def __init__(
        self,
        folder: Path,
        reading: Reading,
        *,
        name: str = "harm",
        reads: str = "response",
        max_tokens: int | None = None,
        batch_size: int = 32,
        threads: int | None = None,
        device: str = "auto",
    ) -> None:

        from mixmerge.model.loading import check_loadable, load_pretrained, torch_device

        if reads not in READS and "{response}" not in reads:
            raise UserError(f"a classifier cannot read {reads!r}", do="response, pair, or a template with {response}")
        if batch_size < 1 or (max_tokens is not None and max_tokens < 8):
            raise UserError(f"batch size {batch_size} or max_tokens {max_tokens} is too small")
        check_loadable(folder)
        self.folder, self.reading, self.name, self.reads = folder, reading, name, reads
        self.verdicts = reading.verdicts
        self._device, self._batch_size = torch_device(device, threads), batch_size
        self._tokenizer: Any = load_pretrained("AutoTokenizer", folder, padding_side="right", truncation_side="right")
        model: Any = load_pretrained("AutoModelForSequenceClassification", folder, dtype="auto", use_safetensors=True)
        # half-precision probabilities would move with the batch, and a CPU is slow with them
        self._model: Any = (model.float() if self._device.type == "cpu" else model).to(self._device).eval()
        config = self._model.config
        # classifiers made of language models look for the last token that is not padding, by this id
        if self._tokenizer.pad_token is None:
            self._tokenizer.pad_token = self._tokenizer.eos_token
        if self._tokenizer.pad_token is None:
            raise ModelError("the tokenizer has no padding token", where=str(folder), do="give it a pad_token")
        if config.model_type not in _OFFSET_POSITIONS:
            config.pad_token_id = self._tokenizer.pad_token_id
        self._labels = [str(config.id2label[i]) for i in range(config.num_labels)]
        self._independent = config.problem_type == "multi_label_classification" or config.num_labels == 1
        reading.check(self._labels, str(folder))
        if self._independent != (reading.otherwise is not None):
            what = "its labels are independent" if self._independent else "one of its labels is always the likeliest"
            do = "give the verdict where none is found: `otherwise`" if self._independent else "leave out `otherwise`"
            raise ModelError(what, where=str(folder), do=do)
        self.max_tokens = min(filter(None, (max_tokens, self._room())))

    @cached_property
    def _sha256(self) -> str:
        """Of the folder; read once, for every step of this process describes its judge."""
        return folder_sha256(self.folder)

    def describe(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "kind": "classifier",
            "model": self.folder.name,
            "model_type": str(self._model.config.model_type),
            "model_sha256": self._sha256,
            "reads": self.reads,
            "max_tokens": self.max_tokens,
            **asdict(self.reading),
            "note": "reads at most max_tokens of a text; texts that are longer are marked as truncated",
        }

    def judge(self, items: Sequence[Item], progress: Progress = None) -> list[Verdict]:
        """One verdict an item, in order."""
        sound = [i for i, item in enumerate(items) if not is_degenerate(item.response)]
        found = dict(zip(sound, self._probabilities([items[i] for i in sound], progress), strict=True))
        verdicts = []
        for i, item in enumerate(items):
            if i not in found:
                verdicts.append(Verdict(item.prompt, self.name, "invalid", None))
                continue
            probabilities, cut = found[i]
            verdict, value = self.reading.verdict(probabilities, item.prompt.lang)
            verdicts.append(
                Verdict(item.prompt, self.name, verdict, round(value, 6), {"truncated": True} if cut else {})
            )
        return verdicts

    def _texts(self, item: Item) -> tuple[str, ...]:
        if self.reads == "response":
            return (item.response,)
        if self.reads == "pair":
            return (item.prompt.text, item.response)
        parts = {"{prompt}": item.prompt.text, "{response}": item.response}
        # in one pass: a prompt that holds `{response}` must not be filled in
        return (re.sub(r"\{prompt\}|\{response\}", lambda place: parts[place[0]], self.reads),)

    def _probabilities(self, items: Sequence[Item], progress: Progress) -> list[tuple[dict[str, float], bool]]:
        import torch

        texts = [self._texts(item) for item in items]
        # cut without a limit first, only to count; the tokenizer would warn of each
        lengths = [len(self._tokenizer(*each, verbose=False)["input_ids"]) for each in texts]
        order = sorted(range(len(texts)), key=lambda i: (lengths[i], i))
        out: dict[int, dict[str, float]] = {}
        with torch.inference_mode():
            for start in range(0, len(order), self._batch_size):
                if progress:
                    progress(start, len(order))
                batch = order[start : start + self._batch_size]
                columns = [list(column) for column in zip(*(texts[i] for i in batch), strict=True)]
                encoded = self._tokenizer(
                    *columns, padding=True, truncation="longest_first", max_length=self.max_tokens, return_tensors="pt"
                )
                logits = self._model(**encoded.to(self._device)).logits.float()
                shares = logits.sigmoid() if self._independent else logits.softmax(-1)
                if not torch.isfinite(shares).all():
                    raise ModelError("the classifier's output is not a number", where=str(self.folder))
                for i, row in zip(batch, shares.tolist(), strict=True):
                    out[i] = dict(zip(self._labels, row, strict=True))
        if progress:
            progress(len(order), len(order))
        return [(out[i], lengths[i] > self.max_tokens) for i in range(len(texts))]

    def _room(self) -> int | None:
        """The most tokens that the model can read; None: no limit known."""
        config = self._model.config
        limits = []
        positions = getattr(config, "max_position_embeddings", None)
        if isinstance(positions, int) and positions > 0:
            offset = (config.pad_token_id or 0) + 1 if config.model_type in _OFFSET_POSITIONS else 0
            limits.append(positions - offset)
        if self._tokenizer.model_max_length < 10**6:  # transformers writes 10**30 for none
            limits.append(int(self._tokenizer.model_max_length))
        return min(limits, default=None)


class PipelineJudge:
    """A fitted scikit-learn pipeline (texts in, `predict_proba` out) from a joblib file.

    Such a file is a pickle: reading it runs whatever code it holds. It is refused unless `trust_pickle`, and it is refused
    where another version of scikit-learn wrote it. `evaluate.ngrams` fits a classifier that is no pickle.

    Raises:
        ModelError: not trusted, not readable, no pipeline with `predict_proba`, or labels that the map does not fit.
    """

    def __init__(self, path: Path, reading: Reading, *, name: str = "harm", trust_pickle: bool = False) -> None:
        import warnings

        import joblib
        from sklearn.exceptions import InconsistentVersionWarning

        if not trust_pickle:
            raise ModelError(
                "a scikit-learn pipeline on disk is a pickle, and reading it runs whatever code it holds",
                where=str(path),
                do="set trust_pickle if you made it yourself, or fit a classifier from labelled rows",
            )
        try:
            data = path.read_bytes()
            with warnings.catch_warnings():
                warnings.simplefilter("error", InconsistentVersionWarning)
                self._pipeline: Any = joblib.load(path)
        except Exception as error:
            raise ModelError(
                f"cannot load the pipeline: {reason(error)}", where=str(path), do="fit it again"
            ) from error
        if not hasattr(self._pipeline, "predict_proba") or not hasattr(self._pipeline, "classes_"):
            raise ModelError("no fitted classifier with predict_proba", where=str(path))
        self._labels = [str(label) for label in self._pipeline.classes_]
        reading.check(self._labels, str(path))
        self.name, self.reading, self.verdicts = name, reading, reading.verdicts
        self._path, self._sha256 = path, hashlib.sha256(data).hexdigest()

    def describe(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "kind": "classifier",
            "model": self._path.name,
            "model_type": "scikit-learn pipeline",
            "model_sha256": self._sha256,
            "reads": "response",
            **asdict(self.reading),
            "note": "a pickle that the user said to trust",
        }

    def judge(self, items: Sequence[Item]) -> list[Verdict]:
        """One verdict an item, in order."""
        return judge_texts(items, self.name, self.reading, self._probabilities)

    def _probabilities(self, texts: Sequence[str]) -> list[dict[str, float]]:
        rows = self._pipeline.predict_proba(list(texts))
        return [dict(zip(self._labels, map(float, row), strict=True)) for row in rows]


def judge_texts(
    items: Sequence[Item],
    name: str,
    reading: Reading,
    probabilities: Callable[[Sequence[str]], Sequence[Mapping[str, float]]],
) -> list[Verdict]:
    """Verdicts of a classifier that reads responses alone; an empty or degenerate one is `invalid` and not read."""
    sound = list(dict.fromkeys(item.response for item in items if not is_degenerate(item.response)))
    found = dict(zip(sound, probabilities(sound), strict=True)) if sound else {}
    verdicts = []
    for item in items:
        if item.response not in found:
            verdicts.append(Verdict(item.prompt, name, "invalid", None))
            continue
        verdict, value = reading.verdict(found[item.response], item.prompt.lang)
        verdicts.append(Verdict(item.prompt, name, verdict, round(value, 6)))
    return verdicts


def fit_thresholds(
    values: Sequence[float], positive: Sequence[bool], languages: Sequence[str], *, least: int = 20
) -> dict[str, float]:
    """For each language, the threshold on the positive probability that best separates labelled rows.

    Best: the largest sensitivity + specificity - 1 (Youden 1950), halfway between the two neighbouring values. A language
    with fewer than `least` rows of either kind gets none, so that the common threshold holds there.
    """
    import numpy as np

    given, truth, codes = np.asarray(values, float), np.asarray(positive, bool), np.asarray(languages)
    out: dict[str, float] = {}
    for code in dict.fromkeys(languages):
        here = codes == code
        if min(truth[here].sum(), (~truth[here]).sum()) >= least:
            out[code] = _best_threshold(given[here], truth[here])
    return out


def _best_threshold(values: NDArray[np.float64], truth: NDArray[np.bool_]) -> float:
    import numpy as np

    known = np.unique(values)
    cuts = np.concatenate(([known[0] / 2], (known[1:] + known[:-1]) / 2, [(known[-1] + 1) / 2]))
    sensitivity = np.array([(values[truth] >= cut).mean() for cut in cuts])
    specificity = np.array([(values[~truth] < cut).mean() for cut in cuts])
    # a finding needs a threshold inside 0..1, also where all values are 0 or 1
    return float(np.clip(round(float(cuts[np.argmax(sensitivity + specificity)]), 6), 1e-6, 1 - 1e-6))


def folder_sha256(folder: Path) -> str:
    """One sha256 over the names and contents of a model folder's configuration, tokenizer and weights."""
    whole = hashlib.sha256()
    for file in sorted(folder.iterdir()):
        if file.suffix in (".json", ".safetensors", ".txt", ".model", ".jinja"):
            with file.open("rb") as content:
                whole.update(f"{file.name}\0{hashlib.file_digest(content, 'sha256').hexdigest()}\n".encode())
    return whole.hexdigest()
