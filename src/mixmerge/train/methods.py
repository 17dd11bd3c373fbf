"""Training by the method that a train step's `what` names."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mixmerge.train.dpo import train_dpo
from mixmerge.train.fit import Measured
from mixmerge.train.settings import DpoSettings, settings_from
from mixmerge.train.sft import train_sft


def train_by(what: Mapping[str, Any], model: Path, mixture: Path, out: Path, **place: Any) -> Measured:
    """Train as `train_sft` or `train_dpo` does, which the settings in `what` tell; `place` is what else these take."""
    settings = settings_from(what)
    if isinstance(settings, DpoSettings):
        return train_dpo(model, mixture, out, settings, **place)
    return train_sft(model, mixture, out, settings, **place)
