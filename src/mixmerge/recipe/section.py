"""What all parts of a recipe's schema share: a section, the types of its values, and lists of names."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"
Name = Annotated[str, StringConstraints(pattern=NAME, max_length=80)]
LANGUAGE = r"^[a-z]{2,3}$"
Language = Annotated[str, StringConstraints(pattern=LANGUAGE)]
Fraction = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]


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
