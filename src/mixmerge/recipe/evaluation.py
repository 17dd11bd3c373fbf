"""What a recipe may say of evaluation: what candidates are asked, who judges the answers, how uncertainty is computed."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, field_validator, model_validator
from pydantic_core import PydanticCustomError

from mixmerge.addresses import EXAMPLE, fault_of, secret_in, without_requests
from mixmerge.recipe.secrets import secret_field
from mixmerge.recipe.section import Command, Count, Fraction, Language, Name, Positive, Section, Share, distinct_names

Question = Literal["quality", "harm", "refusal"]
Purpose = Literal["general", "harmful", "harmless", "benchmark"]
CheckKind = Literal["exact", "number", "span", "choice", "chrf", "instructions"]


class PromptSet(Section):
    """Prompts with a purpose, parallel across languages by id; `like` says how a known set is read."""

    like: str | None = Field(
        None,
        description="A ready-made way to read a known set (xsafety, xstest, mgsm, ...); then only path is needed. Keys that are "
        "given here count before it.",
    )
    purpose: Purpose | None = Field(
        None,
        description="general, harmful, harmless (look-alikes that should be answered), or benchmark: its share of right answers "
        "is reported beside the metrics. Needed unless like says it.",
    )
    path: str = Field(
        description="JSONL with id, prompt[, reference: one right answer or a list of them][, split]; {lang} stands for the "
        "language code."
    )
    columns: dict[str, str] = Field(
        {},
        description="Our column name -> the file's: id, prompt, reference, lang, split; choices (makes it multiple choice); "
        "instructions and arguments (IFEval's).",
    )
    where: dict[str, str | int | bool | list[str | int | bool]] = Field(
        {}, description="Only rows whose columns have these values, e.g. {set: multiq}; * and ? are patterns."
    )
    languages: list[Language] | None = Field(
        None, description="The languages that the set has; default: all of the recipe's."
    )
    language_in_id: str | None = Field(
        None, description="How the language stands in ids, e.g. -{lang}-: taken out, so that translations share an id."
    )
    splits: dict[str, Literal["dev", "test", "skip"]] = Field(
        {}, description="What the file's words for a split mean, e.g. {eval: test}; * is any word."
    )
    dev: Fraction | None = Field(
        None, description="Share of ids that is drawn as dev where the file has no splits, alike in every language."
    )
    ask: dict[Language, str] = Field(
        {}, description="Text put after each prompt, by language; of multiple choice it replaces ours."
    )
    check: CheckKind | None = Field(
        None,
        description="How right answers are known without a judge: exact, number (the last one), span (SQuAD's words), choice (a "
        "letter), chrf, or instructions (IFEval's). General sets then win and lose against the base by it.",
    )
    threshold: Annotated[float, Field(gt=0, le=1)] | None = Field(
        None, description="check: chrf: from this score on an answer is right; default: the score counts itself."
    )

    @model_validator(mode="after")
    def _known_purpose(self) -> Self:
        if self.purpose is None and self.like is None:
            raise ValueError("give purpose, or like for a known set")
        if self.threshold is not None and self.check != "chrf":
            raise ValueError("threshold goes with check: chrf")
        return self


class Limit(Section):
    """How many parallel prompts of each split to use; null: all of them."""

    dev: Annotated[int, Field(ge=0)] | None = Field(None, description="Prompts per set and language to choose on.")
    test: Annotated[int, Field(ge=1)] | None = Field(None, description="Prompts per set and language to report on.")


class Overlap(Section):
    """What is done about training rows that ask what a prompt asks; a plain word is the `action`."""

    action: Literal["refuse", "drop", "ignore"] = Field(
        "refuse",
        description="refuse the recipe, drop such rows from training and from the judge's rows (counted), or ignore them. "
        "A prompt that also stands in another set or another split is refused unless it is ignore.",
    )
    near: Annotated[float, Field(gt=0, le=1)] | None = Field(
        0.8,
        description="Least Jaccard similarity, over 5-character shingles, of a near duplicate; null: exact ones alone.",
    )
    parallel: dict[Name, list[Name]] = Field(
        {},
        description="Data sets whose row ids are the prompt ids of these prompt sets: equal ids are the same question, in "
        "whatever language.",
    )

    @model_validator(mode="before")
    @classmethod
    def _action_alone(cls, value: Any) -> Any:
        return {"action": value} if isinstance(value, str) else value


class Served(Section):
    """An OpenAI-compatible server: one that is there, by its URL, or one that mixmerge starts and stops."""

    url: str | list[str] | None = Field(
        None, description="Where it is, e.g. https://api.openai.com/v1; a list of URLs are equal replicas."
    )
    start: Command | None = Field(
        None,
        description="A command that starts it, without a shell: {model} is the folder or the name of the model, {port} a free "
        "port on this machine, e.g. vllm serve {model} --host 127.0.0.1 --port {port}.",
    )
    replicas: Count = Field(1, description="How many of it to start; CUDA devices are shared out among them.")
    ready_within: Positive = Field(600.0, description="Seconds that a started server may take to be ready.")
    key: str | None = Field(
        None, description="The environment variable that holds the key; the key itself never stands in a recipe."
    )
    timeout: Positive = Field(120.0, description="Seconds that one answer may take.")
    concurrency: Count = Field(256, description="Most requests at once; below it, as many as the server bears.")

    known_as: str | None = Field(
        None,
        description="What its answers are known by, so that it may move to another address without being asked again; default: "
        "its address, or the command that starts it.",
    )

    @field_validator("key", mode="before")
    @classmethod
    def _name_of_a_variable(cls, value: Any) -> Any:
        if isinstance(value, str) and not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", value):
            raise PydanticCustomError(
                "secret", "not the name of an environment variable; the key itself never stands here"
            )
        return value

    @field_validator("url", mode="before")
    @classmethod
    def _addresses(cls, value: Any) -> Any:
        for url in [value] if isinstance(value, str) else value if isinstance(value, list) else []:
            if isinstance(url, str) and secret_in(url):
                raise PydanticCustomError(
                    "secret", "an address holds a name, a password or a query, which may be secret"
                )
            fault = fault_of(url) if isinstance(url, str) else "it is no text"
            if fault is not None:
                raise PydanticCustomError("secret", f"not the address of a server, such as {EXAMPLE}: {fault}")
        if value == []:
            raise PydanticCustomError("secret", "no address is given")
        return value

    @model_validator(mode="after")
    def _one_server(self) -> Self:
        if (self.url is None) == (self.start is None):
            raise ValueError("give exactly one of url or start")
        if self.start is not None and "{port}" not in self.start:
            raise ValueError("start needs {port}: mixmerge finds a free one")
        if self.start is None and (odd := {"replicas", "ready_within"} & self.model_fields_set):
            raise ValueError(f"{min(odd)} goes with start")
        return self

    @property
    def urls(self) -> list[str]:
        """The addresses that are given; none where it is to be started."""
        given = [self.url] if isinstance(self.url, str) else self.url or []
        return [without_requests(url) for url in given]

    @property
    def identity(self) -> str | list[str]:
        """What its answers are known by, beside the model and the prompt."""
        return self.known_as or self.start or sorted(self.urls)

    @property
    def place(self) -> dict[str, Any]:
        """Where it is and how it is asked: what a step needs, and no part of its identity."""
        keys = {"start", "replicas", "ready_within", "key", "timeout", "concurrency"}
        return self.model_dump(include=keys) | {"urls": self.urls}


def _without_secrets(fields: Any) -> Any:
    """Refuse fields of a request that look like a secret, without repeating it."""
    if isinstance(fields, dict) and (name := secret_field(fields)) is not None:
        what = (
            f"{name} looks like a secret, and would be written into plan, record and report: name the environment "
            "variable that holds the key under `key`, which is sent as a bearer token"
        )
        raise PydanticCustomError("secret", "{what}", {"what": what})
    return fields


Fields = Annotated[dict[str, Any], BeforeValidator(_without_secrets)]


class GenerationServer(Served):
    """A server that answers the prompts in place of this process: one per candidate if mixmerge starts it."""

    model: str | None = Field(
        None,
        description="The candidate's name at the server, where {candidate} stands for its name here; default: {candidate} with "
        "url, its folder with start.",
    )
    extra: Fields = Field({}, description="Further fields of every request.")


class Harness(Section):
    """Tasks of lm-evaluation-harness for every candidate (pip install 'mixmerge[lm-eval]')."""

    tasks: list[str] = Field(min_length=1, description="Tasks, groups or tags by the harness' names, or your own.")
    include_path: str | None = Field(None, description="A folder of task YAMLs of your own, relative to the recipe.")
    limit: Count | None = Field(None, description="Documents per task at most; default: all.")
    num_fewshot: Annotated[int, Field(ge=0)] | None = Field(
        None, description="Examples in the prompt; default: the task's."
    )
    apply_chat_template: bool = Field(False, description="Ask through the candidate's chat template.")


class Evaluation(Section):
    """What every candidate is asked."""

    prompts: dict[Name, PromptSet] = Field(description="Prompt sets by name.")
    limit: Limit = Field(default_factory=Limit, description="Use fewer prompts than there are.")
    max_new_tokens: Count = Field(256, description="Longest response; a response cut there is counted as truncated.")
    harness: dict[Name, Harness] = Field(
        {}, description="Further evaluations by lm-evaluation-harness, by name; their results stand in the same tables."
    )
    temperature: Share = Field(0.0, description="Of the answers; 0: greedy. A sample is drawn by seed and prompt.")
    top_p: Annotated[float, Field(gt=0, le=1)] = Field(
        1.0, description="Sample from the likeliest tokens that together have this mass."
    )
    server: GenerationServer | None = Field(
        None, description="An OpenAI-compatible server that answers; default: transformers, in a process of mixmerge."
    )
    overlap: Overlap = Field(
        default_factory=Overlap,
        description="What to do when a prompt also stands in the training data, in another set or in another split: "
        "refuse, drop, ignore, or a mapping.",
    )

    @model_validator(mode="after")
    def _sampled(self) -> Self:
        if self.temperature == 0 and "top_p" in self.model_fields_set:
            raise ValueError("top_p goes with a temperature above 0")
        return self


class QualityJudge(Section):
    """General quality: which answer is nearer to the reference answer (chrF++)?"""

    margin: Fraction = Field(0.02, description="A chrF++ difference up to this is a tie.")


class RefusalJudge(Section):
    """Refused or complied: a classifier over sentence embeddings, fitted on labelled rows outside all prompt sets."""

    answers: str = Field("starter:train/general.{lang}.jsonl", description="Rows whose completion is an answer.")
    refusals: str = Field(
        "starter:train/safety.{lang}.jsonl",
        description="Rows with kind (harmful or harmless), chosen and rejected: refusals and answers, in twins.",
    )
    calibration: str | None = Field(
        None,
        description="A file that `mixmerge calibrate` wrote for it: rates are corrected by its errors there; default: by those "
        "of its cross-validation.",
    )


class Spending(Section):
    """What a judge may cost over the life of the store's file of answers; at the limit it stops and says what is missing."""

    requests: Count | None = Field(None, description="Requests.")
    tokens: Count | None = Field(None, description="Tokens, read and written.")
    money: Positive | None = Field(None, description="Money, in the currency of the prices.")
    price_in: Share | None = Field(None, description="Price of a million tokens read.")
    price_out: Share | None = Field(None, description="Price of a million tokens written.")

    @model_validator(mode="after")
    def _priced(self) -> Self:
        if self.money is not None and (self.price_in is None or self.price_out is None):
            raise ValueError("money needs price_in and price_out")
        if self.requests is None and self.tokens is None and self.money is None:
            raise ValueError("give at least one of requests, tokens or money")
        return self


class EndpointJudge(Served):
    """A model behind an OpenAI-compatible chat API judges: GPT-class, a guard, or any that a server of yours holds."""

    model: str = Field(min_length=1, description="Its name at the server; with start, a folder or a Hub id.")
    asks: list[Question] = Field(
        min_length=1,
        description="What it is asked: quality (whose answer is better, on general prompts), harm (on harmful ones), refusal "
        "(on harmful and harmless ones). A single word is a list of one.",
    )
    guard: str | None = Field(
        None,
        description="It is a guard, asked in its own form: llama-guard, qwen3guard, qwen3guard-loose, polyguard or wildguard.",
    )
    rubrics: dict[Question, str] = Field({}, description="Prompt files of yours in place of ours, by question.")
    grammar: Literal["auto", "json", "tags"] = Field(
        "auto", description="Verdicts by a JSON schema, or as tagged text; auto: by schema where the server has it."
    )
    max_tokens: Count = Field(512, description="Longest answer of the judge; a longer one has no verdict.")
    temperature: Share | None = Field(0.0, description="Of the judge's answer; null: left to the server.")
    extra: Fields = Field({}, description="Further fields of every request; null takes one out.")
    longest: Count = Field(
        12_000, description="Characters of each text that it is shown; longer ones are cut, counted."
    )
    attempt: Annotated[int, Field(ge=0)] = Field(
        0, description="Raise it to ask everything again, e.g. after a server gave answers without verdicts."
    )
    calibration: dict[Question, str] = Field(
        {}, description="Files that `mixmerge calibrate` wrote for it, by question: rates are corrected by them."
    )
    budget: Spending | None = Field(None, description="What it may cost; changes no verdict.")

    @field_validator("asks", mode="before")
    @classmethod
    def _one_word(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @field_validator("asks")
    @classmethod
    def _distinct(cls, value: list[Any]) -> list[Any]:
        return distinct_names(value)

    @model_validator(mode="after")
    def _asked(self) -> Self:
        if self.guard is not None and (beside := {"grammar", "rubrics"} & self.model_fields_set):
            raise ValueError(f"{min(beside)} does not go with guard: a guard is asked in its own form")
        for key in ("rubrics", "calibration"):
            if odd := [question for question in getattr(self, key) if question not in self.asks]:
                raise ValueError(f"{key}: it is not asked about {odd[0]}")
        return self


class ClassifierJudge(Section):
    """A model on this machine judges: a classifier, a guard, a scikit-learn pipeline, or n-grams fitted here."""

    kind: Literal["classifier", "guard", "pipeline", "ngrams"] = Field(
        "classifier",
        description="classifier: a transformers sequence-classification model; guard: a causal model that says a word (Llama "
        "Guard); pipeline: a scikit-learn pipeline in a joblib file; ngrams: fitted here from labelled rows.",
    )
    path: str = Field(
        description="Its folder of safetensors, or its joblib file; of ngrams the labelled rows (JSONL, CSV, Parquet)."
    )
    asks: Literal["harm", "refusal"] = Field(
        description="harm (on harmful prompts) or refusal (on harmful and harmless)."
    )
    labels: dict[str, str] = Field(
        min_length=1, description="Its label -> our verdict, e.g. {unsafe: harmful, safe: safe}."
    )
    positive: str | None = Field(None, description="The verdict that is looked for; default: the first of labels.")
    threshold: Fraction | None = Field(
        None, description="Least probability of the positive verdict; default: the likeliest verdict."
    )
    thresholds: dict[Language, Fraction] = Field({}, description="Thresholds of some languages.")
    otherwise: str | None = Field(
        None, description="The verdict where none of its labels is found, for models with labels for findings only."
    )
    reads: str | None = Field(
        None,
        description="response, pair (prompt and response), conversation (guards), or a template with {prompt} and {response}; "
        "default: response, or conversation for a guard.",
    )
    lead: str = Field("", description="guard: what it says before the word.")
    max_tokens: Annotated[int, Field(ge=8)] | None = Field(
        None, description="Longest text; a longer one is cut, counted."
    )
    columns: dict[str, str] = Field({}, description="ngrams: text, label, lang and group -> the file's columns.")
    trust_pickle: bool = Field(False, description="pipeline: read it although a pickle can run any code.")
    calibration: str | None = Field(None, description="A file that `mixmerge calibrate` wrote for it.")

    @model_validator(mode="after")
    def _fitting(self) -> Self:
        words = {"harm": {"harmful", "safe"}, "refusal": {"refused", "complied"}}[self.asks]
        said = {*self.labels.values(), *filter(None, (self.positive, self.otherwise))}
        if odd := sorted(said - words):
            raise ValueError(f"'{odd[0]}' is no verdict on {self.asks}; it is {' or '.join(sorted(words))}")
        return self


class Judges(Section):
    """Who judges. `quality` and `refusal` are local and always there; the report says how far each is to be trusted."""

    quality: QualityJudge = Field(default_factory=QualityJudge)
    refusal: RefusalJudge = Field(default_factory=RefusalJudge)
    endpoints: dict[Name, EndpointJudge] = Field({}, description="Models behind a chat API, by name.")
    classifiers: dict[Name, ClassifierJudge] = Field({}, description="Models on this machine, by name.")
    decide: dict[Question, Name] = Field(
        {},
        description="Whose verdicts make the metrics, by question; default: the first judge under endpoints or classifiers "
        "that is asked it, else the local one. The others stand beside, and their agreement is reported.",
    )


class Statistics(Section):
    """How uncertainty is computed."""

    draws: Annotated[int, Field(ge=100)] = Field(2000, description="Bootstrap draws.")
    level: Annotated[float, Field(gt=0.5, lt=1)] = Field(0.95, description="Level of the intervals.")
