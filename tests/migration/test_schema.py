"""The migrations and the tables tell the same schema."""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import inspect

from service.ledger.database import Database, migrate
from service.ledger.tables import Base


def test_migrations_make_the_tables_that_the_code_knows(database: Database) -> None:
    with database.engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True, "compare_server_default": True})
        assert compare_metadata(context, Base.metadata) == []


def test_a_missing_column_would_be_seen(database: Database) -> None:
    """Control: the comparison is not blind."""
    with database.engine.begin() as connection:
        connection.exec_driver_sql("ALTER TABLE events DROP COLUMN created_at")
    with database.engine.connect() as connection:
        differences = compare_metadata(MigrationContext.configure(connection), Base.metadata)
    assert [difference[0] for difference in differences] == ["add_column"]


def test_checks_and_partial_indexes_are_in_the_database(database: Database) -> None:
    """What the comparison does not look at."""
    schema = inspect(database.engine)
    checks = {str(check["name"]) for table in schema.get_table_names() for check in schema.get_check_constraints(table)}
    assert {"ck_jobs_finalized", "ck_variants_finalized", "ck_steps_finalized", "ck_steps_leased"} <= checks
    indexes = {str(index["name"]): index for index in schema.get_indexes("steps")}
    assert indexes["uq_steps_shared_key"]["unique"]
    assert "retired_at" in read_condition(indexes["uq_steps_shared_key"])
    assert "queued" in read_condition(indexes["ix_steps_due"])


def read_condition(index: Any) -> str:
    """The WHERE of a partial index."""
    return " ".join(str(value) for value in index["dialect_options"].values())


def test_processes_that_start_together_migrate_once(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'new' / 'ledger.db'}"
    # Alembic's context is one a process, and so are ours.
    with ProcessPoolExecutor(3, mp_context=get_context("spawn")) as pool:
        list(pool.map(migrate, [url] * 3))
    database = Database(url)
    assert "steps" in inspect(database.engine).get_table_names()
    database.close()
