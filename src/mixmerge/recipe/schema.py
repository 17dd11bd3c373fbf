"""What a recipe may say: every key, its type, its range and its default.

The one idea: a recipe is data, checked whole before anything starts. Unknown keys are refused, numbers have ranges,
fractions are 0..1. Everything under `how` can change speed but never a result; all the rest is part of a step's identity.
The JSON Schema for editors and the recipe reference in docs/ are generated from these classes.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from mixmerge.recipe.evaluation import Evaluation, Judges, Statistics
from mixmerge.recipe.section import (
    Command,
    Count,
    Fraction,
    Language,
    Name,
    Options,
    Positive,
    Section,
    Share,
    distinct_names,
)

Loss = Literal[
    "sigmoid",
    "hinge",
    "ipo",
    "exo_pair",
    "nca_pair",
    "robust",
    "bco_pair",
    "sppo_hard",
    "aot",
    "aot_unpaired",
    "apo_zero",
    "apo_down",
    "discopop",
    "sigmoid_norm",
]


class Base(Section):
    """The model that everything starts from: one of `path`, `hub` or `package`."""

    path: str | None = Field(None, description="A local model folder (safetensors), relative to the recipe.")
    hub: str | None = Field(None, description="A Hugging Face Hub id, e.g. google/gemma-3-270m.")
    revision: str | None = Field(None, description="Branch, tag or commit of the Hub id; the commit is recorded.")
    package: str | None = Field(None, description="A Python package that carries the weights (the embedded default).")
    trim_vocab: Count | None = Field(
        None,
        description="Trim the vocabulary to about this many tokens, chosen by word frequency in the recipe's languages.",
    )
    chat_template: str | None = Field(
        None,
        description="For a base without one: chatml, gemma, llama3, or the path of a Jinja file, relative to the recipe.",
    )

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        given = [key for key in ("path", "hub", "package") if getattr(self, key) is not None]
        if len(given) != 1:
            raise ValueError(f"give exactly one of path, hub or package (given: {', '.join(given) or 'none'})")
        if self.revision is not None and self.hub is None:
            raise ValueError("revision goes with hub only")
        return self


class Adopted(Section):
    """A model or an adapter that was trained elsewhere; it stands beside the recipe's own experts."""

    path: str | None = Field(
        None, description="A local folder of a model or of a PEFT adapter, relative to the recipe."
    )
    hub: str | None = Field(None, description="A Hugging Face Hub id of either.")
    revision: str | None = Field(None, description="Branch, tag or commit of the Hub id; the commit is recorded.")
    start: Name = Field("base", description="The candidate that it was trained from, and that an adapter is put on.")

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if (self.path is None) == (self.hub is None):
            raise ValueError("give exactly one of path or hub")
        if self.revision is not None and self.hub is None:
            raise ValueError("revision goes with hub only")
        return self


class DataSet(Section):
    """Rows for one objective: local files or a Hub data set."""

    objective: Name = Field(description="What the rows are for: general, safety, or any name of yours.")
    path: str | None = Field(
        None,
        description="JSONL, JSON, CSV, TSV (also .gz, .bz2, .xz, .zst) or Parquet, relative to the recipe; {lang} stands "
        "for the language code; starter: for the data that comes with mixmerge.",
    )
    hub: str | None = Field(
        None,
        description="A Hub data set id, or ./folder: a local folder that `datasets` can load, relative to the recipe.",
    )
    config: str | None = Field(None, description="Configuration of the Hub data set; {lang} is replaced.")
    split: str = Field("train", description="Split of the Hub data set.")
    revision: str | None = Field(None, description="Branch, tag or commit of the Hub data set; the commit is recorded.")
    streaming: bool = Field(
        False, description="Fetch no more of the Hub data set than is read, e.g. up to `limit`: for large ones."
    )
    languages: list[Language] | None = Field(
        None, description="Languages that it covers; default: all of the recipe's."
    )
    lang: Language | None = Field(None, description="The language of every row, where neither path nor rows say it.")
    lang_column: str | None = Field(
        None,
        description="The column that names each row's language: en, en-US, eng, English. Rows in other languages are "
        "skipped and counted.",
    )
    columns: dict[str, str] = Field(
        {}, description="Our column name -> the data's, e.g. {prompt: question, completion: answer}."
    )
    limit: Count | None = Field(None, description="Rows per language at most, in file order; reading stops there.")
    bad_rows: Literal["refuse", "drop"] = Field(
        "refuse",
        description="Rows that cannot be used (empty, out of order, no UTF-8, a prompt that fills max_length, ...): refuse "
        "the data set, or leave them out and count them by kind.",
    )
    wrong_language: Literal["report", "drop", "refuse"] = Field(
        "report",
        description="Rows evidently in another language than they say: report how many there are among 1,000 drawn ones, "
        "or judge every row and leave them out or refuse the data set.",
    )

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if (self.path is None) == (self.hub is None):
            raise ValueError("give exactly one of path or hub")
        if self.lang is not None and self.lang_column is not None:
            raise ValueError("give lang or lang_column, not both")
        if self.streaming and self.hub is None:
            raise ValueError("streaming goes with hub only; files are always read row by row")
        return self


class Budget(Section):
    """How much a training sees: `tokens` (prompt and answer, as the model reads them), `rows`, or a rule over experts."""

    tokens: Count | None = Field(None, description="Tokens of the whole mixture, prompts included.")
    rows: Count | None = Field(None, description="Rows of the whole mixture.")
    sum: list[Name] | None = Field(
        None, description="Baselines: the budgets of these experts together; `budget: sum` means of all experts."
    )
    each: list[Name] | None = Field(
        None, description="Baselines: the budget that each of these experts has; `budget: each` means all experts."
    )

    @property
    def rule(self) -> Literal["sum", "each"] | None:
        """The rule that it is, or None for a number."""
        return "sum" if self.sum is not None else "each" if self.each is not None else None

    @model_validator(mode="before")
    @classmethod
    def _rule_alone(cls, value: Any) -> Any:
        return {value: []} if value in ("sum", "each") else value

    @field_validator("sum", "each")
    @classmethod
    def _distinct(cls, value: list[str] | None) -> list[str] | None:
        return None if value is None else distinct_names(value)

    @model_validator(mode="after")
    def _one_of_all(self) -> Self:
        if sum(part is not None for part in (self.tokens, self.rows, self.sum, self.each)) != 1:
            raise ValueError("give exactly one of tokens or rows (or sum or each, for a baseline)")
        return self


class StudyBudget(Section):
    """How much every training sees, unless it says otherwise."""

    tokens: Count | None = Field(None, description="Tokens of the whole mixture, prompts included.")
    rows: Count | None = Field(None, description="Rows of the whole mixture.")
    baselines: Budget | None = Field(None, description="Another one for every baseline, e.g. sum: equal cost.")

    @model_validator(mode="after")
    def _one_unit(self) -> Self:
        if (self.tokens is None) == (self.rows is None):
            raise ValueError("give exactly one of tokens or rows")
        return self


class Adapter(Section):
    """Train few weights beside a frozen model, by PEFT; the result is folded in, and the adapter kept beside it."""

    type: Literal["lora", "dora", "qlora"] = Field(
        "lora", description="qlora holds the frozen model in 4 bits (pip install 'mixmerge[qlora]')."
    )
    r: Count = Field(16, description="Rank.")
    alpha: Positive = Field(32.0, description="The change is scaled by alpha / r.")
    dropout: Annotated[float, Field(ge=0, lt=1)] = Field(0.0, description="Share of inputs dropped; sft alone.")
    targets: Literal["all-linear"] | list[str] = Field(
        "all-linear", description="Names of the modules, or all-linear: every linear layer but the output's."
    )
    use_rslora: bool = Field(False, description="Scale by alpha / sqrt(r) instead.")


class Training(Section):
    """How a model is fine-tuned. A training's own keys override the recipe's `training`."""

    engine: Literal["trl", "command"] = Field("trl", description="Train by TRL here, or by a command of your own.")
    command: Command | None = Field(
        None,
        description="engine: command: a program and its arguments, without a shell. {model}, {mixture}, {out} are folders; "
        "{work} is one that survives a kill; {learning_rate} and the like are keys of this section; {launcher} is how.launcher.",
    )
    method: Literal["sft", "dpo"] = Field(
        "sft", description="sft learns the answers (of pairs: the chosen ones); dpo learns what pairs prefer."
    )
    learning_rate: Positive | None = Field(
        None, description="Peak learning rate; default: 2e-5 for sft and 1e-6 for dpo; ten times that with an adapter."
    )
    adapter: Adapter | None = Field(None, description="Train an adapter in place of all weights.")
    save_dtype: Literal["bfloat16", "float16", "float32"] | None = Field(
        None, description="Stored type of the result; default: that of the start."
    )
    epochs: Positive = Field(1.0, description="Passes over the mixture.")
    batch_size: Count = Field(8, description="Rows per optimiser step.")
    max_length: Annotated[int, Field(ge=16)] = Field(1024, description="Longest row in tokens; longer is cut, counted.")
    warmup_ratio: Fraction = Field(0.1, description="Share of the steps that warm up.")
    scheduler: Literal[
        "cosine",
        "linear",
        "constant",
        "cosine_with_restarts",
        "cosine_with_min_lr",
        "polynomial",
        "inverse_sqrt",
        "warmup_stable_decay",
    ] = Field(
        "cosine", description="Learning-rate schedule; what it takes besides goes into extra.lr_scheduler_kwargs."
    )
    weight_decay: Share = Field(0.0, description="Decoupled weight decay.")
    precision: Literal["bf16", "fp32"] = Field("bf16", description="Arithmetic; weights and updates are always fp32.")
    max_repeats: Count = Field(4, description="How often a row may be drawn to fill the budget.")
    seed: Annotated[int, Field(ge=0)] | None = Field(None, description="Seed of this training; default: the recipe's.")
    gradient_accumulation: Count = Field(
        1, description="Parts that a batch is computed in, one after another: less memory, the same rows per step."
    )
    optimizer: Literal["adamw", "adafactor", "sgd", "rmsprop", "adagrad", "adamw_8bit", "lion"] = Field(
        "adamw", description="Optimiser; the last two by bitsandbytes (pip install 'mixmerge[qlora]')."
    )
    adam_betas: list[Fraction] = Field([0.9, 0.999], description="Decay of AdamW's two means.")
    adam_epsilon: Positive = Field(1e-8, description="AdamW's epsilon.")
    max_grad_norm: Share = Field(1.0, description="A gradient with a larger norm is scaled down to it; 0: never.")
    neftune_alpha: Positive | None = Field(None, description="Noise on the embeddings while training (NEFTune).")
    train_on: Literal["last", "all"] = Field(
        "last", description="sft: learn the last answer of a conversation, or all turns of the assistant."
    )
    padding_free: bool = Field(
        False,
        description="sft: rows of a batch one after another, not padded to the longest; quick with flash attention.",
    )
    held_out: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.0,
        description="Share of all prompts, by a hash of each: rows with them are never trained on; their loss, by language, "
        "shows the learning.",
    )
    extra: Options = Field(
        {}, description="Other options of TRL's SFTConfig or DPOConfig, by their own names; see TRL's documentation."
    )
    beta: Positive = Field(0.1, description="dpo: how strongly the start holds back; larger stays nearer to it.")
    loss: Loss = Field("sigmoid", description="dpo: the loss, one of TRL's; sigmoid is that of the DPO paper.")
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = Field(
        0.0, description="dpo: share of pairs taken to be the wrong way round; for robust, exo_pair, aot, aot_unpaired."
    )


class Trained(Section):
    """An expert or a baseline: a start, a mixture and a budget."""

    mixture: dict[Name, Share] = Field(description="Share of each objective; a single name means all of it.")
    languages: dict[Language, Share] = Field({}, description="Languages and their shares; default: all, equally.")
    temperature: Annotated[float, Field(ge=1, allow_inf_nan=False)] | None = Field(
        None,
        description="Languages by the rows that there are: each objective's part is shared by rows^(1/temperature), times "
        "the shares under `languages`. 1: as the data are; larger: nearer to equal. A language without rows gets nothing.",
    )
    caps: dict[str, Fraction] = Field(
        {},
        description="Largest share of the mixture by language, by objective, or by cell, e.g. {en: 0.5} or {safety/hi: 0.1}; "
        "the excess goes to the others in proportion.",
    )
    max_repeats: dict[str, Count] = Field(
        {}, description="Overrides training.max_repeats by language, by objective, or by cell, e.g. {safety/hi: 8}."
    )
    budget: Budget | None = Field(
        None, description="Overrides the recipe's budget; a baseline's may be sum or each: what the experts have."
    )
    start: Name = Field("base", description="The candidate that the training starts from.")
    training: Training = Field(default_factory=Training, description="Overrides of the recipe's `training`.")

    @field_validator("mixture", mode="before")
    @classmethod
    def _single_objective(cls, value: Any) -> Any:
        return {value: 1.0} if isinstance(value, str) else value

    @field_validator("languages", mode="before")
    @classmethod
    def _equal_languages(cls, value: Any) -> Any:
        return dict.fromkeys(distinct_names(value), 1.0) if isinstance(value, list) else value

    @field_validator("mixture", "languages")
    @classmethod
    def _some_share(cls, value: dict[str, float]) -> dict[str, float]:
        if value and not sum(value.values()) > 0:
            raise ValueError("the shares add up to 0; give at least one share above 0")
        return value


class Merge(Section):
    """A model computed from other candidates' weights; parameters as in a mergekit YAML."""

    method: str = Field(description="one of those that `mixmerge methods` lists.")
    models: dict[Name, dict[str, Any]] = Field(
        description="Candidates to merge and their parameters, e.g. {general: {weight: 0.5}}; or a list of names."
    )
    base: Name | None = Field(
        None, description="Reference of the task vectors (default: base); for slerp, the candidate at t = 0."
    )
    parameters: dict[str, Any] = Field({}, description="Parameters for all models, e.g. {t: 0.5, density: 0.5}.")
    dtype: Literal["float32", "bfloat16", "float16"] | None = Field(
        None, description="Stored type; default: that of the models."
    )

    @field_validator("models", mode="before")
    @classmethod
    def _names_only(cls, value: Any) -> Any:
        if isinstance(value, list):
            return {name: {} for name in distinct_names(value)}
        return {k: {} if v is None else v for k, v in value.items()} if isinstance(value, dict) else value


class How(Section):
    """Speed only: nothing here changes a result or a step's identity."""

    threads: Count | None = Field(None, description="Threads per step; default: the cores this process may use.")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="Where models train, generate and judge.")
    jobs: Count | None = Field(
        None, description="Steps at once at most, as cores, GPUs and memory allow; default: two for each GPU, else one."
    )
    generate_batch_size: Count = Field(128, description="Prompts per generation batch at most; memory may allow fewer.")
    generate_processes: Count = Field(
        1, description="Processes that share the prompts of each generation, a CUDA device each where there are any."
    )
    checkpoint_every: Count = Field(25, description="Training steps between checkpoints.")
    launcher: Command = Field(
        "",
        description="What runs a command on each of the nodes, e.g. srun --nodes 2 --ntasks-per-node 1; ray with --backend ray; "
        "engine: command: what {launcher} stands for, e.g. torchrun --nproc-per-node 8.",
    )
    gradient_checkpointing: bool = Field(
        False, description="Compute the forward pass twice to keep less of it in memory; the weights are the same."
    )
    processes: Count = Field(
        1, description="Processes that share each step of a training, a CUDA device each where there are any."
    )
    nodes: Count = Field(1, description="Machines with so many processes each; launcher starts them.")
    fsdp: bool = Field(False, description="The processes share out weights, gradients and optimiser state too (FSDP2).")
    evaluate_every: Count | None = Field(None, description="Training steps between readings of the held-out rows.")
    report_to: list[Literal["trackio", "wandb", "mlflow", "tensorboard"]] = Field(
        [], description="Also send a training's metrics to these; nothing is sent unless asked."
    )


class Recipe(Section):
    """One study: base, languages, data, experts, baselines, merges, evaluation, judges."""

    name: Name = Field(description="Names the study's folder under runs/.")
    base: Base = Field(description="The model that everything starts from; a plain string is a path or a Hub id.")
    languages: list[Language] = Field(min_length=1, description="Languages of the study, as ISO 639-1 codes.")
    seed: Annotated[int, Field(ge=0)] = Field(0, description="Seed of every random draw.")
    data: dict[Name, DataSet] = Field({}, description="Data sets by name.")
    budget: StudyBudget | None = Field(None, description="How much every training sees, unless it says otherwise.")
    training: Training = Field(default_factory=Training, description="Defaults of every training.")
    adopted: dict[Name, Adopted] = Field({}, description="Models and adapters that were trained elsewhere.")
    experts: dict[Name, Trained] = Field({}, description="Models trained on one objective or language.")
    baselines: dict[Name, Trained] = Field({}, description="Models trained on a mixture of everything.")
    merges: dict[Name, Merge] = Field({}, description="Models merged from other candidates.")
    evaluation: Evaluation
    judges: Judges = Field(default_factory=Judges)
    statistics: Statistics = Field(default_factory=Statistics)
    how: How = Field(default_factory=How)

    @field_validator("base", mode="before")
    @classmethod
    def _plain_base(cls, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        return {"path": value} if value.startswith((".", "/", "~")) else {"hub": value}

    @field_validator("languages")
    @classmethod
    def _distinct(cls, value: list[str]) -> list[str]:
        return distinct_names(value)

    def training_of(self, trained: Trained) -> Training:
        """The recipe's training settings with this training's own keys on top."""
        own = {key: getattr(trained.training, key) for key in trained.training.model_fields_set}
        return self.training.model_copy(update=own)

    def candidates(self) -> dict[str, str]:
        """Name -> kind of every candidate, the base first, in the recipe's order."""
        out = {"base": "base"}
        groups = (("expert", self.adopted | self.experts), ("baseline", self.baselines), ("merge", self.merges))
        for kind, group in groups:
            out.update(dict.fromkeys(group, kind))
        return out

    def needs(self) -> dict[str, list[str]]:
        """Candidate -> the candidates that it is made from, but for the base."""
        started: dict[str, Adopted | Trained] = {**self.adopted, **self.experts, **self.baselines}
        needs = {name: [entry.start] for name, entry in started.items()}
        merged = {name: [*m.models, *([m.base] if m.base else [])] for name, m in self.merges.items()}
        return needs | {name: list(dict.fromkeys(models)) for name, models in merged.items()}
