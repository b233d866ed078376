"""Rolling upgrades: each migration leaves a schema that processes of the version before can go on with.

Looked at is what their statements name: every table and column, its type, whether it may be left out. What no catalogue
of columns shows, such as a new CHECK that old values fail, is for whoever writes the migration.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from pathlib import Path

import pytest
from alembic.config import Config
from alembic.script import ScriptDirectory
from sqlalchemy import Engine, create_engine, inspect

from service.ledger.clock import now
from service.ledger.database import Database, migrate
from service.ledger.tables import Tenant
from tests.services import drop_database, make_database

#: Table -> column -> (type, whether an INSERT may leave it out, whether it may be NULL).
Schema = dict[str, dict[str, tuple[str, bool, bool]]]

#: Before the first release, 0.1.0, nobody had a version before; only the API read this one. Nothing is added here.
UNRELEASED = {("0009", "api_keys.is_operator is gone")}


@pytest.fixture(params=["sqlite", "postgresql"])
def empty_url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path / 'ledger.db'}"
        return
    server_url, _ = request.getfixturevalue("postgres_template")
    name = f"edgekiln_rolling_{secrets.token_hex(4)}"
    yield make_database(server_url, name)
    drop_database(server_url, name)


def list_revisions() -> list[str]:
    """All revisions, the oldest first."""
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parents[2] / "migrations"))
    return [each.revision for each in ScriptDirectory.from_config(config).walk_revisions()][::-1]


def read_schema(engine: Engine) -> Schema:
    found = inspect(engine)
    return {
        table: {
            column["name"]: (
                str(column["type"]),
                bool(column["nullable"]) or column["default"] is not None,
                bool(column["nullable"]),
            )
            for column in found.get_columns(table)
        }
        for table in found.get_table_names()
        if table != "alembic_version"
    }


def find_faults(before: Schema, after: Schema) -> set[str]:
    """Return what statements written for `before` would trip over in `after`."""
    faults = {f"{table} is gone" for table in before.keys() - after.keys()}
    for table in before.keys() & after.keys():
        old, new = before[table], after[table]
        faults |= {f"{table}.{column} is gone" for column in old.keys() - new.keys()}
        faults |= {f"{table}.{column} must be given" for column in new.keys() - old.keys() if not new[column][1]}
        for column in old.keys() & new.keys():
            if old[column][0] != new[column][0]:
                faults.add(f"{table}.{column} has another type")
            if old[column][1] and not new[column][1]:
                faults.add(f"{table}.{column} must be given now")
            if old[column][2] and not new[column][2]:
                faults.add(f"{table}.{column} may not be NULL now")
    return faults


def test_migrations_take_nothing_away(empty_url: str) -> None:
    faults: set[tuple[str, str]] = set()
    before: Schema = {}
    engine = create_engine(empty_url)
    for revision in list_revisions():
        migrate(empty_url, revision)
        after = read_schema(engine)
        faults |= {(revision, fault) for fault in find_faults(before, after)}
        before = after
    engine.dispose()
    assert "steps" in before
    assert faults == UNRELEASED


@pytest.mark.parametrize(
    ("statement", "fault"),
    [
        ("ALTER TABLE events DROP COLUMN created_at", "events.created_at is gone"),
        ("ALTER TABLE events RENAME COLUMN created_at TO at", "events.created_at is gone"),
        ("DROP TABLE api_keys", "api_keys is gone"),
    ],
)
def test_what_is_taken_away_would_be_seen(sqlite_ledger_url: str, statement: str, fault: str) -> None:
    """Control."""
    engine = create_engine(sqlite_ledger_url)
    before = read_schema(engine)
    with engine.begin() as connection:
        connection.exec_driver_sql(statement)
    assert fault in find_faults(before, read_schema(engine))
    engine.dispose()


def test_what_must_be_given_would_be_seen(postgres_ledger_url: str) -> None:
    """Control."""
    engine = create_engine(postgres_ledger_url)
    before = read_schema(engine)
    with engine.begin() as connection:
        connection.exec_driver_sql("ALTER TABLE events ADD COLUMN tenant text NOT NULL")
        connection.exec_driver_sql("ALTER TABLE jobs ALTER COLUMN finalized_at TYPE text")
        connection.exec_driver_sql("ALTER TABLE attempts ALTER COLUMN error SET NOT NULL")
    assert find_faults(before, read_schema(engine)) == {
        "events.tenant must be given",
        "jobs.finalized_at has another type",
        "attempts.error must be given now",
        "attempts.error may not be NULL now",
    }
    engine.dispose()


def test_a_process_starts_on_a_ledger_that_a_newer_version_has_migrated(ledger_url: str) -> None:
    """One that is started again in the midst of an upgrade is of the old version, and finds the new schema."""
    engine = create_engine(ledger_url)
    with engine.begin() as connection:
        connection.exec_driver_sql("UPDATE alembic_version SET version_num = 'newer'")
    migrate(ledger_url)
    with engine.connect() as connection:
        assert connection.exec_driver_sql("SELECT version_num FROM alembic_version").scalar() == "newer"
    engine.dispose()
    database = Database(ledger_url)
    database.write(lambda tx: tx.connection.execute(tx.insert(Tenant).values(id="t", created_at=now())))
    database.close()
