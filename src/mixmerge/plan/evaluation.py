"""The plan of a study's evaluation: every candidate asked every prompt set, the answers judged, scored and reported."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from mixmerge.data.loading import load_rows
from mixmerge.data.overlap import Overlap, PromptIndex, counted, in_brief, in_words
from mixmerge.data.sources import DataSource, fingerprint, read_records
from mixmerge.errors import DataError
from mixmerge.evaluate.prompts import Prompt
from mixmerge.evaluate.refusal import LabelledText, check_labelled, labelled_rows
from mixmerge.plan.identity import fingerprint as identity_of
from mixmerge.recipe.budgets import budget_of
from mixmerge.recipe.load import LoadedRecipe

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
    ) -> None:
        self.loaded, self.recipe, self.languages = loaded, loaded.recipe, list(loaded.recipe.languages)
        self._add, self.models, self.index, self.dropped = add_step, models, index, dropped

    def add(self, prompts: Sets) -> None:
        """Generation, judging, scores and report.

        Raises:
            DataError: rows of a judge that no judge can be fitted on, or that are also prompts.
        """
        self.asked = {name: identity_of([prompt.identity() for prompt in found]) for name, found in prompts.items()}
        responses = self._add_generation()
        verdicts = self._add_judging(prompts, responses)
        self._add_report(responses, verdicts)

    def _add_generation(self) -> dict[Asked, str]:
        """Generate steps of every candidate, by candidate and prompt set."""
        recipe, responses = self.recipe, {}
        for candidate in recipe.candidates():
            for name in recipe.evaluation.prompts:
                responses[candidate, name] = self._add(
                    "generate",
                    f"{candidate}.{name}",
                    {
                        "prompts": self.asked[name],
                        "max_new_tokens": recipe.evaluation.max_new_tokens,
                    },
                    inputs={"model": self.models[candidate]},
                    how=self._prompts_how(name)
                    | {"batch_size": recipe.how.generate_batch_size}
                    | self._how("threads", "device"),
                    group=f"generate {self.models[candidate]}",
                )
        return responses

    def _add_judging(self, prompts: Sets, responses: Mapping[Asked, str]) -> dict[str, str]:
        """Judge steps of every candidate; returns `candidate/set/judge` -> judge step."""
        recipe, verdicts = self.recipe, {}
        judge = self._add_refusal_judge() if any(p[0].purpose != "general" for p in prompts.values()) else None
        for candidate in recipe.candidates():
            for name, prompt_set in recipe.evaluation.prompts.items():
                response = responses[candidate, name]
                judges: dict[str, tuple[dict[str, Any], dict[str, str]]] = {
                    "language": ({"judge": "language", "languages": self.languages}, {})
                }
                if prompt_set.purpose != "general" and judge is not None:
                    judges["refusal"] = ({"judge": "refusal"}, {"judge": judge})
                elif candidate != "base":
                    quality = {"judge": "quality", "margin": recipe.judges.quality.margin}
                    judges["quality"] = (quality, {"opponent": responses["base", name]})
                for kind, (what, inputs) in judges.items():
                    verdicts[f"{candidate}/{name}/{kind}"] = self._add(
                        "judge",
                        f"{candidate}.{name}.{kind}",
                        what,
                        inputs={"responses": response} | inputs,
                        how=self._prompts_how(name),
                        group="judge",
                    )
        return verdicts

    def _prompts_how(self, name: str) -> dict[str, Any]:
        """What a step needs to read a prompt set again."""
        evaluation = self.recipe.evaluation
        return {
            "set": name,
            "prompt_set": evaluation.prompts[name].model_dump(),
            "languages": self.languages,
            "limit": {k: v for k, v in evaluation.limit.model_dump().items() if v is not None},
            "folder": str(self.loaded.folder),
            "fingerprint": self.asked[name],
        }

    def _add_refusal_judge(self) -> str:
        settings = self.recipe.judges.refusal
        identity, gone = {}, {}
        for key in ("answers", "refusals"):
            source = DataSource(path=getattr(settings, key))
            where = self._where("judges", "refusal", key)
            try:
                rows = load_rows(source, self.languages, self.loaded.folder).rows
                identity[key] = fingerprint(source, self.languages, self.loaded.folder)
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

    def _add_report(self, responses: Mapping[Asked, str], verdicts: Mapping[str, str]) -> None:
        recipe = self.recipe
        sets = {name: spec.purpose for name, spec in recipe.evaluation.prompts.items()}
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
        made = {f"model/{name}": step for name, step in self.models.items()}
        judged = {f"verdicts/{key}": step for key, step in verdicts.items()}
        score = self._add("score", recipe.name, what, inputs=judged | made)
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
