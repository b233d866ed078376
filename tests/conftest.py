"""Fixtures that several folders share."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import create_engine, text
from sqlalchemy.engine import make_url

from service.ledger.database import Database, migrate
from tests.services import postgres_url


@pytest.fixture(scope="session")
def postgres_template() -> Iterator[tuple[str, str]]:
    """Yield (server URL, name of a migrated template database)."""
    with postgres_url() as server_url:
        name = f"edgekiln_template_{secrets.token_hex(4)}"
        _administer(server_url, f"CREATE DATABASE {name}")
        migrate(_in_database(server_url, name))
        yield server_url, name
        _administer(server_url, f"DROP DATABASE {name} WITH (FORCE)")


@pytest.fixture
def postgres_ledger_url(postgres_template: tuple[str, str]) -> Iterator[str]:
    """Yield the URL of an empty ledger in PostgreSQL, built by the migrations."""
    server_url, template = postgres_template
    name = f"edgekiln_test_{secrets.token_hex(4)}"
    _administer(server_url, f"CREATE DATABASE {name} TEMPLATE {template}")
    yield _in_database(server_url, name)
    _administer(server_url, f"DROP DATABASE {name} WITH (FORCE)")


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


def _in_database(server_url: str, name: str) -> str:
    return make_url(server_url).set(database=name).render_as_string(hide_password=False)


def _administer(server_url: str, statement: str) -> None:
    engine = create_engine(server_url, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.execute(text(statement))
    engine.dispose()
