"""What a recipe may say of evaluation: what candidates are asked, who judges the answers, how uncertainty is computed."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from mixmerge.recipe.section import Count, Fraction, Name, Section


class PromptSet(Section):
    """Prompts with a purpose, parallel across languages by id."""

    purpose: Literal["general", "harmful", "harmless"] = Field(
        description="general (has reference answers), harmful, or harmless (look-alikes that should be answered)."
    )
    path: str = Field(description="JSONL with id, prompt[, reference][, split]; {lang} stands for the language code.")
    columns: dict[str, str] = Field({}, description="Our column name -> the file's.")


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


class Evaluation(Section):
    """What every candidate is asked."""

    prompts: dict[Name, PromptSet] = Field(description="Prompt sets by name.")
    limit: Limit = Field(default_factory=Limit, description="Use fewer prompts than there are.")
    max_new_tokens: Count = Field(256, description="Longest response; a response cut there is counted as truncated.")
    overlap: Overlap = Field(
        default_factory=Overlap,
        description="What to do when a prompt also stands in the training data, in another set or in another split: "
        "refuse, drop, ignore, or a mapping.",
    )


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


class Judges(Section):
    """The local judges; the report names them and says how far they are to be trusted."""

    quality: QualityJudge = Field(default_factory=QualityJudge)
    refusal: RefusalJudge = Field(default_factory=RefusalJudge)


class Statistics(Section):
    """How uncertainty is computed."""

    draws: Annotated[int, Field(ge=100)] = Field(2000, description="Bootstrap draws.")
    level: Annotated[float, Field(gt=0.5, lt=1)] = Field(0.95, description="Level of the intervals.")
