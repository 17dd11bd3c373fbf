"""Tiny models and a mixture that several tests train on; made once a session."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_training import FACTS, FORMS, tiny_model, write_rows


@pytest.fixture(scope="session")
def facts(tmp_path_factory) -> Path:
    """24 rows, four facts asked in six ways."""
    return write_rows(
        tmp_path_factory.mktemp("facts"), [(form.format(thing), answer) for form in FORMS for thing, answer in FACTS]
    )


@pytest.fixture(scope="session")
def choices(tmp_path_factory) -> Path:
    """24 pairs: the fact is preferred to another thing's."""
    rejected = [answer for _, answer in [*FACTS[1:], FACTS[0]]]
    rows = [(form.format(thing), answer, rejected[at]) for form in FORMS for at, (thing, answer) in enumerate(FACTS)]
    return write_rows(tmp_path_factory.mktemp("choices"), rows)


@pytest.fixture(scope="session")
def llama(tmp_path_factory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("llama"), attention_dropout=0.1)


@pytest.fixture(scope="session")
def gemma(tmp_path_factory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("gemma"), "gemma3")
