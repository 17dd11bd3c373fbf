"""mergekit as an oracle: a black box in its own environment, asked through one long-lived process.

`Config` is a configuration over models' short names; `ours` and `Oracle.merge` carry it out over the same folders.
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from model_folders import Tensors, read_model

from mixmerge.merge import merge, parse_config

DRIVER = Path(__file__).with_name("oracle_driver.py")
WEIGHTS = {"a": 0.7, "b": 0.4, "c": 1.1, "x": 0.9, "y": 0.3, "base": 0.5}


@dataclass(frozen=True)
class Models:
    """Model folders and their tensors, by short name."""

    folders: dict[str, Path]
    tensors: dict[str, Tensors]


@dataclass(frozen=True)
class Config:
    """`models` holds one letter (or 'base') for each model; `each` their own parameters, by default a weight."""

    method: str
    models: tuple[str, ...]
    base: bool
    parameters: dict[str, Any] = field(default_factory=dict)
    each: dict[str, dict[str, Any]] = field(default_factory=dict)
    dtype: str = "float32"

    def over(self, folders: dict[str, Path]) -> dict[str, Any]:
        """As mergekit's YAML would be read."""
        models = [{"model": str(folders[name]), "parameters": self.each.get(name, {})} for name in self.models]
        config = {"merge_method": self.method, "models": models, "dtype": self.dtype, "parameters": self.parameters}
        return config | ({"base_model": str(folders["base"])} if self.base else {})


def config(method, models, *, base=True, each=None, **parameters) -> Config:
    """`each`: parameters of each model, True for the weights above. `lambda_` is lambda."""
    names = tuple(models)
    own = {name: {"weight": WEIGHTS[name]} for name in names} if each is True else each or {}
    parameters = {name.rstrip("_"): value for name, value in parameters.items()}
    return Config(method, names, base, parameters, own)


def ours(asked: Config, models: Models, out: Path, seed: int = 0, **top: Any) -> Tensors:
    """The merged tensors by name."""
    merge(parse_config(asked.over(models.folders) | {"seed": seed} | top), out, threads=1)
    return read_model(out)


def distance(one: Tensors, other: Tensors) -> float:
    """The largest difference, relative to the largest magnitude of its tensor."""
    assert one.keys() == other.keys()
    worst = 0.0
    for name, tensor in one.items():
        assert tensor.dtype == other[name].dtype
        size = tensor.abs().max().item()
        gap = (tensor.double() - other[name].double()).abs().max().item()
        worst = max(worst, gap / size if size else gap)
    return worst


class Oracle:
    """`executable` is its mergekit-yaml; the Python that it belongs to stands beside it."""

    def __init__(self, executable: Path, root: Path) -> None:
        self._log = (root / "oracle.log").open("w+", encoding="utf-8")
        self._root, self._number = root, itertools.count()
        self._process = subprocess.Popen(
            [str(executable.with_name("python")), str(DRIVER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env=os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": ""},
        )

    def merge(self, asked: Config, models: Models, seed: int = 0, **top: Any) -> dict[str, torch.Tensor]:
        """The merged tensors by name.

        Raises:
            ValueError: the oracle refuses or fails; what it says.
        """
        return read_model(self.carry_out(asked.over(models.folders) | top, seed))

    def carry_out(self, config: dict[str, Any], seed: int = 0) -> Path:
        """The folder of the merge of mergekit's YAML as data.

        Raises:
            ValueError: the oracle refuses or fails; what it says.
        """
        out = self._root / f"merge{next(self._number)}"
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps({"config": config, "out": str(out), "seed": seed}) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        assert answer, f"the oracle has died: see {self._log.name}"
        error = json.loads(answer)["error"]
        if error is not None:
            raise ValueError(error)
        return out

    def close(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(30)
        self._process.stdout.close()
        self._log.close()
