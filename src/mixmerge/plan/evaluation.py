"""The plan of a study's evaluation: every candidate asked every prompt set, the answers judged, scored and reported."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any, cast

from mixmerge.data.loading import load_rows
from mixmerge.data.overlap import Overlap, PromptIndex, counted, in_brief, in_words
from mixmerge.data.sources import DataSource, fingerprint, read_records
from mixmerge.errors import DataError, RecipeError, UserError
from mixmerge.evaluate.harness_tasks import check_tasks, identity
from mixmerge.evaluate.prompts import Prompt
from mixmerge.evaluate.ready import PromptReading
from mixmerge.evaluate.refusal import LabelledText, check_labelled, labelled_rows
from mixmerge.hashes import FileHashes
from mixmerge.plan.identity import fingerprint as identity_of
from mixmerge.plan.judges import (
    ASKED_ON,
    PlannedJudge,
    calibrations,
    checked_start,
    deciding,
    lacks_reference,
    planned_judges,
)
from mixmerge.recipe.budgets import budget_of
from mixmerge.recipe.evaluation import GenerationServer
from mixmerge.recipe.load import LoadedRecipe

HARNESS_BATCH = 16
Asked = tuple[str, str]  # candidate, prompt set
Sets = Mapping[str, list[Prompt]]


class EvaluationPlan:
    """Adds the steps that come after the candidates; `add_step` is the plan builder's, `models` its candidates' steps."""

    def __init__(
        self,
        loaded: LoadedRecipe,
        add_step: Callable[..., str],
        models: Mapping[str, str],
        index: PromptIndex,
        dropped: dict[str, list[Overlap]],
        cache: Path | None,
    ) -> None:
        self.loaded, self.recipe, self.languages = loaded, loaded.recipe, list(loaded.recipe.languages)
        self._add, self.models, self.index, self.dropped = add_step, models, index, dropped
        self.panel, self.refusal, self.cache = planned_judges(loaded, cache), cast(str | None, None), cache

    def add(self, prompts: Sets, readings: Mapping[str, PromptReading]) -> None:
        """Generation, judging, scores and report; `readings` say what the sets are for and how they are checked.

        Raises:
            DataError: rows of a judge that no judge can be fitted on, or that are also prompts.
        """
        self.prompts, self.readings = prompts, readings
        self.asked = {name: identity_of([prompt.identity() for prompt in found]) for name, found in prompts.items()}
        responses = self._add_generation()
        verdicts = self._add_judging(prompts, responses)
        self._add_report(responses, verdicts, self._add_harness())

    def _add_generation(self) -> dict[Asked, str]:
        """Generate steps of every candidate, by candidate and prompt set."""
        recipe, responses = self.recipe, {}
        for candidate in recipe.candidates():
            for name in recipe.evaluation.prompts:
                responses[candidate, name] = self._add(
                    "generate",
                    f"{candidate}.{name}",
                    {"prompts": self.asked[name]} | self._engine(candidate),
                    inputs={"model": self.models[candidate]},
                    how=self._prompts_how(name)
                    | {"batch_size": recipe.how.generate_batch_size}
                    | self._shared_out()
                    | self._server(candidate)
                    | self._how("threads", "device"),
                    group=f"generate {self.models[candidate]}",
                )
        return responses

    def _shared_out(self) -> dict[str, Any]:
        """The processes that share a generation, where there are several."""
        asked = self.recipe.how.generate_processes
        if asked > 1 and self.recipe.evaluation.server is not None:
            do = "leave it out; a server that is started takes replicas"
            where = self._where("how", "generate_processes")
            raise RecipeError("a server answers, which is asked everything at once", where=where, do=do)
        return {"processes": asked} if asked > 1 else {}

    def _engine(self, candidate: str) -> dict[str, Any]:
        """What decides an answer, beside the model and the prompt."""
        evaluation = self.recipe.evaluation
        what: dict[str, Any] = {"max_new_tokens": evaluation.max_new_tokens}
        if evaluation.temperature > 0:
            what |= {"temperature": evaluation.temperature, "top_p": evaluation.top_p, "seed": self.recipe.seed}
        if evaluation.server is not None:
            what["server"] = {
                "known_as": evaluation.server.identity,
                "called": self._called(candidate, evaluation.server),
                "extra": evaluation.server.extra,
            }
        return what

    def _server(self, candidate: str) -> dict[str, Any]:
        """Where a candidate is asked, if not in a process of ours."""
        server = self.recipe.evaluation.server
        if server is None:
            return {}
        if server.start is not None:
            checked_start(server.start, self._where("evaluation", "server", "start"))
        return {"server": server.place}

    def _called(self, candidate: str, server: GenerationServer) -> str | None:
        """A candidate's name at the server; None: its folder."""
        name = server.model or ("{candidate}" if server.start is None else None)
        if name is None:
            return None
        where = self._where("evaluation", "server", "model")
        if server.start is None and "{candidate}" not in name and len(self.recipe.candidates()) > 1:
            do = "name the candidates with {candidate}"
            raise RecipeError(f"'{name}' would answer for every candidate", where=where, do=do)
        if odd := re.search(r"\{(?!candidate\})[^{}]*\}", name):
            raise RecipeError(f"unknown {odd[0]}", where=where, do="{candidate} stands for the candidate's name")
        return name.replace("{candidate}", candidate)

    def _add_harness(self) -> dict[str, str]:
        """Steps of lm-evaluation-harness; returns `candidate/evaluation` -> step."""
        found = {}
        for name, entry in self.recipe.evaluation.harness.items():
            folder = None if entry.include_path is None else self.loaded.folder / Path(entry.include_path).expanduser()
            try:
                definitions = identity(check_tasks(entry.tasks, folder))
            except UserError as error:
                raise error.within(self._where("evaluation", "harness", name)) from error
            what = entry.model_dump(exclude={"include_path"}) | {"definitions": definitions, "seed": self.recipe.seed}
            how = {"include_path": None if folder is None else str(folder), "batch_size": HARNESS_BATCH}
            for candidate in self.recipe.candidates():
                found[f"{candidate}/{name}"] = self._add(
                    "harness",
                    f"{candidate}.{name}",
                    what,
                    inputs={"model": self.models[candidate]},
                    how=how | self._how("threads", "device"),
                    group="harness",
                )
        return found

    def _add_judging(self, prompts: Sets, responses: Mapping[Asked, str]) -> dict[str, str]:
        """Judge steps of every candidate; returns `candidate/set/judge` -> judge step."""
        verdicts = {}
        if any(p[0].purpose in ASKED_ON["refusal"] for p in prompts.values()):
            self.refusal = self._add_refusal_judge()
        for candidate in self.recipe.candidates():
            for name, asked in prompts.items():
                inputs = {"responses": responses[candidate, name]}
                opponent = {"opponent": responses["base", name]}
                for judge in self._judges_of(name, asked):
                    if judge.question == "quality" and candidate == "base":
                        continue  # against itself: a tie by definition
                    fitted = {"judge": self._fit(judge)} if judge.what["judge"] == "ngrams" else {}
                    verdicts[f"{candidate}/{name}/{judge.name}"] = self._add(
                        "judge",
                        f"{candidate}.{name}.{judge.name}",
                        judge.what,
                        inputs=inputs | (opponent if judge.question == "quality" else {}) | dict(judge.inputs) | fitted,
                        how=self._prompts_how(name) | dict(judge.how),
                        group=judge.group,
                    )
        return verdicts

    def _judges_of(self, name: str, asked: list[Prompt]) -> Iterator[PlannedJudge]:
        """The judges of the answers to a prompt set: the local ones that fit, then those that the recipe names."""
        reading, margin = self.readings[name], self.recipe.judges.quality.margin
        yield PlannedJudge("language", "language", {"judge": "language", "languages": self.languages})
        if reading.purpose in ASKED_ON["refusal"] and self.refusal is not None:
            yield PlannedJudge("refusal", "refusal", {"judge": "refusal"}, inputs={"judge": self.refusal})
        check = {"check": reading.check, "threshold": reading.threshold}
        if reading.check is not None:
            yield PlannedJudge("check", "correct", {"judge": "check"} | check)
        if reading.purpose == "general" and reading.check is not None:
            yield PlannedJudge("quality", "quality", {"judge": "paired-check", "margin": margin} | check)
        elif reading.purpose == "general" and not lacks_reference(asked):
            yield PlannedJudge("quality", "quality", {"judge": "quality", "margin": margin})
        yield from (judge for judge in self.panel if reading.purpose in judge.purposes)

    def _fit(self, judge: PlannedJudge) -> str:
        """The step that fits an n-gram classifier; one for all candidates."""
        keys = ("judge", "labels", "rows", "columns", "seed")
        what = {key: judge.what[key] for key in keys}
        return self._add("fit-judge", judge.name, what, how={"path": judge.how["path"]}, group="judge")

    def _prompts_how(self, name: str) -> dict[str, Any]:
        """What a step needs to read a prompt set again."""
        evaluation = self.recipe.evaluation
        return {
            "set": name,
            "prompt_set": evaluation.prompts[name].model_dump(),
            "languages": self.languages,
            "limit": {k: v for k, v in evaluation.limit.model_dump().items() if v is not None},
            "folder": str(self.loaded.folder),
            "seed": self.recipe.seed,
            "fingerprint": self.asked[name],
            "prompts": len(self.prompts[name]),
        }

    def _add_refusal_judge(self) -> str:
        settings = self.recipe.judges.refusal
        identity, gone, hashes = {}, {}, FileHashes(self.cache)
        for key in ("answers", "refusals"):
            source = DataSource(path=getattr(settings, key))
            where = self._where("judges", "refusal", key)
            try:
                rows = load_rows(source, self.languages, self.loaded.folder).rows
                identity[key] = fingerprint(source, self.languages, self.loaded.folder, hashes)
            except DataError as error:
                raise error.within(where) from error
            found = self.index.find(rows)
            if found and self.recipe.evaluation.overlap.action != "drop":
                raise DataError(
                    f"{len(found)} row(s) of the judge are also prompts: {in_words(counted(found))}; "
                    f"first '{in_brief(found[0].prompt)}'",
                    where=where,
                    do="take them out of one side, or set evaluation.overlap: drop",
                )
            if found:
                self.dropped[f"judges.refusal.{key}"] = found
            gone[key] = sorted({overlap.row_id for overlap in found})
        hashes.save()
        labelled: list[LabelledText] = []
        try:
            for code in self.languages:
                answers, refusals = (
                    read_records(DataSource(path=path), code, self.loaded.folder)
                    for path in (settings.answers, settings.refusals)
                )
                labelled += labelled_rows(answers, refusals, lang=code, without=gone)
            check_labelled(labelled, seed=self.recipe.seed)
        except DataError as error:
            raise error.within(self._where("judges", "refusal")) from error
        what = {"judge": "refusal", "rows": identity, "languages": self.languages, "seed": self.recipe.seed}
        what |= {"dropped": gone} if any(gone.values()) else {}
        how = {"folder": str(self.loaded.folder), "answers": settings.answers, "refusals": settings.refusals}
        return self._add("fit-judge", "refusal", what, how=how, group="judge")

    def _add_report(
        self, responses: Mapping[Asked, str], verdicts: Mapping[str, str], benches: Mapping[str, str]
    ) -> None:
        recipe = self.recipe
        sets = {name: reading.purpose for name, reading in self.readings.items()}
        needs = recipe.needs()
        candidates = [
            {"name": name, "kind": kind, "made_from": needs.get(name, [])} | self._budget_rule(name)
            for name, kind in recipe.candidates().items()
        ]
        what = {
            "candidates": candidates,
            "prompt_sets": sets,
            "languages": self.languages,
            "statistics": recipe.statistics.model_dump(),
            "seed": recipe.seed,
        }
        if checks := {name: reading.check for name, reading in self.readings.items() if reading.check is not None}:
            what["checks"] = checks
        decide = deciding(self.loaded, self.panel)
        if self.panel:
            what |= {"judges": {judge.name: judge.question for judge in self.panel}, "decide": decide}
        files = calibrations(self.loaded)
        if files:
            what["calibrations"] = {judge: sha256(file.read_bytes()).hexdigest() for judge, file in files.items()}
        benched = {f"harness/{key}": step for key, step in benches.items()}
        made = {f"model/{name}": step for name, step in self.models.items()}
        judged = {f"verdicts/{key}": step for key, step in verdicts.items()}
        if self.refusal is not None:
            judged["judge/refusal"] = self.refusal
        how: dict[str, Any] = {
            "calibrations": {judge: str(file) for judge, file in files.items()},
            "prompts": {name: parallel(found) for name, found in self.prompts.items()},
        }
        score = self._add("score", recipe.name, what, inputs=judged | made | benched, how=how)
        answers = {f"responses/{candidate}/{name}": step for (candidate, name), step in responses.items()}
        how = {"recipe": str(self.loaded.path), "sets": {name: self._prompts_how(name) for name in self.asked}}
        merges = {f"merge/{name}": self.models[name] for name in recipe.merges}
        trained = {f"train/{name}": self.models[name] for name in recipe.experts | recipe.baselines}
        inputs = {"score": score} | answers | judged | merges | trained
        self._add("report", recipe.name, {"study": recipe.name}, inputs=inputs, how=how)

    def _budget_rule(self, name: str) -> dict[str, str]:
        """What the scores say of a baseline whose budget follows from the experts'."""
        rule = budget_of(self.recipe, name, self.loaded.marks).rule if name in self.recipe.baselines else None
        return {"budget_rule": rule} if rule else {}

    def _how(self, *keys: str) -> dict[str, Any]:
        return {key: getattr(self.recipe.how, key) for key in keys}

    def _where(self, *path: str | int) -> str:
        return self.loaded.marks.where(path)


def parallel(prompts: Iterable[Prompt]) -> dict[str, list[dict[str, Any]]]:
    """Parallel prompts of each split, by the languages that they stand in: a prompt and its translations are one."""
    languages: dict[tuple[str, str], tuple[str, ...]] = {}
    for prompt in prompts:
        key = prompt.split, prompt.pid
        languages[key] = (*languages.get(key, ()), prompt.lang)
    out: dict[str, list[dict[str, Any]]] = {}
    for wanted in ("dev", "test"):
        counts = Counter(found for (split, _), found in languages.items() if split == wanted)
        out[wanted] = [{"languages": list(found), "prompts": count} for found, count in counts.items()]
    return out
