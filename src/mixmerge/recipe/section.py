"""What all parts of a recipe's schema share: a section, the types of its values, and lists of names."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints
from pydantic_core import PydanticCustomError

from mixmerge.recipe.secrets import secret_field, secret_in_command

NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"
Name = Annotated[str, StringConstraints(pattern=NAME, max_length=80)]
LANGUAGE = r"^[a-z]{2,3}$"
Language = Annotated[str, StringConstraints(pattern=LANGUAGE)]
Fraction = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]


def _command_without_secrets(value: Any) -> Any:
    """Refuse a command that holds what looks like a secret, without repeating it."""
    if isinstance(value, str) and secret_in_command(value):
        what = (
            "what looks like a secret stands in the command, and would be written into plan, record and report: "
            "set it in the environment, which what is started inherits"
        )
        raise PydanticCustomError("secret", "{what}", {"what": what})
    return value


def _options_without_secrets(fields: Any) -> Any:
    """Refuse options one of which looks like a secret, without repeating it."""
    if isinstance(fields, dict) and (name := secret_field(fields)) is not None:
        what = f"{name} looks like a secret, and would be written into plan and record: set it in the environment"
        raise PydanticCustomError("secret", "{what}", {"what": what})
    return fields


Command = Annotated[str, BeforeValidator(_command_without_secrets)]
Options = Annotated[dict[str, Any], BeforeValidator(_options_without_secrets)]


class Section(BaseModel):
    """A mapping in the recipe: unknown keys refused, no coercion between types, immutable once read."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


def distinct_names(value: list[Any]) -> list[str]:
    """A list in which every name stands once; ValueError otherwise."""
    for index, name in enumerate(value):
        if not isinstance(name, str):
            raise ValueError(f"expected a list of names, it has {name!r}")
        if name in value[:index]:
            raise ValueError(f"'{name}' is listed twice")
    return value
