"""The model card of a merge (README.md) and its configuration as YAML, both made from the configuration alone.

Invariant: the YAML on the card is the file mergekit_config.yml beside it, and reading it back gives the same merge.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping
from typing import Any

from ruamel.yaml import YAML

from mixmerge.merge.settings import MergeConfig

_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+(@[\w.-]+)?")


def to_yaml(config: MergeConfig) -> str:
    """The configuration as mergekit's YAML, after those of the merges that feed it."""
    text = io.StringIO()
    writer = YAML()
    writer.width = 4096  # never fold a long path
    writer.dump_all([merge.to_mergekit() for merge in (*config.earlier, config)], text)
    return text.getvalue()


def model_card(config: MergeConfig, measured: Mapping[str, Any]) -> str:
    """README.md in the Hub's format: models, method, parameters, measured shares, exact YAML."""
    made = {merge.name for merge in config.earlier}
    models = [name for merge in (config, *config.earlier) for name in merge.references if name not in made]
    models = list(dict.fromkeys(models))
    # the Hub links what stands here, so a local folder must not
    hub_ids = [name.partition("@")[0] for name in models if _HUB_ID.fullmatch(name)]
    front: dict[str, Any] = {"base_model": hub_ids} if hub_ids else {}
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
