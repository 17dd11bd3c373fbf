"""The recipe's schema for editors (JSON Schema) and for people (Markdown), both generated from the classes.

The classes describe a recipe as it is checked; what may be written is a little more: short forms (a plain string for a
base, a list of models), `{lang}` templates in names, and sweeps.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from mixmerge.recipe.schema import Recipe
from mixmerge.recipe.section import LANGUAGE, NAME

WRITTEN_NAME = r"^[A-Za-z0-9{][A-Za-z0-9._{}-]*$"
WRITTEN_LANGUAGE = r"^([a-z]{2,3}|\{lang\})$"

HEAD = """# Recipe reference

Generated from the schema by `mixmerge schema --markdown`; do not edit. Unknown keys are refused. Keys under `how` change
speed only; every other key is part of the identity of the steps that it touches.

One entry of `experts`, `baselines` or `merges` may stand for several. `{lang}` in its name writes it out for every language.
`{sweep: [0, 0.15, 1]}` in place of one of its values writes it out for each, and the swept key stands in braces in the name:
`"mix-{safety}": {mixture: {general: rest, safety: {sweep: [0, 0.15, 1]}}}` is mix-0, mix-0.15 and mix-1. `rest` is what the
others leave of 1: in `mixture`, in `languages`, and in one parameter of a merge's models.
"""
SWEEP: dict[str, Any] = {
    "type": "object",
    "properties": {"sweep": {"type": "array", "minItems": 1}},
    "required": ["sweep"],
    "additionalProperties": False,
}
REST: dict[str, Any] = {"const": "rest"}


def recipe_schema() -> dict[str, Any]:
    """The JSON Schema of a recipe as it is written, short forms and templates included."""
    written = json.dumps(Recipe.model_json_schema()).replace(json.dumps(NAME), json.dumps(WRITTEN_NAME))
    schema: dict[str, Any] = json.loads(written)
    trained, merge = schema["$defs"]["Trained"], schema["$defs"]["Merge"]
    for owner in (trained, merge):
        text = json.dumps(owner).replace(json.dumps(LANGUAGE), json.dumps(WRITTEN_LANGUAGE))
        owner.update(json.loads(text))
    _also(trained["properties"], "temperature", SWEEP)
    for name in ("Budget", "Training"):
        for key in schema["$defs"][name]["properties"]:
            _also(schema["$defs"][name]["properties"], key, SWEEP)
    for key in ("mixture", "languages"):
        shares = trained["properties"][key]["patternProperties"]
        for pattern in shares:
            shares[pattern] = {"anyOf": [shares[pattern], REST, SWEEP]}
    for key in ("caps", "max_repeats"):
        limits = trained["properties"][key]
        limits["additionalProperties"] = {"anyOf": [limits["additionalProperties"], SWEEP]}
    names = {"type": "array", "items": {"type": "string"}}
    _also(schema["$defs"]["Evaluation"]["properties"], "overlap", {"enum": ["refuse", "drop", "ignore"]})
    parameters = {"type": "object", "additionalProperties": {"type": ["object", "null"]}}
    _also(schema["properties"], "base", {"type": "string"})
    _also(trained["properties"], "mixture", {"type": "string"})
    _also(trained["properties"], "languages", names)
    for owner, key in ((trained, "budget"), (schema["$defs"]["StudyBudget"], "baselines")):
        _also(owner["properties"], key, {"enum": ["sum", "each"]})
    merge["properties"]["models"] |= {"anyOf": [names, parameters]}
    for key in ("type", "patternProperties", "propertyNames"):
        merge["properties"]["models"].pop(key, None)
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def _also(properties: dict[str, Any], key: str, form: dict[str, Any]) -> None:
    """Let a field be written in a short form as well."""
    field = properties[key]
    told = {name: field.pop(name) for name in ("description", "default", "title") if name in field}
    properties[key] = told | {"anyOf": [form, field]}


def recipe_reference() -> str:
    """One section per mapping of the recipe: key, type, default, meaning."""
    schema = recipe_schema()
    sections = [HEAD, *_section("recipe", schema)]
    for name, definition in schema["$defs"].items():
        sections += _section(name, definition)
    return "\n".join(sections)


def _section(name: str, definition: dict[str, Any]) -> Iterator[str]:
    yield f"## {name}\n"
    yield definition.get("description", "").split("\n")[0] + "\n"
    yield "| key | type | default | meaning |\n|---|---|---|---|"
    required = definition.get("required", [])
    for key, field in definition["properties"].items():
        default = "**required**" if key in required else _default(field)
        yield f"| `{key}` | {_type(field)} | {default} | {_cell(field.get('description', _linked(field)))} |"
    yield ""


def _default(field: dict[str, Any]) -> str:
    value = field.get("default")
    return "" if value in (None, {}) else f"`{str(value).lower() if isinstance(value, bool) else value}`"


def _linked(field: dict[str, Any]) -> str:
    return f"See [{_name(field['$ref'])}](#{_name(field['$ref']).lower()})." if "$ref" in field else ""


def _type(field: dict[str, Any]) -> str:
    if "$ref" in field:
        return f"[{_name(field['$ref'])}](#{_name(field['$ref']).lower()})"
    if "anyOf" in field:
        told = (option for option in field["anyOf"] if option.get("type") != "null" and option not in (SWEEP, REST))
        return " or ".join(_type(option) for option in told)
    if "enum" in field:
        return " \\| ".join(f"`{value}`" for value in field["enum"])
    kind = field.get("type", "any")
    if kind == "array":
        return f"list of {_type(field['items'])}"
    if kind == "object":
        values = field.get("additionalProperties") or next(iter(field.get("patternProperties", {}).values()), None)
        return f"mapping of {_type(values)}" if isinstance(values, dict) else "mapping"
    if isinstance(kind, list):
        kind = " or ".join(kind)
    return str(kind) + _range(field)


def _range(field: dict[str, Any]) -> str:
    signs = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
    limits = [f"{sign} {field[key]:g}" for key, sign in signs.items() if key in field]
    return f" ({', '.join(limits)})" if limits else ""


def _name(reference: str) -> str:
    return reference.rpartition("/")[2]


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
