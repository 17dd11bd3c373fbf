"""From a judge step's spec to its judge: a local one, or a model behind an endpoint, whose server may have to be started."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mixmerge.run.servers import connect
from mixmerge.run.store import Store, read_json

if TYPE_CHECKING:
    from mixmerge.evaluate.classifier import Reading
    from mixmerge.evaluate.client import Client
    from mixmerge.evaluate.judge import Judge
    from mixmerge.plan.graph import Plan, Step
    from mixmerge.run.steps import StepContext


def judge_of(context: StepContext) -> Judge:
    """The judge that a step asks for."""
    return JUDGES[context.what["judge"]](context)


def _quality(context: StepContext) -> Judge:
    from mixmerge.evaluate.judge import ReferenceJudge

    return ReferenceJudge(margin=context.what["margin"])


def _check(context: StepContext) -> Judge:
    from mixmerge.evaluate.checks import Check

    return Check(context.what["check"], name="check", threshold=context.what["threshold"])


def _paired_check(context: StepContext) -> Judge:
    from mixmerge.evaluate.checks import Check, PairedCheck

    check = Check(context.what["check"], threshold=context.what["threshold"])
    return PairedCheck(check, margin=context.what["margin"])


def _language(context: StepContext) -> Judge:
    from mixmerge.evaluate.language import LanguageJudge

    return LanguageJudge(context.what["languages"])


def _refusal(context: StepContext) -> Judge:
    from mixmerge.evaluate.refusal import RefusalJudge

    folder = context.input("judge")
    found: Judge = context.keep(("judge", folder), lambda: RefusalJudge.load(folder))
    return found


def _endpoint(context: StepContext) -> Judge:
    from mixmerge.evaluate.endpoint import EndpointJudge
    from mixmerge.evaluate.rubrics import read_rubric

    what, how = context.what, context.how
    rubric = read_rubric(Path(how["rubric"])) if "rubric" in how else None
    fields = dict(what["fields"])
    return EndpointJudge(
        how["judge"],
        what["question"],
        how.get("folder_of_model", what["model"]),
        client_of(context),
        rubric=rubric,
        guard=what.get("guard"),
        seed=what["seed"],
        max_tokens=fields.pop("max_tokens"),
        temperature=fields.pop("temperature"),
        extra=fields,
        grammar=what.get("grammar", "auto"),
        longest=what["longest"],
        progress=context.progress,
    )


def _reading(what: Mapping[str, Any]) -> Reading:
    from mixmerge.evaluate.classifier import Reading

    keys = ("positive", "threshold", "thresholds", "otherwise")
    return Reading(what["labels"], **{key: what[key] for key in keys if key in what})


def _classifier(context: StepContext) -> Judge:
    from mixmerge.evaluate.classifier import ClassifierJudge
    from mixmerge.evaluate.guard import GuardJudge

    what, how = context.what, context.how
    kind: Any = GuardJudge if what["judge"] == "guard" else ClassifierJudge
    options = {key: what[key] for key in ("reads", "lead", "max_tokens") if key in what}
    options |= {"name": how["judge"], "threads": context.threads, "device": how["device"]}

    def load() -> Judge:
        found: Judge = kind(Path(how["path"]), _reading(what), **options)
        return found

    found: Judge = context.keep(("judge", how["path"], repr(what)), load)
    return found


def _pipeline(context: StepContext) -> Judge:
    from mixmerge.evaluate.classifier import PipelineJudge

    how = context.how
    reading = _reading(context.what)
    return PipelineJudge(Path(how["path"]), reading, name=how["judge"], trust_pickle=how.get("trust_pickle", False))


def _ngrams(context: StepContext) -> Judge:
    from mixmerge.evaluate.ngrams import NgramJudge

    what = context.what
    words = {word: word for word in what["labels"].values()}  # the rows' labels became verdicts before it was fitted
    return NgramJudge(context.input("judge"), _reading({**what, "labels": words}), name=context.how["judge"])


def client_of(context: StepContext) -> Client:
    """A client of the judge's server; its answers are on disk for all studies of the store."""
    model = context.how.get("folder_of_model", context.what["model"])
    what = context.what
    scope = json.dumps([what["model"], what["server"], what.get("attempt", 0)])
    name = f"judge {context.how['judge'].rpartition('.')[0]}"
    return connect(context, model, scope=scope, name=name, budget=context.how.get("budget")).client


def judge_steps(plan: Plan) -> dict[str, Step]:
    """A judge step of every judge of the plan, by the judge's name."""
    found: dict[str, Step] = {}
    for step in plan.steps:
        if step.kind == "judge":
            found.setdefault(step.how.get("judge", step.what["judge"]), step)
    return found


@contextmanager
def ready_judge(plan: Plan, root: Path, name: str, tell: Callable[[str], None]) -> Iterator[Judge]:
    """A judge of the plan, apart from any study's answers; a local one that has to be fitted is fitted first.

    tell: what a person should know while it is asked, such as a server that does not answer.

    Raises:
        UserError: a judge that the plan does not have.
        StepError: it could not be fitted.
    """
    from mixmerge.run.progress import Progress
    from mixmerge.run.runner import Study, run_plan
    from mixmerge.run.steps import StepContext, let_go

    step, store = judge_steps(plan)[name], Store(root)
    if "judge" in step.inputs and store.find(step.inputs["judge"]) is None:
        progress = Progress()
        try:
            run_plan(plan, root, jobs=1, threads=None, progress=progress, kinds=("fit-judge",)).check()
        finally:
            progress.stop()
        store.refresh()
    shared: dict[Any, Any] = {}
    store.folder.mkdir(parents=True, exist_ok=True)
    log = Study(root, plan.study).log(step)
    context = StepContext(step, root, root, store, shared, lambda done, total: None, tell, log)
    try:
        yield judge_of(context)
    finally:
        let_go(shared)


def spent(context: StepContext) -> dict[str, Any]:
    """What a judge's server was asked so far by this process, and what it cost, for the record; nothing of a local judge."""
    if "server" not in context.how:
        return {}
    return {"server": client_of(context).stats()}


@dataclass(frozen=True, slots=True)
class _Described:
    """A judge as it described itself when it judged."""

    name: str
    said: Mapping[str, Any]

    def describe(self) -> dict[str, Any]:
        return dict(self.said)


def checked_calibrations(context: StepContext, judges: Mapping[str, Sequence[Path]]) -> dict[str, dict[str, Any]]:
    """The calibrations that a score step names, each of them of the judge that gave the verdicts.

    judges: judge -> the files in which it described itself, one a step.

    Raises:
        DataError: a calibration that is gone, or of another judge; says what differs.
    """
    from mixmerge.evaluate.calibrate import read_calibration

    return {
        name: read_calibration(Path(file), _Described(name, _described(judges[name])))
        for name, file in context.how["calibrations"].items()
        if name in judges
    }


def _described(files: Sequence[Path]) -> dict[str, Any]:
    """What a judge says of itself where it was asked: before, it does not know what grammar its server has."""
    found = [read_json(file) for file in files]
    return next((said for said in found if said.get("grammar", {"used": True})["used"] is not None), found[0])


JUDGES: Mapping[str, Callable[[StepContext], Judge]] = {
    "quality": _quality,
    "check": _check,
    "paired-check": _paired_check,
    "language": _language,
    "refusal": _refusal,
    "endpoint": _endpoint,
    "classifier": _classifier,
    "guard": _classifier,
    "pipeline": _pipeline,
    "ngrams": _ngrams,
}
