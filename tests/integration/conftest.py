"""A service without workers, reached in the ways that users reach it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient
from typer.testing import CliRunner

from service.cli import app
from tests.api_world import World, make_world


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    with make_world(tmp_path) as made:
        yield made


@pytest.fixture
def http(world: World) -> Iterator[TestClient]:
    """A client of the API without a socket."""
    with world.http() as client:
        yield client


@pytest.fixture
def url(world: World) -> Iterator[str]:
    """The address of the API on a real socket."""
    with world.server() as served:
        yield served


@pytest.fixture
def run(url: str, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Run the command line against the API; returns what click's runner does."""
    monkeypatch.setenv("EDGEKILN_URL", url)
    runner = CliRunner()
    return lambda *arguments: runner.invoke(app, [str(argument) for argument in arguments])
