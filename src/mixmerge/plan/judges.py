"""Who judges in a plan: the judges that a recipe names beside the local ones, what each is asked, and who decides.

A judge's identity is its model by name, its server (by `known_as`, else by address or command), its rubric by content, and its
settings. How quickly it may be asked and what it may cost are no part of it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any, get_args

from mixmerge.data.sources import DataSource, read_records
from mixmerge.errors import DataError, ModelError, RecipeError, UserError, did_you_mean, reason
from mixmerge.evaluate.classifier import Reading
from mixmerge.evaluate.endpoint import OURS
from mixmerge.evaluate.guards import GUARDS
from mixmerge.evaluate.judge import DECIDE, LOCAL
from mixmerge.evaluate.ngrams import labelled_answers
from mixmerge.evaluate.prompts import Prompt
from mixmerge.evaluate.rubrics import Rubric, read_rubric, shipped_rubric
from mixmerge.evaluate.serving import check_command
from mixmerge.plan.models import check_model_folder, folder_fingerprint
from mixmerge.recipe.evaluation import ClassifierJudge, EndpointJudge, Question
from mixmerge.recipe.load import LoadedRecipe
from mixmerge.yaml import KeyPath

# The purposes of the prompts that a question is asked on.
ASKED_ON: Mapping[str, tuple[str, ...]] = {
    "quality": ("general",),
    "harm": ("harmful",),
    "refusal": ("harmful", "harmless"),
}

# How a file that joblib writes begins: a pickle since protocol 2, or one packed by zlib, gzip, bzip2, xz, lzma or lz4.
PICKLES = (b"\x80", b"\x78", b"\x1f\x8b", b"BZh", b"\xfd7zXZ\0", b"\x5d\0\0", b"\x04\x22\x4d\x18")
HEAD = "ForSequenceClassification"
OTHERS = re.compile(r"For[A-Z]\w+$|Model$")  # a class of transformers by its name; another's may hold anything


@dataclass(frozen=True, slots=True)
class PlannedJudge:
    """One question to one judge: `name` is that of its verdicts, `judge.question` unless it is a local one."""

    name: str
    question: str
    what: Mapping[str, Any]
    how: Mapping[str, Any] = field(default_factory=dict)
    inputs: Mapping[str, str] = field(default_factory=dict)
    group: str = "judge"

    @property
    def purposes(self) -> tuple[str, ...]:
        """Of the prompts that it judges the answers to."""
        return ASKED_ON[self.question]


def planned_judges(loaded: LoadedRecipe, cache: Path | None) -> list[PlannedJudge]:
    """The judges of a recipe beside the local ones, one entry a question, in the recipe's order; `cache` as in `plan.models`.

    Raises:
        RecipeError: a guard that is not known, or is not asked what it can tell.
        DataError: a rubric that cannot be read, or is for another question; rows that no classifier can be fitted on.
        ModelError: a folder that is no model.
    """
    found, named = [], loaded.recipe.judges
    taken = {name: f"'{name}' is the name of a local judge; give yours another" for name in (*LOCAL, "check")}
    for group in ("endpoints", "classifiers"):
        for name in getattr(named, group):
            if name in taken:
                raise RecipeError(taken[name], where=loaded.marks.where(("judges", group, name)))
            taken[name] = f"the name '{name}' is taken by judges.{group}.{name}; rename one"
    for name, entry in named.endpoints.items():
        found += [_endpoint(name, question, entry, loaded, cache) for question in entry.asks]
    return found + [_classifier(name, entry, loaded, cache) for name, entry in named.classifiers.items()]


def _classifier(name: str, entry: ClassifierJudge, loaded: LoadedRecipe, cache: Path | None) -> PlannedJudge:
    """A model on this machine; by content."""
    where = loaded.marks.where(("judges", "classifiers", name))
    path = loaded.folder / Path(entry.path).expanduser()
    what: dict[str, Any] = {"judge": entry.kind, "question": entry.asks, "labels": entry.labels}
    keys = ("positive", "threshold", "thresholds", "otherwise", "reads", "lead", "max_tokens")
    what |= {key: value for key in keys if (value := getattr(entry, key)) not in (None, "", {})}
    how: dict[str, Any] = {"judge": f"{name}.{entry.asks}", "path": str(path)}
    try:
        if entry.kind in ("classifier", "guard"):
            check_model_folder(path, where)
            what["content"] = folder_fingerprint(path, cache)
            how["device"] = loaded.recipe.how.device
            _check_head(entry, path, where)
            if entry.kind == "classifier":
                _check_labels(entry, path, where)
        elif not path.is_file():
            raise DataError(f"no file {path}", do="give the joblib file, or the labelled rows")
        elif entry.kind == "pipeline":
            if not entry.trust_pickle:
                what_ = "a scikit-learn pipeline is a pickle, and reading one runs whatever code it holds"
                raise RecipeError(what_, where=where, do="set trust_pickle: true if you trust it, or use kind: ngrams")
            data = path.read_bytes()
            if not data.startswith(PICKLES):
                raise DataError(f"{path} is no joblib file", do="write the fitted pipeline by joblib.dump")
            what["content"] = sha256(data).hexdigest()
            how["trust_pickle"] = True
        else:
            rows = list(read_records(DataSource(path=str(path)), None, loaded.folder))
            labelled_answers(rows, labels=entry.labels, columns=entry.columns)
            what |= {
                "rows": sha256(path.read_bytes()).hexdigest(),
                "columns": entry.columns,
                "seed": loaded.recipe.seed,
            }
    except UserError as error:
        raise error if isinstance(error, RecipeError | ModelError) else error.within(where) from error
    return PlannedJudge(f"{name}.{entry.asks}", entry.asks, what, how, group=f"judge {name}")


def _check_head(entry: ClassifierJudge, folder: Path, where: str) -> None:
    """Refuse a model whose configuration says that it is made for something else; one that says nothing is let through."""
    named = _config(folder, where).get("architectures")
    if not isinstance(named, list) or not any(OTHERS.search(str(name)) for name in named):
        return
    classifies = any(str(name).endswith(HEAD) for name in named)
    if classifies != (entry.kind == "classifier"):
        what = f"{folder} is a {named[0]}, " + (
            "which says no word" if classifies else "which has no head that classifies"
        )
        do = (
            "write kind: classifier" if classifies else f"give a model whose class ends in {HEAD}, or write kind: guard"
        )
        raise ModelError(what, where=where, do=do)


def _check_labels(entry: ClassifierJudge, folder: Path, where: str) -> None:
    """Refuse labels that the model's configuration does not name, before anything is trained."""
    named = _config(folder, where).get("id2label")
    if named:
        reading = Reading(entry.labels)
        try:
            reading.check([*named.values()], str(folder))
        except UserError as error:
            raise error.within(where) from error


def _config(folder: Path, where: str) -> dict[str, Any]:
    try:
        found = json.loads((folder / "config.json").read_bytes())
        return dict(found)
    except (OSError, ValueError, TypeError) as error:
        raise ModelError(f"{folder / 'config.json'} cannot be read: {reason(error)}", where=where) from error


def _endpoint(
    name: str, question: Question, entry: EndpointJudge, loaded: LoadedRecipe, cache: Path | None
) -> PlannedJudge:
    path = ("judges", "endpoints", name)
    what: dict[str, Any] = {
        "judge": "endpoint",
        "question": question,
        "model": entry.model,
        "fields": {"max_tokens": entry.max_tokens, "temperature": entry.temperature} | entry.extra,
        "longest": entry.longest,
        "seed": loaded.recipe.seed,
        "server": entry.identity,
    } | ({"attempt": entry.attempt} if entry.attempt else {})
    how: dict[str, Any] = {"judge": f"{name}.{question}", "server": entry.place}
    if ours := sorted(set(entry.extra) & set(OURS)):
        place = loaded.marks.where((*path, "extra"))
        raise RecipeError(f"extra cannot set {ours[0]}, which mixmerge does", where=place)
    if entry.start is not None:
        checked_start(entry.start, loaded.marks.where((*path, "start")))
        folder = loaded.folder / Path(entry.model).expanduser()
        if folder.is_dir():
            check_model_folder(folder, loaded.marks.where((*path, "model")))
            what["model"], how["folder_of_model"] = folder_fingerprint(folder, cache), str(folder)
    if entry.guard is not None:
        if entry.guard not in GUARDS:
            place = loaded.marks.where((*path, "guard"))
            raise RecipeError(f"unknown guard '{entry.guard}'", where=place, do=did_you_mean(entry.guard, GUARDS))
        if question not in GUARDS[entry.guard].verdicts:
            place, told = loaded.marks.where((*path, "asks")), " and ".join(GUARDS[entry.guard].verdicts)
            raise RecipeError(f"the guard {entry.guard} tells {told}, not {question}", where=place)
        what["guard"] = entry.guard
    else:
        rubric = _rubric(question, entry, loaded, (*path, "rubrics", question))
        what |= {"rubric": rubric.sha256, "grammar": entry.grammar}
        if question in entry.rubrics:
            how["rubric"] = str(loaded.folder / entry.rubrics[question])
    if entry.budget is not None:
        how["budget"] = entry.budget.model_dump()
    return PlannedJudge(f"{name}.{question}", question, what, how, group=f"judge {name}")


def checked_start(command: str, where: str) -> None:
    """Refuse a command that no server can be started by; RecipeError or UserError with the place in the recipe."""
    try:
        check_command(command)
    except UserError as error:
        raise error.within(where) from error


def _rubric(question: Question, entry: EndpointJudge, loaded: LoadedRecipe, path: KeyPath) -> Rubric:
    if question not in entry.rubrics:
        return shipped_rubric(question)
    where = loaded.marks.where(path)
    try:
        rubric = read_rubric(loaded.folder / entry.rubrics[question])
    except UserError as error:
        raise error.within(where) from error
    if rubric.question != question:
        raise RecipeError(f"a rubric for {rubric.question} where one for {question} is wanted", where=where)
    return rubric


def deciding(loaded: LoadedRecipe, judges: list[PlannedJudge]) -> dict[str, str]:
    """Question -> the judge whose verdicts make its metric, where it is not the local one.

    The recipe's word counts; else the first judge that is asked; else the local one. A judge that is asked about refusals
    may decide harm, as the local one does.

    Raises:
        RecipeError: `decide` names a judge that is not there, or is not asked.
    """
    chosen = {}
    for question in get_args(Question):
        asked = [judge for judge in judges if judge.question == question]
        if (named := loaded.recipe.judges.decide.get(question)) is not None:
            chosen[question] = _named(named, question, judges, loaded)
        elif asked:
            chosen[question] = asked[0].name
    return {question: judge for question, judge in chosen.items() if judge != DECIDE[question]}


def _named(named: str, question: str, judges: list[PlannedJudge], loaded: LoadedRecipe) -> str:
    local = {"quality": ("quality",), "harm": ("refusal",), "refusal": ("refusal",)}[question]
    if named in local:
        return named
    questions = (question, "refusal") if question == "harm" else (question,)
    for wanted in questions:
        if f"{named}.{wanted}" in {judge.name for judge in judges}:
            return f"{named}.{wanted}"
    where = loaded.marks.where(("judges", "decide", question))
    known = {judge.name.rpartition(".")[0] for judge in judges}
    if named in known:
        raise RecipeError(f"'{named}' is not asked about {question}", where=where, do=f"add {question} to its asks")
    raise RecipeError(f"no judge '{named}'", where=where, do=did_you_mean(named, [*known, *local]))


def lacks_reference(prompts: Iterable[Prompt]) -> Prompt | None:
    """The first prompt without a reference answer, which the local judge of quality needs."""
    return next((prompt for prompt in prompts if prompt.reference is None), None)


def calibrations(loaded: LoadedRecipe) -> dict[str, Path]:
    """Judge -> the file of its calibration, where the recipe names one.

    Raises:
        DataError: a file that is no calibration, or one of another question.
    """
    judges, found = loaded.recipe.judges, {}
    named: list[tuple[str, str, str, KeyPath]] = []
    if judges.refusal.calibration is not None:
        named.append(("refusal", "refusal", judges.refusal.calibration, ("judges", "refusal", "calibration")))
    for name, entry in judges.endpoints.items():
        place = ("judges", "endpoints", name, "calibration")
        named += [(f"{name}.{q}", q, file, (*place, q)) for q, file in entry.calibration.items()]
    for name, local in judges.classifiers.items():
        if local.calibration is not None:
            place = ("judges", "classifiers", name, "calibration")
            named.append((f"{name}.{local.asks}", local.asks, local.calibration, place))
    if named:
        from mixmerge.evaluate.calibrate import read_calibration  # scipy.stats takes half a second to import
    for judge, question, file, path in named:
        where = loaded.marks.where(path)
        try:
            calibration = read_calibration(loaded.folder / file)
        except UserError as error:
            raise error.within(where) from error
        if calibration["question"] != question:
            what = f"{file} measures verdicts on {calibration['question']}, not on {question}"
            raise RecipeError(what, where=where, do="measure it again: `mixmerge calibrate`")
        found[judge] = loaded.folder / file
    return found
