"""The hostile server on loopback and a client of it."""

from __future__ import annotations

import pytest
from asking import QUICK
from hostile_server import hostile_server

from mixmerge.evaluate.client import Client


@pytest.fixture(scope="module")
def process():
    with hostile_server() as server:
        yield server


@pytest.fixture
def server(process):
    """Well-behaved until told otherwise."""
    return process.plan()


@pytest.fixture
def client(server, tmp_path):
    with Client([server.url], answers=tmp_path / "answers.db", limits=QUICK) as client:
        yield client
