"""Fixtures that several folders share."""

from __future__ import annotations

import secrets
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from service.ledger.database import Database, migrate
from tests.services import drop_database, make_database, postgres_url

# A shell's background jobs ignore SIGINT, and so would all that tests start: Ctrl-C is part of what they test.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def postgres_template() -> Iterator[tuple[str, str]]:
    """Yield (server URL, name of a migrated template database)."""
    with postgres_url() as server_url:
        name = f"edgekiln_template_{secrets.token_hex(4)}"
        migrate(make_database(server_url, name))
        yield server_url, name
        drop_database(server_url, name)


@pytest.fixture
def postgres_ledger_url(postgres_template: tuple[str, str]) -> Iterator[str]:
    """Yield the URL of an empty ledger in PostgreSQL, built by the migrations."""
    server_url, template = postgres_template
    name = f"edgekiln_test_{secrets.token_hex(4)}"
    yield make_database(server_url, name, template)
    drop_database(server_url, name)


@pytest.fixture
def sqlite_ledger_url(tmp_path: Path) -> str:
    """Return the URL of an empty ledger in SQLite, built by the migrations."""
    url = f"sqlite:///{tmp_path / 'ledger.db'}"
    migrate(url)
    return url


@pytest.fixture(params=["sqlite", "postgresql"])
def ledger_url(request: pytest.FixtureRequest) -> str:
    """Return the URL of an empty ledger, once in each database."""
    name = "sqlite_ledger_url" if request.param == "sqlite" else "postgres_ledger_url"
    url: str = request.getfixturevalue(name)
    return url


@pytest.fixture
def database(ledger_url: str) -> Iterator[Database]:
    """Yield an open ledger, once in each database."""
    database = Database(ledger_url)
    yield database
    database.close()


@pytest.fixture
def postgres_database(postgres_ledger_url: str) -> Iterator[Database]:
    """Yield an open ledger in PostgreSQL, for what only row locks can show."""
    database = Database(postgres_ledger_url)
    yield database
    database.close()
