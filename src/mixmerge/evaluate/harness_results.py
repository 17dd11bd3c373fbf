"""What lm-evaluation-harness found, kept: results.json of the whole, and samples.jsonl with a row for every document.

Rows come first and results.json last, each whole or not at all; the results name the rows' sha256, so that neither is
ever read beside another run's. Reading needs no harness.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mixmerge.errors import CheckpointError, StepError, reason
from mixmerge.whole import write_whole

RESULTS, SAMPLES = "results.json", "samples.jsonl"


@dataclass(frozen=True, slots=True)
class Score:
    """One metric of one task or group.

    stderr: the harness' own, None where it has none. n: documents behind the value, of all members for a group. better:
    the direction, None where the task does not say. paired: the value is the mean of the documents' scores, so that
    candidates can be compared document by document.
    """

    value: float
    stderr: float | None
    n: int
    better: str | None
    paired: bool


def write_harness(out: Path, head: Mapping[str, Any], found: Mapping[str, Any]) -> dict[str, Any]:
    """Write what `lm_eval.evaluate` found into `out`; gives what results.json holds, `head` first.

    Raises:
        StepError: a metric has no finite value.
        CheckpointError: a file that cannot be written.
    """
    rows = [row for name, samples in found["samples"].items() for row in _rows(name, samples)]
    lines = "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows)
    result = {
        **head,
        "tasks": {name: _task(name, found, rows) for name in found["configs"]},
        "groups": {name: _group(name, found) for name in found.get("groups", {})},
        "samples": {"rows": len(rows), "sha256": hashlib.sha256(lines.encode()).hexdigest()},
    }
    text = json.dumps(result, ensure_ascii=False, indent=1, allow_nan=False) + "\n"
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / RESULTS).unlink(missing_ok=True)  # never beside rows of another run
        write_whole(out / SAMPLES, lines)
        write_whole(out / RESULTS, text)
    except OSError as error:
        raise CheckpointError(f"cannot write: {reason(error)}", where=str(out)) from error
    return result


def read_harness(out: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """results.json and the rows of samples.jsonl ({task, doc_id, doc_hash, scores: metric -> value}) that belong to it.

    Raises:
        CheckpointError: no results, or rows that are not those that the results were made with.
    """
    try:
        result = json.loads((out / RESULTS).read_text(encoding="utf-8"))
        data = (out / SAMPLES).read_bytes()
        written = result["samples"]["sha256"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"no results of the harness: {reason(error)}", where=str(out), do="run it again"
        ) from error
    if hashlib.sha256(data).hexdigest() != written:
        raise CheckpointError("not the rows that the results belong to", where=str(out / SAMPLES), do="run it again")
    return result, [json.loads(line) for line in data.splitlines()]


def scores(result: Mapping[str, Any]) -> dict[str, tuple[str, Score]]:
    """Every score under its key in tables, `bench/<task>/<metric>`, with a name for people; groups before their tasks."""
    found = {}
    for name, entry in [*result["groups"].items(), *result["tasks"].items()]:
        for metric, values in entry["metrics"].items():
            plain, _, filtered = metric.partition("@")
            shown = f"{name}, {plain.replace('_', ' ')}" + (f" ({filtered})" if filtered else "")
            found[f"bench/{name}/{metric}"] = (shown, Score(**values))
    return found


def _rows(task: str, samples: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One row a document; the harness has one a document and filter. Scores that are no number are left to the metric."""
    rows: dict[int, dict[str, Any]] = {}
    for sample in samples:
        row = rows.setdefault(
            sample["doc_id"],
            {"task": task, "doc_id": sample["doc_id"], "doc_hash": sample["doc_hash"], "scores": {}},
        )
        for metric in sample["metrics"]:
            if (value := _number(sample[metric])) is not None:
                row["scores"][_metric(metric, sample["filter"])] = value
    return [rows[doc] for doc in sorted(rows)]


def _task(name: str, found: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    config = json.loads(json.dumps(found["configs"][name], default=str))
    config.get("metadata", {}).pop("config_source", None)
    for key in ("data_files", "data_dir"):  # a data set counts by what is in it
        (config.get("dataset_kwargs") or {}).pop(key, None)
    better = {metric: "higher" if up else "lower" for metric, up in found["higher_is_better"][name].items()}
    counted = Counter(
        _metric(metric, sample["filter"]) for sample in found["samples"][name] for metric in sample["metrics"]
    )
    metrics = {}
    for metric, short, value, stderr in _values(name, found["results"][name]):
        own = [row["scores"][metric] for row in rows if row["task"] == name and metric in row["scores"]]
        paired = (
            bool(own) and len(own) == counted[metric] and math.isclose(math.fsum(own) / len(own), value, abs_tol=1e-9)
        )
        metrics[metric] = asdict(Score(value, stderr, counted[metric], better.get(short), paired))
    return {
        "version": str(found["versions"][name]),
        "num_fewshot": found["n-shot"][name],
        "documents": found["n-samples"][name]["original"],
        "config": hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest(),
        "metrics": metrics,
    }


def _group(name: str, found: Mapping[str, Any]) -> dict[str, Any]:
    members = found["group_subtasks"][name]
    better = {
        metric: "higher" if up else "lower"
        for metric, up in (found["higher_is_better"].get(name) or {}).items()
        if up is not None
    }
    n = int(found["results"][name].get("sample_len") or 0)
    return {
        "members": list(members),
        "metrics": {
            metric: asdict(Score(value, stderr, n, better.get(short), paired=False))
            for metric, short, value, stderr in _values(name, found["groups"][name])
        },
    }


def _values(name: str, values: Mapping[str, Any]) -> Iterator[tuple[str, str, float, float | None]]:
    """(metric, its name without the filter, value, standard error) of what the harness writes as `metric,filter`.

    Raises:
        StepError: a value that is no finite number.
    """
    for key, value in values.items():
        short, comma, filtered = key.partition(",")
        if not comma or short.endswith("_stderr"):
            continue
        number = _number(value)
        if number is None:
            raise StepError(f"'{key}' has no finite value: {value!r}", where=name)
        yield _metric(short, filtered), short, number, _number(values.get(f"{short}_stderr,{filtered}"))


def _metric(metric: str, filtered: str) -> str:
    return metric if filtered == "none" else f"{metric}@{filtered}"


def _number(value: Any) -> float | None:
    """A finite number; also numpy's, and a truth value as 0 or 1."""
    if isinstance(value, str) or not hasattr(value, "__float__"):
        return None
    return number if math.isfinite(number := float(value)) else None
