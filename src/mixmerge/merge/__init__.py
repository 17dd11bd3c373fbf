"""Merging models: `merge("config.yml", out)` on mergekit's YAML; stands alone, needs neither recipe nor torch."""

from mixmerge.callable import make_callable
from mixmerge.merge.config import load_config, parse_config
from mixmerge.merge.memory import merge_state_dicts
from mixmerge.merge.methods import METHODS
from mixmerge.merge.settings import MergeConfig
from mixmerge.merge.stream import merge
from mixmerge.merge.verify import rehearse, verify

__all__ = ["METHODS", "MergeConfig", "load_config", "merge", "merge_state_dicts", "parse_config", "rehearse", "verify"]

make_callable(__name__)
