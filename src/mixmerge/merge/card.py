"""The model card of a merge (README.md) and its configuration as YAML, both made from the configuration alone.

Invariant: the YAML on the card is the file mergekit_config.yml beside it, and reading it back gives the same merge.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError
from ruamel.yaml.scalarstring import DoubleQuotedScalarString

from mixmerge.merge.settings import MergeConfig

_FRONT = re.compile(r"---\n(.*?)\n---\s*\n", re.DOTALL)
_LANGUAGE = re.compile(r"[A-Za-z][A-Za-z0-9_-]{1,20}")
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+(@[\w.-]+)?")


def to_yaml(config: MergeConfig) -> str:
    """The configuration as mergekit's YAML, after those of the merges that feed it."""
    text = io.StringIO()
    writer = YAML()
    writer.width = 4096  # never fold a long path
    writer.dump_all([merge.to_mergekit() for merge in (*config.earlier, config)], text)
    return text.getvalue()


def languages_of(folders: Iterable[Path]) -> list[str]:
    """The languages that the models' own cards name, each once."""
    found: dict[str, None] = {}
    for folder in folders:
        try:
            head = _FRONT.match((folder / "README.md").read_text(encoding="utf-8"))
            front = YAML(typ="safe").load(head[1]) if head else None
        except (OSError, UnicodeDecodeError, YAMLError, RecursionError, ValueError):
            continue  # a card may be missing or broken: the weights are what is merged
        named = front.get("language") if isinstance(front, dict) else None
        codes = named if isinstance(named, list) else [named]
        found |= dict.fromkeys(code for code in codes if isinstance(code, str) and _LANGUAGE.fullmatch(code))
    return list(found)


def model_card(config: MergeConfig, measured: Mapping[str, Any], languages: Iterable[str] = ()) -> str:
    """README.md in the Hub's format: models, their languages, method, parameters, measured shares, exact YAML."""
    made = {merge.name for merge in config.earlier}
    models = [name for merge in (config, *config.earlier) for name in merge.references if name not in made]
    models = list(dict.fromkeys(models))
    # the Hub links what stands here, so a local folder must not
    from_hub = [name for name in models if _HUB_ID.fullmatch(name) and not (config.folder / name).is_dir()]
    hub_ids = [name.partition("@")[0] for name in from_hub]
    front: dict[str, Any] = {"base_model": hub_ids} if hub_ids else {}
    # quoted, for readers to whom a plain no is false
    front |= {"language": [DoubleQuotedScalarString(code) for code in languages]} if languages else {}
    front |= {"library_name": "transformers", "tags": ["merge", "mixmerge", config.merge_method]}
    head = io.StringIO()
    YAML().dump(front, head)
    lines = [f"- `{name}`{' (base)' if name == config.base_model else ''}" for name in models]
    facts = [f"- {key}: {value:.6g}" for key, value in measured.items() if key.endswith("_share")]
    facts += [f"- parameters: {measured['parameters']:,} in {measured['tensors']:,} tensors", f"- seed: {config.seed}"]
    notes = [f"- {note}" for note in measured.get("notes", config.notes)]
    return "\n".join(
        [
            f"---\n{head.getvalue()}---",
            "# Merged model",
            f"Made with mixmerge by **{config.merge_method}**: {config.method.summary}.",
            "## Models\n",
            *lines,
            "\n## Facts\n",
            *facts,
            *notes,
            "\n## Configuration\n",
            f"```yaml\n{to_yaml(config)}```\n",
        ]
    )
