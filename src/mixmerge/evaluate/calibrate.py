"""How far is a judge to be trusted? It is asked about rows whose answer is known, and its errors are counted by language.

Works for any judge and any labelled file by a column map. Every row is counted: `invalid`, `unparsed`, `unanswered` and
`unknown` are no decision of the judge, so sensitivity and specificity leave them out, as the scores do, while accuracy
and kappa count them as wrong. What is measured can be written, read again for the same judge only, and be used to correct
shares of verdicts (`correct`).
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from mixmerge.errors import DataError, reason
from mixmerge.evaluate.judge import Judge, Verdict
from mixmerge.evaluate.labelled import QUESTIONS, LabelledItem
from mixmerge.stats.judge_error import Correction, Recall, kappa_estimate, mean_share, recall, share
from mixmerge.stats.judge_error import correct as corrected_shares
from mixmerge.stats.paired import Array, Estimate, clusters_in, estimate, interval, means
from mixmerge.whole import write_whole

VERSION = 1
BATCH = 512  # items between two reports of progress
LONGEST_VALUE = 24  # characters of a field of a judge's description in an error
WHAT_IT_SAYS_OF_ITSELF = ("note", "trust")  # parts of a judge's description that change no verdict


class Described(Protocol):
    """A judge, or what is known of one that judged earlier."""

    @property
    def name(self) -> str: ...

    def describe(self) -> dict[str, Any]: ...


def calibrate(
    judge: Judge,
    labelled: Sequence[LabelledItem],
    *,
    level: float = 0.95,
    draws: int = 10_000,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Ask the judge about labelled rows and measure its errors, per language and over all, as plain JSON.

    Of a question with two words the first (harmful, refused, wrong) is the positive one: sensitivity is the share of the
    rows labelled so that are found, specificity that of the others that are left alone. Intervals are at `level`, for rows
    whose groups (answers to one prompt, its translations) count as far as they differ. For pairs, `recall` has each word's.

    Raises:
        DataError: no rows, or labels that are not among the judge's verdicts.
    """
    question = _question(judge, labelled)
    verdicts: list[Verdict] = []
    for start in range(0, len(labelled), BATCH):
        if progress is not None:
            progress(start, len(labelled))
        verdicts += judge.judge([row.item for row in labelled[start : start + BATCH]])
    if progress is not None:
        progress(len(labelled), len(labelled))
    if [v.prompt.id for v in verdicts] != [row.item.prompt.id for row in labelled]:
        raise ValueError(f"the judge {judge.name!r} did not give one verdict an item, in order")
    pairs = list(zip(labelled, verdicts, strict=True))
    languages = list(dict.fromkeys(row.item.prompt.lang for row in labelled))

    def measured(lang: str | None) -> dict[str, Any]:
        mine = [pair for pair in pairs if lang in (None, pair[0].item.prompt.lang)]
        return _measured(mine, question, judge.verdicts, level, draws, seed)

    return {
        "version": VERSION,
        "question": question,
        "words": list(QUESTIONS[question]),
        "judge": _as_json(judge.describe()),
        "rows": len(labelled),
        "rows_sha256": rows_sha256(labelled),
        "level": level,
        "seed": seed,
        "languages": {lang: measured(lang) for lang in languages},
        "all": measured(None),
    }


def rows_sha256(labelled: Sequence[LabelledItem]) -> str:
    """Sha256 (hex) of what was labelled and how, whatever file it came from."""
    rows = [
        [p.lang, p.pid, row.group, row.label, p.text, p.reference, row.item.response, row.item.opponent, *p.also]
        for row in labelled
        for p in (row.item.prompt,)
    ]
    return hashlib.sha256(json.dumps(rows, ensure_ascii=False).encode("utf-8", "surrogatepass")).hexdigest()


def _question(judge: Judge, labelled: Sequence[LabelledItem]) -> str:
    """What the rows' labels answer; one question that the judge answers too."""
    if not labelled:
        raise DataError("no labelled rows to measure the judge on", where=judge.name)
    asked = [name for name, words in QUESTIONS.items() if set(words) <= set(judge.verdicts)]
    for row in labelled:
        if not any(row.label in QUESTIONS[name] for name in asked):
            raise DataError(
                f"the label '{row.label}' is no verdict of the judge '{judge.name}' ({', '.join(judge.verdicts)})",
                where=row.item.prompt.where or row.item.prompt.id,
                do="name the judge's word for it with `labels:`",
            )
    return next(name for name in asked if labelled[0].label in QUESTIONS[name])


def _measured(
    pairs: Sequence[tuple[LabelledItem, Verdict]],
    question: str,
    outcomes: Sequence[str],
    level: float,
    draws: int,
    seed: int,
) -> dict[str, Any]:
    words = QUESTIONS[question]
    number = {word: i for i, word in enumerate(words)}
    truth = np.array([number[row.label] for row, _ in pairs])
    found = np.array([number.get(verdict.verdict, len(words)) for _, verdict in pairs])
    groups = [row.group for row, _ in pairs]
    decided = found < len(words)
    counted = Counter((row.label, verdict.verdict) for row, verdict in pairs)
    seen = [*outcomes, *sorted({v for _, v in counted} - set(outcomes))]
    recalls = {}
    for word, code in number.items():
        mine = decided & (truth == code)
        recalls[word] = recall(found[mine] == code, [g for g, there in zip(groups, mine, strict=True) if there])
    out: dict[str, Any] = {
        "rows": len(pairs),
        "groups": len(set(groups)),
        "counts": {word: {verdict: counted[word, verdict] for verdict in seen} for word in words},
        "undecided": {v: n for v in seen if v not in words and (n := sum(counted[word, v] for word in words))},
        "recall": {word: asdict(each) | {"share": _json(each.estimate(level))} for word, each in recalls.items()},
        "accuracy": _json(share(found == truth, groups, level=level)),
        "kappa": _json(kappa_estimate(truth, found, len(words), groups, level=level, draws=draws, seed=seed)),
    }
    if len(words) == 2:
        for name, word in zip(("sensitivity", "specificity"), words, strict=True):
            out[name] = out["recall"][word]["share"]
    else:
        out |= _of_pairs(pairs, truth, found, groups, level)
    return out


def _of_pairs(
    pairs: Sequence[tuple[LabelledItem, Verdict]], truth: Array, found: Array, groups: Sequence[str], level: float
) -> dict[str, Any]:
    """Agreement where neither side says tie, and how often the judge kept its choice when the order was turned."""
    tie = QUESTIONS["quality"].index("tie")
    both = (truth < tie) & (found < tie)
    out = {"without_ties": _json(share((found == truth)[both], _those(groups, both), level=level))}
    told = np.array(["flipped" in verdict.details for _, verdict in pairs], dtype=bool)
    if told.any():
        kept = np.array([not verdict.details.get("flipped") for _, verdict in pairs])
        out["same_in_both_orders"] = _json(share(kept[told], _those(groups, told), level=level))
    return out


def _those(groups: Sequence[str], mask: Any) -> list[str]:
    return [group for group, there in zip(groups, mask, strict=True) if there]


def _json(found: Estimate | None) -> dict[str, Any] | None:
    return None if found is None else asdict(found)


def _as_json(described: Mapping[str, Any]) -> dict[str, Any]:
    """A judge's description as it reads once written."""
    found: dict[str, Any] = json.loads(json.dumps(described, ensure_ascii=False, allow_nan=False))
    return found


def write_calibration(calibration: Mapping[str, Any], out: Path) -> None:
    """Write it as JSON, whole or not at all."""
    write_whole(out, json.dumps(calibration, ensure_ascii=False, indent=1, allow_nan=False) + "\n")


def read_calibration(path: Path, judge: Described | None = None) -> dict[str, Any]:
    """A calibration that `write_calibration` wrote; with `judge`, only if it is that judge's.

    All of a judge's description counts but its `note` and `trust`: another model, rubric or threshold errs otherwise.

    Raises:
        DataError: no such file, no calibration, or another judge's; says what differs.
    """
    again = "measure the judge again: `mixmerge calibrate`"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"cannot be read as a calibration: {reason(error)}", where=str(path), do=again) from error
    if not isinstance(found, dict) or found.get("version") != VERSION or found.get("question") not in QUESTIONS:
        raise DataError(f"not a calibration of version {VERSION}", where=str(path), do=again)
    try:
        dict(found["judge"])
        if type(found["rows"]) is not int or found["rows"] < 0:
            raise ValueError(f"measured on {found['rows']!r} rows")
        for lang, one in found["languages"].items():
            for word in QUESTIONS[found["question"]]:
                _check_recall(f"{lang}, {word}", **{key: one["recall"][word][key] for key in asdict(Recall(0, 0, 0.0))})
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(f"a damaged calibration: {reason(error)}", where=str(path), do=again) from error
    if judge is not None and (differ := _differences(found["judge"], _as_json(judge.describe()))):
        raise DataError(f"calibrates another judge than '{judge.name}': {'; '.join(differ)}", where=str(path), do=again)
    return found


def _check_recall(place: str, right: Any, rows: Any, effective: Any) -> None:
    """Refuse counts that no measurement gives; ValueError."""
    counts = type(right) is int and type(rows) is int and 0 <= right <= rows
    if not counts or type(effective) not in (int, float) or not 0 <= effective <= rows:
        raise ValueError(f"{place}: {right!r} right of {rows!r} rows, worth {effective!r}")


def _differences(was: Mapping[str, Any], now: Mapping[str, Any], above: str = "") -> list[str]:
    """Fields of two descriptions that differ, as `field 'was' -> 'now'`."""
    out = []
    for key in sorted({*was, *now}):
        if not above and key in WHAT_IT_SAYS_OF_ITSELF:
            continue
        before, after = was.get(key), now.get(key)
        if isinstance(before, dict) and isinstance(after, dict):
            out += _differences(before, after, f"{above}{key}.")
        elif before != after:
            out.append(f"{above}{key} {_short(before)} -> {_short(after)}")
    return out


def _short(value: Any) -> str:
    text = "nothing" if value is None else repr(value)
    return text if len(text) <= LONGEST_VALUE else f"{text[: LONGEST_VALUE - 3]}..."


@dataclass(frozen=True, slots=True)
class CorrectedRates:
    """Shares of one verdict by candidate, raw beside corrected.

    values (C, L) and drawn (draws, C, L) are corrected, NaN in the languages of `uncorrected` (language -> why), and not yet
    cut to 0..1: take means over languages by `mean_share` of `stats.judge_error`;
    `candidates` has the estimates as plain JSON; `pooled` names languages that took the others' errors.
    """

    values: Array
    drawn: Array
    candidates: dict[str, Any]
    uncorrected: dict[str, str]
    pooled: tuple[str, ...]


def correct(
    values: Array,
    drawn: Array,
    calibration: Mapping[str, Any],
    *,
    candidates: Sequence[str],
    languages: Sequence[str],
    positive: str,
    level: float,
    seed: int,
    pool: bool = False,
    undecided: tuple[Array, Array] | None = None,
    common: NDArray[np.bool_] | None = None,
) -> CorrectedRates:
    """Shares of the verdict `positive` (complied, refused, harmful), corrected for the errors that a calibration found.

    values (C, L, P): 1 where the verdict is `positive`, 0 where it is not, NaN where there is none (unparsed, unanswered);
    drawn (draws, C, L): their bootstrap draws. `undecided`: the same two arrays for verdicts that the judge did not decide,
    1 where the text is broken (`invalid`): such rows are surely not positive, and no false alarms are taken off for them.
    `common` (L,): the languages that macro-averages are taken over, where a candidate has values; all where None.
    Each candidate has `macro` and `languages`, each with `raw` and `corrected`; the corrected macro-average is there only
    where every language with values is corrected, else it would be compared with another mean than the raw one.

    Raises:
        ValueError: a calibration of pairs, or a `positive` that is not one of its words.
    """
    words = QUESTIONS[calibration["question"]]
    if len(words) != 2 or positive not in words:
        raise ValueError(f"shares of {positive!r} cannot be corrected by a calibration of {', '.join(words)}")
    recalls = {
        lang: {word: Recall(each["right"], each["rows"], each["effective"]) for word, each in found["recall"].items()}
        for lang, found in calibration["languages"].items()
    }
    decided = None if undecided is None else (1 - np.nan_to_num(means(undecided[0])), 1 - np.nan_to_num(undecided[1]))
    found = corrected_shares(
        values,
        drawn,
        languages,
        recalls,
        positive=positive,
        negative=next(word for word in words if word != positive),
        judge=str(calibration["judge"]["name"]),
        level=level,
        seed=seed,
        pool=pool,
        decided=decided,
    )
    rates = {}
    for c, name in enumerate(candidates):
        there = ~np.isnan(values[c]).all(axis=1)
        macro = [int(i) for i in np.flatnonzero(there if common is None else there & common)]
        by_language = {
            languages[i]: _raw_and_corrected(values[c, [i]], drawn[:, c, [i]], found, c, [i], level)
            for i in range(len(languages))
            if there[i]
        }
        rates[name] = {
            "macro": _raw_and_corrected(values[c, macro], drawn[:, c, macro], found, c, macro, level)
            if macro
            else None,
            "languages": by_language,
        }
    return CorrectedRates(found.values, found.drawn, rates, found.uncorrected, found.pooled)


def _raw_and_corrected(
    values: Array, drawn: Array, found: Correction, candidate: int, languages: list[int], level: float
) -> dict[str, Any]:
    raw = estimate(values, drawn, level)
    mended, noisy = mean_share(found.values[candidate, languages], found.drawn[:, candidate, languages])
    if np.isnan(mended):
        return {"raw": asdict(raw), "corrected": None}
    low, high = interval(noisy, level, clusters_in(values))
    return {"raw": asdict(raw), "corrected": asdict(Estimate(float(mended), low, high, raw.n))}


def table(calibration: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Heads and rows for a terminal, a row a language and one over all; shares in percent with their intervals."""
    words = QUESTIONS[calibration["question"]]
    heads = [f"{word} found" for word in words]
    if len(words) == 2:
        heads = [f"sensitivity ({words[0]})", f"specificity ({words[1]})"]
    rows = []
    for lang, found in [*calibration["languages"].items(), ("all", calibration["all"])]:
        kappa = found["kappa"]
        rows.append(
            [
                lang,
                " / ".join(str(sum(found["counts"][word].values())) for word in words),
                _percent(found["accuracy"]),
                *(_percent(found["recall"][word]["share"]) for word in words),
                "-" if kappa is None else f"{kappa['value']:.2f} [{kappa['low']:.2f}, {kappa['high']:.2f}]",
                ", ".join(f"{n} {verdict}" for verdict, n in found["undecided"].items()) or "-",
            ]
        )
    return ["language", f"rows ({' / '.join(words)})", "accuracy", *heads, "kappa", "not decided"], rows


def _percent(found: Mapping[str, Any] | None) -> str:
    if found is None:
        return "-"
    value, low, high = (f"{100 * found[key]:.1f}" for key in ("value", "low", "high"))
    return f"{value} [{low}, {high}]"
