"""From a recipe to its plan: every candidate's steps, then its evaluation, then scores and report.

Reads the data and prompt files (never a model's weights), so that an empty cell, a bad row, a missing prompt or a prompt
that also stands in the training data is found before anything starts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from mixmerge.data.account import Account, short_place
from mixmerge.data.formats import Row
from mixmerge.data.loading import Loaded, load_rows
from mixmerge.data.overlap import Overlap, PromptIndex, counted, in_brief, in_words
from mixmerge.data.sources import DataSource
from mixmerge.errors import MOST_NAMES, DataError, RecipeError, UserError, did_you_mean
from mixmerge.evaluate.checks import check_prompt
from mixmerge.evaluate.language import LanguageJudge
from mixmerge.evaluate.prompts import Prompt, asked_again, read_prompts
from mixmerge.evaluate.ready import PromptReading, prompt_reading
from mixmerge.hashes import FileHashes
from mixmerge.model.words import check_languages
from mixmerge.plan.evaluation import EvaluationPlan
from mixmerge.plan.graph import Plan, Step
from mixmerge.plan.judges import lacks_reference
from mixmerge.plan.mixture import Mixtures, covered
from mixmerge.plan.models import adopted_source, base_source, base_template
from mixmerge.plan.notes import left_to_defaults, missing_keys, missing_programs, too_few_gpus
from mixmerge.plan.training import HOW as TRAINING_HOW
from mixmerge.plan.training import (
    check_answers,
    check_context,
    check_devices,
    check_loggers,
    check_pairs,
    check_shares,
    check_targets,
    training_step,
)
from mixmerge.recipe.load import LoadedRecipe, merge_config
from mixmerge.recipe.schema import Adopted, DataSet, Trained

Cell = tuple[str, str]  # objective, language
Asked = tuple[str, str]  # candidate, prompt set


class PlanBuilder:
    """Adds steps in order; a step whose id is there already is the same step, whatever its name."""

    def __init__(self, loaded: LoadedRecipe, *, cache: Path | None = None, sample: int = 0) -> None:
        self.loaded, self.recipe, self.cache, self.sample = loaded, loaded.recipe, cache, sample
        self.steps: dict[str, Step] = {}
        self.models: dict[str, str] = {}
        self.data: dict[str, Loaded] = {}
        self.accounts: dict[str, Account] = {}
        self.sources = {name: data_source(data) for name, data in self.recipe.data.items()}
        self.languages = list(self.recipe.languages)
        self.dropped: dict[str, list[Overlap]] = {}  # by data set, or by where the rows of a judge are named
        self.notes: list[str] = []
        self.readings: dict[str, PromptReading] = {}  # by prompt set
        self.hashes = FileHashes(cache)  # of files of rows

    def build(self) -> Plan:
        """The whole plan.

        Raises:
            RecipeError, DataError, ModelError: whatever would fail later and can be seen now.
        """
        self._check_languages()
        check_loggers(self.recipe.how.report_to, self._where("how", "report_to"))
        check_devices(self.recipe.how, lambda key: self._where("how", key))
        rows = self._read_rows()
        prompts = self._read_prompts()
        self._check_prompts(prompts)
        self.index = self._index(prompts)
        rows = self._without_overlap(rows, prompts)
        self._add_base()
        self._add_candidates(rows)
        EvaluationPlan(self.loaded, self._add, self.models, self.index, self.dropped, self.cache).add(
            prompts, self.readings
        )
        self._check_titles()
        dropped = {name: counted(found) for name, found in self.dropped.items()}
        models, notes = self.models, tuple(self.notes)
        self.hashes.save()
        called = {"recipe": str(self.loaded.path.absolute())}
        return Plan(self.recipe.name, tuple(self.steps.values()), models, dropped, self.accounts, notes, called)

    def _add(self, kind: str, name: str, what: Mapping[str, Any], **rest: Any) -> str:
        step = Step(kind, name, what, **rest)
        self.steps.setdefault(step.id, step)
        return step.id

    def _where(self, *path: str | int) -> str:
        return self.loaded.marks.where(path)

    def _check_titles(self) -> None:
        """Refuse names whose dots give two steps one title: logs, `--only` and `step` go by it."""
        counts = Counter(step.title for step in self.steps.values())
        if twice := [title for title, count in counts.items() if count > 1]:
            what = f"several steps would be called {', '.join(twice[:MOST_NAMES])}, as names with a dot are joined to others by a dot"
            raise RecipeError(what, where=str(self.loaded.path), do="rename a candidate or a prompt set")

    # Reading what the recipe names

    def _check_languages(self) -> None:
        """Refuse a language that a judge, or trimming, knows nothing of."""
        try:
            LanguageJudge(self.languages)
            if self.recipe.base.trim_vocab is not None:
                check_languages(self.languages)
        except UserError as error:
            raise RecipeError(error.what, where=self._where("languages"), do=error.do) from error

    def _read_rows(self) -> dict[str, list[Row]]:
        for name, source in self.sources.items():
            try:
                languages = covered(self.recipe.data[name], self.languages)
                self.data[name] = load_rows(source, languages, self.loaded.folder, sample=self.sample)
            except DataError as error:
                raise error.within(self._where("data", name)) from error
        return {name: loaded.rows for name, loaded in self.data.items()}

    def _read_prompts(self) -> dict[str, list[Prompt]]:
        evaluation = self.recipe.evaluation
        if not evaluation.prompts:
            raise RecipeError("no prompt sets", where=self._where("evaluation", "prompts"), do="add at least one")
        limit = {k: v for k, v in evaluation.limit.model_dump().items() if v is not None}
        prompts = {}
        for name, prompt_set in evaluation.prompts.items():
            where = self._where("evaluation", "prompts", name)
            try:
                reading = prompt_reading(prompt_set.model_dump(), seed=self.recipe.seed)
                self.readings[name] = reading
                prompts[name] = read_prompts(
                    name,
                    prompt_set.path,
                    languages=self.languages,
                    relative_to=self.loaded.folder,
                    limit=limit,
                    **reading.arguments,
                )
            except UserError as error:
                raise error.within(where) from error
            for code in prompt_set.ask:
                if code not in self.languages:
                    place = self._where("evaluation", "prompts", name, "ask", code)
                    raise RecipeError(f"unknown language '{code}'", where=place, do=did_you_mean(code, self.languages))
            self._check_set(prompts[name], prompt_set.path, reading, where)
        return prompts

    def _check_set(self, prompts: list[Prompt], path: str, reading: PromptReading, where: str) -> None:
        """Refuse a set whose answers nobody could judge, or that has no test prompts in one of its languages."""
        needed = reading.purpose in ("general", "benchmark") and reading.check != "instructions"
        bare = lacks_reference(prompts) if needed else None
        panel = any("quality" in judge.asks for judge in self.recipe.judges.endpoints.values())
        if bare is not None and (reading.check is not None or not panel):
            do = "add 'reference' to its row, give the set another purpose, or name a judge that is asked about quality"
            raise RecipeError(f"no reference answer for prompt '{bare.id}' in {path}", where=where, do=do)
        if reading.check == "instructions" and (bare := next((p for p in prompts if not p.instructions), None)):
            do = "map them with `columns: {instructions: ..., arguments: ...}`"
            raise RecipeError(f"no instructions for prompt '{bare.id}' in {path}", where=where, do=do)
        if reading.check is not None:
            try:
                for prompt in prompts:
                    check_prompt(reading.check, prompt)
            except DataError as error:
                raise error.within(where) from error
        for code in dict.fromkeys(prompt.lang for prompt in prompts):
            if not any(p.lang == code and p.split == "test" for p in prompts):
                raise RecipeError(f"no test prompt in '{code}'", where=where, do="add some, or drop the language")

    # Training rows that ask what a prompt asks

    def _check_prompts(self, prompts: Mapping[str, list[Prompt]]) -> None:
        if self.recipe.evaluation.overlap.action == "ignore":
            return
        if (pair := asked_again(prompt for group in prompts.values() for prompt in group)) is not None:
            prompt, other = pair
            raise DataError(
                f"this {prompt.split} prompt of '{prompt.set}' is also a {other.split} prompt of '{other.set}', "
                f"at {other.where}: '{prompt.text.strip()}'",
                where=f"{self._where('evaluation', 'prompts', prompt.set)}: {prompt.where}",
                do="take it out of one of them, or set evaluation.overlap: ignore",
            )

    def _index(self, prompts: Mapping[str, list[Prompt]]) -> PromptIndex:
        overlap = self.recipe.evaluation.overlap
        texts = (prompt.text for group in prompts.values() for prompt in group)
        return PromptIndex(texts, None if overlap.action == "ignore" else overlap.near)

    def _without_overlap(self, rows: dict[str, list[Row]], prompts: Mapping[str, list[Prompt]]) -> dict[str, list[Row]]:
        """The rows to train on: all of them, or those that no prompt asks about."""
        overlap = self.recipe.evaluation.overlap
        if overlap.action == "ignore":
            return rows
        kept = {}
        for name, data in rows.items():
            sets = overlap.parallel.get(name, [])
            parallel = {prompt.pid: prompt.text for chosen in sets for prompt in prompts[chosen]}
            found = self.index.find(data, parallel)
            if found and overlap.action == "refuse":
                first = found[0]
                raise DataError(
                    f"{len(found)} training row(s) are also prompts: {in_words(counted(found))}; "
                    f"first row '{first.row_id}' ({first.kind}, {short_place(self.data[name].places[first.row_id])}): "
                    f"'{in_brief(first.prompt)}'",
                    where=self._where("data", name),
                    do="take them out of one side, or set evaluation.overlap: drop or ignore",
                )
            if found:
                self.dropped[name] = found
            gone = {overlap.row_id for overlap in found}
            kept[name] = [row for row in data if row.id not in gone]
        return kept

    # Candidates

    def _add_base(self) -> None:
        base = self.recipe.base
        content, place = base_source(base, self.loaded, self.cache)
        template = base_template(base, self.loaded, Path(place["path"]) if "path" in place else None)
        trim = {"size": base.trim_vocab, "languages": self.languages} if base.trim_vocab else None
        what = {"source": content, "trim": trim, "chat_template": template}
        check_answers(self.recipe.evaluation.max_new_tokens, place, self._where("evaluation", "max_new_tokens"))
        self.models["base"] = self._add("base", "base", what, how=place | {"chat_template": base.chat_template})

    def _add_candidates(self, rows: Mapping[str, list[Row]]) -> None:
        recipe, base = self.recipe, self.steps[self.models["base"]]
        mixtures = Mixtures(self.loaded, self.sources, self.data, rows, self.dropped, base, self.hashes)
        trained = recipe.experts | recipe.baselines
        needs = recipe.needs()
        while left := [name for name in needs if name not in self.models]:
            for name in left:
                if all(need in self.models for need in needs[name]):
                    if name in recipe.adopted:
                        self._add_adopted(name, recipe.adopted[name])
                    elif name in trained:
                        self._add_trained(name, trained[name], mixtures)
                    else:
                        self._add_merge(name)
        self.notes += mixtures.long.notes()
        trainings = {
            name: (recipe.training_of(entry), self.steps[self.models[name]]) for name, entry in trained.items()
        }
        self.notes += missing_programs(trainings, recipe.how, self._where("how", "launcher"))
        self.notes += too_few_gpus(recipe.how) if trainings else ()
        self.notes += left_to_defaults(trainings)
        self.notes += missing_keys(recipe)
        self.accounts = {name: mixtures.long.account(name) for name in self.data}

    def _add_adopted(self, name: str, entry: Adopted) -> None:
        """A model or adapter from outside, by content; what it was trained from is an input, which it has to fit."""
        start = self.steps[self.models[entry.start]]
        beside = Path(start.how["path"]) if start.kind == "base" and "path" in start.how else None
        trimmed = start.kind == "base" and start.what["trim"] is not None
        content, place = adopted_source(
            entry, self._where("adopted", name), self.loaded.folder, self.cache, start=None if trimmed else beside
        )
        how = place | self._how("threads")
        self.models[name] = self._add("adopt", name, {"source": content}, inputs={"start": start.id}, how=how)

    def _add_trained(self, name: str, entry: Trained, mixtures: Mixtures) -> None:
        """A mixture, and the training on it."""
        recipe, wanted = self.recipe, mixtures.wanted(name, entry)
        training, where = wanted.training, wanted.where
        place = partial(self._training_place, name, entry)
        settings = training_step(name, entry.training, training, recipe.seed, where, self.notes, place)
        base = self.steps[self.models["base"]]
        check_targets(training, base, place("training.adapter.targets"), restacked=entry.start != "base")
        check_context(training, base, place("training.max_length"))
        check_shares(settings, recipe.how, where)
        check_pairs(name, {data: mixtures.rows[data] for data in wanted.used}, training, where, self.notes)
        mixtures.check(wanted)
        # The base's tokenizer counts the tokens of every mixture, also of one whose budget is in rows.
        inputs = {"tokenizer": self.models["base"]}
        mixture = self._add(
            "mixture", name, mixtures.what(wanted), inputs=inputs, how=mixtures.how(wanted), group="mixture"
        )
        self.models[name] = self._add(
            "train",
            name,
            settings,
            inputs={"model": self.models[entry.start], "mixture": mixture},
            how=self._how("threads", "device", *TRAINING_HOW),
            # Adapters are small, so several share a process, which loads the libraries once; of all weights, each would add to it.
            group=f"train {name}" if training.adapter is not None else "",
        )

    def _training_place(self, name: str, entry: Trained, key: str) -> str:
        """Where a key such as `training.extra` stands that counts for a training: with its own keys, or the recipe's."""
        path = key.split(".")
        group = "experts" if name in self.recipe.experts else "baselines"
        return self._where(*((group, name) if path[1] in entry.training.model_fields_set else ()), *path)

    def _add_merge(self, name: str) -> None:
        config = merge_config(name, self.recipe.merges[name], self.loaded.marks).to_mergekit()
        # In the identity a model is a role, not a name: renaming a candidate changes nothing.
        roles = {entry["model"]: f"model{index}" for index, entry in enumerate(config["models"])}
        if (base := config.get("base_model")) is not None:
            roles.setdefault(base, "base")
            config["base_model"] = roles[base]
        config["models"] = [entry | {"model": roles[entry["model"]]} for entry in config["models"]]
        inputs = {role: self.models[model] for model, role in roles.items()}
        what = {"config": config, "seed": self.recipe.seed}
        self.models[name] = self._add("merge", name, what, inputs=inputs, how=self._how("threads"))

    def _how(self, *keys: str) -> dict[str, Any]:
        return {key: getattr(self.recipe.how, key) for key in keys}


def data_source(data: DataSet) -> DataSource:
    """The reader's view of a data set in the recipe."""
    return DataSource(**data.model_dump(exclude={"objective", "languages"}))


def build_plan(loaded: LoadedRecipe, *, cache: Path | None = None, sample: int = 0) -> Plan:
    """Plan a study; `cache` is a folder for fingerprints of large files.

    `sample` is the number of rows of each data set whose language is judged for the accounts, where that is but reported.
    """
    return PlanBuilder(loaded, cache=cache, sample=sample).build()
