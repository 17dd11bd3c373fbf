"""A classifier fitted here, from labelled rows: logistic regression over character n-grams (scikit-learn), kept as JSON
and arrays, never as a pickle. It needs no weights of others and no network; how well it does on topics that it has not
seen is measured while it is fitted, per language, and kept beside it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mixmerge.errors import DataError, ModelError, did_you_mean, reason
from mixmerge.evaluate.classifier import Reading, judge_texts
from mixmerge.evaluate.judge import Item, Verdict

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

FOLDS = 5
SETTINGS = {"analyzer": "char_wb", "ngram_range": [2, 4], "sublinear_tf": True, "max_features": 100_000}
INVERSE_REGULARISATION = 10.0
MODEL, ARRAYS, TRUST = "ngrams.json", "ngrams.npz", "trust.json"


@dataclass(frozen=True, slots=True)
class LabelledAnswer:
    """A response whose label is known; rows of one `group` (a topic, a prompt in all languages) are held out together."""

    text: str
    lang: str
    label: str
    group: str


def labelled_answers(
    records: Iterable[tuple[str, Mapping[str, Any]]],
    *,
    labels: Mapping[str, str],
    columns: Mapping[str, str] | None = None,
    lang: str | None = None,
) -> list[LabelledAnswer]:
    """Labelled rows from (`file:row`, record) pairs, as `data.sources.read_records` yields them.

    `labels` maps the file's labels (as text: 1 is `1`, true is `true`) to verdicts; rows of other labels are an error, so
    that none is dropped unseen. `columns` maps `text`, `label`, `lang` and `group` to the file's columns; the group is the
    row's `id` where it is not mapped, and `lang` may be fixed for the whole file.

    Raises:
        DataError: a missing or empty column, or a label that the map has not; names file and row.
    """
    columns = {"text": "text", "label": "label", "lang": "lang", "group": "id"} | dict(columns or {})
    rows = []
    for where, record in records:
        found = {}
        for name, column in columns.items():
            value = lang if name == "lang" and lang is not None else record.get(column)
            value = str(value).lower() if isinstance(value, bool) else str(value) if isinstance(value, int) else value
            if not isinstance(value, str) or not value.strip():
                raise DataError(f"no text in column {column!r}", where=where, do="map it with `columns`")
            found[name] = value
        if found["label"] not in labels:
            raise DataError(
                f"label {found['label']!r} has no verdict", where=where, do=did_you_mean(found["label"], labels)
            )
        rows.append(LabelledAnswer(found["text"], found["lang"], labels[found["label"]], found["group"]))
    return rows


def fit_ngrams(rows: Sequence[LabelledAnswer], out: Path, *, seed: int) -> dict[str, Any]:
    """Fit a classifier of two or more labels, measure it, write it into the folder `out`, return the measurements.

    `trust.json` has, over all and per language, the rows of each label and how many of them a 5-fold cross-validation over
    groups found, and the share that is right. The folds follow from `seed` alone.

    Raises:
        DataError: fewer groups than folds, or a fold without which a label is left out.
    """
    import numpy as np

    groups = sorted({row.group for row in rows}, key=lambda group: _digest(seed, "ngram folds", group))
    if len(groups) < FOLDS:
        raise DataError(f"{len(groups)} groups of rows, too few for {FOLDS} folds", do="give more labelled rows")
    fold_of = {group: number % FOLDS for number, group in enumerate(groups)}
    folds = np.array([fold_of[row.group] for row in rows])
    labels = np.array([row.label for row in rows])
    classes = sorted(set(labels.tolist()))
    texts = np.array([row.text for row in rows], dtype=object)
    if len(classes) < 2:
        raise DataError(f"every labelled row is {classes[0]!r}", do="give rows of another label too")
    held_out = np.empty(len(rows), dtype=labels.dtype)
    for fold in range(FOLDS):
        here = folds == fold
        if set(labels[~here].tolist()) != set(classes):
            raise DataError("a label stands in too few groups of rows", do="give rows of each label in more groups")
        vectorizer, model = _fit(list(texts[~here]), labels[~here])
        held_out[here] = model.predict(vectorizer.transform(texts[here]))
    vectorizer, model = _fit(list(texts), labels)
    languages = np.array([row.lang for row in rows])
    trust = {
        "measured_by": f"{FOLDS}-fold cross-validation over {len(groups)} groups of rows",
        "seed": seed,
        "all": _trust(labels, held_out, classes),
        "languages": {
            str(code): _trust(labels[languages == code], held_out[languages == code], classes)
            for code in np.unique(languages)
        },
    }
    content = [[row.lang, row.group, row.label, row.text] for row in rows]
    described = {
        "settings": SETTINGS,
        "inverse_regularisation": INVERSE_REGULARISATION,
        "classes": classes,
        "rows": len(rows),
        "rows_sha256": hashlib.sha256(json.dumps(content, ensure_ascii=False).encode()).hexdigest(),
        "vocabulary": [str(term) for term in vectorizer.get_feature_names_out()],
    }
    out.mkdir(parents=True, exist_ok=True)
    for name, value in ((TRUST, trust), (MODEL, described)):
        (out / name).write_text(json.dumps(value, ensure_ascii=False) + "\n", encoding="utf-8")
    np.savez(out / ARRAYS, idf=vectorizer.idf_, weights=model.coef_, bias=model.intercept_)
    return trust


class NgramJudge:
    """The classifier that `fit_ngrams` wrote into `folder`, as a judge of responses.

    Raises:
        ModelError: a missing or broken file, or labels that the map does not fit.
    """

    def __init__(self, folder: Path, reading: Reading, *, name: str = "harm") -> None:
        import numpy as np
        from sklearn.feature_extraction.text import TfidfVectorizer

        try:
            model = json.loads((folder / MODEL).read_text(encoding="utf-8"))
            self._trust = json.loads((folder / TRUST).read_text(encoding="utf-8"))
            with np.load(folder / ARRAYS, allow_pickle=False) as arrays:
                idf, self._weights, self._bias = (arrays[key] for key in ("idf", "weights", "bias"))
            self._classes, vocabulary = [str(c) for c in model["classes"]], model["vocabulary"]
            if idf.shape != (len(vocabulary),) or self._weights.shape[1:] != idf.shape:
                raise ValueError(f"{len(vocabulary)} n-grams, weights of shape {self._weights.shape}")
            settings = model["settings"] | {"ngram_range": tuple(model["settings"]["ngram_range"])}
            self._vectorizer = TfidfVectorizer(vocabulary={term: i for i, term in enumerate(vocabulary)}, **settings)
            self._vectorizer.idf_ = idf
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ModelError(
                f"not a fitted n-gram classifier: {reason(error)}", where=str(folder), do="fit it again"
            ) from error
        reading.check(self._classes, str(folder))
        self.name, self.reading, self.verdicts = name, reading, reading.verdicts
        self._rows = {key: model[key] for key in ("rows", "rows_sha256")}

    def describe(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "kind": "classifier",
            "model": "logistic regression over character 2..4-grams, fitted on labelled rows",
            **self._rows,
            "reads": "response",
            **asdict(self.reading),
            "note": "tells texts apart by their wording; it knows nothing of what they mean",
            "trust": self._trust,
        }

    def judge(self, items: Sequence[Item]) -> list[Verdict]:
        """One verdict an item, in order."""
        return judge_texts(items, self.name, self.reading, self.probabilities)

    def probabilities(self, texts: Sequence[str]) -> list[Mapping[str, float]]:
        """The probability of each label, for each text."""
        import numpy as np

        scores = np.asarray(self._vectorizer.transform(list(texts)) @ self._weights.T) + self._bias
        if len(self._classes) == 2:  # one column: the score of the second class
            scores = np.hstack([np.zeros_like(scores), scores])
        shares = np.exp(scores - scores.max(axis=1, keepdims=True))
        shares /= shares.sum(axis=1, keepdims=True)
        return [dict(zip(self._classes, map(float, row), strict=True)) for row in shares]


def _fit(texts: list[str], labels: NDArray[np.str_]) -> tuple[Any, Any]:
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression

    vectorizer = TfidfVectorizer(**SETTINGS | {"ngram_range": (2, 4)})
    model = LogisticRegression(C=INVERSE_REGULARISATION, max_iter=1000)
    return vectorizer, model.fit(vectorizer.fit_transform(texts), labels)


def _trust(labels: NDArray[np.str_], found: NDArray[np.str_], classes: Sequence[str]) -> dict[str, Any]:
    return {
        "rows": len(labels),
        "right": round(float((labels == found).mean()), 6),
        "labels": {
            name: {"rows": int((labels == name).sum()), "found": int(((labels == name) & (found == name)).sum())}
            for name in classes
        },
    }


def _digest(*parts: object) -> bytes:
    return hashlib.sha256(json.dumps(parts).encode()).digest()
